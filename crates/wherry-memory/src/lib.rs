//! Guest RAM as every other crate sees it: blocks, page sets and dirty sources.
//!
//! - [`Block`]: a contiguous piece of guest RAM backed by one sealed memfd, mapped twice. The *guest map* belongs to
//!   KVM and in-process devices; the *engine map* belongs to the migration engine and is never registered with
//!   userfaultfd.
//! - [`Ram`]: all blocks of one machine, and the `vm-memory` view of their guest maps.
//! - [`Written`]: where the writes of this process are noted; in a device process that is the log of its front end.
//! - [`PageSet`]: a bitmap over the granules of one block.
//! - [`DirtySource`]: whoever can tell which pages a sharer wrote: the KVM dirty log, a device's log, the VMM itself.
//! - [`FreePages`]: whoever can tell which pages the guest does not use, and gives memory back.
//!
//! Contract: a *granule* is always [`GRANULE`] bytes (dirty logs and the wire count in it); a *unit* is the block's
//! page size (allocation and placement count in it). RAM is written only through the two maps, never by `pwrite` or
//! `fallocate`, and holes are not touched: reading a hole through a mapping allocates it.
//!
//! This crate knows neither KVM nor the wire.

mod block;
mod dirty;
mod error;
mod free;
mod page_set;
mod ram;
mod written;

pub use block::{Block, BlockId, BlockSpec, DataRuns, PageSize};
pub use dirty::{DirtyError, DirtySource, VmmWrites};
pub use error::MemoryError;
pub use free::FreePages;
pub use page_set::{PageSet, Runs};
pub use ram::{GuestMemory, GuestRegion, Ram};
pub use written::{WriteLog, Written};

/// The unit of dirty logs and of the wire: 4 KiB, whatever the page size of a block.
pub const GRANULE: u64 = 4096;
