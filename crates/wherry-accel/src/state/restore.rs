//! From what was saved to a device's state. All of it is checked first: state that cannot have been saved by a device is
//! refused by name, and the device is as it was.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::Ordering;

use crate::abi::{
    COMPLETION_BYTES, Completion, DESCRIPTOR_BYTES, Descriptor, Fence, MAX_CONTEXTS, MAX_PRIORITY, MAX_QUEUE,
};
use crate::catalogue::{Catalogue, EngineId};
use crate::context::{Context, Ring, SlotState, Timeline};
use crate::device::Device;
use crate::engines::Progress;
use crate::error::{Errno, Refused};
use crate::keys::{FleetKey, KeyKind, KeyStore};
use crate::map::{Bond, EngineMap, Slot, set_of};
use crate::program::{Frame, Machine};
use crate::scheduler::{Core, Effect, Lane, Phase, REMEMBERED, Request, STATE_BUDGET, Tunables, Wait, Work, rank};
use crate::work::{Execution, Next};

use super::saved::*;

/// Saved state cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The other side has other engines.
    #[error("the saved accelerator has engines {saved}, this one has {here}: use the same model on both ends")]
    Catalogue {
        /// Engines there.
        saved: String,
        /// Engines here.
        here: String,
    },
    /// The device has contexts already.
    #[error("the accelerator has contexts or keys already; state is taken before the first one")]
    NotEmpty,
    /// There are keys, and no key to unwrap them.
    #[error("the saved accelerator has keys, and this host has no fleet key")]
    NoFleetKey,
    /// A key does not come in.
    #[error("a saved key is refused")]
    Key(#[source] Refused),
    /// An address space that is not here.
    #[error("the saved accelerator uses address space {0}, which this one does not have")]
    Space(u32),
    /// No device can have saved this.
    #[error("the state of the accelerator cannot be: {0}")]
    Impossible(String),
}

type Result<T> = std::result::Result<T, RestoreError>;

fn no<T>(what: impl Into<String>) -> Result<T> {
    Err(RestoreError::Impossible(what.into()))
}

fn check(fine: bool, what: impl FnOnce() -> String) -> Result<()> {
    if fine { Ok(()) } else { no(what()) }
}

impl Device {
    /// Takes saved state. The device must be new: no context, no key; its address spaces are there. It stands still
    /// until [`resume`](Device::resume).
    pub fn restore(&self, saved: &SavedDevice, fleet: Option<&FleetKey>) -> std::result::Result<(), RestoreError> {
        let mut core = self.locked();
        if !core.contexts.is_empty() || !core.requests.is_empty() || !self.keys().wrapped().is_empty() {
            return Err(RestoreError::NotEmpty);
        }
        let mut restored = Restorer { catalogue: core.catalogue.clone(), time: saved.time }.core(&core, saved)?;
        let spaces = restored.contexts.values().map(|c| c.space);
        let spaces = spaces.chain(restored.requests.values().map(|r| r.space));
        for space in spaces.chain(restored.effects.iter().map(|e| e.space)).collect::<BTreeSet<_>>() {
            self.space(space).map_err(|_| RestoreError::Space(space))?;
        }
        // Tried in a store of their own, so that none is left behind when one is refused.
        let trial = KeyStore::default();
        for store in [&trial, self.keys()] {
            for key in &saved.keys {
                let fleet = fleet.ok_or(RestoreError::NoFleetKey)?;
                let Some(kind) = KeyKind::from_number(key.kind) else {
                    return no(format!("a key is for {}", key.kind));
                };
                store.import(fleet, key.handle, kind, &key.wrapped).map_err(RestoreError::Key)?;
            }
        }
        self.set_registers(saved.registers.clone().unwrap_or_default());
        self.time_offset.store(saved.time.wrapping_sub(self.clock.now()), Ordering::Relaxed);
        restored.settle();
        *core = restored;
        Ok(())
    }
}

impl Core {
    /// Brings the oldest requests of all slots up, as after any other change.
    fn settle(&mut self) {
        let mut contexts: Vec<Context> = std::mem::take(&mut self.contexts).into_values().collect();
        for context in &mut contexts {
            self.spread(context);
        }
        self.contexts = contexts.into_iter().map(|context| (context.id, context)).collect();
        let slots = self.contexts.values().flat_map(|c| &c.slots);
        let oldest: Vec<u64> = slots.filter_map(|slot| slot.timeline.queue.front().copied()).collect();
        for id in oldest {
            self.consider(id);
        }
    }
}

struct Restorer {
    catalogue: Catalogue,
    time: u64,
}

