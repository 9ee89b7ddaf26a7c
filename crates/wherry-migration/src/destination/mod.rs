//! The destination of a journey: it builds a machine, receives a VM into it and runs it.
//!
//! ```text
//! Setup -> Precopy <-> Switchover -> [Postcopy <-> Paused ->] Done
//!   |         |            |   \--> InDoubt -> Done     \--> Failed (lost)
//!   v         v            v           |
//! Cancelled / Failed (nothing runs here) <--/
//! ```
//!
//! [`receive`] is the one place that runs the phases; each is one function, in the file of its name. Whatever fails ends
//! in [`Destination::fail`]. Once this side has said that it is ready, only the source, or an operator, decides.

mod asker;
mod check;
mod doubt;
mod host;
mod place;
mod postcopy;
mod precopy;
mod receivers;
mod setup;
mod switchover;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use wherry_memory::GRANULE;
use wherry_stream::message::Poise;
use wherry_stream::{Channel, Listener};

pub(crate) use self::doubt::has_witness;

use self::check::Hashes;
use self::host::Host;
use self::place::Place;
use self::postcopy::{Follow, Following};
use self::receivers::Receivers;
use crate::error::{Cause, JourneyError};
use crate::journey::{EventKind, Journey};
use crate::link::{Control, random_id};
use crate::machine::{Builder, Machine};
use crate::options::DestinationOptions;
use crate::ownership::{DestinationDriver, DestinationInput, DestinationState, Word};
use crate::predict::us;
use crate::progress::{Blackout, Job, Phase};

/// Waits at `listener` for a source, has `builder` build the machine it describes, receives the VM and runs it. Returns
/// when it runs here with all of its memory, or is known not to. (In postcopy it runs before: see [`Builder::runs`].)
///
/// On [`InDoubt`](JourneyError::InDoubt) the machine is gone with the call, and so nothing runs here; it is returned
/// only when [`DestinationOptions::doubt`] has passed. On every other error nothing runs here either.
///
/// If the source has not yet confirmed that it knows, a thread named `wherry-witness` stays for a while with a clone of
/// the listener, to tell it.
pub fn receive(
    listener: &Listener,
    builder: &dyn Builder,
    options: DestinationOptions,
    journey: &Journey,
) -> Result<(Arc<dyn Machine>, Job), JourneyError> {
    let mut destination = Destination::new(listener, builder, options, journey.clone());
    let mut phase = Phase::Setup;
    loop {
        journey.enter(phase);
        let next = match phase {
            Phase::Setup => destination.begin(),
            Phase::Precopy => destination.precopy(),
            Phase::Switchover => destination.switchover(),
            Phase::InDoubt => destination.in_doubt(),
            Phase::Postcopy => destination.postcopy(),
            Phase::Paused => destination.paused(),
            Phase::Done => match destination.done() {
                Ok(arrived) => return Ok(arrived),
                Err(cause) => Err(cause),
            },
            Phase::None | Phase::Cancelled | Phase::Failed => {
                Err(Cause::Option(format!("a destination does nothing in phase {phase:?}")))
            }
        };
        phase = match next {
            Ok(next) => next,
            Err(cause) => return Err(destination.fail(cause)),
        };
    }
}

/// What exists while memory comes in.
struct Receiving {
    receivers: Receivers,
    place: Arc<Place>,
    verify: bool,
    hashes: Hashes,
    /// Channel 0, when its thread has let go of it.
    first: Option<Channel>,
    rounds: u32,
    /// Opened when both sides can do postcopy.
    urgent: Option<Channel>,
    /// What was announced to follow.
    follow: Follow,
    /// Serves the guest's faults, from the offer on, if pages follow.
    following: Option<Following>,
}

struct Destination<'a> {
    /// Where the source comes back to; another one than it came to, if the user wished so.
    listener: Listener,
    builder: &'a dyn Builder,
    options: DestinationOptions,
    journey: Journey,
    incarnation: [u8; 16],
    host: Host,
    owner: Option<DestinationDriver>,
    receiving: Option<Receiving>,
    /// What the source announced of the switchover.
    poise: Poise,
    /// The source's process, if it is on this host.
    source_process: Option<OwnedFd>,
    /// The builder has been told that the VM runs without all of its memory.
    told: bool,
    /// The source has come back before its old link was known to be lost.
    came_back: Option<Control>,
}

impl<'a> Destination<'a> {
    fn new(listener: &Listener, builder: &'a dyn Builder, options: DestinationOptions, journey: Journey) -> Self {
        journey.update(|job| {
            *job = Job { role: "destination".into(), memory_page_size: GRANULE, ..Job::default() };
        });
        Self {
            listener: listener.clone(),
            builder,
            options,
            host: Host::new(journey.clone()),
            journey,
            incarnation: [0; 16],
            owner: None,
            receiving: None,
            poise: Poise::default(),
            source_process: None,
            told: false,
            came_back: None,
        }
    }

