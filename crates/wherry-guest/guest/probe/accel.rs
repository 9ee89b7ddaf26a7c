//! The load of the accelerator (docs/accel-abi.md): a driver for `wherry device accel`, every result verified and every job counted. It is
//! vCPU 0's.
//!
//! Two contexts, the second a clone of the first, have a slot for each class: a virtual engine that balances over all engines of that
//! class, with a ring and a vector of its own. A job ([`job`]) is one submission, or two that follow each other; each is a batch of the
//! operation and of one that adds 1 to the job's counter. **Stop and wait**: one job at a time, the rings in turn, and the vCPU halts in
//! between. **Full depth**: every ring has `accel_depth=` of them under way.
//!
//! A job's place keeps what came of it until its turn comes again: then it is verified once more, and so is its counter. So a page that was
//! lost on a move, or written late, is found, and so is a job that was done twice.
//!
//! Memory is looked at after the ring's interrupt alone. One that does not come within ten looks, 100 ms apart, is lost: so a jump of
//! the clock, as a move can make it, is none.

mod job;

use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use core::sync::atomic::{AtomicU32, AtomicU64, fence};

use wherry_guest_kernel::accel::{
    BELLS, CLASSES, CONTEXTS, DESCRIPTOR_BYTES, DEVICE, MAGIC, MAX_ENGINES, MAX_RINGS, MSIX_BAR, REGISTERS_BAR, VENDOR,
    VERSION, command, register,
};
use wherry_guest_kernel::fault::{self, die, header};
use wherry_guest_kernel::memory::Allocator;
use wherry_guest_kernel::params::{AccelBell, AccelLoad, Params};
use wherry_guest_kernel::pci::Function;
use wherry_guest_kernel::report::{AccelReport, FailureKind};
use wherry_guest_kernel::{interrupt, mmio};

use crate::handed::Handed;
use job::{Job, Wrong};

const MSIX_CAPABILITY: u8 = 0x11;
/// The first of its vectors, one for each ring.
const VECTOR: u8 = interrupt::DEVICE_VECTORS.start + 0x50;
/// Looks until an interrupt is taken for lost, and how many of them there are in a second.
const LOOKS: u32 = 10;
/// Places for jobs, for each request that a ring may have under way.
const PLACES: u64 = 2;
/// How long the last jobs may take at the end, in seconds.
const LAST: u64 = 20;

/// In the shared page: the command, what its pointers lead to, and for each ring the tail and the word of a polled ring.
const ARGUMENT: u64 = 64;
const NODES: u64 = 512;
const NODE_BYTES: u64 = 512;
const TAILS: u64 = 0xe00;
const _: () = assert!(NODES + CLASSES as u64 * NODE_BYTES <= TAILS && 48 + 4 * MAX_ENGINES as u64 <= NODE_BYTES);
const SHARED_BYTES: u64 = 4096;

/// One ring.
#[derive(Clone, Copy)]
struct Ring {
    class: usize,
    /// Address of its registers.
    registers: u64,
    /// Address of its bell.
    bell: u64,
    /// Address of the tail in memory.
    tail_at: u64,
    descriptors: u64,
    /// Which place each request under way has, u32 for each entry.
    order: u64,
    /// Its places.
    places: u64,
    put: u32,
    taken: u32,
    /// Jobs begun, and those that ended.
    begun: u64,
    ended: u64,
    /// Interrupts seen.
    seen: u32,
    looks: u32,
    next_look: u64,
    /// Next place to verify at the end.
    checked: u64,
}

/// The load. Set up by the first vCPU before the data set is laid out.
pub struct Accel {
    registers: u64,
    report: &'static AccelReport,
    wait: bool,
    bell: AccelBell,
    depth: u32,
    bytes: u64,
    place_bytes: u64,
    seed: u64,
    key: Option<u32>,
    rings: [Ring; MAX_RINGS],
    used: usize,
    /// The ring whose turn it is.
    turn: usize,
    tsc_hz: u64,
    last: u64,
    /// When it is looked whether the device is there at all.
    next_check: u64,
    /// It is not.
    gone: bool,
    stopped: bool,
    /// When the last jobs must have ended.
    limit: Option<u64>,
}

fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(n), Relaxed);
}

fn word(at: u64) -> &'static AtomicU64 {
    // SAFETY: in RAM that was handed out to this driver, on a multiple of 8; the device accesses it, too, as bytes.
    unsafe { &*(at as *const AtomicU64) }
}

fn half(at: u64) -> &'static AtomicU32 {
    // SAFETY: as above, on a multiple of 4.
    unsafe { &*(at as *const AtomicU32) }
}

/// The load, until vCPU 0 works.
pub static HANDED: Handed<Accel> = Handed::new();

impl Accel {
    /// Finds the device and sets it up, or fails and halts. `None` if there is to be no such load.
    pub fn set_up(params: &Params, ram: &mut Allocator, tsc_hz: u64) -> Option<Self> {
        let wait = params.accel? == AccelLoad::Wait;
        let fail =
            |what: core::fmt::Arguments<'_>| -> ! { die(0, FailureKind::Accel, format_args!("accelerator: {what}")) };
        let Some(function) = Function::find(VENDOR, DEVICE).next() else {
            fail(format_args!("there is none on PCI bus 0"));
        };
        let Some(registers) = function.bar(REGISTERS_BAR) else {
            fail(format_args!("its registers lie where nothing is mapped"));
        };
        function.enable();
        let depth = if wait { 1 } else { params.accel_depth };
        let bytes = u64::from(params.accel_bytes);
        let mut take = |bytes: u64| match ram.take(bytes) {
            Some(region) => {
                // SAFETY: handed out to nobody else, mapped.
                unsafe { (region.start as *mut u8).write_bytes(0, (region.end - region.start) as usize) };
                region.start
            }
            None => fail(format_args!("there is no RAM for its jobs")),
        };
        let shared = take(SHARED_BYTES);
        let ring = Ring {
            class: 0,
            registers: 0,
            bell: 0,
            tail_at: 0,
            descriptors: 0,
            order: 0,
            places: 0,
            put: 0,
            taken: 0,
            begun: 0,
            ended: 0,
            seen: 0,
            looks: 0,
            next_look: 0,
            checked: 0,
        };
        let mut this = Self {
            registers,
            report: &header().accel,
            wait,
            bell: params.accel_bell,
            depth,
            bytes,
            place_bytes: job::place_bytes(bytes),
            seed: params.seed,
            key: params.accel_key,
            rings: [ring; MAX_RINGS],
            used: 0,
            turn: 0,
            tsc_hz,
            last: 0,
            next_check: 0,
            gone: false,
            stopped: false,
            limit: None,
        };
        if this.read(register::MAGIC) != MAGIC {
            fail(format_args!("its registers do not say what they are"));
        }
        let version = this.read(register::VERSION);
        if version >> 16 != VERSION >> 16 || version < VERSION {
            fail(format_args!("it has version {version:#x} of its ABI, and {VERSION:#x} is needed"));
        }
        if let Err(what) = this.connect(function) {
            fail(format_args!("{what}"));
        }
        let mut engines = [(0u16, 0u16); MAX_ENGINES];
        let count = (this.read(register::ENGINES) as usize).min(MAX_ENGINES);
        for (engine, at) in engines[..count].iter_mut().zip((register::ENGINE_TABLE..).step_by(16)) {
            let id = this.read(at);
            *engine = (id as u16, (id >> 16) as u16);
        }
        let mut source = 0;
        for _ in 0..CONTEXTS {
            let made = this.context(shared, &engines[..count], source);
            let context = made.unwrap_or_else(|error| fail(format_args!("making a context: error {error}")));
            source = context;
            for class in 0..CLASSES {
                if !engines[..count].iter().any(|engine| usize::from(engine.0) == class) {
                    continue;
                }
                let entries = u64::from(depth);
                let number = this.used as u64;
                let made = Ring {
                    class,
                    registers: registers
                        + register::CONTEXTS
                        + (u64::from(context & 0xffff) - 1) * register::CONTEXT_BYTES
                        + class as u64 * register::SLOT_BYTES,
                    bell: registers + register::BELLS + u64::from((context & 0xffff) % BELLS) * register::BELL_BYTES,
                    tail_at: shared + TAILS + 8 * number,
                    descriptors: take(entries * DESCRIPTOR_BYTES),
                    order: take(entries * 4),
                    places: take(PLACES * entries * this.place_bytes),
                    ..ring
                };
                this.start_ring(&made);
                this.rings[this.used] = made;
                this.used += 1;
            }
        }
        if this.used == 0 {
            fail(format_args!("it has no engines"));
        }
        let report = this.report;
        report.form.store(if wait { 2 } else { 1 }, Relaxed);
        report.bell.store(this.bell as u32, Relaxed);
        report.engines.store(count as u32, Relaxed);
        report.rings.store(this.used as u32, Relaxed);
        report.depth.store(depth, Relaxed);
        report.bytes.store(bytes as u32, Relaxed);
        report.shared_gpa.store(shared, Relaxed);
        report.places_gpa.store(this.rings[0].places, Relaxed);
        report.present.store(1, Relaxed);
        Some(this)
    }

