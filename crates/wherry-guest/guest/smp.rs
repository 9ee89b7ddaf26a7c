//! Start of the other vCPUs: INIT, then SIPI to a real-mode trampoline below 1 MiB, one vCPU after the other.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::{interrupt, percpu, time};

/// Where the trampoline goes: conventional memory that firmware leaves alone once the kernel runs.
pub const AP_TRAMPOLINE: u64 = 0x8000;

const INIT: u32 = 0x0000_4500;
const STARTUP: u32 = 0x0000_4600;

unsafe extern "C" {
    #[link_name = "ap_trampoline"]
    static TRAMPOLINE: u8;
    #[link_name = "ap_trampoline_end"]
    static TRAMPOLINE_END: u8;
    #[link_name = "ap_index"]
    static AP_INDEX: AtomicU64;
    #[link_name = "gdt"]
    static mut GDT: [u64; 6 + 2 * crate::report::MAX_CPUS];
    fn guest_main(cpu: usize) -> !;
}

/// vCPUs that have reached ring 3, as a bit per index.
static ONLINE: AtomicU64 = AtomicU64::new(1);

/// Starts the vCPU with this APIC id as vCPU `cpu`, and waits until it is in ring 3. It enters `guest_main(cpu)`.
///
/// # Errors
/// It did not come up within a few seconds.
pub fn start_cpu(cpu: usize, apic_id: u32, tsc_hz: u64) -> Result<(), &'static str> {
    let block = percpu::block(cpu);
    // SAFETY: this vCPU does not run yet, and no other one reads its block, its GDT entry or the trampoline.
    unsafe {
        percpu::clear(cpu);
        let base = block;
        let low = 0x67 | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
        let entry = (&raw mut GDT).cast::<u64>().add(6 + 2 * cpu);
        entry.write_volatile(low);
        entry.add(1).write_volatile(base >> 32);
        let len = &raw const TRAMPOLINE_END as usize - &raw const TRAMPOLINE as usize;
        core::ptr::copy_nonoverlapping(&raw const TRAMPOLINE, AP_TRAMPOLINE as *mut u8, len);
        AP_INDEX.store(cpu as u64, Ordering::SeqCst);
    }
    let wait = |ticks: u64| {
        let start = time::tsc();
        while time::tsc().wrapping_sub(start) < ticks {
            if ONLINE.load(Ordering::Acquire) & 1 << cpu != 0 {
                return true;
            }
            core::hint::spin_loop();
        }
        false
    };
    interrupt::send_ipi(apic_id, INIT);
    wait(tsc_hz / 1000);
    interrupt::send_ipi(apic_id, STARTUP | (AP_TRAMPOLINE >> 12) as u32);
    // A second SIPI, as the processor manuals ask for, if the first one did nothing for a while.
    if wait(tsc_hz / 5) {
        return Ok(());
    }
    interrupt::send_ipi(apic_id, STARTUP | (AP_TRAMPOLINE >> 12) as u32);
    if wait(tsc_hz.saturating_mul(5)) { Ok(()) } else { Err("a vCPU did not come up after INIT and SIPI") }
}

#[unsafe(no_mangle)]
extern "C" fn guest_first_cpu(cpu: usize) -> ! {
    // A second start of the same image finds its old value.
    ONLINE.store(1, Ordering::Release);
    interrupt::init_idt();
    interrupt::init_local_apic();
    // SAFETY: defined by the kernel that links this library.
    unsafe { guest_main(cpu) }
}

#[unsafe(no_mangle)]
extern "C" fn guest_next_cpu(cpu: usize) -> ! {
    interrupt::init_local_apic();
    ONLINE.fetch_or(1 << cpu, Ordering::Release);
    // SAFETY: as above.
    unsafe { guest_main(cpu) }
}
