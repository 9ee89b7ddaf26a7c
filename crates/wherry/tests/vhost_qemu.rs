//! Our back end under a front end that nobody here wrote: a guest of QEMU, its disk served by `wherry device blk`, migrated
//! between QEMU processes by precopy, postcopy, and postcopy with a stream for what is asked for.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use support::disk::Memory;
use support::update::repetitions;
use support::vhost::BackEnd;
use support::{Place, kvm, wait_for};
use wherry_guest::PROBE_ELF;
use wherry_guest::disk::BLOCK_BYTES;
use wherry_guest::report::Phase;
use wherry_guest::snapshot::Snapshot;

const PROGRAM: &str = "qemu-system-x86_64";
const IMAGE: u64 = 32 << 20;

/// A process that ends with the value.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A back end, and a QEMU with its guest.
struct Machine<'a> {
    qemu: Process,
    qmp: BufReader<UnixStream>,
    back_end: BackEnd<'a>,
}

impl<'a> Machine<'a> {
    fn start(place: &'a Place, name: &str, image: &Path, kernel: &Path, incoming: bool) -> Self {
        let control = place.path(&format!("{name}.qmp"));
        let back_end = BackEnd::disk(place, &format!("{name}.disk"), image, &[]);
        let mut qemu = Command::new(PROGRAM);
        // KVM may offer an MSR that no vCPU takes; QEMU ends at that.
        qemu.args(["-accel", "kvm", "-cpu", "host,arch-capabilities=off", "-nodefaults", "-display", "none"])
            .args(["-no-reboot", "-machine", "q35,memory-backend=ram", "-m", "64M", "-smp", "1"])
            .args(["-object", "memory-backend-memfd,id=ram,share=on,size=64M"])
            .args(["-append", "data=16M rate=4M disk=32M disk_depth=64 disk_wait=interrupt", "-kernel"])
            .arg(kernel)
            .arg("-chardev")
            .arg(format!("socket,id=disk,path={}", back_end.socket.display()))
            .args(["-device", "vhost-user-blk-pci,chardev=disk,num-queues=1,queue-size=256,disable-legacy=on", "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", control.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit());
        if incoming {
            qemu.args(["-incoming", "defer"]);
        }
        let qemu = Process(qemu.spawn().unwrap());
        let stream = wait_for("QEMU's socket", || UnixStream::connect(&control).ok());
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut this = Self { qemu, qmp: BufReader::new(stream), back_end };
        this.line();
        this.execute("qmp_capabilities", Value::Null);
        this
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.qmp.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        self.qmp.get_mut().write_all(format!("{request}\n").as_bytes()).unwrap();
        loop {
            let mut answer = self.line();
            assert!(answer.get("error").is_none(), "QEMU refuses {command}: {answer}");
            if let Some(value) = answer.get_mut("return") {
                return value.take();
            }
        }
    }

    /// Guest RAM, when the guest runs.
    fn memory(&self) -> Memory {
        let directory = format!("/proc/{}/fd", self.qemu.0.id());
        let ram: PathBuf = wait_for("the RAM of a guest", || {
            let entries = std::fs::read_dir(&directory).ok()?.flatten().map(|entry| entry.path());
            let named = |path: &PathBuf| {
                std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("memfd:memory-backend-memfd"))
            };
            entries.into_iter().find(named)
        });
        Memory::of_file(File::options().read(true).write(true).open(ram).unwrap())
    }

    fn migrate(&mut self, to: &mut Self, postcopy: bool, preempt: bool) {
        let capability = |name: &str, state: bool| json!({ "capability": name, "state": state });
        let capabilities =
            json!({ "capabilities": [capability("postcopy-ram", postcopy), capability("postcopy-preempt", preempt)] });
        for end in [&mut *self, &mut *to] {
            end.execute("migrate-set-capabilities", capabilities.clone());
        }
        to.execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }));
        let listening = to.execute("query-migrate", Value::Null);
        let port = listening["socket-address"][0]["port"].as_str().unwrap().to_owned();
        self.execute("migrate-set-parameters", json!({ "max-bandwidth": 100_000_000_000u64, "downtime-limit": 50 }));
        self.execute("migrate", json!({ "uri": format!("tcp:127.0.0.1:{port}") }));
        if postcopy {
            self.execute("migrate-start-postcopy", Value::Null);
        }
        for end in [&mut *self, to] {
            wait_for("QEMU's migration to end", || {
                let status = end.execute("query-migrate", Value::Null);
                assert_ne!(status["status"], "failed", "{status}");
                (status["status"] == "completed").then_some(())
            });
        }
    }
}

