//! What the two sides say to each other, and what they tell the operator.

use wherry_stream::message::{Body, Empty, Reason};

use super::{Attempt, Carriage};
use crate::Side;

/// A word about an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Message {
    /// The attempt.
    pub attempt: Attempt,
    /// The word.
    pub word: Word,
}

/// One word of the protocol. What travels beside it (state, digests, figures) is the engine's and decides nothing here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Word {
    /// Source: everything has been sent, or all but the pages that follow.
    Offer(Carriage),
    /// Destination: everything is loaded, and kept until you decide. Said again (`StillReady` on the wire) when asked.
    Ready,
    /// Source: it is yours. Said only after it was recorded.
    Run,
    /// Destination: it runs here.
    Running,
    /// Destination, and only the incarnation that was ready: it does not run here, and never will on your word.
    NotRun,
    /// Source: I have heard that it runs, and have given up my copy.
    Confirm,
    /// Source: what is your last word?
    Query,
    /// Either: I know nothing that would decide this. The finding is for people.
    Unknown(Finding),
    /// Source: it stays here, and runs here. Destination: I was never ready for it and never will be.
    Abort,
    /// Destination: my copy is gone and never ran.
    Aborted,
}

impl Word {
    /// The word that a message of the wire says; `None` if ownership does not depend on it.
    pub fn of(body: &Body) -> Option<Self> {
        Some(match body {
            Body::Offer(offer) if offer.follow => Word::Offer(Carriage::PagesFollow),
            Body::Offer(_) => Word::Offer(Carriage::Whole),
            Body::Ready(_) | Body::StillReady(_) => Word::Ready,
            Body::Run(_) => Word::Run,
            Body::Running(_) => Word::Running,
            Body::NotRun(_) => Word::NotRun,
            Body::Confirm(_) => Word::Confirm,
            Body::Query(_) => Word::Query,
            Body::Unknown(reason) => Word::Unknown(Finding::from_text(&reason.text)),
            Body::Abort(_) => Word::Abort,
            Body::Aborted(_) => Word::Aborted,
            _ => return None,
        })
    }

    /// The message of the wire, for the words that carry nothing of the engine's or only a reason; `None` for `Offer`.
    /// `Ready` becomes `StillReady`, `Running` has no figures.
    pub fn to_body(self, reason: &str) -> Option<Body> {
        let reason = || Reason { text: reason.to_owned() };
        Some(match self {
            Word::Offer(_) => return None,
            Word::Ready => Body::StillReady(Empty {}),
            Word::Run => Body::Run(Empty {}),
            Word::Running => Body::Running(Default::default()),
            Word::NotRun => Body::NotRun(reason()),
            Word::Confirm => Body::Confirm(Empty {}),
            Word::Query => Body::Query(Empty {}),
            Word::Unknown(finding) => Body::Unknown(Reason { text: finding.text().into() }),
            Word::Abort => Body::Abort(reason()),
            Word::Aborted => Body::Aborted(Empty {}),
        })
    }
}

/// What somebody who cannot decide has found in its records: a hint for the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Finding {
    /// Nothing about this attempt.
    Nothing,
    /// Destination restarted: its copy died with the process, and had not run.
    DiedUnrun,
    /// Destination restarted: the VM had run, or was just about to, when its process died.
    DiedRunning,
    /// Source restarted: the VM died with its process, before a run was recorded.
    SourceDied,
    /// Source restarted: the VM had been taken back, ran on (or was about to) and died with its process.
    SourceKept,
    /// Source restarted: pages that the destination lacks died with its process.
    PagesDied,
}

impl Finding {
    const ALL: [Finding; 6] = [
        Finding::Nothing,
        Finding::DiedUnrun,
        Finding::DiedRunning,
        Finding::SourceDied,
        Finding::SourceKept,
        Finding::PagesDied,
    ];

    /// As the operator reads it. It is also what travels.
    pub fn text(self) -> &'static str {
        match self {
            Finding::Nothing => "nothing is known here of this attempt",
            Finding::DiedUnrun => "the destination process died; its copy of the VM had not run",
            Finding::DiedRunning => "the destination process died when the VM had run there or was just about to",
            Finding::SourceDied => "the source process died with the VM before it had given it away",
            Finding::SourceKept => {
                "the source took the VM back and died later; a copy at the destination is older than what ran there"
            }
            Finding::PagesDied => "the source process died with pages that the destination lacks",
        }
    }

    fn from_text(text: &str) -> Self {
        Self::ALL.into_iter().find(|f| f.text() == text).unwrap_or(Finding::Nothing)
    }
}

/// What the user must hear. The state machine has acted already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Notice {
    /// Source: this attempt is over, the VM stays here.
    Aborted,
    /// Source: the VM runs at the destination.
    Given,
    /// Destination: the VM runs here.
    Taken,
    /// Destination: this attempt is over, nothing runs here and nothing will.
    NotTaken,
    /// Nobody here can tell who has the VM. Repeated with what was found when the other side answers `Unknown`.
    InDoubt(Option<Finding>),
    /// Source: the VM could not be resumed (disk locks, devices). It is whole and at rest; resume is tried again on
    /// `Timeout`, `Cancel` and `resolve --as source`.
    Stuck,
    /// It is too late to cancel: the VM was given away, or a ready destination must not decide alone.
    TooLate,
    /// `resolve` was asked for where nothing is in doubt.
    NotInDoubt,
    /// Destination: told to run, it could not (disk locks, the record, the start), and has promised the source not to. Its
    /// copy is kept until the source says that it has the VM. Source without a VM: the destination says so.
    Declined,
    /// `resolve` would have this side run, and this side cannot: no VM, or pages of it are missing.
    CannotRunHere,
    /// `resolve --as destination` failed: the disk locks could not be had, or the record not be written, or the start
    /// failed. The state is kept.
    ResolveFailed,
    /// The record of a resolution could not be written; nothing was changed.
    NotRecorded,
    /// Both sides say that the VM is theirs. Somebody resolved against the truth.
    Conflict(Side),
    /// Postcopy: the link is gone and pages are missing. Recoverable.
    Paused,
    /// The VM is lost: the last complete copy died with its process.
    Lost,
}
