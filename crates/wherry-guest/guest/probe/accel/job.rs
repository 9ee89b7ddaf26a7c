//! One job: what its place holds, its submissions, and what has to come of them.
//!
//! | offset | bytes | content |
//! |---|---|---|
//! | 0x000 | 128 | the batch: the operation, and the one that counts |
//! | 0x100 | 64 | completion records: of the operation, of the batch |
//! | 0x140 | 4 | the counter |
//! | 0x150 | 32 | the driver's: number, step, what is held (number + 1), bytes of the step before |
//! | 0x180 | 32 | nonce and associated data of a seal |
//! | 0x1c0 | 8 | bitmap of shards |
//! | 0x200 | 72 | the program |
//! | 0x1000 | 2 n | source, and recovery shards; n: bytes of a job in whole pages |
//! | | 2 n + 0x1000 | what step 1 writes |
//! | | n | what step 2, or the second destination, gets |

use core::sync::atomic::Ordering::{Relaxed, SeqCst};

use wherry_guest_kernel::accel::{PROGRAM, crc32c, flag, job_word, opcode, program_fuel, program_result, sha256};

use super::{half, word};

/// What is wrong when a job was not done exactly once.
pub const COUNTER: &str = "its counter";

const LIST: u64 = 0;
const RECORDS: u64 = 0x100;
const COUNTER_AT: u64 = 0x140;
const NUMBER: u64 = 0x150;
const STEP: u64 = 0x158;
const HELD: u64 = 0x160;
const WRITTEN: u64 = 0x168;
const NONCE: u64 = 0x180;
const BITMAP: u64 = 0x1c0;
const PROGRAM_AT: u64 = 0x200;
const DATA: u64 = 0x1000;
const PAGE: u64 = 4096;

/// Originals and recovery shards; those that get lost, and the bitmap of what is left.
const ORIGINALS: u64 = 4;
const RECOVERIES: u64 = 2;
const LOST: [u64; 2] = [0, 2];
const LEFT: u64 = 0b11_1010;

/// Bytes that a place for a job of so many bytes has.
pub fn place_bytes(bytes: u64) -> u64 {
    DATA + 5 * bytes.next_multiple_of(PAGE) + PAGE
}

/// What is not as it should be.
pub struct Wrong {
    pub what: &'static str,
    pub at: u64,
    pub expected: u64,
    pub found: u64,
}

/// A job, and its place.
pub struct Job {
    pub at: u64,
    pub bytes: u64,
    pub seed: u64,
    pub ring: u64,
    pub class: usize,
    pub number: u64,
    pub key: Option<u32>,
}

/// Words of a descriptor.
struct Work {
    opcode: u8,
    source: u64,
    destination: u64,
    size: u64,
    word: u32,
    first: u64,
    second: u64,
}

impl Job {
    /// The number of the job whose result a place holds.
    pub fn held(at: u64) -> Option<u64> {
        word(at + HELD).load(Relaxed).checked_sub(1)
    }

    /// Writes what the job reads.
    pub fn prepare(&self) {
        word(self.at + HELD).store(0, Relaxed);
        word(self.at + NUMBER).store(self.number, Relaxed);
        half(self.at + COUNTER_AT).store(0, SeqCst);
        for n in 0..self.bytes / 8 {
            word(self.source() + 8 * n).store(self.word(n), Relaxed);
        }
        for (n, code) in PROGRAM.iter().enumerate() {
            word(self.at + PROGRAM_AT + 8 * n as u64).store(*code, Relaxed);
        }
        // Twelve bytes that are used once, the length of what is authenticated beside it, and that.
        word(self.at + NONCE).store(self.number, Relaxed);
        half(self.at + NONCE + 8).store(self.ring as u32, Relaxed);
        half(self.at + NONCE + 12).store(16, Relaxed);
        word(self.at + BITMAP).store(LEFT, Relaxed);
    }

    /// The place holds what came of it.
    pub fn hold(&self) {
        word(self.at + HELD).store(self.number + 1, Relaxed);
    }

    /// Its operation: one of those of its class, in turn.
    pub fn operation(&self) -> u8 {
        let of = |all: &[u8]| all[(self.number % all.len() as u64) as usize];
        match (self.class, self.key) {
            (0, _) => of(&[opcode::MOVE, opcode::COPY_CRC, opcode::FILL, opcode::DUAL_CAST]),
            (1, _) => of(&[opcode::LZ4, opcode::ZSTD, opcode::DEFLATE]),
            (2, None) => opcode::SHA256,
            (2, Some(_)) => of(&[opcode::SHA256, opcode::SEAL]),
            (3, _) => opcode::RUN,
            _ => opcode::ENCODE,
        }
    }

