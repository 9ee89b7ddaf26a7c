//! Class crypto. Keys are in the device and are named by handle (`word`).
//!
//! Sealing reads `size` bytes and writes them with a tag of 16 bytes behind; opening is the reverse, and writes nothing
//! when the tag is wrong. `first` is the address of the parameters: nonce (12 bytes), length of the associated data
//! (u32), the data. Digests write 32 bytes.

use ring::aead::{AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use ring::{digest, hmac};

use crate::abi::{Descriptor, opcode};
use crate::error::{Errno, Refused, refuse, require};
use crate::keys::KeyKind;
use crate::memory::{Access, offset, read_u32};

use super::{Buffer, Env, Step, fetch, one_shot, unused};

const TAG: usize = 16;
const NONCE: usize = 12;

pub(super) fn step(d: &Descriptor, env: &mut Env<'_>, cost: &mut u64) -> Result<Step, Refused> {
    let size = one_shot(d, d.size.into())?;
    *cost += size as u64 / 2;
    match d.opcode {
        opcode::AES_SEAL | opcode::AES_OPEN | opcode::CHACHA_SEAL | opcode::CHACHA_OPEN => aead(d, env, size),
        _ => digest_of(d, env, size),
    }
}

fn aead(d: &Descriptor, env: &mut Env<'_>, size: usize) -> Result<Step, Refused> {
    unused(d, &[("second", d.second)])?;
    let seal = matches!(d.opcode, opcode::AES_SEAL | opcode::CHACHA_SEAL);
    let (algorithm, kind) = match d.opcode {
        opcode::AES_SEAL | opcode::AES_OPEN => (&AES_256_GCM, KeyKind::Aes256Gcm),
        _ => (&CHACHA20_POLY1305, KeyKind::ChaCha20Poly1305),
    };
    let mut nonce = [0; NONCE];
    env.space.read(d.first, &mut nonce)?;
    let aad_bytes = one_shot(d, read_u32(env.space, offset(d.first, NONCE as u64)?)?.into())?;
    let mut aad = Buffer::default();
    let aad = match aad_bytes {
        0 => &mut [],
        _ => fetch(env.space, offset(d.first, NONCE as u64 + 4)?, aad_bytes, &mut aad)?,
    };
    let nonce = Nonce::assume_unique_for_key(nonce);
    let key = env.keys.with(d.word, kind, |bytes| UnboundKey::new(algorithm, bytes))?;
    let key = LessSafeKey::new(key.map_err(|_| Refused::new(Errno::Invalid, "the key has the wrong length"))?);
    let text = &mut env.scratch.input;
    let written = if seal {
        env.space.check(d.destination, (size + TAG) as u64, Access::Write)?;
        let text = fetch(env.space, d.source, size, text)?;
        let sealed = key.seal_in_place_separate_tag(nonce, Aad::from(&*aad), text);
        let tag = sealed.map_err(|_| Refused::new(Errno::TooBig, "more bytes than a key may seal at once"))?;
        env.space.write(d.destination, text)?;
        env.space.write(d.destination + size as u64, tag.as_ref())?;
        size + TAG
    } else {
        require(size >= TAG, || format!("{size} bytes are shorter than a tag"))?;
        env.space.check(d.destination, (size - TAG) as u64, Access::Write)?;
        let text = fetch(env.space, d.source, size, text)?;
        let Ok(plain) = key.open_in_place(nonce, Aad::from(&*aad), text) else {
            return refuse(Errno::BadMessage, "the data does not authenticate");
        };
        env.space.write(d.destination, plain)?;
        plain.len()
    };
    Ok(Step::Done { bytes: size as u64, result: written as u64 })
}

/// Bytes of a piece of a digest: they stay in the first cache, and BLAKE3 has enough chunks at once.
const PIECE: usize = 16 << 10;

fn digest_of(d: &Descriptor, env: &mut Env<'_>, size: usize) -> Result<Step, Refused> {
    unused(d, &[("first", d.first), ("second", d.second)])?;
    env.space.check(d.source, size as u64, Access::Read)?;
    env.space.check(d.destination, 32, Access::Write)?;
    let input = &mut env.scratch.input;
    let mut each = |update: &mut dyn FnMut(&[u8])| {
        for at in (0..size).step_by(PIECE) {
            let bytes = PIECE.min(size - at);
            update(fetch(env.space, d.source + at as u64, bytes, input)?);
        }
        Ok::<_, Refused>(())
    };
    let mut out = [0; 32];
    match d.opcode {
        opcode::SHA256 => {
            unused(d, &[("word", d.word.into())])?;
            let mut context = digest::Context::new(&digest::SHA256);
            each(&mut |bytes| context.update(bytes))?;
            out.copy_from_slice(context.finish().as_ref());
        }
        opcode::BLAKE3 => {
            unused(d, &[("word", d.word.into())])?;
            let mut hasher = blake3::Hasher::new();
            each(&mut |bytes| {
                hasher.update(bytes);
            })?;
            out = *hasher.finalize().as_bytes();
        }
        _ => {
            let key = env.keys.with(d.word, KeyKind::HmacSha256, |bytes| hmac::Key::new(hmac::HMAC_SHA256, bytes))?;
            let mut context = hmac::Context::with_key(&key);
            each(&mut |bytes| context.update(bytes))?;
            out.copy_from_slice(context.sign().as_ref());
        }
    }
    env.space.write(d.destination, &out)?;
    Ok(Step::Done { bytes: size as u64, result: 32 })
}
