//! What the device's thread does with bytes: between the rings and the other end, through what is held.
//!
//! The thread waits for one descriptor, an epoll set: a listening socket, and whatever bytes go to and come from, for what
//! is of interest at the moment.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

use super::outside::{End, Outside};
use super::{Held, RECEIVE, Shared, TRANSMIT};
use crate::chain::Broken;
use crate::ring::Ring;
use crate::worker::Handler;

/// Input that is read at a time.
const CHUNK: usize = 4096;
/// Most input that waits: what a client has sent before it leaves, or before the guest moves.
pub(super) const MOST_INPUT: usize = 64 << 10;
/// Most output that waits.
pub(super) const MOST_OUTPUT: usize = 256 << 10;
/// Buffers of the guest that are taken in one go, so that orders do not wait for long.
const TURN: usize = 64;
/// How long the end waits for the outside to take what is left.
const FLUSH: Duration = Duration::from_secs(1);

/// What is in the epoll set.
const LISTENER: u64 = 0;
const STREAM: u64 = 1;

/// The device's side of its rings.
pub(super) struct Bytes {
    outside: Arc<Outside>,
    shared: Arc<Shared>,
    epoll: OwnedFd,
    client: Option<Arc<UnixStream>>,
    /// There is more to read, as far as is known.
    sends: bool,
    /// Output is lost: the file takes no more.
    gone: bool,
    /// What the epoll set waits for at the stream; none if it is not in there.
    armed: Option<epoll::EventFlags>,
    /// There is a ring for what the guest receives.
    receives: bool,
    /// Input waits for buffers.
    dry: bool,
    /// Output waits for the outside, in the guest's buffers.
    full: bool,
    /// Bytes of output that nobody wanted.
    dropped: u64,
}

