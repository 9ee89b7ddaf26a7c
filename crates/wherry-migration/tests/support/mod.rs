//! A machine without KVM: guests are threads that write to RAM, the dirty log is a bitmap with write protection as KVM
//! has it (`sources`), and units fail when they are told to. `world` moves it between two hosts.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]
#![expect(unsafe_code, reason = "the fake guest writes to RAM by raw pointer, as a guest does")]

pub mod proxy;
mod sources;
mod stream;
mod world;

use std::collections::BTreeSet;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use wherry_fault::FaultService;
use wherry_handover::{KeptId, Registry};
use wherry_memory::{Block, BlockId, BlockSpec, DirtySource, FreePages, GRANULE, PageSize, Ram, VmmWrites};
use wherry_migration::Journey;
use wherry_migration::machine::{
    BlockDescription, Builder, Machine, MachineDescription, MachineError, Refusal, VcpuThread, Wants,
};
use wherry_migration::testpoint::Point;
use wherry_migration::update::{Keep, RAM, Successor};
use wherry_state::{Saved, SavedState, Section, StateStream, StateUnit, UnitError, UnitId, Units};

#[allow(unused_imports, reason = "each test binary uses a part of it")]
pub use sources::{FakeFree, FakeLog};
#[allow(unused_imports, reason = "each test binary uses a part of it")]
pub use stream::FakeStream;
#[allow(unused_imports, reason = "each test binary uses a part of it")]
pub use world::{Received, Sent, Wire, World, short};

/// A small random number generator.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// How the guest writes.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Writes a second; 0: none.
    pub rate: u64,
    /// Only the first so many pages of block 0.
    pub pages: u64,
    /// One write in so many makes its page zero again; 0: none.
    pub zero_one_in: u64,
}

impl Load {
    pub const NONE: Load = Load { rate: 0, pages: 1, zero_one_in: 0 };
}

struct Gate {
    running: bool,
    /// Guests that are in the middle of a write or before the gate.
    active: bool,
    quit: bool,
}

/// What units are told to fail at, and what they were asked.
#[derive(Default)]
pub struct Script {
    pub fail: Mutex<BTreeSet<&'static str>>,
    pub log: Mutex<Vec<String>>,
    /// Page of block 0 that restoring the CPU reads through the guest map, plus 1; 0: none.
    touch: AtomicU64,
}

impl Script {
    pub fn touch_on_restore(&self, page: u64) {
        self.touch.store(page + 1, Ordering::SeqCst);
    }

    pub fn fail(&self, step: &'static str) {
        self.fail.lock().unwrap().insert(step);
    }

    fn step(&self, step: &'static str) -> Result<(), UnitError> {
        self.log.lock().unwrap().push(step.into());
        if self.fail.lock().unwrap().contains(step) {
            Err(UnitError::failed(format!("{step} fails as told")))
        } else {
            Ok(())
        }
    }

    pub fn count(&self, step: &str) -> usize {
        self.log.lock().unwrap().iter().filter(|l| *l == step).count()
    }
}

/// The fake guest's registers: how often it wrote, and its random seed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CpuState {
    #[prost(uint64, tag = "1")]
    pub writes: u64,
    #[prost(uint64, tag = "2")]
    pub seed: u64,
    #[prost(bytes = "vec", tag = "3")]
    pub bulk: Vec<u8>,
}

impl SavedState for CpuState {
    const SCHEMA: u32 = 1;
}

pub struct Cpu {
    ram: Arc<Ram>,
    log: Arc<FakeLog>,
    gate: Mutex<Gate>,
    changed: Condvar,
    state: Mutex<CpuState>,
    load: Mutex<Load>,
    throttle: AtomicU8,
    pub script: Arc<Script>,
}

