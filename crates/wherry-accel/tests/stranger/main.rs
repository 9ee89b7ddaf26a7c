//! A client nobody here wrote: [`raw`] and [`items`] know `docs/accel-abi.md` and nothing else. What it needs and does not find there
//! is missing in the document.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod items;
mod raw;

use std::sync::Arc;

use raw::{Bus, Raw};
use wherry_accel::catalogue::{Catalogue, Host};
use wherry_accel::clock::VirtualClock;
use wherry_accel::device::{Caller, Config, Device, NoInterrupts};
use wherry_accel::drive::Simulation;
use wherry_accel::keys::{FleetKey, KeyKind};
use wherry_accel::memory::{AddressSpace, Arena};

const BASE: u64 = 0x10_0000;
const BYTES: u64 = 1 << 20;

/// The library on virtual time, as a bus.
struct Board {
    device: Arc<Device>,
    memory: Arc<Arena>,
    simulation: Simulation,
}

impl Bus for Board {
    fn read(&mut self, at: u64, width: usize) -> Option<u64> {
        let mut bytes = [0; 8];
        self.device.read_register(at, &mut bytes[..width]).ok().map(|()| u64::from_le_bytes(bytes))
    }

    fn write(&mut self, at: u64, bytes: &[u8]) {
        // On a bus a write that is refused is lost.
        let _ = self.device.write_register(Caller::PLAIN, at, bytes);
    }

    fn peek(&mut self, at: u64, to: &mut [u8]) {
        self.memory.read(at, to).unwrap();
    }

    fn poke(&mut self, at: u64, from: &[u8]) {
        self.memory.write(at, from).unwrap();
    }

    fn pass(&mut self) {
        self.simulation.run_for(100_000);
    }
}

fn client() -> Raw<Board> {
    let clock = Arc::new(VirtualClock::default());
    let config = Config {
        catalogue: Catalogue::with_counts([2, 1, 1, 1, 1]).unwrap(),
        host: Host::uniform(2),
        clock: clock.clone(),
        notify: Arc::new(NoInterrupts),
        seed: 1,
    };
    let device = Arc::new(Device::new(config).unwrap());
    let memory = Arc::new(Arena::new(&[(BASE, BYTES)]).unwrap());
    device.set_space(0, memory.clone());
    let fleet = FleetKey::new([1; 32]);
    for (handle, kind) in [(1, KeyKind::Aes256Gcm), (2, KeyKind::ChaCha20Poly1305), (3, KeyKind::HmacSha256)] {
        device.keys().import(&fleet, handle, kind, &fleet.wrap(handle, kind, &[0; 32]).unwrap()).unwrap();
    }
    let simulation = Simulation::new(device.clone(), clock);
    Raw::new(Board { device, memory, simulation }, BASE, BYTES)
}

macro_rules! items {
    ($($item:ident)*) => {
        $(#[test]
        fn $item() {
            items::$item(&mut client());
        })*
    };
}

items! {
    the_device_says_what_it_is
    contexts_are_made_set_read_cloned_and_destroyed
    operations_of_every_class_run
    submissions_go_by_portal_by_ring_and_in_batches_with_fences
    words_that_an_operation_does_not_use_must_be_zero
}
