//! vhost-user: virtio devices whose rings another process serves.
//!
//! - [`Backend`] is a connection to such a process, with what it said of itself: enough to describe a machine, or to refuse
//!   one. Making it shows the process no memory.
//! - [`VhostUser`] is the device behind a transport. Its thread speaks with the back end: features, memory, rings.
//! - [`VhostLog`] is what the back end writes, as a dirty source.
//! - [`saved`] is how the next process of the machine goes on with a back end, which serves on meanwhile.
//! - `wire` are messages with their deadlines, `front` one function for each, `worker` the thread, `orders` how it is reached, `postcopy` how a back end
//!   takes part while memory follows.
//!
//! The guest rings the back end by its ioeventfds, and the back end interrupts the guest by the irqfds of its vectors: this
//! process is in neither way.
//!
//! Contract: the back end is another process, and hostile. It has a deadline for every answer, and one that answers wrongly,
//! late, or not at all is given up and named; its device then needs a reset, by which the driver gets another back end if
//! there is one. At rest means that it has given back everything it had taken: only then is its log read for the last time.

mod front;
mod log;
mod orders;
mod postcopy;
pub mod saved;
#[cfg(test)]
mod served_tests;
#[cfg(test)]
mod tests;
mod wire;
mod worker;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_F_MQ;
use wherry_fault::FaultService;
use wherry_handover::{Registry, Shelf};
use wherry_interrupt::Events;
use wherry_memory::Ram;
use wherry_state::{SavedState, Section, UnitError, UnitId};

use self::front::{Front, protocol};
pub use self::log::VhostLog;
use self::wire::Connection;
pub use self::wire::VhostError;
use self::worker::{Came, Given, Worker};
use crate::device::{Activation, Device, Kind, Serving, read_config};
use crate::saved::{SavedTransport, SavedVhostUser};

/// Number of the block device (virtio 1.3, section 5.2).
pub const BLK: u16 = 2;
/// Number of the network device (section 5.1).
pub const NET: u16 = 1;
/// Features of a network device that need its ring of commands, which nobody serves here, or the rings that are switched on by
/// it: guest offloads, commands, modes of receiving, VLANs, announcements, pairs of rings, addresses, hashes.
const NET_COMMANDS: u64 = 1 << 2 | 1 << 17 | 1 << 18 | 1 << 19 | 1 << 21 | 1 << 22 | 1 << 23 | 1 << 57 | 1 << 60;
/// Features of a network device that are told in its configuration: largest packet, address, state of the link, its speed.
const NET_TOLD: u64 = 1 << 3 | NET_ADDRESS | 1 << 16 | 1 << 63;
const NET_ADDRESS: u64 = 1 << 5;
/// Bytes of a block device's configuration, and where it says how many rings it has.
const BLK_CONFIG: u32 = 60;
const BLK_QUEUES: usize = 34;
/// Bytes of the configuration of a device that nothing else is known of.
const CONFIG: u32 = 256;
/// Features of the device that this process would have to do something for: packed rings, an IOMMU, more notification data.
const NOT_HERE: u64 = 1 << 33 | 1 << 34 | 1 << 38 | 1 << 40;
/// Entries of each ring.
const RING: u16 = 256;
/// Most rings of a device.
pub const MOST_QUEUES: u16 = 64;

/// What a device behind a back end is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VhostSpec {
    /// The back end's socket.
    pub socket: PathBuf,
    /// Number of the device type.
    pub id: u16,
    /// Rings.
    pub queues: u16,
}

/// A back end that is connected, and has seen no memory yet.
pub struct Backend {
    spec: VhostSpec,
    features: u64,
    /// As the guest sees it. The device that is made of it keeps it true.
    config: Arc<Mutex<Vec<u8>>>,
    can_fault: bool,
    /// Taken by the device that is made of it.
    front: Mutex<Option<Front>>,
    /// What of it is kept over a live update.
    shelf: Shelf,
    /// What another process has left of it, for the device that is made of it.
    came: Mutex<Option<Came>>,
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backend").field("spec", &self.spec).field("features", &self.features).finish_non_exhaustive()
    }
}

