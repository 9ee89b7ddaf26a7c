//! Class code: Reed-Solomon erasure codes. `size`: bytes of a shard, even. `word`: number of original shards, and number
//! of recovery shards in the upper half.

use reed_solomon_simd::{ReedSolomonDecoder, ReedSolomonEncoder};

use crate::abi::{Descriptor, opcode};
use crate::error::{Errno, Refused, refuse, require};
use crate::memory::Access;

use super::{Env, Step, fetch, one_shot, unused};

/// Most shards in all.
const MAX_SHARDS: usize = 256;

/// Bytes of a shard that are encoded at once; a multiple of 64.
const PIECE: usize = 4 << 10;

/// Coders, with the memory they have taken.
#[derive(Default)]
pub(super) struct Coders {
    encoder: Option<ReedSolomonEncoder>,
    decoder: Option<ReedSolomonDecoder>,
}

pub(super) fn step(d: &Descriptor, env: &mut Env<'_>, cost: &mut u64) -> Result<Step, Refused> {
    let shard = d.size as usize;
    let (originals, recoveries) = ((d.word & 0xffff) as usize, (d.word >> 16) as usize);
    let total = originals + recoveries;
    require(shard > 0 && shard.is_multiple_of(2), || format!("a shard has an even number of bytes, not {shard}"))?;
    require(originals > 0 && recoveries > 0 && total <= MAX_SHARDS, || {
        format!("{originals} original and {recoveries} recovery shards: at least one each, {MAX_SHARDS} in all")
    })?;
    let bytes = one_shot(d, shard as u64 * total as u64)?;
    *cost += bytes as u64;
    match d.opcode {
        opcode::RS_ENCODE => encode(d, env, shard, originals, recoveries),
        _ => recover(d, env, shard, originals, recoveries),
    }
}

fn failed(e: &reed_solomon_simd::Error) -> Refused {
    Refused::new(Errno::Invalid, format!("the shards cannot be coded: {e}"))
}

/// Originals one after the other at the source; recovery shards to the destination.
fn encode(
    d: &Descriptor,
    env: &mut Env<'_>,
    shard: usize,
    originals: usize,
    recoveries: usize,
) -> Result<Step, Refused> {
    unused(d, &[("first", d.first), ("second", d.second)])?;
    env.space.check(d.destination, (shard * recoveries) as u64, Access::Write)?;
    let bytes = shard * originals;
    env.space.check(d.source, bytes as u64, Access::Read)?;
    let mut done = 0;
    while done < shard {
        // Every 64 bytes of a shard are coded by themselves: pieces stay in a cache of the core from the copy to the result.
        let piece = PIECE.min(shard - done);
        let encoder = match env.scratch.coders.encoder.take() {
            Some(mut encoder) => {
                encoder.reset(originals, recoveries, piece).map_err(|e| failed(&e))?;
                encoder
            }
            None => ReedSolomonEncoder::new(originals, recoveries, piece).map_err(|e| failed(&e))?,
        };
        let encoder = env.scratch.coders.encoder.insert(encoder);
        for index in 0..originals {
            let at = d.source + (index * shard + done) as u64;
            let original = fetch(env.space, at, piece, &mut env.scratch.input)?;
            encoder.add_original_shard(original).map_err(|e| failed(&e))?;
        }
        let result = encoder.encode().map_err(|e| failed(&e))?;
        for (index, recovery) in result.recovery_iter().enumerate() {
            env.space.write(d.destination + (index * shard + done) as u64, recovery)?;
        }
        done += piece;
    }
    Ok(Step::Done { bytes: bytes as u64, result: recoveries as u64 })
}

/// All shards one after the other at the source, originals first; `first`: address of a bitmap of those that are there.
/// Lost originals go to their places in the array of originals at the destination.
fn recover(
    d: &Descriptor,
    env: &mut Env<'_>,
    shard: usize,
    originals: usize,
    recoveries: usize,
) -> Result<Step, Refused> {
    unused(d, &[("second", d.second)])?;
    let total = originals + recoveries;
    let mut bitmap = vec![0; total.div_ceil(8)];
    env.space.read(d.first, &mut bitmap)?;
    let there = |index: usize| bitmap[index / 8] >> (index % 8) & 1 == 1;
    env.space.check(d.destination, (shard * originals) as u64, Access::Write)?;
    let present = (0..total).filter(|index| there(*index)).count();
    if present < originals {
        return refuse(Errno::BadMessage, format!("{present} shards are left; {originals} are needed"));
    }
    let decoder = match env.scratch.coders.decoder.take() {
        Some(mut decoder) => {
            decoder.reset(originals, recoveries, shard).map_err(|e| failed(&e))?;
            decoder
        }
        None => ReedSolomonDecoder::new(originals, recoveries, shard).map_err(|e| failed(&e))?,
    };
    let decoder = env.scratch.coders.decoder.insert(decoder);
    for index in (0..total).filter(|index| there(*index)) {
        let at = crate::memory::offset(d.source, (index * shard) as u64)?;
        let bytes = fetch(env.space, at, shard, &mut env.scratch.input)?;
        match index.checked_sub(originals) {
            None => decoder.add_original_shard(index, bytes),
            Some(index) => decoder.add_recovery_shard(index, bytes),
        }
        .map_err(|e| failed(&e))?;
    }
    let result = decoder.decode().map_err(|e| failed(&e))?;
    let mut restored = 0;
    for (index, bytes) in result.restored_original_iter() {
        env.space.write(d.destination + (index * shard) as u64, bytes)?;
        restored += 1;
    }
    Ok(Step::Done { bytes: (shard * originals) as u64, result: restored })
}
