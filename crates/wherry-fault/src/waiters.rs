//! Who waits for which unit. Touched only for pages somebody waits for; a page nobody waits for never comes here.
//!
//! Order that keeps wakes from being lost: a waiter is noted here *before* its page gets the wait flag, so whoever
//! clears the flag finds the waiter.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::time::Instant;

use wherry_memory::BlockId;

use crate::{SourceId, lock};

/// Block, and first granule of the unit.
pub(crate) type Key = (BlockId, u64);

/// A source some thread of which waits for a unit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiter {
    pub source: SourceId,
    /// When the first event of this wait was read.
    pub since: Instant,
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
    /// Notes a waiter, once for each source and unit. `false`: its source has been closed.
    pub fn add(&self, key: Key, waiter: Waiter) -> bool {
        let mut inner = lock(&self.0);
        if inner.closed.contains(&waiter.source) {
            return false;
        }
        let list = inner.waiting.entry(key).or_default();
        match list.iter_mut().find(|w| w.source == waiter.source) {
            Some(known) => known.minor |= waiter.minor,
            None => list.push(waiter),
        }
        true
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
