//! A back end that another process goes on with: here, another server of this process. What was served before stays at rest for
//! ever, as in a process that is about to end.
#![allow(clippy::unwrap_used, reason = "a failure is a panic here")]

mod support;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use support::{Client, Fake, event, fd, lend, memfd, pair, start_ring, table, until, words};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use wherry_backend::{Server, kept};
use wherry_handover::{Rest, Rested};

const USER: u64 = 0x7f00_0000_0000;
const MIB: u64 = 1 << 20;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// Back ends at one socket, one after the other.
struct Chain {
    directory: tempfile::TempDir,
    listener: UnixListener,
    device: Arc<Fake>,
    server: Arc<Server>,
    rest: Rest,
}

/// A back end on a thread of its own; one that comes second begins at rest.
fn serve(listener: &UnixListener, device: Fake, second: bool) -> (Arc<Fake>, Arc<Server>, Rest) {
    let server = Arc::new(Server::on(listener.try_clone().unwrap()).unwrap());
    let (device, rest) = (Arc::new(device), server.rest());
    if second {
        rest.begin();
    }
    let (its, served) = (device.clone(), server.clone());
    std::thread::spawn(move || served.run(&*its));
    (device, server, rest)
}

impl Chain {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("s")).unwrap();
        let (device, server, rest) = serve(&listener, Fake::default(), false);
        Self { directory, listener, device, server, rest }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    fn client(&self) -> Client {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Client { stream }
    }

    fn rest(&self) -> Rested {
        self.rest.begin();
        self.rest.wait(soon()).unwrap()
    }

    /// Has another back end go on.
    fn next(&mut self) {
        let rested = self.rest();
        let (device, server, rest) = serve(&self.listener, Fake::default(), true);
        assert_eq!(take(&rest, rested).unwrap(), Vec::<String>::new(), "nobody wants them");
        assert!(!device.serves(), "before it is to go on");
        rest.go_on();
        (self.device, self.server, self.rest) = (device, server, rest);
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        self.server.stop();
    }
}

/// Has a back end take what another one knew; names of descriptors that it did not want.
fn take(rest: &Rest, rested: Rested) -> Result<Vec<String>, String> {
    let all: BTreeMap<(String, u32), OwnedFd> =
        rested.descriptors.into_iter().map(|one| ((one.name, one.index), one.fd)).collect();
    let all = Arc::new(Mutex::new(all));
    let its = all.clone();
    let claim = move |name: &str, index| its.lock().unwrap().remove(&(name.to_owned(), index));
    rest.take(rested.state, Box::new(claim), soon())?;
    Ok(all.lock().unwrap().keys().map(|(name, index)| format!("{name}[{index}]")).collect())
}

