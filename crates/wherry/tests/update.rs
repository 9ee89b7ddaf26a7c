//! Live update between real processes: the guest goes on, whatever the new process, or the old one, does.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use support::disk::Memory;
use support::update::{Holder, count, guest_held_at, held, own_memory, points, repetitions, updated};
use support::{Place, assert_alive, heartbeat, kvm, ram, stderr, wait_for};
use wherry_guest::disk::BLOCK_BYTES;
use wherry_guest::report::Phase;
use wherry_migration::testpoint::Point;

fn image(place: &Place, bytes: u64) -> PathBuf {
    let path = place.path("disk");
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

#[test]
fn a_guest_with_a_busy_disk_is_updated_again_and_again_and_nothing_is_lost_or_left() {
    const IMAGE: u64 = 32 << 20;
    if !kvm("a_guest_with_a_busy_disk_is_updated_again_and_again_and_nothing_is_lost_or_left") {
        return;
    }
    let place = Place::new();
    let path = image(&place, IMAGE);
    let disk = path.to_str().unwrap();
    let cmdline = "data=16M rate=4M disk=32M disk_depth=80 disk_wait=interrupt";
    let arguments = ["--memory", "64M", "--cpus", "2", "--cmdline", cmdline, "--disk", disk, "--rng", "--balloon"];
    let mut first = place.run_guest("0", &arguments, &[]);
    let memory = Memory::of(&place, "0");
    memory.wait_for_requests("before the first update");
    let mut holder = Holder::of(first.pid());
    let mut figures = Vec::new();
    for n in 0..repetitions(12) {
        let job = updated(&place.control("0", &["update", "--json"]), &format!("update {n}"));
        println!(
            "update {n}: blackout {}, devices waited {} us before it",
            job["job"]["blackout"], job["job"]["io_stall_us"]
        );
        let next = Holder::behind(&place, "0");
        assert_eq!(job["pid"], next.pid);
        assert_ne!(next.pid, holder.pid);
        holder.await_end("which was replaced");
        holder = next;
        memory.wait_for_requests(&format!("after update {n}"));
        assert_eq!(place.ask("0", "/vm").unwrap()["state"], "running");
        figures.push((count(holder.pid, "fd"), count(holder.pid, "task"), own_memory(holder.pid)));
    }
    assert_eq!(first.end().code(), Some(0), "{}", first.log());
    assert!(first.log().contains("has taken the VM over"), "{}", first.log());
    // Nothing grows from one process to the next: each has what its predecessor had.
    let (descriptors, threads, own) = figures[0];
    for (n, figure) in figures.iter().enumerate() {
        // Some come and go: connections of the API; its threads, and those by which the kernel does I/O.
        assert!(figure.0 <= descriptors + 3, "update {n}: {figures:?}");
        assert!(figure.1 <= threads + 8, "update {n}: {figures:?}");
        assert!(figure.2 < own + 4096, "update {n}: {figures:?}");
    }
    // The image is the VM's alone, through all processes.
    let other = wherry_virtio::blk::Image::open(&path, false).unwrap();
    assert!(other.lock().is_err(), "the lock of the image was lost");
    drop(other);
    memory.finish();
    holder.await_end("whose guest has switched itself off");
    assert_eq!(memory.snapshot().phase(), Phase::Finished);
    assert_eq!(memory.snapshot().verify_errors(), 0);
    let compared = memory.compare(&File::open(path).unwrap(), 1);
    assert!(compared > IMAGE / BLOCK_BYTES / 4, "only {compared} blocks were ever written");
    assert!(!place.path("0").exists(), "the API socket goes with the last process");
    println!("descriptors, threads, KiB: {figures:?}");
}

#[test]
fn a_new_process_that_is_killed_before_it_runs_the_vm_leaves_it_with_the_old_one() {
    if !kvm("a_new_process_that_is_killed_before_it_runs_the_vm_leaves_it_with_the_old_one") {
        return;
    }
    for point in points("new-").filter(|point| !matches!(point, Point::NewRuns | Point::NewStarted)) {
        let place = Place::new();
        let vm = guest_held_at(&place, point);
        let (update, new) = held(&place, point);
        new.kill();
        let output = update.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{point}");
        assert!(
            stderr(&output).contains("killed") || stderr(&output).contains("signal: 9"),
            "{point}: {}",
            stderr(&output)
        );
        assert_eq!(place.wait_for_state("0", "running")["pid"], vm.pid(), "{point}");
        assert_alive(&place, "0");
        // The next one is not held any more: each process is held once, and the file says that this one was.
        std::fs::write(place.path(&format!("{point}.go")), "").unwrap();
        updated(&place.control("0", &["update", "--json"]), &format!("after {point}"));
        let _new = Holder::behind(&place, "0");
        assert_alive(&place, "0");
    }
}

#[test]
fn a_new_process_that_is_killed_when_it_has_the_vm_loses_it_and_the_old_one_never_runs_it_again() {
    if !kvm("a_new_process_that_is_killed_when_it_has_the_vm_loses_it_and_the_old_one_never_runs_it_again") {
        return;
    }
    for point in [Point::NewRuns, Point::NewStarted] {
        let place = Place::new();
        let mut vm = guest_held_at(&place, point);
        let ram = ram(&place.wait_for_state("0", "running"));
        let (update, new) = held(&place, point);
        new.kill();
        new.await_end("which was killed");
        let beats = heartbeat(&ram);
        let output = update.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{point}");
        assert!(stderr(&output).contains("may have lost it"), "{point}: {}", stderr(&output));
        assert_eq!(vm.end().code(), Some(1), "{point}: {}", vm.log());
        assert_eq!(heartbeat(&ram), beats, "{point}: the old process has run it");
    }
}

#[test]
fn an_old_process_that_is_killed_takes_the_vm_along_unless_all_of_it_had_been_passed() {
    if !kvm("an_old_process_that_is_killed_takes_the_vm_along_unless_all_of_it_had_been_passed") {
        return;
    }
    for point in points("old-") {
        let place = Place::new();
        let vm = guest_held_at(&place, point);
        let ram = ram(&place.wait_for_state("0", "running"));
        let (mut update, old) = held(&place, point);
        assert_eq!(old.pid, vm.pid());
        let passed = matches!(point, Point::OldOffered | Point::OldReplaced);
        let beats = heartbeat(&ram);
        old.kill();
        old.await_end("which was killed");
        if passed {
            let new = Holder::behind(&place, "0");
            wait_for("the guest to go on in the new process", || (heartbeat(&ram) > beats).then_some(()));
            assert_ne!(new.pid, old.pid);
            // It is not held in its turn.
            std::fs::write(place.path(&format!("{point}.go")), "").unwrap();
            updated(&place.control("0", &["update", "--json"]), "in its turn");
            let _last = Holder::behind(&place, "0");
            assert_alive(&place, "0");
        } else {
            let beats = heartbeat(&ram);
            // Nobody has its memory any more but us.
            wait_for("the new process to end", || processes(&place).is_empty().then_some(()));
            assert_eq!(heartbeat(&ram), beats, "{point}: the guest has run after its death");
            assert!(place.ask("0", "/vm").is_none());
        }
        update.wait().unwrap();
    }
}

/// Processes of this test that are about to take over, or have.
fn processes(place: &Place) -> Vec<u32> {
    let records = format!("WHERRY_RECORDS={}", place.path("records").display());
    let is_one = |pid: &u32| {
        let read = |file: &str| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let ours = read("environ").split(|byte| *byte == 0).any(|entry| entry == records.as_bytes());
        ours && read("cmdline").split(|byte| *byte == 0).any(|word| word == b"take-over")
    };
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_one).collect()
}

