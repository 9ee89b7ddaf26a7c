//! Named checks, reported in the lines that the host reads.

use anyhow::Result;

/// Announces checks, runs them in order, and stops at the first that fails: the others then count as not reported.
#[derive(Debug)]
pub struct Checks {
    failed: bool,
}

impl Checks {
    /// Announces the checks to come.
    pub fn plan(names: &[String]) -> Self {
        println!("LAB PLAN {}", names.join(" "));
        Self { failed: false }
    }

    /// Runs one check; what it returns is handed on, with an error when it failed.
    pub fn check<T>(&mut self, name: &str, what: impl FnOnce() -> Result<T>) -> Result<T> {
        let result = what();
        match &result {
            Ok(_) => println!("LAB PASS {name}"),
            Err(error) => {
                self.failed = true;
                println!("LAB FAIL {name}: {}", format!("{error:#}").replace('\n', " | "));
            }
        }
        result
    }

    /// True if a check failed.
    pub fn failed(&self) -> bool {
        self.failed
    }
}
