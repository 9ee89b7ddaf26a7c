//! A function whose owner does what a test says, on a bus with a router that remembers.
#![allow(clippy::unwrap_used, dead_code, reason = "a test that cannot go on fails; each test uses a part of this")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use vm_memory::FileOffset;
use wherry_handover::{Registry, Shelf};
use wherry_interrupt::Input;
use wherry_interrupt::fake::FakeRouter;
use wherry_memory::{Block, BlockId, BlockSpec, PageSize, Ram};
use wherry_passthrough::{
    Attention, Bell, Crew, DeviceMemory, Facts, Function, GuestMaps, HypervisorFiles, Irq, MigrationFacts, Owner,
    OwnerError, PassthroughError, PassthroughParts, RegionFacts, State,
};
use wherry_pci::bus::Bus;
use wherry_pci::{ConfigSpace, Doorbell, Doorbells};
use wherry_vfio_user::VfioUserError;

pub const RAM: u64 = 1 << 20;
pub const BAR0: u64 = 0xc000_0000;
/// Where MSI-X lies in BAR 2.
pub const TABLE: u64 = 0x1000;
pub const PIN: Input = Input(17);

/// What an owner does.
#[derive(Default)]
pub struct Script {
    /// What it was asked, in order.
    pub asked: Vec<String>,
    /// Who it signals, by vector.
    pub signals: Vec<OwnedFd>,
    pub irq: Option<Irq>,
    pub note: Option<Arc<OwnedFd>>,
    pub config: Vec<u8>,
    pub bar: Vec<u8>,
    pub state: Option<State>,
    pub data: Vec<u8>,
    pub given: usize,
    /// Of its state, what it gives while it runs.
    pub early: usize,
    pub estimate: Option<u64>,
    pub loaded: Vec<u8>,
    pub gone: bool,
    pub endless: bool,
    pub refuses_load: bool,
    pub refuses_run: bool,
    /// It takes so long to take a state.
    pub load_time: Duration,
    pub log: Vec<u64>,
}

/// An owner in this process.
pub struct FakeOwner {
    name: String,
    pub facts: Facts,
    pub script: Mutex<Script>,
    /// It takes an eventfd to be unmasked by.
    pub unmasks_by: AtomicBool,
    pub unmasked: AtomicBool,
    pub closed: AtomicBool,
    /// Another process has claimed it.
    pub inherited: bool,
    /// How many owners have to be asked to stop before any of them does.
    pub meeting: Option<Arc<Meeting>>,
    pub attention: Attention,
}

/// Some owners that wait for each other.
#[derive(Default)]
pub struct Meeting {
    pub wanted: usize,
    here: Mutex<usize>,
    all: Condvar,
}

impl Meeting {
    pub fn of(wanted: usize) -> Arc<Self> {
        Arc::new(Self { wanted, ..Self::default() })
    }

    fn wait(&self) {
        let mut here = self.here.lock().unwrap();
        *here += 1;
        self.all.notify_all();
        let (_here, late) =
            self.all.wait_timeout_while(here, Duration::from_secs(20), |here| *here < self.wanted).unwrap();
        assert!(!late.timed_out(), "the others were not asked meanwhile");
    }
}

/// Configuration space with MSI-X (4 vectors in BAR 2), MSI (2 vectors, 64 bits), PCI Express and a pin.
pub fn config() -> Vec<u8> {
    let mut bytes = vec![0u8; 256];
    bytes[0..4].copy_from_slice(&[0xf4, 0x1a, 0x10, 0x10]);
    bytes[8..12].copy_from_slice(&[1, 0, 0, 0x08]);
    (bytes[6], bytes[0x34], bytes[0x3d]) = (0x10, 0x40, 1);
    bytes[0x18] = 4;
    bytes[0x40..0x4c].copy_from_slice(&[0x11, 0x50, 3, 0, 2, 0x10, 0, 0, 2, 0x18, 0, 0]);
    bytes[0x50..0x54].copy_from_slice(&[5, 0x60, 0x82, 0]);
    bytes[0x60..0x64].copy_from_slice(&[0x10, 0, 2, 0]);
    bytes
}

impl FakeOwner {
    pub fn new(name: &str) -> Self {
        let mut facts = Facts { config: config(), intx: true, msi: 2, msix: 4, resettable: true, ..Facts::default() };
        facts.migration = Some(MigrationFacts { pre_copy: false, p2p: false });
        facts.logging = true;
        facts.bars[0].size = 0x100;
        facts.bars[2].size = 0x4000;
        let script =
            Script { config: config(), bar: vec![0x5a; 0x4000], data: vec![7; 3_000_000], ..Script::default() };
        Self {
            name: name.into(),
            facts,
            script: Mutex::new(script),
            unmasks_by: AtomicBool::new(true),
            unmasked: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            inherited: false,
            meeting: None,
            attention: Attention::default(),
        }
    }

