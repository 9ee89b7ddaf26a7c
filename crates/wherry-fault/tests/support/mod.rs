//! What the tests of the fault service share: a machine's memory, a requester that can be waited for, threads that
//! touch pages, and a stand-in for another process.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]
#![expect(unsafe_code, reason = "touches guest memory the way a guest does")]
#![allow(dead_code, reason = "each test file uses a part")]

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use wherry_fault::{
    FaultService, Mapping, Mode, Requester, SourceId, SourceStatistics, Trouble, UffdError, Userfault, Wanted,
};
use wherry_memory::{Block, BlockId, BlockSpec, PageSize, Ram};

pub const PAGE: u64 = 4096;
pub const BLOCK: BlockId = BlockId(1);
/// Longer than anything takes that is not stuck.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// A requester that lets a test wait for requests.
pub struct Requests(Mutex<Sender<Wanted>>);

impl Requester for Requests {
    fn request(&self, pages: &[Wanted]) {
        for page in pages {
            // Nobody listens when a test is over.
            let _ = self.0.lock().unwrap().send(*page);
        }
    }
}

pub fn requests() -> (Arc<Requests>, Receiver<Wanted>) {
    let (sender, receiver) = channel();
    (Arc::new(Requests(Mutex::new(sender))), receiver)
}

/// The pages that were requested.
pub struct Requested(Mutex<Receiver<Wanted>>);

impl Requested {
    pub fn try_recv(&self) -> Result<Wanted, TryRecvError> {
        self.0.lock().unwrap().try_recv()
    }

    pub fn recv(&self) -> Result<Wanted, RecvTimeoutError> {
        self.0.lock().unwrap().recv_timeout(DEADLINE)
    }
}

/// One block, registered, and its service running.
pub struct Lab {
    pub service: Arc<FaultService>,
    pub block: Arc<Block>,
    pub requests: Requested,
}

impl Lab {
    /// `None`: userfaultfd is not permitted here, and the test has said so.
    pub fn new(pages: u64) -> Option<Self> {
        Self::with(BlockSpec { id: BLOCK, guest_base: 0, size: pages * PAGE, page_size: PageSize::Base })
    }

    pub fn with(spec: BlockSpec) -> Option<Self> {
        permitted()?;
        let ram = Arc::new(Ram::create(&[spec]).unwrap());
        Some(Self::over(ram))
    }

    pub fn over(ram: Arc<Ram>) -> Self {
        let block = ram.blocks()[0].clone();
        let service = FaultService::new(ram).unwrap();
        service.register_guest_maps().unwrap();
        let (requester, requests) = requests();
        service.start(requester).unwrap();
        Self { service, block, requests: Requested(Mutex::new(requests)) }
    }

    /// What a channel does: claims, writes through the engine map, hands over.
    pub fn receive(&self, pages: Range<u64>, byte: u8) {
        for run in self.service.states(BLOCK).unwrap().claim_range(pages) {
            for page in run.clone() {
                self.write_engine(page, byte);
            }
            self.service.received(BLOCK, run).unwrap();
        }
    }

    /// The same for blocks that are received by copy.
    pub fn receive_copy(&self, pages: Range<u64>, byte: u8) {
        for run in self.service.states(BLOCK).unwrap().claim_range(pages) {
            let staged = vec![byte; ((run.end - run.start) * PAGE) as usize];
            self.service.received_copy(BLOCK, run, &staged).unwrap();
        }
    }

    pub fn write_engine(&self, page: u64, byte: u8) {
        let at = self.block.engine_range(page * PAGE, PAGE).unwrap();
        // SAFETY: one page inside the engine map.
        unsafe { at.write_bytes(byte, PAGE as usize) };
    }

    /// A thread that touches a page of the guest map.
    pub fn touch(&self, page: u64) -> Touch {
        Touch::read(self.block.guest_map() as u64 + page * PAGE, format!("page {page} of the guest map"))
    }

    /// Writes a byte in the guest map as the guest does.
    pub fn guest_write(&self, page: u64, byte: u8) {
        // SAFETY: inside the guest map.
        unsafe { self.block.guest_map().add((page * PAGE) as usize).write_volatile(byte) };
    }

    /// Reads first and last byte of a page; it must be mapped, or the test waits for ever.
    pub fn guest_read(&self, page: u64) -> (u8, u8) {
        // SAFETY: inside the guest map.
        unsafe {
            let at = self.block.guest_map().add((page * PAGE) as usize);
            (at.read_volatile(), at.add(PAGE as usize - 1).read_volatile())
        }
    }

    pub fn wanted(&self) -> Wanted {
        self.requests.recv().expect("no page was requested in time")
    }

