//! The destination's half.
//!
//! Effects whose outcome matters are answered at once: after [`DestinationEffect::Persist`],
//! [`DestinationEffect::TakeLocks`] and [`DestinationEffect::Start`] the driver feeds the answer before anything else.
//! [`DestinationEffect::Load`] only begins; its answer comes when it comes.

use super::{Attempt, Carriage, Finding, Message, Notice, Word};
use crate::Side;

/// How far the destination had come, as recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DestinationStage {
    /// It takes part, and nothing has run here.
    Intent,
    /// The VM runs here, or was just about to.
    Ran,
    /// The promise: it was ready, does not run the VM and never will.
    NeverRuns,
}

/// What the destination records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DestinationRecord {
    /// How far it has come.
    pub stage: DestinationStage,
    /// The attempt. Its incarnation is the one that wrote this.
    pub attempt: Attempt,
    /// How much came before the switch; decided by the offer, `Whole` until then.
    pub carriage: Carriage,
}

/// Where the destination stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DestinationState {
    /// Nothing has begun.
    Empty,
    /// The intent is being recorded.
    RecordingIntent,
    /// Memory is coming in.
    Intended,
    /// Everything is offered and being loaded.
    Loading {
        /// Whether there is still a link to the source.
        linked: bool,
    },
    /// Everything is loaded. The copy is kept until the source decides, or somebody for it.
    Ready,
    /// The same, and the source has not decided for too long.
    InDoubt,
    /// It is ours; the locks are being taken.
    TakingLocks,
    /// That it will have run is being recorded.
    RecordingRan,
    /// It is being started.
    Starting,
    /// The VM runs here.
    Running,
    /// Postcopy: it runs here and lacks pages.
    LacksPages,
    /// Postcopy: the same, and the link is gone.
    Paused,
    /// It ran here, or part of it did, and is lost.
    Broken,
    /// Was told to run and could not; has promised the source never to. The copy is kept until the source says that it
    /// has the VM back, because until then it may be the last one: a source that died holding the disk locks has left
    /// neither a VM nor free disks.
    Declined,
    /// Gave up before it was ready.
    Withdrawn,
    /// Was ready; does not run the VM and never will.
    NeverRuns,
    /// Restarted: whatever was here died with its process.
    Died(Finding),
}

/// What happens to the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DestinationInput {
    /// The journey begins.
    Begin,
    /// Answer to [`DestinationEffect::Load`].
    Loaded,
    /// Answer to [`DestinationEffect::Load`]: it does not fit, or is not what was sent.
    LoadFailed,
    /// The user cancels, or something failed here.
    Abort,
    /// Answer to [`DestinationEffect::Persist`].
    Persisted,
    /// Answer to [`DestinationEffect::Persist`]: it is certain that the record is not there.
    PersistFailed,
    /// Answer to [`DestinationEffect::TakeLocks`].
    LocksTaken,
    /// Answer to [`DestinationEffect::TakeLocks`].
    LocksFailed,
    /// Answer to [`DestinationEffect::Start`].
    Started,
    /// Answer to [`DestinationEffect::Start`].
    StartFailed {
        /// A vCPU or a device may have run: the copy at the source is older than what the world has seen.
        ran: bool,
    },
    /// Loading takes too long, or the source has been silent for too long.
    Timeout,
    /// The link is gone.
    LinkLost,
    /// There is a link again.
    LinkUp,
    /// Postcopy: every page is here.
    AllPages,
    /// Postcopy: the source's memory is gone.
    PagesLost,
    /// From outside: whose it is. See `docs/ownership.md` for what must be true.
    Resolve(Side),
    /// A word arrived.
    Message(Message),
}

/// What the destination must do, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DestinationEffect {
    /// Write the record. Always the last of its list, because nothing may be done before it is known to be there.
    Persist(DestinationRecord),
    /// Write the record if possible. If it fails the older one stands, and that is safe.
    Note(DestinationRecord),
    /// Remove the record if possible.
    Clear,
    /// Send the word, if possible.
    Send(Message),
    /// Begin to check and load what was offered. Bounded by a deadline of the driver's, which feeds `Timeout`.
    Load,
    /// Take the disk locks and whatever else only one owner may hold.
    TakeLocks,
    /// Give them up again.
    ReleaseLocks,
    /// Let the VM run, with [`Attempt::epoch`].
    Start,
    /// Free what was received. If a load is under way, end it first.
    Discard,
    /// Tell the user.
    Report(Notice),
}

