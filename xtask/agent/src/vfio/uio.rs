//! In a Linux guest: the educational device by UIO, which gives a program its registers and its pin. There is no kernel driver for it.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use wherry_guest::edu::{DEVICE, REACH, VENDOR};

use super::edu::{Mapped, PAGE, round_trip};
use super::pci::Function;

/// For an interrupt; the device's DMA takes 100 ms.
const LIMIT: Duration = Duration::from_secs(60);
/// Offset of the command register of a function: memory, bus master, and the pin not switched off.
const COMMAND: u64 = 4;
const ENABLED: [u8; 2] = [0x06, 0x00];

/// Brings so many pages there and back; says how many interrupts came.
pub fn run(rounds: u64) -> Result<()> {
    let function = Function::find(VENDOR, DEVICE)?;
    function.bind("uio_pci_generic")?;
    let name = function.only("uio")?;
    let open = |path: &std::path::Path| {
        File::options().read(true).write(true).open(path).with_context(|| format!("cannot open {}", path.display()))
    };
    let uio = open(std::path::Path::new(&format!("/dev/{name}")))?;
    let config = open(&function.path("config"))?;
    let bar = open(&function.path("resource0"))?;
    let registers = Mapped::of(&bar, 0, PAGE)?;
    let memory = Mapped::new(2 * PAGE)?;
    let bus = [physical(memory.address())?, physical(memory.address() + PAGE as u64)?];
    let mut interrupts = 0_u64;
    config.write_all_at(&ENABLED, COMMAND).context("enabling the device")?;
    let mut before = None;
    for round in 0..rounds {
        round_trip(
            &registers,
            &memory,
            bus,
            round,
            || {
                let limit = Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
                let came = poll(&mut [PollFd::new(&uio.as_fd(), PollFlags::IN)], Some(&limit))?;
                ensure!(came == 1, "waited {LIMIT:?} for the interrupt of round {round}");
                let mut count = [0; 4];
                rustix::io::read(&uio, &mut count)?;
                let count = u32::from_ne_bytes(count);
                let new = before.replace(count).map_or(1, |before: u32| count.wrapping_sub(before));
                ensure!(new == 1, "{new} interrupts came for one, in round {round}");
                interrupts += 1;
                Ok(())
            },
            // The kernel has switched the pin off until its cause was dealt with.
            || config.write_all_at(&ENABLED, COMMAND).context("enabling the pin"),
        )?;
    }
    println!("{rounds} rounds, {interrupts} interrupts");
    Ok(())
}

/// Where a page of this process is in memory.
fn physical(address: u64) -> Result<u64> {
    let mut entry = [0; 8];
    let pagemap = File::open("/proc/self/pagemap").context("cannot open /proc/self/pagemap")?;
    pagemap.read_exact_at(&mut entry, address / PAGE as u64 * 8).context("cannot read /proc/self/pagemap")?;
    let entry = u64::from_ne_bytes(entry);
    let frame = entry & ((1 << 55) - 1);
    ensure!(entry >> 63 == 1 && frame != 0, "the page at {address:#x} is not there, or hidden: {entry:#x}");
    let physical = frame * PAGE as u64;
    ensure!(physical + PAGE as u64 <= REACH, "the page at {physical:#x} is where the device does not reach");
    Ok(physical)
}
