//! Who makes the workers of a function work, and by which clock: threads in real time, or somebody else.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::{Bells, Listener, Workers};
use crate::clock::{Clock, RealClock};
use crate::device::Device;

/// Has somebody work on devices.
pub trait Drive: Send {
    /// The clock of a device.
    fn clock(&self) -> Arc<dyn Clock>;

    /// Has somebody work on a device, and listen to its bells, until the value is dropped.
    fn start(&self, device: &Arc<Device>, bells: &Bells) -> io::Result<Box<dyn Driven>>;
}

/// Somebody works on a device; nobody does any more when this is dropped.
pub trait Driven: Send {
    /// The device goes on after a stop.
    fn resumed(&self);

    /// A bell is rung by a message.
    fn ring(&self, bell: u32);
}

/// Threads of this process: [`Workers`] and a [`Listener`].
#[derive(Clone, Copy, Debug)]
pub struct RealTime {
    /// How long a polled ring is looked at after the latest descriptor.
    pub patience: Duration,
}

struct Threads {
    // Ended first: it hands work to the others.
    listener: Listener,
    _workers: Workers,
}

impl Driven for Threads {
    fn resumed(&self) {
        self.listener.resumed();
    }

    fn ring(&self, bell: u32) {
        self.listener.ring(bell);
    }
}

impl Drive for RealTime {
    fn clock(&self) -> Arc<dyn Clock> {
        Arc::new(RealClock::default())
    }

    fn start(&self, device: &Arc<Device>, bells: &Bells) -> io::Result<Box<dyn Driven>> {
        let listener = Listener::start(device.clone(), bells.clone(), self.patience)?;
        Ok(Box::new(Threads { listener, _workers: Workers::start(device.clone())? }))
    }
}
