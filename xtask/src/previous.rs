//! The program of an earlier build, which live updates and migrations are tested against, back and forth
//! (`crates/wherry/tests/earlier.rs`).
//!
//! `.ci/previous` names its commit. It is built from what git has of that commit, below `target/previous`, and kept there until
//! the file names another. Where there is no such commit (a shallow clone, an archive) these tests are left out, which is said, and is
//! no skip: nothing that could be installed on the machine would help.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::process::{Next, command, stream, text};

/// More than any machine we know needs to build it.
const LIMIT: Duration = Duration::from_secs(20 * 60);

/// The program, or why there can be none.
#[derive(Debug)]
pub enum Previous {
    /// It is here.
    Built(PathBuf),
    /// This clone cannot build it.
    LeftOut(String),
}

/// Builds the program, if it is not there yet.
pub fn program() -> Result<Previous> {
    let named = std::fs::read_to_string(crate::root().join(".ci/previous")).context("reading .ci/previous")?;
    let commit = named_commit(&named)?;
    if let Err(error) = text(&mut git(&["cat-file", "-e", &format!("{commit}^{{commit}}")])) {
        return Ok(Previous::LeftOut(format!("this clone has no commit {commit}, which .ci/previous names: {error}")));
    }
    text(&mut git(&["merge-base", "--is-ancestor", commit, "HEAD"]))
        .with_context(|| format!("{commit}, which .ci/previous names, is no ancestor of what is tested"))?;
    let all = crate::target("previous");
    let program = all.join(commit).join("wherry");
    if !program.exists() {
        if all.exists() {
            std::fs::remove_dir_all(&all).with_context(|| format!("removing {}", all.display()))?;
        }
        build(commit, &all.join(commit), &program).with_context(|| format!("building {commit}"))?;
    }
    Ok(Previous::Built(program))
}

fn git(arguments: &[&str]) -> Command {
    let mut git = Command::new("git");
    git.arg("-C").arg(crate::root()).args(arguments);
    git
}

/// The commit that is named: all of its hash, so that it never becomes another.
fn named_commit(file: &str) -> Result<&str> {
    let commit = file.lines().find_map(|line| line.strip_prefix("commit ")).context(".ci/previous names no commit")?;
    ensure!(
        commit.len() == 40 && commit.bytes().all(|byte| byte.is_ascii_hexdigit()),
        ".ci/previous names {commit:?}, and that is not the whole hash of a commit"
    );
    Ok(commit)
}

fn build(commit: &str, directory: &Path, program: &Path) -> Result<()> {
    let (source, archive, out) = (directory.join("source"), directory.join("tar"), directory.join("out"));
    std::fs::create_dir_all(&source)?;
    let path = |path: &Path| path.to_str().map(String::from).context("the target directory has a name that is no text");
    text(&mut git(&["archive", "--format=tar", "--output", &path(&archive)?, commit]))?;
    text(Command::new("tar").args(["-xf", &path(&archive)?, "-C", &path(&source)?]))?;
    let mut cargo = command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--color", "never", "--package", "wherry", "--bin", "wherry"]).current_dir(&source);
    // By itself: to cargo the crates of both trees are the same, and in one directory it would take those of one for the other's. What
    // counts is how soon it is there.
    cargo.env("CARGO_TARGET_DIR", &out).env("CARGO_BUILD_BUILD_DIR", &out).env("CARGO_INCREMENTAL", "0");
    cargo.env("CARGO_PROFILE_DEV_OPT_LEVEL", "0").env("CARGO_PROFILE_DEV_DEBUG", "false");
    let ending = stream(cargo, LIMIT, |line| {
        println!("{line}");
        Next::Continue
    })?;
    if !ending.success() {
        bail!("cargo build: {ending}");
    }
    // In one step: what is there is whole.
    std::fs::rename(out.join("debug/wherry"), program).context("keeping the program")?;
    for rest in [&source, &out] {
        std::fs::remove_dir_all(rest)?;
    }
    std::fs::remove_file(archive)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_names_one_whole_commit() {
        let hash = "0123456789abcdef0123456789abcdef01234567";
        assert_eq!(named_commit(&format!("# why\ncommit {hash}\nrefuses update words\n")).unwrap(), hash);
        assert!(named_commit("# nothing\n").is_err());
        assert!(named_commit("commit main\n").unwrap_err().to_string().contains("main"));
        let here = std::fs::read_to_string(crate::root().join(".ci/previous")).unwrap();
        named_commit(&here).unwrap();
    }
}
