//! The probe guest under QEMU, watched from outside through its RAM memfd.
//!
//! Needs `qemu-system-x86_64`; without it each test prints `SKIPPED:` and why. Uses KVM where it can be opened, else
//! emulation.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod edu;
mod machine;

use std::mem::offset_of;

use machine::Machine;
use wherry_guest::data::{Entry, Generation, PAGE_WORDS, first_difference, page_checksum};
use wherry_guest::report::{CONTROL_GPA, Control, FailureKind, MismatchKind, PAGE_SIZE, Phase, RATE_MAX};
use wherry_guest::snapshot::Snapshot;

/// Starts a machine, or leaves the test.
macro_rules! machine {
    ($cpus:expr, $memory:expr, $line:expr) => {
        machine!($cpus, $memory, $memory, $line)
    };
    ($cpus:expr, $memory:expr, $low:expr, $line:expr) => {
        match Machine::start_split($cpus, $memory, $low, $line) {
            Some(machine) => machine,
            None => {
                println!("SKIPPED: qemu-system-x86_64 is not installed");
                return;
            }
        }
    };
}

impl Machine {
    /// Writes a control word and tells the guest.
    fn control(&self, offset: usize, value: &[u8]) {
        let sequence = CONTROL_GPA + offset_of!(Control, sequence) as u64;
        self.write(CONTROL_GPA + offset as u64, value);
        let next = self.word(sequence) + 1;
        self.write(sequence, &next.to_le_bytes());
        self.wait("all vCPUs to take the control words", |s| s.cpus.iter().all(|cpu| cpu.control_seen == next));
    }

    fn stop_dirtying(&self) {
        self.control(offset_of!(Control, stop), &1u32.to_le_bytes());
    }

    /// Changes guest RAM while the guest looks away, so that it never sees half of it.
    fn tamper(&self, writes: &[(u64, &[u8])]) {
        self.control(offset_of!(Control, verify_permille), &0u32.to_le_bytes());
        for (gpa, bytes) in writes {
            self.write(*gpa, bytes);
        }
        self.control(offset_of!(Control, verify_permille), &500u32.to_le_bytes());
    }

    fn finish(&self) {
        self.write(CONTROL_GPA + offset_of!(Control, finish) as u64, &1u32.to_le_bytes());
    }

    fn page(&self, snapshot: &Snapshot, index: u64) -> [u64; PAGE_WORDS] {
        let mut bytes = [0; PAGE_SIZE as usize];
        self.read(snapshot.page_gpa(index).unwrap(), &mut bytes);
        let mut page = [0; PAGE_WORDS];
        for (word, bytes) in page.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        page
    }

    fn entry(&self, snapshot: &Snapshot, index: u64) -> Entry {
        let at = snapshot.table_gpa + 16 * index;
        Entry { generation: self.word(at), checksum: self.word(at + 8) }
    }

    /// Checks every page of a guest that does not dirty any: from outside, word by word.
    fn check_all_pages(&self, snapshot: &Snapshot) {
        for index in 0..snapshot.data_pages {
            let (page, entry) = (self.page(snapshot, index), self.entry(snapshot, index));
            let generation = Generation::from_word(entry.generation);
            assert!(generation.rewrites > 0, "page {index} was never filled");
            assert_eq!(first_difference(&page, snapshot.seed, index, generation), None, "page {index}");
            assert_eq!(page_checksum(&page), entry.checksum, "page {index}");
        }
    }
}

#[test]
fn it_boots_fills_dirties_verifies_and_beats_and_its_data_is_right_seen_from_outside() {
    let machine = machine!(1, 256, "data=16M rate=20M seed=77");
    let running = machine.wait("the guest to run", |s| s.phase() == Phase::Running);
    assert_eq!((running.data_pages, running.seed, running.cpus.len()), (4096, 77, 1));
    assert!(running.tsc_khz > 100_000);
    let later = machine.wait("heartbeats, dirtied pages and a whole verified pass", |s| {
        s.cpus[0].heartbeat > running.cpus[0].heartbeat + 1000 && s.pages_dirtied() > 500 && s.cpus[0].verify_passes > 0
    });
    assert_eq!(later.cpus[0].pages_filled, 4096);
    machine.stop_dirtying();
    let stopped = machine.snapshot().unwrap();
    machine.check_all_pages(&stopped);
    assert_eq!((stopped.verify_errors(), stopped.failure.clone()), (0, None));
    assert_eq!(stopped.pages_dirtied(), machine.snapshot().unwrap().pages_dirtied(), "it dirties though it is stopped");
    machine.finish();
    let finished = machine.wait("the guest to finish", |s| s.phase() == Phase::Finished);
    assert!(finished.cpus[0].verify_passes > stopped.cpus[0].verify_passes);
    assert!(machine.serial().contains("1 vCPUs"), "{}", machine.serial());
    assert!(machine.serial().contains("vCPU 0 finished"), "{}", machine.serial());
}

