//! MSI-X (PCI Express 4.0, section 7.7.2): a table of messages in a BAR, and a mask for each.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wherry_interrupt::saved::SavedVector;
use wherry_interrupt::{Events, InterruptError, Message, Router, Setting, Vector, Vectors};

use crate::config::{ConfigError, ConfigSpace};
use crate::saved::SavedMsix;

const CAPABILITY: u8 = 0x11;
/// Message control: the whole function, and its mask.
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;
/// Bytes of a table entry: address, data, vector control.
const ENTRY: usize = 16;
/// Vector control: the mask. It is the only bit of that dword that can be written.
const MASKED: u8 = 1;
/// Most vectors of a function.
const MOST: u16 = 2048;

/// Where table and pending bits lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixPlace {
    /// The BAR of the table.
    pub bar: u8,
    /// Offset of the table in it, a multiple of 8.
    pub table: u32,
    /// The BAR of the pending bits.
    pub pending_bar: u8,
    /// Offset of the pending bits in it, a multiple of 8.
    pub pending: u32,
}

struct State {
    /// As the guest reads it.
    table: Vec<u8>,
    control: u16,
}

/// The capability, its table and its vectors.
pub struct Msix {
    vectors: Vectors,
    place: MsixPlace,
    /// Offset of the capability in configuration space.
    at: u16,
    /// Held while vectors are set, whose locks are taken inside.
    state: Mutex<State>,
}

