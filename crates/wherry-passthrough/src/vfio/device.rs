//! A function of this host.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use prost::Message;
use vm_memory::FileOffset;
use wherry_handover::Shelf;
use wherry_interrupt::Event;
use wherry_memory::Block;
use wherry_vfio_user::State;
use wherry_vfio_user::payload::{Area, IrqSet, RegionInfo, Words, device_flags, pci_irq, pci_region, region_flags};

use super::address::HostAddress;
use super::error::VfioError;
use super::features::Features;
use super::iommufd::Iommufd;
use super::kernel::{Calls, request, whole};
use super::saved::SavedHold;
use super::space::{Space, Way};
use super::type1::Group;
use crate::config::SIZE;
use crate::owner::{Attention, Facts, Irq, Owner, OwnerError, RegionFacts, number};
use crate::saved::SavedOwner;

/// Most bytes that the kernel may say of a region.
const MOST_INFO: usize = 64 << 10;
/// Bytes for what the kernel says of a reset by the bus: room for all functions of a few.
const HOT_RESET_INFO: usize = 16 << 10;

/// Names of what is kept, after that of the function.
const DEVICE: &str = "device";
const FACTS: &str = "facts";
const ERROR: &str = "error";
const REQUEST: &str = "request";

/// What a function hangs on.
pub(super) struct Held {
    pub(super) file: Arc<OwnedFd>,
    /// Its group, if it was opened by that.
    pub(super) group: Option<Arc<Group>>,
    /// Its page table, if it has one of its own.
    pub(super) table: Option<u32>,
    pub(super) space: Arc<Space>,
}

/// A function of this host, by the kernel's VFIO.
pub struct Vfio {
    calls: Calls,
    address: HostAddress,
    name: String,
    facts: Facts,
    /// Where its regions begin in its file: BARs, configuration space.
    bars: [u64; 6],
    config: u64,
    /// It is reset by its bus, on which nothing else is.
    hot_reset: bool,
    attention: Attention,
    features: Features,
    held: Held,
    inherited: bool,
    /// Holds the entry of what it is.
    note: Mutex<Option<Arc<OwnedFd>>>,
}

impl std::fmt::Debug for Vfio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vfio").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What is asked of a function while it is not one yet.
struct Asking<'a> {
    calls: &'a Calls,
    file: BorrowedFd<'a>,
    address: HostAddress,
}

impl Asking<'_> {
    fn lacks(&self, reason: impl Into<String>) -> VfioError {
        VfioError::Lacks { device: self.address, reason: reason.into() }
    }

    /// `struct vfio_device_info` and `struct vfio_irq_info` are four words.
    fn words(&self, request: u32, what: &'static str, third: u32) -> Result<Words, VfioError> {
        let words = Words { argsz: Words::SIZE as u32, flags: 0, third, fourth: 0 };
        let mut bytes = words.encode();
        self.calls.bytes(self.file, request, &mut bytes).map_err(VfioError::call(self.address, what))?;
        Words::decode(&bytes).map_err(|error| self.lacks(format!("{what}: {error}")))
    }

    fn region(&self, index: u32) -> Result<RegionInfo, VfioError> {
        let what = "asking for its regions";
        let ask = RegionInfo { index, ..RegionInfo::default() }.encode();
        let answer = whole(self.calls, self.file, request::DEVICE_GET_REGION_INFO, ask, MOST_INFO);
        let answer = answer.map_err(VfioError::call(self.address, what))?;
        RegionInfo::decode(&answer).map_err(|error| self.lacks(format!("{what}: {error}")))
    }

    /// Vectors of a kind of interrupts.
    fn irqs(&self, index: u32) -> Result<u32, VfioError> {
        Ok(self.words(request::DEVICE_GET_IRQ_INFO, "asking for its interrupts", index)?.fourth)
    }

    /// Whether a reset by the bus is one of this function alone.
    fn is_alone(&self) -> bool {
        let mut info = vec![0; HOT_RESET_INFO];
        info[..4].copy_from_slice(&(HOT_RESET_INFO as u32).to_ne_bytes());
        if self.calls.bytes(self.file, request::DEVICE_GET_PCI_HOT_RESET_INFO, &mut info).is_err() {
            return false;
        }
        let HostAddress { segment, bus, .. } = self.address;
        // Group or number, segment, bus, device and function: of the one there is.
        let count = u32::from_ne_bytes([info[8], info[9], info[10], info[11]]);
        let place = (u32::from(u16::from_ne_bytes([info[16], info[17]])), info[18], info[19]);
        count == 1 && place == (segment, bus, self.address.devfn())
    }
}

