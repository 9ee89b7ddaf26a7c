//! Back ends that do not do what they should: each is named, with what was wrong, and within its deadline.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use wherry_memory::{BlockId, BlockSpec, PageSize, Ram};

use super::front::{Front, LOG_ALL, ask_everything, ours, protocol};
use super::wire::Connection;

/// Shorter than that of a real front end: some of these never answer.
const LIMIT: Duration = Duration::from_millis(300);

/// What a back end that is asked answers: its message, or nothing more if there is none.
type Script = Box<dyn FnMut(u32, &[u8], &UnixStream) -> Option<Vec<u8>> + Send>;

pub(super) fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes: Vec<u8> = [request, flags, payload.len() as u32].into_iter().flat_map(u32::to_ne_bytes).collect();
    bytes.extend(payload);
    bytes
}

pub(super) fn reply(request: u32, payload: &[u8]) -> Vec<u8> {
    message(request, 5, payload)
}

/// What an honest back end answers to a request; empty if that has no answer.
pub(super) fn honest(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let number = |value: u64| reply(request, &value.to_ne_bytes());
    match request {
        1 => number(1 << 30 | LOG_ALL | 1 << 32),
        15 => number(protocol::WANTED),
        42 => number(0x100),
        17 => number(1),
        36 => number(8),
        6 | 43 => number(0),
        11 | 24 => reply(request, payload),
        _ if flags & 8 != 0 => number(0),
        _ => Vec::new(),
    }
}

/// A back end at a socket: honest, but for the request of that number, which the script answers.
fn back_end(odd: u32, mut script: Script) -> (tempfile::TempDir, PathBuf, JoinHandle<()>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let thread = std::thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let mut kept = Vec::new();
        while let Some((request, flags, payload, fd)) = with_descriptor(&stream) {
            kept.extend(fd);
            let answer = match request == odd {
                true => script(request, &payload, &stream),
                false if request == 31 => {
                    with_descriptors(&stream, &reply(31, &payload), 1);
                    Some(Vec::new())
                }
                false => Some(honest(request, flags, &payload)),
            };
            match answer {
                // The other side may have given up.
                Some(bytes) => drop(stream.write_all(&bytes)),
                None => return,
            }
        }
    });
    (directory, path, thread)
}

pub(super) fn ram() -> Ram {
    let spec = BlockSpec { id: BlockId(0), guest_base: 0, size: 1 << 20, page_size: PageSize::Base };
    Ram::create(&[spec]).unwrap()
}

/// Runs against a back end that answers one request oddly; what is said of it.
fn said(odd: u32, script: Script) -> String {
    let (_directory, path, thread) = back_end(odd, script);
    let log = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let connection = Connection::open(&path, LIMIT).unwrap();
    let error = ask_everything(connection, &ram(), log.as_fd()).unwrap_err().to_string();
    thread.join().unwrap();
    assert!(error.contains(path.to_str().unwrap()), "the back end is not named: {error}");
    error
}

#[test]
fn a_back_end_that_does_not_answer_one_of_the_requests_is_given_up_at_the_deadline_by_name() {
    for (request, name) in [
        (1, "GetFeatures"),
        (15, "GetProtocolFeatures"),
        (17, "GetQueueNum"),
        (24, "GetConfig"),
        (2, "SetFeatures"),
        (21, "SetBackendReqFd"),
        (36, "GetMaxMemSlots"),
        (37, "AddMemReg"),
        (38, "RemMemReg"),
        (5, "SetMemTable"),
        (6, "SetLogBase"),
        (8, "SetVringNum"),
        (10, "SetVringBase"),
        (9, "SetVringAddr"),
        (13, "SetVringCall"),
        (12, "SetVringKick"),
        (18, "SetVringEnable"),
        (25, "SetConfig"),
        (19, "SendRarp"),
        (11, "GetVringBase"),
        (28, "PostcopyAdvise"),
        (31, "GetInflightFd"),
        (32, "SetInflightFd"),
        (42, "SetDeviceStateFd"),
        (43, "CheckDeviceState"),
    ] {
        let error = said(request, Box::new(|_, _, _| Some(Vec::new())));
        // Of those that are sent together the answer to the next one comes in its place.
        let late = format!("no answer to {name} within 300ms");
        let passed_over = [8, 9, 10, 12, 13, 42].contains(&request) && error.contains(&format!("{name}: it answers"));
        assert!(error.contains(&late) || passed_over, "{error}");
    }
}