    fn read(&self, offset: u64) -> u32 {
        // SAFETY: a register of the device.
        unsafe { mmio::read32(self.registers + offset) }
    }

    /// Does a command; its error number if it is refused.
    fn command(&self, shared: u64, number: u32, words: &[u32]) -> Result<(), u32> {
        word(shared).store(number.into(), SeqCst);
        for (at, value) in (shared + 8..shared + ARGUMENT).step_by(4).zip(words.iter().chain(core::iter::repeat(&0))) {
            half(at).store(*value, SeqCst);
        }
        // SAFETY: a register of the device; it writes to the command, which is the driver's.
        unsafe { mmio::write64(self.registers + register::COMMAND, shared) };
        match self.read(register::RESULT) {
            0 => Ok(()),
            error => Err(error),
        }
    }

    /// Makes a context with a virtual engine for each class; a clone of `source` if that is not 0.
    fn context(&self, shared: u64, engines: &[(u16, u16)], source: u32) -> Result<u32, u32> {
        let low = |at: u64| at as u32;
        let high = |at: u64| (at >> 32) as u32;
        let (argument, nodes) = (shared + ARGUMENT, shared + NODES);
        for at in (argument..shared + TAILS).step_by(8) {
            word(at).store(0, SeqCst);
        }
        if source != 0 {
            half(nodes + 8).store(command::CLONE, SeqCst);
            half(nodes + 32).store(source, SeqCst);
            half(nodes + 36).store(command::CLONE_ENGINES, SeqCst);
            self.command(shared, command::CREATE, &[0, 0, low(nodes), high(nodes)])?;
            return Ok(self.read(register::CREATED));
        }
        self.command(shared, command::CREATE, &[0, 0, 0, 0])?;
        let context = self.read(register::CREATED);
        // Gaps, and a node for each class that fills one of them with a virtual engine.
        let mut next = 0;
        for class in (0..CLASSES).rev() {
            half(argument + 8 + 4 * class as u64).store(u32::MAX, SeqCst);
            let node = nodes + class as u64 * NODE_BYTES;
            let mut siblings = 0;
            for engine in engines.iter().filter(|engine| usize::from(engine.0) == class) {
                half(node + 48 + 4 * siblings).store(u32::from(engine.0) | u32::from(engine.1) << 16, SeqCst);
                siblings += 1;
            }
            if siblings > 0 {
                word(node).store(next, SeqCst);
                half(node + 32).store(class as u32 | (siblings as u32) << 16, SeqCst);
                next = node;
            }
        }
        word(argument).store(next, SeqCst);
        let size = 8 + 4 * CLASSES as u32;
        let parameter = command::ENGINES;
        let words = [context, size, low(parameter), high(parameter), low(argument), high(argument)];
        self.command(shared, command::SET_PARAM, &words)?;
        Ok(context)
    }

