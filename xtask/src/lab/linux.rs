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
/// How often a guest that does not come up is started, at the most.
const BOOT_TRIES: u32 = 4;

/// Runs the lab; `full` for more rounds and load than a change is tested with.
pub fn run(full: bool) -> Result<Tally> {
    let mut script = "lab-agent kvm && lab-agent linux".to_owned();
    if full {
        // Once more with the newer kernel, which is the outer machine's own.
        script.push_str(" --full && lab-agent linux --full --kernel /lab/vmlinuz-outer --label newer-kernel-");
    }
    let content = Content { script, binaries: vec!["lab-agent", "wherry"], ..Content::default() };
    let limit = if full { FULL_LIMIT } else { LIMIT };
    let outer = Outer::prepare("linux", &content)?;
    // Under double emulation a kernel now and then hangs or crashes in its boot, and why is not known (docs/lab.md).
    // What is tested comes after the boot; so the boot, and only it, is tried again, and said so.
    for _ in 1..BOOT_TRIES {
        let tally = outer.run(limit)?;
        if !did_not_boot(&tally) {
            return Ok(tally);
        }
        for failure in &tally.failures {
            println!("lab: NOT COUNTED, tried again: {failure}");
        }
    }
    outer.run(limit)
}

/// Whether the first thing that went wrong was that the guest did not come up.
fn did_not_boot(tally: &Tally) -> bool {
    tally.failures.first().is_some_and(|failure| failure.starts_with("lab linux: boot: "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_guest_that_did_not_boot_is_tried_again() {
        let failed = |what: &[&str]| {
            let mut tally = Tally::default();
            what.iter().for_each(|what| tally.fail(*what));
            did_not_boot(&tally)
        };
        assert!(failed(&["lab linux: boot: waited too long", "lab linux: smp: never reported"]));
        assert!(!failed(&[]));
        assert!(!failed(&["lab linux: migrate-1: refused", "lab linux: boot: late"]));
        assert!(!failed(&["lab linux: the machine went down in mid-script"]));
    }
}
