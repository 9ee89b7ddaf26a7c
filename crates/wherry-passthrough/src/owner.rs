//! What is asked of whoever owns a function.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use vm_memory::FileOffset;
use wherry_handover::Shelf;
use wherry_interrupt::Event;
use wherry_memory::Block;
use wherry_vfio_user::payload::{Area, pci_irq};
use wherry_vfio_user::{State, VfioUserError};

use crate::vfio::VfioError;

/// A kind of interrupts (`VFIO_PCI_*_IRQ_INDEX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Irq {
    /// The pin.
    Intx,
    /// Messages whose data and address are in configuration space.
    Msi,
    /// Messages of a table.
    Msix,
}

/// The number of a kind.
pub(crate) fn number(irq: Irq) -> u32 {
    match irq {
        Irq::Intx => pci_irq::INTX,
        Irq::Msi => pci_irq::MSI,
        Irq::Msix => pci_irq::MSIX,
    }
}

/// What an owner signals that is not the guest's: eventfds, where it has such (`VFIO_PCI_ERR_IRQ_INDEX`, `VFIO_PCI_REQ_IRQ_INDEX`).
#[derive(Clone, Default)]
pub struct Attention {
    /// The function has failed, and cannot go on without a reset.
    pub error: Option<Arc<Event>>,
    /// The function is wanted back.
    pub request: Option<Arc<Event>>,
}

/// A region of the function.
#[derive(Clone, Debug, Default)]
pub struct RegionFacts {
    /// Bytes; 0 if there is none.
    pub size: u64,
    /// The file that shows it, where the region begins in it.
    pub file: Option<FileOffset>,
    /// Parts of it that the file shows.
    pub areas: Vec<Area>,
    /// Parts of it that only ring.
    pub bells: Vec<Bell>,
}

/// A part of a region where a write does no more than signal an eventfd.
#[derive(Clone, Debug)]
pub struct Bell {
    /// From the start of the region.
    pub offset: u64,
    /// Bytes of a write that rings: 1, 2, 4, 8, or 0 for any.
    pub len: u32,
    /// What has to be written, if not everything rings.
    pub data: Option<u64>,
    /// The eventfd.
    pub event: Arc<OwnedFd>,
}

/// What a function can do of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MigrationFacts {
    /// Some of its state can be read while it runs.
    pub pre_copy: bool,
    /// It can be quiet to other devices.
    pub p2p: bool,
}

/// What a function is; constant.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Its regions: BARs 0 to 5.
    pub bars: [RegionFacts; 6],
    /// Its configuration space (256 bytes at most), as it was when it was claimed.
    pub config: Vec<u8>,
    /// It has a pin.
    pub intx: bool,
    /// Vectors of MSI.
    pub msi: u32,
    /// Vectors of MSI-X.
    pub msix: u32,
    /// It can be reset.
    pub resettable: bool,
    /// Its migration, if it has one.
    pub migration: Option<MigrationFacts>,
    /// It can tell what it writes.
    pub logging: bool,
    /// It can wait for pages that are missing: it takes part in postcopy.
    pub faults: bool,
    /// What is mapped for it is pinned: it stays where it is, and all of it is there.
    pub pins: bool,
}

