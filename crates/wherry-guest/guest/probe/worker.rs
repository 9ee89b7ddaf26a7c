//! The work of one vCPU on its slice of the data set: fill it once, then dirty and verify it page by page, with a
//! heartbeat between any two pages and through all idle time.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU32, AtomicU64, compiler_fence};

use wherry_guest_kernel::data::{self, Entry, Generation, PAGE_WORDS};
use wherry_guest_kernel::fault::{self, control, cpu_page, header, set_phase};
use wherry_guest_kernel::params::{Idle, InjectedFault, Pattern, Write};
use wherry_guest_kernel::ram::Region;
use wherry_guest_kernel::report::{
    CpuPage, FailureKind, MAX_ERRORS, MismatchKind, PAGE_SIZE, Phase, RATE_MAX, TOUCH_FLOOR_NS, gap_bucket,
    touch_bucket,
};
use wherry_guest_kernel::{gate, interrupt, port, serial, time};

use crate::accel::{self, Accel};
use crate::canary::{self, Canary, Lost};
use crate::disk::{self, Disk};
use crate::edu::{self, Edu};
use crate::net::{self, Net};
use crate::setup::Setup;
use crate::testdma::{self, Testdma};

type Page = [u64; PAGE_WORDS];

/// vCPUs that have finished.
static FINISHED: AtomicU32 = AtomicU32::new(0);

/// The state of one vCPU's work.
pub struct Worker {
    cpu: usize,
    setup: &'static Setup,
    out: &'static CpuPage,
    /// Nanoseconds per TSC tick, times 2^32.
    ns_mult: u64,
    last_tsc: u64,
    /// TSC ticks of [`TOUCH_FLOOR_NS`].
    touch_floor: u64,
    /// First page of the slice, and how many.
    start: u64,
    pages: u64,
    random: u64,
    /// Next page to verify, relative to the slice.
    cursor: u64,
    /// Sum of the generation words of the pages that the cursor has passed.
    passed_sum: u64,
    /// Sum of the generation words of all pages of the slice.
    total_sum: u64,
    /// Next page to dirty in sequence, relative to the slice.
    sequence: u64,
    load: Load,
    /// TSC at which the run time is over.
    deadline: Option<u64>,
    timer_ticks: u32,
    /// Of the local APIC's timer in a second, where something rests.
    timer_hz: u64,
    canary: Canary,
    /// TSC at which the canary is looked at even though there is no idle time.
    next_canary: u64,
    /// vCPU 0's, if there is one.
    disk: Option<Disk>,
    /// vCPU 0's, if there is one.
    net: Option<Net>,
    /// vCPU 0's, if there is one.
    testdma: Option<Testdma>,
    /// vCPU 0's, if there is one.
    accel: Option<Accel>,
    /// vCPU 0's, if there is one.
    edu: Option<Edu>,
}

/// The load in force, from the control words.
struct Load {
    control_seen: u64,
    /// TSC ticks between two dirtied pages; 0: no pause, `u64::MAX`: never.
    dirty_interval: u64,
    next_dirty: u64,
    verify_permille: u64,
    next_verify: u64,
    pattern: Pattern,
    hot_pages: u64,
    write: Write,
}

/// Adds to a counter that only this vCPU writes.
#[inline(always)]
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(n), Relaxed);
}

/// Address of page `index` in a set of extents.
#[inline(always)]
fn page_address(extents: &[Region], mut index: u64) -> u64 {
    for extent in extents {
        let pages = (extent.end - extent.start) / PAGE_SIZE;
        if index < pages {
            return extent.start + index * PAGE_SIZE;
        }
        index -= pages;
    }
    unreachable!("page index beyond the data set")
}

