//! The fault service: what the engine calls.
//!
//! Locks, in the order in which they are taken: `admin`, the gate of a block, its staged units, `sources`, a source's
//! descriptor, waiters. None is held while a requester is called or another process is waited for.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, epoll, eventfd};
use wherry_memory::{BlockId, GRANULE, PageSize, Ram};

use crate::block::BlockFaults;
use crate::source::{Source, check_mappings};
use crate::waiters::Waiters;
use crate::{
    FaultError, Fill, Mapping, Mode, PageStates, SourceId, Statistics, UffdError, Userfault, Want, Way, lock, read,
    serve, write,
};

/// How long a change of way waits for fills to end.
const FILLS_LIMIT: Duration = Duration::from_secs(10);
/// How many troubles are kept for a caller who does not take them.
const TROUBLES_LIMIT: usize = 256;

/// A page somebody waits for, or that belongs to a unit somebody waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Wanted {
    /// Its block.
    pub block: BlockId,
    /// Its granule.
    pub page: u64,
    /// The source that faulted first.
    pub source: SourceId,
}

/// Asks the source for pages.
pub trait Requester: Send + Sync {
    /// Called on the fault thread with the pages of a batch of faults, each once until a recovery. The one that was
    /// touched comes before the others of its unit. Must not block for long, nor touch a guest map.
    fn request(&self, pages: &[Wanted]);
}

/// Something an operator should hear of. The service goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// A source is served no longer.
    Quarantined {
        /// The source.
        id: SourceId,
        /// Its name.
        name: String,
        /// What it did.
        reason: String,
    },
    /// A page that had been received has gone from the memfd: somebody punched it. It reads as zeros now.
    Punched {
        /// Its block.
        block: BlockId,
        /// First granule of its unit.
        page: u64,
        /// The sources that map the block; they were quarantined.
        suspects: Vec<SourceId>,
    },
    /// A page could not be placed; those who wait were woken to try again.
    Placement {
        /// Its block.
        block: BlockId,
        /// First granule of its unit.
        page: u64,
        /// Why.
        reason: String,
    },
    /// The guest maps' own descriptor failed.
    Guest(String),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trouble::Quarantined { id, name, reason } => {
                write!(f, "fault source {name} ({id}) is quarantined: {reason}")
            }
            Trouble::Punched { block, page, suspects } => {
                write!(f, "page {page} of RAM block {block} was punched after it had been received; ")?;
                match suspects.len() {
                    0 => f.write_str("no other process is known to map it"),
                    n => write!(f, "{n} sources that map it are quarantined"),
                }
            }
            Trouble::Placement { block, page, reason } => {
                write!(f, "page {page} of RAM block {block} could not be placed and is tried again: {reason}")
            }
            Trouble::Guest(reason) => write!(f, "faults of the guest maps: {reason}"),
        }
    }
}

/// What the threads share.
pub(crate) struct Shared {
    pub ram: Arc<Ram>,
    pub blocks: Vec<BlockFaults>,
    pub sources: RwLock<BTreeMap<SourceId, Arc<Source>>>,
    pub waiters: Waiters,
    pub requester: RwLock<Option<Arc<dyn Requester>>>,
    pub epoll: OwnedFd,
    /// Wakes the fault thread to stop.
    pub kick: OwnedFd,
    pub stopping: AtomicBool,
    /// The fault thread has faults in hand; the background mapper stands back.
    pub serving: AtomicBool,
    troubles: Mutex<Vec<Trouble>>,
    /// In nanoseconds.
    pub largest_stall: AtomicU64,
    pub prefetched: AtomicU64,
    pub prefetch_hits: AtomicU64,
    pub background_pages: AtomicU64,
    pub punched_pages: AtomicU64,
    pub replaced_pages: AtomicU64,
    /// Where the background mapper goes on.
    pub cursor: Mutex<crate::mapper::Cursor>,
}

impl Shared {
    pub fn block(&self, id: BlockId) -> Result<&BlockFaults, FaultError> {
        self.blocks.iter().find(|b| b.id() == id).ok_or(FaultError::NoBlock(id))
    }

