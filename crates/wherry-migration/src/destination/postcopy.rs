//! Phase `Postcopy` of the destination: the VM runs here and lacks pages.
//!
//! ```text
//!   vCPU touches a missing page -> userfaultfd -> thread `wherry-fault` -> Asker -> Request on the urgent channel
//!   Pages on the urgent channel -> thread `wherry-follow` \
//!   Pages on the data channels  -> receiving threads      -> Place: claim, read in place, made visible by FaultService
//! ```
//!
//! A page is claimed by the first channel that brings it, before a byte of it is read; what comes later is read away.
//! When every page is there the guest maps are unregistered, and the machine is like any other.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use wherry_fault::FaultService;
use wherry_memory::{BlockId, GRANULE, PageSet, Ram};
use wherry_stream::message::{Body, Empty, Follow as FollowMessage, Reason};
use wherry_stream::{Channel, Closer, Frame, FrameReader};

use super::asker::{Asked, Asker, pages_of};
use super::doubt::{next_word, take_connection};
use super::place::Place;
use super::receivers::{News, Receivers};
use super::{Destination, no_setup};
use crate::error::Cause;
use crate::figures::{of_faults, to_complete};
use crate::journey::{EventKind, Recover};
use crate::link::TICK;
use crate::machine::Machine;
use crate::ownership::DestinationInput;
use crate::predict::us;
use crate::priority::Urgent;
use crate::progress::{Phase, Postcopy};
use crate::source::take_follow;
use crate::testpoint::{Point, reach};

/// Numbers in one `Follow` message.
const RUNS: usize = 1 << 16;
/// How often it is looked whether every page is there.
const LOOK: Duration = Duration::from_millis(5);
/// How often subscribers hear of progress.
const PROGRESS: Duration = Duration::from_millis(100);

/// What is announced to follow, as it comes in.
#[derive(Default)]
pub(super) struct Follow(Vec<(BlockId, PageSet, u64)>);

impl Follow {
    /// Takes a message.
    pub(super) fn take(&mut self, ram: &Ram, message: &FollowMessage) -> Result<(), Cause> {
        let wrong = |what: &str| Cause::Protocol {
            peer: "source",
            what: format!("pages of RAM block {} that follow: {what}", message.block),
        };
        let block = u16::try_from(message.block).ok().and_then(|id| ram.block(BlockId(id)));
        let block = block.ok_or_else(|| wrong("there is no such block"))?;
        let id = block.spec().id;
        if !self.0.iter().any(|(known, ..)| *known == id) {
            self.0.push((id, PageSet::new(block.pages()), 0));
        }
        let Some((_, set, from)) = self.0.iter_mut().find(|(known, ..)| *known == id) else { return Ok(()) };
        take_follow(set, from, &message.runs).map_err(|what| wrong(&what))
    }

    fn of(&self, id: BlockId) -> Option<&PageSet> {
        self.0.iter().find(|(known, ..)| *known == id).map(|(_, set, _)| set)
    }
}

/// What serves the guest's faults while pages follow.
pub(super) struct Following {
    faults: Arc<FaultService>,
    asker: Arc<Asker>,
    closer: Closer,
    reader: Option<JoinHandle<Option<Cause>>>,
    /// Since when the guest runs.
    since: Option<Instant>,
}

impl Following {
    fn start(faults: Arc<FaultService>, channel: Channel, place: Arc<Place>) -> Result<Self, Cause> {
        let closer = channel.closer();
        let (reader, writer) = channel.split();
        let asked = Arc::<Asked>::default();
        let asker = Arc::new(Asker::new(writer, &faults, asked.clone()));
        faults.start(asker.clone()).map_err(|e| Cause::Faults(e.to_string()))?;
        let reader = Some(spawn_reader(reader, place, asked)?);
        Ok(Self { faults, asker, closer, reader, since: None })
    }

    /// Why no more pages come on the urgent channel, if so. Told once.
    fn ended(&mut self) -> Option<Cause> {
        let reader = self.reader.take_if(|reader| reader.is_finished())?;
        reader.join().unwrap_or_else(|_| Some(Cause::Panicked("wherry-follow".into())))
    }

    /// Ends the urgent channel and its thread. Faults are still read; who asks finds nobody.
    fn disconnect(&mut self) {
        self.closer.close();
        if let Some(thread) = self.reader.take()
            && let Err(panic) = thread.join()
        {
            tracing::error!(?panic, "the thread that reads the urgent channel panicked");
        }
    }

    /// Goes on over a new urgent channel: what was asked for and has not come is asked for again.
    fn reconnect(&mut self, channel: Channel, place: Arc<Place>) -> Result<(), Cause> {
        self.disconnect();
        self.closer = channel.closer();
        let (reader, writer) = channel.split();
        let asked = self.asker.asked().clone();
        self.reader = Some(spawn_reader(reader, place, asked.clone())?);
        self.asker = Arc::new(Asker::new(writer, &self.faults, asked));
        self.faults.recover(self.asker.clone());
        Ok(())
    }
}

