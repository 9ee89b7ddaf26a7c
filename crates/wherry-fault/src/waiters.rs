//! Who waits for which unit. Touched only for pages somebody waits for; a page nobody waits for never comes here.
//!
//! Order that keeps wakes from being lost: a waiter is noted here *before* its page gets the wait flag, so whoever
//! clears the flag finds the waiter.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use wherry_memory::BlockId;

use crate::statistics::Row;
use crate::{SourceId, lock};

/// Block, and first granule of the unit.
pub(crate) type Key = (BlockId, u64);

/// A source some thread of which waits for a unit.
pub(crate) struct Waiter {
    pub source: SourceId,
    /// Where its thread is counted, if the threads of the source are told apart.
    pub row: Option<Arc<Row>>,
    /// When the first event of this wait was read.
    pub since: Instant,
    /// When the request was handed over, or was found to have been. `None`: its page may be there already.
    pub handed: Option<Instant>,
    /// The source says that the page was in the file: it registered minor faults.
    pub minor: bool,
}

#[derive(Default)]
struct Inner {
    waiting: HashMap<Key, Vec<Waiter>>,
    /// Sources that may not wait any more.
    closed: HashSet<SourceId>,
}

/// All waiters of a service.
#[derive(Default)]
pub(crate) struct Waiters(Mutex<Inner>);

impl Waiters {
    /// Notes a waiter, once for each unit and source, or thread that is told apart. `false`: its source has been closed.
    pub fn add(&self, key: Key, waiter: Waiter) -> bool {
        let mut inner = lock(&self.0);
        if inner.closed.contains(&waiter.source) {
            return false;
        }
        let list = inner.waiting.entry(key).or_default();
        let same = |w: &&mut Waiter| {
            w.source == waiter.source && w.row.as_ref().map(Arc::as_ptr) == waiter.row.as_ref().map(Arc::as_ptr)
        };
        match list.iter_mut().find(same) {
            Some(known) => known.minor |= waiter.minor,
            None => list.push(waiter),
        }
        true
    }

    /// Takes the time of those who wait for one of these units, and for whom it was not taken yet.
    pub fn handed(&self, keys: &[Key], at: Instant) {
        let mut inner = lock(&self.0);
        for key in keys {
            // Who is not there any more has got the page meanwhile.
            for waiter in inner.waiting.get_mut(key).into_iter().flatten() {
                waiter.handed.get_or_insert(at);
            }
        }
    }

    /// Takes those who wait for a unit.
    pub fn take(&self, key: Key) -> Vec<Waiter> {
        lock(&self.0).waiting.remove(&key).unwrap_or_default()
    }

    /// Forgets all waiters of a source, and lets none of it in any more.
    pub fn close(&self, source: SourceId) {
        let mut inner = lock(&self.0);
        inner.closed.insert(source);
        inner.waiting.retain(|_, list| {
            list.retain(|w| w.source != source);
            !list.is_empty()
        });
    }

    /// Lets a source wait that may have been closed before: the guest maps can be registered again.
    pub fn open(&self, source: SourceId) {
        lock(&self.0).closed.remove(&source);
    }

    /// Who waits for a unit first, if anybody.
    pub fn first(&self, key: Key) -> Option<SourceId> {
        lock(&self.0).waiting.get(&key).and_then(|list| list.first()).map(|w| w.source)
    }

    /// How many units somebody waits for.
    pub fn count(&self) -> usize {
        lock(&self.0).waiting.len()
    }
}
