//! Processes that serve a disk by vhost-user.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use wherry_migration::testpoint::Point;
use wherry_netlab::Namespace;

use super::update::{Holder, count, own_memory, updated};
use super::{Place, kvm, listens, wait_for};

/// Who serves a disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Program {
    Qemu,
    Wherry,
}

/// A process that serves a disk; it ends with the value.
pub struct Daemon {
    pub process: Child,
    pub socket: PathBuf,
}

impl Daemon {
    /// Serves an image. Others may have it open, too: only one of them has a guest at any time.
    pub fn serve(place: &Place, name: &str, image: &Path, program: Program) -> Self {
        let socket = place.path(name);
        let mut command = match program {
            Program::Qemu => {
                let node = format!("driver=file,node-name=f,filename={},locking=off", image.display());
                let socket = socket.display();
                let export =
                    format!("type=vhost-user-blk,id=e,node-name=f,writable=on,addr.type=unix,addr.path={socket}");
                let mut command = Command::new("qemu-storage-daemon");
                command.args(["--blockdev", &node, "--export", &export]).stderr(Stdio::null());
                command
            }
            Program::Wherry => {
                let mut command = place.command(&["device", "blk", "--socket"]);
                command.arg(&socket).arg("--image").arg(image).stderr(Stdio::inherit());
                command
            }
        };
        let process = command.stdout(Stdio::null()).spawn().unwrap();
        wait_for("the socket of a back end", || listens(&socket).then_some(()));
        Self { process, socket }
    }

    pub fn device(&self) -> String {
        format!("vhost-user-blk={}", self.socket.display())
    }

    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Whether it and KVM are there; says what is skipped if not.
pub fn able(test: &str, program: Program) -> bool {
    let there = program == Program::Wherry
        || Command::new("qemu-storage-daemon").arg("--version").stdout(Stdio::null()).status().is_ok();
    if !there {
        println!("SKIPPED {test}: qemu-storage-daemon is not installed (Debian package qemu-utils)");
    }
    there && kvm(test)
}

/// A back end of ours whose process can be replaced, and whoever serves it.
pub struct BackEnd<'a> {
    place: &'a Place,
    first: Child,
    pub socket: PathBuf,
    pub control: PathBuf,
    pub now: Holder,
}

impl<'a> BackEnd<'a> {
    /// A disk.
    pub fn disk(place: &'a Place, name: &str, image: &Path, environment: &[(&str, &str)]) -> Self {
        let mut command = place.command(&["device", "blk", "--image"]);
        command.arg(image).envs(environment.iter().copied());
        Self::start(place, name, command)
    }

    /// A network device on a tap of this namespace.
    pub fn network(place: &'a Place, name: &str, namespace: &Namespace, tap: &str, mac: &str) -> Self {
        let mut command = place.command(&["device", "net", "--tap", tap, "--mac", mac]);
        namespace.hold(&mut command).unwrap();
        Self::start(place, name, command)
    }

    fn start(place: &'a Place, name: &str, mut command: Command) -> Self {
        let (socket, control) = (place.path(name), place.path(&format!("{name}.control")));
        command.arg("--socket").arg(&socket).arg("--control").arg(&control);
        command.args(["--die-with", &std::process::id().to_string()]);
        let first = command.stdout(Stdio::null()).stderr(Stdio::inherit()).spawn().unwrap();
        let now = Holder::of(first.id());
        // The latter is made last, and takes any number of clients; those of another network namespace are not listed here.
        wait_for("the sockets of a back end", || UnixStream::connect(&control).ok());
        Self { place, first, socket, control, now }
    }

    /// What asks for another process in its place.
    pub fn asking(&self, more: &[&str]) -> Command {
        let arguments = ["update", "--json", "--control", self.control.to_str().unwrap()];
        self.place.command(&[&arguments[..], more].concat())
    }

    /// Asks for another process in its place.
    pub fn ask(&self, more: &[&str]) -> Output {
        self.asking(more).output().unwrap()
    }

    /// Has another process take its place.
    pub fn update(&mut self, what: &str) -> Value {
        let job = updated(&self.ask(&[]), what);
        self.is_now(&job, what);
        job
    }

    /// Whoever the answer to an update names has taken its place.
    pub fn is_now(&mut self, job: &Value, what: &str) {
        let next = Holder::of(job["pid"].as_u64().unwrap() as u32);
        assert_ne!(next.pid, self.now.pid);
        self.now.await_end(what);
        self.now = next;
    }

    /// An update with a process held at a point: the command that waits for it, and the process that is there.
    pub fn held(&self, point: Point) -> (Child, Holder) {
        let update = self.asking(&[]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let file = self.place.path(point.name());
        let pid = wait_for(&format!("a process to come to {point}"), || {
            std::fs::read_to_string(&file).ok().and_then(|text| text.parse().ok())
        });
        (update, Holder::of(pid))
    }

    /// Descriptors, threads, and memory of its own in KiB.
    pub fn figures(&self) -> (usize, usize, u64) {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.now.pid)).unwrap().flatten();
        // The kernel has threads of its own for disk I/O, which come and go.
        let kernel = |task: &std::fs::DirEntry| {
            std::fs::read_to_string(task.path().join("comm")).map_or(true, |name| name.starts_with("iou-"))
        };
        let threads = tasks.filter(|task| !kernel(task)).count();
        (count(self.now.pid, "fd"), threads, own_memory(self.now.pid))
    }

    /// Asks it to end, and waits until it has, without a trace.
    pub fn finish(self) {
        self.now.terminate();
        self.now.await_end("which was asked to end");
        wait_for("the sockets to be removed", || (!self.socket.exists() && !self.control.exists()).then_some(()));
    }
}

impl Drop for BackEnd<'_> {
    fn drop(&mut self) {
        let _ = self.first.kill();
        let _ = self.first.wait();
    }
}
