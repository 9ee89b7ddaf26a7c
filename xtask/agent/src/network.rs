//! The network that a guest with a network device is in: two network namespaces.
//!
//! ```text
//!     left: hosts                               right: another machine
//!       tap0, tap1 ── bridge br0 ── lab0 ════════ lab0  198.18.0.2
//!     the guest, 198.18.0.1, is behind the tap of the Wherry that it is in
//! ```
//!
//! The bridge learns from the guest's frames behind which of its ports the guest is, as switches between hosts do.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use wherry_netlab::{LEFT, Namespace, Network};

/// The guest's address.
pub const GUEST: &str = LEFT;
/// The taps; two Wherrys use them by turns.
pub const TAPS: [&str; 2] = ["tap0", "tap1"];

/// Makes the namespaces, the bridge and the taps.
pub fn make() -> Result<Network> {
    let network = Network::new()?;
    let hosts = network.left();
    // The guest has this address, not its host.
    ip(hosts, "address flush dev lab0")?;
    // Without the delay a port forwards as soon as it is up; there are no loops to look for.
    ip(hosts, "link add br0 type bridge forward_delay 0")?;
    for tap in TAPS {
        ip(hosts, &format!("tuntap add dev {tap} mode tap"))?;
    }
    for port in TAPS.into_iter().chain(["lab0"]) {
        ip(hosts, &format!("link set dev {port} master br0"))?;
        ip(hosts, &format!("link set dev {port} up"))?;
    }
    ip(hosts, "link set dev br0 up")?;
    Ok(network)
}

fn ip(namespace: &Namespace, arguments: &str) -> Result<()> {
    let mut command = Command::new("ip");
    command.args(arguments.split(' '));
    let output = namespace.hold(&mut command)?.output().with_context(|| format!("cannot run ip {arguments}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {arguments}: {}: {}", output.status, said.trim());
    Ok(())
}
