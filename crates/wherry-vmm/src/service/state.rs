//! What the service holds, and the moves between its states. All of it happens with the lock held; a machine must never
//! be dropped so, because its end may call back.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Instant;

use tracing::{error, info};
use wherry_migration::progress::Phase;

use super::guest::{DeviceLister, Exit, Guest, Journey};
use super::{Ending, STOPPED, Service, ServiceError};
use crate::api::types::{Hardware, VmInfo, VmState};

pub(super) struct Inner {
    pub(super) state: VmState,
    pub(super) reason: Option<String>,
    pub(super) guest: Option<Box<dyn Guest>>,
    /// What a request is doing with the guest that it has taken out.
    pub(super) busy: Option<&'static str>,
    pub(super) hardware: Option<Hardware>,
    /// Lists the devices of the machine that is here, or was.
    pub(super) devices: Option<DeviceLister>,
    pub(super) listen: Option<String>,
    pub(super) journey: Option<Arc<dyn Journey>>,
    /// The VM runs here, and the journey goes on until all of its memory is here, too.
    pub(super) following: bool,
    /// The user has asked for the end while the guest was out.
    pub(super) stop_wanted: bool,
    /// The guest ended while it was out.
    pub(super) exit: Option<Exit>,
    /// Counts machines, so that the late exit of an earlier one is not taken for the present one's.
    pub(super) machine: u64,
    pub(super) result_read: bool,
    pub(super) ending: Option<Ending>,
}

