//! `cargo test` over the workspace: run it, show everything it prints, count what it says.
//!
//! The counts come from the output of the standard test harness. A test that cannot run on this machine prints a
//! line that starts with `SKIPPED` and returns; the harness calls that "ok", here it is counted as skipped. One that is no part of
//! a run prints `LEFT OUT` and returns, and is not counted at all.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::previous::{self, Previous};
use crate::process::{Ending, Next, command, stream};
use crate::tally::Tally;

/// More than any machine we know needs to build and run all tests; a hang ends here.
const LIMIT: Duration = Duration::from_secs(40 * 60);

/// Runs every test of the workspace, with `filter` handed to the test harness.
pub fn run(filter: &[String]) -> Result<Tally> {
    let mut cargo = cargo_test();
    cargo.args(["--workspace", "--no-fail-fast", "--", "--show-output"]).args(filter);
    let previous = previous::program();
    if let Ok(Previous::Built(program)) = &previous {
        cargo.env("WHERRY_PREVIOUS", program);
    }
    let mut tally = counted(cargo)?;
    match previous {
        Ok(Previous::Built(_)) => {}
        Ok(Previous::LeftOut(why)) => tally.left_out.push(format!("tests with an earlier build: {why}")),
        Err(error) => tally.fail(format!("the program of an earlier build: {error:#}")),
    }
    Ok(tally)
}

/// Runs the test that cuts links, with so many cuts.
pub fn cuts(cuts: u32, seed: Option<u64>) -> Result<Tally> {
    let mut cargo = cargo_test();
    cargo.args(["-p", "wherry", "--test", "cuts", "--", "--show-output"]).env("WHERRY_CUTS", cuts.to_string());
    if let Some(seed) = seed {
        cargo.env("WHERRY_CUTS_SEED", seed.to_string());
    }
    counted(cargo)
}

/// Runs the tests that update guests in a row, so often.
pub fn updates(updates: u32, guest: Option<&str>) -> Result<Tally> {
    let mut cargo = cargo_test();
    cargo.args(["-p", "wherry", "--test", "update_everything", "--", "--show-output", "--test-threads", "1"]);
    cargo.args(guest).env("WHERRY_UPDATES", updates.to_string());
    counted(cargo)
}

/// Runs the conformance list of the accelerator with every move, optimised: there are thousands of runs.
pub fn conformance(every_host: bool, item: Option<&str>) -> Result<Tally> {
    let mut cargo = cargo_test();
    cargo
        .args(["--release", "-p", "wherry-accel", "--test", "conformance", "--"])
        .args(item)
        .env("WHERRY_ACCEL_MOVES", if every_host { "all" } else { "each" });
    counted(cargo)
}

fn cargo_test() -> Command {
    let mut cargo = command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["test", "--color", "never"]).current_dir(crate::root());
    cargo
}

fn counted(cargo: Command) -> Result<Tally> {
    let mut count = Count::default();
    let ending = stream(cargo, LIMIT, |line| {
        println!("{line}");
        count.line(line);
        Next::Continue
    })?;
    Ok(count.finish(ending))
}

/// So many lines of what a failed test printed are said again at the end, from a few before it panicked on.
const SAID: usize = 24;
const BEFORE: usize = 4;

/// Which part of a test binary's report the lines are in.
#[derive(Debug, Default, PartialEq, Eq)]
enum Section {
    /// Between reports, or in the list of results.
    #[default]
    Results,
    /// Captured output of one test; the flag says whether it was counted as skipped or left out.
    Output { test: String, counted: bool },
}

/// Reads the lines of `cargo test` and counts.
#[derive(Debug, Default)]
struct Count {
    tally: Tally,
    binary: String,
    section: Section,
    failing: bool,
    /// What the failed test that is being reported has printed.
    output: Vec<String>,
    /// Tests that the harness calls passed and that only said why they could not run, or are not to.
    unheld: u64,
    started: u64,
    reported: u64,
}

