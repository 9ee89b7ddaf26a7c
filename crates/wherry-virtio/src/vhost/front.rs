//! The front end's calls, one function for each, and what the back end said of itself. [`memory`] has those about guest memory.

mod memory;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use wherry_memory::Ram;

use self::memory::Region;
pub(super) use self::memory::ours;
use super::saved::SavedFront;
use super::wire::{Answer, Connection, Posted, Request, VhostError};

/// The protocol has features of its own.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// The back end logs what it writes.
pub(super) const LOG_ALL: u64 = 1 << 26;

/// Features of the protocol (bits).
pub(super) mod protocol {
    pub(in super::super) const MQ: u64 = 1 << 0;
    pub(in super::super) const LOG_SHMFD: u64 = 1 << 1;
    pub(in super::super) const RARP: u64 = 1 << 2;
    pub(in super::super) const REPLY_ACK: u64 = 1 << 3;
    pub(in super::super) const BACKEND_REQ: u64 = 1 << 5;
    pub(in super::super) const PAGEFAULT: u64 = 1 << 8;
    pub(in super::super) const CONFIG: u64 = 1 << 9;
    pub(in super::super) const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub(in super::super) const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub(in super::super) const DEVICE_STATE: u64 = 1 << 19;
    /// What is used here.
    pub(in super::super) const WANTED: u64 = MQ
        | LOG_SHMFD
        | RARP
        | REPLY_ACK
        | BACKEND_REQ
        | PAGEFAULT
        | CONFIG
        | INFLIGHT_SHMFD
        | CONFIGURE_MEM_SLOTS
        | DEVICE_STATE;
}

/// How long each message may take.
const LIMIT: Duration = Duration::from_secs(5);

/// Where one ring lies, in the addresses of the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct RingAddresses {
    pub(super) descriptors: u64,
    pub(super) used: u64,
    pub(super) available: u64,
    /// Guest address of the used ring, for the log.
    pub(super) used_guest: u64,
}

/// Bytes of a description of memory for requests under way.
const IN_FLIGHT: usize = 20;
/// Directions of a state.
const SAVE: u32 = 0;
const LOAD: u32 = 1;
/// Bytes that every pipe takes without a reader (pipe(7)), less than which are in it.
const PIPE: usize = 4096;
const NOT_TAKEN: &str = "it does not take the state of the device";
/// Most bytes of the state of a device.
const MOST_STATE: usize = 4 << 20;

/// Memory in which back ends note what is under way. It outlives them.
pub(super) struct InFlight {
    pub(super) fd: Arc<OwnedFd>,
    pub(super) described: Vec<u8>,
}

/// What a ring needs to be served.
pub(super) struct RingStart<'a> {
    pub(super) index: u16,
    pub(super) size: u16,
    /// Next entry of the available ring to take.
    pub(super) next: u16,
    pub(super) at: RingAddresses,
    /// What the back end signals, if anything.
    pub(super) call: Option<BorrowedFd<'a>>,
    pub(super) kick: BorrowedFd<'a>,
}

/// A back end, as it presents itself.
pub(super) struct Front {
    connection: Connection,
    /// What the device can do.
    features: u64,
    /// What was agreed on of the protocol.
    protocol: u64,
    /// Rings it can serve; 1 if it does not say.
    queues: u64,
    /// Regions it has room for, if they are shown to it one by one.
    room: u64,
    /// What it was shown one by one.
    shown: Vec<Region>,
    /// Where requests of its own come, until it makes no more.
    pub(super) channel: Option<Connection>,
}

impl Front {
    /// Connects, and agrees on the protocol. No memory is shown to it.
    pub(super) fn open(path: &Path) -> Result<Self, VhostError> {
        Self::over(Connection::open(path, LIMIT)?)
    }

    pub(super) fn over(connection: Connection) -> Result<Self, VhostError> {
        let mut this =
            Self { connection, features: 0, protocol: 0, queues: 1, room: 0, shown: Vec::new(), channel: None };
        this.features = this.read(Request::GetFeatures)?;
        if this.features & PROTOCOL_FEATURES != 0 {
            this.protocol = this.read(Request::GetProtocolFeatures)? & protocol::WANTED;
            let agreed = this.protocol.to_ne_bytes();
            this.connection.tell(Request::SetProtocolFeatures, &agreed, &[])?;
        }
        if this.has(protocol::MQ) {
            this.queues = this.read(Request::GetQueueNum)?;
        }
        if this.has(protocol::CONFIGURE_MEM_SLOTS) {
            this.room = this.read(Request::GetMaxMemSlots)?;
        }
        this.connection.tell(Request::SetOwner, &[], &[])?;
        if this.has(protocol::BACKEND_REQ) {
            let what = Request::SetBackendReqFd;
            let failed = |e: std::io::Error| this.connection.wrong(what, format!("making a socket: {e}"));
            let (ours, theirs) = UnixStream::pair().map_err(failed)?;
            let channel = Connection::over(ours, this.path(), this.limit()).map_err(failed)?;
            this.set(what, &[], &[theirs.as_fd()])?;
            this.channel = Some(channel);
        }
        Ok(this)
    }

