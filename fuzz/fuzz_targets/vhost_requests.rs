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

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use wherry_backend::{Device, Driver, RingGiven, serve};
use wherry_memory::GuestMemory;

/// Most messages of one front end: their answers fit into a socket.
const MESSAGES: usize = 64;

#[derive(Arbitrary, Debug)]
struct Asked {
    request: u8,
    needs_reply: bool,
    payload: Payload,
    descriptors: [bool; 2],
}

#[derive(Arbitrary, Debug)]
enum Payload {
    /// Numbers that fit together: pages of one small file, rings, indices.
    Numbers(Vec<u8>),
    Pair(u8, u16),
    Bytes(Vec<u8>),
}

impl Payload {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Numbers(numbers) => numbers
                .iter()
                .take(40)
                .flat_map(|number| (u64::from(number >> 4) << (number & 15)).to_ne_bytes())
                .collect(),
            Self::Pair(ring, value) => {
                [u32::from(*ring), u32::from(*value)].iter().flat_map(|n| n.to_ne_bytes()).collect()
            }
            Self::Bytes(bytes) => bytes.iter().copied().take(5000).collect(),
        }
    }
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

fuzz_target!(|asked: Vec<Asked>| {
    let (front, back) = UnixStream::pair().unwrap();
    for asked in asked.iter().take(MESSAGES) {
        // Postcopy ends with pages that nobody fills; and a pipe that is no pipe is read until it ends.
        if matches!(asked.request, 28 | 42) {
            continue;
        }
        let payload = asked.payload.bytes();
        let flags = 1 | u32::from(asked.needs_reply) << 3;
        let mut message: Vec<u8> = [u32::from(asked.request), flags, payload.len() as u32]
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        message.extend(payload);
        let fds: Vec<BorrowedFd<'_>> = [FILE.as_fd(), EVENT.as_fd()]
            .into_iter()
            .zip(asked.descriptors)
            .filter(|(_, on)| *on)
            .map(|(fd, _)| fd)
            .collect();
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
