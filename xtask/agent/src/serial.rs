//! The serial port of a guest, and the shell behind it.
//!
//! The guest's first process (`xtask/src/lab/inner-init.sh`) reads lines of a token and a shell command, and answers
//! with what the command prints and a line `=TOKEN STATUS`. Everything that comes is kept, and shown when a wait
//! fails.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A connection to the serial port of one VMM process.
#[derive(Debug)]
pub struct Serial {
    stream: UnixStream,
    /// What came and nobody has waited for yet.
    pending: String,
    commands: u32,
}

/// What a command in the guest did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its exit status.
    pub status: i32,
    /// What it printed.
    pub output: String,
}

impl Serial {
    /// Connects, waiting for the socket to appear until `limit` is over.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self> {
        let deadline = Instant::now() + limit;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Ok(Self { stream, pending: String::new(), commands: 0 }),
                Err(error) if Instant::now() >= deadline => {
                    return Err(error)
                        .with_context(|| format!("waited {limit:?} for the serial port {}", path.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// Waits for a line that contains `needle` and returns it; what came before it is dropped.
    pub fn wait_for(&mut self, needle: &str, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(at) = self.pending.find(needle)
                && let Some(length) = self.pending[at..].find('\n')
            {
                let start = self.pending[..at].rfind('\n').map_or(0, |newline| newline + 1);
                let line = self.pending[start..at + length].trim().to_owned();
                self.pending.drain(..=at + length);
                return Ok(line);
            }
            self.receive(deadline, &format!("{needle:?}"))?;
        }
    }

    /// Runs a shell command in the guest and waits for its end.
    pub fn command(&mut self, command: &str, limit: Duration) -> Result<Answer> {
        let deadline = Instant::now() + limit;
        self.commands += 1;
        // The process that sends is part of the token, since a guest that has moved may still hold older answers.
        let token = format!("{}x{}", std::process::id(), self.commands);
        self.send(&format!("{token} {command}\n"))?;
        let end = format!("={token} ");
        loop {
            if let Some(at) = self.pending.find(&end)
                && let Some(length) = self.pending[at..].find('\n')
            {
                let status = self.pending[at + end.len()..at + length].trim();
                let status = status.parse().with_context(|| format!("{command:?} has the status {status:?}"))?;
                let output = self.pending[..at].replace('\r', "");
                self.pending.drain(..=at + length);
                return Ok(Answer { status, output });
            }
            self.receive(deadline, &format!("the end of {command:?}"))?;
        }
    }

    /// Like [`Serial::command`], for a command that must succeed.
    pub fn ask(&mut self, command: &str, limit: Duration) -> Result<String> {
        let answer = self.command(command, limit)?;
        if answer.status != 0 {
            bail!("{command:?} in the guest has status {}: {:?}", answer.status, answer.output);
        }
        Ok(answer.output)
    }

    /// Types a line in pieces that the guest's 16 byte FIFO and our peer's buffer take without loss.
    pub fn send(&mut self, line: &str) -> Result<()> {
        self.stream.write_all(line.as_bytes()).with_context(|| format!("cannot type {line:?}"))
    }

    /// Takes what comes next, or fails at the deadline saying what was waited for.
    fn receive(&mut self, deadline: Instant, what: &str) -> Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        let seen = || {
            let start = self.pending.len().saturating_sub(2000);
            let start = (start..self.pending.len()).find(|&at| self.pending.is_char_boundary(at)).unwrap_or(0);
            format!("the last that came: {:?}", &self.pending[start..])
        };
        if left.is_zero() {
            bail!("waited too long on the serial port for {what}; {}", seen());
        }
        self.stream.set_read_timeout(Some(left))?;
        let mut bytes = [0; 4096];
        match self.stream.read(&mut bytes) {
            Ok(0) => bail!("the serial port was closed while waiting for {what}; {}", seen()),
            Ok(count) => {
                self.pending.push_str(&String::from_utf8_lossy(&bytes[..count]));
                Ok(())
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) =>
            {
                Ok(())
            }
            Err(error) => Err(error).with_context(|| format!("the serial port failed while waiting for {what}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn pair() -> (Serial, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Serial { stream: ours, pending: String::new(), commands: 0 }, theirs)
    }

    #[test]
    fn an_answer_ends_with_its_own_token_and_not_with_an_older_one() {
        let (mut serial, mut guest) = pair();
        let token = format!("{}x1", std::process::id());
        guest.write_all(format!("=0x9 7\r\none\r\ntwo\r\n={token} 3\r\nrest").as_bytes()).unwrap();
        let answer = serial.command("false", LIMIT).unwrap();
        assert_eq!(answer.status, 3);
        assert!(answer.output.ends_with("one\ntwo\n"), "{answer:?}");
        assert_eq!(serial.pending, "rest");
    }

    #[test]
    fn a_wait_returns_the_whole_line_and_leaves_what_follows() {
        let (mut serial, mut guest) = pair();
        guest.write_all(b"noise\nsay INNER READY Linux\nnext\n").unwrap();
        assert_eq!(serial.wait_for("INNER READY", LIMIT).unwrap(), "say INNER READY Linux");
        assert_eq!(serial.wait_for("next", LIMIT).unwrap(), "next");
    }

    #[test]
    fn a_wait_that_is_in_vain_says_for_what_and_what_came() {
        let (mut serial, mut guest) = pair();
        guest.write_all(b"Kernel panic\n").unwrap();
        let error = serial.wait_for("INNER READY", Duration::from_millis(50)).unwrap_err().to_string();
        assert!(error.contains("INNER READY") && error.contains("Kernel panic"), "{error}");
        drop(guest);
        assert!(serial.wait_for("x", LIMIT).unwrap_err().to_string().contains("closed"));
    }
}
