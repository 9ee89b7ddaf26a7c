//! The source's half.
//!
//! Effects whose outcome matters are answered at once: after [`SourceEffect::Persist`], [`SourceEffect::ReleaseLocks`]
//! and [`SourceEffect::Resume`] the driver does the rest of the list and then feeds the answer, before anything else.

use super::{Attempt, Carriage, Finding, Message, Notice, Word};
use crate::Side;

/// How far the source had come, as recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SourceStage {
    /// It means to give the VM away, and has not.
    Intent,
    /// It has given the VM away: the point of no return.
    Run,
    /// It kept the VM after it was offered; the destination may still hold its copy, which is old now.
    Kept,
    /// The VM runs at the destination.
    Gone,
}

/// What the source records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceRecord {
    /// How far it has come.
    pub stage: SourceStage,
    /// The attempt.
    pub attempt: Attempt,
    /// How much goes over before the switch; decided by the offer, `Whole` until then.
    pub carriage: Carriage,
    /// An earlier attempt ended as `Kept` and its destination never confirmed that its copy is gone. The record then
    /// stays, whatever becomes of this attempt: only it keeps a restarted host from booting the VM.
    pub unsettled: bool,
}

/// Where the source stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SourceState {
    /// The VM runs here and nothing has begun.
    Running,
    /// The intent is being recorded.
    RecordingIntent,
    /// The VM runs here, memory is on its way.
    Intended,
    /// The VM is at rest, nothing is offered.
    Stopped,
    /// The VM is at rest and the destination has been told that it has everything.
    Offered,
    /// The destination is ready; the locks are being released.
    ReleasingLocks,
    /// The run is being recorded.
    RecordingRun,
    /// The VM is given away. It is not known whether it runs.
    RunRecorded,
    /// The same, for too long.
    InDoubt,
    /// Resolved: that the VM stays here is being recorded.
    RecordingKept,
    /// The VM is ours and at rest.
    Resuming {
        /// The destination has said that its copy is gone.
        settled: bool,
    },
    /// The attempt is over and the VM runs here.
    Kept {
        /// The destination has said that its copy is gone.
        settled: bool,
    },
    /// Postcopy: the VM runs at the destination, which still needs pages from here.
    Serving,
    /// Postcopy: the same, without a link.
    Paused,
    /// The VM is the destination's.
    Gone,
    /// Restarted: the VM died here after the intent was recorded and before a run was.
    DiedIntended,
    /// Restarted: the VM had been given away.
    DiedCommitted,
    /// Restarted: the VM had been kept, ran on, and died here.
    DiedKept,
    /// Restarted, and nothing of the attempt is left: the VM may be booted here.
    Free,
}

/// What happens to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SourceInput {
    /// The journey begins.
    Begin,
    /// The VM is at rest: nobody writes its memory.
    Stopped,
    /// It was let run again for another round; nothing had been offered.
    AnotherRound,
    /// Everything has been sent: send the offer.
    Offer(Carriage),
    /// The user cancels, or something failed here.
    Abort,
    /// Answer to [`SourceEffect::Persist`].
    Persisted,
    /// Answer to [`SourceEffect::Persist`]: it is certain that the record is not there.
    PersistFailed,
    /// Answer to [`SourceEffect::ReleaseLocks`].
    LocksReleased,
    /// Answer to [`SourceEffect::ReleaseLocks`].
    LocksFailed,
    /// Answer to [`SourceEffect::Resume`].
    Resumed,
    /// Answer to [`SourceEffect::Resume`].
    ResumeFailed,
    /// The destination has been silent for too long. In doubt, feed it now and then: it asks again.
    Timeout,
    /// The link is gone.
    LinkLost,
    /// There is a link again.
    LinkUp,
    /// Postcopy: the destination has every page, or needs no more.
    AllServed,
    /// Postcopy: what the destination lacks is gone from here.
    PagesLost,
    /// From outside: whose it is. See `docs/ownership.md` for what must be true.
    Resolve(Side),
    /// A word arrived.
    Message(Message),
}

/// What the source must do, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SourceEffect {
    /// Write the record. Always the last of its list, because nothing may be done before it is known to be there.
    Persist(SourceRecord),
    /// Write the record if possible. If it fails the older one stands, and that is safe.
    Note(SourceRecord),
    /// Remove the record if possible.
    Clear,
    /// Send the word, if possible.
    Send(Message),
    /// Give up the disk locks and whatever else only one owner may hold.
    ReleaseLocks,
    /// Let the VM run again.
    Resume {
        /// The locks may have been released and must be taken first.
        retake_locks: bool,
    },
    /// The VM is not ours any more: free its memory and devices, without touching what the new owner holds.
    Discard,
    /// Tell the user.
    Report(Notice),
}

