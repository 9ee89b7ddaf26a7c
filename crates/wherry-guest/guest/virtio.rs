//! Virtio over PCI, modern (virtio 1.3, section 4.1), for drivers in ring 3: set-up, and split rings.

use core::sync::atomic::Ordering::{Acquire, Release, SeqCst};
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, fence};

use crate::mmio;
use crate::pci::Function;

/// Feature: what all devices of this driver have.
pub const VERSION_1: u64 = 1 << 32;
/// Feature: both sides say how far they want to hear nothing.
pub const EVENT_INDEX: u64 = 1 << 29;
/// Most entries of a [`Ring`].
pub const RING_ENTRIES: u16 = 256;
/// Bytes that a [`Ring`] needs.
pub const RING_BYTES: u64 = 3 * 4096;

const VENDOR: u16 = 0x1af4;
const VENDOR_CAPABILITY: u8 = 9;
const MSIX_CAPABILITY: u8 = 0x11;
const NO_VECTOR: u16 = 0xffff;
const STATUS: u64 = 0x14;

/// Why a device cannot be used.
pub type Problem = &'static str;

/// A device that has been found.
pub struct Device {
    function: Function,
    common: u64,
    notify: u64,
    notify_step: u64,
    /// Its configuration.
    pub config: u64,
    features: u64,
}

impl Device {
    /// The `n`-th device of this type.
    ///
    /// # Errors
    /// There is none, or its registers cannot be reached.
    pub fn find(kind: u16, n: usize) -> Result<Self, Problem> {
        let function = Function::find(VENDOR, 0x1040 + kind).nth(n).ok_or("there is no such device on PCI bus 0")?;
        let mut device = Self { function, common: 0, notify: 0, notify_step: 0, config: 0, features: 0 };
        for at in function.capabilities(VENDOR_CAPABILITY) {
            let kind = function.read(at) >> 24;
            let bar = function.read(at + 4) as u8;
            if !matches!(kind, 1 | 2 | 4) || bar > 5 {
                continue;
            }
            let base = function.bar(bar).ok_or("its registers lie where nothing is mapped")?;
            let address = base + u64::from(function.read(at + 8));
            match kind {
                1 => device.common = address,
                2 => (device.notify, device.notify_step) = (address, function.read(at + 16).into()),
                _ => device.config = address,
            }
        }
        if device.common == 0 || device.notify == 0 || device.config == 0 {
            return Err("it lacks a capability of virtio 1");
        }
        function.enable();
        Ok(device)
    }

    fn status(&self) -> u8 {
        // SAFETY: a register of the device.
        unsafe { mmio::read8(self.common + STATUS) }
    }

    fn add_status(&self, bits: u8) {
        // SAFETY: a register of the device.
        unsafe { mmio::write8(self.common + STATUS, self.status() | bits) };
    }

    /// Resets it and agrees on features: those wanted that it offers.
    ///
    /// # Errors
    /// It does not come out of its reset, or does not agree.
    pub fn begin(&mut self, wanted: u64) -> Result<u64, Problem> {
        // SAFETY: registers of the device, which is being reset and uses no memory.
        unsafe {
            mmio::write8(self.common + STATUS, 0);
            for turn in 0.. {
                if self.status() == 0 {
                    break;
                }
                if turn == 1_000_000 {
                    return Err("its reset does not end");
                }
            }
            self.add_status(1);
            self.add_status(2);
            for half in 0..2 {
                mmio::write32(self.common, half);
                let offered = mmio::read32(self.common + 4);
                let taken = offered & (wanted >> (32 * half)) as u32;
                mmio::write32(self.common + 8, half);
                mmio::write32(self.common + 12, taken);
                self.features |= u64::from(taken) << (32 * half);
            }
        }
        self.add_status(8);
        if self.status() & 8 == 0 || self.features & VERSION_1 == 0 {
            return Err("it does not agree on features");
        }
        Ok(self.features)
    }

    /// Has MSI-X vector 0 of the device raise a vector of this vCPU.
    ///
    /// # Errors
    /// It has no MSI-X.
    pub fn interrupt(&self, vector: u8, apic_id: u32) -> Result<(), Problem> {
        let function = self.function;
        let at = function.capabilities(MSIX_CAPABILITY).next().ok_or("it has no MSI-X")?;
        let table = function.read(at + 4);
        let base = function.bar(table as u8 & 7).ok_or("its MSI-X table lies where nothing is mapped")?;
        let entry = base + u64::from(table & !7);
        // SAFETY: the first entry of its table; the vector has a stub.
        unsafe {
            mmio::write32(entry, 0xfee0_0000 | apic_id << 12);
            mmio::write32(entry + 4, 0);
            mmio::write32(entry + 8, vector.into());
            mmio::write32(entry + 12, 0);
        }
        function.write(at, function.read(at) & 0x3fff_ffff | 1 << 31);
        Ok(())
    }

