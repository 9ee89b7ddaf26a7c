//! The threads that receive: one for each data channel.
//!
//! Between rounds a thread waits for its channel *or* for being told to let go of it, so that in the switchover whoever
//! conducts the journey can read the last pages itself: waking another thread would cost the guest time.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use wherry_stream::message::Body;
use wherry_stream::{Ack, Channel, ChannelStats, Closer, Frame, Meter};

use super::place::Place;
use crate::error::Cause;
use crate::journey::lock;
use crate::priority::be_patient;

/// What a receiving thread tells.
pub(crate) enum News {
    /// It has received a round, and acknowledges it.
    Round(u32),
    /// It can go on no more.
    Failed(Cause),
    /// It has let go of its channel.
    Released(Box<Channel>),
}

/// What the threads share.
struct Shared {
    place: Arc<Place>,
    quit: AtomicBool,
    news: Sender<News>,
    bell: OwnedFd,
}

/// One thread's side of the hand-over of its channel.
struct Slot {
    /// Readable when the thread shall let go of its channel, or quit.
    wake: OwnedFd,
    wanted: AtomicBool,
    back: Mutex<Option<Channel>>,
    came_back: Condvar,
    stats: Mutex<ChannelStats>,
}

/// All receiving threads of a journey.
pub(crate) struct Receivers {
    shared: Arc<Shared>,
    slots: Vec<Arc<Slot>>,
    closers: Vec<Closer>,
    meters: Vec<Meter>,
    news: Receiver<News>,
    threads: Vec<JoinHandle<()>>,
}

impl Receivers {
    pub(crate) fn new(channels: Vec<Channel>, place: Arc<Place>) -> Result<Self, Cause> {
        let os = |doing| move |source| Cause::Os { doing, source };
        let event = || {
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|e| os("making an event descriptor")(e.into()))
        };
        let (sender, news) = channel();
        let mut receivers = Self {
            shared: Arc::new(Shared { place, quit: AtomicBool::new(false), news: sender, bell: event()? }),
            slots: vec![],
            closers: channels.iter().map(Channel::closer).collect(),
            meters: channels.iter().map(|c| c.reader.meter()).collect(),
            news,
            threads: vec![],
        };
        for (n, channel) in channels.into_iter().enumerate() {
            let slot = Arc::new(Slot {
                wake: event()?,
                wanted: AtomicBool::new(false),
                back: Mutex::new(None),
                came_back: Condvar::new(),
                stats: Mutex::default(),
            });
            let (shared, mine) = (receivers.shared.clone(), slot.clone());
            let thread = std::thread::Builder::new()
                .name(format!("wherry-recv-{n}"))
                .spawn(move || work(&shared, &mine, channel))
                .map_err(os("starting a receiving thread"))?;
            receivers.slots.push(slot);
            receivers.threads.push(thread);
        }
        Ok(receivers)
    }

    /// Readable when [`next`](Self::next) has something.
    pub(crate) fn bell(&self) -> BorrowedFd<'_> {
        self.shared.bell.as_fd()
    }

    /// What the threads told, if they did.
    pub(crate) fn next(&self) -> Option<News> {
        let _ = rustix::io::read(&self.shared.bell, &mut [0; 8]);
        let news = self.news.try_recv().ok();
        if news.is_some() {
            // There may be more.
            let _ = rustix::io::write(&self.shared.bell, &1u64.to_ne_bytes());
        }
        news
    }

    /// Asks the first thread to let go of its channel; [`News::Released`] brings it.
    pub(crate) fn want_first(&self) {
        if let Some(slot) = self.slots.first() {
            slot.wanted.store(true, Ordering::SeqCst);
            let _ = rustix::io::write(&slot.wake, &1u64.to_ne_bytes());
        }
    }

    /// Gives the channel back to the first thread.
    pub(crate) fn give_back(&self, mut channel: Channel) {
        channel.reader.set_idle_limit(BETWEEN_ROUNDS);
        channel.reader.set_spin(Duration::ZERO);
        if let Some(slot) = self.slots.first() {
            self.set_stats(0, channel.reader.stats());
            *lock(&slot.back) = Some(channel);
            slot.came_back.notify_one();
        }
    }

    /// What channel `n` had received at its last barrier.
    pub(crate) fn stats(&self, n: usize) -> ChannelStats {
        *lock(&self.slots[n].stats)
    }

    pub(crate) fn set_stats(&self, n: usize, stats: ChannelStats) {
        *lock(&self.slots[n].stats) = stats;
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Bytes received, over all channels.
    pub(crate) fn wire_bytes(&self) -> u64 {
        self.meters.iter().map(Meter::bytes).sum()
    }
}

