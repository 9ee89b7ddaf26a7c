//! A frame header: refused, or its length is within the limits of its kind and it is written as it was read. Each input
//! is tried as it is and with magic and checksum put right. The small payloads (round end, acknowledgement) too.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wherry_stream::{
    Ack, EXTENT_BYTES, FRAME_HEADER_BYTES, FRAME_MAGIC, FrameHeader, FrameKind, MAX_EXTENTS, RoundEnd,
};

fn check(bytes: &[u8; FRAME_HEADER_BYTES]) {
    let Ok(header) = FrameHeader::decode(bytes) else {
        return;
    };
    assert_eq!(&header.encode(), bytes);
    let (min, max) = header.kind.payload_limits();
    assert!((min..=max).contains(&header.length));
    let extents = usize::from(header.extents);
    assert_eq!(extents > 0, header.kind == FrameKind::Pages);
    assert!(extents <= MAX_EXTENTS && extents * EXTENT_BYTES <= header.length as usize);
}

fuzz_target!(|bytes: &[u8]| {
    let Some(header) = bytes.first_chunk::<FRAME_HEADER_BYTES>() else {
        return;
    };
    check(header);
    let mut mended = *header;
    mended[..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
    let crc = crc32c::crc32c(&mended[..28]);
    mended[28..].copy_from_slice(&crc.to_le_bytes());
    check(&mended);

    if let Ok(ack) = Ack::decode(header) {
        assert_eq!(&ack.encode(), header);
    }
    if let Some(payload) = header.first_chunk()
        && let Ok(end) = RoundEnd::decode(payload)
    {
        assert_eq!(&end.encode(), payload);
    }
});
