//! The ABI as constants and bytes: what `docs/accel-abi.md` says, in code. Little-endian, packed.
//!
//! Nothing here decides anything; a test checks that the document and these numbers agree.

use crate::error::{Errno, Refused, refuse, require};

/// Version of the ABI: major in the upper 16 bits. A client refuses another major.
pub const VERSION: u32 = 0x0001_0001;
/// First register: `WACC`.
pub const MAGIC: u32 = u32::from_le_bytes(*b"WACC");

/// The instance with which a virtual slot reads back.
pub const VIRTUAL: u16 = 0xfffe;
/// Class and instance of a gap.
pub const GAP: u16 = 0xffff;
/// Most slots of a map.
pub const MAX_SLOTS: usize = 64;
/// Most engines of a catalogue.
pub const MAX_ENGINES: usize = 64;
/// Most nodes of an extension chain.
pub const MAX_CHAIN: usize = 512;
/// Most contexts of a device.
pub const MAX_CONTEXTS: usize = 1024;
/// Bells of a device: bell n is that of contexts whose place is n modulo this.
pub const BELLS: u32 = 16;
/// Most requests of a slot that are not complete.
pub const MAX_QUEUE: usize = 1024;
/// Most descriptors of a batch.
pub const MAX_BATCH: u32 = 1 << 20;
/// Most bytes of an operation that runs in one piece.
pub const MAX_ONE_SHOT: u32 = 16 << 20;
/// Highest priority; the lowest is its negative.
pub const MAX_PRIORITY: i64 = 1023;

/// Registers of the device, and where the others begin.
pub mod register {
    /// `WACC`.
    pub const MAGIC: u64 = 0x00;
    /// Version of the ABI.
    pub const VERSION: u64 = 0x04;
    /// Number of engines.
    pub const ENGINES: u64 = 0x08;
    /// Most contexts.
    pub const CONTEXTS: u64 = 0x0c;
    /// Most slots of a map.
    pub const SLOTS: u64 = 0x10;
    /// Bit 0: the device is lost.
    pub const STATUS: u64 = 0x14;
    /// Device time in nanoseconds.
    pub const TIME: u64 = 0x18;
    /// Address of a command: it is done when the write returns.
    pub const COMMAND: u64 = 0x20;
    /// Error number of the latest command, or 0.
    pub const RESULT: u64 = 0x28;
    /// Context that the latest creation made.
    pub const CREATED: u64 = 0x2c;
    /// Sixteen bytes for each engine: class u16, instance u16, resets u32, busy nanoseconds u64.
    pub const ENGINE_TABLE: u64 = 0x400;
    /// Sixteen bytes for each engine: slice, pre-emption timeout, heartbeat in microseconds, u32 each.
    pub const TUNABLES: u64 = 0x800;
    /// The end of those.
    pub const TUNABLES_END: u64 = 0xc00;
    /// Bells, one every [`BELL_BYTES`].
    pub const BELLS: u64 = 0x1000;
    /// Bytes from one bell to the next.
    pub const BELL_BYTES: u64 = 64;
    /// Where contexts begin.
    pub const CONTEXTS_BASE: u64 = 0x1_0000;
    /// Bytes of each: a page of doorbells, a page of portals.
    pub const CONTEXT_BYTES: u64 = 0x2000;
    /// Where the portals are within.
    pub const PORTALS: u64 = 0x1000;
}

/// Doorbell registers of a slot.
pub mod slot_register {
    /// Bytes of a slot's registers, and of its portal.
    pub const BYTES: u64 = 64;
    /// Address of the ring.
    pub const BASE: u64 = 0x00;
    /// Descriptors it holds. Writing it empties the ring.
    pub const ENTRIES: u64 = 0x08;
    /// Descriptors put in, ever: the doorbell.
    pub const TAIL: u64 = 0x0c;
    /// Descriptors taken, ever.
    pub const HEAD: u64 = 0x10;
    /// Error number of the latest submission, or 0.
    pub const STATUS: u64 = 0x14;
    /// Where the head is written as well; 0: nowhere.
    pub const HEAD_ADDRESS: u64 = 0x18;
    /// Points submitted.
    pub const SUBMITTED: u64 = 0x20;
    /// Points signalled.
    pub const COMPLETED: u64 = 0x28;
    /// The client's own timeline.
    pub const CLIENT: u64 = 0x30;
    /// Where the client writes the tail, if it does not write register `TAIL`; bit 0: [`POLLED`]; 0: nowhere.
    pub const TAIL_ADDRESS: u64 = 0x38;
    /// In [`TAIL_ADDRESS`]: the device looks there by itself for a while after each descriptor.
    pub const POLLED: u64 = 1;
    /// Bytes behind the tail: where the device says of a polled ring that it does not look, u32.
    pub const ASLEEP: u64 = 4;
}

