//! Eventfds that others hold.
#![expect(unsafe_code, reason = "eventfds of the rust-vmm crate know their descriptors only by number")]

use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use wherry_handover::Shelf;

/// An eventfd that never blocks.
pub struct Event(Arc<EventFd>);

impl Event {
    /// A new one.
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK).map(Arc::new).map(Self)
    }

    /// The eventfd, for whoever goes on using it without an entry of its own.
    pub fn shared(&self) -> &Arc<EventFd> {
        &self.0
    }
}

impl From<OwnedFd> for Event {
    /// One that has come; it does not block, since that belongs to what is behind the descriptor.
    fn from(descriptor: OwnedFd) -> Self {
        // SAFETY: the descriptor is ours, and is given away here.
        Self(Arc::new(unsafe { EventFd::from_raw_fd(descriptor.into_raw_fd()) }))
    }
}

impl Deref for Event {
    type Target = EventFd;

    fn deref(&self) -> &EventFd {
        &self.0
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

/// Where eventfds come from: they are made, and those that other processes hold are kept over a live update.
#[derive(Clone, Debug, Default)]
pub struct Events(Option<Shelf>);

impl Events {
    /// Nobody else holds them.
    pub fn own() -> Self {
        Self::default()
    }

    /// Others hold them. Each stands on the shelf for as long as it lives; a process that takes over gets what its predecessor had
    /// there.
    pub fn kept(shelf: Shelf) -> Self {
        Self(Some(shelf))
    }

    /// Of a part of whatever has these.
    pub fn of(&self, part: &str) -> Self {
        Self(self.0.as_ref().map(|shelf| shelf.of(part)))
    }

    /// Whether others hold them.
    pub(crate) fn are_kept(&self) -> bool {
        self.0.is_some()
    }

    /// One of them.
    pub fn get(&self, what: &str, index: u32) -> io::Result<Arc<Event>> {
        match &self.0 {
            None => Event::new().map(Arc::new),
            Some(shelf) => shelf.obtain(what, index, |descriptor| Ok(descriptor.into()), Event::new),
        }
    }
}
