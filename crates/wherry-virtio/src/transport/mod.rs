//! Virtio over PCI (section 4.1), modern only.
//!
//! - [`VirtioPci`] is the PCI function, answers in its BAR, and is the state unit of its device.
//! - `common` are the registers by which the driver sets the device up, `layout` is where they lie, [`Interrupts`] is the
//!   way back.
//!
//! Locks: `registers` is held by a vCPU that reads or writes a register, but not while the device is activated or reset,
//! which may wait for a medium; `acting` is held then. Device threads take neither: what they need is in `Shared`.

mod common;
mod interrupts;
mod layout;
mod unit;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vmm_sys_util::eventfd::EventFd;
use wherry_handover::Registry;
use wherry_interrupt::{Event, Events, Input, InterruptError, Intx, Router};
use wherry_memory::GuestMemory;
use wherry_pci::bus::{Bus, BusDevice, BusError};
use wherry_pci::{BarMap, BarTarget, ConfigError, ConfigSpace, Doorbell, Doorbells, Identity, Msix, PciFunction};
use wherry_state::Once;

use self::common::{Asked, Common, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET, NO_VECTOR, Shown};
use self::interrupts::Shared;
use crate::device::{Activation, Device, Interrupts, RingGiven};

const VENDOR: u16 = 0x1af4;
/// PCI device ID of device type 0.
const FIRST_DEVICE_ID: u16 = 0x1040;
const SUBSYSTEM: u16 = 0x1100;

/// What a transport needs of its machine.
#[derive(Clone)]
pub struct PciParts {
    /// Where the BAR answers.
    pub memory_bus: Arc<Bus>,
    /// Where rings are rung.
    pub doorbells: Arc<dyn Doorbells>,
    /// Where interrupts go.
    pub router: Arc<dyn Router>,
    /// The input that the function's pin leads to.
    pub pin_input: Input,
    /// Guest memory.
    pub memory: GuestMemory,
    /// Where the eventfds of rings and vectors come from.
    pub events: Events,
    /// Knows whether another process is about to go on with the machine.
    pub registry: Arc<Registry>,
}

