//! The client's memory as an address space of the device.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use wherry_vfio_user::Bus;
use wherry_vfio_user::server::Word;

use super::Wires;
use crate::memory::{Access, AddressSpace, Atomic, Fault, MAX_MOVE, Width};

/// The client's maps, while the function is a bus master.
pub(super) struct BusSpace(Arc<Wires>);

impl BusSpace {
    pub(super) fn new(wires: Arc<Wires>) -> Self {
        Self(wires)
    }

    /// The bus, if all of a range is there to be accessed so.
    fn bus(&self, at: u64, bytes: u64, access: Access) -> Result<&Bus, Fault> {
        let fault = Fault { at, bytes, access };
        let bus = self.0.bus.get().filter(|_| self.0.master.load(Ordering::SeqCst)).ok_or(fault)?;
        // Addresses end at the last one.
        at.checked_add(bytes).ok_or(fault)?;
        bus.check(at, bytes, access == Access::Write).map_err(|_| fault)?;
        Ok(bus)
    }
}

thread_local! {
    /// What a copy goes through: of at most [`MAX_MOVE`] bytes, and kept, since a fresh one for each costs more than the copy.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl AddressSpace for BusSpace {
    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Fault> {
        let fault = Fault { at, bytes: to.len() as u64, access: Access::Read };
        match to.len() {
            0 => Ok(()),
            bytes => self.bus(at, bytes as u64, Access::Read)?.read(at, to).map_err(|_| fault),
        }
    }

    fn write(&self, at: u64, from: &[u8]) -> Result<(), Fault> {
        let fault = Fault { at, bytes: from.len() as u64, access: Access::Write };
        match from.len() {
            0 => Ok(()),
            bytes => self.bus(at, bytes as u64, Access::Write)?.write(at, from).map_err(|_| fault),
        }
    }

    fn copy(&self, from: u64, to: u64, bytes: u64) -> Result<(), Fault> {
        if bytes > MAX_MOVE {
            return Err(Fault { at: from, bytes, access: Access::Read });
        }
        self.check(to, bytes, Access::Write)?;
        BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < bytes as usize {
                buffer.resize(bytes as usize, 0);
            }
            let buffer = &mut buffer[..bytes as usize];
            self.read(from, buffer)?;
            self.write(to, buffer)
        })
    }

    fn atomic(&self, at: u64, width: Width, operation: Atomic) -> Result<u64, Fault> {
        let access = if operation == Atomic::Load { Access::Read } else { Access::Write };
        let fault = Fault { at, bytes: width.bytes(), access };
        let write = access == Access::Write;
        let done = self.bus(at, width.bytes(), access)?.word(at, width == Width::Eight, write, |word| match word {
            Word::Four(word) => u64::from(four(word, operation)),
            Word::Eight(word) => eight(word, operation),
        });
        done.map_err(|_| fault)
    }

    fn publish(&self, at: u64, value: u8) -> Result<(), Fault> {
        // All that was written before is there when this byte is; stores are not reordered by the processor.
        fence(Ordering::Release);
        self.write(at, &[value])
    }

    fn check(&self, at: u64, bytes: u64, access: Access) -> Result<(), Fault> {
        match bytes {
            0 => Ok(()),
            _ => self.bus(at, bytes, access).map(|_| ()),
        }
    }
}

const ORDER: Ordering = Ordering::SeqCst;

macro_rules! word {
    ($name:ident, $atomic:ty, $int:ty) => {
        fn $name(word: &$atomic, operation: Atomic) -> $int {
            match operation {
                Atomic::Load => word.load(ORDER),
                Atomic::Add(v) => word.fetch_add(v as $int, ORDER),
                Atomic::Or(v) => word.fetch_or(v as $int, ORDER),
                Atomic::And(v) => word.fetch_and(v as $int, ORDER),
                Atomic::Xor(v) => word.fetch_xor(v as $int, ORDER),
                Atomic::Exchange(v) => word.swap(v as $int, ORDER),
                Atomic::CompareExchange { expected, new } => {
                    let (Ok(old) | Err(old)) = word.compare_exchange(expected as $int, new as $int, ORDER, ORDER);
                    old
                }
            }
        }
    };
}

word!(four, AtomicU32, u32);
word!(eight, AtomicU64, u64);