impl Backend {
    /// Connects.
    pub fn connect(spec: &VhostSpec) -> Result<Self, VhostError> {
        let front = Front::open(&spec.socket)?;
        if u64::from(spec.queues) > front.queues() {
            let reason = format!("it serves {} rings, and {} are wanted", front.queues(), spec.queues);
            return Err(front.connection().lacks(reason));
        }
        let mut features = front.features() & !NOT_HERE;
        let config = match (front.has(protocol::CONFIG), spec.id) {
            (true, BLK) => told_config(&front, spec)?,
            // It may have less than is asked for, or nothing at all.
            (true, _) => told_config(&front, spec).unwrap_or_default(),
            (false, BLK) => return Err(front.connection().lacks("it does not tell its configuration (CONFIG)")),
            (false, _) => Vec::new(),
        };
        if spec.id == NET {
            features &= !NET_COMMANDS;
            if config.is_empty() {
                features &= !NET_TOLD;
            }
        }
        if spec.id == BLK && spec.queues == 1 {
            features &= !(1 << VIRTIO_BLK_F_MQ);
        }
        let can_fault = front.has(protocol::PAGEFAULT);
        let config = Arc::new(Mutex::new(config));
        let front = Mutex::new(Some(front));
        let shelf = Shelf::new(Registry::new(), "vhost-user");
        Ok(Self { spec: spec.clone(), features, config, can_fault, front, shelf, came: Mutex::default() })
    }

    /// What is to be kept of it over a live update is there.
    #[must_use]
    pub fn kept_on(self, shelf: Shelf) -> Self {
        Self { shelf, ..self }
    }

    /// A back end that another process uses: the features and the configuration that it shows to the guest are known. Nothing is
    /// asked of it.
    pub fn inherit(spec: &VhostSpec, features: u64, config: &[u8], shelf: Shelf) -> Self {
        let came = Mutex::new(Some(Came::claim(&shelf, spec.queues)));
        let config = Arc::new(Mutex::new(config.to_vec()));
        Self { spec: spec.clone(), features, config, can_fault: false, front: Mutex::default(), shelf, came }
    }

    /// Where the eventfds of its rings and vectors come from.
    pub fn events(&self) -> Events {
        Events::kept(self.shelf.clone())
    }

    /// What it was asked to be.
    pub fn spec(&self) -> &VhostSpec {
        &self.spec
    }

    /// What it offers.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The device's configuration, as the guest sees it now.
    pub fn config(&self) -> Vec<u8> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether it takes part in postcopy.
    pub fn can_fault(&self) -> bool {
        self.can_fault
    }
}

/// What it tells of the configuration, as the guest is to see it.
fn told_config(front: &Front, spec: &VhostSpec) -> Result<Vec<u8>, VhostError> {
    let mut config = front.config(if spec.id == BLK { BLK_CONFIG } else { CONFIG })?;
    if spec.id == BLK
        && let Some(queues) = config.get_mut(BLK_QUEUES..BLK_QUEUES + 2)
    {
        queues.copy_from_slice(&spec.queues.to_le_bytes());
    }
    Ok(config)
}

fn kind(id: u16) -> Kind {
    match id {
        BLK => Kind { id, name: "vhost-user-blk", class: [1, 0x80, 0] },
        NET => Kind { id, name: "vhost-user-net", class: [2, 0, 0] },
        _ => Kind { id, name: "vhost-user", class: [0xff, 0, 0] },
    }
}

/// Asks a back end at the other end of a socket for everything, one request after the other, until one fails: for tests.
#[doc(hidden)]
pub fn ask_everything(stream: UnixStream, limit: Duration, ram: &Ram) -> Result<(), VhostError> {
    let path = Path::new("a socket pair");
    let failed = |source| VhostError::Connect { path: path.into(), source };
    let log = rustix::fs::memfd_create("wherry-dirty-log", rustix::fs::MemfdFlags::CLOEXEC);
    let log = log.map_err(|e| failed(e.into()))?;
    front::ask_everything(Connection::over(stream, path, limit).map_err(failed)?, ram, log.as_fd())
}

/// The name of a device type's state unit; several device types may share one.
pub fn unit_name(id: u16) -> &'static str {
    kind(id).name
}

/// A device whose rings another process serves.
pub struct VhostUser {
    worker: Worker,
    socket: PathBuf,
    instance: u32,
    id: u16,
    features: u64,
    sizes: Vec<u16>,
    /// The guest has come from elsewhere, and has not been started yet.
    arrived: AtomicBool,
    log: Arc<VhostLog>,
}

