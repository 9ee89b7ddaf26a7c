//! The device as bytes: registers, commands, rings and portals, from the document alone.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use wherry_accel::abi::{self, Completion, Descriptor, command, flag, opcode, param, register, slot_register, status};
use wherry_accel::catalogue::{Catalogue, EngineId, Host};
use wherry_accel::clock::{RealClock, VirtualClock};
use wherry_accel::device::{Caller, Config, Device, Notify};
use wherry_accel::drive::{Simulation, Workers};
use wherry_accel::error::{Errno, Refused};
use wherry_accel::memory::{AddressSpace, Arena};
use wherry_accel::state::AccelUnit;
use wherry_state::{Saved, StateUnit};

const COMMAND: u64 = 0x1_0000;
const RING: u64 = 0x1_1000;
const RECORDS: u64 = 0x1_4000;
const WORD: u64 = 0x1_8000;
const HEAD: u64 = 0x1_8040;
const BUFFER: u64 = 0x1_9000;

/// Vectors that were raised.
#[derive(Default)]
struct Raised(Mutex<Vec<u16>>);

impl Notify for Raised {
    fn raise(&self, vector: u16) {
        self.0.lock().unwrap().push(vector);
    }
}

struct Board {
    device: Arc<Device>,
    memory: Arc<Arena>,
    raised: Arc<Raised>,
    simulation: Simulation,
}

fn device(memory: &Arc<Arena>, raised: &Arc<Raised>) -> (Arc<Device>, Simulation) {
    let clock = Arc::new(VirtualClock::default());
    let config = Config {
        catalogue: Catalogue::with_counts([2, 1, 0, 0, 0]).unwrap(),
        host: Host::uniform(2),
        clock: clock.clone(),
        notify: raised.clone(),
        seed: 1,
    };
    let device = Arc::new(Device::new(config).unwrap());
    device.set_space(0, memory.clone());
    (device.clone(), Simulation::new(device, clock))
}

impl Board {
    fn new() -> Self {
        let memory = Arc::new(Arena::new(&[(COMMAND, 0x1_0000)]).unwrap());
        let raised = Arc::new(Raised::default());
        let (device, simulation) = device(&memory, &raised);
        Self { device, memory, raised, simulation }
    }

    /// The same memory, and another device with what this one saved.
    fn migrate(&mut self) {
        let unit = AccelUnit::new(self.device.clone(), None, 0);
        unit.begin_stop().unwrap();
        self.simulation.finish();
        unit.finish_stop(Instant::now()).unwrap();
        let Saved::Section(section) = unit.save().unwrap() else { panic!("nothing saved") };
        let (device, simulation) = device(&self.memory, &self.raised);
        let unit = AccelUnit::new(device.clone(), None, 0);
        unit.restore(&section).unwrap();
        unit.start().unwrap();
        (self.device, self.simulation) = (device, simulation);
    }

