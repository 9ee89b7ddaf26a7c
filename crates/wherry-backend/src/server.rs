//! The socket of a back end: one front end is served after the other, by the same device.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use wherry_handover::Rest;
use wherry_socket::SocketFile;

use crate::kept::rest_alone;
use crate::session::Session;
use crate::wire::{Connection, borrow};
use crate::{BackendError, Device};

/// Listens for front ends. The socket goes with it.
pub struct Server {
    listener: UnixListener,
    file: Option<SocketFile>,
    quit: EventFd,
    rest: Rest,
}

impl Server {
    /// Listens at a path. A socket that nobody listens on any more is replaced.
    pub fn bind(path: &Path) -> Result<Self, BackendError> {
        let (listener, file) = SocketFile::bind(path)?;
        Ok(Self { file: Some(file), ..Self::on(listener)? })
    }

    /// At a socket that listens already.
    pub fn on(listener: UnixListener) -> Result<Self, BackendError> {
        let failed = |source| BackendError::Os { what: "setting up a socket", source };
        listener.set_nonblocking(true).map_err(failed)?;
        let (quit, rest) = (EventFd::new(EFD_NONBLOCK).map_err(failed)?, Rest::new().map_err(failed)?);
        Ok(Self { listener, file: None, quit, rest })
    }

    /// What has it come to rest, so that another process can go on.
    pub fn rest(&self) -> Rest {
        self.rest.clone()
    }

    /// Removes the socket: for a process that ends without dropping this.
    pub fn remove(&self) {
        if let Some(file) = &self.file {
            file.remove();
        }
    }

    /// Has [`run`](Self::run) return. It works from a signal handler, too: it writes to an eventfd.
    pub fn stop(&self) {
        let _ = self.quit.write(1);
    }

    /// Serves front ends, one after the other, until [`stop`](Self::stop). On an error the process has to end: after
    /// [`BackendError::Abandoned`] the device cannot even be dropped.
    pub fn run(&self, device: &dyn Device) -> Result<(), BackendError> {
        loop {
            if self.rest.is_wanted() {
                if let Some(session) = rest_alone(device, &self.rest, &self.quit) {
                    self.serve(session, device)?;
                }
                continue;
            }
            let mut events = [
                PollFd::new(&self.listener, PollFlags::IN),
                PollFd::from_borrowed_fd(borrow(&self.quit), PollFlags::IN),
                PollFd::new(self.rest.event(), PollFlags::IN),
            ];
            match poll(&mut events, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(BackendError::os("waiting for a front end")(error)),
            }
            if !events[1].revents().is_empty() {
                return Ok(());
            }
            if !events[2].revents().is_empty() {
                // It may have been meant for the front end before.
                self.rest.heard();
            }
            if self.rest.is_wanted() {
                continue;
            }
            match self.listener.accept() {
                Ok((stream, _)) => {
                    tracing::info!(device = device.name(), "a front end has come");
                    match Connection::new(stream, &self.quit, Some(&self.rest)) {
                        Ok(connection) => self.serve(Session::new(connection, device), device)?,
                        Err(error) => tracing::warn!(%error, "a front end is given up"),
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                // The front end may have gone already; and descriptors may be short for a while.
                Err(error) => tracing::warn!(%error, "accepting a front end"),
            }
        }
    }

    /// Serves one front end. One that is given up is no error.
    fn serve(&self, mut session: Session<'_>, device: &dyn Device) -> Result<(), BackendError> {
        let name = device.name();
        let served = session.run();
        self.rest.note_obstacle(None);
        match served {
            Ok(()) => tracing::info!(device = name, "the front end has gone"),
            Err(error @ BackendError::Abandoned(_)) => return Err(error),
            Err(error) => tracing::warn!(device = name, %error, "the front end is given up"),
        }
        Ok(())
    }
}

/// Serves the front end at the other end of a socket, until it goes or `quit` is readable.
pub fn serve(stream: UnixStream, device: &dyn Device, quit: &EventFd) -> Result<(), BackendError> {
    Session::new(Connection::new(stream, quit, None)?, device).run()
}
