//! Workers as threads of this process, in real time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crate::device::Device;
use crate::engines::Scratch;

/// The worker threads of a device, `wherry-accel-N`. They end with this value.
pub struct Workers {
    device: Arc<Device>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Workers({} of {:?})", self.threads.len(), self.device)
    }
}

impl Workers {
    /// Starts as many threads as the device has workers.
    pub fn start(device: Arc<Device>) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut workers = Self { device, stop, threads: Vec::new() };
        for worker in 0..workers.device.workers() {
            let (device, stop) = (workers.device.clone(), workers.stop.clone());
            let builder = std::thread::Builder::new().name(format!("wherry-accel-{worker}"));
            // Those that were started end when `workers` is dropped on the way out.
            workers.threads.push(builder.spawn(move || work(&device, worker, &stop))?);
        }
        Ok(workers)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.device.wake();
        for thread in self.threads.drain(..) {
            // A worker that panicked has said so; there is nobody to hand it to here.
            let _ = thread.join();
        }
    }
}

/// Looks of a spinning operation in one step: some microseconds.
const LOOKS: u32 = 256;

/// How long a worker goes on with one piece of work, in nanoseconds: long beside what it takes to give it back and take the
/// next (a few microseconds), short beside a slice.
const QUANTUM: u64 = 100_000;

fn work(device: &Device, worker: usize, stop: &AtomicBool) {
    let mut scratch = Scratch::default();
    (scratch.looks, scratch.quantum) = (LOOKS, QUANTUM);
    let stopped = || stop.load(Ordering::SeqCst);
    while !stopped() {
        let event = device.poll();
        match device.take(worker) {
            Some(task) => {
                let ran = device.run(task, &mut scratch);
                device.give_back(ran);
            }
            None => {
                let now = device.now();
                let due = device.next_due(worker);
                let until = [event, due].into_iter().flatten().filter(|at| *at > now).min();
                device.wait(until, &stopped, worker);
            }
        }
    }
}
