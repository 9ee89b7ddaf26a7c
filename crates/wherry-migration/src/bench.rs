//! The engine alone: a prepared RAM image moves from one set of blocks to another over loopback TCP, without a VM, beside
//! raw loopback TCP that carries the same bytes into fresh memory. Both take turns in one run, because machines differ
//! from one hour to the next; what counts is the ratio.
#![expect(unsafe_code, reason = "fills RAM, and names it to the kernel by address for the raw transfer")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use wherry_fault::FaultService;
use wherry_memory::{BlockId, BlockSpec, DirtySource, FreePages, GRANULE, MemoryError, PageSize, Ram, VmmWrites};
use wherry_state::{Units, UnitsError};
use wherry_stream::{Connection, Endpoint, IoRange, Listener, StreamError};

use crate::error::Cause;
use crate::machine::{Builder, Machine, MachineDescription, MachineError, Refusal, VcpuThread, Wants};
use crate::progress::Job;
use crate::{DestinationOptions, Journey, JourneyError, SourceOptions};

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// Size of RAM in bytes.
    pub ram: u64,
    /// Of it, bytes that hold random data, from its start; the rest is holes.
    pub data: u64,
    /// Runs of each kind; they take turns.
    pub runs: u32,
    /// Data channels of the engine; `None`: as it chooses.
    pub channels: Option<u16>,
}

impl Default for Options {
    fn default() -> Self {
        Self { ram: 1 << 30, data: 512 << 20, runs: 7, channels: None }
    }
}

/// Medians over the runs, in seconds.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Bytes of data moved in each run.
    pub bytes: u64,
    /// The engine: from the call of `send` to the news that the VM runs.
    pub engine_s: f64,
    /// Of that, the blackout.
    pub blackout_s: f64,
    /// Raw loopback TCP into fresh memory, one stream.
    pub raw_one_s: f64,
    /// The same with two streams.
    pub raw_two_s: f64,
    /// Speed of the engine over that of the faster of the two.
    pub ratio: f64,
    /// The engine's last job.
    pub job: Job,
    /// Every run: engine, raw with one stream, raw with two.
    pub runs: Vec<[f64; 3]>,
    /// The same in seconds of processor time, of both ends together; a busy machine disturbs it less.
    pub cpu: [f64; 3],
}

/// The measurement failed.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The raw transfer.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The engine, at the source.
    #[error("source: {0}")]
    Source(Box<JourneyError>),
    /// The engine, at the destination.
    #[error("destination: {0}")]
    Destination(Box<JourneyError>),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl From<Cause> for BenchError {
    fn from(cause: Cause) -> Self {
        BenchError::Other(cause.to_string())
    }
}

impl From<UnitsError> for BenchError {
    fn from(error: UnitsError) -> Self {
        BenchError::Other(error.to_string())
    }
}

/// RAM and nothing else.
struct Image {
    ram: Arc<Ram>,
    units: Arc<Units>,
    sources: Arc<[Arc<dyn DirtySource>]>,
    description: MachineDescription,
}

impl Image {
    fn new(ram: Arc<Ram>, vm: &[u8]) -> Result<Self, UnitsError> {
        let units = Arc::new(Units::new(vec![])?);
        let mut description = MachineDescription::of(&ram, &units);
        description.vm = vm.to_vec();
        let sources: Vec<Arc<dyn DirtySource>> = vec![Arc::new(VmmWrites::new(ram.clone()))];
        Ok(Self { ram, units, sources: sources.into(), description })
    }
}

