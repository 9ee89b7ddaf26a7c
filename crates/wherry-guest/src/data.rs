//! The data set: what each page holds, and the shadow table that says so a second time.
//!
//! This file is compiled into the guest and into the host side, so that a test can check the guest's RAM from outside.
//! It needs only `core`.
//!
//! The content of a page is a function of the seed, its index and its **generation** `(rewrites, touches)`, so that
//! nothing but the generation must be remembered to know every byte:
//!
//! - A *rewrite* gives the page a new generation `(rewrites + 1, 0)`: 64 cache lines of pseudo-random words, except
//!   that the first word of line 0 is [`page_tag`] and the second is `rewrites << 32`, so that a person or a watcher
//!   can tell whose page it is and how old.
//! - A *touch* raises `touches` to `t` and writes one cache line, line `1 + (t - 1) % 63`, with words that depend on
//!   `t`. Line 0 is never touched.
//!
//! The shadow table, elsewhere in RAM, has one [`Entry`] per page: the generation and a checksum of the content.

/// Words of 64 bits in a page.
pub const PAGE_WORDS: usize = 512;
/// Words in a cache line.
pub const LINE_WORDS: usize = 8;
/// Cache lines in a page.
pub const LINES: usize = PAGE_WORDS / LINE_WORDS;
/// Lines that touches go to: all but line 0.
const TOUCH_LINES: u32 = LINES as u32 - 1;
/// Bytes of an [`Entry`] in the table.
pub const ENTRY_BYTES: u64 = 16;

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
const TAG: u64 = 0x7799_0000_0000_0000;

/// How often a page was rewritten and then touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Generation {
    /// Whole-page writes. 0: never filled.
    pub rewrites: u32,
    /// Touches since the last rewrite.
    pub touches: u32,
}

impl Generation {
    /// Both counts in one word, as in the table.
    pub const fn to_word(self) -> u64 {
        (self.rewrites as u64) << 32 | self.touches as u64
    }

    /// The reverse of [`Self::to_word`].
    pub const fn from_word(word: u64) -> Self {
        Self { rewrites: (word >> 32) as u32, touches: word as u32 }
    }

    /// The line that the latest touch went to. `None` without touches.
    pub const fn touched_line(self) -> Option<usize> {
        match self.touches {
            0 => None,
            t => Some(1 + ((t - 1) % TOUCH_LINES) as usize),
        }
    }

    /// The touch that line `line` has content of: the latest that went there, 0 if none did.
    pub const fn line_touch(self, line: usize) -> u32 {
        if line == 0 || self.touches < line as u32 {
            return 0;
        }
        self.touches - (self.touches - line as u32) % TOUCH_LINES
    }
}

/// What the shadow table says about a page.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// [`Generation::to_word`].
    pub generation: u64,
    /// [`page_checksum`] of the content.
    pub checksum: u64,
}

const _: () = assert!(size_of::<Entry>() as u64 == ENTRY_BYTES);

/// First word of page `index`.
pub const fn page_tag(index: u64) -> u64 {
    TAG | index
}

#[inline(always)]
const fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x = (x ^ x >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ x >> 32
}

/// What a page's words are derived from: the seed, the page and one write to it.
#[inline(always)]
const fn key(seed: u64, index: u64, rewrites: u32, touch: u32) -> u64 {
    let write = Generation { rewrites, touches: touch }.to_word();
    mix(mix(seed ^ index.wrapping_mul(GOLDEN)).wrapping_add(write.wrapping_mul(GOLDEN)))
}

