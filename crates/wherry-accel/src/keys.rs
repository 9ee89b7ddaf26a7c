//! Keys that live in the device. A client names them by handle and never sees them.
//!
//! They enter by the host's API, wrapped by a [`FleetKey`] that all hosts of a fleet have, and they migrate wrapped: what
//! is saved is the very bytes that came in. A destination proves at the handshake that it has the fleet key
//! ([`FleetKey::prove`]), before anything moves.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroizing;

use crate::error::{Errno, Refused, refuse};

/// Most keys of a device.
pub const MAX_KEYS: usize = 4096;
/// Bytes of a wrapped key: nonce, 32 bytes, tag.
pub const WRAPPED_BYTES: usize = NONCE_LEN + 32 + 16;

/// What a key is for. A key is used for nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum KeyKind {
    /// AES-256-GCM.
    Aes256Gcm = 1,
    /// ChaCha20-Poly1305.
    ChaCha20Poly1305 = 2,
    /// HMAC-SHA-256.
    HmacSha256 = 3,
}

impl KeyKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Aes256Gcm, Self::ChaCha20Poly1305, Self::HmacSha256];

    /// The kind with that number.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u32 == number)
    }

    /// The kind with that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes256Gcm => "aes-256-gcm",
            Self::ChaCha20Poly1305 => "chacha20-poly1305",
            Self::HmacSha256 => "hmac-sha256",
        }
    }
}

/// The key that wraps keys; every host of a fleet has it.
pub struct FleetKey(Zeroizing<[u8; 32]>);

impl std::fmt::Debug for FleetKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FleetKey(..)")
    }
}

impl FleetKey {
    /// Takes the key.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Proof of having the key, for a challenge of the other side.
    pub fn prove(&self, challenge: &[u8; 32]) -> [u8; 32] {
        let mut proof = [0; 32];
        proof.copy_from_slice(hmac::sign(&self.proof_key(), challenge).as_ref());
        proof
    }

    /// Whether the proof is that of somebody who has the key.
    pub fn proves(&self, challenge: &[u8; 32], proof: &[u8; 32]) -> bool {
        hmac::verify(&self.proof_key(), challenge, proof).is_ok()
    }

    /// A key of its own for proofs, so that a challenge cannot be anything else.
    fn proof_key(&self) -> hmac::Key {
        let wrapping = hmac::Key::new(hmac::HMAC_SHA256, &self.0[..]);
        hmac::Key::new(hmac::HMAC_SHA256, hmac::sign(&wrapping, b"wherry-accel fleet proof").as_ref())
    }

    /// Wraps a key for a handle.
    pub fn wrap(&self, handle: u32, kind: KeyKind, key: &[u8; 32]) -> Result<Vec<u8>, Refused> {
        let mut nonce = [0; NONCE_LEN];
        let no = |what: &str| Refused::new(Errno::Io, what);
        SystemRandom::new().fill(&mut nonce).map_err(|_| no("the system gives no random bytes"))?;
        let mut wrapped = nonce.to_vec();
        wrapped.extend(key);
        let tag = self
            .cipher()?
            .seal_in_place_separate_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(associated(handle, kind)),
                &mut wrapped[NONCE_LEN..],
            )
            .map_err(|_| no("the key cannot be wrapped"))?;
        wrapped.extend(tag.as_ref());
        Ok(wrapped)
    }

    fn unwrap_key(&self, handle: u32, kind: KeyKind, wrapped: &[u8]) -> Result<Zeroizing<Vec<u8>>, Refused> {
        let (Some(nonce), true) = (wrapped.first_chunk::<NONCE_LEN>(), wrapped.len() == WRAPPED_BYTES) else {
            return refuse(Errno::Invalid, format!("a wrapped key has {WRAPPED_BYTES} bytes, not {}", wrapped.len()));
        };
        let mut text = Zeroizing::new(wrapped[NONCE_LEN..].to_vec());
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let opened = self.cipher()?.open_in_place(nonce, Aad::from(associated(handle, kind)), &mut text).is_ok();
        if !opened {
            return refuse(
                Errno::BadMessage,
                format!("key {handle} was wrapped by another fleet key, or for another handle or use"),
            );
        }
        text.truncate(32);
        Ok(text)
    }

    fn cipher(&self) -> Result<LessSafeKey, Refused> {
        let key = UnboundKey::new(&AES_256_GCM, &self.0[..]);
        Ok(LessSafeKey::new(key.map_err(|_| Refused::new(Errno::Io, "the fleet key cannot be used"))?))
    }
}

