//! The first serial port: a 16550 at ports 0x3F8 to 0x3FF.
//!
//! - [`Serial`] is the device on the bus and the state unit `serial`. The chip is `vm-superio`'s.
//! - `console` is the thread that moves bytes between the chip and the outside; `output` is the bounded buffer in
//!   between; `endpoint` is what the outside can be: a terminal or pipes, a file, a UNIX socket whose clients come and
//!   go, or nothing.
//! - [`restore_terminal`] is for those who end the process without dropping the machine, and [`leave_terminal`] for those who do so
//!   because another process has it.
//!
//! Contract: the guest never waits for the outside. What nobody takes is kept, up to 256 KiB; then the oldest bytes
//! are dropped. Input waits outside while the chip's FIFO is full or the unit is stopped. Dropping the port ends the
//! thread, after a last attempt to deliver what is left.
//!
//! What is buffered towards the outside is not state of the guest: it is delivered here, and does not move with it. Only in a live
//! update, where the outside stays the same, it goes over, and so does input that waits; the thread rests meanwhile.

mod console;
mod endpoint;
mod output;
mod saved;
mod terminal;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial as Chip, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use wherry_handover::{Registry, RegistryError};
use wherry_socket::SocketError;
use wherry_state::{Saved, SavedState, Section, StateUnit, UnitError, UnitId};

use crate::config::SerialTarget;
use crate::units::Once;
use endpoint::Endpoint;
use output::Output;
pub(crate) use saved::SavedSerial;
pub use terminal::{leave_terminal, restore_terminal};
pub(crate) use terminal::{restore_as, users_terminal};
use wherry_pci::bus::BusDevice;

/// Number of ports.
pub const SERIAL_LEN: u64 = 8;

/// Offset of the modem control register, which switches loopback.
const MODEM_CONTROL: u64 = 4;

/// Called when the user leaves the terminal by Ctrl-A x.
pub type EscapeHandler = Arc<dyn Fn() + Send + Sync>;

