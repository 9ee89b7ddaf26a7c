//! QEMU as the peer to compare with: the same probe guest, migrated between two QEMU processes over loopback TCP.
//!
//! QEMU is driven through QMP on a UNIX socket. Its RAM is a shared memfd too, so the same watcher reads the guest's
//! report page from outside.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Where Debian puts it.
const PROGRAM: &str = "qemu-system-x86_64";

/// Name of the memfd that `memory-backend-memfd` makes.
pub const RAM_NAME: &str = "memory-backend-memfd";

/// No answer of QEMU takes longer.
const ANSWER: Duration = Duration::from_secs(20);

/// Its version, or `None` if QEMU is not installed.
pub fn version() -> Option<String> {
    let output = Command::new(PROGRAM).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let version = text.lines().next()?.trim_start_matches("QEMU emulator version ");
    Some(version.split_whitespace().next()?.to_owned())
}

/// The guest to run.
#[derive(Clone, Debug)]
pub struct Guest<'a> {
    /// PVH ELF kernel.
    pub kernel: &'a Path,
    /// Its command line.
    pub cmdline: &'a str,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// vCPUs.
    pub cpus: u32,
}

/// How to migrate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// One stream.
    Precopy,
    /// Two streams (`multifd`).
    Multifd,
    /// The switch at once (`postcopy-ram`), with a stream of its own for what is asked for (`postcopy-preempt`).
    Postcopy,
}

/// A migration that has ended.
#[derive(Clone, Copy, Debug)]
pub struct Migrated {
    /// When the command was given.
    pub begin: Instant,
    /// How long QEMU says it took, in whole milliseconds: by postcopy, until all memory was there.
    pub took: Duration,
    /// How many pages the destination asked for.
    pub requests: u64,
}