impl Cpu {
    /// Writes pages until it is told to quit; never with the gate closed.
    fn run(&self) {
        loop {
            let load = *self.load.lock().unwrap();
            {
                let mut gate = self.gate.lock().unwrap();
                gate.active = false;
                self.changed.notify_all();
                while !gate.running && !gate.quit {
                    gate = self.changed.wait(gate).unwrap();
                }
                if gate.quit {
                    return;
                }
                gate.active = true;
            }
            let begun = Instant::now();
            let throttle = u64::from(self.throttle.load(Ordering::Relaxed));
            let rate = load.rate * (100 - throttle) / 100;
            for _ in 0..(rate / 1000).max(u64::from(rate > 0)) {
                self.write(load);
            }
            std::thread::sleep(Duration::from_millis(1).saturating_sub(begun.elapsed()));
        }
    }

    fn write(&self, load: Load) {
        let block = &self.ram.blocks()[0];
        let mut state = self.state.lock().unwrap();
        let mut random = Random(state.seed);
        let page = random.below(load.pages);
        let zero = load.zero_one_in > 0 && random.below(load.zero_one_in) == 0;
        state.writes += 1;
        state.seed = random.0;
        let value = if zero { 0 } else { state.writes };
        drop(state);
        let at = block.guest_map().wrapping_add((page * GRANULE) as usize).cast::<u64>();
        for n in 0..(GRANULE / 8) as usize {
            // SAFETY: inside the guest map.
            unsafe { at.add(n).write_volatile(if zero { 0 } else { value ^ n as u64 }) };
        }
        self.log.mark(block.spec().id, page);
    }

    pub fn is_running(&self) -> bool {
        self.gate.lock().unwrap().running
    }

    pub fn writes(&self) -> u64 {
        self.state.lock().unwrap().writes
    }
}

struct CpuUnit(Arc<Cpu>);

impl StateUnit for CpuUnit {
    fn id(&self) -> UnitId {
        UnitId::new("vcpu", 0)
    }
    fn depends_on(&self) -> &[&str] {
        &["board"]
    }
    fn schema(&self) -> u32 {
        CpuState::SCHEMA
    }
    fn drain(&self, _: Instant) -> Result<(), UnitError> {
        self.0.script.step("drain")
    }
    fn undrain(&self) -> Result<(), UnitError> {
        self.0.script.step("undrain")
    }
    fn begin_stop(&self) -> Result<(), UnitError> {
        self.0.script.step("begin-stop")?;
        self.0.gate.lock().unwrap().running = false;
        Ok(())
    }
    fn finish_stop(&self, deadline: Instant) -> Result<(), UnitError> {
        self.0.script.step("finish-stop")?;
        let gate = self.0.gate.lock().unwrap();
        let left = deadline.saturating_duration_since(Instant::now());
        let (gate, late) = self.0.changed.wait_timeout_while(gate, left, |g| g.active && !g.quit).unwrap();
        drop(gate);
        if late.timed_out() { Err(UnitError::Deadline("the fake guest".into())) } else { Ok(()) }
    }
    fn save(&self) -> Result<Saved, UnitError> {
        self.0.script.step("save")?;
        assert!(!self.0.is_running(), "saved while it runs");
        Ok(Saved::Section(self.0.state.lock().unwrap().to_section(&self.id())))
    }
    fn restore(&self, section: &Section) -> Result<(), UnitError> {
        self.0.script.step("restore")?;
        if let Some(page) = self.0.script.touch.load(Ordering::SeqCst).checked_sub(1) {
            let at = self.0.ram.blocks()[0].guest_map().wrapping_add((page * GRANULE) as usize);
            // SAFETY: inside the guest map. It blocks until the page is served.
            assert_ne!(unsafe { at.cast::<u64>().read_volatile() }, 0, "the page that was touched is empty");
            self.0.script.step("touched")?;
        }
        *self.0.state.lock().unwrap() = CpuState::from_section(section)?;
        Ok(())
    }
    fn start(&self) -> Result<(), UnitError> {
        self.0.script.step("start")?;
        self.0.gate.lock().unwrap().running = true;
        self.0.changed.notify_all();
        Ok(())
    }
}

