//! What runs in the lab: the two kernels, the two initial RAM file systems, the binaries.
//!
//! *outer* is the machine that QEMU emulates; Wherry runs in it. *inner* is the guest that Wherry runs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::fio;
use super::initramfs::Initramfs;
use super::packages::{Kernel, Packages};
use super::root::RootTree;
use crate::debian;
use crate::process::{Next, command, stream, text};

/// The target triple; named explicitly so that build scripts and macros are not built with the static runtime.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The first build of all dependencies on two slow cores stays well below this.
const BUILD_LIMIT: Duration = Duration::from_secs(25 * 60);

/// Modules of the outer kernel that every lab needs.
const KVM_MODULES: [&str; 1] = ["kvm-amd"];

const OUTER_INIT: &str = include_str!("outer-init.sh");
const INNER_INIT: &str = include_str!("inner-init.sh");
const ROOT_INIT: &str = include_str!("root-init.sh");

/// Modules of the inner kernel for a guest with devices.
const INNER_MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "virtio_net", "ext4"];
/// Modules of the outer kernel in a guest that has it, with devices that were passed through.
const PASSTHROUGH_MODULES: [&str; 5] = ["nvme", "igbvf", "uio_pci_generic", "crc32c_generic", "ext4"];
/// Modules of the outer kernel for the network that such a guest is in.
const NETWORK_MODULES: [&str; 3] = ["tun", "veth", "bridge"];

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
        for (place, file) in self.program("stress-ng", "usr/bin/stress-ng")? {
            archive.copy(&place, 0o755, &file)?;
        }
        write(&home().join("inner.cpio"), archive)
    }

    /// Writes the initial RAM file system of an inner guest whose root is on its disk: it loads drivers and goes there.
    fn inner_root_initramfs(&self) -> Result<PathBuf> {
        let mut archive = Initramfs::new();
        archive.copy("bin/busybox", 0o755, &self.busybox)?;
        archive.symlink("bin/sh", "busybox");
        archive.file("init", 0o755, ROOT_INIT.as_bytes());
        archive.modules(&self.inner.modules, &INNER_MODULES)?;
        write(&home().join("inner-root.cpio"), archive)
    }

    /// Writes the image of that disk: busybox, fio, a shell that takes commands on the serial port.
    fn inner_root(&self) -> Result<PathBuf> {
        let mut tree = RootTree::new(&home())?;
        tree.copy("bin/busybox", &self.busybox)?;
        tree.script("init", INNER_INIT)?;
        tree.copy("bin/fio", &fio::program(&self.packages, &home())?)?;
        tree.image(&home().join("root.img"))
    }

    /// Writes the initial RAM file system of a guest with devices that were passed through, for the outer kernel: their drivers, busybox, fio, our agent.
    fn inner_passthrough_initramfs(&self, agent: &Path) -> Result<PathBuf> {
        let mut archive = Initramfs::new();
        archive.copy("bin/busybox", 0o755, &self.busybox)?;
        archive.symlink("bin/sh", "busybox");
        archive.file("init", 0o755, INNER_INIT.as_bytes());
        archive.copy("bin/fio", 0o755, &fio::program(&self.packages, &home())?)?;
        archive.copy("bin/lab-agent", 0o755, agent)?;
        archive.modules(&self.outer.modules, &PASSTHROUGH_MODULES)?;
        write(&home().join("inner-passthrough.cpio"), archive)
    }

    /// A guest with its root on a disk, ready to be started; the caller has the lock.
    pub fn disk_guest(&self) -> Result<DiskGuest> {
        let (initrd, image) = (self.inner_root_initramfs()?, self.inner_root()?);
        Ok(DiskGuest { kernel: self.inner.image.clone(), initrd, image })
    }

    /// A program of a package and the libraries it needs: where each is to be, and where it is now.
    fn program(&self, package: &str, program: &str) -> Result<Vec<(String, PathBuf)>> {
        let mut files = vec![(program.to_owned(), self.packages.tree(package, None)?.join(program))];
        for (name, file) in self.packages.libraries(package, program)? {
            let place = if name.starts_with("ld-linux") { "lib64" } else { "usr/lib/x86_64-linux-gnu" };
            files.push((format!("{place}/{name}"), file));
        }
        Ok(files)
    }

    /// Writes an outer initial RAM file system: busybox, KVM's modules, the inner guest, and the `content`.
    pub fn outer_initramfs(&self, name: &str, content: &Content) -> Result<PathBuf> {
        let mut archive = Initramfs::new();
        archive.copy("bin/busybox", 0o755, &self.busybox)?;
        archive.symlink("bin/sh", "busybox");
        archive.file("init", 0o755, OUTER_INIT.as_bytes());
        let mut modules: Vec<&str> =
            KVM_MODULES.into_iter().chain(content.modules.iter().map(String::as_str)).collect();
        if content.devices {
            modules.extend(NETWORK_MODULES);
            self.add_devices(&mut archive)?;
        }
        if content.qemu {
            add_qemu(&mut archive)?;
        }
        let binaries = binaries(&content.binaries)?;
        for binary in &binaries {
            archive.copy(&format!("lab/bin/{}", file_name(binary)), 0o755, binary)?;
        }
        if content.passthrough {
            modules.extend(NETWORK_MODULES);
            self.add_programs(&mut archive)?;
            let agent = binaries.iter().find(|binary| file_name(binary) == "lab-agent");
            let agent = agent.context("a guest with such devices has the lab-agent in it")?;
            archive.copy("lab/inner-passthrough.cpio", 0o644, &self.inner_passthrough_initramfs(agent)?)?;
        }
        archive.modules(&self.outer.modules, &modules)?;
        archive.copy("lab/vmlinuz", 0o644, &self.inner.image)?;
        archive.copy("lab/vmlinuz-outer", 0o644, &self.outer.image)?;
        archive.copy("lab/inner.cpio", 0o644, &self.inner_initramfs()?)?;
        for file in &content.files {
            archive.copy(&format!("lab/files/{}", file_name(file)), 0o755, file)?;
        }
        archive.file("lab/script", 0o755, content.script.as_bytes());
        write(&home().join(format!("{name}.cpio")), archive)
    }

    /// Adds what a guest with a disk and a network needs around it: the disk, and programs.
    fn add_devices(&self, archive: &mut Initramfs) -> Result<()> {
        archive.copy("lab/root.img", 0o644, &self.inner_root()?)?;
        archive.copy("lab/inner-root.cpio", 0o644, &self.inner_root_initramfs()?)?;
        self.add_programs(archive)
    }

    /// Adds `ip` for the network, and `e2fsck`.
    fn add_programs(&self, archive: &mut Initramfs) -> Result<()> {
        // Once each: both programs have libraries in common.
        let mut files = BTreeMap::new();
        for (package, program, place) in
            [("iproute2", "bin/ip", "lab/bin/ip"), ("e2fsprogs", "sbin/e2fsck", "lab/bin/e2fsck")]
        {
            for (at, file) in self.program(package, program)? {
                // Where PATH has it before what busybox calls so.
                files.insert(if at == program { place.to_owned() } else { at }, file);
            }
        }
        for (place, file) in files {
            archive.copy(&place, 0o755, &file)?;
        }
        Ok(())
    }
}

