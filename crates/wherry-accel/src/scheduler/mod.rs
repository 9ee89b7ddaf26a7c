//! The scheduler: which request runs on which engine, and for how long. Pure: no thread, no clock, no memory of a client.
//!
//! - this file: requests, engines, and the state as a whole ([`Core`]).
//! - [`dispatch`]: the late, greedy choice: ready requests in their order onto engines that are idle, or whose request
//!   must give way.
//! - [`submit`]: a submission becomes a request.
//! - [`lifecycle`]: from ready to signalled; failures, hangs, bans, the end of a context.
//! - [`timers`]: slices, pre-emption deadlines, heartbeats.
//! - [`tasks`]: what workers take and give back.
//!
//! A request has one lane, or `width` of them in a parallel slot. Only the oldest request of a slot can be ready; it is
//! when its fences are signalled. A lane that has an engine *occupies* it, whoever works on it: engines are the client's
//! view, workers the host's, and a worker that serves several occupied engines takes them by turns.
//!
//! Times are nanoseconds of device time, which goes on across a move.

mod dispatch;
mod lifecycle;
mod submit;
mod tasks;
mod timers;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::abi::{Completion, Descriptor, Fence};
use crate::catalogue::{Catalogue, EngineId};
use crate::context::Context;
use crate::error::{Errno, Refused, refuse};
use crate::map::EngineSet;
use crate::work::Execution;

pub(crate) use submit::Submission;
pub(crate) use tasks::Task;

/// Most bytes that saved state may have: it must fit into a section.
pub(crate) const STATE_BUDGET: usize = 12 << 20;
/// What a request weighs in it, at most.
pub(crate) const REQUEST_WEIGHT: usize = 256;
/// Destroyed contexts whose fences can still be asked for.
pub(crate) const REMEMBERED: usize = 256;

/// What can be set for each engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tunables {
    /// How long a request may run while others of its priority wait, in nanoseconds. 0: for ever.
    pub slice: u64,
    /// How long a request may refuse to give way, in nanoseconds. 0: for ever.
    pub preempt_timeout: u64,
    /// Time between two heartbeats, in nanoseconds. 0: none.
    pub heartbeat: u64,
}

impl Tunables {
    /// The longest time that can be set, in nanoseconds: about four months.
    pub const MAX: u64 = 1 << 53;
}

impl Default for Tunables {
    fn default() -> Self {
        Self { slice: 1_000_000, preempt_timeout: 640_000_000, heartbeat: 2_500_000_000 }
    }
}

/// Hangs within this time count for a ban.
pub(crate) const HANG_WINDOW: u64 = 120_000_000_000;
/// So many of them ban a context.
pub(crate) const HANGS_FOR_BAN: usize = 3;
/// Priorities of a ping, by how many were missed before.
pub(crate) const PING_PRIORITIES: [i32; 3] = [-1024, 0, 1024];

/// What a request waits for before it is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    Nothing,
    /// The point must be signalled.
    Signalled(Fence),
    /// The point's request must have started.
    Started(Fence),
}

/// Who comes first among equals.
pub(crate) mod rank {
    /// It was running when the device moved, on the one engine it can have.
    pub const MOVED_NATIVE: u8 = 0;
    /// It was running when the device moved, on one of several.
    pub const MOVED_VIRTUAL: u8 = 1;
    /// A virtual slot's request that has not run.
    pub const FRESH_VIRTUAL: u8 = 2;
    /// All others.
    pub const REST: u8 = 3;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Behind others in its slot, or waiting for a fence.
    Queued,
    Ready,
    Running,
    /// Complete; its record is being written.
    Finishing,
}

/// The work of a lane, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    Here(Box<Execution>),
    /// A worker has it.
    Out,
    Done,
}

