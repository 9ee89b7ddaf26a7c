//! `wherry device`: processes that serve one device each for the VMs of other processes.
//!
//! - [`back_end`] are disks and network devices, which a vhost-user front end sets up; [`served`] makes a device of `wherry-virtio` one
//!   of those.
//! - [`accel`] is the accelerator, a PCI function that a vfio-user client sets up.
//! - [`testdma`] is a PCI function for tests, that a vfio-user client sets up.
//! - [`vfio_user`] is what the latter two have in common.
//! - [`process`] is what each process is beside its device, and how another one takes its place.

mod accel;
mod back_end;
pub mod process;
mod served;
pub mod testdma;
mod userfaults;
mod vfio_user;

use anyhow::{Context, Result};

use crate::args::{Device, DeviceCommand};

/// `wherry device`
pub fn device(options: &Device, log: &str) -> Result<u8> {
    match &options.command {
        DeviceCommand::Blk(options) => {
            process::serve(&options.sockets, log, |registry| back_end::blk(options, registry))
        }
        DeviceCommand::Net(options) => {
            process::serve(&options.sockets, log, |registry| back_end::net(options, registry))
        }
        DeviceCommand::Accel(options) => {
            process::serve(&options.sockets, log, |registry| accel::make(options, registry))
        }
        DeviceCommand::Testdma(options) => {
            process::serve(&options.sockets, log, |registry| testdma::make(options, registry))
        }
    }
}

/// Has SIGINT and SIGTERM end a server.
fn signals(stop: impl FnOnce() + Send + 'static) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = crate::runtime()?;
    let (mut interrupt, mut terminate) = {
        let _guard = runtime.enter();
        (
            signal(SignalKind::interrupt()).context("listening for SIGINT")?,
            signal(SignalKind::terminate()).context("listening for SIGTERM")?,
        )
    };
    let work = move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        stop();
    };
    std::thread::Builder::new().name("signals".into()).spawn(work).context("starting the thread for signals")?;
    Ok(())
}
