//! The same through the function: a client over vfio-user, in a thread of its own, whose memory the device has mapped.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};
use wherry_vfio_user::client::NoMemory;
use wherry_vfio_user::payload::{pci_irq, pci_region};
use wherry_vfio_user::{Client, Options, Stop, server};

use super::operations::operations;
use super::{
    BASE, BYTES, BenchError, LIMIT, LIST, Latency, MOST, OWN, Rig, SLOT, catalogue, fill, median, percentiles,
};
use crate::abi::{BELLS, Completion, Descriptor, command, flag, opcode, register, slot_register, status};
use crate::catalogue::Host;
use crate::device::NoInterrupts;
use crate::drive::RealTime;
use crate::function::{AccelFunction, Model};

/// Where the ring is, its entries, and the tail behind it.
const RING: u64 = OWN + (8 << 20);
const ENTRIES: u32 = 64;
const TAIL: u64 = RING + 64 * ENTRIES as u64;
/// The record of what is submitted.
const RECORD: u64 = OWN + 256;
/// How long a polled ring is looked at: never given up while requests follow each other.
const PATIENCE: Duration = Duration::from_millis(10);

/// From the submission of an empty request until the client sees its record, by how the device is told and how the client learns.
#[derive(Clone, Copy, Debug)]
pub struct ServedLatency {
    /// By a message that writes the register; seen in memory.
    pub message: Latency,
    /// By an eventfd; seen in memory.
    pub eventfd: Latency,
    /// By memory, which the device polls; seen in memory.
    pub polled: Latency,
    /// By an eventfd both ways: the client sleeps until its interrupt.
    pub both_eventfd: Latency,
}

/// Throughput through the function beside the library, in bytes per second: medians, and that of the ratios.
#[derive(Clone, Debug)]
pub struct ServedThroughput {
    /// The operation.
    pub operation: &'static str,
    /// Bytes of one.
    pub bytes: usize,
    /// Through the function.
    pub served: f64,
    /// By the library, with memory of its own.
    pub library: f64,
    /// The first by the second.
    pub ratio: f64,
}

/// How the device is told.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tell {
    Message,
    Eventfd,
    Polled,
}

struct Served {
    client: Client,
    stop: Stop,
    thread: Option<JoinHandle<()>>,
    memory: MmapRegion,
    context: u32,
    /// That of the context.
    bell: Option<OwnedFd>,
    interrupt: OwnedFd,
    tail: u32,
}

