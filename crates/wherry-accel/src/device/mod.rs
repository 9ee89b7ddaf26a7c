//! The device: contexts, address spaces, keys and the scheduler behind one lock, and what clients and hosts call.
//!
//! - this file: making one, submissions, fences, figures, stopping.
//! - [`bells`]: tails of rings that are in clients' memory.
//! - [`create`]: contexts, from extensions and by cloning.
//! - [`params`] has parameters; [`portal`] has the same calls as registers, and the rings.
//! - [`work`]: what a worker does: take a lane, run some steps of it, give it back.
//!
//! The lock is held for bookkeeping only. A client's memory is read and written without it, since a page may have to be
//! fetched from another host first.

mod bells;
mod create;
mod params;
mod portal;
mod work;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};

use crate::abi::{Descriptor, Fence, opcode};
use crate::catalogue::{Catalogue, CatalogueError, EngineId, Host};
use crate::clock::Clock;
use crate::error::{Errno, Refused, refuse};
use crate::keys::KeyStore;
use crate::memory::{AddressSpace, offset, read_u32, read_u64};
use crate::scheduler::{Core, FenceState, Submission, Tunables};

pub use crate::work::{NoInterrupts, Notify};
pub(crate) use bells::{Look, Told};
pub use params::Param;
pub(crate) use portal::bell;
pub(crate) use work::Ran;

/// Number of the address space that clients begin with.
pub const FIRST_SPACE: u32 = 0;

/// Who calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// May raise priorities above 0.
    pub privileged: bool,
    /// The address space that pointers of the call are in, where no context says otherwise.
    pub space: u32,
}

impl Caller {
    /// A client without privilege.
    pub const PLAIN: Caller = Caller { privileged: false, space: FIRST_SPACE };
    /// A client with privilege.
    pub const PRIVILEGED: Caller = Caller { privileged: true, space: FIRST_SPACE };
}

/// What a device is made with.
pub struct Config {
    /// The engines that clients see.
    pub catalogue: Catalogue,
    /// The workers of this host.
    pub host: Host,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Who is told of interrupts.
    pub notify: Arc<dyn Notify>,
    /// Decides where virtual slots begin among their siblings; any number.
    pub seed: u64,
}

/// An engine as `wherry accel` and registers show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineInfo {
    /// Its name.
    pub id: EngineId,
    /// The worker of this host that serves it.
    pub worker: usize,
    /// How long it has been occupied, in nanoseconds.
    pub busy: u64,
    /// Something is on it.
    pub occupied: bool,
    /// How often it was reset.
    pub resets: u64,
    /// What is set for it.
    pub tunables: Tunables,
}

/// A context as `wherry accel` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextInfo {
    /// Its number.
    pub id: u32,
    /// Its priority.
    pub priority: i32,
    /// Its work outlives it.
    pub persistent: bool,
    /// It is banned.
    pub banned: bool,
    /// Its address space.
    pub space: u32,
    /// Its slots, as text, with submitted and completed points and the time they occupied engines in nanoseconds.
    pub slots: Vec<SlotInfo>,
}

/// A slot of [`ContextInfo`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    /// What it stands for, such as `copy0` or `balance(copy0 copy1)`.
    pub what: String,
    /// Points submitted.
    pub submitted: u64,
    /// Points signalled.
    pub completed: u64,
    /// Time on engines, in nanoseconds.
    pub runtime: u64,
}

/// The accelerator.
pub struct Device {
    core: Mutex<Core>,
    /// Told whenever there may be work, or an end of it.
    changed: Condvar,
    pub(crate) clock: Arc<dyn Clock>,
    /// Device time minus the clock's (wrapping): device time goes on where it was saved.
    pub(crate) time_offset: AtomicU64,
    notify: Arc<dyn Notify>,
    spaces: RwLock<BTreeMap<u32, Arc<dyn AddressSpace>>>,
    keys: KeyStore,
    registers: Mutex<crate::state::saved::SavedRegisters>,
    workers: usize,
    /// Held while a tail is read and taken: looks are one at a time, or an older one would come after a newer.
    looks: Mutex<()>,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let core = self.lock();
        write!(f, "Device({} engines, {} contexts)", core.engines.len(), core.contexts.len())
    }
}

