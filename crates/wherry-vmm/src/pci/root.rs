//! Bus 0.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Instant;

use vm_allocator::{AddressAllocator, AllocPolicy, RangeInclusive};
use wherry_pci::{BarKind, ConfigSpace, FunctionAddress, PciFunction};
use wherry_state::{Saved, SavedState, Section, StateUnit, UnitError, UnitId};

use super::saved::{SavedFunction, SavedPciHost};
use crate::units::Once;

/// Addresses that BARs are given, and that ACPI tells the guest of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciWindows {
    /// Ports.
    pub io: Range<u64>,
    /// Memory below 4 GiB.
    pub memory32: Range<u64>,
    /// Memory above RAM.
    pub memory64: Range<u64>,
}

/// The bus cannot take a function.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PciError {
    /// The address is taken.
    #[error("there is a PCI function at {0} already")]
    Taken(FunctionAddress),
    /// All 32 devices are taken.
    #[error("the PCI bus has no free device number: 32 are the most")]
    Full,
    /// A window is too small for the BAR.
    #[error("no room for a {kind:?} BAR of {size:#x} bytes in the PCI windows")]
    NoRoom {
        /// The kind of BAR.
        kind: BarKind,
        /// Its size in bytes.
        size: u64,
    },
    /// A window is empty or wraps around.
    #[error("PCI window {0:x?} is empty or impossible")]
    BadWindow(Range<u64>),
}

struct Allocators {
    io: AddressAllocator,
    memory32: AddressAllocator,
    memory64: AddressAllocator,
}

impl Allocators {
    fn of(&mut self, kind: BarKind) -> &mut AddressAllocator {
        match kind {
            BarKind::Io => &mut self.io,
            BarKind::Memory32 => &mut self.memory32,
            BarKind::Memory64 { .. } => &mut self.memory64,
        }
    }
}

/// Addresses that the BARs of a function were given. They are taken until they are given back, wherever the guest has moved the
/// BARs since.
#[derive(Debug, Default)]
pub struct AssignedBars(Vec<(BarKind, RangeInclusive)>);

/// The root bus, and the state unit `pci-host`.
pub struct PciRoot {
    /// Read by vCPUs on each access, written when a device comes or goes.
    functions: RwLock<BTreeMap<FunctionAddress, Arc<dyn PciFunction>>>,
    /// Devices that the guest has ejected, a bit for each: it does not find them any more.
    hidden: AtomicU32,
    /// CONFIG_ADDRESS. Not held while a function is accessed.
    config_address: Mutex<u32>,
    allocators: Mutex<Allocators>,
    windows: PciWindows,
    once: Once,
}

fn unpoison<T>(result: Result<T, PoisonError<T>>) -> T {
    result.unwrap_or_else(PoisonError::into_inner)
}

impl PciRoot {
    /// A bus without functions.
    pub fn new(windows: PciWindows) -> Result<Arc<Self>, PciError> {
        let allocator = |window: &Range<u64>| {
            AddressAllocator::new(window.start, window.end.saturating_sub(window.start))
                .map_err(|_| PciError::BadWindow(window.clone()))
        };
        let allocators = Allocators {
            io: allocator(&windows.io)?,
            memory32: allocator(&windows.memory32)?,
            memory64: allocator(&windows.memory64)?,
        };
        Ok(Arc::new(Self {
            functions: RwLock::default(),
            hidden: AtomicU32::new(0),
            config_address: Mutex::new(0),
            allocators: Mutex::new(allocators),
            windows,
            once: Once::default(),
        }))
    }

    /// The windows.
    pub fn windows(&self) -> &PciWindows {
        &self.windows
    }

    /// Puts a function on the bus.
    pub fn add(&self, address: FunctionAddress, function: Arc<dyn PciFunction>) -> Result<(), PciError> {
        let mut functions = unpoison(self.functions.write());
        if functions.contains_key(&address) {
            return Err(PciError::Taken(address));
        }
        functions.insert(address, function);
        Ok(())
    }

    /// The lowest device number, from 1, that no function has.
    pub fn free_device(&self) -> Result<FunctionAddress, PciError> {
        let functions = unpoison(self.functions.read());
        (1..32)
            .find(|device| functions.keys().all(|a| a.device() != *device))
            .and_then(|device| FunctionAddress::new(device, 0))
            .ok_or(PciError::Full)
    }

    /// Takes a function off the bus. Its BARs are the caller's to unmap.
    pub fn remove(&self, address: FunctionAddress) -> Option<Arc<dyn PciFunction>> {
        let mut functions = unpoison(self.functions.write());
        self.hidden.fetch_and(!(1 << address.device()), Ordering::AcqRel);
        functions.remove(&address)
    }

    /// Hides a device from the guest until it is removed; the function that the guest had there.
    pub fn hide(&self, device: u8) -> Option<Arc<dyn PciFunction>> {
        let address = FunctionAddress::new(device, 0)?;
        self.hidden.fetch_or(1 << device, Ordering::AcqRel);
        unpoison(self.functions.read()).get(&address).cloned()
    }

