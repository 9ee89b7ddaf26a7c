//! The client's memory: maps, access by descriptor and by message, logs.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::raw::{EBUSY, EEXIST, EINVAL, ENOSYS, Raw, longs, message, words};
use super::{CONFIG, Served, copy, event, memory};
use wherry_vfio_user::server::Userfaults;

#[test]
fn maps_do_not_overlap_and_are_taken_away_as_they_came() {
    let served = Served::new();
    let client = served.client();
    let memory = memory(1 << 20);
    let fd = Some((memory.as_fd(), 0));
    client.map(0x10_0000, 0x4000, 3, fd).unwrap();
    for (address, size) in [(0x10_0000, 0x4000), (0x10_3000, 0x1000), (0xf_f000, 0x2000), (0, 0x20_0000)] {
        assert_eq!(client.map(address, size, 3, fd), Err(EEXIST), "{address:#x} {size:#x}");
    }
    client.map(0x10_4000, 0x1000, 1, fd).unwrap();
    client.map(0xf_f000, 0x1000, 2, None).unwrap();
    for (address, size) in [(0x10_0000, 0x3000), (0x10_1000, 0x3000), (0x10_0000, 0x5000), (0, 0x1000)] {
        assert!(client.unmap(address, size).is_err(), "{address:#x} {size:#x}");
    }
    assert_eq!(served.bus.maps(), 3);
    client.unmap(0x10_0000, 0x4000).unwrap();
    client.map(0x10_0000, 0x4000, 3, fd).unwrap();
    // Empty, beyond the end, not at a page, flags that do not exist, beyond the file.
    for (address, size, flags) in
        [(0x80_0000, 0, 3), (u64::MAX - 0xfff, 0x2000, 3), (0x80_0800, 0x1000, 3), (0x80_0000, 0x1000, 7)]
    {
        assert_eq!(client.map(address, size, flags, fd), Err(EINVAL), "{address:#x} {size:#x} {flags}");
    }
    assert_eq!(client.map(0x80_0000, 0x1000, 3, Some((memory.as_fd(), 1 << 20))), Err(EINVAL));
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    assert!(client.map(0x80_0000, 0x1000, 3, Some((pipe.as_fd(), 0))).is_err());
    drop(client);
    served.client();
    assert_eq!(served.bus.maps(), 0, "they went with their client");
}

#[test]
fn a_device_reads_and_writes_what_is_mapped_as_it_is_allowed() {
    use std::os::unix::fs::FileExt;
    let served = Served::new();
    let client = served.client();
    let sealed = memory(0x4000);
    let plain = memfd_create("plain", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&plain, 0x4000).unwrap();
    for fd in [sealed, plain] {
        let file = std::fs::File::from(fd);
        client.map(0x1000, 0x1000, 3, Some((file.as_fd(), 0x1000))).unwrap();
        client.map(0x2000, 0x1000, 3, Some((file.as_fd(), 0))).unwrap();
        client.map(0x3000, 0x1000, 1, Some((file.as_fd(), 0x3000))).unwrap();
        file.write_all_at(b"over the edge", 0x2000 - 4).unwrap();
        file.write_all_at(b" the edge", 0).unwrap();
        // From two maps, which lie in the file the other way round.
        copy(&client, 0x1ffc, 0x1100, 13).unwrap();
        let mut seen = [0; 13];
        file.read_exact_at(&mut seen, 0x1100).unwrap();
        assert_eq!(&seen, b"over the edge");
        // Read-only; not mapped; beyond the last.
        for (source, destination) in [(0x1000, 0x3000), (0, 0x1000), (0x3ff8, 0x1000)] {
            assert!(copy(&client, source, destination, 16).is_err(), "{source:#x} {destination:#x}");
        }
        for address in [0x1000, 0x2000, 0x3000] {
            client.unmap(address, 0x1000).unwrap();
        }
        assert!(copy(&client, 0x1000, 0x1000, 16).is_err(), "nothing is mapped any longer");
    }
}

