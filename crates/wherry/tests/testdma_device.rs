//! `wherry device testdma` with a driver that is a vfio-user client: what it writes, how it interrupts, its log, its moves, and everything
//! that it does wrong when it is told to.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use support::testdma::{BASE, BYTES, Driver, PAGE, Process, VECTORS, assert_same, client, memory};
use support::{Place, wait_for};
use wherry_guest::testdma::{Form, Interrupt, MAX_BUFFER, SCRATCH, area, register, status};
use wherry_vfio_user::client::NoMemory;
use wherry_vfio_user::payload::{IrqSet, feature, pci_irq, pci_region};
use wherry_vfio_user::{Client, Options, State, VfioUserError};

/// How often a device is moved.
fn moves() -> u64 {
    std::env::var("WHERRY_DMA_MOVES").ok().and_then(|n| n.parse().ok()).unwrap_or(5)
}

const KINDS: [Interrupt; 3] = [Interrupt::Msix, Interrupt::Msi, Interrupt::Intx];

#[test]
fn buffers_arrive_whole_in_order_and_each_once_in_every_pattern_and_kind_of_interrupts() {
    let place = Place::new();
    for (name, pattern, kind) in
        [("a", "whole", Interrupt::Msix), ("b", "reverse", Interrupt::Msi), ("c", "lines", Interrupt::Intx)]
    {
        let process = Process::start(&place, name, &["--pattern", pattern]);
        let mut driver = Driver::attach(&process, memory(), kind);
        driver.entries = 16;
        driver.lengths = vec![16, 4096, 72, MAX_BUFFER, 4104];
        driver.begin(Form::Ring);
        driver.receive(1000);
        assert_eq!((driver.register(register::BUFFERS), driver.register(register::FAULTS)), (1000, 0));
        let summary = process.summary();
        assert_eq!((&summary["buffers"], &summary["lost_interrupts"]), (&1000.into(), &0.into()), "{summary}");
    }
}

#[test]
fn vectors_take_turns_and_the_pin_stays_up_until_its_cause_is_cleared() {
    let place = Place::new();
    let process = Process::start(&place, "a", &[]);
    let mut driver = Driver::attach(&process, memory(), Interrupt::Msix);
    driver.begin(Form::Wait);
    for n in 1..=9 {
        assert_eq!(driver.interrupt_within(support::LIMIT), Some((n as usize - 1) % VECTORS as usize));
        assert_eq!(driver.letter(), n);
        driver.acknowledge(n);
    }
    driver.set(register::CONTROL, 0);
    driver.client.disable_irq(pci_irq::MSIX).unwrap();
    drop(driver);
    let mut driver = Driver::attach(&process, memory(), Interrupt::Intx);
    driver.begin(Form::Wait);
    let line = driver.events[0].as_fd();
    let up = |what| wait_for(what, || (rustix::io::read(line, &mut [0; 8]) == Ok(8)).then_some(()));
    up("the pin");
    for _ in 0..3 {
        // Masked by itself; unmasked it comes again, as the pin is up.
        driver.client.act_on_irq(IrqSet::UNMASK, pci_irq::INTX, 0, 1).unwrap();
        up("the pin once more");
    }
    let mut command = [0; 4];
    driver.client.read(pci_region::CONFIG, 4, &mut command).unwrap();
    assert!(command[2] & 8 != 0 && driver.register(register::CAUSE) & 1 == 1, "{command:x?}");
    driver.set(register::CAUSE, 1);
    driver.client.act_on_irq(IrqSet::UNMASK, pci_irq::INTX, 0, 1).unwrap();
    assert_eq!(rustix::io::read(line, &mut [0; 8]), Err(Errno::AGAIN), "the pin is down");
}

