//! Putting received memory where it belongs, before the VM runs here.
//!
//! Bytes go from the socket straight into the engine map. Holes stay holes: a zero extent frees what is allocated under
//! it and touches nothing else.
#![expect(
    unsafe_code,
    reason = "names guest memory to the kernel by address, and fills zeros into parts of huge pages"
)]

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::mm::Advice;
use wherry_fault::{FaultService, Way};
use wherry_memory::{Block, BlockId, GRANULE, MemoryError, PageSize, Ram};
use wherry_state::{Piece, StateStream};
use wherry_stream::message::UnitState;
use wherry_stream::{Channel, Extent, ExtentKind, FrameReader, IoRange};

use crate::dirty::Known;
use crate::error::Cause;

/// The memory of the machine that is being received.
pub(crate) struct Place {
    ram: Arc<Ram>,
    /// What has been received with content, for each block: those pages are allocated.
    known: Vec<Known>,
    pub(crate) normal: AtomicU64,
    pub(crate) zero: AtomicU64,
    /// Units whose state comes in streams.
    streams: Vec<Arc<dyn StateStream>>,
    /// The guest runs, or is about to: a page is claimed before it is touched.
    faults: OnceLock<Arc<FaultService>>,
}

impl Place {
    pub(crate) fn new(ram: Arc<Ram>, streams: Vec<Arc<dyn StateStream>>) -> Self {
        let known = ram.blocks().iter().map(|b| Known::new(b.pages())).collect();
        let (normal, zero) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { ram, known, normal, zero, streams, faults: OnceLock::new() }
    }

    /// From now on the guest may touch its memory.
    pub(crate) fn follow(&self, faults: Arc<FaultService>) {
        // It is said once.
        let _ = self.faults.set(faults);
    }

    pub(crate) fn is_following(&self) -> bool {
        self.faults.get().is_some()
    }

    /// Gives a piece of state to its unit.
    pub(crate) fn take_state(&self, state: UnitState) -> Result<(), Cause> {
        let of = |stream: &&Arc<dyn StateStream>| {
            let id = stream.id();
            (&id.name, id.instance) == (&state.unit, state.instance)
        };
        let Some(stream) = self.streams.iter().find(of) else {
            let unit: String = state.unit.chars().take(100).collect();
            let what = format!("a piece of state of unit {unit:?}[{}], which has no stream here", state.instance);
            return Err(Cause::Protocol { peer: "source", what });
        };
        let piece = Piece { offset: state.offset, bytes: state.bytes };
        stream.write(piece).map_err(|source| Cause::unit(&**stream, source))
    }

    /// Waits until the units have taken what came.
    pub(crate) fn flush_state(&self) -> Result<(), Cause> {
        let flush = |stream: &Arc<dyn StateStream>| stream.flush().map_err(|source| Cause::unit(&**stream, source));
        self.streams.iter().try_for_each(flush)
    }

    /// Takes the content of a pages frame from the channel into memory.
    pub(crate) fn receive(&self, channel: &mut Channel, extents: &[Extent]) -> Result<(), Cause> {
        self.receive_from(&mut channel.reader, extents)
    }

    pub(crate) fn receive_from(&self, reader: &mut FrameReader, extents: &[Extent]) -> Result<(), Cause> {
        if let Some(faults) = self.faults.get() {
            return self.receive_following(reader, extents, faults);
        }
        let mut ranges = Vec::with_capacity(extents.len());
        let (mut normal, mut zero) = (0, 0);
        for extent in extents {
            let (index, block) = self.block(extent)?;
            let bytes = extent.range();
            let base = block.engine_range(bytes.start, bytes.end.saturating_sub(bytes.start))?;
            match extent.kind {
                ExtentKind::Data => {
                    self.prepare(index, block, extent.first..extent.first + u64::from(extent.count), base);
                    // SAFETY: the check above says that it is inside the engine map, which stays mapped as long as the
                    // block; nobody has a reference into it.
                    ranges.push(unsafe { IoRange::new(base, extent.bytes() as usize) });
                    normal += u64::from(extent.count);
                }
                ExtentKind::Zero => {
                    clear(block, bytes)?;
                    zero += u64::from(extent.count);
                }
            }
        }
        if !ranges.is_empty() {
            reader.read_bulk(&ranges).map_err(|source| Cause::Stream { doing: "receiving pages", source })?;
        }
        self.normal.fetch_add(normal, Ordering::Relaxed);
        self.zero.fetch_add(zero, Ordering::Relaxed);
        Ok(())
    }

