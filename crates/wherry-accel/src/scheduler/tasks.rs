//! What workers take and give back.

use crate::error::Errno;
use crate::work::{End, Execution};

use super::{Core, Work};

/// A lane for a worker to go on with.
#[derive(Debug)]
pub(crate) struct Task {
    pub request: u64,
    pub lane: usize,
    pub context: u32,
    pub space: u32,
    pub execution: Box<Execution>,
}

impl Core {
    /// The next piece of work for a worker: from the engines it serves, by turns.
    pub(crate) fn take(&mut self, worker: usize, now: u64) -> Option<Task> {
        if self.stopped {
            return None;
        }
        let count = self.engines.len();
        let turn = *self.turns.get(worker)?;
        let due = |engine: &usize| {
            let slot = &self.engines[*engine];
            let here = |r: &super::Running| {
                let request = self.requests.get(&r.request);
                r.not_before <= now && request.is_some_and(|q| self.may_go_on(q, r.lane))
            };
            slot.worker == worker && slot.running.as_ref().is_some_and(here)
        };
        let engine = (0..count).map(|i| (turn + i) % count).find(due)?;
        self.turns[worker] = (engine + 1) % count;
        let running = self.engines[engine].running.as_ref()?;
        let (id, lane) = (running.request, running.lane);
        let request = self.requests.get_mut(&id)?;
        match std::mem::replace(&mut request.lanes[lane].work, Work::Out) {
            Work::Here(execution) => {
                self.requests_weight -= execution.weight();
                let (context, space) = (request.fence.context, request.space);
                Some(Task { request: id, lane, context, space, execution })
            }
            other => {
                request.lanes[lane].work = other;
                None
            }
        }
    }

    /// Whether a lane is here to be taken. Lanes of a parallel request that is to give way are left where they are, so that
    /// all of them are here at once.
    fn may_go_on(&self, request: &super::Request, lane: usize) -> bool {
        let Work::Here(execution) = &request.lanes[lane].work else { return false };
        let wanted =
            |engine: u8| self.engines[usize::from(engine)].running.as_ref().is_some_and(|r| r.wanted.is_some());
        let gives_way = request.lanes.len() > 1 && request.lanes.iter().filter_map(|l| l.engine).any(wanted);
        !(gives_way && execution.preemptible())
    }

    /// When a worker has something to take next, if that is only a matter of time.
    pub(crate) fn next_due(&self, worker: usize) -> Option<u64> {
        let mine = self.engines.iter().filter(|engine| engine.worker == worker);
        mine.filter_map(|engine| engine.running.as_ref().map(|r| r.not_before)).filter(|at| *at > 0).min()
    }

    /// Takes a lane back, with how its run ended.
    pub(crate) fn give_back(&mut self, task: Task, end: End, again: u64, now: u64) {
        let Some(request) = self.requests.get_mut(&task.request) else { return };
        let lane = &mut request.lanes[task.lane];
        let engine = lane.engine;
        lane.work = match end {
            End::Done => Work::Done,
            _ => {
                self.requests_weight += task.execution.weight();
                Work::Here(task.execution)
            }
        };
        match end {
            End::More | End::Waiting => {
                let running = engine.and_then(|engine| self.engines[usize::from(engine)].running.as_mut());
                if let Some(running) = running {
                    running.not_before = if end == End::Waiting { again } else { 0 };
                    // Whoever waits for memory lets others of its priority go first.
                    running.yielding = end == End::Waiting;
                }
            }
            End::Done => {
                // Its engine is free, whatever the other lanes do.
                if let Some(engine) = engine {
                    self.count(engine.into(), now);
                    self.engines[usize::from(engine)].running = None;
                    if let Some(request) = self.requests.get_mut(&task.request) {
                        request.lanes[task.lane].engine = None;
                    }
                }
            }
            End::Failed(refused) if refused.errno == Errno::Time => self.hang(task.request, Errno::Time, now),
            End::Failed(refused) => self.doom(task.request, refused.errno, now),
        }
        let doomed = self.requests.get(&task.request).is_some_and(|r| r.doomed.is_some() && !r.out());
        if doomed {
            self.vacate(task.request, now);
        }
        self.reap(task.request);
        self.dispatch(now);
    }

    /// Whether a worker would find something, or a client's memory is to be written.
    pub(crate) fn has_work(&self, worker: usize, now: u64) -> bool {
        let mine = self.engines.iter().filter(|engine| engine.worker == worker);
        let here = |r: &super::Running| {
            r.not_before <= now && self.requests.get(&r.request).is_some_and(|q| self.may_go_on(q, r.lane))
        };
        !self.stopped && mine.filter_map(|engine| engine.running.as_ref()).any(here)
    }

    /// Whether no worker has anything, nothing is being written, and no ring is being read.
    pub(crate) fn at_rest(&self) -> bool {
        let out = |request: &super::Request| request.lanes.iter().any(|lane| lane.work == Work::Out);
        let pumping = self.contexts.values().any(|c| c.slots.iter().any(|slot| slot.pumping));
        self.writing == 0 && !pumping && !self.requests.values().any(out)
    }

    /// Whether anything is left to do at all.
    pub(crate) fn idle(&self) -> bool {
        self.requests.is_empty() && self.effects.is_empty() && self.writing == 0
    }
}
