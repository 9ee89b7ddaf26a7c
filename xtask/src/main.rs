//! `cargo xtask`: everything that is done to the project rather than by it.
//!
//! - [`suite`] runs `cargo test` and counts, with an earlier build of the program beside this one ([`previous`]); [`fuzz`] builds and runs the fuzz targets; [`lab`] runs Wherry with real
//!   Linux guests in a nested virtual machine. `cargo xtask test` is all three, with one closing line.
//! - [`debian`] installs what a machine lacks, [`process`] bounds everything that is started, [`tally`] counts.

mod debian;
mod fuzz;
mod lab;
mod previous;
mod process;
mod suite;
mod tally;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::{Parser, Subcommand, ValueEnum};

use crate::tally::Tally;

/// Project tasks of Wherry.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run all tests: cargo's, the sampled lab, the sampled fuzz targets.
    Test {
        /// Run only these parts.
        #[arg(long, value_enum)]
        only: Vec<Part>,
        /// Make a test that cannot run a failure (the default when CI=true).
        #[arg(long)]
        deny_skips: bool,
        /// Handed to the test binaries (a name filter, for example).
        #[arg(last = true)]
        filter: Vec<String>,
    },
    /// Run real Linux guests in Wherry, in an emulated machine (docs/lab.md).
    Lab {
        #[command(subcommand)]
        lab: lab::Lab,
    },
    /// Cut the link of VMs whose memory follows them, many times (docs/lab.md); `test` does a sample of it.
    Cuts {
        /// How often.
        #[arg(long, default_value_t = 100)]
        cuts: u32,
        /// Repeat the run that printed this seed.
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Update guests whose disk, network and device are at work many times in a row (docs/live-update.md); `test` does a sample of it.
    Updates {
        /// How often each.
        #[arg(long, default_value_t = 1000)]
        updates: u32,
        /// Only the guest whose test has this in its name: `by_msix`, `by_msi`, `pin`, `masks`.
        guest: Option<String>,
    },
    /// Run the accelerator's conformance list with a move before every call of each item, one run for each; `test` does a
    /// sample of it.
    Conformance {
        /// To each kind of host from every call, rather than to one by turns: four times as many runs.
        #[arg(long)]
        every_host: bool,
        /// Only items whose name has this.
        item: Option<String>,
    },
    /// Run the fuzz targets (fuzz/README.md).
    Fuzz {
        /// Time for all targets together.
        #[arg(long, default_value_t = FUZZ_SECONDS)]
        seconds: u64,
        /// Run only this target.
        #[arg(long)]
        target: Option<String>,
        /// Run the target on this input and no other.
        #[arg(long, requires = "target")]
        input: Option<PathBuf>,
    },
    /// Install the Debian packages that the tests need.
    Setup,
}

/// A part of `cargo xtask test`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// `cargo test` over the workspace.
    Cargo,
    /// The labs, sampled.
    Lab,
    /// The fuzz targets, sampled.
    Fuzz,
}

/// What all fuzz targets together get in `cargo xtask test`.
const FUZZ_SECONDS: u64 = 60;

/// The root of the workspace.
fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// A path below the target directory.
fn target(below: &str) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from).join(below)
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Test { only, deny_skips, filter } => test(&only, deny_skips || in_ci(), &filter),
        Task::Lab { lab } => lab::run(lab).map(|tally| finish(&tally, true)),
        Task::Fuzz { seconds, target, input } => match (target, input) {
            (Some(target), Some(input)) => fuzz::replay(&target, &input),
            (target, _) => fuzz::run(seconds, target.as_deref()),
        }
        .map(|tally| finish(&tally, true)),
        Task::Cuts { cuts, seed } => {
            debian::ensure(&debian::TESTS).and_then(|()| suite::cuts(cuts, seed)).map(|tally| finish(&tally, true))
        }
        Task::Updates { updates, guest } => debian::ensure(&debian::TESTS)
            .and_then(|()| suite::updates(updates, guest.as_deref()))
            .map(|tally| finish(&tally, true)),
        Task::Conformance { every_host, item } => {
            suite::conformance(every_host, item.as_deref()).map(|tally| finish(&tally, true))
        }
        Task::Setup => debian::ensure(&debian::TESTS).map(|()| true),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// True on a CI machine, where nothing may be skipped in silence.
fn in_ci() -> bool {
    std::env::var("CI").is_ok_and(|value| value == "true" || value == "1")
}

/// Runs the chosen parts (all of them if none is chosen) and prints the one summary.
fn test(only: &[Part], deny_skips: bool, filter: &[String]) -> Result<bool> {
    let mut all = Tally::default();
    let mut table = Vec::new();
    for part in Part::value_variants() {
        if !only.is_empty() && !only.contains(part) {
            continue;
        }
        println!("==== {part:?} ====");
        let start = Instant::now();
        let result = match part {
            Part::Lab => labs(),
            Part::Fuzz => fuzz::run(FUZZ_SECONDS, None),
            Part::Cargo => debian::ensure(&debian::TESTS).and_then(|()| suite::run(filter)),
        };
        let tally = result.unwrap_or_else(|error| {
            eprintln!("error: {error:#}");
            let mut tally = Tally::default();
            tally.fail(format!("{part:?}: {error:#}"));
            tally
        });
        table.push(format!("{:<8} {tally}  ({:.0} s)", format!("{part:?}"), start.elapsed().as_secs_f64()));
        all.add(tally);
    }
    println!("\n==== summary ====");
    for line in table {
        println!("{line}");
    }
    Ok(finish(&all, deny_skips))
}

/// The labs that are part of the tests.
fn labs() -> Result<Tally> {
    let mut all = lab::run(lab::Lab::Linux { full: false })?;
    all.add(lab::run(lab::Lab::Devices { full: false, vhost: false })?);
    all.add(lab::run(lab::Lab::Vfio { full: false })?);
    all.add(lab::run(lab::Lab::QemuFrontEnd { moves: 1 })?);
    Ok(all)
}

/// Prints what did not pass and the closing line; returns whether the whole is good.
fn finish(tally: &Tally, deny_skips: bool) -> bool {
    for line in &tally.said {
        println!("{line}");
    }
    for part in &tally.left_out {
        println!("no part of this run: {part}");
    }
    for skip in &tally.skips {
        println!("skipped: {skip}");
    }
    for failure in &tally.failures {
        println!("failed: {failure}");
    }
    let good = tally.is_good(deny_skips);
    if !good && tally.failures.is_empty() {
        println!("tests were skipped, and here that is a failure (CI=true or --deny-skips)");
    }
    println!("{tally}");
    good
}