impl Restorer {
    fn core(&self, here: &Core, saved: &SavedDevice) -> Result<Core> {
        self.same_engines(saved)?;
        let workers: Vec<usize> = here.engines.iter().map(|engine| engine.worker).collect();
        let mut core = Core::new(self.catalogue.clone(), &workers, here.turns.len(), here.spread);
        for (engine, saved) in core.engines.iter_mut().zip(&saved.engines) {
            let (slice, preempt_timeout, heartbeat) = (saved.slice, saved.preempt_timeout, saved.heartbeat);
            check([slice, preempt_timeout, heartbeat].iter().all(|time| *time <= Tunables::MAX), || {
                format!("what is set for engine {} is out of range", engine.id)
            })?;
            engine.tunables = Tunables { slice, preempt_timeout, heartbeat };
            (engine.busy, engine.resets) = (saved.busy, saved.resets);
        }
        check(saved.time < u64::MAX / 2, || "its time is out of range".into())?;
        check(saved.next_request < u64::MAX / 2 && saved.next_order < u64::MAX / 2, || {
            "its counters are out of range".into()
        })?;
        (core.next_request, core.next_order) = (saved.next_request, saved.next_order);
        (core.next_single, core.lost, core.stopped) = (saved.next_single, saved.lost, true);
        check(saved.generations.len() <= MAX_CONTEXTS, || "it has more places for contexts than there are".into())?;
        core.generations = saved.generations.iter().map(|g| *g as u16).collect();
        for single in &saved.singles {
            check(single.number < saved.next_single, || format!("timeline {} is from the future", single.number))?;
            core.singles.insert(single.number, single.latest.as_ref().map(fence));
        }
        let mut places = BTreeSet::new();
        for saved in &saved.contexts {
            let context = self.context(saved, true)?;
            let (id, place) = (context.id, (context.id & 0xffff) as usize);
            check((1..=core.generations.len()).contains(&place) && places.insert(place), || {
                format!("context {id} has no place, or that of another one")
            })?;
            check(context.single.is_none_or(|number| core.singles.contains_key(&number)), || {
                format!("context {id} is on a timeline that is not there")
            })?;
            core.contexts.insert(id, context);
        }
        check(saved.remembered.len() <= REMEMBERED, || "it remembers too many contexts".into())?;
        core.remembered = saved.remembered.iter().map(|saved| self.context(saved, false)).collect::<Result<_>>()?;
        for saved in &saved.requests {
            self.request(&mut core, saved)?;
        }
        self.effects(&mut core, saved)?;
        for context in core.contexts.values() {
            for (index, slot) in context.slots.iter().enumerate() {
                let t = &slot.timeline;
                check(t.queue.len() as u64 == t.submitted - t.completed, || {
                    format!("requests of context {} slot {index} are missing", context.id)
                })?;
            }
        }
        check(core.weight() <= STATE_BUDGET, || "it is larger than any device can be".into())?;
        Ok(core)
    }

    fn same_engines(&self, saved: &SavedDevice) -> Result<()> {
        let list = |ids: &mut dyn Iterator<Item = EngineId>| ids.map(|id| id.to_string()).collect::<Vec<_>>().join(" ");
        let id = |e: &SavedEngine| EngineId { class: e.class as u16, instance: e.instance as u16 };
        let there = list(&mut saved.engines.iter().take(crate::abi::MAX_ENGINES + 1).map(id));
        let here = list(&mut self.catalogue.engines().iter().copied());
        if there != here { Err(RestoreError::Catalogue { saved: there, here }) } else { Ok(()) }
    }

    fn context(&self, saved: &SavedContext, open: bool) -> Result<Context> {
        let id = saved.id;
        let map = EngineMap { slots: saved.slots.iter().map(slot).collect::<Result<_>>()? };
        map.check(&self.catalogue).or_else(|what| no(format!("context {id}: {what}")))?;
        let priority = i64::from(saved.priority);
        check((-MAX_PRIORITY..=MAX_PRIORITY).contains(&priority), || format!("context {id} has priority {priority}"))?;
        check(saved.flags & !crate::abi::context_flag::ALL == 0, || format!("context {id} has unknown flags"))?;
        check(saved.hang_ages.len() <= 2 * MAX_QUEUE, || format!("context {id} has too many hangs"))?;
        let mut shares = BTreeMap::new();
        for share in &saved.shares {
            check(share.index < 64 && (1..=100).contains(&share.percent), || {
                format!("context {id} has a share {share:?}")
            })?;
            shares.insert(share.index as u8, share.percent);
        }
        let slots = saved.slots.iter().map(|slot| state(id, slot, open)).collect::<Result<_>>()?;
        Ok(Context {
            id,
            flags: saved.flags,
            priority: saved.priority,
            persistent: saved.persistent,
            space: saved.space,
            map,
            mapped: saved.mapped,
            used: saved.used,
            slots,
            single: saved.single,
            shares,
            hangs: saved.hang_ages.iter().map(|age| self.time.saturating_sub(*age)).collect(),
            banned: saved.banned,
            closed: saved.closed,
            client: saved.client,
        })
    }

