//! The thread that speaks with one back end: everything that is asked of it is asked here, one after the other.
//!
//! [`Orders`] is how others reach it. The thread also relays interrupts of a guest
//! without MSI-X, ends postcopy when all memory is there, and notices that the back end has gone: `lost` is what then. `rest` brings
//! it to rest, beside the driver or after it. `kept` leaves it to the next
//! process as it is.
#![expect(unsafe_code, reason = "lends descriptors of eventfds, which are open while they are lent")]

mod kept;
mod lost;
mod rest;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;
use wherry_fault::{FaultService, SourceId};
use wherry_handover::Shelf;
use wherry_interrupt::Event;
use wherry_memory::{GuestMemory, Ram};
use wherry_state::UnitError;

pub(super) use self::kept::Came;
use self::kept::{Adopted, IN_FLIGHT, keep, relay};
use self::lost::{FIRST_PAUSE, Missing};
use super::front::{Front, InFlight, RingAddresses, RingStart, ours, protocol};
use super::log::Log;
use super::orders::{Order, Orders, RESET_LIMIT};
use super::postcopy;
use super::wire::{Connection, VhostError};
use super::{VhostSpec, told_config};
use crate::device::{Activation, Interrupts, Position, RingGiven};

/// Between two looks whether all memory is there.
const LOOK: Duration = Duration::from_millis(10);

/// The thread of one back end.
pub(super) struct Worker {
    pub(super) orders: Arc<Orders>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread of a back end is made of.
pub(super) struct Given {
    pub(super) name: String,
    pub(super) spec: VhostSpec,
    pub(super) config: Arc<Mutex<Vec<u8>>>,
    /// None: it is another process's still.
    pub(super) front: Option<Front>,
    pub(super) ram: Arc<Ram>,
    pub(super) faults: Option<Arc<FaultService>>,
    /// What is kept over a live update.
    pub(super) shelf: Shelf,
    /// What came from the process before.
    pub(super) came: Option<Came>,
}

impl Worker {
    pub(super) fn spawn(given: Given) -> Result<Self, VhostError> {
        let Given { name, spec, config, front, ram, faults, shelf, came } = given;
        let path = spec.socket.clone();
        let failed = |source| VhostError::Socket {
            path: path.clone(),
            what: "starting the thread that speaks with it".into(),
            source,
        };
        let (shared, orders) = Orders::new(config, shelf.registry().clone()).map_err(failed)?;
        let shared = Arc::new(shared);
        let mut thread = Thread {
            path: path.clone(),
            spec,
            in_flight: None,
            missing: None,
            shared: shared.clone(),
            orders,
            front: None,
            ram,
            faults,
            sharer: None,
            served: None,
            held: false,
            waits: false,
            starved: false,
            saved: None,
            log: None,
            shelf,
            came: came.unwrap_or_default(),
            adopted: None,
        };
        if let Some(front) = front {
            thread.take_up(front)?;
        }
        let thread = std::thread::Builder::new().name(name).spawn(move || thread.run()).map_err(failed)?;
        Ok(Self { orders: shared, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.orders.send(Order::Quit);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of a vhost-user device panicked");
        }
    }
}

/// A ring that the back end serves, or will.
struct Served {
    given: RingGiven,
    position: Position,
    /// Signalled by the back end where the guest has no vector for the ring.
    relay: Option<Arc<Event>>,
    /// The back end has it.
    started: bool,
}

impl Served {
    fn index(&self, memory: &GuestMemory, at: u64) -> Option<u16> {
        memory.load(GuestAddress(at), Ordering::Acquire).ok()
    }

    /// How much the driver has made available, ever.
    fn available(&self, memory: &GuestMemory) -> Option<u16> {
        self.index(memory, self.given.setup.available + 2)
    }

    /// How much the back end has given back, ever.
    fn used(&self, memory: &GuestMemory) -> Option<u16> {
        self.index(memory, self.given.setup.used + 2)
    }

