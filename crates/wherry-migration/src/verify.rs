//! `--verify`: hashes of all RAM at the stop and before the start.
//!
//! Memory is hashed in chunks, so that a difference can be found without sending it: the source sends the hash of every
//! chunk, the destination compares, asks for the hashes of the pages of the first chunk that differs, and names the
//! page. Chunks of zeros, and holes, are not hashed. Bytes are read by `pread`: that allocates no hole, and needs no
//! reference to memory that a process gone wild might still write.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use wherry_memory::{Block, GRANULE, MemoryError, Ram};

/// Granules of a chunk.
pub(crate) const CHUNK_PAGES: u64 = 512;
const CHUNK_BYTES: u64 = CHUNK_PAGES * GRANULE;
/// Chunks a thread takes at a time.
const BATCH: usize = 32;

pub(crate) type ChunkDigest = [u8; 32];
/// Stands for a chunk, or a page, of zeros.
pub(crate) const ZEROS: ChunkDigest = [0; 32];

/// How many chunks a block has.
pub(crate) fn chunks(block: &Block) -> usize {
    block.spec().size.div_ceil(CHUNK_BYTES) as usize
}

fn chunk_range(block: &Block, chunk: u64) -> Range<u64> {
    let start = chunk.saturating_mul(CHUNK_BYTES).min(block.spec().size);
    start..(start + CHUNK_BYTES).min(block.spec().size)
}

fn failed(block: &Block) -> impl Fn(std::io::Error) -> MemoryError {
    let id = block.spec().id;
    move |source| MemoryError::Os { what: "reading memory to hash it", id, source }
}

fn digest(bytes: &[u8]) -> ChunkDigest {
    if bytes.iter().all(|b| *b == 0) { ZEROS } else { *blake3::hash(bytes).as_bytes() }
}

/// The hashes of all chunks of all blocks, in the order of `Ram::blocks`, computed by `threads` threads.
pub(crate) fn hash_ram(ram: &Ram, threads: usize) -> Result<Vec<Vec<ChunkDigest>>, MemoryError> {
    ram.blocks().iter().map(|block| hash_block(block, threads)).collect()
}

fn hash_block(block: &Block, threads: usize) -> Result<Vec<ChunkDigest>, MemoryError> {
    let mut digests = vec![ZEROS; chunks(block)];
    let next = AtomicUsize::new(0);
    let pieces: Vec<_> = digests.chunks_mut(BATCH).map(|piece| std::sync::Mutex::new(Some(piece))).collect();
    let work = || -> Result<(), MemoryError> {
        let mut buffer = vec![0; CHUNK_BYTES as usize];
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            let Some(piece) = pieces.get(n) else { return Ok(()) };
            let Some(piece) = crate::journey::lock(piece).take() else { continue };
            let first = (n * BATCH) as u64;
            let end = chunk_range(block, first + piece.len() as u64).start.max(chunk_range(block, first).start);
            let end = if n + 1 == pieces.len() { block.spec().size } else { end };
            let mut hashed_to = chunk_range(block, first).start;
            for run in block.data_runs(hashed_to..end) {
                let run = run.map_err(failed(block))?;
                let mut chunk = run.start.max(hashed_to) / CHUNK_BYTES;
                while chunk * CHUNK_BYTES < run.end {
                    let range = chunk_range(block, chunk);
                    if range.start >= hashed_to {
                        let bytes = &mut buffer[..(range.end - range.start) as usize];
                        block.read_at(range.start, bytes).map_err(failed(block))?;
                        piece[(chunk - first) as usize] = digest(bytes);
                        hashed_to = range.end;
                    }
                    chunk += 1;
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let helpers: Vec<_> = (1..threads.max(1))
            .filter_map(|n| std::thread::Builder::new().name(format!("wherry-hash-{n}")).spawn_scoped(scope, work).ok())
            .collect();
        let mut result = work();
        for helper in helpers {
            match helper.join() {
                Ok(other) => result = result.and(other),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        result
    })?;
    Ok(digests)
}

/// The hashes of the pages of one chunk; none for a chunk the block does not have.
pub(crate) fn hash_pages(block: &Block, chunk: u64) -> Result<Vec<ChunkDigest>, MemoryError> {
    let range = chunk_range(block, chunk);
    let mut bytes = vec![0; (range.end - range.start) as usize];
    block.read_at(range.start, &mut bytes).map_err(failed(block))?;
    Ok(bytes.chunks(GRANULE as usize).map(digest).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use wherry_memory::{BlockId, BlockSpec, PageSize};

    fn block(size: u64) -> Block {
        Block::create(BlockSpec { id: BlockId(0), guest_base: 0, size, page_size: PageSize::Base }).unwrap()
    }

    #[expect(unsafe_code, reason = "writes to guest memory, as a guest does")]
    fn poke(block: &Block, offset: u64, value: u8) {
        let at = block.engine_range(offset, 1).unwrap();
        // SAFETY: inside the block, and nobody else uses it.
        unsafe { at.write_volatile(value) };
    }

    #[test]
    fn every_byte_counts_and_holes_equal_zeros() {
        let size = CHUNK_BYTES * 70 + GRANULE * 3;
        let (a, b) = (block(size), block(size));
        for offset in [0, CHUNK_BYTES * 33 + 77, CHUNK_BYTES * 63, CHUNK_BYTES * 64 - 1, size - 1] {
            poke(&a, offset, 1);
            assert_ne!(hash_block(&a, 2).unwrap(), hash_block(&b, 1).unwrap(), "byte {offset}");
            poke(&b, offset, 1);
            poke(&b, CHUNK_BYTES * 20, 0);
            assert_eq!(hash_block(&a, 3).unwrap(), hash_block(&b, 2).unwrap(), "byte {offset}");
        }
        // One run for each page that was written.
        assert_eq!(a.data_runs(0..size).count(), 5, "hashing allocated holes");
    }

    #[test]
    fn the_page_that_differs_can_be_found() {
        let block = block(CHUNK_BYTES + GRANULE);
        poke(&block, CHUNK_BYTES - 1, 9);
        let pages = hash_pages(&block, 0).unwrap();
        assert_eq!(pages.iter().position(|d| *d != ZEROS), Some(511));
        assert_eq!(hash_pages(&block, 1).unwrap(), [ZEROS]);
        assert!(hash_pages(&block, u64::MAX).unwrap().is_empty());
    }
}
