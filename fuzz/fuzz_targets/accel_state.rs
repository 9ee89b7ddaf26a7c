//! Saved state of an accelerator, from any bytes: refused, or taken; then what it saves is what another device takes and
//! saves alike, and it goes on without a panic.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use wherry_accel::catalogue::{Catalogue, EngineId, Host};
use wherry_accel::clock::VirtualClock;
use wherry_accel::device::{Config, Device, NoInterrupts};
use wherry_accel::drive::Simulation;
use wherry_accel::keys::FleetKey;
use wherry_accel::memory::Arena;
use wherry_accel::state::AccelUnit;
use wherry_state::{Saved, Section, StateUnit};

/// The engines of the golden files, which are the seeds.
fn catalogue() -> Catalogue {
    let engine = |class, instance| EngineId { class, instance };
    Catalogue::new(vec![engine(0, 0), engine(0, 1), engine(3, 0)]).expect("engines")
}

fn device(workers: usize) -> (Arc<Device>, Simulation, AccelUnit) {
    let clock = Arc::new(VirtualClock::default());
    let config = Config {
        catalogue: catalogue(),
        host: Host::uniform(workers),
        clock: clock.clone(),
        notify: Arc::new(NoInterrupts),
        seed: 1,
    };
    let device = Arc::new(Device::new(config).expect("a device"));
    let memory = Arc::new(Arena::new(&[(0x1000, 0x8000)]).expect("memory"));
    for space in 0..8 {
        device.set_space(space, memory.clone());
    }
    let unit = AccelUnit::new(device.clone(), Some(FleetKey::new([1; 32])), 0);
    (device.clone(), Simulation::new(device, clock), unit)
}

fn save(unit: &AccelUnit) -> Section {
    match unit.save() {
        Ok(Saved::Section(section)) => section,
        other => panic!("a device that took its state does not save it: {other:?}"),
    }
}

fuzz_target!(|bytes: &[u8]| {
    let section = Section { unit: "accel".into(), instance: 0, schema: 1, bytes: bytes.to_vec() };
    let (_device, mut simulation, unit) = device(2);
    if unit.restore(&section).is_err() {
        return;
    }
    let saved = save(&unit);
    let (_other, _, second) = device(1);
    second.restore(&saved).expect("what a device saves is what it takes");
    assert!(save(&second).bytes == saved.bytes, "it saves otherwise than it was saved");
    unit.start().expect("it starts");
    simulation.run_for(2_000_000);
});
