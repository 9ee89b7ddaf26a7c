//! MSI (PCI Express 4.0, section 7.7.1): up to 32 vectors that share one message, in configuration space alone.

use std::sync::Arc;

use wherry_interrupt::{InterruptError, Message, Router, Setting, Vector, Vectors};

use crate::config::{ConfigError, ConfigSpace};

const CAPABILITY: u8 = 5;
/// Message control: enable, log2 of the vectors that there are and that are used, 64-bit address, masks.
const ENABLE: u16 = 1;
const CAPABLE_SHIFT: u16 = 1;
const USED_SHIFT: u16 = 4;
const WIDE: u16 = 1 << 7;
const MASKS: u16 = 1 << 8;
/// Offsets in the capability, of the form with 64-bit addresses and masks.
const CONTROL: u16 = 2;
const ADDRESS: u16 = 4;
const DATA: u16 = 12;
const MASK: u16 = 16;
const PENDING: u16 = 20;

/// The capability and its vectors. All that the guest sets is in configuration space, and is saved with it.
pub struct Msi {
    vectors: Vectors,
    at: u16,
}

/// MSI cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum MsiError {
    /// There is no such capability.
    #[error("MSI cannot have {0} vectors: 1, 2, 4, 8, 16 or 32")]
    Impossible(u16),
    /// Configuration space has no room for it.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The hypervisor refused something.
    #[error(transparent)]
    Interrupt(#[from] InterruptError),
}

impl Msi {
    /// Adds the capability, with a 64-bit address and masks, switched off.
    pub fn new(router: Arc<dyn Router>, count: u16, config: &mut ConfigSpace) -> Result<Self, MsiError> {
        if !count.is_power_of_two() || count > 32 {
            return Err(MsiError::Impossible(count));
        }
        let capable = count.ilog2() as u16;
        let mut body = [0; 22];
        body[0..2].copy_from_slice(&(capable << CAPABLE_SHIFT | WIDE | MASKS).to_le_bytes());
        let mut writable = [0; 22];
        writable[0..2].copy_from_slice(&(ENABLE | 7 << USED_SHIFT).to_le_bytes());
        writable[2..10].copy_from_slice(&(!3u64).to_le_bytes());
        writable[10..12].fill(0xff);
        writable[14..18].copy_from_slice(&(((1u64 << count) - 1) as u32).to_le_bytes());
        let at = config.add_capability(CAPABILITY, &body, &writable)?;
        Ok(Self { vectors: Vectors::new(router, count)?, at })
    }

    /// The vectors.
    pub fn vectors(&self) -> &Vectors {
        &self.vectors
    }

    /// The vector that interrupt `index` of the function has now: the guest may use fewer than there are, and then several
    /// share one.
    pub fn vector(&self, index: u16, config: &ConfigSpace) -> Option<&Arc<Vector>> {
        self.vectors.get(usize::from(index % self.used(config)))
    }

    /// Whether the guest has switched it on: then the function does not use its pin.
    pub fn enabled(&self, config: &ConfigSpace) -> bool {
        config.word(self.at + CONTROL) & ENABLE != 0
    }

    fn used(&self, config: &ConfigSpace) -> u16 {
        let asked = 1 << (config.word(self.at + CONTROL) >> USED_SHIFT & 7).min(5);
        (self.vectors.len() as u16).min(asked)
    }

    /// To be called after each write to configuration space, and when it was restored.
    pub fn follow(&self, config: &ConfigSpace) {
        let enabled = self.enabled(config);
        let used = self.used(config);
        let address = u64::from(config.dword(self.at + ADDRESS)) | u64::from(config.dword(self.at + ADDRESS + 4)) << 32;
        // The low bits of the data tell the vector.
        let data = u32::from(config.word(self.at + DATA) & !(used - 1));
        let mask = config.dword(self.at + MASK);
        let settings: Vec<_> = (0..self.vectors.len() as u16)
            .map(|index| Setting {
                message: Message { address, data: data | u32::from(index) },
                open: enabled && index < used && mask & 1 << index == 0,
            })
            .collect();
        if let Err(error) = self.vectors.set(&settings) {
            tracing::error!(%error, "setting MSI vectors");
        }
    }

    /// To be called before configuration space is read or saved: brings the pending bits up to date.
    pub fn show_pending(&self, config: &mut ConfigSpace) {
        let pending = (0..self.vectors.len()).filter(|i| self.vectors.get(*i).is_some_and(|vector| vector.pending()));
        let bits = pending.fold(0u32, |bits, index| bits | 1 << index);
        let at = usize::from(self.at + PENDING);
        config.bytes_mut()[at..at + 4].copy_from_slice(&bits.to_le_bytes());
    }
}
