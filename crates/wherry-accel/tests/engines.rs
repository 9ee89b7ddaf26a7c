//! What engines compute, checked against other implementations: other crates, or a plain reference written here.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use support::{Bench, hex, pattern};
use wherry_accel::abi::{Descriptor, class, opcode};
use wherry_accel::error::Errno;
use wherry_accel::keys::{FleetKey, KeyKind};

/// Sizes around every piece that engines work in.
const SIZES: [usize; 12] =
    [0, 1, 7, 8, 63, 4096, 16 << 10, (16 << 10) + 1, 65_535, 256 << 10, (256 << 10) + 3, 700_001];

#[test]
fn moves_and_fills_are_what_a_plain_loop_makes_of_them() {
    let mut b = Bench::new(class::COPY);
    for size in SIZES {
        let data = pattern(size, 1);
        let (from, to) = (b.put(&data), b.room(size + 8));
        assert_eq!(b.run(Descriptor::new(opcode::MOVE, from, to, size as u32)).unwrap().0, size as u64);
        assert_eq!(b.get(to, size), data);
        b.run(Descriptor::new(opcode::FILL, 0, to, size as u32).with(0, 0x0807_0605_0403_0201, 0)).unwrap();
        let expected: Vec<u8> = (0..size).map(|i| (i % 8) as u8 + 1).chain([0; 8]).collect();
        assert_eq!(b.get(to, size + 8), expected, "and nothing behind it");
        let other = b.room(size);
        b.run(Descriptor::new(opcode::DUAL_CAST, from, to, size as u32).with(0, other, 0)).unwrap();
        assert_eq!((b.get(to, size), b.get(other, size)), (data.clone(), data));
    }
    // Overlapping, in both directions, across the pieces.
    for shift in [1usize, 4096, 300_000] {
        let data = pattern(700_001, 2);
        let at = b.room(data.len() + shift);
        b.write(at, &data);
        b.run(Descriptor::new(opcode::MOVE, at, at + shift as u64, data.len() as u32)).unwrap();
        assert_eq!(b.get(at + shift as u64, data.len()), data, "up by {shift}");
        b.run(Descriptor::new(opcode::MOVE, at + shift as u64, at, data.len() as u32)).unwrap();
        assert_eq!(b.get(at, data.len()), data, "down by {shift}");
    }
}

#[test]
fn scans_find_the_first_byte_that_differs() {
    let mut b = Bench::new(class::COPY);
    for size in SIZES {
        let data = pattern(size, 3);
        let (left, right, zero) = (b.put(&data), b.put(&data), b.room(size));
        let compare = Descriptor::new(opcode::COMPARE, left, right, size as u32);
        let scan = Descriptor::new(opcode::ZERO_SCAN, zero, 0, size as u32);
        assert_eq!(b.run(compare).unwrap().1, size as u64);
        assert_eq!(b.run(scan).unwrap().1, size as u64);
        for at in [0, size / 3, size.saturating_sub(1)].into_iter().filter(|at| *at < size) {
            b.write(right + at as u64, &[!data[at]]);
            b.write(zero + at as u64, &[1]);
            assert_eq!(b.run(compare).unwrap().1, at as u64, "{size} bytes");
            assert_eq!(b.run(scan).unwrap().1, at as u64, "{size} bytes");
            b.write(right + at as u64, &data[at..=at]);
            b.write(zero + at as u64, &[0]);
        }
    }
}

