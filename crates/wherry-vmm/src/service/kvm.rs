//! The real machine and the real journey behind the service's traits.

use std::any::Any;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use wherry_migration::machine::{Builder, Machine, MachineDescription, Refusal, Wants};
use wherry_migration::progress::{Job, Phase};
use wherry_migration::update::UpdateError;
use wherry_migration::{
    DestinationOptions, EventKind, Journey, JourneyError, MAX_CHANNELS, Side, SourceOptions, destination, source,
};
use wherry_stream::{Endpoint, Listener};
use wherry_virtio::balloon::{BalloonError, BalloonStatus};

use super::guest::{
    self, Departure, DeviceLister, Engine, Exit, Guest, GuestError, Received, Replacement, Sent, Updated,
};
use super::{Service, ServiceError};
use crate::api::server::is_over;
use crate::api::types::{
    BalloonInfo, DeviceInfo, DeviceState, ErrorCode, GuestStatistics, Hardware, MigrationRequest, Mode, RamBlock,
    UpdateMode, UpdateRequest,
};
use crate::builder::{LocalConfig, VmBuilder};
use crate::config::{FunctionSource, MachineConfig};
use crate::update::{self, Hosting, ReplaceError, Replaced, TakenOver};
use crate::vm::{self, DeviceConfig, DeviceStatus, ExitReason, PlugError, UnplugError, Unplugging, Vm};

/// Builds a machine and loads its kernel. It does not run yet.
pub fn boot(config: &MachineConfig) -> Result<Box<dyn Guest>, GuestError> {
    Ok(Box::new(KvmGuest::new(Vm::boot(config.clone())?)))
}

/// A KVM machine in the service's hands. Dropping it ends its threads.
struct KvmGuest {
    vm: Arc<Vm>,
    /// Its end is our own doing and no news.
    ours: Arc<AtomicBool>,
}

impl KvmGuest {
    fn new(vm: Arc<Vm>) -> Self {
        Self { vm, ours: Arc::default() }
    }
}

impl Drop for KvmGuest {
    fn drop(&mut self) {
        self.ours.store(true, Ordering::SeqCst);
        self.vm.shutdown();
    }
}

impl Guest for KvmGuest {
    fn hardware(&self) -> Hardware {
        hardware(&self.vm)
    }

    fn pause(&mut self, limit: Duration) -> Result<(), GuestError> {
        Ok(self.vm.pause_within(limit)?)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        Ok(self.vm.resume()?)
    }

    fn is_paused(&self) -> bool {
        self.vm.is_paused()
    }

    fn balloon(&mut self, size: Option<u64>) -> Result<BalloonInfo, ServiceError> {
        let Some(balloon) = self.vm.devices().balloon() else {
            return Err(ServiceError {
                code: ErrorCode::WrongState,
                message: "the VM has no balloon; give it one at its start with `wherry run --balloon`".into(),
            });
        };
        let memory = self.vm.ram().size();
        if let Some(size) = size {
            let refused =
                |code, message| ServiceError { code, message: format!("setting the size to {size}: {message}") };
            let Some(bytes) = memory.checked_sub(size) else {
                return Err(refused(ErrorCode::BadRequest, format!("the VM has {memory} bytes of RAM")));
            };
            balloon.set_wanted(bytes).map_err(|error| match error {
                BalloonError::Size { .. } => refused(ErrorCode::BadRequest, error.to_string()),
                BalloonError::Pinned(_) => refused(ErrorCode::WrongState, error.to_string()),
            })?;
        }
        let BalloonStatus { wanted, actual, statistics } = balloon.status();
        let statistics = GuestStatistics {
            swap_in: statistics.swap_in,
            swap_out: statistics.swap_out,
            major_faults: statistics.major_faults,
            minor_faults: statistics.minor_faults,
            free: statistics.free,
            total: statistics.total,
            available: statistics.available,
            caches: statistics.caches,
        };
        let without = |bytes| memory.saturating_sub(bytes);
        Ok(BalloonInfo { memory, size: without(wanted), actual: without(actual), statistics })
    }

    fn devices(&self) -> DeviceLister {
        let list = self.vm.device_lister();
        Arc::new(move || list().iter().map(device_info).collect())
    }

    fn plug(&mut self, device: &str) -> Result<DeviceInfo, ServiceError> {
        let refused = |code, message| ServiceError { code, message: format!("plugging {device}: {message}") };
        let source: FunctionSource = device.parse().map_err(|why| {
            let only = "only functions that somebody else owns can be plugged into a VM that runs";
            refused(ErrorCode::BadRequest, format!("{why} ({only})"))
        })?;
        let plugged = self.vm.plug(&source).map_err(|error| match error {
            PlugError::Owner(_) | PlugError::Function(_) | PlugError::Units(_) | PlugError::Start(_) => {
                refused(ErrorCode::Failed, error.to_string())
            }
            _ => refused(ErrorCode::WrongState, error.to_string()),
        })?;
        Ok(device_info(&plugged))
    }

