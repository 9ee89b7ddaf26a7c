//! The load of QEMU's educational device: a driver for it, which checks every byte of its DMA and every interrupt. It is vCPU 0's.
//!
//! **A round.** A buffer of a pool is filled with words that are the round's own, and goes to the device by DMA; then the device raises
//! interrupts without DMA, by its register for that and by computing factorials in turn; then what it holds comes back to the next buffer, which
//! was filled with something else, and is verified. Both keep their words until their turn comes again, and are verified once more then: so a
//! write that went elsewhere is found, and one that was late.
//!
//! **Exactly once.** The device is told one thing at a time, and the next when the interrupt of the last has come, was what it should be, and has been
//! acknowledged. An interrupt without anything raised, or a second one, is counted as spurious. One that does not come within ten looks, 100 ms
//! apart, at something that was raised is lost: so a jump of the clock is none. The vCPU halts in between.
//!
//! **Nothing else changed.** A device that was reset has forgotten the word of its liveness register, and its configuration: both are compared
//! in each round.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Relaxed, SeqCst};

use wherry_guest_kernel::edu::{BUFFER, DEVICE, ID, REACH, REGISTERS_BAR, VENDOR, cause, command, register, status};
use wherry_guest_kernel::fault::{self, die, header};
use wherry_guest_kernel::memory::Allocator;
use wherry_guest_kernel::params::{EduInterrupt, Params};
use wherry_guest_kernel::pci::{Function, msi_address};
use wherry_guest_kernel::report::{EduReport, FailureKind};
use wherry_guest_kernel::testdma::buffer_word;
use wherry_guest_kernel::{interrupt, mmio};

use crate::handed::Handed;

const MSI_VECTOR: u8 = interrupt::DEVICE_VECTORS.start + 8;
const PIN_VECTOR: u8 = interrupt::LEVEL_VECTORS.start;
/// Buffers of the pool: an even number.
const SLOTS: u64 = 64;
/// Looks in a second, until an interrupt is taken for lost, and until the device is taken for stuck.
const LOOKS_PER_SECOND: u64 = 10;
const LOST_LOOKS: u32 = 10;
const STUCK_LOOKS: u32 = 600;
/// Bits of the command register that are compared: memory, bus master, and the switch of the pin.
const COMMAND_BITS: u32 = 1 << 1 | 1 << 2 | 1 << 10;

/// What the device has been told last.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Nothing: a round begins.
    Ready,
    /// To fetch the round's buffer.
    Fetch,
    /// To interrupt; so many more times afterwards.
    Raise { left: u32 },
    /// To compute the factorial of a number, and interrupt; so many more times afterwards.
    Factorial { of: u32, left: u32 },
    /// To bring the buffer back.
    Return,
}

/// The load. Set up by the first vCPU before the data set is laid out.
pub struct Edu {
    function: Function,
    registers: u64,
    kind: EduInterrupt,
    vector: u8,
    /// Offset of the capability of MSI.
    messages: u8,
    report: &'static EduReport,
    pool: u64,
    /// Bytes of a buffer.
    bytes: u64,
    raises: u32,
    /// The round whose words each buffer holds, or 0.
    held: [u64; SLOTS as usize],
    seed: u64,
    round: u64,
    step: Step,
    /// When the device was told.
    told: u64,
    /// Interrupts dealt with, and when the last one came.
    seen: u32,
    last: Option<u64>,
    /// Looks at a device that has raised nothing for it, and at one that has.
    looks: u32,
    due: u32,
    next_look: u64,
    tsc_hz: u64,
    /// No round is to begin; the device has no more to do.
    ending: bool,
    stopped: bool,
    /// Next buffer to verify at the end.
    end: u64,
}

/// The load, until vCPU 0 works.
pub static HANDED: Handed<Edu> = Handed::new();

fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(n), Relaxed);
}

fn raise_to(counter: &AtomicU64, value: u64) {
    if value > counter.load(Relaxed) {
        counter.store(value, Relaxed);
    }
}

