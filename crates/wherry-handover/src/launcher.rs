//! A small process that starts programs, for one that may not.
//!
//! A process that serves a hostile guest gives up what it does not need, and to start programs is the first of it. So it has a
//! launcher made before: the same program, which does nothing but wait at a socket for the order to start its owner's successor. It
//! ends when nobody holds the other end of that socket any more. A successor is given that end and can be replaced in its turn; what
//! it starts has the launcher's environment, working directory, limits, and control group.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prost::Message;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::channel::{Channel, ChannelError};

/// How long the launcher may take to answer.
const LIMIT: Duration = Duration::from_secs(10);

const LAUNCH: u16 = 1;
const STARTED: u16 = 2;
const FAILED: u16 = 3;
const ENDED: u16 = 4;

#[derive(Clone, PartialEq, Message)]
struct Launch {
    #[prost(uint64, tag = "1")]
    number: u64,
    #[prost(bytes = "vec", tag = "2")]
    program: Vec<u8>,
    #[prost(bytes = "vec", repeated, tag = "3")]
    arguments: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct Started {
    #[prost(uint64, tag = "1")]
    number: u64,
    #[prost(uint32, tag = "2")]
    pid: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Failed {
    #[prost(uint64, tag = "1")]
    number: u64,
    #[prost(string, tag = "2")]
    reason: String,
}

#[derive(Clone, PartialEq, Message)]
struct EndedMessage {
    #[prost(uint32, tag = "1")]
    pid: u32,
    /// As `wait` has it.
    #[prost(int32, tag = "2")]
    status: i32,
}

/// A program was not started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The launcher could not be made.
    #[error("making the launcher: {0}")]
    Make(io::Error),
    /// The launcher is gone, or does not answer.
    #[error("the launcher, which starts programs for this process: {0}")]
    Launcher(#[from] ChannelError),
    /// It answered nonsense.
    #[error("the launcher, which starts programs for this process, broke the protocol: {0}")]
    Protocol(String),
    /// The kernel does not start that program.
    #[error("starting {program}: {reason}")]
    Program {
        /// Which.
        program: String,
        /// Why not.
        reason: String,
    },
}

/// A program that was started.
#[derive(Debug)]
pub struct Launched {
    /// Its process.
    pub pid: u32,
    /// Readable when it has ended, and a proof of that.
    pub pidfd: OwnedFd,
}

/// How a program that was started has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Which.
    pub pid: u32,
    /// By itself or by a signal.
    pub status: ExitStatus,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} ended with {}", self.pid, self.status)
    }
}

struct Inner {
    channel: Channel,
    next: u64,
    ended: Vec<Ended>,
}

/// The launcher, as its owner sees it.
pub struct Launcher {
    inner: Mutex<Inner>,
}

impl std::fmt::Debug for Launcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Launcher").finish_non_exhaustive()
    }
}

impl Launcher {
    /// Has `command` run as the launcher: a program that calls [`serve`] with its standard input. The process is made now, and is a
    /// child of the caller.
    pub fn start(mut command: Command) -> Result<Self, LaunchError> {
        let (ours, theirs) = Channel::pair()?;
        let child = command.stdin(Stdio::from(OwnedFd::from(theirs))).spawn().map_err(LaunchError::Make)?;
        tracing::debug!(pid = child.id(), "the launcher");
        // It ends with the socket, and then nobody waits for it: the owner has ended.
        drop(child);
        Ok(Self::over(ours))
    }

    /// The launcher at the other end of a socket: one that the predecessor had.
    pub fn at(socket: OwnedFd) -> Result<Self, LaunchError> {
        Ok(Self::over(Channel::from_fd(socket)?))
    }