impl VhostUser {
    /// A device of a back end, which goes with it; `instance` as that of its transport. With `faults`, memory may follow.
    pub fn new(
        backend: &Backend,
        instance: u32,
        ram: &Arc<Ram>,
        faults: Option<Arc<FaultService>>,
    ) -> Result<Self, VhostError> {
        let spec = &backend.spec;
        let front = backend.front.lock().unwrap_or_else(PoisonError::into_inner).take();
        let came = backend.came.lock().unwrap_or_else(PoisonError::into_inner).take();
        let front = match front {
            Some(front) => Some(front),
            None if came.is_some() => None,
            // The device that had it is gone: a back end serves one front end after the other.
            None => Some(Front::open(&spec.socket)?),
        };
        let socket = spec.socket.clone();
        let given = Given {
            name: format!("vhost-{}-{instance}", spec.id),
            spec: spec.clone(),
            config: backend.config.clone(),
            front,
            ram: ram.clone(),
            faults,
            shelf: backend.shelf.clone(),
            came,
        };
        let worker = Worker::spawn(given)?;
        let log = VhostLog::new(format!("vhost-user {}", socket.display()), ram.clone(), worker.orders.clone());
        Ok(Self {
            worker,
            socket,
            instance,
            id: spec.id,
            features: backend.features,
            sizes: vec![RING; spec.queues.into()],
            arrived: AtomicBool::new(false),
            log: Arc::new(log),
        })
    }

    /// What the back end writes.
    pub fn log(&self) -> Arc<VhostLog> {
        self.log.clone()
    }

    /// The back end's socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    fn config(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.worker.orders.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for VhostUser {
    fn kind(&self) -> Kind {
        kind(self.id)
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn ring_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        read_config(&config, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let mut config = self.config();
        let Some(there) =
            (offset as usize).checked_add(data.len()).and_then(|end| config.get_mut(offset as usize..end))
        else {
            return;
        };
        there.copy_from_slice(data);
        drop(config);
        self.worker.orders.write_config(offset as u32, data.to_vec());
    }

    fn activate(&self, activation: Activation) -> Result<(), UnitError> {
        self.worker.orders.activate(activation);
        Ok(())
    }

    fn reset(&self) {
        self.worker.orders.reset();
    }

    fn serving(&self) -> &dyn Serving {
        &*self.worker.orders
    }

    fn start(&self) {
        self.worker.orders.start();
        if self.arrived.swap(false, Ordering::AcqRel)
            && self.features & NET_ADDRESS != 0
            && let (NET, Some(address)) = (self.id, self.config().first_chunk())
        {
            // It cannot do so itself: that takes a command. So the back end has the network learn where it is.
            self.worker.orders.announce(*address);
        }
    }

    fn vector_changed(&self, ring: u16) {
        self.worker.orders.vector(ring);
    }

    fn schema(&self) -> u32 {
        SavedVhostUser::SCHEMA
    }

    fn save(&self, transport: SavedTransport) -> Section {
        let saved = SavedVhostUser {
            transport: Some(transport),
            id: self.id.into(),
            config: self.config().clone(),
            back_end: self.worker.orders.state(),
            kept: self.worker.orders.take_left(),
        };
        saved.to_section(&UnitId::new(self.kind().name, self.instance))
    }

    fn restore(&self, section: &Section) -> Result<SavedTransport, UnitError> {
        let saved = SavedVhostUser::from_section(section)?;
        let socket = self.socket.display();
        if saved.id != u32::from(self.id) {
            let (wanted, here) = (saved.id, self.id);
            return Err(UnitError::failed(format!("a virtio device {wanted}; the back end at {socket} is a {here}")));
        }
        // The first words say how large the device is; what a driver may write, it has written.
        if self.id == BLK && saved.config.get(..8) != self.config().get(..8) {
            return Err(UnitError::failed(format!("a disk of another size than that of the back end at {socket}")));
        }
        if saved.config.len() == self.config().len() {
            self.config().clone_from(&saved.config);
        }
        if let Some(kept) = saved.kept {
            self.worker.orders.adopt(kept).map_err(UnitError::failed)?;
            return saved.transport.ok_or_else(|| UnitError::failed("there is no state of its transport"));
        }
        if !saved.back_end.is_empty() {
            self.worker.orders.load(saved.back_end).map_err(UnitError::failed)?;
        }
        self.arrived.store(true, Ordering::Release);
        saved.transport.ok_or_else(|| UnitError::failed("there is no state of its transport"))
    }
}