    fn unplug(&mut self, name: &str) -> Result<Box<dyn guest::Unplugging>, ServiceError> {
        let unplugging = self.vm.unplug(name).map_err(unplug_error)?;
        Ok(Box::new(KvmUnplugging(unplugging)))
    }

    fn on_exit(&self, notify: Box<dyn FnOnce(Exit) + Send>) {
        let ours = self.ours.clone();
        self.vm.on_exit(move |reason| {
            let exit = match reason {
                _ if ours.load(Ordering::SeqCst) => return,
                ExitReason::PowerOff => Exit::PowerOff,
                ExitReason::Reset => Exit::Reset,
                ExitReason::ApiStop => Exit::Quit,
                ExitReason::Crash(crash) => Exit::Crash(crash.to_string()),
                ExitReason::Error(error) => Exit::Crash(error.clone()),
            };
            notify(exit);
        });
    }
}

struct KvmUnplugging(Unplugging);

impl guest::Unplugging for KvmUnplugging {
    fn wait(self: Box<Self>, limit: Duration) -> Result<DeviceInfo, ServiceError> {
        self.0.wait(limit).map(|device| device_info(&device)).map_err(unplug_error)
    }
}

fn unplug_error(error: UnplugError) -> ServiceError {
    let code = match &error {
        UnplugError::Unknown { .. } => ErrorCode::NotFound,
        UnplugError::NotAnswered { .. } | UnplugError::Leaving(_) => ErrorCode::Deadline,
        _ => ErrorCode::WrongState,
    };
    ServiceError { code, message: format!("unplugging: {error}") }
}

fn device_info(device: &DeviceStatus) -> DeviceInfo {
    DeviceInfo {
        number: device.number,
        name: device.name.clone(),
        kind: device.kind.clone(),
        address: device.address.to_string(),
        connected_to: device.label.clone(),
        state: match device.state {
            vm::DeviceState::Present => DeviceState::Present,
            vm::DeviceState::Unplugging => DeviceState::Unplugging,
            vm::DeviceState::Ejected => DeviceState::Ejected,
        },
        removable: device.removable,
    }
}

fn hardware(vm: &Vm) -> Hardware {
    let blocks = vm.ram().blocks().iter().map(|block| {
        let spec = block.spec();
        RamBlock {
            id: spec.id.0.into(),
            guest_base: spec.guest_base,
            size: spec.size,
            page_size: spec.page_size.bytes(),
            fd: block.fd().as_raw_fd(),
        }
    });
    Hardware {
        id: vm.identity().iter().map(|byte| format!("{byte:02x}")).collect(),
        name: vm.name().to_owned(),
        cpus: vm.cpus(),
        cpu_model: vm.cpu_model().to_owned(),
        memory: vm.ram().size(),
        blocks: blocks.collect(),
    }
}

/// The engine's handle as the service sees it.
struct Handle {
    journey: Journey,
    phases: Arc<Mutex<Vec<Phase>>>,
}

impl Handle {
    /// Listens to a journey from now on.
    fn new(journey: &Journey) -> Arc<Self> {
        let handle = Self { journey: journey.clone(), phases: Arc::new(Mutex::new(vec![journey.job().phase])) };
        let (events, phases) = (journey.subscribe(), handle.phases.clone());
        super::state::aside("phases", move || {
            // Ends with the journey: its last phase, or its last handle.
            for event in events {
                if event.kind == EventKind::Phase {
                    let phase = event.job.phase;
                    let mut phases = phases.lock().unwrap_or_else(PoisonError::into_inner);
                    if phases.last() != Some(&phase) {
                        phases.push(phase);
                    }
                    if is_over(phase) {
                        break;
                    }
                }
            }
        });
        Arc::new(handle)
    }
}

impl guest::Journey for Handle {
    fn job(&self) -> Job {
        self.journey.job()
    }

