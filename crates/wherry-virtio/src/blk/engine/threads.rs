//! Jobs by threads that wait for each: where io_uring is not permitted, and of images that are not raw.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Done, Engine, Instead, Job, Op, fallocate_mode, instead};
use crate::blk::Image;

/// Threads of one image.
const THREADS: u32 = 4;

#[derive(Default)]
struct Queues {
    waiting: VecDeque<Job>,
    done: Vec<Done>,
    quit: bool,
}

struct Shared {
    image: Arc<Image>,
    queues: Mutex<Queues>,
    work: Condvar,
    event: EventFd,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        loop {
            let mut queues = self.lock();
            let job = loop {
                if let Some(job) = queues.waiting.pop_front() {
                    break job;
                }
                if queues.quit {
                    return;
                }
                queues = self.work.wait(queues).unwrap_or_else(PoisonError::into_inner);
            };
            drop(queues);
            let result = execute(&self.image, &job);
            self.lock().done.push((job.tag, result));
            self.wake();
        }
    }

    fn wake(&self) {
        // It fails only if the counter is full, and then the reader is awake already.
        let _ = self.event.write(1);
    }
}

pub(in crate::blk) struct Threads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    pub(in crate::blk) fn new(image: Arc<Image>, instance: u32) -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        let shared = Arc::new(Shared { image, queues: Mutex::default(), work: Condvar::new(), event });
        let mut this = Self { shared, threads: Vec::new() };
        for n in 0..THREADS {
            let shared = this.shared.clone();
            let builder = std::thread::Builder::new().name(format!("blk-{instance}-io-{n}"));
            this.threads.push(builder.spawn(move || shared.work())?);
        }
        Ok(this)
    }
}

impl Engine for Threads {
    fn begin(&mut self, job: Job) {
        self.shared.lock().waiting.push_back(job);
        self.shared.work.notify_one();
    }

    fn push(&mut self) {}

    fn done(&mut self) -> Vec<Done> {
        let _ = self.shared.event.read();
        std::mem::take(&mut self.shared.lock().done)
    }

    fn event(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }

    fn cancel(&mut self) {
        let mut queues = self.shared.lock();
        let taken_back: Vec<_> = queues.waiting.drain(..).map(|job| job.tag).collect();
        queues.done.extend(taken_back.into_iter().map(|tag| (tag, Err(io::Error::from_raw_os_error(libc::ECANCELED)))));
        drop(queues);
        self.shared.wake();
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.lock().quit = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of a disk image panicked");
            }
        }
    }
}

fn execute(image: &Image, job: &Job) -> io::Result<u32> {
    if let Some(qcow2) = image.qcow2() {
        return qcow2.execute(job);
    }
    let fd = image.fd();
    let (buffers, count) = (job.buffers.as_ptr(), job.buffers.len() as i32);
    let result = match job.op {
        // SAFETY: the buffers lie in guest memory, which whoever made the job keeps until it is done; their descriptions
        // are the job's.
        Op::Read => unsafe { libc::preadv(fd, buffers, count, job.offset as i64) },
        Op::Write { stable } => {
            let flags = if stable { libc::RWF_DSYNC } else { 0 };
            // SAFETY: as above.
            unsafe { libc::pwritev2(fd, buffers, count, job.offset as i64, flags) }
        }
        // SAFETY: an open descriptor.
        Op::Flush => (unsafe { libc::fdatasync(fd) }) as isize,
        Op::Discard | Op::Zero { .. } => {
            let mode = fallocate_mode(job.op);
            // SAFETY: an open descriptor; the call touches no memory.
            (unsafe { libc::fallocate(fd, mode, job.offset as i64, job.len as i64) }) as isize
        }
    };
    if result >= 0 {
        return Ok(result as u32);
    }
    let error = io::Error::last_os_error();
    match instead(job.op, error.raw_os_error()) {
        Some(Instead::Nothing) => Ok(0),
        Some(Instead::Op(op)) => execute(image, &Job { op, buffers: Vec::new(), ..*job }),
        None => Err(error),
    }
}
