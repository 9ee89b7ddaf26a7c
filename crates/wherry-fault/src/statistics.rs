//! What is counted and timed of each fault source, and of each thread of the guest's.
//!
//! A wait is measured from its event being read, and cut into three parts that add up to the whole:
//!
//! ```text
//!   event read --queue--> handed to the requester --wire--> bytes are there --placement--> placed, waiters woken
//! ```
//!
//! What the kernel takes before the event can be read, and after the wake until the thread runs, is seen by nobody here.
//! Counting is atomic and takes no lock: the threads that place pages do it while somebody waits for the next one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use crate::threads::is_ours;
use crate::{SourceId, lock};

/// Steps of a power of two, as a power of two.
const STEPS: u32 = 4;
/// Latencies from here on (18 minutes) are in the last bucket.
const OCTAVES: u32 = 40;
const BUCKETS: usize = ((OCTAVES - STEPS + 1) << STEPS) as usize;
/// Threads of this process that are told apart.
const THREADS: usize = 256;
/// Workers of the kernel that are counted one by one.
const WORKERS: usize = 1024;

/// Latencies in buckets of nanoseconds: each power of two has 16 steps of the same width, so that the limits of a bucket
/// are at most 1/16 apart. The last bucket has no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    /// Empty as long as there is nothing to count.
    buckets: Vec<u64>,
    largest: Duration,
}

impl Histogram {
    /// How many latencies were counted.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The largest latency.
    pub fn largest(&self) -> Duration {
        self.largest
    }

    /// The upper limit of the bucket below which `fraction` (0 to 1) of all latencies lie, but no more than the largest of
    /// them; `None` if there are none.
    pub fn quantile(&self, fraction: f64) -> Option<Duration> {
        let count = self.count();
        let rank = ((count as f64 * fraction).ceil() as u64).clamp(1, count.max(1));
        let mut below = 0;
        for (n, bucket) in self.buckets.iter().enumerate() {
            below += bucket;
            if below >= rank && count > 0 {
                let limit = if n + 1 < BUCKETS { upper_limit(n) } else { u64::MAX };
                return Some(Duration::from_nanos(limit).min(self.largest));
            }
        }
        None
    }

    /// Adds what another one has counted.
    pub fn merge(&mut self, other: &Histogram) {
        self.buckets.resize(self.buckets.len().max(other.buckets.len()), 0);
        self.buckets.iter_mut().zip(&other.buckets).for_each(|(to, from)| *to += from);
        self.largest = self.largest.max(other.largest);
    }
}

/// The bucket of a latency.
fn bucket_of(nanos: u64) -> usize {
    let octave = u64::BITS - nanos.leading_zeros();
    let shift = octave.saturating_sub(STEPS + 1);
    // Below 16 ns a bucket is one nanosecond; above, the four bits below the highest one are the step.
    ((u64::from(shift) << STEPS) + (nanos >> shift)).min(BUCKETS as u64 - 1) as usize
}

/// The first latency, in nanoseconds, that is too large for a bucket.
fn upper_limit(bucket: usize) -> u64 {
    let next = bucket as u64 + 1;
    let shift = (next >> STEPS).saturating_sub(1);
    (next - (shift << STEPS)) << shift
}

/// Where latencies are counted while others look.
pub(crate) struct Recorder {
    buckets: Box<[AtomicU64]>,
    largest: AtomicU64,
}

impl Default for Recorder {
    fn default() -> Self {
        Self { buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(), largest: AtomicU64::new(0) }
    }
}

impl Recorder {
    pub fn add(&self, latency: Duration) {
        let nanos = nanos(latency);
        self.buckets[bucket_of(nanos)].fetch_add(1, Relaxed);
        raise(&self.largest, nanos);
    }

    pub fn histogram(&self) -> Histogram {
        let buckets: Vec<_> = self.buckets.iter().map(|bucket| bucket.load(Relaxed)).collect();
        Histogram { buckets, largest: Duration::from_nanos(self.largest.load(Relaxed)) }
    }
}

pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Raises a maximum; cheap while it stands.
pub(crate) fn raise(maximum: &AtomicU64, value: u64) {
    if value > maximum.load(Relaxed) {
        maximum.fetch_max(value, Relaxed);
    }
}

/// The faults of one thread, or of several that are not told apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Fault events read.
    pub faults: u64,
    /// As [`SourceStatistics::latency`].
    pub latency: Histogram,
}

impl Share {
    /// Adds another one's.
    pub fn merge(&mut self, other: &Share) {
        self.faults += other.faults;
        self.latency.merge(&other.latency);
    }
}

