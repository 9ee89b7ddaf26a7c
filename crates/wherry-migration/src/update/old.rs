//! The old process: hands the machine over, or has it run on.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message;
use wherry_handover::{Channel, ChannelError, Entry, KeptId, MOST_DESCRIPTORS, RunWord, Who};

use wherry_state::StateFile;

use super::message::{self, Body, Describe, Empty, Name, Names, OLDEST, PROTOCOL, Running, State};
use super::{ATTEMPT, Keep, RAM, UpdateError, UpdateOptions, WORD, check_cause};
use crate::error::Cause;
use crate::journey::{EventKind, Journey};
use crate::link::printable;
use crate::predict::us;
use crate::priority::Urgent;
use crate::progress::{Blackout, Job, Phase};
use crate::testpoint::{Point, reach};

/// The new process, in messages.
const PEER: &str = "new process";
/// How often a wait looks whether it was cancelled.
const TICK: Duration = Duration::from_millis(50);
/// How long the word is looked at without sleeping.
const SPIN: Duration = Duration::from_millis(20);

/// What the old process hands over, and to whom.
pub struct HandOver<'a, M: Keep + ?Sized> {
    /// The machine. It runs.
    pub machine: Arc<M>,
    /// Descriptors of the process itself, beside those of the machine.
    pub entries: Vec<Entry>,
    /// What the program says beside the machine.
    pub host: Vec<u8>,
    /// Leads to the new process.
    pub channel: Channel,
    /// Called with true before the machine stops: what else serves its users takes nothing new, until it is called with false because
    /// the machine runs on here.
    pub hold: &'a dyn Fn(bool),
}

/// Hands a machine over. On success the new process runs it: this one must end, and nothing of the machine may be dropped, since that
/// would unmap, detach or unlock what is the other one's now. On every error but [`Stuck`](UpdateError::Stuck) and
/// [`Lost`](UpdateError::Lost) the machine runs (or is paused, if the user had paused it), as if nothing had happened.
pub fn hand_over<M: Keep + ?Sized>(
    what: HandOver<'_, M>,
    options: UpdateOptions,
    journey: &Journey,
) -> Result<Job, UpdateError> {
    let mut old = Old::new(what, options, journey, OLDEST)?;
    journey.enter(Phase::Setup);
    let done = old.setup().and_then(|_| {
        journey.enter(Phase::Switchover);
        old.switch()
    });
    match done {
        Ok(()) => Ok(old.done(None)),
        Err(cause) => old.fail(cause),
    }
}

/// The old process on its way, by whatever way the new program comes to run the machine.
pub(super) struct Old<'a, M: Keep + ?Sized> {
    pub(super) machine: Arc<M>,
    pub(super) entries: Vec<Entry>,
    host: Vec<u8>,
    channel: Channel,
    hold: &'a dyn Fn(bool),
    pub(super) options: UpdateOptions,
    pub(super) journey: Journey,
    word: RunWord,
    /// The oldest version of the protocol in which this can be done.
    least: u32,
    /// What was sent, by its number in the registry.
    sent: BTreeMap<KeptId, u64>,
    drained: bool,
    stopped: bool,
    pub(super) blackout: Blackout,
}

impl<'a, M: Keep + ?Sized> Old<'a, M> {
    pub(super) fn new(
        what: HandOver<'a, M>,
        options: UpdateOptions,
        journey: &Journey,
        least: u32,
    ) -> Result<Self, UpdateError> {
        journey.update(|job| {
            *job = Job { role: "source".into(), mode: "update".into(), peer: PEER.into(), ..Job::default() };
        });
        let HandOver { machine, entries, host, channel, hold } = what;
        let word = RunWord::create();
        let word = word.map_err(|error| UpdateError::RunsHere(Cause::Handover(error.to_string())))?;
        Ok(Self {
            machine,
            entries,
            host,
            channel,
            hold,
            options,
            journey: journey.clone(),
            word,
            least,
            sent: BTreeMap::new(),
            drained: false,
            stopped: false,
            blackout: Blackout::default(),
        })
    }

