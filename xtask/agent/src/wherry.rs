//! Wherry's processes inside the outer machine: start them, wait for them, never leave one behind.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use wherry_netlab::Namespace;

/// A Wherry process that owns, or waits for, a VM.
#[derive(Debug)]
pub struct Vmm {
    child: Child,
    /// The process that has taken over, which is no child of ours.
    successor: Option<OwnedFd>,
    name: String,
    /// Its API socket.
    pub api: PathBuf,
    /// Its guest's serial port.
    pub serial: PathBuf,
}

impl Vmm {
    /// Starts `wherry ARGUMENTS --api … --serial …` and waits until its API answers.
    pub fn start(name: &str, arguments: &[&str]) -> Result<Self> {
        Self::start_in(None, name, arguments)
    }

    /// The same, in a network namespace.
    pub fn start_in(namespace: Option<&Namespace>, name: &str, arguments: &[&str]) -> Result<Self> {
        Self::start_with(namespace, name, arguments, &[])
    }

    /// The same, with this in its environment.
    pub fn start_with(
        namespace: Option<&Namespace>,
        name: &str,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Self> {
        let api = PathBuf::from(format!("/tmp/{name}.api"));
        let serial = PathBuf::from(format!("/tmp/{name}.serial"));
        let mut command = Command::new("wherry");
        command.args(arguments).arg("--api").arg(&api).arg(format!("--serial=socket:{}", serial.display()));
        command.envs(environment.iter().copied());
        if let Some(namespace) = namespace {
            namespace.hold(&mut command)?;
        }
        let child = command.stdin(Stdio::null()).spawn().with_context(|| format!("cannot start {command:?}"))?;
        let mut vmm = Self { child, successor: None, name: name.to_owned(), api, serial };
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if vmm.status().is_ok() {
                return Ok(vmm);
            }
            if let Some(status) = vmm.child.try_wait()? {
                bail!("wherry {} ended at once: {status}; arguments {arguments:?}", vmm.name);
            }
            if Instant::now() >= deadline {
                bail!("waited 60 s for the API of wherry {} at {}", vmm.name, vmm.api.display());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What `wherry status --json` says.
    pub fn status(&self) -> Result<String> {
        run(&["status", "--json", "--api", path(&self.api)], Duration::from_secs(20))
    }

    /// Waits for the process to end by itself, as it should. How one ends that has taken over, only its own parent is told.
    pub fn end(&mut self, limit: Duration) -> Result<()> {
        let late = || format!("waited {limit:?} for wherry {} to end", self.name);
        if let Some(successor) = &self.successor {
            let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: 0 };
            let ended = poll(&mut [PollFd::new(successor, PollFlags::IN)], Some(&limit))?;
            ensure!(ended > 0, "{}", late());
            return Ok(());
        }
        let status = wait(&mut self.child, limit)?.with_context(late)?;
        ensure!(status.success(), "wherry {} ended with {status}", self.name);
        Ok(())
    }

    /// Has another process take over, with all that this one is connected to. Gives the blackout in microseconds.
    pub fn update(&mut self, limit: Duration) -> Result<u64> {
        let report = run(&["update", "--api", path(&self.api), "--json"], limit)?;
        let report: serde_json::Value =
            serde_json::from_str(&report).with_context(|| format!("no report: {report}"))?;
        let pid = report["pid"].as_i64().and_then(|pid| Pid::from_raw(pid as i32)).context("the report has no pid")?;
        let blackout = report["job"]["blackout"]["total_us"].as_u64().context("the report has no blackout")?;
        self.end(limit).context("a process that was replaced must go away")?;
        self.successor = Some(pidfd_open(pid, PidfdFlags::empty())?);
        Ok(blackout)
    }
}

impl Vmm {
    /// Begins an update and kills the new process where it is held, which it says by a file with its process ID. The update has failed when this
    /// returns.
    pub fn update_killed(&self, held: &Path, limit: Duration) -> Result<()> {
        let mut update = Command::new("wherry")
            .args(["update", "--api", path(&self.api)])
            .stdin(Stdio::null())
            .spawn()
            .context("cannot start wherry update")?;
        let result = self.kill_held(held, limit).and_then(|()| wait(&mut update, limit));
        let _ = update.kill();
        let _ = update.wait();
        let status =
            result?.with_context(|| format!("waited {limit:?} for an update to fail whose process was killed"))?;
        ensure!(!status.success(), "an update whose process was killed has ended well");
        Ok(())
    }

    fn kill_held(&self, held: &Path, limit: Duration) -> Result<()> {
        let start = Instant::now();
        let pid = loop {
            let pid = std::fs::read_to_string(held).ok().and_then(|text| Pid::from_raw(text.trim().parse().ok()?));
            if let Some(pid) = pid {
                break pid;
            }
            ensure!(start.elapsed() < limit, "waited {limit:?} for the new process to come to {}", held.display());
            std::thread::sleep(Duration::from_millis(10));
        };
        ensure!(pid.as_raw_nonzero().get() as u32 != self.child.id(), "the old process is held at {}", held.display());
        kill_process(pid, Signal::KILL).with_context(|| format!("killing process {pid:?} of {}", self.name))
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if let Some(successor) = &self.successor {
            // An error: it has ended.
            let _ = pidfd_send_signal(successor, Signal::KILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process that serves a device; it ends with the value.
#[derive(Debug)]
pub struct Device {
    child: Child,
    /// Where it listens.
    pub socket: PathBuf,
}

impl Device {
    /// Starts `wherry device ARGUMENTS --socket …`, in a network namespace if one is given.
    pub fn start(namespace: Option<&Namespace>, name: &str, arguments: &[&str]) -> Result<Self> {
        let socket = PathBuf::from(format!("/tmp/{name}"));
        let mut command = Command::new("wherry");
        command.arg("device").args(arguments).arg("--socket").arg(&socket).stdin(Stdio::null());
        if let Some(namespace) = namespace {
            namespace.hold(&mut command)?;
        }
        let child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        Ok(Self { child, socket })
    }

    /// Waits until it listens.
    pub fn wait(&self, limit: Duration) -> Result<()> {
        let start = Instant::now();
        while !self.socket.exists() {
            ensure!(start.elapsed() < limit, "waited {limit:?} for the socket {}", self.socket.display());
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Moves the guest of `source` to `target`, which waits at `address`; `how` is what else `wherry migrate` is told. The
/// source has ended when this returns. Gives the blackout in microseconds.
pub fn migrate(mut source: Vmm, target: &Vmm, address: &str, how: &[&str], limit: Duration) -> Result<u64> {
    let mut arguments = vec!["migrate", "--api", path(&source.api), "--to", address, "--json"];
    arguments.extend(how);
    let report = run(&arguments, limit).with_context(|| format!("the target says {:?}", target.status()))?;
    let report: serde_json::Value = serde_json::from_str(&report).with_context(|| format!("no report: {report}"))?;
    let blackout = report["blackout"]["total_us"].as_u64().context("the report has no blackout.total_us")?;
    source.end(limit).context("the source of a finished migration must go away")?;
    Ok(blackout)
}

/// Runs a `wherry` command to its end and returns what it printed; it must succeed.
pub fn run(arguments: &[&str], limit: Duration) -> Result<String> {
    let (out, err) = (scratch("out"), scratch("err"));
    let mut child = Command::new("wherry")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(&out).context("cannot create a file for the output")?)
        .stderr(std::fs::File::create(&err).context("cannot create a file for the errors")?)
        .spawn()
        .with_context(|| format!("cannot start wherry {arguments:?}"))?;
    let status = wait(&mut child, limit)?;
    if status.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let read = |path: &Path| String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).trim().to_owned();
    let (printed, complained) = (read(&out), read(&err));
    let _ = std::fs::remove_file(&out);
    let _ = std::fs::remove_file(&err);
    match status {
        Some(status) if status.success() => Ok(printed),
        Some(status) => bail!("wherry {arguments:?}: {status}: {complained} {printed}"),
        None => bail!("wherry {arguments:?}: still running after {limit:?}: {complained} {printed}"),
    }
}

/// Waits for a child until `limit` is over.
fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn scratch(kind: &str) -> PathBuf {
    std::env::temp_dir().join(format!("lab-agent-{}.{kind}", std::process::id()))
}

/// A path of ours as text; we made it of ASCII.
pub fn path(path: &Path) -> &str {
    path.to_str().unwrap_or_default()
}
