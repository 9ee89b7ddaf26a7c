//! Phase `Setup` of the destination: wait for a source, agree, build the machine, take the data channels.

use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message as _;
use wherry_stream::message::{About, Accept, Begin, Body, Refuse};
use wherry_stream::{Channel, ChannelKind, Greeting, HelloRefusal, Listener, StreamError};

use super::Destination;
use super::host::Host;
use crate::error::Cause;
use crate::features;
use crate::journey::{Journey, Side};
use crate::link::{Control, TICK, hex, printable};
use crate::machine::{Machine, MachineDescription, Wants};
use crate::options::{MAX_CHANNELS, Mode};
use crate::ownership::{Attempt, DestinationDriver, DestinationInput, Finding, Message, Word};
use crate::predict::usual_destination_us;
use crate::records::Records;
use crate::testpoint::{Point, reach};

/// No machine has more blocks, units or larger parts than this; a description that claims so is refused.
const MAX_BLOCKS: usize = 256;
const MAX_UNITS: usize = 65_536;
const MAX_NAME: usize = 256;

/// What was agreed.
pub(super) struct Agreed {
    pub(super) data: Vec<Channel>,
    /// If both sides can do postcopy.
    pub(super) urgent: Option<Channel>,
    pub(super) verify: bool,
}

impl Destination<'_> {
    pub(super) fn setup(&mut self) -> Result<(Agreed, Instant), Cause> {
        let silent = self.options.timeouts.silent;
        let (mut control, attempt, begin, begun) = loop {
            let channel = self.wait_for_source()?;
            let begun = Instant::now();
            reach(&self.journey, Point::DestinationConnected);
            let attempt = channel.hello.attempt;
            let process = channel.peer_process();
            let mut control = Control::greeting(channel, self.journey.clone(), Side::Source, silent);
            match control.next("say what it wants to move", silent, Duration::ZERO)? {
                Body::Begin(begin) => {
                    self.source_process = process;
                    break (control, attempt, begin, begun);
                }
                body @ (Body::Resume(_) | Body::Query(_) | Body::Run(_)) => self.answer_stranger(control, &body)?,
                other => return Err(control.protocol(format!("{} where Begin was due", other.kind()))),
            }
        };
        let peer = control.peer_address().to_owned();
        self.journey.update(|job| {
            job.peer = peer;
            job.attempt = hex(&attempt);
        });
        if control.about.attempt != attempt {
            return Err(control.protocol("Begin is about another attempt than its channel"));
        }
        control.about.incarnation = self.incarnation.to_vec();
        reach(&self.journey, Point::DestinationAsked);

        let (machine, postcopy) = match self.build(&begin, &control.about) {
            Ok(built) => built,
            Err(reasons) => {
                control.send(Body::Refuse(Refuse { reasons: reasons.clone() }))?;
                return Err(Cause::Refused(reasons));
            }
        };
        self.journey.update(|job| {
            job.mode.clone_from(&begin.mode);
            job.channels = begin.channels;
            job.memory_total = machine.ram().size();
        });
        reach(&self.journey, Point::DestinationBuilt);
        self.host.control = Some(control);
        self.host.machine = Some(machine);
        self.begin_ownership()?;
        let features = features::accepted(&begin.features, postcopy);
        let postcopy = features.iter().any(|f| f == features::POSTCOPY);
        self.host.control()?.send(Body::Accept(Accept { features, load_us: usual_destination_us() }))?;

        let (data, urgent) = self.take_channels(attempt, begin.channels as u16, postcopy)?;
        reach(&self.journey, Point::DestinationReceiving);
        Ok((Agreed { data, urgent, verify: begin.verify }, begun))
    }

    /// Somebody asks for a VM of which this process knows nothing: the answer is in what an earlier process has recorded.
    fn answer_stranger(&self, mut control: Control, body: &Body) -> Result<(), Cause> {
        let attempt = Attempt::from_about(&control.about).map_err(|e| Cause::Ownership(e.to_string()))?;
        tracing::info!(
            word = body.kind(),
            from = control.peer_address(),
            "asked about a VM that is not in this process"
        );
        let claim = Records::open(&self.options.records).and_then(|r| r.claim(attempt.vm, Side::Destination));
        let answered = match claim.map(DestinationDriver::restarted) {
            Ok(Some(mut driver)) => {
                let mut host = Host::new(self.journey.clone());
                host.control = Some(control);
                driver.feed(DestinationInput::Message(Message { attempt, word: Word::Query }), &mut host);
                Ok(())
            }
            _ => match Word::Unknown(Finding::Nothing).to_body("") {
                Some(body) => control.send(body),
                None => Ok(()),
            },
        };
        if let Err(error) = answered {
            tracing::debug!(%error, "who asked has gone");
        }
        Ok(())
    }

    /// Waits for a control channel. Whoever else connects is told why not, and does not end the wait.
    fn wait_for_source(&self) -> Result<Channel, Cause> {
        let begun = Instant::now();
        loop {
            if let Some(greeting) = self.greet(&self.listener, TICK * 2)? {
                if greeting.hello().kind == ChannelKind::Control {
                    return greeting.accept().map_err(|source| Cause::Stream { doing: "greeting the source", source });
                }
                let _ = greeting.refuse(HelloRefusal::Attempt);
            }
            if let Some(limit) = self.options.wait_for_source
                && begun.elapsed() >= limit
            {
                return Err(Cause::Silent { peer: "source", what: "connect", waited: limit });
            }
        }
    }

    /// The next connection within `limit`, if it says hello properly. Only a listener that does not work is an error.
    pub(super) fn greet(&self, listener: &Listener, limit: Duration) -> Result<Option<Greeting>, Cause> {
        greet(listener, &self.journey, limit)
    }

    /// Checks what the engine can check, and has the VMM build the machine: the machine, and whether it can do postcopy.
    fn build(&self, begin: &Begin, about: &About) -> Result<(Arc<dyn Machine>, bool), Vec<String>> {
        let mut reasons = vec![];
        let mode = [Mode::Precopy, Mode::Postcopy, Mode::Hybrid].into_iter().find(|m| m.as_str() == begin.mode);
        if mode.is_none() {
            reasons.push(format!("migration mode {:?}, which is none", printable(&begin.mode)));
        }
        if begin.channels == 0 || begin.channels > MAX_CHANNELS.into() {
            reasons.push(format!("{} data channels: 1 to {MAX_CHANNELS} are possible", begin.channels));
        }
        let description = match MachineDescription::decode(begin.machine.as_slice()) {
            Ok(description) => description,
            Err(e) => {
                reasons.push(format!("the description of the machine cannot be decoded: {e}"));
                return Err(reasons);
            }
        };
        if description.vm != about.vm {
            reasons.push("the description is of another VM than the message".into());
        }
        reasons.extend(check_shape(&description, self.options.memory_limit));
        if !reasons.is_empty() {
            return Err(reasons);
        }
        let wanted = mode.is_some_and(Mode::may_follow);
        let machine = self.builder.build(&description, Wants { postcopy: wanted }).map_err(|refusal| refusal.0)?;
        let postcopy = match machine.faults() {
            _ if !wanted => false,
            Ok(_) => true,
            Err(why) if mode == Some(Mode::Postcopy) => return Err(vec![format!("postcopy: {why}")]),
            Err(why) => {
                tracing::warn!(why, "no postcopy here: the migration stays with precopy");
                false
            }
        };
        let built = machine.description();
        for wanted in &description.blocks {
            if !built.blocks.contains(wanted) {
                reasons.push(format!(
                    "RAM block {} at {:#x} of {} bytes in pages of {} bytes was not built",
                    wanted.id, wanted.guest_base, wanted.size, wanted.page_size
                ));
            }
        }
        for extra in built.blocks.iter().filter(|b| !description.blocks.contains(b)) {
            reasons.push(format!("RAM block {} was built, but the source has none like it", extra.id));
        }
        for wanted in description.units.iter().filter(|u| u.schema > 0) {
            match built.units.iter().find(|u| (&u.name, u.instance) == (&wanted.name, wanted.instance)) {
                None => reasons.push(format!("unit {}[{}]: there is none here", wanted.name, wanted.instance)),
                Some(unit) if unit.schema < wanted.schema => reasons.push(format!(
                    "unit {}[{}] has state of schema {}, this program reads up to {}",
                    wanted.name, wanted.instance, wanted.schema, unit.schema
                )),
                Some(_) => {}
            }
        }
        for extra in built.units.iter().filter(|u| u.schema > 0) {
            let there = |u: &&_| -> bool {
                let u: &crate::machine::UnitDescription = u;
                (&u.name, u.instance) == (&extra.name, extra.instance) && u.schema > 0
            };
            if !description.units.iter().any(|u| there(&u)) {
                reasons
                    .push(format!("unit {}[{}] needs state that the source does not have", extra.name, extra.instance));
            }
        }
        if reasons.is_empty() { Ok((machine, postcopy)) } else { Err(reasons) }
    }

    /// The data channels, and the urgent one if it is expected.
    pub(super) fn take_channels(
        &mut self,
        attempt: [u8; 16],
        count: u16,
        postcopy: bool,
    ) -> Result<(Vec<Channel>, Option<Channel>), Cause> {
        let deadline = Instant::now() + self.options.timeouts.connect;
        let mut slots: Vec<Option<Channel>> = (0..count).map(|_| None).collect();
        let mut urgent = None;
        while slots.iter().any(Option::is_none) || (postcopy && urgent.is_none()) {
            if Instant::now() >= deadline {
                return Err(self.host.control()?.silent("open its data channels", self.options.timeouts.connect));
            }
            let control = self.host.control()?;
            if control.wait(&[], Instant::now(), Duration::ZERO)?.control
                && let Some(other) = control.read()?
            {
                return Err(control.protocol(format!("{} before its data channels were open", other.kind())));
            }
            let Some(greeting) = self.greet(&self.listener, TICK)? else { continue };
            let hello = greeting.hello();
            if hello.attempt != attempt {
                let _ = greeting.refuse(HelloRefusal::Busy);
                continue;
            }
            let slot = match hello.kind {
                ChannelKind::Data => slots.get_mut(usize::from(hello.index)),
                ChannelKind::Urgent if postcopy && hello.index == 0 => Some(&mut urgent),
                _ => None,
            };
            match slot {
                Some(slot @ None) => {
                    let doing = "taking a channel";
                    *slot = Some(greeting.accept().map_err(|source| Cause::Stream { doing, source })?);
                }
                _ => {
                    let _ = greeting.refuse(HelloRefusal::Unexpected);
                }
            }
        }
        Ok((slots.into_iter().flatten().collect(), urgent))
    }
}

