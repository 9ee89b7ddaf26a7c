//! The bandwidth limit: one token bucket for all data channels.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::journey::lock;

/// How much may be sent at once after a pause.
const BURST: Duration = Duration::from_millis(5);

/// Hands out bytes at a given rate.
#[derive(Debug)]
pub(crate) struct Bucket {
    /// When the bytes handed out so far are paid for.
    paid: Mutex<Instant>,
}

impl Bucket {
    pub(crate) fn new() -> Self {
        Self { paid: Mutex::new(Instant::now()) }
    }

    /// Takes `bytes` at `rate` bytes per second, and tells how long the caller has to wait before it sends them.
    /// Several callers share the rate.
    pub(crate) fn take(&self, bytes: u64, rate: u64, now: Instant) -> Duration {
        let price = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        let mut paid = lock(&self.paid);
        let start = (*paid).max(now.checked_sub(BURST).unwrap_or(now));
        *paid = start + price;
        start.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_over_time_and_is_shared() {
        let bucket = Bucket::new();
        let start = Instant::now() + Duration::from_secs(1);
        let mut now = start;
        for _ in 0..1000 {
            now += bucket.take(1 << 20, 100 << 20, now);
        }
        let took = (now - start).as_secs_f64();
        assert!((9.8..10.1).contains(&took), "1000 MiB at 100 MiB/s took {took} s");
    }

    #[test]
    fn a_pause_earns_no_more_than_the_burst() {
        let bucket = Bucket::new();
        let late = Instant::now() + Duration::from_secs(3600);
        assert_eq!(bucket.take(100 << 20, 100 << 20, late), Duration::ZERO);
        let wait = bucket.take(1, 100 << 20, late);
        assert!(wait > Duration::from_millis(990), "{wait:?}");
    }
}
