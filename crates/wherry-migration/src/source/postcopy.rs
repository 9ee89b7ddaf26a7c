//! Phase `Postcopy`: the VM runs at the destination, and what it lacks is here.
//!
//! ```text
//!   Switchover   Follow: which pages are not there yet
//!                PageService starts, then Offer
//!   Postcopy     all data channels push what follows, as one round, from where the guest faults on
//!                the urgent channel's thread answers requests beside it
//!                Complete from the destination -> Done
//!   Paused       the link is lost: a new one, Resume, what the destination lacks -> Postcopy
//!                memory was freed as it was sent, or the destination died -> Lost
//! ```
//!
//! Nobody writes this memory any more, so a page may be sent twice: what comes second finds the first and is dropped.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use wherry_memory::{GRANULE, PageSet};
use wherry_stream::message::{Body, Complete, Empty, Follow, Reason};
use wherry_stream::{Channel, ChannelKind, Closer, Frame, Meter};

use super::precopy::no_setup;
use super::round::Round;
use super::senders::Senders;
use super::window::Windows;
use super::{Running, Source};
use crate::dirty::Dirty;
use crate::error::Cause;
use crate::figures::with_complete;
use crate::journey::{EventKind, Recover};
use crate::link::printable;
use crate::ownership::{SourceInput, SourceState, Word};
use crate::predict::us;
use crate::priority::Urgent;
use crate::progress::{Phase, Postcopy};

/// Numbers in one `Follow` message.
const RUNS: usize = 1 << 16;
/// See [`let_the_guest_begin`].
const QUIET: Duration = Duration::from_micros(250);
const BEGINNING: Duration = Duration::from_millis(3);
/// How often subscribers hear of progress.
const PROGRESS: Duration = Duration::from_millis(100);
/// Between two attempts to take up a lost link: at first, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_secs(2);
/// How long a destination whose data channel has ended may take to say that it has everything.
const LAST_WORD: Duration = Duration::from_millis(300);

/// What was asked for and answered, over all links.
#[derive(Default)]
pub(super) struct Served {
    /// When the first page was pushed.
    since: OnceLock<Instant>,
    requests: AtomicU64,
    asked: AtomicU64,
    answered: AtomicU64,
}

impl Served {
    /// What the source knows while memory follows.
    fn figures(&self, remaining_pages: u64) -> Postcopy {
        Postcopy {
            duration_us: us(self.since.get_or_init(Instant::now).elapsed()),
            remaining_pages,
            remaining_bytes: remaining_pages * GRANULE,
            requests: self.requests.load(Ordering::Relaxed),
            pages_asked: self.asked.load(Ordering::Relaxed),
            pages_answered: self.answered.load(Ordering::Relaxed),
            ..Postcopy::default()
        }
    }
}

/// The thread that answers requests.
pub(super) struct PageService {
    round: Arc<Round>,
    meter: Meter,
    closer: Closer,
    thread: Option<JoinHandle<Option<Cause>>>,
}

impl PageService {
    fn start(channel: Channel, round: Arc<Round>, served: Arc<Served>) -> Result<Self, Cause> {
        let (closer, meter) = (channel.closer(), channel.writer.meter());
        let asked = round.clone();
        let thread = std::thread::Builder::new()
            .name("wherry-urgent".into())
            .spawn(move || serve(channel, &asked, &served).err())
            .map_err(|source| Cause::Os { doing: "starting the thread that answers requests", source })?;
        Ok(Self { round, meter, closer, thread: Some(thread) })
    }
}

impl PageService {
    /// Why nobody answers any more, if so: the channel is lost, or the destination asked for what there is not. Told once.
    fn ended(&mut self) -> Option<Cause> {
        let thread = self.thread.take_if(|thread| thread.is_finished())?;
        thread.join().unwrap_or_else(|_| Some(Cause::Panicked("wherry-urgent".into())))
    }
}

impl Drop for PageService {
    fn drop(&mut self) {
        self.closer.close();
        if let Some(thread) = self.thread.take()
            && let Err(panic) = thread.join()
        {
            tracing::error!(?panic, "the thread that answers requests panicked");
        }
    }
}

