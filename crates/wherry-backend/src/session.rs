//! What the requests of one front end do.
//!
//! Every request has one function or one line here. [`Session::obey`] runs them and answers: what a request has to say, or, if
//! the front end wants to know, whether it was done.

use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use crate::BackendError;
use crate::channel::Channel;
use crate::device::{Device, Driver, RingGiven};
use crate::faults::Postcopy;
use crate::features::{LOG_ALL, PROTOCOL_FEATURES, VERSION_1, protocol};
use crate::inflight::Parts;
use crate::log::DirtyLog;
use crate::memory::{MOST_SLOTS, Place, Regions};
use crate::payload::{configuration, in_flight, known, pair, slot, table, words};
use crate::state::{receive, send};
use crate::wire::{Connection, Event, Message, Read, Request};

/// Between two looks whether the device has come to rest.
const LOOK: Duration = Duration::from_secs(1);
/// In the answer to a request for a state: no other descriptor is meant.
const NO_DESCRIPTOR: u64 = 1 << 8;
/// In a message about a doorbell: the ring in the low byte, and that there is no eventfd.
const RING: u64 = 0xff;
const NO_EVENT: u64 = 1 << 8;

/// What a request has to say.
enum Answer {
    /// Nothing but whether it was done.
    Done,
    Says(Vec<u8>),
    SaysWith(Vec<u8>, OwnedFd),
}

/// One ring as the front end has set it up.
#[derive(Default)]
pub(crate) struct Ring {
    pub(crate) size: u16,
    pub(crate) next: u16,
    /// Descriptors, used, available: addresses of the front end.
    pub(crate) addresses: Option<[u64; 3]>,
    pub(crate) kick: Option<Arc<EventFd>>,
    /// It has been rung: a ring is served from the first time on.
    pub(crate) rung: bool,
    pub(crate) enabled: bool,
}

/// What one front end has set.
pub(crate) struct Session<'a> {
    pub(crate) connection: Connection<'a>,
    pub(crate) device: &'a dyn Device,
    pub(crate) features: u64,
    pub(crate) protocol: u64,
    pub(crate) regions: Regions,
    pub(crate) log: Arc<DirtyLog>,
    pub(crate) rings: Vec<Ring>,
    pub(crate) driver: Arc<Driver>,
    pub(crate) in_flight: Option<Parts>,
    pub(crate) postcopy: Option<Postcopy>,
    /// Where a state comes from.
    pub(crate) state: Option<OwnedFd>,
    /// Where the front end hears requests of ours.
    pub(crate) channel: Option<Channel>,
    /// The device serves rings.
    pub(crate) serves: bool,
    /// Rings were served in the process before, and are to be served on.
    pub(crate) served_before: bool,
}

impl<'a> Session<'a> {
    pub(crate) fn new(connection: Connection<'a>, device: &'a dyn Device) -> Self {
        let (rings, _) = device.rings();
        Self {
            connection,
            device,
            features: 0,
            protocol: 0,
            regions: Regions::default(),
            log: Arc::default(),
            rings: (0..rings).map(|_| Ring::default()).collect(),
            driver: Arc::new(Driver::new(rings)),
            in_flight: None,
            postcopy: None,
            state: None,
            channel: None,
            serves: false,
            served_before: false,
        }
    }

    /// Until the front end goes, or the process is to end.
    pub(crate) fn run(&mut self) -> Result<(), BackendError> {
        let before = std::mem::take(&mut self.served_before);
        let mut result = self.serve_on(before);
        while result.is_ok() {
            result = match self.step() {
                Ok(true) => Ok(()),
                Ok(false) => break,
                Err(error) => Err(error),
            }
        }
        // Its memory goes after this.
        if self.serves && self.is_listening() {
            // Nobody will bring what is missing. It must not be read as zeros, which might be written to a disk.
            self.try_rest().map_err(BackendError::Abandoned)?;
        }
        self.rest();
        self.device.release();
        result
    }