/// The source's half of one attempt.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SourceOwner {
    attempt: Attempt,
    carriage: Carriage,
    state: SourceState,
    unsettled: bool,
    released: bool,
    resolved: bool,
}

use SourceEffect::{Clear, Discard, Note, Persist, ReleaseLocks, Report, Resume};
use SourceInput as In;
use SourceState as S;

impl SourceOwner {
    /// An attempt that has not begun. `unsettled`: see [`SourceRecord::unsettled`].
    pub fn new(attempt: Attempt, unsettled: bool) -> Self {
        Self { attempt, carriage: Carriage::Whole, state: S::Running, unsettled, released: false, resolved: false }
    }

    /// Goes on from a record after a restart. The VM died with the process that wrote it.
    pub fn restarted(record: &SourceRecord) -> Self {
        let state = match record.stage {
            SourceStage::Intent => S::DiedIntended,
            SourceStage::Run => S::DiedCommitted,
            SourceStage::Kept => S::DiedKept,
            SourceStage::Gone => S::Gone,
        };
        Self { carriage: record.carriage, state, ..Self::new(record.attempt, record.unsettled) }
    }

    /// Where it stands.
    pub fn state(&self) -> SourceState {
        self.state
    }

    /// The attempt.
    pub fn attempt(&self) -> &Attempt {
        &self.attempt
    }

    /// Epoch of the VM while it is here: one below the attempt's, and one above after `resolve --as source`, so that a
    /// destination that was not dead after all has the older one.
    pub fn epoch(&self) -> u64 {
        if self.resolved { self.attempt.epoch + 1 } else { self.attempt.epoch - 1 }
    }

    /// Whether an attempt that follows this one must be told that this one is [unsettled](SourceRecord::unsettled).
    pub fn leaves_unsettled(&self) -> bool {
        self.unsettled || matches!(self.state, S::Kept { settled: false } | S::Resuming { settled: false })
    }

    /// Whether nothing more can come of this attempt unless a late word is answered: the claim may be dropped.
    pub fn is_over(&self) -> bool {
        matches!(self.state, S::Kept { settled: true } | S::Gone | S::Free)
    }

    /// Whether requests for pages are to be answered (postcopy).
    pub fn serves_pages(&self) -> bool {
        self.carriage == Carriage::PagesFollow
            && matches!(
                self.state,
                S::Offered | S::ReleasingLocks | S::RecordingRun | S::RunRecorded | S::InDoubt | S::Serving
            )
    }

    /// Takes one step.
    pub fn step(&mut self, input: SourceInput) -> Vec<SourceEffect> {
        match input {
            In::Message(message) if message.attempt == self.attempt => self.hear(message.word),
            // A ready destination of another attempt asks the wrong one; everything else is late or strange.
            In::Message(Message { attempt, word: Word::Ready }) => {
                vec![SourceEffect::Send(Message { attempt, word: Word::Unknown(Finding::Nothing) })]
            }
            In::Message(_) => vec![],
            In::Resolve(side) => self.resolve(side),
            input => self.local(input),
        }
    }

