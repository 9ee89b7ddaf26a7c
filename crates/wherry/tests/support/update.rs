//! Processes that hold a VM one after the other.

use std::os::fd::OwnedFd;
use std::process::{Child, Output, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;
use wherry_migration::testpoint::Point;

use super::{Place, Vm, stderr, wait_for};

/// A process that is not our child, and that is ended with the test.
pub struct Holder {
    pub pid: u32,
    pidfd: OwnedFd,
}

impl Holder {
    pub fn of(pid: u32) -> Self {
        let raw = Pid::from_raw(pid as i32).unwrap();
        Self { pid, pidfd: pidfd_open(raw, PidfdFlags::empty()).unwrap() }
    }

    /// The one that holds the VM behind an API socket.
    pub fn behind(place: &Place, api: &str) -> Self {
        let pid = wait_for("the process to answer", || place.ask(api, "/vm")?["pid"].as_u64());
        Self::of(pid as u32)
    }

    pub fn has_ended(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&now)).unwrap() > 0
    }

    pub fn await_end(&self, what: &str) {
        wait_for(&format!("the end of process {}, {what}", self.pid), || self.has_ended().then_some(()));
    }

    pub fn kill(&self) {
        // An error: it has ended.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    pub fn terminate(&self) {
        pidfd_send_signal(&self.pidfd, Signal::TERM).unwrap();
    }

    pub fn hang_up(&self) {
        pidfd_send_signal(&self.pidfd, Signal::HUP).unwrap();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Entries of a directory of a process: descriptors, threads.
pub fn count(pid: u32, what: &str) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count()
}

/// Memory of the process itself, in KiB: not that of the guest.
pub fn own_memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

pub fn updated(output: &Output, what: &str) -> Value {
    assert_eq!(output.status.code(), Some(0), "{what}: {}", stderr(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A number of repetitions that the environment may raise.
pub fn repetitions(default: u64) -> u64 {
    std::env::var("WHERRY_UPDATES").map_or(default, |text| text.parse().unwrap())
}

/// An update with a process held at a point: the command that waits for it, and the process that is there.
pub fn held(place: &Place, point: Point) -> (Child, Holder) {
    held_in(place, point, "transfer")
}

/// The same of an update in this mode.
pub fn held_in(place: &Place, point: Point, mode: &str) -> (Child, Holder) {
    let mut command = place.command(&["update", "--json", "--mode", mode, "--api"]);
    command.arg(place.path("0"));
    let update = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let file = place.path(point.name());
    let pid = wait_for(&format!("a process to come to {point}"), || {
        std::fs::read_to_string(&file).ok().and_then(|text| text.parse().ok())
    });
    (update, Holder::of(pid))
}

/// A guest that is started as told, and whose update is held at a point.
pub fn run_held_at(place: &Place, point: Point, arguments: &[&str]) -> Vm {
    let dir = place.path("");
    let environment = [("WHERRY_TEST_PAUSE_AT", point.name()), ("WHERRY_TEST_PAUSE_DIR", dir.to_str().unwrap())];
    place.run_guest("0", arguments, &environment)
}

pub fn guest_held_at(place: &Place, point: Point) -> Vm {
    run_held_at(place, point, &["--memory", "64M", "--cmdline", "data=16M rate=4M"])
}

pub fn points(side: &str) -> impl Iterator<Item = Point> {
    Point::ALL.iter().copied().filter(move |point| point.name().starts_with(side))
}
