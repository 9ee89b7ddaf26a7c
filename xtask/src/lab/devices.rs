//! `lab devices`: a stock Debian kernel in Wherry, its root on a virtio disk and a network device on a tap, moved while
//! fio verifies what it writes, ping waits for answers and a TCP connection carries data.
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

/// Runs the lab; `full` for more moves than a change is tested with, `vhost` with the devices in processes of their own.
pub fn run(full: bool, vhost: bool) -> Result<Tally> {
    let mut script = "lab-agent devices".to_owned();
    for (option, _) in [(" --full", full), (" --vhost", vhost)].into_iter().filter(|(_, on)| *on) {
        script.push_str(option);
    }
    let limit = if full { FULL_LIMIT } else { LIMIT };
    let content = Content { script, binaries: vec!["lab-agent", "wherry"], devices: true, ..Content::default() };
    Outer::prepare("devices", &content)?.run(limit)
}
