//! A tap device of this host: opened by its name, read and written by frames.
#![expect(unsafe_code, reason = "ioctls of linux/if_tun.h, and writes from guest memory")]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

/// Bytes before every frame: `struct virtio_net_hdr_v1`, as the guest reads and writes it (section 5.1.6).
pub(super) const HEADER: usize = 12;
const DEVICE: &str = "/dev/net/tun";

/// A tap device that this process has.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

/// A tap device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// There is none of this name.
    #[error("tap {0}: there is no network device of this name here; make one with `ip tuntap add dev {0} mode tap`")]
    Missing(String),
    /// No device can have such a name.
    #[error("tap {0:?}: a network device has a name of 1 to 15 bytes without '/' and '%'")]
    Name(String),
    /// Another process has it.
    #[error("tap {0}: another process has it open; it may belong to a VM that runs")]
    Busy(String),
    /// Anything else.
    #[error("tap {name}: {what}: {source}")]
    Io {
        /// The device.
        name: String,
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl Tap {
    /// Opens a device that exists in the network namespace of this thread.
    pub fn open(name: &str) -> Result<Self, TapError> {
        // A `%` is a pattern, for which the kernel would make a device of a name of its own.
        let possible = (1..16).contains(&name.len()) && !name.contains(['/', '%', '\0']);
        let c_name = CString::new(name).ok().filter(|_| possible);
        let c_name = c_name.ok_or_else(|| TapError::Name(name.chars().take(80).collect()))?;
        let error = |what| move |source| TapError::Io { name: name.into(), what, source };
        // SAFETY: reads a string that ends with 0.
        if unsafe { libc::if_nametoindex(c_name.as_ptr()) } == 0 {
            return Err(TapError::Missing(name.into()));
        }
        let opened = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE);
        let file = opened.map_err(error("opening /dev/net/tun"))?;
        // SAFETY: zeros are a value of this struct of integers.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(c_name.as_bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes an ifreq, which this is.
        checked(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }).map_err(|source| {
            match source.raw_os_error() {
                Some(libc::EBUSY) => TapError::Busy(name.into()),
                Some(libc::EINVAL) => error("attaching to it (is it a tap device with one queue?)")(source),
                _ => error("attaching to it")(source),
            }
        })?;
        for (what, request, value) in [
            ("setting the length of its header", libc::TUNSETVNETHDRSZ, HEADER as libc::c_int),
            ("setting the byte order of its header", libc::TUNSETVNETLE, 1),
        ] {
            // SAFETY: these read an int.
            checked(unsafe { libc::ioctl(file.as_raw_fd(), request, &raw const value) }).map_err(error(what))?;
        }
        let tap = Self { file, name: name.into() };
        // Another VM may have left it otherwise.
        tap.set_offloads(0).map_err(error("switching its offloads off"))?;
        Ok(tap)
    }

    /// A device that the predecessor of this process has opened. It is as its guest has set it.
    pub fn adopt(fd: OwnedFd, name: &str) -> Self {
        Self { file: File::from(fd), name: name.into() }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the guest's driver takes of these features: frames without checksum, and larger ones than its MTU.
    pub(super) fn set_offloads(&self, features: u64) -> io::Result<()> {
        let has = |bit: u32| features & 1 << bit != 0;
        let mut flags: libc::c_uint = 0;
        // All others need the first (section 5.1.3.1).
        if has(VIRTIO_NET_F_GUEST_CSUM) {
            flags |= libc::TUN_F_CSUM;
            for (bit, flag) in
                [(VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4), (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6)]
            {
                flags |= if has(bit) { flag } else { 0 };
            }
            if has(VIRTIO_NET_F_GUEST_ECN) && flags != libc::TUN_F_CSUM {
                flags |= libc::TUN_F_TSO_ECN;
            }
        }
        // SAFETY: takes its argument by value.
        checked(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
    }

    /// Reads one frame behind its header; none if there is none now.
    pub(super) fn read(&self, into: &mut [u8]) -> io::Result<Option<usize>> {
        match (&self.file).read(into) {
            Ok(len) => Ok(Some(len)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends one frame behind its header. What cannot be sent is lost, as on any network.
    pub(super) fn write(&self, parts: &[libc::iovec]) -> io::Result<()> {
        let count = libc::c_int::try_from(parts.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        loop {
            // SAFETY: the parts lie in memory that lives as long as the call; it only reads them.
            let written = unsafe { libc::writev(self.file.as_raw_fd(), parts.as_ptr(), count) };
            if written >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn checked(returned: libc::c_int) -> io::Result<()> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
