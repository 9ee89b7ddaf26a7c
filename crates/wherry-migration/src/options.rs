//! What the caller of [`send`](crate::source::send) and [`receive`](crate::destination::receive) may choose, and the
//! defaults.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// No journey uses more data channels.
pub const MAX_CHANNELS: u16 = 16;

/// How memory follows the VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Memory first, then the switch.
    Precopy,
    /// The switch first; memory follows while the VM runs at the destination.
    Postcopy,
    /// Precopy, and postcopy if it does not converge or is asked for; just precopy if the destination cannot do more.
    #[default]
    Hybrid,
}

impl Mode {
    /// Whether pages may follow the switch.
    pub fn may_follow(self) -> bool {
        self != Mode::Precopy
    }

    /// The word for it on the command line and in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Mode::Precopy => "precopy",
            Mode::Postcopy => "postcopy",
            Mode::Hybrid => "hybrid",
        }
    }
}

/// What happens when the guest wrote more than twice what was predicted between the decision to stop it and the stop,
/// and the blackout would exceed the limit, for the fourth time. (The first three times it goes on running and another
/// round follows.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Surprise {
    /// Take the longer blackout.
    #[default]
    Accept,
    /// Give up; the VM runs on at the source.
    Fail,
}

/// How long each kind of wait may last. A wait that ends so is an error that says what was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For one connection to be made.
    pub connect: Duration,
    /// For the destination to build the machine.
    pub build: Duration,
    /// Without a byte moved in either direction, or for an answer that takes no work. In the blackout the guest stands
    /// still that long when a peer falls silent.
    pub silent: Duration,
    /// For I/O to drain, before the blackout.
    pub drain: Duration,
    /// For all sharers to come to rest.
    pub stop: Duration,
    /// For the destination to load the state (with `verify`: to hash the memory as well).
    pub load: Duration,
    /// For the source to hear that the VM runs. When it has passed, the source is in doubt and asks again.
    pub running: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            build: Duration::from_secs(60),
            silent: Duration::from_secs(10),
            drain: Duration::from_secs(5),
            stop: Duration::from_secs(5),
            load: Duration::from_secs(30),
            running: Duration::from_secs(10),
        }
    }
}

/// What the source may choose.
#[derive(Clone, Debug)]
pub struct SourceOptions {
    /// Data channels, 1 to [`MAX_CHANNELS`]. `None`: chosen from the number of cores.
    pub channels: Option<u16>,
    /// The guest is stopped when the blackout that is predicted fits this limit. The default is 5 ms: what the network
    /// and the guest's users hardly notice, and reached on any link that carries a few times what the guest dirties.
    /// Rounds that promise a much shorter blackout at little cost are made even when the limit is met.
    pub downtime_limit: Duration,
    /// Bytes per second over all data channels together while the guest runs; `None` for no limit. The last pages, in
    /// the blackout, are not held back.
    pub bandwidth: Option<u64>,
    /// How memory follows.
    pub mode: Mode,
    /// Postcopy: free memory here as it is sent. A link that is lost then cannot be taken up, and the VM is lost with it.
    pub release: bool,
    /// Hash all RAM and state at the stop and before the start, and refuse to run on a difference. Takes its time in
    /// the blackout: about 0.1 s for each GiB in use.
    pub verify: bool,
    /// A precopy that has not converged by then fails, and the VM runs on at the source; a hybrid switches. Default 15
    /// minutes.
    pub deadline: Duration,
    /// Slow the vCPUs down step by step when precopy does not converge. Default true.
    pub auto_converge: bool,
    /// What to do when the guest keeps dirtying more at the stop than predicted.
    pub surprise: Surprise,
    /// Directory of the ownership records; must be on tmpfs, so that writing one never waits for a disk.
    pub records: PathBuf,
    /// Longest waits.
    pub timeouts: Timeouts,
    /// How long a source in doubt asks on before it returns [`InDoubt`](crate::JourneyError::InDoubt); `None`: until
    /// it is answered or resolved.
    pub doubt: Option<Duration>,
    /// How long a source tries to take up a link that was lost while memory follows, before it returns
    /// [`Paused`](crate::JourneyError::Paused); `None`: until it succeeds.
    pub recover: Option<Duration>,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self {
            channels: None,
            downtime_limit: Duration::from_millis(5),
            bandwidth: None,
            mode: Mode::default(),
            release: false,
            verify: false,
            deadline: Duration::from_secs(15 * 60),
            auto_converge: true,
            surprise: Surprise::Accept,
            records: default_records(),
            timeouts: Timeouts::default(),
            doubt: None,
            recover: None,
        }
    }
}

/// What the destination may choose.
#[derive(Clone, Debug)]
pub struct DestinationOptions {
    /// Most RAM it takes, in bytes; `None`: whatever the builder can make.
    pub memory_limit: Option<u64>,
    /// Directory of the ownership records; must be on tmpfs.
    pub records: PathBuf,
    /// Longest waits.
    pub timeouts: Timeouts,
    /// How long to wait for a source to come; `None`: for ever (until cancelled).
    pub wait_for_source: Option<Duration>,
    /// How long a destination that was ready and lost its source keeps the state before it returns
    /// [`InDoubt`](crate::JourneyError::InDoubt); `None`: until the source comes back or it is resolved.
    pub doubt: Option<Duration>,
    /// How long a destination that lacks pages waits for a source that it has lost, before it gives the VM up and returns
    /// [`Paused`](crate::JourneyError::Paused); `None`: until it comes.
    pub recover: Option<Duration>,
}

impl Default for DestinationOptions {
    fn default() -> Self {
        Self {
            memory_limit: None,
            records: default_records(),
            timeouts: Timeouts::default(),
            wait_for_source: None,
            doubt: None,
            recover: None,
        }
    }
}

/// Where ownership records are kept unless told otherwise: in `WHERRY_RECORDS`; else for root in `/run/wherry`, for
/// others in `wherry` in the user's runtime directory. Where that is on no tmpfs (in many containers `/run` is on disk),
/// in `/dev/shm`: a disk that has to be waited for would make the blackout longer by milliseconds, and records must not
/// outlive a reboot, which no VM does.
pub fn default_records() -> PathBuf {
    if let Some(dir) = std::env::var_os("WHERRY_RECORDS") {
        return dir.into();
    }
    let user = rustix::process::geteuid();
    let runtime = match std::env::var_os("XDG_RUNTIME_DIR") {
        _ if user.is_root() => Some(PathBuf::from("/run")),
        Some(dir) => Some(dir.into()),
        None => None,
    };
    match runtime.filter(|dir| is_tmpfs(dir)) {
        Some(dir) => dir.join("wherry"),
        None if user.is_root() => "/dev/shm/wherry".into(),
        None => format!("/dev/shm/wherry-{}", user.as_raw()).into(),
    }
}

fn is_tmpfs(dir: &std::path::Path) -> bool {
    /// `TMPFS_MAGIC` and `RAMFS_MAGIC` of linux/magic.h.
    const IN_MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6];
    rustix::fs::statfs(dir).is_ok_and(|fs| IN_MEMORY.contains(&fs.f_type))
}
