//! The nested lab: Wherry with real Linux guests, on machines that cannot run them.
//!
//! QEMU emulates a machine with SVM (*outer*), Wherry runs in that, and an ordinary guest (*inner*) runs in Wherry.
//! See `docs/lab.md`. [`packages`] fetches stock kernels and programs, [`initramfs`] and [`images`] pack them,
//! [`root`] makes the guest's disk with [`fio`] on it, [`qemu`] runs the machine, [`report`] reads what it says.
//!
//! A new lab is a module like [`linux`]: a script for the outer machine, what the machine must have, a deadline.

mod blk;
mod devices;
mod fio;
mod front_end;
mod images;
mod initramfs;
mod linux;
mod packages;
mod qemu;
mod report;
mod root;
mod vfio;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Subcommand;

use self::images::{Content, Images, home};
use self::qemu::Machine;
use self::report::Report;
use crate::process::Next;
use crate::tally::Tally;

/// How many emulated machines a lab may use up.
const MACHINES: u32 = 8;
/// What the outer machine prints to show that it lives; see [`report`].
const TICK: &str = "LAB TICK";

/// Ways to use the lab.
#[derive(Debug, Subcommand)]
pub enum Lab {
    /// A stock Linux guest in Wherry: boots, works, is migrated three times, goes on.
    Linux {
        /// More rounds, more memory, more load.
        #[arg(long)]
        full: bool,
    },
    /// A stock Linux guest with its root on a disk of Wherry's and a network device: moved while fio, ping and TCP run.
    Devices {
        /// More moves.
        #[arg(long)]
        full: bool,
        /// Have `wherry device blk` and `wherry device net` serve them.
        #[arg(long)]
        vhost: bool,
    },
    /// A stock Linux guest of QEMU with its root on a disk of `wherry device blk`, moved by QEMU while fio runs.
    QemuFrontEnd {
        /// Moves by each of precopy, postcopy, and postcopy with preemption.
        #[arg(long, default_value_t = 20)]
        moves: u32,
    },
    /// Devices behind an IOMMU, passed through by VFIO.
    Vfio {
        /// More of everything.
        #[arg(long)]
        full: bool,
    },
    /// Measure the disk of a guest of Wherry beside that of one of QEMU, in the same machine.
    Blk,
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
        /// Put the inner guest's disk there too (/lab/root.img, /lab/inner-root.cpio), `ip` and e2fsck.
        #[arg(long)]
        devices: bool,
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
        Lab::Devices { full, vhost } => devices::run(full, vhost),
        Lab::QemuFrontEnd { moves } => front_end::run(moves),
        Lab::Vfio { full } => vfio::run(full),
        Lab::Blk => blk::run(),
        Lab::Direct => direct(),
        Lab::Kvm => {
            let content =
                Content { script: "lab-agent kvm".to_owned(), binaries: vec!["lab-agent"], ..Content::default() };
            Outer::prepare("kvm", &content)?.run(Duration::from_secs(120))
        }
        Lab::Run { script, file, module, device, devices, iommu, memory, timeout } => {
            let text = std::fs::read_to_string(&script).with_context(|| format!("cannot read {}", script.display()))?;
            let binaries = vec!["lab-agent", "wherry"];
            let content =
                Content { script: text, binaries, modules: module, files: file, devices, ..Content::default() };
            let mut lab = Outer::prepare("run", &content)?;
            lab.machine.devices = device;
            lab.machine.iommu = iommu;
            lab.machine.memory = memory;
            lab.run(Duration::from_secs(timeout))
        }
    }
}

/// An outer machine with its script, ready to run. Its image goes with it.
#[derive(Debug)]
struct Outer {
    name: &'static str,
    machine: Machine,
}

impl Outer {
    /// Builds everything that the lab `name` runs on. One task at a time builds; machines may run side by side.
    fn prepare(name: &'static str, content: &Content) -> Result<Self> {
        let _building = lock()?;
        remove_stale(&home());
        let images = Images::prepare()?;
        let initrd = images.outer_initramfs(&unique(name), content)?;
        Ok(Self { name, machine: Machine::new(images.outer.image, initrd) })
    }

    /// Runs the machine and counts what it reports. A run in which the machine itself was lost says nothing about what
    /// ran in it, and is begun again; everything else counts.
    fn run(&self, limit: Duration) -> Result<Tally> {
        for _ in 1..MACHINES {
            match self.run_once(limit)? {
                (_, Some(lost)) => println!("lab {}: NOT COUNTED, the emulated machine was lost: {lost}", self.name),
                (tally, None) => return Ok(tally),
            }
        }
        self.run_once(limit).map(|(tally, _)| tally)
    }

    /// What was reported, and what became of the machine if it was lost.
    fn run_once(&self, limit: Duration) -> Result<(Tally, Option<String>)> {
        let running = home().join(unique(self.name)).with_extension("log");
        let log = home().join(self.name).with_extension("log");
        let start = Instant::now();
        let mut report = Report::new(&format!("lab {}", self.name));
        let ending = self.machine.run(&running, limit, |line| {
            if let Some(line) = line {
                if line != TICK {
                    println!("{:6.1} {line}", start.elapsed().as_secs_f64());
                }
                report.line(line);
            }
            if report.is_frozen(Instant::now()) { Next::Stop } else { Next::Continue }
        })?;
        std::fs::rename(&running, &log).with_context(|| format!("cannot keep the serial log as {}", log.display()))?;
        println!(
            "lab {}: script status {}, machine {ending} after {:.1} s; serial log in {}",
            self.name,
            report.status().unwrap_or("unknown"),
            start.elapsed().as_secs_f64(),
            log.display()
        );
        let lost = report.lost().map(str::to_owned);
        Ok((report.finish(ending, limit), lost))
    }
}

impl Drop for Outer {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.machine.initrd);
    }
}

/// A name that no other task uses, so that the same lab can run twice at once.
fn unique(name: &str) -> String {
    format!("{name}-{}", std::process::id())
}

/// Removes what tasks that were killed have left: files with a [`unique`] name of a process that is gone.
fn remove_stale(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let task = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.rsplit_once('-'));
        if let Some(Ok(pid)) = task.map(|(_, pid)| pid.parse::<u32>())
            && path.is_file()
            && !Path::new(&format!("/proc/{pid}")).exists()
        {
            let _ = std::fs::remove_file(path);
        }
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
        if let Some(line) = line {
            println!("{:6.1} {line}", start.elapsed().as_secs_f64());
            ready |= line.contains("INNER READY");
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_task_left_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        // Process ids end far below this one.
        for name in ["run-999999999.cpio", "run.log", "inner.cpio"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        std::fs::write(dir.path().join(unique("run")).with_extension("cpio"), "").unwrap();
        std::fs::create_dir(dir.path().join("dir-999999999")).unwrap();
        remove_stale(dir.path());
        assert!(!dir.path().join("run-999999999.cpio").exists());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 4);
    }
}
