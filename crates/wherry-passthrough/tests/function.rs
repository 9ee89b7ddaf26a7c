//! A function as its guest sees it, and what its owner is asked.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::sync::atomic::Ordering;

use support::{BAR0, FakeOwner, PIN, Rig, TABLE, wait_for};
use wherry_memory::{DirtySource, PageSet};
use wherry_passthrough::FunctionIdentity;
use wherry_pci::Doorbell;

#[test]
fn bars_are_the_owners_but_for_the_table_of_msix() {
    let rig = Rig::new(FakeOwner::new("vfio-user:a"));
    rig.switch_on(false);
    assert_eq!(rig.owner.take_asked()[..2], ["map 0x100000 at 0x0", "write config at 0x4: [6, 0]"]);
    let mut data = [0; 4];
    assert!(rig.bus.read(BAR0 + 0x10, &mut data));
    assert_eq!(data, [0x5a; 4]);
    rig.bus.write(BAR0 + 0x10, &[1, 2]);
    assert_eq!(rig.owner.take_asked(), ["read BAR 0 at 0x10", "write BAR 0 at 0x10"]);
    rig.set_entry(1, true);
    assert!(rig.bus.read(rig.bar2() + TABLE + 16, &mut data));
    assert_eq!(data, 0xfee0_0000u32.to_le_bytes());
    assert_eq!(rig.owner.take_asked(), [""; 0], "the table is ours");
    rig.write(4, &[0, 4]);
    assert!(!rig.bus.read(BAR0, &mut data), "decoding is off");
}

#[test]
fn what_a_bar_shows_is_mapped_without_the_pages_of_msix_and_what_rings_is_rung() {
    let rig = Rig::new(FakeOwner::new("vfio-user:a").with_memory());
    rig.switch_on(false);
    let at = rig.bar2();
    assert_eq!(*rig.guest.shown.lock().unwrap(), [(at, 0x1000), (at + 0x2000, 0x2000)]);
    assert_eq!(*rig.guest.bells.lock().unwrap(), [Doorbell { address: at + 0x20, len: 4, data: None }]);
    rig.write(4, &[0, 4]);
    assert_eq!(*rig.guest.shown.lock().unwrap(), [(0, 0), (0, 0)]);
    assert_eq!(*rig.guest.bells.lock().unwrap(), []);
}

#[test]
fn a_vector_that_is_masked_waits_and_is_delivered_when_it_is_not() {
    let rig = Rig::new(FakeOwner::new("vfio-user:a"));
    rig.open_msix();
    rig.owner.raise(2);
    assert_eq!((rig.delivered(2), rig.delivered(1)), (Some(1), Some(0)));
    rig.owner.take_asked();
    rig.set_entry(2, true);
    assert_eq!(rig.owner.take_asked(), ["signal Msix from 2: 1"], "only what has changed is told");
    rig.owner.raise(2);
    rig.owner.raise(2);
    assert_eq!(rig.delivered(2), None, "nothing is attached");
    let mut pending = [0; 8];
    rig.bus.read(rig.bar2() + 0x1800, &mut pending);
    assert_eq!(pending[0], 1 << 2);
    rig.set_entry(2, false);
    assert_eq!(rig.delivered(2), Some(1), "twice is once");
    rig.owner.raise(2);
    assert_eq!(rig.delivered(2), Some(1));
}

#[test]
fn one_kind_of_interrupt_is_in_use_at_a_time() {
    let rig = Rig::new(FakeOwner::new("vfio-user:a"));
    rig.switch_on(true);
    assert!(rig.owner.take_asked().contains(&"signal Intx from 0: 1".to_owned()));
    rig.owner.raise(0);
    assert_eq!(rig.router.delivered(PIN), Some(1));
    // MSI with two vectors.
    rig.write(0x54, &0xfee0_0000u64.to_le_bytes()[..4]);
    rig.write(0x5c, &0x60u16.to_le_bytes());
    rig.write(0x52, &0x0011u16.to_le_bytes());
    let asked = rig.owner.take_asked();
    assert_eq!(asked, ["silence Intx", "signal Msi from 0: 2"], "{asked:?}");
    assert_eq!(rig.router.delivered(PIN), None);
    rig.owner.raise(1);
    // Inputs are reserved for MSI-X first.
    assert_eq!(rig.delivered(4 + 1), Some(1));
    rig.write(0x42, &0x8000u16.to_le_bytes());
    assert_eq!(rig.owner.take_asked(), ["silence Msi", "signal Msix from 0: 4"]);
}

#[test]
fn a_pin_is_unmasked_by_message_where_its_owner_takes_no_eventfd() {
    let owner = FakeOwner::new("vfio-user:a");
    owner.unmasks_by.store(false, Ordering::Release);
    let rig = Rig::new(owner);
    rig.switch_on(true);
    wait_for("the first unmasking", || rig.owner.unmasked.swap(false, Ordering::AcqRel));
    rig.owner.raise(0);
    assert_eq!(rig.router.delivered(PIN), Some(1));
    rig.router.end_of_interrupt(PIN);
    wait_for("the owner to be asked", || rig.owner.unmasked.load(Ordering::Acquire));
}

