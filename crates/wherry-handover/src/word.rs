//! The word in shared memory that decides which of two processes runs.
//!
//! ```text
//!   OWNED --offer--> OFFERED(attempt) --run (the new one)--> RUNS(attempt)
//!     ^                    |
//!     '--- TAKEN_BACK <----'  take_back (the old one)
//! ```
//!
//! Both changes out of `OFFERED` are one compare-and-swap, so one of the two wins, and each knows at once which. There is no
//! message that could be lost and nobody who could be in doubt.
#![expect(unsafe_code, reason = "maps a word that two processes share")]

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

/// Bytes of the memfd: a page.
const SIZE: usize = 4096;

const OWNED: u64 = 0;
const OFFERED: u64 = 1;
const RUNS: u64 = 2;
const TAKEN_BACK: u64 = 3;

fn word(state: u64, attempt: u32) -> u64 {
    state << 32 | u64::from(attempt)
}

/// Who runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The process that made the word.
    Owner,
    /// Nobody: it was offered to the new process.
    Offered(u32),
    /// The new process.
    Successor(u32),
    /// The process that made the word: the offer was taken back.
    TakenBack(u32),
    /// Somebody has written something that is no state.
    Spoilt(u64),
}

impl From<u64> for Who {
    fn from(value: u64) -> Self {
        let attempt = value as u32;
        match value >> 32 {
            OWNED if attempt == 0 => Self::Owner,
            OFFERED => Self::Offered(attempt),
            RUNS => Self::Successor(attempt),
            TAKEN_BACK => Self::TakenBack(attempt),
            _ => Self::Spoilt(value),
        }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Owner => write!(f, "it was not offered"),
            Self::Offered(attempt) => write!(f, "it is offered, in attempt {attempt}"),
            Self::Successor(attempt) => write!(f, "the new process runs it, since attempt {attempt}"),
            Self::TakenBack(attempt) => write!(f, "attempt {attempt} was taken back"),
            Self::Spoilt(value) => write!(f, "the word was overwritten with {value:#x}"),
        }
    }
}

/// The word cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum WordError {
    /// The kernel refused.
    #[error("{what} the word that decides who runs: {source}")]
    Os {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// What came is no such word.
    #[error("what came as the word that decides who runs {0}")]
    Unfit(String),
}

/// The word, as one of the two sees it.
pub struct RunWord {
    fd: OwnedFd,
    map: NonNull<AtomicU64>,
}

// SAFETY: the pointer is to a shared mapping that lives as long as the value, and is used as an atomic only.
unsafe impl Send for RunWord {}
// SAFETY: as above.
unsafe impl Sync for RunWord {}

impl fmt::Debug for RunWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RunWord({:?})", self.look())
    }
}

impl Drop for RunWord {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `map`, unmapped once.
        let _ = unsafe { rustix::mm::munmap(self.map.as_ptr().cast(), SIZE) };
    }
}

impl AsFd for RunWord {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn os(what: &'static str) -> impl Fn(rustix::io::Errno) -> WordError {
    move |source| WordError::Os { what, source: source.into() }
}

impl RunWord {
    /// A word that says that its maker runs.
    pub fn create() -> Result<Self, WordError> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("wherry-run-word", flags).map_err(os("making"))?;
        rustix::fs::ftruncate(&fd, SIZE as u64).map_err(os("sizing"))?;
        // Whoever could shrink it could kill the other side with a look at it.
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(os("sealing"))?;
        Self::map(fd)
    }

