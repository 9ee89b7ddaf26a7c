//! What a worker does. It is the same whether threads or a test's clock drive it.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use crate::abi::Completion;
use crate::engines::{Env, SPIN_COST, Scratch};
use crate::error::{Errno, Refused};
use crate::scheduler::Task;
use crate::work::{End, end};

use super::Device;

/// Virtual nanoseconds of work between two looks at the scheduler.
const QUANTUM: u64 = 50_000;

/// A lane that has been run for a while, and what came of it.
#[derive(Debug)]
pub(crate) struct Ran {
    task: Task,
    end: End,
    /// What it cost, in nanoseconds of virtual time.
    pub cost: u64,
}

impl Device {
    /// Does what is due by the clock.
    pub(crate) fn poll(&self) -> Option<u64> {
        let now = self.now();
        let next = {
            let mut core = self.lock();
            core.poll(now);
            core.next_event()
        };
        self.flush();
        next
    }

    /// Something for a worker to do, if there is.
    pub(crate) fn take(&self, worker: usize) -> Option<Task> {
        let now = self.now();
        self.lock().take(worker, now)
    }

    /// When there will be something for a worker by the clock alone.
    pub(crate) fn next_due(&self, worker: usize) -> Option<u64> {
        self.lock().next_due(worker)
    }

    /// Runs a lane for a quantum.
    pub(crate) fn run(&self, mut task: Task, scratch: &mut Scratch) -> Ran {
        let (end, cost) = match self.space(task.space) {
            Ok(space) => {
                let now = || self.now();
                let mut env = Env { space: &*space, keys: &self.keys, now: &now, scratch };
                task.execution.run(task.context, &mut env, &*self.notify, QUANTUM)
            }
            Err(refused) => (End::Failed(refused), 0),
        };
        Ran { task, end, cost: cost.max(100) }
    }

    /// Gives a lane back.
    pub(crate) fn give_back(&self, ran: Ran) {
        let Ran { task, mut end, .. } = ran;
        let now = self.now();
        let mut core = self.lock();
        // What a program that is loaded weighs is only known now.
        if matches!(end, End::More | End::Waiting)
            && let Err(refused) = core.afford(task.execution.weight())
        {
            end = End::Failed(Refused::new(Errno::NoSpace, refused.what));
        }
        core.give_back(task, end, now + SPIN_COST, now);
        drop(core);
        self.changed.notify_all();
        self.flush();
        self.pump_rings(false);
    }

    /// Writes what is to be written to clients' memory, and signals what hangs on it.
    pub(crate) fn flush(&self) {
        loop {
            let effect = {
                let mut core = self.lock();
                if core.stopped {
                    // It stays: saved as complete, and not signalled.
                    return;
                }
                let Some(effect) = core.effects.pop_front() else { return };
                core.writing += 1;
                effect
            };
            if let Ok(space) = self.space(effect.space) {
                let record = Completion { time: self.now(), ..effect.record };
                // Nobody is left to tell when the client's own record cannot be written.
                let _ = end(&effect.submission, &record, &*space, &*self.notify);
            }
            let now = self.now();
            let mut core = self.lock();
            core.writing -= 1;
            if let Some(id) = effect.request {
                core.signal(id);
                core.dispatch(now);
            }
            drop(core);
            self.changed.notify_all();
        }
    }

    /// Comes to rest: workers take nothing more, and what they have comes back at the end of a step. False if that was not
    /// so at the deadline; then [`resume`](Self::resume) makes everything go on.
    pub fn stop(&self, deadline: Instant) -> bool {
        let mut core = self.lock();
        core.stopped = true;
        while !core.at_rest() {
            let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| *left > Duration::ZERO)
            else {
                return false;
            };
            core = self.changed.wait_timeout(core, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        core.keep_pings();
        true
    }

    /// Tells workers to take nothing more, and does not wait.
    pub fn begin_stop(&self) {
        self.lock().stopped = true;
    }

    /// Goes on after a stop.
    pub fn resume(&self) {
        let now = self.now();
        let mut core = self.lock();
        core.stopped = false;
        core.poll(now);
        drop(core);
        self.changed.notify_all();
        self.flush();
        self.pump_rings(true);
    }

    /// Waits until something may have changed, at most until `until` (device time).
    pub(crate) fn wait(&self, until: Option<u64>, stop: &dyn Fn() -> bool, worker: usize) {
        let core = self.lock();
        let now = self.now();
        // Looked at again under the lock: what came since is not slept over.
        if stop() || core.has_work(worker, now) {
            return;
        }
        match until {
            Some(at) => {
                let left = Duration::from_nanos(at.saturating_sub(now));
                drop(self.changed.wait_timeout(core, left));
            }
            None => drop(self.changed.wait(core)),
        }
    }

    /// Wakes all who wait.
    pub(crate) fn wake(&self) {
        // With the lock, so that nobody is between looking and waiting.
        drop(self.lock());
        self.changed.notify_all();
    }
}