    /// How much it has taken, ever, as far as it says so: the word behind the used ring.
    fn taken(&self, memory: &GuestMemory) -> Option<u16> {
        self.index(memory, self.given.setup.used + 4 + 8 * u64::from(self.given.setup.size))
    }
}

/// What the driver has activated.
struct Active {
    memory: GuestMemory,
    features: u64,
    rings: Vec<Served>,
    interrupts: Interrupts,
}

struct Thread {
    path: std::path::PathBuf,
    spec: VhostSpec,
    /// Where the back end notes what is under way.
    in_flight: Option<InFlight>,
    /// It is being looked for; the guest waits.
    missing: Option<Missing>,
    shared: Arc<Orders>,
    orders: Receiver<Order>,
    /// None: it has gone, or was given up.
    front: Option<Front>,
    ram: Arc<Ram>,
    faults: Option<Arc<FaultService>>,
    /// It takes part in postcopy, as this source.
    sharer: Option<SourceId>,
    served: Option<Active>,
    /// Nothing is to be served until the next start.
    held: bool,
    /// The back end serves on, and nothing is done about it until the next start: it is being left to another process, or comes from one.
    waits: bool,
    /// The back end hears of nothing new.
    starved: bool,
    /// What it keeps itself, since its rings were stopped beside the driver.
    saved: Option<Vec<u8>>,
    log: Option<Arc<Log>>,
    shelf: Shelf,
    /// What came from the process before.
    came: Came,
    /// Rings of the process before, for the driver's activation, which comes after it.
    adopted: Option<Adopted>,
}

impl Thread {
    fn run(&mut self) {
        loop {
            self.wait();
            let _ = self.shared.wake.read();
            loop {
                match self.orders.try_recv() {
                    Ok(Order::Quit) | Err(std::sync::mpsc::TryRecvError::Disconnected) => return self.quit(),
                    Ok(order) => self.obey(order),
                    Err(std::sync::mpsc::TryRecvError::Empty) => break,
                }
            }
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Activate(activation) => {
                let result = self.activate(activation);
                self.judge("activating it", result);
            }
            Order::Reset(done) => {
                let _ = done.send(self.reset());
            }
            Order::Drain(deadline, done) => {
                let _ = done.send(self.drain(deadline));
            }
            Order::Rest(deadline, done) => {
                let _ = done.send(self.rest(deadline));
            }
            Order::Start => {
                (self.held, self.waits) = (false, false);
                self.shared.take_left();
                let result = self.feed().and_then(|()| self.start_rings());
                self.judge("starting its rings", result);
            }
            Order::Log(log, done) => {
                let result = self.set_log(log);
                let told = result.as_ref().map_err(ToString::to_string).copied();
                self.judge("switching its log", result);
                let _ = done.send(told);
            }
            Order::Config(offset, content) => {
                // It may be part of what was saved.
                self.saved = None;
                let result = self.front.as_ref().map_or(Ok(()), |front| front.set_config(offset, &content));
                self.judge("writing its configuration", result);
            }
            Order::Announce(address) => {
                let result = self.front.as_ref().map_or(Ok(()), |front| front.announce(address));
                self.judge("announcing where its guest is", result);
            }
            Order::Vector(ring) => {
                let result = self.follow_vector(ring);
                self.judge("signalling another vector", result);
            }
            Order::Load(state, done) => {
                let result = match &self.front {
                    Some(front) if front.has(protocol::DEVICE_STATE) => front.load(&state),
                    Some(front) => Err(front.connection().lacks("it takes no state of another one (DEVICE_STATE)")),
                    None => Ok(()),
                };
                let told = result.as_ref().map_err(ToString::to_string).copied();
                self.judge("giving it the state of another one", result);
                let _ = done.send(told);
            }
            Order::Leave(done) => {
                self.leave();
                let _ = done.send(Ok(()));
            }
            Order::Adopt(saved, done) => {
                let _ = done.send(self.adopt(saved));
            }
            Order::Quit => {}
        }
    }