#[test]
fn nothing_is_written_without_bus_mastering_nor_to_memory_that_is_not_there() {
    let place = Place::new();
    let process = Process::start(&place, "a", &[]);
    let mut driver = Driver::attach(&process, memory(), Interrupt::Msix);
    driver.begin(Form::Ring);
    driver.client.write(pci_region::CONFIG, 4, &2_u16.to_le_bytes()).unwrap();
    driver.post(10);
    assert_eq!(driver.register(register::STATUS) as u32 & status::ACTIVE, 0);
    // Whatever it could do it would have done by the answer to a question that takes its lock.
    assert_eq!((driver.register(register::BUFFERS), driver.take()), (0, 0));
    driver.client.write(pci_region::CONFIG, 4, &6_u16.to_le_bytes()).unwrap();
    driver.receive(10);
    // A ring is not begun with a size that none has.
    driver.set(register::CONTROL, 0);
    for entries in [0, 1, 3, 2048] {
        driver.set(register::ENTRIES, entries);
        assert_eq!(driver.register(register::ENTRIES) as u32, driver.entries);
    }
    driver.set(register::INTERRUPT, 9);
    assert_eq!(driver.register(register::INTERRUPT) as u32, Interrupt::Msix as u32);
    // Its memory goes while it is at work, and comes back.
    (driver.posted, driver.taken) = (0, 0);
    driver.put(0x1_0000, &[0; 128]);
    driver.set(register::CONTROL, Form::Ring as u32);
    driver.receive(100);
    driver.client.dma_unmap(BASE, BYTES).unwrap();
    driver.client.dma_map(0, PAGE, None, true, true).unwrap();
    wait_for("the device to miss its memory", || {
        driver.set(register::DOORBELL, 0);
        (driver.register(register::STATUS) as u32 & status::FAULT != 0).then_some(())
    });
    assert!(driver.register(register::FAULTS) > 0);
    driver.client.dma_map(BASE, BYTES, Some((driver.memory.as_fd(), 0)), true, true).unwrap();
    driver.receive(200);
}

#[test]
fn the_scratch_page_can_be_mapped_and_the_doorbell_is_a_descriptor() {
    let place = Place::new();
    let process = Process::start(&place, "a", &[]);
    let mut driver = Driver::attach(&process, memory(), Interrupt::Msix);
    let region = driver.client.region_info(0).unwrap();
    let file = std::fs::File::from(region.file.unwrap());
    assert_eq!(region.info.sparse.iter().map(|a| (a.offset, a.size)).collect::<Vec<_>>(), [(SCRATCH, PAGE)]);
    use std::os::unix::fs::FileExt;
    file.write_all_at(b"mapped", region.info.offset + SCRATCH).unwrap();
    let mut bytes = [0; 6];
    driver.client.read(0, SCRATCH, &mut bytes).unwrap();
    assert_eq!(&bytes, b"mapped");
    driver.client.write(0, SCRATCH + 1, b"essage").unwrap();
    file.read_exact_at(&mut bytes, region.info.offset + SCRATCH).unwrap();
    assert_eq!(&bytes, b"messag");
    let bells = driver.client.region_io_fds(0).unwrap();
    assert_eq!((bells.parts[0].offset, bells.parts[0].size), (register::DOORBELL, 4));
    driver.begin(Form::Wait);
    for n in 1..=3 {
        driver.interrupt_within(support::LIMIT).unwrap();
        // Without a write to its registers.
        driver.put(0x1_0000 + area::ACKNOWLEDGED, &u64::to_le_bytes(n));
        rustix::io::write(&bells.descriptors[0], &1_u64.to_ne_bytes()).unwrap();
    }
    assert_eq!(driver.register(register::LOST), 0);
}

#[test]
fn whatever_can_be_seen_is_in_the_log_before() {
    let place = Place::new();
    let process = Process::start(&place, "a", &["--pattern", "lines"]);
    let mut driver = Driver::attach(&process, memory(), Interrupt::Msix);
    driver.lengths = vec![4096, 10_000, 64];
    driver.begin(Form::Ring);
    driver.client.start_logging(PAGE, &[(BASE, BYTES)]).unwrap();
    // In which round a buffer was posted, and a page was last in the log.
    let (mut posted, mut logged) = (Vec::new(), vec![None; (BYTES / PAGE) as usize]);
    for round in 0..200 {
        let first = driver.taken;
        driver.post(u64::MAX);
        posted.resize(driver.posted as usize, round);
        while driver.take() == 0 {
            if !driver.listen() {
                driver.interrupt_within(support::LIMIT).unwrap();
            }
        }
        let log = driver.client.read_log(BASE, BYTES, PAGE).unwrap();
        for (page, last) in logged.iter_mut().enumerate() {
            if log[page / 64] >> (page % 64) & 1 == 1 {
                *last = Some(round);
            }
        }
        for n in first..driver.taken {
            let (at, length) = driver.buffer(n);
            for page in at / PAGE..(at + u64::from(length)).div_ceil(PAGE) {
                let last = logged[page as usize];
                assert!(last >= Some(posted[n as usize]), "page {page:#x} of buffer {n} is complete, and in no log");
            }
        }
    }
    driver.client.stop_logging().unwrap();
}