    /// Waits for a message, or for the first ring of a bell. False: there is nothing more to wait for.
    fn step(&mut self) -> Result<bool, BackendError> {
        if let Some(rest) = self.connection.called() {
            return self.rest_for(rest).map(|()| true);
        }
        let silent = |ring: &&mut Ring| !ring.rung && (ring.enabled || self.features & PROTOCOL_FEATURES == 0);
        let mut silent: Vec<_> = self.rings.iter_mut().filter(silent).collect();
        let bells: Vec<_> = silent.iter().map(|ring| ring.kick.clone()).collect();
        match self.connection.wait(&bells, self.device.changed())? {
            Event::Called => Ok(true),
            Event::Changed => {
                if let Some(channel) = self.channel.as_ref().filter(|_| self.has(protocol::CONFIG)) {
                    channel.config_changed();
                }
                Ok(true)
            }
            Event::Rung(bells) => {
                bells.into_iter().for_each(|bell| silent[bell].rung = true);
                self.again().map_err(|reason| BackendError::Refused { request: "a ring".into(), reason })?;
                Ok(true)
            }
            Event::Message => match self.connection.read()? {
                Read::Message(message) => {
                    let obeyed = self.obey(message).map(|()| true);
                    self.connection.note_obstacle(self.obstacle());
                    obeyed
                }
                Read::Called => Ok(true),
                Read::Over => Ok(false),
            },
        }
    }

    fn obey(&mut self, message: Message) -> Result<(), BackendError> {
        let (number, needs_reply) = (message.number, message.needs_reply && self.has(protocol::REPLY_ACK));
        let (name, result) = match Request::of(number) {
            Some(request) => (format!("{request:?}"), self.request(request, message)),
            None => (format!("request {number}"), Err("there is no such request".into())),
        };
        match result {
            Ok(Answer::Done) if needs_reply => self.connection.reply(number, &0u64.to_ne_bytes(), &[]),
            Ok(Answer::Done) => Ok(()),
            Ok(Answer::Says(payload)) => self.connection.reply(number, &payload, &[]),
            Ok(Answer::SaysWith(payload, fd)) => self.connection.reply(number, &payload, &[fd.as_fd()]),
            Err(reason) if needs_reply => {
                tracing::warn!(device = self.device.name(), request = name, reason, "a front end is refused");
                self.connection.reply(number, &1u64.to_ne_bytes(), &[])
            }
            Err(reason) => Err(BackendError::Refused { request: name, reason }),
        }
    }

    fn has(&self, feature: u64) -> bool {
        self.protocol & feature != 0
    }

    pub(crate) fn offered(&self) -> u64 {
        self.device.features() | VERSION_1 | PROTOCOL_FEATURES | LOG_ALL
    }

