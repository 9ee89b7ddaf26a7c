//! The accelerator, served to a vfio-user client. It takes part in postcopy, and has the keys that its operator gives.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use wherry_accel::catalogue::{Catalogue, Host};
use wherry_accel::drive::{Bells, RealTime};
use wherry_accel::function::{AccelFunction, Model};
use wherry_handover::{KeptId, Registry};
use wherry_vfio_user::server;

use crate::args::DeviceAccel;
use crate::device::process::Made;
use crate::device::userfaults::ProcessFaults;
use crate::device::vfio_user;

/// Makes the device.
pub fn make(options: &DeviceAccel, registry: &Registry) -> Result<Made> {
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
    let bell = |number| registry.obtain::<_, io::Error>(KeptId::new("accel/bell", number), Ok, Bells::event);
    let device = AccelFunction::with_bells(model, Bells::of(bell).context("making the doorbells")?)?;
    let mut host = server::Host::new(&device).context("setting up the server")?;
    host.set_userfaults(Box::new(ProcessFaults::default()));
    Ok(vfio_user::made(host, Box::new(device), None))
}
