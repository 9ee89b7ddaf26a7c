//! Passthrough: devices of the outer machine in guests of Wherry.
//!
//! The machine has an IOMMU with interrupt remapping, QEMU's educational device, an NVMe subsystem and an `igb` NIC, both with
//! virtual functions, and a device of two functions that share an IOMMU group. [`pci`] binds functions, [`mod@nvme`] gives a virtual function queues,
//! [`kernel`] asks VFIO without Wherry. Then come guests: [`probe`] and [`mod@linux`]; and [`mod@refusals`].

mod edu;
mod kernel;
mod linux;
mod nvme;
mod pci;
mod probe;
mod refusals;
pub mod uio;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vfio_bindings::bindings::vfio::{VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX};
use wherry_guest::edu as device;

use self::kernel::Taken;
use self::linux::Linux;
use self::nvme::Primary;
use self::pci::Function;
use self::probe::Probe;
use self::refusals::refused;
use crate::checks::Checks;

/// Vendor and device of the NVMe controller, and of the NIC.
const NVME: (u16, u16) = (0x1b36, 0x0010);
const IGB: (u16, u16) = (0x8086, 0x10c9);
/// Functions that share an IOMMU group.
const PAIR: [&str; 2] = ["0000:00:07.0", "0000:00:07.1"];
/// Virtual functions of each.
const VIRTUAL: usize = 2;
/// Queues and vectors that a virtual function of the NVMe subsystem gets: one for administration, one for requests.
const QUEUES: u32 = 2;
/// Rounds of a probe guest: five of them take a second.
const ROUNDS: u64 = 5;
const UPDATE: Duration = Duration::from_secs(120);

/// Updates of the probe guest with each kind of interrupt: of a run that a change is tested with, and of a full one.
const UPDATES: [usize; 2] = [3, 50];

/// The functions that guests get, all bound to vfio-pci.
#[derive(Debug)]
struct Devices {
    edu: Function,
    /// The first virtual function of the NVMe subsystem, and of the NIC.
    nvme: Function,
    igb: Function,
}

/// Runs everything; true if all of it held.
pub fn run(full: bool) -> bool {
    let mut names: Vec<String> = ["vfio", "edu", "nvme", "igb", "edu-msi", "edu-intx"].map(str::to_owned).to_vec();
    names.extend(["absent", "not-bound", "not-viable"].map(str::to_owned));
    for kind in ["msi", "intx"] {
        names.extend(["", "-updates", "-ends"].map(|part| format!("probe-{kind}{part}")));
    }
    names.push("in-use".to_owned());
    names.extend(held(full).iter().map(|point| format!("fails-{point}")));
    names.extend(["linux", "linux-edu"].map(str::to_owned));
    let mut checks = Checks::plan("", &names);
    // Each failure has been reported by its check.
    let _ = scenario(&mut checks, full);
    !checks.failed()
}

fn scenario(checks: &mut Checks, full: bool) -> Result<()> {
    checks.check("vfio", kernel::version)?;
    let edu = checks.check("edu", edu)?;
    let nvme = checks.check("nvme", nvme)?;
    let igb = checks.check("igb", igb)?;
    let devices = Devices { edu, nvme, igb };
    checks.check("edu-msi", || Taken::new(&devices.edu)?.round_trip(VFIO_PCI_MSI_IRQ_INDEX))?;
    checks.check("edu-intx", || Taken::new(&devices.edu)?.round_trip(VFIO_PCI_INTX_IRQ_INDEX))?;
    refusals(checks, &devices)?;
    probes(checks, &devices, full)?;
    linux(checks, &devices)
}

