//! What the ownership state machine has the source do, and the machine's condition while it is being given away.

use std::sync::Arc;
use std::time::{Duration, Instant};

use wherry_stream::message::{About, Body, Offer};

use super::Source;
use super::precopy::no_setup;
use crate::error::Cause;
use crate::journey::{Journey, Side};
use crate::link::Control;
use crate::machine::{Machine, MachineError};
use crate::ownership::{Attempt, Message, Notice, SourceDriver, SourceHost, SourceInput, SourceState, VmId, Word};
use crate::records::{RecordError, Records};
use crate::testpoint::{Point, reach};

/// The source's side of the effects.
pub(super) struct Host {
    machine: Arc<dyn Machine>,
    journey: Journey,
    pub(super) control: Option<Control>,
    /// I/O may have been drained.
    pub(super) drained: bool,
    /// Units may have been stopped.
    pub(super) stopped: bool,
    /// What is sent as the offer.
    pub(super) offer: Option<Offer>,
    /// Why the journey is given up, for the peer.
    pub(super) why: String,
    /// Why the source is in doubt, for the user.
    pub(super) doubt: Option<String>,
    /// The machine could not be started again.
    pub(super) resume_error: Option<String>,
    /// An effect failed that was to give the VM away.
    trouble: Option<String>,
}

impl Host {
    pub(super) fn new(machine: Arc<dyn Machine>, journey: Journey) -> Self {
        Self {
            machine,
            journey,
            control: None,
            drained: false,
            stopped: false,
            offer: None,
            why: String::new(),
            doubt: None,
            resume_error: None,
            trouble: None,
        }
    }

    pub(super) fn control(&mut self) -> Result<&mut Control, Cause> {
        self.control.as_mut().ok_or_else(no_setup)
    }

    /// Takes a drain back that no stop followed.
    pub(super) fn undrain(&mut self) {
        if std::mem::take(&mut self.drained) && !self.stopped {
            // The guest runs; a device that stays drained is broken, and only its unit can say more.
            if let Err(error) = self.machine.units().undrain() {
                tracing::error!(%error, "a unit did not go on after it was drained");
                self.resume_error = Some(error.to_string());
            }
        }
    }

    /// Why an effect failed.
    pub(super) fn trouble(&mut self, doing: &'static str) -> Cause {
        let text = self.trouble.take().unwrap_or_else(|| "the ownership record could not be written".into());
        Cause::Ownership(format!("{doing}: {text}"))
    }
}

impl SourceHost for Host {
    fn send(&mut self, message: Message) {
        if message.word == Word::Run {
            reach(&self.journey, Point::SourceRecorded);
        }
        let body = match message.word {
            Word::Offer(_) => self.offer.take().map(Body::Offer),
            word => word.to_body(&self.why),
        };
        let (Some(body), Some(control)) = (body, &mut self.control) else { return };
        if !control.broken
            && let Err(error) = control.send_about(message.attempt.to_about(), body)
        {
            // Whoever waits for the answer finds the channel at its end.
            tracing::debug!(%error, "a word about ownership was lost");
        }
    }

    fn release_locks(&mut self) -> Result<(), MachineError> {
        self.machine.release_locks()
    }

    fn resume(&mut self, retake_locks: bool) -> Result<(), MachineError> {
        // With the disks in somebody else's hands two writers would be worse than a VM that stands still.
        if retake_locks {
            self.machine.take_locks().map_err(|e| format!("taking the locks again: {e}"))?;
        }
        self.machine.units().start()?;
        self.stopped = false;
        self.drained = false;
        self.resume_error = None;
        Ok(())
    }

    fn discard(&mut self) {
        // The machine stays at rest; its owner frees it when `send` returns, outside of the blackout.
    }

    fn report(&mut self, notice: Notice) {
        tracing::info!(?notice, "ownership");
    }

    fn failed(&mut self, doing: &'static str, error: MachineError) {
        tracing::error!(doing, error = %error, "ownership");
        let text = format!("{doing}: {error}");
        if doing == "resuming the VM" {
            self.resume_error = Some(text.clone());
        }
        self.trouble = Some(text);
    }
}

impl Source {
    /// Records the intent. From here on the state machine decides whose the VM is.
    pub(super) fn begin_ownership(&mut self, about: &About) -> Result<(), Cause> {
        let attempt = Attempt::from_about(about).map_err(|e| Cause::Ownership(e.to_string()))?;
        let claim = self.claim.take().ok_or_else(no_setup)?;
        let driver = SourceDriver::begin(claim, attempt, &self.to.to_string(), &mut self.host)
            .map_err(|e| Cause::Ownership(e.to_string()))?;
        self.owner = Some(driver);
        Ok(())
    }

    /// Claims the VM on this host: two migrations of it at once are refused here. The epoch that the VM has with its
    /// next owner.
    pub(super) fn claim(&mut self, vm: &[u8]) -> Result<u64, Cause> {
        let id = VmId::try_from(vm).map_err(|e| Cause::Ownership(e.to_string()))?;
        let refused = |e: RecordError| Cause::Ownership(e.to_string());
        let records = Records::open(&self.options.records).map_err(refused)?;
        self.claim = Some(records.claim(id, Side::Source).map_err(refused)?);
        Ok(crate::epoch::of(vm) + 1)
    }

    pub(super) fn feed(&mut self, input: SourceInput) {
        if let Some(owner) = &mut self.owner {
            owner.feed(input, &mut self.host);
        }
    }

    /// A word of the destination.
    pub(super) fn hear(&mut self, word: Word) {
        if let Some(owner) = &mut self.owner {
            let message = Message { attempt: *owner.owner().attempt(), word };
            owner.feed(SourceInput::Message(message), &mut self.host);
        }
    }

    pub(super) fn state(&self) -> Option<SourceState> {
        self.owner.as_ref().map(SourceDriver::state)
    }

    /// The VM runs here again, but the destination may be ready and wait for its order. It is told, on a new connection
    /// if need be, so that it does not wait for ever; until it has answered, the record stays.
    pub(super) fn settle(&mut self) {
        let end = Instant::now() + Duration::from_secs(3);
        while self.state() == Some(SourceState::Kept { settled: false }) && Instant::now() < end {
            match self.ask_again(Duration::from_millis(500)) {
                Ok(Some((about, body))) => {
                    if let Some(word) = Word::of(&body)
                        && let Ok(attempt) = Attempt::from_about(&about)
                    {
                        self.feed(SourceInput::Message(Message { attempt, word }));
                    }
                }
                Ok(None) => self.feed(SourceInput::Timeout),
                Err(error) => {
                    tracing::debug!(%error, "the destination could not be told");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }
}
