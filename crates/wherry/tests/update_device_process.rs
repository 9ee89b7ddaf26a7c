//! Live update of the process of a device, under whoever uses it: its client stays connected, and no interrupt and no buffer is lost
//! or comes twice.
//!
//! `WHERRY_UPDATES` is how often each device is updated; a small number if nothing is said.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::path::PathBuf;
use std::process::{Output, Stdio};

use serde_json::Value;
use support::disk::Memory;
use support::testdma::{Driver, Process, load, memory, wait_for_more};
use support::update::{Holder, count, own_memory, points, repetitions, updated};
use support::{Place, kvm, stderr, wait_for};
use wherry_guest::report::Phase;
use wherry_guest::testdma::{Form, Interrupt};
use wherry_migration::testpoint::Point;
use wherry_vfio_user::State;

const BUFFERS: u64 = 300;
const LETTERS: u64 = 40;

/// A device, and whoever serves it.
struct Served<'a> {
    place: &'a Place,
    first: Process,
    control: PathBuf,
    now: Holder,
}

impl<'a> Served<'a> {
    fn start(place: &'a Place, name: &str, more: &[&str], environment: &[(&str, &str)]) -> Self {
        let control = place.path(&format!("{name}.control"));
        let arguments = [&["--control", control.to_str().unwrap()], more].concat();
        let first = Process::start_with(place, name, &arguments, environment);
        let now = Holder::of(first.pid());
        Self { place, first, control, now }
    }

    fn option(&self) -> String {
        format!("vfio-user={}", self.first.socket.display())
    }

    fn ask(&self, more: &[&str]) -> Output {
        let arguments = ["update", "--json", "--control", self.control.to_str().unwrap()];
        self.place.command(&[&arguments[..], more].concat()).output().unwrap()
    }

    /// Has another process take its place.
    fn update(&mut self, what: &str) -> Value {
        let job = updated(&self.ask(&[]), what);
        let next = Holder::of(job["pid"].as_u64().unwrap() as u32);
        assert_ne!(next.pid, self.now.pid);
        self.now.await_end(what);
        self.now = next;
        job
    }

    /// Descriptors and threads.
    fn figures(&self) -> (usize, usize) {
        (count(self.now.pid, "fd"), count(self.now.pid, "task"))
    }

    fn finish(self) -> Value {
        let summary = self.first.summary_of(self.now.pid);
        assert!(!self.control.exists(), "the control socket is removed");
        // It was never asked for its state, nor did an access fail.
        assert_eq!((&summary["faults"], &summary["loads"]), (&Value::from(0), &Value::from(0)), "{summary}");
        summary
    }
}

fn finish_guest(memory: &Memory, holder: &Holder) {
    memory.finish();
    holder.await_end("whose guest has switched itself off");
    assert_eq!(memory.snapshot().phase(), Phase::Finished, "{:?}", memory.snapshot().failure);
    let guest = load(memory);
    assert_eq!(guest.verified, guest.received, "{guest:?}");
}

#[test]
fn a_device_process_is_replaced_again_and_again_under_a_guest_that_waits_for_every_interrupt() {
    if !kvm("a_device_process_is_replaced_again_and_again_under_a_guest_that_waits_for_every_interrupt") {
        return;
    }
    for (guest, enough) in [
        ("testdma=ring testdma_interrupt=msix testdma_vectors=4 testdma_mask=on", BUFFERS),
        ("testdma=ring testdma_interrupt=intx", BUFFERS),
        ("testdma=wait testdma_interrupt=msix testdma_vectors=3", LETTERS),
        ("testdma=wait testdma_interrupt=msi testdma_mask=on", LETTERS / 4),
        ("testdma=wait testdma_interrupt=intx testdma_mask=on", LETTERS / 4),
    ] {
        let place = Place::new();
        let mut device = Served::start(&place, "d", &["--pattern", "lines"], &[]);
        let cmdline = format!("data=4M rate=1M {guest}");
        let arguments = ["--memory", "64M", "--cmdline", &cmdline, "--device", &device.option()];
        let vm = place.run_guest("0", &arguments, &[]);
        let memory = Memory::of(&place, "0");
        wait_for_more(&memory, enough, "before the first update");
        let mut figures = Vec::new();
        for n in 0..repetitions(5) {
            let job = device.update(&format!("{guest}: update {n}"));
            let now = wait_for_more(&memory, enough, &format!("after update {n}"));
            println!("{guest}: blackout {}, longest wait {} us", job["job"]["blackout"], now.longest_ns / 1000);
            figures.push((device.figures(), own_memory(device.now.pid)));
        }
        let ((descriptors, threads), own) = figures[0];
        let grown = |((fds, tasks), rss): &((usize, usize), u64)| {
            *fds > descriptors + 2 || *tasks > threads + 2 || *rss > own + 4096
        };
        assert!(!figures.iter().any(grown), "{figures:?}");
        let holder = Holder::of(vm.pid());
        finish_guest(&memory, &holder);
        println!("{guest}: {figures:?} {}", device.finish());
    }
}

