//! The protocol as a front end sees it.
#![allow(clippy::unwrap_used, reason = "a failure is a panic here")]

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::atomic::Ordering;
use std::time::Duration;

use support::{Running, event, fd, lend, memfd, pair, start_ring, table, until, words};
use vm_memory::{Bytes, GuestAddress};

const USER: u64 = 0x7f00_0000_0000;
const MIB: u64 = 1 << 20;

#[test]
fn what_is_offered_is_agreed_on_and_nothing_else() {
    let running = Running::new();
    let client = running.client();
    let features = client.agree();
    assert_eq!(features, 1 << 29 | 1 << 32 | 1 << 30 | 1 << 26);
    assert_eq!((client.number(17, &[]), client.number(36, &[])), (2, 509));
    assert!(!client.order(2, &words(&[features | 1 << 40]), &[]));
    assert!(!client.order(16, &words(&[1 << 40]), &[]));
    assert!(client.order(2, &words(&[features]), &[]));
    assert!(!client.order(200, &[], &[]), "a request that there is not");
    assert!(client.order(19, &words(&[u64::from_ne_bytes([1, 2, 3, 4, 5, 6, 0, 0])]), &[]));
    assert_eq!(running.device.events(), ["announce [1, 2, 3, 4, 5, 6]"]);
}

#[test]
fn the_configuration_is_read_and_written_inside_its_bounds() {
    let running = Running::new();
    let client = running.client();
    client.agree();
    let payload = |offset: u32, bytes: u32| {
        let mut payload: Vec<u8> = [offset, bytes, 0].iter().flat_map(|w| w.to_ne_bytes()).collect();
        payload.resize(12 + bytes as usize, 9);
        payload
    };
    assert_eq!(client.ask(24, &payload(8, 4), &[]).0[12..], [8, 9, 10, 11]);
    assert!(client.ask(24, &payload(60, 8), &[]).0.is_empty());
    assert!(client.order(25, &payload(3, 2), &[]));
    assert_eq!(*running.device.config.lock().unwrap(), [9, 9]);
    assert!(!client.order(25, &payload(0, 2), &[]), "the device refuses it");
    assert!(!client.order(25, &payload(0, 2)[..13], &[]));
}

#[test]
fn a_ring_is_served_from_its_first_bell_until_it_is_stopped_and_its_call_is_heard() {
    let running = Running::new();
    let client = running.client();
    let features = client.agree();
    let memory = memfd(MIB);
    assert!(client.order(5, &table(0x10_0000, MIB, USER), &fd(&memory)));
    assert!(client.order(8, &pair(0, 32), &[]) && client.order(10, &pair(0, 5), &[]));
    assert!(client.order(9, &words(&[0, USER, USER + 0x1000, USER + 0x2000, 0]), &[]));
    let (kick, call) = (event(), event());
    assert!(client.order(13, &words(&[0]), &[lend(&call)]));
    assert!(client.order(12, &words(&[0]), &[lend(&kick)]));
    assert!(client.order(18, &pair(0, 1), &[]));
    assert!(!running.device.serves(), "it was not rung");
    kick.write(1).unwrap();
    running.device.served(|given| {
        assert_eq!(given.features, features & !(1 << 30 | 1 << 26));
        let ring = &given.rings[0];
        assert_eq!((ring.index, ring.size, ring.next), (0, 32, 5));
        assert_eq!((ring.descriptors, ring.used, ring.available), (0x10_0000, 0x10_1000, 0x10_2000));
        assert_eq!(ring.kick.read().unwrap(), 1, "the bell is for the device");
        given.driver.ring(0);
        given.driver.ring(1);
    });
    assert_eq!(call.read().unwrap(), 1);
    // Another eventfd while it is served.
    let other = event();
    assert!(client.order(13, &words(&[0]), &[lend(&other)]));
    running.device.served(|given| given.driver.ring(0));
    assert!(other.read().is_ok() && call.read().is_err());
    assert!(!client.order(8, &pair(0, 64), &[]), "its size while it is started");
    // Another bell: at rest until that is rung.
    let silent = event();
    assert!(client.order(12, &words(&[0]), &[lend(&silent)]));
    kick.write(1).unwrap();
    assert!(!running.device.serves());
    silent.write(1).unwrap();
    running.device.served(|given| assert_eq!(given.rings[0].next, 8));
    assert_eq!(client.ask(11, &pair(0, 0), &[]).0, pair(0, 11));
    assert!(!running.device.serves());
    assert_eq!(running.device.events(), ["serve [(0, 5)]", "rest", "serve [(0, 8)]", "rest", "release"]);
}

