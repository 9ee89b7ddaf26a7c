//! Journeys that succeed: what arrives is what was there.

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use support::{FakeMachine, Load, Wire, World, assert_same_memory, block, random_vm};
use wherry_migration::machine::Machine;
use wherry_migration::progress::Phase;

const MIB: u64 = 1 << 20;

fn guest(blocks: &[wherry_memory::BlockSpec]) -> Arc<FakeMachine> {
    FakeMachine::new(random_vm(), blocks, Arc::default())
}

#[test]
fn a_quiet_vm_arrives_whole_and_holes_stay_holes() {
    for wire in [Wire::Unix, Wire::Tcp] {
        let world = World::new(wire);
        let machine = guest(&[block(0, 0, 64 * MIB), block(7, 1 << 32, 32 * MIB)]);
        machine.fill(0, 0..1000, 1);
        machine.fill(0, 5000..5001, 2);
        machine.zero(0, 6000..6100);
        machine.fill(1, 100..3000, 3);
        machine.power_on(Load::NONE);
        let (sent, received) = world.journey(&machine, None);
        let (there, arrived) = received.unwrap();
        let sent = sent.unwrap();
        assert_eq!((sent.phase, arrived.phase), (Phase::Done, Phase::Done), "{wire:?}");
        assert_same_memory(&*machine, &*there);
        assert!(world.built().is_running() && !machine.is_running());
        assert!(world.built().locked.load(Ordering::SeqCst) && !machine.locked.load(Ordering::SeqCst));
        assert_eq!(machine.allocated_pages(), 1000 + 1 + 100 + 2900, "the source touched holes");
        assert_eq!(world.built().allocated_pages(), 1000 + 1 + 2900, "the destination touched holes or zero pages");
        assert_eq!((sent.memory_normal, sent.memory_constant), (3901, 100));
        assert_eq!((arrived.memory_normal, arrived.memory_constant), (3901, 100));
        assert!(!machine.log.is_on(), "the dirty log still runs at the source");
        assert_eq!(world.source_journey.job(), sent);
    }
}

#[test]
fn no_write_is_lost_while_the_guest_dirties_memory_heavily() {
    for seed in 0..6 {
        let mut world = World::new(if seed % 2 == 0 { Wire::Unix } else { Wire::Tcp });
        world.source_options.channels = Some(1 + (seed as u16 % 4));
        // Slow enough for several rounds.
        world.source_options.bandwidth = Some(150 * MIB);
        world.source_options.downtime_limit = Duration::from_millis(10);
        let machine = guest(&[block(0, 0, 64 * MIB)]);
        machine.fill(0, 0..8192, seed + 1);
        machine.power_on(Load { rate: 20_000 + 30_000 * seed, pages: 12_000, zero_one_in: 5 });
        let (sent, received) = world.journey(&machine, None);
        let sent = sent.unwrap();
        let there = received.unwrap().0;
        // The destination's guest has no load, so nothing has changed there since.
        assert_same_memory(&*machine, &*there);
        assert_eq!(machine.cpu.writes(), world.built().cpu.writes());
        assert!(machine.cpu.writes() > 0, "seed {seed}: the guest never wrote; {:?}", sent.rounds);
    }
}

#[test]
fn verify_agrees_with_a_vm_that_arrived_whole() {
    let mut world = World::new(Wire::Tcp);
    world.source_options.verify = true;
    let machine = guest(&[block(0, 0, 32 * MIB)]);
    machine.fill(0, 0..4000, 9);
    machine.power_on(Load { rate: 20_000, pages: 6000, zero_one_in: 3 });
    let (sent, received) = world.journey(&machine, None);
    sent.unwrap();
    assert_same_memory(&*machine, &*received.unwrap().0);
}

#[test]
fn state_larger_than_a_message_travels_in_pieces() {
    let world = World::new(Wire::Unix);
    let machine = guest(&[block(0, 0, MIB)]);
    machine.set_bulk_state(15 << 20);
    machine.power_on(Load::NONE);
    let (sent, received) = world.journey(&machine, None);
    sent.unwrap();
    received.unwrap();
    assert_eq!(world.builder.script.count("restore"), 1);
}

#[test]
fn a_bandwidth_limit_holds_and_can_be_lifted_while_running() {
    let mut world = World::new(Wire::Tcp);
    world.source_options.bandwidth = Some(8 * MIB);
    let machine = guest(&[block(0, 0, 64 * MIB)]);
    machine.fill(0, 0..16384, 4);
    machine.power_on(Load::NONE);
    let journey = world.source_journey.clone();
    let events = journey.subscribe();
    let lifter = std::thread::spawn(move || {
        for event in events.iter() {
            if event.job.memory_processed > 2 * MIB {
                journey.set_bandwidth(None);
                return event.job;
            }
        }
        panic!("no progress was told");
    });
    let (sent, received) = world.journey(&machine, None);
    sent.unwrap();
    received.unwrap();
    let job = lifter.join().unwrap();
    let rate = job.memory_processed as f64 / (job.time_elapsed_us - job.setup_time_us) as f64 * 1e6;
    assert!(rate < 20.0 * MIB as f64, "{} MiB/s with a limit of 8", rate / MIB as f64);
}

#[test]
fn a_guest_that_outruns_the_link_is_throttled_until_it_fits_and_runs_unthrottled_there() {
    let mut world = World::new(Wire::Tcp);
    world.source_options.bandwidth = Some(60 * MIB);
    world.source_options.downtime_limit = Duration::from_millis(30);
    let machine = guest(&[block(0, 0, 32 * MIB)]);
    machine.fill(0, 0..8192, 4);
    machine.power_on(Load { rate: 40_000, pages: 8192, zero_one_in: 0 });
    let (sent, received) = world.journey(&machine, None);
    let sent = sent.unwrap();
    let there = received.unwrap().0;
    assert_same_memory(&*machine, &*there);
    assert!(sent.auto_converge_throttle >= 20, "{sent:?}");
    assert_eq!(world.built().throttle_percent(), 0);
}

