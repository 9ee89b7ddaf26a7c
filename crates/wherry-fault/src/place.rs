//! Making received bytes visible, whatever the kernel answers.
//!
//! Two ways, chosen for each block. *In place*: the bytes are in the file already, written through the engine map, and
//! CONTINUE maps them. *Copy*: COPY puts a page into file and map in one step; needed where another process maps the
//! block, since it would see a page that is half filled. Pages that are zero and not in the file are made by ZEROPAGE,
//! or in hugetlb blocks by a COPY of zeros.
//!
//! | answer | what is done |
//! |---|---|
//! | EAGAIN, some mapped | go on behind them |
//! | EAGAIN, none mapped | an event is pending: have it read, retry |
//! | EEXIST | one unit is there: wake it, step over it |
//! | EFAULT of CONTINUE | a hole: ask the caller whether that is explained |
//!
//! Nothing counts as placed until the kernel has answered for the whole range.

use std::ops::Range;
use std::time::{Duration, Instant};

use wherry_memory::GRANULE;

use crate::{Outcome, UffdError, Userfault};

/// How the pages of a block become visible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Received through the engine map, made visible by CONTINUE: no other process maps the block.
    InPlace,
    /// Received into staging, made visible by COPY: other processes may map the block.
    Copy,
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Way::InPlace => "in place",
            Way::Copy => "by copy",
        })
    }
}

/// How long a pending event may keep placement from going on.
const AGAIN_LIMIT: Duration = Duration::from_secs(10);
/// How often a page that is there when it should not be is taken away for one COPY.
const OCCUPIED_LIMIT: u32 = 8;

/// The calls that placement needs, so that a test can answer in the kernel's stead.
pub(crate) trait Calls {
    fn continue_range(&self, start: u64, len: u64, wake: bool) -> Result<Outcome, UffdError>;
    fn copy(&self, start: u64, source: &[u8], wake: bool) -> Result<Outcome, UffdError>;
    fn zeropage(&self, start: u64, len: u64, wake: bool) -> Result<Outcome, UffdError>;
    fn wake(&self, start: u64, len: u64) -> Result<(), UffdError>;
}

impl Calls for Userfault {
    fn continue_range(&self, start: u64, len: u64, wake: bool) -> Result<Outcome, UffdError> {
        self.continue_range(start, len, wake)
    }
    fn copy(&self, start: u64, source: &[u8], wake: bool) -> Result<Outcome, UffdError> {
        self.copy(start, source, wake)
    }
    fn zeropage(&self, start: u64, len: u64, wake: bool) -> Result<Outcome, UffdError> {
        self.zeropage(start, len, wake)
    }
    fn wake(&self, start: u64, len: u64) -> Result<(), UffdError> {
        self.wake(start, len)
    }
}

/// Placement stopped.
#[derive(Debug)]
pub(crate) struct Stopped {
    /// Offset in the block of the first byte that is not placed.
    pub at: u64,
    /// Why.
    pub reason: String,
}

/// The guest map of one block, as placement sees it.
pub(crate) struct Target<'a> {
    /// The calls.
    pub calls: &'a dyn Calls,
    /// Address of the guest map.
    pub base: u64,
    /// Bytes of a unit.
    pub unit: u64,
    /// Has pending events read.
    pub drain: &'a dyn Fn(),
}

