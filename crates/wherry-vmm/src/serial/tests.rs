use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;

use super::*;

const LIMIT: Duration = Duration::from_secs(20);

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "waited {LIMIT:?} for {what}");
        std::thread::yield_now();
    }
}

fn port(target: SerialTarget) -> (Arc<Serial>, EventFd) {
    let interrupt = event();
    (Serial::new(interrupt.try_clone().unwrap(), &target, None, &Registry::new()).unwrap(), interrupt)
}

fn out(serial: &Serial, register: u64, bytes: &[u8]) {
    for byte in bytes {
        serial.write(0x3f8, register, &[*byte]);
    }
}

fn register(serial: &Serial, register: u64) -> u8 {
    let mut data = [0];
    serial.read(0x3f8, register, &mut data);
    data[0]
}

/// Reads received bytes as a driver does, until there are `len`.
fn receive(serial: &Serial, len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    wait_for(&format!("{len} bytes of input"), || {
        while register(serial, 5) & 1 != 0 && bytes.len() < len {
            bytes.push(register(serial, 0));
        }
        bytes.len() == len
    });
    bytes
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

fn expect(stream: &mut UnixStream, text: &str) {
    let mut bytes = vec![0; text.len()];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(String::from_utf8_lossy(&bytes), text);
}

fn section(serial: &Serial) -> Section {
    match serial.save().unwrap() {
        Saved::Section(section) => section,
        Saved::Nothing => panic!("the unit has state"),
    }
}

#[test]
fn a_file_has_all_output_when_the_port_is_gone() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let (serial, _) = port(SerialTarget::File(file.path().into()));
    let text = "line of text\r\n".repeat(5000);
    out(&serial, 0, text.as_bytes());
    drop(serial);
    assert_eq!(std::fs::read_to_string(file.path()).unwrap(), text);
}

#[test]
fn a_file_that_cannot_be_created_is_an_error_with_its_path() {
    let target = SerialTarget::File("/nonexistent/log".into());
    let error = Serial::new(event(), &target, None, &Registry::new()).err().unwrap().to_string();
    assert!(error.contains("/nonexistent/log"), "{error}");
}

#[test]
fn clients_of_a_socket_come_and_go_and_see_what_was_written_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("serial");
    let (serial, interrupt) = port(SerialTarget::Socket(path.clone()));
    out(&serial, 0, b"before ");
    let mut first = connect(&path);
    expect(&mut first, "before ");
    out(&serial, 0, b"one");
    expect(&mut first, "one");

    out(&serial, 1, &[1]);
    first.write_all(b"hello").unwrap();
    assert_eq!(receive(&serial, 5), b"hello");
    wait_for("the interrupt", || interrupt.read().is_ok());
    drop(first);

    let mut second = connect(&path);
    // The console may still hold the first client; it has the second one when that is answered.
    second.write_all(b"!").unwrap();
    receive(&serial, 1);
    out(&serial, 0, b"two");
    expect(&mut second, "two");
    // The newest wins.
    let mut third = connect(&path);
    assert_eq!(second.read(&mut [0]).unwrap(), 0);
    out(&serial, 0, b"three");
    expect(&mut third, "three");
    drop(serial);
    assert_eq!(third.read(&mut [0]).unwrap(), 0, "the end of the port ends the connection");
    assert!(!path.exists(), "the socket was left behind");
}

#[test]
fn a_client_that_only_listens_or_leaves_early_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("serial");
    let (serial, _) = port(SerialTarget::Socket(path.clone()));
    let mut client = connect(&path);
    client.shutdown(std::net::Shutdown::Write).unwrap();
    out(&serial, 0, b"still here");
    expect(&mut client, "still here");

    // More than the FIFO holds, and nobody there any more.
    let mut client = connect(&path);
    let text: Vec<u8> = (0..1000).map(|i| i as u8).collect();
    client.write_all(&text).unwrap();
    drop(client);
    assert_eq!(receive(&serial, 1000), text);
}