    /// Waits for the next trouble. A thread that faulted goes on before the service has told of it.
    pub fn trouble(&self) -> Trouble {
        let mut troubles = Vec::new();
        until("the service tells of a trouble", || {
            troubles.extend(self.service.take_troubles());
            !troubles.is_empty()
        });
        assert_eq!(troubles.len(), 1, "{troubles:?}");
        troubles.remove(0)
    }

    /// Waits until as many waits of a source have ended, local ones too: a woken thread goes on before its wait is counted.
    pub fn served(&self, source: SourceId, count: u64) {
        let waits = |figures: SourceStatistics| figures.latency.count() + figures.local.count();
        until("waits are counted", || waits(self.figures(source)) >= count);
        assert_eq!(waits(self.figures(source)), count);
    }

    pub fn figures(&self, source: SourceId) -> SourceStatistics {
        self.service.statistics().source(source).expect("the source is there").clone()
    }

    /// Pages of the block that are allocated.
    pub fn data(&self) -> Vec<Range<u64>> {
        self.block.data_runs(0..u64::MAX).map(|r| r.unwrap()).map(|r| r.start / PAGE..r.end / PAGE).collect()
    }
}

/// Prints why, if userfaultfd cannot be used here.
pub fn permitted() -> Option<()> {
    match Userfault::open() {
        Ok(_) => Some(()),
        Err(error @ (UffdError::NotPermitted { .. } | UffdError::Absent(_) | UffdError::Features(_))) => {
            println!("SKIPPED: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Waits until something is so, and says what did not become so.
pub fn until(what: &str, mut so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !so() {
        assert!(started.elapsed() < DEADLINE, "{what}: not within {DEADLINE:?}");
        std::thread::yield_now();
    }
}

/// A thread that touches one page and tells its first and last byte.
pub struct Touch {
    answer: Receiver<(u8, u8)>,
    what: String,
}

impl Touch {
    pub fn read(address: u64, what: String) -> Self {
        let (sender, answer) = channel();
        std::thread::spawn(move || {
            let at = address as *const u8;
            // SAFETY: the caller gave the address of a mapped page.
            let both = unsafe { (at.read_volatile(), at.add(PAGE as usize - 1).read_volatile()) };
            let _ = sender.send(both);
        });
        Self { answer, what }
    }

    pub fn bytes(&self) -> (u8, u8) {
        self.answer.recv_timeout(DEADLINE).unwrap_or_else(|_| panic!("{} was not served in time", self.what))
    }

    pub fn waits(&self) -> bool {
        self.answer.try_recv().is_err()
    }
}

/// Stands for another process: a map of its own of the memfd, with a userfaultfd of its own that sees missing pages.
pub struct Sharer {
    pub base: u64,
    len: u64,
    pub uffd: Userfault,
}

impl Sharer {
    pub fn new(block: &Block, mode: Option<Mode>) -> Self {
        let len = block.spec().size;
        // SAFETY: a fresh shared mapping of the block's memfd.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                block.fd().as_raw_fd(),
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED);
        // SAFETY: our own mapping.
        unsafe { libc::madvise(base, len as usize, libc::MADV_NOHUGEPAGE) };
        let uffd = Userfault::open().unwrap();
        if let Some(mode) = mode {
            uffd.register(base as u64, len, mode).unwrap();
        }
        Self { base: base as u64, len, uffd }
    }

    /// What it hands over to the service.
    pub fn handed_over(&self) -> Userfault {
        Userfault::adopt(self.uffd.as_fd().try_clone_to_owned().unwrap()).unwrap()
    }

    pub fn table(&self) -> Vec<Mapping> {
        vec![Mapping { base: self.base, len: self.len, block: BLOCK, offset: 0 }]
    }

    pub fn touch(&self, page: u64) -> Touch {
        Touch::read(self.base + page * PAGE, format!("page {page} of the sharer"))
    }

    pub fn read(&self, page: u64) -> (u8, u8) {
        let at = (self.base + page * PAGE) as *const u8;
        // SAFETY: inside the mapping.
        unsafe { (at.read_volatile(), at.add(PAGE as usize - 1).read_volatile()) }
    }
}

/// Lets the kernel hand out hugetlb pages on demand for the length of a test.
pub struct HugePages(String);

impl HugePages {
    const FILE: &str = "/proc/sys/vm/nr_overcommit_hugepages";

    pub fn permit() -> Option<Self> {
        let before = std::fs::read_to_string(Self::FILE).ok()?;
        std::fs::write(Self::FILE, "64").ok()?;
        Some(Self(before))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::FILE, &self.0);
    }
}
