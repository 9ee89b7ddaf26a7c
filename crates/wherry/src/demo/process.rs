//! Wherry processes that the demo starts, and that end with it whatever happens.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::time::Instant;
use wherry_netlab::Namespace;
use wherry_vmm::api::types::{VmInfo, VmState};

use crate::args::ANSWER;
use crate::client::Client;

/// A directory for sockets, logs and records, removed when it is dropped. On tmpfs, where ownership records belong: the
/// blackout must not wait for a disk.
pub fn directory(name: &str) -> Result<tempfile::TempDir> {
    let prefix = format!("wherry-{name}-{}-", std::process::id());
    let mut builder = tempfile::Builder::new();
    let builder = builder.prefix(&prefix);
    builder.tempdir_in("/dev/shm").or_else(|_| builder.tempdir()).context("making a directory for sockets")
}

/// A child that holds a VM. Dropping it kills it; it also ends by itself when this process ends.
pub struct Process {
    child: Child,
    /// The one that has taken its place: its number and a pidfd.
    successor: Option<(u32, OwnedFd)>,
    api: PathBuf,
    log: PathBuf,
    /// Its API.
    pub client: Client,
}

impl Process {
    /// Starts this very program with `arguments`; its API, log and ownership records are in `directory`.
    pub fn start(directory: &Path, name: &str, arguments: &[&str]) -> Result<Self> {
        Self::start_in(None, directory, name, arguments)
    }

    /// The same in a network namespace.
    pub fn start_in(namespace: Option<&Namespace>, directory: &Path, name: &str, arguments: &[&str]) -> Result<Self> {
        let program = std::env::current_exe().context("finding this program's own file")?;
        let (api, log) = (directory.join(format!("{name}.api")), directory.join(format!("{name}.log")));
        let out = File::create(&log).with_context(|| format!("making {}", log.display()))?;
        let mut command = Command::new(&program);
        if let Some(namespace) = namespace {
            namespace.hold(&mut command)?;
        }
        let child = command
            .args(arguments)
            .args(["--serial", "null", "--die-with", &std::process::id().to_string(), "--api"])
            .arg(&api)
            .env("WHERRY_RECORDS", directory.join("records"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(out)
            .spawn()
            .with_context(|| format!("starting {} {}", program.display(), arguments.join(" ")))?;
        let client = Client::new(&api);
        Ok(Self { child, successor: None, api, log, client })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.successor.as_ref().map_or_else(|| self.child.id(), |(pid, _)| *pid)
    }

    /// A new process has taken its place, which is ended like it.
    pub async fn was_replaced(&mut self, pid: u32, limit: Duration) -> Result<()> {
        let raw = Pid::from_raw(pid as i32).context("a process without a number")?;
        let pidfd = pidfd_open(raw, PidfdFlags::empty()).context("opening a pidfd of the new process")?;
        let left = self.wait_for_end(limit).await?;
        if !left.success() {
            bail!("the process that was replaced ended with {left}: {}", self.log_text());
        }
        self.successor = Some((pid, pidfd));
        Ok(())
    }

    /// Waits until it is in one of `states`.
    pub async fn wait_for(&mut self, states: &[VmState], limit: Duration) -> Result<VmInfo> {
        let deadline = Instant::now() + limit;
        loop {
            match self.client.get::<VmInfo>("/vm", ANSWER).await {
                Ok(info) if states.contains(&info.state) => return Ok(info),
                Ok(info) if matches!(info.state, VmState::Crashed | VmState::Stopped) => {
                    bail!("process {}: the VM is {}: {}", self.pid(), info.state, info.reason.unwrap_or_default());
                }
                Ok(info) if Instant::now() >= deadline => {
                    bail!("process {}: the VM is {} and not {} after {limit:?}", self.pid(), info.state, states[0]);
                }
                Err(error) if Instant::now() >= deadline => {
                    return Err(error).with_context(|| format!("waiting for process {}", self.pid()));
                }
                _ => {}
            }
            if self.successor.is_none()
                && let Some(status) = self.child.try_wait().context("waiting for a child")?
            {
                bail!("process {} ended with {status}: {}", self.pid(), self.log_text());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Waits until it has ended by itself.
    pub async fn wait_for_end(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().context("waiting for a child")? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("process {} has not ended within {limit:?}", self.pid());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// What it has written to stderr, or as much as a person wants to read.
    pub fn log_text(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = text.trim().lines().collect();
        match lines.len() {
            0 => "it said nothing".into(),
            n => lines[n.saturating_sub(10)..].join("\n"),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some((_, pidfd)) = &self.successor {
            // An error: it has ended.
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
        let _ = std::fs::remove_file(&self.api);
    }
}
