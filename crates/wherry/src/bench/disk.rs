//! `wherry bench --disk`: what a disk adds to the blackout of a move. The same guest without a disk, with one of its own
//! process, and with one that `wherry device blk` serves, each with few and with many requests under way, in turn.
//!
//! The parts of the blackout are what the source reports. One guest works at a time; the others are paused.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use wherry_migration::progress::Blackout;
use wherry_vmm::api::types::{Mode, VmState};

use super::device::Device;
use super::{Figures, START, pause, resume, working};
use crate::args::Bench;
use crate::demo::outcome::Kind;
use crate::demo::process::{self, Process};
use crate::demo::{Move, check_kvm, ram_of, travel};
use crate::probe::ProbeRam;
use crate::report;
use crate::{HAPPENED, control, runtime};

/// Bytes of each disk.
const DISK: u64 = 32 << 20;
/// Requests under way, few and many.
const DEPTHS: [u32; 2] = [1, 16];

/// Who serves the guest's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Server {
    Nobody,
    /// The process of the VM.
    Own,
    /// `wherry device blk`.
    Other,
}

/// The parts of the blackouts of one guest by one mode.
#[derive(Clone, Debug, Default, Serialize)]
struct Row {
    guest: String,
    mode: &'static str,
    /// From outside.
    felt: Figures,
    /// What the source reports.
    whole: Figures,
    stop: Figures,
    last_pages: Figures,
    state: Figures,
    network: Figures,
    load: Figures,
    start: Figures,
    /// Before the stop, while the guest runs: until its requests had ended.
    stall: Figures,
}

impl Row {
    fn add(&mut self, felt_us: u64, blackout: &Blackout, stall_us: u64) {
        let us = Duration::from_micros;
        self.felt.push(us(felt_us));
        self.whole.push(us(blackout.total_us));
        self.stop.push(us(blackout.stop_us));
        self.last_pages.push(us(blackout.last_pages_us));
        self.state.push(us(blackout.state_us));
        self.network.push(us(blackout.network_us));
        self.load.push(us(blackout.load_us));
        self.start.push(us(blackout.start_us));
        self.stall.push(us(stall_us));
    }
}

/// A guest, paused except in its turns.
struct Guest {
    name: String,
    server: Server,
    image: PathBuf,
    here: Process,
    back_end: Option<Device>,
    ram: ProbeRam,
    rows: [Row; 2],
    moves: u32,
}

impl Guest {
    async fn start(options: &Bench, directory: &Path, server: Server, depth: u32) -> Result<Self> {
        let name = match server {
            Server::Nobody => "no disk".to_owned(),
            Server::Own => format!("disk of its process, {depth} under way"),
            Server::Other => format!("disk of another process, {depth} under way"),
        };
        let file = format!("{server:?}-{depth}");
        let image = directory.join(format!("{file}.img"));
        File::create(&image).and_then(|image| image.set_len(DISK)).context("making a disk image")?;
        let mut cmdline = format!("data={} rate={}", options.data, options.rate);
        if server != Server::Nobody {
            cmdline.push_str(&format!(" disk={DISK} disk_depth={depth}"));
        }
        let back_end = back_end(directory, &file, server, &image).await?;
        let memory = options.memory.to_string();
        let mut arguments = ["run", "--memory", &memory, "--cmdline", &cmdline].map(str::to_owned).to_vec();
        arguments.extend(disk(server, &image, back_end.as_ref()));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut here = Process::start(directory, &file, &arguments)?;
        let ram = ram_of(&here.wait_for(&[VmState::Running], START).await?)?;
        working(&ram).await?;
        pause(&here).await?;
        let rows = ["precopy", "postcopy"].map(|mode| Row { guest: name.clone(), mode, ..Row::default() });
        Ok(Self { name: file, server, image, here, back_end, ram, rows, moves: 0 })
    }

