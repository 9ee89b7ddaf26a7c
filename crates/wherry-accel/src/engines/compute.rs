//! Class compute: metered programs. `source`, `size`: the text. r1 = `first`, r2 = `second`, r3 = `destination`;
//! `word`: fuel in instructions. The result is r0.

use crate::abi::Descriptor;
use crate::error::{Errno, Refused, refuse, require};
use crate::program::{self, MAX_PROGRAM_BYTES, Machine};

use super::{Env, Progress, Step, fetch};

/// Instructions of one step.
const INSTRUCTIONS: u64 = 8192;

pub(super) fn step(
    d: &Descriptor,
    progress: &mut Progress,
    env: &mut Env<'_>,
    cost: &mut u64,
) -> Result<Step, Refused> {
    if !matches!(progress, Progress::Program(_)) {
        *progress = Progress::Program(Box::new(load(d, env)?));
    }
    let Progress::Program(machine) = progress else { return Ok(Step::End) };
    let before = machine.fuel();
    let result = machine.run(env.space, INSTRUCTIONS);
    let used = before - machine.fuel();
    *cost += 2 * used;
    let spent = u64::from(d.word) - machine.fuel();
    match result {
        program::Progress::More => Ok(Step::More),
        program::Progress::Exit(r0) => Ok(Step::Done { bytes: spent, result: r0 }),
        program::Progress::Fault(fault) => Err(fault.into()),
        program::Progress::NoFuel => refuse(Errno::Time, format!("the program used up its {} instructions", d.word)),
        program::Progress::TooDeep => refuse(Errno::TooBig, "functions of the program call each other too deeply"),
    }
}

fn load(d: &Descriptor, env: &mut Env<'_>) -> Result<Machine, Refused> {
    let size = d.size as usize;
    require(size.is_multiple_of(8) && (8..=MAX_PROGRAM_BYTES).contains(&size), || {
        format!("a program has 8 to {MAX_PROGRAM_BYTES} bytes in whole instructions, not {size}")
    })?;
    let text = fetch(env.space, d.source, size, &mut env.scratch.input)?;
    let text = text.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
    Machine::load(text, [d.first, d.second, d.destination], d.word.into())
        .map_err(|flaw| Refused::new(Errno::Invalid, format!("the program is refused: {flaw}")))
}
