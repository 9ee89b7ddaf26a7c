//! A machine: KVM's part, RAM, devices and state units, put together and driven.
//!
//! - [`Host`]: what this host's KVM can do.
//! - [`Vm`]: the machine. [`Vm::boot`] makes a new one; [`VmBuilder`](crate::builder::VmBuilder) makes one that arrives.
//! - [`ExitNotice`]: how its end is told.
//!
//! A machine runs while nothing holds its vCPUs: neither the user (`pause`, `resume`) nor the engine (its state units)
//! nor its end. The three do not know of each other, so a migration of a paused machine leaves it paused, at either end.
//!
//! Order of the end: threads first, then devices, then KVM's descriptors, then RAM. `Vm`'s fields are in that order.

mod assemble;
mod devices;
mod error;
mod exit;
mod files;
mod host;
mod hotplug;
pub(crate) mod ioctl;
mod passthrough;
mod router;
mod slot;
mod virtio;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::VmFd;
use prost::Message;
use wherry_fault::FaultService;
use wherry_handover::Registry;
use wherry_memory::{BlockId, DirtySource, FreePages, GRANULE, PageSize, Ram, VmmWrites};
use wherry_migration::machine::{Machine, MachineDescription, MachineError, VcpuThread};
use wherry_migration::update::Keep;
use wherry_state::{StateStream, StateUnit, Units};

pub(crate) use assemble::needs_scaling;
pub use devices::DeviceConfig;
pub use error::VmError;
pub use exit::{Crash, ExitNotice, ExitReason};
pub use host::Host;
pub(crate) use host::{feature_msr_name, free_huge_pages};
pub use hotplug::{DeviceState, DeviceStatus, Held, PlugError, UnplugError, Unplugging};
pub(crate) use slot::MemorySlot;
pub(crate) use virtio::Backing;

use self::assemble::assemble;
use self::devices::Devices;
use self::hotplug::{Board, Fixed, Hotplug};
use self::virtio::Shown;
use crate::boot::{self, Entry, KernelSource, entry_state};
use crate::config::{FunctionSource, Kernel, MachineConfig};
use crate::cpu_model;
use crate::description::{FeatureMsr, VERSION, VmDescription};
use crate::dirty_log::KvmDirtyLog;
use crate::layout;
use crate::units::clock::ClockUnit;
use crate::units::irqchip::IrqchipUnit;
use crate::units::pit::PitUnit;
use crate::units::vcpu::VcpuUnit;
use crate::vcpu::{Hold, Throttle, Vcpu, VcpuSet};

/// How long vCPUs have to come to rest when the user pauses.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);
/// How long the vCPUs of a machine that is ended may wait for pages.
const FAULT_LIMIT: Duration = Duration::from_secs(1);

/// What a machine does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmState {
    /// Its vCPUs are in the guest.
    Running,
    /// The user has paused it.
    Paused,
    /// It was not started yet, or the engine has stopped it.
    Stopped,
    /// It has ended.
    Ended(ExitReason),
}

/// A machine.
pub struct Vm {
    throttle: Throttle,
    vcpus: Arc<VcpuSet>,
    /// It is still on its way here.
    arriving: Mutex<Option<Held>>,
    /// What comes and goes: functions of other processes.
    hotplug: Hotplug,
    devices: Devices,
    vm: Arc<VmFd>,
    /// Serves the faults of its guest maps, if it arrives with pages to follow; else why not.
    faults: Result<Arc<FaultService>, String>,
    ram: Arc<Ram>,
    notice: ExitNotice,
    identity: [u8; 16],
    name: String,
    description: VmDescription,
    boot_id: String,
    /// The units were started, here or by the engine.
    started: AtomicBool,
    /// Serialises `pause`, `resume` and `shutdown`. Nothing else is locked inside but what those take.
    user: Mutex<()>,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm").field("name", &self.name).field("state", &self.state()).finish_non_exhaustive()
    }
}

impl Vm {
    /// Makes a new machine and loads its kernel. It does not run yet: see [`resume`](Self::resume).
    pub fn boot(config: MachineConfig) -> Result<Arc<Self>, VmError> {
        Self::boot_on(Arc::new(Host::open()?), config)
    }

