//! The shared handle of one journey: what the API and the command line hold while [`send`](crate::source::send) or
//! [`receive`](crate::destination::receive) works in its own thread.
//!
//! One handle is for one journey. All methods may be called from any thread at any time and return at once.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use serde::{Deserialize, Serialize};
use wherry_stream::{Closer, Endpoint, Listener};

use crate::progress::{Job, Phase};
use crate::testpoint::Point;

/// One end of a journey.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// Where the VM comes from.
    Source,
    /// Where it goes.
    Destination,
}

impl Side {
    /// `source` or `destination`.
    pub fn as_str(self) -> &'static str {
        match self {
            Side::Source => "source",
            Side::Destination => "destination",
        }
    }
}

/// Why an [`Event`] was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// The phase changed.
    Phase,
    /// A round of precopy ended.
    Round,
    /// Ten times a second while memory moves.
    Progress,
}

/// News of a journey, with the job as it stood then.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Why it was sent.
    pub kind: EventKind,
    /// The job.
    pub job: Job,
}

const OPEN: u8 = 0;
const ASKED: u8 = 1;
const CLOSED: u8 = 2;
const UNSET: u64 = u64::MAX;

/// Handle of one journey; clones share it.
#[derive(Clone)]
pub struct Journey {
    inner: Arc<Inner>,
}

struct Inner {
    started: Instant,
    job: Mutex<Job>,
    subscribers: Mutex<Vec<Sender<Event>>>,
    cancel: AtomicU8,
    /// Whether the rest may follow, or why not; known when both sides have agreed.
    may_follow: Mutex<Result<(), &'static str>>,
    wishes: Mutex<Wishes>,
    downtime_limit_us: AtomicU64,
    /// Bytes per second; 0: no limit.
    bandwidth: AtomicU64,
    resolution: Mutex<Option<Side>>,
    /// Readable after `cancel`, `resolve` and every other wish, so that whoever waits for a peer hears of it at once.
    alarm: Option<OwnedFd>,
    test_hook: OnceLock<TestHook>,
    /// Connections that `cancel` ends, because somebody is blocked in a call on them; by ticket.
    closers: Mutex<Vec<(u64, Closer)>>,
    tickets: AtomicU64,
}

/// What the user wants of a journey under way, until it is done.
#[derive(Default)]
struct Wishes {
    switch: bool,
    recover: Option<Recover>,
    ended: Option<String>,
}

/// How a lost link is to be taken up.
pub(crate) enum Recover {
    /// Source: at once, and if there is an address, over that.
    To(Option<Endpoint>),
    /// Destination: here.
    At(Listener),
}

/// While it lives, `cancel` ends a connection.
pub(crate) struct CloseOnCancel {
    journey: Journey,
    ticket: u64,
}

impl Drop for CloseOnCancel {
    fn drop(&mut self) {
        lock(&self.journey.inner.closers).retain(|(ticket, _)| *ticket != self.ticket);
    }
}

type TestHook = Box<dyn Fn(Point) + Send + Sync>;

impl fmt::Debug for Journey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Journey").field("phase", &lock(&self.inner.job).phase).finish_non_exhaustive()
    }
}

impl Default for Journey {
    fn default() -> Self {
        Self::new()
    }
}