/// The serial port cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// A file or socket cannot be used.
    #[error("serial port, {what} {}: {source}", path.display())]
    Path {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The socket cannot be listened on.
    #[error("serial port: {0}; choose another path")]
    Socket(#[from] SocketError),
    /// A descriptor that was to be kept over an update.
    #[error("serial port: {0}")]
    Kept(#[from] RegistryError),
    /// Standard input or output, an eventfd or the thread.
    #[error("serial port, {what}: {source}")]
    Os {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl SerialError {
    fn os(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| SerialError::Os { what, source }
    }
}

/// The interrupt as the chip sees it.
#[derive(Clone)]
struct Interrupt {
    event: Arc<EventFd>,
    /// A restored chip raises its interrupts when the unit starts, not while others are still being restored.
    held: Arc<AtomicBool>,
}

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        if self.held.load(Ordering::Relaxed) { Ok(()) } else { self.event.write(1) }
    }
}

/// Wakes the console when the guest has emptied the FIFO.
#[derive(Clone)]
struct Wake {
    event: Arc<EventFd>,
    /// Whether the console has input for which there was no room. Changed under the chip's lock only.
    starved: Arc<AtomicBool>,
}

impl Wake {
    fn now(&self) {
        // It fails only if the counter is full, and then the console is awake already.
        let _ = self.event.write(1);
    }
}

impl SerialEvents for Wake {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        if self.starved.swap(false, Ordering::Relaxed) {
            self.now();
        }
    }
}

struct Port {
    chip: Chip<Interrupt, Wake, Output>,
    /// False between stop and start: input waits.
    running: bool,
}

/// What is on its way between the chip and the outside.
#[derive(Default)]
struct OnItsWay {
    input: Vec<u8>,
    output: Vec<u8>,
    /// The first half of a way out was typed.
    escaping: bool,
}

/// The rest of the thread in a live update.
struct Rest {
    wanted: bool,
    /// There while the thread rests.
    held: Option<OnItsWay>,
}

/// What the device and its thread share.
struct Shared {
    /// Taken by vCPUs, by the console for input, and by the steps of the unit. The lock of the output buffer is taken
    /// under it, never the other way round.
    port: Mutex<Port>,
    output: Output,
    wake: Wake,
    stop: AtomicBool,
    rest: Mutex<Rest>,
    rest_changed: Condvar,
    registry: Arc<Registry>,
}

impl Shared {
    fn rest(&self) -> MutexGuard<'_, Rest> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread: leaves what it has where others find it, for as long as it is to rest.
    fn rest_if_wanted(&self, input: &mut VecDeque<u8>, output: &mut VecDeque<u8>, escaping: Option<&mut bool>) {
        let mut rest = self.rest();
        // What is held is taken also when the rest was over before the thread had come here.
        if !rest.wanted && rest.held.is_none() {
            return;
        }
        rest.held.get_or_insert_with(|| OnItsWay {
            input: std::mem::take(input).into(),
            output: std::mem::take(output).into(),
            escaping: escaping.as_ref().is_some_and(|escaping| **escaping),
        });
        self.rest_changed.notify_all();
        let rests = |rest: &mut Rest| rest.wanted && !self.stop.load(Ordering::Acquire);
        rest = self.rest_changed.wait_while(rest, rests).unwrap_or_else(PoisonError::into_inner);
        let held = rest.held.take().unwrap_or_default();
        (*input, *output) = (held.input.into(), held.output.into());
        if let Some(escaping) = escaping {
            *escaping = held.escaping;
        }
    }

    /// Has the thread rest, and waits for that. False: it does not by the deadline.
    fn bring_to_rest(&self, deadline: Instant) -> bool {
        let mut rest = self.rest();
        rest.wanted = true;
        self.wake.now();
        while rest.held.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            rest = self.rest_changed.wait_timeout(rest, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn end_rest(&self) {
        self.rest().wanted = false;
        self.rest_changed.notify_all();
    }

    fn port(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands input to the chip. Returns how many bytes it took; if not all, the console is woken when there is room.
    fn feed(&self, input: &[u8]) -> usize {
        let mut port = self.port();
        // A full FIFO is an error to the chip; in loopback it takes nothing.
        let taken = if port.running { port.chip.enqueue_raw_bytes(input).unwrap_or(0) } else { 0 };
        self.wake.starved.store(taken < input.len(), Ordering::Relaxed);
        taken
    }
}

/// The serial port.
pub struct Serial {
    shared: Arc<Shared>,
    interrupt: Interrupt,
    thread: Option<JoinHandle<()>>,
    once: Once,
}

impl Serial {
    /// A port that leads to `target` and raises its interrupt by `interrupt`. `escape` is for terminals.
    pub fn new(
        interrupt: EventFd,
        target: &SerialTarget,
        escape: Option<EscapeHandler>,
        registry: &Arc<Registry>,
    ) -> Result<Arc<Self>, SerialError> {
        Self::with_endpoint(interrupt, Endpoint::open(target, escape, registry)?, registry.clone())
    }

    fn with_endpoint(
        interrupt: EventFd,
        endpoint: Endpoint,
        registry: Arc<Registry>,
    ) -> Result<Arc<Self>, SerialError> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(SerialError::os("making an eventfd"))?;
        let wake = Wake { event: Arc::new(event), starved: Arc::default() };
        let interrupt = Interrupt { event: Arc::new(interrupt), held: Arc::default() };
        let output = Output::new(wake.clone());
        let chip = Chip::with_events(interrupt.clone(), wake.clone(), output.clone());
        let port = Mutex::new(Port { chip, running: true });
        // Until it is started, the outside is still the predecessor's.
        let succeeds = registry.succeeds();
        let rest = Mutex::new(Rest { wanted: succeeds, held: succeeds.then(OnItsWay::default) });
        let stop = AtomicBool::new(false);
        let shared = Arc::new(Shared { port, output, wake, stop, rest, rest_changed: Condvar::new(), registry });
        let thread = console::spawn(shared.clone(), endpoint).map_err(SerialError::os("starting its thread"))?;
        Ok(Arc::new(Self { shared, interrupt, thread: Some(thread), once: Once::default() }))
    }

    /// How many bytes of output were dropped because nobody took them.
    pub fn dropped(&self) -> u64 {
        self.shared.output.dropped()
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.end_rest();
        self.shared.wake.now();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

impl BusDevice for Serial {
    fn read(&self, _base: u64, offset: u64, data: &mut [u8]) {
        let mut port = self.shared.port();
        for (at, byte) in (offset..).zip(data) {
            *byte = port.chip.read(at as u8);
        }
    }

    fn write(&self, _base: u64, offset: u64, data: &[u8]) {
        let mut port = self.shared.port();
        for (at, byte) in (offset..).zip(data) {
            if let Err(error) = port.chip.write(at as u8, *byte) {
                tracing::debug!("serial port: {error:?}");
            }
            if at == MODEM_CONTROL && self.shared.wake.starved.swap(false, Ordering::Relaxed) {
                self.shared.wake.now();
            }
        }
    }
}

impl StateUnit for Serial {
    fn id(&self) -> UnitId {
        UnitId::new("serial", 0)
    }

    fn depends_on(&self) -> &[&str] {
        &["irqchip"]
    }

    fn schema(&self) -> u32 {
        SavedSerial::SCHEMA
    }

    /// In a live update the thread rests from here on: nobody is to wait for it in the blackout. What the guest still writes waits.
    fn drain(&self, deadline: Instant) -> Result<(), UnitError> {
        if self.shared.registry.is_leaving() && !self.shared.bring_to_rest(deadline) {
            return Err(UnitError::Deadline("the thread of the serial port did not come to rest".into()));
        }
        Ok(())
    }

    fn undrain(&self) -> Result<(), UnitError> {
        self.shared.end_rest();
        self.shared.wake.now();
        Ok(())
    }

    fn begin_stop(&self) -> Result<(), UnitError> {
        self.shared.port().running = false;
        Ok(())
    }

    fn finish_stop(&self, _deadline: Instant) -> Result<(), UnitError> {
        Ok(())
    }

    fn save(&self) -> Result<Saved, UnitError> {
        let mut saved = SavedSerial::of(&self.shared.port().chip.state());
        if let Some(held) = &self.shared.rest().held {
            saved.waiting_input = held.input.clone();
            saved.waiting_output = held.output.clone();
            saved.waiting_output.extend(self.shared.output.bytes());
            saved.escaping = held.escaping;
        }
        Ok(Saved::Section(saved.to_section(&self.id())))
    }

    fn restore(&self, section: &Section) -> Result<(), UnitError> {
        self.once.restoring()?;
        let saved = SavedSerial::from_section(section)?;
        let state = saved.to_state().map_err(UnitError::failed)?;
        self.interrupt.held.store(true, Ordering::Relaxed);
        let shared = &self.shared;
        let chip = Chip::from_state(&state, self.interrupt.clone(), shared.wake.clone(), shared.output.clone())
            .map_err(|e| UnitError::failed(format!("the chip does not take its state: {e}")))?;
        *shared.port() = Port { chip, running: false };
        if let Some(held) = &mut shared.rest().held {
            let SavedSerial { waiting_input: input, waiting_output: output, escaping, .. } = saved;
            *held = OnItsWay { input, output, escaping };
        }
        Ok(())
    }

    fn start(&self) -> Result<(), UnitError> {
        self.once.started();
        let mut port = self.shared.port();
        self.interrupt.held.store(false, Ordering::Relaxed);
        let state = port.chip.state();
        // Pending and enabled: transmitter empty, or data received. One too many does no harm.
        let transmitter = state.interrupt_enable & state.interrupt_identification & 2 != 0;
        let received = state.interrupt_enable & 1 != 0 && state.interrupt_identification & 4 != 0;
        if transmitter || received {
            self.interrupt.trigger().map_err(UnitError::failed)?;
        }
        port.running = true;
        self.shared.end_rest();
        self.shared.wake.now();
        Ok(())
    }
}
