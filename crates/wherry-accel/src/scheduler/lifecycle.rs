//! From ready to signalled, and the ways in which a request ends before its time.

use crate::abi::{Completion, flag, status};
use crate::context::Context;
use crate::error::{Errno, Refused};
use crate::map::EngineSet;

use super::{Core, Effect, HANG_WINDOW, HANGS_FOR_BAN, Phase, REMEMBERED, Wait, Work};

impl Core {
    /// Looks whether a request can become ready: it must be the oldest of its slot, and its fences signalled.
    pub(crate) fn consider(&mut self, id: u64) {
        let Some(request) = self.requests.get(&id).filter(|request| request.phase == Phase::Queued) else { return };
        let (fence, wait, after, doomed) = (request.fence, request.wait, request.after, request.doomed);
        if self.timeline(fence).and_then(|timeline| timeline.queue.front().copied()) != Some(id) {
            return;
        }
        let there = self.satisfied(wait) && self.satisfied(after.map_or(Wait::Nothing, Wait::Signalled));
        if !there && doomed.is_none() {
            self.blocked.insert(id);
            return;
        }
        self.blocked.remove(&id);
        if let Wait::Started(master) = wait {
            self.bind_to_master(id, master);
        }
        if let Some(request) = self.requests.get_mut(&id) {
            request.wait = Wait::Nothing;
            request.after = None;
            request.phase = Phase::Ready;
            let key = request.key(id);
            self.ready.insert(key);
        }
        self.reap(id);
    }

    /// Looks at all requests that wait for a fence.
    pub(super) fn reconsider(&mut self) {
        for id in std::mem::take(&mut self.blocked) {
            self.consider(id);
        }
    }

    /// The client advanced a timeline of its own.
    pub(crate) fn client_advanced(&mut self) {
        self.reconsider();
    }

    /// A bonded request runs beside its master, never on the engine of that.
    fn bind_to_master(&mut self, id: u64, master: crate::abi::Fence) {
        let Some(started) = self.timeline(master).map(|timeline| timeline.started) else { return };
        if started.0 != master.seq || self.fence(master) != Ok(super::FenceState::Pending) {
            return;
        }
        let Some(request) = self.requests.get(&id) else { return };
        let fence = request.fence;
        let Some(context) = self.contexts.get(&fence.context) else { return };
        let Some(slot) = context.map.slot(fence.slot) else { return };
        let engines = (0..self.engines.len()).filter(|engine| started.1 >> engine & 1 == 1);
        let bound = engines.fold(EngineSet::MAX, |set, engine| set & slot.bonded_to(engine));
        let Some(request) = self.requests.get_mut(&id) else { return };
        // Where nothing would be left the request runs when its master has made room.
        if request.lanes.iter().all(|lane| lane.allowed & bound != 0) {
            request.lanes.iter_mut().for_each(|lane| lane.allowed &= bound);
        }
    }

    /// The request has all its engines: those that wait for its start may start.
    pub(super) fn note_started(&mut self, id: u64) {
        let Some(request) = self.requests.get(&id) else { return };
        let fence = request.fence;
        let engines = request.lanes.iter().filter_map(|lane| lane.engine).fold(0, |set, engine| set | 1 << engine);
        if let Some(timeline) = self.timeline(fence) {
            timeline.started = (fence.seq, engines);
        }
        self.reconsider();
    }