    /// As [`Self::receive_from`], with a guest that may touch any page at any time.
    fn receive_following(
        &self,
        reader: &mut FrameReader,
        extents: &[Extent],
        faults: &FaultService,
    ) -> Result<(), Cause> {
        let failed = |e: wherry_fault::FaultError| Cause::Faults(e.to_string());
        // While they are held, the way in which pages are placed does not change.
        let mut fills = BTreeMap::new();
        let mut claims = Claims { faults, runs: Vec::new() };
        // In the order of the content: where it goes, or how much of it is read away.
        let mut parts: Vec<(Option<*mut u8>, u64)> = Vec::new();
        let mut zero = 0;
        for extent in extents {
            let (index, block) = self.block(extent)?;
            let bytes = extent.range();
            let base = block.engine_range(bytes.start, bytes.end.saturating_sub(bytes.start))?;
            let id = block.spec().id;
            let Some(states) = faults.states(id) else { continue };
            let way = match fills.entry(id.0) {
                Entry::Vacant(entry) => entry.insert(faults.fill(id).map_err(failed)?).way(),
                Entry::Occupied(entry) => entry.get().way(),
            };
            let pages = extent.first..extent.first + u64::from(extent.count);
            let mut next = pages.start;
            let won = states.claim_range(pages.clone());
            let first = claims.runs.len();
            claims.runs.extend(won.iter().map(|run| (id, run.clone(), Vec::new())));
            if extent.kind == ExtentKind::Zero {
                for run in won {
                    // What precopy brought is old: nobody sees it yet, and nobody will.
                    clear(block, run.start * GRANULE..run.end * GRANULE)?;
                    zero += run.end - run.start;
                    faults.received_zero(id, run).map_err(failed)?;
                }
                claims.runs.truncate(first);
                continue;
            }
            for (_, run, staged) in &mut claims.runs[first..] {
                let bytes = (run.end - run.start) * GRANULE;
                let at = match way {
                    Way::InPlace => {
                        let at = base.wrapping_add(((run.start - pages.start) * GRANULE) as usize);
                        self.prepare(index, block, run.clone(), at);
                        at
                    }
                    Way::Copy => {
                        staged.resize(bytes as usize, 0);
                        staged.as_mut_ptr()
                    }
                };
                parts.push((None, (run.start - next) * GRANULE));
                parts.push((Some(at), bytes));
                next = run.end;
            }
            parts.push((None, (pages.end - next) * GRANULE));
        }
        parts.retain(|(_, len)| *len > 0);
        let away = parts.iter().filter(|(at, _)| at.is_none()).map(|(_, len)| *len).max().unwrap_or(0);
        let mut scratch = vec![0; away as usize];
        let scratch = scratch.as_mut_ptr();
        let ranges: Vec<_> = parts
            .iter()
            // SAFETY: either inside the engine map, claimed by this thread, or inside scratch or staging memory, which lives
            // until this function ends and into which nobody has a reference.
            .map(|(at, len)| unsafe { IoRange::new(at.unwrap_or(scratch), *len as usize) })
            .collect();
        if !ranges.is_empty() {
            reader.read_bulk(&ranges).map_err(|source| Cause::Stream { doing: "receiving pages", source })?;
        }
        let normal: u64 = claims.runs.iter().map(|(_, run, _)| run.end - run.start).sum();
        for (id, run, staged) in &claims.runs {
            match staged.is_empty() {
                true => faults.received(*id, run.clone()).map_err(failed)?,
                false => faults.received_copy(*id, run.clone(), staged).map_err(failed)?,
            }
        }
        claims.runs.clear();
        self.normal.fetch_add(normal, Ordering::Relaxed);
        self.zero.fetch_add(zero, Ordering::Relaxed);
        Ok(())
    }

