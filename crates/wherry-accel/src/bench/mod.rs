//! Figures of the device in real time, beside the crates that do its work called directly. `wherry bench --accel` prints them.
//!
//! What is compared is measured in turn, and a ratio is the median of those of each pair, so that a machine whose speed
//! drifts is the same for both. The device reads and writes a client's memory; the direct call has its input and output in
//! slices of its own. Both keep from one call to the next what the crate lets them keep.
//!
//! - this file: the device and its client. `operations`: what is measured. `served`: the same through the function.

mod operations;
mod served;

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use wherry_vfio_user::VfioUserError;

use crate::abi::{Completion, Descriptor, Fence, opcode, status};
use crate::catalogue::{Catalogue, CatalogueError, Host};
use crate::clock::RealClock;
use crate::device::{Caller, Config, Device, NoInterrupts, Notify};
use crate::drive::Workers;
use crate::error::Refused;
use crate::function::FunctionError;
use crate::keys::{FleetKey, KeyKind};
use crate::memory::{AddressSpace, Arena, ArenaError, Fault};
use crate::scheduler::FenceState;

use operations::{Operation, operations};

pub use served::{ServedLatency, ServedThroughput, served_latency, served_throughput};

const BASE: u64 = 0x10_0000;
/// Input, then output, then what belongs to the client itself.
const HALF: u64 = 32 << 20;
const OUTPUT: u64 = BASE + HALF;
const OWN: u64 = OUTPUT + HALF;
/// All of it.
const BYTES: u64 = 2 * HALF + (16 << 20);
/// How long one measurement takes, about: long beside what it takes to see that it is over.
pub const TIME: Duration = Duration::from_millis(25);
/// Most operations of one measurement: their descriptors have to fit.
const MOST: usize = 1 << 16;
/// Bytes of input, and the largest size of one operation.
const INPUT: usize = 4 << 20;
/// Where parameters and records of the client's own are, then descriptors.
const LIST: u64 = OWN + 4096;
/// The longest wait for one piece of work.
const LIMIT: Duration = Duration::from_secs(60);
const KEY: [u8; 32] = [7; 32];

