//! `lab devices`: a stock Debian kernel in Wherry, its root on a virtio disk and a network device on a tap, moved while
//! a shell writes and reads files, ping waits for answers and a TCP connection carries data.
//!
//! The work is done inside the outer machine by the `lab-agent` (see `xtask/agent`).

use std::time::Duration;

use anyhow::Result;

use super::Outer;
use super::images::Content;
use crate::tally::Tally;

/// Everything is emulated twice; this is several times what it takes.
const LIMIT: Duration = Duration::from_secs(15 * 60);
const FULL_LIMIT: Duration = Duration::from_secs(30 * 60);

/// Runs the lab; `full` for more moves than a change is tested with.
pub fn run(full: bool) -> Result<Tally> {
    let (script, limit) = if full { ("lab-agent devices --full", FULL_LIMIT) } else { ("lab-agent devices", LIMIT) };
    let binaries = vec!["lab-agent", "wherry"];
    let content = Content { script: script.to_owned(), binaries, devices: true, ..Content::default() };
    Outer::prepare("devices", &content)?.run(limit)
}