impl Work {
    fn weight(&self) -> usize {
        match self {
            Work::Here(execution) => execution.weight(),
            Work::Out | Work::Done => 0,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lane {
    /// Engines that may run it, in the order of the client.
    pub siblings: Vec<u8>,
    /// Those of them that may be chosen: execution mask and bonds.
    pub allowed: EngineSet,
    pub work: Work,
    pub engine: Option<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub fence: Fence,
    /// Address space of its context when it was submitted.
    pub space: u32,
    pub priority: i32,
    /// The place among equals: first by [`rank`], then by age.
    pub rank: u8,
    pub order: u64,
    pub wait: Wait,
    /// The request before it on a single timeline.
    pub after: Option<Fence>,
    pub lanes: Vec<Lane>,
    /// The slot chooses among engines.
    pub chooses: bool,
    pub phase: Phase,
    /// The submission itself: where and how its end is told.
    pub submission: Descriptor,
    /// It is to end with this error as soon as no worker has a part of it.
    pub doomed: Option<Errno>,
    /// Missed pings, and when the next one is due: kept when a request that may not be pre-empted moves.
    pub pings: Option<(u8, u64)>,
    /// Error of a request that is finishing.
    pub result: Option<Errno>,
}

impl Request {
    pub(crate) fn key(&self, id: u64) -> Key {
        (-self.priority, self.rank, self.order, id)
    }

    /// What it weighs in saved state, in bytes, at most.
    pub(crate) fn weight(&self) -> usize {
        self.lanes.iter().map(|lane| REQUEST_WEIGHT + lane.work.weight()).sum()
    }

    fn out(&self) -> bool {
        self.lanes.iter().any(|lane| lane.work == Work::Out)
    }

    fn preemptible(&self) -> bool {
        self.lanes.iter().all(|lane| match &lane.work {
            Work::Here(execution) => execution.preemptible(),
            Work::Out => false,
            Work::Done => true,
        })
    }
}

/// Order of ready requests.
pub(crate) type Key = (i32, u8, u64, u64);

/// A lane on an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Running {
    pub request: u64,
    pub lane: usize,
    /// Since when it occupies the engine.
    pub since: u64,
    /// Until when busy time has been counted.
    pub counted: u64,
    /// It gives way to equals from now on.
    pub yielding: bool,
    /// It waits for memory: no worker needs to look before.
    pub not_before: u64,
    /// Since when it is asked to give way and does not.
    pub wanted: Option<u64>,
    /// Pings missed.
    pub missed: u8,
    pub next_ping: u64,
    /// Since when a ping is asking.
    pub pinged: Option<u64>,
}

#[derive(Clone, Debug)]
pub(crate) struct Engine {
    pub id: EngineId,
    pub worker: usize,
    pub tunables: Tunables,
    pub running: Option<Running>,
    pub busy: u64,
    pub resets: u64,
}

/// Something to be written to a client's memory when the lock is free: the end of a request, or of a refused submission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Effect {
    pub space: u32,
    pub submission: Descriptor,
    pub record: Completion,
    /// The request that is signalled afterwards.
    pub request: Option<u64>,
}

/// How a fence stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FenceState {
    /// Not signalled.
    Pending,
    /// Signalled; the work is done.
    Signalled,
    /// Signalled; the work is not done.
    Failed(Errno),
}

/// The whole state of the scheduler.
pub(crate) struct Core {
    pub catalogue: Catalogue,
    pub engines: Vec<Engine>,
    pub contexts: BTreeMap<u32, Context>,
    pub requests: BTreeMap<u64, Request>,
    pub ready: BTreeSet<Key>,
    /// Oldest requests of their slots that wait for a fence.
    pub blocked: BTreeSet<u64>,
    pub effects: VecDeque<Effect>,
    /// Effects that somebody is writing.
    pub writing: usize,
    /// The latest point of each single timeline.
    pub singles: BTreeMap<u32, Option<Fence>>,
    /// Timelines of contexts that are gone.
    pub remembered: VecDeque<Context>,
    pub next_request: u64,
    pub next_order: u64,
    pub next_single: u32,
    pub generations: Vec<u16>,
    pub requests_weight: usize,
    /// Nothing is taken by workers, and nothing dispatched.
    pub stopped: bool,
    /// The device is lost.
    pub lost: bool,
    /// Rings from which nothing could be taken, because the device was full.
    pub stalled: BTreeSet<(u32, u32)>,
    /// Where new virtual slots begin: a small generator, seeded by the host.
    pub spread: u64,
    /// With which engine each worker goes on.
    pub turns: Vec<usize>,
}