    /// Waits for orders, interrupts to relay, the end of the back end, and the end of postcopy.
    fn wait(&mut self) {
        loop {
            let mut events = vec![PollFd::from_borrowed_fd(lend(&self.shared.wake), PollFlags::IN)];
            let mut relays = Vec::new();
            if let Some(front) = self.front.as_ref().filter(|_| !self.waits) {
                events.push(PollFd::new(front, PollFlags::IN));
            }
            // At rest nothing is told to the driver.
            let channel =
                self.front.as_ref().and_then(|front| front.channel.as_ref()).filter(|_| !(self.held || self.waits));
            let with_front = events.len();
            events.extend(channel.map(|channel| PollFd::new(channel, PollFlags::IN)));
            let first = events.len();
            if let Some(active) = self.served.as_ref().filter(|_| !self.waits) {
                for ring in &active.rings {
                    if let Some(relay) = &ring.relay {
                        events.push(PollFd::new(relay, PollFlags::IN));
                        relays.push((ring.given.index, relay));
                    }
                }
                if !relays.is_empty()
                    && let Some(pin) = active.interrupts.pin()
                {
                    // SAFETY: the pin lives as long as the interrupts, which are not dropped during the call.
                    let pin = unsafe { BorrowedFd::borrow_raw(pin.resample_fd()) };
                    events.push(PollFd::from_borrowed_fd(pin, PollFlags::IN));
                }
            }
            let missing = self.missing.as_ref().filter(|_| !self.waits);
            let limit = match missing {
                Some(missing) => Some(missing.next.saturating_duration_since(Instant::now())),
                None => self.sharer.is_some().then_some(LOOK),
            };
            let limit =
                limit.map(|limit| Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() });
            // Interrupted or not, what has happened is looked at.
            let _ = poll(&mut events, limit.as_ref());
            let is = |at: usize| events.get(at).is_some_and(|event| !event.revents().is_empty());
            let (ordered, spoke, asks) = (is(0), with_front == 2 && is(1), first > with_front && is(with_front));
            let rung: Vec<bool> = (0..=relays.len()).map(|n| is(first + n)).collect();
            drop(events);
            if let Some(active) = &self.served {
                for ((index, relay), rung) in relays.iter().zip(&rung) {
                    if *rung && relay.read().is_ok() {
                        active.interrupts.ring(*index);
                    }
                }
                if let Some(pin) = active.interrupts.pin()
                    && !relays.is_empty()
                    && rung.last() == Some(&true)
                {
                    pin.resample();
                }
            }
            drop(relays);
            if spoke {
                let what = "it closed the connection, or spoke unasked";
                self.lose(&what);
            }
            if asks {
                let result = self.hear();
                self.judge("hearing a request of its own", result);
            }
            self.end_postcopy();
            if !self.waits && self.missing.as_ref().is_some_and(|missing| Instant::now() >= missing.next) {
                self.find();
            }
            if ordered {
                return;
            }
        }
    }

    /// The back end says that its configuration has changed: the driver is told, and reads it.
    fn hear(&mut self) -> Result<(), VhostError> {
        let Some(front) = &mut self.front else { return Ok(()) };
        match front.channel.as_ref().map(Connection::asked).transpose()? {
            Some(true) => {}
            Some(false) => front.channel = None,
            None => return Ok(()),
        }
        if front.channel.is_none() || !front.has(protocol::CONFIG) {
            return Ok(());
        }
        let told = told_config(front, &self.spec)?;
        {
            let mut config = self.shared.config.lock().unwrap_or_else(PoisonError::into_inner);
            if told == *config {
                return Ok(());
            }
            *config = told;
        }
        // It may be part of what was saved.
        self.saved = None;
        tracing::info!(socket = %self.path.display(), "the configuration of a vhost-user device has changed");
        if let Some(active) = &self.served {
            active.interrupts.configuration();
        }
        Ok(())
    }

    fn activate(&mut self, activation: Activation) -> Result<(), VhostError> {
        let Activation { memory, features, rings, interrupts } = activation;
        if let Some(adopted) = self.adopted.take() {
            let served = rings.into_iter().map(|given| adopted.ring(given)).collect();
            self.served = Some(Active { memory, features, rings: served, interrupts });
            return Ok(());
        }
        let mut served = Vec::new();
        for given in rings {
            let relay = match interrupts.ring_vector(given.index) {
                Some(_) => None,
                None => relay(&self.shelf, given.index),
            };
            let position = given.setup.position;
            served.push(Served { given, position, relay, started: false });
        }
        self.served = Some(Active { memory, features, rings: served, interrupts });
        if self.front.is_none() {
            // It was lost, and the driver has reset its device: perhaps there is another one.
            self.take_up(Front::open(&self.path)?)?;
        }
        self.show()
    }

