//! Interrupts of a device: who is told of them, what is masked, and what waits.

use std::io;
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::device::Irq;
use super::saved::SavedVector;
use crate::payload::{IrqSet, irq_flags};
use wherry_handover::{Claim, Copies};

#[derive(Default)]
struct Vector {
    trigger: Option<OwnedFd>,
    on_mask: Option<OwnedFd>,
    on_unmask: Option<OwnedFd>,
    masked: bool,
    /// It was triggered while it was masked, or while the client that had enabled it was lost.
    pending: bool,
    /// The line is up.
    level: bool,
    /// A client had enabled it, and was lost: the next one enables it again.
    orphaned: bool,
}

struct Line {
    irq: Irq,
    vectors: Vec<Vector>,
}

/// All of them, by index.
#[derive(Default)]
pub(super) struct Irqs(Vec<Line>);

impl Irqs {
    pub(super) fn new(irqs: &[Irq]) -> Self {
        let line = |irq: &Irq| Line { irq: *irq, vectors: (0..irq.count).map(|_| Vector::default()).collect() };
        Self(irqs.iter().map(line).collect())
    }

    fn vector(&mut self, index: u32, vector: u32) -> Option<(Irq, &mut Vector)> {
        let line = self.0.get_mut(index as usize)?;
        Some((line.irq, line.vectors.get_mut(vector as usize)?))
    }

    pub(super) fn trigger(&mut self, index: u32, vector: u32) {
        if let Some((irq, vector)) = self.vector(index, vector) {
            vector.fire(irq);
        }
    }

    pub(super) fn set_level(&mut self, index: u32, up: bool) {
        if let Some((irq, vector)) = self.vector(index, 0) {
            let rises = up && !vector.level;
            vector.level = up;
            if rises {
                vector.fire(irq);
            } else if !up {
                vector.pending = false;
            }
        }
    }

    pub(super) fn enabled(&self, index: u32) -> bool {
        self.0.get(index as usize).is_some_and(|line| line.vectors.iter().any(|vector| vector.trigger.is_some()))
    }

    pub(super) fn pending(&self) -> Vec<(u32, u32)> {
        let mut all = Vec::new();
        for (index, line) in self.0.iter().enumerate() {
            let waiting = line.vectors.iter().enumerate().filter(|(_, vector)| vector.pending);
            all.extend(waiting.map(|(number, _)| (index as u32, number as u32)));
        }
        all
    }

    /// Has it delivered as soon as it is enabled and not masked.
    pub(super) fn set_pending(&mut self, index: u32, vector: u32) {
        if let Some((irq, vector)) = self.vector(index, vector) {
            vector.orphaned = vector.trigger.is_none();
            vector.fire(irq);
        }
    }

    /// Notes all of which there is something to be said.
    pub(super) fn save(&self, copies: &mut Copies) -> io::Result<Vec<SavedVector>> {
        let mut all = Vec::new();
        for (index, line) in (0..).zip(&self.0) {
            for (number, vector) in (0..).zip(&line.vectors) {
                let Vector { trigger, on_mask, on_unmask, masked, pending, level, orphaned } = vector;
                for (what, event) in [("trigger", trigger), ("on-mask", on_mask), ("on-unmask", on_unmask)] {
                    if let Some(event) = event {
                        copies.add(&name(index, what), number, event)?;
                    }
                }
                let saved = SavedVector {
                    index,
                    vector: number,
                    trigger: trigger.is_some(),
                    on_mask: on_mask.is_some(),
                    on_unmask: on_unmask.is_some(),
                    masked: *masked,
                    pending: *pending,
                    level: *level,
                    orphaned: *orphaned,
                };
                if saved != (SavedVector { index, vector: number, ..SavedVector::default() }) {
                    all.push(saved);
                }
            }
        }
        Ok(all)
    }

    /// Takes what was noted; nothing is signalled.
    pub(super) fn load(&mut self, saved: &[SavedVector], claim: &mut Claim) -> Result<(), String> {
        for saved in saved {
            let (index, number) = (saved.index, saved.vector);
            let mut event = |there: bool, what: &str| {
                let missing = || format!("{}[{number}] is missing", name(index, what));
                there.then(|| claim(&name(index, what), number).ok_or_else(missing)).transpose()
            };
            let [trigger, on_mask, on_unmask] = [
                event(saved.trigger, "trigger")?,
                event(saved.on_mask, "on-mask")?,
                event(saved.on_unmask, "on-unmask")?,
            ];
            let SavedVector { masked, pending, level, orphaned, .. } = *saved;
            let (_, vector) =
                self.vector(index, number).ok_or_else(|| format!("vector {number} of interrupt {index}"))?;
            *vector = Vector { trigger, on_mask, on_unmask, masked, pending, level, orphaned };
        }
        Ok(())
    }

