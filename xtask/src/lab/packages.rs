//! Debian packages that are used without being installed.
//!
//! A package is fetched with `apt-get download` and unpacked with `dpkg -x` into the lab's cache, where it stays:
//! a tree is renamed into place when it is complete, so that what exists is whole. Nothing outside the cache changes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::debian;
use crate::process::{output, text};

/// The cache of unpacked packages.
#[derive(Debug)]
pub struct Packages {
    root: PathBuf,
}

/// A stock kernel, unpacked.
#[derive(Debug)]
pub struct Kernel {
    /// What `uname -r` will say.
    pub release: String,
    /// The bzImage.
    pub image: PathBuf,
    /// `/lib/modules/RELEASE`.
    pub modules: PathBuf,
}

impl Packages {
    /// The cache in `root`, which need not exist yet.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// The unpacked tree of `package`, from `suite` or else from the machine's own suites.
    pub fn tree(&self, package: &str, suite: Option<&str>) -> Result<PathBuf> {
        let name = suite.map_or_else(|| package.to_owned(), |suite| format!("{package}@{suite}"));
        let tree = self.root.join(&name);
        if tree.is_dir() {
            return Ok(tree);
        }
        println!("lab: fetching {name}");
        let partial = self.root.join(format!("partial-{}-{name}", std::process::id()));
        let result = fetch(package, suite, &partial).and_then(|()| {
            std::fs::rename(partial.join("tree"), &tree)
                .with_context(|| format!("cannot rename the unpacked package to {}", tree.display()))
        });
        let _ = std::fs::remove_dir_all(&partial);
        result.with_context(|| format!("cannot get the Debian package {name}"))?;
        Ok(tree)
    }

    /// The newest kernel of a flavour (`amd64`, `cloud-amd64`).
    pub fn kernel(&self, flavour: &str, suite: Option<&str>) -> Result<Kernel> {
        let tree = self.tree(&format!("linux-image-{flavour}"), suite)?;
        let boot = tree.join("boot");
        for entry in std::fs::read_dir(&boot).with_context(|| format!("no kernel in {}", tree.display()))? {
            let name = entry?.file_name();
            if let Some(release) = name.to_str().and_then(|name| name.strip_prefix("vmlinuz-")) {
                return Ok(Kernel {
                    release: release.to_owned(),
                    image: boot.join(&name),
                    modules: tree.join("lib/modules").join(release),
                });
            }
        }
        bail!("no vmlinuz in {}", boot.display())
    }

    /// Finds the shared libraries that `program` (of the tree `package`) needs, in its package and in those that its
    /// package depends on, however indirectly. Returns (name that the loader looks for, file).
    ///
    /// Packages are fetched only while a library is missing, so that what is merely recommended or loaded at run
    /// time (graphics drivers, for one) stays out.
    pub fn libraries(&self, package: &str, program: &str) -> Result<Vec<(String, PathBuf)>> {
        let mut known = vec![package.to_owned()];
        let mut found = Vec::new();
        let mut seen = BTreeSet::new();
        let mut open = vec![self.tree(package, None)?.join(program)];
        while let Some(file) = open.pop() {
            for library in needed(&file)? {
                if seen.insert(library.clone()) {
                    let path = self
                        .find_library(&mut known, &library)
                        .with_context(|| format!("{} needs {library}", file.display()))?;
                    open.push(path.clone());
                    found.push((library, path));
                }
            }
        }
        Ok(found)
    }

    /// Looks for a library in the `known` packages and then in what they depend on; what is fetched becomes known.
    fn find_library(&self, known: &mut Vec<String>, library: &str) -> Result<PathBuf> {
        let mut looked = 0;
        let mut expanded = 0;
        loop {
            while looked < known.len() {
                let tree = self.tree(&known[looked], None)?;
                for dir in ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib", "lib"] {
                    let path = tree.join(dir).join(library);
                    if path.is_file() {
                        return Ok(path);
                    }
                }
                looked += 1;
            }
            // One package at a time: most libraries are found before everything has been fetched.
            let next = loop {
                let Some(package) = known.get(expanded) else {
                    bail!("none of {} packages has it", known.len());
                };
                match depends(package)?.into_iter().find(|name| !known.contains(name)) {
                    Some(next) => break next,
                    None => expanded += 1,
                }
            };
            known.push(next);
        }
    }
}

