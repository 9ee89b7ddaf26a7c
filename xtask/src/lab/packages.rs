//! Debian packages that are used without being installed.
//!
//! A package is fetched with `apt-get download` and unpacked with `dpkg -x` into the lab's cache, where it stays:
//! a tree is renamed into place when it is complete, so that what exists is whole. Nothing outside the cache changes.

use std::collections::{BTreeSet, VecDeque};
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
        self.cached(&name, |partial| fetch(package, suite, partial))
            .with_context(|| format!("cannot get the Debian package {name}"))
    }

    /// The tree of this name; if it is not there, `fetch` is given a directory in which to make `tree`.
    fn cached(&self, name: &str, fetch: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let tree = self.root.join(name);
        if tree.is_dir() {
            return Ok(tree);
        }
        println!("lab: fetching {name}");
        let partial = self.root.join(format!("partial-{}-{name}", std::process::id()));
        let result = fetch(&partial).and_then(|()| {
            std::fs::rename(partial.join("tree"), &tree)
                .with_context(|| format!("cannot rename the unpacked package to {}", tree.display()))
        });
        let _ = std::fs::remove_dir_all(&partial);
        result?;
        Ok(tree)
    }

    /// The unpacked source of `package` from the machine's own suite, as its authors published it.
    pub fn source(&self, package: &str) -> Result<PathBuf> {
        self.cached(&format!("{package}@source"), |partial| fetch_source(package, partial))
            .with_context(|| format!("cannot get the source of the Debian package {package}"))
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
        // Remembered beside the trees: to find them again takes minutes.
        let list = self.root.join(format!("{package}-{}.libraries", program.replace('/', "-")));
        if let Some(found) = self.remembered(&list) {
            return Ok(found);
        }
        let mut known = Known { packages: vec![package.to_owned()], ..Known::default() };
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
        let lines: String = found
            .iter()
            .filter_map(|(name, path)| Some(format!("{name} {}\n", path.strip_prefix(&self.root).ok()?.display())))
            .collect();
        let partial = list.with_extension("partial");
        std::fs::write(&partial, lines).with_context(|| format!("cannot write {}", partial.display()))?;
        std::fs::rename(&partial, &list).with_context(|| format!("cannot rename it to {}", list.display()))?;
        Ok(found)
    }

    /// What a list says, if it is there and all of its files are.
    fn remembered(&self, list: &Path) -> Option<Vec<(String, PathBuf)>> {
        let text = std::fs::read_to_string(list).ok()?;
        let found = text.lines().map(|line| {
            let (name, path) = line.split_once(' ')?;
            let path = self.root.join(path);
            path.is_file().then(|| (name.to_owned(), path))
        });
        found.collect()
    }

    /// Looks for a library in the `known` packages and then in what they depend on; what is fetched becomes known.
    fn find_library(&self, known: &mut Known, library: &str) -> Result<PathBuf> {
        let mut looked = 0;
        loop {
            while looked < known.packages.len() {
                if let Some(path) = library_in(&self.tree(&known.packages[looked], None)?, library) {
                    return Ok(path);
                }
                looked += 1;
            }
            // One package at a time: most libraries are found before everything has been fetched.
            let next = loop {
                if let Some(next) = known.open.pop_front() {
                    if known.packages.contains(&next) {
                        continue;
                    }
                    break next;
                }
                if known.expanded == known.packages.len() {
                    bail!("none of {} packages has it", known.packages.len());
                }
                // All at once: each question has apt read all of its lists.
                let depends = depends(&known.packages[known.expanded..])?;
                known.expanded = known.packages.len();
                // What has a library is named so (Debian policy 8.1): interpreters and helpers have none of these.
                known.open.extend(depends.into_iter().filter(|name| name.contains("lib")));
            };
            known.packages.push(next);
        }
    }
}

/// Packages in which libraries are looked for, as far as they have had to be.
#[derive(Debug, Default)]
struct Known {
    packages: Vec<String>,
    /// What the first of them depend on is in `open`, or known.
    expanded: usize,
    open: VecDeque<String>,
}