    fn boot_on(host: Arc<Host>, config: MachineConfig) -> Result<Arc<Self>, VmError> {
        config.check()?;
        let pages = config.memory / PageSize::Huge2M.bytes();
        if config.hugepages && pages > free_huge_pages() {
            return Err(VmError::Lacks(vec![format!(
                "{pages} free huge pages of 2 MiB (this host has {}; see /proc/sys/vm/nr_hugepages)",
                free_huge_pages()
            )]));
        }
        let connections = DeviceConfig { serial: config.serial.clone(), pci: config.pci.clone() };
        let backing = Backing::open(connections, Registry::new()).and_then(Backing::connect);
        let backing = backing.map_err(|e| VmError::Device(e.into()))?;
        backing.lock().map_err(|e| VmError::Device(e.into()))?;
        let cpuid = cpu_model::table(&host, config.cpu, host.tsc_khz)?;
        let address_bits = cpu_model::address_bits(&cpuid);
        if layout::mmio64(config.memory).end > 1 << address_bits.clamp(36, 52) {
            return Err(VmError::Lacks(vec![format!(
                "addresses for {} bytes of RAM and the PCI window above it (its CPUs have {address_bits} address bits)",
                config.memory
            )]));
        }
        let features = cpu_model::shown_feature_msrs(&cpuid).filter_map(|index| {
            let value = host.feature_msr(index)?;
            Some(FeatureMsr { index, value })
        });
        let description = VmDescription {
            version: VERSION,
            cpus: config.cpus,
            cpu_model: config.cpu.to_string(),
            feature_msrs: features.collect(),
            cpuid,
            tsc_khz: host.tsc_khz,
            boot_id: host.boot_id.clone(),
            devices: backing.describe(&config.pci, &config.vm),
            hotplug: true,
        };
        let ram = Arc::new(Ram::create(&layout::ram_blocks(config.memory, config.page_size()))?);
        let faults = Err("it was started here, and has all of its memory".into());
        let vm = Self::make(&host, ram, faults, description, config.vm, config.name, backing)?;

        let wrap = |e: crate::boot::BootError| VmError::Boot(e.into());
        let kernel = match &config.kernel {
            Kernel::Path(path) => KernelSource::Path(path),
            Kernel::Probe => KernelSource::Bytes { name: "the probe guest", image: wherry_guest::PROBE_ELF },
        };
        let rsdp = vm.devices.write_tables(vm.ram.memory(), config.cpus, vm.board().changeable())?;
        let initrd = config.initrd.as_deref().map(Path::new);
        let entry = boot::load(vm.ram.memory(), &kernel, initrd, &config.cmdline, rsdp).map_err(wrap)?;
        if let Some(first) = vm.vcpus.iter().next() {
            set_entry(first, &entry)?;
        }
        Ok(Arc::new(vm))
    }

    /// Makes everything but what the guest boots from: RAM is not touched.
    pub(crate) fn make(
        host: &Arc<Host>,
        ram: Arc<Ram>,
        faults: Result<Arc<FaultService>, String>,
        description: VmDescription,
        identity: [u8; 16],
        name: String,
        backing: Backing,
    ) -> Result<Self, VmError> {
        let notice = ExitNotice::new();
        let parts = assemble(host, &ram, &description, &notice)?;
        let shown = Shown { ram: &ram, faults: faults.as_ref().ok().cloned() };
        let (devices, slots) = Devices::make(&description, backing, &parts.vm, &shown, &notice)?;
        let mut before: Vec<Arc<dyn StateUnit>> = vec![
            Arc::new(ClockUnit::new(parts.vm.clone(), host.clone(), parts.traits.time.clone(), parts.vcpus.clone())),
            Arc::new(IrqchipUnit::new(parts.vm.clone())),
            Arc::new(PitUnit::new(parts.vm.clone())),
        ];
        before.extend(devices.units().iter().cloned());
        let vcpu = |vcpu: &Arc<Vcpu>| Arc::new(VcpuUnit::new(vcpu.clone(), parts.traits.clone()));
        let after = parts.vcpus.iter().map(|v| vcpu(v) as Arc<dyn StateUnit>).collect();
        let log = KvmDirtyLog::new(parts.vm.clone(), parts.slots, parts.manual_log);
        let mut dirty_sources: Vec<Arc<dyn DirtySource>> = vec![Arc::new(log), Arc::new(VmmWrites::new(ram.clone()))];
        dirty_sources.extend(devices.logs().iter().cloned());
        let board = Board::new(slots, Fixed { before, after, dirty_sources })?;
        let vm = Self {
            throttle: Throttle::new(parts.vcpus.clone()),
            hotplug: Hotplug::start(board).map_err(|e| VmError::Device(e.into()))?,
            vm: parts.vm,
            faults,
            ram,
            notice,
            identity,
            name,
            description,
            boot_id: host.boot_id.clone(),
            started: AtomicBool::new(false),
            user: Mutex::new(()),
            arriving: Mutex::default(),
            vcpus: parts.vcpus,
            devices,
        };
        vm.vcpus.spawn(vm.devices.buses(), &vm.notice)?;
        Ok(vm)
    }

