//! What a kernel log says about a machine that was moved: which lines mean that something broke.

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

/// The lines of a log that mean trouble; the first `boot` lines are those of the boot.
pub fn trouble(log: &str, boot: usize) -> Vec<&str> {
    log.lines()
        .enumerate()
        .filter(|(_, line)| TROUBLE.iter().any(|word| line.contains(word)))
        .filter(|(number, line)| *number >= boot || !HARMLESS_AT_BOOT.iter().any(|words| line.contains(words)))
        .map(|(_, line)| line)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_is_found_and_what_is_usual_at_boot_is_so_only_there() {
        let log = "\
[    0.266925] Speculative Return Stack Overflow: WARNING: See https://kernel.org/ for mitigation options.
[    2.032430] Unstable clock detected, switching default tracing clock to \"global\"
[    9.1] watchdog: BUG: soft lockup - CPU#1 stuck for 23s!
[    9.2] clocksource: timekeeping watchdog on CPU0: Marking clocksource 'tsc' as unstable because the skew is too large
[    9.3] random: crng init done
";
        assert_eq!(trouble(log, 0).len(), 4);
        let found = trouble(log, 2);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("soft lockup") && found[1].contains("skew"));
    }
}
