//! The kernel's userfaultfd interface, `include/uapi/linux/userfaultfd.h`: numbers and layouts, nothing else.

use rustix::ioctl::{Opcode, opcode};

/// `UFFD_API`: the only version there is.
pub(crate) const API: u64 = 0xaa;
const GROUP: u8 = 0xaa;

pub(crate) const FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
pub(crate) const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
pub(crate) const FEATURE_THREAD_ID: u64 = 1 << 8;
pub(crate) const FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
pub(crate) const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
pub(crate) const FEATURE_EXACT_ADDRESS: u64 = 1 << 11;
pub(crate) const FEATURE_POISON: u64 = 1 << 14;

pub(crate) const REGISTER_MISSING: u64 = 1 << 0;
pub(crate) const REGISTER_MINOR: u64 = 1 << 2;

/// The same bit for COPY, ZEROPAGE, CONTINUE and POISON.
pub(crate) const DONTWAKE: u64 = 1 << 0;

/// Bits of [`Register::ioctls`]: the number of each call.
pub(crate) const NR_WAKE: u8 = 0x02;
pub(crate) const NR_COPY: u8 = 0x03;
pub(crate) const NR_ZEROPAGE: u8 = 0x04;
pub(crate) const NR_CONTINUE: u8 = 0x07;
pub(crate) const NR_POISON: u8 = 0x08;

pub(crate) const EVENT_PAGEFAULT: u8 = 0x12;
pub(crate) const FAULT_WRITE: u64 = 1 << 0;
pub(crate) const FAULT_WP: u64 = 1 << 1;
pub(crate) const FAULT_MINOR: u64 = 1 << 2;

/// `USERFAULTFD_IOC_NEW` on `/dev/userfaultfd`: its argument is the flags of the system call.
pub(crate) const DEVICE_NEW: Opcode = opcode::none(GROUP, 0x00);

pub(crate) const UFFDIO_API: Opcode = opcode::read_write::<Api>(GROUP, 0x3f);
pub(crate) const UFFDIO_REGISTER: Opcode = opcode::read_write::<Register>(GROUP, 0x00);
/// Declared as reading although it writes nothing: a slip in the header that became the interface. So does WAKE.
pub(crate) const UFFDIO_UNREGISTER: Opcode = opcode::read::<Range>(GROUP, 0x01);
pub(crate) const UFFDIO_WAKE: Opcode = opcode::read::<Range>(GROUP, NR_WAKE);
pub(crate) const UFFDIO_COPY: Opcode = opcode::read_write::<Copy>(GROUP, NR_COPY);
pub(crate) const UFFDIO_ZEROPAGE: Opcode = opcode::read_write::<Fill>(GROUP, NR_ZEROPAGE);
pub(crate) const UFFDIO_CONTINUE: Opcode = opcode::read_write::<Fill>(GROUP, NR_CONTINUE);
pub(crate) const UFFDIO_POISON: Opcode = opcode::read_write::<Fill>(GROUP, NR_POISON);

/// `struct uffdio_api`.
#[repr(C)]
#[derive(Default)]
pub(crate) struct Api {
    pub api: u64,
    pub features: u64,
    pub ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
#[derive(Default)]
pub(crate) struct Range {
    pub start: u64,
    pub len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
#[derive(Default)]
pub(crate) struct Register {
    pub range: Range,
    pub mode: u64,
    pub ioctls: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
#[derive(Default)]
pub(crate) struct Copy {
    pub dst: u64,
    pub src: u64,
    pub len: u64,
    pub mode: u64,
    /// Bytes copied, or a negated error.
    pub copied: i64,
}

/// `struct uffdio_zeropage`, `uffdio_continue` and `uffdio_poison`, which are alike.
#[repr(C)]
#[derive(Default)]
pub(crate) struct Fill {
    pub range: Range,
    pub mode: u64,
    /// Bytes done, or a negated error.
    pub done: i64,
}

/// `struct uffd_msg` as a page fault fills it.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Message {
    pub event: u8,
    pub reserved1: u8,
    pub reserved2: u16,
    pub reserved3: u32,
    pub flags: u64,
    pub address: u64,
    pub thread: u32,
    pub padding: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_sizes_are_those_of_the_kernel_header() {
        assert_eq!(size_of::<Message>(), 32);
        assert_eq!(DEVICE_NEW, 0xaa00);
        assert_eq!(UFFDIO_API, 0xc018_aa3f);
        assert_eq!(UFFDIO_REGISTER, 0xc020_aa00);
        assert_eq!(UFFDIO_UNREGISTER, 0x8010_aa01);
        assert_eq!(UFFDIO_WAKE, 0x8010_aa02);
        assert_eq!(UFFDIO_COPY, 0xc028_aa03);
        assert_eq!(UFFDIO_ZEROPAGE, 0xc020_aa04);
        assert_eq!(UFFDIO_CONTINUE, 0xc020_aa07);
        assert_eq!(UFFDIO_POISON, 0xc020_aa08);
    }
}
