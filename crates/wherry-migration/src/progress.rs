//! What the engine tells: the job while it runs, and the report at its end.
//!
//! Names are libvirt's (`virDomainGetJobStats`) where libvirt has one. Bytes are bytes, times are as their suffix says.

use serde::{Deserialize, Serialize};

/// Where a journey stands. The same words at both ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// No journey.
    #[default]
    None,
    /// Connecting, agreeing, building the destination.
    Setup,
    /// Copying memory while the guest runs at the source.
    Precopy,
    /// The guest is stopped; the last pages and the state are on their way.
    Switchover,
    /// The guest runs at the destination and memory follows.
    Postcopy,
    /// Postcopy has lost its link; recoverable.
    Paused,
    /// The source has given the VM away and does not know whether it was taken.
    InDoubt,
    /// The VM runs at the destination.
    Done,
    /// Cancelled; the VM runs at the source.
    Cancelled,
    /// Failed; the VM runs at the source.
    Failed,
}

/// One round of precopy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// From 1.
    pub number: u32,
    /// Pages to send in it.
    pub pages: u64,
    /// Of these, found to be zero.
    pub zero_pages: u64,
    /// Of these, left out because the guest does not use them.
    pub free_pages: u64,
    /// Bytes on the wire.
    pub bytes: u64,
    /// How long it took, from its first page to the last acknowledgement.
    pub duration_us: u64,
    /// Pages per second that were dirtied while it ran.
    pub dirty_rate: u64,
    /// Blackout that was predicted at its end.
    pub predicted_downtime_us: u64,
    /// vCPU throttle in percent while it ran.
    pub throttle: u8,
}

/// Parts of the blackout, in microseconds. They follow each other; at the destination `load` and `start` are its own
/// measurements, reported with `Ready` and `Running`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blackout {
    /// Until all sharers were at rest.
    pub stop_us: u64,
    /// Last dirty logs read and last pages sent and acknowledged.
    pub last_pages_us: u64,
    /// Saving the state.
    pub state_us: u64,
    /// On the wire and waiting for the peer: all that is in none of the others.
    pub network_us: u64,
    /// Loading the state.
    pub load_us: u64,
    /// Starting.
    pub start_us: u64,
    /// From the first vCPU told to stop to the news that the VM runs.
    pub total_us: u64,
}

/// What a device with a state of its own took of the blackout, in microseconds. Devices stop, save, load and start side by side.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// What it is called, such as `vfio-user:/run/device.sock`.
    pub name: String,
    /// Its state unit.
    pub unit: String,
    /// Until it was at rest.
    pub stop_us: u64,
    /// Giving what was left of its state.
    pub save_us: u64,
    /// At the destination: from the end of its state to being loaded.
    pub load_us: u64,
    /// At the destination: until it ran.
    pub start_us: u64,
    /// Bytes of its state that went while the guest ran.
    pub early_bytes: u64,
    /// All bytes of its state.
    pub bytes: u64,
}

/// Latencies of one kind, in microseconds; each is at most 1/16 above the true one, and no larger than the largest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// Half of them took no longer.
    pub p50_us: u64,
    /// 99 of 100 took no longer.
    pub p99_us: u64,
    /// The longest.
    pub max_us: u64,
}

/// Page faults of one kind of threads, and how long their pages took, from the fault being read to its page being visible.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Faults {
    /// Page faults that were read.
    pub faults: u64,
    /// Of those whose page had not come: half of them took no longer.
    pub p50_us: u64,
    /// 99 of 100 took no longer.
    pub p99_us: u64,
    /// The longest.
    pub max_us: u64,
}

/// Page faults of one vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuFaults {
    /// Number of the vCPU.
    pub index: u32,
    /// Its faults.
    #[serde(flatten)]
    pub faults: Faults,
}

/// Page faults that workers of the kernel took for vCPUs, which did something else meanwhile or slept (asynchronous page
/// faults of KVM).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerFaults {
    /// How many workers were seen.
    pub workers: u64,
    /// Their faults.
    #[serde(flatten)]
    pub faults: Faults,
}

/// Page faults of another process that shares the memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFaults {
    /// Name of the sharer.
    pub name: String,
    /// Its faults.
    #[serde(flatten)]
    pub faults: Faults,
    /// Why it is served no longer.
    pub quarantined: Option<String>,
}

