//! What a vhost-user front end asks for: any requests in any order, with descriptors of any kind. The back end does them or
//! says what was wrong, and its device is at rest when the front end has gone.
#![no_main]

use std::collections::HashMap;
use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use wherry_backend::{Device, Driver, RingGiven, serve};
use wherry_memory::GuestMemory;

/// Most messages of one front end: their answers fit into a socket.
const MESSAGES: usize = 64;

/// A message: its request, flags, how many bytes follow, and those. Flags: 1 it wants an answer, 2 and 4 a file and an
/// eventfd go with it, 8 each byte stands for a number of 64 bits, its upper half shifted by its lower.
fn messages(mut bytes: &[u8]) -> Vec<(u8, u8, Vec<u8>)> {
    let mut messages = Vec::new();
    while let ([request, flags, len, rest @ ..], true) = (bytes, messages.len() < MESSAGES) {
        let (content, rest) = rest.split_at(rest.len().min(usize::from(*len)));
        let payload = match flags & 8 {
            0 => content.to_vec(),
            _ => content.iter().flat_map(|byte| (u64::from(byte >> 4) << (byte & 15)).to_ne_bytes()).collect(),
        };
        messages.push((*request, *flags, payload));
        bytes = rest;
    }
    messages
}

/// Looks at everything that it is given.
#[derive(Default)]
struct Fake(Mutex<Option<HashMap<u16, u16>>>);

impl Device for Fake {
    fn name(&self) -> &str {
        "fake"
    }

    fn features(&self) -> u64 {
        0
    }

    fn rings(&self) -> (u16, u16) {
        (2, 64)
    }

    fn config(&self) -> Vec<u8> {
        vec![0; 64]
    }

    fn changed(&self) -> Option<&EventFd> {
        None
    }

    fn write_config(&self, _offset: u32, _content: &[u8]) -> Result<(), String> {
        Ok(())
    }

    fn serve(
        &self,
        memory: GuestMemory,
        _features: u64,
        rings: Vec<RingGiven>,
        driver: Arc<Driver>,
    ) -> Result<(), String> {
        for ring in &rings {
            assert!(ring.size <= 64 && memory.check_address(GuestAddress(ring.used)).is_some());
            if let Some(in_flight) = &ring.in_flight {
                in_flight.left(3).iter().for_each(|head| assert!(*head < 64));
                in_flight.taken(5);
            }
            driver.ring(ring.index);
        }
        for region in memory.iter() {
            let _ = memory.write_obj(1u8, GuestAddress(region.start_addr().0));
        }
        let before = self.0.lock().unwrap().replace(rings.iter().map(|ring| (ring.index, ring.next)).collect());
        assert!(before.is_none(), "it was not at rest");
        Ok(())
    }

    fn rest(&self, _deadline: Instant) -> Result<Vec<(u16, u16)>, String> {
        Ok(self.0.lock().unwrap().take().expect("it served").into_iter().collect())
    }

    fn pause(&self, deadline: Instant) -> Result<Vec<(u16, u16)>, String> {
        self.rest(deadline)
    }

    fn go_on(&self) {}

    fn release(&self) {}

    fn announce(&self, _address: [u8; 6]) -> Result<(), String> {
        Ok(())
    }

    fn save(&self) -> Vec<u8> {
        vec![1; 100]
    }

    fn restore(&self, _state: &[u8]) -> Result<(), String> {
        Ok(())
    }

    fn keep(&self) -> Vec<u8> {
        Vec::new()
    }

    fn take(&self, _kept: &[u8]) -> Result<(), String> {
        Ok(())
    }
}

static FILE: LazyLock<File> = LazyLock::new(|| {
    let fd = rustix::fs::memfd_create("front", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, 1 << 20).unwrap();
    fd.into()
});
static EVENT: LazyLock<File> = LazyLock::new(|| {
    let fd = rustix::event::eventfd(1, rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK);
    fd.unwrap().into()
});
static QUIT: LazyLock<EventFd> = LazyLock::new(|| EventFd::new(EFD_NONBLOCK).unwrap());

fuzz_target!(|bytes: &[u8]| {
    let (front, back) = UnixStream::pair().unwrap();
    for (request, flags, payload) in messages(bytes) {
        // Postcopy ends with pages that nobody fills; and a pipe that is no pipe is read until it ends.
        if matches!(request, 28 | 42) {
            continue;
        }
        let head = [u32::from(request), 1 | u32::from(flags & 1) << 3, payload.len() as u32];
        let mut message: Vec<u8> = head.iter().flat_map(|word| word.to_ne_bytes()).collect();
        message.extend(payload);
        let with = [(FILE.as_fd(), 2), (EVENT.as_fd(), 4)].into_iter();
        let fds: Vec<BorrowedFd<'_>> = with.filter(|(_, bit)| flags & bit != 0).map(|(fd, _)| fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        if rustix::net::sendmsg(&front, &[IoSlice::new(&message)], &mut control, SendFlags::DONTWAIT).is_err() {
            break;
        }
    }
    let _ = front.shutdown(Shutdown::Write);
    let device = Fake::default();
    // What it says does not matter.
    let _ = serve(back, &device, &QUIT);
    assert!(device.0.lock().unwrap().is_none(), "it serves a front end that has gone");
});
