//! An ownership record as it may lie in the directory: any bytes are refused or mean the same when they are written again.
//! Each input is tried as it is, and as the message of a record whose header and checksums are right.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wherry_migration::records::{Entry, RECORD_BYTES, decode, encode};

fn check(bytes: &[u8]) {
    let Ok(entry) = decode(bytes) else { return };
    // Longer texts than are ever written are cut; everything that decides is kept.
    let again = decode(&encode(&entry)).expect("a record that was just written");
    assert_eq!(again.stored, entry.stored);
    assert_eq!((again.pid, again.written), (entry.pid, entry.written));
    assert!(entry.peer.starts_with(&again.peer));
    assert_eq!(decode(&encode(&again)), Ok(Entry { ..again }));
}

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    let Some((role, message)) = bytes.split_first() else { return };
    let message = &message[..message.len().min(RECORD_BYTES - 24)];
    let mut record = b"WHERRYOR\x01\0".to_vec();
    record.extend_from_slice(&u16::from(role % 4).to_le_bytes());
    record.extend_from_slice(&(message.len() as u32).to_le_bytes());
    record.extend_from_slice(&crc32c::crc32c(message).to_le_bytes());
    record.extend_from_slice(&crc32c::crc32c(&record).to_le_bytes());
    record.extend_from_slice(message);
    record.resize(RECORD_BYTES, 0);
    check(&record);
});