#[test]
fn a_back_end_that_hangs_up_at_one_of_the_requests_is_told_of_with_the_request() {
    for (request, name) in [(1, "GetFeatures"), (2, "SetFeatures"), (5, "SetMemTable"), (11, "GetVringBase")] {
        let error = said(request, Box::new(|_, _, _| None));
        assert!(error.contains("closed the connection") && error.contains(name), "{error}");
    }
}

#[test]
fn answers_of_a_wrong_form_are_refused_with_what_was_wrong() {
    let with = |bytes: Vec<u8>| -> Script { Box::new(move |_, _, _| Some(bytes.clone())) };
    let cases: [(u32, Vec<u8>, &str); 17] = [
        (1, reply(2, &[0; 8]), "answers request 2"),
        (1, message(1, 1, &[0; 8]), "flags 0x1"),
        (1, reply(1, &[0; 4]), "4 bytes, where 8 are due"),
        // A length that is never sent.
        (
            1,
            [1u32, 5, u32::MAX].into_iter().flat_map(u32::to_ne_bytes).collect(),
            "4294967295 bytes; 4096 are possible",
        ),
        (5, reply(5, &1u64.to_ne_bytes()), "refused, with 0x1"),
        (36, reply(36, &0u64.to_ne_bytes()), "1 RAM blocks; it has room for 0"),
        (37, reply(37, &1u64.to_ne_bytes()), "refused, with 0x1"),
        // As in postcopy, in which nobody is.
        (37, reply(37, &[0; 40]), "40 bytes, where 8 are due"),
        (38, reply(38, &1u64.to_ne_bytes()), "refused, with 0x1"),
        (24, reply(24, &[]), "no configuration"),
        (24, reply(24, &[0; 20]), "20 bytes, where 72 are due"),
        (11, reply(11, &[9; 8]), "asked about ring 0"),
        (28, reply(28, &[]), "0 descriptors beside one that is due"),
        (31, reply(31, &[0; 20]), "20 bytes, and 0 descriptors beside one that is due"),
        (42, reply(42, &1u64.to_ne_bytes()), "refused, with 0x1"),
        (42, reply(42, &0u64.to_ne_bytes()), "instead of our pipe"),
        (43, reply(43, &1u64.to_ne_bytes()), "does not take the state"),
    ];
    for (request, bytes, words) in cases {
        let error = said(request, with(bytes));
        assert!(error.contains(words), "{error}");
    }
}

