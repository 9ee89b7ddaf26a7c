//! Journeys that fail, at every point, in every way: the VM is never lost and never runs twice.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use support::proxy::Proxy;
use support::{FakeMachine, Load, Received, Sent, Wire, World, assert_same_memory, at, await_that, block, random_vm};
use wherry_migration::progress::Phase;
use wherry_migration::testpoint::Point;
use wherry_migration::{Cause, JourneyError, Mode, Side};
use wherry_stream::Endpoint;

const MIB: u64 = 1 << 20;

fn guest() -> Arc<FakeMachine> {
    let machine = FakeMachine::new(random_vm(), &[block(0, 0, 8 * MIB)], Arc::default());
    machine.fill(0, 0..1500, 3);
    machine.power_on(Load { rate: 2000, pages: 2000, zero_one_in: 7 });
    machine
}

fn source_points() -> impl Iterator<Item = Point> {
    Point::ALL.iter().copied().filter(|p| p.name().starts_with("source"))
}

fn destination_points() -> impl Iterator<Item = Point> {
    Point::ALL.iter().copied().filter(|p| p.name().starts_with("destination"))
}

/// Whether a point comes after the source has recorded that it gives the VM away.
fn given(point: Point) -> bool {
    matches!(
        point,
        Point::SourceRecorded
            | Point::SourceRun
            | Point::SourceRunning
            | Point::DestinationTold
            | Point::DestinationStarted
            | Point::DestinationRunning
    )
}

/// The VM stayed: it runs here with its locks and unthrottled, tracks no writes, and nothing runs there.
fn assert_stayed(world: &World, machine: &FakeMachine, sent: &Sent, received: &Received, what: &str) {
    assert!(sent.is_err(), "{what}: {sent:?}");
    assert!(received.is_err(), "{what}: the destination runs it, too");
    assert!(machine.is_running(), "{what}: it does not run at the source; {sent:?}");
    assert!(machine.locked.load(Ordering::SeqCst), "{what}: the source lost its locks");
    assert!(!machine.log.is_on(), "{what}: the dirty log still runs");
    assert_eq!(machine.throttle_percent(), 0, "{what}");
    if let Some(built) = &*world.builder.built.lock().unwrap() {
        assert!(!built.is_running(), "{what}: it runs at the destination");
        assert!(!built.locked.load(Ordering::SeqCst), "{what}: the destination holds the locks");
    }
    let before = machine.cpu.writes();
    await_that("the guest to write on", || machine.cpu.writes() > before);
}

fn assert_moved(world: &World, machine: &FakeMachine, sent: &Sent, received: &Received, what: &str) {
    assert!(sent.is_ok(), "{what}: {sent:?}");
    let there = received.as_ref().unwrap_or_else(|e| panic!("{what}: {e}"));
    assert!(!machine.is_running(), "{what}: it runs at the source, too");
    assert!(world.built().is_running(), "{what}: it runs nowhere");
    assert!(!machine.locked.load(Ordering::SeqCst) && world.built().locked.load(Ordering::SeqCst), "{what}");
    assert_same_memory(machine, &*there.0);
}

/// After a failure, everything is as if nothing had happened: the next journey succeeds.
fn assert_can_move_again(machine: &Arc<FakeMachine>, what: &str) {
    machine.script.fail.lock().unwrap().clear();
    let world = World::new(Wire::Unix);
    let (sent, received) = world.journey(machine, None);
    assert_moved(&world, machine, &sent, &received, &format!("the journey after {what}"));
}