    /// Goes on with the connection of another process, as it left it.
    pub(super) fn inherit(
        saved: &SavedFront,
        (connection, channel): (OwnedFd, Option<OwnedFd>),
        path: &Path,
        ram: &Ram,
    ) -> Result<Self, VhostError> {
        let over = |socket: OwnedFd| {
            let failed = |source| VhostError::Socket { path: path.into(), what: "taking it over".into(), source };
            Connection::over(socket.into(), path, LIMIT).map_err(failed)
        };
        Ok(Self {
            connection: over(connection)?,
            features: saved.features,
            protocol: saved.protocol & protocol::WANTED,
            queues: saved.queues,
            room: saved.room,
            shown: if saved.shown { memory::regions(ram) } else { Vec::new() },
            channel: channel.map(over).transpose()?,
        })
    }

    /// What another process has to know to go on with the connection.
    pub(super) fn save(&self) -> SavedFront {
        SavedFront {
            features: self.features,
            protocol: self.protocol,
            queues: self.queues,
            room: self.room,
            shown: !self.shown.is_empty(),
            channel: self.channel.is_some(),
        }
    }

    pub(super) fn path(&self) -> &Path {
        self.connection.path()
    }

    pub(super) fn limit(&self) -> Duration {
        self.connection.limit()
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Features of the device, without those of the protocol.
    pub(super) fn features(&self) -> u64 {
        self.features & !(PROTOCOL_FEATURES | LOG_ALL)
    }

    pub(super) fn queues(&self) -> u64 {
        self.queues
    }

    pub(super) fn has(&self, feature: u64) -> bool {
        self.protocol & feature == feature
    }

    /// Whether it tells what it writes.
    pub(super) fn logs(&self) -> bool {
        self.features & LOG_ALL != 0 && self.has(protocol::LOG_SHMFD)
    }

    fn read(&self, what: Request) -> Result<u64, VhostError> {
        self.connection.number(what, &self.connection.ask(what, &[], &[])?)
    }

    /// Has something done: with an answer if that was agreed on.
    fn set(&self, what: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), VhostError> {
        match self.has(protocol::REPLY_ACK) {
            true => self.connection.order(what, payload, fds),
            false => self.connection.tell(what, payload, fds),
        }
    }

    /// Reads the device's configuration, `bytes` of it.
    pub(super) fn config(&self, bytes: u32) -> Result<Vec<u8>, VhostError> {
        let what = Request::GetConfig;
        let answer = self.connection.ask(what, &config_payload(0, &vec![0; bytes as usize]), &[])?;
        if answer.payload.is_empty() {
            return Err(self.connection.wrong(what, "it has no configuration"));
        }
        let said = answer.payload.get(4..8).and_then(|size| size.try_into().ok()).map(u32::from_ne_bytes);
        match answer.payload.get(12..) {
            Some(content) if said == Some(bytes) && content.len() == bytes as usize => Ok(content.to_vec()),
            _ => {
                let got = answer.payload.len();
                Err(self.connection.wrong(what, format!("an answer of {got} bytes, where {} are due", bytes + 12)))
            }
        }
    }

    /// Writes part of the device's configuration, as a driver does.
    pub(super) fn set_config(&self, offset: u32, content: &[u8]) -> Result<(), VhostError> {
        self.set(Request::SetConfig, &config_payload(offset, content), &[])
    }

    /// Has a network device tell the network that the guest with this address is here now, if it can.
    pub(super) fn announce(&self, address: [u8; 6]) -> Result<(), VhostError> {
        let [a, b, c, d, e, f] = address;
        match self.has(protocol::RARP) {
            true => self.set(Request::SendRarp, &[a, b, c, d, e, f, 0, 0], &[]),
            false => Ok(()),
        }
    }

    /// What the driver has taken; with `log` the back end logs what it writes.
    pub(super) fn set_features(&self, accepted: u64, log: bool) -> Result<(), VhostError> {
        let protocol = self.features & PROTOCOL_FEATURES;
        let features = accepted | protocol | if log { LOG_ALL } else { 0 };
        self.set(Request::SetFeatures, &features.to_ne_bytes(), &[])
    }

    /// Begins postcopy: the back end's userfaultfd.
    pub(super) fn advise(&self) -> Result<OwnedFd, VhostError> {
        let what = Request::PostcopyAdvise;
        let mut answer = self.connection.ask(what, &[], &[])?;
        match (answer.descriptors.pop(), answer.descriptors.len()) {
            (Some(fd), 0) => Ok(fd),
            (_, more) => Err(self.connection.wrong(what, format!("{more} descriptors beside one that is due"))),
        }
    }

    /// What follows is to be registered with its userfaultfd.
    pub(super) fn listen(&self) -> Result<(), VhostError> {
        self.set(Request::PostcopyListen, &[], &[])
    }

    /// Its faults are served from now on: it may register its memory, and touch it.
    pub(super) fn acknowledge(&self) -> Result<(), VhostError> {
        self.connection.tell(Request::SetMemTable, &0u64.to_ne_bytes(), &[])
    }

    /// Ends postcopy: all memory is there.
    pub(super) fn end(&self) -> Result<(), VhostError> {
        self.set(Request::PostcopyEnd, &[], &[])
    }

    /// Where it is to log what it writes: a bit for each 4 KiB of guest addresses.
    pub(super) fn set_log(&self, log: BorrowedFd<'_>, bytes: u64) -> Result<(), VhostError> {
        let mut payload = bytes.to_ne_bytes().to_vec();
        payload.extend(0u64.to_ne_bytes());
        // Its answer has been read in many forms; that there is one says that it was done.
        self.connection.ask(Request::SetLogBase, &payload, &[log]).map(drop)
    }

    /// Memory in which the back end notes what is under way, for so many rings: we keep it, and give it to the next one.
    pub(super) fn make_in_flight(&self, rings: u16, size: u16) -> Result<InFlight, VhostError> {
        let what = Request::GetInflightFd;
        let mut wanted = [0; IN_FLIGHT];
        wanted[16..18].copy_from_slice(&rings.to_ne_bytes());
        wanted[18..20].copy_from_slice(&size.to_ne_bytes());
        let mut answer = self.connection.ask(what, &wanted, &[])?;
        // Some describe it with padding behind.
        match (answer.payload.get(..IN_FLIGHT), answer.descriptors.pop(), answer.descriptors.len()) {
            (Some(described), Some(fd), 0) => Ok(InFlight { fd: Arc::new(fd), described: described.to_vec() }),
            (described, _, more) => {
                let got = described.map_or(answer.payload.len(), <[u8]>::len);
                let reason = format!("an answer of {got} bytes, and {more} descriptors beside one that is due");
                Err(self.connection.wrong(what, reason))
            }
        }
    }

    /// What is under way is noted there, and may have been before.
    pub(super) fn set_in_flight(&self, kept: &InFlight) -> Result<(), VhostError> {
        self.set(Request::SetInflightFd, &kept.described, &[kept.fd.as_fd()])
    }

    /// The state of the device, which is at rest.
    pub(super) fn device_state(&self) -> Result<Vec<u8>, VhostError> {
        let (reader, writer) = self.pipe()?;
        self.state(SAVE, writer.as_fd())?;
        drop(writer);
        let state = read_all(&reader, self.limit()).map_err(|e| {
            let reason = format!("reading the state of its device: {e}");
            self.connection.wrong(Request::SetDeviceStateFd, reason)
        })?;
        self.check_state("it could not save its device")?;
        Ok(state)
    }

    /// Gives it the state of such a device, before any ring is started.
    pub(super) fn load(&self, state: &[u8]) -> Result<(), VhostError> {
        let (reader, writer) = self.pipe()?;
        let failed = |e: std::io::Error| {
            self.connection.wrong(Request::SetDeviceStateFd, format!("writing the state of its device: {e}"))
        };
        if state.len() > PIPE {
            self.state(LOAD, reader.as_fd())?;
            drop(reader);
            write_all(&writer, state, self.limit()).map_err(failed)?;
            drop(writer);
            return self.check_state(NOT_TAKEN);
        }
        // It fits in the pipe: the back end finds all of it there, and we wait for it once instead of twice.
        write_all(&writer, state, self.limit()).map_err(failed)?;
        drop(writer);
        let check = Posted { what: Request::CheckDeviceState, payload: Vec::new(), fd: None };
        let answers = self.connection.ask_all(&[state_message(LOAD, reader.as_fd()), check])?;
        match &answers[..] {
            [ours, checked] => {
                self.uses_our_pipe(ours)?;
                self.checked(self.connection.number(Request::CheckDeviceState, checked)?, NOT_TAKEN)
            }
            _ => Err(self.connection.wrong(Request::CheckDeviceState, "an answer is missing")),
        }
    }

    fn pipe(&self) -> Result<(OwnedFd, OwnedFd), VhostError> {
        let flags = PipeFlags::CLOEXEC | PipeFlags::NONBLOCK;
        rustix::pipe::pipe_with(flags)
            .map_err(|e| self.connection.lacks(format!("a pipe for the state of its device: {e}")))
    }

    fn state(&self, direction: u32, fd: BorrowedFd<'_>) -> Result<(), VhostError> {
        let message = state_message(direction, fd);
        self.uses_our_pipe(&self.connection.ask(message.what, &message.payload, &[fd])?)
    }

    fn uses_our_pipe(&self, answer: &Answer) -> Result<(), VhostError> {
        let what = Request::SetDeviceStateFd;
        match (self.connection.number(what, answer)?, answer.descriptors.len()) {
            (number, 0) if number & 0x1ff == 0x100 => Ok(()),
            (number, 0) if number & 0xff != 0 => {
                Err(self.connection.wrong(what, format!("it refused, with {number:#x}")))
            }
            (number, fds) => {
                Err(self.connection.wrong(what, format!("{number:#x} and {fds} descriptors, instead of our pipe")))
            }
        }
    }

    fn check_state(&self, otherwise: &str) -> Result<(), VhostError> {
        self.checked(self.read(Request::CheckDeviceState)?, otherwise)
    }

    fn checked(&self, code: u64, otherwise: &str) -> Result<(), VhostError> {
        match code {
            0 => Ok(()),
            code => Err(self.connection.wrong(Request::CheckDeviceState, format!("{otherwise}: {code:#x}"))),
        }
    }

    /// Has it serve rings: what they are, what is signalled, and last of each the doorbell, since from then on requests end.
    pub(super) fn start(&self, rings: &[RingStart<'_>], log: bool) -> Result<(), VhostError> {
        let mut messages = Vec::with_capacity(6 * rings.len());
        let mut post = |what, payload: Vec<u8>, fd| messages.push(Posted { what, payload, fd });
        for ring in rings {
            let number = u64::from(ring.index).to_ne_bytes().to_vec();
            post(Request::SetVringNum, pair(ring.index, ring.size.into()).to_vec(), None);
            post(Request::SetVringBase, pair(ring.index, ring.next.into()).to_vec(), None);
            post(Request::SetVringAddr, addresses_payload(ring.index, &ring.at, log), None);
            if ring.call.is_some() {
                post(Request::SetVringCall, number.clone(), ring.call);
            }
            post(Request::SetVringKick, number, Some(ring.kick));
            // Without features of the protocol, rings are enabled as they start.
            if self.features & PROTOCOL_FEATURES != 0 {
                post(Request::SetVringEnable, pair(ring.index, 1).to_vec(), None);
            }
        }
        self.set_all(&messages)
    }

    /// Has many things done, as [`set`](Self::set) does one.
    fn set_all(&self, messages: &[Posted<'_>]) -> Result<(), VhostError> {
        match self.has(protocol::REPLY_ACK) {
            true => self.connection.order_all(messages),
            false => messages.iter().try_for_each(|message| {
                let fds: Vec<BorrowedFd<'_>> = message.fd.into_iter().collect();
                self.connection.tell(message.what, &message.payload, &fds)
            }),
        }
    }

    pub(super) fn set_addresses(&self, ring: u16, at: &RingAddresses, log: bool) -> Result<(), VhostError> {
        self.set(Request::SetVringAddr, &addresses_payload(ring, at, log), &[])
    }

    pub(super) fn set_kick(&self, ring: u16, event: BorrowedFd<'_>) -> Result<(), VhostError> {
        self.set(Request::SetVringKick, &u64::from(ring).to_ne_bytes(), &[event])
    }

    pub(super) fn set_call(&self, ring: u16, event: BorrowedFd<'_>) -> Result<(), VhostError> {
        self.set(Request::SetVringCall, &u64::from(ring).to_ne_bytes(), &[event])
    }

    /// Without features of the protocol, rings are enabled as they start.
    pub(super) fn enable(&self, ring: u16, on: bool) -> Result<(), VhostError> {
        match self.features & PROTOCOL_FEATURES {
            0 => Ok(()),
            _ => self.set(Request::SetVringEnable, &pair(ring, on.into()), &[]),
        }
    }

    /// Stops rings: of each the next entry of its available ring that would have been taken.
    pub(super) fn stop(&self, rings: &[u16]) -> Result<Vec<u16>, VhostError> {
        let what = Request::GetVringBase;
        let post = |ring: &u16| Posted { what, payload: pair(*ring, 0).to_vec(), fd: None };
        let answers = self.connection.ask_all(&rings.iter().map(post).collect::<Vec<_>>())?;
        rings.iter().zip(&answers).map(|(ring, answer)| self.base(*ring, answer)).collect()
    }

    fn base(&self, ring: u16, answer: &Answer) -> Result<u16, VhostError> {
        let what = Request::GetVringBase;
        // The pair (ring, base); both halves in the order of this host.
        let bytes = self.connection.number(what, answer)?.to_ne_bytes();
        let half = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        match (half(0) == u32::from(ring), u16::try_from(half(4))) {
            (true, Ok(base)) => Ok(base),
            _ => Err(self.connection.wrong(what, format!("ring {} at {}, asked about ring {ring}", half(0), half(4)))),
        }
    }
}

impl AsFd for Front {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

/// Every request but that for a state, whose end has to be waited for, in the order of a device's life, until one fails.
pub(super) fn ask_everything(connection: Connection, ram: &Ram, log: BorrowedFd<'_>) -> Result<(), VhostError> {
    let mut front = Front::over(connection)?;
    front.config(60)?;
    front.set_features(1 << 32, true)?;
    front.set_memory(ram)?;
    front.give_up_slots()?;
    front.set_memory(ram)?;
    front.set_log(log, 4096)?;
    let start = ours(ram.blocks().first().map_or(0, |block| block.spec().guest_base));
    let at = RingAddresses { descriptors: start, used: start, available: start, used_guest: 0 };
    front.start(&[RingStart { index: 0, size: 64, next: 7, at, call: Some(log), kick: log }], true)?;
    front.set_addresses(0, &at, true)?;
    front.set_kick(0, log)?;
    front.enable(0, true)?;
    front.set_config(32, &[1])?;
    front.announce([2; 6])?;
    front.stop(&[0])?;
    let kept = front.make_in_flight(1, 64)?;
    front.set_in_flight(&kept)?;
    front.load(&[1])?;
    front.advise()?;
    front.listen()?;
    front.set_missing_memory(ram)?;
    front.acknowledge()?;
    front.end()
}

/// Reads a pipe to its end.
fn read_all(pipe: &OwnedFd, limit: Duration) -> std::io::Result<Vec<u8>> {
    let deadline = Instant::now() + limit;
    let mut all = Vec::new();
    loop {
        let mut piece = [0; 4096];
        match rustix::io::read(pipe, &mut piece) {
            Ok(0) => return Ok(all),
            Ok(_) if all.len() > MOST_STATE => {
                return Err(std::io::Error::other(format!("more than {MOST_STATE} bytes")));
            }
            Ok(got) => all.extend_from_slice(&piece[..got]),
            Err(Errno::AGAIN) => ready(pipe, PollFlags::IN, deadline)?,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn write_all(pipe: &OwnedFd, mut bytes: &[u8], limit: Duration) -> std::io::Result<()> {
    let deadline = Instant::now() + limit;
    while !bytes.is_empty() {
        match rustix::io::write(pipe, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::AGAIN) => ready(pipe, PollFlags::OUT, deadline)?,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn ready(pipe: &OwnedFd, event: PollFlags, deadline: Instant) -> std::io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(std::io::ErrorKind::TimedOut.into());
    }
    let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
    match poll(&mut [PollFd::new(pipe, event)], Some(&left)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The request for a state, in the only phase there is: stopped.
fn state_message(direction: u32, fd: BorrowedFd<'_>) -> Posted<'_> {
    let mut payload = direction.to_ne_bytes().to_vec();
    payload.extend(0u32.to_ne_bytes());
    Posted { what: Request::SetDeviceStateFd, payload, fd: Some(fd) }
}

fn addresses_payload(ring: u16, at: &RingAddresses, log: bool) -> Vec<u8> {
    let mut payload = pair(ring, log.into()).to_vec();
    for address in [at.descriptors, at.used, at.available, at.used_guest] {
        payload.extend(address.to_ne_bytes());
    }
    payload
}

fn pair(ring: u16, value: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&u32::from(ring).to_ne_bytes());
    bytes[4..].copy_from_slice(&value.to_ne_bytes());
    bytes
}

/// Offset, length, flags (0: as a driver writes), and the content.
fn config_payload(offset: u32, content: &[u8]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(12 + content.len());
    for word in [offset, content.len() as u32, 0] {
        payload.extend(word.to_ne_bytes());
    }
    payload.extend(content);
    payload
}
