//! A QEMU process that emulates a machine whose disk a back end of ours serves, and the words by which it is told to move it.
//!
//! Both processes end with the value. What QEMU says of itself is in its QMP reference; events are passed over.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// For a socket to appear, or an answer to come.
const ANSWER: Duration = Duration::from_secs(60);
const MIGRATION: Duration = Duration::from_secs(180);
/// As that of the guests of Wherry, and for the same reasons (`xtask/src/lab/qemu.rs` on clocks).
const CMDLINE: &str = "console=ttyS0 panic=-1 tsc=nowatchdog rcupdate.rcu_cpu_stall_timeout=180 watchdog_thresh=60";

/// What the machines are made of.
#[derive(Debug, Clone)]
pub struct Parts {
    /// Our program.
    pub wherry: PathBuf,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// Its initial RAM file system.
    pub initrd: PathBuf,
    /// Its disk, which every back end opens.
    pub image: PathBuf,
    /// Where sockets are.
    pub directory: PathBuf,
}

/// How memory follows the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// All of it goes before the guest does.
    Precopy,
    /// Nearly all of it goes after, and what the guest misses is asked for.
    Postcopy,
    /// The same, with a connection of its own for what is asked for.
    PostcopyPreempt,
}

impl Way {
    /// All of them, by turns.
    pub const ALL: [Self; 3] = [Self::Precopy, Self::Postcopy, Self::PostcopyPreempt];

    /// Its name in a report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Precopy => "precopy",
            Self::Postcopy => "postcopy",
            Self::PostcopyPreempt => "postcopy-preempt",
        }
    }
}

/// What QEMU says of a move that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moved {
    /// From its start to its end.
    pub total_ms: u64,
    /// How long the guest stood, as the source knows it.
    pub downtime_ms: u64,
    /// Pages that the destination asked for.
    pub requests: u64,
}

/// A process that is killed with the value.
#[derive(Debug)]
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A QEMU with its guest, and the back end of its disk.
#[derive(Debug)]
pub struct Qemu {
    qemu: Process,
    qmp: BufReader<UnixStream>,
    /// Its guest's serial port.
    pub serial: PathBuf,
    back_end: Process,
}

impl Qemu {
    /// Starts both; with `incoming`, for a guest that is to come.
    pub fn start(parts: &Parts, name: &str, incoming: bool) -> Result<Self> {
        let [disk, control, serial] =
            ["disk", "qmp", "serial"].map(|what| parts.directory.join(format!("{name}.{what}")));
        let mut wherry = command(&parts.wherry);
        wherry.args(["device", "blk", "--socket"]).arg(&disk).arg("--image").arg(&parts.image);
        let back_end = Process(wherry.spawn().with_context(|| format!("cannot start {wherry:?}"))?);
        wait(ANSWER, "the back end's socket", || Ok(disk.exists().then_some(())))?;
        let mut qemu = command(Path::new("qemu-system-x86_64"));
        qemu.args(["-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-machine", "q35,memory-backend=ram,pit=off", "-m", "256M", "-smp", "1"])
            .args(["-object", "memory-backend-memfd,id=ram,share=on,size=256M"])
            .args(["-append", CMDLINE, "-kernel"])
            .arg(&parts.kernel)
            .arg("-initrd")
            .arg(&parts.initrd)
            .args(["-chardev", &format!("socket,id=disk,path={}", disk.display())])
            .args(["-device", "vhost-user-blk-pci,chardev=disk,num-queues=1"])
            .args(["-chardev", &format!("socket,id=serial,path={},server=on,wait=off", serial.display())])
            .args(["-serial", "chardev:serial", "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", control.display()));
        if incoming {
            qemu.args(["-incoming", "defer"]);
        }
        let mut qemu = Process(qemu.spawn().context("cannot start QEMU")?);
        let stream = wait(ANSWER, "QEMU's socket", || {
            if let Some(status) = qemu.0.try_wait()? {
                bail!("QEMU {name} ended at once: {status}");
            }
            Ok(UnixStream::connect(&control).ok())
        })?;
        stream.set_read_timeout(Some(ANSWER))?;
        let mut this = Self { qemu, qmp: BufReader::new(stream), serial, back_end };
        this.line()?;
        this.execute("qmp_capabilities", Value::Null)?;
        Ok(this)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.qmp.read_line(&mut line).context("reading what QEMU says")?;
        ensure!(!line.is_empty(), "QEMU closed its socket");
        serde_json::from_str(&line).with_context(|| format!("QEMU says {line:?}"))
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let text = format!("{request}\n");
        self.qmp.get_mut().write_all(text.as_bytes()).with_context(|| format!("telling QEMU {command}"))?;
        loop {
            let mut answer = self.line()?;
            ensure!(answer.get("error").is_none(), "QEMU refuses {command}: {answer}");
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// Moves the guest to a process that waits for one, and waits until both say that it is done.
    pub fn migrate(&mut self, to: &mut Self, way: Way) -> Result<Moved> {
        let postcopy = way != Way::Precopy;
        let capability = |name: &str, state: bool| json!({ "capability": name, "state": state });
        let capabilities = json!({ "capabilities": [
            capability("postcopy-ram", postcopy),
            capability("postcopy-preempt", way == Way::PostcopyPreempt),
        ] });
        for end in [&mut *self, &mut *to] {
            end.execute("migrate-set-capabilities", capabilities.clone())?;
        }
        to.execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }))?;
        let listening = to.execute("query-migrate", Value::Null)?;
        let port = listening["socket-address"][0]["port"].as_str().context("QEMU does not say where it listens")?;
        self.execute("migrate-set-parameters", json!({ "max-bandwidth": 100_000_000_000u64 }))?;
        self.execute("migrate", json!({ "uri": format!("tcp:127.0.0.1:{port}") }))?;
        if postcopy {
            self.execute("migrate-start-postcopy", Value::Null)?;
        }
        let mut last = Value::Null;
        for end in [to, self] {
            last = wait(MIGRATION, "QEMU's migration to end", || {
                let status = end.execute("query-migrate", Value::Null)?;
                ensure!(status["status"] != "failed", "the migration failed: {status}");
                Ok((status["status"] == "completed").then_some(status))
            })?;
        }
        let number =
            |value: &Value, what: &str| value.as_u64().with_context(|| format!("QEMU tells no {what}: {last}"));
        Ok(Moved {
            total_ms: number(&last["total-time"], "total time")?,
            downtime_ms: number(&last["downtime"], "downtime")?,
            requests: number(&last["ram"]["postcopy-requests"], "requests")?,
        })
    }

    /// Has the back end look at its image again.
    pub fn look_again(&self) -> Result<()> {
        let status = Command::new("kill").args(["-HUP", &self.back_end.0.id().to_string()]).status();
        let status = status.context("cannot start kill")?;
        ensure!(status.success(), "kill -HUP of the back end: {status}");
        Ok(())
    }

    /// Fails if the back end has ended.
    pub fn back_end_lives(&mut self) -> Result<()> {
        match self.back_end.0.try_wait()? {
            Some(status) => bail!("the back end of the disk ended: {status}"),
            None => Ok(()),
        }
    }

    /// Waits until QEMU ends by itself, as it does when its guest powers off.
    pub fn ends(&mut self) -> Result<ExitStatus> {
        wait(ANSWER, "QEMU to end", || Ok(self.qemu.0.try_wait()?))
    }
}

/// A command that dies with this process, and cannot write among its lines.
fn command(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// Looks again and again until there is something.
fn wait<T>(limit: Duration, what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        ensure!(start.elapsed() < limit, "waited {limit:?} for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