#[test]
fn it_moves_between_processes_at_full_rate_and_nothing_is_lost_doubled_or_wrong() {
    let place = Place::new();
    for (kind, pattern) in KINDS.into_iter().zip(["whole", "reverse", "lines"]) {
        let more = ["--pattern", pattern, "--state-size", "3M", "--pre-copy"];
        let mut here = Process::start(&place, "0", &more);
        let mut driver = Driver::attach(&here, memory(), kind);
        driver.entries = 16;
        driver.lengths = vec![MAX_BUFFER, 4096, 24];
        driver.client.write(0, SCRATCH, b"it comes along").unwrap();
        driver.begin(Form::Ring);
        driver.receive(100);
        for leg in 1..=moves() {
            let there = Process::start(&place, &leg.to_string(), &more);
            driver.post(u64::MAX);
            driver.move_to(&there, 8 << 20).unwrap();
            assert_eq!(driver.register(register::LOADS), leg);
            here = there;
            let target = driver.taken + 200;
            driver.receive(target);
        }
        let mut bytes = [0; 14];
        driver.client.read(0, SCRATCH, &mut bytes).unwrap();
        assert_eq!(&bytes, b"it comes along");
        assert_eq!(driver.register(register::BUFFERS), driver.posted);
        let summary = here.summary();
        assert_eq!((&summary["loads"], &summary["faults"]), (&moves().into(), &0.into()), "{summary}");
    }
}

#[test]
fn letters_and_their_interrupts_survive_moves_also_while_the_vector_is_masked() {
    let place = Place::new();
    for kind in KINDS {
        let mut here = Process::start(&place, "0", &[]);
        let mut driver = Driver::attach(&here, memory(), kind);
        driver.begin(Form::Wait);
        let mut sequence = 0;
        let index = if kind == Interrupt::Msix {
            pci_irq::MSIX
        } else if kind == Interrupt::Msi {
            pci_irq::MSI
        } else {
            pci_irq::INTX
        };
        for leg in 1..=moves() {
            for _ in 0..20 {
                assert!(driver.interrupt_within(support::LIMIT).is_some());
                sequence += 1;
                assert_eq!(driver.letter(), sequence);
                driver.acknowledge(sequence);
            }
            // Every other time the interrupt of the next letter waits, masked, while the device moves.
            let masked = leg % 2 == 0;
            if masked {
                let count = driver.events.len() as u32;
                driver.client.act_on_irq(IrqSet::MASK, index, 0, count).unwrap();
                wait_for("the letter", || (driver.word(area::SEQUENCE) > sequence).then_some(()));
            }
            let there = Process::start(&place, &leg.to_string(), &[]);
            move_letters(&mut driver, &there);
            here = there;
        }
        assert_eq!(driver.register(register::LOST), 0, "{kind:?}: {}", here.log());
    }
}

/// As [`Driver::move_to`], which posts buffers.
fn move_letters(driver: &mut Driver, there: &Process) {
    driver.client.set_state(State::StopCopy).unwrap();
    let state = driver.client.read_data(1 << 20).unwrap();
    let next = Driver::attach(there, driver.memory.try_clone().unwrap(), driver.kind);
    next.client.set_state(State::Resuming).unwrap();
    next.client.write_data(&state).unwrap();
    next.client.set_state(State::Running).unwrap();
    for (old, new) in driver.events.iter().zip(&next.events) {
        if rustix::io::read(old, &mut [0; 8]) == Ok(8) {
            rustix::io::write(new, &1_u64.to_ne_bytes()).unwrap();
        }
    }
    (driver.client, driver.events) = (next.client, next.events);
}

#[test]
fn a_client_that_vanishes_and_comes_back_finds_the_device_as_it_was() {
    let place = Place::new();
    let process = Process::start(&place, "a", &["--pattern", "lines"]);
    let mut driver = Driver::attach(&process, memory(), Interrupt::Msix);
    driver.entries = 16;
    driver.lengths = vec![MAX_BUFFER, 72];
    driver.begin(Form::Ring);
    for round in 1..=10 {
        driver.receive(round * 50);
        // In the middle of its work.
        driver.post(u64::MAX);
        driver.client.close();
        let next = Driver::attach(&process, driver.memory.try_clone().unwrap(), driver.kind);
        (driver.client, driver.events) = (next.client, next.events);
        driver.client.write(0, register::DOORBELL, &[1, 0, 0, 0]).unwrap();
    }
    driver.receive(600);
    assert_eq!(driver.register(register::FAULTS), 0);
    assert_eq!(driver.register(register::BUFFERS), driver.posted);
}

