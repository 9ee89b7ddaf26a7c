//! A client as the tests see it: a device on virtual time, memory, and calls, which go to the library or over a socket
//! ([`super::transport`]). Before every call the device may move: it is stopped, saved, and restored from the bytes into another device
//! with other workers, another clock and a copy of memory.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use wherry_accel::abi::{CLIENT_TIMELINE, Completion, Descriptor, Fence, extension, flag, opcode, param};
use wherry_accel::catalogue::{Catalogue, EngineId, Host};
use wherry_accel::clock::VirtualClock;
use wherry_accel::device::{Caller, Config, Device, NoInterrupts, Param};
use wherry_accel::drive::Simulation;
use wherry_accel::error::{Errno, Refused};
use wherry_accel::memory::{AddressSpace, Arena};
use wherry_accel::state::AccelUnit;
use wherry_accel::{FenceState, Tunables};
use wherry_state::{Saved, StateFile, StateUnit};

use super::transport::{Calls, Library, Ram, Socket};

pub const MS: u64 = 1_000_000;
pub const SECOND: u64 = 1000 * MS;

/// Engines of each class.
pub const COUNTS: [u16; 5] = [4, 2, 2, 3, 1];
/// Engines in all.
pub const ENGINES: usize = 12;

/// Memory: usable, then a page that is not mapped, then one that is read only, then nothing.
const BASE: u64 = 0x1_0000;
const SIZE: u64 = 0x20_0000;
/// The end of usable memory: nothing is mapped here.
pub const END: u64 = BASE + SIZE;
/// A page that can only be read.
pub const READ_ONLY: u64 = END + 0x1000;

/// The other host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum There {
    /// One worker for all engines.
    One,
    Fewer,
    More,
    /// As many as here, in another order.
    Reordered,
}

pub const HOSTS: [There; 4] = [There::One, There::Fewer, There::More, There::Reordered];

impl There {
    fn host(self) -> Host {
        match self {
            There::One => Host::uniform(1),
            There::Fewer => Host::uniform(5),
            There::More => Host::uniform(ENGINES + 7),
            There::Reordered => Host { first: 5, ..Host::uniform(ENGINES) },
        }
    }
}

/// When the device moves, and where to.
#[derive(Clone, Debug)]
pub enum Plan {
    Never,
    /// Before those calls.
    Before(BTreeMap<u64, There>),
    /// Before every so-many-th call, to all hosts in turn.
    Every(u64),
}

/// How calls reach the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// They are calls of the library.
    Library,
    /// They are messages to the function around it.
    Socket,
}

/// What is behind it.
enum Transport {
    Library(Library),
    Socket(Box<Socket>),
}

pub struct Client {
    transport: Transport,
    pub device: Arc<Device>,
    sim: Simulation,
    pub memory: Arc<dyn AddressSpace>,
    plan: Plan,
    pub calls: u64,
    pub moves: u64,
    next: u64,
    seed: u64,
}

fn arena(memory: Option<&dyn AddressSpace>) -> Arena {
    let mut arena = Arena::new(&[(BASE, SIZE)]).unwrap();
    arena.map(READ_ONLY, 0x1000, true).unwrap();
    if let Some(memory) = memory {
        copy(memory, &arena);
    }
    arena.set_writable(READ_ONLY, false);
    arena
}

/// Copies all memory.
fn copy(from: &dyn AddressSpace, to: &dyn AddressSpace) {
    for (base, bytes) in [(BASE, SIZE), (READ_ONLY, 0x1000)] {
        let mut content = vec![0; bytes as usize];
        from.read(base, &mut content).unwrap();
        to.write(base, &content).unwrap();
    }
}

fn clock(start: u64) -> Arc<VirtualClock> {
    let clock = Arc::new(VirtualClock::default());
    clock.advance_to(start);
    clock
}

