//! Tails of rings that are in clients' memory, and the bells that have the device look there.
//!
//! Writing register `TAIL` costs a client a trap, or a message. With `TAIL_ADDRESS` the tail is a word of its own memory: the
//! device looks at it when a bell is rung, which an eventfd can do, or, if the ring is *polled*, by itself for as long as there is
//! news, and a while longer. Behind the word of a polled ring the device says whether it looks; a client that has written the tail
//! and reads there that it does not rings the bell.
//!
//! Contract:
//!
//! - A tail only goes forward, and never further than the ring is long; what else is there is refused in `STATUS`.
//! - Looks are one at a time. Nothing comes of one that ends after a stop: whoever resumes the device looks at all tails again.
//! - The word that says whether the device looks is not written while it is stopped.

use std::sync::PoisonError;

use super::Device;
use crate::abi::{BELLS, slot_register};
use crate::context::Ring;
use crate::error::Errno;
use crate::memory::{Atomic, Width};

/// A ring whose tail is in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    pub context: u32,
    pub slot: u32,
    /// Number of its address space.
    space: u32,
    /// Register `TAIL_ADDRESS`.
    register: u64,
}

impl Told {
    /// Where the tail is.
    fn at(&self) -> u64 {
        self.register & !slot_register::POLLED
    }

    /// Whether the device looks by itself.
    pub(crate) fn polled(&self) -> bool {
        self.register & slot_register::POLLED != 0
    }
}

/// What was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// The tail is where it was, or where it cannot be.
    Nothing,
    /// It has gone on, and descriptors were taken.
    News,
    /// The ring is none of these any more.
    Gone,
}

impl Device {
    /// Rings a bell: looks at the tails in memory of all contexts that have it. A bell that is none harms nobody. For whoever
    /// drives the device without [`Bells`](crate::drive::Bells).
    pub fn ring(&self, bell: u32) {
        if bell < BELLS {
            self.told(1 << bell).iter().for_each(|told| {
                self.look(told);
            });
        }
    }

    /// Looks at all tails in memory.
    pub fn ring_all(&self) {
        (0..BELLS).for_each(|bell| self.ring(bell));
    }

    /// The rings of these bells, one bit each, whose tails are in memory.
    pub(crate) fn told(&self, bells: u32) -> Vec<Told> {
        let core = self.locked();
        let rung = core.contexts.values().filter(|c| !c.closed && bells >> ((c.id & 0xffff) % BELLS) & 1 == 1);
        let slots = rung.flat_map(|c| {
            let (context, space) = (c.id, c.space);
            c.slots.iter().enumerate().map(move |(slot, state)| Told {
                context,
                slot: slot as u32,
                space,
                register: state.ring.tail_address,
            })
        });
        slots.filter(|told| told.at() != 0).collect()
    }

    /// Reads a tail, and takes what it says is there.
    pub(crate) fn look(&self, told: &Told) -> Look {
        let one = self.looks.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_stopped() {
            return Look::Nothing;
        }
        // Without the device's lock: the page may have to be fetched.
        let tail = self.space(told.space).map(|space| space.atomic(told.at(), Width::Four, Atomic::Load));
        let mut core = self.locked();
        if core.stopped {
            return Look::Nothing;
        }
        let Ok(state) = core.slot_state(told.context, told.slot) else { return Look::Gone };
        let ring = state.ring;
        if ring.tail_address != told.register {
            return Look::Gone;
        }
        let Ok(Ok(tail)) = tail else {
            state.ring.status = Errno::Fault.number().into();
            return Look::Nothing;
        };
        let new = Ring { tail: tail as u32, ..ring };
        if new.tail == ring.tail {
            return Look::Nothing;
        }
        if !new.fits() || new.tail.wrapping_sub(ring.head) < ring.tail.wrapping_sub(ring.head) {
            state.ring.status = Errno::Invalid.number().into();
            return Look::Nothing;
        }
        state.ring = new;
        drop(core);
        drop(one);
        self.pump(told.context, told.slot);
        Look::News
    }

    /// Says of a polled ring whether the device looks at its tail. False if the device is stopped and nothing was said.
    pub(crate) fn say_asleep(&self, told: &Told, asleep: bool) -> bool {
        {
            let mut core = self.locked();
            if core.stopped {
                return false;
            }
            // A stop waits for it.
            core.writing += 1;
        }
        if let (Ok(space), Some(at)) = (self.space(told.space), told.at().checked_add(slot_register::ASLEEP)) {
            // A client whose word cannot be written rings always, or never: it is its own loss.
            let _ = space.atomic(at, Width::Four, Atomic::Exchange(asleep.into()));
        }
        self.locked().writing -= 1;
        self.wake();
        true
    }

    /// Whether it is stopped.
    pub(crate) fn is_stopped(&self) -> bool {
        self.locked().stopped
    }
}
