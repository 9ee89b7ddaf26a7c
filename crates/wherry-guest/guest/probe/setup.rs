//! What the first vCPU does before there is work: parameters, clock, memory, the other vCPUs.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::sync::atomic::Ordering::{Relaxed, Release};

use crate::accel::{self, Accel};
use crate::disk::{self, Disk};
use crate::edu::{self, Edu};
use crate::net::{self, Net};
use crate::testdma::{self, Testdma};
use wherry_guest_kernel::boot::BootInfo;
use wherry_guest_kernel::data::ENTRY_BYTES;
use wherry_guest_kernel::fault::{control, cpu_page, die, header};
use wherry_guest_kernel::memory::Allocator;
use wherry_guest_kernel::params::{Params, Shadow};
use wherry_guest_kernel::ram::Region;
use wherry_guest_kernel::report::{
    CpuPage, FailureKind, MAGIC, MAX_CPUS, MAX_EXTENTS, PAGE_SIZE, REPORT_SIZE, VERSION,
};
use wherry_guest_kernel::{acpi, interrupt, port, serial, smp, time};

/// Default size of the data set, where RAM allows.
const DEFAULT_DATA: u64 = 512 << 20;

/// What every vCPU needs to know. Written by the first one before the others start, then only read.
pub struct Setup {
    /// The parameters.
    pub params: Params,
    /// TSC ticks per second.
    pub tsc_hz: u64,
    /// vCPUs that share the work.
    pub cpus: usize,
    /// Their local APIC ids.
    apic_ids: [u32; MAX_CPUS],
    /// Where the data pages lie.
    pub extents: [Region; MAX_EXTENTS],
    /// Pages of the data set.
    pub data_pages: u64,
    /// Address of the shadow table.
    pub table: u64,
    /// Where the full shadow copy lies; all empty without one.
    pub shadow: [Region; MAX_EXTENTS],
}

struct Shared(UnsafeCell<MaybeUninit<Setup>>);

// SAFETY: written once, before any other vCPU runs.
unsafe impl Sync for Shared {}

static SETUP: Shared = Shared(UnsafeCell::new(MaybeUninit::uninit()));

/// What the first vCPU has set up.
pub fn get() -> &'static Setup {
    // SAFETY: `first` has run before any caller can; nothing writes it afterwards.
    unsafe { (*SETUP.0.get()).assume_init_ref() }
}

/// Sets everything up, or fails and halts.
pub fn first() {
    const { assert!(REPORT_SIZE <= 0x5_0000) };
    // SAFETY: the page belongs to this vCPU, and zeroes are valid for atomics.
    unsafe { (cpu_page(0) as *const CpuPage as *mut u8).write_bytes(0, PAGE_SIZE as usize) };
    let header = header();
    header.version.store(VERSION, Relaxed);
    header.cpu_slots.store(MAX_CPUS as u32, Relaxed);
    header.magic.store(MAGIC, Release);
    serial::init();
    header.port_present.store(port::probe().into(), Relaxed);

    let boot = match BootInfo::read() {
        Ok(boot) => boot,
        Err(what) => die(0, FailureKind::Memory, format_args!("{what}")),
    };
    let line = match boot.command_line() {
        Ok(line) => line,
        Err(what) => die(0, FailureKind::Parameter, format_args!("{what}")),
    };
    let params = match Params::parse(line) {
        Ok(params) => params,
        Err(error) => die(0, FailureKind::Parameter, format_args!("{error}")),
    };
    let Some((khz, source)) = time::tsc_khz(params.tsc_khz) else {
        die(0, FailureKind::Clock, format_args!("the TSC frequency is unknown here: give tsc_khz="));
    };
    header.tsc_khz.store(khz, Relaxed);
    header.tsc_source.store(source as u32, Relaxed);

    let mut apic_ids = [0; MAX_CPUS];
    let cpus = find_cpus(&boot, &params, &mut apic_ids);
    for cpu in 1..cpus {
        // SAFETY: that vCPU does not run yet.
        unsafe { (cpu_page(cpu) as *const CpuPage as *mut u8).write_bytes(0, PAGE_SIZE as usize) };
    }
    header.cpus_online.store(1, Relaxed);
    header.cpus.store(cpus as u32, Release);

    let mut setup = Setup {
        params,
        tsc_hz: khz * 1000,
        cpus,
        apic_ids,
        extents: [Region { start: 0, end: 0 }; MAX_EXTENTS],
        data_pages: 0,
        table: 0,
        shadow: [Region { start: 0, end: 0 }; MAX_EXTENTS],
    };
    lay_out(&boot, &mut setup);
    publish_parameters(&params);
    serial::line(format_args!(
        "probe guest version {VERSION}: {} MiB RAM, {cpus} vCPUs, TSC {khz} kHz ({source:?}), data set {} MiB",
        header.ram_bytes.load(Relaxed) >> 20,
        (setup.data_pages * PAGE_SIZE) >> 20,
    ));
    // SAFETY: no other vCPU runs yet.
    unsafe { (*SETUP.0.get()).write(setup) };
}

