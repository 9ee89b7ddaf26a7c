//! The fuzz targets of `fuzz/`: build them with the stable toolchain, give each its share of the time.
//!
//! libFuzzer needs to see which paths an input takes. LLVM's coverage pass is reachable by stable flags, so neither a
//! nightly compiler nor `cargo-fuzz` is needed. See `fuzz/README.md`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::debian;
use crate::process::{Next, command, stream};
use crate::tally::Tally;

/// The target triple; named, so that build scripts and macros are not instrumented.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What makes a build a fuzz target: coverage counters, and overflows and wrong assumptions that panic.
const FLAGS: &str = "--cfg fuzzing -C passes=sancov-module -C llvm-args=-sanitizer-coverage-level=4 \
     -C llvm-args=-sanitizer-coverage-inline-8bit-counters -C llvm-args=-sanitizer-coverage-pc-table \
     -C llvm-args=-sanitizer-coverage-trace-compares -C debug-assertions=on -C overflow-checks=on -C codegen-units=1";

const BUILD_LIMIT: Duration = Duration::from_secs(20 * 60);

/// Time for one input; a decoder that needs longer hangs.
const INPUT_SECONDS: u32 = 10;

/// Memory for a target in MiB; a decoder that takes more trusts a length.
const MEMORY_MIB: u32 = 1024;

/// Runs the targets (all, or one) for `seconds` in all.
pub fn run(seconds: u64, only: Option<&str>) -> Result<Tally> {
    let targets = build(only)?;
    let share = (seconds / targets.len() as u64).max(2);
    let mut tally = Tally::default();
    for target in &targets {
        match run_one(target, share) {
            Ok(()) => tally.passed += 1,
            Err(error) => tally.fail(format!("fuzz {target}: {error:#}")),
        }
    }
    Ok(tally)
}

/// Runs one target on one input and shows what it says.
pub fn replay(target: &str, input: &Path) -> Result<Tally> {
    build(Some(target))?;
    let input = std::fs::canonicalize(input).with_context(|| format!("cannot find {}", input.display()))?;
    let mut fuzzer = command(binary(target));
    fuzzer.args(limits()).arg(&input);
    let ending = stream(fuzzer, Duration::from_secs(60), |line| {
        println!("{line}");
        Next::Continue
    })?;
    let mut tally = Tally::default();
    if ending.success() {
        tally.passed += 1;
    } else {
        tally.fail(format!("fuzz {target}: {} ends it: {ending}", input.display()));
    }
    Ok(tally)
}

/// Builds the targets and returns their names.
fn build(only: Option<&str>) -> Result<Vec<String>> {
    let targets = match only {
        Some(name) => vec![name.to_owned()],
        None => names(&home().join("fuzz_targets"))?,
    };
    ensure!(!targets.is_empty(), "there is no target in {}", home().display());
    debian::ensure(&debian::FUZZ)?;
    let mut cargo = command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["build", "--release", "--color", "never", "--target", TARGET, "--target-dir"])
        .arg(crate::target("fuzz"))
        .args(targets.iter().flat_map(|name| ["--bin", name]))
        .env("RUSTFLAGS", FLAGS)
        .current_dir(home());
    let ending = stream(cargo, BUILD_LIMIT, |line| {
        println!("{line}");
        Next::Continue
    })?;
    if !ending.success() {
        bail!(
            "cannot build the fuzz targets: cargo {ending}, see above; every target needs a [[bin]] in fuzz/Cargo.toml"
        );
    }
    Ok(targets)
}

/// Gives one target `seconds`, from the committed corpus and what earlier runs found.
fn run_one(target: &str, seconds: u64) -> Result<()> {
    let found = crate::target("fuzz-corpus").join(target);
    let seeds = home().join("corpus").join(target);
    let artifacts = home().join("artifacts").join(target);
    for dir in [&found, &artifacts] {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    ensure!(
        std::fs::read_dir(&seeds).is_ok_and(|mut entries| entries.next().is_some()),
        "it has no seeds; put some into {}",
        seeds.display()
    );
    let mut fuzzer = command(binary(target));
    fuzzer
        .args(limits())
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args([&found, &seeds]);
    let mut said = Vec::new();
    let limit = Duration::from_secs(seconds + 120);
    let ending = stream(fuzzer, limit, |line| {
        said.push(line.to_owned());
        Next::Continue
    })?;
    if ending.success() {
        let last = said.iter().rev().find(|line| line.contains("DONE")).map_or("", String::as_str);
        println!("fuzz {target}: {seconds} s: {}", last.trim());
        return Ok(());
    }
    for line in said {
        println!("fuzz {target}: {line}");
    }
    bail!("{ending}; the input is in {}, try: cargo xtask fuzz --target {target} --input FILE", artifacts.display())
}

/// Limits that hold for every input.
fn limits() -> [String; 2] {
    [format!("-timeout={INPUT_SECONDS}"), format!("-rss_limit_mb={MEMORY_MIB}")]
}

fn home() -> PathBuf {
    crate::root().join("fuzz")
}

fn binary(target: &str) -> PathBuf {
    crate::target("fuzz").join(TARGET).join("release").join(target)
}

/// The names of all targets, in order.
fn names(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(path.file_stem().and_then(|name| name.to_str()).map(str::to_owned));
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_file_has_a_binary_and_seeds() {
        let manifest = std::fs::read_to_string(home().join("Cargo.toml")).unwrap();
        let names = names(&home().join("fuzz_targets")).unwrap();
        assert!(!names.is_empty());
        for name in names {
            assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name} is in no [[bin]]");
            let seeds = std::fs::read_dir(home().join("corpus").join(&name));
            assert!(seeds.is_ok_and(|mut seeds| seeds.next().is_some()), "{name} has no seeds");
        }
    }
}