    /// The block, if it has these pages.
    pub fn block_with(&self, id: BlockId, pages: &Range<u64>) -> Result<&BlockFaults, FaultError> {
        let block = self.block(id)?;
        let (start, end, limit) = (pages.start, pages.end, block.states.pages());
        if start > end || end > limit {
            return Err(FaultError::OutOfBlock { block: id, start, end, limit });
        }
        Ok(block)
    }

    pub fn source(&self, id: SourceId) -> Option<Arc<Source>> {
        read(&self.sources).get(&id).cloned()
    }

    pub fn trouble(&self, trouble: Trouble) {
        let mut troubles = lock(&self.troubles);
        if troubles.len() < TROUBLES_LIMIT {
            troubles.push(trouble);
        }
    }

    fn watch(&self, source: &Source) -> Result<(), FaultError> {
        match &*read(&source.uffd) {
            Some(uffd) => {
                let data = epoll::EventData::new_u64(u64::from(source.id.0));
                epoll::add(&self.epoll, uffd, data, epoll::EventFlags::IN).map_err(os("watching a fault source"))
            }
            None => Ok(()),
        }
    }

    /// Serves a source no longer: wakes who waits there as far as can be, and closes its descriptor.
    pub fn close(&self, source: &Source) {
        // First of all, so that nobody notes a waiter that is not woken below.
        self.waiters.close(source.id);
        let Some(uffd) = write(&source.uffd).take() else { return };
        // Explicitly: the other process holds the file open, so closing our descriptor would not end the watch.
        let _ = epoll::delete(&self.epoll, &uffd);
        for mapping in source.mappings() {
            let _ = uffd.wake(mapping.base, mapping.len);
        }
    }

    /// Closes a foreign source for what it did.
    pub fn quarantine(&self, source: &Source, reason: String) {
        if source.counters.quarantined.set(reason.clone()).is_err() {
            return;
        }
        self.close(source);
        self.trouble(Trouble::Quarantined { id: source.id, name: source.name.clone(), reason });
    }

    /// Asks for what somebody waits for in one unit, the touched page first.
    pub fn want(&self, block: &BlockFaults, page: u64, source: SourceId, wanted: &mut Vec<Wanted>) -> Want {
        let want = block.states.want(page);
        let mut push = |page| wanted.push(Wanted { block: block.id(), page, source });
        if want == Want::Request {
            push(page);
        }
        if want != Want::Received {
            block.states.unit_of(page).filter(|p| *p != page && block.states.ask(*p)).for_each(push);
        }
        want
    }
}

fn os(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> FaultError {
    move |e| FaultError::Os { what, source: e.into() }
}

/// Serves the faults of all who share a machine's memory, on the side that receives it. See the crate's head.
///
/// Dropped: as by [`stop`](Self::stop).
pub struct FaultService {
    pub(crate) shared: Arc<Shared>,
    /// Serializes what adds and removes sources and changes ways.
    admin: Mutex<()>,
    next_source: AtomicU32,
    threads: Mutex<Threads>,
}

#[derive(Default)]
struct Threads {
    running: Vec<JoinHandle<()>>,
    started: bool,
    stopped: bool,
}

impl fmt::Debug for FaultService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultService").field("blocks", &self.shared.blocks.len()).finish_non_exhaustive()
    }
}

impl Drop for FaultService {
    fn drop(&mut self) {
        self.stop();
    }
}