impl Bytes {
    pub(super) fn new(outside: Arc<Outside>, shared: Arc<Shared>) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        if let End::Socket(listener, _) = &outside.end {
            epoll::add(&epoll, &**listener, epoll::EventData::new_u64(LISTENER), epoll::EventFlags::IN)?;
        }
        let client = outside.take_client();
        let sends = matches!(outside.end, End::Pty { .. }) || client.is_some();
        Ok(Self {
            outside,
            shared,
            epoll,
            client,
            sends,
            gone: false,
            armed: None,
            receives: false,
            dry: false,
            full: false,
            dropped: 0,
        })
    }

    /// What bytes go to and come from, if there is something.
    fn stream(&self) -> Option<BorrowedFd<'_>> {
        match &self.outside.end {
            End::Socket(..) => self.client.as_deref().map(AsFd::as_fd),
            End::Pty { master, .. } => Some(master.as_fd()),
            End::File(file) => (!self.gone).then(|| file.as_fd()),
        }
    }

    /// Whether there is somebody for whom output waits in the guest. Nobody can tell whether a terminal is being read.
    fn is_heard(&self) -> bool {
        self.stream().is_some() && !matches!(self.outside.end, End::Pty { .. })
    }

    /// Follows what has happened outside: clients come and go.
    fn look(&mut self) {
        let mut events = Vec::with_capacity(4);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&now)).is_err() {
            return;
        }
        // In this order: the end is that of the client there was, not of one that comes.
        let over = epoll::EventFlags::HUP | epoll::EventFlags::ERR;
        if events.iter().any(|event| event.data.u64() == STREAM && { event.flags }.intersects(over)) {
            self.part();
        }
        if events.iter().any(|event| event.data.u64() == LISTENER) {
            self.accept();
        }
    }

    fn accept(&mut self) {
        let End::Socket(listener, _) = &self.outside.end else { return };
        if let Ok((stream, _)) = listener.accept()
            && stream.set_nonblocking(true).is_ok()
        {
            // The newest wins: one that hangs cannot keep others out.
            self.part();
            match self.outside.admit(stream) {
                Ok(stream) => (self.client, self.sends) = (Some(stream), true),
                Err(error) => tracing::error!(%error, "taking in a client of a console"),
            }
        }
    }

    /// Lets the client of a socket go, after reading what it had still sent. What it has not taken is for the next one.
    fn part(&mut self) {
        if self.client.is_none() {
            return;
        }
        let shared = self.shared.clone();
        self.read(&mut shared.lock().input, MOST_INPUT);
        (self.client, self.sends, self.armed) = (None, false, None);
    }

    /// Reads until there is nothing more to read, or so much waits.
    fn read(&mut self, input: &mut VecDeque<u8>, most: usize) {
        let mut buffer = [0; CHUNK];
        while self.sends && input.len() < most {
            let Some(stream) = self.stream() else { return };
            let room = (most - input.len()).min(CHUNK);
            match rustix::io::read(stream, &mut buffer[..room]) {
                Ok(0) => self.sends = false,
                Ok(len) => input.extend(&buffer[..len]),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => self.sends = false,
            }
        }
    }

    /// Writes until nothing is left, or the outside takes no more.
    fn write(&mut self, output: &mut VecDeque<u8>) {
        while !output.is_empty() {
            let Some(stream) = self.stream() else { return };
            match rustix::io::write(stream, output.as_slices().0) {
                Ok(written) => drop(output.drain(..written)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(error) => return self.lost(error),
            }
        }
    }

    /// Writing has failed.
    fn lost(&mut self, error: Errno) {
        match &self.outside.end {
            // What it has sent before is read when its end is seen.
            End::Socket(..) => {}
            End::Pty { .. } => tracing::warn!(%error, "console at {}: writing", self.outside.path().display()),
            End::File(_) => {
                tracing::error!(%error, "console at {}: its output is lost from here on", self.outside.path().display());
                (self.gone, self.armed) = (true, None);
            }
        }
    }

    /// Takes output of the guest.
    fn transmit(&mut self, ring: &mut Ring, held: &mut Held) -> Result<(), Broken> {
        let heard = self.is_heard();
        for _ in 0..TURN {
            if heard && held.output.len() >= MOST_OUTPUT {
                break;
            }
            let Some(chain) = ring.pop()? else { break };
            if !chain.writable.is_empty() {
                return Err(Broken::Request("a buffer to write where a console reads"));
            }
            let mut rest = chain.readable;
            rest.take_front(held.begun);
            let left = rest.len();
            let room = if heard { MOST_OUTPUT - held.output.len() } else { MOST_OUTPUT };
            let mut taken = vec![0; room.min(left as usize)];
            let len = rest.read(ring.memory(), &mut taken);
            held.output.extend(&taken[..len]);
            let over = held.output.len().saturating_sub(MOST_OUTPUT);
            if over > 0 {
                self.drop_oldest(held, over);
            }
            if len < left as usize {
                // The rest is taken when there is room.
                held.begun += len as u32;
                ring.unpop();
            } else {
                held.begun = 0;
                ring.push(chain.head, 0)?;
            }
        }
        Ok(())
    }

    fn drop_oldest(&mut self, held: &mut Held, bytes: usize) {
        if self.dropped == 0 {
            let path = self.outside.path().display();
            tracing::info!("console at {path}: nobody reads it; the last {MOST_OUTPUT} bytes are kept");
        }
        held.output.drain(..bytes);
        self.dropped += bytes as u64;
    }

    /// Gives input to the guest; what it has no buffers for waits.
    fn receive(&mut self, ring: &mut Ring, held: &mut Held) -> Result<(), Broken> {
        if held.input.is_empty() {
            self.read(&mut held.input, CHUNK);
        }
        while !held.input.is_empty() {
            let Some(chain) = ring.pop()? else { break };
            if chain.writable.is_empty() {
                return Err(Broken::Request("a buffer for input without room"));
            }
            let written = chain.writable.write(ring.memory(), held.input.make_contiguous());
            held.input.drain(..written);
            ring.push(chain.head, written as u32)?;
        }
        Ok(())
    }

    /// Has the thread wait for what is of interest now.
    fn arm(&mut self, held: &Held) {
        self.dry = self.receives && !held.input.is_empty();
        self.full = self.is_heard() && held.output.len() >= MOST_OUTPUT;
        let mut flags = epoll::EventFlags::empty();
        flags.set(epoll::EventFlags::IN, self.receives && self.sends && held.input.is_empty());
        flags.set(epoll::EventFlags::OUT, !held.output.is_empty());
        // A file is of interest only when it takes no more.
        let idle = self.armed.is_none() && flags.is_empty() && matches!(self.outside.end, End::File(_));
        if self.armed == Some(flags) || idle {
            return;
        }
        let Some(stream) = self.stream() else { return };
        let data = epoll::EventData::new_u64(STREAM);
        let done = match self.armed {
            Some(_) => epoll::modify(&self.epoll, stream, data, flags),
            None => epoll::add(&self.epoll, stream, data, flags),
        };
        // Regular files cannot be waited for, and need not: they take everything.
        if done.is_ok() || matches!(self.outside.end, End::File(_)) {
            self.armed = done.is_ok().then_some(flags);
        } else {
            tracing::error!("console at {}: it cannot be waited for", self.outside.path().display());
        }
    }
}

