//! `wherry device net` under a front end written out here: packets through rings in shared memory, both ways, across a front
//! end that goes and one that comes.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;
#[path = "../../wherry-backend/tests/support/mod.rs"]
mod vhost;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::time::Duration;

use support::update::repetitions;
use support::vhost::BackEnd;
use support::{Place, wait_for};
use vhost::{Client, event, fd, lend, memfd, pair, table, words};
use vmm_sys_util::eventfd::EventFd;
use wherry_netlab::{ETHERTYPE, Network, TapPeer};

const USER: u64 = 0x7f00_0000_0000;
const MIB: u64 = 1 << 20;
const HEADER: usize = 12;
const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One ring of 8 entries in 64 KiB of memory of its own.
struct Ring {
    memory: File,
    at: u64,
    made: u16,
    seen: u16,
    kick: EventFd,
    call: EventFd,
}

impl Ring {
    fn start(client: &Client, memory: &OwnedFd, index: u32, next: u16) -> Self {
        let at = u64::from(index) << 16;
        let (kick, call) = (event(), event());
        assert!(client.order(8, &pair(index, 8), &[]));
        assert!(client.order(10, &pair(index, next.into()), &[]));
        let addresses = [index.into(), USER + at, USER + at + 0x2000, USER + at + 0x1000, 0];
        assert!(client.order(9, &words(&addresses), &[]));
        assert!(client.order(13, &words(&[index.into()]), &[lend(&call)]));
        assert!(client.order(12, &words(&[index.into()]), &[lend(&kick)]));
        assert!(client.order(18, &pair(index, 1), &[]));
        kick.write(1).unwrap();
        Self { memory: memory.try_clone().unwrap().into(), at, made: next, seen: next, kick, call }
    }

    fn put(&self, offset: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, self.at + offset).unwrap();
    }

    fn short(&self, offset: u64) -> u16 {
        let mut bytes = [0; 2];
        self.memory.read_exact_at(&mut bytes, self.at + offset).unwrap();
        u16::from_le_bytes(bytes)
    }

    fn buffer(entry: u16) -> u64 {
        0x4000 + 0x1000 * u64::from(entry)
    }

    /// Makes one buffer available, and rings.
    fn give(&mut self, len: u32, writable: bool) -> u16 {
        let entry = self.made % 8;
        let mut descriptor = (self.at + Self::buffer(entry)).to_le_bytes().to_vec();
        descriptor.extend(len.to_le_bytes());
        descriptor.extend((u16::from(writable) << 1).to_le_bytes());
        descriptor.extend([0; 2]);
        self.put(16 * u64::from(entry), &descriptor);
        self.put(0x1004 + 2 * u64::from(entry), &entry.to_le_bytes());
        self.made = self.made.wrapping_add(1);
        self.put(0x1002, &self.made.to_le_bytes());
        self.kick.write(1).unwrap();
        entry
    }

    /// Waits for the next buffer that comes back: its bytes.
    fn take(&mut self) -> Vec<u8> {
        wait_for("a buffer to come back", || (self.short(0x2002) != self.seen).then_some(()));
        wait_for("an interrupt", || self.call.read().ok());
        let at = 0x2004 + 8 * u64::from(self.seen % 8);
        self.seen = self.seen.wrapping_add(1);
        let (entry, len) = (self.short(at), self.short(at + 4));
        let mut bytes = vec![0; len.into()];
        self.memory.read_exact_at(&mut bytes, self.at + Self::buffer(entry)).unwrap();
        bytes
    }
}

/// A frame of the experiments' type.
fn frame(number: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0x5e, 0x10, 0, 1]);
    frame.extend(ETHERTYPE.to_be_bytes());
    frame.resize(100, number);
    frame
}

#[test]
fn packets_go_both_ways_and_a_second_front_end_goes_on_where_the_first_has_stopped() {
    let test = "packets_go_both_ways_and_a_second_front_end_goes_on_where_the_first_has_stopped";
    if let Some(what) = wherry_netlab::missing() {
        println!("SKIPPED {test}: {what}");
        return;
    }
    let network = Network::new().unwrap();
    let peer = TapPeer::make(network.left(), "tap0", ETHERTYPE).unwrap();
    let place = Place::new();
    let socket = place.path("net");
    let mut command = place.command(&["device", "net", "--tap", "tap0", "--mac", "02:00:5e:10:00:01", "--socket"]);
    network.left().hold(&mut command).unwrap();
    command.arg(&socket).stdout(Stdio::null()).stderr(Stdio::inherit());
    let mut process = Process(command.spawn().unwrap());
    wait_for("the back end", || socket.exists().then_some(()));
    wait_for("the tap to pass frames", || peer.is_ready(network.left()).unwrap().then_some(()));
    let memory = memfd(MIB);
    let (mut received, mut sent) = (0, 0);
    for _ in 0..2 {
        let stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let client = Client { stream };
        let features = client.agree();
        assert_eq!(features & (1 << 17 | 1 << 21), 0, "it offers commands, which it has no ring for");
        // No event index: every buffer that comes back is told.
        assert!(client.order(2, &words(&[features & !(1 << 29)]), &[]));
        let mut address = [0u32, 6, 0].map(u32::to_ne_bytes).concat();
        address.extend([0; 6]);
        assert_eq!(client.ask(24, &address, &[]).0[12..], [2, 0, 0x5e, 0x10, 0, 1]);
        assert!(client.order(5, &table(0, MIB, USER), &fd(&memory)));
        let mut receives = Ring::start(&client, &memory, RECEIVE, received);
        let mut transmits = Ring::start(&client, &memory, TRANSMIT, sent);
        for number in 0..20 {
            let entry = transmits.made % 8;
            let packet = [vec![0; HEADER], frame(number)].concat();
            transmits.put(Ring::buffer(entry), &packet);
            transmits.give(packet.len() as u32, false);
            transmits.take();
            let mut bytes = [0; 2000];
            let got = peer.receive(&mut bytes, Duration::from_secs(20)).unwrap().unwrap();
            assert_eq!(bytes[..got], frame(number));
            receives.give(2048, true);
            peer.send(&frame(100 + number)).unwrap();
            assert_eq!(receives.take()[HEADER..], frame(100 + number));
        }
        // A buffer that was given and not used is there for the next front end.
        receives.give(2048, true);
        assert!(client.order(19, &words(&[u64::from_ne_bytes([2, 0, 0x5e, 0x10, 0, 1, 0, 0])]), &[]));
        received = next(&client, RECEIVE);
        sent = next(&client, TRANSMIT);
        assert_eq!((received, sent), (receives.seen, transmits.seen));
        // The ring is set up anew, without that buffer.
        receives.put(0x1002, &received.to_le_bytes());
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&process.0), rustix::process::Signal::TERM).unwrap();
    assert_eq!(process.0.wait().unwrap().code(), Some(0));
    assert!(!socket.exists(), "its socket is left");
}

