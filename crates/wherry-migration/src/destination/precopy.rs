//! Phase `Precopy` of the destination: the threads receive, this one watches over them and over the source.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use wherry_stream::HelloRefusal;
use wherry_stream::message::Body;

use super::receivers::News;
use super::{Destination, no_setup};
use crate::error::Cause;
use crate::journey::EventKind;
use crate::progress::Phase;
use crate::testpoint::{Point, reach};

/// How often subscribers hear of progress.
const PROGRESS: Duration = Duration::from_millis(100);

impl Destination<'_> {
    pub(super) fn precopy(&mut self) -> Result<Phase, Cause> {
        let mut told = Instant::now();
        let mut moved = (Instant::now(), 0);
        loop {
            let receiving = self.receiving.as_mut().ok_or_else(no_setup)?;
            let control = self.host.control()?;
            let others = [receiving.receivers.bell(), self.listener.as_fd()];
            let woken = control.wait(&others, Instant::now() + PROGRESS, Duration::ZERO)?;
            if woken.other == Some(0) {
                while let Some(news) = receiving.receivers.next() {
                    match news {
                        News::Round(round) => {
                            receiving.rounds = receiving.rounds.max(round);
                            reach(&self.journey, Point::DestinationRoundDone);
                        }
                        News::Failed(cause) => return Err(self.explain(cause)),
                        News::Released(channel) => receiving.receivers.give_back(*channel),
                    }
                }
            }
            if woken.control {
                match self.host.control()?.read()? {
                    None => {}
                    Some(Body::Poise(poise)) => {
                        self.poise = poise;
                        return Ok(Phase::Switchover);
                    }
                    Some(other) => {
                        return Err(self.host.control()?.protocol(format!("{} during precopy", other.kind())));
                    }
                }
            }
            if woken.other == Some(1)
                && let Some(greeting) = self.greet(&self.listener, Duration::ZERO)?
            {
                let _ = greeting.refuse(HelloRefusal::Busy);
            }
            self.watch(&mut moved)?;
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                self.count();
                self.journey.tell(EventKind::Progress, |_| {});
            }
        }
    }

    /// A source that sends neither pages nor a word for too long is taken for dead.
    fn watch(&mut self, moved: &mut (Instant, u64)) -> Result<(), Cause> {
        let bytes = self.receiving.as_ref().map_or(0, |r| r.receivers.wire_bytes());
        if bytes != moved.1 {
            *moved = (Instant::now(), bytes);
        }
        let limit = self.options.timeouts.silent;
        let control = self.host.control()?;
        let quiet = moved.0.max(control.heard).elapsed();
        if quiet > limit { Err(control.silent("send memory", quiet)) } else { Ok(()) }
    }

    /// A data channel that ends may only be the first sign of a source that says why on the control channel.
    pub(super) fn explain(&mut self, cause: Cause) -> Cause {
        match self.host.control() {
            Ok(control) => control.explain(cause),
            Err(_) => cause,
        }
    }
}