    /// Has the new process build the machine. What was described to it.
    pub(super) fn setup(&mut self) -> Result<Describe, Cause> {
        let begun = Instant::now();
        check_cause(&*self.machine)?;
        reach(&self.journey, Point::OldConnected);
        let hello = match self.hear("say who it is", self.options.hello)? {
            Body::Hello(hello) => hello,
            other => return Err(self.unexpected(&other)),
        };
        let program = printable(&hello.program);
        let least = self.least;
        if hello.newest < least || hello.oldest > PROTOCOL || hello.oldest > hello.newest {
            return Err(Cause::Refused(vec![format!(
                "{program} speaks versions {} to {} of the update protocol, and this needs {least} to {PROTOCOL}",
                hello.oldest, hello.newest
            )]));
        }
        self.journey.update(|job| job.peer = program);
        let description = self.machine.description();
        let epoch = crate::epoch::of(&description.vm);
        let protocol = hello.newest.min(PROTOCOL);
        let described = Describe { protocol, machine: description.encode_to_vec(), host: self.host.clone(), epoch };
        self.say(Body::Describe(described.clone()))?;
        self.send_memory()?;
        self.send_kept()?;
        self.say(Body::Build(Empty {}))?;
        match self.hear("build the machine", self.options.build)? {
            Body::Built(Empty {}) => {}
            other => return Err(self.unexpected(&other)),
        }
        self.journey.update(|job| job.setup_time_us = us(begun.elapsed()));
        reach(&self.journey, Point::OldBuilt);
        Ok(described)
    }

    /// Has all that takes time before the stop done, while the guest runs; how long I/O was waited for. It cannot be cancelled after
    /// this.
    pub(super) fn drain(&mut self) -> Result<Duration, Cause> {
        let machine = self.machine.clone();
        let draining = Instant::now();
        self.drained = true;
        machine.registry().set_leaving(true);
        (self.hold)(true);
        machine.units().drain(self.options.drain)?;
        reach(&self.journey, Point::OldDrained);
        self.say(Body::Poise(Empty {}))?;
        if !self.journey.close_to_cancel() {
            return Err(Cause::Cancelled);
        }
        Ok(draining.elapsed())
    }

    /// Stops the machine, and gives its state. The blackout has begun.
    pub(super) fn stop_and_save(&mut self, stop: Instant) -> Result<StateFile, Cause> {
        let machine = self.machine.clone();
        self.stopped = true;
        machine.units().stop(self.options.stop)?;
        self.blackout.stop_us = us(stop.elapsed());
        reach(&self.journey, Point::OldStopped);
        let saving = Instant::now();
        let state = machine.units().save()?;
        // Nothing comes or goes any more.
        self.send_kept()?;
        self.blackout.state_us = us(saving.elapsed());
        reach(&self.journey, Point::OldSaved);
        Ok(state)
    }

    fn switch(&mut self) -> Result<(), Cause> {
        let _urgent = Urgent::new();
        let stall = self.drain()?;
        let stop = Instant::now();
        let state = self.stop_and_save(stop)?;
        let digest = state.digest().to_vec();
        self.word.offer(ATTEMPT);
        self.say(Body::State(State { state: state.encode_to_vec(), digest, ..State::default() }))?;
        reach(&self.journey, Point::OldOffered);
        self.await_run(stop)?;
        self.blackout.total_us = us(stop.elapsed());
        self.journey.update(|job| job.io_stall_us = us(stall));
        reach(&self.journey, Point::OldReplaced);
        Ok(())
    }

