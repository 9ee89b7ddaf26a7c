//! A peer that claims much and sends little does not make us allocate much. A binary of its own, because it counts what
//! the whole process allocates.
#![expect(unsafe_code, reason = "a global allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use wherry_stream::{
    ChannelKind, Connection, FrameHeader, FrameKind, Greeting, MAX_CONTROL_BYTES, MAX_PAGES_BYTES, RawHello, Role,
};

struct Counting;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        LARGEST.fetch_max(new_size, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn claims_do_not_allocate() {
    let claims = [
        (FrameKind::Control, MAX_CONTROL_BYTES, 0),
        (FrameKind::Control, u32::MAX, 0),
        (FrameKind::Pages, MAX_PAGES_BYTES, 1024),
        (FrameKind::Pages, u32::MAX, u16::MAX),
        (FrameKind::Ack, u32::MAX, 0),
    ];
    for (kind, length, extents) in claims {
        let (mut peer, ours) = UnixStream::pair().unwrap();
        let hello = RawHello {
            role: Role::Opener,
            version_min: 1,
            version_max: 1,
            kind: ChannelKind::Control as u16,
            index: 0,
            attempt: [0; 16],
            status: 0,
        };
        peer.write_all(&hello.encode()).unwrap();
        peer.write_all(&FrameHeader { kind, length, payload_crc: 0, extents, sequence: 0 }.encode()).unwrap();
        peer.write_all(&[0; 200]).unwrap();
        peer.shutdown(std::net::Shutdown::Write).unwrap();
        let connection = Connection::from_unix(ours, "a liar").unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut channel = Greeting::read(connection, deadline).unwrap().accept().unwrap();
        LARGEST.store(0, Ordering::Relaxed);
        assert!(channel.reader.read_frame().is_err());
        let largest = LARGEST.load(Ordering::Relaxed);
        assert!(largest <= 2 << 20, "{kind:?} of {length} bytes: allocated {largest} bytes at once");
    }
}
