//! State that goes in streams: some of it while the guest runs, the rest with the last pages.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use support::{FakeMachine, Load, Script, Wire, World, block};
use wherry_migration::machine::Machine;
use wherry_migration::testpoint::Point;
use wherry_migration::{JourneyError, Mode};

const MIB: u64 = 1 << 20;

fn guest() -> Arc<FakeMachine> {
    let machine = FakeMachine::new([7; 16], &[block(0, 0, 64 * MIB)], Arc::new(Script::default()));
    machine.fill(0, 0..4096, 3);
    machine
}

/// Bytes that can go early, and that cannot, of each stream.
fn plan(machine: &FakeMachine, plans: [(u64, u64); 3]) {
    machine.has_streams.store(true, Ordering::SeqCst);
    machine.streams.iter().zip(plans).for_each(|(stream, plan)| *stream.plan.lock().unwrap() = plan);
}

fn assert_same_streams(here: &FakeMachine, there: &FakeMachine) {
    for (ours, theirs) in here.streams.iter().zip(&there.streams) {
        assert!(ours.given() == *theirs.taken.lock().unwrap(), "what arrived is not what was given");
    }
}

#[test]
fn every_byte_arrives_in_order_in_every_mode_and_over_one_channel_or_several() {
    for (mode, channels) in [(Mode::Precopy, 1), (Mode::Precopy, 4), (Mode::Hybrid, 2), (Mode::Postcopy, 2)] {
        let mut world = World::new(Wire::Tcp);
        (world.source_options.mode, world.source_options.channels) = (mode, Some(channels));
        let machine = guest();
        plan(&machine, [(3 * MIB, 700_001), (0, 12), (5 * MIB + 1, 0)]);
        machine.power_on(Load { rate: 2000, pages: 100, zero_one_in: 0 });
        let (sent, received) = world.journey(&machine, None);
        let (sent, _received) = (sent.unwrap(), received.unwrap());
        assert_same_streams(&machine, &world.built());
        let early: Vec<_> = sent.devices.iter().map(|device| device.early_bytes).collect();
        let all: Vec<_> = sent.devices.iter().map(|device| device.bytes).collect();
        let expected = if mode == Mode::Postcopy { [0, 0, 0] } else { [3 * MIB, 0, 5 * MIB + 1] };
        assert_eq!(early, expected, "{mode:?}");
        assert_eq!(all, [3 * MIB + 700_001, 12, 5 * MIB + 1]);
        let first = &sent.devices[0];
        assert_eq!((first.name.as_str(), first.unit.as_str()), ("fake:0", "fake-stream[0]"));
        assert_eq!((first.stop_us, first.save_us, first.load_us, first.start_us), (1, 2, 3, 4));
    }
}

#[test]
fn a_guest_that_runs_on_after_the_stop_has_its_streams_begun_anew() {
    let mut world = World::new(Wire::Unix);
    world.source_options.downtime_limit = Duration::from_millis(5);
    world.source_options.bandwidth = Some(500 * MIB);
    let machine = guest();
    plan(&machine, [(MIB, 5000), (70_000, 70_000), (0, 0)]);
    machine.power_on(Load::NONE);
    let (ram, surprises) = (machine.ram().clone(), AtomicU64::new(0));
    world.source_journey.set_test_hook(move |point| {
        if point == Point::SourceDrained && surprises.fetch_add(1, Ordering::SeqCst) < 2 {
            use vm_memory::{Bytes, GuestAddress};
            ram.memory().write_slice(&vec![7; 20 << 20], GuestAddress(8 << 20)).unwrap();
        }
    });
    let (sent, received) = world.journey(&machine, None);
    assert!(sent.is_ok() && received.is_ok(), "{sent:?}");
    assert_eq!(machine.script.count("start"), 2, "resumed once for each surprise");
    assert_eq!(machine.streams[0].sessions(), 3);
    assert_same_streams(&machine, &world.built());
}

#[test]
fn what_is_still_to_come_counts_in_the_prediction_and_what_grows_for_ever_does_not_keep_a_guest() {
    let mut world = World::new(Wire::Unix);
    world.source_options.downtime_limit = Duration::from_millis(2000);
    world.source_options.bandwidth = Some(100 * MIB);
    let machine = guest();
    // Without an end, as far as a round can tell; and 20 MB that can only go at rest.
    plan(&machine, [(1 << 50, 0), (0, 20 * MIB), (0, 0)]);
    machine.power_on(Load::NONE);
    let grows = machine.clone();
    world.source_journey.set_test_hook(move |point| {
        if point == Point::SourceDrained {
            let given = grows.streams[0].offset();
            *grows.streams[0].plan.lock().unwrap() = (given, 0);
        }
    });
    world.source_options.bandwidth = None;
    let (sent, received) = world.journey(&machine, None);
    let received = received.map(|_| ());
    let sent = sent.unwrap_or_else(|error| panic!("{error}; {received:?}"));
    assert!((17..30).contains(&sent.rounds.len()), "{} rounds", sent.rounds.len());
    assert!(sent.rounds.iter().all(|round| round.predicted_downtime_us > 1000), "20 MB take longer than that");
    assert_same_streams(&machine, &world.built());
}

#[test]
fn a_unit_that_fails_at_either_end_is_named_and_the_guest_runs_on_with_its_streams_ended() {
    for (step, at_source) in [("stream-read", true), ("stream-write", false), ("stream-flush", false)] {
        let world = World::new(Wire::Unix);
        let machine = guest();
        plan(&machine, [(MIB, 5000), (0, 9), (0, 0)]);
        machine.power_on(Load { rate: 1000, pages: 10, zero_one_in: 0 });
        let script = if at_source { machine.script.clone() } else { world.builder.script.clone() };
        script.fail(step);
        let (sent, received) = world.journey(&machine, None);
        let error = sent.unwrap_err();
        assert!(matches!(error, JourneyError::RunsHere(_)), "{step}: {error}");
        let told = if at_source { error.to_string() } else { received.map(|_| ()).unwrap_err().to_string() };
        assert!(told.contains("fake-stream[") && told.contains(&format!("{step} fails as told")), "{step}: {told}");
        assert!(error.to_string().contains(step), "the source hears why: {error}");
        assert!(machine.is_running());
        assert_eq!(machine.script.count("stream-end"), 3, "{step}");
        // And the next one goes through.
        script.fail.lock().unwrap().clear();
        let world = World::new(Wire::Unix);
        let (sent, received) = world.journey(&machine, None);
        assert!(sent.is_ok() && received.is_ok(), "{sent:?}");
        assert_same_streams(&machine, &world.built());
    }
}

#[test]
fn a_unit_that_fails_at_rest_leaves_the_guest_here() {
    let mut world = World::new(Wire::Unix);
    world.source_options.mode = Mode::Hybrid;
    let machine = guest();
    plan(&machine, [(MIB, 5000), (0, 9), (0, 0)]);
    machine.power_on(Load::NONE);
    let script = machine.script.clone();
    world.source_journey.set_test_hook(move |point| {
        if point == Point::SourceStopped {
            script.fail("stream-read");
        }
    });
    let (sent, received) = world.journey(&machine, None);
    let error = sent.unwrap_err().to_string();
    assert!(error.contains("unit fake-stream[0] (fake:0): stream-read fails as told"), "{error}");
    assert!(received.is_err() && machine.is_running());
}
