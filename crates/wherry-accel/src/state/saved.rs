//! What the unit `accel` saves.

use wherry_state::SavedState;

/// Schema 2.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedDevice {
    /// Device time, in nanoseconds. Times below are ages or distances from it.
    #[prost(uint64, tag = "1")]
    pub time: u64,
    /// The catalogue, in order: the destination must have the same.
    #[prost(message, repeated, tag = "2")]
    pub engines: Vec<SavedEngine>,
    /// Contexts that are open, or have work left.
    #[prost(message, repeated, tag = "3")]
    pub contexts: Vec<SavedContext>,
    /// Contexts that are gone, oldest first: their fences can be asked for.
    #[prost(message, repeated, tag = "4")]
    pub remembered: Vec<SavedContext>,
    /// Requests that are not signalled, by id.
    #[prost(message, repeated, tag = "5")]
    pub requests: Vec<SavedRequest>,
    /// Completion records that are not written yet, in their order.
    #[prost(message, repeated, tag = "6")]
    pub effects: Vec<SavedEffect>,
    /// Single timelines.
    #[prost(message, repeated, tag = "7")]
    pub singles: Vec<SavedSingle>,
    /// Keys, wrapped.
    #[prost(message, repeated, tag = "8")]
    pub keys: Vec<SavedKey>,
    /// How often each place for a context was used.
    #[prost(uint32, repeated, tag = "9")]
    pub generations: Vec<u32>,
    /// Next request id.
    #[prost(uint64, tag = "10")]
    pub next_request: u64,
    /// Next place among equals.
    #[prost(uint64, tag = "11")]
    pub next_order: u64,
    /// Next single timeline.
    #[prost(uint32, tag = "12")]
    pub next_single: u32,
    /// The device is lost.
    #[prost(bool, tag = "13")]
    pub lost: bool,
    /// Registers that clients have written.
    #[prost(message, optional, tag = "14")]
    pub registers: Option<SavedRegisters>,
}

impl SavedState for SavedDevice {
    /// 2: rings whose tail is in memory, which an older reader would never look at.
    const SCHEMA: u32 = 2;
}

/// An engine.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedEngine {
    /// Class.
    #[prost(uint32, tag = "1")]
    pub class: u32,
    /// Instance.
    #[prost(uint32, tag = "2")]
    pub instance: u32,
    /// Time slice, in nanoseconds.
    #[prost(uint64, tag = "3")]
    pub slice: u64,
    /// Pre-emption deadline, in nanoseconds.
    #[prost(uint64, tag = "4")]
    pub preempt_timeout: u64,
    /// Heartbeat, in nanoseconds.
    #[prost(uint64, tag = "5")]
    pub heartbeat: u64,
    /// How long it was occupied, in nanoseconds.
    #[prost(uint64, tag = "6")]
    pub busy: u64,
    /// How often it was reset.
    #[prost(uint64, tag = "7")]
    pub resets: u64,
}

/// A context.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedContext {
    /// Its number.
    #[prost(uint32, tag = "1")]
    pub id: u32,
    /// Flags of its creation.
    #[prost(uint32, tag = "2")]
    pub flags: u32,
    /// Priority.
    #[prost(sint32, tag = "3")]
    pub priority: i32,
    /// Its work outlives it.
    #[prost(bool, tag = "4")]
    pub persistent: bool,
    /// Address space.
    #[prost(uint32, tag = "5")]
    pub space: u32,
    /// The map was set.
    #[prost(bool, tag = "6")]
    pub mapped: bool,
    /// The map is frozen.
    #[prost(bool, tag = "7")]
    pub used: bool,
    /// Its slots.
    #[prost(message, repeated, tag = "8")]
    pub slots: Vec<SavedSlot>,
    /// Its single timeline, if it has one.
    #[prost(uint32, optional, tag = "9")]
    pub single: Option<u32>,
    /// Shares of engines.
    #[prost(message, repeated, tag = "10")]
    pub shares: Vec<SavedShare>,
    /// Ages of its hangs, in nanoseconds, oldest first.
    #[prost(uint64, repeated, tag = "11")]
    pub hang_ages: Vec<u64>,
    /// It is banned.
    #[prost(bool, tag = "12")]
    pub banned: bool,
    /// It is destroyed.
    #[prost(bool, tag = "13")]
    pub closed: bool,
    /// The client's own timeline.
    #[prost(uint64, tag = "14")]
    pub client: u64,
}

