//! Raw speed of this machine's loopback: 512 MiB from one memfd into another, by every way the engine could choose.
//!
//! `cargo run --release -p wherry-stream --example loopback [-- MIB ROUNDS PIECE_KIB]`. The ways take turns within each
//! round, so that a machine whose speed changes does not favour one of them; medians are printed, and the least processor time.
#![expect(unsafe_code, reason = "maps memory and hands pieces of it to the wire, as the engine does")]

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::mm::{Advice, MapFlags, ProtFlags};
use wherry_stream::{
    Channel, ChannelKind, Endpoint, Extent, ExtentKind, FileRange, Frame, GRANULE, Greeting, Hello, IoRange, Listener,
    Tls, TlsFiles,
};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A memfd and one mapping of it.
struct Memory {
    fd: OwnedFd,
    base: *mut u8,
    len: usize,
}

// SAFETY: the mapping may be used from any thread; only the kernel writes to it while threads run.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(len: usize) -> Result<Self, Failure> {
        let fd = rustix::fs::memfd_create("loopback", rustix::fs::MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&fd, len as u64)?;
        // SAFETY: a new mapping at an address the kernel chooses.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &fd,
                0,
            )?
        };
        // SAFETY: advice on the mapping just made.
        unsafe { rustix::mm::madvise(base, len, Advice::LinuxNoHugepage)? };
        Ok(Self { fd, base: base.cast(), len })
    }

    /// Bytes no compression or zero detection could shorten.
    fn fill(&self) {
        let mut x = 0x9e37_79b9_7f4a_7c15_u64;
        for at in (0..self.len).step_by(8) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            // SAFETY: inside the mapping, aligned, and nobody else uses it yet.
            unsafe { self.base.add(at).cast::<u64>().write(x) };
        }
    }

    fn range(&self, at: usize, len: usize) -> IoRange {
        assert!(at + len <= self.len);
        // SAFETY: inside the mapping, which lives as long as `self`; every transfer ends before that (scoped threads).
        unsafe { IoRange::new(self.base.add(at), len) }
    }

    fn populate(&self, at: usize, len: usize) -> Result<(), Failure> {
        // SAFETY: inside the mapping; populating changes no byte.
        unsafe { rustix::mm::madvise(self.base.add(at).cast(), len, Advice::LinuxPopulateWrite)? };
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no range of it is used any more.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.len) };
    }
}

/// A certificate for both ends, that is its own authority.
fn keys() -> Result<Tls, Failure> {
    let directory = tempfile::tempdir()?;
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()])?;
    let [certificate, key] = ["certificate", "key"].map(|name| directory.path().join(name));
    std::fs::write(&certificate, made.cert.pem())?;
    std::fs::write(&key, made.signing_key.serialize_pem())?;
    Ok(Tls::load(&TlsFiles { authorities: certificate.clone(), certificate, key, peer_name: None })?)
}

#[derive(Clone, Copy, PartialEq)]
enum By {
    Writev,
    Sendfile,
    /// `writev` of separate granules, as a round over scattered dirty pages sends them.
    Scattered,
}

#[derive(Clone, Copy, PartialEq)]
enum Receive {
    Fresh,
    Populated,
    Warm,
}

#[derive(Clone, Copy)]
struct Way {
    name: &'static str,
    streams: usize,
    send: By,
    receive: Receive,
    framed: bool,
    unix: bool,
    tls: bool,
    /// `TCP_NOTSENT_LOWAT`.
    unsent_limit: Option<u32>,
    /// `SO_SNDBUF` and `SO_RCVBUF`.
    buffers: Option<usize>,
}

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// Opens `streams` channels over loopback: sending ends and receiving ends.
fn channels(way: &Way, tls: &Tls) -> Result<(Vec<Channel>, Vec<Channel>), Failure> {
    let directory = tempfile::tempdir()?;
    let endpoint = match way.unix {
        true => Endpoint::Unix(directory.path().join("s")),
        false => "tcp:127.0.0.1:0".parse()?,
    };
    let mut listener = Listener::bind(&endpoint)?;
    if way.tls {
        listener.require_tls(tls);
    }
    let (mut out, mut into) = (Vec::new(), Vec::new());
    for index in 0..way.streams as u16 {
        let mut opener = listener.local_endpoint().connect(deadline())?;
        if way.tls {
            opener.require_tls(tls);
        }
        let acceptor = listener.accept(deadline())?;
        if let Some(bytes) = way.buffers {
            opener.set_buffers(Some(bytes), None)?;
            acceptor.set_buffers(None, Some(bytes))?;
        }
        let answer = std::thread::spawn(move || Greeting::read(acceptor, deadline())?.accept());
        out.push(Hello { kind: ChannelKind::Data, index, attempt: [7; 16] }.open(opener, deadline())?);
        into.push(answer.join().map_err(|_| "acceptor died")??);
    }
    Ok((out, into))
}