impl Worker {
    /// Prepares the slice of vCPU `cpu`.
    pub fn new(cpu: usize, setup: &'static Setup) -> Self {
        let out = cpu_page(cpu);
        let share = |n: usize| (u128::from(setup.data_pages) * n as u128 / setup.cpus as u128) as u64;
        let (start, end) = (share(cpu), share(cpu + 1));
        out.slice_start.store(start, Relaxed);
        out.slice_pages.store(end - start, Relaxed);
        let mut worker = Self {
            cpu,
            setup,
            out,
            ns_mult: ((1_000_000_000u128 << 32) / u128::from(setup.tsc_hz)) as u64,
            last_tsc: time::tsc(),
            touch_floor: (u128::from(setup.tsc_hz) * u128::from(TOUCH_FLOOR_NS) / 1_000_000_000) as u64,
            start,
            pages: end - start,
            random: (setup.params.seed ^ (cpu as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1,
            cursor: 0,
            passed_sum: 0,
            total_sum: 0,
            sequence: 0,
            load: Load {
                control_seen: 0,
                dirty_interval: u64::MAX,
                next_dirty: 0,
                verify_permille: 0,
                next_verify: 0,
                pattern: Pattern::Uniform,
                hot_pages: 1,
                write: Write::Page,
            },
            deadline: None,
            timer_ticks: 0,
            timer_hz: 0,
            canary: Canary::set(cpu),
            next_canary: 0,
            disk: if cpu == 0 { disk::HANDED.take() } else { None },
            net: if cpu == 0 { net::HANDED.take() } else { None },
            testdma: if cpu == 0 { testdma::HANDED.take() } else { None },
            accel: if cpu == 0 { accel::HANDED.take() } else { None },
            edu: if cpu == 0 { edu::HANDED.take() } else { None },
        };
        if setup.params.idle == Idle::Halt || worker.rests() {
            worker.timer_hz = interrupt::measure_timer(setup.tsc_hz);
            worker.timer_ticks = (worker.timer_hz / 10_000).min(u32::MAX.into()) as u32;
            interrupt::enable_timer();
        }
        worker
    }

    /// Fills, then works until told to finish.
    pub fn run(mut self) -> ! {
        set_phase(self.cpu, Phase::Filling);
        let begin = time::tsc();
        for i in 0..self.pages {
            self.fill(i);
            self.tick();
        }
        let ms = (u128::from(time::tsc() - begin) * 1000 / u128::from(self.setup.tsc_hz)) as u64;
        serial::line(format_args!("vCPU {} filled {} MiB in {ms} ms", self.cpu, (self.pages * PAGE_SIZE) >> 20));
        self.inject_fault();
        self.reset_gaps();
        set_phase(self.cpu, Phase::Running);
        self.obey();
        let ticks = |ms| (u128::from(ms) * u128::from(self.setup.tsc_hz) / 1000) as u64;
        self.deadline = self.setup.params.run_ms.map(|ms: u64| time::tsc().saturating_add(ticks(ms)));
        let mut verified_last = false;
        if let Some(testdma) = &mut self.testdma {
            testdma.begin(time::tsc());
        }
        if let Some(accel) = &mut self.accel {
            accel.begin(time::tsc());
        }
        loop {
            let interrupts = interrupt::total(self.cpu);
            let now = self.tick();
            let control = control();
            if control.sequence.load(Relaxed) != self.load.control_seen {
                self.obey();
            }
            if control.reset_gaps.load(Relaxed) != self.out.reset_seen.load(Relaxed) {
                self.reset_gaps();
            }
            if control.finish.load(Relaxed) != 0 || self.deadline.is_some_and(|deadline| now >= deadline) {
                self.finish();
            }
            let mut busy = self.disk.as_mut().is_some_and(|disk| disk.work(now));
            busy |= self.net.as_mut().is_some_and(|net| net.work(now));
            busy |= self.testdma.as_mut().is_some_and(|testdma| testdma.work(now));
            busy |= self.accel.as_mut().is_some_and(|accel| accel.work(now));
            busy |= self.edu.as_mut().is_some_and(|edu| edu.work(now));
            let dirty_due = now >= self.load.next_dirty && self.load.dirty_interval != u64::MAX;
            let verify_due = now >= self.load.next_verify && self.load.verify_permille != 0;
            if now >= self.next_canary {
                self.check_registers(now);
            } else if self.pages != 0 && dirty_due && (verified_last || !verify_due) {
                self.dirty(now);
                verified_last = false;
            } else if self.pages != 0 && verify_due {
                self.verify();
                // The rest of the time must come to (1 - share) / share of what this took.
                let after = time::tsc();
                let share = self.load.verify_permille;
                self.load.next_verify = after + after.wrapping_sub(now) * (1000 - share) / share;
                verified_last = true;
            } else if !busy && self.rests() {
                self.rest(now, interrupts);
            } else if self.setup.params.idle == Idle::Halt && !busy {
                interrupt::sleep(self.timer_ticks);
                let taken = interrupt::count(self.cpu, interrupt::TIMER_VECTOR);
                self.out.timer_interrupts.store(taken.into(), Relaxed);
            } else {
                self.check_registers(now);
            }
        }
    }

    /// Whether it halts while a device has nothing for it.
    fn rests(&self) -> bool {
        self.testdma.as_ref().is_some_and(Testdma::rests)
            || self.accel.as_ref().is_some_and(Accel::rests)
            || self.edu.is_some()
    }

    /// Halts until an interrupt, or until something is due: for a tenth of a second at most, so that control words are seen. Not
    /// if an interrupt has come since there were so many of them.
    fn rest(&mut self, now: u64, interrupts: u32) {
        let mut next = self.testdma.as_ref().map_or(u64::MAX, Testdma::next_turn).min(now + self.setup.tsc_hz / 10);
        next = next.min(self.net.as_ref().map_or(u64::MAX, Net::next_turn));
        if self.pages != 0 && self.load.verify_permille != 0 {
            next = next.min(self.load.next_verify);
        }
        if self.pages != 0 {
            next = next.min(self.load.next_dirty);
        }
        let wait = u128::from(next.saturating_sub(now)) * u128::from(self.timer_hz) / u128::from(self.setup.tsc_hz);
        interrupt::rest(wait.min(u32::MAX.into()) as u32, interrupts);
        let taken = interrupt::count(self.cpu, interrupt::TIMER_VECTOR);
        self.out.timer_interrupts.store(taken.into(), Relaxed);
    }

    /// Spins for a moment with known values in the registers.
    fn check_registers(&mut self, now: u64) {
        self.next_canary = now + self.setup.tsc_hz / 1000;
        add(&self.out.register_checks, 1);
        if let Err(lost) = self.canary.spin() {
            self.registers_lost(lost);
        }
    }

    #[cold]
    fn registers_lost(&mut self, lost: Lost) {
        add(&self.out.register_errors, 1);
        // Printing is slow.
        if self.out.register_errors.load(Relaxed) <= MAX_ERRORS as u64 {
            fault::report(self.cpu, FailureKind::Registers, format_args!("{lost}"));
        }
    }

    /// One heartbeat. Returns the TSC.
    #[inline(always)]
    fn tick(&mut self) -> u64 {
        // Guest RAM changes hands behind the compiler's back during a migration.
        compiler_fence(core::sync::atomic::Ordering::SeqCst);
        let now = time::tsc();
        let out = self.out;
        add(&out.heartbeat, 1);
        out.heartbeat_tsc.store(now, Relaxed);
        if now < self.last_tsc {
            add(&out.tsc_backwards, 1);
            let step = self.last_tsc - now;
            if step > out.tsc_backwards_max.load(Relaxed) {
                out.tsc_backwards_max.store(step, Relaxed);
            }
            // Whatever was planned in the old count is due now or moves along.
            self.load.next_dirty = self.load.next_dirty.min(now);
            self.load.next_verify = self.load.next_verify.min(now);
            self.next_canary = self.next_canary.min(now);
            self.deadline = self.deadline.map(|deadline| deadline.saturating_sub(step));
        } else {
            let gap = now - self.last_tsc;
            let ns = ((u128::from(gap) * u128::from(self.ns_mult)) >> 32) as u64;
            add(&out.gaps[gap_bucket(ns)], 1);
            add(&out.gap_count, 1);
            add(&out.gap_sum_ns, ns);
            if ns > out.gap_max_ns.load(Relaxed) {
                out.gap_max_ns.store(ns, Relaxed);
                out.gap_max_tsc.store(now, Relaxed);
            }
        }
        self.last_tsc = now;
        now
    }

    /// Touches the table entry and the page `i`, of which neither may be there yet, and times each. What takes less than a
    /// microsecond is only counted: that is all that the work is slowed down by.
    #[inline(always)]
    fn touch(&self, i: u64) {
        let begin = time::tsc();
        // SAFETY: inside the table, see `entry`.
        unsafe { self.entry_pointer(i).cast::<u64>().read_volatile() };
        let middle = time::tsc();
        // SAFETY: inside the data set, see `page`.
        unsafe { core::ptr::from_mut(self.page(i)).cast::<u64>().read_volatile() };
        let end = time::tsc();
        add(&self.out.touch_count, 2);
        // A TSC that went backwards is told of by the heartbeat.
        for ticks in [middle.saturating_sub(begin), end.saturating_sub(middle)] {
            if ticks >= self.touch_floor {
                self.slow_touch(ticks);
            }
        }
    }

    #[cold]
    fn slow_touch(&self, ticks: u64) {
        let ns = ((u128::from(ticks) * u128::from(self.ns_mult)) >> 32) as u64;
        add(&self.out.touches[touch_bucket(ns)], 1);
        if ns > self.out.touch_max_ns.load(Relaxed) {
            self.out.touch_max_ns.store(ns, Relaxed);
        }
    }

    fn reset_gaps(&mut self) {
        let out = self.out;
        out.gap_count.store(0, Relaxed);
        out.gap_max_ns.store(0, Relaxed);
        out.gap_max_tsc.store(0, Relaxed);
        out.gap_sum_ns.store(0, Relaxed);
        out.touch_count.store(0, Relaxed);
        out.touch_max_ns.store(0, Relaxed);
        for bucket in out.gaps.iter().chain(&out.touches) {
            bucket.store(0, Relaxed);
        }
        out.reset_seen.store(control().reset_gaps.load(Acquire), Release);
        self.last_tsc = time::tsc();
    }

    /// Takes the control words.
    fn obey(&mut self) {
        let control = control();
        let seen = control.sequence.load(Acquire);
        let now = time::tsc();
        let rate = control.rate.load(Relaxed);
        let interval = match rate {
            _ if control.stop.load(Relaxed) != 0 => u64::MAX,
            0 => u64::MAX,
            RATE_MAX => 0,
            _ => {
                let ticks = u128::from(self.setup.tsc_hz) * u128::from(PAGE_SIZE) * self.setup.cpus as u128;
                u64::try_from(ticks / u128::from(rate)).unwrap_or(u64::MAX)
            }
        };
        self.load = Load {
            control_seen: seen,
            dirty_interval: interval,
            next_dirty: now.saturating_add(interval),
            verify_permille: u64::from(control.verify_permille.load(Relaxed).min(1000)),
            next_verify: now,
            pattern: Pattern::from_u32(control.pattern.load(Relaxed)),
            hot_pages: (self.pages * u64::from(control.hot_permille.load(Relaxed).min(1000)) / 1000).max(1),
            write: if control.write.load(Relaxed) == Write::Line as u32 { Write::Line } else { Write::Page },
        };
        self.out.control_seen.store(seen, Release);
    }

    /// The page `i` of the slice.
    #[inline(always)]
    fn page(&self, i: u64) -> &'static mut Page {
        // SAFETY: part of the data set, mapped, and owned by this vCPU; one reference at a time is used.
        unsafe { &mut *(page_address(&self.setup.extents, self.start + i) as *mut Page) }
    }

    /// The full shadow copy of page `i`, if there is one.
    #[inline(always)]
    fn copy(&self, i: u64) -> Option<&'static mut Page> {
        if self.setup.shadow[0].start == 0 {
            return None;
        }
        // SAFETY: as for `page`.
        Some(unsafe { &mut *(page_address(&self.setup.shadow, self.start + i) as *mut Page) })
    }

