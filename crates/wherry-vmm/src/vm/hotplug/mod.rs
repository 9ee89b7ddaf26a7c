//! Devices that come and go while the machine lives.
//!
//! - [`Signal`]: the table of devices. vCPUs note in it what the guest has ejected.
//! - [`Board`]: plugs, asks for a device back, and takes away what was ejected.
//! - [`Held`]: while it lives nothing comes or goes: a journey has such a handle, because what it has described must stay.
//!
//! ```text
//!   plug --> present --unplug--> unplugging --guest ejects--> ejected --thread `hotplug`--> gone
//!               |  ^------ the time is over -----'               ^
//!               '---------- the guest ejects by itself ----------'
//! ```
//!
//! An ejected device is hidden from the guest at once, decodes nothing and is no bus master. The thread takes it away: its
//! memory, its place, its owner. While a journey holds the board the device waits, hidden, and moves along so; whoever has the
//! machine in the end takes it away.
//!
//! Locks: `changing` is held while a device comes or goes, which asks its owner and can take seconds; `Signal`'s and `live` are
//! held for a moment only, and nothing is locked under them but the registers of [`PciHotplug`].

mod error;
mod table;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use wherry_interrupt::Input;
use wherry_memory::DirtySource;
use wherry_passthrough::vfio::VfioHost;
use wherry_passthrough::{Function, FunctionIdentity, Gathering, GiveBack, PassthroughParts};
use wherry_state::{StateStream, StateUnit, Units, UnitsError};

pub use self::error::{PlugError, UnplugError};
use self::table::Entry;
pub(super) use self::table::Signal;
pub use self::table::{DeviceState, DeviceStatus};
use super::passthrough::{Plugged, connect, describe};
use super::virtio::Occupant;
use crate::config::FunctionSource;
use crate::description::{DeviceDescription, Place};
use crate::hotplug::PciHotplug;
use crate::pci::PciRoot;

/// How long taking away a device may take that the guest has let go: its process has a deadline for each request.
const LEAVE_LIMIT: Duration = Duration::from_secs(60);

/// Whether a device with this label is the function that is there.
fn is_same(label: &str, source: &FunctionSource) -> bool {
    let (one, other) = match source {
        FunctionSource::Vfio(address) => return label == address.to_string(),
        FunctionSource::VfioUser(socket) => (Path::new(label), socket),
    };
    one == other || matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}

/// What a board is made of.
pub(in crate::vm) struct Slots {
    pub(super) signal: Arc<Signal>,
    /// Absent in a machine that was started by a Wherry without it.
    pub(super) controller: Option<Arc<PciHotplug>>,
    pub(super) pci: Arc<PciRoot>,
    pub(super) parts: PassthroughParts,
    /// It has a balloon.
    pub(super) balloon: bool,
    /// The functions of this host that it uses.
    pub(super) host: Arc<VfioHost>,
    /// Where the board is found by whoever hears that a function is wanted back.
    pub(super) wanted: Arc<Wanted>,
}

/// What a machine has whatever is plugged. Units of functions stand between the two lists.
pub(super) struct Fixed {
    pub(super) before: Vec<Arc<dyn StateUnit>>,
    pub(super) after: Vec<Arc<dyn StateUnit>>,
    pub(super) dirty_sources: Vec<Arc<dyn DirtySource>>,
}

/// What a machine has now.
struct Live {
    units: Arc<Units>,
    dirty_sources: Arc<[Arc<dyn DirtySource>]>,
}

/// See the module.
pub(super) struct Board {
    slots: Slots,
    fixed: Fixed,
    gathering: Arc<Gathering>,
    live: RwLock<Live>,
    changing: Mutex<()>,
}

/// A function that is made, and not on the bus yet. Nothing else comes or goes meanwhile.
pub(super) struct Prepared<'a> {
    _changing: MutexGuard<'a, ()>,
    occupant: Occupant,
    plugged: Plugged,
    live: Live,
}

