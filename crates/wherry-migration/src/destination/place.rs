//! Putting received memory where it belongs, before the VM runs here.
//!
//! Bytes go from the socket straight into the engine map. Holes stay holes: a zero extent frees what is allocated under
//! it and touches nothing else.
#![expect(
    unsafe_code,
    reason = "names guest memory to the kernel by address, and fills zeros into parts of huge pages"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::Advice;
use wherry_memory::{Block, BlockId, GRANULE, MemoryError, PageSize, Ram};
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
}

impl Place {
    pub(crate) fn new(ram: Arc<Ram>) -> Self {
        let known = ram.blocks().iter().map(|b| Known::new(b.pages())).collect();
        Self { ram, known, normal: AtomicU64::new(0), zero: AtomicU64::new(0) }
    }

    /// Takes the content of a pages frame from the channel into memory.
    pub(crate) fn receive(&self, channel: &mut Channel, extents: &[Extent]) -> Result<(), Cause> {
        self.receive_from(&mut channel.reader, extents)
    }

    fn receive_from(&self, reader: &mut FrameReader, extents: &[Extent]) -> Result<(), Cause> {
        let mut ranges = Vec::with_capacity(extents.len());
        let (mut normal, mut zero) = (0, 0);
        for extent in extents {
            let (index, block) = self.block(extent)?;
            let bytes = extent.range();
            let base = block.engine_range(bytes.start, bytes.end.saturating_sub(bytes.start))?;
            match extent.kind {
                ExtentKind::Data => {
                    self.prepare(index, block, extent, base);
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
    fn prepare(&self, index: usize, block: &Block, extent: &Extent, base: *mut u8) {
        let pages = extent.first..extent.first + u64::from(extent.count);
        let known = &self.known[index];
        if known.split(pages.clone()) == (pages.end, true) {
            return;
        }
        known.insert(pages);
        if block.spec().page_size == PageSize::Base && extent.count > 1 {
            // SAFETY: populating changes no content, and the range is inside the engine map.
            let _ = unsafe { rustix::mm::madvise(base.cast(), extent.bytes() as usize, Advice::LinuxPopulateWrite) };
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
