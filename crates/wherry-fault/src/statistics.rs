//! What is counted and timed of each fault source.

use std::time::Duration;

use crate::SourceId;

/// Latencies in buckets of powers of two: bucket `n` counts those below `2^n` microseconds that no smaller one counts.
/// The last bucket has no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    buckets: [u64; 32],
    largest: Duration,
}

impl Histogram {
    pub(crate) fn add(&mut self, latency: Duration) {
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - micros.leading_zeros()).min(31);
        self.buckets[bucket as usize] += 1;
        self.largest = self.largest.max(latency);
    }

    /// The counts; bucket `n` is for latencies below `2^n` microseconds.
    pub fn buckets(&self) -> &[u64; 32] {
        &self.buckets
    }

    /// How many latencies were counted.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The largest latency.
    pub fn largest(&self) -> Duration {
        self.largest
    }

    /// The upper limit of the bucket below which `fraction` (0 to 1) of all latencies lie; `None` if there are none.
    pub fn quantile(&self, fraction: f64) -> Option<Duration> {
        let count = self.count();
        let rank = ((count as f64 * fraction).ceil() as u64).clamp(1, count.max(1));
        let mut below = 0;
        for (n, bucket) in self.buckets.iter().enumerate() {
            below += bucket;
            if below >= rank && count > 0 {
                return Some(Duration::from_micros(1 << n).min(self.largest));
            }
        }
        None
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
    /// Pages that were asked for because of its faults.
    pub requests: u64,
    /// How often somebody was woken by a call that does only that.
    pub wakes: u64,
    /// From reading an event to having its page placed, for the first event of each wait.
    pub latency: Histogram,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_fall_into_the_bucket_whose_limit_they_stay_below() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.5), None);
        for nanos in [0, 999, 1_000, 3_999, 4_000] {
            histogram.add(Duration::from_nanos(nanos));
        }
        histogram.add(Duration::from_secs(1_000_000));
        assert_eq!(histogram.buckets()[..4], [2, 1, 1, 1]);
        assert_eq!(histogram.buckets()[31], 1);
        assert_eq!(histogram.quantile(0.5), Some(Duration::from_micros(2)));
        assert_eq!(histogram.quantile(1.0), Some(histogram.largest()).map(|d| d.min(Duration::from_micros(1 << 31))));
    }
}
