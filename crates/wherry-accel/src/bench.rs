//! Figures of the device in real time, beside the crates that do its work called directly. `wherry bench --accel` prints them.
//!
//! What is compared is measured in turn, so that a machine whose speed drifts is the same for both. The device reads and
//! writes a client's memory; the direct call has its input and output in slices of its own.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::abi::{Completion, Descriptor, Fence, opcode, status};
use crate::catalogue::{Catalogue, CatalogueError, Host};
use crate::clock::RealClock;
use crate::device::{Caller, Config, Device, NoInterrupts, Notify};
use crate::drive::Workers;
use crate::error::Refused;
use crate::keys::{FleetKey, KeyKind};
use crate::memory::{AddressSpace, Arena, ArenaError, Fault};
use crate::scheduler::FenceState;

const BASE: u64 = 0x10_0000;
/// Input, then output, then what belongs to the client itself.
const HALF: u64 = 32 << 20;
const OUTPUT: u64 = BASE + HALF;
const OWN: u64 = OUTPUT + HALF;
/// Bytes that one measurement goes through, about.
pub const VOLUME: usize = 16 << 20;
/// Bytes of input, and the largest size of one operation.
const INPUT: usize = 4 << 20;
/// The longest wait for one piece of work.
const LIMIT: Duration = Duration::from_secs(60);
const KEY: [u8; 32] = [7; 32];
const ORIGINALS: usize = 8;
const RECOVERIES: usize = 2;

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
    #[error("starting workers")]
    Threads(#[from] std::io::Error),
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
}

/// Time from the submission of an empty request to its completion, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Latency {
    /// Half of them took no longer.
    pub p50: u64,
    /// 99 of 100 took no longer.
    pub p99: u64,
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
        let memory = Arc::new(Arena::new(&[(BASE, 2 * HALF + (16 << 20))])?);
        // Text-like: what repeats, but not at once. Touched as a whole, so that no page is handed out meanwhile.
        memory.write(BASE, &input())?;
        memory.write(OUTPUT, &vec![1; HALF as usize])?;
        memory.write(OWN, &[0; 64])?;
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
        self.memory.write(OWN + 4096, &list)?;
        let begin = Instant::now();
        let submission = Descriptor::new(opcode::BATCH, OWN + 4096, 0, count as u32);
        let fence = self.device.submit(self.context, slot, &submission)?;
        self.wait(fence, what)?;
        Ok(begin.elapsed())
    }
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

/// An operation: its name, its class, its descriptor for a size, and the same by the crate.
type Direct = Box<dyn FnMut(&[u8], &mut [u8]) -> Option<()>>;

