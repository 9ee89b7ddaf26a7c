//! From the device's state to what is saved.

use crate::abi::Fence;
use crate::context::{Context, Ring, SlotState};
use crate::device::Device;
use crate::engines::Progress;
use crate::error::Errno;
use crate::map::Slot;
use crate::program::Machine;
use crate::scheduler::{Core, Effect, Lane, Phase, Request, Wait, Work, rank};
use crate::work::{Execution, Next};

use super::saved::*;

impl Device {
    /// The state of a device that has come to rest.
    pub fn save(&self) -> SavedDevice {
        let time = self.now();
        let keys = self.keys().wrapped().into_iter();
        let keys = keys.map(|(handle, kind, wrapped)| SavedKey { handle, kind: kind as u32, wrapped }).collect();
        let registers = Some(self.registers());
        let mut core = self.locked();
        (0..core.engines.len()).for_each(|engine| core.count(engine, time));
        let state = core.save(time);
        SavedDevice { keys, registers, ..state }
    }
}

impl Core {
    fn save(&self, time: u64) -> SavedDevice {
        let engine = |e: &crate::scheduler::Engine| SavedEngine {
            class: e.id.class.into(),
            instance: e.id.instance.into(),
            slice: e.tunables.slice,
            preempt_timeout: e.tunables.preempt_timeout,
            heartbeat: e.tunables.heartbeat,
            busy: e.busy,
            resets: e.resets,
        };
        let single =
            |(number, latest): (&u32, &Option<Fence>)| SavedSingle { number: *number, latest: latest.map(fence) };
        SavedDevice {
            time,
            engines: self.engines.iter().map(engine).collect(),
            contexts: self.contexts.values().map(|c| context(c, time)).collect(),
            remembered: self.remembered.iter().map(|c| context(c, time)).collect(),
            requests: self.requests.iter().map(|(id, r)| request(*id, r, time)).collect(),
            effects: self.effects.iter().map(effect).collect(),
            singles: self.singles.iter().map(single).collect(),
            keys: Vec::new(),
            generations: self.generations.iter().map(|g| u32::from(*g)).collect(),
            next_request: self.next_request,
            next_order: self.next_order,
            next_single: self.next_single,
            lost: self.lost,
            registers: None,
        }
    }
}

fn fence(fence: Fence) -> SavedFence {
    SavedFence { context: fence.context, slot: fence.slot, seq: fence.seq }
}

fn context(c: &Context, time: u64) -> SavedContext {
    // The slots of a context that is gone have timelines, and stand for nothing.
    let slot = |(index, state)| slot(c.map.slots.get(index).unwrap_or(&Slot::Gap), state);
    let share = |(index, percent): (&u8, &u32)| SavedShare { index: (*index).into(), percent: *percent };
    SavedContext {
        id: c.id,
        flags: c.flags,
        priority: c.priority,
        persistent: c.persistent,
        space: c.space,
        mapped: c.mapped,
        used: c.used,
        slots: c.slots.iter().enumerate().map(slot).collect(),
        single: c.single,
        shares: c.shares.iter().map(share).collect(),
        hang_ages: c.hangs.iter().map(|at| time.saturating_sub(*at)).collect(),
        banned: c.banned,
        closed: c.closed,
        client: c.client,
    }
}