impl Served {
    fn new() -> Result<Self, BenchError> {
        let file = memfd_create("bench", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(system)?;
        ftruncate(&file, BYTES).map_err(system)?;
        fcntl_add_seals(&file, SealFlags::SHRINK).map_err(system)?;
        let file = File::from(file);
        let model = Model {
            catalogue: catalogue()?,
            host: Host::uniform(1),
            drive: Box::new(RealTime { patience: PATIENCE }),
            privileged: Arc::default(),
            seed: 1,
            fleet: None,
            keys: Vec::new(),
        };
        let mut function = AccelFunction::new(model)?;
        let mut host = server::Host::new(&function)?;
        let (ours, theirs) = UnixStream::pair()?;
        let stop = host.stop();
        let thread = std::thread::Builder::new().name("bench-served".into()).spawn(move || {
            // It ends when the client leaves, which is no failure of the measurement.
            let _ = host.serve(theirs, &mut function);
        })?;
        let client = Client::over(ours, "the accelerator", Options::default(), Arc::new(NoMemory))?;
        client.dma_map(BASE, BYTES, Some((file.as_fd(), 0)), true, true)?;
        client.write(pci_region::CONFIG, 4, &[6, 0])?;
        let memory = MmapRegion::from_file(FileOffset::new(file, 0), BYTES as usize).map_err(std::io::Error::other)?;
        let interrupt = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(system)?;
        client.set_triggers(pci_irq::MSIX, 0, &[interrupt.as_fd()])?;
        let mut bells = client.region_io_fds(0)?.descriptors;
        let mut this = Self { client, stop, thread: Some(thread), memory, context: 0, bell: None, interrupt, tail: 0 };
        fill(|at, bytes| this.put(at, bytes))?;
        this.put(LIST, &u64::from(command::CREATE).to_le_bytes())?;
        this.put(LIST + 8, &[0; 56])?;
        this.client.write(0, register::COMMAND, &LIST.to_le_bytes())?;
        this.context = this.read(register::CREATED)?;
        let bell = ((this.context & 0xffff) % BELLS) as usize;
        this.bell = (bell < bells.len()).then(|| bells.swap_remove(bell));
        Ok(this)
    }

    fn put(&self, at: u64, bytes: &[u8]) -> Result<(), BenchError> {
        let all = self.memory.as_volatile_slice();
        all.write_slice(bytes, (at - BASE) as usize).map_err(|error| std::io::Error::other(error).into())
    }

    fn read(&self, at: u64) -> Result<u32, BenchError> {
        let mut word = [0; 4];
        self.client.read(0, at, &mut word)?;
        Ok(u32::from_le_bytes(word))
    }

    fn word(&self, at: u64) -> Result<u32, BenchError> {
        let all = self.memory.as_volatile_slice();
        all.load((at - BASE) as usize, Ordering::SeqCst).map_err(|error| std::io::Error::other(error).into())
    }

    fn set_word(&self, at: u64, value: u32) -> Result<(), BenchError> {
        let all = self.memory.as_volatile_slice();
        all.store(value, (at - BASE) as usize, Ordering::SeqCst).map_err(|error| std::io::Error::other(error).into())
    }

    fn slot(&self, slot: u32) -> u64 {
        let context = register::CONTEXTS_BASE + (u64::from(self.context & 0xffff) - 1) * register::CONTEXT_BYTES;
        context + slot_register::BYTES * u64::from(slot)
    }

    /// A ring for a slot, and none for the one before.
    fn start_ring(&mut self, slot: u32, tell: Tell) -> Result<(), BenchError> {
        let at = self.slot(slot);
        let address = match tell {
            Tell::Message => 0,
            Tell::Eventfd => TAIL,
            Tell::Polled => TAIL | slot_register::POLLED,
        };
        self.client.write(0, at + slot_register::TAIL_ADDRESS, &0u64.to_le_bytes())?;
        (self.tail, _) = (0, self.set_word(TAIL, 0)?);
        self.set_word(TAIL + slot_register::ASLEEP, 1)?;
        self.client.write(0, at + slot_register::BASE, &RING.to_le_bytes())?;
        self.client.write(0, at + slot_register::ENTRIES, &ENTRIES.to_le_bytes())?;
        self.client.write(0, at + slot_register::TAIL_ADDRESS, &address.to_le_bytes())?;
        Ok(())
    }

    fn stop_ring(&self, slot: u32) -> Result<(), BenchError> {
        self.client.write(0, self.slot(slot) + slot_register::TAIL_ADDRESS, &0u64.to_le_bytes())?;
        Ok(())
    }

    /// Puts one in, whose record is at [`RECORD`], and tells the device. Since when.
    fn submit(&mut self, slot: u32, d: &Descriptor, tell: Tell) -> Result<Instant, BenchError> {
        self.put(RECORD, &[0; 32])?;
        let d = d.completing_at(RECORD);
        self.put(RING + 64 * u64::from(self.tail % ENTRIES), &d.encode())?;
        self.tail = self.tail.wrapping_add(1);
        let begin = Instant::now();
        match tell {
            Tell::Message => {
                self.client.write(0, self.slot(slot) + slot_register::TAIL, &self.tail.to_le_bytes())?;
            }
            Tell::Eventfd | Tell::Polled => {
                self.set_word(TAIL, self.tail)?;
                fence(Ordering::SeqCst);
                if tell == Tell::Eventfd || self.word(TAIL + slot_register::ASLEEP)? != 0 {
                    let bell = self.bell.as_ref().ok_or(BenchError::Work("a device without bells"))?;
                    rustix::io::write(bell, &1u64.to_ne_bytes()).map_err(system)?;
                }
            }
        }
        Ok(begin)
    }

    /// What the record says, when it is there.
    fn ended(&self, begin: Instant, what: &'static str, pause: impl Fn()) -> Result<(), BenchError> {
        while self.word(RECORD)? & 0xff == 0 {
            if begin.elapsed() > LIMIT {
                return Err(BenchError::Work(what));
            }
            pause();
        }
        let mut record = [0; 32];
        let all = self.memory.as_volatile_slice();
        all.read_slice(&mut record, (RECORD - BASE) as usize).map_err(std::io::Error::other)?;
        match Completion::decode(&record).status {
            status::DONE => Ok(()),
            _ => Err(BenchError::Work(what)),
        }
    }

    fn batch(&mut self, slot: u32, d: &Descriptor, count: usize, what: &'static str) -> Result<Duration, BenchError> {
        let list: Vec<u8> = (0..count).flat_map(|_| d.encode()).collect();
        self.put(LIST, &list)?;
        let submission = Descriptor::new(opcode::BATCH, LIST, 0, count as u32);
        let begin = self.submit(slot, &submission, Tell::Eventfd)?;
        self.ended(begin, what, || std::thread::sleep(Duration::from_micros(20)))?;
        Ok(begin.elapsed())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.stop();
        self.client.close();
        if let Some(thread) = self.thread.take() {
            // If it panicked it has said so; there is nobody to hand it to here.
            let _ = thread.join();
        }
    }
}

fn system(errno: rustix::io::Errno) -> std::io::Error {
    errno.into()
}

/// Latencies of so many empty requests each.
pub fn served_latency(count: usize) -> Result<ServedLatency, BenchError> {
    const WHAT: &str = "an empty request";
    let mut served = Served::new()?;
    let nop = Descriptor::new(opcode::NOP, 0, 0, 0);
    let mut seen = |tell| {
        served.start_ring(0, tell)?;
        let mut times = Vec::with_capacity(count);
        for _ in 0..count {
            let begin = served.submit(0, &nop, tell)?;
            // Where there are as few processors as there are threads that look, one that does not yield keeps the worker out.
            served.ended(begin, WHAT, std::thread::yield_now)?;
            times.push(begin.elapsed().as_nanos() as u64);
        }
        served.stop_ring(0)?;
        Ok::<_, BenchError>(percentiles(times))
    };
    let (message, eventfd, polled) = (seen(Tell::Message)?, seen(Tell::Eventfd)?, seen(Tell::Polled)?);
    served.start_ring(0, Tell::Eventfd)?;
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let begin = served.submit(0, &nop.flagged(flag::INTERRUPT), Tell::Eventfd)?;
        let limit = Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
        if poll(&mut [PollFd::new(&served.interrupt, PollFlags::IN)], Some(&limit)).map_err(system)? == 0 {
            return Err(BenchError::Work(WHAT));
        }
        times.push(begin.elapsed().as_nanos() as u64);
        rustix::io::read(&served.interrupt, &mut [0; 8]).map_err(system)?;
        served.ended(begin, WHAT, std::hint::spin_loop)?;
    }
    Ok(ServedLatency { message, eventfd, polled, both_eventfd: percentiles(times) })
}