/// Locks, also after a thread panicked with the lock held: everything locked here is plain data.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Journey {
    /// A journey that has not begun.
    pub fn new() -> Self {
        Self {
            inner: Arc::new(Inner {
                started: Instant::now(),
                job: Mutex::default(),
                subscribers: Mutex::default(),
                cancel: AtomicU8::new(OPEN),
                may_follow: Mutex::new(Err("it has not been agreed yet")),
                wishes: Mutex::default(),
                downtime_limit_us: AtomicU64::new(UNSET),
                bandwidth: AtomicU64::new(UNSET),
                resolution: Mutex::default(),
                // Without it (no descriptors left) cancelling works all the same, within one tick of a wait.
                alarm: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok(),
                test_hook: OnceLock::new(),
                closers: Mutex::default(),
                tickets: AtomicU64::new(0),
            }),
        }
    }

    /// Asks for the journey to be given up; the VM runs on at the source. `false` if it is too late: the source has
    /// given the VM away, or the destination has promised to take it, or the journey has ended. The journey has not
    /// ended when this returns.
    pub fn cancel(&self) -> bool {
        let state = self.inner.cancel.compare_exchange(OPEN, ASKED, Ordering::SeqCst, Ordering::SeqCst);
        if self.is_cancelled() {
            lock(&self.inner.closers).iter().for_each(|(_, closer)| closer.close());
        }
        self.ring();
        matches!(state, Ok(_) | Err(ASKED))
    }

    /// Decides a journey that is in doubt: the VM belongs to `side` from now on. The caller answers for the other side
    /// being dead or fenced. `false` if the journey is not in doubt.
    pub fn resolve(&self, side: Side) -> bool {
        // The resolution is looked at only in the phase `InDoubt`; holding the job's lock makes the check stand.
        let job = lock(&self.inner.job);
        if job.phase != Phase::InDoubt {
            return false;
        }
        *lock(&self.inner.resolution) = Some(side);
        drop(job);
        self.ring();
        true
    }

    /// The job as it stands.
    pub fn job(&self) -> Job {
        self.inner.stamped(&lock(&self.inner.job))
    }

    /// Every event from now on. A receiver that is dropped is forgotten.
    pub fn subscribe(&self) -> Receiver<Event> {
        let (sender, receiver) = channel();
        lock(&self.inner.subscribers).push(sender);
        receiver
    }

    /// Asks a hybrid migration to switch now, in the middle of a round: what is left follows. The error says why it will
    /// not; a migration that has switched by itself meanwhile is none.
    pub fn switch_to_postcopy(&self) -> Result<(), &'static str> {
        match self.job().phase {
            Phase::Setup | Phase::Precopy => (*lock(&self.inner.may_follow))?,
            Phase::Switchover | Phase::Postcopy | Phase::Paused => return Ok(()),
            _ => return Err("it is over, or has not begun"),
        }
        lock(&self.inner.wishes).switch = true;
        self.ring();
        Ok(())
    }

    pub(crate) fn wants_postcopy(&self) -> bool {
        lock(&self.inner.wishes).switch
    }

    pub(crate) fn set_may_follow(&self, may: Result<(), &'static str>) {
        *lock(&self.inner.may_follow) = may;
    }

    /// Source: takes up the link at once, over another address if one is given, and gives up the present one if there is
    /// still one. `false` unless memory follows.
    pub fn recover(&self, to: Option<Endpoint>) -> bool {
        self.wish_recovery(Recover::To(to))
    }

    /// Destination: waits for the source to come back at another place. `false` unless memory follows.
    pub fn recover_at(&self, listener: Listener) -> bool {
        self.wish_recovery(Recover::At(listener))
    }

    fn wish_recovery(&self, how: Recover) -> bool {
        if !matches!(self.job().phase, Phase::Postcopy | Phase::Paused) {
            return false;
        }
        lock(&self.inner.wishes).recover = Some(how);
        self.ring();
        true
    }

    pub(crate) fn wants_recovery(&self) -> bool {
        lock(&self.inner.wishes).recover.is_some()
    }

    pub(crate) fn take_recovery(&self) -> Option<Recover> {
        lock(&self.inner.wishes).recover.take()
    }

    /// Destination: the VM that runs here has ended although memory still follows. The source is told, and the journey
    /// ends. Its vCPUs must have left the guest for good.
    pub fn vm_ended(&self, why: impl Into<String>) {
        lock(&self.inner.wishes).ended = Some(why.into());
        self.ring();
    }

    pub(crate) fn has_vm_ended(&self) -> Option<String> {
        lock(&self.inner.wishes).ended.clone()
    }

    /// Sleeps until `limit` has passed or the user wants something.
    pub(crate) fn nap(&self, limit: Duration) {
        let Some(alarm) = self.alarm() else { return std::thread::sleep(limit) };
        let timeout = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        // An interrupted nap is a short one.
        let _ = poll(&mut [PollFd::new(&alarm, PollFlags::IN)], Some(&timeout));
        self.quiet();
    }

    /// Changes the limit for the blackout; looked at after every round.
    pub fn set_downtime_limit(&self, limit: Duration) {
        let us = u64::try_from(limit.as_micros()).unwrap_or(UNSET - 1).min(UNSET - 1);
        self.inner.downtime_limit_us.store(us, Ordering::Relaxed);
    }

    /// Changes the limit for the bandwidth in bytes per second, `None` for no limit; obeyed at once.
    pub fn set_bandwidth(&self, limit: Option<u64>) {
        self.inner.bandwidth.store(limit.unwrap_or(0).min(UNSET - 1), Ordering::Relaxed);
    }

    /// Whether [`cancel`](Self::cancel) was called in time.
    pub fn is_cancelled(&self) -> bool {
        self.inner.cancel.load(Ordering::SeqCst) == ASKED
    }

    /// For tests: has `hook` called, by the thread that runs the journey, at every [`Point`]. Only the first call counts.
    pub fn set_test_hook(&self, hook: impl Fn(Point) + Send + Sync + 'static) {
        let _ = self.inner.test_hook.set(Box::new(hook));
    }

    pub(crate) fn test_hook(&self, point: Point) {
        if let Some(hook) = self.inner.test_hook.get() {
            hook(point);
        }
    }

    /// The point after which `cancel` answers `false`. `false` if it was called before.
    pub(crate) fn close_to_cancel(&self) -> bool {
        self.inner.cancel.compare_exchange(OPEN, CLOSED, Ordering::SeqCst, Ordering::SeqCst) != Err(ASKED)
    }

    /// Undoes `close_to_cancel`.
    pub(crate) fn open_to_cancel(&self) {
        let _ = self.inner.cancel.compare_exchange(CLOSED, OPEN, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// Has `cancel` end a connection, as long as the returned guard lives; at once if it was called before.
    pub(crate) fn close_on_cancel(&self, closer: Closer) -> CloseOnCancel {
        let ticket = self.inner.tickets.fetch_add(1, Ordering::Relaxed);
        lock(&self.inner.closers).push((ticket, closer.clone()));
        if self.is_cancelled() {
            closer.close();
        }
        CloseOnCancel { journey: self.clone(), ticket }
    }

    pub(crate) fn resolution(&self) -> Option<Side> {
        *lock(&self.inner.resolution)
    }

    /// Takes the resolution, so that it is acted on once.
    pub(crate) fn take_resolution(&self) -> Option<Side> {
        self.quiet();
        lock(&self.inner.resolution).take()
    }

    pub(crate) fn downtime_limit(&self, default: Duration) -> Duration {
        match self.inner.downtime_limit_us.load(Ordering::Relaxed) {
            UNSET => default,
            us => Duration::from_micros(us),
        }
    }

    pub(crate) fn bandwidth(&self, default: Option<u64>) -> Option<u64> {
        match self.inner.bandwidth.load(Ordering::Relaxed) {
            UNSET => default.filter(|b| *b > 0),
            0 => None,
            limit => Some(limit),
        }
    }

    /// Readable once the journey was cancelled or resolved.
    pub(crate) fn alarm(&self) -> Option<BorrowedFd<'_>> {
        self.inner.alarm.as_ref().map(AsFd::as_fd)
    }

    /// Takes the alarm back, so that a wait after it waits again.
    pub(crate) fn quiet(&self) {
        if let Some(alarm) = &self.inner.alarm {
            let _ = rustix::io::read(alarm, &mut [0; 8]);
        }
    }

    fn ring(&self) {
        if let Some(alarm) = &self.inner.alarm {
            let _ = rustix::io::write(alarm, &1u64.to_ne_bytes());
        }
    }

    /// Changes the job without telling anyone.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Job)) {
        change(&mut lock(&self.inner.job));
    }

    /// Changes the job and tells all subscribers.
    pub(crate) fn tell(&self, kind: EventKind, change: impl FnOnce(&mut Job)) {
        let job = {
            let mut job = lock(&self.inner.job);
            change(&mut job);
            if matches!(job.phase, Phase::Done | Phase::Cancelled | Phase::Failed) {
                job.time_elapsed_us = self.inner.elapsed_us();
            }
            self.inner.stamped(&job)
        };
        lock(&self.inner.subscribers).retain(|s| s.send(Event { kind, job: job.clone() }).is_ok());
    }

    /// Enters a phase.
    pub(crate) fn enter(&self, phase: Phase) {
        tracing::info!(?phase, "journey");
        self.tell(EventKind::Phase, |job| job.phase = phase);
    }
}