impl Device {
    /// A device with no context. Refused, by class, if the host has no worker for an engine.
    pub fn new(config: Config) -> Result<Self, CatalogueError> {
        let binding = config.host.bind(&config.catalogue)?;
        let workers = config.host.workers.len();
        Ok(Self {
            core: Mutex::new(Core::new(config.catalogue, &binding, workers, config.seed)),
            changed: Condvar::new(),
            clock: config.clock,
            time_offset: AtomicU64::new(0),
            notify: config.notify,
            spaces: RwLock::default(),
            keys: KeyStore::default(),
            registers: Mutex::default(),
            workers,
            looks: Mutex::default(),
        })
    }

    pub(crate) fn locked(&self) -> MutexGuard<'_, Core> {
        self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device's time in nanoseconds. It goes on across a move.
    pub fn now(&self) -> u64 {
        self.clock.now().wrapping_add(self.time_offset.load(Ordering::Relaxed))
    }

    /// How many workers serve it.
    pub fn workers(&self) -> usize {
        self.workers
    }

    /// The keys.
    pub fn keys(&self) -> &KeyStore {
        &self.keys
    }

    /// Gives an address space its memory. Contexts name it by number and may share it.
    pub fn set_space(&self, number: u32, space: Arc<dyn AddressSpace>) {
        self.spaces.write().unwrap_or_else(PoisonError::into_inner).insert(number, space);
    }

    /// An address space by its number.
    pub fn space(&self, number: u32) -> Result<Arc<dyn AddressSpace>, Refused> {
        let spaces = self.spaces.read().unwrap_or_else(PoisonError::into_inner);
        spaces
            .get(&number)
            .cloned()
            .ok_or_else(|| Refused::new(Errno::NoEntry, format!("there is no address space {number}")))
    }

    /// Submits a descriptor to a slot; the fence is the point of its completion.
    pub fn submit(&self, context: u32, slot: u32, descriptor: &Descriptor) -> Result<Fence, Refused> {
        self.submit_with(context, slot, descriptor, |_| ())
    }

    /// The same, with something to be done before anybody can see that it was submitted. Not if it is refused before that.
    fn submit_with(
        &self,
        context: u32,
        slot: u32,
        descriptor: &Descriptor,
        first: impl FnOnce(&mut Core),
    ) -> Result<Fence, Refused> {
        let mut submission = Submission { descriptor: *descriptor, batches: Vec::new() };
        if descriptor.opcode == opcode::PARALLEL {
            let space = self.lock().open(context)?.space;
            submission.batches = self.batches(space, descriptor)?;
        }
        let mut core = self.lock();
        let fence = core.submit(context, slot, &submission)?;
        first(&mut core);
        core.poll(self.now());
        drop(core);
        self.changed.notify_all();
        self.flush();
        Ok(fence)
    }

    /// The list of a parallel submission: address u64, descriptors u32, and a word that must be 0, for each lane.
    fn batches(&self, space: u32, d: &Descriptor) -> Result<Vec<(u64, u32)>, Refused> {
        let space = self.space(space)?;
        if d.size as usize > crate::abi::MAX_ENGINES {
            return refuse(Errno::Invalid, format!("no slot takes {} batches", d.size));
        }
        let entry = |lane: u32| {
            let at = offset(d.source, 16 * u64::from(lane))?;
            if read_u32(&*space, offset(at, 12)?)? != 0 {
                return refuse(Errno::Invalid, format!("lane {lane} of a submission has its reserved word set"));
            }
            Ok((read_u64(&*space, at)?, read_u32(&*space, offset(at, 8)?)?))
        };
        (0..d.size).map(entry).collect()
    }

    /// How a fence stands.
    pub fn fence(&self, fence: Fence) -> Result<FenceState, Refused> {
        self.lock().fence(fence)
    }

