//! The balloon device (section 5.5): takes memory from the guest and gives it back to the host.
//!
//! - [`Balloon`] is the device; `pages` is what its thread does with what the guest names.
//! - [`Memory`] gives memory back, when and where that may be.
//!
//! Memory comes back in two ways: pages that the guest puts into the balloon, as many as it was asked for, and free pages
//! that it reports. Their blocks get holes there. Not while a journey reads RAM, nor before all of it has come: then what is
//! put into the balloon waits and is given back afterwards, and what is reported stays. And never where another process maps
//! RAM, because it may have pinned what it maps: then the balloon refuses, and says why.
//!
//! A journey that begins asks the guest which pages it does not use (free page hinting), and leaves them out: see
//! [`FreePages`].

mod memory;
mod pages;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use wherry_fault::FaultService;
use wherry_memory::{Block, FreePages, GRANULE, PageSet, Ram};
use wherry_state::{SavedState, Section, UnitError, UnitId};

use self::memory::Memory;
use self::pages::Pages;
use crate::device::{Activation, Device, Interrupts, Kind, Serving, read_config};
use crate::ring::RING_FEATURES;
use crate::saved::{SavedBalloon, SavedPages, SavedTransport};
use crate::worker::Worker;

const KIND: Kind = Kind { id: 5, name: "virtio-balloon", class: [0xff, 0, 0] };
const RING: u16 = 128;
/// The rings, which have the same numbers whichever features are taken.
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATISTICS: u16 = 2;
const HINTS: u16 = 3;
const REPORTS: u16 = 4;

/// The guest tells of a page that it takes out of the balloon before it uses it.
const MUST_TELL_HOST: u64 = 1 << 0;
const STATS_VQ: u64 = 1 << 1;
/// The guest takes pages out of the balloon when it has no others.
const DEFLATE_ON_OOM: u64 = 1 << 2;
const FREE_PAGE_HINT: u64 = 1 << 3;
const PAGE_REPORTING: u64 = 1 << 5;
const FEATURES: u64 = RING_FEATURES | MUST_TELL_HOST | STATS_VQ | DEFLATE_ON_OOM | FREE_PAGE_HINT | PAGE_REPORTING;

/// Commands of free page hinting: name no more pages; use them again. Others ask for pages.
const STOP: u32 = 0;
const DONE: u32 = 1;
const FIRST_COMMAND: u32 = 2;

/// Where `actual` lies in the configuration: what the driver writes.
const ACTUAL: u64 = 4;
/// Most runs of pages in the balloon that wait to be given back and move with the guest. The rest is given back when the
/// guest takes it out and puts it in again.
const MOST_RUNS: usize = 4096;

/// What a guest tells of its memory (section 5.5.6.3), in bytes and counts; what it did not tell is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
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

/// How a balloon stands, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonStatus {
    /// What the guest was asked to put into it.
    pub wanted: u64,
    /// What the guest says is in it.
    pub actual: u64,
    /// What the guest has last told.
    pub statistics: Statistics,
}

/// A balloon cannot be what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BalloonError {
    /// Nothing would be given back.
    #[error("its memory cannot be given back: {0}")]
    Pinned(String),
    /// The number of bytes is impossible.
    #[error("a balloon of {bytes} bytes in a guest with {memory} bytes of RAM; use a multiple of {GRANULE} below that")]
    Size {
        /// What was asked for.
        bytes: u64,
        /// RAM of the guest.
        memory: u64,
    },
}

/// What device, thread and engine share.
struct Shared {
    memory: Memory,
    /// Pages that the guest is asked to have in the balloon, and what it says it has.
    wanted: AtomicU32,
    actual: AtomicU32,
    /// What the driver reads as the command of free page hinting.
    command: AtomicU32,
    /// The last command that asked, so that no other asks by the same number.
    last: AtomicU32,
    /// The guest was asked where it came from, and has to hear that it is over.
    moved: AtomicBool,
    /// What the guest has named since it was asked; none if nobody asks.
    named: Mutex<Option<Vec<PageSet>>>,
    statistics: Mutex<Statistics>,
    /// The buffer that waits to be given back for new statistics.
    waiting: Mutex<Option<u16>>,
    /// New statistics are wanted.
    refresh: AtomicBool,
    /// Wakes the thread for what is wanted, and when memory may be given back again.
    news: EventFd,
    /// While there is a driver.
    interrupts: Mutex<Option<Interrupts>>,
}

impl Shared {
    fn wake(&self) {
        // It fails only if the counter is full, and then the thread is awake already.
        let _ = self.news.write(1);
    }

