//! The new process: builds the machine, takes its state, and runs it from the moment at which nobody else may.

use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message;
use wherry_handover::{Channel, KeptId, Registry, RunWord};
use wherry_state::StateFile;

use super::exec::{monotonic, read_note};
use super::message::{
    self, Body, Describe, Empty, Failed, Hello, Name, OLDEST, PROTOCOL, Refused, Running, State, Stopped,
};
use super::{ATTEMPT, Successor, UpdateError, UpdateOptions, WORD};
use crate::error::Cause;
use crate::journey::{EventKind, Journey};
use crate::machine::{Machine, MachineDescription, Refusal};
use crate::predict::us;
use crate::priority::Urgent;
use crate::progress::{Blackout, Job, Phase};
use crate::testpoint::{Point, reach};

/// The old process, in messages.
const PEER: &str = "old process";
/// What this program is.
const PROGRAM: &str = concat!("wherry ", env!("CARGO_PKG_VERSION"));
/// How long the state is waited for without sleeping, when it was announced.
const SPIN: Duration = Duration::from_millis(100);

/// Takes over from the process at the other end of `channel`, and returns when the machine runs here; or nothing, when it was only to be
/// proven that it could. After that, and after an error, this process is to end: it has nothing.
pub fn take_over(
    channel: Channel,
    successor: &dyn Successor,
    options: UpdateOptions,
    journey: &Journey,
) -> Result<Option<Arc<dyn Machine>>, UpdateError> {
    New::begin(channel, options, journey, false).run(successor)
}

/// Takes over what the program that this process executed before has left in `queue`, and returns when the machine runs. After an error
/// it is lost.
pub fn take_over_executed(
    queue: Channel,
    successor: &dyn Successor,
    options: UpdateOptions,
    journey: &Journey,
) -> Result<Arc<dyn Machine>, UpdateError> {
    // The blackout has begun.
    let _urgent = Urgent::new();
    let lost =
        |why: String| UpdateError::Lost(format!("the program that was executed cannot go on with the VM: {why}"));
    match New::begin(queue, options, journey, true).run(successor) {
        Ok(Some(machine)) => Ok(machine),
        Ok(None) => Err(lost("it was asked for a proof".into())),
        Err(UpdateError::Lost(why)) => Err(UpdateError::Lost(why)),
        Err(error) => Err(lost(error.to_string())),
    }
}

impl New {
    fn begin(channel: Channel, options: UpdateOptions, journey: &Journey, executed: bool) -> Self {
        Self { channel, options, journey: journey.clone(), registry: Registry::of_successor(), executed }
    }

    fn run(mut self, successor: &dyn Successor) -> Result<Option<Arc<dyn Machine>>, UpdateError> {
        let journey = self.journey.clone();
        journey.update(|job| {
            *job = Job { role: "destination".into(), mode: "update".into(), peer: PEER.into(), ..Job::default() };
        });
        journey.enter(Phase::Setup);
        let result = self.setup(successor).and_then(|built| {
            journey.enter(Phase::Switchover);
            self.switch(built)
        });
        match result {
            Ok(machine) => {
                journey.enter(Phase::Done);
                Ok(machine)
            }
            Err(cause) => Err(self.fail(cause)),
        }
    }
}

struct Built {
    machine: Arc<dyn Machine>,
    word: RunWord,
    vm: Vec<u8>,
    epoch: u64,
}

struct New {
    channel: Channel,
    options: UpdateOptions,
    journey: Journey,
    registry: Arc<Registry>,
    /// There is nobody at the other end: all that is ever said is there.
    executed: bool,
}

