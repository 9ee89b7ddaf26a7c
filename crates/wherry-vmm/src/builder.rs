//! Makes the machine that a source describes, or says why this host cannot.
//!
//! Everything is compared before anything is made, and all reasons are given at once, by name. What is made is ready
//! to the last step before the state: slots, vCPUs and their threads, devices. RAM is not touched.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use wherry_fault::FaultService;
use wherry_handover::{KeptId, Registry};
use wherry_memory::{Block, BlockId, BlockSpec, PageSize, Ram};
use wherry_migration::machine::{
    BlockDescription, Builder, Machine, MachineDescription, Refusal, UnitDescription, Wants,
};
use wherry_migration::update::RAM;

use crate::cpu_model;
use crate::description::VmDescription;
use crate::layout;
use crate::vm::{Backing, DeviceConfig, Host, Vm, needs_scaling};

/// What a machine that arrives is connected to here.
#[derive(Clone, Debug)]
pub struct LocalConfig {
    /// Its devices' ends on this host.
    pub devices: DeviceConfig,
}

/// Builds machines that arrive.
#[derive(Debug)]
pub struct VmBuilder {
    local: LocalConfig,
    /// Weak: a machine whose journey fails must go when the engine lets go of it.
    built: Mutex<Weak<Vm>>,
}

impl VmBuilder {
    /// A builder for this host.
    pub fn new(local: LocalConfig) -> Self {
        Self { local, built: Mutex::default() }
    }

    /// The machine built last, the same one the engine was given, as long as the engine or its caller holds it.
    pub fn take_built(&self) -> Option<Arc<Vm>> {
        self.built.lock().unwrap_or_else(PoisonError::into_inner).upgrade()
    }

    /// Builds the machine.
    pub fn build_vm(&self, description: &MachineDescription, wants: Wants) -> Result<Arc<Vm>, Refusal> {
        self.build_from(description, Origin::Elsewhere(wants))
    }

    /// Builds the machine of the process that this one takes over from, with its RAM and all that it is connected to.
    pub(crate) fn take_over(
        &self,
        description: &MachineDescription,
        registry: &Arc<Registry>,
    ) -> Result<Arc<Vm>, Refusal> {
        self.build_from(description, Origin::Predecessor(registry))
    }

    fn build_from(&self, description: &MachineDescription, origin: Origin<'_>) -> Result<Arc<Vm>, Refusal> {
        let one = |reason: String| Refusal(vec![reason]);
        let host = Arc::new(Host::open().map_err(|e| one(e.to_string()))?);
        let vmm = VmDescription::from_bytes(&description.vmm).map_err(one)?;
        let mut reasons = Vec::new();
        let identity: [u8; 16] = description.vm.as_slice().try_into().unwrap_or_else(|_| {
            reasons.push(format!("a VM identity of 16 bytes (it has {})", description.vm.len()));
            [0; 16]
        });
        reasons.extend(lacking_host(&vmm, &host));
        let specs = blocks(&description.blocks, &mut reasons);
        if let (Some(specs), Origin::Elsewhere(_)) = (&specs, &origin) {
            reasons.extend(lacking_huge_pages(specs));
        }
        let registry = match origin {
            Origin::Elsewhere(_) => Registry::new(),
            Origin::Predecessor(registry) => registry.clone(),
        };
        let backing = Backing::open(self.local.devices.clone(), registry).and_then(|backing| match origin {
            Origin::Elsewhere(_) => backing.connect(),
            Origin::Predecessor(_) => backing.inherit(&vmm.devices),
        });
        let backing = match backing {
            Ok(backing) => {
                reasons.extend(backing.lacking(&vmm.devices));
                backing
            }
            Err(error) => {
                reasons.push(format!("what was given for its devices: {error}"));
                Backing::bare(&self.local.devices.serial)
            }
        };
        let Some(specs) = specs.filter(|_| reasons.is_empty()) else {
            return Err(Refusal(reasons));
        };
        let ram = match origin {
            Origin::Elsewhere(_) => Ram::create(&specs).map_err(|e| e.to_string()),
            Origin::Predecessor(registry) => adopt(&specs, registry),
        };
        let ram = Arc::new(ram.map_err(|e| one(format!("RAM as described: {e}")))?);
        let faults = match (origin, backing.cannot_follow()) {
            (Origin::Elsewhere(Wants { postcopy: true }), None) => fault_service(&ram),
            (Origin::Elsewhere(Wants { postcopy: true }), Some(why)) => Err(why),
            (Origin::Elsewhere(_), _) => Err("the machine was built without".into()),
            (Origin::Predecessor(_), _) => Err("it was taken over from another process, with all of its memory".into()),
        };
        let name = description.name.clone();
        let made = Vm::make(&host, ram, faults, vmm, identity, name, backing);
        let vm = made.map_err(|e| one(format!("the machine as described: {e}")))?.started_by_engine();
        let reasons = lacking_units(&description.units, &vm.units());
        if !reasons.is_empty() {
            return Err(Refusal(reasons));
        }
        let vm = Arc::new(vm);
        *self.built.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&vm);
        Ok(vm)
    }
}

/// Where a machine comes from.
#[derive(Clone, Copy)]
enum Origin<'a> {
    /// Another process, from which its memory is copied.
    Elsewhere(Wants),
    /// The process that this one takes over from.
    Predecessor(&'a Arc<Registry>),
}

/// RAM of the predecessor.
fn adopt(specs: &[BlockSpec], registry: &Registry) -> Result<Ram, String> {
    let block = |spec: &BlockSpec| {
        let fd = registry.inherit(&KeptId::new(RAM, spec.id.0.into())).map_err(|e| e.to_string())?;
        Block::adopt(*spec, fd).map_err(|e| e.to_string())
    };
    let blocks = specs.iter().map(block).collect::<Result<_, _>>()?;
    Ram::from_blocks(blocks).map_err(|e| e.to_string())
}