#[test]
fn a_file_that_is_cut_under_a_map_does_not_end_the_server() {
    let served = Served::new();
    let client = served.client();
    let plain = memfd_create("plain", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&plain, 0x4000).unwrap();
    client.map(0, 0x4000, 3, Some((plain.as_fd(), 0))).unwrap();
    copy(&client, 0, 0x2000, 0x1000).unwrap();
    ftruncate(&plain, 0).unwrap();
    assert!(copy(&client, 0, 0x2000, 0x1000).is_err());
    client.ask(4, &words(&[16, 0, 0, 0])).unwrap();
}

/// Serves the server's own commands on a socket until a reply comes there, or so many were served.
fn attend(socket: &Raw, memory: &mut [u8], most: usize) -> Option<super::raw::Reply> {
    for _ in 0..most {
        let asked = socket.receive().unwrap();
        if asked.flags & 1 != 0 {
            return Some(asked);
        }
        let (address, count) = (asked.long(0) as usize, asked.long(8) as usize);
        let mut reply = longs(&[address as u64, count as u64]);
        match asked.command {
            11 => reply.extend(&memory[address..][..count]),
            12 => memory[address..][..count].copy_from_slice(&asked.payload[16..]),
            other => panic!("command {other}"),
        }
        socket.send(&message(asked.id, asked.command, 1, &reply), &[]);
    }
    None
}

