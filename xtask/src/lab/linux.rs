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
    let script = format!("lab-agent kvm && exec lab-agent linux{}", if full { " --full" } else { "" });
    let content = Content { script, binaries: vec!["lab-agent", "wherry"], ..Content::default() };
    Outer::prepare("linux", &content)?.run(if full { FULL_LIMIT } else { LIMIT })
}
