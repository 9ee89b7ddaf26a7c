//! DMA by a container of groups, the older way (`VFIO_TYPE1v2_IOMMU`). Whole groups belong to it.
//!
//! The kernel translates by the addresses of a process, and pins what is there. When another process goes on with the container, those
//! addresses are taken back first and given anew by that process (`VFIO_DMA_*_FLAG_VADDR`); what is pinned stays so, and DMA goes on.
#![expect(unsafe_code, reason = "gives the kernel addresses of guest memory")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use vfio_bindings::bindings::vfio as sys;
use wherry_handover::{KeptId, Registry};

use super::address::HostAddress;
use super::error::VfioError;
use super::kernel::{Calls, request};
use super::space::Range;
use super::sysfs::{Places, open};

const CONTAINER: &str = "vfio/container";
const GROUP: &str = "vfio/group";

/// A container.
pub(super) struct Type1 {
    calls: Calls,
    container: Arc<OwnedFd>,
    /// It is set up, which its first group does. Held while a group comes.
    set: Mutex<bool>,
}

/// A group in it.
pub(super) struct Group {
    pub(super) number: u32,
    pub(super) file: Arc<OwnedFd>,
}

fn kept(registry: &Registry, id: KeptId, file: OwnedFd, device: HostAddress) -> Result<Arc<OwnedFd>, VfioError> {
    registry.add(id, file).map_err(|error| VfioError::Lacks { device, reason: error.to_string() })
}

impl Type1 {
    /// A new one, for the function that comes first.
    pub(super) fn open(
        calls: &Calls,
        places: &Places,
        registry: &Registry,
        device: HostAddress,
    ) -> Result<Self, VfioError> {
        let file = open(&places.container_node(), device)?;
        let version = calls.number(file.as_fd(), request::GET_API_VERSION, 0);
        let version = version.map_err(VfioError::call(device, "asking for the version of VFIO"))?;
        let has = |what| calls.number(file.as_fd(), request::CHECK_EXTENSION, what).unwrap_or(0) > 0;
        if version != sys::VFIO_API_VERSION as i32 || !has(sys::VFIO_TYPE1v2_IOMMU) {
            let reason = format!("VFIO of version {version} without type1v2 (is vfio_iommu_type1 loaded?)");
            return Err(VfioError::Lacks { device, reason });
        }
        let container = kept(registry, KeptId::new(CONTAINER, 0), file, device)?;
        Ok(Self { calls: calls.clone(), container, set: Mutex::new(false) })
    }

    /// That of the process before this one.
    pub(super) fn inherit(calls: &Calls, registry: &Registry) -> io::Result<Self> {
        let id = KeptId::new(CONTAINER, 0);
        let container = registry.add(id.clone(), registry.inherit(&id)?)?;
        Ok(Self { calls: calls.clone(), container, set: Mutex::new(true) })
    }

    /// Takes a group in.
    pub(super) fn attach(
        &self,
        places: &Places,
        registry: &Registry,
        group: u32,
        device: HostAddress,
    ) -> Result<Group, VfioError> {
        let calls = &self.calls;
        let mut set = self.set.lock().unwrap_or_else(PoisonError::into_inner);
        let node = places.group_node(group);
        if !node.exists() {
            // The kernel makes the node when one of the group is bound.
            return Err(VfioError::NotViable { address: device, group, others: places.in_the_way(group) });
        }
        let file = open(&node, device)?;
        let mut status = [8u32.to_ne_bytes(), [0; 4]].concat();
        calls
            .bytes(file.as_fd(), request::GROUP_GET_STATUS, &mut status)
            .map_err(VfioError::call(device, "asking for the state of its group"))?;
        let flags = u32::from_ne_bytes([status[4], status[5], status[6], status[7]]);
        if flags & sys::VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(VfioError::NotViable { address: device, group, others: places.in_the_way(group) });
        }
        let refused = |what| {
            move |error: io::Error| match error.raw_os_error() {
                Some(libc::EPERM) => VfioError::UnsafeInterrupts { address: device },
                _ => VfioError::call(device, what)(error),
            }
        };
        let mut container = self.container.as_raw_fd().to_ne_bytes();
        calls
            .bytes(file.as_fd(), request::GROUP_SET_CONTAINER, &mut container)
            .map_err(refused("giving its group to the machine"))?;
        if !*set {
            calls
                .number(self.container.as_fd(), request::SET_IOMMU, sys::VFIO_TYPE1v2_IOMMU)
                .map_err(refused("setting up its IOMMU"))?;
            *set = true;
        }
        Ok(Group { number: group, file: kept(registry, KeptId::new(GROUP, group), file, device)? })
    }

    /// Takes a group that the process before this one had in it.
    pub(super) fn inherit_group(registry: &Registry, group: u32) -> io::Result<Group> {
        let id = KeptId::new(GROUP, group);
        Ok(Group { number: group, file: registry.add(id.clone(), registry.inherit(&id)?)? })
    }

    fn map_with(&self, address: u64, range: &Range, flags: u32) -> io::Result<()> {
        let mut map = sys::vfio_iommu_type1_dma_map {
            argsz: size_of::<sys::vfio_iommu_type1_dma_map>() as u32,
            flags,
            vaddr: range.place()? as u64,
            iova: address,
            size: range.size,
        };
        // SAFETY: the range is the block's, which is kept for as long as it is mapped.
        unsafe { self.calls.with(self.container.as_fd(), request::IOMMU_MAP_DMA, &mut map) }.map(drop)
    }

    fn unmap_with(&self, address: u64, size: u64, flags: u32) -> io::Result<()> {
        let argsz = size_of::<sys::vfio_iommu_type1_dma_unmap>() as u32;
        let mut unmap = sys::vfio_iommu_type1_dma_unmap { argsz, flags, iova: address, size, data: Default::default() };
        // SAFETY: there are no addresses of ours in it.
        unsafe { self.calls.with(self.container.as_fd(), request::IOMMU_UNMAP_DMA, &mut unmap) }.map(drop)
    }

    pub(super) fn map(&self, address: u64, range: &Range) -> io::Result<()> {
        self.map_with(address, range, sys::VFIO_DMA_MAP_FLAG_READ | sys::VFIO_DMA_MAP_FLAG_WRITE)
    }

    pub(super) fn unmap(&self, address: u64, size: u64) -> io::Result<()> {
        self.unmap_with(address, size, 0)
    }

    /// Why another process cannot go on with it, if so.
    pub(super) fn cannot_keep(&self) -> Option<&'static str> {
        let can = self.calls.number(self.container.as_fd(), request::CHECK_EXTENSION, sys::VFIO_UPDATE_VADDR);
        // The kernel says no as long as a mediated device is in the container: such pin by the process's addresses at any time.
        (can.unwrap_or(0) <= 0).then_some(
            "the kernel cannot have another process map the memory anew (no VFIO_UPDATE_VADDR, or a mediated device is in use)",
        )
    }

    /// The process's addresses are no longer those of the range.
    pub(super) fn leave(&self, address: u64, size: u64) -> io::Result<()> {
        self.unmap_with(address, size, sys::VFIO_DMA_UNMAP_FLAG_VADDR)
    }

    /// This process's addresses are those of the range. They may still be another one's, which has tried to go on and has not.
    pub(super) fn take_over(&self, address: u64, range: &Range) -> io::Result<()> {
        let map = || self.map_with(address, range, sys::VFIO_DMA_MAP_FLAG_VADDR);
        match map() {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                self.leave(address, range.size).map_err(|_| error)?;
                map()
            }
            done => done,
        }
    }
}
