//! Everything that migrates, as the state unit `accel`.
//!
//! - [`saved`]: the types that are saved, apart from those the device runs with.
//! - [`save`], [`restore`]: from one to the other. What is restored is checked as a whole before the device changes.
//! - this file: the state unit.
//!
//! Not saved: which worker an engine has, which sibling a slot preferred, what is on which engine. A request that was
//! running is saved as ready, before those of its priority that wait; how far it has come is in its lanes.

mod restore;
mod save;
pub mod saved;

use std::sync::Arc;
use std::time::Instant;

use wherry_state::{Saved, SavedState, Section, StateUnit, UnitError, UnitId};

use crate::device::Device;
use crate::keys::FleetKey;

pub use restore::RestoreError;

/// Name of the unit.
pub const UNIT: &str = "accel";

/// A device as a state unit.
#[derive(Debug)]
pub struct AccelUnit {
    device: Arc<Device>,
    fleet: Option<FleetKey>,
    instance: u32,
}

impl AccelUnit {
    /// The unit of a device. Without the fleet key it can take no state that has keys.
    pub fn new(device: Arc<Device>, fleet: Option<FleetKey>, instance: u32) -> Self {
        Self { device, fleet, instance }
    }
}

impl StateUnit for AccelUnit {
    fn id(&self) -> UnitId {
        UnitId::new(UNIT, self.instance)
    }

    fn depends_on(&self) -> &[&str] {
        &[]
    }

    fn schema(&self) -> u32 {
        saved::SavedDevice::SCHEMA
    }

    /// Nothing: work that is under way stops half-way and goes on at the destination.
    fn drain(&self, _deadline: Instant) -> Result<(), UnitError> {
        Ok(())
    }

    fn undrain(&self) -> Result<(), UnitError> {
        Ok(())
    }

    fn begin_stop(&self) -> Result<(), UnitError> {
        self.device.begin_stop();
        Ok(())
    }

    fn finish_stop(&self, deadline: Instant) -> Result<(), UnitError> {
        match self.device.stop(deadline) {
            true => Ok(()),
            false => Err(UnitError::Deadline("a worker of the accelerator has not given back its work".into())),
        }
    }

    fn save(&self) -> Result<Saved, UnitError> {
        Ok(Saved::Section(self.device.save().to_section(&self.id())))
    }

    fn restore(&self, section: &Section) -> Result<(), UnitError> {
        let saved = saved::SavedDevice::from_section(section)?;
        self.device.restore(&saved, self.fleet.as_ref()).map_err(UnitError::failed)
    }

    fn start(&self) -> Result<(), UnitError> {
        self.device.resume();
        // What was rung while it stood still.
        self.device.ring_all();
        Ok(())
    }
}
