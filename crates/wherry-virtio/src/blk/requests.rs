//! What the device's thread does with requests (section 5.2.6).

use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::engine::{Engine, JOBS, Job, Op};
use super::{Image, RANGE_SECTORS, SECTOR};
use crate::chain::{Broken, Buffers, Chain};
use crate::ring::Ring;
use crate::worker::Handler;

/// A request that is under way; its place is the tag of its job.
struct Slot {
    head: u16,
    /// When it was taken, compared with others.
    number: u64,
    op: Op,
    offset: u64,
    len: u64,
    /// What is left to move.
    data: Buffers,
    /// Where the answer goes: one byte.
    status: Buffers,
    /// Bytes that the driver will be told were written, beside the status.
    told: u32,
    /// What comes after it: a flush, for a driver that does not flush.
    then_flush: bool,
}

/// The device's side of its ring.
pub(super) struct Requests {
    engine: Box<dyn Engine>,
    image: Arc<Image>,
    id: String,
    carried: Arc<Mutex<Vec<u16>>>,
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    next_number: u64,
    /// Taken back, with their numbers.
    taken_back: Vec<(u64, u16)>,
    /// The driver flushes by itself.
    flushes: bool,
}

/// What is answered at once.
enum Answer {
    Later(Op),
    Now(u32),
}

impl Requests {
    pub(super) fn new(engine: Box<dyn Engine>, image: Arc<Image>, id: String, carried: Arc<Mutex<Vec<u16>>>) -> Self {
        Self {
            engine,
            image,
            id,
            carried,
            slots: (0..JOBS).map(|_| None).collect(),
            free: (0..JOBS).rev().collect(),
            next_number: 0,
            taken_back: Vec::new(),
            flushes: false,
        }
    }

    fn carried(&self) -> MutexGuard<'_, Vec<u16>> {
        self.carried.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&mut self, ring: &mut Ring, chain: Chain) -> Result<(), Broken> {
        let Chain { head, mut readable, mut writable } = chain;
        let mut header = [0; 16];
        if readable.take_front(16).read(ring.memory(), &mut header) < 16 {
            return Err(Broken::Request("a disk request without a whole header"));
        }
        let Some(room) = writable.len().checked_sub(1) else {
            return Err(Broken::Request("a disk request without room for its status"));
        };
        let answer = writable.take_front(room);
        let status = writable;
        let [kind, _, low, high] =
            [0, 4, 8, 12].map(|at| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]));
        let sector = u64::from(low) | u64::from(high) << 32;
        let mut slot = Slot {
            head,
            number: self.next_number,
            op: Op::Flush,
            offset: 0,
            len: 0,
            data: Buffers::default(),
            status,
            told: 0,
            then_flush: false,
        };
        self.next_number += 1;
        let answer = match kind {
            VIRTIO_BLK_T_IN => {
                (slot.data, slot.told) = (answer.clone(), answer.len());
                self.transfer(&mut slot, Op::Read, sector)
            }
            VIRTIO_BLK_T_OUT => {
                slot.data = readable;
                self.transfer(&mut slot, Op::Write { stable: !self.flushes }, sector)
            }
            VIRTIO_BLK_T_FLUSH => Answer::Later(Op::Flush),
            VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
                let len = self.id.len().min(id.len());
                id[..len].copy_from_slice(&self.id.as_bytes()[..len]);
                slot.told = answer.write(ring.memory(), &id) as u32;
                Answer::Now(VIRTIO_BLK_S_OK)
            }
            VIRTIO_BLK_T_DISCARD => self.range(ring, &mut slot, &readable, Op::Discard),
            VIRTIO_BLK_T_WRITE_ZEROES => self.range(ring, &mut slot, &readable, Op::Zero { free: false }),
            _ => Answer::Now(VIRTIO_BLK_S_UNSUPP),
        };
        match answer {
            Answer::Later(op) => {
                slot.op = op;
                self.begin(ring, slot)
            }
            Answer::Now(status) => finish(ring, &slot, status),
        }
    }

    /// A read or write, if it lies in the image.
    fn transfer(&self, slot: &mut Slot, op: Op, sector: u64) -> Answer {
        let len = u64::from(slot.data.len());
        let inside = sector.checked_add(len / SECTOR).is_some_and(|end| end <= self.image.sectors());
        let forbidden = op != Op::Read && self.image.is_read_only();
        if !len.is_multiple_of(SECTOR) || !inside || forbidden {
            slot.told = 0;
            return Answer::Now(VIRTIO_BLK_S_IOERR);
        }
        if len == 0 {
            return Answer::Now(VIRTIO_BLK_S_OK);
        }
        (slot.offset, slot.len) = (sector * SECTOR, len);
        Answer::Later(op)
    }

    /// A discard or write of zeroes: one range of 16 bytes.
    fn range(&self, ring: &Ring, slot: &mut Slot, payload: &Buffers, op: Op) -> Answer {
        let mut range = [0; 16];
        if self.image.is_read_only() || payload.len() != 16 || payload.read(ring.memory(), &mut range) < 16 {
            return Answer::Now(VIRTIO_BLK_S_IOERR);
        }
        let [low, high, count, flags] =
            [0, 4, 8, 12].map(|at| u32::from_le_bytes([range[at], range[at + 1], range[at + 2], range[at + 3]]));
        let sector = u64::from(low) | u64::from(high) << 32;
        let op = match (op, flags) {
            (op, 0) => op,
            (Op::Zero { .. }, 1) => Op::Zero { free: true },
            // Flags that are not defined, or not for this.
            _ => return Answer::Now(VIRTIO_BLK_S_UNSUPP),
        };
        let inside = sector.checked_add(count.into()).is_some_and(|end| end <= self.image.sectors());
        if !inside || count > RANGE_SECTORS {
            return Answer::Now(VIRTIO_BLK_S_IOERR);
        }
        if count == 0 {
            return Answer::Now(VIRTIO_BLK_S_OK);
        }
        (slot.offset, slot.len) = (sector * SECTOR, u64::from(count) * SECTOR);
        slot.then_flush = !self.flushes && op != Op::Discard;
        Answer::Later(op)
    }

    fn begin(&mut self, ring: &Ring, slot: Slot) -> Result<(), Broken> {
        // There is room for every entry of the ring; a driver that makes one available twice may use up more.
        let tag = self.free.pop().ok_or(Broken::Request("more disk requests at once than the ring has entries"))?;
        self.slots[tag] = Some(slot);
        self.submit(ring, tag);
        Ok(())
    }

    fn submit(&mut self, ring: &Ring, tag: usize) {
        if let Some(slot) = &self.slots[tag] {
            let buffers = slot.data.iovecs(ring.memory());
            self.engine.begin(Job { tag, op: slot.op, offset: slot.offset, len: slot.len, buffers });
        }
    }

    /// Takes what the engine says of a job.
    fn judge(&mut self, ring: &mut Ring, tag: usize, result: io::Result<u32>) -> Result<(), Broken> {
        let Some(mut slot) = self.slots[tag].take() else { return Ok(()) };
        let status = match (slot.op, result) {
            (Op::Read | Op::Write { .. }, Ok(0)) => VIRTIO_BLK_S_IOERR,
            (Op::Read | Op::Write { .. }, Ok(moved)) => {
                let front = slot.data.take_front(moved);
                if slot.op == Op::Read {
                    front.written(ring.memory(), moved);
                }
                slot.offset += u64::from(moved);
                if !slot.data.is_empty() {
                    self.slots[tag] = Some(slot);
                    self.submit(ring, tag);
                    return Ok(());
                }
                VIRTIO_BLK_S_OK
            }
            (_, Ok(_)) if slot.then_flush => {
                (slot.op, slot.then_flush) = (Op::Flush, false);
                self.slots[tag] = Some(slot);
                self.submit(ring, tag);
                return Ok(());
            }
            (_, Ok(_)) => VIRTIO_BLK_S_OK,
            (_, Err(error)) => match error.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN) => {
                    self.slots[tag] = Some(slot);
                    self.submit(ring, tag);
                    return Ok(());
                }
                Some(libc::ECANCELED) => {
                    self.taken_back.push((slot.number, slot.head));
                    self.free.push(tag);
                    return Ok(());
                }
                _ => {
                    let image = self.image.path().display();
                    tracing::warn!(%error, op = ?slot.op, offset = slot.offset, "disk image {image}");
                    VIRTIO_BLK_S_IOERR
                }
            },
        };
        self.free.push(tag);
        finish(ring, &slot, status)
    }
}