impl Service {
    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wait<'a>(&self, inner: MutexGuard<'a, Inner>, deadline: Instant) -> MutexGuard<'a, Inner> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0
    }

    pub(super) fn info_of(&self, inner: MutexGuard<'_, Inner>) -> VmInfo {
        drop(inner);
        self.info()
    }

    /// The state as the user sees it: a journey tells by itself when it is in doubt.
    pub(super) fn seen(inner: &Inner) -> VmState {
        let on_its_way = matches!(inner.state, VmState::Migrating | VmState::Receiving);
        match &inner.journey {
            Some(journey) if on_its_way && journey.job().phase == Phase::InDoubt => VmState::InDoubt,
            _ => inner.state,
        }
    }

    pub(super) fn set(&self, inner: &mut Inner, state: VmState, reason: Option<String>) {
        inner.state = state;
        inner.reason = reason;
        self.changed.notify_all();
        self.version.send_modify(|v| *v += 1);
    }

    pub(super) fn end(&self, inner: &mut Inner, state: VmState, status: u8, message: String) {
        if inner.ending.is_none() {
            inner.ending = Some(Ending { status, message: message.clone(), replaced: false });
        }
        self.set(inner, state, Some(message));
    }

    pub(super) fn take_out(inner: &mut Inner, what: &str) -> Result<Box<dyn Guest>, ServiceError> {
        if let Some(busy) = inner.busy {
            return Err(ServiceError::state(format!("{what} the VM: another request is {busy} it; try again")));
        }
        match (Self::seen(inner), inner.guest.take()) {
            (VmState::Running | VmState::Paused, Some(guest)) => Ok(guest),
            (VmState::Migrating, _) => Err(ServiceError::state(format!(
                "{what} the VM: it is migrating to {}; wait, or `wherry cancel` first",
                inner.journey.as_ref().map(|j| j.job().peer).unwrap_or_default()
            ))),
            (VmState::Updating, _) => Err(ServiceError::state(format!(
                "{what} the VM: a new process is about to take it over; try again when `wherry status` says so"
            ))),
            (state, guest) => {
                inner.guest = guest;
                Err(ServiceError::state(format!("{what} the VM: it is {state} here")))
            }
        }
    }

    pub(super) fn take_in(self: &Arc<Self>, inner: &mut Inner, guest: Box<dyn Guest>) {
        inner.machine += 1;
        inner.exit = None;
        inner.hardware = Some(guest.hardware());
        inner.devices = Some(guest.devices());
        let (service, machine) = (Arc::downgrade(self), inner.machine);
        guest.on_exit(Box::new(move |exit| {
            if let Some(service) = service.upgrade() {
                service.exited(machine, exit);
            }
        }));
        self.put_back(inner, guest);
    }

    pub(super) fn put_back(self: &Arc<Self>, inner: &mut Inner, guest: Box<dyn Guest>) {
        let state = if guest.is_paused() { VmState::Paused } else { VmState::Running };
        inner.guest = Some(guest);
        let reason = inner.reason.take();
        self.set(inner, state, reason);
        if inner.stop_wanted {
            // Whoever asked for it may have gone at their deadline.
            self.obey(inner, Exit::Quit);
        } else if let Some(exit) = inner.exit.take() {
            self.obey(inner, exit);
        }
    }

    /// Boots the machine again. The old one is gone.
    pub(super) fn reboot(self: Arc<Self>) {
        let Some(reboot) = &self.policy.reboot else { return };
        let guest = reboot().and_then(|mut guest| guest.resume().map(|()| guest));
        let mut inner = self.lock();
        inner.busy = None;
        if inner.ending.is_some() {
            return;
        }
        match guest {
            Ok(guest) => self.take_in(&mut inner, guest),
            Err(e) => self.end(&mut inner, VmState::Crashed, 1, format!("booting again after the guest's reset: {e}")),
        }
    }

    /// The guest has ended on its own account. Called from whatever thread noticed.
    pub(super) fn exited(self: Arc<Self>, machine: u64, exit: Exit) {
        let mut inner = self.lock();
        if inner.machine != machine || inner.ending.is_some() {
            return;
        }
        inner.exit = Some(exit);
        if inner.guest.is_some() {
            if let Some(exit) = inner.exit.take() {
                self.obey(&mut inner, exit);
            }
        } else if let Some(journey) = inner.journey.clone()
            && matches!(inner.state, VmState::Migrating | VmState::Updating)
        {
            // A machine that is off is not worth a journey; when it is back, it is ended here.
            drop(inner);
            let _ = journey.cancel();
        }
    }

    /// Does what the end of the guest asks for. The machine is ended by a thread of its own: this one may belong to it.
    pub(super) fn obey(self: &Arc<Self>, inner: &mut Inner, exit: Exit) {
        let Some(guest) = inner.guest.take() else { return };
        let (state, status, message) = match exit {
            Exit::PowerOff => (VmState::Stopped, 0, "the guest has powered off".into()),
            Exit::Quit => (VmState::Stopped, 0, STOPPED.into()),
            Exit::Crash(why) => {
                error!(why, "the guest has crashed");
                (VmState::Crashed, 1, format!("the guest has crashed: {why}"))
            }
            Exit::Reset if self.policy.reboot.is_some() => {
                info!("the guest has asked for a reset");
                inner.busy = Some("resetting");
                self.set(inner, VmState::Created, None);
                let service = self.clone();
                aside("reset", move || {
                    drop(guest);
                    service.reboot();
                });
                return;
            }
            Exit::Reset => {
                let message = "the guest has asked for a reset, and this process has no kernel to boot again: the VM \
                               came here by migration; start it anew with `wherry run`";
                (VmState::Stopped, 0, message.into())
            }
        };
        inner.busy = Some("ending");
        self.set(inner, state, Some(message.clone()));
        let service = self.clone();
        aside("end", move || {
            service.bury(Some(guest), &message);
            let mut inner = service.lock();
            service.end(&mut inner, state, status, message);
        });
    }

    pub(super) fn lose(&self, inner: &mut Inner, why: &str, in_doubt: bool) {
        let status = if in_doubt { 3 } else { 1 };
        if let Some(guest) = inner.guest.take() {
            aside("end", move || drop(guest));
        }
        self.end(inner, VmState::Crashed, status, format!("the VM is lost here: {why}"));
    }
}

pub(super) fn aside(name: &str, work: impl FnOnce() + Send + 'static) {
    if let Err(error) = std::thread::Builder::new().name(name.into()).spawn(work) {
        error!(%error, "no thread for the {name} of the VM");
    }
}
