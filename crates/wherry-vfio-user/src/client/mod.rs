//! The side of the VMM: a connection to a device of another process.
//!
//! - this file: connecting, and what the device asks for by itself;
//! - `requests`: one function for each request;
//! - `kept`: a connection that outlives the process;
//! - `migration`: features, states, data and logs.
//!
//! A client has a thread that serves what the device asks for (`vfio-user`), and one more for the twin socket, if there is one
//! (`vfio-user-twin`). They end with the client, or with the connection. Requests may come from any thread.

mod kept;
mod migration;
mod requests;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

pub use requests::{IoFds, RegionReply};

use crate::capabilities::{Capabilities, Extensions, MAJOR, MINOR, TwinSocket, Version};
use crate::error::VfioUserError;
use crate::link::{Incoming, Link};
use crate::message::{Command, DEFAULT_TRANSFER, Header, MOST_DESCRIPTORS, flags};
use crate::payload::DmaAccess;

/// Between two attempts to connect where there is no room: libvfio-user has a queue of none.
const RETRY: Duration = Duration::from_millis(10);

/// Memory, for devices that got it without a descriptor. Addresses are those of DMA maps, and what is asked for lies in maps that
/// allow it.
///
/// What is written here may not be in the device's own log (libvfio-user's is not told of it): whoever moves the VM marks it.
pub trait DmaHandler: Send + Sync {
    /// The device reads memory.
    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), Errno>;

    /// The device writes memory.
    fn write(&self, address: u64, data: &[u8]) -> Result<(), Errno>;
}

/// No memory: for clients that give every map with a descriptor.
#[derive(Clone, Copy, Debug)]
pub struct NoMemory;

impl DmaHandler for NoMemory {
    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::FAULT)
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), Errno> {
        Err(Errno::FAULT)
    }
}

/// How a client behaves.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How long each request may take, and connecting.
    pub limit: Duration,
    /// How long a reset or a change of state may take, which can mean work.
    pub slow_limit: Duration,
    /// Whether a twin socket is asked for.
    pub twin_socket: bool,
    /// Extensions that are asked for.
    pub extensions: Extensions,
}

impl Default for Options {
    fn default() -> Self {
        let extensions = Extensions { p2p: true, estimates: true, userfaultfd: true };
        Self { limit: Duration::from_secs(5), slow_limit: Duration::from_secs(30), twin_socket: true, extensions }
    }
}

/// A map of ours.
#[derive(Clone, Copy)]
struct Mapped {
    size: u64,
    readable: bool,
    writable: bool,
}

type Maps = Arc<Mutex<BTreeMap<u64, Mapped>>>;

/// A connection to a device.
pub struct Client {
    link: Arc<Link>,
    twin: Option<Arc<Link>>,
    options: Options,
    /// What the server takes.
    server: Capabilities,
    extensions: Extensions,
    maps: Maps,
    /// The interrupt of PCI that has eventfds now: libvfio-user has one table for all.
    active_irq: Mutex<Option<u32>>,
    threads: Vec<JoinHandle<()>>,
}

impl Client {
    /// Connects to the server at a socket, and agrees on the protocol.
    pub fn connect(path: &Path, options: Options, memory: Arc<dyn DmaHandler>) -> Result<Self, VfioUserError> {
        let peer = path.display().to_string();
        let failed = |source: Errno| VfioUserError::Connect { peer: peer.clone(), source };
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
        let deadline = Instant::now() + options.limit;
        loop {
            match rustix::net::connect(&socket, &address) {
                Ok(()) => return Self::over(socket.into(), &peer, options, memory),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(RETRY),
                Err(error) => return Err(failed(error)),
            }
        }
    }

