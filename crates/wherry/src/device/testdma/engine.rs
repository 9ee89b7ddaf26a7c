//! What the device does with memory, one small step after the other, all under one lock: filling the buffers of a ring, or one
//! letter after the other.
//!
//! A step reads what the driver posted, writes a piece of a buffer, or publishes what is whole; the server takes the lock
//! between two of them. So at rest a buffer may be half written: that is state. Every write goes through [`Bus::write`], which
//! logs it before the step goes on: when a completion can be seen, what it tells of is in the log, and it was itself when the
//! interrupt comes. An access that fails changes nothing here, and is tried again.

use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use wherry_guest::testdma::{
    COMPLETION_BYTES, DESCRIPTOR_BYTES, DESCRIPTORS, Form, Interrupt, LETTER_BYTES, LOST_NS, MAX_BUFFER, area,
    buffer_word, completions,
};
use wherry_vfio_user::Bus;
use wherry_vfio_user::payload::pci_irq;
use wherry_vfio_user::server::DmaError;

use super::faults::Faults;
use super::options::{Load, Pattern};

/// Between two tries to reach memory.
const RETRY: Duration = Duration::from_millis(5);
/// After a pause, so much of what was missed is made up for.
const CATCH_UP: Duration = Duration::from_millis(10);
/// Bytes of a piece of a buffer, and of a small one.
const PIECE: u32 = 4096;
const LINE: u32 = 64;
/// Pieces written in one step.
const PIECES: u32 = 64;
/// An interrupt that was lost is raised again after so long.
const AGAIN: Duration = Duration::from_secs(3);
/// What is written where nothing should be any more.
const LATE: u8 = 0xdb;

/// When there is a next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Now.
    Now,
    /// At that time, or when something happens.
    At(Instant),
    /// When something happens.
    Rest,
}

/// What a driver has set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    pub form: Form,
    pub interrupt: Interrupt,
    pub vectors: u32,
    pub area: u64,
    pub entries: u32,
    pub seed: u64,
}

/// A buffer that is being written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Half {
    pub address: u64,
    pub length: u32,
    /// Pieces that are written.
    pub done: u32,
    pub pattern: Pattern,
}

impl Half {
    /// Whether a buffer can be like that.
    pub fn is_possible(&self) -> bool {
        valid_length(self.length) && self.done <= self.pattern.pieces(self.length)
    }
}

fn valid_length(length: u32) -> bool {
    (16..=MAX_BUFFER).contains(&length) && length.is_multiple_of(8)
}

/// How far it has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Buffers that are complete.
    pub completed: u64,
    /// Those of them of which it is known whether the driver wants an interrupt.
    pub judged: u64,
    pub half: Option<Half>,
    /// The last letter.
    pub sequence: u64,
    /// It is not acknowledged.
    pub outstanding: bool,
    /// The pin is up.
    pub cause: bool,
}

/// Figures. They begin anew only by a reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    pub buffers: u64,
    pub bytes: u64,
    pub signals: u64,
    pub lost: u64,
    pub longest_ns: u64,
    pub faults: u64,
    pub loads: u64,
}

/// See above.
pub struct Engine {
    pub setup: Setup,
    pub progress: Progress,
    pub figures: Figures,
    pub faults: Faults,
    load: Load,
    /// It runs, as far as its migration goes.
    running: bool,
    /// Bus master.
    master: bool,
    /// The pin may be used.
    pin: bool,
    /// The last access failed.
    failing: bool,
    /// The next buffer or letter is not due before.
    due: Instant,
    /// Of the buffers that are written at once.
    in_burst: (u32, u64),
    /// Since when the letter could have been acknowledged.
    waiting: Option<Instant>,
    /// Its interrupt is counted as lost.
    told_lost: bool,
    /// The buffer that is being written, whole.
    content: Vec<u8>,
    /// Sequence number of that.
    content_of: u64,
    /// The last buffer that was completed, and when to write to it once more.
    last: Option<(u64, u32)>,
    late: Option<Instant>,
}

impl Engine {
    /// As it is after a reset.
    pub fn new(load: Load, faults: Faults) -> Self {
        Self {
            setup: Self::unset(),
            progress: Progress::default(),
            figures: Figures::default(),
            faults,
            load,
            running: true,
            master: false,
            pin: true,
            failing: false,
            due: Instant::now(),
            in_burst: (0, 0),
            waiting: None,
            told_lost: false,
            content: Vec::new(),
            content_of: 0,
            last: None,
            late: None,
        }
    }

    fn unset() -> Setup {
        Setup { form: Form::Off, interrupt: Interrupt::None, vectors: 1, area: 0, entries: 0, seed: 0 }
    }

