//! Writes the seeds of the fuzz targets that read the wire, by the real encoders.
//!
//! `cargo run -p wherry-stream --example seeds` after a change of the wire; commit what it changes in `fuzz/corpus`.
//! Seeds whose names begin with `good-` must be accepted by the decoders, which a test checks.
#![allow(clippy::needless_update, reason = "messages grow fields, which the seeds need not name")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use wherry_stream::message::{
    About, Accept, AskPages, Begin, Body, ChannelTotal, Complete, Empty, Follow, Hashes, Message, Offer, PageHashes,
    Poise, Ready, Reason, Refuse, Running, StatePiece, UnitState,
};
use wherry_stream::{
    Ack, Channel, ChannelKind, Connection, Extent, ExtentKind, FRAME_HEADER_BYTES, FileRange, FrameHeader, FrameKind,
    GRANULE, Greeting, HELLO_BYTES, Hello, RawHello, Role,
};

type Failure = Box<dyn std::error::Error>;

struct Corpus(PathBuf);

impl Corpus {
    fn write(&self, target: &str, name: &str, bytes: &[u8]) -> Result<(), Failure> {
        let directory = self.0.join(target);
        std::fs::create_dir_all(&directory)?;
        Ok(std::fs::write(directory.join(name), bytes)?)
    }
}

fn bodies() -> Vec<(&'static str, Body)> {
    let words = || Reason { text: "the image is locked".into() };
    vec![
        (
            "begin",
            Body::Begin(Begin {
                mode: "hybrid".into(),
                channels: 2,
                verify: true,
                features: vec!["zstd".into(), "postcopy".into()],
                machine: vec![0x0a, 0x10, 1, 2, 3],
                ..Begin::default()
            }),
        ),
        ("accept", Body::Accept(Accept { load_us: 55, ..Accept::default() })),
        ("refuse", Body::Refuse(Refuse { reasons: vec!["no AVX-512".into(), "RAM of 4 GiB".into()] })),
        ("ping", Body::Ping(Empty {})),
        ("poise", Body::Poise(Poise { round: 3, ..Poise::default() })),
        ("hashes", Body::Hashes(Hashes { block: 1, first: 7, digests: vec![0xab; 64] })),
        (
            "unit-state",
            Body::UnitState(UnitState { unit: "vfio-user".into(), instance: 1, offset: 5, bytes: vec![3; 60] }),
        ),
        ("state-piece", Body::StatePiece(StatePiece { bytes: vec![0; 100] })),
        (
            "offer",
            Body::Offer(Offer {
                state: vec![9; 40],
                digest: vec![8; 32],
                channels: vec![ChannelTotal { frames: 5, bytes: 99, ..ChannelTotal::default() }; 2],
                ..Offer::default()
            }),
        ),
        ("ready", Body::Ready(Ready { load_us: 60, ..Ready::default() })),
        ("run", Body::Run(Empty {})),
        ("running", Body::Running(Running { start_us: 31, ..Running::default() })),
        ("not-run", Body::NotRun(words())),
        ("abort", Body::Abort(words())),
        ("poised", Body::Poised(Empty {})),
        ("pong", Body::Pong(Empty {})),
        ("continue", Body::Continue(Empty {})),
        ("ask-pages", Body::AskPages(AskPages { block: 1, chunk: 9 })),
        ("page-hashes", Body::PageHashes(PageHashes { block: 1, chunk: 9, digests: vec![0xcd; 96] })),
        ("query", Body::Query(Empty {})),
        ("still-ready", Body::StillReady(Empty {})),
        ("unknown", Body::Unknown(words())),
        ("confirm", Body::Confirm(Empty {})),
        ("aborted", Body::Aborted(Empty {})),
        ("follow", Body::Follow(Follow { block: 3, runs: vec![0, 512, 1 << 33, 1, 7, 64] })),
        (
            "complete",
            Body::Complete(Box::new(Complete { faults: 900, p50_us: 16, p99_us: 512, ..Complete::default() })),
        ),
        ("resume", Body::Resume(Empty {})),
        ("resumed", Body::Resumed(Empty {})),
        ("ended", Body::Ended(words())),
    ]
}

fn message(body: Body) -> Message {
    Message::new(About { vm: vec![1; 16], epoch: 4, attempt: vec![2; 16], incarnation: vec![3; 16] }, body)
}