/// CRC-32C, one bit after the other.
fn crc_reference(seed: u32, data: &[u8]) -> u32 {
    !data.iter().fold(!seed, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}

#[test]
fn the_crc_is_that_of_a_bit_by_bit_reference() {
    let mut b = Bench::new(class::COPY);
    assert_eq!(crc_reference(0, b"123456789"), 0xe306_9283, "the reference itself: RFC 3720, B.4");
    for size in SIZES {
        let data = pattern(size, 4);
        let (from, to) = (b.put(&data), b.room(size));
        for seed in [0, 0x1234_5678] {
            let expected = u64::from(crc_reference(seed, &data));
            let crc = Descriptor::new(opcode::CRC, from, 0, size as u32).with(seed, 0, 0);
            assert_eq!(b.run(crc).unwrap().1, expected, "{size} bytes");
            let both = Descriptor::new(opcode::COPY_CRC, from, to, size as u32).with(seed, 0, 0);
            assert_eq!(b.run(both).unwrap().1, expected);
            assert_eq!(b.get(to, size), data);
        }
    }
}

#[test]
fn a_delta_applied_to_the_old_bytes_makes_the_new_ones() {
    let mut b = Bench::new(class::COPY);
    for changes in [0usize, 1, 50, 8192] {
        let old = pattern(65_536, 5);
        let mut new = old.clone();
        for change in 0..changes {
            let at = change * 7919 % new.len();
            new[at] ^= 0x55;
        }
        let words = old.chunks(8).zip(new.chunks(8)).filter(|(a, b)| a != b).count();
        let (from, changed, record) = (b.put(&old), b.put(&new), b.room(100_000));
        let make = Descriptor::new(opcode::DELTA_MAKE, from, record, old.len() as u32).with(0, changed, 100_000);
        let bytes = b.run(make).unwrap().1;
        assert_eq!(bytes, 10 * words as u64);
        let apply = Descriptor::new(opcode::DELTA_APPLY, record, from, bytes as u32).with(0, 65_536, 0);
        assert_eq!(b.run(apply).unwrap().1, words as u64);
        assert!(b.get(from, new.len()) == new);
        if words > 0 {
            let short = make.with(0, changed, 9);
            b.write(from, &old);
            assert_eq!(b.run(short).unwrap_err(), Errno::NoSpace);
            // An entry beyond the target changes nothing, though others before it would fit.
            let narrow = apply.with(0, 8, 0);
            let errno = if words == 1 { None } else { Some(Errno::BadMessage) };
            if errno.is_some() {
                assert_eq!(b.run(narrow).err(), errno);
                assert!(b.get(from, old.len()) == old);
            }
        }
    }
    assert_eq!(b.run(Descriptor::new(opcode::DELTA_MAKE, 0, 0, 12)).unwrap_err(), Errno::Invalid);
    assert_eq!(b.run(Descriptor::new(opcode::DELTA_APPLY, 0, 0, 12)).unwrap_err(), Errno::Invalid);
}

/// Text that compresses, and noise that does not.
fn samples() -> Vec<Vec<u8>> {
    let text = b"it is a truth universally acknowledged that a page may be written twice. ".repeat(3000);
    let mut mixed = text[..100_000].to_vec();
    mixed.extend(pattern(100_000, 6));
    vec![Vec::new(), b"a".to_vec(), pattern(100_000, 7), vec![0; 300_000], text, mixed]
}

/// Compresses `data` in the engine, and hands the result to `other`; then what `theirs` compresses to the engine.
fn both_ways(compress: u8, decompress: u8, theirs: impl Fn(&[u8]) -> Vec<u8>, other: impl Fn(&[u8], usize) -> Vec<u8>) {
    let mut b = Bench::new(class::COMPRESS);
    for data in samples() {
        let room = data.len() * 2 + 1000;
        let (from, to) = (b.put(&data), b.room(room));
        let descriptor = Descriptor::new(compress, from, to, data.len() as u32).with(room as u32, 0, 0);
        let written = b.run(descriptor).unwrap().1 as usize;
        let compressed = b.get(to, written);
        assert!(other(&compressed, data.len()) == data, "{} bytes, read by the other one", data.len());
        if data.len() > 200_000 {
            assert!(written < data.len(), "it compresses");
        }
        let compressed = theirs(&data);
        let (from, to) = (b.put(&compressed), b.room(room));
        let back = Descriptor::new(decompress, from, to, compressed.len() as u32).with(data.len() as u32, 0, 0);
        assert_eq!(b.run(back).unwrap().1, data.len() as u64);
        assert!(b.get(to, data.len()) == data, "{} bytes, written by the other one", data.len());
        if data.len() > 1 {
            let short = back.with(data.len() as u32 - 1, 0, 0);
            assert_eq!(b.run(short).unwrap_err(), Errno::NoSpace, "{} bytes", data.len());
            let cut = Descriptor { size: back.size / 2, ..back };
            assert!(matches!(b.run(cut), Err(Errno::BadMessage | Errno::NoSpace)), "half of it");
            let narrow = descriptor.with(1, 0, 0);
            b.write(descriptor.source, &data);
            assert_eq!(b.run(narrow).unwrap_err(), Errno::NoSpace);
        }
    }
    let noise = b.put(&[0xff; 100]);
    let to = b.room(1000);
    assert!(b.run(Descriptor::new(decompress, noise, to, 100).with(1000, 0, 0)).is_err(), "noise is refused");
}

#[test]
fn lz4_blocks_are_those_of_the_c_library() {
    both_ways(
        opcode::LZ4_COMPRESS,
        opcode::LZ4_DECOMPRESS,
        |data| lz4::block::compress(data, None, false).unwrap(),
        |data, size| lz4::block::decompress(data, Some(size as i32)).unwrap(),
    );
}

#[test]
fn zstd_frames_are_those_of_another_implementation() {
    use std::io::Read;
    both_ways(
        opcode::ZSTD_COMPRESS,
        opcode::ZSTD_DECOMPRESS,
        |data| ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Fastest),
        |data, _| {
            let mut out = Vec::new();
            ruzstd::decoding::StreamingDecoder::new(data).unwrap().read_to_end(&mut out).unwrap();
            out
        },
    );
}

