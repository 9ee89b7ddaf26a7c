//! The user's terminal: raw mode while the guest has it, and a way out.
//!
//! How the terminal was before is state of the process, not of the machine: in a live update it goes over, as a note in the registry, and
//! whoever has the machine at its end puts the terminal back. No other process touches it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prost::Message;
use rustix::process::getpgrp;
use rustix::termios::{
    ControlModes, InputModes, LocalModes, OptionalActions, OutputModes, SpecialCodeIndex, Termios, isatty, tcgetattr,
    tcgetpgrp, tcsetattr,
};
use wherry_handover::{KeptId, Registry};

use super::EscapeHandler;

/// The note of how the terminal was.
const BEFORE_NOTE: &str = "serial/terminal";

/// The terminal in raw mode and how it was before, for [`restore_terminal`].
static TERMINAL: Mutex<Option<(OwnedFd, SavedTerminal)>> = Mutex::new(None);

fn terminal() -> MutexGuard<'static, Option<(OwnedFd, SavedTerminal)>> {
    TERMINAL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How a terminal was: what raw mode changes of it. `termios` of the kernel has the numbers.
#[derive(Clone, PartialEq, Eq, Message)]
struct SavedTerminal {
    #[prost(uint32, tag = "1")]
    input_modes: u32,
    #[prost(uint32, tag = "2")]
    output_modes: u32,
    #[prost(uint32, tag = "3")]
    control_modes: u32,
    #[prost(uint32, tag = "4")]
    local_modes: u32,
    /// By number.
    #[prost(bytes = "vec", tag = "5")]
    special_codes: Vec<u8>,
}

/// The special codes, by their numbers in the kernel.
const CODES: [SpecialCodeIndex; 17] = [
    SpecialCodeIndex::VINTR,
    SpecialCodeIndex::VQUIT,
    SpecialCodeIndex::VERASE,
    SpecialCodeIndex::VKILL,
    SpecialCodeIndex::VEOF,
    SpecialCodeIndex::VTIME,
    SpecialCodeIndex::VMIN,
    SpecialCodeIndex::VSWTC,
    SpecialCodeIndex::VSTART,
    SpecialCodeIndex::VSTOP,
    SpecialCodeIndex::VSUSP,
    SpecialCodeIndex::VEOL,
    SpecialCodeIndex::VREPRINT,
    SpecialCodeIndex::VDISCARD,
    SpecialCodeIndex::VWERASE,
    SpecialCodeIndex::VLNEXT,
    SpecialCodeIndex::VEOL2,
];

impl SavedTerminal {
    fn of(terminal: &Termios) -> Self {
        Self {
            input_modes: terminal.input_modes.bits(),
            output_modes: terminal.output_modes.bits(),
            control_modes: terminal.control_modes.bits(),
            local_modes: terminal.local_modes.bits(),
            special_codes: CODES.iter().map(|code| terminal.special_codes[*code]).collect(),
        }
    }

    fn decode_note(note: &[u8]) -> io::Result<Self> {
        let saved = Self::decode(note).map_err(io::Error::other)?;
        match saved.special_codes.len() {
            codes if codes == CODES.len() => Ok(saved),
            codes => Err(io::Error::other(format!("settings of a terminal with {codes} special codes"))),
        }
    }

    fn put_back(&self, fd: impl AsFd) -> io::Result<()> {
        let mut settings = tcgetattr(&fd)?;
        settings.input_modes = InputModes::from_bits_retain(self.input_modes);
        settings.output_modes = OutputModes::from_bits_retain(self.output_modes);
        settings.control_modes = ControlModes::from_bits_retain(self.control_modes);
        settings.local_modes = LocalModes::from_bits_retain(self.local_modes);
        for (code, value) in CODES.iter().zip(&self.special_codes) {
            settings.special_codes[*code] = *value;
        }
        Ok(tcsetattr(&fd, OptionalActions::Flush, &settings)?)
    }
}