impl Target<'_> {
    /// Maps a range of the file, in whole units. `hole` is asked about each unit that is not in the file, and fills it
    /// or refuses.
    pub fn in_place(
        &self,
        bytes: Range<u64>,
        wake: bool,
        hole: &mut dyn FnMut(u64) -> Result<(), Stopped>,
    ) -> Result<(), Stopped> {
        let mut cursor = Cursor::new(self, bytes);
        while let Some((at, len)) = cursor.next() {
            match self.calls.continue_range(self.base + at, len, wake) {
                Ok(Outcome::Fault) => {
                    hole(at)?;
                    cursor.skip(self.unit);
                }
                Ok(Outcome::Exists) => {
                    self.wake(at)?;
                    cursor.skip(self.unit);
                }
                other => cursor.advance("UFFDIO_CONTINUE", other)?,
            }
        }
        Ok(())
    }

    /// Fills a range, in whole units, from staged bytes. `occupied` is told of each unit that is in the file although
    /// nothing was received there, and takes it away or refuses.
    pub fn copy(
        &self,
        start: u64,
        staged: &[u8],
        wake: bool,
        occupied: &mut dyn FnMut(u64) -> Result<(), Stopped>,
    ) -> Result<(), Stopped> {
        let mut cursor = Cursor::new(self, start..start + staged.len() as u64);
        let (mut unit, mut tries) = (0, 0);
        while let Some((at, _)) = cursor.next() {
            match self.calls.copy(self.base + at, &staged[(at - start) as usize..], wake) {
                Ok(Outcome::Exists) => {
                    tries = if unit == at { tries + 1 } else { 1 };
                    unit = at;
                    if tries > OCCUPIED_LIMIT {
                        return Err(Stopped { at, reason: "somebody keeps allocating the page".into() });
                    }
                    occupied(at)?;
                }
                other => cursor.advance("UFFDIO_COPY", other)?,
            }
        }
        Ok(())
    }

    /// Makes a range, in whole units, of holes visible as zeros. `zeros` is one unit of them.
    pub fn zero(&self, bytes: Range<u64>, zeros: &[u8]) -> Result<(), Stopped> {
        let mut cursor = Cursor::new(self, bytes);
        while let Some((at, len)) = cursor.next() {
            let (call, answer) = if self.unit == GRANULE {
                ("UFFDIO_ZEROPAGE", self.calls.zeropage(self.base + at, len, true))
            } else {
                ("UFFDIO_COPY", self.calls.copy(self.base + at, &zeros[..self.unit as usize], true))
            };
            match answer {
                Ok(Outcome::Exists) => {
                    // In the file; perhaps not in the map.
                    match self.calls.continue_range(self.base + at, self.unit, true) {
                        Ok(Outcome::Done) => cursor.skip(self.unit),
                        Ok(Outcome::Exists) => {
                            self.wake(at)?;
                            cursor.skip(self.unit);
                        }
                        // It has gone again in between.
                        Ok(Outcome::Fault) => cursor.pause("a page that comes and goes")?,
                        other => cursor.advance("UFFDIO_CONTINUE", other)?,
                    }
                }
                Ok(Outcome::Done) if self.unit != GRANULE => cursor.skip(self.unit),
                other => cursor.advance(call, other)?,
            }
        }
        Ok(())
    }

    fn wake(&self, at: u64) -> Result<(), Stopped> {
        self.calls.wake(self.base + at, self.unit).map_err(|e| Stopped { at, reason: e.to_string() })
    }
}

/// How far placement has come.
struct Cursor<'a> {
    target: &'a Target<'a>,
    at: u64,
    end: u64,
    waiting: Option<Instant>,
}

impl<'a> Cursor<'a> {
    fn new(target: &'a Target<'a>, bytes: Range<u64>) -> Self {
        Self { target, at: bytes.start, end: bytes.end, waiting: None }
    }

    /// What is left: offset and length.
    fn next(&self) -> Option<(u64, u64)> {
        (self.at < self.end).then(|| (self.at, self.end - self.at))
    }

    fn skip(&mut self, len: u64) {
        self.at += len;
        self.waiting = None;
    }

    /// Has events read, and gives up if that does not help for long.
    fn pause(&mut self, what: &str) -> Result<(), Stopped> {
        let since = *self.waiting.get_or_insert_with(Instant::now);
        if since.elapsed() > AGAIN_LIMIT {
            let reason = format!("{what} has kept it from going on for {AGAIN_LIMIT:?}");
            return Err(Stopped { at: self.at, reason });
        }
        (self.target.drain)();
        Ok(())
    }

