//! The accelerator, served to a vfio-user client. It takes part in postcopy, and has the keys that its operator gives.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use wherry_accel::catalogue::{Catalogue, Host};
use wherry_accel::drive::RealTime;
use wherry_accel::function::{AccelFunction, Model};
use wherry_vfio_user::{Server, server};

use crate::HAPPENED;
use crate::args::DeviceAccel;
use crate::device::userfaults::ProcessFaults;

/// Serves clients, one after the other, until SIGINT or SIGTERM.
pub fn serve(options: &DeviceAccel) -> Result<u8> {
    crate::host::die_with(options.die_with)?;
    let given = crate::accel::secret::given(options)?;
    let model = Model {
        catalogue: Catalogue::with_counts(options.engines).context("the engines of the device")?,
        host: Host::uniform(crate::accel::workers(options.workers)),
        drive: Box::new(RealTime { patience: Duration::from_micros(options.poll.into()) }),
        privileged: Arc::new(options.privileged.into()),
        seed: std::process::id().into(),
        fleet: given.fleet,
        keys: given.keys,
    };
    let mut function = AccelFunction::new(model)?;
    let server = Server::bind(&options.socket).with_context(|| format!("listening on {}", options.socket.display()))?;
    let mut host = server::Host::new(&function).context("setting up the server")?;
    host.set_userfaults(Box::new(ProcessFaults::default()));
    let stop = host.stop();
    super::signals(move || stop.stop())?;
    server.serve(&mut host, &mut function).with_context(|| format!("serving {}", options.socket.display()))?;
    Ok(HAPPENED)
}
