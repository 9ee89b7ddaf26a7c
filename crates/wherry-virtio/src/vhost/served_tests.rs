//! A whole device, its driver's side and its back end's side played here.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use wherry_handover::{Registry, Shelf};
use wherry_interrupt::fake::FakeRouter;
use wherry_interrupt::{Events, Intx, Vector, Vectors};
use wherry_memory::DirtySource;
use wherry_state::SavedState;

use super::front::LOG_ALL;
use super::saved::{SavedBackend, SavedServed};
use super::tests::{honest, message, ram, reply, with_descriptor, with_descriptors};
use super::{BLK, Backend, NET, VhostSpec, VhostUser};
use crate::device::{Activation, Device, Driver, Interrupts, Position, RingGiven, RingSetup};
use crate::saved::{SavedTransport, SavedVhostUser};

/// The protocol's features, the dirty log, virtio 1.
const OFFERED: u64 = 1 << 30 | LOG_ALL | 1 << 32;
const LIMIT: Duration = Duration::from_secs(20);

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "waited {LIMIT:?} for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What the driver of a device is told, and its vector.
#[derive(Default)]
struct Told {
    rung: AtomicU32,
    vector: Mutex<Option<Arc<Vector>>>,
    /// How often its configuration changed.
    changed: AtomicU32,
}

impl Driver for Told {
    fn ring(&self, _index: u16) {
        self.rung.fetch_add(1, Ordering::SeqCst);
    }

    fn configuration(&self) {
        self.changed.fetch_add(1, Ordering::SeqCst);
    }

    fn needs_reset(&self, what: &str, why: &dyn std::fmt::Display) {
        panic!("{what}: {why}");
    }

    fn ring_vector(&self, _index: u16) -> Option<Arc<Vector>> {
        self.vector.lock().unwrap().clone()
    }

    fn pin(&self) -> Option<&Intx> {
        None
    }
}

/// An honest back end, and what it was sent: requests, and the eventfds to signal.
struct Honest {
    _directory: tempfile::TempDir,
    path: PathBuf,
    requests: Arc<Mutex<Vec<u32>>>,
    calls: Arc<Mutex<Vec<OwnedFd>>>,
    announced: Arc<Mutex<Vec<Vec<u8>>>>,
    /// Where it makes requests of its own, and with which number its configuration begins.
    channel: Arc<Mutex<Option<OwnedFd>>>,
    first: Arc<AtomicU8>,
    thread: JoinHandle<()>,
}

impl Honest {
    /// One that offers these features of its device type beside.
    fn start(features: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let (requests, calls) = (Arc::<Mutex<Vec<u32>>>::default(), Arc::<Mutex<Vec<OwnedFd>>>::default());
        let announced = Arc::<Mutex<Vec<Vec<u8>>>>::default();
        let (its_requests, its_calls, its_announced) = (requests.clone(), calls.clone(), announced.clone());
        let (channel, first) = (Arc::<Mutex<Option<OwnedFd>>>::default(), Arc::<AtomicU8>::default());
        let (its_channel, its_first) = (channel.clone(), first.clone());
        let thread = std::thread::spawn(move || {
            let stream: UnixStream = listener.accept().unwrap().0;
            let mut kept = Vec::new();
            while let Some((request, flags, payload, fd)) = with_descriptor(&stream) {
                if request == 19 {
                    its_announced.lock().unwrap().push(payload.clone());
                }
                match request {
                    13 => its_calls.lock().unwrap().extend(fd),
                    21 => *its_channel.lock().unwrap() = fd,
                    // A state of no bytes: this end of its pipe is closed.
                    42 => drop(fd),
                    _ => kept.extend(fd),
                }
                match request {
                    1 => {
                        let all = OFFERED | features;
                        { &stream }.write_all(&reply(request, &all.to_ne_bytes())).unwrap();
                    }
                    24 => {
                        // Header, and a configuration that counts up.
                        let first = its_first.load(Ordering::SeqCst);
                        let content = (0..=u8::MAX).cycle().skip(first.into()).take(payload.len() - 12);
                        let answer: Vec<u8> = payload[..12].iter().copied().chain(content).collect();
                        { &stream }.write_all(&reply(request, &answer)).unwrap();
                    }
                    31 => with_descriptors(&stream, &reply(31, &payload), 1),
                    _ => { &stream }.write_all(&honest(request, flags, &payload)).unwrap(),
                }
                its_requests.lock().unwrap().push(request);
            }
        });
        Self { _directory: directory, path, requests, calls, announced, channel, first, thread }
    }

