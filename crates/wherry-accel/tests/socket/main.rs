//! The function over vfio-user: the client that was written from the document alone, behind a socket, also with the device moved to
//! another one before accesses to registers; memory in all the ways a client may give it, interrupts, the log, and
//! what a client should not do.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "../stranger/items.rs"]
mod items;
#[path = "../stranger/raw.rs"]
mod raw;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use raw::{Bus, Raw, Work};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use wherry_accel::catalogue::{Catalogue, Host};
use wherry_accel::drive::RealTime;
use wherry_accel::function::{AccelFunction, CLASS, ID, Model};
use wherry_accel::keys::{FleetKey, KeyKind};
use wherry_vfio_user::client::NoMemory;
use wherry_vfio_user::payload::{IrqSet, pci_irq, pci_region};
use wherry_vfio_user::{Client, DmaHandler, Options, Server, State, Stop, VfioUserError, server};

const BASE: u64 = 0x10_0000;
const BYTES: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// A device process, but for the process.
struct Served {
    directory: tempfile::TempDir,
    stop: Stop,
    thread: Option<JoinHandle<()>>,
}

impl Served {
    fn new(workers: usize) -> Self {
        Self::with(workers, [2, 1, 1, 1, 1])
    }

    fn with(workers: usize, counts: [u16; 5]) -> Self {
        let fleet = FleetKey::new([1; 32]);
        let kinds = [KeyKind::Aes256Gcm, KeyKind::ChaCha20Poly1305, KeyKind::HmacSha256];
        let keys = (1..).zip(kinds).map(|(handle, kind)| (handle, kind, fleet.wrap(handle, kind, &[0; 32]).unwrap()));
        let model = Model {
            catalogue: Catalogue::with_counts(counts).unwrap(),
            host: Host { first: workers - 1, ..Host::uniform(workers) },
            keys: keys.collect(),
            fleet: Some(fleet),
            drive: Box::new(RealTime { patience: Duration::from_millis(2) }),
            privileged: Arc::default(),
            seed: 1,
        };
        let directory = tempfile::tempdir().unwrap();
        let server = Server::bind(&directory.path().join("s")).unwrap();
        let mut function = AccelFunction::new(model).unwrap();
        let mut host = server::Host::new(&function).unwrap();
        let stop = host.stop();
        let thread = std::thread::spawn(move || server.serve(&mut host, &mut function).unwrap());
        Self { directory, stop, thread: Some(thread) }
    }

    fn client(&self, memory: Arc<dyn DmaHandler>) -> Client {
        Client::connect(&self.directory.path().join("s"), Options::default(), memory).unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.stop();
        let ended = self.thread.take().unwrap().join();
        // While a test fails already there is nothing to add.
        assert!(ended.is_ok() || std::thread::panicking());
    }
}

/// How a client gives its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// A file that cannot be cut: it is mapped.
    Sealed,
    /// A file that can be: it is read and written.
    File,
    /// By messages.
    Messages,
}

struct Handler(Arc<File>);

impl DmaHandler for Handler {
    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.0.read_exact_at(data, address - BASE).map_err(|_| Errno::IO)
    }

    fn write(&self, address: u64, data: &[u8]) -> Result<(), Errno> {
        self.0.write_all_at(data, address - BASE).map_err(|_| Errno::IO)
    }
}

/// When the device moves.
#[derive(Clone, Copy, Debug)]
enum Plan {
    Never,
    /// Before that access to a register.
    Before(u64),
    /// Before every so-many-th one.
    Every(u64),
}

/// The socket as a bus.
struct Socket {
    // Closed before the server ends.
    client: Client,
    served: Served,
    memory: Arc<File>,
    way: Way,
    plan: Plan,
    accesses: u64,
    moves: u64,
}

impl Socket {
    fn new(way: Way, plan: Plan) -> Self {
        let memory: OwnedFd = memfd_create("client", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&memory, BYTES).unwrap();
        if way == Way::Sealed {
            fcntl_add_seals(&memory, SealFlags::SHRINK).unwrap();
        }
        let memory = Arc::new(File::from(memory));
        let served = Served::new(2);
        let client = Self::connect(&served, &memory, way);
        client.write(pci_region::CONFIG, 4, &[6, 0]).unwrap();
        Self { client, served, memory, way, plan, accesses: 0, moves: 0 }
    }

