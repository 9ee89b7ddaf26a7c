//! The accelerator: contexts that name engines through a map of their own, and everything behind it. Knows no VM.
//!
//! A client makes a *context*, gives it an *engine map* (an ordered list of slots: an engine, a gap, or a virtual engine
//! made by an extension), and submits descriptors to slots. What a slot stands for is the client's affair; on which worker
//! of which host an engine runs is the host's. So a context can move to a host with other workers, half-way through its
//! work.
//!
//! Parts, from what a client sees downwards:
//!
//! - [`abi`]: structures, numbers and bits, as `docs/accel-abi.md` has them.
//! - [`device`]: [`Device`](device::Device), what clients and hosts call: contexts, parameters, submissions, fences,
//!   figures, stop.
//! - `map`, `chain`, `context`: engine maps and their extensions; timelines.
//! - `scheduler`: which request runs where and for how long. Pure; time comes from a [`clock`].
//! - `work`, `engines`, [`program`]: what a request does, step by step; programs of RFC 9669 that can stop anywhere.
//! - [`drive`]: who makes workers work: threads, or a simulation on virtual time.
//! - [`function`]: all of it as a PCI function, for VMMs in other processes.
//! - [`state`]: everything that migrates, as a state unit.
//! - [`mod@bench`]: figures in real time, beside the crates called directly.
//! - [`memory`]: the address space of a client, as a trait, and one in this process. [`keys`]: keys the client never sees.
//!
//! Contract:
//!
//! - What a client gives is hostile. It is refused with an error number of the ABI and a sentence that names what was
//!   wrong ([`error::Refused`]); a refused call changes nothing. Unknown operations, flags and extensions are refused, never
//!   skipped.
//! - A map is checked when it is set and frozen at the first submission.
//! - A slot is a timeline: its requests start and complete one after the other. Different slots are independent.
//! - Work stops at the boundary of a step, which is bounded. Everything that is needed to go on is then in the device's
//!   state or in the client's memory; what depends on this host (which worker, which engine was preferred) is not kept.
//! - A client's memory is never referenced, only copied and accessed atomically; every write is in its dirty log before the
//!   completion that speaks of it is published.

pub mod abi;
pub mod bench;
pub mod catalogue;
mod chain;
pub mod clock;
mod context;
pub mod device;
pub mod drive;
mod engines;
pub mod error;
pub mod function;
pub mod keys;
mod map;
pub mod memory;
pub mod program;
mod scheduler;
pub mod state;
mod work;

pub use scheduler::{FenceState, Tunables};
