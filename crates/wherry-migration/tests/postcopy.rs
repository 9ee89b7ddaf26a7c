//! Journeys in which memory follows the switch.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use support::proxy::Proxy;
use support::{FakeMachine, Load, Wire, World, assert_same_memory, at, await_that, block, random_vm};
use wherry_memory::{BlockSpec, GRANULE, PageSize};
use wherry_migration::machine::Machine;
use wherry_migration::progress::{Phase, Postcopy};
use wherry_migration::testpoint::Point;
use wherry_migration::{Event, EventKind, JourneyError, Mode};

const MIB: u64 = 1 << 20;

fn guest(blocks: &[BlockSpec]) -> Arc<FakeMachine> {
    FakeMachine::new(random_vm(), blocks, Arc::default())
}

/// Whether faults can be served here.
fn permitted() -> bool {
    let permitted = wherry_fault::Userfault::open().map(|_| ());
    if let Err(error) = &permitted {
        println!("SKIPPED: {error}");
    }
    permitted.is_ok()
}

/// Has the guest at the destination work as soon as it runs there.
fn keep_working(world: &World, load: Load) {
    // The builder's machine exists before the journey reaches this point.
    let built = world.builder.built.clone();
    at(&world.destination_journey, Point::DestinationLoaded, move || {
        built.lock().unwrap().as_ref().unwrap().set_load(load);
    });
}

#[test]
fn a_vm_runs_at_once_and_its_memory_follows() {
    if !permitted() {
        return;
    }
    for wire in [Wire::Unix, Wire::Tcp] {
        let mut world = World::new(wire);
        world.source_options.mode = Mode::Postcopy;
        let machine = guest(&[block(0, 0, 64 * MIB), block(7, 1 << 32, 32 * MIB)]);
        machine.fill(0, 0..3000, 1);
        machine.fill(0, 5000..5001, 2);
        machine.zero(0, 6000..6100);
        machine.fill(1, 100..3000, 3);
        machine.power_on(Load::NONE);
        let (sent, received) = world.journey(&machine, None);
        let sent = sent.unwrap();
        let (there, arrived) = received.unwrap();
        assert_eq!((sent.phase, arrived.phase), (Phase::Done, Phase::Done), "{wire:?}");
        assert!(world.built().is_running() && !machine.is_running());
        assert_eq!(world.builder.runs.load(Ordering::SeqCst), 1, "the VMM was not told that it runs");
        assert_same_memory(&*machine, &*there);
        assert!(sent.rounds.is_empty(), "rounds were sent before the switch: {:?}", sent.rounds);
        assert!(sent.blackout.is_some() && sent.memory_remaining == 0);
    }
}

#[test]
fn a_guest_that_works_on_while_its_memory_follows_finds_every_page_and_loses_no_write() {
    if !permitted() {
        return;
    }
    for seed in 0..4 {
        let mut world = World::new(if seed % 2 == 0 { Wire::Unix } else { Wire::Tcp });
        world.source_options.mode = Mode::Postcopy;
        world.source_options.channels = Some(1 + seed as u16 % 3);
        let machine = guest(&[block(0, 0, 64 * MIB)]);
        machine.fill(0, 0..16384, seed + 1);
        let load = Load { rate: 60_000, pages: 16_384, zero_one_in: 5 };
        machine.power_on(load);
        keep_working(&world, load);
        let (sent, received) = world.journey(&machine, None);
        let sent = sent.unwrap();
        let there = received.unwrap().0;
        let built = world.built();
        built.set_load(Load::NONE);
        // What the guest at the destination wrote, it wrote over what the source had: replay it there.
        built.units().stop(Duration::from_secs(5)).unwrap();
        machine.replay_until(built.cpu.writes(), load);
        assert_same_memory(&*machine, &*there);
        assert!(built.cpu.writes() > 0, "seed {seed}: the guest never wrote there");
        assert!(sent.memory_postcopy_requests > 0, "seed {seed}: nothing was ever missed");
        let postcopy = sent.postcopy.unwrap();
        assert!(postcopy.faults > 0 && postcopy.fault_max_us > 0, "seed {seed}: {postcopy:?}");
    }
}

