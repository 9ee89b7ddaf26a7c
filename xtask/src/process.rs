//! Child processes that cannot outlive their deadline.
//!
//! Everything a task starts goes through here. [`stream`] runs a program, hands over every line it prints as it
//! comes, and kills it with all of its descendants when the deadline passes. Programs are started under
//! `setpriv --pdeathsig`, so that they also die when the task itself is killed.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// How often a quiet program is looked at: has it ended, is the deadline over?
const TICK: Duration = Duration::from_millis(200);

/// How long output may still trickle in after the program has ended (a descendant may hold the pipe).
const DRAIN: Duration = Duration::from_secs(2);

/// How a program that was given a deadline came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It ended by itself.
    Exited(ExitStatus),
    /// The line handler had seen enough, and the program was killed.
    Stopped,
    /// It was still running at the deadline and was killed.
    TimedOut,
}

impl Ending {
    /// True if the program ended by itself with status 0.
    pub fn success(self) -> bool {
        matches!(self, Self::Exited(status) if status.success())
    }
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "{status}"),
            Self::Stopped => f.write_str("stopped"),
            Self::TimedOut => f.write_str("killed at its deadline"),
        }
    }
}

/// What the line handler of [`stream`] wants next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Go on.
    Continue,
    /// Kill the program and return.
    Stop,
}

/// A command that dies with this process.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Runs `command` for at most `limit`; `on_line` sees every line of its stdout and stderr as it comes.
pub fn stream(command: Command, limit: Duration, mut on_line: impl FnMut(&str) -> Next) -> Result<Ending> {
    watch(command, limit, |line| line.map_or(Next::Continue, &mut on_line))
}

/// [`stream`] whose handler also sees `None`, now and then, while the program says nothing.
pub fn watch(mut command: Command, limit: Duration, mut on_line: impl FnMut(Option<&str>) -> Next) -> Result<Ending> {
    let deadline = Instant::now() + limit;
    let shown = format!("{command:?}");
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {shown}"))?;
    let mut tree = Tree(child);
    let lines = {
        let (sender, receiver) = channel();
        if let Some(out) = tree.0.stdout.take() {
            forward(out, sender.clone());
        }
        if let Some(err) = tree.0.stderr.take() {
            forward(err, sender);
        }
        receiver
    };
    follow(&mut tree, &lines, deadline, &mut on_line).with_context(|| format!("cannot wait for {shown}"))
}

/// Hands lines over until the program ends, the handler stops it, or the deadline passes.
fn follow(
    tree: &mut Tree,
    lines: &Receiver<String>,
    deadline: Instant,
    on_line: &mut impl FnMut(Option<&str>) -> Next,
) -> Result<Ending> {
    let mut ended: Option<(ExitStatus, Instant)> = None;
    let mut open = true;
    loop {
        match lines.recv_timeout(TICK) {
            Ok(line) => {
                if on_line(Some(&line)) == Next::Stop {
                    return Ok(Ending::Stopped);
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                if on_line(None) == Next::Stop {
                    return Ok(Ending::Stopped);
                }
            }
            Err(RecvTimeoutError::Disconnected) => {
                open = false;
                if ended.is_none() {
                    // Both pipes are closed: nothing to wait on but the end of the program itself.
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        }
        if ended.is_none() {
            ended = tree.0.try_wait()?.map(|status| (status, Instant::now()));
        }
        match ended {
            Some((status, since)) if !open || since.elapsed() > DRAIN => return Ok(Ending::Exited(status)),
            None if Instant::now() >= deadline => return Ok(Ending::TimedOut),
            _ => {}
        }
    }
}

/// Reads lines (of any bytes) into the channel until the pipe closes.
fn forward(pipe: impl Read + Send + 'static, lines: Sender<String>) {
    std::thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        while let Ok(count) = pipe.read_until(b'\n', &mut line) {
            if count == 0 {
                break;
            }
            let text = String::from_utf8_lossy(&line);
            if lines.send(text.trim_end_matches(['\n', '\r']).to_owned()).is_err() {
                break;
            }
            line.clear();
        }
    });
}

/// A child whose whole family is killed and reaped on drop.
struct Tree(Child);

impl Drop for Tree {
    fn drop(&mut self) {
        if !matches!(self.0.try_wait(), Ok(Some(_))) {
            for pid in family(self.0.id()) {
                if let Some(pid) = Pid::from_raw(pid.cast_signed()) {
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
            let _ = self.0.wait();
        }
    }
}

/// `root` and every process that descends from it, parents first.
fn family(root: u32) -> Vec<u32> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // The name in parentheses may hold anything, so fields are counted from the last ")".
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1));
        if let Some(parent) = parent.and_then(|parent| parent.parse().ok()) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        if let Some(more) = children.get(&found[next]) {
            found.extend(more);
        }
        next += 1;
    }
    found
}

/// Runs a short helper program to its end and returns its stdout; an error carries its stderr.
pub fn output(command: &mut Command) -> Result<Vec<u8>> {
    let shown = format!("{command:?}");
    let result = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {shown}"))?;
    if !result.status.success() {
        bail!("{shown} failed ({}): {}", result.status, String::from_utf8_lossy(&result.stderr).trim());
    }
    Ok(result.stdout)
}

/// Like [`output`], as text.
pub fn text(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&output(command)?).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut shell = command("sh");
        shell.args(["-c", script]);
        shell
    }

    #[test]
    fn every_line_of_both_streams_is_handed_over_before_the_end_is_reported() {
        let mut lines = Vec::new();
        let ending = stream(shell("echo one; echo two >&2; printf three; exit 3"), Duration::from_secs(20), |line| {
            lines.push(line.to_owned());
            Next::Continue
        })
        .unwrap();
        lines.sort();
        assert_eq!(lines, ["one", "three", "two"]);
        assert!(matches!(ending, Ending::Exited(status) if status.code() == Some(3)));
    }

    #[test]
    fn a_program_that_overstays_is_killed_with_its_descendants() {
        let mut child = 0;
        let ending = stream(shell("sleep 1000 & echo $!; wait"), Duration::from_secs(1), |line| {
            child = line.parse().unwrap();
            Next::Continue
        })
        .unwrap();
        assert_eq!(ending, Ending::TimedOut);
        assert!(child > 0, "the shell never said who its child is");
        let limit = Instant::now() + Duration::from_secs(20);
        while !gone(child) {
            assert!(Instant::now() < limit, "waited 20 s for the descendant {child} to be killed");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_handler_that_has_seen_enough_stops_the_program() {
        let ending = stream(shell("echo enough; sleep 1000"), Duration::from_secs(60), |_| Next::Stop).unwrap();
        assert_eq!(ending, Ending::Stopped);
    }

    /// True if no such process runs any more (a zombie that nobody has reaped yet counts as gone).
    fn gone(pid: i32) -> bool {
        match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) => stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')),
            Err(_) => true,
        }
    }
}
