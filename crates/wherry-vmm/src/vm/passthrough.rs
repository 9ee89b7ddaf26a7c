//! Functions that other processes own: found at their sockets, described, compared, and made for the bus.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use prost::Message;
use wherry_handover::Registry;
use wherry_passthrough::{Function, FunctionIdentity, Owner, OwnerError, PassthroughError, PassthroughParts, VfioUser};

use crate::description::DeviceDescription;
use crate::pci::{AssignedBars, PciError, PciRoot};

/// Name in a description.
pub(super) const VFIO_USER: &str = "vfio-user";

/// Device processes of one machine, and what their functions are.
#[derive(Debug, Default)]
pub(super) struct Owners(Vec<(Arc<VfioUser>, FunctionIdentity)>);

impl Owners {
    /// Connects to them. Nothing of a function is changed.
    pub(super) fn connect(sockets: &[PathBuf]) -> Result<Self, OwnerError> {
        let connect = |socket: &PathBuf| VfioUser::connect(socket).map(known);
        sockets.iter().map(connect).collect::<Result<_, _>>().map(Self)
    }

    /// Takes those of a described machine that the process before has claimed. Nothing is asked of them.
    pub(super) fn inherit(described: &[DeviceDescription], registry: &Arc<Registry>) -> Result<Self, OwnerError> {
        let wanted = described.iter().filter(|device| device.kind == VFIO_USER).enumerate();
        let inherit = |(n, device): (usize, &DeviceDescription)| {
            let instance = device.place.map_or(n as u32, |place| place.instance);
            VfioUser::inherit(Path::new(&device.label), &Function::shelf(registry, instance)).map(known)
        };
        wanted.map(inherit).collect::<Result<_, _>>().map(Self)
    }

    pub(super) fn describe(&self) -> impl Iterator<Item = DeviceDescription> + '_ {
        self.0.iter().map(|(owner, identity)| describe(owner, identity))
    }

    /// The `n`-th of them.
    pub(super) fn get(&self, n: usize) -> Option<&Arc<VfioUser>> {
        self.0.get(n).map(|(owner, _)| owner)
    }

    /// What a described machine needs and these are not.
    pub(super) fn lacking(&self, described: &[DeviceDescription]) -> Vec<String> {
        let mut reasons = Vec::new();
        let wanted: Vec<_> = described.iter().filter(|device| device.kind == VFIO_USER).collect();
        for (n, device) in wanted.iter().enumerate() {
            let label: String = device.label.chars().take(200).collect();
            let what = format!("vfio-user device {n} ({label:?} at the source)");
            let Some((owner, here)) = self.0.get(n) else {
                reasons.push(format!("{what}: give `receive` a --device vfio-user=SOCKET for it"));
                continue;
            };
            let socket = owner.socket().display();
            match FunctionIdentity::decode(device.config.as_slice()) {
                Ok(identity) => {
                    let lacking = identity.lacking(here).into_iter();
                    reasons.extend(lacking.map(|reason| format!("{what} at {socket} with {reason}")));
                }
                Err(error) => reasons.push(format!("{what} whose description can be read ({error})")),
            }
        }
        for (owner, _) in self.0.iter().skip(wanted.len()) {
            let socket = owner.socket().display();
            reasons
                .push(format!("a VM with a vfio-user device more (it has {}, and {socket} was given)", wanted.len()));
        }
        reasons
    }

    /// Why memory cannot follow a machine with these devices, if so.
    pub(super) fn cannot_follow(&self) -> Option<String> {
        let (owner, _) = self.0.iter().find(|(owner, _)| !owner.facts().faults)?;
        let name = owner.name();
        Some(format!("{name} does not take part in postcopy (no extension `userfaultfd`)"))
    }

    /// Why memory may not be given back to the host, if so.
    pub(super) fn pinned(&self) -> Option<String> {
        let (owner, _) = self.0.first()?;
        Some(format!("the process behind {} maps it, and may have pinned what it maps", owner.socket().display()))
    }
}

fn known(owner: VfioUser) -> (Arc<VfioUser>, FunctionIdentity) {
    let identity = FunctionIdentity::of(owner.facts());
    (Arc::new(owner), identity)
}

/// A function that another process owns, on the bus of a machine.
pub(super) struct Plugged {
    pub(super) function: Arc<Function>,
    pub(super) bars: AssignedBars,
}

/// A function cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PlugFunctionError {
    /// Its owner does not do what is needed, or it is not as it should be.
    #[error(transparent)]
    Function(#[from] PassthroughError),
    /// The bus cannot take it.
    #[error(transparent)]
    Pci(#[from] PciError),
}

impl Plugged {
    /// Makes a function with the parts of its place on the bus, where it is put by [`PciRoot::add`].
    pub(super) fn make(
        owner: Arc<VfioUser>,
        instance: u32,
        pci: &PciRoot,
        parts: &PassthroughParts,
    ) -> Result<Self, PlugFunctionError> {
        let mut bars = AssignedBars::default();
        let made = Function::new(owner, instance, parts, |config: &mut _| {
            bars = pci.assign_bars(config)?;
            Ok::<_, PlugFunctionError>(())
        });
        match made {
            Ok(function) => Ok(Self { function, bars }),
            Err(error) => {
                pci.release_bars(bars);
                Err(error)
            }
        }
    }
}

/// Describes a function that another process owns.
pub(super) fn describe(owner: &VfioUser, identity: &FunctionIdentity) -> DeviceDescription {
    DeviceDescription {
        kind: VFIO_USER.into(),
        label: owner.socket().display().to_string(),
        config: identity.encode_to_vec(),
        ..Default::default()
    }
}
