//! A back end that outlives the process: another one goes on with its front end, who does not notice.
//!
//! How its thread comes to rest and what another one takes is [`wherry_handover::Rest`]. A back end comes to rest between two
//! messages: those that have come whole are answered, or are still in the socket, and what has come of one that is not whole
//! is state. **The device is drained**: all that it has taken is given back, and the driver is told. To take requests up again in
//! the other process (by the memory for requests under way) would not wait for them, and would do those twice whose effect cannot
//! be taken back: a write of the old process could then come after a later one of the new. What was written need not
//! reach the medium for that: the other process has the same open files.
//!
//! The guest is not stopped meanwhile. What it rings stays in the eventfds, which are the same ones.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message;
use vmm_sys_util::eventfd::EventFd;
use wherry_handover::{Claim, Copies, Rest, Rested, Urgent};

use crate::channel::Channel;
use crate::device::Device;
use crate::features::{LOG_ALL, protocol};
use crate::inflight::Parts;
use crate::memory::{Described, Place};
use crate::saved::{SavedBackEnd, SavedFrontEnd, SavedInFlight, SavedOffer, SavedPart, SavedRegion, SavedRing};
use crate::session::{Ring, Session, adopt};
use crate::wire::{Connection, Partial, borrow};
use crate::{BackendError, payload};

/// Version of what a back end writes of itself, and the newest that it reads.
pub const SCHEMA: u32 = 1;

/// How long a device may take to give back what it has taken.
const PAUSE: Duration = Duration::from_secs(3);

/// What front ends are told of a device, for [`check`] in another process.
pub fn offer(device: &dyn Device) -> Vec<u8> {
    SavedOffer::of(device).encode_to_vec()
}

/// Whether front ends that know that of a device can go on with this one.
pub fn check(device: &dyn Device, told: &[u8]) -> Result<(), String> {
    let told = SavedOffer::decode(told).map_err(|error| format!("what front ends know of the device: {error}"))?;
    SavedOffer::of(device).lacks(&told).map_or(Ok(()), Err)
}

/// What is to be carried: of a front end, if there is one, the part that is given.
fn rested(device: &dyn Device, changed: bool, front_end: Option<SavedFrontEnd>, copies: Copies) -> Rested {
    let (offer, config) = (Some(SavedOffer::of(device)), device.config());
    let saved = SavedBackEnd { device: device.keep(), offer, config, changed, front_end };
    Rested { state: saved.encode_to_vec(), descriptors: copies.into_inner() }
}

/// Whether the device has said that its configuration is another one. It is to be said [again](say_changed).
fn take_changed(device: &dyn Device) -> bool {
    device.changed().is_some_and(|changed| changed.read().is_ok())
}

fn say_changed(device: &dyn Device) {
    if let Some(changed) = device.changed() {
        // It fails only if the counter is full: then it is said.
        let _ = changed.write(1);
    }
}

/// Comes to rest between two front ends, until it is to go on. In a new process: the front end of the one before, if it had one.
pub(crate) fn rest_alone<'a>(device: &'a dyn Device, rest: &'a Rest, quit: &'a EventFd) -> Option<Session<'a>> {
    let changed = take_changed(device);
    let mut resumed = None;
    rest.settle(Ok(rested(device, changed, None, Copies::default())), |state, claim| {
        resumed = take(device, &state, claim, rest, quit)?;
        Ok(())
    });
    if changed {
        say_changed(device);
    }
    resumed
}

/// Takes what the process before knew.
fn take<'a>(
    device: &'a dyn Device,
    state: &[u8],
    mut claim: Claim,
    rest: &'a Rest,
    quit: &'a EventFd,
) -> Result<Option<Session<'a>>, String> {
    let saved = SavedBackEnd::decode(state).map_err(|error| format!("the state of a back end: {error}"))?;
    if let Some(what) = SavedOffer::of(device).lacks(&saved.offer.unwrap_or_default()) {
        return Err(what);
    }
    device.take(&saved.device)?;
    if device.config() != saved.config {
        return Err("the device has another configuration here, and its front end may know it already".into());
    }
    let resumed = saved.front_end.map(|front_end| {
        let stream = UnixStream::from(need(&mut claim, "connection", 0)?);
        let connection = Connection::new(stream, quit, Some(rest)).map_err(|error| error.to_string())?;
        Session::new(connection, device).resume(front_end, &mut claim)
    });
    let resumed = resumed.transpose()?;
    if saved.changed {
        say_changed(device);
    }
    Ok(resumed)
}