/// A library in the tree of a package: where the loader looks, or in a directory of the package's own.
fn library_in(tree: &Path, library: &str) -> Option<PathBuf> {
    let own = std::fs::read_dir(tree.join("usr/lib/x86_64-linux-gnu")).into_iter().flatten().flatten();
    ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib", "lib"]
        .map(|dir| tree.join(dir))
        .into_iter()
        .chain(own.map(|entry| entry.path()))
        .map(|dir| dir.join(library))
        .find(|path| path.is_file())
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

/// Downloads the source of a package into `partial` and unpacks it into `partial/tree`. What apt has to know for it stays there:
/// a machine need not have sources among its suites.
fn fetch_source(package: &str, partial: &Path) -> Result<()> {
    let (lists, tree) = (partial.join("lists"), partial.join("tree"));
    for dir in [&lists.join("partial"), &tree] {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let suites = partial.join("suites.list");
    std::fs::write(&suites, format!("deb-src {} {} main\n", debian::mirror()?, debian::SUITE))
        .with_context(|| format!("cannot write {}", suites.display()))?;
    let apt = || {
        let mut apt = debian::apt_get();
        apt.arg(format!("-oDir::Etc::SourceList={}", suites.display()))
            .arg("-oDir::Etc::SourceParts=-")
            .arg(format!("-oDir::State::Lists={}", lists.display()))
            .current_dir(partial);
        apt
    };
    output(apt().arg("update"))?;
    output(apt().args(["source", "--download-only", package]))?;
    for entry in std::fs::read_dir(partial)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.contains(".orig.tar.") && !name.ends_with(".asc") {
            output(Command::new("tar").arg("-xf").arg(&path).args(["--strip-components=1", "-C"]).arg(&tree))?;
            return Ok(());
        }
    }
    bail!("apt-get source {package} left no archive")
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

/// The packages that any of these depends on: the first of each group of alternatives.
fn depends(packages: &[String]) -> Result<Vec<String>> {
    let shown = text(Command::new("apt-cache").args(["show", "--no-all-versions"]).args(packages))?;
    Ok(dependencies(&shown))
}

/// The same, from what `apt-cache show` says.
fn dependencies(shown: &str) -> Vec<String> {
    let fields = shown.lines().filter_map(|line| line.strip_prefix("Depends: ").or(line.strip_prefix("Pre-Depends: ")));
    fields.flat_map(names).collect()
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
        let shown = "Package: a\nPre-Depends: b (>= 1)\nDepends: c, d\nSuggests: x\n\nPackage: e\nDepends: f\n";
        assert_eq!(dependencies(shown), ["b", "c", "d", "f"]);
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
    fn a_library_is_found_where_the_loader_looks_and_in_a_directory_of_its_packages_own() {
        let tree = tempfile::tempdir().unwrap();
        let own = tree.path().join("usr/lib/x86_64-linux-gnu/ceph");
        std::fs::create_dir_all(&own).unwrap();
        std::fs::write(own.join("liba.so.2"), "").unwrap();
        assert_eq!(library_in(tree.path(), "liba.so.2"), Some(own.join("liba.so.2")));
        let usual = tree.path().join("lib/x86_64-linux-gnu");
        std::fs::create_dir_all(&usual).unwrap();
        std::fs::write(usual.join("liba.so.2"), "").unwrap();
        assert_eq!(library_in(tree.path(), "liba.so.2"), Some(usual.join("liba.so.2")));
        assert_eq!(library_in(tree.path(), "libb.so.1"), None);
    }

    #[test]
    fn libraries_are_remembered_as_long_as_all_of_them_are_there() {
        let root = tempfile::tempdir().unwrap();
        let packages = Packages::new(root.path().to_owned());
        std::fs::create_dir(root.path().join("liba")).unwrap();
        std::fs::write(root.path().join("liba/liba.so"), "").unwrap();
        std::fs::write(root.path().join("p-bin-p.libraries"), "liba.so liba/liba.so\n").unwrap();
        let found = packages.libraries("p", "bin/p").unwrap();
        assert_eq!(found, [("liba.so".to_owned(), root.path().join("liba/liba.so"))]);
        std::fs::remove_file(root.path().join("liba/liba.so")).unwrap();
        assert!(packages.remembered(&root.path().join("p-bin-p.libraries")).is_none());
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