impl Handler for Bytes {
    fn begin(&mut self, rings: &mut [Ring], _features: u64) -> Result<(), Broken> {
        self.receives = rings.iter().any(|ring| ring.index() == RECEIVE);
        (self.dry, self.full) = (false, false);
        Ok(())
    }

    fn serve(&mut self, rings: &mut [Ring]) -> Result<(), Broken> {
        let shared = self.shared.clone();
        let mut held = shared.lock();
        for ring in rings {
            match ring.index() {
                RECEIVE => self.receive(ring, &mut held)?,
                TRANSMIT => {
                    self.transmit(ring, &mut held)?;
                    self.write(&mut held.output);
                }
                _ => {}
            }
        }
        self.arm(&held);
        Ok(())
    }

    fn reap(&mut self, _rings: &mut [Ring]) -> Result<(), Broken> {
        if self.shared.given.load(Ordering::Acquire) {
            // What moved on from here on would be lost, or there twice.
            return Ok(());
        }
        self.look();
        let shared = self.shared.clone();
        let mut held = shared.lock();
        self.write(&mut held.output);
        self.arm(&held);
        Ok(())
    }

    fn waits(&self, ring: u16) -> bool {
        match ring {
            RECEIVE => self.dry,
            _ => !self.full,
        }
    }

    fn has_room(&self) -> bool {
        true
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn event(&self) -> Option<RawFd> {
        Some(self.epoll.as_raw_fd())
    }

    fn cancel(&mut self) {}

    /// What a client has sent by now moves with the guest.
    fn settle(&mut self) -> io::Result<()> {
        let shared = self.shared.clone();
        self.read(&mut shared.lock().input, MOST_INPUT);
        Ok(())
    }

    /// What waits is of no ring: it stays.
    fn forget(&mut self) {
        self.shared.lock().begun = 0;
        (self.receives, self.dry, self.full) = (false, false, false);
    }
}

impl Drop for Bytes {
    /// The last words of a guest are often the ones that matter. Those of one that went elsewhere went with it.
    fn drop(&mut self) {
        let shared = self.shared.clone();
        let mut held = shared.lock();
        let deadline = Instant::now() + FLUSH;
        while !self.shared.given.load(Ordering::Acquire) && !held.output.is_empty() && self.is_heard() {
            let before = held.output.len();
            self.write(&mut held.output);
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(stream) = self.stream().filter(|_| !left.is_zero()) else { return };
            if held.output.len() == before {
                let mut fds = [rustix::event::PollFd::from_borrowed_fd(stream, rustix::event::PollFlags::OUT)];
                let timeout = Timespec { tv_sec: 0, tv_nsec: left.subsec_nanos().max(1_000_000).into() };
                let _ = rustix::event::poll(&mut fds, Some(&timeout));
                if !fds[0].revents().contains(rustix::event::PollFlags::OUT) {
                    return;
                }
            }
        }
    }
}
