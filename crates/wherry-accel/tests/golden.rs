//! Golden files: for every schema, the bytes as the version that introduced it wrote them, in `golden/accel-SCHEMA.bin`. They
//! are never changed; a new schema adds a file. `WHERRY_NEW_GOLDEN=1 cargo test -p wherry-accel --test golden` writes what is
//! missing.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use prost::Message;
use wherry_accel::abi::{Descriptor, Fence, opcode, status};
use wherry_accel::catalogue::{Catalogue, EngineId, Host};
use wherry_accel::clock::VirtualClock;
use wherry_accel::device::{Config, Device, NoInterrupts};
use wherry_accel::drive::Simulation;
use wherry_accel::error::Errno;
use wherry_accel::function::SavedFunction;
use wherry_accel::memory::{AddressSpace, Arena};
use wherry_accel::state::saved::*;
use wherry_accel::state::{AccelUnit, UNIT};
use wherry_accel::{FenceState, keys};
use wherry_state::{Saved, SavedState, Section, StateUnit};

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

/// Different numbers in all fields, and still a state that a device can take.
fn schema_1() -> SavedDevice {
    let engine = |class, instance| SavedEngine {
        class,
        instance,
        slice: 1_000_000 + u64::from(instance),
        preempt_timeout: 640_000_000,
        heartbeat: 2_500_000_000,
        busy: 77_000,
        resets: 3,
    };
    let fence = |slot, seq| SavedFence { context: 0x2_0001, slot, seq };
    let mut run = Descriptor::new(opcode::RUN, 0x1000, 0, 24).with(1000, 5, 6);
    run.tag = 9;
    // Counts r0 up to r1, then exits.
    let text = vec![0x0000_0001_0000_0007, 0x0000_0000_fffe_10ad, 0x0000_0000_0000_0095];
    let mut registers = vec![3, 5, 6, 0, 0, 0, 66, 67, 68, 69, 0xffff_f000_0000_0200];
    registers[0] = 3;
    let program = SavedProgram {
        text,
        registers,
        pc: 0,
        fuel: 900,
        frames: Vec::new(),
        stack: (0..4096).map(|i| i as u8).collect(),
    };
    let lane = SavedLane {
        allowed: 0b100,
        work: Some(SavedWork {
            inline: false,
            at: 0,
            left: 0,
            current: Some(run.encode().to_vec()),
            bytes: None,
            program: Some(program),
        }),
    };
    let running = SavedRequest {
        id: 41,
        fence: Some(fence(1, 6)),
        space: 0,
        priority: -7,
        rank: 0,
        order: 52,
        wait_signalled: None,
        wait_started: None,
        after: None,
        lanes: vec![lane.clone()],
        phase: 1,
        submission: run.encode().to_vec(),
        doomed: 0,
        pings_missed: Some(2),
        ping_in: 123_456,
        result: 0,
    };
    let batch = Descriptor::new(opcode::BATCH, 0x2000, 0b10, 3).completing_at(0x3000);
    let queued = SavedRequest {
        id: 42,
        fence: Some(fence(0, 3)),
        rank: 2,
        order: 53,
        wait_signalled: None,
        wait_started: Some(fence(1, 6)),
        after: Some(fence(1, 6)),
        lanes: vec![SavedLane {
            allowed: 0b010,
            work: Some(SavedWork { at: 0x2000, left: 3, ..SavedWork::default() }),
        }],
        phase: 0,
        submission: batch.encode().to_vec(),
        pings_missed: None,
        ping_in: 0,
        ..running.clone()
    };
    let slot = |kind, engines: &[u8], submitted, completed| SavedSlot {
        kind,
        engines: engines.to_vec(),
        width: 0,
        bonds: Vec::new(),
        submitted,
        completed,
        started: completed,
        started_on: 1,
        errors: vec![SavedError { seq: completed, errno: Errno::Io.number().into() }],
        runtime: 12,
        ring: None,
        portal: Vec::new(),
    };
    let context = SavedContext {
        id: 0x2_0001,
        flags: 1,
        priority: -7,
        persistent: true,
        space: 0,
        mapped: true,
        used: true,
        slots: vec![
            SavedSlot {
                bonds: vec![SavedBond { master: 2, engines: vec![1] }],
                ring: Some(SavedRing {
                    base: 0x8000,
                    entries: 16,
                    tail: 5,
                    head: 5,
                    head_address: 0x9000,
                    status: 22,
                    tail_address: 0,
                }),
                portal: vec![1; 16],
                ..slot(2, &[1, 0], 3, 2)
            },
            slot(1, &[2], 6, 5),
            SavedSlot { width: 2, ..slot(3, &[0, 1], 0, 0) },
            slot(0, &[], 0, 0),
        ],
        single: Some(4),
        shares: vec![SavedShare { index: 1, percent: 50 }],
        hang_ages: vec![20, 10],
        banned: false,
        closed: false,
        client: 8,
    };
    let gone = SavedContext {
        id: 0x1_0001,
        closed: true,
        single: None,
        slots: vec![SavedSlot { ring: None, ..slot(0, &[], 2, 2) }],
        shares: Vec::new(),
        ..context.clone()
    };
    SavedDevice {
        time: 5_000_000_000,
        engines: vec![engine(0, 0), engine(0, 1), engine(3, 0)],
        contexts: vec![context],
        remembered: vec![gone],
        requests: vec![running, queued],
        effects: vec![SavedEffect {
            space: 0,
            submission: batch.encode().to_vec(),
            record: [&[status::FAILED, opcode::BATCH, 22, 0][..], &[7; 28]].concat(),
            request: None,
        }],
        singles: vec![SavedSingle { number: 4, latest: Some(fence(0, 3)) }],
        keys: vec![SavedKey { handle: 7, kind: 1, wrapped: wrapped() }],
        generations: vec![3],
        next_request: 43,
        next_order: 54,
        next_single: 5,
        lost: false,
        registers: Some(SavedRegisters { result: 2, created: 0x2_0001 }),
    }
}

