//! What a strict client checks of a server, with a client that was written from the specification (`raw`); and our client with servers
//! good and bad (`client`).
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod client;
#[path = "../../examples/copier.rs"]
mod copier;
mod devices;
mod interrupts;
mod kept;
mod kept_server;
mod memory;
mod migration;
mod raw;
mod regions;
mod sessions;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::thread::JoinHandle;

use copier::Copier;
use raw::{Raw, longs, words};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use wherry_vfio_user::server::Host;
use wherry_vfio_user::{Bus, Server, Stop};

const CONFIG: u32 = 7;
/// Of `VFIO_USER_DEVICE_SET_IRQS`: data and actions.
const NONE: u32 = 1;
const BOOL: u32 = 2;
const EVENTFD: u32 = 4;
const MASK: u32 = 8;
const UNMASK: u32 = 16;
const TRIGGER: u32 = 32;
/// Migration states.
const ERROR: u32 = 0;
const STOP: u32 = 1;
const RUNNING: u32 = 2;
const STOP_COPY: u32 = 3;
const RESUMING: u32 = 4;
const PRE_COPY: u32 = 6;

/// A server in this process.
struct Served {
    path: PathBuf,
    bus: Bus,
    stop: Stop,
    thread: Option<JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl Served {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut Host)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let server = Server::bind(&path).unwrap();
        let mut device = Copier::new().unwrap();
        let mut host = Host::new(&device).unwrap();
        change(&mut host);
        let (bus, stop) = (host.bus().clone(), host.stop());
        let thread = std::thread::spawn(move || server.serve(&mut host, &mut device).unwrap());
        Self { path, bus, stop, thread: Some(thread), _directory: directory }
    }

    fn client(&self) -> Raw {
        Raw::connect(&self.path, "").0
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.stop();
        if self.thread.take().unwrap().join().is_err() && !std::thread::panicking() {
            panic!("the server has panicked");
        }
        assert!(!self.path.exists(), "the socket is removed");
    }
}

fn memory(size: u64) -> OwnedFd {
    let fd = memfd_create("memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, size).unwrap();
    fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    fd
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

fn get_region(client: &Raw, index: u32, room: u32) -> raw::Reply {
    client.ask(5, &[words(&[room, 0, index, 0]), longs(&[0, 0])].concat()).unwrap()
}

/// Starts a copy.
fn copy(client: &Raw, source: u64, destination: u64, length: u64) -> Result<(), u32> {
    client.write(CONFIG, 4, &[6, 0])?;
    for (at, value) in [(0, source), (8, destination), (16, length)] {
        client.write(0, at, &value.to_le_bytes())?;
    }
    client.write(0, 0x20, &[1, 0, 0, 0])
}
