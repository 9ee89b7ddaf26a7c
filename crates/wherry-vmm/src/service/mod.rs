//! The service: the one place in a Wherry process that knows where its VM stands, and that every request goes through.
//!
//! - [`guest`]: what the service needs of a machine and of a journey.
//! - [`kvm`]: the real ones.
//! - [`Service`]: the states and the moves between them.
//!
//! ```text
//!   run:      created --> running <--> paused --stop, power-off--> stopped      any --guest error--> crashed
//!                           |  ^
//!                   migrate v  | failed, cancelled
//!                         migrating --done--> moved
//!                           |   '--unknown--> in-doubt --resolve, answer--> running | moved
//!                           |  ^
//!                   update  v  | failed, cancelled
//!                         updating --done--> updated
//!
//!   receive:  listening <--failed-- receiving --done--> running
//!                                       '--memory follows--> running (the journey goes on beside it) --done, lost-->
//! ```
//!
//! Contract: the machine has one owner at any time. It lies in the service while it runs or is paused here; a request
//! that works on it takes it out and puts it back, and whoever comes meanwhile is told so instead of waiting; a journey
//! takes it along by value. So nothing can be done to a machine that is on its way. No lock is held while a machine or
//! a journey works, so `info`, `job` and `cancel` answer at once whatever happens.

pub mod guest;
pub mod kvm;
mod state;

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{info, warn};
use wherry_migration::progress::{Job, Phase};

use wherry_migration::Side;
use wherry_stream::Endpoint;

use crate::api::types::{
    BalloonInfo, DeviceInfo, DeviceRemoveRequest, ErrorCode, Hardware, MigrationRequest, RecoverRequest, UpdateInfo,
    UpdateRequest, VmInfo, VmState,
};
use guest::{Departure, Engine, Guest, Journey, Received, Sent, Updated};
use state::Inner;

/// How long the vCPUs may take to come to rest when the user pauses them.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);
/// How long a stop waits for a journey to give the VM back, or for a request that works on the VM.
const STOP_LIMIT: Duration = Duration::from_secs(15);
/// How long the source may take to hear that a VM has ended while its memory followed.
const LAST_WORD: Duration = Duration::from_secs(2);
/// How long the process stays after the VM has left, when nobody fetches the result.
const RESULT_LIMIT: Duration = Duration::from_secs(10);

/// How long a guest has to let a device go, in seconds, if the user does not say; and the longest time that can be asked for.
const UNPLUG_LIMIT: u64 = 30;
const LONGEST_UNPLUG: u64 = 600;

/// The last word of a process whose user has ended it.
const STOPPED: &str = "stopped by the user";

/// A request that was not done, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ServiceError {
    /// Which kind.
    pub code: ErrorCode,
    /// What was being done, to what, and what to try.
    pub message: String,
}

impl ServiceError {
    fn state(message: impl Into<String>) -> Self {
        Self { code: ErrorCode::WrongState, message: message.into() }
    }

    fn failed(message: impl Into<String>) -> Self {
        Self { code: ErrorCode::Failed, message: message.into() }
    }
}

/// How the process is to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Exit status of the process.
    pub status: u8,
    /// Last line for the user.
    pub message: String,
    /// A new process has the VM: what this one has is that one's.
    pub replaced: bool,
}

/// Boots the machine again after the guest has asked for a reset.
pub type Reboot = Box<dyn Fn() -> Result<Box<dyn Guest>, guest::GuestError> + Send + Sync>;

/// What a process does with its VM, beyond holding it.
#[derive(Default)]
pub struct Policy {
    /// Boots again after a reset. Without it a reset ends the process.
    pub reboot: Option<Reboot>,
    /// Whether the process stays when the VM has left, until it is stopped.
    pub linger: bool,
}

/// See the module.
pub struct Service {
    engine: Arc<dyn Engine>,
    policy: Policy,
    inner: Mutex<Inner>,
    changed: Condvar,
    version: watch::Sender<u64>,
    accepts: watch::Sender<bool>,
}