#[test]
fn a_ring_is_stopped_when_what_is_under_way_has_ended() {
    let running = Running::new();
    let client = running.client();
    client.agree();
    let memory = memfd(MIB);
    assert!(client.order(5, &table(0, MIB, USER), &fd(&memory)));
    let _kick = start_ring(&client, 1, USER, 0);
    running.device.served(|_| ());
    *running.device.busy.lock().unwrap() = true;
    client.send(11, 1, &pair(1, 0), &[]);
    std::thread::scope(|scope| {
        let answer = scope.spawn(|| client.answer(11).unwrap().0);
        until("the device to be asked", || running.device.asked.load(Ordering::SeqCst));
        assert!(!answer.is_finished() && running.device.serves(), "it is told before that");
        *running.device.busy.lock().unwrap() = false;
        assert_eq!(answer.join().unwrap(), pair(1, 3));
    });
}

#[test]
fn memory_comes_and_goes_region_by_region_under_a_ring_that_is_served() {
    let running = Running::new();
    let client = running.client();
    client.agree();
    let (first, second) = (memfd(MIB), memfd(2 * MIB));
    let slot = |guest: u64, size: u64, user: u64, offset: u64| words(&[0, guest, size, user, offset]);
    assert!(client.order(37, &slot(0, MIB, USER, 0), &fd(&first)));
    let _kick = start_ring(&client, 0, USER, 0);
    running.device.served(|given| assert!(given.memory.read_obj::<u8>(GuestAddress(8 * MIB)).is_err()));
    assert!(client.order(37, &slot(8 * MIB, MIB, USER + 8 * MIB, MIB), &fd(&second)));
    running.device.served(|given| given.memory.write_obj(77u8, GuestAddress(8 * MIB + 5)).unwrap());
    let mut byte = [0];
    File::from(second.try_clone().unwrap()).read_exact_at(&mut byte, MIB + 5).unwrap();
    assert_eq!(byte, [77]);
    for (wrong, descriptor) in [
        (slot(MIB - 4096, MIB, USER + 64 * MIB, 0), &first),
        (slot(64 * MIB, MIB, USER + 4096, 0), &first),
        (slot(64 * MIB, 2 * MIB, USER + 64 * MIB, 0), &first),
        (slot(64 * MIB, MIB, USER + 64 * MIB, MIB + 4096), &second),
        (slot(64 * MIB, 0, USER + 64 * MIB, 0), &first),
        (slot(64 * MIB, 4096, USER + 64 * MIB, 7), &first),
        (slot(u64::MAX - 4095, 8192, USER + 64 * MIB, 0), &first),
    ] {
        assert!(!client.order(37, &wrong, &fd(descriptor)));
    }
    assert!(!client.order(37, &words(&[0]), &[]), "an acknowledgement where nothing was asked");
    assert!(client.order(38, &slot(8 * MIB, MIB, USER + 8 * MIB, 0), &[]));
    running.device.served(|given| assert!(given.memory.read_obj::<u8>(GuestAddress(8 * MIB)).is_err()));
    assert!(!client.order(38, &slot(8 * MIB, MIB, USER + 8 * MIB, 0), &[]), "twice");
    // The memory of the ring itself: it is not served any more, and the front end hears of it.
    assert!(!client.order(38, &slot(0, MIB, USER, 0), &[]));
    assert!(!running.device.serves());
}

