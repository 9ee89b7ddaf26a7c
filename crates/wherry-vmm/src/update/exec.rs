//! Executes the new program in this process.
//!
//! `execve` is the last step, and the first that cannot be undone: it ends all other threads, unmaps all memory and closes every
//! descriptor but standard input, output and error, KVM's among them, at once. Before it nothing is closed, so a program that cannot be
//! executed leaves the machine as it was.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Signal, pidfd_send_signal};
use wherry_handover::{Channel, Launched};

/// The word by which a program is told that it was executed in a process that has a VM; its standard input is the queue.
pub const TAKE_OVER_EXECUTED: &str = "take-over-executed";

/// Has the signals that ask for a stop wait, over the moment in which a program is executed and does not listen for them, or has those
/// come that have waited. For the calling thread.
pub fn set_signals_held(held: bool) -> io::Result<()> {
    use vmm_sys_util::signal::{Error, block_signal, unblock_signal};
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        match if held { block_signal(signal) } else { unblock_signal(signal) } {
            Ok(()) | Err(Error::SignalAlreadyBlocked(_)) => {}
            Err(error) => return Err(io::Error::other(error.to_string())),
        }
    }
    Ok(())
}

/// Executes the program that `proven` is a process of, which is ended first: it has proven that it can do what it is executed for. Its
/// standard input is `queue`. Returns only if that fails, with all as it was.
pub(super) fn execute(
    proven: &Launched,
    program: &Path,
    log: &str,
    stop_wanted: &AtomicBool,
    queue: Channel,
) -> io::Error {
    let stdin = match rustix::io::fcntl_dupfd_cloexec(io::stdin().as_fd(), 3) {
        Ok(stdin) => stdin,
        Err(error) => return error.into(),
    };
    let error = match try_to_execute(proven, program, log, stop_wanted, queue) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    for undone in [rustix::stdio::dup2_stdin(&stdin).map_err(io::Error::from), set_signals_held(false)] {
        if let Err(error) = undone {
            tracing::error!(%error, "after a program that could not be executed");
        }
    }
    error
}

fn try_to_execute(
    proven: &Launched,
    program: &Path,
    log: &str,
    stop_wanted: &AtomicBool,
    queue: Channel,
) -> io::Result<std::convert::Infallible> {
    // Its path may lead elsewhere by now, and it may have executed another program itself.
    let path = format!("/proc/{}/exe", proven.pid);
    let image = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    if poll(&mut [PollFd::new(&proven.pidfd, PollFlags::IN)], Some(&now))? > 0 {
        return Err(io::Error::other("the process that has proven it has ended"));
    }
    pidfd_send_signal(&proven.pidfd, Signal::KILL)?;
    let text = |text: &OsStr| CString::new(text.as_bytes()).map_err(io::Error::other);
    let arguments = ["--log", log, TAKE_OVER_EXECUTED].map(OsStr::new);
    let arguments: Vec<_> = [program.as_os_str()].into_iter().chain(arguments).map(text).collect::<io::Result<_>>()?;
    let entry = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        let mut entry = name.into_vec();
        entry.push(b'=');
        entry.extend(value.into_vec());
        CString::new(entry).map_err(io::Error::other)
    };
    let environment: Vec<_> = std::env::vars_os().map(entry).collect::<io::Result<_>>()?;
    rustix::stdio::dup2_stdin(OwnedFd::from(queue))?;
    set_signals_held(true)?;
    // Whoever asked by a signal has no other way to hear that it was lost.
    if stop_wanted.load(Ordering::SeqCst) {
        return Err(io::Error::other("a stop was asked for meanwhile"));
    }
    #[expect(unsafe_code, reason = "there is no safe way to execute an open file")]
    // SAFETY: `close_range` only sets a flag of descriptors, which no code of this process reads. The lists are of pointers to strings
    // that live until the call returns, and end with a null pointer.
    unsafe {
        let list = |strings: &[CString]| {
            let mut list: Vec<_> = strings.iter().map(|string| string.as_ptr()).collect();
            list.push(std::ptr::null());
            list
        };
        if libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) != 0 {
            return Err(io::Error::last_os_error());
        }
        libc::fexecve(image.as_raw_fd(), list(&arguments).as_ptr(), list(&environment).as_ptr());
    }
    Err(io::Error::last_os_error())
}
