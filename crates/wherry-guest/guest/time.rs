//! Time: the TSC, and how fast it runs.

use core::arch::x86_64::_rdtsc;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::gate;
use crate::report::TscSource;

/// The time-stamp counter.
#[inline(always)]
pub fn tsc() -> u64 {
    // SAFETY: RDTSC is allowed in ring 3 (CR4.TSD is 0).
    unsafe { _rdtsc() }
}

/// Ways to the TSC frequency, in kHz, best first. `None`: there is none.
pub fn tsc_khz(parameter: Option<u64>) -> Option<(u64, TscSource)> {
    if let Some(khz) = parameter {
        return Some((khz, TscSource::Parameter));
    }
    let highest = gate::cpuid(0, 0)[0];
    if highest >= 0x15 {
        let [denominator, numerator, crystal_hz, _] = gate::cpuid(0x15, 0);
        if denominator != 0 && numerator != 0 && crystal_hz != 0 {
            let khz = u64::from(crystal_hz) * u64::from(numerator) / u64::from(denominator) / 1000;
            return Some((khz, TscSource::Cpuid15));
        }
    }
    let [highest_hypervisor, ebx, ecx, edx] = gate::cpuid(0x4000_0000, 0);
    if (0x4000_0010..0x4001_0000).contains(&highest_hypervisor) {
        let khz = gate::cpuid(0x4000_0010, 0)[0];
        if khz != 0 {
            return Some((khz.into(), TscSource::CpuidHypervisor));
        }
    }
    let kvm = [ebx, ecx, edx] == [0x4b4d_564b, 0x564b_4d56, 0x4d];
    const CLOCKSOURCE2: u32 = 1 << 3;
    if kvm
        && gate::cpuid(0x4000_0001, 0)[0] & CLOCKSOURCE2 != 0
        && let Some(khz) = kvm_clock_khz()
    {
        return Some((khz, TscSource::KvmClock));
    }
    if highest >= 0x16 {
        let mhz = gate::cpuid(0x16, 0)[0] & 0xffff;
        if mhz != 0 {
            return Some((u64::from(mhz) * 1000, TscSource::Cpuid16));
        }
    }
    pit_khz().map(|khz| (khz, TscSource::Pit))
}

/// `pvclock_vcpu_time_info`.
#[repr(C, align(64))]
struct PvClock {
    version: AtomicU32,
    pad: u32,
    tsc_timestamp: AtomicU64,
    system_time: AtomicU64,
    tsc_to_system_mul: AtomicU32,
    /// Signed shift in the low byte, flags in the next.
    shift_and_flags: AtomicU32,
}

static PV_CLOCK: PvClock = PvClock {
    version: AtomicU32::new(0),
    pad: 0,
    tsc_timestamp: AtomicU64::new(0),
    system_time: AtomicU64::new(0),
    tsc_to_system_mul: AtomicU32::new(0),
    shift_and_flags: AtomicU32::new(0),
};

/// Switches the kvm-clock of the first vCPU on and reads the frequency from its multiplier. It stays on: a VMM that
/// saves and restores it is exercised by that.
fn kvm_clock_khz() -> Option<u64> {
    const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
    // SAFETY: the structure is static and made of atomics; the hypervisor writes nothing beyond it.
    unsafe { gate::wrmsr(MSR_KVM_SYSTEM_TIME_NEW, &raw const PV_CLOCK as u64 | 1) };
    for _ in 0..1000 {
        let version = PV_CLOCK.version.load(Ordering::Acquire);
        let mul = PV_CLOCK.tsc_to_system_mul.load(Ordering::Acquire);
        let shift = PV_CLOCK.shift_and_flags.load(Ordering::Acquire) as i8;
        if version != 0 && version & 1 == 0 && mul != 0 && PV_CLOCK.version.load(Ordering::Acquire) == version {
            // ns = ((ticks << shift) * mul) >> 32
            let khz = (1_000_000u64 << 32) / u64::from(mul);
            return Some(if shift >= 0 { khz >> shift } else { khz << -shift });
        }
        core::hint::spin_loop();
    }
    None
}

/// Measures the TSC against channel 2 of the PIT, for about 50 ms.
fn pit_khz() -> Option<u64> {
    const PIT_HZ: u64 = 1_193_182;
    const COUNT: u16 = 59_659;
    gate::outb(0x61, gate::inb(0x61) & !0x02 | 0x01);
    gate::outb(0x43, 0xb0);
    gate::outb(0x42, COUNT as u8);
    gate::outb(0x42, (COUNT >> 8) as u8);
    let start = tsc();
    let mut polls = 0;
    while gate::inb(0x61) & 0x20 == 0 {
        polls += 1;
        if polls == 1_000_000 {
            return None;
        }
    }
    let ticks = tsc().wrapping_sub(start);
    // A port that answers all ones at once is no PIT.
    (polls > 2).then(|| ticks * PIT_HZ / u64::from(COUNT) / 1000)
}
