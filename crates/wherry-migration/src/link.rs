//! The control channel as both ends use it: messages about one attempt, waits that end, and signs of life.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use wherry_stream::message::{About, Body, Empty, Message, Reason};
use wherry_stream::{Channel, StreamError};

use crate::error::Cause;
use crate::journey::{Journey, Side};

/// Nobody sleeps longer than this without looking whether the journey was cancelled.
pub(crate) const TICK: Duration = Duration::from_millis(50);

/// How often the peer hears from us while it only receives.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// Why a wait ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Woken {
    /// There is something to read on the control channel, or it has ended.
    pub(crate) control: bool,
    /// Which of the other descriptors has something to read (the first one).
    pub(crate) other: Option<usize>,
}

/// One end of the control channel.
pub(crate) struct Control {
    channel: Channel,
    pub(crate) about: About,
    journey: Journey,
    peer: Side,
    /// Longest silence for an answer that takes no work.
    silent: Duration,
    /// When something last came from the peer.
    pub(crate) heard: Instant,
    /// Whether something wrong with it was seen; nothing is sent on it any more.
    pub(crate) broken: bool,
}

impl Control {
    pub(crate) fn new(mut channel: Channel, about: About, journey: Journey, peer: Side, silent: Duration) -> Self {
        channel.set_idle_limit(silent);
        Self { channel, about, journey, peer, silent, heard: Instant::now(), broken: false }
    }

    /// For a peer that has not said yet what it is about: its first message tells.
    pub(crate) fn greeting(channel: Channel, journey: Journey, peer: Side, silent: Duration) -> Self {
        let about = About { attempt: channel.hello.attempt.to_vec(), ..About::default() };
        Self::new(channel, about, journey, peer, silent)
    }

    /// Who is at the other end, for people.
    pub(crate) fn peer_address(&self) -> &str {
        self.channel.peer()
    }

    pub(crate) fn protocol(&self, what: impl Into<String>) -> Cause {
        Cause::Protocol { peer: self.peer.as_str(), what: what.into() }
    }

    pub(crate) fn silent(&self, what: &'static str, waited: Duration) -> Cause {
        Cause::Silent { peer: self.peer.as_str(), what, waited }
    }

    fn stream(&mut self, doing: &'static str) -> impl FnOnce(StreamError) -> Cause {
        self.broken = true;
        move |source| Cause::Stream { doing, source }
    }

    /// Sends a message. It fits the kernel's buffer unless the peer has stopped reading, and then the idle limit ends it.
    pub(crate) fn send(&mut self, body: Body) -> Result<(), Cause> {
        tracing::trace!(kind = body.kind(), "sending");
        let message = Message::new(self.about.clone(), body);
        self.channel.writer.write_message(&message).map_err(|e| self.stream("sending on the control channel")(e))
    }

    /// Sends a message about what the caller says.
    pub(crate) fn send_about(&mut self, about: About, body: Body) -> Result<(), Cause> {
        let message = Message::new(about, body);
        self.channel.writer.write_message(&message).map_err(|e| self.stream("sending on the control channel")(e))
    }

    /// Tells the peer that it is over, if it can still be told.
    pub(crate) fn abort(&mut self, why: &str) {
        if !self.broken {
            self.channel.writer.set_deadline(Some(Instant::now() + Duration::from_secs(1)));
            if let Err(error) = self.send(Body::Abort(Reason { text: why.into() })) {
                tracing::debug!(%error, "the peer could not be told");
            }
        }
    }

    /// Waits until the control channel or one of `others` is readable, or until `deadline`. Looks again and again for
    /// `spin` before it sleeps, because being woken costs the guest time in a blackout. Fails when cancelled.
    pub(crate) fn wait(&self, others: &[BorrowedFd<'_>], deadline: Instant, spin: Duration) -> Result<Woken, Cause> {
        let begun = Instant::now();
        loop {
            let now = Instant::now();
            let spinning = now.duration_since(begun) < spin;
            let left = deadline.saturating_duration_since(now).min(TICK);
            let timeout = if spinning { Duration::ZERO } else { left };
            let ready = self.poll(others, timeout)?;
            if self.journey.is_cancelled() {
                return Err(Cause::Cancelled);
            }
            if ready != Woken::default() || now >= deadline || self.journey.resolution().is_some() {
                return Ok(ready);
            }
            if spinning {
                // The peer may be waiting for this very processor.
                std::thread::yield_now();
            }
        }
    }

    fn poll(&self, others: &[BorrowedFd<'_>], timeout: Duration) -> Result<Woken, Cause> {
        let alarm = self.journey.alarm();
        let mut fds = Vec::with_capacity(others.len() + 2);
        let control = self.channel.reader.as_fd();
        fds.push(PollFd::new(&control, PollFlags::IN));
        fds.extend(others.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
        fds.extend(alarm.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
        let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Cause::Os { doing: "waiting for the peer", source: e.into() }),
        }
        let rung = alarm.is_some() && fds.last().is_some_and(|fd| !fd.revents().is_empty());
        if rung && !self.journey.is_cancelled() && self.journey.resolution().is_none() {
            // Somebody tried to cancel when it was too late.
            self.journey.quiet();
        }
        let other = fds[1..=others.len()].iter().position(|fd| !fd.revents().is_empty());
        Ok(Woken { control: !fds[0].revents().is_empty(), other })
    }

    /// Reads the message that [`wait`](Self::wait) has found. Pings are answered, aborts are errors, and both are not
    /// returned.
    pub(crate) fn read(&mut self) -> Result<Option<Body>, Cause> {
        let (about, body) =
            self.channel.reader.read_message().map_err(|e| self.stream("reading the control channel")(e))?;
        self.heard = Instant::now();
        tracing::trace!(kind = body.kind(), "heard");
        if self.about.incarnation.is_empty() && !about.incarnation.is_empty() && self.peer == Side::Destination {
            self.about.incarnation.clone_from(&about.incarnation);
        }
        if self.about.vm.is_empty() {
            self.about.clone_from(&about);
        }
        // Whoever gives up early may not know all of it yet.
        let same = (&about.vm, &about.attempt) == (&self.about.vm, &self.about.attempt);
        if about != self.about && !(same && matches!(body, Body::Abort(_))) {
            return Err(self.protocol(format!("a {} message about another VM, attempt or incarnation", body.kind())));
        }
        match body {
            Body::Ping(Empty {}) => self.send(Body::Pong(Empty {})).map(|()| None),
            Body::Abort(reason) => Err(Cause::Peer { peer: self.peer.as_str(), reason: printable(&reason.text) }),
            body => Ok(Some(body)),
        }
    }

    /// Waits for `others` only, while the control channel is somebody else's business.
    pub(crate) fn wait_others(&self, others: &[BorrowedFd<'_>], deadline: Instant) -> Result<(), Cause> {
        let mut fds: Vec<_> = others.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        let left = deadline.saturating_duration_since(Instant::now()).min(TICK);
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) if self.journey.is_cancelled() => Err(Cause::Cancelled),
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(Cause::Os { doing: "waiting for a thread", source: e.into() }),
        }
    }

    /// Waits for the control channel or for `other`, whether the journey was cancelled or not.
    pub(crate) fn wait_either(&self, other: BorrowedFd<'_>, deadline: Instant) -> Result<Woken, Cause> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let woken = self.poll(&[other], left.min(TICK))?;
            if woken != Woken::default() || left.is_zero() || self.journey.resolution().is_some() {
                return Ok(woken);
            }
        }
    }