/// Commands, by the first word of 64 bytes.
pub mod command {
    /// Flags u32 at 8, extensions u64 at 16.
    pub const CREATE: u32 = 1;
    /// Context u32 at 8.
    pub const DESTROY: u32 = 2;
    /// Parameter argument at 8.
    pub const SET_PARAM: u32 = 3;
    /// Parameter argument at 8, written back.
    pub const GET_PARAM: u32 = 4;
    /// Fence at 8; state u32 and error u32 at 24.
    pub const FENCE: u32 = 5;
    /// Fence at 8; classes running u32 and waiting u32 at 24.
    pub const BUSY: u32 = 6;
}

/// Engine classes.
pub mod class {
    /// Move, fill, compare, zero-scan, CRC, delta.
    pub const COPY: u16 = 0;
    /// LZ4, zstd, deflate.
    pub const COMPRESS: u16 = 1;
    /// Authenticated encryption and hashes.
    pub const CRYPTO: u16 = 2;
    /// Metered programs.
    pub const COMPUTE: u16 = 3;
    /// Erasure coding.
    pub const CODE: u16 = 4;
    /// Their names, in order.
    pub const NAMES: [&str; 5] = ["copy", "compress", "crypto", "compute", "code"];
}

/// Parameters of a context.
pub mod param {
    /// Priority, -1023 to 1023; above 0 with privilege.
    pub const PRIORITY: u64 = 1;
    /// 1: the work outlives the context; 0: it ends with it.
    pub const PERSISTENCE: u64 = 2;
    /// The engine map.
    pub const ENGINES: u64 = 3;
    /// Number of the address space.
    pub const SPACE: u64 = 4;
    /// Share of an engine: a structure.
    pub const SHARE: u64 = 5;
    /// Read only: 1 if the context is banned.
    pub const BANNED: u64 = 6;
    /// Read only: flags of its creation.
    pub const FLAGS: u64 = 7;
    /// Read only: hangs within the window.
    pub const HANGS: u64 = 8;
}

/// Flags of a context's creation.
pub mod context_flag {
    /// All slots share one timeline: requests complete in the order of submission.
    pub const SINGLE_TIMELINE: u32 = 1;
    /// All there are.
    pub const ALL: u32 = 1;
}

/// Names of extensions, each scoped to the call they hang on.
pub mod extension {
    /// On an engine map: make a slot virtual.
    pub const LOAD_BALANCE: u32 = 0;
    /// On an engine map: choose siblings by master.
    pub const BOND: u32 = 1;
    /// On an engine map: make a slot take several batches at once.
    pub const PARALLEL: u32 = 2;
    /// On a creation: set a parameter.
    pub const SET_PARAM: u32 = 0;
    /// On a creation: clone from another context.
    pub const CLONE: u32 = 1;
    /// Bytes of the node that all of them begin with.
    pub const BASE: u64 = 32;
}

/// What a clone takes over.
pub mod clone_flag {
    /// The engine map.
    pub const ENGINES: u32 = 1 << 0;
    /// Flags and persistence.
    pub const FLAGS: u32 = 1 << 1;
    /// The priority.
    pub const PRIORITY: u32 = 1 << 2;
    /// The single timeline.
    pub const TIMELINE: u32 = 1 << 3;
    /// The address space.
    pub const SPACE: u32 = 1 << 4;
    /// All there are.
    pub const ALL: u32 = 0x1f;
}

