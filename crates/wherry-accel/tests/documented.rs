//! `docs/accel-abi.md` and the code say the same numbers.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::path::Path;

use wherry_accel::abi::{self, class, clone_flag, command, extension, opcode, param, register, slot_register};
use wherry_accel::error::Errno;

fn document() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/accel-abi.md")).unwrap()
}

/// First and second cell of all rows of all tables, between two headings.
fn rows(from: &str, to: &str) -> BTreeMap<String, String> {
    let text = document();
    let (_, part) = text.split_once(from).unwrap();
    let (part, _) = part.split_once(to).unwrap();
    let cells = part.lines().filter_map(|line| line.strip_prefix("| ")?.split_once(" | "));
    let rows = cells.filter_map(|(first, rest)| {
        let second = rest.split_once(" |")?.0;
        Some((first.trim_matches('`').to_owned(), second.trim().to_owned()))
    });
    rows.collect()
}

fn number(text: &str) -> u64 {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).unwrap(),
        None => text.parse().unwrap(),
    }
}

/// Exactly these rows, with these numbers.
fn same(rows: &BTreeMap<String, String>, expected: &[(&str, u64)]) {
    for (name, value) in expected {
        let cell = rows.get(*name).unwrap_or_else(|| panic!("no row {name}"));
        assert_eq!(number(cell), *value, "{name}");
    }
}

#[test]
fn classes_limits_and_errors_are_those_of_the_code() {
    let rows = rows("## Numbers", "## Parameters");
    let classes: Vec<_> = class::NAMES.iter().enumerate().map(|(index, name)| (*name, index as u64)).collect();
    same(&rows, &classes);
    same(
        &rows,
        &[
            ("slots of a map", abi::MAX_SLOTS as u64),
            ("engines of a device", abi::MAX_ENGINES as u64),
            ("nodes of an extension chain", abi::MAX_CHAIN as u64),
            ("contexts", abi::MAX_CONTEXTS as u64),
            ("bells", abi::BELLS.into()),
            ("requests of a slot that are not complete", abi::MAX_QUEUE as u64),
            ("descriptors of a batch", abi::MAX_BATCH.into()),
            ("bytes of an operation that runs in one piece", abi::MAX_ONE_SHOT.into()),
            ("bytes of a program", wherry_accel::program::MAX_PROGRAM_BYTES as u64),
        ],
    );
    for errno in Errno::ALL {
        same(&rows, &[(errno.name(), errno.number().into())]);
    }
    assert_eq!(rows.keys().filter(|name| name.starts_with('E')).count(), Errno::ALL.len(), "no error too many");
}

#[test]
fn parameters_extensions_and_clone_flags_are_those_of_the_code() {
    same(
        &rows("## Parameters", "## Engine maps"),
        &[
            ("priority", param::PRIORITY),
            ("persistence", param::PERSISTENCE),
            ("engine map", param::ENGINES),
            ("address space", param::SPACE),
            ("share", param::SHARE),
            ("banned", param::BANNED),
            ("flags", param::FLAGS),
            ("hangs", param::HANGS),
        ],
    );
    let names = rows("## Engine maps", "## Creating");
    for name in [
        format!("{} load-balance", extension::LOAD_BALANCE),
        format!("{} bond", extension::BOND),
        format!("{} parallel", extension::PARALLEL),
    ] {
        assert!(names.contains_key(&name), "{name}");
    }
    let clones = rows("## Creating", "## Descriptors");
    let flags = [
        ("engines", clone_flag::ENGINES),
        ("flags", clone_flag::FLAGS),
        ("priority", clone_flag::PRIORITY),
        ("timeline", clone_flag::TIMELINE),
        ("address space", clone_flag::SPACE),
    ];
    same(&clones, &flags.map(|(name, flag)| (name, flag.trailing_zeros().into())));
}

#[test]
fn every_operation_is_listed_with_its_number_and_no_other() {
    let rows = rows("| operation | opcode |", "Words an operation");
    let mut listed: Vec<u64> = rows.values().filter(|cell| cell.starts_with("0x")).map(|cell| number(cell)).collect();
    listed.sort_unstable();
    let known: Vec<u64> = (0..=255u8).filter(|code| opcode::class(*code).is_some()).map(u64::from).collect();
    assert_eq!(listed, known);
    same(
        &rows,
        &[
            ("batch", opcode::BATCH.into()),
            ("move", opcode::MOVE.into()),
            ("crc", opcode::CRC.into()),
            ("delta apply", opcode::DELTA_APPLY.into()),
            ("inflate", opcode::INFLATE.into()),
            ("ChaCha20-Poly1305 open", opcode::CHACHA_OPEN.into()),
            ("run", opcode::RUN.into()),
            ("erasure recover", opcode::RS_RECOVER.into()),
        ],
    );
}

#[test]
fn registers_and_commands_are_those_of_the_code() {
    let text = rows("## Registers", "Doorbell registers of a slot:");
    same(
        &text,
        &[
            ("MAGIC", register::MAGIC),
            ("VERSION", register::VERSION),
            ("ENGINES", register::ENGINES),
            ("CONTEXTS", register::CONTEXTS),
            ("SLOTS", register::SLOTS),
            ("STATUS", register::STATUS),
            ("TIME", register::TIME),
            ("COMMAND", register::COMMAND),
            ("RESULT", register::RESULT),
            ("CREATED", register::CREATED),
            ("ENGINE_TABLE", register::ENGINE_TABLE),
            ("TUNABLES", register::TUNABLES),
            ("BELLS", register::BELLS),
            ("contexts", register::CONTEXTS_BASE),
        ],
    );
    same(
        &rows("Doorbell registers of a slot:", "A descriptor that is taken"),
        &[
            ("BASE", slot_register::BASE),
            ("ENTRIES", slot_register::ENTRIES),
            ("TAIL", slot_register::TAIL),
            ("HEAD", slot_register::HEAD),
            ("STATUS", slot_register::STATUS),
            ("HEAD_ADDRESS", slot_register::HEAD_ADDRESS),
            ("SUBMITTED", slot_register::SUBMITTED),
            ("COMPLETED", slot_register::COMPLETED),
            ("CLIENT", slot_register::CLIENT),
            ("TAIL_ADDRESS", slot_register::TAIL_ADDRESS),
        ],
    );
    same(
        &rows("| command | number | |", "## Scheduling"),
        &[
            ("create", command::CREATE.into()),
            ("destroy", command::DESTROY.into()),
            ("set parameter", command::SET_PARAM.into()),
            ("get parameter", command::GET_PARAM.into()),
            ("fence", command::FENCE.into()),
            ("busy", command::BUSY.into()),
        ],
    );
}
