use std::time::Duration;

use virtio_bindings::bindings::virtio_net::VIRTIO_NET_F_CTRL_VQ;
use vm_memory::{Bytes, GuestAddress};
use wherry_netlab::{ETHERTYPE, Network, TapPeer};
use wherry_state::{Saved, StateUnit};

use super::*;
use crate::support::*;

const VERSION_1: u64 = 1 << 32;
const MERGES: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const COMMANDS: u64 = 1 << VIRTIO_NET_F_CTRL_VQ;
const ANNOUNCES: u64 = 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;
const OFFLOADS: u64 = 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
const MAC: [u8; 6] = [2, 0xaa, 1, 2, 3, 4];
const COMMAND: u16 = 2;
const DATA: u64 = 0x4_0000;
/// Bytes between buffers.
const STEP: u64 = 0x1000;

/// A network with the tap devices `tap0` and `tap1`, or why there is none.
struct Lab {
    network: Network,
    peers: [TapPeer; 2],
}

impl Lab {
    fn new() -> Option<Self> {
        Self::listening(ETHERTYPE)
    }

    fn listening(ethertype: u16) -> Option<Self> {
        if let Some(missing) = wherry_netlab::missing() {
            println!("SKIPPED: {missing}");
            return None;
        }
        let network = Network::new().unwrap();
        let peers = ["tap0", "tap1"].map(|name| TapPeer::make(network.left(), name, ethertype).unwrap());
        Some(Self { network, peers })
    }

    fn open(&self, name: &str) -> Result<Tap, TapError> {
        self.network.left().within(|| Tap::open(name)).unwrap()
    }

    /// Opens one that nobody has. A process that another test starts has all that is open here until its `exec`, so also a
    /// tap that was closed already.
    fn open_free(&self, name: &str) -> Tap {
        let mut tap = self.open(name);
        until("the tap to be free", || {
            if matches!(tap, Err(TapError::Busy(_))) {
                tap = self.open(name);
            }
            !matches!(tap, Err(TapError::Busy(_)))
        });
        tap.unwrap()
    }

    fn device(&self, n: usize) -> Arc<Net> {
        let tap = Arc::new(self.open_free(&format!("tap{n}")));
        until("the tap to pass frames", || self.peers[n].is_ready(self.network.left()).unwrap());
        Arc::new(Net::new(tap, MAC, 0).unwrap())
    }

    fn driver(&self, features: u64) -> Driver {
        let mut driver = Driver::new(self.device(0), ram());
        driver.switch_on(true);
        driver.set_up_rings(features, 3);
        driver
    }

    /// What the other end of a tap receives next.
    fn receive(&self, n: usize) -> Vec<u8> {
        let mut bytes = vec![0; 70_000];
        let len = self.peers[n].receive(&mut bytes, LIMIT).unwrap().expect("a frame from the guest");
        bytes.truncate(len);
        bytes
    }
}

/// A frame for the guest, or from it, whose bytes are of a kind.
fn frame(kind: u8, len: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|n| (n as u8).wrapping_mul(7) ^ kind).collect();
    frame[..6].copy_from_slice(&MAC);
    frame[6..12].copy_from_slice(&[2, 0xbb, 0, 0, 0, kind]);
    frame[12..14].copy_from_slice(&ETHERTYPE.to_be_bytes());
    frame
}

fn buffer(n: u16) -> u64 {
    DATA + STEP * u64::from(n)
}

/// Gives the device a buffer to receive into.
fn give(driver: &mut Driver, n: u16, len: u32) {
    driver.descriptor_of(RECEIVE, n, buffer(n), len, WRITE, 0);
    driver.offer_on(RECEIVE, n);
}

fn read(driver: &Driver, n: u16, len: u32) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    driver.memory().read_slice(&mut bytes, GuestAddress(buffer(n))).unwrap();
    bytes
}

/// Has the guest send what lies behind a header.
fn send(driver: &mut Driver, n: u16, header: &[u8], frame: &[u8]) {
    driver.memory().write_slice(header, GuestAddress(buffer(n))).unwrap();
    driver.memory().write_slice(frame, GuestAddress(buffer(n) + 64)).unwrap();
    driver.descriptor_of(TRANSMIT, n, buffer(n), header.len() as u32, NEXT, n + 1);
    driver.descriptor_of(TRANSMIT, n + 1, buffer(n) + 64, frame.len() as u32, 0, 0);
    driver.offer_on(TRANSMIT, n);
}