/// Operations. 0x00 to 0x1f are there on every class.
pub mod opcode {
    /// Nothing.
    pub const NOP: u8 = 0x00;
    /// Ends the batch.
    pub const END: u8 = 0x01;
    /// Submission only: a list of descriptors, with fences.
    pub const BATCH: u8 = 0x02;
    /// Submission only: one list for each lane of a parallel slot.
    pub const PARALLEL: u8 = 0x03;
    /// Stores a word.
    pub const STORE: u8 = 0x04;
    /// Adds to a word, atomically.
    pub const ADD: u8 = 0x05;
    /// Spins until a word is no longer what it was told.
    pub const SPIN: u8 = 0x06;
    /// Waits until a word, masked, compares.
    pub const WAIT: u8 = 0x07;
    /// Stores the device's time.
    pub const TIMESTAMP: u8 = 0x08;
    /// Goes on at another descriptor.
    pub const JUMP: u8 = 0x09;
    /// Copies.
    pub const MOVE: u8 = 0x20;
    /// Fills with a pattern of eight bytes.
    pub const FILL: u8 = 0x21;
    /// Finds the first difference.
    pub const COMPARE: u8 = 0x22;
    /// Finds the first byte that is not zero.
    pub const ZERO_SCAN: u8 = 0x23;
    /// CRC-32C.
    pub const CRC: u8 = 0x24;
    /// Copies and takes the CRC.
    pub const COPY_CRC: u8 = 0x25;
    /// Writes what differs, as a delta record.
    pub const DELTA_MAKE: u8 = 0x26;
    /// Applies a delta record.
    pub const DELTA_APPLY: u8 = 0x27;
    /// Copies to two places.
    pub const DUAL_CAST: u8 = 0x28;
    /// LZ4 block.
    pub const LZ4_COMPRESS: u8 = 0x40;
    /// LZ4 block.
    pub const LZ4_DECOMPRESS: u8 = 0x41;
    /// zstd frame.
    pub const ZSTD_COMPRESS: u8 = 0x42;
    /// zstd frame.
    pub const ZSTD_DECOMPRESS: u8 = 0x43;
    /// Raw deflate.
    pub const DEFLATE: u8 = 0x44;
    /// Raw deflate.
    pub const INFLATE: u8 = 0x45;
    /// AES-256-GCM.
    pub const AES_SEAL: u8 = 0x60;
    /// AES-256-GCM.
    pub const AES_OPEN: u8 = 0x61;
    /// ChaCha20-Poly1305.
    pub const CHACHA_SEAL: u8 = 0x62;
    /// ChaCha20-Poly1305.
    pub const CHACHA_OPEN: u8 = 0x63;
    /// SHA-256.
    pub const SHA256: u8 = 0x64;
    /// BLAKE3.
    pub const BLAKE3: u8 = 0x65;
    /// HMAC-SHA-256.
    pub const HMAC: u8 = 0x66;
    /// Runs a program.
    pub const RUN: u8 = 0x80;
    /// Reed-Solomon: recovery shards from original ones.
    pub const RS_ENCODE: u8 = 0xa0;
    /// Reed-Solomon: lost original shards from what is left.
    pub const RS_RECOVER: u8 = 0xa1;

    /// The class an operation needs; `None` for those of every class. The outer `None`: no such operation.
    pub fn class(opcode: u8) -> Option<Option<u16>> {
        use super::class;
        match opcode {
            NOP..=JUMP => Some(None),
            MOVE..=DUAL_CAST => Some(Some(class::COPY)),
            LZ4_COMPRESS..=INFLATE => Some(Some(class::COMPRESS)),
            AES_SEAL..=HMAC => Some(Some(class::CRYPTO)),
            RUN => Some(Some(class::COMPUTE)),
            RS_ENCODE | RS_RECOVER => Some(Some(class::CODE)),
            _ => None,
        }
    }
}

/// Flags of a descriptor, 24 bits.
pub mod flag {
    /// Write a completion record.
    pub const COMPLETION: u32 = 1 << 0;
    /// Raise the interrupt vector when the operation has ended.
    pub const INTERRUPT: u32 = 1 << 1;
    /// Do not give the engine away before the operation has ended.
    pub const NO_PREEMPT: u32 = 1 << 2;
    /// Words of eight bytes rather than four (store, add, spin, wait).
    pub const WIDE: u32 = 1 << 3;
    /// Submission: do not start before the fence is signalled.
    pub const IN_FENCE: u32 = 1 << 8;
    /// Submission: start together with the fence's request.
    pub const SUBMIT_FENCE: u32 = 1 << 9;
    /// What every operation may have.
    pub const COMMON: u32 = COMPLETION | INTERRUPT | NO_PREEMPT;

    /// The flags an operation may have.
    pub fn allowed(opcode: u8) -> u32 {
        use super::opcode;
        match opcode {
            opcode::BATCH | opcode::PARALLEL => COMPLETION | INTERRUPT | IN_FENCE | SUBMIT_FENCE,
            opcode::STORE | opcode::ADD | opcode::SPIN | opcode::WAIT => COMMON | WIDE,
            _ => COMMON,
        }
    }
}

/// Bytes of a descriptor.
pub const DESCRIPTOR_BYTES: usize = 64;
/// Bytes of a completion record.
pub const COMPLETION_BYTES: usize = 32;

