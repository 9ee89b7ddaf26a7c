//! Live update of the process that holds a machine: what the old one hands over beside the machine, and how the new one begins.
//!
//! The journey itself is [`wherry_migration::update`]. Here is what it needs of this program: the state of the process that is no
//! machine ([`HostState`]), its own descriptors ([`Hosting`]), and the machine built from what has come.

mod exec;
mod saved;
pub mod waiter;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use prost::Message;
use rustix::process::{Signal, pidfd_send_signal};
use wherry_handover::{
    Channel, ChannelError, Ended, Entry, KeptId, LaunchError, Launched, Launcher, Registry, RegistryError,
};
use wherry_migration::machine::{Machine, MachineDescription, Refusal};
use wherry_migration::progress::Job;
use wherry_migration::update::{self, HandOver, Keep, Successor, UpdateError, UpdateOptions};
use wherry_migration::{Cause, Journey};

use self::saved::SavedHost;
use self::waiter::{Prepared, Waiter};
use crate::api::socket::ApiSocket;
use crate::api::types::UpdateMode;
use crate::builder::{LocalConfig, VmBuilder};
use crate::config::MachineConfig;
use crate::vm::{DeviceConfig, Vm};

pub use exec::{TAKE_OVER_EXECUTED, set_signals_held};

/// The word by which a new process is told to take over; its standard input is the channel.
pub const TAKE_OVER: &str = "take-over";
/// The word by which a launcher is made.
pub const LAUNCHER: &str = "launcher";

/// Names of the descriptors of the process itself.
const API: &str = "api";
const LAUNCHER_SOCKET: &str = "launcher";
const PARENT: &str = "parent";

/// What a process is beside its machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostState {
    /// Path of its API socket.
    pub api: PathBuf,
    /// It stays when its VM has left.
    pub linger: bool,
    /// What is booted after a reset, if anything can be.
    pub reboot: Option<MachineConfig>,
}

/// What a process has beside its machine, for as long as it may be replaced.
pub struct Hosting {
    /// What it is.
    pub state: HostState,
    /// Path of its program: what is there by then is started for an update, if nothing else is asked for.
    pub program: PathBuf,
    /// What it logs, for a program that is executed in it.
    pub log: String,
    /// A signal has asked for a stop.
    pub stop_wanted: AtomicBool,
    /// Starts its successor; an error says why it cannot be replaced.
    pub launcher: Result<Arc<Launcher>, String>,
    /// Waits for the end of this process, if there is one that does.
    pub waiter: Option<Waiter>,
    /// Its own descriptors.
    registry: Arc<Registry>,
    /// With which it waits for the end of its successor.
    waits: Mutex<Option<OwnedFd>>,
    /// Holds the entries.
    _kept: Vec<Arc<dyn AsFd + Send + Sync>>,
}

impl Hosting {
    /// Of a process that serves its API at this listener. If there is a `parent`, a pidfd, it ends when that one does; if there is a
    /// `waiter`, that one ends when it does.
    pub fn new(
        state: HostState,
        program: PathBuf,
        listener: UnixListener,
        launcher: Result<Arc<Launcher>, String>,
        parent: Option<Arc<OwnedFd>>,
        waiter: Option<Waiter>,
        log: String,
    ) -> Result<Arc<Self>, RegistryError> {
        let registry = Registry::new();
        let mut kept: Vec<Arc<dyn AsFd + Send + Sync>> = Vec::new();
        kept.push(registry.add(KeptId::new(API, 0), listener)?);
        if let Some(socket) = launcher.as_ref().ok().and_then(|launcher| launcher.socket().ok()) {
            kept.push(registry.add(KeptId::new(LAUNCHER_SOCKET, 0), socket)?);
        }
        if let Some(parent) = parent {
            registry.keep(KeptId::new(PARENT, 0), parent.clone())?;
            kept.push(parent);
        }
        if let Some(waiter) = &waiter {
            waiter.keep(&registry)?;
        }
        let (stop_wanted, waits) = (AtomicBool::new(false), Mutex::default());
        Ok(Arc::new(Self { state, program, log, stop_wanted, launcher, waiter, registry, waits, _kept: kept }))
    }