impl Board {
    pub(super) fn new(slots: Slots, fixed: Fixed) -> Result<Arc<Self>, UnitsError> {
        let gathering = Arc::new(Gathering::new(slots.parts.crew.clone()));
        let functions: Vec<_> = slots.signal.lock().functions().cloned().collect();
        let live = live(&fixed, &gathering, &functions)?;
        if let Some(controller) = &slots.controller {
            let table = slots.signal.lock();
            for entry in table.entries.iter().filter(|entry| entry.removable) {
                controller.allow(entry.occupant.address.device());
            }
        }
        let wanted = slots.wanted.clone();
        let this = Arc::new(Self { slots, fixed, gathering, live: RwLock::new(live), changing: Mutex::default() });
        // It is set once: this is the only board of the machine.
        let _ = wanted.0.set(Arc::downgrade(&this));
        Ok(this)
    }

    /// The state units, as long as nothing comes or goes.
    pub(super) fn units(&self) -> Arc<Units> {
        self.live.read().unwrap_or_else(PoisonError::into_inner).units.clone()
    }

    /// The dirty sources, as long as nothing comes or goes.
    pub(super) fn dirty_sources(&self) -> Arc<[Arc<dyn DirtySource>]> {
        self.live.read().unwrap_or_else(PoisonError::into_inner).dirty_sources.clone()
    }

    /// Units whose state goes in streams: all functions, as long as nothing comes or goes.
    pub(super) fn streams(&self) -> Vec<Arc<dyn StateStream>> {
        let table = self.slots.signal.lock();
        table.functions().map(|function| function.clone() as Arc<dyn StateStream>).collect()
    }

    /// Slots that are free, or whose devices can go.
    pub(super) fn changeable(&self) -> u32 {
        let table = self.slots.signal.lock();
        let stay = table.entries.iter().filter(|entry| !entry.removable);
        stay.fold(!1, |slots, entry| slots & !entry.bit())
    }

    /// The devices in the order in which they came: that is how a destination is given its own.
    pub(super) fn descriptions(&self) -> Vec<DeviceDescription> {
        self.slots.signal.lock().entries.iter().map(|entry| entry.occupant.description.clone()).collect()
    }

    /// The devices as they stand.
    pub(super) fn statuses(&self) -> Vec<DeviceStatus> {
        self.slots.signal.lock().entries.iter().map(Entry::status).collect()
    }

    /// Why the machine cannot be moved, if so.
    pub(super) fn blockers(&self) -> Vec<String> {
        let table = self.slots.signal.lock();
        table.leaving_devices().chain(table.functions().filter_map(|function| function.blocker())).collect()
    }

