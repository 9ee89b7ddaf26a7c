//! A thread that serves somebody, and comes to rest so that another process can go on with that one, who does not notice.
//!
//! ```text
//!   old process, its server's thread              new process, its server's thread
//!   Rest::begin     comes to rest                 Rest::begin     before it serves: it waits
//!   Rest::wait      what it knows   -- over some socket -->  Rest::take
//!                                                 Rest::go_on     serves the client
//! ```
//!
//! Until the new one goes on, the old one can ([`Rest::go_on`]): what [`Rest::wait`] gave is then forgotten, its descriptors are copies.
//! What is at rest, and where, is the server's affair: it looks at [`Rest::is_wanted`] and calls [`Rest::settle`].

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};

use crate::Urgent;

/// A descriptor that the next process needs.
#[derive(Debug)]
pub struct Descriptor {
    /// What it is for.
    pub name: String,
    /// Which one of that name.
    pub index: u32,
    /// A copy of it.
    pub fd: OwnedFd,
}

/// What a server at rest knows.
#[derive(Debug)]
pub struct Rested {
    /// Its state.
    pub state: Vec<u8>,
    /// Of its client.
    pub descriptors: Vec<Descriptor>,
}

/// Gives each descriptor of the process before, by name and index, once.
pub type Claim = Box<dyn FnMut(&str, u32) -> Option<OwnedFd> + Send>;

/// Calls a server that waits for its client.
pub type Call = Arc<dyn Fn() + Send + Sync>;

/// Has a server come to rest, from any other thread.
#[derive(Clone)]
pub struct Rest(Arc<Resting>);

struct Resting {
    wanted: AtomicBool,
    /// Calls the server where it waits for that.
    event: OwnedFd,
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    /// Calls the server where it does not wait for the event.
    call: Option<Call>,
    /// How often it was to go on: whoever rests may see that late, when he is to rest again.
    turn: u64,
    obstacle: Option<String>,
    rested: Option<Result<Rested, String>>,
    order: Option<(Vec<u8>, Claim)>,
    taken: Option<Result<(), String>>,
}

impl std::fmt::Debug for Rest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rest").field("wanted", &self.is_wanted()).finish_non_exhaustive()
    }
}

