//! Connections: versions, clients that come and go, and messages that are not what they should be.

use std::io::Read;
use std::io::Write;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::raw::{EINVAL, Raw, longs, message, signals, version, words};
use super::{EVENTFD, RUNNING, STOP, Served, TRIGGER, event};

#[test]
fn the_version_is_agreed_on_and_only_what_was_proposed_is_in_the_reply() {
    let served = Served::new();
    let json = r#"{"capabilities":{"max_msg_fds":8,"write_multiple":true,"migration":{"pgsize":4096}}}"#;
    let (_, reply) = Raw::connect(&served.path, json);
    assert_eq!(reply.payload[..4], [0, 0, 1, 0]);
    assert_eq!(reply.payload.last(), Some(&0));
    let text = std::str::from_utf8(&reply.payload[4..reply.payload.len() - 1]).unwrap();
    assert_eq!(text, r#"{"capabilities":{"max_msg_fds":253,"write_multiple":true}}"#);
}

#[test]
fn a_version_without_json_or_of_a_lower_minor_will_do() {
    let served = Served::new();
    for bytes in [vec![0, 0, 0, 0], vec![0, 0, 1, 0], version(0, 7, "{}"), b"\0\0\x01\0{}".to_vec()] {
        let client = Raw::stranger(&served.path);
        let reply = client.ask(1, &bytes).unwrap();
        assert!(reply.payload[2] <= bytes[2].min(1), "{bytes:?}");
        client.ask(4, &words(&[16, 0, 0, 0])).unwrap();
    }
}

#[test]
fn other_majors_and_bad_json_are_refused_and_the_connection_is_closed() {
    let served = Served::new();
    for bytes in [version(1, 0, ""), version(0, 1, "{"), version(0, 1, r#"{"capabilities":{"max_msg_fds":-1}}"#)] {
        let client = Raw::stranger(&served.path);
        assert_eq!(client.ask(1, &bytes).unwrap_err(), EINVAL);
        assert_eq!((&client.0).read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn nothing_is_done_before_the_version_nor_a_version_twice() {
    let served = Served::new();
    let client = Raw::stranger(&served.path);
    assert_eq!(client.ask(4, &words(&[16, 0, 0, 0])).unwrap_err(), EINVAL);
    assert_eq!(client.map(0, 4096, 3, None), Err(EINVAL));
    client.ask(1, &version(0, 1, "")).unwrap();
    assert_eq!(served.bus.maps(), 0);
    assert_eq!(client.ask(1, &version(0, 1, "")).unwrap_err(), EINVAL);
    client.ask(4, &words(&[16, 0, 0, 0])).unwrap();
}

#[test]
fn a_client_that_says_nothing_at_first_does_not_keep_others_out() {
    let served = Served::with(|host| host.set_limit(Duration::from_millis(100)));
    let silent = Raw::stranger(&served.path);
    served.client();
    drop(silent);
}

#[test]
fn a_client_that_comes_back_finds_the_device_as_it_was() {
    let served = Served::new();
    let client = served.client();
    let first = event();
    client.irqs(EVENTFD | TRIGGER, 2, 0, 1, &[], &[first.as_fd()]).unwrap();
    client.write(0, 0, &longs(&[0x1234_5678])).unwrap();
    client.go(STOP).unwrap();
    drop(client);
    let client = served.client();
    served.bus.trigger(2, 0);
    assert_eq!(signals(&first), 0, "its descriptor is closed");
    assert_eq!(client.read(0, 0, 8).unwrap(), longs(&[0x1234_5678]));
    assert_eq!(client.state(), STOP);
    let second = event();
    client.irqs(EVENTFD | TRIGGER, 2, 0, 1, &[], &[second.as_fd()]).unwrap();
    assert_eq!(signals(&second), 1, "what came meanwhile is not lost");
}

#[test]
fn unknown_and_wrong_commands_are_refused_and_the_next_is_served() {
    let served = Served::new();
    let client = served.client();
    for command in [0, 11, 12, 14, 19, 99, u16::MAX] {
        for body in [0, 1, 1000, 1 << 20] {
            assert!(client.ask(command, &vec![7; body]).is_err(), "command {command}, {body} bytes");
        }
    }
    for command in [2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 16, 17, 18] {
        for body in [0, 1, 7] {
            assert_eq!(client.ask(command, &vec![7; body]).unwrap_err(), EINVAL, "command {command}, {body} bytes");
        }
    }
    assert_eq!(client.ask(13, &[0]).unwrap_err(), EINVAL);
    client.ask(4, &words(&[16, 0, 0, 0])).unwrap();
}

#[test]
fn a_body_that_is_too_long_is_read_and_thrown_away() {
    let served = Served::new();
    let client = served.client();
    let long = message(3, 10, 0, &vec![0x55; 3 << 20]);
    client.send(&long, &[]);
    let reply = client.receive().unwrap();
    assert_eq!((reply.id, reply.flags, reply.error), (3, 0x21, EINVAL));
    client.ask(4, &words(&[16, 0, 0, 0])).unwrap();
}

#[test]
fn messages_that_are_joined_in_pieces_or_pipelined_are_taken_one_by_one() {
    let served = Served::new();
    let client = served.client();
    let info = |id| message(id, 4, 0, &words(&[16, 0, 0, 0]));
    let all: Vec<u8> = (0..100).flat_map(info).collect();
    client.send(&all, &[]);
    for id in 0..100 {
        assert_eq!(client.receive().unwrap().id, id);
    }
    for byte in info(5) {
        client.send(&[byte], &[]);
    }
    assert_eq!(client.receive().unwrap().id, 5);
    // No reply is wanted; but it is done before the next is answered.
    let write = [longs(&[0]), words(&[0, 8]), longs(&[77])].concat();
    client.send(&message(6, 10, 0x10, &write), &[]);
    client.send(&message(7, 99, 0x10, &write), &[]);
    assert_eq!(client.read(0, 0, 8).unwrap(), longs(&[77]));
}

#[test]
fn a_message_shorter_than_its_header_is_answered_and_ends_the_session() {
    let served = Served::new();
    for size in [0_u32, 1, 15] {
        let client = served.client();
        let mut bytes = message(9, 4, 0, &[]);
        bytes[4..8].copy_from_slice(&size.to_ne_bytes());
        bytes.extend(vec![0xaa; 5000]);
        client.send(&bytes, &[]);
        let reply = client.receive().unwrap();
        assert_eq!((reply.id, reply.flags, reply.error), (9, 0x21, EINVAL));
        assert_eq!((&client.0).read(&mut [0]).unwrap(), 0);
    }
    served.client();
}

#[test]
fn a_message_that_is_cut_ends_the_session_in_time() {
    let served = Served::with(|host| host.set_limit(Duration::from_millis(100)));
    for cut in [1, 15, 16, 20] {
        let client = served.client();
        client.send(&message(1, 4, 0, &words(&[16, 0, 0, 0]))[..cut], &[]);
        assert_eq!((&client.0).read(&mut [0]).unwrap(), 0, "cut after {cut}");
        let gone = served.client();
        gone.send(&message(1, 4, 0, &words(&[16, 0, 0, 0]))[..cut], &[]);
    }
    served.client();
}

#[test]
fn replies_that_nobody_asked_for_do_no_harm() {
    let served = Served::new();
    let client = served.client();
    client.send(&message(1, 11, 1, &[0; 64]), &[]);
    client.send(&message(1, 4, 0x21, &[]), &[]);
    client.send(&message(2, 4, 2, &[]), &[]);
    assert_eq!(client.receive().unwrap().error, EINVAL, "a type that does not exist");
    client.ask(4, &words(&[16, 0, 0, 0])).unwrap();
}

#[test]
fn random_messages_by_the_hundred_do_no_harm_and_leave_no_descriptor() {
    let served = Served::with(|host| host.set_limit(Duration::from_millis(50)));
    let fds =
        || std::fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
    let leaked = || fds().filter(|name| name.to_string_lossy().contains("wherry-random")).count();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..30 {
        let client = served.client();
        let file = memfd_create("wherry-random", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 1 << 16).unwrap();
        for _ in 0..20 {
            let mut body: Vec<u8> = (0..random() % 64).map(|_| random() as u8 & random() as u8).collect();
            if random() % 2 == 0 && body.len() >= 8 {
                body[..4].copy_from_slice(&64_u32.to_ne_bytes());
                body[4..8].copy_from_slice(&(random() as u32 & 0x7_003f).to_ne_bytes());
            }
            let command = (random() % 20) as u16;
            let all = [file.as_fd(), file.as_fd()];
            client.send(&message(1, command, 0x10, &body), &all[..(random() % 3) as usize]);
        }
        // Half of them go in the middle of a message.
        if random() % 2 == 0 {
            client.send(&message(1, 4, 0, &[0; 16])[..9], &[file.as_fd()]);
        } else {
            let _ = client.ask(4, &words(&[16, 0, 0, 0]));
        }
    }
    let client = served.client();
    client.ask(13, &[]).unwrap();
    assert_eq!(client.state(), RUNNING);
    assert_eq!(leaked(), 0);
}

#[test]
fn sigterm_ends_a_device_process_and_its_socket_can_be_used_again() {
    let example = std::env::current_exe().unwrap().parent().unwrap().with_file_name("examples").join("copier");
    if !example.exists() {
        println!("SKIPPED: {} is not built", example.display());
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    for _ in 0..2 {
        let argument = format!("--socket-path={}", path.display());
        let mut child = std::process::Command::new(&example).arg(argument).spawn().unwrap();
        let deadline = std::time::Instant::now() + super::raw::LIMIT;
        while std::os::unix::net::UnixStream::connect(&path).is_err() {
            assert!(std::time::Instant::now() < deadline, "the device listens");
            std::thread::yield_now();
        }
        let (client, _) = Raw::connect(&path, "");
        client.ask(4, &words(&[16, 0, 0, 0])).unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        child.wait().unwrap();
        let _ = (&client.0).write(&[0]);
    }
}