    fn tell_driver(&self) {
        if let Some(interrupts) = &*lock(&self.interrupts) {
            interrupts.configuration();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The device.
pub struct Balloon {
    worker: Worker,
    shared: Arc<Shared>,
    instance: u32,
}

impl Balloon {
    /// A balloon for this RAM. `faults` serves what has not come yet. `pinned` says why RAM can never be given back, if that
    /// is so.
    pub fn new(
        ram: Arc<Ram>,
        faults: Option<Arc<FaultService>>,
        pinned: Option<String>,
        instance: u32,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            memory: Memory::new(ram, faults, pinned),
            wanted: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            command: AtomicU32::new(STOP),
            last: AtomicU32::new(FIRST_COMMAND - 1),
            moved: AtomicBool::new(false),
            named: Mutex::default(),
            statistics: Mutex::default(),
            waiting: Mutex::default(),
            refresh: AtomicBool::new(false),
            news: EventFd::new(EFD_NONBLOCK)?,
            interrupts: Mutex::default(),
        });
        let worker = Worker::spawn(format!("virtio-bal-{instance}"), Pages::new(shared.clone()))?;
        Ok(Self { worker, shared, instance })
    }

    /// Asks the guest to have so many bytes in the balloon. It does so in its own time, and as far as it can.
    pub fn set_wanted(&self, bytes: u64) -> Result<(), BalloonError> {
        let memory = self.shared.memory.ram().size();
        if bytes > 0
            && let Some(why) = self.shared.memory.pinned()
        {
            return Err(BalloonError::Pinned(why.into()));
        }
        let pages = u32::try_from(bytes / GRANULE).ok().filter(|_| bytes.is_multiple_of(GRANULE) && bytes < memory);
        let pages = pages.ok_or(BalloonError::Size { bytes, memory })?;
        self.shared.wanted.store(pages, Ordering::Release);
        self.shared.tell_driver();
        Ok(())
    }

    /// How it stands. Asks the guest for new statistics, which are in later answers.
    pub fn status(&self) -> BalloonStatus {
        self.shared.refresh.store(true, Ordering::Release);
        self.shared.wake();
        let bytes = |pages: &AtomicU32| u64::from(pages.load(Ordering::Acquire)) * GRANULE;
        BalloonStatus {
            wanted: bytes(&self.shared.wanted),
            actual: bytes(&self.shared.actual),
            statistics: *lock(&self.shared.statistics),
        }
    }

    /// For the engine.
    pub fn free_pages(&self) -> Arc<dyn FreePages> {
        self.shared.clone()
    }
}

impl FreePages for Shared {
    fn hold(&self) {
        self.memory.hold();
    }

    fn release(&self) {
        self.memory.release();
        self.wake();
    }

    fn ask(&self) {
        let mut named = lock(&self.named);
        let last = self.last.load(Ordering::Acquire).wrapping_add(1).max(FIRST_COMMAND);
        self.last.store(last, Ordering::Release);
        self.command.store(last, Ordering::Release);
        *named = Some(self.memory.none());
        drop(named);
        self.tell_driver();
    }

    fn leave_out(&self, block: &Block, range: Range<u64>, set: &mut PageSet) -> u64 {
        let named = lock(&self.named);
        let index = self.memory.ram().blocks().iter().position(|b| b.spec().id == block.spec().id);
        match named.as_ref().zip(index).and_then(|(named, index)| named.get(index)) {
            Some(free) => set.subtract_range(free, range),
            None => 0,
        }
    }

    fn enough(&self) {
        if lock(&self.named).take().is_some() {
            self.command.store(DONE, Ordering::Release);
            self.tell_driver();
        }
    }
}

impl Device for Balloon {
    fn kind(&self) -> Kind {
        KIND
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn ring_sizes(&self) -> &[u16] {
        &[RING; 5]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 12];
        for (field, value) in
            config.chunks_exact_mut(4).zip([&self.shared.wanted, &self.shared.actual, &self.shared.command])
        {
            field.copy_from_slice(&value.load(Ordering::Acquire).to_le_bytes());
        }
        read_config(&config, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(value)) = (offset, data.try_into()) {
            self.shared.actual.store(u32::from_le_bytes(value), Ordering::Release);
        }
    }

    fn activate(&self, activation: Activation) -> Result<(), UnitError> {
        *lock(&self.shared.interrupts) = Some(activation.interrupts.clone());
        self.worker.activate(activation);
        // What waited elsewhere is given back here.
        self.shared.wake();
        if self.shared.moved.swap(false, Ordering::AcqRel) {
            self.shared.tell_driver();
        }
        Ok(())
    }

    fn reset(&self) {
        *lock(&self.shared.interrupts) = None;
        self.worker.reset();
    }

    fn serving(&self) -> &dyn Serving {
        &self.worker
    }

    fn start(&self) {
        self.worker.start();
    }

    /// Interrupts go through the transport, which looks each time.
    fn vector_changed(&self, _ring: u16) {}

    fn schema(&self) -> u32 {
        SavedBalloon::SCHEMA
    }

    fn save(&self, transport: SavedTransport) -> Section {
        let saved = SavedBalloon {
            transport: Some(transport),
            wanted: self.shared.wanted.load(Ordering::Acquire),
            actual: self.shared.actual.load(Ordering::Acquire),
            command: self.shared.command.load(Ordering::Acquire),
            last_command: self.shared.last.load(Ordering::Acquire),
            statistics: lock(&self.shared.waiting).map(u32::from),
            waiting: self.shared.memory.waiting(MOST_RUNS),
        };
        saved.to_section(&UnitId::new(KIND.name, self.instance))
    }

    fn restore(&self, section: &Section) -> Result<SavedTransport, UnitError> {
        let saved = SavedBalloon::from_section(section)?;
        let head = saved.statistics.map(|head| u16::try_from(head).ok().filter(|head| *head < RING).ok_or(head));
        let head =
            head.transpose().map_err(|head| UnitError::failed(format!("a buffer {head} that its ring cannot have")))?;
        self.shared.memory.restore(&saved.waiting).map_err(UnitError::failed)?;
        *lock(&self.shared.waiting) = head;
        self.shared.wanted.store(saved.wanted, Ordering::Release);
        self.shared.actual.store(saved.actual, Ordering::Release);
        self.shared.last.store(saved.last_command, Ordering::Release);
        let asked = saved.command >= FIRST_COMMAND;
        self.shared.command.store(if asked { DONE } else { saved.command }, Ordering::Release);
        self.shared.moved.store(asked, Ordering::Release);
        saved.transport.ok_or_else(|| UnitError::failed("there is no state of its transport"))
    }
}

/// Runs of pages as they are saved.
impl SavedPages {
    fn range(&self) -> Option<Range<u64>> {
        Some(self.first..self.first.checked_add(self.count)?)
    }
}
