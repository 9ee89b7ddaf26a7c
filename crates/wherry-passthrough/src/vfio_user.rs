//! A function that another process owns and offers by vfio-user.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use prost::Message;
use rustix::fs::SealFlags;
use rustix::io::Errno;
use vm_memory::FileOffset;
use wherry_handover::Shelf;
use wherry_memory::Block;
use wherry_vfio_user::client::{NoMemory, RegionReply};
use wherry_vfio_user::payload::{Area, IoFd, IrqSet, device_flags, feature, pci_irq, pci_region, region_flags};
use wherry_vfio_user::{Client, Options, State, VfioUserError};

use crate::config::SIZE;
use crate::owner::{Attention, Bell, Facts, Irq, MigrationFacts, Owner, OwnerError, RegionFacts, number};
use crate::saved::SavedOwner;

/// Pages of a log, if the device lets us choose.
const LOG_PAGE: u64 = 4096;

/// Names of what is kept, after that of the function.
const CONNECTION: &str = "connection";
const TWIN: &str = "twin";
const FACTS: &str = "facts";
const REGION: &str = "region";
const BELL: &str = "bell";

/// A connection to a device process, and what it said of its function.
pub struct VfioUser {
    client: Client,
    name: String,
    socket: PathBuf,
    facts: Facts,
    inherited: bool,
    /// Holds the entry of what it is.
    note: Mutex<Option<Arc<OwnedFd>>>,
}

impl std::fmt::Debug for VfioUser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VfioUser").field("name", &self.name).finish_non_exhaustive()
    }
}

impl VfioUser {
    /// Connects, and asks what the function is. Nothing of it is changed.
    pub fn connect(socket: &Path) -> Result<Self, OwnerError> {
        let client = Client::connect(socket, Options::default(), Arc::new(NoMemory))?;
        let name = name(socket);
        let facts = facts(&client, &name)?;
        Ok(Self { client, name, socket: socket.into(), facts, inherited: false, note: Mutex::default() })
    }

    /// Takes what another process has [kept](Owner::keep) there, and still uses. It is at rest until it is told to go on.
    pub fn inherit(socket: &Path, shelf: &Shelf) -> Result<Self, OwnerError> {
        let name = name(socket);
        let failed = |reason: String| VfioUserError::Inherited { peer: name.clone(), reason };
        let inherit = |what, index| shelf.inherit(what, index as u32).map_err(|error| failed(error.to_string()));
        let note = shelf.inherit_note(FACTS).map_err(|error| failed(error.to_string()))?;
        let saved = SavedOwner::decode(note.as_slice()).map_err(|error| failed(error.to_string()))?;
        let facts = saved.facts(|bar| inherit(REGION, bar), |bell| inherit(BELL, bell))?;
        let sockets = (inherit(CONNECTION, 0)?, shelf.claim(TWIN, 0));
        let peer = socket.display().to_string();
        let client = Client::inherit(sockets, &saved.connection, &peer, Options::default(), Arc::new(NoMemory))?;
        Ok(Self { client, name, socket: socket.into(), facts, inherited: true, note: Mutex::default() })
    }