impl Vfio {
    /// Asks what it is.
    pub(super) fn open(calls: Calls, address: HostAddress, held: Held) -> Result<Self, VfioError> {
        let asking = Asking { calls: &calls, file: held.file.as_fd(), address };
        let info = asking.words(request::DEVICE_GET_INFO, "asking what it is", 0)?;
        if info.flags & device_flags::PCI == 0 {
            return Err(asking.lacks("it is no PCI device"));
        }
        let mut facts = Facts { pins: true, ..Facts::default() };
        let file = File::from(held.file.try_clone().map_err(VfioError::call(address, "sharing its descriptor"))?);
        let file = Arc::new(file);
        let mut bars = [0; 6];
        for (index, bar) in (0..).zip(&mut facts.bars) {
            let region = asking.region(index)?;
            bars[index as usize] = region.offset;
            *bar = shown(&file, region);
        }
        let config = asking.region(pci_region::CONFIG)?;
        if config.size < 64 {
            return Err(asking.lacks(format!("configuration space of {} bytes", config.size)));
        }
        facts.config = vec![0; config.size.min(SIZE as u64) as usize];
        read(asking.file, config.offset, &mut facts.config)
            .map_err(VfioError::call(address, "reading its configuration"))?;
        facts.intx = asking.irqs(pci_irq::INTX)? > 0;
        (facts.msi, facts.msix) = (asking.irqs(pci_irq::MSI)?, asking.irqs(pci_irq::MSIX)?);
        let hot_reset = info.flags & device_flags::RESET == 0 && asking.is_alone();
        facts.resettable = hot_reset || info.flags & device_flags::RESET != 0;
        let features = Features::ask(calls.clone(), held.file.clone(), address);
        facts.migration = features.migration();
        facts.logging = features.logs() || held.table.is_some();
        // Kinds that the kernel does not know it refuses.
        let has = |index| asking.irqs(index).is_ok_and(|count| count > 0);
        let event = |index| {
            let new = || Event::new().map(Arc::new).map_err(VfioError::call(address, "making an eventfd"));
            has(index).then(new).transpose()
        };
        let attention = Attention { error: event(pci_irq::ERR)?, request: event(pci_irq::REQ)? };
        let name = format!("{}:{address}", crate::VFIO);
        let (config, note) = (config.offset, Mutex::default());
        let this = Self {
            calls,
            address,
            name,
            facts,
            bars,
            config,
            hot_reset,
            attention,
            features,
            held,
            inherited: false,
            note,
        };
        for (index, event) in [(pci_irq::ERR, &this.attention.error), (pci_irq::REQ, &this.attention.request)] {
            if let Some(event) = event {
                this.set_irqs(index, IrqSet::TRIGGER, 0, &[event.as_fd()])?;
            }
        }
        Ok(this)
    }

