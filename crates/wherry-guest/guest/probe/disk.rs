//! The disk load of the probe: many requests in flight on a virtio block device, every byte and every completion checked.
//!
//! The disk is divided into blocks. A table in RAM has the generation that each block was last written with; a block is
//! written with the next one, or read and compared with it, and is part of at most one request. It is vCPU 0's.

use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use core::sync::atomic::{AtomicU64, compiler_fence};

use wherry_guest_kernel::disk::{BLOCK_BYTES, BLOCK_SECTORS, BLOCK_WORDS, block_word};
use wherry_guest_kernel::fault::{self, die, header};
use wherry_guest_kernel::memory::Allocator;
use wherry_guest_kernel::params::{DiskWait, Params};
use wherry_guest_kernel::report::{DiskReport, FailureKind, MAX_DISK_DEPTH};
use wherry_guest_kernel::virtio::{Device, EVENT_INDEX, Part, RING_BYTES, Ring, VERSION_1};
use wherry_guest_kernel::{interrupt, mmio};

use crate::handed::Handed;

const KIND: u16 = 2;
const FEATURE_FLUSH: u64 = 1 << 9;
const TYPE_READ: u32 = 0;
const TYPE_WRITE: u32 = 1;
const TYPE_FLUSH: u32 = 4;
/// One request in so many is a flush.
const FLUSH_EVERY: u64 = 256;
/// Descriptors of a request.
const PARTS: u16 = 3;

type Block = [u64; BLOCK_WORDS];

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Nothing,
    Read,
    /// With this generation.
    Write(u64),
    Flush,
}

#[derive(Clone, Copy)]
struct Slot {
    what: What,
    block: u64,
    begun: u64,
}

/// The load. Set up by the first vCPU before the data set is laid out.
pub struct Disk {
    ring: Ring,
    device: Device,
    report: &'static DiskReport,
    seed: u64,
    depth: u16,
    waits: DiskWait,
    /// Interrupts seen.
    interrupts: u32,
    blocks: u64,
    /// A generation for each block; the top bit: it is part of a request.
    table: u64,
    headers: u64,
    data: u64,
    slots: [Slot; MAX_DISK_DEPTH],
    in_flight: u16,
    random: u64,
    requests: u64,
    tsc_hz: u64,
    stopped: bool,
    /// Next block to verify at the end.
    last: u64,
}

const BUSY: u64 = 1 << 63;
const VECTOR: u8 = interrupt::DEVICE_VECTORS.start;

fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(n), Relaxed);
}

/// The load, until vCPU 0 works.
pub static HANDED: Handed<Disk> = Handed::new();

impl Disk {
    /// Finds the device and sets it up, or fails and halts. `None` if there is to be no disk load.
    pub fn set_up(params: &Params, ram: &mut Allocator, tsc_hz: u64) -> Option<Self> {
        let span = params.disk?;
        let fail = |what: &str| -> ! { die(0, FailureKind::Disk, format_args!("virtio disk: {what}")) };
        let mut device = Device::find(KIND, 0).unwrap_or_else(|what| fail(what));
        let wanted = VERSION_1 | EVENT_INDEX | FEATURE_FLUSH;
        device.begin(wanted).unwrap_or_else(|what| fail(what));
        // SAFETY: the capacity in the device's configuration.
        let sectors =
            unsafe { u64::from(mmio::read32(device.config)) | u64::from(mmio::read32(device.config + 4)) << 32 };
        let blocks = (sectors / BLOCK_SECTORS).min(span / BLOCK_BYTES);
        let depth = params.disk_depth;
        if blocks < 2 * u64::from(depth) {
            fail("it has fewer than two blocks for each request in flight");
        }
        let mut take = |bytes: u64| match ram.take(bytes) {
            Some(region) => {
                // SAFETY: handed out to nobody else, mapped.
                unsafe { (region.start as *mut u8).write_bytes(0, (region.end - region.start) as usize) };
                region.start
            }
            None => fail("there is no RAM for its buffers"),
        };
        let (rings, headers) = (take(RING_BYTES), take(4096));
        let data = take(u64::from(depth) * BLOCK_BYTES);
        let table = take(blocks * 8);
        let interrupts = params.disk_wait == DiskWait::Interrupt;
        if interrupts {
            device.interrupt(VECTOR, interrupt::local_apic_id()).unwrap_or_else(|what| fail(what));
        }
        let ring = device.ring(0, rings, interrupts).unwrap_or_else(|what| fail(what));
        if ring.size < depth * PARTS {
            fail("its ring is too small for so many requests in flight");
        }
        device.go();
        let report = &header().disk;
        report.sectors.store(sectors, Relaxed);
        report.blocks.store(blocks, Relaxed);
        report.table_gpa.store(table, Relaxed);
        report.depth.store(depth.into(), Relaxed);
        report.present.store(1, Relaxed);
        let mut disk = Self {
            ring,
            device,
            report,
            seed: params.seed,
            depth,
            waits: params.disk_wait,
            interrupts: 0,
            blocks,
            table,
            headers,
            data,
            slots: [Slot { what: What::Nothing, block: 0, begun: 0 }; MAX_DISK_DEPTH],
            in_flight: 0,
            random: params.seed | 1,
            requests: 0,
            tsc_hz,
            stopped: false,
            last: 0,
        };
        // From now on an interrupt tells of what comes back.
        disk.ring.listen();
        Some(disk)
    }