#[test]
fn the_guest_never_waits_for_a_slow_or_absent_client_and_the_newest_output_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    for slow in [false, true] {
        let path = dir.path().join("serial");
        let (serial, _) = port(SerialTarget::Socket(path.clone()));
        let mut client = slow.then(|| connect(&path));
        for i in 0..200_000u32 {
            out(&serial, 0, format!("{i:6}").as_bytes());
        }
        assert!(serial.dropped() > 0);
        let client = client.get_or_insert_with(|| connect(&path));
        let mut seen = Vec::new();
        while !seen.ends_with(b"199999") {
            let mut bytes = [0; 4096];
            let len = client.read(&mut bytes).unwrap();
            assert!(len > 0, "the connection ended early");
            seen.extend_from_slice(&bytes[..len]);
        }
    }
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_respected() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("serial");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let (_serial, _) = port(SerialTarget::Socket(path.clone()));
    let error = Serial::new(event(), &SerialTarget::Socket(path.clone()), None, &Registry::new()).err().unwrap();
    assert!(matches!(&error, SerialError::Socket(SocketError::InUse(p)) if *p == path), "{error}");
    let file = dir.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(Serial::new(event(), &SerialTarget::Socket(file.clone()), None, &Registry::new()).is_err());
    assert_eq!(std::fs::read_to_string(file).unwrap(), "precious");
}

fn pipes(serial_of: impl FnOnce(OwnedFd, OwnedFd) -> Arc<Serial>) -> (Arc<Serial>, std::fs::File, std::fs::File) {
    let (in_read, in_write) = rustix::pipe::pipe().unwrap();
    let (out_read, out_write) = rustix::pipe::pipe().unwrap();
    (serial_of(in_read, out_write), in_write.into(), out_read.into())
}

#[test]
fn pipes_carry_both_directions_and_the_end_of_input_is_no_end_of_output() {
    let (serial, mut input, mut output) = pipes(|input, output| {
        let endpoint = Endpoint::streams(Some(input.into()), Some(output.into()), None, &Registry::new()).unwrap();
        Serial::with_endpoint(event(), endpoint, Registry::new()).unwrap()
    });
    input.write_all(b"in").unwrap();
    assert_eq!(receive(&serial, 2), b"in");
    drop(input);
    out(&serial, 0, b"out");
    let mut bytes = [0; 3];
    output.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"out");
    drop(output);
    out(&serial, 0, b"nobody reads this");
    drop(serial);
}

#[test]
fn a_pipe_that_nobody_reads_does_not_keep_the_port_from_ending() {
    let (serial, _input, _output) = pipes(|input, output| {
        let endpoint = Endpoint::streams(Some(input.into()), Some(output.into()), None, &Registry::new()).unwrap();
        Serial::with_endpoint(event(), endpoint, Registry::new()).unwrap()
    });
    out(&serial, 0, &[b'x'; 300_000]);
    drop(serial);
}

/// A process has one terminal: one test at a time has it.
static TERMINAL: Mutex<()> = Mutex::new(());

/// A terminal: the end of its user, and that of programs.
fn terminal() -> (OwnedFd, OwnedFd) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&controller).unwrap();
    unlockpt(&controller).unwrap();
    let name = ptsname(&controller, Vec::new()).unwrap();
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
    let terminal = rustix::fs::open(&name, flags, rustix::fs::Mode::empty()).unwrap();
    (controller, terminal)
}

fn settings(terminal: &OwnedFd) -> rustix::termios::Termios {
    rustix::termios::tcgetattr(terminal).unwrap()
}

fn is_raw(terminal: &OwnedFd) -> bool {
    !settings(terminal).local_modes.contains(rustix::termios::LocalModes::ICANON)
}

