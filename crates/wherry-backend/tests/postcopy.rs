//! Memory that is not all there, with the front end's side of userfaultfd in the same process.
#![allow(clippy::unwrap_used, reason = "a failure is a panic here")]

mod support;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use support::{Client, Running, fd, memfd, start_ring, table, until, words};
use vm_memory::{Bytes, GuestAddress};
use wherry_fault::{Fault, Userfault};

const USER: u64 = 0x7f00_0000_0000;
const GUEST: u64 = 0x10_0000;
const MIB: u64 = 1 << 20;

/// A front end that has announced postcopy; none without userfaultfd.
fn announced(running: &Running) -> Option<(Client, Userfault)> {
    if let Err(error) = Userfault::open() {
        println!("SKIPPED: {error}");
        return None;
    }
    let client = running.client();
    client.agree();
    let (_, mut fds) = client.ask(28, &[], &[]);
    Some((client, Userfault::adopt(fds.pop().unwrap()).unwrap()))
}

/// Has the device read a page, and serves its fault as a front end does: where it was, in its addresses.
fn fault(running: &Running, userfault: &Userfault, memory: &OwnedFd, page: u64) -> u64 {
    let map = running.device.served(|given| given.memory.clone());
    let at = GUEST + page * 4096;
    let reads = std::thread::spawn(move || map.read_obj::<u64>(GuestAddress(at + 16)).unwrap());
    let mut faults: Vec<Fault> = Vec::new();
    let faults = std::cell::RefCell::new(&mut faults);
    until("a fault of the device", || {
        let mut faults = faults.borrow_mut();
        userfault.read_events(&mut faults).unwrap();
        !faults.is_empty()
    });
    assert!(!reads.is_finished());
    let address = faults.borrow()[0].address;
    // The front end has it in the file, and wakes.
    File::from(memory.try_clone().unwrap()).write_all_at(&[7; 4096], page * 4096).unwrap();
    userfault.wake(address & !4095, 4096).unwrap();
    assert_eq!(reads.join().unwrap(), u64::from_ne_bytes([7; 8]));
    address
}

#[test]
fn memory_that_is_missing_faults_after_the_acknowledgement_and_until_the_end() {
    let running = Running::new();
    let Some((client, userfault)) = announced(&running) else { return };
    let memory = memfd(MIB);
    assert!(client.order(29, &[], &[]));
    let (answer, _) = client.ask(5, &table(GUEST, MIB, USER), &fd(&memory));
    let said: Vec<_> = answer.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect();
    assert_eq!((said[0], said[1], said[2], said[4]), (1, GUEST, MIB, 0));
    let base = said[3];
    assert_ne!(base, USER, "an address of its own");
    client.send(5, 1, &words(&[0]), &[]);
    let _kick = start_ring(&client, 0, USER, 0);
    assert_eq!(fault(&running, &userfault, &memory, 9), base + 9 * 4096 + 16);
    assert_eq!(client.number(30, &[]), 0);
    // What nobody has filled is zero from now on.
    running.device.served(|given| assert_eq!(given.memory.read_obj::<u64>(GuestAddress(GUEST)).unwrap(), 0));
}

#[test]
fn memory_may_have_been_shown_before_the_front_end_listens() {
    let running = Running::new();
    let Some((client, userfault)) = announced(&running) else { return };
    let memory = memfd(MIB);
    assert!(client.order(5, &table(GUEST, MIB, USER), &fd(&memory)));
    assert!(client.order(29, &[], &[]));
    let _kick = start_ring(&client, 0, USER, 0);
    fault(&running, &userfault, &memory, 3);
    assert_eq!(client.number(30, &[]), 0);
}

#[test]
fn regions_that_come_one_by_one_are_closed_with_a_message_that_is_none_of_them() {
    let running = Running::new();
    let Some((client, userfault)) = announced(&running) else { return };
    let (memory, more) = (memfd(MIB), memfd(MIB));
    assert!(client.order(29, &[], &[]));
    let mut bases = Vec::new();
    for (guest, user, file) in [(GUEST, USER, &memory), (16 * MIB, USER + 16 * MIB, &more)] {
        let (answer, _) = client.ask(37, &words(&[0, guest, MIB, user, 0]), &fd(file));
        bases.push(u64::from_ne_bytes(answer[24..32].try_into().unwrap()));
    }
    client.send(37, 1, &words(&[0]), &[]);
    let _kick = start_ring(&client, 0, USER, 0);
    assert_eq!(fault(&running, &userfault, &memory, 1), bases[0] + 4096 + 16);
    assert_eq!(client.number(30, &[]), 0);
}

#[test]
fn a_front_end_that_goes_without_the_acknowledgement_or_the_end_leaves_a_back_end_for_the_next() {
    let running = Running::new();
    for acknowledged in [false, true] {
        let Some((client, userfault)) = announced(&running) else { return };
        let memory = memfd(MIB);
        assert!(client.order(29, &[], &[]));
        client.ask(5, &table(GUEST, MIB, USER), &fd(&memory));
        if acknowledged {
            client.send(5, 1, &words(&[0]), &[]);
            let _kick = start_ring(&client, 0, USER, 0);
            fault(&running, &userfault, &memory, 2);
        }
    }
    let client = running.client();
    client.agree();
    assert!(client.order(5, &table(GUEST, MIB, USER), &fd(&memfd(MIB))));
}

#[test]
fn a_device_that_waits_for_a_page_of_a_front_end_that_has_gone_is_not_given_zeros() {
    let mut running = Running::new();
    let Some((client, userfault)) = announced(&running) else { return };
    let memory = memfd(MIB);
    assert!(client.order(29, &[], &[]));
    client.ask(5, &table(GUEST, MIB, USER), &fd(&memory));
    client.send(5, 1, &words(&[0]), &[]);
    let _kick = start_ring(&client, 0, USER, 0);
    let map = running.device.served(|given| given.memory.clone());
    let reads = std::thread::spawn(move || map.read_obj::<u64>(GuestAddress(GUEST)).unwrap());
    let faults = std::cell::RefCell::new(Vec::new());
    until("a fault of the device", || {
        userfault.read_events(&mut faults.borrow_mut()).unwrap();
        !faults.borrow().is_empty()
    });
    *running.device.busy.lock().unwrap() = true;
    drop(client);
    let error = running.join().unwrap_err();
    assert!(error.to_string().contains("it is busy"), "{error}");
    assert!(!reads.is_finished(), "it has read what is not there");
    // For the thread of this test: the page comes after all.
    File::from(memory.try_clone().unwrap()).write_all_at(&[1; 4096], 0).unwrap();
    userfault.wake(faults.borrow()[0].address & !4095, 4096).unwrap();
    assert_eq!(reads.join().unwrap(), u64::from_ne_bytes([1; 8]));
}
