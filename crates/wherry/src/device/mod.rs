//! `wherry device`: processes that serve one device each for the VMs of other processes.
//!
//! - [`served`] makes a device of `wherry-virtio` one that a vhost-user front end sets up.
//! - [`accel`] is the accelerator, a PCI function that a vfio-user client sets up.
//! - [`testdma`] is a PCI function for tests, that a vfio-user client sets up.
//! - [`process`] is what a process of the latter two is beside its device, and how another one takes its place.

mod accel;
pub mod process;
mod served;
pub mod testdma;
mod userfaults;

use std::path::Path;
use std::process::exit;
use std::sync::Arc;

use anyhow::{Context, Result};
use wherry_backend::{BackendError, Server};
use wherry_virtio::blk::Image;
use wherry_virtio::net::Tap;

use self::process::Sockets;
use self::served::Served;
use crate::args::{Device, DeviceBlk, DeviceCommand, DeviceNet};
use crate::{DID_NOT, HAPPENED};

/// `wherry device`
pub fn device(options: &Device, log: &str) -> Result<u8> {
    match &options.command {
        DeviceCommand::Blk(options) => blk(options),
        DeviceCommand::Net(options) => net(options),
        DeviceCommand::Accel(options) => {
            let sockets = Sockets {
                socket: &options.socket,
                control: options.control.as_deref(),
                parent: crate::host::die_with(options.die_with)?,
            };
            process::serve(sockets, log, |registry| accel::make(options, registry))
        }
        DeviceCommand::Testdma(options) => {
            let sockets = Sockets { socket: &options.socket, control: options.control.as_deref(), parent: None };
            process::serve(sockets, log, |registry| testdma::make(options, registry))
        }
    }
}

fn blk(options: &DeviceBlk) -> Result<u8> {
    let image = Arc::new(Image::open(&options.image.path, options.image.read_only)?);
    let device = Arc::new(Served::blk(image).context("making the disk")?);
    let its = device.clone();
    hangups(move || its.look_again())?;
    serve(&options.socket, &device)
}

fn net(options: &DeviceNet) -> Result<u8> {
    let tap = Arc::new(Tap::open(&options.tap)?);
    serve(&options.socket, &Served::net(tap, options.mac).context("making the network device")?)
}

/// Serves front ends until SIGINT or SIGTERM.
fn serve(socket: &Path, device: &Served) -> Result<u8> {
    let server = Arc::new(Server::bind(socket)?);
    let signalled = server.clone();
    signals(move || signalled.stop())?;
    match server.run(device) {
        Ok(()) => Ok(HAPPENED),
        Err(error @ BackendError::Abandoned(_)) => {
            eprintln!("error: {error}");
            server.remove();
            // The device's thread cannot be waited for.
            exit(DID_NOT.into())
        }
        Err(error) => Err(error.into()),
    }
}

/// Has each SIGHUP do something, rather than end the process.
fn hangups(mut work: impl FnMut() + Send + 'static) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = crate::runtime()?;
    let mut hangup = {
        let _guard = runtime.enter();
        signal(SignalKind::hangup()).context("listening for SIGHUP")?
    };
    let wait = move || {
        runtime.block_on(async {
            while hangup.recv().await.is_some() {
                work();
            }
        });
    };
    std::thread::Builder::new().name("hangups".into()).spawn(wait).context("starting the thread for SIGHUP")?;
    Ok(())
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
