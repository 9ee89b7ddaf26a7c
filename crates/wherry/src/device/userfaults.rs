//! The userfaultfd of a device process that serves vfio-user: its memory may not be all there.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use wherry_fault::{Mode, Userfault};
use wherry_vfio_user::server::Userfaults;

/// One for each client that moves its VM by postcopy.
#[derive(Default)]
pub struct ProcessFaults(Option<Userfault>);

impl ProcessFaults {
    fn with<T>(&self, ask: impl FnOnce(&Userfault) -> Result<T, wherry_fault::UffdError>) -> io::Result<T> {
        let userfault = self.0.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        ask(userfault).map_err(io::Error::other)
    }
}

impl Userfaults for ProcessFaults {
    fn open(&mut self) -> io::Result<OwnedFd> {
        let userfault = Userfault::open().map_err(io::Error::other)?;
        let fd = userfault.as_fd().try_clone_to_owned()?;
        self.0 = Some(userfault);
        Ok(fd)
    }

    /// For missing pages only: whoever serves them maps none, and wakes.
    fn register(&mut self, address: u64, bytes: u64) -> io::Result<()> {
        self.with(|userfault| userfault.register(address, bytes, Mode::MISSING).map(drop))
    }

    fn unregister(&mut self, address: u64, bytes: u64) -> io::Result<()> {
        self.with(|userfault| userfault.unregister(address, bytes))
    }

    fn close(&mut self) {
        self.0 = None;
    }
}
