//! A process that serves a device, and how another one takes its place under a running VM.
//!
//! - this file: the process, from its start or from the moment at which it takes over, to its end.
//! - [`control`]: the socket at which an update is asked for (`wherry update --control`).
//! - [`machine`]: the device as what [`wherry_migration::update`] hands over, which is the journey of a VM's process, too.
//!
//! ```text
//!   control       wherry update --control  -- starts the new process, hands over, answers
//!   serve         the device's clients, one after the other; comes to rest between two messages
//!   (main)        waits for the end of `serve`
//! ```
//!
//! Contract: a process that is asked to be replaced and is not, for whatever reason, serves on as if nothing had happened. One that has
//! been replaced ends without closing, unmapping or removing anything by itself.

mod control;
mod machine;

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use clap::Parser;
use prost::Message;
use wherry_handover::{Channel, KeptId, Launcher, Registry, Rest};
use wherry_migration::Journey;
use wherry_migration::machine::{Machine, MachineDescription, Refusal};
use wherry_migration::update::{self, Successor, UpdateOptions};
use wherry_socket::SocketFile;

pub use self::control::ask;
use self::machine::DeviceMachine;
pub use self::machine::Unit;
use crate::args::{Cli, Command, DeviceCommand, DeviceSockets};
use crate::{HAPPENED, host};

/// The word by which a new process is told to take over; its standard input is the channel.
pub const TAKE_OVER: &str = "take-over-device";

/// Names of the descriptors of the process itself.
const SOCKET: &str = "socket";
const CONTROL: &str = "control";
const LAUNCHER: &str = "launcher";
const PARENT: &str = "parent";

/// Says whether clients that were told so much of a device can go on with another one.
pub type Fits = Box<dyn Fn(&[u8]) -> Result<(), String> + Send>;

/// A device, ready to be served.
pub struct Made {
    /// The state unit that its server is.
    pub unit: Unit,
    /// What its clients are told of it.
    pub offer: Vec<u8>,
    /// Whether clients that were told that can go on with it.
    pub fits: Fits,
    /// Makes a server at a socket.
    pub begin: Box<dyn FnOnce(UnixListener) -> Result<Begun> + Send>,
}

/// A server.
pub struct Begun {
    /// Has it come to rest.
    pub rest: Rest,
    /// Ends it.
    pub stop: Box<dyn FnOnce() + Send>,
    /// Serves clients until it is ended.
    pub run: Box<dyn FnOnce() -> Result<()> + Send>,
}

/// What a process is beside its device, as the next one is told.
#[derive(Clone, PartialEq, Message)]
struct SavedProcess {
    /// The command line: that of the process that began.
    #[prost(bytes = "vec", repeated, tag = "1")]
    arguments: Vec<Vec<u8>>,
    /// Path of the socket at which clients find the device.
    #[prost(bytes = "vec", tag = "2")]
    socket: Vec<u8>,
    /// Path of the control socket.
    #[prost(bytes = "vec", tag = "3")]
    control: Vec<u8>,
    /// What clients were told of the device; nothing, if that is looked at later only.
    #[prost(bytes = "vec", tag = "4")]
    offer: Vec<u8>,
}

/// A device that is served, and what its process is.
struct Process {
    registry: Arc<Registry>,
    saved: SavedProcess,
    /// With it, the process can be replaced.
    control: Option<Control>,
    serving: JoinHandle<Result<()>>,
    unit: Unit,
    rest: Rest,
    stop: Box<dyn FnOnce() + Send>,
    /// Removed in the end.
    files: Vec<SocketFile>,
}

/// What it takes to be replaced.
struct Control {
    listener: UnixListener,
    launcher: Result<Arc<Launcher>, String>,
    /// Own descriptors, as long as the process may be replaced.
    _kept: Vec<Arc<dyn AsFd + Send + Sync>>,
}

impl Control {
    fn new(
        listener: UnixListener,
        launcher: Result<Arc<Launcher>, String>,
        registry: &Registry,
        socket: &UnixListener,
        parent: Option<Arc<OwnedFd>>,
    ) -> Result<Self> {
        let mut kept: Vec<Arc<dyn AsFd + Send + Sync>> = Vec::new();
        let own = [(SOCKET, socket.try_clone()), (CONTROL, listener.try_clone())];
        for (name, listener) in own {
            let listener = listener.context("copying a socket")?;
            kept.push(registry.add(KeptId::new(name, 0), listener)?);
        }
        if let Some(socket) = launcher.as_ref().ok().and_then(|launcher| launcher.socket().ok()) {
            kept.push(registry.add(KeptId::new(LAUNCHER, 0), socket)?);
        }
        if let Some(parent) = parent {
            registry.keep(KeptId::new(PARENT, 0), parent.clone())?;
            kept.push(parent);
        }
        Ok(Self { listener, launcher, _kept: kept })
    }
}

