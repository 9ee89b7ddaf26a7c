//! `lab qemu-front-end`: a stock Debian kernel in QEMU, which emulates its processor, with its root on a disk that
//! `wherry device blk` serves: QEMU is the front end, and moves it between its processes while fio verifies what it writes.
//!
//! Nothing is nested here. The work is done by the `lab-agent` (see `xtask/agent/src/front_end.rs`), on this machine.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::images::{Images, binaries};
use super::report::Report;
use super::{home, lock};
use crate::process::{Ending, Next, command, watch};
use crate::tally::Tally;

/// Twice what a busy machine was seen to need to boot, and for the last pass of fio.
const LIMIT: Duration = Duration::from_secs(5 * 60);
/// For a move in each way.
const MOVES_LIMIT: Duration = Duration::from_secs(90);

/// Runs the lab, with so many moves in each way.
pub fn run(moves: u32) -> Result<Tally> {
    // Not in the lab's directory: a socket's path is short.
    let directory = tempfile::Builder::new().prefix("wherry-lab-").tempdir().context("cannot make a directory")?;
    let image = directory.path().join("root.img");
    let (wherry, agent, guest) = {
        let _building = lock()?;
        let guest = Images::prepare()?.disk_guest()?;
        std::fs::copy(&guest.image, &image).with_context(|| format!("cannot copy {}", guest.image.display()))?;
        let mut built = binaries(&["wherry", "lab-agent"])?.into_iter();
        (built.next().unwrap_or_default(), built.next().unwrap_or_default(), guest)
    };
    let mut agent = command(agent);
    agent.arg("qemu-front-end").arg("--wherry").arg(wherry).arg("--kernel").arg(guest.kernel).arg("--initrd");
    agent.arg(guest.initrd).arg("--image").arg(&image).arg("--directory").arg(directory.path());
    agent.arg("--moves").arg(moves.to_string());
    let limit = LIMIT + MOVES_LIMIT * moves;
    let (log, start) = (home().join("qemu-front-end.log"), Instant::now());
    let mut said = String::new();
    let mut report = Report::new("lab qemu-front-end");
    let ending = watch(agent, limit, |line| {
        if let Some(line) = line {
            println!("{:6.1} {line}", start.elapsed().as_secs_f64());
            said.push_str(line);
            said.push('\n');
            report.line(line);
        }
        Next::Continue
    })?;
    std::fs::write(&log, said).with_context(|| format!("cannot write {}", log.display()))?;
    if let Ending::Exited(status) = ending {
        report.line(&format!("LAB END {}", status.code().map_or_else(|| status.to_string(), |code| code.to_string())));
    }
    println!("lab qemu-front-end: {ending} after {:.1} s; log in {}", start.elapsed().as_secs_f64(), log.display());
    Ok(report.finish(ending, limit))
}
