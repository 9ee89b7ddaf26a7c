//! The user's terminal: raw mode while the guest has it, and a way out.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr};

use super::EscapeHandler;

/// The terminal in raw mode and how it was before, for [`restore_terminal`].
static BEFORE: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);

/// Puts the terminal back as it was before a serial port took it. For those who end the process while a machine
/// exists; dropping the machine does it too.
pub fn restore_terminal() {
    if let Some((fd, before)) = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // Nothing helps if the terminal is gone.
        let _ = tcsetattr(&fd, OptionalActions::Flush, &before);
    }
}

/// Whether a serial port has the user's terminal.
pub(crate) fn has_terminal() -> bool {
    BEFORE.lock().unwrap_or_else(PoisonError::into_inner).is_some()
}

/// Whether we may read from this. A terminal that another job has in its foreground would stop us: then it is as if
/// there were no input.
pub(super) fn is_ours(fd: &OwnedFd) -> bool {
    // What is no terminal, or not the one of our session, has no foreground.
    !isatty(fd) || tcgetpgrp(fd).map_or(true, |foreground| foreground == getpgrp())
}

/// A terminal in raw mode until this is dropped.
pub(super) struct RawMode(());

impl RawMode {
    /// Switches a terminal to raw mode; nothing is done if it is no terminal. See [`is_ours`].
    pub fn enter(fd: &OwnedFd) -> io::Result<Option<Self>> {
        if !isatty(fd) {
            return Ok(None);
        }
        let before = tcgetattr(fd)?;
        let mut raw = before.clone();
        raw.make_raw();
        // Lines that the VMM itself prints still begin at the left.
        raw.output_modes |= OutputModes::OPOST;
        let keep = fd.as_fd().try_clone_to_owned()?;
        let mut slot = BEFORE.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_some() {
            return Err(io::Error::other("another machine of this process has the terminal"));
        }
        tcsetattr(fd, OptionalActions::Now, &raw)?;
        *slot = Some((keep, before));
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore_terminal();
    }
}

/// Finds Ctrl-A x in what is typed; Ctrl-A Ctrl-A sends one Ctrl-A.
pub(super) struct EscapeFilter {
    armed: bool,
    handler: Option<EscapeHandler>,
}

const CTRL_A: u8 = 1;

impl EscapeFilter {
    pub fn new(handler: Option<EscapeHandler>) -> Self {
        Self { armed: false, handler }
    }

    /// What of the typed bytes is for the guest. Calls the handler when the user wants out.
    pub fn pass(&mut self, typed: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(typed.len());
        for byte in typed {
            match (self.armed, *byte, &self.handler) {
                (true, b'x' | b'X', Some(handler)) => {
                    self.armed = false;
                    handler();
                }
                (true, CTRL_A, _) => {
                    self.armed = false;
                    out.push(CTRL_A);
                }
                (true, other, _) => {
                    self.armed = false;
                    out.extend_from_slice(&[CTRL_A, other]);
                }
                (false, CTRL_A, _) => self.armed = true,
                (false, other, _) => out.push(other),
            }
        }
        out
    }
}
