//! A function whose next process goes on with the device while it runs.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use support::{FakeOwner, PIN, Rig, wait_for};
use wherry_handover::Registry;
use wherry_passthrough::Crew;
use wherry_state::{Saved, Section, StateUnit};

/// The process that is to take over from a rig's.
fn heir(rig: &Rig) -> Rig {
    let registry = Registry::of_successor();
    let entries = rig.registry.list();
    let copy = |entry: &wherry_handover::Entry| (entry.id.clone(), entry.as_fd().try_clone_to_owned().unwrap());
    registry.arrived(entries.iter().map(copy)).unwrap();
    let mut owner = FakeOwner::new("vfio-user:a");
    owner.unmasks_by.store(rig.owner.unmasks_by.load(Ordering::Acquire), Ordering::Release);
    owner.inherited = true;
    let heir = Rig::with(owner, 0, Crew::new(), registry);
    assert_eq!(heir.registry.unclaimed(), []);
    assert_eq!(heir.owner.take_asked(), [""; 0], "nothing is asked of it");
    heir
}

/// Comes to rest for another process; what goes over.
fn leave(rig: &Rig) -> Section {
    rig.registry.set_leaving(true);
    rig.function.drain(rig.deadline()).unwrap();
    rig.function.finish_stop(rig.deadline()).unwrap();
    let Saved::Section(section) = rig.function.save().unwrap() else { panic!("nothing to save") };
    section
}

/// It did not become another process's.
fn stay(rig: &Rig) {
    rig.function.start().unwrap();
    rig.registry.set_leaving(false);
}

#[test]
fn vectors_go_over_with_what_is_pending_and_what_was_signalled_meanwhile_and_the_device_is_told_nothing() {
    let rig = Rig::new(FakeOwner::new("vfio-user:a"));
    rig.open_msix();
    rig.set_entry(2, true);
    let there = heir(&rig);
    rig.owner.raise(2);
    rig.owner.take_asked();
    let section = leave(&rig);
    assert_eq!(rig.owner.take_asked(), ["rest"], "it runs on");
    rig.owner.raise(0);
    rig.owner.raise(3);
    assert_eq!(rig.delivered(0), None, "a second VM could not attach otherwise");
    there.function.restore(&section).unwrap();
    assert_eq!(there.delivered(0), None, "nothing is attached before it runs the machine");
    assert_eq!(there.owner.take_asked(), ["take left"]);
    there.registry.settle();
    there.function.start().unwrap();
    assert_eq!(there.owner.take_asked(), ["go on"]);
    let delivered: Vec<_> = (0..4).map(|vector| there.delivered(vector)).collect();
    assert_eq!(delivered, [Some(1), Some(0), None, Some(1)]);
    let mut pending = [0; 8];
    there.bus.read(there.bar2() + 0x1800, &mut pending);
    assert_eq!(pending[0], 1 << 2);
    // From now on it is as if it had been here from the beginning.
    there.set_entry(2, false);
    assert_eq!((there.delivered(2), there.owner.take_asked()), (Some(1), vec!["signal Msix from 2: 1".into()]));
    there.set_entry(1, true);
    assert_eq!(there.owner.take_asked(), ["signal Msix from 1: 1"]);
    rig.owner.raise(3);
    assert_eq!(there.delivered(3), Some(1));
}

#[test]
fn one_that_stays_has_lost_no_interrupt_and_can_be_left_again() {
    let rig = Rig::new(FakeOwner::new("vfio-user:a"));
    rig.open_msix();
    for _ in 0..3 {
        let there = heir(&rig);
        let section = leave(&rig);
        rig.owner.raise(1);
        there.function.restore(&section).unwrap();
        drop(there);
        stay(&rig);
        assert_eq!(rig.delivered(1), Some(1));
        rig.owner.raise(1);
        assert_eq!(rig.delivered(1), Some(1));
    }
    assert!(rig.owner.take_asked().contains(&"go on".into()));
    // A state that was not fetched is not that of a later stop.
    leave(&rig);
    stay(&rig);
    rig.function.finish_stop(rig.deadline()).unwrap();
    assert!(rig.function.save().is_err(), "its stream was not read");
}

#[test]
fn the_level_of_a_pin_is_asked_for_anew() {
    for by_event in [true, false] {
        let owner = FakeOwner::new("vfio-user:a");
        owner.unmasks_by.store(by_event, Ordering::Release);
        let rig = Rig::new(owner);
        rig.switch_on(true);
        if by_event {
            // Whoever owns it was asked when it was attached.
            assert_eq!(rig.router.told().attached[&PIN][0].1.as_ref().unwrap().read().unwrap(), 1);
        }
        let there = heir(&rig);
        let section = leave(&rig);
        assert_eq!(rig.router.delivered(PIN), None);
        // Signalled, and nobody saw it: a device that still means it signals again when it is unmasked.
        rig.owner.raise(0);
        there.function.restore(&section).unwrap();
        assert_eq!(there.router.delivered(PIN), None);
        there.owner.take_asked();
        there.registry.settle();
        there.function.start().unwrap();
        assert_eq!(there.router.delivered(PIN), Some(0));
        match by_event {
            true => assert_eq!(there.router.told().attached[&PIN][0].1.as_ref().unwrap().read().unwrap(), 1),
            false => wait_for("the owner to be asked", || there.owner.unmasked.swap(false, Ordering::AcqRel)),
        }
        rig.owner.raise(0);
        assert_eq!(there.router.delivered(PIN), Some(1));
        there.router.end_of_interrupt(PIN);
        let asked = || there.owner.unmasked.load(Ordering::Acquire);
        if !by_event {
            wait_for("the owner to be asked in the new process, not in the old one", asked);
        }
    }
}

#[test]
fn what_does_not_agree_is_refused_and_a_device_that_has_gone_cannot_be_left() {
    let rig = Rig::new(FakeOwner::new("vfio-user:a"));
    rig.open_msix();
    assert_eq!(rig.function.cannot_keep(), None);
    let there = heir(&rig);
    let section = leave(&rig);
    let stranger = Rig::new(FakeOwner::new("vfio-user:a"));
    let error = stranger.function.restore(&section).unwrap_err().to_string();
    assert!(error.contains("a connection that this process does not have"), "{error}");
    // The kind of interrupts, and how many of them: field 6, in it 1, in it 1 and 2.
    let told = [8, 3, 18, 4];
    let at = section.bytes.windows(4).position(|bytes| bytes == told).unwrap();
    let mut other = section.clone();
    other.bytes[at + 1] = 4;
    let error = there.function.restore(&other).unwrap_err().to_string();
    assert!(error.contains("interrupts of kind 4"), "{error}");
    stay(&rig);
    rig.owner.script().gone = true;
    rig.bus.read(rig.bar2() + 0x10, &mut [0; 4]);
    assert!(rig.function.cannot_keep().unwrap().contains("vfio-user:a (it has gone"));
    rig.registry.set_leaving(true);
    assert!(rig.function.drain(rig.deadline()).is_err() && rig.function.finish_stop(rig.deadline()).is_err());
}
