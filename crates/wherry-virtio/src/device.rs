//! What a device implements, and what the transport gives to it.
//!
//! A device may serve its rings on a thread of this process, or have another process do it: it is told where the rings
//! lie, which eventfds ring and are rung, and which features were agreed on.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;
use wherry_interrupt::{Intx, Vector};
use wherry_memory::GuestMemory;
use wherry_state::{Section, UnitError};

use crate::saved::SavedTransport;

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Number of the device type (virtio 1.3, section 5).
    pub id: u16,
    /// Name of its state unit.
    pub name: &'static str,
    /// PCI base class, sub-class and programming interface.
    pub class: [u8; 3],
}

/// One ring as the driver has set it up, and how far it has been served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingSetup {
    /// Entries, a power of two.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring, which the driver writes.
    pub available: u64,
    /// Guest address of the used ring, which the device writes.
    pub used: u64,
    /// Where it is served on.
    pub position: Position,
}

/// How far a ring has been served: indices that count up and wrap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Next entry of the available ring to take.
    pub available: u16,
    /// Next entry of the used ring to fill.
    pub used: u16,
}

/// A ring that is to be served.
pub struct RingGiven {
    /// Its number.
    pub index: u16,
    /// Where it lies.
    pub setup: RingSetup,
    /// Readable when the driver has made something available.
    pub kick: Arc<EventFd>,
    /// Another process served it before: how far it has used the ring stands in the ring.
    pub resumes: bool,
    /// Where requests that are under way are noted, if they are. Those that whoever served the ring before has left come
    /// first then.
    pub in_flight: Option<Arc<dyn InFlight>>,
}

/// Notes which requests of a ring are under way, where it outlives this process.
pub trait InFlight: Send + Sync {
    /// The heads that were taken and not given back, in the order in which they were taken, where the used ring is at `used`.
    fn left(&self, used: u16) -> Vec<u16>;

    /// A request was taken.
    fn taken(&self, head: u16);

    /// A request is about to be given back; it may still be lost on the way.
    fn giving(&self, head: u16);

    /// The used ring shows that these were given back; its index is `used` now.
    fn given(&self, heads: &[u16], used: u16);
}

/// How a driver is reached. The transport does it for a guest of this process.
pub trait Driver: Send + Sync {
    /// Something in this ring was used.
    fn ring(&self, index: u16);

    /// The configuration has changed.
    fn configuration(&self);

    /// The device does nothing more until it is reset (section 2.1.2): `what` has happened, and `why`.
    fn needs_reset(&self, what: &str, why: &dyn Display);

    /// The vector of a ring, for a device in another process: it signals one of its eventfds.
    fn ring_vector(&self, index: u16) -> Option<Arc<Vector>>;

    /// The pin, for whoever waits for the ends of its interrupts: a thread of the device. None if there is no pin.
    fn pin(&self) -> Option<&Intx>;
}

/// How a device tells its driver. Cloning gives another handle.
#[derive(Clone)]
pub struct Interrupts(Arc<dyn Driver>);

impl Interrupts {
    /// For this driver.
    pub fn new(driver: Arc<dyn Driver>) -> Self {
        Self(driver)
    }

    /// See [`Driver::ring`].
    pub fn ring(&self, index: u16) {
        self.0.ring(index);
    }

    /// See [`Driver::configuration`].
    pub fn configuration(&self) {
        self.0.configuration();
    }

    /// The driver has broken a rule: the device does nothing more until it is reset.
    pub fn broken(&self, why: &dyn Display) {
        self.0.needs_reset("its driver has broken a rule; the device needs a reset", why);
    }

    /// The device cannot go on, through no fault of its driver's: it does nothing more until it is reset.
    pub fn failed(&self, why: &dyn Display) {
        self.0.needs_reset("the device cannot go on; it needs a reset", why);
    }

    /// See [`Driver::ring_vector`].
    pub fn ring_vector(&self, index: u16) -> Option<Arc<Vector>> {
        self.0.ring_vector(index)
    }

    /// See [`Driver::pin`].
    pub fn pin(&self) -> Option<&Intx> {
        self.0.pin()
    }
}

/// Everything a device needs to serve its rings.
pub struct Activation {
    /// Guest memory; what is written through it is known to the VMM's dirty source.
    pub memory: GuestMemory,
    /// The features that driver and device have agreed on.
    pub features: u64,
    /// The rings that the driver has enabled.
    pub rings: Vec<RingGiven>,
    /// How the driver is told.
    pub interrupts: Interrupts,
}

/// Whoever serves the rings of a device: a thread of this process, or one that speaks with another process.
pub trait Serving: Send + Sync {
    /// Takes no more requests, without waiting for those under way.
    fn quiesce(&self);

    /// [`quiesce`](Self::quiesce), then waits until what is under way has ended and has reached its medium.
    fn drain(&self, deadline: Instant) -> Result<(), UnitError>;

    /// Comes to rest: it touches no guest memory until [`Device::start`]. What could not end in time and has had no
    /// effect is carried as state; if it may have an effect later, this fails.
    fn stop(&self, deadline: Instant) -> Result<(), UnitError>;

    /// How far the rings it was given have been served, with their numbers. At rest.
    fn positions(&self) -> Vec<(u16, Position)>;
}

/// A virtio device behind a transport. There are no default implementations on purpose: a forgotten one would lose state.
///
/// Once [`activate`](Self::activate)d it serves its rings until [`reset`](Self::reset), except between
/// [`Serving::stop`] and [`start`](Self::start). It finds what was made available meanwhile without being rung again.
pub trait Device: Send + Sync {
    /// What it is.
    fn kind(&self) -> Kind;

    /// What it offers, with the features of rings but without those of the transport.
    fn features(&self) -> u64;

    /// The most entries of each ring: powers of two.
    fn ring_sizes(&self) -> &[u16];

    /// Reads its configuration; zeros behind the end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes its configuration.
    fn write_config(&self, offset: u64, data: &[u8]);

    /// The driver is ready: serves the rings from now on. After [`restore`](Self::restore) it first takes up what was under
    /// way. Guest memory may not be there yet: it must not be touched on this thread.
    fn activate(&self, activation: Activation) -> Result<(), UnitError>;

    /// Lets go of the rings, when what is under way has ended. Called by a vCPU.
    fn reset(&self);

    /// Whoever serves its rings.
    fn serving(&self) -> &dyn Serving;

    /// Serves on.
    fn start(&self);

    /// The driver has given a ring another vector while it is served: what signals [`Driver::ring_vector`] itself has to ask
    /// for it again.
    fn vector_changed(&self, ring: u16);

    /// Newest schema of its state.
    fn schema(&self) -> u32;

    /// Its state together with that of the transport. At rest.
    fn save(&self, transport: SavedTransport) -> Section;

    /// Takes what [`save`](Self::save) gave, and gives the transport its part.
    fn restore(&self, section: &Section) -> Result<SavedTransport, UnitError>;
}

/// Reads a part of a configuration; zeros behind its end.
pub(crate) fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    for (at, byte) in (offset as usize..).zip(data) {
        *byte = config.get(at).copied().unwrap_or(0);
    }
}
