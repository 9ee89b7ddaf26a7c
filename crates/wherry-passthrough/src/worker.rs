//! The threads that have devices stop, save, load and run side by side.
//!
//! Each function has one, `passthrough-N`, which does one step at a time. The steps of a machine's units come one after the
//! other; so the first function that is asked hands the step to all, and each waits for its own. By then all vCPUs are at rest
//! (they stop first), and no vCPU runs yet when devices start (they start last).
//!
//! A state goes in pieces: the thread of a device that is at rest reads ahead of whoever sends them, and that of a device which is
//! being loaded takes what has been received, while more of it comes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use wherry_state::StreamTimes;
use wherry_vfio_user::State;

use crate::function::Function;
use crate::pieces::{Broken, Pieces};

/// How often a device that takes part in postcopy is looked at: whether all memory is there.
const LOOK: Duration = Duration::from_millis(20);
/// Bytes of state that are asked for at once.
pub(crate) const PIECE: usize = 1 << 20;

/// What a device is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Start nothing towards other devices.
    Quiet,
    /// Stop. After that its state is read, until the deadline.
    Rest(Instant),
    /// Take a state.
    Load {
        /// It has begun to take another one.
        anew: bool,
    },
    /// Run.
    Run,
}

type Done = Result<(), String>;
type Orders = Sender<(Step, SyncSender<Done>)>;

/// A function's thread, as others see it.
pub(crate) struct Member {
    function: Weak<Function>,
    orders: Mutex<Option<Orders>>,
    /// The step that was handed to it and that nobody has waited for yet.
    handed: Mutex<Option<Receiver<Done>>>,
    /// The device was told to stop, or to take a state, and not yet to run.
    stopped: AtomicBool,
    /// State that is on its way out, or in.
    pub(crate) pieces: Pieces,
    /// What its last switch took.
    pub(crate) times: Mutex<StreamTimes>,
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
            stopped: AtomicBool::new(false),
            pieces: Pieces::default(),
            times: Mutex::default(),
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
                let result = perform(&function, step, &member);
                let rests = result.is_ok();
                // Nobody may wait any longer.
                let _ = done.send(result);
                if let (Step::Rest(deadline), true) = (step, rests) {
                    give(&function, &member, deadline);
                }
            }
        };
        let thread = std::thread::Builder::new().name(format!("passthrough-{instance}")).spawn(run)?;
        (*lock(&self.orders), *lock(&self.thread)) = (Some(sender), Some(thread));
        Ok(())
    }

    pub(crate) fn hand(&self, step: Step) {
        if step == Step::Run {
            self.pieces.close();
        }
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

    pub(crate) fn function(&self) -> &Weak<Function> {
        &self.function
    }

    pub(crate) fn has_step(&self) -> bool {
        lock(&self.handed).is_some()
    }

    /// Waits for the step that was handed to it.
    pub(crate) fn wait(&self, deadline: Instant) -> Result<(), Late> {
        let Some(receiver) = lock(&self.handed).take() else { return Ok(()) };
        match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(done) => done.map_err(Late::Failed),
            Err(RecvTimeoutError::Timeout) => Err(Late::Deadline),
            Err(RecvTimeoutError::Disconnected) => Err(Late::Failed("its thread has ended".into())),
        }
    }

    /// The device was told to stop, or to take a state, and not yet to run.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    fn can_be_quiet(&self) -> bool {
        let function = self.function.upgrade().filter(|function| !function.is_lost());
        function.and_then(|function| function.owner().facts().migration).is_some_and(|migration| migration.p2p)
    }

    fn time(&self, note: impl FnOnce(&mut StreamTimes)) {
        note(&mut lock(&self.times));
    }

    /// Ends the thread. Not when it is the thread itself that lets go of the function last.
    pub(crate) fn quit(&self) {
        self.pieces.close();
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

    /// Hands a step to all, unless this one has been handed it already by another one's call. Devices may talk to each other, so all
    /// that can be quiet are, before one stops and until all can run.
    pub(crate) fn hand(&self, own: &Member, step: Step, deadline: Instant) {
        if own.has_step() {
            return;
        }
        // Devices run when a machine is started for the first time, and those that are there run when one more is plugged in.
        let turns = |member: &Arc<Member>| member.is_stopped() == (step == Step::Run);
        let members: Vec<_> = self.members().into_iter().filter(turns).collect();
        let quiet: Vec<_> = members.iter().filter(|member| members.len() > 1 && member.can_be_quiet()).collect();
        quiet.iter().for_each(|member| member.hand(Step::Quiet));
        for member in quiet {
            if let Err(late) = member.wait(deadline) {
                // What comes next fails, too, or is all that matters.
                tracing::warn!(device = member.name(), ?late, "having it be quiet to other devices");
            }
        }
        members.iter().for_each(|member| member.hand(step));
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
        Step::Quiet => match function.is_early() {
            true => owner.set_state(State::PreCopyP2p).map_err(text),
            false => owner.set_state(State::RunningP2p).map_err(text),
        },
        Step::Rest(_) => {
            member.pieces.reset();
            member.stopped.store(true, Ordering::Release);
            owner.set_state(State::StopCopy).map_err(text)?;
            function.settle()?;
            let early = function.is_early();
            // Of a move that was given up, nothing counts.
            member.time(|times| {
                let before = if early { *times } else { StreamTimes::default() };
                *times = StreamTimes { stop: begun.elapsed(), ..before };
            });
            Ok(())
        }
        Step::Load { anew } => {
            member.stopped.store(true, Ordering::Release);
            let loaded = load(function, member, anew).inspect_err(|reason| member.pieces.fail(reason.clone()));
            loaded.inspect(|()| tracing::debug!(device = owner.name(), times = ?*lock(&member.times), "loaded"))
        }
        Step::Run => {
            // It was told to, whatever becomes of it: a device that has gone has no state on its way either.
            if !member.stopped.swap(false, Ordering::AcqRel) || function.is_lost() {
                return Ok(());
            }
            owner.set_state(State::Running).map_err(text)?;
            if function.interrupts.uses_pin() {
                // Nobody knows its level: a device that still wants service signals again.
                owner.unmask().map_err(text)?;
            }
            member.time(|times| times.start = begun.elapsed());
            Ok(())
        }
    }
}

