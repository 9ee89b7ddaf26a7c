//! The thread on which a device of this process serves its rings.
//!
//! - [`Handler`] is what a device does with requests; it lives on the thread.
//! - [`Worker`] owns the thread and gives it its orders. A device forwards the steps of [`crate::Device`] to it.
//!
//! The thread waits for the driver (kicks), for the handler's medium, for ends of interrupts of a pin, and for orders. At
//! rest it waits for orders alone, and touches no guest memory. It is made with the device, so that nothing is made in a
//! switchover.
#![expect(unsafe_code, reason = "polls descriptors that are open while they are polled")]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use wherry_state::UnitError;

use crate::chain::Broken;
use crate::device::{Activation, Interrupts, Position, Serving};
use crate::ring::Ring;

/// What a device does with requests.
pub trait Handler: Send + 'static {
    /// The rings are new to it. Takes up what was carried here.
    fn begin(&mut self, rings: &mut [Ring], features: u64) -> Result<(), Broken>;

    /// Takes requests, as many as it can work on. Those that are done at once are given back at once.
    fn serve(&mut self, rings: &mut [Ring]) -> Result<(), Broken>;

    /// Gives back requests that are done.
    fn reap(&mut self, rings: &mut [Ring]) -> Result<(), Broken>;

    /// Whether it waits for the driver to make more available in this ring. A ring of buffers for what comes from outside
    /// is mostly full, and of interest only when it is empty.
    fn waits(&self, ring: u16) -> bool;

    /// Whether it would take more requests if there were any.
    fn has_room(&self) -> bool;

    /// Requests that it has taken and not given back, and that may still have an effect.
    fn in_flight(&self) -> usize;

    /// Readable when there is something to reap, or to take from outside; none if there is nothing to wait for.
    fn event(&self) -> Option<RawFd>;

    /// Takes back what has not begun: it is carried. What has begun goes on.
    fn cancel(&mut self);

    /// Everything that was done reaches its medium.
    fn settle(&mut self) -> io::Result<()>;

    /// The driver has reset the device: nothing is carried.
    fn forget(&mut self);
}

#[derive(Default)]
struct Control {
    // Orders.
    given: Option<Activation>,
    reset: bool,
    hold: bool,
    settle: bool,
    cancel: bool,
    quit: bool,
    // Answers.
    rests: bool,
    failed: Option<String>,
    in_flight: usize,
    positions: Vec<(u16, Position)>,
}

struct Shared {
    control: Mutex<Control>,
    answered: Condvar,
    /// Wakes the thread for orders.
    wake: EventFd,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, change: impl FnOnce(&mut Control)) {
        change(&mut self.lock());
        // It fails only if the counter is full, and then the thread is awake already.
        let _ = self.wake.write(1);
    }

    /// Waits until the answer is there; false if it is not by the deadline.
    fn wait(&self, deadline: Option<Instant>, there: impl Fn(&Control) -> bool) -> bool {
        let mut control = self.lock();
        while !there(&control) {
            control = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => self.answered.wait(control).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return false,
                Some(left) => self.answered.wait_timeout(control, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
        true
    }
}

/// The thread of one device.
pub struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread; a name has at most 15 bytes.
    pub fn spawn(name: String, handler: impl Handler) -> io::Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let shared = Arc::new(Shared { control: Mutex::default(), answered: Condvar::new(), wake });
        let its = shared.clone();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            Thread { shared: its, handler, rings: Vec::new(), interrupts: None, broken: false }.run();
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// See [`crate::Device::activate`].
    pub fn activate(&self, activation: Activation) {
        self.shared.order(|control| control.given = Some(activation));
    }

    /// See [`crate::Device::reset`].
    pub fn reset(&self) {
        self.shared.order(|control| control.reset = true);
        self.shared.wait(None, |control| !control.reset || control.quit);
    }

    fn rest(&self, deadline: Instant) -> Result<(), UnitError> {
        if !self.shared.wait(Some(deadline), |control| control.rests) {
            let in_flight = self.shared.lock().in_flight;
            return Err(UnitError::Deadline(format!("{in_flight} requests are under way")));
        }
        match self.shared.lock().failed.take() {
            Some(error) => Err(UnitError::failed(error)),
            None => Ok(()),
        }
    }

    /// Takes no more requests, and waits until those under way have ended; what was written may be on its way to the medium.
    pub fn finish(&self, deadline: Instant) -> Result<(), UnitError> {
        self.quiesce();
        self.rest(deadline)
    }

    /// See [`crate::Device::start`].
    pub fn start(&self) {
        self.shared.order(|control| {
            control.hold = false;
            control.settle = false;
            control.cancel = false;
            control.rests = false;
        });
    }
}

