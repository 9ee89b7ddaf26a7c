//! KVM's dirty log with a real guest: what it writes is reported, exactly, and nothing is lost between reading the log
//! and clearing it.

#![allow(clippy::unwrap_used, reason = "a failure is a panic here")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{STEP, arrive, config, copy_ram, heartbeat, until};
use vm_memory::{Bytes, GuestAddress};
use wherry_guest::report;
use wherry_memory::{Block, DirtySource, GRANULE, PageSet, Ram};
use wherry_migration::machine::Machine;
use wherry_vmm::vm::Vm;

const LIMIT: Duration = Duration::from_secs(30);

fn booted(cmdline: &str, memory: u64, cpus: u32) -> Arc<Vm> {
    let vm = Vm::boot(config(cmdline, memory, cpus)).unwrap();
    vm.resume().unwrap();
    until("all vCPUs to beat", LIMIT, || (0..cpus as usize).all(|cpu| heartbeat(vm.ram(), cpu) > 1000));
    vm
}

fn source(vm: &Vm, name: &str) -> Arc<dyn DirtySource> {
    vm.dirty_sources().iter().find(|s| s.name() == name).unwrap().clone()
}

fn collect(source: &dyn DirtySource, block: &Block) -> PageSet {
    let mut set = PageSet::new(block.pages());
    source.collect(block, &mut set).unwrap();
    set
}

/// The page that vCPU 0 writes all the time.
const BEAT: u64 = report::heartbeat_gpa(0) / GRANULE;

/// Lets the guest run until vCPU 0 has written its page, and stops it.
fn one_beat(vm: &Vm) {
    let before = heartbeat(vm.ram(), 0);
    vm.resume().unwrap();
    until("a heartbeat", LIMIT, || heartbeat(vm.ram(), 0) > before);
    vm.pause().unwrap();
}

#[test]
fn a_page_written_between_reading_and_clearing_is_not_lost() {
    let vm = booted("data=1M rate=0", 64 << 20, 1);
    let (log, block) = (source(&vm, "kvm"), &vm.ram().blocks()[0]);
    vm.pause().unwrap();
    log.start().unwrap();
    one_beat(&vm);
    let all = collect(&*log, block);
    assert!(all.contains(BEAT));
    log.rearm(block, 0..block.pages(), &all).unwrap();
    let taken = collect(&*log, block);
    assert!(taken.is_empty(), "everything was cleared: {:?}", taken.runs(0..u64::MAX).collect::<Vec<_>>());

    one_beat(&vm);
    log.rearm(block, 0..block.pages(), &taken).unwrap();
    assert!(collect(&*log, block).contains(BEAT), "clearing what was taken leaves what came later");

    // What would happen if more were cleared than was taken: this test can fail.
    one_beat(&vm);
    log.rearm(block, 0..block.pages(), &PageSet::full(block.pages())).unwrap();
    assert!(!collect(&*log, block).contains(BEAT));
}

#[test]
fn a_page_is_reported_again_only_after_it_was_rearmed_and_written() {
    let vm = booted("data=1M rate=0", 64 << 20, 1);
    let (log, block) = (source(&vm, "kvm"), &vm.ram().blocks()[0]);
    vm.pause().unwrap();
    log.start().unwrap();
    one_beat(&vm);
    let taken = collect(&*log, block);
    assert_eq!(collect(&*log, block), taken, "reading does not clear");
    let word = BEAT / 64 * 64;
    log.rearm(block, word..word + 64, &taken).unwrap();
    let left = collect(&*log, block);
    assert!(!left.contains(BEAT));
    assert!(taken.runs(0..u64::MAX).flatten().all(|p| left.contains(p) != (word..word + 64).contains(&p)));
    one_beat(&vm);
    assert!(collect(&*log, block).contains(BEAT));
    log.stop().unwrap();
    assert!(log.collect(block, &mut PageSet::new(block.pages())).is_err(), "a log that is off does not claim silence");
}