/// The owner did not do what it was asked, or cannot be reached.
#[derive(Clone, Debug, thiserror::Error)]
pub enum OwnerError {
    /// A process that speaks vfio-user.
    #[error(transparent)]
    VfioUser(#[from] VfioUserError),
    /// The kernel.
    #[error(transparent)]
    Vfio(#[from] VfioError),
}

impl OwnerError {
    /// It has gone, and will not come back.
    pub fn is_lost(&self) -> bool {
        use VfioUserError::{Closed, Protocol, Socket};
        match self {
            Self::VfioUser(error) => matches!(error, Closed { .. } | Socket { .. } | Protocol { .. }),
            Self::Vfio(error) => error.is_lost(),
        }
    }
}

/// Whoever owns a PCI function. Every request has a deadline. All methods may be called from any thread.
pub trait Owner: Send + Sync {
    /// What it is: [`VFIO_USER`](crate::VFIO_USER) or [`VFIO`](crate::VFIO).
    fn kind(&self) -> &'static str;

    /// Which one of that kind on this host, such as `/run/device.sock`.
    fn label(&self) -> String;

    /// The function is let go: whoever waits for an answer of the owner is told that there will be none.
    fn close(&self);

    /// What it is called in messages, such as `vfio-user:/run/device.sock`.
    fn name(&self) -> &str;

    /// What the function is.
    fn facts(&self) -> &Facts;

    /// By what the hypervisor is to know of it, if it is to (`KVM_DEV_VFIO_FILE`).
    fn hypervisor_file(&self) -> Option<BorrowedFd<'_>>;

    /// What it signals that is not the guest's.
    fn attention(&self) -> Attention;

    /// Why another process cannot go on with it, if so.
    fn cannot_keep(&self) -> Option<String>;

    /// Puts all that another process needs to go on with it on this shelf.
    fn keep(&self, shelf: &Shelf) -> Result<(), OwnerError>;

    /// The process before this one has claimed it, and what it was told holds: of memory and of interrupts.
    fn is_inherited(&self) -> bool;

    /// Comes to rest between two requests, until [`go_on`](Self::go_on), whatever the function does meanwhile. What the process has to
    /// know that goes on with it: [`take`](Self::take).
    fn rest(&self, deadline: Instant) -> Result<Vec<u8>, OwnerError>;

    /// Takes what the process before knew.
    fn take(&self, saved: &[u8]) -> Result<(), OwnerError>;

    /// Goes on.
    fn go_on(&self);

    /// Reads a BAR.
    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) -> Result<(), OwnerError>;

    /// Writes a BAR.
    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) -> Result<(), OwnerError>;

    /// Reads configuration space.
    fn read_config(&self, offset: u64, data: &mut [u8]) -> Result<(), OwnerError>;

    /// Writes configuration space.
    fn write_config(&self, offset: u64, data: &[u8]) -> Result<(), OwnerError>;

    /// Lets the function read and write memory: a block from an offset on, at an address of the guest.
    fn map_dma(&self, address: u64, size: u64, block: &Arc<Block>, offset: u64) -> Result<(), OwnerError>;

    /// The process before this one has mapped it so.
    fn inherit_dma(&self, address: u64, size: u64, block: &Arc<Block>, offset: u64) -> Result<(), OwnerError>;

    /// What is mapped from now on is not all there: the userfaultfd of whoever touches it. Nothing is mapped yet.
    fn begin_faults(&self) -> Result<OwnedFd, OwnerError>;

    /// As [`map_dma`](Self::map_dma), of memory that is not all there: the address at which the owner has it, in its own process.
    fn map_missing(&self, address: u64, size: u64, block: &Arc<Block>, offset: u64) -> Result<u64, OwnerError>;

    /// All memory is there.
    fn end_faults(&self) -> Result<(), OwnerError>;

    /// Takes it away again, exactly as it was mapped.
    fn unmap_dma(&self, address: u64, size: u64) -> Result<(), OwnerError>;

    /// Which eventfds vectors signal from now on, from vector `start` on.
    fn signal(&self, irq: Irq, start: u32, events: &[BorrowedFd<'_>]) -> Result<(), OwnerError>;

    /// Vectors of that kind signal nobody.
    fn silence(&self, irq: Irq) -> Result<(), OwnerError>;

    /// Which eventfd unmasks the pin; false if the owner cannot do that, and has to be asked each time.
    fn unmask_by(&self, event: BorrowedFd<'_>) -> Result<bool, OwnerError>;

    /// Unmasks the pin: a function that still wants service signals again.
    fn unmask(&self) -> Result<(), OwnerError>;

    /// Resets the function; it runs then.
    fn reset(&self) -> Result<(), OwnerError>;

    /// The state that its migration is in.
    fn state(&self) -> Result<State, OwnerError>;

    /// Brings its migration to a state.
    fn set_state(&self, state: State) -> Result<(), OwnerError>;

    /// The next bytes of its state; none if there are no more (for now).
    fn read_state(&self, most: usize) -> Result<Vec<u8>, OwnerError>;

    /// Gives it the next bytes of a state.
    fn write_state(&self, data: &[u8]) -> Result<(), OwnerError>;

    /// Bytes of state that it would give if it stopped now, if it can tell.
    fn estimate(&self) -> Result<Option<u64>, OwnerError>;

    /// Has it note what it writes in these ranges (address, bytes). Bytes of a page of its log.
    fn start_log(&self, ranges: &[(u64, u64)]) -> Result<u64, OwnerError>;

    /// It notes that no longer.
    fn stop_log(&self) -> Result<(), OwnerError>;

    /// What it wrote since it was last asked: bit n is page n of the range.
    fn read_log(&self, address: u64, bytes: u64, page: u64) -> Result<Vec<u64>, OwnerError>;
}
