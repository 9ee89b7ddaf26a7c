//! VMs with virtio devices, moved between real processes while the guest keeps many requests in flight.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use support::disk::Memory;
use support::{Place, Vm, kvm, stderr, wait_for};
use wherry_guest::disk::BLOCK_BYTES;
use wherry_guest::report::Phase;

const IMAGE: u64 = 32 << 20;

fn image(place: &Place, name: &str, bytes: u64) -> PathBuf {
    let path = place.path(name);
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

fn run(place: &Place, image: &str, disk: &str) -> Vm {
    let cmdline = format!("data=16M rate=4M {disk}");
    let arguments = ["--memory", "64M", "--cmdline", &cmdline, "--disk", image, "--rng"];
    place.run_guest("0", &arguments, &[])
}

fn migrate(place: &Place, api: &str, to: &str, more: &[&str]) -> std::process::Output {
    let mut arguments = vec!["migrate", "--to", to, "--json"];
    arguments.extend(more);
    place.control(api, &arguments)
}

/// Moves a guest with a busy disk by all modes, and compares every byte at the end.
fn moves_with(disk: &str) {
    let place = Place::new();
    let path = image(&place, "disk", IMAGE);
    let path = path.to_str().unwrap();
    let mut here = run(&place, path, disk);
    let mut memory = Memory::of(&place, "0");
    memory.wait_for_requests("before the first move");
    for (leg, mode) in ["precopy", "postcopy", "hybrid", "postcopy", "precopy"].into_iter().enumerate() {
        let (from, to) = (leg.to_string(), (leg + 1).to_string());
        let (there, address) = place.receive(&to, &["--disk", path]);
        let output = migrate(&place, &from, &address, &["--mode", mode]);
        assert_eq!(output.status.code(), Some(0), "{mode}: {}", stderr(&output));
        let job: Value = serde_json::from_slice(&output.stdout).unwrap();
        println!("{mode}: I/O stall {} us, blackout {}", job["io_stall_us"], job["blackout"]);
        assert_eq!(here.end().code(), Some(0), "{}", here.log());
        (memory, here) = (Memory::of(&place, &to), there);
        let after = memory.wait_for_requests(&format!("after a move by {mode}"));
        assert!(after.flushes > 0, "{after:?}");
        wait_for("requests to be under way", || (memory.disk().in_flight > 0).then_some(()));
    }
    memory.finish();
    assert_eq!(here.end().code(), Some(0), "{}", here.log());
    assert_eq!(memory.snapshot().phase(), Phase::Finished);
    let compared = memory.compare(&File::open(path).unwrap(), 1);
    assert!(compared > IMAGE / BLOCK_BYTES / 4, "only {compared} blocks were ever written");
}

#[test]
fn a_disk_with_many_requests_in_flight_moves_by_every_mode_and_not_a_byte_or_interrupt_is_lost() {
    if !kvm("a_disk_with_many_requests_in_flight_moves_by_every_mode_and_not_a_byte_or_interrupt_is_lost") {
        return;
    }
    moves_with("disk=32M disk_depth=80 disk_wait=interrupt");
}

#[test]
fn a_disk_whose_driver_polls_moves_by_every_mode_and_not_a_byte_is_lost() {
    if !kvm("a_disk_whose_driver_polls_moves_by_every_mode_and_not_a_byte_is_lost") {
        return;
    }
    moves_with("disk=32M disk_depth=64 disk_wait=poll");
}

#[test]
fn a_destination_without_the_right_disk_is_refused_by_name_and_the_vm_runs_on() {
    if !kvm("a_destination_without_the_right_disk_is_refused_by_name_and_the_vm_runs_on") {
        return;
    }
    let place = Place::new();
    let path = image(&place, "disk", IMAGE);
    let path = path.to_str().unwrap();
    let small = image(&place, "small", 1 << 20);
    let (small, read_only) = (small.to_str().unwrap(), format!("{path},ro"));
    let _here = run(&place, path, "disk=32M");
    let memory = Memory::of(&place, "0");
    let wrong: [(&[&str], &str); 5] = [
        (&[], "disk 0"),
        (&["--disk", small], "2048"),
        (&["--disk", &read_only], "writable"),
        (&["--disk", path, "--disk", small], "it has 1"),
        (&["--disk", "/nonexistent"], "/nonexistent"),
    ];
    for (n, (disks, word)) in wrong.into_iter().enumerate() {
        let api = format!("r{n}");
        let (_there, address) = place.receive(&api, disks);
        let output = migrate(&place, "0", &address, &[]);
        assert_eq!(output.status.code(), Some(1), "{disks:?}");
        assert!(stderr(&output).contains(word), "{disks:?}: {}", stderr(&output));
    }
    memory.wait_for_requests("after refused moves");
}

#[test]
fn an_image_belongs_to_the_process_that_runs_the_vm() {
    if !kvm("an_image_belongs_to_the_process_that_runs_the_vm") {
        return;
    }
    let place = Place::new();
    let path = image(&place, "disk", IMAGE);
    let path = path.to_str().unwrap();
    let refused = |api: &str| {
        let mut second = place.start(api, &["run", "--memory", "64M", "--disk", path]);
        assert_eq!(second.end().code(), Some(1));
        assert!(second.log().contains("locked") && second.log().contains(path), "{}", second.log());
    };
    let mut here = run(&place, path, "disk=32M");
    refused("x");
    let (_there, address) = place.receive("1", &["--disk", path]);
    let output = migrate(&place, "0", &address, &[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(here.end().code(), Some(0), "{}", here.log());
    refused("y");
    Memory::of(&place, "1").wait_for_requests("after the move");
}

#[test]
fn a_move_that_fails_leaves_the_disk_served_and_locked_here() {
    if !kvm("a_move_that_fails_leaves_the_disk_served_and_locked_here") {
        return;
    }
    let place = Place::new();
    let path = image(&place, "disk", IMAGE);
    let path = path.to_str().unwrap();
    let here = run(&place, path, "disk=32M");
    let memory = Memory::of(&place, "0");
    // Somebody else has the image where it goes: the destination cannot take the lock, and says that it will not run.
    let other = image(&place, "other", IMAGE);
    let (there, address) = place.receive("2", &["--disk", other.to_str().unwrap()]);
    let thief = lock(&other);
    let output = migrate(&place, "0", &address, &[]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("locked"), "{}", stderr(&output));
    memory.wait_for_requests("after the move that failed");
    let mut second = place.start("x", &["run", "--memory", "64M", "--disk", path]);
    assert_eq!(second.end().code(), Some(1));
    assert!(second.log().contains("locked"), "{}", second.log());
    drop((thief, there, here));
}

/// Has another open file hold the lock of an image.
fn lock(path: &Path) -> wherry_virtio::blk::Image {
    let image = wherry_virtio::blk::Image::open(path, false).unwrap();
    image.lock().unwrap();
    image
}

#[test]
fn a_disk_in_qcow2_format_moves_by_every_mode_and_qemu_finds_it_whole() {
    let test = "a_disk_in_qcow2_format_moves_by_every_mode_and_qemu_finds_it_whole";
    let qemu_img = |arguments: &[&str]| Command::new("qemu-img").args(arguments).output();
    if qemu_img(&["--version"]).is_err() {
        println!("SKIPPED {test}: qemu-img is not installed (Debian package qemu-utils)");
        return;
    }
    if !kvm(test) {
        return;
    }
    let place = Place::new();
    let (path, raw) = (place.path("disk.qcow2"), place.path("disk.raw"));
    let (path, raw) = (path.to_str().unwrap(), raw.to_str().unwrap());
    let done = |arguments: &[&str]| {
        let output = qemu_img(arguments).unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    };
    done(&["create", "-q", "-f", "qcow2", path, "32M"]);
    let disk = format!("{path},format=qcow2");
    let mut here = run(&place, &disk, "disk=32M disk_depth=64 disk_wait=interrupt");
    let mut memory = Memory::of(&place, "0");
    memory.wait_for_requests("before the first move");
    // As a raw image it would be another disk. Not that very file: it grows, and may just be as long as the disk is.
    let new = place.path("new.qcow2").display().to_string();
    done(&["create", "-q", "-f", "qcow2", &new, "32M"]);
    let (_wrong, address) = place.receive("wrong", &["--disk", &new]);
    let output = migrate(&place, "0", &address, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("65536 sectors"), "{}", stderr(&output));
    for (leg, mode) in ["precopy", "postcopy", "hybrid"].into_iter().enumerate() {
        let (from, to) = (leg.to_string(), (leg + 1).to_string());
        let (there, address) = place.receive(&to, &["--disk", &disk]);
        let output = migrate(&place, &from, &address, &["--mode", mode]);
        assert_eq!(output.status.code(), Some(0), "{mode}: {}", stderr(&output));
        assert_eq!(here.end().code(), Some(0), "{}", here.log());
        (memory, here) = (Memory::of(&place, &to), there);
        memory.wait_for_requests(&format!("after a move by {mode}"));
    }
    memory.finish();
    assert_eq!(here.end().code(), Some(0), "{}", here.log());
    assert_eq!(memory.snapshot().phase(), Phase::Finished);
    done(&["check", "-q", path]);
    done(&["convert", "-q", "-f", "qcow2", "-O", "raw", path, raw]);
    assert!(memory.compare(&File::open(raw).unwrap(), 1) > 0, "no block was ever written");
}