#[test]
fn a_vm_goes_there_and_back_again_several_times() {
    let vm = random_vm();
    let mut machine = FakeMachine::new(vm, &[block(0, 0, 16 * MIB)], Arc::default());
    machine.fill(0, 0..2000, 5);
    machine.power_on(Load { rate: 5000, pages: 3000, zero_one_in: 9 });
    for trip in 0..4 {
        let world = World::new(Wire::Unix);
        let (sent, received) = world.journey(&machine, None);
        sent.unwrap();
        assert_same_memory(&*machine, &*received.unwrap().0);
        machine = world.built();
        machine.set_load(Load { rate: 5000, pages: 3000, zero_one_in: 9 });
        assert_eq!(wherry_migration::epoch::of(&vm), trip + 1);
    }
}

#[test]
fn the_report_adds_up() {
    let world = World::new(Wire::Tcp);
    let machine = guest(&[block(0, 0, 32 * MIB)]);
    machine.fill(0, 0..4096, 5);
    machine.power_on(Load { rate: 10_000, pages: 4096, zero_one_in: 0 });
    let (sent, received) = world.journey(&machine, None);
    let (sent, (_, arrived)) = (sent.unwrap(), received.unwrap());
    assert_eq!(sent.memory_normal, arrived.memory_normal);
    assert_eq!(sent.memory_constant, arrived.memory_constant);
    let b = sent.blackout.unwrap();
    assert_eq!(b.total_us, b.stop_us + b.last_pages_us + b.state_us + b.load_us + b.start_us + b.network_us, "{b:?}");
    assert!(sent.rounds.iter().enumerate().all(|(n, r)| r.number == n as u32 + 1));
    assert!(sent.data_processed >= sent.memory_normal_bytes);
    assert!(sent.error.is_none() && arrived.error.is_none());
}

#[test]
fn a_guest_that_writes_much_more_at_the_stop_than_predicted_is_resumed_for_another_round() {
    let mut world = World::new(Wire::Tcp);
    world.source_options.downtime_limit = Duration::from_micros(1);
    let machine = guest(&[block(0, 0, 64 * MIB)]);
    machine.fill(0, 0..1000, 5);
    machine.power_on(Load::NONE);
    // Between the prediction and the stop, as a device might.
    let (ram, surprises) = (machine.ram().clone(), std::sync::atomic::AtomicU64::new(0));
    world.source_journey.set_test_hook(move |point| {
        if point == wherry_migration::testpoint::Point::SourceDrained && surprises.fetch_add(1, Ordering::SeqCst) < 2 {
            use vm_memory::{Bytes, GuestAddress};
            ram.memory().write_slice(&vec![7; 30 << 20], GuestAddress(8 << 20)).unwrap();
        }
    });
    let (sent, received) = world.journey(&machine, None);
    let sent = sent.unwrap();
    assert_same_memory(&*machine, &*received.unwrap().0);
    assert_eq!(machine.script.count("start"), 2, "resumed once for each surprise");
    assert!(sent.rounds.iter().filter(|r| r.pages == 7680).count() == 2, "{:?}", sent.rounds);
}

#[test]
fn an_older_copy_of_a_page_never_lands_after_a_newer_one() {
    // One page is written again and again while rounds go over many channels: what arrives is the last value.
    for seed in 0..4 {
        let mut world = World::new(Wire::Tcp);
        world.source_options.channels = Some(8);
        world.source_options.bandwidth = Some(400 * MIB);
        world.source_options.downtime_limit = Duration::from_millis(3);
        let machine = guest(&[block(0, 0, 48 * MIB)]);
        machine.fill(0, 0..12_288, seed + 1);
        machine.power_on(Load { rate: 30_000, pages: 3 + seed, zero_one_in: 2 });
        let (sent, received) = world.journey(&machine, None);
        let sent = sent.unwrap();
        assert_same_memory(&*machine, &*received.unwrap().0);
        assert!(machine.cpu.writes() > 0, "{:?}", sent.rounds);
    }
}

#[test]
fn a_large_sparse_vm_moves_without_its_holes_and_with_little_memory() {
    let resident = || {
        let statm = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = statm.lines().find(|l| l.starts_with("RssAnon:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
    };
    let mut world = World::new(Wire::Tcp);
    // The fake log walks all of its words one by one, twice a round; that takes time in a debug build.
    world.source_options.timeouts.silent = Duration::from_secs(10);
    world.destination_options.timeouts.silent = Duration::from_secs(10);
    let size = 256 << 30;
    let machine = guest(&[block(0, 0, size)]);
    for n in 0..64 {
        machine.fill(0, n * 1_048_576..n * 1_048_576 + 256, n + 1);
    }
    machine.power_on(Load { rate: 1000, pages: 200, zero_one_in: 0 });
    let before = resident();
    let (sent, received) = world.journey(&machine, None);
    let (sent, there) = (sent.unwrap(), received.unwrap().0);
    let grown = resident().saturating_sub(before);
    assert_same_memory(&*machine, &*there);
    assert_eq!(machine.allocated_pages(), 64 * 256);
    assert_eq!(world.built().allocated_pages(), 64 * 256);
    // Both ends, and two fake logs and two `vm-memory` bitmaps of 8 MiB each, are in this process.
    assert!(grown < 200, "{grown} MiB; {sent:?}");
}