fn device(host: Host, start: u64, seed: u64, memory: &Arc<Arena>) -> (Arc<Device>, Simulation) {
    let clock = clock(start);
    let catalogue = Catalogue::with_counts(COUNTS).unwrap();
    let config = Config { catalogue, host, clock: clock.clone(), notify: Arc::new(NoInterrupts), seed };
    let device = Arc::new(Device::new(config).unwrap());
    device.set_space(0, memory.clone());
    device.set_space(1, memory.clone());
    let sim = Simulation::new(device.clone(), clock);
    (device, sim)
}

impl Client {
    pub fn new(way: Way, plan: Plan) -> Self {
        let (host, start, seed) = (Host::uniform(ENGINES), 5, 1);
        let (transport, device, sim, memory) = match way {
            Way::Library => {
                let memory = Arc::new(arena(None));
                let (device, sim) = device(host, start, seed, &memory);
                (Transport::Library(Library(device.clone())), device, sim, memory as Arc<dyn AddressSpace>)
            }
            Way::Socket => {
                let (memory, clock) = (Arc::new(Ram::new(BASE)), clock(start));
                let socket = Socket::new(host, clock.clone(), seed, memory.clone());
                let device = socket.device();
                let sim = Simulation::new(device.clone(), clock);
                (Transport::Socket(Box::new(socket)), device, sim, memory as Arc<dyn AddressSpace>)
            }
        };
        Self { transport, device, sim, memory, plan, calls: 0, moves: 0, next: BASE, seed }
    }

    /// Every call begins here.
    fn call(&mut self) -> &dyn Calls {
        let number = self.calls;
        self.calls += 1;
        let there = match &self.plan {
            Plan::Never => None,
            Plan::Before(calls) => calls.get(&number).copied(),
            Plan::Every(calls) if number.is_multiple_of(*calls) => Some(HOSTS[(number / calls) as usize % HOSTS.len()]),
            Plan::Every(_) => None,
        };
        if let Some(there) = there {
            self.moves += 1;
            self.seed += 77;
            match &self.transport {
                Transport::Library(_) => self.migrate(there),
                Transport::Socket(_) => self.migrate_process(there),
            }
        }
        match &self.transport {
            Transport::Library(library) => library,
            Transport::Socket(socket) => &**socket,
        }
    }

    /// Clock time at the other host.
    fn start_there(&self) -> u64 {
        1_000_000_007 * (self.moves % 5)
    }

    /// To another process: by the states of the function's migration.
    fn migrate_process(&mut self, there: There) {
        let Transport::Socket(here) = &self.transport else { panic!("no process") };
        // The workers of this process are this test's: they give back what they have.
        self.device.begin_stop();
        self.sim.finish();
        let state = here.save();
        let (memory, clock) = (Arc::new(Ram::new(BASE)), clock(self.start_there()));
        copy(&*self.memory, &*memory);
        let socket = Socket::new(there.host(), clock.clone(), self.seed, memory.clone());
        socket.load(&state);
        assert!(socket.save() == state, "what was restored saves as it was");
        socket.go_on();
        self.device = socket.device();
        self.sim = Simulation::new(self.device.clone(), clock);
        self.memory = memory;
        self.transport = Transport::Socket(Box::new(socket));
    }

    fn migrate(&mut self, there: There) {
        let unit = AccelUnit::new(self.device.clone(), None, 0);
        unit.begin_stop().unwrap();
        self.sim.finish();
        unit.finish_stop(Instant::now()).unwrap();
        let Saved::Section(section) = unit.save().unwrap() else { panic!("nothing saved") };
        let file = StateFile { sections: vec![section] };
        file.check().unwrap();

        let memory = Arc::new(arena(Some(&*self.memory)));
        let (device, sim) = device(there.host(), self.start_there(), self.seed, &memory);
        self.memory = memory;
        let unit = AccelUnit::new(device.clone(), None, 0);
        unit.restore(&file.sections[0]).unwrap();
        let Saved::Section(again) = unit.save().unwrap() else { panic!("nothing saved") };
        assert!(again.bytes == file.sections[0].bytes, "what was restored saves as it was");
        unit.start().unwrap();
        self.transport = Transport::Library(Library(device.clone()));
        (self.device, self.sim) = (device, sim);
    }

