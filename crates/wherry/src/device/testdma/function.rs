//! The PCI function: configuration space, registers, scratch page, and the thread that does the DMA.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use wherry_guest::testdma::{
    self as abi, Form, ID, Interrupt, MAX_MSI_VECTORS, MSIX_BAR, MSIX_BYTES, MSIX_PENDING, REGISTERS_BAR,
    REGISTERS_BYTES, SCRATCH, SCRATCH_BYTES, VERSION, register, status,
};
use wherry_handover::{KeptId, Registry};
use wherry_pci::{BarKind, ConfigError, ConfigSpace, Identity};
use wherry_vfio_user::payload::{Area, IoFd, pci_irq, pci_region};
use wherry_vfio_user::server::{Irq, Kept, Region, Shared};
use wherry_vfio_user::{Bus, Description, Device, Migration};

use super::engine::{Engine, Next};
use super::faults::Faults;
use super::migration::Journey;
use super::mischief::Mischief;
use super::options::{Load, Shape};
use super::saved::valid_entries;

/// Bytes of configuration space.
pub const CONFIG_BYTES: u64 = 4096;
/// Bytes of registers that mean something.
const REGISTERS: usize = 0x100;
/// Offset of Device Status in the PCI Express capability, and Transactions Pending in it.
const DEVICE_STATUS: u16 = 0x0a;
const TRANSACTIONS_PENDING: u8 = 1 << 5;

/// What the server and the thread share.
pub struct Core {
    engine: Mutex<Engine>,
    /// How many want the engine beside the thread: it lets them go first.
    wanted: AtomicUsize,
    /// Something has changed.
    wake: OwnedFd,
    /// The doorbell of the registers.
    bell: Arc<OwnedFd>,
    over: AtomicBool,
    /// Whether the thread is to park, and whether it has: then it touches neither memory nor the bell.
    parking: Mutex<Parking>,
    parked: Condvar,
}

#[derive(Default)]
struct Parking {
    wanted: bool,
    /// There is a thread.
    begun: bool,
    done: bool,
}

/// How long the thread may take to park: an access by message waits for a client as long as that.
const PARK: Duration = Duration::from_secs(6);