impl Msix {
    /// Adds the capability, or puts it in the place of the one that the function has already. All vectors are masked and it
    /// is switched off.
    pub fn new(
        router: Arc<dyn Router>,
        events: &Events,
        count: u16,
        place: MsixPlace,
        config: &mut ConfigSpace,
    ) -> Result<Self, MsixError> {
        if !(1..=MOST).contains(&count)
            || place.bar > 5
            || place.pending_bar > 5
            || !place.table.is_multiple_of(8)
            || !place.pending.is_multiple_of(8)
        {
            return Err(MsixError::Impossible { count, place });
        }
        let mut body = [0; 10];
        body[0..2].copy_from_slice(&(count - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(place.table | u32::from(place.bar)).to_le_bytes());
        body[6..10].copy_from_slice(&(place.pending | u32::from(place.pending_bar)).to_le_bytes());
        let mut writable = [0; 10];
        writable[0..2].copy_from_slice(&(ENABLE | FUNCTION_MASK).to_le_bytes());
        let at = config.replace_capability(CAPABILITY, &body, &writable)?;
        let vectors = Vectors::new(router, events, count)?;
        let state = State { table: reset_table(count.into()), control: 0 };
        Ok(Self { vectors, place, at, state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The vectors.
    pub fn vectors(&self) -> &Vectors {
        &self.vectors
    }

    /// A vector, if the function has it.
    pub fn vector(&self, index: u16) -> Option<&Arc<Vector>> {
        self.vectors.get(index.into())
    }

    /// Whether the guest has switched it on: then the function uses neither MSI nor its pin.
    pub fn enabled(&self) -> bool {
        self.lock().control & ENABLE != 0
    }

    /// To be called after each write to configuration space, which may have changed message control.
    pub fn follow(&self, config: &ConfigSpace) {
        let mut state = self.lock();
        let control = config.word(self.at + 2);
        if state.control != control {
            state.control = control;
            self.apply(&state);
        }
    }

    /// Where table and pending bits lie.
    pub fn place(&self) -> MsixPlace {
        self.place
    }

    /// The range of its BAR that the table takes.
    pub fn table_range(&self) -> Range<u64> {
        let start = u64::from(self.place.table);
        start..start + (self.vectors.len() * ENTRY) as u64
    }

    /// The range of its BAR that the pending bits take: whole quadwords.
    pub fn pending_range(&self) -> Range<u64> {
        let start = u64::from(self.place.pending);
        start..start + self.vectors.len().div_ceil(64) as u64 * 8
    }

    /// Reads the table at an offset in it; zeros behind its end.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = state.table.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes the table at an offset in it.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        let before = state.table.clone();
        for (at, byte) in (offset as usize..).zip(data) {
            let writable = match at % ENTRY {
                // The low two bits of an address are 0.
                0 => 0xfc,
                12 => MASKED,
                13.. => 0,
                _ => 0xff,
            };
            if let Some(old) = state.table.get_mut(at) {
                *old = *old & !writable | byte & writable;
            }
        }
        if state.table != before {
            self.apply(&state);
        }
    }

    /// Reads the pending bits at an offset in them.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset as usize..).zip(data) {
            let bits = (0..8).filter(|bit| self.vectors.get(at * 8 + bit).is_some_and(|vector| vector.pending()));
            *byte = bits.fold(0, |byte, bit| byte | 1 << bit);
        }
    }

    /// What the guest has set each vector to.
    fn settings(&self, state: &State) -> Vec<Setting> {
        let on = state.control & (ENABLE | FUNCTION_MASK) == ENABLE;
        let word =
            |entry: &[u8], at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
        let entries = state.table.chunks_exact(ENTRY);
        entries
            .map(|entry| {
                let address = u64::from(word(entry, 0)) | u64::from(word(entry, 4)) << 32;
                let message = Message { address, data: word(entry, 8) };
                Setting { message, open: on && entry[12] & MASKED == 0 }
            })
            .collect()
    }

    fn apply(&self, state: &State) {
        // The hypervisor has refused a route: the guest's own doing, or no memory. That vector is silent.
        if let Err(error) = self.vectors.set(&self.settings(state)) {
            tracing::error!(%error, "setting MSI-X vectors");
        }
    }

    /// Switches it off, masks and forgets everything, as a reset of the function does.
    pub fn reset(&self, config: &mut ConfigSpace) {
        config.write(self.at + 2, &[0; 2]);
        let mut state = self.lock();
        *state = State { table: reset_table(self.vectors.len()), control: 0 };
        self.apply(&state);
        self.vectors.forget_pending();
    }

    /// Its state, at rest.
    pub fn save(&self) -> SavedMsix {
        let state = self.lock();
        SavedMsix { table: state.table.clone(), vectors: self.vectors.save() }
    }

    /// Takes what [`save`](Self::save) gave. `config` has been restored. Nothing is delivered before
    /// [`Vectors::resume`].
    pub fn restore(&self, saved: &SavedMsix, config: &ConfigSpace) -> Result<(), MsixError> {
        let count = self.vectors.len();
        if saved.vectors.len() != count || saved.table.len() != count * ENTRY {
            let (vectors, table) = (saved.vectors.len(), saved.table.len());
            return Err(MsixError::OtherSize { vectors, table, ours: count });
        }
        let state = State { table: saved.table.clone(), control: config.word(self.at + 2) };
        let settings = self.settings(&state);
        let as_saved = |(setting, saved): (&Setting, &SavedVector)| {
            (setting.message.address, setting.message.data, setting.open) == (saved.address, saved.data, saved.open)
                || !setting.open && !saved.open
        };
        if let Some(vector) = settings.iter().zip(&saved.vectors).position(|pair| !as_saved(pair)) {
            return Err(MsixError::Contradiction { vector });
        }
        self.vectors.restore(&saved.vectors)?;
        *self.lock() = state;
        Ok(())
    }
}

/// A table after a reset: every vector is masked.
fn reset_table(count: usize) -> Vec<u8> {
    let mut entry = [0; ENTRY];
    entry[12] = MASKED;
    entry.repeat(count)
}

/// MSI-X cannot be made or restored.
#[derive(Debug, thiserror::Error)]
pub enum MsixError {
    /// There is no such capability.
    #[error("MSI-X cannot have {count} vectors at {place:?}: 1 to {MOST}, in BARs 0 to 5, at multiples of 8")]
    Impossible {
        /// Vectors asked for.
        count: u16,
        /// Where.
        place: MsixPlace,
    },
    /// Configuration space has no room for it.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The hypervisor refused something.
    #[error(transparent)]
    Interrupt(#[from] InterruptError),
    /// State of another function.
    #[error("saved MSI-X has {vectors} vectors and a table of {table} bytes; this function has {ours} vectors")]
    OtherSize {
        /// Vectors that were saved.
        vectors: usize,
        /// Bytes of the table that was saved.
        table: usize,
        /// Vectors of this function.
        ours: usize,
    },
    /// The table and the vectors that were saved say different things.
    #[error("saved MSI-X vector {vector} is not what the table that was saved with it says")]
    Contradiction {
        /// The first that differs.
        vector: usize,
    },
}
