//! The threads that have devices stop, save, load and run side by side.
//!
//! Each function has one, `passthrough-N`, which does one step at a time. The steps of a machine's units come one after the
//! other; so the first function that is asked hands the step to all, and each waits for its own. By then all vCPUs are at rest
//! (they stop first), and no vCPU runs yet when devices start (they start last).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use wherry_vfio_user::State;

use crate::function::Function;

/// Most bytes of one device's state. It is held in memory.
const MOST_STATE: usize = 256 << 20;
/// How often a device that takes part in postcopy is looked at: whether all memory is there.
const LOOK: Duration = Duration::from_millis(20);
/// Bytes of state that are asked for at once.
const PIECE: usize = 1 << 20;

/// What a device is to do.
#[derive(Clone)]
pub(crate) enum Step {
    /// Stop, and give its state.
    Rest(Instant),
    /// Take a state.
    Load(Vec<u8>),
    /// Run.
    Run,
}

/// What a step gave.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) state: Vec<u8>,
}

type Done = Result<Outcome, String>;
type Orders = Sender<(Step, SyncSender<Done>)>;

/// A function's thread, as others see it.
pub(crate) struct Member {
    function: Weak<Function>,
    orders: Mutex<Option<Orders>>,
    /// The step that was handed to it and that nobody has waited for yet.
    handed: Mutex<Option<Receiver<Done>>>,
    /// Whatever reads a state stops that.
    cancelled: AtomicBool,
    /// The device was told to stop, or to take a state, and not yet to run.
    stopped: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Member {
    pub(crate) fn new(function: Weak<Function>) -> Self {
        Self {
            function,
            orders: Mutex::default(),
            handed: Mutex::default(),
            cancelled: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            thread: Mutex::default(),
        }
    }

    pub(crate) fn start(self: &Arc<Self>, instance: u32) -> std::io::Result<()> {
        let (sender, orders) = channel::<(Step, SyncSender<Done>)>();
        let this = Arc::downgrade(self);
        let run = move || {
            loop {
                let sharing = this.upgrade().and_then(|m| m.function.upgrade()).is_some_and(|f| f.sharer.is_sharing());
                let order = match sharing {
                    true => orders.recv_timeout(LOOK),
                    false => orders.recv().map_err(RecvTimeoutError::from),
                };
                let (step, done) = match order {
                    Ok(order) => order,
                    Err(RecvTimeoutError::Timeout) => {
                        if let Some(function) = this.upgrade().and_then(|m| m.function.upgrade()) {
                            function.sharer.look(&**function.owner());
                        }
                        continue;
                    }
                    Err(RecvTimeoutError::Disconnected) => break,
                };
                let (Some(member), Some(function)) =
                    (this.upgrade(), this.upgrade().and_then(|m| m.function.upgrade()))
                else {
                    break;
                };
                // Nobody may wait any longer.
                let _ = done.send(perform(&function, step, &member));
            }
        };
        let thread = std::thread::Builder::new().name(format!("passthrough-{instance}")).spawn(run)?;
        (*lock(&self.orders), *lock(&self.thread)) = (Some(sender), Some(thread));
        Ok(())
    }

    pub(crate) fn hand(&self, step: Step) {
        self.cancelled.store(matches!(step, Step::Run), Ordering::Release);
        let (done, receiver) = sync_channel(1);
        if let Some(orders) = &*lock(&self.orders) {
            // A thread that has ended leaves the receiver without a sender, which tells.
            let _ = orders.send((step, done));
        }
        *lock(&self.handed) = Some(receiver);
    }

    /// What its function's owner is called.
    pub(crate) fn name(&self) -> String {
        self.function.upgrade().map_or_else(|| "a device".into(), |function| function.owner().name().into())
    }

    fn has_step(&self) -> bool {
        lock(&self.handed).is_some()
    }

    /// Waits for the step that was handed to it.
    pub(crate) fn wait(&self, deadline: Instant) -> Result<Outcome, Late> {
        let Some(receiver) = lock(&self.handed).take() else { return Ok(Outcome::default()) };
        match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(done) => done.map_err(Late::Failed),
            Err(RecvTimeoutError::Timeout) => Err(Late::Deadline),
            Err(RecvTimeoutError::Disconnected) => Err(Late::Failed("its thread has ended".into())),
        }
    }

