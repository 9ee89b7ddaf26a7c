//! What conducts a handover goes before others: whoever is served waits while it waits for a processor.

use rustix::process::{Pid, getpriority_process, setpriority_process};
use rustix::thread::gettid;

/// While it lives, the thread that made it has the highest ordinary priority. Without the right to that
/// (`CAP_SYS_NICE`) nothing happens.
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
        setpriority_process(Some(thread), -20).ok()?;
        Some(Self { thread, before })
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        if let Err(error) = setpriority_process(Some(self.thread), self.before) {
            tracing::debug!(%error, "the thread keeps its high priority");
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
}
