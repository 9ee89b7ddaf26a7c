//! What a lab says about itself: lines on the outer serial port, read by the host.
//!
//! | line | meaning |
//! |---|---|
//! | `LAB PLAN a b c` | these checks will be reported; one that is not has failed |
//! | `LAB PASS a` | the check held |
//! | `LAB FAIL a: why` | it did not |
//! | `LAB SKIP a: why` | it cannot run here |
//! | `LAB END status` | the script is over |
//! | `LAB TICK` | the outer machine lives: printed every two seconds by its `init` |
//!
//! What is under test are programs that run *in* the outer machine. They cannot make its kernel panic or its clock
//! stand still; the emulator can, and now and then does (`docs/lab.md`). Such a run says nothing about them: see
//! [`Report::lost`].

use std::time::{Duration, Instant};

use crate::process::Ending;
use crate::tally::Tally;

/// Signs that the outer kernel itself, and with it everything the lab says, has come to grief.
const OUTER_TROUBLE: [&str; 4] = [PANIC, "BUG: ", "Out of memory: Killed", "soft lockup"];
const PANIC: &str = "Kernel panic";

/// An outer machine that has begun to tick and is silent for so long stands still.
const FROZEN: Duration = Duration::from_secs(45);

/// Collects a lab's lines.
#[derive(Debug)]
pub struct Report {
    lab: String,
    planned: Vec<String>,
    reported: Vec<String>,
    tally: Tally,
    ended: Option<String>,
    ticked: Option<Instant>,
    lost: Option<String>,
}

impl Report {
    /// A report of the lab of this name, of which nothing has been heard.
    pub fn new(lab: &str) -> Self {
        Self {
            lab: lab.to_owned(),
            planned: Vec::new(),
            reported: Vec::new(),
            tally: Tally::default(),
            ended: None,
            ticked: None,
            lost: None,
        }
    }

    /// Looks at the clock: true if the machine stands still and is to be killed.
    pub fn is_frozen(&mut self, now: Instant) -> bool {
        let silence = self.ticked.map(|last| now.saturating_duration_since(last)).filter(|silence| *silence > FROZEN);
        if let Some(silence) = silence {
            self.lost = Some(format!("it stood still for {} s", silence.as_secs()));
        }
        silence.is_some()
    }

    /// What became of the outer machine, if it was lost: its kernel panicked, or it stood still.
    pub fn lost(&self) -> Option<&str> {
        self.lost.as_deref()
    }

    /// Reads one line of the serial port.
    pub fn line(&mut self, line: &str) {
        if let Some(trouble) = OUTER_TROUBLE.iter().find(|trouble| line.contains(**trouble)) {
            self.tally.fail(format!("{}: outer kernel: {trouble}: {line}", self.lab));
            if *trouble == PANIC {
                self.lost = Some(line.to_owned());
            }
        }
        // A kernel message may have been caught on the same line, before ours.
        let Some(said) = line.find("LAB ").map(|at| line[at + 4..].trim_end()) else { return };
        if said == "TICK" {
            self.ticked = Some(Instant::now());
        }
        let Some((word, rest)) = said.split_once(' ') else { return };
        let (name, why) = rest.split_once(": ").unwrap_or((rest, "it did not say why"));
        match word {
            "PLAN" => self.planned.extend(rest.split_whitespace().map(str::to_owned)),
            "PASS" => {
                self.tally.passed += 1;
                self.reported.push(rest.trim().to_owned());
            }
            "FAIL" => {
                self.tally.fail(format!("{}: {name}: {why}", self.lab));
                self.reported.push(name.to_owned());
            }
            "SKIP" => {
                self.tally.skip(format!("{}: {name}: {why}", self.lab));
                self.reported.push(name.to_owned());
            }
            "END" => self.ended = Some(rest.trim().to_owned()),
            _ => {}
        }
    }

    /// The exit status of the lab's script, if it came to its end.
    pub fn status(&self) -> Option<&str> {
        self.ended.as_deref()
    }

    /// The count, when the machine has gone. Whatever was planned or expected and not heard of has failed.
    pub fn finish(mut self, ending: Ending, limit: Duration) -> Tally {
        for name in self.planned {
            if !self.reported.contains(&name) {
                self.tally.fail(format!("{}: {name}: never reported", self.lab));
            }
        }
        match (ending, self.ended) {
            (Ending::TimedOut, _) => self.tally.fail(format!("{}: still running after {limit:?}, killed", self.lab)),
            (_, None) => self.tally.fail(format!("{}: the machine went down ({ending}) in mid-script", self.lab)),
            (_, Some(status)) if status != "0" && self.tally.failures.is_empty() => {
                self.tally.fail(format!("{}: the script ended with status {status}", self.lab));
            }
            _ => {}
        }
        self.tally
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;

    fn read(text: &str, ending: Ending) -> Tally {
        let mut report = Report::new("x");
        text.lines().for_each(|line| report.line(line));
        report.finish(ending, Duration::from_secs(9))
    }

    fn off() -> Ending {
        Ending::Exited(ExitStatus::from_raw(0))
    }

    #[test]
    fn passes_failures_and_skips_are_counted_by_name() {
        let tally = read(
            "LAB PLAN a b c\n[ 1.0] noise LAB PASS a\nLAB FAIL b: wrong: very\nLAB SKIP c: no disk\nLAB END 1\n",
            off(),
        );
        assert_eq!(tally.to_string(), "1 passed, 1 failed, 1 skipped");
        assert_eq!(tally.failures, ["x: b: wrong: very"]);
        assert_eq!(tally.skips, ["x: c: no disk"]);
    }

    #[test]
    fn a_planned_check_that_is_never_reported_has_failed() {
        let tally = read("LAB PLAN a b\nLAB PASS a\nLAB END 0\n", off());
        assert_eq!(tally.failures, ["x: b: never reported"]);
    }

    #[test]
    fn a_machine_that_stops_in_mid_script_or_overstays_has_failed() {
        assert_eq!(read("LAB PASS a\n", off()).failures.len(), 1);
        assert_eq!(read("LAB PASS a\nLAB END 0\n", Ending::TimedOut).failures.len(), 1);
        assert_eq!(read("LAB PASS a\nLAB END 0\n", off()).failures.len(), 0);
        assert_eq!(read("LAB END 7\n", off()).failures, ["x: the script ended with status 7"]);
    }

    #[test]
    fn a_machine_that_panics_or_stands_still_is_lost_and_one_that_works_or_is_slow_to_start_is_not() {
        let mut report = Report::new("x");
        assert!(!report.is_frozen(Instant::now() + 10 * FROZEN));
        report.line("[  3.0] noise LAB TICK");
        assert!(!report.is_frozen(Instant::now()));
        assert_eq!(report.lost(), None);
        assert!(report.is_frozen(Instant::now() + 2 * FROZEN));
        assert!(report.lost().is_some());

        let mut report = Report::new("x");
        report.line("[   45.0] Kernel panic - not syncing: corrupted stack end detected inside scheduler");
        assert!(report.lost().is_some());
        // A kernel that goes on has not lost anything: what it says counts.
        let mut report = Report::new("x");
        report.line("[   45.0] BUG: unable to handle page fault");
        assert_eq!(report.lost(), None);
    }

    #[test]
    fn trouble_in_the_outer_kernel_is_a_failure_of_the_lab() {
        let tally = read("[   9.1] BUG: unable to handle page fault\nLAB END 0\n", off());
        assert_eq!(tally.failures.len(), 1);
    }
}
