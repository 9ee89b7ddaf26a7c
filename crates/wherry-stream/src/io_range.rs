//! Pieces of memory and of files that are sent and received without a copy in between.

use std::os::fd::BorrowedFd;

/// A piece of mapped memory that is read by a send or written by a receive. Others may change it at the same time:
/// nobody makes a Rust reference to it, only the kernel looks at the bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct IoRange {
    ptr: *mut u8,
    len: usize,
}

// The kernel takes a slice of these for a slice of `struct iovec`.
const _: () = {
    assert!(size_of::<IoRange>() == size_of::<libc::iovec>());
    assert!(align_of::<IoRange>() == align_of::<libc::iovec>());
    assert!(std::mem::offset_of!(IoRange, ptr) == std::mem::offset_of!(libc::iovec, iov_base));
    assert!(std::mem::offset_of!(IoRange, len) == std::mem::offset_of!(libc::iovec, iov_len));
};

#[expect(unsafe_code, reason = "the promise that makes raw memory usable by safe calls is given at construction")]
mod promise {
    use super::IoRange;

    impl IoRange {
        /// Names `len` bytes at `ptr`.
        ///
        /// # Safety
        ///
        /// Until the last use of the value or of a copy of it, the range stays mapped, readable if it is sent and
        /// writable if it is received into, and no Rust reference to its bytes is used while a call works on it. Memory
        /// shared with a guest or another process is fine.
        pub unsafe fn new(ptr: *mut u8, len: usize) -> Self {
            Self { ptr, len }
        }
    }

    /// Copies for the layers that cannot work in place (TLS).
    impl IoRange {
        /// Appends a copy of its bytes. Where others write meanwhile, the copy holds some mixture of old and new.
        pub(crate) fn append_to(&self, buffer: &mut Vec<u8>) {
            buffer.reserve(self.len);
            let at = buffer.len();
            // SAFETY: the range is readable by the promise of `new`, the reservation has room behind `at`, and the two do
            // not overlap because the buffer is ours alone.
            unsafe {
                std::ptr::copy_nonoverlapping(self.ptr, buffer.as_mut_ptr().add(at), self.len);
                buffer.set_len(at + self.len);
            }
        }

        /// Copies the first bytes of `bytes` into it, as many as fit; returns how many.
        pub(crate) fn copy_from(&self, bytes: &[u8]) -> usize {
            let n = self.len.min(bytes.len());
            // SAFETY: the range is writable by the promise of `new`, and no slice of ours overlaps it.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.ptr, n) };
            n
        }
    }

    // SAFETY: the promise of `new` holds in any thread, and the value itself gives no access.
    unsafe impl Send for IoRange {}
    // SAFETY: as above.
    unsafe impl Sync for IoRange {}
}

impl IoRange {
    /// Its first byte.
    pub fn ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A range over a slice, for a call that ends before the slice does.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self { ptr: bytes.as_ptr().cast_mut(), len: bytes.len() }
    }

    /// A range over a mutable slice, for a call that ends before the slice does.
    pub(crate) fn of_mut(bytes: &mut [u8]) -> Self {
        Self { ptr: bytes.as_mut_ptr(), len: bytes.len() }
    }

    /// Only its first `n` bytes.
    pub(crate) fn first(self, n: usize) -> Self {
        Self { ptr: self.ptr, len: self.len.min(n) }
    }

    /// Without its first `n` bytes, at most `len`.
    pub(crate) fn skip(self, n: usize) -> Self {
        let n = n.min(self.len);
        Self { ptr: self.ptr.wrapping_add(n), len: self.len - n }
    }
}

/// A piece of a file that is sent by `sendfile`, without passing through this process.
#[derive(Clone, Copy, Debug)]
pub struct FileRange<'a> {
    /// The file: for guest RAM, its memfd.
    pub file: BorrowedFd<'a>,
    /// Offset in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// What is still to be moved of a list of ranges; hands out at most `IOV_MAX` at a time.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    ranges: Vec<IoRange>,
    next: usize,
    bytes: u64,
}

/// Linux takes no more ranges in one call (`UIO_MAXIOV`).
pub(crate) const IOV_MAX: usize = 1024;

impl Pending {
    /// Starts over with nothing, keeping the allocation.
    pub(crate) fn clear(&mut self) {
        self.ranges.clear();
        self.next = 0;
        self.bytes = 0;
    }

    /// Adds a range, merging it with the one before where they touch.
    pub(crate) fn push(&mut self, range: IoRange) {
        if range.is_empty() {
            return;
        }
        self.bytes += range.len as u64;
        if let Some(last) = self.ranges.last_mut()
            && last.ptr.wrapping_add(last.len) == range.ptr
        {
            last.len += range.len;
            return;
        }
        self.ranges.push(range);
    }

    /// Bytes left.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The ranges for the next call, and whether they are the last.
    pub(crate) fn batch(&self) -> (&[IoRange], bool) {
        let rest = &self.ranges[self.next..];
        let batch = &rest[..rest.len().min(IOV_MAX)];
        (batch, batch.len() == rest.len())
    }

    /// Takes the first `n` bytes away, which a call has moved.
    pub(crate) fn advance(&mut self, mut n: usize) {
        self.bytes -= (n as u64).min(self.bytes);
        while n > 0 && self.next < self.ranges.len() {
            let range = &mut self.ranges[self.next];
            if n < range.len {
                *range = range.skip(n);
                return;
            }
            n -= range.len;
            self.next += 1;
        }
    }
}
