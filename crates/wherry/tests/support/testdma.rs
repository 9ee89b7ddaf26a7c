//! The process `wherry device testdma`, and a driver for it that is a vfio-user client: guest RAM is a file here.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use wherry_guest::snapshot::TestdmaSnapshot;
use wherry_guest::testdma::{
    COMPLETION_BYTES, DESCRIPTOR_BYTES, DESCRIPTORS, Form, Interrupt, LETTER_BYTES, area, area_bytes, buffer_word,
    completions, register,
};
use wherry_vfio_user::client::NoMemory;
use wherry_vfio_user::payload::{pci_irq, pci_region};
use wherry_vfio_user::{Client, Options, State, VfioUserError};

use super::disk::Memory;
use super::{LIMIT, Place, wait_for};

/// Where guest RAM lies for the device, and how much there is.
pub const BASE: u64 = 0x1_4000_0000;
pub const BYTES: u64 = 8 << 20;
pub const PAGE: u64 = 4096;
/// Where in it the area is, and where buffers are.
const AREA: u64 = 0x1_0000;
const POOL: u64 = 0x10_0000;
pub const VECTORS: u32 = 4;

/// The process.
pub struct Process {
    child: Child,
    pub socket: std::path::PathBuf,
    log: std::path::PathBuf,
}

impl Process {
    pub fn start(place: &Place, name: &str, more: &[&str]) -> Self {
        Self::start_with(place, name, more, &[])
    }