/// How much room in the kernel takes what a front end has sent and its back end has not read.
#[expect(unsafe_code, reason = "no library has this call")]
fn unread(client: &Client) -> i32 {
    let mut bytes = 0;
    // SAFETY: an open socket, and an int that the call writes.
    let asked = unsafe { libc::ioctl(client.stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    assert_eq!(asked, 0);
    bytes
}

/// A front end with one ring that is served, and one that was not rung; whose memory that is, and the bells.
fn set_up(client: &Client) -> (OwnedFd, vmm_sys_util::eventfd::EventFd) {
    client.agree();
    let memory = memfd(MIB);
    assert!(client.order(5, &table(0x10_0000, MIB, USER), &fd(&memory)));
    let kick = start_ring(client, 1, USER, 7);
    (memory, kick)
}

#[test]
fn a_front_end_does_not_notice_that_its_back_end_is_another_one() {
    let mut chain = Chain::new();
    let client = chain.client();
    let (memory, kick) = set_up(&client);
    let (call, error, silent) = (event(), event(), event());
    assert!(client.order(13, &words(&[1]), &[lend(&call)]));
    assert!(client.order(14, &words(&[1]), &[lend(&error)]));
    // A ring that was not rung.
    assert!(client.order(8, &pair(0, 16), &[]) && client.order(10, &pair(0, 40_000), &[]));
    assert!(client.order(9, &words(&[0, USER + 0x8000, USER + 0x9000, USER + 0xa000, 0]), &[]));
    assert!(client.order(12, &words(&[0]), &[lend(&silent)]) && client.order(18, &pair(0, 1), &[]));
    // The device was brought to rest for each of these.
    let first = chain.device.served(|given| given.rings[0].next);
    for round in 1..4u16 {
        chain.next();
        chain.device.served(|given| {
            assert_eq!(given.features, 1 << 29 | 1 << 32);
            let ring = &given.rings[0];
            assert_eq!((given.rings.len(), ring.index, ring.size, ring.next), (1, 1, 64, first + 3 * round));
            assert_eq!((ring.descriptors, ring.used, ring.available), (0x10_0000, 0x10_1000, 0x10_2000));
            // It is the same memory, and the same eventfds.
            given.memory.write_obj(u64::from(round), GuestAddress(0x10_4000)).unwrap();
            kick.write(1).unwrap();
            assert!(ring.kick.read().unwrap() > 0);
            given.driver.ring(1);
        });
        let mut bytes = [0; 8];
        std::fs::File::from(memory.try_clone().unwrap()).read_exact_at(&mut bytes, 0x4000).unwrap();
        assert_eq!(u64::from_le_bytes(bytes), u64::from(round));
        assert_eq!(call.read().unwrap(), 1);
        assert!(error.read().is_err());
        assert_eq!(client.number(17, &[]), 2, "it answers");
    }
    silent.write(1).unwrap();
    until("the other ring to be served", || {
        chain.device.given.lock().unwrap().as_ref().is_some_and(|given| given.rings.len() == 2)
    });
    chain.device.served(|given| assert_eq!((given.rings[0].size, given.rings[0].next), (16, 40_000)));
    chain.device.served(|given| given.driver.failed("a test", &"fails"));
    assert_eq!(error.read().unwrap(), 1);
    assert_eq!(client.ask(11, &pair(1, 0), &[]).0, pair(1, u32::from(first) + 3 * 5));
}

#[test]
fn what_has_come_of_a_message_goes_over_whatever_byte_it_ends_with() {
    let mut chain = Chain::new();
    let client = chain.client();
    let (_memory, _kick) = set_up(&client);
    let event = event();
    let head =
        |bytes: u32| [13, 1 | 1 << 3, bytes].iter().flat_map(|word: &u32| word.to_ne_bytes()).collect::<Vec<u8>>();
    let message = [head(8), words(&[1])].concat();
    for (cut, read) in (1..message.len()).flat_map(|cut| [(cut, false), (cut, true)]) {
        // The descriptor comes with the first byte.
        client.raw(&message[..cut], &[lend(&event)]);
        // Whoever has read it knows it; else the next one may read it.
        if read {
            until("the part to be read", || unread(&client) == 0);
        }
        chain.next();
        client.raw(&message[cut..], &[]);
        assert_eq!(client.answer(13).unwrap().0, 0u64.to_ne_bytes(), "cut after {cut} bytes");
        chain.device.served(|given| given.driver.ring(1));
        assert_eq!(event.read().unwrap(), 1, "cut after {cut} bytes");
    }
    // Twice in the middle of one message.
    client.raw(&message[..5], &[lend(&event)]);
    until("the part to be read", || unread(&client) == 0);
    chain.next();
    client.raw(&message[5..15], &[]);
    until("the next part to be read", || unread(&client) == 0);
    chain.next();
    client.raw(&message[15..], &[]);
    assert_eq!(client.answer(13).unwrap().0, 0u64.to_ne_bytes());
    // And requests that wait in the socket.
    let requests =
        [[17, 1, 0], [36, 1, 0]].concat().iter().flat_map(|word: &u32| word.to_ne_bytes()).collect::<Vec<u8>>();
    chain.rest.begin();
    let rested = chain.rest.wait(soon()).unwrap();
    client.raw(&requests, &[]);
    let (_, server, rest) = serve(&chain.listener, Fake::default(), true);
    take(&rest, rested).unwrap();
    rest.go_on();
    (chain.server, chain.rest) = (server, rest);
    assert_eq!(client.answer(17).unwrap().0, 2u64.to_ne_bytes());
    assert_eq!(client.answer(36).unwrap().0, 509u64.to_ne_bytes());
}

#[test]
fn a_back_end_that_is_not_replaced_serves_on_as_if_nothing_had_happened() {
    let chain = Chain::new();
    let client = chain.client();
    let (_memory, _kick) = set_up(&client);
    chain.device.served(|_| ());
    for _ in 0..3 {
        let rested = chain.rest();
        assert!(!chain.device.serves());
        chain.device.changed.0.write(1).unwrap();
        // Another one takes it all, and does not go on.
        let (other, _server, rest) = serve(&chain.listener, Fake::default(), true);
        take(&rest, rested).unwrap();
        chain.rest.go_on();
        until("the device to be served again", || chain.device.serves());
        assert!(!other.serves());
        assert_eq!(client.number(17, &[]), 2);
    }
    assert_eq!(client.ask(11, &pair(1, 0), &[]).0, pair(1, 7 + 3 * 4));
}

#[test]
fn a_device_that_does_not_come_to_rest_serves_on() {
    let chain = Chain::new();
    let client = chain.client();
    let (_memory, _kick) = set_up(&client);
    chain.device.served(|_| ());
    *chain.device.busy.lock().unwrap() = true;
    chain.rest.begin();
    let why = chain.rest.wait(soon()).unwrap_err();
    assert_eq!(why, "it is busy");
    chain.rest.go_on();
    assert_eq!(client.number(17, &[]), 2);
    assert!(chain.device.serves());
    assert!(chain.device.events().contains(&"go on".into()));
    *chain.device.busy.lock().unwrap() = false;
}

#[test]
fn a_log_requests_under_way_a_state_and_the_channel_go_over() {
    let mut chain = Chain::new();
    let client = chain.client();
    client.agree();
    let memory = memfd(MIB);
    assert!(client.order(5, &table(0, MIB, USER), &fd(&memory)));
    // Two pages of bits, of which the second is the log.
    let log = memfd(8192);
    assert_eq!(client.number_with(6, &words(&[4096, 4096]), &fd(&log)), 0);
    let mut description = words(&[0, 0]);
    description.extend([2u16, 64].iter().flat_map(|half| half.to_ne_bytes()));
    description.extend([0; 4]);
    let (answer, fds) = client.ask(31, &description, &[]);
    assert!(client.order(32, &answer, &[fds[0].as_fd()]));
    let (theirs, ours) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert!(client.order(21, &[], &[theirs.as_fd()]));
    // A state that is announced, and read when the front end asks whether it was taken.
    let (read, write) = rustix::pipe::pipe().unwrap();
    client.ask(42, &pair(1, 0), &[read.as_fd()]);
    chain.next();
    rustix::io::write(&write, &[7; 100]).unwrap();
    drop(write);
    assert_eq!(client.number(43, &[]), 0);
    assert_eq!(*chain.device.state.lock().unwrap(), vec![7; 100]);
    let _kick = start_ring(&client, 0, USER, 0);
    chain.device.served(|given| {
        let in_flight = given.rings[0].in_flight.as_ref().unwrap();
        assert!(in_flight.left(0).is_empty());
        in_flight.taken(5);
    });
    let marked = |page: u64| {
        let mut byte = [0];
        std::fs::File::from(log.try_clone().unwrap()).read_exact_at(&mut byte, 4096 + page / 8).unwrap();
        byte[0] & 1 << (page % 8) != 0
    };
    chain.device.served(|given| given.memory.write_obj(1u8, GuestAddress(3 << 12)).unwrap());
    chain.next();
    assert!(marked(3));
    chain.device.served(|given| {
        assert_eq!(given.rings[0].in_flight.as_ref().unwrap().left(0), [5]);
        given.memory.write_obj(1u8, GuestAddress(9 << 12)).unwrap();
    });
    assert!(marked(9) && !marked(8));
    // It is switched off, and stays so.
    assert!(client.order(2, &words(&[1 << 29 | 1 << 32 | 1 << 30]), &[]));
    chain.next();
    chain.device.served(|given| given.memory.write_obj(1u8, GuestAddress(17 << 12)).unwrap());
    assert!(!marked(17));
    // The front end hears of another configuration.
    chain.device.changed.0.write(1).unwrap();
    let mut told = [0; 12];
    std::io::Read::read_exact(&mut &ours, &mut told).unwrap();
    assert_eq!(told[..4], 2u32.to_ne_bytes());
}

#[test]
fn what_is_served_to_nobody_goes_over_and_the_next_front_end_finds_it() {
    let mut chain = Chain::new();
    chain.device.changed.0.write(1).unwrap();
    chain.next();
    assert_eq!(chain.device.changed.0.read().unwrap(), 1, "nobody was told of the configuration");
    let client = chain.client();
    let (_memory, _kick) = set_up(&client);
    chain.device.served(|_| ());
    drop(client);
    until("the front end to be missed", || !chain.device.serves());
    chain.next();
    // It connects while nobody serves, and is found in the queue of the socket.
    let rested = chain.rest();
    let client = chain.client();
    let (device, server, rest) = serve(&chain.listener, Fake::default(), true);
    take(&rest, rested).unwrap();
    rest.go_on();
    (chain.device, chain.server, chain.rest) = (device, server, rest);
    set_up(&client);
    chain.device.served(|_| ());
    // One that goes while its back end is at rest is missed afterwards.
    let rested = chain.rest();
    drop(client);
    let (device, server, rest) = serve(&chain.listener, Fake::default(), true);
    take(&rest, rested).unwrap();
    rest.go_on();
    (chain.device, chain.server, chain.rest) = (device.clone(), server, rest);
    until("the front end to be missed", || device.events().contains(&"release".into()));
    assert_eq!(chain.client().number(17, &[]), 2);
}

#[test]
fn what_cannot_go_over_is_named() {
    let chain = Chain::new();
    let client = chain.client();
    let (_memory, _kick) = set_up(&client);
    assert_eq!(chain.rest.obstacle(), None);
    let (_, fds) = client.ask(28, &[], &[]);
    assert!(client.order(2, &words(&[1 << 29 | 1 << 32 | 1 << 30]), &[]));
    assert!(chain.rest.obstacle().unwrap().contains("postcopy"));
    chain.rest.begin();
    assert!(chain.rest.wait(soon()).unwrap_err().contains("postcopy"));
    chain.rest.go_on();
    client.ask(30, &[], &[]);
    drop(fds);
    assert_eq!(client.number(17, &[]), 2);
    assert_eq!(chain.rest.obstacle(), None);
    chain.rest();
    chain.rest.go_on();
    client.ask(28, &[], &[]);
    drop(client);
    until("the next front end to have none", || chain.rest.obstacle().is_none());
}

#[test]
fn a_state_that_does_not_fit_is_refused_and_says_why() {
    let chain = Chain::new();
    let client = chain.client();
    let (_memory, _kick) = set_up(&client);
    chain.device.served(|_| ());
    let refused = |device: Fake, spoil: &dyn Fn(&mut Rested), words: &str| {
        let mut rested = chain.rest();
        spoil(&mut rested);
        let (device, server, rest) = serve(&chain.listener, device, true);
        let why = take(&rest, rested).unwrap_err();
        assert!(why.contains(words), "{why}");
        assert!(!device.serves() && !device.events().contains(&"release".into()));
        server.stop();
        chain.rest.go_on();
        until("the old one to serve on", || chain.device.serves());
    };
    let nothing = |_: &mut Rested| {};
    refused(Fake { lacks: 1 << 29, ..Fake::default() }, &nothing, "features 0x20000000 are lacking");
    refused(Fake { size: 3, ..Fake::default() }, &nothing, "another configuration");
    refused(Fake { refuses: true, ..Fake::default() }, &nothing, "it does not fit");
    for name in ["connection", "memory", "kick"] {
        let lose = move |rested: &mut Rested| rested.descriptors.retain(|one| one.name != name);
        refused(Fake::default(), &lose, &format!("{name}["));
    }
    refused(Fake::default(), &|rested| rested.state.truncate(10), "the state of a back end");
    let shorten = |rested: &mut Rested| {
        let memory = rested.descriptors.iter_mut().find(|one| one.name == "memory").unwrap();
        memory.fd = memfd(4096);
    };
    refused(Fake::default(), &shorten, "of a file of 0x1000");
    // And before anybody comes to rest.
    let told = kept::offer(&Fake::default());
    assert_eq!(kept::check(&Fake::default(), &told), Ok(()));
    assert!(kept::check(&Fake { lacks: 1 << 29, ..Fake::default() }, &told).unwrap_err().contains("lacking"));
    assert!(kept::check(&Fake::default(), b"nonsense").is_err());
    assert_eq!(client.number(17, &[]), 2);
}

#[test]
fn memory_in_many_regions_goes_over_and_comes_and_goes_on_there() {
    const REGIONS: u64 = 100;
    let mut chain = Chain::new();
    let client = chain.client();
    client.agree();
    let file = memfd(MIB);
    // From the last to the first, each with a page of the file.
    let region = |n: u64| words(&[0, n << 20, 4096, USER + (n << 20), (n << 12) % MIB]);
    for n in (0..REGIONS).rev() {
        assert!(client.order(37, &region(n), &fd(&file)));
    }
    chain.next();
    for n in 10..20 {
        assert!(client.order(38, &region(n), &[]), "region {n} is known");
    }
    assert!(!client.order(38, &region(15), &[]));
    assert!(!client.order(37, &region(50), &fd(&file)), "it is there");
    assert!(client.order(37, &region(REGIONS), &fd(&file)));
    chain.next();
    let ring = memfd(MIB);
    assert!(client.order(37, &words(&[0, 1 << 40, MIB, USER + (1 << 40), 0]), &fd(&ring)));
    let _kick = start_ring(&client, 0, USER + (1 << 40), 0);
    chain.next();
    chain.device.served(|given| {
        assert_eq!(given.memory.num_regions() as u64, REGIONS - 10 + 1 + 1);
        given.memory.write_obj(77u64, GuestAddress(60 << 20)).unwrap();
    });
    let mut bytes = [0; 8];
    std::fs::File::from(file).read_exact_at(&mut bytes, 60 << 12).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), 77);
}

