//! A server that another process goes on with: here, another server of this process. What was served before stays at rest for ever.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::client::{Memory, copy};
use super::copier::Copier;
use super::raw::{Raw, longs, message, signals, words};
use super::{BOOL, CONFIG, EVENTFD, MASK, NONE, TRIGGER, UNMASK, event, memory};
use wherry_handover::Rested;
use wherry_vfio_user::client::NoMemory;
use wherry_vfio_user::payload::pci_irq;
use wherry_vfio_user::server::{self, Host, Rest};
use wherry_vfio_user::{Bus, Client, Description, Device, Migration, Options, Server, State};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// The example, which does nothing between two messages: what it is made of can go to another process as it can be moved.
struct Kept(Copier);

impl Device for Kept {
    fn description(&self) -> Description {
        self.0.description()
    }

    fn read(&mut self, bus: &Bus, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.0.read(bus, region, offset, data)
    }

    fn write(&mut self, bus: &Bus, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.0.write(bus, region, offset, data)
    }

    fn reset(&mut self, bus: &Bus) -> Result<(), Errno> {
        self.0.reset(bus)
    }

    fn migration(&mut self) -> Option<&mut dyn Migration> {
        self.0.migration()
    }

    fn kept(&mut self) -> Option<&mut dyn server::Kept> {
        Some(self)
    }
}

impl server::Kept for Kept {
    fn rest(&mut self, bus: &Bus) -> Result<Vec<u8>, String> {
        let mut saved = || {
            self.0.arc(bus, State::Stop, State::StopCopy)?;
            let mut state = vec![0; self.0.estimate(bus) as usize];
            let bytes = self.0.save(bus, &mut state)?;
            state.truncate(bytes);
            self.0.arc(bus, State::StopCopy, State::Stop)?;
            Ok(state)
        };
        saved().map_err(|error: Errno| error.to_string())
    }

    fn take(&mut self, bus: &Bus, state: &[u8]) -> Result<(), String> {
        let mut load = || {
            self.0.arc(bus, State::Stop, State::Resuming)?;
            self.0.load(bus, state)?;
            self.0.arc(bus, State::Resuming, State::Stop)
        };
        load().map_err(|error: Errno| error.to_string())
    }

    fn go_on(&mut self, _: &Bus) {}
}

/// Servers of one socket, one after the other.
struct Chain {
    directory: tempfile::TempDir,
    listener: UnixListener,
    twin: bool,
    rest: Rest,
    bus: Bus,
}

/// A server on a thread of its own; one that comes second begins at rest.
fn serve(listener: &UnixListener, twin: bool, second: bool) -> (Rest, Bus) {
    let server = Server::on(listener.try_clone().unwrap()).unwrap();
    let mut device = Kept(Copier::new().unwrap());
    let mut host = Host::new(&device).unwrap();
    host.set_twin_socket(twin);
    let (rest, bus) = (host.rest(), host.bus().clone());
    if second {
        rest.begin();
    }
    std::thread::spawn(move || server.serve(&mut host, &mut device));
    (rest, bus)
}

impl Chain {
    fn new(twin: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("s")).unwrap();
        let (rest, bus) = serve(&listener, twin, false);
        Self { directory, listener, twin, rest, bus }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    fn rest(&self) -> Rested {
        self.rest.begin();
        self.rest.wait(soon()).unwrap()
    }

    /// Has another server go on.
    fn next(&mut self) {
        let rested = self.rest();
        let (rest, bus) = serve(&self.listener, self.twin, true);
        let left = take(&rest, rested).unwrap();
        assert_eq!(left, Vec::<String>::new(), "nobody wants them");
        rest.go_on();
        (self.rest, self.bus) = (rest, bus);
    }
}

