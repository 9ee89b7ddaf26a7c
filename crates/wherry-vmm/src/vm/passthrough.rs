//! Functions that other processes own: found at their sockets, described, compared, and put on the bus.

use std::path::PathBuf;
use std::sync::Arc;

use prost::Message;
use wherry_memory::DirtySource;
use wherry_passthrough::{
    Crew, Function, FunctionIdentity, Gathering, Owner, OwnerError, PassthroughError, PassthroughParts, VfioUser,
};
use wherry_state::{StateStream, StateUnit};

use super::VmError;
use crate::description::DeviceDescription;
use crate::pci::{PciError, PciRoot};

/// Name in a description.
pub(super) const VFIO_USER: &str = "vfio-user";

/// Device processes of one machine, and what their functions are.
#[derive(Debug, Default)]
pub(super) struct Owners(Vec<(Arc<VfioUser>, FunctionIdentity)>);

impl Owners {
    /// Connects to them. Nothing of a function is changed.
    pub(super) fn connect(sockets: &[PathBuf]) -> Result<Self, OwnerError> {
        let connect = |socket: &PathBuf| {
            let owner = VfioUser::connect(socket)?;
            let identity = FunctionIdentity::of(&owner)?;
            Ok((Arc::new(owner), identity))
        };
        sockets.iter().map(connect).collect::<Result<_, _>>().map(Self)
    }

    pub(super) fn describe(&self) -> impl Iterator<Item = DeviceDescription> + '_ {
        self.0.iter().map(|(owner, identity)| DeviceDescription {
            kind: VFIO_USER.into(),
            label: owner.socket().display().to_string(),
            config: identity.encode_to_vec(),
            ..Default::default()
        })
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

/// The functions of a machine that other processes own.
pub(super) struct Functions {
    crew: Arc<Crew>,
    functions: Vec<Arc<Function>>,
    gathering: Option<Arc<Gathering>>,
}

#[derive(Debug, thiserror::Error)]
enum MakeError {
    #[error(transparent)]
    Function(#[from] PassthroughError),
    #[error(transparent)]
    Pci(PciError),
}

impl Functions {
    pub(super) fn new(crew: Arc<Crew>) -> Self {
        Self { crew, functions: Vec::new(), gathering: None }
    }

    /// Makes the next one of a description, with the parts of its place on the bus.
    pub(super) fn add(
        &mut self,
        owners: &Owners,
        pci: &PciRoot,
        parts: impl FnOnce(u8) -> PassthroughParts,
    ) -> Result<(), VmError> {
        let failed = |e: MakeError| VmError::Device(e.into());
        let instance = self.functions.len();
        let (owner, _) = owners.0.get(instance).ok_or_else(|| VmError::Lacks(vec!["a vfio-user device".into()]))?;
        let address = pci.free_device().map_err(|e| failed(MakeError::Pci(e)))?;
        let place = |config: &mut _| pci.assign_bars(config).map_err(MakeError::Pci);
        let function =
            Function::new(owner.clone(), instance as u32, &parts(address.device()), place).map_err(failed)?;
        pci.add(address, function.clone()).map_err(|e| failed(MakeError::Pci(e)))?;
        self.functions.push(function);
        self.gathering.get_or_insert_with(|| Arc::new(Gathering::new(self.crew.clone())));
        Ok(())
    }

    /// What they write.
    pub(super) fn logs(&self) -> impl Iterator<Item = Arc<dyn DirtySource>> + '_ {
        self.functions.iter().map(|function| function.log().clone() as Arc<dyn DirtySource>)
    }

    /// Those whose state goes in streams: all of them.
    pub(super) fn streams(&self) -> Vec<Arc<dyn StateStream>> {
        self.functions.iter().map(|function| function.clone() as Arc<dyn StateStream>).collect()
    }

    pub(super) fn units(&self) -> impl Iterator<Item = Arc<dyn StateUnit>> + '_ {
        let gathering = self.gathering.iter().map(|unit| unit.clone() as Arc<dyn StateUnit>);
        self.functions.iter().map(|function| function.clone() as Arc<dyn StateUnit>).chain(gathering)
    }

    /// Why the machine cannot be moved, if so.
    pub(super) fn blockers(&self) -> Vec<String> {
        self.functions.iter().filter_map(|function| function.blocker()).collect()
    }
}
