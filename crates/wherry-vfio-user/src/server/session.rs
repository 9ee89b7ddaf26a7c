//! One client: what is done with each of its messages. Whatever it sends gets a reply, if it wants one, with a result or an error
//! number; only what makes it impossible to find the next message ends the session.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use rustix::io::Errno;

use super::bus::Way;
use super::device::Device;
use super::dma::Log;
use super::kept::Served;
use super::{Host, Moment, State, Verdict};
use crate::capabilities::{Capabilities, Extensions, MAJOR, MINOR, TwinSocket, Version};
use crate::error::VfioUserError;
use crate::link::{Incoming, Link};
use crate::message::{Command, Header, MOST_PAYLOAD, Message, flags};
use crate::payload::{
    DmaMap, DmaUnmap, Feature, Fields, IoFd, IrqSet, LoggingReport, LoggingStart, Malformed, Out, RegionAccess,
    RegionInfo, Words, WriteMulti, device_flags, feature, region_flags,
};
use crate::states::Ways;

/// A reply: its payload, and what goes beside it.
#[derive(Default)]
struct Reply {
    payload: Vec<u8>,
    descriptors: Vec<Arc<OwnedFd>>,
}

impl From<Vec<u8>> for Reply {
    fn from(payload: Vec<u8>) -> Self {
        Self { payload, descriptors: Vec::new() }
    }
}

impl From<Malformed> for Refusal {
    fn from(malformed: Malformed) -> Self {
        Self(Errno::INVAL, malformed.0)
    }
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self(errno, String::new())
    }
}

/// Why a command is refused: what the client is told, and what the log says.
struct Refusal(Errno, String);

fn refuse<T>(why: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal(Errno::INVAL, why.into()))
}

struct Session<'a> {
    host: &'a mut Host,
    device: &'a mut dyn Device,
    link: Arc<Link>,
    client: Capabilities,
    /// What both know of our extensions.
    extensions: Extensions,
}

/// Serves a client until it is lost: one that comes, or one that is known from the process before.
pub(super) fn run(
    host: &mut Host,
    link: Arc<Link>,
    known: Option<(Capabilities, Extensions)>,
    device: &mut dyn Device,
) -> Result<(), VfioUserError> {
    let greeted = known.is_some();
    let (client, extensions) = known.unwrap_or_default();
    let mut session = Session { host, device, link, client, extensions };
    let result = match greeted {
        true => {
            session.link.go_on();
            session.host.bus.go_on();
            Ok(())
        }
        false => session.greet(),
    };
    let result = result.and_then(|()| session.serve());
    if let Some(header) = session.link.broken() {
        let _ = answer(&session.link, &header, Err(Errno::INVAL));
    }
    result
}

fn answer(link: &Link, to: &Header, reply: Result<Reply, Errno>) -> Result<(), VfioUserError> {
    if to.flags & flags::NO_REPLY != 0 {
        return Ok(());
    }
    let mut header = Header { flags: flags::REPLY, ..*to };
    match reply {
        Ok(reply) => {
            header.error = 0;
            let fds: Vec<BorrowedFd<'_>> = reply.descriptors.iter().map(|fd| fd.as_fd()).collect();
            link.send(header, &reply.payload, &fds)
        }
        Err(errno) => {
            header.flags |= flags::ERROR;
            header.error = errno.raw_os_error() as u32;
            link.send(header, &[], &[])
        }
    }
}

