//! Fault sources of other processes, and blocks that are received by copy.

#![allow(clippy::unwrap_used, reason = "a failure is a panic here")]
#![expect(unsafe_code, reason = "touches addresses as another process does, and makes one")]

mod support;

use std::os::fd::{AsFd, AsRawFd};

use support::{BLOCK, Lab, PAGE, Sharer, Touch, until};
use wherry_fault::{FaultError, Mapping, Mode, SourceId, Trouble, Userfault, Wanted, Way};

/// A block received by copy, and one process that shares it.
fn shared(pages: u64) -> Option<(Lab, Sharer, SourceId)> {
    let lab = Lab::new(pages)?;
    lab.service.set_way(BLOCK, Way::Copy).unwrap();
    let sharer = Sharer::new(&lab.block, Some(Mode::MISSING));
    let id = lab.service.add_source("disk", sharer.handed_over(), sharer.table()).unwrap();
    Some((lab, sharer, id))
}

#[test]
fn a_process_that_sees_missing_pages_only_would_see_a_half_filled_page_in_place_but_not_by_copy() {
    let Some(lab) = Lab::new(64) else { return };
    let sharer = Sharer::new(&lab.block, Some(Mode::MISSING));
    // What in place does: the page is there as soon as its first byte is.
    assert!(lab.service.states(BLOCK).unwrap().claim(0));
    let first = lab.block.engine_range(0, 1).unwrap();
    // SAFETY: inside the engine map.
    unsafe { first.write_volatile(7) };
    assert_eq!(sharer.read(0), (7, 0), "without a fault");
    // So such a process is not let in before the way is changed.
    let refused = lab.service.add_source("disk", sharer.handed_over(), sharer.table());
    assert!(matches!(refused, Err(FaultError::InPlaceShared { .. })), "{refused:?}");
    lab.service.states(BLOCK).unwrap().unclaim(0);
    lab.service.set_way(BLOCK, Way::Copy).unwrap();
    assert!(lab.data().is_empty(), "the stale page is still there");
    let id = lab.service.add_source("disk", sharer.handed_over(), sharer.table()).unwrap();
    let touch = sharer.touch(0);
    assert_eq!(lab.wanted(), Wanted { block: BLOCK, page: 0, source: id });
    lab.receive_copy(0..1, 9);
    assert_eq!(touch.bytes(), (9, 9));
    lab.served(id, 1);
}

#[test]
fn both_the_guest_and_a_sharer_that_wait_for_a_page_get_it() {
    let Some((lab, sharer, id)) = shared(64) else { return };
    let (guest, other) = (lab.touch(3), sharer.touch(3));
    lab.wanted();
    until("both faults are read", || lab.figures(id).faults == 1 && lab.figures(SourceId::GUEST).faults == 1);
    assert!(lab.requests.try_recv().is_err(), "requested for each of them");
    lab.receive_copy(0..8, 4);
    assert_eq!((guest.bytes(), other.bytes()), ((4, 4), (4, 4)));
    assert_eq!((lab.guest_read(7), sharer.read(7)), ((4, 4), (4, 4)));
    lab.served(id, 1);
    lab.served(SourceId::GUEST, 1);
    assert_eq!(lab.service.waiting(), 0);
}

#[test]
fn nobody_is_woken_who_does_not_wait() {
    let Some((lab, first, id)) = shared(64) else { return };
    let second = Sharer::new(&lab.block, Some(Mode::MISSING));
    let other = lab.service.add_source("net", second.handed_over(), second.table()).unwrap();
    let touch = first.touch(40);
    lab.wanted();
    lab.receive_copy(0..64, 4);
    assert_eq!(touch.bytes(), (4, 4));
    lab.served(id, 1);
    assert_eq!((lab.figures(id).wakes, lab.figures(other).wakes), (1, 0));
    assert_eq!(lab.figures(SourceId::GUEST).wakes, 0);
}

#[test]
fn a_sharer_that_touches_a_zero_page_gets_zeros() {
    let Some((lab, sharer, id)) = shared(64) else { return };
    let early = sharer.touch(1);
    lab.wanted();
    assert_eq!(lab.service.states(BLOCK).unwrap().claim_range(0..64).len(), 1);
    lab.service.received_zero(BLOCK, 0..64).unwrap();
    assert_eq!(early.bytes(), (0, 0));
    assert_eq!(sharer.touch(2).bytes(), (0, 0));
    assert_eq!(lab.guest_read(2), (0, 0));
    assert_eq!(lab.data(), vec![1..3]);
    lab.served(id, 2);
    // Even when our own maps are registered no longer.
    lab.service.unregister_guest_maps().unwrap();
    assert_eq!(sharer.touch(60).bytes(), (0, 0));
    assert!(lab.service.take_troubles().is_empty());
}

