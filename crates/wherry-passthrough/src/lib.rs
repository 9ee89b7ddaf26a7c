//! PCI functions that somebody else owns: a process that speaks vfio-user, or the kernel's VFIO.
//!
//! - [`Owner`] is what is asked of whoever owns a function; [`VfioUser`] asks it of another process,
//!   [`vfio::Vfio`] of the kernel.
//! - [`Function`] is the function on the bus of a machine. Its configuration space is partly ours (BARs, interrupts, the
//!   command register) and partly the device's; its BARs are mapped into the guest where that is possible and answered by
//!   messages where it is not; its interrupts go from the device's eventfd to the hypervisor.
//! - `attention` hears what an owner signals that is not the guest's: that the function has failed, or is wanted back.
//! - [`DmaLog`] is what the device writes, as a dirty source.
//! - `unit` and `worker` are its migration: the states of `enum vfio_device_mig_state`, on a thread for each device, so that
//!   several devices stop, save and load side by side. [`Gathering`] is where loading is waited for.
//! - `stream` is the device's own state, a [`StateStream`](wherry_state::StateStream): in pieces, of which the first can go while
//!   the device runs (`PRE_COPY`).
//! - `postcopy` has a device wait for pages that are missing, if it can.
//! - In a live update the next process goes on with the device, which runs meanwhile: [`Owner::keep`] and [`Owner::rest`] here,
//!   [`VfioUser::inherit`] there.
//!
//! Contract: the owner is hostile. What it says is checked before it is used; what it does not answer in time is an error with
//! its name; when it goes the guest reads ones, and the machine lives on.
//!
//! Locks: `Function::registers` is held while a guest's access to configuration space is answered, which asks the owner.
//! Accesses to BARs do not take it. The worker takes it only at rest.
//!
//! Nothing here knows KVM.

mod attention;
mod bars;
mod config;
mod function;
mod identity;
mod interrupts;
mod log;
mod owner;
mod pieces;
mod postcopy;
pub mod saved;
mod stream;
mod unit;
pub mod vfio;
mod vfio_user;
mod worker;

pub use attention::GiveBack;
pub use bars::{DeviceMemory, GuestMaps};
pub use function::{Function, HypervisorFiles, PassthroughError, PassthroughParts};
pub use identity::FunctionIdentity;
pub use log::DmaLog;
pub use owner::{Attention, Bell, Facts, Irq, MigrationFacts, Owner, OwnerError, RegionFacts};
pub use unit::Gathering;
pub use vfio_user::VfioUser;
pub use wherry_vfio_user::State;
pub use worker::Crew;

/// A function of another process: name of the state unit, and in descriptions.
pub const VFIO_USER: &str = "vfio-user";
/// A function of this host, which the kernel has, likewise.
pub const VFIO: &str = "vfio";