    fn phases(&self) -> Vec<Phase> {
        self.phases.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn cancel(&self) -> Result<(), String> {
        match self.journey.cancel() {
            true => Ok(()),
            false => Err("it is too late: the VM has been given away, or the journey has ended".into()),
        }
    }

    fn resolve(&self, side: Side) -> Result<(), String> {
        match self.journey.resolve(side) {
            true => Ok(()),
            false => Err("it is not in doubt (any more); look at its status".into()),
        }
    }

    fn switch(&self) -> Result<(), String> {
        self.journey.switch_to_postcopy().map_err(str::to_owned)
    }

    fn recover(&self, to: Option<Endpoint>) -> Result<(), String> {
        follows(self.journey.recover(to))
    }

    fn recover_at(&self, listen: &Endpoint) -> Result<(), String> {
        let listener = Listener::bind(listen).map_err(|e| e.to_string())?;
        follows(self.journey.recover_at(listener))
    }

    fn vm_ended(&self, why: &str) {
        self.journey.vm_ended(why);
    }
}

fn follows(taken: bool) -> Result<(), String> {
    if taken { Ok(()) } else { Err("no memory follows a VM (any more); look at its status".into()) }
}

/// Starts outgoing journeys of KVM machines.
#[derive(Default)]
pub struct KvmEngine {
    /// What this process has beside its machine; without, it cannot be replaced.
    pub hosting: Option<Arc<Hosting>>,
}

impl Engine for KvmEngine {
    fn depart(&self, request: &MigrationRequest) -> Result<Box<dyn Departure>, String> {
        let to: Endpoint = request.to.parse().map_err(|e| format!("migrating: {e}"))?;
        let mut options =
            SourceOptions { verify: request.verify, release: request.release, ..SourceOptions::default() };
        options.mode = match request.mode {
            Mode::Precopy => wherry_migration::Mode::Precopy,
            Mode::Postcopy => wherry_migration::Mode::Postcopy,
            Mode::Hybrid => wherry_migration::Mode::Hybrid,
        };
        options.channels = match request.channels {
            None => None,
            Some(n @ 1..) if n <= u32::from(MAX_CHANNELS) => Some(n as u16),
            Some(n) => return Err(format!("migrating: {n} data channels; there are 1 to {MAX_CHANNELS}")),
        };
        options.bandwidth = positive("bandwidth", request.bandwidth)?;
        if let Some(ms) = positive("downtime_limit_ms", request.downtime_limit_ms)? {
            options.downtime_limit = Duration::from_millis(ms);
        }
        if let Some(seconds) = positive("timeout_s", request.timeout_s)? {
            options.deadline = Duration::from_secs(seconds);
        }
        Ok(Box::new(KvmDeparture { to, options, journey: Journey::new() }))
    }

    fn update(&self, request: &UpdateRequest) -> Result<Box<dyn Replacement>, String> {
        let hosting = self.hosting.clone().ok_or("updating: this program cannot be replaced")?;
        let binary = request.binary.as_ref().map_or_else(|| hosting.program.clone(), PathBuf::from);
        if !binary.is_absolute() {
            return Err(format!("updating: {} is no absolute path", binary.display()));
        }
        Ok(Box::new(KvmReplacement { hosting, binary, mode: request.mode, journey: Journey::new() }))
    }
}

struct KvmReplacement {
    hosting: Arc<Hosting>,
    binary: PathBuf,
    mode: UpdateMode,
    journey: Journey,
}

impl Replacement for KvmReplacement {
    fn journey(&self) -> Arc<dyn guest::Journey> {
        Handle::new(&self.journey)
    }

    fn run(self: Box<Self>, guest: Box<dyn Guest>, hold: &dyn Fn(bool)) -> Updated {
        let any: &dyn Any = &*guest;
        let Some(machine) = any.downcast_ref::<KvmGuest>().map(|g| g.vm.clone()) else {
            let why = "this machine is not one of KVM".into();
            return Updated::Kept { guest, why, refused: true };
        };
        // What is described at first is what goes over.
        let held = machine.hold_devices();
        match update::replace(&self.hosting, machine.clone(), &self.binary, self.mode, hold, &self.journey) {
            Ok(Replaced { pid, job }) => {
                // Ends with the process. Dropping it would take from the new one what is in use there.
                std::mem::forget((guest, machine, held));
                Updated::Replaced { pid, trouble: job.error }
            }
            Err(error) => match error {
                ReplaceError::Update(UpdateError::Stuck { .. } | UpdateError::Lost(_)) => {
                    // What it has may be the new one's.
                    std::mem::forget((guest, machine, held));
                    Updated::Lost { why: error.to_string() }
                }
                error => {
                    let refused = error.is_refusal();
                    Updated::Kept { guest, why: error.to_string(), refused }
                }
            },
        }
    }
}

/// A journey as the service sees it.
pub fn view(journey: &Journey) -> Arc<dyn guest::Journey> {
    Handle::new(journey)
}

/// A machine that this process has taken over, in the service's hands.
pub fn taken_over(taken: &TakenOver) -> Box<dyn Guest> {
    Box::new(KvmGuest::new(taken.vm.clone()))
}

fn positive(name: &str, value: Option<u64>) -> Result<Option<u64>, String> {
    match value {
        Some(0) => Err(format!("migrating: {name} must be more than 0; leave it out for the default")),
        value => Ok(value),
    }
}

struct KvmDeparture {
    to: Endpoint,
    options: SourceOptions,
    journey: Journey,
}

impl Departure for KvmDeparture {
    fn journey(&self) -> Arc<dyn guest::Journey> {
        Handle::new(&self.journey)
    }

