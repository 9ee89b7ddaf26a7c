//! Disks and network devices that are served to vhost-user front ends.

use std::process::exit;
use std::sync::Arc;

use anyhow::{Context, Result};
use wherry_backend::{BackendError, Server, kept};
use wherry_handover::{KeptId, Registry};
use wherry_virtio::blk::{Image, ImageFormat};
use wherry_virtio::net::Tap;

use super::process::{Begun, Made, Unit};
use super::served::Served;
use crate::DID_NOT;
use crate::args::{DeviceBlk, DeviceNet};

/// Names of what the devices are connected to, among what outlives the process.
const DISK: &str = "disk";
const TAP: &str = "tap";

/// A disk.
pub fn blk(options: &DeviceBlk, registry: &Registry) -> Result<Made> {
    let (path, read_only) = (&options.image.path, options.image.read_only);
    let adopt = |fd| Ok(Image::adopt(fd, path, read_only, ImageFormat::Raw)?);
    let open = || Ok(Image::open(path, read_only)?);
    let image = registry.obtain::<_, anyhow::Error>(KeptId::new(DISK, 0), adopt, open)?;
    let device = Arc::new(Served::blk(image).context("making the disk")?);
    let its = device.clone();
    hangups(move || its.look_again())?;
    Ok(made(device))
}

/// A network device.
pub fn net(options: &DeviceNet, registry: &Registry) -> Result<Made> {
    let adopt = |fd| Ok(Tap::adopt(fd, &options.tap));
    let open = || Ok(Tap::open(&options.tap)?);
    let tap = registry.obtain::<_, anyhow::Error>(KeptId::new(TAP, 0), adopt, open)?;
    Ok(made(Arc::new(Served::net(tap, options.mac).context("making the network device")?)))
}

fn made(device: Arc<Served>) -> Made {
    let its = device.clone();
    Made {
        unit: Unit { name: "back-end", schema: kept::SCHEMA },
        offer: kept::offer(&*device),
        fits: Box::new(move |told| kept::check(&*its, told)),
        begin: Box::new(move |listener| {
            let server = Arc::new(Server::on(listener)?);
            let (rest, stopped) = (server.rest(), server.clone());
            let run = move || match server.run(&*device) {
                Err(error @ BackendError::Abandoned(_)) => {
                    eprintln!("error: {error}");
                    wherry_socket::remove_all();
                    // The device's thread cannot be waited for.
                    exit(DID_NOT.into())
                }
                served => Ok(served?),
            };
            Ok(Begun { rest, stop: Box::new(move || stopped.stop()), run: Box::new(run) })
        }),
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