    /// Gives every BAR of a new function an address of its own, as firmware would. The same calls in the same order
    /// give the same addresses. The guest may move them anywhere later.
    pub fn assign_bars(&self, config: &mut ConfigSpace) -> Result<AssignedBars, PciError> {
        let mut allocators = unpoison(self.allocators.lock());
        let bars: Vec<_> = config.bars().collect();
        let mut assigned = AssignedBars::default();
        for (index, kind, size) in bars {
            let Ok(range) = allocators.of(kind).allocate(size, size, AllocPolicy::FirstMatch) else {
                drop(allocators);
                self.release_bars(assigned);
                return Err(PciError::NoRoom { kind, size });
            };
            assigned.0.push((kind, range));
            // The index comes from the configuration space itself.
            let _ = config.set_bar(index, range.start());
        }
        Ok(assigned)
    }

    /// Takes back what [`assign_bars`](Self::assign_bars) gave. The function is gone.
    pub fn release_bars(&self, assigned: AssignedBars) {
        let mut allocators = unpoison(self.allocators.lock());
        for (kind, range) in assigned.0 {
            // It was allocated there.
            let _ = allocators.of(kind).free(&range);
        }
    }

    /// The I/O APIC input that pin `pin` (1 is INTA) of a device leads to: 16 to 23, as ACPI tells the guest.
    pub const fn interrupt_input(device: u8, pin: u8) -> u32 {
        16 + (device as u32 + pin as u32 + 7) % 8
    }

    fn function(&self, bus: u8, devfn: u8) -> Option<Arc<dyn PciFunction>> {
        if bus != 0 || self.hidden.load(Ordering::Acquire) & 1 << (devfn >> 3) != 0 {
            return None;
        }
        unpoison(self.functions.read()).get(&FunctionAddress::from_devfn(devfn)).cloned()
    }

    /// Reads configuration space; ones where there is no function.
    pub(super) fn read_config(&self, bus: u8, devfn: u8, offset: u16, data: &mut [u8]) {
        let Some(function) = self.function(bus, devfn) else { return data.fill(0xff) };
        let mut done = 0;
        for (at, len) in dwords(offset, data.len()) {
            function.read_config(at, &mut data[done..done + len]);
            done += len;
        }
        data[done..].fill(0xff);
    }

    /// Writes configuration space; nothing where there is no function.
    pub(super) fn write_config(&self, bus: u8, devfn: u8, offset: u16, data: &[u8]) {
        let Some(function) = self.function(bus, devfn) else { return };
        let mut done = 0;
        for (at, len) in dwords(offset, data.len()) {
            function.write_config(at, &data[done..done + len]);
            done += len;
        }
    }

    pub(super) fn config_address(&self) -> MutexGuard<'_, u32> {
        unpoison(self.config_address.lock())
    }
}

/// Cuts an access into pieces inside aligned dwords, up to the end of configuration space.
fn dwords(offset: u16, len: usize) -> impl Iterator<Item = (u16, usize)> {
    let mut at = usize::from(offset);
    let end = (at + len).min(4096);
    std::iter::from_fn(move || {
        let take = (4 - at % 4).min(end.checked_sub(at)?);
        let piece = (at as u16, take);
        at += take;
        (take > 0).then_some(piece)
    })
}

impl StateUnit for PciRoot {
    fn id(&self) -> UnitId {
        UnitId::new("pci-host", 0)
    }

    fn depends_on(&self) -> &[&str] {
        &["irqchip"]
    }

    fn schema(&self) -> u32 {
        SavedPciHost::SCHEMA
    }

    fn drain(&self, _deadline: Instant) -> Result<(), UnitError> {
        Ok(())
    }

    fn undrain(&self) -> Result<(), UnitError> {
        Ok(())
    }

    fn begin_stop(&self) -> Result<(), UnitError> {
        Ok(())
    }

    fn finish_stop(&self, _deadline: Instant) -> Result<(), UnitError> {
        Ok(())
    }

    fn save(&self) -> Result<Saved, UnitError> {
        let functions = unpoison(self.functions.read());
        let functions = functions.iter().filter_map(|(address, function)| {
            let mut config = function.save_config()?;
            let length = config.len() as u32;
            config.truncate(config.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1));
            Some(SavedFunction { devfn: address.devfn().into(), config, length })
        });
        let saved = SavedPciHost { functions: functions.collect(), config_address: *self.config_address() };
        Ok(Saved::Section(saved.to_section(&self.id())))
    }

    fn restore(&self, section: &Section) -> Result<(), UnitError> {
        self.once.restoring()?;
        let saved = SavedPciHost::from_section(section)?;
        let functions = unpoison(self.functions.read());
        let mut ours: BTreeMap<u32, _> = functions
            .iter()
            .filter(|(_, function)| function.save_config().is_some())
            .map(|(address, function)| (u32::from(address.devfn()), (*address, function)))
            .collect();
        for SavedFunction { devfn, mut config, length } in saved.functions {
            let (address, function) = ours.remove(&devfn).ok_or_else(|| {
                UnitError::failed(format!("there is state for PCI function {devfn:#04x}, which this machine lacks"))
            })?;
            if length > 4096 || config.len() > length as usize {
                return Err(UnitError::failed(format!("PCI function {address}: impossible length {length}")));
            }
            config.resize(length as usize, 0);
            function
                .restore_config(&config)
                .map_err(|reason| UnitError::failed(format!("PCI function {address}: {reason}")))?;
        }
        if let Some((address, _)) = ours.into_values().next() {
            return Err(UnitError::failed(format!("there is no state for PCI function {address}")));
        }
        *self.config_address() = saved.config_address;
        Ok(())
    }

    fn start(&self) -> Result<(), UnitError> {
        self.once.started();
        Ok(())
    }
}