/// The destination's half of one attempt.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DestinationOwner {
    attempt: Attempt,
    carriage: Carriage,
    state: DestinationState,
    resolved: bool,
    /// The promise never to run was made, or found after a restart. Only a resolution frees from it.
    promised: bool,
}

use DestinationEffect::{Clear, Discard, Load, Note, Persist, ReleaseLocks, Report, Start, TakeLocks};
use DestinationInput as In;
use DestinationState as D;

impl DestinationOwner {
    /// An attempt that has not begun.
    pub fn new(attempt: Attempt) -> Self {
        Self { attempt, carriage: Carriage::Whole, state: D::Empty, resolved: false, promised: false }
    }

    /// Goes on from a record after a restart. The copy died with the process that wrote it.
    pub fn restarted(record: &DestinationRecord) -> Self {
        let (finding, promised) = match record.stage {
            DestinationStage::Intent => (Finding::DiedUnrun, false),
            DestinationStage::Ran => (Finding::DiedRunning, false),
            DestinationStage::NeverRuns => (Finding::DiedUnrun, true),
        };
        let state = D::Died(finding);
        Self { attempt: record.attempt, carriage: record.carriage, state, resolved: false, promised }
    }

    /// Where it stands.
    pub fn state(&self) -> DestinationState {
        self.state
    }

    /// The attempt.
    pub fn attempt(&self) -> &Attempt {
        &self.attempt
    }

    /// How much comes before the switch, as far as it is known.
    pub fn carriage(&self) -> Carriage {
        self.carriage
    }

    /// Whether nothing more can come of this attempt unless a late word is answered: the claim may be dropped.
    /// A destination that runs the VM stays to answer until the source has confirmed.
    pub fn is_over(&self) -> bool {
        matches!(self.state, D::Withdrawn | D::NeverRuns | D::Broken | D::Died(Finding::Nothing))
    }

    /// What anybody answers who is asked about an attempt it knows nothing of. It decides nothing.
    pub fn answer_of_a_stranger(message: &Message) -> Option<Message> {
        matches!(message.word, Word::Offer(_) | Word::Run | Word::Query | Word::Abort)
            .then_some(Message { attempt: message.attempt, word: Word::Unknown(Finding::Nothing) })
    }

    /// Takes one step.
    pub fn step(&mut self, input: DestinationInput) -> Vec<DestinationEffect> {
        match input {
            In::Message(message) if message.attempt == self.attempt => self.hear(message.word),
            In::Message(message) => {
                Self::answer_of_a_stranger(&message).map(DestinationEffect::Send).into_iter().collect()
            }
            In::Resolve(side) => self.resolve(side),
            input => self.local(input),
        }
    }

