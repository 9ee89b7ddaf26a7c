//! All vCPUs of a machine, and their threads.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use super::{Buses, Hold, Vcpu};
use crate::vm::{ExitNotice, VmError};

/// The vCPUs of one machine; owns their threads.
#[derive(Debug)]
pub(crate) struct VcpuSet {
    vcpus: Vec<Arc<Vcpu>>,
    /// Joined in [`end`](Self::end).
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl VcpuSet {
    /// Takes the vCPUs, in order of their numbers. They have no threads yet.
    pub(crate) fn new(vcpus: Vec<Arc<Vcpu>>) -> Self {
        Self { vcpus, threads: Mutex::default() }
    }

    /// Starts the threads. They wait until their vCPUs are held no more. When the machine ends, all vCPUs are held.
    pub(crate) fn spawn(self: &Arc<Self>, buses: &Buses, notice: &ExitNotice) -> Result<(), VmError> {
        let weak = Arc::downgrade(self);
        notice.on_exit(move |_| {
            if let Some(set) = weak.upgrade() {
                set.hold(Hold::Ended);
            }
        });
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for vcpu in &self.vcpus {
            threads.push(vcpu.spawn(buses.clone(), notice.clone())?);
        }
        Ok(())
    }

    /// The vCPUs, in order of their numbers.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Vcpu>> {
        self.vcpus.iter()
    }

    /// Holds all. Does not wait.
    pub(crate) fn hold(&self, why: Hold) {
        self.vcpus.iter().for_each(|vcpu| vcpu.hold(why));
    }

    /// Takes that hold from all.
    pub(crate) fn release(&self, why: Hold) {
        self.vcpus.iter().for_each(|vcpu| vcpu.release(why));
    }

    /// Whether this holds all of them.
    pub(crate) fn is_held(&self, why: Hold) -> bool {
        self.vcpus.iter().all(|vcpu| vcpu.is_held(why))
    }

    /// Waits until all are at rest; the numbers of those that are not by the deadline.
    pub(crate) fn wait_rest(&self, deadline: Instant) -> Vec<u32> {
        self.vcpus.iter().filter(|vcpu| !vcpu.wait_rest(deadline)).map(|vcpu| vcpu.index()).collect()
    }

    /// Tells the guest that vCPUs at rest were not running, so that its watchdogs forgive the gap.
    pub(crate) fn forgive_gap(&self) {
        for vcpu in self.vcpus.iter().filter(|vcpu| vcpu.wait_rest(Instant::now())) {
            // It fails where the guest has no kvm-clock, and then there is nothing to tell.
            let _ = vcpu.fd().kvmclock_ctrl();
        }
    }

    /// Ends the threads and waits until they are gone.
    pub(crate) fn end(&self) {
        self.vcpus.iter().for_each(|vcpu| vcpu.quit());
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            if thread.thread().id() == std::thread::current().id() {
                // A device's callback may drop the last handle of a machine on a vCPU's own thread; it ends after it.
                continue;
            }
            if thread.join().is_err() {
                tracing::error!("a vCPU thread panicked");
            }
        }
    }
}

impl Drop for VcpuSet {
    fn drop(&mut self) {
        self.end();
    }
}
