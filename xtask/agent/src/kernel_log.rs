//! What a kernel log says about a machine that was moved: which lines mean that something broke.

/// Words that a healthy kernel does not write.
const TROUBLE: [&str; 19] = [
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
    "segfault",
    "Spurious",
    "nobody cared",
    "lost interrupt",
    "unchecked MSR",
];

/// Lines that carry such a word and mean no harm, each with the reason.
const HARMLESS: [&str; 2] = [
    // A recommendation about the microcode of the emulated CPU.
    "Speculative Return Stack Overflow",
    // One line of advice at boot, when the TSC is not used as the clock source.
    "Unstable clock detected, switching default tracing clock",
];

/// The lines of a log that mean trouble.
pub fn trouble(log: &str) -> Vec<&str> {
    log.lines()
        .filter(|line| TROUBLE.iter().any(|word| line.contains(word)))
        .filter(|line| !HARMLESS.iter().any(|words| line.contains(words)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_is_found_and_advice_is_not() {
        let log = "\
[    0.266925] Speculative Return Stack Overflow: WARNING: See https://kernel.org/ for mitigation options.
[    2.032430] Unstable clock detected, switching default tracing clock to \"global\"
[    9.1] watchdog: BUG: soft lockup - CPU#1 stuck for 23s!
[    9.2] clocksource: timekeeping watchdog on CPU0: Marking clocksource 'tsc' as unstable because the skew is too large
[    9.3] random: crng init done
";
        let found = trouble(log);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("soft lockup") && found[1].contains("skew"));
    }
}
