//! The first bytes: what is accepted, what is refused, and whether both ends learn why.

use std::io::Write;
use std::time::{Duration, Instant};

use wherry_stream::{
    ChannelKind, Connection, Greeting, HELLO_BYTES, Hello, HelloError, HelloRefusal, RawHello, Role, StreamError,
    VERSION_MAX, VERSION_MIN,
};

use crate::common::{ATTEMPT, DATA, FAMILIES, Raw, Site, deadline, hello, spawn};

const GOOD: RawHello = RawHello {
    role: Role::Opener,
    version_min: VERSION_MIN,
    version_max: VERSION_MAX,
    kind: 2,
    index: 2,
    attempt: ATTEMPT,
    status: 0,
};

/// What an acceptor says about these first bytes.
fn judge(family: crate::common::Family, bytes: &[u8]) -> (StreamError, Box<dyn Raw>) {
    let (mut raw, connection) = Site::new(family).raw();
    raw.write_all(bytes).unwrap();
    raw.hang_up();
    (Greeting::read(connection, deadline()).unwrap_err(), raw)
}

/// What an opener says about this answer.
fn answered(answer: impl FnOnce(RawHello) -> Vec<u8> + Send + 'static) -> StreamError {
    let site = Site::new(FAMILIES[0]);
    let (opener, mut acceptor) = site.connections();
    acceptor.set_deadline(Some(deadline()));
    let peer = spawn(move || {
        let (mut reader, mut writer) = acceptor.split();
        let mut bytes = [0; HELLO_BYTES];
        reader.read_exact(&mut bytes, "reading").unwrap();
        let heard = RawHello::decode(&bytes).unwrap();
        writer.write_all(&answer(RawHello { role: Role::Acceptor, ..heard }), false, "answering").unwrap();
    });
    let error = DATA.open(opener, deadline()).unwrap_err();
    peer.join().unwrap();
    error
}

fn source(error: &StreamError) -> &HelloError {
    match error {
        StreamError::Hello { source, .. } => source,
        other => panic!("not about the hello: {other}"),
    }
}

#[test]
fn both_ends_agree_on_version_kind_index_and_attempt() {
    for family in FAMILIES {
        let site = Site::new(family);
        for kind in [ChannelKind::Control, ChannelKind::Data, ChannelKind::Urgent] {
            let hello = Hello { kind, index: 7, attempt: ATTEMPT };
            let (opener, acceptor) = site.channels(hello);
            assert_eq!((opener.hello, opener.version), (hello, VERSION_MAX));
            assert_eq!((acceptor.hello, acceptor.version), (hello, VERSION_MAX));
            assert!(acceptor.reader.name().contains(&hello.to_string()), "{}", acceptor.reader.name());
        }
    }
}

#[test]
fn a_peer_that_is_no_wherry_is_recognised_by_its_first_eight_bytes() {
    for family in FAMILIES {
        let (error, _raw) = judge(family, b"GET / HTTP/1.1\r\n\r\n");
        assert_eq!(source(&error), &HelloError::Magic { found: *b"GET / HT" });
        assert!(error.to_string().contains("no Wherry"), "{error}");
        // Not even eight bytes.
        let (error, _raw) = judge(family, b"SSH-2");
        assert!(matches!(error, StreamError::PeerClosed { .. }), "{error}");
    }
    let error = answered(|_| b"SSH-2.0-OpenSSH_9.2\r\n".to_vec());
    assert!(matches!(source(&error), HelloError::Magic { .. }), "{error}");
}

#[test]
fn versions_without_overlap_are_refused_and_both_ends_name_both_ranges() {
    for (min, max) in [(VERSION_MAX + 1, VERSION_MAX + 3), (u16::MAX, u16::MAX)] {
        let newer = RawHello { version_min: min, version_max: max, ..GOOD };
        let (error, mut raw) = judge(FAMILIES[0], &newer.encode());
        assert_eq!(source(&error), &HelloError::Version { min, max });
        assert!(error.to_string().contains(&format!("{min} to {max}")), "{error}");
        let mut bytes = [0; HELLO_BYTES];
        raw.read_exact(&mut bytes).unwrap();
        let answer = RawHello::decode(&bytes).unwrap();
        assert_eq!(answer.status, HelloRefusal::Version as u16);
        assert_eq!((answer.version_min, answer.version_max), (VERSION_MIN, VERSION_MAX));
    }
    let error = answered(|heard| {
        RawHello { status: HelloRefusal::Version as u16, version_min: 7, version_max: 9, ..heard }.encode().to_vec()
    });
    assert_eq!(source(&error), &HelloError::Version { min: 7, max: 9 });
}