impl Edu {
    /// Finds the device and sets it up, or fails and halts. `None` if there is to be no such load.
    pub fn set_up(params: &Params, ram: &mut Allocator, tsc_hz: u64) -> Option<Self> {
        let kind = params.edu?;
        let fail = |what: &str| -> ! { die(0, FailureKind::Edu, format_args!("educational device: {what}")) };
        let Some(function) = Function::find(VENDOR, DEVICE).next() else {
            fail("there is none on PCI bus 0");
        };
        let bytes = u64::from(params.edu_bytes);
        let Some(pool) = ram.take(SLOTS * bytes) else {
            fail("there is no RAM for its buffers");
        };
        if pool.end > REACH {
            fail("its buffers lie above 256 MiB, where it does not reach");
        }
        let Some(registers) = function.bar(REGISTERS_BAR) else {
            fail("its registers lie where nothing is mapped");
        };
        function.enable();
        let mut this = Self {
            function,
            registers,
            kind,
            vector: if kind == EduInterrupt::Msi { MSI_VECTOR } else { PIN_VECTOR },
            messages: 0,
            report: &header().edu,
            pool: pool.start,
            bytes,
            raises: params.edu_raises,
            held: [0; SLOTS as usize],
            seed: params.seed,
            round: 0,
            step: Step::Ready,
            told: 0,
            seen: 0,
            last: None,
            looks: 0,
            due: 0,
            next_look: 0,
            tsc_hz,
            ending: false,
            stopped: false,
            end: 0,
        };
        if let Err(what) = this.attach() {
            fail(what);
        }
        let report = this.report;
        report.interrupt.store(kind as u32, Relaxed);
        report.bytes.store(params.edu_bytes, Relaxed);
        report.pool_gpa.store(this.pool, Relaxed);
        report.present.store(1, Relaxed);
        Some(this)
    }

