//! The interrupt pin of a device that somebody else owns.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{Event, Events, Input, InterruptError, Router};

struct State {
    enabled: bool,
    attached: bool,
    rests: bool,
}

/// A level-triggered pin whose level only the device knows. It signals [`event`](Self::event) and masks itself; when the guest
/// has ended the interrupt [`unmask_event`](Self::unmask_event) is written to, and a device that still wants service signals
/// again.
///
/// So the level is no state. Whenever the pin is attached, the device is unmasked once: one that is still asserted fires.
pub struct ForeignIntx {
    router: Arc<dyn Router>,
    input: Input,
    event: Arc<Event>,
    unmask: Arc<Event>,
    /// Held while the router is called, which takes locks of its own.
    state: Mutex<State>,
}

impl ForeignIntx {
    /// A pin that leads to this input, and that the guest does not let the device use yet.
    pub fn new(router: Arc<dyn Router>, events: &Events, input: Input) -> Result<Self, InterruptError> {
        let event =
            |what| events.get(what, 0).map_err(|source| InterruptError { input, what: "getting an eventfd", source });
        let state = State { enabled: false, attached: false, rests: false };
        Ok(Self { router, input, event: event("event")?, unmask: event("unmask")?, state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, what: &'static str) -> impl FnOnce(io::Error) -> InterruptError {
        let input = self.input;
        move |source| InterruptError { input, what, source }
    }

    /// The device signals it.
    pub fn event(&self) -> &Event {
        &self.event
    }

    /// The device unmasks itself when it is written to.
    pub fn unmask_event(&self) -> &Event {
        &self.unmask
    }

    /// The guest lets the device use its pin, or no longer.
    pub fn enable(&self, enabled: bool) -> Result<(), InterruptError> {
        let mut state = self.lock();
        state.enabled = enabled;
        self.follow(&mut state)
    }

    /// Detaches from the hypervisor; the input falls unless another pin holds it.
    pub fn rest(&self) -> Result<(), InterruptError> {
        let mut state = self.lock();
        state.rests = true;
        self.follow(&mut state)
    }

    /// Goes on. The I/O APIC has been restored.
    pub fn resume(&self) -> Result<(), InterruptError> {
        let mut state = self.lock();
        state.rests = false;
        self.follow(&mut state)
    }

    fn follow(&self, state: &mut State) -> Result<(), InterruptError> {
        let wanted = state.enabled && !state.rests;
        if state.attached && !wanted {
            self.router.detach(self.input, &self.event).map_err(self.error("detaching an interrupt pin"))?;
            state.attached = false;
        } else if !state.attached && wanted {
            // What was signalled while nobody listened: a device that still means it is asked below.
            let _ = self.event.read();
            self.router
                .attach(self.input, &self.event, Some(&self.unmask))
                .map_err(self.error("attaching an interrupt pin"))?;
            state.attached = true;
            // It fails only if the counter is full, and then the device is unmasked anyway.
            let _ = self.unmask.write(1);
        }
        Ok(())
    }
}

impl Drop for ForeignIntx {
    fn drop(&mut self) {
        if let Err(error) = self.rest() {
            tracing::debug!(%error, "an interrupt pin that is no more");
        }
    }
}