impl Service {
    /// A service without a VM, which is about to be built.
    pub fn new(engine: Arc<dyn Engine>, policy: Policy) -> Arc<Self> {
        Arc::new(Self {
            engine,
            policy,
            inner: Mutex::new(Inner {
                state: VmState::Created,
                reason: None,
                guest: None,
                busy: None,
                hardware: None,
                devices: None,
                listen: None,
                journey: None,
                following: false,
                stop_wanted: false,
                exit: None,
                machine: 0,
                result_read: false,
                ending: None,
            }),
            changed: Condvar::new(),
            version: watch::Sender::new(0),
            accepts: watch::Sender::new(true),
        })
    }

    /// Takes a machine that was built here and lets it run, unless the user wants it paused.
    pub fn start(self: &Arc<Self>, guest: Box<dyn Guest>, paused: bool) -> Result<(), ServiceError> {
        let mut guest = guest;
        if !paused {
            guest.resume().map_err(|e| ServiceError::failed(format!("starting the vCPUs: {e}")))?;
        }
        let mut inner = self.lock();
        if let Some(ending) = &inner.ending {
            return Err(ServiceError::state(format!("the process is ending: {}", ending.message)));
        }
        self.take_in(&mut inner, guest);
        Ok(())
    }

    /// Says where the process waits for a VM.
    pub fn listen(&self, address: String) {
        let mut inner = self.lock();
        inner.listen = Some(address);
        self.set(&mut inner, VmState::Listening, None);
    }

