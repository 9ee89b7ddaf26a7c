//! `wherry bench`: what a move costs, beside what the machine could do at best and beside what a peer does.
//!
//! Everything that is compared is measured in turn in one run, so that a machine whose speed drifts is the same machine
//! for all of them; the figures to quote are medians and ratios.
//!
//! - [`wherry_migration::bench`]: the engine over a prepared image, without a guest, and loopback TCP from one memfd
//!   into a fresh one.
//! - the whole guest: the probe guest as in `wherry demo`, blackout measured from outside.
//! - [`qemu`]: the same guest under QEMU, where it is installed.
//!
//! - [`accel`]: with `--accel`, the accelerator, and that alone.
//!
//! - [`disk`]: with `--disk`, what a disk adds to the blackout, and that alone.
//!
//! - [`update`]: with `--update`, live updates, and those alone.
//!
//! With `--link` the guest moves between two network namespaces over a slow link instead, and that alone is measured.

mod accel;
mod brownout;
mod device;
mod disk;
mod qemu;
mod update;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;
use wherry_migration::bench as engine;
use wherry_netlab::{LEFT, Network, RIGHT, Shape};
use wherry_vmm::api::types::{Mode, VmState};

use crate::args::{ANSWER, Bench, Peer};
use crate::demo::outcome::{Kind, Touched};
use crate::demo::process::{self, Process};
use crate::demo::{Move, check_kvm, measure_anew, ram_of, travel, wait_for};
use crate::probe::{ProbeRam, Watcher};
use crate::report;
use crate::{HAPPENED, control, runtime};

const START: Duration = Duration::from_secs(20);

/// Values of one quantity over all runs.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Figures {
    /// In microseconds, in the order of the runs.
    pub us: Vec<u64>,
    /// The middle one.
    pub median_us: u64,
}

impl Figures {
    fn push(&mut self, value: Duration) {
        self.us.push(u64::try_from(value.as_micros()).unwrap_or(u64::MAX));
        self.median_us = crate::demo::outcome::median(self.us.iter().copied());
    }

    fn text(&self) -> String {
        let (min, max) = (self.us.iter().min().copied().unwrap_or(0), self.us.iter().max().copied().unwrap_or(0));
        format!("{} ({} - {})", report::time(self.median_us), report::time(min), report::time(max))
    }

    /// How many times as long `other` takes.
    fn ratio(&self, other: &Figures) -> Option<f64> {
        (self.median_us > 0 && other.median_us > 0).then(|| other.median_us as f64 / self.median_us as f64)
    }
}

/// One way to move the guest.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Way {
    /// Who and how.
    pub name: String,
    /// From the command to the first heartbeat at the destination; by postcopy, until all memory is there.
    pub total: Figures,
    /// From the last heartbeat at the source to the first at the destination.
    pub blackout: Figures,
    /// The largest gap the guest itself has seen.
    pub gap: Figures,
    /// A touch of a page that is not there, as the guest feels it: half of them took no longer (postcopy).
    pub touch_p50: Figures,
    /// 99 of 100 took no longer.
    pub touch_p99: Figures,
    /// How many of them there were, in the order of the runs.
    pub touches: Vec<u64>,
    /// From reading a page fault to its page being visible: half of them took no longer (postcopy of Wherry).
    pub fault_p50: Figures,
    /// 99 of 100 took no longer.
    pub fault_p99: Figures,
}

impl Way {
    fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// By postcopy, what the guest felt.
    fn felt(&mut self, touched: &Touched) {
        self.touch_p50.push(Duration::from_micros(touched.p50_us));
        self.touch_p99.push(Duration::from_micros(touched.p99_us));
        self.touches.push(touched.waited);
    }
}

/// All figures of a run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Results {
    /// Bytes of the image and of the guest's data.
    pub data: u64,
    /// Bytes the guest writes per second.
    pub rate: u64,
    /// The link it moves over, if it is not loopback.
    pub link: Option<String>,
    /// The engine over the prepared image, and loopback TCP beside it.
    pub engine: Option<engine::Report>,
    /// Loopback TCP with two streams while the guest runs.
    pub raw_beside_guest: Figures,
    /// The whole guest.
    pub ways: Vec<Way>,
}