/// Figures of one fault source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceStatistics {
    /// Its number.
    pub id: SourceId,
    /// Its name.
    pub name: String,
    /// Fault events read.
    pub faults: u64,
    /// Of these, on pages that were in the file.
    pub minor: u64,
    /// Of these, on pages that were not.
    pub missing: u64,
    /// Of these, by writes.
    pub writes: u64,
    /// Of these, at addresses that the source does not have.
    pub bad_addresses: u64,
    /// Pages that were asked for because of its faults: the touched ones, and the rest of their units.
    pub requests: u64,
    /// How often somebody was woken by a call that does only that.
    pub wakes: u64,
    /// Waits for pages that had not come when the fault was read: from reading the event to having the page placed and the
    /// waiter woken. A wait is one however many events it causes; two threads that wait for the same page are two waits
    /// where threads are told apart (the guest's), else one.
    pub latency: Histogram,
    /// First part of it: until the request is handed to the requester, or, for a page that was asked for already, until
    /// the requests of the same batch of events are.
    pub queue: Histogram,
    /// Second part: until the bytes are there, that is, a `received` function is called.
    pub wire: Histogram,
    /// Third part: until the page is placed and the waiter woken.
    pub placement: Histogram,
    /// Waits for pages that were received before the fault was read, and only had to be placed. Not in the others.
    pub local: Histogram,
    /// Threads of this process, by thread id; the guest's only, and where the kernel tells who faults.
    pub threads: BTreeMap<u32, Share>,
    /// Faults that workers of the kernel took for the guest (asynchronous page faults of KVM).
    pub workers: Share,
    /// How many such workers were seen, up to 1024.
    pub worker_count: u64,
    /// Faults of threads that are not told apart: the kernel does not tell, or there are more than 256.
    pub others: Share,
    /// Why it is served no longer.
    pub quarantined: Option<String>,
}

/// Figures of the fault service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Each source that has not been removed.
    pub sources: Vec<SourceStatistics>,
    /// The longest that a fault of any source, removed ones included, waited for its page.
    pub largest_stall: Duration,
    /// Pages that [`prefetch`](crate::FaultService::prefetch) told to ask for; counted again if a lost link made that
    /// necessary.
    pub prefetched: u64,
    /// Of these, how many were touched: faults that found their page asked for as a neighbour, still under way or received
    /// already. A page counts once.
    pub prefetch_hits: u64,
    /// Pages that the background mapper placed.
    pub background_pages: u64,
    /// Pages that were found punched after they had been received.
    pub punched_pages: u64,
    /// Pages found in memory where COPY was to put the received bytes, and replaced.
    pub replaced_pages: u64,
}

impl Statistics {
    /// The figures of one source.
    pub fn source(&self, id: SourceId) -> Option<&SourceStatistics> {
        self.sources.iter().find(|source| source.id == id)
    }
}

/// Where the faults of threads are counted.
#[derive(Default)]
pub(crate) struct Row {
    pub faults: AtomicU64,
    pub latency: Recorder,
}

impl Row {
    fn share(&self) -> Share {
        Share { faults: self.faults.load(Relaxed), latency: self.latency.histogram() }
    }
}

#[derive(Default)]
struct Known {
    ours: BTreeMap<u32, Arc<Row>>,
    workers: BTreeSet<u32>,
}

/// The figures of one source, while it is served.
#[derive(Default)]
pub(crate) struct Counters {
    pub faults: AtomicU64,
    pub minor: AtomicU64,
    pub writes: AtomicU64,
    pub bad_addresses: AtomicU64,
    pub requests: AtomicU64,
    pub wakes: AtomicU64,
    pub latency: Recorder,
    pub queue: Recorder,
    pub wire: Recorder,
    pub placement: Recorder,
    pub local: Recorder,
    pub quarantined: OnceLock<String>,
    /// Taken by the fault thread for each fault, and by whoever looks at the figures.
    known: Mutex<Known>,
    workers: Arc<Row>,
    others: Arc<Row>,
}

impl Counters {
    /// Where a fault of the thread is counted.
    pub fn row(&self, thread: Option<u32>) -> Arc<Row> {
        let Some(thread) = thread else { return self.others.clone() };
        let mut known = lock(&self.known);
        if let Some(row) = known.ours.get(&thread) {
            return row.clone();
        }
        if known.workers.contains(&thread) {
            return self.workers.clone();
        }
        // It waits for us, so it still has its number.
        if !is_ours(thread) {
            if known.workers.len() < WORKERS {
                known.workers.insert(thread);
            }
            return self.workers.clone();
        }
        if known.ours.len() >= THREADS {
            return self.others.clone();
        }
        known.ours.entry(thread).or_default().clone()
    }

    pub fn statistics(&self, id: SourceId, name: &str) -> SourceStatistics {
        let (faults, minor) = (self.faults.load(Relaxed), self.minor.load(Relaxed));
        let (rows, worker_count): (Vec<(u32, Arc<Row>)>, _) = {
            let known = lock(&self.known);
            (known.ours.iter().map(|(thread, row)| (*thread, row.clone())).collect(), known.workers.len() as u64)
        };
        let threads: BTreeMap<_, _> = rows.into_iter().map(|(thread, row)| (thread, row.share())).collect();
        let (workers, others) = (self.workers.share(), self.others.share());
        // Where threads are told apart they add up, however many fault while we look.
        let told = threads.values().chain([&workers, &others]).map(|share| share.faults).sum();
        let faults = if id == SourceId::GUEST { told } else { faults };
        SourceStatistics {
            id,
            name: name.into(),
            faults,
            minor,
            missing: faults.saturating_sub(minor),
            writes: self.writes.load(Relaxed),
            bad_addresses: self.bad_addresses.load(Relaxed),
            requests: self.requests.load(Relaxed),
            wakes: self.wakes.load(Relaxed),
            latency: self.latency.histogram(),
            queue: self.queue.histogram(),
            wire: self.wire.histogram(),
            placement: self.placement.histogram(),
            local: self.local.histogram(),
            threads,
            workers,
            worker_count,
            others,
            quarantined: self.quarantined.get().cloned(),
        }
    }
}

#[cfg(test)]
mod tests;