    /// Where it was found.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

fn name(socket: &Path) -> String {
    format!("vfio-user:{}", socket.display())
}

fn lacks(peer: &str, reason: impl Into<String>) -> VfioUserError {
    VfioUserError::Lacks { peer: peer.into(), reason: reason.into() }
}

fn facts(client: &Client, name: &str) -> Result<Facts, VfioUserError> {
    let info = client.info()?;
    if info.flags & device_flags::PCI == 0 {
        return Err(lacks(name, "it is no PCI device"));
    }
    let mut facts = Facts { resettable: info.flags & device_flags::RESET != 0, ..Facts::default() };
    let regions = |index: u32| (index < info.third).then(|| client.region_info(index)).transpose();
    for (index, bar) in (0..).zip(&mut facts.bars) {
        if let Some(reply) = regions(index)? {
            *bar = region(client, name, index, reply)?;
        }
    }
    let config = regions(pci_region::CONFIG)?.map_or(0, |reply| reply.info.size);
    if config < 64 {
        return Err(lacks(name, format!("configuration space of {config} bytes")));
    }
    facts.config = vec![0; config.min(SIZE as u64) as usize];
    client.read(pci_region::CONFIG, 0, &mut facts.config)?;
    let irqs = |index: u32| if index < info.fourth { client.irq_info(index).map(|irq| irq.fourth) } else { Ok(0) };
    facts.intx = irqs(pci_irq::INTX)? > 0;
    (facts.msi, facts.msix) = (irqs(pci_irq::MSI)?, irqs(pci_irq::MSIX)?);
    if client.probe(feature::MIGRATION, feature::GET)? {
        let flags = client.migration()?;
        if flags & feature::STOP_COPY != 0 {
            let (pre_copy, p2p) = (flags & feature::PRE_COPY != 0, flags & feature::P2P != 0);
            facts.migration = Some(MigrationFacts { pre_copy, p2p });
        }
    }
    facts.logging =
        client.probe(feature::LOGGING_START, feature::SET)? && client.probe(feature::LOGGING_REPORT, feature::GET)?;
    facts.faults = client.extensions().userfaultfd;
    Ok(facts)
}

/// A region, with what of it can be mapped and what only rings.
fn region(client: &Client, name: &str, index: u32, reply: RegionReply) -> Result<RegionFacts, VfioUserError> {
    let RegionReply { info, file } = reply;
    let mut facts = RegionFacts { size: info.size, ..RegionFacts::default() };
    if info.size == 0 {
        return Ok(facts);
    }
    if info.flags & region_flags::MMAP != 0
        && let Some(file) = file
    {
        match can_be_mapped(&file, info.offset, info.size) {
            Ok(()) => {
                let whole = vec![Area { offset: 0, size: info.size }];
                facts.areas = if info.sparse.is_empty() { whole } else { info.sparse };
                facts.file = Some(FileOffset::new(File::from(file), info.offset));
            }
            Err(reason) => tracing::info!(device = name, region = index, "answered by messages: {reason}"),
        }
    }
    match client.region_io_fds(index) {
        Ok(io) => {
            let events = io.descriptors.into_iter().map(Arc::new).collect::<Vec<_>>();
            facts.bells = io.parts.iter().filter_map(|part| bell(part, &events)).collect();
        }
        // A server that knows no such thing says so in one of these ways.
        Err(error) if matches!(error.refused_with(), Some(Errno::NOSYS | Errno::NOTSUP | Errno::INVAL)) => {}
        Err(error) => return Err(error),
    }
    Ok(facts)
}

fn bell(part: &IoFd, events: &[Arc<OwnedFd>]) -> Option<Bell> {
    let len = u32::try_from(part.size).ok().filter(|len| matches!(len, 0 | 1 | 2 | 4 | 8))?;
    let matched = part.flags & IoFd::DATAMATCH != 0;
    // What else there is (ports, ioregionfd) is written to by messages, which reach the device just as well.
    if part.kind != IoFd::IOEVENTFD || part.flags & !IoFd::DATAMATCH != 0 || matched && len == 0 {
        return None;
    }
    let event = events.get(part.fd_index as usize)?.clone();
    Some(Bell { offset: part.offset, len, data: matched.then_some(part.data), event })
}

/// A file that its owner could cut would take the machine down when the guest touches what is gone.
fn can_be_mapped(file: &OwnedFd, offset: u64, size: u64) -> Result<(), String> {
    let seals = rustix::fs::fcntl_get_seals(file).map_err(|_| "its file cannot be sealed")?;
    if !seals.contains(SealFlags::SHRINK) {
        return Err("its file is not sealed against shrinking".into());
    }
    let stat = rustix::fs::fstat(file).map_err(|error| format!("its file: {error}"))?;
    let end = offset.checked_add(size).filter(|end| *end <= stat.st_size as u64 && offset.is_multiple_of(4096));
    end.map(|_| ()).ok_or_else(|| format!("its file has {} bytes, and it begins at {offset:#x}", stat.st_size))
}

impl Owner for VfioUser {
    fn kind(&self) -> &'static str {
        crate::VFIO_USER
    }

    fn label(&self) -> String {
        self.socket.display().to_string()
    }