    fn begin(&mut self) -> Result<Phase, Cause> {
        self.incarnation = random_id()?;
        let (agreed, begun) = self.setup()?;
        let machine = self.host.machine.clone().ok_or_else(no_setup)?;
        let place = Arc::new(Place::new(machine.ram().clone(), machine.streams()));
        self.receiving = Some(Receiving {
            receivers: Receivers::new(agreed.data, place.clone())?,
            place,
            verify: agreed.verify,
            hashes: Hashes::default(),
            first: None,
            rounds: 0,
            urgent: agreed.urgent,
            follow: Follow::default(),
            following: None,
        });
        self.journey.update(|job| job.setup_time_us = us(begun.elapsed()));
        Ok(Phase::Precopy)
    }

    /// The VM runs here.
    fn done(&mut self) -> Result<(Arc<dyn Machine>, Job), Cause> {
        let machine = self.host.machine.clone().ok_or_else(no_setup)?;
        self.count();
        self.receiving = None;
        let host = &self.host;
        let blackout = Blackout {
            load_us: host.load_us,
            start_us: host.start_us,
            total_us: host.load_us + host.start_us,
            ..Blackout::default()
        };
        self.journey.tell(EventKind::Phase, |job| {
            job.blackout = Some(blackout);
            job.memory_remaining = 0;
            job.data_remaining = 0;
            job.error = None;
        });
        crate::predict::remember_destination(std::time::Duration::from_micros(host.load_us + host.start_us));
        self.stay_until_confirmed();
        Ok((machine, self.journey.job()))
    }

    /// Brings the job's figures up to date.
    fn count(&self) {
        let Some(receiving) = &self.receiving else { return };
        let normal = receiving.place.normal.load(Ordering::Relaxed);
        let zero = receiving.place.zero.load(Ordering::Relaxed);
        let wire = receiving.receivers.wire_bytes();
        let rounds = receiving.rounds;
        self.journey.update(|job| {
            job.memory_normal = normal;
            job.memory_normal_bytes = normal * GRANULE;
            job.memory_processed = normal * GRANULE;
            job.memory_constant = zero;
            job.data_processed = wire;
            job.data_total = wire;
            job.memory_iteration = rounds;
        });
    }

    /// Ends a journey that failed: nothing runs here.
    fn fail(&mut self, cause: Cause) -> JourneyError {
        self.host.why = cause.to_string();
        match &cause {
            Cause::Peer { .. } => self.hear(Word::Abort),
            _ => self.feed(DestinationInput::Abort),
        }
        if self.owner.is_none()
            && let Some(control) = &mut self.host.control
        {
            control.abort(&self.host.why);
        }
        let in_doubt = matches!(
            self.state(),
            Some(DestinationState::Ready | DestinationState::InDoubt | DestinationState::Declined)
        );
        let paused = matches!(self.state(), Some(DestinationState::LacksPages | DestinationState::Paused));
        let lost = matches!(cause, Cause::Lost(_));
        let ended = matches!(cause, Cause::VmEnded(_));
        if (paused || lost)
            && !ended
            && let Some(machine) = &self.host.machine
        {
            // Where nobody serves its faults any more, a guest that runs would find zeros. Who waits for a page is
            // brought out of the guest by the stop.
            if let Err(error) = machine.units().stop(self.options.timeouts.stop) {
                tracing::error!(%error, "the guest was not brought to rest");
            }
        }
        // Threads first: they write into the machine's memory.
        self.receiving = None;
        self.host.machine = None;
        let error = match cause {
            cause if in_doubt => JourneyError::InDoubt(cause),
            cause if lost => JourneyError::Lost(cause),
            cause if paused && !ended => JourneyError::Paused(cause),
            _ if self.journey.is_cancelled() => JourneyError::NotHere(Cause::Cancelled),
            Cause::Refused(reasons) => JourneyError::Refused(reasons),
            cause => JourneyError::NotHere(cause),
        };
        let phase = match &error {
            JourneyError::InDoubt(_) => Phase::InDoubt,
            JourneyError::Paused(_) => Phase::Paused,
            JourneyError::NotHere(Cause::Cancelled) => Phase::Cancelled,
            _ => Phase::Failed,
        };
        tracing::warn!(%error, "incoming journey ended");
        self.journey.tell(EventKind::Phase, |job| {
            job.phase = phase;
            job.error = Some(error.to_string());
        });
        error
    }
}

fn no_setup() -> Cause {
    Cause::Option("a destination that was not set up has nothing to receive".into())
}

/// Now, for the figures.
fn since(begun: Instant) -> u64 {
    us(begun.elapsed())
}
