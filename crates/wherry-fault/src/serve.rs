//! The fault thread: reads events in batches, requests what lacks, resolves what is there.
//!
//! It never touches a guest map, so it can never wait for itself.

use std::sync::Arc;
use std::sync::atomic::Ordering::{self, Relaxed};
use std::time::Instant;

use rustix::buffer::spare_capacity;
use rustix::event::epoll;

use crate::service::{Shared, Trouble, Wanted};
use crate::source::Source;
use crate::statistics::{nanos, raise};
use crate::waiters::{Key, Waiter};
use crate::{Fault, SourceId, Want, lock, read};

/// What the eventfd is called in the epoll set; no source has this number.
pub(crate) const KICK: u64 = u64::MAX;

/// Batches read from one source before the others have their turn.
const TURN: usize = 16;
/// How often in a row a source may fault on one received unit. Its threads may all do so once; who goes on makes no
/// progress, and resolving its faults for ever would only take time from the others.
const REPEATS: u32 = 4096;

/// Serves until the service is stopped.
pub(crate) fn run(shared: &Arc<Shared>) {
    // Somebody waits for every event. Without the right to a higher priority it takes a little longer on a busy host.
    let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), -20);
    let mut events = Vec::with_capacity(16);
    let mut faults = Vec::with_capacity(64);
    let (mut wanted, mut waits) = (Vec::new(), Vec::new());
    while !shared.stopping.load(Ordering::SeqCst) {
        match epoll::wait(&shared.epoll, spare_capacity(&mut events), None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                shared.trouble(Trouble::Guest(format!("waiting for events: {error}")));
                return;
            }
        }
        shared.serving.store(true, Ordering::Relaxed);
        for event in events.drain(..) {
            if event.data.u64() == KICK {
                continue;
            }
            // It may have been removed since.
            if let Some(source) = shared.source(SourceId(event.data.u64() as u32)) {
                serve(shared, &source, event.flags, &mut faults, &mut wanted, &mut waits);
            }
        }
        shared.serving.store(false, Ordering::Relaxed);
    }
}

fn serve(
    shared: &Shared,
    source: &Source,
    flags: epoll::EventFlags,
    faults: &mut Vec<Fault>,
    wanted: &mut Vec<Wanted>,
    waits: &mut Vec<Key>,
) {
    if flags.intersects(epoll::EventFlags::ERR | epoll::EventFlags::HUP) {
        return misbehaved(shared, source, "its descriptor reports an error: never set up, or made blocking".into());
    }
    for _ in 0..TURN {
        faults.clear();
        let more = match &*read(&source.uffd) {
            Some(uffd) => uffd.read_events(faults),
            None => return,
        };
        let at = Instant::now();
        for fault in faults.iter() {
            waits.extend(handle(shared, source, fault, at, wanted));
        }
        if !waits.is_empty() {
            shared.waiters.handed(waits, Instant::now());
            waits.clear();
        }
        if !wanted.is_empty() {
            source.counters.requests.fetch_add(wanted.len() as u64, Relaxed);
            let requester = read(&shared.requester).clone();
            if let Some(requester) = requester {
                requester.request(wanted);
            }
            wanted.clear();
        }
        match more {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => return misbehaved(shared, source, error.to_string()),
        }
    }
}

/// Takes one fault; the unit whose bytes have to be waited for, if so.
fn handle(shared: &Shared, source: &Source, fault: &Fault, at: Instant, wanted: &mut Vec<Wanted>) -> Option<Key> {
    let place = source.translate(fault.address);
    let counters = &source.counters;
    counters.faults.fetch_add(1, Relaxed);
    counters.minor.fetch_add(fault.minor.into(), Relaxed);
    counters.writes.fetch_add(fault.write.into(), Relaxed);
    counters.bad_addresses.fetch_add(place.is_none().into(), Relaxed);
    let row = source.is_guest().then(|| counters.row(fault.thread));
    if let Some(row) = &row {
        row.faults.fetch_add(1, Relaxed);
    }
    let found = place.and_then(|(id, page)| Some((shared.block(id).ok()?, page)));
    let Some((block, page)) = found else {
        misbehaved(shared, source, format!("it faulted at {:#x}, which it has not mapped", fault.address));
        return None;
    };
    let unit = block.states.unit_of(page);
    let key = (block.id(), unit.start);
    // Noted before the flag is set: whoever clears the flag must find it.
    let waiter = Waiter { source: source.id, row, since: at, handed: None, minor: fault.minor };
    if !shared.waiters.add(key, waiter) {
        return None;
    }
    let want = shared.want(block, page, source.id, wanted);
    if want != Want::Request && block.states.take_neighbour(page) {
        shared.prefetch_hits.fetch_add(1, Relaxed);
    }
    if want != Want::Received {
        return Some(key);
    }
    shared.resolve(block, unit);
    let repeats = {
        let mut repeated = lock(&source.repeated);
        if repeated.0 != key {
            *repeated = (key, 0);
        }
        repeated.1 += 1;
        repeated.1
    };
    if repeats > REPEATS && !source.is_guest() {
        misbehaved(shared, source, format!("it made no progress: {repeats} faults on page {page}, which is there"));
    }
    None
}

/// Quarantines a foreign source; of our own it can only be told.
fn misbehaved(shared: &Shared, source: &Source, reason: String) {
    if source.is_guest() {
        shared.trouble(Trouble::Guest(reason));
    } else {
        shared.quarantine(source, reason);
    }
}

impl Shared {
    /// Wakes those who waited for a unit that is placed now, and takes their time. Waiters in our own guest maps were
    /// woken by the call that placed it. `arrived`: since when the bytes are there; `None` if they always were for who has
    /// not been told to wait.
    pub fn finish(&self, key: Key, unit: std::ops::Range<u64>, arrived: Option<Instant>) {
        for waiter in self.waiters.take(key) {
            let Some(source) = self.source(waiter.source) else { continue };
            if !source.is_guest()
                && let Some(uffd) = &*read(&source.uffd)
            {
                for (start, len) in source.addresses(key.0, unit.clone()) {
                    // Who registered minor faults would only fault again if it were woken. Its process is another one:
                    // whatever the answer is, waking is all that is left.
                    let mapped =
                        waiter.minor && matches!(uffd.continue_range(start, len, true), Ok(crate::Outcome::Done));
                    if !mapped {
                        let _ = uffd.wake(start, len);
                        source.counters.wakes.fetch_add(1, Relaxed);
                    }
                }
            }
            let (woken, counters) = (Instant::now(), &source.counters);
            let latency = woken.saturating_duration_since(waiter.since);
            raise(&self.largest_stall, nanos(latency));
            if waiter.handed.is_none() && arrived.is_none() {
                counters.local.add(latency);
                continue;
            }
            // A page that comes by itself may come before it is asked for, or before the event is read: no part is negative,
            // and the parts add up.
            let arrived = arrived.unwrap_or(woken).clamp(waiter.since, woken);
            let handed = waiter.handed.unwrap_or(arrived).min(arrived);
            counters.queue.add(handed - waiter.since);
            counters.wire.add(arrived - handed);
            counters.placement.add(woken - arrived);
            if let Some(row) = waiter.row {
                row.latency.add(latency);
            }
            // Last: whoever sees it counted finds its parts.
            counters.latency.add(latency);
        }
    }
}