    /// Sees that it is there and at rest, and has its interrupts reach this vCPU.
    fn attach(&mut self) -> Result<(), &'static str> {
        if self.read(register::ID) & 0xffff != ID {
            return Err("its registers are not those that they should be");
        }
        if self.read(register::COMMAND) & command::START != 0 {
            return Err("it does DMA that somebody else has begun");
        }
        let raised = self.read(register::RAISED);
        self.write(register::ACKNOWLEDGE, raised);
        self.write(register::STATUS, 0);
        let apic_id = interrupt::local_apic_id();
        match self.kind {
            EduInterrupt::Msi => self.messages = self.function.connect_msi(self.vector, 0, apic_id)?,
            EduInterrupt::Intx => {
                // The pin is used while MSI is off.
                if let Some(at) = self.function.capabilities(wherry_guest_kernel::pci::MSI_CAPABILITY).next() {
                    self.function.write(at, self.function.read(at) & !(1 << 16));
                }
                self.function.write(4, self.function.read(4) & 0xffff & !(1 << 10));
                interrupt::route_pin(self.function.pin_input(), self.vector, apic_id);
            }
        }
        self.seen = interrupt::count(0, self.vector);
        Ok(())
    }

    fn read(&self, offset: u64) -> u32 {
        // SAFETY: a register of the device.
        unsafe { mmio::read32(self.registers + offset) }
    }

    fn write(&self, offset: u64, value: u32) {
        // SAFETY: a register of the device, whose DMA is told to go to buffers of the pool only.
        unsafe { mmio::write32(self.registers + offset, value) };
    }

    /// The two buffers of the present round: the one that goes, and the one that comes.
    fn slots(&self) -> [u64; 2] {
        let first = 2 * self.round % SLOTS;
        [first, first + 1]
    }

    fn word(&self, slot: u64, word: u64) -> *mut u64 {
        (self.pool + slot * self.bytes + 8 * word) as *mut u64
    }

    /// Does one thing that there is to do. False if there is nothing.
    pub fn work(&mut self, now: u64) -> bool {
        let count = interrupt::count(0, self.vector);
        if count != self.seen {
            self.interrupted(now, count);
            return true;
        }
        if self.stopped {
            return false;
        }
        if self.step == Step::Ready {
            if !self.ending {
                self.begin(now);
            }
            return !self.ending;
        }
        self.look(now)
    }

    /// Begins a round.
    fn begin(&mut self, now: u64) {
        self.round += 1;
        let [goes, comes] = self.slots();
        for slot in [goes, comes] {
            self.recheck(slot);
            self.held[slot as usize] = 0;
        }
        for word in 0..self.bytes / 8 {
            let value = buffer_word(self.seed, self.round, word as usize);
            // SAFETY: of the pool; the device has nothing to do.
            unsafe {
                self.word(goes, word).write_volatile(value);
                self.word(comes, word).write_volatile(!value);
            }
        }
        self.held[goes as usize] = self.round;
        self.write(register::LIVENESS, self.round as u32);
        self.dma(self.pool + goes * self.bytes, BUFFER.into(), 0);
        self.tell(Step::Fetch, now);
    }

    /// Starts DMA that ends with an interrupt.
    fn dma(&self, source: u64, destination: u64, more: u32) {
        core::sync::atomic::fence(SeqCst);
        self.write(register::SOURCE, source as u32);
        self.write(register::DESTINATION, destination as u32);
        self.write(register::COUNT, self.bytes as u32);
        self.write(register::COMMAND, command::START | command::INTERRUPT | more);
    }

    fn tell(&mut self, step: Step, now: u64) {
        (self.step, self.told, self.looks, self.due) = (step, now, 0, 0);
        self.next_look = now + self.tsc_hz / LOOKS_PER_SECOND;
        add(&self.report.asked, 1);
    }

    /// What the device raises for the present step.
    fn expected(&self) -> u32 {
        match self.step {
            Step::Ready => 0,
            Step::Fetch | Step::Return => cause::DMA,
            // Any bits; these change each time, and are none of the device's own.
            Step::Raise { left } => 1 << (9 + left % 16),
            Step::Factorial { .. } => cause::FACTORIAL,
        }
    }

    /// At least one interrupt has come.
    fn interrupted(&mut self, now: u64, count: u32) {
        let new = count.wrapping_sub(self.seen);
        self.seen = count;
        self.report.interrupts.store(count.into(), Relaxed);
        let raised = if self.stopped { 0 } else { self.read(register::RAISED) };
        let done = raised != 0 && !self.is_gone(raised);
        if done {
            self.write(register::ACKNOWLEDGE, raised);
            // When this returns, the pin is down.
            if self.read(register::RAISED) & raised != 0 {
                self.wrong(0, 0, u64::from(raised), "it does not take back what is acknowledged");
            }
        }
        if self.kind == EduInterrupt::Intx {
            interrupt::end();
        }
        add(&self.report.spurious, u64::from(new) - u64::from(done));
        if done {
            self.answered(now, raised);
        }
    }

    /// No interrupt has come. Whether one should have: true if it is given up.
    fn look(&mut self, now: u64) -> bool {
        if now < self.next_look {
            return false;
        }
        self.next_look = now + self.tsc_hz / LOOKS_PER_SECOND;
        let raised = self.read(register::RAISED);
        if self.is_gone(raised) {
            return true;
        }
        if raised == 0 {
            self.looks += 1;
            if self.looks < STUCK_LOOKS {
                return false;
            }
            add(&self.report.stalled, 1);
            self.fails(format_args!("round {}: it does not do what it was told, and raises nothing", self.round));
            // It cannot be told anything else while it may still do that.
            self.stop();
            return true;
        }
        self.due += 1;
        if self.due <= LOST_LOOKS {
            return false;
        }
        add(&self.report.lost, 1);
        self.fails(format_args!(
            "an interrupt was lost: {raised:#x} is raised in round {}, and none came for a second",
            self.round
        ));
        // So that all is not over.
        self.write(register::ACKNOWLEDGE, raised);
        self.answered(now, raised);
        true
    }

    /// Whether the device answers no more: reads of it are all ones.
    fn is_gone(&mut self, raised: u32) -> bool {
        if raised != u32::MAX || self.read(register::ID) != u32::MAX {
            return false;
        }
        self.report.gone.store(1, Relaxed);
        self.fails(format_args!("it has gone, in round {}", self.round));
        self.stopped = true;
        true
    }

    /// What was raised for the present step has been acknowledged: checks it, and tells the device the next.
    fn answered(&mut self, now: u64, raised: u32) {
        let ns = |ticks: u64| (u128::from(ticks) * 1_000_000_000 / u128::from(self.tsc_hz)) as u64;
        if let Some(last) = self.last.replace(now) {
            raise_to(&self.report.longest_ns, ns(now.saturating_sub(last)));
        }
        if matches!(self.step, Step::Raise { .. }) {
            raise_to(&self.report.latency_ns, ns(now.saturating_sub(self.told)));
        }
        add(&self.report.answered, 1);
        let expected = self.expected();
        if raised != expected {
            self.wrong(0, expected.into(), raised.into(), "it has raised something else");
        }
        match self.step {
            Step::Ready => {}
            Step::Fetch => {
                add(&self.report.dmas, 1);
                self.raise(self.raises, now);
            }
            Step::Raise { left } => self.raise(left, now),
            Step::Factorial { of, left } => {
                let (product, found) = ((1..=of).fold(1_u32, u32::wrapping_mul), self.read(register::FACTORIAL));
                if found != product || self.read(register::STATUS) & status::COMPUTING != 0 {
                    self.wrong(0, product.into(), found.into(), "a factorial is wrong");
                }
                self.write(register::STATUS, 0);
                self.raise(left, now);
            }
            Step::Return => {
                add(&self.report.dmas, 1);
                self.returned();
                self.step = Step::Ready;
            }
        }
    }

    /// Has it interrupt `left` times more, and then bring the buffer back.
    fn raise(&mut self, left: u32, now: u64) {
        let Some(left) = left.checked_sub(1) else {
            let [_, comes] = self.slots();
            self.dma(BUFFER.into(), self.pool + comes * self.bytes, command::TO_RAM);
            self.tell(Step::Return, now);
            return;
        };
        if left.is_multiple_of(2) {
            self.tell(Step::Raise { left }, now);
            self.write(register::RAISE, self.expected());
        } else {
            let of = 1 + (self.round as u32).wrapping_add(left) % 20;
            self.tell(Step::Factorial { of, left }, now);
            self.write(register::STATUS, status::INTERRUPT);
            self.write(register::FACTORIAL, of);
        }
    }

    /// The buffer is back: is it what went?
    fn returned(&mut self) {
        let [_, comes] = self.slots();
        self.held[comes as usize] = self.round;
        if self.verify(comes, self.round, "what came back") {
            add(&self.report.verified, 1);
        }
        let (expected, found) = (!(self.round as u32), self.read(register::LIVENESS));
        if found != expected {
            self.wrong(0, expected.into(), found.into(), "it has forgotten the word of its liveness register");
        }
        let set = 1 << 1 | 1 << 2;
        let found = self.function.read(4) & COMMAND_BITS;
        if found & !(1 << 10) != set || self.kind == EduInterrupt::Intx && found != set {
            self.wrong(0, set.into(), found.into(), "its command register is not as it was set");
        }
        if self.kind == EduInterrupt::Msi {
            let (address, found) = (msi_address(interrupt::local_apic_id()), self.function.read(self.messages + 4));
            if found != address || self.function.read(self.messages) >> 16 & 1 == 0 {
                self.wrong(0, address.into(), found.into(), "its MSI is not as it was set");
            }
        }
    }

    fn recheck(&mut self, slot: u64) {
        let held = self.held[slot as usize];
        if held != 0 && self.verify(slot, held, "a held buffer") {
            add(&self.report.rechecked, 1);
        }
    }

    fn verify(&mut self, slot: u64, round: u64, what: &str) -> bool {
        for word in 0..self.bytes / 8 {
            let at = self.word(slot, word);
            // SAFETY: of the pool; the device does not write there now, and if it does, that is what is looked for.
            let found = unsafe { at.read_volatile() };
            let expected = buffer_word(self.seed, round, word as usize);
            if found != expected {
                self.report_first(round, at as u64, expected, found);
                self.fails(format_args!(
                    "{what} of round {round} at {:#x}: expected {expected:#018x} found {found:#018x}",
                    at as u64
                ));
                return false;
            }
        }
        true
    }

    #[cold]
    fn wrong(&mut self, at: u64, expected: u64, found: u64, what: &str) {
        self.report_first(self.round, at, expected, found);
        self.fails(format_args!("round {}: {what}: expected {expected:#x} found {found:#x}", self.round));
    }

    #[cold]
    fn report_first(&mut self, round: u64, at: u64, expected: u64, found: u64) {
        add(&self.report.errors, 1);
        if self.report.errors.load(Relaxed) == 1 {
            self.report.first_sequence.store(round, Relaxed);
            self.report.first_at.store(at, Relaxed);
            self.report.first_expected.store(expected, Relaxed);
            self.report.first_found.store(found, Relaxed);
        }
    }

    #[cold]
    fn fails(&self, what: core::fmt::Arguments<'_>) {
        // Printing is slow.
        if self.errors() <= 8 {
            fault::report(0, FailureKind::Edu, format_args!("educational device: {what}"));
        }
    }

    /// Has it do no DMA and interrupt no more.
    fn stop(&mut self) {
        self.function.write(4, self.function.read(4) & 0xffff & !(1 << 2) | 1 << 10);
        self.stopped = true;
    }

    /// Lets the device end its round, and verifies all that is held once more. To be called until it is false; between the calls `tick`.
    pub fn finish(&mut self, now: u64) -> bool {
        self.ending = true;
        if !self.stopped {
            self.work(now);
            if self.step == Step::Ready && !self.stopped {
                self.stop();
            }
            return true;
        }
        if self.end < SLOTS {
            self.recheck(self.end);
            self.end += 1;
            return true;
        }
        false
    }

    /// Errors of all kinds.
    pub fn errors(&self) -> u64 {
        let report = self.report;
        let all = [&report.errors, &report.lost, &report.stalled].map(|counter| counter.load(Relaxed));
        all.iter().sum::<u64>() + u64::from(report.gone.load(Relaxed))
    }
}
