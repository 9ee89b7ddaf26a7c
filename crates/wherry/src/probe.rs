//! Watches the probe guest from outside: its report pages are read from the RAM memfd of the process that runs it,
//! without the help of that process or of the VMM's API. `demo` and `bench` measure with it.
//!
//! All reads are `pread`: they allocate no page, so a destination whose memory has not arrived yet is left as it is.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use wherry_guest::report::{CONTROL_GPA, Control, CpuPage, REPORT_GPA, REPORT_SIZE, heartbeat_gpa};
use wherry_guest::snapshot::{Snapshot, SnapshotError};

/// Name of the RAM memfds of Wherry.
pub const WHERRY_RAM: &str = "wherry-ram";

/// How often a watcher looks while the guest's heart beats. Not more often: it has a high priority, and a vCPU that it
/// interrupts every 100 us never gets into its guest (seen, with KVM-PVM: the guest stood still for up to 0.5 s).
const LOOK: Duration = Duration::from_micros(500);
/// How often it looks while the heart stands still. The vCPU may be about to run, so this is not much more often.
const LOOK_CLOSELY: Duration = Duration::from_micros(250);
/// How often a watcher looks for the memory of a destination that has not made it yet.
const SEARCH: Duration = Duration::from_millis(5);

/// The RAM block at guest physical address 0 of a running VM.
#[derive(Debug)]
pub struct ProbeRam {
    file: File,
    size: u64,
}

impl ProbeRam {
    /// Opens a descriptor of another process, as its API names it.
    pub fn open(pid: u32, fd: i32) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(format!("/proc/{pid}/fd/{fd}"))?;
        let size = file.metadata()?.len();
        Ok(Self { file, size })
    }

    /// Finds the first memfd of that name in a process that `wanted` accepts. `None` while there is none.
    pub fn find(pid: u32, name: &str, wanted: impl Fn(&Self) -> bool) -> io::Result<Option<Self>> {
        let memfd = format!("/memfd:{name}");
        let mut fds = Vec::new();
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
            let entry = entry?;
            // Descriptors may close while we look at them.
            let Ok(target) = std::fs::read_link(entry.path()) else { continue };
            let target = target.to_string_lossy();
            if target.strip_suffix(" (deleted)").unwrap_or(&target) == memfd
                && let Some(fd) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok())
            {
                fds.push(fd);
            }
        }
        fds.sort_unstable();
        Ok(fds.into_iter().filter_map(|fd| Self::open(pid, fd).ok()).find(wanted))
    }

    /// Another handle of the same memory.
    pub fn again(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, size: self.size })
    }

    /// Size of the block in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of it that are allocated.
    #[cfg(test)]
    pub fn allocated(&self) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt;
        Ok(self.file.metadata()?.blocks() * 512)
    }

    /// The heartbeat counter of a vCPU; 0 while it has not arrived.
    pub fn heartbeat(&self, cpu: usize) -> io::Result<u64> {
        Ok(self.beat(cpu)?.count)
    }

    /// The largest gap of a vCPU since its gaps were measured anew, and the TSC at its end; both in ticks.
    pub fn largest_gap(&self, cpu: usize, khz: u64) -> io::Result<(u64, u64)> {
        const { assert!(std::mem::offset_of!(CpuPage, gap_max_tsc) == std::mem::offset_of!(CpuPage, gap_max_ns) + 8) };
        let mut words = [0; 16];
        let at = heartbeat_gpa(cpu) + std::mem::offset_of!(CpuPage, gap_max_ns) as u64;
        self.file.read_exact_at(&mut words, at)?;
        let words = u128::from_le_bytes(words);
        Ok(((u128::from(words as u64) * u128::from(khz) / 1_000_000) as u64, (words >> 64) as u64))
    }

    /// A vCPU's last heartbeat.
    pub fn beat(&self, cpu: usize) -> io::Result<Beat> {
        const { assert!(std::mem::offset_of!(CpuPage, heartbeat_tsc) == std::mem::offset_of!(CpuPage, heartbeat) + 8) };
        let mut words = [0; 16];
        self.file.read_exact_at(&mut words, heartbeat_gpa(cpu))?;
        let words = u128::from_le_bytes(words);
        Ok(Beat { count: words as u64, tsc: (words >> 64) as u64 })
    }

    /// All that the guest reports; `None` while it has not begun.
    pub fn snapshot(&self) -> Result<Option<Snapshot>> {
        let mut bytes = vec![0; REPORT_SIZE as usize];
        self.file.read_exact_at(&mut bytes, REPORT_GPA).context("reading the report pages of the probe guest")?;
        match Snapshot::decode(&bytes) {
            Ok(snapshot) => Ok(Some(snapshot)),
            Err(SnapshotError::NotRunning) => Ok(None),
            Err(error) => Err(error).context("reading the report pages of the probe guest"),
        }
    }

    /// Has the guest verify everything once more and then finish. Not while a migration runs: KVM's dirty log does not
    /// see it.
    pub fn ask_to_finish(&self) -> io::Result<()> {
        self.command(std::mem::offset_of!(Control, finish))
    }

    /// Has the guest empty its histograms of gaps; gives the number it will show when it has. Not while a migration
    /// runs.
    pub fn reset_gaps(&self) -> io::Result<u32> {
        let number = self.word(std::mem::offset_of!(Control, reset_gaps))?;
        self.command(std::mem::offset_of!(Control, reset_gaps))?;
        Ok(number.wrapping_add(1))
    }

    fn word(&self, offset: usize) -> io::Result<u32> {
        let mut word = [0; 4];
        self.file.read_exact_at(&mut word, CONTROL_GPA + offset as u64)?;
        Ok(u32::from_le_bytes(word))
    }

    /// Adds 1 to a word of the control page, which the guest has touched at its start: no page is allocated.
    fn command(&self, offset: usize) -> io::Result<()> {
        let value = self.word(offset)?.wrapping_add(1);
        self.file.write_all_at(&value.to_le_bytes(), CONTROL_GPA + offset as u64)?;
        let at = CONTROL_GPA + std::mem::offset_of!(Control, sequence) as u64;
        let mut sequence = [0; 8];
        self.file.read_exact_at(&mut sequence, at)?;
        self.file.write_all_at(&u64::from_le_bytes(sequence).wrapping_add(1).to_le_bytes(), at)
    }
}