#[test]
fn figures_are_told_while_memory_follows_and_both_ends_report_the_same_at_the_end() {
    if !permitted() {
        return;
    }
    let mut world = World::new(Wire::Tcp);
    let events = (world.source_journey.subscribe(), world.destination_journey.subscribe());
    world.source_options.mode = Mode::Postcopy;
    world.source_options.channels = Some(1);
    let machine = guest(&[block(0, 0, 64 * MIB)]);
    machine.fill(0, 0..12_000, 3);
    let load = Load { rate: 500, pages: 12_000, zero_one_in: 0 };
    machine.power_on(load);
    // Nothing is pushed, and the guest asks for what it needs, until a few figures have been told.
    let proxy = Proxy::new(world.listener.local_endpoint());
    let (link, push) = (proxy.handle(), proxy.handle());
    let built = world.builder.built.clone();
    at(&world.destination_journey, Point::DestinationLoaded, move || {
        built.lock().unwrap().as_ref().unwrap().set_load(load);
        push.hold(2);
    });
    let live = |event: Event| (event.job.phase == Phase::Postcopy).then_some(event.job.postcopy).flatten();
    let listener = std::thread::spawn(move || {
        let mut there = vec![];
        while there.len() < 5 {
            let event = events.1.recv_timeout(Duration::from_secs(10)).expect("no figures were told in time");
            there.extend(live(event));
        }
        link.hold(0);
        there
    });
    let (sent, received) = world.journey(&machine, Some(proxy.endpoint()));
    let there = listener.join().unwrap();
    let (sent, received) = (sent.unwrap().postcopy.unwrap(), received.unwrap().1.postcopy.unwrap());

    // Holes follow nothing.
    assert!((1..=12_000).contains(&there[0].remaining_pages), "{:?}", there[0]);
    for pair in there.windows(2) {
        assert!(pair[0].remaining_pages >= pair[1].remaining_pages && pair[0].faults <= pair[1].faults, "{pair:?}");
        assert!(pair[0].duration_us <= pair[1].duration_us, "{pair:?}");
    }
    let middle = &there[there.len() - 1];
    assert!(middle.remaining_pages > 0 && middle.remaining_bytes == middle.remaining_pages * GRANULE, "{middle:?}");
    assert!(middle.faults > 0 && middle.vcpus[0].faults.faults > 0 && middle.wire.max_us > 0, "{middle:?}");

    assert_eq!(world.built().faults().unwrap().take_troubles(), []);

    let here: Vec<_> = events.0.try_iter().filter_map(live).collect();
    assert!(here.iter().any(|p| p.remaining_pages > 0 && p.requests > 0 && p.pages_answered > 0), "{here:?}");
    assert!(here.iter().all(|p| p.pages_asked >= p.pages_answered && p.pages_answered <= 12_000), "{here:?}");

    let of_destination = |p: Postcopy| Postcopy { requests: 0, pages_asked: 0, pages_answered: 0, ..p };
    assert_eq!(of_destination(sent.clone()), of_destination(received.clone()));
    assert_eq!((sent.remaining_pages, sent.pages_answered > 0), (0, true), "{sent:?}");
    assert!(received.prefetched > 0 && received.prefetch_hits <= received.prefetched, "{received:?}");
    assert!(received.pages_asked > received.prefetched && received.requests > 0, "{received:?}");
    let parts = received.queue.max_us.max(received.wire.max_us).max(received.placement.max_us);
    assert!(parts <= received.fault_max_us && received.fault_p50_us <= received.fault_p99_us, "{received:?}");
    assert!(received.pages_answered > 0 && received.sources.is_empty(), "{received:?}");
}

#[test]
fn faults_are_told_by_vcpu_and_those_of_a_load_are_not_a_vcpus() {
    if !permitted() {
        return;
    }
    for load in [Load::NONE, Load { rate: 60_000, pages: 4000, zero_one_in: 0 }] {
        let mut world = World::new(Wire::Unix);
        world.source_options.mode = Mode::Postcopy;
        world.source_options.bandwidth = Some(40 * MIB);
        let machine = guest(&[block(0, 0, 16 * MIB)]);
        machine.fill(0, 0..4000, 5);
        machine.power_on(load);
        // Above all that the guest writes to; the neighbours of its pages end below.
        machine.fill(0, 4010..4011, 5);
        world.builder.script.touch_on_restore(4010);
        keep_working(&world, load);
        let (sent, received) = world.journey(&machine, None);
        sent.unwrap();
        let figures = received.unwrap().1.postcopy.unwrap();
        let works = load.rate > 0;
        assert_eq!(figures.vcpus.len(), 1);
        let vcpu = figures.vcpus[0].faults;
        assert_eq!((vcpu.faults > 0, vcpu.max_us > 0), (works, works), "{figures:?}");
        assert_eq!(figures.largest_stall_us, vcpu.max_us);
        assert_eq!(figures.other_threads.faults, 1, "{figures:?}");
        assert_eq!(figures.kernel_workers.faults.faults, 0, "{figures:?}");
        assert_eq!(figures.faults, vcpu.faults + 1, "{figures:?}");
    }
}