    /// Which classes the work of a fence is running on, and which it waits for: one bit for each class.
    pub fn busy(&self, fence: Fence) -> Result<(u32, u32), Refused> {
        let core = self.lock();
        core.fence(fence)?;
        let slot = core.find(fence.context).and_then(|context| context.slots.get(fence.slot as usize));
        let queue = slot.map(|slot| &slot.timeline.queue);
        let id = queue.and_then(|q| q.iter().find(|id| core.requests.get(id).is_some_and(|r| r.fence == fence)));
        let (running, queued) = id.map_or((0, 0), |id| core.load(*id));
        let classes = |set: u64| {
            let mine = core.engines.iter().enumerate().filter(|(index, _)| set >> index & 1 == 1);
            mine.fold(0, |bits, (_, engine)| bits | 1 << engine.id.class)
        };
        Ok((classes(running), classes(queued)))
    }

    /// Advances the client's own timeline of a context: all its points up to `value` are signalled. Never back.
    pub fn advance_client(&self, context: u32, value: u64) -> Result<(), Refused> {
        let mut core = self.lock();
        let c = core.open(context)?;
        c.client = c.client.max(value);
        core.client_advanced();
        core.poll(self.now());
        drop(core);
        self.changed.notify_all();
        self.flush();
        Ok(())
    }

    /// Closes a context. Its work goes on if it is persistent, and ends with `EIO` if not.
    pub fn destroy_context(&self, context: u32) -> Result<(), Refused> {
        let now = self.now();
        self.lock().close(context, now)?;
        self.changed.notify_all();
        self.flush();
        Ok(())
    }

    /// Gives the device up: all work ends with `EIO`, and so does everything submitted later.
    pub fn lose(&self) {
        let now = self.now();
        self.lock().lose(now);
        self.changed.notify_all();
        self.flush();
    }

    /// Whether it is lost.
    pub fn is_lost(&self) -> bool {
        self.lock().lost
    }

    /// All engines, in the order of the catalogue.
    pub fn engines(&self) -> Vec<EngineInfo> {
        let now = self.now();
        let mut core = self.lock();
        (0..core.engines.len())
            .map(|index| {
                core.count(index, now);
                let engine = &core.engines[index];
                EngineInfo {
                    id: engine.id,
                    worker: engine.worker,
                    busy: engine.busy,
                    occupied: engine.running.is_some(),
                    resets: engine.resets,
                    tunables: engine.tunables,
                }
            })
            .collect()
    }

    /// Sets what can be set for an engine.
    pub fn tune(&self, engine: EngineId, tunables: Tunables) -> Result<(), Refused> {
        let mut core = self.lock();
        let Some(index) = core.catalogue.find(engine) else {
            return refuse(Errno::NoEntry, format!("there is no engine {engine}"));
        };
        for time in [tunables.slice, tunables.preempt_timeout, tunables.heartbeat] {
            crate::error::require(time <= Tunables::MAX, || format!("{time} ns are more than can be set"))?;
        }
        core.engines[index].tunables = tunables;
        drop(core);
        self.changed.notify_all();
        Ok(())
    }

    /// All contexts that are open, or have work left.
    pub fn contexts(&self) -> Vec<ContextInfo> {
        let now = self.now();
        let mut core = self.lock();
        for engine in 0..core.engines.len() {
            core.count(engine, now);
        }
        let names: Vec<EngineId> = core.catalogue.engines().to_vec();
        let of = |context: &crate::context::Context| ContextInfo {
            id: context.id,
            priority: context.priority,
            persistent: context.persistent,
            banned: context.banned,
            space: context.space,
            slots: context
                .map
                .slots
                .iter()
                .zip(&context.slots)
                .map(|(slot, state)| SlotInfo {
                    what: slot.describe(&names),
                    submitted: state.timeline.submitted,
                    completed: state.timeline.completed,
                    runtime: state.timeline.runtime,
                })
                .collect(),
        };
        core.contexts.values().map(of).collect()
    }

    /// Whether nothing is left to do.
    pub fn is_idle(&self) -> bool {
        self.lock().idle()
    }
}
