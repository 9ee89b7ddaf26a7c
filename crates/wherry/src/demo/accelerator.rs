//! The accelerator of `demo --accel`: a device process beside the process of each VM, with another number of workers than the one before.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use tokio::time::Instant;
use wherry_accel::abi::class;
use wherry_guest::snapshot::Snapshot;

/// What the guest is told to do with it: every ring full, through virtual engines of every class.
pub const LOAD: &str = "accel=full accel_bell=poll";
/// Engines that the guest sees, wherever it is.
const ENGINES: &str = "copy=3,compress=2,crypto=2,compute=2,code=1";
/// Workers that serve them, by turns: hosts with other engines.
const WORKERS: [u16; 4] = [2, 1, 4, 3];

/// One device process.
pub struct Accelerator {
    child: Child,
    socket: PathBuf,
    /// Threads that serve its engines.
    pub workers: u16,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Jobs {
    /// Workers of the device process at each place, from the first to the last.
    pub workers: Vec<u16>,
    /// Jobs that were right and done exactly once, by class of the engines.
    pub by_class: Vec<(&'static str, u64)>,
    /// All of them.
    pub verified: u64,
    /// Those that were not, interrupts that were lost, and whatever else was wrong.
    pub errors: u64,
    /// Longest time from one that came back to the next, in microseconds.
    pub longest_us: u64,
}

impl Accelerator {
    /// Starts the one for a place.
    pub async fn start(directory: &Path, place: u32, limit: Duration) -> Result<Self> {
        let program = std::env::current_exe().context("finding this program's own file")?;
        let (socket, log) = (directory.join(format!("{place}.accel")), directory.join(format!("{place}.accel.log")));
        let out = File::create(&log).with_context(|| format!("making {}", log.display()))?;
        let workers = WORKERS[place as usize % WORKERS.len()];
        let mut command = Command::new(&program);
        command.args(["device", "accel", "--engines", ENGINES, "--workers", &workers.to_string()]);
        command.args(["--die-with", &std::process::id().to_string(), "--socket"]).arg(&socket);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(out);
        let child = command.spawn().with_context(|| format!("starting {} device accel", program.display()))?;
        let mut this = Self { child, socket, workers };
        let deadline = Instant::now() + limit;
        while UnixStream::connect(&this.socket).is_err() {
            if let Some(status) = this.child.try_wait().context("waiting for the accelerator")? {
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                bail!("the process of the accelerator ended with {status}: {}", said.trim());
            }
            if Instant::now() >= deadline {
                bail!("the process of the accelerator does not listen at {}", this.socket.display());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(this)
    }

    /// What gives it to a VM.
    pub fn arguments(&self) -> [String; 2] {
        ["--device".into(), format!("vfio-user={}", self.socket.display())]
    }
}

impl Drop for Accelerator {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl Jobs {
    /// What the guest says of it.
    pub fn of(snapshot: &Snapshot, workers: Vec<u16>) -> Option<Self> {
        let load = snapshot.accel?;
        Some(Self {
            workers,
            by_class: class::NAMES.into_iter().zip(load.by_class).collect(),
            verified: load.verified,
            errors: load.errors + load.lost,
            longest_us: load.longest_ns / 1000,
        })
    }

    /// For a person.
    pub fn text(&self) -> String {
        let classes: Vec<_> = self.by_class.iter().map(|(class, jobs)| format!("{class} {jobs}")).collect();
        let workers: Vec<_> = self.workers.iter().map(u16::to_string).collect();
        format!(
            "{} jobs went through it ({}), each was right and done once; its process had {} worker{}",
            self.verified,
            classes.join(", "),
            workers.join(", then "),
            if self.workers == [1] { "" } else { "s" }
        )
    }
}