#[test]
fn two_vcpus_each_beat_and_work_on_their_own_slice() {
    let machine = machine!(2, 256, "data=16M rate=20M write=line pattern=hot shadow=full");
    machine.wait("the guest to run", |s| s.phase() == Phase::Running);
    let first = machine.snapshot().unwrap();
    let later = machine.wait("both vCPUs to beat, dirty and verify", |s| {
        s.cpus.iter().zip(&first.cpus).all(|(now, then)| {
            now.heartbeat > then.heartbeat + 1000 && now.pages_dirtied > 100 && now.verify_passes > 0
        })
    });
    assert_eq!(later.cpus_online, 2);
    assert_ne!(later.cpus[0].apic_id, later.cpus[1].apic_id);
    let slices: Vec<_> = later.cpus.iter().map(|cpu| (cpu.slice_start, cpu.slice_pages)).collect();
    assert_eq!(slices, [(0, 2048), (2048, 2048)]);
    machine.stop_dirtying();
    let stopped = machine.snapshot().unwrap();
    machine.check_all_pages(&stopped);
    let touched = (0..stopped.data_pages)
        .filter(|&i| Generation::from_word(machine.entry(&stopped, i).generation).touches > 0)
        .count();
    assert!(touched > 0, "write=line touched nothing");
    assert_eq!(stopped.verify_errors(), 0);
    machine.finish();
    machine.wait("the guest to finish", |s| s.phase() == Phase::Finished);
}

#[test]
fn a_flipped_byte_is_reported_with_its_address_and_what_should_be_there() {
    let machine = machine!(2, 256, "data=8M rate=0 verify=50%");
    let running = machine.wait("the guest to run", |s| s.phase() == Phase::Running);
    let index = 1500;
    let gpa = running.page_gpa(index).unwrap() + 8 * 300 + 5;
    let right = machine.word(running.page_gpa(index).unwrap() + 8 * 300);
    let mut byte = [0];
    machine.read(gpa, &mut byte);
    machine.write(gpa, &[byte[0] ^ 0x10]);
    let failed = machine.wait("the guest to notice", |s| s.phase() == Phase::Failed);
    let mismatch = failed.cpus[1].mismatches[0];
    assert_eq!(mismatch.kind, Some(MismatchKind::Corrupt));
    assert_eq!((mismatch.gpa, mismatch.page, mismatch.cpu), (gpa, index, 1));
    assert_eq!((mismatch.expected, mismatch.found), (right, right ^ 0x10 << 40));
    assert_eq!(failed.failure.as_ref().unwrap().kind, Some(FailureKind::Verify));
    // It goes on, and counts the error once.
    let beat = failed.cpus[1].heartbeat;
    let passes = failed.cpus[1].verify_passes;
    let later = machine.wait("two more passes", |s| s.cpus[1].verify_passes > passes + 2);
    assert!(later.cpus[1].heartbeat > beat);
    assert_eq!(later.verify_errors(), 1);
    machine.wait_serial("the failure on serial", &format!("{gpa:#x}"));
}

#[test]
fn lost_writes_and_lost_pages_are_told_apart() {
    let machine = machine!(1, 256, "data=4M rate=max verify=10%");
    machine.wait("the guest to run", |s| s.phase() == Phase::Running);
    machine.stop_dirtying();
    let early = machine.snapshot().unwrap();
    let old = machine.page(&early, 9);
    let then = machine.entry(&early, 9).generation;
    machine.control(offset_of!(Control, stop), &0u32.to_le_bytes());
    machine.wait("every page to be dirtied", |s| s.pages_dirtied() > early.pages_dirtied() + 20 * 1024);
    machine.stop_dirtying();
    let now = machine.entry(&early, 9).generation;
    assert_ne!(now, then);
    // As if the last write to page 9 had been lost on the way, and page 700 altogether.
    let bytes: Vec<u8> = old.iter().flat_map(|word| word.to_le_bytes()).collect();
    let zeroes = [0; PAGE_SIZE as usize];
    machine.tamper(&[(early.page_gpa(9).unwrap(), &bytes), (early.page_gpa(700).unwrap(), &zeroes)]);
    let failed = machine.wait("two errors", |s| s.verify_errors() >= 2);
    let by_page = |page| *failed.cpus[0].mismatches.iter().find(|m| m.page == page).unwrap();
    let stale = by_page(9);
    assert_eq!(stale.kind, Some(MismatchKind::Stale));
    assert_eq!((stale.expected_generation, stale.found_generation), (now, then));
    assert_eq!(by_page(700).kind, Some(MismatchKind::Zero));
}