/// Gives a command; the answer.
fn command(driver: &mut Driver, bytes: &[u8]) -> u8 {
    driver.memory().write_slice(bytes, GuestAddress(buffer(0))).unwrap();
    driver.memory().write_obj(0xffu8, GuestAddress(buffer(1))).unwrap();
    driver.descriptor_of(COMMAND, 0, buffer(0), bytes.len() as u32, NEXT, 1);
    driver.descriptor_of(COMMAND, 1, buffer(1), 1, WRITE, 0);
    driver.offer_on(COMMAND, 0);
    assert_eq!(driver.used_on(COMMAND), (0, 1));
    driver.memory().read_obj(GuestAddress(buffer(1))).unwrap()
}

fn rest(driver: &Driver) -> wherry_state::Section {
    driver.function.begin_stop().unwrap();
    driver.function.finish_stop(soon()).unwrap();
    let Saved::Section(section) = driver.function.save().unwrap() else { panic!("it has state") };
    section
}

#[test]
fn frames_go_both_ways_in_order_and_unchanged() {
    let Some(lab) = Lab::new() else { return };
    let mut driver = lab.driver(VERSION_1);
    for n in 0..8u8 {
        send(&mut driver, u16::from(n) * 2, &[0; 12], &frame(n, 100 + usize::from(n)));
    }
    for n in 0..8u8 {
        assert_eq!(lab.receive(0), frame(n, 100 + usize::from(n)));
        assert_eq!(driver.used_on(TRANSMIT), (u32::from(n) * 2, 0));
    }
    for n in 0..8 {
        give(&mut driver, n, 2048);
    }
    for n in 0..8u8 {
        lab.peers[0].send(&frame(n, 1000 + usize::from(n))).unwrap();
    }
    for n in 0..8u8 {
        let len = 1012 + u32::from(n);
        assert_eq!(driver.used_on(RECEIVE), (n.into(), len));
        let bytes = read(&driver, n.into(), len);
        assert_eq!(bytes[10..12], [1, 0], "the number of buffers");
        assert_eq!(bytes[12..], frame(n, 1000 + usize::from(n)));
    }
    assert_eq!(driver.status(), 15);
}

#[test]
fn a_packet_is_spread_over_buffers_and_waits_until_there_are_enough() {
    let Some(lab) = Lab::new() else { return };
    let mut driver = lab.driver(VERSION_1 | MERGES);
    lab.peers[0].send(&frame(1, 1400)).unwrap();
    lab.peers[0].send(&frame(2, 100)).unwrap();
    for n in 0..3 {
        give(&mut driver, n, 400);
    }
    assert_eq!(driver.used_index_on(RECEIVE), 0, "three buffers do not suffice");
    give(&mut driver, 3, 400);
    let mut bytes = Vec::new();
    for (n, len) in [(0, 400), (1, 400), (2, 400), (3, 212)] {
        assert_eq!(driver.used_on(RECEIVE), (n, len));
        bytes.extend(read(&driver, n as u16, len));
    }
    assert_eq!(bytes[10..12], [4, 0]);
    assert_eq!(bytes[12..], frame(1, 1400));
    give(&mut driver, 4, 400);
    assert_eq!(driver.used_on(RECEIVE), (4, 112));
    assert_eq!(read(&driver, 4, 112)[12..], frame(2, 100));
}

#[test]
fn a_packet_that_fits_into_no_buffer_is_lost_and_the_next_one_is_not() {
    let Some(lab) = Lab::new() else { return };
    let mut driver = lab.driver(VERSION_1);
    give(&mut driver, 0, 400);
    lab.peers[0].send(&frame(1, 1400)).unwrap();
    lab.peers[0].send(&frame(2, 100)).unwrap();
    assert_eq!(driver.used_on(RECEIVE), (0, 112));
    assert_eq!(read(&driver, 0, 112)[12..], frame(2, 100));
    // Buffers that may be merged, but are too few by the size of the ring.
    let mut driver = {
        drop(driver);
        lab.driver(VERSION_1 | MERGES)
    };
    lab.peers[0].send(&frame(3, 1400)).unwrap();
    lab.peers[0].send(&frame(4, 50)).unwrap();
    for n in 0..SIZE {
        give(&mut driver, n, 16);
    }
    for n in 0..4 {
        assert_eq!(driver.used_on(RECEIVE), (n, if n < 3 { 16 } else { 14 }));
    }
}