    /// Takes what another process has [kept](Owner::keep), and still uses.
    pub(super) fn inherit(
        calls: Calls,
        address: HostAddress,
        shelf: &Shelf,
        hold: impl FnOnce(&SavedHold, Arc<OwnedFd>) -> Result<Held, VfioError>,
    ) -> Result<Self, VfioError> {
        let failed = |error: &dyn std::fmt::Display| VfioError::Lacks { device: address, reason: error.to_string() };
        let note = shelf.inherit_note(FACTS).map_err(|error| failed(&error))?;
        let saved = SavedOwner::decode(note.as_slice()).map_err(|error| failed(&error))?;
        let hold_saved = SavedHold::decode(saved.connection.as_slice()).map_err(|error| failed(&error))?;
        let file = Arc::new(shelf.inherit(DEVICE, 0).map_err(|error| failed(&error))?);
        let share = |_| file.try_clone().map_err(VfioError::call(address, "sharing its descriptor"));
        let mut facts = saved.facts(share, share)?;
        facts.pins = true;
        let held = hold(&hold_saved, file)?;
        let event = |there: bool, what| {
            let inherit = || shelf.inherit(what, 0).map(Event::from).map(Arc::new).map_err(|error| failed(&error));
            there.then(inherit).transpose()
        };
        let SavedHold { errors, requests, logs, config, hot_reset, bars, .. } = hold_saved;
        let attention = Attention { error: event(errors, ERROR)?, request: event(requests, REQUEST)? };
        let bars = bars.try_into().map_err(|_| failed(&"the places of its BARs"))?;
        let features = Features::known(calls.clone(), held.file.clone(), address, logs);
        Ok(Self {
            calls,
            address,
            name: format!("{}:{address}", crate::VFIO),
            facts,
            bars,
            config,
            hot_reset,
            attention,
            features,
            held,
            inherited: true,
            note: Mutex::default(),
        })
    }

    /// Where it is on this host.
    pub fn address(&self) -> HostAddress {
        self.address
    }

    fn file(&self) -> BorrowedFd<'_> {
        self.held.file.as_fd()
    }

    fn call(&self, what: &'static str) -> impl FnOnce(std::io::Error) -> VfioError {
        VfioError::call(self.address, what)
    }

    /// Sets interrupts; without eventfds, `count` of them by themselves.
    fn set_irqs(&self, index: u32, action: u32, start: u32, events: &[BorrowedFd<'_>]) -> Result<(), VfioError> {
        let numbers: Vec<u8> = events.iter().flat_map(|event| event.as_raw_fd().to_ne_bytes()).collect();
        let set = IrqSet { flags: action | IrqSet::EVENTFD, index, start, count: events.len() as u32 };
        self.send_irqs(set.encode(&numbers))
    }

    fn send_irqs(&self, mut set: Vec<u8>) -> Result<(), VfioError> {
        let sent = self.calls.bytes(self.file(), request::DEVICE_SET_IRQS, &mut set);
        sent.map(drop).map_err(self.call("setting its interrupts"))
    }

    fn act_on_irqs(&self, action: u32, index: u32, count: u32) -> Result<(), VfioError> {
        self.send_irqs(IrqSet { flags: action | IrqSet::NONE, index, start: 0, count }.encode(&[]))
    }

    /// The answer to what is asked only of an owner that takes part in postcopy.
    fn waits_not(&self) -> OwnerError {
        self.call("waiting for memory")(std::io::ErrorKind::Unsupported.into()).into()
    }

    /// By what the IOMMU tells what it writes, where it cannot by itself.
    fn tracker(&self) -> Option<(&Iommufd, u32)> {
        match (&self.held.space.way, self.held.table) {
            (Way::Iommufd(iommufd), Some(table)) if !self.features.logs() => Some((iommufd, table)),
            _ => None,
        }
    }
}

/// What of a region a guest can be shown.
fn shown(file: &Arc<File>, region: RegionInfo) -> RegionFacts {
    let mut facts = RegionFacts { size: region.size, ..RegionFacts::default() };
    let whole = region_flags::READ | region_flags::WRITE | region_flags::MMAP;
    if region.size > 0 && region.flags & whole == whole {
        let all = vec![Area { offset: 0, size: region.size }];
        facts.areas = if region.sparse.is_empty() { all } else { region.sparse };
        facts.file = Some(FileOffset::from_arc(file.clone(), region.offset));
    }
    facts
}

