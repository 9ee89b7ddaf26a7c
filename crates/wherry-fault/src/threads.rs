//! Whose thread a number is.
#![expect(unsafe_code, reason = "asks the kernel about a thread by its number")]

/// Whether a thread belongs to this process; else, of a fault of the guest maps, it is a worker of the kernel.
pub(crate) fn is_ours(thread: u32) -> bool {
    let Ok(thread) = libc::pid_t::try_from(thread) else { return false };
    // SAFETY: signal 0 is sent to nobody; the call only looks whether it could be.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, 0) == 0 }
}
