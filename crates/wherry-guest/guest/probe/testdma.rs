//! The DMA load of the probe: a driver for the test device `wherry device testdma` (docs/testdma.md), every buffer and every interrupt
//! checked. It is vCPU 0's.
//!
//! **Ring.** Buffers of a pool are posted in turn and verified as they come back. Nothing but the device writes to them: a buffer keeps
//! what it received until its turn comes again, and is verified once more then, so that a page that was lost on a move, or written
//! late, is found. **Stop and wait.** Each letter is verified and acknowledged; the vCPU halts in between.
//!
//! **Hot plug.** The device comes and goes, if that is what the parameters say. What the buffers hold stays, and is verified when the
//! next device fills them.
//!
//! Memory is looked at after an interrupt alone. One that does not come within ten looks, 100 ms apart, is lost: so a jump of the
//! clock, as a move can make it, is none.

use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use core::sync::atomic::{AtomicU64, compiler_fence, fence};

use wherry_guest_kernel::fault::{self, die, header};
use wherry_guest_kernel::hotplug::{DOWN, EJECT, UP};
use wherry_guest_kernel::memory::Allocator;
use wherry_guest_kernel::params::{DmaInterrupt, DmaLoad, Params};
use wherry_guest_kernel::pci::Function;
use wherry_guest_kernel::report::{FailureKind, TestdmaReport};
use wherry_guest_kernel::testdma::{
    COMPLETION_BYTES, DESCRIPTOR_BYTES, DESCRIPTORS, DEVICE, Form, ID, Interrupt, LETTER_BYTES, MAX_MSI_VECTORS,
    MSIX_BAR, REGISTERS_BAR, SCRATCH, VENDOR, VERSION, area, area_bytes, buffer_word, completions, register,
};
use wherry_guest_kernel::{gate, interrupt, mmio};

use crate::handed::Handed;

const MSIX_CAPABILITY: u8 = 0x11;
/// The first of its vectors. MSI wants a multiple of their number.
const VECTOR: u8 = interrupt::DEVICE_VECTORS.start + 0x10;
/// Looks until an interrupt is taken for lost, and how many of them there are in a second.
const LOOKS: u32 = 10;
/// Words of the scratch page that are written and compared.
const SCRATCH_WORDS: u64 = 16;
/// How often the ports of hot plug are looked at in a second.
const PORT_LOOKS: u64 = 100;
/// How often vectors are masked and unmasked in a second.
const TOGGLES: u64 = 200;

/// The load. Set up by the first vCPU before the data set is laid out.
pub struct Testdma {
    /// The device, while it is there.
    function: Option<Function>,
    registers: u64,
    kind: Interrupt,
    /// Offset of its capability, or address of its MSI-X table.
    messages: u64,
    vectors: u32,
    form: Form,
    report: &'static TestdmaReport,
    area: u64,
    entries: u32,
    seed: u64,
    pool: u64,
    buffer: u64,
    slots: u64,
    /// For each slot of the pool: the sequence number of what it holds, or 0.
    held: u64,
    posted: u64,
    taken: u64,
    /// Buffers posted of which the device was not told.
    untold: u32,
    /// Interrupts seen, and those for which the pin's cause was cleared.
    seen: u32,
    cleared: u32,
    masks: bool,
    masked: bool,
    next_toggle: u64,
    /// When the last one came, and whether one is due since.
    last: u64,
    looks: u32,
    next_look: u64,
    tsc_hz: u64,
    stopped: bool,
    /// Whether it comes and goes, when the ports are looked at next, and how many ticks letting it go takes.
    plug: bool,
    next_ports: u64,
    eject: u64,
    /// When it is ejected.
    leaves: Option<u64>,
    /// Next slot to verify at the end.
    end: u64,
}

fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(n), Relaxed);
}

/// The load, until vCPU 0 works.
pub static HANDED: Handed<Testdma> = Handed::new();

