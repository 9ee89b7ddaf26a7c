//! One round of precopy: which pages go, in which order, and how one channel sends its share of them.
//!
//! The set of a round is cut into chunks, and every channel takes the next chunk when it has sent one, so a slow
//! channel takes fewer. A chunk goes over one channel and a page is in one chunk, so within a round no page is sent
//! twice; the rounds of a channel are separated by a barrier that the receiver acknowledges.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use wherry_memory::{Block, BlockId, FreePages, GRANULE, MemoryError, PageSet, PageSize};
use wherry_stream::message::About;
use wherry_stream::{Channel, Extent, ExtentKind, Frame, IoRange, MAX_EXTENTS};

use super::streams::Streams;
use crate::bandwidth::Bucket;
use crate::dirty::{Dirty, Known, Tracker};
use crate::error::Cause;
use crate::journey::Journey;
use crate::machine::Machine;
use crate::zero;

/// Granules of a chunk: 4 MiB, a multiple of 64 granules as dirty logs want it.
pub(crate) const CHUNK_PAGES: u64 = 1024;
/// Content of a frame, at most. Larger ones save little, and the receiver's caches hold this much.
const FRAME_BYTES: u64 = 512 << 10;
/// The kernel takes so many ranges in one call, one of which is the frame's head.
const FRAME_EXTENTS: usize = if MAX_EXTENTS < 1000 { MAX_EXTENTS } else { 1000 };

/// What a round has sent so far.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) normal: AtomicU64,
    pub(crate) zero: AtomicU64,
    /// Pages of the set that turned out to be holes that were never sent.
    pub(crate) holes: AtomicU64,
    /// Pages of the set that the guest does not use.
    pub(crate) free: AtomicU64,
}

/// A round, shared by the channels.
pub(crate) struct Round {
    pub(crate) number: u32,
    pub(crate) set: Dirty,
    pub(crate) counters: Counters,
    machine: Arc<dyn Machine>,
    known: Arc<Vec<Known>>,
    next: AtomicUsize,
    /// In postcopy, the chunks that a channel has taken; `next` then is where the last fault was.
    taken: Option<Vec<AtomicBool>>,
    /// For each block, the number of its first chunk; and the number of all chunks.
    first: Vec<usize>,
    end: usize,
    /// Whether the guest runs: pages are re-armed before they are read, and the bandwidth limit holds.
    live: bool,
    stop: AtomicBool,
    /// Pages are freed when they have been handed to the kernel: for each chunk, whether that is so. Whoever reads a chunk
    /// holds its lock.
    released: Option<Vec<RwLock<bool>>>,
    /// State of units that goes with it.
    pub(crate) streams: Option<Streams>,
    /// In the first round: knows pages that need not go.
    free: Option<Arc<dyn FreePages>>,
    journey: Journey,
    bandwidth: Option<u64>,
    bucket: Arc<Bucket>,
}

/// What does not change from round to round.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) machine: Arc<dyn Machine>,
    pub(crate) known: Arc<Vec<Known>>,
    pub(crate) journey: Journey,
    pub(crate) bandwidth: Option<u64>,
    pub(crate) bucket: Arc<Bucket>,
    /// Whom messages on data channels are about.
    pub(crate) about: About,
}

impl Round {
    pub(crate) fn new(shared: &Shared, number: u32, set: Dirty, live: bool) -> Self {
        let mut end = 0;
        let first = set
            .0
            .iter()
            .map(|s| {
                let first = end;
                end += s.limit().div_ceil(CHUNK_PAGES) as usize;
                first
            })
            .collect();
        Self {
            number,
            set,
            counters: Counters::default(),
            machine: shared.machine.clone(),
            known: shared.known.clone(),
            next: AtomicUsize::new(0),
            taken: None,
            first,
            end,
            live,
            stop: AtomicBool::new(false),
            released: None,
            streams: None,
            free: None,
            journey: shared.journey.clone(),
            bandwidth: shared.bandwidth,
            bucket: shared.bucket.clone(),
        }
    }

    /// With the state that units can give now: while the guest runs, or at rest.
    pub(crate) fn with_streams(self, shared: &Shared) -> Self {
        Self { streams: Some(Streams::new(&*self.machine, &shared.about, self.live)), ..self }
    }