#[test]
fn writes_of_the_vmm_are_in_its_own_source_and_not_in_kvms() {
    let vm = booted("data=1M rate=0", 64 << 20, 1);
    let block = &vm.ram().blocks()[0];
    vm.pause().unwrap();
    let (kvm, vmm) = (source(&vm, "kvm"), source(&vm, "vmm"));
    kvm.start().unwrap();
    vmm.start().unwrap();
    let page = block.pages() - 3;
    vm.ram().memory().write_obj(1u64, GuestAddress(page * GRANULE)).unwrap();
    assert!(!collect(&*kvm, block).contains(page));
    let own = collect(&*vmm, block);
    assert_eq!((own.count(), own.contains(page)), (1, true));
}

fn assert_same_ram(a: &Ram, b: &Ram) {
    for (a, b) in a.blocks().iter().zip(b.blocks()) {
        let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        for block in [a, b] {
            for run in block.data_runs(0..u64::MAX) {
                let run = run.unwrap();
                for at in (run.start..run.end).step_by(1 << 20) {
                    let len = (run.end - at).min(1 << 20) as usize;
                    a.read_at(at, &mut left[..len]).unwrap();
                    b.read_at(at, &mut right[..len]).unwrap();
                    let page = left[..len].chunks(4096).zip(right[..len].chunks(4096)).position(|(l, r)| l != r);
                    assert!(page.is_none(), "page {} differs", at / GRANULE + page.unwrap_or(0) as u64);
                }
            }
        }
    }
}

#[test]
fn copying_what_is_reported_gives_the_same_memory_although_the_guest_writes_all_the_time() {
    for cpus in [1, 2] {
        let vm = booted("data=16M rate=max", 64 << 20, cpus);
        let there = arrive(&vm.description());
        vm.dirty_sources().iter().for_each(|s| s.start().unwrap());
        copy_ram(vm.ram(), there.ram());
        let block = &vm.ram().blocks()[0];
        let round = || {
            let mut taken = PageSet::new(block.pages());
            vm.dirty_sources().iter().for_each(|s| s.collect(block, &mut taken).unwrap());
            // In pieces, as the engine's channels do it: clear, then read.
            for start in (0..block.pages()).step_by(1024) {
                let range = start..(start + 1024).min(block.pages());
                vm.dirty_sources().iter().for_each(|s| s.rearm(block, range.clone(), &taken).unwrap());
                for page in taken.runs(range).flatten() {
                    let mut bytes = [0; GRANULE as usize];
                    block.read_at(page * GRANULE, &mut bytes).unwrap();
                    there.ram().memory().write_slice(&bytes, GuestAddress(page * GRANULE)).unwrap();
                }
            }
            taken.count()
        };
        let mut reported = 0;
        for _ in 0..8 {
            let before = heartbeat(vm.ram(), 0);
            until("the guest to go on", LIMIT, || heartbeat(vm.ram(), 0) > before + 500);
            reported += round();
        }
        assert!(reported > 8);
        vm.units().stop(STEP).unwrap();
        let state = vm.units().save().unwrap();
        round();
        assert_same_ram(vm.ram(), there.ram());
        there.units().restore(&state).unwrap();
        there.units().start().unwrap();
        let before = heartbeat(there.ram(), 0);
        until("the guest to go on there", LIMIT, || heartbeat(there.ram(), 0) > before + 500);
        common::Probe::of(there.ram()).assert_healthy();
    }
}

#[test]
fn a_log_that_is_started_twice_forgets_what_came_before() {
    let vm = booted("data=1M rate=0", 64 << 20, 1);
    let (log, block) = (source(&vm, "kvm"), &vm.ram().blocks()[0]);
    log.start().unwrap();
    one_beat(&vm);
    assert!(collect(&*log, block).contains(BEAT));
    log.start().unwrap();
    assert!(collect(&*log, block).is_empty());
    one_beat(&vm);
    assert!(collect(&*log, block).contains(BEAT));
    log.stop().unwrap();
    log.stop().unwrap();
}

#[test]
fn a_range_that_is_not_whole_words_of_the_bitmap_is_refused() {
    let vm = booted("data=1M rate=0", 64 << 20, 1);
    let (log, block) = (source(&vm, "kvm"), &vm.ram().blocks()[0]);
    log.start().unwrap();
    let set = PageSet::full(block.pages());
    assert!(log.rearm(block, 1..64, &set).is_err());
    assert!(log.rearm(block, 0..63, &set).is_err());
    assert!(log.rearm(block, 0..128, &PageSet::full(64)).is_err());
    log.rearm(block, 0..64, &set).unwrap();
}
