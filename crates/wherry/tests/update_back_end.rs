//! Live update of the process of a vhost-user back end, under whoever uses it: its front end stays connected and is told nothing, and
//! no request, packet, kick or interrupt is lost or comes twice.
//!
//! `WHERRY_UPDATES` is how often each back end is updated; a small number if nothing is said.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;
#[path = "../../wherry-backend/tests/support/mod.rs"]
mod vhost;

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use support::disk::Memory;
use support::update::{Holder, points, repetitions, updated};
use support::vhost::{BackEnd, Program, able};
use support::{Place, Vm, kvm, stderr, wait_for};
use vhost::Client;
use wherry_guest::disk::BLOCK_BYTES;
use wherry_guest::report::Phase;
use wherry_migration::testpoint::Point;

const IMAGE: u64 = 4 << 20;

fn image(place: &Place) -> PathBuf {
    let path = place.path("disk");
    File::create(&path).unwrap().set_len(IMAGE).unwrap();
    path
}

/// The option that gives a VM a disk.
fn device(disk: &BackEnd<'_>) -> String {
    format!("vhost-user-blk={}", disk.socket.display())
}

/// A guest that keeps 64 requests under way.
fn run(place: &Place, disk: &BackEnd<'_>, wait: &str) -> (Vm, Memory) {
    let cmdline = format!("data=4M rate=1M disk=4M disk_depth=64 disk_wait={wait}");
    let vm = place.run_guest("0", &["--memory", "64M", "--cmdline", &cmdline, "--device", &device(disk)], &[]);
    let memory = Memory::of(place, "0");
    memory.wait_for_requests("before the first update");
    (vm, memory)
}

/// Has the guest read and compare everything once more and end, and compares the image from outside.
fn finish_guest(memory: &Memory, holder: &Holder, image: PathBuf) {
    memory.finish();
    holder.await_end("whose guest has switched itself off");
    assert_eq!(memory.snapshot().phase(), Phase::Finished, "{:?}", memory.snapshot().failure);
    let compared = memory.compare(&File::open(image).unwrap(), 1);
    assert!(compared > IMAGE / BLOCK_BYTES / 8, "only {compared} blocks were ever written");
}

#[test]
fn the_process_of_a_disk_is_replaced_again_and_again_under_a_guest_with_64_requests_under_way() {
    let test = "the_process_of_a_disk_is_replaced_again_and_again_under_a_guest_with_64_requests_under_way";
    if !able(test, Program::Wherry) {
        return;
    }
    for wait in ["interrupt", "poll"] {
        let place = Place::new();
        let image = image(&place);
        let mut disk = BackEnd::disk(&place, "d", &image, &[]);
        disk.update("before it has a front end");
        let (mut first, memory) = run(&place, &disk, wait);
        let mut holder = Holder::of(first.pid());
        let mut figures = Vec::new();
        for n in 0..repetitions(5) {
            let job = disk.update(&format!("{wait}: update {n}"));
            memory.wait_for_requests(&format!("after update {n}"));
            println!("{wait}: {}", job["job"]["blackout"]);
            figures.push(disk.figures());
            // And the other side of the socket.
            if n % 3 == 1 {
                updated(&place.control("0", &["update", "--json"]), &format!("VM, update {n}"));
                holder.await_end("which was replaced");
                holder = Holder::behind(&place, "0");
                memory.wait_for_requests(&format!("after update {n} of the VM"));
            }
            // And both at once.
            if n % 3 == 2 {
                let asked = disk.asking(&[]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
                updated(&place.control("0", &["update", "--json"]), &format!("VM, with update {n}"));
                let job = updated(&asked.wait_with_output().unwrap(), &format!("update {n}, with the VM's"));
                disk.is_now(&job, "which was replaced with its VM's");
                holder.await_end("which was replaced with its disk's");
                holder = Holder::behind(&place, "0");
                memory.wait_for_requests(&format!("after both updates {n}"));
            }
        }
        let (descriptors, threads, own) = figures[0];
        let grown = |now: &(usize, usize, u64)| now.0 > descriptors + 2 || now.1 > threads + 2 || now.2 > own + 4096;
        assert!(!figures.iter().any(grown), "{figures:?}");
        assert_eq!(first.end().code(), Some(0), "{}", first.log());
        finish_guest(&memory, &holder, image);
        disk.finish();
    }
}

/// What a process has in its environment that is to be held at a point.
fn held_at(place: &Place, point: Point) -> [(&'static str, String); 2] {
    let dir = place.path("").to_str().unwrap().to_owned();
    [("WHERRY_TEST_PAUSE_AT", point.name().into()), ("WHERRY_TEST_PAUSE_DIR", dir)]
}

/// A disk whose update is held at a point.
fn disk_held_at<'a>(place: &'a Place, image: &std::path::Path, point: Point) -> BackEnd<'a> {
    let environment = held_at(place, point);
    let environment: Vec<_> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
    BackEnd::disk(place, "d", image, &environment)
}

