//! Doorbells: addresses where a write means no more than that there is work.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// What a hypervisor does for doorbells, so that a write to one costs the vCPU no way out to the VMM.
pub trait Doorbells: Send + Sync {
    /// From now on a write of any size to the memory address writes to the eventfd, and reaches no device of the bus. Where
    /// that is refused, the bus still has the device.
    fn attach(&self, address: u64, event: &EventFd) -> io::Result<()>;

    /// Ends it.
    fn detach(&self, address: u64, event: &EventFd) -> io::Result<()>;
}