    /// What of it cannot be kept over an update.
    pub(super) fn cannot_keep(&self) -> Vec<String> {
        let table = self.slots.signal.lock();
        let functions = table.functions().filter_map(|function| function.cannot_keep());
        table.leaving_devices().chain(functions).collect()
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_live(&self, live: Live) {
        // The units that are replaced are dropped outside of the lock.
        let _before = std::mem::replace(&mut *self.live.write().unwrap_or_else(PoisonError::into_inner), live);
    }

    /// Nothing comes or goes until the handle is dropped. Waits for what is under way.
    pub(super) fn hold(self: &Arc<Self>) -> Held {
        loop {
            let changing = self.changing();
            let mut table = self.slots.signal.lock();
            if table.ejected == 0 || table.held > 0 || table.quit {
                table.held += 1;
                drop(table);
                drop(changing);
                return Held(self.clone());
            }
            // The thread takes it up.
            drop(changing);
            drop(self.slots.signal.wait(table, Instant::now() + LEAVE_LIMIT));
        }
    }

    /// Makes a function that is there, with all it needs but its place on the bus.
    pub(super) fn prepare(&self, source: &FunctionSource) -> Result<Prepared<'_>, PlugError> {
        let Slots { signal, controller, pci, parts, balloon, host, .. } = &self.slots;
        if controller.is_none() {
            return Err(PlugError::NoHotplug);
        }
        let changing = self.changing();
        let (functions, instance) = {
            let table = signal.lock();
            if table.quit {
                return Err(PlugError::Ended);
            }
            if table.held > 0 {
                return Err(PlugError::Held);
            }
            let ours: Vec<_> = table.entries.iter().map(|entry| &entry.occupant.description).collect();
            let ours = || ours.iter().filter(|description| description.kind == source.kind());
            if let Some(other) = ours().find(|other| is_same(&other.label, source)) {
                return Err(PlugError::Taken { name: other.name(), at: source.to_string() });
            }
            let taken: Vec<_> = ours().filter_map(|description| Some(description.place?.instance)).collect();
            let instance = (0..).find(|instance| !taken.contains(instance)).unwrap_or_default();
            (table.functions().cloned().collect::<Vec<_>>(), instance)
        };
        if *balloon {
            return Err(PlugError::Balloon);
        }
        let address = pci.free_device()?;
        let owner = connect(source, host)?;
        let identity = FunctionIdentity::of(owner.facts());
        let slot = u32::from(address.device());
        let description = DeviceDescription { place: Some(Place { slot, instance }), ..describe(&*owner, &identity) };
        let pin_input = Input(PciRoot::interrupt_input(address.device(), 1));
        let parts = PassthroughParts { pin_input, ..parts.clone() };
        let plugged = Plugged::make(owner, instance, pci, &parts)?;
        let functions = functions.iter().chain([&plugged.function]);
        let live = match live(&self.fixed, &self.gathering, functions) {
            Ok(live) => live,
            Err(error) => {
                pci.release_bars(plugged.bars);
                return Err(error.into());
            }
        };
        let occupant = Occupant { description, address, plugged: None };
        Ok(Prepared { _changing: changing, occupant, plugged, live })
    }

    /// Puts it on the bus and tells the guest. `started`: the machine's units have been started.
    pub(super) fn insert(&self, prepared: Prepared<'_>, started: bool) -> Result<DeviceStatus, PlugError> {
        let Slots { signal, controller, pci, .. } = &self.slots;
        let Prepared { _changing, mut occupant, plugged, live } = prepared;
        let address = occupant.address;
        let added = match started {
            true => plugged.function.start().map_err(PlugError::Start),
            false => Ok(()),
        };
        if let Err(error) = added.and_then(|()| Ok(pci.add(address, plugged.function.clone())?)) {
            pci.release_bars(plugged.bars);
            return Err(error);
        }
        self.set_live(live);
        occupant.plugged = Some(plugged);
        let status = signal.lock().insert(occupant).status();
        if let Some(controller) = controller {
            controller.plugged(address.device());
        }
        signal.changed.notify_all();
        tracing::info!(device = status.name, %address, at = status.label, "plugged");
        Ok(status)
    }

    /// Asks the guest to let a device go. What comes of it is waited for with the handle.
    pub(super) fn ask(self: &Arc<Self>, name: &str) -> Result<Unplugging, UnplugError> {
        let mut table = self.slots.signal.lock();
        let held = table.held > 0;
        let Some(entry) = table.entries.iter_mut().find(|entry| entry.name() == name) else {
            let there = table.entries.iter().filter(|entry| entry.removable).map(Entry::name).collect();
            return Err(UnplugError::Unknown { name: name.into(), there });
        };
        let Some(controller) = self.slots.controller.as_ref().filter(|_| entry.removable) else {
            return Err(UnplugError::Stays(name.into()));
        };
        if entry.state != DeviceState::Present {
            return Err(UnplugError::Pending(name.into()));
        }
        if held {
            return Err(UnplugError::Held(name.into()));
        }
        entry.state = DeviceState::Unplugging;
        let (number, slot) = (entry.number, entry.occupant.address.device());
        let status = entry.status();
        drop(table);
        controller.ask(slot);
        self.slots.signal.changed.notify_all();
        tracing::info!(device = name, "the guest is asked to let it go");
        Ok(Unplugging { board: self.clone(), number, slot, status })
    }