impl Drop for Receivers {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::SeqCst);
        self.closers.iter().for_each(Closer::close);
        for slot in &self.slots {
            let _ = rustix::io::write(&slot.wake, &1u64.to_ne_bytes());
            let _guard = lock(&slot.back);
            slot.came_back.notify_all();
        }
        for thread in self.threads.drain(..) {
            if let Err(panic) = thread.join() {
                tracing::error!(?panic, "a receiving thread panicked");
            }
        }
    }
}

/// Nothing comes between rounds for as long as the source likes; whoever conducts watches over its signs of life.
const BETWEEN_ROUNDS: Duration = Duration::from_secs(24 * 3600);

fn work(shared: &Shared, slot: &Slot, mut channel: Channel) {
    let tell = |news| {
        let _ = shared.news.send(news);
        let _ = rustix::io::write(&shared.bell, &1u64.to_ne_bytes());
    };
    channel.reader.set_idle_limit(BETWEEN_ROUNDS);
    loop {
        match between_rounds(shared, slot, &channel) {
            Ok(Next::Read) => {}
            Ok(Next::Quit) => return,
            Ok(Next::Release) => {
                tell(News::Released(Box::new(channel)));
                let mut back = lock(&slot.back);
                channel = loop {
                    if shared.quit.load(Ordering::SeqCst) {
                        return;
                    }
                    match back.take() {
                        Some(channel) => break channel,
                        None => back = slot.came_back.wait(back).unwrap_or_else(|e| e.into_inner()),
                    }
                };
                continue;
            }
            Err(cause) => return tell(News::Failed(cause)),
        }
        if shared.place.is_following() {
            be_patient();
        }
        match receive_round(&shared.place, &mut channel) {
            Ok(round) => {
                // Before the acknowledgement, so that whoever knows of the barrier finds them.
                *lock(&slot.stats) = channel.reader.stats();
                // Told before it is acknowledged: whoever hears what the source does next has the news, too.
                tell(News::Round(round));
                if let Err(cause) = shared.place.flush_state().and_then(|()| acknowledge(&mut channel, round)) {
                    return tell(News::Failed(cause));
                }
            }
            Err(cause) => return tell(News::Failed(cause)),
        }
    }
}

enum Next {
    Read,
    Release,
    Quit,
}

fn between_rounds(shared: &Shared, slot: &Slot, channel: &Channel) -> Result<Next, Cause> {
    loop {
        if shared.quit.load(Ordering::SeqCst) {
            return Ok(Next::Quit);
        }
        if slot.wanted.swap(false, Ordering::SeqCst) {
            return Ok(Next::Release);
        }
        let mut fds = [PollFd::new(&channel.reader, PollFlags::IN), PollFd::new(&slot.wake, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Cause::Os { doing: "waiting for pages", source: e.into() }),
        }
        if !fds[1].revents().is_empty() {
            let _ = rustix::io::read(&slot.wake, &mut [0; 8]);
        } else if !fds[0].revents().is_empty() {
            return Ok(Next::Read);
        }
    }
}

/// Receives until the barrier of a round: its number.
pub(crate) fn receive_round(place: &Place, channel: &mut Channel) -> Result<u32, Cause> {
    loop {
        let doing = "receiving pages";
        match channel.reader.read_frame().map_err(|source| Cause::Stream { doing, source })? {
            Frame::Pages { extents, .. } => place.receive(channel, &extents)?,
            Frame::RoundEnd(end) => return Ok(end.round),
            Frame::Message { body, .. } if matches!(*body, Body::UnitState(_)) => {
                if let Body::UnitState(state) = *body {
                    place.take_state(state)?;
                }
            }
            other => {
                let what = format!("{:?} frame on a data channel", other.kind());
                return Err(Cause::Protocol { peer: "source", what });
            }
        }
    }
}

fn acknowledge(channel: &mut Channel, round: u32) -> Result<(), Cause> {
    let stats = channel.reader.stats();
    let ack = Ack { frames: stats.frames, bytes: stats.bytes, round: Some(round), checksum: stats.checksum };
    channel.writer.write_ack(ack).map_err(|source| Cause::Stream { doing: "acknowledging a round", source })
}
