//! The client: with our server, and with servers that do not do what they should, or do it as libvfio-user does.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::copier::Copier;
use super::raw::{Raw, Reply, longs, message, signals, version, words};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use wherry_vfio_user::client::{NoMemory, ask_everything};
use wherry_vfio_user::payload::{IrqSet, pci_irq, pci_region, region_flags};
use wherry_vfio_user::server::Host;
use wherry_vfio_user::{Client, DmaHandler, Options, Server, State, Stop, VfioUserError};

/// Memory of a VM, reached by messages.
pub struct Memory(Mutex<Vec<u8>>);

impl Memory {
    pub fn new() -> Self {
        Self(Mutex::new((0..0x4_0000_u32).map(|at| (at >> 3) as u8).collect()))
    }
}

impl DmaHandler for Memory {
    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.copy_from_slice(&self.0.lock().unwrap()[address as usize..][..data.len()]);
        Ok(())
    }

    fn write(&self, address: u64, data: &[u8]) -> Result<(), Errno> {
        self.0.lock().unwrap()[address as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }
}

/// Our server, with a device that copies.
pub struct Served {
    directory: tempfile::TempDir,
    stop: Stop,
    thread: Option<JoinHandle<()>>,
}

impl Served {
    pub fn new(twin: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = Server::bind(&directory.path().join("s")).unwrap();
        let mut device = Copier::new().unwrap();
        let mut host = Host::new(&device).unwrap();
        host.set_twin_socket(twin);
        let stop = host.stop();
        let thread = std::thread::spawn(move || server.serve(&mut host, &mut device).unwrap());
        Self { directory, stop, thread: Some(thread) }
    }

    pub fn client(&self, memory: Arc<dyn DmaHandler>) -> Client {
        Client::connect(&self.directory.path().join("s"), Options::default(), memory).unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.stop();
        self.thread.take().unwrap().join().unwrap();
    }
}

pub fn copy(client: &Client, source: u64, destination: u64, length: u64) -> Result<(), VfioUserError> {
    client.write(pci_region::CONFIG, 4, &[6, 0])?;
    let (a, b, c) = (source.to_le_bytes(), destination.to_le_bytes(), length.to_le_bytes());
    client.write_multi(&[(0, 0, &a), (0, 8, &b), (0, 16, &c), (0, 0x20, &[1])])
}

#[test]
fn a_device_is_found_used_and_moved() {
    let (here, there) = (Served::new(true), Served::new(true));
    let (source, destination) = (here.client(Arc::new(NoMemory)), there.client(Arc::new(NoMemory)));
    let info = source.info().unwrap();
    assert_eq!((info.third, info.fourth), (pci_region::COUNT, pci_irq::COUNT));
    let region = source.region_info(1).unwrap();
    assert!(region.file.is_some() && region.info.flags & region_flags::MMAP != 0);
    assert_eq!(region.info.sparse.len(), 1);
    assert!(source.region_io_fds(0).unwrap().parts.is_empty());
    assert_eq!(source.irq_info(pci_irq::MSIX).unwrap().fourth, 4);

    let memory = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memory, 1 << 20).unwrap();
    for client in [&source, &destination] {
        client.dma_map(0, 1 << 20, Some((memory.as_fd(), 0)), true, true).unwrap();
    }
    let events: Vec<OwnedFd> = (0..4).map(|_| eventfd(0, EventfdFlags::CLOEXEC).unwrap()).collect();
    let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
    source.set_triggers(pci_irq::MSIX, 0, &fds).unwrap();
    assert_eq!(source.start_logging(4096, &[(0, 1 << 20)]).unwrap(), 4096);
    source.set_state(State::PreCopy).unwrap();
    copy(&source, 0, 0x1_2345, 10).unwrap();
    assert_eq!(signals(&events[0]), 1);
    assert_eq!(source.read_log(0, 1 << 20, 4096).unwrap(), [1 << 0x12, 0, 0, 0]);
    source.clear_triggers(pci_irq::MSIX, 2, 2).unwrap();
    source.act_on_some(IrqSet::TRIGGER, pci_irq::MSIX, 0, &[false, true, true, true]).unwrap();
    assert_eq!(events.iter().map(signals).collect::<Vec<_>>(), [0, 1, 0, 0]);
    assert!(source.set_triggers(pci_irq::INTX, 0, &fds[..1]).is_err(), "another one is in use");
    source.disable_irq(pci_irq::MSIX).unwrap();
    source.set_triggers(pci_irq::INTX, 0, &fds[..1]).unwrap();

    source.set_state(State::PreCopyP2p).unwrap();
    let estimate = source.estimate().unwrap().unwrap();
    source.set_state(State::StopCopy).unwrap();
    destination.set_state(State::Resuming).unwrap();
    let mut moved = 0;
    loop {
        let some = source.read_data(1000).unwrap();
        destination.write_data(&some).unwrap();
        moved += some.len() as u64;
        if some.len() < 1000 {
            break;
        }
    }
    assert_eq!(moved, estimate);
    destination.set_state(State::Running).unwrap();
    let mut done = [0; 8];
    destination.read(0, 24, &mut done).unwrap();
    assert_eq!(u64::from_le_bytes(done), 1);
    source.reset().unwrap();
    assert_eq!(source.state().unwrap(), State::Running);
    source.stop_logging().unwrap();
    source.dma_unmap(0, 1 << 20).unwrap();
}