fn spawn_reader(reader: FrameReader, place: Arc<Place>, asked: Arc<Asked>) -> Result<JoinHandle<Option<Cause>>, Cause> {
    std::thread::Builder::new()
        .name("wherry-follow".into())
        .spawn(move || read_answers(reader, &place, &asked.answered).err())
        .map_err(|source| Cause::Os { doing: "starting the thread that reads the urgent channel", source })
}

impl Drop for Following {
    fn drop(&mut self) {
        self.disconnect();
        self.faults.stop();
    }
}

fn read_answers(mut reader: FrameReader, place: &Place, answered: &AtomicU64) -> Result<(), Cause> {
    // A guest waits for each of these pages, and those that are pushed have all the time.
    let _urgent = Urgent::new();
    reader.set_idle_limit(Duration::from_secs(24 * 3600));
    loop {
        let doing = "receiving pages that were asked for";
        match reader.read_frame().map_err(|source| Cause::Stream { doing, source })? {
            Frame::Pages { extents, .. } => {
                place.receive_from(&mut reader, &extents)?;
                answered.fetch_add(pages_of(&extents), Ordering::Relaxed);
            }
            other => {
                let what = format!("{:?} frame on the urgent channel", other.kind());
                return Err(Cause::Protocol { peer: "source", what });
            }
        }
    }
}

