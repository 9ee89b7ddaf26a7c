//! Live update of a VM whose serial port is the terminal of a shell: what the shell, the user and the terminal see of it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr, tcgetpgrp};
use support::update::{Holder, held, updated};
use support::{Place, assert_alive, kvm, wait_for};
use wherry_migration::testpoint::Point;

/// A shell with job control on a terminal of its own, which runs one VM and says how that ended.
struct Shell {
    user: OwnedFd,
    child: Child,
    seen: String,
    before: String,
    log: std::path::PathBuf,
}

fn described(settings: &Termios) -> String {
    format!("{settings:?}")
}

impl Shell {
    fn start(place: &Place, environment: &[(&str, &str)]) -> Self {
        let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&user).unwrap();
        unlockpt(&user).unwrap();
        rustix::io::ioctl_fionbio(&user, true).unwrap();
        let name = ptsname(&user, Vec::new()).unwrap();
        let terminal = rustix::fs::open(&name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let before = described(&tcgetattr(&terminal).unwrap());
        let log = place.path("0.log");
        let script = "set -m; \"$@\"; echo \"the status is $?.\"";
        let mut command = Command::new("setsid");
        command.args(["--ctty", "sh", "-c", script, "sh", env!("CARGO_BIN_EXE_wherry"), "run", "--name", "t"]);
        command.args(["--serial", "stdio", "--memory", "64M", "--cmdline", "data=4M rate=4M", "--api"]);
        let child = command
            .arg(place.path("0"))
            .env("WHERRY_RECORDS", place.path("records"))
            .env_remove("WHERRY_LOG")
            .envs(environment.iter().copied())
            .stdin(Stdio::from(terminal.try_clone().unwrap()))
            .stdout(Stdio::from(terminal))
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        place.wait_until_filled("0");
        Self { user, child, seen: String::new(), before, log }
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.user).unwrap().local_modes.contains(LocalModes::ICANON)
    }

    fn kind(&self, keys: &[u8]) {
        rustix::io::write(&self.user, keys).unwrap();
    }

    /// Waits until the shell goes on: with which status the VM ended, for it.
    fn await_status(&mut self) -> u8 {
        let user = &self.user;
        let seen = &mut self.seen;
        let status = wait_for("the shell to go on", || {
            let mut bytes = [0; 4096];
            if let Ok(read) = rustix::io::read(user, &mut bytes) {
                seen.push_str(&String::from_utf8_lossy(&bytes[..read]));
            }
            seen.split_once("the status is ")?.1.split_once('.')?.0.parse().ok()
        });
        self.child.wait().unwrap();
        status
    }

    /// The shell has its terminal as it was.
    fn assert_as_before(&self) {
        assert_eq!(described(&tcgetattr(&self.user).unwrap()), self.before);
    }

    fn foreground(&self) -> u32 {
        tcgetpgrp(&self.user).unwrap().as_raw_nonzero().get() as u32
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // The terminal hangs up, too.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!(
                "--- seen ---\n{}\n--- log ---\n{}",
                self.seen,
                std::fs::read_to_string(&self.log).unwrap_or_default()
            );
        }
    }
}

fn can_run(test: &str) -> bool {
    if Command::new("setsid").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("SKIPPED {test}: no setsid");
        return false;
    }
    kvm(test)
}

/// The first process has become the one that waits, and has nothing of the VM any more.
fn await_waiting(first: &Holder) {
    let proc = |file: &str| std::fs::read(format!("/proc/{}/{file}", first.pid)).unwrap_or_default();
    wait_for("the first process to have become the one that waits", || {
        proc("cmdline").split(|byte| *byte == 0).any(|word| word == b"wait-for-successor").then_some(())
    });
    let maps = String::from_utf8_lossy(&proc("maps")).into_owned();
    assert!(!maps.contains("wherry-ram") && !maps.contains("kvm"), "{maps}");
    for entry in std::fs::read_dir(format!("/proc/{}/fd", first.pid)).unwrap().flatten() {
        let to = std::fs::read_link(entry.path()).unwrap_or_default();
        assert!(!to.to_string_lossy().contains("memfd") && !to.to_string_lossy().contains("kvm"), "{}", to.display());
    }
}