#[inline(always)]
const fn word(key: u64, position: usize) -> u64 {
    // One multiplication and two shifts per 8 bytes: random enough that nothing compresses it, and fast.
    let x = key.wrapping_add((position as u64).wrapping_mul(GOLDEN));
    let x = (x ^ x >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ x >> 32
}

/// Content of one line of page `index` at `generation`.
#[inline]
pub fn line(seed: u64, index: u64, generation: Generation, line: usize) -> [u64; LINE_WORDS] {
    let touch = generation.line_touch(line);
    line_of_key(key(seed, index, generation.rewrites, touch), index, generation.rewrites, line)
}

#[inline(always)]
fn line_of_key(key: u64, index: u64, rewrites: u32, line: usize) -> [u64; LINE_WORDS] {
    let mut words = [0; LINE_WORDS];
    for (i, out) in words.iter_mut().enumerate() {
        *out = word(key, line * LINE_WORDS + i);
    }
    if line == 0 {
        words[0] = page_tag(index);
        words[1] = (rewrites as u64) << 32;
    }
    words
}

/// Checksum of one line; a page's is the sum over its lines.
#[inline(always)]
pub fn line_checksum(line: usize, words: &[u64; LINE_WORDS]) -> u64 {
    const P: u64 = 0x9fb2_1c65_1e98_df25;
    let mut sum = (line as u64 + 1).wrapping_mul(GOLDEN);
    for word in words {
        sum = (sum ^ word).wrapping_mul(P).rotate_left(23);
    }
    sum ^ sum >> 31
}

/// Checksum of a page.
#[inline]
pub fn page_checksum(page: &[u64; PAGE_WORDS]) -> u64 {
    let (lines, _) = page.as_chunks::<LINE_WORDS>();
    lines.iter().enumerate().fold(0, |sum, (i, words)| sum.wrapping_add(line_checksum(i, words)))
}

/// Writes the whole page at `(rewrites, 0)` and returns its table entry.
#[inline]
pub fn rewrite(page: &mut [u64; PAGE_WORDS], seed: u64, index: u64, rewrites: u32) -> Entry {
    let key = key(seed, index, rewrites, 0);
    let mut checksum = 0u64;
    let (lines, _) = page.as_chunks_mut::<LINE_WORDS>();
    for (i, out) in lines.iter_mut().enumerate() {
        let words = line_of_key(key, index, rewrites, i);
        checksum = checksum.wrapping_add(line_checksum(i, &words));
        *out = words;
    }
    Entry { generation: Generation { rewrites, touches: 0 }.to_word(), checksum }
}

/// Touches one line of the page that `entry` describes and returns the new entry. The line's old content is taken
/// from what it should be, so that a wrong page stays wrong by its checksum.
#[inline]
pub fn touch(page: &mut [u64; PAGE_WORDS], seed: u64, index: u64, entry: Entry) -> Entry {
    let old = Generation::from_word(entry.generation);
    let new = Generation { touches: old.touches.wrapping_add(1), ..old };
    let Some(at) = new.touched_line() else {
        // 2^32 touches: start afresh.
        return rewrite(page, seed, index, old.rewrites.wrapping_add(1));
    };
    let before = line(seed, index, old, at);
    let after = line(seed, index, new, at);
    let (lines, _) = page.as_chunks_mut::<LINE_WORDS>();
    lines[at] = after;
    let checksum = entry.checksum.wrapping_sub(line_checksum(at, &before)).wrapping_add(line_checksum(at, &after));
    Entry { generation: new.to_word(), checksum }
}

/// A word of a page that is not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Index of the word in the page.
    pub word: usize,
    /// What should be there.
    pub expected: u64,
    /// What is there.
    pub found: u64,
}

/// Compares a page word by word with what it should hold at `generation`. `None`: it holds that.
pub fn first_difference(page: &[u64; PAGE_WORDS], seed: u64, index: u64, generation: Generation) -> Option<Difference> {
    let (lines, _) = page.as_chunks::<LINE_WORDS>();
    for (i, found) in lines.iter().enumerate() {
        let expected = line(seed, index, generation, i);
        for w in 0..LINE_WORDS {
            if expected[w] != found[w] {
                return Some(Difference { word: i * LINE_WORDS + w, expected: expected[w], found: found[w] });
            }
        }
    }
    None
}

/// Looks which generation a wrong page really has, if any: near `expected`, or whole at another rewrite. A lower one
/// than expected is a lost write; a higher one means that the table lost something.
pub fn identify(page: &[u64; PAGE_WORDS], seed: u64, index: u64, expected: Generation) -> Option<Generation> {
    const LOOK_AROUND: u32 = 64;
    if page[0] != page_tag(index) || page[1] as u32 != 0 {
        return None;
    }
    let rewrites = (page[1] >> 32) as u32;
    // How often another rewrite was touched is not remembered: look at the fewest it may have had.
    let centre = if rewrites == expected.rewrites { expected.touches } else { 0 };
    (centre.saturating_sub(LOOK_AROUND)..=centre.saturating_add(LOOK_AROUND))
        .map(|touches| Generation { rewrites, touches })
        .find(|&generation| first_difference(page, seed, index, generation).is_none())
}