    fn asked(&self, request: u32) -> usize {
        self.requests.lock().unwrap().iter().filter(|asked| **asked == request).count()
    }

    fn signal(&self, call: usize) {
        rustix::io::write(&self.calls.lock().unwrap()[call], &1u64.to_ne_bytes()).unwrap();
    }
}

#[test]
fn the_back_end_follows_when_the_driver_gives_a_ring_another_vector() {
    let back_end = Honest::start(0);
    let ram = Arc::new(ram());
    let spec = VhostSpec { socket: back_end.path.clone(), id: BLK, queues: 1 };
    let device = VhostUser::new(&Backend::connect(&spec).unwrap(), 0, &ram, None).unwrap();
    let driver = Arc::<Told>::default();
    let position = Position::default();
    let setup = RingSetup { size: 16, descriptors: 0x1000, available: 0x2000, used: 0x3000, position };
    let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let ring = RingGiven { index: 0, setup, kick, resumes: false, in_flight: None };
    let interrupts = Interrupts::new(driver.clone());
    device.activate(Activation { memory: ram.memory().clone(), features: 0, rings: vec![ring], interrupts }).unwrap();

    // Without a vector this process passes interrupts on.
    until("the ring to be started", || back_end.asked(18) == 1);
    let before = driver.rung.load(Ordering::SeqCst);
    back_end.signal(0);
    until("an interrupt to be passed on", || driver.rung.load(Ordering::SeqCst) > before);

    // With one the back end signals it itself. What it signalled last is made good.
    let vectors = Vectors::new(Arc::new(FakeRouter::default()), &Events::own(), 2).unwrap();
    for n in 0..2 {
        let vector = vectors.get(n).unwrap();
        let before = driver.rung.load(Ordering::SeqCst);
        *driver.vector.lock().unwrap() = Some(vector.clone());
        device.vector_changed(0);
        until("the back end to be told", || back_end.calls.lock().unwrap().len() == n + 2);
        until("an interrupt for what may have been lost", || driver.rung.load(Ordering::SeqCst) == before + 1);
        assert!(!vector.pending());
        back_end.signal(n + 1);
        assert!(vector.pending(), "vector {n} was not signalled");
    }
    // One that is no ring of the device, and none at all.
    device.vector_changed(7);
    *driver.vector.lock().unwrap() = None;
    device.vector_changed(0);
    until("the back end to signal us again", || back_end.calls.lock().unwrap().len() == 4);
    let before = driver.rung.load(Ordering::SeqCst);
    back_end.signal(3);
    until("an interrupt to be passed on", || driver.rung.load(Ordering::SeqCst) > before);
    drop(device);
    back_end.thread.join().unwrap();
}

#[test]
fn a_network_device_offers_nothing_that_needs_commands_and_announces_a_guest_that_has_come() {
    let (address, commands, pairs) = (1 << 5, 1 << 17, 1 << 22);
    let [source, destination] = [(); 2].map(|()| Honest::start(address | commands | pairs));
    let ram = Arc::new(ram());
    let [there, here] = [&source, &destination].map(|back_end| {
        let spec = VhostSpec { socket: back_end.path.clone(), id: NET, queues: 1 };
        let backend = Backend::connect(&spec).unwrap();
        assert_eq!(backend.features() & (address | commands | pairs), address);
        VhostUser::new(&backend, 0, &ram, None).unwrap()
    });
    // One that has been here all the time is where the network thinks it is.
    there.start();
    let section = there.save(SavedTransport::default());
    drop(there);
    source.thread.join().unwrap();
    assert!(source.announced.lock().unwrap().is_empty());

    here.restore(&section).unwrap();
    here.start();
    until("the guest to be announced", || !destination.announced.lock().unwrap().is_empty());
    here.start();
    drop(here);
    destination.thread.join().unwrap();
    assert_eq!(*destination.announced.lock().unwrap(), [[0, 1, 2, 3, 4, 5, 0, 0]], "once, its address");
}

