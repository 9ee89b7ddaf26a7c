//! Live update by exec: the process stays, its program changes; and what happens when the new one does not prove that it can.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Output;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use support::disk::Memory;
use support::testdma::Process;
use support::update::{Holder, count, guest_held_at, held_in, own_memory, repetitions, updated};
use support::vhost::{Daemon, Program};
use support::{Place, assert_alive, heartbeat, kvm, ram, stderr, wait_for};
use wherry_guest::disk::BLOCK_BYTES;
use wherry_guest::report::Phase;
use wherry_migration::testpoint::Point;

fn update(place: &Place) -> Output {
    place.control("0", &["update", "--mode", "exec", "--json"])
}

/// Updates it; it is the same process afterwards.
fn update_in(place: &Place, pid: u32, what: &str) -> Value {
    let done = updated(&update(place), what);
    assert_eq!(done["pid"], pid, "{what}");
    assert_eq!(place.wait_for_state("0", "running")["pid"], pid, "{what}");
    done
}

/// The words of the command line of a process.
fn words(pid: u32) -> Vec<String> {
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    words.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

#[test]
fn a_guest_with_a_busy_disk_goes_on_in_the_same_process_under_one_program_after_another() {
    const IMAGE: u64 = 32 << 20;
    if !kvm("a_guest_with_a_busy_disk_goes_on_in_the_same_process_under_one_program_after_another") {
        return;
    }
    let place = Place::new();
    let path = place.path("disk");
    File::create(&path).unwrap().set_len(IMAGE).unwrap();
    let sockets = [place.path("serial"), place.path("console")];
    let [serial, console] = [("socket", 0), ("unix", 1)].map(|(kind, n)| format!("{kind}:{}", sockets[n].display()));
    let cmdline = "data=16M rate=4M disk=32M disk_depth=80 disk_wait=interrupt";
    let disk = path.to_str().unwrap();
    let arguments = ["--memory", "64M", "--cpus", "2", "--cmdline", cmdline, "--disk", disk, "--rng", "--balloon"];
    let arguments = [&arguments[..], &["--serial", &serial, "--console", &console]].concat();
    let mut vm = place.run_guest("0", &arguments, &[]);
    let memory = Memory::of(&place, "0");
    memory.wait_for_requests("before the first update");
    let mut clients = sockets.each_ref().map(|socket| {
        let client = UnixStream::connect(socket).unwrap();
        client.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        client
    });
    clients[0].write_all(b"waits for a guest that does not read\n").unwrap();
    let other = place.path("another-wherry");
    std::fs::copy(env!("CARGO_BIN_EXE_wherry"), &other).unwrap();
    let mut figures = Vec::new();
    for n in 0..repetitions(5) {
        let done = match n {
            0 => {
                let command = ["update", "--mode", "exec", "--json", "--binary", other.to_str().unwrap()];
                updated(&place.control("0", &command), "another program")
            }
            n => update_in(&place, vm.pid(), &format!("update {n}")),
        };
        let job = &done["job"];
        println!("update {n}: blackout {}, devices waited {} us before it", job["blackout"], job["io_stall_us"]);
        assert!(job["downtime_us"].as_u64().unwrap() > 0);
        assert!(words(vm.pid()).iter().any(|word| word == "take-over-executed"));
        assert_eq!(std::fs::read_link(format!("/proc/{}/exe", vm.pid())).unwrap(), other);
        memory.wait_for_requests(&format!("after update {n}"));
        for (client, socket) in clients.iter_mut().zip(&sockets) {
            let read = client.read(&mut [0]);
            let open = match &read {
                Ok(bytes) => *bytes > 0,
                Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
            };
            assert!(open, "update {n}: the client of {} was dropped: {read:?}", socket.display());
        }
        figures.push((count(vm.pid(), "fd"), count(vm.pid(), "task"), own_memory(vm.pid())));
    }
    let (descriptors, threads, own) = figures[0];
    for (n, figure) in figures.iter().enumerate() {
        assert!(figure.0 <= descriptors + 3, "update {n}: {figures:?}");
        assert!(figure.1 <= threads + 8, "update {n}: {figures:?}");
        assert!(figure.2 < own + 4096, "update {n}: {figures:?}");
    }
    // By transfer, and by exec again.
    updated(&place.control("0", &["update", "--json"]), "by transfer");
    let holder = Holder::behind(&place, "0");
    assert_ne!(holder.pid, vm.pid());
    assert_eq!(vm.end().code(), Some(0), "{}", vm.log());
    update_in(&place, holder.pid, "after a transfer");
    let image = wherry_virtio::blk::Image::open(&path, false).unwrap();
    assert!(image.lock().is_err(), "the lock of the image was lost");
    drop(image);
    memory.finish();
    holder.await_end("whose guest has switched itself off");
    assert_eq!(memory.snapshot().phase(), Phase::Finished);
    assert_eq!(memory.snapshot().verify_errors(), 0);
    memory.compare(&File::open(&path).unwrap(), 1);
    assert!(!place.path("0").exists() && sockets.iter().all(|socket| !socket.exists()));
    println!("descriptors, threads, KiB: {figures:?}");
}

#[test]
fn a_device_of_another_process_runs_on_and_no_interrupt_is_lost() {
    if !kvm("a_device_of_another_process_runs_on_and_no_interrupt_is_lost") {
        return;
    }
    for guest in ["testdma=wait testdma_interrupt=msix testdma_vectors=3", "testdma=wait testdma_interrupt=intx"] {
        let place = Place::new();
        let process = Process::start(&place, "d", &["--pattern", "lines"]);
        let device = format!("vfio-user={}", process.socket.display());
        let cmdline = format!("data=4M rate=1M {guest}");
        let mut vm = place.run_guest("0", &["--memory", "64M", "--cmdline", &cmdline, "--device", &device], &[]);
        let memory = Memory::of(&place, "0");
        let load = || {
            let snapshot = memory.snapshot();
            assert!(snapshot.failure.is_none(), "{:?}", snapshot.failure);
            snapshot.testdma.unwrap()
        };
        for n in 0..repetitions(3) {
            update_in(&place, vm.pid(), &format!("{guest}: update {n}"));
            let before = load().received;
            wait_for(&format!("50 letters after update {n}"), || (load().received >= before + 50).then_some(()));
        }
        memory.finish();
        assert_eq!(vm.end().code(), Some(0), "{}", vm.log());
        let end = load();
        assert_eq!((end.errors, end.lost, end.verified), (0, 0, end.received), "{end:?}");
        let device = process.summary();
        assert_eq!((&device["faults"], &device["loads"]), (&0.into(), &0.into()), "{device}");
    }
}

#[test]
fn a_disk_of_another_process_is_served_on_and_no_request_is_lost() {
    const IMAGE: u64 = 16 << 20;
    if !kvm("a_disk_of_another_process_is_served_on_and_no_request_is_lost") {
        return;
    }
    let place = Place::new();
    let path = place.path("disk");
    File::create(&path).unwrap().set_len(IMAGE).unwrap();
    let mut daemon = Daemon::serve(&place, "b", &path, Program::Wherry);
    let cmdline = "data=4M rate=4M disk=16M disk_depth=32 disk_wait=interrupt";
    let mut vm = place.run_guest("0", &["--memory", "64M", "--cmdline", cmdline, "--device", &daemon.device()], &[]);
    let memory = Memory::of(&place, "0");
    memory.wait_for_requests("before the first update");
    for n in 0..repetitions(3) {
        update_in(&place, vm.pid(), &format!("update {n}"));
        memory.wait_for_requests(&format!("after update {n}"));
        assert!(daemon.process.try_wait().unwrap().is_none(), "update {n}: the back end has ended");
    }
    memory.finish();
    assert_eq!(vm.end().code(), Some(0), "{}", vm.log());
    assert_eq!((memory.snapshot().phase(), memory.snapshot().verify_errors()), (Phase::Finished, 0));
    assert!(memory.compare(&File::open(&path).unwrap(), 1) > IMAGE / BLOCK_BYTES / 4);
}

#[test]
fn a_proof_whose_process_is_killed_leaves_the_vm_to_the_old_program() {
    if !kvm("a_proof_whose_process_is_killed_leaves_the_vm_to_the_old_program") {
        return;
    }
    let points = [Point::NewConnected, Point::NewDescribed, Point::NewBuilt, Point::NewAsked, Point::NewLoaded];
    for point in points {
        let place = Place::new();
        let vm = guest_held_at(&place, point);
        let (command, proof) = held_in(&place, point, "exec");
        assert_ne!(proof.pid, vm.pid());
        proof.kill();
        let output = command.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{point}");
        assert!(stderr(&output).contains("signal: 9"), "{point}: {}", stderr(&output));
        assert_eq!(place.wait_for_state("0", "running")["pid"], vm.pid(), "{point}");
        assert!(words(vm.pid()).iter().any(|word| word == "run"), "{point}");
        assert_alive(&place, "0");
        std::fs::write(place.path(&format!("{point}.go")), "").unwrap();
        update_in(&place, vm.pid(), point.name());
        assert_alive(&place, "0");
    }
}

#[test]
fn a_program_that_proves_nothing_is_named_with_what_it_did_and_not_executed() {
    if !kvm("a_program_that_proves_nothing_is_named_with_what_it_did_and_not_executed") {
        return;
    }
    let place = Place::new();
    let vm = guest_held_at(&place, Point::NewLoaded);
    let exits = place.path("exits");
    std::fs::write(&exits, "#!/bin/sh\nexit 7\n").unwrap();
    std::fs::set_permissions(&exits, std::fs::Permissions::from_mode(0o755)).unwrap();
    let refused = |program: &Path, hints: [&str; 2]| {
        let output = place.control("0", &["update", "--mode", "exec", "--binary", program.to_str().unwrap()]);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{}: {said}", program.display());
        assert!(hints.iter().all(|hint| said.contains(hint)), "{}: {said}", program.display());
        assert_eq!(place.wait_for_state("0", "running")["pid"], vm.pid());
        assert_alive(&place, "0");
    };
    refused(Path::new("/nonexistent/wherry"), ["/nonexistent/wherry", "No such file"]);
    refused(&exits, ["closed", "exit status: 7"]);
    // It hangs with the state of the VM, which stands still until it is given up.
    refused(Path::new(env!("CARGO_BIN_EXE_wherry")), ["silent", "prove"]);
    std::fs::write(place.path(&format!("{}.go", Point::NewLoaded)), "").unwrap();
    update_in(&place, vm.pid(), "after all of them");
    assert_alive(&place, "0");
}

#[test]
fn a_program_that_cannot_be_executed_after_all_leaves_the_vm_running() {
    if !kvm("a_program_that_cannot_be_executed_after_all_leaves_the_vm_running") {
        return;
    }
    let place = Place::new();
    let point = Point::ExecProven;
    let dir = place.path("");
    let environment = [("WHERRY_TEST_PAUSE_AT", point.name()), ("WHERRY_TEST_PAUSE_DIR", dir.to_str().unwrap())];
    let program = place.path("another-wherry");
    std::fs::copy(env!("CARGO_BIN_EXE_wherry"), &program).unwrap();
    let (input, _keeps_open) = rustix::pipe::pipe().unwrap();
    let mut command = place.command(&["run", "--serial", "stdio", "--memory", "64M", "--cmdline", "data=4M rate=4M"]);
    command.stdin(input).envs(environment);
    let vm = place.start_command("0", command);
    place.wait_until_filled("0");
    let stdin = || std::fs::read_link(format!("/proc/{}/fd/0", vm.pid())).unwrap();
    let before = stdin();
    let mut command = place.command(&["update", "--mode", "exec", "--binary", program.to_str().unwrap(), "--api"]);
    command.arg(place.path("0")).stderr(std::process::Stdio::piped());
    let update = command.spawn().unwrap();
    wait_for("the proof", || place.path(point.name()).exists().then_some(()));
    // Nobody may execute it any more.
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::write(place.path(&format!("{point}.go")), "").unwrap();
    let output = update.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("executing") && stderr(&output).contains("ermission"), "{}", stderr(&output));
    assert_eq!(place.wait_for_state("0", "running")["pid"], vm.pid());
    assert_alive(&place, "0");
    assert_eq!(stdin(), before, "its standard input is another");
    // It still hears of signals, too.
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    update_in(&place, vm.pid(), "after it");
    assert_alive(&place, "0");
    assert_eq!(stdin(), before, "its standard input is another");
    let mut vm = vm;
    vm.signal(Signal::TERM);
    assert_eq!(vm.end().code(), Some(0), "{}", vm.log());
}

