//! Points at which a test can hold a journey, to kill a process, cut a link or cancel exactly there.
//!
//! Always compiled, inert unless asked for. From outside: with `WHERRY_TEST_PAUSE_AT=<point>` and
//! `WHERRY_TEST_PAUSE_DIR=<directory>` in its environment, a process that reaches the point for the first time creates
//! the file `<directory>/<point>` holding its process id, and waits until the file `<directory>/<point>.go` exists.
//! From inside a process: [`Journey::set_test_hook`](crate::Journey::set_test_hook).

use std::fmt;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::Journey;

macro_rules! points {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// A point in a journey.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Point {
            $($(#[$doc])* $name,)*
        }

        impl Point {
            /// All points, in the order in which a journey passes them at each end.
            pub const ALL: &'static [Point] = &[$(Point::$name),*];

            /// Its name in the environment variable.
            pub fn name(self) -> &'static str {
                match self { $(Point::$name => $text),* }
            }
        }
    };
}

points! {
    /// Source: the control connection is there, nothing is said.
    SourceConnected = "source-connected",
    /// Source: the destination has built the machine.
    SourceAccepted = "source-accepted",
    /// Source: dirty tracking is on, data channels are open.
    SourceTracking = "source-tracking",
    /// Source: a round is about to be sent. Passed once a round.
    SourceRound = "source-round",
    /// Source: a round is acknowledged. Passed once a round.
    SourceRoundDone = "source-round-done",
    /// Source: I/O has drained, the vCPUs still run.
    SourceDrained = "source-drained",
    /// Source: everything is at rest.
    SourceStopped = "source-stopped",
    /// Source: the last pages are sent.
    SourceLastPages = "source-last-pages",
    /// Source: the state is saved, the offer not sent.
    SourceSaved = "source-saved",
    /// Source: the offer is sent.
    SourceOffered = "source-offered",
    /// Source: the destination is ready, nothing is recorded.
    SourceReady = "source-ready",
    /// Source: the VM is given away, but the destination has not been told.
    SourceRecorded = "source-recorded",
    /// Source: the destination has been told to run.
    SourceRun = "source-run",
    /// Source: the VM runs there.
    SourceRunning = "source-running",
    /// Destination: a source has connected, nothing is said.
    DestinationConnected = "destination-connected",
    /// Destination: it is asked for a machine, none is built.
    DestinationAsked = "destination-asked",
    /// Destination: the machine is built, the source does not know.
    DestinationBuilt = "destination-built",
    /// Destination: the data channels are there.
    DestinationReceiving = "destination-receiving",
    /// Destination: a round has been received. Passed once a round.
    DestinationRoundDone = "destination-round-done",
    /// Destination: the switchover is announced.
    DestinationPoised = "destination-poised",
    /// Destination: the offer is there, nothing is loaded.
    DestinationOffered = "destination-offered",
    /// Destination: the state is loaded, the source does not know.
    DestinationLoaded = "destination-loaded",
    /// Destination: the source knows that it is ready.
    DestinationReady = "destination-ready",
    /// Destination: it is told to run, and does not run yet.
    DestinationTold = "destination-told",
    /// Destination: it runs, the source does not know.
    DestinationStarted = "destination-started",
    /// Destination: the source was told that it runs.
    DestinationRunning = "destination-running",
    /// Destination, in postcopy: every page is here, and the source has not been told. Precopy does not pass it.
    PostcopyComplete = "postcopy-complete",
    /// Update, old process: the new one was started, nothing is said.
    OldConnected = "old-connected",
    /// Update, old process: the new one has built the machine.
    OldBuilt = "old-built",
    /// Update, old process: I/O has drained, the vCPUs still run.
    OldDrained = "old-drained",
    /// Update, old process: everything is at rest.
    OldStopped = "old-stopped",
    /// Update, old process: the state is saved, nothing is offered.
    OldSaved = "old-saved",
    /// Update, old process: the machine is offered, and its state sent.
    OldOffered = "old-offered",
    /// Update, old process: the machine is the new one's.
    OldReplaced = "old-replaced",
    /// Update by exec, old process: a process of the new program has proven that it loads the state; nothing is executed.
    ExecProven = "exec-proven",
    /// Update, new process: it runs, nothing is said.
    NewConnected = "new-connected",
    /// Update, new process: the description and the descriptors are there.
    NewDescribed = "new-described",
    /// Update, new process: the machine is built, the old one does not know.
    NewBuilt = "new-built",
    /// Update, new process: the state is there, nothing is loaded.
    NewAsked = "new-asked",
    /// Update, new process: the state is loaded, the machine is still the old one's.
    NewLoaded = "new-loaded",
    /// Update, new process: the machine is its own, and does not run yet.
    NewRuns = "new-runs",
    /// Update, new process: the machine runs, the old one has not been told.
    NewStarted = "new-started",
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

struct Outside {
    point: String,
    directory: PathBuf,
    reached: AtomicBool,
}

fn outside() -> Option<&'static Outside> {
    static OUTSIDE: OnceLock<Option<Outside>> = OnceLock::new();
    OUTSIDE
        .get_or_init(|| {
            let point = std::env::var("WHERRY_TEST_PAUSE_AT").ok()?;
            let directory = std::env::var_os("WHERRY_TEST_PAUSE_DIR")?.into();
            if !Point::ALL.iter().any(|p| p.name() == point) {
                tracing::error!(point, "WHERRY_TEST_PAUSE_AT names no point; nothing will be held");
            }
            Some(Outside { point, directory, reached: AtomicBool::new(false) })
        })
        .as_ref()
}

/// Says that a journey has come to `point`, and waits if a test asked for it.
pub(crate) fn reach(journey: &Journey, point: Point) {
    tracing::trace!(%point, "reached");
    if let Some(outside) = outside()
        && outside.point == point.name()
        && !outside.reached.swap(true, Ordering::SeqCst)
    {
        let announced = outside.directory.join(point.name());
        let go = outside.directory.join(format!("{point}.go"));
        if let Err(e) = std::fs::write(&announced, std::process::id().to_string()) {
            tracing::error!(%point, error = %e, "cannot announce the test point; going on");
            return;
        }
        while !go.exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    journey.test_hook(point);
}