#[test]
fn a_moved_device_holds_what_waits_goes_on_where_it_stood_and_announces_itself() {
    let Some(lab) = Lab::listening(0x8035) else { return };
    let mut source = lab.driver(VERSION_1 | MERGES | COMMANDS | ANNOUNCES);
    lab.peers[0].send(&frame(1, 1400)).unwrap();
    for n in 0..2 {
        give(&mut source, n, 800);
    }
    assert_eq!(source.used_on(RECEIVE), (0, 800));
    assert_eq!(source.used_on(RECEIVE), (1, 612));
    give(&mut source, 2, 800);
    lab.peers[0].send(&frame(2, 1400)).unwrap();
    until("the buffer to be taken", || {
        let section = rest(&source);
        let taken = SavedNet::from_section(&section).unwrap().buffers == [2];
        source.function.start().unwrap();
        taken
    });
    let section = rest(&source);
    let saved = SavedNet::from_section(&section).unwrap();
    assert_eq!((saved.packet.len(), saved.buffers), (1412, vec![2]));

    let mut destination = Driver::new(lab.device(1), source.ram.clone());
    destination.function.restore(&section).unwrap();
    destination.follow(&source);
    assert_eq!(destination.read::<2>(0x2006), [1, 0], "the link is up, and nothing announced yet");
    destination.function.start().unwrap();
    assert_eq!(lab.receive(1), announce::frame(MAC), "the VMM's announcement");
    assert_eq!(destination.read::<2>(0x2006), [3, 0], "the driver is asked for its own");
    until("the interrupt of the configuration", || destination.interrupts(1).is_some());
    give(&mut destination, 3, 800);
    assert_eq!(destination.used_on(RECEIVE), (2, 800));
    assert_eq!(destination.used_on(RECEIVE), (3, 612));
    let bytes = [read(&destination, 2, 800), read(&destination, 3, 612)].concat();
    assert_eq!(bytes[12..], frame(2, 1400));
    assert_eq!(command(&mut destination, &[3, 0]), 0);
    assert_eq!(destination.read::<2>(0x2006), [1, 0]);
    let none = lab.peers[0].receive(&mut [0; 100], Duration::ZERO).unwrap();
    assert_eq!(none, None, "the source announced itself");
}

#[test]
fn commands_are_answered_and_offloads_are_only_those_agreed_on() {
    let Some(lab) = Lab::new() else { return };
    let checksums = 1u64 << VIRTIO_NET_F_GUEST_CSUM;
    let segments = 1u64 << VIRTIO_NET_F_GUEST_TSO4;
    let mut driver = lab.driver(VERSION_1 | COMMANDS | OFFLOADS | checksums);
    let set = |offloads: u64| [&[5, 0][..], &offloads.to_le_bytes()].concat();
    assert_eq!(command(&mut driver, &set(0)), 0);
    assert_eq!(command(&mut driver, &set(checksums)), 0);
    assert_eq!(command(&mut driver, &set(checksums | segments)), 1);
    assert_eq!(command(&mut driver, &set(0)[..6]), 1, "a part of the offloads");
    assert_eq!(command(&mut driver, &[4, 0, 1, 0]), 1, "more pairs of rings");
    assert_eq!(command(&mut driver, &[99, 99]), 1);
    let section = rest(&driver);
    assert_eq!(SavedNet::from_section(&section).unwrap().offloads, checksums);
}

