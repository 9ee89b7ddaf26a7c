//! userfaultfd: who waits for which page, and how a page that has arrived becomes visible.
//!
//! From the bottom to the top:
//!
//! - [`Userfault`]: one userfaultfd, of this process or of another; the kernel's calls and its bare answers.
//! - [`PageStates`]: missing, requested, filling, received, for each page of a block, and whether somebody waits; one
//!   atomic step each.
//! - `place`: what to do with each of the kernel's answers. Two [`Way`]s: in place, and by copy.
//! - `source`, `waiters`: what the addresses of a fault source mean, and who of them waits for what.
//! - [`FaultService`]: one thread that serves the faults of any number of sources, a background mapper, and what
//!   channels call when pages arrive.
//!
//! The way of a fault: the event is read, its address becomes a page, the waiter is noted, then the page's state is
//! looked at *again*: received means resolve it now, else the [`Requester`] is told, once for each page. The way of a
//! page: a channel holds a [`Fill`], claims the page, reads its bytes, and calls one of the `received` functions; if
//! somebody waits, that call places the page and wakes those who wait, and nobody else.
//!
//! Contract: the thread that serves faults never touches a guest map, and nothing it needs is held while somebody
//! waits for another process. A source that misbehaves is quarantined and named, and the others are served on.
//!
//! This crate knows neither KVM nor the wire.

mod arrive;
mod block;
mod error;
mod mapper;
mod place;
mod serve;
mod service;
mod source;
mod states;
mod statistics;
mod sync;
mod threads;
mod uapi;
mod uffd;
mod waiters;

pub use block::Fill;
pub use error::{FaultError, UffdError};
pub use mapper::Mapped;
pub use place::Way;
pub use service::{FaultService, Requester, Trouble, Wanted};
pub use source::{Mapping, SourceId};
pub use states::{PageState, PageStates, Published, Want};
pub use statistics::{Histogram, Share, SourceStatistics, Statistics};
pub use uffd::{Fault, Mode, Outcome, RangeCalls, Userfault};

use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Locks although a thread panicked with it: faults must be served on, and every critical section here leaves its data
/// whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}
