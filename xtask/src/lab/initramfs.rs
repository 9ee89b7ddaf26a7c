//! Initial RAM file systems: a writer of the `newc` cpio format, and kernel modules in the order they load.
//!
//! The format is that of the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. Archives are left
//! uncompressed: under emulation unpacking costs more than copying.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::output;

const DIRECTORY: u32 = 0o040_755;
const SYMLINK: u32 = 0o120_777;
const FILE: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// An archive in the making. Parent directories come by themselves.
#[derive(Debug, Default)]
pub struct Initramfs {
    bytes: Vec<u8>,
    entries: u32,
    directories: BTreeSet<String>,
}

impl Initramfs {
    /// An archive with the directories and devices that any `init` needs.
    pub fn new() -> Self {
        let mut archive = Self::default();
        for dir in ["dev", "proc", "sys", "tmp", "run", "bin", "lab"] {
            archive.directory(dir);
        }
        archive.device("dev/console", 5, 1);
        archive.device("dev/null", 1, 3);
        archive
    }

    /// Adds a directory, once.
    pub fn directory(&mut self, path: &str) {
        let path = path.trim_matches('/');
        if !path.is_empty() && self.directories.insert(path.to_owned()) {
            self.parents(path);
            self.entry(path, DIRECTORY, (0, 0), &[]);
        }
    }