    /// Features, memory, rings.
    fn show(&mut self) -> Result<(), VhostError> {
        let (Some(front), Some(active)) = (&mut self.front, &self.served) else { return Ok(()) };
        front.set_features(active.features, false)?;
        match self.faults.as_ref().filter(|faults| faults.has_started() && !faults.is_complete()) {
            Some(faults) => {
                if let Some(before) = self.sharer.take() {
                    let _ = faults.remove_source(before);
                }
                self.sharer = Some(postcopy::share(front, &self.ram, faults)?);
            }
            None => front.set_memory(&self.ram)?,
        }
        if front.has(protocol::INFLIGHT_SHMFD) {
            let most = active.rings.iter().map(|ring| ring.given.setup.size).max().unwrap_or(0);
            let rings = active.rings.iter().map(|ring| ring.given.index + 1).max().unwrap_or(0);
            let kept = match self.in_flight.take() {
                Some(kept) => kept,
                None => {
                    let made = front.make_in_flight(rings, most)?;
                    keep(&self.shelf, &self.path, IN_FLIGHT, made.fd.clone())?;
                    made
                }
            };
            front.set_in_flight(&kept)?;
            self.in_flight = Some(kept);
        }
        if let Some(log) = self.log.clone() {
            self.set_log(Some(log))?;
        }
        self.start_rings()
    }

    fn addresses(&self, ring: &Served) -> Result<RingAddresses, VhostError> {
        let in_ram = |guest: u64| match self.ram.find(guest) {
            Some(_) => Ok(ours(guest)),
            None => {
                let reason = format!("its driver has a ring at {guest:#x}, which is no RAM");
                Err(VhostError::Lacks { path: self.path.clone(), reason })
            }
        };
        let setup = &ring.given.setup;
        Ok(RingAddresses {
            descriptors: in_ram(setup.descriptors)?,
            used: in_ram(setup.used)?,
            available: in_ram(setup.available)?,
            used_guest: setup.used,
        })
    }

    fn start_rings(&mut self) -> Result<(), VhostError> {
        if self.held {
            return Ok(());
        }
        let (Some(front), Some(active)) = (&self.front, &self.served) else { return Ok(()) };
        let mut starts = Vec::new();
        for ring in active.rings.iter().filter(|ring| !ring.started) {
            let index = ring.given.index;
            let vector = active.interrupts.ring_vector(index);
            starts.push((ring, self.addresses(ring)?, vector));
        }
        let rings: Vec<_> = starts
            .iter()
            .map(|(ring, at, vector)| RingStart {
                index: ring.given.index,
                size: ring.given.setup.size,
                next: ring.position.available,
                at: *at,
                call: match (vector, &ring.relay) {
                    // While it is masked nothing is attached to it; what it counts is then pending.
                    (Some(vector), None) => Some(vector.kvm_interrupt_event().as_fd()),
                    (_, relay) => relay.as_ref().map(|relay| relay.as_fd()),
                },
                kick: lend(&ring.given.kick),
            })
            .collect();
        front.start(&rings, self.log.is_some())?;
        // What the driver made available meanwhile is found, although it has rung before.
        starts.iter().for_each(|(ring, ..)| drop(ring.given.kick.write(1)));
        let started: Vec<u16> = rings.iter().map(|ring| ring.index).collect();
        if let Some(active) = &mut self.served {
            active.rings.iter_mut().filter(|r| started.contains(&r.given.index)).for_each(|ring| ring.started = true);
        }
        Ok(())
    }

    /// The driver has given a ring another vector: the back end signals that from now on, or us if there is none.
    fn follow_vector(&mut self, index: u16) -> Result<(), VhostError> {
        let Some(active) = &mut self.served else { return Ok(()) };
        let Some(ring) = active.rings.iter_mut().find(|ring| ring.given.index == index) else { return Ok(()) };
        let vector = active.interrupts.ring_vector(index);
        match (&vector, &ring.relay) {
            (Some(_), _) => ring.relay = None,
            (None, None) => ring.relay = relay(&self.shelf, index),
            (None, Some(_)) => return Ok(()),
        }
        if let (Some(front), true) = (&self.front, ring.started) {
            match (&vector, &ring.relay) {
                (Some(vector), _) => front.set_call(index, vector.kvm_interrupt_event().as_fd())?,
                (None, Some(relay)) => front.set_call(index, relay.as_fd())?,
                (None, None) => {}
            }
        }
        // What was signalled until now may have gone where nobody listens any more.
        active.interrupts.ring(index);
        Ok(())
    }