/// A unit that the CPU needs and that has no state.
struct Board(Arc<Script>);

impl StateUnit for Board {
    fn id(&self) -> UnitId {
        UnitId::new("board", 0)
    }
    fn depends_on(&self) -> &[&str] {
        &[]
    }
    fn schema(&self) -> u32 {
        0
    }
    fn drain(&self, _: Instant) -> Result<(), UnitError> {
        Ok(())
    }
    fn undrain(&self) -> Result<(), UnitError> {
        Ok(())
    }
    fn begin_stop(&self) -> Result<(), UnitError> {
        Ok(())
    }
    fn finish_stop(&self, _: Instant) -> Result<(), UnitError> {
        Ok(())
    }
    fn save(&self) -> Result<Saved, UnitError> {
        Ok(Saved::Nothing)
    }
    fn restore(&self, _: &Section) -> Result<(), UnitError> {
        Ok(())
    }
    fn start(&self) -> Result<(), UnitError> {
        self.0.step("start-board")
    }
}

/// The machine.
pub struct FakeMachine {
    description: MachineDescription,
    faults: Result<Arc<FaultService>, String>,
    ram: Arc<Ram>,
    units: Arc<Units>,
    sources: Arc<[Arc<dyn DirtySource>]>,
    pub streams: [Arc<FakeStream>; 3],
    /// Units have streams: always where it arrives, elsewhere if a test says so.
    pub has_streams: AtomicBool,
    pub log: Arc<FakeLog>,
    pub free: Arc<FakeFree>,
    pub cpu: Arc<Cpu>,
    pub script: Arc<Script>,
    pub locked: AtomicBool,
    pub blockers: Mutex<Vec<String>>,
    pub registry: Arc<Registry>,
    guest: Mutex<Option<JoinHandle<()>>>,
    thread: u32,
}

pub fn block(id: u16, guest_base: u64, size: u64) -> BlockSpec {
    BlockSpec { id: BlockId(id), guest_base, size, page_size: PageSize::Base }
}

impl FakeMachine {
    pub fn new(vm: [u8; 16], blocks: &[BlockSpec], script: Arc<Script>) -> Arc<Self> {
        Self::build(vm, blocks, script, Err("it was not built to arrive".into()))
    }

    fn build(vm: [u8; 16], blocks: &[BlockSpec], script: Arc<Script>, faults: Result<(), String>) -> Arc<Self> {
        Self::with_ram(vm, Ram::create(blocks).unwrap(), script, faults, Registry::new())
    }

    fn with_ram(
        vm: [u8; 16],
        ram: Ram,
        script: Arc<Script>,
        faults: Result<(), String>,
        registry: Arc<Registry>,
    ) -> Arc<Self> {
        let ram = Arc::new(ram);
        let faults = faults.and_then(|()| {
            let faults = FaultService::new(ram.clone()).map_err(|e| e.to_string())?;
            faults.register_guest_maps().map_err(|e| e.to_string())?;
            Ok(faults)
        });
        let log = Arc::new(FakeLog::new(&ram));
        let cpu = Arc::new(Cpu {
            ram: ram.clone(),
            log: log.clone(),
            gate: Mutex::new(Gate { running: false, active: false, quit: false }),
            changed: Condvar::new(),
            state: Mutex::new(CpuState { writes: 0, seed: 0x9e37_79b9_7f4a_7c15, bulk: vec![] }),
            load: Mutex::new(Load::NONE),
            throttle: AtomicU8::new(0),
            script: script.clone(),
        });
        let units: Vec<Arc<dyn StateUnit>> = vec![Arc::new(CpuUnit(cpu.clone())), Arc::new(Board(script.clone()))];
        let units = Arc::new(Units::new(units).unwrap());
        let mut description = MachineDescription::of(&ram, &units);
        description.vm = vm.to_vec();
        description.name = "fake".into();
        let sources: Vec<Arc<dyn DirtySource>> = vec![log.clone(), Arc::new(VmmWrites::new(ram.clone()))];
        let runner = cpu.clone();
        let (tell, told) = std::sync::mpsc::channel();
        let run = move || {
            tell.send(rustix::thread::gettid().as_raw_nonzero().get() as u32).unwrap();
            runner.run();
        };
        let guest = std::thread::Builder::new().name("fake-guest".into()).spawn(run).unwrap();
        Arc::new(Self {
            description,
            faults,
            ram,
            units,
            sources: sources.into(),
            has_streams: AtomicBool::new(false),
            streams: [0, 1, 2].map(|n| FakeStream::new(cpu.clone(), n)),
            log,
            free: Arc::default(),
            cpu,
            script,
            locked: AtomicBool::new(false),
            blockers: Mutex::default(),
            registry,
            guest: Mutex::new(Some(guest)),
            thread: told.recv().unwrap(),
        })
    }