#[test]
fn a_reset_by_the_guest_is_one_of_the_owners_and_its_interrupts_are_told_anew() {
    let rig = Rig::new(FakeOwner::new("vfio-user:a"));
    rig.open_msix();
    rig.owner.take_asked();
    rig.write(0x68, &0x8010u16.to_le_bytes());
    let asked = rig.owner.take_asked();
    assert_eq!(asked[..3], ["write config at 0x68: [10, 0]", "silence Msix", "reset"], "{asked:?}");
    assert_eq!(rig.read(0x40) >> 16, 3, "MSI-X is off");
    assert!(!rig.bus.read(BAR0, &mut [0]), "decoding is off");
    rig.open_msix();
    rig.owner.raise(3);
    assert_eq!(rig.delivered(3), Some(1));
}

#[test]
fn a_function_that_is_let_go_has_no_memory_and_no_interrupts_and_is_as_new() {
    let rig = Rig::new(FakeOwner::new("vfio-user:a"));
    rig.open_msix();
    rig.owner.take_asked();
    rig.function.release();
    assert_eq!(rig.owner.take_asked(), ["silence Msix", "unmap 0x100000 at 0x0", "reset"]);
    rig.owner.script().gone = true;
    rig.function.release();
    assert_eq!(rig.owner.take_asked(), [""; 0], "who has gone is asked nothing more");
}

#[test]
fn a_device_that_has_gone_reads_as_ones_and_blocks_a_move() {
    let rig = Rig::new(FakeOwner::new("vfio-user:a"));
    rig.switch_on(false);
    assert_eq!(rig.function.blocker(), None);
    rig.owner.script().gone = true;
    let mut data = [0; 4];
    rig.bus.read(BAR0, &mut data);
    assert_eq!(data, [0xff; 4]);
    rig.bus.write(BAR0, &data);
    assert_eq!(rig.read(0x68), 0xffff_ffff, "its part of configuration space");
    assert_eq!(rig.read(0), 0x1010_1af4, "our part");
    assert!(rig.function.blocker().unwrap().contains("vfio-user:a has gone"));
}

#[test]
fn what_it_writes_is_dirty_once_and_all_of_memory_is_where_it_cannot_tell() {
    let rig = Rig::new(FakeOwner::new("vfio-user:a"));
    let (log, block) = (rig.function.log().clone(), &rig.ram.blocks()[0]);
    let mut set = PageSet::new(block.pages());
    assert!(log.collect(block, &mut set).unwrap_err().to_string().contains("vfio-user[0]"));
    log.start().unwrap();
    rig.owner.script().log = vec![1 << 5, 0, 1];
    log.collect(block, &mut set).unwrap();
    assert_eq!(set.runs(0..256).collect::<Vec<_>>(), [5..6, 128..129]);
    set.clear();
    log.collect(block, &mut set).unwrap();
    assert!(set.is_empty());
    log.stop().unwrap();
    assert_eq!(rig.owner.take_asked().last().unwrap(), "stop log");

    let mut owner = FakeOwner::new("vfio-user:b");
    owner.facts.logging = false;
    let rig = Rig::new(owner);
    let block = &rig.ram.blocks()[0];
    // SAFETY: inside the map, and nobody else knows of it.
    #[allow(unsafe_code, reason = "allocates a page")]
    unsafe {
        block.engine_map().add(9 * 4096).write_volatile(1);
    }
    rig.function.log().start().unwrap();
    rig.function.log().collect(block, &mut set).unwrap();
    assert_eq!(set.runs(0..256).next(), Some(9..10));
    assert_eq!(set.count(), 1);
}

#[test]
fn another_device_is_told_from_the_same_by_name() {
    let (one, mut other) = (FakeOwner::new("a"), FakeOwner::new("b"));
    let wanted = FunctionIdentity::of(&one.facts);
    assert_eq!(wanted.lacking(&FunctionIdentity::of(&other.facts)), [""; 0]);
    other.facts.migration = None;
    let here = FunctionIdentity::of(&other.facts);
    assert!(wanted.lacking(&here)[0].contains("cannot be migrated"));
    other.facts.msix = 8;
    other.facts.bars[0].size = 0x200;
    other.facts.config[2] = 0x11;
    let reasons = wanted.lacking(&FunctionIdentity::of(&other.facts));
    assert_eq!(reasons.len(), 3, "{reasons:?}");
    assert!(reasons[0].contains("1af4:1010") && reasons[0].contains("1af4:1011"), "{reasons:?}");
}

#[test]
fn an_owner_is_told_when_its_function_is_let_go() {
    let Rig { owner, function, .. } = Rig::new(FakeOwner::new("vfio-user:a"));
    drop(function);
    assert!(owner.closed.load(Ordering::Acquire));
}