    /// How many submissions it has: what is compressed, sealed or coded is brought back by the second.
    pub fn steps(&self) -> u64 {
        match self.operation() {
            opcode::LZ4 | opcode::ZSTD | opcode::DEFLATE | opcode::SEAL | opcode::ENCODE => 2,
            _ => 1,
        }
    }

    /// The step that is under way, or has ended.
    pub fn step(&self) -> u64 {
        word(self.at + STEP).load(Relaxed)
    }

    fn source(&self) -> u64 {
        self.at + DATA
    }

    fn pages(&self) -> u64 {
        self.bytes.next_multiple_of(PAGE)
    }

    /// What step 1 writes.
    fn middle(&self) -> u64 {
        self.source() + 2 * self.pages()
    }

    /// What step 2 writes, or the second copy.
    fn end(&self) -> u64 {
        self.middle() + 2 * self.pages() + PAGE
    }

    fn shard(&self) -> u64 {
        self.bytes / ORIGINALS
    }

    fn word(&self, n: u64) -> u64 {
        job_word(self.seed, self.ring, self.number, n)
    }

    fn tag(&self, step: u64) -> u32 {
        (self.number as u32) << 2 | step as u32
    }

    fn work(&self, step: u64) -> Work {
        let code = self.operation();
        let size = self.bytes;
        let (source, middle, end) = (self.source(), self.middle(), self.end());
        let work = Work { opcode: code, source, destination: middle, size, word: 0, first: 0, second: 0 };
        let shards = ORIGINALS as u32 | (RECOVERIES as u32) << 16;
        let written = word(self.at + WRITTEN).load(Relaxed);
        let handle = self.key.unwrap_or(0);
        let nonce = self.at + NONCE;
        match (code, step) {
            (opcode::FILL, _) => Work { source: 0, first: self.word(0), ..work },
            (opcode::DUAL_CAST, _) => Work { first: end, ..work },
            (opcode::LZ4 | opcode::ZSTD | opcode::DEFLATE, 1) => Work { word: (2 * self.pages()) as u32, ..work },
            (opcode::LZ4 | opcode::ZSTD | opcode::DEFLATE, _) => {
                Work { opcode: code + 1, source: middle, destination: end, size: written, word: size as u32, ..work }
            }
            (opcode::SEAL, 1) => Work { word: handle, first: nonce, ..work },
            (opcode::SEAL, _) => Work {
                opcode: code + 1,
                source: middle,
                destination: end,
                size: written,
                word: handle,
                first: nonce,
                ..work
            },
            (opcode::RUN, _) => Work {
                source: self.at + PROGRAM_AT,
                size: 8 * PROGRAM.len() as u64,
                word: program_fuel(size / 8) as u32,
                first: source,
                second: size / 8,
                ..work
            },
            // Recovery shards follow the originals.
            (opcode::ENCODE, 1) => Work { destination: source + size, size: self.shard(), word: shards, ..work },
            (opcode::ENCODE, _) => Work {
                opcode: code + 1,
                destination: end,
                size: self.shard(),
                word: shards,
                first: self.at + BITMAP,
                ..work
            },
            _ => work,
        }
    }

    /// Writes a submission into an entry of a ring.
    pub fn write_step(&self, entry: u64, step: u64, vector: u16) {
        word(self.at + STEP).store(step, Relaxed);
        if self.operation() == opcode::ENCODE && step == 2 {
            for (shard, n) in LOST.iter().flat_map(|shard| (0..self.shard() / 8).map(move |n| (shard, n))) {
                word(self.source() + shard * self.shard() + 8 * n).store(u64::MAX, Relaxed);
            }
        }
        for at in (self.at + RECORDS..self.at + RECORDS + 64).step_by(8) {
            word(at).store(0, SeqCst);
        }
        let tag = self.tag(step);
        write(self.at + LIST, tag, flag::COMPLETION, 0, self.at + RECORDS, &self.work(step));
        let count = Work {
            opcode: opcode::ADD,
            source: 0,
            destination: self.at + COUNTER_AT,
            size: 0,
            word: 0,
            first: 1,
            second: 0,
        };
        write(self.at + LIST + 64, tag, 0, 0, 0, &count);
        let batch = Work {
            opcode: opcode::BATCH,
            source: self.at + LIST,
            destination: 0,
            size: 2,
            word: 0,
            first: 0,
            second: 0,
        };
        write(entry, tag, flag::COMPLETION | flag::INTERRUPT, vector, self.at + RECORDS + 32, &batch);
    }

    /// Whether the submission under way has ended.
    pub fn is_done(&self) -> bool {
        word(self.at + RECORDS + 32).load(SeqCst) & 0xff != 0
    }

