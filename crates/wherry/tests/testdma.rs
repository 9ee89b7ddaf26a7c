//! VMs with `wherry device testdma` and the probe guest's driver: every buffer and every interrupt is checked by the guest, where it is and
//! while it moves.
//!
//! `WHERRY_DMA_MOVES` is how often each guest moves; a small number if nothing is said.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use serde_json::Value;
use support::disk::Memory;
use support::testdma::{Process, load, wait_for_more};
use support::{Place, Vm, kvm, stderr, wait_for};
use wherry_guest::report::{FailureKind, Phase};

const KINDS: [&str; 3] = ["msix", "msi", "intx"];
/// Buffers and letters that show that the device works.
const BUFFERS: u64 = 2000;
const LETTERS: u64 = 200;

fn moves() -> usize {
    std::env::var("WHERRY_DMA_MOVES").ok().and_then(|n| n.parse().ok()).unwrap_or(2)
}

/// A device, and the option that gives it to a VM.
fn device(place: &Place, name: &str, more: &[&str]) -> (Process, String) {
    let process = Process::start(place, name, more);
    let option = format!("vfio-user={}", process.socket.display());
    (process, option)
}

fn run(place: &Place, option: &str, load: &str) -> Vm {
    let cmdline = format!("data=4M rate=1M {load}");
    place.run_guest("0", &["--memory", "64M", "--cmdline", &cmdline, "--device", option], &[])
}

/// Has the guest verify everything once more and end; what guest and device counted agrees.
fn finish(mut vm: Vm, memory: &Memory, process: Process) {
    memory.finish();
    assert_eq!(vm.end().code(), Some(0), "{}", vm.log());
    assert_eq!(memory.snapshot().phase(), Phase::Finished, "{:?}", memory.snapshot().failure);
    let guest = load(memory);
    assert_eq!(guest.verified, guest.received, "{guest:?}");
    let device = process.summary();
    assert_eq!(device["faults"], 0, "{device}");
    // The device raises one that it holds for lost again, after three seconds; the last letter may not be acknowledged yet.
    // How late an acknowledgement is depends on how busy this machine is.
    let number = |name: &str| device[name].as_u64().unwrap();
    assert!(guest.form == 1 || number("interrupts") - number("buffers") <= 1, "raised again: {device}");
    println!("guest: {guest:?}\ndevice: {device}");
}

#[test]
fn every_kind_of_interrupts_works_in_both_forms_masked_now_and_then_or_not() {
    if !kvm("every_kind_of_interrupts_works_in_both_forms_masked_now_and_then_or_not") {
        return;
    }
    for kind in KINDS {
        for (load, enough) in [
            (format!("testdma=ring testdma_interrupt={kind} testdma_mask=on testdma_vectors=4"), BUFFERS),
            (format!("testdma=ring testdma_interrupt={kind} testdma_buffer=10000"), BUFFERS),
            (format!("testdma=wait testdma_interrupt={kind} testdma_vectors=3"), LETTERS),
            (format!("testdma=wait testdma_interrupt={kind} testdma_mask=on"), LETTERS / 4),
        ] {
            let place = Place::new();
            let (process, option) = device(&place, "d", &["--pattern", "lines"]);
            let vm = run(&place, &option, &load);
            let memory = Memory::of(&place, "0");
            let seen = wait_for_more(&memory, enough, &load);
            assert!(seen.interrupts > 0 && (seen.toggles > 1) == load.contains("mask=on"), "{load}: {seen:?}");
            finish(vm, &memory, process);
        }
    }
}

/// Moves a guest with a busy device, and checks all of it at the end.
fn moves_with(guest: &str, more: &[&str], enough: u64) {
    let place = Place::new();
    let (mut process, option) = device(&place, "d0", more);
    let mut here = run(&place, &option, guest);
    let mut memory = Memory::of(&place, "0");
    wait_for_more(&memory, enough, "before the first move");
    for leg in 0..moves() {
        // A hybrid that converges is a precopy; so the third comes with more moves only.
        let mode = ["hybrid", "postcopy", "precopy"][leg % 3];
        let (from, to) = (leg.to_string(), (leg + 1).to_string());
        let (next, option) = device(&place, &format!("d{to}"), more);
        let (there, address) = place.receive(&to, &["--device", &option]);
        let output = place.control(&from, &["migrate", "--to", &address, "--json", "--mode", mode]);
        assert_eq!(output.status.code(), Some(0), "{mode}: {}\n{}", stderr(&output), there.log());
        let job: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(here.end().code(), Some(0), "{}", here.log());
        (memory, here) = (Memory::of(&place, &to), there);
        let now = wait_for_more(&memory, enough, &format!("after a move by {mode}"));
        // The source is the first to know.
        wait_for("the destination to be done", || (place.status(&to)?["job"]["phase"] == "done").then_some(()));
        println!("{guest}: {mode}: blackout {}, longest wait {} us", job["blackout"], now.longest_ns / 1000);
        process = next;
    }
    finish(here, &memory, process);
}

#[test]
fn a_ring_at_full_rate_moves_and_no_buffer_is_lost_doubled_or_wrong() {
    if !kvm("a_ring_at_full_rate_moves_and_no_buffer_is_lost_doubled_or_wrong") {
        return;
    }
    for (kind, more) in [
        ("msix", &["--pattern", "lines"][..]),
        ("msi", &["--pattern", "reverse", "--state-size", "2M", "--pre-copy"]),
        ("intx", &["--rate", "100M", "--state-size", "1M"]),
    ] {
        moves_with(&format!("testdma=ring testdma_interrupt={kind} testdma_vectors=2"), more, BUFFERS);
    }
}

