//! System calls: what is asked of the kernel, with its structures (`linux/vfio.h`, `linux/iommufd.h`).
//!
//! Those of a device are the very structures of vfio-user, whose payloads are used here. [`Kernel`] stands between, so that tests
//! can play the kernel: there is none here with an iommufd, and no real one fails at every step on demand.
#![expect(unsafe_code, reason = "ioctls")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use libc::{c_ulong, c_void};

/// `VFIO_TYPE`, which is that of iommufd, too.
const TYPE: u32 = 0x3b << 8;

/// Requests, by their numbers.
pub(crate) mod request {
    use super::TYPE;

    const BASE: u32 = TYPE | vfio_bindings::bindings::vfio::VFIO_BASE;
    pub(crate) const GET_API_VERSION: u32 = BASE;
    pub(crate) const CHECK_EXTENSION: u32 = BASE + 1;
    pub(crate) const SET_IOMMU: u32 = BASE + 2;
    pub(crate) const GROUP_GET_STATUS: u32 = BASE + 3;
    pub(crate) const GROUP_SET_CONTAINER: u32 = BASE + 4;
    pub(crate) const GROUP_GET_DEVICE_FD: u32 = BASE + 6;
    pub(crate) const DEVICE_GET_INFO: u32 = BASE + 7;
    pub(crate) const DEVICE_GET_REGION_INFO: u32 = BASE + 8;
    pub(crate) const DEVICE_GET_IRQ_INFO: u32 = BASE + 9;
    pub(crate) const DEVICE_SET_IRQS: u32 = BASE + 10;
    pub(crate) const DEVICE_RESET: u32 = BASE + 11;
    pub(crate) const DEVICE_GET_PCI_HOT_RESET_INFO: u32 = BASE + 12;
    /// Of a container. Of a device: `VFIO_DEVICE_PCI_HOT_RESET`.
    pub(crate) const IOMMU_MAP_DMA: u32 = BASE + 13;
    pub(crate) const DEVICE_PCI_HOT_RESET: u32 = BASE + 13;
    pub(crate) const IOMMU_UNMAP_DMA: u32 = BASE + 14;
    pub(crate) const DEVICE_FEATURE: u32 = BASE + 17;
    pub(crate) const DEVICE_BIND_IOMMUFD: u32 = BASE + 18;
    pub(crate) const DEVICE_ATTACH_IOMMUFD_PT: u32 = BASE + 19;

    /// One of iommufd (`IOMMUFD_CMD_*`).
    pub(crate) const fn iommufd(command: u32) -> u32 {
        TYPE | command
    }
}

/// Whoever answers system calls on descriptors of VFIO and iommufd: the kernel.
pub trait Kernel: Send + Sync {
    /// One ioctl.
    ///
    /// # Safety
    ///
    /// `argument` is a number, or points to what the request reads and writes; so do addresses in it.
    unsafe fn ioctl(&self, file: BorrowedFd<'_>, request: u32, argument: *mut c_void) -> io::Result<i32>;
}

/// The kernel of this host.
#[derive(Debug)]
pub struct Linux;

impl Kernel for Linux {
    unsafe fn ioctl(&self, file: BorrowedFd<'_>, request: u32, argument: *mut c_void) -> io::Result<i32> {
        loop {
            // SAFETY: the caller's.
            let answer = unsafe { libc::ioctl(file.as_raw_fd(), c_ulong::from(request), argument) };
            if answer >= 0 {
                return Ok(answer);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

/// The kernel, in the forms in which requests are made.
#[derive(Clone)]
pub(crate) struct Calls(pub(crate) Arc<dyn Kernel>);

impl Calls {
    /// With a number.
    pub(crate) fn number(&self, file: BorrowedFd<'_>, request: u32, argument: u32) -> io::Result<i32> {
        // SAFETY: these requests take a number.
        unsafe { self.0.ioctl(file, request, argument as usize as *mut c_void) }
    }

    /// With a structure that says its own size (`argsz`, `size`) or is of constant size, and has no addresses in it.
    pub(crate) fn bytes(&self, file: BorrowedFd<'_>, request: u32, argument: &mut [u8]) -> io::Result<i32> {
        // SAFETY: the structure is there, as long as it says.
        unsafe { self.0.ioctl(file, request, argument.as_mut_ptr().cast()) }
    }

    /// With a structure that says its own size, and has addresses in it.
    ///
    /// # Safety
    ///
    /// They are of memory that may be used so.
    pub(crate) unsafe fn addressed(&self, file: BorrowedFd<'_>, request: u32, argument: &mut [u8]) -> io::Result<i32> {
        // SAFETY: the structure is there, as long as it says; the rest is the caller's.
        unsafe { self.0.ioctl(file, request, argument.as_mut_ptr().cast()) }
    }

    /// With a structure of C.
    ///
    /// # Safety
    ///
    /// It is that of the request, and addresses in it are of memory that may be used so.
    pub(crate) unsafe fn with<T>(&self, file: BorrowedFd<'_>, request: u32, argument: &mut T) -> io::Result<i32> {
        // SAFETY: the structure is there; the rest is the caller's.
        unsafe { self.0.ioctl(file, request, std::ptr::from_mut(argument).cast()) }
    }
}

/// A structure that begins with the bytes that it may take, asked for until it has come whole.
pub(crate) fn whole(
    calls: &Calls,
    file: BorrowedFd<'_>,
    request: u32,
    mut argument: Vec<u8>,
    most: usize,
) -> io::Result<Vec<u8>> {
    let ask = argument.clone();
    loop {
        let len = argument.len() as u32;
        argument[..4].copy_from_slice(&len.to_ne_bytes());
        let asked = calls.bytes(file, request, &mut argument);
        let needed = argument.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes)) as usize;
        match asked {
            Err(error) if error.raw_os_error() != Some(libc::ENOSPC) => return Err(error),
            Ok(_) if needed <= argument.len() => return Ok(argument),
            _ if needed <= argument.len() || needed > most => {
                return Err(io::Error::other(format!("an answer of {needed} bytes")));
            }
            _ => {
                argument.truncate(0);
                argument.extend_from_slice(&ask);
                argument.resize(needed, 0);
            }
        }
    }
}
