//! What a guest loses after a switch, beside the switch itself: it runs, but each page that it touches for the first time costs a
//! fault.
//!
//! Its heartbeats are counted from outside, by its own clock: how many there were in a while before, and how many in the first
//! moments after the largest gap. What is missing of them, in time, is what it has lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::probe::{Beat, ProbeRam};

/// The first moments after a switch that are looked at.
pub(super) const MOMENTS: [Duration; 3] =
    [Duration::from_millis(10), Duration::from_millis(100), Duration::from_millis(1000)];

/// How often the heartbeat is looked at. As for a [watcher](crate::probe::Watcher), not more often.
const LOOK: Duration = Duration::from_micros(500);

/// A thread that writes down how a guest's heart beats.
pub(super) struct Pulse {
    thread: Option<JoinHandle<std::io::Result<Vec<Beat>>>>,
    stop: Arc<AtomicBool>,
}

impl Pulse {
    /// Of its vCPU 0.
    pub(super) fn feel(ram: ProbeRam) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let work = move || {
            // Without the right to it there are fewer beats.
            let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), -20);
            let mut beats = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                beats.push(ram.beat(0)?);
                std::thread::sleep(LOOK);
            }
            Ok(beats)
        };
        let thread = std::thread::Builder::new().name("pulse".into()).spawn(work).context("starting a thread")?;
        Ok(Self { thread: Some(thread), stop })
    }

    /// What it has written down.
    pub(super) fn finish(mut self) -> Result<Vec<Beat>> {
        self.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { bail!("the pulse was finished before") };
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).context("looking at the guest's heart")
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What was lost in each of the [`MOMENTS`], of these beats. The guest was undisturbed up to `calm`, a TSC; its largest gap took
/// `gap` ticks and ended at `end`.
pub(super) fn lost(beats: &[Beat], khz: u64, calm: u64, (gap, end): (u64, u64)) -> Result<[Duration; 3]> {
    let begin = end.saturating_sub(gap);
    let before: Vec<_> = beats.iter().filter(|beat| beat.tsc <= calm.min(begin)).collect();
    let (Some(first), Some(last)) = (before.first(), before.last()) else { bail!("no heartbeat before the switch") };
    if last.tsc <= first.tsc || last.count <= first.count {
        bail!("the guest's heart did not beat before the switch");
    }
    let rate = (last.count - first.count) as f64 / (last.tsc - first.tsc) as f64;
    // The gap began soon after somebody looked.
    let left = beats.iter().rev().find(|beat| beat.tsc <= begin).context("no heartbeat before the gap")?;
    let count = left.count as f64 + rate * (begin - left.tsc) as f64;
    let mut lost = [Duration::ZERO; 3];
    for (lost, moment) in lost.iter_mut().zip(MOMENTS) {
        let ticks = moment.as_micros() as u64 * khz / 1000;
        let pair = beats.windows(2).find(|pair| pair[1].tsc >= end + ticks);
        let [one, other] = pair.context("the guest was not looked at for long enough")? else { unreachable!("two") };
        let part = ((end + ticks).saturating_sub(one.tsc)) as f64 / (other.tsc - one.tsc).max(1) as f64;
        let there = one.count as f64 + part * (other.count - one.count) as f64;
        *lost = moment.mul_f64((1.0 - (there - count) / (rate * ticks as f64)).clamp(0.0, 1.0));
    }
    Ok(lost)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_is_what_is_missing_of_the_beats_before() {
        // A thousand beats in each millisecond of a million ticks; then a gap of 2 ms, and half of that for 50 ms.
        let beat = |us: u64| {
            let beats = match us {
                0..100_000 => us,
                100_000..102_000 => 100_000,
                102_000..152_000 => 100_000 + (us - 102_000) / 2,
                _ => 125_000 + (us - 152_000),
            };
            Beat { count: 7 + beats, tsc: us * 1000 }
        };
        // In the gap nobody sees a beat but the last one.
        let seen = (0..1_200_000)
            .step_by(500)
            .map(|us| if (100_000..102_000).contains(&us) { beat(100_000) } else { beat(us) });
        let beats: Vec<_> = seen.collect();
        let lost = lost(&beats, 1_000_000, 90_000_000, (2_000_000, 102_000_000)).unwrap();
        for (lost, expected) in lost.iter().zip([5, 25, 25]) {
            assert!(
                lost.abs_diff(Duration::from_millis(expected)) < Duration::from_micros(20),
                "{lost:?}, not {expected} ms"
            );
        }
    }

    #[test]
    fn a_guest_that_was_not_seen_is_said_so() {
        assert!(lost(&[], 1000, 1, (1, 2)).is_err());
        let still = [Beat { count: 1, tsc: 1 }; 3];
        assert!(lost(&still, 1000, 1, (1, 2)).is_err());
    }
}
