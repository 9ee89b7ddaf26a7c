//! Class compress: LZ4 blocks, zstd frames, raw deflate. `size` bytes at the source; `word` bytes of room at the
//! destination; `first` is the level for zstd (1 to 19) and deflate (0 to 9), and 0 the usual one.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::bulk::{Compressor, Decompressor};

use crate::abi::{Descriptor, opcode};
use crate::error::{Errno, Refused, refuse, require};
use crate::memory::Access;

use super::{Env, Step, fetch, one_shot, unused};

/// Codec states, which are costly to make.
#[derive(Default)]
pub(super) struct Codecs {
    zstd: Option<(i32, Compressor<'static>)>,
    unzstd: Option<Decompressor<'static>>,
    deflate: Option<(u32, Compress)>,
    inflate: Option<Decompress>,
}

pub(super) fn step(d: &Descriptor, env: &mut Env<'_>, cost: &mut u64) -> Result<Step, Refused> {
    let size = one_shot(d, d.size.into())?;
    let space_there = one_shot(d, d.word.into())?;
    unused(d, &[("second", d.second)])?;
    *cost += (size + space_there) as u64;
    let scratch = &mut *env.scratch;
    let input = fetch(env.space, d.source, size, &mut scratch.input)?;
    env.space.check(d.destination, space_there as u64, Access::Write)?;
    // LZ4 wants room for the worst case before it begins; what counts is what comes out.
    let wanted = match d.opcode {
        opcode::LZ4_COMPRESS => lz4_flex::block::get_maximum_output_size(size),
        _ => space_there,
    };
    let output = scratch.output.room(wanted);
    let written = run(d, &mut scratch.codecs, input, output)?;
    if written > space_there {
        return refuse(Errno::NoSpace, format!("{written} bytes do not fit into {space_there}"));
    }
    env.space.write(d.destination, &output[..written])?;
    Ok(Step::Done { bytes: size as u64, result: written as u64 })
}

fn run(d: &Descriptor, codecs: &mut Codecs, input: &[u8], output: &mut [u8]) -> Result<usize, Refused> {
    let level = |least: u64, most: u64, usual: u64| {
        let level = if d.first == 0 { usual } else { d.first };
        require((least..=most).contains(&level), || format!("there is no level {level}; use {least} to {most}"))?;
        Ok::<_, Refused>(level as i32)
    };
    let no_level = || unused(d, &[("first", d.first)]);
    let corrupt = |e: &dyn std::fmt::Display| Refused::new(Errno::BadMessage, format!("the input is corrupt: {e}"));
    let state = |e: &dyn std::fmt::Display| Refused::new(Errno::Io, format!("the codec cannot begin: {e}"));
    let room = output.len();
    let full = || Refused::new(Errno::NoSpace, format!("the output does not fit into {room} bytes"));
    match d.opcode {
        opcode::LZ4_COMPRESS => {
            no_level()?;
            lz4_flex::block::compress_into(input, output).map_err(|_| full())
        }
        opcode::LZ4_DECOMPRESS => {
            no_level()?;
            use lz4_flex::block::DecompressError;
            unpack(input, output).map_err(|e| match e {
                DecompressError::OutputTooSmall { .. } => full(),
                other => corrupt(&other),
            })
        }
        opcode::ZSTD_COMPRESS => {
            let level = level(1, 19, 3)?;
            let codec = match codecs.zstd.take() {
                Some((same, codec)) if same == level => codec,
                _ => Compressor::new(level).map_err(|e| state(&e))?,
            };
            let (_, codec) = codecs.zstd.insert((level, codec));
            codec.compress_to_buffer(input, output).map_err(|_| full())
        }
        opcode::ZSTD_DECOMPRESS => {
            no_level()?;
            let codec = match codecs.unzstd.take() {
                Some(codec) => codec,
                None => Decompressor::new().map_err(|e| state(&e))?,
            };
            let result = codecs.unzstd.insert(codec).decompress_to_buffer(input, output);
            result.map_err(|e| if e.to_string().contains("too small") { full() } else { corrupt(&e) })
        }
        opcode::DEFLATE => {
            let level = if d.first == 0 { 6 } else { level(1, 9, 6)? as u32 };
            let codec = match codecs.deflate.take() {
                Some((same, mut codec)) if same == level => {
                    codec.reset();
                    codec
                }
                _ => Compress::new(Compression::new(level), false),
            };
            let (_, codec) = codecs.deflate.insert((level, codec));
            match codec.compress(input, output, FlushCompress::Finish) {
                Ok(Status::StreamEnd) => Ok(codec.total_out() as usize),
                Ok(_) => Err(full()),
                Err(e) => Err(state(&e)),
            }
        }
        _ => {
            no_level()?;
            let mut codec = codecs.inflate.take().unwrap_or_else(|| Decompress::new(false));
            codec.reset(false);
            let codec = codecs.inflate.insert(codec);
            match codec.decompress(input, output, FlushDecompress::Finish) {
                Ok(Status::StreamEnd) => Ok(codec.total_out() as usize),
                Ok(_) if codec.total_out() as usize == room => Err(full()),
                Ok(_) => Err(corrupt(&"it ends too soon")),
                Err(e) => Err(corrupt(&e)),
            }
        }
    }
}

/// By itself, because the crate's loops are compiled into whoever calls them: as a part of [`run`] they were half as fast.
#[inline(never)]
fn unpack(input: &[u8], output: &mut [u8]) -> Result<usize, lz4_flex::block::DecompressError> {
    lz4_flex::block::decompress_into(input, output)
}