    /// BAR 2 can be mapped, and rings at 0x20.
    pub fn with_memory(mut self) -> Self {
        let memfd = rustix::fs::memfd_create("bar", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memfd, 0x4000).unwrap();
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        self.facts.bars[2] = RegionFacts {
            size: 0x4000,
            file: Some(FileOffset::new(memfd.into(), 0)),
            areas: vec![wherry_vfio_user::payload::Area { offset: 0, size: 0x4000 }],
            bells: vec![Bell { offset: 0x20, len: 4, data: None, event: Arc::new(event) }],
        };
        self
    }

    pub fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    fn asked(&self, what: String) -> Result<MutexGuard<'_, Script>, OwnerError> {
        let mut script = self.script();
        if script.gone {
            return Err(VfioUserError::Closed { peer: self.name.clone(), what }.into());
        }
        script.asked.push(what);
        Ok(script)
    }

    fn refuse(&self, what: &str) -> OwnerError {
        let source = rustix::io::Errno::INVAL;
        VfioUserError::Refused { peer: self.name.clone(), what: what.into(), source }.into()
    }

    /// Raises a vector as the device does: to whoever it was told.
    pub fn raise(&self, vector: usize) {
        rustix::io::write(&self.script().signals[vector], &1u64.to_ne_bytes()).unwrap();
    }

    /// What it was asked since this was last called.
    pub fn take_asked(&self) -> Vec<String> {
        std::mem::take(&mut self.script().asked)
    }
}