/// A slot of a context.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedSlot {
    /// 0 gap, 1 physical, 2 balanced, 3 parallel.
    #[prost(uint32, tag = "1")]
    pub kind: u32,
    /// Its engines, by index in the catalogue.
    #[prost(bytes = "vec", tag = "2")]
    pub engines: Vec<u8>,
    /// Width, if it is parallel.
    #[prost(uint32, tag = "3")]
    pub width: u32,
    /// Bonds.
    #[prost(message, repeated, tag = "4")]
    pub bonds: Vec<SavedBond>,
    /// Points submitted.
    #[prost(uint64, tag = "5")]
    pub submitted: u64,
    /// Points signalled.
    #[prost(uint64, tag = "6")]
    pub completed: u64,
    /// The latest point that has started.
    #[prost(uint64, tag = "7")]
    pub started: u64,
    /// The engines it started on: one bit each.
    #[prost(uint64, tag = "8")]
    pub started_on: u64,
    /// Latest points that failed.
    #[prost(message, repeated, tag = "9")]
    pub errors: Vec<SavedError>,
    /// Time on engines, in nanoseconds.
    #[prost(uint64, tag = "10")]
    pub runtime: u64,
    /// The ring, if there is one.
    #[prost(message, optional, tag = "11")]
    pub ring: Option<SavedRing>,
    /// What has been written to the portal and is no whole descriptor.
    #[prost(bytes = "vec", tag = "12")]
    pub portal: Vec<u8>,
}

/// A bond.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedBond {
    /// The master's engine, by index.
    #[prost(uint32, tag = "1")]
    pub master: u32,
    /// Siblings, by index.
    #[prost(bytes = "vec", tag = "2")]
    pub engines: Vec<u8>,
}

/// A point that failed.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedError {
    /// The point.
    #[prost(uint64, tag = "1")]
    pub seq: u64,
    /// Error number.
    #[prost(uint32, tag = "2")]
    pub errno: u32,
}

/// A ring.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedRing {
    /// Address.
    #[prost(uint64, tag = "1")]
    pub base: u64,
    /// Descriptors it holds.
    #[prost(uint32, tag = "2")]
    pub entries: u32,
    /// Put in by the client.
    #[prost(uint32, tag = "3")]
    pub tail: u32,
    /// Taken.
    #[prost(uint32, tag = "4")]
    pub head: u32,
    /// Where the head is written.
    #[prost(uint64, tag = "5")]
    pub head_address: u64,
    /// Error number of the latest refusal.
    #[prost(uint32, tag = "6")]
    pub status: u32,
    /// Where the client writes the tail, and bit 0: it is polled there. Since schema 2.
    #[prost(uint64, tag = "7")]
    pub tail_address: u64,
}

/// A share.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedShare {
    /// Slot, or engine on a context without a map.
    #[prost(uint32, tag = "1")]
    pub index: u32,
    /// Percent.
    #[prost(uint32, tag = "2")]
    pub percent: u32,
}

/// A fence.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedFence {
    /// Context.
    #[prost(uint32, tag = "1")]
    pub context: u32,
    /// Slot.
    #[prost(uint32, tag = "2")]
    pub slot: u32,
    /// Point.
    #[prost(uint64, tag = "3")]
    pub seq: u64,
}

/// A request.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedRequest {
    /// Id.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Its fence: context, slot and point.
    #[prost(message, optional, tag = "2")]
    pub fence: Option<SavedFence>,
    /// Address space.
    #[prost(uint32, tag = "3")]
    pub space: u32,
    /// Priority.
    #[prost(sint32, tag = "4")]
    pub priority: i32,
    /// Who comes first among equals: 0, 1 it was running, on the only engine it can have, or on one of several; 2 virtual
    /// and has not run; 3 others.
    #[prost(uint32, tag = "5")]
    pub rank: u32,
    /// Place among equals.
    #[prost(uint64, tag = "6")]
    pub order: u64,
    /// It waits until this is signalled.
    #[prost(message, optional, tag = "7")]
    pub wait_signalled: Option<SavedFence>,
    /// It waits until this has started.
    #[prost(message, optional, tag = "8")]
    pub wait_started: Option<SavedFence>,
    /// The request before it on a single timeline.
    #[prost(message, optional, tag = "9")]
    pub after: Option<SavedFence>,
    /// Lanes.
    #[prost(message, repeated, tag = "10")]
    pub lanes: Vec<SavedLane>,
    /// 0 queued, 1 ready or running, 2 complete and not signalled.
    #[prost(uint32, tag = "11")]
    pub phase: u32,
    /// The submission: a descriptor.
    #[prost(bytes = "vec", tag = "12")]
    pub submission: Vec<u8>,
    /// Error number it is to end with.
    #[prost(uint32, tag = "13")]
    pub doomed: u32,
    /// Pings missed, if it may not be pre-empted.
    #[prost(uint32, optional, tag = "14")]
    pub pings_missed: Option<u32>,
    /// Nanoseconds to the next ping.
    #[prost(uint64, tag = "15")]
    pub ping_in: u64,
    /// Error number, if it is complete and not signalled.
    #[prost(uint32, tag = "16")]
    pub result: u32,
}