    /// A reset: nothing is known of the driver.
    pub fn reset(&mut self, bus: &Bus) {
        (self.setup, self.progress, self.figures) = (Self::unset(), Progress::default(), Figures::default());
        (self.running, self.master, self.pin, self.late) = (true, false, true, None);
        self.rest();
        bus.set_level(pci_irq::INTX, false);
    }

    /// Has it begin, or end.
    pub fn control(&mut self, form: Form, bus: &Bus) {
        match (self.setup.form, form) {
            (Form::Off, _) => {
                self.progress = Progress::default();
                self.setup.form = form;
            }
            (_, Form::Off) => self.setup.form = form,
            _ => {}
        }
        self.rest();
        self.follow_pin(bus);
    }

    /// What is known beside its state is forgotten.
    fn rest(&mut self) {
        (self.failing, self.waiting, self.last, self.content_of) = (false, None, None, 0);
        (self.due, self.in_burst) = (Instant::now(), (0, 0));
    }

    /// What configuration space says: bus master, and whether it may use its pin.
    pub fn configure(&mut self, master: bool, pin: bool, bus: &Bus) {
        (self.master, self.pin) = (master, pin);
        self.waiting = None;
        self.follow_pin(bus);
    }

    /// Brings it to rest, or lets it run.
    pub fn set_running(&mut self, running: bool) {
        if running == self.running {
            return;
        }
        self.late = self.faults.late_dma().filter(|_| !running).map(|after| Instant::now() + after);
        self.running = running;
        (self.waiting, self.due, self.in_burst) = (None, Instant::now(), (0, 0));
    }

    /// Whether it may do DMA.
    pub fn is_active(&self) -> bool {
        self.running && self.master && self.setup.form != Form::Off
    }

    /// Whether the last access failed.
    pub fn is_failing(&self) -> bool {
        self.failing
    }

    /// Whether a transaction is pending.
    pub fn is_pending(&self) -> bool {
        let stuck = self.faults.stuck_transaction() && self.setup.form != Form::Off && !self.is_active();
        stuck || self.is_active() && self.progress.half.is_some()
    }

    /// Takes the pin up or down.
    pub fn follow_pin(&self, bus: &Bus) {
        bus.set_level(pci_irq::INTX, self.progress.cause && self.pin);
    }

    /// Takes what was saved.
    pub fn load(&mut self, setup: Setup, progress: Progress, figures: Figures, bus: &Bus) {
        (self.setup, self.progress, self.figures) = (setup, progress, figures);
        self.rest();
        self.follow_pin(bus);
    }

    /// Takes what the process before it knew: nothing is signalled, since what is up is up.
    pub fn adopt(&mut self, setup: Setup, progress: Progress, figures: Figures, master: bool, pin: bool) {
        (self.setup, self.progress, self.figures) = (setup, progress, figures);
        (self.master, self.pin) = (master, pin);
        self.rest();
    }

    /// One step.
    pub fn step(&mut self, bus: &Bus) -> Next {
        let now = Instant::now();
        if let Some(late) = self.late {
            if late > now {
                return Next::At(late);
            }
            self.late = None;
            self.write_late(bus);
        }
        if !self.is_active() {
            return Next::Rest;
        }
        let result = match self.setup.form {
            Form::Ring => self.ring(bus, now),
            Form::Wait => self.letters(bus, now),
            Form::Off => Ok(Next::Rest),
        };
        match result {
            Ok(next) => {
                self.failing = false;
                next
            }
            Err(error) => {
                // Without a client there is nothing to be reached.
                if bus.maps() > 0 {
                    self.figures.faults += 1;
                    if !self.failing {
                        tracing::warn!("an access of memory failed, and is tried again: {error}");
                    }
                }
                (self.failing, self.waiting) = (true, None);
                Next::At(now + RETRY)
            }
        }
    }

    fn at(&self, offset: u64) -> u64 {
        self.setup.area.wrapping_add(offset)
    }

