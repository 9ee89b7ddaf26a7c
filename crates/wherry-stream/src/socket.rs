//! System calls on a stream socket that work on raw memory. The only place of this crate that makes such calls.
#![expect(unsafe_code, reason = "guest memory is handed to the kernel by address; safe wrappers want references")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::io_range::{FileRange, IOV_MAX, IoRange};
use crate::tls_session::Session;

/// A connected stream socket, shared by the halves of a connection and by those who may close it.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    tcp: bool,
    closed: AtomicBool,
    tls: OnceLock<Session>,
}

/// What the kernel knows of the way to the peer of a TCP connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Path {
    /// Bytes that the peer has acknowledged, from the start.
    pub acknowledged: u64,
    /// The shortest round trip of the last minutes: the way without queues.
    pub min_round_trip: Duration,
}

/// How a call behaves.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Flags {
    /// Return at once if nothing can be moved.
    pub(crate) nonblocking: bool,
    /// Receive: return only with everything, or when the time is up. Ignored if `nonblocking`.
    pub(crate) all: bool,
    /// Send: more follows at once, so that a packet need not leave yet.
    pub(crate) more: bool,
}

fn result(n: isize) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

impl Socket {
    pub(crate) fn new(fd: OwnedFd, tcp: bool) -> Self {
        Self { fd, tcp, closed: AtomicBool::new(false), tls: OnceLock::new() }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.fd.as_fd()
    }

    pub(crate) fn is_tcp(&self) -> bool {
        self.tcp
    }

    /// Ends the connection in both directions; blocked calls return.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        // It fails if the peer was faster; the effect is the same.
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    fn message(ranges: &[IoRange]) -> libc::msghdr {
        // SAFETY: a msghdr of zeros is valid: no name, no control data, no ranges.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = ranges.as_ptr().cast_mut().cast();
        message.msg_iovlen = ranges.len().min(IOV_MAX) as _;
        message
    }

    /// From now on everything goes through the session. It can be given once.
    pub(crate) fn set_session(&self, session: Session) {
        // Connections make one handshake, before anybody else can have this socket.
        let _ = self.tls.set(session);
    }

    /// Sends from the first `IOV_MAX` ranges; may send less than all, and nothing although something moved (TLS).
    pub(crate) fn send(&self, ranges: &[IoRange], flags: Flags) -> io::Result<usize> {
        match self.tls.get() {
            None => self.send_raw(ranges, flags),
            Some(tls) => tls.send(self, ranges, flags),
        }
    }

    /// Receives into the first `IOV_MAX` ranges; may receive less than all. 0 is the end of the stream.
    pub(crate) fn receive(&self, ranges: &[IoRange], flags: Flags) -> io::Result<usize> {
        match self.tls.get() {
            None => self.receive_raw(ranges, flags),
            Some(tls) => tls.receive(self, ranges, flags),
        }
    }

    /// Sends from a file; may send less than all. 0 means that the file ends there.
    pub(crate) fn send_file(&self, range: FileRange<'_>) -> io::Result<usize> {
        match self.tls.get() {
            None => self.send_file_raw(range),
            Some(tls) => tls.send_file(self, range),
        }
    }

    /// Whether something that was taken for sending waits in this process.
    pub(crate) fn must_flush(&self) -> bool {
        self.tls.get().is_some_and(|tls| tls.unsent() > 0)
    }

    /// Sends what waits in this process; may send less than all.
    pub(crate) fn flush(&self) -> io::Result<()> {
        self.tls.get().map_or(Ok(()), |tls| tls.flush(self))
    }

    /// [`Self::send`] of the socket itself.
    pub(crate) fn send_raw(&self, ranges: &[IoRange], flags: Flags) -> io::Result<usize> {
        let mut bits = libc::MSG_NOSIGNAL;
        if flags.nonblocking {
            bits |= libc::MSG_DONTWAIT;
        }
        if flags.more {
            bits |= libc::MSG_MORE;
        }
        let message = Self::message(ranges);
        // SAFETY: the ranges are readable by the promise made when each IoRange was constructed; the kernel does not
        // write through them in a send.
        result(unsafe { libc::sendmsg(self.fd.as_raw_fd(), &message, bits) })
    }