/// What cannot be had is refused, in words that help.
fn refusals(checks: &mut Checks, devices: &Devices) -> Result<()> {
    checks.check("absent", || refused(&"0000:00:1e.0", &["0000:00:1e.0", "no such PCI function"]))?;
    checks.check("not-bound", || {
        devices.edu.unbind()?;
        refused(&devices.edu, &["is not bound to vfio-pci", "it has no driver", "driver_override"])?;
        devices.edu.bind("vfio-pci")
    })?;
    checks.check("not-viable", || {
        let [one, other] = PAIR.map(Function::at);
        ensure!(one.group()? == other.group()?, "{one} and {other} are not in one group");
        one.bind("vfio-pci")?;
        other.bind("uio_pci_generic")?;
        refused(&one, &["is not viable", PAIR[1]])?;
        // A function of the group that nobody has is no obstacle.
        other.unbind()?;
        Taken::new(&one).context("taking a function beside one without driver").map(drop)
    })
}

/// The probe guest verifies every byte and every interrupt of the educational device.
fn probes(checks: &mut Checks, devices: &Devices, full: bool) -> Result<()> {
    for kind in ["msi", "intx"] {
        let name = format!("probe-{kind}");
        let mut probe = checks.check(&name, || {
            let probe = Probe::start(&name, &devices.edu, &format!("edu={kind}"))?;
            let edu = probe.goes_on(ROUNDS)?;
            ensure!(edu.spurious == 0, "interrupts came twice: {edu:?}");
            println!("lab: {edu:?}");
            Ok(probe)
        })?;
        if kind == "msi" {
            checks.check("in-use", || refused(&devices.edu, &["is in use by another process"]))?;
        }
        checks.check(&format!("{name}-updates"), || updates(&mut probe, UPDATES[usize::from(full)]))?;
        checks.check(&format!("{name}-ends"), || {
            let edu = probe.finish()?;
            println!("lab: {edu:?}");
            Ok(())
        })?;
    }
    for point in held(full) {
        checks.check(&format!("fails-{point}"), || {
            let probe = Probe::start_held(&devices.edu, point)?;
            probe.goes_on(1)?;
            probe.update_killed(point)?;
            let edu = probe.goes_on(2)?;
            println!("lab: after an update that failed: {edu:?}");
            probe.finish().map(drop)
        })?;
    }
    Ok(())
}

/// Points of an update at which the new process is killed: when it has re-mapped what the device may use, and in a full run in each state before.
fn held(full: bool) -> &'static [&'static str] {
    const ALL: [&str; 4] = ["new-loaded", "new-asked", "new-built", "new-described"];
    &ALL[..if full { ALL.len() } else { 1 }]
}

/// Another process takes the probe guest over, again and again, while the device does DMA; nothing is lost by it.
fn updates(probe: &mut Probe, count: usize) -> Result<()> {
    let mut blackouts = Vec::new();
    for _ in 0..count {
        blackouts.push(probe.vmm.update(UPDATE)?);
        probe.goes_on(1)?;
    }
    println!("lab: {count} updates, blackouts in us: {blackouts:?}; {:?}", probe.edu()?);
    Ok(())
}

/// A Linux guest has all the devices, and a program in it uses the educational one.
fn linux(checks: &mut Checks, devices: &Devices) -> Result<()> {
    let mut guest = checks.check("linux", || Linux::boot(devices))?;
    checks.check("linux-edu", || guest.edu())
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
    let function = Function::find(device::VENDOR, device::DEVICE)?;
    let taken = take(&function)?;
    ensure!(taken.sizes().first() == Some(&device::REGISTERS_BYTES), "its BARs: {:x?}", taken.sizes());
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
    physical.only("net")?;
    let functions = physical.make_virtual(VIRTUAL)?;
    let function = functions.first().context("no virtual function")?.clone();
    let taken = take(&function)?;
    ensure!(vectors(&taken, VFIO_PCI_MSIX_IRQ_INDEX) > 0, "its vectors: {:?}", taken.vectors);
    ensure!(physical.driver().as_deref() == Some("igb"), "the NIC has the driver {:?}", physical.driver());
    Ok(function)
}
