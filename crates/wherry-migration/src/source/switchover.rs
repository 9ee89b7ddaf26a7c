//! Phase `Switchover`: the guest stands still from the stop until it runs there (or again here), so nothing in here
//! waits, wakes or allocates without need.

use std::time::{Duration, Instant};

use wherry_memory::{GRANULE, PageSize};
use wherry_stream::message::{
    Body, ChannelTotal, Empty, Hashes, Offer, PageHashes, Poise, Running as RunningMessage, StatePiece,
};

use super::host::Host;
use super::precopy::no_setup;
use super::round::Round;
use super::{Running, Source};
use crate::dirty::Dirty;
use crate::error::Cause;
use crate::link::printable;
use crate::options::Surprise;
use crate::ownership::{Carriage, SourceInput, SourceState, Word};
use crate::predict::{remember_source, us};
use crate::priority::Urgent;
use crate::progress::Phase;
use crate::testpoint::{Point, reach};
use crate::verify;

/// The last pages go over one channel, from this thread, if there are no more of them than this is predicted to be.
const NARROW_PAGES: u64 = 1024;
/// And no more state of units.
const NARROW_STATE: u64 = 4 << 20;
/// How long to look for an answer again and again before sleeping: longer than any answer should take.
pub(super) const SPIN: Duration = Duration::from_millis(20);
/// More pages than twice the prediction are no surprise below this.
const SURPRISE_FLOOR: u64 = 64;
/// So often is the guest resumed after a surprise.
const SURPRISES: u32 = 3;
/// A piece of state that goes in one message.
const STATE_PIECE: usize = 16 << 20;
/// Chunk hashes in one message.
const HASHES: usize = 8192;

impl Source {
    pub(super) fn switchover(&mut self) -> Result<Phase, Cause> {
        let timeouts = self.options.timeouts;
        let machine = self.machine.clone();
        let running = self.running.as_mut().ok_or_else(no_setup)?;
        let predicted = running.pending.pages();
        let follow = running.follow;
        // What goes before a switch that memory follows is a handful of pages.
        let few = predicted <= NARROW_PAGES && running.predictor.states.bytes <= NARROW_STATE;
        let narrow = few || follow;

        let _urgent = Urgent::new();
        let draining = Instant::now();
        self.host.drained = true;
        machine.units().drain(timeouts.drain)?;
        reach(&self.journey, Point::SourceDrained);
        let control = self.host.control()?;
        control.send(Body::Poise(Poise {
            narrow,
            round: running.rounds,
            follow,
            release: follow && self.options.release,
        }))?;
        match control.next("prepare for the switchover", timeouts.silent, SPIN)? {
            Body::Poised(Empty {}) => {}
            other => return Err(control.protocol(format!("{} in answer to Poise", other.kind()))),
        }
        // Allocated before the stop.
        let mut last = std::mem::replace(&mut running.pending, Dirty::none(machine.ram()));
        if self.journey.is_cancelled() {
            return Err(Cause::Cancelled);
        }
        let stall = draining.elapsed();

        let stop = Instant::now();
        self.stopped_at = Some(stop);
        self.host.stopped = true;
        let stopped = machine.units().stop(timeouts.stop);
        self.blackout.stop_us = us(stop.elapsed());
        // Also when a unit failed: others have stopped, and have to be started again.
        self.feed(SourceInput::Stopped);
        stopped?;
        reach(&self.journey, Point::SourceStopped);

        // Devices may have written while they came to rest, so every source is asked once more.
        let pages_begun = Instant::now();
        let running = self.running.as_mut().ok_or_else(no_setup)?;
        running.tracker.collect(&mut last)?;
        let pages = last.pages();
        if !follow && self.surprised(pages, predicted) {
            return self.another_round(last, pages, predicted);
        }
        let running = self.running.as_mut().ok_or_else(no_setup)?;
        running.rounds += 1;
        let (normal, zero, sent) = if follow {
            let hot = self.take_hot(&mut last);
            let running = self.running.as_mut().ok_or_else(no_setup)?;
            let sent = running.send_last_alone(hot)?;
            running.rounds += 1;
            self.announce(last)?;
            sent
        } else if narrow && pages <= 4 * NARROW_PAGES {
            running.send_last_alone(last)?
        } else {
            let (round, sent) = running.send_last_wide(&mut self.host, &self.journey, last)?;
            (round.normal(), round.zero(), sent)
        };
        self.blackout.last_pages_us = us(pages_begun.elapsed());
        reach(&self.journey, Point::SourceLastPages);

        let saving = Instant::now();
        let state = machine.units().save()?;
        let digest = state.digest();
        let mut bytes = prost::Message::encode_to_vec(&state);
        self.blackout.state_us = us(saving.elapsed());
        let source_cost = Duration::from_micros(self.blackout.stop_us + self.blackout.state_us);
        reach(&self.journey, Point::SourceSaved);

        if self.options.verify {
            self.send_hashes()?;
        }
        let running = self.running.as_mut().ok_or_else(no_setup)?;
        let control = self.host.control()?;
        let mut pieces = 0;
        while bytes.len() - pieces > STATE_PIECE {
            let piece = bytes[pieces..pieces + STATE_PIECE].to_vec();
            pieces += STATE_PIECE;
            control.send(Body::StatePiece(StatePiece { bytes: piece }))?;
        }
        bytes.drain(..pieces);
        let offer = Offer {
            state: bytes,
            digest: digest.to_vec(),
            channels: running.totals(),
            stopped_us: us(stop.elapsed()),
            rounds: running.rounds,
            follow,
        };
        self.host.offer = Some(offer);
        self.feed(SourceInput::Offer(if follow { Carriage::PagesFollow } else { Carriage::Whole }));
        reach(&self.journey, Point::SourceOffered);

        let load = if self.options.verify { timeouts.load * 4 } else { timeouts.load };
        let ready = self.await_ready(load)?;
        self.blackout.load_us = ready.load_us;
        self.loads = ready.units;
        reach(&self.journey, Point::SourceReady);
        // A link that is known to be gone need not become a doubt.
        let control = self.host.control()?;
        if control.wait(&[], Instant::now(), Duration::ZERO)?.control
            && let Some(other) = control.read()?
        {
            return Err(control.protocol(format!("{} after Ready", other.kind())));
        }
        if !self.journey.close_to_cancel() {
            return Err(Cause::Cancelled);
        }
        // Locks released, run recorded, destination told: the state machine does all three, or none of them lasts.
        self.hear(Word::Ready);
        match self.state() {
            Some(SourceState::RunRecorded) => {}
            _ => {
                self.journey.open_to_cancel();
                return Err(self.host.trouble("giving the VM away"));
            }
        }
        reach(&self.journey, Point::SourceRun);
        let phase = self.await_running();

        // The guest runs there, or nobody knows; from here on time does not matter any more.
        remember_source(source_cost);
        self.journey.update(|job| {
            job.io_stall_us = us(stall);
            job.memory_normal += normal;
            job.memory_normal_bytes += normal * GRANULE;
            job.memory_processed += normal * GRANULE;
            job.memory_constant += zero;
            job.data_processed += sent;
            if !follow {
                job.data_total = job.data_processed;
                job.memory_remaining = 0;
                job.data_remaining = 0;
            }
        });
        phase
    }

