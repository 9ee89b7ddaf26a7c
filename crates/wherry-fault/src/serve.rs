//! The fault thread: reads events in batches, requests what lacks, resolves what is there.
//!
//! It never touches a guest map, so it can never wait for itself.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::epoll;

use crate::service::{Shared, Trouble, Wanted};
use crate::source::Source;
use crate::waiters::Waiter;
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
    let mut wanted = Vec::new();
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
                serve(shared, &source, event.flags, &mut faults, &mut wanted);
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
            handle(shared, source, fault, at, wanted);
        }
        if !wanted.is_empty() {
            lock(&source.statistics).requests += wanted.len() as u64;
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

fn handle(shared: &Shared, source: &Source, fault: &Fault, at: Instant, wanted: &mut Vec<Wanted>) {
    let place = source.translate(fault.address);
    {
        let mut statistics = lock(&source.statistics);
        statistics.faults += 1;
        statistics.minor += u64::from(fault.minor);
        statistics.missing += u64::from(!fault.minor);
        statistics.writes += u64::from(fault.write);
        statistics.bad_addresses += u64::from(place.is_none());
    }
    let found = place.and_then(|(id, page)| Some((shared.block(id).ok()?, page)));
    let Some((block, page)) = found else {
        return misbehaved(shared, source, format!("it faulted at {:#x}, which it has not mapped", fault.address));
    };
    let unit = block.states.unit_of(page);
    let key = (block.id(), unit.start);
    // Noted before the flag is set: whoever clears the flag must find it.
    if !shared.waiters.add(key, Waiter { source: source.id, since: at, minor: fault.minor }) {
        return;
    }
    if shared.want(block, page, source.id, wanted) != Want::Received {
        return;
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
    /// woken by the call that placed it.
    pub fn finish(&self, key: crate::waiters::Key, unit: std::ops::Range<u64>, waiters: Vec<Waiter>) {
        for waiter in waiters {
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
                        lock(&source.statistics).wakes += 1;
                    }
                }
            }
            let latency: Duration = waiter.since.elapsed();
            lock(&source.statistics).latency.add(latency);
            let mut largest = lock(&self.largest_stall);
            *largest = latency.max(*largest);
        }
    }
}