    /// Lets the machine run: for the first time, or after [`pause`](Self::pause).
    pub fn resume(&self) -> Result<(), VmError> {
        let _user = self.user.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reason) = self.notice.reason() {
            return Err(VmError::Ended(reason));
        }
        if !self.started.swap(true, Ordering::AcqRel) {
            self.units().start()?;
        } else if self.vcpus.is_held(Hold::User) {
            self.vcpus.forgive_gap();
        }
        self.vcpus.release(Hold::User);
        Ok(())
    }

    /// Brings the vCPUs to rest until [`resume`](Self::resume). If they do not come to rest, the machine runs on.
    pub fn pause(&self) -> Result<(), VmError> {
        self.pause_within(PAUSE_LIMIT)
    }

    /// [`pause`](Self::pause) with a limit of the caller's choice.
    pub fn pause_within(&self, limit: Duration) -> Result<(), VmError> {
        let _user = self.user.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reason) = self.notice.reason() {
            return Err(VmError::Ended(reason));
        }
        self.vcpus.hold(Hold::User);
        let vcpus = self.vcpus.wait_rest(Instant::now() + limit);
        if vcpus.is_empty() {
            return Ok(());
        }
        self.vcpus.release(Hold::User);
        Err(VmError::NotAtRest { vcpus, limit_ms: limit.as_millis() as u64 })
    }

    /// What it does.
    pub fn state(&self) -> VmState {
        match self.notice.reason() {
            Some(reason) => VmState::Ended(reason),
            None if self.is_paused() => VmState::Paused,
            None if self.vcpus.iter().all(|vcpu| vcpu.runs()) => VmState::Running,
            None => VmState::Stopped,
        }
    }

    /// Whether the user has paused it.
    pub fn is_paused(&self) -> bool {
        self.vcpus.is_held(Hold::User)
    }

    /// Ends the machine: its vCPU threads are gone when this returns. RAM and descriptors go with the last handle.
    pub fn shutdown(&self) {
        let _user = self.user.lock().unwrap_or_else(PoisonError::into_inner);
        self.notice.tell(ExitReason::ApiStop);
        self.hotplug.end();
        // A vCPU in an instruction that KVM emulates waits for a page that may never come, and cannot be called away: it
        // is given zeros, and leaves the guest before its next instruction.
        if let Ok(faults) = &self.faults {
            let vcpus_rest = self.vcpus.wait_rest(Instant::now() + FAULT_LIMIT).is_empty();
            // The same holds for threads of devices.
            if !self.devices.end(FAULT_LIMIT) || !vcpus_rest {
                faults.stop();
            }
        }
        self.vcpus.end();
    }

    /// It runs elsewhere: nobody is to find it here any more, however long freeing it takes.
    pub(crate) fn leave(&self) {
        self.devices.backing().leave();
    }

    /// Waits until the machine ends, or until the deadline if there is one.
    pub fn wait_exit(&self, deadline: Option<Instant>) -> Option<ExitReason> {
        self.notice.wait(deadline)
    }

    /// Calls `hook` once when the machine ends, or now if it has. The hook runs on the thread that ended it, perhaps a
    /// vCPU's: it must neither block nor call back into the machine other than by another thread.
    pub fn on_exit(&self, hook: impl FnOnce(&ExitReason) + Send + 'static) {
        self.notice.on_exit(hook);
    }

    /// Name given by the user.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Identity of the VM.
    pub fn identity(&self) -> [u8; 16] {
        self.identity
    }

    /// What its devices were connected to when it was made here.
    pub fn connections(&self) -> &DeviceConfig {
        self.devices.backing().connections()
    }

    /// Number of vCPUs.
    pub fn cpus(&self) -> u32 {
        self.description.cpus
    }

    /// Name of the CPU model.
    pub fn cpu_model(&self) -> &str {
        &self.description.cpu_model
    }

    /// The VMM's part of the description, with the devices that it has now.
    pub fn vmm_description(&self) -> VmDescription {
        VmDescription { devices: self.board().descriptions(), ..self.description.clone() }
    }

    /// KVM's descriptor of the VM, for devices that are added to it.
    pub fn kvm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// The devices.
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    fn board(&self) -> &Arc<Board> {
        self.hotplug.board()
    }

    /// Its devices on the PCI bus, in the order in which they came.
    pub fn device_statuses(&self) -> Vec<DeviceStatus> {
        self.board().statuses()
    }

    /// Something that lists its devices for as long as anybody wants to know, and keeps none of it alive but the list.
    pub fn device_lister(&self) -> impl Fn() -> Vec<DeviceStatus> + Send + Sync + use<> {
        let board = Arc::downgrade(self.board());
        move || board.upgrade().map(|board| board.statuses()).unwrap_or_default()
    }

    /// Plugs a function, and tells the guest. Takes as long as its owner does to answer, which has a deadline for each request.
    pub fn plug(&self, source: &FunctionSource) -> Result<DeviceStatus, PlugError> {
        let prepared = self.board().prepare(source)?;
        // Between a first start and this one the function would not be started, or twice.
        let _user = self.user.lock().unwrap_or_else(PoisonError::into_inner);
        if self.notice.reason().is_some() {
            return Err(PlugError::Ended);
        }
        self.board().insert(prepared, self.started.load(Ordering::Acquire))
    }

    /// Asks the guest to let a device go; [`Unplugging::wait`] waits for it.
    pub fn unplug(&self, name: &str) -> Result<Unplugging, UnplugError> {
        if self.is_paused() {
            return Err(UnplugError::Paused(name.into()));
        }
        self.board().ask(name)
    }

    /// No device comes or goes until the handle is dropped: a journey describes the machine, and then carries just that. Waits
    /// for what is under way.
    pub fn hold_devices(&self) -> Held {
        self.board().hold()
    }

    /// The engine starts the units of a machine that arrives. Its devices stay as they are until all of it is there.
    pub(crate) fn started_by_engine(self) -> Self {
        self.started.store(true, Ordering::Release);
        *self.arriving.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.hold_devices());
        self
    }

    /// All of a machine that arrived is there.
    pub(crate) fn has_arrived(&self) {
        self.arriving.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.vcpus.end();
    }
}

