//! A huge guest that uses little. One test, alone in its process, because it counts the memory of the whole process.

#![allow(clippy::unwrap_used, reason = "a failure is a panic here")]

mod common;

use std::time::Duration;

use common::{config, heartbeat, until};
use wherry_memory::PageSet;
use wherry_migration::machine::Machine;
use wherry_vmm::vm::Vm;

const LIMIT: Duration = Duration::from_secs(30);

#[test]
fn a_guest_with_256_gib_of_ram_and_little_of_it_touched_costs_little_memory() {
    let resident = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    };
    let before = resident();
    let vm = Vm::boot(config("data=16M rate=max", 256 << 30, 1)).unwrap();
    vm.resume().unwrap();
    until("a heartbeat", LIMIT, || heartbeat(vm.ram(), 0) > 1000);
    vm.dirty_sources().iter().for_each(|s| s.start().unwrap());
    let beats = heartbeat(vm.ram(), 0);
    until("the guest to go on", LIMIT, || heartbeat(vm.ram(), 0) > beats + 500);
    let mut reported = 0;
    for block in vm.ram().blocks() {
        let mut taken = PageSet::new(block.pages());
        vm.dirty_sources().iter().for_each(|s| s.collect(block, &mut taken).unwrap());
        vm.dirty_sources().iter().for_each(|s| s.rearm(block, 0..block.pages(), &taken).unwrap());
        reported += taken.count();
    }
    assert!(reported > 0 && reported < 16 << 10, "{reported} pages: only what was written is reported");
    let grown = resident().saturating_sub(before);
    assert!(grown < 200 << 20, "{grown} bytes");
}
