//! Pieces of a state between the thread that speaks with a device and whoever sends or receives them: a queue with a bound.
//!
//! Nobody waits here for a device for ever: each request to one has a deadline, and what comes of it ends the waiting.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Bytes that wait, at most, unless one piece has more.
const MOST: usize = 16 << 20;

/// The queue is of no use any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    /// Whoever uses it has been told to stop.
    Closed,
    /// What happened at the other end, or did not.
    Failed(String),
}

impl Broken {
    pub(crate) fn reason(self) -> String {
        match self {
            Self::Closed => "it was told to stop".into(),
            Self::Failed(reason) => reason,
        }
    }
}

#[derive(Default)]
struct Inner {
    waiting: VecDeque<Vec<u8>>,
    bytes: usize,
    /// The last piece that was taken is still being worked on.
    busy: bool,
    /// Nothing more will be put in; since then.
    finished: Option<Instant>,
    broken: Option<Broken>,
}

/// Pieces in their order.
#[derive(Default)]
pub(crate) struct Pieces {
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Pieces {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Waits for something; it is the other thread's to end that.
    fn wait(&self, enough: impl Fn(&Inner) -> bool) -> Result<MutexGuard<'_, Inner>, Broken> {
        let waits = |inner: &mut Inner| inner.broken.is_none() && !enough(inner);
        let inner = self.changed.wait_while(self.lock(), waits).unwrap_or_else(PoisonError::into_inner);
        match &inner.broken {
            Some(broken) => Err(broken.clone()),
            None => Ok(inner),
        }
    }

    /// Empty, and whole again.
    pub(crate) fn reset(&self) {
        self.change(|inner| *inner = Inner::default());
    }

    /// Nobody puts in or takes anything any more.
    pub(crate) fn close(&self) {
        self.break_with(Broken::Closed);
    }

    /// One end cannot go on. The other end hears why; whoever was first is right.
    pub(crate) fn fail(&self, reason: String) {
        self.break_with(Broken::Failed(reason));
    }

    fn break_with(&self, broken: Broken) {
        self.change(|inner| {
            inner.waiting.clear();
            inner.broken.get_or_insert(broken);
        });
    }

    /// Puts a piece in, when there is room.
    pub(crate) fn put(&self, piece: Vec<u8>) -> Result<(), Broken> {
        let mut inner = self.wait(|inner| inner.bytes < MOST)?;
        inner.bytes += piece.len();
        inner.waiting.push_back(piece);
        drop(inner);
        self.changed.notify_all();
        Ok(())
    }

    /// That was all.
    pub(crate) fn finish(&self) {
        self.change(|inner| inner.finished = Some(Instant::now()));
    }

    /// The next piece, when there is one; `None` after the last. The one that was taken before is done with.
    pub(crate) fn take(&self) -> Result<Option<Vec<u8>>, Broken> {
        self.change(|inner| inner.busy = false);
        let mut inner = self.wait(|inner| !inner.waiting.is_empty() || inner.finished.is_some())?;
        let piece = inner.waiting.pop_front();
        inner.bytes -= piece.as_ref().map_or(0, Vec::len);
        inner.busy = piece.is_some();
        drop(inner);
        self.changed.notify_all();
        Ok(piece)
    }

    /// Waits until all that was put in is done with.
    pub(crate) fn flush(&self) -> Result<(), Broken> {
        self.wait(|inner| inner.waiting.is_empty() && !inner.busy).map(|_| ())
    }

    /// Since when nothing more is put in.
    pub(crate) fn finished(&self) -> Option<Instant> {
        self.lock().finished
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn pieces_come_out_as_they_went_in_and_no_more_wait_than_there_is_room_for() {
        let pieces = Arc::new(Pieces::default());
        let giver = pieces.clone();
        let thread = std::thread::spawn(move || {
            for n in 0..40u8 {
                giver.put(vec![n; 1 << 20]).unwrap();
                assert!(giver.lock().bytes <= MOST + (1 << 20));
            }
            giver.finish();
        });
        for n in 0..40u8 {
            assert_eq!(pieces.take().unwrap().unwrap()[0], n);
        }
        assert_eq!(pieces.take(), Ok(None));
        thread.join().unwrap();
    }

    #[test]
    fn who_waits_hears_that_the_other_end_has_failed_or_that_all_was_given_up() {
        for (end, reason) in [(true, "it is broken"), (false, "it was told to stop")] {
            let pieces = Arc::new(Pieces::default());
            let other = pieces.clone();
            let thread = std::thread::spawn(move || other.take().unwrap_err().reason());
            match end {
                true => pieces.fail("it is broken".into()),
                false => pieces.close(),
            }
            assert_eq!(thread.join().unwrap(), reason);
            assert!(pieces.put(vec![1]).is_err() && pieces.flush().is_err());
            pieces.reset();
            assert_eq!((pieces.put(vec![1]), pieces.take()), (Ok(()), Ok(Some(vec![1]))));
        }
    }

    #[test]
    fn a_flush_waits_for_the_piece_that_is_worked_on() {
        let pieces = Arc::new(Pieces::default());
        pieces.put(vec![1]).unwrap();
        pieces.take().unwrap();
        let other = pieces.clone();
        let thread = std::thread::spawn(move || other.flush());
        std::thread::sleep(Duration::from_millis(20));
        assert!(!thread.is_finished());
        pieces.finish();
        assert_eq!(pieces.take(), Ok(None));
        thread.join().unwrap().unwrap();
    }
}
