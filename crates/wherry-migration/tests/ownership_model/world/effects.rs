//! What happens when the state machines take a step, and when what they ask for is done, fails, or is cut short.

use wherry_migration::Side;
use wherry_migration::ownership::{
    Carriage, DestinationEffect, DestinationInput, SourceEffect, SourceInput, SourceRecord, SourceStage, SourceState,
};

use super::{Copy, Model, Outcome, World};

impl Model {
    pub(super) fn source_crash(&self, world: &mut World, reboot: bool) {
        world.crashes -= 1;
        let source = &mut world.source;
        source.up = false;
        source.owner = None;
        source.copy = Copy::None;
        source.pending.clear();
        source.reply = None;
        world.booted = false;
        if reboot {
            source.record = source.durable;
        }
    }

    pub(super) fn source_step(&self, world: &mut World, input: SourceInput) {
        let Some(owner) = &mut world.source.owner else { return };
        let before = owner.clone();
        let input = self.mutation.source_input(&before, input);
        let effects = owner.step(input);
        // Only a resolution that decided something counts as one.
        if let SourceInput::Resolve(side) = input
            && before.state() != owner.state()
        {
            match side {
                Side::Source => world.source.resolved = true,
                Side::Destination => world.destinations.iter_mut().for_each(|d| d.resolved = true),
            }
        }
        if input == SourceInput::AnotherRound && before.state() == SourceState::Stopped {
            self.source_runs(world);
        }
        if input == SourceInput::Stopped && before.state() == SourceState::Intended {
            world.source.copy = Copy::AtRest;
        }
        if let SourceInput::Offer(_) = input {
            world.destinations[world.source.begun - 1].stale = false;
        }
        world.source.pending = self.mutation.source_effects(&before, input, effects).into();
        self.source_drain(world);
    }

    /// Words are sent and reports made at once: a word that is not sent because of a crash is like one that is lost.
    fn source_drain(&self, world: &mut World) {
        while let Some(effect) = world.source.pending.front().copied() {
            match effect {
                SourceEffect::Send(message) => {
                    world.network.insert((Side::Source, message));
                }
                SourceEffect::Report(_) => {}
                _ => return,
            }
            world.source.pending.pop_front();
        }
        if let Some(reply) = world.source.reply.take() {
            self.source_step(world, reply);
        }
    }

    fn source_runs(&self, world: &mut World) {
        let source = &mut world.source;
        assert!(source.copy == Copy::AtRest, "only a VM at rest can be resumed: {source:?}");
        source.copy = Copy::Runs;
        world.rolled_back |= world.destinations.iter().any(|d| d.ever_ran) && !source.resolved;
        world.destinations.iter_mut().for_each(|d| d.stale = true);
    }

    pub(super) fn source_effect(&self, world: &mut World, fails: bool) {
        world.failures -= u8::from(fails);
        let Some(effect) = world.source.pending.pop_front() else { return };
        match effect {
            SourceEffect::Persist(record) => {
                assert!(world.source.pending.is_empty(), "nothing may follow what must be recorded first");
                self.source_save(world, record, fails);
                world.source.reply = Some(if fails { SourceInput::PersistFailed } else { SourceInput::Persisted });
            }
            SourceEffect::Note(record) => self.source_save(world, record, fails),
            SourceEffect::Clear if fails => {}
            SourceEffect::Clear => {
                world.source.record = None;
                world.source.durable = None;
            }
            SourceEffect::ReleaseLocks => {
                world.source.reply = Some(if fails { SourceInput::LocksFailed } else { SourceInput::LocksReleased });
            }
            SourceEffect::Resume { .. } if fails => world.source.reply = Some(SourceInput::ResumeFailed),
            SourceEffect::Resume { .. } => {
                self.source_runs(world);
                world.source.reply = Some(SourceInput::Resumed);
            }
            SourceEffect::Discard => {
                let given = world.destinations.iter().any(|d| d.ever_ran || d.resolved);
                world.wasted |= world.source.copy != Copy::None && !given;
                world.source.copy = Copy::None;
            }
            SourceEffect::Send(_) | SourceEffect::Report(_) => unreachable!("drained"),
        }
        self.source_drain(world);
    }

