//! Live updates in a row of a guest with a disk, a network device and a device in another process, all of them at work: nothing stalls, every
//! request, frame and letter is verified, and no process ends up with more than the one before it.
//!
//! `WHERRY_UPDATES` is how often each guest is updated; a small number if nothing is said. `cargo xtask updates` does it a thousand times.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use support::disk::Memory;
use support::net::{Echo, frames, wait_for_frames};
use support::testdma::{Process, load, wait_for_more};
use support::update::{Holder, count, own_memory, repetitions, updated};
use support::{LIMIT, Place, kvm, ram};
use wherry_guest::disk::BLOCK_BYTES;
use wherry_guest::report::Phase;
use wherry_netlab::{ETHERTYPE, Network, TapPeer};

const IMAGE: u64 = 32 << 20;
/// What has to come through each of the devices between two updates.
const FRAMES: u64 = 100;
const LETTERS: u64 = 20;
/// Connections of the API come and go, and threads by which the kernel does I/O.
const DESCRIPTORS: usize = 3;
const THREADS: usize = 8;
/// Memory of a process itself that is no leak, in KiB.
const OWN: u64 = 4096;

/// What a process has.
#[derive(Debug)]
struct Figures {
    descriptors: usize,
    /// Of these: eventfds, and files in memory.
    eventfds: usize,
    memfds: usize,
    threads: usize,
    own_kib: u64,
}

impl Figures {
    fn of(pid: u32) -> Self {
        let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
        // One that is closed meanwhile has no name.
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        for name in fds.filter_map(|fd| std::fs::read_link(fd.path()).ok()) {
            *kinds.entry(name.to_string_lossy().chars().take_while(|c| *c != '-').collect()).or_default() += 1;
        }
        let of = |start: &str| kinds.iter().filter(|(name, _)| name.starts_with(start)).map(|(_, n)| n).sum();
        Self {
            descriptors: count(pid, "fd"),
            eventfds: of("anon_inode:[eventfd]"),
            memfds: of("/memfd:"),
            threads: count(pid, "task"),
            own_kib: own_memory(pid),
        }
    }

    /// It has no more than an earlier one, or than itself before.
    fn is_like(&self, before: &Self) -> bool {
        (self.eventfds <= before.eventfds && self.memfds <= before.memfds)
            && self.descriptors <= before.descriptors + DESCRIPTORS
            && self.threads <= before.threads + THREADS
            && self.own_kib < before.own_kib + OWN
    }
}

/// Waits until a process has no more than that: a connection may be ending, and a vector being masked.
fn wait_until_like(pid: u32, before: &Figures, what: &str) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let now = Figures::of(pid);
        if now.is_like(before) {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: it has {now:?}, and the one before had {before:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Processes that were started in this place, and do anything but serve the device: by number, with their state.
fn processes(place: &Place) -> Vec<(u32, char)> {
    let records = format!("WHERRY_RECORDS={}", place.path("records").display());
    let state = |pid: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.chars().next()
    };
    let is_ours = |pid: &u32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|entry| entry == records.as_bytes())
    };
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    let ours = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_ours);
    ours.filter_map(|pid| Some((pid, state(pid)?))).collect()
}