    /// What the thread does: takes away what the guest has ejected, until the machine ends.
    fn serve(&self) {
        let Slots { signal, controller, pci, .. } = &self.slots;
        loop {
            let mut table = signal.lock();
            while !table.quit && (table.ejected == 0 || table.held > 0) {
                table = signal.changed.wait(table).unwrap_or_else(PoisonError::into_inner);
            }
            if table.quit {
                return;
            }
            drop(table);
            let changing = self.changing();
            let mut table = signal.lock();
            if table.held > 0 {
                continue;
            }
            let slots = std::mem::take(&mut table.ejected);
            signal.changed.notify_all();
            let going = table.entries.iter_mut().filter(|entry| slots & entry.bit() != 0);
            let going: Vec<_> = going
                .filter_map(|entry| Some((entry.number, entry.occupant.address, entry.occupant.plugged.take()?)))
                .collect();
            let left: Vec<_> = table.functions().cloned().collect();
            drop(table);
            match live(&self.fixed, &self.gathering, &left) {
                Ok(live) => self.set_live(live),
                // Provably impossible: there are fewer units than before. What was ejected stays in the list then.
                Err(error) => tracing::error!(%error, "units without what was ejected"),
            }
            for (number, address, Plugged { function, bars }) in going {
                let owner = function.owner().clone();
                let name = owner.name().to_owned();
                let quit = {
                    let mut table = signal.lock();
                    table.leaving = Some(owner);
                    table.quit
                };
                if !quit {
                    function.release();
                }
                pci.remove(address);
                drop(function);
                pci.release_bars(bars);
                if let Some(controller) = controller {
                    controller.freed(address.device());
                }
                let mut table = signal.lock();
                let owner = table.leaving.take();
                table.entries.retain(|entry| entry.number != number);
                drop(table);
                // Its threads end here.
                drop(owner);
                tracing::info!(device = name, %address, "unplugged");
            }
            drop(changing);
            signal.changed.notify_all();
        }
    }

    /// Ends the thread, and the wait for guests that let nothing go.
    fn quit(&self) {
        let mut table = self.slots.signal.lock();
        table.quit = true;
        let leaving = table.leaving.clone();
        drop(table);
        if let Some(owner) = leaving {
            owner.close();
        }
        self.slots.signal.changed.notify_all();
    }
}

fn live<'a>(
    fixed: &Fixed,
    gathering: &Arc<Gathering>,
    functions: impl IntoIterator<Item = &'a Arc<Function>>,
) -> Result<Live, UnitsError> {
    let (mut units, mut dirty_sources) = (fixed.before.clone(), fixed.dirty_sources.clone());
    let before = units.len();
    for function in functions {
        units.push(function.clone());
        dirty_sources.push(function.log().clone());
    }
    if units.len() > before {
        units.push(gathering.clone());
    }
    units.extend(fixed.after.iter().cloned());
    Ok(Live { units: Arc::new(Units::new(units)?), dirty_sources: dirty_sources.into() })
}

/// How long a guest is given to let a function go that the host wants back. The host asks again after 10 s.
const GIVE_BACK_LIMIT: Duration = Duration::from_secs(9);

/// Functions that the host wants back: their guest is asked for them, like for one that is unplugged.
#[derive(Default)]
pub(in crate::vm) struct Wanted(OnceLock<Weak<Board>>);

