//! Postcopy: memory that is used while it is not all there.
//!
//! A region is mapped and locked, and the front end is told where it is. When it has answered that it serves our faults (or
//! when it starts a ring, which says the same), the region is registered for missing pages, and unlocked. For missing pages
//! only: a front end such as QEMU wakes us, and does not map pages for us.

use std::os::fd::{AsFd, OwnedFd};

use wherry_fault::{Mode, Userfault};

use crate::memory::{Region, Regions};

/// A postcopy that is announced or under way.
pub(crate) struct Postcopy {
    userfault: Userfault,
    /// The front end has said that memory comes from now on.
    listening: bool,
    /// Guest addresses of regions that may not be touched yet.
    locked: Vec<u64>,
}

impl Postcopy {
    /// The front end is about to ask for it: what it will read our faults from.
    pub(crate) fn begin() -> Result<(Self, OwnedFd), String> {
        let userfault = Userfault::open().map_err(|e| e.to_string())?;
        let fd = userfault.as_fd().try_clone_to_owned().map_err(|e| format!("passing the userfaultfd: {e}"))?;
        Ok((Self { userfault, listening: false, locked: Vec::new() }, fd))
    }

    /// What is shown from now on is not all there. Some front ends have shown it already.
    pub(crate) fn listen(&mut self, there: &Regions) -> Result<(), String> {
        self.listening = true;
        there.iter().try_for_each(|region| self.register(region))
    }

    pub(crate) fn is_listening(&self) -> bool {
        self.listening
    }

    /// This region was mapped, locked.
    pub(crate) fn lock(&mut self, region: &Region) {
        self.locked.push(region.described.guest);
    }

    /// The front end serves our faults: what was locked is used.
    pub(crate) fn unlock(&mut self, regions: &Regions) -> Result<(), String> {
        let locked = std::mem::take(&mut self.locked);
        for region in regions.iter().filter(|region| locked.contains(&region.described.guest)) {
            self.register(region)?;
            region.unlock()?;
        }
        Ok(())
    }

    /// All memory is there. The front end may keep its copy of the userfaultfd, so that closing ours changes nothing.
    pub(crate) fn end(self, regions: &Regions) -> Result<(), String> {
        regions.iter().try_for_each(|region| {
            let ended = self.userfault.unregister(region.base(), region.described.size);
            ended.map_err(|e| e.to_string())
        })
    }

    fn register(&self, region: &Region) -> Result<(), String> {
        let (base, len) = (region.base(), region.described.size);
        self.userfault.register(base, len, Mode::MISSING).map(drop).map_err(|e| e.to_string())
    }
}
