//! The engines: what each operation does.
//!
//! - this file: the contract of an operation, and the choice of the module that has it.
//! - [`micro`]: operations of every class. [`copy`], [`compress`], [`crypto`], [`compute`], [`code`]: one class each.
//!
//! An operation runs in steps. A step is bounded, so that an engine can be given away between two; what it has done is
//! in [`Progress`], which is all that has to move for the operation to go on elsewhere. Those that cannot stop half-way
//! (compression, ciphers, erasure codes, deltas) take one step and at most [`MAX_ONE_SHOT`](crate::abi::MAX_ONE_SHOT)
//! bytes.
//!
//! The client's memory may change while an operation reads it. So bytes are copied to [`Scratch`] before a codec or a
//! cipher sees them: nothing is looked at twice.

mod code;
mod compress;
mod compute;
mod copy;
mod crypto;
mod micro;

use crate::abi::{Descriptor, class, opcode};
use crate::error::{Errno, Refused};
use crate::keys::KeyStore;
use crate::memory::AddressSpace;
use crate::program::Machine;

pub(crate) use micro::SPIN_COST;

/// What an operation may use.
pub(crate) struct Env<'a> {
    pub space: &'a dyn AddressSpace,
    pub keys: &'a KeyStore,
    /// The device's time.
    pub now: &'a dyn Fn() -> u64,
    pub scratch: &'a mut Scratch,
}

/// Buffers and codec states that a worker keeps between operations.
#[derive(Default)]
pub struct Scratch {
    input: Buffer,
    output: Buffer,
    codecs: compress::Codecs,
    coders: code::Coders,
    pattern: copy::Pattern,
    /// How long a worker goes on before it looks at the scheduler again, in nanoseconds of the device's time; 0: by the virtual
    /// cost of what it does.
    pub quantum: u64,
    /// How often a spinning operation looks at memory in one step, at least once. On virtual time nothing changes between two
    /// looks.
    pub looks: u32,
}

/// How far an operation has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Not begun.
    #[default]
    Start,
    /// Bytes done, and what has been computed over them.
    Bytes { done: u64, value: u64 },
    /// A program that has stopped.
    Program(Box<Machine>),
}

/// What a step has led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// There is more to do.
    More,
    /// Nothing to do until memory changes.
    Waiting,
    /// Ended.
    Done { bytes: u64, result: u64 },
    /// The batch goes on at another list.
    Jump { at: u64, count: u32 },
    /// The batch ends here.
    End,
}

/// Runs one step of a checked descriptor; also tells what it cost, in nanoseconds of virtual time.
pub(crate) fn step(d: &Descriptor, progress: &mut Progress, env: &mut Env<'_>) -> (Result<Step, Refused>, u64) {
    let mut cost = 500;
    let result = match opcode::class(d.opcode) {
        Some(None) => micro::step(d, env, &mut cost),
        Some(Some(class::COPY)) => copy::step(d, progress, env, &mut cost),
        Some(Some(class::COMPRESS)) => compress::step(d, env, &mut cost),
        Some(Some(class::CRYPTO)) => crypto::step(d, env, &mut cost),
        Some(Some(class::COMPUTE)) => compute::step(d, progress, env, &mut cost),
        Some(Some(class::CODE)) => code::step(d, env, &mut cost),
        Some(Some(_)) | None => {
            Err(Refused::new(Errno::Invalid, format!("operation {:#04x} does not exist", d.opcode)))
        }
    };
    (result, cost)
}

/// Bytes of a worker's own, on a page: copies between a client's pages and others are slower.
#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    /// Room for so many, with anything in it.
    fn room(&mut self, bytes: usize) -> &mut [u8] {
        const PAGE: usize = crate::memory::PAGE as usize;
        if self.bytes.len() < self.start + bytes {
            self.bytes = vec![0; bytes + PAGE];
            // Where the place of an allocation cannot be told, its first byte is as good.
            self.start = Some(self.bytes.as_ptr().align_offset(PAGE)).filter(|start| *start < PAGE).unwrap_or(0);
        }
        &mut self.bytes[self.start..self.start + bytes]
    }
}

/// Bytes of the client's memory, in a buffer.
fn fetch<'a>(space: &dyn AddressSpace, at: u64, bytes: usize, buffer: &'a mut Buffer) -> Result<&'a mut [u8], Refused> {
    if buffer.bytes.len() < bytes {
        // Never more than is there: the length comes from the client.
        space.check(at, bytes as u64, crate::memory::Access::Read)?;
    }
    let room = buffer.room(bytes);
    space.read(at, room)?;
    Ok(room)
}

/// Refuses words of a descriptor that an operation does not use and that are not zero.
fn unused(d: &Descriptor, words: &[(&str, u64)]) -> Result<(), Refused> {
    match words.iter().find(|(_, value)| *value != 0) {
        Some((name, value)) => Err(Refused::new(
            Errno::Invalid,
            format!("operation {:#04x} does not use {name}, which is {value:#x} and not 0", d.opcode),
        )),
        None => Ok(()),
    }
}

/// Refuses operations that would take too long in one piece.
fn one_shot(d: &Descriptor, bytes: u64) -> Result<usize, Refused> {
    if bytes > crate::abi::MAX_ONE_SHOT.into() {
        let what = format!("operation {:#04x} takes at most {} bytes, not {bytes}", d.opcode, crate::abi::MAX_ONE_SHOT);
        return Err(Refused::new(Errno::TooBig, what));
    }
    Ok(bytes as usize)
}