    fn over(channel: Channel) -> Self {
        Self { inner: Mutex::new(Inner { channel, next: 0, ended: Vec::new() }) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `with` with this end of the socket, for a successor.
    pub fn socket(&self) -> io::Result<OwnedFd> {
        self.lock().channel.as_fd().try_clone_to_owned()
    }

    /// Starts a program whose standard input is `input`; its output is the launcher's.
    pub fn launch(
        &self,
        program: &Path,
        arguments: &[OsString],
        input: BorrowedFd<'_>,
    ) -> Result<Launched, LaunchError> {
        let mut inner = self.lock();
        inner.next += 1;
        // The predecessor may have given up one of its own: numbers are told apart by who asks.
        let number = u64::from(std::process::id()) << 32 | inner.next;
        let launch = Launch {
            number,
            program: program.as_os_str().as_bytes().to_vec(),
            arguments: arguments.iter().map(|argument| argument.as_bytes().to_vec()).collect(),
        };
        let deadline = Instant::now() + LIMIT;
        inner.channel.send(LAUNCH, &launch.encode_to_vec(), &[input], deadline)?;
        let broken = |error: prost::DecodeError| LaunchError::Protocol(error.to_string());
        loop {
            let mut parcel = inner.channel.receive(deadline, Duration::ZERO)?;
            match parcel.tag {
                STARTED => {
                    let started = Started::decode(&parcel.body[..]).map_err(broken)?;
                    let pidfd = parcel.descriptors.pop();
                    let pidfd = pidfd.ok_or_else(|| LaunchError::Protocol("a process without a pidfd".into()))?;
                    if started.number == number {
                        return Ok(Launched { pid: started.pid, pidfd });
                    }
                }
                FAILED => {
                    let failed = Failed::decode(&parcel.body[..]).map_err(broken)?;
                    if failed.number == number {
                        let program = program.display().to_string();
                        return Err(LaunchError::Program { program, reason: failed.reason });
                    }
                }
                ENDED => inner.note(&parcel.body)?,
                tag => return Err(LaunchError::Protocol(format!("a parcel with tag {tag}"))),
            }
        }
    }

    /// How a process that was started has ended, waiting for that until the deadline.
    pub fn ended(&self, pid: u32, deadline: Instant) -> Option<Ended> {
        let mut inner = self.lock();
        loop {
            if let Some(at) = inner.ended.iter().position(|ended| ended.pid == pid) {
                return Some(inner.ended.swap_remove(at));
            }
            let parcel = inner.channel.receive(deadline, Duration::ZERO).ok()?;
            if parcel.tag == ENDED {
                inner.note(&parcel.body).ok()?;
            }
        }
    }
}

impl Inner {
    /// Nobody may ask for some of them.
    const MOST: usize = 16;

    fn note(&mut self, body: &[u8]) -> Result<(), LaunchError> {
        let ended = EndedMessage::decode(body).map_err(|error| LaunchError::Protocol(error.to_string()))?;
        if self.ended.len() == Self::MOST {
            self.ended.remove(0);
        }
        self.ended.push(Ended { pid: ended.pid, status: ExitStatus::from_raw(ended.status) });
        Ok(())
    }
}

/// The launcher itself: starts what it is told to, until nobody can tell it anything any more.
pub fn serve(socket: OwnedFd) -> Result<(), LaunchError> {
    let mut orders = Channel::from_fd(socket)?;
    let answers = orders.as_fd().try_clone_to_owned().map_err(LaunchError::Make)?;
    let answers = Arc::new(Mutex::new(Channel::from_fd(answers)?));
    // The far end of all time: it waits for as long as there is somebody.
    let never = Duration::from_secs(24 * 3600);
    loop {
        let parcel = match orders.receive(Instant::now() + never, Duration::ZERO) {
            Ok(parcel) => parcel,
            Err(ChannelError::Deadline(_)) => continue,
            Err(ChannelError::Closed) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let launch = match (parcel.tag, Launch::decode(&parcel.body[..])) {
            (LAUNCH, Ok(launch)) => launch,
            (tag, _) => return Err(LaunchError::Protocol(format!("an order with tag {tag}"))),
        };
        let number = launch.number;
        if let Err(reason) = start(launch, parcel.descriptors, &answers) {
            answer(&answers, FAILED, &Failed { number, reason }, &[]);
        }
    }
}

/// Whoever gave the order may be gone; then the answer is of no use.
fn answer(answers: &Mutex<Channel>, tag: u16, message: &impl Message, descriptors: &[BorrowedFd<'_>]) {
    let answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(error) = answers.send(tag, &message.encode_to_vec(), descriptors, Instant::now() + LIMIT) {
        tracing::warn!(%error, "answering whoever has programs started here");
    }
}

fn start(launch: Launch, mut input: Vec<OwnedFd>, answers: &Arc<Mutex<Channel>>) -> Result<(), String> {
    let input = match input.len() {
        1 => input.remove(0),
        other => return Err(format!("{other} descriptors for its standard input")),
    };
    let mut command = Command::new(OsString::from_vec(launch.program));
    command.args(launch.arguments.into_iter().map(OsString::from_vec)).stdin(Stdio::from(input));
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    drop(command);
    let pidfd = Pid::from_raw(child.id() as i32)
        .ok_or(rustix::io::Errno::SRCH)
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()));
    let pid = child.id();
    // It has not been waited for, so its number is its own.
    match &pidfd {
        Ok(pidfd) => answer(answers, STARTED, &Started { number: launch.number, pid }, &[pidfd.as_fd()]),
        Err(_) => drop(child.kill()),
    }
    let answers = answers.clone();
    let wait = move || {
        let status = child.wait().map_or(-1, ExitStatus::into_raw);
        answer(&answers, ENDED, &EndedMessage { pid, status }, &[]);
    };
    std::thread::Builder::new().name("wait".into()).spawn(wait).map_err(|error| error.to_string())?;
    pidfd.map(drop).map_err(|error| format!("opening its pidfd: {error}"))
}