fn slot(slot: &Slot, state: &SlotState) -> SavedSlot {
    let (kind, engines, width, bonds) = match slot {
        Slot::Gap => (0, Vec::new(), 0, Vec::new()),
        Slot::Physical(engine) => (1, vec![*engine], 0, Vec::new()),
        Slot::Balanced { siblings, bonds } => {
            let bond = |b: &crate::map::Bond| SavedBond { master: b.master.into(), engines: b.engines.clone() };
            (2, siblings.clone(), 0, bonds.iter().map(bond).collect())
        }
        Slot::Parallel { width, engines } => (3, engines.clone(), (*width).into(), Vec::new()),
    };
    let t = &state.timeline;
    let error = |(seq, errno): &(u64, Errno)| SavedError { seq: *seq, errno: errno.number().into() };
    let ring = state.ring;
    SavedSlot {
        kind,
        engines,
        width,
        bonds,
        submitted: t.submitted,
        completed: t.completed,
        started: t.started.0,
        started_on: t.started.1,
        errors: t.errors.iter().map(error).collect(),
        runtime: t.runtime,
        ring: (ring != Ring::default()).then_some(SavedRing {
            base: ring.base,
            entries: ring.entries,
            tail: ring.tail,
            head: ring.head,
            head_address: ring.head_address,
            status: ring.status,
            tail_address: ring.tail_address,
        }),
        portal: state.portal.clone(),
    }
}

/// What was running comes before what waits; what has one engine only before what has a choice.
fn moved_rank(r: &Request) -> u8 {
    match (r.phase, r.chooses) {
        (Phase::Running, false) => rank::MOVED_NATIVE,
        (Phase::Running, true) => rank::MOVED_VIRTUAL,
        _ => r.rank,
    }
}

fn request(id: u64, r: &Request, time: u64) -> SavedRequest {
    let (wait_signalled, wait_started) = match r.wait {
        Wait::Nothing => (None, None),
        Wait::Signalled(f) => (Some(fence(f)), None),
        Wait::Started(f) => (None, Some(fence(f))),
    };
    SavedRequest {
        id,
        fence: Some(fence(r.fence)),
        space: r.space,
        priority: r.priority,
        rank: moved_rank(r).into(),
        order: r.order,
        wait_signalled,
        wait_started,
        after: r.after.map(fence),
        lanes: r.lanes.iter().map(lane).collect(),
        phase: match r.phase {
            Phase::Queued => 0,
            Phase::Ready | Phase::Running => 1,
            Phase::Finishing => 2,
        },
        submission: r.submission.encode().to_vec(),
        doomed: r.doomed.map_or(0, |errno| errno.number().into()),
        pings_missed: r.pings.map(|(missed, _)| missed.into()),
        ping_in: r.pings.map_or(0, |(_, at)| at.saturating_sub(time)),
        result: r.result.map_or(0, |errno| errno.number().into()),
    }
}

fn lane(lane: &Lane) -> SavedLane {
    let work = match &lane.work {
        Work::Here(execution) => Some(work(execution)),
        // At rest nothing is out.
        Work::Out | Work::Done => None,
    };
    SavedLane { allowed: lane.allowed, work }
}

fn work(execution: &Execution) -> SavedWork {
    let (inline, at, left) = match execution.next {
        Next::Inline(_) => (true, 0, 0),
        Next::List { at, left } => (false, at, left),
    };
    let (mut bytes, mut running) = (None, None);
    match execution.current.as_ref().map(|(_, progress)| progress) {
        Some(Progress::Bytes { done, value }) => bytes = Some(SavedBytes { done: *done, value: *value }),
        Some(Progress::Program(machine)) => running = Some(program(machine)),
        Some(Progress::Start) | None => {}
    }
    let current = execution.current.as_ref().map(|(d, _)| d.encode().to_vec());
    SavedWork { inline, at, left, current, bytes, program: running }
}

fn program(machine: &Machine) -> SavedProgram {
    let frame = |f: &crate::program::Frame| [u64::from(f.back), f.kept[0], f.kept[1], f.kept[2], f.kept[3]];
    SavedProgram {
        text: machine.text.clone(),
        registers: machine.registers.to_vec(),
        pc: machine.pc,
        fuel: machine.fuel,
        frames: machine.frames.iter().flat_map(frame).collect(),
        stack: machine.stack.clone(),
    }
}

fn effect(effect: &Effect) -> SavedEffect {
    SavedEffect {
        space: effect.space,
        submission: effect.submission.encode().to_vec(),
        record: effect.record.encode().to_vec(),
        request: effect.request,
    }
}