    /// What its records and its counter say of a step that has ended.
    pub fn check_step(&self, step: u64) -> Result<(), Wrong> {
        let work = self.work(step);
        let head = |code: u8| 1 | u64::from(code) << 8 | u64::from(self.tag(step)) << 32;
        let record = self.at + RECORDS;
        same("the batch's record", record + 32, head(opcode::BATCH))?;
        same("the operation's record", record, head(work.opcode))?;
        same_half(COUNTER, self.at + COUNTER_AT, step as u32)?;
        let (bytes_at, result_at) = (record + 8, record + 16);
        let result = word(result_at).load(SeqCst);
        match work.opcode {
            opcode::MOVE | opcode::FILL | opcode::DUAL_CAST => same("the bytes of its record", bytes_at, self.bytes),
            opcode::COPY_CRC => {
                // SAFETY: the source, which nobody writes now.
                let bytes = unsafe { core::slice::from_raw_parts(self.source() as *const u8, self.bytes as usize) };
                same("its CRC", result_at, crc32c(0, bytes).into())
            }
            opcode::LZ4 | opcode::ZSTD | opcode::DEFLATE => {
                word(self.at + WRITTEN).store(result, Relaxed);
                let fits = result > 0 && result <= 2 * self.pages();
                if fits { Ok(()) } else { same("the bytes it wrote", result_at, self.bytes) }
            }
            opcode::SEAL => {
                word(self.at + WRITTEN).store(result, Relaxed);
                same("the bytes it wrote", result_at, self.bytes + 16)
            }
            opcode::SHA256 => same("the bytes it wrote", result_at, 32),
            opcode::RUN => {
                same("the instructions it ran", bytes_at, program_fuel(self.bytes / 8))?;
                same("the program's result", result_at, program_result((0..self.bytes / 8).map(|n| self.word(n))))
            }
            opcode::ENCODE => same("the shards it wrote", result_at, RECOVERIES),
            code if code == opcode::ENCODE + 1 => same("the shards it recovered", result_at, LOST.len() as u64),
            _ => same("the bytes it wrote", result_at, self.bytes),
        }
    }

    /// Whether everything that it wrote is there, and it was done exactly once.
    pub fn verify(&self) -> Result<(), Wrong> {
        same_half(COUNTER, self.at + COUNTER_AT, self.steps() as u32)?;
        let data = |what, at: u64, from: u64, bytes: u64| {
            (0..bytes / 8).try_for_each(|n| same(what, at + 8 * n, self.word(from / 8 + n)))
        };
        let code = self.operation();
        if code != opcode::ENCODE {
            data("its source", self.source(), 0, self.bytes)?;
        }
        match code {
            opcode::MOVE | opcode::COPY_CRC => data("the copy", self.middle(), 0, self.bytes),
            opcode::DUAL_CAST => {
                data("the copy", self.middle(), 0, self.bytes)?;
                data("the second copy", self.end(), 0, self.bytes)
            }
            opcode::FILL => {
                (0..self.bytes / 8).try_for_each(|n| same("what it filled", self.middle() + 8 * n, self.word(0)))
            }
            opcode::SHA256 => {
                // SAFETY: the source, which nobody writes now.
                let bytes = unsafe { core::slice::from_raw_parts(self.source() as *const u8, self.bytes as usize) };
                let digest = sha256(bytes);
                let words = digest.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
                (self.middle()..).step_by(8).zip(words).try_for_each(|(at, expected)| same("the digest", at, expected))
            }
            opcode::RUN => {
                let result = program_result((0..self.bytes / 8).map(|n| self.word(n)));
                same("what the program wrote", self.middle(), result)
            }
            opcode::ENCODE => LOST.iter().try_for_each(|shard| {
                let from = shard * self.shard();
                data("a recovered shard", self.end() + from, from, self.shard())
            }),
            // Brought back by the second step.
            _ => data("what came back", self.end(), 0, self.bytes),
        }
    }
}

fn same(what: &'static str, at: u64, expected: u64) -> Result<(), Wrong> {
    let found = word(at).load(SeqCst);
    if found == expected { Ok(()) } else { Err(Wrong { what, at, expected, found }) }
}

fn same_half(what: &'static str, at: u64, expected: u32) -> Result<(), Wrong> {
    let (expected, found) = (expected.into(), half(at).load(SeqCst).into());
    if found == expected { Ok(()) } else { Err(Wrong { what, at, expected, found }) }
}

/// Writes a descriptor.
fn write(at: u64, tag: u32, flags: u32, vector: u16, completion: u64, work: &Work) {
    let words = [
        u64::from(tag),
        u64::from(flags) | u64::from(work.opcode) << 24 | u64::from(vector) << 32,
        completion,
        work.source,
        work.destination,
        work.size | u64::from(work.word) << 32,
        work.first,
        work.second,
    ];
    for (at, value) in (at..).step_by(8).zip(words) {
        word(at).store(value, SeqCst);
    }
}