fn is_updated_with(test: &str, testdma: &str) {
    if !kvm(test) {
        return;
    }
    if let Some(what) = wherry_netlab::missing() {
        println!("SKIPPED {test}: {what}");
        return;
    }
    let network = Network::new().unwrap();
    let peer = TapPeer::make(network.left(), "tap0", ETHERTYPE).unwrap();
    let place = Place::new();
    let image = place.path("disk");
    File::create(&image).unwrap().set_len(IMAGE).unwrap();
    let process = Process::start(&place, "d", &["--pattern", "lines"]);
    let device = format!("vfio-user={}", process.socket.display());
    let cmdline = format!("data=4M rate=1M disk=32M disk_depth=16 net=on {testdma}");
    let arguments = ["run", "--memory", "64M", "--cmdline", &cmdline, "--net", "tap0", "--device", &device];
    let disk = ["--disk", image.to_str().unwrap()];
    let mut first = place.start_in(network.left(), "0", &[&arguments[..], &disk].concat());
    let echo = Echo::start(&network, peer, 1);
    place.wait_until_filled("0");
    let memory = Memory::of(&place, "0");
    let works = |what: &str| {
        wait_for_frames(&memory, FRAMES, what);
        wait_for_more(&memory, LETTERS, what);
        memory.wait_for_requests(what);
    };
    works("before the first update");
    let ram = ram(&place.wait_for_state("0", "running"));
    let mut holder = Holder::of(first.pid());
    let (mut blackouts, mut begin) = (Vec::new(), None);
    let begun = Instant::now();
    let updates = repetitions(4);
    for n in 0..updates {
        let what = format!("update {n}");
        let job = updated(&place.control("0", &["update", "--json"]), &what);
        blackouts.push(job["job"]["blackout"]["total_us"].as_u64().unwrap());
        let next = Holder::behind(&place, "0");
        assert_eq!(job["pid"], next.pid);
        holder.await_end("which was replaced");
        holder = next;
        works(&format!("after {what}"));
        let blocks = ram.metadata().unwrap().blocks();
        let (own, theirs, before) =
            begin.get_or_insert_with(|| (Figures::of(holder.pid), Figures::of(process.pid()), blocks));
        wait_until_like(holder.pid, own, &what);
        wait_until_like(process.pid(), theirs, &format!("{what}, the process of the device"));
        assert!(blocks <= *before, "{what}: {} pages of RAM are there, and {} before", blocks / 8, *before / 8);
    }
    let took = begun.elapsed();
    assert_eq!(first.end().code(), Some(0), "{}", first.log());
    let there = processes(&place);
    // The launcher, the process that has the VM, and that of the device.
    assert!(there.len() == 3 && there.iter().all(|(_, state)| *state != 'Z'), "{there:?}");
    let end = Figures::of(holder.pid);
    memory.finish();
    holder.await_end("whose guest has switched itself off");
    let snapshot = memory.snapshot();
    assert_eq!((snapshot.phase(), snapshot.verify_errors()), (Phase::Finished, 0), "{:?}", snapshot.failure);
    let (net, guest, requests) = (frames(&memory), load(&memory), memory.disk());
    assert_eq!((net.received, net.verified), (net.sent, net.sent), "{net:?}");
    assert_eq!(guest.verified, guest.received, "{guest:?}");
    assert_eq!(echo.finish(), net.sent);
    let compared = memory.compare(&File::open(image).unwrap(), 1);
    assert!(compared > IMAGE / BLOCK_BYTES / 4, "only {compared} blocks were ever written");
    let device = process.summary();
    assert_eq!((&device["faults"], &device["loads"]), (&0.into(), &0.into()), "{device}");
    blackouts.sort_unstable();
    let at = |permille: usize| blackouts[(blackouts.len() - 1) * permille / 1000];
    println!(
        "{testdma}: {updates} updates in {} s; blackout median {} us, p99 {} us, longest {} us",
        took.as_secs(),
        at(500),
        at(990),
        at(1000)
    );
    println!(
        "{} disk requests, {} frames, {} letters, all verified; longest pause of each {}, {}, {} ms",
        requests.completed(),
        net.verified,
        guest.verified,
        requests.longest_ns / 1_000_000,
        net.longest_ns / 1_000_000,
        guest.longest_ns / 1_000_000
    );
    println!("after the first update {:?}, after the last {end:?}", begin.map(|begin| begin.0));
}

#[test]
fn a_guest_with_everything_at_work_is_updated_in_a_row_while_its_device_interrupts_by_msix() {
    let test = "a_guest_with_everything_at_work_is_updated_in_a_row_while_its_device_interrupts_by_msix";
    is_updated_with(test, "testdma=wait testdma_interrupt=msix testdma_vectors=3");
}

#[test]
fn a_guest_with_everything_at_work_is_updated_in_a_row_while_its_device_interrupts_by_msi() {
    let test = "a_guest_with_everything_at_work_is_updated_in_a_row_while_its_device_interrupts_by_msi";
    is_updated_with(test, "testdma=wait testdma_interrupt=msi testdma_vectors=2");
}

#[test]
fn a_guest_with_everything_at_work_is_updated_in_a_row_while_its_device_interrupts_by_its_pin() {
    let test = "a_guest_with_everything_at_work_is_updated_in_a_row_while_its_device_interrupts_by_its_pin";
    is_updated_with(test, "testdma=wait testdma_interrupt=intx");
}

#[test]
fn a_guest_with_everything_at_work_is_updated_in_a_row_while_it_masks_the_vectors_of_its_device() {
    let test = "a_guest_with_everything_at_work_is_updated_in_a_row_while_it_masks_the_vectors_of_its_device";
    is_updated_with(test, "testdma=wait testdma_interrupt=msix testdma_vectors=2 testdma_mask=on");
}