/// Answers until the channel ends.
fn serve(mut channel: Channel, round: &Round, served: &Served) -> Result<(), Cause> {
    // A guest waits for each answer, and the push has all the time.
    let _urgent = Urgent::new();
    // Nothing is asked for as long as nothing is missed.
    channel.reader.set_idle_limit(Duration::from_secs(24 * 3600));
    loop {
        let doing = "waiting for requests";
        match channel.reader.read_frame().map_err(|source| Cause::Stream { doing, source })? {
            Frame::Request(extents) => {
                served.requests.fetch_add(1, Ordering::Relaxed);
                served.asked.fetch_add(extents.iter().map(|e| u64::from(e.count)).sum(), Ordering::Relaxed);
                for extent in &extents {
                    round.answer(&mut channel, extent)?;
                    served.answered.fetch_add(extent.count.into(), Ordering::Relaxed);
                }
                if let Some(extent) = extents.first() {
                    round.steer(wherry_memory::BlockId(extent.block), extent.first);
                }
            }
            other => {
                let what = format!("{:?} frame on the urgent channel", other.kind());
                return Err(Cause::Protocol { peer: "destination", what });
            }
        }
    }
}

impl Source {
    /// Says what follows, and has requests for it answered from now on.
    pub(super) fn announce(&mut self, set: Dirty) -> Result<(), Cause> {
        let control = self.host.control()?;
        for (block, set) in self.machine.ram().blocks().iter().zip(&set.0) {
            let block = u32::from(block.spec().id.0);
            let mut runs = Vec::new();
            let mut told = 0;
            for run in set.runs(0..set.limit()) {
                runs.extend([run.start - told, run.end - run.start]);
                told = run.end;
                if runs.len() >= RUNS {
                    control.send(Body::Follow(Follow { block, runs: std::mem::take(&mut runs) }))?;
                }
            }
            if !runs.is_empty() {
                control.send(Body::Follow(Follow { block, runs }))?;
            }
        }
        let bytes = set.pages() * GRANULE;
        self.journey.update(|job| {
            job.memory_remaining = bytes;
            job.data_remaining = bytes;
            job.data_total = job.data_processed + bytes;
        });
        let running = self.running.as_mut().ok_or_else(no_setup)?;
        let channel = running.urgent.take().ok_or_else(no_setup)?;
        let round = Arc::new(Round::following(&running.shared, running.rounds, set, self.options.release));
        running.service = Some(PageService::start(channel, round, running.served.clone())?);
        Ok(())
    }

    pub(super) fn postcopy(&mut self) -> Result<Phase, Cause> {
        match self.push() {
            Ok(()) => {
                self.feed(SourceInput::AllServed);
                Ok(Phase::Done)
            }
            Err(cause) => {
                tracing::warn!(%cause, "lost the destination while memory follows");
                self.feed(SourceInput::LinkLost);
                self.host.doubt = Some(cause.to_string());
                // Whoever hears of the phase hears why.
                self.journey.update(|job| job.error = Some(format!("paused: {cause}")));
                Ok(Phase::Paused)
            }
        }
    }