    /// Takes from what is to follow the pages that the guest will touch first.
    fn take_hot(&self, last: &mut Dirty) -> Dirty {
        let mut hot = Dirty::none(self.machine.ram());
        for (id, page) in self.machine.hot_pages() {
            let mut blocks = self.machine.ram().blocks().iter();
            // Of a huge page all would have to go.
            let index = blocks.position(|b| b.spec().id == id && b.spec().page_size == PageSize::Base);
            if let Some(index) = index
                && last.0[index].remove(page)
            {
                hot.0[index].insert(page);
            }
        }
        hot
    }

    /// Whether the guest wrote so much more than predicted that the blackout would be far longer than promised.
    fn surprised(&self, pages: u64, predicted: u64) -> bool {
        let Some(running) = &self.running else { return false };
        let limit = self.journey.downtime_limit(self.options.downtime_limit);
        pages > (predicted * 2).max(SURPRISE_FLOOR)
            && running.predictor.blackout(pages * GRANULE) > limit
            && (running.surprises < SURPRISES || self.options.surprise == Surprise::Fail)
    }

    /// Lets the guest run again, and the pages that were to be the last go with the next round.
    fn another_round(&mut self, last: Dirty, pages: u64, predicted: u64) -> Result<Phase, Cause> {
        let running = self.running.as_mut().ok_or_else(no_setup)?;
        running.pending.union(&last);
        running.surprises += 1;
        if running.surprises > SURPRISES {
            return Err(Cause::Surprised { pages, predicted });
        }
        tracing::info!(pages, predicted, "more was written around the stop than predicted: another round");
        self.machine.units().start()?;
        self.host.stopped = false;
        self.host.drained = false;
        self.stopped_at = None;
        self.feed(SourceInput::AnotherRound);
        let control = self.host.control()?;
        control.send(Body::Continue(Empty {}))?;
        // Pages of the next round must not overtake this on their own channel and be taken for the last ones.
        control.round_trip()?;
        Ok(Phase::Precopy)
    }