/// A transport cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// More rings than there is room for.
    #[error("a device with {0} rings; there is room for 256")]
    Rings(usize),
    /// An interrupt cannot be made.
    #[error(transparent)]
    Interrupt(#[from] InterruptError),
    /// MSI-X cannot be made.
    #[error("MSI-X: {0}")]
    Msix(String),
    /// Configuration space cannot be made.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An eventfd cannot be made.
    #[error("making an eventfd: {0}")]
    Event(#[source] io::Error),
}

struct Registers {
    config: ConfigSpace,
    bars: BarMap,
    common: Common,
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    device: Arc<dyn Device>,
    shared: Arc<Shared>,
    registers: Mutex<Registers>,
    /// Held while the device is activated or reset.
    acting: Mutex<()>,
    kicks: Vec<Arc<Event>>,
    /// The device has been activated and not been reset since.
    active: AtomicBool,
    memory: GuestMemory,
    /// Offset of the capability for access through configuration space.
    window: u16,
    instance: u32,
    once: Once,
    registry: Arc<Registry>,
}

impl VirtioPci {
    /// A function with this device; `instance` numbers the state units of one name. `place` gives its BAR an address.
    pub fn new<E>(
        device: Arc<dyn Device>,
        instance: u32,
        parts: &PciParts,
        place: impl FnOnce(&mut ConfigSpace) -> Result<(), E>,
    ) -> Result<Arc<Self>, E>
    where
        E: From<TransportError>,
    {
        let sizes = device.ring_sizes();
        if sizes.len() > layout::MOST_RINGS {
            return Err(TransportError::Rings(sizes.len()).into());
        }
        let kind = device.kind();
        let mut config = ConfigSpace::new(&Identity {
            vendor: VENDOR,
            device: FIRST_DEVICE_ID + kind.id,
            revision: 1,
            class: kind.class,
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM,
        });
        let window = layout::add(&mut config).map_err(TransportError::Config)?;
        // One for each ring, and one for the configuration.
        let vectors = sizes.len() as u16 + 1;
        let msix = Msix::new(parts.router.clone(), &parts.events.of("msix"), vectors, layout::MSIX, &mut config)
            .map_err(|e| TransportError::Msix(e.to_string()))?;
        config.set_interrupt(1, 0);
        let intx = Intx::new(parts.router.clone(), parts.pin_input).map_err(TransportError::Interrupt)?;
        place(&mut config)?;
        let kicks = (0..sizes.len() as u32).map(|ring| parts.events.get("kick", ring)).collect::<Result<Vec<_>, _>>();
        let kicks = kicks.map_err(TransportError::Event)?;
        let shared = Arc::new(Shared {
            msix,
            intx,
            isr: AtomicU8::new(0),
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            ring_vectors: sizes.iter().map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            name: format!("{}[{instance}]", kind.name),
        });
        let common = Common::new(device.features(), sizes);
        Ok(Arc::new_cyclic(|this: &Weak<Self>| {
            let mut bars = BarMap::default();
            let bar = Bar {
                bus: Arc::downgrade(&parts.memory_bus),
                doorbells: parts.doorbells.clone(),
                kicks: kicks.clone(),
                window: Arc::new(Window(this.clone())),
            };
            bars.set_target(0, Arc::new(bar));
            Self {
                device,
                shared,
                registers: Mutex::new(Registers { config, bars, common }),
                acting: Mutex::new(()),
                kicks,
                active: AtomicBool::new(false),
                memory: parts.memory.clone(),
                window,
                instance,
                once: Once::default(),
                registry: parts.registry.clone(),
            }
        }))
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// For the device, beside what it is activated with: to tell of a change of its configuration.
    pub fn interrupts(&self) -> Interrupts {
        Interrupts::new(self.shared.clone())
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self) -> u8 {
        self.shared.status.load(Ordering::Acquire)
    }

    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        let inside = |range: &Range<u64>| range.contains(&offset).then(|| offset - range.start);
        let msix = &self.shared.msix;
        if let Some(at) = inside(&layout::COMMON) {
            let registers = self.lock();
            let vector = |v: &AtomicU16| v.load(Ordering::Acquire);
            let selected = usize::from(registers.common.selected());
            let shown = Shown {
                status: self.status(),
                generation: self.shared.generation.load(Ordering::Acquire),
                config_vector: vector(&self.shared.config_vector),
                ring_vector: self.shared.ring_vectors.get(selected).map_or(NO_VECTOR, vector),
            };
            registers.common.read(&shown, at, data);
        } else if inside(&layout::ISR).is_some() {
            data.fill(0);
            // Reading takes it back, and the pin with it.
            data[0] = self.shared.isr.swap(0, Ordering::AcqRel);
            self.report("releasing its interrupt pin", self.shared.intx.set_level(false));
        } else if let Some(at) = inside(&layout::DEVICE) {
            self.device.read_config(at, data);
        } else if let Some(at) = inside(&msix.table_range()) {
            msix.read_table(at, data);
        } else if let Some(at) = inside(&msix.pending_range()) {
            msix.read_pending(at, data);
        } else {
            data.fill(0);
        }
    }

    fn write_bar(&self, offset: u64, data: &[u8]) {
        let inside = |range: &Range<u64>| range.contains(&offset).then(|| offset - range.start);
        let msix = &self.shared.msix;
        if let Some(at) = inside(&layout::COMMON) {
            let asked = self.lock().common.write(self.status(), at, data);
            self.act(asked);
        } else if let Some(at) = inside(&layout::DEVICE) {
            self.device.write_config(at, data);
        } else if let Some(at) = inside(&layout::NOTIFY) {
            if let Some(kick) = self.kicks.get((at / layout::NOTIFY_STEP) as usize) {
                // It fails only if the counter is full, and then the device is awake already.
                let _ = kick.write(1);
            }
        } else if let Some(at) = inside(&msix.table_range()) {
            msix.write_table(at, data);
        }
    }

    fn act(&self, asked: Asked) {
        let vector = |wanted: u16| match self.shared.msix.vector(wanted) {
            Some(_) => wanted,
            // Reading it back tells the driver that there is none.
            None => NO_VECTOR,
        };
        match asked {
            Asked::Nothing => {}
            Asked::ConfigVector(wanted) => self.shared.config_vector.store(vector(wanted), Ordering::Release),
            Asked::RingVector(ring, wanted) => {
                if let Some(slot) = self.shared.ring_vectors.get(usize::from(ring)) {
                    slot.store(vector(wanted), Ordering::Release);
                    if self.active.load(Ordering::Acquire) {
                        self.device.vector_changed(ring);
                    }
                }
            }
            Asked::Status(wanted) => {
                let _acting = self.acting.lock().unwrap_or_else(PoisonError::into_inner);
                self.set_status(wanted);
            }
        }
    }

    /// Section 3.1.1. A driver can only add bits, or write 0, which resets.
    fn set_status(&self, wanted: u8) {
        if wanted == 0 {
            if self.active.swap(false, Ordering::AcqRel) {
                self.device.reset();
            }
            self.reset_registers();
            return;
        }
        let before = self.status();
        let mut status = before | wanted & !NEEDS_RESET;
        if status & !before & FEATURES_OK != 0 && !self.lock().common.features_are_good() {
            // Reading it back tells the driver.
            status &= !FEATURES_OK;
        }
        if status & DRIVER_OK != 0 && status & FEATURES_OK == 0 {
            status &= !DRIVER_OK;
        }
        self.shared.status.fetch_or(status, Ordering::AcqRel);
        if status & !before & DRIVER_OK != 0 && status & FAILED == 0 && !self.active.swap(true, Ordering::AcqRel) {
            self.activate();
        }
    }

    fn activate(&self) {
        let activation = {
            let registers = self.lock();
            let rings = (0u16..).zip(&registers.common.rings).filter(|(_, ring)| ring.enabled);
            Activation {
                memory: self.memory.clone(),
                features: registers.common.accepted,
                rings: rings
                    .map(|(index, ring)| RingGiven {
                        index,
                        setup: ring.setup,
                        kick: self.kicks[usize::from(index)].shared().clone(),
                        resumes: false,
                        in_flight: None,
                    })
                    .collect(),
                interrupts: self.interrupts(),
            }
        };
        if let Err(error) = self.device.activate(activation) {
            self.interrupts().broken(&error);
        }
    }

    fn reset_registers(&self) {
        self.lock().common.reset();
        self.shared.isr.store(0, Ordering::Release);
        self.report("releasing its interrupt pin", self.shared.intx.set_level(false));
        for vector in self.shared.ring_vectors.iter().chain([&self.shared.config_vector]) {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        for kick in &self.kicks {
            let _ = kick.read();
        }
        self.shared.status.store(0, Ordering::Release);
    }

    fn report(&self, what: &str, result: Result<(), InterruptError>) {
        if let Err(error) = result {
            tracing::error!(device = self.shared.name, %error, "{what}");
        }
    }

    /// Follows what was written to configuration space, or restored.
    fn follow(&self, registers: &mut Registers) {
        registers.bars.follow(&registers.config);
        self.shared.msix.follow(&registers.config);
        let pin = registers.config.intx_enabled() && !self.shared.msix.enabled();
        self.report("switching its interrupt pin", self.shared.intx.enable(pin));
    }

    /// What the window in configuration space shows now: offset and length.
    fn shown(&self, config: &ConfigSpace) -> Option<(u64, usize)> {
        let (bar, offset, len) =
            (config.dword(self.window + 4) & 0xff, config.dword(self.window + 8), config.dword(self.window + 12));
        let inside = u64::from(offset) + u64::from(len) <= layout::BAR_SIZE;
        (bar == 0 && matches!(len, 1 | 2 | 4) && inside).then_some((offset.into(), len as usize))
    }

    fn touches_window(&self, offset: u16, len: usize) -> bool {
        // Accesses do not cross an aligned dword.
        offset & !3 == self.window + 16 && len > 0
    }
}

impl PciFunction for VirtioPci {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let shown = {
            let mut registers = self.lock();
            registers.config.set_intx_status(self.shared.intx.is_asserted());
            registers.config.read(offset, data);
            self.shown(&registers.config)
        };
        if let (true, Some((at, len))) = (self.touches_window(offset, data.len()), shown) {
            let mut value = [0; 4];
            self.read_bar(at, &mut value[..len]);
            let skip = usize::from(offset & 3);
            data.copy_from_slice(&value[skip..skip + data.len()]);
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let shown = {
            let mut registers = self.lock();
            registers.config.write(offset, data);
            self.follow(&mut registers);
            self.shown(&registers.config)
        };
        if let (true, Some((at, len))) = (self.touches_window(offset, data.len()), shown) {
            self.write_bar(at, &data[..len.min(data.len())]);
        }
    }

    /// The device's own unit saves it.
    fn save_config(&self) -> Option<Vec<u8>> {
        None
    }

    fn restore_config(&self, _saved: &[u8]) -> Result<(), String> {
        Err("its configuration space belongs to another unit".into())
    }
}

/// The registers on the bus. Not the function itself: it owns the BAR, which owns this.
struct Window(Weak<VirtioPci>);

impl BusDevice for Window {
    fn read(&self, _base: u64, offset: u64, data: &mut [u8]) {
        match self.0.upgrade() {
            Some(function) => function.read_bar(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, _base: u64, offset: u64, data: &[u8]) {
        if let Some(function) = self.0.upgrade() {
            function.write_bar(offset, data);
        }
    }
}

/// The BAR: registers, and a doorbell for each ring.
struct Bar {
    /// Not the bus itself: it owns the bridge to configuration space, which owns the function, which owns this.
    bus: Weak<Bus>,
    doorbells: Arc<dyn Doorbells>,
    kicks: Vec<Arc<Event>>,
    window: Arc<Window>,
}

impl Bar {
    fn bells(&self, address: u64) -> impl Iterator<Item = (u64, &EventFd)> {
        (0..)
            .zip(&self.kicks)
            .map(move |(i, kick)| (address + layout::NOTIFY.start + i * layout::NOTIFY_STEP, &***kick))
    }
}

impl BarTarget for Bar {
    fn map(&self, address: u64, size: u64) -> Result<(), BusError> {
        if let Some(bus) = self.bus.upgrade() {
            bus.insert(address, size, self.window.clone())?;
        }
        for (at, kick) in self.bells(address) {
            if let Err(error) = self.doorbells.attach(Doorbell::at(at), kick) {
                // The registers answer for it, more slowly.
                tracing::debug!(%error, at, "no doorbell");
            }
        }
        Ok(())
    }

    fn unmap(&self, address: u64) {
        for (at, kick) in self.bells(address) {
            if let Err(error) = self.doorbells.detach(Doorbell::at(at), kick) {
                tracing::debug!(%error, at, "there was no doorbell");
            }
        }
        if let Some(bus) = self.bus.upgrade() {
            // It was inserted by `map`; if it is gone, it answers nowhere already.
            let _ = bus.remove(address);
        }
    }
}
