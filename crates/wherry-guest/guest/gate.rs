//! The gate into ring 0, and the few things that only ring 0 may do.
//!
//! It is an invalid instruction at a known address (`gate_call` in ring0.s), because software interrupts from ring 3
//! do not work where ring 0 is emulated. Any other invalid instruction is a fault like all others. A call costs some tens of microseconds where ring 0 is emulated. Nothing here belongs into a working loop.

use core::arch::asm;

const OUTB: u64 = 0;
const INB: u64 = 1;
const OUTL: u64 = 2;
const INL: u64 = 3;
const CPUID: u64 = 4;
const RDMSR: u64 = 5;
const WRMSR: u64 = 6;
const WAIT: u64 = 7;
const OUTS: u64 = 8;
const OUTW: u64 = 9;
const HALT: u64 = 10;
const XSAVE: u64 = 11;
const REST: u64 = 12;

/// Vector of the gate: #UD.
pub const GATE_VECTOR: u8 = 6;

/// Calls ring 0.
///
/// # Safety
/// The function's effect on memory (`buffer`) and on the machine must be one the caller may cause.
unsafe fn call(function: u64, a: u64, b: u64, buffer: u64) -> u64 {
    let result;
    // SAFETY: the stub in ring0.s changes only the registers named here, and memory as the caller vouches for.
    unsafe {
        asm!("call gate_call", inlateout("rax") function => result, inlateout("rdx") a => _, inlateout("rcx") b => _,
            inlateout("rdi") buffer => _, inlateout("rsi") buffer => _);
    }
    result
}

/// Writes a byte to an I/O port.
pub fn outb(port: u16, value: u8) {
    // SAFETY: no memory is touched; what the port does is the device's business.
    unsafe { call(OUTB, port.into(), value.into(), 0) };
}

/// Writes 16 bits to an I/O port.
pub fn outw(port: u16, value: u16) {
    // SAFETY: as for `outb`.
    unsafe { call(OUTW, port.into(), value.into(), 0) };
}

/// Writes 32 bits to an I/O port.
pub fn outl(port: u16, value: u32) {
    // SAFETY: as for `outb`.
    unsafe { call(OUTL, port.into(), value.into(), 0) };
}

/// Reads a byte from an I/O port.
pub fn inb(port: u16) -> u8 {
    // SAFETY: as for `outb`.
    unsafe { call(INB, port.into(), 0, 0) as u8 }
}

/// Reads 32 bits from an I/O port.
pub fn inl(port: u16) -> u32 {
    // SAFETY: as for `outb`.
    unsafe { call(INL, port.into(), 0, 0) as u32 }
}

/// Writes all of `bytes` to one I/O port, with a string instruction.
pub fn outs(port: u16, bytes: &[u8]) {
    // SAFETY: ring 0 only reads the bytes of the slice.
    unsafe { call(OUTS, port.into(), bytes.len() as u64, bytes.as_ptr() as u64) };
}

/// EAX, EBX, ECX and EDX of a CPUID leaf, as ring 0 sees it.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let mut out = [0u32; 4];
    // SAFETY: ring 0 writes 16 bytes to `out`.
    unsafe { call(CPUID, leaf.into(), subleaf.into(), out.as_mut_ptr() as u64) };
    out
}

/// Reads a model-specific register. One that does not exist is a fault.
pub fn rdmsr(msr: u32) -> u64 {
    // SAFETY: no memory is touched.
    unsafe { call(RDMSR, msr.into(), 0, 0) }
}

/// Writes a model-specific register. One that does not exist is a fault.
///
/// # Safety
/// MSRs can change how the machine runs and can name memory that the hypervisor will write.
pub unsafe fn wrmsr(msr: u32, value: u64) {
    // SAFETY: vouched for by the caller.
    unsafe { call(WRMSR, msr.into(), value, 0) };
}

/// Starts the local APIC's timer with `count` and sleeps until an interrupt, without a window between the two.
pub fn wait(count: u32) {
    // SAFETY: writes the timer's register only.
    unsafe { call(WAIT, 0, count.into(), 0) };
}

/// As [`wait`], but comes back at once if this vCPU has taken other than `interrupts` of them so far, of all vectors: between a look
/// at what they brought and the sleep there is no window, either.
pub fn rest(count: u32, interrupts: u32) {
    // SAFETY: writes the timer's register only.
    unsafe { call(REST, interrupts.into(), count.into(), 0) };
}

/// Switches XSAVE on, for the state components in `xcr0`. CPUID must offer them.
pub fn enable_xsave(xcr0: u32) {
    // SAFETY: allows instructions, touches no memory.
    unsafe { call(XSAVE, 0, xcr0.into(), 0) };
}

/// Stops this vCPU for good.
pub fn halt() -> ! {
    // SAFETY: does not come back, touches nothing.
    unsafe { call(HALT, 0, 0, 0) };
    loop {
        core::hint::spin_loop();
    }
}
