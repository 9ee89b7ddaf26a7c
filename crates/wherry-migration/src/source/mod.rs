//! The source of a journey: it gives a running VM away.
//!
//! ```text
//! Setup -> Precopy <-> Switchover -> [Postcopy <-> Paused ->] Done
//!   |         |            |   \--> InDoubt -> Done     \--> Failed (lost)
//!   v         v            v           |
//! Cancelled / Failed (the VM runs on here) <--/
//! ```
//!
//! [`send`] is the one place that runs the phases; each is one function, in the file of its name. Whatever
//! fails ends in [`Source::fail`], where the ownership state machine ([`SourceDriver`]) says whether the VM may run here
//! again; what was done to the machine is remembered in [`Host`].

mod doubt;
mod host;
mod postcopy;
mod precopy;
mod round;
mod senders;
mod setup;
mod streams;
mod switchover;
mod window;

use std::sync::Arc;
use std::time::{Duration, Instant};

use wherry_memory::{FreePages, GRANULE};
use wherry_state::StateStream;
use wherry_stream::message::UnitTime;
use wherry_stream::{Channel, Endpoint};

use self::host::Host;
// Public for its fuzz target only.
#[doc(hidden)]
pub use self::postcopy::take_follow;
use self::postcopy::{PageService, Served};
use self::round::Shared;
use self::senders::Senders;
pub(crate) use self::switchover::threads;
use crate::dirty::{Dirty, Tracker};
use crate::error::{Cause, JourneyError};
use crate::journey::{EventKind, Journey};
use crate::machine::Machine;
use crate::options::SourceOptions;
use crate::ownership::{SourceDriver, SourceInput, SourceState, Word};
use crate::predict::{Convergence, Predictor, us};
use crate::progress::{Blackout, Device, Job, Phase};
use crate::records::Claim;

/// Moves `machine` to the destination that listens at `to`, and returns when it runs there, or is known not to.
///
/// On success the machine here is at rest for good: its RAM may be freed, its devices closed. On
/// [`InDoubt`](JourneyError::InDoubt) it is at rest and must stay so until the doubt is resolved. On every other error
/// but [`Stuck`](JourneyError::Stuck) it runs (or is paused, if the user had paused it), as if nothing had happened.
pub fn send(
    machine: Arc<dyn Machine>,
    to: &Endpoint,
    options: SourceOptions,
    journey: &Journey,
) -> Result<Job, JourneyError> {
    let mut source = Source::new(machine, to.clone(), options, journey.clone());
    let mut phase = Phase::Setup;
    loop {
        journey.enter(phase);
        let next = match phase {
            Phase::Setup => source.setup(),
            Phase::Precopy => source.precopy(),
            Phase::Switchover => source.switchover(),
            Phase::InDoubt => source.in_doubt(),
            Phase::Postcopy => source.postcopy(),
            Phase::Paused => source.paused(),
            Phase::Done => return Ok(source.done()),
            Phase::None | Phase::Cancelled | Phase::Failed => {
                Err(Cause::Option(format!("a source does nothing in phase {phase:?}")))
            }
        };
        phase = match next {
            Ok(next) => next,
            Err(cause @ Cause::Stream { .. }) if matches!(phase, Phase::Precopy | Phase::Switchover) => {
                let cause = source.explain(cause);
                return Err(source.fail(cause));
            }
            Err(cause) => return Err(source.fail(cause)),
        };
    }
}

/// What exists from the end of `Setup` on.
struct Running {
    senders: Senders,
    shared: Shared,
    tracker: Tracker,
    /// Knows what need not go in the first round.
    free: Option<Arc<dyn FreePages>>,
    predictor: Predictor,
    convergence: Convergence,
    /// What is to be sent next.
    pending: Dirty,
    /// Opened when both sides can do postcopy.
    urgent: Option<Channel>,
    /// What is pending does not go before the switch, but follows it.
    follow: bool,
    /// What follows has begun to be pushed.
    pushed: bool,
    /// Answers what the destination asks for, from the offer on.
    service: Option<PageService>,
    /// What it was asked for, over all links.
    served: Arc<Served>,
    /// When `pending` was last collected.
    collected: Instant,
    started: Instant,
    rounds: u32,
    /// Of these, made only because a unit had more state to give.
    grown: u32,
    surprises: u32,
}

struct Source {
    machine: Arc<dyn Machine>,
    to: Endpoint,
    options: SourceOptions,
    journey: Journey,
    host: Host,
    claim: Option<Claim>,
    owner: Option<SourceDriver>,
    running: Option<Running>,
    blackout: Blackout,
    /// What units with streams took of it there: loading and starting.
    loads: Vec<UnitTime>,
    starts: Vec<UnitTime>,
    /// When the first sharer was told to stop.
    stopped_at: Option<Instant>,
    /// Why the VM ended at the destination before all of its memory was there.
    ended: Option<String>,
}

