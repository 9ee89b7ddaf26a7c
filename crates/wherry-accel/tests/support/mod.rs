//! One engine of a class, and memory: descriptors go in, results come out.

#![allow(dead_code, reason = "each test file uses its part")]

use std::sync::Arc;

use wherry_accel::FenceState;
use wherry_accel::abi::{Completion, Descriptor};
use wherry_accel::catalogue::{Catalogue, EngineId, Host};
use wherry_accel::clock::VirtualClock;
use wherry_accel::device::{Caller, Config, Device, NoInterrupts};
use wherry_accel::drive::Simulation;
use wherry_accel::error::Errno;
use wherry_accel::memory::{AddressSpace, Arena};

const BASE: u64 = 0x1_0000;
const BYTES: u64 = 64 << 20;

pub struct Bench {
    pub device: Arc<Device>,
    pub memory: Arc<Arena>,
    pub context: u32,
    simulation: Simulation,
    record: u64,
    next: u64,
}

impl Bench {
    pub fn new(class: u16) -> Self {
        let clock = Arc::new(VirtualClock::default());
        let config = Config {
            catalogue: Catalogue::new(vec![EngineId { class, instance: 0 }]).unwrap(),
            host: Host::uniform(1),
            clock: clock.clone(),
            notify: Arc::new(NoInterrupts),
            seed: 1,
        };
        let device = Arc::new(Device::new(config).unwrap());
        let memory = Arc::new(Arena::new(&[(BASE, BYTES)]).unwrap());
        device.set_space(0, memory.clone());
        let context = device.create_context(Caller::PLAIN, 0, 0).unwrap();
        let simulation = Simulation::new(device.clone(), clock);
        let mut bench = Self { device, memory, context, simulation, record: 0, next: BASE };
        bench.record = bench.room(32);
        bench
    }

    pub fn end(&self) -> u64 {
        BASE + BYTES
    }

    pub fn room(&mut self, bytes: usize) -> u64 {
        let at = self.next;
        self.next += (bytes as u64 + 1).next_multiple_of(64);
        assert!(self.next <= self.end(), "the test uses too much memory");
        at
    }

    pub fn put(&mut self, bytes: &[u8]) -> u64 {
        let at = self.room(bytes.len());
        self.write(at, bytes);
        at
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write(at, bytes).unwrap();
    }

    pub fn get(&self, at: u64, bytes: usize) -> Vec<u8> {
        let mut out = vec![0; bytes];
        self.memory.read(at, &mut out).unwrap();
        out
    }

    /// Runs a descriptor: (bytes, result) of its record.
    pub fn run(&mut self, d: Descriptor) -> Result<(u64, u64), Errno> {
        self.write(self.record, &[0; 32]);
        let fence = self.device.submit(self.context, 0, &d.completing_at(self.record)).map_err(|r| r.errno)?;
        let state = self.simulation.wait(fence, 1 << 50);
        let mut bytes = [0; 32];
        self.memory.read(self.record, &mut bytes).unwrap();
        let record = Completion::decode(&bytes);
        match state {
            FenceState::Signalled => {
                assert_eq!((record.status, record.opcode), (1, d.opcode));
                Ok((record.bytes, record.result))
            }
            FenceState::Failed(errno) => {
                assert_eq!((record.status, record.error), (2, errno.number()));
                Err(errno)
            }
            FenceState::Pending => panic!("{d:?} never ended"),
        }
    }
}

/// Bytes that look like noise, the same for the same seed.
pub fn pattern(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..bytes).map(|_| next()).collect()
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