#[test]
fn there_is_room_for_as_many_regions_as_is_said_and_only_for_such_as_can_be_mapped() {
    let running = Running::new();
    let client = running.client();
    client.agree();
    let (room, _) = client.ask(36, &[], &[]);
    let room = u64::from_ne_bytes(room.try_into().unwrap());
    let memory = memfd(MIB);
    let slot = |n: u64| words(&[0, n * MIB, 4096, USER + n * MIB, 0]);
    let (read_only, directory) = (File::open("/dev/null").unwrap(), File::open("/").unwrap());
    for (wrong, what) in [(OwnedFd::from(read_only), "a device"), (directory.into(), "a directory")] {
        assert!(!client.order(37, &slot(0), &fd(&wrong)), "{what}");
    }
    assert!(!client.order(37, &slot(0), &[lend(&event())]), "an eventfd");
    assert!(!client.order(37, &slot(0), &[]), "no descriptor");
    assert!(!client.order(37, &slot(0), &[memory.as_fd(), memory.as_fd()]), "two descriptors");
    for n in 0..room {
        assert!(client.order(37, &slot(n), &fd(&memory)), "region {n} of {room}");
    }
    assert!(!client.order(37, &slot(room), &fd(&memory)), "one too many");
    assert!(!client.order(38, &words(&[0, 0, 4096, USER + MIB, 0]), &[]), "one that is mixed of two");
    assert!(client.order(38, &slot(7), &[]));
    assert!(client.order(37, &slot(room), &fd(&memory)), "there is room again");
}