#[test]
fn a_log_longer_than_a_message_is_read_in_several() {
    let served = Served::new(true);
    let client = served.client(Arc::new(NoMemory));
    client.start_logging(4096, &[]).unwrap();
    // 64 GiB: a bitmap of 2 MiB.
    let bitmap = client.read_log(0, 64 << 30, 4096).unwrap();
    assert_eq!(bitmap.len(), 1 << 18);
}

#[test]
fn memory_is_served_by_message_on_either_socket_from_many_threads() {
    for twin in [false, true] {
        let served = Served::new(twin);
        let memory = Arc::new(Memory::new());
        let client = served.client(memory.clone());
        assert_eq!(client.has_twin_socket(), twin);
        client.dma_map(0, 0x2_0000, None, true, false).unwrap();
        client.dma_map(0x2_0000, 0x2_0000, None, true, true).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| (0..50).for_each(|_| copy(&client, 0x1000, 0x2_1000, 0x8000).unwrap()));
            for _ in 0..3 {
                scope.spawn(|| (0..200).for_each(|_| assert_eq!(client.info().unwrap().third, 9)));
            }
        });
        let bytes = memory.0.lock().unwrap();
        assert_eq!(bytes[0x1000..0x9000], bytes[0x2_1000..0x2_9000]);
        drop(bytes);
        let error = copy(&client, 0x1000, 0x1_0000, 16).unwrap_err();
        assert!(error.refused_with().is_none(), "one of several writes was not done: {error}");
    }
}

#[test]
fn maps_that_overlap_are_not_even_sent() {
    let served = Served::new(true);
    let client = served.client(Arc::new(NoMemory));
    client.dma_map(0x1000, 0x2000, None, true, true).unwrap();
    for (address, size) in [(0x1000, 0x2000), (0, 0x1001), (0x2fff, 1), (0, u64::MAX), (0x5000, 0), (u64::MAX, 2)] {
        let error = client.dma_map(address, size, None, true, true).unwrap_err();
        assert!(matches!(error, VfioUserError::Lacks { .. }), "{error}");
    }
    assert!(matches!(client.dma_unmap(0x1000, 0x1000), Err(VfioUserError::Lacks { .. })));
    // Refused by the server: not in the way of another attempt.
    assert_eq!(client.dma_map(0x5000, 0x10, None, true, true).unwrap_err().refused_with(), Some(Errno::INVAL));
    client.dma_map(0x5000, 0x1000, None, true, true).unwrap();
}

#[test]
fn who_waits_is_told_when_the_server_ends() {
    let served = Served::new(true);
    let client = served.client(Arc::new(NoMemory));
    drop(served);
    assert!(matches!(client.info(), Err(VfioUserError::Closed { .. })));
}

#[test]
fn where_nobody_listens_is_said() {
    let error = Client::connect("/nonexistent/socket".as_ref(), Options::default(), Arc::new(NoMemory)).err().unwrap();
    assert_eq!(
        error.to_string(),
        "connecting to the vfio-user server at /nonexistent/socket: No such file or directory (os error 2)"
    );
}

/// A server that a test writes: it agrees on the version, and answers each message by a function.
fn scripted(json: &str, limit: Duration, mut script: impl FnMut(&Reply) -> Vec<u8> + Send + 'static) -> Client {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let json = json.to_owned();
    std::thread::spawn(move || {
        let server = Raw(theirs);
        while let Ok(asked) = server.receive() {
            let reply = match asked.command {
                1 => message(asked.id, 1, 1, &version(0, 1, &json)),
                _ => script(&asked),
            };
            if (&server.0).write_all(&reply).is_err() {
                return;
            }
        }
    });
    let options = Options { limit, slow_limit: limit, ..Options::default() };
    Client::over(ours, "a script", options, Arc::new(NoMemory)).unwrap()
}