    fn connect(served: &Served, memory: &Arc<File>, way: Way) -> Client {
        let client = served.client(match way {
            Way::Messages => Arc::new(Handler(memory.clone())),
            _ => Arc::new(NoMemory),
        });
        let file = (way != Way::Messages).then(|| (memory.as_fd(), 0));
        client.dma_map(BASE, BYTES, file, true, true).unwrap();
        client
    }

    /// To another device process, with other workers.
    fn migrate(&mut self) {
        self.client.set_state(State::StopCopy).unwrap();
        let mut state = Vec::new();
        loop {
            let piece = self.client.read_data(1 << 16).unwrap();
            if piece.is_empty() {
                break;
            }
            state.extend(piece);
        }
        self.moves += 1;
        let served = Served::new(1 + (self.moves % 5) as usize);
        let client = Self::connect(&served, &self.memory, self.way);
        client.set_state(State::Resuming).unwrap();
        state.chunks(1 << 16).for_each(|piece| client.write_data(piece).unwrap());
        client.set_state(State::Running).unwrap();
        (self.client, self.served) = (client, served);
    }

    fn access(&mut self) {
        let due = match self.plan {
            Plan::Never => false,
            Plan::Before(number) => number == self.accesses,
            Plan::Every(number) => self.accesses.is_multiple_of(number),
        };
        if due {
            self.migrate();
        }
        self.accesses += 1;
    }
}

impl Bus for Socket {
    fn read(&mut self, at: u64, width: usize) -> Option<u64> {
        self.access();
        let mut bytes = [0; 8];
        self.client.read(0, at, &mut bytes[..width]).unwrap();
        let ones = bytes[..width].iter().all(|byte| *byte == 0xff);
        (!ones).then_some(u64::from_le_bytes(bytes))
    }

    fn write(&mut self, at: u64, bytes: &[u8]) {
        self.access();
        self.client.write(0, at, bytes).unwrap();
    }

    fn peek(&mut self, at: u64, to: &mut [u8]) {
        self.memory.read_exact_at(to, at - BASE).unwrap();
    }

    fn poke(&mut self, at: u64, from: &[u8]) {
        self.memory.write_all_at(from, at - BASE).unwrap();
    }

    /// A look at memory is followed by the next one; `Raw` bounds how many there are.
    fn pass(&mut self) {
        std::thread::sleep(Duration::from_micros(500));
    }
}

fn client(way: Way) -> Raw<Socket> {
    Raw::new(Socket::new(way, Plan::Never), BASE, BYTES)
}

/// Accesses to registers between two moves of a run that has many.
const OFTEN: u64 = 3;
/// Runs with one move each, of every item.
const SAMPLE: u64 = 2;

fn moved(name: &str, item: fn(&mut Raw<Socket>)) {
    let run = |plan| {
        let mut raw = Raw::new(Socket::new(Way::Sealed, plan), BASE, BYTES);
        item(&mut raw);
        (raw.bus.accesses, raw.bus.moves)
    };
    let (accesses, _) = run(Plan::Never);
    let all = std::env::var("WHERRY_ACCEL_MOVES").is_ok();
    // A seeded choice, another one for each item.
    let chosen = |number: u64| (name.len() as u64 * 0x9e37_79b9 + number * 0x85eb_ca6b) % accesses;
    let numbers: Vec<u64> = if all { (0..accesses).collect() } else { (0..SAMPLE).map(chosen).collect() };
    for number in numbers {
        println!("{name}: a move before access {number} of {accesses}");
        assert_eq!(run(Plan::Before(number)).1, 1);
    }
    println!("{name}: a move before every {OFTEN}rd access");
    assert!(run(Plan::Every(OFTEN)).1 > 0);
}

