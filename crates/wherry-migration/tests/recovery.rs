//! Postcopy that is steered, cut off, taken up elsewhere, or can never be finished.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use support::proxy::Proxy;
use support::{FakeMachine, Load, Wire, World, assert_same_memory, at, await_that, block, random_vm};
use wherry_migration::machine::Machine;
use wherry_migration::progress::Phase;
use wherry_migration::testpoint::Point;
use wherry_migration::{Event, EventKind, Journey, JourneyError, Mode};
use wherry_stream::{Endpoint, Listener};

const MIB: u64 = 1 << 20;

/// Whether faults can be served here.
fn permitted() -> bool {
    let permitted = wherry_fault::Userfault::open().map(|_| ());
    if let Err(error) = &permitted {
        println!("SKIPPED: {error}");
    }
    permitted.is_ok()
}

/// A guest at rest with `pages` pages of data in 256 MiB, and a world that moves it by postcopy.
fn world_of(pages: u64) -> (World, Arc<FakeMachine>) {
    let mut world = World::new(Wire::Tcp);
    world.source_options.mode = Mode::Postcopy;
    let machine = FakeMachine::new(random_vm(), &[block(0, 0, 256 * MIB)], Arc::default());
    machine.fill(0, 0..pages, 5);
    machine.power_on(Load::NONE);
    (world, machine)
}

fn paused(journey: &Journey) -> bool {
    journey.job().phase == Phase::Paused
}

#[test]
fn a_migration_that_is_told_to_switch_in_the_middle_of_a_round_does_not_finish_it() {
    if !permitted() {
        return;
    }
    let (mut world, machine) = world_of(32_768);
    world.source_options.mode = Mode::Hybrid;
    // The round would last for 30 s and the test for as long.
    world.source_options.bandwidth = Some(4 * MIB);
    let (journey, events) = (world.source_journey.clone(), world.source_journey.subscribe());
    let teller = std::thread::spawn(move || {
        let moving = |event: &Event| event.kind == EventKind::Progress && event.job.memory_processed > 0;
        assert!(events.iter().any(|event| moving(&event)), "the journey ended before a page moved");
        journey.switch_to_postcopy().unwrap();
    });
    // What follows need not crawl.
    let journey = world.source_journey.clone();
    at(&world.destination_journey, Point::DestinationRunning, move || journey.set_bandwidth(None));
    let (sent, received) = world.journey(&machine, None);
    teller.join().unwrap();
    let sent = sent.unwrap();
    assert_same_memory(&*machine, &*received.unwrap().0);
    assert_eq!(sent.rounds.len(), 1);
    assert!(sent.postcopy.is_some(), "nothing followed");
    assert!(sent.rounds[0].bytes < 100 * MIB, "the round went to its end: {:?}", sent.rounds[0]);
}

#[test]
fn a_precopy_that_passes_its_deadline_within_a_round_switches_if_it_may() {
    if !permitted() {
        return;
    }
    let (mut world, machine) = world_of(32_768);
    world.source_options.mode = Mode::Hybrid;
    world.source_options.bandwidth = Some(4 * MIB);
    world.source_options.deadline = Duration::from_millis(300);
    let journey = world.source_journey.clone();
    at(&world.destination_journey, Point::DestinationRunning, move || journey.set_bandwidth(None));
    let (sent, received) = world.journey(&machine, None);
    assert!(sent.unwrap().postcopy.is_some());
    assert_same_memory(&*machine, &*received.unwrap().0);
}

#[test]
fn a_switch_that_is_impossible_is_refused_with_the_reason() {
    if !permitted() {
        return;
    }
    assert!(Journey::new().switch_to_postcopy().unwrap_err().contains("not begun"));
    for (mode, verify, faults, why) in [
        (Mode::Precopy, false, true, "--mode precopy"),
        (Mode::Hybrid, true, true, "--verify"),
        (Mode::Hybrid, false, false, "the destination cannot"),
    ] {
        let (mut world, machine) = world_of(100);
        world.source_options.mode = mode;
        world.source_options.verify = verify;
        world.builder.no_faults = (!faults).then(|| "not here".into());
        let journey = world.source_journey.clone();
        at(&world.source_journey, Point::SourceRound, move || {
            let refused = journey.switch_to_postcopy().unwrap_err();
            assert!(refused.contains(why), "{refused}");
        });
        let (sent, received) = world.journey(&machine, None);
        assert!(sent.unwrap().postcopy.is_none());
        assert_same_memory(&*machine, &*received.unwrap().0);
    }
}

