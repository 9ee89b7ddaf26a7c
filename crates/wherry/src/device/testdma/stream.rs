//! The device's state as bytes: frames with a checksum each.
//!
//! ```text
//!   BALLAST (position, bytes) ...   also while the device runs, with --pre-copy
//!   STATE (a section)               once, when it has stopped
//!   END (bytes of ballast)          nothing may follow
//! ```
//!
//! Ballast is there to make the state as large as wanted: words that nothing compresses, made as they are read and compared as
//! they come, so that it takes no memory.

use prost::Message;
use wherry_guest::testdma::buffer_word;
use wherry_state::{SavedState, Section, UnitId};

use super::saved::{SavedTestdma, UNIT};

/// `WTDS` in memory order.
const MAGIC: u32 = u32::from_le_bytes(*b"WTDS");
/// Magic, kind, length of the payload, its CRC-32C.
const HEAD: usize = 16;
const BALLAST: u32 = 1;
const STATE: u32 = 2;
const END: u32 = 3;
/// Bytes of ballast in a frame.
const PIECE: u64 = 64 << 10;
/// Longest payload of a frame.
const LONGEST: usize = 1 << 20;
/// Seed of the ballast.
const SEED: u64 = 0x7d3a_ba11_a577_0001;

fn frame(kind: u32, payload: &[u8], into: &mut Vec<u8>) {
    into.extend(MAGIC.to_le_bytes());
    into.extend(kind.to_le_bytes());
    into.extend((payload.len() as u32).to_le_bytes());
    into.extend(crc32c::crc32c(payload).to_le_bytes());
    into.extend(payload);
}

/// Ballast from a position on, a multiple of 8.
fn ballast(position: u64, bytes: u64) -> impl Iterator<Item = u8> {
    let words = position / 8..(position + bytes).div_ceil(8);
    words.flat_map(|word| buffer_word(SEED, word / 512, (word % 512) as usize).to_le_bytes()).take(bytes as usize)
}

/// A state that is being read.
pub struct Saving {
    ballast: u64,
    position: u64,
    queue: Vec<u8>,
    read: usize,
    /// The rest of it is in the queue.
    last: bool,
}

impl Saving {
    /// Of a state with so much ballast.
    pub fn new(ballast: u64) -> Self {
        Self { ballast, position: 0, queue: Vec::new(), read: 0, last: false }
    }

    /// One that has no end.
    pub fn endless() -> Self {
        Self::new(u64::MAX / 2)
    }

    /// Whether only the end is left.
    pub fn is_near_end(&self) -> bool {
        self.position == self.ballast
    }

    /// The next bytes; how many there were. Without a state, only ballast comes.
    pub fn read(&mut self, state: Option<&SavedTestdma>, into: &mut [u8]) -> usize {
        let mut count = 0;
        while count < into.len() {
            if self.read == self.queue.len() && !self.next(state) {
                break;
            }
            let rest = &self.queue[self.read..];
            let some = rest.len().min(into.len() - count);
            into[count..count + some].copy_from_slice(&rest[..some]);
            self.read += some;
            count += some;
        }
        count
    }

    /// Queues the next frame. False if there is none (yet).
    fn next(&mut self, state: Option<&SavedTestdma>) -> bool {
        self.queue.clear();
        self.read = 0;
        if self.position < self.ballast {
            let bytes = PIECE.min(self.ballast - self.position);
            let mut payload = self.position.to_le_bytes().to_vec();
            payload.extend(ballast(self.position, bytes));
            frame(BALLAST, &payload, &mut self.queue);
            self.position += bytes;
            return true;
        }
        match state {
            Some(state) if !self.last => {
                let section = state.to_section(&UnitId { name: UNIT.into(), instance: 0 });
                frame(STATE, &section.encode_to_vec(), &mut self.queue);
                frame(END, &self.ballast.to_le_bytes(), &mut self.queue);
                self.last = true;
                true
            }
            _ => false,
        }
    }

    /// Bytes that are left, with a state of so many.
    pub fn left(&self, state: usize) -> u64 {
        let ballast = self.ballast - self.position;
        let frames = ballast.div_ceil(PIECE) * (HEAD as u64 + 8);
        let rest = if self.last { 0 } else { 2 * HEAD + 8 + state };
        ballast + frames + (self.queue.len() - self.read + rest) as u64
    }
}

/// A state that is being written.
#[derive(Default)]
pub struct Loading {
    bytes: Vec<u8>,
    position: u64,
    state: Option<SavedTestdma>,
    ended: bool,
}

