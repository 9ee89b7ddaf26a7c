//! Class copy: moving, filling and looking at bytes, in pieces that can stop between two.

use crate::abi::{Descriptor, opcode};
use crate::error::{Errno, Refused, refuse, require};
use crate::memory::Access;

use super::{Env, Progress, Step, fetch, one_shot, unused};

/// Bytes of a step.
const STEP: u64 = 256 << 10;
/// Bytes that a pattern is written in: they stay in the first cache.
const PATTERN: usize = 16 << 10;

/// Bytes of one piece of an operation: what it looks at stays in the cache of a core.
fn piece_bytes(opcode: u8) -> u64 {
    match opcode {
        opcode::MOVE => STEP,
        opcode::FILL => PATTERN as u64,
        // The crate takes three streams of 8 KiB each at once, and is slower with less.
        opcode::CRC | opcode::COPY_CRC => CRC_PIECE,
        _ => 16 << 10,
    }
}
const CRC_PIECE: u64 = 24 << 10;

/// Bytes of an entry of a delta record: offset in words of eight, then the word.
const DELTA_ENTRY: usize = 10;
/// Most bytes that a delta record can speak of.
const DELTA_SPAN: u64 = 8 << 16;

/// The pattern that was last filled with, again and again.
#[derive(Default)]
pub(super) struct Pattern {
    of: u64,
    bytes: Vec<u8>,
}

impl Pattern {
    fn of(&mut self, word: u64) -> &[u8] {
        if self.of != word || self.bytes.is_empty() {
            self.of = word;
            self.bytes.resize(PATTERN, 0);
            self.bytes.as_chunks_mut::<8>().0.fill(word.to_le_bytes());
        }
        &self.bytes
    }
}

pub(super) fn step(
    d: &Descriptor,
    progress: &mut Progress,
    env: &mut Env<'_>,
    cost: &mut u64,
) -> Result<Step, Refused> {
    let size = u64::from(d.size);
    match d.opcode {
        opcode::DELTA_MAKE => return delta_make(d, env, cost),
        opcode::DELTA_APPLY => return delta_apply(d, env, cost),
        _ => {}
    }
    let (mut done, mut value) = match *progress {
        Progress::Bytes { done, value } => (done.min(size), value),
        _ => {
            begin(d, env)?;
            (0, if matches!(d.opcode, opcode::CRC | opcode::COPY_CRC) { d.word.into() } else { 0 })
        }
    };
    let (stop, most) = (size.min(done + STEP), piece_bytes(d.opcode));
    *cost += (stop - done) / 8;
    while done < stop {
        let bytes = (stop - done).min(most);
        if let Some(at) = piece(d, env, done, bytes, &mut value)? {
            return Ok(Step::Done { bytes: done + at, result: done + at });
        }
        done += bytes;
    }
    if done < size {
        *progress = Progress::Bytes { done, value };
        return Ok(Step::More);
    }
    let result = if matches!(d.opcode, opcode::COMPARE | opcode::ZERO_SCAN) { size } else { value };
    Ok(Step::Done { bytes: size, result })
}

/// Checks the whole of an operation before its first byte.
fn begin(d: &Descriptor, env: &Env<'_>) -> Result<(), Refused> {
    let size = u64::from(d.size);
    let (read, write) = (Access::Read, Access::Write);
    let (space, word) = (env.space, u64::from(d.word));
    match d.opcode {
        opcode::MOVE => unused(d, &[("word", word), ("first", d.first), ("second", d.second)])?,
        opcode::FILL => unused(d, &[("source", d.source), ("word", word), ("second", d.second)])?,
        opcode::COMPARE => unused(d, &[("word", word), ("first", d.first), ("second", d.second)])?,
        opcode::ZERO_SCAN => {
            unused(d, &[("destination", d.destination), ("word", word), ("first", d.first), ("second", d.second)])?
        }
        opcode::CRC => unused(d, &[("destination", d.destination), ("first", d.first), ("second", d.second)])?,
        opcode::COPY_CRC => unused(d, &[("first", d.first), ("second", d.second)])?,
        _ => {
            unused(d, &[("word", word), ("second", d.second)])?;
            space.check(d.first, size, write)?;
        }
    }
    if d.opcode != opcode::FILL {
        space.check(d.source, size, read)?;
    }
    match d.opcode {
        opcode::MOVE | opcode::FILL | opcode::COPY_CRC | opcode::DUAL_CAST => {
            Ok(space.check(d.destination, size, write)?)
        }
        opcode::COMPARE => Ok(space.check(d.destination, size, read)?),
        _ => Ok(()),
    }
}

