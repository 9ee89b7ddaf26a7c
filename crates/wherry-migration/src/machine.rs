//! What a VMM gives to the engine: its machine at the source, and a builder of machines at the destination.

use std::sync::Arc;

use wherry_fault::FaultService;
use wherry_memory::{BlockId, DirtySource, FreePages, Ram};
use wherry_state::{StateStream, Units};

/// Everything a destination must know to build the same machine, sent in the handshake before any page.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MachineDescription {
    /// Identity of the VM: 16 random bytes chosen when it was first started. Ownership is per identity.
    #[prost(bytes = "vec", tag = "1")]
    pub vm: Vec<u8>,
    /// Name given by the user.
    #[prost(string, tag = "2")]
    pub name: String,
    /// RAM blocks.
    #[prost(message, repeated, tag = "3")]
    pub blocks: Vec<BlockDescription>,
    /// State units and the schema each will be saved with.
    #[prost(message, repeated, tag = "4")]
    pub units: Vec<UnitDescription>,
    /// The VMM's own description (vCPU count, CPU features, devices), opaque to the engine.
    #[prost(bytes = "vec", tag = "5")]
    pub vmm: Vec<u8>,
    /// Name and version of the program that wrote this, for messages.
    #[prost(string, tag = "6")]
    pub program: String,
}

/// One RAM block.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct BlockDescription {
    /// Its number.
    #[prost(uint32, tag = "1")]
    pub id: u32,
    /// Guest physical base address.
    #[prost(uint64, tag = "2")]
    pub guest_base: u64,
    /// Size in bytes.
    #[prost(uint64, tag = "3")]
    pub size: u64,
    /// Page size in bytes.
    #[prost(uint64, tag = "4")]
    pub page_size: u64,
}

/// One state unit.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct UnitDescription {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Which one of that name.
    #[prost(uint32, tag = "2")]
    pub instance: u32,
    /// Schema it is saved with; 0 if it saves nothing.
    #[prost(uint32, tag = "3")]
    pub schema: u32,
}

/// The destination cannot run the machine. The text names every reason: what is lacking and what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("; "))]
pub struct Refusal(pub Vec<String>);

/// A problem inside the VMM while the engine used it.
pub type MachineError = Box<dyn std::error::Error + Send + Sync>;

/// The thread of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuThread {
    /// Number of the vCPU.
    pub index: u32,
    /// Number of the thread, as the kernel has it (`gettid`).
    pub thread: u32,
}

/// A machine, at either end. At the source it runs when the journey begins. At the destination it was built, with all
/// slots, vCPUs and devices made and its set-up run once, but neither restored nor started.
pub trait Machine: Send + Sync {
    /// What a destination must know.
    fn description(&self) -> MachineDescription;

    /// Its RAM.
    fn ram(&self) -> &Arc<Ram>;

    /// Its state units; the same ones for as long as a journey lasts. The engine drains, stops, saves, restores and starts
    /// through them. In a switchover it does so on a thread whose nice value is -20 where that is allowed; threads that a
    /// unit makes in `start` would inherit it, so make them earlier or set theirs.
    fn units(&self) -> Arc<Units>;

    /// Those of its units whose state goes in a stream, some of it while the machine runs.
    fn streams(&self) -> Vec<Arc<dyn StateStream>>;

    /// Everyone who knows what was written in RAM: KVM's log, the VMM itself, devices. The same ones for as long as a journey
    /// lasts.
    fn dirty_sources(&self) -> Arc<[Arc<dyn DirtySource>]>;

    /// Who knows which pages its guest does not use, and gives memory back, if there is one.
    fn free_pages(&self) -> Option<Arc<dyn FreePages>>;

    /// Serves the faults on its guest maps, which were registered when they were made, if the builder was asked for that
    /// ([`Wants::postcopy`]); otherwise why there is none.
    fn faults(&self) -> Result<&Arc<FaultService>, String>;

    /// Pages (block and granule) that the vCPUs will touch first when they run again, as far as can be told. Asked at rest,
    /// before a postcopy: they go before the switch.
    fn hot_pages(&self) -> Vec<(BlockId, u64)>;

    /// The threads of its vCPUs that have begun, so that faults can be told by vCPU.
    fn vcpu_threads(&self) -> Vec<VcpuThread>;

    /// Why it cannot be moved, each with the device and what would lift it; empty if it can. Asked before anything begins.
    fn blockers(&self) -> Vec<String>;

    /// Takes `percent` (0 to 99) of their time away from the vCPUs; 0 ends it.
    fn throttle(&self, percent: u8);

    /// Takes the locks on disk images and whatever else only one owner may hold. Called at the destination after the
    /// source gave the VM away, before the units are started; if it fails, the VM is not started.
    fn take_locks(&self) -> Result<(), MachineError>;

    /// Gives those locks back. Called at the source at rest before it gives the VM away; undone by `take_locks`.
    fn release_locks(&self) -> Result<(), MachineError>;

    /// Whether the vCPUs are to run when the units are started. A VM that the user has paused moves paused.
    fn runs_after_start(&self) -> bool;
}

/// What a machine that is built must be able to do beyond its description.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wants {
    /// Pages may follow the switch: its guest maps are registered with userfaultfd before anything else knows them. A
    /// host that cannot do that builds the machine all the same, and [`Machine::faults`] says why.
    pub postcopy: bool,
}

/// Builds the machine that a description asks for.
pub trait Builder: Send + Sync {
    /// Compares the description with what this host can run, and builds the machine. Everything that is lacking is
    /// refused by name here, before a byte of memory moves.
    fn build(&self, description: &MachineDescription, wants: Wants) -> Result<Arc<dyn Machine>, Refusal>;

    /// The VM runs on this machine, and memory still follows: it may be paused and ended from now on, while the engine
    /// works on. Whoever ends it says so with [`Journey::vm_ended`](crate::Journey::vm_ended). Called once, in
    /// [`Phase::Postcopy`](crate::progress::Phase::Postcopy); a VM that is whole comes from
    /// [`receive`](crate::destination::receive).
    fn runs(&self, machine: &Arc<dyn Machine>);
}

impl MachineDescription {
    /// Describes the part the engine knows of; the caller adds identity, name and its own part.
    pub fn of(ram: &Ram, units: &Units) -> Self {
        let blocks = ram.blocks().iter().map(|block| {
            let spec = block.spec();
            BlockDescription {
                id: spec.id.0.into(),
                guest_base: spec.guest_base,
                size: spec.size,
                page_size: spec.page_size.bytes(),
            }
        });
        let units = units.schemas().into_iter().map(|(id, schema)| UnitDescription {
            name: id.name,
            instance: id.instance,
            schema,
        });
        Self {
            blocks: blocks.collect(),
            units: units.collect(),
            program: concat!("wherry ", env!("CARGO_PKG_VERSION")).into(),
            ..Self::default()
        }
    }
}
