//! The streams of state units in a round: each goes over one channel, several side by side.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use wherry_state::StateStream;
use wherry_stream::Channel;
use wherry_stream::message::{About, Body, Message, UnitState};

use crate::error::Cause;
use crate::machine::Machine;
use crate::predict::States;

/// Of each stream no more goes in one round while the machine runs: a state that always grows must not keep the pages waiting.
const EARLY_MOST: u64 = 64 << 20;

/// What was sent of one stream.
#[derive(Clone, Copy, Debug, Default)]
struct Sent {
    bytes: u64,
    took: Duration,
    /// There was more.
    more: bool,
}

/// All streams of the machine, in one round.
pub(crate) struct Streams {
    all: Vec<Arc<dyn StateStream>>,
    about: About,
    /// At most so many bytes of each.
    most: u64,
    next: AtomicUsize,
    sent: Mutex<Vec<Sent>>,
}

impl Streams {
    /// For a round that is sent while the machine runs, or for the last one.
    pub(crate) fn new(machine: &dyn Machine, about: &About, live: bool) -> Self {
        let all = machine.streams();
        let sent = Mutex::new(vec![Sent::default(); all.len()]);
        let most = if live { EARLY_MOST } else { u64::MAX };
        Self { all, about: about.clone(), most, next: AtomicUsize::new(0), sent }
    }

    /// Sends those that no other channel has taken. `pace` is asked before each piece.
    pub(crate) fn send(&self, channel: &mut Channel, pace: &dyn Fn(u64) -> Result<(), Cause>) -> Result<(), Cause> {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(stream) = self.all.get(index) else { return Ok(()) };
            let sent = self.send_one(&**stream, channel, pace)?;
            self.sent.lock().unwrap_or_else(PoisonError::into_inner)[index] = sent;
        }
    }

    fn send_one(
        &self,
        stream: &dyn StateStream,
        channel: &mut Channel,
        pace: &dyn Fn(u64) -> Result<(), Cause>,
    ) -> Result<Sent, Cause> {
        let (begun, id, mut bytes) = (Instant::now(), stream.id(), 0);
        while bytes < self.most {
            let piece = stream.read().map_err(|source| Cause::unit(stream, source))?;
            if piece.bytes.is_empty() {
                return Ok(Sent { bytes, took: begun.elapsed(), more: false });
            }
            let len = piece.bytes.len() as u64;
            pace(len)?;
            bytes += len;
            let state =
                UnitState { unit: id.name.clone(), instance: id.instance, offset: piece.offset, bytes: piece.bytes };
            let message = Message::new(self.about.clone(), Body::UnitState(state));
            let doing = "sending the state of a unit";
            channel.writer.write_message(&message).map_err(|source| Cause::Stream { doing, source })?;
        }
        Ok(Sent { bytes, took: begun.elapsed(), more: true })
    }

    /// What is still to come, as far as that can be told.
    pub(crate) fn outlook(&self, bandwidth: f64) -> States {
        let sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        let mut states = States { more: sent.iter().any(|sent| sent.more), ..States::default() };
        for (stream, sent) in self.all.iter().zip(&*sent) {
            let expected = stream.expected();
            let bytes = expected.bytes.unwrap_or(0);
            // What it took now counts for more than what it took once.
            let now = (sent.bytes >= 1 << 20).then(|| sent.bytes as f64 / sent.took.as_secs_f64().max(1e-6));
            let rate = now.or(expected.rate).unwrap_or(f64::INFINITY);
            states.bytes += bytes;
            states.time = states.time.max(Duration::from_secs_f64((bytes as f64 / rate.max(1.0)).min(1e6)));
        }
        // Side by side, but over one link.
        if bandwidth > 0.0 {
            states.time = states.time.max(Duration::from_secs_f64((states.bytes as f64 / bandwidth).min(1e6)));
        }
        states
    }
}