impl Destination<'_> {
    /// Before the state is loaded, which may touch guest memory: faults are served from now on, or, if nothing follows,
    /// there are none.
    pub(super) fn prepare_faults(&mut self, machine: &Arc<dyn Machine>) -> Result<(), Cause> {
        let failed = |e: wherry_fault::FaultError| Cause::Faults(e.to_string());
        let Ok(faults) = machine.faults() else { return Ok(()) };
        if !self.poise.follow {
            return faults.unregister_untouched().map_err(failed);
        }
        let receiving = self.receiving.as_mut().ok_or_else(no_setup)?;
        for block in machine.ram().blocks() {
            let id = block.spec().id;
            let mut whole_from = 0;
            if let Some(set) = receiving.follow.of(id) {
                for run in set.runs(0..set.limit()) {
                    faults.mark_received(id, whole_from..run.start).map_err(failed)?;
                    whole_from = run.end;
                }
            }
            faults.mark_received(id, whole_from..block.pages()).map_err(failed)?;
        }
        receiving.place.follow(faults.clone());
        if let Some(first) = receiving.first.take() {
            receiving.receivers.give_back(first);
        }
        let channel = receiving.urgent.take().ok_or_else(no_setup)?;
        receiving.following = Some(Following::start(faults.clone(), channel, receiving.place.clone())?);
        Ok(())
    }

    pub(super) fn postcopy(&mut self) -> Result<Phase, Cause> {
        if !std::mem::replace(&mut self.told, true) {
            let machine = self.host.machine.clone().ok_or_else(no_setup)?;
            self.builder.runs(&machine);
        }
        match self.await_all_pages() {
            Ok(()) => {
                self.feed(DestinationInput::AllPages);
                Ok(Phase::Done)
            }
            Err(cause @ Cause::VmEnded(_)) => Err(cause),
            Err(cause) => {
                tracing::warn!(%cause, "lost the source while memory follows");
                self.feed(DestinationInput::LinkLost);
                self.host.why = cause.to_string();
                if self.poise.release {
                    return Err(self.pages_lost(&format!(
                        "the link to the source was lost ({}), and the source has freed what it had sent, as it was asked to",
                        self.host.why
                    )));
                }
                // Whoever hears of the phase hears why.
                self.journey.update(|job| job.error = Some(format!("paused: {cause}")));
                Ok(Phase::Paused)
            }
        }
    }

    /// Without a link: the guest runs as long as it misses nothing, and the source is waited for.
    pub(super) fn paused(&mut self) -> Result<Phase, Cause> {
        let begun = Instant::now();
        self.let_go()?;
        loop {
            let Some(owner) = &mut self.owner else { return Err(no_setup()) };
            let ours = owner.owner().attempt().to_about();
            let heard = next_word(&self.listener, &self.journey, owner, &mut self.host, TICK * 4)?;
            // The guest may run on, and wait.
            let figures = self.figures();
            self.put_figures(figures);
            if let Some(why) = self.journey.has_vm_ended() {
                return Err(Cause::VmEnded(why));
            }
            self.look_elsewhere();
            match heard {
                Some((about, Body::Resume(Empty {}))) if about != ours => {
                    tracing::warn!("somebody wants to take up the link of another VM or attempt");
                    self.let_go()?;
                }
                Some((_, Body::Resume(Empty {}))) => match self.take_up() {
                    Ok(()) => {
                        self.journey.update(|job| job.error = None);
                        return Ok(Phase::Postcopy);
                    }
                    Err(cause) => {
                        tracing::debug!(%cause, "the link was lost again");
                        self.let_go()?;
                    }
                },
                Some((about, body)) => {
                    self.decided(&about, &body)?;
                }
                None if self.source_has_died() => {
                    return Err(self.pages_lost("the source's process has died with memory that the VM lacks"));
                }
                None => {}
            }
            if self.options.recover.is_some_and(|patience| begun.elapsed() >= patience) {
                return Err(Cause::Silent { peer: "source", what: "come back", waited: begun.elapsed() });
            }
        }
    }

    /// Nobody has what the VM lacks.
    fn pages_lost(&mut self, why: &str) -> Cause {
        self.feed(DestinationInput::PagesLost);
        Cause::Lost(why.into())
    }

    /// Known only of a process on this host; of any other all that can be seen is that it does not come.
    fn source_has_died(&self) -> bool {
        let Some(process) = &self.source_process else { return false };
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&now)), Ok(1))
    }

    /// Waits for the source at another place from now on, if the user wishes so.
    fn look_elsewhere(&mut self) {
        if let Some(Recover::At(listener)) = self.journey.take_recovery() {
            tracing::info!(at = %listener.local_endpoint(), "the source is waited for at another place");
            self.listener = listener;
        }
    }

    /// Ends what is left of the old link: pages that were caught half read are missing again.
    fn let_go(&mut self) -> Result<(), Cause> {
        self.host.control = self.came_back.take();
        let receiving = self.receiving.as_mut().ok_or_else(no_setup)?;
        receiving.receivers = Receivers::new(vec![], receiving.place.clone())?;
        if let Some(following) = &mut receiving.following {
            following.disconnect();
        }
        Ok(())
    }

    /// The source is back: it is told what is lacking, and sends it over new channels.
    fn take_up(&mut self) -> Result<(), Cause> {
        let machine = self.host.machine.clone().ok_or_else(no_setup)?;
        let faults = machine.faults().map_err(Cause::Faults)?.clone();
        let Some(owner) = &self.owner else { return Err(no_setup()) };
        let attempt = owner.owner().attempt().id.0;
        let control = self.host.control()?;
        for block in machine.ram().blocks() {
            let id = block.spec().id;
            let Some(states) = faults.states(id) else { continue };
            let received = states.received_set();
            let (mut runs, mut told, mut page) = (Vec::new(), 0, 0);
            let ends = received.runs(0..block.pages()).chain(std::iter::once(block.pages()..block.pages()));
            for run in ends {
                if page < run.start {
                    runs.extend([page - told, run.start - page]);
                    told = run.start;
                }
                page = run.end;
                if runs.len() >= RUNS {
                    control
                        .send(Body::Follow(FollowMessage { block: id.0.into(), runs: std::mem::take(&mut runs) }))?;
                }
            }
            if !runs.is_empty() {
                control.send(Body::Follow(FollowMessage { block: id.0.into(), runs }))?;
            }
        }
        control.send(Body::Resumed(Empty {}))?;
        let channels = self.journey.job().channels as u16;
        let (data, urgent) = self.take_channels(attempt, channels, true)?;
        let receiving = self.receiving.as_mut().ok_or_else(no_setup)?;
        receiving.receivers = Receivers::new(data, receiving.place.clone())?;
        let place = receiving.place.clone();
        if let (Some(following), Some(urgent)) = (&mut receiving.following, urgent) {
            following.reconnect(urgent, place)?;
        }
        Ok(())
    }

    fn await_all_pages(&mut self) -> Result<(), Cause> {
        self.start_mapper();
        // The first figures come with the switch.
        let mut progress = (self.tell_figures(), Instant::now());
        let mut told = Instant::now();
        loop {
            let receiving = self.receiving.as_mut().ok_or_else(no_setup)?;
            let Some(following) = &mut receiving.following else { return Err(no_setup()) };
            if following.faults.is_complete() {
                break;
            }
            // What it claimed and did not get is missing again, and perhaps nobody else brings it.
            if let Some(cause) = following.ended() {
                return Err(cause);
            }
            let control = self.host.control()?;
            let woken = control.wait(
                &[receiving.receivers.bell(), self.listener.as_fd()],
                Instant::now() + LOOK,
                Duration::ZERO,
            )?;
            if woken.other == Some(0) {
                while let Some(news) = receiving.receivers.next() {
                    match news {
                        News::Round(round) => receiving.rounds = receiving.rounds.max(round),
                        News::Failed(cause) => return Err(self.explain(cause)),
                        News::Released(channel) => receiving.receivers.give_back(*channel),
                    }
                }
            }
            if woken.other == Some(1) && self.source_comes_back()? {
                return Err(Cause::Recover);
            }
            if let Some(why) = self.journey.has_vm_ended() {
                self.host.control()?.send(Body::Ended(Reason { text: why.clone() }))?;
                return Err(Cause::VmEnded(why));
            }
            self.look_elsewhere();
            if woken.control
                && let Some((about, body)) = self.host.control()?.read_any()?
            {
                self.decided(&about, &body)?;
            }
            let control = self.host.control()?;
            if control.heard.elapsed() > control.silence_limit() {
                return Err(control.silent("send the pages that follow", control.heard.elapsed()));
            }
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                let limit = self.host.control()?.silence_limit();
                let lacking = self.tell_figures();
                if lacking != progress.0 {
                    progress = (lacking, told);
                } else if progress.1.elapsed() > limit {
                    // A sign of life is no page.
                    return Err(self.host.control()?.silent("send any of the pages that follow", progress.1.elapsed()));
                }
            }
        }
        // While the sources are still there.
        let figures = self.figures();
        let machine = self.host.machine.clone().ok_or_else(no_setup)?;
        // Before the source is told: from here on it may be gone.
        if let Ok(faults) = machine.faults() {
            faults.unregister_guest_maps().map_err(|e| Cause::Faults(e.to_string()))?;
        }
        let complete = figures.as_ref().map(to_complete).unwrap_or_default();
        self.host.complete = complete.clone();
        self.put_figures(figures);
        reach(&self.journey, Point::PostcopyComplete);
        // If this is lost, the source asks again and is told by whoever stays.
        if let Err(error) = self.host.control()?.send(Body::Complete(complete.into())) {
            tracing::debug!(%error, "the last word was lost");
        }
        Ok(())
    }

    /// Whether somebody who has connected is the source, on a new link.
    fn source_comes_back(&mut self) -> Result<bool, Cause> {
        let Some(owner) = &mut self.owner else { return Err(no_setup()) };
        let old = self.host.control.take();
        take_connection(&self.listener, &self.journey, owner, &mut self.host, Duration::ZERO)?;
        match self.host.control.take() {
            Some(control) => {
                self.came_back = Some(control);
                Ok(true)
            }
            None => {
                self.host.control = old;
                Ok(false)
            }
        }
    }

    /// The figures of the faults, as they stand.
    fn figures(&mut self) -> Option<Postcopy> {
        let machine = self.host.machine.as_ref()?;
        let following = self.receiving.as_mut()?.following.as_mut()?;
        let since = *following.since.get_or_insert_with(Instant::now);
        let asked = following.asker.asked();
        let remaining_pages: u64 = machine
            .ram()
            .blocks()
            .iter()
            .filter_map(|block| following.faults.states(block.spec().id))
            .map(|states| states.pages() - states.received_count())
            .sum();
        Some(Postcopy {
            duration_us: us(since.elapsed()),
            remaining_pages,
            remaining_bytes: remaining_pages * GRANULE,
            requests: asked.requests.load(Ordering::Relaxed),
            pages_asked: asked.pages.load(Ordering::Relaxed),
            pages_answered: asked.answered.load(Ordering::Relaxed),
            ..of_faults(&following.faults.statistics(), &machine.vcpu_threads())
        })
    }

    /// What comes by itself is mapped before it is touched. Without the mapper it is when it is touched.
    fn start_mapper(&mut self) {
        let Some(following) = self.receiving.as_mut().and_then(|r| r.following.as_mut()) else { return };
        if following.since.is_none()
            && let Err(error) = following.faults.start_mapper()
        {
            tracing::warn!(%error, "pages that come by themselves are mapped only when they are touched");
        }
    }

    fn put_figures(&self, figures: Option<Postcopy>) {
        let Some(figures) = figures else { return };
        self.journey.update(|job| {
            job.memory_postcopy_requests = figures.pages_asked;
            job.memory_remaining = figures.remaining_bytes;
            job.data_remaining = figures.remaining_bytes;
            job.postcopy = Some(figures);
        });
    }

    /// Says how it goes on; how many pages are lacking.
    fn tell_figures(&mut self) -> Option<u64> {
        self.count();
        let figures = self.figures();
        let lacking = figures.as_ref().map(|figures| figures.remaining_pages);
        self.put_figures(figures);
        self.journey.tell(EventKind::Progress, |_| {});
        if let Some(following) = self.receiving.as_ref().and_then(|r| r.following.as_ref()) {
            for trouble in following.faults.take_troubles() {
                tracing::warn!(%trouble, "serving the faults of the guest");
            }
        }
        lacking
    }
}
