//! Passthrough: devices of the outer machine that are taken by VFIO, and what is true of them before anybody runs a guest with one.
//!
//! The machine has an IOMMU with interrupt remapping, QEMU's educational device, an NVMe subsystem and an `igb` NIC, both with
//! virtual functions. [`pci`] binds functions, [`nvme`] gives a virtual function queues, [`kernel`] asks VFIO without Wherry.

mod kernel;
mod nvme;
mod pci;

use std::process::Command;

use anyhow::{Context, Result, ensure};
use vfio_bindings::bindings::vfio::{VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX};
use wherry_guest::edu;

use self::kernel::Taken;
use self::nvme::Primary;
use self::pci::Function;
use crate::checks::Checks;

/// Vendor and device of the NVMe controller, and of the NIC.
const NVME: (u16, u16) = (0x1b36, 0x0010);
const IGB: (u16, u16) = (0x8086, 0x10c9);
/// Virtual functions of each.
const VIRTUAL: usize = 2;
/// Queues and vectors that a virtual function of the NVMe subsystem gets: one for administration, one for requests.
const QUEUES: u32 = 2;

/// Runs everything; true if all of it held.
pub fn run() -> bool {
    let names = ["vfio", "edu", "nvme", "igb", "edu-msi", "edu-intx"].map(str::to_owned);
    let mut checks = Checks::plan("", &names);
    // Each failure has been reported by its check.
    let _ = scenario(&mut checks);
    !checks.failed()
}

fn scenario(checks: &mut Checks) -> Result<()> {
    checks.check("vfio", kernel::version)?;
    let edu = checks.check("edu", edu)?;
    checks.check("nvme", nvme)?;
    checks.check("igb", igb)?;
    checks.check("edu-msi", || Taken::new(&edu)?.round_trip(VFIO_PCI_MSI_IRQ_INDEX))?;
    checks.check("edu-intx", || Taken::new(&edu)?.round_trip(VFIO_PCI_INTX_IRQ_INDEX))
}

/// Binds a function and takes it, once; says what it has.
fn take(function: &Function) -> Result<Taken> {
    function.bind("vfio-pci")?;
    let taken = Taken::new(function).with_context(|| format!("taking {function}"))?;
    println!(
        "lab: {function}: group {}, regions of {:x?} bytes, vectors {:?}, {}",
        function.group()?,
        taken.sizes(),
        taken.vectors,
        if taken.resets { "can be reset" } else { "cannot be reset" }
    );
    Ok(taken)
}

fn vectors(taken: &Taken, kind: u32) -> u32 {
    taken.vectors.get(kind as usize).copied().unwrap_or(0)
}

/// The educational device has its registers, MSI and the pin.
fn edu() -> Result<Function> {
    let function = Function::find(edu::VENDOR, edu::DEVICE)?;
    let taken = take(&function)?;
    ensure!(taken.sizes().first() == Some(&edu::REGISTERS_BYTES), "its BARs: {:x?}", taken.sizes());
    let kinds = [VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX];
    ensure!(kinds.map(|kind| vectors(&taken, kind)) == [1, 1, 0], "its vectors: {:?}", taken.vectors);
    Ok(function)
}

/// A virtual function of the NVMe subsystem is online, with queues and vectors of its own, and can be taken.
fn nvme() -> Result<Function> {
    let physical = Function::find(NVME.0, NVME.1)?;
    let primary = Primary::open(&physical.only("nvme")?)?;
    primary.give_up_flexible()?;
    let functions = physical.make_virtual(VIRTUAL)?;
    let secondary = primary.bring_up(1, QUEUES, QUEUES)?;
    println!("lab: {secondary:?}");
    let wanted = (true, QUEUES, QUEUES);
    let is = (secondary.online, u32::from(secondary.queues), u32::from(secondary.interrupts));
    ensure!(is == wanted, "virtual function 1 is {secondary:?} after it was set online");
    let function = functions.first().context("no virtual function")?.clone();
    let taken = take(&function)?;
    ensure!(vectors(&taken, VFIO_PCI_MSIX_IRQ_INDEX) > 0, "its vectors: {:?}", taken.vectors);
    // The kernel resets what is taken, if it can: queues and state have to be as they were.
    drop(taken);
    ensure!(primary.secondary(1)? == secondary, "after a reset it is {:?}", primary.secondary(1)?);
    Ok(function)
}

/// A virtual function of the NIC can be taken, and the NIC itself stays the machine's.
fn igb() -> Result<Function> {
    let physical = Function::find(IGB.0, IGB.1)?;
    let interface = physical.only("net")?;
    let up = Command::new("ifconfig").args([&interface, "up"]).status().context("cannot run ifconfig")?;
    ensure!(up.success(), "ifconfig {interface} up: {up}");
    let functions = physical.make_virtual(VIRTUAL)?;
    let function = functions.first().context("no virtual function")?.clone();
    let taken = take(&function)?;
    ensure!(vectors(&taken, VFIO_PCI_MSIX_IRQ_INDEX) > 0, "its vectors: {:?}", taken.vectors);
    ensure!(physical.driver().as_deref() == Some("igb"), "the NIC has the driver {:?}", physical.driver());
    Ok(function)
}
