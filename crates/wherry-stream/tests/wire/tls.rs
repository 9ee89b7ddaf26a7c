//! TLS on channels: the same frames, and nobody who has not proved itself.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use wherry_stream::message::{Body, Message, Offer};
use wherry_stream::{
    Channel, ChannelKind, Endpoint, Extent, ExtentKind, FileRange, Frame, GRANULE, Greeting, Hello, HelloError,
    HelloRefusal, Listener, RoundEnd, StreamError, Tls, TlsError, TlsFiles,
};

use crate::common::{DATA, FAMILIES, Family, Site, deadline, hello, pattern, ranges, spawn, spawn_until_blocked};
use crate::frames::about;

/// An authority and the files of two hosts that it knows.
struct Authority {
    directory: tempfile::TempDir,
}

impl Authority {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut authority = CertificateParams::new([]).unwrap();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
        let write = |name: &str, text: String| std::fs::write(directory.path().join(name), text).unwrap();
        write("ca.pem", authority.pem());
        for host in ["source", "destination"] {
            let key = KeyPair::generate().unwrap();
            let names = [host.to_owned(), "127.0.0.1".to_owned()];
            let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &authority).unwrap();
            write(&format!("{host}.pem"), certificate.pem());
            write(&format!("{host}.key"), key.serialize_pem());
        }
        Self { directory }
    }

    fn files(&self, host: &str, peer: Option<&str>) -> TlsFiles {
        let path = |name: String| self.directory.path().join(name);
        TlsFiles {
            certificate: path(format!("{host}.pem")),
            key: path(format!("{host}.key")),
            authorities: path("ca.pem".into()),
            peer_name: peer.map(str::to_owned),
        }
    }

    fn source(&self) -> Tls {
        Tls::load(&self.files("source", Some("destination"))).unwrap()
    }

    fn destination(&self) -> Tls {
        Tls::load(&self.files("destination", None)).unwrap()
    }
}

/// What both ends say about a channel between them.
fn meet(
    family: Family,
    opener_tls: Option<&Tls>,
    acceptor_tls: Option<&Tls>,
    hello: Hello,
) -> (Result<Channel, StreamError>, Result<Channel, StreamError>) {
    let mut site = Site::new(family);
    if let Some(tls) = acceptor_tls {
        site.listener.require_tls(tls);
    }
    let (mut opener, acceptor) = site.connections();
    if let Some(tls) = opener_tls {
        opener.require_tls(tls);
    }
    let acceptor = spawn(move || Greeting::read(acceptor, deadline()).and_then(Greeting::accept));
    (hello.open(opener, deadline()), acceptor.join().unwrap())
}

fn channels(family: Family, hello: Hello) -> (Channel, Channel) {
    let authority = Authority::new();
    let (opener, acceptor) = meet(family, Some(&authority.source()), Some(&authority.destination()), hello);
    (opener.unwrap(), acceptor.unwrap())
}