    fn reset(&mut self) -> Result<(), UnitError> {
        // Beside the driver they were stopped when nothing was under way.
        let settled = match std::mem::take(&mut self.starved) {
            true => Ok(()),
            false => self.settle(Instant::now() + RESET_LIMIT),
        };
        if settled.is_ok() {
            let result = self.stop_rings();
            self.judge("resetting it", result);
        }
        if let (Some(front), Some(active)) = (&self.front, &self.served) {
            let disabled = active.rings.iter().try_for_each(|ring| front.enable(ring.given.index, false));
            self.judge("disabling its rings", disabled);
        }
        if let (Ok(()), Some(front)) = (&settled, &mut self.front) {
            // Until a driver uses it again, it has no business there.
            let hidden = front.hide_memory();
            self.judge("taking memory away from it", hidden);
        }
        self.served = None;
        self.saved = None;
        (self.missing, self.in_flight) = (None, None);
        if let Err(error) = &settled {
            // It may write what the driver takes for its own again: nothing is shown to it any more.
            self.lose(error);
        }
        settled
    }

    fn set_log(&mut self, log: Option<Arc<Log>>) -> Result<(), VhostError> {
        let Some(front) = &self.front else {
            self.log = log;
            return Ok(());
        };
        if log.is_some() && !front.logs() {
            return Err(front.connection().lacks("it cannot log what it writes (F_LOG_ALL, LOG_SHMFD)"));
        }
        if let Some(log) = &log
            && let Some(fd) = log.fd()
        {
            front.set_log(fd, log.bytes())?;
        }
        let on = log.is_some();
        self.log = log;
        let Some(active) = &self.served else { return Ok(()) };
        front.set_features(active.features, on)?;
        for ring in active.rings.iter().filter(|ring| ring.started) {
            front.set_addresses(ring.given.index, &self.addresses(ring)?, on)?;
        }
        Ok(())
    }

    /// All memory is there: it is told, and is no source of faults any more.
    fn end_postcopy(&mut self) {
        let Some(faults) = self.faults.clone() else { return };
        let Some(source) = self.sharer.take_if(|_| faults.is_complete()) else { return };
        let result = self.front.as_ref().map_or(Ok(()), Front::end);
        // The service may have ended with the journey meanwhile.
        let _ = faults.remove_source(source);
        self.judge("ending postcopy", result);
    }

    fn judge(&mut self, what: &str, result: Result<(), VhostError>) {
        if let Err(error) = result {
            tracing::warn!(%error, what, "a vhost-user device failed");
            self.lose(&error);
        }
    }

    /// The back end is lost. If what was under way is known, the next one at its socket goes on with it, and the guest waits
    /// that long. If not, the device needs a reset, which connects anew.
    fn lose(&mut self, why: &dyn std::fmt::Display) {
        if self.front.take().is_none() {
            return;
        }
        let known = self.in_flight.is_some() && self.served.is_some();
        let then = if known { "its requests wait for the next one" } else { "its device needs a reset" };
        tracing::warn!(socket = %self.path.display(), %why, then, "the vhost-user back end is lost");
        if let Some(log) = &self.log {
            log.doubt();
        }
        if let (Some(faults), Some(source)) = (&self.faults, self.sharer.take()) {
            let _ = faults.remove_source(source);
        }
        if let Some(active) = &mut self.served {
            active.rings.iter_mut().for_each(|ring| ring.started = false);
            if known {
                self.missing = Some(Missing { next: Instant::now() + FIRST_PAUSE, pause: FIRST_PAUSE });
            } else {
                active.interrupts.failed(&why);
            }
        }
        (self.starved, self.saved) = (false, None);
    }

    fn quit(&mut self) {
        if let (Some(faults), Some(source)) = (&self.faults, self.sharer.take()) {
            let _ = faults.remove_source(source);
        }
    }
}

/// An eventfd as a descriptor that can be sent.
fn lend(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: it is open as long as the value that is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
