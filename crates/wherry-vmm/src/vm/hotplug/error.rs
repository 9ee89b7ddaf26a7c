//! Why a device was not plugged or unplugged.

use std::time::Duration;

use wherry_passthrough::OwnerError;
use wherry_state::{UnitError, UnitsError};

use crate::pci::PciError;
use crate::vm::passthrough::PlugFunctionError;

/// A device was not plugged. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// The machine has no registers for it.
    #[error("this VM has no hot plug: it was started by a Wherry that did not know it")]
    NoHotplug,
    /// A journey is under way.
    #[error("devices neither come nor go while the VM moves or its memory follows; wait until that is over")]
    Held,
    /// That one is in use.
    #[error("{name} is connected to {at} already")]
    Taken {
        /// The device.
        name: String,
        /// Where it is on this host.
        at: String,
    },
    /// Memory of the machine may be given back.
    #[error(
        "this VM has a balloon, which gives memory back that the process of the device may have pinned; give the VM the device at \
         its start"
    )]
    Balloon,
    /// The process of the device.
    #[error(transparent)]
    Owner(#[from] OwnerError),
    /// The function.
    #[error(transparent)]
    Function(#[from] PlugFunctionError),
    /// The bus.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// Its state units do not fit.
    #[error(transparent)]
    Units(#[from] UnitsError),
    /// Its interrupts cannot be attached.
    #[error("attaching its interrupts: {0}")]
    Start(#[source] UnitError),
    /// The machine has ended.
    #[error("the VM has ended")]
    Ended,
}

/// A device was not unplugged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnplugError {
    /// There is none of that name.
    #[error("there is no device {name:?}; there are {}", list(.there))]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        there: Vec<String>,
    },
    /// It came with the machine, and stays.
    #[error("{0} cannot be unplugged: only functions that somebody else owns (vfio-user, vfio) can")]
    Stays(String),
    /// It is on its way out.
    #[error("{0} is being unplugged already")]
    Pending(String),
    /// A journey is under way.
    #[error("{0} cannot be unplugged while the VM moves or its memory follows; wait until that is over")]
    Held(String),
    /// The guest cannot answer.
    #[error("{0} cannot be unplugged while the VM is paused: its guest has to let it go")]
    Paused(String),
    /// The guest has not let it go.
    #[error(
        "the guest has not let go of {name} within {} ms{}; the device stays",
        .limit.as_millis(),
        if *.heard { ", though it was told; if it still does, the device is taken away then" } else {
            " (it does not listen to hot plug, or not yet)"
        }
    )]
    NotAnswered {
        /// The device.
        name: String,
        /// The guest was told.
        heard: bool,
        /// How long it was given.
        limit: Duration,
    },
    /// It is still being taken away.
    #[error(
        "the guest has let go of {0}, which is not taken away yet: its process hangs, or the VM moves; it will be then"
    )]
    Leaving(String),
    /// The machine has ended.
    #[error("the VM has ended before its guest let go of {0}")]
    Ended(String),
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".into() } else { names.join(", ") }
}