#[test]
fn deflate_is_that_of_another_implementation() {
    both_ways(
        opcode::DEFLATE,
        opcode::INFLATE,
        |data| miniz_oxide::deflate::compress_to_vec(data, 6),
        |data, _| miniz_oxide::inflate::decompress_to_vec(data).unwrap(),
    );
}

#[test]
fn levels_that_do_not_exist_are_refused_and_others_read_back() {
    let mut b = Bench::new(class::COMPRESS);
    let data = &samples()[4];
    let (from, to, back) = (b.put(data), b.room(data.len()), b.room(data.len()));
    for (compress, decompress, levels, beyond) in [
        (opcode::ZSTD_COMPRESS, opcode::ZSTD_DECOMPRESS, [1, 9, 19], 20),
        (opcode::DEFLATE, opcode::INFLATE, [1, 5, 9], 10),
    ] {
        for level in levels {
            let d = Descriptor::new(compress, from, to, data.len() as u32).with(data.len() as u32, level, 0);
            let written = b.run(d).unwrap().1;
            let d = Descriptor::new(decompress, to, back, written as u32).with(data.len() as u32, 0, 0);
            b.run(d).unwrap();
            assert!(b.get(back, data.len()) == *data);
        }
        let d = Descriptor::new(compress, from, to, 10).with(100, beyond, 0);
        assert_eq!(b.run(d).unwrap_err(), Errno::Invalid);
    }
}

#[test]
fn sealed_data_is_that_of_another_implementation_and_opens_only_as_it_was_sealed() {
    use aes_gcm::aead::{Aead, KeyInit, Payload};
    let mut b = Bench::new(class::CRYPTO);
    let (key, nonce, aad) = ([7u8; 32], [9u8; 12], b"what it belongs to".to_vec());
    let fleet = FleetKey::new([1; 32]);
    for (handle, kind) in [(1, KeyKind::Aes256Gcm), (2, KeyKind::ChaCha20Poly1305)] {
        let wrapped = fleet.wrap(handle, kind, &key).unwrap();
        b.device.keys().import(&fleet, handle, kind, &wrapped).unwrap();
    }
    let parameters = b.put(&[&nonce[..], &(aad.len() as u32).to_le_bytes(), &aad].concat());
    for (handle, seal, open) in [(1, opcode::AES_SEAL, opcode::AES_OPEN), (2, opcode::CHACHA_SEAL, opcode::CHACHA_OPEN)]
    {
        for size in [0usize, 1, 16, 4097, 300_000] {
            let data = pattern(size, 8);
            let payload = || Payload { msg: &data, aad: &aad };
            let expected = match handle {
                1 => aes_gcm::Aes256Gcm::new(&key.into()).encrypt(&nonce.into(), payload()).unwrap(),
                _ => chacha20poly1305::ChaCha20Poly1305::new(&key.into()).encrypt(&nonce.into(), payload()).unwrap(),
            };
            let (from, to, back) = (b.put(&data), b.room(size + 16), b.room(size));
            let d = Descriptor::new(seal, from, to, size as u32).with(handle, parameters, 0);
            assert_eq!(b.run(d).unwrap().1, size as u64 + 16);
            assert!(b.get(to, size + 16) == expected);
            let d = Descriptor::new(open, to, back, size as u32 + 16).with(handle, parameters, 0);
            assert_eq!(b.run(d).unwrap().1, size as u64);
            assert!(b.get(back, size) == data);
            // One bit, anywhere: nothing is written.
            for at in [0, size / 2, size + 15] {
                b.write(to + at as u64, &[expected[at] ^ 0x10]);
                b.write(back, &vec![0xaa; size]);
                assert_eq!(b.run(d).unwrap_err(), Errno::BadMessage);
                assert!(b.get(back, size).iter().all(|byte| *byte == 0xaa));
                b.write(to + at as u64, &expected[at..=at]);
            }
        }
        let d = Descriptor::new(seal, parameters, parameters, 1);
        assert_eq!(b.run(d.with(3, parameters, 0)).unwrap_err(), Errno::NoEntry, "no such key");
        assert_eq!(b.run(d.with(3 - handle, parameters, 0)).unwrap_err(), Errno::Invalid, "a key for something else");
        let short = Descriptor::new(open, parameters, parameters, 15).with(handle, parameters, 0);
        assert_eq!(b.run(short).unwrap_err(), Errno::Invalid);
    }
}

