//! Operations that every class has: words in memory, waiting, time, control.

use crate::abi::{Descriptor, flag, opcode};
use crate::error::{Errno, Refused, refuse, require};
use crate::memory::{Atomic, Width, offset};

use super::{Env, Step, unused};

/// What one look of a spinning or waiting operation costs, in nanoseconds of virtual time.
pub(crate) const SPIN_COST: u64 = 20_000;
pub(super) fn step(d: &Descriptor, env: &mut Env<'_>, cost: &mut u64) -> Result<Step, Refused> {
    let done = |bytes, result| Ok(Step::Done { bytes, result });
    let width = if d.flags & flag::WIDE != 0 { Width::Eight } else { Width::Four };
    let mask = if width == Width::Eight { u64::MAX } else { u32::MAX.into() };
    let (size, word) = (u64::from(d.size), u64::from(d.word));
    match d.opcode {
        opcode::NOP | opcode::END => {
            unused(d, &[("source", d.source), ("destination", d.destination), ("size", size), ("word", word)])?;
            unused(d, &[("first", d.first), ("second", d.second)])?;
            if d.opcode == opcode::END { Ok(Step::End) } else { done(0, 0) }
        }
        opcode::STORE => {
            unused(d, &[("source", d.source), ("size", size), ("word", word), ("second", d.second)])?;
            done(width.bytes(), env.space.atomic(d.destination, width, Atomic::Exchange(d.first))?)
        }
        opcode::ADD => {
            unused(d, &[("source", d.source), ("size", size), ("word", word), ("second", d.second)])?;
            done(width.bytes(), env.space.atomic(d.destination, width, Atomic::Add(d.first))?)
        }
        opcode::SPIN => {
            unused(d, &[("destination", d.destination), ("size", size), ("word", word)])?;
            unused(d, &[("second", d.second)])?;
            for _ in 0..env.scratch.looks.max(1) {
                let value = env.space.atomic(d.source, width, Atomic::Load)?;
                if value != d.first & mask {
                    return done(0, value);
                }
                std::hint::spin_loop();
            }
            *cost = SPIN_COST;
            Ok(Step::More)
        }
        opcode::WAIT => {
            unused(d, &[("destination", d.destination), ("size", size)])?;
            let value = env.space.atomic(d.source, width, Atomic::Load)?;
            let (masked, wanted) = (value & d.second & mask, d.first & mask);
            let there = match d.word {
                0 => masked == wanted,
                1 => masked != wanted,
                2 => masked >= wanted,
                3 => masked < wanted,
                other => return refuse(Errno::Invalid, format!("wait knows comparisons 0 to 3, not {other}")),
            };
            if there {
                return done(0, value);
            }
            *cost = SPIN_COST;
            Ok(Step::Waiting)
        }
        opcode::TIMESTAMP => {
            unused(d, &[("source", d.source), ("size", size), ("word", word)])?;
            unused(d, &[("first", d.first), ("second", d.second)])?;
            let now = (env.now)();
            env.space.write(d.destination, &now.to_le_bytes())?;
            done(8, now)
        }
        opcode::JUMP => {
            unused(d, &[("destination", d.destination), ("word", word), ("first", d.first), ("second", d.second)])?;
            require(d.size <= crate::abi::MAX_BATCH, || format!("a list of {} descriptors is too long", d.size))?;
            offset(d.source, 0)?;
            Ok(Step::Jump { at: d.source, count: d.size })
        }
        other => refuse(Errno::Invalid, format!("operation {other:#04x} is for submissions")),
    }
}