/// Nothing hidden: whoever polls before it reads a frame sees that there is one.
fn readable(channel: &Channel) -> bool {
    poll(&mut [PollFd::new(&channel.reader, PollFlags::IN)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() > 0
}

#[test]
fn pages_messages_and_files_arrive_as_without_tls() {
    const PAGES: usize = 300;
    for family in FAMILIES {
        let (mut source, mut destination) = channels(family, DATA);
        let g = GRANULE as usize;
        let content = pattern(PAGES * g);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&content).unwrap();
        let extents = [Extent { block: 4, kind: ExtentKind::Data, first: 8, count: PAGES as u32 }];
        let offer = Body::Offer(Offer { state: pattern(1 << 20), ..Offer::default() });
        let (mut memory, message) = (content.clone(), Message::new(about(), offer.clone()));
        let writer = spawn(move || {
            source.writer.write_pages(&extents, &ranges(&mut memory, g)).unwrap();
            let whole = FileRange { file: file.as_fd(), offset: 0, len: (PAGES * g) as u64 };
            source.writer.write_pages_from_file(&extents, &[whole]).unwrap();
            source.writer.write_message(&message).unwrap();
            source.writer.write_round_end(1).unwrap();
            assert_eq!(source.reader.read_frame().unwrap(), Frame::RoundEnd(RoundEnd { round: 2 }));
            source
        });
        for _ in 0..2 {
            let bulk = (PAGES * g) as u64;
            assert_eq!(destination.reader.read_frame().unwrap(), Frame::Pages { extents: extents.to_vec(), bulk });
            let mut received = vec![0; PAGES * g];
            let pieces = ranges(&mut received, 3 * g);
            let swapped: Vec<_> = pieces.chunks(2).flat_map(|pair| pair.iter().rev()).copied().collect();
            let (some, rest) = swapped.split_at(swapped.len() / 3);
            destination.reader.read_bulk(some).unwrap();
            destination.reader.read_bulk(rest).unwrap();
            // In the order of their arrival they are what was sent.
            let base = received.as_ptr() as usize;
            let places = swapped.iter().map(|piece| (piece.ptr() as usize - base, piece.len()));
            let back: Vec<u8> = places.flat_map(|(at, len)| received[at..at + len].to_vec()).collect();
            assert!(back == content, "{family:?}");
        }
        assert_eq!(destination.reader.read_message().unwrap(), (about(), offer));
        assert_eq!(destination.reader.read_frame().unwrap(), Frame::RoundEnd(RoundEnd { round: 1 }));
        destination.writer.write_round_end(2).unwrap();
        let source = writer.join().unwrap();
        assert_eq!(destination.reader.stats(), source.writer.stats());
    }
}

#[test]
fn no_frame_is_hidden_from_whoever_polls_for_one() {
    for family in FAMILIES {
        let (mut source, mut destination) = channels(family, DATA);
        let mut page = pattern(5 * GRANULE as usize);
        let extents = [Extent { block: 0, kind: ExtentKind::Data, first: 0, count: 5 }];
        for round in 1..=3 {
            source.writer.write_pages(&extents, &ranges(&mut page, GRANULE as usize)).unwrap();
            source.writer.write_round_end(round).unwrap();
        }
        for _ in 1..=3 {
            destination.reader.read_frame().unwrap();
            destination.reader.discard_bulk().unwrap();
            assert!(readable(&destination), "{family:?}: a frame was received ahead of need");
            assert!(matches!(destination.reader.read_frame().unwrap(), Frame::RoundEnd(_)));
        }
        assert!(!readable(&destination));
    }
}

#[test]
fn a_stranger_is_refused_and_both_ends_say_so() {
    let (ours, strangers) = (Authority::new(), Authority::new());
    for family in FAMILIES {
        // A source whose certificate another authority has signed.
        let mut files = strangers.files("source", Some("destination"));
        files.authorities = ours.files("source", None).authorities;
        let stranger = Tls::load(&files).unwrap();
        let (opener, acceptor) = meet(family, Some(&stranger), Some(&ours.destination()), DATA);
        let (opener, acceptor) = (opener.unwrap_err(), acceptor.unwrap_err());
        assert!(matches!(acceptor, StreamError::Tls { source: TlsError::Handshake(_), .. }), "{acceptor}");
        assert!(opener.to_string().contains("TLS") || matches!(opener, StreamError::PeerClosed { .. }), "{opener}");

        // A destination whose certificate another authority has signed.
        let (opener, acceptor) = meet(family, Some(&ours.source()), Some(&strangers.destination()), DATA);
        let (opener, acceptor) = (opener.unwrap_err(), acceptor.unwrap_err());
        assert!(matches!(opener, StreamError::Tls { source: TlsError::Handshake(_), .. }), "{opener}");
        assert!(opener.to_string().contains("certificate"), "{opener}");
        assert!(matches!(acceptor, StreamError::Tls { .. }), "the alert did not arrive: {acceptor}");
    }
}

#[test]
fn a_destination_with_another_name_is_refused() {
    let authority = Authority::new();
    let expecting = |name| Tls::load(&authority.files("source", name)).unwrap();
    let destination = authority.destination();
    let (opener, _) = meet(Family::Tcp, Some(&expecting(Some("elsewhere"))), Some(&destination), DATA);
    assert!(opener.unwrap_err().to_string().contains("certificate"));
    // Without a name the host that was connected to must be in the certificate.
    let (opener, acceptor) = meet(Family::Tcp, Some(&expecting(None)), Some(&destination), DATA);
    assert!(opener.is_ok() && acceptor.is_ok());
    let (opener, _) = meet(Family::Unix, Some(&expecting(None)), Some(&destination), DATA);
    let error = opener.unwrap_err().to_string();
    assert!(error.contains("give the peer's name"), "{error}");
}

#[test]
fn tls_at_one_end_only_is_said_at_both() {
    let authority = Authority::new();
    for family in FAMILIES {
        let (opener, acceptor) = meet(family, None, Some(&authority.destination()), DATA);
        let (opener, acceptor) = (opener.unwrap_err(), acceptor.unwrap_err());
        assert!(acceptor.to_string().contains("does not speak TLS"), "{acceptor}");
        let told = matches!(opener, StreamError::Hello { source: HelloError::Tls, .. });
        // On TCP the close may overtake the alert, because the acceptor has not read all of the hello.
        assert!(told || matches!(opener, StreamError::PeerClosed { .. }), "{opener}");

        let (opener, acceptor) = meet(family, Some(&authority.source()), None, DATA);
        let (opener, acceptor) = (opener.unwrap_err(), acceptor.unwrap_err());
        assert!(matches!(acceptor, StreamError::Hello { source: HelloError::Tls, .. }), "{acceptor}");
        assert!(matches!(opener, StreamError::Tls { .. } | StreamError::PeerClosed { .. }), "{opener}");
    }
}

#[test]
fn a_refusal_after_the_handshake_says_why() {
    let authority = Authority::new();
    let mut site = Site::new(Family::Unix);
    site.listener.require_tls(&authority.destination());
    let (mut opener, acceptor) = site.connections();
    opener.require_tls(&authority.source());
    let peer = spawn(move || Greeting::read(acceptor, deadline()).unwrap().refuse(HelloRefusal::Busy).unwrap());
    let error = hello(ChannelKind::Control).open(opener, deadline()).unwrap_err();
    peer.join().unwrap();
    assert!(error.to_string().contains("busy"), "{error}");
}

#[test]
fn a_silent_peer_is_noticed_in_the_handshake_and_after_it() {
    let authority = Authority::new();
    for family in FAMILIES {
        let mut site = Site::new(family);
        site.listener.require_tls(&authority.destination());
        let (_raw, connection) = site.raw();
        let error = Greeting::read(connection, Instant::now() + Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, StreamError::Silent { .. }), "{error}");
        assert!(error.to_string().contains("handshake"), "{error}");

        let (_source, mut destination) = channels(family, DATA);
        destination.set_idle_limit(Duration::from_millis(50));
        let error = destination.reader.read_frame().unwrap_err();
        assert!(matches!(error, StreamError::Silent { .. }), "{error}");
        let error = destination.writer.write_message(&large()).unwrap_err();
        assert!(matches!(error, StreamError::Silent { .. }), "{error}");
        assert!(destination.writer.unsent().unwrap() > 0);
    }
}