impl Machine for Vm {
    fn description(&self) -> MachineDescription {
        // The boot id is that of where it is now, not of where it was first started.
        let mut vmm = VmDescription { boot_id: self.boot_id.clone(), ..self.vmm_description() };
        self.devices.backing().refresh(&mut vmm.devices);
        MachineDescription {
            vm: self.identity.to_vec(),
            name: self.name.clone(),
            vmm: vmm.encode_to_vec(),
            ..MachineDescription::of(&self.ram, &self.units())
        }
    }

    fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    fn units(&self) -> Arc<Units> {
        self.board().units()
    }

    fn streams(&self) -> Vec<Arc<dyn StateStream>> {
        self.board().streams()
    }

    fn dirty_sources(&self) -> Arc<[Arc<dyn DirtySource>]> {
        self.board().dirty_sources()
    }

    fn free_pages(&self) -> Option<Arc<dyn FreePages>> {
        self.devices.balloon().map(|balloon| balloon.free_pages())
    }

    fn faults(&self) -> Result<&Arc<FaultService>, String> {
        self.faults.as_ref().map_err(String::clone)
    }

    fn hot_pages(&self) -> Vec<(BlockId, u64)> {
        let memory = self.ram.memory();
        let pages: BTreeSet<u64> = self.vcpus.iter().flat_map(|vcpu| vcpu.hot_pages(memory)).collect();
        let of_block = |page: u64| {
            let address = page * GRANULE;
            let mut specs = self.ram.blocks().iter().map(|block| block.spec());
            let spec = specs.find(|spec| (spec.guest_base..spec.guest_base + spec.size).contains(&address))?;
            Some((spec.id, (address - spec.guest_base) / GRANULE))
        };
        pages.into_iter().filter_map(of_block).collect()
    }

    fn vcpu_threads(&self) -> Vec<VcpuThread> {
        let begun = self.vcpus.iter().filter_map(|vcpu| Some((vcpu.index(), vcpu.thread()?)));
        begun.map(|(index, thread)| VcpuThread { index, thread }).collect()
    }

    fn blockers(&self) -> Vec<String> {
        self.board().blockers()
    }

    fn throttle(&self, percent: u8) {
        self.throttle.set(percent);
    }

    fn take_locks(&self) -> Result<(), MachineError> {
        Ok(self.devices.backing().lock()?)
    }

    fn release_locks(&self) -> Result<(), MachineError> {
        Ok(self.devices.backing().unlock()?)
    }

    fn runs_after_start(&self) -> bool {
        !self.is_paused()
    }
}

impl Keep for Vm {
    fn registry(&self) -> &Arc<Registry> {
        self.devices.backing().registry()
    }

    fn cannot_keep(&self) -> Vec<String> {
        self.board().cannot_keep()
    }
}

/// Sets the first vCPU to where the kernel starts.
fn set_entry(vcpu: &Vcpu, entry: &Entry) -> Result<(), VmError> {
    let (regs, changes) = entry_state(entry);
    let fd = vcpu.fd();
    let mut sregs = fd.get_sregs().map_err(VmError::kvm("reading special registers"))?;
    changes.apply(&mut sregs);
    fd.set_sregs(&sregs).map_err(VmError::kvm("setting special registers"))?;
    fd.set_regs(&regs).map_err(VmError::kvm("setting registers"))
}

#[cfg(test)]
mod tests;
