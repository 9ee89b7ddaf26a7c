//! Faults of the guest maps, received in place.
#![allow(clippy::unwrap_used, reason = "a failure is a panic here")]
#![expect(unsafe_code, reason = "forks, and asks the kernel about mappings")]

mod support;

use std::io::Read;
use std::sync::Arc;
use std::sync::mpsc::TryRecvError;
use std::time::{Duration, Instant};

use support::{BLOCK, Lab, PAGE, Touch, permitted, requests, until};
use wherry_fault::{FaultError, FaultService, PageState, SourceId, Trouble, Want, Wanted};
use wherry_memory::{BlockSpec, PageSize, Ram};

#[test]
fn a_touched_page_is_requested_once_and_appears_when_it_is_received() {
    let Some(lab) = Lab::new(64) else { return };
    let (first, second) = (lab.touch(7), lab.touch(7));
    assert_eq!(lab.wanted(), Wanted { block: BLOCK, page: 7, source: SourceId::GUEST });
    until("both faults are read", || lab.service.statistics().sources[0].faults == 2);
    assert!(lab.requests.try_recv().is_err(), "requested twice");
    assert!(first.waits() && second.waits());
    lab.receive(7..8, 42);
    assert_eq!((first.bytes(), second.bytes()), ((42, 42), (42, 42)));
    lab.served(SourceId::GUEST, 2);
    let guest = lab.figures(SourceId::GUEST);
    assert_eq!((guest.missing, guest.minor, guest.requests), (2, 0, 1));
    let each: Vec<_> = guest.threads.values().map(|share| (share.faults, share.latency.count())).collect();
    assert_eq!(each, [(1, 1), (1, 1)], "each thread has its own fault and its own wait");
    assert_eq!((guest.workers.faults, guest.others.faults), (0, 0));
    assert_eq!(lab.service.statistics().largest_stall, guest.latency.largest());
    assert_eq!(lab.service.waiting(), 0);
}

#[test]
fn the_parts_of_a_wait_add_up_and_a_page_that_was_there_is_counted_apart() {
    let Some(lab) = Lab::new(64) else { return };
    let touch = lab.touch(7);
    lab.wanted();
    let asked = Instant::now();
    // Longer than anything else here is likely to take; the assertions hold however long it is.
    while asked.elapsed() < Duration::from_millis(5) {
        std::hint::spin_loop();
    }
    let wire = asked.elapsed();
    lab.receive(7..8, 42);
    touch.bytes();
    lab.served(SourceId::GUEST, 1);
    let guest = lab.figures(SourceId::GUEST);
    assert_eq!([&guest.queue, &guest.wire, &guest.placement].map(|part| part.count()), [1, 1, 1]);
    let parts = guest.queue.largest() + guest.wire.largest() + guest.placement.largest();
    assert_eq!(parts, guest.latency.largest());
    assert!(guest.wire.largest() >= wire, "{:?} of {wire:?} on the wire", guest.wire.largest());
    assert_eq!(guest.local.count(), 0);

    lab.write_engine(8, 43);
    lab.service.mark_received(BLOCK, 8..9).unwrap();
    assert_eq!(lab.touch(8).bytes(), (43, 43));
    until("the local fault is counted", || lab.figures(SourceId::GUEST).local.count() == 1);
    let guest = lab.figures(SourceId::GUEST);
    assert_eq!((guest.faults, guest.latency.count(), guest.wire.count()), (2, 1, 1));
}

