//! What a device implements, and what it is given.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwapOption;
use vmm_sys_util::eventfd::EventFd;
use wherry_memory::GuestMemory;

use crate::InFlight;

/// A ring that a device is to serve. Addresses are those of the guest.
pub struct RingGiven {
    /// Its number.
    pub index: u16,
    /// Entries, a power of two.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring, which the driver writes.
    pub available: u64,
    /// Used ring, which the device writes. How far it has been used stands in it.
    pub used: u64,
    /// Next entry of the available ring to take. With `in_flight` it is what the used ring says, and what is left comes first.
    pub next: u16,
    /// Readable when the driver has made something available.
    pub kick: Arc<EventFd>,
    /// Where the requests under way are noted, if the front end keeps them.
    pub in_flight: Option<Arc<InFlight>>,
}

/// How the driver of a device is told.
#[derive(Debug)]
pub struct Driver {
    calls: Vec<ArcSwapOption<EventFd>>,
    errors: Vec<ArcSwapOption<EventFd>>,
}

impl Driver {
    pub(crate) fn new(rings: u16) -> Self {
        let none = || (0..rings).map(|_| ArcSwapOption::empty()).collect();
        Self { calls: none(), errors: none() }
    }

    pub(crate) fn set_call(&self, ring: u16, event: Option<Arc<EventFd>>) {
        if let Some(call) = self.calls.get(usize::from(ring)) {
            call.store(event);
        }
    }

    pub(crate) fn call(&self, ring: u16) -> Option<Arc<EventFd>> {
        self.calls.get(usize::from(ring)).and_then(|call| call.load_full())
    }

    pub(crate) fn error(&self, ring: u16) -> Option<Arc<EventFd>> {
        self.errors.get(usize::from(ring)).and_then(|error| error.load_full())
    }

    pub(crate) fn set_error(&self, ring: u16, event: Option<Arc<EventFd>>) {
        if let Some(error) = self.errors.get(usize::from(ring)) {
            error.store(event);
        }
    }

    /// Something in this ring was used.
    pub fn ring(&self, index: u16) {
        if let Some(event) = self.call(index) {
            // It fails only if the counter is full: then nobody has listened for very long.
            let _ = event.write(1);
        }
    }

    /// The device does nothing more until it is set up anew.
    pub fn failed(&self, what: &str, why: &dyn Display) {
        tracing::error!(%why, "{what}");
        for event in self.errors.iter().filter_map(|error| error.load_full()) {
            let _ = event.write(1);
        }
    }
}

/// A device whose rings a front end of another process sets up. There are no default implementations on purpose.
pub trait Device: Send + Sync {
    /// What it is called in the log.
    fn name(&self) -> &str;

    /// Features of the device type and of rings, without those of the transport and of the protocol.
    fn features(&self) -> u64;

    /// How many rings it has, and the most entries of each.
    fn rings(&self) -> (u16, u16);

    /// Its configuration.
    fn config(&self) -> Vec<u8>;

    /// Becomes readable when the configuration is another one, of itself; none if that never happens. Whoever serves the
    /// device reads it, and tells the front end.
    fn changed(&self) -> Option<&EventFd>;

    /// A driver has written its configuration.
    fn write_config(&self, offset: u32, content: &[u8]) -> Result<(), String>;

    /// Serves these rings from now on. It is at rest when this is called.
    fn serve(
        &self,
        memory: GuestMemory,
        features: u64,
        rings: Vec<RingGiven>,
        driver: Arc<Driver>,
    ) -> Result<(), String>;

    /// Comes to rest: everything that was taken has been done, and no guest memory is touched until
    /// [`serve`](Self::serve). Fails if that is not so by the deadline; it goes on coming to rest then. Each ring that was
    /// served, and the entry of the available ring with which to go on.
    fn rest(&self, deadline: Instant) -> Result<Vec<(u16, u16)>, String>;

    /// [`rest`](Self::rest) for another process of this host, which goes on with the same files at once: what was written may
    /// still be on its way to the medium.
    fn pause(&self, deadline: Instant) -> Result<Vec<(u16, u16)>, String>;

    /// Serves on, after it has failed to come to rest.
    fn go_on(&self);

    /// Rings were served, and none is now: others may use what belongs to the device.
    fn release(&self);

    /// Tells the network where the guest is now, with its address. For network devices.
    fn announce(&self, address: [u8; 6]) -> Result<(), String>;

    /// Its state, for a device of the same kind elsewhere. At rest.
    fn save(&self) -> Vec<u8>;

    /// Takes the state of such a device. At rest.
    fn restore(&self, state: &[u8]) -> Result<(), String>;

    /// What a device in another process of this host has to know that goes on with what this one is connected to. At rest.
    fn keep(&self) -> Vec<u8>;

    /// Takes what [`keep`](Self::keep) gave. At rest; what it is connected to is still in use by the other process.
    fn take(&self, kept: &[u8]) -> Result<(), String>;
}
