//! The probe guest in Wherry with the educational device: what it reports, read from its memory, from outside.

use std::fs::File;
use std::mem::offset_of;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use wherry_guest::report::{CONTROL_GPA, Control, Phase, REPORT_GPA, REPORT_SIZE};
use wherry_guest::snapshot::{EduSnapshot, Snapshot};

use super::pci::Function;
use crate::wherry::{Vmm, path};

const LIMIT: Duration = Duration::from_secs(120);

/// A probe guest at work.
#[derive(Debug)]
pub struct Probe {
    /// Who runs it.
    pub vmm: Vmm,
    ram: File,
}

impl Probe {
    /// Starts one with this function, and waits until its load of the device is set up; `line` is for that load.
    pub fn start(name: &str, function: &Function, line: &str) -> Result<Self> {
        Self::start_with(name, function, line, &[])
    }

    /// The same, where an update is held at a point, so that its process can be killed there by [`Probe::update_killed`].
    pub fn start_held(function: &Function, point: &str) -> Result<Self> {
        let directory = points(point);
        std::fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
        let environment = [("WHERRY_TEST_PAUSE_AT", point), ("WHERRY_TEST_PAUSE_DIR", path(&directory))];
        Self::start_with(&format!("probe-{point}"), function, "edu=msi", &environment)
    }

    /// Has an update fail at that point.
    pub fn update_killed(&self, point: &str) -> Result<()> {
        self.vmm.update_killed(&points(point).join(point), LIMIT)
    }

    fn start_with(name: &str, function: &Function, line: &str, environment: &[(&str, &str)]) -> Result<Self> {
        let (device, line) = (format!("vfio={function}"), format!("data=1M rate=1M {line}"));
        let arguments = ["run", "--memory", "64M", "--cpus", "1", "--cmdline", &line, "--device", &device];
        let vmm = Vmm::start_with(None, name, &arguments, environment)?;
        let path = ram_of(&vmm)?;
        let ram = File::options().read(true).write(true).open(&path).with_context(|| format!("cannot open {path}"))?;
        let this = Self { vmm, ram };
        this.wait("the load of the device", |snapshot| snapshot.edu.is_some())?;
        Ok(this)
    }

    /// What it reports, once it does.
    pub fn snapshot(&self) -> Result<Option<Snapshot>> {
        let mut report = vec![0; REPORT_SIZE as usize];
        self.ram.read_exact_at(&mut report, REPORT_GPA).context("reading the guest's memory")?;
        Ok(Snapshot::decode(&report).ok())
    }

    /// Waits until that holds; a failure of the guest ends it.
    pub fn wait(&self, what: &str, mut holds: impl FnMut(&Snapshot) -> bool) -> Result<Snapshot> {
        let start = Instant::now();
        loop {
            let snapshot = self.snapshot()?;
            if let Some(failure) = snapshot.as_ref().and_then(|snapshot| snapshot.failure.as_ref()) {
                bail!("while waiting for {what}: the guest has failed: {failure:?}");
            }
            if let Some(snapshot) = snapshot.clone().filter(|snapshot| holds(snapshot)) {
                return Ok(snapshot);
            }
            let edu = snapshot.and_then(|snapshot| snapshot.edu);
            ensure!(start.elapsed() < LIMIT, "waited {LIMIT:?} for {what}: {edu:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for so many more rounds than there have been.
    pub fn goes_on(&self, rounds: u64) -> Result<EduSnapshot> {
        let before = self.edu()?.verified;
        let snapshot = self.wait(&format!("{rounds} rounds"), |snapshot| {
            snapshot.edu.is_some_and(|edu| edu.verified >= before + rounds)
        })?;
        snapshot.edu.context("no load of the device")
    }

    /// What it says of the device.
    pub fn edu(&self) -> Result<EduSnapshot> {
        self.snapshot()?.and_then(|snapshot| snapshot.edu).context("no load of the device")
    }

    /// Has it finish, and says what it has found: everything that the device was asked for was done once, and all was right.
    pub fn finish(mut self) -> Result<EduSnapshot> {
        let at = CONTROL_GPA + offset_of!(Control, finish) as u64;
        self.ram.write_all_at(&1_u32.to_le_bytes(), at).context("writing the guest's memory")?;
        self.wait("the guest to finish", |snapshot| snapshot.phase() == Phase::Finished)?;
        self.vmm.end(LIMIT)?;
        let edu = self.edu()?;
        ensure!((edu.errors, edu.lost, edu.stalled, edu.gone) == (0, 0, 0, false), "{edu:?}");
        ensure!(edu.asked == edu.answered && edu.dmas == 2 * edu.verified, "something was not done: {edu:?}");
        ensure!(edu.interrupts == edu.answered + edu.spurious, "the interrupts do not add up: {edu:?}");
        Ok(edu)
    }
}

/// Where its memory at 0 can be opened, once it has been made, which is after the API answers.
fn ram_of(vmm: &Vmm) -> Result<String> {
    let start = Instant::now();
    loop {
        let text = vmm.status()?;
        let status: serde_json::Value = serde_json::from_str(&text).with_context(|| format!("no status: {text}"))?;
        let blocks = status["vm"]["blocks"].as_array();
        if let Some(block) = blocks.and_then(|blocks| blocks.iter().find(|block| block["guest_base"] == 0)) {
            return Ok(format!("/proc/{}/fd/{}", status["pid"], block["fd"]));
        }
        ensure!(start.elapsed() < LIMIT, "waited {LIMIT:?} for the memory of a VM: {text}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Where a process that is held at this point says so.
fn points(point: &str) -> PathBuf {
    PathBuf::from(format!("/tmp/points-{point}"))
}