/// Downloads one package into `partial` and unpacks it into `partial/tree`.
fn fetch(package: &str, suite: Option<&str>, partial: &Path) -> Result<()> {
    std::fs::create_dir_all(partial).with_context(|| format!("cannot create {}", partial.display()))?;
    if suite == Some(debian::BACKPORTS) {
        debian::ensure_backports()?;
    }
    let first = download(package, suite, partial);
    let deb = match first {
        Ok(deb) => deb,
        // The lists are missing, or name a version that the mirror no longer has.
        Err(_) => {
            debian::update()?;
            download(package, suite, partial)?
        }
    };
    output(Command::new("dpkg").arg("-x").arg(&deb).arg(partial.join("tree")))?;
    Ok(())
}

/// Downloads one package (for a kernel's meta package: the kernel) and returns the file.
fn download(package: &str, suite: Option<&str>, dir: &Path) -> Result<PathBuf> {
    let mut wanted = package.to_owned();
    if package.starts_with("linux-image-") {
        let fields = field(package, suite, "Depends")?;
        wanted = names(&fields).next().with_context(|| format!("{package} depends on no kernel"))?;
    }
    let mut apt = debian::apt_get();
    apt.args(suite.map(|suite| format!("--target-release={suite}")));
    output(apt.arg("download").arg(&wanted).current_dir(dir))?;
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            return Ok(path);
        }
    }
    bail!("apt-get download {wanted} left no file")
}

/// The packages that `package` depends on: the first of each group of alternatives.
fn depends(package: &str) -> Result<Vec<String>> {
    Ok(names(&field(package, None, "Depends")?).collect())
}

/// A field of the candidate version of a package.
fn field(package: &str, suite: Option<&str>, field: &str) -> Result<String> {
    let mut apt = Command::new("apt-cache");
    apt.args(suite.map(|suite| format!("--target-release={suite}")));
    let shown = text(apt.args(["show", "--no-all-versions", package]))?;
    let prefix = format!("{field}: ");
    Ok(shown.lines().find_map(|line| line.strip_prefix(&prefix)).unwrap_or_default().to_owned())
}

/// `a (>= 1), b | c` as a, b.
fn names(depends: &str) -> impl Iterator<Item = String> + '_ {
    depends.split(',').filter_map(|group| {
        let first = group.split('|').next()?.split_whitespace().next()?;
        Some(first.split(':').next().unwrap_or(first).to_owned())
    })
}

/// The libraries that an ELF file names.
fn needed(file: &Path) -> Result<Vec<String>> {
    let dynamic = text(Command::new("readelf").env("LC_ALL", "C").arg("--dynamic").arg(file))?;
    Ok(dynamic
        .lines()
        .filter(|line| line.contains("(NEEDED)"))
        .filter_map(|line| Some(line.split_once('[')?.1.split_once(']')?.0.to_owned()))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_without_versions_architectures_and_alternatives() {
        let read: Vec<String> =
            names("libc6 (>= 2.36), libegl1:any, a | b (= 2), linux-image-6.12.95+deb12-amd64 (= 1)").collect();
        assert_eq!(read, ["libc6", "libegl1", "a", "linux-image-6.12.95+deb12-amd64"]);
        assert_eq!(names("").count(), 0);
    }

    #[test]
    fn a_tree_that_is_there_is_not_fetched_again() {
        let root = tempfile::tempdir().unwrap();
        let tree = root.path().join("wherry-no-such-package");
        std::fs::create_dir(&tree).unwrap();
        let packages = Packages::new(root.path().to_owned());
        assert_eq!(packages.tree("wherry-no-such-package", None).unwrap(), tree);
    }

    #[test]
    fn a_kernel_is_found_by_its_image() {
        let root = tempfile::tempdir().unwrap();
        let boot = root.path().join("linux-image-cloud-amd64@s/boot");
        std::fs::create_dir_all(&boot).unwrap();
        let packages = Packages::new(root.path().to_owned());
        assert!(packages.kernel("cloud-amd64", Some("s")).is_err());
        std::fs::write(boot.join("vmlinuz-6.1.0-1-cloud"), "").unwrap();
        assert_eq!(packages.kernel("cloud-amd64", Some("s")).unwrap().release, "6.1.0-1-cloud");
    }
}