    #[inline(always)]
    fn entry_pointer(&self, i: u64) -> *mut Entry {
        (self.setup.table + (self.start + i) * data::ENTRY_BYTES) as *mut Entry
    }

    #[inline(always)]
    fn entry(&self, i: u64) -> Entry {
        // SAFETY: inside the table, which has an entry for each page; only this vCPU uses this one.
        unsafe { self.entry_pointer(i).read_volatile() }
    }

    /// Stores an entry and keeps the sums of generations.
    #[inline(always)]
    fn set_entry(&mut self, i: u64, old: u64, entry: Entry) {
        // SAFETY: as for `entry`.
        unsafe { self.entry_pointer(i).write_volatile(entry) };
        let growth = entry.generation.wrapping_sub(old);
        self.total_sum = self.total_sum.wrapping_add(growth);
        if i < self.cursor {
            self.passed_sum = self.passed_sum.wrapping_add(growth);
        }
        self.out.generation_sum.store(self.total_sum, Relaxed);
    }

    fn fill(&mut self, i: u64) {
        let entry = data::rewrite(self.page(i), self.setup.params.seed, self.start + i, 1);
        if let Some(copy) = self.copy(i) {
            copy.copy_from_slice(self.page(i));
        }
        self.set_entry(i, 0, entry);
        add(&self.out.pages_filled, 1);
    }

