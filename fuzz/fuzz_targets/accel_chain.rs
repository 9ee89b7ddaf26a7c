//! Engine maps and extension chains, from any bytes: they are the client's memory, and the first one says whether a context is
//! created from them or a map set. A refusal leaves nothing behind; a map that is taken reads back, and what was read
//! makes the same map again.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use wherry_accel::abi::{Descriptor, opcode, param};
use wherry_accel::catalogue::{Catalogue, Host};
use wherry_accel::clock::VirtualClock;
use wherry_accel::device::{Caller, Config, Device, NoInterrupts, Param};
use wherry_accel::drive::Simulation;
use wherry_accel::memory::{AddressSpace, Arena};

const BASE: u64 = 0x1000;
const BYTES: u64 = 0x2000;
/// Where maps are read back to.
const BACK: u64 = 0x1_0000;

fuzz_target!(|bytes: &[u8]| {
    let [kind, size, rest @ ..] = bytes else {
        return;
    };
    let clock = Arc::new(VirtualClock::default());
    let config = Config {
        catalogue: Catalogue::with_counts([4, 2, 2, 2, 1]).expect("engines"),
        host: Host::uniform(3),
        clock: clock.clone(),
        notify: Arc::new(NoInterrupts),
        seed: 1,
    };
    let device = Arc::new(Device::new(config).expect("a device"));
    let memory = Arc::new(Arena::new(&[(BASE, BYTES), (BACK, 0x1000)]).expect("memory"));
    memory.write(BASE, &rest[..rest.len().min(BYTES as usize)]).expect("it fits");
    device.set_space(0, memory.clone());
    let source = device.create_context(Caller::PLAIN, 0, 0).expect("a context");
    let mut simulation = Simulation::new(device.clone(), clock);
    let context = if kind & 1 == 0 {
        let Ok(context) = device.create_context(Caller::PRIVILEGED, u32::from(kind >> 1 & 1), BASE) else {
            assert_eq!(device.contexts().len(), 1, "a refused context was left behind");
            return;
        };
        context
    } else {
        let before = device.contexts();
        let set = Param { context: source, size: u32::from(*size), param: param::ENGINES, value: BASE };
        if device.set_param(Caller::PLAIN, &set).is_err() {
            assert_eq!(device.contexts(), before, "a refused map was left behind");
            return;
        }
        source
    };
    let mut get = Param { context, size: 0, param: param::ENGINES, value: BACK };
    device.get_param(&mut get).expect("the size of a map");
    let info = |id: u32| device.contexts().into_iter().find(|info| info.id == id).expect("it is open");
    if get.size > 0 {
        device.get_param(&mut get).expect("a map reads back");
        let slots = (get.size - 8) / 4;
        assert_eq!(info(context).slots.len(), slots as usize);
    }
    for slot in 0..info(context).slots.len() as u32 {
        let _ = device.submit(context, slot, &Descriptor::new(opcode::NOP, 0, 0, 0));
    }
    simulation.run_for(5_000_000);
    for slot in info(context).slots {
        assert_eq!(slot.submitted, slot.completed, "an empty request of {} did not end", slot.what);
    }
    // A clone of it is the same, and so is what is left when both are gone.
    let mut node = [0; 48];
    node[8..12].copy_from_slice(&1u32.to_le_bytes());
    node[32..36].copy_from_slice(&context.to_le_bytes());
    node[36..40].copy_from_slice(&1u32.to_le_bytes());
    memory.write(BACK, &node).expect("it fits");
    let clone = device.create_context(Caller::PLAIN, 0, BACK).expect("a clone of what was taken");
    let what = |id: u32| info(id).slots.into_iter().map(|slot| slot.what).collect::<Vec<_>>();
    assert_eq!(what(clone), what(context));
});
