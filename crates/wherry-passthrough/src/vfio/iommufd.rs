//! DMA by iommufd, the newer way: each function has a device node, and memory is mapped by its file, without addresses of a process.
//!
//! The stock kernels of Debian 12 have no iommufd: its tests play the kernel. On a Linux 6.12 that was built with it, a guest's DMA and
//! interrupts were right; what a live update asks for is newer, and **has not met a real kernel**. It follows `linux/iommufd.h`.
//!
//! Pinned pages are accounted to a process; another one that goes on takes them over (`IOMMU_IOAS_CHANGE_PROCESS`), which the kernel
//! does only if all memory was mapped by its file (`IOMMU_IOAS_MAP_FILE`, Linux 6.14).
#![expect(unsafe_code, reason = "gives the kernel addresses of guest memory")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use iommufd_bindings as sys;
use wherry_handover::{KeptId, Registry};

use super::address::HostAddress;
use super::error::VfioError;
use super::kernel::{Calls, request};
use super::space::Range;
use super::sysfs::{Places, open};

const IOMMUFD: &str = "vfio/iommufd";
/// A mapping at an address of ours, to be read and written.
const MAPPING: u32 = sys::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA
    | sys::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE
    | sys::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE;

/// An address space of an iommufd.
pub(super) struct Iommufd {
    calls: Calls,
    pub(super) file: Arc<OwnedFd>,
    /// Its number.
    pub(super) space: u32,
    /// Some of it was mapped by addresses of this process.
    by_address: AtomicBool,
}

fn size<T>() -> u32 {
    size_of::<T>() as u32
}

impl Iommufd {
    /// A new one, for the function that comes first.
    pub(super) fn open(
        calls: &Calls,
        places: &Places,
        registry: &Registry,
        device: HostAddress,
    ) -> Result<Self, VfioError> {
        let file = open(&places.iommufd_node(), device)?;
        let mut alloc = sys::iommu_ioas_alloc { size: size::<sys::iommu_ioas_alloc>(), ..Default::default() };
        // SAFETY: there are no addresses in it.
        unsafe { calls.with(file.as_fd(), request::iommufd(sys::IOMMUFD_CMD_IOAS_ALLOC), &mut alloc) }
            .map_err(VfioError::call(device, "making an address space"))?;
        let kept = registry.add(KeptId::new(IOMMUFD, 0), file);
        let file = kept.map_err(|error| VfioError::Lacks { device, reason: error.to_string() })?;
        Ok(Self { calls: calls.clone(), file, space: alloc.out_ioas_id, by_address: AtomicBool::new(false) })
    }

    /// That of the process before this one.
    pub(super) fn inherit(calls: &Calls, registry: &Registry, space: u32) -> io::Result<Self> {
        let id = KeptId::new(IOMMUFD, 0);
        let file = registry.add(id.clone(), registry.inherit(&id)?)?;
        Ok(Self { calls: calls.clone(), file, space, by_address: AtomicBool::new(false) })
    }