    fn source_save(&self, world: &mut World, record: SourceRecord, fails: bool) {
        if !fails {
            world.source.record = Some(record);
            if self.durable_intents && record.stage == SourceStage::Intent {
                world.source.durable = Some(record);
            }
        }
    }

    pub(super) fn destination_step(&self, world: &mut World, n: usize, input: DestinationInput) {
        let host = &mut world.destinations[n];
        let Some(owner) = &mut host.owner else { return };
        let before = owner.clone();
        let input = self.mutation.destination_input(&before, input);
        let effects = owner.step(input);
        if let DestinationInput::Resolve(side) = input
            && before.state() != owner.state()
        {
            match side {
                Side::Source => world.source.resolved = true,
                Side::Destination => host.resolved = true,
            }
        }
        host.pending = self.mutation.destination_effects(input, effects).into();
        self.destination_drain(world, n);
    }

    fn destination_drain(&self, world: &mut World, n: usize) {
        let host = &mut world.destinations[n];
        while let Some(effect) = host.pending.front().copied() {
            match effect {
                DestinationEffect::Send(message) => {
                    world.network.insert((Side::Destination, message));
                }
                DestinationEffect::Report(_) => {}
                DestinationEffect::Load => host.loading = true,
                _ => return,
            }
            host.pending.pop_front();
        }
        if let Some(reply) = host.reply.take() {
            self.destination_step(world, n, reply);
        }
    }

    pub(super) fn destination_effect(&self, world: &mut World, n: usize, outcome: Outcome) {
        use DestinationInput as In;
        let fails = outcome != Outcome::Well;
        world.failures -= u8::from(fails);
        let source_copy = world.source.copy;
        let source_resolved = world.source.resolved;
        let host = &mut world.destinations[n];
        let Some(effect) = host.pending.pop_front() else { return };
        match effect {
            DestinationEffect::Persist(record) => {
                assert!(host.pending.is_empty(), "nothing may follow what must be recorded first");
                if !fails {
                    host.record = Some(record);
                }
                host.reply = Some(if fails { In::PersistFailed } else { In::Persisted });
            }
            DestinationEffect::Note(_) | DestinationEffect::Clear if fails => {}
            DestinationEffect::Note(record) => host.record = Some(record),
            DestinationEffect::Clear => host.record = None,
            DestinationEffect::TakeLocks => {
                host.reply = Some(if fails { In::LocksFailed } else { In::LocksTaken });
            }
            DestinationEffect::ReleaseLocks => {}
            DestinationEffect::Start => {
                host.reply = Some(match outcome {
                    Outcome::Well => In::Started,
                    Outcome::Fails => In::StartFailed { ran: false },
                    Outcome::FailsHavingRun => In::StartFailed { ran: true },
                });
                host.ever_ran |= outcome != Outcome::Fails;
                match outcome {
                    Outcome::Well => {
                        assert!(host.copy == Copy::AtRest, "only what was loaded can be started: {host:?}");
                        host.copy = Copy::Runs;
                        world.rolled_back |= host.stale && !host.resolved;
                    }
                    Outcome::Fails => {}
                    Outcome::FailsHavingRun => host.copy = Copy::None,
                }
            }
            DestinationEffect::Discard => {
                let complete = host.copy == Copy::AtRest && self.carriage == Carriage::Whole;
                let kept_elsewhere = source_copy != Copy::None || host.stale || source_resolved;
                world.wasted |= (complete && !host.unusable && !kept_elsewhere) || host.copy == Copy::Runs;
                host.copy = Copy::None;
                host.loading = false;
            }
            DestinationEffect::Send(_) | DestinationEffect::Report(_) | DestinationEffect::Load => {
                unreachable!("drained")
            }
        }
        self.destination_drain(world, n);
    }
}