macro_rules! items {
    ($($item:ident)*) => {
        mod plain {
            $(#[test]
            fn $item() {
                super::items::$item(&mut super::client(super::Way::Sealed));
            })*
        }
        mod moved {
            $(#[test]
            fn $item() {
                super::moved(stringify!($item), super::items::$item);
            })*
        }
    };
}

items! {
    the_device_says_what_it_is
    contexts_are_made_set_read_cloned_and_destroyed
    operations_of_every_class_run
    submissions_go_by_portal_by_ring_and_in_batches_with_fences
    words_that_an_operation_does_not_use_must_be_zero
}

#[test]
fn memory_that_can_be_cut_and_memory_by_messages_do_as_well() {
    for way in [Way::File, Way::Messages] {
        items::operations_of_every_class_run(&mut client(way));
        items::submissions_go_by_portal_by_ring_and_in_batches_with_fences(&mut client(way));
    }
}

#[test]
fn the_function_identifies_itself_and_reaches_nothing_before_it_is_a_bus_master() {
    let mut c = client(Way::Sealed);
    let mut bytes = [0; 12];
    c.bus.client.read(pci_region::CONFIG, 0, &mut bytes).unwrap();
    assert_eq!(bytes[..4], [ID.0.to_le_bytes(), ID.1.to_le_bytes()].concat());
    assert_eq!(bytes[9..12], CLASS.to_le_bytes()[..3]);
    let mut subsystem = [0; 4];
    c.bus.client.read(pci_region::CONFIG, 0x2c, &mut subsystem).unwrap();
    // copy0, copy1, compress0, crypto0, compute0, code0.
    let engines = [0u16, 0, 0, 1, 1, 0, 2, 0, 3, 0, 4, 0].map(u16::to_le_bytes).concat();
    let crc = crc32c::crc32c(&engines);
    assert_eq!(u16::from_le_bytes([subsystem[2], subsystem[3]]), (crc >> 16) as u16 ^ crc as u16);
    assert_eq!(subsystem[..2], ID.0.to_le_bytes());
    // The BAR's size, as firmware asks for it, and what the region says.
    c.bus.client.write(pci_region::CONFIG, 0x10, &[0xff; 4]).unwrap();
    let mut bar = [0; 4];
    c.bus.client.read(pci_region::CONFIG, 0x10, &mut bar).unwrap();
    let size = u64::from(!(u32::from_le_bytes(bar) & !0xf)) + 1;
    assert_eq!((size, c.bus.client.region_info(0).unwrap().info.size), (16 << 20, 16 << 20));
    c.bus.client.write(pci_region::CONFIG, 4, &[2, 0]).unwrap();
    assert_eq!(c.create(0, 0), Err(items::EFAULT));
    c.bus.client.write(pci_region::CONFIG, 4, &[6, 0]).unwrap();
    let context = c.create(0, 0).unwrap();
    // A reset ends it all.
    c.bus.client.reset().unwrap();
    assert_eq!(c.create(0, 0), Err(items::EFAULT), "no bus master after a reset");
    c.bus.client.write(pci_region::CONFIG, 4, &[6, 0]).unwrap();
    assert_eq!(c.destroy(context), Err(items::ENOENT));
    items::operations_of_every_class_run(&mut c);
}

fn rings(event: &OwnedFd) -> u64 {
    let mut polled = [PollFd::new(event, PollFlags::IN)];
    let limit = Timespec { tv_sec: 10, tv_nsec: 0 };
    assert_eq!(poll(&mut polled, Some(&limit)).unwrap(), 1, "waited 10 s for an interrupt");
    let mut count = [0; 8];
    rustix::io::read(event, &mut count).unwrap();
    u64::from_ne_bytes(count)
}

