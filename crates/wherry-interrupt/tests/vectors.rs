//! Vectors and pins against a router that remembers.
#![cfg(feature = "testing")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;

use wherry_handover::{Registry, Shelf};
use wherry_interrupt::fake::FakeRouter;
use wherry_interrupt::{Events, Input, Intx, Message, Setting, Signal, Vectors};

fn open(data: u32) -> Setting {
    Setting { message: Message { address: 0xfee0_0000, data }, open: true }
}

fn closed(data: u32) -> Setting {
    Setting { open: false, ..open(data) }
}

fn vectors(count: u16) -> (Arc<FakeRouter>, Vectors) {
    let router = Arc::new(FakeRouter::default());
    (router.clone(), Vectors::new(router, &Events::own(), count).unwrap())
}

#[test]
fn an_open_vector_reaches_the_hypervisor_and_a_closed_one_becomes_pending() {
    let (router, vectors) = vectors(1);
    let vector = vectors.get(0).unwrap();
    vector.raise();
    assert!(vector.pending());
    assert_eq!(router.delivered(vector.input()), None, "nothing is attached while it is closed");
    vectors.set(&[open(0x41)]).unwrap();
    assert_eq!(router.delivered(vector.input()), Some(1), "what was pending is delivered once");
    assert!(!vector.pending());
    vector.raise();
    assert_eq!(router.delivered(vector.input()), Some(1));
    vectors.set(&[closed(0x41)]).unwrap();
    assert_eq!(router.delivered(vector.input()), None);
    assert_eq!(router.told().routes[&vector.input()], Message { address: 0xfee0_0000, data: 0x41 });
}

#[test]
fn a_device_in_another_process_is_told_which_eventfd_to_signal_and_neither_loses_anything() {
    let (router, vectors) = vectors(1);
    let vector = vectors.get(0).unwrap();
    assert_eq!(vector.signal(), Signal::Interrupt);
    vector.interrupt_event().write(1).unwrap();
    assert!(vector.pending());
    vectors.set(&[open(1)]).unwrap();
    assert_eq!((vector.signal(), router.delivered(vector.input())), (Signal::KvmInterrupt, Some(1)));
    // It signals the old one once more before it hears of the change.
    vector.interrupt_event().write(1).unwrap();
    vector.collect();
    assert_eq!(router.delivered(vector.input()), Some(1));
    // And the other way round.
    vectors.set(&[closed(1)]).unwrap();
    vector.kvm_interrupt_event().write(1).unwrap();
    assert!(vector.pending());
}

#[test]
fn what_is_set_together_is_routed_in_one_batch_and_what_does_not_change_not_at_all() {
    let (router, vectors) = vectors(3);
    vectors.set(&[open(1), closed(2), open(3)]).unwrap();
    assert_eq!(router.told().batches, 1);
    assert_eq!(router.told().routes.len(), 2);
    vectors.set(&[open(1), closed(2), open(3)]).unwrap();
    assert_eq!(router.told().batches, 1);
    vectors.set(&[open(9), closed(2), open(3)]).unwrap();
    assert_eq!(router.told().batches, 2);
    assert_eq!(router.told().routes[&vectors.get(0).unwrap().input()].data, 9);
}

#[test]
fn at_rest_nothing_is_attached_and_what_is_raised_is_delivered_afterwards() {
    let (router, vectors) = vectors(2);
    vectors.set(&[open(1), closed(2)]).unwrap();
    vectors.rest().unwrap();
    let (first, second) = (vectors.get(0).unwrap(), vectors.get(1).unwrap());
    assert_eq!(router.delivered(first.input()), None);
    first.raise();
    second.raise();
    assert!(!first.pending(), "the guest's pending bit is that of a masked vector");
    vectors.resume().unwrap();
    assert_eq!((router.delivered(first.input()), router.delivered(second.input())), (Some(1), None));
    assert!(second.pending());
}

#[test]
fn saved_vectors_are_attached_only_when_they_resume_and_deliver_what_was_pending() {
    let (_, source) = vectors(2);
    source.set(&[open(1), closed(2)]).unwrap();
    source.rest().unwrap();
    source.get(0).unwrap().raise();
    source.get(1).unwrap().interrupt_event().write(1).unwrap();
    let saved = source.save();

    let (router, destination) = vectors(2);
    destination.restore(&saved).unwrap();
    let (first, second) = (destination.get(0).unwrap(), destination.get(1).unwrap());
    assert_eq!(router.delivered(first.input()), None, "local APICs are restored first");
    assert_eq!(router.told().batches, 1);
    destination.resume().unwrap();
    assert_eq!(router.delivered(first.input()), Some(1));
    assert!(second.pending());
    destination.set(&[open(1), open(2)]).unwrap();
    assert_eq!(router.delivered(second.input()), Some(1));
}

