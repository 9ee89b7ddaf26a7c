//! Device memory: accesses of exactly the width asked for, by plain MOVs, which every hypervisor can decode.

use core::arch::asm;

/// Reads 8 bits.
///
/// # Safety
/// `gpa` must be mapped, and reading it must have no effect that breaks memory safety.
pub unsafe fn read8(gpa: u64) -> u8 {
    let value;
    // SAFETY: vouched for by the caller.
    unsafe { asm!("mov {}, byte ptr [{}]", out(reg_byte) value, in(reg) gpa, options(nostack, preserves_flags)) };
    value
}

/// Reads 32 bits. `gpa` must be a multiple of 4.
///
/// # Safety
/// As for [`read8`].
pub unsafe fn read32(gpa: u64) -> u32 {
    let value;
    // SAFETY: vouched for by the caller.
    unsafe { asm!("mov {:e}, dword ptr [{}]", out(reg) value, in(reg) gpa, options(nostack, preserves_flags)) };
    value
}

/// Writes 8 bits.
///
/// # Safety
/// `gpa` must be mapped, and writing it must have no effect that breaks memory safety.
pub unsafe fn write8(gpa: u64, value: u8) {
    // SAFETY: vouched for by the caller.
    unsafe { asm!("mov byte ptr [{}], {}", in(reg) gpa, in(reg_byte) value, options(nostack, preserves_flags)) };
}

/// Writes 32 bits. `gpa` must be a multiple of 4.
///
/// # Safety
/// As for [`write8`].
pub unsafe fn write32(gpa: u64, value: u32) {
    // SAFETY: vouched for by the caller.
    unsafe { asm!("mov dword ptr [{}], {:e}", in(reg) gpa, in(reg) value, options(nostack, preserves_flags)) };
}

/// Reads 16 bits. `gpa` must be a multiple of 2.
///
/// # Safety
/// As for [`read8`].
pub unsafe fn read16(gpa: u64) -> u16 {
    let value;
    // SAFETY: vouched for by the caller.
    unsafe { asm!("mov {:x}, word ptr [{}]", out(reg) value, in(reg) gpa, options(nostack, preserves_flags)) };
    value
}

/// Writes 16 bits. `gpa` must be a multiple of 2.
///
/// # Safety
/// As for [`write8`].
pub unsafe fn write16(gpa: u64, value: u16) {
    // SAFETY: vouched for by the caller.
    unsafe { asm!("mov word ptr [{}], {:x}", in(reg) gpa, in(reg) value, options(nostack, preserves_flags)) };
}

/// Writes 64 bits. `gpa` must be a multiple of 8.
///
/// # Safety
/// As for [`write8`].
pub unsafe fn write64(gpa: u64, value: u64) {
    // SAFETY: vouched for by the caller.
    unsafe { asm!("mov qword ptr [{}], {}", in(reg) gpa, in(reg) value, options(nostack, preserves_flags)) };
}