/// One unit of work, or one submission.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// The client's own number, handed back in the completion. At byte 0.
    pub tag: u32,
    /// The context it belongs to. At byte 4.
    pub context: u32,
    /// Flags, 24 bits. At byte 8.
    pub flags: u32,
    /// Operation. At byte 11.
    pub opcode: u8,
    /// Interrupt vector. At byte 12.
    pub vector: u16,
    /// Address of the completion record. At byte 16.
    pub completion: u64,
    /// Address read. At byte 24.
    pub source: u64,
    /// Address written. At byte 32.
    pub destination: u64,
    /// Bytes, or as the operation says. At byte 40.
    pub size: u32,
    /// By operation, at byte 44 a word of four bytes and at 48 two of eight.
    pub word: u32,
    /// By operation.
    pub first: u64,
    /// By operation.
    pub second: u64,
}

impl Descriptor {
    /// An operation with its addresses and size.
    pub fn new(opcode: u8, source: u64, destination: u64, size: u32) -> Self {
        Self { opcode, source, destination, size, ..Self::default() }
    }

    /// With an address for the completion record.
    pub fn completing_at(mut self, at: u64) -> Self {
        self.completion = at;
        self.flags |= flag::COMPLETION;
        self
    }

    /// With the operation's own words.
    pub fn with(mut self, word: u32, first: u64, second: u64) -> Self {
        (self.word, self.first, self.second) = (word, first, second);
        self
    }

    /// With more flags.
    pub fn flagged(mut self, flags: u32) -> Self {
        self.flags |= flags;
        self
    }

    /// A submission that starts when `fence` is signalled.
    pub fn after(self, fence: Fence) -> Self {
        self.fenced(flag::IN_FENCE, fence)
    }

    /// A submission that starts together with the request of `fence`.
    pub fn beside(self, fence: Fence) -> Self {
        self.fenced(flag::SUBMIT_FENCE, fence)
    }

    fn fenced(mut self, flag: u32, fence: Fence) -> Self {
        self.flags |= flag;
        (self.first, self.second) = (u64::from(fence.context) | u64::from(fence.slot) << 32, fence.seq);
        self
    }

    /// The fence of a submission that has a flag for one.
    pub fn fence(&self) -> Fence {
        Fence { context: self.first as u32, slot: (self.first >> 32) as u32, seq: self.second }
    }

    /// As bytes.
    pub fn encode(&self) -> [u8; DESCRIPTOR_BYTES] {
        let mut b = [0; DESCRIPTOR_BYTES];
        b[0..4].copy_from_slice(&self.tag.to_le_bytes());
        b[4..8].copy_from_slice(&self.context.to_le_bytes());
        b[8..12].copy_from_slice(&(self.flags & 0xff_ffff | u32::from(self.opcode) << 24).to_le_bytes());
        b[12..14].copy_from_slice(&self.vector.to_le_bytes());
        b[16..24].copy_from_slice(&self.completion.to_le_bytes());
        b[24..32].copy_from_slice(&self.source.to_le_bytes());
        b[32..40].copy_from_slice(&self.destination.to_le_bytes());
        b[40..44].copy_from_slice(&self.size.to_le_bytes());
        b[44..48].copy_from_slice(&self.word.to_le_bytes());
        b[48..56].copy_from_slice(&self.first.to_le_bytes());
        b[56..64].copy_from_slice(&self.second.to_le_bytes());
        b
    }

    /// From bytes: the layout only, and that what must be zero is.
    pub fn decode(b: &[u8; DESCRIPTOR_BYTES]) -> Result<Self, Refused> {
        let u32_at = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let head = u32_at(8);
        let descriptor = Self {
            tag: u32_at(0),
            context: u32_at(4),
            flags: head & 0xff_ffff,
            opcode: (head >> 24) as u8,
            vector: u16::from_le_bytes([b[12], b[13]]),
            completion: u64_at(16),
            source: u64_at(24),
            destination: u64_at(32),
            size: u32_at(40),
            word: u32_at(44),
            first: u64_at(48),
            second: u64_at(56),
        };
        require(b[14..16] == [0, 0], || "bytes 14 and 15 of a descriptor are reserved and not zero".into())?;
        Ok(descriptor)
    }

    /// Checks what can be known without memory: operation, class, flags. Unknown ones fail, and are never skipped.
    pub fn check(&self, class: u16, submission: bool) -> Result<(), Refused> {
        let Some(needs) = opcode::class(self.opcode) else {
            return refuse(Errno::Invalid, format!("operation {:#04x} does not exist", self.opcode));
        };
        require(needs.is_none_or(|needs| needs == class), || {
            format!("operation {:#04x} does not run on engines of class {}", self.opcode, class_name(class))
        })?;
        require(submission || !matches!(self.opcode, opcode::BATCH | opcode::PARALLEL), || {
            format!("operation {:#04x} is for submissions, not inside a batch", self.opcode)
        })?;
        let unknown = self.flags & !flag::allowed(self.opcode);
        require(unknown == 0, || format!("operation {:#04x} does not know flags {unknown:#x}", self.opcode))
    }
}

