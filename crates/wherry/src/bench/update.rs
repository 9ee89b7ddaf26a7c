//! `wherry bench --update`: how long a guest stands still while another process takes it over, by its memory, its vCPUs and the
//! vectors of a vfio-user device; with `--vs qemu`, beside QEMU's `cpr-transfer` of the same guest.
//!
//! What is compared is the largest gap that the guest itself sees in its heartbeat, which any VMM can be asked; the parts are what
//! the old process reports. One guest works at a time; the others are paused.
//!
//! Of the first guest the brownout is measured, too ([`brownout`]).

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use wherry_migration::progress::Blackout;
use wherry_vmm::api::types::VmState;

use super::brownout::{self, MOMENTS, Pulse};
use super::device::Device;
use super::{Figures, START, pause, qemu, qemu_ram, resume, working};
use crate::args::{Bench, Peer};
use crate::demo::process::{self, Process};
use crate::demo::{check_kvm, measure_anew, ram_of, renew, wait_for};
use crate::probe::ProbeRam;
use crate::report;
use crate::{HAPPENED, control, runtime};

/// Undisturbed between two turns: the guest catches up with what it could not write while it was paused.
const CALM: Duration = Duration::from_millis(300);

/// What the brownout is compared with.
const BEFORE: Duration = Duration::from_millis(500);
/// How long the guest is looked at after a switch.
const AFTER: Duration = Duration::from_millis(1100);

/// A guest to measure.
#[derive(Clone, Copy, Debug)]
struct Shape {
    memory: u64,
    cpus: u32,
    /// Vectors of its device; none: it has no device.
    vectors: u32,
    /// Its brownout is measured.
    brownout: bool,
}

impl Shape {
    fn name(&self) -> String {
        let Self { memory, cpus, vectors, .. } = *self;
        let device = if vectors > 0 { format!(", device with {vectors} vectors") } else { String::new() };
        format!("{}, {cpus} vCPUs{device}", report::bytes(memory))
    }
}

/// The figures of one guest.
#[derive(Clone, Debug, Default, Serialize)]
struct Row {
    guest: String,
    /// The largest gap in the guest.
    felt: Figures,
    /// From the command to its answer.
    command: Figures,
    /// What the old process reports: the whole, and its parts.
    whole: Figures,
    stop: Figures,
    state: Figures,
    passing: Figures,
    load: Figures,
    start: Figures,
    /// What the guest has lost in the first 10 ms, 100 ms and second after it, where that is measured.
    lost: [Figures; 3],
}

impl Row {
    fn add(&mut self, felt_us: u64, command_us: u64, blackout: &Blackout) {
        let us = Duration::from_micros;
        self.felt.push(us(felt_us));
        self.command.push(us(command_us));
        self.whole.push(us(blackout.total_us));
        self.stop.push(us(blackout.stop_us));
        self.state.push(us(blackout.state_us));
        self.passing.push(us(blackout.network_us));
        self.load.push(us(blackout.load_us));
        self.start.push(us(blackout.start_us));
    }
}

/// A guest, paused except in its turns.
struct Guest {
    holder: Process,
    _device: Option<Device>,
    ram: ProbeRam,
    row: Row,
    brownout: bool,
}

impl Guest {
    async fn start(options: &Bench, directory: &Path, shape: Shape) -> Result<Self> {
        let Shape { memory, cpus, vectors, .. } = shape;
        let file = format!("{memory}-{cpus}-{vectors}");
        let mut cmdline = format!("data={} rate={}", options.data, options.rate);
        let vectors = vectors.to_string();
        let device = match shape.vectors {
            0 => None,
            _ => {
                cmdline.push_str(&format!(" testdma=wait testdma_interrupt=msix testdma_vectors={vectors}"));
                Some(Device::start(directory, &file, &["testdma", "--vectors", &vectors, "--interval", "200"]).await?)
            }
        };
        let (memory, cpus) = (memory.to_string(), cpus.to_string());
        let mut arguments = vec!["run", "--memory", &memory, "--cpus", &cpus, "--cmdline", &cmdline];
        let given = device.as_ref().map(|device| format!("vfio-user={}", device.socket.display()));
        arguments.extend(given.iter().flat_map(|given| ["--device", given]));
        let mut holder = Process::start(directory, &file, &arguments)?;
        let ram = ram_of(&holder.wait_for(&[VmState::Running], START).await?)?;
        working(&ram).await?;
        pause(&holder).await?;
        let row = Row { guest: shape.name(), ..Row::default() };
        Ok(Self { holder, _device: device, ram, row, brownout: shape.brownout })
    }

    async fn turn(&mut self) -> Result<()> {
        resume(&self.holder).await?;
        tokio::time::sleep(CALM).await;
        let pulse = match self.brownout {
            true => Some(Pulse::feel(self.ram.again()?)?),
            false => None,
        };
        if pulse.is_some() {
            tokio::time::sleep(BEFORE).await;
        }
        let calm = self.ram.beat(0)?.tsc;
        let (update, job) = renew(&mut self.holder, &self.ram).await?;
        if let Some(pulse) = pulse {
            let khz = self.ram.snapshot()?.context("the guest's report has vanished")?.tsc_khz;
            let gap = self.ram.largest_gap(0, khz)?;
            tokio::time::sleep(AFTER).await;
            let lost = brownout::lost(&pulse.finish()?, khz, calm, gap)?;
            self.row.lost.iter_mut().zip(lost).for_each(|(figures, lost)| figures.push(lost));
        }
        let blackout = job.blackout.context("the old process reports no blackout")?;
        self.row.add(update.guest_gap_us, update.whole_us, &blackout);
        pause(&self.holder).await
    }
}

