//! What the device of the example does not do: descriptors that tell of accesses, DMA of a thread of its own, refusals of every kind,
//! and a server that is stopped or loses its client in the middle of it.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use wherry_vfio_user::client::NoMemory;
use wherry_vfio_user::payload::IoFd;
use wherry_vfio_user::server::{DmaError, Host, Kept, Region};
use wherry_vfio_user::{Bus, Client, Description, Device, Migration, Options, State, Stop, VfioUserError};

use super::memory;
use super::raw::{LIMIT, Raw, longs, message, signals, version, words};

/// Two doorbells on one eventfd and one on another; fails as it is told.
struct Odd {
    bells: Vec<Arc<OwnedFd>>,
    fails: Arc<AtomicBool>,
    saved: u8,
}

impl Odd {
    fn outcome(&self) -> Result<(), Errno> {
        if self.fails.load(Ordering::SeqCst) { Err(Errno::NODEV) } else { Ok(()) }
    }
}

impl Device for Odd {
    fn description(&self) -> Description {
        let bell = |offset, fd_index, data| {
            let (kind, flags) = (IoFd::IOEVENTFD, IoFd::DATAMATCH);
            IoFd { offset, size: 4, fd_index, kind, flags, data }
        };
        let io_fds = vec![bell(0, 0, 1), bell(4, 1, 2), bell(8, 0, 3)];
        let region = Region { io_fds, descriptors: self.bells.clone(), ..Region::trapped(2 << 20) };
        let (regions, migration) = (vec![region], true);
        Description { resettable: true, regions, migration, ..Description::default() }
    }

    fn read(&mut self, _: &Bus, _: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.fill(offset as u8);
        self.outcome()
    }

    fn write(&mut self, _: &Bus, _: u32, _: u64, _: &[u8]) -> Result<(), Errno> {
        self.outcome()
    }

    fn reset(&mut self, _: &Bus) -> Result<(), Errno> {
        self.outcome()
    }

    fn kept(&mut self) -> Option<&mut dyn Kept> {
        None
    }

    fn migration(&mut self) -> Option<&mut dyn Migration> {
        Some(self)
    }
}

impl Migration for Odd {
    fn arc(&mut self, _: &Bus, from: State, to: State) -> Result<(), Errno> {
        // Only the last step of a way from RUNNING to STOP_COPY.
        if (from, to) == (State::Stop, State::StopCopy) || from == State::Resuming { self.outcome() } else { Ok(()) }
    }

    /// Without an end.
    fn save(&mut self, _: &Bus, into: &mut [u8]) -> Result<usize, Errno> {
        self.saved = self.saved.wrapping_add(1);
        into.fill(self.saved);
        self.outcome()?;
        // More than there was room for.
        Ok(into.len() + 5)
    }

    fn load(&mut self, _: &Bus, _: &[u8]) -> Result<(), Errno> {
        self.outcome()
    }

    fn estimate(&mut self, _: &Bus) -> u64 {
        u64::MAX
    }
}

/// A server of such a device with one client, over a pair of sockets; it gives what ended its session.
struct Serving {
    bus: Bus,
    stop: Stop,
    fails: Arc<AtomicBool>,
    thread: JoinHandle<Result<(), VfioUserError>>,
}

fn serve() -> (Serving, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let bells = (0..2).map(|_| Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap())).collect();
    let fails = Arc::new(AtomicBool::new(false));
    let mut device = Odd { bells, fails: fails.clone(), saved: 0 };
    let mut host = Host::new(&device).unwrap();
    let (bus, stop) = (host.bus().clone(), host.stop());
    let thread = std::thread::spawn(move || host.serve(theirs, &mut device));
    (Serving { bus, stop, fails, thread }, ours)
}

fn client() -> (Serving, Client) {
    let (serving, stream) = serve();
    (serving, Client::over(stream, "a server", Options::default(), Arc::new(NoMemory)).unwrap())
}

/// A client from the specification, with a map that is reached by messages.
fn raw() -> (Serving, Raw) {
    let (serving, stream) = serve();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let client = Raw(stream);
    client.ask(1, &version(0, 1, "")).unwrap();
    client.map(0, 0x1_0000, 3, None).unwrap();
    (serving, client)
}

#[test]
fn descriptors_that_tell_of_accesses_are_those_of_the_device() {
    let (_serving, client) = client();
    let io = client.region_io_fds(0).unwrap();
    assert_eq!(io.descriptors.len(), 2);
    let seen: Vec<_> = io.parts.iter().map(|part| (part.offset, part.size, part.fd_index, part.data)).collect();
    assert_eq!(seen, [(0, 4, 0, 1), (4, 4, 1, 2), (8, 4, 0, 3)]);
    rustix::io::write(&io.descriptors[1], &5_u64.to_ne_bytes()).unwrap();
    let again = client.region_io_fds(0).unwrap();
    assert_eq!((signals(&again.descriptors[0]), signals(&again.descriptors[1])), (0, 5));
}

#[test]
fn a_client_that_takes_too_few_descriptors_gets_none() {
    let (_serving, client) = raw();
    // 1, since it did not say.
    assert_eq!(client.ask(6, &words(&[200, 0, 0, 0])).unwrap_err(), 28);
}

