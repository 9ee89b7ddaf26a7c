//! The function on the bus of a machine.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use wherry_fault::FaultService;
use wherry_handover::{Registry, Shelf};
use wherry_interrupt::{Events, ForeignIntx, Input, InterruptError, Router};
use wherry_memory::Ram;
use wherry_pci::bus::Bus;
use wherry_pci::{
    BarKind, BarMap, ConfigError, ConfigSpace, Doorbells, Msi, MsiError, MsiForm, Msix, MsixError, MsixPlace,
    PciFunction, Written,
};
use wherry_state::{Once, StateUnit};

use crate::attention::{GiveBack, Listener};
use crate::bars::{Bar, GuestMaps, Window, areas};
use crate::config::{COMMAND, STATUS, STATUS_INTX, Split};
use crate::interrupts::Interrupts;
use crate::log::DmaLog;
use crate::owner::{Owner, OwnerError};
use crate::postcopy::Sharer;
use crate::stream::Place;
use crate::worker::{Crew, Member};

const EXPRESS: u8 = 0x10;
/// Device Status in that capability, and its bit.
const DEVICE_STATUS: u64 = 0x0a;
const TRANSACTIONS_PENDING: u16 = 1 << 5;
/// What a device at rest may still take for them.
const PENDING_LIMIT: Duration = Duration::from_millis(100);
const MSI: u8 = 0x05;
const MSIX: u8 = 0x11;
/// Memory type of a BAR register: 64 bits, prefetchable; ports.
const BAR_IO: u8 = 1;
const BAR_WIDE: u8 = 4;
const BAR_PREFETCHABLE: u8 = 8;

