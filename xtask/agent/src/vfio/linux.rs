//! A Linux guest in Wherry with all the devices, where a program uses the educational one by UIO.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::Devices;
use crate::serial::Serial;
use crate::wherry::Vmm;

/// The guest is emulated in an emulated machine: seconds become tens of seconds.
const BOOT: Duration = Duration::from_secs(240);
const COMMAND: Duration = Duration::from_secs(240);
/// Its kernel waits longer than usual before it calls something stuck, since it shares one emulated CPU.
const CMDLINE: &str = "console=ttyS0 panic=-1 rcupdate.rcu_cpu_stall_timeout=180 watchdog_thresh=60";
/// Pages that the educational device brings there and back.
const ROUNDS: u32 = 5;

/// The guest.
#[derive(Debug)]
pub struct Linux {
    /// Who runs it.
    _vmm: Vmm,
    serial: Serial,
}

impl Linux {
    /// Starts it, and waits for its user space.
    pub fn boot(devices: &Devices) -> Result<Self> {
        let functions = [&devices.edu, &devices.nvme, &devices.igb].map(|function| format!("vfio={function}"));
        let mut arguments = vec!["run", "--kernel", "/lab/vmlinuz-outer", "--initrd", "/lab/inner-passthrough.cpio"];
        arguments.extend(["--memory", "256M", "--cpus", "1", "--cmdline", CMDLINE]);
        arguments.extend(functions.iter().flat_map(|function| ["--device", function]));
        let vmm = Vmm::start("linux", &arguments)?;
        let mut serial = Serial::connect(&vmm.serial, COMMAND)?;
        println!("lab: {}", serial.wait_for("INNER READY", BOOT)?);
        // The kernel's own words would come between those of the commands.
        serial.ask("dmesg -n 1", COMMAND)?;
        Ok(Self { _vmm: vmm, serial })
    }

    /// The educational device does DMA, and its pin interrupts.
    pub fn edu(&mut self) -> Result<()> {
        let said = self.serial.ask(&format!("lab-agent uio --rounds {ROUNDS}"), COMMAND)?;
        println!("lab: edu in the guest: {}", said.trim());
        ensure!(said.contains(&format!("{ROUNDS} rounds, {} interrupts", 2 * ROUNDS)), "it said {said:?}");
        Ok(())
    }
}
