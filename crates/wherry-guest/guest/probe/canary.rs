//! Canaries in the processor: values that a vCPU keeps in registers, so that state which does not survive a move is
//! noticed even where no memory is wrong.
//!
//! - The SSE registers, or the AVX registers where CPUID offers them, during most of the idle time.
//! - MXCSR and the x87 control word, always: both differ from what a reset gives.
//! - Model-specific registers, XCR0 and all that only ring 0 reads: compared at the end, because the gate is slow.

use core::arch::asm;
use core::fmt;

use wherry_guest_kernel::gate;

/// All exceptions masked, rounding towards zero. Nothing in this guest computes with floating point numbers.
const MXCSR: u32 = 0x7f80;
/// The same for the x87.
const X87_CONTROL: u16 = 0x0f7f;
/// Pauses in one spin: well under a microsecond on most processors.
const PAUSES: u32 = 8;

const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SYSCALL_MASK: u32 = 0xc000_0084;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const SYSENTER_CS: u32 = 0x174;
const SYSENTER_ESP: u32 = 0x175;
const SYSENTER_EIP: u32 = 0x176;
const MSRS: [u32; 8] = [STAR, LSTAR, CSTAR, SYSCALL_MASK, KERNEL_GS_BASE, SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP];

#[repr(C, align(64))]
struct Values([[u8; 32]; 16]);

/// Every register another value, every byte of it too.
static VALUES: Values = {
    let mut values = [[0; 32]; 16];
    let mut register = 0;
    while register < 16 {
        let mut byte = 0;
        while byte < 32 {
            values[register][byte] = (register * 32 + byte + 1) as u8 ^ 0xa5;
            byte += 1;
        }
        register += 1;
    }
    Values(values)
};

/// What did not keep its value.
#[derive(Clone, Copy, Debug)]
pub enum Lost {
    /// Vector registers, a bit each.
    Vector(u32),
    /// MXCSR, and what it is now.
    Mxcsr(u32),
    /// The x87 control word, and what it is now.
    X87Control(u16),
    /// A model-specific register: number, value that it should have, value that it has.
    Msr(u32, u64, u64),
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vector(mask) => write!(f, "vector registers (mask {mask:#06x}) lost their values"),
            Self::Mxcsr(now) => write!(f, "MXCSR is {now:#x}, not {MXCSR:#x}"),
            Self::X87Control(now) => write!(f, "the x87 control word is {now:#x}, not {X87_CONTROL:#x}"),
            Self::Msr(msr, then, now) => write!(f, "MSR {msr:#x} is {now:#x}, not {then:#x}"),
        }
    }
}

/// The canaries of one vCPU.
pub struct Canary {
    avx: bool,
    msrs: [u64; MSRS.len()],
}

impl Canary {
    /// Sets the canaries of the vCPU that this runs on.
    pub fn set(cpu: usize) -> Self {
        let canary = Self { avx: enable_avx(), msrs: core::array::from_fn(|i| msr_value(MSRS[i], cpu)) };
        set_control_words();
        for (msr, value) in MSRS.into_iter().zip(canary.msrs) {
            // SAFETY: entry points of SYSCALL and SYSENTER, which nothing here uses, and a base that only SWAPGS reads.
            unsafe { gate::wrmsr(msr, value) };
        }
        // What reads back is what must come back: some processors keep fewer bits of SYSENTER_CS.
        Self { msrs: MSRS.map(gate::rdmsr), ..canary }
    }

    /// Spins for a moment with values in all vector registers, and looks at them and at the control words afterwards.
    #[inline(always)]
    pub fn spin(&self) -> Result<(), Lost> {
        let (mut mxcsr, mut x87) = (0u32, 0u16);
        // SAFETY: stores 4 and 2 bytes to these locals.
        unsafe {
            asm!("stmxcsr [{}]", "fnstcw [{}]", in(reg) &raw mut mxcsr, in(reg) &raw mut x87, options(nostack));
        }
        if mxcsr != MXCSR || x87 != X87_CONTROL {
            set_control_words();
            return Err(if mxcsr != MXCSR { Lost::Mxcsr(mxcsr) } else { Lost::X87Control(x87) });
        }
        let lost = if self.avx { spin_avx() } else { spin_sse() };
        if lost == 0 { Ok(()) } else { Err(Lost::Vector(lost)) }
    }