    fn request(&self, core: &mut Core, saved: &SavedRequest) -> Result<()> {
        let Some(own) = saved.fence.as_ref().map(fence) else { return no("a request has no fence") };
        let Some(context) = core.contexts.get(&own.context) else { return no(format!("{own} has no context")) };
        let Some(entry) = context.map.slot(own.slot).filter(|slot| **slot != Slot::Gap).cloned() else {
            return no(format!("{own} has no slot"));
        };
        check(
            saved.id < core.next_request && saved.order < core.next_order && saved.rank <= rank::REST.into(),
            || format!("{own} is from the future"),
        )?;
        check(i64::from(saved.priority).abs() <= MAX_PRIORITY, || format!("{own} has priority {}", saved.priority))?;
        let submission = descriptor(&saved.submission)?;
        let engines = entry.lanes();
        let class = self.catalogue.engines()[usize::from(engines[0][0])].class;
        check(engines.len() == saved.lanes.len(), || format!("{own} has {} lanes", saved.lanes.len()))?;
        let lane = |(siblings, lane): (&&[u8], &SavedLane)| {
            check(lane.allowed != 0 && lane.allowed & !set_of(siblings) == 0, || format!("{own} may use no engine"))?;
            let work = match &lane.work {
                Some(saved) => Work::Here(Box::new(work(saved, class, &submission)?)),
                None => Work::Done,
            };
            Ok(Lane { siblings: siblings.to_vec(), allowed: lane.allowed, work, engine: None })
        };
        let lanes = engines.iter().zip(&saved.lanes).map(lane).collect::<Result<Vec<_>>>()?;
        let phase = match saved.phase {
            0 => Phase::Queued,
            1 => Phase::Ready,
            2 => Phase::Finishing,
            other => return no(format!("{own} is in phase {other}")),
        };
        let finished = phase == Phase::Finishing || lanes.iter().any(|lane| lane.work != Work::Done);
        check(finished, || format!("{own} is complete and does not know it"))?;
        let request = Request {
            fence: own,
            space: saved.space,
            priority: saved.priority,
            rank: saved.rank as u8,
            order: saved.order,
            wait: match (&saved.wait_signalled, &saved.wait_started) {
                (Some(f), _) => Wait::Signalled(fence(f)),
                (None, Some(f)) => Wait::Started(fence(f)),
                (None, None) => Wait::Nothing,
            },
            after: saved.after.as_ref().map(fence),
            lanes,
            chooses: entry.is_virtual(),
            phase,
            submission,
            doomed: errno(saved.doomed)?,
            pings: saved
                .pings_missed
                .map(|missed| (missed.min(255) as u8, self.time.saturating_add(saved.ping_in.min(Tunables::MAX)))),
            result: errno(saved.result)?,
        };
        let Some(slot) = core.contexts.get_mut(&own.context).and_then(|c| c.slots.get_mut(own.slot as usize)) else {
            return no(format!("{own} has no slot"));
        };
        let t = &mut slot.timeline;
        // Requests come by id, and so in the order of their slot.
        let place = t.completed + t.queue.len() as u64 + 1;
        check(own.seq == place && own.seq <= t.submitted && t.queue.len() < MAX_QUEUE, || {
            format!("{own} is not the next of its slot")
        })?;
        check(t.queue.is_empty() || phase == Phase::Queued, || format!("{own} has started before those ahead of it"))?;
        t.queue.push_back(saved.id);
        let key = request.key(saved.id);
        if phase == Phase::Ready {
            core.ready.insert(key);
        }
        core.requests_weight += request.weight();
        let twice = core.requests.insert(saved.id, request).is_some();
        check(!twice, || format!("request {} is there twice", saved.id))
    }

    fn effects(&self, core: &mut Core, saved: &SavedDevice) -> Result<()> {
        let mut finishing: BTreeSet<u64> =
            core.requests.iter().filter(|(_, r)| r.phase == Phase::Finishing).map(|(id, _)| *id).collect();
        check(saved.effects.len() <= MAX_CONTEXTS * MAX_QUEUE, || "it has too many records to write".into())?;
        for effect in &saved.effects {
            let Ok(record) = <[u8; COMPLETION_BYTES]>::try_from(&effect.record[..]) else {
                return no("a completion record has another length");
            };
            if let Some(id) = effect.request {
                check(finishing.remove(&id), || format!("a record is for request {id}, which is not complete"))?;
            }
            core.effects.push_back(Effect {
                space: effect.space,
                submission: descriptor(&effect.submission)?,
                record: Completion::decode(&record),
                request: effect.request,
            });
        }
        check(finishing.is_empty(), || format!("requests {finishing:?} are complete and nobody tells it"))
    }
}

fn fence(saved: &SavedFence) -> Fence {
    Fence { context: saved.context, slot: saved.slot, seq: saved.seq }
}