    /// With something in its environment.
    pub fn start_with(place: &Place, name: &str, more: &[&str], environment: &[(&str, &str)]) -> Self {
        let (socket, log) = (place.path(&format!("{name}.sock")), place.path(&format!("{name}.log")));
        let mut command = place.command(&["device", "testdma", "--socket"]);
        command.arg(&socket).args(more).envs(environment.iter().copied()).stdout(Stdio::piped());
        let child = command.stderr(File::create(&log).unwrap()).spawn().unwrap();
        let mut this = Self { child, socket, log };
        wait_for("the device's socket", || {
            assert!(this.child.try_wait().unwrap().is_none(), "the device has ended: {}", this.log());
            std::os::unix::net::UnixStream::connect(&this.socket).is_ok().then_some(())
        });
        this
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end.
    pub fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "waited for the end of the device: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Has it end, and gives what it says that it has done.
    pub fn summary(self) -> serde_json::Value {
        let pid = self.pid();
        self.summary_of(pid)
    }

    /// Likewise, of the process that has taken its place.
    pub fn summary_of(mut self, pid: u32) -> serde_json::Value {
        let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert_eq!(self.end().code(), Some(0), "{}", self.log());
        let said = serde_json::from_reader(self.child.stdout.take().unwrap()).unwrap();
        assert!(!self.socket.exists(), "the socket is removed");
        said
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

/// What the guest says of its device; nothing was wrong so far.
pub fn load(memory: &Memory) -> TestdmaSnapshot {
    let snapshot = memory.snapshot();
    assert!(snapshot.failure.is_none(), "{:?}", snapshot.failure);
    let load = snapshot.testdma.unwrap();
    assert_eq!((load.errors, load.lost), (0, 0), "{load:?}");
    load
}

/// Waits until so many more have come.
pub fn wait_for_more(memory: &Memory, more: u64, what: &str) -> TestdmaSnapshot {
    let before = load(memory);
    wait_for(&format!("{more} buffers or letters {what}"), || {
        let now = load(memory);
        (now.received >= before.received + more).then_some(now)
    })
}

pub fn memory() -> File {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, BYTES).unwrap();
    fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    fd.into()
}

pub fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

pub fn client(process: &Process) -> Client {
    Client::connect(&process.socket, Options::default(), Arc::new(NoMemory)).unwrap()
}

/// A driver: what the guest's does, by messages.
pub struct Driver {
    pub client: Client,
    pub memory: File,
    pub events: Vec<OwnedFd>,
    pub kind: Interrupt,
    pub entries: u32,
    /// Lengths of buffers, in turn, and how far they are apart.
    pub lengths: Vec<u32>,
    pub posted: u64,
    pub taken: u64,
    /// Pages that the driver wrote since they were last asked for.
    pub written: BTreeSet<u64>,
}

pub const SEED: u64 = 0x1234_5678_9abc_def1;

fn irq(kind: Interrupt) -> u32 {
    match kind {
        Interrupt::Msix => pci_irq::MSIX,
        Interrupt::Msi => pci_irq::MSI,
        _ => pci_irq::INTX,
    }
}

impl Driver {
    /// Connects, shows memory, has vectors signal.
    pub fn attach(process: &Process, memory: File, kind: Interrupt) -> Self {
        let client = client(process);
        client.dma_map(BASE, BYTES, Some((memory.as_fd(), 0)), true, true).unwrap();
        let count = if kind == Interrupt::Intx { 1 } else { VECTORS };
        let events: Vec<_> = (0..count).map(|_| event()).collect();
        let fds: Vec<_> = events.iter().map(|event| event.as_fd()).collect();
        client.set_triggers(irq(kind), 0, &fds).unwrap();
        let lengths = vec![4096];
        Self { client, memory, events, kind, entries: 64, lengths, posted: 0, taken: 0, written: BTreeSet::new() }
    }

    /// Sets it up and has it begin.
    pub fn begin(&mut self, form: Form) {
        self.client.write(pci_region::CONFIG, 4, &6_u16.to_le_bytes()).unwrap();
        let at = BASE + AREA;
        let vectors = self.events.len() as u32;
        for (offset, value) in [
            (register::INTERRUPT, self.kind as u32),
            (register::VECTORS, vectors),
            (register::AREA, at as u32),
            (register::AREA_HIGH, (at >> 32) as u32),
            (register::ENTRIES, self.entries),
            (register::SEED, SEED as u32),
            (register::SEED_HIGH, (SEED >> 32) as u32),
            (register::CONTROL, form as u32),
        ] {
            self.set(offset, value);
            assert_eq!(self.register(offset) as u32, value, "register {offset:#x}");
        }
    }

    pub fn register(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.client.read(0, offset, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    pub fn set(&self, offset: u64, value: u32) {
        self.client.write(0, offset, &value.to_le_bytes()).unwrap();
    }

    pub fn word(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read_exact_at(&mut bytes, AREA + offset).unwrap();
        u64::from_le_bytes(bytes)
    }

    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, at).unwrap();
        self.written.extend(at / PAGE..(at + bytes.len() as u64).div_ceil(PAGE));
    }

    fn put_word(&mut self, offset: u64, word: u64) {
        self.put(AREA + offset, &word.to_le_bytes());
    }

    /// Where buffer `n` lies in memory, and its length. Twice as many places as entries, so that what is written late is seen.
    pub fn buffer(&self, n: u64) -> (u64, u32) {
        let length = self.lengths[(n % self.lengths.len() as u64) as usize];
        let apart = u64::from(*self.lengths.iter().max().unwrap()) + 8;
        let at = POOL + n % u64::from(2 * self.entries) * apart;
        assert!(at + apart <= BYTES);
        (at, length)
    }

    /// Posts as many buffers as there is room for, but for so many in all.
    pub fn post(&mut self, most: u64) {
        let (before, room) = (self.posted, self.taken + u64::from(self.entries));
        while self.posted < room.min(most) {
            let (at, length) = self.buffer(self.posted);
            let index = self.posted % u64::from(self.entries);
            let mut descriptor = [0; DESCRIPTOR_BYTES as usize];
            descriptor[..8].copy_from_slice(&(BASE + at).to_le_bytes());
            descriptor[8..12].copy_from_slice(&length.to_le_bytes());
            self.put(AREA + DESCRIPTORS + index * DESCRIPTOR_BYTES, &descriptor);
            self.posted += 1;
        }
        if self.posted > before {
            self.put_word(area::POSTED, self.posted);
            self.set(register::DOORBELL, 1);
        }
    }

    /// Takes what is complete, and checks all of it; how much there was.
    pub fn take(&mut self) -> u64 {
        let complete = self.word(area::COMPLETED);
        assert!(complete <= self.posted && complete >= self.taken, "{complete} complete, {} posted", self.posted);
        let before = self.taken;
        while self.taken < complete {
            self.verify(self.taken).unwrap_or_else(|error| panic!("{error}"));
            self.taken += 1;
        }
        self.taken - before
    }

    /// Checks completion and content of a buffer.
    pub fn verify(&self, n: u64) -> Result<(), String> {
        let mut completion = [0; COMPLETION_BYTES as usize];
        let index = n % u64::from(self.entries);
        self.memory
            .read_exact_at(&mut completion, AREA + completions(self.entries) + index * COMPLETION_BYTES)
            .unwrap();
        let (at, length) = self.buffer(n);
        let mut expected = [0; COMPLETION_BYTES as usize];
        expected[..8].copy_from_slice(&(n + 1).to_le_bytes());
        expected[8..12].copy_from_slice(&length.to_le_bytes());
        if completion != expected {
            return Err(format!("completion of buffer {n}: {completion:x?}, not {expected:x?}"));
        }
        self.verify_content(at, length.into(), n + 1)
    }

    fn verify_content(&self, at: u64, length: u64, sequence: u64) -> Result<(), String> {
        let mut content = vec![0; length as usize];
        self.memory.read_exact_at(&mut content, at).unwrap();
        for (word, bytes) in content.as_chunks().0.iter().enumerate() {
            let (found, expected) = (u64::from_le_bytes(*bytes), buffer_word(SEED, sequence, word));
            if found != expected {
                return Err(format!("number {sequence}, word {word}: {found:#x}, not {expected:#x}"));
            }
        }
        Ok(())
    }

    /// Says that the next buffer is to interrupt. True if it is there already.
    pub fn listen(&mut self) -> bool {
        let next = self.taken + 1;
        self.put_word(area::WANTED, next);
        self.word(area::COMPLETED) > self.taken
    }

    /// Waits for an interrupt; for its vector. Nothing within the time: `None`.
    pub fn interrupt_within(&self, time: Duration) -> Option<usize> {
        let mut fds: Vec<_> = self.events.iter().map(|event| PollFd::new(event, PollFlags::IN)).collect();
        let timeout = Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() };
        poll(&mut fds, Some(&timeout)).unwrap();
        let vector = fds.iter().position(|fd| fd.revents().contains(PollFlags::IN))?;
        drop(fds);
        rustix::io::read(&self.events[vector], &mut [0; 8]).unwrap();
        if self.kind == Interrupt::Intx {
            self.set(register::CAUSE, 1);
            self.client.act_on_irq(wherry_vfio_user::payload::IrqSet::UNMASK, pci_irq::INTX, 0, 1).unwrap();
        }
        Some(vector)
    }

    /// Receives until so many have come in all, by interrupts alone.
    pub fn receive(&mut self, most: u64) {
        while self.taken < most {
            self.post(most);
            if self.take() == 0 && !self.listen() {
                assert!(self.interrupt_within(LIMIT).is_some(), "no interrupt after {} buffers", self.taken);
            }
        }
    }

    /// The letter that is there, checked; its number.
    pub fn letter(&self) -> u64 {
        let sequence = self.word(area::SEQUENCE);
        if sequence > 0 {
            self.verify_content(AREA + area::LETTER, LETTER_BYTES, sequence).unwrap();
        }
        sequence
    }

    pub fn acknowledge(&mut self, sequence: u64) {
        self.put_word(area::ACKNOWLEDGED, sequence);
        self.taken = sequence;
        self.set(register::DOORBELL, 1);
    }

    /// Everything of the area and of all buffers.
    pub fn reach(&self) -> u64 {
        AREA + area_bytes(self.entries)
    }

    /// Brings it to a destination with memory of its own, which is filled from the source's by what log and driver say; gives what
    /// is the source's there. With a state of so many bytes at most.
    pub fn move_to(&mut self, process: &Process, most: usize) -> Result<Client, VfioUserError> {
        let there = memory();
        copy(&self.memory, &there, 0..BYTES / PAGE);
        self.written.clear();
        let page = self.client.start_logging(PAGE, &[(BASE, BYTES)])?;
        assert_eq!(page, PAGE);
        // What was written before the log was on.
        copy(&self.memory, &there, 0..BYTES / PAGE);
        for _ in 0..3 {
            self.post(u64::MAX);
            self.take();
            self.bring(&there)?;
        }
        self.client.set_state(State::StopCopy)?;
        let mut state = Vec::new();
        loop {
            let piece = self.client.read_data(1 << 20)?;
            if piece.is_empty() {
                break;
            }
            state.extend(piece);
            assert!(state.len() <= most, "its state has no end");
        }
        self.bring(&there)?;
        assert_same(&self.memory, &there);
        let next = Self::attach(process, there, self.kind);
        next.client.set_state(State::Resuming)?;
        next.client.write_data(&state)?;
        next.client.set_state(State::Running)?;
        let before = std::mem::replace(&mut self.client, next.client);
        // What was signalled and not seen yet is the client's to bring along.
        for (old, new) in self.events.iter().zip(&next.events) {
            let mut count = [0; 8];
            if rustix::io::read(old, &mut count) == Ok(8) {
                rustix::io::write(new, &count).unwrap();
            }
        }
        (self.memory, self.events) = (next.memory, next.events);
        Ok(before)
    }

    /// Copies what log and driver say was written.
    fn bring(&mut self, there: &File) -> Result<(), VfioUserError> {
        let log = self.client.read_log(BASE, BYTES, PAGE)?;
        let logged = (0..BYTES / PAGE).filter(|page| log[*page as usize / 64] >> (page % 64) & 1 == 1);
        copy(&self.memory, there, logged.chain(std::mem::take(&mut self.written)));
        Ok(())
    }
}

fn copy(from: &File, to: &File, pages: impl IntoIterator<Item = u64>) {
    let mut page = [0; PAGE as usize];
    for at in pages {
        from.read_exact_at(&mut page, at * PAGE).unwrap();
        to.write_all_at(&page, at * PAGE).unwrap();
    }
}

/// Whether two memories are the same, byte by byte.
pub fn assert_same(one: &File, other: &File) {
    let (mut a, mut b) = ([0; PAGE as usize], [0; PAGE as usize]);
    for page in 0..BYTES / PAGE {
        one.read_exact_at(&mut a, page * PAGE).unwrap();
        other.read_exact_at(&mut b, page * PAGE).unwrap();
        assert!(a == b, "page {page:#x} was written, and is in no log");
    }
}