#[test]
fn a_completion_raises_its_vector_and_one_that_is_masked_waits_and_moves() {
    let mut c = client(Way::Sealed);
    let events: Vec<OwnedFd> =
        (0..4).map(|_| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()).collect();
    let fds: Vec<_> = events.iter().map(|event| event.as_fd()).collect();
    c.bus.client.set_triggers(pci_irq::MSIX, 0, &fds).unwrap();
    let context = c.create(0, 0).unwrap();
    let work = |vector| Work { flags: 2, vector, ..Work::default() };
    for vector in [3, 0, 3] {
        c.done(context, 0, work(vector));
        assert_eq!(rings(&events[usize::from(vector)]), 1);
    }
    // Vectors without an eventfd, and those that do not exist, harm nobody.
    c.done(context, 0, work(9));
    c.done(context, 0, work(0xffff));
    // Masked: it waits in the state, and comes at the destination.
    c.bus.client.act_on_irq(IrqSet::MASK, pci_irq::MSIX, 1, 1).unwrap();
    c.done(context, 0, work(1));
    c.bus.migrate();
    c.bus.client.set_triggers(pci_irq::MSIX, 0, &fds).unwrap();
    assert_eq!(rings(&events[1]), 1);
    c.done(context, 0, work(2));
    assert_eq!(rings(&events[2]), 1);
}

#[test]
fn what_is_written_is_in_the_log_when_its_completion_is_seen() {
    let mut c = client(Way::Sealed);
    let context = c.create(0, 0).unwrap();
    let (from, to) = (c.put(&vec![7; 40_000]), c.room(40_000));
    c.done(context, 0, Work::default());
    let client = &c.bus.client;
    assert_eq!(client.start_logging(PAGE, &[(BASE, BYTES)]).unwrap(), PAGE);
    let record = c.room(32).next_multiple_of(PAGE);
    c.room(2 * PAGE as usize);
    let copy = Work { flags: 1, opcode: 0x20, source: from, destination: to, size: 40_000, ..Work::default() };
    for round in 0..20u32 {
        c.bus.poke(record, &[0; 32]);
        let portal = Raw::<Socket>::portal(context, 1);
        c.bus.write(portal, &copy.bytes(round, context, record));
        c.record(record);
        let log = c.bus.client.read_log(BASE, BYTES, PAGE).unwrap();
        let written = |at: u64| log[((at - BASE) / PAGE / 64) as usize] >> ((at - BASE) / PAGE % 64) & 1 == 1;
        let pages = |at: u64, bytes: u64| (at / PAGE..(at + bytes).div_ceil(PAGE)).map(|page| page * PAGE);
        assert!(pages(to, 40_000).all(written), "round {round}: the copy");
        assert!(written(record), "round {round}: its record");
        assert!(
            pages(from, 40_000).filter(|at| *at + PAGE <= to & !(PAGE - 1)).all(|at| !written(at)),
            "what was read"
        );
    }
}

#[test]
fn work_under_way_goes_on_elsewhere_and_a_device_with_other_engines_refuses_it() {
    let mut c = client(Way::Sealed);
    let context = c.create(0, 0).unwrap();
    let (word, record) = (c.put(&[0; 64]), c.put(&[0; 32]));
    let spin = Work { flags: 1, opcode: 0x06, source: word, ..Work::default() };
    c.bus.write(Raw::<Socket>::portal(context, 0), &spin.bytes(1, 0, record));
    c.until("the spinner to run", |c| c.busy(context, 0, 1) == Ok((1, 0)));
    for _ in 0..3 {
        c.bus.migrate();
        c.until("the spinner to run", |c| c.busy(context, 0, 1) == Ok((1, 0)));
    }
    // To a device that has no second engine to copy.
    c.bus.client.set_state(State::StopCopy).unwrap();
    let mut state = Vec::new();
    while let Some(piece) = Some(c.bus.client.read_data(1 << 16).unwrap()).filter(|piece| !piece.is_empty()) {
        state.extend(piece);
    }
    let other = Served::with(2, [1, 1, 1, 1, 1]);
    let there = Socket::connect(&other, &c.bus.memory, Way::Sealed);
    let go = |state: &[u8]| {
        there.reset().unwrap();
        there.set_state(State::Resuming).unwrap();
        there.write_data(state).unwrap();
        there.set_state(State::Running)
    };
    assert!(matches!(go(&state), Err(VfioUserError::Refused { .. })));
    // Nor one that was cut or changed.
    let mut changed = state.clone();
    changed[state.len() / 2] ^= 1;
    for bad in [&state[..state.len() - 1], &changed] {
        assert!(go(bad).is_err());
    }
    there.reset().unwrap();
    drop(there);
    // Here it runs on.
    c.bus.client.set_state(State::Running).unwrap();
    c.bus.poke(word, &[1]);
    assert_eq!(c.record(record).status, 1);
}

