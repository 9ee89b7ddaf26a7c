//! What a device reaches of its client, from any thread: memory and interrupts.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use rustix::io::Errno;
use vm_memory::VolatileMemory;

use super::device::Irq;
use super::dma::{Log, Maps, Piece};
use super::irqs::Irqs;
use super::saved::SavedMap;
use crate::error::VfioUserError;
use crate::link::Link;
use crate::message::Command;
use crate::payload::DmaAccess;
use wherry_handover::Copies;

/// A device could not reach the client's memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DmaError {
    /// There is no map, or it does not allow that, or its file is not what it was.
    #[error("memory of the client at {address:#x}: {source}")]
    Memory {
        /// Where.
        address: u64,
        /// `EFAULT`: no map; `EACCES`: not allowed.
        source: Errno,
    },
    /// The client did not do it.
    #[error("memory of the client at {address:#x}: {source}")]
    Client {
        /// Where.
        address: u64,
        /// Why.
        source: VfioUserError,
    },
}

/// A word of the client's memory.
#[derive(Clone, Copy, Debug)]
pub enum Word<'a> {
    /// Of four bytes.
    Four(&'a AtomicU32),
    /// Of eight.
    Eight(&'a AtomicU64),
}

/// Where messages to the client go.
#[derive(Clone)]
pub(super) struct Way {
    pub(super) link: Arc<Link>,
    pub(super) transfer: usize,
    pub(super) limit: Duration,
}

#[derive(Default)]
struct Shared {
    /// Read while memory is accessed: who unmaps waits until that is over. Taken before the other locks.
    maps: RwLock<Maps>,
    log: Mutex<Option<Log>>,
    /// Held while a word is changed that cannot be changed atomically: so it is, among threads of the device.
    words: Mutex<()>,
    irqs: Mutex<Irqs>,
    way: Mutex<Option<Way>>,
}

/// The client's memory and interrupts. Without a client there is no memory, and interrupts wait for the next.
#[derive(Clone, Default)]
pub struct Bus(Arc<Shared>);

impl Bus {
    pub(super) fn new(irqs: &[Irq]) -> Self {
        Self(Arc::new(Shared { irqs: Mutex::new(Irqs::new(irqs)), ..Shared::default() }))
    }

    /// Reads memory of the client.
    pub fn read(&self, mut address: u64, mut data: &mut [u8]) -> Result<(), DmaError> {
        let maps = self.0.maps.read().unwrap_or_else(PoisonError::into_inner);
        while !data.is_empty() {
            let memory = |source| DmaError::Memory { address, source };
            let run = maps.run(address, data.len(), false).map_err(memory)?;
            let (piece, rest) = std::mem::take(&mut data).split_at_mut(run);
            if let Piece::ByMessage = maps.read(address, piece).map_err(memory)? {
                self.by_message(address, run, |way, at, range| {
                    let access = DmaAccess { address: at, count: range.len() as u64 };
                    let reply = way.link.ask(Command::DmaRead, &access.encode(&[]), &[], way.limit)?;
                    match DmaAccess::decode(&reply.payload) {
                        Ok((said, bytes)) if said == access && bytes.len() == range.len() => {
                            piece[range].copy_from_slice(bytes);
                            Ok(())
                        }
                        _ => Err(way.link.wrong("DmaRead", format!("a reply of {} bytes", reply.payload.len()))),
                    }
                })?;
            }
            data = rest;
            address = address.wrapping_add(run as u64);
        }
        Ok(())
    }

    /// Writes memory of the client, and logs it.
    pub fn write(&self, mut address: u64, mut data: &[u8]) -> Result<(), DmaError> {
        let maps = self.0.maps.read().unwrap_or_else(PoisonError::into_inner);
        while !data.is_empty() {
            let memory = |source| DmaError::Memory { address, source };
            let run = maps.run(address, data.len(), true).map_err(memory)?;
            let (piece, rest) = data.split_at(run);
            let done = match maps.write(address, piece) {
                Ok(Piece::Done) => Ok(()),
                Ok(Piece::ByMessage) => self.by_message(address, run, |way, at, range| {
                    let access = DmaAccess { address: at, count: range.len() as u64 };
                    let payload = access.encode(&piece[range]);
                    let reply = way.link.ask(Command::DmaWrite, &payload, &[], way.limit)?;
                    // By the specification's table the reply has 12 bytes, by its peers 16. Either will do.
                    match reply.payload.len() {
                        12 | 16 => Ok(()),
                        other => Err(way.link.wrong("DmaWrite", format!("a reply of {other} bytes"))),
                    }
                }),
                Err(source) => Err(memory(source)),
            };
            // After the write: whoever takes the log before it finds the mark the next time. A write that failed may
            // have been done in part.
            self.mark(address, run as u64);
            done?;
            data = rest;
            address = address.wrapping_add(run as u64);
        }
        Ok(())
    }

    /// Whether all of a range can be read, or written.
    pub fn check(&self, mut address: u64, count: u64, write: bool) -> Result<(), DmaError> {
        let maps = self.0.maps.read().unwrap_or_else(PoisonError::into_inner);
        let mut left = count;
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX);
            let run = maps.run(address, most, write).map_err(|source| DmaError::Memory { address, source })?;
            left -= run as u64;
            address = address.wrapping_add(run as u64);
        }
        Ok(())
    }

    /// A word of four bytes or eight, on a multiple of that, for atomic operations; logged if `write`. Where memory is not mapped here
    /// (it came without a descriptor, or its file may be cut) the word is read, and written if it has changed: atomic for threads of
    /// the device, and not for the client.
    pub fn word<T>(
        &self,
        address: u64,
        eight: bool,
        write: bool,
        work: impl FnOnce(Word<'_>) -> T,
    ) -> Result<T, DmaError> {
        let bytes = if eight { 8 } else { 4 };
        let memory = |source| DmaError::Memory { address, source };
        if !address.is_multiple_of(bytes as u64) {
            return Err(memory(Errno::INVAL));
        }
        {
            let maps = self.0.maps.read().unwrap_or_else(PoisonError::into_inner);
            // Maps are made of pages: a word lies in one or in none.
            maps.run(address, bytes, write).map_err(memory)?;
            if let Some(slice) = maps.word(address, bytes, write).map_err(memory)? {
                let unmapped = |_| memory(Errno::FAULT);
                let done = match eight {
                    true => work(Word::Eight(slice.get_atomic_ref(0).map_err(unmapped)?)),
                    false => work(Word::Four(slice.get_atomic_ref(0).map_err(unmapped)?)),
                };
                if write {
                    self.mark(address, bytes as u64);
                }
                return Ok(done);
            }
        }
        let _one = self.0.words.lock().unwrap_or_else(PoisonError::into_inner);
        let mut raw = [0; 8];
        self.read(address, &mut raw[..bytes])?;
        let before = u64::from_le_bytes(raw);
        let (done, after) = match eight {
            true => {
                let word = AtomicU64::new(before);
                (work(Word::Eight(&word)), word.into_inner())
            }
            false => {
                let word = AtomicU32::new(before as u32);
                (work(Word::Four(&word)), u64::from(word.into_inner()))
            }
        };
        if write && after != before {
            self.write(address, &after.to_le_bytes()[..bytes])?;
        }
        Ok(done)
    }

    fn by_message(
        &self,
        address: u64,
        count: usize,
        mut one: impl FnMut(&Way, u64, std::ops::Range<usize>) -> Result<(), VfioUserError>,
    ) -> Result<(), DmaError> {
        let way = self.way().ok_or(DmaError::Memory { address, source: Errno::FAULT })?;
        for start in (0..count).step_by(way.transfer) {
            let at = address + start as u64;
            one(&way, at, start..count.min(start + way.transfer))
                .map_err(|source| DmaError::Client { address: at, source })?;
        }
        Ok(())
    }

    /// Notes in the log that memory was written, by ways that the bus does not see.
    pub fn mark(&self, address: u64, count: u64) {
        if let Some(log) = &mut *self.log() {
            log.mark(address, count);
        }
    }

    /// An interrupt (edge).
    pub fn trigger(&self, index: u32, vector: u32) {
        self.irqs().trigger(index, vector);
    }

    /// A pin goes up or down (level, vector 0): while it is up, each unmasking gives one more interrupt.
    pub fn set_level(&self, index: u32, up: bool) {
        self.irqs().set_level(index, up);
    }

    /// Whether the client has enabled some vector of that index.
    pub fn enabled(&self, index: u32) -> bool {
        self.irqs().enabled(index)
    }

    /// Interrupts that wait since they are masked, or the client is lost: index and vector. They belong to a device's state.
    pub fn pending(&self) -> Vec<(u32, u32)> {
        self.irqs().pending()
    }

    /// Restores one of those.
    pub fn set_pending(&self, index: u32, vector: u32) {
        self.irqs().set_pending(index, vector);
    }

    /// How many maps the client has.
    pub fn maps(&self) -> usize {
        self.0.maps.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub(super) fn change_maps<T>(&self, change: impl FnOnce(&mut Maps) -> T) -> T {
        change(&mut self.0.maps.write().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn maps_are_empty(&self) -> bool {
        self.0.maps.read().unwrap_or_else(PoisonError::into_inner).len() == 0
    }

    /// Where maps of files are in this process: address and bytes of each. Whoever waits for a page of one of them reads, so
    /// this waits for nobody.
    pub(super) fn mapped(&self) -> Vec<(u64, u64)> {
        self.0.maps.read().unwrap_or_else(PoisonError::into_inner).mapped()
    }

    pub(super) fn log(&self) -> MutexGuard<'_, Option<Log>> {
        self.0.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn irqs(&self) -> MutexGuard<'_, Irqs> {
        self.0.irqs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn way(&self) -> Option<Way> {
        self.0.way.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The socket on which the client is asked goes on after a rest.
    pub(super) fn go_on(&self) {
        if let Some(way) = self.way() {
            way.link.go_on();
        }
    }

    pub(super) fn save_maps(&self, copies: &mut Copies) -> io::Result<Vec<SavedMap>> {
        self.0.maps.read().unwrap_or_else(PoisonError::into_inner).save(copies)
    }

    pub(super) fn load_maps(
        &self,
        saved: &[SavedMap],
        need: &mut dyn FnMut(&str, u32) -> Result<OwnedFd, String>,
    ) -> Result<(), String> {
        self.change_maps(|maps| maps.load(saved, need))
    }

    pub(super) fn connect(&self, way: Option<Way>) {
        *self.0.way.lock().unwrap_or_else(PoisonError::into_inner) = way;
    }

    /// The client is lost: its memory and its descriptors are given back.
    pub(super) fn lose_client(&self) {
        if let Some(way) = self.0.way.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // Who waits for an answer to a message holds the maps.
            way.link.close();
        }
        self.change_maps(Maps::clear);
        *self.log() = None;
        self.irqs().orphan();
    }
}