/// Puts the terminal back as it was before a serial port took it. For those who end the process while a machine
/// exists; dropping the machine does it too.
pub fn restore_terminal() {
    if let Some((fd, before)) = terminal().take() {
        // Nothing helps if the terminal is gone.
        let _ = before.put_back(&fd);
    }
}

/// Leaves the terminal as it is from now on: another process has the machine.
pub fn leave_terminal() {
    drop(terminal().take());
}

/// The user's terminal and how it was before, in bytes for [`restore_as`], if a serial port has it.
pub(crate) fn users_terminal() -> Option<(OwnedFd, Vec<u8>)> {
    let terminal = terminal();
    let (fd, before) = terminal.as_ref()?;
    Some((fd.try_clone().ok()?, before.encode_to_vec()))
}

/// Puts a terminal back as another process has found it.
pub(crate) fn restore_as(fd: impl AsFd, before: &[u8]) -> io::Result<()> {
    SavedTerminal::decode_note(before)?.put_back(fd)
}

/// Whether we may read from this. A terminal that another job has in its foreground would stop us: then it is as if
/// there were no input.
pub(super) fn is_ours(fd: &OwnedFd) -> bool {
    // What is no terminal, or not the one of our session, has no foreground.
    !isatty(fd) || tcgetpgrp(fd).map_or(true, |foreground| foreground == getpgrp())
}

/// A terminal in raw mode until this is dropped.
pub(super) struct RawMode {
    registry: Arc<Registry>,
    /// Goes over as long as the terminal is raw.
    _note: Arc<OwnedFd>,
}

impl RawMode {
    /// Switches a terminal to raw mode; nothing is done if it is no terminal. See [`is_ours`]. A process that succeeds another one
    /// finds the terminal in raw mode, and changes nothing.
    pub fn enter(fd: &OwnedFd, registry: &Arc<Registry>) -> io::Result<Option<Self>> {
        let id = KeptId::new(BEFORE_NOTE, 0);
        if registry.succeeds() {
            // The predecessor had a terminal if there is a note.
            if !registry.unclaimed().contains(&id) {
                return Ok(None);
            }
            let before = SavedTerminal::decode_note(&registry.inherit_note(&id)?)?;
            return Self::hold(fd, before, registry, id, || Ok(())).map(Some);
        }
        if !isatty(fd) {
            return Ok(None);
        }
        let before = tcgetattr(fd)?;
        let mut raw = before.clone();
        raw.make_raw();
        // Lines that the VMM itself prints still begin at the left.
        raw.output_modes |= OutputModes::OPOST;
        let switch = || Ok(tcsetattr(fd, OptionalActions::Now, &raw)?);
        Self::hold(fd, SavedTerminal::of(&before), registry, id, switch).map(Some)
    }

    /// There is no terminal to read from any more, if there was one: nothing will be put back.
    pub fn forget(registry: &Registry) {
        drop(registry.claim(&KeptId::new(BEFORE_NOTE, 0)));
    }

    fn hold(
        fd: &OwnedFd,
        before: SavedTerminal,
        registry: &Arc<Registry>,
        id: KeptId,
        switch: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<Self> {
        let keep = fd.try_clone()?;
        let mut slot = terminal();
        if slot.is_some() {
            return Err(io::Error::other("another machine of this process has the terminal"));
        }
        let note = registry.add_note(id, &before.encode_to_vec())?;
        switch()?;
        *slot = Some((keep, before));
        Ok(Self { registry: registry.clone(), _note: note })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        match self.registry.succeeds() {
            // The predecessor still has it.
            true => leave_terminal(),
            false => restore_terminal(),
        }
    }
}

/// Finds Ctrl-A x in what is typed; Ctrl-A Ctrl-A sends one Ctrl-A.
pub(super) struct EscapeFilter {
    /// Ctrl-A was typed, and nothing since.
    pub armed: bool,
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