#[test]
fn a_guest_that_never_converges_is_followed_by_hybrid() {
    if !permitted() {
        return;
    }
    let mut world = World::new(Wire::Tcp);
    world.source_options.mode = Mode::Hybrid;
    world.source_options.bandwidth = Some(40 * MIB);
    world.source_options.downtime_limit = Duration::from_millis(2);
    let machine = guest(&[block(0, 0, 64 * MIB)]);
    machine.fill(0, 0..8192, 7);
    let load = Load { rate: 200_000, pages: 16_000, zero_one_in: 0 };
    machine.power_on(load);
    keep_working(&world, load);
    let (sent, received) = world.journey(&machine, None);
    let sent = sent.unwrap();
    let there = received.unwrap().0;
    let built = world.built();
    built.units().stop(Duration::from_secs(5)).unwrap();
    machine.replay_until(built.cpu.writes(), load);
    assert_same_memory(&*machine, &*there);
    assert!(!sent.rounds.is_empty(), "it began with precopy");
    assert!(sent.rounds.iter().all(|r| r.throttle == 0), "a guest that can be followed was slowed down");
}

#[test]
fn hybrid_stays_with_precopy_for_a_guest_that_converges() {
    if !permitted() {
        return;
    }
    let mut world = World::new(Wire::Unix);
    world.source_options.mode = Mode::Hybrid;
    let machine = guest(&[block(0, 0, 32 * MIB)]);
    machine.fill(0, 0..4000, 9);
    machine.power_on(Load { rate: 1000, pages: 500, zero_one_in: 0 });
    let (sent, received) = world.journey(&machine, None);
    let sent = sent.unwrap();
    assert_same_memory(&*machine, &*received.unwrap().0);
    assert_eq!(sent.memory_postcopy_requests, 0);
    assert!(!sent.rounds.is_empty());
}

#[test]
fn a_hybrid_migration_switches_when_it_is_told_to() {
    if !permitted() {
        return;
    }
    let mut world = World::new(Wire::Unix);
    world.source_options.mode = Mode::Hybrid;
    world.source_options.downtime_limit = Duration::from_millis(1);
    let machine = guest(&[block(0, 0, 64 * MIB)]);
    machine.fill(0, 0..8192, 7);
    machine.power_on(Load { rate: 100_000, pages: 16_000, zero_one_in: 0 });
    let (journey, count) = (world.source_journey.clone(), Arc::new(AtomicU64::new(0)));
    let rounds = count.clone();
    world.source_journey.set_test_hook(move |point| {
        if point == Point::SourceRound {
            rounds.fetch_add(1, Ordering::SeqCst);
            journey.switch_to_postcopy().unwrap();
        }
    });
    let (sent, received) = world.journey(&machine, None);
    sent.unwrap();
    received.unwrap();
    assert_eq!(count.load(Ordering::SeqCst), 1, "it went on with precopy after it was told to switch");
}

#[test]
fn a_load_that_touches_missing_memory_is_served() {
    if !permitted() {
        return;
    }
    let mut world = World::new(Wire::Unix);
    world.source_options.mode = Mode::Postcopy;
    let machine = guest(&[block(0, 0, 16 * MIB)]);
    machine.fill(0, 0..4000, 5);
    machine.power_on(Load::NONE);
    world.builder.script.touch_on_restore(3333);
    let (sent, received) = world.journey(&machine, None);
    sent.unwrap();
    assert_same_memory(&*machine, &*received.unwrap().0);
    assert_eq!(world.builder.script.count("touched"), 1);
}

#[test]
fn a_destination_without_userfaultfd_is_named_in_postcopy_and_hybrid_stays_with_precopy() {
    let mut world = World::new(Wire::Unix);
    world.source_options.mode = Mode::Postcopy;
    world.builder.no_faults = Some("no userfaultfd, as told".into());
    let machine = guest(&[block(0, 0, 16 * MIB)]);
    machine.fill(0, 0..100, 5);
    machine.power_on(Load::NONE);
    let (sent, _) = world.journey(&machine, None);
    let error = sent.unwrap_err();
    assert!(matches!(error, JourneyError::Refused(_)), "{error}");
    assert!(error.to_string().contains("no userfaultfd, as told"), "{error}");
    assert!(machine.is_running());

    let mut world = World::new(Wire::Unix);
    world.source_options.mode = Mode::Hybrid;
    world.builder.no_faults = Some("no userfaultfd, as told".into());
    let (sent, received) = world.journey(&machine, None);
    sent.unwrap();
    assert_same_memory(&*machine, &*received.unwrap().0);
}