#[test]
fn memory_without_a_descriptor_is_asked_for_between_a_request_and_its_reply() {
    let served = Served::new();
    let (client, _) = Raw::connect(&served.path, r#"{"capabilities":{"max_data_xfer_size":1000}}"#);
    client.map(0, 0x4000, 3, None).unwrap();
    let mut memory: Vec<u8> = (0..0x4000_u32).map(|at| (at / 7) as u8).collect();
    client.write(CONFIG, 4, &[6, 0]).unwrap();
    for (at, value) in [(0, 0_u64), (8, 0x2000), (16, 2500)] {
        client.write(0, at, &value.to_le_bytes()).unwrap();
    }
    // Two requests at once: the second waits while the first one asks for memory.
    let start = [longs(&[0x20]), words(&[0, 4, 1])].concat();
    let info = message(8, 4, 0, &words(&[16, 0, 0, 0]));
    client.send(&[message(7, 10, 0, &start), info].concat(), &[]);
    let reply = attend(&client, &mut memory, 20).unwrap();
    assert_eq!((reply.id, reply.command, reply.flags), (7, 10, 1));
    assert_eq!(client.receive().unwrap().id, 8);
    let (source, destination) = memory.split_at(0x2000);
    assert_eq!(source[..2500], destination[..2500]);
}

#[test]
fn a_refused_or_wrong_answer_about_memory_fails_the_copy_alone() {
    let served = Served::new();
    let client = served.client();
    client.map(0, 0x4000, 3, None).unwrap();
    for (flags, payload) in [(0x21, vec![]), (1, vec![]), (1, longs(&[0, 15])), (1, vec![0; 64])] {
        client.write(CONFIG, 4, &[6, 0]).unwrap();
        client.write(0, 16, &16_u64.to_le_bytes()).unwrap();
        client.send(&message(7, 10, 0, &[longs(&[0x20]), words(&[0, 4, 1])].concat()), &[]);
        let asked = client.receive().unwrap();
        assert_eq!(asked.command, 11);
        client.send(&message(asked.id, 11, flags, &payload), &[]);
        let reply = client.receive().unwrap();
        assert_eq!((reply.id, reply.flags), (7, 0x21));
    }
}

#[test]
fn with_a_twin_socket_memory_is_asked_for_there() {
    let served = Served::new();
    let (client, reply) = Raw::connect(&served.path, r#"{"capabilities":{"twin_socket":{"supported":true}}}"#);
    let text = String::from_utf8(reply.payload[4..].to_vec()).unwrap();
    assert!(text.contains(r#""twin_socket":{"supported":true,"fd_index":0}"#), "{text}");
    let twin = Raw(reply.fds.into_iter().next().unwrap().into());
    twin.0.set_read_timeout(Some(super::raw::LIMIT)).unwrap();
    client.map(0, 0x4000, 3, None).unwrap();
    let thread = std::thread::spawn(move || {
        let mut memory = vec![9; 0x4000];
        // One read, one write.
        assert!(attend(&twin, &mut memory, 2).is_none());
        memory
    });
    copy(&client, 0, 0x2000, 100).unwrap();
    assert_eq!(thread.join().unwrap()[0x2000..][..100], [9; 100]);
    let none = Served::with(|host| host.set_twin_socket(false));
    let (_, reply) = Raw::connect(&none.path, r#"{"capabilities":{"twin_socket":{"supported":true}}}"#);
    assert!(reply.fds.is_empty());
}

#[test]
fn what_a_device_writes_is_logged_by_page_size_range_and_part() {
    let served = Served::new();
    let client = served.client();
    let memory = memory(1 << 20);
    client.map(0, 1 << 20, 3, Some((memory.as_fd(), 0))).unwrap();
    let (get, set) = (1 << 16, 1 << 17);
    let report = |address: u64, length: u64, page: u64, room: u32| {
        client.feature(8 | get, &longs(&[address, length, page]), 24 + room)
    };
    assert_eq!(report(0, 4096, 4096, 8).unwrap_err(), EINVAL, "nothing is logged yet");
    copy(&client, 0, 0x2000, 1).unwrap();
    let start = [longs(&[4096]), words(&[1, 0]), longs(&[0x4000, 0x8_0000])].concat();
    let reply = client.feature(6 | set, &start, start.len() as u32).unwrap();
    assert_eq!(reply.payload[8..], start);
    assert_eq!(client.feature(6 | set, &start, 64).unwrap_err(), EINVAL, "it is logging");
    copy(&client, 0, 0x3fff, 2).unwrap();
    copy(&client, 0, 0x4_4000, 0x2000).unwrap();
    // Without room for it, it says how much it needs and forgets nothing.
    let short = report(0, 1 << 20, 4096, 8).unwrap();
    assert_eq!((short.word(0), short.payload.len()), (8 + 24 + 32, 8));
    let part = report(0x4_0000, 0x5000, 4096, 8).unwrap();
    assert_eq!(part.payload[8..], longs(&[0x4_0000, 0x5000, 4096, 1 << 4]));
    let all = report(0, 1 << 20, 4096, 32).unwrap();
    assert_eq!(all.payload[32..], longs(&[1 << 4, 1 << 5, 0, 0]), "page 3 is out of range; page 0x44 was told");
    copy(&client, 0, 0x8000, 1).unwrap();
    assert_eq!(report(0, 0x1_0000, 0x4000, 8).unwrap().long(32), 1 << 2);
    for (address, length, page) in [(0, 0, 4096), (0, 4096, 0), (0, 4096, 3), (1, 4096, 4096), (4096, u64::MAX, 4096)] {
        assert_eq!(report(address, length, page, 8).unwrap_err(), EINVAL);
    }
    assert_eq!(report(0, 1 << 62, 4096, u32::MAX - 100).unwrap_err(), EINVAL, "a bitmap longer than any message");
    client.feature(7 | set, &[], 0).unwrap();
    assert_eq!(report(0, 4096, 4096, 8).unwrap_err(), EINVAL);
    client.feature(6 | set, &start, 64).unwrap();
    drop(client);
    assert_eq!(served.client().feature(8 | get, &longs(&[0, 4096, 4096]), 32).unwrap_err(), EINVAL, "it went with it");
}

/// Notes what is asked of a userfaultfd.
#[derive(Clone, Default)]
struct Noted(Arc<Mutex<Vec<String>>>);

impl Noted {
    fn note(&self, what: impl Into<String>) {
        self.0.lock().unwrap().push(what.into());
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Userfaults for Noted {
    fn open(&mut self) -> io::Result<OwnedFd> {
        self.note("open");
        Ok(event())
    }

    fn register(&mut self, address: u64, bytes: u64) -> io::Result<()> {
        self.note(format!("register {bytes:#x} {address:#x}"));
        if bytes == 0x3000 { Err(io::ErrorKind::PermissionDenied.into()) } else { Ok(()) }
    }

    fn unregister(&mut self, address: u64, bytes: u64) -> io::Result<()> {
        self.note(format!("unregister {bytes:#x} {address:#x}"));
        Ok(())
    }

    fn close(&mut self) {
        self.note("close");
    }
}

const USERFAULTFD: u16 = 0x8000;

#[test]
fn memory_that_is_not_all_there_is_registered_before_the_map_is_answered_and_its_place_is_told() {
    let noted = Noted::default();
    let served = Served::with(|host| host.set_userfaults(Box::new(noted.clone())));
    // A client that has not asked for it does not get it.
    assert_eq!(served.client().ask(USERFAULTFD, &words(&[1])).unwrap_err(), ENOSYS);
    let json = r#"{"capabilities":{"wherry":{"userfaultfd":true}}}"#;
    let (client, _) = Raw::connect(&served.path, json);
    let memory = memory(1 << 20);
    let fd = Some((memory.as_fd(), 0));
    client.map(0x10_0000, 0x1000, 3, fd).unwrap();
    assert_eq!(client.ask(USERFAULTFD, &words(&[1])).unwrap_err(), EBUSY, "there is a map");
    client.unmap(0x10_0000, 0x1000).unwrap();
    for malformed in [&[][..], &words(&[2]), &words(&[1, 0]), &[1]] {
        assert_eq!(client.ask(USERFAULTFD, malformed).unwrap_err(), EINVAL, "{malformed:?}");
    }
    assert_eq!(noted.take(), [""; 0]);
    assert_eq!(client.ask(USERFAULTFD, &words(&[1])).unwrap().fds.len(), 1);
    assert_eq!(client.ask(USERFAULTFD, &words(&[1])).unwrap_err(), EINVAL, "a second time");
    let map = |size: u64, fds: &[_]| client.ask_with(2, &[words(&[32, 3]), longs(&[0, 0x20_0000, size])].concat(), fds);
    let at = map(0x2000, &[memory.as_fd()]).unwrap().long(0);
    assert_eq!(noted.take(), ["open".to_owned(), format!("register 0x2000 {at:#x}")]);
    client.unmap(0x20_0000, 0x2000).unwrap();
    // What cannot be waited for is not mapped: neither without a file, nor where the kernel refuses.
    assert_eq!(map(0x2000, &[]).unwrap_err(), EINVAL);
    assert_eq!(map(0x3000, &[memory.as_fd()]).unwrap_err(), EINVAL);
    assert_eq!(served.bus.maps(), 0);
    noted.take();
    let at = map(0x2000, &[memory.as_fd()]).unwrap().long(0);
    client.ask(USERFAULTFD, &words(&[0])).unwrap();
    assert_eq!(noted.take()[1..], [format!("unregister 0x2000 {at:#x}"), "close".to_owned()]);
    client.ask(USERFAULTFD, &words(&[0])).unwrap();
    assert_eq!(noted.take(), [""; 0], "it is over");
}

#[test]
fn a_client_that_goes_while_memory_is_missing_leaves_nobody_waiting() {
    let noted = Noted::default();
    let served = Served::with(|host| host.set_userfaults(Box::new(noted.clone())));
    let (client, _) = Raw::connect(&served.path, r#"{"capabilities":{"wherry":{"userfaultfd":true}}}"#);
    client.ask(USERFAULTFD, &words(&[1])).unwrap();
    let memory = memory(1 << 20);
    client.ask_with(2, &[words(&[32, 3]), longs(&[0, 0, 0x1000])].concat(), &[memory.as_fd()]).unwrap();
    noted.take();
    drop(client);
    served.client();
    let asked = noted.take();
    assert!(asked[0].starts_with("unregister 0x1000") && asked[1] == "close", "{asked:?}");
}
