//! Doorbells: addresses where a write means no more than that there is work.

use std::io;
use std::os::fd::AsRawFd;

/// Which writes ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// The memory address.
    pub address: u64,
    /// Bytes of such a write: 1, 2, 4, 8, or 0 for any.
    pub len: u32,
    /// What has to be written, if not everything rings.
    pub data: Option<u64>,
}

impl Doorbell {
    /// Rung by any write to an address.
    pub fn at(address: u64) -> Self {
        Self { address, len: 0, data: None }
    }
}

/// What a hypervisor does for doorbells, so that a write to one costs the vCPU no way out to the VMM.
pub trait Doorbells: Send + Sync {
    /// From now on such a write writes to the eventfd, and reaches no device of the bus. Where that is refused, the bus still
    /// has the device.
    fn attach(&self, bell: Doorbell, event: &dyn AsRawFd) -> io::Result<()>;

    /// Ends it.
    fn detach(&self, bell: Doorbell, event: &dyn AsRawFd) -> io::Result<()>;
}