    fn entry(&self, block: u64) -> *mut u64 {
        (self.table + 8 * block) as *mut u64
    }

    fn generation(&self, block: u64) -> u64 {
        // SAFETY: inside the table, which this vCPU alone uses.
        unsafe { self.entry(block).read_volatile() }
    }

    fn set_generation(&mut self, block: u64, generation: u64) {
        // SAFETY: as above.
        unsafe { self.entry(block).write_volatile(generation) };
    }

    fn buffer(&self, slot: usize) -> &'static mut Block {
        // SAFETY: the buffer of a slot; whoever calls knows that the device does not have it.
        unsafe { &mut *((self.data + slot as u64 * BLOCK_BYTES) as *mut Block) }
    }

    fn status(&self, slot: usize) -> *mut u8 {
        (self.headers + 2048 + slot as u64) as *mut u8
    }

    /// Takes one request that is done, or makes one. True if there was something to do.
    pub fn work(&mut self, now: u64) -> bool {
        if self.complete(now) {
            return true;
        }
        if self.stopped || self.in_flight == self.depth {
            return false;
        }
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let block = ((u128::from(self.random) * u128::from(self.blocks)) >> 64) as u64;
        let generation = self.generation(block);
        if generation & BUSY != 0 {
            return true;
        }
        self.requests += 1;
        let what = match () {
            () if self.requests.is_multiple_of(FLUSH_EVERY) => What::Flush,
            () if generation == 0 || self.random & 2 == 0 => What::Write(generation + 1),
            () => What::Read,
        };
        self.begin(what, block, now);
        true
    }

    fn begin(&mut self, what: What, block: u64, now: u64) {
        let Some(n) = self.slots[..usize::from(self.depth)].iter().position(|slot| slot.what == What::Nothing) else {
            return;
        };
        let kind = match what {
            What::Write(generation) => {
                for (word, out) in self.buffer(n).iter_mut().enumerate() {
                    *out = block_word(self.seed, block, generation, word);
                }
                TYPE_WRITE
            }
            What::Read => {
                // What was there before must not pass for what was read.
                self.buffer(n).fill(!0);
                TYPE_READ
            }
            What::Flush => TYPE_FLUSH,
            What::Nothing => return,
        };
        let head = self.headers + 16 * n as u64;
        // SAFETY: header and status of a slot that the device does not have.
        unsafe {
            (head as *mut u64).write_volatile(kind.into());
            ((head + 8) as *mut u64).write_volatile(block * BLOCK_SECTORS);
            self.status(n).write_volatile(0xff);
        }
        if what != What::Flush {
            self.set_generation(block, self.generation(block) | BUSY);
        }
        self.slots[n] = Slot { what, block, begun: now };
        self.in_flight += 1;
        self.report.in_flight.store(self.in_flight.into(), Relaxed);
        let first = n as u16 * PARTS;
        let header = Part { address: head, len: 16, writable: false };
        let address = self.data + n as u64 * BLOCK_BYTES;
        let data = Part { address, len: BLOCK_BYTES as u32, writable: what == What::Read };
        let status = Part { address: self.status(n) as u64, len: 1, writable: true };
        compiler_fence(SeqCst);
        match what {
            What::Flush => self.ring.offer(first, &[header, status]),
            _ => self.ring.offer(first, &[header, data, status]),
        }
    }

    /// Takes one request that is done. With interrupts it looks only when one has come: a lost one stops the load for good.
    fn complete(&mut self, now: u64) -> bool {
        if self.waits == DiskWait::Interrupt {
            let count = interrupt::count(0, VECTOR);
            if count == self.interrupts {
                return false;
            }
            let Some(done) = self.ring.take() else {
                self.report.interrupts.store(count.into(), Relaxed);
                if !self.ring.listen() {
                    self.interrupts = count;
                }
                return true;
            };
            self.judge(done, now);
            return true;
        }
        match self.ring.take() {
            Some(done) => self.judge(done, now),
            None => return false,
        }
        true
    }

    fn judge(&mut self, (head, written): (u32, u32), now: u64) {
        compiler_fence(SeqCst);
        let n = head as usize / usize::from(PARTS);
        let known = head.is_multiple_of(PARTS.into()) && n < usize::from(self.depth);
        if !known || self.slots[n].what == What::Nothing {
            add(&self.report.unexpected, 1);
            self.fails(format_args!("descriptor {head} came back, which the device did not have"));
            return;
        }
        let Slot { what, block, begun } = self.slots[n];
        self.slots[n].what = What::Nothing;
        self.in_flight -= 1;
        self.report.in_flight.store(self.in_flight.into(), Relaxed);
        let ns = (u128::from(now.saturating_sub(begun)) * 1_000_000_000 / u128::from(self.tsc_hz)) as u64;
        if ns > self.report.longest_ns.load(Relaxed) {
            self.report.longest_ns.store(ns, Relaxed);
        }
        let generation = self.generation(block) & !BUSY;
        // SAFETY: the status of a slot that has come back.
        let status = unsafe { self.status(n).read_volatile() };
        let expected = if what == What::Read { BLOCK_BYTES as u32 + 1 } else { 1 };
        if status != 0 || written != expected {
            add(&self.report.errors, 1);
            self.fails(format_args!(
                "block {block}: status {status:#x}, {written} bytes written where {expected} were due"
            ));
        }
        match what {
            What::Write(new) => {
                add(&self.report.writes, 1);
                self.set_generation(block, new);
            }
            What::Read => {
                add(&self.report.reads, 1);
                self.set_generation(block, generation);
                self.verify(n, block, generation);
            }
            What::Flush => add(&self.report.flushes, 1),
            What::Nothing => {}
        }
    }

    fn verify(&mut self, n: usize, block: u64, generation: u64) {
        let buffer = self.buffer(n);
        for (word, found) in buffer.iter().enumerate() {
            let expected = block_word(self.seed, block, generation, word);
            if *found != expected {
                add(&self.report.errors, 1);
                if self.report.errors.load(Relaxed) == 1 {
                    self.report.first_block.store(block, Relaxed);
                    self.report.first_expected.store(expected, Relaxed);
                    self.report.first_found.store(*found, Relaxed);
                }
                self.fails(format_args!(
                    "block {block} generation {generation} word {word}: expected {expected:#018x} found {found:#018x}"
                ));
                return;
            }
        }
        add(&self.report.verified, BLOCK_SECTORS);
    }

    #[cold]
    fn fails(&self, what: core::fmt::Arguments<'_>) {
        // Printing is slow.
        if self.report.errors.load(Relaxed) + self.report.unexpected.load(Relaxed) <= 8 {
            let broken = if self.device.is_broken() { " (the device needs a reset)" } else { "" };
            fault::report(0, FailureKind::Disk, format_args!("virtio disk: {what}{broken}"));
        }
    }

    /// Reads and compares every block that was ever written. To be called until it is false; between the calls `tick`.
    pub fn finish(&mut self, now: u64) -> bool {
        self.stopped = true;
        if self.complete(now) {
            return true;
        }
        while self.last < self.blocks && self.in_flight < self.depth {
            let block = self.last;
            match self.generation(block) {
                0 => self.last += 1,
                generation if generation & BUSY != 0 => break,
                _ => {
                    self.begin(What::Read, block, now);
                    self.last += 1;
                    return true;
                }
            }
        }
        self.last < self.blocks || self.in_flight > 0
    }

    /// Errors of all kinds.
    pub fn errors(&self) -> u64 {
        self.report.errors.load(Relaxed) + self.report.unexpected.load(Relaxed)
    }
}