#[test]
fn cancel_at_the_source_works_at_every_point_until_the_vm_is_given_away() {
    for point in source_points() {
        let world = World::new(Wire::Tcp);
        let machine = guest();
        let canceller = world.source_journey.clone();
        let in_time = Arc::new(std::sync::Mutex::new(None));
        let answer = in_time.clone();
        at(&world.source_journey, point, move || *answer.lock().unwrap() = Some(canceller.cancel()));
        let (sent, received) = world.journey(&machine, None);
        let what = format!("cancel at {point}");
        assert_eq!(*in_time.lock().unwrap(), Some(!given(point)), "{what}");
        if given(point) {
            assert_moved(&world, &machine, &sent, &received, &what);
        } else {
            assert!(matches!(sent, Err(JourneyError::Cancelled)), "{what}: {sent:?}");
            assert_eq!(world.source_journey.job().phase, Phase::Cancelled, "{what}");
            assert_stayed(&world, &machine, &sent, &received, &what);
            assert_can_move_again(&machine, &what);
        }
    }
}

#[test]
fn cancel_at_the_destination_works_at_every_point_until_it_is_ready() {
    for point in destination_points() {
        let world = World::new(Wire::Tcp);
        let machine = guest();
        let canceller = world.destination_journey.clone();
        let in_time = Arc::new(std::sync::Mutex::new(None));
        let answer = in_time.clone();
        at(&world.destination_journey, point, move || *answer.lock().unwrap() = Some(canceller.cancel()));
        let (sent, received) = world.journey(&machine, None);
        let what = format!("cancel at {point}");
        let in_time = in_time.lock().unwrap().unwrap_or_else(|| panic!("{what}: never reached"));
        assert_eq!(in_time, !given(point) && point != Point::DestinationReady, "{what}");
        if in_time {
            assert_stayed(&world, &machine, &sent, &received, &what);
            assert_eq!(world.destination_journey.job().phase, Phase::Cancelled, "{what}");
        } else {
            assert_moved(&world, &machine, &sent, &received, &what);
        }
    }
}

/// Cuts the link at a point, mends it a little later, and returns how it ended.
fn cut_at(point: Point) -> (World, Arc<FakeMachine>, Sent, Received) {
    let world = World::new(Wire::Tcp);
    let machine = guest();
    let proxy = Proxy::new(world.listener.local_endpoint());
    let link = proxy.handle();
    let journey = if point.name().starts_with("source") { &world.source_journey } else { &world.destination_journey };
    at(journey, point, move || {
        link.cut();
        let link = link.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            link.mend();
        });
    });
    let (sent, received) = world.journey(&machine, Some(proxy.endpoint()));
    drop(proxy);
    (world, machine, sent, received)
}

#[test]
fn a_link_that_is_lost_at_any_point_of_the_source_leaves_one_vm() {
    for point in source_points() {
        let (world, machine, sent, received) = cut_at(point);
        let what = format!("link cut at {point}");
        if given(point) {
            assert_moved(&world, &machine, &sent, &received, &what);
        } else {
            assert_stayed(&world, &machine, &sent, &received, &what);
        }
    }
}

#[test]
fn a_link_that_is_lost_at_any_point_of_the_destination_leaves_one_vm() {
    for point in destination_points() {
        let (world, machine, sent, received) = cut_at(point);
        let what = format!("link cut at {point}");
        // When the destination is just ready, the source may or may not have heard it.
        let moved = given(point) || (point == Point::DestinationReady && sent.is_ok());
        if moved {
            assert_moved(&world, &machine, &sent, &received, &what);
        } else {
            assert_stayed(&world, &machine, &sent, &received, &what);
        }
    }
}

#[test]
fn a_peer_that_falls_silent_at_any_point_is_given_up_and_the_vm_runs_on() {
    // From `SourceReady` on the VM is given away before the silence can be noticed: that is doubt, tested below.
    std::thread::scope(|scope| {
        for point in source_points().filter(|p| !given(*p) && *p != Point::SourceReady) {
            scope.spawn(move || {
                let world = World::new(Wire::Tcp);
                let machine = guest();
                let proxy = Proxy::new(world.listener.local_endpoint());
                let link = proxy.handle();
                at(&world.source_journey, point, move || link.stall());
                let (sent, received) = world.journey(&machine, Some(proxy.endpoint()));
                // Whatever was ready gets its answer when the link is cut for good and the doubt ends.
                assert_stayed(&world, &machine, &sent, &received, &format!("silence from {point} on"));
            });
        }
    });
}

