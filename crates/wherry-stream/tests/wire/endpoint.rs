//! Endpoints and listeners.

use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use wherry_stream::{Endpoint, EndpointError, Listener, StreamError};

use crate::common::{FAMILIES, Site, deadline, spawn_until_blocked};

fn parse(text: &str) -> Result<Endpoint, EndpointError> {
    text.parse()
}

fn tcp(host: &str, port: u16) -> Endpoint {
    Endpoint::Tcp { host: host.into(), port }
}

#[test]
fn endpoints_are_read_and_written_alike() {
    for (text, endpoint) in [
        ("tcp:127.0.0.1:7000", tcp("127.0.0.1", 7000)),
        ("tcp:host-1.example_x.org:0", tcp("host-1.example_x.org", 0)),
        ("tcp:[::1]:65535", tcp("::1", 65535)),
        ("tcp:[fe80::1%eth0]:1", tcp("fe80::1%eth0", 1)),
        ("unix:/run/a b:c.sock", Endpoint::Unix("/run/a b:c.sock".into())),
        ("unix:relative", Endpoint::Unix("relative".into())),
    ] {
        assert_eq!(parse(text), Ok(endpoint.clone()), "{text}");
        assert_eq!(endpoint.to_string(), text);
    }
}

#[test]
fn what_is_no_endpoint_is_refused_with_what_was_expected() {
    for text in ["", "127.0.0.1:7000", "udp:a:1", "TCP:a:1"] {
        assert!(matches!(parse(text), Err(EndpointError::Scheme(_))), "{text}");
    }
    for text in ["tcp:host", "tcp:host:", "tcp:host:65536", "tcp:host:-1", "tcp:host:+1", "tcp:[::1]"] {
        let error = parse(text).unwrap_err();
        assert!(matches!(error, EndpointError::Port(_)), "{text}: {error}");
        assert!(error.to_string().contains("tcp:HOST:PORT") && error.to_string().contains(text), "{error}");
    }
    let long = format!("tcp:{}:1", "a".repeat(254));
    for text in ["tcp::1", "tcp:::1:80", "tcp:a b:1", "tcp:[nonsense]:1", "tcp:[]:1", "tcp:[::1:1", "tcp:a\0:1", &long]
    {
        assert!(matches!(parse(text), Err(EndpointError::Host(_))), "{text}");
    }
    for text in ["unix:", "unix:a\0b", &format!("unix:/{}", "x".repeat(107))] {
        assert!(matches!(parse(text), Err(EndpointError::Path(_))), "{text}");
    }
}

#[test]
fn a_listener_tells_the_port_that_was_chosen_and_can_be_reached_by_name_and_address() {
    let listener = Listener::bind(&tcp("localhost", 0)).unwrap();
    let Endpoint::Tcp { port, .. } = *listener.local_endpoint() else { panic!("not TCP") };
    assert_ne!(port, 0);
    for endpoint in [listener.local_endpoint().clone(), tcp("localhost", port)] {
        let _opener = endpoint.connect(deadline()).unwrap();
        let accepted = listener.accept(deadline()).unwrap();
        assert!(accepted.peer().starts_with("tcp:"), "{}", accepted.peer());
    }
}

#[test]
fn a_port_in_use_is_said_to_be_in_use() {
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = tcp("127.0.0.1", other.local_addr().unwrap().port());
    let error = Listener::bind(&endpoint).unwrap_err().to_string();
    assert!(error.contains("port is in use") && error.contains(&endpoint.to_string()), "{error}");
}

#[test]
fn a_stale_unix_socket_is_replaced_and_a_live_one_or_a_file_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let endpoint = Endpoint::Unix(path.clone());

    let live = UnixListener::bind(&path).unwrap();
    live.set_nonblocking(true).unwrap();
    let error = Listener::bind(&endpoint).unwrap_err().to_string();
    assert!(error.contains("another process listens"), "{error}");
    assert!(live.accept().is_err(), "the look at a live listener made a connection");

    drop(live);
    assert!(path.exists(), "std leaves the file behind");
    let listener = Listener::bind(&endpoint).unwrap();
    endpoint.connect(deadline()).unwrap();
    drop(listener);
    assert!(!path.exists(), "the listener left its socket file behind");

    std::fs::write(&path, "precious").unwrap();
    let error = Listener::bind(&endpoint).unwrap_err().to_string();
    assert!(error.contains("not a socket"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");

    let nowhere = Endpoint::Unix(directory.path().join("no/s"));
    let error = Listener::bind(&nowhere).unwrap_err().to_string();
    assert!(error.contains("directory does not exist"), "{error}");
}

#[test]
fn a_listener_removes_only_its_own_socket_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = Listener::bind(&Endpoint::Unix(path.clone())).unwrap();
    // Another inode at the same path, made while the first still exists so that its number differs.
    let other = UnixListener::bind(directory.path().join("t")).unwrap();
    std::fs::rename(directory.path().join("t"), &path).unwrap();
    drop(listener);
    assert!(path.exists());
    drop(other);
}

#[test]
fn where_nobody_listens_the_error_says_so() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let stale = directory.path().join("stale");
    drop(UnixListener::bind(&stale).unwrap());
    for endpoint in [free.into(), Endpoint::Unix(stale), Endpoint::Unix(directory.path().join("none"))] {
        let error = endpoint.connect(deadline()).unwrap_err();
        assert!(matches!(error, StreamError::Connect { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("start the destination first") && text.contains(&endpoint.to_string()), "{text}");
    }
    let error = tcp("127.0.0.1", 0).connect(deadline()).unwrap_err().to_string();
    assert!(error.contains("port 0"), "{error}");
    let error = tcp("no-such-host.invalid", 1).connect(deadline()).unwrap_err().to_string();
    assert!(error.contains("resolve"), "{error}");
}

#[test]
fn connecting_to_a_full_queue_ends_by_the_deadline_or_when_cancelled() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let address = rustix::net::SocketAddrUnix::new(&path).unwrap();
    let (family, kind) = (rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM);
    let full = rustix::net::socket(family, kind, None).unwrap();
    rustix::net::bind(&full, &address).unwrap();
    rustix::net::listen(&full, 0).unwrap();
    let endpoint = Endpoint::Unix(path);
    // The queue takes a few; then nobody answers.
    let mut held = Vec::new();
    let error = loop {
        match endpoint.connect(Instant::now() + Duration::from_millis(100)) {
            Ok(connection) => held.push(connection),
            Err(e) => break e,
        }
        assert!(held.len() < 100, "the queue never filled");
    };
    assert!(error.to_string().contains("within the deadline"), "{error}");
    let error = endpoint.connect_unless(deadline(), &|| true).unwrap_err();
    assert!(error.is_cancelled(), "{error}");
}

#[test]
fn accept_ends_by_the_deadline_and_says_where_nobody_came() {
    for family in FAMILIES {
        let site = Site::new(family);
        let error = site.listener.accept(Instant::now() + Duration::from_millis(30)).unwrap_err();
        assert!(matches!(error, StreamError::NobodyCame { .. }), "{error}");
        assert!(error.to_string().contains(&site.endpoint().to_string()), "{error}");
        // It still listens.
        site.connections();
    }
}

#[test]
fn closing_a_listener_ends_a_blocked_accept() {
    for family in FAMILIES {
        let site = Site::new(family);
        let closer = site.listener.closer();
        let accept = spawn_until_blocked(move || site.listener.accept(deadline()).map(|_| ()));
        closer.close();
        let error = accept.join().unwrap().unwrap_err();
        assert!(error.is_cancelled(), "{family:?}: {error}");
    }
}
