use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes as _, GuestAddress};
use wherry_handover::{KeptId, Registry};
use wherry_state::{Saved, StateUnit};

use super::*;
use crate::support::*;

const VERSION_1: u64 = 1 << 32;
const DATA: u64 = 0x4_0000;
/// Bytes between buffers.
const STEP: u64 = 0x1_0000;

struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn target(&self, name: &str) -> ConsoleTarget {
        ConsoleTarget::Socket(self.path(name))
    }

    fn driver(&self, target: &ConsoleTarget) -> Driver {
        let mut driver = idle(target);
        driver.set_up_rings(VERSION_1, 2);
        driver
    }

    fn connect(&self, name: &str) -> UnixStream {
        connect(&self.path(name))
    }
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

/// One whose driver has not begun.
fn idle(target: &ConsoleTarget) -> Driver {
    let outside = Arc::new(Outside::open(target, &Registry::new()).unwrap());
    let driver = Driver::new(Arc::new(Console::new(outside, 0).unwrap()), ram());
    driver.switch_on(true);
    driver
}

fn buffer(n: u16) -> u64 {
    DATA + STEP * u64::from(n)
}

/// Has the guest write.
fn say(driver: &mut Driver, n: u16, bytes: &[u8]) {
    driver.memory().write_slice(bytes, GuestAddress(buffer(n))).unwrap();
    driver.descriptor_of(TRANSMIT, n, buffer(n), bytes.len() as u32, 0, 0);
    driver.offer_on(TRANSMIT, n);
}

/// Gives the device a buffer for input.
fn give(driver: &mut Driver, n: u16, len: u32) {
    driver.descriptor_of(RECEIVE, n, buffer(n), len, WRITE, 0);
    driver.offer_on(RECEIVE, n);
}

/// What the guest is given next.
fn heard(driver: &mut Driver) -> Vec<u8> {
    let (n, len) = driver.used_on(RECEIVE);
    let mut bytes = vec![0; len as usize];
    driver.memory().read_slice(&mut bytes, GuestAddress(buffer(n as u16))).unwrap();
    bytes
}

fn read(stream: &mut impl Read, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Bytes of which no two parts look the same.
fn text(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|n| (n ^ n >> 8 ^ n >> 16) as u8).collect()
}

fn rest(driver: &Driver) -> Section {
    driver.function.drain(soon()).unwrap();
    driver.function.begin_stop().unwrap();
    driver.function.finish_stop(soon()).unwrap();
    let Saved::Section(section) = driver.function.save().unwrap() else { panic!("it has state") };
    section
}

/// The same, when as much output waits as there is room for.
fn rest_full(driver: &Driver) -> Section {
    let mut section = rest(driver);
    until("so much output that it has to wait", || {
        let full = SavedConsole::from_section(&section).unwrap().output.len() == MOST_OUTPUT;
        if !full {
            driver.function.start().unwrap();
            section = rest(driver);
        }
        full
    });
    section
}

/// The same guest on another device with this at its other end.
fn arrive(from: &Driver, section: &Section, target: &ConsoleTarget) -> Driver {
    let outside = Arc::new(Outside::open(target, &Registry::new()).unwrap());
    let mut driver = Driver::new(Arc::new(Console::new(outside, 0).unwrap()), from.ram.clone());
    driver.function.restore(section).unwrap();
    driver.follow(from);
    driver
}

/// Has the guest write more than the outside takes at once, until it has to wait. The number of bytes.
fn flood(driver: &mut Driver) -> usize {
    const LEN: usize = STEP as usize;
    for n in 0..14 {
        say(driver, n, &text(usize::from(n) * LEN, LEN));
    }
    14 * LEN
}