    /// Adds a file with these permission bits.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        self.parents(path);
        self.entry(path, FILE | permissions, (0, 0), content);
    }

    /// Adds a copy of a file of this machine.
    pub fn copy(&mut self, path: &str, permissions: u32, from: &Path) -> Result<()> {
        let content = std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.file(path, permissions, &content);
        Ok(())
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, to: &str) {
        self.parents(path);
        self.entry(path, SYMLINK, (0, 0), to.as_bytes());
    }

    /// Adds a character device.
    pub fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.parents(path);
        self.entry(path, CHARACTER_DEVICE, (major, minor), &[]);
    }

    /// Adds the modules named (and those they depend on) below `lab/modules`, and `lab/modules.order` with one file
    /// name a line in the order in which they load.
    pub fn modules(&mut self, modules: &Path, names: &[&str]) -> Result<()> {
        let mut order = String::new();
        for (name, content) in load_order(modules, names)? {
            self.file(&format!("lab/modules/{name}.ko"), 0o644, &content);
            order.push_str(&format!("{name}.ko\n"));
        }
        self.file("lab/modules.order", 0o644, order.as_bytes());
        Ok(())
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        if let Some((parent, _)) = path.trim_matches('/').rsplit_once('/') {
            self.directory(parent);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        let path = path.trim_start_matches('/');
        self.entries += 1;
        let fields = [
            self.entries, // inode
            mode,
            0, // uid
            0, // gid
            if mode == DIRECTORY { 2 } else { 1 },
            0, // mtime: the same input gives the same archive
            u32::try_from(content.len()).unwrap_or(u32::MAX),
            0,
            0,
            device.0,
            device.1,
            u32::try_from(path.len() + 1).unwrap_or(u32::MAX),
            0, // checksum, unused in this variant
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// The modules named and all they depend on, each after those it needs. Names that are built into the kernel are
/// passed over; a name that is nowhere is an error.
fn load_order(modules: &Path, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = BTreeMap::new();
    collect(&modules.join("kernel"), &mut files)
        .with_context(|| format!("cannot list the modules in {}", modules.display()))?;
    let builtin: BTreeSet<String> = std::fs::read_to_string(modules.join("modules.builtin"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| module_name(Path::new(line)))
        .collect();
    let mut order: Vec<(String, Vec<u8>)> = Vec::new();
    for name in names {
        add(&name.replace('-', "_"), &files, &builtin, &mut order)?;
    }
    Ok(order)
}

fn add(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    builtin: &BTreeSet<String>,
    order: &mut Vec<(String, Vec<u8>)>,
) -> Result<()> {
    if builtin.contains(name) || order.iter().any(|(known, _)| known == name) {
        return Ok(());
    }
    let Some(file) = files.get(name) else {
        bail!("this kernel has no module {name}");
    };
    let content = if file.extension().is_some_and(|extension| extension == "xz") {
        output(Command::new("xz").args(["--decompress", "--stdout"]).arg(file))?
    } else {
        std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?
    };
    for dependency in dependencies(&content) {
        add(&dependency, files, builtin, order)?;
    }
    order.push((name.to_owned(), content));
    Ok(())
}

/// The module's own list of what it depends on: the `depends=` entry of its `.modinfo` section.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = &module[start + KEY.len()..];
    let end = value.iter().position(|&byte| byte == 0).unwrap_or(value.len());
    let names = String::from_utf8_lossy(&value[..end]);
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

/// All module files below a directory, by module name.
fn collect(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files)?;
        } else if let Some(name) = module_name(&entry.path()) {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

/// `…/kvm-amd.ko.xz` as `kvm_amd`.
fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let name = name.strip_suffix(".xz").unwrap_or(name).strip_suffix(".ko")?;
    Some(name.replace('-', "_"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::Stdio;

    use super::*;

    #[test]
    fn an_entry_is_laid_out_as_the_kernel_reads_it() {
        let mut archive = Initramfs::default();
        archive.file("a", 0o755, b"xyz");
        let bytes = archive.finish();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[14..22], b"000081ed", "mode");
        assert_eq!(&bytes[54..62], b"00000003", "size");
        assert_eq!(&bytes[94..102], b"00000002", "length of the name with its zero");
        // 110 bytes of header and "a\0" are a multiple of four already; the content follows and is padded.
        assert_eq!(&bytes[110..116], b"a\0xyz\0");
        assert_eq!(&bytes[116..122], b"070701");
        assert_eq!(bytes.len() % 512, 0);
    }

    #[test]
    fn directories_stand_before_what_is_in_them_and_only_once() {
        let mut archive = Initramfs::default();
        archive.file("usr/lib/x/one", 0o644, b"1");
        archive.symlink("usr/lib/two", "x/one");
        let text = String::from_utf8_lossy(&archive.finish()).into_owned();
        let at = |name: &str| text.find(&format!("{name}\0")).unwrap();
        assert!(at("usr") < at("usr/lib") && at("usr/lib") < at("usr/lib/x") && at("usr/lib/x") < at("usr/lib/x/one"));
        assert_eq!(text.matches("070701").count(), 6);
    }

    #[test]
    fn the_cpio_tool_reads_what_we_write() {
        let mut archive = Initramfs::new();
        archive.file("lab/hello", 0o755, &[7; 1000]);
        let Ok(mut cpio) =
            Command::new("cpio").args(["--list", "--quiet"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()
        else {
            println!("SKIPPED: there is no cpio program");
            return;
        };
        cpio.stdin.take().unwrap().write_all(&archive.finish()).unwrap();
        let listed = cpio.wait_with_output().unwrap();
        assert!(listed.status.success());
        let listed = String::from_utf8(listed.stdout).unwrap();
        assert!(listed.lines().any(|line| line == "lab/hello"), "{listed}");
        assert!(listed.lines().any(|line| line == "dev/console"), "{listed}");
    }

    #[test]
    fn modules_load_after_what_they_depend_on() {
        let root = tempfile::tempdir().unwrap();
        let kernel = root.path().join("kernel/deep");
        std::fs::create_dir_all(&kernel).unwrap();
        std::fs::write(root.path().join("modules.builtin"), "kernel/lib/built-in.ko\n").unwrap();
        std::fs::write(kernel.join("kvm-amd.ko"), b"ELF\0license=GPL\0depends=kvm,built-in\0more").unwrap();
        std::fs::write(kernel.join("kvm.ko"), b"ELF\0depends=irqbypass\0").unwrap();
        std::fs::write(kernel.join("irqbypass.ko"), b"ELF\0depends=\0").unwrap();
        let order = load_order(root.path(), &["kvm-amd", "irqbypass"]).unwrap();
        let names: Vec<&str> = order.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["irqbypass", "kvm", "kvm_amd"]);
        assert!(load_order(root.path(), &["vfio-pci"]).is_err());
    }
}