    /// Ends a request that has no work left, or is doomed and with no worker.
    pub(super) fn reap(&mut self, id: u64) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let complete = request.lanes.iter().all(|lane| lane.work == Work::Done);
        if !matches!(request.phase, Phase::Ready | Phase::Running) || request.out() {
            return;
        }
        let result = match request.doomed {
            Some(errno) => Some(errno),
            None if complete => None,
            None => return,
        };
        let key = request.key(id);
        request.phase = Phase::Finishing;
        request.result = result;
        let (d, space) = (request.submission, request.space);
        self.ready.remove(&key);
        // An operation that was submitted by itself has told its end, unless it never came to it.
        let told = !matches!(d.opcode, crate::abi::opcode::BATCH | crate::abi::opcode::PARALLEL) && result.is_none();
        if told || d.flags & (flag::COMPLETION | flag::INTERRUPT) == 0 {
            self.signal(id);
            return;
        }
        let record = Completion {
            status: if result.is_some() { status::FAILED } else { status::DONE },
            opcode: d.opcode,
            error: result.map_or(0, Errno::number),
            tag: d.tag,
            ..Completion::default()
        };
        self.effects.push_back(Effect { space, submission: d, record, request: Some(id) });
    }

    /// Signals a request whose record is written, and lets the next one of its slot come up.
    pub(crate) fn signal(&mut self, id: u64) {
        let Some(request) = self.requests.remove(&id) else { return };
        self.requests_weight -= request.weight();
        let mut next = None;
        if let Some(timeline) = self.timeline(request.fence) {
            timeline.queue.pop_front();
            timeline.signal(request.fence.seq, request.result);
            next = timeline.queue.front().copied();
        }
        if let Some(next) = next {
            self.consider(next);
        }
        self.reconsider();
        self.bury(request.fence.context);
    }

    /// Takes the engines from all lanes of a request.
    pub(super) fn vacate(&mut self, id: u64, now: u64) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let engines: Vec<u8> = request.lanes.iter_mut().filter_map(|lane| lane.engine.take()).collect();
        for engine in engines {
            self.count(engine.into(), now);
            self.engines[usize::from(engine)].running = None;
        }
    }

    /// Adds the time an engine has been occupied to what is counted.
    pub(crate) fn count(&mut self, engine: usize, now: u64) {
        let Some(running) = &mut self.engines[engine].running else { return };
        let time = now.saturating_sub(running.counted);
        running.counted = now;
        let id = running.request;
        self.engines[engine].busy += time;
        if let Some(fence) = self.requests.get(&id).map(|request| request.fence)
            && let Some(timeline) = self.timeline(fence)
        {
            timeline.runtime += time;
        }
    }

    /// Ends a request with an error, as soon as no worker has a part of it.
    pub(super) fn doom(&mut self, id: u64, errno: Errno, now: u64) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        if request.phase == Phase::Finishing {
            return;
        }
        request.doomed.get_or_insert(errno);
        if !request.out() {
            self.vacate(id, now);
        }
        self.consider(id);
        self.reap(id);
    }

    /// Dooms all requests of a context. Those behind others end in their turn.
    fn doom_all(&mut self, context: u32, errno: Errno, now: u64) {
        let Some(c) = self.contexts.get(&context) else { return };
        let all: Vec<u64> = c.slots.iter().flat_map(|slot| slot.timeline.queue.iter().copied()).collect();
        for id in all {
            self.doom(id, errno, now);
        }
    }

    /// A request hung: it is lost, and its context is blamed. Three times within the window ban it.
    pub(super) fn hang(&mut self, id: u64, errno: Errno, now: u64) {
        let Some(context) = self.requests.get(&id).map(|request| request.fence.context) else { return };
        self.blame(context, now);
        self.doom(id, errno, now);
        if self.contexts.get(&context).is_some_and(|c| c.banned) {
            self.doom_all(context, Errno::Cancelled, now);
        }
    }

    fn blame(&mut self, context: u32, now: u64) {
        let Some(c) = self.contexts.get_mut(&context) else { return };
        c.hangs.push_back(now);
        while c.hangs.front().is_some_and(|at| now.saturating_sub(*at) > HANG_WINDOW) {
            c.hangs.pop_front();
        }
        c.banned |= c.hangs.len() >= HANGS_FOR_BAN;
    }

    /// Closes a context. Its work goes on if it is persistent, and ends with EIO if not.
    pub(crate) fn close(&mut self, context: u32, now: u64) -> Result<(), Refused> {
        let c = self.open(context)?;
        c.closed = true;
        let persistent = c.persistent;
        if !persistent {
            self.doom_all(context, Errno::Io, now);
        }
        // Whoever waits for the client's own timeline waits no more: nobody can advance it.
        self.reconsider();
        self.bury(context);
        self.dispatch(now);
        Ok(())
    }

    /// Lets a closed context go when its work is done. Its fences are remembered for a while.
    fn bury(&mut self, context: u32) {
        if !self.contexts.get(&context).is_some_and(|c| c.closed && c.idle()) {
            return;
        }
        let Some(c) = self.contexts.remove(&context) else { return };
        if let Some(single) = c.single
            && !self.contexts.values().any(|other| other.single == Some(single))
        {
            self.singles.remove(&single);
        }
        if self.remembered.len() == REMEMBERED {
            self.remembered.pop_front();
        }
        let kept = Context { map: Default::default(), shares: Default::default(), hangs: Default::default(), ..c };
        self.remembered.push_back(kept);
    }

    /// The device is lost: everything ends with EIO, and nothing is taken any more.
    pub(crate) fn lose(&mut self, now: u64) {
        self.lost = true;
        for context in self.contexts.keys().copied().collect::<Vec<_>>() {
            self.doom_all(context, Errno::Io, now);
        }
    }
}
