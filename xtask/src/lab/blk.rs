//! `lab blk`: what the disk of a guest of Wherry does beside that of one of QEMU, which runs in the same outer machine, on the
//! same KVM, with the same kernel, root, file and fio.
//!
//! The work is done inside the outer machine by the `lab-agent` (see `xtask/agent/src/blk.rs`). It is no test: everything is
//! emulated, and what counts are the ratios.

use std::time::Duration;

use anyhow::Result;

use super::Outer;
use super::images::Content;
use crate::tally::Tally;

/// It takes less than half of this on a machine that does nothing else.
const LIMIT: Duration = Duration::from_secs(30 * 60);

/// Runs the lab.
pub fn run() -> Result<Tally> {
    let binaries = vec!["lab-agent", "wherry"];
    let script = "lab-agent blk".to_owned();
    let content = Content { script, binaries, devices: true, qemu: true, ..Content::default() };
    Outer::prepare("blk", &content)?.run(LIMIT)
}
