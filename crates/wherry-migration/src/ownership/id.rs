//! Whom and what a hand-over is about.

use std::fmt;

use wherry_stream::message::About;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl TryFrom<&[u8]> for $name {
            type Error = BadAttempt;

            fn try_from(bytes: &[u8]) -> Result<Self, BadAttempt> {
                bytes.try_into().map($name).map_err(|_| BadAttempt::Length { what: stringify!($name), bytes: bytes.len() })
            }
        }
    };
}

id! {
    /// Identity of a VM: random, chosen when it was first started, kept for its life. Ownership is per identity.
    VmId
}
id! {
    /// One attempt to move a VM: random, chosen by the source once per journey, never used again.
    AttemptId
}
id! {
    /// One run of a destination process: random, chosen when it starts to receive, never recorded to be used again.
    Incarnation
}

/// What every message and every record of a hand-over is about. Two sides talk of the same thing if all four are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attempt {
    /// The VM.
    pub vm: VmId,
    /// The epoch that the VM's ownership has if the destination takes it: one more than the source's.
    pub epoch: u64,
    /// The attempt.
    pub id: AttemptId,
    /// The destination that is meant.
    pub incarnation: Incarnation,
}

/// What claims to identify an attempt does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadAttempt {
    /// An id has the wrong length.
    #[error("a {what} is 16 bytes, these are {bytes}")]
    Length {
        /// Which id.
        what: &'static str,
        /// Bytes given.
        bytes: usize,
    },
    /// Epochs begin at 1, and the last ones are not used because they could not be followed by another.
    #[error("{0} is no epoch that can be handed over")]
    Epoch(u64),
}

impl Attempt {
    /// Takes it from a message of the wire.
    pub fn from_about(about: &About) -> Result<Self, BadAttempt> {
        let attempt = Self {
            vm: about.vm.as_slice().try_into()?,
            epoch: about.epoch,
            id: about.attempt.as_slice().try_into()?,
            incarnation: about.incarnation.as_slice().try_into()?,
        };
        attempt.checked()
    }

    /// As a message of the wire says it.
    pub fn to_about(&self) -> About {
        About {
            vm: self.vm.0.to_vec(),
            epoch: self.epoch,
            attempt: self.id.0.to_vec(),
            incarnation: self.incarnation.0.to_vec(),
        }
    }

    pub(crate) fn checked(self) -> Result<Self, BadAttempt> {
        // Two above must exist: `resolve --as source` takes the next one, and that owner may hand over again.
        if self.epoch == 0 || self.epoch > u64::MAX - 2 {
            return Err(BadAttempt::Epoch(self.epoch));
        }
        Ok(self)
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "attempt {} on VM {} (epoch {}, destination {})", self.id, self.vm, self.epoch, self.incarnation)
    }
}

/// How much of the VM has gone over when the destination is told to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Carriage {
    /// Precopy: all of it. A ready destination holds a complete copy.
    Whole,
    /// Postcopy: pages follow. A ready destination is nothing without the source's memory; a source whose VM runs over
    /// there is a page server, and never runnable again.
    PagesFollow,
}
