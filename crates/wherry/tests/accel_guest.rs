//! VMs with `wherry device accel` and the probe guest's driver: every result is verified and every job counted by the guest, where it is and
//! while it moves between device processes with more, fewer and other workers.
//!
//! `WHERRY_ACCEL_GUEST_MOVES` is how often each guest moves; a small number if nothing is said.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use serde_json::Value;
use support::disk::Memory;
use support::update::{Holder, count, repetitions, updated};
use support::{Place, Vm, kvm, stderr, wait_for};
use wherry_accel::abi;
use wherry_guest::accel;
use wherry_guest::report::{FailureKind, Phase};
use wherry_guest::snapshot::AccelSnapshot;

/// Jobs that show that the device works.
const ENOUGH: u64 = 400;
/// Workers of the device processes, by turns: fewer than engines, one, more.
const WORKERS: [&str; 4] = ["3", "1", "7", "2"];
/// Of every class, of some more than one.
const ENGINES: &str = "copy=3,compress=2,crypto=2,compute=2,code=1";

fn moves() -> usize {
    std::env::var("WHERRY_ACCEL_GUEST_MOVES").ok().and_then(|n| n.parse().ok()).unwrap_or(3)
}

/// A device process.
struct Process {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Process {
    fn start(place: &Place, number: usize, more: &[&str]) -> Self {
        let (socket, log) = (place.path(&format!("d{number}.sock")), place.path(&format!("d{number}.log")));
        let mut command = place.command(&["device", "accel", "--workers", WORKERS[number % WORKERS.len()], "--socket"]);
        command.arg(&socket).args(more);
        if !more.contains(&"--engines") {
            command.args(["--engines", ENGINES]);
        }
        let child = command.stdout(Stdio::null()).stderr(File::create(&log).unwrap()).spawn().unwrap();
        let mut this = Self { child, socket, log };
        wait_for("the device's socket", || {
            assert!(this.child.try_wait().unwrap().is_none(), "the device has ended: {}", this.log());
            std::os::unix::net::UnixStream::connect(&this.socket).is_ok().then_some(())
        });
        this
    }