    fn block(&self, extent: &Extent) -> Result<(usize, &Block), Cause> {
        let id = BlockId(extent.block);
        match self.ram.blocks().iter().enumerate().find(|(_, b)| b.spec().id == id) {
            Some((index, block)) => Ok((index, block)),
            None => {
                Err(Cause::Protocol { peer: "source", what: format!("pages for RAM block {id}, which there is not") })
            }
        }
    }

    /// Allocates fresh pages in one call: cheaper than a fault for each in the middle of the copy. It may fail; the copy
    /// faults them in then.
    fn prepare(&self, index: usize, block: &Block, pages: Range<u64>, base: *mut u8) {
        let count = pages.end - pages.start;
        let known = &self.known[index];
        if known.split(pages.clone()) == (pages.end, true) {
            return;
        }
        known.insert(pages);
        if block.spec().page_size == PageSize::Base && count > 1 {
            let bytes = (count * GRANULE) as usize;
            // SAFETY: populating changes no content, and the range is inside the engine map.
            let _ = unsafe { rustix::mm::madvise(base.cast(), bytes, Advice::LinuxPopulateWrite) };
        }
    }
}

/// What a channel has claimed for one frame, with the staged bytes of what is placed by copy. What is still in it when it is
/// dropped, because something failed, is given up unless it is published: the next link may bring it.
struct Claims<'a> {
    faults: &'a FaultService,
    runs: Vec<(BlockId, Range<u64>, Vec<u8>)>,
}

impl Drop for Claims<'_> {
    fn drop(&mut self) {
        for (id, run, _) in self.runs.drain(..) {
            if let Some(states) = self.faults.states(id) {
                run.for_each(|page| {
                    // Who waits for it is asked for again with the next link: its channel has ended.
                    states.unclaim(page);
                });
            }
        }
    }
}

/// Makes a range read as zeros, without allocating anything.
fn clear(block: &Block, range: std::ops::Range<u64>) -> Result<(), MemoryError> {
    let id = block.spec().id;
    // What is freed is no longer there for the next step of the iterator, and that is fine: it only goes forward.
    for run in block.data_runs(range) {
        let run = run.map_err(|source| MemoryError::Os { what: "looking for allocated pages", id, source })?;
        let unit = block.spec().page_size.bytes();
        let whole = run.start.next_multiple_of(unit)..run.end / unit * unit;
        if whole.start >= whole.end {
            zero_fill(block, run)?;
            continue;
        }
        block.punch(whole.clone())?;
        // Parts of huge pages at the ends.
        zero_fill(block, run.start..whole.start)?;
        zero_fill(block, whole.end..run.end)?;
    }
    Ok(())
}

fn zero_fill(block: &Block, range: std::ops::Range<u64>) -> Result<(), MemoryError> {
    if range.start < range.end {
        let at = block.engine_range(range.start, range.end - range.start)?;
        // SAFETY: inside the engine map. Nothing else writes these pages: this channel has them in this round.
        unsafe { at.write_bytes(0, (range.end - range.start) as usize) };
    }
    Ok(())
}

const _: () = assert!(wherry_stream::GRANULE == GRANULE);

#[cfg(test)]
mod tests {
    use super::*;
    use wherry_memory::BlockSpec;