    /// The first round, without the pages that the guest says it does not use.
    pub(crate) fn without(self, free: Option<Arc<dyn FreePages>>) -> Self {
        Self { free, ..self }
    }

    /// The pages that follow the switch: sent from where the guest faults on, with a word for every one of them, because
    /// somebody may be waiting.
    ///
    /// With `release`, memory is freed as it is sent.
    pub(crate) fn following(shared: &Shared, number: u32, set: Dirty, release: bool) -> Self {
        let round = Self::new(shared, number, set, false);
        Self {
            taken: Some((0..round.end).map(|_| AtomicBool::new(false)).collect()),
            released: release.then(|| (0..round.end).map(|_| RwLock::new(false)).collect()),
            ..round
        }
    }

    /// Ends a round of precopy early: what no channel has taken yet is not sent. Answers these pages.
    pub(crate) fn cut(&self) -> Dirty {
        let from = self.next.swap(self.end, Ordering::SeqCst);
        let mut left = Dirty::none(self.machine.ram());
        for (index, set) in self.set.0.iter().enumerate() {
            let start = from.saturating_sub(self.first[index]) as u64 * CHUNK_PAGES;
            for run in set.runs(start.min(set.limit())..set.limit()) {
                left.0[index].insert_range(run);
            }
        }
        left
    }

    /// Whether it is what follows the switch.
    pub(crate) fn follows(&self) -> bool {
        self.taken.is_some()
    }

    /// The guest needs this page: what lies around it goes first.
    pub(crate) fn steer(&self, block: BlockId, page: u64) {
        if let Some(index) = self.machine.ram().blocks().iter().position(|b| b.spec().id == block) {
            self.next.store(self.first[index] + (page / CHUNK_PAGES) as usize, Ordering::Relaxed);
        }
    }

    /// Sends pages that were asked for, at once. They may be sent again with the rest; whichever comes first is kept.
    pub(crate) fn answer(&self, channel: &mut Channel, extent: &Extent) -> Result<(), Cause> {
        let wrong = |what: String| Cause::Protocol { peer: "destination", what };
        let mut blocks = self.machine.ram().blocks().iter().enumerate();
        let Some((index, block)) = blocks.find(|(_, b)| b.spec().id.0 == extent.block) else {
            return Err(wrong(format!("it asks for pages of RAM block {}, which there is not", extent.block)));
        };
        let end = extent.first.saturating_add(extent.count.into());
        if end > block.pages() {
            let (first, pages) = (extent.first, block.pages());
            return Err(wrong(format!(
                "it asks for pages {first} to {end} of RAM block {}, which has {pages}",
                extent.block
            )));
        }
        if u64::from(extent.count) > CHUNK_PAGES {
            return Err(wrong(format!("it asks for {} pages at once; {CHUNK_PAGES} are possible", extent.count)));
        }
        let mut batch = Batch { urgent: true, ..Batch::default() };
        let mut page = extent.first;
        while page < end {
            let chunk = page / CHUNK_PAGES;
            let part = page..end.min((chunk + 1) * CHUNK_PAGES);
            page = part.end;
            let lock = self.released.as_ref().map(|r| &r[self.first[index] + chunk as usize]);
            let gone = lock.map(|lock| lock.read().unwrap_or_else(PoisonError::into_inner));
            // What is freed is on its way already; here are zeros now.
            if gone.as_ref().is_none_or(|gone| !**gone) {
                self.send_run(channel, &mut batch, block, index, part)?;
                // While the lock is held: after it the bytes may go.
                self.flush(channel, &mut batch)?;
            }
        }
        Ok(())
    }

