//! A ring that is being served in this process.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;
use wherry_memory::GuestMemory;

use crate::chain::{Broken, Chain};
use crate::device::{Activation, InFlight, Interrupts, Position, RingGiven};

/// Features of rings that every device here offers.
pub const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A ring, its memory, and how the driver is told of what was used.
pub struct Ring {
    index: u16,
    queue: Queue,
    memory: GuestMemory,
    interrupts: Interrupts,
    kick: Arc<EventFd>,
    indirect: bool,
    /// Heads that come first, and how many of them have come.
    again: Vec<u16>,
    next_again: usize,
    /// How many requests were taken of the ring itself, and not taken back.
    popped: u64,
    in_flight: Option<Arc<dyn InFlight>>,
    /// Something was used since the driver was last told.
    used: bool,
    /// The driver is told whatever it asked for.
    tells: bool,
}

impl Ring {
    /// The rings of an activation, and what else it holds.
    pub fn all(activation: Activation) -> Result<Vec<Self>, Broken> {
        let Activation { memory, features, rings, interrupts } = activation;
        rings.into_iter().map(|given| Self::new(given, &memory, features, &interrupts)).collect()
    }

    fn new(given: RingGiven, memory: &GuestMemory, features: u64, interrupts: &Interrupts) -> Result<Self, Broken> {
        let RingGiven { index, mut setup, kick, resumes, in_flight } = given;
        let mut again = Vec::new();
        if resumes {
            let at = setup.used.checked_add(2).ok_or(Broken::RingOutside)?;
            let used = memory.load::<u16>(GuestAddress(at), Ordering::Acquire).map_err(|_| Broken::RingOutside)?;
            setup.position.used = u16::from_le(used);
            if let Some(in_flight) = &in_flight {
                again = in_flight.left(setup.position.used);
                // What is left was taken of the ring, right behind what was given back.
                setup.position.available = setup.position.used.wrapping_add(again.len() as u16);
            }
        }
        let state = QueueState {
            max_size: setup.size,
            next_avail: setup.position.available,
            next_used: setup.position.used,
            event_idx_enabled: features & 1 << VIRTIO_RING_F_EVENT_IDX != 0,
            size: setup.size,
            ready: true,
            desc_table: setup.descriptors,
            avail_ring: setup.available,
            used_ring: setup.used,
        };
        let queue = Queue::try_from(state).map_err(|_| Broken::RingOutside)?;
        if !queue.is_valid(memory) {
            return Err(Broken::RingOutside);
        }
        let indirect = features & 1 << VIRTIO_RING_F_INDIRECT_DESC != 0;
        Ok(Self {
            index,
            queue,
            memory: memory.clone(),
            interrupts: interrupts.clone(),
            kick,
            indirect,
            again,
            next_again: 0,
            popped: 0,
            in_flight,
            used: false,
            tells: false,
        })
    }

    /// Its number.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Its entries.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Readable when the driver has made something available.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// The next request, if there is one.
    pub fn pop(&mut self) -> Result<Option<Chain>, Broken> {
        let head = match self.again.get(self.next_again) {
            Some(head) => {
                self.next_again += 1;
                Some(*head)
            }
            None => {
                let mut available = self.queue.iter(&self.memory).map_err(|_| Broken::AvailableIndex)?;
                let head = available.next().map(|chain| chain.head_index());
                self.popped += u64::from(head.is_some());
                head
            }
        };
        let Some(head) = head else { return Ok(None) };
        let chain = self.chain(head)?;
        if let Some(in_flight) = &self.in_flight {
            in_flight.taken(head);
        }
        Ok(Some(chain))
    }

    /// The request that begins at a head: one that was taken before.
    pub fn chain(&self, head: u16) -> Result<Chain, Broken> {
        Chain::read(&self.memory, self.queue.desc_table(), self.queue.size(), head, self.indirect)
    }

    /// Takes the last request back: it will be popped again.
    pub fn unpop(&mut self) {
        // Those that came first were popped before all others.
        if self.popped > 0 {
            self.popped -= 1;
            self.queue.go_to_previous_position();
        } else {
            self.next_again = self.next_again.saturating_sub(1);
        }
    }

    /// Gives a request back to the driver, with the number of bytes that were written for it.
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), Broken> {
        self.giving(head);
        self.publish(head, written)?;
        self.given(&[head]);
        Ok(())
    }

    fn publish(&mut self, head: u16, written: u32) -> Result<(), Broken> {
        self.queue.add_used(&self.memory, head, written).map_err(|_| Broken::RingOutside)?;
        self.used = true;
        Ok(())
    }

    fn giving(&self, head: u16) {
        if let Some(in_flight) = &self.in_flight {
            in_flight.giving(head);
        }
    }

    fn given(&self, heads: &[u16]) {
        if let Some(in_flight) = &self.in_flight {
            in_flight.given(heads, self.queue.next_used());
        }
    }

    /// Gives several back so that the driver sees all of them or none: buffers of one packet.
    pub fn push_all(&mut self, used: &[(u16, u32)]) -> Result<(), Broken> {
        let Some((&(head, written), others)) = used.split_last() else { return Ok(()) };
        used.iter().for_each(|(head, _)| self.giving(*head));
        for (head, written) in others {
            let next = self.queue.next_used();
            let at = 4 + 8 * u64::from(next % self.queue.size());
            let at = self.queue.used_ring().checked_add(at).ok_or(Broken::RingOutside)?;
            let entry = u64::from(*head) | u64::from(*written) << 32;
            self.memory.write_obj(entry.to_le(), GuestAddress(at)).map_err(|_| Broken::RingOutside)?;
            self.queue.set_next_used(next.wrapping_add(1));
            // The queue does not count these, so its answer whether the driver wants to know would not be for them.
            self.tells = true;
        }
        // Publishes the index, and all entries with it.
        self.publish(head, written)?;
        self.given(&used.iter().map(|(head, _)| *head).collect::<Vec<_>>());
        Ok(())
    }

    /// Tells the driver of what was given back, if it wants to know.
    pub fn notify(&mut self) -> Result<(), Broken> {
        if std::mem::take(&mut self.used)
            && (self.queue.needs_notification(&self.memory).map_err(|_| Broken::RingOutside)?
                | std::mem::take(&mut self.tells))
        {
            self.interrupts.ring(self.index);
        }
        Ok(())
    }

    /// Asks to be rung. True if there is something available already.
    pub fn listen(&mut self) -> Result<bool, Broken> {
        let more = self.queue.enable_notification(&self.memory).map_err(|_| Broken::RingOutside)?;
        Ok(more || self.next_again < self.again.len())
    }

    /// Asks not to be rung: it is being looked at.
    pub fn hush(&mut self) -> Result<(), Broken> {
        // What is counted has been seen.
        let _ = self.kick.read();
        self.queue.disable_notification(&self.memory).map_err(|_| Broken::RingOutside)
    }

    /// How far it has been served.
    pub fn position(&self) -> Position {
        Position { available: self.queue.next_avail(), used: self.queue.next_used() }
    }
}
