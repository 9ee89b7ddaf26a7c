//! Keeps BARs and those who answer at their addresses in step.

use std::sync::Arc;

use super::config::ConfigSpace;
use crate::bus::{Bus, BusDevice, BusError};

/// What is behind a BAR.
pub trait BarTarget: Send + Sync {
    /// The BAR answers at this address from now on. If that fails, it answers nowhere until the guest moves it.
    fn map(&self, address: u64, size: u64) -> Result<(), BusError>;

    /// The BAR answers at this address no longer.
    fn unmap(&self, address: u64);
}

/// A BAR whose accesses go to a device on a bus.
pub struct BusBar {
    /// The bus: ports or memory, as the BAR's kind.
    pub bus: Arc<Bus>,
    /// The device.
    pub device: Arc<dyn BusDevice>,
}

impl BarTarget for BusBar {
    fn map(&self, address: u64, size: u64) -> Result<(), BusError> {
        self.bus.insert(address, size, self.device.clone())
    }

    fn unmap(&self, address: u64) {
        // It was inserted by `map`; if it is gone, it answers nowhere already.
        let _ = self.bus.remove(address);
    }
}

/// The targets of one function's BARs.
#[derive(Default)]
pub struct BarMap {
    targets: [Option<Arc<dyn BarTarget>>; 6],
    /// Where each is mapped now, and what was last refused, so that it is not tried again at each write.
    mapped: [Option<u64>; 6],
    refused: [Option<u64>; 6],
}

impl BarMap {
    /// Says what is behind a BAR; indices above 5 do not exist and are ignored.
    pub fn set_target(&mut self, index: usize, target: Arc<dyn BarTarget>) {
        if let Some(slot) = self.targets.get_mut(index) {
            *slot = Some(target);
        }
    }

    /// Makes mappings what the configuration space says. To be called after each write that reports a change.
    pub fn follow(&mut self, config: &ConfigSpace) {
        for (index, target) in self.targets.iter().enumerate() {
            if let (Some(target), Some(at)) = (target, self.mapped[index])
                && config.bar_address(index) != Some(at)
            {
                target.unmap(at);
                self.mapped[index] = None;
            }
        }
        for (index, _, size) in config.bars() {
            let (Some(target), Some(address)) = (&self.targets[index], config.bar_address(index)) else {
                self.refused[index] = None;
                continue;
            };
            if self.mapped[index].is_some() || self.refused[index] == Some(address) {
                continue;
            }
            match target.map(address, size) {
                Ok(()) => (self.mapped[index], self.refused[index]) = (Some(address), None),
                Err(error) => {
                    tracing::debug!("BAR {index} answers nowhere: {error}");
                    self.refused[index] = Some(address);
                }
            }
        }
    }

    /// Unmaps everything, for a device that leaves.
    pub fn unmap_all(&mut self) {
        for (target, mapped) in self.targets.iter().zip(&mut self.mapped) {
            if let (Some(target), Some(at)) = (target, mapped.take()) {
                target.unmap(at);
            }
        }
    }
}
