//! Engine maps: what the slots of a context stand for.
//!
//! - this file: the map itself, and which engines a slot may use.
//! - [`parse`]: a map from the client's memory, with its extensions. The half-built map is dropped at the first error.
//! - [`readback`]: the map as bytes again, extensions included.
//!
//! Everything is checked when the map is set, never at first use. Siblings keep the order they were given in.

mod parse;
mod readback;

use crate::abi::{GAP, VIRTUAL};
use crate::catalogue::{Catalogue, EngineId};

pub(crate) use parse::parse;
pub(crate) use readback::{bytes_needed, fill};

/// A set of engines of the catalogue: one bit for each.
pub type EngineSet = u64;

/// A bond: if the master's request runs on that engine, these siblings may run the bonded one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bond {
    /// The engine of the master, by its index in the catalogue.
    pub master: u8,
    /// Siblings, by index.
    pub engines: Vec<u8>,
}

/// What a slot stands for. Engines are indices into the catalogue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Nothing; filled by an extension, or left.
    Gap,
    /// One engine.
    Physical(u8),
    /// Any one of several engines of one class.
    Balanced {
        /// At least two.
        siblings: Vec<u8>,
        /// How a submit-fence chooses among them.
        bonds: Vec<Bond>,
    },
    /// Several engines at once.
    Parallel {
        /// How many batches a submission takes.
        width: u16,
        /// `width` times the same number of siblings: sibling j of lane i is at `j + i * siblings`.
        engines: Vec<u8>,
    },
}

impl Slot {
    /// The lanes, and for each the engines it may use, in order.
    pub fn lanes(&self) -> Vec<&[u8]> {
        match self {
            Slot::Gap => Vec::new(),
            Slot::Physical(engine) => vec![std::slice::from_ref(engine)],
            Slot::Balanced { siblings, .. } => vec![siblings],
            Slot::Parallel { width, engines } => {
                engines.chunks((engines.len() / usize::from((*width).max(1))).max(1)).collect()
            }
        }
    }

    /// Whether the scheduler chooses among engines.
    pub fn is_virtual(&self) -> bool {
        matches!(self, Slot::Balanced { .. } | Slot::Parallel { .. })
    }

    /// As text, such as `copy0` or `balance(copy0 copy1)`.
    pub fn describe(&self, names: &[EngineId]) -> String {
        let list = |engines: &[u8]| {
            engines.iter().map(|engine| names[usize::from(*engine)].to_string()).collect::<Vec<_>>().join(" ")
        };
        match self {
            Slot::Gap => "gap".into(),
            Slot::Physical(engine) => list(std::slice::from_ref(engine)),
            Slot::Balanced { siblings, bonds } => {
                let bond = |bond: &Bond| format!(", after {}: {}", list(&[bond.master]), list(&bond.engines));
                format!("balance({}{})", list(siblings), bonds.iter().map(bond).collect::<String>())
            }
            Slot::Parallel { .. } => {
                let lanes: Vec<_> = self.lanes().into_iter().map(list).collect();
                format!("parallel({})", lanes.join(" | "))
            }
        }
    }

    /// (class, instance) with which it reads back.
    fn read_as(&self, catalogue: &Catalogue) -> (u16, u16) {
        let id = |engine: u8| catalogue.engines()[usize::from(engine)];
        match self {
            Slot::Gap => (GAP, GAP),
            Slot::Physical(engine) => (id(*engine).class, id(*engine).instance),
            Slot::Balanced { siblings: engines, .. } | Slot::Parallel { engines, .. } => {
                (id(engines[0]).class, VIRTUAL)
            }
        }
    }

    /// The siblings a bonded request may use when its master runs on `master`: those of the bonds for that engine, or all
    /// but that engine where there is none.
    pub fn bonded_to(&self, master: usize) -> EngineSet {
        let all = self.lanes().iter().fold(0, |set, lane| set | set_of(lane));
        let Slot::Balanced { bonds, .. } = self else { return all };
        let mut bound = bonds.iter().filter(|bond| usize::from(bond.master) == master).peekable();
        let chosen = match bound.peek() {
            Some(_) => bound.fold(0, |set, bond| set | set_of(&bond.engines)),
            None => all,
        };
        // Beside the master, never on its engine.
        chosen & !(1 << master)
    }
}

/// Engines as a set.
pub fn set_of(engines: &[u8]) -> EngineSet {
    engines.iter().fold(0, |set, engine| set | 1 << engine)
}

/// The slots of a context.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EngineMap {
    /// The slots, at most 64.
    pub slots: Vec<Slot>,
}

impl EngineMap {
    /// The map of a context that has set none: every engine, in order.
    pub fn default_map(catalogue: &Catalogue) -> Self {
        Self { slots: (0..catalogue.engines().len()).map(|engine| Slot::Physical(engine as u8)).collect() }
    }

    /// The slot with that number.
    pub fn slot(&self, index: u32) -> Option<&Slot> {
        self.slots.get(usize::try_from(index).ok()?)
    }

    /// What it weighs in saved state, in bytes, at most.
    pub(crate) fn weight(&self) -> usize {
        let of = |slot: &Slot| match slot {
            Slot::Gap | Slot::Physical(_) => 16,
            Slot::Balanced { siblings, bonds } => {
                16 + siblings.len() + bonds.iter().map(|b| 16 + b.engines.len()).sum::<usize>()
            }
            Slot::Parallel { engines, .. } => 16 + engines.len(),
        };
        self.slots.iter().map(of).sum()
    }

    /// Checks a map that was not made by [`parse`]: saved state. The message says what is wrong.
    pub(crate) fn check(&self, catalogue: &Catalogue) -> Result<(), String> {
        let count = catalogue.engines().len();
        let one_class = |engines: &[u8]| {
            let known = engines.iter().all(|e| usize::from(*e) < count);
            let class = |e: &u8| catalogue.engines()[usize::from(*e)].class;
            known && engines.windows(2).all(|pair| class(&pair[0]) == class(&pair[1]))
        };
        let distinct = |engines: &[u8]| set_of(engines).count_ones() as usize == engines.len();
        if self.slots.len() > crate::abi::MAX_SLOTS {
            return Err(format!("a map has {} slots", self.slots.len()));
        }
        for (index, slot) in self.slots.iter().enumerate() {
            let fine = match slot {
                Slot::Gap => true,
                Slot::Physical(engine) => usize::from(*engine) < count,
                Slot::Balanced { siblings, bonds } => {
                    let bond = |b: &Bond| {
                        usize::from(b.master) < count
                            && !b.engines.is_empty()
                            && b.engines.iter().all(|e| siblings.contains(e))
                    };
                    siblings.len() >= 2 && one_class(siblings) && distinct(siblings) && bonds.iter().all(bond)
                }
                Slot::Parallel { width, engines } => {
                    let width = usize::from(*width);
                    width >= 2
                        && !engines.is_empty()
                        && engines.len() % width == 0
                        && one_class(engines)
                        && distinct(engines)
                }
            };
            if !fine {
                return Err(format!("slot {index} of a map cannot be: {slot:?}"));
            }
        }
        Ok(())
    }
}

/// Reads (class, instance) as the client writes it.
pub(crate) fn engine_id(word: u32) -> EngineId {
    EngineId { class: word as u16, instance: (word >> 16) as u16 }
}
