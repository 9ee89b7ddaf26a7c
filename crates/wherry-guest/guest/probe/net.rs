//! The network load of the probe: numbered frames through a virtio network device, each of which has to come back, in order, once.
//!
//! Memory is looked at after an interrupt alone, and nothing is sent again: a frame or an interrupt that is lost stops the load for good. It
//! is vCPU 0's.

use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use core::sync::atomic::{AtomicU64, compiler_fence};

use wherry_guest_kernel::fault::{self, die, header};
use wherry_guest_kernel::memory::Allocator;
use wherry_guest_kernel::net::{LONGEST, WINDOW, Way, Wrong, check, number, write};
use wherry_guest_kernel::params::Params;
use wherry_guest_kernel::report::{FailureKind, NetReport};
use wherry_guest_kernel::virtio::{Device, EVENT_INDEX, Part, RING_BYTES, Ring, VERSION_1};
use wherry_guest_kernel::{interrupt, mmio};

use crate::handed::Handed;

const KIND: u16 = 1;
const FEATURE_MAC: u64 = 1 << 5;
/// The header before each frame (virtio 1.3, section 5.1.6), zeroes here: nothing is left to the device.
const HEAD: usize = 12;
/// Buffers to receive into: more than there are frames of ours under way, for there may be others.
const BUFFERS: usize = 32;
const BUFFER_BYTES: u64 = 2048;
/// Frames in a second, at most.
const PER_SECOND: u64 = 5000;
/// How long frames may take to come back at the end.
const LAST_SECONDS: u64 = 20;
const VECTOR: u8 = interrupt::DEVICE_VECTORS.start + 1;

/// The load. Set up by the first vCPU before the data set is laid out.
pub struct Net {
    device: Device,
    receive: Ring,
    transmit: Ring,
    report: &'static NetReport,
    seed: u64,
    address: [u8; 6],
    /// Buffers that the device writes, and those that it reads.
    buffers: u64,
    frames: u64,
    /// The device has these.
    given: [bool; BUFFERS],
    under_way: [bool; WINDOW as usize],
    /// Numbers of the next frame to be sent, and of the next to come back.
    sent: u64,
    returned: u64,
    interrupts: u32,
    /// TSC at which the next may be sent; at which the last one came.
    next: u64,
    last: u64,
    tsc_hz: u64,
    /// TSC at which those that are under way at the end are given up.
    limit: Option<u64>,
}

fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(n), Relaxed);
}

/// From the first vCPU's set-up to its work.
pub static HANDED: Handed<Net> = Handed::new();

impl Net {
    /// Finds the device and sets it up, or fails and halts. `None` if there is to be no network load.
    pub fn set_up(params: &Params, ram: &mut Allocator, tsc_hz: u64) -> Option<Self> {
        if !params.net {
            return None;
        }
        let fail = |what: &str| -> ! { die(0, FailureKind::Net, format_args!("virtio net: {what}")) };
        let mut device = Device::find(KIND, 0).unwrap_or_else(|what| fail(what));
        let features = device.begin(VERSION_1 | EVENT_INDEX | FEATURE_MAC).unwrap_or_else(|what| fail(what));
        if features & FEATURE_MAC == 0 {
            fail("it has no address");
        }
        // SAFETY: the address in the device's configuration.
        let address = core::array::from_fn(|i| unsafe { mmio::read8(device.config + i as u64) });
        let mut take = |bytes: u64| match ram.take(bytes) {
            Some(region) => {
                // SAFETY: handed out to nobody else, mapped.
                unsafe { (region.start as *mut u8).write_bytes(0, (region.end - region.start) as usize) };
                region.start
            }
            None => fail("there is no RAM for its buffers"),
        };
        let rings = [take(RING_BYTES), take(RING_BYTES)];
        let (buffers, frames) = (take(BUFFERS as u64 * BUFFER_BYTES), take(WINDOW * BUFFER_BYTES));
        device.interrupt(VECTOR, interrupt::local_apic_id()).unwrap_or_else(|what| fail(what));
        let receive = device.ring(0, rings[0], true).unwrap_or_else(|what| fail(what));
        let transmit = device.ring(1, rings[1], false).unwrap_or_else(|what| fail(what));
        if usize::from(receive.size) < BUFFERS || u64::from(transmit.size) < WINDOW {
            fail("its rings are too small");
        }
        device.go();
        let report = &header().net;
        report.window.store(WINDOW as u32, Relaxed);
        report.present.store(1, Relaxed);
        let mut net = Self {
            device,
            receive,
            transmit,
            report,
            seed: params.seed,
            address,
            buffers,
            frames,
            given: [false; BUFFERS],
            under_way: [false; WINDOW as usize],
            sent: 0,
            returned: 0,
            interrupts: 0,
            next: 0,
            last: 0,
            tsc_hz,
            limit: None,
        };
        (0..BUFFERS).for_each(|n| net.give(n));
        // From now on an interrupt tells of what comes.
        net.receive.listen();
        Some(net)
    }

    /// Has the device write to a buffer.
    fn give(&mut self, n: usize) {
        self.given[n] = true;
        let address = self.buffers + n as u64 * BUFFER_BYTES;
        compiler_fence(SeqCst);
        self.receive.offer(n as u16, &[Part { address, len: BUFFER_BYTES as u32, writable: true }]);
    }