#[test]
fn a_link_that_is_lost_before_the_run_is_recorded_leaves_the_vm_at_the_source() {
    if !permitted() {
        return;
    }
    for point in [Point::SourceStopped, Point::SourceSaved, Point::SourceOffered, Point::SourceReady] {
        let mut world = World::new(Wire::Unix);
        world.source_options.mode = Mode::Postcopy;
        let machine = guest(&[block(0, 0, 16 * MIB)]);
        machine.fill(0, 0..4000, 5);
        machine.power_on(Load::NONE);
        let journey = world.source_journey.clone();
        at(&world.source_journey, point, move || {
            journey.cancel();
        });
        let (sent, received) = world.journey(&machine, None);
        assert!(matches!(sent, Err(JourneyError::Cancelled)), "{point:?}: {sent:?}");
        assert!(received.is_err(), "{point:?}");
        await_that("the guest at the source runs", || machine.is_running());
        assert!(!world.built().is_running(), "{point:?}: it runs at the destination, too");
    }
}

#[test]
fn blocks_of_huge_pages_are_placed_whole() {
    if !permitted() {
        return;
    }
    let spec = BlockSpec { page_size: PageSize::Huge2M, ..block(0, 0, 32 * MIB) };
    let Some(_pages) = support::HugePages::permit() else {
        println!("SKIPPED: no huge pages can be had here");
        return;
    };
    let mut world = World::new(Wire::Tcp);
    world.source_options.mode = Mode::Postcopy;
    let machine = guest(&[spec]);
    machine.fill(0, 0..(8 * MIB / GRANULE), 5);
    let load = Load { rate: 20_000, pages: 12 * MIB / GRANULE, zero_one_in: 0 };
    machine.power_on(load);
    keep_working(&world, load);
    let (sent, received) = world.journey(&machine, None);
    sent.unwrap();
    let there = received.unwrap().0;
    let built = world.built();
    built.units().stop(Duration::from_secs(5)).unwrap();
    machine.replay_until(built.cpu.writes(), load);
    assert_same_memory(&*machine, &*there);
}

#[test]
fn a_link_that_stays_lost_is_told_of_at_both_ends_and_nothing_runs_at_the_source() {
    if !permitted() {
        return;
    }
    let mut world = World::new(Wire::Tcp);
    world.source_options.mode = Mode::Postcopy;
    world.source_options.recover = Some(Duration::from_secs(1));
    world.destination_options.recover = Some(Duration::from_secs(1));
    let machine = guest(&[block(0, 0, 256 * MIB)]);
    machine.fill(0, 0..65_536, 5);
    machine.power_on(Load::NONE);
    let proxy = Proxy::new(world.listener.local_endpoint());
    let link = proxy.handle();
    at(&world.destination_journey, Point::DestinationRunning, move || link.cut());
    let (sent, received) = world.journey(&machine, Some(proxy.endpoint()));
    let received = received.map(|(_, job)| job);
    assert!(matches!(received, Err(JourneyError::Paused(_))), "{received:?}");
    // Whether the source has heard that it runs there is a matter of microseconds.
    assert!(matches!(sent, Err(JourneyError::Paused(_) | JourneyError::InDoubt(_))), "{sent:?}");
    assert_eq!(world.destination_journey.job().phase, Phase::Paused);
    assert!(!machine.is_running());
}

