//! Metered programs in the instruction set of RFC 9669, which can stop after any instruction and go on elsewhere.
//!
//! - [`verify`]: a program is checked once, when it is loaded: every instruction is known, every jump ends on one, no
//!   register beyond r10 is named and r10 is never written.
//! - [`Machine`]: everything a running program is: its text, registers, stack, frames, program counter and fuel. That is
//!   also what is saved.
//! - [`step`](Machine::run): runs some instructions. Loads and stores go to the context's address space, or to the stack.
//!
//! Conformance groups of RFC 9669 (section 2.4): base32, base64, divmul32, divmul64, atomic32, atomic64. Not `packet`
//! (deprecated), no helper functions, no maps: `call` reaches functions of the same program only.

mod exec;
mod verify;

pub use verify::{Flaw, verify};

/// Most bytes of a program.
pub const MAX_PROGRAM_BYTES: usize = 64 << 10;
/// Bytes of the stack of one frame.
pub const FRAME_BYTES: u64 = 512;
/// Most frames: how deep functions may call each other.
pub const MAX_FRAMES: usize = 8;
/// Where the stack lies in a program's view of memory. What a client has mapped there is out of a program's reach.
pub const STACK_BASE: u64 = 0xffff_f000_0000_0000;
/// Bytes of the whole stack.
pub const STACK_BYTES: u64 = FRAME_BYTES * MAX_FRAMES as u64;

/// One instruction as it lies in memory (RFC 9669, section 3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub opcode: u8,
    pub dst: usize,
    pub src: usize,
    pub offset: i16,
    pub imm: i32,
}

impl Instruction {
    pub(crate) fn decode(word: u64) -> Self {
        Self {
            opcode: word as u8,
            dst: (word >> 8 & 0xf) as usize,
            src: (word >> 12 & 0xf) as usize,
            offset: (word >> 16) as u16 as i16,
            imm: (word >> 32) as u32 as i32,
        }
    }
}

/// Instruction classes, RFC 9669 section 3.2, and the fields of opcodes.
pub(crate) mod op {
    pub const LD: u8 = 0;
    pub const LDX: u8 = 1;
    pub const ST: u8 = 2;
    pub const STX: u8 = 3;
    pub const ALU: u8 = 4;
    pub const JMP: u8 = 5;
    pub const JMP32: u8 = 6;
    pub const ALU64: u8 = 7;

    /// Source is a register (bit 3 of arithmetic and jumps).
    pub const REG: u8 = 8;

    pub const MODE_IMM: u8 = 0x00;
    pub const MODE_MEM: u8 = 0x60;
    pub const MODE_MEMSX: u8 = 0x80;
    pub const MODE_ATOMIC: u8 = 0xc0;

    pub const SIZE_W: u8 = 0x00;
    pub const SIZE_H: u8 = 0x08;
    pub const SIZE_B: u8 = 0x10;
    pub const SIZE_DW: u8 = 0x18;

    pub const NEG: u8 = 0x8;
    pub const MOV: u8 = 0xb;
    pub const END: u8 = 0xd;
    pub const DIV: u8 = 0x3;
    pub const MOD: u8 = 0x9;

    pub const JA: u8 = 0x0;
    pub const CALL: u8 = 0x8;
    pub const EXIT: u8 = 0x9;

    pub const ATOMIC_FETCH: i32 = 0x01;
    pub const ATOMIC_ADD: i32 = 0x00;
    pub const ATOMIC_OR: i32 = 0x40;
    pub const ATOMIC_AND: i32 = 0x50;
    pub const ATOMIC_XOR: i32 = 0xa0;
    pub const ATOMIC_XCHG: i32 = 0xe1;
    pub const ATOMIC_CMPXCHG: i32 = 0xf1;
}

/// Where a function goes back to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The instruction after the call.
    pub back: u32,
    /// r6 to r9 of the caller.
    pub kept: [u64; 4],
}

/// A program that runs, or has stopped half-way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// The text: what the client had in memory when it was loaded. Verified.
    pub(crate) text: Vec<u64>,
    /// r0 to r10.
    pub(crate) registers: [u64; 11],
    /// Index of the next instruction.
    pub(crate) pc: u32,
    /// Instructions that it may still run.
    pub(crate) fuel: u64,
    /// Callers, outermost first.
    pub(crate) frames: Vec<Frame>,
    /// [`STACK_BYTES`] bytes.
    pub(crate) stack: Vec<u8>,
}

/// What a run of some instructions has led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// There is more to run.
    More,
    /// It has exited with this r0.
    Exit(u64),
    /// It touched memory that is not there.
    Fault(crate::memory::Fault),
    /// Its fuel is used up.
    NoFuel,
    /// Functions called each other too deeply.
    TooDeep,
}

impl Machine {
    /// Loads a program after verifying it. r1 to r3 are its arguments.
    pub fn load(text: Vec<u64>, arguments: [u64; 3], fuel: u64) -> Result<Self, Flaw> {
        verify(&text)?;
        let mut registers = [0; 11];
        registers[1..4].copy_from_slice(&arguments);
        registers[10] = STACK_BASE + FRAME_BYTES;
        Ok(Self { text, registers, pc: 0, fuel, frames: Vec::new(), stack: vec![0; STACK_BYTES as usize] })
    }

    /// Puts a stopped program together again, from parts that may come from anywhere.
    pub(crate) fn from_parts(
        text: Vec<u64>,
        registers: [u64; 11],
        pc: u32,
        fuel: u64,
        frames: Vec<Frame>,
        stack: Vec<u8>,
    ) -> Result<Self, Flaw> {
        let starts = verify(&text)?;
        let lands = |at: u32| starts.get(at as usize) == Some(&true);
        let top = STACK_BASE + FRAME_BYTES * (frames.len() as u64 + 1);
        if !lands(pc) || frames.iter().any(|f| !lands(f.back)) {
            return Err(Flaw { at: pc as usize, what: "a saved program is stopped where no instruction begins" });
        }
        if frames.len() >= MAX_FRAMES || stack.len() as u64 != STACK_BYTES || registers[10] != top {
            return Err(Flaw { at: pc as usize, what: "a saved program has an impossible stack" });
        }
        Ok(Self { text, registers, pc, fuel, frames, stack })
    }

    /// Instructions that it may still run.
    pub fn fuel(&self) -> u64 {
        self.fuel
    }

    /// What it weighs in saved state, in bytes.
    pub(crate) fn weight(&self) -> usize {
        self.text.len() * 8 + self.stack.len() + 256
    }
}
