//! What the device's thread does with packets (section 5.1.6) and commands (section 5.1.6.5).
//!
//! A packet is done as soon as it is taken, but for one: the packet that was read from the tap and waits for buffers. It is
//! held with the buffers that were gathered for it, and moves with them.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_ERR, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_OK, VIRTIO_NET_S_ANNOUNCE,
};

use super::tap::{HEADER, Tap};
use super::{GUEST_OFFLOADS, RECEIVE, Shared, TRANSMIT, announce};
use crate::chain::{Broken, Chain};
use crate::ring::Ring;
use crate::worker::Handler;

/// Room for the longest packet: 64 KiB in segments, behind its headers.
pub(super) const LONGEST: usize = 68 << 10;
/// Packets of one kind in one go, so that neither orders nor the other direction wait for long.
const TURN: usize = 256;

/// A packet that waits for buffers of the driver, behind its header; empty if none does.
#[derive(Debug, Default)]
pub(super) struct Held {
    pub(super) packet: Vec<u8>,
    /// Buffers that were taken for it, and do not suffice yet.
    pub(super) heads: Vec<u16>,
}

/// The device's side of its rings.
pub(super) struct Packets {
    tap: Arc<Tap>,
    shared: Arc<Shared>,
    buffer: Box<[u8]>,
    features: u64,
    /// There is a ring for what is received.
    receives: bool,
    /// A packet waits for buffers, so none is read.
    dry: bool,
    /// The tap was removed from this host.
    gone: bool,
    /// Transmitted packets that the tap has refused.
    refused: u64,
}

impl Packets {
    pub(super) fn new(tap: Arc<Tap>, shared: Arc<Shared>) -> Self {
        let buffer = vec![0; LONGEST].into();
        Self { tap, shared, buffer, features: 0, receives: false, dry: false, gone: false, refused: 0 }
    }

    fn merges(&self) -> bool {
        self.features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0
    }

    fn set_offloads(&self, offloads: u64) -> bool {
        if let Err(error) = self.tap.set_offloads(offloads) {
            tracing::error!(%error, "tap {}: setting its offloads to {offloads:#x}", self.tap.name());
            return false;
        }
        self.shared.offloads.store(offloads, Ordering::Release);
        true
    }

    fn receive(&mut self, ring: &mut Ring) -> Result<(), Broken> {
        let shared = self.shared.clone();
        let mut held = shared.held.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..TURN {
            if self.gone {
                break;
            }
            if held.packet.is_empty() {
                match self.tap.read(&mut self.buffer) {
                    // The tap puts a header before everything, and gives no frame without addresses.
                    Ok(Some(len)) if len > HEADER => held.packet.extend_from_slice(&self.buffer[..len]),
                    Ok(Some(_)) => continue,
                    Ok(None) => break,
                    Err(error) => {
                        // It would be readable for ever.
                        tracing::error!(%error, "tap {}: reading; the guest receives no more", self.tap.name());
                        self.gone = true;
                        break;
                    }
                }
            }
            self.dry = !self.deliver(ring, &mut held)?;
            if self.dry {
                break;
            }
        }
        Ok(())
    }

    /// Gives the packet to the driver; false if it has to wait for more buffers.
    fn deliver(&self, ring: &mut Ring, held: &mut Held) -> Result<bool, Broken> {
        let mut chains = held.heads.iter().map(|head| ring.chain(*head)).collect::<Result<Vec<_>, _>>()?;
        let mut room: usize = chains.iter().map(|chain: &Chain| chain.writable.len() as usize).sum();
        while room < held.packet.len() {
            let whole_ring = chains.len() == usize::from(ring.size());
            if whole_ring || !chains.is_empty() && !self.merges() {
                // It fits into nothing that the driver gives: it is lost, and the buffers are for the next one.
                tracing::debug!(len = held.packet.len(), room, "a packet that its driver has no room for");
                chains.iter().for_each(|_| ring.unpop());
                held.heads.clear();
                held.packet.clear();
                return Ok(true);
            }
            let Some(chain) = ring.pop()? else { return Ok(false) };
            if (chain.writable.len() as usize) < HEADER {
                return Err(Broken::Request("a buffer for packets without room for a header"));
            }
            room += chain.writable.len() as usize;
            held.heads.push(chain.head);
            chains.push(chain);
        }
        held.packet[HEADER - 2..HEADER].copy_from_slice(&(chains.len() as u16).to_le_bytes());
        let mut used = Vec::with_capacity(chains.len());
        let mut rest = held.packet.as_slice();
        for chain in &chains {
            let (now, later) = rest.split_at(rest.len().min(chain.writable.len() as usize));
            chain.writable.write(ring.memory(), now);
            used.push((chain.head, now.len() as u32));
            rest = later;
        }
        held.heads.clear();
        held.packet.clear();
        ring.push_all(&used)?;
        Ok(true)
    }