#[test]
fn what_no_packet_is_breaks_the_device_and_what_the_host_refuses_is_lost_alone() {
    let Some(lab) = Lab::new() else { return };
    let mut driver = lab.driver(VERSION_1);
    // A header that claims a checksum outside of the packet, one of an unknown kind, and a frame shorter than addresses.
    send(&mut driver, 0, &[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0], &frame(1, 100));
    send(&mut driver, 2, &[0, 0x7f, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], &frame(2, 100));
    send(&mut driver, 4, &[0; 12], &[1; 5]);
    send(&mut driver, 6, &[0; 12], &frame(3, 100));
    for n in 0..4 {
        assert_eq!(driver.used_on(TRANSMIT), (2 * n, 0));
    }
    assert_eq!(lab.receive(0), frame(3, 100));
    assert_eq!(driver.status(), 15);

    let breaks = |driver: &mut Driver, what: &str, act: &dyn Fn(&mut Driver)| {
        driver.set_up_rings(VERSION_1 | COMMANDS, 3);
        act(driver);
        until(what, || driver.status() & 0x40 != 0);
        // Nothing that comes from outside wakes it: it stops and comes back.
        lab.peers[0].send(&frame(5, 100)).unwrap();
        driver.function.begin_stop().unwrap();
        driver.function.finish_stop(soon()).unwrap();
        driver.function.start().unwrap();
    };
    breaks(&mut driver, "a short header to break it", &|driver| {
        driver.descriptor_of(TRANSMIT, 0, buffer(0), 11, 0, 0);
        driver.offer_on(TRANSMIT, 0);
    });
    breaks(&mut driver, "a buffer outside of memory to break it", &|driver| {
        driver.descriptor_of(TRANSMIT, 0, 1 << 40, 100, 0, 0);
        driver.offer_on(TRANSMIT, 0);
    });
    breaks(&mut driver, "an endless chain to break it", &|driver| {
        driver.descriptor_of(TRANSMIT, 0, buffer(0), 100, NEXT, 0);
        driver.offer_on(TRANSMIT, 0);
    });
    breaks(&mut driver, "a buffer without room to break it", &|driver| {
        lab.peers[0].send(&frame(4, 100)).unwrap();
        give(driver, 0, 11);
    });
    breaks(&mut driver, "a command without room for an answer to break it", &|driver| {
        driver.descriptor_of(COMMAND, 0, buffer(0), 2, 0, 0);
        driver.offer_on(COMMAND, 0);
    });
    breaks(&mut driver, "a command of one byte to break it", &|driver| {
        driver.descriptor_of(COMMAND, 0, buffer(0), 1, NEXT, 1);
        driver.descriptor_of(COMMAND, 1, buffer(1), 1, WRITE, 0);
        driver.offer_on(COMMAND, 0);
    });
    driver.set_up_rings(VERSION_1, 3);
    send(&mut driver, 0, &[0; 12], &frame(6, 100));
    assert_eq!(lab.receive(0), frame(6, 100), "after a reset it serves again");
}

#[test]
fn impossible_state_is_refused_by_name() {
    let Some(lab) = Lab::new() else { return };
    let driver = lab.driver(VERSION_1);
    let section = rest(&driver);
    let refuse = |change: fn(&mut SavedNet)| {
        let mut saved = SavedNet::from_section(&section).unwrap();
        change(&mut saved);
        let fresh = Driver::new(lab.device(1), ram());
        fresh.function.restore(&saved.to_section(&driver.function.id())).unwrap_err().to_string()
    };
    assert!(refuse(|s| s.transport = None).contains("transport"));
    assert!(refuse(|s| s.mac[5] ^= 1).contains("address"));
    assert!(refuse(|s| s.mac = vec![0; 1000]).contains("address"));
    assert!(refuse(|s| s.offloads = 1 << 40).contains("offloads"));
    assert!(refuse(|s| s.packet = vec![0; 12]).contains("12 bytes"));
    assert!(refuse(|s| s.packet = vec![0; LONGEST + 1]).contains("waiting packet"));
    assert!(refuse(|s| s.buffers = vec![1]).contains("waiting packet"));
    assert!(refuse(|s| (s.packet, s.buffers) = (vec![0; 100], vec![256])).contains("buffers"));
    assert!(refuse(|s| (s.packet, s.buffers) = (vec![0; 100], vec![0; 257])).contains("buffers"));
}

#[test]
fn taps_that_are_not_there_or_belong_to_another_are_refused_by_name() {
    let Some(lab) = Lab::new() else { return };
    let refused = |name: &str| lab.open(name).unwrap_err().to_string();
    assert!(refused("tap7").contains("tap7: there is no network device"));
    assert!(refused("lo").contains("is it a tap device"), "{}", refused("lo"));
    for name in ["", "tap%d", "a/b", "much-too-long-a-name"] {
        assert!(refused(name).contains("1 to 15 bytes"), "{name}");
    }
    let held = lab.open("tap0").unwrap();
    assert!(refused("tap0").contains("another process"));
    drop(held);
    lab.open_free("tap0");
}