#[test]
fn a_configuration_that_changes_of_itself_is_told_by_the_channel_for_requests() {
    let running = Running::new();
    let client = running.client();
    client.agree();
    // Nobody hears of it, and it is no trouble.
    running.device.changed.0.write(1).unwrap();
    until("a change to be taken note of", || running.device.changed.0.read().is_err());
    let (ours, theirs) = UnixStream::pair().unwrap();
    assert!(!client.order(21, &[], &[lend(&event())]), "an eventfd is no socket");
    let datagrams = UnixDatagram::unbound().unwrap();
    assert!(!client.order(21, &[], &[datagrams.as_fd()]), "datagrams");
    assert!(!client.order(21, &[], &[theirs.as_fd(), theirs.as_fd()]), "two of them");
    assert!(client.order(21, &[], &[theirs.as_fd()]));
    drop(theirs);
    ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    for _ in 0..2 {
        running.device.changed.0.write(1).unwrap();
        let mut message = [0; 12];
        { &ours }.read_exact(&mut message).unwrap();
        let words: Vec<u8> = [2u32, 1, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(message[..], words[..]);
    }
    // Whoever does not hear it any more is served on.
    drop(ours);
    running.device.changed.0.write(1).unwrap();
    let (features, _) = client.ask(1, &[], &[]);
    assert_eq!(features.len(), 8);
}

#[test]
fn what_is_written_is_logged_from_the_switch_on_and_in_regions_that_come_later_too() {
    let running = Running::new();
    let client = running.client();
    let features = client.agree();
    let quiet = features & !(1 << 26);
    let (memory, later, log) = (memfd(MIB), memfd(MIB), memfd(4096));
    assert!(client.order(2, &words(&[quiet]), &[]));
    assert!(client.order(5, &table(0x10_0000, MIB, USER), &fd(&memory)));
    let _kick = start_ring(&client, 0, USER, 0);
    let write = |at: u64| running.device.served(|given| given.memory.write_slice(&[1; 2], GuestAddress(at)).unwrap());
    let log_file = File::from(log.try_clone().unwrap());
    let take = || {
        let mut bytes = [0; 4096];
        log_file.read_exact_at(&mut bytes, 0).unwrap();
        log_file.write_all_at(&[0; 4096], 0).unwrap();
        (0..4096 * 8u64).filter(|bit| bytes[*bit as usize / 8] & 1 << (bit % 8) != 0).collect::<Vec<_>>()
    };
    write(0x10_0000);
    assert_eq!(client.ask(6, &words(&[4096, 0]), &fd(&log)).0, words(&[0]));
    write(0x10_1000);
    assert!(take().is_empty(), "the log is off");
    assert!(client.order(2, &words(&[features]), &[]));
    write(0x10_2fff);
    assert_eq!(take(), [0x102, 0x103]);
    assert!(client.order(37, &words(&[0, 0x40_0000, MIB, USER + 16 * MIB, 0]), &fd(&later)));
    write(0x40_5000);
    assert_eq!(take(), [0x405]);
    let outside = words(&[0, 0x800_0000, MIB, USER + 64 * MIB, 0]);
    assert!(!client.order(37, &outside, &fd(&later)), "the log does not cover it");
    assert!(client.order(2, &words(&[quiet]), &[]));
    write(0x40_6000);
    assert!(take().is_empty(), "the log is off again");
    // Only new memory needs a pause: the log is switched beside a ring that is served.
    assert_eq!(running.device.events(), ["serve [(0, 0)]", "rest", "serve [(0, 3)]"]);
}

#[test]
fn requests_under_way_are_kept_by_the_front_end() {
    let running = Running::new();
    let client = running.client();
    client.agree();
    let memory = memfd(MIB);
    assert!(client.order(5, &table(0, MIB, USER), &fd(&memory)));
    let mut wanted = words(&[0, 0]);
    wanted.extend([2u16, 64].iter().flat_map(|n| n.to_ne_bytes()));
    let (described, mut kept) = client.ask(31, &wanted, &[]);
    assert_eq!((described.len(), kept.len()), (20, 1));
    let kept = kept.pop().unwrap();
    assert!(client.order(32, &described, &fd(&kept)));
    let _kick = start_ring(&client, 0, USER, 0);
    running.device.served(|given| {
        let noted = given.rings[0].in_flight.as_ref().unwrap();
        assert!(noted.left(0).is_empty());
        noted.taken(9);
    });
    drop(client);
    // The next front end, or the same one again, gives it to the next back end.
    let client = running.client();
    client.agree();
    assert!(client.order(5, &table(0, MIB, USER), &fd(&memory)));
    assert!(client.order(32, &described, &fd(&kept)));
    let _kick = start_ring(&client, 0, USER, 0);
    running.device.served(|given| assert_eq!(given.rings[0].in_flight.as_ref().unwrap().left(0), [9]));
    let mut wrong = words(&[1 << 40, 0]);
    wrong.extend([2u16, 64].iter().flat_map(|n| n.to_ne_bytes()));
    assert!(!client.order(32, &wrong, &fd(&kept)));
    wanted[16] = 3;
    assert!(!client.order(31, &wanted, &[]), "more rings than it has");
}

#[test]
fn the_state_of_a_device_goes_through_a_pipe_and_a_wrong_one_is_refused() {
    let running = Running::new();
    let client = running.client();
    client.agree();
    let (mut reader, writer) = std::io::pipe().unwrap();
    assert_eq!(client.ask(42, &pair(0, 0), &[writer.as_fd()]).0, words(&[1 << 8]));
    drop(writer);
    let mut state = Vec::new();
    reader.read_to_end(&mut state).unwrap();
    assert_eq!(state, [7; 5000]);
    assert_eq!(client.number(43, &[]), 0);
    for (bytes, result) in [(&state[..], 0), (&[8; 20], 1), (&[], 1)] {
        let (reader, mut writer) = std::io::pipe().unwrap();
        assert_eq!(client.ask(42, &pair(1, 0), &[reader.as_fd()]).0, words(&[1 << 8]));
        writer.write_all(bytes).unwrap();
        drop(writer);
        assert_eq!(client.number(43, &[]), result);
        assert_eq!(*running.device.state.lock().unwrap(), bytes);
    }
    assert!(!client.order(42, &pair(2, 0), &[reader.as_fd()]) && !client.order(42, &pair(0, 1), &[reader.as_fd()]));
}

#[test]
fn a_front_end_that_goes_leaves_the_device_at_rest_for_the_next() {
    let mut running = Running::new();
    for _ in 0..3 {
        let client = running.client();
        client.agree();
        let memory = memfd(MIB);
        assert!(client.order(5, &table(0, MIB, USER), &fd(&memory)));
        let _kick = start_ring(&client, 0, USER, 7);
        running.device.served(|_| ());
        drop(client);
        until("the device to be let go", || running.device.events.lock().unwrap().last().unwrap() == "release");
        assert_eq!(running.device.events(), ["serve [(0, 7)]", "rest", "release"]);
    }
    let waits = running.client();
    waits.agree();
    assert!(running.path.exists());
    running.end().unwrap();
    assert!(waits.is_closed(), "the process ends under a front end");
}