impl Serving for Worker {
    fn quiesce(&self) {
        self.shared.order(|control| control.hold = true);
    }

    fn drain(&self, deadline: Instant) -> Result<(), UnitError> {
        self.shared.order(|control| {
            control.hold = true;
            control.settle = true;
            control.rests = false;
        });
        self.rest(deadline)
    }

    /// At half of the time it takes back what has not begun.
    fn stop(&self, deadline: Instant) -> Result<(), UnitError> {
        self.quiesce();
        let half = Instant::now() + deadline.saturating_duration_since(Instant::now()) / 2;
        if !self.shared.wait(Some(half), |control| control.rests) {
            self.shared.order(|control| control.cancel = true);
        }
        self.rest(deadline)
    }

    fn positions(&self) -> Vec<(u16, Position)> {
        self.shared.lock().positions.clone()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.order(|control| control.quit = true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a device thread panicked");
        }
    }
}

struct Thread<H> {
    shared: Arc<Shared>,
    handler: H,
    rings: Vec<Ring>,
    interrupts: Option<Interrupts>,
    /// The driver has broken a rule: nothing is served until a reset.
    broken: bool,
}

/// What the thread does next.
enum Next {
    /// Serve, and wait for everything.
    Serve,
    /// Wait for what is under way, then rest.
    Finish {
        settle: bool,
    },
    Quit,
}

impl<H: Handler> Thread<H> {
    fn run(mut self) {
        loop {
            match self.orders() {
                Next::Quit => break,
                Next::Serve => {
                    if self.serve() {
                        self.wait(true);
                    }
                }
                Next::Finish { settle } => {
                    self.reap();
                    if self.handler.in_flight() > 0 {
                        self.wait(false);
                        continue;
                    }
                    let failed = if settle { self.handler.settle().err() } else { None };
                    self.rest(settle, failed);
                }
            }
        }
        // What is under way may write guest memory, which goes after this.
        self.handler.cancel();
        while self.handler.in_flight() > 0 {
            self.reap();
            if self.handler.in_flight() > 0 {
                let mut list = [self.handler.event().map_or(-1, |fd| fd)].map(readable);
                poll(&mut list);
            }
        }
        self.shared.lock().reset = false;
        self.shared.answered.notify_all();
    }

    fn orders(&mut self) -> Next {
        let _ = self.shared.wake.read();
        let mut control = self.shared.lock();
        if control.quit {
            return Next::Quit;
        }
        control.in_flight = self.handler.in_flight();
        if control.reset {
            if self.handler.in_flight() > 0 {
                return Next::Finish { settle: false };
            }
            self.rings.clear();
            self.handler.forget();
            (self.interrupts, self.broken) = (None, false);
            control.given = None;
            control.reset = false;
            self.shared.answered.notify_all();
        }
        if control.hold {
            if std::mem::take(&mut control.cancel) {
                self.handler.cancel();
            }
            return Next::Finish { settle: std::mem::take(&mut control.settle) };
        }
        if let Some(given) = control.given.take() {
            // What follows reads guest memory, which may have to come first.
            drop(control);
            self.begin(given);
        }
        Next::Serve
    }

