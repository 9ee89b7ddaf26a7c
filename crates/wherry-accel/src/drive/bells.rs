//! Bells as eventfds, and the thread that listens to them and polls.
//!
//! The client has the same eventfds, and may do with them what it wants: drain them, fill them, have them block. So they are never read or
//! written here: a signal is seen by its edge.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, epoll, eventfd};

use crate::abi::BELLS;
use crate::device::{Device, Look, Told};

/// Every bell there is.
const ALL: u32 = (1 << BELLS) - 1;

/// Looks at tails between two looks at the bells: those cost a system call.
const ROUNDS: u32 = 64;

/// Number of the event that is no bell.
const WAKE: u64 = BELLS as u64;

/// The eventfds of a device's bells. They stay the same while devices behind them are made anew.
#[derive(Clone, Debug)]
pub struct Bells(Arc<Vec<Arc<OwnedFd>>>);

fn event() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Adds one to an eventfd of ours. One that is full is signalled already.
fn signal(event: &OwnedFd) {
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

impl Bells {
    /// Makes them.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new((0..BELLS).map(|_| event().map(Arc::new)).collect::<io::Result<_>>()?)))
    }

    /// Those of a client that has them already; `make` gives each, by number.
    pub fn of<E>(make: impl FnMut(u32) -> Result<Arc<OwnedFd>, E>) -> Result<Self, E> {
        Ok(Self(Arc::new((0..BELLS).map(make).collect::<Result<_, _>>()?)))
    }

    /// A new one.
    pub fn event() -> io::Result<OwnedFd> {
        event()
    }

    /// The eventfds, by number of the bell.
    pub fn descriptors(&self) -> &[Arc<OwnedFd>] {
        &self.0
    }
}

/// What the thread and its owner share.
#[derive(Debug)]
struct Shared {
    device: Arc<Device>,
    /// Open as long as they are listened to.
    _bells: Bells,
    /// How long a ring is polled after the latest news.
    patience: Duration,
    epoll: OwnedFd,
    wake: OwnedFd,
    over: AtomicBool,
    /// Bells that were rung without their eventfds, one bit each.
    rung: AtomicU32,
    /// The device was resumed: what was rung and what was asleep is not known.
    resumed: AtomicBool,
}

/// The thread that listens, `wherry-accel-bells`. It ends with this value.
#[derive(Debug)]
pub struct Listener {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    /// Starts it. `patience` is how long a polled ring is looked at after the latest descriptor.
    pub fn start(device: Arc<Device>, bells: Bells, patience: Duration) -> io::Result<Self> {
        let (epoll, wake) = (epoll::create(epoll::CreateFlags::CLOEXEC)?, event()?);
        let add = |event: &OwnedFd, number: u64, how: epoll::EventFlags| {
            epoll::add(&epoll, event, epoll::EventData::new_u64(number), epoll::EventFlags::IN | how)
        };
        for (number, event) in (0..).zip(bells.descriptors()) {
            add(event, number, epoll::EventFlags::ET)?;
        }
        add(&wake, WAKE, epoll::EventFlags::empty())?;
        let (over, rung, resumed) = (AtomicBool::new(false), AtomicU32::new(0), AtomicBool::new(true));
        let shared = Arc::new(Shared { device, _bells: bells, patience, epoll, wake, over, rung, resumed });
        let its = shared.clone();
        let thread = std::thread::Builder::new().name("wherry-accel-bells".into()).spawn(move || its.listen())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Rings a bell without its eventfd; a number that is none harms nobody.
    pub fn ring(&self, bell: u32) {
        if bell < BELLS {
            self.shared.rung.fetch_or(1 << bell, Ordering::SeqCst);
            signal(&self.shared.wake);
        }
    }

    /// To be called when the device has been resumed: all tails are looked at.
    pub fn resumed(&self) {
        self.shared.resumed.store(true, Ordering::SeqCst);
        signal(&self.shared.wake);
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        signal(&self.shared.wake);
        if let Some(thread) = self.thread.take() {
            // If it panicked it has said so; there is nobody to hand it to here.
            let _ = thread.join();
        }
    }
}

/// A ring that is being polled.
struct Polled {
    told: Told,
    news: Instant,
}

impl Shared {
    fn listen(&self) {
        let mut awake: Vec<Polled> = Vec::new();
        while !self.over.load(Ordering::SeqCst) {
            let resumed = self.resumed.swap(false, Ordering::SeqCst);
            // While the device is stopped there is nothing to be seen; `resumed` ends that.
            let rung = self.wait(!resumed && (awake.is_empty() || self.device.is_stopped()));
            let rung = if resumed { ALL } else { rung };
            let told = if rung == 0 { Vec::new() } else { self.device.told(rung) };
            for told in told {
                let news = self.device.look(&told) == Look::News;
                // After a move it is not known whether its client still counts on being looked at.
                if told.polled() && (news || resumed) {
                    self.keep_awake(&mut awake, told);
                }
            }
            for _ in 0..ROUNDS {
                if awake.is_empty() {
                    break;
                }
                awake.retain_mut(|polled| self.poll(polled));
                std::hint::spin_loop();
            }
            if !awake.is_empty() {
                // Who is to fill a ring may need this processor.
                std::thread::yield_now();
            }
        }
    }

    /// Bells that were rung, one bit each; waits for one if it is told to.
    fn wait(&self, block: bool) -> u32 {
        if block {
            // The epoll descriptor is readable when one of its events is. A signal ends the wait early, and nothing is rung.
            let _ = rustix::event::poll(&mut [PollFd::new(&self.epoll, PollFlags::IN)], None);
        }
        let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };
            BELLS as usize + 1];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let count = epoll::wait(&self.epoll, &mut events[..], Some(&now)).unwrap_or(0);
        let mut rung = 0;
        for event in &events[..count] {
            let number = event.data.u64();
            match number {
                // Emptied before anything is looked at: what comes later is another event.
                WAKE => drop(rustix::io::read(&self.wake, &mut [0; 8])),
                number => rung |= 1 << number,
            }
        }
        rung | self.rung.swap(0, Ordering::SeqCst)
    }

    fn keep_awake(&self, awake: &mut Vec<Polled>, told: Told) {
        let news = Instant::now();
        match awake.iter_mut().find(|polled| polled.told == told) {
            Some(polled) => polled.news = news,
            None => awake.push(Polled { told, news }),
        }
        self.device.say_asleep(&told, false);
    }

    /// One look at a ring; false when it is left to its bell.
    fn poll(&self, polled: &mut Polled) -> bool {
        match self.device.look(&polled.told) {
            Look::Gone => return false,
            Look::News => polled.news = Instant::now(),
            Look::Nothing => {}
        }
        if polled.news.elapsed() < self.patience {
            return true;
        }
        if !self.device.say_asleep(&polled.told, true) {
            // Stopped: it is looked at when the device goes on.
            return true;
        }
        // What was put in before the client could know. Its own order is the other way round: tail, then this word.
        match self.device.look(&polled.told) {
            Look::News => {
                polled.news = Instant::now();
                self.device.say_asleep(&polled.told, false);
                true
            }
            Look::Nothing | Look::Gone => false,
        }
    }
}