#[test]
fn pages_that_went_back_together_with_their_table_entries_are_missed_by_the_sum() {
    let machine = machine!(1, 256, "data=4M rate=max verify=10%");
    machine.wait("the guest to run", |s| s.phase() == Phase::Running);
    machine.stop_dirtying();
    let early = machine.snapshot().unwrap();
    let (old, then) = (machine.page(&early, 5), machine.entry(&early, 5));
    machine.control(offset_of!(Control, stop), &0u32.to_le_bytes());
    machine.wait("every page to be dirtied", |s| s.pages_dirtied() > early.pages_dirtied() + 20 * 1024);
    machine.stop_dirtying();
    let bytes: Vec<u8> = old.iter().flat_map(|word| word.to_le_bytes()).collect();
    let entry: Vec<u8> = [then.generation, then.checksum].iter().flat_map(|word| word.to_le_bytes()).collect();
    machine.tamper(&[(early.page_gpa(5).unwrap(), &bytes), (early.table_gpa + 16 * 5, &entry)]);
    let failed = machine.wait("the sum of generations to be missed", |s| {
        s.cpus[0].mismatches.iter().any(|m| m.kind == Some(MismatchKind::Ledger))
    });
    assert_eq!((failed.phase(), failed.verify_errors()), (Phase::Failed, 1));
}

#[test]
fn a_page_is_checked_before_it_is_overwritten() {
    let machine = machine!(1, 256, "data=4M rate=0 verify=0% pattern=sequential");
    let running = machine.wait("the guest to run", |s| s.phase() == Phase::Running);
    machine.write(running.page_gpa(600).unwrap() + 64, &[0; 8]);
    machine.control(offset_of!(Control, rate), &RATE_MAX.to_le_bytes());
    let failed = machine.wait("the writer to notice", |s| s.phase() == Phase::Failed);
    assert_eq!(failed.cpus[0].mismatches[0].page, 600);
    assert_eq!(failed.cpus[0].pages_verified, 0, "the cursor found it, not the writer");
}

#[test]
fn the_load_follows_the_control_words_and_the_histogram_can_be_emptied() {
    let machine = machine!(1, 256, "data=8M rate=0 verify=0%");
    let running = machine.wait("the guest to run", |s| s.phase() == Phase::Running);
    assert_eq!(running.pages_dirtied() + running.pages_verified(), 0);
    machine.control(offset_of!(Control, rate), &(100u64 << 20).to_le_bytes());
    machine.wait("dirtied pages", |s| s.pages_dirtied() > 1000);
    machine.control(offset_of!(Control, verify_permille), &500u32.to_le_bytes());
    machine.wait("verified pages", |s| s.pages_verified() > 1000);
    // At rest, so that what is emptied stays empty.
    machine.control(offset_of!(Control, rate), &0u64.to_le_bytes());
    machine.control(offset_of!(Control, verify_permille), &0u32.to_le_bytes());
    let stopped = machine.snapshot().unwrap();
    let (before, running_touches) = (stopped.cpus[0].gaps, stopped.touches().count);
    assert!(running_touches > 4000, "two for each page: {running_touches}");
    assert!(before.buckets.iter().sum::<u64>() > 0 && before.max_ns > 0);
    machine.write(CONTROL_GPA + offset_of!(Control, reset_gaps) as u64, &7u32.to_le_bytes());
    let after = machine.wait("an emptied histogram", |s| s.cpus[0].reset_seen == 7);
    assert!(after.cpus[0].gaps.count < before.count);
    let touches = after.touches();
    assert_eq!((touches.count, touches.max_ns, touches.slow(0)), (0, 0, 0));
}

