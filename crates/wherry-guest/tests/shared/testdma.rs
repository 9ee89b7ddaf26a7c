//! `docs/testdma.md` says what the code says.

use wherry_guest::testdma::{
    DEVICE, MAX_BUFFER, MAX_ENTRIES, MSIX_BYTES, REGISTERS_BYTES, VENDOR, area, area_bytes, buffer_word, completions,
    register,
};

const DOCUMENT: &str = include_str!("../../../../docs/testdma.md");

/// First cells of the table under a heading: offset, name, bytes.
fn table(heading: &str) -> Vec<(String, String, String)> {
    let start = DOCUMENT.find(&format!("\n## {heading}\n")).unwrap();
    let body = &DOCUMENT[start + 4..];
    let body = &body[..body.find("\n## ").unwrap_or(body.len())];
    let rows = body.lines().filter(|line| line.starts_with("| 0x"));
    rows.map(|row| {
        let mut cells = row.split('|').skip(1).map(|cell| cell.trim().to_owned());
        (cells.next().unwrap(), cells.next().unwrap(), cells.next().unwrap())
    })
    .collect()
}

fn coded(all: &[(&str, u64, u64)]) -> Vec<(String, String, String)> {
    all.iter().map(|(name, at, bytes)| (format!("0x{at:02x}"), format!("`{name}`"), bytes.to_string())).collect()
}

#[test]
fn registers_and_words_of_the_test_device_are_those_of_its_manual() {
    assert_eq!(table("Registers"), coded(register::ALL));
    assert_eq!(table("The area"), coded(area::ALL));
    assert!(DOCUMENT.contains(&format!("Vendor {VENDOR:#x}, device {DEVICE:#x}")));
    assert!(DOCUMENT.contains(&format!("| 0 | {REGISTERS_BYTES:#x} |")));
    assert!(
        DOCUMENT.contains(&format!("16 to {MAX_BUFFER} bytes")) && DOCUMENT.contains(&format!("2 to {MAX_ENTRIES}"))
    );
    assert_eq!(MSIX_BYTES, 0x1000);
}

#[test]
fn the_parts_of_the_area_do_not_overlap() {
    for entries in [2, 64, MAX_ENTRIES] {
        assert_eq!(completions(entries), 0x1000 + 16 * u64::from(entries));
        assert_eq!(area_bytes(entries), completions(entries) + 16 * u64::from(entries));
    }
    for (one, next) in register::ALL.iter().zip(&register::ALL[1..]).chain(area::ALL.iter().zip(&area::ALL[1..])) {
        assert!(one.1 + one.2 <= next.1, "{} and {}", one.0, next.0);
    }
}

#[test]
fn buffers_of_other_numbers_seeds_and_places_differ_in_every_word() {
    for word in 1..8192 {
        let here = buffer_word(1, 7, word);
        assert_ne!(here, buffer_word(1, 8, word));
        assert_ne!(here, buffer_word(2, 7, word));
        assert_ne!(here, buffer_word(1, 7, word - 1));
    }
    assert_eq!(buffer_word(1, 7, 0), 7);
}
