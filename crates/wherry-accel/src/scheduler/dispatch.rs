//! The late, greedy choice.
//!
//! Ready requests are looked at in their order: higher priorities first; among equals fresh virtual ones before native
//! ones, then by age. Each takes what is idle, or what must give way: a request of lower priority, or one of the same
//! whose slice is over. One that may not be pre-empted is *wanted*, and has until a deadline (see [`super::timers`]).
//!
//! A parallel request takes all its engines at once or none. While it waits for some, it reserves the others against
//! those after it; otherwise single requests could keep it from ever running.

use crate::map::{EngineSet, set_of};

use super::{Core, Phase, Running, Work, rank};

/// What an engine is to a request that looks for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Offer {
    Idle,
    /// Its request gives way now.
    Yields,
    /// Its request will give way, or can be asked to: `true` if it must be asked.
    Later(bool),
}

/// What was found for a request.
enum Choice {
    /// An engine for each lane that needs one: (lane, engine).
    Start(Vec<(usize, u8)>),
    /// Nothing now.
    Wait {
        /// Not for those after it.
        reserve: EngineSet,
        /// Engines whose request is to be asked to give way.
        ask: EngineSet,
    },
}

impl Core {
    /// Puts ready requests onto engines until nothing changes.
    pub(crate) fn dispatch(&mut self, now: u64) {
        if self.stopped {
            return;
        }
        loop {
            let (started, wanted) = self.pass(now);
            if !started {
                self.note_wanted(wanted, now);
                return;
            }
        }
    }

    /// One look at all ready requests. Ends early, to begin anew, when one was started that others may wait for.
    fn pass(&mut self, now: u64) -> (bool, EngineSet) {
        let all: EngineSet = set_of(&(0..self.engines.len() as u8).collect::<Vec<_>>());
        let (mut reserved, mut wanted): (EngineSet, EngineSet) = (0, 0);
        let mut after = None;
        while let Some(key) = match after {
            None => self.ready.first().copied(),
            Some(key) => self.ready.range((std::ops::Bound::Excluded(key), std::ops::Bound::Unbounded)).next().copied(),
        } {
            after = Some(key);
            if self.engines.iter().all(|engine| engine.running.is_some()) && reserved == all {
                break;
            }
            match self.choose(key.3, reserved, now) {
                Choice::Start(lanes) => {
                    self.start(key.3, &lanes, now);
                    return (true, 0);
                }
                Choice::Wait { reserve, ask } => {
                    reserved |= reserve;
                    wanted |= ask;
                }
            }
        }
        (false, wanted)
    }

    fn choose(&self, id: u64, reserved: EngineSet, now: u64) -> Choice {
        let request = &self.requests[&id];
        let affinity = self
            .contexts
            .get(&request.fence.context)
            .and_then(|context| context.slots.get(request.fence.slot as usize))
            .and_then(|slot| slot.timeline.affinity);
        let needed: Vec<usize> = (0..request.lanes.len())
            .filter(|lane| request.lanes[*lane].work != Work::Done && request.lanes[*lane].engine.is_none())
            .collect();
        let (mut chosen, mut held, mut ask, mut hopeless) = (Vec::new(), 0, 0, false);
        for lane in needed {
            let entry = &request.lanes[lane];
            // Affinity first, then the client's order from where the slot begins.
            let begin = affinity.and_then(|engine| entry.siblings.iter().position(|e| *e == engine)).unwrap_or(0);
            let turn = entry.siblings[begin..].iter().chain(&entry.siblings[..begin]);
            let candidates = turn.filter(|engine| (entry.allowed & !reserved) >> **engine & 1 == 1);
            let offers = candidates.filter_map(|engine| Some((self.offer(*engine, request.priority, now)?, *engine)));
            let mut offers: Vec<_> = offers.collect();
            // Stable: among equal offers the preferred one stays first; among those that yield, the longest there.
            offers.sort_by_key(|(offer, engine)| match offer {
                Offer::Yields => (*offer, self.placed(*engine)),
                _ => (*offer, (0, 0)),
            });
            match offers.first() {
                Some((Offer::Idle | Offer::Yields, engine)) => chosen.push((lane, *engine)),
                Some((Offer::Later(must_ask), engine)) => {
                    held |= 1 << engine;
                    if *must_ask {
                        ask |= 1 << engine;
                    }
                }
                None => hopeless = true,
            }
        }
        if held == 0 && !hopeless {
            return Choice::Start(chosen);
        }
        let gang = request.lanes.len() > 1 && !hopeless;
        let reserve = if gang { chosen.iter().fold(held, |set, (_, engine)| set | 1 << engine) } else { 0 };
        Choice::Wait { reserve, ask }
    }

