//! One block of memory per vCPU: its ring 0 page, its stacks.
//!
//! | offset | content |
//! |---|---|
//! | 0x0000 | TSS (104 bytes) |
//! | 0x0080 | [`FaultFrame`]: what ring 0 stored at an exception |
//! | 0x0100 | index of the vCPU |
//! | 0x0400 | interrupt counters, 256 of 32 bits; that of vector 0 counts all |
//! | 0x0800 | ring 0 stack, to 0x1000 |
//! | 0x1000 | ring 3 stack of the fault handler, to 0x2000 |
//! | 0x2000 | ring 3 stack, to the end |

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU32, AtomicU64};

use crate::report::MAX_CPUS;

/// log2 of the size of a block.
pub const PERCPU_SHIFT: u32 = 15;
/// Size of a block.
pub const PERCPU_SIZE: usize = 1 << PERCPU_SHIFT;

const FAULT: usize = 0x80;
const CPU_INDEX: usize = 0x100;
const IRQ_COUNTS: usize = 0x400;

unsafe extern "C" {
    #[link_name = "__percpu"]
    static PERCPU: u8;
}

/// What ring 0 stores at an exception, before ring 3 reports it.
#[repr(C)]
pub struct FaultFrame {
    /// Not 0 once an exception was taken. A second one halts the vCPU.
    pub taken: AtomicU64,
    /// Vector.
    pub vector: AtomicU64,
    /// Error code, 0 where the vector has none.
    pub error_code: AtomicU64,
    /// Instruction pointer.
    pub rip: AtomicU64,
    /// Code segment.
    pub cs: AtomicU64,
    /// Stack pointer.
    pub rsp: AtomicU64,
    /// CR2.
    pub cr2: AtomicU64,
}

/// Address of the block of vCPU `cpu`.
pub fn block(cpu: usize) -> u64 {
    assert!(cpu < MAX_CPUS);
    &raw const PERCPU as u64 + ((cpu as u64) << PERCPU_SHIFT)
}

/// Index of the vCPU this runs on.
pub fn current() -> usize {
    let rsp: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rsp", out(reg) rsp, options(nomem, nostack, preserves_flags)) };
    ((rsp - &raw const PERCPU as u64) >> PERCPU_SHIFT) as usize
}

/// The fault frame of vCPU `cpu`.
pub fn fault_frame(cpu: usize) -> &'static FaultFrame {
    // SAFETY: the block lives for ever and the frame consists of atomics.
    unsafe { &*((block(cpu) + FAULT as u64) as *const FaultFrame) }
}

/// The interrupt counters of vCPU `cpu`, by vector.
pub fn interrupt_counts(cpu: usize) -> &'static [AtomicU32; 256] {
    // SAFETY: as above.
    unsafe { &*((block(cpu) + IRQ_COUNTS as u64) as *const [AtomicU32; 256]) }
}

/// Empties the ring 0 page of a vCPU that is not running yet.
///
/// # Safety
/// The vCPU must not run.
pub unsafe fn clear(cpu: usize) {
    // SAFETY: the page belongs to a vCPU that does not run.
    unsafe { (block(cpu) as *mut u8).write_bytes(0, 0x1000) };
}

global_asm!(
    include_str!("ring0.s"),
    MAX_CPUS = const MAX_CPUS,
    PERCPU_SIZE = const PERCPU_SIZE,
    PERCPU_SHIFT = const PERCPU_SHIFT,
    FAULT = const FAULT,
    CPU_INDEX = const CPU_INDEX,
    IRQ_COUNTS = const IRQ_COUNTS,
    LEVEL_VECTORS = const crate::interrupt::LEVEL_VECTORS.start as u32,
);
