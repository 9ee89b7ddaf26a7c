//! A front end that says what it is told to, and a device that shows what it was given.
#![allow(dead_code, reason = "each test program uses some of it")]

use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use wherry_backend::{BackendError, Device, Driver, RingGiven, Server};
use wherry_memory::GuestMemory;

/// How long anything here may take.
const LIMIT: Duration = Duration::from_secs(20);

/// What the device was last given.
pub struct Given {
    pub memory: GuestMemory,
    pub features: u64,
    pub rings: Vec<RingGiven>,
    pub driver: Arc<Driver>,
}

/// A device with two rings that does nothing by itself.
#[derive(Default)]
pub struct Fake {
    pub given: Mutex<Option<Given>>,
    pub events: Mutex<Vec<String>>,
    pub state: Mutex<Vec<u8>>,
    pub config: Mutex<Vec<u8>>,
    /// It does not come to rest while this is set.
    pub busy: Mutex<bool>,
    /// It was asked to.
    pub asked: AtomicBool,
    pub changed: Bell,
    /// Features that it does not have, unlike others.
    pub lacks: u64,
    /// Something in its configuration.
    pub size: u8,
    /// It takes nothing of another process.
    pub refuses: bool,
}

/// An eventfd that nobody has rung.
pub struct Bell(pub EventFd);

impl Default for Bell {
    fn default() -> Self {
        Self(EventFd::new(EFD_NONBLOCK).unwrap())
    }
}

impl Fake {
    fn note(&self, event: impl Into<String>) {
        self.events.lock().unwrap().push(event.into());
    }

    pub fn events(&self) -> Vec<String> {
        std::mem::take(&mut self.events.lock().unwrap())
    }

    /// Waits until it serves.
    pub fn served<R>(&self, f: impl FnOnce(&Given) -> R) -> R {
        until("the device to serve", || self.given.lock().unwrap().is_some());
        f(self.given.lock().unwrap().as_ref().unwrap())
    }

    pub fn serves(&self) -> bool {
        self.given.lock().unwrap().is_some()
    }
}

impl Device for Fake {
    fn name(&self) -> &str {
        "fake"
    }

    fn features(&self) -> u64 {
        1 << 29 & !self.lacks
    }

    fn rings(&self) -> (u16, u16) {
        (2, 64)
    }

    fn config(&self) -> Vec<u8> {
        let mut config: Vec<u8> = (0..64).collect();
        config[63] += self.size;
        config
    }

    fn changed(&self) -> Option<&EventFd> {
        Some(&self.changed.0)
    }

    fn write_config(&self, offset: u32, content: &[u8]) -> Result<(), String> {
        match offset {
            0 => Err("it cannot be written".into()),
            _ => {
                *self.config.lock().unwrap() = content.to_vec();
                Ok(())
            }
        }
    }

    fn serve(
        &self,
        memory: GuestMemory,
        features: u64,
        rings: Vec<RingGiven>,
        driver: Arc<Driver>,
    ) -> Result<(), String> {
        let numbers: Vec<_> = rings.iter().map(|ring| (ring.index, ring.next)).collect();
        self.note(format!("serve {numbers:?}"));
        let before = self.given.lock().unwrap().replace(Given { memory, features, rings, driver });
        assert!(before.is_none(), "it was not at rest");
        Ok(())
    }

    /// Each ring goes on three entries further.
    fn rest(&self, deadline: Instant) -> Result<Vec<(u16, u16)>, String> {
        self.asked.store(true, Ordering::SeqCst);
        while *self.busy.lock().unwrap() {
            if Instant::now() >= deadline {
                return Err("it is busy".into());
            }
            std::thread::yield_now();
        }
        self.note("rest");
        let given = self.given.lock().unwrap().take().expect("it served");
        Ok(given.rings.iter().map(|ring| (ring.index, ring.next + 3)).collect())
    }

    fn pause(&self, deadline: Instant) -> Result<Vec<(u16, u16)>, String> {
        let soon = Instant::now() + Duration::from_millis(100);
        self.rest(deadline.min(soon))
    }

    fn go_on(&self) {
        self.note("go on");
    }

    fn release(&self) {
        self.note("release");
    }

    fn announce(&self, address: [u8; 6]) -> Result<(), String> {
        self.note(format!("announce {address:?}"));
        Ok(())
    }

    fn save(&self) -> Vec<u8> {
        vec![7; 5000]
    }

    fn restore(&self, state: &[u8]) -> Result<(), String> {
        *self.state.lock().unwrap() = state.to_vec();
        if state.first() == Some(&7) { Ok(()) } else { Err("another device's".into()) }
    }

    fn keep(&self) -> Vec<u8> {
        vec![9; 3]
    }

    fn take(&self, kept: &[u8]) -> Result<(), String> {
        assert_eq!(kept, [9; 3]);
        if self.refuses { Err("it does not fit".into()) } else { Ok(()) }
    }
}

/// A back end on a thread of this process.
pub struct Running {
    pub device: Arc<Fake>,
    pub server: Arc<Server>,
    pub path: PathBuf,
    thread: Option<JoinHandle<Result<(), BackendError>>>,
    _place: tempfile::TempDir,
}

