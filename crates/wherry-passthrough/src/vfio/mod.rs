//! Functions of this host, by the kernel's VFIO (`linux/vfio.h`).
//!
//! - [`VfioHost`] opens them for one machine; [`Vfio`] is one, and an [`Owner`](crate::Owner) like any other.
//! - `space` is what all of them read and write: guest memory, pinned, by a container (`type1`) or by `iommufd`.
//! - `device` asks what a function is, and is it; `features` is what the driver of a function can do beyond that: its migration, and the
//!   log of what it writes.
//! - `sysfs` finds out why a function cannot be used, and `error` says what can be done about that.
//! - `kernel` is the system calls, which a test may answer.
//!
//! In a live update descriptors go over as they are: container or iommufd, group, function, and the eventfds of its interrupts, which
//! nobody sets anew. Only the kernel's notion of who has the memory changes: see [`Space`](space::Space).

mod address;
mod device;
mod error;
mod features;
mod host;
mod iommufd;
mod kernel;
mod saved;
mod space;
mod sysfs;
mod type1;

pub use address::{BadAddress, HostAddress};
pub use device::Vfio;
pub use error::VfioError;
pub use host::VfioHost;
pub use kernel::Kernel;
pub use sysfs::Places;
