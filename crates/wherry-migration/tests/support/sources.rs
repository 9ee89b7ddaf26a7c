//! What is known of a fake machine's memory: a dirty log, and what its guest does not use.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use wherry_memory::{Block, BlockId, DirtyError, DirtySource, FreePages, PageSet, Ram};

/// A dirty log with manual protect: bits stay until they are re-armed.
pub struct FakeLog {
    blocks: Vec<(BlockId, Vec<AtomicU64>)>,
    on: AtomicBool,
    pub fail_collects: AtomicU8,
}

impl FakeLog {
    pub(super) fn new(ram: &Ram) -> Self {
        let words = |b: &Arc<Block>| (0..b.pages().div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self {
            blocks: ram.blocks().iter().map(|b| (b.spec().id, words(b))).collect(),
            on: AtomicBool::new(false),
            fail_collects: AtomicU8::new(0),
        }
    }

    fn words(&self, id: BlockId) -> &[AtomicU64] {
        &self.blocks.iter().find(|(b, _)| *b == id).unwrap().1
    }

    /// After the write: a write that a reader did not see has its bit set after the reader re-armed it.
    pub(super) fn mark(&self, id: BlockId, page: u64) {
        if self.on.load(Ordering::SeqCst) {
            self.words(id)[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::SeqCst);
        }
    }

    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::SeqCst)
    }
}

impl DirtySource for FakeLog {
    fn name(&self) -> &str {
        "fake"
    }
    fn start(&self) -> Result<(), DirtyError> {
        for (_, words) in &self.blocks {
            words.iter().for_each(|w| w.store(0, Ordering::SeqCst));
        }
        self.on.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn stop(&self) -> Result<(), DirtyError> {
        self.on.store(false, Ordering::SeqCst);
        Ok(())
    }
    fn collect(&self, block: &Block, into: &mut PageSet) -> Result<(), DirtyError> {
        assert!(self.is_on(), "collected before it was started");
        let failing = self.fail_collects.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok();
        if failing {
            return Err(DirtyError {
                dirty_source: "fake".into(),
                what: "reading the log",
                block: block.spec().id,
                cause: std::io::Error::other("as told"),
            });
        }
        let words: Vec<u64> = self.words(block.spec().id).iter().map(|w| w.load(Ordering::SeqCst)).collect();
        into.union_words(&words);
        Ok(())
    }
    fn rearm(&self, block: &Block, range: Range<u64>, taken: &PageSet) -> Result<(), DirtyError> {
        assert!(range.start.is_multiple_of(64));
        assert!(range.end.is_multiple_of(64) || range.end == block.pages());
        for n in range.start / 64..range.end.div_ceil(64) {
            self.words(block.spec().id)[n as usize].fetch_and(!taken.words()[n as usize], Ordering::SeqCst);
        }
        Ok(())
    }
}

/// A guest that names free pages of block 0 as soon as it is asked, and uses them again as it likes.
#[derive(Default)]
pub struct FakeFree {
    /// What it will name.
    pub names: Mutex<Vec<Range<u64>>>,
    /// What it has named since it was last asked.
    named: Mutex<Option<PageSet>>,
    pub held: AtomicBool,
    pub asked: AtomicU32,
    pub enough: AtomicU32,
}

impl FreePages for FakeFree {
    fn hold(&self) {
        assert!(!self.held.swap(true, Ordering::SeqCst), "held twice");
    }
    fn release(&self) {
        assert!(self.held.swap(false, Ordering::SeqCst), "released without being held");
    }
    fn ask(&self) {
        assert!(self.held.load(Ordering::SeqCst), "asked before it was held");
        self.asked.fetch_add(1, Ordering::SeqCst);
        let names = self.names.lock().unwrap();
        let mut set = PageSet::new(names.iter().map(|range| range.end).max().unwrap_or(0));
        names.iter().for_each(|range| set.insert_range(range.clone()));
        *self.named.lock().unwrap() = Some(set);
    }
    fn leave_out(&self, block: &Block, range: Range<u64>, set: &mut PageSet) -> u64 {
        let named = self.named.lock().unwrap();
        let named = named.as_ref().expect("it was asked, and not told that it is enough");
        if block.spec().id == BlockId(0) { set.subtract_range(named, range) } else { 0 }
    }
    fn enough(&self) {
        if self.named.lock().unwrap().take().is_some() {
            self.enough.fetch_add(1, Ordering::SeqCst);
        }
    }
}
