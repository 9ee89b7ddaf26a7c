//! How much of the push may be on its way at once.
//!
//! A page that somebody waits for cannot overtake, in the network, what was handed to it before. TCP fills whatever queue
//! stands before the narrowest link, so a requested page would wait for all of that queue, or be dropped with its end.
//! The push therefore sends no more than the link carries in the shortest round trip seen, and half of that or [`SLACK`]
//! more: enough to keep it busy, and the queue short. The bandwidth is what the peer has acknowledged since the last look; where that
//! was bounded by the window alone, the next one is larger.

use std::time::{Duration, Instant};

use wherry_stream::{Closer, Path};

/// What may stand in queues, in time, where half a round trip is less.
const SLACK: Duration = Duration::from_micros(500);
/// A way shorter than this is one within a host or a rack. There queues are short and fair among connections, and small
/// windows would only cost processor time.
const SHORT: Duration = Duration::from_micros(150);
/// The window of a channel is never smaller than this, in bytes.
const LEAST: u64 = 64 << 10;
/// Nor larger: the kernel's own bound is lower on most hosts.
const MOST: u64 = 64 << 20;
/// Between two looks; at first they are closer, because the first window is a guess.
const LOOK: Duration = Duration::from_millis(10);
const FIRST_LOOK: Duration = Duration::from_millis(1);

/// Windows of the data channels.
pub(super) struct Windows {
    channels: Vec<Channel>,
    look: Duration,
    next: Instant,
}

struct Channel {
    closer: Closer,
    window: Window,
}

impl Windows {
    /// Bounds the channels, as far as they are TCP and go a long way.
    pub(super) fn new(closers: &[Closer]) -> Self {
        let now = Instant::now();
        let channels = closers.iter().filter_map(|closer| {
            let path = closer.path().filter(|path| path.min_round_trip >= SHORT)?;
            let window = Window::new(path, now);
            Some(Channel { closer: closer.clone(), window })
        });
        let windows = Self { channels: channels.collect(), look: FIRST_LOOK, next: now + FIRST_LOOK };
        windows.channels.iter().for_each(Channel::set);
        windows
    }

    /// When to look again at the latest.
    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// Adapts the windows, if it is time.
    pub(super) fn look(&mut self) {
        let now = Instant::now();
        if now < self.next {
            return;
        }
        for channel in &mut self.channels {
            if let Some(path) = channel.closer.path()
                && channel.window.look(path, now)
            {
                channel.set();
            }
        }
        self.look = (self.look * 2).min(LOOK);
        self.next = now + self.look;
    }
}

impl Channel {
    fn set(&self) {
        // Without it a fault takes longer on a narrow link, nothing else.
        let _ = self.closer.set_window(self.window.bytes as usize);
    }
}

/// The window of one channel.
struct Window {
    bytes: u64,
    acknowledged: u64,
    seen: Instant,
}

impl Window {
    fn new(path: Path, now: Instant) -> Self {
        Self { bytes: 4 * LEAST, acknowledged: path.acknowledged, seen: now }
    }

    /// Whether it changed.
    fn look(&mut self, path: Path, now: Instant) -> bool {
        let bytes = path.acknowledged.saturating_sub(self.acknowledged);
        let time = now.saturating_duration_since(self.seen);
        (self.acknowledged, self.seen) = (path.acknowledged, now);
        let rate = bytes as f64 / time.as_secs_f64().max(1e-6);
        let way = path.min_round_trip;
        let fits = match rate * way.as_secs_f64() {
            // Nothing stood in a queue: the window alone was the bound.
            on_the_way if on_the_way > self.bytes as f64 * 0.8 => self.bytes * 2,
            _ => (rate * (way + SLACK.max(way / 2)).as_secs_f64()) as u64,
        };
        // Downwards in steps: a moment without acknowledgements says little about the link.
        let wanted = fits.max(self.bytes - self.bytes / 4).clamp(LEAST, MOST);
        let changed = wanted.abs_diff(self.bytes) > self.bytes / 16;
        if changed {
            self.bytes = wanted;
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What stands in the queue of a link, in time, after a while of sending with one window.
    fn queue(bytes_per_second: f64, round_trip: Duration) -> (f64, f64) {
        let mut now = Instant::now();
        let mut path = Path { acknowledged: 0, min_round_trip: round_trip };
        let mut window = Window::new(path, now);
        for _ in 0..200 {
            now += LOOK;
            // The link carries what it can; with a small window, what that allows.
            let rate = bytes_per_second.min(window.bytes as f64 / round_trip.as_secs_f64());
            path.acknowledged += (rate * LOOK.as_secs_f64()) as u64;
            window.look(path, now);
        }
        let used = (window.bytes as f64 / round_trip.as_secs_f64() / bytes_per_second).min(1.0);
        (used, window.bytes as f64 / bytes_per_second - round_trip.as_secs_f64())
    }

    #[test]
    fn a_link_is_used_to_the_full_and_its_queue_stays_short() {
        for (rate, round_trip) in [(125e6, 1000), (1.25e9, 200), (1.25e9, 10_000), (12.5e9, 150)] {
            let (used, queued) = queue(rate, Duration::from_micros(round_trip));
            assert!(used > 0.99, "{rate} bytes/s, {round_trip} us: only {used} of the link is used");
            let bound = f64::max(0.0007, round_trip as f64 * 0.6e-6);
            assert!(queued < bound, "{rate} bytes/s, {round_trip} us: {queued} s stand in the queue");
        }
    }

    #[test]
    fn a_link_that_becomes_slower_is_followed_and_one_that_stops_keeps_a_window() {
        let mut now = Instant::now();
        let mut path = Path { acknowledged: 0, min_round_trip: Duration::from_millis(1) };
        let mut window = Window::new(path, now);
        let mut run = |rate: u64, looks: u32| {
            for _ in 0..looks {
                now += LOOK;
                path.acknowledged += rate / 100;
                window.look(path, now);
            }
            window.bytes
        };
        let fast = run(1_000_000_000, 50);
        assert!(fast > 1_400_000, "{fast}");
        let slow = run(100_000_000, 50);
        assert!((LEAST..200_000).contains(&slow), "{slow}");
        assert!(run(0, 50) < LEAST * 17 / 16);
    }
}
