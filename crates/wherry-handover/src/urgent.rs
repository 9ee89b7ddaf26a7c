//! What conducts a handover goes before others: whoever is served waits while it waits for a processor.
//!
//! That thread alone: threads inherit the priority of whoever starts them, and those that are started meanwhile (of a machine that begins to
//! run, say) would keep it for good.
#![expect(unsafe_code, reason = "the policy of a thread is set by a call of the C library")]

use libc::{SCHED_OTHER, SCHED_RESET_ON_FORK, sched_param, sched_setscheduler};
use rustix::process::{Pid, getpriority_process, setpriority_process};
use rustix::thread::gettid;

/// While it lives, the thread that made it has the highest ordinary priority. Without the right to that
/// (`CAP_SYS_NICE`) nothing happens. Threads that it starts have the ordinary one.
#[derive(Debug)]
pub struct Urgent {
    thread: Pid,
    before: i32,
}

impl Urgent {
    /// On the thread that is to be urgent, and that has to drop it. None: it has not the right.
    pub fn new() -> Option<Self> {
        let thread = gettid();
        let before = getpriority_process(Some(thread)).ok()?;
        set_policy(thread, SCHED_OTHER | SCHED_RESET_ON_FORK).ok()?;
        let this = Self { thread, before };
        setpriority_process(Some(thread), -20).ok()?;
        Some(this)
    }
}

fn set_policy(thread: Pid, policy: i32) -> std::io::Result<()> {
    let param = sched_param { sched_priority: 0 };
    // SAFETY: it reads that structure, of a thread of ours.
    match unsafe { sched_setscheduler(thread.as_raw_nonzero().get(), policy, &param) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        if let Err(error) = setpriority_process(Some(self.thread), self.before) {
            tracing::debug!(%error, "the thread keeps its high priority");
        }
        if let Err(error) = set_policy(self.thread, SCHED_OTHER) {
            tracing::debug!(%error, "threads that it starts do not inherit its priority");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_priority_is_what_it_was_afterwards() {
        let before = getpriority_process(Some(gettid())).unwrap();
        let urgent = Urgent::new();
        if urgent.is_some() {
            assert_eq!(getpriority_process(Some(gettid())).unwrap(), -20);
        }
        drop(urgent);
        assert_eq!(getpriority_process(Some(gettid())).unwrap(), before);
    }

    #[test]
    fn threads_that_are_started_meanwhile_have_the_ordinary_priority_and_later_ones_inherit_again() {
        let inherited = || {
            let ask = || getpriority_process(Some(gettid())).unwrap();
            std::thread::spawn(ask).join().unwrap()
        };
        let Some(urgent) = Urgent::new() else { return println!("SKIPPED: no right to a higher priority") };
        assert_eq!(inherited(), 0);
        drop(urgent);
        setpriority_process(Some(gettid()), -3).unwrap();
        assert_eq!(inherited(), -3);
    }
}