#[test]
fn a_neighbour_that_was_asked_for_and_is_touched_on_its_way_is_a_hit_once_and_one_that_has_come_does_not_fault() {
    let Some(lab) = Lab::new(64) else { return };
    let hits = || (lab.service.statistics().prefetched, lab.service.statistics().prefetch_hits);
    let first = lab.touch(7);
    lab.wanted();
    assert_eq!(lab.service.prefetch(BLOCK, 6..12), [6..7, 8..12]);
    let more: Vec<_> = lab.service.prefetch(BLOCK, 6..13).into_iter().flatten().collect();
    assert_eq!(more, [12], "asked for twice");
    assert_eq!(hits(), (6, 0));
    let under_way = (lab.touch(9), lab.touch(9));
    until("both faults are read", || lab.figures(SourceId::GUEST).faults == 3);
    assert_eq!(hits(), (6, 1));
    lab.receive(6..13, 1);
    [first, under_way.0, under_way.1].iter().for_each(|touch| assert_eq!(touch.bytes(), (1, 1)));
    assert_eq!(lab.service.prefetch(BLOCK, 30..32).len(), 1);
    lab.receive(30..32, 2);
    assert_eq!(lab.guest_read(30), (2, 2));
    let other = lab.touch(40);
    assert_eq!(lab.wanted().page, 40);
    lab.receive(40..41, 1);
    other.bytes();
    assert_eq!((hits(), lab.figures(SourceId::GUEST).faults), ((8, 1), 4));
}

#[test]
fn bytes_that_are_received_in_place_are_seen_only_when_they_are_published() {
    let Some(lab) = Lab::new(8) else { return };
    assert!(lab.service.states(BLOCK).unwrap().claim(3));
    lab.write_engine(3, 1);
    let touch = lab.touch(3);
    until("the fault is read", || lab.service.states(BLOCK).unwrap().is_waited(3));
    assert!(touch.waits(), "a page was seen while a channel filled it");
    assert!(lab.requests.try_recv().is_err(), "a page was requested that is being filled");
    lab.write_engine(3, 2);
    lab.service.received(BLOCK, 3..4).unwrap();
    assert_eq!(touch.bytes(), (2, 2));
    assert_eq!(lab.service.statistics().sources[0].minor, 1);
}

#[test]
fn a_late_duplicate_does_not_overwrite_what_the_guest_wrote() {
    let Some(lab) = Lab::new(8) else { return };
    let touch = lab.touch(0);
    lab.wanted();
    lab.receive(0..1, 1);
    touch.bytes();
    lab.guest_write(0, 99);
    let states = lab.service.states(BLOCK).unwrap();
    assert!(!states.claim(0), "a second copy was let in");
    lab.receive(0..4, 1);
    assert_eq!(lab.guest_read(0), (99, 1));
    assert_eq!(states.received_count(), 4);
}

#[test]
fn pages_nobody_waits_for_are_placed_when_they_arrive_and_nobody_is_woken() {
    let Some(lab) = Lab::new(1024) else { return };
    lab.receive(0..600, 5);
    lab.receive(700..800, 6);
    assert_eq!((lab.guest_read(599), lab.guest_read(700)), ((5, 5), (6, 6)));
    let statistics = lab.service.statistics();
    assert_eq!((statistics.sources[0].faults, statistics.sources[0].wakes), (0, 0));
    let mapped = lab.service.map_background(u64::MAX).unwrap();
    assert_eq!((mapped.pages, mapped.wrapped), (0, true), "something was left to the background");
    assert_eq!(lab.data(), [0..600, 700..800], "holes were allocated");
}

#[test]
fn the_background_mapper_places_what_was_whole_before_the_switch_beside_what_arrives() {
    let Some(lab) = Lab::new(2048) else { return };
    (0..1000).for_each(|page| lab.write_engine(page, 5));
    lab.service.mark_received(BLOCK, 0..1000).unwrap();
    lab.service.start_mapper().unwrap();
    let touch = lab.touch(1500);
    lab.wanted();
    lab.receive(1000..2048, 6);
    assert_eq!(touch.bytes(), (6, 6));
    // More, if the mapper came to what had just been published before the one who received it.
    until("what was whole is placed", || lab.service.statistics().background_pages >= 1000);
    for page in 0..2048 {
        assert_eq!(lab.guest_read(page).0, if page < 1000 { 5 } else { 6 });
    }
}

#[test]
fn a_fault_on_a_received_page_is_resolved_at_once_and_never_requested() {
    let Some(lab) = Lab::new(64) else { return };
    lab.write_engine(33, 9);
    lab.service.mark_received(BLOCK, 0..64).unwrap();
    assert_eq!(lab.touch(33).bytes(), (9, 9));
    assert!(lab.requests.try_recv().is_err());
    assert_eq!(lab.service.statistics().sources[0].minor, 1);
}