/// Throughput of some operations of that size, `runs` times in turn with the library, each time for about `time`.
pub fn served_throughput(bytes: usize, runs: usize, time: Duration) -> Result<Vec<ServedThroughput>, BenchError> {
    let rig = Rig::new(1, Arc::new(NoInterrupts))?;
    let mut served = Served::new()?;
    let mut all = Vec::new();
    let chosen = |name: &str| ["move", "lz4-compress", "sha256"].contains(&name);
    for operation in operations(bytes).into_iter().filter(|operation| chosen(operation.name)) {
        let (name, d, slot) = (operation.name, operation.descriptor, SLOT[usize::from(operation.class)]);
        served.start_ring(slot, Tell::Eventfd)?;
        rig.batch(slot, &d, 1, name)?;
        let one = rig.batch(slot, &d, 16, name)?.as_secs_f64() / 16.0;
        let count = ((time.as_secs_f64() / one) as usize).clamp(1, MOST);
        served.batch(slot, &d, 1, name)?;
        let (mut theirs, mut ours, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..runs {
            let library = rig.batch(slot, &d, count, name)?.as_secs_f64();
            let function = served.batch(slot, &d, count, name)?.as_secs_f64();
            let rate = |took: f64| (bytes * count) as f64 / took;
            theirs.push(rate(library));
            ours.push(rate(function));
            ratios.push(library / function);
        }
        served.stop_ring(slot)?;
        let (library, served, ratio) = (median(theirs), median(ours), median(ratios));
        all.push(ServedThroughput { operation: name, bytes, served, library, ratio });
    }
    Ok(all)
}
