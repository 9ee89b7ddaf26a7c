//! Live update of VMs whose devices are other processes: they run on, stay connected, and no interrupt and no buffer is lost.
//!
//! `WHERRY_UPDATES` is how often each guest is updated; a small number if nothing is said.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::fs::File;
use std::path::PathBuf;

use support::disk::Memory;
use support::testdma::{Process, load, wait_for_more};
use support::update::{Holder, count, held, points, repetitions, run_held_at, updated};
use support::vhost::{Daemon, Program, able};
use support::{Place, kvm, stderr, wait_for};
use wherry_guest::disk::BLOCK_BYTES;
use wherry_guest::report::Phase;
use wherry_migration::testpoint::Point;

/// Buffers and letters that show that the device works.
const BUFFERS: u64 = 500;
const LETTERS: u64 = 50;

#[test]
fn a_device_runs_on_under_updates_and_no_buffer_and_no_interrupt_is_lost() {
    if !kvm("a_device_runs_on_under_updates_and_no_buffer_and_no_interrupt_is_lost") {
        return;
    }
    for (guest, enough) in [
        ("testdma=ring testdma_interrupt=msix testdma_vectors=4 testdma_mask=on", BUFFERS),
        ("testdma=ring testdma_interrupt=msi testdma_vectors=2", BUFFERS),
        ("testdma=ring testdma_interrupt=intx", BUFFERS),
        ("testdma=wait testdma_interrupt=msix testdma_vectors=3", LETTERS),
        ("testdma=wait testdma_interrupt=msix testdma_mask=on", LETTERS / 4),
        ("testdma=wait testdma_interrupt=msi testdma_mask=on", LETTERS / 4),
        ("testdma=wait testdma_interrupt=intx", LETTERS),
        ("testdma=wait testdma_interrupt=intx testdma_mask=on", LETTERS / 4),
    ] {
        let place = Place::new();
        let process = Process::start(&place, "d", &["--pattern", "lines"]);
        let device = format!("vfio-user={}", process.socket.display());
        let cmdline = format!("data=4M rate=1M {guest}");
        let mut first = place.run_guest("0", &["--memory", "64M", "--cmdline", &cmdline, "--device", &device], &[]);
        let memory = Memory::of(&place, "0");
        wait_for_more(&memory, enough, "before the first update");
        let mut holder = Holder::of(first.pid());
        let mut figures = Vec::new();
        for n in 0..repetitions(6) {
            let job = updated(&place.control("0", &["update", "--json"]), &format!("{guest}: update {n}"));
            let next = Holder::behind(&place, "0");
            assert_eq!(job["pid"], next.pid);
            holder.await_end("which was replaced");
            holder = next;
            let now = wait_for_more(&memory, enough, &format!("after update {n}"));
            println!("{guest}: blackout {}, longest wait {} us", job["job"]["blackout"], now.longest_ns / 1000);
            figures.push((count(holder.pid, "fd"), count(holder.pid, "task")));
        }
        assert_eq!(first.end().code(), Some(0), "{}", first.log());
        let (descriptors, threads) = figures[0];
        assert!(figures.iter().all(|now| now.0 <= descriptors + 3 && now.1 <= threads + 8), "{figures:?}");
        memory.finish();
        holder.await_end("whose guest has switched itself off");
        assert_eq!(memory.snapshot().phase(), Phase::Finished);
        let guest = load(&memory);
        assert_eq!(guest.verified, guest.received, "{guest:?}");
        let device = process.summary();
        assert_eq!(device["faults"], 0, "{device}");
        // It was not asked for its state, nor reset.
        assert_eq!(device["loads"], 0, "{device}");
        println!("guest: {guest:?}\ndevice: {device}");
    }
}

/// A device, and the option that gives it to a VM.
fn device(place: &Place, name: &str) -> (Process, String) {
    let process = Process::start(place, name, &[]);
    let option = format!("vfio-user={}", process.socket.display());
    (process, option)
}

/// A guest whose device interrupts once for every letter: one that is lost stops it.
const WAITS: &[&str] = &["--memory", "64M", "--cmdline", "data=4M rate=1M testdma=wait testdma_vectors=2"];