impl Testdma {
    /// Finds the device and sets it up, or fails and halts. `None` if there is to be no such load.
    pub fn set_up(params: &Params, ram: &mut Allocator, tsc_hz: u64) -> Option<Self> {
        let form = match params.testdma? {
            DmaLoad::Ring => Form::Ring,
            DmaLoad::Wait => Form::Wait,
        };
        let fail = |what: &str| -> ! { die(0, FailureKind::Testdma, format_args!("test device for DMA: {what}")) };
        let function = Function::find(VENDOR, DEVICE).next();
        if function.is_none() && !params.testdma_plug {
            fail("there is none on PCI bus 0");
        }
        let kind = match params.testdma_interrupt {
            DmaInterrupt::Msix => Interrupt::Msix,
            DmaInterrupt::Msi => Interrupt::Msi,
            DmaInterrupt::Intx => Interrupt::Intx,
        };
        let (entries, buffer) = (params.testdma_entries, u64::from(params.testdma_buffer));
        let slots = params.testdma_pool / buffer;
        if slots < 2 * u64::from(entries) {
            fail("testdma_pool= is less than two buffers for each entry of the ring");
        }
        let mut take = |bytes: u64| match ram.take(bytes) {
            Some(region) => {
                // SAFETY: handed out to nobody else, mapped.
                unsafe { (region.start as *mut u8).write_bytes(0, (region.end - region.start) as usize) };
                region.start
            }
            None => fail("there is no RAM for its buffers"),
        };
        let area = take(area_bytes(entries));
        let pool = take(slots * buffer);
        let held = take(slots * 8);
        let mut this = Self {
            function: None,
            registers: 0,
            kind,
            messages: 0,
            vectors: if kind == Interrupt::Intx { 1 } else { params.testdma_vectors },
            form,
            report: &header().testdma,
            area,
            entries,
            seed: params.seed,
            pool,
            buffer,
            slots,
            held,
            posted: 0,
            taken: 0,
            untold: 0,
            seen: 0,
            cleared: 0,
            masks: params.testdma_mask,
            masked: false,
            next_toggle: 0,
            last: 0,
            looks: 0,
            next_look: 0,
            tsc_hz,
            stopped: false,
            plug: params.testdma_plug,
            next_ports: 0,
            eject: u64::from(params.testdma_eject) * (tsc_hz / 1000),
            leaves: None,
            end: 0,
        };
        if let Some(function) = function {
            this.attach(function).unwrap_or_else(|what| fail(what));
        }
        let report = this.report;
        report.form.store(form as u32, Relaxed);
        report.interrupt.store(kind as u32, Relaxed);
        report.vectors.store(this.vectors, Relaxed);
        report.entries.store(entries, Relaxed);
        report.buffer.store(buffer as u32, Relaxed);
        report.area_gpa.store(area, Relaxed);
        report.pool_gpa.store(pool, Relaxed);
        report.present.store(1, Relaxed);
        Some(this)
    }