    #[inline(always)]
    fn random_below(&mut self, n: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let value = self.random.wrapping_mul(0x2545_f491_4f6c_dd1d);
        ((u128::from(value) * u128::from(n)) >> 64) as u64
    }

    /// Dirties one page.
    fn dirty(&mut self, now: u64) {
        // After a pause, at most 10 ms of missed work is made up for.
        let oldest = now.saturating_sub(self.setup.tsc_hz / 100);
        self.load.next_dirty = self.load.next_dirty.max(oldest).saturating_add(self.load.dirty_interval);
        let i = match self.load.pattern {
            Pattern::Hot => {
                let n = if self.random_below(10) != 0 { self.load.hot_pages } else { self.pages };
                self.random_below(n)
            }
            Pattern::Uniform => self.random_below(self.pages),
            Pattern::Sequential => {
                self.sequence = (self.sequence + 1) % self.pages;
                self.sequence
            }
        };
        self.touch(i);
        let old = self.entry(i);
        if self.setup.params.precheck {
            add(&self.out.pages_prechecked, 1);
            if data::page_checksum(self.page(i)) != old.checksum {
                // Recorded, and rewritten: that is this round's write.
                self.mismatch(i, old);
                return;
            }
            self.tick();
        }
        self.write(i, old, self.load.write);
        add(&self.out.pages_dirtied, 1);
    }

