//! How guest memory is shown to a back end: region by region if it knows that, in a table if it does not, and in a table with
//! its addresses in the answer where memory follows.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use wherry_memory::{Block, Ram};

use super::{Front, protocol};
use crate::vhost::wire::{Posted, Request, VhostError};

/// Regions of a table.
const MOST_REGIONS: usize = 8;

/// A block as it is shown, in the order of the document: guest address, bytes, our address, where it begins in its file.
pub(super) type Region = [u64; 4];

/// What is called our address of guest address 0. Back ends find by our addresses what they were shown, and nothing else, so they
/// need not be those of our own maps: these hold for every process that serves the guest.
const OURS: u64 = 1 << 46;

/// Our address of a guest address.
pub(in super::super) fn ours(guest: u64) -> u64 {
    OURS + guest
}

impl Front {
    /// Shows it all of guest memory, under our addresses: one region after the other if it knows that, else in a table.
    pub(in super::super) fn set_memory(&mut self, ram: &Ram) -> Result<(), VhostError> {
        if self.has(protocol::CONFIGURE_MEM_SLOTS) {
            return self.set_slots(ram);
        }
        self.set(Request::SetMemTable, &self.table(ram)?, &descriptors(ram))?;
        self.settle()
    }

    /// Returns when what was sent has been done, also by a back end that does not say so of each message.
    fn settle(&self) -> Result<(), VhostError> {
        match self.has(protocol::REPLY_ACK) {
            true => Ok(()),
            // An answer to anything comes after what was sent before it.
            false => self.read(Request::GetFeatures).map(drop),
        }
    }

    /// Takes away what is no more, and shows what is new. Blocks at the same place are the same: a device has one RAM.
    fn set_slots(&mut self, ram: &Ram) -> Result<(), VhostError> {
        let blocks = ram.blocks();
        if blocks.len() as u64 > self.room {
            let (wanted, room) = (blocks.len(), self.room);
            return Err(self.connection.lacks(format!("{wanted} RAM blocks; it has room for {room} (GetMaxMemSlots)")));
        }
        let wanted = regions(ram);
        self.take_away(|shown| !wanted.contains(shown))?;
        let new: Vec<Posted<'_>> = wanted
            .iter()
            .zip(blocks)
            .filter(|(region, _)| !self.shown.contains(region))
            .map(|(region, block)| Posted {
                what: Request::AddMemReg,
                payload: slot_payload(region),
                fd: Some(block.fd()),
            })
            .collect();
        self.set_all(&new)?;
        self.settle()?;
        self.shown = wanted;
        Ok(())
    }

    /// Takes away all that was shown one by one. None of it may be in use.
    pub(in super::super) fn hide_memory(&mut self) -> Result<(), VhostError> {
        self.take_away(|_| true)
    }

    fn take_away(&mut self, what: impl Fn(&Region) -> bool) -> Result<(), VhostError> {
        let (gone, left): (Vec<Region>, Vec<Region>) = self.shown.iter().partition(|region| what(region));
        if gone.is_empty() {
            return Ok(());
        }
        let post = |region| Posted { what: Request::RemMemReg, payload: slot_payload(region), fd: None };
        self.set_all(&gone.iter().map(post).collect::<Vec<_>>())?;
        self.settle()?;
        self.shown = left;
        Ok(())
    }

    /// Memory is shown in a table from now on. In postcopy back ends agree on how its addresses are told with that only: front
    /// ends close regions that come one by one with a message of which the document does not know.
    pub(in super::super) fn give_up_slots(&mut self) -> Result<(), VhostError> {
        self.hide_memory()?;
        if self.has(protocol::CONFIGURE_MEM_SLOTS) {
            self.protocol &= !protocol::CONFIGURE_MEM_SLOTS;
            self.connection.tell(Request::SetProtocolFeatures, &self.protocol.to_ne_bytes(), &[])?;
        }
        Ok(())
    }

    fn table(&self, ram: &Ram) -> Result<Vec<u8>, VhostError> {
        let blocks = ram.blocks();
        if blocks.len() > MOST_REGIONS {
            return Err(self.connection.lacks(format!("{} RAM blocks; a table has {MOST_REGIONS}", blocks.len())));
        }
        let mut table = (blocks.len() as u64).to_ne_bytes().to_vec();
        table.extend(regions(ram).into_iter().flatten().flat_map(u64::to_ne_bytes));
        Ok(table)
    }

    /// Shows it guest memory that is not there yet: where it has mapped each block. It touches nothing until
    /// [`acknowledge`](Self::acknowledge).
    pub(in super::super) fn set_missing_memory(&self, ram: &Ram) -> Result<Vec<u64>, VhostError> {
        let what = Request::SetMemTable;
        let table = self.table(ram)?;
        let answer = self.connection.ask(what, &table, &descriptors(ram))?;
        if answer.payload.len() != table.len() || !answer.descriptors.is_empty() {
            let (got, due) = (answer.payload.len(), table.len());
            return Err(self.connection.wrong(what, format!("an answer of {got} bytes, where {due} are due")));
        }
        let said_in = |bytes: &[u8]| {
            let words: Vec<u64> = bytes[8..].as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect();
            words.chunks_exact(4).map(|region| [region[0], region[1], region[2], region[3]]).collect::<Vec<_>>()
        };
        let (asked, said) = (said_in(&table), said_in(&answer.payload));
        if answer.payload[..4] != table[..4] || asked.iter().zip(&said).any(|(a, b)| a[..2] != b[..2]) {
            return Err(self.connection.wrong(what, "it answers with other regions than it was shown"));
        }
        Ok(said.into_iter().map(|region| region[2]).collect())
    }
}

pub(super) fn regions(ram: &Ram) -> Vec<Region> {
    let of = |block: &Arc<Block>| [block.spec().guest_base, block.spec().size, ours(block.spec().guest_base), 0];
    ram.blocks().iter().map(of).collect()
}

/// A region of its own: behind a word without meaning.
fn slot_payload(region: &Region) -> Vec<u8> {
    std::iter::once(&0).chain(region).flat_map(|word| word.to_ne_bytes()).collect()
}

fn descriptors(ram: &Ram) -> Vec<BorrowedFd<'_>> {
    ram.blocks().iter().map(|block| block.fd()).collect()
}