    fn advance(&mut self, call: &str, answer: Result<Outcome, UffdError>) -> Result<(), Stopped> {
        let stopped = |reason: String| Err(Stopped { at: self.at, reason });
        match answer {
            Ok(Outcome::Done) => self.skip(self.end - self.at),
            Ok(Outcome::Partial(n)) if n < self.end - self.at && n.is_multiple_of(self.target.unit) => self.skip(n),
            Ok(Outcome::Again) => self.pause("a pending event")?,
            Ok(Outcome::Partial(n)) => return stopped(format!("{call} answered {n} bytes, which are no whole units")),
            Ok(Outcome::Gone) => return stopped(format!("{call}: the process has gone")),
            Ok(Outcome::NotRegistered) => return stopped(format!("{call}: the range is not registered")),
            Ok(Outcome::NoMemory) => return stopped(format!("{call}: no memory for the page")),
            Ok(Outcome::Fault) => return stopped(format!("{call}: bad address")),
            Ok(Outcome::Exists) => return stopped(format!("{call}: the page is there already")),
            Err(error) => return stopped(error.to_string()),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::VecDeque;

    use super::*;

    const BASE: u64 = 0x7000_0000;
    const UNIT: u64 = 2 << 20;

    /// Answers what a test has prepared, and remembers what it was asked.
    #[derive(Default)]
    struct Kernel {
        answers: RefCell<VecDeque<Outcome>>,
        asked: RefCell<Vec<(&'static str, u64, u64)>>,
        /// Unless answers are left, this is the answer.
        then: Option<Outcome>,
    }

    impl Kernel {
        fn with(answers: &[Outcome]) -> Self {
            Self { answers: RefCell::new(answers.iter().copied().collect()), ..Self::default() }
        }

        fn answer(&self, call: &'static str, start: u64, len: u64) -> Result<Outcome, UffdError> {
            self.asked.borrow_mut().push((call, (start - BASE) / GRANULE, len / GRANULE));
            Ok(self.answers.borrow_mut().pop_front().or(self.then).unwrap_or(Outcome::Done))
        }

        fn asked(&self) -> Vec<(&'static str, u64, u64)> {
            self.asked.borrow().clone()
        }
    }

    impl Calls for Kernel {
        fn continue_range(&self, start: u64, len: u64, _: bool) -> Result<Outcome, UffdError> {
            self.answer("continue", start, len)
        }
        fn copy(&self, start: u64, source: &[u8], _: bool) -> Result<Outcome, UffdError> {
            self.answer("copy", start, source.len() as u64)
        }
        fn zeropage(&self, start: u64, len: u64, _: bool) -> Result<Outcome, UffdError> {
            self.answer("zeropage", start, len)
        }
        fn wake(&self, start: u64, len: u64) -> Result<(), UffdError> {
            self.asked.borrow_mut().push(("wake", (start - BASE) / GRANULE, len / GRANULE));
            Ok(())
        }
    }

    fn target<'a>(calls: &'a Kernel, unit: u64, drain: &'a dyn Fn()) -> Target<'a> {
        Target { calls, base: BASE, unit, drain }
    }

    fn no_hole(at: u64) -> Result<(), Stopped> {
        panic!("asked about a hole at {at:#x}")
    }

    #[test]
    fn a_partial_answer_is_gone_on_from_where_it_ended() {
        let kernel = Kernel::with(&[Outcome::Partial(3 * GRANULE), Outcome::Partial(GRANULE)]);
        target(&kernel, GRANULE, &|| ()).in_place(2 * GRANULE..10 * GRANULE, true, &mut no_hole).unwrap();
        assert_eq!(kernel.asked(), [("continue", 2, 8), ("continue", 5, 5), ("continue", 6, 4)]);
    }

    #[test]
    fn an_answer_of_nothing_done_has_events_read_and_the_call_repeated() {
        let kernel = Kernel::with(&[Outcome::Again, Outcome::Partial(GRANULE), Outcome::Again]);
        let drained = std::cell::Cell::new(0);
        let drain = || drained.set(drained.get() + 1);
        target(&kernel, GRANULE, &drain).in_place(0..2 * GRANULE, true, &mut no_hole).unwrap();
        assert_eq!(kernel.asked(), [("continue", 0, 2), ("continue", 0, 2), ("continue", 1, 1), ("continue", 1, 1)]);
        assert_eq!(drained.get(), 2);
    }

    #[test]
    fn a_page_that_is_there_is_woken_and_stepped_over_alone() {
        let kernel = Kernel::with(&[Outcome::Partial(2 * GRANULE), Outcome::Exists]);
        target(&kernel, GRANULE, &|| ()).in_place(0..8 * GRANULE, true, &mut no_hole).unwrap();
        assert_eq!(kernel.asked(), [("continue", 0, 8), ("continue", 2, 6), ("wake", 2, 1), ("continue", 3, 5)]);
        let kernel = Kernel::with(&[Outcome::Exists]);
        target(&kernel, UNIT, &|| ()).in_place(0..2 * UNIT, true, &mut no_hole).unwrap();
        assert_eq!(kernel.asked(), [("continue", 0, 1024), ("wake", 0, 512), ("continue", 512, 512)], "a whole unit");
    }

    #[test]
    fn a_hole_is_asked_about_and_what_follows_is_mapped() {
        let kernel = Kernel::with(&[Outcome::Partial(GRANULE), Outcome::Fault]);
        let mut holes = Vec::new();
        let place = |at| {
            holes.push(at / GRANULE);
            Ok(())
        };
        target(&kernel, GRANULE, &|| ()).in_place(0..4 * GRANULE, true, &mut { place }).unwrap();
        assert_eq!(kernel.asked(), [("continue", 0, 4), ("continue", 1, 3), ("continue", 2, 2)]);
        assert_eq!(holes, [1]);
        let kernel = Kernel::with(&[Outcome::Fault]);
        let refused = |at| Err(Stopped { at, reason: "a bug".into() });
        let stopped = target(&kernel, GRANULE, &|| ()).in_place(0..GRANULE, true, &mut { refused }).unwrap_err();
        assert_eq!((stopped.at, stopped.reason.as_str()), (0, "a bug"));
    }

    #[test]
    fn nothing_counts_as_placed_that_the_kernel_has_not_answered_for() {
        for (answer, reason) in [
            (Outcome::Gone, "process has gone"),
            (Outcome::NotRegistered, "not registered"),
            (Outcome::NoMemory, "no memory"),
            (Outcome::Partial(100), "no whole units"),
            (Outcome::Partial(8 * GRANULE), "no whole units"),
        ] {
            let kernel = Kernel::with(&[Outcome::Partial(GRANULE), answer]);
            let target = target(&kernel, GRANULE, &|| ());
            let stopped = target.in_place(0..4 * GRANULE, true, &mut no_hole).unwrap_err();
            assert_eq!(stopped.at, GRANULE, "{answer:?}");
            assert!(stopped.reason.contains(reason), "{}", stopped.reason);
            let kernel = Kernel::with(&[Outcome::Partial(GRANULE), answer]);
            let target = Target { calls: &kernel, ..target };
            let staged = [0; 4 * GRANULE as usize];
            assert_eq!(target.copy(0, &staged, true, &mut no_hole).unwrap_err().at, GRANULE, "{answer:?}");
        }
    }

    #[test]
    fn a_copy_takes_away_what_occupies_its_page_and_gives_up_if_that_comes_back_for_ever() {
        let staged = [0; 3 * GRANULE as usize];
        let kernel = Kernel::with(&[Outcome::Partial(GRANULE), Outcome::Exists]);
        let mut taken = Vec::new();
        let mut take = |at| {
            taken.push(at / GRANULE);
            Ok(())
        };
        target(&kernel, GRANULE, &|| ()).copy(0, &staged, true, &mut take).unwrap();
        assert_eq!(kernel.asked(), [("copy", 0, 3), ("copy", 1, 2), ("copy", 1, 2)]);
        assert_eq!(taken, [1]);
        let kernel = Kernel { then: Some(Outcome::Exists), ..Kernel::default() };
        let stopped = target(&kernel, GRANULE, &|| ()).copy(0, &staged, true, &mut |_| Ok(())).unwrap_err();
        assert!(stopped.reason.contains("keeps allocating"), "{}", stopped.reason);
    }

    #[test]
    fn zeros_are_made_by_zeropage_or_in_large_pages_by_a_copy_and_what_is_there_is_mapped() {
        let kernel = Kernel::with(&[Outcome::Partial(GRANULE), Outcome::Exists, Outcome::Exists]);
        target(&kernel, GRANULE, &|| ()).zero(0..4 * GRANULE, &[]).unwrap();
        assert_eq!(
            kernel.asked(),
            [("zeropage", 0, 4), ("zeropage", 1, 3), ("continue", 1, 1), ("wake", 1, 1), ("zeropage", 2, 2)]
        );
        let kernel = Kernel::default();
        target(&kernel, UNIT, &|| ()).zero(0..2 * UNIT, &vec![0; UNIT as usize]).unwrap();
        assert_eq!(kernel.asked(), [("copy", 0, 512), ("copy", 512, 512)]);
    }

    /// The same against the kernel: a page in the middle is mapped, one is a hole, and a thread waits behind them.
    #[test]
    fn a_waiter_three_pages_behind_one_that_is_there_wakes() {
        use wherry_memory::{Block, BlockId, BlockSpec, PageSize};
        let uffd = match Userfault::open() {
            Ok(uffd) => uffd,
            Err(error) => return println!("SKIPPED: {error}"),
        };
        let spec = BlockSpec { id: BlockId(0), guest_base: 0, size: 8 * GRANULE, page_size: PageSize::Base };
        let block = Block::create(spec).unwrap();
        let base = block.guest_map() as u64;
        uffd.register(base, spec.size, crate::Mode::MISSING_MINOR).unwrap();
        for page in (0..8).filter(|page| *page != 3) {
            put(&block, page);
        }
        assert_eq!(uffd.continue_range(base + 2 * GRANULE, GRANULE, true).unwrap(), Outcome::Done);
        let waiter = std::thread::spawn(move || get(base + 5 * GRANULE));
        let (mut faults, started) = (Vec::new(), Instant::now());
        while faults.is_empty() {
            assert!(started.elapsed() < Duration::from_secs(20), "no fault was read in time");
            uffd.read_events(&mut faults).unwrap();
            std::thread::yield_now();
        }
        assert!(faults[0].minor && !faults[0].write);
        assert_eq!(faults[0].address, base + 5 * GRANULE);
        assert_eq!(uffd.continue_range(base, 8 * GRANULE, true).unwrap(), Outcome::Partial(2 * GRANULE));
        assert_eq!(uffd.continue_range(base + 2 * GRANULE, 6 * GRANULE, true).unwrap(), Outcome::Exists);
        let target = Target { calls: &uffd, base, unit: GRANULE, drain: &|| () };
        let mut holes = Vec::new();
        let mut fill = |at| {
            holes.push(at / GRANULE);
            target.zero(at..at + GRANULE, &[])
        };
        target.in_place(0..8 * GRANULE, true, &mut fill).unwrap();
        assert_eq!(holes, [3]);
        while !waiter.is_finished() {
            assert!(started.elapsed() < Duration::from_secs(20), "the waiter was not woken in time");
            std::thread::yield_now();
        }
        assert_eq!(waiter.join().unwrap(), 5);
        assert_eq!([get(base + 3 * GRANULE), get(base + 7 * GRANULE)], [0, 7]);
    }

    #[expect(unsafe_code, reason = "writes through the engine map")]
    fn put(block: &wherry_memory::Block, page: u64) {
        let at = block.engine_range(page * GRANULE, GRANULE).unwrap();
        // SAFETY: one page inside the engine map.
        unsafe { at.write_bytes(page as u8, GRANULE as usize) };
    }

    #[expect(unsafe_code, reason = "touches a page as a guest does")]
    fn get(address: u64) -> u8 {
        // SAFETY: the callers give addresses inside the guest map.
        unsafe { (address as *const u8).read_volatile() }
    }
}
