//! Pages that the guest says it does not use are not carried, and nothing of what it writes there later is lost.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use support::{FakeMachine, Load, Wire, World, assert_same_memory, await_that, block, random_vm};
use wherry_memory::GRANULE;
use wherry_migration::machine::Machine;
use wherry_migration::{JourneyError, Mode};

const MIB: u64 = 1 << 20;

fn guest() -> Arc<FakeMachine> {
    let machine = FakeMachine::new(random_vm(), &[block(0, 0, 64 * MIB), block(7, 1 << 32, 8 * MIB)], Arc::default());
    machine.fill(0, 0..10_000, 1);
    machine.fill(1, 0..500, 2);
    machine
}

fn page(machine: &dyn Machine, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; GRANULE as usize];
    machine.ram().blocks()[0].read_at(page * GRANULE, &mut bytes).unwrap();
    bytes
}

#[test]
fn free_pages_stay_behind_and_memory_is_held_until_the_end() {
    let world = World::new(Wire::Unix);
    let machine = guest();
    // Also some that do not exist, and parts of chunks and words.
    *machine.free.names.lock().unwrap() = vec![100..1000, 2047..7001, 9_990..1 << 20];
    machine.power_on(Load::NONE);
    let (sent, received) = world.journey(&machine, None);
    let (there, _) = received.unwrap();
    let sent = sent.unwrap();
    let free = 900 + (7001 - 2047) + 10;
    assert_eq!((sent.rounds[0].pages, sent.rounds[0].free_pages), (10_500, free));
    assert_eq!(sent.memory_normal, 10_500 - free);
    assert_eq!(world.built().allocated_pages(), 10_500 - free);
    for n in [0, 99, 1000, 2046, 7001, 9_989] {
        assert_eq!(page(&*machine, n), page(&*there, n), "page {n}");
    }
    for n in [100, 999, 2047, 7000, 9_990, 9_999] {
        assert_eq!(page(&*there, n), vec![0; GRANULE as usize], "page {n}");
    }
    let counts = [&machine.free.asked, &machine.free.enough].map(|count| count.load(Ordering::SeqCst));
    assert_eq!(counts, [1, 1]);
    assert!(!machine.free.held.load(Ordering::SeqCst), "memory is still held");
}

#[test]
fn a_page_that_is_used_again_arrives_as_it_is() {
    for seed in 0..6 {
        let mut world = World::new(Wire::Unix);
        world.source_options.channels = Some(1 + seed % 3);
        // Slow enough that the guest writes before, while and after a chunk is looked at.
        world.source_options.bandwidth = Some(100 * MIB);
        world.source_options.downtime_limit = Duration::from_millis(20);
        let machine = guest();
        *machine.free.names.lock().unwrap() = std::iter::once(0..8000).collect();
        let before: Vec<_> = (0..8000).map(|n| page(&*machine, n)).collect();
        machine.power_on(Load::NONE);
        // What it writes before it is asked is of no use to it.
        let (sent, received) = std::thread::scope(|scope| {
            scope.spawn(|| {
                await_that("the guest to be asked", || machine.free.asked.load(Ordering::SeqCst) > 0);
                machine.set_load(Load { rate: 20_000, pages: 6000, zero_one_in: 9 });
            });
            world.journey(&machine, None)
        });
        let (there, sent) = (received.unwrap().0, sent.unwrap());
        assert!(sent.rounds[0].free_pages > 0 && machine.cpu.writes() > 0, "{:?}", sent.rounds);
        let (mut used, mut unused) = (0, 0);
        for (n, before) in (0..).zip(&before) {
            let (here, there) = (page(&*machine, n), page(&*there, n));
            if here == there {
                used += 1;
            } else {
                assert!(here == *before, "seed {seed}: page {n} was written, and that is lost");
                assert_eq!(there, vec![0; GRANULE as usize], "seed {seed}: page {n}");
                unused += 1;
            }
        }
        assert!(used > 0 && unused > 0, "seed {seed}: {used} and {unused}");
    }
}

#[test]
fn nothing_is_asked_where_every_page_counts() {
    for mode in [Mode::Precopy, Mode::Postcopy] {
        let mut world = World::new(Wire::Unix);
        world.source_options.mode = mode;
        world.source_options.verify = mode == Mode::Precopy;
        let machine = guest();
        *machine.free.names.lock().unwrap() = std::iter::once(0..8000).collect();
        machine.power_on(Load::NONE);
        let (sent, received) = world.journey(&machine, None);
        sent.unwrap();
        assert_same_memory(&*machine, &*received.unwrap().0);
        assert_eq!(machine.free.asked.load(Ordering::SeqCst), 0, "{mode:?}");
        assert!(!machine.free.held.load(Ordering::SeqCst), "{mode:?}: memory is still held");
    }
}

#[test]
fn a_journey_that_fails_lets_go() {
    let world = World::new(Wire::Unix);
    world.builder.script.fail("restore");
    let machine = guest();
    *machine.free.names.lock().unwrap() = std::iter::once(0..8000).collect();
    machine.power_on(Load::NONE);
    let (sent, _) = world.journey(&machine, None);
    assert!(matches!(sent, Err(JourneyError::RunsHere(_))), "{sent:?}");
    assert!(!machine.free.held.load(Ordering::SeqCst), "memory is still held");
    assert_eq!(machine.free.enough.load(Ordering::SeqCst), 1);
}
