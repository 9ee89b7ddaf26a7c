//! What `wherry run` says of a function that it cannot have.

use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::wherry;

const LIMIT: Duration = Duration::from_secs(60);

/// A VM with this function does not start, and the words of it have all of these.
pub fn refused(function: &dyn std::fmt::Display, words: &[&str]) -> Result<()> {
    let device = format!("vfio={function}");
    let arguments = ["run", "--memory", "64M", "--cpus", "1", "--api", "/tmp/refused.api", "--device", &device];
    let said = match wherry::run(&arguments, LIMIT) {
        Ok(said) => bail!("a VM with {function} has run, and said {said:?}"),
        Err(error) => format!("{error:#}"),
    };
    println!("lab: {said}");
    for word in words {
        ensure!(said.contains(word), "{word:?} is not in what was said of {function}: {said}");
    }
    Ok(())
}
