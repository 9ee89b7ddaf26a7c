//! Time for the scheduler: a trait, so that its thresholds can be tested on time that a test makes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Nanoseconds since some fixed point. Never goes back.
pub trait Clock: Send + Sync {
    /// The time now.
    fn now(&self) -> u64;
}

/// The machine's monotonic clock, from when it was made.
#[derive(Debug)]
pub struct RealClock(Instant);

impl Default for RealClock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for RealClock {
    fn now(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Time that stands still until it is told to go on.
#[derive(Debug, Default)]
pub struct VirtualClock(AtomicU64);

impl VirtualClock {
    /// Goes on to `time`; never back.
    pub fn advance_to(&self, time: u64) {
        self.0.fetch_max(time, Ordering::SeqCst);
    }
}

impl Clock for VirtualClock {
    fn now(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}
