//! An interrupt pin.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{Input, InterruptError, Router};

struct State {
    /// The device wants service.
    asserted: bool,
    /// The guest lets it use its pin.
    enabled: bool,
    attached: bool,
    rests: bool,
}

/// A level-triggered pin, of which several may lead to one input.
///
/// A write to its eventfd asserts the input until the guest ends the interrupt; then whoever serves
/// [`resample_fd`](Self::resample_fd) calls [`resample`](Self::resample), which asserts it again while the device still
/// wants service. So the level itself is no state: after a restore [`resume`](Self::resume) asserts what is wanted.
pub struct Intx {
    router: Arc<dyn Router>,
    input: Input,
    event: EventFd,
    resample: EventFd,
    /// Held while the router is called, which takes locks of its own.
    state: Mutex<State>,
}

impl Intx {
    /// A pin that leads to this input, enabled, not asserted.
    pub fn new(router: Arc<dyn Router>, input: Input) -> Result<Self, InterruptError> {
        let event =
            || EventFd::new(EFD_NONBLOCK).map_err(|source| InterruptError { input, what: "making an eventfd", source });
        let state = State { asserted: false, enabled: true, attached: false, rests: false };
        Ok(Self { router, input, event: event()?, resample: event()?, state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, what: &'static str) -> impl FnOnce(io::Error) -> InterruptError {
        let input = self.input;
        move |source| InterruptError { input, what, source }
    }

    /// Readable when the guest has ended an interrupt of this input.
    pub fn resample_fd(&self) -> RawFd {
        self.resample.as_raw_fd()
    }

    /// Whether the device wants service: the bit of the status register.
    pub fn is_asserted(&self) -> bool {
        self.lock().asserted
    }

    /// The device wants service, or no longer.
    pub fn set_level(&self, asserted: bool) -> Result<(), InterruptError> {
        let mut state = self.lock();
        let before = std::mem::replace(&mut state.asserted, asserted);
        // The input falls by itself when the guest ends the interrupt.
        if asserted && !before { self.follow(&mut state, true) } else { Ok(()) }
    }

    /// The guest lets it use its pin, or no longer.
    pub fn enable(&self, enabled: bool) -> Result<(), InterruptError> {
        let mut state = self.lock();
        let changed = state.enabled != enabled;
        state.enabled = enabled;
        self.follow(&mut state, changed)
    }

    /// The guest has ended an interrupt: asserts the input again if the device still wants service.
    pub fn resample(&self) {
        // Empty if another thread was here first.
        let _ = self.resample.read();
        let state = self.lock();
        if state.attached && state.asserted {
            self.fire();
        }
    }

    fn fire(&self) {
        // It fails only if the counter is full, and then the interrupt is certain anyway.
        let _ = self.event.write(1);
    }

    /// Detaches from the hypervisor; the input falls unless another pin holds it.
    pub fn rest(&self) -> Result<(), InterruptError> {
        let mut state = self.lock();
        state.rests = true;
        self.follow(&mut state, false)
    }

    /// Goes on, and asserts the input if the device wants service. The I/O APIC has been restored.
    pub fn resume(&self) -> Result<(), InterruptError> {
        let mut state = self.lock();
        let changed = std::mem::replace(&mut state.rests, false);
        self.follow(&mut state, changed)
    }

    /// Attaches when there is something to assert, and detaches when the pin may not be used. `fire`: assert the input if
    /// the device wants that.
    fn follow(&self, state: &mut State, fire: bool) -> Result<(), InterruptError> {
        let usable = state.enabled && !state.rests;
        if state.attached && !usable {
            self.router.detach(self.input, &self.event).map_err(self.error("detaching an interrupt pin"))?;
            state.attached = false;
        } else if !state.attached && usable && state.asserted {
            self.router
                .attach(self.input, &self.event, Some(&self.resample))
                .map_err(self.error("attaching an interrupt pin"))?;
            state.attached = true;
            self.fire();
            return Ok(());
        }
        if state.attached && fire && state.asserted {
            self.fire();
        }
        Ok(())
    }
}

impl Drop for Intx {
    fn drop(&mut self) {
        if let Err(error) = self.rest() {
            tracing::debug!(%error, "an interrupt pin that is no more");
        }
    }
}