#[test]
fn a_lost_link_is_taken_up_over_another_address_when_told_so() {
    if !permitted() {
        return;
    }
    let (mut world, machine) = world_of(65_536);
    world.source_options.recover = None;
    assert!(!world.source_journey.recover(None), "there is nothing to recover");
    let proxy = Proxy::new(world.listener.local_endpoint());
    let link = proxy.handle();
    // For good.
    at(&world.destination_journey, Point::DestinationRunning, move || link.cut());
    let (source, destination) = (world.source_journey.clone(), world.destination_journey.clone());
    let elsewhere = Listener::bind(&Endpoint::Tcp { host: "127.0.0.1".into(), port: 0 }).unwrap();
    let to = elsewhere.local_endpoint().clone();
    let helper = std::thread::spawn(move || {
        await_that("both ends to feel the loss", || {
            (paused(&source) || source.job().phase == Phase::InDoubt) && paused(&destination)
        });
        if source.job().phase == Phase::InDoubt {
            return false;
        }
        assert!(source.job().error.unwrap().contains("paused"));
        assert!(destination.recover_at(elsewhere));
        assert!(source.recover(Some(to)));
        true
    });
    let (sent, received) = world.journey(&machine, Some(proxy.endpoint()));
    if !helper.join().unwrap() {
        println!("the link was lost with the news that the VM runs: another test's subject");
        return;
    }
    assert_eq!(sent.unwrap().phase, Phase::Done);
    assert_same_memory(&*machine, &*received.unwrap().0);
}

#[test]
fn a_link_that_only_seems_to_live_is_replaced_when_told_so() {
    if !permitted() {
        return;
    }
    let (mut world, machine) = world_of(65_536);
    // Nobody gives up by himself as long as the test lasts.
    world.source_options.timeouts.silent = Duration::from_secs(60);
    world.destination_options.timeouts.silent = Duration::from_secs(60);
    let proxy = Proxy::new(world.listener.local_endpoint());
    let link = proxy.handle();
    let stalled = Arc::new(AtomicBool::new(false));
    let seen = stalled.clone();
    // The source has heard that it runs there.
    at(&world.source_journey, Point::SourceRunning, move || {
        link.stall();
        seen.store(true, Ordering::SeqCst);
    });
    let (source, to) = (world.source_journey.clone(), world.listener.local_endpoint().clone());
    let helper = std::thread::spawn(move || {
        await_that("the link to stall", || stalled.load(Ordering::SeqCst) && source.job().phase == Phase::Postcopy);
        assert!(source.recover(Some(to)));
    });
    let (sent, received) = world.journey(&machine, Some(proxy.endpoint()));
    helper.join().unwrap();
    assert_eq!(sent.unwrap().phase, Phase::Done);
    assert_same_memory(&*machine, &*received.unwrap().0);
}

#[test]
fn a_vm_that_ends_while_its_memory_follows_ends_the_journey_at_both_ends() {
    if !permitted() {
        return;
    }
    let (mut world, machine) = world_of(65_536);
    world.source_options.bandwidth = Some(8 * MIB);
    let (journey, built) = (world.destination_journey.clone(), world.builder.built.clone());
    let helper = std::thread::spawn(move || {
        await_that("memory to follow", || journey.job().phase == Phase::Postcopy);
        let built = built.lock().unwrap().clone().unwrap();
        built.units().stop(Duration::from_secs(5)).unwrap();
        journey.vm_ended("the guest has powered off");
    });
    let (sent, received) = world.journey(&machine, None);
    helper.join().unwrap();
    let sent = sent.unwrap();
    assert_eq!(sent.phase, Phase::Done);
    assert!(sent.error.as_ref().unwrap().contains("the guest has powered off"), "{:?}", sent.error);
    let error = received.map(|(_, job)| job).unwrap_err();
    assert!(matches!(error, JourneyError::NotHere(_)) && error.to_string().contains("powered off"), "{error}");
}

#[test]
fn a_vm_that_ends_while_its_link_is_lost_does_not_keep_its_destination_waiting() {
    if !permitted() {
        return;
    }
    let (mut world, machine) = world_of(65_536);
    world.source_options.recover = Some(Duration::from_secs(2));
    world.destination_options.recover = None;
    let proxy = Proxy::new(world.listener.local_endpoint());
    let link = proxy.handle();
    at(&world.destination_journey, Point::DestinationRunning, move || link.cut());
    let journey = world.destination_journey.clone();
    let helper = std::thread::spawn(move || {
        await_that("the loss to be felt", || paused(&journey));
        journey.vm_ended("its user has ended it");
    });
    let (_, received) = world.journey(&machine, Some(proxy.endpoint()));
    helper.join().unwrap();
    let error = received.map(|(_, job)| job).unwrap_err();
    assert!(error.to_string().contains("its user has ended it"), "{error}");
}