fn need(claim: &mut Claim, name: &str, index: u32) -> Result<OwnedFd, String> {
    claim(name, index).ok_or_else(|| format!("{name}[{index}] of its front end is missing"))
}

/// A number that has come as a larger one.
fn short(what: &str, number: u32) -> Result<u16, String> {
    u16::try_from(number).map_err(|_| format!("{what} {number:#x}"))
}

impl Session<'_> {
    /// Why the front end cannot go over to another process now.
    pub(crate) fn obstacle(&self) -> Option<String> {
        // Its faults are those of the memory of this process.
        self.postcopy.as_ref().map(|_| {
            "its front end is in the middle of a migration by postcopy, and serves, or is about to serve, the faults of this \
             process"
                .into()
        })
    }

    /// Comes to rest for another process, until it is to go on here.
    pub(crate) fn rest_for(&mut self, rest: &Rest) -> Result<(), BackendError> {
        let _urgent = Urgent::new();
        let changed = take_changed(self.device);
        let served = self.serves;
        let rested = self.pause(changed);
        rest.settle(rested, |_, _| Err("it has a front end already".into()));
        if changed {
            say_changed(self.device);
        }
        self.serve_on(served)
    }

    /// Serves what was served, here or in the process before.
    pub(crate) fn serve_on(&mut self, served: bool) -> Result<(), BackendError> {
        match served && !self.serves {
            true => self.serve().map_err(BackendError::GoOn),
            false => Ok(()),
        }
    }

    fn pause(&mut self, changed: bool) -> Result<Rested, String> {
        if let Some(why) = self.obstacle() {
            return Err(why);
        }
        let serves = self.serves;
        if serves {
            let paused = self.device.pause(Instant::now() + PAUSE);
            self.rested(paused.inspect_err(|_| self.device.go_on())?);
        }
        let mut copies = Copies::default();
        let saved = self.save(serves, &mut copies).map_err(|error| format!("copying a descriptor: {error}"))?;
        Ok(rested(self.device, changed, Some(saved), copies))
    }

    fn save(&self, serves: bool, copies: &mut Copies) -> std::io::Result<SavedFrontEnd> {
        copies.add("connection", 0, &self.connection)?;
        let partial = self.connection.partial();
        for (index, fd) in (0..).zip(&partial.fds) {
            copies.add("partial", index, fd)?;
        }
        let mut regions = Vec::new();
        for (index, region) in (0..).zip(self.regions.iter()) {
            let file = region.file().ok_or(std::io::ErrorKind::InvalidData)?;
            copies.add("memory", index, file)?;
            let Described { guest, size, user, offset } = region.described;
            regions.push(SavedRegion { guest, size, user, offset });
        }
        let log = match self.log.map() {
            Some(map) => {
                let part = map.file_offset().ok_or(std::io::ErrorKind::InvalidData)?;
                copies.add("log", 0, part.file())?;
                Some(SavedPart { bytes: map.size() as u64, offset: part.start() })
            }
            None => None,
        };
        let in_flight = match &self.in_flight {
            Some(parts) => {
                copies.add("in-flight", 0, parts.fd().ok_or(std::io::ErrorKind::InvalidData)?)?;
                let (bytes, offset, rings, entries) = parts.described();
                let part = SavedPart { bytes, offset };
                Some(SavedInFlight { part, rings: rings.into(), entries: entries.into() })
            }
            None => None,
        };
        if let Some(state) = &self.state {
            copies.add("state", 0, state)?;
        }
        if let Some(channel) = &self.channel {
            copies.add("channel", 0, channel)?;
        }
        let mut rings = Vec::new();
        for (index, ring) in (0u16..).zip(&self.rings) {
            let (call, error) = (self.driver.call(index), self.driver.error(index));
            for (name, event) in [("kick", &ring.kick), ("call", &call), ("error", &error)] {
                if let Some(event) = event {
                    copies.add(name, index.into(), borrow(event))?;
                }
            }
            let &Ring { size, next, addresses, rung, enabled, .. } = ring;
            rings.push(SavedRing {
                size: size.into(),
                next: next.into(),
                addresses: addresses.map(Vec::from).unwrap_or_default(),
                kick: ring.kick.is_some(),
                call: call.is_some(),
                error: error.is_some(),
                rung,
                enabled,
            });
        }
        Ok(SavedFrontEnd {
            features: self.features,
            protocol: self.protocol,
            regions,
            log,
            rings,
            in_flight,
            state: self.state.is_some(),
            channel: self.channel.is_some(),
            partial: partial.bytes.clone(),
            descriptors: partial.fds.len() as u32,
            serves,
        })
    }

    /// Takes what the process before knew of this front end. Nothing is served yet.
    fn resume(mut self, saved: SavedFrontEnd, claim: &mut Claim) -> Result<Self, String> {
        self.features = payload::known(saved.features, self.offered())?;
        self.protocol = payload::known(saved.protocol, protocol::ALL)?;
        let partial = (0..saved.descriptors).map(|index| need(claim, "partial", index)).collect::<Result<_, _>>()?;
        self.connection.set_partial(Partial::of(saved.partial, partial).map_err(|error| error.to_string())?);
        if let Some(SavedPart { bytes, offset }) = saved.log {
            self.log.set(need(claim, "log", 0)?, bytes, offset)?;
        }
        self.log.switch(self.features & LOG_ALL != 0);
        for (index, SavedRegion { guest, size, user, offset }) in (0..).zip(saved.regions) {
            let fd = need(claim, "memory", index)?;
            self.regions.add(Described { guest, size, user, offset }, fd, &self.log, Place::Anywhere)?;
        }
        if let Some(SavedInFlight { part, rings, entries }) = saved.in_flight {
            let (rings, entries) = (short("rings", rings)?, short("entries", entries)?);
            let fd = need(claim, "in-flight", 0)?;
            self.in_flight = Some(Parts::adopt(fd, part.bytes, part.offset, rings, entries)?);
        }
        if saved.state {
            self.state = Some(need(claim, "state", 0)?);
        }
        if saved.channel {
            self.channel = Some(Channel::adopt(need(claim, "channel", 0)?)?);
        }
        if saved.rings.len() != self.rings.len() {
            return Err(format!("the state of {} rings; there are {}", saved.rings.len(), self.rings.len()));
        }
        let (_, most) = self.device.rings();
        for (index, saved) in (0u16..).zip(saved.rings) {
            let mut event = |name: &str, there: bool| -> Result<Option<Arc<EventFd>>, String> {
                let fd = there.then(|| need(claim, name, index.into())).transpose()?;
                Ok(fd.map(|fd| Arc::new(adopt(fd))))
            };
            let (kick, call) = (event("kick", saved.kick)?, event("call", saved.call)?);
            self.driver.set_call(index, call);
            self.driver.set_error(index, event("error", saved.error)?);
            let size = short("a ring of entries", saved.size)?;
            if size > most || size != 0 && !size.is_power_of_two() {
                return Err(format!("a ring of {size} entries; at most {most} are possible"));
            }
            let addresses = match saved.addresses[..] {
                [] => None,
                [descriptors, used, available] => Some([descriptors, used, available]),
                _ => return Err(format!("{} addresses of a ring", saved.addresses.len())),
            };
            let next = short("an index of", saved.next)?;
            let SavedRing { rung, enabled, .. } = saved;
            self.rings[usize::from(index)] = Ring { size, next, addresses, kick, rung, enabled };
        }
        // All that could go wrong does so before the front end is this process's.
        if saved.serves {
            self.given()?;
            self.regions.memory()?;
        }
        self.served_before = saved.serves;
        Ok(self)
    }
}