#[test]
fn a_page_that_somebody_allocated_is_replaced_by_the_received_bytes() {
    let Some((lab, _sharer, _)) = shared(8) else { return };
    // A process that is not registered touches a hole: it reads zero, and the page is there.
    let intruder = Sharer::new(&lab.block, None);
    assert_eq!(intruder.read(5), (0, 0));
    lab.receive_copy(4..8, 6);
    assert_eq!((intruder.read(5), lab.guest_read(5), lab.guest_read(7)), ((6, 6), (6, 6), (6, 6)));
    assert_eq!(lab.service.statistics().replaced_pages, 1);
}

#[test]
fn a_page_that_was_received_is_never_replaced() {
    let Some((lab, _sharer, _)) = shared(8) else { return };
    lab.receive_copy(0..2, 6);
    lab.guest_write(0, 99);
    assert!(lab.service.states(BLOCK).unwrap().claim(2));
    let error = lab.service.received_copy(BLOCK, 0..3, &[1; 3 * PAGE as usize]).unwrap_err();
    assert!(matches!(error, FaultError::Place { start: 0, .. }), "{error}");
    assert_eq!(lab.guest_read(0), (99, 6));
}

#[test]
fn a_source_that_faults_outside_its_mappings_is_quarantined_and_the_others_go_on() {
    let Some((lab, good, good_id)) = shared(64) else { return };
    let bad = Sharer::new(&lab.block, Some(Mode::MISSING));
    let table = vec![Mapping { base: bad.base, len: 8 * PAGE, block: BLOCK, offset: 0 }];
    let id = lab.service.add_source("liar", bad.handed_over(), table).unwrap();
    let waiting = bad.touch(1);
    lab.wanted();
    let outside = bad.touch(30);
    let Trouble::Quarantined { id: named, name, reason } = lab.trouble() else { panic!("no quarantine") };
    assert_eq!((named, name.as_str()), (id, "liar"));
    assert!(reason.contains(&format!("{:#x}", bad.base + 30 * PAGE)), "{reason}");
    let figures = lab.figures(id);
    assert_eq!((figures.bad_addresses, figures.quarantined), (1, Some(reason)));
    assert!(waiting.waits() && outside.waits(), "served although quarantined");
    let touch = good.touch(1);
    until("the good source's fault is read", || lab.figures(good_id).faults == 1);
    lab.receive_copy(0..64, 3);
    assert_eq!(touch.bytes(), (3, 3));
    lab.service.remove_source(id).unwrap();
    // Its own process helps it, or ends.
    bad.uffd.unregister(bad.base, 64 * PAGE).unwrap();
    assert_eq!((waiting.bytes(), outside.bytes()), ((3, 3), (3, 3)));
}

#[test]
fn a_source_that_makes_its_descriptor_blocking_does_not_stop_the_fault_thread() {
    let Some((lab, good, good_id)) = shared(64) else { return };
    let bad = Sharer::new(&lab.block, Some(Mode::MISSING));
    let id = lab.service.add_source("blocker", bad.handed_over(), bad.table()).unwrap();
    let flags = rustix::fs::fcntl_getfl(&bad.uffd).unwrap();
    rustix::fs::fcntl_setfl(&bad.uffd, flags & !rustix::fs::OFlags::NONBLOCK).unwrap();
    let stuck = bad.touch(9);
    assert!(matches!(lab.trouble(), Trouble::Quarantined { id: named, .. } if named == id));
    let touch = good.touch(2);
    lab.wanted();
    lab.receive_copy(2..3, 3);
    assert_eq!(touch.bytes(), (3, 3));
    lab.served(good_id, 1);
    lab.receive_copy(0..64, 3);
    bad.uffd.unregister(bad.base, 64 * PAGE).unwrap();
    assert_eq!(stuck.bytes(), (3, 3));
}

#[test]
fn a_source_can_be_removed_while_it_waits() {
    let Some((lab, sharer, id)) = shared(64) else { return };
    let touch = sharer.touch(5);
    lab.wanted();
    assert_eq!(lab.service.waiting(), 1);
    // It stops using the memory; then the source goes, which wakes it.
    sharer.uffd.unregister(sharer.base, 64 * PAGE).unwrap();
    lab.service.remove_source(id).unwrap();
    assert_eq!(lab.service.waiting(), 0);
    assert_eq!(touch.bytes(), (0, 0));
    assert!(matches!(lab.service.remove_source(id), Err(FaultError::NoSource(_))));
    // The page it asked for arrives all the same, over what it allocated.
    lab.receive_copy(5..6, 8);
    assert_eq!(lab.guest_read(5), (8, 8));
    assert_eq!(lab.service.statistics().sources.len(), 1);
}