    /// Sets a ring up in [`RING_BYTES`] of zeroed memory at a multiple of 4 KiB; with `interrupt` it uses MSI-X vector 0.
    ///
    /// # Errors
    /// The device has no such ring, or no vector for it.
    pub fn ring(&self, index: u16, memory: u64, interrupt: bool) -> Result<Ring, Problem> {
        let common = self.common;
        // SAFETY: registers of the device; the memory is the ring's.
        unsafe {
            mmio::write16(common + 0x16, index);
            let most = mmio::read16(common + 0x18);
            if most == 0 {
                return Err("it lacks a ring");
            }
            let size = most.min(RING_ENTRIES);
            mmio::write16(common + 0x18, size);
            let vector = if interrupt { 0 } else { NO_VECTOR };
            mmio::write16(common + 0x1a, vector);
            if mmio::read16(common + 0x1a) != vector {
                return Err("it has no vector for a ring");
            }
            for (register, address) in [(0x20, memory), (0x28, memory + 4096), (0x30, memory + 8192)] {
                mmio::write32(common + register, address as u32);
                mmio::write32(common + register + 4, (address >> 32) as u32);
            }
            let bell = self.notify + u64::from(mmio::read16(common + 0x1e)) * self.notify_step;
            mmio::write16(common + 0x1c, 1);
            let event_index = self.features & EVENT_INDEX != 0;
            Ok(Ring { memory, size, index, bell, event_index, available: 0, used: 0 })
        }
    }

    /// The driver is ready.
    pub fn go(&self) {
        self.add_status(4);
    }

    /// Whether the device says that it needs a reset.
    pub fn is_broken(&self) -> bool {
        self.status() & 0x40 != 0
    }
}

/// A split ring.
pub struct Ring {
    memory: u64,
    /// Its entries.
    pub size: u16,
    index: u16,
    bell: u64,
    event_index: bool,
    available: u16,
    used: u16,
}

/// A part of a request.
#[derive(Clone, Copy)]
pub struct Part {
    /// Where it lies.
    pub address: u64,
    /// Its length in bytes.
    pub len: u32,
    /// The device writes it.
    pub writable: bool,
}

impl Ring {
    fn word(&self, offset: u64) -> &AtomicU16 {
        // SAFETY: inside the ring's memory, which lives for ever and which both sides access as atomics.
        unsafe { &*((self.memory + offset) as *const AtomicU16) }
    }

    fn avail(&self, offset: u64) -> &AtomicU16 {
        self.word(4096 + offset)
    }

    /// Makes a request available whose parts take the descriptors from `first` on, and rings if the device wants that.
    pub fn offer(&mut self, first: u16, parts: &[Part]) {
        for (i, part) in (first..).zip(parts) {
            let next = usize::from(i - first) + 1 < parts.len();
            let flags = u16::from(next) | u16::from(part.writable) << 1;
            let at = self.memory + 16 * u64::from(i);
            // SAFETY: descriptors of this ring that the device does not have; atomics, as the device may read them.
            unsafe {
                (*(at as *const AtomicU64)).store(part.address, SeqCst);
                (*((at + 8) as *const AtomicU32)).store(part.len, SeqCst);
                (*((at + 12) as *const AtomicU32)).store(u32::from(i + 1) << 16 | u32::from(flags), SeqCst);
            }
        }
        let size = u64::from(self.size);
        self.avail(4 + 2 * u64::from(self.available % self.size)).store(first, SeqCst);
        let old = self.available;
        self.available = old.wrapping_add(1);
        self.avail(2).store(self.available, Release);
        fence(SeqCst);
        let rings = match self.event_index {
            true => self.word(8192 + 4 + 8 * size).load(SeqCst) == old,
            false => self.word(8192).load(SeqCst) & 1 == 0,
        };
        if rings {
            // SAFETY: the device's doorbell of this ring.
            unsafe { mmio::write16(self.bell, self.index) };
        }
    }

    /// The next request that the device has given back: its first descriptor and the bytes written.
    pub fn take(&mut self) -> Option<(u32, u32)> {
        if self.word(8192 + 2).load(Acquire) == self.used {
            return None;
        }
        let at = self.memory + 8192 + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        // SAFETY: inside the used ring, of whole words.
        unsafe { Some(((*(at as *const AtomicU32)).load(SeqCst), (*((at + 4) as *const AtomicU32)).load(SeqCst))) }
    }

    /// Asks for an interrupt when the device gives the next one back. True if it has already.
    pub fn listen(&mut self) -> bool {
        if self.event_index {
            self.avail(4 + 2 * u64::from(self.size)).store(self.used, SeqCst);
        }
        fence(SeqCst);
        self.word(8192 + 2).load(SeqCst) != self.used
    }
}
