//! Requests of the back end's own, to a front end that hears them: that the configuration of the device has changed.
//!
//! No answer is asked for: a front end that waits for one of ours would wait for ever.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{SendFlags, SocketType};

/// Number of the request, in the numbers of the back end's requests.
const CONFIG_CHANGE: u32 = 2;
const VERSION: u32 = 1;

/// The socket by which a front end hears requests.
pub(crate) struct Channel(OwnedFd);

impl Channel {
    /// The front end has given it.
    pub(crate) fn adopt(fd: OwnedFd) -> Result<Self, String> {
        match rustix::net::sockopt::socket_type(&fd) {
            Ok(SocketType::STREAM) => Ok(Self(fd)),
            Ok(other) => Err(format!("a socket of type {other:?} for requests, where one for a stream is due")),
            Err(error) => Err(format!("no socket for requests: {error}")),
        }
    }

    /// The configuration is another one now: the front end reads it.
    pub(crate) fn config_changed(&self) {
        let message: Vec<u8> = [CONFIG_CHANGE, VERSION, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        // One that does not read has the same message before it.
        if let Err(error) = rustix::net::send(&self.0, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            tracing::warn!(%error, "telling a front end that the configuration has changed");
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
