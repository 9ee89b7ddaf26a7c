//! Moves of a VM whose device, or the one that waits for it, fails on purpose: the move is refused with the name of the device, and the VM
//! lives where it was.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use support::disk::Memory;
use support::testdma::Process;
use support::{Place, Vm, assert_alive, heartbeat, kvm, ram, stderr, wait_for};

/// Buffers that show that a device works.
const BUFFERS: u64 = 500;

/// What the guest has received. Nothing of that was wrong.
fn received(memory: &Memory) -> u64 {
    let load = memory.snapshot().testdma.unwrap();
    assert_eq!(load.errors, 0, "{load:?}");
    load.received
}

/// A move from a device with these options to one with those is refused: which of the two is named, and what is said of it. Whether the
/// first one works on.
fn refused(here: &[&str], there: &[&str], named: &str, hint: &str, works_on: bool) {
    let place = Place::new();
    let what = format!("{here:?} to {there:?}");
    let (first, second) = (Process::start(&place, "d0", here), Process::start(&place, "d1", there));
    let option = |process: &Process| format!("vfio-user={}", process.socket.display());
    let arguments = ["--memory", "64M", "--cmdline", "data=1M rate=1M testdma=ring", "--device", &option(&first)];
    let mut vm = place.run_guest("0", &arguments, &[]);
    let memory = Memory::of(&place, "0");
    wait_for("the device to work", || (received(&memory) > BUFFERS).then_some(()));
    let (_waiting, address) = place.receive("1", &["--device", &option(&second)]);
    let output = place.control("0", &["migrate", "--to", &address, "--mode", "precopy"]);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{what}: {said}");
    let name = place.path(&format!("{named}.sock")).display().to_string();
    assert!(said.contains(&name) && said.contains(hint), "{what}: {said}");
    assert_alive(&place, "0");
    if works_on {
        let before = received(&memory);
        wait_for(&format!("the device to work after {what}"), || (received(&memory) > before + BUFFERS).then_some(()));
    }
    vm.kill();
}

#[test]
fn a_device_that_fails_while_it_is_saved_keeps_the_vm_where_it_is() {
    if !kvm("a_device_that_fails_while_it_is_saved_keeps_the_vm_where_it_is") {
        return;
    }
    for (fault, named, hint, works_on) in [
        ("refuse=stop-copy", "d0", "refused", true),
        ("wrong-state", "d1", "refused", true),
        ("short-state", "d1", "refused", true),
        ("endless-state", "d0", "bytes of state", true),
        ("stuck-transaction", "d0", "transactions pending", true),
        ("crash=stop-copy", "d0", "closed", false),
        ("disconnect=stop-copy", "d0", "closed", false),
        ("crash=mig-data-read", "d0", "closed", false),
    ] {
        refused(&["--fault", fault], &[], named, hint, works_on);
    }
}

#[test]
fn a_device_that_does_not_run_where_its_vm_goes_is_lost_and_the_vm_lives_there() {
    if !kvm("a_device_that_does_not_run_where_its_vm_goes_is_lost_and_the_vm_lives_there") {
        return;
    }
    for fault in ["refuse=running", "crash=after-running", "disconnect=running"] {
        let place = Place::new();
        let first = Process::start(&place, "d0", &[]);
        let second = Process::start(&place, "d1", &["--fault", fault]);
        let option = |process: &Process| format!("vfio-user={}", process.socket.display());
        let arguments = ["--memory", "64M", "--cmdline", "data=1M rate=1M testdma=ring", "--device", &option(&first)];
        let mut here = place.run_guest("0", &arguments, &[]);
        let (there, address) = place.receive("1", &["--device", &option(&second)]);
        let output = place.control("0", &["migrate", "--to", &address, "--mode", "precopy"]);
        assert_eq!(output.status.code(), Some(0), "{fault}: {}", stderr(&output));
        assert_eq!(here.end().code(), Some(0));
        assert_alive(&place, "1");
        let name = second.socket.display().to_string();
        assert!(there.log().contains(&name) && there.log().contains("goes on without it"), "{fault}: {}", there.log());
    }
}

#[test]
fn a_device_that_cannot_take_the_state_keeps_the_vm_where_it_is() {
    if !kvm("a_device_that_cannot_take_the_state_keeps_the_vm_where_it_is") {
        return;
    }
    for (there, hint) in [
        (["--fault", "refuse=resuming"], "refused"),
        (["--fault", "crash=resuming"], "closed"),
        (["--fault", "disconnect=mig-data-write"], "closed"),
        (["--fault", "crash=mig-data-write"], "closed"),
        (["--vectors", "2"], "interrupts"),
        (["--interrupts", "msix"], "interrupts"),
    ] {
        refused(&[], &there, "d1", hint, true);
    }
    refused(&[], &["--no-migration"], "d1", "cannot be migrated", true);
    refused(&["--no-migration"], &[], "d0", "cannot give its state", true);
}