/// Does one piece. An answer is where the operation has found what it looked for, from the start of the piece.
fn piece(d: &Descriptor, env: &mut Env<'_>, done: u64, bytes: u64, value: &mut u64) -> Result<Option<u64>, Refused> {
    let (space, count) = (env.space, bytes as usize);
    let at = |base: u64| base.wrapping_add(done);
    match d.opcode {
        opcode::MOVE => {
            // As if through a buffer: when the target lies above the source and over it, from the end.
            let backwards = d.destination > d.source && d.destination - d.source < u64::from(d.size);
            let from = if backwards { u64::from(d.size) - done - bytes } else { done };
            space.copy(d.source.wrapping_add(from), d.destination.wrapping_add(from), bytes)?;
        }
        opcode::FILL => {
            space.write(at(d.destination), &env.scratch.pattern.of(d.first)[..count])?;
        }
        opcode::COMPARE => {
            let a = fetch(space, at(d.source), count, &mut env.scratch.input)?;
            let b = fetch(space, at(d.destination), count, &mut env.scratch.output)?;
            if a != b {
                return Ok(a.iter().zip(b.iter()).position(|(a, b)| a != b).map(|at| at as u64));
            }
        }
        opcode::ZERO_SCAN => {
            let input = fetch(space, at(d.source), count, &mut env.scratch.input)?;
            let (words, rest) = input.as_chunks::<16>();
            if words.iter().any(|word| u128::from_ne_bytes(*word) != 0) || rest.iter().any(|byte| *byte != 0) {
                return Ok(input.iter().position(|byte| *byte != 0).map(|at| at as u64));
            }
        }
        _ => {
            let input = fetch(space, at(d.source), count, &mut env.scratch.input)?;
            match d.opcode {
                opcode::CRC => *value = crc32c::crc32c_append(*value as u32, input).into(),
                opcode::COPY_CRC => {
                    *value = crc32c::crc32c_append(*value as u32, input).into();
                    space.write(at(d.destination), input)?;
                }
                _ => {
                    space.write(at(d.destination), input)?;
                    space.write(at(d.first), input)?;
                }
            }
        }
    }
    Ok(None)
}

/// Source and `first` are compared in words of eight bytes; what differs goes to the destination with the words of
/// `first`. `second` is the room there.
fn delta_make(d: &Descriptor, env: &mut Env<'_>, cost: &mut u64) -> Result<Step, Refused> {
    let bytes = one_shot(d, d.size.into())?;
    unused(d, &[("word", d.word.into())])?;
    require(bytes % 8 == 0 && bytes as u64 <= DELTA_SPAN, || {
        format!("a delta is made of whole words of 8 bytes, {DELTA_SPAN} bytes at most, not of {bytes}")
    })?;
    *cost += bytes as u64 / 4;
    let old = fetch(env.space, d.source, bytes, &mut env.scratch.input)?.as_chunks::<8>().0;
    let new = fetch(env.space, d.first, bytes, &mut env.scratch.output)?.as_chunks::<8>().0;
    let mut record = Vec::new();
    for (index, (old, new)) in old.iter().zip(new).enumerate().filter(|(_, (old, new))| old != new) {
        let _ = old;
        if (record.len() + DELTA_ENTRY) as u64 > d.second {
            return refuse(Errno::NoSpace, format!("the delta needs more room than {} bytes", d.second));
        }
        record.extend((index as u16).to_le_bytes());
        record.extend(new);
    }
    env.space.write(d.destination, &record)?;
    Ok(Step::Done { bytes: bytes as u64, result: record.len() as u64 })
}

/// The record at the source is applied to `first` bytes at the destination. All of it is checked before a byte changes.
fn delta_apply(d: &Descriptor, env: &mut Env<'_>, cost: &mut u64) -> Result<Step, Refused> {
    let bytes = one_shot(d, d.size.into())?;
    unused(d, &[("word", d.word.into()), ("second", d.second)])?;
    require(bytes % DELTA_ENTRY == 0, || format!("a delta record of {bytes} bytes is not made of whole entries"))?;
    require(d.first <= DELTA_SPAN, || format!("a delta applies to {DELTA_SPAN} bytes at most, not {}", d.first))?;
    *cost += bytes as u64 / 4;
    let record = fetch(env.space, d.source, bytes, &mut env.scratch.input)?;
    env.space.check(d.destination, d.first, Access::Write)?;
    let entries = record.as_chunks::<DELTA_ENTRY>().0;
    let offset = |e: &[u8; DELTA_ENTRY]| 8 * u64::from(u16::from_le_bytes([e[0], e[1]]));
    if let Some(beyond) = entries.iter().map(offset).find(|offset| offset + 8 > d.first) {
        return refuse(Errno::BadMessage, format!("a delta entry at {beyond} is beyond the {} bytes", d.first));
    }
    for entry in entries {
        env.space.write(d.destination + offset(entry), &entry[2..])?;
    }
    Ok(Step::Done { bytes: 8 * entries.len() as u64, result: entries.len() as u64 })
}