    fn write(&mut self, i: u64, old: Entry, how: Write) {
        let (seed, index) = (self.setup.params.seed, self.start + i);
        let rewrites = Generation::from_word(old.generation).rewrites.wrapping_add(1);
        let page = self.page(i);
        let entry = match how {
            Write::Page => data::rewrite(page, seed, index, rewrites),
            Write::Line => data::touch(page, seed, index, old),
        };
        if let Some(copy) = self.copy(i) {
            match how {
                Write::Page => data::rewrite(copy, seed, index, rewrites),
                Write::Line => data::touch(copy, seed, index, old),
            };
        }
        self.set_entry(i, old.generation, entry);
    }

    /// Verifies the page under the cursor and moves on.
    fn verify(&mut self) {
        let i = self.cursor;
        self.touch(i);
        let entry = self.entry(i);
        let wrong = data::page_checksum(self.page(i)) != entry.checksum
            || self.copy(i).is_some_and(|copy| *copy != *self.page(i));
        self.cursor += 1;
        self.passed_sum = self.passed_sum.wrapping_add(entry.generation);
        if wrong {
            self.mismatch(i, entry);
        }
        add(&self.out.pages_verified, 1);
        if self.cursor == self.pages {
            if self.passed_sum != self.total_sum {
                self.ledger_mismatch();
            }
            self.cursor = 0;
            self.passed_sum = 0;
            add(&self.out.verify_passes, 1);
        }
    }

    /// Records what is wrong with a page, then gives it new content, so that it counts once.
    #[cold]
    fn mismatch(&mut self, i: u64, entry: Entry) {
        let (seed, index) = (self.setup.params.seed, self.start + i);
        let expected = Generation::from_word(entry.generation);
        let page = self.page(i);
        let mut gpa = page_address(&self.setup.extents, index);
        let actual = data::identify(page, seed, index, expected);
        let mut difference = data::first_difference(page, seed, index, expected);
        let mut kind = match (difference, actual) {
            (None, _) => MismatchKind::Table,
            (_, Some(actual)) if actual > expected => MismatchKind::Table,
            (_, Some(_)) => MismatchKind::Stale,
            _ if page.iter().all(|&word| word == 0) => MismatchKind::Zero,
            _ => MismatchKind::Corrupt,
        };
        if difference.is_none()
            && let Some(copy) = self.copy(i)
            && let Some(in_copy) = data::first_difference(copy, seed, index, expected)
        {
            kind = MismatchKind::Shadow;
            gpa = page_address(&self.setup.shadow, index);
            difference = Some(in_copy);
        }
        let (at, expected_word, found_word) = match difference {
            Some(d) => (gpa + 8 * d.word as u64 + first_wrong_byte(d.expected, d.found), d.expected, d.found),
            None => (self.entry_pointer(i) as u64 + 8, data::page_checksum(page), entry.checksum),
        };
        self.record(kind, at, index, (expected_word, found_word), (expected, actual));
        self.write(i, entry, Write::Page);
    }

    #[cold]
    fn ledger_mismatch(&mut self) {
        let (counted, found) = (self.total_sum, self.passed_sum);
        let generation = (Generation::from_word(counted), Some(Generation::from_word(found)));
        self.record(MismatchKind::Ledger, self.entry_pointer(0) as u64, self.start, (counted, found), generation);
        self.total_sum = found;
    }

