//! The message-signalled interrupts of one function.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::relay::Relay;
use crate::saved::SavedVector;
use crate::{Events, InterruptError, Router, Setting, Vector};

/// All vectors of one function. Those that are set together get their routes in one call.
pub struct Vectors {
    router: Arc<dyn Router>,
    vectors: Vec<Arc<Vector>>,
    /// Devices of other processes signal them.
    foreign: bool,
    relay: Mutex<Option<Relay>>,
}

impl Vectors {
    /// That many vectors, all closed.
    pub fn new(router: Arc<dyn Router>, events: &Events, count: u16) -> Result<Self, InterruptError> {
        let vector = |index: u16| Vector::new(router.clone(), events, index.into()).map(Arc::new);
        let vectors = (0..count).map(vector).collect::<Result<_, _>>()?;
        Ok(Self { router, vectors, foreign: events.are_kept(), relay: Mutex::default() })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.vectors.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// One of them.
    pub fn get(&self, index: usize) -> Option<&Arc<Vector>> {
        self.vectors.get(index)
    }

    /// Sets vectors, the first ones of the function. Those that close do so first, those that open do so with their new
    /// message; what is pending is delivered where it can be.
    pub fn set(&self, settings: &[Setting]) -> Result<(), InterruptError> {
        let pairs = || self.vectors.iter().zip(settings);
        let mut routes = Vec::new();
        for (vector, new) in pairs() {
            let old = vector.setting();
            if old.open && !new.open {
                vector.set(Setting { open: false, ..old })?;
            }
            // A closed vector's route is of no use, and guests write address and data one after the other.
            if new.open && (!old.open || old.message != new.message) {
                routes.push((vector.input(), Some(new.message)));
            }
        }
        if let Some((input, _)) = routes.first() {
            let error = |source| InterruptError { input: *input, what: "setting its route", source };
            self.router.route(&routes).map_err(error)?;
        }
        for (vector, new) in pairs().filter(|(vector, new)| vector.setting() != **new) {
            vector.set(*new)?;
        }
        Ok(())
    }

    /// Forgets what is pending, as a reset of the function does.
    pub fn forget_pending(&self) {
        self.vectors.iter().for_each(|vector| vector.drop_pending());
    }

    /// Detaches all eventfds from the hypervisor while the guest runs, and passes on what is raised: to detach one takes time, which the
    /// guest need not stand still for when it is about to be stopped. Until [`resume`](Self::resume), or
    /// [`end_relay`](Self::end_relay).
    pub fn relay(&self) -> Result<(), InterruptError> {
        let relayed = self.each(|vector| vector.set_relayed(true));
        if self.foreign && !self.vectors.is_empty() {
            let started = Relay::start(self.vectors.clone()).map_err(|source| InterruptError {
                input: self.vectors[0].input(),
                what: "starting a thread that passes it on",
                source,
            });
            *self.lock_relay() = match started {
                Ok(relay) => Some(relay),
                Err(error) => {
                    self.each(|vector| vector.set_relayed(false))?;
                    return Err(error);
                }
            };
        }
        relayed
    }

    /// Attaches what [`relay`](Self::relay) has detached.
    pub fn end_relay(&self) -> Result<(), InterruptError> {
        let ended = self.each(|vector| vector.set_relayed(false));
        self.lock_relay().take();
        ended
    }

    fn lock_relay(&self) -> MutexGuard<'_, Option<Relay>> {
        self.relay.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Detaches all eventfds from the hypervisor. What is raised from now on becomes pending.
    pub fn rest(&self) -> Result<(), InterruptError> {
        self.each(Vector::rest)
    }

    /// Attaches those that are open, and delivers what is pending. Local APICs have been restored.
    pub fn resume(&self) -> Result<(), InterruptError> {
        let resumed = self.each(Vector::resume);
        self.lock_relay().take();
        resumed
    }

    /// All are tried; the first failure is told.
    fn each(&self, step: impl Fn(&Vector) -> Result<(), InterruptError>) -> Result<(), InterruptError> {
        let mut result = Ok(());
        for vector in &self.vectors {
            result = result.and(step(vector));
        }
        result
    }

    /// The state of all. At rest.
    pub fn save(&self) -> Vec<SavedVector> {
        self.vectors
            .iter()
            .map(|vector| {
                vector.collect();
                SavedVector::of(vector)
            })
            .collect()
    }

    /// Takes what [`save`](Self::save) gave; the function has as many vectors. At rest: nothing is attached before
    /// [`resume`](Self::resume), so that routes are set in one batch and local APICs are restored first.
    pub fn restore(&self, saved: &[SavedVector]) -> Result<(), InterruptError> {
        self.rest()?;
        for (vector, saved) in self.vectors.iter().zip(saved) {
            if saved.pending {
                vector.set_pending();
            }
        }
        self.set(&saved.iter().map(SavedVector::setting).collect::<Vec<_>>())
    }
}