impl Wanted {
    /// Who hears of one. What comes of it is heard by a thread of its own, `give-back`, which ends with the guest's answer, the machine,
    /// or the time for it.
    pub(in crate::vm) fn handler(self: &Arc<Self>) -> GiveBack {
        let this = self.clone();
        Arc::new(move |unit| {
            let Some(board) = this.0.get().and_then(Weak::upgrade) else { return };
            let name = format!("{}{}", unit.name, unit.instance);
            let unplugging = match board.ask(&name) {
                Ok(unplugging) => unplugging,
                Err(error) => return tracing::warn!(%error, "giving a device back to the host"),
            };
            drop(board);
            let wait = move || match unplugging.wait(GIVE_BACK_LIMIT) {
                Ok(device) => tracing::info!(device = device.name, "given back to the host"),
                Err(error) => tracing::warn!(%error, "giving a device back to the host"),
            };
            if let Err(error) = std::thread::Builder::new().name("give-back".into()).spawn(wait) {
                tracing::error!(%error, "making a thread");
            }
        })
    }
}

/// While it lives no device comes or goes.
pub struct Held(Arc<Board>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.slots.signal.lock().held -= 1;
        self.0.slots.signal.changed.notify_all();
    }
}

/// A device that the guest was asked to let go. If the handle is dropped, it is asked no longer.
pub struct Unplugging {
    board: Arc<Board>,
    number: u64,
    slot: u8,
    status: DeviceStatus,
}

impl Unplugging {
    /// The device.
    pub fn device(&self) -> &DeviceStatus {
        &self.status
    }

    /// Waits until the device is gone. If the guest has not let it go in time, it is asked no longer, and the device stays.
    pub fn wait(self, limit: Duration) -> Result<DeviceStatus, UnplugError> {
        let deadline = Instant::now() + limit;
        let signal = &self.board.slots.signal;
        let mut table = signal.lock();
        loop {
            let Some(entry) = table.entries.iter().find(|entry| entry.number == self.number) else {
                return Ok(self.status.clone());
            };
            if table.quit {
                return Err(UnplugError::Ended(self.status.name.clone()));
            }
            let ejected = entry.state == DeviceState::Ejected;
            let until = if ejected { deadline + LEAVE_LIMIT } else { deadline };
            match Instant::now() >= until {
                true if ejected => return Err(UnplugError::Leaving(self.status.name.clone())),
                true => break,
                false => table = signal.wait(table, until),
            }
        }
        drop(table);
        let heard = !self.withdraw();
        Err(UnplugError::NotAnswered { name: self.status.name.clone(), heard, limit })
    }

    /// Asks no longer. False if the guest was told.
    fn withdraw(&self) -> bool {
        let mut table = self.board.slots.signal.lock();
        let entry = table.entries.iter_mut().find(|entry| entry.number == self.number);
        // The slot may be another device's by now.
        let Some(entry) = entry.filter(|entry| entry.state == DeviceState::Unplugging) else { return false };
        entry.state = DeviceState::Present;
        let untold = self.board.slots.controller.as_ref().is_some_and(|controller| controller.withdraw(self.slot));
        drop(table);
        self.board.slots.signal.changed.notify_all();
        untold
    }
}

impl Drop for Unplugging {
    fn drop(&mut self) {
        self.withdraw();
    }
}

/// The thread `hotplug` of a machine, and the board.
pub(super) struct Hotplug {
    board: Arc<Board>,
    thread: Option<JoinHandle<()>>,
}

impl Hotplug {
    pub(super) fn start(board: Arc<Board>) -> std::io::Result<Self> {
        let thread = board.slots.controller.is_some().then(|| {
            let board = board.clone();
            std::thread::Builder::new().name("hotplug".into()).spawn(move || board.serve())
        });
        Ok(Self { thread: thread.transpose()?, board })
    }

    pub(super) fn board(&self) -> &Arc<Board> {
        &self.board
    }

    /// Nothing comes or goes any more.
    pub(super) fn end(&self) {
        self.board.quit();
    }
}

impl Drop for Hotplug {
    fn drop(&mut self) {
        self.board.quit();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the hotplug thread has panicked; this is a bug in Wherry");
        }
    }
}