/// A key of zeros under the fleet key of ones, with a nonce of zeros, as some version wrapped it.
fn wrapped() -> Vec<u8> {
    std::fs::read(directory().join("wrapped-key-1.bin")).unwrap_or_else(|_| {
        let wrapped = keys::FleetKey::new([1; 32]).wrap(7, keys::KeyKind::Aes256Gcm, &[0; 32]).unwrap();
        if std::env::var_os("WHERRY_NEW_GOLDEN").is_some() {
            std::fs::write(directory().join("wrapped-key-1.bin"), &wrapped).unwrap();
        }
        wrapped
    })
}

/// Its ring has the tail in memory, and is polled.
fn schema_2() -> SavedDevice {
    let mut saved = schema_1();
    saved.contexts[0].slots[0].ring.as_mut().unwrap().tail_address = 0xa001;
    saved
}

/// What a schema's file was made from.
fn made_from(schema: u32) -> SavedDevice {
    if schema == 1 { schema_1() } else { schema_2() }
}

/// That of the latest schema.
fn section() -> Section {
    section_of(SavedDevice::SCHEMA)
}

fn section_of(schema: u32) -> Section {
    let path = directory().join(format!("accel-{schema}.bin"));
    if std::env::var_os("WHERRY_NEW_GOLDEN").is_some() && !path.exists() {
        std::fs::write(&path, made_from(schema).encode_to_vec()).unwrap();
    }
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    Section { unit: UNIT.into(), instance: 0, schema, bytes }
}

fn device() -> (Arc<Device>, Simulation, Arc<Arena>) {
    let engine = |class, instance| EngineId { class, instance };
    let clock = Arc::new(VirtualClock::default());
    let config = Config {
        catalogue: Catalogue::new(vec![engine(0, 0), engine(0, 1), engine(3, 0)]).unwrap(),
        host: Host::uniform(1),
        clock: clock.clone(),
        notify: Arc::new(NoInterrupts),
        seed: 1,
    };
    let device = Arc::new(Device::new(config).unwrap());
    let memory = Arc::new(Arena::new(&[(0x1000, 0x10000)]).unwrap());
    device.set_space(0, memory.clone());
    (device.clone(), Simulation::new(device, clock), memory)
}

