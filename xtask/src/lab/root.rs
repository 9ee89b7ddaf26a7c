//! The disk of the guest in Wherry: an ext4 file system with its root, made from a directory, without mounting anything.

use std::fs::File;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process::output;

/// What is free on the disk beside the files, in MiB; the load of a guest fits in.
const FREE_MIB: u64 = 128;

/// The directory that becomes the root. It goes when the image is made.
#[derive(Debug)]
pub struct RootTree {
    dir: PathBuf,
    bytes: u64,
}

impl RootTree {
    /// One with the directories that an `init` needs, below `home`, of which the caller has the lock.
    pub fn new(home: &Path) -> Result<Self> {
        let tree = Self { dir: home.join("root"), bytes: 0 };
        // One that a killed task has left.
        let _ = std::fs::remove_dir_all(&tree.dir);
        for dir in ["dev", "proc", "sys", "tmp", "run", "bin", "var/fio"] {
            let dir = tree.dir.join(dir);
            std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        symlink("busybox", tree.dir.join("bin/sh")).context("cannot link bin/sh")?;
        Ok(tree)
    }

    /// Adds a copy of a program or library.
    pub fn copy(&mut self, place: &str, from: &Path) -> Result<()> {
        let content = std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.add(place, &content)
    }

    /// Adds a script.
    pub fn script(&mut self, place: &str, text: &str) -> Result<()> {
        self.add(place, text.as_bytes())
    }

    fn add(&mut self, place: &str, content: &[u8]) -> Result<()> {
        let path = self.dir.join(place);
        let parent = path.parent().unwrap_or(&self.dir);
        let cannot = || format!("cannot write {}", path.display());
        std::fs::create_dir_all(parent).with_context(cannot)?;
        std::fs::write(&path, content).with_context(cannot)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).with_context(cannot)?;
        self.bytes += content.len() as u64;
        Ok(())
    }

    /// Makes the image; who uses an older one at this place keeps that.
    pub fn image(self, path: &Path) -> Result<PathBuf> {
        let partial = path.with_extension("partial");
        let file = File::create(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
        let len = (self.bytes.div_ceil(1 << 20) + FREE_MIB) << 20;
        file.set_len(len).with_context(|| format!("cannot set the length of {}", partial.display()))?;
        // Nothing that the guest would write later in the background: it has to be done when the machine is moved.
        output(
            Command::new("mke2fs")
                .args(["-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0", "-d"])
                .args([&self.dir, &partial]),
        )?;
        std::fs::rename(&partial, path).with_context(|| format!("cannot rename it to {}", path.display()))?;
        Ok(path.to_owned())
    }
}

impl Drop for RootTree {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_in_the_tree_is_in_the_file_system_and_the_tree_is_gone() {
        if Command::new("debugfs").arg("-V").output().is_err() {
            println!("SKIPPED: there is no debugfs program");
            return;
        }
        let home = tempfile::tempdir().unwrap();
        let mut tree = RootTree::new(home.path()).unwrap();
        tree.script("usr/lib/x/hello", "#!/bin/sh\n").unwrap();
        let image = tree.image(&home.path().join("root.img")).unwrap();
        let read = Command::new("debugfs").args(["-R", "cat /usr/lib/x/hello"]).arg(&image).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&read.stdout), "#!/bin/sh\n");
        assert!(Command::new("e2fsck").arg("-fn").arg(&image).output().unwrap().status.success());
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1);
    }
}