/// Has a server take what another one knew; names of descriptors that it did not want.
fn take(rest: &Rest, rested: Rested) -> Result<Vec<String>, String> {
    let all: BTreeMap<(String, u32), OwnedFd> =
        rested.descriptors.into_iter().map(|one| ((one.name, one.index), one.fd)).collect();
    let all = Arc::new(std::sync::Mutex::new(all));
    let its = all.clone();
    let claim = move |name: &str, index| its.lock().unwrap().remove(&(name.to_owned(), index));
    rest.take(rested.state, Box::new(claim), soon())?;
    Ok(all.lock().unwrap().keys().map(|(name, index)| format!("{name}[{index}]")).collect())
}

#[test]
fn a_client_does_not_notice_that_its_server_is_another_one() {
    for twin in [false, true] {
        let mut chain = Chain::new(twin);
        let client = Client::connect(&chain.path(), Options::default(), Arc::new(Memory::new())).unwrap();
        assert_eq!(client.has_twin_socket(), twin);
        // One map that is reached by message, and two files, one of which could be cut.
        client.dma_map(0, 0x2_0000, None, true, false).unwrap();
        let sealed = memory(0x4000);
        let plain = rustix::fs::memfd_create("plain", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&plain, 0x4000).unwrap();
        client.dma_map(0x10_0000, 0x2000, Some((sealed.as_fd(), 0x1000)), true, true).unwrap();
        client.dma_map(0x20_0000, 0x2000, Some((plain.as_fd(), 0x2000)), true, true).unwrap();
        let events = [event(), event()];
        client.set_triggers(pci_irq::MSIX, 0, &events.each_ref().map(AsFd::as_fd)).unwrap();
        client.start_logging(4096, &[(0x10_0000, 0x2000)]).unwrap();
        for round in 0..4_u64 {
            chain.next();
            // From what comes by message into a file, from there into the other one.
            copy(&client, 0x1000 + 8 * round, 0x10_0800, 64).unwrap();
            chain.next();
            copy(&client, 0x10_0800, 0x20_0000, 64).unwrap();
            assert_eq!(signals(&events[0]), 2, "round {round}");
            let mut seen = [0; 64];
            rustix::io::pread(&plain, &mut seen, 0x2000).unwrap();
            let expected: Vec<u8> = (0x1000 + 8 * round..0x1040 + 8 * round).map(|at| (at >> 3) as u8).collect();
            assert_eq!(seen[..], expected[..], "round {round}");
            let error = copy(&client, 0x10_0000, 0, 8).unwrap_err().to_string();
            assert!(error.contains("3 of 4"), "it is read-only: {error}");
            chain.next();
            assert_eq!(client.read_log(0x10_0000, 0x2000, 4096).unwrap(), [1], "round {round}");
            let mut done = [0; 8];
            client.read(0, 24, &mut done).unwrap();
            assert_eq!(u64::from_le_bytes(done), 2 * (round + 1));
        }
        client.dma_unmap(0x10_0000, 0x2000).unwrap();
        assert_eq!(chain.bus.maps(), 2);
    }
}

#[test]
fn what_has_come_of_a_command_is_carried_with_its_descriptor_wherever_it_was_cut() {
    let map = message(7, 2, 0, &[words(&[32, 3]), longs(&[0, 0x10_0000, 0x4000])].concat());
    for cut in 0..=map.len() {
        let mut chain = Chain::new(false);
        let (client, _) = Raw::connect(&chain.path(), "");
        let file = memory(0x4000);
        if cut > 0 {
            client.send(&map[..cut], &[file.as_fd()]);
            // What is there is read before the server rests, or stays in the socket: both are to be right.
            if cut % 2 == 0 {
                std::thread::yield_now();
            }
        }
        chain.next();
        match cut {
            0 => client.send(&map, &[file.as_fd()]),
            cut => (&client.0).write_all(&map[cut..]).unwrap(),
        }
        let reply = client.receive().unwrap();
        assert_eq!((reply.id, reply.command, reply.error), (7, 2, 0), "cut at {cut}: {reply:?}");
        assert_eq!(chain.bus.maps(), 1, "cut at {cut}");
        super::copy(&client, 0x10_0000, 0x10_2000, 16).unwrap();
    }
}