/// Reads what is left of the state of a device at rest, ahead of whoever sends it.
fn give(function: &Function, member: &Member, deadline: Instant) {
    let (begun, owner) = (Instant::now(), function.owner());
    let mut bytes = 0;
    loop {
        let piece = match owner.read_state(PIECE) {
            Ok(piece) => piece,
            Err(error) => {
                function.report("reading its state", &error);
                return member.pieces.fail(error.to_string());
            }
        };
        if piece.is_empty() {
            break;
        }
        bytes += piece.len();
        if Instant::now() >= deadline {
            let name = owner.name();
            return member.pieces.fail(format!("{name} has given {bytes} bytes of state, and there is no end of it"));
        }
        if member.pieces.put(piece).is_err() {
            return;
        }
    }
    member.time(|times| times.save = begun.elapsed());
    // After that: whoever hears of the end finds the time.
    member.pieces.finish();
    tracing::debug!(device = owner.name(), bytes, times = ?*lock(&member.times), "at rest");
}

/// Takes a state as it comes.
fn load(function: &Function, member: &Member, anew: bool) -> Done {
    let owner = function.owner();
    let text = |error: crate::OwnerError| {
        function.report("loading it", &error);
        error.to_string()
    };
    if anew {
        owner.reset().map_err(text)?;
        // Not all forget a migration by that (newer versions of libvfio-user do not).
        if owner.state().map_err(text)? != State::Running {
            owner.set_state(State::Running).map_err(text)?;
        }
    }
    owner.set_state(State::Resuming).map_err(text)?;
    let (mut bytes, mut took) = (0, Duration::ZERO);
    while let Some(piece) = member.pieces.take().map_err(Broken::reason)? {
        let begun = Instant::now();
        owner.write_state(&piece).map_err(text)?;
        took += begun.elapsed();
        bytes += piece.len() as u64;
    }
    function.arrived(bytes, took);
    // It is told to use it now, so memory that is not all there has to be known by then.
    function.sharer.share(&**owner)?;
    function.show().map_err(text)?;
    owner.set_state(State::Stop).map_err(text)?;
    function.introduce().map_err(text)?;
    let told = member.pieces.finished();
    member.time(|times| (times.load, times.bytes) = (told.map_or(Duration::ZERO, |told| told.elapsed()), bytes));
    Ok(())
}
