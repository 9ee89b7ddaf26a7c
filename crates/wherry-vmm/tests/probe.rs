//! The built-in probe guest in this machine.

mod common;

use common::{config, heartbeat, until};
use std::time::Duration;
use wherry_migration::machine::Machine;
use wherry_vmm::vm::Vm;

#[test]
fn the_probe_guest_boots_and_its_heart_beats() {
    let vm = Vm::boot(config("data=4M", 64 << 20, 1)).unwrap();
    vm.resume().unwrap();
    until("a heartbeat", Duration::from_secs(20), || heartbeat(vm.ram(), 0) > 1000);
    vm.shutdown();
}
