//! A link that can be cut, stalled and made to lie: everything between the two ends passes through it.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use wherry_stream::Endpoint;

#[derive(Default)]
pub struct Faults {
    cut: AtomicBool,
    stalled: AtomicBool,
    /// Flip a bit of the byte at this position of the `n`th connection, counted towards the destination; 0: none.
    flip_at: AtomicU64,
    flip_connection: AtomicU64,
    /// Nothing passes on this connection towards the destination; 0: none.
    held: AtomicU64,
    quit: AtomicBool,
}

pub struct Proxy {
    endpoint: Endpoint,
    faults: Arc<Faults>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    acceptor: Option<JoinHandle<()>>,
}

impl Proxy {
    pub fn new(target: &Endpoint) -> Self {
        let Endpoint::Tcp { host, port } = target.clone() else { panic!("the proxy speaks TCP") };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let port_here = listener.local_addr().unwrap().port();
        let faults = Arc::new(Faults::default());
        let streams = Arc::new(Mutex::new(vec![]));
        let (f, s) = (faults.clone(), streams.clone());
        let acceptor = std::thread::spawn(move || {
            let mut connection = 0;
            let mut pumps = vec![];
            while !f.quit.load(Ordering::SeqCst) {
                let Ok((near, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(2));
                    continue;
                };
                if f.cut.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(far) = TcpStream::connect((host.as_str(), port)) else { continue };
                near.set_nonblocking(false).unwrap();
                for socket in [&near, &far] {
                    socket.set_nodelay(true).unwrap();
                    s.lock().unwrap().push(socket.try_clone().unwrap());
                }
                connection += 1;
                pumps.push(pump(near.try_clone().unwrap(), far.try_clone().unwrap(), f.clone(), connection));
                pumps.push(pump(far, near, f.clone(), 0));
            }
            for p in pumps {
                p.join().unwrap();
            }
        });
        let endpoint = Endpoint::Tcp { host: "127.0.0.1".into(), port: port_here };
        Self { endpoint, faults, streams, acceptor: Some(acceptor) }
    }

    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub fn handle(&self) -> Link {
        Link { faults: self.faults.clone(), streams: self.streams.clone() }
    }
}

/// What a test does to the link.
#[derive(Clone)]
pub struct Link {
    faults: Arc<Faults>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
}

impl Link {
    /// All connections end, and no new ones are made.
    pub fn cut(&self) {
        self.faults.cut.store(true, Ordering::SeqCst);
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// One connection ends, counted from 1 in the order in which they were made since the last cut.
    pub fn cut_one(&self, connection: usize) {
        for stream in self.streams.lock().unwrap().iter().skip(2 * (connection - 1)).take(2) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// New connections can be made again.
    pub fn mend(&self) {
        self.faults.cut.store(false, Ordering::SeqCst);
    }

    /// Connections stay, and nothing passes any more.
    pub fn stall(&self) {
        self.faults.stalled.store(true, Ordering::SeqCst);
    }

    /// Nothing that the source sends passes on its `connection`th connection (1 is the control channel), until it is 0.
    pub fn hold(&self, connection: u64) {
        self.faults.held.store(connection, Ordering::SeqCst);
    }

    /// Flips a bit at a position of what the source sends on its `connection`th connection (1 is the control channel).
    pub fn flip(&self, connection: u64, at: u64) {
        self.faults.flip_connection.store(connection, Ordering::SeqCst);
        self.faults.flip_at.store(at, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.faults.quit.store(true, Ordering::SeqCst);
        self.handle().cut();
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.join().unwrap();
        }
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream, faults: Arc<Faults>, connection: u64) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        let mut position = 0u64;
        loop {
            let n = match from.read(&mut buffer) {
                Ok(0) | Err(_) => break,
                Ok(n) => n,
            };
            let held = || connection != 0 && faults.held.load(Ordering::SeqCst) == connection;
            while (faults.stalled.load(Ordering::SeqCst) || held())
                && !faults.cut.load(Ordering::SeqCst)
                && !faults.quit.load(Ordering::SeqCst)
            {
                std::thread::sleep(Duration::from_millis(2));
            }
            let at = faults.flip_at.load(Ordering::SeqCst);
            if connection != 0
                && at != 0
                && faults.flip_connection.load(Ordering::SeqCst) == connection
                && (position..position + n as u64).contains(&at)
            {
                buffer[(at - position) as usize] ^= 0x10;
            }
            position += n as u64;
            if to.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
        let _ = from.shutdown(Shutdown::Both);
    })
}