    /// Binds a function to it, whose device node is open, and attaches it to the address space: by a page table of its own, whose
    /// number this is, or by one that the kernel chooses.
    pub(super) fn attach(&self, device: BorrowedFd<'_>, address: HostAddress) -> Result<Option<u32>, VfioError> {
        let calls = &self.calls;
        // struct vfio_device_bind_iommufd, without the token of newer kernels.
        let mut bind = [16u32, 0, self.file.as_raw_fd() as u32, 0].map(u32::to_ne_bytes).concat();
        calls.bytes(device, request::DEVICE_BIND_IOMMUFD, &mut bind).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL | libc::EBUSY) => VfioError::InUse { address, what: "the function or its group".into() },
            Some(libc::EPERM) => VfioError::UnsafeInterrupts { address },
            _ => VfioError::call(address, "binding it to an iommufd")(error),
        })?;
        let id = u32::from_ne_bytes([bind[12], bind[13], bind[14], bind[15]]);
        let table = self.table(id);
        // struct vfio_device_attach_iommufd_pt, without the PASID of newer kernels.
        let mut attach = [12, 0, table.unwrap_or(self.space)].map(u32::to_ne_bytes).concat();
        calls
            .bytes(device, request::DEVICE_ATTACH_IOMMUFD_PT, &mut attach)
            .map_err(VfioError::call(address, "attaching it to the memory of the machine"))?;
        Ok(table)
    }

    /// A page table that tracks what is written, if the IOMMU can.
    fn table(&self, device: u32) -> Option<u32> {
        let mut info = sys::iommu_hw_info { size: size::<sys::iommu_hw_info>(), dev_id: device, ..Default::default() };
        // SAFETY: it has room for no data.
        unsafe { self.calls.with(self.file.as_fd(), request::iommufd(sys::IOMMUFD_CMD_GET_HW_INFO), &mut info) }
            .ok()?;
        let tracks = u64::from(sys::iommufd_hw_capabilities_IOMMU_HW_CAP_DIRTY_TRACKING);
        if info.out_capabilities & tracks == 0 {
            return None;
        }
        let mut alloc = sys::iommu_hwpt_alloc {
            size: size::<sys::iommu_hwpt_alloc>(),
            flags: sys::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
            dev_id: device,
            pt_id: self.space,
            ..Default::default()
        };
        // SAFETY: there are no addresses in it.
        unsafe { self.calls.with(self.file.as_fd(), request::iommufd(sys::IOMMUFD_CMD_HWPT_ALLOC), &mut alloc) }
            .ok()?;
        Some(alloc.out_hwpt_id)
    }

    pub(super) fn map(&self, address: u64, range: &Range) -> io::Result<()> {
        let mut map = sys::iommu_ioas_map_file {
            size: size::<sys::iommu_ioas_map_file>(),
            flags: MAPPING,
            ioas_id: self.space,
            fd: range.block.fd().as_raw_fd(),
            start: range.offset,
            length: range.size,
            iova: address,
        };
        // SAFETY: there are no addresses of ours in it.
        let mapped =
            unsafe { self.calls.with(self.file.as_fd(), request::iommufd(sys::IOMMUFD_CMD_IOAS_MAP_FILE), &mut map) };
        match mapped {
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {}
            mapped => return mapped.map(drop),
        }
        let mut map = sys::iommu_ioas_map {
            size: size::<sys::iommu_ioas_map>(),
            flags: MAPPING,
            ioas_id: self.space,
            user_va: range.place()? as u64,
            length: range.size,
            iova: address,
            ..Default::default()
        };
        // SAFETY: the range is the block's, which is kept for as long as it is mapped.
        unsafe { self.calls.with(self.file.as_fd(), request::iommufd(sys::IOMMUFD_CMD_IOAS_MAP), &mut map) }?;
        self.by_address.store(true, Ordering::Release);
        Ok(())
    }

    pub(super) fn unmap(&self, address: u64, length: u64) -> io::Result<()> {
        let mut unmap =
            sys::iommu_ioas_unmap { size: size::<sys::iommu_ioas_unmap>(), ioas_id: self.space, iova: address, length };
        // SAFETY: there are no addresses of ours in it.
        unsafe { self.calls.with(self.file.as_fd(), request::iommufd(sys::IOMMUFD_CMD_IOAS_UNMAP), &mut unmap) }
            .map(drop)
    }

    /// Why another process cannot go on with it, if so.
    pub(super) fn cannot_keep(&self) -> Option<&'static str> {
        if self.by_address.load(Ordering::Acquire) {
            return Some("this kernel's iommufd maps memory by addresses of this process (no IOMMU_IOAS_MAP_FILE)");
        }
        // Of the process that has it already, this changes nothing.
        self.take_over().err().map(|_| "the kernel cannot have another process own what is pinned (no CHANGE_PROCESS)")
    }

    /// What is pinned is accounted to this process.
    pub(super) fn take_over(&self) -> io::Result<()> {
        let mut change = [8u32, 0].map(u32::to_ne_bytes).concat();
        let request = request::iommufd(sys::IOMMUFD_CMD_IOAS_CHANGE_PROCESS);
        self.calls.bytes(self.file.as_fd(), request, &mut change).map(drop)
    }

    /// Tracks what is written through a page table, or no longer.
    pub(super) fn track(&self, table: u32, on: bool) -> io::Result<()> {
        let enable = sys::iommufd_hwpt_set_dirty_tracking_flags_IOMMU_HWPT_DIRTY_TRACKING_ENABLE;
        let mut set = [16, if on { enable } else { 0 }, table, 0].map(u32::to_ne_bytes).concat();
        let request = request::iommufd(sys::IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING);
        self.calls.bytes(self.file.as_fd(), request, &mut set).map(drop)
    }

    /// What was written since it was last asked: bit n is page n of the range.
    pub(super) fn written(&self, table: u32, address: u64, bytes: u64, page: u64) -> io::Result<Vec<u64>> {
        let mut words = vec![0u64; (bytes / page).div_ceil(64) as usize];
        let mut get = sys::iommu_hwpt_get_dirty_bitmap {
            size: size::<sys::iommu_hwpt_get_dirty_bitmap>(),
            hwpt_id: table,
            iova: address,
            length: bytes,
            page_size: page,
            data: words.as_mut_ptr() as u64,
            ..Default::default()
        };
        let request = request::iommufd(sys::IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP);
        // SAFETY: the bitmap has a bit for each page of the range.
        unsafe { self.calls.with(self.file.as_fd(), request, &mut get) }?;
        Ok(words)
    }
}
