//! What the probe writes to a disk: every sector holds its number, the generation of its block, and words made of both, so
//! that a sector that is old, torn, misplaced or somebody else's is known for what it is.
//!
//! This file is compiled into the guest and into the host side, which can check an image. It needs only `core`.

/// Bytes of a block: what one request moves.
pub const BLOCK_BYTES: u64 = 4096;
/// 512-byte sectors of a block.
pub const BLOCK_SECTORS: u64 = 8;
/// 64-bit words of a block.
pub const BLOCK_WORDS: usize = 512;
/// 64-bit words of a sector.
pub const SECTOR_WORDS: usize = 64;

/// Word `word` of a block with this generation. Words 0 and 1 of each sector are the number of the sector and the
/// generation.
pub const fn block_word(seed: u64, block: u64, generation: u64, word: usize) -> u64 {
    let sector = block * BLOCK_SECTORS + (word / SECTOR_WORDS) as u64;
    match word % SECTOR_WORDS {
        0 => sector,
        1 => generation,
        n => {
            let mixed = seed
                ^ sector.wrapping_mul(0x9e37_79b9_7f4a_7c15)
                ^ generation.wrapping_mul(0xd6e8_feb8_6659_fd93)
                ^ (n as u64).wrapping_mul(0xa076_1d64_78bd_642f);
            let mixed = (mixed ^ mixed >> 32).wrapping_mul(0xe703_7ed1_a0b4_28db);
            mixed ^ mixed >> 29
        }
    }
}
