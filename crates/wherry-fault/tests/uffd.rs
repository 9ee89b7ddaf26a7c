//! One userfaultfd and the kernel's bare answers.

#![allow(clippy::unwrap_used, reason = "a failure is a panic here")]

mod support;

use support::{BLOCK, PAGE, Sharer, permitted, until};
use wherry_fault::{Mode, Outcome, Userfault};
use wherry_memory::{Block, BlockSpec, PageSize};

fn block() -> Block {
    Block::create(BlockSpec { id: BLOCK, guest_base: 0, size: 8 * PAGE, page_size: PageSize::Base }).unwrap()
}

#[test]
fn no_other_events_than_page_faults_are_asked_for() {
    if permitted().is_none() {
        return;
    }
    // FORK, REMAP, REMOVE, UNMAP: bits 1, 2, 3 and 6 of include/uapi/linux/userfaultfd.h.
    assert_eq!(Userfault::open().unwrap().features() & 0b100_1110, 0);
}

#[test]
fn a_fault_tells_what_was_touched_how_and_by_whom() {
    if permitted().is_none() {
        return;
    }
    let block = block();
    let sharer = Sharer::new(&block, Some(Mode::MISSING_MINOR));
    let touch = sharer.touch(2);
    let mut faults = Vec::new();
    until("the fault is read", || {
        assert!(!sharer.uffd.read_events(&mut faults).unwrap());
        !faults.is_empty()
    });
    assert_eq!(faults[0].address, sharer.base + 2 * PAGE);
    assert!(!faults[0].minor && !faults[0].write && !faults[0].wp);
    assert!(faults[0].thread.is_none_or(|thread| std::path::Path::new(&format!("/proc/self/task/{thread}")).exists()));
    assert_eq!(sharer.uffd.copy(sharer.base + 2 * PAGE, &[5; PAGE as usize], false).unwrap(), Outcome::Done);
    assert!(touch.waits());
    sharer.uffd.wake(sharer.base + 2 * PAGE, PAGE).unwrap();
    assert_eq!(touch.bytes(), (5, 5));
}

#[test]
fn each_answer_of_the_kernel_is_told_apart() {
    if permitted().is_none() {
        return;
    }
    let block = block();
    let sharer = Sharer::new(&block, Some(Mode::MISSING_MINOR));
    let (uffd, at) = (&sharer.uffd, |page: u64| sharer.base + page * PAGE);
    assert_eq!(uffd.continue_range(at(0), PAGE, true).unwrap(), Outcome::Fault, "a hole");
    assert_eq!(uffd.zeropage(at(1), PAGE, true).unwrap(), Outcome::Done);
    assert_eq!(uffd.zeropage(at(0), 3 * PAGE, true).unwrap(), Outcome::Partial(PAGE));
    assert_eq!(uffd.zeropage(at(1), PAGE, true).unwrap(), Outcome::Exists);
    assert_eq!(uffd.copy(at(1), &[1; PAGE as usize], true).unwrap(), Outcome::Exists);
    assert_eq!(uffd.continue_range(at(0), 9 * PAGE, true).unwrap(), Outcome::NotRegistered, "beyond the map");
    assert!(uffd.continue_range(at(0) + 1, PAGE, true).is_err());
    uffd.unregister(sharer.base, 8 * PAGE).unwrap();
    assert_eq!(uffd.copy(at(5), &[1; PAGE as usize], true).unwrap(), Outcome::NotRegistered);
}

#[test]
fn a_poisoned_page_fails_the_system_call_that_touches_it() {
    if permitted().is_none() {
        return;
    }
    let block = block();
    let sharer = Sharer::new(&block, None);
    let calls = sharer.uffd.register(sharer.base, 8 * PAGE, Mode::MISSING_MINOR).unwrap();
    if !calls.poison() {
        println!("SKIPPED: this kernel has no UFFDIO_POISON (Linux 6.6)");
        return;
    }
    assert_eq!(sharer.uffd.poison(sharer.base + PAGE, PAGE).unwrap(), Outcome::Done);
    let error = read_into(sharer.base + PAGE).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
}

#[expect(unsafe_code, reason = "has a system call touch a page")]
fn read_into(address: u64) -> std::io::Result<usize> {
    let file = std::fs::File::open("/dev/zero")?;
    // SAFETY: the kernel checks the address, which is inside a map of the test.
    let got = unsafe { libc::read(std::os::fd::AsRawFd::as_raw_fd(&file), address as *mut libc::c_void, 8) };
    usize::try_from(got).map_err(|_| std::io::Error::last_os_error())
}