#[test]
fn the_program_that_took_over_is_the_one_that_goes_on_and_has_the_standard_input_of_the_first() {
    if !kvm("the_program_that_took_over_is_the_one_that_goes_on_and_has_the_standard_input_of_the_first") {
        return;
    }
    let place = Place::new();
    let other = place.path("another-wherry");
    std::fs::copy(env!("CARGO_BIN_EXE_wherry"), &other).unwrap();
    let (input, _keeps_open) = rustix::pipe::pipe().unwrap();
    let what = |pid: u32, file: &str| std::fs::read_link(format!("/proc/{pid}/{file}")).unwrap();
    let first = place.start_from(input, "0", &["run", "--serial", "stdio", "--memory", "64M", "--cmdline", "data=1M"]);
    let pipe = what(first.pid(), "fd/0");
    for binary in [Some(&other), None] {
        let mut command = vec!["update", "--json"];
        command.extend(binary.iter().flat_map(|path| ["--binary", path.to_str().unwrap()]));
        place.wait_until_filled("0");
        updated(&place.control("0", &command), &format!("{binary:?}"));
        let new = Holder::behind(&place, "0");
        assert_eq!(what(new.pid, "exe"), other, "{binary:?}");
        // A guest that resets is booted again with it.
        assert_eq!(what(new.pid, "fd/0"), pipe, "{binary:?}");
        std::mem::forget(new);
    }
    let last = Holder::behind(&place, "0");
    assert_eq!(place.control("0", &["stop"]).status.code(), Some(0));
    last.await_end("which was stopped");
}