/// What a move says of a device.
fn of_device<'a>(job: &'a Value, process: &Process) -> &'a Value {
    let name = format!("vfio-user:{}", process.socket.display());
    job["devices"].as_array().unwrap().iter().find(|device| device["name"] == name.as_str()).unwrap()
}

#[test]
fn several_devices_move_side_by_side_with_what_they_can_give_before_the_stop_and_each_says_what_it_took() {
    if !kvm("several_devices_move_side_by_side_with_what_they_can_give_before_the_stop_and_each_says_what_it_took") {
        return;
    }
    // The guest drives the first; a third takes its time at either end.
    let kinds: [&[&str]; 3] = [
        &["--state-size", "3M"],
        &["--state-size", "24M", "--pre-copy"],
        &["--state-size", "1M", "--save-time", "300", "--load-time", "250"],
    ];
    for mode in ["hybrid", "postcopy"] {
        let place = Place::new();
        let devices = |side: &str| {
            let one = |(n, more): (usize, &&[&str])| device(&place, &format!("{side}{n}"), more);
            kinds.iter().enumerate().map(one).unzip::<_, _, Vec<_>, Vec<_>>()
        };
        let options = |all: &[String]| all.iter().flat_map(|o| ["--device".to_owned(), o.clone()]).collect::<Vec<_>>();
        let (here, given) = devices("a");
        let given = options(&given);
        let cmdline = "data=4M rate=1M testdma=ring";
        let mut arguments = vec!["--memory", "64M", "--cmdline", cmdline];
        arguments.extend(given.iter().map(String::as_str));
        let mut vm = place.run_guest("0", &arguments, &[]);
        let memory = Memory::of(&place, "0");
        wait_for_more(&memory, BUFFERS, "before the move");
        let (mut there, taken) = devices("b");
        let taken = options(&taken);
        let (next, address) = place.receive("1", &taken.iter().map(String::as_str).collect::<Vec<_>>());
        let output = place.control("0", &["migrate", "--to", &address, "--json", "--mode", mode]);
        assert_eq!(output.status.code(), Some(0), "{mode}: {}\n{}", stderr(&output), next.log());
        assert_eq!(vm.end().code(), Some(0), "{}", vm.log());
        let job: Value = serde_json::from_slice(&output.stdout).unwrap();
        let number = |n: usize, what: &str| of_device(&job, &here[n])[what].as_u64().unwrap();
        let early = if mode == "hybrid" { 24 << 20 } else { 0 };
        assert_eq!((number(0, "early_bytes"), number(2, "early_bytes")), (0, 0), "{}", job["devices"]);
        assert!(
            number(1, "early_bytes") >= early && number(1, "early_bytes") < early + (1 << 20),
            "{}",
            job["devices"]
        );
        assert!((0..3).all(|n| number(n, "bytes") > [3 << 20, 24 << 20, 1 << 20][n]), "{}", job["devices"]);
        assert!(number(2, "stop_us") >= 300_000 && number(2, "load_us") >= 250_000, "{}", job["devices"]);
        println!("{mode}: blackout {}, devices {}", job["blackout"], job["devices"]);
        let memory = Memory::of(&place, "1");
        wait_for_more(&memory, BUFFERS, "after the move");
        finish(next, &memory, there.remove(0));
        let loads: Vec<_> = there.into_iter().map(|process| process.summary()["loads"].clone()).collect();
        assert_eq!(loads, [1, 1]);
    }
}

#[test]
fn letters_move_and_no_interrupt_is_lost_also_while_vectors_are_masked() {
    if !kvm("letters_move_and_no_interrupt_is_lost_also_while_vectors_are_masked") {
        return;
    }
    for kind in KINDS {
        for mask in ["off", "on"] {
            let guest = format!("testdma=wait testdma_interrupt={kind} testdma_mask={mask}");
            moves_with(&guest, &[], LETTERS / 4);
        }
    }
}

#[test]
fn what_is_lost_or_wrong_is_seen_by_the_guest() {
    if !kvm("what_is_lost_or_wrong_is_seen_by_the_guest") {
        return;
    }
    for (fault, guest, hint) in [
        ("lost-interrupt=5", "testdma=wait", "an interrupt was lost: number 5 is there"),
        ("lost-completion=7", "testdma=ring", "the completion of buffer 7"),
    ] {
        let place = Place::new();
        let (_process, option) = device(&place, "d", &["--fault", fault]);
        let cmdline = format!("data=0 rate=0 {guest}");
        let arguments = ["run", "--name", "t", "--memory", "64M", "--cmdline", &cmdline, "--device", &option];
        let _vm = place.start("0", &arguments);
        let memory = Memory::of(&place, "0");
        let failure = wait_for("the guest to notice", || memory.try_snapshot()?.failure);
        assert_eq!(failure.kind, Some(FailureKind::Testdma));
        assert!(failure.message.contains(hint), "{failure:?}");
        // It goes on.
        let so_far = memory.snapshot().testdma.unwrap().received;
        wait_for("more to come", || (memory.snapshot().testdma.unwrap().received > so_far + 100).then_some(()));
    }
}
