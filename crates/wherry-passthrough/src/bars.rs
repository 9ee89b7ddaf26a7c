//! BARs: parts that are mapped into the guest, parts that only ring, and the rest, which is answered by messages.

#![expect(unsafe_code, reason = "maps memory of devices")]

use std::io;
use std::ops::Range;
use std::ptr::{NonNull, null_mut};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use wherry_pci::bus::{Bus, BusDevice, BusError};
use wherry_pci::{BarTarget, Doorbell, Doorbells};

use crate::function::Function;
use crate::owner::{Bell, RegionFacts};

const PAGE: u64 = 4096;

/// What a hypervisor does for memory of a device that the guest is to reach directly.
pub trait GuestMaps: Send + Sync {
    /// Shows memory to the guest at an address. It stays mapped as long as it is shown. The number by which it is taken away.
    fn map(&self, address: u64, memory: &Arc<DeviceMemory>) -> io::Result<u32>;

    /// Takes it away: when this returns no vCPU reaches it.
    fn unmap(&self, map: u32);
}

/// Memory of a device that this process has mapped, to show it to a guest. Nothing here reads or writes it.
#[derive(Debug)]
pub struct DeviceMemory {
    start: NonNull<u8>,
    size: usize,
}

// SAFETY: it is an address and a size; the mapping belongs to the process.
unsafe impl Send for DeviceMemory {}
// SAFETY: likewise.
unsafe impl Sync for DeviceMemory {}

impl DeviceMemory {
    /// Maps a part of a file, which is whole pages.
    fn map(file: impl std::os::fd::AsFd, offset: u64, size: u64) -> io::Result<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a mapping at an address that the kernel chooses.
        let start = unsafe { mmap(null_mut(), size as usize, access, MapFlags::SHARED, file, offset) }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, size: size as usize })
    }

    /// Where it is in this process.
    pub fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Bytes.
    pub fn size(&self) -> usize {
        self.size
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and whoever uses it holds `self`.
        if let Err(error) = unsafe { munmap(self.start.as_ptr().cast(), self.size) } {
            tracing::error!(%error, "unmapping memory of a device");
        }
    }
}

/// One BAR.
pub(crate) struct Bar {
    /// Not the bus itself: it owns the bridge to configuration space, which owns the function, which owns this.
    pub(crate) bus: Weak<Bus>,
    pub(crate) window: Arc<Window>,
    pub(crate) areas: Vec<(u64, Arc<DeviceMemory>)>,
    pub(crate) bells: Vec<Bell>,
    pub(crate) maps: Arc<dyn GuestMaps>,
    pub(crate) doorbells: Arc<dyn Doorbells>,
    /// What is shown to the guest now.
    pub(crate) shown: Mutex<Vec<u32>>,
}

/// Maps what a region shows, but for pages that are ours (the table of MSI-X and its pending bits).
pub(crate) fn areas(name: &str, region: &RegionFacts, ours: &[Range<u64>]) -> Vec<(u64, Arc<DeviceMemory>)> {
    let Some(file) = &region.file else { return Vec::new() };
    let mut mapped = Vec::new();
    for area in &region.areas {
        let whole = area.offset.next_multiple_of(PAGE)..(area.offset + area.size) / PAGE * PAGE;
        for part in without(whole, ours) {
            match DeviceMemory::map(file.arc(), file.start() + part.start, part.end - part.start) {
                Ok(memory) => mapped.push((part.start, Arc::new(memory))),
                Err(error) => tracing::warn!(device = name, ?part, %error, "not mapped, answered by messages"),
            }
        }
    }
    mapped
}

/// What is left of a range of whole pages without those of others.
fn without(whole: Range<u64>, others: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left = vec![whole];
    for other in others.iter().filter(|other| !other.is_empty()) {
        let (start, end) = (other.start / PAGE * PAGE, other.end.next_multiple_of(PAGE));
        let cut = |part: Range<u64>| [part.start..part.end.min(start), part.start.max(end)..part.end];
        left = left.into_iter().flat_map(cut).collect();
    }
    left.retain(|part| part.start < part.end);
    left
}

impl Bar {
    fn ring(&self, address: u64) -> impl Iterator<Item = (Doorbell, &Bell)> {
        self.bells.iter().map(move |bell| {
            let Bell { offset, len, data, .. } = *bell;
            (Doorbell { address: address + offset, len, data }, bell)
        })
    }
}

impl BarTarget for Bar {
    fn map(&self, address: u64, size: u64) -> Result<(), BusError> {
        if let Some(bus) = self.bus.upgrade() {
            bus.insert(address, size, self.window.clone())?;
        }
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        for (offset, memory) in &self.areas {
            match self.maps.map(address + offset, memory) {
                Ok(map) => shown.push(map),
                // Messages answer for it, more slowly.
                Err(error) => tracing::warn!(%error, address = address + offset, "a BAR that is not mapped"),
            }
        }
        for (doorbell, bell) in self.ring(address) {
            if let Err(error) = self.doorbells.attach(doorbell, &bell.event) {
                tracing::debug!(%error, ?doorbell, "no doorbell");
            }
        }
        Ok(())
    }

    fn unmap(&self, address: u64) {
        for (doorbell, bell) in self.ring(address) {
            if let Err(error) = self.doorbells.detach(doorbell, &bell.event) {
                tracing::debug!(%error, ?doorbell, "there was no doorbell");
            }
        }
        let shown = std::mem::take(&mut *self.shown.lock().unwrap_or_else(PoisonError::into_inner));
        shown.into_iter().for_each(|map| self.maps.unmap(map));
        if let Some(bus) = self.bus.upgrade() {
            // It was inserted by `map`; if it is gone, it answers nowhere already.
            let _ = bus.remove(address);
        }
    }
}

/// A BAR on the bus. Not the function itself: it owns the BAR, which owns this.
pub(crate) struct Window {
    pub(crate) function: Weak<Function>,
    pub(crate) bar: usize,
}

impl BusDevice for Window {
    fn read(&self, _base: u64, offset: u64, data: &mut [u8]) {
        match self.function.upgrade() {
            Some(function) => function.read_bar(self.bar, offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, _base: u64, offset: u64, data: &[u8]) {
        if let Some(function) = self.function.upgrade() {
            function.write_bar(self.bar, offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_the_msix_table_are_left_out() {
        let ranges = [0x1800..0x1810, 0x3000..0x3008];
        assert_eq!(without(0..0x5000, &ranges), [0..0x1000, 0x2000..0x3000, 0x4000..0x5000]);
        assert_eq!(without(0x1000..0x2000, &ranges), []);
        assert_eq!(without(0..0x1000, &[]).first(), Some(&(0..0x1000)));
    }
}
