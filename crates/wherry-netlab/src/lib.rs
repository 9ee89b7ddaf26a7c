//! Networks for tests and measurements: two network namespaces and a link between them that can be taken down, delayed
//! and held to a rate. Of what users run, only `wherry bench --link` uses it.
//!
//! - [`Network`] is the two [`Namespace`]s and their link; dropping it removes all of it.
//! - A plain link is a veth pair, as fast as the kernel. A [shaped](Network::shaped) one is a TUN device in each namespace
//!   and two threads that carry packets between them: it needs no traffic shaper of the kernel's (`netem` is missing from
//!   many), and is the same on every machine.
//! - [`TapPeer`] is a tap device for a VM and its other end.
//! - [`connections`] finds the TCP connections of another process, and ends them under it.
//!
//! All of it needs root and `ip` (Debian package iproute2): [`missing`] says what is not there.

mod line;
mod namespace;
mod network;
mod shaper;
mod sockets;
mod tap;
mod tun;

pub use line::{Shape, Traffic};
pub use namespace::Namespace;
pub use network::{LEFT, Network, RIGHT};
pub use sockets::{Connection, connections};
pub use tap::{ETHERTYPE, TapPeer};

/// Something of the network could not be made or changed.
#[derive(Debug, thiserror::Error)]
#[error("{doing}: {source}")]
pub struct LabError {
    doing: String,
    source: std::io::Error,
}

impl LabError {
    fn new(doing: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self { doing: doing.into(), source: source.into() }
    }
}

/// Why no network can be made here, if so: what is missing, by name.
pub fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("network namespaces need root".into());
    }
    if let Err(error) = std::process::Command::new("ip").arg("-V").output() {
        return Some(format!("`ip` (Debian package iproute2): {error}"));
    }
    std::fs::File::options().read(true).write(true).open(tun::DEVICE).err().map(|e| format!("{}: {e}", tun::DEVICE))
}
