//! The frames of the probe's network load: numbered, and every byte of them known, so that one that is torn, old or somebody
//! else's is known for what it is.
//!
//! The guest sends them, and who is at the other end of its network device sends each one [back](Way::Back), with other content. This
//! file is compiled into the guest and into the host side. It needs only `core`.

/// Ethernet type of the frames: that of experiments inside of one site (IEEE 802).
pub const ETHERTYPE: u16 = 0x88b5;
/// Bytes of the longest frame.
pub const LONGEST: usize = 1514;
/// Most frames that are under way.
pub const WINDOW: u64 = 8;

/// Bytes before the number: two addresses and the type.
const HEAD: usize = 14;
/// Bytes before the words.
const WORDS: usize = HEAD + 8;

/// Which way a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Way {
    /// From the guest.
    Out = 1,
    /// To the guest.
    Back = 2,
}

/// What is wrong in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// Which word of it; all ones: its length, in bytes.
    pub word: u64,
    /// What should be there.
    pub expected: u64,
    /// What is.
    pub found: u64,
}

/// Bytes of a frame: 62, 70, 78 and so on, up to [`LONGEST`], in no order.
pub const fn length(number: u64) -> usize {
    WORDS + 8 * (5 + (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize % 182)
}

/// A word of a frame.
const fn word(seed: u64, number: u64, way: Way, index: usize) -> u64 {
    let mixed = seed
        ^ number.wrapping_mul(0xd6e8_feb8_6659_fd93)
        ^ (way as u64).wrapping_mul(0xa076_1d64_78bd_642f)
        ^ (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ mixed >> 32).wrapping_mul(0xe703_7ed1_a0b4_28db);
    mixed ^ mixed >> 29
}

/// Writes a frame from this address to all; how many bytes it has.
pub fn write(frame: &mut [u8; LONGEST], from: [u8; 6], seed: u64, number: u64, way: Way) -> usize {
    let length = length(number);
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&from);
    frame[12..HEAD].copy_from_slice(&ETHERTYPE.to_be_bytes());
    frame[HEAD..WORDS].copy_from_slice(&number.to_le_bytes());
    for (index, bytes) in frame[WORDS..length].chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&word(seed, number, way, index).to_le_bytes());
    }
    length
}

/// The number of a frame. `None` if it is none of these.
pub fn number(frame: &[u8]) -> Option<u64> {
    let bytes = frame.get(HEAD..)?.first_chunk()?;
    (frame[12..HEAD] == ETHERTYPE.to_be_bytes()).then(|| u64::from_le_bytes(*bytes))
}

/// Whether a frame with this number is as it was sent.
///
/// # Errors
/// It is not.
pub fn check(frame: &[u8], seed: u64, number: u64, way: Way) -> Result<(), Wrong> {
    let expected = length(number);
    if frame.len() != expected {
        return Err(Wrong { word: u64::MAX, expected: expected as u64, found: frame.len() as u64 });
    }
    for (index, bytes) in frame[WORDS..].as_chunks().0.iter().enumerate() {
        let (expected, found) = (word(seed, number, way, index), u64::from_le_bytes(*bytes));
        if found != expected {
            return Err(Wrong { word: index as u64, expected, found });
        }
    }
    Ok(())
}
