//! From a context to a fence, on virtual time and on threads.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use wherry_accel::FenceState;
use wherry_accel::abi::{Completion, Descriptor, opcode, param};
use wherry_accel::catalogue::{Catalogue, Host};
use wherry_accel::clock::{Clock, RealClock, VirtualClock};
use wherry_accel::device::{Caller, Config, Device, NoInterrupts, Param};
use wherry_accel::drive::{Simulation, Workers};
use wherry_accel::memory::{AddressSpace, Arena};

const TEXT: u64 = 0x10_0000;
const COPY: u64 = 0x12_0000;
const RECORD: u64 = 0x14_0000;
const MAP: u64 = 0x15_0000;

fn device(clock: Arc<dyn Clock>) -> (Arc<Device>, Arc<Arena>) {
    let config = Config {
        catalogue: Catalogue::with_counts([2, 1, 1, 1, 1]).unwrap(),
        host: Host::uniform(2),
        clock,
        notify: Arc::new(NoInterrupts),
        seed: 1,
    };
    let device = Arc::new(Device::new(config).unwrap());
    let memory = Arc::new(Arena::new(&[(TEXT, 0x10_0000)]).unwrap());
    device.set_space(0, memory.clone());
    (device, memory)
}

/// A context whose slot 1 is copy1, and a copy submitted to it.
fn submit(device: &Device, memory: &Arena) -> wherry_accel::abi::Fence {
    let text: Vec<u8> = (0..100_000).map(|i| (i % 251) as u8).collect();
    memory.write(TEXT, &text).unwrap();
    memory.write(MAP, &[0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 1, 0]).unwrap();
    let context = device.create_context(Caller::PLAIN, 0, 0).unwrap();
    device.set_param(Caller::PLAIN, &Param { context, size: 16, param: param::ENGINES, value: MAP }).unwrap();
    let copy = Descriptor::new(opcode::MOVE, TEXT, COPY, text.len() as u32).completing_at(RECORD);
    assert!(device.submit(context, 0, &copy).is_err(), "slot 0 is a gap");
    device.submit(context, 1, &copy).unwrap()
}

fn check(device: &Device, memory: &Arena) {
    let mut copied = vec![0; 100_000];
    memory.read(COPY, &mut copied).unwrap();
    assert!(copied.iter().enumerate().all(|(i, byte)| *byte == (i % 251) as u8));
    let mut record = [0; 32];
    memory.read(RECORD, &mut record).unwrap();
    let record = Completion::decode(&record);
    assert_eq!((record.status, record.opcode, record.bytes), (1, opcode::MOVE, 100_000));
    let busy: Vec<bool> = device.engines().iter().map(|engine| engine.busy > 0).collect();
    assert_eq!(busy, [false, true, false, false, false, false], "only copy1 did it");
}

#[test]
fn a_copy_goes_from_a_map_to_a_signalled_fence_on_virtual_time() {
    let clock = Arc::new(VirtualClock::default());
    let (device, memory) = device(clock.clone());
    let fence = submit(&device, &memory);
    assert_eq!(device.fence(fence), Ok(FenceState::Pending));
    let mut simulation = Simulation::new(device.clone(), clock);
    assert_eq!(simulation.wait(fence, 1_000_000_000), FenceState::Signalled);
    check(&device, &memory);
}

#[test]
fn worker_threads_do_the_same_and_end_with_their_owner() {
    let named = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let name = |entry: std::fs::DirEntry| std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        tasks.map(name).filter(|name| name.starts_with("wherry-accel-")).count()
    };
    let (device, memory) = device(Arc::new(RealClock::default()));
    let workers = Workers::start(device.clone()).unwrap();
    let fence = submit(&device, &memory);
    let deadline = Instant::now() + Duration::from_secs(20);
    while device.fence(fence) == Ok(FenceState::Pending) {
        assert!(Instant::now() < deadline, "waited 20 s for {fence}");
        std::thread::yield_now();
    }
    check(&device, &memory);
    // One of them may have done all of it before the other has come to give itself a name.
    while named() != 2 {
        assert!(Instant::now() < deadline, "waited 20 s for both workers");
        std::thread::yield_now();
    }
    drop(workers);
    assert_eq!(named(), 0, "threads left behind");
}