    /// [`Self::receive`] of the socket itself.
    pub(crate) fn receive_raw(&self, ranges: &[IoRange], flags: Flags) -> io::Result<usize> {
        let bits = match flags {
            Flags { nonblocking: true, .. } => libc::MSG_DONTWAIT,
            Flags { all: true, .. } => libc::MSG_WAITALL,
            _ => 0,
        };
        let mut message = Self::message(ranges);
        // SAFETY: the ranges are writable by the promise made when each IoRange was constructed.
        result(unsafe { libc::recvmsg(self.fd.as_raw_fd(), &mut message, bits) })
    }

    fn send_file_raw(&self, range: FileRange<'_>) -> io::Result<usize> {
        let mut offset = libc::off64_t::try_from(range.offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let len = usize::try_from(range.len).unwrap_or(usize::MAX);
        // SAFETY: both descriptors are open for the length of the call and `offset` is a local variable.
        result(unsafe { libc::sendfile64(self.fd.as_raw_fd(), range.file.as_raw_fd(), &mut offset, len) })
    }

    /// Bytes that the kernel holds for sending and that the peer has not acknowledged (UNIX: not read), with the
    /// kernel's overhead in the case of UNIX.
    pub(crate) fn unsent(&self) -> io::Result<u64> {
        let mut bytes: libc::c_int = 0;
        // SAFETY: TIOCOUTQ (SIOCOUTQ) writes one int, for which there is room.
        let r = unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TIOCOUTQ, &mut bytes) };
        result(r as isize)?;
        let waiting = self.tls.get().map_or(0, Session::unsent);
        Ok(u64::try_from(bytes).unwrap_or(0) + waiting as u64)
    }

    /// What the kernel knows of the way to the peer; `None` for other sockets than TCP's.
    pub(crate) fn path(&self) -> Option<Path> {
        // `struct tcp_info` of linux/tcp.h, which only grows at its end, in words of 32 bits.
        const BYTES_ACKED: usize = 30;
        const MIN_RTT: usize = 37;
        let mut words = [0u32; 64];
        let mut length = size_of_val(&words) as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes, which is the size of `words`, and says how many.
        let r = unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                words.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        if !self.tcp || r != 0 || (length as usize) < (MIN_RTT + 1) * size_of::<u32>() {
            return None;
        }
        Some(Path {
            acknowledged: u64::from(words[BYTES_ACKED]) | u64::from(words[BYTES_ACKED + 1]) << 32,
            min_round_trip: Duration::from_micros(words[MIN_RTT].into()),
        })
    }

    /// Bounds what the kernel takes for sending and the peer has not acknowledged, roughly.
    pub(crate) fn set_send_buffer(&self, bytes: usize) -> io::Result<()> {
        // The kernel doubles it, for its own overhead, which is small for large writes; but it wakes a writer only when a
        // third is free.
        Ok(rustix::net::sockopt::set_socket_send_buffer_size(&self.fd, bytes / 4 * 3)?)
    }

    /// Bounds what may lie unsent in the kernel before the socket counts as not writable (`TCP_NOTSENT_LOWAT`).
    pub(crate) fn set_unsent_limit(&self, bytes: u32) -> io::Result<()> {
        // SAFETY: the option takes an unsigned int, and the length says so.
        let r = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_NOTSENT_LOWAT,
                (&raw const bytes).cast(),
                size_of::<u32>() as libc::socklen_t,
            )
        };
        result(r as isize).map(|_| ())
    }

    /// How long a receive may block.
    pub(crate) fn set_receive_timeout(&self, timeout: Duration) -> io::Result<()> {
        Ok(rustix::net::sockopt::set_socket_timeout(&self.fd, rustix::net::sockopt::Timeout::Recv, Some(timeout))?)
    }

    /// How long a send may block.
    pub(crate) fn set_send_timeout(&self, timeout: Duration) -> io::Result<()> {
        Ok(rustix::net::sockopt::set_socket_timeout(&self.fd, rustix::net::sockopt::Timeout::Send, Some(timeout))?)
    }
}