/// The vCPUs to use: this one first, then the others in ACPI's order.
fn find_cpus(boot: &BootInfo, params: &Params, apic_ids: &mut [u32; MAX_CPUS]) -> usize {
    let own = interrupt::local_apic_id();
    apic_ids[0] = own;
    let mut cpus = 1;
    match acpi::cpus(boot.rsdp) {
        Some(listed) => {
            for &id in listed.ids().iter().filter(|&&id| id != own) {
                if cpus < params.cpus {
                    apic_ids[cpus] = id;
                    cpus += 1;
                }
            }
        }
        // Without ACPI there is only the word of the parameter, and ids are taken to count up.
        None if params.cpus < MAX_CPUS => {
            while cpus < params.cpus {
                apic_ids[cpus] = cpus as u32;
                cpus += 1;
            }
        }
        None => {}
    }
    cpus
}

/// Chooses where table, data and shadow copy lie: table first, then data, then the copy, from 16 MiB upwards; data and
/// copy not below `from=`.
fn lay_out(boot: &BootInfo, setup: &mut Setup) {
    let header = header();
    let mut ram = Allocator::new(boot.memory_map());
    header.ram_bytes.store(ram.total(), Relaxed);
    if let Some(disk) = Disk::set_up(&setup.params, &mut ram, setup.tsc_hz) {
        disk::HANDED.put(disk);
    }
    if let Some(net) = Net::set_up(&setup.params, &mut ram, setup.tsc_hz) {
        net::HANDED.put(net);
    }
    if let Some(testdma) = Testdma::set_up(&setup.params, &mut ram, setup.tsc_hz) {
        testdma::HANDED.put(testdma);
    }
    if let Some(accel) = Accel::set_up(&setup.params, &mut ram, setup.tsc_hz) {
        accel::HANDED.put(accel);
    }
    if let Some(edu) = Edu::set_up(&setup.params, &mut ram, setup.tsc_hz) {
        edu::HANDED.put(edu);
    }
    let copies = if setup.params.shadow == Shadow::Full { 2 } else { 1 };
    let wanted = setup.params.data.unwrap_or((ram.free() / 2 / copies).min(DEFAULT_DATA));
    let pages = wanted.div_ceil(PAGE_SIZE);
    let free = ram.free();
    let no_room = || -> ! {
        die(
            0,
            FailureKind::Memory,
            format_args!(
                "data={} MiB does not fit: {} MiB of RAM are free for data, shadow table and copy",
                wanted >> 20,
                free >> 20
            ),
        )
    };
    if pages > 0 {
        let Some(table) = ram.take(pages.saturating_mul(ENTRY_BYTES)) else { no_room() };
        setup.table = table.start;
        ram.skip_to(setup.params.from);
        if !take_pages(&mut ram, pages, &mut setup.extents) {
            no_room();
        }
        if copies == 2 && !take_pages(&mut ram, pages, &mut setup.shadow) {
            no_room();
        }
    }
    setup.data_pages = pages;
    header.data_pages.store(pages, Relaxed);
    header.table_gpa.store(setup.table, Relaxed);
    header.shadow_gpa.store(setup.shadow[0].start, Relaxed);
    header.seed.store(setup.params.seed, Relaxed);
    let used = setup.extents.iter().take_while(|extent| extent.start < extent.end);
    header.extent_count.store(used.clone().count() as u32, Relaxed);
    for (extent, out) in used.zip(&header.extents) {
        out.gpa.store(extent.start, Relaxed);
        out.pages.store((extent.end - extent.start) / PAGE_SIZE, Relaxed);
    }
}

fn take_pages(ram: &mut Allocator, pages: u64, extents: &mut [Region; MAX_EXTENTS]) -> bool {
    let mut left = pages.saturating_mul(PAGE_SIZE);
    for extent in extents {
        if left == 0 {
            break;
        }
        let Some(piece) = ram.take_piece(left) else {
            return false;
        };
        left -= piece.end - piece.start;
        *extent = piece;
    }
    left == 0
}

/// The control page starts with the parameters, so that the host can change one word and leave the rest.
fn publish_parameters(params: &Params) {
    let control = control();
    control.rate.store(params.rate, Relaxed);
    control.pattern.store(params.pattern as u32, Relaxed);
    control.hot_permille.store(params.hot_permille, Relaxed);
    control.verify_permille.store(params.verify_permille, Relaxed);
    control.write.store(params.write as u32, Release);
}

/// Starts the other vCPUs, one after the other; each goes to work at once.
pub fn start_others() {
    let setup = get();
    for cpu in 1..setup.cpus {
        let apic_id = setup.apic_ids[cpu];
        if let Err(what) = smp::start_cpu(cpu, apic_id, setup.tsc_hz) {
            die(0, FailureKind::Smp, format_args!("vCPU {cpu} (APIC id {apic_id}): {what}"));
        }
        header().cpus_online.store(cpu as u32 + 1, Relaxed);
    }
}