#[test]
fn every_one_of_many_commands_is_answered_once_and_in_order() {
    const COMMANDS: u16 = 3000;
    let mut chain = Chain::new(false);
    let (client, _) = Raw::connect(&chain.path(), "");
    let read = |id: u16| message(id, 9, 0, &[longs(&[0]), words(&[CONFIG, 4])].concat());
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            for id in 0..COMMANDS {
                (&client.0).write_all(&read(id)).unwrap();
            }
        });
        let answers = scope.spawn(|| {
            for id in 0..COMMANDS {
                let reply = client.receive().unwrap();
                assert_eq!((reply.id, reply.error, reply.word(16)), (id, 0, 0x0c09_1de5));
            }
        });
        // What was served before keeps its descriptors, so there are not too many.
        let mut replaced = 0;
        while replaced < 25 && !answers.is_finished() {
            chain.next();
            replaced += 1;
        }
        assert!(replaced > 0, "nothing was replaced meanwhile");
        asking.join().unwrap();
        answers.join().unwrap();
    });
}

#[test]
fn interrupts_stay_as_they_are_masked_pending_and_up_and_none_comes_by_itself() {
    let mut chain = Chain::new(false);
    let (client, _) = Raw::connect(&chain.path(), "");
    let events: Vec<OwnedFd> = (0..4).map(|_| event()).collect();
    let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
    let told = || events.iter().map(signals).collect::<Vec<_>>();
    client.irqs(EVENTFD | TRIGGER, 2, 0, 3, &[], &fds[..3]).unwrap();
    client.irqs(EVENTFD | UNMASK, 2, 1, 1, &[], &fds[3..]).unwrap();
    client.irqs(BOOL | MASK, 2, 0, 2, &[0, 1], &[]).unwrap();
    client.irqs(BOOL | TRIGGER, 2, 0, 2, &[0, 1], &[]).unwrap();
    chain.next();
    assert_eq!(told(), [0; 4]);
    chain.bus.trigger(2, 0);
    chain.bus.trigger(2, 3);
    assert_eq!(told(), [1, 0, 0, 0], "one is not enabled");
    chain.next();
    client.irqs(NONE | UNMASK, 2, 1, 1, &[], &[]).unwrap();
    assert_eq!(told(), [0, 1, 0, 1]);

    let pin = event();
    client.irqs(EVENTFD | TRIGGER, 0, 0, 1, &[], &[pin.as_fd()]).unwrap();
    chain.bus.set_level(0, true);
    assert_eq!(signals(&pin), 1);
    chain.next();
    assert_eq!(signals(&pin), 0, "it is masked, and up");
    client.irqs(NONE | UNMASK, 0, 0, 1, &[], &[]).unwrap();
    assert_eq!(signals(&pin), 1);
    // What comes while there is no client waits for the next one.
    drop(client);
    while chain.bus.enabled(2) {
        std::thread::yield_now();
    }
    chain.bus.trigger(2, 0);
    chain.next();
    let (client, _) = Raw::connect(&chain.path(), "");
    client.irqs(EVENTFD | TRIGGER, 2, 0, 1, &[], &fds[..1]).unwrap();
    assert_eq!(told(), [1, 0, 0, 0]);
}

#[test]
fn a_server_that_rests_goes_on_and_who_asks_meanwhile_waits() {
    let chain = Chain::new(true);
    let client = Client::connect(&chain.path(), Options::default(), Arc::new(Memory::new())).unwrap();
    client.dma_map(0, 0x4_0000, None, true, true).unwrap();
    let done = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            for round in 0..200 {
                copy(&client, 0x1000, 0x2_0000 + 64 * round, 64).unwrap();
                done.fetch_add(1, Ordering::SeqCst);
            }
        });
        let mut rounds = 0;
        while !asking.is_finished() {
            let before = done.load(Ordering::SeqCst);
            drop(chain.rest());
            chain.rest.go_on();
            rounds += 1;
            // Who rests all the time serves nobody.
            while done.load(Ordering::SeqCst) == before && !asking.is_finished() {
                std::thread::yield_now();
            }
        }
        asking.join().unwrap();
        assert!(rounds > 0);
    });
}