/// A heartbeat: its number, and the guest's TSC at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    /// Its number.
    pub count: u64,
    /// The TSC.
    pub tsc: u64,
}

/// Our time of a guest's TSC, learnt from looking at its heartbeats: one is never younger than the look that sees it,
/// and the freshest one seen tells most.
#[derive(Debug)]
struct GuestClock {
    khz: u64,
    fresh: Option<(Instant, u64)>,
}

impl GuestClock {
    fn learn(&mut self, seen: Instant, tsc: u64) {
        if self.khz > 0 && self.at(tsc).is_none_or(|at| seen < at) {
            self.fresh = Some((seen, tsc));
        }
    }

    fn at(&self, tsc: u64) -> Option<Instant> {
        let (instant, fresh) = self.fresh?;
        let span = |ticks: u64| {
            Duration::from_nanos((u128::from(ticks) * 1_000_000 / u128::from(self.khz)).try_into().unwrap_or(u64::MAX))
        };
        match tsc.checked_sub(fresh) {
            Some(ticks) => instant.checked_add(span(ticks)),
            None => instant.checked_sub(span(fresh - tsc)),
        }
    }
}

/// A blackout as seen from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// From the last heartbeat at the source to the first seen at the destination.
    pub blackout: Duration,
    /// The true value may be shorter by this much: how long before the heartbeat was seen there it was looked for.
    pub uncertain: Duration,
    /// When the first heartbeat at the destination was seen.
    pub at: Instant,
}

/// A thread that watches one migration.
#[derive(Debug)]
pub struct Watcher {
    thread: Option<JoinHandle<Result<Gap>>>,
    stop: Arc<AtomicBool>,
}

impl Watcher {
    /// Watches vCPU 0 of the guest in `source`, and `find`s the memory it moves to as soon as it is there.
    pub fn start(
        source: ProbeRam,
        find: impl FnMut() -> io::Result<Option<ProbeRam>> + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread =
            std::thread::Builder::new().name("watcher".into()).spawn(move || watch(&source, find, &stopped))?;
        Ok(Self { thread: Some(thread), stop })
    }