    fn local(&mut self, input: DestinationInput) -> Vec<DestinationEffect> {
        match (self.state, input) {
            (D::Empty, In::Begin) => {
                self.state = D::RecordingIntent;
                vec![Persist(self.record(DestinationStage::Intent))]
            }
            (D::RecordingIntent, In::Persisted) => self.enter(D::Intended, vec![]),
            (D::RecordingIntent, In::PersistFailed) => self.withdraw(Word::Abort),
            (D::Intended, In::Abort | In::LinkLost) => self.withdraw(Word::Abort),

            (D::Loading { linked: true }, In::Loaded) => self.enter(D::Ready, vec![self.say(Word::Ready)]),
            // Complete, and perhaps the last copy there is: keep it, and say so when there is somebody to hear.
            (D::Loading { linked: false }, In::Loaded) => self.enter(D::InDoubt, vec![Report(Notice::InDoubt(None))]),
            (D::Loading { .. }, In::LoadFailed | In::Timeout | In::Abort) => self.withdraw(Word::Abort),
            (D::Loading { .. }, In::LinkLost) => match self.carriage {
                Carriage::Whole => self.enter(D::Loading { linked: false }, vec![]),
                Carriage::PagesFollow => self.withdraw(Word::Abort),
            },
            (D::Loading { .. }, In::LinkUp) => self.enter(D::Loading { linked: true }, vec![]),

            // Ready: whatever happens here, only the source, or somebody for it, ends it.
            (D::Ready, In::Timeout | In::LinkLost) => {
                self.enter(D::InDoubt, vec![self.say(Word::Ready), Report(Notice::InDoubt(None))])
            }
            (D::Ready | D::InDoubt, In::LinkUp) | (D::InDoubt, In::Timeout) => vec![self.say(Word::Ready)],
            (D::Ready | D::InDoubt | D::Declined, In::Abort) => vec![Report(Notice::TooLate)],
            (D::Declined, In::Timeout | In::LinkUp) => vec![self.say(Word::NotRun)],

            (D::TakingLocks, In::LocksTaken) => {
                self.state = D::RecordingRan;
                vec![Persist(self.record(DestinationStage::Ran))]
            }
            (D::TakingLocks, In::LocksFailed) => self.cannot_run(vec![]),
            (D::RecordingRan, In::Persisted) => self.enter(D::Starting, vec![Start]),
            (D::RecordingRan, In::PersistFailed) => self.cannot_run(vec![ReleaseLocks]),
            (D::Starting, In::Started) => {
                let state = match self.carriage {
                    Carriage::Whole => D::Running,
                    Carriage::PagesFollow => D::LacksPages,
                };
                self.enter(state, vec![self.say(Word::Running), Report(Notice::Taken)])
            }
            (D::Starting, In::StartFailed { ran: false }) => self.cannot_run(vec![ReleaseLocks]),
            (D::Starting, In::StartFailed { ran: true }) => {
                self.enter(D::Broken, vec![self.say(Word::Running), Report(Notice::Lost)])
            }
            (D::Running | D::LacksPages | D::Broken, In::LinkUp) => vec![self.say(Word::Running)],
            (D::Running | D::LacksPages | D::Paused, In::Abort) => vec![Report(Notice::TooLate)],

            (D::LacksPages, In::AllPages) => self.enter(D::Running, vec![]),
            (D::LacksPages, In::LinkLost) => self.enter(D::Paused, vec![Report(Notice::Paused)]),
            (D::Paused, In::LinkUp) => self.enter(D::LacksPages, vec![self.say(Word::Running)]),
            (D::LacksPages | D::Paused, In::PagesLost) => self.enter(D::Broken, vec![Report(Notice::Lost)]),
            _ => vec![],
        }
    }

    fn hear(&mut self, word: Word) -> Vec<DestinationEffect> {
        match (self.state, word) {
            (D::Intended, Word::Offer(carriage)) => {
                self.carriage = carriage;
                self.enter(D::Loading { linked: true }, vec![Load])
            }
            (D::Intended | D::Loading { .. }, Word::Abort) => self.withdraw(Word::Aborted),

            (D::Ready | D::InDoubt, Word::Run) => {
                self.resolved = false;
                self.enter(D::TakingLocks, vec![TakeLocks])
            }
            (D::Ready | D::InDoubt, Word::Offer(_) | Word::Query) => vec![self.say(Word::Ready)],
            (D::Ready | D::InDoubt, Word::Abort) => self.promise(Word::Aborted),
            (D::Ready | D::InDoubt, Word::Unknown(finding)) => {
                self.enter(D::InDoubt, vec![Report(Notice::InDoubt(Some(finding)))])
            }

            (D::Running | D::LacksPages | D::Paused | D::Broken, Word::Offer(_) | Word::Run | Word::Query) => {
                vec![self.say(Word::Running)]
            }
            (D::Running | D::LacksPages | D::Paused, Word::Abort) => vec![Report(Notice::Conflict(Side::Source))],
            (D::Running | D::Broken, Word::Confirm) => vec![Clear],

            (D::Declined, Word::Abort) => self.promise(Word::Aborted),
            (D::Declined, Word::Unknown(finding)) => vec![Report(Notice::InDoubt(Some(finding)))],
            (D::Withdrawn, Word::Offer(_) | Word::Query) => vec![self.say(Word::Abort)],
            (D::Withdrawn | D::NeverRuns, Word::Abort) => vec![self.say(Word::Aborted)],
            (D::Declined | D::NeverRuns, Word::Offer(_) | Word::Run | Word::Query) => vec![self.say(Word::NotRun)],

            // The promise was made by the incarnation that was ready, and is only repeated here.
            (D::Died(_), Word::Run | Word::Query) if self.promised => vec![self.say(Word::NotRun)],
            (D::Died(_), Word::Abort) if self.promised => vec![self.say(Word::Aborted)],
            (D::Died(finding), Word::Offer(_) | Word::Run | Word::Query | Word::Abort) => {
                vec![self.say(Word::Unknown(finding))]
            }
            (D::Died(_), Word::Confirm) => self.enter(D::Died(Finding::Nothing), vec![Clear]),
            _ => vec![],
        }
    }