#[test]
fn a_peer_that_speaks_newer_versions_too_is_answered_in_ours() {
    let (mut raw, connection) = Site::new(FAMILIES[1]).raw();
    raw.write_all(&RawHello { version_max: VERSION_MAX + 5, ..GOOD }.encode()).unwrap();
    let channel = Greeting::read(connection, deadline()).unwrap().accept().unwrap();
    assert_eq!(channel.version, VERSION_MAX);
    let mut bytes = [0; HELLO_BYTES];
    raw.read_exact(&mut bytes).unwrap();
    let answer = RawHello::decode(&bytes).unwrap();
    assert_eq!((answer.version_min, answer.version_max, answer.status), (VERSION_MAX, VERSION_MAX, 0));
}

#[test]
fn an_unknown_kind_of_channel_is_named_and_the_peer_is_told() {
    let (error, mut raw) = judge(FAMILIES[0], &RawHello { kind: 77, ..GOOD }.encode());
    assert_eq!(source(&error), &HelloError::Kind { found: 77 });
    assert!(error.to_string().contains("77"), "{error}");
    let mut bytes = [0; HELLO_BYTES];
    raw.read_exact(&mut bytes).unwrap();
    assert_eq!(RawHello::decode(&bytes).unwrap().status, HelloRefusal::Kind as u16);
}

#[test]
fn two_openers_or_two_acceptors_notice() {
    let (error, _raw) = judge(FAMILIES[0], &RawHello { role: Role::Acceptor, ..GOOD }.encode());
    assert!(matches!(source(&error), HelloError::Role { found: Role::Acceptor, .. }), "{error}");
    let error = answered(|heard| RawHello { role: Role::Opener, ..heard }.encode().to_vec());
    assert!(matches!(source(&error), HelloError::Role { found: Role::Opener, .. }), "{error}");
}

#[test]
fn any_changed_bit_of_a_hello_is_noticed() {
    let good = GOOD.encode();
    for bit in 0..HELLO_BYTES * 8 {
        let mut bytes = good;
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(RawHello::decode(&bytes).is_err(), "bit {bit}");
    }
}

#[test]
fn impossible_version_ranges_are_refused() {
    for (min, max) in [(0, 1), (2, 1), (0, 0)] {
        let (error, _raw) = judge(FAMILIES[0], &RawHello { version_min: min, version_max: max, ..GOOD }.encode());
        assert!(matches!(source(&error), HelloError::Field { .. }), "{error}");
    }
    let error = answered(|heard| RawHello { version_max: 9, ..heard }.encode().to_vec());
    assert!(matches!(source(&error), HelloError::Field { field: "the chosen version", .. }), "{error}");
}

#[test]
fn an_answer_for_another_channel_or_attempt_is_refused() {
    let error = answered(|heard| RawHello { index: 3, ..heard }.encode().to_vec());
    assert!(error.to_string().contains("data channel 3") && error.to_string().contains("data channel 2"), "{error}");
    let error = answered(|heard| RawHello { attempt: [0; 16], ..heard }.encode().to_vec());
    assert!(matches!(source(&error), HelloError::Mismatch { .. }), "{error}");
}

#[test]
fn a_refusal_says_why_at_the_opener() {
    use HelloRefusal::{Attempt, Busy, Kind, Unexpected};
    for refusal in [Kind, Attempt, Unexpected, Busy] {
        let (opener, acceptor) = Site::new(FAMILIES[1]).connections();
        let peer = spawn(move || Greeting::read(acceptor, deadline()).unwrap().refuse(refusal).unwrap());
        let error = hello(ChannelKind::Control).open(opener, deadline()).unwrap_err();
        peer.join().unwrap();
        assert!(error.to_string().contains(&format!("refuses control channel: {refusal}")), "{error}");
    }
    let error = answered(|heard| RawHello { status: 99, ..heard }.encode().to_vec());
    assert_eq!(source(&error), &HelloError::Field { field: "status", value: 99 });
}

#[test]
fn a_peer_that_says_nothing_or_half_a_hello_is_left_at_the_deadline() {
    for said in [0, 8, 63] {
        let (mut raw, connection) = Site::new(FAMILIES[0]).raw();
        raw.write_all(&GOOD.encode()[..said]).unwrap();
        let error = Greeting::read(connection, Instant::now() + Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, StreamError::Silent { .. } | StreamError::Deadline { .. }), "{said} bytes: {error}");
        assert!(error.to_string().contains("hello"), "{error}");
    }
    let (opener, _acceptor) = Site::new(FAMILIES[1]).connections();
    let error = DATA.open(opener, Instant::now() + Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, StreamError::Silent { .. }), "{error}");
}

#[test]
fn dropping_a_greeting_closes_the_connection() {
    let (opener, acceptor): (Connection, Connection) = Site::new(FAMILIES[0]).connections();
    let peer = spawn(move || drop(Greeting::read(acceptor, deadline()).unwrap()));
    let error = DATA.open(opener, deadline()).unwrap_err();
    assert!(matches!(error, StreamError::PeerClosed { .. }), "{error}");
    peer.join().unwrap();
}
