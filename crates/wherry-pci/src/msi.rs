//! MSI (PCI Express 4.0, section 7.7.1): up to 32 vectors that share one message, in configuration space alone.

use std::sync::Arc;

use wherry_interrupt::{Events, InterruptError, Message, Router, Setting, Vector, Vectors};

use crate::config::{ConfigError, ConfigSpace};

const CAPABILITY: u8 = 5;
/// Message control: enable, log2 of the vectors that there are and that are used, 64-bit address, masks.
const ENABLE: u16 = 1;
const CAPABLE_SHIFT: u16 = 1;
const USED_SHIFT: u16 = 4;
const WIDE: u16 = 1 << 7;
const MASKS: u16 = 1 << 8;
/// Offsets in the capability, in every form.
const CONTROL: u16 = 2;
const ADDRESS: u16 = 4;

/// Which form the capability has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiForm {
    /// Addresses of 64 bits.
    pub wide: bool,
    /// A mask and a pending bit for each vector.
    pub masks: bool,
}

impl MsiForm {
    /// With all that there is.
    pub const WHOLE: Self = Self { wide: true, masks: true };

    /// Vectors and form as a message control register tells them.
    pub fn of_control(control: u16) -> (u16, Self) {
        let count = 1 << (control >> CAPABLE_SHIFT & 7).min(5);
        (count, Self { wide: control & WIDE != 0, masks: control & MASKS != 0 })
    }

    fn data(self) -> u16 {
        if self.wide { 12 } else { 8 }
    }

    fn mask(self) -> u16 {
        self.data() + 4
    }

    fn pending(self) -> u16 {
        self.mask() + 4
    }

    /// Bytes of the capability.
    pub fn bytes(self) -> u16 {
        if self.masks { self.pending() + 4 } else { self.data() + 2 }
    }
}

/// The capability and its vectors. All that the guest sets is in configuration space, and is saved with it.
pub struct Msi {
    vectors: Vectors,
    form: MsiForm,
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
    /// Adds the capability, or puts it in the place of the one that the function has already; switched off.
    pub fn new(
        router: Arc<dyn Router>,
        events: &Events,
        count: u16,
        form: MsiForm,
        config: &mut ConfigSpace,
    ) -> Result<Self, MsiError> {
        if !count.is_power_of_two() || count > 32 {
            return Err(MsiError::Impossible(count));
        }
        let capable = count.ilog2() as u16;
        let flags = if form.wide { WIDE } else { 0 } | if form.masks { MASKS } else { 0 };
        let len = usize::from(form.bytes());
        let (mut bytes, mut writable) = (vec![0; len], vec![0; len]);
        let put = |into: &mut Vec<u8>, at: u16, value: &[u8]| {
            into[usize::from(at)..][..value.len()].copy_from_slice(value);
        };
        put(&mut bytes, CONTROL, &(capable << CAPABLE_SHIFT | flags).to_le_bytes());
        put(&mut writable, CONTROL, &(ENABLE | 7 << USED_SHIFT).to_le_bytes());
        let address_bits = (!3u64).to_le_bytes();
        put(&mut writable, ADDRESS, &address_bits[..if form.wide { 8 } else { 4 }]);
        put(&mut writable, form.data(), &[0xff; 2]);
        if form.masks {
            put(&mut writable, form.mask(), &(((1u64 << count) - 1) as u32).to_le_bytes());
        }
        let at = config.replace_capability(CAPABILITY, &bytes[2..], &writable[2..])?;
        Ok(Self { vectors: Vectors::new(router, events, count)?, form, at })
    }

    /// Where it is in configuration space: its first byte, and its length.
    pub fn place(&self) -> (u16, u16) {
        (self.at, self.form.bytes())
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

    /// Vectors that the guest uses: a power of two.
    pub fn used(&self, config: &ConfigSpace) -> u16 {
        let asked = 1 << (config.word(self.at + CONTROL) >> USED_SHIFT & 7).min(5);
        (self.vectors.len() as u16).min(asked)
    }

    /// To be called after each write to configuration space, and when it was restored.
    pub fn follow(&self, config: &ConfigSpace) {
        let enabled = self.enabled(config);
        let used = self.used(config);
        let upper = if self.form.wide { u64::from(config.dword(self.at + ADDRESS + 4)) << 32 } else { 0 };
        let address = u64::from(config.dword(self.at + ADDRESS)) | upper;
        // The low bits of the data tell the vector.
        let data = u32::from(config.word(self.at + self.form.data()) & !(used - 1));
        let mask = if self.form.masks { config.dword(self.at + self.form.mask()) } else { 0 };
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

    /// Switches it off and clears it, as a reset of the function does.
    pub fn reset(&self, config: &mut ConfigSpace) {
        config.write(self.at + 2, &vec![0; usize::from(self.form.bytes()) - 2]);
        self.follow(config);
        self.vectors.forget_pending();
    }

    /// To be called before configuration space is read or saved: brings the pending bits up to date.
    pub fn show_pending(&self, config: &mut ConfigSpace) {
        if !self.form.masks {
            return;
        }
        let pending = (0..self.vectors.len()).filter(|i| self.vectors.get(*i).is_some_and(|vector| vector.pending()));
        let bits = pending.fold(0u32, |bits, index| bits | 1 << index);
        let at = usize::from(self.at + self.form.pending());
        config.bytes_mut()[at..at + 4].copy_from_slice(&bits.to_le_bytes());
    }
}
