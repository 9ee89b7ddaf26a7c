//! One message-signalled interrupt.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{Event, Events, Input, InterruptError, Message, Router};

/// What the guest has set a vector to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Setting {
    /// What it writes.
    pub message: Message,
    /// It may interrupt: it is not masked, and its function has the kind of interrupt switched on.
    pub open: bool,
}

/// Which eventfd a device in another process has to signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// [`Vector::interrupt_event`]: it only becomes pending.
    Interrupt,
    /// [`Vector::kvm_interrupt_event`]: the hypervisor delivers it.
    KvmInterrupt,
}

struct State {
    setting: Setting,
    pending: bool,
    attached: bool,
    /// Nothing is attached until [`Vector::resume`].
    rests: bool,
    /// Nothing is attached; what is raised is injected.
    relayed: bool,
}

/// A vector, and the two eventfds that raise it: `interrupt` while it cannot be delivered, `kvm_interrupt` while it can.
///
/// A device in this process calls [`raise`](Self::raise). A device in another one holds the eventfd that
/// [`signal`](Self::signal) names, and is given the other one when that changes: first it changes, then the device is told
/// and has answered, then [`collect`](Self::collect) takes in what went to the old one.
pub struct Vector {
    router: Arc<dyn Router>,
    input: Input,
    interrupt: Arc<Event>,
    kvm_interrupt: Arc<Event>,
    /// Held while the router is called, which takes locks of its own.
    state: Mutex<State>,
}

impl Vector {
    pub(crate) fn new(router: Arc<dyn Router>, events: &Events, index: u32) -> Result<Self, InterruptError> {
        let input = router.reserve().map_err(|source| InterruptError {
            input: Input(0),
            what: "reserving an input",
            source,
        })?;
        let event = |what| {
            events.get(what, index).map_err(|source| InterruptError { input, what: "getting an eventfd", source })
        };
        let state =
            State { setting: Setting::default(), pending: false, attached: false, rests: false, relayed: false };
        match (event("interrupt"), event("kvm-interrupt")) {
            (Ok(interrupt), Ok(kvm_interrupt)) => {
                Ok(Self { router, input, interrupt, kvm_interrupt, state: Mutex::new(state) })
            }
            (Err(error), _) | (_, Err(error)) => {
                router.release(&[input]);
                Err(error)
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, what: &'static str) -> impl FnOnce(io::Error) -> InterruptError {
        let input = self.input;
        move |source| InterruptError { input, what, source }
    }

    /// Its input of the router.
    pub fn input(&self) -> Input {
        self.input
    }

    /// Signalled while the vector cannot be delivered.
    pub fn interrupt_event(&self) -> &Event {
        &self.interrupt
    }

    /// Signalled while the hypervisor delivers it.
    pub fn kvm_interrupt_event(&self) -> &Event {
        &self.kvm_interrupt
    }

    /// Which of the two a device has to signal now.
    pub fn signal(&self) -> Signal {
        if self.lock().setting.open { Signal::KvmInterrupt } else { Signal::Interrupt }
    }

    /// Interrupts the guest, now or as soon as that is possible.
    pub fn raise(&self) {
        let mut state = self.lock();
        state.pending = true;
        self.settle(&mut state);
    }

    /// Takes in what devices in other processes have signalled while it could not be delivered.
    pub fn collect(&self) {
        let mut state = self.lock();
        self.absorb(&mut state);
        self.settle(&mut state);
    }

    /// Whether it waits to be delivered: the pending bit that a guest can read.
    pub fn pending(&self) -> bool {
        let mut state = self.lock();
        self.absorb(&mut state);
        state.pending && !state.setting.open
    }

    /// Reads the eventfds that nobody else reads.
    fn absorb(&self, state: &mut State) {
        // An empty one would block, and says so.
        state.pending |= self.interrupt.read().is_ok();
        if !state.attached {
            state.pending |= self.kvm_interrupt.read().is_ok();
        }
    }

    /// Delivers what is pending, if that is possible.
    fn settle(&self, state: &mut State) {
        if !state.pending {
            return;
        }
        if state.attached {
            // It fails only if the counter is full, and then the interrupt is certain anyway.
            let _ = self.kvm_interrupt.write(1);
            state.pending = false;
        } else if state.relayed && state.setting.open && !state.rests {
            match self.router.inject(state.setting.message) {
                Ok(()) => state.pending = false,
                Err(error) => tracing::error!(input = %self.input, %error, "an interrupt that waits now"),
            }
        }
    }

    pub(crate) fn setting(&self) -> Setting {
        self.lock().setting
    }

    pub(crate) fn setting_and_pending(&self) -> (Setting, bool) {
        let state = self.lock();
        (state.setting, state.pending)
    }

    pub(crate) fn drop_pending(&self) {
        let mut state = self.lock();
        self.absorb(&mut state);
        state.pending = false;
    }

    pub(crate) fn set_pending(&self) {
        self.lock().pending = true;
    }

    /// Takes the setting; the route has been set.
    pub(crate) fn set(&self, setting: Setting) -> Result<(), InterruptError> {
        let mut state = self.lock();
        state.setting = setting;
        self.follow(&mut state)
    }

    pub(crate) fn rest(&self) -> Result<(), InterruptError> {
        let mut state = self.lock();
        state.rests = true;
        self.follow(&mut state)
    }

    pub(crate) fn resume(&self) -> Result<(), InterruptError> {
        let mut state = self.lock();
        (state.rests, state.relayed) = (false, false);
        self.follow(&mut state)
    }

    /// Detaches it while it is in use, or ends that.
    pub(crate) fn set_relayed(&self, relayed: bool) -> Result<(), InterruptError> {
        let mut state = self.lock();
        state.relayed = relayed;
        self.follow(&mut state)
    }

    /// Delivers what a device in another process has signalled, while it is relayed; false if that is over.
    pub(crate) fn pass_on(&self) -> bool {
        let mut state = self.lock();
        if !state.relayed || state.rests {
            return false;
        }
        self.absorb(&mut state);
        self.settle(&mut state);
        true
    }

    /// Attaches or detaches as the state says.
    fn follow(&self, state: &mut State) -> Result<(), InterruptError> {
        let wanted = state.setting.open && !state.rests && !state.relayed;
        if state.attached && !wanted {
            self.router.detach(self.input, &self.kvm_interrupt).map_err(self.error("detaching its eventfd"))?;
            state.attached = false;
        } else if !state.attached && wanted {
            // What it counts would be delivered, or not: hypervisors differ. So it counts nothing.
            self.absorb(state);
            self.router.attach(self.input, &self.kvm_interrupt, None).map_err(self.error("attaching its eventfd"))?;
            state.attached = true;
        }
        self.settle(state);
        Ok(())
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        // Nothing is attached to an input that is given back; a hypervisor that is gone already has let go of it.
        if let Err(error) = self.rest() {
            tracing::debug!(%error, "a vector that is no more");
        }
        self.router.release(&[self.input]);
    }
}
