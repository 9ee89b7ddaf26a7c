//! What of a registry belongs to one part of the process.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crate::registry::{KeptId, Registry, RegistryError};

/// Descriptors of one part of the process: all their names begin alike.
#[derive(Clone, Debug)]
pub struct Shelf {
    registry: Arc<Registry>,
    name: String,
}

impl Shelf {
    /// Of the part with this name.
    pub fn new(registry: Arc<Registry>, name: impl Into<String>) -> Self {
        Self { registry, name: name.into() }
    }

    /// Of a part of this part.
    pub fn of(&self, part: &str) -> Self {
        Self { registry: self.registry.clone(), name: format!("{}/{part}", self.name) }
    }

    /// The registry.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    fn id(&self, what: &str, index: u32) -> KeptId {
        KeptId::new(format!("{}/{what}", self.name), index)
    }

    /// See [`Registry::keep`].
    pub fn keep(&self, what: &str, index: u32, descriptor: Arc<dyn AsFd + Send + Sync>) -> Result<(), RegistryError> {
        self.registry.keep(self.id(what, index), descriptor)
    }

    /// See [`Registry::claim`].
    pub fn claim(&self, what: &str, index: u32) -> Option<OwnedFd> {
        self.registry.claim(&self.id(what, index))
    }

    /// See [`Registry::inherit`].
    pub fn inherit(&self, what: &str, index: u32) -> Result<OwnedFd, RegistryError> {
        self.registry.inherit(&self.id(what, index))
    }

    /// See [`Registry::obtain`].
    pub fn obtain<T, E>(
        &self,
        what: &str,
        index: u32,
        use_it: impl FnOnce(OwnedFd) -> Result<T, E>,
        make: impl FnOnce() -> Result<T, E>,
    ) -> Result<Arc<T>, E>
    where
        T: AsFd + Send + Sync + 'static,
        E: From<RegistryError>,
    {
        self.registry.obtain(self.id(what, index), use_it, make)
    }

    /// See [`Registry::add_note`].
    pub fn add_note(&self, what: &str, note: &[u8]) -> io::Result<Arc<OwnedFd>> {
        self.registry.add_note(self.id(what, 0), note)
    }

    /// See [`Registry::inherit_note`].
    pub fn inherit_note(&self, what: &str) -> io::Result<Vec<u8>> {
        self.registry.inherit_note(&self.id(what, 0))
    }
}