#[test]
fn a_link_that_stays_cut_after_the_vm_was_given_away_leaves_both_in_doubt_and_resolve_decides() {
    for side in [Side::Source, Side::Destination] {
        let mut world = World::new(Wire::Tcp);
        world.source_options.doubt = None;
        world.destination_options.doubt = None;
        let machine = guest();
        let proxy = Proxy::new(world.listener.local_endpoint());
        let link = proxy.handle();
        at(&world.source_journey, Point::SourceRecorded, move || link.cut());
        let (source, destination) = (world.source_journey.clone(), world.destination_journey.clone());
        let resolver = std::thread::spawn(move || {
            await_that("both sides to be in doubt", || {
                source.job().phase == Phase::InDoubt && destination.job().phase == Phase::InDoubt
            });
            assert!(!source.cancel(), "it is too late to cancel");
            assert!(source.resolve(side));
            assert!(destination.resolve(side));
        });
        let (sent, received) = world.journey(&machine, Some(proxy.endpoint()));
        resolver.join().unwrap();
        let what = format!("resolved as {side:?}");
        match side {
            Side::Source => {
                assert!(matches!(sent, Err(JourneyError::RunsHere(Cause::Resolved(_)))), "{what}: {sent:?}");
                assert_stayed(&world, &machine, &sent, &received, &what);
            }
            Side::Destination => assert_moved(&world, &machine, &sent, &received, &what),
        }
    }
}

#[test]
fn a_source_in_doubt_whose_patience_ends_says_so_and_keeps_the_vm_at_rest() {
    let mut world = World::new(Wire::Tcp);
    world.source_options.doubt = Some(Duration::from_millis(500));
    world.destination_options.doubt = Some(Duration::from_secs(3));
    let machine = guest();
    let proxy = Proxy::new(world.listener.local_endpoint());
    let link = proxy.handle();
    at(&world.source_journey, Point::SourceRecorded, move || link.cut());
    let (sent, received) = world.journey(&machine, Some(proxy.endpoint()));
    assert!(matches!(sent, Err(JourneyError::InDoubt(_))), "{sent:?}");
    assert!(matches!(received, Err(JourneyError::InDoubt(_))), "{:?}", received.err());
    assert!(!machine.is_running());
    assert_eq!(world.source_journey.job().phase, Phase::InDoubt);
}

#[test]
fn a_refusal_names_every_reason_and_the_vm_runs_on() {
    let mut world = World::new(Wire::Unix);
    world.builder.refuse = vec!["CPU feature avx512f".into(), "device net0".into()];
    let machine = guest();
    let (sent, received) = world.journey(&machine, None);
    match &sent {
        Err(JourneyError::Refused(reasons)) => assert_eq!(*reasons, world.builder.refuse),
        other => panic!("{other:?}"),
    }
    assert!(matches!(received, Err(JourneyError::Refused(_))));
    assert_stayed(&world, &machine, &sent, &received, "refusal");
}

#[test]
fn more_memory_than_the_destination_takes_is_refused() {
    let mut world = World::new(Wire::Unix);
    world.destination_options.memory_limit = Some(4 * MIB);
    let machine = guest();
    let (sent, received) = world.journey(&machine, None);
    assert!(matches!(&sent, Err(JourneyError::Refused(r)) if r[0].contains("bytes of RAM")), "{sent:?}");
    assert_stayed(&world, &machine, &sent, &received, "too much memory");
}

#[test]
fn hashing_all_memory_and_sending_it_after_the_switch_exclude_each_other() {
    let mut world = World::new(Wire::Unix);
    world.source_options.mode = Mode::Postcopy;
    world.source_options.verify = true;
    let machine = guest();
    let (sent, received) = world.journey(&machine, None);
    assert!(sent.as_ref().is_err_and(|e| e.to_string().contains("postcopy")), "{sent:?}");
    assert_stayed(&world, &machine, &sent, &received, "postcopy with --verify");
}

