//! A local socket on which parcels go: a tag, bytes, descriptors.
//!
//! ```text
//!   0    4  "WHO1"
//!   4    2  tag: what it is; whoever uses the channel gives it a meaning
//!   6    2  descriptors that come with the first byte
//!   8    4  bytes of the body
//!   12   4  zero
//!   16      body
//! ```
//!
//! Numbers are in the byte order of the host, which both sides share. Reads never go beyond the end of a parcel, so descriptors
//! belong to the one whose bytes they came with. A parcel that is half there when a deadline passes stays in the inbox.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt;
use wherry_socket::descriptors;

/// Most descriptors of one parcel; the kernel takes [`descriptors::MOST`] at once.
pub const MOST_DESCRIPTORS: usize = 250;
/// Most bytes of a body.
pub const MOST_BODY: usize = 64 << 20;

const MAGIC: [u8; 4] = *b"WHO1";
const HEADER: usize = 16;
/// So much of a body is made room for before any of it has come.
const FIRST_ROOM: usize = 1 << 20;

/// What goes over a channel in one piece.
#[derive(Debug)]
pub struct Parcel {
    /// What it is.
    pub tag: u16,
    /// Its content.
    pub body: Vec<u8>,
    /// What came with it.
    pub descriptors: Vec<OwnedFd>,
}

/// The channel is of no use, or nothing came.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The other side has closed it, or has ended.
    #[error("the other process has closed the channel")]
    Closed,
    /// Nothing whole came by the deadline.
    #[error("the other process did not {0} in time")]
    Deadline(&'static str),
    /// What came is no parcel.
    #[error("the other process broke the protocol: {0}")]
    Protocol(String),
    /// More than goes in one parcel.
    #[error(
        "a parcel of {bytes} bytes with {descriptors} descriptors; {MOST_BODY} and {MOST_DESCRIPTORS} are possible"
    )]
    TooMuch {
        /// Bytes of its body.
        bytes: usize,
        /// Its descriptors.
        descriptors: usize,
    },
    /// The kernel refused.
    #[error("{what} the channel: {source}")]
    Os {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

fn os(what: &'static str) -> impl Fn(Errno) -> ChannelError {
    move |source| match source {
        Errno::PIPE | Errno::CONNRESET => ChannelError::Closed,
        source => ChannelError::Os { what, source: source.into() },
    }
}

/// A parcel of which something has come.
#[derive(Default)]
struct Partial {
    header: [u8; HEADER],
    headed: usize,
    body: Vec<u8>,
    bodied: usize,
    descriptors: Vec<OwnedFd>,
}

impl Partial {
    fn word<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.header[at..at + N]);
        bytes
    }

    fn tag(&self) -> u16 {
        u16::from_ne_bytes(self.word(4))
    }

    fn announced(&self) -> usize {
        u16::from_ne_bytes(self.word(6)).into()
    }

    fn length(&self) -> usize {
        u32::from_ne_bytes(self.word(8)) as usize
    }

    fn check(&self) -> Result<(), ChannelError> {
        let broken = |what: String| Err(ChannelError::Protocol(what));
        if self.word(0) != MAGIC {
            return broken(format!("a parcel begins with {:?}", self.word::<4>(0)));
        }
        if self.length() > MOST_BODY {
            return broken(format!("a parcel of {} bytes", self.length()));
        }
        if self.announced() > MOST_DESCRIPTORS {
            return broken(format!("a parcel with {} descriptors", self.announced()));
        }
        if self.word(12) != [0; 4] {
            return broken("a parcel whose header does not end with zeros".into());
        }
        Ok(())
    }
}

/// One end of the socket between two processes. Used by one thread at a time.
pub struct Channel {
    stream: UnixStream,
    partial: Partial,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel").field("stream", &self.stream).finish_non_exhaustive()
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.stream.into()
    }
}

impl Channel {
    /// Both ends of a new one.
    pub fn pair() -> Result<(Self, Self), ChannelError> {
        let (one, other) = UnixStream::pair().map_err(|source| ChannelError::Os { what: "making", source })?;
        Ok((Self::new(one)?, Self::new(other)?))
    }