const LONG: Duration = Duration::from_secs(10);

#[test]
fn a_server_that_does_not_answer_is_named_in_time_and_its_late_answer_is_dropped() {
    let mut first = None;
    let client = scripted("{}", Duration::from_millis(200), move |asked| match first.take() {
        None => {
            first = Some(asked.id);
            Vec::new()
        }
        Some(id) => {
            let late = message(id, 4, 1, &words(&[16, 3, 99, 99]));
            [late, message(asked.id, 4, 1, &words(&[16, 3, 9, 5]))].concat()
        }
    });
    let error = client.info().unwrap_err();
    assert_eq!(error.to_string(), "vfio-user, a script: no answer to GetInfo within 200ms");
    assert_eq!(client.info().unwrap().third, 9);
}

#[test]
fn wrong_replies_are_named() {
    type Script = fn(&Reply) -> Vec<u8>;
    let cases: [(Script, &str); 7] = [
        (|asked| message(asked.id, 9, 1, &[0; 16]), "the reply is one to RegionRead"),
        (|asked| message(asked.id ^ 1, 4, 1, &[0; 16]), "which was not sent"),
        (|asked| message(asked.id, 4, 1, &[0; 15]), "3 bytes, where 4 more are due"),
        (|asked| message(asked.id, 4, 0x21, &[0; 15]), "it refused GetInfo: Input/output error"),
        (|asked| [&message(asked.id, 4, 1, &[])[..4], &words(&[3, 1, 0])].concat(), "a message of 3 bytes"),
        (
            |asked| [&message(asked.id, 4, 1, &[])[..4], &words(&[1 << 24, 1, 0]), &vec![0; 1 << 24]].concat(),
            "a reply of 16777216 bytes",
        ),
        (|asked| message(asked.id, 4, 1, &[0; 16])[..20].to_vec(), "the rest of a message did not come"),
    ];
    for (script, expected) in cases {
        let client = scripted("{}", Duration::from_millis(500), script);
        let error = client.info().unwrap_err().to_string();
        assert!(error.contains(expected) || expected.starts_with("the rest") && error.contains("no answer"), "{error}");
    }
}

#[test]
fn a_twin_socket_that_is_promised_and_not_there_ends_the_connection() {
    for json in [
        r#"{"capabilities":{"twin_socket":{"supported":true}}}"#,
        r#"{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}"#,
    ] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = Raw(theirs);
        // The number of the first request is 0.
        server.send(&message(0, 1, 1, &version(0, 1, json)), &[]);
        let error = Client::over(ours, "a script", Options::default(), Arc::new(NoMemory)).err().unwrap();
        assert!(error.to_string().contains("a twin socket at"), "{error}");
    }
}

#[test]
fn entries_of_io_fds_that_are_longer_are_read_by_their_stride() {
    // As libvfio-user writes them: 48 bytes each.
    let client = scripted("{}", LONG, |asked| match asked.command {
        5 => message(asked.id, 5, 1, &[words(&[32, 3, 0, 0]), longs(&[4096, 0])].concat()),
        _ if asked.word(0) < 112 => message(asked.id, 6, 1, &words(&[112, 0, 0, 2])),
        _ => {
            let entry = |offset: u64| [longs(&[offset, 4]), words(&[7, 0, 1, 0]), longs(&[5, 0])].concat();
            message(asked.id, 6, 1, &[words(&[112, 0, 0, 2]), entry(0), entry(64)].concat())
        }
    });
    let error = client.region_io_fds(0).unwrap_err().to_string();
    // There is no descriptor 7; but the entry was read as it stands.
    assert!(error.contains("fd_index: 7") && error.contains("0 descriptors"), "{error}");
}

#[test]
fn of_a_reply_with_state_only_its_size_is_data() {
    let client = scripted("{}", LONG, |asked| {
        let size = if asked.word(4) > 100 { 5000 } else { 3 };
        message(
            asked.id,
            17,
            1,
            &[words(&[8 + size, size]), b"abc".to_vec(), vec![0; asked.word(4) as usize - 3]].concat(),
        )
    });
    assert_eq!(client.read_data(100).unwrap(), b"abc");
    let error = client.read_data(1000).unwrap_err().to_string();
    assert!(error.contains("5000 bytes of state in 1000"), "{error}");
}

#[test]
fn a_reset_that_leaves_a_device_stopped_is_followed_by_running() {
    let mut state = 1;
    let client = scripted("{}", LONG, move |asked| match asked.command {
        13 => message(asked.id, 13, 1, &[]),
        16 if asked.word(4) & 1 << 17 != 0 => {
            state = asked.word(8);
            message(asked.id, 16, 1, &asked.payload)
        }
        _ => message(asked.id, 16, 1, &words(&[16, asked.word(4), state, 0])),
    });
    client.reset().unwrap();
    assert_eq!(client.state().unwrap(), State::Running);
}

