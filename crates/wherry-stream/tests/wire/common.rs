//! Two ends of a real socket, and raw clients that may send anything.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use wherry_stream::{Channel, ChannelKind, Connection, Endpoint, Greeting, Hello, IoRange, Listener};

/// Far enough for a slow machine; nothing here waits that long unless it is broken.
pub fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

pub const ATTEMPT: [u8; 16] = [0xa7; 16];
pub const DATA: Hello = Hello { kind: ChannelKind::Data, index: 2, attempt: ATTEMPT };

pub fn hello(kind: ChannelKind) -> Hello {
    Hello { kind, index: 0, attempt: ATTEMPT }
}

#[derive(Clone, Copy, Debug)]
pub enum Family {
    Tcp,
    Unix,
}

pub const FAMILIES: [Family; 2] = [Family::Tcp, Family::Unix];

/// A listener in a directory of its own.
pub struct Site {
    pub listener: Listener,
    _directory: tempfile::TempDir,
}

/// A client that speaks whatever it likes.
pub trait Raw: Read + Write + Send {
    fn hang_up(&self);
}

impl Raw for TcpStream {
    fn hang_up(&self) {
        self.shutdown(std::net::Shutdown::Write).unwrap();
    }
}

impl Raw for UnixStream {
    fn hang_up(&self) {
        self.shutdown(std::net::Shutdown::Write).unwrap();
    }
}

impl Site {
    pub fn new(family: Family) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let endpoint = match family {
            Family::Tcp => "tcp:127.0.0.1:0".parse().unwrap(),
            Family::Unix => Endpoint::Unix(directory.path().join("socket")),
        };
        Self { listener: Listener::bind(&endpoint).unwrap(), _directory: directory }
    }

    pub fn endpoint(&self) -> &Endpoint {
        self.listener.local_endpoint()
    }

    /// Opener and acceptor.
    pub fn connections(&self) -> (Connection, Connection) {
        let opener = self.endpoint().connect(deadline()).unwrap();
        (opener, self.listener.accept(deadline()).unwrap())
    }

    /// A raw client and our accepted end.
    pub fn raw(&self) -> (Box<dyn Raw>, Connection) {
        let limit = Some(Duration::from_secs(60));
        let raw: Box<dyn Raw> = match self.endpoint() {
            Endpoint::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).unwrap();
                stream.set_nodelay(true).unwrap();
                stream.set_read_timeout(limit).unwrap();
                stream.set_write_timeout(limit).unwrap();
                Box::new(stream)
            }
            Endpoint::Unix(path) => {
                let stream = UnixStream::connect(path).unwrap();
                stream.set_read_timeout(limit).unwrap();
                stream.set_write_timeout(limit).unwrap();
                Box::new(stream)
            }
        };
        (raw, self.listener.accept(deadline()).unwrap())
    }

    /// Opener's and acceptor's channel.
    pub fn channels(&self, hello: Hello) -> (Channel, Channel) {
        let (opener, acceptor) = self.connections();
        let acceptor = spawn(move || Greeting::read(acceptor, deadline()).unwrap().accept().unwrap());
        (hello.open(opener, deadline()).unwrap(), acceptor.join().unwrap())
    }

    /// A raw client that has said its hello properly, and our end of the channel.
    pub fn raw_channel(&self, hello: Hello) -> (Box<dyn Raw>, Channel) {
        let (mut raw, connection) = self.raw();
        let said = wherry_stream::RawHello {
            role: wherry_stream::Role::Opener,
            version_min: 1,
            version_max: 1,
            kind: hello.kind as u16,
            index: hello.index,
            attempt: hello.attempt,
            status: 0,
        };
        raw.write_all(&said.encode()).unwrap();
        let channel = Greeting::read(connection, deadline()).unwrap().accept().unwrap();
        raw.read_exact(&mut [0; wherry_stream::HELLO_BYTES]).unwrap();
        (raw, channel)
    }
}

pub fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    std::thread::spawn(work)
}

/// Starts `work` in a thread and returns when that thread sleeps in the kernel (or has ended).
pub fn spawn_until_blocked<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let thread = spawn(move || {
        sender.send(rustix::thread::gettid().as_raw_nonzero()).unwrap();
        work()
    });
    let id = receiver.recv().unwrap();
    let until = deadline();
    while !thread.is_finished() {
        let stat = std::fs::read_to_string(format!("/proc/self/task/{id}/stat")).unwrap_or_default();
        if stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('S')) {
            break;
        }
        assert!(Instant::now() < until, "waited for thread {id} to block: {stat}");
        std::thread::yield_now();
    }
    thread
}

/// Pieces of a buffer that a test keeps until its transfer has ended.
pub fn ranges(buffer: &mut [u8], piece: usize) -> Vec<IoRange> {
    #[expect(unsafe_code, reason = "tests hand ordinary buffers to the wire as if they were guest memory")]
    // SAFETY: callers keep the buffer and do not look at it until the transfer has ended.
    buffer.chunks_mut(piece).map(|c| unsafe { IoRange::new(c.as_mut_ptr(), c.len()) }).collect()
}

/// Bytes that differ from place to place.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i ^ (i >> 8).wrapping_mul(31) ^ (i >> 16).wrapping_mul(7)) as u8).collect()
}