fn associated(handle: u32, kind: KeyKind) -> [u8; 8] {
    (u64::from(handle) | u64::from(kind as u32) << 32).to_le_bytes()
}

struct Key {
    kind: KeyKind,
    wrapped: Vec<u8>,
    bytes: Zeroizing<Vec<u8>>,
}

/// The keys of a device.
#[derive(Default)]
pub struct KeyStore {
    keys: RwLock<BTreeMap<u32, Key>>,
}

impl std::fmt::Debug for KeyStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeyStore({} keys)", self.keys.read().unwrap_or_else(PoisonError::into_inner).len())
    }
}

impl KeyStore {
    /// Takes a wrapped key under a handle.
    pub fn import(&self, fleet: &FleetKey, handle: u32, kind: KeyKind, wrapped: &[u8]) -> Result<(), Refused> {
        let bytes = fleet.unwrap_key(handle, kind, wrapped)?;
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        if keys.len() >= MAX_KEYS {
            return refuse(Errno::NoSpace, format!("there are {MAX_KEYS} keys already"));
        }
        if keys.contains_key(&handle) {
            return refuse(Errno::Exists, format!("there is a key {handle} already"));
        }
        keys.insert(handle, Key { kind, wrapped: wrapped.to_vec(), bytes });
        Ok(())
    }

    /// Forgets a key.
    pub fn remove(&self, handle: u32) -> Result<(), Refused> {
        match self.keys.write().unwrap_or_else(PoisonError::into_inner).remove(&handle) {
            Some(_) => Ok(()),
            None => refuse(Errno::NoEntry, format!("there is no key {handle}")),
        }
    }

    /// Handle, use and wrapped bytes of all keys.
    pub(crate) fn wrapped(&self) -> Vec<(u32, KeyKind, Vec<u8>)> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        keys.iter().map(|(handle, key)| (*handle, key.kind, key.wrapped.clone())).collect()
    }

    /// Lends the bytes of a key to `use_it`.
    pub(crate) fn with<T>(&self, handle: u32, kind: KeyKind, use_it: impl FnOnce(&[u8]) -> T) -> Result<T, Refused> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        match keys.get(&handle) {
            None => refuse(Errno::NoEntry, format!("there is no key {handle}")),
            Some(key) if key.kind != kind => refuse(Errno::Invalid, format!("key {handle} is not for {kind:?}")),
            Some(key) => Ok(use_it(&key.bytes)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_comes_in_only_by_its_fleet_key_handle_and_use() {
        let (fleet, other) = (FleetKey::new([1; 32]), FleetKey::new([2; 32]));
        let wrapped = fleet.wrap(7, KeyKind::HmacSha256, &[9; 32]).unwrap();
        let store = KeyStore::default();
        for (key, handle, kind) in
            [(&other, 7, KeyKind::HmacSha256), (&fleet, 8, KeyKind::HmacSha256), (&fleet, 7, KeyKind::Aes256Gcm)]
        {
            assert_eq!(store.import(key, handle, kind, &wrapped).unwrap_err().errno, Errno::BadMessage);
        }
        store.import(&fleet, 7, KeyKind::HmacSha256, &wrapped).unwrap();
        assert_eq!(store.with(7, KeyKind::HmacSha256, |b| b.to_vec()).unwrap(), [9; 32]);
        assert_eq!(store.with(7, KeyKind::Aes256Gcm, |_| ()).unwrap_err().errno, Errno::Invalid);
        assert_eq!(store.import(&fleet, 7, KeyKind::HmacSha256, &wrapped).unwrap_err().errno, Errno::Exists);
        store.remove(7).unwrap();
        assert_eq!(store.with(7, KeyKind::HmacSha256, |_| ()).unwrap_err().errno, Errno::NoEntry);
        assert_ne!(fleet.wrap(7, KeyKind::HmacSha256, &[9; 32]).unwrap(), wrapped, "a fresh nonce each time");
    }

    #[test]
    fn only_the_holder_of_the_fleet_key_proves_it() {
        let (fleet, other) = (FleetKey::new([1; 32]), FleetKey::new([2; 32]));
        let proof = fleet.prove(&[5; 32]);
        assert!(fleet.proves(&[5; 32], &proof));
        assert!(!fleet.proves(&[6; 32], &proof) && !other.proves(&[5; 32], &proof));
    }
}