impl Core {
    pub(crate) fn new(catalogue: Catalogue, binding: &[usize], workers: usize, seed: u64) -> Self {
        let engines = catalogue.engines().iter().zip(binding).map(|(id, worker)| Engine {
            id: *id,
            worker: *worker,
            tunables: Tunables::default(),
            running: None,
            busy: 0,
            resets: 0,
        });
        Self {
            engines: engines.collect(),
            catalogue,
            contexts: BTreeMap::new(),
            requests: BTreeMap::new(),
            ready: BTreeSet::new(),
            blocked: BTreeSet::new(),
            effects: VecDeque::new(),
            writing: 0,
            singles: BTreeMap::new(),
            remembered: VecDeque::new(),
            next_request: 1,
            next_order: 1,
            next_single: 1,
            generations: Vec::new(),
            requests_weight: 0,
            stopped: false,
            lost: false,
            stalled: BTreeSet::new(),
            spread: seed | 1,
            turns: vec![0; workers],
        }
    }

    /// The context, if it is open.
    pub(crate) fn open(&mut self, id: u32) -> Result<&mut Context, Refused> {
        match self.contexts.get_mut(&id) {
            Some(context) if !context.closed => Ok(context),
            _ => refuse(Errno::NoEntry, format!("there is no context {id}")),
        }
    }

    /// A context that is there, or was.
    pub(crate) fn find(&self, id: u32) -> Option<&Context> {
        self.contexts.get(&id).or_else(|| self.remembered.iter().rev().find(|context| context.id == id))
    }

    /// How a fence stands; an error if that point has never been submitted.
    pub(crate) fn fence(&self, fence: Fence) -> Result<FenceState, Refused> {
        let none = || Refused::new(Errno::NoEntry, format!("there is no fence {fence}"));
        let context = self.find(fence.context).ok_or_else(none)?;
        if fence.slot == crate::abi::CLIENT_TIMELINE {
            return Ok(match () {
                () if fence.seq <= context.client => FenceState::Signalled,
                () if context.closed => FenceState::Failed(Errno::Io),
                () => FenceState::Pending,
            });
        }
        let slot = context.slots.get(fence.slot as usize).ok_or_else(none)?;
        let timeline = &slot.timeline;
        if fence.seq == 0 || fence.seq > timeline.submitted {
            return Err(none());
        }
        Ok(match timeline.error(fence.seq) {
            _ if fence.seq > timeline.completed => FenceState::Pending,
            Some(errno) => FenceState::Failed(errno),
            None => FenceState::Signalled,
        })
    }

    /// Whether what a request waits for is there. A fence that nobody knows any more has long been signalled.
    fn satisfied(&self, wait: Wait) -> bool {
        match wait {
            Wait::Nothing => true,
            Wait::Signalled(fence) => self.fence(fence) != Ok(FenceState::Pending),
            Wait::Started(fence) => self.started(fence) || self.fence(fence) != Ok(FenceState::Pending),
        }
    }

    fn started(&self, fence: Fence) -> bool {
        let slot = self.find(fence.context).and_then(|context| context.slots.get(fence.slot as usize));
        slot.is_some_and(|slot| slot.timeline.started.0 >= fence.seq)
    }

    fn timeline(&mut self, fence: Fence) -> Option<&mut crate::context::Timeline> {
        let context = self.contexts.get_mut(&fence.context)?;
        context.slots.get_mut(fence.slot as usize).map(|slot| &mut slot.timeline)
    }

    /// What all of it would weigh when saved, in bytes, at most.
    pub(crate) fn weight(&self) -> usize {
        self.contexts.values().map(Context::weight).sum::<usize>() + self.requests_weight
    }

    /// Refuses what would make saved state too large.
    pub(crate) fn afford(&self, bytes: usize) -> Result<(), Refused> {
        if self.weight() + bytes > STATE_BUDGET {
            return refuse(Errno::NoSpace, "the device's memory for contexts is used up; destroy some");
        }
        Ok(())
    }

    /// Engines with something on them, and those wanted by something that waits: (running, queued).
    pub(crate) fn load(&self, id: u64) -> (EngineSet, EngineSet) {
        let Some(request) = self.requests.get(&id) else { return (0, 0) };
        request.lanes.iter().fold((0, 0), |(running, queued), lane| match (lane.engine, &lane.work) {
            (Some(engine), _) => (running | 1 << engine, queued),
            (None, Work::Done) => (running, queued),
            (None, _) => (running, queued | lane.allowed),
        })
    }
}