impl Running {
    pub fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("s");
        let (device, server) = (Arc::new(Fake::default()), Arc::new(Server::bind(&path).unwrap()));
        let (its_device, its_server) = (device.clone(), server.clone());
        let thread = std::thread::spawn(move || its_server.run(&*its_device));
        Self { device, server, path, thread: Some(thread), _place: place }
    }

    pub fn client(&self) -> Client {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Client { stream }
    }

    /// Waits for its end: how it ended.
    pub fn join(&mut self) -> Result<(), BackendError> {
        self.thread.take().unwrap().join().unwrap()
    }

    /// Stops it: how it ended.
    pub fn end(&mut self) -> Result<(), BackendError> {
        self.server.stop();
        self.join()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        *self.device.busy.lock().unwrap() = false;
        self.server.stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !std::thread::panicking() {
                ended.unwrap().unwrap();
            }
        }
    }
}

/// A front end.
pub struct Client {
    pub stream: UnixStream,
}

pub const REPLY_ACK: u64 = 1 << 3;
pub const NEED_REPLY: u32 = 1 << 3;

impl Client {
    /// Agrees on everything that is offered.
    pub fn agree(&self) -> u64 {
        let features = self.number(1, &[]);
        let protocol = self.number(15, &[]);
        self.send(16, 1, &protocol.to_ne_bytes(), &[]);
        self.send(2, 1, &features.to_ne_bytes(), &[]);
        self.send(3, 1, &[], &[]);
        features
    }

    pub fn send(&self, request: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut message: Vec<u8> =
            [request, flags, payload.len() as u32].iter().flat_map(|w| w.to_ne_bytes()).collect();
        message.extend(payload);
        self.raw(&message, fds);
    }

    pub fn raw(&self, message: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        // It may have closed the connection already.
        let _ = rustix::net::sendmsg(&self.stream, &[IoSlice::new(message)], &mut control, SendFlags::NOSIGNAL);
    }

    /// The next answer, if one comes before the end.
    pub fn answer(&self, request: u32) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
        let mut fds = Vec::new();
        let mut header = [0; 12];
        self.fill(&mut header, &mut fds)?;
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (request, 5), "an answer to another request, or with other flags");
        let mut payload = vec![0; word(8) as usize];
        self.fill(&mut payload, &mut fds)?;
        Some((payload, fds))
    }

    fn fill(&self, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> Option<()> {
        let mut got = 0;
        while got < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut rest = [IoSliceMut::new(&mut bytes[got..])];
            match rustix::net::recvmsg(&self.stream, &mut rest, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(message) if message.bytes == 0 => return None,
                Ok(message) => {
                    for part in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(received) = part {
                            fds.extend(received);
                        }
                    }
                    got += message.bytes;
                }
                Err(rustix::io::Errno::CONNRESET) => return None,
                Err(error) => panic!("no answer: {error}"),
            }
        }
        Some(())
    }

    pub fn ask(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> (Vec<u8>, Vec<OwnedFd>) {
        self.send(request, 1, payload, fds);
        self.answer(request).expect("an answer")
    }

    pub fn number(&self, request: u32, payload: &[u8]) -> u64 {
        u64::from_ne_bytes(self.ask(request, payload, &[]).0.try_into().unwrap())
    }

    pub fn number_with(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> u64 {
        u64::from_ne_bytes(self.ask(request, payload, fds).0.try_into().unwrap())
    }

    /// Whether it was done.
    pub fn order(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        self.send(request, 1 | NEED_REPLY, payload, fds);
        let (answer, _) = self.answer(request).expect("an answer");
        answer == 0u64.to_ne_bytes()
    }

    /// Whether the back end has closed the connection, without a word.
    pub fn is_closed(&self) -> bool {
        match (&self.stream).read(&mut [0]) {
            Ok(got) => got == 0,
            // What was sent and not read is thrown away.
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

/// Numbers of 64 bits as a payload.
pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub fn pair(ring: u32, value: u32) -> Vec<u8> {
    [ring, value].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// A memfd with so many bytes.
pub fn memfd(bytes: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("front", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, bytes).unwrap();
    fd
}

pub fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

#[expect(unsafe_code, reason = "the type has no other way to lend its descriptor")]
pub fn lend(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: it is open as long as the value that is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

pub fn until(what: &str, there: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !there() {
        assert!(Instant::now() < deadline, "waited for {what}");
        std::thread::yield_now();
    }
}

/// Shows one region: guest address, size, address there, descriptor.
pub fn table(guest: u64, size: u64, user: u64) -> Vec<u8> {
    words(&[1, guest, size, user, 0])
}

/// Sets a ring up in memory that was shown at `user`, and rings it.
pub fn start_ring(client: &Client, ring: u32, user: u64, next: u32) -> EventFd {
    assert!(client.order(8, &pair(ring, 64), &[]));
    assert!(client.order(10, &pair(ring, next), &[]));
    assert!(client.order(9, &words(&[ring.into(), user, user + 0x1000, user + 0x2000, 0]), &[]));
    let kick = event();
    assert!(client.order(12, &words(&[ring.into()]), &[lend(&kick)]));
    assert!(client.order(18, &pair(ring, 1), &[]));
    kick.write(1).unwrap();
    kick
}

/// How many descriptors this process has.
pub fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

pub fn fd(fd: &OwnedFd) -> [BorrowedFd<'_>; 1] {
    [fd.as_fd()]
}
