//! The accelerator, served to a vfio-user client.

use anyhow::{Context, Result};
use wherry_accel::catalogue::{Catalogue, Host};
use wherry_accel::function::{AccelFunction, Model};
use wherry_vfio_user::{Server, server};

use crate::HAPPENED;
use crate::args::DeviceAccel;

/// Serves clients, one after the other, until SIGINT or SIGTERM.
pub fn serve(options: &DeviceAccel) -> Result<u8> {
    let model = Model {
        catalogue: Catalogue::with_counts(options.engines).context("the engines of the device")?,
        host: Host::uniform(crate::accel::workers(options.workers)),
        fleet: None,
        keys: Vec::new(),
    };
    let mut function = AccelFunction::new(model)?;
    let server = Server::bind(&options.socket).with_context(|| format!("listening on {}", options.socket.display()))?;
    let mut host = server::Host::new(&function).context("setting up the server")?;
    let stop = host.stop();
    super::signals(move || stop.stop())?;
    server.serve(&mut host, &mut function).with_context(|| format!("serving {}", options.socket.display()))?;
    Ok(HAPPENED)
}