/// See [`Destination::greet`].
pub(super) fn greet(listener: &Listener, journey: &Journey, limit: Duration) -> Result<Option<Greeting>, Cause> {
    if journey.is_cancelled() {
        return Err(Cause::Cancelled);
    }
    let connection = match listener.accept(Instant::now() + limit) {
        Ok(connection) => connection,
        Err(StreamError::NobodyCame { .. }) => return Ok(None),
        Err(source) => return Err(Cause::Stream { doing: "waiting for the source", source }),
    };
    let guard = journey.close_on_cancel(connection.closer());
    let greeting = Greeting::read(connection, Instant::now() + Duration::from_secs(2));
    drop(guard);
    match greeting {
        Ok(greeting) => Ok(Some(greeting)),
        Err(error) => {
            tracing::warn!(%error, "somebody connected who is no source");
            Ok(None)
        }
    }
}

/// What is impossible in a description, whoever builds it.
fn check_shape(description: &MachineDescription, memory_limit: Option<u64>) -> Vec<String> {
    let mut reasons = vec![];
    if description.name.len() > MAX_NAME {
        reasons.push(format!("a name of {} bytes; {MAX_NAME} are possible", description.name.len()));
    }
    if description.blocks.is_empty() || description.blocks.len() > MAX_BLOCKS {
        reasons.push(format!("{} RAM blocks: 1 to {MAX_BLOCKS} are possible", description.blocks.len()));
    }
    if description.units.len() > MAX_UNITS {
        reasons.push(format!("{} state units: {MAX_UNITS} are possible", description.units.len()));
    }
    let mut total = 0u64;
    for block in description.blocks.iter().take(MAX_BLOCKS) {
        total = total.saturating_add(block.size);
        if block.guest_base.checked_add(block.size).is_none() || block.size == 0 || block.id > u16::MAX.into() {
            reasons.push(format!(
                "RAM block {} at {:#x} of {} bytes is impossible",
                block.id, block.guest_base, block.size
            ));
        }
    }
    if let Some(limit) = memory_limit
        && total > limit
    {
        reasons.push(format!("{total} bytes of RAM; this destination takes {limit}"));
    }
    reasons
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::BlockDescription;

    #[test]
    fn impossible_descriptions_are_refused_with_every_reason() {
        let block = |id, guest_base, size| BlockDescription { id, guest_base, size, page_size: 4096 };
        let description = MachineDescription {
            name: "x".repeat(300),
            blocks: vec![block(0, u64::MAX - 4095, 8192), block(70_000, 0, 4096), block(2, 1 << 40, 1 << 40)],
            ..Default::default()
        };
        assert_eq!(check_shape(&description, Some(1 << 30)).len(), 4);
        let good = MachineDescription { blocks: vec![block(0, 0, 4096)], ..Default::default() };
        assert!(check_shape(&good, None).is_empty());
        assert_eq!(check_shape(&MachineDescription::default(), None).len(), 1);
    }
}