#[test]
fn a_configuration_that_changes_is_read_again_and_the_driver_told_but_not_while_the_device_is_at_rest() {
    let back_end = Honest::start(0);
    let ram = Arc::new(ram());
    let spec = VhostSpec { socket: back_end.path.clone(), id: BLK, queues: 1 };
    let backend = Backend::connect(&spec).unwrap();
    let device = VhostUser::new(&backend, 0, &ram, None).unwrap();
    let driver = Arc::<Told>::default();
    let (kick, interrupts) = (Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()), Interrupts::new(driver.clone()));
    let position = Position::default();
    let setup = RingSetup { size: 16, descriptors: 0x1000, available: 0x2000, used: 0x3000, position };
    let ring = RingGiven { index: 0, setup, kick, resumes: false, in_flight: None };
    device.activate(Activation { memory: ram.memory().clone(), features: 0, rings: vec![ring], interrupts }).unwrap();
    until("the ring to be started", || back_end.asked(18) == 1);
    let say = |number: u32| {
        let channel = back_end.channel.lock().unwrap();
        rustix::io::write(channel.as_ref().unwrap(), &message(number, 1, &[])).unwrap();
    };
    let first = || {
        let mut byte = [0];
        device.read_config(0, &mut byte);
        byte[0]
    };
    let told = |times: u32| until("the driver to be told", || driver.changed.load(Ordering::SeqCst) == times);
    assert_eq!((first(), backend.config()[0]), (0, 0));
    back_end.first.store(7, Ordering::SeqCst);
    say(2);
    told(1);
    assert_eq!((first(), backend.config()[0]), (7, 7));
    // The same again is nothing new.
    let read = back_end.asked(24);
    say(2);
    until("it to be read again", || back_end.asked(24) > read);

    // At rest it is kept for later.
    device.serving().stop(Instant::now() + LIMIT).unwrap();
    back_end.first.store(9, Ordering::SeqCst);
    let read = back_end.asked(24);
    say(2);
    let log = device.log();
    log.start().and_then(|()| log.stop()).unwrap();
    assert_eq!((back_end.asked(24), first()), (read, 7), "the orders that came after it were obeyed");
    device.start();
    told(2);
    assert_eq!(first(), 9);

    // What it may not ask for ends it: the device goes without it.
    say(5);
    until("the back end to be given up", || back_end.thread.is_finished());
    drop(device);
    back_end.thread.join().unwrap();
}

/// The next process of a device's machine: what came to it, and its device.
fn heir(old: &Shelf, backend: &Backend, ram: &Arc<wherry_memory::Ram>) -> (Shelf, VhostUser) {
    let registry = Registry::of_successor();
    let copy = |entry: wherry_handover::Entry| (entry.id.clone(), entry.as_fd().try_clone_to_owned().unwrap());
    registry.arrived(old.registry().list().into_iter().map(copy)).unwrap();
    let shelf = Shelf::new(registry, "d");
    let next = Backend::inherit(backend.spec(), backend.features(), &backend.config(), shelf.clone());
    let device = VhostUser::new(&next, 0, ram, None).unwrap();
    assert_eq!(shelf.registry().unclaimed(), []);
    (shelf, device)
}