    /// Why a data channel ended: what the peer says of that, if it says something.
    pub(crate) fn explain(&mut self, cause: Cause) -> Cause {
        match self.next("say why a data channel ended", Duration::from_millis(200), Duration::ZERO) {
            Err(said @ (Cause::Peer { .. } | Cause::Cancelled)) => said,
            _ => cause,
        }
    }

    /// [`wait_uncancelled`](Self::wait_uncancelled), looking for `spin` before it sleeps.
    pub(crate) fn wait_spinning(&self, deadline: Instant, spin: Duration) -> Result<bool, Cause> {
        let begun = Instant::now();
        while begun.elapsed() < spin {
            if self.poll(&[], Duration::ZERO)?.control {
                return Ok(true);
            }
            std::thread::yield_now();
        }
        self.wait_uncancelled(deadline)
    }

    /// Reads any message, of whomever, for the state machine to judge. Pings are answered and not returned.
    pub(crate) fn read_any(&mut self) -> Result<Option<(About, Body)>, Cause> {
        let (about, body) =
            self.channel.reader.read_message().map_err(|e| self.stream("reading the control channel")(e))?;
        self.heard = Instant::now();
        match body {
            Body::Ping(Empty {}) => self.send_about(about, Body::Pong(Empty {})).map(|()| None),
            Body::Pong(_) => Ok(None),
            body => Ok(Some((about, body))),
        }
    }

    /// Waits until there is something to read, whether the journey was cancelled or not: when it is too late for that.
    /// Returns early when it was resolved.
    pub(crate) fn wait_uncancelled(&self, deadline: Instant) -> Result<bool, Cause> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.poll(&[], left.min(TICK))?.control {
                return Ok(true);
            }
            if left.is_zero() || self.journey.resolution().is_some() {
                return Ok(false);
            }
        }
    }

    /// Waits for a message and reads it.
    pub(crate) fn next(&mut self, what: &'static str, limit: Duration, spin: Duration) -> Result<Body, Cause> {
        let begun = Instant::now();
        loop {
            if self.wait(&[], begun + limit, spin)?.control {
                if let Some(body) = self.read()? {
                    return Ok(body);
                }
            } else if begun.elapsed() >= limit {
                return Err(self.silent(what, limit));
            }
        }
    }

    /// For an answer that takes no work.
    pub(crate) fn silence_limit(&self) -> Duration {
        self.silent
    }

    /// Asks for a sign of life now and then, and fails when there has been none for too long. `asked`: when it was last
    /// asked for.
    pub(crate) fn keep_alive(&mut self, asked: &mut Instant) -> Result<(), Cause> {
        if asked.elapsed() <= SIGN_OF_LIFE {
            return Ok(());
        }
        if self.heard.elapsed() > self.silent {
            return Err(self.silent("answer a ping", self.heard.elapsed()));
        }
        *asked = Instant::now();
        self.send(Body::Ping(Empty {}))
    }

    /// Round trip of the control channel.
    pub(crate) fn round_trip(&mut self) -> Result<Duration, Cause> {
        let begun = Instant::now();
        self.send(Body::Ping(Empty {}))?;
        match self.next("answer a ping", self.silent, Duration::from_micros(500))? {
            Body::Pong(Empty {}) => Ok(begun.elapsed()),
            other => Err(self.protocol(format!("{} where a Pong was due", other.kind()))),
        }
    }
}

/// Text from a peer, fit to be shown: no control characters, not endless.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(2000).collect()
}

/// Random bytes for an id.
pub(crate) fn random_id() -> Result<[u8; 16], Cause> {
    use std::io::Read;
    let mut id = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut id))
        .map_err(|source| Cause::Os { doing: "reading /dev/urandom for an attempt id", source })?;
    Ok(id)
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