/// A running QEMU process; it is killed when this is dropped.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    socket: PathBuf,
    qmp: BufReader<UnixStream>,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl Qemu {
    /// Starts QEMU under KVM; `incoming` makes it wait for a migration.
    pub fn start(guest: &Guest<'_>, dir: &Path, name: &str, incoming: bool) -> Result<Self> {
        let incoming: &[String] = if incoming { &["-incoming".into(), "defer".into()] } else { &[] };
        let (child, socket) = Self::spawn(guest, dir, name, incoming)?;
        Self::attach(child, socket)
    }

    fn spawn(guest: &Guest<'_>, dir: &Path, name: &str, more: &[String]) -> Result<(Child, PathBuf)> {
        let socket = dir.join(format!("{name}.qmp"));
        let mut command = Command::new(PROGRAM);
        command
            // KVM may offer an MSR that no vCPU takes; QEMU ends at that. The probe guest does not need it.
            .args([
                "-accel",
                "kvm",
                "-cpu",
                "host,arch-capabilities=off",
                "-nodefaults",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args(["-machine", "q35,memory-backend=ram,aux-ram-share=on", "-m", &format!("{}M", guest.memory_mib)])
            .args(["-object", &format!("memory-backend-memfd,id=ram,share=on,size={}M", guest.memory_mib)])
            .args(["-smp", &guest.cpus.to_string(), "-append", guest.cmdline, "-kernel"])
            .arg(guest.kernel)
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .args(more);
        Ok((command.spawn().with_context(|| format!("starting {PROGRAM}"))?, socket))
    }

    fn attach(mut child: Child, socket: PathBuf) -> Result<Self> {
        match Self::connect(&socket, &mut child) {
            Ok(qmp) => {
                let mut qemu = Self { child, socket, qmp };
                qemu.read()?; // greeting
                qemu.execute("qmp_capabilities", Value::Null)?;
                Ok(qemu)
            }
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    fn connect(socket: &Path, child: &mut Child) -> Result<BufReader<UnixStream>> {
        let deadline = Instant::now() + ANSWER;
        loop {
            if let Ok(stream) = UnixStream::connect(socket) {
                stream.set_read_timeout(Some(ANSWER))?;
                return Ok(BufReader::new(stream));
            }
            if let Some(status) = child.try_wait()? {
                bail!("{PROGRAM} ended at once: {status}");
            }
            if Instant::now() > deadline {
                bail!("{PROGRAM} did not open {} within {ANSWER:?}", socket.display());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Process id, for the watcher.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Runs a QMP command and gives what it returns.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let stream = self.qmp.get_mut();
        stream.write_all(format!("{request}\n").as_bytes()).with_context(|| format!("sending {command} to QEMU"))?;
        loop {
            let mut answer = self.read().with_context(|| format!("waiting for QEMU's answer to {command}"))?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            // Anything else is an event.
        }
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.qmp.read_line(&mut line)? == 0 {
            bail!("QEMU closed its QMP connection");
        }
        Ok(serde_json::from_str(&line)?)
    }

    fn capabilities(&mut self, method: Method) -> Result<()> {
        let postcopy = method == Method::Postcopy;
        let wanted =
            [("multifd", method == Method::Multifd), ("postcopy-ram", postcopy), ("postcopy-preempt", postcopy)];
        let wanted = wanted.map(|(capability, state)| json!({ "capability": capability, "state": state }));
        self.execute("migrate-set-capabilities", json!({ "capabilities": wanted }))?;
        if method == Method::Multifd {
            self.execute("migrate-set-parameters", json!({ "multifd-channels": 2 }))?;
        }
        Ok(())
    }

    /// Has another QEMU take the guest over with its memory (`cpr-transfer`), and gives that one when it answers; this one has
    /// nothing left to run.
    pub fn update(&mut self, guest: &Guest<'_>, dir: &Path, name: &str) -> Result<Self> {
        let [main, cpr] = ["main", "cpr"].map(|kind| {
            let path = dir.join(format!("{name}.{kind}"));
            let address = json!({ "transport": "socket", "type": "unix", "path": path });
            (path, json!({ "channel-type": kind, "addr": address }))
        });
        let incoming = [&main, &cpr].into_iter().flat_map(|(_, channel)| ["-incoming".into(), channel.to_string()]);
        let (mut child, socket) = Self::spawn(guest, dir, name, &incoming.collect::<Vec<_>>())?;
        let taken = self.pass(&mut child, [&main, &cpr]);
        for (path, _) in [&main, &cpr] {
            let _ = std::fs::remove_file(path);
        }
        if let Err(error) = taken {
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
        Self::attach(child, socket)
    }

    fn pass(&mut self, child: &mut Child, channels: [&(PathBuf, Value); 2]) -> Result<()> {
        let [_, (cpr, _)] = channels;
        let deadline = Instant::now() + ANSWER;
        while !cpr.exists() {
            if let Some(status) = child.try_wait()? {
                bail!("the QEMU that was to take over ended at once: {status}");
            }
            if Instant::now() > deadline {
                bail!("the QEMU that was to take over did not open {} within {ANSWER:?}", cpr.display());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.execute("migrate-set-parameters", json!({ "mode": "cpr-transfer" }))?;
        let channels = channels.map(|(_, channel)| channel.clone());
        self.execute("migrate", json!({ "channels": channels }))?;
        let begin = Instant::now();
        loop {
            let status = self.execute("query-migrate", Value::Null)?;
            match status["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => bail!("QEMU's update failed: {status}"),
                _ if begin.elapsed() > Duration::from_secs(60) => bail!("QEMU's update does not end: {status}"),
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Migrates the guest into `to`, and returns when QEMU calls it completed. The bandwidth is not limited.
    pub fn migrate(&mut self, to: &mut Qemu, method: Method, downtime_limit_ms: u64) -> Result<Migrated> {
        for end in [&mut *self, &mut *to] {
            end.capabilities(method)?;
        }
        to.execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }))?;
        let listening = to.execute("query-migrate", Value::Null)?;
        let port = listening["socket-address"][0]["port"]
            .as_str()
            .with_context(|| format!("QEMU does not say where it listens: {listening}"))?
            .to_owned();
        self.execute(
            "migrate-set-parameters",
            json!({ "max-bandwidth": 100_000_000_000u64, "downtime-limit": downtime_limit_ms }),
        )?;
        let begin = Instant::now();
        self.execute("migrate", json!({ "uri": format!("tcp:127.0.0.1:{port}") }))?;
        if method == Method::Postcopy {
            self.execute("migrate-start-postcopy", Value::Null)?;
        }
        loop {
            let status = self.execute("query-migrate", Value::Null)?;
            match status["status"].as_str() {
                Some("completed") => {
                    let took = status["total-time"].as_u64().context("QEMU does not say how long it took")?;
                    let requests = status["ram"]["postcopy-requests"].as_u64().unwrap_or(0);
                    return Ok(Migrated { begin, took: Duration::from_millis(took), requests });
                }
                Some("failed" | "cancelled") => bail!("QEMU's migration failed: {status}"),
                _ if begin.elapsed() > Duration::from_secs(60) => bail!("QEMU's migration does not end: {status}"),
                _ => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }
}
