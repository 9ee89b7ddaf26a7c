//! Every interleaving of the steps on page states, explored by loom: faults against channels, late duplicates and
//! channels that die. The module under test is compiled here once more, with loom's atomics.

#![allow(clippy::unwrap_used, reason = "a failure is a panic here")]

#[path = "../src/states.rs"]
#[allow(dead_code, reason = "the models use a part of the interface")]
mod states;

/// The atomics of `src/sync.rs`, as loom has them.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering, fence};

    pub(crate) fn zeroed_u8(n: usize) -> Box<[AtomicU8]> {
        (0..n).map(|_| AtomicU8::new(0)).collect()
    }

    pub(crate) fn zeroed_u16(n: usize) -> Box<[AtomicU16]> {
        (0..n).map(|_| AtomicU16::new(0)).collect()
    }
}

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use states::{PageState, PageStates, Want};

/// The states, and for each page its bytes: written by whoever fills it, without any order of their own.
struct Memory {
    states: PageStates,
    bytes: Vec<AtomicU64>,
}

impl Memory {
    fn new(pages: u64, unit: u64) -> Arc<Self> {
        let bytes = (0..pages).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Self { states: PageStates::new(pages, unit), bytes })
    }

    /// What a channel does. `None`: its copy went to scratch.
    fn fill(&self, page: u64) -> Option<bool> {
        if !self.states.claim(page) {
            return None;
        }
        let before = self.bytes[page as usize].load(Ordering::Relaxed);
        self.bytes[page as usize].store(before + 1, Ordering::Relaxed);
        Some(self.states.publish(page))
    }

    /// What the fault thread does.
    fn fault(&self, page: u64) -> Want {
        let want = self.states.want(page);
        if want == Want::Received {
            for page in self.states.unit_of(page) {
                assert_eq!(self.bytes[page as usize].load(Ordering::Relaxed), 1, "page {page} was seen half-filled");
            }
        }
        want
    }
}

fn spawn<T: 'static>(memory: &Arc<Memory>, f: impl FnOnce(&Memory) -> T + 'static) -> thread::JoinHandle<T> {
    let memory = memory.clone();
    thread::spawn(move || f(&memory))
}

#[test]
fn a_fault_sees_the_page_or_its_publisher_sees_the_fault() {
    loom::model(|| {
        let memory = Memory::new(1, 1);
        let channel = spawn(&memory, |m| m.fill(0));
        let want = memory.fault(0);
        let woken = channel.join().unwrap().unwrap();
        assert_eq!(woken, want != Want::Received, "{want:?}");
        assert!(memory.states.is_complete() && !memory.states.is_waited(0));
    });
}

#[test]
fn of_two_copies_of_a_page_one_is_drained_and_the_waiter_is_woken_once() {
    loom::model(|| {
        let memory = Memory::new(1, 1);
        let first = spawn(&memory, |m| m.fill(0));
        let late = spawn(&memory, |m| m.fill(0));
        let want = memory.fault(0);
        let published: Vec<_> = [first.join().unwrap(), late.join().unwrap()].into_iter().flatten().collect();
        assert_eq!(published.len(), 1, "filled twice, or never");
        assert_eq!(published[0], want != Want::Received);
        assert_eq!(memory.bytes[0].load(Ordering::Relaxed), 1);
    });
}

#[test]
fn two_faults_and_a_prefetch_make_one_request() {
    loom::model(|| {
        let memory = Memory::new(1, 1);
        let second = spawn(&memory, |m| m.fault(0) == Want::Request);
        let ahead = spawn(&memory, |m| m.states.prefetch(0));
        let first = memory.fault(0) == Want::Request;
        let requests = u8::from(first) + u8::from(second.join().unwrap()) + u8::from(ahead.join().unwrap());
        assert_eq!(requests, 1);
        assert!(memory.states.is_waited(0));
        assert_eq!(memory.fill(0), Some(true));
    });
}

#[test]
fn two_waiters_are_both_covered_by_the_publisher_or_see_the_page() {
    loom::model(|| {
        let memory = Memory::new(1, 1);
        let channel = spawn(&memory, |m| m.fill(0));
        let other = spawn(&memory, |m| m.fault(0));
        let wants = [memory.fault(0), other.join().unwrap()];
        let woken = channel.join().unwrap().unwrap();
        assert_eq!(woken, wants.iter().any(|want| *want != Want::Received), "{wants:?}");
    });
}

#[test]
fn a_page_of_a_dead_channel_is_asked_for_by_exactly_one() {
    for unit in [1, 2] {
        loom::model(move || {
            let memory = Memory::new(2, unit);
            assert!(memory.states.claim(0));
            let dead = spawn(&memory, |m| m.states.unclaim(0));
            let want = memory.fault(0);
            let again = dead.join().unwrap();
            assert_ne!(want, Want::Received);
            assert!(again != (want == Want::Request), "unit of {unit}: {want:?}, asked again: {again}");
            assert_eq!(memory.states.state(0), PageState::Requested);
            assert!(memory.states.is_waited(0));
        });
    }
}

#[test]
fn exactly_one_publisher_sees_a_unit_become_whole_and_it_sees_the_fault() {
    loom::model(|| {
        let memory = Memory::new(2, 2);
        let settle = |page: u64| {
            move |m: &Memory| {
                assert!(m.states.claim(page));
                m.bytes[page as usize].store(1, Ordering::Relaxed);
                m.states.settle(page, false).unwrap()
            }
        };
        let (first, second) = (spawn(&memory, settle(0)), spawn(&memory, settle(1)));
        let want = memory.fault(1);
        let (first, second) = (first.join().unwrap(), second.join().unwrap());
        assert!(first.whole != second.whole, "{first:?} {second:?}");
        assert_eq!(first.waited || second.waited, want != Want::Received, "{want:?}: {first:?} {second:?}");
        assert!(memory.states.unit_complete(0) && !memory.states.is_waited(0));
    });
}

#[test]
fn a_recovery_loses_no_waiter_that_comes_meanwhile() {
    loom::model(|| {
        let memory = Memory::new(1, 1);
        assert!(memory.states.prefetch(0));
        let fault = spawn(&memory, |m| m.fault(0));
        let again = !memory.states.rewind_requests().is_empty();
        let want = fault.join().unwrap();
        // Who waits on the old request is found by the rewind, or came after it and asks for itself.
        assert!(again || want == Want::Request, "{want:?}");
        assert_ne!(memory.states.want(0), Want::Received);
        assert_eq!(memory.fill(0), Some(true));
    });
}