/// Gives a request back with its status.
fn finish(ring: &mut Ring, slot: &Slot, status: u32) -> Result<(), Broken> {
    slot.status.write(ring.memory(), &[status as u8]);
    let told = if status == VIRTIO_BLK_S_OK { slot.told } else { 0 };
    ring.push(slot.head, told + 1)
}

impl Handler for Requests {
    fn begin(&mut self, _rings: &mut [Ring], features: u64) -> Result<(), Broken> {
        self.flushes = features & 1 << VIRTIO_BLK_F_FLUSH != 0;
        Ok(())
    }

    fn serve(&mut self, rings: &mut [Ring]) -> Result<(), Broken> {
        let Some(ring) = rings.first_mut() else { return Ok(()) };
        // First what was taken before: here before a stop that was undone, or where the VM came from.
        let carried = std::mem::take(&mut *self.carried());
        for head in carried {
            let chain = ring.chain(head)?;
            self.take(ring, chain)?;
        }
        while self.has_room()
            && let Some(chain) = ring.pop()?
        {
            self.take(ring, chain)?;
        }
        self.engine.push();
        Ok(())
    }

    fn reap(&mut self, rings: &mut [Ring]) -> Result<(), Broken> {
        let done = self.engine.done();
        if done.is_empty() {
            return Ok(());
        }
        // After a broken activation there is no ring, and nothing under way.
        let Some(ring) = rings.first_mut() else { return Ok(()) };
        let mut result = Ok(());
        for (tag, outcome) in done {
            result = result.and(self.judge(ring, tag, outcome));
        }
        self.engine.push();
        if !self.taken_back.is_empty() && self.in_flight() == 0 {
            self.taken_back.sort_unstable();
            let heads = self.taken_back.drain(..).map(|(_, head)| head).collect();
            *self.carried() = heads;
        }
        result
    }

    fn waits(&self, _ring: u16) -> bool {
        true
    }

    fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    fn in_flight(&self) -> usize {
        JOBS - self.free.len()
    }

    fn event(&self) -> Option<RawFd> {
        Some(self.engine.event())
    }

    fn cancel(&mut self) {
        self.engine.cancel();
    }

    fn settle(&mut self) -> io::Result<()> {
        self.image.sync()
    }

    fn forget(&mut self) {
        self.carried().clear();
        self.taken_back.clear();
    }
}