impl Machine for Image {
    fn description(&self) -> MachineDescription {
        self.description.clone()
    }
    fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }
    fn units(&self) -> Arc<Units> {
        self.units.clone()
    }
    fn streams(&self) -> Vec<Arc<dyn wherry_state::StateStream>> {
        vec![]
    }

    fn dirty_sources(&self) -> Arc<[Arc<dyn DirtySource>]> {
        self.sources.clone()
    }
    fn free_pages(&self) -> Option<Arc<dyn FreePages>> {
        None
    }
    fn faults(&self) -> Result<&Arc<FaultService>, String> {
        Err("an image is moved by precopy".into())
    }

    fn hot_pages(&self) -> Vec<(BlockId, u64)> {
        vec![]
    }

    fn vcpu_threads(&self) -> Vec<VcpuThread> {
        vec![]
    }

    fn blockers(&self) -> Vec<String> {
        Vec::new()
    }

    fn throttle(&self, _percent: u8) {
        // No vCPU runs.
    }
    fn take_locks(&self) -> Result<(), MachineError> {
        Ok(())
    }
    fn release_locks(&self) -> Result<(), MachineError> {
        Ok(())
    }
    fn runs_after_start(&self) -> bool {
        false
    }
}

struct ImageBuilder;

impl Builder for ImageBuilder {
    fn build(&self, description: &MachineDescription, _: Wants) -> Result<Arc<dyn Machine>, Refusal> {
        let refused = |e: &dyn std::fmt::Display| Refusal(vec![e.to_string()]);
        let size = description.blocks.first().map_or(0, |b| b.size);
        let ram = fresh(size).map_err(|e| refused(&e))?;
        Ok(Arc::new(Image::new(ram, &description.vm).map_err(|e| refused(&e))?))
    }

    fn runs(&self, _: &Arc<dyn Machine>) {
        // An image does nothing by itself.
    }
}

fn fresh(size: u64) -> Result<Arc<Ram>, MemoryError> {
    let spec = BlockSpec { id: BlockId(0), guest_base: 0, size, page_size: PageSize::Base };
    Ok(Arc::new(Ram::create(&[spec])?))
}

fn loopback() -> Result<Listener, StreamError> {
    Listener::bind(&Endpoint::Tcp { host: "127.0.0.1".into(), port: 0 })
}

/// Measures.
pub fn engine(options: &Options) -> Result<Report, BenchError> {
    let data = options.data.min(options.ram) / GRANULE * GRANULE;
    let ram = image(options.ram, data)?;
    let mut runs = vec![];
    let mut blackouts = vec![];
    let mut job = Job::default();
    let mut cpu = vec![];
    for _ in 0..options.runs.max(1) {
        let (begun, before) = (Instant::now(), cpu_seconds());
        job = migrate(&ram, options.channels)?;
        let took = begun.elapsed().as_secs_f64();
        blackouts.push(job.downtime_us as f64 / 1e6);
        let after_engine = cpu_seconds();
        let one = raw(&ram, data, 1)?;
        let after_one = cpu_seconds();
        let two = raw(&ram, data, 2)?;
        cpu.push([after_engine - before, after_one - after_engine, cpu_seconds() - after_one]);
        runs.push([took, one, two]);
    }
    let median = |mut all: Vec<f64>| {
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    let column = |n: usize| median(runs.iter().map(|r| r[n]).collect());
    let cpu = [0, 1, 2].map(|n| median(cpu.iter().map(|r: &[f64; 3]| r[n]).collect()));
    let (engine_s, raw_one_s, raw_two_s) = (column(0), column(1), column(2));
    Ok(Report {
        bytes: data,
        engine_s,
        blackout_s: median(blackouts),
        raw_one_s,
        raw_two_s,
        ratio: raw_one_s.min(raw_two_s) / engine_s,
        job,
        runs,
        cpu,
    })
}

/// Processor time of this process, user and system.
fn cpu_seconds() -> f64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    t.tv_sec as f64 + t.tv_nsec as f64 / 1e9
}

fn fill(ram: &Ram, data: u64) -> Result<(), MemoryError> {
    let base = ram.blocks()[0].engine_range(0, data)?.cast::<u64>();
    let mut x = 0x2545_f491_4f6c_dd1du64;
    for n in 0..(data / 8) as usize {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        // SAFETY: inside the engine map.
        unsafe { base.add(n).write_volatile(x) };
    }
    Ok(())
}