    /// Waits for the word to change. What the new process says meanwhile can only be that it failed.
    fn await_run(&mut self, stop: Instant) -> Result<(), Cause> {
        let deadline = stop + self.options.load;
        let begun = Instant::now();
        loop {
            match self.word.look() {
                Who::Offered(_) => {}
                Who::Successor(_) => return Ok(()),
                who => return Err(Cause::Lost(format!("the new process has spoilt what decides who runs: {who}"))),
            }
            let heard = if begun.elapsed() < SPIN {
                // The new process may be on this very processor, and wait for it.
                std::thread::yield_now();
                self.channel.poll()?
            } else {
                let tick = (Instant::now() + Duration::from_millis(1)).min(deadline);
                match self.channel.receive(tick, Duration::ZERO) {
                    Ok(parcel) => Some(parcel),
                    Err(ChannelError::Deadline(_)) if Instant::now() < deadline => None,
                    Err(ChannelError::Deadline(_)) => {
                        let waited = self.options.load;
                        return Err(Cause::Silent { peer: PEER, what: "load the state and run", waited });
                    }
                    Err(error) => return Err(error.into()),
                }
            };
            match heard.map(|parcel| message::read(&parcel, PEER)).transpose()? {
                None => {}
                // The word was swapped after the look.
                Some(Body::Running(running)) if matches!(self.word.look(), Who::Successor(_)) => {
                    self.note(&running);
                    return Ok(());
                }
                Some(other) => return Err(self.unexpected(&other)),
            }
        }
    }

    /// The VM is the new process's, which may have said that something is wrong with it.
    fn done(&mut self, said: Option<String>) -> Job {
        if let Some(why) = said {
            self.doubt(why);
        } else if self.blackout.load_us == 0 {
            match self.hear("say that the VM runs", self.options.hello) {
                Ok(Body::Running(running)) => self.note(&running),
                Ok(Body::Failed(failed)) => self.doubt(printable(&failed.reason)),
                Ok(other) => self.doubt(format!("it said {}", other.kind())),
                Err(cause) => self.doubt(cause.to_string()),
            }
        }
        let mut blackout = self.blackout;
        let known = blackout.stop_us + blackout.state_us + blackout.load_us + blackout.start_us;
        blackout.network_us = blackout.total_us.saturating_sub(known);
        self.journey.tell(EventKind::Phase, |job| {
            job.phase = Phase::Done;
            job.blackout = Some(blackout);
            job.downtime_us = blackout.total_us;
        });
        self.journey.job()
    }

    fn note(&mut self, running: &Running) {
        self.blackout.load_us = running.load_us;
        self.blackout.start_us = running.start_us;
    }

    /// It has taken the VM, and something is wrong with it. Nobody else can run the VM now.
    fn doubt(&self, why: String) {
        tracing::error!(why, "the new process has taken the VM over, and did not say that it runs");
        self.journey.update(|job| {
            job.error = Some(format!("the new process has taken the VM over, and did not say that it runs: {why}"));
        });
    }

    /// Ends an update that failed: the VM runs on here, unless the new process runs it.
    fn fail(mut self, cause: Cause) -> Result<Job, UpdateError> {
        match self.word.look() {
            Who::Owner => {}
            // From here on the new one cannot any more, whatever it does.
            _ => match self.word.take_back(ATTEMPT) {
                Ok(()) => {}
                Err(Who::Successor(_)) => {
                    // It may have said what is wrong before the word was looked at.
                    let said = if let Cause::Peer { reason, .. } = cause { Some(reason) } else { None };
                    return Ok(self.done(said));
                }
                Err(who) => return Err(self.end(UpdateError::Lost(format!("{cause}; {who}")))),
            },
        }
        Err(self.undo(cause))
    }

    /// The machine is this process's: it goes on.
    pub(super) fn undo(&self, cause: Cause) -> UpdateError {
        self.machine.registry().set_leaving(false);
        let units = self.machine.units();
        let mut undo = None;
        if self.stopped
            && let Err(error) = units.start()
        {
            undo = Some(error.to_string());
        }
        if self.drained
            && let Err(error) = units.undrain()
        {
            undo.get_or_insert(error.to_string());
        }
        (self.hold)(false);
        self.journey.open_to_cancel();
        let error = match (undo, cause) {
            (Some(undo), cause) => UpdateError::Stuck { cause: cause.into(), undo },
            (None, Cause::Refused(reasons)) => UpdateError::Refused(reasons),
            (None, Cause::Cancelled) => UpdateError::Cancelled,
            (None, cause) => UpdateError::RunsHere(cause),
        };
        self.end(error)
    }

