//! A back end is brought to rest: while the driver still runs, as far as that is possible, and after it has stopped.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use wherry_memory::GuestMemory;
use wherry_state::UnitError;

use super::{LOOK, Served, Thread, lend};
use crate::device::Position;
use crate::vhost::NET;
use crate::vhost::front::protocol;
use crate::vhost::wire::VhostError;

/// Between two looks whether a back end has given everything back.
const SETTLE: Duration = Duration::from_micros(50);

impl Thread {
    /// While the driver still runs: waits for a back end, and has it do what it has taken.
    pub(super) fn drain(&mut self, deadline: Instant) -> Result<(), UnitError> {
        // Half of the time is left for who comes next.
        let half = Instant::now() + deadline.saturating_duration_since(Instant::now()) / 2;
        while self.missing.is_some() {
            if Instant::now() >= half {
                return Err(self.gone());
            }
            std::thread::sleep(LOOK);
            self.find();
        }
        let result = self.starve(deadline);
        self.judge("draining it", result);
        Ok(())
    }

    /// While the driver still runs: takes the doorbells away from the back end, and waits until it has given back what it had
    /// taken. What the driver makes available meanwhile is carried.
    ///
    /// How much the back end has taken is what it asks to be notified after (virtio 1.3, section 2.7.10). One that does not
    /// say it so, or needs too long, gets its doorbells back, and has to do everything when the driver has been stopped.
    fn starve(&mut self, deadline: Instant) -> Result<(), VhostError> {
        let (Some(front), Some(active)) = (&self.front, &self.served) else { return Ok(()) };
        // Of a network device nothing is ever under way for long, and what it is told meanwhile it would miss.
        let answers = self.spec.id != NET && active.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        if !answers || self.held || self.starved {
            return Ok(());
        }
        let Ok(silent) = EventFd::new(EFD_NONBLOCK) else { return Ok(()) };
        for ring in &active.rings {
            front.set_kick(ring.given.index, lend(&silent))?;
        }
        self.starved = true;
        // Half of the time is left for who comes next.
        let half = Instant::now() + deadline.saturating_duration_since(Instant::now()) / 2;
        while !active.rings.iter().all(|ring| ring.taken(&active.memory) == ring.used(&active.memory)) {
            if Instant::now() >= half {
                tracing::debug!(socket = %self.path.display(), "the back end does not come to rest beside its driver");
                return self.feed();
            }
            std::thread::sleep(SETTLE);
        }
        // Nothing of it is left for the blackout.
        self.stop_rings()?;
        let at_rest = |ring: &Served, memory: &GuestMemory| ring.used(memory) == Some(ring.position.available);
        if self.served.as_ref().is_some_and(|active| active.rings.iter().all(|ring| at_rest(ring, &active.memory))) {
            self.saved = self.save()?;
        }
        Ok(())
    }

    /// What the back end keeps itself, if it does.
    fn save(&self) -> Result<Option<Vec<u8>>, VhostError> {
        match &self.front {
            Some(front) if self.served.is_some() && front.has(protocol::DEVICE_STATE) => front.device_state().map(Some),
            _ => Ok(None),
        }
    }

    /// Gives the doorbells back.
    pub(super) fn feed(&mut self) -> Result<(), VhostError> {
        let (Some(front), Some(active)) = (&self.front, &self.served) else { return Ok(()) };
        self.saved = None;
        if std::mem::take(&mut self.starved) {
            for ring in active.rings.iter().filter(|ring| ring.started) {
                front.set_kick(ring.given.index, lend(&ring.given.kick))?;
                let _ = ring.given.kick.write(1);
            }
        }
        Ok(())
    }