    #[cold]
    fn record(
        &mut self,
        kind: MismatchKind,
        gpa: u64,
        index: u64,
        (expected, found): (u64, u64),
        (expected_generation, found_generation): (Generation, Option<Generation>),
    ) {
        let out = self.out;
        add(&out.verify_errors, 1);
        let kept = out.errors_kept.load(Relaxed);
        if let Some(error) = out.errors.get(kept as usize) {
            error.cpu.store(self.cpu as u32, Relaxed);
            error.gpa.store(gpa, Relaxed);
            error.page.store(index, Relaxed);
            error.expected.store(expected, Relaxed);
            error.found.store(found, Relaxed);
            error.expected_generation.store(expected_generation.to_word(), Relaxed);
            error.found_generation.store(found_generation.map_or(0, Generation::to_word), Relaxed);
            error.kind.store(kind as u32, Relaxed);
            out.errors_kept.store(kept + 1, Release);
        }
        // Printing is slow: only those that are kept.
        if (kept as usize) < MAX_ERRORS {
            fault::report(
                self.cpu,
                FailureKind::Verify,
                format_args!(
                    "{kind:?} data page {index} at {gpa:#x}: expected {expected:#018x} found {found:#018x}, \
                     generation expected {expected_generation:?} found {found_generation:?}"
                ),
            );
        }
    }

    /// Verifies the slice once more, all of it, and ends.
    fn finish(&mut self) -> ! {
        // What is left of the present pass, then a whole one.
        let whole = self.cursor != 0;
        while self.pages != 0 && whole && self.cursor != 0 {
            self.verify();
            self.tick();
        }
        for _ in 0..self.pages {
            self.verify();
            self.tick();
        }
        loop {
            let now = self.tick();
            let disk = self.disk.as_mut().is_some_and(|disk| disk.finish(now));
            let net = self.net.as_mut().is_some_and(|net| net.finish(now));
            let accel = self.accel.as_mut().is_some_and(|accel| accel.finish(now));
            let edu = self.edu.as_mut().is_some_and(|edu| edu.finish(now));
            if !self.testdma.as_mut().is_some_and(Testdma::finish) && !disk && !net && !accel && !edu {
                break;
            }
        }
        add(&self.out.register_checks, 1);
        if let Err(lost) = self.canary.compare_msrs() {
            self.registers_lost(lost);
        }
        let disk_errors = self.disk.as_ref().map_or(0, Disk::errors);
        let net_errors = self.net.as_ref().map_or(0, Net::errors);
        let dma_errors = self.testdma.as_ref().map_or(0, Testdma::errors);
        let accel_errors = self.accel.as_ref().map_or(0, Accel::errors);
        let edu_errors = self.edu.as_ref().map_or(0, Edu::errors);
        let own_errors = self.out.verify_errors.load(Relaxed) + self.out.register_errors.load(Relaxed);
        let errors = own_errors + disk_errors + net_errors + dma_errors + accel_errors + edu_errors;
        serial::line(format_args!(
            "vCPU {} finished: {} pages dirtied, {} verified, {errors} errors, largest gap {} us",
            self.cpu,
            self.out.pages_dirtied.load(Relaxed),
            self.out.pages_verified.load(Relaxed),
            self.out.gap_max_ns.load(Relaxed) / 1000,
        ));
        if errors == 0 {
            set_phase(self.cpu, Phase::Finished);
        }
        if FINISHED.fetch_add(1, Relaxed) + 1 == self.setup.cpus as u32 {
            port::power_off(header().failure.load(Relaxed));
        }
        gate::halt()
    }

    /// `fault=`: a failure on request.
    fn inject_fault(&self) {
        match self.setup.params.fault {
            None => {}
            // SAFETY: meant to fault: nothing is mapped there, and HLT is not for ring 3.
            Some(InjectedFault::Page) => unsafe {
                core::arch::asm!("mov eax, [{}]", in(reg) 0x7f12_3456_7000u64, out("eax") _)
            },
            // SAFETY: as above.
            Some(InjectedFault::Gp) => unsafe { core::arch::asm!("hlt") },
            Some(InjectedFault::Registers) => canary::forget(),
            Some(InjectedFault::Panic) => panic!("asked for by fault=panic"),
        }
    }
}

/// Which of 8 bytes is the first that differs.
fn first_wrong_byte(expected: u64, found: u64) -> u64 {
    u64::from((expected ^ found).trailing_zeros() / 8)
}
