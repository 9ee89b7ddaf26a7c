//! The device as the journey of an update sees it: a machine without memory, with one unit, its server.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use wherry_fault::FaultService;
use wherry_handover::{KeptId, Registry, Rest, Rested};
use wherry_memory::{BlockId, DirtySource, FreePages, Ram};
use wherry_migration::machine::{Machine, MachineDescription, MachineError, VcpuThread};
use wherry_migration::update::Keep;
use wherry_state::{Saved, Section, StateError, StateStream, StateUnit, UnitError, UnitId, Units};

/// What the names of a client's descriptors begin with.
const CLIENT: &str = "client/";
/// How long taking a state may take: a step of the device's, and maps of a client's memory.
const TAKE: Duration = Duration::from_secs(10);

/// What a server writes of itself: the name of its state unit, and the newest schema.
#[derive(Clone, Copy, Debug)]
pub struct Unit {
    pub name: &'static str,
    pub schema: u32,
}

/// The device.
pub struct DeviceMachine {
    ram: Arc<Ram>,
    units: Arc<Units>,
    unit: Arc<ServerUnit>,
}

impl DeviceMachine {
    /// Over the server that is this unit, and comes to rest by this.
    pub fn new(unit: Unit, rest: Rest, registry: Arc<Registry>) -> Result<Arc<Self>> {
        let unit = Arc::new(ServerUnit { unit, rest, registry, inner: Mutex::default() });
        let units = Arc::new(Units::new(vec![unit.clone()])?);
        let ram = Arc::new(Ram::from_blocks(Vec::new()).context("making a machine without memory")?);
        Ok(Arc::new(Self { ram, units, unit }))
    }
}

impl Machine for DeviceMachine {
    fn description(&self) -> MachineDescription {
        MachineDescription { name: "device".into(), ..MachineDescription::of(&self.ram, &self.units) }
    }

    fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    fn units(&self) -> Arc<Units> {
        self.units.clone()
    }

    fn streams(&self) -> Vec<Arc<dyn StateStream>> {
        Vec::new()
    }

    fn dirty_sources(&self) -> Arc<[Arc<dyn DirtySource>]> {
        Arc::new([])
    }

    fn free_pages(&self) -> Option<Arc<dyn FreePages>> {
        None
    }

    fn faults(&self) -> Result<&Arc<FaultService>, String> {
        Err("a device has no memory of its own".into())
    }

    fn hot_pages(&self) -> Vec<(BlockId, u64)> {
        Vec::new()
    }

    fn vcpu_threads(&self) -> Vec<VcpuThread> {
        Vec::new()
    }

    fn blockers(&self) -> Vec<String> {
        vec!["a device moves with the VM that uses it".into()]
    }

    fn throttle(&self, _percent: u8) {}

    fn take_locks(&self) -> Result<(), MachineError> {
        Ok(())
    }

    fn release_locks(&self) -> Result<(), MachineError> {
        Ok(())
    }

    fn runs_after_start(&self) -> bool {
        true
    }
}

impl Keep for DeviceMachine {
    fn registry(&self) -> &Arc<Registry> {
        &self.unit.registry
    }

    fn cannot_keep(&self) -> Vec<String> {
        self.unit.rest.obstacle().into_iter().collect()
    }
}

/// What is at rest.
#[derive(Default)]
struct Inner {
    state: Vec<u8>,
    /// Copies of a client's descriptors, which go over as long as they are here.
    copies: Vec<Arc<OwnedFd>>,
}

/// The server, with its device and its client.
struct ServerUnit {
    unit: Unit,
    rest: Rest,
    registry: Arc<Registry>,
    inner: Mutex<Inner>,
}

impl ServerUnit {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, rested: Rested) -> Result<(), UnitError> {
        let mut inner = self.inner();
        for descriptor in rested.descriptors {
            let id = KeptId::new(format!("{CLIENT}{}", descriptor.name), descriptor.index);
            inner.copies.push(self.registry.add(id, descriptor.fd).map_err(UnitError::failed)?);
        }
        inner.state = rested.state;
        Ok(())
    }
}

impl StateUnit for ServerUnit {
    fn id(&self) -> UnitId {
        UnitId::new(self.unit.name, 0)
    }

    fn depends_on(&self) -> &[&str] {
        &[]
    }

    fn schema(&self) -> u32 {
        self.unit.schema
    }

    /// What is under way goes over as it is.
    fn drain(&self, _deadline: Instant) -> Result<(), UnitError> {
        Ok(())
    }

    fn undrain(&self) -> Result<(), UnitError> {
        Ok(())
    }

    fn begin_stop(&self) -> Result<(), UnitError> {
        self.rest.begin();
        Ok(())
    }

    fn finish_stop(&self, deadline: Instant) -> Result<(), UnitError> {
        let rested = self.rest.wait(deadline).map_err(UnitError::failed)?;
        self.keep(rested)
    }

    fn save(&self) -> Result<Saved, UnitError> {
        let UnitId { name, instance } = self.id();
        let bytes = std::mem::take(&mut self.inner().state);
        Ok(Saved::Section(Section { unit: name, instance, schema: self.unit.schema, bytes }))
    }

    fn restore(&self, section: &Section) -> Result<(), UnitError> {
        let known = self.unit.schema;
        if !(1..=known).contains(&section.schema) {
            return Err(StateError::Schema { unit: section.id(), found: section.schema, known }.into());
        }
        let registry = self.registry.clone();
        let claim = move |name: &str, index| registry.claim(&KeptId::new(format!("{CLIENT}{name}"), index));
        let taken = self.rest.take(section.bytes.clone(), Box::new(claim), Instant::now() + TAKE);
        taken.map_err(UnitError::failed)
    }

    fn start(&self) -> Result<(), UnitError> {
        *self.inner() = Inner::default();
        self.rest.go_on();
        Ok(())
    }
}
