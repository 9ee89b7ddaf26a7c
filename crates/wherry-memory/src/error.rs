//! What can go wrong while RAM is made, found or given back.

use std::io;

use crate::BlockId;

/// An operation on guest RAM failed.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A block's base or size is not a multiple of its page size, or it is empty.
    #[error("RAM block {id} at {base:#x} of {size} bytes is not a positive multiple of its page size {unit}")]
    Misaligned {
        /// The block.
        id: BlockId,
        /// Guest physical base address.
        base: u64,
        /// Size in bytes.
        size: u64,
        /// Page size in bytes.
        unit: u64,
    },
    /// Two blocks overlap, or share an id.
    #[error("RAM blocks {0} and {1} overlap or have the same id")]
    Overlap(BlockId, BlockId),
    /// A descriptor that was handed over is not a RAM block of the expected shape.
    #[error("the descriptor given for RAM block {id} cannot be used: {reason}")]
    Adopt {
        /// The block.
        id: BlockId,
        /// What is wrong with it.
        reason: String,
    },
    /// A range reaches beyond the block.
    #[error("range {start:#x}..{end:#x} is not inside RAM block {id} of {size:#x} bytes")]
    OutOfBlock {
        /// The block.
        id: BlockId,
        /// Start offset in bytes.
        start: u64,
        /// End offset in bytes.
        end: u64,
        /// The block's size in bytes.
        size: u64,
    },
    /// The kernel refused.
    #[error("{what} for RAM block {id}: {source}")]
    Os {
        /// What was being done.
        what: &'static str,
        /// The block.
        id: BlockId,
        /// Why the kernel refused.
        source: io::Error,
    },
    /// `vm-memory` refused the regions.
    #[error("guest memory regions: {0}")]
    Regions(String),
}
