//! Does what the state machines ask for: the records by itself, the rest through a host.

use std::collections::VecDeque;

use super::{
    Attempt, Carriage, DestinationEffect, DestinationInput, DestinationOwner, DestinationRecord, DestinationStage,
    DestinationState, Message, Notice, SourceEffect, SourceInput, SourceOwner, SourceRecord, SourceStage, SourceState,
};
use crate::Side;
use crate::machine::MachineError;
use crate::records::{Claim, Entry, RecordError, Stored};

/// What the engine does for a source. All of it happens on the thread that feeds.
pub trait SourceHost {
    /// Sends a word on whatever link there is. A word that cannot be sent is a lost one; the loss of the link is fed when
    /// it is noticed, not from here. Must not block longer than a send timeout.
    fn send(&mut self, message: Message);
    /// [`SourceEffect::ReleaseLocks`].
    fn release_locks(&mut self) -> Result<(), MachineError>;
    /// [`SourceEffect::Resume`]: takes the locks if asked to, and starts the machine.
    fn resume(&mut self, retake_locks: bool) -> Result<(), MachineError>;
    /// [`SourceEffect::Discard`].
    fn discard(&mut self);
    /// [`SourceEffect::Report`].
    fn report(&mut self, notice: Notice);
    /// Something that was asked for above, or a record, failed. The state machine copes; this is for the user.
    fn failed(&mut self, doing: &'static str, error: MachineError);
}

/// What the engine does for a destination. All of it happens on the thread that feeds.
pub trait DestinationHost {
    /// As at the source.
    fn send(&mut self, message: Message);
    /// [`DestinationEffect::Load`]. `Some`: done, well or not. `None`: under way; its end is fed later.
    fn load(&mut self) -> Option<Result<(), MachineError>>;
    /// [`DestinationEffect::TakeLocks`].
    fn take_locks(&mut self) -> Result<(), MachineError>;
    /// [`DestinationEffect::ReleaseLocks`].
    fn release_locks(&mut self) -> Result<(), MachineError>;
    /// [`DestinationEffect::Start`].
    fn start(&mut self) -> Result<(), StartError>;
    /// [`DestinationEffect::Discard`].
    fn discard(&mut self);
    /// [`DestinationEffect::Report`].
    fn report(&mut self, notice: Notice);
    /// As at the source.
    fn failed(&mut self, doing: &'static str, error: MachineError);
}

/// The machine did not start.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub struct StartError {
    /// A vCPU or a device may have run. In doubt: `true`.
    pub ran: bool,
    /// Why it did not start.
    pub source: MachineError,
}

/// An attempt cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    /// An earlier attempt on the VM, by a process that is gone, is not decided.
    #[error(
        "an earlier migration of this VM is not decided on this host: {} (other side {}, epoch {}, process {}). Decide it with `resolve` first",
        .0.stored.text(), .0.peer, .0.stored.attempt().epoch, .0.pid
    )]
    Undecided(Box<Entry>),
    /// The intent could not be recorded. Nothing has begun, and at the source the VM runs on.
    #[error("the intent to migrate cannot be recorded, so nothing was begun: {0}")]
    NotRecorded(#[source] RecordError),
}

