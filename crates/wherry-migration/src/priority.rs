//! In a switchover the conducting thread goes before others: the guest stands still while it waits for a processor. What
//! is pushed while memory follows goes behind.

use rustix::process::{getpriority_process, setpriority_process};
use rustix::thread::gettid;
pub(crate) use wherry_handover::Urgent;

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
}
