//! What a kernel log says about a machine that was moved: which lines mean that something broke.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::serial::Serial;

/// Words that a healthy kernel does not write.
const TROUBLE: [&str; 20] = [
    "BUG:",
    "BUG ",
    "WARNING:",
    "Call Trace",
    "Oops",
    "Kernel panic",
    "general protection",
    "soft lockup",
    "hard LOCKUP",
    "blocked for more than",
    "detected stalls",
    "self-detected stall",
    "starved",
    "unstable",
    "Unstable",
    "segfault",
    "Spurious",
    "nobody cared",
    "lost interrupt",
    "unchecked MSR",
];

/// Lines that carry such a word at boot and mean no harm, each with the reason.
const HARMLESS_AT_BOOT: [&str; 3] = [
    // A recommendation about the microcode of the emulated CPU.
    "Speculative Return Stack Overflow",
    // The emulator's vCPUs are threads with clocks of their own: the kernel sees that and takes another clock source.
    "Marking TSC unstable due to TSCs unsynchronized",
    // The advice that follows from it.
    "Unstable clock detected, switching default tracing clock",
];

/// The shell command by which a guest shows the lines that [`trouble`] is to look at, with their numbers.
///
/// It does not show the others: the whole log keeps the guest's CPU in the interrupts of its emulated serial port for so long
/// that its kernel finds itself stuck (seen: 27 s, and a soft lockup).
fn command(more: &[&str]) -> String {
    let words: String = TROUBLE.iter().chain(more).map(|word| format!(" -e '{word}'")).collect();
    format!("dmesg | grep -nF{words} || true")
}

/// The lines that mean trouble, of those that [`command`] shows; the first `boot` lines of the log are those of the boot.
fn trouble(numbered: &str, boot: usize) -> Vec<&str> {
    let lines = numbered.lines().filter_map(|line| line.split_once(':'));
    lines
        .filter_map(|(number, line)| Some((number.parse::<usize>().ok()?, line)))
        .filter(|(number, line)| *number > boot || !HARMLESS_AT_BOOT.iter().any(|words| line.contains(words)))
        .map(|(_, line)| line)
        .collect()
}

/// The kernel of a guest has not complained since its boot, whose log had so many lines; `more` are words that count as well.
pub fn check(serial: &mut Serial, boot: usize, more: &[&str], limit: Duration) -> Result<()> {
    let log = serial.ask(&command(more), limit)?;
    let found = trouble(&log, boot);
    ensure!(found.is_empty(), "{}", found.join("\n"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn trouble_is_found_and_what_is_usual_at_boot_is_so_only_there() {
        let log = "\
[    0.266925] Speculative Return Stack Overflow: WARNING: See https://kernel.org/ for mitigation options.
[    2.032430] Unstable clock detected, switching default tracing clock to \"global\"
[    9.1] watchdog: BUG: soft lockup - CPU#1 stuck for 23s!
[    9.2] clocksource: timekeeping watchdog on CPU0: Marking clocksource 'tsc' as unstable because the skew is too large
[    9.3] random: crng init done
[    9.4] I/O error, dev vda, sector 8
";
        let directory = tempfile::tempdir().unwrap();
        let dmesg = directory.path().join("dmesg");
        std::fs::write(&dmesg, log).unwrap();
        let shown = |more: &[&str]| {
            let command = command(more).replace("dmesg", &format!("cat {}", dmesg.display()));
            let output = Command::new("sh").args(["-c", &command]).output().unwrap();
            assert!(output.status.success());
            String::from_utf8(output.stdout).unwrap()
        };
        assert_eq!(trouble(&shown(&[]), 0).len(), 4);
        let found = shown(&["I/O error"]);
        let found = trouble(&found, 2);
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[0].contains("soft lockup") && found[1].contains("skew") && found[2].contains("vda"));
        std::fs::write(&dmesg, "all is well\n").unwrap();
        assert!(trouble(&shown(&[]), 0).is_empty());
    }
}