    /// Ends the thread. Not when it is the thread itself that lets go of the function last.
    pub(crate) fn quit(&self) {
        self.cancelled.store(true, Ordering::Release);
        *lock(&self.orders) = None;
        if let Some(thread) = lock(&self.thread).take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

/// A step did not end, or not well.
#[derive(Debug)]
pub(crate) enum Late {
    Deadline,
    Failed(String),
}

/// All functions of a machine.
#[derive(Default)]
pub struct Crew(Mutex<Vec<Weak<Member>>>);

impl Crew {
    /// Without members.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn join(&self, member: &Arc<Member>) {
        lock(&self.0).push(Arc::downgrade(member));
    }

    pub(crate) fn members(&self) -> Vec<Arc<Member>> {
        lock(&self.0).iter().filter_map(Weak::upgrade).collect()
    }

    /// Hands a step to all, unless this one has been handed it already by another one's call.
    pub(crate) fn hand(&self, own: &Member, step: &Step) {
        if !own.has_step() {
            self.members().iter().for_each(|member| member.hand(step.clone()));
        }
    }
}

fn perform(function: &Function, step: Step, member: &Member) -> Done {
    let begun = Instant::now();
    let owner = function.owner();
    let text = |error: crate::OwnerError| {
        function.report("moving it", &error);
        error.to_string()
    };
    match step {
        Step::Rest(deadline) => {
            member.stopped.store(true, Ordering::Release);
            owner.set_state(State::StopCopy).map_err(text)?;
            let stopped = begun.elapsed();
            let mut state = Vec::new();
            loop {
                let piece = owner.read_state(PIECE).map_err(text)?;
                if piece.is_empty() {
                    break;
                }
                state.extend_from_slice(&piece);
                if state.len() > MOST_STATE {
                    return Err(format!("{} gives more than {MOST_STATE} bytes of state", owner.name()));
                }
                if member.cancelled.load(Ordering::Acquire) || Instant::now() >= deadline {
                    let read = state.len();
                    return Err(format!("{} has given {read} bytes of state, and there is no end of it", owner.name()));
                }
            }
            let (stop, save) = (us(stopped), us(begun.elapsed() - stopped));
            tracing::debug!(device = owner.name(), stop_us = stop, save_us = save, bytes = state.len(), "at rest");
            Ok(Outcome { state })
        }
        Step::Load(state) => {
            member.stopped.store(true, Ordering::Release);
            function.sharer.share(&**owner)?;
            owner.set_state(State::Resuming).map_err(text)?;
            owner.write_state(&state).map_err(text)?;
            owner.set_state(State::Stop).map_err(text)?;
            function.introduce().map_err(text)?;
            tracing::debug!(device = owner.name(), load_us = us(begun.elapsed()), bytes = state.len(), "loaded");
            Ok(Outcome::default())
        }
        Step::Run => {
            if function.is_lost() || !member.stopped.load(Ordering::Acquire) {
                return Ok(Outcome::default());
            }
            owner.set_state(State::Running).map_err(text)?;
            member.stopped.store(false, Ordering::Release);
            if function.interrupts.uses_pin() {
                // Nobody knows its level: a device that still wants service signals again.
                owner.unmask().map_err(text)?;
            }
            tracing::debug!(device = owner.name(), start_us = us(begun.elapsed()), "runs");
            Ok(Outcome::default())
        }
    }
}

fn us(duration: Duration) -> u64 {
    duration.as_micros() as u64
}