/// Whether the driver may forget a write that failed.
fn settle(result: Result<(), RecordError>, failed: &mut dyn FnMut(&'static str, MachineError)) -> bool {
    match result {
        Ok(()) => true,
        // It may be there: going on as if it were is safe in both cases, going back is not.
        Err(error @ RecordError::Uncertain { .. }) => {
            failed("writing the ownership record", error.into());
            true
        }
        Err(error) => {
            failed("writing the ownership record", error.into());
            false
        }
    }
}

/// A [`SourceOwner`] with its claim.
#[derive(Debug)]
pub struct SourceDriver {
    owner: SourceOwner,
    claim: Claim,
    peer: String,
}

impl SourceDriver {
    /// Begins an attempt and records the intent.
    pub fn begin(claim: Claim, attempt: Attempt, peer: &str, host: &mut dyn SourceHost) -> Result<Self, BeginError> {
        let mut unsettled = false;
        if let Some(Entry { stored: Stored::Source(found), .. }) = claim.found() {
            match found.stage {
                // The VM is here; the destination of then may still have its copy.
                SourceStage::Kept if attempt.epoch >= found.attempt.epoch => unsettled = true,
                // The VM has changed hands since: what is recorded here is of the past.
                _ if attempt.epoch > found.attempt.epoch => {}
                _ => return Err(undecided(&claim)),
            }
        }
        let owner = SourceOwner::new(attempt, unsettled);
        let mut driver = Self { owner, claim, peer: peer.to_owned() };
        let mut refused = None;
        driver.run(SourceInput::Begin, host, &mut |error| refused = Some(error));
        match refused {
            Some(error) if driver.state() != SourceState::Intended => Err(BeginError::NotRecorded(error)),
            _ => Ok(driver),
        }
    }

    /// Goes on with what an earlier process has left; `None` if it left nothing.
    pub fn restarted(claim: Claim) -> Option<Self> {
        match claim.found() {
            Some(Entry { stored: Stored::Source(record), peer, .. }) => {
                Some(Self { owner: SourceOwner::restarted(record), peer: peer.clone(), claim })
            }
            _ => None,
        }
    }

    /// Takes an input, and does everything that follows from it. Returns the state it comes to.
    pub fn feed(&mut self, input: SourceInput, host: &mut dyn SourceHost) -> SourceState {
        self.run(input, host, &mut |_| {});
        self.state()
    }

    fn run(&mut self, input: SourceInput, host: &mut dyn SourceHost, record_failed: &mut dyn FnMut(RecordError)) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            let before = self.state();
            let effects = self.owner.step(input);
            tracing::debug!(?input, ?before, after = ?self.state(), ?effects, "source owner");
            for effect in effects {
                inputs.extend(self.perform(effect, host, record_failed));
            }
        }
    }

    fn perform(
        &mut self,
        effect: SourceEffect,
        host: &mut dyn SourceHost,
        record_failed: &mut dyn FnMut(RecordError),
    ) -> Option<SourceInput> {
        match effect {
            SourceEffect::Persist(record) => Some(match self.save(record) {
                Ok(()) => SourceInput::Persisted,
                Err(error) if record.stage == SourceStage::Intent => {
                    record_failed(error);
                    SourceInput::PersistFailed
                }
                Err(error) => match settle(Err(error), &mut |doing, error| host.failed(doing, error)) {
                    true => SourceInput::Persisted,
                    false => SourceInput::PersistFailed,
                },
            }),
            SourceEffect::Note(record) => {
                settle(self.save(record), &mut |doing, error| host.failed(doing, error));
                None
            }
            SourceEffect::Clear => {
                if let Err(error) = self.claim.clear() {
                    host.failed("removing the ownership record", error.into());
                }
                None
            }
            SourceEffect::Send(message) => {
                host.send(message);
                None
            }
            SourceEffect::ReleaseLocks => Some(match host.release_locks() {
                Ok(()) => SourceInput::LocksReleased,
                Err(error) => {
                    host.failed("releasing the locks", error);
                    SourceInput::LocksFailed
                }
            }),
            SourceEffect::Resume { retake_locks } => Some(match host.resume(retake_locks) {
                Ok(()) => SourceInput::Resumed,
                Err(error) => {
                    host.failed("resuming the VM", error);
                    SourceInput::ResumeFailed
                }
            }),
            SourceEffect::Discard => {
                host.discard();
                None
            }
            SourceEffect::Report(notice) => {
                host.report(notice);
                None
            }
        }
    }

    fn save(&mut self, record: SourceRecord) -> Result<(), RecordError> {
        self.claim.save(Stored::Source(record), &self.peer)
    }

    /// Where it stands.
    pub fn state(&self) -> SourceState {
        self.owner.state()
    }

    /// The state machine: epoch, attempt, whether pages are served.
    pub fn owner(&self) -> &SourceOwner {
        &self.owner
    }

    /// Whether nothing more can come of it, and the driver may be dropped.
    ///
    /// `Kept { settled: false }` is not over: the VM runs here, but the destination may still hold a copy that has grown
    /// old. Go on feeding `Timeout` while there is a chance to reach it. Dropping the driver then is allowed too: the
    /// record stays, and the next attempt takes note of it.
    pub fn is_over(&self) -> bool {
        self.owner.is_over()
    }
}

/// A [`DestinationOwner`] with its claim.
#[derive(Debug)]
pub struct DestinationDriver {
    owner: DestinationOwner,
    claim: Claim,
    peer: String,
}

impl DestinationDriver {
    /// Begins an attempt and records the intent.
    pub fn begin(
        claim: Claim,
        attempt: Attempt,
        peer: &str,
        host: &mut dyn DestinationHost,
    ) -> Result<Self, BeginError> {
        if let Some(Entry { stored: Stored::Destination(found), .. }) = claim.found() {
            // The claim is ours, so whoever wrote this is dead, and its copy with it. A source that offers the same epoch
            // again owns the VM still. If the VM ran here, only a later owner can offer it.
            let past = match found.stage {
                DestinationStage::Intent | DestinationStage::NeverRuns => attempt.epoch >= found.attempt.epoch,
                DestinationStage::Ran => attempt.epoch > found.attempt.epoch,
            };
            if !past {
                return Err(undecided(&claim));
            }
        }
        let mut driver = Self { owner: DestinationOwner::new(attempt), claim, peer: peer.to_owned() };
        let mut refused = None;
        driver.run(DestinationInput::Begin, host, &mut |error| refused = Some(error));
        match refused {
            Some(error) if driver.state() != DestinationState::Intended => Err(BeginError::NotRecorded(error)),
            _ => Ok(driver),
        }
    }

