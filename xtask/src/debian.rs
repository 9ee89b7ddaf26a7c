//! Programs from Debian packages: what the tests need and the machine lacks is installed here.
//!
//! Nothing is assumed of a machine but Debian 12, a Rust toolchain with its linker, and a package mirror.
//! Everything that is installed is printed first.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::text;

/// The machine's own suite.
pub const SUITE: &str = "bookworm";
/// The suite with QEMU 10 and Linux 6.12.
pub const BACKPORTS: &str = "bookworm-backports";

/// Where the line for [`BACKPORTS`] goes when no source list has it.
const SOURCE_LIST: &str = "/etc/apt/sources.list.d/wherry-backports.list";

/// A program that must be there.
#[derive(Debug, Clone, Copy)]
pub struct Need {
    /// The program, as found in PATH.
    program: &'static str,
    /// The lowest major version that will do, as its `--version` says.
    major: u32,
    /// The package that has it.
    package: &'static str,
    /// The suite to take it from, if not the machine's own.
    suite: Option<&'static str>,
}

/// What the nested lab runs on.
pub const LAB: [Need; 4] = [
    Need { program: "qemu-system-x86_64", major: 10, package: "qemu-system-x86", suite: Some(BACKPORTS) },
    Need { program: "xz", major: 0, package: "xz-utils", suite: None },
    // Builds fio, with the C compiler that a Rust toolchain links with.
    Need { program: "make", major: 0, package: "make", suite: None },
    // Makes the disk of the guest in Wherry.
    Need { program: "mke2fs", major: 0, package: "e2fsprogs", suite: None },
];

/// What only the workspace's own tests use.
pub const TESTS: [Need; 5] = [
    // Network namespaces, and sockets that are ended from outside.
    Need { program: "ip", major: 0, package: "iproute2", suite: None },
    // Compiles the ACPI tables back, to see that others can read them.
    Need { program: "iasl", major: 0, package: "acpica-tools", suite: None },
    Need { program: "cpio", major: 0, package: "cpio", suite: None },
    Need { program: "qemu-system-x86_64", major: 10, package: "qemu-system-x86", suite: Some(BACKPORTS) },
    Need { program: "qemu-storage-daemon", major: 10, package: "qemu-utils", suite: Some(BACKPORTS) },
];

/// What fuzz targets are linked with.
pub const FUZZ: [Need; 1] = [Need { program: "g++", major: 0, package: "g++", suite: None }];

/// Installs what is missing of `needs`.
pub fn ensure(needs: &[Need]) -> Result<()> {
    let missing: Vec<&Need> = needs.iter().filter(|need| !is_there(need)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    for need in &missing {
        println!("missing: {} (Debian package {})", need.program, need.package);
    }
    let by_hand = || {
        let packages: Vec<String> = missing
            .iter()
            .map(|need| need.suite.map_or(need.package.to_owned(), |suite| format!("{}/{suite}", need.package)))
            .collect();
        format!("as root: apt-get install {}", packages.join(" "))
    };
    if !rustix::process::geteuid().is_root() {
        bail!("installing packages needs root; run this task as root, or install them {}", by_hand());
    }
    if missing.iter().any(|need| need.suite == Some(BACKPORTS)) {
        ensure_backports().with_context(by_hand)?;
    }
    update().with_context(by_hand)?;
    for need in &missing {
        println!("installing {} from {}", need.package, need.suite.unwrap_or("the machine's own suites"));
        let mut apt = apt_get();
        apt.args(["install", "--yes", "--no-install-recommends"]);
        apt.args(need.suite.map(|suite| format!("--target-release={suite}")));
        text(apt.arg(need.package)).with_context(by_hand)?;
        if !is_there(need) {
            bail!("{} is installed, but {} is still missing or too old", need.package, need.program);
        }
    }
    Ok(())
}

/// Fetches the package lists. This is where a machine without a mirror is found out.
pub fn update() -> Result<()> {
    text(apt_get().arg("update")).context("cannot fetch the package lists; is the Debian mirror reachable?")?;
    Ok(())
}

/// `apt-get` that asks nothing and waits for another one to end.
pub fn apt_get() -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C").args([
        "--quiet=2",
        "-oDPkg::Lock::Timeout=300",
        "-oAPT::Update::Error-Mode=any",
        "-oAPT::Sandbox::User=root",
        "-oAcquire::Retries=3",
    ]);
    apt
}

/// Makes the backports suite known to apt, from the mirror that the machine already uses.
pub fn ensure_backports() -> Result<()> {
    let targets = targets()?;
    if targets.lines().any(|line| line.starts_with(&format!("{BACKPORTS} "))) {
        return Ok(());
    }
    let mirror = mirror()?;
    println!("adding the suite {BACKPORTS} of {mirror} in {SOURCE_LIST}");
    std::fs::write(SOURCE_LIST, format!("deb {mirror} {BACKPORTS} main\n"))
        .with_context(|| format!("cannot write {SOURCE_LIST}; root is needed"))
}

/// Where the machine gets the packages of [`SUITE`] from.
pub fn mirror() -> Result<String> {
    let targets = targets()?;
    let Some(mirror) = targets.lines().find_map(|line| line.strip_prefix(&format!("{SUITE} "))) else {
        bail!("this machine has no Debian 12 ({SUITE}) package source, and no other system is supported");
    };
    Ok(mirror.to_owned())
}

/// The lists that apt has, one a line: suite and mirror.
fn targets() -> Result<String> {
    text(Command::new("apt-get").args(["indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages"]))
        .context("this needs Debian's apt-get")
}

/// True if the program is in PATH and new enough.
fn is_there(need: &Need) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if !std::env::split_paths(&path).any(|dir| Path::new(&dir).join(need.program).is_file()) {
        return false;
    }
    need.major == 0
        || text(Command::new(need.program).arg("--version"))
            .is_ok_and(|says| major(&says).is_some_and(|major| major >= need.major))
}

/// The first number that is followed by a dot.
fn major(says: &str) -> Option<u32> {
    says.split_whitespace().find_map(|word| word.split_once('.')?.0.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_read_from_what_programs_say() {
        assert_eq!(major("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)"), Some(10));
        assert_eq!(major("qemu-storage-daemon version 7.2.19 (Debian)"), Some(7));
        assert_eq!(major("no number"), None);
    }

    #[test]
    fn a_program_nobody_has_is_missing() {
        let need = Need { program: "wherry-no-such-program", major: 0, package: "none", suite: None };
        assert!(!is_there(&need));
        assert!(is_there(&Need { program: "sh", ..need }));
    }
}
