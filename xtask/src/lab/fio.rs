//! fio for the guest in Wherry, without a shared library.
//!
//! Debian's own program is linked with some sixty libraries (Ceph's, Gluster's, those of RDMA). In a guest that is emulated
//! twice the loader needs minutes for them, at each start. So fio is built from Debian's source package, once, with what a local
//! disk needs and nothing else.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::packages::Packages;
use crate::process::{Ending, Next, command, output, stream};

/// What fio would otherwise look for on this machine, and use if it is here.
const WITHOUT: [&str; 11] = [
    "--disable-native",
    "--disable-numa",
    "--disable-rdma",
    "--disable-rados",
    "--disable-rbd",
    "--disable-gfapi",
    "--disable-http",
    "--disable-shm",
    "--disable-pmem",
    "--disable-lex",
    "--disable-tcmalloc",
];

/// It takes a minute.
const LIMIT: Duration = Duration::from_secs(15 * 60);

/// The program below `home`, of which the caller has the lock; built if it is not there yet.
pub fn program(packages: &Packages, home: &Path) -> Result<PathBuf> {
    let place = home.join("fio");
    if place.is_file() {
        return Ok(place);
    }
    let source = packages.source("fio")?;
    println!("lab: building fio");
    for (what, arguments) in [
        ("./configure", [&["--build-static"], WITHOUT.as_slice()].concat()),
        ("make", vec!["--silent", "--jobs=2", "fio"]),
    ] {
        let mut last = String::new();
        let mut tool = command(what);
        tool.args(arguments).current_dir(&source);
        let ending = stream(tool, LIMIT, |line| {
            line.clone_into(&mut last);
            Next::Continue
        })?;
        if !ending.success() {
            bail!("cannot build fio in {}: {what} {}: {last}", source.display(), described(ending));
        }
    }
    // Renamed into place, so that what exists is whole.
    let partial = place.with_extension("partial");
    output(Command::new("strip").arg("-o").args([&partial, &source.join("fio")]))?;
    std::fs::rename(&partial, &place).with_context(|| format!("cannot rename it to {}", place.display()))?;
    Ok(place)
}

fn described(ending: Ending) -> String {
    match ending {
        Ending::TimedOut => format!("was still running after {LIMIT:?}"),
        other => other.to_string(),
    }
}
