//! What runs in the lab: the two kernels, the two initial RAM file systems, the binaries.
//!
//! *outer* is the machine that QEMU emulates; Wherry runs in it. *inner* is the guest that Wherry runs.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::initramfs::Initramfs;
use super::packages::{Kernel, Packages};
use crate::debian;
use crate::process::{Next, command, stream};

/// The target triple; named explicitly so that build scripts and macros are not built with the static runtime.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The first build of all dependencies on two slow cores stays well below this.
const BUILD_LIMIT: Duration = Duration::from_secs(25 * 60);

/// Modules of the outer kernel that every lab needs.
const KVM_MODULES: [&str; 1] = ["kvm-amd"];

const OUTER_INIT: &str = include_str!("outer-init.sh");
const INNER_INIT: &str = include_str!("inner-init.sh");

/// The directory where the lab keeps everything.
pub fn home() -> PathBuf {
    crate::target("lab")
}

/// Kernels and packages that the labs share.
#[derive(Debug)]
pub struct Images {
    packages: Packages,
    busybox: PathBuf,
    /// The kernel of the emulated machine, with modules for passthrough.
    pub outer: Kernel,
    /// The kernel of the guest in Wherry.
    pub inner: Kernel,
}

impl Images {
    /// Fetches what is not in the cache yet.
    pub fn prepare() -> Result<Self> {
        debian::ensure(&debian::LAB)?;
        let packages = Packages::new(home().join("packages"));
        let outer = packages.kernel("amd64", Some(debian::BACKPORTS))?;
        let inner = packages.kernel("cloud-amd64", None)?;
        let busybox = packages.tree("busybox-static", None)?.join("bin/busybox");
        println!("lab: outer Linux {}, inner Linux {}", outer.release, inner.release);
        Ok(Self { packages, busybox, outer, inner })
    }

    /// Writes the inner initial RAM file system: busybox, stress-ng, a shell that takes commands on the serial port.
    pub fn inner_initramfs(&self) -> Result<PathBuf> {
        let mut archive = Initramfs::new();
        archive.copy("bin/busybox", 0o755, &self.busybox)?;
        archive.symlink("bin/sh", "busybox");
        archive.file("init", 0o755, INNER_INIT.as_bytes());
        let stress = "usr/bin/stress-ng";
        archive.copy(stress, 0o755, &self.packages.tree("stress-ng", None)?.join(stress))?;
        for (name, file) in self.packages.libraries("stress-ng", stress)? {
            let place = if name.starts_with("ld-linux") { "lib64" } else { "usr/lib/x86_64-linux-gnu" };
            archive.copy(&format!("{place}/{name}"), 0o755, &file)?;
        }
        write(&home().join("inner.cpio"), archive)
    }

    /// Writes an outer initial RAM file system: busybox, KVM's modules, the inner guest, and the `content`.
    pub fn outer_initramfs(&self, name: &str, content: &Content) -> Result<PathBuf> {
        let mut archive = Initramfs::new();
        archive.copy("bin/busybox", 0o755, &self.busybox)?;
        archive.symlink("bin/sh", "busybox");
        archive.file("init", 0o755, OUTER_INIT.as_bytes());
        let modules: Vec<&str> = KVM_MODULES.into_iter().chain(content.modules.iter().map(String::as_str)).collect();
        archive.modules(&self.outer.modules, &modules)?;
        for binary in binaries(&content.binaries)? {
            archive.copy(&format!("lab/bin/{}", file_name(&binary)), 0o755, &binary)?;
        }
        archive.copy("lab/vmlinuz", 0o644, &self.inner.image)?;
        archive.copy("lab/vmlinuz-outer", 0o644, &self.outer.image)?;
        archive.copy("lab/inner.cpio", 0o644, &self.inner_initramfs()?)?;
        for file in &content.files {
            archive.copy(&format!("lab/files/{}", file_name(file)), 0o755, file)?;
        }
        archive.file("lab/script", 0o755, content.script.as_bytes());
        write(&home().join(format!("{name}.cpio")), archive)
    }
}

/// What is in the outer machine of one lab.
#[derive(Debug, Default)]
pub struct Content {
    /// The shell script that is the lab.
    pub script: String,
    /// Packages of the workspace whose binaries are in `/lab/bin`.
    pub binaries: Vec<&'static str>,
    /// Kernel modules beside KVM's.
    pub modules: Vec<String>,
    /// Files to be put in `/lab/files`.
    pub files: Vec<PathBuf>,
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// Writes an archive; another lab that is just starting sees the old file or the new one, whole.
fn write(path: &Path, archive: Initramfs) -> Result<PathBuf> {
    let partial = path.with_extension("partial");
    std::fs::write(&partial, archive.finish()).with_context(|| format!("cannot write {}", partial.display()))?;
    std::fs::rename(&partial, path).with_context(|| format!("cannot rename it to {}", path.display()))?;
    Ok(path.to_owned())
}

/// Builds the binaries that run in the outer machine, statically linked: it has no shared library.
fn binaries(packages: &[&str]) -> Result<Vec<PathBuf>> {
    let dir = home().join("static");
    let mut cargo = command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["build", "--release", "--bins", "--color", "never", "--target", TARGET, "--target-dir"])
        .arg(&dir)
        .args(packages.iter().flat_map(|package| ["--package", package]))
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo")
        .current_dir(crate::root());
    let ending = stream(cargo, BUILD_LIMIT, |line| {
        println!("{line}");
        Next::Continue
    })?;
    if !ending.success() {
        bail!("cannot build the binaries for the lab: cargo {ending}, see above");
    }
    Ok(packages.iter().map(|name| dir.join(TARGET).join("release").join(name)).collect())
}