impl Core {
    /// The engine, for the server.
    pub fn engine(&self) -> MutexGuard<'_, Engine> {
        self.wanted.fetch_add(1, Ordering::SeqCst);
        let engine = self.engine.lock().unwrap_or_else(PoisonError::into_inner);
        self.wanted.fetch_sub(1, Ordering::SeqCst);
        engine
    }

    /// What was done so far, as JSON.
    pub fn summary(&self) -> serde_json::Value {
        let engine = self.engine();
        let figures = engine.figures;
        serde_json::json!({
            "buffers": figures.buffers,
            "bytes": figures.bytes,
            "interrupts": figures.signals,
            "lost_interrupts": figures.lost,
            "longest_ns": figures.longest_ns,
            "faults": figures.faults,
            "loads": figures.loads,
        })
    }

    /// Has the thread look again.
    pub fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn parking(&self) -> MutexGuard<'_, Parking> {
        self.parking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the thread park; false if it did not in time.
    pub fn park(&self) -> bool {
        let deadline = Instant::now() + PARK;
        let mut parking = self.parking();
        parking.wanted = true;
        self.wake();
        while parking.begun && !parking.done {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            parking = self.parked.wait_timeout(parking, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// The thread goes on, and looks at everything.
    pub fn unpark(&self) {
        self.parking().wanted = false;
        self.parked.notify_all();
    }

    /// On the thread: parks, if it is to.
    fn park_here(&self) {
        let mut parking = self.parking();
        while parking.wanted && !self.over.load(Ordering::SeqCst) {
            parking.done = true;
            self.parked.notify_all();
            parking = self.parked.wait(parking).unwrap_or_else(PoisonError::into_inner);
        }
        parking.done = false;
    }

    /// The thread: one step after the other.
    fn run(&self, bus: &Bus) {
        while !self.over.load(Ordering::SeqCst) {
            self.park_here();
            // The lock is not fair.
            while self.wanted.load(Ordering::SeqCst) > 0 {
                std::thread::yield_now();
            }
            let next = self.engine.lock().unwrap_or_else(PoisonError::into_inner).step(bus);
            let timeout = match next {
                Next::Now => continue,
                Next::At(time) => {
                    let rest = time.saturating_duration_since(Instant::now());
                    Some(Timespec { tv_sec: rest.as_secs() as i64, tv_nsec: rest.subsec_nanos().into() })
                }
                Next::Rest => None,
            };
            let mut events = [PollFd::new(&self.wake, PollFlags::IN), PollFd::new(&*self.bell, PollFlags::IN)];
            let _ = poll(&mut events, timeout.as_ref());
            for event in [&self.wake, &*self.bell] {
                let _ = rustix::io::read(event, &mut [0; 8]);
            }
        }
    }
}

/// The device.
pub struct Testdma {
    core: Arc<Core>,
    pub(super) shape: Shape,
    config: ConfigSpace,
    express: u16,
    /// The scratch page, which clients can map.
    scratch: Arc<OwnedFd>,
    /// The BAR of the MSI-X table. Whoever owns the function keeps the real one; this is memory.
    pub(super) table: Vec<u8>,
    pub(super) journey: Journey,
    pub(super) mischief: Arc<Mischief>,
    thread: Option<JoinHandle<()>>,
}

impl Testdma {
    /// As it is after a reset. What the client has of it goes over to the next process, and comes from the one before: until it goes
    /// on, its thread is parked then.
    pub fn new(shape: Shape, load: Load, faults: Faults, registry: &Registry) -> Result<Self> {
        let (config, express) = configuration(&shape).context("making configuration space")?;
        let event = || Ok::<_, io::Error>(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let page = || {
            let page = memfd_create("testdma-scratch", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
            ftruncate(&page, REGISTERS_BYTES)?;
            fcntl_add_seals(&page, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
            Ok::<_, io::Error>(page)
        };
        let scratch =
            registry.obtain(KeptId::new("testdma/scratch", 0), Ok, page).context("making the scratch page")?;
        let bell = registry.obtain(KeptId::new("testdma/bell", 0), Ok, event).context("making the doorbell")?;
        let core = Core {
            engine: Mutex::new(Engine::new(load, faults)),
            wanted: AtomicUsize::new(0),
            wake: event().context("making an eventfd")?,
            bell,
            over: AtomicBool::new(false),
            parking: Mutex::new(Parking { wanted: registry.succeeds(), ..Parking::default() }),
            parked: Condvar::new(),
        };
        let core = Arc::new(core);
        Ok(Self {
            mischief: Mischief::new(core.clone()),
            core,
            journey: Journey::default(),
            shape,
            config,
            express,
            scratch,
            table: vec![0; MSIX_BYTES as usize],
            thread: None,
        })
    }

    /// Starts the thread that does the DMA.
    pub fn start(&mut self, bus: Bus) -> Result<()> {
        let core = self.core.clone();
        core.parking().begun = true;
        let thread = std::thread::Builder::new().name("testdma".into()).spawn(move || core.run(&bus));
        self.thread = Some(thread.context("starting the thread of the device")?);
        Ok(())
    }

    pub fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// Whether it has that kind of interrupts.
    pub(super) fn has(&self, interrupt: Interrupt) -> bool {
        interrupt == Interrupt::None || self.shape.interrupts.contains(&interrupt)
    }

    /// The registers as they read now.
    fn registers(&self) -> [u8; REGISTERS] {
        let engine = self.core.engine();
        let (setup, figures) = (&engine.setup, &engine.figures);
        let offered = self.shape.interrupts.iter().fold(self.shape.vectors << 8, |all, kind| all | kind.offer());
        let bits = [
            (engine.is_active(), status::ACTIVE),
            (engine.is_failing(), status::FAULT),
            (engine.is_pending(), status::PENDING),
        ];
        let status = bits.iter().filter(|(on, _)| *on).fold(0, |all, (_, bit)| all | bit);
        let mut page = [0; REGISTERS];
        let mut put = |at: u64, value: u64, bytes: usize| {
            page[at as usize..][..bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        };
        put(register::ID, ID.into(), 4);
        put(register::VERSION, VERSION.into(), 4);
        put(register::OFFER, offered.into(), 4);
        put(register::STATUS, status.into(), 4);
        put(register::CONTROL, setup.form as u64, 4);
        put(register::INTERRUPT, setup.interrupt as u64, 4);
        put(register::VECTORS, setup.vectors.into(), 4);
        put(register::CAUSE, engine.progress.cause.into(), 4);
        put(register::AREA, setup.area, 8);
        put(register::ENTRIES, setup.entries.into(), 4);
        put(register::SEED, setup.seed, 8);
        put(register::BUFFERS, figures.buffers, 8);
        put(register::BYTES, figures.bytes, 8);
        put(register::SIGNALS, figures.signals, 8);
        put(register::LOST, figures.lost, 8);
        put(register::LONGEST_NS, figures.longest_ns, 8);
        put(register::FAULTS, figures.faults, 8);
        put(register::LOADS, figures.loads, 8);
        page
    }

    /// Writes a register. What cannot be is not taken: a driver reads it back.
    fn write_register(&self, bus: &Bus, offset: u64, value: u32) {
        let mut engine = self.core.engine();
        let low = |word: u64| word & !0xffff_ffff | u64::from(value);
        let high = |word: u64| word & 0xffff_ffff | u64::from(value) << 32;
        let off = engine.setup.form == Form::Off;
        let (area, seed) = (engine.setup.area, engine.setup.seed);
        match offset {
            register::CONTROL => {
                if let Some(form) = Form::from_u32(value)
                    && (form != Form::Ring || valid_entries(engine.setup.entries))
                {
                    engine.control(form, bus);
                }
            }
            register::CAUSE if value & 1 != 0 => {
                engine.progress.cause = false;
                engine.follow_pin(bus);
            }
            register::INTERRUPT if off => {
                if let Some(kind) = Interrupt::from_u32(value).filter(|kind| self.has(*kind)) {
                    engine.setup.interrupt = kind;
                }
            }
            register::VECTORS if off && (1..=self.shape.vectors).contains(&value) => engine.setup.vectors = value,
            register::AREA if off => engine.setup.area = low(area) & !0xfff,
            register::AREA_HIGH if off => engine.setup.area = high(area),
            register::ENTRIES if off && valid_entries(value) => engine.setup.entries = value,
            register::SEED if off => engine.setup.seed = low(seed),
            register::SEED_HIGH if off => engine.setup.seed = high(seed),
            // The doorbell: the thread looks after every write.
            _ => {}
        }
        drop(engine);
        self.core.wake();
    }

    fn write_config(&mut self, bus: &Bus, offset: u64, data: &[u8]) {
        self.config.write(offset as u16, data);
        self.follow_config(bus);
    }

    /// Takes saved configuration space; it must be of a function like this one.
    pub(super) fn restore_config(&mut self, saved: &[u8]) -> Result<(), String> {
        let mut saved = saved.to_vec();
        // What it was doing is not what it is.
        let status = usize::from(self.express + DEVICE_STATUS);
        if let Some(byte) = saved.get_mut(status) {
            *byte &= !TRANSACTIONS_PENDING;
        }
        self.config.bytes_mut()[status] &= !TRANSACTIONS_PENDING;
        self.config.restore(&saved).map_err(|error| error.to_string())
    }

    /// Whether it may do DMA, and use its pin.
    pub(super) fn uses(&self) -> (bool, bool) {
        (self.config.bus_master(), self.config.intx_enabled())
    }

    /// The engine obeys configuration space.
    pub(super) fn follow_config(&self, bus: &Bus) {
        let (master, pin) = self.uses();
        self.core.engine().configure(master, pin, bus);
        self.core.wake();
    }

    /// Configuration space as it reads now.
    pub(super) fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        let (pending, cause) = {
            let engine = self.core.engine();
            (engine.is_pending(), engine.progress.cause)
        };
        self.config.set_intx_status(cause);
        let status = &mut self.config.bytes_mut()[usize::from(self.express + DEVICE_STATUS)];
        *status = *status & !TRANSACTIONS_PENDING | if pending { TRANSACTIONS_PENDING } else { 0 };
        self.config.read(offset as u16, data);
    }

    pub(super) fn scratch(&self) -> Result<Vec<u8>, Errno> {
        let mut page = vec![0; SCRATCH_BYTES as usize];
        rustix::io::pread(&*self.scratch, &mut page[..], SCRATCH)?;
        Ok(page)
    }

    pub(super) fn set_scratch(&self, page: &[u8]) -> Result<(), Errno> {
        match page.len() as u64 {
            SCRATCH_BYTES => rustix::io::pwrite(&*self.scratch, page, SCRATCH).map(|_| ()),
            _ => Err(Errno::INVAL),
        }
    }
}

impl Drop for Testdma {
    fn drop(&mut self) {
        self.core.over.store(true, Ordering::SeqCst);
        self.core.wake();
        self.core.unpark();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Configuration space, and where its PCI Express capability is.
fn configuration(shape: &Shape) -> Result<(ConfigSpace, u16), ConfigError> {
    let identity = Identity {
        vendor: abi::VENDOR,
        device: abi::DEVICE,
        revision: 1,
        // A system peripheral of no other kind.
        class: [0x08, 0x80, 0],
        subsystem_vendor: abi::VENDOR,
        subsystem: 1,
    };
    let mut config = ConfigSpace::new(&identity);
    config.add_bar(REGISTERS_BAR.into(), BarKind::Memory32, REGISTERS_BYTES)?;
    let express = config.add_express_endpoint()?;
    let has = |kind| shape.interrupts.contains(&kind);
    if has(Interrupt::Intx) {
        config.set_interrupt(1, 0);
    }
    if has(Interrupt::Msi) {
        // As many as can be, a power of two; 64-bit address, masks.
        let vectors = msi_vectors(shape.vectors);
        let mut body = [0; 22];
        body[..2].copy_from_slice(&((vectors.ilog2() as u16) << 1 | 0x180).to_le_bytes());
        let mut writable = [0; 22];
        writable[..2].copy_from_slice(&0x71_u16.to_le_bytes());
        writable[2..10].copy_from_slice(&(!3_u64).to_le_bytes());
        writable[10..12].fill(0xff);
        writable[14..18].copy_from_slice(&(((1_u64 << vectors) - 1) as u32).to_le_bytes());
        config.add_capability(0x05, &body, &writable)?;
    }
    if has(Interrupt::Msix) {
        config.add_bar(MSIX_BAR.into(), BarKind::Memory32, MSIX_BYTES)?;
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(shape.vectors as u16 - 1).to_le_bytes());
        body[2..6].copy_from_slice(&u32::from(MSIX_BAR).to_le_bytes());
        body[6..10].copy_from_slice(&(MSIX_PENDING as u32 | u32::from(MSIX_BAR)).to_le_bytes());
        config.add_capability(0x11, &body, &[0, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0])?;
    }
    Ok((config, express))
}

/// Vectors of MSI: a power of two.
fn msi_vectors(vectors: u32) -> u32 {
    vectors.next_power_of_two().min(MAX_MSI_VECTORS)
}

impl Device for Testdma {
    fn description(&self) -> Description {
        let mut regions = vec![Region::default(); pci_region::COUNT as usize];
        let areas = vec![Area { offset: SCRATCH, size: SCRATCH_BYTES }];
        let bell = IoFd { offset: register::DOORBELL, size: 4, fd_index: 0, kind: IoFd::IOEVENTFD, flags: 0, data: 0 };
        regions[usize::from(REGISTERS_BAR)] = Region {
            shared: Some(Shared { file: self.scratch.clone(), offset: 0, areas }),
            io_fds: vec![bell],
            descriptors: vec![self.core.bell.clone()],
            ..Region::trapped(REGISTERS_BYTES)
        };
        regions[pci_region::CONFIG as usize] = Region::trapped(CONFIG_BYTES);
        let mut irqs = vec![Irq::default(); pci_irq::COUNT as usize];
        for kind in &self.shape.interrupts {
            match kind {
                Interrupt::Intx => irqs[pci_irq::INTX as usize] = Irq::pin(),
                Interrupt::Msi => irqs[pci_irq::MSI as usize] = Irq::vectors(msi_vectors(self.shape.vectors)),
                Interrupt::Msix => {
                    irqs[pci_irq::MSIX as usize] = Irq::vectors(self.shape.vectors);
                    regions[usize::from(MSIX_BAR)] = Region::trapped(MSIX_BYTES);
                }
                Interrupt::None => {}
            }
        }
        let Shape { migration, pre_copy, logging, .. } = self.shape;
        Description { resettable: true, regions, irqs, migration, pre_copy, p2p: true, logging }
    }

    fn read(&mut self, _: &Bus, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        let bytes = match region {
            pci_region::CONFIG => {
                self.read_config(offset, data);
                return Ok(());
            }
            region if region == u32::from(MSIX_BAR) => self.table.clone(),
            _ => {
                let mut bytes = self.registers().to_vec();
                bytes.resize(SCRATCH as usize, 0);
                bytes.extend(self.scratch()?);
                bytes
            }
        };
        let there = bytes.get(offset as usize..).and_then(|rest| rest.get(..data.len())).ok_or(Errno::INVAL)?;
        data.copy_from_slice(there);
        Ok(())
    }

    fn write(&mut self, bus: &Bus, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        match region {
            pci_region::CONFIG => self.write_config(bus, offset, data),
            region if region == u32::from(MSIX_BAR) => {
                let there = self.table.get_mut(offset as usize..).and_then(|rest| rest.get_mut(..data.len()));
                there.ok_or(Errno::INVAL)?.copy_from_slice(data);
            }
            _ if offset >= SCRATCH => {
                rustix::io::pwrite(&*self.scratch, data, offset)?;
            }
            _ if !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) => return Err(Errno::INVAL),
            _ => {
                for (at, word) in (offset..).step_by(4).zip(data.as_chunks().0) {
                    self.write_register(bus, at, u32::from_le_bytes(*word));
                }
            }
        }
        Ok(())
    }

    fn reset(&mut self, bus: &Bus) -> Result<(), Errno> {
        (self.config, self.express) = configuration(&self.shape).map_err(|_| Errno::IO)?;
        self.table.fill(0);
        self.journey = Journey::default();
        self.core.engine().reset(bus);
        self.set_scratch(&vec![0; SCRATCH_BYTES as usize])?;
        self.core.wake();
        Ok(())
    }

    fn migration(&mut self) -> Option<&mut dyn Migration> {
        Some(self)
    }

    fn kept(&mut self) -> Option<&mut dyn Kept> {
        Some(self)
    }
}