#[test]
fn what_it_was_told_not_to_have_it_does_not_have() {
    let place = Place::new();
    let process = Process::start(&place, "a", &["--no-migration", "--no-log", "--interrupts", "msi"]);
    let client = client(&process);
    assert!(!client.probe(feature::MIGRATION, feature::GET).unwrap());
    assert!(!client.probe(feature::LOGGING_START, feature::SET).unwrap());
    assert_eq!(client.start_logging(PAGE, &[]).unwrap_err().refused_with(), Some(Errno::NOTTY));
    assert_eq!(client.set_state(State::Stop).unwrap_err().refused_with(), Some(Errno::NOTTY));
    let counts = [pci_irq::INTX, pci_irq::MSI, pci_irq::MSIX].map(|index| client.irq_info(index).unwrap().fourth);
    assert_eq!(counts, [0, VECTORS, 0]);
    client.write(0, register::INTERRUPT, &(Interrupt::Msix as u32).to_le_bytes()).unwrap();
    let mut kind = [1; 4];
    client.read(0, register::INTERRUPT, &mut kind).unwrap();
    assert_eq!(u32::from_le_bytes(kind), Interrupt::None as u32);
}

#[test]
fn ballast_comes_while_it_runs_if_it_may_and_the_estimate_says_what_is_left() {
    let place = Place::new();
    for (name, more) in [("a", &["--state-size", "5M", "--pre-copy"][..]), ("b", &["--state-size", "5M"])] {
        let process = Process::start(&place, name, more);
        let client = client(&process);
        let whole = client.estimate().unwrap().unwrap();
        assert!((5 << 20..6 << 20).contains(&whole), "{whole}");
        let mut state = Vec::new();
        let pre_copy = more.len() == 3;
        assert_eq!(client.migration().unwrap() & feature::PRE_COPY != 0, pre_copy);
        let drain = |state: &mut Vec<u8>| {
            loop {
                let piece = client.read_data(1 << 20).unwrap();
                if piece.is_empty() {
                    break;
                }
                state.extend(piece);
            }
        };
        if pre_copy {
            client.set_state(State::PreCopy).unwrap();
            drain(&mut state);
            assert!(state.len() > 5 << 20 && client.estimate().unwrap().unwrap() < 1 << 20);
        }
        client.set_state(State::StopCopy).unwrap();
        drain(&mut state);
        assert!(state.len() as u64 >= whole && state.len() as u64 <= whole + 4096, "{} of {whole}", state.len());
        // Any byte of the ballast is compared.
        let there = Process::start(&place, &format!("{name}-there"), &["--load-time", "1"]);
        for (wrong, expected) in [(Some(2 << 20), false), (None, true)] {
            let client = Client::connect(&there.socket, Options::default(), Arc::new(NoMemory)).unwrap();
            client.reset().unwrap();
            client.set_state(State::Resuming).unwrap();
            let mut state = state.clone();
            wrong.into_iter().for_each(|at: usize| state[at] ^= 1);
            let loaded = client.write_data(&state).and_then(|()| client.set_state(State::Running));
            assert_eq!(loaded.is_ok(), expected, "{loaded:?}");
        }
    }
}

#[test]
fn a_late_write_comes_after_the_device_is_at_rest_and_is_in_the_log() {
    let place = Place::new();
    let process = Process::start(&place, "a", &["--fault", "late-dma=20"]);
    let mut driver = Driver::attach(&process, memory(), Interrupt::Msix);
    driver.begin(Form::Ring);
    driver.receive(10);
    driver.client.start_logging(PAGE, &[(BASE, BYTES)]).unwrap();
    driver.client.set_state(State::Stop).unwrap();
    wait_for("the late write", || driver.verify(9).err());
    let log = driver.client.read_log(BASE, BYTES, PAGE).unwrap();
    let (at, length) = driver.buffer(9);
    let logged = (0..BYTES / PAGE).filter(|page| log[*page as usize / 64] >> (page % 64) & 1 == 1);
    assert!(logged.eq(at / PAGE..(at + u64::from(length)).div_ceil(PAGE)));
    assert!(process.log().contains("after the device was brought to rest"), "{}", process.log());
}