#[test]
fn a_terminal_is_raw_while_the_port_lives_and_ctrl_a_x_is_the_way_out() {
    let _one = TERMINAL.lock().unwrap_or_else(PoisonError::into_inner);
    let (controller, terminal) = terminal();
    let is_raw = || is_raw(&terminal);
    assert!(!is_raw());

    let escaped = event();
    let tell = escaped.try_clone().unwrap();
    let handler: EscapeHandler = Arc::new(move || tell.write(1).unwrap());
    let ends = || Arc::new(terminal.try_clone().unwrap());
    let registry = Registry::new();
    let endpoint = Endpoint::streams(Some(ends()), Some(ends()), Some(handler), &registry).unwrap();
    let serial = Serial::with_endpoint(event(), endpoint, registry.clone()).unwrap();
    assert!(is_raw());
    assert!(Endpoint::streams(Some(ends()), None, None, &registry).is_err(), "the terminal has two owners");
    rustix::io::write(&controller, b"a\x01\x01b\x01c\x03").unwrap();
    assert_eq!(receive(&serial, 6), b"a\x01b\x01c\x03");
    rustix::io::write(&controller, b"\x01x").unwrap();
    wait_for("the escape handler", || escaped.read().is_ok());
    restore_terminal();
    assert!(!is_raw());
    drop(serial);
    assert!(!is_raw());
}

#[test]
fn input_waits_while_the_unit_is_stopped_and_the_fifo_moves_with_the_state() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("serial");
    let (serial, _) = port(SerialTarget::Socket(path.clone()));
    out(&serial, 1, &[1]);
    out(&serial, 7, &[0x5a]);
    let mut client = connect(&path);
    client.write_all(b"abc").unwrap();
    wait_for("the first bytes", || register(&serial, 5) & 1 != 0);
    wait_for("all bytes", || SavedSerial::from_section(&section(&serial)).unwrap().received == b"abc");
    serial.begin_stop().unwrap();
    serial.finish_stop(Instant::now()).unwrap();
    let saved = section(&serial);
    client.write_all(b"late").unwrap();
    out(&serial, 0, b"x");
    expect(&mut client, "x");
    assert_eq!(section(&serial), saved, "a stopped port changed");

    // Elsewhere, the same bytes wait in the FIFO, and the interrupt is raised when the unit starts.
    let (other, interrupt) = port(SerialTarget::Null);
    other.restore(&saved).unwrap();
    assert!(interrupt.read().is_err(), "an interrupt before the start");
    assert_eq!(section(&other), saved);
    other.start().unwrap();
    assert_eq!(interrupt.read().unwrap(), 1);
    assert_eq!(register(&other, 7), 0x5a);
    assert_eq!(receive(&other, 3), b"abc");

    // Here, after a stop that was undone, nothing was lost either.
    serial.start().unwrap();
    assert_eq!(receive(&serial, 7), b"abclate");
}

/// What a successor is given of the descriptors of a registry.
fn handed_over(registry: &Registry) -> Arc<Registry> {
    let successor = Registry::of_successor();
    let entries = registry.list();
    let pass = |entry: &wherry_handover::Entry| {
        use std::os::fd::AsFd;
        (entry.id.clone(), entry.as_fd().try_clone_to_owned().unwrap())
    };
    successor.arrived(entries.iter().map(pass)).unwrap();
    successor
}

fn bring_to_rest(serial: &Serial, registry: &Registry) -> Section {
    registry.set_leaving(true);
    serial.drain(Instant::now() + LIMIT).unwrap();
    out(serial, 0, b"while it drains ");
    serial.begin_stop().unwrap();
    serial.finish_stop(Instant::now() + LIMIT).unwrap();
    section(serial)
}