#[test]
fn of_a_range_only_the_pages_that_the_caller_claimed_are_published_and_placed() {
    let Some(lab) = Lab::new(64) else { return };
    lab.receive(10..11, 3);
    let states = lab.service.states(BLOCK).unwrap();
    let touch = lab.touch(13);
    lab.wanted();
    for page in 11..20 {
        assert!(states.claim(page));
        lab.write_engine(page, 4);
    }
    // Another channel fills this one.
    lab.write_engine(8, 1);
    assert!(states.claim(8));
    states.unclaim(8);
    lab.service.received(BLOCK, 8..20).unwrap();
    assert_eq!(touch.bytes(), (4, 4));
    assert_eq!(states.state(8), PageState::Missing);
    assert_eq!(states.received_count(), 10);
    assert_eq!(lab.service.map_background(u64::MAX).unwrap().pages, 0, "what was published was placed");
}

#[test]
fn zero_pages_stay_holes_until_they_are_touched() {
    let Some(lab) = Lab::new(64) else { return };
    let states = lab.service.states(BLOCK).unwrap();
    let touch = lab.touch(5);
    lab.wanted();
    assert_eq!(states.claim_range(0..64).len(), 1);
    lab.service.received_zero(BLOCK, 0..64).unwrap();
    assert_eq!(touch.bytes(), (0, 0));
    assert_eq!(lab.data(), vec![5..6], "more than the touched page was allocated");
    assert_eq!(lab.touch(6).bytes(), (0, 0));
    lab.guest_write(6, 1);
    assert_eq!(lab.guest_read(6), (1, 0));
    assert_eq!(lab.data(), vec![5..7]);
    assert!(lab.service.take_troubles().is_empty());
    assert!(states.is_complete());
    lab.service.unregister_guest_maps().unwrap();
    assert_eq!(lab.guest_read(63), (0, 0));
}

#[test]
fn a_zero_page_replaces_the_stale_bytes_that_precopy_left_in_memory() {
    let Some(lab) = Lab::new(8) else { return };
    lab.write_engine(2, 77);
    let touch = lab.touch(2);
    lab.wanted();
    assert_eq!(lab.service.states(BLOCK).unwrap().claim_range(1..4).len(), 1);
    lab.service.received_zero(BLOCK, 1..4).unwrap();
    assert_eq!(touch.bytes(), (0, 0));
    assert_eq!(lab.touch(3).bytes(), (0, 0));
    assert!(lab.service.take_troubles().is_empty());
}

#[test]
fn what_precopy_brought_and_what_was_never_there_is_whole_before_the_switch() {
    let Some(lab) = Lab::new(64) else { return };
    lab.write_engine(1, 8);
    lab.write_engine(9, 8);
    lab.service.mark_received(BLOCK, 0..32).unwrap();
    assert_eq!(lab.touch(1).bytes(), (8, 8));
    assert_eq!(lab.touch(2).bytes(), (0, 0));
    assert!(lab.requests.try_recv().is_err());
    assert!(lab.service.take_troubles().is_empty(), "an ordinary hole was taken for a punched page");
    // A page that was placed is no ordinary hole. Whoever waited for page 2 may run before the service has noted that it
    // is placed; the mapper then finds it, too.
    let mapped = lab.service.map_background(u64::MAX).unwrap().pages;
    assert!(matches!(mapped, 1 | 2), "{mapped} pages, and page 9 was all that was left");
    lab.block.punch(9 * PAGE..10 * PAGE).unwrap();
    assert_eq!(lab.touch(9).bytes(), (0, 0));
    assert!(matches!(lab.trouble(), Trouble::Punched { page: 9, .. }));
}