impl Loading {
    /// Takes the next bytes.
    pub fn write(&mut self, data: &[u8]) -> Result<(), String> {
        self.bytes.extend(data);
        let mut at = 0;
        while let Some(head) = self.bytes[at..].first_chunk::<HEAD>() {
            let [magic, kind, length, sum] = [0, 1, 2, 3].map(|n| u32::from_le_bytes(head.as_chunks().0[n]));
            if magic != MAGIC || length as usize > LONGEST || self.ended {
                return Err(format!("a frame of kind {kind}, {length} bytes, magic {magic:#x}, ended: {}", self.ended));
            }
            let Some(payload) = self.bytes[at + HEAD..].get(..length as usize) else { break };
            if crc32c::crc32c(payload) != sum {
                return Err(format!("the checksum of a frame of kind {kind} and {length} bytes is wrong"));
            }
            let payload = payload.to_vec();
            self.take(kind, &payload)?;
            at += HEAD + length as usize;
        }
        self.bytes.drain(..at);
        Ok(())
    }

    fn take(&mut self, kind: u32, payload: &[u8]) -> Result<(), String> {
        let word = payload.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
        match (kind, word) {
            (BALLAST, Some(position)) if position == self.position && self.state.is_none() => {
                let bytes = &payload[8..];
                if !ballast(position, bytes.len() as u64).eq(bytes.iter().copied()) {
                    return Err(format!("the ballast at {position:#x} is not what it should be"));
                }
                self.position += bytes.len() as u64;
                Ok(())
            }
            (STATE, _) if self.state.is_none() => {
                let section = Section::decode(payload).map_err(|error| error.to_string())?;
                if section.unit != UNIT {
                    return Err(format!("the state of a {:.80}", section.unit));
                }
                self.state = Some(SavedTestdma::from_section(&section).map_err(|error| error.to_string())?);
                Ok(())
            }
            (END, Some(ballast)) if self.state.is_some() && payload.len() == 8 && ballast == self.position => {
                self.ended = true;
                Ok(())
            }
            _ => Err(format!("a frame of kind {kind} and {} bytes in the wrong place", payload.len())),
        }
    }

    /// The state, if all of it has come.
    pub fn finish(self) -> Result<SavedTestdma, String> {
        match self.state {
            Some(state) if self.ended && self.bytes.is_empty() => Ok(state),
            _ => Err(format!("it is not whole: {} bytes of ballast, {} left over", self.position, self.bytes.len())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> SavedTestdma {
        SavedTestdma { vectors: 1, scratch: vec![3; 4096], ..SavedTestdma::default() }
    }

    /// All bytes, of which `running` are read while it runs.
    fn whole(ballast: u64, running: usize) -> Vec<u8> {
        let (mut saving, mut bytes) = (Saving::new(ballast), vec![0; running]);
        let count = saving.read(None, &mut bytes);
        bytes.truncate(count);
        let left = saving.left(state().to_section(&UnitId { name: UNIT.into(), instance: 0 }).encoded_len());
        let mut piece = [0; 1000];
        let before = bytes.len();
        loop {
            let count = saving.read(Some(&state()), &mut piece);
            bytes.extend(&piece[..count]);
            if count == 0 {
                break;
            }
        }
        assert_eq!(left, (bytes.len() - before) as u64, "the estimate");
        bytes
    }

    fn loaded(bytes: &[u8], piece: usize) -> Result<SavedTestdma, String> {
        let mut loading = Loading::default();
        bytes.chunks(piece).try_for_each(|data| loading.write(data))?;
        loading.finish()
    }

    #[test]
    fn what_is_read_while_it_runs_and_after_it_stopped_is_one_state() {
        for ballast in [0, 8, 70_001, 200_000] {
            for running in [0, 1, 100_000, 1 << 20] {
                assert_eq!(loaded(&whole(ballast, running), 777), Ok(state()), "{ballast}, {running}");
            }
        }
    }

    #[test]
    fn a_state_that_is_cut_doubled_or_changed_in_any_byte_is_refused() {
        let whole = whole(100, 0);
        for end in 0..whole.len() {
            assert!(loaded(&whole[..end], 4096).is_err(), "cut at {end}");
        }
        assert!(loaded(&[&whole[..], &whole].concat(), 4096).is_err());
        for at in 0..whole.len() {
            let mut wrong = whole.clone();
            wrong[at] ^= 0x10;
            assert!(loaded(&wrong, 4096).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_frame_that_says_to_be_long_is_not_waited_for() {
        let mut bytes = Vec::new();
        frame(STATE, &[0; 8], &mut bytes);
        bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(Loading::default().write(&bytes).unwrap_err().contains("4294967295 bytes"));
    }
}
