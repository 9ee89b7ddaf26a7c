//! The accelerator (docs/accel-abi.md) as the driver of the probe guest sees it: numbers, and what its jobs are made of and come to.
//!
//! This file is compiled into the guest, whose driver it serves, and into the host side, where it is tested. It needs only `core`.

/// PCI vendor ID.
pub const VENDOR: u16 = 0x1de5;
/// PCI device ID.
pub const DEVICE: u16 = 0x0acc;
/// Value of [`register::MAGIC`]: `WACC` in memory order.
pub const MAGIC: u32 = u32::from_le_bytes(*b"WACC");
/// The version of the ABI that the driver knows: major in the upper half. It needs at least this minor one.
pub const VERSION: u32 = 0x0001_0001;
/// BAR of the registers.
pub const REGISTERS_BAR: u8 = 0;
/// BAR of the MSI-X table.
pub const MSIX_BAR: u8 = 1;
/// Classes of engines.
pub const CLASSES: usize = 5;
/// Most engines of a device.
pub const MAX_ENGINES: usize = 64;
/// Bells of a device.
pub const BELLS: u32 = 16;
/// Bytes of a descriptor.
pub const DESCRIPTOR_BYTES: u64 = 64;
/// Contexts of the driver. Each has a slot for every class that the device has.
pub const CONTEXTS: usize = 2;
/// Most rings of the driver.
pub const MAX_RINGS: usize = CONTEXTS * CLASSES;
/// Most requests of a ring that are under way.
pub const MAX_DEPTH: u32 = 256;
/// Most bytes of a job. Fewest: 512. They are a multiple of 512.
pub const MAX_BYTES: u32 = 1 << 20;

/// Offsets of registers.
pub mod register {
    /// [`super::MAGIC`].
    pub const MAGIC: u64 = 0x00;
    /// Of the ABI.
    pub const VERSION: u64 = 0x04;
    /// Number of engines.
    pub const ENGINES: u64 = 0x08;
    /// Address of a command (8 bytes).
    pub const COMMAND: u64 = 0x20;
    /// Its error number.
    pub const RESULT: u64 = 0x28;
    /// Context that was created.
    pub const CREATED: u64 = 0x2c;
    /// 16 bytes for each engine; class and instance first.
    pub const ENGINE_TABLE: u64 = 0x400;
    /// Bells.
    pub const BELLS: u64 = 0x1000;
    /// Bytes from one to the next.
    pub const BELL_BYTES: u64 = 64;
    /// Contexts.
    pub const CONTEXTS: u64 = 0x1_0000;
    /// Bytes of each.
    pub const CONTEXT_BYTES: u64 = 0x2000;
    /// Bytes of a slot.
    pub const SLOT_BYTES: u64 = 64;
    /// In a slot: address of the ring (8 bytes).
    pub const BASE: u64 = 0x00;
    /// Its descriptors.
    pub const ENTRIES: u64 = 0x08;
    /// How many were put in.
    pub const TAIL: u64 = 0x0c;
    /// Error number of the latest submission.
    pub const STATUS: u64 = 0x14;
    /// Where the tail is in memory (8 bytes).
    pub const TAIL_ADDRESS: u64 = 0x38;
}

/// Commands.
pub mod command {
    /// Create a context.
    pub const CREATE: u32 = 1;
    /// Set a parameter.
    pub const SET_PARAM: u32 = 3;
    /// The parameter that is the engine map.
    pub const ENGINES: u64 = 3;
    /// Extension of a creation: clone.
    pub const CLONE: u32 = 1;
    /// What is cloned: the map.
    pub const CLONE_ENGINES: u32 = 1;
}

/// Operations.
pub mod opcode {
    /// A list of descriptors.
    pub const BATCH: u8 = 0x02;
    /// Adds to a word.
    pub const ADD: u8 = 0x05;
    /// Copies.
    pub const MOVE: u8 = 0x20;
    /// Fills with a word.
    pub const FILL: u8 = 0x21;
    /// Copies, with a CRC-32C.
    pub const COPY_CRC: u8 = 0x25;
    /// Copies to two places.
    pub const DUAL_CAST: u8 = 0x28;
    /// Compresses to an LZ4 block; the next number does the reverse.
    pub const LZ4: u8 = 0x40;
    /// To a zstd frame.
    pub const ZSTD: u8 = 0x42;
    /// Raw deflate.
    pub const DEFLATE: u8 = 0x44;
    /// AES-256-GCM; the next number opens.
    pub const SEAL: u8 = 0x60;
    /// SHA-256.
    pub const SHA256: u8 = 0x64;
    /// A program.
    pub const RUN: u8 = 0x80;
    /// Erasure code; the next number recovers.
    pub const ENCODE: u8 = 0xa0;
}

