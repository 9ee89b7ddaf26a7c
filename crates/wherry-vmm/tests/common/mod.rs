//! What the tests of whole machines share.
#![allow(dead_code, clippy::unwrap_used, reason = "each test binary uses its part; a failure is a panic here")]

use std::mem::offset_of;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use wherry_guest::report;
use wherry_guest::snapshot::{Snapshot, Touches};
use wherry_memory::Ram;
use wherry_migration::machine::{Machine, MachineDescription};
use wherry_vmm::builder::{LocalConfig, VmBuilder};
use wherry_vmm::config::{CpuModel, Kernel, MachineConfig, SerialTarget};
use wherry_vmm::vm::{DeviceConfig, Vm};

/// A machine that boots the probe guest.
pub fn config(cmdline: &str, memory: u64, cpus: u32) -> MachineConfig {
    MachineConfig {
        name: "test".into(),
        vm: [7; 16],
        memory,
        hugepages: false,
        cpus,
        cpu: CpuModel::Host,
        kernel: Kernel::Probe,
        initrd: None,
        cmdline: cmdline.into(),
        serial: SerialTarget::Null,
        pci: Default::default(),
    }
}

/// Waits until something is so, and panics with what it waited for when it takes too long.
pub fn until(what: &str, limit: Duration, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited {limit:?} for {what}");
        std::thread::yield_now();
    }
}

/// The 8 bytes of guest RAM at an address, without allocating a hole.
pub fn word(ram: &Ram, gpa: u64) -> u64 {
    let (block, offset) = ram.find(gpa).expect("inside RAM");
    let mut bytes = [0; 8];
    block.read_at(offset, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

/// The probe's heartbeat on a vCPU.
pub fn heartbeat(ram: &Ram, cpu: usize) -> u64 {
    word(ram, report::heartbeat_gpa(cpu))
}

/// How long a step of a machine may take.
pub const STEP: Duration = Duration::from_secs(20);

/// The probe's report pages at one moment.
pub struct Probe(Snapshot);

impl Probe {
    /// Reads them.
    pub fn of(ram: &Ram) -> Self {
        let (block, offset) = ram.find(report::REPORT_GPA).expect("inside RAM");
        let mut bytes = vec![0; report::REPORT_SIZE as usize];
        block.read_at(offset, &mut bytes).unwrap();
        Self(Snapshot::decode(&bytes).unwrap())
    }

    /// Panics with what the guest found wrong, if it did.
    pub fn assert_healthy(&self) {
        assert!(self.0.failure.is_none(), "{:?}", self.0.failure);
        for (cpu, state) in self.0.cpus.iter().enumerate() {
            assert_eq!(state.verify_errors, 0, "vCPU {cpu}: {:?}", state.mismatches);
            assert!(state.exception.is_none(), "vCPU {cpu}: {:?}", state.exception);
            assert_eq!(state.tsc_backwards, 0, "vCPU {cpu}: its TSC went back by {}", state.tsc_backwards_max);
        }
    }

    /// Whole passes of verification, on the vCPU that has the fewest.
    pub fn verify_passes(&self) -> u64 {
        self.0.cpus.iter().map(|cpu| cpu.verify_passes).min().unwrap_or(0)
    }

    /// Touches of pages by all vCPUs.
    pub fn touches(&self) -> Touches {
        self.0.touches()
    }

    /// The largest time that a vCPU did not run, as the guest saw it.
    pub fn largest_gap_ns(&self) -> u64 {
        self.0.largest_gap_ns()
    }
}

/// Has the guest forget the gaps it has seen, and waits until every vCPU of the first `cpus` has.
pub fn reset_gaps(vm: &Vm, cpus: usize) {
    let at = |offset: usize| GuestAddress(report::CONTROL_GPA + offset as u64);
    let memory = vm.ram().memory();
    let reset = memory.read_obj::<u32>(at(offset_of!(report::Control, reset_gaps))).unwrap() + 1;
    memory.write_obj(reset, at(offset_of!(report::Control, reset_gaps))).unwrap();
    let sequence = memory.read_obj::<u64>(at(offset_of!(report::Control, sequence))).unwrap() + 1;
    memory.write_obj(sequence, at(offset_of!(report::Control, sequence))).unwrap();
    until("the guest to forget its gaps", STEP, || {
        Probe::of(vm.ram()).0.cpus.iter().take(cpus).all(|cpu| cpu.reset_seen == reset)
    });
}

/// Builds the machine that a description asks for.
pub fn arrive(description: &MachineDescription) -> Arc<Vm> {
    let devices = DeviceConfig { serial: SerialTarget::Null, pci: Default::default() };
    VmBuilder::new(LocalConfig { devices }).build_vm(description, Default::default()).unwrap()
}

/// Copies all of RAM that is not holes.
pub fn copy_ram(from: &Ram, to: &Ram) {
    let mut buffer = vec![0; 1 << 20];
    for block in from.blocks() {
        for run in block.data_runs(0..u64::MAX) {
            let run = run.unwrap();
            let mut at = run.start;
            while at < run.end {
                let piece = &mut buffer[..(run.end - at).min(1 << 20) as usize];
                block.read_at(at, piece).unwrap();
                to.memory().write_slice(piece, GuestAddress(block.spec().guest_base + at)).unwrap();
                at += piece.len() as u64;
            }
        }
    }
}

/// Stops a machine and lets it go on in another one that is built from its description.
pub fn move_by_copy(vm: &Vm) -> Arc<Vm> {
    let there = arrive(&vm.description());
    vm.units().stop(STEP).unwrap();
    let state = vm.units().save().unwrap();
    copy_ram(vm.ram(), there.ram());
    there.units().restore(&state).unwrap();
    there.units().start().unwrap();
    there
}
