//! An earlier build of this program: it takes VMs over from this one, and this one from it, by live update and by migration.
//!
//! `WHERRY_PREVIOUS` is the path of its program; `cargo xtask test` builds the one that `.ci/previous` names. What that file says
//! it refuses has to be refused, with those words, while the VM runs on; anything else has to work.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::fs::File;
use std::path::{Path, PathBuf};

use support::disk::Memory;
use support::testdma::{Process, load, wait_for_more};
use support::update::{Holder, updated};
use support::{Place, assert_alive, kvm, stderr};
use wherry_guest::disk::BLOCK_BYTES;
use wherry_guest::report::Phase;

const IMAGE: u64 = 32 << 20;
/// Buffers and letters that show that the device works.
const BUFFERS: u64 = 300;
const LETTERS: u64 = 40;
/// What every VM here has beside its devices.
const GUEST: &[&str] = &["--memory", "64M", "--cpus", "2", "--rng", "--balloon"];

/// The earlier program, if there is one to test with.
fn earlier(test: &str) -> Option<PathBuf> {
    let Some(program) = std::env::var_os("WHERRY_PREVIOUS") else {
        println!("LEFT OUT {test}: WHERRY_PREVIOUS names no program of an earlier build");
        return None;
    };
    kvm(test).then(|| program.into())
}

/// The words with which it rightly refuses something.
fn refusal(what: &str) -> Option<String> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.ci/previous");
    let file = std::fs::read_to_string(file).unwrap();
    let words = file.lines().find_map(|line| line.strip_prefix("refuses ")?.strip_prefix(what));
    words.map(|words| words.trim().to_owned())
}

/// The guest of this build, whose report these tests can read, whoever runs it.
fn kernel(place: &Place) -> String {
    let path = place.path("probe");
    std::fs::write(&path, wherry_guest::PROBE_ELF).unwrap();
    path.to_str().unwrap().to_owned()
}

fn image(place: &Place) -> PathBuf {
    let path = place.path("disk");
    File::create(&path).unwrap().set_len(IMAGE).unwrap();
    path
}

/// Disk and device work.
fn works(memory: &Memory, enough: u64, what: &str) {
    memory.wait_for_requests(what);
    wait_for_more(memory, enough, what);
}

/// Has the guest verify all once more and switch off.
fn finish(memory: &Memory, holder: &Holder, image: &Path) {
    memory.finish();
    holder.await_end("whose guest has switched itself off");
    let snapshot = memory.snapshot();
    assert_eq!((snapshot.phase(), snapshot.verify_errors()), (Phase::Finished, 0), "{:?}", snapshot.failure);
    let guest = load(memory);
    assert_eq!(guest.verified, guest.received, "{guest:?}");
    let compared = memory.compare(&File::open(image).unwrap(), 1);
    assert!(compared > IMAGE / BLOCK_BYTES / 4, "only {compared} blocks were ever written");
}

#[test]
fn a_vm_is_updated_from_an_earlier_build_to_this_one_and_back_and_its_devices_work_on() {
    let test = "a_vm_is_updated_from_an_earlier_build_to_this_one_and_back_and_its_devices_work_on";
    let Some(earlier) = earlier(test) else { return };
    let place = Place::new();
    let (image, kernel) = (image(&place), kernel(&place));
    let process = Process::start(&place, "d", &["--pattern", "lines"]);
    let device = format!("vfio-user={}", process.socket.display());
    let cmdline = "data=4M rate=1M disk=32M disk_depth=80 testdma=wait testdma_vectors=3";
    let own = ["--kernel", &kernel, "--cmdline", cmdline, "--disk", image.to_str().unwrap(), "--device", &device];
    let first = place.of(&earlier).run_guest("0", &[GUEST, &own].concat(), &[]);
    let memory = Memory::of(&place, "0");
    works(&memory, LETTERS, "in the earlier build");
    let mut holder = Holder::of(first.pid());
    let this = PathBuf::from(env!("CARGO_BIN_EXE_wherry"));
    for (n, (program, may_refuse)) in
        [(&this, false), (&earlier, true), (&this, false), (&this, false)].into_iter().enumerate()
    {
        let what = format!("update {n}, to {}", program.display());
        let output = place.control("0", &["update", "--json", "--binary", program.to_str().unwrap()]);
        if let Some(words) = refusal("update").filter(|_| may_refuse) {
            let said = stderr(&output);
            assert_eq!(output.status.code(), Some(1), "{what}: {said}");
            assert!(said.contains("the new process refused the VM") && said.contains(&words), "{what}: {said}");
            assert_eq!(place.wait_for_state("0", "running")["pid"], holder.pid, "{what}");
        } else {
            let job = updated(&output, &what);
            println!("{what}: blackout {}", job["job"]["blackout"]);
            holder.await_end("which was replaced");
            holder = Holder::behind(&place, "0");
            let runs = std::fs::read_link(format!("/proc/{}/exe", holder.pid)).unwrap();
            assert_eq!(runs, program.canonicalize().unwrap(), "{what}");
        }
        works(&memory, LETTERS, &what);
    }
    finish(&memory, &holder, &image);
    let device = process.summary();
    assert_eq!((&device["faults"], &device["loads"]), (&0.into(), &0.into()), "{device}");
}

