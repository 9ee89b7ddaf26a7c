//! Phase `Switchover` of the destination: the guest stands still at the source, so this thread looks for every message
//! instead of sleeping, and reads the last pages itself.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use prost::Message as _;
use wherry_state::StateFile;
use wherry_stream::message::{Body, Empty, Offer};

use super::check::compare_totals;
use super::receivers::{News, receive_round};
use super::{Destination, no_setup, since};
use crate::error::Cause;
use crate::ownership::{Carriage, DestinationInput, DestinationState, Word};
use crate::priority::Urgent;
use crate::progress::Phase;
use crate::testpoint::{Point, reach};

/// How long to look again and again before sleeping.
const SPIN: Duration = Duration::from_millis(50);
/// More state than this is refused.
const MAX_STATE: usize = 1 << 30;

impl Destination<'_> {
    pub(super) fn switchover(&mut self) -> Result<Phase, Cause> {
        let _urgent = Urgent::new();
        let narrow = self.poise.narrow;
        if narrow {
            self.take_first_channel()?;
        }
        self.host.control()?.send(Body::Poised(Empty {}))?;
        reach(&self.journey, Point::DestinationPoised);
        let mut state = vec![];
        let offer = match self.await_offer(narrow, &mut state)? {
            Some(offer) => offer,
            None => return Ok(Phase::Precopy),
        };
        reach(&self.journey, Point::DestinationOffered);
        let begun = Instant::now();
        self.hear(Word::Offer(if offer.follow { Carriage::PagesFollow } else { Carriage::Whole }));
        if let Err(cause) = self.load(&offer, state) {
            self.host.why = cause.to_string();
            self.feed(DestinationInput::LoadFailed);
            return Err(cause);
        }
        reach(&self.journey, Point::DestinationLoaded);
        // A side that has said it is ready cannot take that back.
        if !self.journey.close_to_cancel() {
            return Err(Cause::Cancelled);
        }
        self.host.busy_us = since(begun);
        self.feed(DestinationInput::Loaded);
        reach(&self.journey, Point::DestinationReady);
        self.await_run()
    }

    /// Waits for the last pages and the offer. `None`: another round follows.
    fn await_offer(&mut self, narrow: bool, state: &mut Vec<u8>) -> Result<Option<Offer>, Cause> {
        let mut last_round = !narrow;
        let mut heard = Instant::now();
        let limit = self.options.timeouts.stop + self.options.timeouts.silent;
        loop {
            let receiving = self.receiving.as_mut().ok_or_else(no_setup)?;
            let control = self.host.control()?;
            let mut others = vec![receiving.receivers.bell()];
            others.extend(receiving.first.as_ref().filter(|_| !last_round).map(|c| c.reader.as_fd()));
            let woken = control.wait(&others, heard + limit, SPIN)?;
            if woken == Default::default() {
                return Err(control.silent("send the last pages and the state", limit));
            }
            heard = Instant::now();
            if woken.other == Some(0) {
                while let Some(news) = receiving.receivers.next() {
                    match news {
                        News::Round(round) => receiving.rounds = receiving.rounds.max(round),
                        News::Failed(cause) => return Err(self.explain(cause)),
                        News::Released(channel) => receiving.first = Some(*channel),
                    }
                }
            }
            if woken.other == Some(1) {
                self.last_round()?;
                last_round = true;
                continue;
            }
            if !woken.control {
                continue;
            }
            match self.host.control()?.read()? {
                None => {}
                Some(Body::Continue(Empty {})) => {
                    let receiving = self.receiving.as_mut().ok_or_else(no_setup)?;
                    receiving.hashes.clear();
                    if let Some(channel) = receiving.first.take() {
                        receiving.receivers.give_back(channel);
                    }
                    return Ok(None);
                }
                Some(Body::Hashes(hashes)) => {
                    let machine = self.host.machine.clone().ok_or_else(no_setup)?;
                    let receiving = self.receiving.as_mut().ok_or_else(no_setup)?;
                    receiving.hashes.take(machine.ram(), &hashes)?;
                }
                Some(Body::Follow(follow)) if self.poise.follow => {
                    let machine = self.host.machine.clone().ok_or_else(no_setup)?;
                    let receiving = self.receiving.as_mut().ok_or_else(no_setup)?;
                    receiving.follow.take(machine.ram(), &follow)?;
                }
                Some(Body::StatePiece(piece)) => {
                    if state.len() + piece.bytes.len() > MAX_STATE {
                        return Err(self.host.control()?.protocol(format!("more than {MAX_STATE} bytes of state")));
                    }
                    state.extend_from_slice(&piece.bytes);
                }
                Some(Body::Offer(offer)) => {
                    if offer.follow != self.poise.follow {
                        return Err(self.host.control()?.protocol("an offer of another kind than was announced"));
                    }
                    if !last_round {
                        // The other socket was faster.
                        self.last_round()?;
                    }
                    return Ok(Some(offer));
                }
                Some(other) => {
                    return Err(self.host.control()?.protocol(format!("{} where an offer was due", other.kind())));
                }
            }
        }
    }

    /// Has the first receiving thread let go of its channel. It waits between rounds, so it does so at once.
    fn take_first_channel(&mut self) -> Result<(), Cause> {
        let receiving = self.receiving.as_mut().ok_or_else(no_setup)?;
        receiving.receivers.want_first();
        let deadline = Instant::now() + Duration::from_secs(5);
        while receiving.first.is_none() {
            let control = self.host.control.as_ref().ok_or_else(no_setup)?;
            control.wait_others(&[receiving.receivers.bell()], deadline)?;
            while let Some(news) = receiving.receivers.next() {
                match news {
                    News::Released(channel) => receiving.first = Some(*channel),
                    News::Round(round) => receiving.rounds = receiving.rounds.max(round),
                    News::Failed(cause) => return Err(cause),
                }
            }
            if Instant::now() >= deadline && receiving.first.is_none() {
                let what = "the first data channel is in the middle of a round";
                return Err(Cause::Protocol { peer: "source", what: what.into() });
            }
        }
        Ok(())
    }

    /// Reads the last pages from the first channel.
    fn last_round(&mut self) -> Result<(), Cause> {
        let silent = self.options.timeouts.silent;
        let receiving = self.receiving.as_mut().ok_or_else(no_setup)?;
        let channel = receiving.first.as_mut().ok_or_else(no_setup)?;
        channel.reader.set_idle_limit(silent);
        channel.reader.set_spin(SPIN);
        receiving.rounds = receive_round(&receiving.place, channel)?;
        let stats = channel.reader.stats();
        receiving.receivers.set_stats(0, stats);
        Ok(())
    }

    /// Checks all that was sent, and loads the state.
    fn load(&mut self, offer: &Offer, mut state: Vec<u8>) -> Result<(), Cause> {
        let machine = self.host.machine.clone().ok_or_else(no_setup)?;
        let receiving = self.receiving.as_ref().ok_or_else(no_setup)?;
        if offer.channels.len() != receiving.receivers.len() {
            let what = format!("an offer with totals of {} channels", offer.channels.len());
            return Err(Cause::Protocol { peer: "source", what });
        }
        for (n, total) in offer.channels.iter().enumerate() {
            compare_totals(n, total, &receiving.receivers.stats(n))?;
        }
        state.extend_from_slice(&offer.state);
        let file =
            StateFile::decode(state.as_slice()).map_err(|e| Cause::Corrupt { what: "state", detail: e.to_string() })?;
        if file.digest()[..] != offer.digest[..] {
            return Err(Cause::Corrupt { what: "state", detail: "its digest is not the one that was sent".into() });
        }
        if receiving.verify {
            self.compare_memory()?;
        }
        // Loading may touch guest memory.
        self.prepare_faults(&machine)?;
        let loading = Instant::now();
        machine.units().restore(&file)?;
        self.host.load_us = since(loading);
        Ok(())
    }

    /// Ready: waits to be told to run.
    fn await_run(&mut self) -> Result<Phase, Cause> {
        let limit = self.options.timeouts.running;
        let begun = Instant::now();
        loop {
            let control = self.host.control()?;
            let heard = control.wait_spinning(begun + limit, SPIN).and_then(|ready| match ready {
                true => control.read_any().map(Some),
                false => Ok(None),
            });
            match heard {
                Ok(Some(Some((about, body)))) => {
                    if let Some(phase) = self.decided(&about, &body)? {
                        return Ok(phase);
                    }
                }
                Ok(Some(None)) => {}
                Ok(None) if begun.elapsed() < limit => {}
                Ok(None) => {
                    self.feed(DestinationInput::Timeout);
                    return Ok(Phase::InDoubt);
                }
                Err(error) => {
                    tracing::warn!(%error, "lost the source when ready");
                    self.feed(DestinationInput::LinkLost);
                    return Ok(Phase::InDoubt);
                }
            }
        }
    }

    /// Lets the state machine hear a word when ready; the phase that follows, if it decides.
    pub(super) fn decided(
        &mut self,
        about: &wherry_stream::message::About,
        body: &Body,
    ) -> Result<Option<Phase>, Cause> {
        use crate::ownership::{Attempt, Message};
        let (Some(word), Ok(attempt)) = (Word::of(body), Attempt::from_about(about)) else { return Ok(None) };
        if word == Word::Run {
            reach(&self.journey, Point::DestinationTold);
        }
        if let Body::Abort(reason) = body {
            self.host.why = crate::link::printable(&reason.text);
        }
        self.feed(DestinationInput::Message(Message { attempt, word }));
        self.settled()
    }

    /// The phase that follows from where the state machine stands, if it is decided.
    pub(super) fn settled(&mut self) -> Result<Option<Phase>, Cause> {
        match self.state() {
            Some(state @ (DestinationState::Running | DestinationState::LacksPages)) => {
                reach(&self.journey, Point::DestinationRunning);
                if let Some(owner) = &self.owner {
                    let attempt = owner.owner().attempt();
                    crate::epoch::set(&attempt.vm.0, attempt.epoch);
                }
                Ok(Some(if state == DestinationState::Running { Phase::Done } else { Phase::Postcopy }))
            }
            Some(DestinationState::Broken) => Err(self.host.trouble("the VM started here in part, and is lost")),
            Some(DestinationState::NeverRuns | DestinationState::Withdrawn) => {
                self.journey.open_to_cancel();
                let reason = std::mem::take(&mut self.host.why);
                Err(match self.host.trouble("") {
                    Cause::Ownership(text) if !text.is_empty() => Cause::Ownership(text),
                    _ => Cause::Peer { peer: "source", reason },
                })
            }
            _ => Ok(None),
        }
    }
}
