//! Phase `Setup`: connect, agree, have the destination built, open the data channels, start dirty tracking.

use std::time::{Duration, Instant};

use prost::Message as _;
use wherry_stream::message::{About, Begin, Body};
use wherry_stream::{Channel, ChannelKind, Hello};

use super::round::Shared;
use super::senders::Senders;
use super::{Running, Source};
use crate::bandwidth::Bucket;
use crate::dirty::{Dirty, Known, Tracker};
use crate::error::Cause;
use crate::features;
use crate::journey::Side;
use crate::link::{Control, hex, printable, random_id};
use crate::options::{MAX_CHANNELS, Mode};
use crate::predict::{Convergence, Predictor};
use crate::progress::Phase;
use crate::testpoint::{Point, reach};

/// With no wish of the user: so many channels for each core, because at either end of one there is a core at work.
fn default_channels() -> u16 {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    u16::try_from(cores).unwrap_or(MAX_CHANNELS).clamp(1, 8)
}

impl Source {
    pub(super) fn setup(&mut self) -> Result<Phase, Cause> {
        let begun = Instant::now();
        let channels = self.check_options()?;
        let blockers = self.machine.blockers();
        if !blockers.is_empty() {
            return Err(Cause::Blocked(blockers));
        }
        let attempt = random_id()?;
        self.journey.update(|job| {
            job.attempt = hex(&attempt);
            job.channels = channels.into();
        });
        let description = self.machine.description();
        if description.vm.len() != 16 {
            return Err(Cause::Option("the machine has no identity of 16 bytes".into()));
        }
        let about = About {
            vm: description.vm.clone(),
            epoch: self.claim(&description.vm)?,
            attempt: attempt.to_vec(),
            incarnation: vec![],
        };
        let mut control = self.connect_control(about)?;
        reach(&self.journey, Point::SourceConnected);

        control.send(Body::Begin(Begin {
            mode: self.options.mode.as_str().into(),
            channels: channels.into(),
            verify: self.options.verify,
            // What is hashed before the switch cannot follow it.
            features: features::offered(self.options.mode.may_follow() && !self.options.verify),
            machine: description.encode_to_vec(),
        }))?;
        let accept = match control.next("build the machine", self.options.timeouts.build, Duration::ZERO)? {
            Body::Accept(accept) => accept,
            Body::Refuse(refuse) => {
                return Err(Cause::Refused(refuse.reasons.iter().map(|r| printable(r)).collect()));
            }
            other => return Err(control.protocol(format!("{} in answer to Begin", other.kind()))),
        };
        if control.about.incarnation.len() != 16 {
            return Err(control.protocol("it accepted without naming its incarnation"));
        }
        let features = features::agreed(&accept.features).map_err(|what| control.protocol(what))?;
        tracing::debug!(?features, peer = control.peer_address(), "agreed");
        reach(&self.journey, Point::SourceAccepted);

        let about = control.about.clone();
        self.host.control = Some(control);
        self.begin_ownership(&about)?;
        let data =
            (0..channels).map(|index| self.open(ChannelKind::Data, index, attempt)).collect::<Result<Vec<_>, _>>()?;
        let urgent = match features.iter().any(|f| f == features::POSTCOPY) {
            true => Some(self.open(ChannelKind::Urgent, 0, attempt)?),
            false if self.options.mode == Mode::Postcopy => {
                return Err(Cause::Refused(vec!["postcopy: the destination does not say why it cannot".into()]));
            }
            false => None,
        };
        self.journey.set_may_follow(match self.options.mode {
            Mode::Precopy => Err("it was begun with `--mode precopy`"),
            _ if urgent.is_none() && self.options.verify => Err("memory is hashed before the switch (`--verify`)"),
            _ if urgent.is_none() => Err("the destination cannot do postcopy"),
            _ => Ok(()),
        });
        let mut predictor = Predictor::new(description.units.len(), accept.load_us);
        for _ in 0..3 {
            predictor.round_trip = predictor.round_trip.min(self.host.control()?.round_trip()?);
        }

        // Tracking runs before the first page is looked for, so whatever is allocated after the scan is found dirty.
        let mut tracker = Tracker::new(self.machine.clone());
        tracker.start()?;
        // Its answers are for the first round; what follows a switch has none, and what is hashed may not differ.
        let asks = self.options.mode != Mode::Postcopy && !self.options.verify;
        let free = if asks { tracker.ask_for_free_pages() } else { None };
        let collected = Instant::now();
        let pending = Dirty::allocated(self.machine.ram())?;
        let known: Vec<_> = pending.0.iter().map(|set| Known::new(set.limit())).collect();
        for (known, set) in known.iter().zip(&pending.0) {
            set.runs(0..set.limit()).for_each(|run| known.insert(run));
        }
        let shared = Shared {
            machine: self.machine.clone(),
            known: known.into(),
            journey: self.journey.clone(),
            bandwidth: self.options.bandwidth,
            bucket: Bucket::new().into(),
            about,
        };
        let bytes = pending.pages() * wherry_memory::GRANULE;
        let setup = begun.elapsed();
        self.journey.update(|job| {
            job.setup_time_us = crate::predict::us(setup);
            job.memory_total = bytes;
            job.memory_remaining = bytes;
            job.data_total = bytes;
            job.data_remaining = bytes;
        });
        self.running = Some(Running {
            senders: Senders::new(data)?,
            shared,
            tracker,
            free,
            predictor,
            convergence: Convergence::default(),
            pending,
            follow: self.options.mode == Mode::Postcopy,
            urgent,
            pushed: false,
            service: None,
            served: Default::default(),
            collected,
            started: Instant::now(),
            rounds: 0,
            grown: 0,
            surprises: 0,
        });
        reach(&self.journey, Point::SourceTracking);
        Ok(Phase::Precopy)
    }

    fn check_options(&self) -> Result<u16, Cause> {
        if self.options.mode == Mode::Postcopy && self.options.verify {
            return Err(Cause::Option(
                "all memory is hashed before the switch, and by postcopy it follows: choose".into(),
            ));
        }
        let channels = self.options.channels.unwrap_or_else(default_channels);
        if !(1..=MAX_CHANNELS).contains(&channels) {
            return Err(Cause::Option(format!("{channels} data channels: choose 1 to {MAX_CHANNELS}")));
        }
        Ok(channels)
    }

    /// Makes the control connection of an attempt.
    pub(super) fn connect_control(&self, about: About) -> Result<Control, Cause> {
        let attempt = about.attempt.first_chunk().copied().unwrap_or_default();
        let channel = self.open(ChannelKind::Control, 0, attempt)?;
        let silent = self.options.timeouts.silent;
        Ok(Control::new(channel, about, self.journey.clone(), Side::Destination, silent))
    }

    pub(super) fn open(&self, kind: ChannelKind, index: u16, attempt: [u8; 16]) -> Result<Channel, Cause> {
        let deadline = Instant::now() + self.options.timeouts.connect;
        let doing = "connecting";
        let failed = |source| Cause::Stream { doing, source };
        let connection = self.to.connect_unless(deadline, &|| self.journey.is_cancelled()).map_err(failed)?;
        let guard = self.journey.close_on_cancel(connection.closer());
        let mut channel = Hello { kind, index, attempt }.open(connection, deadline).map_err(failed)?;
        drop(guard);
        channel.set_idle_limit(self.options.timeouts.silent);
        Ok(channel)
    }
}
