//! How the thread of a back end is reached: orders, and what it has noted for others. Each order that waits has a deadline.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use wherry_handover::Registry;
use wherry_state::UnitError;

use super::log::Log;
use super::saved::SavedBackend;
use crate::device::{Activation, Position, Serving};

/// How long a device may take to come to rest when its driver resets it.
pub(super) const RESET_LIMIT: Duration = Duration::from_secs(10);

pub(super) type Done<E> = SyncSender<Result<(), E>>;

/// What the thread of a back end is told.
pub(super) enum Order {
    Activate(Activation),
    Reset(Done<UnitError>),
    Drain(Instant, Done<UnitError>),
    Rest(Instant, Done<UnitError>),
    Start,
    Log(Option<Arc<Log>>, Done<String>),
    Config(u32, Vec<u8>),
    Vector(u16),
    Announce([u8; 6]),
    Load(Vec<u8>, Done<String>),
    Leave(Done<UnitError>),
    Adopt(SavedBackend, Done<String>),
    Quit,
}

/// How the thread is reached.
pub(super) struct Orders {
    sender: Mutex<Sender<Order>>,
    /// Readable when there are orders.
    pub(super) wake: EventFd,
    /// How far the rings had been served when the back end came to rest.
    pub(super) positions: Mutex<Vec<(u16, Position)>>,
    /// What the back end keeps itself, since it came to rest.
    pub(super) state: Mutex<Vec<u8>>,
    /// How another process goes on with the back end, since it was left to one.
    pub(super) left: Mutex<Option<SavedBackend>>,
    /// The device's configuration, as the guest sees it. No other lock is taken under it.
    pub(super) config: Arc<Mutex<Vec<u8>>>,
    /// Knows whether another process is about to go on.
    registry: Arc<Registry>,
}

impl Orders {
    /// With the other end of its orders, for the thread.
    pub(super) fn new(
        config: Arc<Mutex<Vec<u8>>>,
        registry: Arc<Registry>,
    ) -> std::io::Result<(Self, Receiver<Order>)> {
        let (sender, orders) = channel();
        let (sender, wake) = (Mutex::new(sender), EventFd::new(EFD_NONBLOCK)?);
        let (positions, state, left) = Default::default();
        Ok((Self { sender, wake, positions, state, left, config, registry }, orders))
    }

    pub(super) fn send(&self, order: Order) {
        // A thread that has ended leaves whoever waits without an answer, which is one.
        let _ = self.sender.lock().unwrap_or_else(PoisonError::into_inner).send(order);
        let _ = self.wake.write(1);
    }

    fn wait<E>(&self, order: impl FnOnce(Done<E>) -> Order, deadline: Instant, late: impl Fn() -> E) -> Result<(), E> {
        let (done, answer) = sync_channel(1);
        self.send(order(done));
        match answer.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Err(late()),
        }
    }

    pub(super) fn activate(&self, activation: Activation) {
        self.send(Order::Activate(activation));
    }

    pub(super) fn reset(&self) {
        let late = || UnitError::Deadline("the back end did not answer".into());
        if let Err(error) = self.wait(Order::Reset, Instant::now() + RESET_LIMIT, late) {
            tracing::error!(%error, "resetting a vhost-user device");
        }
    }

    pub(super) fn start(&self) {
        self.send(Order::Start);
    }

    pub(super) fn log(&self, log: Option<Arc<Log>>) -> Result<(), String> {
        let late = || "the back end did not answer".into();
        self.wait(|done| Order::Log(log, done), Instant::now() + RESET_LIMIT, late)
    }

    pub(super) fn write_config(&self, offset: u32, content: Vec<u8>) {
        self.send(Order::Config(offset, content));
    }

    pub(super) fn announce(&self, address: [u8; 6]) {
        self.send(Order::Announce(address));
    }

    pub(super) fn vector(&self, ring: u16) {
        self.send(Order::Vector(ring));
    }

    /// What the back end keeps itself. At rest.
    pub(super) fn state(&self) -> Vec<u8> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Gives it what another one kept.
    pub(super) fn load(&self, state: Vec<u8>) -> Result<(), String> {
        let late = || "the back end did not answer".into();
        self.wait(|done| Order::Load(state, done), Instant::now() + RESET_LIMIT, late)
    }
}

impl Orders {
    /// How another process goes on with the back end, once.
    pub(super) fn take_left(&self) -> Option<SavedBackend> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Goes on with what another process has left.
    pub(super) fn adopt(&self, saved: SavedBackend) -> Result<(), String> {
        let late = || "the thread that speaks with the back end has ended".into();
        self.wait(|done| Order::Adopt(saved, done), Instant::now() + RESET_LIMIT, late)
    }
}

impl Serving for Orders {
    /// The driver rings the back end itself: it goes on as long as the vCPUs do, or until a drain.
    fn quiesce(&self) {}

    fn drain(&self, deadline: Instant) -> Result<(), UnitError> {
        if self.registry.is_leaving() {
            // It serves on.
            return Ok(());
        }
        let late = || UnitError::Deadline("the back end did not answer".into());
        self.wait(|done| Order::Drain(deadline, done), deadline, late)
    }

    fn stop(&self, deadline: Instant) -> Result<(), UnitError> {
        let late = || UnitError::Deadline("the back end did not answer".into());
        if self.registry.is_leaving() {
            return self.wait(Order::Leave, deadline, late);
        }
        self.wait(|done| Order::Rest(deadline, done), deadline, late)
    }

    fn positions(&self) -> Vec<(u16, Position)> {
        self.positions.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