    // ---- memory, which is the client's own and no call ----

    /// Fresh memory, on a cache line.
    pub fn alloc(&mut self, bytes: u64) -> u64 {
        let at = self.next;
        self.next += bytes.next_multiple_of(64);
        assert!(self.next <= END - 0x2000, "the test uses too much memory");
        at
    }

    pub fn put(&mut self, bytes: &[u8]) -> u64 {
        let at = self.alloc(bytes.len() as u64);
        self.memory.write(at, bytes).unwrap();
        at
    }

    pub fn store(&self, at: u64, value: u32) {
        self.memory.write(at, &value.to_le_bytes()).unwrap();
    }

    pub fn load(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.memory.read(at, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    }

    pub fn load_u64(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read(at, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    pub fn record(&self, at: u64) -> Completion {
        let mut bytes = [0; 32];
        self.memory.read(at, &mut bytes).unwrap();
        Completion::decode(&bytes)
    }

    // ---- calls ----

    pub fn create(&mut self) -> u32 {
        self.try_create(Caller::PRIVILEGED, 0, 0).unwrap()
    }

    pub fn try_create(&mut self, caller: Caller, flags: u32, extensions: u64) -> Result<u32, Refused> {
        self.call().create(caller, flags, extensions)
    }

    pub fn destroy(&mut self, context: u32) {
        self.call().destroy(context).unwrap();
    }

    pub fn set(&mut self, context: u32, param: u64, size: u32, value: u64) -> Result<(), Errno> {
        let param = Param { context, size, param, value };
        self.call().set(Caller::PRIVILEGED, &param).map_err(|refused| refused.errno)
    }

    pub fn set_plain(&mut self, context: u32, param: u64, size: u32, value: u64) -> Result<(), Errno> {
        let param = Param { context, size, param, value };
        self.call().set(Caller::PLAIN, &param).map_err(|refused| refused.errno)
    }

    /// (size, value) as answered.
    pub fn get(&mut self, context: u32, param: u64, size: u32, value: u64) -> Result<(u32, u64), Errno> {
        let mut param = Param { context, size, param, value };
        self.call().get(&mut param).map_err(|refused| refused.errno)?;
        Ok((param.size, param.value))
    }

    pub fn priority(&mut self, context: u32, priority: i64) {
        self.set(context, param::PRIORITY, 0, priority as u64).unwrap();
    }

    pub fn submit(&mut self, context: u32, slot: u32, d: Descriptor) -> Result<Fence, Errno> {
        self.call().submit(context, slot, &d).map_err(|refused| refused.errno)
    }

    pub fn state(&mut self, fence: Fence) -> FenceState {
        self.call().fence(fence).unwrap()
    }

    pub fn busy(&mut self, fence: Fence) -> (u32, u32) {
        self.call().busy(fence).unwrap()
    }

    pub fn advance(&mut self, context: u32, value: u64) {
        self.call().advance(context, value).unwrap();
    }

    pub fn run_for(&mut self, nanoseconds: u64) {
        self.call();
        self.sim.run_for(nanoseconds);
    }

    pub fn wait(&mut self, fence: Fence, nanoseconds: u64) -> FenceState {
        self.call();
        self.sim.wait(fence, nanoseconds)
    }

    /// Waits for a fence that must be signalled without an error.
    pub fn finish(&mut self, fence: Fence) {
        assert_eq!(self.wait(fence, 10 * SECOND), FenceState::Signalled, "waited 10 virtual seconds for {fence}");
    }

    pub fn tune(&mut self, engine: EngineId, tunables: Tunables) {
        self.call().tune(engine, tunables).unwrap();
    }

    pub fn now(&self) -> u64 {
        self.device.now()
    }

    /// Busy nanoseconds of all engines.
    pub fn busy_times(&mut self) -> Vec<u64> {
        self.call().busy_times()
    }

    /// Runs for a while; how busy each engine was meanwhile, from 0 to 1.
    pub fn measure(&mut self, nanoseconds: u64) -> Vec<f64> {
        let before = self.busy_times();
        let begin = self.now();
        self.run_for(nanoseconds);
        let (after, end) = (self.busy_times(), self.now());
        before.iter().zip(after).map(|(b, a)| (a - b) as f64 / (end - begin) as f64).collect()
    }

    /// Sets a map and gives its address.
    pub fn map(&mut self, context: u32, slots: &[u32], extensions: u64) -> u64 {
        let at = self.put(&map_bytes(slots, extensions));
        assert_eq!(self.set(context, param::ENGINES, 8 + 4 * slots.len() as u32, at), Ok(()));
        at
    }

    /// Writes a chain of extension nodes; the address of the first.
    pub fn chain(&mut self, nodes: &[Vec<u8>]) -> u64 {
        let mut next = 0u64;
        for node in nodes.iter().rev() {
            let mut node = node.clone();
            node[0..8].copy_from_slice(&next.to_le_bytes());
            next = self.put(&node);
        }
        next
    }

    /// A context whose slot 0 balances over engines of a class, and whose others are those engines.
    pub fn balanced(&mut self, class: u16) -> u32 {
        let siblings = engines_of(class);
        let context = self.create();
        let chain = self.chain(&[balance(0, &siblings)]);
        let slots: Vec<u32> = std::iter::once(GAP).chain(siblings).collect();
        self.map(context, &slots, chain);
        context
    }

    // ---- work ----

    /// A batch of descriptors as a submission.
    pub fn batch(&mut self, descriptors: &[Descriptor]) -> Descriptor {
        let bytes: Vec<u8> = descriptors.iter().flat_map(|d| d.encode()).collect();
        let at = self.put(&bytes);
        Descriptor::new(opcode::BATCH, at, 0, descriptors.len() as u32)
    }

    /// A batch that spins until its word is set; the submission, and the word.
    pub fn spinner(&mut self) -> (Descriptor, u64) {
        self.spinner_with(0)
    }

    pub fn spinner_with(&mut self, flags: u32) -> (Descriptor, u64) {
        let word = self.alloc(8);
        let spin = Descriptor::new(opcode::SPIN, word, 0, 0).flagged(flags);
        (self.batch(&[spin]), word)
    }

    /// Submits a spinner; its fence and its word.
    pub fn spin(&mut self, context: u32, slot: u32) -> (Fence, u64) {
        let (batch, word) = self.spinner();
        (self.submit(context, slot, batch).unwrap(), word)
    }

    /// Submits a spinner that may not be pre-empted.
    pub fn hog(&mut self, context: u32, slot: u32) -> (Fence, u64) {
        let (batch, word) = self.spinner_with(flag::NO_PREEMPT);
        (self.submit(context, slot, batch).unwrap(), word)
    }

    /// A request that does nothing.
    pub fn nop(&mut self, context: u32, slot: u32) -> Fence {
        self.submit(context, slot, Descriptor::new(opcode::NOP, 0, 0, 0)).unwrap()
    }

    /// A parallel submission of batches.
    pub fn gang(&mut self, batches: &[Descriptor]) -> Descriptor {
        let mut list = Vec::new();
        for batch in batches {
            list.extend(batch.source.to_le_bytes());
            list.extend(batch.size.to_le_bytes());
            list.extend([0; 4]);
        }
        let at = self.put(&list);
        Descriptor::new(opcode::PARALLEL, at, 0, batches.len() as u32)
    }
}

/// A point of the client's own timeline.
pub fn client_fence(context: u32, seq: u64) -> Fence {
    Fence { context, slot: CLIENT_TIMELINE, seq }
}

pub const GAP: u32 = 0xffff_ffff;

/// (class, instance) as a word.
pub fn engine(class: u16, instance: u16) -> u32 {
    u32::from(class) | u32::from(instance) << 16
}

/// The engines of a class, as words.
pub fn engines_of(class: u16) -> Vec<u32> {
    (0..COUNTS[usize::from(class)]).map(|instance| engine(class, instance)).collect()
}

/// All engines, as words.
pub fn all_engines() -> Vec<u32> {
    (0..5).flat_map(engines_of).collect()
}

/// Index in the catalogue of the first engine of a class.
pub fn first_of(class: u16) -> usize {
    COUNTS[..usize::from(class)].iter().map(|count| usize::from(*count)).sum()
}

/// Classes with at least two engines.
pub fn wide_classes() -> impl Iterator<Item = u16> {
    (0..5).filter(|class| COUNTS[usize::from(*class)] > 1)
}

pub fn map_bytes(slots: &[u32], extensions: u64) -> Vec<u8> {
    extensions.to_le_bytes().into_iter().chain(slots.iter().flat_map(|slot| slot.to_le_bytes())).collect()
}

fn node(name: u32, rest: &[u8], engines: &[u32]) -> Vec<u8> {
    let mut node = vec![0; 32];
    node[8..12].copy_from_slice(&name.to_le_bytes());
    node.extend(rest);
    node.extend(engines.iter().flat_map(|engine| engine.to_le_bytes()));
    node
}

pub fn balance(index: u16, siblings: &[u32]) -> Vec<u8> {
    let mut rest = [0; 16];
    rest[0..2].copy_from_slice(&index.to_le_bytes());
    rest[2..4].copy_from_slice(&(siblings.len() as u16).to_le_bytes());
    node(extension::LOAD_BALANCE, &rest, siblings)
}

pub fn bond(index: u16, master: u32, engines: &[u32]) -> Vec<u8> {
    let mut rest = [0; 48];
    rest[0..4].copy_from_slice(&master.to_le_bytes());
    rest[4..6].copy_from_slice(&index.to_le_bytes());
    rest[6..8].copy_from_slice(&(engines.len() as u16).to_le_bytes());
    node(extension::BOND, &rest, engines)
}

pub fn parallel(index: u16, width: u16, siblings: u16, engines: &[u32]) -> Vec<u8> {
    let mut rest = [0; 40];
    for (at, value) in [(0, index), (2, width), (4, siblings)] {
        rest[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    node(extension::PARALLEL, &rest, engines)
}

pub fn set_param(param: u64, size: u32, value: u64) -> Vec<u8> {
    let mut rest = [0; 24];
    rest[4..8].copy_from_slice(&size.to_le_bytes());
    rest[8..16].copy_from_slice(&param.to_le_bytes());
    rest[16..24].copy_from_slice(&value.to_le_bytes());
    node(extension::SET_PARAM, &rest, &[])
}

pub fn clone(id: u32, flags: u32) -> Vec<u8> {
    let mut rest = [0; 16];
    rest[0..4].copy_from_slice(&id.to_le_bytes());
    rest[4..8].copy_from_slice(&flags.to_le_bytes());
    node(extension::CLONE, &rest, &[])
}

pub fn add(at: u64, value: u64) -> Descriptor {
    Descriptor::new(opcode::ADD, 0, at, 0).with(0, value, 0)
}

pub fn store(at: u64, value: u64) -> Descriptor {
    Descriptor::new(opcode::STORE, 0, at, 0).with(0, value, 0)
}

pub fn stamp(at: u64) -> Descriptor {
    Descriptor::new(opcode::TIMESTAMP, 0, at, 0)
}

/// Spins until the word is no longer 0.
pub fn spin(word: u64) -> Descriptor {
    Descriptor::new(opcode::SPIN, word, 0, 0)
}

/// Waits until the word is `value`.
pub fn poll(word: u64, value: u32) -> Descriptor {
    Descriptor::new(opcode::WAIT, word, 0, 0).with(0, value.into(), u64::MAX)
}

pub fn class_bit(class: u16) -> u32 {
    1 << class
}

impl Client {
    /// Writes what fits before the end of memory.
    pub fn memory_write_until_end(&self, at: u64, bytes: &[u8]) {
        let fits = bytes.len().min((END - at) as usize);
        self.memory.write(at, &bytes[..fits]).unwrap();
    }

    pub fn memory_put_u64(&self, at: u64, value: u64) {
        self.memory.write(at, &value.to_le_bytes()).unwrap();
    }
}