#[test]
fn a_new_process_that_dies_or_hangs_at_any_step_leaves_the_disk_to_the_old_one() {
    if !kvm("a_new_process_that_dies_or_hangs_at_any_step_leaves_the_disk_to_the_old_one") {
        return;
    }
    let before = |point: &Point| !matches!(point, Point::NewRuns | Point::NewStarted);
    let dies = points("new-").filter(before).map(|point| (point, true));
    for (point, dies) in dies.chain([(Point::NewLoaded, false)]) {
        let place = Place::new();
        let image = image(&place);
        let mut disk = disk_held_at(&place, &image, point);
        let (vm, memory) = run(&place, &disk, "interrupt");
        let (update, new) = disk.held(point);
        if dies {
            new.kill();
        }
        // One that hangs is killed when its time is over.
        let output = update.wait_with_output().unwrap();
        new.await_end("which did not take over");
        assert_eq!(output.status.code(), Some(1), "{point}");
        let said = stderr(&output);
        assert!(said.contains("served as before") && said.contains("signal: 9"), "{point}: {said}");
        assert!(!disk.now.has_ended());
        memory.wait_for_requests(&format!("after an update that ended at {point}"));
        std::fs::write(place.path(&format!("{point}.go")), "").unwrap();
        disk.update(&format!("after {point}"));
        memory.wait_for_requests("after the next one");
        finish_guest(&memory, &Holder::of(vm.pid()), image);
        disk.finish();
    }
}

#[test]
fn an_old_process_that_dies_when_all_was_passed_leaves_the_disk_to_the_new_one() {
    if !kvm("an_old_process_that_dies_when_all_was_passed_leaves_the_disk_to_the_new_one") {
        return;
    }
    for point in [Point::OldOffered, Point::OldReplaced] {
        let place = Place::new();
        let image = image(&place);
        let mut disk = disk_held_at(&place, &image, point);
        let (vm, memory) = run(&place, &disk, "interrupt");
        let (mut update, old) = disk.held(point);
        assert_eq!(old.pid, disk.now.pid);
        old.kill();
        old.await_end("which was killed");
        assert_eq!(update.wait().unwrap().code(), Some(1), "nobody can say what came of it");
        memory.wait_for_requests(&format!("after the end of the old process at {point}"));
        // Nobody has told which process it is now, but the control socket leads to it.
        std::fs::write(place.path(&format!("{point}.go")), "").unwrap();
        let job = updated(&disk.ask(&[]), &format!("after {point}"));
        disk.is_now(&job, "which was killed");
        memory.wait_for_requests("after the next update");
        finish_guest(&memory, &Holder::of(vm.pid()), image);
        assert!(!vm.log().contains("back end is lost"), "{}", vm.log());
        disk.finish();
    }
}

