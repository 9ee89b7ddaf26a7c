//! Two namespaces and the link between them.

use crate::line::{Shape, Traffic};
use crate::namespace::Namespace;
use crate::shaper::Shaper;
use crate::{LabError, tun};

/// The address of the left namespace. (198.18.0.0/15 is for measurements, RFC 2544; every network has these, because
/// nobody sees them from outside.)
pub const LEFT: &str = "198.18.0.1";
/// The address of the right one.
pub const RIGHT: &str = "198.18.0.2";

/// The device of the link, in both namespaces.
const DEVICE: &str = "lab0";
/// Bytes of a packet over a shaped link, at most. Larger than Ethernet's, so that few packets carry 1 Gb/s; small enough
/// that one does not hold up the next for long (0.1 ms at 1 Gb/s).
const MTU: &str = "16000";

/// Two namespaces and the link between them. Dropping it removes them; a process inside that still runs keeps its
/// namespace, which then has no name and no link.
#[derive(Debug)]
pub struct Network {
    // Before the namespaces: the devices go with it.
    shaper: Option<Shaper>,
    left: Namespace,
    right: Namespace,
}

impl Network {
    /// With a link as fast as the kernel.
    pub fn new() -> Result<Self, LabError> {
        let (left, right) = (Namespace::new()?, Namespace::new()?);
        left.ip(&["link", "add", DEVICE, "type", "veth", "peer", "name", DEVICE, "netns", right.name()])?;
        Self { shaper: None, left, right }.configure()
    }

    /// With a link that is so in each direction.
    pub fn shaped(shape: Shape) -> Result<Self, LabError> {
        let (left, right) = (Namespace::new()?, Namespace::new()?);
        let ends = [tun::make(&left, DEVICE)?, tun::make(&right, DEVICE)?];
        for namespace in [&left, &right] {
            namespace.ip(&["link", "set", "dev", DEVICE, "mtu", MTU])?;
        }
        Self { shaper: Some(Shaper::start(ends, shape)?), left, right }.configure()
    }

    fn configure(self) -> Result<Self, LabError> {
        for (namespace, address) in [(&self.left, LEFT), (&self.right, RIGHT)] {
            namespace.ip(&["address", "add", &format!("{address}/30"), "dev", DEVICE])?;
        }
        self.up()?;
        Ok(self)
    }

    /// The namespace whose address is [`LEFT`].
    pub fn left(&self) -> &Namespace {
        &self.left
    }

    /// The namespace whose address is [`RIGHT`].
    pub fn right(&self) -> &Namespace {
        &self.right
    }

    /// Takes the link down at both ends: nothing passes, and there is no route to the other. TCP connections wait.
    pub fn down(&self) -> Result<(), LabError> {
        self.set("down")
    }

    /// Takes the link up again.
    pub fn up(&self) -> Result<(), LabError> {
        self.set("up")
    }

    fn set(&self, state: &str) -> Result<(), LabError> {
        self.left.ip(&["link", "set", "dev", DEVICE, state])?;
        self.right.ip(&["link", "set", "dev", DEVICE, state])
    }

    /// What a shaped link has carried from left to right, and from right to left.
    pub fn traffic(&self) -> Option<[Traffic; 2]> {
        self.shaper.as_ref().map(Shaper::traffic)
    }
}
