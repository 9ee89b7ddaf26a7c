//! Functions that somebody else owns: found where they are, described, compared, and made for the bus.

use std::path::Path;
use std::sync::Arc;

use prost::Message;
use wherry_handover::Registry;
use wherry_passthrough::vfio::{BadAddress, VfioHost};
use wherry_passthrough::{
    Function, FunctionIdentity, Owner, OwnerError, PassthroughError, PassthroughParts, VFIO, VFIO_USER, VfioUser,
};

use crate::config::FunctionSource;
use crate::description::DeviceDescription;
use crate::pci::{AssignedBars, PciError, PciRoot};

/// Whether a described device is a function that somebody else owns.
pub(super) fn is_function(kind: &str) -> bool {
    [VFIO_USER, VFIO].contains(&kind)
}

/// Functions for one machine, and what they are.
#[derive(Default)]
pub(super) struct Owners(Vec<(Arc<dyn Owner>, FunctionIdentity)>);

impl std::fmt::Debug for Owners {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(owner, _)| owner.name())).finish()
    }
}

/// Takes a function. Nothing of one of another process is changed; one of this host is reset, if it can be.
pub(super) fn connect(source: &FunctionSource, host: &VfioHost) -> Result<Arc<dyn Owner>, OwnerError> {
    Ok(match source {
        FunctionSource::VfioUser(socket) => Arc::new(VfioUser::connect(socket)?),
        FunctionSource::Vfio(address) => Arc::new(host.open(*address)?),
    })
}

/// Functions of a described machine cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    /// The owner of one.
    #[error(transparent)]
    Owner(#[from] OwnerError),
    /// It has no address.
    #[error(transparent)]
    Address(#[from] BadAddress),
}

impl Owners {
    /// Takes them.
    pub(super) fn connect(sources: &[FunctionSource], host: &VfioHost) -> Result<Self, OwnerError> {
        sources.iter().map(|source| connect(source, host).map(known)).collect::<Result<_, _>>().map(Self)
    }

    /// Takes those of a described machine that the process before has claimed. Nothing is asked of them.
    pub(super) fn inherit(
        described: &[DeviceDescription],
        registry: &Arc<Registry>,
        host: &VfioHost,
    ) -> Result<Self, InheritError> {
        let inherit = |kind: &'static str| {
            let ours = described.iter().filter(move |device| device.kind == kind).enumerate();
            ours.map(move |(n, device)| {
                let instance = device.place.map_or(n as u32, |place| place.instance);
                let shelf = Function::shelf(registry, kind, instance);
                let owner: Arc<dyn Owner> = match kind {
                    VFIO => Arc::new(host.inherit(device.label.parse()?, &shelf).map_err(OwnerError::Vfio)?),
                    _ => Arc::new(VfioUser::inherit(Path::new(&device.label), &shelf)?),
                };
                Ok(known(owner))
            })
        };
        inherit(VFIO_USER).chain(inherit(VFIO)).collect::<Result<_, _>>().map(Self)
    }

    pub(super) fn describe(&self) -> impl Iterator<Item = DeviceDescription> + '_ {
        self.0.iter().map(|(owner, identity)| describe(&**owner, identity))
    }

    fn of(&self, kind: &str) -> impl Iterator<Item = &(Arc<dyn Owner>, FunctionIdentity)> {
        self.0.iter().filter(move |(owner, _)| owner.kind() == kind)
    }

    /// The `n`-th of that kind.
    pub(super) fn get(&self, kind: &str, n: usize) -> Option<&Arc<dyn Owner>> {
        self.of(kind).nth(n).map(|(owner, _)| owner)
    }

    /// What a described machine needs and these are not.
    pub(super) fn lacking(&self, described: &[DeviceDescription]) -> Vec<String> {
        [(VFIO_USER, "SOCKET"), (VFIO, "ADDRESS")]
            .into_iter()
            .flat_map(|(kind, place)| self.lacking_of(kind, place, described))
            .collect()
    }

    fn lacking_of(&self, kind: &str, place: &str, described: &[DeviceDescription]) -> Vec<String> {
        let mut reasons = Vec::new();
        let wanted: Vec<_> = described.iter().filter(|device| device.kind == kind).collect();
        let mut ours = self.of(kind);
        for (n, device) in wanted.iter().enumerate() {
            let label: String = device.label.chars().take(200).collect();
            let what = format!("{kind} device {n} ({label:?} at the source)");
            let Some((owner, here)) = ours.next() else {
                reasons.push(format!("{what}: give `receive` a --device {kind}={place} for it"));
                continue;
            };
            let at = owner.label();
            match FunctionIdentity::decode(device.config.as_slice()) {
                Ok(identity) => {
                    let lacking = identity.lacking(here).into_iter();
                    reasons.extend(lacking.map(|reason| format!("{what} at {at} with {reason}")));
                }
                Err(error) => reasons.push(format!("{what} whose description can be read ({error})")),
            }
        }
        for (owner, _) in ours {
            let at = owner.label();
            reasons.push(format!("a VM with a {kind} device more (it has {}, and {at} was given)", wanted.len()));
        }
        reasons
    }

    /// Why memory cannot follow a machine with these devices, if so.
    pub(super) fn cannot_follow(&self) -> Option<String> {
        let (owner, _) = self.0.iter().find(|(owner, _)| !owner.facts().faults)?;
        let why = match owner.facts().pins {
            true => "its memory is pinned, and has to be there",
            false => "no extension `userfaultfd`",
        };
        Some(format!("{} does not take part in postcopy ({why})", owner.name()))
    }

    /// Why memory may not be given back to the host, if so.
    pub(super) fn pinned(&self) -> Option<String> {
        let (owner, _) = self.0.first()?;
        Some(match owner.facts().pins {
            true => format!("{} has it pinned", owner.name()),
            false => format!("the process behind {} maps it, and may have pinned what it maps", owner.label()),
        })
    }
}

fn known(owner: Arc<dyn Owner>) -> (Arc<dyn Owner>, FunctionIdentity) {
    let identity = FunctionIdentity::of(owner.facts());
    (owner, identity)
}

/// A function that somebody else owns, on the bus of a machine.
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
        owner: Arc<dyn Owner>,
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

/// Describes a function that somebody else owns.
pub(super) fn describe(owner: &dyn Owner, identity: &FunctionIdentity) -> DeviceDescription {
    DeviceDescription {
        kind: owner.kind().into(),
        label: owner.label(),
        config: identity.encode_to_vec(),
        ..Default::default()
    }
}