    /// Compares what only ring 0 can read. Slow.
    pub fn compare_msrs(&self) -> Result<(), Lost> {
        for (msr, then) in MSRS.into_iter().zip(self.msrs) {
            let now = gate::rdmsr(msr);
            if now != then {
                return Err(Lost::Msr(msr, then, now));
            }
        }
        Ok(())
    }
}

/// A value that the register can hold, another one on each vCPU.
fn msr_value(msr: u32, cpu: usize) -> u64 {
    let cpu = cpu as u64 + 1;
    match msr {
        STAR => 0x0018_0008_0000_0000 + (cpu << 3),
        SYSCALL_MASK => 0x4_7700,
        SYSENTER_CS => 0x8,
        SYSENTER_ESP | SYSENTER_EIP => 0x10_0000 + cpu * 0x10,
        _ => 0x7000_0000 + u64::from(msr & 0xff) * 0x1000 + cpu * 0x10,
    }
}

fn set_control_words() {
    // SAFETY: both words mask all exceptions; compiled code here has no floating point arithmetic.
    unsafe {
        asm!("ldmxcsr [{}]", "fldcw [{}]", in(reg) &raw const MXCSR_WORD, in(reg) &raw const X87_WORD, options(nostack));
    }
}

/// Gives MXCSR its value after a reset: what a VMM does that loses it.
pub fn forget() {
    static RESET: u32 = 0x1f80;
    // SAFETY: as for `set_control_words`.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const RESET, options(nostack)) };
}

static MXCSR_WORD: u32 = MXCSR;
static X87_WORD: u16 = X87_CONTROL;

/// Switches AVX on where CPUID has it.
fn enable_avx() -> bool {
    const XSAVE: u32 = 1 << 26;
    const AVX: u32 = 1 << 28;
    const X87_SSE_AVX: u32 = 7;
    let features = gate::cpuid(1, 0)[2];
    let usable = features & (XSAVE | AVX) == XSAVE | AVX
        && gate::cpuid(0, 0)[0] >= 0xd
        && gate::cpuid(0xd, 0)[0] & X87_SSE_AVX == X87_SSE_AVX;
    if usable {
        gate::enable_xsave(X87_SSE_AVX);
    }
    usable
}

fn spin_sse() -> u32 {
    let lost: u32;
    // SAFETY: reads VALUES; all registers that change are declared.
    unsafe {
        asm!(
            r".irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            r"movdqu xmm\i, [{values} + 32 * \i]",
            r".endr",
            "2:", "pause", "dec {count:e}", "jnz 2b",
            r".irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            r"pcmpeqb xmm\i, [{values} + 32 * \i]",
            r"pmovmskb {same:e}, xmm\i",
            r"xor {same:e}, 0xffff",
            r"neg {same:e}",
            r"sbb {same:e}, {same:e}",
            r"and {same:e}, 1 << \i",
            r"or {lost:e}, {same:e}",
            r".endr",
            values = in(reg) &raw const VALUES, count = inout(reg) PAUSES => _, same = out(reg) _,
            lost = inout(reg) 0u32 => lost,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
            out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
            out("xmm13") _, out("xmm14") _, out("xmm15") _, options(nostack),
        );
    }
    lost
}

fn spin_avx() -> u32 {
    let lost: u32;
    // SAFETY: AVX is on (see `enable_avx`); reads VALUES; all registers that change are declared, and compiled code
    // here does not know of their upper halves.
    unsafe {
        asm!(
            r".irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            r"vmovdqu ymm\i, [{values} + 32 * \i]",
            r".endr",
            "2:", "pause", "dec {count:e}", "jnz 2b",
            r".irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            r"vxorps ymm\i, ymm\i, [{values} + 32 * \i]",
            r"xor {same:e}, {same:e}",
            r"vptest ymm\i, ymm\i",
            r"setnz {same:l}",
            r"shl {same:e}, \i",
            r"or {lost:e}, {same:e}",
            r".endr",
            "vzeroupper",
            values = in(reg) &raw const VALUES, count = inout(reg) PAUSES => _, same = out(reg) _,
            lost = inout(reg) 0u32 => lost,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
            out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
            out("xmm13") _, out("xmm14") _, out("xmm15") _, options(nostack),
        );
    }
    lost
}
