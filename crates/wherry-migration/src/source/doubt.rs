//! Phase `InDoubt`: the VM is given away, and nobody has said yet that it runs there.
//!
//! The source keeps the VM at rest and asks, on the connection it has or on new ones, until the destination answers,
//! somebody resolves it, or the caller's patience ends.

use std::time::{Duration, Instant};

use wherry_stream::message::{About, Body};

use super::Source;
use crate::error::Cause;
use crate::journey::Side;
use crate::link::printable;
use crate::ownership::{Attempt, Message, SourceInput, SourceState, Word};
use crate::progress::Phase;

/// Between two questions.
const PAUSE: Duration = Duration::from_millis(100);
/// For one answer.
const ANSWER: Duration = Duration::from_secs(1);

impl Source {
    pub(super) fn in_doubt(&mut self) -> Result<Phase, Cause> {
        let begun = Instant::now();
        let why = self.host.doubt.clone().unwrap_or_default();
        tracing::warn!(why, "the VM was given away and the destination has not said that it runs: in doubt");
        self.journey.update(|job| job.error = Some(format!("in doubt: {why}")));
        loop {
            if let Some(side) = self.journey.take_resolution() {
                self.feed(SourceInput::Resolve(side));
                match self.state() {
                    Some(SourceState::Gone) => return Ok(self.resolved_away()),
                    Some(SourceState::InDoubt) => {}
                    _ => {
                        // Above the one that the destination would have: if it was not dead after all, it is the older.
                        if let Some(owner) = &self.owner {
                            let owner = owner.owner();
                            crate::epoch::set(&owner.attempt().vm.0, owner.epoch());
                        }
                        self.journey.open_to_cancel();
                        return Err(Cause::Resolved(Side::Source.as_str()));
                    }
                }
            }
            match self.ask_again(ANSWER) {
                Ok(Some((about, body))) => {
                    if let Some(ended) = self.answer(&about, body)? {
                        return Ok(ended);
                    }
                }
                Ok(None) => self.feed(SourceInput::Timeout),
                Err(error) => {
                    tracing::debug!(%error, "the destination could not be asked");
                    self.host.doubt = Some(error.to_string());
                    self.nap(PAUSE);
                }
            }
            if let Some(patience) = self.options.doubt
                && begun.elapsed() >= patience
            {
                let last = self.host.doubt.clone().unwrap_or(why);
                return Err(Cause::Ownership(format!("no answer for {patience:?}: {last}")));
            }
        }
    }

    /// Takes an answer of the destination; the phase that follows, if it decided.
    fn answer(&mut self, about: &About, body: Body) -> Result<Option<Phase>, Cause> {
        let (Some(word), Ok(attempt)) = (Word::of(&body), Attempt::from_about(about)) else { return Ok(None) };
        let message = SourceInput::Message(Message { attempt, word });
        match body {
            Body::Running(running) if Some(&attempt) == self.owner.as_ref().map(|o| o.owner().attempt()) => {
                Ok(Some(self.given(running)))
            }
            Body::NotRun(reason) => {
                self.feed(message);
                if matches!(self.state(), Some(SourceState::RunRecorded | SourceState::InDoubt)) {
                    return Ok(None);
                }
                self.journey.open_to_cancel();
                Err(Cause::Peer { peer: "destination", reason: printable(&reason.text) })
            }
            Body::Unknown(reason) => {
                self.host.doubt = Some(format!("the destination answers: {}", printable(&reason.text)));
                self.feed(message);
                self.nap(PAUSE * 5);
                Ok(None)
            }
            _ => {
                self.feed(message);
                Ok(None)
            }
        }
    }

    fn resolved_away(&mut self) -> Phase {
        self.blackout.total_us = crate::predict::us(self.since_stop());
        Phase::Done
    }

    /// Waits for the destination's next word, on a new connection if the old one is broken; the state machine says what
    /// is asked. `None`: no word in time.
    pub(super) fn ask_again(&mut self, limit: Duration) -> Result<Option<(About, Body)>, Cause> {
        if self.host.control.as_ref().is_none_or(|c| c.broken) {
            let about = match &self.owner {
                Some(owner) => owner.owner().attempt().to_about(),
                None => return Ok(None),
            };
            self.host.control = None;
            self.host.control = Some(self.connect_control(about)?);
            self.feed(SourceInput::LinkUp);
        }
        let begun = Instant::now();
        while begun.elapsed() < limit {
            if self.journey.resolution().is_some() && self.state_is_doubt() {
                return Ok(None);
            }
            let control = self.host.control()?;
            if control.wait_uncancelled(begun + limit)?
                && let Some(word) = control.read_any()?
            {
                return Ok(Some(word));
            }
        }
        Ok(None)
    }

    fn state_is_doubt(&self) -> bool {
        matches!(self.state(), Some(SourceState::InDoubt | SourceState::RunRecorded))
    }

    fn nap(&self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end && self.journey.resolution().is_none() {
            std::thread::sleep(Duration::from_millis(5).min(time));
        }
    }
}