/// What the opener of a channel puts on the wire, from its hello on.
fn said(kind: ChannelKind, say: impl FnOnce(&mut Channel) -> Result<(), Failure>) -> Result<Vec<u8>, Failure> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let (ours, theirs) = UnixStream::pair()?;
    let mut tap = theirs.try_clone()?;
    let answering = std::thread::spawn(move || {
        Greeting::read(Connection::from_unix(theirs, "seeds")?, deadline)?.accept().map(drop)
    });
    let hello = Hello { kind, index: 0, attempt: [2; 16] };
    let mut channel = hello.open(Connection::from_unix(ours, "seeds")?, deadline)?;
    answering.join().map_err(|_| "the acceptor died")??;
    say(&mut channel)?;
    drop(channel);
    let mut bytes = raw_hello(kind).encode().to_vec();
    tap.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn raw_hello(kind: ChannelKind) -> RawHello {
    RawHello {
        role: Role::Opener,
        version_min: 1,
        version_max: 1,
        kind: kind as u16,
        index: 0,
        attempt: [2; 16],
        status: 0,
    }
}

fn main() -> Result<(), Failure> {
    let corpus = Corpus(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus"));

    for kind in [ChannelKind::Control, ChannelKind::Data, ChannelKind::Urgent] {
        corpus.write("hello", &format!("good-{kind}"), &raw_hello(kind).encode())?;
    }
    let newer = RawHello { version_min: 2, version_max: 3, ..raw_hello(ChannelKind::Control) };
    corpus.write("hello", "newer", &newer.encode())?;
    let refusal = RawHello { role: Role::Acceptor, status: 5, ..raw_hello(ChannelKind::Data) };
    corpus.write("hello", "refusal", &refusal.encode())?;
    corpus.write("hello", "http", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")?;

    for kind in FrameKind::ALL {
        let (length, _) = kind.payload_limits();
        let extents = u16::from(kind == FrameKind::Pages);
        let header = FrameHeader { kind, length, payload_crc: 0x0102_0304, extents, sequence: 1 << 33 };
        corpus.write("frame_header", &format!("good-{kind:?}").to_lowercase(), &header.encode())?;
    }
    let header = FrameHeader { kind: FrameKind::Ack, length: u32::MAX, payload_crc: 0, extents: 0, sequence: 0 };
    corpus.write("frame_header", "too-long", &header.encode())?;

    for (name, body) in bodies() {
        corpus.write("control_message", &format!("good-{name}"), &message(body).to_bytes())?;
    }
    corpus.write("control_message", "nothing", &[])?;

    let endpoints =
        ["tcp:host.example:7000", "tcp:127.0.0.1:0", "tcp:[::1]:65535", "tcp:[fe80::1%eth0]:1", "unix:/run/w.sock"];
    for (i, text) in endpoints.iter().enumerate() {
        corpus.write("endpoint", &format!("good-{i}"), text.as_bytes())?;
    }
    corpus.write("endpoint", "no-port", b"tcp:host")?;

    let mut file = tempfile::tempfile()?;
    file.write_all(&[0x5a; 3 * GRANULE as usize])?;
    let extents = [
        Extent { block: 0, kind: ExtentKind::Data, first: 1, count: 2 },
        Extent { block: 1, kind: ExtentKind::Zero, first: 1 << 40, count: u32::MAX },
        Extent { block: 2, kind: ExtentKind::Data, first: 0, count: 1 },
    ];
    let data = said(ChannelKind::Data, |channel| {
        use std::os::fd::AsFd;
        let content = FileRange { file: file.as_fd(), offset: 0, len: 3 * GRANULE };
        channel.writer.write_pages_from_file(&extents, &[content])?;
        channel.writer.write_pages(&extents[1..2], &[])?;
        channel.writer.write_keep_alive()?;
        channel.writer.write_round_end(1)?;
        Ok(channel.writer.write_ack(Ack { frames: 4, bytes: 12_500, round: Some(1), checksum: 77 })?)
    })?;
    corpus.write("channel", "good-data", &data)?;
    corpus.write("channel", "cut-off", &data[..data.len() - 5])?;
    let table = HELLO_BYTES + FRAME_HEADER_BYTES;
    corpus.write("pages", "good-three-extents", &data[table..table + 48])?;
    corpus.write("pages", "good-one-extent", &data[table..table + 16])?;
    corpus.write("pages", "odd-size", &data[table..table + 17])?;
    let urgent = said(ChannelKind::Urgent, |channel| {
        use std::os::fd::AsFd;
        channel.writer.write_request(&extents)?;
        channel.writer.write_request(&extents[..1])?;
        channel.writer.write_keep_alive()?;
        let content = FileRange { file: file.as_fd(), offset: 0, len: 2 * GRANULE };
        channel.writer.write_pages_from_file(&extents[..1], &[content])?;
        Ok(channel.writer.write_pages(&extents[1..2], &[])?)
    })?;
    corpus.write("channel", "good-urgent", &urgent)?;
    let control = said(ChannelKind::Control, |channel| {
        for (_, body) in bodies() {
            channel.writer.write_message(&message(body))?;
        }
        Ok(())
    })?;
    corpus.write("channel", "good-control", &control)?;
    Ok(())
}
