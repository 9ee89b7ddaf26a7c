//! The table of devices: short to hold, also for vCPUs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use wherry_passthrough::{Function, Owner};
use wherry_pci::FunctionAddress;

use crate::hotplug::EjectHandler;
use crate::pci::PciRoot;
use crate::vm::virtio::Occupant;

/// Command register of a function: it decodes nothing and is no bus master if it is 0.
const COMMAND: u16 = 4;

/// Where a device stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// The guest has it.
    Present,
    /// The guest was asked to let it go, and somebody waits for that.
    Unplugging,
    /// The guest has let it go; it is being taken away, or waits for the end of a journey.
    Ejected,
}

/// A device of a machine on the PCI bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceStatus {
    /// Tells it from all others that machines have had in this process.
    pub number: u64,
    /// What it is called, such as `vfio-user0`.
    pub name: String,
    /// What it is, such as `vfio-user`.
    pub kind: String,
    /// Where it is.
    pub address: FunctionAddress,
    /// What it is connected to on this host.
    pub label: String,
    /// Where it stands.
    pub state: DeviceState,
    /// It can be unplugged.
    pub removable: bool,
}

pub(super) struct Entry {
    pub(super) number: u64,
    pub(super) occupant: Occupant,
    pub(super) state: DeviceState,
    pub(super) removable: bool,
}

#[derive(Default)]
pub(super) struct Table {
    pub(super) entries: Vec<Entry>,
    /// Slots that were ejected, a bit for each, which nobody has taken up yet.
    pub(super) ejected: u32,
    /// How many handles hold the board.
    pub(super) held: u32,
    pub(super) quit: bool,
    /// Whoever owns the device that is being taken away.
    pub(super) leaving: Option<Arc<dyn Owner>>,
}

/// How many devices machines of this process have had.
static DEVICES: AtomicU64 = AtomicU64::new(0);

/// The devices, and who waits for a change of them.
pub(in crate::vm) struct Signal {
    table: Mutex<Table>,
    pub(super) changed: Condvar,
}

impl Signal {
    pub(in crate::vm) fn new(occupants: Vec<Occupant>) -> Arc<Self> {
        let signal = Arc::new(Self { table: Mutex::default(), changed: Condvar::new() });
        for occupant in occupants {
            signal.lock().insert(occupant);
        }
        signal
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wait<'a>(&self, table: MutexGuard<'a, Table>, deadline: Instant) -> MutexGuard<'a, Table> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.changed.wait_timeout(table, left).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Hides what the guest ejects, and notes it for the thread.
    pub(in crate::vm) fn eject_handler(self: &Arc<Self>, pci: &Arc<PciRoot>) -> EjectHandler {
        let (signal, pci) = (self.clone(), pci.clone());
        Arc::new(move |slots| {
            for slot in (1..32u8).filter(|slot| slots & 1 << slot != 0) {
                let Some(function) = pci.hide(slot) else { continue };
                let mut command = [0; 2];
                function.read_config(COMMAND, &mut command);
                // In a machine that arrives with it, it was switched off before.
                if command != [0; 2] {
                    function.write_config(COMMAND, &[0; 2]);
                }
            }
            let mut table = signal.lock();
            table.ejected |= slots;
            for entry in table.entries.iter_mut().filter(|entry| slots & entry.bit() != 0) {
                entry.state = DeviceState::Ejected;
            }
            signal.changed.notify_all();
        })
    }
}

impl Table {
    pub(super) fn insert(&mut self, occupant: Occupant) -> &Entry {
        let removable = occupant.plugged.is_some();
        let number = DEVICES.fetch_add(1, Ordering::Relaxed) + 1;
        let entry = Entry { number, occupant, state: DeviceState::Present, removable };
        self.entries.push(entry);
        &self.entries[self.entries.len() - 1]
    }

    /// Those whose guest was asked to let them go: neither the machine nor its process can be moved now.
    pub(super) fn leaving_devices(&self) -> impl Iterator<Item = String> + '_ {
        self.entries.iter().filter(|entry| entry.state == DeviceState::Unplugging).map(|entry| {
            format!("{} is being unplugged: wait until it is gone, or the time for it is over", entry.name())
        })
    }

    pub(super) fn functions(&self) -> impl Iterator<Item = &Arc<Function>> {
        self.entries.iter().filter_map(|entry| entry.occupant.plugged.as_ref()).map(|plugged| &plugged.function)
    }
}

impl Entry {
    pub(super) fn bit(&self) -> u32 {
        1 << self.occupant.address.device()
    }

    pub(super) fn name(&self) -> String {
        self.occupant.description.name()
    }

    pub(super) fn status(&self) -> DeviceStatus {
        let description = &self.occupant.description;
        DeviceStatus {
            number: self.number,
            name: self.name(),
            kind: description.kind.clone(),
            address: self.occupant.address,
            label: description.label.clone(),
            state: self.state,
            removable: self.removable,
        }
    }
}