    fn request(&mut self, request: Request, mut message: Message) -> Result<Answer, String> {
        match request {
            Request::GetFeatures => return Ok(says(self.offered())),
            Request::GetProtocolFeatures => return Ok(says(protocol::ALL)),
            Request::GetQueueNum => return Ok(says(self.rings.len() as u64)),
            Request::GetMaxMemSlots => return Ok(says(MOST_SLOTS as u64)),
            Request::SetProtocolFeatures => {
                let [features] = message.words()?;
                self.protocol = known(features, protocol::ALL)?;
            }
            Request::SetFeatures => self.set_features(&message)?,
            // One front end at a time is served anyway; and taking the ownership away is given up by the document.
            Request::SetOwner | Request::ResetOwner => {}
            // Who reads the log does so when it likes.
            Request::SetLogFd => {}
            Request::SetLogBase => {
                let [bytes, offset] = message.words()?;
                self.log.set(message.descriptor()?, bytes, offset)?;
                if let Some(region) = self.regions.iter().map(|region| region.described).max_by_key(|r| r.guest)
                    && !self.log.covers(region.guest + region.size)
                {
                    return Err(format!("the log ends before memory does, at {:#x}", region.guest + region.size));
                }
                return Ok(says(0));
            }
            Request::SetMemTable => return self.set_table(message),
            Request::AddMemReg => return self.add_region(message),
            Request::RemMemReg => {
                let (described, _) = slot(&message)?;
                self.rest();
                let removed = self.regions.remove(described);
                self.serve()?;
                removed?;
            }
            Request::SetVringNum => {
                let (ring, size) = message.pair()?;
                let (_, most) = self.device.rings();
                let fits = u16::try_from(size).ok().filter(|size| size.is_power_of_two() && *size <= most);
                let size = fits.ok_or_else(|| format!("a ring of {size} entries; at most {most} are possible"))?;
                self.stopped(ring)?.size = size;
            }
            Request::SetVringBase => {
                let (ring, next) = message.pair()?;
                let next = u16::try_from(next).map_err(|_| format!("an index of {next:#x}"))?;
                self.stopped(ring)?.next = next;
            }
            Request::SetVringAddr => self.set_addresses(&message)?,
            Request::GetVringBase => {
                let (ring, _) = message.pair()?;
                return self.stop(ring);
            }
            Request::SetVringKick => self.set_kick(message)?,
            Request::SetVringCall => {
                let (ring, event) = self.event(message)?;
                self.driver.set_call(ring, event);
            }
            Request::SetVringErr => {
                let (ring, event) = self.event(message)?;
                self.driver.set_error(ring, event);
            }
            Request::SetVringEnable => {
                let (ring, on) = message.pair()?;
                let enabled = &mut self.ring(ring)?.enabled;
                if std::mem::replace(enabled, on == 1) != (on == 1) {
                    self.again()?;
                }
            }
            Request::SendRarp => {
                let [address] = message.words()?;
                let [a, b, c, d, e, f, _, _] = address.to_ne_bytes();
                self.device.announce([a, b, c, d, e, f])?;
            }
            Request::SetBackendReqFd => self.channel = Some(Channel::adopt(message.descriptor()?)?),
            Request::GetConfig => return self.config(&message),
            Request::SetConfig => {
                let (offset, content) = configuration(&message)?;
                self.device.write_config(offset, content)?;
            }
            Request::PostcopyAdvise => {
                let (postcopy, fd) = Postcopy::begin()?;
                self.postcopy = Some(postcopy);
                return Ok(Answer::SaysWith(Vec::new(), fd));
            }
            Request::PostcopyListen => match &mut self.postcopy {
                Some(postcopy) => postcopy.listen(&self.regions)?,
                None => return Err("it comes after PostcopyAdvise".into()),
            },
            Request::PostcopyEnd => {
                // What is locked still will not be missed.
                self.unlock()?;
                if let Some(postcopy) = self.postcopy.take() {
                    postcopy.end(&self.regions)?;
                }
                return Ok(says(0));
            }
            Request::GetInflightFd => return self.make_in_flight(&message),
            Request::SetInflightFd => {
                let (bytes, offset, rings, entries) = in_flight(&message)?;
                self.in_flight = Some(Parts::adopt(message.descriptor()?, bytes, offset, rings, entries)?);
            }
            Request::ResetDevice => {
                self.rest();
                for ring in &mut self.rings {
                    (ring.kick, ring.enabled) = (None, false);
                }
                self.device.release();
            }
            Request::SetDeviceStateFd => return self.state(message),
            Request::CheckDeviceState => return Ok(says(u64::from(self.load().is_err_and(warn)))),
        }
        Ok(Answer::Done)
    }

    fn set_features(&mut self, message: &Message) -> Result<(), String> {
        let [features] = message.words()?;
        let features = known(features, self.offered())?;
        self.log.switch(features & LOG_ALL != 0);
        let before = std::mem::replace(&mut self.features, features);
        match before & !LOG_ALL == features & !LOG_ALL {
            true => Ok(()),
            false => self.again(),
        }
    }

    /// A region is mapped locked while memory is not all there.
    fn is_listening(&self) -> bool {
        self.postcopy.as_ref().is_some_and(Postcopy::is_listening)
    }

    fn set_table(&mut self, mut message: Message) -> Result<Answer, String> {
        if self.is_listening() && message.payload == 0u64.to_ne_bytes() {
            self.unlock()?;
            return Ok(Answer::Done);
        }
        let described = table(&message.payload)?;
        let place = if self.is_listening() { Place::Locked } else { Place::Anywhere };
        let mut regions = Regions::table(described.clone(), std::mem::take(&mut message.fds), &self.log, place)?;
        self.rest();
        std::mem::swap(&mut self.regions, &mut regions);
        drop(regions);
        if let Some(postcopy) = self.postcopy.as_mut().filter(|postcopy| postcopy.is_listening()) {
            self.regions.iter().for_each(|region| postcopy.lock(region));
            // The same table with our addresses in it, in the order in which it came.
            let bases = described.iter().map(|region| {
                let at = self.regions.iter().find(|mapped| mapped.described == *region);
                (region, at.map_or(0, |mapped| mapped.base()))
            });
            let mut payload = message.payload[..8].to_vec();
            bases.for_each(|(region, base)| payload.extend(words(*region, base)));
            return Ok(Answer::Says(payload));
        }
        self.serve()?;
        Ok(Answer::Done)
    }