#[test]
fn digests_are_those_of_other_implementations() {
    use hmac::{KeyInit, Mac};
    use sha2::Digest;
    let mut b = Bench::new(class::CRYPTO);
    let fleet = FleetKey::new([1; 32]);
    let wrapped = fleet.wrap(5, KeyKind::HmacSha256, &[0x42; 32]).unwrap();
    b.device.keys().import(&fleet, 5, KeyKind::HmacSha256, &wrapped).unwrap();
    for size in SIZES {
        let data = pattern(size, 9);
        let (from, to) = (b.put(&data), b.room(32));
        b.run(Descriptor::new(opcode::SHA256, from, to, size as u32)).unwrap();
        assert_eq!(b.get(to, 32), sha2::Sha256::digest(&data)[..]);
        b.run(Descriptor::new(opcode::HMAC, from, to, size as u32).with(5, 0, 0)).unwrap();
        let mut mac = hmac::Hmac::<sha2::Sha256>::new_from_slice(&[0x42; 32]).unwrap();
        mac.update(&data);
        assert_eq!(b.get(to, 32), mac.finalize().into_bytes()[..]);
    }
    // BLAKE3: the published vectors, input bytes counting modulo 251.
    for (size, expected) in [
        (0, "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"),
        (1, "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213"),
        (1024, "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7"),
        (102_400, "bc3e3d41a1146b069abffad3c0d44860cf664390afce4d9661f7902e7943e085"),
    ] {
        let data: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
        let (from, to) = (b.put(&data), b.room(32));
        b.run(Descriptor::new(opcode::BLAKE3, from, to, size as u32)).unwrap();
        assert_eq!(hex(&b.get(to, 32)), expected, "{size} bytes");
    }
}

