//! A back end that the next process of the machine goes on with: it serves its rings on, and hears nothing of it.
//!
//! The thread speaks with it in whole messages and waits for each answer, so between two orders nothing is on its way. What is kept are
//! the sockets, the memory in which it notes what is under way, and the eventfds that it signals where the guest has no vector; those by which it is rung and
//! those of vectors belong to the transport.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use wherry_handover::{RegistryError, Shelf};
use wherry_interrupt::{Event, Events};

use super::lost::Missing;
use super::{Served, Thread};
use crate::device::RingGiven;
use crate::vhost::front::{Front, InFlight};
use crate::vhost::saved::{SavedBackend, SavedServed};
use crate::vhost::wire::VhostError;

/// Names on the shelf.
const CONNECTION: &str = "connection";
const CHANNEL: &str = "channel";
pub(super) const IN_FLIGHT: &str = "in-flight";
const RELAY: &str = "relay";

/// What came from the process before, when this one was made. What has changed since comes again.
#[derive(Default)]
pub(in super::super) struct Came(BTreeMap<(&'static str, u32), OwnedFd>);

impl Came {
    /// Takes all that there may be of a device with so many rings.
    pub(in super::super) fn claim(shelf: &Shelf, rings: u16) -> Self {
        let relays = (0..rings.into()).map(|ring| (RELAY, ring));
        let names = [(CONNECTION, 0), (CHANNEL, 0), (IN_FLIGHT, 0)].into_iter().chain(relays);
        Self(names.filter_map(|(what, index)| Some(((what, index), shelf.claim(what, index)?))).collect())
    }

    fn take(&mut self, shelf: &Shelf, what: &'static str, index: u32) -> Result<OwnedFd, String> {
        let latest = shelf.claim(what, index).or_else(|| self.0.remove(&(what, index)));
        latest.ok_or_else(|| format!("its descriptor {what}[{index}] has not come"))
    }
}

/// Rings as another process left them.
pub(super) struct Adopted(BTreeMap<u16, (SavedServed, Option<Arc<Event>>)>);

impl Adopted {
    /// A ring that the driver has enabled.
    pub(super) fn ring(&self, given: RingGiven) -> Served {
        let position = given.setup.position;
        match self.0.get(&given.index) {
            Some((saved, relay)) => Served { position, relay: relay.clone(), started: saved.started, given },
            None => Served { position, relay: None, started: false, given },
        }
    }
}

pub(super) fn keep(
    shelf: &Shelf,
    path: &Path,
    what: &str,
    descriptor: Arc<dyn AsFd + Send + Sync>,
) -> Result<(), VhostError> {
    let failed = |e: RegistryError| VhostError::Lacks { path: path.into(), reason: e.to_string() };
    shelf.keep(what, 0, descriptor).map_err(failed)
}

/// An eventfd that the back end signals where the guest has no vector for a ring.
pub(super) fn relay(shelf: &Shelf, ring: u16) -> Option<Arc<Event>> {
    let made = Events::kept(shelf.clone()).get(RELAY, ring.into());
    made.inspect_err(|error| tracing::error!(%error, ring, "an eventfd for a ring without a vector")).ok()
}

impl Thread {
    /// Has a back end from now on.
    pub(super) fn take_up(&mut self, front: Front) -> Result<(), VhostError> {
        keep(&self.shelf, &self.path, CONNECTION, front.connection().socket_fd().clone())?;
        if let Some(channel) = &front.channel {
            keep(&self.shelf, &self.path, CHANNEL, channel.socket_fd().clone())?;
        }
        self.front = Some(front);
        Ok(())
    }

    /// Leaves it to another process; until the next start nothing is done here.
    pub(super) fn leave(&mut self) {
        self.waits = true;
        let served = |ring: &Served| SavedServed {
            index: ring.given.index.into(),
            started: ring.started,
            relayed: ring.relay.is_some(),
        };
        let rings = self.served.iter().flat_map(|active| &active.rings);
        let left = SavedBackend {
            front: self.front.as_ref().map(Front::save),
            missing: self.missing.is_some(),
            in_flight: self.in_flight.as_ref().map(|kept| kept.described.clone()).unwrap_or_default(),
            rings: rings.map(served).collect(),
        };
        *self.shared.left.lock().unwrap_or_else(PoisonError::into_inner) = Some(left);
    }

    /// Goes on with what another process has left, from the next start on.
    pub(super) fn adopt(&mut self, saved: SavedBackend) -> Result<(), String> {
        let SavedBackend { front, missing, in_flight, rings } = saved;
        self.waits = true;
        if let Some(saved) = front {
            let connection = self.came.take(&self.shelf, CONNECTION, 0)?;
            let channel = saved.channel.then(|| self.came.take(&self.shelf, CHANNEL, 0)).transpose()?;
            let front = Front::inherit(&saved, (connection, channel), &self.path, &self.ram);
            front.and_then(|front| self.take_up(front)).map_err(|error| error.to_string())?;
        }
        if missing {
            self.missing = Some(Missing { next: Instant::now(), pause: Duration::ZERO });
        }
        if !in_flight.is_empty() {
            let fd = Arc::new(self.came.take(&self.shelf, IN_FLIGHT, 0)?);
            keep(&self.shelf, &self.path, IN_FLIGHT, fd.clone()).map_err(|error| error.to_string())?;
            self.in_flight = Some(InFlight { fd, described: in_flight });
        }
        let mut adopted = BTreeMap::new();
        for ring in rings {
            let index = u16::try_from(ring.index).ok().filter(|index| *index < self.spec.queues);
            let index = index.ok_or_else(|| format!("ring {} of {}", ring.index, self.spec.queues))?;
            let relay = match ring.relayed {
                true => {
                    let event = Arc::new(Event::from(self.came.take(&self.shelf, RELAY, index.into())?));
                    self.shelf.keep(RELAY, index.into(), event.clone()).map_err(|error| error.to_string())?;
                    Some(event)
                }
                false => None,
            };
            adopted.insert(index, (ring, relay));
        }
        // What was there at first, and is used no more.
        self.came = Came::default();
        self.adopted = Some(Adopted(adopted));
        Ok(())
    }
}