    /// Goes on with what an earlier process has left; `None` if it left nothing.
    pub fn restarted(claim: Claim) -> Option<Self> {
        match claim.found() {
            Some(Entry { stored: Stored::Destination(record), peer, .. }) => {
                Some(Self { owner: DestinationOwner::restarted(record), peer: peer.clone(), claim })
            }
            _ => None,
        }
    }

    /// Takes an input, and does everything that follows from it. Returns the state it comes to.
    pub fn feed(&mut self, input: DestinationInput, host: &mut dyn DestinationHost) -> DestinationState {
        self.run(input, host, &mut |_| {});
        self.state()
    }

    fn run(
        &mut self,
        input: DestinationInput,
        host: &mut dyn DestinationHost,
        record_failed: &mut dyn FnMut(RecordError),
    ) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            let before = self.state();
            let effects = self.owner.step(input);
            tracing::debug!(?input, ?before, after = ?self.state(), ?effects, "destination owner");
            for effect in effects {
                inputs.extend(self.perform(effect, host, record_failed));
            }
        }
    }

    fn perform(
        &mut self,
        effect: DestinationEffect,
        host: &mut dyn DestinationHost,
        record_failed: &mut dyn FnMut(RecordError),
    ) -> Option<DestinationInput> {
        match effect {
            DestinationEffect::Persist(record) => Some(match self.save(record) {
                Ok(()) => DestinationInput::Persisted,
                Err(error) if record.stage == DestinationStage::Intent => {
                    record_failed(error);
                    DestinationInput::PersistFailed
                }
                Err(error) => match settle(Err(error), &mut |doing, error| host.failed(doing, error)) {
                    true => DestinationInput::Persisted,
                    false => DestinationInput::PersistFailed,
                },
            }),
            DestinationEffect::Note(record) => {
                settle(self.save(record), &mut |doing, error| host.failed(doing, error));
                None
            }
            DestinationEffect::Clear => {
                if let Err(error) = self.claim.clear() {
                    host.failed("removing the ownership record", error.into());
                }
                None
            }
            DestinationEffect::Send(message) => {
                host.send(message);
                None
            }
            DestinationEffect::Load => host.load().map(|result| match result {
                Ok(()) => DestinationInput::Loaded,
                Err(error) => {
                    host.failed("loading the VM", error);
                    DestinationInput::LoadFailed
                }
            }),
            DestinationEffect::TakeLocks => Some(match host.take_locks() {
                Ok(()) => DestinationInput::LocksTaken,
                Err(error) => {
                    host.failed("taking the locks", error);
                    DestinationInput::LocksFailed
                }
            }),
            DestinationEffect::ReleaseLocks => {
                if let Err(error) = host.release_locks() {
                    host.failed("releasing the locks", error);
                }
                None
            }
            DestinationEffect::Start => Some(match host.start() {
                Ok(()) => DestinationInput::Started,
                Err(StartError { ran, source }) => {
                    host.failed("starting the VM", source);
                    DestinationInput::StartFailed { ran }
                }
            }),
            DestinationEffect::Discard => {
                host.discard();
                None
            }
            DestinationEffect::Report(notice) => {
                host.report(notice);
                None
            }
        }
    }

    fn save(&mut self, record: DestinationRecord) -> Result<(), RecordError> {
        self.claim.save(Stored::Destination(record), &self.peer)
    }

    /// Where it stands.
    pub fn state(&self) -> DestinationState {
        self.owner.state()
    }

    /// The state machine.
    pub fn owner(&self) -> &DestinationOwner {
        &self.owner
    }

    /// How much comes before the switch, as far as it is known.
    pub fn carriage(&self) -> Carriage {
        self.owner.carriage()
    }

    /// Whether nothing more can come of it, and the driver may be dropped. A destination that runs the VM is over when
    /// the source has confirmed, and then its record is gone; until then, stay to answer.
    pub fn is_over(&self) -> bool {
        self.owner.is_over() || (self.state() == DestinationState::Running && self.claim.found().is_none())
    }
}

fn undecided(claim: &Claim) -> BeginError {
    match claim.found() {
        Some(entry) => BeginError::Undecided(Box::new(entry.clone())),
        None => unreachable!("only asked when something was found"),
    }
}

impl Side {
    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Side::Source => Side::Destination,
            Side::Destination => Side::Source,
        }
    }
}