    /// Where it all stands. Never waits for the VM.
    pub fn info(&self) -> VmInfo {
        let inner = self.lock();
        VmInfo {
            state: Self::seen(&inner),
            reason: inner.reason.clone(),
            vm: inner.hardware.clone(),
            listen: inner.listen.clone(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }

    /// The last journey as it stands; an empty job if there was none. Never waits for it.
    ///
    /// A journey is told to be over when its consequences are drawn: whoever hears that it failed finds the VM here
    /// again, and whoever hears that it is done finds all figures of its end.
    pub fn job(&self) -> Job {
        let inner = self.lock();
        let mut job = inner.journey.as_ref().map(|j| j.job()).unwrap_or_default();
        if inner.following {
            job.phase = match job.phase {
                Phase::Done | Phase::Cancelled | Phase::Failed => Phase::Postcopy,
                phase => phase,
            };
        } else if matches!(inner.state, VmState::Migrating | VmState::Receiving | VmState::Updating) {
            job.phase = match job.phase {
                Phase::Done => Phase::Switchover,
                Phase::Cancelled | Phase::Failed => Phase::Precopy,
                phase => phase,
            };
        }
        job
    }

    /// The phases of the last journey, without those that end it.
    pub fn phases(&self) -> Vec<Phase> {
        let mut phases = self.lock().journey.as_ref().map(|j| j.phases()).unwrap_or_default();
        phases.retain(|phase| !matches!(phase, Phase::None | Phase::Done | Phase::Cancelled | Phase::Failed));
        phases
    }

    /// Remembers that somebody has been told how the last journey ended.
    pub fn result_was_read(&self) {
        self.lock().result_read = true;
        self.changed.notify_all();
    }

    /// Changes whenever a state does; the value itself means nothing.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Stops the vCPUs until `resume`. Doing it twice is no error.
    pub fn pause(self: &Arc<Self>) -> Result<VmInfo, ServiceError> {
        self.with_guest("pausing", |guest| {
            if guest.is_paused() {
                return Ok(());
            }
            guest.pause(PAUSE_LIMIT).map_err(|e| format!("pausing the VM: {e}; it runs on"))
        })
    }

    /// Lets paused vCPUs run. Doing it twice is no error.
    pub fn resume(self: &Arc<Self>) -> Result<VmInfo, ServiceError> {
        self.with_guest("resuming", |guest| {
            if !guest.is_paused() {
                return Ok(());
            }
            guest.resume().map_err(|e| format!("resuming the VM: {e}; it is still paused"))
        })
    }

    /// Takes the machine out, works on it without holding the lock, and puts it back.
    fn with_guest(
        self: &Arc<Self>,
        what: &'static str,
        work: impl FnOnce(&mut Box<dyn Guest>) -> Result<(), String>,
    ) -> Result<VmInfo, ServiceError> {
        self.on_guest(what, |guest| work(guest).map_err(ServiceError::failed))?;
        Ok(self.info())
    }

    /// The same, for work that answers something.
    fn on_guest<T>(
        self: &Arc<Self>,
        what: &'static str,
        work: impl FnOnce(&mut Box<dyn Guest>) -> Result<T, ServiceError>,
    ) -> Result<T, ServiceError> {
        let mut guest = {
            let mut inner = self.lock();
            let guest = Self::take_out(&mut inner, what)?;
            inner.busy = Some(what);
            guest
        };
        let result = work(&mut guest);
        let mut inner = self.lock();
        inner.busy = None;
        self.put_back(&mut inner, guest);
        drop(inner);
        result
    }

    /// How the balloon stands, after asking the guest to be content with so many bytes of RAM, if they are given.
    pub fn balloon(self: &Arc<Self>, size: Option<u64>) -> Result<BalloonInfo, ServiceError> {
        self.on_guest("asking for the balloon of", |guest| guest.balloon(size))
    }

    /// The devices of the VM as they stand; none where there is no VM. Never waits for it.
    pub fn devices(&self) -> Vec<DeviceInfo> {
        let devices = self.lock().devices.clone();
        devices.map(|list| list()).unwrap_or_default()
    }

    /// Plugs a device. Answers when the VM has it; its guest may take a moment to find it.
    pub fn plug(self: &Arc<Self>, device: &str) -> Result<DeviceInfo, ServiceError> {
        self.on_guest("plugging a device into", |guest| guest.plug(device))
    }

    /// Unplugs a device. Answers when it is gone, or the guest has not let it go in time. The VM can be worked on meanwhile.
    pub fn unplug(self: &Arc<Self>, request: &DeviceRemoveRequest) -> Result<DeviceInfo, ServiceError> {
        let seconds = request.timeout_s.unwrap_or(UNPLUG_LIMIT);
        if !(1..=LONGEST_UNPLUG).contains(&seconds) {
            let message =
                format!("unplugging {}: timeout_s is {seconds}; 1 to {LONGEST_UNPLUG} are possible", request.name);
            return Err(ServiceError { code: ErrorCode::BadRequest, message });
        }
        let unplugging = self.on_guest("unplugging a device of", |guest| guest.unplug(&request.name))?;
        let gone = unplugging.wait(Duration::from_secs(seconds));
        self.version.send_modify(|v| *v += 1);
        gone
    }

    /// Sends the VM away. Answers as soon as the journey has begun; [`job`](Self::job) tells the rest.
    pub fn migrate(self: &Arc<Self>, request: &MigrationRequest) -> Result<Job, ServiceError> {
        let departure =
            self.engine.depart(request).map_err(|message| ServiceError { code: ErrorCode::BadRequest, message })?;
        let mut inner = self.lock();
        if inner.following {
            return Err(ServiceError::state(format!(
                "migrating the VM: it is still coming from {}; wait until `wherry status` says that this is done",
                inner.journey.as_ref().map(|j| j.job().peer).unwrap_or_default()
            )));
        }
        let guest = Self::take_out(&mut inner, "migrating")?;
        let journey = departure.journey();
        let job = journey.job();
        inner.journey = Some(journey);
        inner.result_read = false;
        self.set(&mut inner, VmState::Migrating, None);
        drop(inner);
        info!(to = request.to, "the VM is on its way out");
        let service = self.clone();
        std::thread::Builder::new().name("migration".into()).spawn(move || service.carry(departure, guest)).map_err(
            |e| {
                // The closure, and the machine with it, is gone when the thread cannot be made.
                let mut inner = self.lock();
                self.end(&mut inner, VmState::Crashed, 1, format!("the VM was lost: no thread for its journey: {e}"));
                ServiceError::failed(format!("starting the migration thread: {e}"))
            },
        )?;
        Ok(job)
    }

    fn carry(self: Arc<Self>, departure: Box<dyn Departure>, guest: Box<dyn Guest>) {
        let sent = departure.run(guest);
        let mut inner = self.lock();
        match sent {
            Sent::Kept(guest) => {
                let why = inner.journey.as_ref().and_then(|j| j.job().error);
                warn!(why = why.as_deref().unwrap_or("unknown"), "the VM has not left; it stays here");
                self.put_back(&mut inner, guest);
                inner.reason = why.map(|w| format!("the last migration ended without a move: {w}"));
            }
            Sent::Gone => {
                let job = inner.journey.as_ref().map(|j| j.job()).unwrap_or_default();
                let message = format!(
                    "the VM has moved to {}: {} rounds, {} bytes of memory, blackout {} us",
                    job.peer,
                    job.rounds.len(),
                    job.memory_normal_bytes,
                    job.downtime_us
                );
                info!("{message}");
                self.set(&mut inner, VmState::Moved, Some(message.clone()));
                if inner.stop_wanted || !self.policy.linger {
                    let deadline = Instant::now() + RESULT_LIMIT;
                    while !inner.result_read && !inner.stop_wanted && Instant::now() < deadline {
                        inner = self.wait(inner, deadline);
                    }
                    self.end(&mut inner, VmState::Moved, 0, message);
                }
            }
            Sent::Lost { why, in_doubt } => self.lose(&mut inner, &why, in_doubt),
        }
    }

    /// Has a new process take the VM over. Answers when it has; then this process ends. An error says why it has not, and the VM runs
    /// on here.
    pub fn update(self: &Arc<Self>, request: &UpdateRequest) -> Result<UpdateInfo, ServiceError> {
        let replacement =
            self.engine.update(request).map_err(|message| ServiceError { code: ErrorCode::BadRequest, message })?;
        let mut inner = self.lock();
        if inner.following {
            return Err(ServiceError::state(format!(
                "updating the VMM: the memory of the VM is still coming from {}; wait until `wherry status` says that this is done",
                inner.journey.as_ref().map(|j| j.job().peer).unwrap_or_default()
            )));
        }
        let guest = Self::take_out(&mut inner, "updating the VMM of")?;
        inner.journey = Some(replacement.journey());
        inner.result_read = false;
        self.set(&mut inner, VmState::Updating, None);
        drop(inner);
        info!("a new process is about to take the VM over");
        let updated = replacement.run(guest, &|hold| {
            self.accepts.send_replace(!hold);
        });
        let mut inner = self.lock();
        match updated {
            Updated::Replaced { pid, trouble } => {
                let job = inner.journey.as_ref().map(|j| j.job()).unwrap_or_default();
                let message = match &trouble {
                    None => format!("process {pid} has taken the VM over: blackout {} us", job.downtime_us),
                    Some(trouble) => format!("process {pid} has taken the VM over, and may have lost it: {trouble}"),
                };
                info!("{message}");
                if inner.ending.is_none() {
                    let status = u8::from(trouble.is_some());
                    inner.ending = Some(Ending { status, message: message.clone(), replaced: true });
                }
                self.set(&mut inner, VmState::Updated, Some(message.clone()));
                match trouble {
                    None => Ok(UpdateInfo { pid, job }),
                    Some(_) => Err(ServiceError::failed(message)),
                }
            }
            Updated::Kept { guest, why, refused } => {
                warn!(why, "the VM stays with this process");
                self.put_back(&mut inner, guest);
                inner.reason = Some(format!("the last update did not happen: {why}"));
                let code = if refused { ErrorCode::WrongState } else { ErrorCode::Failed };
                Err(ServiceError { code, message: format!("updating the VMM: {why}") })
            }
            Updated::Lost { why } => {
                self.lose(&mut inner, &why, false);
                Err(ServiceError::failed(format!("updating the VMM: {why}")))
            }
        }
    }

    /// Takes a VM that this process has taken over, and that runs or is paused. `journey` is the view of how it came.
    pub fn take_over(self: &Arc<Self>, guest: Box<dyn Guest>, journey: Arc<dyn Journey>) -> Result<(), ServiceError> {
        let mut inner = self.lock();
        inner.journey = Some(journey);
        if let Some(ending) = &inner.ending {
            return Err(ServiceError::state(format!("the process is ending: {}", ending.message)));
        }
        self.take_in(&mut inner, guest);
        Ok(())
    }

    /// Whether new clients are served.
    pub(crate) fn accepts(&self) -> watch::Receiver<bool> {
        self.accepts.subscribe()
    }

    /// Notes that a VM is arriving; `journey` is the view of it.
    pub fn arriving(&self, journey: Arc<dyn Journey>) {
        let mut inner = self.lock();
        inner.journey = Some(journey);
        self.set(&mut inner, VmState::Receiving, None);
    }

    /// Notes which machine was built for the VM that is arriving.
    pub fn built(&self, hardware: Hardware) {
        self.lock().hardware = Some(hardware);
        self.version.send_modify(|v| *v += 1);
    }

    /// Takes a VM that runs here while its memory follows. What comes of that is told by [`arrival`](Self::arrival).
    pub fn runs(self: &Arc<Self>, guest: Box<dyn Guest>) {
        let mut inner = self.lock();
        inner.following = true;
        inner.reason = Some("memory still follows".into());
        self.take_in(&mut inner, guest);
    }

    /// Takes what came of an arrival; with `once` a failed one ends the process. Answers whether to listen on.
    pub fn arrival(self: &Arc<Self>, received: Received, once: bool) -> bool {
        let mut inner = self.lock();
        // A VM that was ended meanwhile has had its last word.
        let ended = std::mem::take(&mut inner.following) && (inner.busy.is_some() || inner.ending.is_some());
        match received {
            Received::Lost { .. } | Received::Whole if ended => {
                self.changed.notify_all();
                false
            }
            Received::Whole => {
                info!("all memory of the VM has arrived");
                inner.reason = None;
                self.changed.notify_all();
                self.version.send_modify(|v| *v += 1);
                false
            }
            Received::Arrived(guest) => {
                info!("the VM has arrived");
                self.take_in(&mut inner, guest);
                false
            }
            Received::Refused(why) => {
                warn!(why, "the VM did not arrive");
                inner.hardware = None;
                if inner.stop_wanted {
                    self.end(&mut inner, VmState::Stopped, 0, "stopped before a VM arrived".into());
                } else if once {
                    self.end(&mut inner, VmState::Stopped, 1, format!("the VM did not arrive: {why}"));
                } else {
                    self.set(&mut inner, VmState::Listening, Some(format!("the last VM did not arrive: {why}")));
                }
                inner.ending.is_none()
            }
            Received::Lost { why, in_doubt } => {
                self.lose(&mut inner, &why, in_doubt);
                false
            }
        }
    }

    /// Asks the journey to end with the VM at its source. Answers at once; [`job`](Self::job) tells whether it did.
    pub fn cancel(&self) -> Result<Job, ServiceError> {
        let inner = self.lock();
        let journey = match (Self::seen(&inner), &inner.journey) {
            (VmState::Migrating | VmState::Receiving | VmState::Updating, Some(journey)) => journey.clone(),
            (VmState::InDoubt, _) => {
                return Err(ServiceError::state(
                    "cancelling the migration: the VM has been given away and cannot be taken back; wait for the \
                     answer of the other end, or decide with `wherry resolve`",
                ));
            }
            (state, _) => {
                return Err(ServiceError::state(format!(
                    "cancelling the migration: there is none under way, the VM is {state}"
                )));
            }
        };
        drop(inner);
        journey.cancel().map_err(|why| ServiceError::state(format!("cancelling the migration: {why}")))?;
        Ok(journey.job())
    }

    /// Has a migration under way go on by postcopy.
    pub fn switch(&self) -> Result<Job, ServiceError> {
        let journey = self.under_way("switching to postcopy", VmState::Migrating)?;
        journey.switch().map_err(|why| ServiceError::state(format!("switching to postcopy: {why}")))?;
        Ok(journey.job())
    }

    /// Takes up a link that was lost while memory follows: the source at once, the destination by waiting elsewhere.
    pub fn recover(&self, request: &RecoverRequest) -> Result<Job, ServiceError> {
        let refused = |why: String| ServiceError::state(format!("recovering: {why}"));
        let endpoint = |text: &Option<String>| -> Result<Option<Endpoint>, ServiceError> {
            text.as_ref()
                .map(|text| text.parse())
                .transpose()
                .map_err(|error| ServiceError { code: ErrorCode::BadRequest, message: format!("recovering: {error}") })
        };
        let (to, listen) = (endpoint(&request.to)?, endpoint(&request.listen)?);
        let journey = self.under_way("recovering", VmState::Migrating)?;
        match (journey.job().role.as_str(), to, listen) {
            ("destination", None, Some(listen)) => journey.recover_at(&listen).map_err(refused)?,
            ("destination", ..) => {
                let why =
                    "the source takes the link up; here only another place to wait for it can be given (`listen`)";
                return Err(refused(why.into()));
            }
            (_, to, None) => journey.recover(to).map_err(refused)?,
            (_, _, Some(_)) => {
                return Err(refused("this is the source; it connects (`to`) and does not listen".into()));
            }
        }
        Ok(journey.job())
    }

    /// The journey that is under way: one in this state, or one whose VM runs here while its memory follows.
    fn under_way(&self, doing: &str, wanted: VmState) -> Result<Arc<dyn Journey>, ServiceError> {
        let inner = self.lock();
        match (Self::seen(&inner), &inner.journey) {
            (state, Some(journey)) if state == wanted || inner.following => Ok(journey.clone()),
            (state, _) => Err(ServiceError::state(format!("{doing}: no migration is under way, the VM is {state}"))),
        }
    }

    /// Decides a journey in doubt.
    pub fn resolve(&self, side: Side) -> Result<Job, ServiceError> {
        let inner = self.lock();
        let journey = match (Self::seen(&inner), &inner.journey) {
            (VmState::InDoubt, Some(journey)) => journey.clone(),
            (state, _) => {
                return Err(ServiceError::state(format!("resolving: nothing is in doubt, the VM is {state}")));
            }
        };
        drop(inner);
        journey.resolve(side).map_err(|why| ServiceError::state(format!("resolving: {why}")))?;
        Ok(journey.job())
    }

    /// Ends the VM and the process. A journey under way is cancelled first; a VM in doubt, or memory that a VM elsewhere
    /// needs, is not ended unless by `force`.
    pub fn stop(&self, force: bool) -> Result<VmInfo, ServiceError> {
        let deadline = Instant::now() + STOP_LIMIT;
        let mut inner = self.lock();
        loop {
            if inner.state == VmState::Updated {
                let reason = inner.reason.clone().unwrap_or_default();
                return Err(ServiceError::state(format!("stopping: {reason}; ask it")));
            }
            if inner.ending.is_some() {
                return Ok(self.info_of(inner));
            }
            let phase = inner.journey.as_ref().map(|j| j.job().phase).unwrap_or_default();
            match Self::seen(&inner) {
                state @ (VmState::InDoubt | VmState::Migrating)
                    if force && matches!(phase, Phase::InDoubt | Phase::Postcopy | Phase::Paused) =>
                {
                    self.end(&mut inner, state, 3, format!("ended by force in phase {phase:?}"));
                }
                VmState::Migrating if matches!(phase, Phase::Postcopy | Phase::Paused) => {
                    inner.stop_wanted = false;
                    let to = inner.journey.as_ref().map(|j| j.job().peer).unwrap_or_default();
                    return Err(ServiceError::state(format!(
                        "stopping: the VM runs at {to}, and memory that it needs is here; wait until it is there, `wherry \
                         recover` if the link is lost, or stop with `--force` if that VM is gone or may be lost"
                    )));
                }
                VmState::InDoubt => {
                    inner.stop_wanted = false;
                    return Err(ServiceError::state(
                        "stopping: the VM is in doubt, and what is here may be its only copy; decide with `wherry \
                         resolve` first (or stop with `--force`)",
                    ));
                }
                VmState::Running | VmState::Paused if inner.guest.is_some() => {
                    let guest = inner.guest.take();
                    inner.busy = Some("stopping");
                    drop(inner);
                    self.bury(guest, "its user has ended it");
                    inner = self.lock();
                    self.end(&mut inner, VmState::Stopped, 0, STOPPED.into());
                }
                VmState::Listening => self.end(&mut inner, VmState::Stopped, 0, "stopped before a VM arrived".into()),
                VmState::Created if inner.busy.is_none() => {
                    self.end(&mut inner, VmState::Stopped, 0, "stopped before the VM ran".into())
                }
                VmState::Moved | VmState::Stopped | VmState::Crashed if inner.busy.is_none() => {
                    let (state, message) = (inner.state, inner.reason.clone().unwrap_or_default());
                    self.end(&mut inner, state, u8::from(state == VmState::Crashed), message);
                }
                VmState::Migrating | VmState::Receiving | VmState::Updating if !inner.stop_wanted => {
                    inner.stop_wanted = true;
                    if let Some(journey) = inner.journey.clone() {
                        drop(inner);
                        // Too late to cancel is no error here: the loop then sees the VM gone.
                        let _ = journey.cancel();
                        inner = self.lock();
                    }
                }
                _ if Instant::now() >= deadline => {
                    return Err(ServiceError {
                        code: ErrorCode::Deadline,
                        message: format!(
                            "stopping: the VM is still {} after {} s; it will end when that is over",
                            inner.busy.unwrap_or(inner.state.word()),
                            STOP_LIMIT.as_secs()
                        ),
                    });
                }
                _ => {
                    inner.stop_wanted = true;
                    // In doubt is told by the journey, not by a notification: look again now and then.
                    let look = Instant::now() + Duration::from_millis(100);
                    inner = self.wait(inner, look.min(deadline));
                }
            }
        }
    }

    /// Ends a machine. If its memory still follows, the source is told that no more of it is needed.
    fn bury(&self, guest: Option<Box<dyn Guest>>, why: &str) {
        // First of all: where faults are served no more, a guest that runs would find zeros.
        drop(guest);
        let mut inner = self.lock();
        if !inner.following {
            return;
        }
        let journey = inner.journey.clone();
        drop(inner);
        if let Some(journey) = journey {
            journey.vm_ended(why);
        }
        let deadline = Instant::now() + LAST_WORD;
        inner = self.lock();
        while inner.following && Instant::now() < deadline {
            inner = self.wait(inner, deadline);
        }
    }

    /// Blocks until the process is to end.
    pub fn wait_for_end(&self) -> Ending {
        let mut inner = self.lock();
        loop {
            if let Some(ending) = &inner.ending {
                return ending.clone();
            }
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// How the process is to end, if that is decided.
    pub fn ending(&self) -> Option<Ending> {
        self.lock().ending.clone()
    }
}

#[cfg(test)]
pub(crate) mod tests;
