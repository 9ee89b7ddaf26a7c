//! A client written from the specification, with nothing of the crate in it: bytes in, bytes out.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

/// Anything takes less; what does not come by then does not come.
pub const LIMIT: Duration = Duration::from_secs(10);
pub const EBUSY: u32 = 16;
pub const ENOSYS: u32 = 38;
pub const EINVAL: u32 = 22;
pub const EEXIST: u32 = 17;
pub const ENOTTY: u32 = 25;

pub struct Raw(pub UnixStream);

#[derive(Debug)]
pub struct Reply {
    pub id: u16,
    pub command: u16,
    pub flags: u32,
    pub error: u32,
    pub payload: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Reply {
    pub fn word(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.payload[at..at + 4].try_into().unwrap())
    }

    pub fn long(&self, at: usize) -> u64 {
        u64::from_ne_bytes(self.payload[at..at + 8].try_into().unwrap())
    }
}

pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

pub fn message(id: u16, command: u16, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = [id.to_ne_bytes(), command.to_ne_bytes()].concat();
    bytes.extend(words(&[16 + payload.len() as u32, flags, 0]));
    bytes.extend(payload);
    bytes
}

impl Raw {
    /// A connection without a version.
    pub fn stranger(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        Self(stream)
    }

    /// A connection that has agreed on version 0.1, with those capabilities (JSON).
    pub fn connect(path: &Path, capabilities: &str) -> (Self, Reply) {
        let this = Self::stranger(path);
        let reply = this.ask(1, &version(0, 1, capabilities)).unwrap();
        (this, reply)
    }

    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent = rustix::net::sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
        (&self.0).write_all(&bytes[sent..]).unwrap();
    }

    pub fn receive(&self) -> std::io::Result<Reply> {
        let mut header = [0; 16];
        let mut fds = Vec::new();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut header)];
        let got = rustix::net::recvmsg(&self.0, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes;
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(some) = part {
                fds.extend(some);
            }
        }
        if got == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        (&self.0).read_exact(&mut header[got..])?;
        let half = |at: usize| u16::from_ne_bytes(header[at..at + 2].try_into().unwrap());
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; word(4) as usize - 16];
        (&self.0).read_exact(&mut payload)?;
        Ok(Reply { id: half(0), command: half(2), flags: word(8), error: word(12), payload, fds })
    }

    /// Asks, and gives the reply, or the error number.
    pub fn ask_with(&self, command: u16, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Reply, u32> {
        let id = 0x5000 ^ command;
        self.send(&message(id, command, 0, payload), fds);
        let reply = self.receive().unwrap_or_else(|error| panic!("the reply to command {command}: {error}"));
        assert_eq!((reply.id, reply.command, reply.flags & 0xf), (id, command, 1), "{reply:?}");
        match reply.flags & 0x20 {
            0 => Ok(reply),
            _ => {
                assert!(reply.payload.is_empty(), "an error has only a header: {reply:?}");
                Err(reply.error)
            }
        }
    }

    pub fn ask(&self, command: u16, payload: &[u8]) -> Result<Reply, u32> {
        self.ask_with(command, payload, &[])
    }

    pub fn read(&self, region: u32, offset: u64, count: u32) -> Result<Vec<u8>, u32> {
        let reply = self.ask(9, &[longs(&[offset]), words(&[region, count])].concat())?;
        assert_eq!((reply.long(0), reply.word(8), reply.word(12)), (offset, region, count));
        assert_eq!(reply.payload.len(), 16 + count as usize);
        Ok(reply.payload[16..].to_vec())
    }

    pub fn write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), u32> {
        let head = [longs(&[offset]), words(&[region, data.len() as u32])].concat();
        let reply = self.ask(10, &[head.clone(), data.to_vec()].concat())?;
        assert_eq!(reply.payload, head);
        Ok(())
    }

    pub fn map(&self, address: u64, size: u64, flags: u32, fd: Option<(BorrowedFd<'_>, u64)>) -> Result<(), u32> {
        let offset = fd.map_or(0, |(_, offset)| offset);
        let fds: Vec<_> = fd.iter().map(|(fd, _)| *fd).collect();
        let reply = self.ask_with(2, &[words(&[32, flags]), longs(&[offset, address, size])].concat(), &fds)?;
        assert!(reply.payload.is_empty());
        Ok(())
    }

    pub fn unmap(&self, address: u64, size: u64) -> Result<(), u32> {
        let payload = [words(&[24, 0]), longs(&[address, size])].concat();
        let reply = self.ask(3, &payload)?;
        assert_eq!(reply.payload, payload, "the reply is the entry");
        Ok(())
    }

    pub fn irqs(
        &self,
        flags: u32,
        index: u32,
        start: u32,
        count: u32,
        data: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), u32> {
        let head = words(&[20 + data.len() as u32, flags, index, start, count]);
        let reply = self.ask_with(8, &[head, data.to_vec()].concat(), fds)?;
        assert!(reply.payload.is_empty());
        Ok(())
    }

    pub fn feature(&self, flags: u32, data: &[u8], room: u32) -> Result<Reply, u32> {
        self.ask(16, &[words(&[8 + room, flags]), data.to_vec()].concat())
    }

    pub fn state(&self) -> u32 {
        let reply = self.feature(1 << 16 | 2, &[], 8).unwrap();
        assert_eq!(reply.payload.len(), 16);
        reply.word(8)
    }

    pub fn go(&self, state: u32) -> Result<(), u32> {
        let reply = self.feature(1 << 17 | 2, &words(&[state, u32::MAX]), 8)?;
        assert_eq!((reply.word(4), reply.word(8)), (1 << 17 | 2, state));
        Ok(())
    }

    pub fn read_data(&self, size: u32) -> Result<Vec<u8>, u32> {
        let reply = self.ask(17, &words(&[8 + size, size]))?;
        let said = reply.word(4) as usize;
        assert_eq!(reply.payload.len(), 8 + said);
        assert_eq!(reply.word(0) as usize, reply.payload.len());
        assert!(said <= size as usize, "it is not longer than asked for");
        Ok(reply.payload[8..].to_vec())
    }

    pub fn write_data(&self, data: &[u8]) -> Result<(), u32> {
        let len = data.len() as u32;
        self.ask(18, &[words(&[8 + len, len]), data.to_vec()].concat()).map(|_| ())
    }

    /// Its whole state, in `STOP_COPY`.
    pub fn all_data(&self) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let some = self.read_data(100).unwrap();
            all.extend(&some);
            if some.len() < 100 {
                return all;
            }
        }
    }
}

pub fn version(major: u16, minor: u16, json: &str) -> Vec<u8> {
    let mut bytes = [major.to_ne_bytes(), minor.to_ne_bytes()].concat();
    bytes.extend(json.as_bytes());
    bytes.push(0);
    bytes
}

/// How often an eventfd was signalled, since it was last asked.
pub fn signals(event: impl AsFd) -> u64 {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    if poll(&mut [PollFd::new(&event, PollFlags::IN)], Some(&now)).unwrap() == 0 {
        return 0;
    }
    let mut count = [0; 8];
    rustix::io::read(&event, &mut count).unwrap();
    u64::from_ne_bytes(count)
}
