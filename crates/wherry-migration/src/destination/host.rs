//! What the ownership state machine has the destination do.

use std::sync::Arc;
use std::time::{Duration, Instant};

use wherry_state::{StateStream, StreamTimes};
use wherry_stream::message::{Body, Complete, Ready, Running, UnitTime};

use super::{Destination, no_setup, since};
use crate::error::Cause;
use crate::journey::{Journey, Side};
use crate::link::Control;
use crate::machine::{Machine, MachineError};
use crate::ownership::{
    Attempt, DestinationDriver, DestinationHost, DestinationInput, DestinationState, Message, Notice, StartError, VmId,
    Word,
};
use crate::predict::us;
use crate::records::{RecordError, Records};
use crate::testpoint::{Point, reach};

/// The destination's side of the effects.
#[derive(Default)]
pub(super) struct Host {
    pub(super) journey: Option<Journey>,
    pub(super) control: Option<Control>,
    pub(super) machine: Option<Arc<dyn Machine>>,
    /// Why the journey is given up, for the peer.
    pub(super) why: String,
    /// Loading took so long.
    pub(super) load_us: u64,
    /// From the offer to the answer, without waiting.
    pub(super) busy_us: u64,
    /// Locks and start took so long.
    pub(super) start_us: u64,
    /// The last word of postcopy, should it be lost.
    pub(super) complete: Complete,
    /// `Ready` has been said once, with its figures.
    said_ready: bool,
    told: Option<Instant>,
    trouble: Option<String>,
}

impl Host {
    pub(super) fn new(journey: Journey) -> Self {
        Self { journey: Some(journey), ..Self::default() }
    }

    pub(super) fn control(&mut self) -> Result<&mut Control, Cause> {
        self.control.as_mut().ok_or_else(no_setup)
    }

    /// What each unit with a stream took.
    fn times(&self, of: impl Fn(&StreamTimes) -> Duration) -> Vec<UnitTime> {
        let time = |stream: Arc<dyn StateStream>| {
            let id = stream.id();
            UnitTime { unit: id.name, instance: id.instance, us: us(of(&stream.times())) }
        };
        self.machine.iter().flat_map(|machine| machine.streams()).map(time).collect()
    }

    /// Why an effect failed.
    pub(super) fn trouble(&mut self, otherwise: &str) -> Cause {
        Cause::Ownership(self.trouble.take().unwrap_or_else(|| otherwise.into()))
    }
}

impl DestinationHost for Host {
    fn send(&mut self, message: Message) {
        if message.word == Word::Running
            && let Some(journey) = &self.journey
        {
            reach(journey, Point::DestinationStarted);
        }
        let body = match message.word {
            Word::Ready if !self.said_ready => {
                self.said_ready = true;
                let units = self.times(|times| times.load);
                Some(Body::Ready(Ready { load_us: self.load_us, busy_us: self.busy_us, units }))
            }
            Word::Running => {
                let units = self.times(|times| times.start);
                Some(Body::Running(Running { start_us: self.start_us, units }))
            }
            Word::NotRun => word_with_reason(message.word, self.trouble.as_ref().unwrap_or(&self.why)),
            word => word_with_reason(word, &self.why),
        };
        let (Some(body), Some(control)) = (body, &mut self.control) else { return };
        if !control.broken
            && let Err(error) = control.send_about(message.attempt.to_about(), body)
        {
            tracing::debug!(%error, "a word about ownership was lost");
        }
    }

    fn load(&mut self) -> Option<Result<(), MachineError>> {
        // The conductor has the channels and the hashes; it loads next and feeds the outcome.
        None
    }

    fn take_locks(&mut self) -> Result<(), MachineError> {
        self.told = Some(Instant::now());
        self.machine.as_ref().map_or(Err("there is no machine".into()), |m| m.take_locks())
    }

    fn release_locks(&mut self) -> Result<(), MachineError> {
        self.machine.as_ref().map_or(Ok(()), |m| m.release_locks())
    }

    fn start(&mut self) -> Result<(), StartError> {
        let Some(machine) = &self.machine else {
            return Err(StartError { ran: false, source: "there is no machine".into() });
        };
        // One after the other, so that it is known whether anything ran when one fails: a unit whose start fails does
        // not run, and those that depend on it are not tried.
        for (n, unit) in machine.units().iter().enumerate() {
            if let Err(error) = unit.start() {
                let source = format!("starting unit {}: {error}", unit.id()).into();
                return Err(StartError { ran: n > 0, source });
            }
        }
        self.start_us = self.told.map_or(0, since);
        Ok(())
    }

    fn discard(&mut self) {
        // The memory goes when the threads that write into it have ended: see `Destination::fail`.
    }

    fn report(&mut self, notice: Notice) {
        tracing::info!(?notice, "ownership");
    }

    fn failed(&mut self, doing: &'static str, error: MachineError) {
        tracing::error!(doing, error = %error, "ownership");
        self.trouble = Some(format!("{doing}: {error}"));
    }
}

fn word_with_reason(word: Word, reason: &str) -> Option<Body> {
    word.to_body(reason)
}

impl Destination<'_> {
    /// Claims the VM on this host and records the intent. From here on the state machine decides whose the VM is.
    pub(super) fn begin_ownership(&mut self) -> Result<(), Cause> {
        let refused = |e: RecordError| Cause::Ownership(e.to_string());
        let control = self.host.control()?;
        let about = control.about.clone();
        let peer = control.peer_address().to_owned();
        let attempt = Attempt::from_about(&about).map_err(|e| Cause::Ownership(e.to_string()))?;
        let id = VmId::try_from(about.vm.as_slice()).map_err(|e| Cause::Ownership(e.to_string()))?;
        let records = Records::open(&self.options.records).map_err(refused)?;
        let claim = records.claim(id, Side::Destination).map_err(refused)?;
        let driver = DestinationDriver::begin(claim, attempt, &peer, &mut self.host)
            .map_err(|e| Cause::Ownership(e.to_string()))?;
        self.owner = Some(driver);
        Ok(())
    }

    pub(super) fn feed(&mut self, input: DestinationInput) {
        if let Some(owner) = &mut self.owner {
            owner.feed(input, &mut self.host);
        }
    }

    /// A word of the source.
    pub(super) fn hear(&mut self, word: Word) {
        if let Some(owner) = &mut self.owner {
            let message = Message { attempt: *owner.owner().attempt(), word };
            owner.feed(DestinationInput::Message(message), &mut self.host);
        }
    }

    pub(super) fn state(&self) -> Option<DestinationState> {
        self.owner.as_ref().map(DestinationDriver::state)
    }
}