    /// Over a socket that is connected; the name is for errors.
    pub fn over(
        stream: UnixStream,
        peer: &str,
        options: Options,
        memory: Arc<dyn DmaHandler>,
    ) -> Result<Self, VfioUserError> {
        let failed = |error: std::io::Error| VfioUserError::Connect {
            peer: peer.into(),
            source: error.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error),
        };
        let link = Arc::new(Link::new(stream, peer, options.limit, true).map_err(failed)?);
        let mut this = Self {
            link,
            twin: None,
            options,
            server: Capabilities::default(),
            extensions: Extensions::default(),
            maps: Maps::default(),
            active_irq: Mutex::new(None),
            threads: Vec::new(),
        };
        this.greet()?;
        this.attend(&memory).map_err(failed)?;
        Ok(this)
    }

    /// Starts the threads.
    fn attend(&mut self, memory: &Arc<dyn DmaHandler>) -> std::io::Result<()> {
        let links = [(Some(self.link.clone()), "vfio-user"), (self.twin.clone(), "vfio-user-twin")];
        for (link, name) in links {
            let Some(link) = link else { continue };
            let attendant = Attendant { link, maps: self.maps.clone(), memory: memory.clone() };
            let thread = std::thread::Builder::new().name(name.into()).spawn(move || attendant.run());
            self.threads.push(thread?);
        }
        Ok(())
    }

    /// The first message. The server's answer holds for all others.
    fn greet(&mut self) -> Result<(), VfioUserError> {
        let twin_socket = self.options.twin_socket.then_some(TwinSocket { supported: true, fd_index: None });
        let capabilities = Capabilities {
            max_msg_fds: Some(MOST_DESCRIPTORS as u64),
            max_data_xfer_size: Some(DEFAULT_TRANSFER as u64),
            max_dma_maps: Some(65535),
            pgsizes: Some(4096),
            twin_socket,
            write_multiple: Some(true),
            wherry: Some(self.options.extensions),
        };
        let ours = Version { major: MAJOR, minor: MINOR, capabilities };
        let mut reply = self.link.ask(Command::Version, &ours.encode(), &[], self.options.limit)?;
        let wrong = |reason: String| self.link.wrong("Version", reason);
        let theirs = Version::decode(&reply.payload).map_err(|error| wrong(error.to_string()))?;
        if theirs.major != MAJOR || theirs.minor > MINOR {
            return Err(wrong(format!("it speaks {}.{}, we {MAJOR}.{MINOR}", theirs.major, theirs.minor)));
        }
        if let Some(twin) = theirs.capabilities.twin_socket.filter(|twin| twin.supported) {
            let index = twin.fd_index.map_or(usize::MAX, |index| index as usize);
            if twin_socket.is_none() || index >= reply.descriptors.len() {
                let count = reply.descriptors.len();
                return Err(wrong(format!("a twin socket at {:?} of {count} descriptors", twin.fd_index)));
            }
            let stream = UnixStream::from(reply.descriptors.swap_remove(index));
            let link = Link::new(stream, self.link.peer(), self.options.limit, true);
            self.twin = Some(Arc::new(link.map_err(|error| wrong(format!("its twin socket: {error}")))?));
        }
        self.extensions = self.options.extensions.and(theirs.capabilities.extensions());
        self.server = theirs.capabilities;
        Ok(())
    }

    /// What the server takes.
    pub fn capabilities(&self) -> &Capabilities {
        &self.server
    }

    /// Extensions that both know.
    pub fn extensions(&self) -> Extensions {
        self.extensions
    }

    /// Whether the device's own requests come on a socket of their own.
    pub fn has_twin_socket(&self) -> bool {
        self.twin.is_some()
    }

    /// Ends the connection: whoever waits for a reply is told.
    pub fn close(&self) {
        self.link.close();
        if let Some(twin) = &self.twin {
            twin.close();
        }
    }

    /// Data of one message to the server.
    fn transfer(&self) -> usize {
        self.server.transfer().min(self.link.piece())
    }

    fn maps(&self) -> MutexGuard<'_, BTreeMap<u64, Mapped>> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks. The payload of the reply, and what came beside it.
    fn ask(
        &self,
        command: Command,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Vec<u8>, Vec<OwnedFd>), VfioUserError> {
        let limit = match command {
            Command::Reset | Command::Feature => self.options.slow_limit,
            _ => self.options.limit,
        };
        let reply = self.link.ask(command, payload, fds, limit)?;
        Ok((reply.payload, reply.descriptors))
    }

    fn wrong(&self, command: Command, reason: impl ToString) -> VfioUserError {
        self.link.wrong(&format!("{command:?}"), reason.to_string())
    }

    fn lacks(&self, reason: impl Into<String>) -> VfioUserError {
        VfioUserError::Lacks { peer: self.link.peer().into(), reason: reason.into() }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.close();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Serves what the device asks for, on one socket.
struct Attendant {
    link: Arc<Link>,
    maps: Maps,
    memory: Arc<dyn DmaHandler>,
}

impl Attendant {
    fn run(self) {
        loop {
            let (header, reply) = match self.link.command(None) {
                Ok(Some(Incoming::Command(message))) => {
                    (message.header, self.serve(message.header.command, &message.payload))
                }
                Ok(Some(Incoming::Oversized(header))) => (header, Err(Errno::INVAL)),
                Ok(None) => continue,
                // Whoever has a request out is told, too.
                Err(_) => break,
            };
            if header.flags & flags::NO_REPLY != 0 {
                continue;
            }
            let answer = Header { flags: flags::REPLY, error: 0, ..header };
            let sent = match reply {
                Ok(payload) => self.link.send(answer, &payload, &[]),
                Err(errno) => {
                    let error = errno.raw_os_error() as u32;
                    self.link.send(Header { flags: flags::REPLY | flags::ERROR, error, ..answer }, &[], &[])
                }
            };
            if let Err(error) = sent {
                tracing::warn!("answering a device: {error}");
                self.link.close();
                break;
            }
        }
    }

    fn serve(&self, command: u16, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let write = match Command::try_from(command) {
            Ok(Command::DmaRead) => false,
            Ok(Command::DmaWrite) => true,
            _ => return Err(Errno::NOSYS),
        };
        let (access, data) = DmaAccess::decode(payload).map_err(|_| Errno::INVAL)?;
        let count = usize::try_from(access.count).ok().filter(|count| *count <= DEFAULT_TRANSFER);
        let count = count.ok_or(Errno::INVAL)?;
        if data.len() != if write { count } else { 0 } {
            return Err(Errno::INVAL);
        }
        self.allowed(&access, write)?;
        if write {
            self.memory.write(access.address, data)?;
            // 16 bytes: libvfio-user does not take the 12 of the specification's table.
            return Ok(access.encode(&[]));
        }
        let mut reply = access.encode(&vec![0; count]);
        self.memory.read(access.address, &mut reply[DmaAccess::SIZE..])?;
        Ok(reply)
    }

    /// Whether all of it lies in maps that allow it.
    fn allowed(&self, access: &DmaAccess, write: bool) -> Result<(), Errno> {
        let end = access.address.checked_add(access.count).ok_or(Errno::INVAL)?;
        let maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = access.address;
        while at < end {
            match maps.range(..=at).next_back() {
                Some((start, map)) if at - start < map.size => {
                    if !(if write { map.writable } else { map.readable }) {
                        return Err(Errno::ACCESS);
                    }
                    at = start + map.size;
                }
                _ => return Err(Errno::FAULT),
            }
        }
        Ok(())
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }
}

/// Every request, one after the other; that some fail does not matter. For what the other side may answer: tests and fuzzing.
pub fn ask_everything(stream: UnixStream, limit: Duration) -> Result<(), VfioUserError> {
    let options = Options { limit, slow_limit: limit, ..Options::default() };
    let client = Client::over(stream, "a server", options, Arc::new(NoMemory))?;
    let _ = client.info();
    let _ = client.region_info(0);
    let _ = client.region_io_fds(0);
    let _ = client.irq_info(2);
    let _ = client.dma_map(0x1000, 0x1000, None, true, true);
    let _ = client.read(0, 0, &mut [0; 8]);
    let _ = client.write(0, 0, &[0; 8]);
    let _ = client.write_multi(&[(0, 0, &[1, 2])]);
    let _ = client.set_triggers(2, 0, &[client.as_fd()]);
    let _ = client.clear_triggers(2, 0, 1);
    let _ = client.migration();
    let _ = client.state();
    let _ = client.estimate();
    let _ = client.start_logging(4096, &[(0, 4096)]);
    let _ = client.read_log(0, 1 << 20, 4096);
    let _ = client.stop_logging();
    let _ = client.read_data(4096);
    let _ = client.write_data(&[1; 64]);
    let _ = client.reset();
    client.dma_unmap(0x1000, 0x1000)
}