    #[test]
    fn clearing_frees_what_is_allocated_and_leaves_holes_alone() {
        let spec = BlockSpec { id: BlockId(0), guest_base: 0, size: 1 << 20, page_size: PageSize::Base };
        let block = Block::create(spec).unwrap();
        let at = block.engine_range(0, 1 << 20).unwrap();
        // SAFETY: inside the block, and nobody else uses it.
        unsafe { at.add(4096).write_bytes(7, 3 * 4096) };
        clear(&block, 0..8192).unwrap();
        clear(&block, 1 << 19..1 << 20).unwrap();
        let runs: Vec<_> = block.data_runs(0..1 << 20).map(Result::unwrap).collect();
        assert_eq!(runs, std::iter::once(8192..16384).collect::<Vec<_>>());
    }

    #[test]
    fn a_frame_that_fails_half_way_leaves_no_page_claimed() {
        use std::os::unix::net::UnixStream;
        use std::time::Duration;
        use wherry_fault::PageState;
        use wherry_stream::{ChannelKind, Connection, Greeting, Hello};

        let spec = BlockSpec { id: BlockId(0), guest_base: 0, size: 1 << 20, page_size: PageSize::Base };
        let ram = Arc::new(Ram::create(&[spec]).unwrap());
        let extent = |block, first, kind| Extent { block, kind, first, count: 2 };
        let good = extent(0, 4, ExtentKind::Data);
        // The last part names a block there is not, or lies beyond its block.
        let frames = [
            (vec![good, extent(9, 0, ExtentKind::Data)], 4),
            (vec![extent(0, 8, ExtentKind::Zero), good, extent(0, 300, ExtentKind::Zero)], 2),
        ];
        for (extents, pages_sent) in frames {
            let faults = FaultService::new(ram.clone()).unwrap();
            let place = Place::new(ram.clone(), vec![]);
            place.follow(faults.clone());
            let (near, far) = UnixStream::pair().unwrap();
            let deadline = std::time::Instant::now() + Duration::from_secs(5);
            let table = extents.clone();
            let source = std::thread::spawn(move || {
                let near = Connection::from_unix(near, "destination").unwrap();
                let hello = Hello { kind: ChannelKind::Data, index: 0, attempt: [1; 16] };
                let mut channel = hello.open(near, deadline).unwrap();
                let content = vec![7u8; 4096 * pages_sent];
                channel.writer.set_deadline(Some(deadline));
                // SAFETY: the bytes live until the call returns.
                let range = unsafe { IoRange::new(content.as_ptr().cast_mut(), content.len()) };
                let _ = channel.writer.write_pages(&table, &[range]);
            });
            let mut channel = Greeting::read(Connection::from_unix(far, "source").unwrap(), deadline)
                .and_then(Greeting::accept)
                .unwrap();
            channel.reader.read_frame().unwrap();
            assert!(place.receive(&mut channel, &extents).is_err(), "{extents:?} was taken");
            let states = faults.states(BlockId(0)).unwrap();
            for page in 0..256 {
                let state = states.state(page);
                assert!(matches!(state, PageState::Missing | PageState::Received), "page {page}: {state:?}");
                assert!(state == PageState::Missing || (8..10).contains(&page), "page {page} was published");
            }
            source.join().unwrap();
        }
    }

    #[test]
    fn clearing_a_part_of_a_huge_page_keeps_the_rest() {
        let spec = BlockSpec { id: BlockId(0), guest_base: 0, size: 4 << 20, page_size: PageSize::Huge2M };
        let block = match Block::create(spec) {
            Ok(block) => block,
            // No huge pages on this machine.
            Err(_) => return,
        };
        let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").unwrap();
        if free.trim().parse::<u32>().unwrap() < 2 {
            return;
        }
        let at = block.engine_range(0, 4 << 20).unwrap();
        // SAFETY: inside the block, and nobody else uses it.
        unsafe { at.write_bytes(7, 4 << 20) };
        clear(&block, 4096..(2 << 20) + 8192).unwrap();
        let mut byte = [0];
        for (offset, value) in [(0, 7), (4096, 0), (2 << 20, 0), ((2 << 20) + 8192, 7)] {
            block.read_at(offset, &mut byte).unwrap();
            assert_eq!(byte[0], value, "offset {offset}");
        }
    }
}