    fn read(&self, at: u64, width: usize) -> Result<u64, Refused> {
        let mut bytes = [0; 8];
        self.device.read_register(at, &mut bytes[..width])?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn write(&self, at: u64, width: usize, value: u64) -> Result<(), Errno> {
        let bytes = value.to_le_bytes();
        self.device.write_register(Caller::PLAIN, at, &bytes[..width]).map_err(|refused| refused.errno)
    }

    /// Does a command; answers its block afterwards.
    fn command(&self, number: u32, words: &[u32]) -> Result<Vec<u32>, Errno> {
        let mut block = [0u32; 16];
        block[0] = number;
        block[2..2 + words.len()].copy_from_slice(words);
        let bytes: Vec<u8> = block.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.memory.write(COMMAND, &bytes).unwrap();
        let result = self.write(register::COMMAND, 8, COMMAND);
        let said = self.read(register::RESULT, 4).unwrap() as u16;
        assert_eq!(said, result.err().map_or(0, Errno::number), "the register says the same");
        let mut bytes = [0; 64];
        self.memory.read(COMMAND, &mut bytes).unwrap();
        result.map(|()| bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
    }

    fn create(&self) -> u32 {
        self.command(command::CREATE, &[0, 0, 0, 0]).unwrap();
        self.read(register::CREATED, 4).unwrap() as u32
    }

    fn record(&self, number: u64) -> Completion {
        let mut bytes = [0; 32];
        self.memory.read(RECORDS + 32 * number, &mut bytes).unwrap();
        Completion::decode(&bytes)
    }

    fn entry(&self, index: u64, d: Descriptor) {
        self.memory.write(RING + 64 * index, &d.encode()).unwrap();
    }
}

fn doorbell(context: u32, slot: u64, register: u64) -> u64 {
    register::CONTEXTS_BASE + (u64::from(context & 0xffff) - 1) * register::CONTEXT_BYTES + 64 * slot + register
}

fn portal(context: u32, slot: u64) -> u64 {
    doorbell(context, slot, register::PORTALS)
}

fn add(number: u64) -> Descriptor {
    Descriptor { tag: number as u32, ..Descriptor::new(opcode::ADD, 0, WORD, 0) }
        .with(0, 1, 0)
        .completing_at(RECORDS + 32 * number)
}

#[test]
fn a_client_finds_out_what_it_has_by_reading_registers() {
    let b = Board::new();
    assert_eq!(b.read(register::MAGIC, 4).unwrap().to_le_bytes()[..4], *b"WACC");
    assert_eq!(b.read(register::VERSION, 4).unwrap(), u64::from(abi::VERSION));
    assert_eq!((b.read(register::ENGINES, 4).unwrap(), b.read(register::SLOTS, 4).unwrap()), (3, 64));
    assert_eq!((b.read(register::CONTEXTS, 4).unwrap(), b.read(register::STATUS, 4).unwrap()), (1024, 0));
    let ids: Vec<u64> = (0..3).map(|engine| b.read(register::ENGINE_TABLE + 16 * engine, 4).unwrap()).collect();
    assert_eq!(ids, [0, 1 << 16, 1]);
    let defaults: Vec<u64> = (0..3).map(|word| b.read(register::TUNABLES + 4 * word, 4).unwrap()).collect();
    assert_eq!(defaults, [1000, 640_000, 2_500_000]);
    // Set with privilege only, and read back.
    assert_eq!(b.write(register::TUNABLES + 4, 4, 5), Err(Errno::Perm));
    b.device.write_register(Caller::PRIVILEGED, register::TUNABLES + 4, &5u32.to_le_bytes()).unwrap();
    assert_eq!(b.read(register::TUNABLES + 4, 4).unwrap(), 5);
    let tuned = b.device.engines()[0];
    assert_eq!((tuned.id, tuned.tunables.preempt_timeout), (EngineId { class: 0, instance: 0 }, 5000));
    // No register, the wrong width, none of the second engine table entry, beyond everything.
    for (at, width) in
        [(0x30, 4), (0, 8), (0x18, 4), (0x430, 4), (0x830, 4), (0xc00, 4), (1, 4), (1 << 40, 8), (0x1_0000, 8)]
    {
        let refused = b.read(at, width).unwrap_err();
        assert!(matches!(refused.errno, Errno::Invalid | Errno::NoEntry), "{at:#x}: {refused}");
        assert!(b.write(at, width, 0).is_err(), "{at:#x}");
    }
    b.device.lose();
    assert_eq!(b.read(register::STATUS, 4).unwrap(), 1);
}

#[test]
fn commands_create_set_read_ask_and_destroy() {
    let mut b = Board::new();
    let context = b.create();
    b.memory.write(BUFFER, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]).unwrap();
    let map = |size| [context, size, param::ENGINES as u32, 0, BUFFER as u32, 0];
    b.command(command::SET_PARAM, &map(12)).unwrap();
    assert_eq!(b.command(command::GET_PARAM, &map(0)).unwrap()[3], 12, "the size comes back");
    assert_eq!(b.command(command::SET_PARAM, &map(9)), Err(Errno::Invalid));
    let spin = Descriptor::new(opcode::SPIN, WORD, 0, 0);
    let fence = b.device.submit(context, 0, &spin).unwrap();
    b.simulation.run_for(1_000_000);
    let ask = [fence.context, fence.slot, fence.seq as u32, 0];
    assert_eq!(b.command(command::FENCE, &ask).unwrap()[6..8], [0, 0]);
    assert_eq!(b.command(command::BUSY, &ask).unwrap()[6..8], [1, 0]);
    b.command(command::SET_PARAM, &[context, 0, param::PERSISTENCE as u32, 0, 0, 0]).unwrap();
    b.command(command::DESTROY, &[context]).unwrap();
    b.simulation.run_for(1_000_000);
    assert_eq!(b.command(command::FENCE, &ask).unwrap()[6..8], [2, Errno::Io.number().into()]);
    assert_eq!(b.command(command::DESTROY, &[context]), Err(Errno::NoEntry));
    assert_eq!(b.command(99, &[]), Err(Errno::Invalid));
    assert_eq!(b.write(register::COMMAND, 8, 0x10), Err(Errno::Fault));
    assert_eq!(b.read(register::RESULT, 4).unwrap(), u64::from(Errno::Fault.number()));
    b.migrate();
    assert_eq!(b.read(register::RESULT, 4).unwrap(), u64::from(Errno::Fault.number()), "registers move too");
    assert_eq!(b.read(register::CREATED, 4).unwrap(), u64::from(context));
}

#[test]
fn a_ring_is_taken_at_the_doorbell_and_refusals_get_their_records() {
    let mut b = Board::new();
    let context = b.create();
    let at = |register| doorbell(context, 1, register);
    b.write(at(slot_register::BASE), 8, RING).unwrap();
    b.write(at(slot_register::HEAD_ADDRESS), 8, HEAD).unwrap();
    assert_eq!(b.write(at(slot_register::ENTRIES), 4, 3), Err(Errno::Invalid));
    assert_eq!(b.write(at(slot_register::ENTRIES), 4, 8192), Err(Errno::Invalid));
    b.write(at(slot_register::ENTRIES), 4, 4).unwrap();
    assert_eq!(b.write(at(slot_register::TAIL), 4, 5), Err(Errno::Invalid), "more than it holds");
    // Round the ring several times, with a descriptor that is refused in each round.
    for round in 0..5u64 {
        for index in 0..4 {
            let number = round * 4 + index;
            let bad = index == 2;
            let d = add(number).flagged(if bad { 1 << 22 } else { flag::INTERRUPT });
            b.entry(number % 4, Descriptor { vector: number as u16, ..d });
        }
        b.write(at(slot_register::TAIL), 4, 4 * (round + 1)).unwrap();
        b.simulation.run_for(1_000_000);
        if round == 2 {
            b.migrate();
        }
    }
    assert_eq!(b.read(at(slot_register::HEAD), 4).unwrap(), 20);
    assert_eq!(b.read(at(slot_register::SUBMITTED), 8).unwrap(), 15);
    assert_eq!(b.read(at(slot_register::COMPLETED), 8).unwrap(), 15);
    let mut head = [0; 4];
    b.memory.read(HEAD, &mut head).unwrap();
    assert_eq!(u32::from_le_bytes(head), 20);
    for number in 0..20 {
        let record = b.record(number);
        let expected = if number % 4 == 2 { (status::FAILED, 22) } else { (status::DONE, 0) };
        assert_eq!((record.status, record.error, record.tag), (expected.0, expected.1, number as u32));
    }
    let expected: Vec<u16> = (0..20).filter(|number| number % 4 != 2).collect();
    assert_eq!(*b.raised.0.lock().unwrap(), expected);
    // A ring that lies nowhere: the submission is refused, and taken.
    b.write(at(slot_register::BASE), 8, 0xdead_0000).unwrap();
    b.write(at(slot_register::TAIL), 4, 21).unwrap();
    assert_eq!(b.read(at(slot_register::STATUS), 4).unwrap(), u64::from(Errno::Fault.number()));
    assert_eq!(b.read(at(slot_register::HEAD), 4).unwrap(), 21);
}

#[test]
fn a_full_slot_leaves_descriptors_in_the_ring_and_takes_them_later() {
    let mut b = Board::new();
    let context = b.create();
    let at = |register| doorbell(context, 0, register);
    let gate = Descriptor::new(opcode::SPIN, WORD + 8, 0, 0);
    b.device.submit(context, 0, &gate).unwrap();
    b.write(at(slot_register::BASE), 8, RING).unwrap();
    b.write(at(slot_register::ENTRIES), 4, 128).unwrap();
    (0..128).for_each(|index| b.entry(index, Descriptor { flags: 0, ..add(0) }));
    let mut tail = 0;
    while b.read(at(slot_register::HEAD), 4).unwrap() == tail {
        tail += 64;
        b.write(at(slot_register::TAIL), 4, tail).unwrap();
    }
    assert_eq!(b.read(at(slot_register::HEAD), 4).unwrap(), 1023, "1024 with the one that spins");
    assert_eq!(b.write(at(slot_register::BASE), 8, RING), Err(Errno::Busy), "not empty");
    b.migrate();
    b.memory.write(WORD + 8, &[1]).unwrap();
    b.simulation.run_for(1_000_000_000);
    assert_eq!(b.read(at(slot_register::HEAD), 4).unwrap(), tail);
    let mut sum = [0; 4];
    b.memory.read(WORD, &mut sum).unwrap();
    assert_eq!(u64::from(u32::from_le_bytes(sum)), tail, "each of them once");
}

#[test]
fn a_portal_takes_a_descriptor_whole_or_in_order_and_keeps_half_of_one_across_a_move() {
    let mut b = Board::new();
    let context = b.create();
    let at = portal(context, 1);
    b.device.write_register(Caller::PLAIN, at, &add(0).encode()).unwrap();
    let pieces: Vec<u64> = add(1).encode().as_chunks::<8>().0.iter().map(|piece| u64::from_le_bytes(*piece)).collect();
    for (index, piece) in pieces.iter().enumerate() {
        if index == 4 {
            b.migrate();
        }
        b.write(at + 8 * index as u64, 8, *piece).unwrap();
    }
    b.simulation.run_for(1_000_000);
    assert_eq!((b.record(0).status, b.record(1).status), (1, 1));
    // Out of order; then the first piece begins anew.
    b.write(at, 8, pieces[0]).unwrap();
    assert_eq!(b.write(at + 16, 8, pieces[2]), Err(Errno::Invalid));
    assert_eq!(b.write(at + 8, 4, 0), Err(Errno::Invalid));
    for (index, piece) in pieces.iter().enumerate() {
        b.write(at + 8 * index as u64, 8, *piece).unwrap();
    }
    b.simulation.run_for(1_000_000);
    assert_eq!(b.read(doorbell(context, 1, slot_register::COMPLETED), 8).unwrap(), 3);
    let bad = Descriptor { flags: 1 << 21, ..add(2) };
    assert!(b.device.write_register(Caller::PLAIN, at, &bad.encode()).is_err());
    assert_eq!(b.read(doorbell(context, 1, slot_register::STATUS), 4).unwrap(), 22);
    assert_eq!(b.write(portal(context, 9), 8, 0), Err(Errno::Invalid), "no such slot");
    assert_eq!(b.write(portal(context + 1, 0), 8, 0), Err(Errno::NoEntry), "no such context");
    b.write(doorbell(context, 0, slot_register::CLIENT), 8, 5).unwrap();
    assert_eq!(b.read(doorbell(context, 1, slot_register::CLIENT), 8).unwrap(), 5, "one for the context");
}

#[test]
fn a_completion_is_published_after_its_payload_is_in_the_dirty_log() {
    /// Memory that notes what was written and logged, in order.
    struct Watched(Arena, Mutex<Vec<(&'static str, u64)>>);
    impl AddressSpace for Watched {
        fn read(&self, at: u64, to: &mut [u8]) -> Result<(), wherry_accel::memory::Fault> {
            self.0.read(at, to)
        }
        fn write(&self, at: u64, from: &[u8]) -> Result<(), wherry_accel::memory::Fault> {
            self.0.write(at, from)?;
            assert!(from.is_empty() || self.0.take_dirty().contains(&(at / 4096)), "logged when the call returns");
            self.1.lock().unwrap().push(("write", at));
            Ok(())
        }
        fn copy(&self, from: u64, to: u64, bytes: u64) -> Result<(), wherry_accel::memory::Fault> {
            self.0.copy(from, to, bytes)?;
            assert!(self.0.take_dirty().contains(&(to / 4096)));
            self.1.lock().unwrap().push(("write", to));
            Ok(())
        }
        fn atomic(
            &self,
            at: u64,
            width: wherry_accel::memory::Width,
            operation: wherry_accel::memory::Atomic,
        ) -> Result<u64, wherry_accel::memory::Fault> {
            self.0.atomic(at, width, operation)
        }
        fn publish(&self, at: u64, value: u8) -> Result<(), wherry_accel::memory::Fault> {
            self.0.publish(at, value)?;
            assert!(self.0.take_dirty().contains(&(at / 4096)));
            self.1.lock().unwrap().push(("publish", at));
            Ok(())
        }
        fn check(
            &self,
            at: u64,
            bytes: u64,
            access: wherry_accel::memory::Access,
        ) -> Result<(), wherry_accel::memory::Fault> {
            self.0.check(at, bytes, access)
        }
    }
    let mut b = Board::new();
    let watched = Arc::new(Watched(Arena::new(&[(COMMAND, 0x1_0000)]).unwrap(), Mutex::default()));
    b.device.set_space(0, watched.clone());
    let context = b.create_on(&*watched);
    let d = Descriptor::new(opcode::MOVE, BUFFER, WORD, 8).completing_at(RECORDS);
    b.device.submit(context, 0, &d).unwrap();
    b.simulation.run_for(1_000_000);
    let order = watched.1.lock().unwrap().clone();
    assert_eq!(order[order.len() - 3..], [("write", WORD), ("write", RECORDS + 1), ("publish", RECORDS)]);
}

impl Board {
    /// A context made by a command in other memory.
    fn create_on(&self, memory: &dyn AddressSpace) -> u32 {
        memory.write(COMMAND, &command::CREATE.to_le_bytes()).unwrap();
        self.write(register::COMMAND, 8, COMMAND).unwrap();
        self.read(register::CREATED, 4).unwrap() as u32
    }
}

/// Where the client writes the tail, and behind it the word of a polled ring.
const TAIL: u64 = 0x1_8100;

/// A context whose slot 0 has a ring of eight with its tail in memory.
fn told(b: &Board, polled: bool) -> u32 {
    let context = b.create();
    b.memory.write(TAIL, &[0; 8]).unwrap();
    b.write(doorbell(context, 0, slot_register::BASE), 8, RING).unwrap();
    b.write(doorbell(context, 0, slot_register::ENTRIES), 4, 8).unwrap();
    b.write(doorbell(context, 0, slot_register::TAIL_ADDRESS), 8, TAIL | u64::from(polled)).unwrap();
    context
}

fn bell(context: u32) -> u64 {
    register::BELLS + register::BELL_BYTES * u64::from(context % 0x1_0000 % abi::BELLS)
}

#[test]
fn a_bell_has_the_device_look_at_tails_in_memory_and_no_other_bell_does() {
    let mut b = Board::new();
    let context = told(&b, false);
    assert_eq!(b.read(doorbell(context, 0, slot_register::TAIL_ADDRESS), 8).unwrap(), TAIL);
    for round in 0..5u32 {
        for n in 0..3u32 {
            let number = 3 * round + n;
            b.entry(u64::from(number % 8), add(number.into()));
        }
        b.memory.write(TAIL, &(3 * round + 3).to_le_bytes()).unwrap();
        b.write(bell(context + 1), 4, 1).unwrap();
        b.simulation.run_for(100_000);
        assert_eq!(b.read(doorbell(context, 0, slot_register::HEAD), 4).unwrap(), u64::from(3 * round));
        b.write(bell(context), 4, 1).unwrap();
        b.simulation.run_for(100_000);
        assert_eq!(b.read(doorbell(context, 0, slot_register::HEAD), 4).unwrap(), u64::from(3 * round + 3));
        assert_eq!(b.record(u64::from(3 * round + 2)).status, status::DONE);
        // What was put in while it stood still, and rung by nobody, is found when it goes on.
        b.migrate();
    }
    b.entry(15 % 8, add(15));
    b.memory.write(TAIL, &16u32.to_le_bytes()).unwrap();
    b.migrate();
    b.simulation.run_for(100_000);
    let mut word = [0; 4];
    b.memory.read(WORD, &mut word).unwrap();
    assert_eq!((b.record(15).status, u32::from_le_bytes(word)), (status::DONE, 16), "each was done once");
    // There are no others, and none that can be read.
    assert!(b.read(bell(context), 4).is_err());
    assert_eq!(b.write(register::BELLS + register::BELL_BYTES * u64::from(abi::BELLS), 4, 1), Err(Errno::Invalid));
    assert_eq!(b.write(bell(context) + 4, 4, 1), Err(Errno::Invalid));
}

#[test]
fn a_tail_in_memory_that_cannot_be_is_refused_and_the_next_good_one_is_taken() {
    let b = Board::new();
    let context = told(&b, true);
    let status = || b.read(doorbell(context, 0, slot_register::STATUS), 4).unwrap();
    let ring = |tail: u32| {
        b.memory.write(TAIL, &tail.to_le_bytes()).unwrap();
        b.write(bell(context), 4, 1).unwrap();
        (b.read(doorbell(context, 0, slot_register::TAIL), 4).unwrap(), status())
    };
    for n in 0..8 {
        b.entry(n, add(n));
    }
    let invalid = u64::from(Errno::Invalid.number());
    assert_eq!(ring(2), (2, 0));
    // Longer than the ring; back; far away.
    for bad in [11, 1, u32::MAX, 1 << 31] {
        assert_eq!(ring(bad), (2, invalid), "{bad}");
    }
    assert_eq!(ring(4), (4, 0));
    // Nowhere, and on no word.
    assert_eq!(b.write(doorbell(context, 0, slot_register::TAIL_ADDRESS), 8, TAIL + 2), Err(Errno::Invalid));
    b.write(doorbell(context, 0, slot_register::TAIL_ADDRESS), 8, 0x9000_0000).unwrap();
    b.write(bell(context), 4, 1).unwrap();
    assert_eq!(status(), u64::from(Errno::Fault.number()));
    // No address any more: the register alone counts.
    b.write(doorbell(context, 0, slot_register::TAIL_ADDRESS), 8, 0).unwrap();
    b.write(doorbell(context, 0, slot_register::TAIL), 4, 5).unwrap();
    assert_eq!(ring(7), (5, 0));
}

#[test]
fn a_place_in_a_ring_is_free_when_its_record_is_there_whoever_takes_descriptors() {
    // Real threads: one that rings all the time takes what another one puts in.
    let memory = Arc::new(Arena::new(&[(COMMAND, 0x1_0000)]).unwrap());
    let config = Config {
        catalogue: Catalogue::with_counts([2, 1, 0, 0, 0]).unwrap(),
        host: Host::uniform(2),
        clock: Arc::new(RealClock::default()),
        notify: Arc::new(Raised::default()),
        seed: 1,
    };
    let device = Arc::new(Device::new(config).unwrap());
    device.set_space(0, memory.clone());
    let _workers = Workers::start(device.clone()).unwrap();
    let clock = Arc::new(VirtualClock::default());
    let simulation = Simulation::new(device.clone(), clock);
    let b = Board { device: device.clone(), memory: memory.clone(), raised: Arc::default(), simulation };
    let context = told(&b, false);
    b.write(doorbell(context, 0, slot_register::ENTRIES), 4, 1).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                device.ring(context % abi::BELLS);
            }
        });
        let rounds = || {
            for round in 0..5000u32 {
                b.memory.write(RECORDS, &[0; 32]).unwrap();
                b.entry(0, add(0));
                b.memory.write(TAIL, &(round + 1).to_le_bytes()).unwrap();
                device.ring(context % abi::BELLS);
                let deadline = Instant::now() + Duration::from_secs(10);
                while b.record(0).status == 0 {
                    let status = b.read(doorbell(context, 0, slot_register::STATUS), 4).unwrap();
                    if Instant::now() > deadline || status != 0 {
                        return Err(format!("round {round}: the ring says {status}"));
                    }
                }
            }
            Ok(())
        };
        let result = rounds();
        over.store(true, Ordering::SeqCst);
        result.unwrap();
    });
}