#[test]
fn a_halting_guest_is_woken_by_its_timer() {
    let machine = machine!(2, 256, "data=4M rate=1M verify=1% idle=halt");
    let running = machine.wait("the guest to run", |s| s.phase() == Phase::Running);
    machine.wait("timer interrupts and heartbeats on both vCPUs", |s| {
        s.cpus
            .iter()
            .zip(&running.cpus)
            .all(|(now, then)| now.timer_interrupts > then.timer_interrupts + 50 && now.heartbeat > then.heartbeat + 50)
    });
    assert_eq!(machine.snapshot().unwrap().failure, None);
}

#[test]
fn a_guest_without_data_only_beats() {
    let machine = machine!(1, 128, "data=0 run=200");
    let finished = machine.wait("the run time to end", |s| s.phase() == Phase::Finished);
    assert_eq!((finished.data_pages, finished.pages_dirtied()), (0, 0));
    assert!(finished.cpus[0].heartbeat > 1000);
}

#[test]
fn a_parameter_that_is_not_one_is_refused_by_name() {
    let machine = machine!(1, 128, "data=4M colour=blue");
    let failed = machine.wait("the refusal", |s| s.failure.is_some());
    let failure = failed.failure.unwrap();
    assert_eq!(failure.kind, Some(FailureKind::Parameter));
    assert!(failure.message.contains("colour=blue") && failure.message.contains("one of data"), "{failure:?}");
    machine.wait_serial("the refusal on serial", "FAILED vcpu=0 kind=Parameter: parameter 'colour=blue'");
}

#[test]
fn a_data_set_larger_than_ram_is_refused_with_both_sizes() {
    let machine = machine!(1, 128, "data=1G");
    let failed = machine.wait("the refusal", |s| s.failure.is_some());
    let failure = failed.failure.unwrap();
    assert_eq!(failure.kind, Some(FailureKind::Memory));
    assert!(failure.message.contains("1024 MiB") && failure.message.contains("MiB of RAM are free"), "{failure:?}");
}

#[test]
fn an_exception_is_reported_with_its_address_and_the_other_vcpu_goes_on() {
    let machine = machine!(2, 256, "data=2M fault=page");
    let failed = machine.wait("the exception", |s| s.cpus.iter().any(|cpu| cpu.exception.is_some()));
    let exception = failed.cpus.iter().find_map(|cpu| cpu.exception).unwrap();
    assert_eq!((exception.vector, exception.cr2, exception.cs & 3), (14, 0x7f12_3456_7000, 3));
    assert!((0x15_0000..0x20_0000).contains(&exception.rip), "{exception:x?}");
    machine.wait_serial("the exception on serial", "kind=Fault: exception 14");
    machine.wait_serial("its address", "cr2=0x7f1234567000");
}

#[test]
fn a_panic_is_reported_with_its_words() {
    let machine = machine!(1, 128, "data=1M fault=panic");
    let failed = machine.wait("the panic", |s| s.failure.is_some());
    assert_eq!(failed.failure.as_ref().unwrap().kind, Some(FailureKind::Panic));
    assert!(failed.failure.unwrap().message.contains("asked for by fault=panic"));
}

#[test]
fn a_register_that_lost_its_value_is_reported_once_and_the_guest_goes_on() {
    let machine = machine!(1, 128, "data=1M fault=registers");
    let failed = machine.wait("the loss to be noticed", |s| s.failure.is_some());
    let failure = failed.failure.unwrap();
    assert_eq!(failure.kind, Some(FailureKind::Registers));
    assert!(failure.message.contains("MXCSR is 0x1f80"), "{failure:?}");
    let later = machine.wait("more checks", |s| s.cpus[0].register_checks > failed.cpus[0].register_checks + 100);
    assert_eq!((later.cpus[0].register_errors, later.verify_errors()), (1, 0));
}

#[test]
fn data_reaches_beyond_4_gib_where_ram_does() {
    let machine = machine!(2, 256, 128, "data=160M rate=20M verify=30%");
    let running = machine.wait("the guest to run", |s| s.phase() == Phase::Running);
    let bounds: Vec<bool> = running.extents.iter().map(|&(gpa, _)| gpa >= 4 << 30).collect();
    assert_eq!(bounds, [false, true], "{:x?}", running.extents);
    machine.wait("a verified pass of both vCPUs", |s| s.cpus.iter().all(|cpu| cpu.verify_passes > 0));
    machine.stop_dirtying();
    let stopped = machine.snapshot().unwrap();
    machine.check_all_pages(&stopped);
    assert_eq!(stopped.failure, None);
}
