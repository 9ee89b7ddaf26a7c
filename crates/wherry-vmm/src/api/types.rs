//! What goes over the API as JSON. `docs/openapi.json` describes the same types; a test compares the two.
//!
//! Requests refuse fields they do not know: a misspelt limit must not be an ignored limit.

use serde::{Deserialize, Serialize};
use wherry_migration::progress::Job;

/// Where a Wherry process and its VM stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// Being built and booted.
    Created,
    /// The vCPUs run, here.
    Running,
    /// The user has paused it, here.
    Paused,
    /// On its way out; until the switchover it runs here.
    Migrating,
    /// No VM yet: waiting for one to arrive.
    Listening,
    /// One is arriving.
    Receiving,
    /// A new process is about to take it over; until the switchover it runs here.
    Updating,
    /// A new process has taken it over.
    Updated,
    /// It has left; the peer of the last job has it.
    Moved,
    /// It was given away and nobody knows whether it was taken. Nothing runs here.
    InDoubt,
    /// The guest has powered off, or the VM was stopped.
    Stopped,
    /// The VM died of an error.
    Crashed,
}

impl VmState {
    /// The word used in JSON and in messages.
    pub fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Migrating => "migrating",
            Self::Listening => "listening",
            Self::Receiving => "receiving",
            Self::Updating => "updating",
            Self::Updated => "updated",
            Self::Moved => "moved",
            Self::InDoubt => "in-doubt",
            Self::Stopped => "stopped",
            Self::Crashed => "crashed",
        }
    }
}

impl std::fmt::Display for VmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.word())
    }
}

/// One block of guest RAM in this process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamBlock {
    /// Number of the block.
    pub id: u32,
    /// Guest physical base address.
    pub guest_base: u64,
    /// Size in bytes.
    pub size: u64,
    /// Page size in bytes.
    pub page_size: u64,
    /// Number of its memfd in the process `pid`: `/proc/PID/fd/FD` opens it.
    pub fd: i32,
}

/// The facts of a VM that do not change while it lives.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hardware {
    /// Identity of the VM: 32 hexadecimal digits, the same on every host it moves to.
    pub id: String,
    /// Name given by the user.
    pub name: String,
    /// Number of vCPUs.
    pub cpus: u32,
    /// CPU model.
    pub cpu_model: String,
    /// RAM in bytes.
    pub memory: u64,
    /// Blocks of RAM.
    pub blocks: Vec<RamBlock>,
}

/// Answer of `GET /vm`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmInfo {
    /// Where it stands.
    pub state: VmState,
    /// Why it stands there, if there is something to say.
    pub reason: Option<String>,
    /// The VM; absent while none has arrived.
    pub vm: Option<Hardware>,
    /// Where the process waits for a VM, if it does.
    pub listen: Option<String>,
    /// Process id of this VMM.
    pub pid: u32,
    /// Version of this VMM.
    pub version: String,
}

/// How memory is carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// All of it before the switchover.
    Precopy,
    /// The switchover first; memory follows while the guest runs at the destination.
    Postcopy,
    /// Precopy, and postcopy if it does not converge; just precopy if the destination cannot do more.
    #[default]
    Hybrid,
}

/// Body of `PUT /migration`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrationRequest {
    /// `tcp:HOST:PORT` or `unix:PATH`.
    pub to: String,
    /// How memory is carried.
    #[serde(default)]
    pub mode: Mode,
    /// Number of data channels; absent: chosen from the cores of both hosts.
    #[serde(default)]
    pub channels: Option<u32>,
    /// Blackout to stay below, in milliseconds; absent: the engine's default.
    #[serde(default)]
    pub downtime_limit_ms: Option<u64>,
    /// Most bytes per second on the wire; absent: no limit.
    #[serde(default)]
    pub bandwidth: Option<u64>,
    /// Seconds after which precopy that has not converged is given up; absent: the engine's default.
    #[serde(default)]
    pub timeout_s: Option<u64>,
    /// Whether to hash all RAM and state at the stop and before the start, and to refuse to run on a difference.
    #[serde(default)]
    pub verify: bool,
    /// Postcopy: whether to free memory here as it is sent. A link that is lost then cannot be taken up.
    #[serde(default)]
    pub release: bool,
}

/// Body of `PUT /migration/recover`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecoverRequest {
    /// At the source: the address of the destination from now on; absent: the one it had.
    #[serde(default)]
    pub to: Option<String>,
    /// At the destination: where to wait for the source from now on.
    #[serde(default)]
    pub listen: Option<String>,
}

/// Body of `PUT /balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonRequest {
    /// RAM that the guest is to be left with, in bytes: a multiple of 4096, at most its RAM. It puts the rest into the
    /// balloon in its own time, and as far as it can.
    pub size: u64,
}

/// Answer of `GET /balloon` and `PUT /balloon`. All in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonInfo {
    /// RAM of the VM.
    pub memory: u64,
    /// RAM that the guest is to be left with.
    pub size: u64,
    /// RAM that the guest is left with.
    pub actual: u64,
    /// What the guest has last told of its memory.
    pub statistics: GuestStatistics,
}