/// How it is while memory follows, and how it was. The destination measures; the source knows what it sends, and the rest
/// when all is over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Postcopy {
    /// Since the start of the guest at the destination, until all of its memory was there.
    pub duration_us: u64,
    /// Pages that are still to come; at the source, to be sent.
    pub remaining_pages: u64,
    /// Their bytes.
    pub remaining_bytes: u64,
    /// Page faults of the guest that were read.
    pub faults: u64,
    /// Of these, on pages that had come before, and only had to be made visible. Not in the latencies.
    pub local: u64,
    /// Requests: messages that ask for pages.
    pub requests: u64,
    /// Pages in them.
    pub pages_asked: u64,
    /// Pages that were sent in answer; at the destination, that came so. What the push was faster with comes twice.
    pub pages_answered: u64,
    /// Pages asked for because they lie behind one that was touched in a walk through memory.
    pub prefetched: u64,
    /// Of these, how many were touched before they were there. A page counts once; one that has come never faults.
    pub prefetch_hits: u64,
    /// From reading a fault to its page being visible: half of them took no longer. At most 1/16 above the true one.
    pub fault_p50_us: u64,
    /// 99 of 100 took no longer.
    pub fault_p99_us: u64,
    /// The longest.
    pub fault_max_us: u64,
    /// First part of that: from reading the fault to handing over the request.
    pub queue: Latency,
    /// Second part: until the bytes are there.
    pub wire: Latency,
    /// Third part: until the page is visible and who waits is woken.
    pub placement: Latency,
    /// Each vCPU.
    pub vcpus: Vec<VcpuFaults>,
    /// Workers of the kernel.
    pub kernel_workers: WorkerFaults,
    /// Other threads of the VMM: loading state, devices.
    pub other_threads: Faults,
    /// Other processes that share the memory.
    pub sources: Vec<SourceFaults>,
    /// The longest that a vCPU itself waited for a page.
    pub largest_stall_us: u64,
}

/// A journey as it stands, and as it ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Where it stands.
    pub phase: Phase,
    /// `source` or `destination`.
    pub role: String,
    /// `precopy`, `postcopy` or `hybrid`; `update`: to a new process that keeps the memory.
    pub mode: String,
    /// Attempt id, in hexadecimal.
    pub attempt: String,
    /// The other end.
    pub peer: String,
    /// Since the start of the journey.
    pub time_elapsed_us: u64,
    /// Until the first page: connecting, agreeing, building.
    pub setup_time_us: u64,
    /// Bytes that had to be moved, everything counted.
    pub data_total: u64,
    /// Bytes moved.
    pub data_processed: u64,
    /// Bytes still to be moved.
    pub data_remaining: u64,
    /// RAM of the VM in bytes, without holes.
    pub memory_total: u64,
    /// Bytes of RAM content sent or received.
    pub memory_processed: u64,
    /// Bytes of RAM still to be sent in this round.
    pub memory_remaining: u64,
    /// Pages that were zero and went without content.
    pub memory_constant: u64,
    /// Pages sent with content.
    pub memory_normal: u64,
    /// Bytes of those.
    pub memory_normal_bytes: u64,
    /// Bytes per second the receiver has acknowledged lately.
    pub memory_bps: u64,
    /// Pages per second the guest dirties.
    pub memory_dirty_rate: u64,
    /// Bytes of a page.
    pub memory_page_size: u64,
    /// Number of the round, from 1.
    pub memory_iteration: u32,
    /// Pages asked for by the destination in postcopy.
    pub memory_postcopy_requests: u64,
    /// Blackout as predicted while running, as measured by the engine at the end.
    pub downtime_us: u64,
    /// Time the destination's devices lost before the blackout because I/O was drained.
    pub io_stall_us: u64,
    /// vCPU throttle in percent.
    pub auto_converge_throttle: u8,
    /// Data channels in use.
    pub channels: u32,
    /// Finished rounds.
    pub rounds: Vec<Round>,
    /// Parts of the blackout, when it is over.
    pub blackout: Option<Blackout>,
    /// What each device with a state of its own took of it.
    pub devices: Vec<Device>,
    /// How it is while memory follows, from the switch on, and how it was.
    pub postcopy: Option<Postcopy>,
    /// Why it failed, was cancelled or is in doubt.
    pub error: Option<String>,
}
