//! The process that a shell waits for, when another one has the VM.
//!
//! A VM whose serial port is the user's terminal has it as a job of the shell: when the process that the shell has started ends, the
//! shell takes the terminal back, and whoever else reads from it is stopped or told of an error. So that process does not end when it
//! is replaced. It becomes a small one that waits for the end of the VM, in whichever process that is by then, and ends as that one does.
//!
//! Between the two is a socket of packets: [`Waiter`] is its end in the processes that have the VM one after the other, kept like any
//! other descriptor, and [`wait`] serves the other end. The first thing there is the terminal, and how it was before, so that it is put
//! back also after a process that could not.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use wherry_handover::{KeptId, Registry, RegistryError};
use wherry_socket::descriptors;

use crate::serial::{restore_as, users_terminal};

/// The word by which a process becomes the one that waits; its standard input is its end of the socket.
pub const WAIT: &str = "wait-for-successor";

/// Name of the end of those who have the VM.
const WAITER: &str = "waiter";

/// To the one that waits: a terminal, which comes with it, and how it was.
const TERMINAL: u8 = 1;
/// To the one that waits: the VM has ended, with an exit status.
const ENDED: u8 = 2;
/// From the one that waits: the VM is to be stopped.
const STOP: u8 = 3;
/// Longest packet: the settings of a terminal.
const MOST: usize = 4096;

fn send(socket: impl AsFd, packet: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    loop {
        match descriptors::send(&socket, &[IoSlice::new(packet)], descriptors) {
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(()),
        }
    }
}

/// The next packet; nothing when there is nobody at the other end.
fn receive(socket: impl AsFd) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let (mut packet, mut descriptors) = (vec![0; MOST], Vec::new());
    loop {
        match descriptors::receive(&socket, &mut packet, &mut descriptors) {
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Ok(None),
            received => match received?.bytes {
                0 => return Ok(None),
                bytes => {
                    packet.truncate(bytes);
                    return Ok(Some((packet, descriptors)));
                }
            },
        }
    }
}

/// The one that waits, as it is seen by a process that has the VM.
#[derive(Debug)]
pub struct Waiter {
    socket: Arc<OwnedFd>,
}

impl Waiter {
    /// The one that has come with the VM, if there is one.
    pub(super) fn claim(registry: &Registry) -> Option<Self> {
        registry.claim(&KeptId::new(WAITER, 0)).map(|socket| Self { socket: Arc::new(socket) })
    }

    /// Has it go over to the next process.
    pub(super) fn keep(&self, registry: &Registry) -> Result<(), RegistryError> {
        registry.keep(KeptId::new(WAITER, 0), self.socket.clone())
    }

    /// Waits until it is asked for a stop there. False: nobody will be.
    pub fn await_stop(&self) -> bool {
        loop {
            match receive(&self.socket) {
                Ok(Some((packet, _))) if packet[0] == STOP => return true,
                Ok(Some(_)) => {}
                Ok(None) => return false,
                Err(error) => {
                    tracing::warn!(%error, "listening to the process that waits for the end of this one");
                    return false;
                }
            }
        }
    }

    /// Has it end with this exit status, as this process does.
    pub fn ended(&self, status: u8) {
        if let Err(error) = send(&self.socket, &[ENDED, status], &[]) {
            tracing::debug!(%error, "telling the process that waits for the end of this one");
        }
    }
}

/// What a process becomes the one that waits with, made before another one has the VM.
pub(super) struct Prepared {
    ours: OwnedFd,
    theirs: Arc<OwnedFd>,
}

impl Prepared {
    /// For a VM whose serial port has the user's terminal; others need none.
    pub(super) fn new(registry: &Registry) -> io::Result<Option<Self>> {
        let Some((terminal, before)) = users_terminal() else { return Ok(None) };
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        send(&theirs, &[&[TERMINAL], &before[..]].concat(), &[terminal.as_fd()])?;
        Ok(Some(Self { ours, theirs: registry.add(KeptId::new(WAITER, 0), theirs)? }))
    }

    /// This process's end. The other one is that of those who have the VM.
    pub(super) fn into_ours(self) -> OwnedFd {
        drop(self.theirs);
        self.ours
    }
}

/// How the VM ended that was waited for.
#[derive(Debug, PartialEq, Eq)]
pub enum Waited {
    /// Its process has told with which status it ends.
    Ended(u8),
    /// Its process has ended without a word: the VM is lost.
    Silent,
}

/// Waits for the end of the VM, and puts the terminal back if nobody else does.
pub fn wait(socket: impl AsFd) -> io::Result<Waited> {
    let mut terminal: Option<(OwnedFd, Vec<u8>)> = None;
    loop {
        match receive(&socket)? {
            Some((packet, mut descriptors)) => match packet[..] {
                [TERMINAL, ref before @ ..] => terminal = descriptors.pop().map(|fd| (fd, before.to_vec())),
                [ENDED, status] => return Ok(Waited::Ended(status)),
                _ => tracing::warn!(?packet, "the process that has the VM says something unknown"),
            },
            None => {
                if let Some((fd, before)) = terminal
                    && let Err(error) = restore_as(&fd, &before)
                {
                    tracing::warn!(%error, "putting the terminal back");
                }
                return Ok(Waited::Silent);
            }
        }
    }
}

/// Has whoever has the VM stop it. What was asked for is asked for again by the caller until the VM has ended: it may have been on its way
/// to a process that was replaced.
pub fn ask_to_stop(socket: impl AsFd) -> io::Result<()> {
    send(socket, &[STOP], &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (OwnedFd, Waiter) {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        (ours, Waiter { socket: Arc::new(theirs) })
    }

    #[test]
    fn the_status_of_the_last_of_several_processes_is_passed_on_and_a_stop_reaches_it() {
        let (ours, first) = pair();
        ask_to_stop(&ours).unwrap();
        assert!(first.await_stop());
        let (registry, successor) = (Registry::new(), Registry::of_successor());
        assert!(Waiter::claim(&successor).is_none());
        first.keep(&registry).unwrap();
        let kept = registry.list();
        successor.arrived([(kept[0].id.clone(), kept[0].as_fd().try_clone_to_owned().unwrap())]).unwrap();
        let second = Waiter::claim(&successor).unwrap();
        drop((first, kept));
        ask_to_stop(&ours).unwrap();
        assert!(second.await_stop());
        second.ended(3);
        assert_eq!(wait(&ours).unwrap(), Waited::Ended(3));
        drop(ours);
        assert!(!second.await_stop());
        second.ended(0);
    }

    #[test]
    fn the_end_of_all_processes_without_a_word_is_noticed() {
        let (ours, waiter) = pair();
        send(&waiter.socket, &[99, 1], &[]).unwrap();
        drop(waiter);
        assert_eq!(wait(&ours).unwrap(), Waited::Silent);
    }
}