/// Sends an answer with so many descriptors.
pub(super) fn with_descriptors(stream: &UnixStream, bytes: &[u8], count: usize) {
    let file = std::fs::File::open("/dev/null").unwrap();
    let fds = vec![file.as_fd(); count];
    let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    rustix::net::sendmsg(stream, &[std::io::IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
}

#[test]
fn descriptors_nobody_asked_for_are_refused_and_closed() {
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open();
    let error = said(
        1,
        Box::new(|_, _, stream| {
            with_descriptors(stream, &reply(1, &[0; 8]), 20);
            Some(Vec::new())
        }),
    );
    assert!(error.contains("more than 8 descriptors"), "{error}");
    let error = said(
        28,
        Box::new(|_, _, stream| {
            with_descriptors(stream, &reply(28, &[]), 3);
            Some(Vec::new())
        }),
    );
    assert!(error.contains("2 descriptors beside one"), "{error}");
    // Other tests open and close their own beside this one.
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while open() > before + 16 {
        assert!(std::time::Instant::now() < deadline, "descriptors are left: {before} before, {} now", open());
    }
}

#[test]
fn a_table_that_comes_back_with_other_regions_is_refused() {
    // The first answer to a table is that of precopy, the second one has the addresses.
    let mut tables = 0;
    let script = move |request: u32, payload: &[u8], stream: &UnixStream| {
        if request == 28 {
            with_descriptors(stream, &reply(28, &[]), 1);
            return Some(Vec::new());
        }
        tables += 1;
        if tables == 1 {
            return Some(reply(request, &[0; 8]));
        }
        let mut table = payload.to_vec();
        table[8] = 1;
        Some(reply(request, &table))
    };
    let (_directory, path, thread) = back_end(5, Box::new(script));
    let mut front = Front::over(Connection::open(&path, LIMIT).unwrap()).unwrap();
    let ram = ram();
    front.give_up_slots().unwrap();
    front.set_memory(&ram).unwrap();
    let error = front.set_missing_memory(&ram).unwrap_err().to_string();
    assert!(error.contains("other regions"), "{error}");
    drop(front);
    thread.join().unwrap();
}

#[test]
fn blocks_are_shown_one_by_one_and_taken_away_when_they_are_no_more() {
    let (here, its) = UnixStream::pair().unwrap();
    let asked = Arc::<Mutex<Vec<(u32, Vec<u8>, bool)>>>::default();
    let noted = asked.clone();
    let thread = std::thread::spawn(move || {
        while let Some((request, flags, payload, fd)) = with_descriptor(&its) {
            let answer = honest(request, flags, &payload);
            // Before the other side goes on.
            if matches!(request, 5 | 37 | 38) {
                noted.lock().unwrap().push((request, payload, fd.is_some()));
            }
            { &its }.write_all(&answer).unwrap();
        }
    });
    let mut front = Front::over(Connection::over(here, Path::new("a pair"), LIMIT).unwrap()).unwrap();
    let block = |id, guest_base| BlockSpec { id: BlockId(id), guest_base, size: 1 << 20, page_size: PageSize::Base };
    let few = Ram::create(&[block(0, 0), block(1, 1 << 32)]).unwrap();
    // The same is not shown twice.
    front.set_memory(&few).unwrap();
    front.set_memory(&few).unwrap();
    let slot = |ram: &Ram, at: usize| {
        let block = &ram.blocks()[at];
        let words = [0, block.spec().guest_base, block.spec().size, ours(block.spec().guest_base), 0];
        words.into_iter().flat_map(u64::to_ne_bytes).collect::<Vec<u8>>()
    };
    let added = |ram: &Ram, at| (37, slot(ram, at), true);
    let removed = |ram: &Ram, at| (38, slot(ram, at), false);
    let take = || std::mem::take(&mut *asked.lock().unwrap());
    assert_eq!(take(), [added(&few, 0), added(&few, 1)]);
    // More than a table could hold, and more than there is room for.
    let many: Vec<_> = (0..9).map(|n| block(n, u64::from(n) << 32)).collect();
    let error = front.set_memory(&Ram::create(&many).unwrap()).unwrap_err().to_string();
    assert!(error.contains("9 RAM blocks; it has room for 8"), "{error}");
    assert!(take().is_empty(), "it is left with what it had");
    let other = Ram::create(&[block(0, 1 << 33)]).unwrap();
    front.set_memory(&other).unwrap();
    assert_eq!(take(), [removed(&few, 0), removed(&few, 1), added(&other, 0)]);
    front.hide_memory().unwrap();
    front.hide_memory().unwrap();
    assert_eq!(take(), [removed(&other, 0)]);
    drop(front);
    thread.join().unwrap();
}

#[test]
fn memory_comes_and_goes_at_a_back_end_that_nobody_here_wrote() {
    let directory = tempfile::tempdir().unwrap();
    let (path, image) = (directory.path().join("s"), directory.path().join("disk"));
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let node = format!("driver=file,node-name=f,filename={}", image.display());
    let export = format!("type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={}", path.display());
    let mut daemon = std::process::Command::new("qemu-storage-daemon");
    daemon.args(["--blockdev", &node, "--export", &export]);
    let Ok(mut daemon) = daemon.spawn() else {
        println!("SKIPPED: qemu-storage-daemon is not installed (Debian package qemu-utils)");
        return;
    };
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while !path.exists() {
        assert!(std::time::Instant::now() < deadline, "waited for the socket of qemu-storage-daemon");
        std::thread::sleep(Duration::from_millis(5));
    }
    let mapped = || {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", daemon.id())).unwrap();
        maps.matches("/memfd:wherry-ram").count()
    };
    let mut front = Front::open(&path).unwrap();
    assert!(front.has(protocol::CONFIGURE_MEM_SLOTS));
    front.set_features(1 << 32, false).unwrap();
    let block = |id, guest_base| BlockSpec { id: BlockId(id), guest_base, size: 1 << 20, page_size: PageSize::Base };
    let ram = Ram::create(&[block(0, 0), block(1, 1 << 32)]).unwrap();
    for _ in 0..3 {
        front.set_memory(&ram).unwrap();
        assert_eq!(mapped(), 2);
        front.hide_memory().unwrap();
        assert_eq!(mapped(), 0);
    }
    // And in a table.
    front.set_memory(&ram).unwrap();
    front.give_up_slots().unwrap();
    front.set_memory(&ram).unwrap();
    assert_eq!(mapped(), 2);
    drop(front);
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

#[test]
fn a_back_end_may_say_that_its_configuration_has_changed_and_nothing_else() {
    let over = |stream| Connection::over(stream, Path::new("a pair"), LIMIT).unwrap();
    for (request, words) in [
        (message(3, 1, &[]), "request 3 with 0 bytes"),
        (message(0, 1, &[]), "request 0 with 0 bytes"),
        (message(2, 1, &[0; 8]), "request 2 with 8 bytes"),
        (message(2, 5, &[]), "request 2 with flags 0x5"),
        (message(2, 0, &[]), "flags 0x0"),
        ([2, 1, u32::MAX].into_iter().flat_map(u32::to_ne_bytes).collect(), "4294967295 bytes"),
        (message(2, 1, &[])[..11].to_vec(), "no answer to a request of its own within 300ms"),
    ] {
        let (ours, mut its) = UnixStream::pair().unwrap();
        its.write_all(&request).unwrap();
        let error = over(ours).asked().unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("a pair"), "{error}");
    }
    let (ours, its) = UnixStream::pair().unwrap();
    with_descriptors(&its, &message(2, 1, &[]), 1);
    let error = over(ours).asked().unwrap_err().to_string();
    assert!(error.contains("1 descriptors"), "{error}");

    let (ours, mut its) = UnixStream::pair().unwrap();
    let channel = over(ours);
    its.write_all(&[message(2, 1, &[]), message(2, 9, &[])].concat()).unwrap();
    assert!(channel.asked().unwrap() && channel.asked().unwrap());
    // The second one asked for an answer.
    let mut answer = [0; 20];
    its.read_exact(&mut answer).unwrap();
    assert_eq!(answer[..], reply(2, &[0; 8])[..]);
    drop(its);
    assert!(!channel.asked().unwrap(), "it makes no more requests");
}

#[test]
fn a_socket_at_which_nobody_makes_room_is_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let _listener = UnixListener::bind(&path).unwrap();
    // Until there is no room for one more.
    let mut waiting = Vec::new();
    let error = loop {
        match Connection::open(&path, LIMIT) {
            Ok(connection) => waiting.push(connection),
            Err(error) => break error.to_string(),
        }
    };
    assert!(error.contains("connecting") && error.contains(path.to_str().unwrap()), "{error}");
}

/// Reads a message with the first descriptor that came with it.
pub(super) fn with_descriptor(stream: &UnixStream) -> Option<(u32, u32, Vec<u8>, Option<OwnedFd>)> {
    let mut bytes = vec![0; 12];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut part = [std::io::IoSliceMut::new(&mut bytes)];
    let got = rustix::net::recvmsg(stream, &mut part, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?;
    let fds = control.drain().find_map(|part| match part {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
    let mut payload = vec![0; word(8) as usize];
    (got.bytes == 12).then_some(())?;
    { stream }.read_exact(&mut payload).ok()?;
    Some((word(0), word(4), payload, fds))
}

#[test]
fn a_state_that_does_not_end_is_given_up() {
    for (endless, words) in [(false, "timed out"), (true, "more than 4194304 bytes")] {
        let (ours, its) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || {
            let mut kept = None;
            while let Some((request, flags, payload, pipe)) = with_descriptor(&its) {
                { &its }.write_all(&honest(request, flags, &payload)).unwrap();
                if request == 42 && endless {
                    let mut pipe = std::fs::File::from(pipe.unwrap());
                    let flags = rustix::fs::fcntl_getfl(&pipe).unwrap();
                    rustix::fs::fcntl_setfl(&pipe, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
                    while pipe.write_all(&[0; 4096]).is_ok() {}
                } else if request == 42 {
                    kept = pipe;
                }
            }
            drop(kept);
        });
        let connection = Connection::over(ours, std::path::Path::new("a pair"), LIMIT).unwrap();
        let front = Front::over(connection).unwrap();
        let error = front.device_state().unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        drop(front);
        thread.join().unwrap();
    }
}