    /// The socket with which this process, which was replaced, is to [wait](waiter::wait) for the end of the VM, if it is.
    pub fn waits(&self) -> Option<OwnedFd> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// What of it goes over.
    pub(crate) fn entries(&self) -> Vec<Entry> {
        self.registry.list()
    }

    /// What is said of it beside the machine.
    pub(crate) fn saved(&self, devices: &DeviceConfig) -> Vec<u8> {
        SavedHost::of(&self.state, devices).encode_to_vec()
    }
}

/// A new process has the machine.
#[derive(Debug)]
pub struct Replaced {
    /// It.
    pub pid: u32,
    /// How it went.
    pub job: Job,
}

/// No new process has the machine.
#[derive(Debug, thiserror::Error)]
pub enum ReplaceError {
    /// There is no launcher.
    #[error("there is nobody who could start a new process: {0}")]
    NoLauncher(String),
    /// It could not be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// This process could not be prepared to wait for it.
    #[error("preparing to wait for a new process: {0}")]
    Wait(std::io::Error),
    /// The channel to it could not be made.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// It did not take over.
    #[error(transparent)]
    Update(#[from] UpdateError),
    /// It did not take over, and has ended.
    #[error("{error} ({ended})")]
    Ended {
        /// Why.
        error: UpdateError,
        /// How.
        ended: Ended,
    },
}

impl ReplaceError {
    /// It cannot be done as the machine is.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(self, Self::NoLauncher(_) | Self::Update(UpdateError::RunsHere(Cause::CannotKeep(_))))
    }
}

/// How long a process that did not take over may take to end by itself.
const END_LIMIT: Duration = Duration::from_secs(1);

/// Has a new process of that program take the machine over, or that program executed in this process; then this does not return.
pub(crate) fn replace(
    hosting: &Hosting,
    machine: Arc<Vm>,
    program: &Path,
    mode: UpdateMode,
    hold: &dyn Fn(bool),
    journey: &Journey,
) -> Result<Replaced, ReplaceError> {
    // Nobody is started in vain.
    update::check(&*machine)?;
    let launcher = hosting.launcher.as_ref().map_err(|why| ReplaceError::NoLauncher(why.clone()))?;
    // One that is waited for already hands that on, and so does one that stays.
    let waits = match (mode, &hosting.waiter) {
        (UpdateMode::Transfer, None) => Prepared::new(&hosting.registry).map_err(ReplaceError::Wait)?,
        _ => None,
    };
    let (channel, theirs) = Channel::pair()?;
    let launched = launcher.launch(program, &[TAKE_OVER.into()], theirs.as_fd())?;
    drop(theirs);
    let host = hosting.saved(machine.connections());
    let handed = HandOver { machine, entries: hosting.entries(), host, channel, hold };
    let options = UpdateOptions::default();
    let done = match mode {
        UpdateMode::Transfer => update::hand_over(handed, options, journey),
        UpdateMode::Exec => {
            let exec = |queue| exec::execute(&launched, program, &hosting.log, &hosting.stop_wanted, queue);
            Err(update::hand_over_by_exec(handed, &exec, options, journey))
        }
    };
    let Launched { pid, pidfd } = launched;
    match done {
        Ok(job) => {
            *hosting.waits.lock().unwrap_or_else(PoisonError::into_inner) = waits.map(Prepared::into_ours);
            Ok(Replaced { pid, job })
        }
        Err(error) => Err(given_up(launcher, &Launched { pid, pidfd }, error)),
    }
}

/// Has a new process of that program take over, which is told to by that word; it is given what is said of this one beside the machine. One
/// that does not take over has ended when this returns, or was killed.
pub fn start_and_hand_over<M: Keep + ?Sized>(
    launcher: &Launcher,
    (program, word): (&Path, &str),
    machine: Arc<M>,
    host: Vec<u8>,
    journey: &Journey,
) -> Result<Replaced, ReplaceError> {
    let (channel, theirs) = Channel::pair()?;
    let launched = launcher.launch(program, &[word.into()], theirs.as_fd())?;
    drop(theirs);
    let handed = HandOver { machine, entries: Vec::new(), host, channel, hold: &|_| {} };
    match update::hand_over(handed, UpdateOptions::default(), journey) {
        Ok(job) => Ok(Replaced { pid: launched.pid, job }),
        Err(error) => Err(given_up(launcher, &launched, error)),
    }
}