impl FaultService {
    /// All pages of all blocks missing, all blocks received in place; no thread and no userfaultfd yet.
    pub fn new(ram: Arc<Ram>) -> Result<Arc<Self>, FaultError> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(os("making an epoll"))?;
        let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(os("making an eventfd"))?;
        epoll::add(&epoll, &kick, epoll::EventData::new_u64(serve::KICK), epoll::EventFlags::IN)
            .map_err(os("watching an eventfd"))?;
        let blocks = ram.blocks().iter().map(|b| BlockFaults::new(b.clone())).collect();
        let shared = Shared {
            ram,
            blocks,
            sources: RwLock::default(),
            waiters: Waiters::default(),
            requester: RwLock::default(),
            epoll,
            kick,
            stopping: AtomicBool::new(false),
            serving: AtomicBool::new(false),
            troubles: Mutex::default(),
            largest_stall: AtomicU64::new(0),
            prefetched: AtomicU64::new(0),
            prefetch_hits: AtomicU64::new(0),
            background_pages: AtomicU64::new(0),
            punched_pages: AtomicU64::new(0),
            replaced_pages: AtomicU64::new(0),
            cursor: Mutex::default(),
        };
        Ok(Arc::new(Self {
            shared: Arc::new(shared),
            admin: Mutex::new(()),
            next_source: AtomicU32::new(1),
            threads: Mutex::default(),
        }))
    }

    /// Registers all guest maps for missing and minor faults. To be called before KVM has a slot of them and before
    /// anything touches them: a page that is mapped already never faults.
    pub fn register_guest_maps(&self) -> Result<(), FaultError> {
        let _admin = lock(&self.admin);
        if self.shared.source(SourceId::GUEST).is_some() {
            return Err(FaultError::Registered);
        }
        let uffd = Userfault::open()?;
        let mut mappings = Vec::new();
        for block in self.shared.ram.blocks() {
            let spec = block.spec();
            let base = block.guest_map() as u64;
            if spec.page_size == PageSize::Huge2M && !uffd.has_hugetlb() {
                return Err(UffdError::Features(vec!["MISSING_HUGETLBFS and MINOR_HUGETLBFS"]).into());
            }
            let calls = uffd.register(base, spec.size, Mode::MISSING_MINOR)?;
            if spec.page_size == PageSize::Base && !calls.zeropage() {
                return Err(UffdError::Calls { base, len: spec.size, lacking: vec!["UFFDIO_ZEROPAGE"] }.into());
            }
            mappings.push(Mapping { base, len: spec.size, block: spec.id, offset: 0 });
        }
        mappings.sort_by_key(|m| m.base);
        self.shared.waiters.open(SourceId::GUEST);
        self.add(Source::new(SourceId::GUEST, "guest", uffd, mappings))
    }

    /// Ends that. To be called when nothing is left to receive: a page that lacks would read as zeros, so that is an
    /// error. Pages that were received and never placed appear when they are touched.
    pub fn unregister_guest_maps(&self) -> Result<(), FaultError> {
        let _admin = lock(&self.admin);
        for block in &self.shared.blocks {
            let missing = block.states.pages() - block.states.received_count();
            if missing > 0 {
                return Err(FaultError::Incomplete { block: block.id(), missing });
            }
        }
        self.unregister()
    }

    /// Ends that although nothing was said of any page: everything was received before the switch, by somebody who did
    /// not tell this service.
    pub fn unregister_untouched(&self) -> Result<(), FaultError> {
        let _admin = lock(&self.admin);
        self.unregister()
    }

    fn unregister(&self) -> Result<(), FaultError> {
        match self.remove(SourceId::GUEST) {
            Err(FaultError::NoSource(_)) => Err(FaultError::NotRegistered),
            result => result,
        }
    }

    /// Whether the guest maps are registered: pages of them may have to come still, and none may be given back.
    pub fn serves_guest_maps(&self) -> bool {
        self.shared.source(SourceId::GUEST).is_some()
    }

    /// The page states of a block.
    pub fn states(&self, block: BlockId) -> Option<&PageStates> {
        self.shared.block(block).ok().map(|b| &b.states)
    }

    /// Whether all pages of all blocks are received.
    pub fn is_complete(&self) -> bool {
        self.shared.blocks.iter().all(|b| b.states.is_complete())
    }

    /// Whether anybody may be asking for pages.
    pub fn has_started(&self) -> bool {
        lock(&self.threads).started
    }

    /// Starts the thread `wherry-fault`.
    pub fn start(&self, requester: Arc<dyn Requester>) -> Result<(), FaultError> {
        let mut threads = lock(&self.threads);
        if threads.started || threads.stopped {
            return Err(FaultError::Started(if threads.stopped { "stopped" } else { "started" }));
        }
        *write(&self.shared.requester) = Some(requester);
        let shared = self.shared.clone();
        threads.running.push(spawn("wherry-fault", move || serve::run(&shared))?);
        threads.started = true;
        Ok(())
    }

    /// Starts the thread `wherry-map`, which places what was whole before the switch, while faults go first. It ends with
    /// that. To be called after `Run`.
    pub fn start_mapper(&self) -> Result<(), FaultError> {
        let mut threads = lock(&self.threads);
        if threads.stopped {
            return Err(FaultError::Started("stopped"));
        }
        let shared = self.shared.clone();
        threads.running.push(spawn("wherry-map", move || crate::mapper::run(&shared))?);
        Ok(())
    }

    /// Replaces the requester: later faults are requested there.
    pub fn set_requester(&self, requester: Arc<dyn Requester>) {
        *write(&self.shared.requester) = Some(requester);
    }

    /// After a lost link: replaces the requester, makes every requested page one that can be requested again, and
    /// requests those that somebody waits for. Pages of dead channels are to be given up (`unclaim`) before. Returns
    /// how many pages were requested.
    pub fn recover(&self, requester: Arc<dyn Requester>) -> usize {
        self.set_requester(requester.clone());
        let mut wanted = Vec::new();
        for block in &self.shared.blocks {
            for page in block.states.rewind_requests() {
                let first = self.shared.waiters.first((block.id(), block.states.unit_of(page).start));
                self.shared.want(block, page, first.unwrap_or(SourceId::GUEST), &mut wanted);
            }
        }
        if !wanted.is_empty() {
            requester.request(&wanted);
        }
        wanted.len()
    }

    /// Neighbours of a page that somebody touched, in case they are touched next: the runs of them, ascending, for which the
    /// caller is to ask, because nobody has. None in blocks of large pages, where the rest of a unit is wanted with it.
    pub fn prefetch(&self, block: BlockId, pages: Range<u64>) -> Vec<Range<u64>> {
        let Ok(faults) = self.shared.block(block) else { return Vec::new() };
        if faults.unit() != GRANULE {
            return Vec::new();
        }
        let runs = faults.states.prefetch_range(pages);
        self.shared.prefetched.fetch_add(runs.iter().map(|run| run.end - run.start).sum(), Ordering::Relaxed);
        runs
    }

    /// Keeps the way of a block as it is while the caller claims, fills and hands over pages. Waits while it changes.
    pub fn fill(&self, block: BlockId) -> Result<Fill<'_>, FaultError> {
        Ok(self.shared.block(block)?.fill())
    }

    /// The way of a block.
    pub fn way(&self, block: BlockId) -> Result<Way, FaultError> {
        Ok(self.shared.block(block)?.gate.way())
    }

    /// Changes the way of a block when the fills that run have ended.
    ///
    /// To copy: pages that are in memory and not received are taken out, so that another process finds no stale page;
    /// [`FaultError::StillData`] if somebody keeps them there. In place: refused while another process maps the block.
    pub fn set_way(&self, block: BlockId, way: Way) -> Result<(), FaultError> {
        let _admin = lock(&self.admin);
        let faults = self.shared.block(block)?;
        let sharer = read(&self.shared.sources).values().find(|s| !s.is_guest() && s.maps(block)).cloned();
        if let (Way::InPlace, Some(sharer)) = (way, sharer) {
            return Err(FaultError::InPlaceShared { name: sharer.name.clone(), block });
        }
        faults.gate.change(block, way, FILLS_LIMIT, || faults.convert(way))
    }

    /// Adds the faults of another process: a userfaultfd that it registered (for missing faults) and handed over, and
    /// what its addresses mean. All blocks in the table must be received by copy, or be complete.
    pub fn add_source(&self, name: &str, uffd: Userfault, mappings: Vec<Mapping>) -> Result<SourceId, FaultError> {
        let _admin = lock(&self.admin);
        let mappings = check_mappings(&self.shared.ram, name, mappings)?;
        for mapping in &mappings {
            let block = self.shared.block(mapping.block)?;
            if block.gate.way() == Way::InPlace && !block.states.is_complete() {
                return Err(FaultError::InPlaceShared { name: name.into(), block: mapping.block });
            }
        }
        let id = SourceId(self.next_source.fetch_add(1, Ordering::Relaxed));
        self.add(Source::new(id, name, uffd, mappings))?;
        Ok(id)
    }

    /// Removes a source, also one whose process has gone or that is quarantined. Who waits there is woken (and waits
    /// again unless its process has unregistered), its descriptor is closed when this returns. Pages it made us ask for
    /// arrive nevertheless.
    pub fn remove_source(&self, id: SourceId) -> Result<(), FaultError> {
        if id == SourceId::GUEST {
            return Err(FaultError::NoSource(id));
        }
        let _admin = lock(&self.admin);
        self.remove(id)
    }

    fn add(&self, source: Source) -> Result<(), FaultError> {
        let (id, source) = (source.id, Arc::new(source));
        write(&self.shared.sources).insert(id, source.clone());
        self.shared.watch(&source).inspect_err(|_| {
            write(&self.shared.sources).remove(&id);
        })
    }

    fn remove(&self, id: SourceId) -> Result<(), FaultError> {
        let source = write(&self.shared.sources).remove(&id).ok_or(FaultError::NoSource(id))?;
        self.shared.close(&source);
        Ok(())
    }

    /// How many units (pages, in blocks of base pages) somebody waits for.
    pub fn waiting(&self) -> usize {
        self.shared.waiters.count()
    }

    /// What happened since the last call that an operator should hear of, oldest first.
    pub fn take_troubles(&self) -> Vec<Trouble> {
        std::mem::take(&mut *lock(&self.shared.troubles))
    }

    /// The figures so far. They are taken while faults go on: one that is served just now may be in some of them only.
    pub fn statistics(&self) -> Statistics {
        let shared = &self.shared;
        let sources: Vec<_> = read(&shared.sources).values().cloned().collect();
        Statistics {
            sources: sources.iter().map(|s| s.counters.statistics(s.id, &s.name)).collect(),
            largest_stall: Duration::from_nanos(shared.largest_stall.load(Ordering::Relaxed)),
            prefetched: shared.prefetched.load(Ordering::Relaxed),
            prefetch_hits: shared.prefetch_hits.load(Ordering::Relaxed),
            background_pages: shared.background_pages.load(Ordering::Relaxed),
            punched_pages: shared.punched_pages.load(Ordering::Relaxed),
            replaced_pages: shared.replaced_pages.load(Ordering::Relaxed),
        }
    }

    /// Ends the threads, removes all sources and unregisters the guest maps.
    ///
    /// If pages still lack, those who wait for them wake up and find zeros: a VM that is given up must be kept from
    /// running before (its vCPU threads told to leave KVM_RUN).
    pub fn stop(&self) {
        let running = {
            let mut threads = lock(&self.threads);
            threads.stopped = true;
            std::mem::take(&mut threads.running)
        };
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Only an overflow can fail, and then the event is there.
        let _ = rustix::io::write(self.shared.kick.as_fd(), &1u64.to_ne_bytes());
        for thread in running {
            // A requester may stop the service from the thread itself.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
        let _admin = lock(&self.admin);
        let ids: Vec<_> = read(&self.shared.sources).keys().copied().collect();
        for id in ids {
            let _ = self.remove(id);
        }
        *write(&self.shared.requester) = None;
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, FaultError> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(run)
        .map_err(|source| FaultError::Os { what: "starting a fault thread", source })
}

/// Bytes of a range of granules.
pub(crate) fn bytes(pages: &Range<u64>) -> Range<u64> {
    pages.start * GRANULE..pages.end * GRANULE
}