    /// Takes one frame that has come, or sends one. True if there was something to do.
    pub fn work(&mut self, now: u64) -> bool {
        if self.arrived(now) {
            return true;
        }
        if now < self.next_turn() {
            return false;
        }
        while let Some((head, _)) = self.transmit.take() {
            match self.under_way.get_mut(head as usize) {
                Some(under_way) if *under_way => *under_way = false,
                _ => self.fails(format_args!("descriptor {head} was sent, which the device did not have")),
            }
        }
        let slot = (self.sent % WINDOW) as usize;
        if self.under_way[slot] {
            return false;
        }
        let at = self.frames + slot as u64 * BUFFER_BYTES;
        // SAFETY: a frame behind its header, in a buffer that the device does not have.
        let frame = unsafe { &mut *((at + HEAD as u64) as *mut [u8; LONGEST]) };
        let length = write(frame, self.address, self.seed, self.sent, Way::Out);
        self.under_way[slot] = true;
        compiler_fence(SeqCst);
        let part = Part { address: at, len: (HEAD + length) as u32, writable: false };
        self.transmit.offer(slot as u16, &[part]);
        self.sent += 1;
        self.next = now + self.tsc_hz / PER_SECOND;
        self.report.sent.store(self.sent, Relaxed);
        true
    }

    /// TSC at which it has something to do by itself.
    pub fn next_turn(&self) -> u64 {
        if self.limit.is_none() && self.sent - self.returned < WINDOW { self.next } else { u64::MAX }
    }

    fn arrived(&mut self, now: u64) -> bool {
        let count = interrupt::count(0, VECTOR);
        if count == self.interrupts {
            return false;
        }
        let Some((head, written)) = self.receive.take() else {
            self.report.interrupts.store(count.into(), Relaxed);
            if !self.receive.listen() {
                self.interrupts = count;
            }
            return true;
        };
        compiler_fence(SeqCst);
        let n = head as usize;
        if n >= BUFFERS || !self.given[n] {
            self.fails(format_args!("descriptor {head} came back, which the device did not have"));
            return true;
        }
        self.given[n] = false;
        self.judge(n, written as usize, now);
        self.give(n);
        true
    }

    fn judge(&mut self, n: usize, written: usize, now: u64) {
        if written < HEAD || written as u64 > BUFFER_BYTES {
            self.fails(format_args!("{written} bytes were received"));
            return;
        }
        let at = self.buffers + n as u64 * BUFFER_BYTES + HEAD as u64;
        // SAFETY: what the device has written to a buffer that it has given back.
        let frame = unsafe { core::slice::from_raw_parts(at as *const u8, written - HEAD) };
        let Some(number) = number(frame) else {
            add(&self.report.foreign, 1);
            return;
        };
        let expected = self.returned;
        if number != expected || expected == self.sent {
            self.note(expected, Wrong { word: u64::MAX - 1, expected, found: number });
            self.fails(format_args!("frame {number} came, and frame {expected} was due"));
            return;
        }
        self.returned += 1;
        add(&self.report.received, 1);
        let ns = (u128::from(now.saturating_sub(self.last)) * 1_000_000_000 / u128::from(self.tsc_hz)) as u64;
        if self.last != 0 && ns > self.report.longest_ns.load(Relaxed) {
            self.report.longest_ns.store(ns, Relaxed);
        }
        self.last = now;
        match check(frame, self.seed, number, Way::Back) {
            Ok(()) => add(&self.report.verified, 1),
            Err(wrong) => {
                self.note(number, wrong);
                self.fails(format_args!("frame {number}: {wrong:x?}"));
            }
        }
    }

    fn note(&self, number: u64, wrong: Wrong) {
        if self.report.errors.load(Relaxed) == 0 {
            self.report.first_number.store(number, Relaxed);
            self.report.first_word.store(wrong.word, Relaxed);
            self.report.first_expected.store(wrong.expected, Relaxed);
            self.report.first_found.store(wrong.found, Relaxed);
        }
    }

    #[cold]
    fn fails(&self, what: core::fmt::Arguments<'_>) {
        add(&self.report.errors, 1);
        // Printing is slow.
        if self.report.errors.load(Relaxed) <= 8 {
            let broken = if self.device.is_broken() { " (the device needs a reset)" } else { "" };
            fault::report(0, FailureKind::Net, format_args!("virtio net: {what}{broken}"));
        }
    }

    /// Sends nothing more. True as long as frames are under way.
    pub fn finish(&mut self, now: u64) -> bool {
        let limit = *self.limit.get_or_insert(now + LAST_SECONDS * self.tsc_hz);
        if self.arrived(now) {
            return true;
        }
        if self.returned == self.sent {
            return false;
        }
        if now >= limit {
            self.fails(format_args!("frames {} to {} did not come back", self.returned, self.sent - 1));
            self.returned = self.sent;
        }
        true
    }

    /// Errors of all kinds.
    pub fn errors(&self) -> u64 {
        self.report.errors.load(Relaxed)
    }
}