impl Inner {
    fn elapsed_us(&self) -> u64 {
        self.started.elapsed().as_micros().try_into().unwrap_or(u64::MAX)
    }

    fn stamped(&self, job: &Job) -> Job {
        let mut job = job.clone();
        if !matches!(job.phase, Phase::None | Phase::Done | Phase::Cancelled | Phase::Failed) {
            job.time_elapsed_us = self.elapsed_us();
        }
        job
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cancel_is_too_late_once_it_is_closed_and_possible_again_when_reopened() {
        let journey = Journey::new();
        assert!(journey.close_to_cancel());
        assert!(!journey.cancel());
        journey.open_to_cancel();
        assert!(journey.cancel());
        assert!(journey.cancel(), "asking twice is no error");
        assert!(!journey.close_to_cancel());
        assert!(journey.is_cancelled());
    }

    #[test]
    fn resolve_is_refused_unless_in_doubt() {
        let journey = Journey::new();
        assert!(!journey.resolve(Side::Source));
        journey.enter(Phase::InDoubt);
        assert!(journey.resolve(Side::Destination));
        assert_eq!(journey.resolution(), Some(Side::Destination));
    }

    #[test]
    fn subscribers_hear_each_change_and_dropped_ones_are_forgotten() {
        let journey = Journey::new();
        let (kept, dropped) = (journey.subscribe(), journey.subscribe());
        drop(dropped);
        journey.enter(Phase::Setup);
        journey.enter(Phase::Precopy);
        assert_eq!(kept.try_iter().map(|e| e.job.phase).collect::<Vec<_>>(), [Phase::Setup, Phase::Precopy]);
        assert_eq!(lock(&journey.inner.subscribers).len(), 1);
    }

    #[test]
    fn settings_replace_the_options_only_when_they_were_made() {
        let journey = Journey::new();
        assert_eq!(journey.downtime_limit(Duration::from_millis(7)), Duration::from_millis(7));
        assert_eq!(journey.bandwidth(Some(5)), Some(5));
        journey.set_bandwidth(None);
        journey.set_downtime_limit(Duration::from_micros(3));
        assert_eq!(journey.bandwidth(Some(5)), None);
        assert_eq!(journey.downtime_limit(Duration::from_millis(7)), Duration::from_micros(3));
    }
}