#[test]
fn in_a_live_update_the_client_stays_and_what_is_on_its_way_goes_over_in_its_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("serial");
    let (target, registry) = (SerialTarget::Socket(path.clone()), Registry::new());
    let old = Serial::new(event(), &target, None, &registry).unwrap();
    let mut client = connect(&path);
    // More than the chip takes, and read from the socket.
    let input: Vec<u8> = (0..200).collect();
    client.write_all(&input).unwrap();
    wait_for("the first bytes", || register(&old, 5) & 1 != 0);
    let saved = bring_to_rest(&old, &registry);
    let state = SavedSerial::from_section(&saved).unwrap();
    assert_eq!([state.received.clone(), state.waiting_input.clone()].concat(), input, "{state:?}");
    assert_eq!(state.waiting_output, b"while it drains ");

    // One that loads it and gives up delivers nothing of it.
    let gives_up = Serial::new(event(), &target, None, &handed_over(&registry)).unwrap();
    gives_up.restore(&saved).unwrap();
    drop(gives_up);
    let successor = handed_over(&registry);
    let new = Serial::new(event(), &target, None, &successor).unwrap();
    assert!(successor.unclaimed().is_empty(), "{:?}", successor.unclaimed());
    // It is still the old one's: what comes now waits in the socket.
    client.write_all(b"late").unwrap();
    new.restore(&saved).unwrap();
    assert_eq!(section(&new), saved, "what is restored can be saved again");
    successor.settle();
    new.start().unwrap();
    out(&new, 0, b"second");
    expect(&mut client, "while it drains second");
    assert_eq!(receive(&new, 204), [&input[..], b"late"].concat());
    // The successor has what it needs to be replaced in its turn.
    assert_eq!(successor.list().len(), registry.list().len());
}

#[test]
fn an_update_that_is_given_up_goes_on_with_what_was_on_its_way() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("serial");
    let registry = Registry::new();
    let serial = Serial::new(event(), &SerialTarget::Socket(path.clone()), None, &registry).unwrap();
    let mut client = connect(&path);
    let input: Vec<u8> = (0..200).collect();
    client.write_all(&input).unwrap();
    wait_for("the first bytes", || register(&serial, 5) & 1 != 0);
    bring_to_rest(&serial, &registry);
    out(&serial, 0, b"out");
    registry.set_leaving(false);
    serial.start().unwrap();
    serial.undrain().unwrap();
    expect(&mut client, "while it drains out");
    assert_eq!(receive(&serial, 200), input);
    // One that is given up before the stop.
    registry.set_leaving(true);
    serial.drain(Instant::now() + LIMIT).unwrap();
    client.write_all(b"later").unwrap();
    registry.set_leaving(false);
    serial.undrain().unwrap();
    assert_eq!(receive(&serial, 5), b"later");
}

#[test]
fn a_port_that_was_at_the_end_of_its_input_has_none_in_the_new_process_either() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let (target, registry) = (SerialTarget::File(path.clone()), Registry::new());
    let old = Serial::new(event(), &target, None, &registry).unwrap();
    out(&old, 0, b"one ");
    wait_for("the first output", || std::fs::read(&path).unwrap() == b"one ");
    let saved = bring_to_rest(&old, &registry);
    let successor = handed_over(&registry);
    let new = Serial::new(event(), &target, None, &successor).unwrap();
    new.restore(&saved).unwrap();
    new.start().unwrap();
    out(&new, 0, b"two");
    wait_for("the file to go on", || std::fs::read(&path).unwrap() == b"one while it drains two");
    let nothing = Serial::new(event(), &SerialTarget::Stdio, None, &Registry::of_successor()).unwrap();
    out(&nothing, 0, b"to nobody");
}

