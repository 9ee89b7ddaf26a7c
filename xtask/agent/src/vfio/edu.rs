//! The educational device driven from user space: a page goes there and comes back by DMA, each way with an interrupt.

use std::ffi::c_void;
use std::fs::File;

use anyhow::{Result, ensure};
use rustix::mm::{MapFlags, ProtFlags, mlock, mmap, mmap_anonymous, munmap};
use wherry_guest::edu::{BUFFER, cause, command, register};

/// Bytes of a page, which is as much as it holds.
pub const PAGE: usize = 4096;

/// Memory of this process; it goes with the value. A mapped BAR keeps its function taken.
#[derive(Debug)]
pub struct Mapped {
    start: *mut c_void,
    len: usize,
}

#[expect(unsafe_code, reason = "maps memory")]
impl Mapped {
    /// New memory, which stays where it is.
    pub fn new(len: usize) -> Result<Self> {
        let both = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), len, both, MapFlags::PRIVATE)? };
        let this = Self { start, len };
        // SAFETY: it is ours.
        unsafe { mlock(start, len)? };
        Ok(this)
    }

    /// That of a file from an offset on: of a BAR.
    pub fn of(file: &File, offset: u64, len: usize) -> Result<Self> {
        let both = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping.
        let start = unsafe { mmap(std::ptr::null_mut(), len, both, MapFlags::SHARED, file, offset)? };
        Ok(Self { start, len })
    }

    /// Its address here.
    pub fn address(&self) -> u64 {
        self.start as u64
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "unmaps memory")]
        // SAFETY: it is ours, and nobody has an address of it any more. An error cannot be dealt with.
        let _ = unsafe { munmap(self.start, self.len) };
    }
}

/// One round. `registers` is the first page of its BAR; `memory` two pages, and `bus` where the device finds each. `wait` returns when an interrupt has
/// come, and `again` lets the next one come.
pub fn round_trip(
    registers: &Mapped,
    memory: &Mapped,
    bus: [u64; 2],
    seed: u64,
    mut wait: impl FnMut() -> Result<()>,
    mut again: impl FnMut() -> Result<()>,
) -> Result<()> {
    ensure!(registers.len >= PAGE && memory.len >= 2 * PAGE, "too little memory");
    let (registers, memory) = (registers.start.cast::<u32>(), memory.start.cast::<u64>());
    #[expect(unsafe_code, reason = "registers of a device")]
    // SAFETY: in the page that is mapped.
    let write = |at: u64, value: u64| unsafe { registers.byte_add(at as usize).write_volatile(value as u32) };
    #[expect(unsafe_code, reason = "registers of a device")]
    // SAFETY: as above.
    let read = |at: u64| unsafe { registers.byte_add(at as usize).read_volatile() };
    let word =
        |n: usize| 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(n as u64 + 1) ^ seed.wrapping_mul(0xd1b5_4a32_d192_ed03);
    for n in 0..PAGE / 8 {
        #[expect(unsafe_code, reason = "memory that a device may use")]
        // SAFETY: of the two pages; the device has nothing to do.
        unsafe {
            memory.add(n).write_volatile(word(n));
            memory.add(PAGE / 8 + n).write_volatile(!word(n));
        }
    }
    let buffer = u64::from(BUFFER);
    for (from, to, more) in [(bus[0], buffer, 0), (buffer, bus[1], command::TO_RAM)] {
        write(register::SOURCE, from);
        write(register::DESTINATION, to);
        write(register::COUNT, PAGE as u64);
        write(register::COMMAND, (command::START | command::INTERRUPT | more).into());
        let came = wait();
        let raised = read(register::RAISED);
        came.map_err(|error| error.context(format!("the device raises {raised:#x}")))?;
        ensure!(raised == cause::DMA, "the device raises {raised:#x} after its DMA");
        write(register::ACKNOWLEDGE, raised.into());
        again()?;
    }
    for n in 0..PAGE / 8 {
        #[expect(unsafe_code, reason = "memory that a device may use")]
        // SAFETY: of the second page; the device has nothing to do.
        let found = unsafe { memory.add(PAGE / 8 + n).read_volatile() };
        ensure!(found == word(n), "word {n} came back as {found:#x}, not {:#x}", word(n));
    }
    Ok(())
}