    fn option(&self) -> String {
        format!("vfio-user={}", self.socket.display())
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Has it end as it is asked to, with nothing to complain of.
    fn end(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = wait_for("the end of the device", || self.child.try_wait().unwrap());
        assert_eq!((status.code(), self.log().as_str()), (Some(0), ""));
        assert!(!self.socket.exists(), "the socket is removed");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of {} ---\n{}", self.socket.display(), self.log());
        }
    }
}

fn run(place: &Place, process: &Process, load: &str) -> Vm {
    let cmdline = format!("data=4M rate=1M {load}");
    place.run_guest("0", &["--memory", "96M", "--cmdline", &cmdline, "--device", &process.option()], &[])
}

/// What the guest says of the device; nothing was wrong so far.
fn load(memory: &Memory) -> AccelSnapshot {
    let snapshot = memory.snapshot();
    assert!(snapshot.failure.is_none(), "{:?}", snapshot.failure);
    let load = snapshot.accel.unwrap();
    assert_eq!((load.errors, load.lost, load.miscounted), (0, 0, 0), "{load:?}");
    load
}

/// Waits until so many more have come back, of every class.
fn wait_for_more(memory: &Memory, more: u64, what: &str) -> AccelSnapshot {
    let before = load(memory);
    wait_for(&format!("{more} jobs {what}"), || {
        let now = load(memory);
        let every = now.by_class.iter().zip(before.by_class).all(|(now, before)| *now > before);
        (now.jobs >= before.jobs + more && every).then_some(now)
    })
}

/// Has the guest verify everything once more and end. Each job came back once, and was right.
fn finished(mut vm: Vm, memory: &Memory) -> AccelSnapshot {
    memory.finish();
    assert_eq!(vm.end().code(), Some(0), "{}", vm.log());
    let snapshot = memory.snapshot();
    assert_eq!(snapshot.phase(), Phase::Finished, "{:?}", snapshot.failure);
    let guest = load(memory);
    assert_eq!((guest.verified, guest.returned), (guest.jobs, guest.submitted), "{guest:?}");
    assert_eq!(guest.by_class.iter().sum::<u64>(), guest.jobs);
    guest
}

fn finish(vm: Vm, memory: &Memory, process: Process) -> AccelSnapshot {
    let guest = finished(vm, memory);
    assert_eq!(process.log(), "");
    process.end();
    guest
}

#[test]
fn the_drivers_numbers_are_those_of_the_device() {
    use abi::{register, slot_register};
    let numbers = [
        (accel::register::MAGIC, register::MAGIC),
        (accel::register::VERSION, register::VERSION),
        (accel::register::ENGINES, register::ENGINES),
        (accel::register::COMMAND, register::COMMAND),
        (accel::register::RESULT, register::RESULT),
        (accel::register::CREATED, register::CREATED),
        (accel::register::ENGINE_TABLE, register::ENGINE_TABLE),
        (accel::register::BELLS, register::BELLS),
        (accel::register::BELL_BYTES, register::BELL_BYTES),
        (accel::register::CONTEXTS, register::CONTEXTS_BASE),
        (accel::register::CONTEXT_BYTES, register::CONTEXT_BYTES),
        (accel::register::SLOT_BYTES, slot_register::BYTES),
        (accel::register::BASE, slot_register::BASE),
        (accel::register::ENTRIES, slot_register::ENTRIES),
        (accel::register::TAIL, slot_register::TAIL),
        (accel::register::STATUS, slot_register::STATUS),
        (accel::register::TAIL_ADDRESS, slot_register::TAIL_ADDRESS),
        (accel::command::CREATE.into(), abi::command::CREATE.into()),
        (accel::command::SET_PARAM.into(), abi::command::SET_PARAM.into()),
        (accel::command::ENGINES, abi::param::ENGINES),
        (accel::command::CLONE.into(), abi::extension::CLONE.into()),
        (accel::command::CLONE_ENGINES.into(), abi::clone_flag::ENGINES.into()),
        (accel::MAGIC.into(), abi::MAGIC.into()),
        (accel::VERSION.into(), abi::VERSION.into()),
        (accel::BELLS.into(), abi::BELLS.into()),
        (accel::MAX_ENGINES as u64, abi::MAX_ENGINES as u64),
        (accel::CLASSES as u64, abi::class::NAMES.len() as u64),
        (accel::flag::COMPLETION.into(), abi::flag::COMPLETION.into()),
        (accel::flag::INTERRUPT.into(), abi::flag::INTERRUPT.into()),
        (accel::VENDOR.into(), wherry_accel::function::ID.0.into()),
        (accel::DEVICE.into(), wherry_accel::function::ID.1.into()),
    ];
    for (number, (driver, device)) in numbers.iter().enumerate() {
        assert_eq!(driver, device, "number {number}");
    }
    use abi::opcode;
    let operations = [
        (accel::opcode::BATCH, opcode::BATCH),
        (accel::opcode::ADD, opcode::ADD),
        (accel::opcode::MOVE, opcode::MOVE),
        (accel::opcode::FILL, opcode::FILL),
        (accel::opcode::COPY_CRC, opcode::COPY_CRC),
        (accel::opcode::DUAL_CAST, opcode::DUAL_CAST),
        (accel::opcode::SHA256, opcode::SHA256),
        (accel::opcode::RUN, opcode::RUN),
    ];
    assert!(operations.iter().all(|(driver, device)| driver == device), "{operations:x?}");
}

#[test]
fn the_guest_uses_every_class_in_both_forms_and_tells_of_work_in_every_way() {
    if !kvm("the_guest_uses_every_class_in_both_forms_and_tells_of_work_in_every_way") {
        return;
    }
    for (guest, enough) in [
        ("accel=full accel_bell=register accel_depth=16", ENOUGH),
        ("accel=full accel_bell=event accel_bytes=64K accel_depth=4", ENOUGH / 4),
        ("accel=full accel_bell=poll", ENOUGH),
        ("accel=wait accel_bell=register", ENOUGH / 4),
        ("accel=wait accel_bell=event", ENOUGH / 4),
        ("accel=wait accel_bell=poll accel_bytes=512", ENOUGH / 4),
    ] {
        let place = Place::new();
        let process = Process::start(&place, 0, &[]);
        let vm = run(&place, &process, guest);
        let memory = Memory::of(&place, "0");
        let seen = wait_for_more(&memory, enough, guest);
        assert_eq!((seen.rings, seen.engines), (10, 10), "{seen:?}");
        let end = finish(vm, &memory, process);
        assert!(end.rechecked > 0 && end.rung > 0 && end.rung <= end.submitted, "{end:?}");
        println!("{guest}: {end:?}");
    }
}

/// A key of a fleet, and options of a device that has it and a key by handle 5.
fn keys(place: &Place) -> (String, String) {
    let file = |name: &str, content: &[u8]| {
        let mut options = File::options();
        let mut file = options.write(true).create_new(true).mode(0o600).open(place.path(name)).unwrap();
        file.write_all(content).unwrap();
        place.path(name).display().to_string()
    };
    let (fleet, key) = (file("fleet", &[1; 32]), file("key", &[2; 32]));
    let wrapped = place.path("wrapped").display().to_string();
    let arguments =
        ["accel", "wrap-key", "--fleet-key", &fleet, "--handle", "5", "--kind", "aes-256-gcm", "--key", &key];
    let output = place.wherry(&[&arguments[..], &["--output", &wrapped]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    (fleet, format!("5=aes-256-gcm:{wrapped}"))
}

/// Moves a guest that uses the device, and checks all of it at the end. The key comes to all devices but the first with its state.
fn moves_with(guest: &str, enough: u64) {
    let place = Place::new();
    let (fleet, key) = keys(&place);
    let mut process = Process::start(&place, 0, &["--fleet-key", &fleet, "--key", &key]);
    let mut here = run(&place, &process, guest);
    let mut memory = Memory::of(&place, "0");
    wait_for_more(&memory, enough, "before the first move");
    for leg in 0..moves() {
        let mode = ["postcopy", "precopy", "hybrid"][leg % 3];
        let (from, to) = (leg.to_string(), (leg + 1).to_string());
        let next = Process::start(&place, leg + 1, &["--fleet-key", &fleet]);
        let (there, address) = place.receive(&to, &["--device", &next.option()]);
        let output = place.control(&from, &["migrate", "--to", &address, "--json", "--mode", mode]);
        let said = || format!("{}\n{}\n{}\n{}", stderr(&output), there.log(), process.log(), next.log());
        assert_eq!(output.status.code(), Some(0), "{mode}: {}", said());
        let job: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(here.end().code(), Some(0), "{}", here.log());
        (memory, here) = (Memory::of(&place, &to), there);
        let now = wait_for_more(&memory, enough, &format!("after a move by {mode}"));
        // The source is the first to know.
        wait_for("the destination to be done", || (place.status(&to)?["job"]["phase"] == "done").then_some(()));
        println!("{guest}: {mode}: blackout {}, longest wait {} us", job["blackout"], now.longest_ns / 1000);
        process.end();
        process = next;
    }
    println!("{guest}: {:?}", finish(here, &memory, process));
}

#[test]
fn a_guest_that_keeps_every_ring_full_moves_and_every_job_is_done_once_and_right() {
    if !kvm("a_guest_that_keeps_every_ring_full_moves_and_every_job_is_done_once_and_right") {
        return;
    }
    for bell in ["event", "poll", "register"] {
        moves_with(&format!("accel=full accel_key=5 accel_bell={bell}"), ENOUGH);
    }
}

#[test]
fn a_guest_that_waits_for_each_job_moves_and_no_completion_is_lost() {
    if !kvm("a_guest_that_waits_for_each_job_moves_and_no_completion_is_lost") {
        return;
    }
    for bell in ["event", "poll"] {
        moves_with(&format!("accel=wait accel_key=5 accel_bell={bell}"), ENOUGH / 8);
    }
}

#[test]
fn a_device_process_is_replaced_under_its_guest_and_every_job_is_done_once_and_right() {
    if !kvm("a_device_process_is_replaced_under_its_guest_and_every_job_is_done_once_and_right") {
        return;
    }
    for (guest, enough) in [
        ("accel=full accel_key=5 accel_bell=event", ENOUGH / 2),
        ("accel=full accel_key=5 accel_bell=poll", ENOUGH / 2),
        ("accel=wait accel_key=5 accel_bell=event", ENOUGH / 8),
    ] {
        let place = Place::new();
        let (fleet, key) = keys(&place);
        let control = place.path("control").display().to_string();
        let mut process = Process::start(&place, 0, &["--fleet-key", &fleet, "--key", &key, "--control", &control]);
        let vm = run(&place, &process, guest);
        let memory = Memory::of(&place, "0");
        wait_for_more(&memory, enough, "before the first update");
        let mut now = Holder::of(process.child.id());
        let mut figures = Vec::new();
        for n in 0..repetitions(4) {
            let job = updated(&place.wherry(&["update", "--json", "--control", &control]), &format!("{guest}: {n}"));
            let next = Holder::of(job["pid"].as_u64().unwrap() as u32);
            now.await_end("which was replaced");
            now = next;
            let seen = wait_for_more(&memory, enough, &format!("after update {n}"));
            println!("{guest}: blackout {}, longest wait {} us", job["job"]["blackout"], seen.longest_ns / 1000);
            figures.push((count(now.pid, "fd"), count(now.pid, "task")));
        }
        let first = figures[0];
        assert!(figures.iter().all(|now| now.0 <= first.0 + 2 && now.1 <= first.1 + 2), "{figures:?}");
        // A key that cannot be read any more keeps the process where it is.
        std::fs::remove_file(&fleet).unwrap();
        let output = place.wherry(&["update", "--control", &control]);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("refused") && stderr(&output).contains(&fleet), "{}", stderr(&output));
        wait_for_more(&memory, enough, "after an update that was refused");
        println!("{guest}: {:?}, {figures:?}", finished(vm, &memory));
        let pid = rustix::process::Pid::from_raw(now.pid as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        now.await_end("that was asked to end");
        assert!(process.child.wait().unwrap().success() && !process.socket.exists());
    }
}

/// What the guest has noticed, when it has.
fn noticed(memory: &Memory, what: &str) -> String {
    let failure = wait_for(what, || memory.try_snapshot()?.failure);
    assert_eq!(failure.kind, Some(FailureKind::Accel), "{failure:?}");
    failure.message
}

#[test]
fn a_result_that_changes_and_a_job_that_is_done_again_are_seen_by_the_guest() {
    if !kvm("a_result_that_changes_and_a_job_that_is_done_again_are_seen_by_the_guest") {
        return;
    }
    // In a place: the counter, and its source, which every job of the first ring leaves as it is.
    for (at, words) in [(0x140, &["its counter"][..]), (0x1000, &["its source", "its CRC"])] {
        let place = Place::new();
        let process = Process::start(&place, 0, &[]);
        let _vm = run(&place, &process, "accel=wait");
        let memory = Memory::of(&place, "0");
        let before = wait_for_more(&memory, 10, "before the damage");
        // A job that is begun in that moment writes over it.
        let mut next = 0;
        wait_for("the guest to notice", || {
            let jobs = memory.snapshot().accel.unwrap().jobs;
            if jobs >= next && memory.snapshot().failure.is_none() {
                memory.write(before.places_gpa + at, &[0xa5; 4]);
                next = jobs + 60;
            }
            memory.snapshot().failure
        });
        let message = noticed(&memory, "the guest to say so");
        assert!(message.contains("of ring 0") && words.iter().any(|words| message.contains(words)), "{message}");
        // It goes on.
        wait_for("more to come", || (memory.snapshot().accel.unwrap().jobs > before.jobs + 20).then_some(()));
        let seen = memory.snapshot().accel.unwrap();
        assert_eq!((seen.errors, seen.miscounted), (1, u64::from(at == 0x140)), "{seen:?}");
    }
}

#[test]
fn a_device_process_that_is_killed_is_a_device_that_is_gone_and_its_vm_lives() {
    if !kvm("a_device_process_that_is_killed_is_a_device_that_is_gone_and_its_vm_lives") {
        return;
    }
    for guest in ["accel=full", "accel=wait"] {
        let place = Place::new();
        let mut process = Process::start(&place, 0, &[]);
        let mut vm = run(&place, &process, guest);
        let memory = Memory::of(&place, "0");
        wait_for_more(&memory, 20, "before the end of the device");
        process.child.kill().unwrap();
        let message = noticed(&memory, "the guest to notice");
        assert!(message.contains("it has gone"), "{message}");
        support::assert_alive(&place, "0");
        // All else was right, and is verified at the end.
        memory.finish();
        assert!(vm.end().success(), "{}", vm.log());
        let end = memory.snapshot();
        assert_eq!((end.verify_errors(), end.accel.unwrap().errors), (0, 1), "{end:?}");
    }
}

#[test]
fn a_move_that_the_other_device_cannot_take_leaves_the_guest_and_its_jobs_where_they_were() {
    if !kvm("a_move_that_the_other_device_cannot_take_leaves_the_guest_and_its_jobs_where_they_were") {
        return;
    }
    for guest in ["accel=full accel_key=5 accel_bell=poll", "accel=wait accel_key=5 accel_bell=event"] {
        let place = Place::new();
        let (fleet, key) = keys(&place);
        let process = Process::start(&place, 0, &["--fleet-key", &fleet, "--key", &key]);
        let mut vm = run(&place, &process, guest);
        let memory = Memory::of(&place, "0");
        wait_for_more(&memory, ENOUGH / 8, "before the first try");
        let mut number = 1;
        // One engine less; no key of the fleet.
        let engines = "copy=3,compress=2,crypto=2,compute=1,code=1";
        for (more, said, logged) in
            [(&["--fleet-key", &fleet, "--engines", engines][..], "subsystem", ""), (&[], "it refused", "no fleet key")]
        {
            for mode in ["precopy", "postcopy", "hybrid"] {
                let other = Process::start(&place, number, more);
                let (_there, address) = place.receive(&number.to_string(), &["--device", &other.option()]);
                let output = place.control("0", &["migrate", "--to", &address, "--mode", mode]);
                assert_eq!(output.status.code(), Some(1), "{mode}: {}", stderr(&output));
                let error = stderr(&output);
                assert!(error.contains(&other.socket.display().to_string()) && error.contains(said), "{error}");
                // What cannot be is refused before anything moves, as far as it can be told.
                assert_eq!(error.contains("phase switchover"), !logged.is_empty(), "{error}");
                assert!(other.log().contains(logged) && other.log().is_empty() == logged.is_empty(), "{}", other.log());
                let now = wait_for_more(&memory, ENOUGH / 8, &format!("after a {mode} that failed"));
                println!("{guest}: {mode}: longest wait {} us: {}", now.longest_ns / 1000, stderr(&output).trim());
                number += 1;
            }
        }
        // And then it moves.
        let next = Process::start(&place, number, &["--fleet-key", &fleet]);
        let (there, address) = place.receive("last", &["--device", &next.option()]);
        let output = place.control("0", &["migrate", "--to", &address, "--mode", "hybrid"]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert_eq!(vm.end().code(), Some(0), "{}", vm.log());
        let memory = Memory::of(&place, "last");
        wait_for_more(&memory, ENOUGH / 8, "after the move");
        wait_for("the destination to be done", || (place.status("last")?["job"]["phase"] == "done").then_some(()));
        finish(there, &memory, next);
    }
}