/// What comes with a request of [`talk`].
#[derive(Clone, Copy)]
enum With {
    Nothing,
    Memory,
    Log,
    Event,
    Socket,
    /// The memory that the back end has made.
    InFlight,
}

/// All that a front end asks for from its first message to the end of its ring: the answers, and the features that its device
/// served with. `between` is called before each request, with its number.
fn talk(client: &Client, mut between: impl FnMut(usize)) -> Vec<Vec<u8>> {
    const FEATURES: u64 = 1 << 29 | 1 << 32 | 1 << 30;
    let head = |offset: u32, bytes: u32| {
        let mut part = [offset, bytes, 0].map(u32::to_ne_bytes).concat();
        part.resize(12 + bytes as usize, 0);
        part
    };
    let mut rings = words(&[0, 0]);
    rings.extend([2u16, 64].iter().flat_map(|half| half.to_ne_bytes()));
    rings.extend([0; 4]);
    // Number, payload, whether the answer is more than that it was done, and what comes with it.
    let requests: Vec<(u32, Vec<u8>, bool, With)> = vec![
        (1, vec![], true, With::Nothing),
        (15, vec![], true, With::Nothing),
        (16, words(&[client.number(15, &[])]), false, With::Nothing),
        (2, words(&[FEATURES]), false, With::Nothing),
        (3, vec![], false, With::Nothing),
        (21, vec![], false, With::Socket),
        (17, vec![], true, With::Nothing),
        (36, vec![], true, With::Nothing),
        (24, head(8, 16), true, With::Nothing),
        (25, head(3, 2), false, With::Nothing),
        (25, head(0, 2), false, With::Nothing),
        (37, words(&[0, 0, MIB, USER, 0]), false, With::Memory),
        (37, words(&[0, 4 * MIB, MIB, USER + 4 * MIB, 0]), false, With::Memory),
        (37, words(&[0, 4 * MIB, MIB, USER + 4 * MIB, 0]), false, With::Memory),
        (31, rings.clone(), true, With::Nothing),
        (32, rings, false, With::InFlight),
        (8, pair(1, 32), false, With::Nothing),
        (10, pair(1, 5), false, With::Nothing),
        (9, words(&[1, USER, USER + 0x1000, USER + 0x2000, 0]), false, With::Nothing),
        (13, words(&[1]), false, With::Event),
        (14, words(&[1]), false, With::Event),
        (12, words(&[1]), false, With::Event),
        (18, pair(1, 1), false, With::Nothing),
        (8, pair(1, 16), false, With::Nothing),
        (6, words(&[4096, 0]), true, With::Log),
        (2, words(&[FEATURES | 1 << 26]), false, With::Nothing),
        (38, words(&[0, 4 * MIB, MIB, USER + 4 * MIB, 0]), false, With::Nothing),
        (38, words(&[0, 4 * MIB, MIB, USER + 4 * MIB, 0]), false, With::Nothing),
        (18, pair(1, 0), false, With::Nothing),
        (18, pair(1, 1), false, With::Nothing),
        (2, words(&[FEATURES]), false, With::Nothing),
        (34, vec![], false, With::Nothing),
        (200, vec![], false, With::Nothing),
        (11, pair(1, 0), true, With::Nothing),
    ];
    let (memory, log, event, (socket, _ours)) = (memfd(MIB), memfd(4096), event(), UnixStream::pair().unwrap());
    let mut in_flight = Vec::new();
    let mut answers = Vec::new();
    for (n, (number, mut payload, says, with)) in requests.into_iter().enumerate() {
        between(n);
        let fds = match with {
            With::Nothing => vec![],
            With::Memory => vec![memory.as_fd()],
            With::Log => vec![log.as_fd()],
            With::Event => vec![lend(&event)],
            With::Socket => vec![socket.as_fd()],
            With::InFlight => {
                payload.clone_from(answers.last().unwrap());
                in_flight.iter().map(OwnedFd::as_fd).collect()
            }
        };
        if number == 16 {
            // That answers can be asked for is what it says.
            client.send(number, 1, &payload, &fds);
            continue;
        }
        client.send(number, 1 | if says { 0 } else { support::NEED_REPLY }, &payload, &fds);
        let (mut answer, came) = client.answer(number).unwrap_or_else(|| panic!("no answer to request {number}"));
        if number == 31 {
            in_flight = came;
        }
        if number == 11 {
            // How far it was served depends on how often it came to rest.
            answer.truncate(4);
        }
        answers.push(answer);
    }
    answers
}

#[test]
fn a_front_end_is_answered_in_the_same_way_whichever_message_its_back_end_is_replaced_before() {
    let chain = Chain::new();
    let mut requests = 0;
    let expected = talk(&chain.client(), |n| requests = n + 1);
    assert!(expected.iter().filter(|answer| **answer == 1u64.to_ne_bytes()).count() >= 5, "what is refused is");
    for at in 0..requests {
        let mut chain = Chain::new();
        let client = chain.client();
        let answers = talk(&client, |n| {
            if n == at {
                chain.next();
            }
        });
        assert_eq!(answers, expected, "replaced before request {at}");
    }
    // And before each of them.
    let mut chain = Chain::new();
    let client = chain.client();
    assert_eq!(talk(&client, |_| chain.next()), expected);
}