fn migrate(ram: &Arc<Ram>, channels: Option<u16>) -> Result<Job, BenchError> {
    let vm = crate::link::random_id()?;
    // As ever, records belong on tmpfs: a disk would have its say in the blackout.
    let shm = std::path::Path::new("/dev/shm");
    let base = if shm.is_dir() { shm.to_path_buf() } else { std::env::temp_dir() };
    let records = base.join(format!("wherry-bench-{}", crate::link::hex(&vm)));
    let there = records.join("destination");
    let listener = loopback()?;
    let machine: Arc<dyn Machine> = Arc::new(Image::new(ram.clone(), &vm)?);
    let result = std::thread::scope(|scope| {
        let receiver = std::thread::Builder::new()
            .name("bench-receive".into())
            .spawn_scoped(scope, || {
                let options = DestinationOptions { records: there.clone(), ..DestinationOptions::default() };
                crate::destination::receive(&listener, &ImageBuilder, options, &Journey::new())
            })
            .map_err(|e| BenchError::Other(e.to_string()))?;
        let options = SourceOptions { channels, records: records.join("source"), ..SourceOptions::default() };
        let sent = crate::source::send(machine, listener.local_endpoint(), options, &Journey::new());
        let sent = sent.map_err(|e| BenchError::Source(e.into()))?;
        match receiver.join() {
            Ok(Ok(_)) => Ok(sent),
            Ok(Err(error)) => Err(BenchError::Destination(error.into())),
            Err(_) => Err(BenchError::Other("the destination's thread panicked".into())),
        }
    });
    // Left behind only if the system removes it otherwise.
    let _ = std::fs::remove_dir_all(&records);
    result
}

/// RAM of `size` bytes with `data` random bytes at its start.
pub fn image(size: u64, data: u64) -> Result<Arc<Ram>, BenchError> {
    let ram = fresh(size)?;
    fill(&ram, data)?;
    Ok(ram)
}

/// Carries the first `data` bytes by `streams` TCP streams into fresh memory: seconds.
pub fn raw(ram: &Ram, data: u64, streams: u64) -> Result<f64, BenchError> {
    const STEP: u64 = 512 << 10;
    let to = fresh(ram.size())?;
    let listener = loopback()?;
    let share = (data / streams).next_multiple_of(STEP);
    let pieces = |n: u64| {
        let (start, end) = ((n * share).min(data), ((n + 1) * share).min(data));
        (start..end).step_by(STEP as usize).map(move |at| (at, STEP.min(end - at)))
    };
    let mut pairs = vec![];
    for _ in 0..streams {
        let deadline = Instant::now() + Duration::from_secs(5);
        let near = Connection::connect(listener.local_endpoint(), deadline)?;
        pairs.push((near, listener.accept(deadline)?));
    }
    let begun = Instant::now();
    let moved = |connection: Connection, ram: &Ram, n: u64, sends: bool| -> Result<(), BenchError> {
        let (mut reader, mut writer) = connection.split();
        for (at, len) in pieces(n) {
            let base = ram.blocks()[0].engine_range(at, len)?;
            // SAFETY: inside the engine map of a block that outlives this function.
            let range = [unsafe { IoRange::new(base, len as usize) }];
            if sends {
                writer.writev_all(&range, false, "sending raw data")?;
            } else {
                reader.readv_exact(&range, "receiving raw data")?;
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let mut threads = vec![];
        for (n, (near, far)) in pairs.into_iter().enumerate() {
            let (moved, to) = (&moved, &to);
            threads.push(scope.spawn(move || moved(near, ram, n as u64, true)));
            threads.push(scope.spawn(move || moved(far, to, n as u64, false)));
        }
        threads.into_iter().try_for_each(|t| {
            t.join().map_err(|_| BenchError::Other("a thread of the raw transfer panicked".into()))?
        })
    })?;
    Ok(begun.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_image_is_measured_and_all_of_it_moves() {
        let report = engine(&Options { ram: 64 << 20, data: 9 << 20, runs: 1, channels: Some(2) }).unwrap();
        assert_eq!(report.job.memory_normal_bytes, 9 << 20);
        assert!(report.engine_s > 0.0 && report.raw_one_s > 0.0 && report.raw_two_s > 0.0);
    }
}