#[test]
fn the_process_of_the_device_and_that_of_the_vm_are_replaced_in_turn() {
    if !kvm("the_process_of_the_device_and_that_of_the_vm_are_replaced_in_turn") {
        return;
    }
    let place = Place::new();
    let mut device = Served::start(&place, "d", &[], &[]);
    let cmdline = "data=4M rate=1M testdma=wait testdma_vectors=2";
    let mut first = place.run_guest("0", &["--memory", "64M", "--cmdline", cmdline, "--device", &device.option()], &[]);
    let memory = Memory::of(&place, "0");
    let mut holder = Holder::of(first.pid());
    for n in 0..repetitions(3) {
        wait_for_more(&memory, LETTERS, "before the device is updated");
        device.update(&format!("device, update {n}"));
        wait_for_more(&memory, LETTERS, "before the VM is updated");
        updated(&place.control("0", &["update", "--json"]), &format!("VM, update {n}"));
        holder.await_end("which was replaced");
        holder = Holder::behind(&place, "0");
    }
    assert_eq!(first.end().code(), Some(0), "{}", first.log());
    wait_for_more(&memory, LETTERS, "in the end");
    finish_guest(&memory, &holder);
    device.finish();
}

/// A driver that is no VM, with a device that works for it.
fn driver(device: &Served<'_>, kind: Interrupt) -> Driver {
    let mut driver = Driver::attach(&device.first, memory(), kind);
    // Whoever was there before may have left it running.
    driver.client.reset().unwrap();
    driver.lengths = vec![64, 4096, 24_000];
    driver.begin(Form::Ring);
    driver.receive(100);
    driver
}

/// Goes on by interrupts alone, and checks every buffer.
fn goes_on(driver: &mut Driver) {
    driver.receive(driver.taken + 100);
}

#[test]
fn a_new_process_that_dies_at_any_step_leaves_the_device_to_the_old_one() {
    let before = |point: &Point| !matches!(point, Point::NewRuns | Point::NewStarted);
    for point in points("new-").filter(before) {
        let place = Place::new();
        let dir = place.path("");
        let environment = [("WHERRY_TEST_PAUSE_AT", point.name()), ("WHERRY_TEST_PAUSE_DIR", dir.to_str().unwrap())];
        let mut device = Served::start(&place, "d", &[], &environment);
        let mut driver = driver(&device, Interrupt::Msix);
        let (update, new) = held(&device, point);
        new.kill();
        let output = update.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{point}");
        let said = stderr(&output);
        assert!(said.contains("served as before") && said.contains("signal: 9"), "{point}: {said}");
        assert!(!device.now.has_ended());
        goes_on(&mut driver);
        std::fs::write(place.path(&format!("{point}.go")), "").unwrap();
        device.update(&format!("after {point}"));
        goes_on(&mut driver);
        drop(driver);
        device.finish();
    }
}