    fn resolve(&mut self, side: Side) -> Vec<DestinationEffect> {
        match (self.state, side) {
            (D::InDoubt | D::Declined, Side::Destination) if self.carriage == Carriage::Whole => {
                self.resolved = true;
                self.enter(D::TakingLocks, vec![TakeLocks])
            }
            (D::InDoubt | D::Declined | D::NeverRuns, Side::Destination) => vec![Report(Notice::CannotRunHere)],
            (D::InDoubt | D::Declined, Side::Source) => self.promise(Word::NotRun),
            // Nothing here can run; it only frees the VM's name on this host.
            (D::Died(_), _) => {
                self.promised = false;
                self.enter(D::Died(Finding::Nothing), vec![Clear])
            }
            _ => vec![Report(Notice::NotInDoubt)],
        }
    }

    /// Was to run, and cannot. A source that told it to gets the VM back; an operator may try again. The copy stays.
    fn cannot_run(&mut self, mut effects: Vec<DestinationEffect>) -> Vec<DestinationEffect> {
        if !self.resolved {
            // Recorded before it is said, so that a restart can repeat it; if it cannot be recorded it holds all the same,
            // because the copy that might break it goes with this process.
            self.promised = true;
            effects.extend([
                Note(self.record(DestinationStage::NeverRuns)),
                self.say(Word::NotRun),
                Report(Notice::Declined),
            ]);
            return self.enter(D::Declined, effects);
        }
        self.resolved = false;
        let (state, stage) = match self.promised {
            true => (D::Declined, DestinationStage::NeverRuns),
            false => (D::InDoubt, DestinationStage::Intent),
        };
        effects.extend([Note(self.record(stage)), Report(Notice::ResolveFailed)]);
        self.enter(state, effects)
    }

    /// Was ready, and ends here without running, because the source has the VM.
    fn promise(&mut self, word: Word) -> Vec<DestinationEffect> {
        self.promised = true;
        let effects =
            vec![Note(self.record(DestinationStage::NeverRuns)), self.say(word), Discard, Report(Notice::NotTaken)];
        self.enter(D::NeverRuns, effects)
    }

    /// Was never ready.
    fn withdraw(&mut self, word: Word) -> Vec<DestinationEffect> {
        // The word first: the source may stand still and wait for it, and freeing gigabytes takes its time.
        let effects = vec![self.say(word), Clear, Discard, Report(Notice::NotTaken)];
        self.enter(D::Withdrawn, effects)
    }

    fn say(&self, word: Word) -> DestinationEffect {
        DestinationEffect::Send(Message { attempt: self.attempt, word })
    }

    fn record(&self, stage: DestinationStage) -> DestinationRecord {
        DestinationRecord { stage, attempt: self.attempt, carriage: self.carriage }
    }

    fn enter(&mut self, state: DestinationState, effects: Vec<DestinationEffect>) -> Vec<DestinationEffect> {
        self.state = state;
        effects
    }
}
