//! The nested lab: Wherry with real Linux guests, on machines that cannot run them.
//!
//! QEMU emulates a machine with SVM (*outer*), Wherry runs in that, and an ordinary guest (*inner*) runs in Wherry.
//! See `docs/lab.md`. [`packages`] fetches stock kernels and programs, [`initramfs`] and [`images`] pack them,
//! [`qemu`] runs the machine, [`report`] reads what it says.
//!
//! A new lab is a module like [`linux`]: a script for the outer machine, what the machine must have, a deadline.

mod images;
mod initramfs;
mod linux;
mod packages;
mod qemu;
mod report;

use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Subcommand;

use self::images::{Content, Images, home};
use self::qemu::Machine;
use self::report::Report;
use crate::process::Next;
use crate::tally::Tally;

/// Ways to use the lab.
#[derive(Debug, Subcommand)]
pub enum Lab {
    /// A stock Linux guest in Wherry: boots, works, is migrated twice, goes on.
    Linux {
        /// More rounds, more memory, more load.
        #[arg(long)]
        full: bool,
    },
    /// Boot the outer machine with the present Wherry and run a shell script of yours in it.
    Run {
        /// The script; /lab/bin/wherry, /lab/vmlinuz and /lab/inner.cpio are there for it.
        #[arg(long)]
        script: PathBuf,
        /// Files to find below /lab/files.
        #[arg(long)]
        file: Vec<PathBuf>,
        /// Kernel modules to load beside KVM's.
        #[arg(long)]
        module: Vec<String>,
        /// Devices for the machine, in the words of QEMU's -device.
        #[arg(long)]
        device: Vec<String>,
        /// Give the machine an Intel IOMMU.
        #[arg(long)]
        iommu: bool,
        /// RAM of the outer machine in MiB.
        #[arg(long, default_value_t = 3072)]
        memory: u32,
        /// Seconds until the machine is killed.
        #[arg(long, default_value_t = 300)]
        timeout: u64,
    },
    /// Check that KVM works in the outer machine, without Wherry.
    Kvm,
    /// Boot the inner guest under QEMU alone: does the guest itself work?
    Direct,
}

/// Runs a lab, printing its serial port.
pub fn run(lab: Lab) -> Result<Tally> {
    std::fs::create_dir_all(home()).with_context(|| format!("cannot create {}", home().display()))?;
    match lab {
        Lab::Linux { full } => linux::run(full),
        Lab::Direct => direct(),
        Lab::Kvm => {
            let content =
                Content { script: "lab-agent kvm".to_owned(), binaries: vec!["lab-agent"], ..Content::default() };
            Outer::prepare("kvm", &content)?.run(Duration::from_secs(120))
        }
        Lab::Run { script, file, module, device, iommu, memory, timeout } => {
            let text = std::fs::read_to_string(&script).with_context(|| format!("cannot read {}", script.display()))?;
            let binaries = vec!["lab-agent", "wherry"];
            let mut lab = Outer::prepare("run", &Content { script: text, binaries, modules: module, files: file })?;
            lab.machine.devices = device;
            lab.machine.iommu = iommu;
            lab.machine.memory = memory;
            lab.run(Duration::from_secs(timeout))
        }
    }
}

/// An outer machine with its script, ready to run.
#[derive(Debug)]
struct Outer {
    name: &'static str,
    machine: Machine,
}

impl Outer {
    /// Builds everything that the lab `name` runs on. One task at a time builds; machines may run side by side.
    fn prepare(name: &'static str, content: &Content) -> Result<Self> {
        let _building = lock()?;
        let images = Images::prepare()?;
        let initrd = images.outer_initramfs(name, content)?;
        Ok(Self { name, machine: Machine::new(images.outer.image, initrd) })
    }

    /// Runs the machine and counts what it reports.
    fn run(&self, limit: Duration) -> Result<Tally> {
        let log = home().join(format!("{}.log", self.name));
        let start = Instant::now();
        let mut report = Report::new(&format!("lab {}", self.name));
        let ending = self.machine.run(&log, limit, |line| {
            println!("{:6.1} {line}", start.elapsed().as_secs_f64());
            report.line(line);
            Next::Continue
        })?;
        println!(
            "lab {}: script status {}, machine {ending} after {:.1} s; serial log in {}",
            self.name,
            report.status().unwrap_or("unknown"),
            start.elapsed().as_secs_f64(),
            log.display()
        );
        Ok(report.finish(ending, limit))
    }
}

/// Boots the inner guest in the emulated machine itself, and expects its user space.
fn direct() -> Result<Tally> {
    let machine = {
        let _building = lock()?;
        let images = Images::prepare()?;
        let initrd = images.inner_initramfs()?;
        Machine { memory: 1024, ..Machine::new(images.inner.image, initrd) }
    };
    let log = home().join("direct.log");
    let start = Instant::now();
    let mut ready = false;
    machine.run(&log, Duration::from_secs(120), |line| {
        println!("{:6.1} {line}", start.elapsed().as_secs_f64());
        ready |= line.contains("INNER READY");
        if ready { Next::Stop } else { Next::Continue }
    })?;
    if !ready {
        bail!("the inner guest did not reach its user space under QEMU; see {}", log.display());
    }
    Ok(Tally { passed: 1, ..Tally::default() })
}

/// Waits until no other task builds in the lab's directory.
fn lock() -> Result<File> {
    let path = home().join("lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}
