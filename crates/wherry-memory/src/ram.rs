//! All RAM of one machine.

use std::sync::Arc;

use vm_memory::{GuestMemoryMmap, GuestRegionMmap};

use crate::{Block, BlockId, BlockSpec, MemoryError, Written};

/// The `vm-memory` view of guest maps. Every write through it is noted: for [`VmmWrites`](crate::VmmWrites), or where a
/// device process is told to.
pub type GuestMemory = GuestMemoryMmap<Written>;

/// One region of [`GuestMemory`]; it carries the block's descriptor as its file offset.
pub type GuestRegion = GuestRegionMmap<Written>;

/// The RAM blocks of a machine in ascending order of guest address.
#[derive(Debug)]
pub struct Ram {
    blocks: Vec<Arc<Block>>,
    memory: GuestMemory,
}

impl Ram {
    /// Makes one block for each spec.
    pub fn create(specs: &[BlockSpec]) -> Result<Self, MemoryError> {
        let blocks = specs.iter().map(|spec| Block::create(*spec)).collect::<Result<Vec<_>, _>>()?;
        Self::from_blocks(blocks)
    }

    /// Puts blocks together that were made or adopted before; there may be none.
    pub fn from_blocks(blocks: Vec<Block>) -> Result<Self, MemoryError> {
        let mut blocks: Vec<_> = blocks.into_iter().map(Arc::new).collect();
        blocks.sort_by_key(|b| b.spec().guest_base);
        for (i, a) in blocks.iter().enumerate() {
            for b in &blocks[i + 1..] {
                if a.spec().id == b.spec().id || a.spec().guest_base + a.spec().size > b.spec().guest_base {
                    return Err(MemoryError::Overlap(a.spec().id, b.spec().id));
                }
            }
        }
        let regions = blocks.iter().map(|b| b.region().clone()).collect();
        let memory = match blocks.is_empty() {
            // Which is an error there.
            true => GuestMemory::new(),
            false => GuestMemory::from_arc_regions(regions).map_err(|error| MemoryError::Regions(error.to_string()))?,
        };
        Ok(Self { blocks, memory })
    }

    /// The blocks, in ascending order of guest address.
    pub fn blocks(&self) -> &[Arc<Block>] {
        &self.blocks
    }

    /// The block with this id.
    pub fn block(&self, id: BlockId) -> Option<&Arc<Block>> {
        self.blocks.iter().find(|b| b.spec().id == id)
    }

    /// The block that holds a guest physical address, and the offset in it.
    pub fn find(&self, guest_address: u64) -> Option<(&Arc<Block>, u64)> {
        self.blocks.iter().find_map(|block| {
            let offset = guest_address.checked_sub(block.spec().guest_base)?;
            (offset < block.spec().size).then_some((block, offset))
        })
    }

    /// Guest memory for KVM's loader and for in-process devices. Cloning it is cheap.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Sum of the block sizes in bytes.
    pub fn size(&self) -> u64 {
        self.blocks.iter().map(|b| b.spec().size).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PageSize;

    fn spec(id: u16, guest_base: u64, size: u64) -> BlockSpec {
        BlockSpec { id: BlockId(id), guest_base, size, page_size: PageSize::Base }
    }

    #[test]
    fn addresses_are_found_in_the_block_that_holds_them() {
        let ram = Ram::create(&[spec(1, 1 << 32, 8192), spec(0, 0, 4096)]).unwrap();
        assert_eq!(ram.find(4095).map(|(b, o)| (b.spec().id.0, o)), Some((0, 4095)));
        assert!(ram.find(4096).is_none());
        assert_eq!(ram.find((1 << 32) + 8191).map(|(b, o)| (b.spec().id.0, o)), Some((1, 8191)));
        assert!(ram.find((1 << 32) + 8192).is_none());
        assert_eq!(ram.size(), 12288);
    }

    #[test]
    fn overlapping_blocks_and_equal_ids_are_refused() {
        assert!(matches!(Ram::create(&[spec(0, 0, 8192), spec(1, 4096, 4096)]), Err(MemoryError::Overlap(..))));
        assert!(matches!(Ram::create(&[spec(0, 0, 4096), spec(0, 8192, 4096)]), Err(MemoryError::Overlap(..))));
    }
}