    /// Starts it, as a VMM does.
    pub fn power_on(&self, load: Load) {
        *self.cpu.load.lock().unwrap() = load;
        self.locked.store(true, Ordering::SeqCst);
        self.units.start().unwrap();
        self.script.log.lock().unwrap().clear();
    }

    /// Does at rest what the guest elsewhere did since it left, until it has written so often.
    pub fn replay_until(&self, writes: u64, load: Load) {
        assert!(!self.is_running());
        while self.cpu.writes() < writes {
            self.cpu.write(load);
        }
    }

    pub fn set_load(&self, load: Load) {
        *self.cpu.load.lock().unwrap() = load;
    }

    pub fn set_bulk_state(&self, bytes: usize) {
        self.cpu.state.lock().unwrap().bulk = vec![0x5a; bytes];
    }

    /// Fills pages of a block with random content, before it is powered on.
    pub fn fill(&self, block: usize, pages: Range<u64>, seed: u64) {
        let mut random = Random(seed | 1);
        let block = &self.ram.blocks()[block];
        for page in pages {
            let at = block.engine_range(page * GRANULE, GRANULE).unwrap().cast::<u64>();
            for n in 0..512 {
                // SAFETY: inside the engine map.
                unsafe { at.add(n).write_volatile(random.next()) };
            }
        }
    }

    /// Makes pages of a block allocated and zero.
    pub fn zero(&self, block: usize, pages: Range<u64>) {
        let block = &self.ram.blocks()[block];
        for page in pages {
            let at = block.engine_range(page * GRANULE, GRANULE).unwrap();
            // SAFETY: inside the engine map.
            unsafe { at.write_bytes(0, GRANULE as usize) };
        }
    }

    pub fn is_running(&self) -> bool {
        self.cpu.is_running()
    }

    pub fn throttle_percent(&self) -> u8 {
        self.cpu.throttle.load(Ordering::SeqCst)
    }

    pub fn allocated_pages(&self) -> u64 {
        self.ram
            .blocks()
            .iter()
            .flat_map(|b| b.data_runs(0..b.spec().size).collect::<Vec<_>>())
            .map(|run| run.map(|r| (r.end - r.start) / GRANULE).unwrap())
            .sum()
    }
}

impl Drop for FakeMachine {
    fn drop(&mut self) {
        self.cpu.gate.lock().unwrap().quit = true;
        self.cpu.changed.notify_all();
        // It may wait for a page that will never come.
        if let Ok(faults) = &self.faults {
            let _ = faults.unregister_untouched();
        }
        if let Some(guest) = self.guest.lock().unwrap().take() {
            let _ = guest.join();
        }
    }
}