#[test]
fn a_process_that_died_while_it_waited_is_removed_and_its_descriptor_told_nothing() {
    let Some(lab) = Lab::new(64) else { return };
    lab.service.set_way(BLOCK, Way::Copy).unwrap();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    // The other process: maps the memfd, registers, hands its userfaultfd over and touches a page.
    // SAFETY: the child makes system calls only.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: in the child, which ends here.
        unsafe { child_process(lab.block.fd().as_raw_fd(), 64 * PAGE, theirs.as_raw_fd()) }
    }
    drop(theirs);
    let (base, fd) = receive(&ours);
    let uffd = Userfault::adopt(fd).unwrap();
    let dead = uffd.as_fd().try_clone_to_owned().unwrap();
    let table = vec![Mapping { base, len: 64 * PAGE, block: BLOCK, offset: 0 }];
    let id = lab.service.add_source("device", uffd, table).unwrap();
    assert_eq!(lab.wanted(), Wanted { block: BLOCK, page: 3, source: id });
    // SAFETY: our own child.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, std::ptr::null_mut(), 0);
    }
    // Death does not show in the answers, only in sockets and pidfds.
    let dead = Userfault::adopt(dead).unwrap();
    dead.wake(base, PAGE).unwrap();
    lab.receive_copy(3..4, 1);
    lab.served(id, 1);
    assert_eq!(lab.figures(id).quarantined, None);
    lab.service.remove_source(id).unwrap();
    assert_eq!(lab.guest_read(3), (1, 1));
    let answer = dead.copy(base, &[0; PAGE as usize], true).unwrap();
    assert_eq!(answer, wherry_fault::Outcome::Gone);
}

/// The life of the other process. Only system calls: it was forked from a process with threads.
///
/// # Safety
/// To be called in a child that has been forked.
unsafe fn child_process(memfd: i32, len: u64, socket: i32) -> ! {
    // SAFETY: fresh mappings and structures on the stack, as the calls are defined for.
    unsafe {
        let base = libc::mmap(std::ptr::null_mut(), len as usize, 3, libc::MAP_SHARED, memfd, 0);
        let uffd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) as i32;
        let mut api = [0xaau64, 0, 0];
        let mut register = [base as u64, len, 1, 0];
        if libc::ioctl(uffd, 0xc018_aa3f, &mut api) != 0 || libc::ioctl(uffd, 0xc020_aa00, &mut register) != 0 {
            libc::_exit(1);
        }
        let mut base_bytes = (base as u64).to_ne_bytes();
        let mut vector = libc::iovec { iov_base: base_bytes.as_mut_ptr().cast(), iov_len: 8 };
        let mut control = [0u64; 8];
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &mut vector;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(4) as usize;
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(header).cast::<i32>().write_unaligned(uffd);
        libc::sendmsg(socket, &message, 0);
        (base as *const u8).add(3 * PAGE as usize).read_volatile();
        libc::_exit(0);
    }
}

/// What the other process handed over: its base address and its userfaultfd.
fn receive(socket: &std::os::unix::net::UnixStream) -> (u64, std::os::fd::OwnedFd) {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    socket.set_read_timeout(Some(support::DEADLINE)).unwrap();
    let mut base = [0; 8];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(socket, &mut [std::io::IoSliceMut::new(&mut base)], &mut control, RecvFlags::empty()).unwrap();
    assert_eq!(got.bytes, 8, "the other process could not register");
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    (u64::from_ne_bytes(base), fd.unwrap())
}

#[test]
fn the_way_of_a_block_changes_while_pages_arrive_and_guests_wait() {
    let Some(lab) = Lab::new(2048) else { return };
    for page in 0..2048 {
        lab.write_engine(page, 200);
    }
    let touches: Vec<_> = [5, 1500, 2000].map(|page| lab.touch(page)).into();
    std::thread::scope(|scope| {
        let lab = &lab;
        let channel = |start: u64, changes: bool| {
            move || {
                for page in start..start + 1024 {
                    if changes && page % 32 == 0 {
                        let way = if page % 64 == 0 { Way::Copy } else { Way::InPlace };
                        lab.service.set_way(BLOCK, way).unwrap();
                        assert_eq!(lab.service.way(BLOCK).unwrap(), way);
                    }
                    let fill = lab.service.fill(BLOCK).unwrap();
                    let byte = bytes(page).0;
                    match fill.way() {
                        Way::InPlace => lab.receive(page..page + 1, byte),
                        Way::Copy => lab.receive_copy(page..page + 1, byte),
                    }
                }
            }
        };
        scope.spawn(channel(0, false));
        scope.spawn(channel(1024, true));
    });
    for (touch, page) in touches.iter().zip([5, 1500, 2000]) {
        assert_eq!(touch.bytes(), bytes(page));
    }
    lab.service.map_background(u64::MAX).unwrap();
    for page in 0..2048 {
        assert_eq!(lab.guest_read(page), bytes(page), "page {page}");
    }
    assert!(lab.service.take_troubles().is_empty());
}

