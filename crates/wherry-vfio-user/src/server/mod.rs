//! The side of the device: one client after the other, one message after the other.
//!
//! - [`device`]: what a device is to its server. [`config`] and [`image`] help to write one: configuration space, and a state
//!   that is checked when it is loaded.
//! - [`Bus`]: the client's memory and interrupts, for the device and its threads.
//! - `session`: what is done with each message of a client.
//! - `dma`, `irqs`: maps, logs and vectors.
//! - [`kept`]: a server that another process goes on with.
//!
//! When a client is lost (it closes the socket, breaks the protocol, or does not finish a message in time) its maps and descriptors are
//! given back, the device is left as it is, and the next client is taken.

pub mod bus;
pub mod config;
pub mod device;
mod dma;
pub mod image;
mod irqs;
pub mod kept;
mod saved;
mod session;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use wherry_socket::SocketFile;

pub use bus::{Bus, DmaError, Word};
pub use device::{Description, Device, Irq, Migration, Region, Shared};
pub use image::Image;
pub use kept::Kept;
pub use wherry_handover::Rest;

use crate::capabilities::{Capabilities, Extensions, TwinSocket};
use crate::error::VfioUserError;
use crate::link::Link;
use crate::message::{Command, DEFAULT_TRANSFER, MOST_DESCRIPTORS};
use crate::states::State;
use kept::Resumed;

/// How long the parts of a message, the first message of a client and its replies may take.
const LIMIT: Duration = Duration::from_secs(5);

/// Ends a server, from any thread.
#[derive(Clone)]
pub struct Stop(Arc<Stopping>);

struct Stopping {
    stopped: AtomicBool,
    event: OwnedFd,
    /// The client that is served now.
    current: Mutex<Option<Arc<Link>>>,
}

impl Stop {
    fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(Stopping { stopped: AtomicBool::new(false), event, current: Mutex::new(None) })))
    }

    /// The client that is served is closed, and no other one is taken.
    pub fn stop(&self) {
        let current = self.0.current.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.stopped.store(true, Ordering::SeqCst);
        let _ = rustix::io::write(&self.0.event, &1_u64.to_ne_bytes());
        if let Some(link) = &*current {
            link.close();
        }
    }

    /// Whether it was called.
    pub fn is_stopped(&self) -> bool {
        self.0.stopped.load(Ordering::SeqCst)
    }

    /// Notes the client that is served; not if the server has been stopped.
    fn serve(&self, link: Option<Arc<Link>>) -> bool {
        let mut current = self.0.current.lock().unwrap_or_else(PoisonError::into_inner);
        *current = link;
        !self.is_stopped()
    }
}

/// When a [`Watcher`] is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The message has come.
    Before,
    /// It is done, and not answered yet.
    After,
}

/// What a [`Watcher`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Go on.
    GoOn,
    /// Close the connection, without an answer.
    HangUp,
}

/// Is asked about every command of a client, twice, on the thread that serves: for servers that fail on purpose.
pub type Watcher = Box<dyn FnMut(Command, Moment) -> Verdict + Send>;

/// What a server does with a userfaultfd, which this crate, without unsafe code, cannot.
pub trait Userfaults: Send {
    /// Makes one. A descriptor of it, for the client.
    fn open(&mut self) -> io::Result<OwnedFd>;

    /// Has whoever touches a page of this mapping that is missing wait for the client. At addresses of this process.
    fn register(&mut self, address: u64, bytes: u64) -> io::Result<()>;

    /// Ends that; who waits goes on. The client may keep its descriptor, so that closing ours would change nothing.
    fn unregister(&mut self, address: u64, bytes: u64) -> io::Result<()>;

    /// Lets go of it.
    fn close(&mut self);
}

/// A device and what of it outlives a client.
pub struct Host {
    description: Description,
    bus: Bus,
    state: State,
    limit: Duration,
    capabilities: Capabilities,
    stop: Stop,
    rest: Rest,
    /// The device was brought to rest for another process.
    device_rests: bool,
    watcher: Option<Watcher>,
    userfaults: Option<Box<dyn Userfaults>>,
    /// Maps are registered for missing pages, and the client serves those.
    faulting: bool,
}

impl Host {
    /// For one device. No descriptors are needed but those of a stop and of a rest.
    pub fn new(device: &dyn Device) -> io::Result<Self> {
        let description = device.description();
        let capabilities = Capabilities {
            max_msg_fds: Some(MOST_DESCRIPTORS as u64),
            max_data_xfer_size: Some(DEFAULT_TRANSFER as u64),
            max_dma_maps: Some(65535),
            pgsizes: Some(dma::PAGE),
            twin_socket: Some(TwinSocket { supported: true, fd_index: None }),
            write_multiple: Some(true),
            wherry: Some(Extensions { p2p: description.p2p, estimates: true, userfaultfd: false }),
        };
        let (bus, stop, rest) = (Bus::new(&description.irqs), Stop::new()?, Rest::new()?);
        let (watcher, userfaults) = (None, None);
        let state = State::Running;
        let (limit, faulting, device_rests) = (LIMIT, false, false);
        Ok(Self {
            description,
            bus,
            state,
            limit,
            capabilities,
            stop,
            rest,
            device_rests,
            watcher,
            userfaults,
            faulting,
        })
    }