    fn end(&self, error: UpdateError) -> UpdateError {
        tracing::warn!(%error, "update ended");
        let phase = if matches!(error, UpdateError::Cancelled) { Phase::Cancelled } else { Phase::Failed };
        self.journey.tell(EventKind::Phase, |job| {
            job.phase = phase;
            job.error = Some(error.to_string());
        });
        error
    }

    pub(super) fn unexpected(&self, body: &Body) -> Cause {
        match body {
            Body::Failed(failed) => Cause::Peer { peer: PEER, reason: printable(&failed.reason) },
            Body::Refused(refused) => Cause::Refused(refused.reasons.iter().map(|reason| printable(reason)).collect()),
            other => Cause::Protocol { peer: PEER, what: format!("{} out of turn", other.kind()) },
        }
    }

    pub(super) fn say(&self, body: Body) -> Result<(), Cause> {
        Ok(self.channel.send(body.tag(), &body.encode(), &[], Instant::now() + self.options.load)?)
    }

    pub(super) fn hear(&mut self, what: &'static str, limit: Duration) -> Result<Body, Cause> {
        let deadline = Instant::now() + limit;
        loop {
            if self.journey.is_cancelled() {
                return Err(Cause::Cancelled);
            }
            let tick = deadline.min(Instant::now() + TICK);
            match self.channel.receive(tick, Duration::ZERO) {
                Ok(parcel) => return message::read(&parcel, PEER),
                Err(ChannelError::Deadline(_)) if Instant::now() < deadline => {}
                Err(ChannelError::Deadline(_)) => return Err(Cause::Silent { peer: PEER, what, waited: limit }),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn send_descriptors(&self, all: &[(KeptId, &dyn AsFd)]) -> Result<(), Cause> {
        for some in all.chunks(MOST_DESCRIPTORS) {
            let body = Body::Kept(names(some.iter().map(|(id, _)| id)));
            let fds: Vec<_> = some.iter().map(|(_, fd)| fd.as_fd()).collect();
            self.channel.send(body.tag(), &body.encode(), &fds, Instant::now() + self.options.load)?;
        }
        Ok(())
    }

    fn send_memory(&self) -> Result<(), Cause> {
        let blocks = self.machine.ram().blocks();
        let fds: Vec<_> = blocks.iter().map(|block| block.fd()).collect();
        let mut all: Vec<(KeptId, &dyn AsFd)> = vec![(KeptId::new(WORD, 0), &self.word)];
        for (block, fd) in blocks.iter().zip(&fds) {
            all.push((KeptId::new(RAM, block.spec().id.0.into()), fd));
        }
        self.send_descriptors(&all)
    }

    /// Sends what goes over and was not sent yet, and names what was sent and does not go over any more.
    fn send_kept(&mut self) -> Result<(), Cause> {
        let now = self.machine.registry().list();
        let entries = || self.entries.iter().chain(&now);
        let new: Vec<(KeptId, &dyn AsFd)> = entries()
            .filter(|entry| self.sent.get(&entry.id) != Some(&entry.serial))
            .map(|entry| (entry.id.clone(), entry as &dyn AsFd))
            .collect();
        self.send_descriptors(&new)?;
        let stays = |id: &KeptId| entries().any(|entry| entry.id == *id);
        let gone: Vec<KeptId> = self.sent.keys().filter(|id| !stays(id)).cloned().collect();
        if !gone.is_empty() {
            self.say(Body::Gone(names(&gone)))?;
        }
        self.sent = entries().map(|entry| (entry.id.clone(), entry.serial)).collect();
        Ok(())
    }
}

pub(super) fn names<'a>(ids: impl IntoIterator<Item = &'a KeptId>) -> Names {
    let name = |id: &KeptId| Name { name: id.name.clone(), index: id.index };
    Names { names: ids.into_iter().map(name).collect() }
}