    /// Priority of what is on an engine, and since when it is there.
    fn placed(&self, engine: u8) -> (i32, u64) {
        let running = self.engines[usize::from(engine)].running.as_ref();
        running.map_or((0, 0), |r| (self.requests.get(&r.request).map_or(0, |request| request.priority), r.since))
    }

    fn offer(&self, engine: u8, priority: i32, now: u64) -> Option<Offer> {
        let slot = &self.engines[usize::from(engine)];
        let Some(running) = &slot.running else { return Some(Offer::Idle) };
        let request = self.requests.get(&running.request)?;
        if request.priority > priority {
            return None;
        }
        let over = request.priority < priority || running.yielding || self.slice_over(usize::from(engine), now);
        // What a worker has counts as not pre-emptible: it comes back within one step.
        Some(match (over, request.preemptible()) {
            (true, true) => Offer::Yields,
            (true, false) => Offer::Later(true),
            (false, _) => Offer::Later(false),
        })
    }

    /// Takes the engines, from whoever gives way on them.
    fn start(&mut self, id: u64, lanes: &[(usize, u8)], now: u64) {
        for (_, engine) in lanes {
            if let Some(running) = &self.engines[usize::from(*engine)].running {
                self.displace(running.request, now);
            }
        }
        let Some(request) = self.requests.get_mut(&id) else { return };
        let key = request.key(id);
        request.phase = Phase::Running;
        let (missed, next_ping) = request.pings.take().unwrap_or((0, 0));
        let fence = request.fence;
        for (lane, engine) in lanes {
            request.lanes[*lane].engine = Some(*engine);
            let slot = &mut self.engines[usize::from(*engine)];
            let next_ping = if next_ping == 0 { now + slot.tunables.heartbeat } else { next_ping };
            slot.running = Some(Running {
                request: id,
                lane: *lane,
                since: now,
                counted: now,
                yielding: false,
                not_before: 0,
                wanted: None,
                missed,
                next_ping,
                pinged: None,
            });
        }
        self.ready.remove(&key);
        if let [(_, engine)] = lanes
            && let Some(timeline) = self.timeline(fence)
        {
            timeline.affinity = Some(*engine);
        }
        self.note_started(id);
    }

    /// Puts a running request back among the ready ones. If it gave way to equals it is now the last of them; if to a
    /// higher priority, it keeps its place.
    fn displace(&mut self, id: u64, now: u64) {
        let over = self.requests.get(&id).is_some_and(|request| {
            let engines = request.lanes.iter().filter_map(|lane| lane.engine);
            engines.into_iter().any(|engine| {
                let engine = usize::from(engine);
                self.slice_over(engine, now) || self.engines[engine].running.as_ref().is_some_and(|r| r.yielding)
            })
        });
        self.vacate(id, now);
        let order = self.next_order;
        let Some(request) = self.requests.get_mut(&id) else { return };
        request.phase = Phase::Ready;
        if over {
            self.next_order += 1;
            (request.rank, request.order) = (rank::REST, order);
        }
        let key = request.key(id);
        self.ready.insert(key);
    }

    /// Notes since when each engine's request is asked to give way.
    fn note_wanted(&mut self, wanted: EngineSet, now: u64) {
        for (index, engine) in self.engines.iter_mut().enumerate() {
            if let Some(running) = &mut engine.running {
                running.wanted = match wanted >> index & 1 == 1 {
                    true => running.wanted.or(Some(now)),
                    false => None,
                };
            }
        }
    }
}