/// Adds the QEMU of this machine, with its libraries and what a guest begins with.
fn add_qemu(archive: &mut Initramfs) -> Result<()> {
    let program = Path::new("/usr/bin/qemu-system-x86_64");
    archive.copy("lab/bin/qemu-system-x86_64", 0o755, program)?;
    // `/lib64/ld-linux-x86-64.so.2 (0x…)` and `libz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x…)`.
    for line in text(Command::new("ldd").arg(program))?.lines() {
        let Some(path) = line.split_whitespace().find(|word| word.starts_with('/')).map(Path::new) else { continue };
        let name = file_name(path);
        let place = if name.starts_with("ld-linux") { "lib64" } else { "usr/lib/x86_64-linux-gnu" };
        archive.copy(&format!("{place}/{name}"), 0o755, path)?;
    }
    for file in ["seabios/bios-256k.bin", "qemu/kvmvapic.bin", "qemu/linuxboot_dma.bin"] {
        let file = Path::new("/usr/share").join(file);
        archive.copy(&format!("lab/qemu/{}", file_name(&file)), 0o644, &file)?;
    }
    Ok(())
}

/// A guest whose root is on a disk.
#[derive(Debug)]
pub struct DiskGuest {
    /// Its kernel, a bzImage.
    pub kernel: PathBuf,
    /// Its initial RAM file system, which goes to the root.
    pub initrd: PathBuf,
    /// The disk.
    pub image: PathBuf,
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
    /// The inner guest's disk and what its network is made with.
    pub devices: bool,
    /// A guest for devices that are passed through, and what its network is made with.
    pub passthrough: bool,
    /// The QEMU that is installed here.
    pub qemu: bool,
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
pub fn binaries(packages: &[&str]) -> Result<Vec<PathBuf>> {
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