    fn begin(&mut self, given: Activation) {
        let features = given.features;
        self.interrupts = Some(given.interrupts.clone());
        match Ring::all(given) {
            Ok(rings) => self.rings = rings,
            Err(error) => return self.breaks(&error),
        }
        let begun = self.handler.begin(&mut self.rings, features);
        self.judge(begun);
    }

    /// Takes and gives back until there is no more to do. False if there is, because an order has come.
    fn serve(&mut self) -> bool {
        loop {
            self.reap();
            if self.broken || self.rings.is_empty() {
                return true;
            }
            let served = self.turn();
            match served {
                Ok(true) if self.handler.has_room() => {}
                Ok(_) => return true,
                Err(error) => {
                    self.breaks(&error);
                    return true;
                }
            }
            let control = self.shared.lock();
            if control.hold || control.reset || control.quit {
                return false;
            }
        }
    }

    /// One look at all rings; whether more has come meanwhile.
    fn turn(&mut self) -> Result<bool, Broken> {
        for ring in &mut self.rings {
            if self.handler.waits(ring.index()) {
                ring.hush()?;
            }
        }
        self.handler.serve(&mut self.rings)?;
        self.handler.reap(&mut self.rings)?;
        let mut more = false;
        for ring in &mut self.rings {
            ring.notify()?;
            if self.handler.waits(ring.index()) {
                more |= ring.listen()?;
            }
        }
        Ok(more)
    }

    fn reap(&mut self) {
        let reaped = self.handler.reap(&mut self.rings);
        let told = reaped.and_then(|()| self.rings.iter_mut().try_for_each(Ring::notify));
        self.judge(told);
    }

    fn judge(&mut self, result: Result<(), Broken>) {
        if let Err(error) = result {
            self.breaks(&error);
        }
    }

    fn breaks(&mut self, why: &Broken) {
        self.broken = true;
        if let Some(interrupts) = &self.interrupts {
            interrupts.broken(why);
        }
    }

    /// At rest until there are other orders.
    fn rest(&mut self, settled: bool, failed: Option<io::Error>) {
        let mut control = self.shared.lock();
        if !control.hold || control.settle && !settled {
            return;
        }
        control.in_flight = 0;
        control.positions = self.rings.iter().map(|ring| (ring.index(), ring.position())).collect();
        if let Some(error) = failed {
            control.failed = Some(format!("what was written cannot be brought to its medium: {error}"));
        }
        control.rests = true;
        self.shared.answered.notify_all();
        drop(control);
        poll(&mut [readable(self.shared.wake.as_raw_fd())]);
    }

    /// Waits for orders, for what is under way, and, if it serves, for the driver.
    fn wait(&mut self, serves: bool) {
        let mut list = vec![readable(self.shared.wake.as_raw_fd())];
        // A broken device takes nothing new, from outside neither.
        if !self.broken || self.handler.in_flight() > 0 {
            list.extend(self.handler.event().map(readable));
        }
        let pin = self.interrupts.as_ref().and_then(|interrupts| interrupts.pin());
        let pin_at = pin.map(|pin| {
            list.push(readable(pin.resample_fd()));
            list.len() - 1
        });
        // With no room there is nothing a kick could start.
        if serves && !self.broken && self.handler.has_room() {
            let waited_for = self.rings.iter().filter(|ring| self.handler.waits(ring.index()));
            list.extend(waited_for.map(|ring| readable(ring.kick().as_raw_fd())));
        }
        poll(&mut list);
        if let (Some(pin), Some(at)) = (pin, pin_at)
            && list[at].revents != 0
        {
            pin.resample();
        }
    }
}

fn readable(fd: RawFd) -> libc::pollfd {
    libc::pollfd { fd, events: libc::POLLIN, revents: 0 }
}

/// Waits until one of them is readable; a negative descriptor never is.
fn poll(list: &mut [libc::pollfd]) {
    // SAFETY: the list is valid for the call, which only writes `revents`; the descriptors belong to the caller, and a bad
    // one would only be reported.
    unsafe { libc::poll(list.as_mut_ptr(), list.len() as libc::nfds_t, -1) };
}