impl Owner for FakeOwner {
    fn kind(&self) -> &'static str {
        wherry_passthrough::VFIO_USER
    }

    fn label(&self) -> String {
        "a".into()
    }

    fn hypervisor_file(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn attention(&self) -> Attention {
        self.attention.clone()
    }

    fn cannot_keep(&self) -> Option<String> {
        None
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn keep(&self, shelf: &Shelf) -> Result<(), OwnerError> {
        if self.inherited {
            assert_eq!(shelf.inherit_note("facts").unwrap(), b"facts");
        }
        self.script().note = Some(shelf.add_note("facts", b"facts").unwrap());
        Ok(())
    }

    fn is_inherited(&self) -> bool {
        self.inherited
    }

    fn rest(&self, _: Instant) -> Result<Vec<u8>, OwnerError> {
        drop(self.asked("rest".into())?);
        Ok(b"left".to_vec())
    }

    fn take(&self, saved: &[u8]) -> Result<(), OwnerError> {
        self.asked(format!("take {}", String::from_utf8_lossy(saved))).map(drop)
    }

    fn go_on(&self) {
        // One that has gone does not.
        drop(self.asked("go on".into()));
    }

    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) -> Result<(), OwnerError> {
        let script = self.asked(format!("read BAR {bar} at {offset:#x}"))?;
        data.copy_from_slice(&script.bar[offset as usize..][..data.len()]);
        Ok(())
    }

    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) -> Result<(), OwnerError> {
        let mut script = self.asked(format!("write BAR {bar} at {offset:#x}"))?;
        script.bar[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) -> Result<(), OwnerError> {
        let script = self.asked(format!("read config at {offset:#x}"))?;
        data.copy_from_slice(&script.config[offset as usize..][..data.len()]);
        Ok(())
    }

    fn write_config(&self, offset: u64, data: &[u8]) -> Result<(), OwnerError> {
        self.asked(format!("write config at {offset:#x}: {data:x?}")).map(|_| ())
    }

    fn map_dma(&self, address: u64, size: u64, _: &Arc<Block>, _: u64) -> Result<(), OwnerError> {
        self.asked(format!("map {size:#x} at {address:#x}")).map(|_| ())
    }

    fn inherit_dma(&self, _: u64, _: u64, _: &Arc<Block>, _: u64) -> Result<(), OwnerError> {
        Ok(())
    }

    fn begin_faults(&self) -> Result<OwnedFd, OwnerError> {
        Err(self.refuse("faults"))
    }

    fn map_missing(&self, _: u64, _: u64, _: &Arc<Block>, _: u64) -> Result<u64, OwnerError> {
        Err(self.refuse("faults"))
    }

    fn end_faults(&self) -> Result<(), OwnerError> {
        Ok(())
    }

    fn unmap_dma(&self, address: u64, size: u64) -> Result<(), OwnerError> {
        self.asked(format!("unmap {size:#x} at {address:#x}")).map(drop)
    }

    fn signal(&self, irq: Irq, start: u32, events: &[BorrowedFd<'_>]) -> Result<(), OwnerError> {
        let mut script = self.asked(format!("signal {irq:?} from {start}: {}", events.len()))?;
        // As the client of vfio-user: one kind is in use at a time.
        assert!(script.irq.is_none_or(|other| other == irq), "{irq:?} before {:?} was silenced", script.irq);
        script.irq = Some(irq);
        let start = start as usize;
        for (n, event) in events.iter().enumerate() {
            let event = event.try_clone_to_owned().unwrap();
            match script.signals.get_mut(start + n) {
                Some(slot) => *slot = event,
                None => script.signals.push(event),
            }
        }
        Ok(())
    }

    fn silence(&self, irq: Irq) -> Result<(), OwnerError> {
        let mut script = self.asked(format!("silence {irq:?}"))?;
        script.signals.clear();
        script.irq = None;
        Ok(())
    }

    fn unmask_by(&self, _: BorrowedFd<'_>) -> Result<bool, OwnerError> {
        drop(self.asked("unmask by".into())?);
        Ok(self.unmasks_by.load(Ordering::Acquire))
    }

    fn unmask(&self) -> Result<(), OwnerError> {
        drop(self.asked("unmask".into())?);
        self.unmasked.store(true, Ordering::Release);
        Ok(())
    }

    fn reset(&self) -> Result<(), OwnerError> {
        let mut script = self.asked("reset".into())?;
        script.state = Some(State::Running);
        script.loaded.clear();
        Ok(())
    }

    fn state(&self) -> Result<State, OwnerError> {
        Ok(self.script().state.unwrap_or(State::Running))
    }

    fn set_state(&self, state: State) -> Result<(), OwnerError> {
        let mut script = self.asked(format!("{state:?}"))?;
        // A stream that was left is begun anew.
        if matches!(state, State::PreCopy | State::Running) {
            script.given = 0;
        }
        script.state = Some(state);
        drop(script);
        if let (State::StopCopy, Some(meeting)) = (state, &self.meeting) {
            meeting.wait();
        }
        let script = self.script();
        let refused = state == State::Stop && script.refuses_load || state == State::Running && script.refuses_run;
        drop(script);
        match refused {
            true => Err(self.refuse("a state that is not its own")),
            false => Ok(()),
        }
    }

    fn read_state(&self, most: usize) -> Result<Vec<u8>, OwnerError> {
        let mut script = self.script();
        if script.gone {
            return Err(VfioUserError::Closed { peer: self.name.clone(), what: "MigDataRead".into() }.into());
        }
        if script.endless {
            return Ok(vec![1]);
        }
        let end = if script.state == Some(State::PreCopy) { script.early } else { script.data.len() };
        let piece = script.data[script.given..end].iter().take(most).copied().collect::<Vec<_>>();
        script.given += piece.len();
        Ok(piece)
    }

    fn write_state(&self, data: &[u8]) -> Result<(), OwnerError> {
        let mut script = self.asked("write state".into())?;
        script.loaded.extend_from_slice(data);
        let load_time = script.load_time;
        drop(script);
        std::thread::sleep(load_time);
        Ok(())
    }

    fn estimate(&self) -> Result<Option<u64>, OwnerError> {
        Ok(self.script().estimate)
    }

    fn start_log(&self, ranges: &[(u64, u64)]) -> Result<u64, OwnerError> {
        drop(self.asked(format!("start log {ranges:x?}"))?);
        Ok(4096)
    }

    fn stop_log(&self) -> Result<(), OwnerError> {
        self.asked("stop log".into()).map(|_| ())
    }

    fn read_log(&self, address: u64, bytes: u64, page: u64) -> Result<Vec<u64>, OwnerError> {
        let mut script = self.asked(format!("read log {address:#x} {bytes:#x} {page}"))?;
        let words = bytes.div_ceil(page * 64) as usize;
        let mut log = std::mem::take(&mut script.log);
        log.resize(words, 0);
        Ok(log)
    }
}

/// Remembers what is shown to the guest and what rings.
#[derive(Default)]
pub struct FakeGuest {
    pub shown: Mutex<Vec<(u64, usize)>>,
    pub bells: Mutex<Vec<Doorbell>>,
    pub files: Mutex<Vec<i32>>,
    /// Functions that are wanted back.
    pub wanted: Mutex<Vec<String>>,
}

impl GuestMaps for FakeGuest {
    fn map(&self, address: u64, memory: &Arc<DeviceMemory>) -> io::Result<u32> {
        self.shown.lock().unwrap().push((address, memory.size()));
        Ok(self.shown.lock().unwrap().len() as u32)
    }

    fn unmap(&self, map: u32) {
        self.shown.lock().unwrap()[map as usize - 1] = (0, 0);
    }
}

impl HypervisorFiles for FakeGuest {
    fn add(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.files.lock().unwrap().push(file.as_raw_fd());
        Ok(())
    }

    fn remove(&self, file: BorrowedFd<'_>) {
        self.files.lock().unwrap().retain(|other| *other != file.as_raw_fd());
    }
}

impl Doorbells for FakeGuest {
    fn attach(&self, bell: Doorbell, _: &dyn AsRawFd) -> io::Result<()> {
        self.bells.lock().unwrap().push(bell);
        Ok(())
    }

    fn detach(&self, bell: Doorbell, _: &dyn AsRawFd) -> io::Result<()> {
        self.bells.lock().unwrap().retain(|other| *other != bell);
        Ok(())
    }
}

pub struct Rig<O = FakeOwner> {
    pub owner: Arc<O>,
    pub function: Arc<Function>,
    pub router: Arc<FakeRouter>,
    pub bus: Arc<Bus>,
    pub guest: Arc<FakeGuest>,
    pub ram: Arc<Ram>,
    pub crew: Arc<Crew>,
    pub registry: Arc<Registry>,
}

impl Rig {
    pub fn new(owner: FakeOwner) -> Self {
        Self::in_crew(owner, 0, Crew::new())
    }

    pub fn in_crew(owner: FakeOwner, instance: u32, crew: Arc<Crew>) -> Self {
        Self::with(owner, instance, crew, Registry::new())
    }
}

impl<O: Owner + 'static> Rig<O> {
    pub fn with(owner: O, instance: u32, crew: Arc<Crew>, registry: Arc<Registry>) -> Self {
        let (owner, router) = (Arc::new(owner), Arc::new(FakeRouter::default()));
        let (bus, guest) = (Arc::new(Bus::new()), Arc::new(FakeGuest::default()));
        let wanting = guest.clone();
        let spec = BlockSpec { id: BlockId(0), guest_base: 0, size: RAM, page_size: PageSize::Base };
        let ram = Arc::new(Ram::create(&[spec]).unwrap());
        let parts = PassthroughParts {
            memory_bus: bus.clone(),
            io_bus: Arc::new(Bus::new()),
            doorbells: guest.clone(),
            maps: guest.clone(),
            files: guest.clone(),
            router: router.clone(),
            pin_input: PIN,
            ram: ram.clone(),
            faults: None,
            crew: crew.clone(),
            registry: registry.clone(),
            give_back: Arc::new(move |id| wanting.wanted.lock().unwrap().push(id.to_string())),
        };
        let place = |config: &mut ConfigSpace| -> Result<(), PassthroughError> {
            for index in config.bars().map(|(index, ..)| index).collect::<Vec<_>>() {
                config.set_bar(index, BAR0 + index as u64 / 2 * 0x10_0000).unwrap();
            }
            Ok(())
        };
        let function = Function::new(owner.clone(), instance, &parts, place).unwrap();
        Self { owner, function, router, bus, guest, ram, crew, registry }
    }

    pub fn write(&self, offset: u16, data: &[u8]) {
        wherry_pci::PciFunction::write_config(&*self.function, offset, data);
    }

    pub fn read(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        wherry_pci::PciFunction::read_config(&*self.function, offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Memory decoding and bus mastering; the pin is off unless wanted.
    pub fn switch_on(&self, pin: bool) {
        self.write(4, &[6, if pin { 0 } else { 4 }]);
    }

    pub fn bar2(&self) -> u64 {
        BAR0 + 0x10_0000
    }

    /// The guest sets a vector of MSI-X.
    pub fn set_entry(&self, index: u64, masked: bool) {
        let at = self.bar2() + TABLE + index * 16;
        assert!(self.bus.write(at, &0xfee0_0000u64.to_le_bytes()));
        assert!(self.bus.write(at + 8, &(0x40 + index as u32).to_le_bytes()));
        assert!(self.bus.write(at + 12, &u32::from(masked).to_le_bytes()));
    }

    /// MSI-X is switched on, and all its vectors are open.
    pub fn open_msix(&self) {
        self.switch_on(false);
        self.write(0x42, &0x8000u16.to_le_bytes());
        (0..4).for_each(|index| self.set_entry(index, false));
    }

    /// How often an input of a vector was raised.
    pub fn delivered(&self, vector: u32) -> Option<u64> {
        self.router.delivered(Input(24 + vector))
    }

    pub fn deadline(&self) -> Instant {
        Instant::now() + Duration::from_secs(20)
    }
}

/// Waits for something that another thread does.
pub fn wait_for(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "waited for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