#[test]
fn a_link_that_is_lost_again_and_again_is_taken_up_and_no_page_is_lost() {
    if !permitted() {
        return;
    }
    let mut pauses = 0;
    for seed in 1..=6 {
        let mut world = World::new(Wire::Tcp);
        let events = (world.source_journey.subscribe(), world.destination_journey.subscribe());
        world.source_options.mode = Mode::Postcopy;
        world.source_options.channels = Some(1 + seed as u16 % 3);
        let machine = guest(&[block(0, 0, 128 * MIB), block(3, 1 << 32, 16 * MIB)]);
        machine.fill(0, 0..32_768, seed);
        machine.fill(1, 100..2000, seed + 1);
        let load = Load { rate: 40_000, pages: 32_768, zero_one_in: 7 };
        machine.power_on(load);
        let proxy = Proxy::new(world.listener.local_endpoint());
        let (link, built) = (proxy.handle(), world.builder.built.clone());
        let running = Arc::new(AtomicBool::new(false));
        let (seen, over) = (running.clone(), Arc::new(AtomicBool::new(false)));
        world.destination_journey.set_test_hook(move |point| match point {
            Point::DestinationLoaded => built.lock().unwrap().as_ref().unwrap().set_load(load),
            Point::DestinationRunning => seen.store(true, Ordering::SeqCst),
            _ => {}
        });
        let ended = over.clone();
        let cutter = std::thread::spawn(move || {
            let mut random = support::Random(seed * 77 + 1);
            let mut cuts = 0;
            while !ended.load(Ordering::SeqCst) && cuts < 8 {
                if !running.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                    continue;
                }
                // The moment is the test's subject, not a wait.
                std::thread::sleep(Duration::from_micros(random.below(30_000)));
                link.cut();
                std::thread::sleep(Duration::from_micros(random.below(20_000)));
                link.mend();
                cuts += 1;
            }
            cuts
        });
        let (sent, received) = world.journey(&machine, Some(proxy.endpoint()));
        over.store(true, Ordering::SeqCst);
        let cuts = cutter.join().unwrap();
        let sent = sent.unwrap_or_else(|e| panic!("seed {seed}, {cuts} cuts: {e}"));
        let there = received.unwrap_or_else(|e| panic!("seed {seed}, {cuts} cuts: {e}")).0;
        assert!(cuts > 0, "seed {seed}: the link was never cut");
        let paused = |event: &Event| event.kind == EventKind::Phase && event.job.phase == Phase::Paused;
        let seen = (events.0.try_iter().filter(paused).count(), events.1.try_iter().filter(paused).count());
        println!("seed {seed}: {cuts} cuts, paused {seen:?}");
        pauses += seen.0.min(seen.1);
        assert_eq!(sent.phase, Phase::Done);
        let built = world.built();
        built.set_load(Load::NONE);
        built.units().stop(Duration::from_secs(5)).unwrap();
        machine.replay_until(built.cpu.writes(), load);
        assert_same_memory(&*machine, &*there);
    }
    assert!(pauses >= 6, "only {pauses} cuts were felt at both ends");
}

#[test]
fn a_link_that_is_lost_with_the_last_word_does_not_leave_the_source_paused() {
    if !permitted() {
        return;
    }
    let mut world = World::new(Wire::Tcp);
    world.source_options.mode = Mode::Postcopy;
    let machine = guest(&[block(0, 0, 16 * MIB)]);
    machine.fill(0, 0..2000, 5);
    machine.power_on(Load::NONE);
    let proxy = Proxy::new(world.listener.local_endpoint());
    let link = proxy.handle();
    // Everything is there, and nobody has said so yet.
    at(&world.destination_journey, Point::PostcopyComplete, move || {
        link.cut();
        link.mend();
    });
    let (sent, received) = world.journey(&machine, Some(proxy.endpoint()));
    let (sent, (there, arrived)) = (sent.unwrap(), received.unwrap());
    assert_eq!(sent.phase, Phase::Done);
    assert_same_memory(&*machine, &*there);
    let (sent, arrived) = (sent.postcopy.unwrap(), arrived.postcopy.unwrap());
    assert_eq!((sent.duration_us, sent.vcpus), (arrived.duration_us, arrived.vcpus), "the figures were lost with it");
}

#[test]
fn an_urgent_channel_that_is_lost_alone_is_a_lost_link() {
    if !permitted() {
        return;
    }
    let mut world = World::new(Wire::Tcp);
    let events = world.destination_journey.subscribe();
    world.source_options.mode = Mode::Postcopy;
    world.source_options.channels = Some(1);
    let machine = guest(&[block(0, 0, 256 * MIB)]);
    machine.fill(0, 0..65_536, 5);
    machine.power_on(Load::NONE);
    let proxy = Proxy::new(world.listener.local_endpoint());
    let link = proxy.handle();
    // Control, data, urgent.
    at(&world.destination_journey, Point::DestinationRunning, move || link.cut_one(3));
    let (sent, received) = world.journey(&machine, Some(proxy.endpoint()));
    assert_eq!(sent.unwrap().phase, Phase::Done);
    assert_same_memory(&*machine, &*received.unwrap().0);
    assert!(events.try_iter().any(|event| event.job.phase == Phase::Paused), "the loss was not felt");
}
