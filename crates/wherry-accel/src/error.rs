//! Refusals: an error number that a client sees, and a sentence that an operator reads.

use std::fmt;

/// Error numbers of the ABI: those of Linux, so that a client's driver can hand them on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Errno {
    /// Not allowed without privilege.
    Perm = 1,
    /// No such context, engine or fence.
    NoEntry = 2,
    /// The work was lost, or the device is.
    Io = 5,
    /// Too long: an extension chain, an operation, a map.
    TooBig = 7,
    /// Full for now: try again when something has completed.
    Again = 11,
    /// An address that cannot be read or written.
    Fault = 14,
    /// In use by something that is still running.
    Busy = 16,
    /// Taken already.
    Exists = 17,
    /// Malformed, or not allowed in this state.
    Invalid = 22,
    /// The device's memory for contexts is used up.
    NoSpace = 28,
    /// A program used up its fuel.
    Time = 62,
    /// Data that is corrupt, or does not authenticate.
    BadMessage = 74,
    /// The context is banned.
    Cancelled = 125,
}

impl Errno {
    /// All of them, for documents and saved state.
    pub const ALL: [Errno; 13] = [
        Errno::Perm,
        Errno::NoEntry,
        Errno::Io,
        Errno::TooBig,
        Errno::Again,
        Errno::Fault,
        Errno::Busy,
        Errno::Exists,
        Errno::Invalid,
        Errno::NoSpace,
        Errno::Time,
        Errno::BadMessage,
        Errno::Cancelled,
    ];

    /// Its number, as in the ABI.
    pub fn number(self) -> u16 {
        self as u16
    }

    /// The error with that number, if the ABI has it.
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|e| e.number() == number)
    }

    /// Its name in C.
    pub fn name(self) -> &'static str {
        match self {
            Errno::Perm => "EPERM",
            Errno::NoEntry => "ENOENT",
            Errno::Io => "EIO",
            Errno::TooBig => "E2BIG",
            Errno::Again => "EAGAIN",
            Errno::Fault => "EFAULT",
            Errno::Busy => "EBUSY",
            Errno::Exists => "EEXIST",
            Errno::Invalid => "EINVAL",
            Errno::NoSpace => "ENOSPC",
            Errno::Time => "ETIME",
            Errno::BadMessage => "EBADMSG",
            Errno::Cancelled => "ECANCELED",
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The device refuses a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{errno}: {what}")]
pub struct Refused {
    /// What the client sees.
    pub errno: Errno,
    /// What was wrong, with names and numbers.
    pub what: String,
}

impl Refused {
    /// A refusal with its reason.
    pub fn new(errno: Errno, what: impl Into<String>) -> Self {
        Self { errno, what: what.into() }
    }
}

impl From<crate::memory::Fault> for Refused {
    fn from(fault: crate::memory::Fault) -> Self {
        Self::new(Errno::Fault, fault.to_string())
    }
}

/// Shorthand of the crate: `refuse(Errno::Invalid, || format!(...))?`.
pub(crate) fn refuse<T>(errno: Errno, what: impl Into<String>) -> Result<T, Refused> {
    Err(Refused::new(errno, what))
}

/// Refuses with `EINVAL` unless `fine`.
pub(crate) fn require(fine: bool, what: impl FnOnce() -> String) -> Result<(), Refused> {
    if fine { Ok(()) } else { refuse(Errno::Invalid, what()) }
}