/// What of the host the machine needs and this one does not have.
fn lacking_host(vmm: &VmDescription, host: &Host) -> Vec<String> {
    let mut reasons = cpu_model::lacking(&vmm.cpuid, host);
    reasons.extend(lacking_msrs(vmm, host));
    if vmm.cpus > host.max_vcpus {
        reasons.push(format!("{} vCPUs (this host's KVM allows {})", vmm.cpus, host.max_vcpus));
    }
    if needs_scaling(host, vmm.tsc_khz) && !host.tsc_scaling {
        reasons
            .push(format!("a TSC of {} kHz (this host's has {} kHz and cannot be scaled)", vmm.tsc_khz, host.tsc_khz));
    }
    if !host.tsc_movable && (host.boot_id.is_empty() || vmm.boot_id != host.boot_id) {
        reasons.push("a guest TSC that can be moved against the host's (this host's KVM cannot)".into());
    }
    reasons
}

impl Builder for VmBuilder {
    fn build(&self, description: &MachineDescription, wants: Wants) -> Result<Arc<dyn Machine>, Refusal> {
        Ok(self.build_vm(description, wants)?)
    }

    fn runs(&self, _: &Arc<dyn Machine>) {
        // Whoever wants it before all of its memory is here calls `take_built`.
    }
}

/// Registers the guest maps, which nobody has touched, before KVM hears of them.
fn fault_service(ram: &Arc<Ram>) -> Result<Arc<FaultService>, String> {
    let faults = FaultService::new(ram.clone()).map_err(|e| e.to_string())?;
    faults.register_guest_maps().map_err(|e| e.to_string())?;
    Ok(faults)
}

/// Bits of feature MSRs that the guest sees and this host does not have.
fn lacking_msrs(vmm: &VmDescription, host: &Host) -> Vec<String> {
    let mut lacking = Vec::new();
    for msr in &vmm.feature_msrs {
        let here = host.feature_msr(msr.index).unwrap_or(0);
        let missing = msr.value & !here;
        if missing != 0 {
            let name = crate::vm::feature_msr_name(msr.index);
            lacking.push(format!(
                "bits {missing:#x} of MSR {name} (the guest sees {:#x}, this host has {here:#x})",
                msr.value
            ));
        }
    }
    lacking
}

/// The RAM blocks, if they are those of our layout.
fn blocks(described: &[BlockDescription], reasons: &mut Vec<String>) -> Option<Vec<BlockSpec>> {
    let size: Option<u64> = described.iter().try_fold(0u64, |sum, block| sum.checked_add(block.size));
    let page_size = match described.first().map(|block| block.page_size) {
        Some(4096) => PageSize::Base,
        Some(size) if size == PageSize::Huge2M.bytes() => PageSize::Huge2M,
        other => {
            reasons.push(format!("RAM with pages of {} bytes", other.unwrap_or(0)));
            return None;
        }
    };
    let size = size.filter(|size| *size <= crate::config::MAX_MEMORY);
    let Some(size) = size else {
        reasons.push(format!("more than {} bytes of RAM", crate::config::MAX_MEMORY));
        return None;
    };
    let ours = layout::ram_blocks(size, page_size);
    let same = |spec: &BlockSpec, block: &BlockDescription| {
        (BlockId(block.id as u16), block.id <= u16::MAX.into()) == (spec.id, true)
            && (block.guest_base, block.size, block.page_size) == (spec.guest_base, spec.size, spec.page_size.bytes())
    };
    if ours.len() != described.len() || !ours.iter().zip(described).all(|(spec, block)| same(spec, block)) {
        let list: Vec<_> = described.iter().map(|b| format!("{:#x}+{:#x}", b.guest_base, b.size)).take(8).collect();
        reasons.push(format!("RAM blocks at {} (another memory layout than ours)", list.join(", ")));
        return None;
    }
    Some(ours)
}

/// Whether there are enough free huge pages. Too few would only show when the guest touches one that is not there, and
/// then kill us.
fn lacking_huge_pages(specs: &[BlockSpec]) -> Option<String> {
    let wanted: u64 =
        specs.iter().filter(|s| s.page_size == PageSize::Huge2M).map(|s| s.size / PageSize::Huge2M.bytes()).sum();
    let free = crate::vm::free_huge_pages();
    (wanted > free)
        .then(|| format!("{wanted} free huge pages of 2 MiB (this host has {free}; see /proc/sys/vm/nr_hugepages)"))
}

/// Units or schemas that the source saves and we do not read.
fn lacking_units(described: &[UnitDescription], units: &wherry_state::Units) -> Vec<String> {
    let ours: std::collections::BTreeMap<_, _> = units.schemas().into_iter().collect();
    let mut reasons = Vec::new();
    for unit in described {
        let id = wherry_state::UnitId::new(unit.name.clone(), unit.instance);
        match ours.get(&id) {
            None => reasons.push(format!("a unit {id}")),
            Some(known) if unit.schema > *known => reasons.push(format!(
                "state of unit {id} in schema {} (this program reads 1 to {known}: use a newer Wherry here)",
                unit.schema
            )),
            Some(known) if unit.schema == 0 && *known > 0 => {
                reasons.push(format!("a unit {id} without state (ours needs some)"));
            }
            Some(_) => {}
        }
    }
    for (id, schema) in &ours {
        let there = described.iter().any(|u| u.name == id.name && u.instance == id.instance);
        if *schema > 0 && !there {
            reasons.push(format!("a machine without unit {id}"));
        }
    }
    reasons
}
