//! What a line does to packets, without any I/O: it sends one after the other at its rate, holds back what has to wait
//! for that up to a bound, and delivers each a delay after it was sent.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// What one direction of a link is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// From the end of sending a packet until it is there.
    pub delay: Duration,
    /// Bytes per second.
    pub rate: u64,
    /// Bytes that wait to be sent, at most; what comes then is dropped.
    pub queue: u64,
}

impl Shape {
    /// A line with a round trip of twice `delay` at `rate` bytes per second, with a queue of as much as is on the way
    /// in a round trip, but at least 512 KiB: what a switch has.
    pub fn new(delay: Duration, rate: u64) -> Self {
        let on_the_way = (2.0 * delay.as_secs_f64() * rate as f64) as u64;
        Self { delay, rate, queue: on_the_way.max(512 << 10) }
    }

    fn time_for(&self, bytes: u64) -> Duration {
        Duration::from_nanos((u128::from(bytes) * 1_000_000_000 / u128::from(self.rate.max(1))) as u64)
    }
}

/// What went over one direction of a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Packets that were delivered.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packets that were dropped: the queue was full, or the other end was down.
    pub dropped: u64,
}

/// One direction of a link.
#[derive(Debug)]
pub(crate) struct Line {
    shape: Shape,
    /// When everything accepted so far is sent.
    free: Instant,
    /// What has not been delivered, with when it will be. Bounded: what waits by the queue, what was sent by rate and
    /// delay.
    packets: VecDeque<(Instant, Box<[u8]>)>,
}

impl Line {
    pub(crate) fn new(shape: Shape, now: Instant) -> Self {
        Self { shape, free: now, packets: VecDeque::new() }
    }

    /// Takes a packet that came `now`; `false`: it is dropped.
    pub(crate) fn offer(&mut self, packet: &[u8], now: Instant) -> bool {
        let wait = self.free.saturating_duration_since(now);
        if wait > self.shape.time_for(self.shape.queue) {
            return false;
        }
        self.free = now + wait + self.shape.time_for(packet.len() as u64);
        self.packets.push_back((self.free + self.shape.delay, packet.into()));
        true
    }

    /// When the next packet is to be delivered.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.packets.front().map(|(at, _)| *at)
    }

    /// A packet that is to be delivered by `now`.
    pub(crate) fn due(&mut self, now: Instant) -> Option<Box<[u8]>> {
        self.packets.pop_front_if(|(at, _)| *at <= now).map(|(_, packet)| packet)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { delay: Duration::from_millis(5), rate: 1_000_000, queue: 3000 };
    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn packets_are_sent_one_after_the_other_and_arrive_a_delay_later() {
        let begun = Instant::now();
        let mut line = Line::new(SHAPE, begun);
        assert!(line.offer(&[1; 1000], begun) && line.offer(&[2; 1000], begun));
        assert_eq!(line.next(), Some(begun + 6 * MS));
        assert_eq!(line.due(begun + 6 * MS - Duration::from_nanos(1)), None);
        assert_eq!(line.due(begun + 6 * MS).unwrap()[0], 1);
        assert_eq!(line.due(begun + 6 * MS), None);
        assert_eq!(line.due(begun + 7 * MS).unwrap()[0], 2);
        // A line that had nothing to do has saved nothing up.
        let later = begun + 100 * MS;
        assert!(line.offer(&[3; 1000], later));
        assert_eq!(line.next(), Some(later + 6 * MS));
    }

    #[test]
    fn what_the_queue_does_not_hold_is_dropped_until_there_is_room() {
        let begun = Instant::now();
        let mut line = Line::new(SHAPE, begun);
        // One is being sent, three wait.
        let taken = (0..10).filter(|_| line.offer(&[0; 1000], begun)).count();
        assert_eq!(taken, 4);
        assert!(line.offer(&[0; 1000], begun + MS));
        assert!(!line.offer(&[0; 1000], begun + MS));
    }

    #[test]
    fn a_queue_holds_a_round_trip_or_what_a_switch_has() {
        assert_eq!(Shape::new(10 * MS, 1_000_000_000).queue, 20_000_000);
        assert_eq!(Shape::new(MS, 1000).queue, 512 << 10);
    }
}