fn large() -> Message {
    Message::new(about(), Body::Offer(Offer { state: vec![7; 60 << 20], ..Offer::default() }))
}

#[test]
fn closing_ends_a_blocked_read_and_a_blocked_write() {
    for family in FAMILIES {
        let (_source, mut destination) = channels(family, DATA);
        destination.set_idle_limit(Duration::from_secs(3600));
        let closer = destination.closer();
        let (mut reader, mut writer) = destination.split();
        let reading = spawn_until_blocked(move || reader.read_frame());
        let writing = spawn_until_blocked(move || writer.write_message(&large()));
        closer.close();
        assert!(reading.join().unwrap().unwrap_err().is_cancelled());
        assert!(writing.join().unwrap().unwrap_err().is_cancelled());
    }
}

#[test]
fn both_directions_work_at_the_same_time() {
    for family in FAMILIES {
        let (source, destination) = channels(family, hello(ChannelKind::Control));
        let chatter = |channel: Channel| {
            let (mut reader, mut writer) = channel.split();
            let sending = spawn(move || {
                for round in 0..200 {
                    writer
                        .write_message(&Message::new(
                            about(),
                            Body::Offer(Offer { state: pattern(round * 500), ..Offer::default() }),
                        ))
                        .unwrap();
                }
                writer
            });
            let receiving = spawn(move || {
                for round in 0..200 {
                    let (_, body) = reader.read_message().unwrap();
                    let Body::Offer(offer) = body else { panic!("{body:?}") };
                    assert!(offer.state == pattern(round * 500), "{round}");
                }
                reader
            });
            (sending, receiving)
        };
        let (one, other) = (chatter(source), chatter(destination));
        let ends = [one, other].map(|(sending, receiving)| (sending.join().unwrap(), receiving.join().unwrap()));
        assert_eq!(ends[0].0.stats(), ends[1].1.stats());
        assert_eq!(ends[1].0.stats(), ends[0].1.stats());
    }
}