    /// The word of the process that is to be replaced.
    pub fn adopt(fd: OwnedFd) -> Result<Self, WordError> {
        // Other kinds of files have none.
        let seals = rustix::fs::fcntl_get_seals(&fd).unwrap_or(SealFlags::empty());
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(WordError::Unfit("is not sealed against changes of its size".into()));
        }
        let size = rustix::fs::fstat(&fd).map_err(os("looking at"))?.st_size;
        if size != SIZE as i64 {
            return Err(WordError::Unfit(format!("has {size} bytes, not {SIZE}")));
        }
        Self::map(fd)
    }

    fn map(fd: OwnedFd) -> Result<Self, WordError> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a fresh mapping at an address of the kernel's choice; the file has that size and keeps it.
        let map = unsafe { rustix::mm::mmap(std::ptr::null_mut(), SIZE, access, flags, &fd, 0) };
        let map = NonNull::new(map.map_err(os("mapping"))?.cast()).ok_or_else(|| WordError::Unfit("is at 0".into()))?;
        Ok(Self { fd, map })
    }

    fn atomic(&self) -> &AtomicU64 {
        // SAFETY: a page-aligned mapping of a page, mapped for as long as `self`; the other side uses it as an atomic or as
        // plain memory of another process, neither of which is a data race in this one.
        unsafe { self.map.as_ref() }
    }

    /// Who runs now.
    pub fn look(&self) -> Who {
        self.atomic().load(Ordering::SeqCst).into()
    }

    /// The old process, at rest: offers to be replaced, in an attempt of its own number.
    pub fn offer(&self, attempt: u32) {
        self.atomic().store(word(OFFERED, attempt), Ordering::SeqCst);
    }

    fn swap(&self, attempt: u32, state: u64) -> Result<(), Who> {
        let (from, to) = (word(OFFERED, attempt), word(state, attempt));
        let swapped = self.atomic().compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst);
        swapped.map(|_| ()).map_err(Who::from)
    }

    /// The new process: runs from now on, and the old one never again. An error says who runs; that is not the caller.
    pub fn run(&self, attempt: u32) -> Result<(), Who> {
        self.swap(attempt, RUNS)
    }

    /// The old process: runs on, and the new one never will. An error says that it may not.
    pub fn take_back(&self, attempt: u32) -> Result<(), Who> {
        self.swap(attempt, TAKEN_BACK)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    fn pair() -> (RunWord, RunWord) {
        let old = RunWord::create().unwrap();
        let new = RunWord::adopt(old.fd.try_clone().unwrap()).unwrap();
        (old, new)
    }

    #[test]
    fn an_offer_is_taken_or_taken_back_and_the_other_side_sees_which() {
        let (old, new) = pair();
        assert_eq!((old.look(), new.look()), (Who::Owner, Who::Owner));
        assert_eq!(new.run(1), Err(Who::Owner), "nothing was offered");
        old.offer(1);
        assert_eq!(new.run(2), Err(Who::Offered(1)), "another attempt");
        assert_eq!(new.run(1), Ok(()));
        assert_eq!(old.take_back(1), Err(Who::Successor(1)));

        let (old, new) = pair();
        old.offer(7);
        assert_eq!(old.take_back(7), Ok(()));
        assert_eq!(new.run(7), Err(Who::TakenBack(7)));
        old.offer(8);
        assert_eq!(new.run(7), Err(Who::Offered(8)), "a late one of an attempt that was given up");
        assert_eq!(new.run(8), Ok(()));
    }

    #[test]
    fn of_two_that_decide_at_once_exactly_one_wins() {
        for attempt in 1..500 {
            let (old, new) = pair();
            old.offer(attempt);
            let barrier = Barrier::new(2);
            let (runs, back) = std::thread::scope(|scope| {
                let runs = scope.spawn(|| {
                    barrier.wait();
                    new.run(attempt).is_ok()
                });
                barrier.wait();
                let back = old.take_back(attempt).is_ok();
                (runs.join().unwrap(), back)
            });
            assert!(runs != back, "attempt {attempt}: new {runs}, old {back}");
        }
    }

    #[test]
    fn a_word_that_somebody_has_spoilt_lets_nobody_run() {
        let (old, new) = pair();
        old.offer(1);
        new.atomic().store(u64::MAX, Ordering::SeqCst);
        assert_eq!(old.take_back(1), Err(Who::Spoilt(u64::MAX)));
        assert!(new.run(1).is_err());
    }

    #[test]
    fn what_is_no_word_is_refused() {
        let unsealed = rustix::fs::memfd_create("x", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&unsealed, SIZE as u64).unwrap();
        assert!(matches!(RunWord::adopt(unsealed), Err(WordError::Unfit(_))));
        let small = rustix::fs::memfd_create("x", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::fcntl_add_seals(&small, SealFlags::SHRINK | SealFlags::GROW).unwrap();
        let error = RunWord::adopt(small).unwrap_err().to_string();
        assert!(error.contains("has 0 bytes"), "{error}");
        let (read, _write) = rustix::pipe::pipe().unwrap();
        assert!(matches!(RunWord::adopt(read), Err(WordError::Unfit(_))));
        assert!(RunWord::create().unwrap().fd.try_clone().is_ok());
    }
}