#[test]
fn erasure_codes_are_those_of_another_implementation_and_bring_back_what_is_lost() {
    let mut b = Bench::new(class::CODE);
    for (originals, recoveries, shard) in
        [(1usize, 1usize, 2usize), (3, 2, 64), (10, 4, 4096), (17, 5, 1000), (200, 56, 128)]
    {
        let shards: Vec<Vec<u8>> = (0..originals).map(|i| pattern(shard, 20 + i as u64)).collect();
        let word = (originals | recoveries << 16) as u32;
        // Another crate for the same code takes shards of multiples of 64 bytes.
        let all = b.put(&shards.concat());
        let total = b.room(shard * (originals + recoveries));
        b.write(total, &shards.concat());
        let to = total + (shard * originals) as u64;
        b.run(Descriptor::new(opcode::RS_ENCODE, all, to, shard as u32).with(word, 0, 0)).unwrap();
        let coded: Vec<Vec<u8>> = (0..recoveries).map(|i| b.get(to + (i * shard) as u64, shard)).collect();
        if shard % 64 == 0 {
            assert_eq!(
                coded,
                reed_solomon_16::encode(originals, recoveries, &shards).unwrap(),
                "{originals}+{recoveries}"
            );
        }
        // As many as can be are lost: the first ones.
        let lost = recoveries.min(originals);
        let mut bitmap = vec![0xffu8; (originals + recoveries).div_ceil(8)];
        for index in 0..lost {
            bitmap[index / 8] &= !(1 << (index % 8));
            b.write(total + (index * shard) as u64, &vec![0; shard]);
        }
        let map = b.put(&bitmap);
        let d = Descriptor::new(opcode::RS_RECOVER, total, total, shard as u32).with(word, map, 0);
        assert_eq!(b.run(d).unwrap().1, lost as u64);
        for (index, original) in shards.iter().enumerate() {
            assert!(b.get(total + (index * shard) as u64, shard) == *original, "shard {index}");
        }
        // One more than can be.
        if lost < originals {
            bitmap[lost / 8] &= !(1 << (lost % 8));
        } else {
            bitmap[originals / 8] &= !(1 << (originals % 8));
        }
        b.write(map, &bitmap);
        assert_eq!(b.run(d).unwrap_err(), Errno::BadMessage);
    }
    for (shard, word) in [(0, 1 | 1 << 16), (3, 1 | 1 << 16), (64, 1), (64, 1 << 16), (64, 200 | 57 << 16)] {
        let d = Descriptor::new(opcode::RS_ENCODE, 0, 0, shard).with(word, 0, 0);
        assert_eq!(b.run(d).unwrap_err(), Errno::Invalid);
    }
}

#[test]
fn memory_that_is_not_there_is_a_fault_before_anything_is_written() {
    for (class, opcodes) in [
        (class::COPY, opcode::MOVE..=opcode::DUAL_CAST),
        (class::COMPRESS, opcode::LZ4_COMPRESS..=opcode::INFLATE),
        (class::CRYPTO, opcode::SHA256..=opcode::BLAKE3),
        (class::CODE, opcode::RS_ENCODE..=opcode::RS_RECOVER),
    ] {
        let mut b = Bench::new(class);
        let there = b.room(4096);
        for opcode in opcodes {
            // Half of what is read, or written, is beyond the end.
            for (source, destination) in [(b.end() - 32, there), (there, b.end() - 8)] {
                let first = match opcode {
                    opcode::DUAL_CAST | opcode::DELTA_MAKE => there,
                    opcode::DELTA_APPLY => 4096,
                    opcode::RS_RECOVER => b.end(),
                    _ => 0,
                };
                let (word, second) = match opcode {
                    opcode::LZ4_COMPRESS..=opcode::INFLATE => (64, 0),
                    opcode::RS_ENCODE | opcode::RS_RECOVER => (1 | 1 << 16, 0),
                    opcode::DELTA_MAKE => (0, 4096),
                    _ => (0, 0),
                };
                let reads_only = matches!(opcode, opcode::ZERO_SCAN | opcode::CRC);
                if opcode == opcode::FILL && destination == there || reads_only && source == there {
                    continue;
                }
                let size = if opcode == opcode::DELTA_APPLY { 60 } else { 64 };
                let source = if opcode == opcode::FILL { 0 } else { source };
                let unwritten = matches!(opcode, opcode::ZERO_SCAN | opcode::CRC);
                let destination = if unwritten { 0 } else { destination };
                let d = Descriptor::new(opcode, source, destination, size).with(word, first, second);
                // A delta that is empty writes nothing, wherever that is.
                if opcode == opcode::DELTA_MAKE && source == there {
                    continue;
                }
                assert_eq!(b.run(d).unwrap_err(), Errno::Fault, "{opcode:#x} {source:#x} {destination:#x}");
                assert!(b.get(there, 4096).iter().all(|byte| *byte == 0), "{opcode:#x} has written");
            }
        }
        let huge = Descriptor::new(opcode::SHA256, 0, 0, u32::MAX);
        if class == class::CRYPTO {
            assert_eq!(b.run(huge).unwrap_err(), Errno::TooBig);
        }
    }
}