    fn start_ring(&self, ring: &Ring) {
        // The client of a polled ring rings until it is told not to.
        word(ring.tail_at).store(1 << 32, SeqCst);
        // SAFETY: registers of the device; it reads the ring and the tail, which are the driver's, and writes behind the tail.
        unsafe {
            mmio::write64(ring.registers + register::BASE, ring.descriptors);
            mmio::write32(ring.registers + register::ENTRIES, self.depth);
            match self.bell {
                AccelBell::Register => {}
                AccelBell::Event => mmio::write64(ring.registers + register::TAIL_ADDRESS, ring.tail_at),
                AccelBell::Poll => mmio::write64(ring.registers + register::TAIL_ADDRESS, ring.tail_at | 1),
            }
        }
    }

    /// Has its interrupts reach this vCPU.
    fn connect(&self, function: Function) -> Result<(), &'static str> {
        let at = function.capabilities(MSIX_CAPABILITY).next().ok_or("it has no MSI-X")?;
        let base = function.bar(MSIX_BAR).ok_or("its MSI-X table lies where nothing is mapped")?;
        let table = base + u64::from(function.read(at + 4) & !7);
        for ring in 0..MAX_RINGS as u64 {
            let entry = table + 16 * ring;
            // SAFETY: an entry of its table; the vector has a stub.
            unsafe {
                mmio::write32(entry, 0xfee0_0000 | interrupt::local_apic_id() << 12);
                mmio::write32(entry + 4, 0);
                mmio::write32(entry + 8, u32::from(VECTOR) + ring as u32);
                mmio::write32(entry + 12, 0);
            }
        }
        function.write(at, function.read(at) & 0x3fff_ffff | 1 << 31);
        Ok(())
    }

    /// Begins. To be called when this vCPU can take interrupts and goes to work.
    pub fn begin(&mut self, now: u64) {
        self.last = now;
        self.next_check = now + self.tsc_hz;
        for ring in 0..self.used {
            self.rings[ring].seen = interrupt::count(0, VECTOR + ring as u8);
        }
        match self.wait {
            true => self.begin_job(0),
            false => {
                for ring in 0..self.used {
                    (0..self.depth).for_each(|_| self.begin_job(ring));
                }
            }
        }
    }

    /// Whether the vCPU is to halt while there is nothing to do.
    pub fn rests(&self) -> bool {
        self.wait
    }

    /// A job of a ring, by its number.
    fn job(&self, ring: usize, number: u64) -> Job {
        let (its, places) = (&self.rings[ring], PLACES * u64::from(self.depth));
        Job {
            at: its.places + number % places * self.place_bytes,
            bytes: self.bytes,
            seed: self.seed,
            ring: ring as u64,
            class: its.class,
            number,
            key: self.key,
        }
    }

    /// Begins the next job of a ring, if the place that it gets still holds what came of the one before.
    fn begin_job(&mut self, ring: usize) {
        let number = self.rings[ring].begun;
        let job = self.job(ring, number);
        self.recheck(ring, job.at);
        job.prepare();
        self.rings[ring].begun += 1;
        self.submit(ring, &job, 1);
    }

    fn submit(&mut self, ring: usize, job: &Job, step: u64) {
        let its = &self.rings[ring];
        let entry = u64::from(its.put % self.depth);
        job.write_step(its.descriptors + entry * DESCRIPTOR_BYTES, step, ring as u16);
        half(its.order + 4 * entry).store(job.number as u32, Relaxed);
        let tail = its.put.wrapping_add(1);
        self.rings[ring].put = tail;
        add(&self.report.submitted, 1);
        self.tell(ring, tail);
    }

    /// Tells the device of a new tail.
    fn tell(&self, ring: usize, tail: u32) {
        let its = &self.rings[ring];
        half(its.tail_at).store(tail, SeqCst);
        fence(SeqCst);
        let (at, value) = match self.bell {
            AccelBell::Register => (its.registers + register::TAIL, tail),
            AccelBell::Poll if half(its.tail_at + 4).load(SeqCst) == 0 => return,
            AccelBell::Event | AccelBell::Poll => (its.bell, 1),
        };
        add(&self.report.rung, 1);
        // SAFETY: a register of the device, which reads the descriptors that are put in and does what they say.
        unsafe { mmio::write32(at, value) };
    }

    /// Does one thing that there is to do. False if there is nothing.
    pub fn work(&mut self, now: u64) -> bool {
        if self.gone || self.stopped && self.under_way() == 0 {
            return false;
        }
        if now >= self.next_check {
            self.next_check = now + self.tsc_hz;
            // One whose process has died reads as ones.
            if self.read(register::MAGIC) != MAGIC {
                self.gone = true;
                add(&self.report.errors, 1);
                self.fails(format_args!("it has gone, with {} submissions under way", self.under_way()));
                return true;
            }
        }
        for _ in 0..self.used {
            let ring = self.turn;
            let count = interrupt::count(0, VECTOR + ring as u8);
            if count != self.rings[ring].seen {
                // In turn, so that none waits for ever; a ring that has more is found again.
                if !self.wait {
                    self.turn = (ring + 1) % self.used;
                }
                add(&self.report.interrupts, 1);
                match self.next_done(ring) {
                    true => self.ended(ring, now),
                    // Those before have taken it along.
                    false => self.rings[ring].seen = count,
                }
                return true;
            }
            if self.look(ring, now) {
                return true;
            }
            if self.wait {
                return false;
            }
            self.turn = (ring + 1) % self.used;
        }
        false
    }

    /// The job whose submission is next to end.
    fn next(&self, ring: usize) -> Option<Job> {
        let its = &self.rings[ring];
        let entry = u64::from(its.taken % self.depth);
        (its.taken != its.put).then(|| {
            // Numbers of jobs under way differ in their lower half, and are near the latest.
            let low = half(its.order + 4 * entry).load(Relaxed);
            let behind = (its.begun as u32).wrapping_sub(low);
            self.job(ring, its.begun - u64::from(behind))
        })
    }

    fn next_done(&self, ring: usize) -> bool {
        self.next(ring).is_some_and(|job| job.is_done())
    }

    fn under_way(&self) -> u32 {
        self.rings[..self.used].iter().map(|ring| ring.put.wrapping_sub(ring.taken)).sum()
    }

    /// A submission has ended: the next one of the job, or the next job.
    fn ended(&mut self, ring: usize, now: u64) {
        let Some(job) = self.next(ring) else { return };
        let ns = (u128::from(now.saturating_sub(self.last)) * 1_000_000_000 / u128::from(self.tsc_hz)) as u64;
        if ns > self.report.longest_ns.load(Relaxed) {
            self.report.longest_ns.store(ns, Relaxed);
        }
        self.last = now;
        let its = &mut self.rings[ring];
        (its.looks, its.taken) = (0, its.taken.wrapping_add(1));
        add(&self.report.returned, 1);
        let step = job.step();
        match job.check_step(step) {
            Ok(()) if step < job.steps() => return self.submit(ring, &job, step + 1),
            Ok(()) => match job.verify() {
                Ok(()) => {
                    job.hold();
                    add(&self.report.verified, 1);
                    add(&self.report.by_class[job.class], 1);
                }
                Err(wrong) => self.wrong(&job, wrong, "is wrong"),
            },
            Err(wrong) => self.wrong(&job, wrong, "has ended wrong"),
        }
        self.rings[ring].ended += 1;
        add(&self.report.jobs, 1);
        if self.stopped {
            return;
        }
        if self.wait {
            self.turn = (ring + 1) % self.used;
        }
        self.begin_job(self.turn_of(ring));
    }

    fn turn_of(&self, ring: usize) -> usize {
        if self.wait { self.turn } else { ring }
    }

    /// No interrupt has come. Whether one should have: true if it is given up.
    fn look(&mut self, ring: usize, now: u64) -> bool {
        let due = self.next_done(ring);
        let second = self.tsc_hz;
        let its = &mut self.rings[ring];
        if !due {
            its.looks = 0;
            return false;
        }
        if its.looks == 0 || now >= its.next_look {
            its.looks += 1;
            its.next_look = now + second / u64::from(LOOKS);
        }
        if its.looks <= LOOKS {
            return false;
        }
        its.looks = 0;
        // So that all is not over.
        its.seen = its.seen.wrapping_sub(1);
        let number = its.ended;
        add(&self.report.lost, 1);
        self.fails(format_args!(
            "an interrupt was lost: job {number} of ring {ring} has ended, and none came for a second"
        ));
        true
    }

    /// Verifies what a place holds once more, if it holds something.
    fn recheck(&mut self, ring: usize, at: u64) {
        let Some(number) = Job::held(at) else { return };
        let job = self.job(ring, number);
        match job.verify() {
            Ok(()) => add(&self.report.rechecked, 1),
            Err(wrong) => self.wrong(&job, wrong, "was right, and no longer is"),
        }
    }

    #[cold]
    fn wrong(&mut self, job: &Job, wrong: Wrong, how: &str) {
        let Wrong { what, at, expected, found } = wrong;
        let report = self.report;
        if what == job::COUNTER {
            add(&report.miscounted, 1);
        }
        add(&report.errors, 1);
        if report.errors.load(Relaxed) == 1 {
            report.first_ring.store(job.ring, Relaxed);
            report.first_job.store(job.number, Relaxed);
            report.first_at.store(at, Relaxed);
            report.first_expected.store(expected, Relaxed);
            report.first_found.store(found, Relaxed);
        }
        let (ring, number, kind) = (job.ring, job.number, job.operation());
        self.fails(format_args!(
            "job {number} of ring {ring} (operation {kind:#x}) {how}: {what} at {at:#x}: expected {expected:#x} found {found:#x}"
        ));
    }

    #[cold]
    fn fails(&self, what: core::fmt::Arguments<'_>) {
        // Printing is slow.
        if self.errors() <= 8 {
            fault::report(0, FailureKind::Accel, format_args!("accelerator: {what}"));
        }
    }

    /// Begins nothing any more, takes what comes back, and verifies all that is held once more. To be called until it is false; between
    /// the calls `tick`.
    pub fn finish(&mut self, now: u64) -> bool {
        self.stopped = true;
        let limit = *self.limit.get_or_insert(now + LAST * self.tsc_hz);
        if self.under_way() > 0 && now < limit && !self.gone {
            self.work(now);
            return true;
        }
        if self.under_way() > 0 && limit != 0 && !self.gone {
            add(&self.report.errors, 1);
            self.fails(format_args!("{} submissions have not come back within {LAST} s", self.under_way()));
            self.limit = Some(0);
            return true;
        }
        let places = PLACES * u64::from(self.depth);
        let Some(ring) = (0..self.used).find(|ring| self.rings[*ring].checked < places) else { return false };
        let at = self.rings[ring].places + self.rings[ring].checked * self.place_bytes;
        self.rings[ring].checked += 1;
        self.recheck(ring, at);
        true
    }

    /// Errors of all kinds.
    pub fn errors(&self) -> u64 {
        self.report.errors.load(Relaxed) + self.report.lost.load(Relaxed)
    }
}
