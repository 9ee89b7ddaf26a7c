//! Phase `InDoubt` of the destination: it was ready and has lost its source. It keeps the VM, waits for the source to
//! come back, and lets an operator decide. And after the end: until the source knows that the VM runs here, somebody
//! stays to tell it.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use wherry_stream::message::{About, Body};
use wherry_stream::{ChannelKind, HelloRefusal, Listener};

use super::Destination;
use super::host::Host;
use super::setup::greet;
use crate::error::Cause;
use crate::journey::{Journey, Side};
use crate::link::{Control, TICK};
use crate::ownership::{DestinationDriver, DestinationInput, Message, Word};
use crate::progress::Phase;

/// How long `receive` itself waits for the source to confirm: it does so at once, unless the link is gone.
const CONFIRM: Duration = Duration::from_millis(250);
/// How long the witness stays.
const WITNESS: Duration = Duration::from_secs(600);
/// For the first word on a new connection.
const SILENT: Duration = Duration::from_secs(10);

impl Destination<'_> {
    pub(super) fn in_doubt(&mut self) -> Result<Phase, Cause> {
        let begun = Instant::now();
        self.journey.update(|job| job.error = Some("in doubt: ready, and the source has not decided".into()));
        loop {
            if let Some(side) = self.journey.take_resolution() {
                self.host.why = format!("resolved by hand: the VM belongs to the {}", side.as_str());
                self.feed(DestinationInput::Resolve(side));
                if let Some(phase) = self.settled().map_err(|cause| match side {
                    Side::Source => Cause::Resolved(Side::Source.as_str()),
                    Side::Destination => cause,
                })? {
                    return Ok(phase);
                }
            }
            let Some(owner) = &mut self.owner else { return Err(super::no_setup()) };
            if let Some((about, body)) = next_word(&self.listener, &self.journey, owner, &mut self.host, TICK * 4)?
                && let Some(phase) = self.decided(&about, &body)?
            {
                return Ok(phase);
            }
            if let Some(patience) = self.options.doubt
                && begun.elapsed() >= patience
            {
                return Err(Cause::Silent { peer: "source", what: "decide", waited: patience });
            }
        }
    }

    /// Waits until the source has confirmed; if that takes long, leaves a witness behind.
    pub(super) fn stay_until_confirmed(&mut self) {
        let Some(mut owner) = self.owner.take() else { return };
        let mut host = std::mem::take(&mut self.host);
        let begun = Instant::now();
        while !owner.is_over() && begun.elapsed() < CONFIRM && host.control.as_ref().is_some_and(|c| !c.broken) {
            let _ = attend(&self.listener, &self.journey, &mut owner, &mut host, CONFIRM - begun.elapsed());
        }
        if owner.is_over() {
            return;
        }
        let (listener, journey) = (self.listener.clone(), self.journey.clone());
        let present = Present::new();
        let witness = std::thread::Builder::new().name("wherry-witness".into()).spawn(move || {
            let _present = present;
            let begun = Instant::now();
            while !owner.is_over() && begun.elapsed() < WITNESS {
                if let Err(error) = attend(&listener, &journey, &mut owner, &mut host, TICK * 4) {
                    tracing::debug!(%error, "the witness has nothing left to listen on");
                    return;
                }
            }
        });
        if let Err(error) = witness {
            tracing::warn!(%error, "nobody is left to tell the source that the VM runs here, should it ask again");
        }
    }
}

/// How many witnesses this process has.
static WITNESSES: AtomicUsize = AtomicUsize::new(0);

/// A witness, for as long as it stays.
struct Present;

impl Present {
    fn new() -> Self {
        WITNESSES.fetch_add(1, Ordering::AcqRel);
        Self
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        WITNESSES.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Whether the source of a VM that has come here may still have to be told that it runs here, which only this process can.
pub(crate) fn has_witness() -> bool {
    WITNESSES.load(Ordering::Acquire) > 0
}

/// Hears one word, if one comes, and lets the state machine act on it.
fn attend(
    listener: &Listener,
    journey: &Journey,
    owner: &mut DestinationDriver,
    host: &mut Host,
    limit: Duration,
) -> Result<(), Cause> {
    let heard = next_word(listener, journey, owner, host, limit)?;
    if let Some((about, Body::Resume(_))) = &heard {
        // The word that everything is here was lost with its link.
        let complete = host.complete.clone();
        host.control()?.send_about(about.clone(), Body::Complete(complete.into()))?;
    }
    if let Some((about, body)) = heard
        && let (Some(word), Ok(attempt)) = (Word::of(&body), crate::ownership::Attempt::from_about(&about))
    {
        owner.feed(DestinationInput::Message(Message { attempt, word }), host);
    }
    Ok(())
}

/// The source's next word, on the connection there is or on a new one, within `limit`.
pub(super) fn next_word(
    listener: &Listener,
    journey: &Journey,
    owner: &mut DestinationDriver,
    host: &mut Host,
    limit: Duration,
) -> Result<Option<(About, Body)>, Cause> {
    let deadline = Instant::now() + limit;
    if let Some(control) = &mut host.control
        && !control.broken
    {
        let ready = control.wait_either(listener.as_fd(), deadline)?;
        if ready.control {
            match control.read_any() {
                Ok(word) => return Ok(word),
                Err(error) => {
                    tracing::debug!(%error, "the connection with the source ended");
                    host.control = None;
                }
            }
        }
        if ready.other.is_none() {
            return Ok(None);
        }
    }
    take_connection(listener, journey, owner, host, deadline.saturating_duration_since(Instant::now()))?;
    Ok(None)
}

/// Takes the control connection with which the source comes back, if it does so within `limit`.
pub(super) fn take_connection(
    listener: &Listener,
    journey: &Journey,
    owner: &mut DestinationDriver,
    host: &mut Host,
    limit: Duration,
) -> Result<(), Cause> {
    let Some(greeting) = greet(listener, journey, limit)? else { return Ok(()) };
    let attempt = owner.owner().attempt();
    let hello = greeting.hello();
    if hello.attempt != attempt.id.0 || hello.kind != ChannelKind::Control {
        let _ = greeting.refuse(HelloRefusal::Busy);
        return Ok(());
    }
    match greeting.accept() {
        Ok(channel) => {
            let about = attempt.to_about();
            host.control = Some(Control::new(channel, about, journey.clone(), Side::Source, SILENT));
            owner.feed(DestinationInput::LinkUp, host);
        }
        Err(error) => tracing::debug!(%error, "the source came back and went again"),
    }
    Ok(())
}