    fn send_hashes(&mut self) -> Result<(), Cause> {
        let hashes = verify::hash_ram(self.machine.ram(), threads())?;
        let control = self.host.control()?;
        for (block, hashes) in self.machine.ram().blocks().iter().zip(&hashes) {
            for (n, part) in hashes.chunks(HASHES).enumerate() {
                let first = (n * HASHES) as u64;
                let digests = part.concat();
                control.send(Body::Hashes(Hashes { block: block.spec().id.0.into(), first, digests }))?;
            }
        }
        Ok(())
    }

    /// Waits for `Ready`, and helps the destination to find a difference if it asks.
    fn await_ready(&mut self, limit: Duration) -> Result<wherry_stream::message::Ready, Cause> {
        loop {
            let control = self.host.control()?;
            match control.next("load the state", limit, SPIN)? {
                Body::Ready(ready) => return Ok(ready),
                Body::AskPages(ask) => {
                    let block = u16::try_from(ask.block)
                        .ok()
                        .and_then(|id| self.machine.ram().block(wherry_memory::BlockId(id)));
                    let Some(block) = block else {
                        return Err(control.protocol(format!("it asks for hashes of RAM block {}", ask.block)));
                    };
                    let digests = verify::hash_pages(block, ask.chunk)?.concat();
                    control.send(Body::PageHashes(PageHashes { block: ask.block, chunk: ask.chunk, digests }))?;
                }
                other => return Err(control.protocol(format!("{} in answer to an offer", other.kind()))),
            }
        }
    }

    /// The VM is given away. Whatever is not a clear word from the destination is doubt.
    fn await_running(&mut self) -> Result<Phase, Cause> {
        let limit = self.options.timeouts.running;
        let heard = match self.host.control() {
            Ok(control) => control.next("start the VM", limit, SPIN),
            Err(cause) => Err(cause),
        };
        match heard {
            Ok(Body::Running(running)) => Ok(self.given(running)),
            Ok(Body::NotRun(reason)) => {
                self.hear(Word::NotRun);
                self.journey.open_to_cancel();
                Err(Cause::Peer { peer: "destination", reason: printable(&reason.text) })
            }
            Ok(other) => {
                self.host.doubt = Some(format!("the destination answered Run with {}", other.kind()));
                self.feed(SourceInput::Timeout);
                Ok(Phase::InDoubt)
            }
            Err(cause) => {
                self.host.doubt = Some(cause.to_string());
                self.feed(SourceInput::LinkLost);
                Ok(Phase::InDoubt)
            }
        }
    }

    /// It runs there.
    pub(super) fn given(&mut self, running: RunningMessage) -> Phase {
        let total = us(self.since_stop());
        self.hear(Word::Running);
        let b = &mut self.blackout;
        b.start_us = running.start_us.min(total);
        self.starts = running.units;
        b.total_us = total;
        let known = b.stop_us + b.last_pages_us + b.state_us + b.load_us + b.start_us;
        b.network_us = total.saturating_sub(known);
        reach(&self.journey, Point::SourceRunning);
        match self.state() {
            Some(SourceState::Serving) => {
                self.blackout_over();
                Phase::Postcopy
            }
            _ => Phase::Done,
        }
    }

    /// The blackout is over, the journey is not.
    fn blackout_over(&self) {
        let (blackout, devices) = (self.blackout, self.devices());
        self.journey.update(|job| {
            job.blackout = Some(blackout);
            job.devices = devices;
            job.downtime_us = blackout.total_us;
        });
    }
}

pub(crate) fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get()).min(8)
}

impl Running {
    /// Sends the last pages over channel 0 from this thread. Nobody waits for an acknowledgement: `Ready` is one.
    fn send_last_alone(&mut self, last: Dirty) -> Result<(u64, u64, u64), Cause> {
        let before = self.senders.wire_bytes();
        let round = Round::new(&self.shared, self.rounds, last, false).with_streams(&self.shared);
        round.send(&mut self.senders.channel(0))?;
        Ok((round.normal(), round.zero(), self.senders.wire_bytes() - before))
    }

    fn send_last_wide(
        &mut self,
        host: &mut Host,
        journey: &crate::Journey,
        last: Dirty,
    ) -> Result<(std::sync::Arc<Round>, u64), Cause> {
        let control = host.control()?;
        let (round, sent, _) = self.send_wide(control, journey, last, None)?;
        Ok((round, sent))
    }

    fn totals(&self) -> Vec<ChannelTotal> {
        (0..self.senders.len())
            .map(|n| {
                let stats = self.senders.channel(n).writer.stats();
                ChannelTotal {
                    frames: stats.frames,
                    bytes: stats.bytes,
                    checksum: stats.checksum,
                    last: stats.last_sequence.unwrap_or(0),
                }
            })
            .collect()
    }
}
