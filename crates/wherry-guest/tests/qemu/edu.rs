//! The load of QEMU's educational device, in QEMU itself: what a passed-through one is measured by.

use wherry_guest::report::{FailureKind, Phase};
use wherry_guest::snapshot::{EduSnapshot, Snapshot};

use crate::machine::{EMULATED, Machine};

/// Where the device is put.
const SLOT: u32 = 4;

fn start(line: &str, more: &[&str]) -> Option<Machine> {
    let device = format!("edu,addr={SLOT}");
    let more = [&["-device", &device], more].concat();
    let machine = Machine::start_with(1, 64, 64, &format!("data=1M rate=1M {line}"), &more);
    if machine.is_none() {
        println!("SKIPPED: qemu-system-x86_64 is not installed");
    }
    machine
}

fn edu(snapshot: &Snapshot) -> EduSnapshot {
    snapshot.edu.unwrap_or_else(|| panic!("no load of that device: {snapshot:#?}"))
}

/// Waits for so many rounds without a fault.
fn rounds(machine: &Machine, count: u64) -> EduSnapshot {
    let what = format!("{count} rounds");
    let snapshot = machine.wait(&what, |s| s.failure.is_some() || s.edu.is_some_and(|edu| edu.verified >= count));
    assert_eq!(snapshot.failure, None, "{}", machine.serial());
    edu(&snapshot)
}

fn finishes(machine: &Machine) -> EduSnapshot {
    machine.finish();
    let snapshot = machine.wait("the guest to finish", |s| s.phase() >= Phase::Finished);
    assert_eq!((snapshot.phase(), snapshot.failure.clone()), (Phase::Finished, None), "{}", machine.serial());
    edu(&snapshot)
}

/// Everything that was asked for was answered once, and all of it was right.
fn is_whole(edu: &EduSnapshot) {
    assert_eq!((edu.errors, edu.lost, edu.stalled, edu.spurious, edu.gone), (0, 0, 0, 0, false), "{edu:?}");
    assert_eq!((edu.asked, edu.interrupts), (edu.answered, edu.answered), "{edu:?}");
    assert_eq!(edu.dmas, 2 * edu.verified, "{edu:?}");
}

#[test]
fn dma_there_and_back_is_verified_and_every_msi_comes_once() {
    let Some(machine) = start("edu=msi edu_raises=7", &[]) else { return };
    assert_eq!(rounds(&machine, 3).interrupt, 2);
    let edu = finishes(&machine);
    is_whole(&edu);
    // Two of DMA and seven of others in each round.
    assert_eq!(edu.interrupts, 9 * edu.verified, "{edu:?}");
    // At the end, every buffer of at most 32 rounds is held.
    assert_eq!(edu.rechecked, 2 * edu.verified, "{edu:?}");
    assert!(edu.longest_ns > 90_000_000 && edu.latency_ns > 0 && edu.latency_ns < edu.longest_ns, "{edu:?}");
}

#[test]
fn the_pin_interrupts_once_for_each_time_that_it_goes_up() {
    // Emulated, because KVM without support of the processor may end the interrupt of a pin by itself, so that it comes again, 10,000 times
    // each (seen: within the handler, the local APIC has nothing in service).
    let Some(machine) = start("edu=intx edu_bytes=2048 edu_raises=16", &[EMULATED]) else { return };
    let edu = rounds(&machine, 2);
    assert_eq!((edu.interrupt, edu.bytes), (1, 2048));
    let edu = finishes(&machine);
    is_whole(&edu);
    assert_eq!(edu.interrupts, 18 * edu.verified, "{edu:?}");
}

#[test]
fn a_word_that_changes_after_the_device_has_brought_it_is_found() {
    let Some(machine) = start("edu=msi edu_raises=0", &[]) else { return };
    let edu = rounds(&machine, 2);
    // Of the buffer that came in the first round.
    let at = edu.pool_gpa + 3 * u64::from(edu.bytes) + 8 * 11;
    let right = machine.word(at);
    machine.write(at, &[right as u8 ^ 0x40]);
    machine.finish();
    let failed = machine.wait("the change to be found", |s| s.failure.is_some());
    assert_eq!(failed.failure.as_ref().unwrap().kind, Some(FailureKind::Edu), "{:?}", failed.failure);
    let edu = machine.wait("the report of it", |s| s.edu.is_some_and(|edu| edu.first_at != 0)).edu.unwrap();
    assert_eq!((edu.first_sequence, edu.first_at, edu.first_expected, edu.first_found), (1, at, right, right ^ 0x40));
}

#[test]
fn an_interrupt_that_does_not_come_is_missed_within_seconds_and_the_load_goes_on() {
    let Some(machine) = start("edu=msi edu_raises=0", &[]) else { return };
    let before = rounds(&machine, 1);
    // MSI off: its interrupts go to a pin that leads nowhere.
    machine.write_config(SLOT, 0x40, 0);
    let failed = machine.wait("a lost interrupt", |s| s.edu.is_some_and(|edu| edu.lost > 0));
    let failure = failed.failure.clone().unwrap();
    assert_eq!(failure.kind, Some(FailureKind::Edu));
    assert!(failure.message.contains("an interrupt was lost"), "{failure:?}");
    let later = machine.wait("another round", |s| s.edu.is_some_and(|edu| edu.verified > before.verified + 1));
    assert!(edu(&later).errors > 0, "its configuration has changed, and nobody saw: {later:#?}");
}

#[test]
fn a_guest_that_is_to_use_a_device_that_is_not_there_says_so() {
    let Some(machine) = Machine::start_split(1, 64, 64, "data=1M edu=msi") else {
        println!("SKIPPED: qemu-system-x86_64 is not installed");
        return;
    };
    let failure = machine.wait("the failure", |s| s.failure.is_some()).failure.unwrap();
    assert_eq!(failure.kind, Some(FailureKind::Edu));
    assert!(failure.message.contains("there is none on PCI bus 0"), "{failure:?}");
}