impl New {
    fn setup(&mut self, successor: &dyn Successor) -> Result<Built, Cause> {
        reach(&self.journey, Point::NewConnected);
        self.say(Body::Hello(Hello { newest: PROTOCOL, oldest: OLDEST, program: PROGRAM.into() }))?;
        let Describe { protocol, machine, host, epoch } = match self.hear(self.options.hello, Duration::ZERO)? {
            Body::Describe(describe) => describe,
            other => return Err(unexpected(&other)),
        };
        if !(OLDEST..=PROTOCOL).contains(&protocol) {
            let what = format!("version {protocol} of the update protocol");
            return Err(Cause::Protocol { peer: PEER, what });
        }
        let corrupt = |error: prost::DecodeError| Cause::Corrupt { what: "machine", detail: error.to_string() };
        let description = MachineDescription::decode(machine.as_slice()).map_err(corrupt)?;
        match self.hear(self.options.hello, Duration::ZERO)? {
            Body::Build(Empty {}) => {}
            other => return Err(unexpected(&other)),
        }
        reach(&self.journey, Point::NewDescribed);
        let word = self.registry.inherit(&KeptId::new(WORD, 0)).map_err(handover)?;
        let word = RunWord::adopt(word).map_err(handover)?;
        let machine = successor.build(&description, &self.registry, &host);
        let machine = machine.map_err(|Refusal(reasons)| Cause::Refused(reasons))?;
        self.all_claimed()?;
        reach(&self.journey, Point::NewBuilt);
        self.say(Body::Built(Empty {}))?;
        Ok(Built { machine, word, vm: description.vm, epoch })
    }

    /// Somebody's device would be without an owner.
    fn all_claimed(&self) -> Result<(), Cause> {
        let left = self.registry.unclaimed();
        if left.is_empty() {
            return Ok(());
        }
        let left: Vec<_> = left.iter().map(ToString::to_string).collect();
        Err(Cause::Refused(vec![format!("descriptors that this program has no use for: {}", left.join(", "))]))
    }

    fn switch(&mut self, built: Built) -> Result<Option<Arc<dyn Machine>>, Cause> {
        let Built { machine, word, vm, epoch } = built;
        // The old one has until its own deadlines; if it ends, so does this.
        let limit = self.options.build + self.options.drain;
        match self.hear(limit, Duration::ZERO)? {
            Body::Poise(Empty {}) => {}
            other => return Err(unexpected(&other)),
        }
        let _urgent = Urgent::new();
        let State { state, digest, proof, stopped } = match self.hear(self.options.stop * 2, SPIN)? {
            Body::State(state) => state,
            other => return Err(unexpected(&other)),
        };
        reach(&self.journey, Point::NewAsked);
        let loading = Instant::now();
        let corrupt = |detail: String| Cause::Corrupt { what: "state", detail };
        let file = StateFile::decode(state.as_slice()).map_err(|error| corrupt(error.to_string()))?;
        if file.digest()[..] != digest[..] {
            return Err(corrupt("its digest is not the one that was sent".into()));
        }
        machine.units().restore(&file)?;
        self.all_claimed()?;
        let load_us = us(loading.elapsed());
        reach(&self.journey, Point::NewLoaded);
        if proof {
            self.prove()?;
            return Ok(None);
        }

        // From here on this process runs the machine, and no other ever will.
        let starting = Instant::now();
        if let Err(who) = word.run(ATTEMPT) {
            return Err(Cause::Handover(format!("the VM was not given to this process: {who}")));
        }
        reach(&self.journey, Point::NewRuns);
        self.registry.settle();
        crate::epoch::set(&vm, epoch);
        machine.units().start().map_err(|error| {
            let why = format!("the VM is this process's now, and could not be started: {error}");
            tracing::error!("{why}");
            Cause::Lost(why)
        })?;
        let start_us = us(starting.elapsed());
        reach(&self.journey, Point::NewStarted);
        // Whoever handed over may have been killed meanwhile.
        let running = Running { load_us, start_us };
        if let Some(stopped) = stopped {
            self.note(&stopped, &running);
        }
        if let Err(error) = self.say(Body::Running(running)) {
            tracing::warn!(%error, "telling the old process that the VM runs here");
        }
        self.journey.tell(EventKind::Phase, |job| job.error = None);
        Ok(Some(machine))
    }