/// A measurement cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The device refused something, or work failed.
    #[error("the device refused a part of the measurement")]
    Refused(#[from] Refused),
    /// No device.
    #[error("making the device")]
    Catalogue(#[from] CatalogueError),
    /// No memory for it.
    #[error("making the device's memory")]
    Memory(#[from] ArenaError),
    /// The memory is not as it was made.
    #[error("using the device's memory")]
    Fault(#[from] Fault),
    /// No thread.
    #[error("starting threads, or sharing memory with them")]
    Threads(#[from] std::io::Error),
    /// No function.
    #[error("making the function")]
    Function(#[from] FunctionError),
    /// The function's client is refused something.
    #[error("speaking with the function")]
    Client(#[from] VfioUserError),
    /// Work did not end, or not well.
    #[error("{0} has not ended within {LIMIT:?}, or failed")]
    Work(&'static str),
    /// The crate called directly refused.
    #[error("{0}, called directly, failed")]
    Direct(&'static str),
}

/// Throughput of an operation at a size.
#[derive(Clone, Debug)]
pub struct Throughput {
    /// The operation.
    pub operation: &'static str,
    /// Bytes of one.
    pub bytes: usize,
    /// Bytes per second by the device: the median.
    pub device: f64,
    /// Bytes per second of the crate called directly: the median.
    pub direct: f64,
    /// Device by direct: the median of the pairs.
    pub ratio: f64,
    /// The same by the time that the two threads had a processor: what else the machine does matters less. `None` where the
    /// kernel does not tell (`schedstat`).
    pub processor_ratio: Option<f64>,
}

/// Time from the submission of an empty request to its completion, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Latency {
    /// Half of them took no longer.
    pub p50: u64,
    /// 99 of 100 took no longer.
    pub p99: u64,
}

/// How long a thread of this process has had a processor. Exact when it has just slept.
fn processor_time(task: &std::path::Path) -> Option<Duration> {
    let text = std::fs::read_to_string(task.join("schedstat")).ok()?;
    text.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

/// The thread of the one worker of a rig.
fn worker() -> Option<std::path::PathBuf> {
    let tasks = std::fs::read_dir("/proc/self/task").ok()?;
    let named = |path: &std::path::PathBuf| {
        std::fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim() == "wherry-accel-0")
    };
    tasks.flatten().map(|task| task.path()).find(named)
}

/// Lets this thread sleep, and the worker fall asleep.
const SETTLE: Duration = Duration::from_micros(300);

/// What a measurement took by the clock, and of a thread's processor time.
fn timed(
    task: Option<&std::path::Path>,
    work: impl FnOnce() -> Result<Duration, BenchError>,
) -> Result<(Duration, Option<Duration>), BenchError> {
    let time = || {
        std::thread::sleep(SETTLE);
        processor_time(task?)
    };
    let before = time();
    let took = work()?;
    let used = time().zip(before).map(|(after, before)| after.saturating_sub(before));
    Ok((took, used))
}

/// A device in real time and its client.
struct Rig {
    device: Arc<Device>,
    memory: Arc<Arena>,
    context: u32,
    _workers: Workers,
}

fn catalogue() -> Result<Catalogue, CatalogueError> {
    Catalogue::with_counts([1, 1, 4, 1, 1])
}

/// Slots of the default map, by class.
const SLOT: [u32; 5] = [0, 1, 2, 6, 7];

impl Rig {
    fn new(workers: usize, notify: Arc<dyn Notify>) -> Result<Self, BenchError> {
        let host = Host::uniform(workers);
        let config = Config { catalogue: catalogue()?, host, clock: Arc::new(RealClock::default()), notify, seed: 1 };
        let device = Arc::new(Device::new(config)?);
        let memory = Arc::new(Arena::new(&[(BASE, BYTES)])?);
        fill(|at, bytes| Ok(memory.write(at, bytes)?))?;
        device.set_space(0, memory.clone());
        let fleet = FleetKey::new([1; 32]);
        for (handle, kind) in [(1, KeyKind::Aes256Gcm), (2, KeyKind::ChaCha20Poly1305), (3, KeyKind::HmacSha256)] {
            device.keys().import(&fleet, handle, kind, &fleet.wrap(handle, kind, &KEY)?)?;
        }
        let context = device.create_context(Caller::PLAIN, 0, 0)?;
        let workers = Workers::start(device.clone())?;
        Ok(Self { device, memory, context, _workers: workers })
    }

    fn wait(&self, fence: Fence, what: &'static str) -> Result<(), BenchError> {
        let begin = Instant::now();
        loop {
            match self.device.fence(fence)? {
                FenceState::Signalled => return Ok(()),
                FenceState::Pending if begin.elapsed() < LIMIT => std::thread::sleep(Duration::from_micros(20)),
                _ => return Err(BenchError::Work(what)),
            }
        }
    }

    /// Time for a batch of one descriptor, so often.
    fn batch(&self, slot: u32, d: &Descriptor, count: usize, what: &'static str) -> Result<Duration, BenchError> {
        let list: Vec<u8> = (0..count).flat_map(|_| d.encode()).collect();
        self.memory.write(LIST, &list)?;
        let begin = Instant::now();
        let submission = Descriptor::new(opcode::BATCH, LIST, 0, count as u32);
        let fence = self.device.submit(self.context, slot, &submission)?;
        self.wait(fence, what)?;
        Ok(begin.elapsed())
    }
}

/// Fills a client's memory. Text-like: what repeats, but not at once. Touched as a whole, so that no page is handed out meanwhile.
fn fill(write: impl Fn(u64, &[u8]) -> Result<(), BenchError>) -> Result<(), BenchError> {
    write(BASE, &input())?;
    write(OUTPUT, &vec![1; HALF as usize])?;
    write(OWN, &[0; 64])?;
    write(operations::BITMAP, &[0xfc, 0xff])?;
    write(operations::PROGRAM, operations::SUM.map(u64::to_le_bytes).as_flattened())
}

fn input() -> Vec<u8> {
    let mut state = 0x9e37_79b9u32;
    let mut out = Vec::with_capacity(INPUT + 64);
    while out.len() < INPUT {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let word = state >> 24;
        out.extend_from_slice(format!("{word:x} words {} ", word % 7).as_bytes());
    }
    out.truncate(INPUT);
    out
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Throughput of the operations at each size (64 bytes to 4 MiB), `runs` times in turn with the crate called directly, each
/// time for about `time`. With `only`, of those whose name has that.
pub fn throughput(
    sizes: &[usize],
    runs: usize,
    time: Duration,
    only: Option<&str>,
) -> Result<Vec<Throughput>, BenchError> {
    let rig = Rig::new(1, Arc::new(NoInterrupts))?;
    let thread = worker();
    let source = input();
    let mut target = vec![1; HALF as usize];
    let mut all = Vec::new();
    for &size in sizes {
        for operation in operations(size).into_iter().filter(|o| only.is_none_or(|only| o.name.contains(only))) {
            let Operation { name, class, descriptor, prepare, mut direct, .. } = operation;
            let prepared = match prepare {
                Some(prepare) => Some(prepare(&source[..size]).ok_or(BenchError::Direct(name))?),
                None => None,
            };
            let descriptor = match &prepared {
                Some(prepared) => {
                    rig.memory.write(BASE, &prepared.bytes)?;
                    Descriptor { size: prepared.size, ..descriptor }
                }
                None => descriptor,
            };
            let input = prepared.as_ref().map_or(&source[..size], |prepared| &prepared.bytes[..]);
            let mut call = |count: usize| {
                let begin = Instant::now();
                for _ in 0..count {
                    direct(std::hint::black_box(input), &mut target).ok_or(BenchError::Direct(name))?;
                }
                Ok::<_, BenchError>(begin.elapsed())
            };
            // The first makes what is kept between two; the second says how many are enough.
            call(1)?;
            let one = call(4)?.as_secs_f64() / 4.0;
            let count = ((time.as_secs_f64() / one) as usize).clamp(1, MOST);
            rig.batch(SLOT[usize::from(class)], &descriptor, 1, name)?;
            let (mut theirs, mut ours, mut ratios, mut processor) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
            for _ in 0..runs {
                let (direct, used) = timed(Some("/proc/thread-self".as_ref()), || call(count))?;
                let batch = || rig.batch(SLOT[usize::from(class)], &descriptor, count, name);
                let (device, worker) = timed(thread.as_deref(), batch)?;
                if let Some((direct, device)) = used.zip(worker) {
                    processor.push(direct.as_secs_f64() / device.as_secs_f64().max(1e-9));
                }
                let rate = |took: Duration| (size * count) as f64 / took.as_secs_f64();
                theirs.push(rate(direct));
                ours.push(rate(device));
                ratios.push(direct.as_secs_f64() / device.as_secs_f64());
            }
            if prepared.is_some() {
                rig.memory.write(BASE, &source)?;
            }
            let (device, direct, ratio) = (median(ours), median(theirs), median(ratios));
            let processor_ratio = (!processor.is_empty()).then(|| median(processor));
            all.push(Throughput { operation: name, bytes: size, device, direct, ratio, processor_ratio });
        }
    }
    Ok(all)
}

fn percentiles(mut times: Vec<u64>) -> Latency {
    times.sort_unstable();
    let at = |part: usize| times.get(times.len() * part / 100).copied().unwrap_or(0);
    Latency { p50: at(50), p99: at(99) }
}

/// A client that sleeps until it is woken.
#[derive(Default)]
struct Bell(Mutex<u64>, Condvar);

impl Notify for Bell {
    fn raise(&self, _vector: u16) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.1.notify_all();
    }
}

/// From the submission of an empty request to the client seeing its record: (polled in memory, woken by the interrupt).
pub fn latency(count: usize) -> Result<(Latency, Latency), BenchError> {
    let bell = Arc::new(Bell::default());
    let rig = Rig::new(1, bell.clone())?;
    let record = OWN + 256;
    let nop = Descriptor::new(opcode::NOP, 0, 0, 0).completing_at(record);
    let status_of = || {
        let mut bytes = [0; 32];
        rig.memory.read(record, &mut bytes).map(|()| Completion::decode(&bytes).status)
    };
    let (mut polled, mut woken) = (Vec::new(), Vec::new());
    for _ in 0..count {
        rig.memory.write(record, &[0; 32])?;
        let begin = Instant::now();
        let fence = rig.device.submit(rig.context, 0, &nop)?;
        while status_of()? != status::DONE {
            if begin.elapsed() > LIMIT {
                return Err(BenchError::Work("an empty request"));
            }
            std::hint::spin_loop();
        }
        polled.push(begin.elapsed().as_nanos() as u64);
        rig.wait(fence, "an empty request")?;

        let before = *bell.0.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = Instant::now();
        let fence = rig.device.submit(rig.context, 0, &nop.flagged(crate::abi::flag::INTERRUPT))?;
        let rings = bell.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (_rings, late) =
            bell.1.wait_timeout_while(rings, LIMIT, |rings| *rings == before).unwrap_or_else(PoisonError::into_inner);
        if late.timed_out() {
            return Err(BenchError::Work("an empty request"));
        }
        woken.push(begin.elapsed().as_nanos() as u64);
        drop(_rings);
        rig.wait(fence, "an empty request")?;
    }
    Ok((percentiles(polled), percentiles(woken)))
}

/// Bytes per second of SHA-256 on four engines, by so many workers: the median of `runs`.
pub fn scaling(workers: usize, runs: usize) -> Result<f64, BenchError> {
    let rig = Rig::new(workers, Arc::new(NoInterrupts))?;
    const SIZE: usize = 1 << 20;
    const EACH: usize = 8;
    let d = Descriptor::new(opcode::SHA256, BASE, OUTPUT, SIZE as u32);
    let list: Vec<u8> = (0..EACH).flat_map(|_| d.encode()).collect();
    rig.memory.write(LIST, &list)?;
    let submission = Descriptor::new(opcode::BATCH, LIST, 0, EACH as u32);
    let mut rates = Vec::new();
    for _ in 0..runs {
        let begin = Instant::now();
        let fences: Result<Vec<Fence>, Refused> =
            (0..4).map(|engine| rig.device.submit(rig.context, SLOT[2] + engine, &submission)).collect();
        for fence in fences? {
            rig.wait(fence, "sha256")?;
        }
        rates.push((4 * EACH * SIZE) as f64 / begin.elapsed().as_secs_f64());
    }
    Ok(median(rates))
}

/// Shares, from 0 to 1, of one engine that contexts of one priority got who all wanted it for `time`.
pub fn fairness(contexts: usize, time: Duration) -> Result<Vec<f64>, BenchError> {
    let rig = Rig::new(1, Arc::new(NoInterrupts))?;
    let spin = Descriptor::new(opcode::SPIN, OWN + 2048, 0, 0);
    let mut fences = Vec::new();
    for _ in 0..contexts {
        let context = rig.device.create_context(Caller::PLAIN, 0, 0)?;
        fences.push(rig.device.submit(context, SLOT[0], &spin)?);
    }
    std::thread::sleep(time);
    let of = |fence: &Fence| {
        let info = rig.device.contexts().into_iter().find(|info| info.id == fence.context);
        info.map_or(0, |info| info.slots[SLOT[0] as usize].runtime) as f64
    };
    let times: Vec<f64> = fences.iter().map(of).collect();
    rig.memory.write(OWN + 2048, &[1])?;
    for fence in fences {
        rig.wait(fence, "a spinner")?;
    }
    let whole: f64 = times.iter().sum();
    Ok(times.into_iter().map(|time| time / whole).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_that_is_measured_runs_both_ways() {
        let all = throughput(&[4096], 1, Duration::from_millis(1), None).unwrap();
        assert_eq!(all.len(), operations(4096).len());
        // Each class has an engine that is measured.
        assert!((0..5).all(|class| operations(4096).iter().any(|operation| operation.class == class)));
        assert!(all.iter().all(|one| one.device > 0.0 && one.direct > 0.0), "{all:?}");
        let (polled, woken) = latency(3).unwrap();
        assert!(polled.p50 > 0 && woken.p99 >= woken.p50);
        let served = served_latency(50).unwrap();
        let all = [served.message, served.eventfd, served.polled, served.both_eventfd];
        assert!(all.iter().all(|one| one.p50 > 0 && one.p99 >= one.p50), "{served:?}");
        let through = served_throughput(4096, 1, Duration::from_millis(1)).unwrap();
        assert!(through.len() == 3 && through.iter().all(|one| one.served > 0.0 && one.library > 0.0), "{through:?}");
        let shares = fairness(2, Duration::from_millis(20)).unwrap();
        assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{shares:?}");
    }
}