impl Source {
    fn new(machine: Arc<dyn Machine>, to: Endpoint, options: SourceOptions, journey: Journey) -> Self {
        journey.update(|job| {
            *job = Job {
                role: "source".into(),
                mode: options.mode.as_str().into(),
                peer: to.to_string(),
                memory_page_size: GRANULE,
                ..Job::default()
            }
        });
        Self {
            host: Host::new(machine.clone(), journey.clone()),
            machine,
            to,
            options,
            journey,
            claim: None,
            owner: None,
            running: None,
            blackout: Blackout::default(),
            loads: vec![],
            starts: vec![],
            stopped_at: None,
            ended: None,
        }
    }

    /// The VM runs there.
    fn done(&mut self) -> Job {
        // Only now, with the guest running elsewhere, is what costs time taken down: threads, dirty logs.
        self.running = None;
        let blackout = self.blackout;
        let ended = self.ended.take();
        let devices = self.devices();
        self.journey.tell(EventKind::Phase, |job| {
            job.blackout = Some(blackout);
            job.devices = devices;
            job.downtime_us = blackout.total_us;
            job.error = ended.map(|why| format!("the VM has ended there before all of its memory had followed: {why}"));
            job.memory_remaining = 0;
            job.data_remaining = 0;
        });
        self.journey.job()
    }

    /// A data channel that ends may only be the first sign of a destination that says why on the control channel.
    fn explain(&mut self, cause: Cause) -> Cause {
        let undecided = !matches!(self.state(), Some(SourceState::RunRecorded | SourceState::InDoubt));
        match &mut self.host.control {
            Some(control) if undecided && !control.broken => control.explain(cause),
            _ => cause,
        }
    }

    /// Ends a journey that failed: the VM runs on here, unless that cannot be.
    fn fail(&mut self, cause: Cause) -> JourneyError {
        self.host.why = cause.to_string();
        // First of all the guest runs again; the state machine knows whether it may.
        match &cause {
            Cause::Peer { .. } => self.hear(Word::Abort),
            _ => self.feed(SourceInput::Abort),
        }
        if matches!(cause, Cause::Lost(_)) {
            self.running = None;
            return self.end(Phase::Failed, JourneyError::Lost(cause));
        }
        match self.state() {
            Some(SourceState::RunRecorded | SourceState::InDoubt) => {
                return self.end(Phase::InDoubt, JourneyError::InDoubt(cause));
            }
            Some(SourceState::Serving | SourceState::Paused) => {
                self.running = None;
                return self.end(Phase::Paused, JourneyError::Paused(cause));
            }
            _ => {}
        }
        if self.owner.is_none()
            && let Some(control) = &mut self.host.control
        {
            control.abort(&self.host.why);
        }
        self.host.undrain();
        self.machine.throttle(0);
        // Threads and dirty logs go while the guest runs. Pages of a failed round need not be given back to anyone: the
        // next journey starts from all that is allocated.
        self.running = None;
        // Nobody reads a stream any more.
        self.machine.streams().iter().for_each(|stream| stream.end());
        if let Some(undo) = self.host.resume_error.take() {
            return self.end(Phase::Failed, JourneyError::Stuck { cause: cause.into(), undo });
        }
        self.settle();
        match cause {
            Cause::Refused(reasons) => self.end(Phase::Failed, JourneyError::Refused(reasons)),
            _ if self.journey.is_cancelled() => self.end(Phase::Cancelled, JourneyError::Cancelled),
            cause => self.end(Phase::Failed, JourneyError::RunsHere(cause)),
        }
    }

    fn end(&self, phase: Phase, error: JourneyError) -> JourneyError {
        tracing::warn!(%error, "journey ended");
        self.journey.tell(EventKind::Phase, |job| {
            job.phase = phase;
            job.error = Some(error.to_string());
        });
        error
    }

    /// What each unit with a stream took of the blackout.
    fn devices(&self) -> Vec<Device> {
        let device = |stream: &Arc<dyn StateStream>| {
            let (id, times) = (stream.id(), stream.times());
            let there = |all: &[UnitTime]| {
                all.iter().find(|t| (&t.unit, t.instance) == (&id.name, id.instance)).map_or(0, |t| t.us)
            };
            Device {
                name: stream.name(),
                unit: id.to_string(),
                stop_us: us(times.stop),
                save_us: us(times.save),
                load_us: there(&self.loads),
                start_us: there(&self.starts),
                early_bytes: times.early,
                bytes: times.bytes,
            }
        };
        self.machine.streams().iter().map(device).collect()
    }

    /// Since the stop, in microseconds.
    fn since_stop(&self) -> Duration {
        self.stopped_at.map_or(Duration::ZERO, |at| at.elapsed())
    }
}
