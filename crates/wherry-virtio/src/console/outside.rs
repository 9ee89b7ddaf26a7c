//! The other end of a console: what of this host its bytes go to and come from.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::pty::OpenptFlags;
use wherry_handover::{KeptId, Registry, RegistryError};
use wherry_socket::{SocketError, SocketFile};

/// What a console is to be connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleTarget {
    /// A UNIX socket to be made and listened on, for one client at a time.
    Socket(PathBuf),
    /// A pseudo-terminal to be made, with a symbolic link to it.
    Pty(PathBuf),
    /// A file that output is appended to.
    File(PathBuf),
}

/// The other end of a console cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum OutsideError {
    /// The socket cannot be listened on.
    #[error("console: {0}; it may be that of a VM that runs")]
    Socket(#[from] SocketError),
    /// Somebody else has the pseudo-terminal.
    #[error("console at {}: another process has it; it may be that of a VM that runs", .0.display())]
    InUse(PathBuf),
    /// There is something else where the link would be.
    #[error("console at {}: there is something already that is no symbolic link; it is not replaced", .0.display())]
    NoLink(PathBuf),
    /// A descriptor that was to be kept over an update.
    #[error("console: {0}")]
    Kept(#[from] RegistryError),
    /// Anything else.
    #[error("console at {}: {what}: {source}", .path.display())]
    Io {
        /// Where it is.
        path: PathBuf,
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// The other end of a console, opened. No read or write waits.
#[derive(Debug)]
pub struct Outside {
    pub(super) end: End,
    path: PathBuf,
    removed: AtomicBool,
    registry: Arc<Registry>,
    /// The client that the predecessor of this process had.
    client: Mutex<Option<Arc<UnixStream>>>,
}

#[derive(Debug)]
pub(super) enum End {
    Socket(Arc<UnixListener>, SocketFile),
    /// The master. The terminal itself is held open, or the master would report its end whenever nobody has it open.
    Pty {
        master: Arc<OwnedFd>,
        _terminal: Arc<OwnedFd>,
        name: PathBuf,
    },
    File(Arc<File>),
}

/// What is kept over an update.
const LISTENER: &str = "console/listener";
const CLIENT: &str = "console/client";
const MASTER: &str = "console/master";
const TERMINAL: &str = "console/terminal";
const OUTPUT: &str = "console/output";

impl Outside {
    /// Makes it, or opens it, or takes what the predecessor of this process has made.
    pub fn open(target: &ConsoleTarget, registry: &Arc<Registry>) -> Result<Self, OutsideError> {
        let id = |name| KeptId::new(name, 0);
        let inherited = |name| registry.inherit(&id(name));
        let mut client = None;
        let (end, path) = match target {
            ConsoleTarget::Socket(path) => {
                let (listener, file) = match registry.succeeds() {
                    true => (UnixListener::from(inherited(LISTENER)?), SocketFile::adopt(path)?),
                    false => SocketFile::bind(path)?,
                };
                listener.set_nonblocking(true).map_err(failed(path, "listening"))?;
                let came = registry.claim(&id(CLIENT)).map(UnixStream::from);
                client = came.map(|stream| registry.add(id(CLIENT), stream)).transpose()?;
                (End::Socket(registry.add(id(LISTENER), listener)?, file), path)
            }
            ConsoleTarget::Pty(path) => {
                let (master, terminal, name) = match registry.succeeds() {
                    true => {
                        let master = inherited(MASTER)?;
                        let name = name_of(&master).map_err(failed(path, "finding its pseudo-terminal"))?;
                        (master, inherited(TERMINAL)?, name)
                    }
                    false => pty(path)?,
                };
                let (master, _terminal) = (registry.add(id(MASTER), master)?, registry.add(id(TERMINAL), terminal)?);
                (End::Pty { master, _terminal, name }, path)
            }
            ConsoleTarget::File(path) => {
                // What another VM, or this one elsewhere, has written before stays. A pipe that nobody reads is refused by
                // the kernel, and does not hold us up.
                let open = || {
                    let mut options = File::options();
                    options.append(true).create(true).custom_flags(libc::O_NONBLOCK);
                    options.open(path).map_err(failed(path, "opening it"))
                };
                (End::File(registry.obtain::<_, OutsideError>(id(OUTPUT), |fd| Ok(fd.into()), open)?), path)
            }
        };
        let (registry, client) = (registry.clone(), Mutex::new(client));
        Ok(Self { end, path: path.clone(), removed: AtomicBool::new(false), registry, client })
    }

    /// The predecessor still has it: nothing is read, written or accepted yet.
    pub(super) fn is_elsewhere(&self) -> bool {
        self.registry.succeeds()
    }

    /// The client that there was before this process.
    pub(super) fn take_client(&self) -> Option<Arc<UnixStream>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// A client that has come; it goes over in an update. There is no other one.
    pub(super) fn admit(&self, stream: UnixStream) -> Result<Arc<UnixStream>, RegistryError> {
        self.registry.add(KeptId::new(CLIENT, 0), stream)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes what was made at the path, so that nobody new comes. Done at the end at the latest.
    pub fn remove(&self) {
        let ours = match &self.end {
            End::Socket(_, file) => return file.remove(),
            // The link is still the predecessor's.
            End::Pty { .. } if self.registry.succeeds() => false,
            End::Pty { name, .. } => std::fs::read_link(&self.path).is_ok_and(|to| to == *name),
            End::File(_) => false,
        };
        if ours && !self.removed.swap(true, Ordering::AcqRel) {
            // If it is gone already, somebody else tidied up.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        self.remove();
    }
}

fn failed<E: Into<io::Error>>(path: &Path, what: &'static str) -> impl FnOnce(E) -> OutsideError {
    move |source| OutsideError::Io { path: path.into(), what, source: source.into() }
}

fn name_of(master: &OwnedFd) -> Result<PathBuf, rustix::io::Errno> {
    let name = rustix::pty::ptsname(master, Vec::new())?;
    Ok(PathBuf::from(String::from_utf8_lossy(name.as_bytes()).into_owned()))
}

/// Makes a pseudo-terminal in raw mode (master, terminal and its name), and a link to it over one that leads nowhere any more.
fn pty(link: &Path) -> Result<(OwnedFd, OwnedFd, PathBuf), OutsideError> {
    const MAKING: &str = "making a pseudo-terminal";
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags).map_err(failed(link, MAKING))?;
    rustix::pty::grantpt(&master).map_err(failed(link, MAKING))?;
    rustix::pty::unlockpt(&master).map_err(failed(link, MAKING))?;
    rustix::io::ioctl_fionbio(&master, true).map_err(failed(link, MAKING))?;
    let name = name_of(&master).map_err(failed(link, MAKING))?;
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_NOCTTY);
    let terminal = OwnedFd::from(options.open(&name).map_err(failed(link, MAKING))?);
    let mut modes = rustix::termios::tcgetattr(&terminal).map_err(failed(link, MAKING))?;
    modes.make_raw();
    rustix::termios::tcsetattr(&terminal, rustix::termios::OptionalActions::Now, &modes)
        .map_err(failed(link, MAKING))?;
    match std::fs::symlink_metadata(link) {
        Ok(there) if !there.is_symlink() => return Err(OutsideError::NoLink(link.into())),
        // Its terminal is that of a process that lives.
        Ok(_) if link.exists() => return Err(OutsideError::InUse(link.into())),
        Ok(_) => std::fs::remove_file(link).map_err(failed(link, "removing a link that leads nowhere"))?,
        Err(_) => {}
    }
    std::os::unix::fs::symlink(&name, link).map_err(failed(link, "making the link"))?;
    Ok((master, terminal, name))
}