/// An update with a process held at a point: the command that waits for it, and the process that is there.
fn held(device: &Served<'_>, point: Point) -> (std::process::Child, Holder) {
    let mut command = device.place.command(&["update", "--control", device.control.to_str().unwrap()]);
    let update = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let file = device.place.path(point.name());
    let pid = wait_for(&format!("a process to come to {point}"), || {
        std::fs::read_to_string(&file).ok().and_then(|text| text.parse().ok())
    });
    (update, Holder::of(pid))
}

#[test]
fn an_old_process_that_dies_when_all_was_passed_leaves_the_device_to_the_new_one() {
    for point in [Point::OldOffered, Point::OldReplaced] {
        let place = Place::new();
        let dir = place.path("");
        let environment = [("WHERRY_TEST_PAUSE_AT", point.name()), ("WHERRY_TEST_PAUSE_DIR", dir.to_str().unwrap())];
        let mut device = Served::start(&place, "d", &[], &environment);
        let mut driver = driver(&device, Interrupt::Msi);
        let (mut update, old) = held(&device, point);
        assert_eq!(old.pid, device.now.pid);
        old.kill();
        old.await_end("which was killed");
        assert_eq!(update.wait().unwrap().code(), Some(1), "nobody can say what came of it");
        goes_on(&mut driver);
        // Nobody has told which process it is now, but the control socket leads to it.
        std::fs::write(place.path(&format!("{point}.go")), "").unwrap();
        let job = updated(&device.ask(&[]), &format!("after {point}"));
        device.now = Holder::of(job["pid"].as_u64().unwrap() as u32);
        goes_on(&mut driver);
        drop(driver);
        device.now.kill();
    }
}

#[test]
fn what_cannot_go_on_is_named_and_the_device_is_served_as_before() {
    let place = Place::new();
    let mut device = Served::start(&place, "d", &["--pre-copy"], &[]);
    let script = place.path("script");
    std::fs::write(&script, "#!/bin/sh\necho hello >&0\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut driver = driver(&device, Interrupt::Intx);
    let refused = |device: &Served<'_>, more: &[&str], words: &[&str]| {
        let output = device.ask(more);
        assert_eq!(output.status.code(), Some(1), "{more:?}");
        let said = stderr(&output);
        assert!(words.iter().all(|word| said.contains(word)), "{more:?}: {said}");
    };
    refused(&device, &["--binary", "/nonexistent"], &["/nonexistent", "served as before"]);
    refused(&device, &["--binary", "/bin/false"], &["served as before", "ended with"]);
    refused(&device, &["--binary", script.to_str().unwrap()], &["served as before"]);
    goes_on(&mut driver);
    driver.client.set_state(State::PreCopy).unwrap();
    refused(&device, &[], &["in the middle of a migration", "PreCopy"]);
    driver.client.set_state(State::Running).unwrap();
    device.update("when it runs again");
    goes_on(&mut driver);
    drop(driver);
    device.finish();
    let output = place.command(&["update", "--control", place.path("none").to_str().unwrap()]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("is this its --control?"), "{}", stderr(&output));
}

#[test]
fn a_log_goes_over_and_so_does_a_device_without_a_client() {
    let place = Place::new();
    let mut device = Served::start(&place, "d", &[], &[]);
    device.update("without a client");
    let mut driver = driver(&device, Interrupt::Msix);
    driver.client.start_logging(support::testdma::PAGE, &[(support::testdma::BASE, support::testdma::BYTES)]).unwrap();
    goes_on(&mut driver);
    device.update("with a log");
    let pages = |driver: &Driver| {
        let log =
            driver.client.read_log(support::testdma::BASE, support::testdma::BYTES, support::testdma::PAGE).unwrap();
        log.iter().map(|word| word.count_ones()).sum::<u32>()
    };
    let logged = pages(&driver);
    assert!(logged > 10, "{logged} pages: what was written before was forgotten");
    goes_on(&mut driver);
    assert!(pages(&driver) > 10, "nothing is logged any more");
    drop(driver);
    device.update("when its client has left");
    let mut next = self::driver(&device, Interrupt::Msi);
    device.update("with the next one");
    goes_on(&mut next);
    drop(next);
    device.finish();
}