#[test]
fn pages_that_are_marked_before_the_service_starts_are_whole_for_faults_that_wait_already() {
    let Some(()) = permitted() else { return };
    let spec = BlockSpec { id: BLOCK, guest_base: 0, size: 64 * PAGE, page_size: PageSize::Base };
    let ram = Arc::new(Ram::create(&[spec]).unwrap());
    let service = FaultService::new(ram.clone()).unwrap();
    service.register_guest_maps().unwrap();
    // SAFETY: inside the engine map.
    unsafe { ram.blocks()[0].engine_range(3 * PAGE, PAGE).unwrap().write_bytes(4, PAGE as usize) };
    let guest = ram.blocks()[0].guest_map() as u64;
    let touches = [3, 5, 60].map(|page| Touch::read(guest + page * PAGE, format!("page {page}")));
    service.mark_received(BLOCK, 0..60).unwrap();
    assert_eq!(service.states(BLOCK).unwrap().received_count(), 60);
    let (requester, requests) = requests();
    service.start(requester).unwrap();
    assert_eq!((touches[0].bytes(), touches[1].bytes()), ((4, 4), (0, 0)));
    assert_eq!(requests.recv_timeout(support::DEADLINE).unwrap().page, 60);
    assert!(service.states(BLOCK).unwrap().claim(60));
    service.received_zero(BLOCK, 60..61).unwrap();
    assert_eq!(touches[2].bytes(), (0, 0));
}

#[test]
fn a_page_that_was_punched_after_it_was_received_is_found_out() {
    let Some(lab) = Lab::new(64) else { return };
    lab.receive(0..8, 5);
    assert_eq!(lab.touch(4).bytes(), (5, 5));
    assert_eq!(lab.touch(5).bytes(), (5, 5));
    lab.block.punch(4 * PAGE..5 * PAGE).unwrap();
    lab.block.punch(7 * PAGE..8 * PAGE).unwrap();
    for page in [4, 7] {
        assert_eq!(lab.touch(page).bytes(), (0, 0));
        assert_eq!(lab.trouble(), Trouble::Punched { block: BLOCK, page, suspects: vec![] });
    }
    assert_eq!(lab.touch(5).bytes(), (5, 5));
    assert_eq!(lab.service.statistics().punched_pages, 2);
    assert!(lab.requests.try_recv().is_err(), "a page was requested that the guest has written to");
}

#[test]
fn a_system_call_that_reads_into_a_missing_page_waits_until_it_is_served() {
    let Some(lab) = Lab::new(64) else { return };
    let mut zero = std::fs::File::open("/dev/zero").unwrap();
    let target = lab.block.guest_map() as u64 + 20 * PAGE + 100;
    let reader = std::thread::spawn(move || {
        // SAFETY: eight bytes inside the guest map, which outlives the thread.
        let into = unsafe { std::slice::from_raw_parts_mut(target as *mut u8, 8) };
        zero.read(into).unwrap()
    });
    assert_eq!(lab.wanted().page, 20);
    lab.receive(20..21, 255);
    assert_eq!(reader.join().unwrap(), 8);
    assert_eq!(lab.guest_read(20), (255, 255));
    let memory = lab.service.states(BLOCK).unwrap();
    assert_eq!(memory.state(20), PageState::Received);
}

#[test]
fn a_forked_child_has_neither_map() {
    let Some(lab) = Lab::new(8) else { return };
    let maps = [lab.block.guest_map() as usize, lab.block.engine_map() as usize];
    // SAFETY: the child only makes system calls and exits.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let mut unmapped = 0;
        for map in maps {
            let mut byte = 0u8;
            // SAFETY: mincore looks at the page tables only and answers ENOMEM for what is not mapped.
            unmapped += i32::from(unsafe { libc::mincore(map as *mut libc::c_void, 4096, &mut byte) } != 0);
        }
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(unmapped) };
    }
    let mut status = 0;
    // SAFETY: waits for the child just made.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(libc::WEXITSTATUS(status), 2, "maps that a child has not");
    assert!(lab.data().is_empty());
}

#[test]
fn guest_maps_are_not_unregistered_while_pages_lack() {
    let Some(lab) = Lab::new(8) else { return };
    lab.receive(0..7, 1);
    let error = lab.service.unregister_guest_maps().unwrap_err();
    assert!(matches!(error, FaultError::Incomplete { missing: 1, .. }), "{error}");
    assert!(matches!(lab.service.register_guest_maps(), Err(FaultError::Registered)));
    lab.receive(7..8, 1);
    lab.service.unregister_guest_maps().unwrap();
    assert!(matches!(lab.service.unregister_guest_maps(), Err(FaultError::NotRegistered)));
    assert_eq!(lab.guest_read(7), (1, 1));
}