    fn read_word(&self, bus: &Bus, offset: u64) -> Result<u64, DmaError> {
        let mut word = [0; 8];
        bus.read(self.at(offset), &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    fn write_word(&self, bus: &Bus, offset: u64, word: u64) -> Result<(), DmaError> {
        // What was written before it is there when it can be seen.
        fence(Ordering::SeqCst);
        bus.write(self.at(offset), &word.to_le_bytes())
    }

    fn ring(&mut self, bus: &Bus, now: Instant) -> Result<Next, DmaError> {
        if self.progress.judged != self.progress.completed {
            // The driver looks at the count after it has said what it waits for, and we the other way round.
            fence(Ordering::SeqCst);
            let wanted = self.read_word(bus, area::WANTED)?;
            if self.progress.judged < wanted && wanted <= self.progress.completed {
                self.signal(bus);
            }
            self.progress.judged = self.progress.completed;
        }
        let half = match self.progress.half {
            Some(half) => half,
            None => {
                let posted = self.read_word(bus, area::POSTED)?;
                let ahead = posted.wrapping_sub(self.progress.completed);
                if ahead == 0 {
                    return Ok(Next::Rest);
                }
                if self.due > now {
                    return Ok(Next::At(self.due));
                }
                match self.descriptor(bus)? {
                    Some(half) if ahead <= self.setup.entries.into() => half,
                    other => return Ok(self.bad_ring(ahead, other, now)),
                }
            }
        };
        self.progress.half = Some(half);
        self.write_pieces(bus)?;
        match self.progress.half {
            Some(Half { done, .. }) if done < half.pattern.pieces(half.length) => {}
            _ => self.complete(bus, half)?,
        }
        Ok(Next::Now)
    }

    /// A driver that says what cannot be is waited for, as memory is that cannot be reached.
    fn bad_ring(&mut self, ahead: u64, half: Option<Half>, now: Instant) -> Next {
        if !self.failing {
            tracing::warn!(ahead, entries = self.setup.entries, ?half, "the ring is not one");
        }
        self.failing = true;
        self.figures.faults += 1;
        Next::At(now + RETRY)
    }

    /// The next buffer. `None` if it is none.
    fn descriptor(&self, bus: &Bus) -> Result<Option<Half>, DmaError> {
        let index = self.progress.completed % u64::from(self.setup.entries.max(1));
        let mut bytes = [0; DESCRIPTOR_BYTES as usize];
        bus.read(self.at(DESCRIPTORS + index * DESCRIPTOR_BYTES), &mut bytes)?;
        let [address, rest] = [0, 1].map(|at| u64::from_le_bytes(bytes.as_chunks().0[at]));
        let length = rest as u32;
        Ok((valid_length(length) && rest >> 32 == 0).then_some(Half {
            address,
            length,
            done: 0,
            pattern: self.load.pattern,
        }))
    }

    fn fill(&mut self, sequence: u64, length: usize) {
        if self.content_of == sequence && self.content.len() == length {
            return;
        }
        self.content.resize(length, 0);
        for (at, word) in self.content.as_chunks_mut().0.iter_mut().enumerate() {
            *word = buffer_word(self.setup.seed, sequence, at).to_le_bytes();
        }
        self.content_of = sequence;
    }

    fn write_pieces(&mut self, bus: &Bus) -> Result<(), DmaError> {
        let Some(mut half) = self.progress.half else { return Ok(()) };
        self.fill(self.progress.completed + 1, half.length as usize);
        let end = half.pattern.pieces(half.length).min(half.done + half.pattern.at_once());
        while half.done < end {
            let (start, length) = half.pattern.piece(half.length, half.done);
            let piece = &self.content[start as usize..][..length as usize];
            bus.write(half.address.wrapping_add(start.into()), piece)?;
            half.done += 1;
            self.progress.half = Some(half);
        }
        Ok(())
    }

    fn complete(&mut self, bus: &Bus, half: Half) -> Result<(), DmaError> {
        let sequence = self.progress.completed + 1;
        if !self.faults.loses_completion(sequence) {
            let mut completion = [0; COMPLETION_BYTES as usize];
            completion[..8].copy_from_slice(&sequence.to_le_bytes());
            completion[8..12].copy_from_slice(&half.length.to_le_bytes());
            let index = self.progress.completed % u64::from(self.setup.entries.max(1));
            let at = self.at(completions(self.setup.entries) + index * COMPLETION_BYTES);
            fence(Ordering::SeqCst);
            bus.write(at, &completion)?;
        }
        self.write_word(bus, area::COMPLETED, sequence)?;
        self.progress.completed = sequence;
        self.progress.half = None;
        self.last = Some((half.address, half.length));
        self.figures.buffers += 1;
        self.figures.bytes += u64::from(half.length);
        self.in_burst.0 += 1;
        self.in_burst.1 += u64::from(half.length);
        if self.in_burst.0 >= self.load.burst {
            if let Some(rate) = self.load.rate {
                let takes =
                    Duration::from_nanos((u128::from(self.in_burst.1) * 1_000_000_000 / u128::from(rate)) as u64);
                let now = Instant::now();
                self.due = self.due.max(now.checked_sub(CATCH_UP).unwrap_or(now)) + takes;
            }
            self.in_burst = (0, 0);
        }
        Ok(())
    }

    fn letters(&mut self, bus: &Bus, now: Instant) -> Result<Next, DmaError> {
        if !self.progress.outstanding {
            if self.due > now {
                return Ok(Next::At(self.due));
            }
            let sequence = self.progress.sequence + 1;
            self.fill(sequence, LETTER_BYTES as usize);
            bus.write(self.at(area::LETTER), &self.content)?;
            self.write_word(bus, area::SEQUENCE, sequence)?;
            (self.progress.sequence, self.progress.outstanding) = (sequence, true);
            self.last = Some((self.at(area::LETTER), LETTER_BYTES as u32));
            (self.waiting, self.told_lost) = (Some(now), false);
            self.signal(bus);
        }
        let read = self.read_word(bus, area::ACKNOWLEDGED)?;
        let since = *self.waiting.get_or_insert(now);
        if read == self.progress.sequence {
            self.progress.outstanding = false;
            self.waiting = None;
            self.figures.buffers += 1;
            self.figures.bytes += LETTER_BYTES;
            let took = u64::try_from((now - since).as_nanos()).unwrap_or(u64::MAX);
            self.figures.longest_ns = self.figures.longest_ns.max(took);
            self.due = now + self.load.interval;
            return Ok(Next::Now);
        }
        let lost = since + Duration::from_nanos(LOST_NS);
        if now >= lost && !self.told_lost {
            self.told_lost = true;
            self.figures.lost += 1;
            let letter = self.progress.sequence;
            tracing::error!(letter, "an interrupt was lost: it was not acknowledged within a second");
        }
        if !self.told_lost {
            return Ok(Next::At(lost));
        }
        // So that all is not over; but not before the driver can have noticed.
        let again = since + AGAIN;
        if now >= again {
            self.waiting = Some(now);
            self.signal(bus);
        }
        Ok(Next::At(again))
    }

    /// One interrupt.
    fn signal(&mut self, bus: &Bus) {
        let vector = (self.figures.signals % u64::from(self.setup.vectors.max(1))) as u32;
        self.figures.signals += 1;
        if self.faults.loses_interrupt(self.figures.signals) {
            return;
        }
        match self.setup.interrupt {
            Interrupt::None => {}
            Interrupt::Intx => {
                self.progress.cause = true;
                self.follow_pin(bus);
            }
            Interrupt::Msi => bus.trigger(pci_irq::MSI, vector),
            Interrupt::Msix => bus.trigger(pci_irq::MSIX, vector),
        }
    }

    /// Writes where it was told not to write any more.
    fn write_late(&mut self, bus: &Bus) {
        let Some((address, length)) = self.last else { return };
        match bus.write(address, &vec![LATE; length as usize]) {
            Ok(()) => tracing::warn!("wrote {length} bytes at {address:#x} after the device was brought to rest"),
            Err(error) => tracing::warn!("could not write after the device was brought to rest: {error}"),
        }
    }
}

impl Pattern {
    fn unit(self) -> u32 {
        match self {
            Self::Whole | Self::Reverse => PIECE,
            Self::Lines => LINE,
        }
    }

    fn at_once(self) -> u32 {
        if self == Self::Lines { PIECES } else { 1 }
    }

    /// Pieces of a buffer.
    fn pieces(self, length: u32) -> u32 {
        length.div_ceil(self.unit())
    }

    /// Where piece `n` lies, and its length.
    fn piece(self, length: u32, n: u32) -> (u32, u32) {
        let pieces = self.pieces(length);
        let at = match self {
            Self::Whole => n,
            Self::Reverse => pieces - 1 - n,
            Self::Lines => (u64::from(n) * u64::from(stride(pieces)) % u64::from(pieces)) as u32,
        };
        let start = at * self.unit();
        (start, self.unit().min(length - start))
    }
}

/// A step that leads through all of `n` places in a different order: about the golden section of `n`, and without a common divisor.
fn stride(n: u32) -> u32 {
    let divides_both = |step: u32| {
        let (mut a, mut b) = (n, step);
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a != 1
    };
    let mut step = (u64::from(n) * 5 / 8).max(1) as u32;
    while divides_both(step) {
        step += 1;
    }
    step
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pieces_of_every_pattern_are_the_whole_buffer_once() {
        for pattern in [Pattern::Whole, Pattern::Reverse, Pattern::Lines] {
            for length in [16, 64, 72, 4096, 4104, 12_288, MAX_BUFFER] {
                let mut written = vec![0; length as usize];
                for n in 0..pattern.pieces(length) {
                    let (start, length) = pattern.piece(length, n);
                    written[start as usize..][..length as usize].iter_mut().for_each(|byte| *byte += 1);
                }
                assert!(written.iter().all(|times| *times == 1), "{pattern:?} of {length} bytes");
            }
        }
    }
}
