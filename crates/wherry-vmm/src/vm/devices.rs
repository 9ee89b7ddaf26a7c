//! The devices every machine has, and their buses.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use wherry_memory::{GuestMemory, Ram};
use wherry_state::StateUnit;

use super::{ExitNotice, VmError};
use crate::bus::Bus;
use crate::config::SerialTarget;
use crate::vcpu::Buses;

/// What the devices of a machine are connected to on this host.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// Where the first serial port leads.
    pub serial: SerialTarget,
}

/// The devices of a machine.
pub struct Devices {
    buses: Buses,
    units: Vec<Arc<dyn StateUnit>>,
}

impl Devices {
    pub(super) fn make(
        _config: &DeviceConfig,
        _vm: &Arc<VmFd>,
        _ram: &Arc<Ram>,
        _notice: &ExitNotice,
    ) -> Result<Self, VmError> {
        let buses = Buses { pio: Arc::new(Bus::new()), mmio: Arc::new(Bus::new()) };
        Ok(Self { buses, units: Vec::new() })
    }

    pub(super) fn buses(&self) -> &Buses {
        &self.buses
    }

    pub(super) fn units(&self) -> &[Arc<dyn StateUnit>] {
        &self.units
    }

    /// Writes the tables that tell the guest of its hardware; where they begin.
    pub(super) fn write_tables(&self, _memory: &GuestMemory, _cpus: u32) -> Result<Option<u64>, VmError> {
        Ok(None)
    }
}
