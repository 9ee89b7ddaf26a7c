//! A network namespace with a name, so that a person can look into it: `ip netns exec wherry-lab-PID-N ss -t`.
//!
//! It goes when it is dropped. What a process that was killed has left is swept by the next one that makes any: the name
//! says whose it is.
#![expect(unsafe_code, reason = "moves a child into the namespace between fork and exec")]

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::LabError;

/// Where `ip netns` keeps the names.
const NAMES: &str = "/run/netns";
const PREFIX: &str = "wherry-lab-";

/// A network namespace.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    handle: File,
}

impl Namespace {
    pub(crate) fn new() -> Result<Self, LabError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        static SWEEP: Once = Once::new();
        SWEEP.call_once(sweep);
        let name = format!("{PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        ip(&["netns", "add", &name])?;
        let path = format!("{NAMES}/{name}");
        let opened = File::open(&path).map_err(|e| LabError::new(format!("opening {path}"), e));
        let namespace = match opened {
            Ok(handle) => Self { name, handle },
            Err(error) => {
                let _ = ip(&["netns", "del", &name]);
                return Err(error);
            }
        };
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Its name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Has a command start inside. Only its network is another: files, UNIX sockets and processes are those outside.
    pub fn hold<'c>(&self, command: &'c mut Command) -> Result<&'c mut Command, LabError> {
        let handle = self.handle.try_clone().map_err(|e| LabError::new("duplicating a descriptor", e))?;
        // SAFETY: between fork and exec, one system call on a descriptor that the closure owns; nothing is allocated.
        Ok(unsafe {
            command.pre_exec(move || Ok(move_into_link_name_space(handle.as_fd(), Some(LinkNameSpaceType::Network))?))
        })
    }

    /// Does something on a thread inside, and gives what it gives. Sockets made there stay there.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, LabError> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(self.handle.as_fd(), Some(LinkNameSpaceType::Network))?;
                Ok(work())
            });
            match thread.join() {
                Ok(done) => {
                    done.map_err(|e: rustix::io::Errno| LabError::new(format!("entering namespace {}", self.name), e))
                }
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Runs `ip` inside.
    pub(crate) fn ip(&self, arguments: &[&str]) -> Result<(), LabError> {
        let mut all = vec!["-n", &self.name];
        all.extend(arguments);
        ip(&all)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = ip(&["netns", "del", &self.name]) {
            eprintln!("{error}");
        }
    }
}

fn ip(arguments: &[&str]) -> Result<(), LabError> {
    let doing = || format!("ip {}", arguments.join(" "));
    let output =
        Command::new("ip").args(arguments).stdin(Stdio::null()).output().map_err(|e| LabError::new(doing(), e))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(LabError::new(doing(), std::io::Error::other(format!("{}: {said}", output.status))))
}

/// Removes the namespaces of processes that are no more, and those that one with our process id has left.
fn sweep() {
    let Ok(entries) = std::fs::read_dir(NAMES) else { return };
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        if owner(&name).is_some_and(|pid| pid == std::process::id() || !is_alive(pid))
            && let Err(error) = ip(&["netns", "del", &name])
        {
            // Another process may sweep at the same time.
            eprintln!("{error}");
        }
    }
}

/// Whose namespace has this name, if it is one of ours.
fn owner(name: &str) -> Option<u32> {
    let (pid, number) = name.strip_prefix(PREFIX)?.split_once('-')?;
    number.parse::<u32>().ok().and(pid.parse().ok())
}

fn is_alive(pid: u32) -> bool {
    std::path::Path::new("/proc").join(pid.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_ours_have_an_owner() {
        assert_eq!(owner("wherry-lab-17-3"), Some(17));
        for name in ["wherry-lab-17", "wherry-lab-x-3", "wherry-lab-17-", "lab-17-3", "other"] {
            assert_eq!(owner(name), None, "{name}");
        }
    }

    #[test]
    fn what_a_killed_process_has_left_is_swept_and_what_a_live_one_has_is_not() {
        if let Some(what) = crate::missing() {
            println!("SKIPPED: {what}");
            return;
        }
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let name = format!("{PREFIX}{}-0", child.id());
        let path = std::path::Path::new(NAMES).join(&name);
        ip(&["netns", "add", &name]).unwrap();
        sweep();
        let kept = path.exists();
        child.kill().unwrap();
        child.wait().unwrap();
        sweep();
        assert!(kept, "the namespace of a live process was swept");
        assert!(!path.exists(), "{} is still there", path.display());
    }
}
