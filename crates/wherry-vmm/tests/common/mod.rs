//! What the tests of whole machines share.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::time::{Duration, Instant};

use wherry_guest::report;
use wherry_memory::Ram;
use wherry_vmm::config::{CpuModel, Kernel, MachineConfig, SerialTarget};

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
