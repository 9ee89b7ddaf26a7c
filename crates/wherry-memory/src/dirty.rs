//! Dirty sources: who tells which granules a sharer wrote.
//!
//! The order that loses nothing, for every source: [`start`](DirtySource::start) before the first page is read; then,
//! for each round, [`collect`](DirtySource::collect), and for each piece of the round
//! [`rearm`](DirtySource::rearm) with **exactly** the bits that were collected, and only then read the pages. A page
//! written between `collect` and `rearm` must still be found dirty by the next `collect` *or* be read after the write:
//! re-arming bits that were not collected would lose it.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::{Block, BlockId, PageSet, Ram, Written};

/// A dirty source could not tell what was written; the caller must take everything in the block as dirty or give up.
#[derive(Debug, thiserror::Error)]
#[error("dirty source {dirty_source}: {what} of RAM block {block}: {cause}")]
pub struct DirtyError {
    /// The source's name.
    pub dirty_source: String,
    /// What was being done.
    pub what: &'static str,
    /// The block.
    pub block: BlockId,
    /// Why it failed.
    pub cause: io::Error,
}

/// Tells which granules were written since they were last collected.
///
/// All methods may be called from any thread; the engine never calls two of them at once for the same block, except
/// `rearm` on disjoint ranges.
pub trait DirtySource: Send + Sync {
    /// Name for reports, such as `kvm` or `vmm`.
    fn name(&self) -> &str;

    /// Starts tracking. Everything written after it returns is reported by a later `collect`.
    fn start(&self) -> Result<(), DirtyError>;

    /// Ends tracking and frees what it cost. Not called inside a blackout. Without a `start` it does nothing.
    fn stop(&self) -> Result<(), DirtyError>;

    /// Adds to `into` what was written in `block`. A source that reads and clears in one step forgets it here; one that
    /// clears by `rearm` goes on reporting it until then.
    fn collect(&self, block: &Block, into: &mut PageSet) -> Result<(), DirtyError>;

    /// Makes granules of `range` that are in `taken`, and no others, report again when they are written after this
    /// call. `range` starts at a multiple of 64 granules, and ends at one or at the block's end. Called before those
    /// granules are read. For sources that read and clear in one step there is nothing to do.
    fn rearm(&self, block: &Block, range: Range<u64>, taken: &PageSet) -> Result<(), DirtyError>;
}

/// What the VMM itself wrote through the guest maps by way of `vm-memory` (boot structures, virtio rings, clocks).
/// KVM's log knows nothing of it.
pub struct VmmWrites {
    ram: Arc<Ram>,
}

impl VmmWrites {
    /// Watches all blocks of `ram`.
    pub fn new(ram: Arc<Ram>) -> Self {
        Self { ram }
    }
}

impl DirtySource for VmmWrites {
    fn name(&self) -> &str {
        "vmm"
    }

    fn start(&self) -> Result<(), DirtyError> {
        // The bitmap is always on; what it holds from before is harmless, but sending it again would be work.
        for block in self.ram.blocks() {
            if let Written::Here(bitmap) = block.written() {
                bitmap.reset();
            }
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        Ok(())
    }

    fn collect(&self, block: &Block, into: &mut PageSet) -> Result<(), DirtyError> {
        if let Written::Here(bitmap) = block.written() {
            into.union_words(&bitmap.get_and_reset());
        }
        Ok(())
    }

    fn rearm(&self, _block: &Block, _range: Range<u64>, _taken: &PageSet) -> Result<(), DirtyError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockSpec, PageSize};
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn a_write_by_the_vmm_is_reported_once() {
        let spec = BlockSpec { id: BlockId(0), guest_base: 0, size: 1 << 20, page_size: PageSize::Base };
        let ram = Arc::new(Ram::create(&[spec]).unwrap());
        let source = VmmWrites::new(ram.clone());
        ram.memory().write_obj(1u64, GuestAddress(0)).unwrap();
        source.start().unwrap();
        ram.memory().write_slice(&[1; 4097], GuestAddress(0x5fff)).unwrap();
        let block = &ram.blocks()[0];
        let mut set = PageSet::new(block.pages());
        source.collect(block, &mut set).unwrap();
        assert_eq!(set.runs(0..256).collect::<Vec<_>>(), std::iter::once(5..7).collect::<Vec<_>>());
        set.clear();
        source.collect(block, &mut set).unwrap();
        assert!(set.is_empty());
    }
}
