//! What the functions of one machine read and write: guest memory, by the guest's addresses.
//!
//! All functions share it, so a range is mapped for the first that asks, and unmapped for the last. It is mapped by the engine's map of
//! a block, which no userfaultfd holds up; what is behind that is the memory of the guest. What is mapped is pinned, and so allocated.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wherry_memory::Block;

use super::iommufd::Iommufd;
use super::type1::Type1;

/// Part of a block.
pub(super) struct Range {
    pub(super) size: u64,
    pub(super) block: Arc<Block>,
    pub(super) offset: u64,
    /// Functions that have asked for it.
    users: u32,
}

impl Range {
    /// Where this process has it.
    pub(super) fn place(&self) -> io::Result<*mut u8> {
        self.block.engine_range(self.offset, self.size).map_err(io::Error::other)
    }
}

/// How the IOMMU is told.
pub(super) enum Way {
    Type1(Type1),
    Iommufd(Iommufd),
}

#[derive(Default)]
struct Mapped {
    ranges: BTreeMap<u64, Range>,
    /// It has been left to another process.
    left: bool,
}

/// The space.
pub(super) struct Space {
    pub(super) way: Way,
    /// Held while the kernel is asked.
    mapped: Mutex<Mapped>,
}

impl Space {
    pub(super) fn new(way: Way) -> Self {
        Self { way, mapped: Mutex::default() }
    }

    /// One that the process before this one has.
    pub(super) fn inherited(way: Way) -> Self {
        Self { way, mapped: Mutex::new(Mapped { left: true, ..Mapped::default() }) }
    }

    fn lock(&self) -> MutexGuard<'_, Mapped> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows all functions a part of a block, for one of them.
    pub(super) fn map(&self, address: u64, size: u64, block: &Arc<Block>, offset: u64) -> io::Result<()> {
        self.enter(address, size, block, offset, |range| match &self.way {
            Way::Type1(type1) => type1.map(address, range),
            Way::Iommufd(iommufd) => iommufd.map(address, range),
        })
    }

    /// The same, and the process before this one has done it.
    pub(super) fn inherit(&self, address: u64, size: u64, block: &Arc<Block>, offset: u64) -> io::Result<()> {
        self.enter(address, size, block, offset, |_| Ok(()))
    }

    fn enter(
        &self,
        address: u64,
        size: u64,
        block: &Arc<Block>,
        offset: u64,
        map: impl FnOnce(&Range) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut mapped = self.lock();
        if let Some(range) = mapped.ranges.get_mut(&address) {
            if (range.size, range.block.spec().id, range.offset) != (size, block.spec().id, offset) {
                return Err(io::Error::other("something else is mapped there"));
            }
            range.users += 1;
            return Ok(());
        }
        let range = Range { size, block: block.clone(), offset, users: 1 };
        map(&range)?;
        mapped.ranges.insert(address, range);
        Ok(())
    }

    /// One of them is done with it.
    pub(super) fn unmap(&self, address: u64, size: u64) -> io::Result<()> {
        let mut mapped = self.lock();
        let range = mapped.ranges.get_mut(&address).filter(|range| range.size == size);
        let range = range.ok_or_else(|| io::Error::other("nothing is mapped there"))?;
        if range.users > 1 {
            range.users -= 1;
            return Ok(());
        }
        match &self.way {
            Way::Type1(type1) => type1.unmap(address, size)?,
            Way::Iommufd(iommufd) => iommufd.unmap(address, size)?,
        }
        mapped.ranges.remove(&address);
        Ok(())
    }

    /// Why another process cannot go on with it, if so.
    pub(super) fn cannot_keep(&self) -> Option<&'static str> {
        match &self.way {
            Way::Type1(type1) => type1.cannot_keep(),
            Way::Iommufd(iommufd) => iommufd.cannot_keep(),
        }
    }

    /// Leaves it to another process: for the first function that does. DMA goes on.
    pub(super) fn leave(&self) -> io::Result<()> {
        let mut mapped = self.lock();
        if mapped.left {
            return Ok(());
        }
        // Also if only some of it was left: then all of it is taken back.
        mapped.left = true;
        let Way::Type1(type1) = &self.way else { return Ok(()) };
        mapped.ranges.iter().try_for_each(|(address, range)| type1.leave(*address, range.size))
    }

    /// Goes on with it, for the first function that does, whoever had it meanwhile.
    pub(super) fn take_over(&self) -> io::Result<()> {
        let mut mapped = self.lock();
        if !mapped.left {
            return Ok(());
        }
        match &self.way {
            Way::Type1(type1) => {
                mapped.ranges.iter().try_for_each(|(address, range)| type1.take_over(*address, range))?;
            }
            Way::Iommufd(iommufd) => iommufd.take_over()?,
        }
        mapped.left = false;
        Ok(())
    }
}