/// Has the guest verify everything once more and end.
fn finish(memory: &Memory, holder: &Holder, process: Process) {
    memory.finish();
    holder.await_end("whose guest has switched itself off");
    assert_eq!(memory.snapshot().phase(), Phase::Finished, "{:?}", memory.snapshot().failure);
    let guest = load(memory);
    assert_eq!(guest.verified, guest.received, "{guest:?}");
    assert_eq!(process.summary()["faults"], 0);
}

#[test]
fn a_new_process_that_dies_or_gives_up_leaves_the_device_to_the_old_one() {
    if !kvm("a_new_process_that_dies_or_gives_up_leaves_the_device_to_the_old_one") {
        return;
    }
    let before = |point: &Point| !matches!(point, Point::NewRuns | Point::NewStarted);
    for (point, dies) in points("new-").filter(before).map(|point| (point, true)).chain([(Point::NewBuilt, false)]) {
        let place = Place::new();
        let (process, option) = device(&place, "d");
        let vm = run_held_at(&place, point, &[WAITS, &["--device", &option]].concat());
        let memory = Memory::of(&place, "0");
        wait_for_more(&memory, LETTERS, "before the update");
        let (update, new) = held(&place, point);
        if dies {
            new.kill();
        } else {
            assert_eq!(place.control("0", &["cancel"]).status.code(), Some(0));
        }
        std::fs::write(place.path(&format!("{point}.go")), "").unwrap();
        new.await_end("which does not take over");
        assert_eq!(update.wait_with_output().unwrap().status.code(), Some(1), "{point}");
        assert_eq!(place.wait_for_state("0", "running")["pid"], vm.pid(), "{point}");
        wait_for_more(&memory, LETTERS, &format!("after an update that ended at {point}"));
        updated(&place.control("0", &["update", "--json"]), &format!("after {point}"));
        let holder = Holder::behind(&place, "0");
        wait_for_more(&memory, LETTERS, "after the next one");
        finish(&memory, &holder, process);
    }
}

#[test]
fn an_old_process_that_dies_when_all_was_passed_takes_no_device_along() {
    if !kvm("an_old_process_that_dies_when_all_was_passed_takes_no_device_along") {
        return;
    }
    for point in [Point::OldOffered, Point::OldReplaced] {
        let place = Place::new();
        let (process, option) = device(&place, "d");
        let _vm = run_held_at(&place, point, &[WAITS, &["--device", &option]].concat());
        let memory = Memory::of(&place, "0");
        wait_for_more(&memory, LETTERS, "before the update");
        let (mut update, old) = held(&place, point);
        old.kill();
        old.await_end("which was killed");
        update.wait().unwrap();
        let holder = Holder::behind(&place, "0");
        wait_for_more(&memory, LETTERS, "in the new process");
        finish(&memory, &holder, process);
    }
}