    /// Says that it could run the machine, and waits for the end that it is to come to.
    fn prove(&mut self) -> Result<(), Cause> {
        self.say(Body::Proven(Empty {}))?;
        match self.hear(self.options.load * 2, Duration::ZERO) {
            Err(Cause::Handover(_)) => Ok(()),
            Err(cause) => Err(cause),
            Ok(other) => Err(unexpected(&other)),
        }
    }

    /// Writes down how it went: whoever began it is gone.
    fn note(&self, stopped: &Stopped, running: &Running) {
        let total_us = monotonic().saturating_sub(stopped.at_ns) / 1000;
        let &Running { load_us, start_us } = running;
        let known = stopped.stop_us + stopped.save_us + load_us + start_us;
        let blackout = Blackout {
            total_us,
            stop_us: stopped.stop_us,
            state_us: stopped.save_us,
            load_us,
            start_us,
            network_us: total_us.saturating_sub(known),
            ..Blackout::default()
        };
        self.journey.update(|job| {
            job.peer = PROGRAM.into();
            job.setup_time_us = stopped.setup_us;
            job.io_stall_us = stopped.stall_us;
            job.blackout = Some(blackout);
            job.downtime_us = total_us;
        });
    }

    /// Tells the old process why this one ends.
    fn fail(&mut self, cause: Cause) -> UpdateError {
        let body = match &cause {
            Cause::Refused(reasons) => Body::Refused(Refused { reasons: reasons.clone() }),
            cause => Body::Failed(Failed { reason: cause.to_string() }),
        };
        if let Err(error) = self.say(body) {
            tracing::debug!(%error, "telling the old process why this one ends");
        }
        let error = match cause {
            Cause::Refused(reasons) => UpdateError::Refused(reasons),
            Cause::Lost(why) => UpdateError::Lost(why),
            cause => UpdateError::NotHere(cause),
        };
        self.journey.tell(EventKind::Phase, |job| {
            job.phase = Phase::Failed;
            job.error = Some(error.to_string());
        });
        error
    }

    fn say(&self, body: Body) -> Result<(), Cause> {
        if self.executed {
            return Ok(());
        }
        Ok(self.channel.send(body.tag(), &body.encode(), &[], Instant::now() + self.options.hello)?)
    }

    /// The next message that is none about descriptors: those are taken in on the way.
    fn hear(&mut self, limit: Duration, spin: Duration) -> Result<Body, Cause> {
        let deadline = Instant::now() + limit;
        loop {
            let parcel = self.channel.receive(deadline, spin)?;
            let corrupt = |error: std::io::Error| Cause::Corrupt { what: "state", detail: error.to_string() };
            let id = |name: &Name| KeptId::new(name.name.clone(), name.index);
            match message::read(&parcel, PEER)? {
                Body::StateNote(Empty {}) => {
                    // It was counted.
                    let note = parcel.descriptors.into_iter().next().ok_or(Cause::Cancelled)?;
                    return Ok(Body::State(read_note(note).map_err(corrupt)?));
                }
                Body::Kept(names) => {
                    let ids = names.names.iter().map(id);
                    self.registry.arrived(ids.zip(parcel.descriptors)).map_err(handover)?;
                }
                Body::Gone(names) => names.names.iter().for_each(|name| self.registry.withdraw(&id(name))),
                other => return Ok(other),
            }
        }
    }
}

fn handover(error: impl std::fmt::Display) -> Cause {
    Cause::Handover(error.to_string())
}

fn unexpected(body: &Body) -> Cause {
    match body {
        Body::Failed(failed) => Cause::Peer { peer: PEER, reason: crate::link::printable(&failed.reason) },
        other => Cause::Protocol { peer: PEER, what: format!("{} out of turn", other.kind()) },
    }
}
