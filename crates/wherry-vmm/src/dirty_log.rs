//! KVM's dirty log as a [`DirtySource`]: which pages the guest wrote.
//!
//! With manual protection (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`), `collect` only reads the bitmap, and `rearm` clears
//! *exactly* the bits that were taken and protects those pages again, in chunks of whole words, before they are read.
//! A page written between the two keeps its bit. Without it, reading clears, and there is nothing to re-arm.
//!
//! The log does not start with all bits set (`KVM_DIRTY_LOG_INITIALLY_SET` is not used): a guest with little of its RAM
//! touched would otherwise seem to have dirtied all of it, and clearing those bits costs time for every page there could
//! be. Without it KVM protects, at the start, the pages that are mapped; and the first `collect` tells only what was
//! written since.
//!
//! Slots keep their log until `stop`, which is not called inside a blackout: taking it away costs time for every page.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use kvm_ioctls::VmFd;
use wherry_memory::{Block, BlockId, DirtyError, DirtySource, PageSet};

use crate::vm::{MemorySlot, ioctl};

/// Most pages that one call clears, a multiple of 64. KVM holds its MMU lock meanwhile, and a vCPU that faults waits.
const CLEAR_PAGES: u64 = 64 * 1024;

/// The dirty log of all RAM slots of a VM.
pub(crate) struct KvmDirtyLog {
    vm: Arc<VmFd>,
    slots: Vec<LoggedSlot>,
    manual: bool,
}

struct LoggedSlot {
    slot: MemorySlot,
    /// Kept while the log is on, so that no memory is allocated in a blackout. A word for each 64 pages; empty when off.
    bitmap: Mutex<Vec<u64>>,
}

impl KvmDirtyLog {
    /// The log of these slots, which exist. `manual`: the VM has manual protection enabled.
    pub(crate) fn new(vm: Arc<VmFd>, slots: Vec<MemorySlot>, manual: bool) -> Self {
        let slots = slots.into_iter().map(|slot| LoggedSlot { slot, bitmap: Mutex::default() }).collect();
        Self { vm, slots, manual }
    }

    fn error(&self, what: &'static str, block: BlockId, cause: impl Into<io::Error>) -> DirtyError {
        DirtyError { dirty_source: self.name().into(), what, block, cause: cause.into() }
    }

    fn slot(&self, block: &Block, what: &'static str) -> Result<&LoggedSlot, DirtyError> {
        let id = block.spec().id;
        self.slots
            .iter()
            .find(|s| s.slot.block.spec().id == id)
            .ok_or_else(|| self.error(what, id, io::Error::other("this VM has no such block")))
    }
}

impl LoggedSlot {
    fn bitmap(&self) -> MutexGuard<'_, Vec<u64>> {
        self.bitmap.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn id(&self) -> BlockId {
        self.slot.block.spec().id
    }
}

impl DirtySource for KvmDirtyLog {
    fn name(&self) -> &str {
        "kvm"
    }