/// What a guest tells of its memory, since it was started; `null` if it did not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStatistics {
    /// Bytes swapped in.
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    pub swap_out: Option<u64>,
    /// Major faults.
    pub major_faults: Option<u64>,
    /// Minor faults.
    pub minor_faults: Option<u64>,
    /// Bytes that nobody uses.
    pub free: Option<u64>,
    /// Bytes in all.
    pub total: Option<u64>,
    /// Bytes that could be had without swapping.
    pub available: Option<u64>,
    /// Bytes of caches that could be had without I/O.
    pub caches: Option<u64>,
}

/// Where a device stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// The guest has it.
    Present,
    /// The guest was asked to let it go, and somebody waits for that.
    Unplugging,
    /// The guest has let it go; it is being taken away, at the latest when a migration under way is over.
    Ejected,
}

/// A device on the PCI bus of the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Tells it from all others that this process has had: another number with the same name is another device.
    pub number: u64,
    /// What it is called, such as `vfio-user0`; it keeps the name when the VM moves.
    pub name: String,
    /// What it is: `disk`, `net`, `console`, `rng`, `balloon`, `vhost-user`, `vfio-user` or `vfio`.
    pub kind: String,
    /// Where it is on PCI bus 0, such as `00:03.0`.
    pub address: String,
    /// What it is connected to on this host; empty if to nothing.
    pub connected_to: String,
    /// Where it stands.
    pub state: DeviceState,
    /// Whether it can be unplugged.
    pub removable: bool,
}

/// Body of `PUT /vm/update`, all of it optional.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpdateRequest {
    /// The program that is to go on, as a path of the VMM's host; without, what is now at the path of the running one.
    pub binary: Option<String>,
    /// In which process it goes on.
    #[serde(default)]
    pub mode: UpdateMode,
}

/// In which process a new program goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UpdateMode {
    /// In a new one, which is ready before the guest stops.
    #[default]
    Transfer,
    /// In the same one, when another one has proven that it can.
    Exec,
}

/// Answer of `PUT /vm/update`: a new process has the VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UpdateInfo {
    /// The new process.
    pub pid: u32,
    /// How it went.
    pub job: Job,
}

/// Body of `PUT /devices/add`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceAddRequest {
    /// The device as on the command line: `vfio-user=SOCKET` or `vfio=ADDRESS`.
    pub device: String,
}

/// Body of `PUT /devices/remove`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceRemoveRequest {
    /// What the device is called.
    pub name: String,
    /// Seconds that the guest has to let it go, 1 to 600; absent: 30.
    #[serde(default)]
    pub timeout_s: Option<u64>,
}

/// What has become of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceChange {
    /// It is there.
    Added,
    /// The guest was asked to let it go.
    Unplugging,
    /// The guest was asked, and did not let it go in time: it stays.
    Stays,
    /// The guest has let it go; it waits to be taken away.
    Ejected,
    /// It is gone.
    Removed,
}

/// Event `device` of `GET /events`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceEvent {
    /// What has become of it.
    pub change: DeviceChange,
    /// The device, as it stands or as it was.
    pub device: DeviceInfo,
}

/// Body of `PUT /vm/stop`; may be absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// End the process also when what it holds may be the only copy of a VM, or memory that one elsewhere still needs.
    #[serde(default)]
    pub force: bool,
}

/// Body of `PUT /migration/resolve`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResolveRequest {
    /// Who owns the VM from now on. The other end must be fenced or dead.
    #[serde(rename = "as")]
    pub side: wherry_migration::Side,
}

/// Answer of `GET /ping`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ping {
    /// Always `wherry`.
    pub program: String,
    /// Version of this VMM.
    pub version: String,
    /// Process id of this VMM.
    pub pid: u32,
}

/// Body of every answer that is not 2xx.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorInfo,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorInfo {
    /// One of [`ErrorCode`]'s words.
    pub code: ErrorCode,
    /// What was being done, to what, and what to try.
    pub message: String,
}

/// Kinds of errors, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The body is not the JSON this call takes, or a value in it is out of range. 400.
    BadRequest,
    /// There is no such path, or no device of that name. 404.
    NotFound,
    /// The path does not know this method. 405.
    MethodNotAllowed,
    /// The VM is not in a state in which this can be done. 409.
    WrongState,
    /// The body is larger than the server reads. 413.
    TooLarge,
    /// It was not done by the deadline; it may still happen. 504.
    Deadline,
    /// The VMM could not do it. 500.
    Failed,
}

/// Event `phase` of `GET /events`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseEvent {
    /// Where the VM stands.
    pub state: VmState,
    /// Where its last journey stands.
    pub phase: wherry_migration::progress::Phase,
    /// Attempt id of that journey.
    pub attempt: String,
    /// Why, if there is something to say.
    pub reason: Option<String>,
}