    /// The result. Call it when the VM is known to run at the destination: the watcher has seen it, or sees it within
    /// `limit`.
    pub fn finish(mut self, limit: Duration) -> Result<Gap> {
        let deadline = Instant::now() + limit;
        while self.thread.as_ref().is_some_and(|t| !t.is_finished()) {
            if Instant::now() >= deadline {
                bail!("the guest's heartbeat was not seen at the destination within {} s", limit.as_secs_f32());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let Some(thread) = self.thread.take() else { bail!("the watcher has ended before") };
        thread.join().unwrap_or_else(|_| bail!("the watcher panicked"))
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn watch(source: &ProbeRam, mut find: impl FnMut() -> io::Result<Option<ProbeRam>>, stop: &AtomicBool) -> Result<Gap> {
    // Both are requests for better figures; without the right to them the figures are coarser, and say so.
    let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1000));
    let _ = rustix::process::setpriority_process(None, -20);

    let khz = source.snapshot()?.map_or(0, |snapshot| snapshot.tsc_khz);
    let mut clock = GuestClock { khz, fresh: None };
    let mut destination: Option<ProbeRam> = None;
    let mut searched = Instant::now() - SEARCH;
    let mut last = source.beat(0)?;
    let mut seen = Instant::now();
    let mut looked = seen;
    while !stop.load(Ordering::Relaxed) {
        // The destination first: while the guest runs at the source, a copy seen there is never newer than what is
        // read at the source afterwards.
        let moved = match &destination {
            Some(ram) => ram.heartbeat(0)?,
            None => 0,
        };
        let moved_at = Instant::now();
        let beat = source.beat(0)?;
        let now = Instant::now();
        let beats = beat.count != last.count;
        if beats {
            (last, seen) = (beat, now);
            clock.learn(now, beat.tsc);
        } else if moved > beat.count {
            let left = clock.at(last.tsc).map_or(seen, |at| at.min(seen));
            let blackout = moved_at.saturating_duration_since(left);
            return Ok(Gap { blackout, uncertain: (moved_at - looked).min(blackout), at: moved_at });
        }
        looked = now;
        if destination.is_none() && searched.elapsed() >= SEARCH {
            destination = find()?;
            searched = Instant::now();
        }
        std::thread::sleep(if beats { LOOK } else { LOOK_CLOSELY });
    }
    bail!("the watcher was stopped before the guest was seen at the destination")
}

#[cfg(test)]
mod tests {
    use super::*;
    use wherry_memory::{Block, BlockId, BlockSpec, PageSize};

    /// RAM as a VMM in this process would have it, with a heartbeat that the test turns.
    struct Machine(Block);

    impl Machine {
        fn new(size: u64) -> Self {
            let spec = BlockSpec { id: BlockId(0), guest_base: 0, size, page_size: PageSize::Base };
            Self(Block::create(spec).unwrap())
        }
        fn beat(&self, value: u64) {
            use vm_memory::{Bytes, GuestMemoryRegion, MemoryRegionAddress};
            let region = self.0.region();
            assert!(region.len() > heartbeat_gpa(0));
            region.write_slice(&value.to_le_bytes(), MemoryRegionAddress(heartbeat_gpa(0))).unwrap();
        }
        fn ram(&self) -> ProbeRam {
            use std::os::fd::AsRawFd;
            ProbeRam::open(std::process::id(), self.0.fd().as_raw_fd()).unwrap()
        }
    }

    #[test]
    fn looking_at_memory_that_has_not_arrived_allocates_nothing() {
        let machine = Machine::new(4 << 20);
        assert_eq!(machine.ram().heartbeat(0).unwrap(), 0);
        assert!(machine.ram().snapshot().unwrap().is_none());
        assert_eq!(machine.ram().allocated().unwrap(), 0);
    }

    #[test]
    fn memory_is_found_by_name_and_by_what_is_wanted_of_it() {
        let size = (5 << 20) + 4096 * 7;
        let machine = Machine::new(size);
        machine.beat(77);
        let find = |size| ProbeRam::find(std::process::id(), WHERRY_RAM, |r| r.size() == size).unwrap();
        assert_eq!(find(size).unwrap().heartbeat(0).unwrap(), 77);
        assert!(find(4096 * 3).is_none());
        assert!(ProbeRam::find(std::process::id(), "other", |_| true).unwrap().is_none());
    }

    #[test]
    fn the_freshest_heartbeat_sets_the_clock() {
        let mut clock = GuestClock { khz: 1_000_000, fresh: None };
        let start = Instant::now();
        let us = Duration::from_micros;
        assert_eq!(clock.at(5), None);
        // Seen 300 us late, then 1 us late, then 200 us late.
        clock.learn(start + us(300), 0);
        clock.learn(start + us(1001), 1_000_000);
        clock.learn(start + us(2200), 2_000_000);
        assert_eq!(clock.at(3_000_000), Some(start + us(3001)));
        assert_eq!(clock.at(0), Some(start + us(1)));
        let mut unknown = GuestClock { khz: 0, fresh: None };
        unknown.learn(start, 7);
        assert_eq!(unknown.at(7), None);
    }

    #[test]
    fn the_blackout_lies_between_the_last_beat_here_and_the_first_new_one_there() {
        let (source, destination) = (Machine::new(4 << 20), Machine::new(4 << 20));
        source.beat(1);
        let (hand, found) = std::sync::mpsc::channel();
        let watcher = Watcher::start(source.ram(), move || Ok(found.try_recv().ok())).unwrap();
        hand.send(destination.ram()).unwrap();
        // A guest that beats until the watcher, which sees each beat late, has certainly begun.
        let until = Instant::now() + Duration::from_millis(20);
        let mut beat = 1;
        while Instant::now() < until {
            beat += 1;
            source.beat(beat);
        }
        let stopped = Instant::now();
        destination.beat(beat - 1);
        destination.beat(beat);
        while stopped.elapsed() < Duration::from_millis(30) {
            std::hint::spin_loop();
        }
        destination.beat(beat + 1);
        let gap = watcher.finish(Duration::from_secs(10)).unwrap();
        assert!(gap.at > stopped);
        assert!(gap.blackout + gap.uncertain >= Duration::from_millis(29), "{gap:?}");
    }
}