#[test]
fn the_golden_file_of_each_schema_reads_as_what_it_was_made_from() {
    for schema in 1..=SavedDevice::SCHEMA {
        assert_eq!(SavedDevice::from_section(&section_of(schema)).unwrap(), made_from(schema));
    }
    let wanted: BTreeSet<String> = (1..=SavedDevice::SCHEMA)
        .map(|schema| format!("accel-{schema}.bin"))
        .chain(["wrapped-key-1.bin".into()])
        .chain((1..=SavedFunction::SCHEMA).map(|schema| format!("accel-function-{schema}.bin")))
        .collect();
    let found: BTreeSet<String> =
        std::fs::read_dir(directory()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(found, wanted);
}

/// Different numbers in all fields of the function, around that device.
fn function(schema: u32) -> SavedFunction {
    SavedFunction {
        config: (0..=255).collect(),
        table: (0..1024).map(|i| (i * 7) as u8).collect(),
        pending: vec![3, 63],
        pin_pending: true,
        device: Some(made_from(schema)),
    }
}

#[test]
fn the_golden_file_of_the_function_reads_as_what_it_was_made_from() {
    for schema in 1..=SavedFunction::SCHEMA {
        let path = directory().join(format!("accel-function-{schema}.bin"));
        if std::env::var_os("WHERRY_NEW_GOLDEN").is_some() && !path.exists() {
            std::fs::write(&path, function(schema).encode_to_vec()).unwrap();
        }
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let section = Section { unit: "accel-function".into(), instance: 0, schema, bytes };
        assert_eq!(SavedFunction::from_section(&section).unwrap(), function(schema));
    }
}

#[test]
fn a_device_takes_the_golden_state_saves_it_alike_and_goes_on_with_its_work() {
    (1..=SavedDevice::SCHEMA).for_each(goes_on);
}

fn goes_on(schema: u32) {
    let (device, mut simulation, memory) = device();
    let unit = AccelUnit::new(device.clone(), Some(keys::FleetKey::new([1; 32])), 0);
    unit.restore(&section_of(schema)).unwrap();
    assert!(unit.finish_stop(Instant::now()).is_ok(), "it stands still until it is started");
    let Saved::Section(again) = unit.save().unwrap() else { panic!("nothing saved") };
    // The bonded request has been looked at and waits: nothing else may differ.
    assert_eq!(SavedDevice::from_section(&again).unwrap(), made_from(schema));
    // The tail in memory is that of the ring.
    memory.write(0xa000, &5u32.to_le_bytes()).unwrap();
    let program = Fence { context: 0x2_0001, slot: 1, seq: 6 };
    assert_eq!(device.fence(program), Ok(FenceState::Pending));
    // The batch that waits for it: descriptors that do nothing.
    memory.write(0x2000, &[0; 192]).unwrap();
    unit.start().unwrap();
    assert_eq!(simulation.wait(program, 1_000_000_000), FenceState::Signalled);
    let batch = Fence { context: 0x2_0001, slot: 0, seq: 3 };
    assert_eq!(simulation.wait(batch, 1_000_000_000), FenceState::Signalled);
    assert!(device.keys().import(&keys::FleetKey::new([1; 32]), 7, keys::KeyKind::Aes256Gcm, &wrapped()).is_err());
    let mut record = [0; 2];
    memory.read(0x3000, &mut record).unwrap();
    assert_eq!(record, [status::DONE, opcode::BATCH], "the refusal's record, and then that of the batch");
}

#[test]
fn the_document_lists_the_unit_with_its_schema() {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/state.md")).unwrap();
    assert!(text.contains(&format!("| `{UNIT}` | {} |", SavedDevice::SCHEMA)));
    assert!(text.contains(&format!("| `accel-function` | {} |", SavedFunction::SCHEMA)));
}

#[test]
fn state_that_does_not_fit_is_refused_by_name_and_leaves_the_device_as_it_was() {
    type Spoil = fn(&mut SavedDevice);
    let cases: &[(&str, Spoil)] = &[
        ("engines copy0 copy1", |s| s.engines.truncate(2)),
        ("lanes", |s| s.requests[0].lanes.clear()),
        ("may use no engine", |s| s.requests[0].lanes[0].allowed = 1),
        ("not the next of its slot", |s| s.requests[0].fence.as_mut().unwrap().seq = 7),
        ("are missing", |s| s.requests.truncate(1)),
        ("has no context", |s| s.requests[0].fence.as_mut().unwrap().context = 1),
        ("has no slot", |s| s.requests[0].fence.as_mut().unwrap().slot = 3),
        ("in phase 9", |s| s.requests[0].phase = 9),
        ("complete and nobody tells", |s| s.requests[0].phase = 2),
        ("has no place", |s| s.contexts[0].id = 5),
        ("timeline that is not there", |s| s.singles.clear()),
        ("address space 8", |s| s.contexts[0].space = 8),
        ("a saved key is refused", |s| s.keys[0].handle = 8),
        ("10 registers", |s| {
            s.requests[0].lanes[0].work.as_mut().unwrap().program.as_mut().unwrap().registers.truncate(10)
        }),
        ("no instruction begins", |s| s.requests[0].lanes[0].work.as_mut().unwrap().program.as_mut().unwrap().pc = 3),
        ("more fuel", |s| s.requests[0].lanes[0].work.as_mut().unwrap().program.as_mut().unwrap().fuel = 1001),
        ("slot 0 of a map cannot be", |s| s.contexts[0].slots[0].engines.push(1)),
        ("kind 4", |s| s.contexts[0].slots[3].kind = 4),
        ("no error 9", |s| s.contexts[0].slots[0].errors[0].errno = 9),
        ("a ring of context", |s| s.contexts[0].slots[0].ring.as_mut().unwrap().entries = 3),
        ("a ring of context", |s| s.contexts[0].slots[0].ring.as_mut().unwrap().tail_address = 0xa002),
        ("a portal of context", |s| s.contexts[0].slots[0].portal = vec![0; 64]),
        ("priority 5000", |s| s.contexts[0].priority = 5000),
        ("63 bytes", |s| s.requests[0].submission.truncate(63)),
        ("from the future", |s| s.requests[0].id = 50),
        ("out of range", |s| s.time = u64::MAX),
    ];
    for (word, spoil) in cases {
        let (device, ..) = device();
        let unit = AccelUnit::new(device.clone(), Some(keys::FleetKey::new([1; 32])), 0);
        let mut saved = made_from(SavedDevice::SCHEMA);
        spoil(&mut saved);
        let bad = Section { bytes: saved.encode_to_vec(), ..section() };
        let error = unit.restore(&bad).expect_err(word);
        let mut text = error.to_string();
        let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(&error);
        while let Some(error) = cause {
            text.push_str(&format!(": {error}"));
            cause = error.source();
        }
        assert!(text.contains(word), "{word}: {text}");
        assert!(device.contexts().is_empty());
        unit.restore(&section()).unwrap();
    }
    let (device, ..) = device();
    let unit = AccelUnit::new(device, None, 0);
    assert!(unit.restore(&section()).unwrap_err().to_string().contains("no fleet key"));
}
