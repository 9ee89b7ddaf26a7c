//! Figures as people read them.

use std::fmt::Write;

use wherry_migration::progress::{Blackout, Device, Faults, Job, Latency, Phase, Postcopy};
use wherry_vmm::api::types::{BalloonInfo, DeviceInfo, DeviceState, UpdateInfo, VmInfo};

/// Bytes with a binary unit.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n} B"),
        _ if value < 10.0 => format!("{value:.2} {}", UNITS[unit]),
        _ if value < 100.0 => format!("{value:.1} {}", UNITS[unit]),
        _ => format!("{value:.0} {}", UNITS[unit]),
    }
}

/// A time in the unit that suits it.
pub fn time(us: u64) -> String {
    match us {
        0..1000 => format!("{us} us"),
        1000..1_000_000 => format!("{:.2} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

/// Bytes per second.
pub fn rate(bytes_moved: u64, us: u64) -> String {
    match us {
        0 => "-".into(),
        _ => format!("{}/s", bytes((bytes_moved as f64 * 1e6 / us as f64) as u64)),
    }
}

/// The word of a phase, as in JSON.
pub fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::None => "none",
        Phase::Setup => "setup",
        Phase::Precopy => "precopy",
        Phase::Switchover => "switchover",
        Phase::Postcopy => "postcopy",
        Phase::Paused => "paused",
        Phase::InDoubt => "in doubt",
        Phase::Done => "done",
        Phase::Cancelled => "cancelled",
        Phase::Failed => "failed",
    }
}

/// Columns of text, each as wide as it must be; the first is flush left, the others right.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|c| rows.iter().filter_map(|r| r.get(c)).map(|cell| cell.chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::from(" ");
        for (c, cell) in row.iter().enumerate() {
            let _ = match c {
                0 => write!(line, " {cell:<width$}", width = widths[c]),
                _ => write!(line, "   {cell:>width$}", width = widths[c]),
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// The rounds of a journey, for a table.
fn rounds(job: &Job) -> Vec<Vec<String>> {
    let head = ["round", "pages", "zero", "on the wire", "time", "rate", "dirtied", "throttle"];
    let mut rows = vec![head.map(String::from).to_vec()];
    for round in &job.rounds {
        rows.push(vec![
            round.number.to_string(),
            round.pages.to_string(),
            round.zero_pages.to_string(),
            bytes(round.bytes),
            time(round.duration_us),
            rate(round.bytes, round.duration_us),
            format!("{}/s", bytes(round.dirty_rate.saturating_mul(job.memory_page_size))),
            match round.throttle {
                0 => "-".into(),
                percent => format!("{percent} %"),
            },
        ]);
    }
    rows
}

/// What each device took of the blackout, for a table.
fn devices(devices: &[Device]) -> Vec<Vec<String>> {
    let head = ["device", "stop", "save", "load", "start", "state", "of it early"];
    let mut rows = vec![head.map(String::from).to_vec()];
    rows.extend(devices.iter().map(|d| {
        let times = [d.stop_us, d.save_us, d.load_us, d.start_us].map(time);
        let sizes = [d.bytes, d.early_bytes].map(bytes);
        [&[d.name.clone()][..], &times, &sizes].concat()
    }));
    rows
}

/// Whether a journey that failed has cost the VM, which the engine says in words.
fn is_lost(job: &Job) -> bool {
    job.error.as_ref().is_some_and(|error| error.starts_with("the VM is lost"))
}

/// How it is, or was, while memory follows. At the source, while it goes on, only what is asked of it is known.
fn postcopy(p: &Postcopy) -> String {
    let mut text = format!("  postcopy {}", time(p.duration_us));
    if p.remaining_pages > 0 {
        let _ = write!(text, ", {} left", bytes(p.remaining_bytes));
    }
    let _ = writeln!(
        text,
        ": {} requests for {} pages, {} answered; {} of {} neighbours asked for were touched",
        p.requests, p.pages_asked, p.pages_answered, p.prefetch_hits, p.prefetched
    );
    if p.faults == 0 && p.sources.is_empty() {
        return text;
    }
    let row = |name: String, faults: String, p50: u64, p99: u64, max: u64| {
        vec![format!("  {name}"), faults, time(p50), time(p99), time(max)]
    };
    let one = |name: String, f: &Faults| row(name, f.faults.to_string(), f.p50_us, f.p99_us, f.max_us);
    let part = |name: &str, l: &Latency| row(format!("  {name}"), String::new(), l.p50_us, l.p99_us, l.max_us);
    let mut rows = vec![
        ["", "page faults", "half within", "99 % within", "longest"].map(String::from).to_vec(),
        row("guest".into(), p.faults.to_string(), p.fault_p50_us, p.fault_p99_us, p.fault_max_us),
        part("until asked for", &p.queue),
        part("until it has come", &p.wire),
        part("until it is seen", &p.placement),
    ];
    rows.extend(p.vcpus.iter().map(|vcpu| one(format!("vCPU {}", vcpu.index), &vcpu.faults)));
    if p.kernel_workers.faults.faults > 0 {
        let name = format!("{} kernel workers", p.kernel_workers.workers);
        rows.push(one(name, &p.kernel_workers.faults));
    }
    if p.other_threads.faults > 0 {
        rows.push(one("other threads".into(), &p.other_threads));
    }
    rows.extend(p.sources.iter().map(|source| one(source.name.clone(), &source.faults)));
    text.push_str(&table(&rows));
    if p.local > 0 {
        let _ =
            writeln!(text, "    {} of the guest's faults found their page there; they are in no time above", p.local);
    }
    for source in &p.sources {
        if let Some(why) = &source.quarantined {
            let _ = writeln!(text, "    {} is served no longer: {why}", source.name);
        }
    }
    text
}

/// The end of a journey.
pub fn journey(job: &Job) -> String {
    let mut text = String::new();
    let _ = match job.phase {
        Phase::Done => writeln!(
            text,
            "The VM has moved to {} in {}; the guest stood still for {}.",
            job.peer,
            time(job.time_elapsed_us),
            time(job.downtime_us)
        ),
        Phase::Cancelled => writeln!(text, "The migration was cancelled; the VM runs on where it was."),
        Phase::Failed if is_lost(job) => writeln!(text, "The VM is lost."),
        Phase::Failed => writeln!(text, "The migration failed; the VM runs on where it was."),
        Phase::Paused => {
            writeln!(text, "The VM runs at {}, and the link was lost before all of its memory was there.", job.peer)
        }
        Phase::InDoubt => {
            writeln!(text, "The VM is in doubt: it was given away, and nobody knows whether it was taken.")
        }
        other => writeln!(text, "The migration is in phase {}.", phase(other)),
    };
    if let Some(error) = &job.error {
        let _ = writeln!(text, "  reason: {error}");
    }
    if job.rounds.is_empty() && job.postcopy.is_none() {
        return text;
    }
    text.push('\n');
    if !job.rounds.is_empty() {
        text.push_str(&table(&rounds(job)));
    }
    let _ = writeln!(
        text,
        "\n  moved {} in all: {} pages with content ({}), {} zero pages, over {} data channel{}",
        bytes(job.data_processed),
        job.memory_normal,
        bytes(job.memory_normal_bytes),
        job.memory_constant,
        job.channels,
        if job.channels == 1 { "" } else { "s" },
    );
    if let Some(b) = &job.blackout {
        let _ = writeln!(
            text,
            "  blackout {} us: stop {}, last pages {}, state {}, network {}, load {}, start {}",
            b.total_us, b.stop_us, b.last_pages_us, b.state_us, b.network_us, b.load_us, b.start_us
        );
    }
    if !job.devices.is_empty() {
        text.push_str(&table(&devices(&job.devices)));
    }
    if let Some(figures) = &job.postcopy {
        text.push_str(&postcopy(figures));
    }
    if job.io_stall_us > 0 {
        let _ = writeln!(text, "  devices waited {} before the blackout", time(job.io_stall_us));
    }
    text
}

/// A balloon as `balloon` shows it.
pub fn balloon(info: &BalloonInfo) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "memory     {}", bytes(info.memory));
    let _ = writeln!(text, "wanted     {}", bytes(info.size));
    let _ = writeln!(text, "actual     {}", bytes(info.actual));
    if let Some(free) = info.statistics.free {
        let _ = writeln!(text, "free       {}, as the guest has last told", bytes(free));
    }
    text
}

/// An update that has happened.
pub fn updated(info: &UpdateInfo, what: &str) -> String {
    let job = &info.job;
    let mut text = String::new();
    let _ = writeln!(text, "process {} has taken the {what} over ({})", info.pid, job.peer);
    let _ = writeln!(text, "blackout   {}", time(job.downtime_us));
    if let Some(parts) = &job.blackout {
        let Blackout { stop_us, state_us, network_us, load_us, start_us, .. } = *parts;
        let _ = writeln!(
            text,
            "           stop {}, save {}, pass {}, load {}, start {}",
            time(stop_us),
            time(state_us),
            time(network_us),
            time(load_us),
            time(start_us)
        );
    }
    text
}

/// A VM as `status` shows it.
pub fn status(info: &VmInfo, devices: &[DeviceInfo], job: &Job) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "state      {}", info.state);
    if let Some(reason) = &info.reason {
        let _ = writeln!(text, "reason     {reason}");
    }
    if let Some(listen) = &info.listen {
        let _ = writeln!(text, "listening  {listen}");
    }
    if let Some(vm) = &info.vm {
        let _ = writeln!(text, "name       {}", vm.name);
        let _ = writeln!(text, "id         {}", vm.id);
        let _ = writeln!(text, "vCPUs      {} ({})", vm.cpus, vm.cpu_model);
        let _ = writeln!(text, "memory     {}", bytes(vm.memory));
    }
    for (n, device) in devices.iter().enumerate() {
        let DeviceInfo { name, address, connected_to, .. } = device;
        let state = match device.state {
            DeviceState::Present => "",
            DeviceState::Unplugging => ", the guest is asked to let it go",
            DeviceState::Ejected => ", the guest has let it go",
        };
        let head = if n == 0 { "devices" } else { "" };
        let _ = writeln!(text, "{head:<10} {name} at {address}, {connected_to}{state}");
    }
    let _ = writeln!(text, "process    {} (wherry {})", info.pid, info.version);
    if job.phase != Phase::None {
        let is_update = job.mode == "update";
        let doing = if is_update { "update" } else { "migration" };
        let _ = writeln!(text, "{doing:<10} {} as {}, peer {}", phase(job.phase), job.role, job.peer);
        // In an update no memory moves.
        if !is_update {
            let _ = writeln!(
                text,
                "           {} of {} moved, {} left, {} a second, round {}, {} since it began",
                bytes(job.data_processed),
                bytes(job.data_total),
                bytes(job.data_remaining),
                bytes(job.memory_bps),
                job.memory_iteration,
                time(job.time_elapsed_us)
            );
        }
        if let Some(error) = &job.error {
            let _ = writeln!(text, "           {error}");
        }
        if let Some(figures) = &job.postcopy {
            text.push_str(&postcopy(figures));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use wherry_migration::progress::{Blackout, Round, SourceFaults, VcpuFaults, WorkerFaults};

    #[test]
    fn figures_have_the_unit_that_suits_them() {
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(1536), "1.50 KiB");
        assert_eq!(bytes(512 << 20), "512 MiB");
        assert_eq!(bytes(u64::MAX), "16384 PiB");
        assert_eq!((time(999), time(1500), time(2_000_000)), ("999 us".into(), "1.50 ms".into(), "2.00 s".into()));
        assert_eq!((rate(1 << 20, 0), rate(1 << 20, 500_000)), ("-".into(), "2.00 MiB/s".into()));
    }

    #[test]
    fn the_report_of_postcopy_names_each_who_faulted_and_leaves_out_who_did_not() {
        let faults = |n| Faults { faults: n, p50_us: n + 1, p99_us: n + 2, max_us: n + 3 };
        let mut figures = Postcopy {
            duration_us: 312_000,
            remaining_pages: 256,
            remaining_bytes: 1 << 20,
            faults: 900,
            local: 77,
            requests: 61,
            vcpus: vec![VcpuFaults { index: 5, faults: faults(100) }],
            sources: vec![SourceFaults {
                name: "disk".into(),
                faults: faults(300),
                quarantined: Some("it lied".into()),
            }],
            ..Postcopy::default()
        };
        let job = |figures: &Postcopy| Job { postcopy: Some(figures.clone()), ..Job::default() };
        let text = journey(&job(&figures));
        for part in
            ["312.00 ms, 1.00 MiB left: 61 requests", "vCPU 5", "103 us", "disk", "303 us", "it lied", "77 of the"]
        {
            assert!(text.contains(part), "no {part:?} in {text}");
        }
        assert!(!text.contains("kernel workers") && !text.contains("other threads"), "{text}");
        figures.kernel_workers = WorkerFaults { workers: 3, faults: faults(7) };
        figures.other_threads = faults(8);
        let text = journey(&job(&figures));
        assert!(text.contains("3 kernel workers") && text.contains("other threads"), "{text}");
        // The source knows no more while it goes on.
        let source = journey(&job(&Postcopy { requests: 61, remaining_pages: 1, ..Postcopy::default() }));
        assert!(source.contains("61 requests") && !source.contains("longest"), "{source}");
    }

    #[test]
    fn the_report_of_a_journey_names_rounds_blackout_and_reason() {
        let job = Job {
            phase: Phase::Done,
            peer: "tcp:h:1".into(),
            rounds: vec![Round { number: 1, pages: 262_144, zero_pages: 100_000, ..Round::default() }],
            blackout: Some(Blackout { total_us: 1234, ..Blackout::default() }),
            devices: vec![Device { name: "vfio-user:/d".into(), save_us: 2500, bytes: 3 << 20, ..Device::default() }],
            ..Job::default()
        };
        let text = journey(&job);
        assert!(text.contains("tcp:h:1") && text.contains("262144") && text.contains("blackout 1234 us"), "{text}");
        assert!(text.contains("vfio-user:/d") && text.contains("2.50 ms") && text.contains("3.00 MiB"), "{text}");
        let failed = journey(&Job { phase: Phase::Failed, error: Some("no route".into()), ..Job::default() });
        assert!(failed.contains("runs on where it was") && failed.contains("no route"), "{failed}");
    }
}