#[test]
fn a_stop_asked_of_the_old_program_is_not_lost_and_its_death_is_that_of_the_vm() {
    if !kvm("a_stop_asked_of_the_old_program_is_not_lost_and_its_death_is_that_of_the_vm") {
        return;
    }
    let point = Point::ExecProven;
    let place = Place::new();
    let dir = place.path("");
    let environment = [
        ("WHERRY_TEST_PAUSE_AT", point.name()),
        ("WHERRY_TEST_PAUSE_DIR", dir.to_str().unwrap()),
        ("WHERRY_LOG", "wherry=info"),
    ];
    let mut vm = place.run_with("0", &[], &environment);
    let (command, old) = held_in(&place, point, "exec");
    assert_eq!(old.pid, vm.pid());
    vm.signal(Signal::TERM);
    wait_for("the signal to be heard", || vm.log().contains("a signal asks for a stop").then_some(()));
    std::fs::write(place.path(&format!("{point}.go")), "").unwrap();
    let output = command.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert_eq!(vm.end().code(), Some(0), "{}", vm.log());

    let place = Place::new();
    let mut vm = guest_held_at(&place, point);
    let ram = ram(&place.wait_for_state("0", "running"));
    let (mut command, old) = held_in(&place, point, "exec");
    vm.kill();
    old.await_end("which was killed");
    let beats = heartbeat(&ram);
    assert_ne!(command.wait().unwrap().code(), Some(0));
    assert_eq!(heartbeat(&ram), beats, "the process that proved it has run the VM");
    assert!(place.ask("0", "/vm").is_none());
}
