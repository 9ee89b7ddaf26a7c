//! Named checks, reported in the lines that the host reads.

use anyhow::Result;

/// Announces checks, runs them in order, and stops at the first that fails: the others then count as not reported.
#[derive(Debug)]
pub struct Checks {
    label: String,
    failed: bool,
}

impl Checks {
    /// Announces the checks to come; the label goes before each name.
    pub fn plan(label: &str, names: &[String]) -> Self {
        let names: Vec<String> = names.iter().map(|name| format!("{label}{name}")).collect();
        println!("LAB PLAN {}", names.join(" "));
        Self { label: label.to_owned(), failed: false }
    }

    /// Runs one check; what it returns is handed on, with an error when it failed.
    pub fn check<T>(&mut self, name: &str, what: impl FnOnce() -> Result<T>) -> Result<T> {
        let result = what();
        match &result {
            Ok(_) => println!("LAB PASS {}{name}", self.label),
            Err(error) => {
                self.failed = true;
                println!("LAB FAIL {}{name}: {}", self.label, format!("{error:#}").replace('\n', " | "));
            }
        }
        result
    }

    /// True if a check failed.
    pub fn failed(&self) -> bool {
        self.failed
    }
}