    fn run(self: Box<Self>, guest: Box<dyn Guest>) -> Sent {
        let any: &dyn Any = &*guest;
        let Some(machine) = any.downcast_ref::<KvmGuest>().map(|g| g.vm.clone()) else {
            // Provably impossible: whoever starts a `KvmEngine` boots and receives with this module.
            tracing::error!("this machine is not one of KVM; it stays here");
            return Sent::Kept(guest);
        };
        // What is described at the handshake is what is carried.
        let held = machine.hold_devices();
        match source::send(machine.clone(), &self.to, self.options, &self.journey) {
            Ok(_) => {
                machine.leave();
                drop((machine, held));
                // Giving back the RAM takes its time; nobody is to wait for it.
                super::state::aside("free", move || drop(guest));
                Sent::Gone
            }
            Err(JourneyError::RunsHere(_) | JourneyError::Cancelled | JourneyError::Refused(_)) => Sent::Kept(guest),
            // Its memory is what the destination lacks: it is kept as in doubt.
            Err(error @ (JourneyError::InDoubt(_) | JourneyError::Paused(_))) => {
                Sent::Lost { why: error.to_string(), in_doubt: true }
            }
            Err(JourneyError::Lost(cause)) => Sent::Lost { why: cause.to_string(), in_doubt: false },
            Err(error @ (JourneyError::Stuck { .. } | JourneyError::NotHere(_))) => {
                Sent::Lost { why: error.to_string(), in_doubt: false }
            }
        }
    }
}

/// A place where a VM arrives.
#[derive(Debug)]
pub struct Arrival {
    listener: Listener,
    local: LocalConfig,
}

impl Arrival {
    /// Listens at an address; the devices of the VM that arrives there will be connected so.
    pub fn listen(address: &str, devices: DeviceConfig) -> Result<Self, GuestError> {
        let endpoint: Endpoint = address.parse()?;
        let listener = Listener::bind(&endpoint)?;
        Ok(Self { listener, local: LocalConfig { devices } })
    }

    /// Where it listens, with the port that was chosen.
    pub fn address(&self) -> String {
        self.listener.local_endpoint().to_string()
    }

    /// Receives until a VM has arrived, or the process ends; with `once` the first attempt decides.
    pub fn receive(self, service: &Arc<Service>, once: bool) {
        loop {
            let journey = Journey::new();
            let builder = Announcing {
                builder: VmBuilder::new(self.local.clone()),
                service,
                journey: &journey,
                runs: AtomicBool::new(false),
            };
            let received = match destination::receive(&self.listener, &builder, DestinationOptions::default(), &journey)
            {
                Ok((_, job)) => match builder.builder.take_built() {
                    Some(vm) if builder.runs.load(Ordering::SeqCst) => {
                        vm.has_arrived();
                        Received::Whole
                    }
                    None if builder.runs.load(Ordering::SeqCst) => Received::Whole,
                    Some(vm) => {
                        vm.has_arrived();
                        tracing::info!(from = job.peer, "a VM has arrived");
                        Received::Arrived(Box::new(KvmGuest::new(vm)))
                    }
                    None => Received::Lost { why: "the machine that was built has vanished".into(), in_doubt: false },
                },
                Err(error @ (JourneyError::InDoubt(_) | JourneyError::Paused(_))) => {
                    Received::Lost { why: error.to_string(), in_doubt: true }
                }
                Err(JourneyError::Lost(cause)) => Received::Lost { why: cause.to_string(), in_doubt: false },
                Err(error) if builder.runs.load(Ordering::SeqCst) => {
                    Received::Lost { why: error.to_string(), in_doubt: false }
                }
                Err(error) => {
                    drop(builder.builder.take_built());
                    Received::Refused(error.to_string())
                }
            };
            if !service.arrival(received, once) {
                return;
            }
        }
    }
}

/// Tells the service of the machine as soon as it is built.
struct Announcing<'a> {
    builder: VmBuilder,
    service: &'a Arc<Service>,
    journey: &'a Journey,
    /// The VM runs and has been handed over to the service.
    runs: AtomicBool,
}

impl Builder for Announcing<'_> {
    fn build(&self, description: &MachineDescription, wants: Wants) -> Result<Arc<dyn Machine>, Refusal> {
        self.service.arriving(Handle::new(self.journey));
        let vm = self.builder.build_vm(description, wants)?;
        self.service.built(hardware(&vm));
        Ok(vm)
    }

    fn runs(&self, _: &Arc<dyn Machine>) {
        if let Some(vm) = self.builder.take_built() {
            tracing::info!(from = self.journey.job().peer, "a VM has arrived, and its memory follows");
            self.runs.store(true, Ordering::SeqCst);
            self.service.runs(Box::new(KvmGuest::new(vm)));
        }
    }
}