/// The VM runs, and so does its guest, unless that has said that its driver could not begin.
fn lives(place: &Place, api: &str) {
    let ram = ram(&place.wait_for_state(api, "running"));
    let (before, memory) = (heartbeat(&ram), Memory::of(place, api));
    wait_for("the guest to go on, or to say that it has no device", || {
        let failed = || memory.try_snapshot().is_some_and(|snapshot| snapshot.failure.is_some());
        (heartbeat(&ram) > before || failed()).then_some(())
    });
}

/// Waits until the process answers at its API in one of these states; false if it has ended, having named the device.
fn comes(place: &Place, vm: &mut Vm, api: &str, states: [&str; 2], device: &Process) -> bool {
    let name = device.socket.display().to_string();
    wait_for("the process to come, or to end", || {
        if let Some(code) = vm.ended() {
            assert!(code == Some(1) && vm.log().contains(&name), "it ended with {code:?}: {}", vm.log());
            return Some(false);
        }
        let status = place.status(api)?;
        states.iter().any(|state| status["state"] == *state).then_some(true)
    })
}

#[test]
fn a_device_that_leaves_at_any_message_leaves_a_vm_that_lives_or_never_began() {
    if !kvm("a_device_that_leaves_at_any_message_leaves_a_vm_that_lives_or_never_began") {
        return;
    }
    let at = |place: &str| format!("disconnect={place}");
    let messages = [
        "version",
        "dma-map",
        "get-info",
        "get-region-info",
        "get-region-io-fds",
        "get-irq-info",
        "set-irqs",
        "region-read",
        "region-read:60",
        "region-write",
        "region-write:8",
        "feature",
        "feature:4",
        "feature:8",
        "feature:12",
        "mig-data-read",
        "mig-data-write",
        "pre-copy",
        "stop-copy",
        "resuming",
        "stop",
        "running",
    ];
    let (mut began, mut moved, mut stayed) = (0, 0, 0);
    for (n, message) in messages.into_iter().flat_map(|m| [m.to_owned(), format!("after-{m}")]).enumerate() {
        for faulty in [0, 1] {
            // In turn, so that each message is left at both ends, before or after it.
            if (n + faulty) % 2 == 1 {
                continue;
            }
            let (place, fault) = (Place::new(), at(&message));
            let common = ["--state-size", "200K", "--pre-copy"];
            let devices = [0, 1].map(|which| {
                let mut more = common.to_vec();
                more.extend(["--fault", &fault].iter().filter(|_| which == faulty));
                Process::start(&place, &format!("d{which}"), &more)
            });
            let options = [0, 1].map(|which| format!("vfio-user={}", devices[which].socket.display()));
            let cmdline = "data=1M rate=1M testdma=ring";
            let run = ["run", "--name", "t", "--memory", "64M", "--cmdline", cmdline, "--device", &options[0]];
            let mut here = place.start("0", &run);
            if !comes(&place, &mut here, "0", ["running", "running"], &devices[0]) {
                continue;
            }
            began += 1;
            lives(&place, "0");
            let mut there = place.start("1", &["receive", "--listen", "tcp:127.0.0.1:0", "--device", &options[1]]);
            if !comes(&place, &mut there, "1", ["listening", "listening"], &devices[1]) {
                lives(&place, "0");
                continue;
            }
            let address = place.status("1").unwrap()["listen"].as_str().unwrap().to_owned();
            let output = place.control("0", &["migrate", "--to", &address, "--mode", "hybrid"]);
            match output.status.code() {
                Some(0) => {
                    moved += 1;
                    assert_eq!(here.end().code(), Some(0), "{fault} at {faulty}: {}", here.log());
                    lives(&place, "1");
                }
                Some(1) => {
                    stayed += 1;
                    let (said, name) = (stderr(&output), devices[faulty].socket.display().to_string());
                    assert!(said.contains(&name), "{fault} at {faulty}: {said}");
                    lives(&place, "0");
                }
                code => panic!("{fault} at {faulty}: {code:?}: {}\n{}", stderr(&output), there.log()),
            }
        }
    }
    println!("{began} VMs began, {moved} moved, {stayed} stayed where they were");
    assert!(began > 10 && moved > 2 && stayed > 2);
}
