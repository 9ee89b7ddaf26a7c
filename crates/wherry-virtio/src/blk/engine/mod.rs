//! How requests reach an image: by io_uring, or by threads that wait for each, where that is not permitted or the image is
//! not raw.

mod threads;
mod uring;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

pub(super) use threads::Threads;
pub(super) use uring::Uring;

use super::Image;

/// Most jobs at once: no tag is as large.
pub(super) const JOBS: usize = 256;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// Into the buffers.
    Read,
    /// From the buffers; with `stable` it is on the medium when it is done.
    Write { stable: bool },
    /// All that was written before is on the medium.
    Flush,
    /// The range is of no use any more.
    Discard,
    /// The range becomes zeros, and may be freed.
    Zero { free: bool },
}

/// One thing to do.
pub(super) struct Job {
    /// Names it, below [`JOBS`]; free to be used again when it is done.
    pub(super) tag: usize,
    pub(super) op: Op,
    /// Range of the image in bytes.
    pub(super) offset: u64,
    pub(super) len: u64,
    /// Buffers in guest memory, which lives as long as the engine.
    pub(super) buffers: Vec<libc::iovec>,
}

// SAFETY: the buffers are guest memory, which any thread may access; whoever makes a job keeps that memory.
unsafe impl Send for Job {}

/// A job that is done: the bytes that were moved, or why not. `ECANCELED`: it was taken back and has had no effect.
pub(super) type Done = (usize, io::Result<u32>);

/// Works on jobs. None is lost: each is given back once.
pub(super) trait Engine: Send {
    /// Begins a job.
    fn begin(&mut self, job: Job);

    /// Lets everything begun go its way.
    fn push(&mut self);

    /// What is done.
    fn done(&mut self) -> Vec<Done>;

    /// Readable when there may be something done.
    fn event(&self) -> RawFd;

    /// Takes back what has not been started. It is given back as `ECANCELED`.
    fn cancel(&mut self);
}

/// The best engine that there is here.
pub(super) fn best(image: &Arc<Image>, instance: u32) -> io::Result<Box<dyn Engine>> {
    if image.qcow2().is_some() {
        return Ok(Box::new(Threads::new(image.clone(), instance)?));
    }
    match Uring::new(image.clone()) {
        Ok(uring) => Ok(Box::new(uring)),
        Err(error) => {
            tracing::info!(%error, "no io_uring for {}; threads wait for its requests", image.path().display());
            Ok(Box::new(Threads::new(image.clone(), instance)?))
        }
    }
}

/// How the file system is asked for a range.
fn fallocate_mode(op: Op) -> i32 {
    match op {
        Op::Zero { free: false } => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        _ => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
    }
}

/// What a job becomes if the file system cannot do it so.
fn instead(op: Op, error: Option<i32>) -> Option<Instead> {
    match (op, error) {
        // A hint.
        (Op::Discard, Some(libc::EOPNOTSUPP)) => Some(Instead::Nothing),
        // It reads as zeros as well; only the space is not kept.
        (Op::Zero { free: false }, Some(libc::EOPNOTSUPP)) => Some(Instead::Op(Op::Zero { free: true })),
        _ => None,
    }
}

enum Instead {
    Nothing,
    Op(Op),
}