#[test]
fn devices_come_and_go_and_move_between_updates() {
    if !kvm("devices_come_and_go_and_move_between_updates") {
        return;
    }
    let place = Place::new();
    let cmdline = "data=1M rate=0 testdma=ring testdma_plug=on";
    let _first = place.run_guest("0", &["--memory", "64M", "--cmdline", cmdline], &[]);
    let memory = Memory::of(&place, "0");
    let update = |api: &str, what: &str| {
        updated(&place.control(api, &["update", "--json"]), what);
        Holder::behind(&place, api)
    };
    let command = |api: &str, arguments: &[&str]| {
        let output = place.control(api, arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
    };
    let (one, option) = device(&place, "one");
    std::mem::forget(update("0", "without a device"));
    command("0", &["device-add", &option]);
    wait_for("the guest to have its device", || load(&memory).plugged.then_some(()));
    std::mem::forget(update("0", "with one that was plugged"));
    wait_for_more(&memory, BUFFERS, "of a device that was plugged before the update");
    std::mem::forget(update("0", "again"));
    command("0", &["device-remove", "vfio-user0"]);
    assert!(!load(&memory).plugged);
    std::mem::forget(update("0", "when it has gone"));
    command("0", &["device-add", &option]);
    wait_for_more(&memory, BUFFERS, "of the same process, plugged by another one");

    let (two, option) = device(&place, "two");
    let (there, address) = place.receive("1", &["--device", &option]);
    command("0", &["migrate", "--to", &address, "--mode", "postcopy"]);
    wait_for("all of the memory to be there", || (place.ask("1", "/migration")?["phase"] == "done").then_some(()));
    let memory = Memory::of(&place, "1");
    let holder = update("1", "after a move");
    wait_for_more(&memory, BUFFERS, "of the device that it moved to");
    drop(there);
    let (three, option) = device(&place, "three");
    let (_there, address) = place.receive("2", &["--device", &option]);
    command("1", &["migrate", "--to", &address, "--mode", "precopy"]);
    holder.await_end("whose VM has moved");
    let memory = Memory::of(&place, "2");
    wait_for_more(&memory, BUFFERS, "after a move of a VM that was updated");
    finish(&memory, &update("2", "in the end"), three);
    for process in [one, two] {
        assert_eq!(process.summary()["faults"], 0);
    }
}

#[test]
fn a_device_that_has_gone_is_named_before_anything_happens_and_one_that_goes_at_the_switch_stops_no_vm() {
    if !kvm("a_device_that_has_gone_is_named_before_anything_happens_and_one_that_goes_at_the_switch_stops_no_vm") {
        return;
    }
    let place = Place::new();
    let (process, option) = device(&place, "d");
    let point = Point::OldDrained;
    let vm = run_held_at(&place, point, &[WAITS, &["--device", &option]].concat());
    let (update, old) = held(&place, point);
    assert_eq!(old.pid, vm.pid());
    drop(process);
    std::fs::write(place.path(&format!("{point}.go")), "").unwrap();
    let output = update.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("d.sock"), "{}", stderr(&output));
    assert_eq!(place.wait_for_state("0", "running")["pid"], vm.pid());
    support::assert_alive(&place, "0");
    let output = place.control("0", &["update"]);
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(said.contains("d.sock") && said.contains("it has gone") && said.contains("unplug it"), "{said}");
    std::mem::forget(old);
}

const IMAGE: u64 = 32 << 20;

fn image(place: &Place) -> PathBuf {
    let path = place.path("disk");
    File::create(&path).unwrap().set_len(IMAGE).unwrap();
    path
}

/// A guest with a busy disk that another process serves.
fn busy(device: &str, wait: &str) -> Vec<String> {
    let cmdline = format!("data=4M rate=1M disk=32M disk_depth=80 disk_wait={wait}");
    ["--memory", "64M", "--cpus", "2", "--cmdline", &cmdline, "--device", device].map(String::from).to_vec()
}

/// Has the guest read every block once more, and compares the image with what it says that it wrote.
fn finish_disk(memory: &Memory, holder: &Holder, image: PathBuf) {
    memory.finish();
    holder.await_end("whose guest has switched itself off");
    let snapshot = memory.snapshot();
    assert_eq!((snapshot.phase(), snapshot.verify_errors()), (Phase::Finished, 0), "{:?}", snapshot.failure);
    let compared = memory.compare(&File::open(image).unwrap(), 1);
    assert!(compared > IMAGE / BLOCK_BYTES / 4, "only {compared} blocks were ever written");
}

#[test]
fn a_back_end_serves_on_under_updates_and_every_request_ends_once() {
    for (program, wait) in [(Program::Wherry, "interrupt"), (Program::Wherry, "poll"), (Program::Qemu, "interrupt")] {
        if !able("a_back_end_serves_on_under_updates_and_every_request_ends_once", program) {
            return;
        }
        let place = Place::new();
        let image = image(&place);
        let daemon = Daemon::serve(&place, "d", &image, program);
        let arguments = busy(&daemon.device(), wait);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut first = place.run_guest("0", &arguments, &[]);
        let memory = Memory::of(&place, "0");
        memory.wait_for_requests("before the first update");
        let mut holder = Holder::of(first.pid());
        let mut figures = Vec::new();
        for n in 0..repetitions(6) {
            let job = updated(&place.control("0", &["update", "--json"]), &format!("{wait}: update {n}"));
            let job = &job["job"];
            println!("{wait}: blackout {}, I/O stall {} us", job["blackout"], job["io_stall_us"]);
            let next = Holder::behind(&place, "0");
            holder.await_end("which was replaced");
            holder = next;
            memory.wait_for_requests(&format!("after update {n}"));
            figures.push((count(holder.pid, "fd"), count(holder.pid, "task")));
        }
        assert_eq!(first.end().code(), Some(0), "{}", first.log());
        let (descriptors, threads) = figures[0];
        assert!(figures.iter().all(|now| now.0 <= descriptors + 3 && now.1 <= threads + 8), "{figures:?}");
        finish_disk(&memory, &holder, image);
        drop(daemon);
    }
}

