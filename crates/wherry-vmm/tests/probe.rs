//! The built-in probe guest in this machine: it boots, is stopped, saved, and goes on in another machine.

mod common;

use std::time::{Duration, Instant};

use common::{Probe, arrive, config, heartbeat, move_by_copy, reset_gaps, until};
use wherry_migration::machine::Machine;
use wherry_vmm::vm::{ExitReason, Vm, VmState};

const LIMIT: Duration = Duration::from_secs(30);

#[test]
fn the_probe_guest_boots_and_its_heart_beats_on_every_vcpu() {
    for cpus in [1, 2] {
        let vm = Vm::boot(config("data=4M", 64 << 20, cpus)).unwrap();
        assert_eq!(vm.state(), VmState::Stopped);
        vm.resume().unwrap();
        assert_eq!(vm.state(), VmState::Running);
        for cpu in 0..cpus as usize {
            until("a heartbeat", LIMIT, || heartbeat(vm.ram(), cpu) > 1000);
        }
        vm.shutdown();
        assert_eq!(vm.state(), VmState::Ended(ExitReason::ApiStop));
    }
}

#[test]
fn a_guest_that_switches_itself_off_ends_the_machine() {
    let vm = Vm::boot(config("data=1M run=50", 64 << 20, 2)).unwrap();
    vm.resume().unwrap();
    assert_eq!(vm.wait_exit(Some(Instant::now() + LIMIT)), Some(ExitReason::PowerOff));
    assert!(vm.resume().is_err() && vm.pause().is_err());
}

#[test]
fn a_paused_guest_does_nothing_until_it_is_resumed() {
    let vm = Vm::boot(config("data=1M", 64 << 20, 1)).unwrap();
    vm.resume().unwrap();
    until("a heartbeat", LIMIT, || heartbeat(vm.ram(), 0) > 1000);
    vm.pause().unwrap();
    assert_eq!(vm.state(), VmState::Paused);
    let beats = heartbeat(vm.ram(), 0);
    // A vCPU that is at rest stays so: the stop of its unit finds it there, and its state is the same twice.
    vm.units().stop(LIMIT).unwrap();
    assert_eq!(heartbeat(vm.ram(), 0), beats);
    vm.units().start().unwrap();
    assert_eq!(vm.state(), VmState::Paused, "the engine's start does not undo the user's pause");
    assert_eq!(heartbeat(vm.ram(), 0), beats);
    vm.resume().unwrap();
    until("a heartbeat after the pause", LIMIT, || heartbeat(vm.ram(), 0) > beats + 1000);
}

#[test]
fn a_stop_that_is_undone_leaves_a_guest_that_runs_on() {
    let vm = Vm::boot(config("data=4M", 64 << 20, 2)).unwrap();
    vm.resume().unwrap();
    for round in 0..20 {
        let before = [0, 1].map(|cpu| heartbeat(vm.ram(), cpu));
        until("heartbeats", LIMIT, || (0..2).all(|cpu| heartbeat(vm.ram(), cpu) > before[cpu] + 100));
        vm.units().stop(LIMIT).unwrap();
        let stopped = [0, 1].map(|cpu| heartbeat(vm.ram(), cpu));
        vm.units().save().unwrap();
        assert_eq!([0, 1].map(|cpu| heartbeat(vm.ram(), cpu)), stopped, "round {round}");
        vm.units().start().unwrap();
    }
    Probe::of(vm.ram()).assert_healthy();
}

#[test]
fn a_guest_goes_on_in_another_machine_as_if_nothing_had_happened() {
    // Halting, a vCPU is woken by its local APIC's timer only: a timer that does not come over stops its heart.
    for (cpus, idle) in [(1, "spin"), (2, "spin"), (2, "halt")] {
        let cmdline = format!("data=8M rate=20M idle={idle}");
        let mut vm = Vm::boot(config(&cmdline, 64 << 20, cpus)).unwrap();
        vm.resume().unwrap();
        for _ in 0..5 {
            let before: Vec<_> = (0..cpus as usize).map(|cpu| heartbeat(vm.ram(), cpu)).collect();
            until("heartbeats", LIMIT, || {
                before.iter().enumerate().all(|(cpu, before)| heartbeat(vm.ram(), cpu) > before + 2000)
            });
            vm = move_by_copy(&vm);
        }
        let probe = Probe::of(vm.ram());
        probe.assert_healthy();
        let passes = probe.verify_passes();
        until("two more passes of verification", LIMIT, || Probe::of(vm.ram()).verify_passes() >= passes + 2);
        Probe::of(vm.ram()).assert_healthy();
    }
}

#[test]
fn a_paused_machine_arrives_paused() {
    let vm = Vm::boot(config("data=1M", 64 << 20, 1)).unwrap();
    vm.resume().unwrap();
    until("a heartbeat", LIMIT, || heartbeat(vm.ram(), 0) > 1000);
    vm.pause().unwrap();
    let there = move_by_copy(&vm);
    assert_eq!(there.state(), VmState::Paused);
    assert!(!there.runs_after_start());
    let beats = heartbeat(there.ram(), 0);
    there.resume().unwrap();
    until("a heartbeat there", LIMIT, || heartbeat(there.ram(), 0) > beats + 1000);
}

#[test]
fn state_is_taken_once_and_by_the_machine_it_fits() {
    let vm = Vm::boot(config("data=1M", 64 << 20, 1)).unwrap();
    vm.resume().unwrap();
    until("a heartbeat", LIMIT, || heartbeat(vm.ram(), 0) > 1000);
    vm.units().stop(LIMIT).unwrap();
    let state = vm.units().save().unwrap();
    let there = arrive(&vm.description());
    there.units().restore(&state).unwrap();
    assert!(there.units().restore(&state).unwrap_err().to_string().contains("restored before"));
    let two = Vm::boot(config("data=1M", 64 << 20, 2)).unwrap();
    assert!(two.units().restore(&state).unwrap_err().to_string().contains("vcpu[1]"));
    assert!(vm.units().restore(&state).unwrap_err().to_string().contains("runs already"));
}

#[test]
fn a_throttled_guest_gets_the_share_that_is_left() {
    let vm = Vm::boot(config("data=1M", 64 << 20, 1)).unwrap();
    vm.resume().unwrap();
    until("a heartbeat", LIMIT, || heartbeat(vm.ram(), 0) > 1000);
    // Not a speed: the guest's own clock tells how long it was kept out.
    reset_gaps(&vm, 1);
    vm.throttle(90);
    until("a gap of 3 ms", LIMIT, || Probe::of(vm.ram()).largest_gap_ns() >= 3_000_000);
    vm.throttle(0);
    let beats = heartbeat(vm.ram(), 0);
    until("a heartbeat after the throttle", LIMIT, || heartbeat(vm.ram(), 0) > beats + 1000);
    vm.throttle(99);
    vm.units().stop(LIMIT).unwrap();
    vm.units().start().unwrap();
}