    /// One move by each mode.
    async fn turn(&mut self, options: &Bench, directory: &Path) -> Result<()> {
        resume(&self.here).await?;
        for (mode, row) in [(Mode::Precopy, 0), (Mode::Postcopy, 1)] {
            // Undisturbed for a while: the guest catches up with what it could not write while it was paused.
            tokio::time::sleep(Duration::from_millis(300)).await;
            self.moves += 1;
            let name = format!("{}-{}", self.name, self.moves);
            let next = back_end(directory, &name, self.server, &self.image).await?;
            let mut arguments = ["receive", "--once", "--listen", "tcp:127.0.0.1:0"].map(str::to_owned).to_vec();
            arguments.extend(disk(self.server, &self.image, next.as_ref()));
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let mut there = Process::start(directory, &name, &arguments)?;
            let limit = Some(options.downtime_limit);
            let moving = Move { number: self.moves, mode, kind: Kind::Plain, downtime_limit_ms: limit, quiet: true };
            let leg = travel(&moving, &mut self.here, &mut there, &self.ram).await?;
            let blackout = leg.job.blackout.context("the source reports no blackout")?;
            self.rows[row].add(leg.blackout_us, &blackout, leg.job.io_stall_us);
            self.ram = ram_of(&there.wait_for(&[VmState::Running], START).await?)?;
            self.here.wait_for_end(START).await?;
            (self.here, self.back_end) = (there, next);
        }
        pause(&self.here).await
    }
}

async fn back_end(directory: &Path, name: &str, server: Server, image: &Path) -> Result<Option<Device>> {
    match server {
        Server::Other => {
            let image = image.to_string_lossy();
            Device::start(directory, name, &["blk", "--image", &image]).await.map(Some)
        }
        Server::Nobody | Server::Own => Ok(None),
    }
}

/// The arguments that give a guest its disk.
fn disk(server: Server, image: &Path, back_end: Option<&Device>) -> Vec<String> {
    match (server, back_end) {
        (Server::Own, _) => vec!["--disk".into(), image.display().to_string()],
        (_, Some(back_end)) => vec!["--device".into(), format!("vhost-user-blk={}", back_end.socket.display())],
        (_, None) => Vec::new(),
    }
}

/// `wherry bench --disk`
pub(super) fn bench(options: &Bench) -> Result<u8> {
    check_kvm()?;
    let directory = process::directory("bench")?;
    let rows = runtime()?.block_on(measure(options, directory.path()))?;
    match options.json {
        true => control::print_json(&rows)?,
        false => control::print(&text(&rows, options)),
    }
    Ok(HAPPENED)
}

async fn measure(options: &Bench, directory: &Path) -> Result<Vec<Row>> {
    let mut guests = vec![Guest::start(options, directory, Server::Nobody, 0).await?];
    for server in [Server::Own, Server::Other] {
        for depth in DEPTHS {
            guests.push(Guest::start(options, directory, server, depth).await?);
        }
    }
    for run in 1..=options.runs {
        if !options.json {
            eprintln!("run {run} of {}", options.runs);
        }
        for guest in &mut guests {
            guest.turn(options, directory).await?;
        }
    }
    let mut rows: Vec<Row> = guests.into_iter().flat_map(|guest| guest.rows).collect();
    rows.sort_by_key(|row| row.mode != "precopy");
    Ok(rows)
}

fn text(rows: &[Row], options: &Bench) -> String {
    let (data, rate) = (report::bytes(options.data), report::bytes(options.rate));
    let mut text = format!("\nBlackout of a guest with {data} of data, {rate}/s of it rewritten; medians\n\n");
    let heads = [
        "guest",
        "mode",
        "felt",
        "whole",
        "stop",
        "last pages",
        "state",
        "network",
        "load",
        "start",
        "I/O stall before",
    ];
    let mut table = vec![heads.map(String::from).to_vec()];
    for row in rows {
        let figures = [
            &row.felt,
            &row.whole,
            &row.stop,
            &row.last_pages,
            &row.state,
            &row.network,
            &row.load,
            &row.start,
            &row.stall,
        ];
        let mut cells = vec![row.guest.clone(), row.mode.to_owned()];
        cells.extend(figures.map(|figures| report::time(figures.median_us)));
        table.push(cells);
    }
    text.push_str(&report::table(&table));
    text.push('\n');
    for mode in ["precopy", "postcopy"] {
        let of = |row: &&Row| row.mode == mode;
        let Some(none) = rows.iter().find(of) else { continue };
        for row in rows.iter().filter(of).filter(|row| row.guest != none.guest) {
            let added = row.whole.median_us as f64 - none.whole.median_us as f64;
            text.push_str(&format!("\n{mode}, {}: {:+.2} ms", row.guest, added / 1e3));
        }
    }
    text.push_str("\nWanted: less than 1 ms more than without a disk.\n");
    text
}