#[test]
fn in_a_live_update_a_terminal_stays_raw_and_the_last_process_puts_it_back_as_the_first_has_found_it() {
    let _one = TERMINAL.lock().unwrap_or_else(PoisonError::into_inner);
    let (controller, terminal) = terminal();
    let before = format!("{:?}", settings(&terminal));
    let escaped = event();
    let handler = || -> EscapeHandler {
        let tell = escaped.try_clone().unwrap();
        Arc::new(move || tell.write(1).unwrap())
    };
    // What standard input and output are made of, in the old process and in the new one.
    let port = |registry: &Arc<Registry>| {
        let ends = ["serial/input", "serial/output"].map(|name| {
            let id = wherry_handover::KeptId::new(name, 0);
            let fd = registry.claim(&id).unwrap_or_else(|| terminal.try_clone().unwrap());
            registry.add(id, fd).unwrap()
        });
        let [input, output] = ends.map(Some);
        let endpoint = Endpoint::streams(input, output, Some(handler()), registry)?;
        Serial::with_endpoint(event(), endpoint, registry.clone())
    };
    let registry = Registry::new();
    let old = port(&registry).unwrap();
    rustix::io::write(&controller, b"abc\x01").unwrap();
    assert_eq!(receive(&old, 3), b"abc");
    let saved = loop {
        // The thread may not have read all of it.
        let saved = bring_to_rest(&old, &registry);
        if SavedSerial::from_section(&saved).unwrap().escaping {
            break saved;
        }
        registry.set_leaving(false);
        old.start().unwrap();
        old.undrain().unwrap();
    };
    // This process plays them all, and a process has one terminal.
    let had = users_terminal().unwrap();
    leave_terminal();
    let gives_up = port(&handed_over(&registry)).unwrap();
    gives_up.restore(&saved).unwrap();
    drop(gives_up);
    assert!(is_raw(&terminal), "a process that gave up has put it back");
    let unreadable = handed_over(&registry);
    let note = unreadable.add_note(wherry_handover::KeptId::new("other", 0), b"\x2a\x01x").unwrap();
    unreadable.arrived([(wherry_handover::KeptId::new("serial/terminal", 0), note.try_clone().unwrap())]).unwrap();
    let error = port(&unreadable).err().unwrap();
    assert!(error.to_string().contains("1 special codes"), "{error}");

    let successor = handed_over(&registry);
    let new = port(&successor).unwrap();
    assert!(successor.unclaimed().is_empty(), "{:?}", successor.unclaimed());
    assert_eq!(users_terminal().unwrap().1, had.1);
    new.restore(&saved).unwrap();
    assert_eq!(section(&new), saved, "what is restored can be saved again");
    successor.settle();
    new.start().unwrap();
    assert_eq!(successor.list().len(), registry.list().len());
    assert!(is_raw(&terminal));
    rustix::io::write(&controller, b"x").unwrap();
    wait_for("the escape handler of the new process, whose Ctrl-A the old one has read", || escaped.read().is_ok());
    drop(new);
    assert_eq!(format!("{:?}", settings(&terminal)), before);
    // The old one, by its end, changes nothing.
    let mut other = settings(&terminal);
    other.make_raw();
    rustix::termios::tcsetattr(&terminal, rustix::termios::OptionalActions::Now, &other).unwrap();
    drop(old);
    assert!(is_raw(&terminal));
    // The process that waits for the last one can put it back.
    restore_as(&had.0, &had.1).unwrap();
    assert_eq!(format!("{:?}", settings(&terminal)), before);
}

#[test]
fn impossible_state_is_refused() {
    let (serial, _) = port(SerialTarget::Null);
    let good = SavedSerial::from_section(&section(&serial)).unwrap();
    let refused = |saved: SavedSerial| port(SerialTarget::Null).0.restore(&saved.to_section(&serial.id())).is_err();
    assert!(refused(SavedSerial { line_status: 0x100, ..good.clone() }));
    assert!(refused(SavedSerial { divisor: 0x1_0000, ..good.clone() }));
    assert!(refused(SavedSerial { received: vec![0; 65], ..good }));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_access_panics_and_any_state_can_be_saved_and_restored(
        accesses in proptest::collection::vec(
            (any::<bool>(), 0u64..8, proptest::collection::vec(any::<u8>(), 1..9)), 1..60)
    ) {
        let (serial, _) = port(SerialTarget::Null);
        for (write, offset, mut data) in accesses {
            if write {
                serial.write(0x3f8, offset, &data);
            } else {
                serial.read(0x3f8, offset, &mut data);
            }
        }
        let saved = section(&serial);
        let (other, _) = port(SerialTarget::Null);
        other.restore(&saved).unwrap();
        prop_assert_eq!(section(&other), saved);
    }
}