fn script(place: &Place, name: &str, text: &str) -> PathBuf {
    let path = place.path(name);
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn a_program_that_does_not_take_over_is_named_with_what_it_did_and_the_vm_runs_on() {
    if !kvm("a_program_that_does_not_take_over_is_named_with_what_it_did_and_the_vm_runs_on") {
        return;
    }
    let place = Place::new();
    let vm = place.run("0");
    let no_program = place.path("text");
    std::fs::write(&no_program, "no program").unwrap();
    let other_exit = script(&place, "exits", "#!/bin/sh\nexit 7\n");
    let hangs = script(&place, "hangs", "#!/bin/sh\nexec sleep 1000\n");
    let talks = script(&place, "talks", "#!/bin/sh\nprintf 'HTTP/1.1 200 OK\\r\\n\\r\\n' >&0\nsleep 1000\n");
    for (program, hints) in [
        (Path::new("/nonexistent/wherry"), ["/nonexistent/wherry", "No such file"]),
        (&no_program, ["text", "ermission denied"]),
        (&script(&place, "garbage", "\u{1}\u{2}"), ["garbage", "format"]),
        (&other_exit, ["closed", "exit status: 7"]),
        (&talks, ["begins with", "signal: 9"]),
        (&hangs, ["silent", "signal: 9"]),
    ] {
        let output = place.control("0", &["update", "--binary", program.to_str().unwrap()]);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{}: {said}", program.display());
        assert!(hints.iter().all(|hint| said.contains(hint)), "{}: {said}", program.display());
        assert_eq!(place.wait_for_state("0", "running")["pid"], vm.pid());
        assert_alive(&place, "0");
    }
    let reason = place.ask("0", "/vm").unwrap()["reason"].to_string();
    assert!(reason.contains("the last update did not happen"), "{reason}");
    updated(&place.control("0", &["update", "--json"]), "after all of them");
    let _new = Holder::behind(&place, "0");
    assert_alive(&place, "0");
}

#[test]
fn what_cannot_be_updated_now_is_refused_by_name_before_anything_happens() {
    if !kvm("what_cannot_be_updated_now_is_refused_by_name_before_anything_happens") {
        return;
    }
    let place = Place::new();
    let (_there, _) = place.receive("1", &[]);
    let output = place.control("1", &["update"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("listening"), "{}", stderr(&output));
}

#[test]
fn a_paused_vm_stays_paused_and_one_that_has_moved_or_was_updated_moves_and_is_updated() {
    if !kvm("a_paused_vm_stays_paused_and_one_that_has_moved_or_was_updated_moves_and_is_updated") {
        return;
    }
    let place = Place::new();
    let first = place.run("0");
    let ram0 = ram(&place.wait_for_state("0", "running"));
    assert_eq!(place.control("0", &["pause"]).status.code(), Some(0));
    updated(&place.control("0", &["update", "--json"]), "paused");
    let second = Holder::behind(&place, "0");
    assert_ne!(second.pid, first.pid());
    assert_eq!(place.wait_for_state("0", "paused")["pid"], second.pid);
    let beats = heartbeat(&ram0);
    assert_eq!(heartbeat(&ram0), beats);
    assert_eq!(place.control("0", &["resume"]).status.code(), Some(0));
    assert_alive(&place, "0");
    for (mode, leg) in [("precopy", 0u32), ("postcopy", 1)] {
        let (from, to) = (leg.to_string(), (leg + 1).to_string());
        let (_there, address) = place.receive(&to, &[]);
        let output = place.control(&from, &["migrate", "--to", &address, "--mode", mode, "--json"]);
        let job = updated(&output, mode);
        // It is told of this journey, not of the update before.
        assert!(job["role"] == "source" && job["blackout"]["total_us"].as_u64() > Some(0), "{mode}: {job}");
        wait_for("all of the memory to be there", || (place.ask(&to, "/migration")?["phase"] == "done").then_some(()));
        updated(&place.control(&to, &["update", "--json"]), mode);
        // What the receiver held is its successor's; that lives on when the receiver is dropped.
        std::mem::forget(Holder::behind(&place, &to));
        assert_alive(&place, &to);
    }
    let last = Holder::behind(&place, "2");
    let ram2 = ram(&place.wait_for_state("2", "running"));
    let before = support::snapshot(&ram2).unwrap();
    assert_eq!(before.verify_errors(), 0);
    let output = place.control("2", &["stop"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    last.await_end("which was stopped");
    second.await_end("whose VM has moved");
}

#[test]
fn a_vm_whose_source_may_not_know_that_it_has_come_is_not_updated() {
    if !kvm("a_vm_whose_source_may_not_know_that_it_has_come_is_not_updated") {
        return;
    }
    let place = Place::new();
    let mut source = guest_held_at(&place, Point::SourceRun);
    let (there, address) = place.receive("1", &[]);
    let mut command =
        place.command(&["migrate", "--to", &address, "--mode", "precopy", "--api", place.path("0").to_str().unwrap()]);
    let mut migrate = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for("the source to have given the VM away", || place.path(Point::SourceRun.name()).exists().then_some(()));
    source.kill();
    migrate.wait().unwrap();
    assert_alive(&place, "1");
    let output = place.control("1", &["update"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("its source may not know"), "{}", stderr(&output));
    assert_eq!(place.wait_for_state("1", "running")["pid"], there.pid());
}

#[test]
fn a_serial_port_and_a_console_keep_their_clients_and_their_sockets() {
    if !kvm("a_serial_port_and_a_console_keep_their_clients_and_their_sockets") {
        return;
    }
    let place = Place::new();
    let sockets = [place.path("serial"), place.path("console")];
    let [serial, console] = [("socket", 0), ("unix", 1)].map(|(kind, n)| format!("{kind}:{}", sockets[n].display()));
    let _first = place.run_with("0", &["--serial", &serial, "--console", &console], &[]);
    let mut clients = sockets.each_ref().map(|socket| {
        let mut client = UnixStream::connect(socket).unwrap();
        client.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        client.write_all(b"waits for a guest that does not read\n").unwrap();
        client
    });
    for n in 0..3 {
        updated(&place.control("0", &["update", "--json"]), &format!("update {n}"));
        std::mem::forget(Holder::behind(&place, "0"));
        for (client, socket) in clients.iter_mut().zip(&sockets) {
            let read = client.read(&mut [0]);
            let open = match &read {
                Ok(bytes) => *bytes > 0,
                Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
            };
            assert!(open, "update {n}: the client of {} was dropped: {read:?}", socket.display());
        }
    }
    let last = Holder::behind(&place, "0");
    assert_alive(&place, "0");
    // Others still find the sockets.
    sockets.iter().for_each(|socket| drop(UnixStream::connect(socket).unwrap()));
    assert_eq!(place.control("0", &["stop"]).status.code(), Some(0));
    last.await_end("which was stopped");
    assert!(sockets.iter().all(|socket| !socket.exists()), "the sockets go with the last process");
}

#[test]
fn a_new_process_that_gives_up_by_itself_leaves_what_others_find_here() {
    if !kvm("a_new_process_that_gives_up_by_itself_leaves_what_others_find_here") {
        return;
    }
    let place = Place::new();
    let point = Point::NewBuilt;
    let (dir, paths) = (place.path(""), [place.path("0"), place.path("serial"), place.path("console")]);
    let environment = [("WHERRY_TEST_PAUSE_AT", point.name()), ("WHERRY_TEST_PAUSE_DIR", dir.to_str().unwrap())];
    let (serial, console) = (format!("socket:{}", paths[1].display()), format!("pty:{}", paths[2].display()));
    let vm = place.run_with("0", &["--serial", &serial, "--console", &console], &environment);
    let (update, new) = held(&place, point);
    assert_eq!(place.control("0", &["cancel"]).status.code(), Some(0));
    // It goes on, and finds that nobody wants it any more.
    std::fs::write(place.path(&format!("{point}.go")), "").unwrap();
    new.await_end("which was given up");
    assert_eq!(update.wait_with_output().unwrap().status.code(), Some(1));
    for path in &paths {
        assert!(path.exists(), "{} is gone", path.display());
    }
    UnixStream::connect(&paths[1]).unwrap();
    assert_eq!(place.wait_for_state("0", "running")["pid"], vm.pid());
    assert_alive(&place, "0");
}

#[test]
fn two_updates_at_once_are_told_of_each_other_and_a_stop_asked_of_the_old_one_is_not_lost() {
    if !kvm("two_updates_at_once_are_told_of_each_other_and_a_stop_asked_of_the_old_one_is_not_lost") {
        return;
    }
    let place = Place::new();
    let vm = guest_held_at(&place, Point::NewDescribed);
    let (update, new) = held(&place, Point::NewDescribed);
    assert_eq!(place.ask("0", "/vm").unwrap()["state"], "updating");
    for command in [&["update"][..], &["pause"], &["migrate", "--to", "tcp:127.0.0.1:1"]] {
        let output = place.control("0", command);
        assert_eq!(output.status.code(), Some(1), "{command:?}");
        assert!(stderr(&output).contains("take it over"), "{command:?}: {}", stderr(&output));
    }
    let output = place.control("0", &["cancel"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let output = update.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cancelled"), "{}", stderr(&output));
    new.await_end("which was given up");
    assert_eq!(place.wait_for_state("0", "running")["pid"], vm.pid());
    assert_alive(&place, "0");
}
