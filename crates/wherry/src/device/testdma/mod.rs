//! `wherry device testdma`: a PCI function that does DMA into guest RAM, for tests of whoever runs it in a VM and moves that VM.
//!
//! - [`function`]: the PCI function and the thread `testdma`, which does the DMA;
//! - [`engine`]: what the thread does, step by step;
//! - [`migration`], [`stream`], [`saved`]: its state, on its way, as bytes, as fields;
//! - [`faults`], [`mischief`]: what it does wrong on purpose;
//! - [`options`]: how much it does, and what it is.
//!
//! docs/testdma.md is its manual; `wherry_guest::testdma` has the numbers, which the driver of the probe guest has, too.
//!
//! Two threads: the server's, which answers messages, and the device's. Both take the engine's lock, the server's first when both
//! want it; under it the locks of [`wherry_vfio_user::Bus`] are taken, never the other way round.

mod engine;
pub mod faults;
mod function;
mod migration;
mod mischief;
pub mod options;
mod saved;
mod stream;

use anyhow::{Context, Result};
use wherry_handover::Registry;
use wherry_vfio_user::server::Host;

use self::faults::Faults;
use self::function::Testdma;
use crate::args::DeviceTestdma;
use crate::device::process::Made;
use crate::device::userfaults::ProcessFaults;
use crate::device::vfio_user;

/// Makes the device; in the end it says on stdout what was done.
pub fn make(options: &DeviceTestdma, registry: &Registry) -> Result<Made> {
    let mut device = Testdma::new(options.shape(), options.load(), Faults::new(&options.fault), registry)?;
    let mut host = Host::new(&device).context("setting up the server")?;
    host.set_userfaults(Box::new(ProcessFaults::default()));
    let stop = host.stop();
    device.mischief.set_stop(stop);
    let mischief = device.mischief.clone();
    host.set_watcher(Box::new(move |command, moment| mischief.watch(command, moment)));
    device.start(host.bus().clone())?;
    let core = device.core().clone();
    Ok(vfio_user::made(host, Box::new(device), Some(Box::new(move || core.summary()))))
}