/// What the page is filled with, at both ends.
fn bytes(page: u64) -> (u8, u8) {
    ((page % 100) as u8, (page % 100) as u8)
}

#[test]
fn a_block_another_process_maps_is_not_received_in_place() {
    let Some((lab, _sharer, id)) = shared(8) else { return };
    assert!(matches!(lab.service.set_way(BLOCK, Way::InPlace), Err(FaultError::InPlaceShared { .. })));
    assert!(matches!(lab.service.received(BLOCK, 0..1), Err(FaultError::Way { .. })));
    lab.service.remove_source(id).unwrap();
    lab.service.set_way(BLOCK, Way::InPlace).unwrap();
    lab.receive(0..8, 1);
    assert_eq!(lab.touch(0).bytes(), (1, 1));
}

#[test]
fn a_sharer_that_arrives_when_all_is_received_finds_everything() {
    let Some(lab) = Lab::new(8) else { return };
    lab.receive(0..4, 1);
    assert_eq!(lab.service.states(BLOCK).unwrap().claim_range(4..8).len(), 1);
    lab.service.received_zero(BLOCK, 4..8).unwrap();
    let sharer = Sharer::new(&lab.block, Some(Mode::MISSING));
    lab.service.add_source("late", sharer.handed_over(), sharer.table()).unwrap();
    assert_eq!((sharer.read(0), sharer.touch(5).bytes()), ((1, 1), (0, 0)));
}

#[test]
fn a_sharer_that_registered_minor_faults_too_is_served_without_a_storm() {
    let Some(lab) = Lab::new(8) else { return };
    lab.service.set_way(BLOCK, Way::Copy).unwrap();
    let sharer = Sharer::new(&lab.block, Some(Mode::MISSING_MINOR));
    let id = lab.service.add_source("odd", sharer.handed_over(), sharer.table()).unwrap();
    lab.receive_copy(0..8, 2);
    assert_eq!(sharer.touch(3).bytes(), (2, 2));
    lab.served(id, 1);
    assert_eq!((lab.figures(id).faults, lab.figures(id).minor), (1, 1));
}

#[test]
fn a_punched_page_puts_those_who_map_it_in_quarantine() {
    let Some((lab, sharer, id)) = shared(8) else { return };
    lab.receive_copy(0..8, 2);
    lab.block.punch(4 * PAGE..5 * PAGE).unwrap();
    assert_eq!(lab.touch(4).bytes(), (0, 0));
    until("the suspect is quarantined", || lab.figures(id).quarantined.is_some());
    let mut troubles = Vec::new();
    until("both are told", || {
        troubles.extend(lab.service.take_troubles());
        troubles.len() == 2
    });
    assert_eq!(troubles[1], Trouble::Punched { block: BLOCK, page: 4, suspects: vec![id] });
    assert_eq!(sharer.read(5), (2, 2));
}

#[test]
fn part_of_a_block_can_be_mapped_in_several_pieces() {
    let Some(lab) = Lab::new(64) else { return };
    lab.service.set_way(BLOCK, Way::Copy).unwrap();
    let sharer = Sharer::new(&lab.block, Some(Mode::MISSING));
    let piece = |page: u64, pages: u64| Mapping {
        base: sharer.base + page * PAGE,
        len: pages * PAGE,
        block: BLOCK,
        offset: page * PAGE,
    };
    let id = lab.service.add_source("pieces", sharer.handed_over(), vec![piece(32, 8), piece(0, 4)]).unwrap();
    let touches = [sharer.touch(3), sharer.touch(33)];
    let mut pages = [lab.wanted().page, lab.wanted().page];
    pages.sort();
    assert_eq!(pages, [3, 33]);
    lab.receive_copy(0..64, 7);
    touches.iter().for_each(|touch: &Touch| assert_eq!(touch.bytes(), (7, 7)));
    lab.served(id, 2);
}