impl Rest {
    /// For one server.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (wanted, inner, changed) = Default::default();
        Ok(Self(Arc::new(Resting { wanted, event, inner, changed })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the server to come to rest, without waiting for it.
    pub fn begin(&self) {
        let inner = self.lock();
        self.0.wanted.store(true, Ordering::SeqCst);
        let _ = rustix::io::write(&self.0.event, &1_u64.to_ne_bytes());
        if let Some(call) = &inner.call {
            call();
        }
    }

    /// Waits until it is at rest. An error says why it is not. Either way it goes on when it is [told to](Self::go_on).
    pub fn wait(&self, deadline: Instant) -> Result<Rested, String> {
        let what = "its client, or the device, did not come to rest between two messages";
        self.answer(deadline, |inner| inner.rested.take()).unwrap_or_else(|| Err(what.into()))
    }

    /// At rest in a new process: takes what the process before knew.
    pub fn take(&self, state: Vec<u8>, claim: Claim, deadline: Instant) -> Result<(), String> {
        self.lock().order = Some((state, claim));
        self.0.changed.notify_all();
        self.answer(deadline, |inner| inner.taken.take()).unwrap_or_else(|| Err("it was not taken in time".into()))
    }

    fn answer<T>(&self, deadline: Instant, mut take: impl FnMut(&mut Inner) -> Option<T>) -> Option<T> {
        let mut inner = self.lock();
        loop {
            if let Some(answer) = take(&mut inner) {
                return Some(answer);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            inner = self.0.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The server serves on, or begins to.
    pub fn go_on(&self) {
        let mut inner = self.lock();
        self.0.wanted.store(false, Ordering::SeqCst);
        inner.turn += 1;
        (inner.rested, inner.order, inner.taken) = (None, None, None);
        self.0.changed.notify_all();
    }

    /// Why it cannot go over to another process now, if it cannot.
    pub fn obstacle(&self) -> Option<String> {
        self.lock().obstacle.clone()
    }

    /// Server: whether it is to come to rest, or to stay there.
    pub fn is_wanted(&self) -> bool {
        self.0.wanted.load(Ordering::SeqCst)
    }

    /// Server: readable when it may have to come to rest.
    pub fn event(&self) -> &OwnedFd {
        &self.0.event
    }

    /// Server: what has called it is known.
    pub fn heard(&self) {
        let _ = rustix::io::read(&self.0.event, &mut [0; 8]);
    }

    /// Server: how it is called from now on where it does not wait for the event; nothing if it does.
    pub fn call_by(&self, call: Option<Call>) {
        self.lock().call = call;
    }

    /// Server: says whether it can go over; called when that may have changed.
    pub fn note_obstacle(&self, why: Option<String>) {
        let mut inner = self.lock();
        if inner.obstacle != why {
            inner.obstacle = why;
        }
    }

    /// Server: says what it came to, and waits until it is to go on; `take` is what is done with an order.
    pub fn settle(&self, rested: Result<Rested, String>, mut take: impl FnMut(Vec<u8>, Claim) -> Result<(), String>) {
        self.heard();
        // Whoever is served waits for this thread.
        let _urgent = Urgent::new();
        let mut inner = self.lock();
        if !self.is_wanted() {
            // Whoever wanted it has given up.
            return;
        }
        let turn = inner.turn;
        inner.rested = Some(rested);
        self.0.changed.notify_all();
        while self.is_wanted() && inner.turn == turn {
            if let Some((state, claim)) = inner.order.take() {
                drop(inner);
                let taken = take(state, claim);
                inner = self.lock();
                inner.taken = Some(taken);
                self.0.changed.notify_all();
            } else {
                inner = self.0.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

/// Collects copies of descriptors.
#[derive(Debug, Default)]
pub struct Copies(Vec<Descriptor>);

impl Copies {
    /// One more.
    pub fn add(&mut self, name: &str, index: u32, fd: impl AsFd) -> io::Result<()> {
        let fd = fd.as_fd().try_clone_to_owned()?;
        self.0.push(Descriptor { name: name.into(), index, fd });
        Ok(())
    }

    /// All of them.
    pub fn into_inner(self) -> Vec<Descriptor> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    /// A server that has nothing to do: it comes to rest when it is called. How often it did.
    fn serve(rest: Rest, times: u64) -> std::thread::JoinHandle<Vec<u8>> {
        std::thread::spawn(move || {
            let mut taken = Vec::new();
            for n in 0..times {
                let mut events = [rustix::event::PollFd::new(rest.event(), rustix::event::PollFlags::IN)];
                rustix::event::poll(&mut events, None).unwrap();
                let mut copies = Copies::default();
                copies.add("event", 3, rest.event()).unwrap();
                let rested = Rested { state: vec![n as u8], descriptors: copies.into_inner() };
                rest.settle(Ok(rested), |state, mut claim| {
                    taken = state;
                    claim("event", 3).map(drop).ok_or("it is missing".into())
                });
            }
            taken
        })
    }

    #[test]
    fn a_server_rests_until_it_is_to_go_on_and_takes_what_another_one_knew() {
        let rest = Rest::new().unwrap();
        let server = serve(rest.clone(), 2);
        rest.begin();
        let first = rest.wait(soon()).unwrap();
        assert_eq!((first.state, first.descriptors[0].index), (vec![0], 3));
        rest.go_on();
        rest.begin();
        let second = rest.wait(soon()).unwrap();
        assert_eq!(second.state, [1]);
        let missing = rest.take(vec![9], Box::new(|_, _| None), soon()).unwrap_err();
        assert_eq!(missing, "it is missing");
        let mut all = second.descriptors;
        rest.take(vec![8], Box::new(move |_, _| all.pop().map(|one| one.fd)), soon()).unwrap();
        assert!(!server.is_finished(), "it goes on by itself");
        rest.go_on();
        assert_eq!(server.join().unwrap(), [8]);
    }

    #[test]
    fn nobody_waits_for_a_server_for_ever_and_one_that_is_late_does_not_rest() {
        let rest = Rest::new().unwrap();
        rest.begin();
        let why = rest.wait(Instant::now()).unwrap_err();
        assert!(why.contains("did not come to rest"), "{why}");
        assert!(rest.take(Vec::new(), Box::new(|_, _| None), Instant::now()).is_err());
        rest.go_on();
        // It returns at once.
        serve(rest.clone(), 1).join().unwrap();
        rest.note_obstacle(Some("a reason".into()));
        assert_eq!(rest.obstacle().as_deref(), Some("a reason"));
    }
}
