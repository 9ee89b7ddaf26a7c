//! Contexts: an engine map, parameters, and a timeline for each slot.

use std::collections::{BTreeMap, VecDeque};

use crate::abi::slot_register;
use crate::error::Errno;
use crate::map::{EngineMap, EngineSet};

/// Requests of one slot, in order. They start and complete one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Timeline {
    /// Points handed out: the number of the latest submission.
    pub submitted: u64,
    /// All points up to this one are signalled.
    pub completed: u64,
    /// The latest point that has started, and the engines it started on.
    pub started: (u64, EngineSet),
    /// Latest points that failed, oldest first.
    pub errors: VecDeque<(u64, Errno)>,
    /// Requests that are not signalled, oldest first.
    pub queue: VecDeque<u64>,
    /// How long its requests occupied engines, in nanoseconds.
    pub runtime: u64,
    /// The engine preferred next time. Does not migrate.
    pub affinity: Option<u8>,
}

impl Timeline {
    /// How many failed points a timeline remembers.
    pub(crate) const ERRORS: usize = 8;

    pub(crate) fn signal(&mut self, seq: u64, error: Option<Errno>) {
        self.completed = seq;
        if let Some(errno) = error {
            if self.errors.len() == Self::ERRORS {
                self.errors.pop_front();
            }
            self.errors.push_back((seq, errno));
        }
    }

    pub(crate) fn error(&self, seq: u64) -> Option<Errno> {
        self.errors.iter().find(|(at, _)| *at == seq).map(|(_, errno)| *errno)
    }
}

/// The ring of a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ring {
    /// Address of its descriptors.
    pub base: u64,
    /// How many it holds; a power of two, or 0 if there is no ring.
    pub entries: u32,
    /// How many the client has put in, ever (wraps).
    pub tail: u32,
    /// How many have been taken, ever (wraps).
    pub head: u32,
    /// Where `head` is written for the client; 0: nowhere.
    pub head_address: u64,
    /// Error number of the latest refused submission, or 0.
    pub status: u32,
    /// Register `TAIL_ADDRESS`: where the client writes the tail, and whether it is polled there.
    pub tail_address: u64,
}

impl Ring {
    /// Most descriptors of a ring.
    pub(crate) const MAX: u32 = 4096;

    /// Whether its size and counters can be.
    pub(crate) fn fits(&self) -> bool {
        let told = self.tail_address & !slot_register::POLLED;
        let size = self.entries == 0 || (self.entries.is_power_of_two() && self.entries <= Self::MAX);
        size && told.is_multiple_of(4) && self.tail.wrapping_sub(self.head) <= self.entries
    }
}

/// A slot: its timeline, its ring, and what has been written to its portal so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SlotState {
    pub timeline: Timeline,
    pub ring: Ring,
    /// Descriptor being written to the portal, piece by piece.
    pub portal: Vec<u8>,
    /// Somebody takes descriptors from the ring. Does not migrate.
    pub pumping: bool,
}

/// Where a context's hang history goes in time.
pub(crate) type Time = u64;

/// A context.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    pub id: u32,
    pub flags: u32,
    pub priority: i32,
    pub persistent: bool,
    /// Its number among address spaces.
    pub space: u32,
    pub map: EngineMap,
    /// The map was set; else it is the default one.
    pub mapped: bool,
    /// The map is frozen: something was submitted.
    pub used: bool,
    pub slots: Vec<SlotState>,
    /// The one timeline that orders all its requests, if it has one; may be shared.
    pub single: Option<u32>,
    /// Percent of a time slice, by slot (mapped) or engine (default map).
    pub shares: BTreeMap<u8, u32>,
    pub hangs: VecDeque<Time>,
    pub banned: bool,
    /// Destroyed, and kept until its work is done.
    pub closed: bool,
    /// The client's own timeline: points up to this one are signalled.
    pub client: u64,
}

impl Context {
    /// Sets the map, with fresh slots.
    pub(crate) fn set_map(&mut self, map: EngineMap, mapped: bool) {
        self.slots = vec![SlotState::default(); map.slots.len()];
        self.map = map;
        self.mapped = mapped;
        self.shares.clear();
    }

    pub(crate) fn idle(&self) -> bool {
        self.slots.iter().all(|slot| slot.timeline.queue.is_empty())
    }

    /// What it weighs in saved state, in bytes, at most, without its requests.
    pub(crate) fn weight(&self) -> usize {
        256 + self.map.weight() + self.slots.len() * 304
    }
}