    /// An end that was given to this process. Fails for anything but a stream of the UNIX family.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, ChannelError> {
        let family = rustix::net::getsockname(&fd).map_err(os("looking at"))?.address_family();
        let kind = sockopt::socket_type(&fd).map_err(os("looking at"))?;
        if (family, kind) != (rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM) {
            return Err(ChannelError::Protocol("what was given as a channel is no UNIX stream".into()));
        }
        Self::new(UnixStream::from(fd))
    }

    /// On a connected socket.
    pub fn new(stream: UnixStream) -> Result<Self, ChannelError> {
        stream.set_nonblocking(true).map_err(|source| ChannelError::Os { what: "setting up", source })?;
        Ok(Self { stream, partial: Partial::default() })
    }

    /// Sends a parcel; the descriptors stay the caller's. A peer that takes nothing fails it at the deadline, and the channel is of
    /// no use after that.
    pub fn send(
        &self,
        tag: u16,
        body: &[u8],
        descriptors: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), ChannelError> {
        if body.len() > MOST_BODY || descriptors.len() > MOST_DESCRIPTORS {
            return Err(ChannelError::TooMuch { bytes: body.len(), descriptors: descriptors.len() });
        }
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&MAGIC);
        header[4..6].copy_from_slice(&tag.to_ne_bytes());
        header[6..8].copy_from_slice(&(descriptors.len() as u16).to_ne_bytes());
        header[8..12].copy_from_slice(&(body.len() as u32).to_ne_bytes());
        let (mut sent, all) = (0, HEADER + body.len());
        while sent < all {
            // They go with the first byte.
            let with = if sent == 0 { descriptors } else { &[] };
            let rest = [IoSlice::new(&header[sent.min(HEADER)..]), IoSlice::new(&body[sent.saturating_sub(HEADER)..])];
            match descriptors::send(&self.stream, &rest, with) {
                Ok(bytes) => sent += bytes,
                Err(Errno::AGAIN) => {
                    if !self.ready(PollFlags::OUT, deadline)? {
                        return Err(ChannelError::Deadline("take what was sent"));
                    }
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(os("sending on")(error)),
            }
        }
        Ok(())
    }

    /// The next parcel. With `spin` the thread does not sleep for so long, for answers that are short to come.
    pub fn receive(&mut self, deadline: Instant, spin: Duration) -> Result<Parcel, ChannelError> {
        let begun = Instant::now();
        loop {
            if let Some(parcel) = self.poll()? {
                return Ok(parcel);
            }
            if begun.elapsed() < spin && Instant::now() < deadline {
                // The other side may be on this very processor, and wait for it.
                std::thread::yield_now();
            } else if !self.ready(PollFlags::IN, deadline)? {
                return Err(ChannelError::Deadline("answer"));
            }
        }
    }

    /// The next parcel, if all of it is there.
    pub fn poll(&mut self) -> Result<Option<Parcel>, ChannelError> {
        loop {
            if self.partial.headed == HEADER {
                let whole = self.partial.length();
                if self.partial.bodied == whole {
                    return self.finish().map(Some);
                }
                let room = (self.partial.bodied * 2).clamp(FIRST_ROOM, MOST_BODY).min(whole);
                if self.partial.body.len() < room {
                    self.partial.body.resize(room, 0);
                }
            }
            if !self.read()? {
                return Ok(None);
            }
            if self.partial.headed == HEADER && self.partial.bodied == 0 {
                self.partial.check()?;
            }
        }
    }

    fn finish(&mut self) -> Result<Parcel, ChannelError> {
        let mut partial = std::mem::take(&mut self.partial);
        let (came, announced) = (partial.descriptors.len(), partial.announced());
        if came != announced {
            let what = format!("a parcel was to have {announced} descriptors, and {came} came");
            return Err(ChannelError::Protocol(what));
        }
        let tag = partial.tag();
        partial.body.truncate(partial.bodied);
        Ok(Parcel { tag, body: partial.body, descriptors: partial.descriptors })
    }

    /// Reads what is there of the parcel. False: nothing.
    fn read(&mut self) -> Result<bool, ChannelError> {
        let Partial { header, headed, body, bodied, descriptors } = &mut self.partial;
        let in_header = *headed < HEADER;
        let room = if in_header { &mut header[*headed..] } else { &mut body[*bodied..] };
        match descriptors::receive(&self.stream, room, descriptors) {
            Ok(came) => {
                if came.cut || descriptors.len() > MOST_DESCRIPTORS {
                    // The kernel also cuts them off when this process has no room for more.
                    let what = format!("more than {MOST_DESCRIPTORS} descriptors, or than this process may have open");
                    return Err(ChannelError::Protocol(what));
                }
                match came.bytes {
                    0 if *headed == 0 => Err(ChannelError::Closed),
                    0 => Err(ChannelError::Protocol("it closed the channel within a parcel".into())),
                    bytes => {
                        *if in_header { headed } else { bodied } += bytes;
                        Ok(true)
                    }
                }
            }
            Err(Errno::AGAIN) => Ok(false),
            Err(Errno::INTR) => Ok(true),
            Err(error) => Err(os("receiving on")(error)),
        }
    }

    /// Waits until the socket is ready. False: the deadline has passed.
    fn ready(&self, event: PollFlags, deadline: Instant) -> Result<bool, ChannelError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            match poll(&mut [PollFd::new(&self.stream, event)], Some(&timeout)) {
                Ok(0) if left.is_zero() => return Ok(false),
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(true),
                Err(error) => return Err(os("waiting for")(error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn event(count: u32) -> OwnedFd {
        eventfd(count, EventfdFlags::CLOEXEC).unwrap()
    }

    fn count(fd: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        rustix::io::read(fd, &mut bytes).unwrap();
        u64::from_ne_bytes(bytes)
    }

    #[test]
    fn parcels_come_as_they_were_sent_each_with_its_own_descriptors() {
        let (one, mut other) = Channel::pair().unwrap();
        let events: Vec<_> = (0..MOST_DESCRIPTORS as u32).map(|n| event(n + 1)).collect();
        let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
        let body: Vec<u8> = (0..3_000_000u32).map(|n| n as u8).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                one.send(1, b"a", &fds[..2], soon()).unwrap();
                one.send(2, &[], &fds, soon()).unwrap();
                one.send(3, &body, &fds[5..6], soon()).unwrap();
                one.send(4, b"end", &[], soon()).unwrap();
            });
            let first = other.receive(soon(), Duration::ZERO).unwrap();
            assert_eq!((first.tag, &first.body[..], first.descriptors.len()), (1, &b"a"[..], 2));
            let second = other.receive(soon(), Duration::from_millis(1)).unwrap();
            assert_eq!((second.tag, second.body.len()), (2, 0));
            assert_eq!(second.descriptors.len(), MOST_DESCRIPTORS);
            assert_eq!(count(&second.descriptors[249]), 250);
            let third = other.receive(soon(), Duration::ZERO).unwrap();
            assert!(third.tag == 3 && third.body == body);
            assert_eq!(count(&third.descriptors[0]), 6);
            assert_eq!(other.receive(soon(), Duration::ZERO).unwrap().body, b"end");
        });
        drop(one);
        assert!(matches!(other.receive(soon(), Duration::ZERO), Err(ChannelError::Closed)));
    }

    #[test]
    fn a_deadline_passes_and_what_was_half_there_is_gone_on_with() {
        let (one, mut other) = Channel::pair().unwrap();
        let mut whole = Vec::new();
        whole.extend(MAGIC);
        whole.extend(9u16.to_ne_bytes());
        whole.extend(0u16.to_ne_bytes());
        whole.extend(4u32.to_ne_bytes());
        whole.extend([0; 4]);
        whole.extend(b"body");
        let mut stream = one.stream.try_clone().unwrap();
        for part in [&whole[..7], &whole[7..18]] {
            stream.write_all(part).unwrap();
            let late = other.receive(Instant::now() + Duration::from_millis(5), Duration::ZERO);
            assert!(matches!(late, Err(ChannelError::Deadline(_))), "{late:?}");
        }
        stream.write_all(&whole[18..]).unwrap();
        assert_eq!(other.receive(soon(), Duration::ZERO).unwrap().body, b"body");
    }

    #[test]
    fn a_peer_that_takes_nothing_fails_a_send_at_its_deadline() {
        let (one, _other) = Channel::pair().unwrap();
        let late = one.send(1, &vec![0; 8 << 20], &[], Instant::now() + Duration::from_millis(20));
        assert!(matches!(late, Err(ChannelError::Deadline(_))), "{late:?}");
        let many = one.send(1, &vec![0; MOST_BODY + 1], &[], soon());
        assert!(matches!(many, Err(ChannelError::TooMuch { .. })));
    }

    #[test]
    fn what_is_no_parcel_is_named_and_so_is_an_end_within_one() {
        let header = |magic: &[u8; 4], fds: u16, length: u32, end: u32| {
            let mut bytes = magic.to_vec();
            bytes.extend(1u16.to_ne_bytes());
            bytes.extend(fds.to_ne_bytes());
            bytes.extend(length.to_ne_bytes());
            bytes.extend(end.to_ne_bytes());
            bytes
        };
        for (bytes, hint) in [
            (header(b"HTTP", 0, 0, 0), "begins with"),
            (header(&MAGIC, 251, 0, 0), "251 descriptors"),
            (header(&MAGIC, 0, MOST_BODY as u32 + 1, 0), "bytes"),
            (header(&MAGIC, 0, 0, 1), "end with zeros"),
            (header(&MAGIC, 2, 0, 0), "2 descriptors, and 0 came"),
            (header(&MAGIC, 0, 5, 0), "within a parcel"),
            (header(&MAGIC, 0, 0, 0)[..9].to_vec(), "within a parcel"),
        ] {
            let (one, mut other) = Channel::pair().unwrap();
            (&one.stream).write_all(&bytes).unwrap();
            drop(one);
            let error = other.receive(soon(), Duration::ZERO).unwrap_err().to_string();
            assert!(error.contains(hint), "{hint}: {error}");
        }
    }

    #[test]
    fn only_a_unix_stream_is_a_channel() {
        assert!(Channel::from_fd(event(0)).is_err());
        let datagrams = std::os::unix::net::UnixDatagram::unbound().unwrap();
        assert!(matches!(Channel::from_fd(datagrams.into()), Err(ChannelError::Protocol(_))));
        let (one, _other) = UnixStream::pair().unwrap();
        Channel::from_fd(one.into()).unwrap();
    }

    proptest! {
        #[test]
        fn any_bytes_are_parcels_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200), good in any::<bool>()) {
            let (one, mut other) = Channel::pair().unwrap();
            if good {
                (&one.stream).write_all(&MAGIC).unwrap();
            }
            (&one.stream).write_all(&bytes).unwrap();
            drop(one);
            while other.receive(soon(), Duration::ZERO).is_ok() {}
        }
    }
}
