//! What the demo has seen: as JSON, and as the table at its end.

use serde::Serialize;
use wherry_guest::snapshot::Snapshot;
use wherry_migration::progress::Job;

use super::accelerator::Jobs;
use crate::report;

/// What is special about a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Nothing.
    Plain,
    /// All RAM and state are hashed at both ends.
    Hashed,
    /// The guest runs at the destination first, and its memory follows.
    Postcopy,
    /// The same, and the link is cut meanwhile.
    Cut,
}

impl Kind {
    /// In brackets, for a table.
    pub fn remark(self) -> &'static str {
        match self {
            Kind::Plain => "",
            Kind::Hashed => " (hashed)",
            Kind::Postcopy => " (memory follows)",
            Kind::Cut => " (memory follows, link cut)",
        }
    }
}

/// One move.
#[derive(Clone, Debug, Serialize)]
pub struct Leg {
    /// From 1.
    pub number: u32,
    /// Process it left.
    pub from_pid: u32,
    /// Process it went to.
    pub to_pid: u32,
    /// What is special about it.
    pub kind: Kind,
    /// From the request to the first heartbeat at the destination, in microseconds.
    pub total_us: u64,
    /// From the request to its end, with all memory there, in microseconds.
    pub whole_us: u64,
    /// Blackout, measured from outside, in microseconds.
    pub blackout_us: u64,
    /// How far the blackout may be off, in microseconds.
    pub blackout_uncertain_us: u64,
    /// Largest gap between two heartbeats in the guest's own time during this leg, in microseconds.
    pub guest_gap_us: u64,
    /// Touches of pages that were not there, by postcopy.
    pub touches: Touched,
    /// The journey as the engine saw it.
    pub job: Job,
}

/// How long the guest waited for pages that were not there, in its own time: as many of its longest touches as the VMM says
/// had to wait. What else takes long makes these longer, never shorter.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Touched {
    /// How many had to wait.
    pub waited: u64,
    /// Half of them took no longer, in microseconds.
    pub p50_us: u64,
    /// 99 of 100 took no longer.
    pub p99_us: u64,
    /// The longest.
    pub max_us: u64,
}

impl Touched {
    /// What the guest reports, if so many of its touches had to wait.
    pub fn of(snapshot: &Snapshot, waited: u64) -> Self {
        if waited == 0 {
            return Self::default();
        }
        let touches = snapshot.touches();
        let at = |per_mille| touches.quantile_of_longest_ns(per_mille, waited) / 1000;
        Self { waited, p50_us: at(500), p99_us: at(990), max_us: touches.max_ns / 1000 }
    }
}

/// A new process that took the VM over with its memory.
#[derive(Clone, Debug, Serialize)]
pub struct Update {
    /// The process that had it.
    pub from_pid: u32,
    /// The new one.
    pub to_pid: u32,
    /// From the command to its answer, in microseconds.
    pub whole_us: u64,
    /// From the first vCPU told to stop until the new process runs the VM.
    pub blackout_us: u64,
    /// The longest that the guest itself saw nothing, from shortly before to shortly after.
    pub guest_gap_us: u64,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// RAM of the guest in bytes.
    pub memory: u64,
    /// Its data in bytes.
    pub data: u64,
    /// Bytes it writes per second.
    pub rate: u64,
    /// vCPUs.
    pub cpus: u32,
    /// The moves.
    pub legs: Vec<Leg>,
    /// Median of the blackouts of plain legs, in microseconds; of all, if none is.
    pub blackout_median_us: u64,
    /// The longest of them.
    pub blackout_max_us: u64,
    /// Median of the times until the guest ran there, of those legs.
    pub total_median_us: u64,
    /// Pages the guest has written since its start, beyond the first fill.
    pub pages_dirtied: u64,
    /// Pages the guest has checked from its start to the end of the last move.
    pub pages_verified: u64,
    /// Pages of its data, all of which it has checked once more at the end.
    pub data_pages: u64,
    /// Wrong pages it has found.
    pub errors: u64,
    /// How often its clock went backwards.
    pub clock_backwards: u64,
    /// The update of the last process, unless something of its VM cannot be kept.
    pub update: Option<Update>,
    /// What came of the accelerator, if there was one.
    pub accelerator: Option<Jobs>,
    /// How many threads of other programs wanted each core when the demo began, if it was more than half a thread.
    pub competition: Option<f64>,
    /// Whether every move succeeded and nothing was lost.
    pub ok: bool,
    /// What was wrong, if anything.
    pub complaint: Option<String>,
}

/// How many threads wanted each core lately, if it is enough to spoil a measurement.
pub fn competition() -> Option<f64> {
    let load: f64 = std::fs::read_to_string("/proc/loadavg").ok()?.split(' ').next()?.parse().ok()?;
    let cores = std::thread::available_parallelism().ok()?.get() as f64;
    Some(load / cores).filter(|threads| *threads > 0.5)
}

