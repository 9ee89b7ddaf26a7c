//! Engines as a client sees them, and workers as a host has them.
//!
//! The [`Catalogue`] lists the engines by (class, instance). It belongs to the version of the device model and is the same
//! on both ends of a move. The [`Host`] says which workers there are here; which engine runs on which worker is decided
//! by [`Host::bind`], is local, and never migrates.

use crate::abi::{self, MAX_ENGINES};

/// Names an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EngineId {
    /// What it does: [`abi::class`].
    pub class: u16,
    /// Which of its class, from 0.
    pub instance: u16,
}

impl std::fmt::Display for EngineId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", abi::class_name(self.class), self.instance)
    }
}

impl std::str::FromStr for EngineId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let split = text.find(|c: char| c.is_ascii_digit()).unwrap_or(text.len());
        let class = abi::class::NAMES.iter().position(|name| *name == &text[..split]);
        match (class, text[split..].parse()) {
            (Some(class), Ok(instance)) => Ok(Self { class: class as u16, instance }),
            _ => Err(format!("{text:?} names no engine: use a class and a number, such as copy0")),
        }
    }
}

/// Catalogue or host cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CatalogueError {
    /// Too many engines, or none.
    #[error("a catalogue has 1 to {MAX_ENGINES} engines, not {0}")]
    Count(usize),
    /// An engine that does not exist, or is there twice.
    #[error("engine {0} is there twice, or its class does not exist")]
    Engine(EngineId),
    /// No worker of this host can do the work of a class.
    #[error("no worker of this host does the work of class {}", abi::class_name(*.0))]
    NoWorker(u16),
}

/// The engines that a client sees, in order. The default map of a context lists all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Catalogue {
    engines: Vec<EngineId>,
}

impl Catalogue {
    /// A catalogue of those engines.
    pub fn new(engines: Vec<EngineId>) -> Result<Self, CatalogueError> {
        if engines.is_empty() || engines.len() > MAX_ENGINES {
            return Err(CatalogueError::Count(engines.len()));
        }
        for (index, engine) in engines.iter().enumerate() {
            if usize::from(engine.class) >= abi::class::NAMES.len() || engines[..index].contains(engine) {
                return Err(CatalogueError::Engine(*engine));
            }
        }
        Ok(Self { engines })
    }

    /// `count[class]` engines of each class.
    pub fn with_counts(count: [u16; 5]) -> Result<Self, CatalogueError> {
        let of = |class: usize| (0..count[class]).map(move |instance| EngineId { class: class as u16, instance });
        Self::new((0..count.len()).flat_map(of).collect())
    }

    /// The engines.
    pub fn engines(&self) -> &[EngineId] {
        &self.engines
    }

    /// The index of an engine.
    pub fn find(&self, id: EngineId) -> Option<usize> {
        self.engines.iter().position(|e| *e == id)
    }
}

/// What a worker of a host can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Worker {
    /// One bit for each class.
    pub classes: u32,
}

impl Worker {
    /// A worker that does the work of every class.
    pub const ALL: Worker = Worker { classes: u32::MAX };
}

/// The workers of a host: how many, and for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// The workers, in order.
    pub workers: Vec<Worker>,
    /// With which worker the first engine begins. Engines are dealt out in turn.
    pub first: usize,
}

impl Host {
    /// `count` workers that do everything.
    pub fn uniform(count: usize) -> Self {
        Self { workers: vec![Worker::ALL; count], first: 0 }
    }

    /// Deals the engines out to workers that do their class: the worker of each engine. Several engines may share a
    /// worker; then it runs their work by turns.
    pub fn bind(&self, catalogue: &Catalogue) -> Result<Vec<usize>, CatalogueError> {
        let count = self.workers.len();
        let mut next = self.first;
        catalogue
            .engines
            .iter()
            .map(|engine| {
                let able = |worker: &usize| self.workers[*worker].classes >> engine.class & 1 == 1;
                let worker = (0..count).map(|i| (next + i) % count).find(able);
                let worker = worker.ok_or(CatalogueError::NoWorker(engine.class))?;
                next = worker + 1;
                Ok(worker)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_have_names_that_read_back() {
        let id = EngineId { class: abi::class::CRYPTO, instance: 12 };
        assert_eq!((id.to_string().as_str(), "crypto12".parse()), ("crypto12", Ok(id)));
        for bad in ["", "copy", "0", "gpu0", "copy-1", "copy99999", "copy0x"] {
            assert!(bad.parse::<EngineId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_catalogue_has_no_engine_twice_and_no_unknown_class() {
        let copy = EngineId { class: 0, instance: 0 };
        assert_eq!(Catalogue::new(vec![copy, copy]), Err(CatalogueError::Engine(copy)));
        let odd = EngineId { class: 5, instance: 0 };
        assert_eq!(Catalogue::new(vec![odd]), Err(CatalogueError::Engine(odd)));
        assert_eq!(Catalogue::with_counts([65, 0, 0, 0, 0]), Err(CatalogueError::Count(65)));
    }

    #[test]
    fn engines_are_dealt_to_workers_that_can_and_a_host_without_one_is_refused_by_class() {
        let catalogue = Catalogue::with_counts([3, 0, 1, 0, 0]).unwrap();
        let host = Host { workers: vec![Worker { classes: 1 }, Worker::ALL], first: 1 };
        assert_eq!(host.bind(&catalogue), Ok(vec![1, 0, 1, 1]));
        let host = Host { workers: vec![Worker { classes: 1 }], first: 0 };
        let error = host.bind(&catalogue).unwrap_err();
        assert_eq!(error.to_string(), "no worker of this host does the work of class crypto");
        assert!(Host::uniform(0).bind(&catalogue).is_err());
    }
}
