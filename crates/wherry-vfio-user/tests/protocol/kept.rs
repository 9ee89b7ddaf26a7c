//! A connection that another process goes on with: here, another client.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::client::{Memory, Served, copy};
use super::event;
use super::raw::{Raw, message, version, words};
use wherry_vfio_user::client::NoMemory;
use wherry_vfio_user::payload::pci_irq;
use wherry_vfio_user::{Client, DmaHandler, Options, VfioUserError};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// Another client on the same connection.
fn heir(client: &Client, memory: Arc<dyn DmaHandler>) -> Client {
    let (connection, twin) = client.descriptors();
    let own = |socket: &(dyn AsFd + Send + Sync)| socket.as_fd().try_clone_to_owned().unwrap();
    let sockets: (OwnedFd, Option<OwnedFd>) = (own(&*connection), twin.map(|twin| own(&*twin)));
    Client::inherit(sockets, &client.note(), "an heir", Options::default(), memory).unwrap()
}

#[test]
fn a_server_does_not_notice_that_its_client_is_another_one() {
    for twin in [false, true] {
        let served = Served::new(twin);
        let memory = Arc::new(Memory::new());
        let mut client = served.client(memory.clone());
        client.dma_map(0, 0x2_0000, None, true, false).unwrap();
        client.dma_map(0x2_0000, 0x2_0000, None, true, true).unwrap();
        let events = [event(), event()];
        client.set_triggers(pci_irq::MSIX, 0, &events.each_ref().map(AsFd::as_fd)).unwrap();
        for round in 0..5 {
            copy(&client, 0x1000, 0x2_1000, 0x8000).unwrap();
            let next = heir(&client, memory.clone());
            // One that is given up takes nothing along.
            drop(heir(&client, memory.clone()));
            client.info().unwrap();
            let left = client.rest(soon()).unwrap();
            next.take(&left).unwrap();
            next.go_on();
            // It rests, so the connection is not its own any more.
            drop(std::mem::replace(&mut client, next));
            assert_eq!((client.has_twin_socket(), client.extensions().p2p), (twin, true), "round {round}");
            // What it was told is known: a map that is there, and the interrupts that are in use.
            let error = client.dma_map(0x1000, 0x1000, None, true, true).unwrap_err();
            assert!(matches!(error, VfioUserError::Lacks { .. }), "{error}");
            let error = client.set_triggers(pci_irq::INTX, 0, &[events[0].as_fd()]).unwrap_err();
            assert!(matches!(error, VfioUserError::Lacks { .. }), "{error}");
        }
        copy(&client, 0x1000, 0x2_1000, 0x8000).unwrap();
        client.dma_unmap(0, 0x2_0000).unwrap();
    }
}

#[test]
fn who_rests_goes_on_and_requests_meanwhile_wait() {
    let served = Served::new(true);
    let client = served.client(Arc::new(NoMemory));
    std::thread::scope(|scope| {
        let asking = || (0..300).for_each(|_| assert_eq!(client.info().unwrap().third, 9));
        let askers: Vec<_> = (0..3).map(|_| scope.spawn(asking)).collect();
        while !askers.iter().all(|asker| asker.is_finished()) {
            client.rest(soon()).unwrap();
            client.go_on();
        }
    });
}

/// A server that says the same whoever asks: it answers the version, and nothing else by itself.
fn silent(limit: Duration) -> (Client, Raw) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = Raw(theirs);
    server.send(&message(0, 1, 1, &version(0, 1, "{}")), &[]);
    let options = Options { limit, slow_limit: limit, ..Options::default() };
    let client = Client::over(ours, "a script", options, Arc::new(NoMemory)).unwrap();
    assert_eq!(server.receive().unwrap().command, 1);
    (client, server)
}

#[test]
fn what_has_come_of_a_message_is_carried_wherever_it_was_cut() {
    // A command, and the late reply to a request that was given up: the peer does not notice either.
    let command = message(77, 11, 0, &[0; 16]);
    for cut in 0..command.len() {
        let (client, server) = silent(Duration::from_millis(50));
        assert!(matches!(client.info(), Err(VfioUserError::Deadline { .. })));
        let asked = server.receive().unwrap();
        (&server.0).write_all(&command[..cut]).unwrap();
        let next = heir(&client, Arc::new(NoMemory));
        next.take(&client.rest(soon()).unwrap()).unwrap();
        drop(client);
        (&server.0).write_all(&command[cut..]).unwrap();
        next.go_on();
        let answer = server.receive().unwrap();
        assert_eq!((answer.id, answer.command), (77, 11), "cut at {cut}");
        let late = message(asked.id, 4, 1, &words(&[16, 3, 99, 99]));
        (&server.0).write_all(&late).unwrap();
        std::thread::scope(|scope| {
            let info = scope.spawn(|| next.info());
            let asked_again = server.receive().unwrap();
            assert_ne!(asked_again.id, asked.id, "its number is not free yet");
            (&server.0).write_all(&message(asked_again.id, 4, 1, &words(&[16, 3, 9, 5]))).unwrap();
            assert_eq!(info.join().unwrap().unwrap().third, 9, "cut at {cut}");
        });
    }
}

#[test]
fn a_command_that_has_come_is_answered_before_the_client_rests_and_an_answer_is_waited_for() {
    let (client, server) = silent(Duration::from_secs(20));
    let burst: Vec<u8> = (0..20u16).flat_map(|id| message(id, 11, 0, &[0; 16])).collect();
    (&server.0).write_all(&burst).unwrap();
    // All of them are there before it is told to rest.
    let answers: Vec<u16> = (0..20).map(|_| server.receive().unwrap().id).collect();
    assert_eq!(answers, (0..20).collect::<Vec<_>>());
    std::thread::scope(|scope| {
        let info = scope.spawn(|| client.info());
        let asked = server.receive().unwrap();
        let error = client.rest(Instant::now() + Duration::from_millis(30)).unwrap_err().to_string();
        assert!(error.contains("come to rest"), "{error}");
        let resting = scope.spawn(|| client.rest(soon()));
        (&server.0).write_all(&message(asked.id, 4, 1, &words(&[16, 3, 9, 5]))).unwrap();
        assert_eq!(info.join().unwrap().unwrap().third, 9);
        resting.join().unwrap().unwrap();
        client.go_on();
    });
    drop(server);
    assert!(matches!(client.info(), Err(VfioUserError::Closed { .. })));
    assert!(client.rest(soon()).is_err(), "there is nothing to go on with");
}

#[test]
fn what_another_process_left_is_checked() {
    let (client, _server) = silent(Duration::from_secs(20));
    let next = heir(&client, Arc::new(NoMemory));
    for bad in [&[0xff; 5][..], &[], &[10, 2, 8, 1, 18, 0], &[10, 4, 0x1a, 2, 1, 2, 1], &[10, 4, 8, 0x80, 0x80, 4]] {
        let error = next.take(bad).unwrap_err().to_string();
        assert!(error.contains("as another process left it"), "{error}");
    }
    let (connection, twin) = client.descriptors();
    assert!(twin.is_none());
    let own = || connection.as_fd().try_clone_to_owned().unwrap();
    for (twin, note) in [(Some(own()), client.note()), (None, vec![0xff; 3])] {
        let options = Options::default();
        assert!(Client::inherit((own(), twin), &note, "an heir", options, Arc::new(NoMemory)).is_err());
    }
    assert_eq!(client.rest(soon()).unwrap(), client.rest(soon()).unwrap());
}