    fn start(&self) -> Result<(), DirtyError> {
        for slot in &self.slots {
            let mut bitmap = slot.bitmap();
            let pages = slot.slot.block.pages();
            if bitmap.is_empty() {
                slot.slot
                    .register(&self.vm, KVM_MEM_LOG_DIRTY_PAGES)
                    .map_err(|e| self.error("starting the log", slot.id(), e))?;
                *bitmap = vec![0; pages.div_ceil(64) as usize];
                continue;
            }
            // It is on already, with what an earlier use has left; that is forgotten.
            let failed = |e| self.error("emptying the log", slot.id(), e);
            ioctl::get_dirty_log(&self.vm, slot.slot.number, pages, &mut bitmap).map_err(failed)?;
            if self.manual {
                clear(&self.vm, slot, 0..pages, &bitmap).map_err(|e| self.error("emptying the log", slot.id(), e))?;
            }
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        for slot in &self.slots {
            let mut bitmap = slot.bitmap();
            if !bitmap.is_empty() {
                slot.slot.register(&self.vm, 0).map_err(|e| self.error("ending the log", slot.id(), e))?;
                *bitmap = Vec::new();
            }
        }
        Ok(())
    }

    fn collect(&self, block: &Block, into: &mut PageSet) -> Result<(), DirtyError> {
        const WHAT: &str = "reading the log";
        let slot = self.slot(block, WHAT)?;
        let mut bitmap = slot.bitmap();
        if bitmap.is_empty() {
            return Err(self.error(WHAT, slot.id(), io::Error::other("it was not started")));
        }
        ioctl::get_dirty_log(&self.vm, slot.slot.number, block.pages(), &mut bitmap)
            .map_err(|e| self.error(WHAT, slot.id(), e))?;
        into.union_words(&bitmap);
        Ok(())
    }

    fn rearm(&self, block: &Block, range: Range<u64>, taken: &PageSet) -> Result<(), DirtyError> {
        const WHAT: &str = "re-arming the log";
        let slot = self.slot(block, WHAT)?;
        if !self.manual {
            return Ok(());
        }
        let end = range.end.min(block.pages());
        let whole = range.start.is_multiple_of(64) && (end.is_multiple_of(64) || end == block.pages());
        if !whole || taken.limit() < end {
            let reason = format!("pages {}..{end} are not whole words of the bitmap given", range.start);
            return Err(self.error(WHAT, slot.id(), io::Error::new(io::ErrorKind::InvalidInput, reason)));
        }
        clear(&self.vm, slot, range.start..end, taken.words()).map_err(|e| self.error(WHAT, slot.id(), e))
    }
}

/// Clears the bits of `words` (the bitmap of the whole slot) that lie in `range`, and leaves out what has none.
fn clear(vm: &VmFd, slot: &LoggedSlot, range: Range<u64>, words: &[u64]) -> Result<(), vmm_sys_util::errno::Error> {
    for chunk in chunks(range, words) {
        let first = (chunk.start / 64) as usize;
        let len = chunk.end - chunk.start;
        ioctl::clear_dirty_log(vm, slot.slot.number, chunk.start, len as u32, &words[first..])?;
    }
    Ok(())
}

/// Cuts a range of pages that begins at a whole word into ranges that begin at whole words, have at most
/// [`CLEAR_PAGES`] pages, and neither begin nor end with an empty word.
fn chunks(range: Range<u64>, words: &[u64]) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        while at < range.end && words[(at / 64) as usize] == 0 {
            at += 64;
        }
        if at >= range.end {
            return None;
        }
        let limit = range.end.min(at + CLEAR_PAGES);
        let inside = &words[(at / 64) as usize..limit.div_ceil(64) as usize];
        let used = inside.iter().rposition(|w| *w != 0).map_or(1, |last| last as u64 + 1);
        let chunk = at..limit.min(at + used * 64);
        at = limit.next_multiple_of(64);
        Some(chunk)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_every_bit_once_and_leave_out_what_is_empty() {
        let pages = CLEAR_PAGES * 3 + 100;
        let mut set = PageSet::new(pages);
        for page in [0, 64, 5000, CLEAR_PAGES - 1, CLEAR_PAGES * 2 + 640, pages - 1] {
            set.insert(page);
        }
        let list: Vec<_> = chunks(0..pages, set.words()).collect();
        assert!(list.iter().all(|c| c.start.is_multiple_of(64) && c.end - c.start <= CLEAR_PAGES), "{list:?}");
        assert!(list.iter().all(|c| c.end.is_multiple_of(64) || c.end == pages), "{list:?}");
        assert!(list.windows(2).all(|w| w[0].end <= w[1].start), "{list:?}");
        for page in set.runs(0..pages).flatten() {
            assert!(list.iter().any(|c| c.contains(&page)), "{page}");
        }
        assert!(!list.iter().any(|c| c.contains(&(CLEAR_PAGES + 640))), "{list:?}");
        assert_eq!(chunks(0..pages, PageSet::new(pages).words()).count(), 0);
        assert_eq!(chunks(64..128, set.words()).collect::<Vec<_>>(), std::iter::once(64..128).collect::<Vec<_>>());
    }
}
