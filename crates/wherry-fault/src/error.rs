//! What can go wrong between a fault and its page.

use std::io;
use std::time::Duration;

use wherry_memory::{BlockId, MemoryError};

use crate::SourceId;

/// A userfaultfd could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// This process may not have one that sees faults taken inside the kernel.
    #[error(
        "userfaultfd is not permitted: /dev/userfaultfd: {device}; system call: {call}. Run as root or with \
         CAP_SYS_PTRACE, give this user read access to /dev/userfaultfd, or set vm.unprivileged_userfaultfd to 1"
    )]
    NotPermitted {
        /// What opening the device file said.
        device: io::Error,
        /// What the system call said.
        call: io::Error,
    },
    /// The kernel has no userfaultfd at all.
    #[error("this kernel has no userfaultfd (CONFIG_USERFAULTFD): {0}")]
    Absent(io::Error),
    /// The kernel is too old.
    #[error("userfaultfd of this kernel lacks {}; Linux 5.18 or newer is needed", .0.join(", "))]
    Features(Vec<&'static str>),
    /// A range was registered, but not all calls that its faults need are there.
    #[error("userfaultfd of this kernel offers no {} for {base:#x}..+{len:#x}", .lacking.join(", "))]
    Calls {
        /// Start address.
        base: u64,
        /// Bytes.
        len: u64,
        /// The calls that lack.
        lacking: Vec<&'static str>,
    },
    /// The kernel gave an answer that has no meaning in the protocol.
    #[error("{call} on {start:#x}..+{len:#x}: {source}")]
    Call {
        /// The call.
        call: &'static str,
        /// Start address.
        start: u64,
        /// Bytes.
        len: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Events cannot be read.
    #[error("reading userfaultfd events: {0}")]
    Read(io::Error),
    /// Something else than a page fault was reported, although no such events were asked for.
    #[error("userfaultfd reported event {0:#x}: its owner asked for more than page faults")]
    Event(u8),
}

/// The fault service could not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum FaultError {
    /// userfaultfd refused.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// A block refused.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The operating system refused.
    #[error("{what}: {source}")]
    Os {
        /// What was being done.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// There is no such block.
    #[error("there is no RAM block {0}")]
    NoBlock(BlockId),
    /// There is no such source, or not any more.
    #[error("there is no fault source {0}")]
    NoSource(SourceId),
    /// Pages are not inside the block.
    #[error("pages {start}..{end} are not inside RAM block {block} of {limit} pages")]
    OutOfBlock {
        /// The block.
        block: BlockId,
        /// First page.
        start: u64,
        /// Page after the last.
        end: u64,
        /// How many pages the block has.
        limit: u64,
    },
    /// The bytes that were handed over do not fill the pages.
    #[error("{got} bytes were staged for pages {start}..{end} of RAM block {block}")]
    Staging {
        /// The block.
        block: BlockId,
        /// First page.
        start: u64,
        /// Page after the last.
        end: u64,
        /// Bytes given.
        got: usize,
    },
    /// Guest maps are not registered, and pages cannot be placed.
    #[error("the guest maps are not registered with userfaultfd")]
    NotRegistered,
    /// Guest maps are registered already.
    #[error("the guest maps are registered with userfaultfd already")]
    Registered,
    /// The service has been started or stopped already.
    #[error("the fault service has been {0} already")]
    Started(&'static str),
    /// Pages came in a way that their block does not take (now).
    #[error("RAM block {block} receives {want}; these pages came {got}")]
    Way {
        /// The block.
        block: BlockId,
        /// What it takes.
        want: crate::Way,
        /// What it was given.
        got: crate::Way,
    },
    /// The way of a block cannot be changed because fills do not end.
    #[error("RAM block {block}: {fills} fills did not end within {waited:.1?}; the way it receives was not changed")]
    Busy {
        /// The block.
        block: BlockId,
        /// How many.
        fills: u64,
        /// How long was waited.
        waited: Duration,
    },
    /// Pages of a block that has become shared cannot be taken out of its memfd.
    #[error(
        "RAM block {block}: pages {start}..{end} stay in memory although they were punched: somebody pins or refills \
         them; refuse postcopy for the process that maps this block"
    )]
    StillData {
        /// The block.
        block: BlockId,
        /// First page.
        start: u64,
        /// Page after the last.
        end: u64,
    },
    /// A table of mappings makes no sense.
    #[error("fault source {name}: mapping {index} is refused: {reason}")]
    Mapping {
        /// The source's name.
        name: String,
        /// Which mapping.
        index: usize,
        /// Why.
        reason: String,
    },
    /// A block that is received in place cannot be shared: the other process would see half-filled pages.
    #[error("fault source {name} maps RAM block {block}, which is received in place: change its way to copy first")]
    InPlaceShared {
        /// The source's name.
        name: String,
        /// The block.
        block: BlockId,
    },
    /// Pages could not be placed.
    #[error("placing pages {start}..{end} of RAM block {block}: {reason}")]
    Place {
        /// The block.
        block: BlockId,
        /// First page that is not placed.
        start: u64,
        /// Page after the last.
        end: u64,
        /// Why.
        reason: String,
    },
    /// Not all pages are there.
    #[error("RAM block {block} still lacks {missing} pages: without userfaultfd they would read as zeros")]
    Incomplete {
        /// The block.
        block: BlockId,
        /// How many.
        missing: u64,
    },
}
