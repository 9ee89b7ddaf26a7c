//! An extent table: refused, or every extent has granules, ends within 2^64 bytes, and their content is what follows.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wherry_stream::{EXTENT_BYTES, Extent, ExtentKind, GRANULE, MAX_BULK_BYTES, MAX_EXTENTS, decode_table};

/// Bytes of content that the data extents of a table ask for, read without the decoder.
fn asked(table: &[u8]) -> u64 {
    let data = table.as_chunks::<EXTENT_BYTES>().0.iter().filter(|e| e[2] == 1);
    data.map(|e| u64::from(u32::from_le_bytes([e[4], e[5], e[6], e[7]])) * GRANULE).sum()
}

fuzz_target!(|bytes: &[u8]| {
    let mut extents = Vec::new();
    for bulk in [0, GRANULE, asked(bytes)] {
        if decode_table(bytes, bulk, &mut extents).is_err() {
            continue;
        }
        assert!(!extents.is_empty() && extents.len() <= MAX_EXTENTS);
        assert_eq!(extents.len() * EXTENT_BYTES, bytes.len());
        assert_eq!(extents.iter().map(Extent::bulk_bytes).sum::<u64>(), bulk);
        assert!(bulk <= MAX_BULK_BYTES);
        for extent in &extents {
            let range = extent.range();
            assert!(extent.count > 0 && range.end - range.start == extent.bytes());
            assert!(matches!(extent.kind, ExtentKind::Zero) || extent.bytes() <= bulk);
        }
    }
});