#[test]
fn ranges_outside_the_block_are_refused() {
    let Some(lab) = Lab::new(8) else { return };
    assert!(matches!(lab.service.received(BLOCK, 7..9), Err(FaultError::OutOfBlock { .. })));
    assert!(matches!(lab.service.received_zero(BLOCK, 9..9), Err(FaultError::OutOfBlock { .. })));
    assert!(matches!(
        lab.service.received(wherry_memory::BlockId(9), 0..1),
        Err(FaultError::NoBlock(wherry_memory::BlockId(9)))
    ));
    assert!(matches!(lab.service.received_copy(BLOCK, 0..1, &[0; 4096]), Err(FaultError::Way { .. })));
    assert!(matches!(lab.service.received_copy(BLOCK, 0..1, &[0; 5]), Err(FaultError::Staging { got: 5, .. })));
}

#[test]
fn after_a_recovery_what_somebody_waits_for_is_requested_again() {
    let Some(lab) = Lab::new(64) else { return };
    let states = lab.service.states(BLOCK).unwrap();
    let touches: Vec<_> = [3, 9, 12].map(|page| lab.touch(page)).into();
    for _ in 0..3 {
        lab.wanted();
    }
    assert!(states.prefetch(40) && states.claim(9) && states.claim(50));
    assert_eq!(states.outstanding(), [3, 9, 12]);
    // The link breaks: the channel that filled 9 and 50 gives them up.
    assert!(states.unclaim(9), "somebody waits for it");
    assert!(!states.unclaim(50));
    let (again, requests) = requests();
    assert_eq!(lab.service.recover(again), 3);
    let mut pages: Vec<_> = (0..3).map(|_| requests.recv_timeout(support::DEADLINE).unwrap().page).collect();
    pages.sort();
    assert_eq!(pages, [3, 9, 12]);
    assert_eq!(states.state(40), PageState::Missing, "a prefetch of the old link was kept");
    assert_eq!(states.received_set().count(), 0);
    lab.receive(0..64, 6);
    touches.iter().for_each(|touch| assert_eq!(touch.bytes(), (6, 6)));
}

#[test]
fn stopping_with_faults_outstanding_leaves_no_thread_waiting_and_no_descriptor() {
    let Some(()) = permitted() else { return };
    let spec = BlockSpec { id: BLOCK, guest_base: 0, size: 64 * PAGE, page_size: PageSize::Base };
    let lab = Lab::over(Arc::new(Ram::create(&[spec]).unwrap()));
    let touches: Vec<_> = (0..4).map(|page| lab.touch(page)).collect();
    for _ in 0..4 {
        lab.wanted();
    }
    lab.service.start_mapper().unwrap();
    lab.service.stop();
    touches.iter().for_each(|touch| assert_eq!(touch.bytes(), (0, 0)));
    assert!(lab.service.statistics().sources.is_empty());
    assert_eq!(lab.service.waiting(), 0);
    assert_eq!(lab.requests.try_recv(), Err(TryRecvError::Disconnected), "a thread still has the requester");
    lab.service.stop();
    let (requester, _requests) = requests();
    assert!(matches!(lab.service.start(requester), Err(FaultError::Started("stopped"))));
}

#[test]
fn a_service_that_never_started_says_what_is_missing_and_costs_nothing() {
    let spec = BlockSpec { id: BLOCK, guest_base: 0, size: 256 << 30, page_size: PageSize::Base };
    let before = resident();
    let ram = Arc::new(Ram::create(&[spec]).unwrap());
    let service = FaultService::new(ram).unwrap();
    let states = service.states(BLOCK).unwrap();
    assert_eq!(states.pages(), 64 << 20);
    assert_eq!(states.want((64 << 20) - 1), Want::Request);
    assert!(!service.is_complete());
    let grown = resident().saturating_sub(before);
    assert!(grown < 32 << 20, "{grown} bytes for a block nobody used");
    assert!(matches!(service.unregister_guest_maps(), Err(FaultError::Incomplete { .. })));
}

fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * PAGE
}
