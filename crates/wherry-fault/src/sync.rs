//! The atomics that page states are made of. The model test replaces this module by one that explores interleavings.
#![expect(unsafe_code, reason = "takes zeroed memory as atomics that are zero")]

pub(crate) use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering, fence};

/// `n` zeros from zeroed pages that cost nothing until they are written.
pub(crate) fn zeroed_u8(n: usize) -> Box<[AtomicU8]> {
    // SAFETY: an atomic integer has the layout of the integer, for which zero bytes are a valid value.
    unsafe { Box::<[AtomicU8]>::new_zeroed_slice(n).assume_init() }
}

/// `n` zeros from zeroed pages that cost nothing until they are written.
pub(crate) fn zeroed_u16(n: usize) -> Box<[AtomicU16]> {
    // SAFETY: as above.
    unsafe { Box::<[AtomicU16]>::new_zeroed_slice(n).assume_init() }
}
