//! Phase `Precopy`: round after round while the guest runs, until the predicted blackout fits its limit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use wherry_memory::GRANULE;
use wherry_stream::message::{Body, Empty};

use super::round::Round;
use super::{Running, Source};
use crate::dirty::Dirty;
use crate::error::Cause;
use crate::journey::{EventKind, Journey};
use crate::link::Control;
use crate::predict::{Verdict, us};
use crate::progress::{self, Phase};
use crate::testpoint::{Point, reach};

/// A round of so many pages is sent by this thread over one channel: waking others takes longer than sending it.
pub(super) const ALONE_PAGES: u64 = 512;
/// So many rounds are made only because units have more state to give while the guest runs: there may be no end of it.
const GROWN: u32 = 16;
/// How often subscribers hear of progress.
const PROGRESS: Duration = Duration::from_millis(100);

impl Source {
    pub(super) fn precopy(&mut self) -> Result<Phase, Cause> {
        loop {
            let running = self.running.as_mut().ok_or_else(no_setup)?;
            if running.follow {
                return Ok(Phase::Switchover);
            }
            let set = std::mem::replace(&mut running.pending, Dirty::none(self.machine.ram()));
            let pages = set.pages();
            running.rounds += 1;
            let number = running.rounds;
            reach(&self.journey, Point::SourceRound);
            let throttle = running.convergence.throttle();
            let begun = Instant::now();
            let late = running.started + self.options.deadline;
            let can_follow = running.urgent.is_some();
            let cut = Cut { wanted: can_follow, late };
            let (round, sent, left) = running.send_round(self.host.control()?, &self.journey, set, cut)?;
            let took = begun.elapsed();
            if number == 1 {
                running.tracker.enough();
            }
            running.predictor.learn(sent, took);

            let since = running.collected.elapsed();
            running.collected = Instant::now();
            running.tracker.collect(&mut running.pending)?;
            if let Some(left) = &left {
                running.pending.union(left);
            }
            if let Some(streams) = &round.streams {
                running.predictor.states = streams.outlook(running.predictor.bandwidth);
            }
            let dirty = running.pending.pages();
            let dirty_rate = (dirty as f64 / since.as_secs_f64().max(1e-6)) as u64;
            let predicted = running.predictor.blackout(dirty * GRANULE);
            let report = progress::Round {
                number,
                pages,
                zero_pages: round.zero(),
                free_pages: round.free(),
                bytes: sent,
                duration_us: us(took),
                dirty_rate,
                predicted_downtime_us: us(predicted),
                throttle,
            };
            let bps = running.predictor.bandwidth as u64;
            tracing::debug!(?report, dirty, bps, "round");
            self.journey.tell(EventKind::Round, |job| {
                job.memory_remaining = dirty * GRANULE;
                job.data_remaining = dirty * GRANULE;
                job.data_total = job.data_processed + dirty * GRANULE;
                job.memory_dirty_rate = dirty_rate;
                job.memory_bps = bps;
                job.downtime_us = us(predicted);
                // A guest that never converges must not fill memory with reports.
                if job.rounds.len() < 1000 {
                    job.rounds.push(report);
                }
            });
            reach(&self.journey, Point::SourceRoundDone);
            if self.journey.is_cancelled() {
                return Err(Cause::Cancelled);
            }

            let limit = self.journey.downtime_limit(self.options.downtime_limit);
            // A guest that can be followed need not be slowed down.
            let verdict = running.convergence.judge(
                pages * GRANULE,
                dirty * GRANULE,
                &running.predictor,
                limit,
                self.options.auto_converge && !can_follow,
            );
            if verdict == Verdict::Stop && left.is_none() {
                if !running.predictor.states.more || running.grown == GROWN {
                    return Ok(Phase::Switchover);
                }
                running.grown += 1;
            }
            let late = Instant::now() > late;
            let dirtied = (dirty_rate * GRANULE) as f64;
            let hopeless = running.convergence.is_hopeless(dirtied, &running.predictor);
            if can_follow && (late || hopeless || self.journey.wants_postcopy()) {
                tracing::info!(round = number, dirty, "the rest follows the switch");
                running.follow = true;
                return Ok(Phase::Switchover);
            }
            if late {
                return Err(Cause::NotConverged { deadline: self.options.deadline, rounds: number, predicted, limit });
            }
            let wanted = running.convergence.throttle();
            if wanted != throttle {
                tracing::info!(percent = wanted, "precopy does not converge: slowing the vCPUs down");
                self.machine.throttle(wanted);
                self.journey.update(|job| job.auto_converge_throttle = wanted);
            }
            // It changes with the load of the network.
            let seen = self.host.control()?.round_trip()?;
            running.predictor.round_trip = (running.predictor.round_trip + seen) / 2;
        }
    }
}

pub(super) fn no_setup() -> Cause {
    Cause::Option("a source that was not set up has nothing to send".into())
}