    fn add_region(&mut self, mut message: Message) -> Result<Answer, String> {
        let listening = self.is_listening();
        if listening && message.payload.len() == 8 {
            // Some front ends close with this what they do not close with a table.
            self.unlock()?;
            return Ok(Answer::Done);
        }
        let (described, padding) = slot(&message)?;
        let fd = message.descriptor()?;
        // Nobody uses what was not there before.
        let place = if listening { Place::LockedAsTheirs } else { Place::Anywhere };
        let region = self.regions.add(described, fd, &self.log, place)?;
        let base = region.base();
        if let Some(postcopy) = self.postcopy.as_mut().filter(|postcopy| postcopy.is_listening()) {
            postcopy.lock(region);
            let mut payload = padding.to_ne_bytes().to_vec();
            payload.extend(words(described, base));
            return Ok(Answer::Says(payload));
        }
        self.again()?;
        Ok(Answer::Done)
    }

    /// The front end serves our faults.
    fn unlock(&mut self) -> Result<(), String> {
        match &mut self.postcopy {
            Some(postcopy) => postcopy.unlock(&self.regions),
            None => Ok(()),
        }
    }

    fn ring(&mut self, index: impl TryInto<usize> + std::fmt::Display + Copy) -> Result<&mut Ring, String> {
        let rings = self.rings.len();
        let ring = index.try_into().ok().and_then(|index| self.rings.get_mut(index));
        ring.ok_or_else(|| format!("ring {index} of {rings}"))
    }

    /// A ring that is not being served, nor will be without more.
    fn stopped(&mut self, index: u32) -> Result<&mut Ring, String> {
        match self.ring(index)? {
            Ring { kick: Some(_), .. } => Err(format!("ring {index} has been started")),
            ring => Ok(ring),
        }
    }

    fn set_addresses(&mut self, message: &Message) -> Result<(), String> {
        let [ring, descriptors, used, available, _for_the_log] = message.words()?;
        // The upper half are flags: whether the used ring is to be logged, as everything is that is written while the log is on.
        let ring = self.ring(ring & 0xffff_ffff)?;
        let addresses = Some([descriptors, used, available]);
        if std::mem::replace(&mut ring.addresses, addresses) != addresses && ring.kick.is_some() {
            self.again()?;
        }
        Ok(())
    }

    fn set_kick(&mut self, message: Message) -> Result<(), String> {
        let (ring, event) = self.event(message)?;
        let event = event.ok_or_else(|| format!("ring {ring} without an eventfd: rings are not polled here"))?;
        if self.is_listening() {
            self.unlock()?;
        }
        // At rest first: a ring that is served is rung by the old one.
        self.rest();
        let in_flight = self.in_flight.is_some();
        let ring = self.ring(ring)?;
        // What another process has left is taken up at once.
        ring.rung = ring.kick.replace(event).is_none() && in_flight;
        self.serve()
    }

    /// An eventfd for a ring; none if the front end says so.
    fn event(&mut self, mut message: Message) -> Result<(u16, Option<Arc<EventFd>>), String> {
        let [word] = message.words()?;
        let index = (word & RING) as u16;
        self.ring(index)?;
        if word & NO_EVENT != 0 {
            return Ok((index, None));
        }
        let event = message.descriptor()?;
        let flags = rustix::fs::fcntl_getfl(&event).map_err(|e| format!("looking at an eventfd: {e}"))?;
        let _ = rustix::fs::fcntl_setfl(&event, flags | rustix::fs::OFlags::NONBLOCK);
        Ok((index, Some(Arc::new(adopt(event)))))
    }

    /// Stops a ring, when everything that was taken of it is done: where to go on.
    fn stop(&mut self, index: u32) -> Result<Answer, String> {
        self.ring(index)?;
        self.rest();
        let ring = self.ring(index)?;
        ring.kick = None;
        let next = ring.next;
        self.serve()?;
        if !self.serves {
            self.device.release();
        }
        Ok(Answer::Says(pair(index, next.into())))
    }

    /// The rings that are to be served.
    pub(crate) fn given(&self) -> Result<Vec<RingGiven>, String> {
        let enabled = self.features & PROTOCOL_FEATURES == 0;
        let mut given = Vec::new();
        for (index, ring) in (0u16..).zip(&self.rings) {
            let on = ring.rung && (enabled || ring.enabled);
            let (Some(kick), Some(addresses), true) = (&ring.kick, ring.addresses, on) else { continue };
            if ring.size == 0 {
                return Err(format!("ring {index} without a size"));
            }
            let guest = |user: u64| {
                let outside = || format!("ring {index} at {user:#x}, where no memory is");
                self.regions.guest(user).ok_or_else(outside)
            };
            let [descriptors, used, available] = addresses;
            given.push(RingGiven {
                index,
                size: ring.size,
                descriptors: guest(descriptors)?,
                available: guest(available)?,
                used: guest(used)?,
                next: ring.next,
                kick: kick.clone(),
                in_flight: match &self.in_flight {
                    Some(parts) => Some(parts.ring(index, ring.size)?),
                    None => None,
                },
            });
        }
        Ok(given)
    }