/// Serves a device until SIGINT or SIGTERM, or until another process does.
pub fn serve(sockets: &DeviceSockets, log: &str, make: impl FnOnce(&Registry) -> Result<Made>) -> Result<u8> {
    // Before there are threads, and anything else of a client's.
    let parent = host::die_with(sockets.die_with)?;
    let launcher = sockets.control.as_ref().map(|_| host::launcher(log));
    let registry = Registry::new();
    let made = make(&registry)?;
    let listening = |path: &Path| SocketFile::bind(path).with_context(|| format!("listening on {}", path.display()));
    let (listener, file) = listening(&sockets.socket)?;
    let mut files = vec![file];
    let mut control = None;
    if let (Some(path), Some(launcher)) = (&sockets.control, launcher) {
        let (socket, file) = listening(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
            .with_context(|| format!("protecting {}", path.display()))?;
        files.push(file);
        control = Some(Control::new(socket, launcher, &registry, &listener, parent)?);
    }
    let bytes = |path: &Path| -> Result<Vec<u8>> {
        let path = std::path::absolute(path).with_context(|| format!("finding {}", path.display()))?;
        Ok(path.into_os_string().into_vec())
    };
    let saved = SavedProcess {
        arguments: std::env::args_os().map(OsString::into_vec).collect(),
        socket: bytes(&sockets.socket)?,
        control: sockets.control.as_deref().map(bytes).transpose()?.unwrap_or_default(),
        offer: made.offer.clone(),
    };
    Process::begin(registry, saved, control, listener, files, made)?.wait()
}

/// `wherry take-over-device`: the process at the other end of the standard input is replaced by this one.
pub fn take_over() -> Result<u8> {
    let channel = Channel::from_fd(host::take_stdin()?);
    let channel = channel.context("using standard input as the channel to the old process")?;
    let heir = Heir::default();
    let machine = update::take_over(channel, &heir, UpdateOptions::default(), &Journey::new())?;
    drop(machine);
    wherry_socket::own_adopted();
    let taken = heir.0.into_inner().unwrap_or_else(PoisonError::into_inner);
    taken.context("the device that was made has vanished")?.wait()
}

impl Process {
    /// Serves on a thread of its own. One that succeeds another process is at rest until it is told to go on.
    fn begin(
        registry: Arc<Registry>,
        saved: SavedProcess,
        control: Option<Control>,
        listener: UnixListener,
        files: Vec<SocketFile>,
        made: Made,
    ) -> Result<Self> {
        let unit = made.unit;
        let Begun { rest, stop, run } = (made.begin)(listener).context("setting up the socket")?;
        if registry.succeeds() {
            rest.begin();
        }
        let socket = PathBuf::from(OsString::from_vec(saved.socket.clone()));
        let work = move || run().with_context(|| format!("serving {}", socket.display()));
        let serving = std::thread::Builder::new().name("serve".into()).spawn(work).context("starting a thread")?;
        Ok(Self { registry, saved, control, serving, unit, rest, stop, files })
    }

    /// Until the device is not served any more.
    fn wait(self) -> Result<u8> {
        let Self { registry, saved, control, serving, unit, rest, stop, files } = self;
        super::signals(stop)?;
        if let Some(control) = control {
            control::start(control, registry, saved, (unit, rest))?;
        }
        let served =
            serving.join().map_err(|_| anyhow::anyhow!("the thread that serves has panicked; this is a bug"))?;
        drop(files);
        served.map(|()| HAPPENED)
    }
}

/// Makes what has come.
#[derive(Default)]
struct Heir(Mutex<Option<Process>>);

impl Heir {
    fn make(&self, registry: &Arc<Registry>, host: &[u8]) -> Result<Arc<dyn Machine>> {
        let saved = SavedProcess::decode(host).context("reading what the old process is")?;
        let arguments = saved.arguments.iter().map(|argument| OsString::from_vec(argument.clone()));
        let cli = Cli::try_parse_from(arguments).map_err(|error| {
            // Its first line says what is wrong with which argument.
            let text = error.render().to_string();
            anyhow::anyhow!("its command line: {}", text.lines().next().unwrap_or_default())
        })?;
        let Command::Device(device) = &cli.command else { anyhow::bail!("its command line is that of no device") };
        let inherit = |name| registry.inherit(&KeptId::new(name, 0)).map(UnixListener::from);
        let (listener, socket) = (inherit(SOCKET)?, inherit(CONTROL)?);
        let launcher = match registry.claim(&KeptId::new(LAUNCHER, 0)) {
            Some(socket) => Launcher::at(socket).map(Arc::new).map_err(|error| error.to_string()),
            None => Err("it had no launcher when it was started".into()),
        };
        let adopt = |path: &[u8]| SocketFile::adopt(Path::new(std::ffi::OsStr::from_bytes(path)));
        let files = vec![adopt(&saved.socket)?, adopt(&saved.control)?];
        let parent = registry.claim(&KeptId::new(PARENT, 0)).map(Arc::new);
        let made = match &device.command {
            DeviceCommand::Testdma(options) => super::testdma::make(options, registry)?,
            DeviceCommand::Accel(options) => super::accel::make(options, registry)?,
            DeviceCommand::Blk(options) => super::back_end::blk(options, registry)?,
            DeviceCommand::Net(options) => super::back_end::net(options, registry)?,
        };
        if !saved.offer.is_empty() {
            (made.fits)(&saved.offer).map_err(|why| anyhow::anyhow!("the device is another one here: {why}"))?;
        }
        if let Some(parent) = &parent {
            host::watch_parent(parent.clone())?;
        }
        let control = Control::new(socket, launcher, registry, &listener, parent)?;
        let process = Process::begin(registry.clone(), saved, Some(control), listener, files, made)?;
        let machine = DeviceMachine::new(process.unit, process.rest.clone(), registry.clone())?;
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(process);
        Ok(machine)
    }
}

impl Successor for Heir {
    fn build(
        &self,
        _: &MachineDescription,
        registry: &Arc<Registry>,
        host: &[u8],
    ) -> Result<Arc<dyn Machine>, Refusal> {
        self.make(registry, host).map_err(|error| Refusal(vec![format!("{error:#}")]))
    }
}
