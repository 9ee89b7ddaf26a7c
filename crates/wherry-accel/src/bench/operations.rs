//! What is measured: operations of each class, and the same by the crate that does the work.

use ring::aead::{AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

use super::{BASE, HALF, KEY, OUTPUT, OWN};
use crate::abi::{Descriptor, MAX_ONE_SHOT, class, opcode};
use crate::memory::{AddressSpace, Arena};
use crate::program;

/// Shards of an erasure code.
const ORIGINALS: usize = 8;
const RECOVERIES: usize = 2;
/// The bitmap of a code that has lost its first two shards.
pub(super) const BITMAP: u64 = OWN + 512;
/// A program that adds up all bytes, in words of eight: r1 from here, r2 so many.
pub(super) const PROGRAM: u64 = OWN + 1024;
pub(super) const SUM: [u64; 8] = [
    0x0000_0000_0000_00b7, // r0 = 0
    0x0000_0000_0005_0215, // if r2 == 0 goto exit
    0x0000_0000_0000_1479, // r4 = *(u64 *)r1
    0x0000_0000_0000_400f, // r0 += r4
    0x0000_0008_0000_0107, // r1 += 8
    0xffff_ffff_0000_0207, // r2 += -1
    0x0000_0000_fffa_0005, // goto the second one
    0x0000_0000_0000_0095, // exit
];
/// More instructions than any size takes.
const FUEL: u32 = u32::MAX;

/// Calls the crate: input and output.
pub(super) type Direct = Box<dyn FnMut(&[u8], &mut [u8]) -> Option<()>>;
/// Makes what the operation reads from what all of them begin with.
type Prepare = fn(&[u8]) -> Option<Prepared>;

/// What is measured.
pub(super) struct Operation {
    pub name: &'static str,
    pub class: u16,
    pub descriptor: Descriptor,
    /// Made before it is measured, where it is not the input itself.
    pub prepare: Option<Prepare>,
    pub direct: Direct,
}

/// Bytes for an operation to read, and what the descriptor says of their size.
pub(super) struct Prepared {
    pub bytes: Vec<u8>,
    pub size: u32,
}

impl Prepared {
    fn whole(bytes: Vec<u8>) -> Option<Self> {
        let size = u32::try_from(bytes.len()).ok()?;
        Some(Self { bytes, size })
    }
}

fn key(algorithm: &'static Algorithm) -> Option<LessSafeKey> {
    Some(LessSafeKey::new(UnboundKey::new(algorithm, &KEY).ok()?))
}

fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

fn seal(algorithm: &'static Algorithm) -> Direct {
    Box::new(move |input: &[u8], output: &mut [u8]| {
        let text = &mut output[..input.len()];
        text.copy_from_slice(input);
        let tag = key(algorithm)?.seal_in_place_separate_tag(nonce(), Aad::empty(), text).ok()?;
        output[input.len()..input.len() + 16].copy_from_slice(tag.as_ref());
        Some(())
    })
}

fn encoded(input: &[u8]) -> Option<Vec<u8>> {
    let shard = input.len() / ORIGINALS;
    reed_solomon_simd::encode(ORIGINALS, RECOVERIES, input.chunks_exact(shard)).ok().map(|shards| shards.concat())
}

/// Everything that is measured at a size.
pub(super) fn operations(size: usize) -> Vec<Operation> {
    let d = |code| Descriptor::new(code, BASE, OUTPUT, size as u32);
    let room = (2 * size + 4096).min(MAX_ONE_SHOT as usize) as u32;
    let shard = size / ORIGINALS;
    let code = |code| {
        let d = Descriptor::new(code, BASE, OUTPUT, shard as u32);
        d.with((ORIGINALS | RECOVERIES << 16) as u32, 0, 0)
    };
    let one = |name, class, descriptor, direct| Operation { name, class, descriptor, prepare: None, direct };
    let from = |prepare: Prepare, name, class, descriptor, direct| Operation {
        name,
        class,
        descriptor,
        prepare: Some(prepare),
        direct,
    };
    let unpack = |code| d(code).with(size as u32, 0, 0);
    vec![
        one(
            "move",
            class::COPY,
            d(opcode::MOVE),
            Box::new(|input, output| {
                output[..input.len()].copy_from_slice(input);
                Some(())
            }),
        ),
        one("fill", class::COPY, Descriptor { source: 0, ..d(opcode::FILL) }.with(0, 0x0102_0304_0506_0708, 0), {
            Box::new(move |_, output| {
                output[..size].as_chunks_mut::<8>().0.fill(0x0102_0304_0506_0708u64.to_le_bytes());
                std::hint::black_box(&output[..size]);
                Some(())
            })
        }),
        one(
            "crc",
            class::COPY,
            Descriptor { destination: 0, ..d(opcode::CRC) },
            Box::new(|input, _| {
                std::hint::black_box(crc32c::crc32c(input));
                Some(())
            }),
        ),
        one(
            "lz4-compress",
            class::COMPRESS,
            d(opcode::LZ4_COMPRESS).with(room, 0, 0),
            Box::new(|input, output| lz4_flex::block::compress_into(input, output).ok().map(|_| ())),
        ),
        from(
            |input| Prepared::whole(lz4_flex::block::compress(input)),
            "lz4-decompress",
            class::COMPRESS,
            unpack(opcode::LZ4_DECOMPRESS),
            Box::new(move |input, output| {
                lz4_flex::block::decompress_into(input, &mut output[..size]).ok().map(|_| ())
            }),
        ),
        one("zstd-compress", class::COMPRESS, d(opcode::ZSTD_COMPRESS).with(room, 0, 0), {
            let mut zstd = zstd::bulk::Compressor::new(3).ok();
            Box::new(move |input, output| zstd.as_mut()?.compress_to_buffer(input, output).ok().map(|_| ()))
        }),
        from(
            |input| Prepared::whole(zstd::bulk::compress(input, 3).ok()?),
            "zstd-decompress",
            class::COMPRESS,
            unpack(opcode::ZSTD_DECOMPRESS),
            {
                let mut zstd = zstd::bulk::Decompressor::new().ok();
                Box::new(move |input, output| {
                    zstd.as_mut()?.decompress_to_buffer(input, &mut output[..size]).ok().map(|_| ())
                })
            },
        ),
        one("deflate", class::COMPRESS, d(opcode::DEFLATE).with(room, 0, 0), {
            let mut deflate = flate2::Compress::new(flate2::Compression::new(6), false);
            Box::new(move |input, output| {
                deflate.reset();
                deflate.compress(input, output, flate2::FlushCompress::Finish).ok().map(|_| ())
            })
        }),
        from(
            |input| {
                let mut out = vec![0; 2 * input.len() + 4096];
                let mut deflate = flate2::Compress::new(flate2::Compression::new(6), false);
                deflate.compress(input, &mut out, flate2::FlushCompress::Finish).ok()?;
                out.truncate(deflate.total_out() as usize);
                Prepared::whole(out)
            },
            "inflate",
            class::COMPRESS,
            unpack(opcode::INFLATE),
            {
                let mut inflate = flate2::Decompress::new(false);
                Box::new(move |input, output| {
                    inflate.reset(false);
                    let output = &mut output[..size];
                    inflate.decompress(input, output, flate2::FlushDecompress::Finish).ok().map(|_| ())
                })
            },
        ),
        one("aes-seal", class::CRYPTO, d(opcode::AES_SEAL).with(1, OWN, 0), seal(&AES_256_GCM)),
        from(
            |input| {
                let mut sealed = vec![0; input.len() + 16];
                seal(&AES_256_GCM)(input, &mut sealed)?;
                Prepared::whole(sealed)
            },
            "aes-open",
            class::CRYPTO,
            d(opcode::AES_OPEN).with(1, OWN, 0),
            Box::new(|input, output| {
                let text = &mut output[..input.len()];
                text.copy_from_slice(input);
                key(&AES_256_GCM)?.open_in_place(nonce(), Aad::empty(), text).ok().map(|_| ())
            }),
        ),
        one("chacha-seal", class::CRYPTO, d(opcode::CHACHA_SEAL).with(2, OWN, 0), seal(&CHACHA20_POLY1305)),
        one(
            "sha256",
            class::CRYPTO,
            d(opcode::SHA256),
            Box::new(|input, output| {
                output[..32].copy_from_slice(ring::digest::digest(&ring::digest::SHA256, input).as_ref());
                Some(())
            }),
        ),
        one(
            "blake3",
            class::CRYPTO,
            d(opcode::BLAKE3),
            Box::new(|input, output| {
                output[..32].copy_from_slice(blake3::hash(input).as_bytes());
                Some(())
            }),
        ),
        one(
            "run",
            class::COMPUTE,
            {
                let text = (SUM.len() * 8) as u32;
                Descriptor::new(opcode::RUN, PROGRAM, 0, text).with(FUEL, BASE, size as u64 / 8)
            },
            {
                // Nobody's but this one's: a program that is called directly reads memory that is there, too.
                let arena = Arena::new(&[(BASE, HALF)]).ok();
                Box::new(move |input, _| {
                    let arena = arena.as_ref()?;
                    let mut machine =
                        program::Machine::load(SUM.to_vec(), [BASE, input.len() as u64 / 8, 0], FUEL.into()).ok()?;
                    match machine.run(arena as &dyn AddressSpace, u64::MAX) {
                        program::Progress::Exit(sum) => std::hint::black_box(Some(sum)).map(|_| ()),
                        _ => None,
                    }
                })
            },
        ),
        one("erasure-encode", class::CODE, code(opcode::RS_ENCODE), {
            let mut encoder = reed_solomon_simd::ReedSolomonEncoder::new(ORIGINALS, RECOVERIES, shard).ok();
            Box::new(move |input, output| {
                let encoder = encoder.as_mut()?;
                encoder.reset(ORIGINALS, RECOVERIES, shard).ok()?;
                input.chunks_exact(shard).try_for_each(|original| encoder.add_original_shard(original)).ok()?;
                let result = encoder.encode().ok()?;
                let recoveries = output.chunks_exact_mut(shard).zip(result.recovery_iter());
                recoveries.for_each(|(to, from)| to.copy_from_slice(from));
                Some(())
            })
        }),
        from(
            |input| {
                let bytes = [input, &encoded(input)?].concat();
                Some(Prepared { bytes, size: u32::try_from(input.len() / ORIGINALS).ok()? })
            },
            "erasure-recover",
            class::CODE,
            Descriptor { first: BITMAP, ..code(opcode::RS_RECOVER) },
            {
                let mut decoder = reed_solomon_simd::ReedSolomonDecoder::new(ORIGINALS, RECOVERIES, shard).ok();
                Box::new(move |input, output| {
                    let decoder = decoder.as_mut()?;
                    decoder.reset(ORIGINALS, RECOVERIES, shard).ok()?;
                    let shards: Vec<&[u8]> = input.chunks_exact(shard).collect();
                    for (index, original) in shards[..ORIGINALS].iter().enumerate().skip(2) {
                        decoder.add_original_shard(index, original).ok()?;
                    }
                    for (index, recovery) in shards[ORIGINALS..].iter().enumerate() {
                        decoder.add_recovery_shard(index, recovery).ok()?;
                    }
                    let result = decoder.decode().ok()?;
                    for (index, bytes) in result.restored_original_iter() {
                        output[index * shard..][..shard].copy_from_slice(bytes);
                    }
                    Some(())
                })
            },
        ),
    ]
}