    /// How long the parts of a message, the first message of a client and its replies may take; 5 s if nothing is said.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// Whether clients that can have a twin socket get one; they do if nothing is said.
    pub fn set_twin_socket(&mut self, offered: bool) {
        self.capabilities.twin_socket = offered.then_some(TwinSocket { supported: true, fd_index: None });
    }

    /// Has clients that can do it serve the faults of memory that is not all there (our extension `userfaultfd`).
    pub fn set_userfaults(&mut self, userfaults: Box<dyn Userfaults>) {
        self.userfaults = Some(userfaults);
        if let Some(extensions) = &mut self.capabilities.wherry {
            extensions.userfaultfd = true;
        }
    }

    /// Has every command shown to a watcher.
    pub fn set_watcher(&mut self, watcher: Watcher) {
        self.watcher = Some(watcher);
    }

    /// Memory and interrupts of its clients.
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// What ends it.
    pub fn stop(&self) -> Stop {
        self.stop.clone()
    }

    /// State of its migration.
    pub fn state(&self) -> State {
        self.state
    }

    /// Faults are served no longer. Without this who waits for a page would hold the maps for ever.
    fn end_faults(&mut self) {
        if let (true, Some(userfaults)) = (std::mem::take(&mut self.faulting), &mut self.userfaults) {
            for (address, bytes) in self.bus.mapped() {
                if let Err(error) = userfaults.unregister(address, bytes) {
                    tracing::error!("ending the faults of {bytes:#x} bytes at {address:#x}: {error}");
                }
            }
            userfaults.close();
        }
    }

    /// Serves one client until it is lost; why it was is the error (`Closed` for one that left).
    pub fn serve(&mut self, stream: UnixStream, device: &mut dyn Device) -> Result<(), VfioUserError> {
        let failed = |what: &str, error: &io::Error| VfioUserError::Socket {
            peer: "a client".into(),
            what: what.into(),
            source: error.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error),
        };
        let link = Link::new(stream, "a client", self.limit, false).map_err(|e| failed("setting up its socket", &e))?;
        self.serve_link(Arc::new(link), None, device)
    }

    /// Serves a client that comes, or one of the process before.
    fn serve_link(
        &mut self,
        link: Arc<Link>,
        known: Option<(Capabilities, Extensions)>,
        device: &mut dyn Device,
    ) -> Result<(), VfioUserError> {
        if !self.stop.serve(Some(link.clone())) {
            return Ok(());
        }
        let called = link.clone();
        self.rest.call_by(Some(Arc::new(move || called.call())));
        let result = session::run(self, link.clone(), known, device);
        self.rest.call_by(None);
        // Before everything is closed: the last answer may not have been read.
        if result.is_err() && !self.stop.is_stopped() {
            link.close_politely(self.limit.min(Duration::from_millis(200)));
        }
        self.end_faults();
        self.bus.lose_client();
        link.close();
        self.stop.serve(None);
        self.note_obstacle();
        result
    }
}

/// A socket at which clients find a device.
pub struct Server {
    listener: UnixListener,
    /// Removed with the server.
    _file: Option<SocketFile>,
}

impl Server {
    /// At a path. A socket that was left there by a process that is gone is replaced.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let (listener, file) = SocketFile::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, _file: Some(file) })
    }

    /// At a socket that listens already.
    pub fn on(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { listener, _file: None })
    }

    /// Serves clients, one after the other, until it is stopped.
    pub fn serve(&self, host: &mut Host, device: &mut dyn Device) -> io::Result<()> {
        let (stop, rest) = (host.stop(), host.rest());
        while !stop.is_stopped() {
            if rest.is_wanted() {
                if let Some(Resumed { link, client, extensions }) = host.rest_alone(device) {
                    tell(&host.serve_link(link, Some((client, extensions)), device));
                }
                continue;
            }
            let mut events = [&stop.0.event, rest.event()].map(|event| PollFd::new(event, PollFlags::IN)).to_vec();
            events.push(PollFd::new(&self.listener, PollFlags::IN));
            match poll(&mut events, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let called = !events[1].revents().is_empty();
            if called {
                // It may have been meant for the client before.
                rest.heard();
            }
            if rest.is_wanted() {
                continue;
            }
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => continue,
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => return Err(error),
            };
            tell(&host.serve(stream, device));
        }
        Ok(())
    }
}

fn tell(served: &Result<(), VfioUserError>) {
    match served {
        Ok(()) | Err(VfioUserError::Closed { .. }) => tracing::debug!("the client has left"),
        Err(error) => tracing::warn!("the client is given up: {error}"),
    }
}
