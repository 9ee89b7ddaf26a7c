//! The accelerator as a process: it serves a vfio-user client, has the keys that its operator gives, and ends when it is asked to.
//! Memory and registers are used as docs/accel-abi.md has them, by the client of `wherry-accel`'s tests that was written from it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "../../wherry-accel/tests/stranger/raw.rs"]
#[allow(dead_code, reason = "this file uses its part")]
mod raw;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use raw::{Bus, Raw, Work};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::process::{Pid, Signal, kill_process};
use wherry_vfio_user::client::NoMemory;
use wherry_vfio_user::payload::pci_region;
use wherry_vfio_user::{Client, Options, State};

/// Anything takes less.
const LIMIT: Duration = Duration::from_secs(30);

fn until(what: &str, mut there: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !there() {
        assert!(Instant::now() < deadline, "waited {LIMIT:?} for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A device process.
struct Process {
    child: Child,
    socket: PathBuf,
}

impl Process {
    fn start(directory: &Path, name: &str, more: &[&str]) -> Self {
        let socket = directory.join(name);
        // As many bytes of core dump as it likes, in the directory of the test.
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -c unlimited; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_wherry")]);
        command.args(["device", "accel", "--socket"]).arg(&socket).args(more);
        let child = command.current_dir(directory).stdin(Stdio::null()).spawn().unwrap();
        let this = Self { child, socket };
        until("the socket", || this.socket.exists());
        this
    }

    fn end(&mut self, signal: Signal) -> ExitStatus {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        let mut ended = None;
        until("the process to end", || {
            ended = self.child.try_wait().unwrap();
            ended.is_some()
        });
        ended.unwrap()
    }

    fn client(&self) -> Client {
        let mut client = None;
        // There is a socket before it is listened on.
        until("the device to be served", || {
            client = Client::connect(&self.socket, Options::default(), Arc::new(NoMemory)).ok();
            client.is_some()
        });
        client.unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const BASE: u64 = 0x10_0000;
const BYTES: u64 = 1 << 20;

/// A process, its client, and the client's memory.
struct Board {
    client: Client,
    memory: File,
}

impl Board {
    fn new(process: &Process) -> Self {
        let memory = memfd_create("client", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&memory, BYTES).unwrap();
        fcntl_add_seals(&memory, SealFlags::SHRINK).unwrap();
        let memory = File::from(memory);
        Self { client: Self::connect(process, &memory), memory }
    }

    fn connect(process: &Process, memory: &File) -> Client {
        let client = process.client();
        client.dma_map(BASE, BYTES, Some((memory.as_fd(), 0)), true, true).unwrap();
        client.write(pci_region::CONFIG, 4, &[6, 0]).unwrap();
        client
    }

    /// Stops it, and reads all of its state.
    fn save(&self) -> Vec<u8> {
        self.client.set_state(State::StopCopy).unwrap();
        let mut state = Vec::new();
        while let Some(piece) = Some(self.client.read_data(1 << 16).unwrap()).filter(|piece| !piece.is_empty()) {
            state.extend(piece);
        }
        state
    }

    /// Whether another process takes the state; it runs there then.
    fn load(client: &Client, state: &[u8]) -> bool {
        client.set_state(State::Resuming).unwrap();
        client.write_data(state).unwrap();
        client.set_state(State::Running).is_ok()
    }
}

impl Bus for Board {
    fn read(&mut self, at: u64, width: usize) -> Option<u64> {
        let mut bytes = [0; 8];
        self.client.read(0, at, &mut bytes[..width]).unwrap();
        let ones = bytes[..width].iter().all(|byte| *byte == 0xff);
        (!ones).then_some(u64::from_le_bytes(bytes))
    }

    fn write(&mut self, at: u64, bytes: &[u8]) {
        self.client.write(0, at, bytes).unwrap();
    }

    fn peek(&mut self, at: u64, to: &mut [u8]) {
        self.memory.read_exact_at(to, at - BASE).unwrap();
    }

    fn poke(&mut self, at: u64, from: &[u8]) {
        self.memory.write_all_at(from, at - BASE).unwrap();
    }

    fn pass(&mut self) {
        std::thread::sleep(Duration::from_micros(500));
    }
}

fn client(process: &Process) -> Raw<Board> {
    Raw::new(Board::new(process), BASE, BYTES)
}

#[test]
fn a_process_serves_the_engines_it_was_told_to_and_ends_when_it_is_asked() {
    let directory = tempfile::tempdir().unwrap();
    let engines = ["--engines", "copy=2,code=1", "--workers", "3"];
    let mut process = Process::start(directory.path(), "accel", &engines);
    let mut c = client(&process);
    assert_eq!(c.register(0x00, 4) as u32, u32::from_le_bytes(*b"WACC"));
    assert_eq!(c.engines(), [(0, 0), (0, 1), (4, 0)], "copy0, copy1, code0");
    let context = c.create(0, 0).unwrap();
    let word = c.put(&[0; 64]);
    c.done(context, 0, Work { opcode: 0x04, destination: word, first: 0xfeed_f00d, ..Work::default() });
    assert_eq!(c.word(word), 0xfeed_f00d);
    drop(c);
    assert_eq!(process.end(Signal::TERM).code(), Some(0));
    assert!(!process.socket.exists(), "its socket is left behind");
}

#[test]
fn a_client_has_privilege_when_the_operator_says_so() {
    let directory = tempfile::tempdir().unwrap();
    // The time slice of the first engine, in microseconds: without privilege the write is lost.
    for (name, arguments, slice) in [("plain", &[][..], 1000), ("privileged", &["--privileged"], 7)] {
        let process = Process::start(directory.path(), name, arguments);
        let mut c = client(&process);
        c.set(0x800, 4, 7);
        assert_eq!(c.register(0x800, 4), slice, "{name}");
        let context = c.create(0, 0).unwrap();
        assert_eq!(c.set_param(context, 0, 1, 5).is_ok(), name == "privileged", "a priority above 0");
    }
}

/// Writes a file that nobody else can read, or that anybody can.
fn file(directory: &Path, name: &str, mode: u32, content: &[u8]) -> String {
    let path = directory.join(name);
    let made = File::options().write(true).create_new(true).mode(mode).open(&path);
    std::io::Write::write_all(&mut made.unwrap(), content).unwrap();
    path.display().to_string()
}

/// Runs the program; how it ended, and what it said.
fn wherry(arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_wherry")).args(arguments).output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

fn wrap(fleet: &str, handle: &str, kind: &str, key: &str, output: &str) -> (Option<i32>, String) {
    let wrap = ["accel", "wrap-key", "--fleet-key", fleet, "--handle", handle, "--kind", kind];
    wherry(&[&wrap[..], &["--key", key, "--output", output]].concat())
}

/// The key of RFC 4231's first test case, with the zeros that HMAC puts behind it.
const HMAC_KEY: [u8; 32] =
    *b"\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b\0\0\0\0\0\0\0\0\0\0\0\0";
const AES_KEY: [u8; 32] = *b"this key is found nowhere at all";
const FLEET: [u8; 32] = *b"neither is the key of that fleet";

fn hmac(c: &mut Raw<Board>, context: u32) {
    let (text, to) = (c.put(b"Hi There"), c.room(32));
    // The usual engines: copy, copy, compress, compress, crypto.
    c.done(context, 4, Work { opcode: 0x66, source: text, destination: to, size: 8, word: 2, ..Work::default() });
    let expected = "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7";
    let found: String = c.get(to, 32).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(found, expected);
}

fn contains(bytes: &[u8], key: &[u8]) -> bool {
    bytes.windows(key.len()).any(|window| window == key)
}

#[test]
fn keys_come_from_files_work_after_a_move_and_a_reset_and_are_in_no_memory_stream_or_dump() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    let hex: String = FLEET.iter().map(|byte| format!("{byte:02x}")).collect();
    let fleet = file(directory.path(), "fleet", 0o600, format!("{hex}\n").as_bytes());
    let other = file(directory.path(), "other-fleet", 0o600, &[3; 32]);
    let aes = file(directory.path(), "aes", 0o600, &AES_KEY);
    let mac = file(directory.path(), "mac", 0o400, &HMAC_KEY);
    assert_eq!(wrap(&fleet, "1", "aes-256-gcm", &aes, &at("aes.wrapped")), (Some(0), String::new()));
    assert_eq!(wrap(&fleet, "2", "hmac-sha256", &mac, &at("mac.wrapped")), (Some(0), String::new()));
    let keys = [format!("1=aes-256-gcm:{}", at("aes.wrapped")), format!("2=hmac-sha256:{}", at("mac.wrapped"))];
    let given = ["--fleet-key", &fleet, "--key", &keys[0], "--key", &keys[1]];
    let mut here = Process::start(directory.path(), "here", &given);
    let mut c = client(&here);
    let context = c.create(0, 0).unwrap();
    hmac(&mut c, context);
    let text = c.put(&[7; 1000]);
    let words = c.put(&[[9; 12].to_vec(), vec![0; 4]].concat());
    let (sealed, opened) = (c.room(1016), c.room(1000));
    let seal = Work { source: text, destination: sealed, size: 1000, word: 1, first: words, ..Work::default() };
    c.done(context, 4, Work { opcode: 0x60, ..seal });
    // What is in the guest's memory and in the stream.
    let state = c.bus.save();
    let memory = c.get(BASE, BYTES as usize);
    for key in [&AES_KEY, &HMAC_KEY, &FLEET] {
        assert!(!contains(&state, key) && !contains(&memory, key));
    }
    let wrapped = std::fs::read(at("aes.wrapped")).unwrap();
    assert!(contains(&state, &wrapped) && !contains(&wrapped, &AES_KEY) && !contains(&memory, &wrapped));
    // A process without the fleet's key takes no such state, nor does one of another fleet.
    for (name, arguments) in [("keyless", &[][..]), ("stranger", &["--fleet-key", &other])] {
        let stranger = Process::start(directory.path(), name, arguments);
        assert!(!Board::load(&Board::connect(&stranger, &c.bus.memory), &state));
    }
    // One that has it needs no keys of its own; they are there after a reset, too.
    let there = Process::start(directory.path(), "there", &["--fleet-key", &fleet]);
    let client = Board::connect(&there, &c.bus.memory);
    assert!(Board::load(&client, &state));
    c.bus.client = client;
    c.done(context, 4, Work { opcode: 0x61, source: sealed, destination: opened, size: 1016, ..seal });
    assert_eq!(c.get(opened, 1000), [7; 1000]);
    c.bus.client.reset().unwrap();
    c.bus.client.write(pci_region::CONFIG, 4, &[6, 0]).unwrap();
    let mut c = Raw::new(c.bus, BASE, BYTES);
    let context = c.create(0, 0).unwrap();
    hmac(&mut c, context);
    // A process that has keys is not dumped. One that has none is, where the machine does that at all.
    let dumps = || {
        let names = std::fs::read_dir(directory.path()).unwrap();
        names.filter(|name| name.as_ref().unwrap().file_name().to_string_lossy().starts_with("core")).count()
    };
    let status = here.end(Signal::ABORT);
    assert_eq!((status.signal(), status.core_dumped(), dumps()), (Some(Signal::ABORT.as_raw()), false, 0));
    let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default();
    if !pattern.starts_with("core") {
        println!("SKIPPED that another process is dumped: core dumps go to {pattern:?}");
        return;
    }
    let mut plain = Process::start(directory.path(), "plain", &[]);
    assert!(plain.end(Signal::ABORT).core_dumped());
}

#[test]
fn keys_that_cannot_be_are_refused_by_what_is_wrong_and_nothing_of_them_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    let file = |name: &str, mode, content: &[u8]| file(directory.path(), name, mode, content);
    let (fleet, key) = (file("fleet", 0o600, &FLEET), file("key", 0o600, &AES_KEY));
    let (other, open) = (file("other", 0o600, &[3; 32]), file("open", 0o644, &FLEET));
    let short = file("short", 0o600, b"secret words");
    let output = at("wrapped");
    assert_eq!(wrap(&fleet, "1", "aes-256-gcm", &key, &output).0, Some(0));
    let device =
        |fleet: &str, key: &str| wherry(&["device", "accel", "--socket", &at("s"), "--fleet-key", fleet, "--key", key]);
    let refused = [
        (wrap(&open, "1", "aes-256-gcm", &key, &at("a")), "chmod 600"),
        (wrap(&fleet, "1", "aes-256-gcm", &short, &at("b")), "a key is 32 bytes, or 64 hexadecimal digits"),
        (wrap(&fleet, "1", "aes-256-gcm", &at("nothing"), &at("c")), "opening the key"),
        (wrap(&fleet, "1", "aes-256-gcm", &key, &output), "writing the wrapped key"),
        (device(&open, &format!("1=aes-256-gcm:{output}")), "chmod 600"),
        (device(&other, &format!("1=aes-256-gcm:{output}")), "wrapped by another fleet key"),
        (
            device(&fleet, &format!("2=aes-256-gcm:{output}")),
            "key 2 was wrapped by another fleet key, or for another handle",
        ),
        (device(&fleet, &format!("1=hmac-sha256:{output}")), "or for another handle or use"),
        (device(&fleet, &format!("1=aes-256-gcm:{key}")), "a wrapped key has 60 bytes, not 32"),
    ];
    for ((code, said), words) in refused {
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains(words), "{said:?} does not say {words:?}");
        assert!(!said.contains("secret") && !said.contains("found nowhere"), "{said}");
    }
    let (code, said) = wherry(&["device", "accel", "--socket", &at("s"), "--key", "1=aes-256-gcm:f"]);
    assert_eq!(code, Some(2), "a key without the fleet's: {said}");
    assert!(!Path::new(&at("s")).exists() && !Path::new(&at("a")).exists());
}
