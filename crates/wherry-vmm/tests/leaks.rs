//! A machine leaves nothing behind. One test, alone in its process, because it counts what the whole process has.

#![allow(clippy::unwrap_used, reason = "a failure is a panic here")]

mod common;

use common::{arrive, config, heartbeat, move_by_copy, until};
use std::time::Duration;
use wherry_migration::machine::Machine;
use wherry_vmm::vm::Vm;

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

fn ram_maps() -> usize {
    std::fs::read_to_string("/proc/self/maps").unwrap().matches("memfd:wherry-ram").count()
}

#[test]
fn a_machine_that_has_ended_leaves_no_thread_no_descriptor_and_no_mapping() {
    let before = (open_descriptors(), threads(), ram_maps());
    for _ in 0..3 {
        let mut with_device = config("data=1M", 64 << 20, 2);
        with_device.pci.rng = true;
        let vm = Vm::boot(with_device).unwrap();
        vm.resume().unwrap();
        until("a heartbeat", Duration::from_secs(30), || heartbeat(vm.ram(), 0) > 100);
        vm.throttle(50);
        vm.dirty_sources().iter().for_each(|s| s.start().unwrap());
        let unused = arrive(&vm.description());
        let there = move_by_copy(&vm);
        drop(vm);
        drop(unused);
        until("a heartbeat there", Duration::from_secs(30), || heartbeat(there.ram(), 0) > 100);
        there.shutdown();
        drop(there);
        // Booted and never started.
        drop(Vm::boot(config("data=1M", 64 << 20, 1)).unwrap());
    }
    // A joined thread may be in the list for a moment after the join.
    until("the threads to vanish", Duration::from_secs(10), || threads() == before.1);
    assert_eq!((open_descriptors(), threads(), ram_maps()), before);
}