    /// A reset: lines are down, and nothing waits. Who is told stays.
    pub(super) fn reset(&mut self) {
        for vector in self.0.iter_mut().flat_map(|line| &mut line.vectors) {
            (vector.level, vector.pending, vector.masked) = (false, false, false);
        }
    }

    /// The client is lost: its descriptors are closed; what waits, and what comes meanwhile, waits for the next.
    pub(super) fn orphan(&mut self) {
        for vector in self.0.iter_mut().flat_map(|line| &mut line.vectors) {
            vector.orphaned |= vector.trigger.take().is_some();
            (vector.on_mask, vector.on_unmask, vector.masked) = (None, None, false);
        }
    }

    /// Does what `VFIO_USER_DEVICE_SET_IRQS` asks for.
    pub(super) fn set(&mut self, set: &IrqSet, data: &[u8], fds: Vec<OwnedFd>) -> Result<(), Errno> {
        let line = self.0.get_mut(set.index as usize).ok_or(Errno::INVAL)?;
        let (irq, kind, action) = (line.irq, set.flags & 7, set.flags & 0x38);
        if action != IrqSet::TRIGGER && irq.flags & irq_flags::MASKABLE == 0 {
            return Err(Errno::INVAL);
        }
        if kind == IrqSet::NONE && action == IrqSet::TRIGGER && set.start == 0 && set.count == 0 {
            for vector in &mut line.vectors {
                *vector = Vector { level: vector.level, ..Vector::default() };
            }
            return Ok(());
        }
        let end = set.start.checked_add(set.count).filter(|end| *end <= irq.count && set.count > 0);
        let end = end.ok_or(Errno::INVAL)?;
        let vectors = &mut line.vectors[set.start as usize..end as usize];
        if kind == IrqSet::EVENTFD {
            if !fds.is_empty() && fds.len() != vectors.len() || irq.flags & irq_flags::EVENTFD == 0 {
                return Err(Errno::INVAL);
            }
            let mut fds = fds.into_iter();
            for vector in vectors {
                vector.assign(irq, action, fds.next());
            }
            return Ok(());
        }
        if !fds.is_empty() {
            return Err(Errno::INVAL);
        }
        for (at, vector) in vectors.iter_mut().enumerate() {
            if kind == IrqSet::BOOL && data.get(at).is_none_or(|byte| *byte == 0) {
                continue;
            }
            match action {
                IrqSet::MASK => vector.mask(),
                IrqSet::UNMASK => vector.unmask(irq),
                _ => vector.fire(irq),
            }
        }
        Ok(())
    }
}

impl Vector {
    fn fire(&mut self, irq: Irq) {
        match &self.trigger {
            Some(event) if !self.masked => {
                signal(event);
                self.pending = false;
                if irq.flags & irq_flags::AUTOMASKED != 0 {
                    self.mask();
                }
            }
            Some(_) => self.pending = true,
            None => self.pending |= self.orphaned,
        }
    }

    fn mask(&mut self) {
        self.masked = true;
        self.on_mask.iter().for_each(signal);
    }

    fn unmask(&mut self, irq: Irq) {
        self.masked = false;
        self.on_unmask.iter().for_each(signal);
        if self.level || self.pending {
            self.fire(irq);
        }
    }

    fn assign(&mut self, irq: Irq, action: u32, event: Option<OwnedFd>) {
        match action {
            IrqSet::MASK => self.on_mask = event,
            IrqSet::UNMASK => self.on_unmask = event,
            _ => {
                let gone = event.is_none();
                (self.trigger, self.orphaned) = (event, false);
                if gone {
                    self.pending = false;
                } else if self.level || self.pending {
                    self.fire(irq);
                }
            }
        }
    }
}

/// Name of the descriptors of a kind.
fn name(index: u32, what: &str) -> String {
    format!("irq{index}/{what}")
}

/// Signals an eventfd. One that is full is signalled already; whatever else the client sent is not waited for.
fn signal(event: &OwnedFd) {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    if poll(&mut [PollFd::new(event, PollFlags::OUT)], Some(&now)) == Ok(1) {
        let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
    }
}