#[test]
fn a_client_that_leaves_takes_its_memory_along_and_the_next_one_is_served() {
    let mut c = client(Way::Sealed);
    let context = c.create(0, 0).unwrap();
    let word = c.put(&[0; 64]);
    let spin = Work { opcode: 0x06, source: word, ..Work::default() };
    c.bus.write(Raw::<Socket>::portal(context, 0), &spin.bytes(1, 0, 0));
    c.until("the spinner to run", |c| c.busy(context, 0, 1) == Ok((1, 0)));
    // A server has one client at a time. The next one has given no memory yet: what was under way looks for its word in vain.
    c.bus.client.close();
    c.bus.client = c.bus.served.client(Arc::new(NoMemory));
    let completed = Raw::<Socket>::doorbells(context, 0) + 0x28;
    c.until("the spinner to fail", |c| c.register(completed, 8) == 1);
    c.bus.client.dma_map(BASE, BYTES, Some((c.bus.memory.as_fd(), 0)), true, true).unwrap();
    assert_eq!(c.fence(context, 0, 1), Ok((2, items::EFAULT as u32)));
    // The context is as it was.
    c.done(context, 1, Work::default());
}

/// A ring of eight whose tail is in memory, behind it the word of a polled ring: where the ring and that word are.
fn told(c: &mut Raw<Socket>, context: u32, polled: bool) -> (u64, u64) {
    let (ring, tail) = (c.room(64 * 8), c.put(&[0, 0, 0, 0, 1, 0, 0, 0]));
    let registers = Raw::<Socket>::doorbells(context, 0);
    c.set(registers, 8, ring);
    c.set(registers + 0x08, 4, 8);
    c.set(registers + 0x38, 8, tail | u64::from(polled));
    (ring, tail)
}

/// The eventfd of a context's bell, as the region gives it.
fn bell(c: &Raw<Socket>, context: u32) -> OwnedFd {
    let mut io = c.bus.client.region_io_fds(0).unwrap();
    let at = 0x1000 + 64 * u64::from((context & 0xffff) % 16);
    let part = io.parts.iter().find(|part| part.offset == at).unwrap();
    assert_eq!((part.size, part.flags, io.parts.len()), (4, 0, 16));
    io.descriptors.remove(part.fd_index as usize)
}

/// Puts one more piece of work into a ring.
fn put_in(c: &mut Raw<Socket>, (ring, tail): (u64, u64), number: u32, counter: u64) {
    let add = Work { opcode: 0x05, destination: counter, first: 1, ..Work::default() };
    c.bus.poke(ring + 64 * u64::from(number % 8), &add.bytes(number, 0, 0));
    c.bus.poke(tail, &(number + 1).to_le_bytes());
}

#[test]
fn a_bell_is_an_eventfd_and_work_is_done_without_a_message() {
    for way in [Way::Sealed, Way::File, Way::Messages] {
        let mut c = client(way);
        let context = c.create(0, 0).unwrap();
        let (ring, counter) = (told(&mut c, context, false), c.put(&[0; 64]));
        let mut number = 0;
        for leg in 0..3 {
            let event = bell(&c, context);
            for _ in 0..20 {
                put_in(&mut c, ring, number, counter);
                number += 1;
                rustix::io::write(&event, &1u64.to_ne_bytes()).unwrap();
                c.until("the work of the bell", |c| c.word(counter) == number);
            }
            // By message, too: where nobody has put the eventfd.
            put_in(&mut c, ring, number, counter);
            number += 1;
            c.set(0x1000 + 64 * u64::from((context & 0xffff) % 16), 4, 1);
            c.until("the work of the message", |c| c.word(counter) == number);
            // What nobody rang for comes with the move.
            c.bus.client.set_state(State::Stop).unwrap();
            put_in(&mut c, ring, number, counter);
            number += 1;
            match leg {
                0 => c.bus.client.set_state(State::Running).unwrap(),
                _ => c.bus.migrate(),
            }
            c.until("the work that was put in meanwhile", |c| c.word(counter) == number);
        }
    }
}

