//! The network device (section 5.1), on a tap device of the host.
//!
//! - [`Net`] is the device; `packets` is what its thread does with packets and commands.
//! - [`Tap`] is the tap; `announce` the frame that tells the network where the guest is now.
//!
//! One pair of rings, and one for commands. Headers go between guest and tap as they are: the host computes checksums and
//! cuts segments where the driver wants that. Packets that come while the device is at rest wait in the tap, as many as its
//! queue is long (`txqueuelen`); one that was read waits here and moves with the guest. Where it arrives, the device sends an
//! announcement of its own, and has a driver that can (`VIRTIO_NET_F_GUEST_ANNOUNCE`) send others.

mod announce;
mod packets;
mod tap;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};
use wherry_state::{SavedState, Section, UnitError, UnitId};

pub use self::announce::send as announce;
use self::packets::{Held, LONGEST, Packets};
use self::tap::HEADER;
pub use self::tap::{Tap, TapError};
use crate::device::{Activation, Device, Kind, Serving, read_config};
use crate::ring::RING_FEATURES;
use crate::saved::{SavedNet, SavedTransport};
use crate::worker::Worker;

const KIND: Kind = Kind { id: 1, name: "virtio-net", class: [2, 0, 0] };
/// Entries of the rings of packets.
const RING: u16 = 256;
/// The ring of what the guest receives, and of what it transmits; behind them that of commands.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Features that say what the driver takes.
const GUEST_OFFLOADS: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN;
const FEATURES: u64 = RING_FEATURES
    | GUEST_OFFLOADS
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;

/// Whether a packet has a length that one from a tap can have.
fn is_packet(packet: &[u8]) -> bool {
    (HEADER + 1..=LONGEST).contains(&packet.len())
}

/// What device and thread share.
struct Shared {
    mac: [u8; 6],
    /// Link and announcement, as the driver reads them.
    status: AtomicU16,
    /// The offloads of the driver that are on now.
    offloads: AtomicU64,
    /// The state was restored and is to be taken up.
    arrived: AtomicBool,
    held: Mutex<Held>,
}

/// The device.
pub struct Net {
    worker: Worker,
    shared: Arc<Shared>,
    instance: u32,
}

impl Net {
    /// A device on this tap with this address; `instance` as that of its transport.
    pub fn new(tap: Arc<Tap>, mac: [u8; 6], instance: u32) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            mac,
            status: AtomicU16::new(VIRTIO_NET_S_LINK_UP as u16),
            offloads: AtomicU64::new(0),
            arrived: AtomicBool::new(false),
            held: Mutex::default(),
        });
        let worker = Worker::spawn(format!("virtio-net-{instance}"), Packets::new(tap, shared.clone()))?;
        Ok(Self { worker, shared, instance })
    }

    /// The packet that was read from the tap and waits for buffers of the driver, behind its header; empty if none does. At rest.
    pub fn waiting(&self) -> Vec<u8> {
        self.shared.held.lock().unwrap_or_else(PoisonError::into_inner).packet.clone()
    }

    /// Has the driver receive such a packet before all others. At rest, without rings.
    pub fn set_waiting(&self, packet: Vec<u8>) -> Result<(), UnitError> {
        if !packet.is_empty() && !is_packet(&packet) {
            return Err(UnitError::failed(format!("a waiting packet of {} bytes", packet.len())));
        }
        let held = Held { packet, heads: Vec::new() };
        *self.shared.held.lock().unwrap_or_else(PoisonError::into_inner) = held;
        Ok(())
    }
}

impl Device for Net {
    fn kind(&self) -> Kind {
        KIND
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn ring_sizes(&self) -> &[u16] {
        &[RING, RING, 64]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 10];
        config[..6].copy_from_slice(&self.shared.mac);
        config[6..8].copy_from_slice(&self.shared.status.load(Ordering::Acquire).to_le_bytes());
        // Pairs of rings.
        config[8] = 1;
        read_config(&config, offset, data);
    }

    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    fn activate(&self, activation: Activation) -> Result<(), UnitError> {
        let announces = activation.features & 1 << VIRTIO_NET_F_GUEST_ANNOUNCE != 0;
        let interrupts = activation.interrupts.clone();
        let arrived = self.shared.arrived.load(Ordering::Acquire);
        self.worker.activate(activation);
        if arrived && announces {
            self.shared.status.fetch_or(VIRTIO_NET_S_ANNOUNCE as u16, Ordering::AcqRel);
            interrupts.configuration();
        }
        Ok(())
    }

    fn reset(&self) {
        self.worker.reset();
    }

    fn serving(&self) -> &dyn Serving {
        &self.worker
    }

    fn start(&self) {
        self.worker.start();
    }

    /// Interrupts go through the transport, which looks each time.
    fn vector_changed(&self, _ring: u16) {}

    fn schema(&self) -> u32 {
        SavedNet::SCHEMA
    }

    fn save(&self, transport: SavedTransport) -> Section {
        let held = self.shared.held.lock().unwrap_or_else(PoisonError::into_inner);
        let saved = SavedNet {
            transport: Some(transport),
            mac: self.shared.mac.to_vec(),
            offloads: self.shared.offloads.load(Ordering::Acquire),
            announcing: self.shared.status.load(Ordering::Acquire) & VIRTIO_NET_S_ANNOUNCE as u16 != 0,
            packet: held.packet.clone(),
            buffers: held.heads.iter().map(|head| u32::from(*head)).collect(),
        };
        saved.to_section(&UnitId::new(KIND.name, self.instance))
    }

    fn restore(&self, section: &Section) -> Result<SavedTransport, UnitError> {
        let saved = SavedNet::from_section(section)?;
        if saved.mac != self.shared.mac {
            return Err(UnitError::failed(format!(
                "the guest's address is {:02x?}, and that of the device here {:02x?}",
                &saved.mac[..saved.mac.len().min(8)],
                self.shared.mac
            )));
        }
        if saved.offloads & !GUEST_OFFLOADS != 0 {
            return Err(UnitError::failed(format!("offloads {:#x}, which this device does not have", saved.offloads)));
        }
        let waits = is_packet(&saved.packet);
        let nothing = saved.packet.is_empty() && saved.buffers.is_empty();
        if !waits && !nothing {
            return Err(UnitError::failed(format!("a waiting packet of {} bytes", saved.packet.len())));
        }
        let heads = saved.buffers.iter().map(|head| u16::try_from(*head).ok().filter(|head| *head < RING));
        let heads = heads.collect::<Option<Vec<_>>>().filter(|heads| heads.len() <= usize::from(RING));
        let heads = heads.ok_or_else(|| UnitError::failed("buffers that its ring cannot have"))?;
        *self.shared.held.lock().unwrap_or_else(PoisonError::into_inner) = Held { packet: saved.packet, heads };
        self.shared.offloads.store(saved.offloads, Ordering::Release);
        if saved.announcing {
            self.shared.status.fetch_or(VIRTIO_NET_S_ANNOUNCE as u16, Ordering::AcqRel);
        }
        self.shared.arrived.store(true, Ordering::Release);
        saved.transport.ok_or_else(|| UnitError::failed("there is no state of its transport"))
    }
}