/// `wherry bench`
pub fn bench(options: &Bench) -> Result<u8> {
    if options.accel {
        return accel::bench(options);
    }
    if options.disk {
        return disk::bench(options);
    }
    if options.update {
        return update::bench(options);
    }
    check_kvm()?;
    if options.vs == Some(Peer::Qemu) && qemu::version().is_none() {
        anyhow::bail!("--vs qemu: QEMU is not installed (Debian: apt-get install qemu-system-x86)");
    }
    let say = |text: &str| {
        if !options.json {
            eprintln!("{text}");
        }
    };
    let link = options.link.map(|shape| {
        let rate = shape.rate as f64 * 8e-6;
        format!("{:.2} ms round trip and {rate} Mbit/s", 2e3 * shape.delay.as_secs_f64())
    });
    let mut results = Results { data: options.data, rate: options.rate, link, ..Results::default() };
    if options.link.is_none() {
        say("the engine over a prepared image, and raw loopback TCP");
        let alone = engine::Options { ram: options.memory, data: options.data, runs: options.runs, channels: None };
        results.engine = Some(engine::engine(&alone)?);
    }
    let directory = process::directory("bench")?;
    let ways = runtime()?.block_on(whole_guest(options, directory.path(), &mut results.raw_beside_guest, &say))?;
    results.ways = ways;
    match options.json {
        true => control::print_json(&results)?,
        false => control::print(&results.text()),
    }
    Ok(HAPPENED)
}

/// A guest under QEMU that waits, stopped, for its turns.
struct Rival {
    way: Way,
    method: qemu::Method,
    here: qemu::Qemu,
    ram: ProbeRam,
}

