//! Descriptors of the accelerator, from any bytes: the first two choose a class and whether addresses are brought into
//! memory that is there; every 64 that follow are a descriptor of a batch, and the last ones are submitted on their own. The
//! device runs them on virtual time: none panics, and what is no memory of the client's to write stays as it was.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use wherry_accel::abi::{DESCRIPTOR_BYTES, Descriptor, opcode};
use wherry_accel::catalogue::{Catalogue, EngineId, Host};
use wherry_accel::clock::VirtualClock;
use wherry_accel::device::{Caller, Config, Device, NoInterrupts};
use wherry_accel::drive::Simulation;
use wherry_accel::memory::{AddressSpace, Arena};

const BASE: u64 = 0x1_0000;
const BYTES: u64 = 0x8000;
/// A page that can only be read.
const FIXED: u64 = BASE + BYTES;
/// Virtual time for all of it.
const TIME: u64 = 3_000_000;
/// No step takes longer in virtual time: one that is under way ends within it.
const STEP: u64 = 100_000_000;

fn into_memory(address: u64) -> u64 {
    BASE + address % (BYTES + 0x1000)
}

fuzz_target!(|bytes: &[u8]| {
    let [class, mode, rest @ ..] = bytes else {
        return;
    };
    let clock = Arc::new(VirtualClock::default());
    let engine = EngineId { class: u16::from(class % 5), instance: 0 };
    let config = Config {
        catalogue: Catalogue::new(vec![engine]).expect("one engine"),
        host: Host::uniform(1),
        clock: clock.clone(),
        notify: Arc::new(NoInterrupts),
        seed: 1,
    };
    let device = Arc::new(Device::new(config).expect("a device"));
    let mut memory = Arena::new(&[(BASE, BYTES)]).expect("memory");
    memory.map(FIXED, 0x1000, true).expect("memory");
    memory.write(FIXED, &[0x5a; 0x1000]).expect("it is there");
    memory.set_writable(FIXED, false);
    let room = (BYTES as usize).min(rest.len());
    memory.write(BASE, &rest[..room]).expect("it fits");
    let memory = Arc::new(memory);
    device.set_space(0, memory.clone());
    let context = device.create_context(Caller::PLAIN, 0, 0).expect("a context");
    let mut simulation = Simulation::new(device.clone(), clock);

    let (whole, _) = rest.as_chunks::<DESCRIPTOR_BYTES>();
    let descriptors: Vec<Descriptor> = whole.iter().take(32).filter_map(|b| Descriptor::decode(b).ok()).collect();
    for mut d in descriptors {
        if mode & 1 == 1 {
            d.source = into_memory(d.source);
            d.destination = into_memory(d.destination);
            d.completion = into_memory(d.completion);
            d.size %= 0x4000;
        }
        let _ = device.submit(context, 0, &d);
        simulation.run_for(TIME / 32);
    }
    let list = Descriptor::new(opcode::BATCH, BASE, 0, (room / DESCRIPTOR_BYTES) as u32);
    let _ = device.submit(context, 0, &list);
    simulation.run_for(TIME);
    let mut fixed = [0; 0x1000];
    memory.read(FIXED, &mut fixed).expect("it is there");
    assert_eq!(fixed, [0x5a; 0x1000], "memory that is read only was written");
    device.lose();
    assert!(simulation.run_until(STEP, || device.is_idle()), "a lost device has work left");
});