    /// Without a link: tries to take it up again.
    pub(super) fn paused(&mut self) -> Result<Phase, Cause> {
        let begun = Instant::now();
        let mut pause = FIRST_PAUSE;
        loop {
            if let Some(Recover::To(to)) = self.journey.take_recovery() {
                pause = FIRST_PAUSE;
                self.to = to.unwrap_or_else(|| self.to.clone());
                let peer = self.to.to_string();
                self.journey.update(|job| job.peer = peer);
            }
            let why = format!("paused: {}", self.host.doubt.as_deref().unwrap_or("the reason is not known"));
            if self.journey.job().error.as_ref() != Some(&why) {
                self.journey.tell(EventKind::Progress, |job| job.error = Some(why));
            }
            match self.reconnect() {
                Ok(lacking) => {
                    self.journey.update(|job| job.error = None);
                    self.feed(SourceInput::LinkUp);
                    if !lacking {
                        self.feed(SourceInput::AllServed);
                        return Ok(Phase::Done);
                    }
                    return Ok(Phase::Postcopy);
                }
                Err(cause @ Cause::Lost(_)) => return Err(cause),
                Err(cause) => {
                    tracing::debug!(%cause, "the link is still lost");
                    if self.options.release && begun.elapsed() >= self.options.timeouts.silent {
                        return Err(self.released());
                    }
                    if self.options.recover.is_some_and(|patience| begun.elapsed() >= patience) {
                        return Err(cause);
                    }
                    self.host.doubt = Some(cause.to_string());
                }
            }
            self.journey.nap(pause);
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    /// Memory was freed as it was sent, so there is nothing to recover from.
    fn released(&mut self) -> Cause {
        self.feed(SourceInput::PagesLost);
        Cause::Lost(format!(
            "the link was lost ({}) and memory had been freed here as it was sent, as was asked for: recovery is refused",
            self.host.doubt.as_deref().unwrap_or("unknown")
        ))
    }

    /// A new connection for the same attempt; what the destination lacks then follows as another round. `false` if it
    /// lacks nothing: the link was lost with its last word.
    fn reconnect(&mut self) -> Result<bool, Cause> {
        let Some(owner) = &self.owner else { return Err(no_setup()) };
        let attempt = *owner.owner().attempt();
        let running = self.running.as_mut().ok_or_else(no_setup)?;
        let channels = self.journey.job().channels.max(1) as u16;
        // Their threads may still be blocked in what is no longer a link.
        running.service = None;
        running.senders = Senders::new(vec![])?;
        self.host.control = None;
        let mut control = self.connect_control(attempt.to_about())?;
        control.send(Body::Resume(Empty {}))?;
        let to = self.to.clone();
        let mut set = Dirty::none(self.machine.ram());
        let mut told = vec![0; set.0.len()];
        loop {
            match control.next("say what it lacks", self.options.timeouts.silent, Duration::ZERO)? {
                Body::Follow(follow) => {
                    let mut blocks = self.machine.ram().blocks().iter();
                    let index = blocks.position(|b| u32::from(b.spec().id.0) == follow.block);
                    let index = index.ok_or_else(|| control.protocol(format!("RAM block {}", follow.block)))?;
                    take_follow(&mut set.0[index], &mut told[index], &follow.runs)
                        .map_err(|what| control.protocol(what))?;
                }
                Body::Running(_) => {}
                Body::Complete(complete) => {
                    self.host.control = Some(control);
                    self.report(&complete);
                    return Ok(false);
                }
                Body::Resumed(Empty {}) => break,
                Body::Unknown(reason) => {
                    let reason = printable(&reason.text);
                    self.hear(Word::of(&Body::Unknown(Reason { text: reason.clone() })).ok_or_else(no_setup)?);
                    return Err(match self.state() {
                        Some(SourceState::Gone) => Cause::Lost(format!("{to} answers: {reason}")),
                        _ => Cause::Peer { peer: "destination", reason },
                    });
                }
                Body::Ended(reason) => {
                    self.ended = Some(printable(&reason.text));
                    self.host.control = Some(control);
                    return Ok(false);
                }
                other => return Err(control.protocol(format!("{} in answer to Resume", other.kind()))),
            }
        }
        if self.options.release && set.pages() > 0 {
            return Err(self.released());
        }
        let open = |kind, index| self.open(kind, index, attempt.id.0);
        let data = (0..channels).map(|n| open(ChannelKind::Data, n)).collect::<Result<Vec<_>, _>>()?;
        let urgent = open(ChannelKind::Urgent, 0)?;
        let running = self.running.as_mut().ok_or_else(no_setup)?;
        running.rounds += 1;
        let round = Arc::new(Round::following(&running.shared, running.rounds, set, false));
        running.senders = Senders::new(data)?;
        running.service = Some(PageService::start(urgent, round, running.served.clone())?);
        self.host.control = Some(control);
        Ok(true)
    }

    /// Sends all that follows, and returns when the destination has it.
    fn push(&mut self) -> Result<(), Cause> {
        let running = self.running.as_mut().ok_or_else(no_setup)?;
        let Some(service) = &running.service else { return Err(no_setup()) };
        let (round, served) = (service.round.clone(), running.served.clone());
        let pages = round.set.pages();
        if !std::mem::replace(&mut running.pushed, true) {
            let_the_guest_begin(&served, running.predictor.round_trip);
        }
        let channels = running.senders.len();
        let mut windows = Windows::new(running.senders.closers());
        running.senders.begin(&round, channels);
        round.release_rest()?;
        let wire = running.wire_bytes();
        let figures = served.figures(pages);
        self.journey.tell(EventKind::Progress, |job| job.postcopy = Some(figures));
        let base = self.journey.job();
        let (mut told, mut alive, mut pushing) = (Instant::now(), Instant::now(), true);
        let mut failed = None;
        let complete = loop {
            let control = self.host.control()?;
            let running = self.running.as_mut().ok_or_else(no_setup)?;
            let news = running.senders.news();
            let others = [news];
            let woken = control.wait(if pushing { &others } else { &[] }, windows.next(), Duration::ZERO)?;
            windows.look();
            if woken.other.is_some() {
                match running.senders.finished() {
                    Ok(false) => {}
                    Ok(true) => pushing = false,
                    // A destination that has everything closes its channels, perhaps before it has acknowledged all: what it
                    // says on the control channel counts.
                    Err(cause) => {
                        pushing = false;
                        failed = Some((cause, Instant::now()));
                    }
                }
            }
            if woken.control {
                match control.read()? {
                    None | Some(Body::Pong(Empty {}) | Body::Running(_)) => {}
                    // The data channels may still have acknowledgements to read; nobody needs them.
                    Some(Body::Complete(complete)) => break complete,
                    Some(Body::Ended(reason)) => {
                        self.ended = Some(printable(&reason.text));
                        return Ok(());
                    }
                    Some(other) => return Err(control.protocol(format!("{} in postcopy", other.kind()))),
                }
            }
            if failed.is_none()
                && let Some(cause) = running.service.as_mut().and_then(PageService::ended)
            {
                failed = Some((cause, Instant::now()));
            }
            if let Some((cause, at)) = failed.take() {
                if at.elapsed() >= LAST_WORD {
                    return Err(cause);
                }
                failed = Some((cause, at));
            }
            control.keep_alive(&mut alive)?;
            if self.journey.wants_recovery() {
                return Err(Cause::Recover);
            }
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                let sent = running.wire_bytes() - wire;
                let figures = served.figures(pages.saturating_sub(round.done()));
                self.journey.tell(EventKind::Progress, |job| {
                    job.data_processed = base.data_processed + sent;
                    job.memory_remaining = figures.remaining_bytes;
                    job.data_remaining = figures.remaining_bytes;
                    job.memory_postcopy_requests = figures.pages_asked;
                    job.postcopy = Some(figures);
                });
            }
        };
        let sent = self.running.as_ref().map_or(0, Running::wire_bytes).saturating_sub(wire);
        self.journey.update(|job| {
            job.data_processed = base.data_processed + sent;
            job.data_total = job.data_processed;
            job.memory_processed = base.memory_processed + round.normal() * GRANULE;
            job.memory_normal = base.memory_normal + round.normal();
            job.memory_normal_bytes = base.memory_normal_bytes + round.normal() * GRANULE;
            job.memory_constant = base.memory_constant + round.zero();
        });
        self.report(&complete);
        Ok(())
    }

    /// Takes what the destination says of its faults.
    fn report(&self, complete: &Complete) {
        let Some(running) = &self.running else { return };
        let own = running.served.figures(0);
        self.journey.update(|job| {
            job.memory_postcopy_requests = own.pages_asked;
            job.postcopy = Some(with_complete(own, complete));
        });
    }
}

/// A guest begins with a chain of faults, each behind the one before. The push leaves them the processors and the link
/// until none has come for [`QUIET`] and two round trips, or [`BEGINNING`] and twenty have passed: the push hardly notices.
fn let_the_guest_begin(served: &Served, round_trip: Duration) {
    let begun = Instant::now();
    let (quiet, most) = (QUIET + round_trip * 2, BEGINNING + round_trip * 20);
    let mut last = (served.requests.load(Ordering::Relaxed), begun);
    while begun.elapsed() < most && last.1.elapsed() < quiet {
        std::thread::sleep(QUIET / 5);
        let requests = served.requests.load(Ordering::Relaxed);
        if requests != last.0 {
            last = (requests, Instant::now());
        }
    }
}

impl Running {
    /// Bytes that have been handed to the kernel, over the data channels and the urgent one.
    fn wire_bytes(&self) -> u64 {
        self.senders.wire_bytes() + self.service.as_ref().map_or(0, |service| service.meter.bytes())
    }
}

/// Takes a message about what follows into the set of its block, from where the last one about it ended.
pub fn take_follow(set: &mut PageSet, from: &mut u64, runs: &[u64]) -> Result<(), String> {
    let (pairs, rest) = runs.as_chunks::<2>();
    if !rest.is_empty() {
        return Err("an odd number of runs".into());
    }
    for [skip, follow] in pairs {
        let start = from.checked_add(*skip);
        let end = start.and_then(|start| start.checked_add(*follow));
        let (Some(start), Some(end)) = (start, end.filter(|end| *end <= set.limit() && *follow > 0)) else {
            return Err(format!("{follow} pages after {skip} skipped from {from} on, of {}", set.limit()));
        };
        set.insert_range(start..end);
        *from = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_leave_their_block_or_are_empty_are_refused() {
        let mut set = PageSet::new(100);
        let mut from = 0;
        take_follow(&mut set, &mut from, &[10, 5, 0, 5]).unwrap();
        take_follow(&mut set, &mut from, &[70, 10]).unwrap();
        assert_eq!(set.runs(0..100).collect::<Vec<_>>(), [10..20, 90..100]);
        assert_eq!(from, 100);
        for runs in [&[0, 1][..], &[1], &[u64::MAX, 2], &[0, 0]] {
            assert!(take_follow(&mut set, &mut from, runs).is_err(), "{runs:?}");
        }
    }
}