/// A front end that is no VM.
fn front_end(disk: &BackEnd<'_>) -> Client {
    let stream = UnixStream::connect(&disk.socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    Client { stream }
}

/// Size of the disk in sectors, as a front end is told.
fn sectors(client: &Client) -> u64 {
    let mut part = [0u32, 8, 0].map(u32::to_ne_bytes).concat();
    part.extend([0; 8]);
    u64::from_le_bytes(client.ask(24, &part, &[]).0[12..].try_into().unwrap())
}

fn refused(output: &Output, words: &[&str]) {
    assert_eq!(output.status.code(), Some(1), "{words:?}");
    let said = stderr(output);
    assert!(words.iter().all(|word| said.contains(word)), "{words:?}: {said}");
}

#[test]
fn what_cannot_go_on_is_named_and_the_disk_is_served_as_before() {
    let place = Place::new();
    let image = image(&place);
    let mut disk = BackEnd::disk(&place, "d", &image, &[]);
    let script = place.path("script");
    std::fs::write(&script, "#!/bin/sh\necho hello >&0\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let client = front_end(&disk);
    client.agree();
    refused(&disk.ask(&["--binary", "/nonexistent"]), &["/nonexistent", "served as before"]);
    refused(&disk.ask(&["--binary", "/bin/false"]), &["served as before", "ended with"]);
    refused(&disk.ask(&["--binary", script.to_str().unwrap()]), &["served as before"]);
    // The faults of a process are not another one's.
    let faults = client.ask(28, &[], &[]);
    refused(&disk.ask(&[]), &["cannot be handed over now", "postcopy"]);
    client.ask(30, &[], &[]);
    drop(faults);
    disk.update("when the postcopy is over");
    // The guest knows how large its disk is: as large as it was when it was told.
    let file = File::options().write(true).open(&image).unwrap();
    file.set_len(2 * IMAGE).unwrap();
    disk.update("with an image that has become larger");
    assert_eq!(sectors(&client), IMAGE / 512);
    disk.now.hang_up();
    wait_for("the disk to grow", || (sectors(&client) == 2 * IMAGE / 512).then_some(()));
    file.set_len(IMAGE).unwrap();
    refused(&disk.ask(&[]), &["served as before", "it has not the size that its guest knows"]);
    assert_eq!(sectors(&client), 2 * IMAGE / 512);
    file.set_len(2 * IMAGE).unwrap();
    disk.update("when it is as it was");
    drop(client);
    disk.finish();
}

/// `wherry migrate` in the background, held to a rate at which it takes a while.
fn migrate_slowly(place: &Place, to: &str, mode: &str) -> Child {
    let api = place.path("0");
    let arguments = ["migrate", "--json", "--bandwidth", "20M", "--mode", mode, "--to", to, "--api"];
    let mut command = place.command(&arguments);
    command.arg(api).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn the_processes_of_the_disks_are_replaced_while_their_vm_moves() {
    if !kvm("the_processes_of_the_disks_are_replaced_while_their_vm_moves") {
        return;
    }
    for mode in ["precopy", "postcopy"] {
        let place = Place::new();
        let image = image(&place);
        let mut here = BackEnd::disk(&place, "d0", &image, &[]);
        let mut there = BackEnd::disk(&place, "d1", &image, &[]);
        let cmdline = "data=24M rate=1M disk=4M disk_depth=64 disk_wait=interrupt";
        let arguments = ["--memory", "64M", "--cmdline", cmdline, "--device", &device(&here)];
        let mut source = place.run_guest("0", &arguments, &[]);
        Memory::of(&place, "0").wait_for_requests("before the move");
        let (destination, address) = place.receive("1", &["--device", &device(&there)]);
        there.update("before the move");
        let migration = migrate_slowly(&place, &address, mode);
        let (process, phase) = if mode == "precopy" { ("0", "precopy") } else { ("1", "postcopy") };
        wait_for(&format!("phase {phase}"), || place.status(process).filter(|status| status["job"]["phase"] == phase));
        if mode == "precopy" {
            // What was written before, in between and after is sent.
            let mut updates = 0;
            while place.status("0").is_some_and(|status| status["job"]["phase"] == phase) {
                here.update(&format!("during precopy, {updates}"));
                updates += 1;
            }
            println!("{updates} updates during precopy");
            assert!(updates > 0);
        } else {
            refused(&there.ask(&[]), &["cannot be handed over now", "postcopy"]);
        }
        let output = migration.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{mode}: {}", stderr(&output));
        let job: Value = serde_json::from_slice(&output.stdout).unwrap();
        println!("{mode}: I/O stall {} us, blackout {}", job["io_stall_us"], job["blackout"]);
        assert_eq!(source.end().code(), Some(0), "{}", source.log());
        let memory = Memory::of(&place, "1");
        memory.wait_for_requests("after the move");
        wait_for("the end of the migration at its destination", || {
            place.status("1").filter(|status| status["job"]["phase"] == "done")
        });
        there.update("after the move");
        here.update("whose guest has gone");
        memory.wait_for_requests("after the last update");
        finish_guest(&memory, &Holder::of(destination.pid()), image);
        here.finish();
        there.finish();
    }
}