    fn transmit(&mut self, ring: &mut Ring) -> Result<(), Broken> {
        for _ in 0..TURN {
            let Some(chain) = ring.pop()? else { break };
            if (chain.readable.len() as usize) < HEADER {
                return Err(Broken::Request("a packet without a whole header"));
            }
            // The tap checks the header against the packet, and refuses what does not fit.
            if let Err(error) = self.tap.write(&chain.readable.iovecs(ring.memory())) {
                self.refused += 1;
                tracing::debug!(%error, refused = self.refused, "tap {}: a packet of its guest", self.tap.name());
            }
            ring.push(chain.head, 0)?;
        }
        Ok(())
    }

    fn command(&self, ring: &mut Ring, chain: &Chain) -> Result<(), Broken> {
        let Chain { head, mut readable, writable } = chain.clone();
        let mut command = [0; 2];
        if readable.take_front(2).read(ring.memory(), &mut command) < 2 {
            return Err(Broken::Request("a command for a network device that has no whole header"));
        }
        if writable.is_empty() {
            return Err(Broken::Request("a command for a network device without room for its answer"));
        }
        let done = match command.map(u32::from) {
            [VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK] => {
                self.shared.status.fetch_and(!(VIRTIO_NET_S_ANNOUNCE as u16), Ordering::AcqRel);
                true
            }
            [VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET] => {
                let mut offloads = [0; 8];
                let whole = readable.read(ring.memory(), &mut offloads) == 8;
                let offloads = u64::from_le_bytes(offloads);
                // Only what was agreed on.
                whole && offloads & !(self.features & GUEST_OFFLOADS) == 0 && self.set_offloads(offloads)
            }
            _ => false,
        };
        let answer = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        writable.write(ring.memory(), &[answer as u8]);
        ring.push(head, 1)
    }
}

impl Handler for Packets {
    fn begin(&mut self, rings: &mut [Ring], features: u64) -> Result<(), Broken> {
        self.features = features;
        self.receives = rings.iter().any(|ring| ring.index() == RECEIVE);
        self.dry = false;
        let arrived = self.shared.arrived.swap(false, Ordering::AcqRel);
        let offloads = match arrived {
            true => self.shared.offloads.load(Ordering::Acquire) & features,
            false => features & GUEST_OFFLOADS,
        };
        if !self.set_offloads(offloads) && offloads != 0 {
            return Err(Broken::Request("offloads that were agreed on, and that its tap does not do"));
        }
        if arrived {
            announce::send(&self.tap, self.shared.mac);
        }
        Ok(())
    }

    fn serve(&mut self, rings: &mut [Ring]) -> Result<(), Broken> {
        for ring in rings {
            match ring.index() {
                RECEIVE => self.receive(ring)?,
                TRANSMIT => self.transmit(ring)?,
                _ => {
                    while let Some(chain) = ring.pop()? {
                        self.command(ring, &chain)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn waits(&self, ring: u16) -> bool {
        ring != RECEIVE || self.dry
    }

    fn reap(&mut self, _rings: &mut [Ring]) -> Result<(), Broken> {
        Ok(())
    }

    fn has_room(&self) -> bool {
        true
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn event(&self) -> Option<RawFd> {
        (self.receives && !self.dry && !self.gone).then(|| self.tap.as_raw_fd())
    }

    fn cancel(&mut self) {}

    fn settle(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn forget(&mut self) {
        *self.shared.held.lock().unwrap_or_else(PoisonError::into_inner) = Held::default();
        (self.features, self.receives, self.dry) = (0, false, false);
        self.shared.status.fetch_and(!(VIRTIO_NET_S_ANNOUNCE as u16), Ordering::AcqRel);
        self.set_offloads(0);
    }
}