impl Machine for FakeMachine {
    fn description(&self) -> MachineDescription {
        self.description.clone()
    }
    fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }
    fn units(&self) -> Arc<Units> {
        self.units.clone()
    }
    fn streams(&self) -> Vec<Arc<dyn StateStream>> {
        let streams = self.streams.iter().filter(|_| self.has_streams.load(Ordering::SeqCst));
        streams.map(|stream| stream.clone() as Arc<dyn StateStream>).collect()
    }
    fn dirty_sources(&self) -> Arc<[Arc<dyn DirtySource>]> {
        self.sources.clone()
    }
    fn free_pages(&self) -> Option<Arc<dyn FreePages>> {
        Some(self.free.clone())
    }
    fn faults(&self) -> Result<&Arc<FaultService>, String> {
        self.faults.as_ref().map_err(String::clone)
    }
    fn hot_pages(&self) -> Vec<(BlockId, u64)> {
        // Some that exist and some that do not: the engine must take both.
        let block = self.ram.blocks()[0].spec().id;
        vec![(block, 0), (block, 77), (block, u64::MAX), (BlockId(999), 3)]
    }
    fn vcpu_threads(&self) -> Vec<VcpuThread> {
        vec![VcpuThread { index: 0, thread: self.thread }]
    }
    fn blockers(&self) -> Vec<String> {
        self.blockers.lock().unwrap().clone()
    }

    fn throttle(&self, percent: u8) {
        assert!(percent <= 99);
        self.cpu.throttle.store(percent, Ordering::SeqCst);
    }
    fn take_locks(&self) -> Result<(), MachineError> {
        self.script.step("take-locks")?;
        self.locked.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn release_locks(&self) -> Result<(), MachineError> {
        self.script.step("release-locks")?;
        self.locked.store(false, Ordering::SeqCst);
        Ok(())
    }
    fn runs_after_start(&self) -> bool {
        true
    }
}

impl Keep for FakeMachine {
    fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    fn cannot_keep(&self) -> Vec<String> {
        self.blockers.lock().unwrap().clone()
    }
}

/// Builds the machine of the process that is replaced.
#[derive(Default)]
pub struct FakeHeir {
    pub script: Arc<Script>,
    pub built: Mutex<Option<Arc<FakeMachine>>>,
    pub refuse: Vec<String>,
    /// What it claims beside RAM.
    pub claims: Vec<KeptId>,
    /// What it claimed, and what was said beside the machine.
    pub claimed: Mutex<Vec<OwnedFd>>,
    pub host: Mutex<Vec<u8>>,
}

impl Successor for FakeHeir {
    fn build(
        &self,
        d: &MachineDescription,
        registry: &Arc<Registry>,
        host: &[u8],
    ) -> Result<Arc<dyn Machine>, Refusal> {
        *self.host.lock().unwrap() = host.to_vec();
        if !self.refuse.is_empty() {
            return Err(Refusal(self.refuse.clone()));
        }
        for id in &self.claims {
            let fd = registry.inherit(id).map_err(|error| Refusal(vec![error.to_string()]))?;
            self.claimed.lock().unwrap().push(fd);
        }
        let adopted = d.blocks.iter().map(|b| {
            let fd = registry.inherit(&KeptId::new(RAM, b.id)).map_err(|error| error.to_string())?;
            Block::adopt(block(b.id as u16, b.guest_base, b.size), fd).map_err(|error| error.to_string())
        });
        let blocks = adopted.collect::<Result<Vec<_>, String>>().map_err(|error| Refusal(vec![error]))?;
        let ram = Ram::from_blocks(blocks).unwrap();
        let faults = Err("it was taken over".into());
        let vm = d.vm.clone().try_into().unwrap();
        let machine = FakeMachine::with_ram(vm, ram, self.script.clone(), faults, registry.clone());
        *self.built.lock().unwrap() = Some(machine.clone());
        Ok(machine)
    }
}

/// Builds fake machines with a given script.
pub struct FakeBuilder {
    pub script: Arc<Script>,
    pub built: Arc<Mutex<Option<Arc<FakeMachine>>>>,
    pub refuse: Vec<String>,
    /// Why the machines it builds serve no faults.
    pub no_faults: Option<String>,
    /// How often it was told that a VM runs while memory follows.
    pub runs: AtomicU32,
}

