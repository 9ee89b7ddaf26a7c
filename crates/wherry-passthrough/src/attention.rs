//! The thread `attention-N` of a function: hears what its owner signals that is not the guest's.
//!
//! A function that has failed is gone for its guest: it is reset, where that is possible, so that it does no more DMA, and reads as ones.
//! One that the host wants back (somebody unbinds its driver, which waits for us) is asked back from the guest; the kernel signals again
//! every few seconds for as long as it waits.

use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use wherry_interrupt::Event;
use wherry_state::UnitId;

use crate::function::Function;
use crate::owner::Attention;

/// Whom a machine tells that a function is wanted back.
pub type GiveBack = Arc<dyn Fn(UnitId) + Send + Sync>;

/// The thread.
pub(crate) struct Listener {
    quit: Arc<Event>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    /// Starts it, if there is anything to hear.
    pub(crate) fn start(
        function: Weak<Function>,
        id: UnitId,
        attention: Attention,
        give_back: GiveBack,
    ) -> std::io::Result<Option<Self>> {
        let Attention { error, request } = attention;
        if error.is_none() && request.is_none() {
            return Ok(None);
        }
        let quit = Arc::new(Event::new()?);
        let quitting = quit.clone();
        let name = format!("attention-{}", id.instance);
        let run = move || {
            let events: Vec<_> = [Some(&quitting), error.as_ref(), request.as_ref()].into_iter().flatten().collect();
            loop {
                let mut polled: Vec<_> = events.iter().map(|event| PollFd::new(&***event, PollFlags::IN)).collect();
                match poll(&mut polled, None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => return tracing::error!(unit = %id, %error, "listening to the host"),
                }
                drop(polled);
                if quitting.read().is_ok() {
                    return;
                }
                if error.as_ref().is_some_and(|event| event.read().is_ok())
                    && let Some(function) = function.upgrade()
                {
                    function.fail();
                }
                if request.as_ref().is_some_and(|event| event.read().is_ok()) {
                    tracing::warn!(unit = %id, "the host wants it back: its guest is asked to let it go");
                    give_back(id.clone());
                }
            }
        };
        let thread = std::thread::Builder::new().name(name).spawn(run)?;
        Ok(Some(Self { quit, thread: Some(thread) }))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.quit.write(1);
        if let Some(thread) = self.thread.take()
            // It may hold the last handle of the function itself.
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}
