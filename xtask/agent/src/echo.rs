//! A TCP connection that carries data both ways: what is sent to the guest comes back, and is compared byte for byte.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use wherry_netlab::Namespace;

/// Bytes that are sent at once: many segments, that the devices are to cut.
const BLOCK: usize = 32 << 10;
/// After each: a connection that takes all it can leaves no time for anything else on one emulated CPU.
const PACE: Duration = Duration::from_millis(250);
/// A connection that is silent for so long has ended.
const SILENCE: Duration = Duration::from_secs(60);

/// A connection that carries data.
#[derive(Debug)]
pub struct Echo {
    shared: Arc<Shared>,
    threads: Option<[JoinHandle<Result<u64>>; 2]>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    returned: AtomicU64,
    gap: Mutex<Duration>,
}

/// The bytes that are sent: the same at both ends, and no part like another.
struct Pattern(u64);

impl Pattern {
    fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            // A linear congruential generator modulo 2^64; its high bits are the good ones.
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = (self.0 >> 56) as u8;
        }
    }
}

impl Echo {
    /// Connects from inside `namespace` and begins.
    pub fn start(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        let connected = namespace.within(|| TcpStream::connect_timeout(&address, SILENCE))?;
        Self::over(connected.with_context(|| format!("cannot connect to {address}"))?)
    }

    fn over(stream: TcpStream) -> Result<Self> {
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_write_timeout(Some(SILENCE))?;
        let shared = Arc::<Shared>::default();
        let sender = {
            let (shared, stream) = (shared.clone(), stream.try_clone()?);
            std::thread::spawn(move || send(&shared, &stream))
        };
        let receiver = {
            let shared = shared.clone();
            std::thread::spawn(move || {
                let result = receive(&shared, &stream);
                if result.is_err() {
                    // The sender has nothing to wait for.
                    shared.stop.store(true, Ordering::Release);
                    let _ = stream.shutdown(Shutdown::Both);
                }
                result
            })
        };
        Ok(Self { shared, threads: Some([sender, receiver]) })
    }

    /// Bytes that have come back.
    pub fn returned(&self) -> u64 {
        self.shared.returned.load(Ordering::Acquire)
    }

    /// The longest time in which nothing came back since this was last asked.
    pub fn take_gap(&self) -> Duration {
        std::mem::take(&mut *self.shared.gap.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Fails if the connection has ended or brought something wrong back.
    pub fn check(&mut self) -> Result<()> {
        if self.threads.as_ref().is_some_and(|threads| threads.iter().any(JoinHandle::is_finished)) {
            let total = self.join()?;
            bail!("the connection ended by itself after {total} bytes");
        }
        Ok(())
    }

    /// Sends no more, waits for the rest, and gives how much went and came back. It must all have been right.
    pub fn finish(mut self) -> Result<u64> {
        self.join()
    }

    fn join(&mut self) -> Result<u64> {
        self.shared.stop.store(true, Ordering::Release);
        let [sender, receiver] = self.threads.take().context("it has been finished")?;
        let join =
            |thread: JoinHandle<Result<u64>>| thread.join().unwrap_or_else(|_| Err(anyhow!("a thread panicked")));
        let (sent, received) = (join(sender), join(receiver));
        // What came tells more: the sender only sees its connection end.
        let received = received.context("receiving")?;
        let sent = sent.context("sending")?;
        ensure!(sent == received, "{sent} bytes were sent and {received} came back");
        Ok(sent)
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // The threads end with the connection or its silence; nobody waits for them where something has failed.
        self.shared.stop.store(true, Ordering::Release);
    }
}

fn send(shared: &Shared, mut stream: &TcpStream) -> Result<u64> {
    let (mut pattern, mut block, mut sent) = (Pattern(0), vec![0; BLOCK], 0);
    while !shared.stop.load(Ordering::Acquire) {
        pattern.fill(&mut block);
        stream.write_all(&block).with_context(|| format!("after {sent} bytes"))?;
        sent += BLOCK as u64;
        std::thread::sleep(PACE);
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(sent)
}

fn receive(shared: &Shared, mut stream: &TcpStream) -> Result<u64> {
    let (mut pattern, mut expected, mut block, mut received) = (Pattern(0), vec![0; BLOCK], vec![0; BLOCK], 0u64);
    let mut last = Instant::now();
    loop {
        let count = match stream.read(&mut block) {
            Ok(0) => return Ok(received),
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).with_context(|| format!("after {received} bytes")),
        };
        let now = Instant::now();
        let silence = now.saturating_duration_since(std::mem::replace(&mut last, now));
        {
            let mut gap = shared.gap.lock().unwrap_or_else(PoisonError::into_inner);
            *gap = silence.max(*gap);
        }
        pattern.fill(&mut expected[..count]);
        if let Some(at) = (0..count).find(|&at| block[at] != expected[at]) {
            let (came, was) = (block[at], expected[at]);
            bail!("byte {} came back as {came:#04x} and was {was:#04x}", received + at as u64);
        }
        received += count as u64;
        shared.returned.store(received, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// One end of a connection of which the other returns what comes, changed by `change`.
    fn against(change: impl Fn(u64, &mut [u8]) + Send + 'static) -> Echo {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let (mut block, mut total) = (vec![0; BLOCK], 0);
            while let Ok(count @ 1..) = stream.read(&mut block) {
                change(total, &mut block[..count]);
                total += count as u64;
                if stream.write_all(&block[..count]).is_err() {
                    return;
                }
            }
        });
        Echo::over(TcpStream::connect(address).unwrap()).unwrap()
    }

    #[test]
    fn all_that_is_sent_comes_back() {
        let mut echo = against(|_, _| ());
        let deadline = Instant::now() + Duration::from_secs(20);
        while echo.returned() < 4 * BLOCK as u64 {
            echo.check().unwrap();
            assert!(Instant::now() < deadline, "waited 20 s for 4 blocks, {} bytes came back", echo.returned());
            std::thread::yield_now();
        }
        assert!(echo.finish().unwrap() >= 4 * BLOCK as u64);
    }

    #[test]
    fn one_wrong_byte_is_found_and_named() {
        let mut echo = against(|total, block| {
            if let Some(at) = 100_000u64.checked_sub(total).filter(|at| *at < block.len() as u64) {
                block[at as usize] ^= 1;
            }
        });
        let deadline = Instant::now() + Duration::from_secs(20);
        let error = loop {
            if let Err(error) = echo.check() {
                break format!("{error:#}");
            }
            assert!(Instant::now() < deadline, "waited 20 s for the wrong byte to be found");
            std::thread::yield_now();
        };
        assert!(error.contains("byte 100000 came back"), "{error}");
    }
}