#[test]
fn a_vm_moves_from_an_earlier_build_to_this_one_and_back_with_its_devices() {
    let test = "a_vm_moves_from_an_earlier_build_to_this_one_and_back_with_its_devices";
    let Some(earlier) = earlier(test) else { return };
    let place = Place::new();
    let then = place.of(&earlier);
    let (image, kernel) = (image(&place), kernel(&place));
    let disk = image.to_str().unwrap();
    let device = |place: &Place, name: &str| {
        let process = Process::start(place, name, &["--pattern", "lines"]);
        let option = format!("vfio-user={}", process.socket.display());
        (process, option)
    };
    let (mut process, option) = device(&then, "d");
    let cmdline = "data=4M rate=1M disk=32M disk_depth=80 testdma=ring testdma_vectors=3";
    let own = ["--kernel", &kernel, "--cmdline", cmdline, "--disk", disk, "--device", &option];
    let mut here = then.run_guest("0", &[GUEST, &own].concat(), &[]);
    let mut memory = Memory::of(&place, "0");
    works(&memory, BUFFERS, "in the earlier build");
    let mut at = "0".to_owned();
    for (leg, (target, mode, may_refuse)) in [
        (&place, "precopy", false),
        (&then, "precopy", true),
        (&place, "postcopy", false),
        (&then, "postcopy", true),
        (&place, "hybrid", false),
    ]
    .into_iter()
    .enumerate()
    {
        let (what, to) = (format!("move {leg}, by {mode}"), format!("r{leg}"));
        let (next, option) = device(target, &format!("d{leg}"));
        let (there, address) = target.receive(&to, &["--disk", disk, "--device", &option]);
        let output = place.control(&at, &["migrate", "--to", &address, "--mode", mode, "--json"]);
        if let Some(words) = refusal("migration").filter(|_| may_refuse) {
            let said = stderr(&output);
            assert_eq!(output.status.code(), Some(1), "{what}: {said}");
            assert!(said.contains(&words), "{what}: {said}");
            assert_alive(&place, &at);
        } else {
            assert_eq!(output.status.code(), Some(0), "{what}: {}", stderr(&output));
            assert_eq!(here.end().code(), Some(0), "{}", here.log());
            (here, process, at, memory) = (there, next, to.clone(), Memory::of(&place, &to));
        }
        works(&memory, BUFFERS, &what);
    }
    finish(&memory, &Holder::of(here.pid()), &image);
    assert_eq!(here.end().code(), Some(0), "{}", here.log());
    assert_eq!(process.summary()["faults"], 0);
}

#[test]
fn the_process_of_a_device_is_updated_from_an_earlier_build_to_this_one_and_back() {
    let test = "the_process_of_a_device_is_updated_from_an_earlier_build_to_this_one_and_back";
    let Some(earlier) = earlier(test) else { return };
    let place = Place::new();
    let control = place.path("control");
    let control = control.to_str().unwrap();
    let process = Process::start(&place.of(&earlier), "d", &["--control", control, "--pattern", "lines"]);
    let device = format!("vfio-user={}", process.socket.display());
    let cmdline = "data=4M rate=1M testdma=wait testdma_vectors=3";
    let own = ["--memory", "64M", "--cmdline", cmdline, "--device", &device];
    let vm = place.run_guest("0", &own, &[]);
    let memory = Memory::of(&place, "0");
    wait_for_more(&memory, LETTERS, "of a device that the earlier build serves");
    let mut holder = Holder::of(process.pid());
    let this = PathBuf::from(env!("CARGO_BIN_EXE_wherry"));
    for (n, (program, may_refuse)) in
        [(&this, false), (&earlier, true), (&this, false), (&this, false)].into_iter().enumerate()
    {
        let what = format!("update {n}, to {}", program.display());
        let arguments = ["update", "--json", "--control", control, "--binary", program.to_str().unwrap()];
        let output = place.wherry(&arguments);
        if let Some(words) = refusal("device").filter(|_| may_refuse) {
            assert_eq!(output.status.code(), Some(1), "{what}: {}", stderr(&output));
            assert!(stderr(&output).contains(&words), "{what}: {}", stderr(&output));
            assert!(!holder.has_ended(), "{what}");
        } else {
            let job = updated(&output, &what);
            holder.await_end("which was replaced");
            holder = Holder::of(job["pid"].as_u64().unwrap() as u32);
        }
        wait_for_more(&memory, LETTERS, &what);
    }
    memory.finish();
    Holder::of(vm.pid()).await_end("whose guest has switched itself off");
    assert_eq!(memory.snapshot().phase(), Phase::Finished, "{:?}", memory.snapshot().failure);
    let guest = load(&memory);
    assert_eq!(guest.verified, guest.received, "{guest:?}");
    let summary = process.summary_of(holder.pid);
    assert_eq!((&summary["faults"], &summary["loads"]), (&0.into(), &0.into()), "{summary}");
}