#[test]
fn a_client_that_does_not_finish_what_it_was_asked_keeps_the_server_from_resting_but_not_from_serving() {
    let chain = Chain::new(false);
    let (client, _) = Raw::connect(&chain.path(), "");
    client.map(0, 0x1000, 3, None).unwrap();
    client.write(CONFIG, 4, &[6, 0]).unwrap();
    client.write(0, 16, &8_u64.to_le_bytes()).unwrap();
    // It copies, and asks for memory.
    let start = [longs(&[0x20]), words(&[0, 4]), vec![1, 0, 0, 0]].concat();
    client.send(&message(9, 10, 0, &start), &[]);
    let asked = client.receive().unwrap();
    assert_eq!(asked.command, 11, "it reads memory");
    chain.rest.begin();
    let why = chain.rest.wait(Instant::now() + Duration::from_millis(50)).unwrap_err();
    assert!(why.contains("did not come to rest"), "{why}");
    chain.rest.go_on();
    client.send(&message(asked.id, 11, 1, &[longs(&[0, 8]), vec![5; 8]].concat()), &[]);
    let written = client.receive().unwrap();
    assert_eq!(written.command, 12, "it goes on, and writes");
    client.send(&message(written.id, 12, 1, &longs(&[0, 8])), &[]);
    let reply = client.receive().unwrap();
    assert_eq!((reply.id, reply.command, reply.error), (9, 10, 0));
}

#[test]
fn a_device_whose_client_moves_it_stays_where_it_is_and_says_so() {
    let mut chain = Chain::new(true);
    let client = Client::connect(&chain.path(), Options::default(), Arc::new(NoMemory)).unwrap();
    for state in [State::PreCopy, State::StopCopy, State::Stop, State::Resuming] {
        client.set_state(state).unwrap();
        let said = chain.rest.obstacle().unwrap();
        assert!(said.contains("in the middle of a migration") && said.contains(&format!("{state:?}")), "{said}");
        chain.rest.begin();
        assert_eq!(chain.rest.wait(soon()).unwrap_err(), said);
        chain.rest.go_on();
    }
    client.reset().unwrap();
    assert_eq!(chain.rest.obstacle(), None);
    chain.next();
    assert_eq!(client.info().unwrap().third, 9);
}

#[test]
fn what_another_server_left_is_checked_and_what_is_wrong_is_named() {
    let chain = Chain::new(true);
    let client = Client::connect(&chain.path(), Options::default(), Arc::new(NoMemory)).unwrap();
    let file = memory(0x4000);
    client.dma_map(0, 0x4000, Some((file.as_fd(), 0)), true, true).unwrap();
    client.set_triggers(pci_irq::MSIX, 0, &[event().as_fd()]).unwrap();
    let again = || {
        chain.rest.go_on();
        chain.rest()
    };
    let refused = |twin: bool, change: &dyn Fn(&mut Rested), words: &str| {
        let mut rested = again();
        change(&mut rested);
        let (rest, _) = serve(&chain.listener, twin, true);
        let error = take(&rest, rested).unwrap_err();
        assert!(error.contains(words), "{words}: {error}");
    };
    refused(true, &|rested| rested.state.truncate(40), "the state of a server");
    refused(true, &|rested| rested.state.clear(), "other regions");
    refused(false, &|_| {}, "other limits and capabilities");
    for name in ["connection", "twin", "dma", "irq2/trigger"] {
        refused(true, &|rested| rested.descriptors.retain(|one| one.name != name), &format!("{name}[0]"));
    }
    let short = |rested: &mut Rested| {
        let map = rested.descriptors.iter_mut().find(|one| one.name == "dma").unwrap();
        map.fd = memory(0x1000);
    };
    refused(true, &short, "mapping 0x4000 bytes");
    // Who took none of that serves on.
    chain.rest.go_on();
    assert_eq!(client.info().unwrap().third, 9);
}