async fn whole_guest(options: &Bench, directory: &Path, raw: &mut Figures, say: &dyn Fn(&str)) -> Result<Vec<Way>> {
    let memory = options.memory.to_string();
    let cmdline = format!("data={} rate={}", options.data, options.rate);
    let arguments = ["run", "--memory", &memory, "--cmdline", &cmdline];
    let network = options.link.map(network).transpose()?;
    let mut is_left = true;
    let mut here = Process::start_in(network.as_ref().map(Network::left), directory, "0", &arguments)?;
    let mut ram = ram_of(&here.wait_for(&[VmState::Running], START).await?)?;
    working(&ram).await?;

    let mut rivals = Vec::new();
    let kernel = directory.join("probe.elf");
    std::fs::write(&kernel, wherry_guest::PROBE_ELF).context("writing the probe guest to a file")?;
    let guest = qemu::Guest { kernel: &kernel, cmdline: &cmdline, memory_mib: options.memory >> 20, cpus: 1 };
    if options.vs == Some(Peer::Qemu) {
        let version = qemu::version().unwrap_or_default();
        pause(&here).await?;
        let methods = [
            (qemu::Method::Precopy, "precopy"),
            (qemu::Method::Multifd, "multifd"),
            (qemu::Method::Postcopy, "postcopy"),
        ];
        for (method, name) in methods {
            say(&format!("starting the guest under QEMU {version} for {name}"));
            let mut qemu = qemu::Qemu::start(&guest, directory, &format!("{name}-0"), false)?;
            let ram = qemu_ram(&qemu, options.memory).await?;
            working(&ram).await?;
            qemu.execute("stop", serde_json::Value::Null)?;
            rivals.push(Rival { way: Way::new(format!("QEMU {version} {name}")), method, here: qemu, ram });
        }
        resume(&here).await?;
    }

    let mut own = [
        (Mode::Precopy, Way::new(concat!("Wherry ", env!("CARGO_PKG_VERSION"), " precopy"))),
        (Mode::Postcopy, Way::new(concat!("Wherry ", env!("CARGO_PKG_VERSION"), " postcopy"))),
    ];
    // With a link, loopback is not what the guest moves over.
    let image = network.is_none().then(|| engine::image(options.data, options.data)).transpose()?;
    for number in 1..=options.runs {
        say(&format!("run {number} of {}", options.runs));
        if let Some(image) = &image {
            raw.push(Duration::from_secs_f64(engine::raw(image, options.data, 2)?));
        }
        for (mode, way) in &mut own {
            let name = format!("{mode:?}-{number}");
            is_left = !is_left;
            let (namespace, listen) = match &network {
                None => (None, "tcp:127.0.0.1:0".into()),
                Some(network) if is_left => (Some(network.left()), format!("tcp:{LEFT}:0")),
                Some(network) => (Some(network.right()), format!("tcp:{RIGHT}:0")),
            };
            let mut there =
                Process::start_in(namespace, directory, &name, &["receive", "--once", "--listen", &listen])?;
            let limit = Some(options.downtime_limit);
            let moving = Move { number, mode: *mode, kind: Kind::Plain, downtime_limit_ms: limit, quiet: true };
            let leg = travel(&moving, &mut here, &mut there, &ram).await?;
            way.blackout.push(Duration::from_micros(leg.blackout_us));
            way.gap.push(Duration::from_micros(leg.guest_gap_us));
            match &leg.job.postcopy {
                None => way.total.push(Duration::from_micros(leg.total_us)),
                Some(postcopy) => {
                    way.total.push(Duration::from_micros(leg.job.time_elapsed_us));
                    way.fault_p50.push(Duration::from_micros(postcopy.fault_p50_us));
                    way.fault_p99.push(Duration::from_micros(postcopy.fault_p99_us));
                    way.felt(&leg.touches);
                }
            }
            ram = ram_of(&there.wait_for(&[VmState::Running], START).await?)?;
            here.wait_for_end(START).await?;
            here = there;
        }
        if rivals.is_empty() {
            continue;
        }
        pause(&here).await?;
        for rival in &mut rivals {
            rival.travel(&guest, directory, number, options).await?;
        }
        resume(&here).await?;
    }
    let mut ways: Vec<_> = own.into_iter().map(|(_, way)| way).collect();
    ways.extend(rivals.into_iter().map(|rival| rival.way));
    Ok(ways)
}

fn network(shape: Shape) -> Result<Network> {
    match wherry_netlab::missing() {
        Some(what) => anyhow::bail!("--link: {what}"),
        None => Network::shaped(shape).context("--link: making a network"),
    }
}

impl Rival {
    async fn travel(&mut self, guest: &qemu::Guest<'_>, directory: &Path, number: u32, options: &Bench) -> Result<()> {
        let name = format!("{:?}-{number}", self.method);
        let mut there = qemu::Qemu::start(guest, directory, &name, true)?;
        self.here.execute("cont", serde_json::Value::Null)?;
        tokio::time::sleep(Duration::from_millis(500)).await;
        measure_anew(&self.ram).await?;
        let (pid, size) = (there.pid(), options.memory);
        let watcher =
            Watcher::start(self.ram.again()?, move || ProbeRam::find(pid, qemu::RAM_NAME, |ram| ram.size() == size))?;
        let migrated = self.here.migrate(&mut there, self.method, options.downtime_limit)?;
        let gap = watcher.finish(START)?;
        self.way.blackout.push(gap.blackout);
        self.ram = qemu_ram(&there, options.memory).await?;
        let beat = self.ram.heartbeat(0)?;
        let seen = wait_for(&self.ram, "go on", |s| s.cpus.first().is_some_and(|c| c.heartbeat > beat + 1)).await?;
        self.way.gap.push(Duration::from_nanos(seen.largest_gap_ns()));
        if self.method == qemu::Method::Postcopy {
            self.way.total.push(migrated.took);
            self.way.felt(&Touched::of(&seen, migrated.requests));
        } else {
            self.way.total.push(gap.at.saturating_duration_since(migrated.begin));
        }
        there.execute("stop", serde_json::Value::Null)?;
        self.here = there;
        Ok(())
    }
}