#[test]
fn another_process_goes_on_with_a_back_end_that_hears_nothing_of_it() {
    let back_end = Honest::start(0);
    let ram = Arc::new(ram());
    let spec = VhostSpec { socket: back_end.path.clone(), id: BLK, queues: 1 };
    let shelf = Shelf::new(Registry::new(), "d");
    let backend = Backend::connect(&spec).unwrap().kept_on(shelf.clone());
    let device = VhostUser::new(&backend, 0, &ram, None).unwrap();
    let position = Position { available: 5, used: 5 };
    let setup = RingSetup { size: 16, descriptors: 0x1000, available: 0x2000, used: 0x3000, position };
    let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let activation = |driver: &Arc<Told>| {
        let ring = RingGiven { index: 0, setup, kick: kick.clone(), resumes: false, in_flight: None };
        let interrupts = Interrupts::new(driver.clone());
        Activation { memory: ram.memory().clone(), features: 0, rings: vec![ring], interrupts }
    };
    let (here, there) = (Arc::<Told>::default(), Arc::<Told>::default());
    device.activate(activation(&here)).unwrap();
    until("the ring to be started", || back_end.asked(18) == 1);
    let leave = || {
        shelf.registry().set_leaving(true);
        device.serving().drain(Instant::now() + LIMIT).unwrap();
        device.serving().stop(Instant::now() + LIMIT).unwrap();
        device.save(SavedTransport::default())
    };
    let asked = || back_end.requests.lock().unwrap().len();

    // Given up: the old one goes on, with what was signalled meanwhile.
    let (_, given_up) = heir(&shelf, &backend, &ram);
    let (section, before) = (leave(), asked());
    let rung = here.rung.load(Ordering::SeqCst);
    back_end.signal(0);
    given_up.restore(&section).unwrap();
    drop(given_up);
    assert_eq!(here.rung.load(Ordering::SeqCst), rung, "it is nobody's now");
    shelf.registry().set_leaving(false);
    device.start();
    until("an interrupt to be passed on", || here.rung.load(Ordering::SeqCst) > rung);
    assert_eq!(asked(), before);

    let (its, next) = heir(&shelf, &backend, &ram);
    let section = leave();
    next.restore(&section).unwrap();
    back_end.signal(0);
    its.registry().settle();
    next.activate(activation(&there)).unwrap();
    next.start();
    until("an interrupt of the new process", || there.rung.load(Ordering::SeqCst) > 0);
    let rung = here.rung.load(Ordering::SeqCst);
    drop(device);
    // A vector instead, which the back end is told by the new one; then its driver lets it go, and takes it again.
    let vectors = Vectors::new(Arc::new(FakeRouter::default()), &Events::own(), 1).unwrap();
    *there.vector.lock().unwrap() = Some(vectors.get(0).unwrap().clone());
    assert_eq!(asked(), before);
    next.vector_changed(0);
    until("the back end to be told", || back_end.calls.lock().unwrap().len() == 2);
    back_end.signal(1);
    assert!(vectors.get(0).unwrap().pending());
    next.reset();
    assert_eq!(back_end.asked(11), 1, "the ring was stopped");
    let enabled = back_end.asked(18);
    next.activate(activation(&there)).unwrap();
    until("the ring to be started again", || back_end.asked(18) > enabled);
    assert_eq!(here.rung.load(Ordering::SeqCst), rung);
    drop(next);
    back_end.thread.join().unwrap();
}

#[test]
fn what_another_process_left_of_a_back_end_is_checked() {
    let back_end = Honest::start(0);
    let ram = Arc::new(ram());
    let spec = VhostSpec { socket: back_end.path.clone(), id: BLK, queues: 1 };
    let shelf = Shelf::new(Registry::new(), "d");
    let backend = Backend::connect(&spec).unwrap().kept_on(shelf.clone());
    let device = VhostUser::new(&backend, 0, &ram, None).unwrap();
    shelf.registry().set_leaving(true);
    device.serving().stop(Instant::now() + LIMIT).unwrap();
    let section = device.save(SavedTransport::default());
    let good = SavedVhostUser::from_section(&section).unwrap();
    let refused = |change: &dyn Fn(&mut SavedBackend), hint: &str| {
        let (_, next) = heir(&shelf, &backend, &ram);
        let mut saved = good.clone();
        change(saved.kept.as_mut().unwrap());
        let said = next.restore(&saved.to_section(&wherry_state::UnitId::new("vhost-user-blk", 0))).unwrap_err();
        assert!(said.to_string().contains(hint), "{said}");
    };
    let ring = |index| SavedServed { index, started: true, relayed: false };
    refused(&|kept| kept.rings.push(ring(1)), "ring 1 of 1");
    refused(&|kept| kept.rings.push(ring(1 << 16)), "ring 65536 of 1");
    refused(&|kept| kept.rings.push(SavedServed { relayed: true, ..ring(0) }), "relay[0] has not come");
    refused(&|kept| kept.in_flight = vec![1; 20], "in-flight[0] has not come");
    // A second one of the same device.
    let nothing = Backend::inherit(&spec, 0, &backend.config(), Shelf::new(Registry::of_successor(), "d"));
    let said = VhostUser::new(&nothing, 0, &ram, None).unwrap().restore(&section).unwrap_err();
    assert!(said.to_string().contains("connection[0] has not come"), "{said}");
    drop(device);
    back_end.thread.join().unwrap();
}