#[test]
fn bytes_go_both_ways_in_order() {
    let lab = Lab::new();
    let mut driver = lab.driver(&lab.target("s"));
    let mut client = lab.connect("s");
    for n in 0..8u16 {
        say(&mut driver, n, &text(usize::from(n) * 100, 100));
        assert_eq!(driver.used_on(TRANSMIT), (n.into(), 0));
    }
    assert_eq!(read(&mut client, 800), text(0, 800));
    give(&mut driver, 8, 4);
    give(&mut driver, 9, 16);
    client.write_all(b"hello world").unwrap();
    assert_eq!(heard(&mut driver), b"hell");
    assert_eq!(heard(&mut driver), b"o world");
    assert!(driver.interrupts(0).is_some());
}

#[test]
fn input_that_comes_before_the_driver_or_its_buffers_waits() {
    let lab = Lab::new();
    let mut driver = idle(&lab.target("s"));
    lab.connect("s").write_all(b"early ").unwrap();
    driver.set_up_rings(VERSION_1, 2);
    let mut client = lab.connect("s");
    client.write_all(b"and late").unwrap();
    let mut all = Vec::new();
    for n in 0.. {
        if all.len() == 14 {
            break;
        }
        give(&mut driver, n % 16, 4);
        all.extend(heard(&mut driver));
    }
    assert_eq!(all, b"early and late");
}

#[test]
fn a_guest_without_anybody_who_listens_is_not_held_up_and_its_last_words_wait() {
    let lab = Lab::new();
    let mut driver = lab.driver(&lab.target("s"));
    let total = flood(&mut driver);
    for n in 0..14 {
        assert_eq!(driver.used_on(TRANSMIT), (n, 0));
    }
    let mut client = lab.connect("s");
    assert_eq!(read(&mut client, MOST_OUTPUT), text(total - MOST_OUTPUT, MOST_OUTPUT));
}

#[test]
fn output_waits_for_a_client_that_does_not_read_and_nothing_is_lost_or_there_twice() {
    let lab = Lab::new();
    let mut driver = lab.driver(&lab.target("s"));
    let mut client = lab.connect("s");
    say(&mut driver, 15, b"!");
    assert_eq!(read(&mut client, 1), b"!");
    let total = flood(&mut driver);
    // The socket takes some, and some waits here: the last buffers stay with the guest.
    rest_full(&driver);
    assert!(driver.used_index_on(TRANSMIT) < 15, "all of it was taken");
    driver.function.start().unwrap();
    assert_eq!(read(&mut client, total), text(0, total));
    until("the guest to have its buffers back", || driver.used_index_on(TRANSMIT) == 15);
}

#[test]
fn what_waits_moves_with_the_guest_to_whoever_listens_there() {
    let lab = Lab::new();
    let mut driver = lab.driver(&lab.target("s"));
    let mut client = lab.connect("s");
    say(&mut driver, 15, b"!");
    assert_eq!(read(&mut client, 1), b"!");
    client.write_all(b"typed").unwrap();
    let total = flood(&mut driver);
    let section = rest_full(&driver);
    let saved = SavedConsole::from_section(&section).unwrap();
    assert_eq!((saved.input.as_slice(), saved.output.len()), (b"typed".as_slice(), MOST_OUTPUT));
    assert!(saved.begun > 0, "the part of a buffer is not there");

    let mut there = arrive(&driver, &section, &lab.target("t"));
    // The source may go before the destination runs. Its client keeps what it was sent, and gets no more.
    drop(driver);
    let mut first = Vec::new();
    client.read_to_end(&mut first).unwrap();
    let mut other = lab.connect("t");
    there.function.start().unwrap();
    first.extend(read(&mut other, total - first.len()));
    assert_eq!(first, text(0, total));
    give(&mut there, 15, 100);
    assert_eq!(heard(&mut there), b"typed");
    say(&mut there, 14, b"on");
    assert_eq!(read(&mut other, 2), b"on");
}