async fn qemu_ram(qemu: &qemu::Qemu, size: u64) -> Result<ProbeRam> {
    let deadline = Instant::now() + START;
    loop {
        if let Some(ram) = ProbeRam::find(qemu.pid(), qemu::RAM_NAME, |ram| ram.size() == size)? {
            return Ok(ram);
        }
        if Instant::now() >= deadline {
            anyhow::bail!("QEMU has made no RAM within {START:?}");
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn working(ram: &ProbeRam) -> Result<()> {
    use wherry_guest::report::Phase;
    wait_for(ram, "fill its data", |snapshot| snapshot.phase() >= Phase::Running).await.map(|_| ())
}

async fn pause(process: &Process) -> Result<()> {
    process.client.put::<serde_json::Value>("/vm/pause", ANSWER).await.context("pausing the VM").map(|_| ())
}

async fn resume(process: &Process) -> Result<()> {
    process.client.put::<serde_json::Value>("/vm/resume", ANSWER).await.context("resuming the VM").map(|_| ())
}

impl Results {
    /// For a person.
    fn text(&self) -> String {
        let bytes = report::bytes;
        let mut text = String::new();
        if let Some(engine) = &self.engine {
            text.push_str(&format!("\nEngine alone: {} of random data into fresh memory\n\n", bytes(self.data)));
            let time = |seconds: f64| report::time((seconds * 1e6) as u64);
            let of_raw = format!("{:.0} % of raw", engine.ratio * 100.0);
            text.push_str(&report::table(&[
                ["way", "median", "speed"].map(String::from).to_vec(),
                vec!["raw loopback TCP, 1 stream".into(), time(engine.raw_one_s), String::new()],
                vec!["raw loopback TCP, 2 streams".into(), time(engine.raw_two_s), String::new()],
                vec!["Wherry's engine, whole journey".into(), time(engine.engine_s), of_raw],
            ]));
        }
        text.push_str(&format!(
            "\n\nWhole guest: {} of data, {}/s of it rewritten",
            bytes(self.data),
            bytes(self.rate)
        ));
        match &self.link {
            None => text.push_str(&format!("; raw TCP beside it, 2 streams: {}", self.raw_beside_guest.text())),
            Some(link) => text.push_str(&format!(", over a link of {link}")),
        }
        text.push_str("\n\n");
        let mut rows = vec![
            ["median (least - most)", "command to running", "times", "blackout", "times"].map(String::from).to_vec(),
        ];
        let own = self.ways.first().cloned().unwrap_or_default();
        let times = |ratio: Option<f64>| ratio.map(|r| format!("{r:.1}")).unwrap_or_default();
        for way in &self.ways {
            rows.push(vec![
                way.name.clone(),
                way.total.text(),
                times(own.total.ratio(&way.total)),
                way.blackout.text(),
                times(own.blackout.ratio(&way.blackout)),
            ]);
        }
        text.push_str(&report::table(&rows));
        text.push('\n');
        for way in self.ways.iter().filter(|way| way.gap.median_us > 0) {
            text.push_str(&format!("\n{}: largest gap in the guest {}", way.name, way.gap.text()));
            if way.touch_p50.median_us > 0 {
                let (half, most) = (way.touch_p50.text(), way.touch_p99.text());
                text.push_str(&format!("\n  a page that is not there, as the guest feels it: p50 {half}, p99 {most}"));
            }
            if way.fault_p50.median_us > 0 {
                let (half, most) = (way.fault_p50.text(), way.fault_p99.text());
                text.push_str(&format!(
                    "\n  of that, from the event being read to the page visible: p50 {half}, p99 {most}"
                ));
            }
        }
        text.push_str(
            "\nWanted: 40 / 150 us as the guest feels it, 15 / 60 us from event to page, push at full rate beside.",
        );
        text.push_str("\nBy postcopy, command to running is until all memory is there.\n");
        text
    }
}