/// What a hypervisor is told of functions that the kernel has (`KVM_DEV_VFIO_FILE`): the kernel may want to know whose they are.
pub trait HypervisorFiles: Send + Sync {
    /// A function of the machine, or the group that it is of; which may be told more than once.
    fn add(&self, file: BorrowedFd<'_>) -> io::Result<()>;

    /// One that was told is no more, for as many as it was told.
    fn remove(&self, file: BorrowedFd<'_>);
}

/// What a function needs of its machine.
#[derive(Clone)]
pub struct PassthroughParts {
    /// Where memory BARs answer.
    pub memory_bus: Arc<Bus>,
    /// Where port BARs answer.
    pub io_bus: Arc<Bus>,
    /// Where what only rings is rung.
    pub doorbells: Arc<dyn Doorbells>,
    /// What shows memory of a BAR to the guest.
    pub maps: Arc<dyn GuestMaps>,
    /// What is told of functions that the kernel has.
    pub files: Arc<dyn HypervisorFiles>,
    /// Where interrupts go.
    pub router: Arc<dyn Router>,
    /// The input that the function's pin leads to.
    pub pin_input: Input,
    /// What the function may read and write.
    pub ram: Arc<Ram>,
    /// Serves faults, if memory may follow.
    pub faults: Option<Arc<FaultService>>,
    /// The functions of the machine.
    pub crew: Arc<Crew>,
    /// What is kept over a live update.
    pub registry: Arc<Registry>,
    /// Who hears that a function is wanted back by the host.
    pub give_back: GiveBack,
}

/// A function cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PassthroughError {
    /// The owner does not do what is needed.
    #[error(transparent)]
    Owner(#[from] OwnerError),
    /// Configuration space cannot be made.
    #[error("{name}: {source}")]
    Config {
        /// The device.
        name: String,
        /// Why not.
        source: ConfigError,
    },
    /// MSI-X cannot be made.
    #[error("{name}: {source}")]
    Msix {
        /// The device.
        name: String,
        /// Why not.
        source: MsixError,
    },
    /// MSI cannot be made.
    #[error("{name}: {source}")]
    Msi {
        /// The device.
        name: String,
        /// Why not.
        source: MsiError,
    },
    /// An interrupt cannot be made.
    #[error(transparent)]
    Interrupt(#[from] InterruptError),
    /// What it says of itself does not agree.
    #[error("{name}: {reason}")]
    Contradiction {
        /// The device.
        name: String,
        /// What does not agree.
        reason: String,
    },
    /// The hypervisor does not take it.
    #[error("{name}: telling the hypervisor of it: {source}")]
    Hypervisor {
        /// The device.
        name: String,
        /// Why not.
        source: io::Error,
    },
    /// A thread cannot be made.
    #[error("making a thread: {0}")]
    Thread(#[source] std::io::Error),
}

pub(crate) struct Registers {
    pub(crate) config: ConfigSpace,
    pub(crate) bars: BarMap,
}

/// A function that somebody else owns.
pub struct Function {
    owner: Arc<dyn Owner>,
    pub(crate) interrupts: Interrupts,
    split: Split,
    registers: Mutex<Registers>,
    pub(crate) instance: u32,
    pub(crate) once: Once,
    /// Where its PCI Express capability is.
    express: Option<u16>,
    pub(crate) stream: Mutex<Place>,
    pub(crate) member: Arc<Member>,
    pub(crate) crew: Arc<Crew>,
    log: Arc<DmaLog>,
    pub(crate) registry: Arc<Registry>,
    /// What its owner left when it came to rest for another process.
    pub(crate) left: Mutex<Option<Vec<u8>>>,
    pub(crate) sharer: Sharer,
    /// It has been shown the memory of the machine.
    shown: AtomicBool,
    files: Arc<dyn HypervisorFiles>,
    give_back: GiveBack,
    /// Listens to its owner while it is started.
    listener: Mutex<Option<Listener>>,
    /// The owner has gone; said once.
    lost: OnceLock<String>,
}

impl Function {
    /// A function with this owner, which is given the machine's memory; `instance` numbers the state units. `place` gives its
    /// BARs addresses.
    pub fn new<E>(
        owner: Arc<dyn Owner>,
        instance: u32,
        parts: &PassthroughParts,
        place: impl FnOnce(&mut ConfigSpace) -> Result<(), E>,
    ) -> Result<Arc<Self>, E>
    where
        E: From<PassthroughError>,
    {
        let shelf = Self::shelf(&parts.registry, owner.kind(), instance);
        let events = Events::kept(shelf.clone());
        let (mut config, split, interrupts) = make(&owner, parts, &events)?;
        let express = config.capabilities().into_iter().find(|(id, _)| *id == EXPRESS).map(|(_, at)| at);
        place(&mut config)?;
        // What is pinned stays where it is, also when it is received, or given back: so that waits until all is there.
        let waits = owner.facts().pins && parts.faults.is_some() && !owner.is_inherited();
        if !waits {
            show(&*owner, &parts.ram).map_err(PassthroughError::Owner)?;
        }
        owner.keep(&shelf).map_err(PassthroughError::Owner)?;
        if let Some(file) = owner.hypervisor_file() {
            let failed = |source| PassthroughError::Hypervisor { name: owner.name().into(), source };
            parts.files.add(file).map_err(failed)?;
        }
        let this = Arc::new_cyclic(|this: &Weak<Self>| {
            let mut bars = BarMap::default();
            for (index, kind, _) in config.bars() {
                bars.set_target(index, Arc::new(bar(this, &*owner, &interrupts, parts, index, kind)));
            }
            let name = format!("{}[{instance}]", owner.kind());
            Self {
                interrupts,
                split,
                registers: Mutex::new(Registers { config, bars }),
                instance,
                once: Once::default(),
                express,
                stream: Mutex::default(),
                member: Arc::new(Member::new(this.clone())),
                crew: parts.crew.clone(),
                log: Arc::new(DmaLog::new(name, this.clone(), parts.ram.clone())),
                registry: parts.registry.clone(),
                left: Mutex::default(),
                sharer: Sharer::new(parts.ram.clone(), parts.faults.clone()),
                shown: AtomicBool::new(!waits),
                files: parts.files.clone(),
                give_back: parts.give_back.clone(),
                listener: Mutex::default(),
                lost: OnceLock::new(),
                owner,
            }
        });
        this.member.start(instance).map_err(PassthroughError::Thread)?;
        parts.crew.join(&this.member);
        Ok(this)
    }

    /// Where its descriptors are that are kept over a live update.
    pub fn shelf(registry: &Arc<Registry>, kind: &str, instance: u32) -> Shelf {
        Shelf::new(registry.clone(), format!("{kind}{instance}"))
    }

    /// Shows it the memory of the machine, if that has waited: it is all there.
    pub(crate) fn show(&self) -> Result<(), OwnerError> {
        if self.shown.swap(true, Ordering::AcqRel) { Ok(()) } else { show(&*self.owner, self.sharer.ram()) }
    }

    /// Why another process cannot go on with it, if so.
    pub fn cannot_keep(&self) -> Option<String> {
        let gone = |why| format!("it has gone: {why}; unplug it");
        let why = self.lost.get().map(gone).or_else(|| self.owner.cannot_keep())?;
        Some(format!("{} ({why})", self.owner.name()))
    }

    /// Who owns it.
    pub fn owner(&self) -> &Arc<dyn Owner> {
        &self.owner
    }

    /// What it writes.
    pub fn log(&self) -> &Arc<DmaLog> {
        &self.log
    }

    /// Why its machine cannot be moved, if so.
    pub fn blocker(&self) -> Option<String> {
        let name = self.owner.name();
        if let Some(why) = self.lost.get() {
            return Some(format!("{name} has gone, and its state with it: {why}"));
        }
        // Another process goes on with the very device.
        if self.registry.is_leaving() {
            return None;
        }
        self.owner.facts().migration.is_none().then(|| {
            let instead = if self.owner.facts().pins { "" } else { "use a device process that can, or " };
            format!("{name} cannot give its state (no migration by STOP_COPY): {instead}unplug it")
        })
    }

    pub(crate) fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what went wrong; once, when the owner has gone.
    pub(crate) fn report(&self, what: &str, error: &OwnerError) {
        if !error.is_lost() {
            tracing::warn!(%error, "{what}");
        } else if self.lost.set(error.to_string()).is_ok() {
            tracing::error!(%error, "{what}; the device is gone, and reads as ones from now on");
            self.sharer.end();
        }
    }

    /// Nobody is to wait for it any more, and why.
    pub(crate) fn lose(&self, why: String) {
        // The first reason stays.
        let _ = self.lost.set(why);
        self.sharer.end();
    }

    /// Its owner says that it has failed. It is left alone from now on, but for a reset, after which it writes to no memory.
    pub(crate) fn fail(&self) {
        let why = "it has signalled an error that it does not recover from";
        tracing::error!(device = self.owner.name(), "{why}; it reads as ones from now on");
        self.lose(why.into());
        if self.owner.facts().resettable {
            self.note("resetting it", self.owner.reset());
        }
    }

    /// Listens to its owner, or no longer: another process is about to.
    pub(crate) fn listen(&self, on: bool) -> io::Result<()> {
        let mut listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner);
        if !on {
            *listener = None;
        } else if listener.is_none() {
            let (function, attention) = (self.member.function().clone(), self.owner.attention());
            *listener = Listener::start(function, self.id(), attention, self.give_back.clone())?;
        }
        Ok(())
    }

    /// Waits until a device at rest has no transactions pending, where it can tell.
    pub(crate) fn settle(&self) -> Result<(), String> {
        let Some(status) = self.express.map(|at| u64::from(at) + DEVICE_STATUS) else { return Ok(()) };
        let (name, begun) = (self.owner.name(), Instant::now());
        loop {
            let mut bytes = [0; 2];
            match self.owner.read_config(status, &mut bytes) {
                Ok(()) => {}
                Err(error) if error.is_lost() => return Err(error.to_string()),
                // Not all answer this at rest (libvfio-user does not).
                Err(_) => return Ok(()),
            }
            if u16::from_le_bytes(bytes) & TRANSACTIONS_PENDING == 0 {
                return Ok(());
            }
            if begun.elapsed() > PENDING_LIMIT {
                return Err(format!("{name} has transactions pending {PENDING_LIMIT:?} after it was brought to rest"));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Its machine lets it go: what was memory of the machine is that no more for its owner, and who comes next finds it as new.
    /// The guest has ended with it. An owner that does not answer is left as it is: the connection ends anyway.
    pub fn release(&self) {
        if self.is_lost() {
            return;
        }
        let released = self.interrupts.silence(&self.owner).and_then(|()| {
            let shown = self.shown.load(Ordering::Acquire);
            for block in self.sharer.ram().blocks().iter().filter(|_| shown) {
                self.owner.unmap_dma(block.spec().guest_base, block.spec().size)?;
            }
            if self.owner.facts().resettable { self.owner.reset() } else { Ok(()) }
        });
        self.note("letting it go", released);
    }

    fn note<T>(&self, what: &str, result: Result<T, OwnerError>) -> Option<T> {
        result.inspect_err(|error| self.report(what, error)).ok()
    }

    pub(crate) fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) {
        if let Some(msix) = &self.interrupts.msix {
            let place = msix.place();
            let inside = |here: u8, range: std::ops::Range<u64>| {
                (usize::from(here) == bar && range.contains(&offset)).then(|| offset - range.start)
            };
            if let Some(at) = inside(place.bar, msix.table_range()) {
                return msix.read_table(at, data);
            }
            if let Some(at) = inside(place.pending_bar, msix.pending_range()) {
                return msix.read_pending(at, data);
            }
        }
        data.fill(0xff);
        let size = self.owner.facts().bars[bar].size;
        if offset.checked_add(data.len() as u64).is_none_or(|end| end > size) || self.is_lost() {
            return;
        }
        if self.note("reading a BAR", self.owner.read_bar(bar, offset, data)).is_none() {
            data.fill(0xff);
        }
    }

    pub(crate) fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) {
        if let Some(msix) = &self.interrupts.msix {
            let (place, table, pending) = (msix.place(), msix.table_range(), msix.pending_range());
            if usize::from(place.bar) == bar && table.contains(&offset) {
                msix.write_table(offset - table.start, data);
                self.note("turning its vectors", self.interrupts.follow_table(&*self.owner));
                return;
            }
            if usize::from(place.pending_bar) == bar && pending.contains(&offset) {
                return;
            }
        }
        let size = self.owner.facts().bars[bar].size;
        let inside = offset.checked_add(data.len() as u64).is_some_and(|end| end <= size);
        if inside && !self.is_lost() {
            self.note("writing a BAR", self.owner.write_bar(bar, offset, data));
        }
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.get().is_some()
    }

    /// Follows what was written to configuration space.
    fn follow(&self, registers: &mut Registers) {
        registers.bars.follow(&registers.config);
        self.note("setting its interrupts", self.interrupts.follow(&self.owner, &registers.config));
    }

    /// What a new owner has to be told after it has taken the state of another one.
    pub(crate) fn introduce(&self) -> Result<(), OwnerError> {
        let registers = self.registers();
        let command = self.split.write(COMMAND, &[], Some(registers.config.word(COMMAND)));
        for (at, bytes) in command.writes {
            self.owner.write_config(at.into(), &bytes)?;
        }
        self.interrupts.follow(&self.owner, &registers.config)
    }

    /// A reset that the guest asked for. An owner keeps what it was told of interrupts, and knows one kind of them at a time: so
    /// it is told that there are none, and what there is then anew.
    fn reset(&self, registers: &mut Registers) {
        self.note("silencing it", self.interrupts.silence(&self.owner));
        self.note("resetting it", self.owner.reset());
        let command = registers.config.word(COMMAND);
        registers.config.write(COMMAND, &(command & !7).to_le_bytes());
        if let Some(msix) = &self.interrupts.msix {
            msix.reset(&mut registers.config);
        }
        if let Some(msi) = &self.interrupts.msi {
            msi.reset(&mut registers.config);
        }
        self.follow(registers);
    }
}

/// Shows an owner all memory, or has it know that it was shown it.
fn show(owner: &dyn Owner, ram: &Ram) -> Result<(), OwnerError> {
    ram.blocks().iter().try_for_each(|block| {
        let (address, size) = (block.spec().guest_base, block.spec().size);
        match owner.is_inherited() {
            true => owner.inherit_dma(address, size, block, 0),
            false => owner.map_dma(address, size, block, 0),
        }
    })
}

/// Our part of configuration space, and the interrupts in it.
fn make(
    owner: &Arc<dyn Owner>,
    parts: &PassthroughParts,
    events: &Events,
) -> Result<(ConfigSpace, Split, Interrupts), PassthroughError> {
    let (facts, name) = (owner.facts(), || owner.name().to_owned());
    let theirs = &facts.config;
    let (mut config, mut split) = Split::new(theirs);
    let listed = ConfigSpace::like(theirs).capabilities();
    let word = |at: usize| u16::from_le_bytes([theirs[at], theirs[at + 1]]);
    let find = |id: u8, len: usize| {
        listed
            .iter()
            .map(|(id, at)| (*id, usize::from(*at)))
            .find(|(there, at)| *there == id && at + len <= theirs.len())
    };
    for (index, bar) in facts.bars.iter().enumerate().filter(|(_, bar)| bar.size > 0) {
        let low = theirs.get(0x10 + index * 4).copied().unwrap_or(0);
        let prefetchable = low & BAR_PREFETCHABLE != 0;
        let (kind, least) = match low {
            low if low & BAR_IO != 0 => (BarKind::Io, 4),
            low if low & BAR_WIDE != 0 => (BarKind::Memory64 { prefetchable }, 16),
            _ => (BarKind::Memory32, 16),
        };
        let size = bar.size.checked_next_power_of_two().unwrap_or(u64::MAX).max(least);
        config.add_bar(index, kind, size).map_err(|source| PassthroughError::Config { name: name(), source })?;
    }
    let mut msix = None;
    if let (Some((_, at)), true) = (find(MSIX, 12), facts.msix > 0) {
        let count = (word(at + 2) & 0x7ff) + 1;
        let table = u32::from(word(at + 4)) | u32::from(word(at + 6)) << 16;
        let pending = u32::from(word(at + 8)) | u32::from(word(at + 10)) << 16;
        let place = MsixPlace {
            bar: (table & 7) as u8,
            table: table & !7,
            pending_bar: (pending & 7) as u8,
            pending: pending & !7,
        };
        if u32::from(count) != facts.msix {
            let reason = format!("MSI-X of {count} vectors in configuration space, {} by its owner", facts.msix);
            return Err(PassthroughError::Contradiction { name: name(), reason });
        }
        let made = Msix::new(parts.router.clone(), &events.of("msix"), count, place, &mut config);
        let made = made.map_err(|source| PassthroughError::Msix { name: name(), source })?;
        for (bar, range) in [(place.bar, made.table_range()), (place.pending_bar, made.pending_range())] {
            let size = facts.bars[usize::from(bar)].size;
            if range.end > size {
                let reason = format!("MSI-X at {range:x?} of BAR {bar}, which has {size:#x} bytes");
                return Err(PassthroughError::Contradiction { name: name(), reason });
            }
        }
        split.ours(at..at + 12);
        msix = Some(made);
    }
    let mut msi = None;
    if let (Some((_, at)), true) = (find(MSI, 10), facts.msi > 0) {
        let (count, form) = MsiForm::of_control(word(at + 2));
        let made = Msi::new(parts.router.clone(), &events.of("msi"), count, form, &mut config);
        let made = made.map_err(|source| PassthroughError::Msi { name: name(), source })?;
        let (at, len) = made.place();
        split.ours(at.into()..usize::from(at + len));
        msi = Some(made);
    }
    let pin = (1..=4).contains(&theirs.get(0x3d).copied().unwrap_or(0)) && facts.intx;
    if pin {
        config.set_interrupt(1, 0);
    } else {
        config.set_interrupt(0, 0);
    }
    let pin = pin.then(|| ForeignIntx::new(parts.router.clone(), &events.of("pin"), parts.pin_input)).transpose()?;
    Ok((config, split, Interrupts::new(msix, msi, pin)))
}

fn bar(
    function: &Weak<Function>,
    owner: &dyn Owner,
    interrupts: &Interrupts,
    parts: &PassthroughParts,
    index: usize,
    kind: BarKind,
) -> Bar {
    let region = &owner.facts().bars[index];
    let ours = interrupts.msix.iter().flat_map(|msix| {
        let place = msix.place();
        [(place.bar, msix.table_range()), (place.pending_bar, msix.pending_range())]
    });
    let ours: Vec<_> = ours.filter(|(bar, _)| usize::from(*bar) == index).map(|(_, range)| range).collect();
    let memory = kind != BarKind::Io;
    Bar {
        bus: Arc::downgrade(if memory { &parts.memory_bus } else { &parts.io_bus }),
        window: Arc::new(Window { function: function.clone(), bar: index }),
        areas: if memory { areas(owner.name(), region, &ours) } else { Vec::new() },
        bells: if memory { region.bells.clone() } else { Vec::new() },
        maps: parts.maps.clone(),
        doorbells: parts.doorbells.clone(),
        shown: Mutex::default(),
    }
}

impl PciFunction for Function {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let mut registers = self.registers();
        if let Some(msi) = &self.interrupts.msi {
            msi.show_pending(&mut registers.config);
        }
        let touches_status = (offset..offset + data.len() as u16).contains(&STATUS);
        if touches_status && self.interrupts.pin.is_some() && !self.is_lost() {
            let mut status = [0];
            if self.note("reading its status", self.owner.read_config(STATUS.into(), &mut status)).is_some() {
                registers.config.set_intx_status(status[0] & STATUS_INTX != 0);
            }
        }
        registers.config.read(offset, data);
        for run in self.split.runs(offset, data.len()) {
            let at = u64::from(offset) + run.start as u64;
            let bytes = &mut data[run];
            if self.is_lost() || self.note("reading its configuration", self.owner.read_config(at, bytes)).is_none() {
                bytes.fill(0xff);
            }
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let mut guard = self.registers();
        let registers = &mut *guard;
        let Written { mapping, command } = registers.config.write(offset, data);
        let command = command.then(|| registers.config.word(COMMAND));
        let passed = self.split.write(offset, data, command);
        // What becomes possible is made so before the device is told, and what ends ends after it.
        if mapping {
            registers.bars.follow(&registers.config);
        }
        if !self.is_lost() {
            for (at, bytes) in passed.writes {
                self.note("writing its configuration", self.owner.write_config(at.into(), &bytes));
            }
        }
        if passed.reset { self.reset(registers) } else { self.follow(registers) }
    }

    /// The device's own unit saves it.
    fn save_config(&self) -> Option<Vec<u8>> {
        None
    }

    fn restore_config(&self, _saved: &[u8]) -> Result<(), String> {
        Err("its configuration space belongs to another unit".into())
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        // Who waits for an answer is told that there will be none.
        self.owner.close();
        self.member.quit();
        self.sharer.end();
        self.registers().bars.unmap_all();
        if let Some(file) = self.owner.hypervisor_file() {
            self.files.remove(file);
        }
    }
}
