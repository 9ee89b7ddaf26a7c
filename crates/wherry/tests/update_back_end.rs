//! Live update of the process of a vhost-user back end, under whoever uses it: its front end stays connected and is told nothing, and
//! no request, packet, kick or interrupt is lost or comes twice.
//!
//! `WHERRY_UPDATES` is how often each back end is updated; a small number if nothing is said.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::fs::File;
use std::path::PathBuf;

use support::Place;
use support::disk::Memory;
use support::update::{Holder, repetitions, updated};
use support::vhost::{BackEnd, Program, able};
use wherry_guest::disk::BLOCK_BYTES;
use wherry_guest::report::Phase;

const IMAGE: u64 = 32 << 20;

fn image(place: &Place) -> PathBuf {
    let path = place.path("disk");
    File::create(&path).unwrap().set_len(IMAGE).unwrap();
    path
}

fn arguments(disk: &BackEnd<'_>, wait: &str) -> Vec<String> {
    let cmdline = format!("data=4M rate=1M disk=32M disk_depth=64 disk_wait={wait}");
    let device = format!("vhost-user-blk={}", disk.socket.display());
    ["--memory", "64M", "--cmdline", &cmdline, "--device", &device].map(Into::into).to_vec()
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
        let arguments = arguments(&disk, wait);
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let mut first = place.run_guest("0", &arguments, &[]);
        let memory = Memory::of(&place, "0");
        let mut holder = Holder::of(first.pid());
        memory.wait_for_requests("before the first update");
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
        }
        let (descriptors, threads, own) = figures[0];
        let grown = |now: &(usize, usize, u64)| now.0 > descriptors + 2 || now.1 > threads + 2 || now.2 > own + 4096;
        assert!(!figures.iter().any(grown), "{figures:?}");
        assert_eq!(first.end().code(), Some(0), "{}", first.log());
        finish_guest(&memory, &holder, image);
        disk.finish();
    }
}