impl Count {
    fn line(&mut self, line: &str) {
        let trimmed = line.trim();
        if let Some(rest) = trimmed.strip_prefix("Running ").or_else(|| trimmed.strip_prefix("Doc-tests ")) {
            self.binary = rest.split(" (").next().unwrap_or(rest).to_owned();
            self.started += 1;
            self.end_section();
        } else if let Some(name) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            self.end_section();
            self.section = Section::Output { test: name.to_owned(), counted: false };
        } else if line == "successes:" || line == "failures:" {
            self.end_section();
            self.failing = line == "failures:";
        } else if let Some(result) = line.strip_prefix("test result: ") {
            self.result(result);
        } else if line.starts_with("SKIPPED") {
            self.skipped(line);
        } else if line.starts_with("LEFT OUT") {
            self.left_out();
        } else if let Some(name) = line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED")) {
            self.tally.fail(format!("{}: {name}", self.binary));
        } else if let Some((name, why)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ignored")) {
            self.tally.skip(format!("{}: {name}: ignored{why}", self.binary));
        } else if self.failing && !line.is_empty() && matches!(self.section, Section::Output { .. }) {
            self.output.push(line.to_owned());
        }
    }

    /// What matters of the output of a failed test is kept.
    fn end_section(&mut self) {
        let output = std::mem::take(&mut self.output);
        if let Section::Output { test, .. } = std::mem::take(&mut self.section)
            && self.failing
        {
            let panic = output.iter().position(|line| line.contains(" panicked at ")).unwrap_or(output.len());
            let lines = output.into_iter().skip(panic.saturating_sub(BEFORE));
            self.tally.said.push(format!("---- {}: {test}", self.binary));
            self.tally.said.extend(lines.take_while(|line| line != "stack backtrace:").take(SAID));
        }
    }

    fn skipped(&mut self, line: &str) {
        if let Section::Output { test, counted } = &mut self.section {
            // One test is one skip, however often it says so; and a test that failed is a failure.
            if !*counted && !self.failing {
                *counted = true;
                self.tally.skip(format!("{}: {test}: {line}", self.binary));
                self.unheld += 1;
            }
        }
    }

    fn left_out(&mut self) {
        if let Section::Output { counted, .. } = &mut self.section
            && !*counted
            && !self.failing
        {
            *counted = true;
            self.unheld += 1;
        }
    }

    /// `ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s`
    fn result(&mut self, result: &str) {
        self.reported += 1;
        self.end_section();
        self.failing = false;
        for part in result.split([';', '.']) {
            if let Some((number, "passed")) = part.trim().split_once(' ') {
                self.tally.passed += number.parse::<u64>().unwrap_or(0);
            }
        }
    }

    fn finish(mut self, ending: Ending) -> Tally {
        self.tally.passed = self.tally.passed.saturating_sub(self.unheld);
        if ending.success() {
            return self.tally;
        }
        if ending == Ending::TimedOut {
            self.tally.fail(format!("cargo test: still running after {LIMIT:?}, in {}", self.binary));
        } else if self.started > self.reported {
            // A binary that died (signal, exit) prints no result line.
            self.tally.fail(format!("cargo test: {} test binaries died", self.started - self.reported));
        } else if self.tally.failures.is_empty() {
            self.tally.fail(format!("cargo test: {ending}; the build failed, see above"));
        }
        self.tally
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;

    fn counted(text: &str, ok: bool) -> Tally {
        let mut count = Count::default();
        text.lines().for_each(|line| count.line(line));
        count.finish(Ending::Exited(ExitStatus::from_raw(if ok { 0 } else { 101 << 8 })))
    }

    const GOOD: &str = "\
     Running unittests src/lib.rs (target/debug/deps/a-1)

running 3 tests
test one ... ok
test two ... ok
test three ... ignored, needs a moon

successes:

---- one stdout ----
SKIPPED: no /dev/kvm
SKIPPED: really

successes:
    one
    two

test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s

   Doc-tests a

running 4 tests
test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.10s
";

    #[test]
    fn a_test_that_says_skipped_counts_once_and_not_as_passed() {
        let tally = counted(GOOD, true);
        assert_eq!(tally.to_string(), "5 passed, 0 failed, 2 skipped");
        assert!(tally.skips.iter().any(|skip| skip.contains("one: SKIPPED: no /dev/kvm")), "{tally:?}");
        assert!(tally.skips.iter().any(|skip| skip.contains("three: ignored, needs a moon")), "{tally:?}");
    }

    #[test]
    fn a_test_that_is_left_out_is_neither_passed_nor_skipped() {
        let tally =
            counted(&GOOD.replace("SKIPPED: no", "LEFT OUT one: no").replace("SKIPPED: really", "LEFT OUT"), true);
        assert_eq!(tally.to_string(), "5 passed, 0 failed, 1 skipped");
    }

    #[test]
    fn a_failed_test_is_named_with_its_binary_and_its_skips_do_not_count() {
        let text = "\
     Running tests/wire.rs (target/debug/deps/wire-2)
test decodes ... ok
test encodes ... FAILED

failures:

---- encodes stdout ----
1
2
3
4
5
SKIPPED: half of it

thread 'encodes' panicked at tests/wire.rs:3:4:
7 is not 8
stack backtrace:
   0: rust_begin_unwind

failures:
    encodes

test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";
        let tally = counted(text, false);
        assert_eq!(tally.to_string(), "1 passed, 1 failed, 0 skipped");
        assert_eq!(tally.failures, ["tests/wire.rs: encodes"]);
        let panicked = "thread 'encodes' panicked at tests/wire.rs:3:4:";
        assert_eq!(tally.said, ["---- tests/wire.rs: encodes", "2", "3", "4", "5", panicked, "7 is not 8"]);
    }

    #[test]
    fn a_binary_that_dies_without_a_result_is_a_failure() {
        let text = format!("{GOOD}     Running tests/crash.rs (target/debug/deps/crash-3)\ntest boom ...\n");
        let tally = counted(&text, false);
        assert_eq!(tally.failures, ["cargo test: 1 test binaries died"]);
    }

    #[test]
    fn a_build_that_fails_is_a_failure() {
        let tally = counted("error: could not compile `a`\n", false);
        assert_eq!(tally.to_string(), "0 passed, 1 failed, 0 skipped");
    }
}
