//! The console device (section 5.3): one port, whose other end is a socket, a pseudo-terminal or a file of this host.
//!
//! - [`Console`] is the device; `bytes` is what its thread does with input and output.
//! - [`Outside`] is the other end.
//!
//! Nothing is lost on the way, and nothing is there twice. Input that the guest has not taken, and output that the outside
//! has not taken, wait here and move with the guest. While somebody listens who takes no more, output waits in the guest's
//! buffers. Drivers spin until what they write is taken, so a console without anybody who listens must not hold its guest
//! up: then the newest output is kept, for whoever comes, and the oldest goes.

mod bytes;
mod outside;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wherry_state::{SavedState, Section, UnitError, UnitId};

use self::bytes::{Bytes, MOST_INPUT, MOST_OUTPUT};
pub use self::outside::{ConsoleTarget, Outside, OutsideError};
use crate::device::{Activation, Device, Kind, Serving};
use crate::ring::RING_FEATURES;
use crate::saved::{SavedConsole, SavedTransport};
use crate::worker::Worker;

const KIND: Kind = Kind { id: 3, name: "virtio-console", class: [7, 0x80, 0] };
/// The ring of what the guest receives, and of what it transmits.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// What waits between guest and outside.
#[derive(Debug, Default)]
struct Held {
    /// Came from outside, and the guest has not taken it.
    input: VecDeque<u8>,
    /// Came from the guest, and the outside has not taken it.
    output: VecDeque<u8>,
    /// Bytes of the guest's next buffer that were taken already.
    begun: u32,
}

/// What device and thread share.
#[derive(Default)]
struct Shared {
    held: Mutex<Held>,
    /// What waits was saved: it belongs to whoever restores it, unless the device is started again. Or it will be restored, and is
    /// still another process's.
    given: AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The device.
pub struct Console {
    worker: Worker,
    shared: Arc<Shared>,
    instance: u32,
}

impl Console {
    /// A device with this at its other end; `instance` as that of its transport.
    pub fn new(outside: Arc<Outside>, instance: u32) -> io::Result<Self> {
        let elsewhere = outside.is_elsewhere();
        let shared = Arc::new(Shared { given: elsewhere.into(), ..Shared::default() });
        let bytes = Bytes::new(outside, shared.clone())?;
        let worker = Worker::spawn(format!("virtio-con-{instance}"), bytes)?;
        if elsewhere {
            // It rests until it is started.
            worker.quiesce();
        }
        Ok(Self { worker, shared, instance })
    }
}

impl Device for Console {
    fn kind(&self) -> Kind {
        KIND
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn ring_sizes(&self) -> &[u16] {
        &[64, 64]
    }

    /// Size and number of ports, which are not offered.
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
        self.shared.given.store(false, Ordering::Release);
        self.worker.start();
    }

    /// Interrupts go through the transport, which looks each time.
    fn vector_changed(&self, _ring: u16) {}

    fn schema(&self) -> u32 {
        SavedConsole::SCHEMA
    }

    fn save(&self, transport: SavedTransport) -> Section {
        self.shared.given.store(true, Ordering::Release);
        let held = self.shared.lock();
        let saved = SavedConsole {
            transport: Some(transport),
            input: held.input.iter().copied().collect(),
            output: held.output.iter().copied().collect(),
            begun: held.begun,
        };
        saved.to_section(&UnitId::new(KIND.name, self.instance))
    }

    fn restore(&self, section: &Section) -> Result<SavedTransport, UnitError> {
        let saved = SavedConsole::from_section(section)?;
        for (what, len, most) in [("input", saved.input.len(), MOST_INPUT), ("output", saved.output.len(), MOST_OUTPUT)]
        {
            if len > most {
                return Err(UnitError::failed(format!("{len} bytes of waiting {what}; at most {most} can wait")));
            }
        }
        let (input, output) = (saved.input.into(), saved.output.into());
        *self.shared.lock() = Held { input, output, begun: saved.begun };
        saved.transport.ok_or_else(|| UnitError::failed("there is no state of its transport"))
    }
}