    fn local(&mut self, input: SourceInput) -> Vec<SourceEffect> {
        match (self.state, input) {
            (S::Running, In::Begin) => {
                self.state = S::RecordingIntent;
                vec![Persist(self.record(SourceStage::Intent))]
            }
            (S::RecordingIntent, In::Persisted) => self.enter(S::Intended, vec![]),
            // Not even an intent: nobody knows of this attempt.
            (S::RecordingIntent, In::PersistFailed) => {
                self.enter(S::Kept { settled: true }, vec![Report(Notice::Aborted)])
            }
            (S::Intended, In::Stopped) => self.enter(S::Stopped, vec![]),
            (S::Stopped, In::AnotherRound) => self.enter(S::Intended, vec![]),
            (S::Stopped, In::Offer(carriage)) => {
                self.carriage = carriage;
                self.enter(S::Offered, vec![self.say(Word::Offer(carriage))])
            }
            // A round may take as long as it likes; who limits it says Abort.
            (S::Intended, In::Abort | In::LinkLost) => {
                let effects = vec![self.forget(), self.say(Word::Abort), Report(Notice::Aborted)];
                self.enter(S::Kept { settled: true }, effects)
            }
            (S::Stopped, In::Abort | In::LinkLost | In::Timeout) => {
                let effects = vec![self.forget(), self.resume()];
                self.enter(S::Resuming { settled: true }, effects)
            }
            (S::Offered, In::Abort | In::LinkLost | In::Timeout) => self.keep(),
            (S::ReleasingLocks, In::LocksReleased) => {
                self.state = S::RecordingRun;
                vec![Persist(self.record(SourceStage::Run))]
            }
            (S::ReleasingLocks, In::LocksFailed) => self.keep(),
            (S::RecordingRun, In::Persisted) => self.enter(S::RunRecorded, vec![self.say(Word::Run)]),
            (S::RecordingRun, In::PersistFailed) => self.keep(),

            // From here on only the destination's word, or a resolution, brings the VM back.
            (S::RunRecorded, In::Timeout | In::LinkLost) => {
                self.enter(S::InDoubt, vec![self.say(Word::Query), Report(Notice::InDoubt(None))])
            }
            (S::RunRecorded | S::InDoubt, In::LinkUp) | (S::InDoubt, In::Timeout) => vec![self.say(Word::Query)],
            (S::RunRecorded | S::InDoubt, In::Abort) => vec![Report(Notice::TooLate)],

            (S::RecordingKept, In::Persisted) => {
                self.resolved = true;
                let effects = vec![self.resume()];
                self.enter(S::Resuming { settled: false }, effects)
            }
            (S::RecordingKept, In::PersistFailed) => self.enter(S::InDoubt, vec![Report(Notice::NotRecorded)]),
            (S::Resuming { settled }, In::Resumed) => {
                self.released = false;
                // Only now: until the VM runs here again, a ready destination's copy may be the one that survives.
                self.enter(S::Kept { settled }, vec![self.say(Word::Abort), Report(Notice::Aborted)])
            }
            (S::Resuming { .. }, In::ResumeFailed) => vec![Report(Notice::Stuck)],
            (S::Resuming { .. }, In::Timeout | In::Abort) => vec![self.resume()],
            // Until it is heard to be gone, that copy keeps the record here.
            (S::Kept { settled: false }, In::Timeout | In::LinkUp) => vec![self.say(Word::Abort)],

            (S::Serving, In::AllServed) => {
                self.enter(S::Gone, vec![Discard, self.say(Word::Confirm), Report(Notice::Given)])
            }
            (S::Serving, In::LinkLost) => self.enter(S::Paused, vec![Report(Notice::Paused)]),
            (S::Paused, In::LinkUp) => self.enter(S::Serving, vec![]),
            (S::Serving | S::Paused, In::PagesLost) => self.enter(S::Gone, vec![Discard, Report(Notice::Lost)]),
            (S::Serving | S::Paused | S::Gone, In::Abort) => vec![Report(Notice::TooLate)],

            (S::DiedIntended | S::DiedCommitted | S::DiedKept, In::Timeout | In::LinkUp) => vec![self.say(Word::Query)],
            _ => vec![],
        }
    }

    fn hear(&mut self, word: Word) -> Vec<SourceEffect> {
        match (self.state, word) {
            (S::Offered, Word::Ready) => {
                self.released = true;
                self.enter(S::ReleasingLocks, vec![ReleaseLocks])
            }
            // Before the run was recorded the destination decides nothing but its own withdrawal.
            (S::Intended, Word::Abort | Word::Aborted) => {
                let effects = vec![self.forget(), Report(Notice::Aborted)];
                self.enter(S::Kept { settled: true }, effects)
            }
            (S::Stopped | S::Offered, Word::Abort | Word::Aborted) => {
                let effects = vec![self.forget(), self.resume()];
                self.enter(S::Resuming { settled: true }, effects)
            }
            (S::Offered, Word::Unknown(_) | Word::NotRun) => self.keep(),

            (S::RunRecorded | S::InDoubt, Word::Ready) => vec![self.say(Word::Run)],
            (S::RunRecorded | S::InDoubt, Word::NotRun) => self.keep(),
            (S::RunRecorded | S::InDoubt, Word::Unknown(finding)) => {
                self.enter(S::InDoubt, vec![Report(Notice::InDoubt(Some(finding)))])
            }
            // The VM is at rest here: whatever made it run there, it is theirs.
            (S::Stopped | S::Offered | S::RunRecorded | S::InDoubt, Word::Running) => self.give(),
            (S::Running | S::Intended | S::Resuming { .. } | S::Kept { .. }, Word::Running) => {
                vec![Report(Notice::Conflict(Side::Destination))]
            }

            // It waits to hear that the VM runs here.
            (S::Kept { .. }, Word::Ready | Word::NotRun) => vec![self.say(Word::Abort)],
            (S::Resuming { settled: false }, Word::Abort | Word::Aborted) => {
                self.state = S::Resuming { settled: true };
                vec![self.forget()]
            }
            (S::Kept { settled: false }, Word::Abort | Word::Aborted) => {
                self.state = S::Kept { settled: true };
                vec![self.forget()]
            }

            // It ran there without all of its memory, and died with its process: what is here is of no use to anyone.
            (S::Serving | S::Paused, Word::Unknown(Finding::DiedRunning)) => {
                self.enter(S::Gone, vec![Discard, Report(Notice::Lost)])
            }

            (S::Gone, Word::Running) => vec![self.say(Word::Confirm)],
            // Resolved as the destination's, which has not heard of it.
            (S::Gone, Word::Ready) => vec![self.say(Word::Run)],
            (S::Gone, Word::NotRun) => vec![Report(Notice::Declined)],

            (S::DiedCommitted, Word::Ready) if self.carriage == Carriage::Whole => vec![self.say(Word::Run)],
            (S::DiedCommitted, Word::Ready) => vec![self.say(Word::Unknown(Finding::PagesDied))],
            (S::DiedIntended, Word::Ready) => vec![self.say(Word::Unknown(Finding::SourceDied))],
            // It may have died before it resumed: then that copy is the last one, and no program may throw it away.
            (S::DiedKept, Word::Ready) => vec![self.say(Word::Unknown(Finding::SourceKept))],
            (S::DiedIntended | S::DiedCommitted | S::DiedKept, Word::Running) => {
                let effects = vec![Note(self.record(SourceStage::Gone)), self.say(Word::Confirm)];
                self.enter(S::Gone, effects)
            }
            // Its copy may still be there, for an operator to bring to life.
            (S::DiedIntended | S::DiedCommitted | S::DiedKept, Word::NotRun) => vec![Report(Notice::Declined)],
            // Nobody has it and nobody will.
            (S::DiedIntended | S::DiedCommitted | S::DiedKept, Word::Abort | Word::Aborted) => self.free(),
            (S::DiedIntended | S::DiedCommitted | S::DiedKept, Word::Unknown(finding)) => {
                vec![Report(Notice::InDoubt(Some(finding)))]
            }
            (S::Free, Word::Ready) => vec![self.say(Word::Unknown(Finding::Nothing))],
            _ => vec![],
        }
    }

