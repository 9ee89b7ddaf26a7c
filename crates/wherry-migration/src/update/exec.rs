//! The old process, where the new program is executed in it: the same process goes on, under its number.
//!
//! ```text
//!   old process                                   a process of the new program
//!     |   as in a hand-over, up to                          |
//!   stops; blackout begins
//!     |---- State, as a proof -------------------------->|  restores
//!     |<---------------------------------- Proven -------|  does nothing more, and is ended
//!   queue: all of that once more; word: OFFERED
//!   executes the program of that process
//!     |  takes it over from the queue, as it is there: builds the machine, restores, word: RUNS; starts; blackout is over
//! ```
//!
//! The proof is of this very state, and made with the machine at rest: a proof of an earlier one would need a second stop, and prove
//! less. What it adds to the blackout is one restore; the rest of it is the new program's start and the machine that it builds, which
//! cannot be there earlier, for what KVM makes does not survive an `execve`.
//!
//! The queue is a UNIX socket whose other end is closed: parcels, descriptors among them, wait there whatever becomes of this process's
//! own descriptors. Until `execve` succeeds nothing was taken from the machine, and any failure is undone as in a hand-over.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use prost::Message;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::time::{ClockId, clock_gettime};
use wherry_handover::{Channel, KeptId, MOST_BODY, MOST_DESCRIPTORS, RunWord};

use super::message::{Body, Describe, EXEC, Empty, State, Stopped};
use super::old::{Old, names};
use super::{ATTEMPT, HandOver, Keep, RAM, UpdateError, UpdateOptions, WORD};
use crate::error::Cause;
use crate::journey::Journey;
use crate::predict::us;
use crate::priority::Urgent;
use crate::progress::Phase;
use crate::testpoint::{Point, reach};

/// Room in the queue, in bytes, if the host gives so much. The state does not lie in it.
const ROOM: usize = 4 << 20;
/// How long a queue that is full is waited for. Nobody empties it.
const FULL: Duration = Duration::from_millis(50);

/// Hands a machine over to a program that `exec` executes in this process, which returns only if it cannot. It is given the queue, for
/// [`take_over_executed`](super::take_over_executed), and must execute the very program that is at the other end of the channel. So this
/// returns only if the machine runs here as before (or is paused, if it was), but for [`Stuck`](UpdateError::Stuck).
pub fn hand_over_by_exec<M: Keep + ?Sized>(
    what: HandOver<'_, M>,
    exec: &dyn Fn(Channel) -> io::Error,
    options: UpdateOptions,
    journey: &Journey,
) -> UpdateError {
    let mut old = match Old::new(what, options, journey, EXEC) {
        Ok(old) => old,
        Err(error) => return error,
    };
    journey.enter(Phase::Setup);
    let queue = old.setup().and_then(|description| {
        journey.enter(Phase::Switchover);
        let _urgent = Urgent::new();
        old.prove(description)
    });
    let cause = match queue {
        Ok(queue) => Cause::Handover(format!("executing the new program: {}", exec(queue))),
        Err(cause) => cause,
    };
    old.undo(cause)
}

/// What `CLOCK_MONOTONIC` shows, in nanoseconds: the same in both programs.
pub(super) fn monotonic() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

impl<M: Keep + ?Sized> Old<'_, M> {
    /// Stops the machine, has the new program prove that it loads its state, and gives the queue for it.
    fn prove(&mut self, description: Describe) -> Result<Channel, Cause> {
        let stall = self.drain()?;
        let (stop, stopped_ns) = (Instant::now(), monotonic());
        let state = self.stop_and_save(stop)?;
        let digest = state.digest().to_vec();
        let state = State { state: state.encode_to_vec(), digest, ..State::default() };
        self.say(Body::State(State { proof: true, ..state.clone() }))?;
        match self.hear("prove that it can load the state", self.options.load)? {
            Body::Proven(Empty {}) => {}
            other => return Err(self.unexpected(&other)),
        }
        reach(&self.journey, Point::ExecProven);
        let stopped = Stopped {
            at_ns: stopped_ns,
            setup_us: self.journey.job().setup_time_us,
            stall_us: us(stall),
            stop_us: self.blackout.stop_us,
            save_us: self.blackout.state_us,
        };
        self.queue(description, State { stopped: Some(stopped), ..state })
    }

    /// All that goes over, for one who comes when nobody can be asked any more.
    fn queue(&self, description: Describe, state: State) -> Result<Channel, Cause> {
        let handover = |error: &dyn std::fmt::Display| Cause::Handover(error.to_string());
        // Another word than the one that was shown to the process that has proven: that one cannot run the machine.
        let word = RunWord::create().map_err(|error| handover(&error))?;
        word.offer(ATTEMPT);
        let (queue, end) = Channel::pair()?;
        // Less room may do.
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(&queue, ROOM);
        let send = |body: Body, descriptors: &[(KeptId, &dyn AsFd)]| {
            let fds: Vec<_> = descriptors.iter().map(|(_, fd)| fd.as_fd()).collect();
            let sent = queue.send(body.tag(), &body.encode(), &fds, Instant::now() + FULL);
            sent.map_err(|error| Cause::Handover(format!("queueing {} for the new program: {error}", body.kind())))
        };
        send(Body::Describe(description), &[])?;
        let blocks = self.machine.ram().blocks();
        let ram: Vec<_> = blocks.iter().map(|block| (KeptId::new(RAM, block.spec().id.0.into()), block.fd())).collect();
        let kept = self.machine.registry().list();
        let mut all: Vec<(KeptId, &dyn AsFd)> = vec![(KeptId::new(WORD, 0), &word)];
        all.extend(ram.iter().map(|(id, fd)| (id.clone(), fd as &dyn AsFd)));
        all.extend(self.entries.iter().chain(&kept).map(|entry| (entry.id.clone(), entry as &dyn AsFd)));
        for some in all.chunks(MOST_DESCRIPTORS) {
            send(Body::Kept(names(some.iter().map(|(id, _)| id))), some)?;
        }
        send(Body::Build(Empty {}), &[])?;
        send(Body::Poise(Empty {}), &[])?;
        let note = note(&state).map_err(|error| Cause::Handover(format!("writing the state down: {error}")))?;
        send(Body::StateNote(Empty {}), &[(KeptId::new("state", 0), &note)])?;
        Ok(end)
    }
}

/// A sealed memfd with the state.
fn note(state: &State) -> io::Result<OwnedFd> {
    let memfd = memfd_create("wherry-state", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(memfd);
    file.write_all(&state.encode_to_vec())?;
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file.into())
}

/// What was written down so.
pub(super) fn read_note(note: OwnedFd) -> io::Result<State> {
    let file = File::from(note);
    let bytes = file.metadata()?.len();
    if bytes > MOST_BODY as u64 {
        return Err(io::Error::other(format!("a state of {bytes} bytes, and {MOST_BODY} are possible")));
    }
    let mut state = vec![0; bytes as usize];
    file.read_exact_at(&mut state, 0)?;
    State::decode(state.as_slice()).map_err(io::Error::other)
}