/// A lane.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedLane {
    /// Engines it may use: one bit each.
    #[prost(uint64, tag = "1")]
    pub allowed: u64,
    /// Its work; none if that is done.
    #[prost(message, optional, tag = "2")]
    pub work: Option<SavedWork>,
}

/// Work of a lane.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedWork {
    /// The submission itself is the next descriptor.
    #[prost(bool, tag = "1")]
    pub inline: bool,
    /// Address of the next descriptor.
    #[prost(uint64, tag = "2")]
    pub at: u64,
    /// How many follow there.
    #[prost(uint32, tag = "3")]
    pub left: u32,
    /// The descriptor under way.
    #[prost(bytes = "vec", optional, tag = "4")]
    pub current: Option<Vec<u8>>,
    /// How far it has come, if it has begun and is no program.
    #[prost(message, optional, tag = "5")]
    pub bytes: Option<SavedBytes>,
    /// The program that it runs.
    #[prost(message, optional, tag = "6")]
    pub program: Option<SavedProgram>,
}

/// How far an operation over bytes has come.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedBytes {
    /// Bytes done.
    #[prost(uint64, tag = "1")]
    pub done: u64,
    /// What was computed over them.
    #[prost(uint64, tag = "2")]
    pub value: u64,
}

/// A program that has stopped.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedProgram {
    /// Its text.
    #[prost(fixed64, repeated, tag = "1")]
    pub text: Vec<u64>,
    /// r0 to r10.
    #[prost(fixed64, repeated, tag = "2")]
    pub registers: Vec<u64>,
    /// Next instruction.
    #[prost(uint32, tag = "3")]
    pub pc: u32,
    /// Instructions it may still run.
    #[prost(uint64, tag = "4")]
    pub fuel: u64,
    /// For each caller: where to go back to, then its r6 to r9.
    #[prost(fixed64, repeated, tag = "5")]
    pub frames: Vec<u64>,
    /// The stack.
    #[prost(bytes = "vec", tag = "6")]
    pub stack: Vec<u8>,
}

/// A completion record that is to be written.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedEffect {
    /// Address space.
    #[prost(uint32, tag = "1")]
    pub space: u32,
    /// The submission.
    #[prost(bytes = "vec", tag = "2")]
    pub submission: Vec<u8>,
    /// The record.
    #[prost(bytes = "vec", tag = "3")]
    pub record: Vec<u8>,
    /// The request that is signalled afterwards, if any.
    #[prost(uint64, optional, tag = "4")]
    pub request: Option<u64>,
}

/// A single timeline.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedSingle {
    /// Its number.
    #[prost(uint32, tag = "1")]
    pub number: u32,
    /// Its latest request.
    #[prost(message, optional, tag = "2")]
    pub latest: Option<SavedFence>,
}

/// A key, wrapped by the fleet's key.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedKey {
    /// Handle.
    #[prost(uint32, tag = "1")]
    pub handle: u32,
    /// What it is for.
    #[prost(uint32, tag = "2")]
    pub kind: u32,
    /// The bytes it came in.
    #[prost(bytes = "vec", tag = "3")]
    pub wrapped: Vec<u8>,
}

/// Registers of the device that hold what a client wrote.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedRegisters {
    /// Result of the latest command.
    #[prost(uint32, tag = "1")]
    pub result: u32,
    /// Number of the context that the latest command created.
    #[prost(uint32, tag = "2")]
    pub created: u32,
}