    fn resolve(&mut self, side: Side) -> Vec<SourceEffect> {
        match (self.state, side) {
            (S::InDoubt, Side::Source) => {
                self.state = S::RecordingKept;
                vec![Persist(self.record(SourceStage::Kept))]
            }
            (S::InDoubt, Side::Destination) => self.give(),
            (S::Resuming { .. }, Side::Source) => vec![self.resume()],
            (S::DiedIntended | S::DiedCommitted | S::DiedKept, Side::Source) => self.enter(S::Free, vec![Clear]),
            (S::DiedIntended | S::DiedCommitted | S::DiedKept, Side::Destination) => {
                let effects = vec![Note(self.record(SourceStage::Gone)), Report(Notice::Given)];
                self.enter(S::Gone, effects)
            }
            _ => vec![Report(Notice::NotInDoubt)],
        }
    }

    /// The VM is ours, and the destination may have a whole copy: so the record stays until it has said that its copy is
    /// gone. Otherwise, after a crash here, an operator could give life to that copy while this host boots the VM.
    fn keep(&mut self) -> Vec<SourceEffect> {
        let effects = vec![Note(self.record(SourceStage::Kept)), self.resume()];
        self.enter(S::Resuming { settled: false }, effects)
    }

    fn give(&mut self) -> Vec<SourceEffect> {
        let gone = Note(self.record(SourceStage::Gone));
        match self.carriage {
            Carriage::Whole => {
                let effects = vec![gone, Discard, self.say(Word::Confirm), Report(Notice::Given)];
                self.enter(S::Gone, effects)
            }
            Carriage::PagesFollow => self.enter(S::Serving, vec![gone]),
        }
    }

    fn free(&mut self) -> Vec<SourceEffect> {
        // An earlier attempt's copy is somebody else's to answer for: only a resolution removes that record.
        if self.unsettled {
            return self.enter(S::DiedKept, vec![Note(self.record(SourceStage::Kept)), Report(Notice::Lost)]);
        }
        self.enter(S::Free, vec![Clear, Report(Notice::Lost)])
    }

    fn forget(&self) -> SourceEffect {
        if self.unsettled { Note(self.record(SourceStage::Kept)) } else { Clear }
    }

    fn resume(&self) -> SourceEffect {
        Resume { retake_locks: self.released }
    }

    fn say(&self, word: Word) -> SourceEffect {
        SourceEffect::Send(Message { attempt: self.attempt, word })
    }

    fn record(&self, stage: SourceStage) -> SourceRecord {
        SourceRecord { stage, attempt: self.attempt, carriage: self.carriage, unsettled: self.unsettled }
    }

    fn enter(&mut self, state: SourceState, effects: Vec<SourceEffect>) -> Vec<SourceEffect> {
        self.state = state;
        effects
    }
}
