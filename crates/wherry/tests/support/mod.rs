//! What the black-box tests share: real processes of the real program, which end with the test whatever happens.

#![allow(dead_code, reason = "each test file uses its part")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

pub mod disk;
pub mod net;
pub mod testdma;
pub mod update;
pub mod vhost;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use wherry_guest::report::{CONTROL_GPA, Control, Phase};
use wherry_guest::snapshot::Snapshot;
use wherry_netlab::Namespace;

/// The longest wait of any test.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Whether there is a usable KVM; says that the test is skipped if not.
pub fn kvm(test: &str) -> bool {
    let there = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        println!("SKIPPED {test}: no usable /dev/kvm");
    }
    there
}

/// Waits until `done` gives something, and says what it waited for if it never does.
pub fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {} s for {what}", LIMIT.as_secs());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether somebody listens on a socket: its file is there a moment before. Makes no connection, of which some take only one.
pub fn listens(socket: &Path) -> bool {
    /// `__SO_ACCEPTCON` of the kernel, as `/proc/net/unix` shows it.
    const LISTENS: &str = "00010000";
    let all = std::fs::read_to_string("/proc/net/unix").unwrap();
    let path = socket.to_str().unwrap();
    all.lines().any(|line| line.split_whitespace().nth(3) == Some(LISTENS) && line.ends_with(&format!(" {path}")))
}