    /// Makes all channels end their part soon.
    pub(crate) fn give_up(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Pages dealt with so far.
    pub(crate) fn done(&self) -> u64 {
        let c = &self.counters;
        [&c.normal, &c.zero, &c.holes, &c.free].iter().map(|n| n.load(Ordering::Relaxed)).sum()
    }

    /// Pages sent with content so far.
    pub(crate) fn normal(&self) -> u64 {
        self.counters.normal.load(Ordering::Relaxed)
    }

    /// Pages found to be zero so far.
    pub(crate) fn zero(&self) -> u64 {
        self.counters.zero.load(Ordering::Relaxed)
    }

    /// Pages left out because the guest does not use them so far.
    pub(crate) fn free(&self) -> u64 {
        self.counters.free.load(Ordering::Relaxed)
    }

    /// Sends this channel's share, and the barrier.
    pub(crate) fn send(&self, channel: &mut Channel) -> Result<(), Cause> {
        let mut batch = Batch::default();
        let result = self.send_share(channel, &mut batch);
        if result.is_err() {
            self.give_up();
        }
        result
    }

    fn send_share(&self, channel: &mut Channel, batch: &mut Batch) -> Result<(), Cause> {
        if let Some(streams) = &self.streams {
            streams.send(channel, &|bytes| self.hold_back(bytes, self.limit(batch)))?;
        }
        let mut used = None;
        while let Some((index, range)) = self.next_chunk() {
            let block = &self.machine.ram().blocks()[index];
            let set = self.used(&mut used, block, index, range.clone());
            if self.live {
                Tracker::rearm(&*self.machine, block, range.clone(), set)?;
            }
            for run in set.runs(range.clone()) {
                self.send_run(channel, batch, block, index, run)?;
            }
            self.release(channel, batch, block, index, range)?;
            if self.stop.load(Ordering::Relaxed) {
                return Err(Cause::Cancelled);
            }
        }
        self.flush(channel, batch)?;
        let doing = "sending the end of a round";
        channel.writer.write_round_end(self.number).map_err(|source| Cause::Stream { doing, source })
    }

    /// The set, in this range without what the guest does not use. It is looked up once: what is left out is neither
    /// re-armed nor sent, and what is named later is sent. `scratch` is kept by the caller.
    fn used<'a>(
        &'a self,
        scratch: &'a mut Option<(usize, PageSet)>,
        block: &Block,
        index: usize,
        range: std::ops::Range<u64>,
    ) -> &'a PageSet {
        let whole = &self.set.0[index];
        // A huge page arrives whole, or not at all.
        let Some(free) = self.free.as_ref().filter(|_| block.spec().page_size == PageSize::Base) else { return whole };
        if scratch.as_ref().is_none_or(|(of, _)| *of != index) {
            *scratch = None;
        }
        let (_, set) = scratch.get_or_insert_with(|| (index, PageSet::new(whole.limit())));
        set.copy_range(whole, range.clone());
        self.counters.free.fetch_add(free.leave_out(block, range, set), Ordering::Relaxed);
        set
    }

    /// Frees a chunk that was sent, if that was asked for.
    fn release(
        &self,
        channel: &mut Channel,
        batch: &mut Batch,
        block: &Block,
        index: usize,
        pages: std::ops::Range<u64>,
    ) -> Result<(), Cause> {
        let Some(released) = &self.released else { return Ok(()) };
        self.flush(channel, batch)?;
        let chunk = self.first[index] + (pages.start / CHUNK_PAGES) as usize;
        let mut gone = released[chunk].write().unwrap_or_else(PoisonError::into_inner);
        block.punch(pages.start * GRANULE..pages.end * GRANULE)?;
        *gone = true;
        Ok(())
    }

    /// Frees what is not to be sent at all, if that was asked for.
    pub(crate) fn release_rest(&self) -> Result<(), Cause> {
        if self.released.is_none() {
            return Ok(());
        }
        for (block, set) in self.machine.ram().blocks().iter().zip(&self.set.0) {
            for chunk in 0..set.limit().div_ceil(CHUNK_PAGES) {
                let pages = chunk * CHUNK_PAGES..((chunk + 1) * CHUNK_PAGES).min(set.limit());
                if set.runs(pages.clone()).next().is_none() {
                    block.punch(pages.start * GRANULE..pages.end * GRANULE)?;
                }
            }
        }
        Ok(())
    }

    /// Waits until the receiver has everything that was sent on this channel.
    pub(crate) fn await_acknowledgement(&self, channel: &mut Channel) -> Result<(), Cause> {
        let result = acknowledged(channel, self.number);
        if result.is_err() {
            self.give_up();
        }
        result
    }

    /// The next chunk that has pages to send: index of its block, and its granules.
    fn next_chunk(&self) -> Option<(usize, std::ops::Range<u64>)> {
        loop {
            let chunk = self.take_chunk()?;
            let index = self.first.partition_point(|first| *first <= chunk) - 1;
            let start = (chunk - self.first[index]) as u64 * CHUNK_PAGES;
            let set = &self.set.0[index];
            let end = (start + CHUNK_PAGES).min(set.limit());
            let words = &set.words()[(start / 64) as usize..end.div_ceil(64) as usize];
            if words.iter().any(|w| *w != 0) {
                return Some((index, start..end));
            }
        }
    }

    fn take_chunk(&self) -> Option<usize> {
        let Some(taken) = &self.taken else {
            return Some(self.next.fetch_add(1, Ordering::Relaxed)).filter(|chunk| *chunk < self.end);
        };
        let from = self.next.load(Ordering::Relaxed) % self.end.max(1);
        let mut candidates = (from..self.end).chain(0..from);
        let chunk = candidates.find(|chunk| !taken[*chunk].swap(true, Ordering::Relaxed))?;
        // Unless a fault has moved it meanwhile.
        let _ = self.next.compare_exchange(from, chunk + 1, Ordering::Relaxed, Ordering::Relaxed);
        Some(chunk)
    }

    fn send_run(
        &self,
        channel: &mut Channel,
        batch: &mut Batch,
        block: &Block,
        index: usize,
        run: std::ops::Range<u64>,
    ) -> Result<(), Cause> {
        let known = &self.known[index];
        let mut page = run.start;
        while page < run.end {
            let (end, is_known) = known.split(page..run.end);
            if is_known {
                self.send_pages(channel, batch, block, page..end)?;
            } else {
                // Never sent, so perhaps a hole: the destination has one there, too, and reading would fill ours.
                let mut holes = end - page;
                let mut told = page;
                for data in block.data_runs(page * GRANULE..end * GRANULE) {
                    let data = data.map_err(|source| MemoryError::Os {
                        what: "looking for allocated pages",
                        id: block.spec().id,
                        source,
                    })?;
                    let data = (data.start / GRANULE).max(page)..data.end.div_ceil(GRANULE).min(end);
                    holes -= data.end - data.start;
                    known.insert(data.clone());
                    self.tell_hole(channel, batch, block, told..data.start)?;
                    told = data.end;
                    self.send_pages(channel, batch, block, data)?;
                }
                self.tell_hole(channel, batch, block, told..end)?;
                self.counters.holes.fetch_add(holes, Ordering::Relaxed);
            }
            page = end;
        }
        Ok(())
    }

    /// In precopy a hole that was never sent needs no word: there is one at the destination, too. In postcopy it is a page
    /// that the destination waits for.
    fn tell_hole(
        &self,
        channel: &mut Channel,
        batch: &mut Batch,
        block: &Block,
        pages: std::ops::Range<u64>,
    ) -> Result<(), Cause> {
        if !self.follows() || pages.is_empty() {
            return Ok(());
        }
        let count = (pages.end - pages.start).try_into().unwrap_or(u32::MAX);
        batch.extents.push(Extent { block: block.spec().id.0, kind: ExtentKind::Zero, first: pages.start, count });
        if batch.extents.len() >= FRAME_EXTENTS { self.flush(channel, batch) } else { Ok(()) }
    }

    #[expect(unsafe_code, reason = "looks at guest memory and names it to the kernel by address")]
    fn send_pages(
        &self,
        channel: &mut Channel,
        batch: &mut Batch,
        block: &Block,
        pages: std::ops::Range<u64>,
    ) -> Result<(), Cause> {
        let base = block.engine_range(pages.start * GRANULE, (pages.end - pages.start) * GRANULE)?;
        let at = |page: u64| base.wrapping_add(((page - pages.start) * GRANULE) as usize);
        // SAFETY: the granules are inside the engine map by the check above, which is mapped as long as the block.
        let is_zero = |page: u64| unsafe { zero::is_zero(at(page)) };
        let (mut zeros, mut page) = (0, pages.start);
        let limit = self.frame_bytes(batch);
        while page < pages.end {
            let kind = if is_zero(page) { ExtentKind::Zero } else { ExtentKind::Data };
            let start = page;
            page += 1;
            let room = match kind {
                ExtentKind::Data => (limit.saturating_sub(batch.bytes) / GRANULE).max(1),
                ExtentKind::Zero => u64::MAX,
            };
            while page < pages.end && page - start < room && is_zero(page) == (kind == ExtentKind::Zero) {
                page += 1;
            }
            let bytes = (page - start) * GRANULE;
            let extent = Extent {
                block: block.spec().id.0,
                kind,
                first: start,
                count: (page - start).try_into().unwrap_or(u32::MAX),
            };
            batch.extents.push(extent);
            match kind {
                ExtentKind::Zero => zeros += page - start,
                ExtentKind::Data => {
                    // SAFETY: inside the engine map; it stays mapped until the journey, which holds the block, ends.
                    batch.ranges.push(unsafe { IoRange::new(at(start), bytes as usize) });
                    batch.bytes += bytes;
                }
            }
            if batch.bytes >= limit || batch.extents.len() >= FRAME_EXTENTS {
                self.flush(channel, batch)?;
            }
        }
        self.counters.zero.fetch_add(zeros, Ordering::Relaxed);
        Ok(())
    }

    /// With a small limit, frames are small, so that the stream never pauses for long.
    fn frame_bytes(&self, batch: &Batch) -> u64 {
        match self.limit(batch) {
            Some(limit) => (limit / 50).clamp(GRANULE, FRAME_BYTES),
            None => FRAME_BYTES,
        }
    }

    /// The last pages, in the blackout, are not held back, nor is what a guest waits for.
    fn limit(&self, batch: &Batch) -> Option<u64> {
        let runs = self.live || self.follows();
        if runs && !batch.urgent { self.journey.bandwidth(self.bandwidth) } else { None }
    }

    /// Waits until so many bytes may go.
    fn hold_back(&self, bytes: u64, limit: Option<u64>) -> Result<(), Cause> {
        let mut wait = limit.map_or(Duration::ZERO, |rate| self.bucket.take(bytes, rate, Instant::now()));
        while !wait.is_zero() {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Cause::Cancelled);
            }
            let nap = wait.min(Duration::from_millis(20));
            std::thread::sleep(nap);
            wait -= nap;
        }
        Ok(())
    }

    fn flush(&self, channel: &mut Channel, batch: &mut Batch) -> Result<(), Cause> {
        if batch.extents.is_empty() {
            return Ok(());
        }
        self.hold_back(batch.bytes + 64, self.limit(batch))?;
        channel
            .writer
            .write_pages(&batch.extents, &batch.ranges)
            .map_err(|source| Cause::Stream { doing: "sending pages", source })?;
        self.counters.normal.fetch_add(batch.bytes / GRANULE, Ordering::Relaxed);
        batch.extents.clear();
        batch.ranges.clear();
        batch.bytes = 0;
        Ok(())
    }
}