/// Reads a region. A device that has gone reads as ones, which is no error of the kernel's.
fn read(file: BorrowedFd<'_>, offset: u64, data: &mut [u8]) -> std::io::Result<()> {
    let mut done = 0;
    while done < data.len() {
        match rustix::io::pread(file, &mut data[done..], offset + done as u64) {
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(more) => done += more,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn write(file: BorrowedFd<'_>, offset: u64, data: &[u8]) -> std::io::Result<()> {
    let mut done = 0;
    while done < data.len() {
        match rustix::io::pwrite(file, &data[done..], offset + done as u64) {
            Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
            Ok(more) => done += more,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

impl Owner for Vfio {
    fn kind(&self) -> &'static str {
        crate::VFIO
    }

    fn label(&self) -> String {
        self.address.to_string()
    }

    /// The kernel answers at once.
    fn close(&self) {}

    fn name(&self) -> &str {
        &self.name
    }

    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn hypervisor_file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.held.group.as_ref().map_or(self.file(), |group| group.file.as_fd()))
    }

    fn attention(&self) -> Attention {
        self.attention.clone()
    }

    fn cannot_keep(&self) -> Option<String> {
        self.held.space.cannot_keep().map(str::to_owned)
    }

    fn keep(&self, shelf: &Shelf) -> Result<(), OwnerError> {
        let failed = |reason: String| VfioError::Lacks { device: self.address, reason };
        let keep = || {
            shelf.keep(DEVICE, 0, self.held.file.clone())?;
            for (what, event) in [(ERROR, &self.attention.error), (REQUEST, &self.attention.request)] {
                if let Some(event) = event {
                    shelf.keep(what, 0, event.clone())?;
                }
            }
            let hold = SavedHold {
                group: self.held.group.as_ref().map(|group| group.number),
                iommufd: match &self.held.space.way {
                    Way::Iommufd(iommufd) => Some(iommufd.space),
                    Way::Type1(_) => None,
                },
                table: self.held.table,
                config: self.config,
                bars: self.bars.to_vec(),
                hot_reset: self.hot_reset,
                errors: self.attention.error.is_some(),
                requests: self.attention.request.is_some(),
                logs: self.features.logs(),
            };
            let note = SavedOwner::of(&self.facts, hold.encode_to_vec()).encode_to_vec();
            shelf.add_note(FACTS, &note)
        };
        let note = keep().map_err(|error| failed(error.to_string()))?;
        *self.note.lock().unwrap_or_else(PoisonError::into_inner) = Some(note);
        Ok(())
    }

    fn is_inherited(&self) -> bool {
        self.inherited
    }

    fn rest(&self, _: Instant) -> Result<Vec<u8>, OwnerError> {
        let left = self.held.space.leave();
        left.map_err(self.call("leaving the memory of the machine to another process"))?;
        Ok(Vec::new())
    }

    fn take(&self, _: &[u8]) -> Result<(), OwnerError> {
        let taken = self.held.space.take_over();
        Ok(taken.map_err(self.call("taking over the memory of the machine"))?)
    }

    fn go_on(&self) {
        // What is pinned stays so, and DMA goes on, whatever comes of this.
        if let Err(error) = self.held.space.take_over() {
            tracing::error!(device = self.name, %error, "taking back the memory of the machine");
        }
    }

    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) -> Result<(), OwnerError> {
        Ok(read(self.file(), self.bars[bar] + offset, data).map_err(self.call("reading a BAR"))?)
    }

    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) -> Result<(), OwnerError> {
        Ok(write(self.file(), self.bars[bar] + offset, data).map_err(self.call("writing a BAR"))?)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) -> Result<(), OwnerError> {
        Ok(read(self.file(), self.config + offset, data).map_err(self.call("reading its configuration"))?)
    }

    fn write_config(&self, offset: u64, data: &[u8]) -> Result<(), OwnerError> {
        Ok(write(self.file(), self.config + offset, data).map_err(self.call("writing its configuration"))?)
    }

    fn map_dma(&self, address: u64, size: u64, block: &Arc<Block>, offset: u64) -> Result<(), OwnerError> {
        let pin = |source| VfioError::Pin { device: self.address, address, size, source: Arc::new(source) };
        Ok(self.held.space.map(address, size, block, offset).map_err(pin)?)
    }

    fn inherit_dma(&self, address: u64, size: u64, block: &Arc<Block>, offset: u64) -> Result<(), OwnerError> {
        let inherited = self.held.space.inherit(address, size, block, offset);
        Ok(inherited.map_err(self.call("taking over the memory of the machine"))?)
    }

    fn unmap_dma(&self, address: u64, size: u64) -> Result<(), OwnerError> {
        Ok(self.held.space.unmap(address, size).map_err(self.call("unpinning guest memory"))?)
    }

    fn begin_faults(&self) -> Result<OwnedFd, OwnerError> {
        Err(self.waits_not())
    }

    fn map_missing(&self, _: u64, _: u64, _: &Arc<Block>, _: u64) -> Result<u64, OwnerError> {
        Err(self.waits_not())
    }

    fn end_faults(&self) -> Result<(), OwnerError> {
        Err(self.waits_not())
    }

    fn signal(&self, irq: Irq, start: u32, events: &[BorrowedFd<'_>]) -> Result<(), OwnerError> {
        Ok(self.set_irqs(number(irq), IrqSet::TRIGGER, start, events)?)
    }

    fn silence(&self, irq: Irq) -> Result<(), OwnerError> {
        Ok(self.act_on_irqs(IrqSet::TRIGGER, number(irq), 0)?)
    }

    fn unmask_by(&self, event: BorrowedFd<'_>) -> Result<bool, OwnerError> {
        self.set_irqs(pci_irq::INTX, IrqSet::UNMASK, 0, &[event])?;
        Ok(true)
    }

    fn unmask(&self) -> Result<(), OwnerError> {
        Ok(self.act_on_irqs(IrqSet::UNMASK, pci_irq::INTX, 1)?)
    }

    fn reset(&self) -> Result<(), OwnerError> {
        if !self.hot_reset {
            let reset = self.calls.number(self.file(), request::DEVICE_RESET, 0);
            return Ok(reset.map(drop).map_err(self.call("resetting it"))?);
        }
        // The kernel wants to see that the groups of all functions it reaches are ours; with iommufd it knows.
        let group = self.held.group.as_ref().map(|group| group.file.as_raw_fd() as u32);
        let mut words = vec![12 + 4 * u32::from(group.is_some()), 0, u32::from(group.is_some())];
        words.extend(group);
        let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
        let reset = self.calls.bytes(self.file(), request::DEVICE_PCI_HOT_RESET, &mut bytes);
        Ok(reset.map(drop).map_err(self.call("resetting its bus"))?)
    }

    fn state(&self) -> Result<State, OwnerError> {
        Ok(self.features.state()?)
    }

    fn set_state(&self, state: State) -> Result<(), OwnerError> {
        Ok(self.features.set_state(state)?)
    }

    fn read_state(&self, most: usize) -> Result<Vec<u8>, OwnerError> {
        Ok(self.features.read_state(most)?)
    }

    fn write_state(&self, data: &[u8]) -> Result<(), OwnerError> {
        Ok(self.features.write_state(data)?)
    }

    fn estimate(&self) -> Result<Option<u64>, OwnerError> {
        Ok(self.features.estimate()?)
    }

    fn start_log(&self, ranges: &[(u64, u64)]) -> Result<u64, OwnerError> {
        match self.tracker() {
            None => Ok(self.features.start_log(ranges)?),
            Some((iommufd, table)) => {
                iommufd.track(table, true).map_err(self.call("having the IOMMU track what it writes"))?;
                Ok(wherry_memory::GRANULE)
            }
        }
    }

    fn stop_log(&self) -> Result<(), OwnerError> {
        match self.tracker() {
            None => Ok(self.features.stop_log()?),
            Some((iommufd, table)) => {
                Ok(iommufd.track(table, false).map_err(self.call("having the IOMMU track no longer"))?)
            }
        }
    }

    fn read_log(&self, address: u64, bytes: u64, page: u64) -> Result<Vec<u64>, OwnerError> {
        match self.tracker() {
            None => Ok(self.features.read_log(address, bytes, page)?),
            Some((iommufd, table)) => {
                let written = iommufd.written(table, address, bytes, page);
                Ok(written.map_err(self.call("asking the IOMMU what it wrote"))?)
            }
        }
    }
}
