//! Tells the network where a guest is now: switches learn it from the source of a frame.
//!
//! The frame is a reverse ARP request (RFC 903), as hypervisors send it: it names no IP address, which only the guest knows.

use super::tap::{HEADER, Tap};

/// Bytes of the shortest frame of Ethernet, without its checksum.
const FRAME: usize = 60;

/// A broadcast from this address.
pub(super) fn frame(mac: [u8; 6]) -> [u8; FRAME] {
    let mut frame = [0; FRAME];
    let mut put = |at: usize, bytes: &[u8]| frame[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0xff; 6]);
    put(6, &mac);
    put(12, &[0x80, 0x35]);
    // Ethernet, IPv4, their lengths, "request reverse".
    put(14, &[0, 1, 8, 0, 6, 4, 0, 3]);
    // Sender and target; the protocol addresses between and behind them stay 0.
    put(22, &mac);
    put(32, &mac);
    frame
}

/// Tells the network behind a tap that the guest with this address is here. A network that loses it learns the place from
/// the guest's next packet.
pub fn send(tap: &Tap, mac: [u8; 6]) {
    let mut packet = [0u8; HEADER + FRAME];
    packet[HEADER..].copy_from_slice(&frame(mac));
    let part = libc::iovec { iov_base: packet.as_mut_ptr().cast(), iov_len: packet.len() };
    if let Err(error) = tap.write(&[part]) {
        tracing::warn!(%error, "tap {}: announcing the guest", tap.name());
    }
}