/// What will go in one frame.
#[derive(Default)]
struct Batch {
    extents: Vec<Extent>,
    ranges: Vec<IoRange>,
    bytes: u64,
    /// A guest waits for these.
    urgent: bool,
}

fn acknowledged(channel: &mut Channel, number: u32) -> Result<(), Cause> {
    let doing = "waiting for the acknowledgement of a round";
    let protocol = |what: String| Cause::Protocol { peer: "destination", what };
    let frame = channel.reader.read_frame().map_err(|source| Cause::Stream { doing, source })?;
    let Frame::Ack(ack) = frame else {
        return Err(protocol(format!("{:?} on a data channel where an acknowledgement was due", frame.kind())));
    };
    let sent = channel.writer.stats();
    if ack.round != Some(number) {
        return Err(protocol(format!("it acknowledged round {:?}, not {number}", ack.round)));
    }
    if (ack.frames, ack.bytes, ack.checksum) != (sent.frames, sent.bytes, sent.checksum) {
        let detail = format!(
            "{}: sent {} frames, {} bytes, checksum {:#x}; arrived {}, {}, {:#x}",
            channel.writer.name(),
            sent.frames,
            sent.bytes,
            sent.checksum,
            ack.frames,
            ack.bytes,
            ack.checksum
        );
        return Err(Cause::Corrupt { what: "round", detail });
    }
    Ok(())
}
