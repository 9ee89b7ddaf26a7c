//! `ping` in another namespace, read as it answers: what came back, and the longest time in which nothing did.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use wherry_netlab::Namespace;

/// Seconds between two requests.
const INTERVAL: &str = "0.2";

/// A `ping` that runs. It ends with this.
#[derive(Debug)]
pub struct Ping {
    child: Child,
    heard: Arc<Mutex<Heard>>,
    reader: Option<JoinHandle<()>>,
}

/// What has come back.
#[derive(Debug, Default, Clone)]
pub struct Heard {
    /// Answers, each once.
    pub answers: u64,
    /// Answers to what had been answered: a request may reach the guest through both taps.
    pub duplicates: u64,
    /// The number of the last one.
    last: Option<u64>,
    at: Option<Instant>,
    gap: Duration,
}

impl Heard {
    fn line(&mut self, line: &str, now: Instant) {
        let Some(number) = number(line) else { return };
        if line.contains("DUP") {
            self.duplicates += 1;
            return;
        }
        self.answers += 1;
        self.last = self.last.max(Some(number));
        if let Some(at) = self.at.replace(now) {
            self.gap = self.gap.max(now.saturating_duration_since(at));
        }
    }

    /// How many of the requests up to the last that was answered were not.
    pub fn lost(&self) -> u64 {
        self.last.map_or(0, |last| (last + 1).saturating_sub(self.answers))
    }
}

/// The number of a line `64 bytes from 198.18.0.1: seq=7 ttl=64 time=0.3 ms`.
fn number(line: &str) -> Option<u64> {
    line.split_once("seq=")?.1.split_whitespace().next()?.parse().ok()
}

impl Ping {
    /// Starts to ask `address`.
    pub fn start(namespace: &Namespace, address: &str) -> Result<Self> {
        let mut command = Command::new("ping");
        command.args(["-i", INTERVAL, address]).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = namespace.hold(&mut command)?.spawn().context("cannot start ping")?;
        let heard = Arc::<Mutex<Heard>>::default();
        let reader = child.stdout.take().map(|stdout| {
            let heard = heard.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    heard.lock().unwrap_or_else(PoisonError::into_inner).line(&line, Instant::now());
                }
            })
        });
        Ok(Self { child, heard, reader })
    }

    /// What has come back until now.
    pub fn heard(&self) -> Heard {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The longest time without an answer since this was last asked.
    pub fn take_gap(&self) -> Duration {
        std::mem::take(&mut self.heard.lock().unwrap_or_else(PoisonError::into_inner).gap)
    }
}

impl Drop for Ping {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_losses_duplicates_and_the_longest_silence_are_counted() {
        let mut heard = Heard::default();
        let start = Instant::now();
        for (line, at) in [
            ("PING 198.18.0.1 (198.18.0.1): 56 data bytes", 0),
            ("64 bytes from 198.18.0.1: seq=0 ttl=64 time=3.3 ms", 1),
            ("64 bytes from 198.18.0.1: seq=1 ttl=64 time=0.3 ms", 2),
            ("64 bytes from 198.18.0.1: seq=5 ttl=64 time=0.3 ms", 9),
            ("64 bytes from 198.18.0.1: seq=5 ttl=64 time=8.3 ms (DUP!)", 20),
        ] {
            heard.line(line, start + Duration::from_secs(at));
        }
        assert_eq!((heard.answers, heard.duplicates, heard.lost()), (3, 1, 3));
        assert_eq!(heard.gap, Duration::from_secs(7));
    }
}