#[test]
fn a_megabyte_goes_in_as_few_messages_as_there_may_be() {
    let (_serving, client) = client();
    let mut data = vec![1; 2 << 20];
    client.write(0, 0, &data).unwrap();
    client.read(0, 0, &mut data).unwrap();
    assert_eq!((data[0], data.len()), (0, 2 << 20));
}

#[test]
fn what_a_device_refuses_the_client_gets_as_its_error() {
    let (serving, client) = client();
    serving.fails.store(true, Ordering::SeqCst);
    let errors = [
        client.read(0, 0, &mut [0]),
        client.write(0, 0, &[0]),
        client.write_multi(&[(0, 0, &[1])]),
        client.reset(),
        client.set_state(State::StopCopy),
    ];
    for error in errors {
        assert_eq!(error.unwrap_err().refused_with(), Some(Errno::NODEV));
    }
    assert_eq!(client.state().unwrap(), State::Stop, "where the way that failed had come to");
    client.set_state(State::Resuming).unwrap();
    assert!(client.write_data(&[1]).is_err());
    assert!(client.set_state(State::Running).is_err());
    assert_eq!(client.state().unwrap(), State::Error);
    assert_eq!(client.set_state(State::Running).unwrap_err().refused_with(), Some(Errno::INVAL));
    serving.fails.store(false, Ordering::SeqCst);
    client.reset().unwrap();
    assert_eq!(client.state().unwrap(), State::Running);
}

#[test]
fn a_device_that_says_it_saved_more_than_there_was_room_for_is_cut() {
    let (_serving, client) = client();
    client.set_state(State::StopCopy).unwrap();
    assert_eq!(client.read_data(10).unwrap(), [1; 10]);
    assert_eq!(client.estimate().unwrap(), Some(u64::MAX));
}

#[test]
fn an_unmap_is_answered_when_no_thread_of_the_device_is_in_that_memory() {
    let (serving, client) = client();
    let memory = memory(1 << 20);
    let (ended, end) = mpsc::channel::<()>();
    let bus = serving.bus.clone();
    let thread = std::thread::spawn(move || {
        let mut done = 0_u64;
        while end.try_recv() == Err(mpsc::TryRecvError::Empty) {
            match bus.write(0x1000, &[0xff; 8192]) {
                Ok(()) => done += 1,
                Err(DmaError::Memory { source: Errno::FAULT, .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        done
    });
    let file = std::fs::File::from(memory.try_clone().unwrap());
    let deadline = Instant::now() + LIMIT;
    for _ in 0..20 {
        client.dma_map(0, 1 << 20, Some((memory.as_fd(), 0)), true, true).unwrap();
        let mut byte = [0];
        while byte == [0] {
            assert!(Instant::now() < deadline, "the device writes");
            file.read_exact_at(&mut byte, 0x2000).unwrap();
        }
        client.dma_unmap(0, 1 << 20).unwrap();
        // From here on nothing may come.
        file.write_all_at(&[0; 8192], 0x1000).unwrap();
        std::thread::yield_now();
        let mut after = [0xff; 8192];
        file.read_exact_at(&mut after, 0x1000).unwrap();
        assert!(after == [0; 8192], "a write after the unmap was answered");
    }
    ended.send(()).unwrap();
    assert!(thread.join().unwrap() > 0);
}

#[test]
fn a_thread_of_the_device_asks_for_memory_while_the_client_asks_for_other_things() {
    let (serving, client) = raw();
    let bus = serving.bus.clone();
    let thread = std::thread::spawn(move || {
        let mut data = [0; 16];
        bus.read(0x100, &mut data).map(|()| data)
    });
    let asked = client.receive().unwrap();
    assert_eq!((asked.command, asked.long(0), asked.long(8)), (11, 0x100, 16));
    // The device waits, and yet: a request of ours is answered.
    client.ask(4, &words(&[16, 0, 0, 0])).unwrap();
    client.send(&message(asked.id, 11, 1, &[longs(&[0x100, 16]), vec![3; 16]].concat()), &[]);
    assert_eq!(thread.join().unwrap().unwrap(), [3; 16]);
}

#[test]
fn a_client_that_is_lost_while_a_device_waits_for_its_memory_fails_that_alone() {
    let (serving, client) = raw();
    let bus = serving.bus.clone();
    let thread = std::thread::spawn(move || bus.write(0x100, &[1; 16]));
    assert_eq!(client.receive().unwrap().command, 12);
    drop(client);
    assert!(matches!(thread.join().unwrap(), Err(DmaError::Client { address: 0x100, .. })));
    assert!(matches!(serving.thread.join().unwrap(), Err(VfioUserError::Closed { .. })));
    assert!(matches!(serving.bus.read(0, &mut [0]), Err(DmaError::Memory { source: Errno::FAULT, .. })));
}

#[test]
fn a_server_that_is_stopped_leaves_its_client_and_waits_for_nothing() {
    let (serving, client) = raw();
    let bus = serving.bus.clone();
    let thread = std::thread::spawn(move || bus.write(0x100, &[1; 16]));
    assert_eq!(client.receive().unwrap().command, 12);
    serving.stop.stop();
    assert!(serving.stop.is_stopped());
    assert!(thread.join().unwrap().is_err());
    assert!(serving.thread.join().unwrap().is_err());
    assert!(client.receive().is_err());
}