/// Whether there are QEMU and KVM; says what is skipped if not.
fn able(test: &str) -> bool {
    let there = Command::new(PROGRAM).arg("--version").stdout(Stdio::null()).status().is_ok();
    if !there {
        println!("SKIPPED {test}: {PROGRAM} is not installed (Debian package qemu-system-x86)");
    }
    there && kvm(test)
}

/// A guest whose disk works.
fn begin<'a>(place: &'a Place, image: &Path, kernel: &Path) -> (Machine<'a>, Memory) {
    File::create(image).unwrap().set_len(IMAGE).unwrap();
    std::fs::write(kernel, PROBE_ELF).unwrap();
    let here = Machine::start(place, "0", image, kernel, false);
    let memory = here.memory();
    wait_for("the probe guest to start its disk", || {
        let snapshot: Snapshot = memory.try_snapshot()?;
        assert!(snapshot.failure.is_none(), "{:?}", snapshot.failure);
        snapshot.disk.filter(|disk| disk.completed() > 0)
    });
    memory.wait_for_requests("before anything happens");
    (here, memory)
}

fn finish(memory: &Memory, image: &Path) {
    memory.finish();
    wait_for("the guest to have compared everything", || (memory.snapshot().phase() == Phase::Finished).then_some(()));
    let compared = memory.compare(&File::open(image).unwrap(), 1);
    assert!(compared > IMAGE / BLOCK_BYTES / 8, "only {compared} blocks were ever written");
}

#[test]
fn a_disk_of_our_back_end_moves_with_a_guest_of_qemu_by_precopy_and_postcopy() {
    let test = "a_disk_of_our_back_end_moves_with_a_guest_of_qemu_by_precopy_and_postcopy";
    if !able(test) {
        return;
    }
    // `WHERRY_QEMU_MOVES`: how many moves in each way, 2 unless told.
    let moves = std::env::var("WHERRY_QEMU_MOVES").ok().and_then(|moves| moves.parse().ok()).unwrap_or(2);
    let place = Place::new();
    let (image, kernel) = (place.path("disk"), place.path("probe.elf"));
    let (mut here, mut memory) = begin(&place, &image, &kernel);
    let ways = [("precopy", false, false), ("postcopy", true, false), ("postcopy with preemption", true, true)];
    for (leg, (way, postcopy, preempt)) in ways.into_iter().cycle().take(3 * moves).enumerate() {
        let mut there = Machine::start(&place, &(leg + 1).to_string(), &image, &kernel, true);
        here.migrate(&mut there, postcopy, preempt);
        memory = there.memory();
        here = there;
        memory.wait_for_requests(&format!("after move {leg}, by {way}"));
    }
    finish(&memory, &image);
}

#[test]
fn the_process_of_our_back_end_is_replaced_under_a_guest_of_qemu_which_then_moves() {
    let test = "the_process_of_our_back_end_is_replaced_under_a_guest_of_qemu_which_then_moves";
    if !able(test) {
        return;
    }
    let place = Place::new();
    let (image, kernel) = (place.path("disk"), place.path("probe.elf"));
    let (mut here, mut memory) = begin(&place, &image, &kernel);
    for n in 0..repetitions(3) {
        let job = here.back_end.update(&format!("update {n}"));
        println!("{}", job["job"]["blackout"]);
        memory.wait_for_requests(&format!("after update {n}"));
    }
    for (leg, postcopy) in [false, true].into_iter().enumerate() {
        let mut there = Machine::start(&place, &(leg + 1).to_string(), &image, &kernel, true);
        there.back_end.update("before the guest comes");
        here.migrate(&mut there, postcopy, false);
        memory = there.memory();
        here = there;
        memory.wait_for_requests(&format!("after move {leg}"));
        here.back_end.update("when it has come");
        memory.wait_for_requests("after that");
    }
    finish(&memory, &image);
}
