//! A back end that was lost, and the next one at its socket, which goes on with its requests.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::Thread;
use crate::device::Position;
use crate::vhost::front::protocol;
use crate::vhost::wire::VhostError;
use crate::vhost::{BLK, Backend};

/// After the loss of a back end, before the first and before later looks for another.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// The driver's feature of the transport, which back ends leave to the front end or offer.
const VERSION_1: u64 = 1 << 32;

/// A back end that was lost, and whose requests under way are known.
pub(super) struct Missing {
    /// When to look for the next one, and how long to wait after that.
    pub(super) next: Instant,
    pub(super) pause: Duration,
}

impl Thread {
    /// Looks for the next back end.
    pub(super) fn find(&mut self) {
        let Some(missing) = self.missing.take() else { return };
        match self.succeed() {
            Ok(()) => tracing::warn!(socket = %self.path.display(), "another vhost-user back end goes on"),
            Err(error) if matches!(error, VhostError::Lacks { .. }) => {
                self.front = None;
                tracing::warn!(%error, "a vhost-user back end cannot go on with the device of another");
                if let Some(active) = &self.served {
                    active.interrupts.failed(&error);
                }
            }
            Err(error) => {
                self.front = None;
                tracing::debug!(%error, "there is no vhost-user back end yet");
                let pause = (2 * missing.pause).min(LONGEST_PAUSE);
                self.missing = Some(Missing { next: Instant::now() + pause, pause });
            }
        }
    }

    /// Has another back end go on.
    fn succeed(&mut self) -> Result<(), VhostError> {
        let backend = Backend::connect(&self.spec)?;
        let Some(front) = backend.front.lock().unwrap_or_else(PoisonError::into_inner).take() else { return Ok(()) };
        let Some(active) = &mut self.served else { return Ok(()) };
        let config = self.shared.config.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let lost = active.features & !(backend.features | VERSION_1);
        if lost != 0 {
            return Err(front.connection().lacks(format!("it has not the features {lost:#x}, which its driver uses")));
        }
        if self.spec.id == BLK && backend.config().get(..8) != config.get(..8) {
            return Err(front.connection().lacks("its disk has another size than that before"));
        }
        if !front.has(protocol::INFLIGHT_SHMFD) {
            return Err(front.connection().lacks("it does not take requests that are under way (INFLIGHT_SHMFD)"));
        }
        for ring in &mut active.rings {
            // What was taken and not given back is noted, and comes first.
            let used = ring.used(&active.memory).unwrap_or(ring.position.used);
            ring.position = Position { available: used, used };
        }
        self.take_up(front)?;
        self.show()?;
        if let Some(active) = &self.served {
            // The one before may have given requests back and ended before it said so.
            active.rings.iter().for_each(|ring| active.interrupts.ring(ring.given.index));
        }
        Ok(())
    }
}
