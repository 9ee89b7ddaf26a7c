//! Jobs by io_uring.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::types::{CancelBuilder, Fd, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};

use super::{Done, Engine, Instead, JOBS, Job, Op, fallocate_mode, instead};
use crate::blk::Image;

/// Marks what is no job.
const NO_JOB: u64 = u64::MAX;

pub(in crate::blk) struct Uring {
    ring: IoUring,
    image: Arc<Image>,
    /// The kernel reads the buffers' descriptions until a job is done.
    jobs: Vec<Option<Job>>,
}

impl Uring {
    pub(in crate::blk) fn new(image: Arc<Image>) -> io::Result<Self> {
        // A job and a request to cancel; twice as many places for answers.
        let ring = IoUring::new(2 * JOBS as u32)?;
        Ok(Self { ring, image, jobs: (0..JOBS).map(|_| None).collect() })
    }

    fn queue(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: the file, and the buffers and their descriptions in `jobs`, live until the kernel has answered:
            // dropping waits for all answers.
            let pushed = unsafe { self.ring.submission().push(entry) };
            if pushed.is_ok() {
                return;
            }
            self.push();
        }
    }

    fn start(&mut self, tag: usize) {
        let Some(job) = &self.jobs[tag] else { return };
        let fd = Fd(self.image.fd());
        let (buffers, count) = (job.buffers.as_ptr(), job.buffers.len() as u32);
        let entry = match job.op {
            Op::Read => opcode::Readv::new(fd, buffers, count).offset(job.offset).build(),
            Op::Write { stable } => {
                let flags = if stable { libc::RWF_DSYNC } else { 0 };
                opcode::Writev::new(fd, buffers, count).offset(job.offset).rw_flags(flags).build()
            }
            Op::Flush => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
            Op::Discard | Op::Zero { .. } => {
                opcode::Fallocate::new(fd, job.len).offset(job.offset).mode(fallocate_mode(job.op)).build()
            }
        };
        self.queue(&entry.user_data(tag as u64));
    }
}

impl Engine for Uring {
    fn begin(&mut self, job: Job) {
        let tag = job.tag;
        self.jobs[tag] = Some(job);
        self.start(tag);
    }

    fn push(&mut self) {
        loop {
            match self.ring.submit() {
                Ok(_) => return,
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // The kernel is short of something for a moment, or wants its answers read; it is tried again at the next
                // push, and answers come meanwhile.
                Err(error) => {
                    tracing::debug!(%error, "submitting to io_uring");
                    return;
                }
            }
        }
    }

    fn done(&mut self) -> Vec<Done> {
        let answers: Vec<_> = self.ring.completion().map(|answer| (answer.user_data(), answer.result())).collect();
        let mut done = Vec::with_capacity(answers.len());
        let mut again = false;
        for (tag, result) in answers {
            let Some(slot) = self.jobs.get_mut(tag as usize).filter(|_| tag != NO_JOB) else { continue };
            let Some(job) = slot else { continue };
            match instead(job.op, (result < 0).then_some(-result)) {
                Some(Instead::Op(op)) => {
                    job.op = op;
                    self.start(tag as usize);
                    again = true;
                }
                other => {
                    *slot = None;
                    let result = match (other, result) {
                        (Some(_), _) => Ok(0),
                        (None, moved @ 0..) => Ok(moved as u32),
                        (None, error) => Err(io::Error::from_raw_os_error(-error)),
                    };
                    done.push((tag as usize, result));
                }
            }
        }
        // What could not be submitted before is tried again, too.
        if again || !self.ring.submission().is_empty() {
            self.push();
        }
        done
    }

    fn event(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    fn cancel(&mut self) {
        let all = opcode::AsyncCancel2::new(CancelBuilder::any()).build();
        self.queue(&all.user_data(NO_JOB));
        self.push();
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        while self.jobs.iter().any(Option::is_some) {
            if self.ring.submit_and_wait(1).is_err_and(|e| e.raw_os_error() != Some(libc::EINTR)) {
                // The buffers' descriptions must outlive what the kernel may still do with them.
                std::mem::forget(std::mem::take(&mut self.jobs));
                return;
            }
            self.done();
        }
    }
}
