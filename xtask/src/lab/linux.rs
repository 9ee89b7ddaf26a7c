//! `lab linux`: a stock Debian kernel in Wherry, loaded, migrated there and back, and asked how it feels.
//!
//! The work is done inside the outer machine by the `lab-agent` (see `xtask/agent`).

use std::time::Duration;

use anyhow::Result;

use super::Outer;
use super::images::Content;
use crate::tally::Tally;

/// Everything is emulated twice; this is several times what it takes.
const LIMIT: Duration = Duration::from_secs(8 * 60);
const FULL_LIMIT: Duration = Duration::from_secs(30 * 60);
/// Runs the lab; `full` for more rounds and load than a change is tested with.
pub fn run(full: bool) -> Result<Tally> {
    let mut script = "lab-agent kvm && lab-agent linux".to_owned();
    if full {
        // Once more with the newer kernel, which is the outer machine's own.
        script.push_str(" --full && lab-agent linux --full --kernel /lab/vmlinuz-outer --label newer-kernel-");
    }
    let content = Content { script, binaries: vec!["lab-agent", "wherry"], ..Content::default() };
    let limit = if full { FULL_LIMIT } else { LIMIT };
    Outer::prepare("linux", &content)?.run(limit)
}