#[test]
fn transactions_stay_pending_when_one_is_stuck_and_only_then() {
    let place = Place::new();
    for (name, more, stuck) in [("a", &["--fault", "stuck-transaction"][..], true), ("b", &[], false)] {
        let process = Process::start(&place, name, more);
        let mut driver = Driver::attach(&process, memory(), Interrupt::Msix);
        driver.begin(Form::Ring);
        driver.receive(10);
        driver.client.write(pci_region::CONFIG, 4, &2_u16.to_le_bytes()).unwrap();
        let mut config = vec![0; 256];
        driver.client.read(pci_region::CONFIG, 0, &mut config).unwrap();
        let mut at = usize::from(config[0x34]);
        while config[at] != 0x10 {
            at = usize::from(config[at + 1]);
        }
        assert_eq!(config[at + 0x0a] & 0x20 != 0, stuck, "{name}");
    }
}

#[test]
fn a_lost_completion_is_noticed_and_a_lost_interrupt_is_counted() {
    let place = Place::new();
    let process = Process::start(&place, "a", &["--fault", "lost-completion=7"]);
    let mut driver = Driver::attach(&process, memory(), Interrupt::Msix);
    driver.begin(Form::Ring);
    driver.receive(6);
    driver.post(7);
    wait_for("the seventh", || (driver.word(area::COMPLETED) == 7).then_some(()));
    assert!(driver.verify(6).unwrap_err().contains("completion of buffer 6"));
    let process = Process::start(&place, "b", &["--fault", "lost-interrupt=3"]);
    let mut driver = Driver::attach(&process, memory(), Interrupt::Msi);
    driver.begin(Form::Wait);
    for n in 1..=5 {
        driver.interrupt_within(support::LIMIT).unwrap();
        assert_eq!((driver.letter(), driver.register(register::LOST)), (n, u64::from(n >= 3)));
        driver.acknowledge(n);
    }
    let log = process.log();
    assert!(log.contains("an interrupt was lost") && log.contains("letter=3"), "{log}");
    assert_eq!(process.summary()["lost_interrupts"], 1);
}

#[test]
fn states_that_are_wrong_short_slow_or_without_end_are_noticed_and_the_device_can_be_reset() {
    let place = Place::new();
    let there = Process::start(&place, "there", &[]);
    for (name, fault) in [("a", "wrong-state"), ("b", "wrong-state=3"), ("c", "short-state")] {
        let process = Process::start(&place, name, &["--fault", fault]);
        let mut driver = Driver::attach(&process, memory(), Interrupt::Msix);
        driver.begin(Form::Ring);
        driver.receive(10);
        driver.client.set_state(State::StopCopy).unwrap();
        let state = driver.client.read_data(1 << 20).unwrap();
        let next = client(&there);
        next.set_state(State::Resuming).unwrap();
        let loaded = next.write_data(&state).and_then(|()| next.set_state(State::Running));
        assert_eq!(loaded.unwrap_err().refused_with(), Some(Errno::INVAL), "{fault}");
        next.reset().unwrap();
        assert_eq!(next.state().unwrap(), State::Running);
        // Where it is, it goes on.
        driver.client.set_state(State::Running).unwrap();
        driver.receive(20);
    }
    let process = Process::start(&place, "d", &["--fault", "endless-state"]);
    let mut driver = Driver::attach(&process, memory(), Interrupt::Msix);
    driver.begin(Form::Ring);
    let estimate = driver.client.estimate().unwrap().unwrap();
    driver.client.set_state(State::StopCopy).unwrap();
    let read: usize = (0..20).map(|_| driver.client.read_data(1 << 20).unwrap().len()).sum();
    assert!(read as u64 > 100 * estimate, "{read} of {estimate}");
    driver.client.set_state(State::Running).unwrap();
    driver.receive(20);
    let process = Process::start(&place, "e", &["--fault", "slow-state=500", "--fault", "refuse=resuming"]);
    let options = Options { limit: Duration::from_millis(100), ..Options::default() };
    let client = Client::connect(&process.socket, options, Arc::new(NoMemory)).unwrap();
    assert_eq!(client.set_state(State::Resuming).unwrap_err().refused_with(), Some(Errno::IO));
    client.set_state(State::StopCopy).unwrap();
    assert!(matches!(client.read_data(4096), Err(VfioUserError::Deadline { .. })));
}