#[test]
fn a_move_that_fails_loses_nothing() {
    let lab = Lab::new();
    let mut driver = lab.driver(&lab.target("s"));
    let mut client = lab.connect("s");
    client.write_all(b"typed").unwrap();
    say(&mut driver, 15, b"!");
    assert_eq!(read(&mut client, 1), b"!");
    let total = flood(&mut driver);
    let section = rest_full(&driver);
    client.write_all(b" on").unwrap();
    drop(section);
    driver.function.start().unwrap();
    assert_eq!(read(&mut client, total), text(0, total));
    let mut all = Vec::new();
    for n in 0.. {
        if all.len() == 8 {
            break;
        }
        give(&mut driver, n, 100);
        all.extend(heard(&mut driver));
    }
    assert_eq!(all, b"typed on");
}

#[test]
fn what_a_client_did_not_take_is_for_the_next_one_and_what_it_sent_arrives() {
    let lab = Lab::new();
    let mut driver = lab.driver(&lab.target("s"));
    let mut first = lab.connect("s");
    say(&mut driver, 0, b"one");
    assert_eq!(read(&mut first, 3), b"one");
    first.write_all(b"bye").unwrap();
    drop(first);
    give(&mut driver, 1, 100);
    assert_eq!(heard(&mut driver), b"bye");
    // The newest client has it, even if an older one hangs.
    let _hangs = lab.connect("s");
    let mut last = lab.connect("s");
    last.write_all(b"x").unwrap();
    give(&mut driver, 2, 100);
    assert_eq!(heard(&mut driver), b"x");
    say(&mut driver, 3, b"two");
    assert_eq!(read(&mut last, 3), b"two");
}

#[test]
fn a_driver_that_breaks_a_rule_needs_a_reset_and_can_begin_anew() {
    let lab = Lab::new();
    let mut driver = lab.driver(&lab.target("s"));
    driver.descriptor_of(TRANSMIT, 0, DATA, 16, WRITE, 0);
    driver.offer_on(TRANSMIT, 0);
    until("the need of a reset", || driver.status() & 0x40 != 0);
    driver.set_up_rings(VERSION_1, 2);
    driver.descriptor_of(RECEIVE, 0, DATA, 16, 0, 0);
    driver.offer_on(RECEIVE, 0);
    let mut client = lab.connect("s");
    client.write_all(b"x").unwrap();
    until("the need of a reset", || driver.status() & 0x40 != 0);
    driver.set_up_rings(VERSION_1, 2);
    say(&mut driver, 0, b"again");
    assert_eq!(driver.used_on(TRANSMIT), (0, 0));
    // The client that came while it was broken is served.
    assert_eq!(read(&mut client, 5), b"again");
}

#[test]
fn impossible_state_is_refused() {
    let lab = Lab::new();
    let driver = lab.driver(&lab.target("s"));
    let good = SavedConsole::from_section(&rest(&driver)).unwrap();
    let refused = |saved: SavedConsole, word: &str| {
        let console = Console::new(Arc::new(Outside::open(&lab.target("t"), &Registry::new()).unwrap()), 0).unwrap();
        let error = console.restore(&saved.to_section(&UnitId::new(KIND.name, 0))).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    };
    refused(SavedConsole { input: vec![0; MOST_INPUT + 1], ..good.clone() }, "waiting input");
    refused(SavedConsole { output: vec![0; MOST_OUTPUT + 1], ..good.clone() }, "waiting output");
    refused(SavedConsole { transport: None, ..good }, "transport");
}

#[test]
fn a_file_is_appended_to_and_has_the_last_words() {
    let lab = Lab::new();
    let path = lab.path("log");
    std::fs::write(&path, "before\n").unwrap();
    let mut driver = lab.driver(&ConsoleTarget::File(path.clone()));
    say(&mut driver, 0, b"last words\n");
    assert_eq!(driver.used_on(TRANSMIT), (0, 0));
    drop(driver);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "before\nlast words\n");
}