/// Flags of a descriptor.
pub mod flag {
    /// Write a record.
    pub const COMPLETION: u32 = 1 << 0;
    /// Raise the vector.
    pub const INTERRUPT: u32 = 1 << 1;
}

/// Word `word` of the data of job `job` of a ring. The upper half of each is the same in eight words, so that it can be compressed.
pub const fn job_word(seed: u64, ring: u64, job: u64, word: u64) -> u64 {
    let low = mix(seed ^ ring.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ job.rotate_left(24), word);
    let high = mix(seed ^ ring.wrapping_mul(0xd1b5_4a32_d192_ed03) ^ job.rotate_left(40), word / 8);
    low >> 32 | high & 0xffff_ffff_0000_0000
}

const fn mix(a: u64, b: u64) -> u64 {
    let mixed = a ^ b.wrapping_mul(0xd1b5_4a32_d192_ed03);
    let mixed = (mixed ^ mixed >> 32).wrapping_mul(0xe703_7ed1_a0b4_28db);
    mixed ^ mixed >> 29
}

/// CRC-32C, continued from `crc`.
pub fn crc32c(crc: u32, bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| CRC[usize::from(crc as u8 ^ byte)] ^ crc >> 8;
    !bytes.iter().fold(!crc, step)
}

static CRC: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

/// SHA-256 of bytes whose number is a multiple of 64.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut state =
        [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];
    let (blocks, rest) = bytes.as_chunks::<64>();
    assert!(rest.is_empty());
    blocks.iter().for_each(|block| compress(&mut state, block));
    let mut last = [0; 64];
    last[0] = 0x80;
    last[56..].copy_from_slice(&(8 * bytes.len() as u64).to_be_bytes());
    compress(&mut state, &last);
    let mut digest = [0; 32];
    for (to, word) in digest.as_chunks_mut::<4>().0.iter_mut().zip(state) {
        *to = word.to_be_bytes();
    }
    digest
}

/// One block (FIPS 180-4, section 6.2.2).
fn compress(state: &mut [u32; 8], block: &[u8; 64]) {
    let mut w = [0u32; 64];
    for (word, bytes) in w.iter_mut().zip(block.as_chunks::<4>().0) {
        *word = u32::from_be_bytes(*bytes);
    }
    for t in 16..64 {
        let s0 = w[t - 15].rotate_right(7) ^ w[t - 15].rotate_right(18) ^ w[t - 15] >> 3;
        let s1 = w[t - 2].rotate_right(17) ^ w[t - 2].rotate_right(19) ^ w[t - 2] >> 10;
        w[t] = w[t - 16].wrapping_add(s0).wrapping_add(w[t - 7]).wrapping_add(s1);
    }
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    for t in 0..64 {
        let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let t1 = h.wrapping_add(s1).wrapping_add(e & f ^ !e & g).wrapping_add(K[t]).wrapping_add(w[t]);
        let s0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let t2 = s0.wrapping_add(a & b ^ a & c ^ b & c);
        (h, g, f, e, d, c, b, a) = (g, f, e, d.wrapping_add(t1), c, b, a, t1.wrapping_add(t2));
    }
    for (word, new) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *word = word.wrapping_add(new);
    }
}

/// Fractional parts of the cube roots of the first 64 primes.
static K: [u32; 64] = [
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98,
    0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786,
    0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8,
    0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
    0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819,
    0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a,
    0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
    0xc67178f2,
];

/// A program (RFC 9669) for `run`: r1 is the address of words, r2 their number, r3 where the result goes, which is that of
/// [`program_result`].
pub const PROGRAM: [u64; 9] = [
    instruction(0xb7, 0, 0, 0, 0),
    // Again: r0 = 31 * r0 + the next word.
    instruction(0x79, 4, 1, 0, 0),
    instruction(0x27, 0, 0, 0, 31),
    instruction(0x0f, 0, 4, 0, 0),
    instruction(0x07, 1, 0, 0, 8),
    instruction(0x17, 2, 0, 0, 1),
    instruction(0x55, 2, 0, -6, 0),
    instruction(0x7b, 3, 0, 0, 0),
    instruction(0x95, 0, 0, 0, 0),
];

const fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: u32) -> u64 {
    code as u64
        | (destination as u64) << 8
        | (source as u64) << 12
        | (offset as u16 as u64) << 16
        | (immediate as u64) << 32
}

/// Instructions that [`PROGRAM`] runs for so many words.
pub const fn program_fuel(words: u64) -> u64 {
    3 + 6 * words
}

/// What [`PROGRAM`] comes to.
pub fn program_result(words: impl Iterator<Item = u64>) -> u64 {
    words.fold(0, |sum: u64, word| sum.wrapping_mul(31).wrapping_add(word))
}
