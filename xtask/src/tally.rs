//! The sum of everything that was tested, and the one line at the end that says so.

use std::fmt;

/// Counts of checks, with a line for each that did not pass.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Tally {
    /// Checks that ran and held.
    pub passed: u64,
    /// What failed, one line each.
    pub failures: Vec<String>,
    /// What could not run, and why, one line each.
    pub skips: Vec<String>,
    /// What failed checks printed, the end of it, line by line.
    pub said: Vec<String>,
    /// What is no part of this run, and why, one line each.
    pub left_out: Vec<String>,
}

impl Tally {
    /// Notes a check that failed.
    pub fn fail(&mut self, what: impl Into<String>) {
        self.failures.push(what.into());
    }

    /// Notes a check that could not run.
    pub fn skip(&mut self, what: impl Into<String>) {
        self.skips.push(what.into());
    }

    /// Adds the counts of another part.
    pub fn add(&mut self, part: Self) {
        self.passed += part.passed;
        self.failures.extend(part.failures);
        self.skips.extend(part.skips);
        self.said.extend(part.said);
        self.left_out.extend(part.left_out);
    }

    /// True if this is a good result: nothing failed, and nothing was skipped where that counts.
    pub fn is_good(&self, deny_skips: bool) -> bool {
        self.failures.is_empty() && (self.skips.is_empty() || !deny_skips)
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failures.len(), self.skips.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closing_line_counts_all_parts() {
        let mut all = Tally { passed: 2, ..Tally::default() };
        let mut part = Tally { passed: 3, ..Tally::default() };
        part.fail("b: broke");
        part.skip("c: no /dev/kvm");
        all.add(part);
        assert_eq!(all.to_string(), "5 passed, 1 failed, 1 skipped");
    }

    #[test]
    fn a_skipped_check_is_bad_only_where_skips_are_denied() {
        let mut tally = Tally { passed: 1, ..Tally::default() };
        assert!(tally.is_good(true));
        tally.skip("no root");
        assert!(tally.is_good(false));
        assert!(!tally.is_good(true));
        tally.fail("x");
        assert!(!tally.is_good(false));
    }
}