/// The same guest in QEMU.
struct Rival {
    here: qemu::Qemu,
    ram: ProbeRam,
    row: Row,
    turns: u32,
}

impl Rival {
    async fn start(options: &Bench, directory: &Path, guest: &qemu::Guest<'_>) -> Result<Self> {
        let mut here = qemu::Qemu::start(guest, directory, "cpr-0", false)?;
        let ram = qemu_ram(&here, options.memory).await?;
        working(&ram).await?;
        here.execute("stop", serde_json::Value::Null)?;
        let version = qemu::version().unwrap_or_default();
        let row = Row { guest: format!("QEMU {version}, cpr-transfer"), ..Row::default() };
        Ok(Self { here, ram, row, turns: 0 })
    }

    async fn turn(&mut self, options: &Bench, directory: &Path, guest: &qemu::Guest<'_>) -> Result<()> {
        self.turns += 1;
        self.here.execute("cont", serde_json::Value::Null)?;
        tokio::time::sleep(CALM).await;
        measure_anew(&self.ram).await?;
        let begun = std::time::Instant::now();
        let mut there = self.here.update(guest, directory, &format!("cpr-{}", self.turns))?;
        self.row.command.push(begun.elapsed());
        self.ram = qemu_ram(&there, options.memory).await?;
        let beat = self.ram.heartbeat(0)?;
        let seen = wait_for(&self.ram, "go on", |s| s.cpus.first().is_some_and(|c| c.heartbeat > beat + 1)).await?;
        self.row.felt.push(Duration::from_nanos(seen.largest_gap_ns()));
        there.execute("stop", serde_json::Value::Null)?;
        self.here = there;
        Ok(())
    }
}

/// `wherry bench --update`
pub(super) fn bench(options: &Bench) -> Result<u8> {
    check_kvm()?;
    if options.vs == Some(Peer::Qemu) && qemu::version().is_none() {
        anyhow::bail!("--vs qemu: QEMU is not installed (Debian: apt-get install qemu-system-x86)");
    }
    let directory = process::directory("bench")?;
    let rows = runtime()?.block_on(measure(options, directory.path()))?;
    match options.json {
        true => control::print_json(&rows)?,
        false => control::print(&text(&rows, options)),
    }
    Ok(HAPPENED)
}

async fn measure(options: &Bench, directory: &Path) -> Result<Vec<Row>> {
    let first = Shape { memory: options.memory, cpus: 1, vectors: 0, brownout: true };
    let base = Shape { brownout: false, ..first };
    let sizes = [4 * options.memory, 16 * options.memory].map(|memory| Shape { memory, ..base });
    let cpus = [2, 4].map(|cpus| Shape { cpus, ..base });
    let vectors = [1, 8, 64].map(|vectors| Shape { vectors, ..base });
    let mut guests = Vec::new();
    for shape in [first].into_iter().chain(sizes).chain(cpus).chain(vectors) {
        guests.push(Guest::start(options, directory, shape).await?);
    }
    let kernel = directory.join("probe");
    std::fs::write(&kernel, wherry_guest::PROBE_ELF).context("writing the probe guest")?;
    let cmdline = format!("data={} rate={}", options.data, options.rate);
    let guest = qemu::Guest { kernel: &kernel, cmdline: &cmdline, memory_mib: options.memory >> 20, cpus: 1 };
    let mut rival = match options.vs {
        Some(Peer::Qemu) => Some(Rival::start(options, directory, &guest).await?),
        None => None,
    };
    for run in 1..=options.runs {
        if !options.json {
            eprintln!("run {run} of {}", options.runs);
        }
        for own in &mut guests {
            own.turn().await?;
        }
        if let Some(rival) = &mut rival {
            rival.turn(options, directory, &guest).await?;
        }
    }
    Ok(guests.into_iter().map(|guest| guest.row).chain(rival.map(|rival| rival.row)).collect())
}

fn text(rows: &[Row], options: &Bench) -> String {
    let (data, rate) = (report::bytes(options.data), report::bytes(options.rate));
    let mut text = format!(
        "\nLive update of a guest with {data} of data, {rate}/s of it rewritten; {} times each\n\n",
        options.runs
    );
    let heads = ["guest", "felt (least - most)", "blackout", "stop", "state", "passing", "load", "start", "command"];
    let mut table = vec![heads.map(String::from).to_vec()];
    let own = rows.first().cloned().unwrap_or_default();
    for row in rows {
        let part = |figures: &Figures| match figures.us.is_empty() {
            true => String::new(),
            false => report::time(figures.median_us),
        };
        let whole = if row.whole.us.is_empty() { String::new() } else { row.whole.text() };
        let mut cells = vec![row.guest.clone(), row.felt.text(), whole];
        cells.extend([&row.stop, &row.state, &row.passing, &row.load, &row.start, &row.command].map(part));
        table.push(cells);
    }
    text.push_str(&report::table(&table));
    text.push('\n');
    for row in rows.iter().skip(1) {
        if let Some(ratio) = own.felt.ratio(&row.felt) {
            text.push_str(&format!("\n{}: {ratio:.2} times as long as {}", row.guest, own.guest));
        }
    }
    text.push_str(&format!(
        "\n\nAfter it, to faults of pages that are touched for the first time, {} loses\n\n",
        own.guest
    ));
    let mut table = vec![["in the first", "time"].map(String::from).to_vec()];
    for (moment, lost) in MOMENTS.iter().zip(&own.lost) {
        table.push(vec![format!("{} ms", moment.as_millis()), lost.text()]);
    }
    text.push_str(&report::table(&table));
    text.push_str("\nWanted: a median of 1 ms at most, whatever the memory.\n");
    text
}
