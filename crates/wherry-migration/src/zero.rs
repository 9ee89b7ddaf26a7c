//! Finding zero pages in memory that others may write at the same time.
#![expect(
    unsafe_code,
    reason = "reads guest memory by raw pointer: a reference to it would promise that nobody writes it"
)]

use wherry_memory::GRANULE;

#[cfg(target_arch = "x86_64")]
type Word = std::arch::x86_64::__m128i;
#[cfg(not(target_arch = "x86_64"))]
type Word = u64;

/// Whether the granule at `page` holds only zeros. If it is written meanwhile the answer may be either; the dirty log
/// knows of the write then.
///
/// Most pages that are not zero differ in their first bytes, so those cost one cache line.
///
/// # Safety
/// `page` must be aligned to a granule, and the granule mapped and readable.
pub(crate) unsafe fn is_zero(page: *const u8) -> bool {
    let words = page.cast::<Word>();
    let per_line = 64 / size_of::<Word>();
    let lines = GRANULE as usize / 64;
    for line in 0..lines {
        let mut any = 0u64;
        for word in 0..per_line {
            // SAFETY: inside the granule and aligned, by the caller's promise. Volatile, because others may write it.
            let value = unsafe { words.add(line * per_line + word).read_volatile() };
            any |= fold(value);
        }
        if any != 0 {
            return false;
        }
    }
    true
}

#[cfg(target_arch = "x86_64")]
fn fold(word: Word) -> u64 {
    // SAFETY: both types have 16 bytes and every bit pattern is valid for both.
    let halves: [u64; 2] = unsafe { std::mem::transmute(word) };
    halves[0] | halves[1]
}

#[cfg(not(target_arch = "x86_64"))]
fn fold(word: Word) -> u64 {
    word
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(4096))]
    struct Page([u8; 4096]);

    #[test]
    fn a_page_is_zero_if_and_only_if_every_byte_is() {
        let mut page = Box::new(Page([0; 4096]));
        // SAFETY: an aligned page of our own.
        assert!(unsafe { is_zero(page.0.as_ptr()) });
        for at in [0, 1, 7, 15, 16, 63, 64, 2047, 4088, 4095] {
            page.0[at] = 0x80;
            // SAFETY: as above.
            assert!(!unsafe { is_zero(page.0.as_ptr()) }, "byte {at}");
            page.0[at] = 0;
        }
    }
}