/// Carries bytes between two sockets and changes one bit of those that come from the opener, `after` bytes from the start.
fn meddle(listener: Listener, to: Endpoint, after: usize) {
    let (mut from_opener, mut to_opener) = listener.accept(deadline()).unwrap().split();
    let (mut from_acceptor, mut to_acceptor) = to.connect(deadline()).unwrap().split();
    let back = spawn(move || {
        let mut byte = [0];
        while from_acceptor.read_exact_or_end(&mut byte, "reading").is_ok_and(|more| more)
            && to_opener.write_all(&byte, false, "writing").is_ok()
        {}
        to_opener.closer().close();
    });
    let mut byte = [0];
    let mut count = 0;
    while from_opener.read_exact_or_end(&mut byte, "reading").is_ok_and(|more| more) {
        byte[0] ^= u8::from(count == after);
        count += 1;
        if to_acceptor.write_all(&byte, false, "writing").is_err() {
            break;
        }
    }
    to_acceptor.closer().close();
    back.join().unwrap();
}

#[test]
fn a_changed_bit_is_noticed_in_the_handshake_and_after_it() {
    let authority = Authority::new();
    // In the first record, in the certificate, and in the frames (the handshake takes less than 2000 bytes). A changed
    // length would be noticed by the idle limit, which takes too long for a test.
    for after in [20, 40, 900, 4000] {
        let mut site = Site::new(Family::Unix);
        site.listener.require_tls(&authority.destination());
        let middle = Site::new(Family::Unix);
        let mut opener = middle.endpoint().connect(deadline()).unwrap();
        let (listener, to) = (middle.listener.clone(), site.endpoint().clone());
        let meddler = spawn(move || meddle(listener, to, after));
        opener.require_tls(&authority.source());
        let sending = spawn(move || {
            let mut channel = DATA.open(opener, deadline())?;
            for round in 0..100 {
                channel.writer.write_round_end(round)?;
            }
            Ok::<_, StreamError>(())
        });
        let acceptor = site.listener.accept(deadline()).unwrap();
        let error = Greeting::read(acceptor, deadline())
            .and_then(Greeting::accept)
            .and_then(|mut channel| {
                for _ in 0..100 {
                    channel.reader.read_frame()?;
                }
                Ok(())
            })
            .unwrap_err();
        assert!(
            matches!(error, StreamError::Tls { .. } | StreamError::Io { .. } | StreamError::PeerClosed { .. }),
            "{error}"
        );
        let _ = sending.join().unwrap();
        meddler.join().unwrap();
    }
}

#[test]
fn a_peer_that_sends_nonsense_instead_of_a_handshake_is_refused() {
    let authority = Authority::new();
    let record = |length: u16, bytes: usize| {
        let mut record = vec![0x16, 3, 1];
        record.extend(length.to_be_bytes());
        record.extend(pattern(bytes));
        record
    };
    for bytes in [pattern(100), record(50, 50), record(u16::MAX, 65535), record(0, 0), record(10, 3)] {
        let mut site = Site::new(Family::Unix);
        site.listener.require_tls(&authority.destination());
        let (mut raw, connection) = site.raw();
        raw.write_all(&bytes).unwrap();
        raw.hang_up();
        let error = Greeting::read(connection, deadline()).unwrap_err();
        assert!(matches!(error, StreamError::Tls { .. } | StreamError::PeerClosed { .. }), "{error}");
        // An alert, or a reset because not all was read; only that it ends.
        let _ = raw.read_to_end(&mut Vec::new());
    }
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let authority = Authority::new();
    let good = authority.files("source", None);
    let nowhere = Path::new("/nonexistent/x.pem");
    for files in [
        TlsFiles { certificate: nowhere.into(), ..good.clone() },
        TlsFiles { key: nowhere.into(), ..good.clone() },
        TlsFiles { authorities: nowhere.into(), ..good.clone() },
    ] {
        let error = Tls::load(&files).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/x.pem"), "{error}");
    }
    let swapped = TlsFiles { certificate: good.key.clone(), ..good.clone() };
    assert!(Tls::load(&swapped).unwrap_err().to_string().contains("no certificate"));
    let foreign = TlsFiles { key: authority.files("destination", None).key, ..good };
    assert!(matches!(Tls::load(&foreign), Err(TlsError::Unusable(_))));
}