impl Session<'_> {
    /// The first message: versions and capabilities. Anything else is refused, and it must come in time: others wait.
    fn greet(&mut self) -> Result<(), VfioUserError> {
        let deadline = Instant::now() + self.host.limit;
        loop {
            let incoming = match self.link.command(Some(deadline))? {
                Some(incoming) => incoming,
                None => {
                    let (peer, what) = (self.link.peer().to_owned(), "the wait for its version".to_owned());
                    return Err(VfioUserError::Deadline { peer, what, limit: self.host.limit });
                }
            };
            let (header, payload) = match &incoming {
                Incoming::Command(message) => (message.header, &message.payload[..]),
                Incoming::Oversized(header) => (*header, &[][..]),
            };
            if header.command != Command::Version as u16 || header.flags & flags::TYPE != flags::COMMAND {
                answer(&self.link, &header, Err(Errno::INVAL))?;
                continue;
            }
            let version = match Version::decode(payload) {
                Ok(version) if version.major == MAJOR => version,
                Ok(Version { major, minor, .. }) => {
                    answer(&self.link, &header, Err(Errno::INVAL))?;
                    return Err(self.link.wrong("Version", format!("it speaks {major}.{minor}, we {MAJOR}.{MINOR}")));
                }
                Err(error) => {
                    answer(&self.link, &header, Err(Errno::INVAL))?;
                    return Err(self.link.wrong("Version", error.to_string()));
                }
            };
            self.watch(Command::Version, Moment::Before)?;
            return self.agree(&header, version);
        }
    }

    /// What we can do of what the client proposes; of capabilities it does not name, nothing is said.
    fn agree(&mut self, header: &Header, proposed: Version) -> Result<(), VfioUserError> {
        let (theirs, ours) = (proposed.capabilities, self.host.capabilities.clone());
        let mut agreed = Capabilities {
            max_msg_fds: theirs.max_msg_fds.and(ours.max_msg_fds),
            max_data_xfer_size: theirs.max_data_xfer_size.and(ours.max_data_xfer_size),
            max_dma_maps: theirs.max_dma_maps.and(ours.max_dma_maps),
            pgsizes: theirs.pgsizes.and(ours.pgsizes),
            twin_socket: None,
            write_multiple: theirs.write_multiple.map(|wanted| wanted && ours.write_multiple == Some(true)),
            wherry: theirs.wherry.map(|wanted| wanted.and(ours.extensions())),
        };
        self.extensions = agreed.extensions();
        let mut way = self.link.clone();
        let mut descriptors = Vec::new();
        if theirs.twin() && ours.twin() {
            let twin = UnixStream::pair().and_then(|(our_end, their_end)| {
                Ok((Link::new(our_end, self.link.peer(), self.host.limit, false)?, their_end))
            });
            // Without one, everything goes over this socket.
            if let Ok((link, their_end)) = twin {
                way = Arc::new(link);
                descriptors.push(Arc::new(OwnedFd::from(their_end)));
                agreed.twin_socket = Some(TwinSocket { supported: true, fd_index: Some(0) });
            }
        }
        let transfer = theirs.transfer().min(way.piece());
        let way = Way { link: way, transfer, limit: self.host.limit };
        self.client = theirs;
        // Before the reply: a client may be asked from then on.
        self.host.bus.connect(Some(way));
        let version = Version { major: MAJOR, minor: MINOR.min(proposed.minor), capabilities: agreed };
        self.watch(Command::Version, Moment::After)?;
        answer(&self.link, header, Ok(Reply { payload: version.encode(), descriptors }))
    }

    /// Shows a command to whoever watches, who may want the connection closed.
    fn watch(&mut self, command: Command, moment: Moment) -> Result<(), VfioUserError> {
        match self.host.watcher.as_mut().map(|watcher| watcher(command, moment)) {
            Some(Verdict::HangUp) => {
                Err(VfioUserError::Closed { peer: self.link.peer().into(), what: format!("{command:?}, by a watcher") })
            }
            _ => Ok(()),
        }
    }

    fn serve(&mut self) -> Result<(), VfioUserError> {
        loop {
            let rest = self.host.rest();
            match self.link.command_unless(|| rest.is_wanted())? {
                None => {
                    let served = Served { link: &self.link, client: &self.client, extensions: self.extensions };
                    self.host.rest_with(self.device, served);
                }
                Some(Incoming::Oversized(header)) => {
                    tracing::debug!("{} of {} bytes is refused", header.name(), header.size);
                    answer(&self.link, &header, Err(Errno::INVAL))?;
                }
                Some(Incoming::Command(message)) => {
                    let header = message.header;
                    let command = Command::try_from(header.command).ok();
                    command.map_or(Ok(()), |command| self.watch(command, Moment::Before))?;
                    let reply = self.handle(message).map_err(|Refusal(errno, why)| {
                        tracing::debug!("{} is refused: {errno} {why}", header.name());
                        errno
                    });
                    self.host.note_obstacle();
                    command.map_or(Ok(()), |command| self.watch(command, Moment::After))?;
                    answer(&self.link, &header, reply)?;
                }
            }
        }
    }

    fn handle(&mut self, message: Message) -> Result<Reply, Refusal> {
        let Message { header, payload, descriptors } = message;
        if header.flags & flags::TYPE != flags::COMMAND {
            return refuse(format!("a message with flags {:#x}", header.flags));
        }
        let command = Command::try_from(header.command).map_err(|_| Errno::NOSYS)?;
        match command {
            Command::Version => refuse("a second time"),
            Command::DmaMap => self.map(&payload, descriptors),
            Command::DmaUnmap => {
                let unmap = DmaUnmap::decode(&payload)?;
                self.host.bus.change_maps(|maps| maps.remove(&unmap))?;
                Ok(unmap.encode().into())
            }
            Command::GetInfo => self.info(&payload),
            Command::GetRegionInfo => self.region_info(&payload),
            Command::GetRegionIoFds => self.region_io_fds(&payload),
            Command::GetIrqInfo => self.irq_info(&payload),
            Command::SetIrqs => {
                let (set, data) = IrqSet::decode(&payload)?;
                self.host.bus.irqs().set(&set, data, descriptors)?;
                Ok(Reply::default())
            }
            Command::RegionRead => self.region_read(&payload),
            Command::RegionWrite => self.region_write(&payload),
            Command::RegionWriteMulti => self.region_write_multi(&payload),
            Command::Reset => self.reset(&payload),
            Command::Feature => self.feature(&payload),
            Command::MigDataRead => self.data_read(&payload),
            Command::MigDataWrite => self.data_write(&payload),
            Command::Userfaultfd => self.userfaultfd(&payload),
            Command::DmaRead | Command::DmaWrite => Err(Refusal(Errno::NOSYS, "it is the server's to ask".into())),
        }
    }

    fn map(&mut self, payload: &[u8], descriptors: Vec<OwnedFd>) -> Result<Reply, Refusal> {
        let map = DmaMap::decode(payload)?;
        let most = self.host.capabilities.maps();
        let Host { bus, userfaults, faulting, .. } = &mut *self.host;
        bus.change_maps(|maps| {
            maps.add(&map, descriptors, most)?;
            let Some(userfaults) = userfaults.as_mut().filter(|_| *faulting) else { return Ok(Reply::default()) };
            // Before anything of it is touched; who maps it and where is for the client to know.
            let (address, bytes) = match maps.here(map.address) {
                Some((address, bytes)) => (address, bytes),
                None => {
                    let _ = maps.remove(&DmaUnmap { address: map.address, size: map.size });
                    return refuse("memory that is not all there, and no file that can be mapped");
                }
            };
            match userfaults.register(address, bytes) {
                Ok(()) => Ok(Out::default().u64(address).0.into()),
                Err(error) => {
                    let _ = maps.remove(&DmaUnmap { address: map.address, size: map.size });
                    refuse(format!("registering {bytes:#x} bytes for missing pages: {error}"))
                }
            }
        })
    }

    /// Our extension: the client serves the faults of what it maps from now on, or all of it is there.
    fn userfaultfd(&mut self, payload: &[u8]) -> Result<Reply, Refusal> {
        let mut fields = Fields(payload);
        let begin = fields.u32()?;
        fields.end()?;
        if !self.extensions.userfaultfd {
            return Err(Refusal(Errno::NOSYS, "it was not agreed on".into()));
        }
        match begin {
            0 => {
                self.host.end_faults();
                Ok(Reply::default())
            }
            1 if self.host.faulting => refuse("its faults are served already"),
            1 if !self.host.bus.maps_are_empty() => Err(Refusal(Errno::BUSY, "there are maps already".into())),
            1 => {
                let userfaults = self.host.userfaults.as_mut().ok_or(Errno::NOSYS)?;
                let fd = userfaults.open().map_err(|error| {
                    let errno = error.raw_os_error().map_or(Errno::PERM, Errno::from_raw_os_error);
                    Refusal(errno, format!("making a userfaultfd: {error}"))
                })?;
                self.host.faulting = true;
                Ok(Reply { payload: Vec::new(), descriptors: vec![Arc::new(fd)] })
            }
            other => refuse(format!("action {other}")),
        }
    }

    fn info(&self, payload: &[u8]) -> Result<Reply, Refusal> {
        Self::asked(payload)?;
        let description = &self.host.description;
        let reset = if description.resettable { device_flags::RESET } else { 0 };
        let (third, fourth) = (description.regions.len() as u32, description.irqs.len() as u32);
        Ok(Words { argsz: Words::SIZE as u32, flags: reset | device_flags::PCI, third, fourth }.encode().into())
    }

    /// A question of four words.
    fn asked(payload: &[u8]) -> Result<Words, Refusal> {
        let words = Words::decode(payload)?;
        match words.argsz as usize >= Words::SIZE {
            true => Ok(words),
            false => refuse(format!("a reply of {} bytes is wanted", words.argsz)),
        }
    }

    fn region_info(&self, payload: &[u8]) -> Result<Reply, Refusal> {
        let asked = Self::asked(payload)?;
        if payload.len() != RegionInfo::SIZE || (asked.argsz as usize) < RegionInfo::SIZE {
            return refuse(format!("{} bytes, and {} are wanted", payload.len(), asked.argsz));
        }
        let Some(region) = self.host.description.regions.get(asked.third as usize) else {
            return refuse(format!("region {}", asked.third));
        };
        let mut info = RegionInfo { flags: region.flags, index: asked.third, size: region.size, ..Default::default() };
        let mut descriptors = Vec::new();
        if let Some(shared) = &region.shared {
            info.flags |= region_flags::MMAP;
            info.offset = shared.offset;
            info.sparse.clone_from(&shared.areas);
            descriptors.push(shared.file.clone());
        }
        let mut payload = info.encode();
        if payload.len() > asked.argsz as usize {
            // Its first word says how much is needed; the capabilities are not there.
            payload.truncate(RegionInfo::SIZE);
            payload[12..16].fill(0);
            descriptors.clear();
        }
        Ok(Reply { payload, descriptors })
    }

    fn region_io_fds(&self, payload: &[u8]) -> Result<Reply, Refusal> {
        let asked = Self::asked(payload)?;
        if payload.len() != Words::SIZE || asked.flags != 0 {
            return refuse(format!("{} bytes, flags {:#x}", payload.len(), asked.flags));
        }
        let Some(region) = self.host.description.regions.get(asked.third as usize) else {
            return refuse(format!("region {}", asked.third));
        };
        if region.descriptors.len() > self.client.descriptors() {
            return Err(Refusal(Errno::NOSPC, format!("{} descriptors", region.descriptors.len())));
        }
        let mut payload = IoFd::encode_all(asked.third, &region.io_fds);
        let mut descriptors = region.descriptors.clone();
        if payload.len() > asked.argsz as usize {
            payload.truncate(Words::SIZE);
            descriptors.clear();
        }
        Ok(Reply { payload, descriptors })
    }

    fn irq_info(&self, payload: &[u8]) -> Result<Reply, Refusal> {
        let asked = Self::asked(payload)?;
        let Some(irq) = self.host.description.irqs.get(asked.third as usize).filter(|_| payload.len() == Words::SIZE)
        else {
            return refuse(format!("interrupt {} in {} bytes", asked.third, payload.len()));
        };
        let argsz = Words::SIZE as u32;
        Ok(Words { argsz, flags: irq.flags, third: asked.third, fourth: irq.count }.encode().into())
    }

    fn check(&self, access: &RegionAccess, flag: u32) -> Result<(), Refusal> {
        let region = self.host.description.regions.get(access.region as usize);
        let inside = |size: u64| access.offset.checked_add(access.count.into()).is_some_and(|end| end <= size);
        match region {
            Some(region) if region.flags & flag != 0 && inside(region.size) => {}
            _ => return refuse(format!("{access:x?}")),
        }
        if access.count as usize > self.host.capabilities.transfer() || access.count == 0 {
            return refuse(format!("an access of {} bytes", access.count));
        }
        // What is being read must stay as it is, and what is being written is not there yet.
        if flag == region_flags::WRITE && matches!(self.host.state, State::StopCopy | State::Resuming) {
            return refuse(format!("a write in {:?}", self.host.state));
        }
        Ok(())
    }

    fn region_read(&mut self, payload: &[u8]) -> Result<Reply, Refusal> {
        let (access, rest) = RegionAccess::decode(payload)?;
        if !rest.is_empty() {
            return refuse(format!("{} bytes too many", rest.len()));
        }
        self.check(&access, region_flags::READ)?;
        let mut reply = access.encode(&vec![0; access.count as usize]);
        let data = &mut reply[RegionAccess::SIZE..];
        self.device.read(&self.host.bus, access.region, access.offset, data)?;
        Ok(reply.into())
    }

    fn region_write(&mut self, payload: &[u8]) -> Result<Reply, Refusal> {
        let (access, data) = RegionAccess::decode(payload)?;
        if data.len() != access.count as usize {
            return refuse(format!("{} bytes of data, where {} are due", data.len(), access.count));
        }
        self.check(&access, region_flags::WRITE)?;
        self.device.write(&self.host.bus, access.region, access.offset, data)?;
        Ok(access.encode(&[]).into())
    }

    /// All are checked before the first is done. One that the device refuses is the last; the reply says how many were done.
    fn region_write_multi(&mut self, payload: &[u8]) -> Result<Reply, Refusal> {
        let writes = WriteMulti::decode(payload)?;
        for (access, _) in &writes {
            self.check(access, region_flags::WRITE)?;
        }
        let mut done: u64 = 0;
        for (access, data) in &writes {
            let data = &data[..access.count as usize];
            match self.device.write(&self.host.bus, access.region, access.offset, data) {
                Ok(()) => done += 1,
                Err(errno) if done == 0 => return Err(errno.into()),
                Err(_) => break,
            }
        }
        Ok(Out::default().u64(done).0.into())
    }

    fn reset(&mut self, payload: &[u8]) -> Result<Reply, Refusal> {
        if !payload.is_empty() || !self.host.description.resettable {
            return refuse(format!("a reset with {} bytes", payload.len()));
        }
        self.device.reset(&self.host.bus)?;
        self.host.bus.irqs().reset();
        self.host.state = State::Running;
        Ok(Reply::default())
    }

    fn ways(&self) -> Ways {
        let description = &self.host.description;
        // A client without the extension finds a way out of a state where one with it was lost.
        let p2p = self.extensions.p2p || self.host.state.is_p2p();
        Ways { pre_copy: description.pre_copy, p2p: description.p2p && p2p }
    }

    fn feature(&mut self, payload: &[u8]) -> Result<Reply, Refusal> {
        let (asked, data) = Feature::decode(payload)?;
        let (index, method) = (asked.flags as u16, asked.flags & !0xffff);
        let description = &self.host.description;
        let methods = match index {
            feature::MIGRATION if description.migration => feature::GET,
            feature::DEVICE_STATE if description.migration => feature::GET | feature::SET,
            feature::DATA_SIZE if description.migration && self.extensions.estimates => feature::GET,
            feature::LOGGING_START | feature::LOGGING_STOP if description.logging => feature::SET,
            feature::LOGGING_REPORT if description.logging => feature::GET,
            _ => return Err(Refusal(Errno::NOTTY, format!("feature {index}"))),
        };
        let wanted = method & !feature::PROBE;
        if wanted & !(feature::GET | feature::SET) != 0 || (asked.argsz as usize) < Feature::SIZE {
            return refuse(format!("{asked:x?}"));
        }
        if wanted & !methods != 0 {
            return Err(Refusal(Errno::NOTTY, format!("feature {index}, flags {method:#x}")));
        }
        if method & feature::PROBE != 0 {
            return Ok(payload.to_vec().into());
        }
        if wanted.count_ones() != 1 {
            return refuse(format!("feature {index}, flags {method:#x}"));
        }
        let data = match (index, wanted) {
            (feature::LOGGING_REPORT, _) => return self.report(&asked, data),
            (_, feature::GET) => self.get(index)?,
            _ => self.set(index, data)?,
        };
        let argsz = (Feature::SIZE + data.len()) as u32;
        let reply = Feature { argsz, flags: asked.flags };
        Ok(reply.encode(if argsz <= asked.argsz { &data } else { &[] }).into())
    }

    fn get(&mut self, index: u16) -> Result<Vec<u8>, Refusal> {
        Ok(match index {
            feature::MIGRATION => {
                let ways = Ways { p2p: self.extensions.p2p, ..self.ways() };
                let more = [(ways.pre_copy, feature::PRE_COPY), (ways.p2p, feature::P2P)];
                let flags = more.iter().filter(|(on, _)| *on).fold(feature::STOP_COPY, |all, (_, flag)| all | flag);
                Out::default().u64(flags).0
            }
            feature::DEVICE_STATE => Out::default().u32(self.host.state as u32).u32(u32::MAX).0,
            _ => {
                let migration = self.device.migration().ok_or(Errno::NOTTY)?;
                Out::default().u64(migration.estimate(&self.host.bus)).0
            }
        })
    }

    /// Sets a feature; gives the data of the reply.
    fn set(&mut self, index: u16, data: &[u8]) -> Result<Vec<u8>, Refusal> {
        match index {
            feature::DEVICE_STATE => {
                let state = match data {
                    [a, b, c, d, _, _, _, _] => u32::from_ne_bytes([*a, *b, *c, *d]),
                    _ => return refuse(format!("a state of {} bytes", data.len())),
                };
                self.go_to(state)?;
                Ok(data.to_vec())
            }
            feature::LOGGING_START => {
                let mut start = LoggingStart::decode(data)?;
                let mut log = self.host.bus.log();
                if log.is_some() {
                    return refuse("it is logging already");
                }
                let new = Log::new(&start)?;
                start.page_size = new.page();
                *log = Some(new);
                Ok(start.encode())
            }
            _ => {
                *self.host.bus.log() = None;
                Ok(data.to_vec())
            }
        }
    }

    /// A log is only forgotten as it is told: not for a reply that has no room for it.
    fn report(&mut self, asked: &Feature, data: &[u8]) -> Result<Reply, Refusal> {
        let (report, rest) = LoggingReport::decode(data)?;
        let words = report.words()?;
        let argsz = words.saturating_mul(8).saturating_add(Feature::SIZE + LoggingReport::SIZE);
        if !rest.is_empty() || argsz > MOST_PAYLOAD {
            return refuse(format!("{report:x?}: a reply of {argsz} bytes, {} bytes too many", rest.len()));
        }
        let head = Feature { argsz: argsz as u32, flags: asked.flags };
        let mut log = self.host.bus.log();
        let Some(log) = &mut *log else { return refuse("nothing is logged") };
        if argsz > asked.argsz as usize {
            return Ok(head.encode(&[]).into());
        }
        let bitmap = log.take(&report)?;
        let out = bitmap.iter().fold(Out(report.encode()), |out, word| out.u64(*word));
        Ok(head.encode(&out.0).into())
    }

    /// Goes to a state, arc by arc. Where one fails it stays; but out of `RESUMING` with data that is not good, it is lost.
    fn go_to(&mut self, number: u32) -> Result<(), Refusal> {
        let from = self.host.state;
        let path = State::from_number(number).and_then(|state| self.ways().path(from, state));
        let Some(path) = path else { return refuse(format!("no way from {from:?} to {number}")) };
        for (from, to) in path {
            let migration = self.device.migration().ok_or(Errno::NOTTY)?;
            match migration.arc(&self.host.bus, from, to) {
                Ok(()) => self.host.state = to,
                Err(errno) => {
                    if from == State::Resuming {
                        self.host.state = State::Error;
                    }
                    return Err(Refusal(errno, format!("from {from:?} to {to:?}")));
                }
            }
        }
        Ok(())
    }

    fn data_read(&mut self, payload: &[u8]) -> Result<Reply, Refusal> {
        let (head, rest) = Feature::decode(payload)?;
        let (argsz, size) = (head.argsz as usize, head.flags as usize);
        if !rest.is_empty() || argsz < Feature::SIZE || size > self.host.capabilities.transfer() {
            return refuse(format!("{size} bytes of state, {argsz} in the reply"));
        }
        if !self.host.state.is_saving() {
            return refuse(format!("state is not read in {:?}", self.host.state));
        }
        let size = size.min(argsz - Feature::SIZE);
        let mut reply = vec![0; Feature::SIZE + size];
        let migration = self.device.migration().ok_or(Errno::NOTTY)?;
        let count = migration.save(&self.host.bus, &mut reply[Feature::SIZE..])?.min(size);
        reply.truncate(Feature::SIZE + count);
        let words = Out::default().u32(reply.len() as u32).u32(count as u32);
        reply[..Feature::SIZE].copy_from_slice(&words.0);
        Ok(reply.into())
    }

    fn data_write(&mut self, payload: &[u8]) -> Result<Reply, Refusal> {
        let (head, data) = Feature::decode(payload)?;
        if data.len() != head.flags as usize || data.len() > self.host.capabilities.transfer() {
            return refuse(format!("{} bytes of state, where {} are due", data.len(), head.flags));
        }
        if self.host.state != State::Resuming {
            return refuse(format!("state is not written in {:?}", self.host.state));
        }
        self.device.migration().ok_or(Errno::NOTTY)?.load(&self.host.bus, data)?;
        Ok(Reply::default())
    }
}
