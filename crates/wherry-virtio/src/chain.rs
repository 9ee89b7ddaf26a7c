//! Descriptor chains: what a driver has made available, read with suspicion.
//!
//! Every rule of virtio 1.3, section 2.7, that a driver can break is checked here, so that a device works only with chains
//! that end, stay inside guest memory, and have all that the device reads before all that it writes.

use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use wherry_memory::GuestMemory;

/// A driver has broken a rule; its device needs a reset.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// The rings do not lie in guest memory.
    #[error("a ring does not lie in guest memory")]
    RingOutside,
    /// More was made available than the ring has entries.
    #[error("the available ring claims more entries than it has")]
    AvailableIndex,
    /// A descriptor that the table does not have.
    #[error("descriptor {index} of a table with {size}")]
    Index {
        /// The descriptor.
        index: u16,
        /// Entries of the table.
        size: u32,
    },
    /// A table that does not lie in guest memory.
    #[error("descriptor table at {0:#x} does not lie in guest memory")]
    TableOutside(u64),
    /// A chain that is longer than its table.
    #[error("a chain of descriptors has no end")]
    Endless,
    /// Indirect where it may not be, or of an impossible size.
    #[error("an indirect descriptor that may not be there, or of {0} bytes")]
    Indirect(u32),
    /// A buffer that does not lie in guest memory.
    #[error("buffer of {len:#x} bytes at {address:#x} does not lie in guest memory")]
    BufferOutside {
        /// Where it begins.
        address: u64,
        /// Its length.
        len: u32,
    },
    /// A readable buffer behind a writable one.
    #[error("a buffer to read behind one to write")]
    Order,
    /// More bytes than a chain may have.
    #[error("a chain of more than 4 GiB")]
    TooLong,
    /// What the buffers hold is no request of this device.
    #[error("{0}")]
    Request(&'static str),
}

/// Buffers in guest memory, one behind the other. All of them lie in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buffers {
    parts: Vec<(GuestAddress, u32)>,
}

impl Buffers {
    /// Their length in bytes.
    pub fn len(&self) -> u32 {
        self.parts.iter().map(|(_, len)| len).sum()
    }

    /// Whether there is not a byte in them.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where they lie: guest addresses and lengths.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.parts.iter().map(|(address, len)| (address.0, u64::from(*len)))
    }

    /// Cuts the first bytes off and gives them; all if there are fewer.
    pub fn take_front(&mut self, mut bytes: u32) -> Buffers {
        let mut front = Vec::new();
        while bytes > 0 && !self.parts.is_empty() {
            let (address, len) = self.parts[0];
            let take = len.min(bytes);
            front.push((address, take));
            bytes -= take;
            if take == len {
                self.parts.remove(0);
            } else {
                self.parts[0] = (GuestAddress(address.0 + u64::from(take)), len - take);
            }
        }
        Buffers { parts: front }
    }

    /// Reads as many bytes as there are, up to the length of `into`; how many.
    pub fn read(&self, memory: &GuestMemory, into: &mut [u8]) -> usize {
        let mut done = 0;
        for (address, len) in &self.parts {
            let take = (*len as usize).min(into.len() - done);
            // They lie in guest memory, which does not shrink.
            if memory.read_slice(&mut into[done..done + take], *address).is_err() {
                break;
            }
            done += take;
        }
        done
    }

    /// Writes as many bytes as there is room for; how many.
    pub fn write(&self, memory: &GuestMemory, from: &[u8]) -> usize {
        let mut done = 0;
        for (address, len) in &self.parts {
            let take = (*len as usize).min(from.len() - done);
            if memory.write_slice(&from[done..done + take], *address).is_err() {
                break;
            }
            done += take;
        }
        done
    }

    /// For system calls: where the bytes lie in this process. Good as long as guest memory is.
    pub fn iovecs(&self, memory: &GuestMemory) -> Vec<libc::iovec> {
        let slices = self.parts.iter().flat_map(|(address, len)| memory.get_slices(*address, *len as usize));
        let iovec = |slice: vm_memory::VolatileSlice<'_, _>| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        };
        slices.filter_map(Result::ok).map(iovec).collect()
    }

    /// Tells the VMM's dirty source that the first bytes were written other than through this type. To be called
    /// afterwards: what is marked before it is written may be sent without it.
    pub fn written(&self, memory: &GuestMemory, mut bytes: u32) {
        for (address, len) in &self.parts {
            let take = (*len).min(bytes);
            for slice in memory.get_slices(*address, take as usize).flatten() {
                slice.bitmap().mark_dirty(0, slice.len());
            }
            bytes -= take;
        }
    }
}

/// One request: what the device reads, and what it writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Names it in the used ring.
    pub head: u16,
    /// What the driver has written for the device.
    pub readable: Buffers,
    /// Where the device answers.
    pub writable: Buffers,
}

impl Chain {
    /// Follows the chain that begins at `head` of a table with `size` entries. `indirect`: that feature was agreed on.
    pub fn read(memory: &GuestMemory, table: u64, size: u16, head: u16, indirect: bool) -> Result<Self, Broken> {
        const NEXT: u16 = VRING_DESC_F_NEXT as u16;
        const WRITE: u16 = VRING_DESC_F_WRITE as u16;
        const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
        let mut chain = Self { head, readable: Buffers::default(), writable: Buffers::default() };
        let (mut table, mut size, mut index) = (table, u32::from(size), head);
        let mut left = size;
        let mut inside = false;
        let mut total = 0u32;
        loop {
            if u32::from(index) >= size {
                return Err(Broken::Index { index, size });
            }
            left = left.checked_sub(1).ok_or(Broken::Endless)?;
            let at = table.checked_add(16 * u64::from(index)).ok_or(Broken::TableOutside(table))?;
            let descriptor: Descriptor = memory.read_obj(GuestAddress(at)).map_err(|_| Broken::TableOutside(table))?;
            let (flags, len) = (descriptor.flags(), descriptor.len());
            if flags & INDIRECT != 0 {
                if !indirect || inside || flags & NEXT != 0 || len == 0 || len % 16 != 0 || len / 16 > 1 << 15 {
                    return Err(Broken::Indirect(len));
                }
                (table, size, index, left, inside) = (descriptor.addr().0, len / 16, 0, len / 16, true);
                continue;
            }
            total = total.checked_add(len).ok_or(Broken::TooLong)?;
            let address = descriptor.addr();
            if len > 0 {
                if !memory.check_range(address, len as usize) {
                    return Err(Broken::BufferOutside { address: address.0, len });
                }
                if flags & WRITE != 0 {
                    chain.writable.parts.push((address, len));
                } else if chain.writable.parts.is_empty() {
                    chain.readable.parts.push((address, len));
                } else {
                    return Err(Broken::Order);
                }
            }
            if flags & NEXT == 0 {
                return Ok(chain);
            }
            index = descriptor.next();
        }
    }
}
