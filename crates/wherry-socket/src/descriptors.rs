//! Bytes with descriptors on a connected UNIX socket: one system call, whatever protocol they belong to.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

/// Most descriptors that the kernel takes at once (`SCM_MAX_FD`).
pub const MOST: usize = 253;

/// What came in one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Bytes; none at the end of the stream.
    pub bytes: usize,
    /// Descriptors were lost: there were too many, or this process may have no more open.
    pub cut: bool,
}

/// Sends some of these bytes, and with the first of them the descriptors; how many bytes went. `EINVAL`: more than [`MOST`]
/// descriptors. A peer that is gone is `EPIPE`, and no signal.
pub fn send(socket: impl AsFd, parts: &[IoSlice<'_>], descriptors: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Errno::INVAL);
    }
    rustix::net::sendmsg(socket, parts, &mut control, SendFlags::NOSIGNAL)
}

/// Receives bytes, and adds the descriptors that come with them to `descriptors`. They are closed when this process executes another
/// program.
pub fn receive(socket: impl AsFd, into: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> Result<Received, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(into)];
    let message = rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            descriptors.extend(received);
        }
    }
    Ok(Received { bytes: message.bytes, cut: message.flags.contains(ReturnFlags::CTRUNC) })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn bytes_and_descriptors_come_together_and_an_end_is_no_error() {
        let (one, other) = UnixStream::pair().unwrap();
        let event = eventfd(3, EventfdFlags::CLOEXEC).unwrap();
        let fds = vec![event.as_fd(); MOST];
        assert_eq!(send(&one, &[IoSlice::new(b"ab"), IoSlice::new(b"c")], &fds), Ok(3));
        let (mut bytes, mut came) = ([0; 8], Vec::new());
        assert_eq!(receive(&other, &mut bytes, &mut came), Ok(Received { bytes: 3, cut: false }));
        assert_eq!((&bytes[..3], came.len()), (&b"abc"[..], MOST));
        let flags = rustix::io::fcntl_getfd(&came[0]).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        assert_eq!(send(&one, &[IoSlice::new(b"x")], &vec![event.as_fd(); MOST + 1]), Err(Errno::INVAL));
        drop(one);
        assert_eq!(receive(&other, &mut bytes, &mut came), Ok(Received { bytes: 0, cut: false }));
        assert_eq!(send(&other, &[IoSlice::new(b"x")], &[]), Err(Errno::PIPE));
    }
}
