//! Workers on virtual time: every step takes the time it is said to cost, and everything that happens is the same each
//! time it is run.

use std::sync::Arc;

use crate::abi::Fence;
use crate::clock::{Clock, VirtualClock};
use crate::device::Device;
use crate::device::Ran;
use crate::engines::Scratch;
use crate::scheduler::FenceState;

/// Drives a device whose clock is virtual.
pub struct Simulation {
    device: Arc<Device>,
    clock: Arc<VirtualClock>,
    /// What each worker is doing, and when it will be done (clock time).
    under_way: Vec<Option<(u64, Ran)>>,
    scratch: Scratch,
}

impl std::fmt::Debug for Simulation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Simulation({:?} at {} ns)", self.device, self.clock.now())
    }
}

impl Simulation {
    /// Workers for a device; `clock` is the one the device was made with.
    pub fn new(device: Arc<Device>, clock: Arc<VirtualClock>) -> Self {
        let under_way = (0..device.workers()).map(|_| None).collect();
        Self { device, clock, under_way, scratch: Scratch::default() }
    }

    /// Lets `nanoseconds` of virtual time pass.
    pub fn run_for(&mut self, nanoseconds: u64) {
        let end = self.clock.now() + nanoseconds;
        self.run(end, &mut || false);
    }

    /// Runs until `done`, at most for `nanoseconds`; whether it came so far.
    pub fn run_until(&mut self, nanoseconds: u64, mut done: impl FnMut() -> bool) -> bool {
        let end = self.clock.now() + nanoseconds;
        self.run(end, &mut done) || done()
    }

    /// Runs until a fence is signalled, at most for `nanoseconds`.
    pub fn wait(&mut self, fence: Fence, nanoseconds: u64) -> FenceState {
        let device = self.device.clone();
        let state = move || device.fence(fence).unwrap_or(FenceState::Pending);
        self.run_until(nanoseconds, || state() != FenceState::Pending);
        state()
    }

    /// Lets workers end the steps they have begun, after the device was told to stop.
    pub fn finish(&mut self) {
        for worker in 0..self.under_way.len() {
            if let Some((at, ran)) = self.under_way[worker].take() {
                self.clock.advance_to(at);
                self.device.give_back(ran);
            }
        }
    }

    fn run(&mut self, end: u64, done: &mut dyn FnMut() -> bool) -> bool {
        loop {
            let now = self.clock.now();
            for worker in 0..self.under_way.len() {
                if let Some((_, ran)) = self.under_way[worker].take_if(|(at, _)| *at <= now) {
                    self.device.give_back(ran);
                }
            }
            let event = self.device.poll().map(|at| self.to_clock(at));
            let mut next = end;
            for worker in 0..self.under_way.len() {
                if self.under_way[worker].is_none()
                    && let Some(task) = self.device.take(worker)
                {
                    let ran = self.device.run(task, &mut self.scratch);
                    self.under_way[worker] = Some((now + ran.cost, ran));
                }
                let busy = self.under_way[worker].as_ref().map(|(at, _)| *at);
                let due = self.device.next_due(worker).map(|at| self.to_clock(at)).filter(|at| *at > now);
                next = [busy, due].into_iter().flatten().fold(next, u64::min);
            }
            next = event.filter(|at| *at > now).map_or(next, |at| next.min(at));
            // Looked at before time goes on: it stands where it was when it was done.
            if done() {
                return true;
            }
            if now >= end {
                return false;
            }
            self.clock.advance_to(next);
        }
    }

    /// Device time as clock time.
    fn to_clock(&self, device_time: u64) -> u64 {
        device_time.saturating_add(self.clock.now()).saturating_sub(self.device.now())
    }
}
