//! The thread `relay`: passes on what devices of other processes signal while nothing is attached to the hypervisor.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::{Event, Vector};

/// Ends with the value.
pub(crate) struct Relay {
    quit: Arc<Event>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Of these vectors, as long as each is [relayed](Vector::relay).
    pub(crate) fn start(vectors: Vec<Arc<Vector>>) -> io::Result<Self> {
        let quit = Arc::new(Event::new()?);
        let quitting = quit.clone();
        let run = move || loop {
            let events = vectors.iter().flat_map(|v| [v.interrupt_event(), v.kvm_interrupt_event()]);
            let mut waited: Vec<_> =
                events.chain([&*quitting]).map(|event| PollFd::new(event, PollFlags::IN)).collect();
            match poll(&mut waited, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return tracing::error!(%error, "waiting for interrupts to pass on"),
            }
            let rung: Vec<bool> = waited.iter().map(|event| event.revents().contains(PollFlags::IN)).collect();
            if rung.last() == Some(&true) {
                return;
            }
            let mut idle = true;
            for (vector, rung) in vectors.iter().zip(rung.chunks(2)) {
                if rung.contains(&true) {
                    idle &= !vector.pass_on();
                }
            }
            if idle {
                // The vectors have come to rest: what is signalled now is for whoever goes on with them.
                return;
            }
        };
        let thread = std::thread::Builder::new().name("relay".into()).spawn(run)?;
        Ok(Self { quit, thread: Some(thread) })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // It fails only if the counter is full, and then the thread is awake already.
        let _ = self.quit.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that passes interrupts on has panicked; this is a bug in Wherry");
        }
    }
}
