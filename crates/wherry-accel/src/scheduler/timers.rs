//! What happens by the clock: slices, pre-emption deadlines, heartbeats.
//!
//! A heartbeat sends a ping to an occupied engine. The ping is through as soon as the engine can switch, so it is through at
//! once where the request may be pre-empted. Where not, its priority rises with each miss; when it is above that of the
//! request, the request is asked to give way, and lost at the pre-emption deadline.

use crate::error::Errno;

use super::{Core, PING_PRIORITIES, Phase};

/// Where there is no limit.
const NEVER: u64 = u64::MAX;

impl Core {
    /// The length of a slice of what is on an engine, in nanoseconds: that of the engine by the share of the slot.
    fn slice(&self, engine: usize) -> u64 {
        let slot = &self.engines[engine];
        if slot.tunables.slice == 0 {
            return NEVER;
        }
        let share = slot.running.as_ref().and_then(|running| self.requests.get(&running.request)).and_then(|request| {
            let context = self.contexts.get(&request.fence.context)?;
            let index = if context.mapped { request.fence.slot } else { engine as u32 };
            context.shares.get(&(index as u8)).copied()
        });
        slot.tunables.slice * u64::from(share.unwrap_or(100)) / 100
    }

    pub(super) fn slice_over(&self, engine: usize, now: u64) -> bool {
        let Some(running) = &self.engines[engine].running else { return false };
        now.saturating_sub(running.since) >= self.slice(engine)
    }

    /// Does what is due, then dispatches.
    pub(crate) fn poll(&mut self, now: u64) {
        if self.stopped {
            return;
        }
        for engine in 0..self.engines.len() {
            self.heartbeat(engine, now);
            let tunables = self.engines[engine].tunables;
            let Some(running) = &self.engines[engine].running else { continue };
            let asked = [running.wanted, running.pinged].into_iter().flatten().min();
            let late =
                |since: u64| tunables.preempt_timeout != 0 && now.saturating_sub(since) >= tunables.preempt_timeout;
            if asked.is_some_and(late) {
                let id = running.request;
                self.engines[engine].resets += 1;
                self.hang(id, Errno::Io, now);
            }
        }
        self.dispatch(now);
    }

    fn heartbeat(&mut self, engine: usize, now: u64) {
        let slot = &self.engines[engine];
        let period = slot.tunables.heartbeat;
        let Some(running) = slot.running.as_ref().filter(|r| period != 0 && r.next_ping <= now) else { return };
        let Some(request) = self.requests.get(&running.request) else { return };
        if request.out() {
            // A worker has it, and gives it back within one step: the next look decides.
            return;
        }
        let (through, priority) = (request.preemptible(), request.priority);
        let Some(running) = &mut self.engines[engine].running else { return };
        running.next_ping = now + period;
        if through {
            (running.missed, running.pinged) = (0, None);
            return;
        }
        let ping = PING_PRIORITIES[usize::from(running.missed).min(PING_PRIORITIES.len() - 1)];
        running.missed = running.missed.saturating_add(1);
        if ping > priority {
            running.pinged = running.pinged.or(Some(now));
        }
    }

    /// When [`poll`](Self::poll) has something to do next.
    pub(crate) fn next_event(&self) -> Option<u64> {
        if self.stopped {
            return None;
        }
        let waiting = !self.ready.is_empty();
        let of = |(index, engine): (usize, &super::Engine)| {
            let running = engine.running.as_ref()?;
            let heartbeat = (engine.tunables.heartbeat != 0).then_some(running.next_ping);
            let asked = [running.wanted, running.pinged].into_iter().flatten().min();
            let deadline = asked.filter(|_| engine.tunables.preempt_timeout != 0);
            let deadline = deadline.map(|since| since + engine.tunables.preempt_timeout);
            let end = running.since.saturating_add(self.slice(index));
            // A slice that is over already changes nothing by time.
            let slice = (waiting && end != NEVER && !running.yielding).then_some(end);
            [heartbeat, deadline, slice].into_iter().flatten().min()
        };
        self.engines.iter().enumerate().filter_map(of).min()
    }

    /// Keeps what the clock knows of running requests, before they move: pings missed, and when the next is due.
    pub(crate) fn keep_pings(&mut self) {
        for engine in &self.engines {
            if let Some(running) = &engine.running
                && let Some(request) = self.requests.get_mut(&running.request)
                && request.phase == Phase::Running
                && !request.preemptible()
            {
                request.pings = Some((running.missed, running.next_ping));
            }
        }
    }
}