#[test]
fn a_back_end_that_is_replaced_and_a_process_that_is_lose_nothing_in_any_order() {
    if !able("a_back_end_that_is_replaced_and_a_process_that_is_lose_nothing_in_any_order", Program::Wherry) {
        return;
    }
    let place = Place::new();
    let image = image(&place);
    let serve = || Daemon::serve(&place, "d", &image, Program::Wherry);
    let mut daemon = serve();
    let arguments = busy(&daemon.device(), "interrupt");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let _first = place.run_guest("0", &arguments, &[]);
    let memory = Memory::of(&place, "0");
    let update = |what: &str| {
        updated(&place.control("0", &["update", "--json"]), what);
        Holder::behind(&place, "0")
    };
    memory.wait_for_requests("before anything");
    // Requests are under way: the next back end goes on with them, by what the one before noted.
    daemon.kill();
    daemon = serve();
    memory.wait_for_requests("of the second back end");
    std::mem::forget(update("with the second"));
    memory.wait_for_requests("in the second process");
    daemon.kill();
    daemon = serve();
    memory.wait_for_requests("of a back end that was found by the second process");
    // There is none when the third process takes over.
    daemon.kill();
    std::mem::forget(update("without a back end"));
    daemon = serve();
    memory.wait_for_requests("of a back end that was found by the third process");
    let holder = update("in the end");
    memory.wait_for_requests("in the last process");
    finish_disk(&memory, &holder, image);
    drop(daemon);
}

#[test]
fn a_new_process_that_dies_leaves_the_back_end_to_the_old_one_and_a_vm_moves_after_an_update() {
    if !able(
        "a_new_process_that_dies_leaves_the_back_end_to_the_old_one_and_a_vm_moves_after_an_update",
        Program::Wherry,
    ) {
        return;
    }
    for point in [Point::NewBuilt, Point::NewAsked, Point::NewLoaded] {
        let place = Place::new();
        let image = image(&place);
        let daemon = Daemon::serve(&place, "d", &image, Program::Wherry);
        let arguments = busy(&daemon.device(), "interrupt");
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let vm = run_held_at(&place, point, &arguments);
        let memory = Memory::of(&place, "0");
        memory.wait_for_requests("before the update");
        let (update, new) = held(&place, point);
        new.kill();
        std::fs::write(place.path(&format!("{point}.go")), "").unwrap();
        new.await_end("which was killed");
        assert_eq!(update.wait_with_output().unwrap().status.code(), Some(1), "{point}");
        assert_eq!(place.wait_for_state("0", "running")["pid"], vm.pid(), "{point}");
        memory.wait_for_requests(&format!("after an update that ended at {point}"));
        updated(&place.control("0", &["update", "--json"]), &format!("after {point}"));
        let holder = Holder::behind(&place, "0");
        memory.wait_for_requests("in the new process");
        if point != Point::NewLoaded {
            finish_disk(&memory, &holder, image);
            continue;
        }
        let there = Daemon::serve(&place, "there", &image, Program::Wherry);
        let (_there, address) = place.receive("1", &["--device", &there.device()]);
        let output = place.control("0", &["migrate", "--to", &address, "--mode", "postcopy"]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        holder.await_end("whose VM has moved");
        let memory = Memory::of(&place, "1");
        memory.wait_for_requests("after the move");
        wait_for("all of the memory to be there", || (place.ask("1", "/migration")?["phase"] == "done").then_some(()));
        updated(&place.control("1", &["update", "--json"]), "after the move");
        memory.wait_for_requests("in the last process");
        finish_disk(&memory, &Holder::behind(&place, "1"), image);
    }
}
