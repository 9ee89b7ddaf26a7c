//! The world in which the two state machines are checked: two kinds of host with processes, copies of the VM, record
//! files; a network; an operator. The world follows from the *effects* alone: it never looks into a state machine to say
//! who runs.
//!
//! - The network keeps every word for ever and delivers any of them at any time, any number of times, in any order, to the
//!   process it is meant for or to a stranger at the same address. A word that is lost is one that is never delivered.
//! - A process may die between any two effects of one step. It then loses its memory, and with it its copy of the VM. A
//!   reboot also loses the records, but for durable intents.
//! - Timers fire whenever they like, links break and come back whenever they like.
//! - An operator resolves where the protocol allows it, and speaks the truth, unless [`Model::operator_lies`].

mod effects;

use std::collections::{BTreeSet, VecDeque};

use wherry_migration::Side;
use wherry_migration::ownership::{
    Attempt, AttemptId, Carriage, DestinationEffect, DestinationInput, DestinationOwner, DestinationRecord,
    DestinationState, Incarnation, Message, SourceEffect, SourceInput, SourceOwner, SourceRecord, SourceState, VmId,
};

use crate::mutation::Mutation;

/// What there is of the VM in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Copy {
    None,
    AtRest,
    Runs,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SourceHost {
    pub up: bool,
    pub owner: Option<SourceOwner>,
    pub copy: Copy,
    pub record: Option<SourceRecord>,
    /// The intent on disk.
    durable: Option<SourceRecord>,
    pending: VecDeque<SourceEffect>,
    reply: Option<SourceInput>,
    /// Attempts begun.
    begun: usize,
    /// An operator has said that the VM is the source's.
    pub resolved: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DestinationHost {
    pub up: bool,
    pub owner: Option<DestinationOwner>,
    pub copy: Copy,
    pub record: Option<DestinationRecord>,
    pending: VecDeque<DestinationEffect>,
    reply: Option<DestinationInput>,
    loading: bool,
    /// Its incarnation has taken part; the next one is another.
    begun: bool,
    pub ever_ran: bool,
    /// The source has run on since the offer: the copy is of the past.
    pub stale: bool,
    /// What arrived could not be loaded.
    unusable: bool,
    /// An operator has said that the VM is the destination's.
    pub resolved: bool,
}

impl DestinationHost {
    /// Neither has a copy nor will have one.
    fn is_out(&self) -> bool {
        let over = |o: &DestinationOwner| {
            use DestinationState::{Broken, Died, NeverRuns, Withdrawn};
            matches!(o.state(), Broken | Died(_) | NeverRuns | Withdrawn)
        };
        self.copy == Copy::None && (!self.up || self.owner.as_ref().is_none_or(over))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub source: SourceHost,
    pub destinations: Vec<DestinationHost>,
    /// Every word ever said, with who said it.
    network: BTreeSet<(Side, Message)>,
    /// The source's host has booted the VM by itself.
    pub booted: bool,
    crashes: u8,
    failures: u8,
    /// A copy was let run by the protocol although a newer one had run.
    pub rolled_back: bool,
    /// The last complete copy was thrown away by the protocol.
    pub wasted: bool,
}

impl World {
    pub fn running(&self) -> usize {
        usize::from(self.source.copy == Copy::Runs)
            + usize::from(self.booted)
            + self.destinations.iter().filter(|d| d.copy == Copy::Runs).count()
    }

    /// Whether the other destinations neither have a copy nor will have one.
    fn all_out_but(&self, n: usize) -> bool {
        self.destinations.iter().enumerate().all(|(m, d)| m == n || d.is_out())
    }

    /// Whether somebody has a copy of the VM that is whole, new and usable.
    pub fn complete_copy(&self, carriage: Carriage) -> bool {
        let gone = self.destinations.iter().any(|d| d.ever_ran);
        (self.source.copy != Copy::None && !gone)
            || self.destinations.iter().any(|d| match d.copy {
                Copy::None => false,
                Copy::Runs => true,
                // An operator who said that the source has the VM has given this one up.
                Copy::AtRest => carriage == Carriage::Whole && !d.stale && !d.unusable && !self.source.resolved,
            })
    }
}

/// What can happen in the world.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    SourceLocal(SourceInput),
    SourceEffect { fails: bool },
    SourceCrash { reboot: bool },
    SourceRestart,
    SourceBoots,
    ToSource(Message),
    NextAttempt,
    DestinationBegins(usize),
    DestinationLocal(usize, DestinationInput),
    DestinationEffect(usize, Outcome),
    DestinationCrash(usize),
    DestinationRestart(usize),
    ToDestination(usize, Message),
    ToStranger(Message),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    Well,
    Fails,
    FailsHavingRun,
}

impl Action {
    /// Whether something goes wrong that need not.
    pub fn is_fault(&self) -> bool {
        match self {
            Action::SourceEffect { fails } => *fails,
            Action::DestinationEffect(_, outcome) => *outcome != Outcome::Well,
            Action::SourceCrash { .. } | Action::DestinationCrash(_) | Action::SourceBoots => true,
            Action::DestinationLocal(_, DestinationInput::LoadFailed) => true,
            _ => false,
        }
    }
}

/// How large and how bad the world is.
#[derive(Clone, Debug)]
pub struct Model {
    pub carriage: Carriage,
    /// Destinations, each for one attempt.
    pub destinations: usize,
    /// Crashes of any process, at most.
    pub crashes: u8,
    /// Failed writes, locks, resumes and starts, at most.
    pub failures: u8,
    /// Crashes of the source may be reboots.
    pub reboots: bool,
    /// Intents survive a reboot.
    pub durable_intents: bool,
    /// Nothing goes wrong at all: no timers, no losses, no repetition.
    pub calm: bool,
    /// There is an operator.
    pub operator: bool,
    /// Words also reach a process that is nobody's destination.
    pub strangers: bool,
    pub operator_lies: bool,
    /// Also ask for what must be possible.
    pub witnesses: bool,
    pub mutation: Mutation,
}

impl Model {
    /// The usual one.
    pub fn new(carriage: Carriage) -> Self {
        Self {
            carriage,
            destinations: 1,
            crashes: 2,
            failures: 1,
            reboots: false,
            durable_intents: true,
            calm: false,
            operator: true,
            strangers: true,
            operator_lies: false,
            witnesses: false,
            mutation: Mutation::None,
        }
    }
}

pub fn attempt(number: usize) -> Attempt {
    let n = number as u8 + 1;
    Attempt { vm: VmId([7; 16]), epoch: 5, id: AttemptId([n; 16]), incarnation: Incarnation([n | 0x80; 16]) }
}

impl stateright::Model for Model {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let destination = DestinationHost {
            up: true,
            owner: None,
            copy: Copy::None,
            record: None,
            pending: VecDeque::new(),
            reply: None,
            loading: false,
            begun: false,
            ever_ran: false,
            stale: false,
            unusable: false,
            resolved: false,
        };
        vec![World {
            source: SourceHost {
                up: true,
                owner: None,
                copy: Copy::Runs,
                record: None,
                durable: None,
                pending: VecDeque::new(),
                reply: None,
                begun: 0,
                resolved: false,
            },
            destinations: vec![destination; self.destinations],
            network: BTreeSet::new(),
            booted: false,
            crashes: self.crashes,
            failures: self.failures,
            rolled_back: false,
            wasted: false,
        }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        self.source_actions(world, actions);
        for (n, destination) in world.destinations.iter().enumerate() {
            self.destination_actions(world, n, destination, actions);
        }
        self.deliveries(world, actions);
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut world = last.clone();
        match action {
            Action::SourceLocal(input) => self.source_step(&mut world, input),
            Action::SourceEffect { fails } => self.source_effect(&mut world, fails),
            Action::SourceCrash { reboot } => self.source_crash(&mut world, reboot),
            Action::SourceRestart => {
                world.source.up = true;
                world.source.owner = world.source.record.as_ref().map(SourceOwner::restarted);
            }
            Action::SourceBoots => world.booted = true,
            Action::ToSource(message) => {
                if self.calm {
                    world.network.remove(&(Side::Destination, message));
                }
                self.source_step(&mut world, SourceInput::Message(message));
            }
            Action::NextAttempt => {
                let unsettled = world.source.owner.as_ref().is_some_and(SourceOwner::leaves_unsettled);
                let owner = SourceOwner::new(attempt(world.source.begun), unsettled);
                world.source.begun += 1;
                world.source.owner = Some(owner);
                self.source_step(&mut world, SourceInput::Begin);
            }
            Action::DestinationBegins(n) => {
                world.destinations[n].owner = Some(DestinationOwner::new(attempt(n)));
                world.destinations[n].begun = true;
                self.destination_step(&mut world, n, DestinationInput::Begin);
            }
            Action::DestinationLocal(n, input) => {
                match input {
                    DestinationInput::Loaded => {
                        world.destinations[n].loading = false;
                        world.destinations[n].copy = Copy::AtRest;
                    }
                    DestinationInput::LoadFailed => {
                        world.destinations[n].loading = false;
                        world.destinations[n].unusable = true;
                    }
                    _ => {}
                }
                self.destination_step(&mut world, n, input);
            }
            Action::DestinationEffect(n, outcome) => self.destination_effect(&mut world, n, outcome),
            Action::DestinationCrash(n) => {
                world.crashes -= 1;
                let host = &mut world.destinations[n];
                *host = DestinationHost {
                    up: false,
                    owner: None,
                    copy: Copy::None,
                    loading: false,
                    reply: None,
                    ..host.clone()
                };
                host.pending.clear();
            }
            Action::DestinationRestart(n) => {
                let host = &mut world.destinations[n];
                host.up = true;
                host.owner = host.record.as_ref().map(DestinationOwner::restarted);
            }
            Action::ToDestination(n, message) => {
                if self.calm {
                    world.network.remove(&(Side::Source, message));
                }
                self.destination_step(&mut world, n, DestinationInput::Message(message));
            }
            Action::ToStranger(message) => {
                let answer = self.mutation.stranger(DestinationOwner::answer_of_a_stranger(&message));
                world.network.extend(answer.map(|a| (Side::Destination, a)));
            }
        }
        (world != *last).then_some(world)
    }

    fn properties(&self) -> Vec<stateright::Property<Self>> {
        crate::properties(self)
    }
}

impl Model {
    fn source_actions(&self, world: &World, actions: &mut Vec<Action>) {
        use SourceInput as In;
        let source = &world.source;
        if !source.up {
            return actions.push(Action::SourceRestart);
        }
        if world.crashes > 0 && source.begun > 0 {
            actions.push(Action::SourceCrash { reboot: false });
            if self.reboots {
                actions.push(Action::SourceCrash { reboot: true });
            }
        }
        if let Some(effect) = source.pending.front() {
            actions.push(Action::SourceEffect { fails: false });
            if world.failures > 0 && *effect != SourceEffect::Discard {
                actions.push(Action::SourceEffect { fails: true });
            }
            return;
        }
        // A host boots what it once ran, if no record forbids it and nothing is left of it.
        let free = source.owner.as_ref().is_none_or(|o| o.state() == SourceState::Free);
        if source.copy == Copy::None && source.record.is_none() && free && !world.booted && source.begun > 0 {
            actions.push(Action::SourceBoots);
        }
        let state = source.owner.as_ref().map(SourceOwner::state);
        let kept = matches!(state, None | Some(SourceState::Kept { .. }));
        if source.copy == Copy::Runs && kept && source.begun < self.destinations {
            actions.push(Action::NextAttempt);
        }
        let Some(state) = state else { return };
        let host = &world.destinations[source.begun - 1];
        let mut local = |input| actions.push(Action::SourceLocal(input));
        match state {
            // Not before the handshake has ended: both sides have recorded the intent, or failed to.
            SourceState::Intended if host.begun && host.pending.is_empty() => local(In::Stopped),
            SourceState::Stopped => {
                local(In::Offer(self.carriage));
                if !self.calm {
                    local(In::AnotherRound);
                }
            }
            SourceState::Serving => local(In::AllServed),
            _ => {}
        }
        if !self.calm {
            [In::Abort, In::Timeout, In::LinkLost, In::LinkUp].into_iter().for_each(&mut local);
        }
        if self.operator {
            // Nobody else has it or will have it: dead, or gave up for good.
            if self.operator_lies || world.destinations.iter().all(DestinationHost::is_out) {
                local(In::Resolve(Side::Source));
            }
            // It has run there; or there is nothing here that could be thrown away.
            let there = host.ever_ran || (source.copy == Copy::None && host.copy != Copy::None);
            if self.operator_lies || (there && world.all_out_but(source.begun - 1)) {
                local(In::Resolve(Side::Destination));
            }
        }
    }

    fn destination_actions(&self, world: &World, n: usize, host: &DestinationHost, actions: &mut Vec<Action>) {
        use DestinationInput as In;
        if !host.up {
            return actions.push(Action::DestinationRestart(n));
        }
        if world.crashes > 0 && host.owner.is_some() {
            actions.push(Action::DestinationCrash(n));
        }
        if let Some(effect) = host.pending.front() {
            actions.push(Action::DestinationEffect(n, Outcome::Well));
            if world.failures > 0 && *effect != DestinationEffect::Discard {
                actions.push(Action::DestinationEffect(n, Outcome::Fails));
                if *effect == DestinationEffect::Start {
                    actions.push(Action::DestinationEffect(n, Outcome::FailsHavingRun));
                }
            }
            return;
        }
        let Some(owner) = &host.owner else {
            // The connection of the handshake brings both sides together.
            let begins = |o: &SourceOwner| {
                *o.attempt() == attempt(n) && matches!(o.state(), SourceState::RecordingIntent | SourceState::Intended)
            };
            let begun = world.source.owner.as_ref().is_some_and(begins);
            if begun && !host.begun {
                actions.push(Action::DestinationBegins(n));
            }
            return;
        };
        let mut local = |input| actions.push(Action::DestinationLocal(n, input));
        if host.loading {
            local(In::Loaded);
            if world.failures > 0 {
                local(In::LoadFailed);
            }
        }
        if owner.state() == DestinationState::LacksPages {
            local(In::AllPages);
        }
        if !self.calm {
            [In::Abort, In::Timeout, In::LinkLost, In::LinkUp].into_iter().for_each(&mut local);
        }
        if self.operator {
            // The source is dead, or in doubt and waits for us (not after we promised it not to); and nobody else has it.
            let source = &world.source;
            let state = source.owner.as_ref().map(SourceOwner::state);
            let gave = matches!(state, Some(SourceState::RunRecorded | SourceState::InDoubt | SourceState::Gone))
                && source.owner.as_ref().is_some_and(|o| *o.attempt() == attempt(n));
            let dead = source.copy == Copy::None && !world.booted;
            let promised = owner.state() == DestinationState::Declined;
            if self.operator_lies || ((dead || (gave && !promised)) && world.all_out_but(n)) {
                local(In::Resolve(Side::Destination));
            }
            if self.operator_lies || source.copy != Copy::None {
                local(In::Resolve(Side::Source));
            }
        }
    }

    fn deliveries(&self, world: &World, actions: &mut Vec<Action>) {
        for (from, message) in &world.network {
            if *from == Side::Destination {
                let source = &world.source;
                if source.up && source.pending.is_empty() && source.owner.is_some() {
                    actions.push(Action::ToSource(*message));
                }
                continue;
            }
            let n = usize::from(message.attempt.id.0[0] - 1);
            let host = &world.destinations[n];
            if host.up && host.pending.is_empty() && host.owner.is_some() {
                actions.push(Action::ToDestination(n, *message));
            }
            if self.strangers && !self.calm {
                actions.push(Action::ToStranger(*message));
            }
        }
    }
}
