//! The state of a device on its way through a pipe of the front end.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Most bytes of a device's state, and how long it may take to come.
const MOST_STATE: u64 = 1 << 20;
const STATE_LIMIT: Duration = Duration::from_secs(10);

/// Writes a state into a pipe; who reads it may do so later.
pub(crate) fn send(fd: OwnedFd, state: &[u8]) -> std::io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    // It is small. A pipe that does not take it at once would keep the front end from reading it.
    rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
    File::from(fd).write_all(state)
}

/// Reads a state to its end.
pub(crate) fn receive(fd: OwnedFd) -> std::io::Result<Vec<u8>> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
    let deadline = Instant::now() + STATE_LIMIT;
    let mut state = Vec::new();
    let mut file = File::from(fd);
    loop {
        let mut piece = [0; 4096];
        match file.read(&mut piece) {
            Ok(0) => return Ok(state),
            Ok(_) if state.len() as u64 > MOST_STATE => {
                return Err(std::io::Error::other(format!("more than {MOST_STATE} bytes")));
            }
            Ok(got) => state.extend_from_slice(&piece[..got]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(std::io::Error::other(format!("it does not end within {STATE_LIMIT:?}")));
                }
                let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
                match poll(&mut [PollFd::new(&file, PollFlags::IN)], Some(&left)) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Err(error) => return Err(error),
        }
    }
}