/// Whether a round may end early because the rest can follow: on demand, and when the deadline of precopy has passed.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    wanted: bool,
    late: Instant,
}

impl Default for Cut {
    fn default() -> Self {
        Self { wanted: false, late: Instant::now() }
    }
}

impl Running {
    /// Sends one round and returns when the destination has all of it: the round, the bytes it took on the wire, and what
    /// was not sent because the round was cut.
    fn send_round(
        &mut self,
        control: &mut Control,
        journey: &Journey,
        set: Dirty,
        cut: Cut,
    ) -> Result<(Arc<Round>, u64, Option<Dirty>), Cause> {
        journey.update(|job| job.memory_iteration = self.rounds);
        // A device may take its time, and the destination must hear from us meanwhile.
        let waits_for_nobody = self.shared.machine.streams().is_empty();
        let (round, sent, left) = if set.pages() <= ALONE_PAGES && waits_for_nobody {
            let before = self.senders.wire_bytes();
            let round = Arc::new(Round::new(&self.shared, self.rounds, set, true).without(self.free.take()));
            let mut channel = self.senders.channel(0);
            let guard = journey.close_on_cancel(channel.closer());
            round.send(&mut channel)?;
            round.await_acknowledgement(&mut channel)?;
            drop((guard, channel));
            (round, self.senders.wire_bytes() - before, None)
        } else {
            self.send_wide(control, journey, set, Some(cut))?
        };
        journey.update(|job| {
            job.data_processed += sent;
            job.memory_processed += round.normal() * GRANULE;
            job.memory_normal += round.normal();
            job.memory_normal_bytes += round.normal() * GRANULE;
            job.memory_constant += round.zero();
        });
        Ok((round, sent, left))
    }

    /// Sends a round over all channels, with their threads. `cut` is for one that is sent while the guest runs.
    pub(super) fn send_wide(
        &mut self,
        control: &mut Control,
        journey: &Journey,
        set: Dirty,
        cut: Option<Cut>,
    ) -> Result<(Arc<Round>, u64, Option<Dirty>), Cause> {
        let before = self.senders.wire_bytes();
        let pages = set.pages();
        let round = Round::new(&self.shared, self.rounds, set, cut.is_some()).with_streams(&self.shared);
        // Those of the first round that the guest lives through.
        let round = Arc::new(round.without(self.free.take().filter(|_| cut.is_some())));
        self.senders.begin(&round, self.senders.len());
        let left = self.conduct(control, journey, &round, pages, cut.unwrap_or_default())?;
        Ok((round, self.senders.wire_bytes() - before, left))
    }

    /// Waits until the threads have sent a round, telling of the progress and listening to the destination.
    fn conduct(
        &mut self,
        control: &mut Control,
        journey: &Journey,
        round: &Arc<Round>,
        pages: u64,
        cut: Cut,
    ) -> Result<Option<Dirty>, Cause> {
        let mut left = None;
        let mut told = Instant::now();
        let mut alive = Instant::now();
        let base = journey.job();
        let wire = self.senders.wire_bytes();
        let mut last = (told, 0);
        loop {
            let tick = Instant::now() + PROGRESS;
            let woken = control.wait(&[self.senders.news()], tick, Duration::ZERO)?;
            if woken.other.is_some() && self.senders.finished()? {
                return Ok(left);
            }
            if cut.wanted && left.is_none() && (journey.wants_postcopy() || Instant::now() > cut.late) {
                left = Some(round.cut());
            }
            if woken.control {
                match control.read()? {
                    None | Some(Body::Pong(Empty {})) => {}
                    Some(other) => return Err(control.protocol(format!("{} during a round", other.kind()))),
                }
            }
            control.keep_alive(&mut alive)?;
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                let sent = self.senders.wire_bytes() - wire;
                // What lies in the kernel has not been acknowledged by anyone.
                let acknowledged = sent.saturating_sub(self.senders.unsent());
                let bps = (acknowledged.saturating_sub(last.1)) as f64 / last.0.elapsed().as_secs_f64().max(1e-6);
                last = (Instant::now(), acknowledged);
                let remaining = pages.saturating_sub(round.done()) * GRANULE;
                journey.tell(EventKind::Progress, |job| {
                    job.data_processed = base.data_processed + sent;
                    job.memory_processed = base.memory_processed + round.normal() * GRANULE;
                    job.memory_normal = base.memory_normal + round.normal();
                    job.memory_constant = base.memory_constant + round.zero();
                    job.memory_remaining = remaining;
                    job.data_remaining = remaining;
                    job.data_total = job.data_processed + remaining;
                    job.memory_bps = bps as u64;
                });
                journey.update(|job| {
                    // The end of the round adds these up exactly.
                    job.data_processed = base.data_processed;
                    job.memory_processed = base.memory_processed;
                    job.memory_normal = base.memory_normal;
                    job.memory_constant = base.memory_constant;
                });
            }
        }
    }
}