/// Name of a class, for people.
pub fn class_name(class: u16) -> String {
    class::NAMES.get(usize::from(class)).map_or_else(|| format!("class {class}"), |name| (*name).to_owned())
}

/// Status of a completion record that has been written.
pub mod status {
    /// Not complete (what the client puts there).
    pub const PENDING: u8 = 0;
    /// It worked.
    pub const DONE: u8 = 1;
    /// It failed; `error` says how.
    pub const FAILED: u8 = 2;
}

/// What a completion record says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// [`status`]; at byte 0, and written last.
    pub status: u8,
    /// The operation. At byte 1.
    pub opcode: u8,
    /// Error number, or 0. At byte 2.
    pub error: u16,
    /// The descriptor's tag. At byte 4.
    pub tag: u32,
    /// Bytes done, or written, as the operation says. At byte 8.
    pub bytes: u64,
    /// The operation's result. At byte 16.
    pub result: u64,
    /// The device's time in nanoseconds. At byte 24.
    pub time: u64,
}

impl Completion {
    /// As bytes.
    pub fn encode(&self) -> [u8; COMPLETION_BYTES] {
        let mut b = [0; COMPLETION_BYTES];
        b[0] = self.status;
        b[1] = self.opcode;
        b[2..4].copy_from_slice(&self.error.to_le_bytes());
        b[4..8].copy_from_slice(&self.tag.to_le_bytes());
        b[8..16].copy_from_slice(&self.bytes.to_le_bytes());
        b[16..24].copy_from_slice(&self.result.to_le_bytes());
        b[24..32].copy_from_slice(&self.time.to_le_bytes());
        b
    }

    /// From bytes.
    pub fn decode(b: &[u8; COMPLETION_BYTES]) -> Self {
        let u64_at = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&b[at..at + 8]);
            u64::from_le_bytes(word)
        };
        Self {
            status: b[0],
            opcode: b[1],
            error: u16::from_le_bytes([b[2], b[3]]),
            tag: u32::from_le_bytes([b[4], b[5], b[6], b[7]]),
            bytes: u64_at(8),
            result: u64_at(16),
            time: u64_at(24),
        }
    }
}

/// A point on a timeline: the `seq`-th submission to a slot of a context, from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fence {
    /// The context.
    pub context: u32,
    /// Its slot, or [`CLIENT_TIMELINE`].
    pub slot: u32,
    /// The point.
    pub seq: u64,
}

/// The slot number of the timeline that the client itself advances.
pub const CLIENT_TIMELINE: u32 = 0xffff;

impl std::fmt::Display for Fence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "context {} slot {} point {}", self.context, self.slot, self.seq)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_and_a_completion_read_back_as_written() {
        let d = Descriptor {
            tag: 1,
            context: 2,
            flags: 0x55_aa33,
            opcode: 0x80,
            vector: 3,
            completion: 4 << 32,
            source: 5 << 33,
            destination: 6 << 34,
            size: 7,
            word: 8,
            first: 9 << 40,
            second: 10 << 41,
        };
        assert_eq!(Descriptor::decode(&d.encode()), Ok(d));
        let mut reserved = d.encode();
        reserved[15] = 1;
        assert_eq!(Descriptor::decode(&reserved).unwrap_err().errno, Errno::Invalid);
        let c = Completion { status: 1, opcode: 2, error: 3, tag: 4, bytes: 5 << 32, result: 6 << 32, time: 7 << 32 };
        assert_eq!(Completion::decode(&c.encode()), c);
    }

    #[test]
    fn unknown_operations_flags_and_wrong_classes_are_refused_by_number() {
        for (opcode, flags, class, word) in [
            (0x0a, 0, 0, "0x0a does not exist"),
            (opcode::MOVE, 0, class::CODE, "class code"),
            (opcode::MOVE, flag::WIDE, class::COPY, "flags 0x8"),
            (opcode::NOP, 1 << 23, class::COPY, "flags 0x800000"),
            (opcode::BATCH, 0, class::COPY, "inside a batch"),
        ] {
            let error = Descriptor { opcode, flags, ..Descriptor::default() }.check(class, false).unwrap_err();
            assert!(error.errno == Errno::Invalid && error.what.contains(word), "{error}");
        }
    }
}