    /// Sets the device up, which is as new, and so is the area.
    fn attach(&mut self, function: Function) -> Result<(), &'static str> {
        self.registers = function.bar(REGISTERS_BAR).ok_or("its registers lie where nothing is mapped")?;
        function.enable();
        if self.read(register::ID) != ID || self.read(register::VERSION) != VERSION {
            return Err("its registers are not those of this version");
        }
        self.connect(function)?;
        // SAFETY: the area is the driver's as long as the device has not begun.
        unsafe { (self.area as *mut u8).write_bytes(0, area_bytes(self.entries) as usize) };
        for word in 0..SCRATCH_WORDS {
            self.write(SCRATCH + 4 * word, self.scratch_word(word));
        }
        for (offset, value) in [
            (register::INTERRUPT, self.kind as u32),
            (register::VECTORS, self.vectors),
            (register::AREA, self.area as u32),
            (register::AREA_HIGH, (self.area >> 32) as u32),
            (register::ENTRIES, self.entries),
            (register::SEED, self.seed as u32),
            (register::SEED_HIGH, (self.seed >> 32) as u32),
        ] {
            self.write(offset, value);
            if self.read(offset) != value {
                return Err("it does not take its set-up: are there so many vectors of that kind?");
            }
        }
        (self.posted, self.taken, self.untold, self.looks) = (0, 0, 0, 0);
        (self.seen, self.cleared) = (self.interrupts(), self.interrupts());
        (self.masked, self.stopped, self.end, self.leaves) = (false, false, 0, None);
        self.function = Some(function);
        self.report.masked.store(0, Relaxed);
        self.report.plugged.store(1, Relaxed);
        Ok(())
    }

    /// Looks whether a device has come or is to go.
    fn look_at_ports(&mut self, now: u64) {
        if now < self.next_ports {
            return;
        }
        self.next_ports = now + self.tsc_hz / PORT_LOOKS;
        let up = gate::inl(UP);
        if up != 0 {
            gate::outl(UP, up);
        }
        if up != 0
            && self.function.is_none()
            && let Some(function) = Function::find(VENDOR, DEVICE).next()
        {
            match self.attach(function) {
                Ok(()) => self.begin(now),
                Err(what) => {
                    add(&self.report.errors, 1);
                    self.fails(format_args!("it has come, and {what}"));
                }
            }
        }
        let down = gate::inl(DOWN);
        if down != 0 {
            gate::outl(DOWN, down);
        }
        let ours = self.function.map_or(0, |function| 1u32 << function.device());
        if down & ours != 0 && self.leaves.is_none() {
            self.leaves = Some(now + self.eject);
        }
        if down & !ours != 0 {
            gate::outl(EJECT, down & !ours);
        }
    }

    /// Verifies what the device has written, and ejects it.
    fn leave(&mut self) {
        while self.finish() {}
        self.leaves = None;
        self.report.plugged.store(0, Relaxed);
        if let Some(function) = self.function.take() {
            // It decodes nothing and writes nothing any more.
            function.write(4, 0);
            gate::outl(EJECT, 1u32 << function.device());
        }
    }

    /// Begins. To be called when this vCPU can take interrupts and goes to work.
    pub fn begin(&mut self, now: u64) {
        if self.function.is_none() {
            return;
        }
        self.last = now;
        self.next_toggle = now;
        if self.form == Form::Ring {
            self.word(area::WANTED).store(1, SeqCst);
            while self.posted < u64::from(self.entries) {
                self.post();
            }
        }
        self.write(register::CONTROL, self.form as u32);
        self.ring_bell();
    }

    /// Whether the vCPU is to halt while there is nothing to do.
    pub fn rests(&self) -> bool {
        self.form == Form::Wait
    }

    /// TSC at which it wants to be looked at even without an interrupt.
    pub fn next_turn(&self) -> u64 {
        let toggle = if self.masks && self.function.is_some() { self.next_toggle } else { u64::MAX };
        if self.plug { toggle.min(self.next_ports) } else { toggle }
    }

    fn read(&self, offset: u64) -> u32 {
        // SAFETY: a register of the device.
        unsafe { mmio::read32(self.registers + offset) }
    }

    fn write(&self, offset: u64, value: u32) {
        // SAFETY: a register of the device; what it does with memory it does in the area and in posted buffers.
        unsafe { mmio::write32(self.registers + offset, value) };
    }

    fn ring_bell(&mut self) {
        self.untold = 0;
        self.write(register::DOORBELL, 1);
    }

    fn scratch_word(&self, word: u64) -> u32 {
        buffer_word(self.seed, u64::MAX, word as usize + 1) as u32
    }

    fn word(&self, offset: u64) -> &'static AtomicU64 {
        // SAFETY: in the area, which lives for ever and which both sides access as atomics.
        unsafe { &*((self.area + offset) as *const AtomicU64) }
    }

    fn slot(&self, slot: u64) -> &'static AtomicU64 {
        // SAFETY: in the table of slots.
        unsafe { &*((self.held + 8 * slot) as *const AtomicU64) }
    }

    /// Has its interrupts reach this vCPU.
    fn connect(&mut self, function: Function) -> Result<(), &'static str> {
        let apic_id = interrupt::local_apic_id();
        match self.kind {
            Interrupt::Msix => {
                let at = function.capabilities(MSIX_CAPABILITY).next().ok_or("it has no MSI-X")?;
                let base = function.bar(MSIX_BAR).ok_or("its MSI-X table lies where nothing is mapped")?;
                self.messages = base + u64::from(function.read(at + 4) & !7);
                for n in 0..u64::from(self.vectors) {
                    let entry = self.messages + 16 * n;
                    // SAFETY: an entry of its table; the vector has a stub.
                    unsafe {
                        mmio::write32(entry, 0xfee0_0000 | apic_id << 12);
                        mmio::write32(entry + 4, 0);
                        mmio::write32(entry + 8, u32::from(VECTOR) + n as u32);
                        mmio::write32(entry + 12, 0);
                    }
                }
                function.write(at, function.read(at) & 0x3fff_ffff | 1 << 31);
            }
            Interrupt::Msi => {
                if self.vectors > MAX_MSI_VECTORS {
                    return Err("MSI has at most 32 vectors");
                }
                let used = self.vectors.next_power_of_two().ilog2();
                self.messages = function.connect_msi(VECTOR, used, apic_id)?.into();
            }
            _ => interrupt::route_pin(function.pin_input(), VECTOR, apic_id),
        }
        Ok(())
    }

    /// Masks or unmasks all its vectors.
    fn set_masked(&mut self, masked: bool) {
        let Some(function) = self.function else { return };
        self.masked = masked;
        match self.kind {
            Interrupt::Msix => {
                for n in 0..u64::from(self.vectors) {
                    // SAFETY: vector control of an entry of its table.
                    unsafe { mmio::write32(self.messages + 16 * n + 12, masked.into()) };
                }
            }
            Interrupt::Msi => {
                let mask = if masked { (1_u64 << self.vectors.next_power_of_two()) - 1 } else { 0 };
                function.write(self.messages as u8 + 16, mask as u32);
            }
            _ => {
                let command = function.read(4) & 0xffff & !(1 << 10);
                function.write(4, command | u32::from(masked) << 10);
            }
        }
        self.report.masked.store(masked.into(), Relaxed);
        add(&self.report.toggles, 1);
    }

    fn interrupts(&self) -> u32 {
        (0..self.vectors as u8).fold(0, |all, n| all.wrapping_add(interrupt::count(0, VECTOR + n)))
    }

    /// Does one thing that there is to do. False if there is nothing.
    pub fn work(&mut self, now: u64) -> bool {
        if self.plug {
            self.look_at_ports(now);
        }
        if self.leaves.is_some_and(|at| now >= at) {
            self.leave();
            return true;
        }
        if self.stopped || self.function.is_none() {
            return false;
        }
        if self.masks && now >= self.next_toggle {
            self.set_masked(!self.masked);
            self.next_toggle = now + self.tsc_hz / TOGGLES;
        }
        let count = self.interrupts();
        if count == self.seen {
            return self.look(now);
        }
        if self.kind == Interrupt::Intx && count != self.cleared {
            // Before memory is looked at: what comes later takes the pin up again.
            self.write(register::CAUSE, 1);
            self.cleared = count;
        }
        self.report.interrupts.store(count.into(), Relaxed);
        match self.form {
            Form::Ring => self.ring(now, count),
            _ => self.letter(now, count),
        }
        true
    }

    fn arrived(&mut self, now: u64) {
        let ns = (u128::from(now.saturating_sub(self.last)) * 1_000_000_000 / u128::from(self.tsc_hz)) as u64;
        if ns > self.report.longest_ns.load(Relaxed) {
            self.report.longest_ns.store(ns, Relaxed);
        }
        self.last = now;
        self.looks = 0;
        add(&self.report.received, 1);
    }

    /// No interrupt has come. Whether one should have: true if it is given up.
    fn look(&mut self, now: u64) -> bool {
        let due = match self.form {
            Form::Ring => self.word(area::COMPLETED).load(SeqCst) > self.taken,
            _ => self.word(area::SEQUENCE).load(SeqCst) > self.taken,
        };
        if !due || self.masked {
            if !due {
                self.looks = 0;
            }
            return false;
        }
        if self.looks == 0 || now >= self.next_look {
            self.looks += 1;
            self.next_look = now + self.tsc_hz / u64::from(LOOKS);
        }
        if self.looks <= LOOKS {
            return false;
        }
        self.looks = 0;
        add(&self.report.lost, 1);
        self.fails(format_args!(
            "an interrupt was lost: number {} is there, and none came for a second",
            self.taken + 1
        ));
        // So that all is not over.
        self.seen = self.seen.wrapping_sub(1);
        true
    }

    /// Takes one buffer, or listens for the next.
    fn ring(&mut self, now: u64, count: u32) {
        let complete = self.word(area::COMPLETED).load(SeqCst);
        if complete == self.taken {
            if self.untold > 0 {
                self.ring_bell();
            }
            self.word(area::WANTED).store(self.taken + 1, SeqCst);
            fence(SeqCst);
            if self.word(area::COMPLETED).load(SeqCst) == self.taken {
                self.seen = count;
            }
            return;
        }
        if complete < self.taken || complete > self.posted {
            add(&self.report.errors, 1);
            self.fails(format_args!("{complete} buffers complete, {} taken of {} posted", self.taken, self.posted));
            self.stop();
            return;
        }
        compiler_fence(SeqCst);
        self.arrived(now);
        self.accept();
        self.post();
        if self.untold >= self.entries / 4 {
            self.ring_bell();
        }
    }

    /// Verifies the next completion and its buffer.
    fn accept(&mut self) {
        let (index, sequence) = (self.taken % u64::from(self.entries), self.taken + 1);
        let at = completions(self.entries) + index * COMPLETION_BYTES;
        let (found, rest) = (self.word(at).load(SeqCst), self.word(at + 8).load(SeqCst));
        let slot = self.taken % self.slots;
        self.taken = sequence;
        if (found, rest) != (sequence, self.buffer) {
            self.wrong(sequence, u64::MAX, sequence, found);
            self.fails(format_args!("the completion of buffer {sequence} is of {found}, {rest:#x}"));
            return;
        }
        self.slot(slot).store(sequence, Relaxed);
        if self.verify(self.pool + slot * self.buffer, self.buffer, sequence, "buffer") {
            add(&self.report.verified, 1);
        }
    }

    /// Posts the next slot of the pool, if it still holds what it received.
    fn post(&mut self) {
        let slot = self.posted % self.slots;
        self.recheck(slot);
        self.slot(slot).store(0, Relaxed);
        let at = DESCRIPTORS + self.posted % u64::from(self.entries) * DESCRIPTOR_BYTES;
        self.word(at).store(self.pool + slot * self.buffer, SeqCst);
        self.word(at + 8).store(self.buffer, SeqCst);
        self.posted += 1;
        self.word(area::POSTED).store(self.posted, SeqCst);
        self.untold += 1;
    }

    fn recheck(&mut self, slot: u64) {
        let held = self.slot(slot).load(Relaxed);
        if held != 0 && self.verify(self.pool + slot * self.buffer, self.buffer, held, "held buffer") {
            add(&self.report.rechecked, 1);
        }
    }

    fn letter(&mut self, now: u64, count: u32) {
        self.seen = count;
        let sequence = self.word(area::SEQUENCE).load(SeqCst);
        if sequence == self.taken {
            add(&self.report.spurious, 1);
            return;
        }
        compiler_fence(SeqCst);
        self.arrived(now);
        if sequence != self.taken + 1 {
            self.wrong(self.taken + 1, u64::MAX, self.taken + 1, sequence);
            self.fails(format_args!("letter {sequence} came after letter {}", self.taken));
        }
        if self.verify(self.area + area::LETTER, LETTER_BYTES, sequence, "letter") {
            add(&self.report.verified, 1);
        }
        self.taken = sequence;
        self.word(area::ACKNOWLEDGED).store(sequence, SeqCst);
        self.ring_bell();
    }

    fn verify(&mut self, at: u64, bytes: u64, sequence: u64, what: &str) -> bool {
        for word in 0..bytes / 8 {
            // SAFETY: of the pool or the area; the device does not write there now, and if it does, that is what is looked for.
            let found = unsafe { ((at + 8 * word) as *const u64).read_volatile() };
            let expected = buffer_word(self.seed, sequence, word as usize);
            if found != expected {
                self.wrong(sequence, word, expected, found);
                self.fails(format_args!(
                    "{what} {sequence} at {at:#x}, word {word}: expected {expected:#018x} found {found:#018x}"
                ));
                return false;
            }
        }
        true
    }

    #[cold]
    fn wrong(&mut self, sequence: u64, word: u64, expected: u64, found: u64) {
        add(&self.report.errors, 1);
        if self.report.errors.load(Relaxed) == 1 {
            self.report.first_sequence.store(sequence, Relaxed);
            self.report.first_word.store(word, Relaxed);
            self.report.first_expected.store(expected, Relaxed);
            self.report.first_found.store(found, Relaxed);
        }
    }

    #[cold]
    fn fails(&self, what: core::fmt::Arguments<'_>) {
        // Printing is slow.
        if self.errors() <= 8 {
            fault::report(0, FailureKind::Testdma, format_args!("test device for DMA: {what}"));
        }
    }

    /// Has the device end: when this returns it does no DMA any more.
    fn stop(&mut self) {
        self.write(register::CONTROL, 0);
        self.read(register::CONTROL);
        self.stopped = true;
    }

    /// Takes what has come, and verifies all that is held once more. To be called until it is false; between the calls `tick`.
    pub fn finish(&mut self) -> bool {
        // One whose process has died reads as ones.
        if !self.stopped && self.function.is_some() && self.read(register::ID) == ID {
            self.stop();
            for word in 0..SCRATCH_WORDS {
                let (expected, found) = (self.scratch_word(word), self.read(SCRATCH + 4 * word));
                if expected != found {
                    self.wrong(0, word, expected.into(), found.into());
                    self.fails(format_args!("word {word} of its scratch page is {found:#x}, not {expected:#x}"));
                }
            }
        }
        if self.form != Form::Ring {
            return false;
        }
        if self.word(area::COMPLETED).load(SeqCst) > self.taken && self.taken < self.posted && self.function.is_some() {
            add(&self.report.received, 1);
            self.accept();
            return true;
        }
        if self.end < self.slots {
            self.recheck(self.end);
            self.end += 1;
            return true;
        }
        false
    }

    /// Errors of all kinds.
    pub fn errors(&self) -> u64 {
        self.report.errors.load(Relaxed) + self.report.lost.load(Relaxed)
    }
}
