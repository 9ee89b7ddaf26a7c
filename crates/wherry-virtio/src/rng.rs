//! The entropy device (section 5.4): gives the guest random bytes of the host.

use std::io;
use std::os::fd::RawFd;

use wherry_state::{SavedState, Section, UnitError, UnitId};

use crate::chain::Broken;
use crate::device::{Activation, Device, Kind, Serving};
use crate::ring::{RING_FEATURES, Ring};
use crate::saved::{SavedRng, SavedTransport};
use crate::worker::{Handler, Worker};

const KIND: Kind = Kind { id: 4, name: "virtio-rng", class: [0xff, 0, 0] };
/// The most bytes given at once: a guest that asks for more is given fewer, and asks again.
const MOST: usize = 64 << 10;

/// The device.
pub struct Rng {
    worker: Worker,
    instance: u32,
}

impl Rng {
    /// A device; `instance` as that of its transport.
    pub fn new(instance: u32) -> io::Result<Self> {
        Ok(Self { worker: Worker::spawn(format!("virtio-rng-{instance}"), Source)?, instance })
    }
}

struct Source;

impl Handler for Source {
    fn begin(&mut self, _rings: &mut [Ring], _features: u64) -> Result<(), Broken> {
        Ok(())
    }

    fn serve(&mut self, rings: &mut [Ring]) -> Result<(), Broken> {
        for ring in rings {
            while let Some(chain) = ring.pop()? {
                if chain.writable.is_empty() {
                    return Err(Broken::Request("a request for random bytes without room for them"));
                }
                let mut bytes = vec![0; (chain.writable.len() as usize).min(MOST)];
                let got = random(&mut bytes);
                let written = chain.writable.write(ring.memory(), &bytes[..got]);
                ring.push(chain.head, written as u32)?;
            }
        }
        Ok(())
    }

    fn reap(&mut self, _rings: &mut [Ring]) -> Result<(), Broken> {
        Ok(())
    }

    fn waits(&self, _ring: u16) -> bool {
        true
    }

    fn has_room(&self) -> bool {
        true
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn event(&self) -> Option<RawFd> {
        None
    }

    fn cancel(&mut self) {}

    fn settle(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn forget(&mut self) {}
}

/// Fills the buffer from the kernel's generator; how many bytes it gave.
fn random(into: &mut [u8]) -> usize {
    let mut done = 0;
    while done < into.len() {
        match rustix::rand::getrandom(&mut into[done..], rustix::rand::GetRandomFlags::empty()) {
            Ok(got) => done += got,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => break,
        }
    }
    done
}

impl Device for Rng {
    fn kind(&self) -> Kind {
        KIND
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn ring_sizes(&self) -> &[u16] {
        &[64]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    fn activate(&self, activation: Activation) -> Result<(), UnitError> {
        self.worker.activate(activation);
        Ok(())
    }

    fn reset(&self) {
        self.worker.reset();
    }

    fn serving(&self) -> &dyn Serving {
        &self.worker
    }

    fn start(&self) {
        self.worker.start();
    }

    /// Interrupts go through the transport, which looks each time.
    fn vector_changed(&self, _ring: u16) {}

    fn schema(&self) -> u32 {
        SavedRng::SCHEMA
    }

    fn save(&self, transport: SavedTransport) -> Section {
        SavedRng { transport: Some(transport) }.to_section(&UnitId::new(KIND.name, self.instance))
    }

    fn restore(&self, section: &Section) -> Result<SavedTransport, UnitError> {
        SavedRng::from_section(section)?
            .transport
            .ok_or_else(|| UnitError::failed("there is no state of its transport"))
    }
}