    fn close(&self) {
        self.client.close();
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn hypervisor_file(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn attention(&self) -> Attention {
        Attention::default()
    }

    fn cannot_keep(&self) -> Option<String> {
        None
    }

    fn keep(&self, shelf: &Shelf) -> Result<(), OwnerError> {
        let failed = |reason: String| VfioUserError::Inherited { peer: self.name.clone(), reason };
        let (connection, twin) = self.client.descriptors();
        let sockets = [Some((CONNECTION, connection)), twin.map(|twin| (TWIN, twin))].into_iter().flatten();
        let keep = || {
            for (what, socket) in sockets {
                shelf.keep(what, 0, socket)?;
            }
            for (bar, file) in self.facts.bars.iter().enumerate().filter_map(|(n, bar)| Some((n, bar.file.as_ref()?))) {
                shelf.keep(REGION, bar as u32, file.arc().clone())?;
            }
            for (n, bell) in self.facts.bars.iter().flat_map(|bar| &bar.bells).enumerate() {
                shelf.keep(BELL, n as u32, bell.event.clone())?;
            }
            let note = SavedOwner::of(&self.facts, self.client.note()).encode_to_vec();
            shelf.add_note(FACTS, &note)
        };
        let note = keep().map_err(|error| failed(error.to_string()))?;
        *self.note.lock().unwrap_or_else(PoisonError::into_inner) = Some(note);
        Ok(())
    }

    fn is_inherited(&self) -> bool {
        self.inherited
    }

    fn rest(&self, deadline: Instant) -> Result<Vec<u8>, OwnerError> {
        Ok(self.client.rest(deadline)?)
    }

    fn take(&self, saved: &[u8]) -> Result<(), OwnerError> {
        Ok(self.client.take(saved)?)
    }

    fn go_on(&self) {
        self.client.go_on();
    }

    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) -> Result<(), OwnerError> {
        Ok(self.client.read(bar as u32, offset, data)?)
    }

    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) -> Result<(), OwnerError> {
        Ok(self.client.write(bar as u32, offset, data)?)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) -> Result<(), OwnerError> {
        Ok(self.client.read(pci_region::CONFIG, offset, data)?)
    }

    fn write_config(&self, offset: u64, data: &[u8]) -> Result<(), OwnerError> {
        Ok(self.client.write(pci_region::CONFIG, offset, data)?)
    }

    fn map_dma(&self, address: u64, size: u64, block: &Arc<Block>, offset: u64) -> Result<(), OwnerError> {
        Ok(self.client.dma_map(address, size, Some((block.fd(), offset)), true, true)?)
    }

    /// The device knows, and nobody else has to.
    fn inherit_dma(&self, _: u64, _: u64, _: &Arc<Block>, _: u64) -> Result<(), OwnerError> {
        Ok(())
    }

    fn begin_faults(&self) -> Result<OwnedFd, OwnerError> {
        Ok(self.client.begin_faults()?)
    }

    fn map_missing(&self, address: u64, size: u64, block: &Arc<Block>, offset: u64) -> Result<u64, OwnerError> {
        Ok(self.client.dma_map_missing(address, size, (block.fd(), offset))?)
    }

    fn end_faults(&self) -> Result<(), OwnerError> {
        Ok(self.client.end_faults()?)
    }

    fn unmap_dma(&self, address: u64, size: u64) -> Result<(), OwnerError> {
        Ok(self.client.dma_unmap(address, size)?)
    }

    fn signal(&self, irq: Irq, start: u32, events: &[BorrowedFd<'_>]) -> Result<(), OwnerError> {
        Ok(self.client.set_triggers(number(irq), start, events)?)
    }

    fn silence(&self, irq: Irq) -> Result<(), OwnerError> {
        Ok(self.client.disable_irq(number(irq))?)
    }

    /// Never: unlike the kernel's VFIO, a server of vfio-user *signals* an eventfd that is given for unmasking (chapter
    /// "VFIO_USER_DEVICE_SET_IRQS"), and reads none. It takes one all the same, so that asking would not tell.
    fn unmask_by(&self, _: BorrowedFd<'_>) -> Result<bool, OwnerError> {
        Ok(false)
    }

    fn unmask(&self) -> Result<(), OwnerError> {
        Ok(self.client.act_on_irq(IrqSet::UNMASK, pci_irq::INTX, 0, 1)?)
    }

    fn reset(&self) -> Result<(), OwnerError> {
        Ok(self.client.reset()?)
    }

    fn state(&self) -> Result<State, OwnerError> {
        Ok(self.client.state()?)
    }

    fn set_state(&self, state: State) -> Result<(), OwnerError> {
        Ok(self.client.set_state(state)?)
    }

    fn read_state(&self, most: usize) -> Result<Vec<u8>, OwnerError> {
        Ok(self.client.read_data(most)?)
    }

    fn write_state(&self, data: &[u8]) -> Result<(), OwnerError> {
        Ok(self.client.write_data(data)?)
    }

    fn estimate(&self) -> Result<Option<u64>, OwnerError> {
        Ok(self.client.estimate()?)
    }

    fn start_log(&self, ranges: &[(u64, u64)]) -> Result<u64, OwnerError> {
        Ok(self.client.start_logging(LOG_PAGE, ranges)?)
    }

    fn stop_log(&self) -> Result<(), OwnerError> {
        Ok(self.client.stop_logging()?)
    }

    fn read_log(&self, address: u64, bytes: u64, page: u64) -> Result<Vec<u64>, OwnerError> {
        Ok(self.client.read_log(address, bytes, page)?)
    }
}
