//! The threads that send: one for each data channel.
//!
//! A thread holds its channel's lock while it sends a round and no longer, so that between rounds whoever conducts the
//! journey may use a channel itself: a handful of pages is sent faster than a thread is woken.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};
use wherry_stream::{Channel, Closer, Meter};

use super::round::Round;
use crate::error::Cause;
use crate::journey::lock;
use crate::priority::be_patient;

type Outcome = (usize, Result<(), Cause>);

/// All sending threads of a journey.
pub(crate) struct Senders {
    channels: Vec<Arc<Mutex<Channel>>>,
    closers: Vec<Closer>,
    meters: Vec<Meter>,
    orders: Vec<Sender<Arc<Round>>>,
    outcomes: Receiver<Outcome>,
    /// Readable while an outcome waits.
    news: Arc<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
    /// Threads that work on the present round.
    busy: usize,
    round: Option<Arc<Round>>,
    /// A channel gave its round up because another one failed; which one did will be known soon.
    given_up: Option<Cause>,
}

impl Senders {
    pub(crate) fn new(channels: Vec<Channel>) -> Result<Self, Cause> {
        let os = |doing| move |source| Cause::Os { doing, source };
        let news = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| os("making an event descriptor")(e.into()))?;
        let (outcome, outcomes) = channel();
        let mut senders = Self {
            closers: channels.iter().map(Channel::closer).collect(),
            meters: channels.iter().map(|c| c.writer.meter()).collect(),
            channels: channels.into_iter().map(|c| Arc::new(Mutex::new(c))).collect(),
            orders: vec![],
            outcomes,
            news: Arc::new(news),
            threads: vec![],
            busy: 0,
            round: None,
            given_up: None,
        };
        for (n, channel) in senders.channels.iter().enumerate() {
            let (order, orders) = std::sync::mpsc::channel::<Arc<Round>>();
            let (channel, outcome, news) = (channel.clone(), outcome.clone(), senders.news.clone());
            let thread = std::thread::Builder::new()
                .name(format!("wherry-send-{n}"))
                .spawn(move || work(n, &channel, &orders, &outcome, &news))
                .map_err(os("starting a sending thread"))?;
            senders.orders.push(order);
            senders.threads.push(thread);
        }
        Ok(senders)
    }

    /// Handles of all channels.
    pub(crate) fn closers(&self) -> &[Closer] {
        &self.closers
    }

    pub(crate) fn len(&self) -> usize {
        self.channels.len()
    }

    /// A channel, for use between rounds.
    pub(crate) fn channel(&self, n: usize) -> MutexGuard<'_, Channel> {
        lock(&self.channels[n])
    }

    /// Has the first `channels` threads send a round. [`finished`](Self::finished) tells when they have.
    pub(crate) fn begin(&mut self, round: &Arc<Round>, channels: usize) {
        for order in self.orders.iter().take(channels) {
            // A thread that has ended has left its outcome.
            if order.send(round.clone()).is_ok() {
                self.busy += 1;
            }
        }
        self.round = Some(round.clone());
    }

    /// Readable when [`finished`](Self::finished) has news.
    pub(crate) fn news(&self) -> BorrowedFd<'_> {
        self.news.as_fd()
    }

    /// Whether all threads have done with the round; an error if one failed.
    pub(crate) fn finished(&mut self) -> Result<bool, Cause> {
        let _ = rustix::io::read(&self.news, &mut [0; 8]);
        loop {
            match self.outcomes.try_recv() {
                Ok((_, outcome)) => {
                    self.busy -= 1;
                    match outcome {
                        Ok(()) => {}
                        Err(cause @ Cause::Cancelled) => self.given_up = Some(cause),
                        Err(cause) => return Err(cause),
                    }
                }
                Err(_) if self.busy == 0 => return self.given_up.take().map_or(Ok(true), Err),
                Err(_) => {
                    // A thread that is gone without a word has panicked.
                    if let Some(thread) = self.threads.iter().find(|t| t.is_finished()) {
                        return Err(Cause::Panicked(thread.thread().name().unwrap_or("?").into()));
                    }
                    return Ok(false);
                }
            }
        }
    }

    /// Bytes that have been handed to the kernel, over all channels.
    pub(crate) fn wire_bytes(&self) -> u64 {
        self.meters.iter().map(Meter::bytes).sum()
    }

    /// Bytes that lie in the kernel and have not reached the peer.
    pub(crate) fn unsent(&self) -> u64 {
        self.closers.iter().filter_map(|closer| closer.unsent().ok()).sum()
    }
}

impl Drop for Senders {
    fn drop(&mut self) {
        if let Some(round) = &self.round {
            round.give_up();
        }
        self.closers.iter().for_each(Closer::close);
        self.orders.clear();
        for thread in self.threads.drain(..) {
            if let Err(panic) = thread.join() {
                tracing::error!(?panic, "a sending thread panicked");
            }
        }
    }
}

fn work(n: usize, channel: &Mutex<Channel>, orders: &Receiver<Arc<Round>>, outcome: &Sender<Outcome>, news: &OwnedFd) {
    while let Ok(round) = orders.recv() {
        if round.follows() {
            be_patient();
        }
        let mut channel = lock(channel);
        let result = round.send(&mut channel).and_then(|()| round.await_acknowledgement(&mut channel));
        drop(channel);
        let failed = result.is_err();
        if outcome.send((n, result)).is_err() {
            return;
        }
        let _ = rustix::io::write(news, &1u64.to_ne_bytes());
        if failed {
            return;
        }
    }
}
