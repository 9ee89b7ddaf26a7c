//! In a switchover the conducting thread goes before others: the guest stands still while it waits for a processor. What
//! is pushed while memory follows goes behind.

use rustix::process::{Pid, getpriority_process, setpriority_process};
use rustix::thread::gettid;

/// How much nicer than others a thread is that pushes or takes what follows a guest.
const PATIENT: i32 = 5;

/// Puts this thread behind those of the guest, and those that a fault goes through, until it ends. It costs no right.
pub(crate) fn be_patient() {
    let thread = Some(gettid());
    if getpriority_process(thread).is_ok_and(|now| now < PATIENT) {
        // Without it the guest waits a little longer for a processor.
        let _ = setpriority_process(thread, PATIENT);
    }
}

/// While it lives, the thread that made it has the highest ordinary priority. Without the right to that
/// (`CAP_SYS_NICE`) nothing happens.
pub(crate) struct Urgent {
    thread: Pid,
    before: i32,
}

impl Urgent {
    pub(crate) fn new() -> Option<Self> {
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
    fn a_patient_thread_is_one_of_its_own() {
        let before = getpriority_process(Some(gettid())).unwrap();
        let patient = std::thread::spawn(|| {
            be_patient();
            getpriority_process(Some(gettid())).unwrap()
        });
        assert_eq!(patient.join().unwrap(), before.max(PATIENT));
        assert_eq!(getpriority_process(Some(gettid())).unwrap(), before);
    }

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
