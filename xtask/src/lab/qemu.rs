//! The machine that the lab runs in: QEMU without KVM, so that it can emulate what the real machine lacks
//! (SVM with nested paging, an IOMMU with interrupt remapping, PCI devices to pass through).

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::thread::{CpuSet, sched_getaffinity};

use crate::process::{Ending, Next, command, watch};

/// What QEMU says about every CPU feature that its emulator leaves out.
const NOISE: &str = "TCG doesn't support requested feature";

/// A machine to be emulated.
#[derive(Debug, Clone)]
pub struct Machine {
    /// The kernel, a bzImage.
    pub kernel: PathBuf,
    /// The initial RAM file system.
    pub initrd: PathBuf,
    /// Added to the kernel command line.
    pub cmdline: String,
    /// RAM in MiB.
    pub memory: u32,
    /// An Intel IOMMU with interrupt remapping, for labs with passthrough devices.
    pub iommu: bool,
    /// Further devices, in the words of QEMU's `-device`.
    pub devices: Vec<String>,
    /// What is behind them, in QEMU's own words: it stands before them.
    pub behind: Vec<String>,
}

impl Machine {
    /// A machine that runs this kernel.
    pub fn new(kernel: PathBuf, initrd: PathBuf) -> Self {
        Self {
            kernel,
            initrd,
            cmdline: String::new(),
            memory: 3072,
            iommu: false,
            devices: Vec::new(),
            behind: Vec::new(),
        }
    }

    /// QEMU's arguments; the serial port is its standard output, and goes to `log` as well.
    pub fn arguments(&self, log: &Path) -> Vec<String> {
        // No PIT: on a busy host Linux calibrated its TSC against it to 47 MHz instead of 2600 (seen), and all clocks
        // inside were wrong. Without it the HPET is the reference.
        let machine = if self.iommu { "q35,pit=off,kernel-irqchip=split" } else { "q35,pit=off" };
        let iommu = if self.iommu { " intel_iommu=on" } else { "" };
        let mut arguments: Vec<String> = [
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-machine",
            machine,
            "-accel",
            "tcg",
            "-cpu",
            "EPYC,+svm",
        ]
        .map(str::to_owned)
        .to_vec();
        // One CPU: with two, nested guests crash, lose interrupts and take the outer kernel with them, whatever VMM they
        // run in (docs/decisions/the-lab-has-one-cpu.md).
        arguments.extend(["-smp", "1", "-m"].map(str::to_owned));
        arguments.push(self.memory.to_string());
        arguments.extend([
            "-chardev".to_owned(),
            format!("stdio,id=serial,signal=off,logfile={},logappend=off", log.display()),
            "-serial".to_owned(),
            "chardev:serial".to_owned(),
            "-kernel".to_owned(),
            self.kernel.display().to_string(),
            "-initrd".to_owned(),
            self.initrd.display().to_string(),
            "-append".to_owned(),
            // The TSC is the host's own. On a busy host the emulated HPET answers late and Linux blames the TSC (seen).
            // KVM would then re-compute the offsets of its guests' TSCs all the time.
            format!("console=ttyS0 panic=-1 loglevel=5 tsc=nowatchdog{iommu} {}", self.cmdline),
        ]);
        if self.iommu {
            arguments.extend(["-device".to_owned(), "intel-iommu,intremap=on,caching-mode=on".to_owned()]);
        }
        arguments.extend(self.behind.iter().cloned());
        for device in &self.devices {
            arguments.extend(["-device".to_owned(), device.clone()]);
        }
        arguments
    }

    /// Runs the machine until it powers off, the handler stops it or `limit` is over. The handler sees every line of
    /// the serial port and of QEMU's own complaints, and `None` now and then while there is none.
    pub fn run(&self, log: &Path, limit: Duration, mut on_line: impl FnMut(Option<&str>) -> Next) -> Result<Ending> {
        // On one processor, or an interrupt is lost now and then: docs/decisions/the-lab-has-one-cpu.md.
        let mut qemu = command("taskset");
        qemu.args(["--cpu-list", &processor()?.to_string(), "qemu-system-x86_64"]).args(self.arguments(log));
        watch(qemu, limit, |line| on_line(line.filter(|line| !line.contains(NOISE))))
            .with_context(|| format!("the lab machine; its serial log is {}", log.display()))
    }
}

/// One of the processors that this task may use; another one for another task, if there are several.
fn processor() -> Result<usize> {
    let ours = sched_getaffinity(None).context("asking for the processors of this task")?;
    let all: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|n| ours.is_set(*n)).collect();
    all.get(std::process::id() as usize % all.len().max(1)).copied().context("this task has no processor")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_and_the_iommu_are_in_the_machine_only_when_asked_for() {
        let mut machine = Machine::new("k".into(), "i".into());
        let plain = machine.arguments(Path::new("log")).join(" ");
        assert!(plain.contains("-cpu EPYC,+svm") && plain.contains("-smp 1 -m 3072"), "{plain}");
        assert!(!plain.contains("iommu"), "{plain}");
        machine.iommu = true;
        machine.devices.push("edu".to_owned());
        let full = machine.arguments(Path::new("log")).join(" ");
        assert!(full.contains("intel_iommu=on") && full.contains("-device intel-iommu,intremap=on"), "{full}");
        assert!(full.ends_with("-device edu"), "{full}");
    }
}