/// A directory for sockets and records of one test, and the program that is started in it.
pub struct Place {
    dir: Arc<tempfile::TempDir>,
    program: PathBuf,
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("wherry-test-").tempdir().unwrap();
        Self { dir: Arc::new(dir), program: env!("CARGO_BIN_EXE_wherry").into() }
    }

    /// The same directory with another program.
    pub fn of(&self, program: &Path) -> Self {
        Self { dir: self.dir.clone(), program: program.into() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The program, with records of its own.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .env("WHERRY_RECORDS", self.path("records"))
            .env_remove("WHERRY_LOG")
            .stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    pub fn wherry(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs a command on the process with that API socket.
    pub fn control(&self, api: &str, arguments: &[&str]) -> Output {
        let api = self.path(api);
        let mut all = arguments.to_vec();
        all.extend(["--api", api.to_str().unwrap()]);
        self.wherry(&all)
    }

    /// `status --json`, if somebody answers.
    pub fn status(&self, api: &str) -> Option<Value> {
        serde_json::from_slice(&self.control(api, &["status", "--json"]).stdout).ok()
    }

    /// What the process with that API socket answers to a GET, if it answers. Faster than a command.
    pub fn ask(&self, api: &str, path: &str) -> Option<Value> {
        use std::io::{Read, Write};
        let mut stream = std::os::unix::net::UnixStream::connect(self.path(api)).ok()?;
        stream.set_read_timeout(Some(LIMIT)).ok()?;
        write!(stream, "GET /api/v1{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
    }

    /// Waits for a state.
    pub fn wait_for_state(&self, api: &str, state: &str) -> Value {
        let mut last = Value::Null;
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            if let Some(status) = self.status(api) {
                if status["state"] == state {
                    return status;
                }
                last = status;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("{api} did not become {state}; it is {last:#}");
    }

    /// Starts a process that holds a VM.
    pub fn start(&self, api: &str, arguments: &[&str]) -> Vm {
        self.start_with(api, arguments, &[])
    }

    /// Starts one with more in its environment.
    pub fn start_with(&self, api: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Vm {
        let mut command = self.command(arguments);
        command.envs(environment.iter().copied());
        self.start_command(api, command)
    }

    /// Starts one with this as its standard input.
    pub fn start_from(&self, input: impl Into<Stdio>, api: &str, arguments: &[&str]) -> Vm {
        let mut command = self.command(arguments);
        command.stdin(input);
        self.start_command(api, command)
    }

    /// Starts one inside a network namespace.
    pub fn start_in(&self, namespace: &Namespace, api: &str, arguments: &[&str]) -> Vm {
        let mut command = self.command(arguments);
        namespace.hold(&mut command).unwrap();
        self.start_command(api, command)
    }

    /// Starts what was made ready.
    pub fn start_command(&self, api: &str, mut command: Command) -> Vm {
        let path = self.path(api);
        let log = self.path(&format!("{api}.log"));
        if !command.get_args().any(|argument| argument == "--serial") {
            command.args(["--serial", "null"]);
        }
        let child = command
            .arg("--api")
            .arg(&path)
            .args(["--die-with", &std::process::id().to_string()])
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Vm { child, api: path, log }
    }

    /// Starts a small probe guest and waits until it works.
    pub fn run(&self, api: &str) -> Vm {
        self.run_with(api, &[], &[])
    }

    /// Starts one with more arguments, and more in its environment.
    pub fn run_with(&self, api: &str, more: &[&str], environment: &[(&str, &str)]) -> Vm {
        let mut arguments = vec!["--memory", "64M", "--cmdline", "data=16M rate=4M"];
        arguments.extend(more);
        self.run_guest(api, &arguments, environment)
    }

    /// Starts a probe guest as told and waits until it works.
    pub fn run_guest(&self, api: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Vm {
        let vm = self.start_with(api, &[&["run", "--name", "t"], arguments].concat(), environment);
        self.wait_until_filled(api);
        vm
    }

    /// Waits until a probe guest has filled its data and works.
    pub fn wait_until_filled(&self, api: &str) {
        let ram = ram(&self.wait_for_state(api, "running"));
        wait_for("the guest to have filled its data", || (snapshot(&ram)?.phase() >= Phase::Running).then_some(()));
    }

    /// Has a probe guest check all of its data once more: it has found nothing wrong, from its start to now. Its end
    /// ends the process.
    pub fn finish(&self, api: &str, vm: &mut Vm) {
        let ram = ram(&self.wait_for_state(api, "running"));
        command(vm, &ram, std::mem::offset_of!(Control, finish));
        // The memory is looked at through this descriptor, also when the process has ended.
        let end =
            wait_for("the guest to check all of its data", || snapshot(&ram).filter(|s| s.phase() >= Phase::Finished));
        assert_eq!((end.phase(), end.verify_errors()), (Phase::Finished, 0), "{end:#?}");
        assert_eq!(end.cpus.iter().map(|c| c.register_errors + c.tsc_backwards).sum::<u64>(), 0, "{end:#?}");
        assert_eq!(vm.end().code(), Some(0), "{}", vm.log());
    }

    /// Starts a receiver on a free port and gives its address.
    pub fn receive(&self, api: &str, more: &[&str]) -> (Vm, String) {
        self.receive_with(api, more, &[])
    }

    /// Starts one with more in its environment.
    pub fn receive_with(&self, api: &str, more: &[&str], environment: &[(&str, &str)]) -> (Vm, String) {
        let mut arguments = vec!["receive", "--listen", "tcp:127.0.0.1:0"];
        arguments.extend(more);
        let vm = self.start_with(api, &arguments, environment);
        let status = self.wait_for_state(api, "listening");
        (vm, status["listen"].as_str().unwrap().to_owned())
    }
}

/// A process that holds a VM.
pub struct Vm {
    child: Child,
    api: PathBuf,
    log: PathBuf,
}

impl Vm {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn api(&self) -> &Path {
        &self.api
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid() as i32).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Its exit code, if it has ended.
    pub fn ended(&mut self) -> Option<Option<i32>> {
        self.child.try_wait().unwrap().map(|status| status.code())
    }

    /// Waits for its end.
    pub fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "waited for the end of process {}: {}", self.pid(), self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of {} ---\n{}", self.api.display(), self.log());
        }
    }
}

/// The lowest RAM block of a VM, opened as its status names it.
pub fn ram(status: &Value) -> std::fs::File {
    let block = status["vm"]["blocks"].as_array().unwrap().iter().find(|b| b["guest_base"] == 0).unwrap();
    let path = format!("/proc/{}/fd/{}", status["pid"], block["fd"]);
    std::fs::File::open(path).unwrap()
}

/// The lowest RAM block of a process, found without its help: while a VM arrives its API may not tell.
pub fn ram_of(pid: u32) -> std::fs::File {
    wait_for("the process to have RAM", || {
        let mut fds: Vec<_> =
            std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten().map(|e| e.path()).collect();
        fds.sort_by_key(|path| path.file_name().and_then(|n| n.to_str()?.parse::<u32>().ok()));
        let is_ram = |path: &PathBuf| {
            std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:wherry-ram"))
        };
        std::fs::File::open(fds.into_iter().find(is_ram)?).ok()
    })
}

/// What a probe guest reports, once it does. It has found nothing wrong so far.
pub fn snapshot(ram: &std::fs::File) -> Option<Snapshot> {
    let mut report = vec![0; wherry_guest::report::REPORT_SIZE as usize];
    ram.read_exact_at(&mut report, wherry_guest::report::REPORT_GPA).unwrap();
    let snapshot = Snapshot::decode(&report).ok()?;
    assert!(snapshot.failure.is_none(), "{:?}", snapshot.failure);
    Some(snapshot)
}

/// Adds 1 to a word of a probe guest's control page. Not while a migration runs: the dirty log does not see it.
fn command(vm: &Vm, ram: &std::fs::File, offset: usize) {
    // Through a map of the process: huge pages cannot be written by descriptor.
    let inode = ram.metadata().unwrap().ino().to_string();
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", vm.pid())).unwrap();
    let base = maps.lines().find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let start = fields[0].split_once('-')?.0;
        let whole = fields[1].starts_with("rw") && fields[2] == "00000000" && fields[4] == inode;
        whole.then(|| u64::from_str_radix(start, 16).unwrap())
    });
    let base = base.unwrap();
    let memory = std::fs::File::options().write(true).open(format!("/proc/{}/mem", vm.pid())).unwrap();
    let add = |at: u64| {
        let mut byte = [0];
        ram.read_exact_at(&mut byte, at).unwrap();
        memory.write_all_at(&[byte[0].wrapping_add(1)], base + at).unwrap();
    };
    add(CONTROL_GPA + offset as u64);
    add(CONTROL_GPA + std::mem::offset_of!(Control, sequence) as u64);
}

/// The heartbeat of its vCPU 0.
pub fn heartbeat(ram: &std::fs::File) -> u64 {
    let mut word = [0; 8];
    ram.read_exact_at(&mut word, wherry_guest::report::heartbeat_gpa(0)).unwrap();
    u64::from_le_bytes(word)
}

/// Waits until a VM runs and its guest's heart beats.
pub fn assert_alive(place: &Place, api: &str) {
    let ram = ram(&place.wait_for_state(api, "running"));
    let before = heartbeat(&ram);
    wait_for("the guest's heart to beat", || (heartbeat(&ram) > before).then_some(()));
}

/// What a command said on stderr.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
