//! The thread that moves bytes between the chip and the outside. It waits in `poll` for everything at once: the guest
//! (by an eventfd), input, room for output, and new clients.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Shared;
use super::endpoint::{Client, Endpoint};

/// `poll` promises room for this much in a pipe (PIPE_BUF).
const CHUNK: usize = 4096;
/// Most input that is kept when a client leaves before the guest has read it.
const LAST_INPUT: usize = 64 << 10;
/// How long the end waits for the outside to take what is left.
const FLUSH: Duration = Duration::from_secs(1);

pub(super) fn spawn(shared: Arc<Shared>, endpoint: Endpoint) -> io::Result<JoinHandle<()>> {
    let console = Console { shared, endpoint, input: VecDeque::new(), outgoing: VecDeque::new() };
    std::thread::Builder::new().name("serial".into()).spawn(move || console.run())
}

struct Console {
    shared: Arc<Shared>,
    endpoint: Endpoint,
    /// Read from outside, not yet taken by the chip.
    input: VecDeque<u8>,
    /// Taken from the buffer, not yet taken by the outside.
    outgoing: VecDeque<u8>,
}

/// Who has a descriptor in `poll`.
#[derive(Clone, Copy)]
enum Who {
    Input,
    Output,
    Client,
    Listener,
}

/// What `poll` reported.
#[derive(Clone, Copy, Default)]
struct Ready {
    input: bool,
    output: bool,
    listener: bool,
    /// The client has closed its end.
    gone: bool,
}

