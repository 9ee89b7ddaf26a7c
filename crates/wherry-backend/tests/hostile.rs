//! A hostile front end. The only test of its program: it counts the descriptors of the process.
#![allow(clippy::unwrap_used, reason = "a failure is a panic here")]

mod support;

use std::os::fd::AsFd;

use support::{Running, descriptors, event, fd, lend, memfd, table, until, words};

const USER: u64 = 0x7f00_0000_0000;
const MIB: u64 = 1 << 20;

#[test]
fn a_hostile_front_end_loses_its_connection_and_nobody_else_anything() {
    let running = Running::new();
    running.client().agree();
    let (memory, event) = (memfd(MIB), event());
    let before = descriptors();
    let header = |request: u32, flags: u32, bytes: u32| -> Vec<u8> {
        [request, flags, bytes].iter().flat_map(|word| word.to_ne_bytes()).collect()
    };
    let mut messages = vec![
        (header(1, 0, 0), "a version that there is not"),
        (header(1, 5, 0), "an answer instead of a request"),
        (header(1, 1, u32::MAX), "a payload without end"),
        (header(1, 1, 4097), "a payload that is too long"),
        (header(250, 1, 0), "a request that there is not"),
        (header(29, 1, 0), "postcopy that was not announced"),
    ];
    // Every request with a payload of the wrong length.
    for request in (1..=43).filter(|request| ![1, 3, 4, 7, 15, 17, 28, 30, 34, 36, 43].contains(request)) {
        let mut message = header(request, 1, 3);
        message.extend([0; 3]);
        messages.push((message, "a payload of three bytes"));
    }
    for (message, what) in &messages {
        let client = running.client();
        client.raw(message, &[]);
        assert!(client.is_closed(), "{what}: {:?} was taken", &message[..4]);
    }
    for payload in [words(&[0]), words(&[1 << 40]), words(&[77])] {
        for fds in [&[][..], &[lend(&event), lend(&event)]] {
            let client = running.client();
            client.send(12, 1, &payload, fds);
            assert!(client.is_closed(), "a bell for no ring, or not one bell");
        }
    }
    let client = running.client();
    client.send(5, 1, &table(0, MIB, USER), &[memory.as_fd(); 9]);
    assert!(client.is_closed(), "more descriptors than a message has");
    let client = running.client();
    client.send(5, 1, &table(0, 64 * MIB, USER), &fd(&memory));
    assert!(client.is_closed(), "memory behind the end of its file");
    // Cut in the middle of a message, at every byte.
    let whole = [header(2, 1, 8), words(&[0])].concat();
    for cut in 1..whole.len() {
        running.client().raw(&whole[..cut], &[]);
    }
    let client = running.client();
    client.agree();
    // Two front ends have not closed what the back end has, and both ends of the last connection are open.
    until("all descriptors to be closed", || descriptors() <= before + 4);
}