fn extent(at: usize, len: usize) -> Extent {
    Extent { block: 0, kind: ExtentKind::Data, first: at as u64 / GRANULE, count: (len as u64 / GRANULE) as u32 }
}

fn sender(way: &Way, channel: Channel, source: &Memory, pieces: &[(usize, usize)]) -> Result<(), Failure> {
    let mut writer = channel.writer;
    if let Some(limit) = way.unsent_limit {
        writer.set_unsent_limit(limit)?;
    }
    for &(at, len) in pieces {
        let file = FileRange { file: source.fd.as_fd(), offset: at as u64, len: len as u64 };
        match way.send {
            By::Writev => writer.write_pages(&[extent(at, len)], &[source.range(at, len)])?,
            By::Sendfile => writer.write_pages_from_file(&[extent(at, len)], &[file])?,
            By::Scattered => {
                // Every other granule first, then the rest: no two that follow each other touch.
                let all = (at..at + len).step_by(GRANULE as usize);
                let order: Vec<_> = all.clone().step_by(2).chain(all.skip(1).step_by(2)).collect();
                for part in order.chunks(512) {
                    let extents: Vec<_> = part.iter().map(|at| extent(*at, GRANULE as usize)).collect();
                    let ranges: Vec<_> = part.iter().map(|at| source.range(*at, GRANULE as usize)).collect();
                    writer.write_pages(&extents, &ranges)?;
                }
            }
        }
    }
    Ok(writer.write_round_end(1)?)
}

fn receiver(way: &Way, channel: Channel, target: &Memory) -> Result<(), Failure> {
    let mut reader = channel.reader;
    loop {
        match reader.read_frame()? {
            Frame::Pages { extents, .. } => {
                let ranges: Vec<_> = extents
                    .iter()
                    .map(|e| (e.range().start as usize, e.bytes() as usize))
                    .map(|(at, len)| {
                        if way.receive == Receive::Populated {
                            target.populate(at, len)?;
                        }
                        Ok(target.range(at, len))
                    })
                    .collect::<Result<_, Failure>>()?;
                reader.read_bulk(&ranges)?;
            }
            _ => return Ok(()),
        }
    }
}

/// The same without frames: what the sockets alone can do.
fn raw(way: &Way, source: &Memory, target: &Memory, pieces: &[(usize, usize)]) -> Result<Duration, Failure> {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse()?)?;
    let mut pairs = Vec::new();
    for _ in 0..way.streams {
        let opener = listener.local_endpoint().connect(deadline())?;
        pairs.push((opener, listener.accept(deadline())?));
    }
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (index, (opener, acceptor)) in pairs.into_iter().enumerate() {
            let mine: Vec<_> = pieces.iter().skip(index).step_by(way.streams).copied().collect();
            let mine_too = mine.clone();
            threads.push(scope.spawn(move || -> Result<(), Failure> {
                let (_reader, mut writer) = opener.split();
                for (at, len) in mine {
                    let file = FileRange { file: source.fd.as_fd(), offset: at as u64, len: len as u64 };
                    match way.send {
                        By::Sendfile => writer.send_file(file, "sending")?,
                        _ => writer.writev_all(&[source.range(at, len)], false, "sending")?,
                    }
                }
                Ok(())
            }));
            threads.push(scope.spawn(move || -> Result<(), Failure> {
                let (mut reader, _writer) = acceptor.split();
                for (at, len) in mine_too {
                    if way.receive == Receive::Populated {
                        target.populate(at, len)?;
                    }
                    reader.readv_exact(&[target.range(at, len)], "receiving")?;
                }
                Ok(())
            }));
        }
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread died")?)
    })?;
    Ok(begun.elapsed())
}

fn framed(
    way: &Way,
    tls: &Tls,
    source: &Memory,
    target: &Memory,
    pieces: &[(usize, usize)],
) -> Result<Duration, Failure> {
    let (out, into) = channels(way, tls)?;
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (index, (out, into)) in out.into_iter().zip(into).enumerate() {
            threads.push(scope.spawn(move || {
                let mine: Vec<_> = pieces.iter().skip(index).step_by(way.streams).copied().collect();
                sender(way, out, source, &mine)
            }));
            threads.push(scope.spawn(move || receiver(way, into, target)));
        }
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread died")?)
    })?;
    Ok(begun.elapsed())
}