impl FakeBuilder {
    pub fn new() -> Self {
        Self { script: Arc::default(), built: Arc::default(), refuse: vec![], no_faults: None, runs: AtomicU32::new(0) }
    }
}

impl Builder for FakeBuilder {
    fn build(&self, d: &MachineDescription, wants: Wants) -> Result<Arc<dyn Machine>, Refusal> {
        if !self.refuse.is_empty() {
            return Err(Refusal(self.refuse.clone()));
        }
        let page_size = |bytes| if bytes == GRANULE { PageSize::Base } else { PageSize::Huge2M };
        let spec = |b: &BlockDescription| BlockSpec {
            page_size: page_size(b.page_size),
            ..block(b.id as u16, b.guest_base, b.size)
        };
        let specs: Vec<_> = d.blocks.iter().map(spec).collect();
        let faults = match &self.no_faults {
            Some(why) => Err(why.clone()),
            None if wants.postcopy => Ok(()),
            None => Err("not asked for".into()),
        };
        let machine = FakeMachine::build(d.vm.clone().try_into().unwrap(), &specs, self.script.clone(), faults);
        machine.has_streams.store(true, Ordering::SeqCst);
        *self.built.lock().unwrap() = Some(machine.clone());
        Ok(machine)
    }

    fn runs(&self, _: &Arc<dyn Machine>) {
        self.runs.fetch_add(1, Ordering::SeqCst);
    }
}

/// Lets the kernel hand out hugetlb pages on demand for the length of a test.
pub struct HugePages(String);

impl HugePages {
    const FILE: &str = "/proc/sys/vm/nr_overcommit_hugepages";

    pub fn permit() -> Option<Self> {
        let before = std::fs::read_to_string(Self::FILE).ok()?;
        std::fs::write(Self::FILE, "64").ok()?;
        Some(Self(before))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::FILE, &self.0);
    }
}

pub fn random_vm() -> [u8; 16] {
    use std::io::Read;
    let mut id = [0; 16];
    std::fs::File::open("/dev/urandom").unwrap().read_exact(&mut id).unwrap();
    id
}

pub fn wait_or(limit: Duration, done: impl Fn() -> bool, otherwise: impl FnOnce()) {
    let begun = Instant::now();
    while !done() {
        if begun.elapsed() > limit {
            return otherwise();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits for a condition that must come true.
pub fn await_that(what: &str, done: impl Fn() -> bool) {
    wait_or(Duration::from_secs(20), done, || panic!("waited in vain for: {what}"));
}

/// The contents of two machines, page by page; panics at the first difference.
pub fn assert_same_memory(a: &dyn Machine, b: &dyn Machine) {
    for (x, y) in a.ram().blocks().iter().zip(b.ram().blocks()) {
        assert_eq!(x.spec(), y.spec());
        let (mut p, mut q) = ([0; 4096], [0; 4096]);
        let mut runs = BTreeSet::new();
        for run in x.data_runs(0..x.spec().size).chain(y.data_runs(0..y.spec().size)) {
            let run = run.unwrap();
            runs.extend(run.start / GRANULE..run.end / GRANULE);
        }
        for page in runs {
            x.read_at(page * GRANULE, &mut p).unwrap();
            y.read_at(page * GRANULE, &mut q).unwrap();
            assert!(p == q, "block {} page {page:#x} differs", x.spec().id);
        }
    }
}

/// Calls `act` once, when the journey reaches `point`.
pub fn at(journey: &Journey, point: Point, act: impl Fn() + Send + Sync + 'static) {
    let done = AtomicBool::new(false);
    journey.set_test_hook(move |reached| {
        if reached == point && !done.swap(true, Ordering::SeqCst) {
            act();
        }
    });
}