/// Waits for the end of a process that did not take over. The channel is closed, and it can have nothing of the machine any more but
/// descriptors.
fn given_up(launcher: &Launcher, launched: &Launched, error: UpdateError) -> ReplaceError {
    let Launched { pid, pidfd } = launched;
    let ended = launcher.ended(*pid, Instant::now() + END_LIMIT).or_else(|| {
        tracing::warn!(pid, "the new process does not end by itself");
        // An error: it has ended after all.
        let _ = pidfd_send_signal(pidfd, Signal::KILL);
        launcher.ended(*pid, Instant::now() + END_LIMIT)
    });
    match (ended, error) {
        // It has said why by itself.
        (_, error @ (UpdateError::Refused(_) | UpdateError::Cancelled)) => error.into(),
        (Some(ended), error @ UpdateError::RunsHere(_)) => ReplaceError::Ended { error, ended },
        (_, error) => error.into(),
    }
}

/// What a new process has taken over.
pub struct TakenOver {
    /// The machine. It runs.
    pub(crate) vm: Arc<Vm>,
    /// What the old process was.
    pub state: HostState,
    /// Its API socket, on which clients may wait.
    pub socket: ApiSocket,
    /// Its launcher.
    pub launcher: Result<Arc<Launcher>, String>,
    /// The process with which it is to end, if there is one: a pidfd.
    pub parent: Option<Arc<OwnedFd>>,
    /// The process that waits for the end of this one, if there is one.
    pub waiter: Option<Waiter>,
}

/// Takes over from the process at the other end of a channel; returns when the machine runs here, or nothing when it was only to be
/// proven that it could.
pub fn take_over(channel: Channel, journey: &Journey) -> Result<Option<TakenOver>, UpdateError> {
    let heir = Heir { taken: Mutex::default() };
    match update::take_over(channel, &heir, UpdateOptions::default(), journey)? {
        Some(machine) => heir.taken(machine).map(Some),
        None => Ok(None),
    }
}

/// Takes over what the program that this process executed before has left in a queue; returns when the machine runs. An error: it is lost.
pub fn take_over_executed(queue: Channel, journey: &Journey) -> Result<TakenOver, UpdateError> {
    let heir = Heir { taken: Mutex::default() };
    let machine = update::take_over_executed(queue, &heir, UpdateOptions::default(), journey)?;
    heir.taken(machine)
}

/// Builds what has come.
struct Heir {
    taken: Mutex<Option<TakenOver>>,
}

impl Heir {
    /// What was built, which runs.
    fn taken(self, machine: Arc<dyn Machine>) -> Result<TakenOver, UpdateError> {
        drop(machine);
        let taken = self.taken.into_inner().unwrap_or_else(PoisonError::into_inner);
        let taken = taken.ok_or_else(|| UpdateError::Lost("the machine that was built has vanished".into()))?;
        taken.vm.has_arrived();
        Ok(taken)
    }
}

impl Successor for Heir {
    fn build(
        &self,
        description: &MachineDescription,
        registry: &Arc<Registry>,
        host: &[u8],
    ) -> Result<Arc<dyn Machine>, Refusal> {
        let one = |reason: String| Refusal(vec![reason]);
        let (state, devices) = SavedHost::read(host).map_err(one)?;
        // All that can fail does so before the machine is this process's.
        let listener = registry.inherit(&KeptId::new(API, 0)).map_err(|error| one(error.to_string()))?;
        let socket = ApiSocket::adopt(&state.api, listener.into()).map_err(|error| one(error.to_string()))?;
        let launcher = match registry.claim(&KeptId::new(LAUNCHER_SOCKET, 0)) {
            Some(socket) => Launcher::at(socket).map(Arc::new).map_err(|error| error.to_string()),
            None => Err("it had no launcher when it was started".into()),
        };
        let parent = registry.claim(&KeptId::new(PARENT, 0)).map(Arc::new);
        let waiter = Waiter::claim(registry);
        let vm = VmBuilder::new(LocalConfig { devices }).take_over(description, registry)?;
        let taken = TakenOver { vm: vm.clone(), state, socket, launcher, parent, waiter };
        *self.taken.lock().unwrap_or_else(PoisonError::into_inner) = Some(taken);
        Ok(vm)
    }
}