#[test]
fn a_reset_forgets_what_is_pending() {
    let (router, vectors) = vectors(1);
    vectors.get(0).unwrap().raise();
    vectors.forget_pending();
    vectors.set(&[open(1)]).unwrap();
    assert_eq!(router.delivered(vectors.get(0).unwrap().input()), Some(0));
}

#[test]
fn a_function_that_goes_leaves_no_input_behind() {
    let (router, vectors) = vectors(4);
    vectors.set(&[open(1); 4]).unwrap();
    drop(vectors);
    let told = router.told();
    assert!(told.reserved.is_empty() && told.routes.is_empty() && told.attached.values().all(Vec::is_empty));
}

const PIN: Input = Input(17);

#[test]
fn a_pin_is_asserted_again_until_the_device_has_been_served() {
    let router = Arc::new(FakeRouter::default());
    let pin = Intx::new(router.clone(), PIN).unwrap();
    assert_eq!(router.delivered(PIN), None, "a pin that is never used costs nothing");
    pin.set_level(true).unwrap();
    assert_eq!(router.delivered(PIN), Some(1));
    pin.set_level(true).unwrap();
    assert_eq!(router.delivered(PIN), Some(0), "it is asserted already");
    router.end_of_interrupt(PIN);
    pin.resample();
    assert_eq!(router.delivered(PIN), Some(1));
    pin.set_level(false).unwrap();
    router.end_of_interrupt(PIN);
    pin.resample();
    assert_eq!(router.delivered(PIN), Some(0));
}

#[test]
fn two_pins_share_an_input_and_each_asserts_it_until_it_has_been_served() {
    let router = Arc::new(FakeRouter::default());
    let (one, other) = (Intx::new(router.clone(), PIN).unwrap(), Intx::new(router.clone(), PIN).unwrap());
    one.set_level(true).unwrap();
    other.set_level(true).unwrap();
    assert_eq!(router.delivered(PIN), Some(2));
    one.set_level(false).unwrap();
    router.end_of_interrupt(PIN);
    one.resample();
    other.resample();
    assert_eq!(router.delivered(PIN), Some(1));
}

#[test]
fn a_pin_that_is_switched_off_or_at_rest_asserts_when_that_ends() {
    let router = Arc::new(FakeRouter::default());
    let pin = Intx::new(router.clone(), PIN).unwrap();
    pin.enable(false).unwrap();
    pin.set_level(true).unwrap();
    assert_eq!(router.delivered(PIN), None);
    pin.enable(true).unwrap();
    assert_eq!(router.delivered(PIN), Some(1));
    pin.rest().unwrap();
    assert_eq!(router.delivered(PIN), None);
    pin.resume().unwrap();
    assert_eq!(router.delivered(PIN), Some(1), "the level is not carried: it is asserted anew");
}

#[test]
fn what_is_relayed_reaches_the_guest_without_an_eventfd_and_nothing_is_lost_at_either_end_of_it() {
    let router = Arc::new(FakeRouter::default());
    let shelf = Shelf::new(Registry::new(), "d");
    for (events, foreign) in [(Events::own(), false), (Events::kept(shelf), true)] {
        let vectors = Vectors::new(router.clone(), &events, 3).unwrap();
        vectors.set(&[open(0x41), open(0x42), closed(0x43)]).unwrap();
        let [first, second, masked] = [0, 1, 2].map(|n| vectors.get(n).unwrap().clone());
        let injected = || std::mem::take(&mut router.told().injected).iter().map(|m| m.data).collect::<Vec<_>>();
        for round in 0..3 {
            vectors.relay().unwrap();
            assert_eq!(router.delivered(first.input()), None, "nothing is attached");
            first.raise();
            assert_eq!(injected(), [0x41], "round {round}");
            masked.raise();
            assert!(injected().is_empty() && masked.pending());
            if foreign {
                // Of another process: the thread passes it on.
                second.kvm_interrupt_event().write(1).unwrap();
                let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
                while router.told().injected.is_empty() {
                    assert!(std::time::Instant::now() < deadline, "waited for an interrupt to be passed on");
                    std::thread::yield_now();
                }
                assert_eq!(injected(), [0x42]);
            }
            // Unmasked while it is relayed.
            vectors.set(&[open(0x41), open(0x42), open(0x43)]).unwrap();
            assert_eq!(injected(), [0x43]);
            vectors.set(&[open(0x41), open(0x42), closed(0x43)]).unwrap();
            if round == 1 {
                vectors.end_relay().unwrap();
            } else {
                // At rest it waits, whoever signals it.
                vectors.rest().unwrap();
                second.kvm_interrupt_event().write(1).unwrap();
                first.raise();
                vectors.resume().unwrap();
                assert_eq!(router.delivered(first.input()), Some(1));
                assert_eq!(router.delivered(second.input()), Some(1));
            }
            assert!(injected().is_empty());
            first.raise();
            assert_eq!(router.delivered(first.input()), Some(1), "attached again");
        }
    }
}