#[test]
fn the_end_waits_for_a_client_that_reads_slowly() {
    let lab = Lab::new();
    let mut driver = lab.driver(&lab.target("s"));
    let mut client = lab.connect("s");
    say(&mut driver, 15, b"!");
    assert_eq!(read(&mut client, 1), b"!");
    let len = 4 * STEP as usize;
    for n in 0..4 {
        say(&mut driver, n, &text(usize::from(n) * STEP as usize, STEP as usize));
    }
    until("the console to have taken it all", || driver.used_index_on(TRANSMIT) == 5);
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        client.read_to_end(&mut all).unwrap();
        all
    });
    drop(driver);
    assert_eq!(reader.join().unwrap(), text(0, len));
}

#[test]
fn a_terminal_is_found_by_its_link_and_raw() {
    let lab = Lab::new();
    let link = lab.path("tty");
    let mut driver = lab.driver(&ConsoleTarget::Pty(link.clone()));
    let error = Outside::open(&ConsoleTarget::Pty(link.clone()), &Registry::new()).unwrap_err();
    assert!(matches!(error, OutsideError::InUse(_)), "{error}");
    let mut terminal = std::fs::File::options().read(true).write(true).open(&link).unwrap();
    say(&mut driver, 0, b"login:\n");
    assert_eq!(read(&mut terminal, 7), b"login:\n");
    give(&mut driver, 1, 100);
    terminal.write_all(b"\x03root\r").unwrap();
    let mut all = heard(&mut driver);
    for n in 2.. {
        if all.len() == 6 {
            break;
        }
        give(&mut driver, n, 100);
        all.extend(heard(&mut driver));
    }
    assert_eq!(all, b"\x03root\r");
    // Nobody reads it now, and the guest goes on.
    drop(terminal);
    flood(&mut driver);
    until("the guest to have its buffers back", || driver.used_index_on(TRANSMIT) == 15);
    drop(driver);
    assert!(std::fs::symlink_metadata(&link).is_err(), "the link is still there");
    std::fs::write(&link, "precious").unwrap();
    let error = Outside::open(&ConsoleTarget::Pty(link), &Registry::new()).unwrap_err();
    assert!(matches!(error, OutsideError::NoLink(_)), "{error}");
}

#[test]
fn a_socket_of_a_process_that_lives_is_left_alone_and_ours_is_removed() {
    let lab = Lab::new();
    let outside = Outside::open(&lab.target("s"), &Registry::new()).unwrap();
    let error = Outside::open(&lab.target("s"), &Registry::new()).unwrap_err();
    assert!(matches!(error, OutsideError::Socket(_)) && error.to_string().contains("/s;"), "{error}");
    drop(outside);
    assert!(!lab.path("s").exists());
    // What a dead process leaves behind.
    drop(std::os::unix::net::UnixListener::bind(lab.path("s")).unwrap());
    drop(Outside::open(&lab.target("s"), &Registry::new()).unwrap());
    let error = Outside::open(&ConsoleTarget::File("/nonexistent/log".into()), &Registry::new()).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/log"), "{error}");
}

/// A device with what a registry has at its other end, and that registry's successor.
fn replaced(from: &Driver, registry: &Registry, section: &Section, target: &ConsoleTarget) -> (Driver, Arc<Registry>) {
    use std::os::fd::AsFd;
    let successor = Registry::of_successor();
    let entries = registry.list();
    let pass = |entry: &wherry_handover::Entry| (entry.id.clone(), entry.as_fd().try_clone_to_owned().unwrap());
    successor.arrived(entries.iter().map(pass)).unwrap();
    let outside = Arc::new(Outside::open(target, &successor).unwrap());
    assert!(successor.unclaimed().is_empty(), "{:?}", successor.unclaimed());
    let mut driver = Driver::new(Arc::new(Console::new(outside, 0).unwrap()), from.ram.clone());
    driver.function.restore(section).unwrap();
    driver.follow(from);
    (driver, successor)
}

