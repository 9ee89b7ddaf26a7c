//! The threads that carry packets from one TUN device to the other, one for each direction.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::LabError;
use crate::line::{Line, Shape, Traffic};

/// Packets read before it is looked what is due.
const BATCH: usize = 16;

#[derive(Debug, Default)]
struct Counters {
    packets: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
}

/// Both directions.
#[derive(Debug)]
pub(crate) struct Shaper {
    stop: Arc<OwnedFd>,
    counters: [Arc<Counters>; 2],
    threads: Vec<JoinHandle<()>>,
}

impl Shaper {
    pub(crate) fn start(ends: [File; 2], shape: Shape) -> Result<Self, LabError> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| LabError::new("making an event descriptor", e))?;
        let mut shaper = Self { stop: Arc::new(stop), counters: Default::default(), threads: vec![] };
        let ends = ends.map(Arc::new);
        for (n, name) in ["lab-right", "lab-left"].into_iter().enumerate() {
            let (from, to) = (ends[n].clone(), ends[1 - n].clone());
            let (stop, counters) = (shaper.stop.clone(), shaper.counters[n].clone());
            let thread = std::thread::Builder::new()
                .name(name.into())
                .spawn(move || {
                    if let Err(error) = carry(&from, &to, &stop, &counters, Line::new(shape, Instant::now())) {
                        eprintln!("the link has ended: {error}");
                    }
                })
                .map_err(|e| LabError::new("starting a thread that carries packets", e))?;
            shaper.threads.push(thread);
        }
        Ok(shaper)
    }

    /// What went from the first end to the second, and back.
    pub(crate) fn traffic(&self) -> [Traffic; 2] {
        let read = |n: &AtomicU64| n.load(Ordering::Relaxed);
        [0, 1].map(|n| {
            let c = &self.counters[n];
            Traffic { packets: read(&c.packets), bytes: read(&c.bytes), dropped: read(&c.dropped) }
        })
    }
}

impl Drop for Shaper {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                eprintln!("a thread that carries packets panicked");
            }
        }
    }
}

fn carry(from: &File, to: &File, stop: &OwnedFd, counters: &Counters, mut line: Line) -> io::Result<()> {
    // A line is never late; without the right to it, it is a little.
    let _ = rustix::process::setpriority_process(None, -20);
    let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1000));
    let mut buffer = vec![0; 1 << 16];
    loop {
        let timeout = line.next().map(|at| {
            let left = at.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) }
        });
        let mut fds = [PollFd::new(stop, PollFlags::IN), PollFd::new(from, PollFlags::IN)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if !fds[0].revents().is_empty() {
            return Ok(());
        }
        if !fds[1].revents().is_empty() {
            for _ in 0..BATCH {
                match rustix::io::read(from, &mut buffer[..]) {
                    Ok(len) if line.offer(&buffer[..len], Instant::now()) => {}
                    Ok(_) => {
                        counters.dropped.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(rustix::io::Errno::AGAIN) => break,
                    Err(error) => return Err(error.into()),
                }
            }
        }
        while let Some(packet) = line.due(Instant::now()) {
            // All of it or, if the device is down, nothing.
            match rustix::io::write(to, &packet) {
                Ok(_) => {
                    counters.packets.fetch_add(1, Ordering::Relaxed);
                    counters.bytes.fetch_add(packet.len() as u64, Ordering::Relaxed);
                }
                Err(_) => {
                    counters.dropped.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
}