fn update(place: &Place, what: &str) -> Holder {
    updated(&place.control("0", &["update", "--json"]), what);
    Holder::behind(place, "0")
}

#[test]
fn a_shell_waits_for_the_vm_in_whichever_process_it_is_and_gets_its_terminal_back_as_it_was() {
    if !can_run("a_shell_waits_for_the_vm_in_whichever_process_it_is_and_gets_its_terminal_back_as_it_was") {
        return;
    }
    let place = Place::new();
    let mut shell = Shell::start(&place, &[]);
    let first = Holder::behind(&place, "0");
    assert!(shell.is_raw());
    let foreground = shell.foreground();
    assert_eq!(foreground, first.pid, "the shell has no job control");
    // By exec the first process stays what it is.
    updated(&place.control("0", &["update", "--mode", "exec", "--json"]), "by exec");
    assert_eq!(place.wait_for_state("0", "running")["pid"], first.pid);
    assert!(shell.is_raw() && shell.foreground() == foreground, "by exec");
    assert_alive(&place, "0");
    let mut last = first.pid;
    let mut holders = Vec::new();
    for n in 0..3 {
        let holder = update(&place, &format!("update {n}"));
        assert_ne!(holder.pid, last);
        last = holder.pid;
        await_waiting(&first);
        assert_eq!(shell.foreground(), foreground, "update {n}");
        assert!(shell.is_raw(), "update {n}");
        assert_alive(&place, "0");
        holders.push(holder);
    }
    holders[1].await_end("which was replaced");
    assert!(!first.has_ended() && !holders[2].has_ended());
    // The way out is read by the process that has the VM.
    shell.kind(b"\x01x");
    assert_eq!(shell.await_status(), 0);
    shell.assert_as_before();
    holders[2].await_end("which the user has left");
    first.await_end("whose successor has ended");
}

#[test]
fn the_process_that_a_shell_waits_for_passes_a_signal_on_and_tells_of_a_vm_that_was_lost() {
    if !can_run("the_process_that_a_shell_waits_for_passes_a_signal_on_and_tells_of_a_vm_that_was_lost") {
        return;
    }
    let place = Place::new();
    let mut shell = Shell::start(&place, &[]);
    let first = Holder::behind(&place, "0");
    let holder = update(&place, "before the signal");
    await_waiting(&first);
    kill_process(Pid::from_raw(first.pid as i32).unwrap(), Signal::TERM).unwrap();
    assert_eq!(shell.await_status(), 0);
    shell.assert_as_before();
    holder.await_end("which was asked to stop");

    let place = Place::new();
    let mut shell = Shell::start(&place, &[]);
    let first = Holder::behind(&place, "0");
    let holder = update(&place, "before the death");
    await_waiting(&first);
    assert!(shell.is_raw());
    holder.kill();
    assert_eq!(shell.await_status(), 1);
    shell.assert_as_before();
}

#[test]
fn a_new_process_that_dies_leaves_the_terminal_to_the_old_one() {
    if !can_run("a_new_process_that_dies_leaves_the_terminal_to_the_old_one") {
        return;
    }
    for point in [Point::NewBuilt, Point::NewLoaded] {
        let place = Place::new();
        let dir = place.path("");
        let environment = [("WHERRY_TEST_PAUSE_AT", point.name()), ("WHERRY_TEST_PAUSE_DIR", dir.to_str().unwrap())];
        let mut shell = Shell::start(&place, &environment);
        let first = Holder::behind(&place, "0");
        let (mut command, new) = held(&place, point);
        new.kill();
        command.wait().unwrap();
        assert!(shell.is_raw(), "{point}");
        assert_eq!(place.wait_for_state("0", "running")["pid"], first.pid, "{point}");
        // One that gives up by itself.
        std::fs::write(place.path(&format!("{point}.go")), "").unwrap();
        let output = place.control("0", &["update", "--binary", "/bin/false"]);
        assert_eq!(output.status.code(), Some(1), "{point}");
        assert!(shell.is_raw(), "{point}");
        let _next = update(&place, point.name());
        assert!(shell.is_raw(), "{point}");
        assert_eq!(place.control("0", &["stop"]).status.code(), Some(0), "{point}");
        assert_eq!(shell.await_status(), 0, "{point}");
        shell.assert_as_before();
    }
}