fn kept(target: &ConsoleTarget) -> (Driver, Arc<Registry>) {
    let registry = Registry::new();
    let outside = Arc::new(Outside::open(target, &registry).unwrap());
    let mut driver = Driver::new(Arc::new(Console::new(outside, 0).unwrap()), ram());
    driver.switch_on(true);
    driver.set_up_rings(VERSION_1, 2);
    (driver, registry)
}

#[test]
fn in_a_live_update_a_client_stays_and_hears_and_says_everything_once() {
    let lab = Lab::new();
    let target = lab.target("s");
    let (mut old, registry) = kept(&target);
    let mut client = lab.connect("s");
    say(&mut old, 0, b"before ");
    assert_eq!(read(&mut client, 7), b"before ");
    client.write_all(b"to the old one ").unwrap();
    let section = rest(&old);
    // It is nobody's while it is on its way.
    client.write_all(b"to nobody yet").unwrap();
    let (mut new, successor) = replaced(&old, &registry, &section, &target);
    std::mem::forget(old);
    assert!(successor.list().iter().any(|entry| entry.id == KeptId::new("console/client", 0)));
    successor.settle();
    new.function.start().unwrap();
    say(&mut new, 1, b"after");
    assert_eq!(read(&mut client, 5), b"after");
    let mut bytes = Vec::new();
    for n in 2..12 {
        give(&mut new, n, 64);
    }
    while bytes.len() < 28 {
        bytes.extend(heard(&mut new));
    }
    assert_eq!(bytes, b"to the old one to nobody yet");
    // Others come as ever, and the socket is still the same.
    let mut next = lab.connect("s");
    until("the next client to be heard", || {
        say(&mut new, 1, b"x");
        next.set_read_timeout(Some(std::time::Duration::from_millis(20))).unwrap();
        next.read_exact(&mut [0]).is_ok()
    });
}

#[test]
fn in_a_live_update_a_pseudo_terminal_and_a_file_are_the_same_ones() {
    let lab = Lab::new();
    let link = lab.path("tty");
    let target = ConsoleTarget::Pty(link.clone());
    let (mut old, registry) = kept(&target);
    let mut terminal = std::fs::File::options().read(true).write(true).open(&link).unwrap();
    say(&mut old, 0, b"one");
    assert_eq!(read(&mut terminal, 3), b"one");
    let section = rest(&old);
    drop(replaced(&old, &registry, &section, &target));
    assert!(link.exists(), "a process that did not take over has removed the link");
    let (mut new, successor) = replaced(&old, &registry, &section, &target);
    std::mem::forget(old);
    successor.settle();
    new.function.start().unwrap();
    say(&mut new, 1, b"two");
    assert_eq!(read(&mut terminal, 3), b"two");
    drop(new);
    assert!(std::fs::symlink_metadata(&link).is_err(), "the link goes with the last process");

    let path = lab.path("file");
    let target = ConsoleTarget::File(path.clone());
    let (mut old, registry) = kept(&target);
    say(&mut old, 0, b"one ");
    until("the output", || std::fs::read(&path).unwrap() == b"one ");
    let section = rest(&old);
    let (mut new, successor) = replaced(&old, &registry, &section, &target);
    std::mem::forget(old);
    successor.settle();
    new.function.start().unwrap();
    say(&mut new, 1, b"two");
    until("the output to go on", || std::fs::read(&path).unwrap() == b"one two");
}

#[test]
fn a_successor_without_the_other_end_of_a_console_is_told_which_is_missing() {
    let lab = Lab::new();
    for target in [lab.target("s"), ConsoleTarget::Pty(lab.path("t")), ConsoleTarget::File(lab.path("f"))] {
        let error = Outside::open(&target, &Registry::of_successor()).unwrap_err().to_string();
        assert!(error.contains("there is no descriptor console/"), "{error}");
    }
}