fn operations(size: usize) -> Vec<(&'static str, u16, Descriptor, Direct)> {
    use ring::aead::{AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
    let d = |code| Descriptor::new(code, BASE, OUTPUT, size as u32);
    let room = (2 * size + 4096).min(crate::abi::MAX_ONE_SHOT as usize) as u32;
    let seal = |algorithm| -> Direct {
        Box::new(move |input: &[u8], output: &mut [u8]| {
            let key = LessSafeKey::new(UnboundKey::new(algorithm, &KEY).ok()?);
            let text = &mut output[..input.len()];
            text.copy_from_slice(input);
            let nonce = Nonce::assume_unique_for_key([0; 12]);
            let tag = key.seal_in_place_separate_tag(nonce, Aad::empty(), text).ok()?;
            output[input.len()..input.len() + 16].copy_from_slice(tag.as_ref());
            Some(())
        })
    };
    let mut zstd = zstd::bulk::Compressor::new(3).ok();
    let mut deflate = flate2::Compress::new(flate2::Compression::new(6), false);
    let shard = size / ORIGINALS;
    let code = Descriptor::new(opcode::RS_ENCODE, BASE, OUTPUT, shard as u32);
    vec![
        (
            "move",
            0,
            d(opcode::MOVE),
            Box::new(|input, output| {
                output[..input.len()].copy_from_slice(input);
                Some(())
            }),
        ),
        (
            "crc",
            0,
            Descriptor::new(opcode::CRC, BASE, 0, size as u32),
            Box::new(|input, _| {
                std::hint::black_box(crc32c::crc32c(input));
                Some(())
            }),
        ),
        (
            "lz4-compress",
            1,
            d(opcode::LZ4_COMPRESS).with(room, 0, 0),
            Box::new(|input, output| lz4_flex::block::compress_into(input, output).ok().map(|_| ())),
        ),
        (
            "zstd-compress",
            1,
            d(opcode::ZSTD_COMPRESS).with(room, 0, 0),
            Box::new(move |input, output| zstd.as_mut()?.compress_to_buffer(input, output).ok().map(|_| ())),
        ),
        (
            "deflate",
            1,
            d(opcode::DEFLATE).with(room, 0, 0),
            Box::new(move |input, output| {
                deflate.reset();
                deflate.compress(input, output, flate2::FlushCompress::Finish).ok().map(|_| ())
            }),
        ),
        ("aes-seal", 2, d(opcode::AES_SEAL).with(1, OWN, 0), seal(&AES_256_GCM)),
        ("chacha-seal", 2, d(opcode::CHACHA_SEAL).with(2, OWN, 0), seal(&CHACHA20_POLY1305)),
        (
            "sha256",
            2,
            d(opcode::SHA256),
            Box::new(|input, output| {
                output[..32].copy_from_slice(ring::digest::digest(&ring::digest::SHA256, input).as_ref());
                Some(())
            }),
        ),
        (
            "blake3",
            2,
            d(opcode::BLAKE3),
            Box::new(|input, output| {
                output[..32].copy_from_slice(blake3::hash(input).as_bytes());
                Some(())
            }),
        ),
        (
            "erasure-encode",
            4,
            code.with((ORIGINALS | RECOVERIES << 16) as u32, 0, 0),
            Box::new(move |input, output| {
                let mut encoder = reed_solomon_simd::ReedSolomonEncoder::new(ORIGINALS, RECOVERIES, shard).ok()?;
                input.chunks_exact(shard).try_for_each(|original| encoder.add_original_shard(original)).ok()?;
                let result = encoder.encode().ok()?;
                output
                    .chunks_exact_mut(shard)
                    .zip(result.recovery_iter())
                    .for_each(|(to, from)| to.copy_from_slice(from));
                Some(())
            }),
        ),
    ]
}

/// Throughput of one operation of each kind at each size (at most 4 MiB), `runs` times in turn with the crate called
/// directly; each time so often that about `volume` bytes are gone through.
pub fn throughput(sizes: &[usize], runs: usize, volume: usize) -> Result<Vec<Throughput>, BenchError> {
    let rig = Rig::new(1, Arc::new(NoInterrupts))?;
    let source = input();
    let mut target = vec![1; HALF as usize];
    let mut all = Vec::new();
    for &size in sizes {
        for (operation, class, d, mut direct) in operations(size) {
            let count = (volume / size).max(1);
            let (mut theirs, mut ours) = (Vec::new(), Vec::new());
            // The first of each makes what is kept between two, and is not counted.
            for run in 0..=runs {
                let begin = Instant::now();
                for _ in 0..count {
                    let input = std::hint::black_box(&source[..size]);
                    direct(input, &mut target).ok_or(BenchError::Direct(operation))?;
                }
                let took = begin.elapsed();
                let device = rig.batch(SLOT[usize::from(class)], &d, count, operation)?;
                if run > 0 {
                    let rate = |took: Duration| (size * count) as f64 / took.as_secs_f64();
                    theirs.push(rate(took));
                    ours.push(rate(device));
                }
            }
            all.push(Throughput { operation, bytes: size, device: median(ours), direct: median(theirs) });
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
    let record = OWN + 1024;
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
    rig.memory.write(OWN + 4096, &list)?;
    let submission = Descriptor::new(opcode::BATCH, OWN + 4096, 0, EACH as u32);
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
        let all = throughput(&[4096], 1, 64 << 10).unwrap();
        assert_eq!(all.len(), 10);
        assert!(all.iter().all(|one| one.device > 0.0 && one.direct > 0.0), "{all:?}");
        let (polled, woken) = latency(3).unwrap();
        assert!(polled.p50 > 0 && woken.p99 >= woken.p50);
        let shares = fairness(2, Duration::from_millis(20)).unwrap();
        assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{shares:?}");
    }
}