const PLACES: [&str; 15] = [
    "version",
    "dma-map",
    "dma-unmap",
    "get-info",
    "get-region-info",
    "get-region-io-fds",
    "get-irq-info",
    "set-irqs",
    "region-read",
    "region-write",
    "region-write-multi",
    "reset",
    "feature",
    "mig-data-read",
    "mig-data-write",
];
const STATES: [&str; 7] = ["stop", "running", "stop-copy", "resuming", "running-p2p", "pre-copy", "pre-copy-p2p"];

/// Every message there is and every state, once; the first error ends it.
fn everything(process: &Process, options: Options) -> Result<(), VfioUserError> {
    let client = Client::connect(&process.socket, options, Arc::new(NoMemory))?;
    let ram = memory();
    client.dma_map(BASE, BYTES, Some((ram.as_fd(), 0)), true, true)?;
    client.info()?;
    client.region_info(0)?;
    client.region_io_fds(0)?;
    client.irq_info(pci_irq::MSIX)?;
    client.set_triggers(pci_irq::MSIX, 0, &[client.as_fd()])?;
    client.read(0, register::ID, &mut [0; 4])?;
    client.write(0, register::ENTRIES, &64_u32.to_le_bytes())?;
    client.write_multi(&[(0, register::SEED, &[1, 0, 0, 0]), (0, register::SEED_HIGH, &[1, 0, 0, 0])])?;
    client.set_state(State::PreCopyP2p)?;
    client.set_state(State::PreCopy)?;
    client.set_state(State::StopCopy)?;
    let state = client.read_data(1 << 20)?;
    client.set_state(State::Resuming)?;
    client.write_data(&state)?;
    client.set_state(State::RunningP2p)?;
    client.set_state(State::Running)?;
    client.reset()?;
    client.dma_unmap(BASE, BYTES)
}

#[test]
fn a_connection_that_is_lost_in_any_message_and_any_state_is_made_again_and_the_device_works() {
    let place = Place::new();
    for prefix in ["", "after-"] {
        for name in PLACES.iter().chain(&STATES) {
            let fault = format!("disconnect={prefix}{name}");
            let process = Process::start(&place, "a", &["--pre-copy", "--fault", &fault]);
            let lost = everything(&process, Options::default()).unwrap_err();
            assert!(matches!(lost, VfioUserError::Closed { .. } | VfioUserError::Socket { .. }), "{fault}: {lost}");
            let again = client(&process);
            again.reset().unwrap();
            drop(again);
            everything(&process, Options::default()).unwrap_or_else(|error| panic!("after {fault}: {error}"));
            let mut driver = Driver::attach(&process, memory(), Interrupt::Msix);
            driver.begin(Form::Ring);
            driver.receive(20);
        }
    }
}

#[test]
fn a_process_that_crashes_in_a_message_or_a_state_is_replaced_at_its_socket() {
    let place = Place::new();
    for name in
        ["version", "dma-map", "after-set-irqs", "after-region-write", "mig-data-read", "stop-copy", "after-resuming"]
    {
        let fault = format!("crash={name}");
        let mut process = Process::start(&place, "a", &["--pre-copy", "--fault", &fault]);
        let lost = everything(&process, Options::default()).unwrap_err();
        assert!(matches!(lost, VfioUserError::Closed { .. } | VfioUserError::Socket { .. }), "{fault}: {lost}");
        assert_eq!(process.end().code(), Some(101), "{fault}");
        let process = Process::start(&place, "a", &["--pre-copy"]);
        everything(&process, Options::default()).unwrap_or_else(|error| panic!("after {fault}: {error}"));
    }
}

#[test]
fn a_device_that_hangs_is_given_up_after_the_deadline_and_can_still_be_ended() {
    let place = Place::new();
    for name in ["get-info", "after-region-read", "stop-copy"] {
        let fault = format!("hang={name}");
        let process = Process::start(&place, "a", &["--pre-copy", "--fault", &fault]);
        let limit = Duration::from_millis(300);
        let silent = everything(&process, Options { limit, slow_limit: limit, ..Options::default() }).unwrap_err();
        assert!(matches!(silent, VfioUserError::Deadline { .. }), "{fault}: {silent}");
        process.summary();
    }
}

#[test]
fn a_memory_that_was_moved_by_log_and_driver_is_the_same_only_if_both_were_asked() {
    let (one, other) = (memory(), memory());
    assert_same(&one, &other);
    use std::os::unix::fs::FileExt;
    one.write_all_at(&[1], BYTES - 1).unwrap();
    assert!(std::panic::catch_unwind(|| assert_same(&one, &other)).is_err());
}