#[test]
fn a_destination_that_is_not_there_is_a_clear_error() {
    let world = World::new(Wire::Tcp);
    let machine = guest();
    let nowhere = Endpoint::Tcp { host: "127.0.0.1".into(), port: 1 };
    let (sent, received) = world.journey(&machine, Some(&nowhere));
    assert!(sent.as_ref().is_err_and(|e| e.to_string().contains("127.0.0.1:1")), "{sent:?}");
    assert_stayed(&world, &machine, &sent, &received, "nobody there");
}

#[test]
fn every_step_that_fails_at_the_source_leaves_the_vm_running_there() {
    for step in ["drain", "begin-stop", "finish-stop", "save", "release-locks"] {
        let world = World::new(Wire::Unix);
        let machine = guest();
        machine.script.fail(step);
        let (sent, received) = world.journey(&machine, None);
        let said = sent.as_ref().unwrap_err().to_string();
        assert!(said.contains(step) || said.contains("as told"), "{step}: {said}");
        assert_stayed(&world, &machine, &sent, &received, step);
        assert_can_move_again(&machine, step);
    }
}

#[test]
fn every_step_that_fails_at_the_destination_leaves_the_vm_running_at_the_source() {
    for step in ["restore", "take-locks", "start-board"] {
        let world = World::new(Wire::Unix);
        let machine = guest();
        world.builder.script.fail(step);
        let (sent, received) = world.journey(&machine, None);
        let said = sent.as_ref().unwrap_err().to_string();
        assert!(said.contains("as told"), "{step}: {said}");
        assert_stayed(&world, &machine, &sent, &received, step);
        assert_can_move_again(&machine, step);
    }
}

#[test]
fn a_vm_that_cannot_be_started_again_at_the_source_is_reported_as_stuck() {
    let world = World::new(Wire::Unix);
    let machine = guest();
    machine.script.fail("save");
    machine.script.fail("start");
    let (sent, _) = world.journey(&machine, None);
    assert!(matches!(sent, Err(JourneyError::Stuck { .. })), "{sent:?}");
}

#[test]
fn a_dirty_log_that_fails_once_costs_a_round_and_twice_the_journey() {
    for (failures, ok) in [(1, true), (2, false)] {
        let world = World::new(Wire::Unix);
        let machine = guest();
        machine.log.fail_collects.store(failures, Ordering::SeqCst);
        let (sent, received) = world.journey(&machine, None);
        if ok {
            assert_moved(&world, &machine, &sent, &received, "one failure of the log");
        } else {
            assert!(matches!(sent, Err(JourneyError::RunsHere(Cause::Dirty(_)))), "{sent:?}");
            assert_stayed(&world, &machine, &sent, &received, "two failures of the log");
        }
    }
}

#[test]
fn a_precopy_that_does_not_converge_by_its_deadline_fails_and_says_what_to_do() {
    let mut world = World::new(Wire::Tcp);
    world.source_options.deadline = Duration::from_millis(700);
    world.source_options.bandwidth = Some(4 * MIB);
    world.source_options.auto_converge = false;
    let machine = guest();
    machine.set_load(Load { rate: 50_000, pages: 2000, zero_one_in: 0 });
    let (sent, received) = world.journey(&machine, None);
    assert!(matches!(sent, Err(JourneyError::RunsHere(Cause::NotConverged { .. }))), "{sent:?}");
    assert!(sent.as_ref().unwrap_err().to_string().contains("--downtime-limit"));
    assert_stayed(&world, &machine, &sent, &received, "no convergence");
}