/// What all threads have computed so far: says more than the clock on a machine that does other things too.
fn cpu_time() -> Result<Duration, Failure> {
    Ok(rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime).try_into()?)
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1).map(|a| a.parse::<usize>());
    let mib = arguments.next().transpose()?.unwrap_or(512);
    let rounds = arguments.next().transpose()?.unwrap_or(5);
    let piece = arguments.next().transpose()?.unwrap_or(1024) << 10;
    let len = mib << 20;
    let pieces: Vec<_> = (0..len).step_by(piece).map(|at| (at, piece.min(len - at))).collect();
    let tls = keys()?;
    let source = Memory::new(len)?;
    source.fill();
    let warm = Memory::new(len)?;
    warm.populate(0, len)?;

    let base = Way {
        name: "",
        streams: 1,
        send: By::Writev,
        receive: Receive::Fresh,
        framed: true,
        unix: false,
        tls: false,
        unsent_limit: None,
        buffers: None,
    };
    let (sendfile, populated) = (By::Sendfile, Receive::Populated);
    let mut ways = Vec::new();
    for streams in [1, 2] {
        let base = Way { streams, ..base };
        ways.extend([
            Way { name: "raw writev -> fresh", framed: false, ..base },
            Way { name: "raw writev -> populate ahead", framed: false, receive: populated, ..base },
            Way { name: "raw sendfile -> fresh", framed: false, send: sendfile, ..base },
            Way { name: "raw sendfile -> populate ahead", framed: false, send: sendfile, receive: populated, ..base },
            Way { name: "raw writev -> warm", framed: false, receive: Receive::Warm, ..base },
            Way { name: "raw sendfile -> warm", framed: false, send: sendfile, receive: Receive::Warm, ..base },
            Way { name: "frames writev -> fresh", ..base },
            Way { name: "frames writev -> populate ahead", receive: populated, ..base },
            Way { name: "frames sendfile -> populate ahead", send: sendfile, receive: populated, ..base },
            Way {
                name: "frames writev -> populate, notsent 256K",
                receive: populated,
                unsent_limit: Some(1 << 18),
                ..base
            },
            Way { name: "frames writev -> populate, buffers 4M", receive: populated, buffers: Some(4 << 20), ..base },
            Way { name: "frames scattered 4K -> fresh", send: By::Scattered, ..base },
            Way { name: "frames scattered 4K -> warm", send: By::Scattered, receive: Receive::Warm, ..base },
            Way { name: "frames writev -> populate, UNIX", receive: populated, unix: true, ..base },
            Way { name: "frames writev -> populate, TLS", receive: populated, tls: true, ..base },
        ]);
    }
    let (mut times, mut cpu) = (vec![Vec::new(); ways.len()], vec![Vec::new(); ways.len()]);
    for _ in 0..rounds {
        for ((way, times), cpu) in ways.iter().zip(&mut times).zip(&mut cpu) {
            let fresh = Memory::new(len)?;
            let target = if way.receive == Receive::Warm { &warm } else { &fresh };
            let before = cpu_time()?;
            let time = if way.framed {
                framed(way, &tls, &source, target, &pieces)?
            } else {
                raw(way, &source, target, &pieces)?
            };
            times.push(time);
            cpu.push(cpu_time()? - before);
        }
    }
    println!("{mib} MiB in pieces of {} KiB over loopback, median of {rounds}", piece >> 10);
    println!("{:<42} {:>7} {:>9} {:>9} {:>9} {:>9}", "way", "streams", "ms", "GiB/s", "best ms", "CPU ms");
    for ((way, times), cpu) in ways.iter().zip(&mut times).zip(&mut cpu) {
        times.sort();
        cpu.sort();
        let median = times[times.len() / 2].as_secs_f64();
        let rate = len as f64 / f64::from(1 << 30) / median;
        let best = times[0].as_secs_f64();
        let cpu = cpu[0].as_secs_f64() * 1e3;
        println!(
            "{:<42} {:>7} {:>9.1} {:>9.2} {:>9.1} {cpu:>9.1}",
            way.name,
            way.streams,
            median * 1e3,
            rate,
            best * 1e3
        );
    }
    Ok(())
}
