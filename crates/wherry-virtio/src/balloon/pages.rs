//! What the device's thread does with what the guest names: pages in and out of the balloon, statistics, free pages.
//!
//! A request is done as soon as it is taken, but for one: the buffer of statistics waits until new ones are wanted. It moves
//! with the guest.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use wherry_memory::GRANULE;

use super::{DEFLATE, FIRST_COMMAND, HINTS, INFLATE, MUST_TELL_HOST, REPORTS, STATISTICS, Shared, Statistics, lock};
use crate::chain::{Broken, Chain};
use crate::ring::Ring;
use crate::worker::Handler;

/// Requests of one kind in one go, so that orders do not wait for long.
const TURN: usize = 16;
/// Page numbers that are read at a time.
const NUMBERS: usize = 1024;
/// Most bytes of page numbers in one request; drivers use far fewer.
const MOST_NUMBERS: u32 = 64 << 10;
/// Bytes of one statistic: a tag of 16 bits, and its value.
const STATISTIC: usize = 10;
/// Most statistics that are read.
const MOST_STATISTICS: usize = 64;

/// The device's side of its rings.
pub(super) struct Pages {
    shared: Arc<Shared>,
    features: u64,
    /// The command that the guest answers.
    answers: Option<u32>,
}

impl Pages {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, features: 0, answers: None }
    }

    /// Pages by their numbers. What lies outside of RAM is not for us to judge: there is nothing to give back.
    fn numbers(
        &self,
        ring: &Ring,
        chain: Chain,
        mut each: impl FnMut(&Shared, usize, std::ops::Range<u64>),
    ) -> Result<(), Broken> {
        if chain.readable.len() > MOST_NUMBERS {
            return Err(Broken::Request("more page numbers for a balloon than one request may have"));
        }
        let mut rest = chain.readable;
        let mut bytes = [0; 4 * NUMBERS];
        while !rest.is_empty() {
            let len = rest.take_front(bytes.len() as u32).read(ring.memory(), &mut bytes);
            // Neighbours together: one hole is made as fast as one page of it.
            let mut run: Option<(u64, u64)> = None;
            let mut done = |run: Option<(u64, u64)>| {
                let Some((first, count)) = run else { return };
                for (index, pages) in self.shared.memory.granules(first * GRANULE, count * GRANULE) {
                    each(&self.shared, index, pages);
                }
            };
            for number in bytes[..len].chunks_exact(4) {
                let number = u64::from(u32::from_le_bytes([number[0], number[1], number[2], number[3]]));
                run = match run {
                    Some((first, count)) if first + count == number => Some((first, count + 1)),
                    Some((first, count)) if number.checked_add(1) == Some(first) => Some((number, count + 1)),
                    other => {
                        done(other);
                        Some((number, 1))
                    }
                };
            }
            done(run);
        }
        Ok(())
    }

    fn statistics(&self, ring: &mut Ring) -> Result<(), Broken> {
        let mut waiting = lock(&self.shared.waiting);
        while let Some(chain) = ring.pop()? {
            if let Some(before) = waiting.replace(chain.head) {
                // A driver gives one; should it give more, it has them back.
                ring.push(before, 0)?;
            }
            let mut bytes = [0; STATISTIC * MOST_STATISTICS];
            let len = chain.readable.read(ring.memory(), &mut bytes);
            *lock(&self.shared.statistics) = statistics(&bytes[..len]);
        }
        if waiting.is_some()
            && self.shared.refresh.swap(false, Ordering::AcqRel)
            && let Some(head) = waiting.take()
        {
            ring.push(head, 0)?;
        }
        Ok(())
    }

    /// Section 5.5.6.5. A readable buffer says which command is answered from here on, a writable one is free memory.
    fn hint(&mut self, ring: &Ring, chain: &Chain) {
        if chain.readable.len() >= 4 {
            let mut id = [0; 4];
            chain.readable.read(ring.memory(), &mut id);
            let id = u32::from_le_bytes(id);
            self.answers = (id >= FIRST_COMMAND).then_some(id);
        }
        let mut named = lock(&self.shared.named);
        // Looked at with the lock: what answers an older command may be in use again.
        let current = self.answers == Some(self.shared.command.load(Ordering::Acquire));
        let Some(named) = named.as_mut().filter(|_| current) else { return };
        for (address, len) in chain.writable.ranges() {
            for (index, pages) in self.shared.memory.granules(address, len) {
                named[index].insert_range(pages);
            }
        }
    }
}

fn statistics(bytes: &[u8]) -> Statistics {
    let mut all = Statistics::default();
    for entry in bytes.chunks_exact(STATISTIC) {
        let (tag, value) = entry.split_at(2);
        let Ok(value) = value.try_into().map(u64::from_le_bytes) else { continue };
        let field = match u16::from_le_bytes([tag[0], tag[1]]) {
            0 => &mut all.swap_in,
            1 => &mut all.swap_out,
            2 => &mut all.major_faults,
            3 => &mut all.minor_faults,
            4 => &mut all.free,
            5 => &mut all.total,
            6 => &mut all.available,
            7 => &mut all.caches,
            _ => continue,
        };
        *field = Some(value);
    }
    all
}

impl Handler for Pages {
    fn begin(&mut self, _rings: &mut [Ring], features: u64) -> Result<(), Broken> {
        self.features = features;
        self.answers = None;
        Ok(())
    }

    fn serve(&mut self, rings: &mut [Ring]) -> Result<(), Broken> {
        for ring in rings {
            if ring.index() == STATISTICS {
                self.statistics(ring)?;
                continue;
            }
            for _ in 0..TURN {
                let Some(chain) = ring.pop()? else { break };
                let head = chain.head;
                match ring.index() {
                    INFLATE => {
                        let later = self.features & MUST_TELL_HOST != 0;
                        self.numbers(ring, chain, |shared, index, pages| shared.memory.inflate(index, pages, later))?;
                    }
                    DEFLATE => self.numbers(ring, chain, |shared, index, pages| shared.memory.deflate(index, pages))?,
                    HINTS => self.hint(ring, &chain),
                    REPORTS => {
                        for (address, len) in chain.writable.ranges() {
                            self.shared.memory.give_back(address, len);
                        }
                    }
                    _ => {}
                }
                ring.push(head, 0)?;
            }
        }
        Ok(())
    }

    fn reap(&mut self, _rings: &mut [Ring]) -> Result<(), Broken> {
        if self.shared.news.read().is_ok() {
            self.shared.memory.catch_up();
        }
        Ok(())
    }

    fn waits(&self, _ring: u16) -> bool {
        true
    }

    fn has_room(&self) -> bool {
        true
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn event(&self) -> Option<RawFd> {
        Some(self.shared.news.as_raw_fd())
    }

    fn cancel(&mut self) {}

    fn settle(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn forget(&mut self) {
        (self.features, self.answers) = (0, None);
        self.shared.memory.forget();
        self.shared.actual.store(0, Ordering::Release);
        *lock(&self.shared.waiting) = None;
        *lock(&self.shared.statistics) = Statistics::default();
        // Whoever has asked has no answer.
        if let Some(named) = lock(&self.shared.named).as_mut() {
            *named = self.shared.memory.none();
        }
    }
}