#[test]
fn frames_that_are_damaged_on_the_way_end_the_journey_and_never_the_vm() {
    // Positions in the control stream, in the header of a pages frame and in its extent table.
    for (connection, position) in [(1, 70), (1, 120), (1, 300), (2, 66), (2, 75), (2, 100), (2, 110)] {
        let mut world = World::new(Wire::Tcp);
        world.source_options.channels = Some(1);
        let machine = guest();
        let proxy = Proxy::new(world.listener.local_endpoint());
        proxy.handle().flip(connection, position);
        let (sent, received) = world.journey(&machine, Some(proxy.endpoint()));
        assert_stayed(
            &world,
            &machine,
            &sent,
            &received,
            &format!("bit {position} of connection {connection} flipped"),
        );
    }
}

#[test]
fn verify_finds_the_page_that_was_damaged_on_the_way_and_refuses_to_run() {
    let mut world = World::new(Wire::Tcp);
    world.source_options.channels = Some(1);
    world.source_options.verify = true;
    let machine = guest();
    machine.set_load(Load { rate: 1000, pages: 10, zero_one_in: 0 });
    let proxy = Proxy::new(world.listener.local_endpoint());
    // Deep in the content of the first frames: pages 0..1500 are sent in order.
    proxy.handle().flip(2, 3 * MIB);
    let (sent, received) = world.journey(&machine, Some(proxy.endpoint()));
    let said = received.as_ref().err().map(ToString::to_string).unwrap_or_default();
    assert!(said.contains("first difference is in RAM block 0, page 0x2"), "{said}");
    assert_stayed(&world, &machine, &sent, &received, "damaged content");
}

#[test]
fn two_migrations_of_one_vm_at_once_are_refused_on_this_host() {
    let world = World::new(Wire::Unix);
    let machine = guest();
    let (records, to) = (world.source_options.clone(), world.listener.local_endpoint().clone());
    let second = std::sync::Mutex::new(None);
    let also = machine.clone();
    let second = Arc::new(second);
    let result = second.clone();
    at(&world.source_journey, Point::SourceTracking, move || {
        let journey = wherry_migration::Journey::new();
        *result.lock().unwrap() = Some(wherry_migration::source::send(also.clone(), &to, records.clone(), &journey));
    });
    let (sent, received) = world.journey(&machine, None);
    let second = second.lock().unwrap().take().unwrap();
    assert!(matches!(second, Err(JourneyError::RunsHere(Cause::Ownership(_)))), "{second:?}");
    assert_moved(&world, &machine, &sent, &received, "the first of two");
}

#[test]
fn a_busy_destination_tells_another_source_so() {
    let world = World::new(Wire::Unix);
    let machine = guest();
    let other = guest();
    let mut options = world.source_options.clone();
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    options.records = elsewhere.path().into();
    let to = world.listener.local_endpoint().clone();
    let result = Arc::new(std::sync::Mutex::new(None));
    let (answer, also) = (result.clone(), other.clone());
    at(&world.source_journey, Point::SourceTracking, move || {
        let journey = wherry_migration::Journey::new();
        *answer.lock().unwrap() = Some(wherry_migration::source::send(also.clone(), &to, options.clone(), &journey));
    });
    let (sent, received) = world.journey(&machine, None);
    let refused = result.lock().unwrap().take().unwrap();
    assert!(refused.as_ref().is_err_and(|e| e.to_string().contains("busy")), "{refused:?}");
    assert!(other.is_running());
    assert_moved(&world, &machine, &sent, &received, "the first of two");
}

#[test]
fn strangers_at_the_destinations_door_do_not_keep_the_source_out() {
    use std::io::Write;
    let world = World::new(Wire::Tcp);
    let Endpoint::Tcp { host, port } = world.listener.local_endpoint().clone() else { unreachable!() };
    let mut stranger = std::net::TcpStream::connect((host.as_str(), port)).unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let silent = std::net::TcpStream::connect((host.as_str(), port)).unwrap();
    let machine = guest();
    let (sent, received) = world.journey(&machine, None);
    assert_moved(&world, &machine, &sent, &received, "strangers");
    drop((stranger, silent));
}