    /// Serves all rings that are to be served. The device is at rest.
    pub(crate) fn serve(&mut self) -> Result<(), String> {
        let given = self.given()?;
        if given.is_empty() {
            return Ok(());
        }
        let features = self.features & !(PROTOCOL_FEATURES | LOG_ALL);
        self.device.serve(self.regions.memory()?, features, given, self.driver.clone())?;
        self.serves = true;
        Ok(())
    }

    /// Something has changed under the rings that are served.
    fn again(&mut self) -> Result<(), String> {
        self.rest();
        self.serve()
    }

    /// Brings the device to rest, however long that takes: a request that is under way cannot be undone.
    fn rest(&mut self) {
        let mut told = false;
        while self.serves {
            if let Err(reason) = self.try_rest()
                && !std::mem::replace(&mut told, true)
            {
                tracing::warn!(device = self.device.name(), reason, "waiting for it to come to rest");
            }
        }
    }

    fn try_rest(&mut self) -> Result<(), String> {
        let rings = self.device.rest(Instant::now() + LOOK)?;
        self.rested(rings);
        Ok(())
    }

    /// The device is at rest: where to go on.
    pub(crate) fn rested(&mut self, rings: Vec<(u16, u16)>) {
        for (index, next) in rings {
            if let Some(ring) = self.rings.get_mut(usize::from(index)) {
                ring.next = next;
            }
        }
        self.serves = false;
    }

    fn config(&self, message: &Message) -> Result<Answer, String> {
        let (offset, content) = configuration(message)?;
        let config = self.device.config();
        let range = offset as usize..offset as usize + content.len();
        Ok(Answer::Says(match config.get(range) {
            Some(content) => {
                let mut payload = message.payload[..12].to_vec();
                payload.extend(content);
                payload
            }
            // The document: an empty answer says that it cannot be read.
            None => Vec::new(),
        }))
    }

    fn make_in_flight(&mut self, message: &Message) -> Result<Answer, String> {
        let (_, _, rings, entries) = in_flight(message)?;
        let (most_rings, most) = self.device.rings();
        if rings > most_rings || entries > most || entries == 0 || rings == 0 {
            return Err(format!("{rings} rings with {entries} entries; {most_rings} with {most} are possible"));
        }
        let (parts, bytes) = Parts::create(rings, entries)?;
        let fd = parts.fd().and_then(|fd| fd.try_clone_to_owned().ok());
        let fd = fd.ok_or("passing memory for requests under way")?;
        let mut payload = bytes.to_ne_bytes().to_vec();
        payload.extend(0u64.to_ne_bytes());
        payload.extend(rings.to_ne_bytes());
        payload.extend(entries.to_ne_bytes());
        payload.resize(message.payload.len(), 0);
        Ok(Answer::SaysWith(payload, fd))
    }

    /// Gives the state of the device, or is about to take it.
    fn state(&mut self, mut message: Message) -> Result<Answer, String> {
        let (direction, phase) = message.pair()?;
        let fd = message.descriptor()?;
        if self.serves {
            return Err("the device is not at rest".into());
        }
        if phase != 0 {
            return Err(format!("phase {phase}"));
        }
        match direction {
            0 => {
                let written = send(fd, &self.device.save());
                written.map_err(|e| format!("writing the state of the device: {e}"))?;
            }
            1 => self.state = Some(fd),
            other => return Err(format!("direction {other}")),
        }
        Ok(says(NO_DESCRIPTOR))
    }

    /// Takes the state that was announced, if one was.
    fn load(&mut self) -> Result<(), String> {
        let Some(fd) = self.state.take() else { return Ok(()) };
        let state = receive(fd).map_err(|e| format!("reading the state of the device: {e}"))?;
        self.device.restore(&state)
    }
}

fn warn(reason: String) -> bool {
    tracing::warn!(reason, "the state of a device is refused");
    true
}

fn says(number: u64) -> Answer {
    Answer::Says(number.to_ne_bytes().to_vec())
}

#[expect(unsafe_code, reason = "the type of eventfds takes no other kind of descriptor")]
pub(crate) fn adopt(fd: OwnedFd) -> EventFd {
    // SAFETY: the descriptor is ours, and is given away. One of another kind only fails to be read and written.
    unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) }
}
