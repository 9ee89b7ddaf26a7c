//! Takes a share of their time away from the vCPUs, in small slices, so that a guest dirties memory more slowly than it
//! is sent.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::VcpuSet;

/// The length of a slice, in and out of the guest together, while the share is at most 90 percent. Short enough that
/// a guest sees a slow CPU rather than one that hangs.
const SLICE: Duration = Duration::from_millis(5);
/// Least time in the guest in a slice; with more than 90 percent slices get longer instead.
const LEAST_RUN: Duration = Duration::from_micros(500);

#[derive(Default)]
struct Orders {
    percent: u8,
    quit: bool,
}

/// The thread that keeps vCPUs out of the guest. It exists from the first time it is needed, and waits while nothing
/// is to be taken.
pub(crate) struct Throttle {
    vcpus: Arc<VcpuSet>,
    orders: Arc<(Mutex<Orders>, Condvar)>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Throttle {
    /// Takes nothing yet.
    pub(crate) fn new(vcpus: Arc<VcpuSet>) -> Self {
        Self { vcpus, orders: Arc::default(), thread: Mutex::new(None) }
    }

    /// Takes `percent` (at most 99) of their time from the vCPUs from now on; 0 ends it.
    pub(crate) fn set(&self, percent: u8) {
        let percent = percent.min(99);
        let (orders, changed) = &*self.orders;
        orders.lock().unwrap_or_else(PoisonError::into_inner).percent = percent;
        changed.notify_all();
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if percent > 0 && thread.is_none() {
            let (orders, vcpus) = (self.orders.clone(), self.vcpus.clone());
            let spawned = std::thread::Builder::new().name("throttle".into()).spawn(move || work(&orders, &vcpus));
            match spawned {
                Ok(new) => *thread = Some(new),
                // The guest runs at full speed then; a migration that depends on the throttle ends at its deadline.
                Err(error) => tracing::warn!(%error, "cannot start the throttle thread"),
            }
        }
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.orders.0.lock().unwrap_or_else(PoisonError::into_inner).quit = true;
        self.orders.1.notify_all();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the throttle thread panicked");
        }
    }
}

/// Time in and out of the guest for a share of 1 to 99 percent.
fn slice(percent: u8) -> (Duration, Duration) {
    let percent = u32::from(percent.clamp(1, 99));
    let run = (SLICE * (100 - percent) / 100).max(LEAST_RUN);
    (run, run * percent / (100 - percent))
}

fn work(orders: &(Mutex<Orders>, Condvar), vcpus: &VcpuSet) {
    let mut current = orders.0.lock().unwrap_or_else(PoisonError::into_inner);
    while !current.quit {
        if current.percent == 0 {
            current = orders.1.wait(current).unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        let (run, out) = slice(current.percent);
        for vcpu in vcpus.iter() {
            vcpu.throttle(out);
        }
        current = orders.1.wait_timeout(current, run + out).unwrap_or_else(PoisonError::into_inner).0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_have_the_asked_share_and_stay_small() {
        for percent in 1..=99 {
            let (run, out) = slice(percent);
            let share = out.as_secs_f64() / (run + out).as_secs_f64() * 100.0;
            assert!((share - f64::from(percent)).abs() < 0.5, "{percent}: {share}");
            assert!(run >= LEAST_RUN && run + out <= Duration::from_millis(51), "{percent}: {run:?} + {out:?}");
        }
    }
}