impl Console {
    fn run(mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            self.shared.rest_if_wanted(&mut self.input, &mut self.outgoing, self.endpoint.escaping());
            if self.shared.stop.load(Ordering::Acquire) {
                // What it rested with may be the predecessor's.
                break;
            }
            self.feed();
            match self.wait(None) {
                Ok(ready) => self.serve(ready),
                Err(error) => {
                    // Out of memory, at worst. The port stays silent; the guest goes on.
                    tracing::error!("serial port: waiting for input and output: {error}");
                    return;
                }
            }
        }
        if self.shared.registry.succeeds() {
            // The predecessor still has the outside, and delivers what is left.
            return;
        }
        let deadline = Instant::now() + FLUSH;
        while self.has_output() && Instant::now() < deadline {
            match self.wait(Some(deadline)) {
                Ok(ready) if ready.gone => return,
                Ok(ready) if ready.output => self.write(),
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }

    /// Gives the chip what it takes.
    fn feed(&mut self) {
        if !self.input.is_empty() {
            let taken = self.shared.feed(self.input.make_contiguous());
            self.input.drain(..taken);
        }
    }

    /// Whether there is something to write, and someone to write it to.
    fn has_output(&self) -> bool {
        let pending = !self.outgoing.is_empty() || !self.shared.output.is_empty();
        pending
            && match &self.endpoint {
                Endpoint::Streams { output, .. } => output.is_some(),
                Endpoint::Socket { client, .. } => client.is_some(),
                Endpoint::Null => true,
            }
    }

    fn wait(&self, deadline: Option<Instant>) -> io::Result<Ready> {
        // At the end only output counts.
        let last = deadline.is_some();
        let writes = self.has_output();
        // More input is read when the chip has taken what was read before.
        let reads = self.input.is_empty() && !last;
        let mut fds: Vec<(BorrowedFd<'_>, PollFlags, Who)> = Vec::with_capacity(4);
        let flag = |yes: bool, flag| if yes { flag } else { PollFlags::empty() };
        match &self.endpoint {
            Endpoint::Streams { input, output, .. } => {
                if let Some(input) = input.as_ref().filter(|_| reads) {
                    fds.push((input.as_fd(), PollFlags::IN, Who::Input));
                }
                if let Some(output) = output.as_ref().filter(|_| writes) {
                    fds.push((output.as_fd(), PollFlags::OUT, Who::Output));
                }
            }
            Endpoint::Socket { listener, client, .. } => {
                if !last {
                    fds.push((listener.as_fd(), PollFlags::IN, Who::Listener));
                }
                if let Some(client) = client {
                    let flags = flag(reads && client.sends, PollFlags::IN) | flag(writes, PollFlags::OUT);
                    fds.push((client.stream.as_fd(), flags, Who::Client));
                }
            }
            Endpoint::Null if writes => return Ok(Ready { output: true, ..Ready::default() }),
            Endpoint::Null => {}
        }
        let event = &*self.shared.wake.event;
        let mut polled = vec![PollFd::from_borrowed_fd(borrow(event), PollFlags::IN)];
        polled.extend(fds.iter().map(|(fd, flags, _)| PollFd::from_borrowed_fd(*fd, *flags)));
        let timeout = deadline
            .map(|d| d.saturating_duration_since(Instant::now()))
            .map(|d| Timespec { tv_sec: d.as_secs() as i64, tv_nsec: d.subsec_nanos().into() });
        match poll(&mut polled, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => return Ok(Ready::default()),
            result => result?,
        };
        if polled[0].revents().contains(PollFlags::IN) {
            // Empties the counter. Whatever it announces is looked at after this.
            let _ = event.read();
        }
        let mut ready = Ready::default();
        for ((_, _, who), polled) in fds.iter().zip(&polled[1..]) {
            let events = polled.revents();
            match who {
                Who::Input => ready.input = !events.is_empty(),
                Who::Output => ready.output = !events.is_empty(),
                Who::Listener => ready.listener = !events.is_empty(),
                Who::Client => {
                    ready.input = events.contains(PollFlags::IN);
                    ready.output = events.contains(PollFlags::OUT);
                    ready.gone = events.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL);
                }
            }
        }
        Ok(ready)
    }

    fn serve(&mut self, ready: Ready) {
        if ready.input {
            self.read();
        }
        if ready.gone {
            self.part();
        }
        if ready.output {
            self.write();
        }
        if let Endpoint::Socket { listener, .. } = &self.endpoint
            && ready.listener
            && let Ok((stream, _)) = listener.accept()
            && stream.set_nonblocking(true).is_ok()
        {
            // The newest wins: one that hangs cannot keep others out.
            self.part();
            let new = Client::new(stream, &self.shared.registry);
            if let Endpoint::Socket { client, .. } = &mut self.endpoint {
                // It fails only if there is still another one.
                *client = new.ok();
            }
        }
    }

    fn write(&mut self) {
        if !self.has_output() {
            return;
        }
        if self.outgoing.is_empty() {
            self.outgoing = self.shared.output.take(CHUNK).into();
        }
        // `poll` has promised room for no more.
        let bytes = &*self.outgoing.make_contiguous();
        let bytes = &bytes[..bytes.len().min(CHUNK)];
        let result = match &self.endpoint {
            Endpoint::Streams { output: Some(output), .. } => rustix::io::write(output, bytes),
            Endpoint::Socket { client: Some(client), .. } => rustix::io::write(&client.stream, bytes),
            _ => Ok(self.outgoing.len()),
        };
        match result {
            Ok(written) => drop(self.outgoing.drain(..written)),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(error) => {
                if let Endpoint::Streams { output, .. } = &mut self.endpoint {
                    tracing::warn!("serial port: its output is lost from here on: {error}");
                    *output = None;
                }
                // What a client did not take is for the next one.
                self.part();
            }
        }
    }

    fn read(&mut self) {
        let mut buffer = [0; CHUNK];
        let read = |result: rustix::io::Result<usize>| match result {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => None,
            result => Some(result.unwrap_or(0)),
        };
        match &mut self.endpoint {
            Endpoint::Streams { input: slot @ Some(_), filter, .. } => {
                let len = slot.as_ref().and_then(|fd| read(rustix::io::read(fd, &mut buffer)));
                match (len, filter) {
                    (None, _) => {}
                    (Some(0), _) => *slot = None,
                    (Some(len), Some(filter)) => self.input.extend(filter.pass(&buffer[..len])),
                    (Some(len), None) => self.input.extend(&buffer[..len]),
                }
            }
            Endpoint::Socket { client: Some(client), .. } => {
                match read(rustix::io::read(&client.stream, &mut buffer)) {
                    None => {}
                    Some(0) => client.sends = false,
                    Some(len) => self.input.extend(&buffer[..len]),
                }
            }
            _ => {}
        }
    }

    /// Lets the client of a socket go, after reading what it had still sent.
    fn part(&mut self) {
        let Endpoint::Socket { client: slot, .. } = &mut self.endpoint else { return };
        let Some(client) = slot.take() else { return };
        let mut buffer = [0; CHUNK];
        while self.input.len() < LAST_INPUT {
            match rustix::io::read(&client.stream, &mut buffer) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(0) | Err(_) => break,
                Ok(len) => self.input.extend(&buffer[..len]),
            }
        }
    }
}

fn borrow(event: &vmm_sys_util::eventfd::EventFd) -> BorrowedFd<'_> {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open as long as the eventfd, which is borrowed for as long as the result.
    #[expect(unsafe_code, reason = "EventFd does not implement AsFd")]
    unsafe {
        BorrowedFd::borrow_raw(event.as_raw_fd())
    }
}