    /// Brings the back end to rest: the driver makes nothing available any more, everything it had made available is done,
    /// and the rings are stopped.
    ///
    /// They are not stopped before: some back ends close the eventfd of a ring that is stopped, and then fail when a request
    /// of it ends. If time runs out, the back end serves on.
    pub(super) fn rest(&mut self, deadline: Instant) -> Result<(), UnitError> {
        if self.missing.is_some() {
            return Err(self.gone());
        }
        if !self.starved {
            self.settle(deadline)?;
        }
        self.held = true;
        let result = self.stop_rings();
        self.judge("stopping its rings", result);
        if self.missing.is_some() {
            return Err(self.gone());
        }
        let given_back = self.await_used(deadline);
        self.starved = false;
        self.note_positions();
        given_back?;
        let saved = match self.saved.take() {
            Some(state) => Ok(Some(state)),
            None => self.save(),
        };
        let keep = |state: Option<Vec<u8>>| {
            *self.shared.state.lock().unwrap_or_else(PoisonError::into_inner) = state.unwrap_or_default();
        };
        let result = saved.map(keep);
        self.judge("saving its state", result);
        match self.missing {
            Some(_) => Err(self.gone()),
            None => Ok(()),
        }
    }

    fn gone(&self) -> UnitError {
        UnitError::Deadline(format!("the back end at {} has gone, with requests under way", self.path.display()))
    }

    pub(super) fn stop_rings(&mut self) -> Result<(), VhostError> {
        let (Some(front), Some(active)) = (&self.front, &mut self.served) else { return Ok(()) };
        let started: Vec<u16> = active.rings.iter().filter(|ring| ring.started).map(|ring| ring.given.index).collect();
        let bases = front.stop(&started)?;
        for (ring, base) in active.rings.iter_mut().filter(|ring| ring.started).zip(bases) {
            (ring.position.available, ring.started) = (base, false);
        }
        Ok(())
    }

    /// Waits until as much was given back as was taken when the rings were stopped.
    fn await_used(&mut self, deadline: Instant) -> Result<(), UnitError> {
        let Some(active) = &mut self.served else { return Ok(()) };
        for ring in &mut active.rings {
            loop {
                ring.position.used = ring.used(&active.memory).unwrap_or(ring.position.used);
                // A back end that has gone gives nothing back, and writes nothing.
                if ring.position.used == ring.position.available || self.front.is_none() {
                    break;
                }
                if Instant::now() >= deadline {
                    return Err(under_way(&self.path, ring));
                }
                std::thread::sleep(SETTLE);
            }
        }
        Ok(())
    }

    /// Waits until the back end has given back everything that is available: then it touches nothing any more.
    pub(super) fn settle(&mut self, deadline: Instant) -> Result<(), UnitError> {
        if self.spec.id == NET {
            // Buffers for packets wait until packets come; those that were taken and not used count as available.
            return Ok(());
        }
        let Some(active) = &mut self.served else { return Ok(()) };
        for ring in &mut active.rings {
            // The driver may have been stopped before it rang.
            let _ = ring.given.kick.write(1);
            while let (Some(available), Some(used)) = (ring.available(&active.memory), ring.used(&active.memory)) {
                ring.position = Position { available, used };
                if used == available || self.front.is_none() {
                    break;
                }
                if Instant::now() >= deadline {
                    return Err(under_way(&self.path, ring));
                }
                std::thread::sleep(SETTLE);
            }
        }
        Ok(())
    }

    fn note_positions(&mut self) {
        let Some(active) = &self.served else { return };
        let positions = active.rings.iter().map(|ring| (ring.given.index, ring.position)).collect();
        *self.shared.positions.lock().unwrap_or_else(PoisonError::into_inner) = positions;
        // What the back end has signalled last.
        for ring in &active.rings {
            if let Some(relay) = &ring.relay
                && relay.read().is_ok()
            {
                active.interrupts.ring(ring.given.index);
            }
        }
    }
}

fn under_way(path: &std::path::Path, ring: &Served) -> UnitError {
    let left = ring.position.available.wrapping_sub(ring.position.used);
    let (ring, path) = (ring.given.index, path.display());
    UnitError::Deadline(format!("the back end at {path} has {left} requests of ring {ring} under way"))
}