#[test]
fn a_client_that_fills_or_blocks_its_bells_hangs_nobody() {
    let mut c = client(Way::Sealed);
    let context = c.create(0, 0).unwrap();
    let (ring, counter) = (told(&mut c, context, false), c.put(&[0; 64]));
    let event = bell(&c, context);
    let message = 0x1000 + 64 * u64::from((context & 0xffff) % 16);
    rustix::fs::fcntl_setfl(&event, rustix::fs::OFlags::empty()).unwrap();
    let mut number = 0;
    for fill in [1, 1, u64::MAX - 10, 0] {
        put_in(&mut c, ring, number, counter);
        number += 1;
        match fill {
            // By message, while the eventfd is as good as full.
            0 => c.set(message, 4, 1),
            fill => drop(rustix::io::write(&event, &fill.to_ne_bytes()).unwrap()),
        }
        c.until("the work", |c| c.word(counter) == number);
    }
    // Drained by the client itself; and the device is made anew, and moves.
    rustix::io::read(&event, &mut [0; 8]).unwrap();
    c.bus.migrate();
    put_in(&mut c, ring, number, counter);
    c.set(message, 4, 1);
    c.until("the work after a move", |c| c.word(counter) == number + 1);
    c.bus.client.reset().unwrap();
}

#[test]
fn a_polled_ring_needs_its_bell_only_when_the_device_says_so_also_across_moves() {
    for way in [Way::Sealed, Way::File] {
        let mut c = client(way);
        let context = c.create(0, 0).unwrap();
        let (ring, counter) = (told(&mut c, context, true), c.put(&[0; 64]));
        let (mut rung, rounds) = (0, 400u32);
        let mut event = bell(&c, context);
        for number in 0..rounds {
            if number % 100 == 99 {
                // The device polls as it stops; what the client believes then goes along.
                c.bus.migrate();
                event = bell(&c, context);
            }
            put_in(&mut c, ring, number, counter);
            if c.word(ring.1 + 4) != 0 {
                rustix::io::write(&event, &1u64.to_ne_bytes()).unwrap();
                rung += 1;
            }
            c.until("polled work", |c| c.word(counter) == number + 1);
            if number % 50 == 49 {
                c.until("the device to look no longer", |c| c.word(ring.1 + 4) == 1);
            }
        }
        assert!(rung >= rounds / 50 && rung < rounds, "rung {rung} times for {rounds} pieces of work");
        println!("{way:?}: rung {rung} times for {rounds} pieces of work");
        // A context that goes takes its ring along.
        c.destroy(context).unwrap();
        rustix::io::write(&event, &1u64.to_ne_bytes()).unwrap();
        items::operations_of_every_class_run(&mut c);
    }
}

/// Everything of a client's that is not as it should be is answered, and the device goes on.
#[test]
fn hostile_descriptors_get_a_status_and_nothing_else() {
    let mut c = client(Way::Sealed);
    let context = c.create(0, 0).unwrap();
    let guard = c.put(&[0x5a; 256]);
    let end = BASE + BYTES;
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..300 {
        let address =
            |n: u64| [end - n % 64, u64::MAX - n % 64, n, 0, BASE.wrapping_sub(n % 64)][(n >> 32) as usize % 5];
        let work = Work {
            opcode: next() as u8,
            source: address(next()),
            destination: address(next()),
            size: 65 + next() as u32 % 100_000,
            word: next() as u32 % 8,
            first: next() % 3,
            second: next() % 3,
            ..Work::default()
        };
        // What waits for memory, or is for submissions, has tests of its own.
        if matches!(work.opcode, 0x02 | 0x03 | 0x06 | 0x07 | 0x09) {
            continue;
        }
        let record = c.run(context, next() % 6, work);
        assert!(record.status == 1 || record.error != 0, "{:#x}", work.opcode);
    }
    assert_eq!(c.get(guard, 256), [0x5a; 256]);
    items::operations_of_every_class_run(&mut c);
}