#[test]
fn more_vectors_than_a_server_takes_descriptors_go_in_several_messages() {
    let sent = Arc::new(Mutex::new(Vec::new()));
    let seen = sent.clone();
    let client = scripted(r#"{"capabilities":{"max_msg_fds":8}}"#, LONG, move |asked| {
        seen.lock().unwrap().push((asked.word(12), asked.word(16), asked.fds.len()));
        message(asked.id, 8, 1, &[])
    });
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    client.set_triggers(pci_irq::MSIX, 0, &[event.as_fd(); 20]).unwrap();
    assert_eq!(*sent.lock().unwrap(), [(0, 8, 8), (8, 8, 8), (16, 4, 4)]);
}

#[test]
fn accesses_longer_than_a_server_takes_go_in_several_messages() {
    let client = scripted(r#"{"capabilities":{"max_data_xfer_size":1000}}"#, LONG, |asked| {
        let count = asked.word(12);
        assert!(count <= 1000);
        message(
            asked.id,
            9,
            1,
            &[longs(&[asked.long(0)]), words(&[0, count]), vec![asked.long(0) as u8; count as usize]].concat(),
        )
    });
    let mut data = vec![0; 2500];
    client.read(0, 0, &mut data).unwrap();
    assert_eq!((data[999], data[1000], data[2499]), (0, 1000_u32 as u8, 2000_u32 as u8));
}

#[test]
fn an_unknown_command_of_a_server_is_refused_and_memory_that_is_not_mapped_too() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = Raw(theirs);
    server.send(&message(0, 1, 1, &version(0, 1, "{}")), &[]);
    let memory = Arc::new(Memory(Mutex::new(vec![5; 0x2000])));
    let client = Client::over(ours, "a script", Options::default(), memory).unwrap();
    assert_eq!(server.receive().unwrap().command, 1);
    std::thread::scope(|scope| {
        let map = scope.spawn(|| client.dma_map(0x1000, 0x1000, None, true, false));
        let asked = server.receive().unwrap();
        server.send(&message(asked.id, 2, 1, &[]), &[]);
        map.join().unwrap().unwrap();
    });
    // While the client asks nothing.
    for (command, payload, error) in [
        (99, vec![], 38),
        (4, vec![0; 16], 38),
        (11, vec![0; 15], 22),
        (11, longs(&[0x1000, u64::MAX]), 22),
        (11, longs(&[0x1000, 0x1001]), 14),
        (11, longs(&[0xfff, 2]), 14),
        (12, [longs(&[0x1000, 1]), vec![1]].concat(), 13),
        (12, [longs(&[0x1000, 2]), vec![1]].concat(), 22),
    ] {
        assert_eq!(server.ask(command, &payload).unwrap_err(), error, "command {command}, {payload:?}");
    }
    assert_eq!(server.ask(11, &longs(&[0x1ff0, 16])).unwrap().payload[16..], [5; 16]);
}

#[test]
fn a_full_queue_is_tried_again_until_the_deadline() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let address = rustix::net::SocketAddrUnix::new(&path).unwrap();
    let listener =
        rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None).unwrap();
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let listener = UnixListener::from(listener);
    let _first = UnixStream::connect(&path).unwrap();
    let options = Options { limit: Duration::from_millis(200), ..Options::default() };
    let error = Client::connect(&path, options, Arc::new(NoMemory)).err().unwrap();
    assert!(matches!(error, VfioUserError::Connect { source: Errno::AGAIN, .. }), "{error}");
    // Room comes while it tries.
    let thread = std::thread::spawn(move || {
        let _first = listener.accept().unwrap();
        let server = Raw(listener.accept().unwrap().0);
        server.receive().unwrap();
        server.send(&message(0, 1, 1, &version(0, 1, "{}")), &[]);
    });
    Client::connect(&path, Options::default(), Arc::new(NoMemory)).unwrap();
    thread.join().unwrap();
}

#[test]
fn everything_is_asked_of_a_server_of_ours() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let server = Server::bind(&path).unwrap();
    let mut device = Copier::new().unwrap();
    let mut host = Host::new(&device).unwrap();
    let stop = host.stop();
    let thread = std::thread::spawn(move || server.serve(&mut host, &mut device).unwrap());
    ask_everything(UnixStream::connect(&path).unwrap(), LONG).unwrap();
    stop.stop();
    thread.join().unwrap();
}
