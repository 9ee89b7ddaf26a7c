//! The guest library: what a small kernel needs to do real work in ring 3 on every vCPU of any PVH-capable VMM.
//!
//! **Contract.** Ring 0 is a few instructions of assembler (`ring0.s`): entry, interrupt and fault stubs and the
//! gate of [`gate`]. All Rust code runs in ring 3, at native speed even where ring 0 is emulated. All of the first
//! 4 GiB is mapped one to one and accessible from ring 3, so MMIO (the local APIC, device BARs, ECAM) is reached
//! directly; only port I/O, MSRs, CPUID and HLT go through the gate. There is no heap: memory comes from
//! [`memory::Allocator`]. There is no thread-local storage: the index of the vCPU is handed along, and
//! [`percpu::current`] finds it from the stack pointer.
//!
//! A kernel defines `#[unsafe(no_mangle)] extern "C" fn guest_main(cpu: usize) -> !`, which the first vCPU enters; the
//! others enter it too, once [`smp::start_cpu`] was called for them.
//!
//! | module | what it gives |
//! |---|---|
//! | [`boot`] | the words of `hvm_start_info`: command line, memory map, RSDP |
//! | [`memory`] | RAM, handed out and mapped |
//! | [`percpu`] | a block per vCPU: ring 0 page, interrupt counters, stacks |
//! | [`interrupt`] | IDT, local APIC, interrupt counters for drivers, timer sleep |
//! | [`smp`] | vCPUs listed in ACPI's MADT, and their start by INIT and SIPI |
//! | [`fault`] | exceptions and panics: into the report page and on serial, then halt |
//! | [`gate`] | what only ring 0 may do: port I/O, CPUID, MSRs, HLT |
//! | [`mmio`], [`port`], [`serial`] | device access, the probe port, text output |
//! | [`time`] | the TSC and its frequency |
//! | [`pci`], [`virtio`] | PCI functions, and virtio devices with their rings |
//! | [`report`], [`params`], [`data`], [`disk`], [`accel`], [`edu`], [`hotplug`], [`net`], [`ram`], [`testdma`] | shared with the host side of this crate |
//!
//! Drivers come as modules beside these: an MSI's vector is one of [`interrupt::DEVICE_VECTORS`], and a driver polls
//! [`interrupt::count`] for it from ring 3.
#![no_std]
#![warn(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]

#[path = "../src/accel.rs"]
pub mod accel;
pub mod acpi;
pub mod boot;
#[path = "../src/data.rs"]
pub mod data;
#[path = "../src/disk.rs"]
pub mod disk;
#[path = "../src/edu.rs"]
pub mod edu;
pub mod fault;
pub mod gate;
#[path = "../src/hotplug.rs"]
pub mod hotplug;
pub mod interrupt;
mod mem;
pub mod memory;
pub mod mmio;
#[path = "../src/net.rs"]
pub mod net;
#[path = "../src/params.rs"]
pub mod params;
pub mod pci;
pub mod percpu;
pub mod port;
#[path = "../src/ram.rs"]
pub mod ram;
#[path = "../src/report.rs"]
pub mod report;
pub mod serial;
pub mod smp;
#[path = "../src/testdma.rs"]
pub mod testdma;
pub mod time;
pub mod virtio;
