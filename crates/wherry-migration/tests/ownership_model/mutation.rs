//! Mistakes one could make in the state machines. The checker must find each of them: a checker that finds nothing in a
//! broken protocol says nothing about a sound one.

use wherry_migration::Side;
use wherry_migration::ownership::{
    DestinationEffect, DestinationInput, DestinationOwner, DestinationState, Message, SourceEffect, SourceInput,
    SourceOwner, SourceRecord, SourceStage, SourceState, Word,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mutation {
    None,
    /// A process that was never ready answers `NotRun`.
    StrangerSaysNotRun,
    /// `Run` is sent before it is recorded.
    RunBeforeRecord,
    /// The source takes `Unknown` for `NotRun`.
    UnknownDecides,
    /// The source resumes when the destination does not answer `Run`.
    SourceResumesInDoubt,
    /// The source can be cancelled after it has recorded the run.
    CancelAfterRun,
    /// The source gives up its copy when it sends `Run`.
    SourceDiscardsEarly,
    /// A ready destination runs when the link is gone.
    DestinationRunsAlone,
    /// A ready destination gives up when the link is gone.
    DestinationGivesUp,
    /// A destination that promised never to run does, when it is told to.
    PromiseBroken,
    /// The source forgets its record although a ready destination may be left.
    IntentForgotten,
    /// A destination whose VM broke after it had run says `NotRun`.
    NotRunAfterRunning,
}

impl Mutation {
    pub const ALL: &'static [Mutation] = &[
        Mutation::StrangerSaysNotRun,
        Mutation::RunBeforeRecord,
        Mutation::UnknownDecides,
        Mutation::SourceResumesInDoubt,
        Mutation::CancelAfterRun,
        Mutation::SourceDiscardsEarly,
        Mutation::DestinationRunsAlone,
        Mutation::DestinationGivesUp,
        Mutation::PromiseBroken,
        Mutation::IntentForgotten,
        Mutation::NotRunAfterRunning,
    ];

    pub fn stranger(self, answer: Option<Message>) -> Option<Message> {
        match self {
            Mutation::StrangerSaysNotRun => answer.map(|a| Message { word: Word::NotRun, ..a }),
            _ => answer,
        }
    }

    pub fn source_input(self, owner: &SourceOwner, input: SourceInput) -> SourceInput {
        let attempt = *owner.attempt();
        let not_run = SourceInput::Message(Message { attempt, word: Word::NotRun });
        let given = matches!(owner.state(), SourceState::RunRecorded | SourceState::InDoubt);
        match (self, input) {
            (Mutation::UnknownDecides, SourceInput::Message(Message { word: Word::Unknown(_), .. })) => not_run,
            (Mutation::SourceResumesInDoubt, SourceInput::Timeout) if given => not_run,
            (Mutation::CancelAfterRun, SourceInput::Abort) if given => not_run,
            _ => input,
        }
    }

    pub fn source_effects(
        self,
        before: &SourceOwner,
        input: SourceInput,
        mut effects: Vec<SourceEffect>,
    ) -> Vec<SourceEffect> {
        let attempt = *before.attempt();
        match self {
            Mutation::RunBeforeRecord => {
                let run =
                    |e: &SourceEffect| matches!(e, SourceEffect::Persist(SourceRecord { stage: SourceStage::Run, .. }));
                if let Some(at) = effects.iter().position(run) {
                    effects.insert(at, SourceEffect::Send(Message { attempt, word: Word::Run }));
                }
            }
            Mutation::SourceDiscardsEarly
                if (before.state(), input) == (SourceState::RecordingRun, SourceInput::Persisted) =>
            {
                effects.push(SourceEffect::Discard);
            }
            Mutation::IntentForgotten => {
                for effect in &mut effects {
                    if matches!(effect, SourceEffect::Note(SourceRecord { stage: SourceStage::Kept, .. })) {
                        *effect = SourceEffect::Clear;
                    }
                }
            }
            _ => {}
        }
        effects
    }

    pub fn destination_input(self, owner: &DestinationOwner, input: DestinationInput) -> DestinationInput {
        let alone = matches!(
            (owner.state(), input),
            (DestinationState::Ready, DestinationInput::LinkLost | DestinationInput::Timeout)
        );
        let message = |word| DestinationInput::Message(Message { attempt: *owner.attempt(), word });
        let told = input == message(Word::Run) && owner.state() == DestinationState::Declined;
        match self {
            Mutation::PromiseBroken if told => DestinationInput::Resolve(Side::Destination),
            Mutation::DestinationRunsAlone if alone => message(Word::Run),
            Mutation::DestinationGivesUp if alone => message(Word::Abort),
            _ => input,
        }
    }

    pub fn destination_effects(
        self,
        input: DestinationInput,
        mut effects: Vec<DestinationEffect>,
    ) -> Vec<DestinationEffect> {
        match self {
            Mutation::NotRunAfterRunning if input == (DestinationInput::StartFailed { ran: true }) => {
                for effect in &mut effects {
                    if let DestinationEffect::Send(message) = effect {
                        message.word = Word::NotRun;
                    }
                }
            }
            _ => {}
        }
        effects
    }
}