fn errno(number: u32) -> Result<Option<Errno>> {
    match number {
        0 => Ok(None),
        number => match u16::try_from(number).ok().and_then(Errno::from_number) {
            Some(errno) => Ok(Some(errno)),
            None => no(format!("there is no error {number}")),
        },
    }
}

fn descriptor(bytes: &[u8]) -> Result<Descriptor> {
    match <&[u8; DESCRIPTOR_BYTES]>::try_from(bytes) {
        Ok(bytes) => Descriptor::decode(bytes).or_else(|refused| no(refused.to_string())),
        Err(_) => no(format!("a descriptor has {} bytes", bytes.len())),
    }
}

fn slot(saved: &SavedSlot) -> Result<Slot> {
    let bond = |b: &SavedBond| Bond { master: b.master.min(255) as u8, engines: b.engines.clone() };
    Ok(match (saved.kind, &saved.engines[..]) {
        (0, _) => Slot::Gap,
        (1, [engine]) => Slot::Physical(*engine),
        (2, _) => Slot::Balanced { siblings: saved.engines.clone(), bonds: saved.bonds.iter().map(bond).collect() },
        (3, _) => Slot::Parallel { width: saved.width.min(0xffff) as u16, engines: saved.engines.clone() },
        (kind, _) => return no(format!("a slot is of kind {kind}")),
    })
}

fn state(context: u32, saved: &SavedSlot, open: bool) -> Result<SlotState> {
    let fine =
        saved.completed <= saved.submitted && saved.submitted < u64::MAX / 2 && saved.errors.len() <= Timeline::ERRORS;
    check(fine, || format!("a timeline of context {context} cannot be"))?;
    check(open || saved.completed == saved.submitted, || format!("context {context} is gone, and its work is not"))?;
    let mut errors = VecDeque::new();
    for error in &saved.errors {
        let Some(errno) = errno(error.errno)? else { return no("a point failed without an error") };
        errors.push_back((error.seq, errno));
    }
    let ring = saved.ring.clone().unwrap_or_default();
    let ring = Ring {
        base: ring.base,
        entries: ring.entries,
        tail: ring.tail,
        head: ring.head,
        head_address: ring.head_address,
        status: ring.status,
        tail_address: ring.tail_address,
    };
    check(ring.fits(), || format!("a ring of context {context} cannot be"))?;
    check(saved.portal.len() < DESCRIPTOR_BYTES, || format!("a portal of context {context} holds too much"))?;
    let timeline = Timeline {
        submitted: saved.submitted,
        completed: saved.completed,
        started: (saved.started, saved.started_on),
        errors,
        queue: VecDeque::new(),
        runtime: saved.runtime,
        affinity: None,
    };
    Ok(SlotState { timeline, ring, portal: saved.portal.clone(), pumping: false })
}

fn work(saved: &SavedWork, class: u16, submission: &Descriptor) -> Result<Execution> {
    check(saved.left <= crate::abi::MAX_BATCH, || format!("a batch has {} descriptors left", saved.left))?;
    let next = match saved.inline {
        true => Next::Inline(*submission),
        false => Next::List { at: saved.at, left: saved.left },
    };
    let current = match &saved.current {
        None => None,
        Some(bytes) => {
            let d = descriptor(bytes)?;
            d.check(class, true).or_else(|refused| no(refused.to_string()))?;
            let progress = match (&saved.bytes, &saved.program) {
                (Some(bytes), None) => {
                    check(bytes.done <= d.size.into(), || format!("{} of {} bytes are done", bytes.done, d.size))?;
                    Progress::Bytes { done: bytes.done, value: bytes.value }
                }
                (None, Some(saved)) => Progress::Program(Box::new(program(saved, &d)?)),
                (None, None) => Progress::Start,
                (Some(_), Some(_)) => return no("an operation is a program and is not"),
            };
            Some((d, progress))
        }
    };
    Ok(Execution { class, next, current })
}

fn program(saved: &SavedProgram, d: &Descriptor) -> Result<Machine> {
    let Ok(registers) = <[u64; 11]>::try_from(&saved.registers[..]) else {
        return no(format!("a program has {} registers", saved.registers.len()));
    };
    check(saved.fuel <= d.word.into(), || "a program has more fuel than it was given".into())?;
    let (frames, rest) = saved.frames.as_chunks::<5>();
    check(rest.is_empty(), || "a program has half a frame".into())?;
    let frame = |f: &[u64; 5]| Frame { back: f[0].min(u32::MAX.into()) as u32, kept: [f[1], f[2], f[3], f[4]] };
    let frames = frames.iter().map(frame).collect();
    Machine::from_parts(saved.text.clone(), registers, saved.pc, saved.fuel, frames, saved.stack.clone())
        .or_else(|flaw| no(flaw.to_string()))
}
