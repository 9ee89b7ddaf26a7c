//! Tap devices for network devices of VMs, and their other end: what a VM sends comes out there, and what goes in there the
//! VM receives.
#![expect(unsafe_code, reason = "packet sockets, which rustix does not bind")]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::time::Duration;

use crate::LabError;
use crate::namespace::Namespace;

/// Ethernet type of experiments inside of one site (IEEE 802); nothing of the kernel's own has it.
pub const ETHERTYPE: u16 = 0x88b5;

/// The other end of a tap device. Frames of all types are sent, and those of one type received.
#[derive(Debug)]
pub struct TapPeer {
    socket: File,
    name: String,
}

impl TapPeer {
    /// Makes a tap device that stays as long as its namespace does, and opens its other end for frames of a type.
    pub fn make(namespace: &Namespace, name: &str, ethertype: u16) -> Result<Self, LabError> {
        namespace.ip(&["tuntap", "add", "dev", name, "mode", "tap"])?;
        // The kernel would look for routers on it.
        let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
        let quiet = namespace.within(|| std::fs::write(&path, "1"))?;
        if let Err(error) = quiet.or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) }) {
            return Err(LabError::new(format!("writing {path}"), error));
        }
        namespace.ip(&["link", "set", "dev", name, "up"])?;
        let made = namespace.within(|| open(name, ethertype))?;
        let socket = made.map_err(|e| LabError::new(format!("opening the other end of tap {name}"), e))?;
        Ok(Self { socket, name: name.into() })
    }

    /// Whether somebody has the device open and the kernel passes frames to it, which begins a moment later: what is sent
    /// before is lost.
    pub fn is_ready(&self, namespace: &Namespace) -> Result<bool, LabError> {
        // SAFETY: zeros are a value of this struct of integers.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(self.name.as_bytes()) {
            *to = from.cast_signed();
        }
        // SAFETY: SIOCGIFFLAGS reads and writes an ifreq, which this is.
        if unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) } < 0 {
            return Err(LabError::new(format!("looking at tap {}", self.name), io::Error::last_os_error()));
        }
        // SAFETY: the kernel has filled this field in.
        let running = i32::from(unsafe { request.ifr_ifru.ifru_flags }) & libc::IFF_RUNNING != 0;
        if running {
            // Under the lock that whoever says so holds until frames pass.
            namespace.ip(&["link", "set", "dev", &self.name, "up"])?;
        }
        Ok(running)
    }

    /// The next frame, if one comes in time; its length.
    pub fn receive(&self, into: &mut [u8], limit: Duration) -> io::Result<Option<usize>> {
        let mut list = [libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLIN, revents: 0 }];
        let limit = libc::c_int::try_from(limit.as_millis()).unwrap_or(libc::c_int::MAX);
        // SAFETY: one entry, which lives for the call.
        match unsafe { libc::poll(list.as_mut_ptr(), 1, limit) } {
            0 => return Ok(None),
            count if count < 0 => return Err(io::Error::last_os_error()),
            _ => {}
        }
        (&self.socket).read(into).map(Some)
    }

    /// Sends a frame into the device. It is lost where the device's queue is full or nobody has it open.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        (&self.socket).write(frame).map(|_| ())
    }
}

fn open(name: &str, ethertype: u16) -> io::Result<File> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: makes a descriptor, which is owned at once.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above; nobody else has it.
    let socket = unsafe { File::from_raw_fd(fd) };
    let index = rustix::net::netdevice::name_to_index(&socket, name)?;
    // SAFETY: zeros are a value of this struct of integers.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ethertype.to_be();
    address.sll_ifindex = index.cast_signed();
    let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: an address of this length.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
    if bound < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}