#[test]
fn memory_is_freed_as_it_is_sent_on_demand_and_a_guest_that_faults_meanwhile_finds_all_of_it() {
    if !permitted() {
        return;
    }
    for seed in 0..3 {
        let (mut world, machine) = world_of(32_768);
        machine.fill(0, 0..32_768, seed + 1);
        let twin = FakeMachine::new(random_vm(), &[block(0, 0, 256 * MIB)], Arc::default());
        twin.fill(0, 0..32_768, seed + 1);
        world.source_options.release = true;
        world.source_options.channels = Some(1 + seed as u16);
        let load = Load { rate: 60_000, pages: 32_768, zero_one_in: 5 };
        let built = world.builder.built.clone();
        at(&world.destination_journey, Point::DestinationLoaded, move || {
            built.lock().unwrap().as_ref().unwrap().set_load(load);
        });
        let (sent, received) = world.journey(&machine, None);
        assert!(sent.unwrap().memory_postcopy_requests > 0, "seed {seed}: nothing was missed");
        let there = received.unwrap().0;
        let built = world.built();
        built.units().stop(Duration::from_secs(5)).unwrap();
        twin.replay_until(built.cpu.writes(), load);
        assert_same_memory(&*twin, &*there);
        assert_eq!(machine.allocated_pages(), 0, "seed {seed}: memory was kept");
    }
}

#[test]
fn a_link_that_is_lost_when_memory_was_freed_loses_the_vm_and_both_ends_say_so() {
    if !permitted() {
        return;
    }
    let (mut world, machine) = world_of(65_536);
    world.source_options.release = true;
    world.source_options.recover = None;
    world.destination_options.recover = None;
    let proxy = Proxy::new(world.listener.local_endpoint());
    let link = proxy.handle();
    at(&world.source_journey, Point::SourceRunning, move || {
        link.cut();
        link.mend();
    });
    let (sent, received) = world.journey(&machine, Some(proxy.endpoint()));
    let (sent, received) = (sent.unwrap_err(), received.map(|(_, job)| job).unwrap_err());
    assert!(matches!(sent, JourneyError::Lost(_)) && sent.to_string().contains("recovery is refused"), "{sent}");
    assert!(matches!(received, JourneyError::Lost(_)) && received.to_string().contains("freed"), "{received}");
    assert!(!world.built().is_running() && !machine.is_running());
    assert_eq!(world.source_journey.job().phase, Phase::Failed);
    assert_eq!(world.destination_journey.job().phase, Phase::Failed);
}

#[test]
fn a_source_hears_from_the_next_process_that_its_destination_has_died() {
    if !permitted() {
        return;
    }
    let (mut world, machine) = world_of(65_536);
    world.source_options.recover = None;
    world.destination_options.recover = Some(Duration::ZERO);
    let proxy = Proxy::new(world.listener.local_endpoint());
    let link = proxy.handle();
    let cut = link.clone();
    at(&world.source_journey, Point::SourceRunning, move || cut.cut());
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| world.journey(&machine, Some(proxy.endpoint())));
        await_that("the destination to give up, as if it had died", || {
            paused(&world.source_journey)
                && world.destination_journey.job().error.is_some_and(|e| e.contains("paused:"))
        });
        // The record says that it ran, and nobody claims it any more.
        let next = Journey::new();
        let (listener, builder) = (&world.listener, support::FakeBuilder::new());
        let options = world.destination_options.clone();
        let stop = next.clone();
        let receiver =
            scope.spawn(move || wherry_migration::destination::receive(listener, &builder, options, &stop).map(|_| ()));
        link.mend();
        let (sent, _) = sender.join().unwrap();
        let sent = sent.unwrap_err();
        assert!(matches!(sent, JourneyError::Lost(_)), "{sent}");
        assert!(sent.to_string().contains("the destination process died when the VM had run there"), "{sent}");
        next.cancel();
        // It has answered, and was still waiting for a source of its own.
        let waiting = receiver.join().unwrap().unwrap_err();
        assert!(waiting.to_string().contains("cancelled"), "{waiting}");
    });
}