/// Stops a ring: where to go on.
fn next(client: &Client, ring: u32) -> u16 {
    let answer = client.ask(11, &pair(ring, 0), &[]).0;
    u16::from_ne_bytes([answer[4], answer[5]])
}

/// Whether the network device has taken all that the tap had for it.
fn has_read(pid: u32) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
    let pidfd = pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty()).unwrap();
    let is_tap = |path: &std::path::PathBuf| std::fs::read_link(path).is_ok_and(|to| to.ends_with("net/tun"));
    let mut fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap().path());
    let tap = fds.find(is_tap).expect("it has its tap open");
    let number = tap.file_name().unwrap().to_str().unwrap().parse().unwrap();
    let tap = pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty()).unwrap();
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(&tap, PollFlags::IN)], Some(&now)).unwrap() == 0
}

#[test]
fn the_process_is_replaced_again_and_again_and_every_packet_goes_through_once() {
    let test = "the_process_is_replaced_again_and_again_and_every_packet_goes_through_once";
    if let Some(what) = wherry_netlab::missing() {
        println!("SKIPPED {test}: {what}");
        return;
    }
    let network = Network::new().unwrap();
    let peer = TapPeer::make(network.left(), "tap0", ETHERTYPE).unwrap();
    let place = Place::new();
    let mut device = BackEnd::network(&place, "net", network.left(), "tap0", "02:00:5e:10:00:01");
    wait_for("the tap to pass frames", || peer.is_ready(network.left()).unwrap().then_some(()));
    let memory = memfd(MIB);
    let stream = UnixStream::connect(&device.socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let client = Client { stream };
    let features = client.agree();
    assert!(client.order(2, &words(&[features & !(1 << 29)]), &[]));
    assert!(client.order(5, &table(0, MIB, USER), &fd(&memory)));
    let mut receives = Ring::start(&client, &memory, RECEIVE, 0);
    let mut transmits = Ring::start(&client, &memory, TRANSMIT, 0);
    let mut number = 0u8;
    let mut both_ways = |receives: &mut Ring, transmits: &mut Ring| {
        number = number.wrapping_add(1);
        let entry = transmits.made % 8;
        let packet = [vec![0; HEADER], frame(number)].concat();
        transmits.put(Ring::buffer(entry), &packet);
        transmits.give(packet.len() as u32, false);
        receives.give(2048, true);
        peer.send(&frame(!number)).unwrap();
        transmits.take();
        let mut bytes = [0; 2000];
        let got = peer.receive(&mut bytes, Duration::from_secs(20)).unwrap().unwrap();
        assert_eq!(bytes[..got], frame(number), "lost, doubled, or out of turn");
        assert_eq!(receives.take()[HEADER..], frame(!number), "lost, doubled, or out of turn");
    };
    for n in 0..repetitions(5) {
        let asked = device.asking(&[]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let pid = device.now.pid;
        // Until it is replaced, and for a while.
        while !device.now.has_ended() {
            both_ways(&mut receives, &mut transmits);
        }
        (0..20).for_each(|_| both_ways(&mut receives, &mut transmits));
        let job = support::update::updated(&asked.wait_with_output().unwrap(), &format!("update {n} of {pid}"));
        println!("{}", job["job"]["blackout"]);
        device.is_now(&job, "which was replaced");
    }
    // One that waits in the device for a buffer is not lost, nor those behind it.
    for packet in 200..203 {
        peer.send(&frame(packet)).unwrap();
        if packet == 200 {
            wait_for("the device to take the packet", || has_read(device.now.pid).then_some(()));
        }
    }
    device.update("with a packet that waits");
    for packet in 200..203 {
        receives.give(2048, true);
        assert_eq!(receives.take()[HEADER..], frame(packet));
    }
    both_ways(&mut receives, &mut transmits);
    assert_eq!((next(&client, RECEIVE), next(&client, TRANSMIT)), (receives.seen, transmits.seen));
    drop(client);
    device.finish();
}