/// The middle one; of two, the larger.
pub fn median(values: impl IntoIterator<Item = u64>) -> u64 {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

impl Outcome {
    /// Fills in the figures over all legs.
    pub fn sum_up(&mut self) {
        let plain: Vec<_> = match self.legs.iter().filter(|l| l.kind == Kind::Plain).collect::<Vec<_>>() {
            none if none.is_empty() => self.legs.iter().collect(),
            plain => plain,
        };
        self.blackout_median_us = median(plain.iter().map(|l| l.blackout_us));
        self.blackout_max_us = plain.iter().map(|l| l.blackout_us).max().unwrap_or(0);
        self.total_median_us = median(plain.iter().map(|l| l.total_us));
    }

    /// For a person.
    pub fn text(&self) -> String {
        let head =
            ["move", "process", "moved", "rounds", "ran there", "all there", "blackout", "largest gap in the guest"];
        let mut rows = vec![head.map(String::from).to_vec()];
        for leg in &self.legs {
            rows.push(vec![
                format!("{}{}", leg.number, leg.kind.remark()),
                format!("{} -> {}", leg.from_pid, leg.to_pid),
                report::bytes(leg.job.data_processed),
                leg.job.rounds.len().to_string(),
                report::time(leg.total_us),
                report::time(leg.whole_us),
                report::time(leg.blackout_us),
                report::time(leg.guest_gap_us),
            ]);
        }
        let mut text = format!("\n{}\n", report::table(&rows));
        let page = wherry_memory::GRANULE;
        let moves = self.legs.len();
        let mut line = |name: &str, what: String| text.push_str(&format!("  {name:<14} {what}\n"));
        line(
            "What moved",
            format!(
                "a running VM: {} RAM, {} vCPU{}, {} of data, {}/s of it rewritten; {moves} time{} to a new process",
                report::bytes(self.memory),
                self.cpus,
                if self.cpus == 1 { "" } else { "s" },
                report::bytes(self.data),
                report::bytes(self.rate),
                if moves == 1 { "" } else { "s" },
            ),
        );
        line("How long", format!("{} for a whole move (median)", report::time(self.total_median_us)));
        line(
            "Guest felt",
            format!(
                "it stood still for {} (median; longest {}), measured from outside",
                report::time(self.blackout_median_us),
                report::time(self.blackout_max_us)
            ),
        );
        let uncertain =
            self.legs.iter().filter(|l| l.kind == Kind::Plain).map(|l| l.blackout_uncertain_us).max().unwrap_or(0);
        if uncertain > self.blackout_median_us / 5 {
            line("", format!("(coarse by up to {}: this machine is busy)", report::time(uncertain)));
        }
        if let Some(threads) = self.competition {
            line(
                "",
                format!("(others kept this machine busy, {threads:.1} threads a core: all times are longer for it)"),
            );
        }
        if self.legs.iter().any(|l| l.kind == Kind::Cut) {
            line("Link cut", "while memory followed: both ends paused, took the link up again and lost nothing".into());
        }
        if self.legs.iter().any(|l| l.kind == Kind::Hashed) {
            line("Hashed", "all RAM and state at both ends of the moves marked so; they were equal".into());
        }
        line(
            "Guest checked",
            format!(
                "{} pages while it moved, and all {} ({}) at the end; it rewrote {} meanwhile",
                self.pages_verified,
                self.data_pages,
                report::bytes(self.data_pages.saturating_mul(page)),
                report::bytes(self.pages_dirtied.saturating_mul(page)),
            ),
        );
        if let Some(update) = &self.update {
            let Update { from_pid, to_pid, whole_us, blackout_us, guest_gap_us } = update;
            line(
                "Updated",
                format!(
                    "process {from_pid} to {to_pid} in {}, memory kept: blackout {}, largest gap in the guest {}",
                    report::time(*whole_us),
                    report::time(*blackout_us),
                    report::time(*guest_gap_us),
                ),
            );
        }
        if let Some(jobs) = &self.accelerator {
            line("Accelerator", jobs.text());
        }
        match &self.complaint {
            None => line("Lost", "nothing: 0 wrong pages, its clock never went backwards".into()),
            Some(complaint) => line("NOT GOOD", complaint.clone()),
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leg(number: u32, blackout_us: u64, verified: bool) -> Leg {
        Leg {
            number,
            from_pid: 1,
            to_pid: 2,
            kind: if verified { Kind::Hashed } else { Kind::Plain },
            total_us: 1,
            whole_us: 1,
            blackout_us,
            blackout_uncertain_us: 0,
            guest_gap_us: 0,
            touches: Touched::default(),
            job: Job::default(),
        }
    }

    #[test]
    fn hashed_legs_do_not_count_as_ordinary_blackouts_unless_there_are_no_others() {
        let mut outcome = Outcome {
            memory: 1,
            data: 1,
            rate: 1,
            cpus: 1,
            legs: vec![leg(1, 5, false), leg(2, 7, false), leg(3, 6, false), leg(4, 900, true)],
            blackout_median_us: 0,
            blackout_max_us: 0,
            total_median_us: 0,
            pages_dirtied: 0,
            pages_verified: 0,
            data_pages: 0,
            errors: 0,
            clock_backwards: 0,
            update: None,
            accelerator: None,
            competition: None,
            ok: true,
            complaint: None,
        };
        outcome.sum_up();
        assert_eq!((outcome.blackout_median_us, outcome.blackout_max_us), (6, 7));
        assert!(outcome.text().contains("nothing: 0 wrong pages"));
        outcome.legs.retain(|l| l.kind == Kind::Hashed);
        outcome.complaint = Some("page 7 is wrong".into());
        outcome.sum_up();
        assert_eq!(outcome.blackout_median_us, 900);
        assert!(outcome.text().contains("NOT GOOD"));
    }
}
