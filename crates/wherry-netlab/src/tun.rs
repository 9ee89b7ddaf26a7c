//! TUN devices: network devices whose packets a thread of this process reads and writes.
#![expect(unsafe_code, reason = "makes an ioctl of linux/if_tun.h")]

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::OFlags;
use rustix::ioctl::{Setter, ioctl, opcode};

use crate::LabError;
use crate::namespace::Namespace;

pub(crate) const DEVICE: &str = "/dev/net/tun";

/// `struct ifreq` of linux/if.h, as far as TUNSETIFF reads it.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

const IFF_TUN: u16 = 1;
/// Bare IP packets, without a header of the device's own.
const IFF_NO_PI: u16 = 0x1000;

/// Makes a device in a namespace. It is there as long as the descriptor is open, which does not block.
pub(crate) fn make(namespace: &Namespace, name: &str) -> Result<File, LabError> {
    let failed = |e: std::io::Error| LabError::new(format!("making TUN device {name}"), e);
    let mut request = Request { name: [0; 16], flags: IFF_TUN | IFF_NO_PI, rest: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    let made = namespace.within(move || {
        // The device belongs to the namespace of the thread that opens the file.
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        let file = File::options().read(true).write(true).custom_flags(flags).open(DEVICE)?;
        // SAFETY: TUNSETIFF takes a pointer to an ifreq, which this is, and writes into none of the caller's memory
        // but that copy.
        unsafe { ioctl(&file, Setter::<{ opcode::write::<i32>(b'T', 202) }, Request>::new(request))? };
        Ok(file)
    })?;
    made.map_err(failed)
}
