//! Peers that lie. Every lie is an error that names it, found before anything is allocated or believed.

use std::io::Write;

use proptest::prelude::*;
use wherry_stream::message::{Body, Empty, Message};
use wherry_stream::{
    Ack, ChannelKind, EXTENT_BYTES, Endpoint, Extent, ExtentKind, FRAME_HEADER_BYTES, Frame, FrameError, FrameHeader,
    FrameKind, GRANULE, HELLO_BYTES, MAX_CONTROL_BYTES, MAX_EXTENTS, MAX_PAGES_BYTES, RawHello, RoundEnd, StreamError,
    decode_table,
};

use crate::common::{DATA, FAMILIES, Family, Site, hello};
use crate::frames::about;

/// A frame whose checksums are right, whatever it says.
fn frame(header: FrameHeader, payload: &[u8], covered: usize) -> Vec<u8> {
    let mut bytes = FrameHeader { payload_crc: crc32c::crc32c(&payload[..covered]), ..header }.encode().to_vec();
    bytes.extend_from_slice(payload);
    bytes
}

fn small(kind: FrameKind, sequence: u64, payload: &[u8]) -> Vec<u8> {
    let header = FrameHeader { kind, length: payload.len() as u32, payload_crc: 0, extents: 0, sequence };
    frame(header, payload, payload.len())
}

/// Sets a field of a header and makes its checksum right again.
fn forge(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
    let crc = crc32c::crc32c(&bytes[..28]);
    bytes[28..32].copy_from_slice(&crc.to_le_bytes());
}

fn table(extents: &[(u16, u8, u8, u32, u64)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (block, kind, flags, count, first) in extents {
        bytes.extend_from_slice(&block.to_le_bytes());
        bytes.extend_from_slice(&[*kind, *flags]);
        bytes.extend_from_slice(&count.to_le_bytes());
        bytes.extend_from_slice(&first.to_le_bytes());
    }
    bytes
}

fn pages(extents: &[(u16, u8, u8, u32, u64)], bulk: usize) -> Vec<u8> {
    let mut payload = table(extents);
    let covered = payload.len();
    payload.resize(covered + bulk, 0x3c);
    let header = FrameHeader {
        kind: FrameKind::Pages,
        length: payload.len() as u32,
        payload_crc: 0,
        extents: extents.len() as u16,
        sequence: 0,
    };
    frame(header, &payload, covered)
}

/// What a reader says about these bytes. The connection stays open: whoever wants more than was sent would wait.
fn judge(bytes: &[u8]) -> Result<Frame, StreamError> {
    let (mut raw, mut channel) = Site::new(FAMILIES[1]).raw_channel(DATA);
    raw.write_all(bytes).unwrap();
    let result = channel.reader.read_frame();
    if let Err(error) = &result {
        assert!(!error.is_link_lost(), "it waited for more before it looked: {error}");
    }
    result
}

fn refused(bytes: &[u8]) -> FrameError {
    match judge(bytes) {
        Err(StreamError::Frame { source, .. }) => source,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_length_beyond_the_limit_of_its_kind_is_refused_by_the_header_alone() {
    for kind in FrameKind::ALL {
        let (min, max) = kind.payload_limits();
        let extents = u16::from(kind == FrameKind::Pages);
        let lengths = [min.checked_sub(1), max.checked_add(1), Some(u32::MAX)];
        for length in lengths.into_iter().flatten() {
            let header = FrameHeader { kind, length, payload_crc: 0, extents, sequence: 0 };
            let error = refused(&header.encode());
            assert!(matches!(error, FrameError::Length { length: l, .. } if l == length), "{kind:?} {length}: {error}");
        }
    }
}

#[test]
fn an_unknown_kind_is_named() {
    for kind in [0_u16, 6, 17, 0xfffe] {
        let mut bytes = small(FrameKind::KeepAlive, 0, &[]);
        forge(&mut bytes, 4, &kind.to_le_bytes());
        let error = refused(&bytes);
        assert_eq!(error, FrameError::Kind { found: kind });
        assert!(error.to_string().contains(&format!("unknown frame kind {kind}")), "{error}");
    }
}

#[test]
fn flags_and_reserved_bytes_that_no_version_defines_are_refused() {
    for at in [6, 7, 26, 27] {
        let mut bytes = small(FrameKind::RoundEnd, 0, &[0; 8]);
        forge(&mut bytes, at, &[0x40]);
        assert!(matches!(refused(&bytes), FrameError::Reserved { .. }), "byte {at}");
    }
    let mut bytes = small(FrameKind::RoundEnd, 0, &[0; 8]);
    forge(&mut bytes, 24, &[1]);
    assert!(matches!(refused(&bytes), FrameError::Reserved { field: "extents", .. }));
    assert!(matches!(refused(&small(FrameKind::RoundEnd, 0, &[1, 0, 0, 0, 1, 0, 0, 0])), FrameError::Reserved { .. }));
    for at in [16, 20, 28] {
        let mut payload = [0; 32];
        payload[at] = 2;
        assert!(matches!(refused(&small(FrameKind::Ack, 0, &payload)), FrameError::Reserved { .. }), "byte {at}");
    }
}

#[test]
fn a_missing_or_repeated_frame_is_noticed_by_its_number() {
    for (found, expected) in [(0, 1), (2, 1), (u64::MAX, 1)] {
        let (mut raw, mut channel) = Site::new(FAMILIES[1]).raw_channel(DATA);
        raw.write_all(&small(FrameKind::RoundEnd, 0, &[0; 8])).unwrap();
        raw.write_all(&small(FrameKind::RoundEnd, found, &[0; 8])).unwrap();
        channel.reader.read_frame().unwrap();
        let error = channel.reader.read_frame().unwrap_err();
        let StreamError::Frame { source, .. } = &error else { panic!("{error}") };
        assert_eq!(source, &FrameError::Sequence { kind: FrameKind::RoundEnd, found, expected });
    }
}

#[test]
fn any_changed_bit_of_a_header_or_a_covered_payload_is_noticed() {
    let good = pages(&[(1, 1, 0, 1, 5), (1, 2, 0, 3, 9)], GRANULE as usize);
    assert!(judge(&good).is_ok());
    for bit in 0..FRAME_HEADER_BYTES * 8 {
        let mut header: [u8; FRAME_HEADER_BYTES] = *good.first_chunk().unwrap();
        header[bit / 8] ^= 1 << (bit % 8);
        assert!(FrameHeader::decode(&header).is_err(), "bit {bit}");
    }
    for byte in FRAME_HEADER_BYTES..FRAME_HEADER_BYTES + 2 * EXTENT_BYTES {
        let mut bytes = good.clone();
        bytes[byte] ^= 0x10;
        assert!(matches!(refused(&bytes), FrameError::PayloadChecksum { .. }), "byte {byte}");
    }
    let mut message = Message::new(about(), Body::Run(Empty {})).to_bytes();
    let mut bytes = small(FrameKind::Control, 0, &message);
    assert!(judge(&bytes).is_ok());
    *bytes.last_mut().unwrap() ^= 1;
    assert!(matches!(refused(&bytes), FrameError::PayloadChecksum { .. }));
    message.truncate(5);
    assert!(matches!(refused(&small(FrameKind::Control, 0, &message)), FrameError::Message { .. }));
    assert!(matches!(refused(&small(FrameKind::Control, 0, &[])), FrameError::Message { .. }));
}

#[test]
fn impossible_extents_are_refused_and_numbered() {
    for (extent, why) in [
        ((0, 0, 0, 1, 0), "kind 0"),
        ((0, 3, 0, 1, 0), "kind 3"),
        ((0, 1, 1, 1, 0), "flags 0x1"),
        ((0, 2, 0, 0, 0), "no granules"),
        ((0, 2, 0, 1, u64::MAX), "beyond 2^64"),
        ((0, 2, 0, 1, u64::MAX / GRANULE), "beyond 2^64"),
        ((0, 2, 0, u32::MAX, u64::MAX / GRANULE - 5), "beyond 2^64"),
    ] {
        let error = refused(&pages(&[(0, 2, 0, 1, 0), extent], 0)).to_string();
        assert!(error.contains("extent 1 ") && error.contains(why), "{extent:?}: {error}");
    }
}

#[test]
fn an_extent_table_that_disagrees_with_the_length_is_refused() {
    let bulk = GRANULE as usize;
    assert!(matches!(refused(&pages(&[(0, 1, 0, 2, 0)], bulk)), FrameError::Bulk { .. }));
    assert!(matches!(refused(&pages(&[(0, 2, 0, 1, 0)], bulk)), FrameError::Bulk { .. }));
    assert!(matches!(refused(&pages(&[(0, 1, 0, 1, 0)], bulk - 1)), FrameError::Bulk { .. }));
    assert!(matches!(refused(&pages(&[(0, 1, 0, u32::MAX, 0); 1024], bulk)), FrameError::Bulk { .. }));
    // Few extents leave room for more content than a frame may have.
    let header = FrameHeader {
        kind: FrameKind::Pages,
        length: MAX_PAGES_BYTES,
        payload_crc: crc32c::crc32c(&table(&[(0, 1, 0, 2049, 0)])),
        extents: 1,
        sequence: 0,
    };
    let mut bytes = header.encode().to_vec();
    bytes.extend(table(&[(0, 1, 0, 2049, 0)]));
    assert!(matches!(refused(&bytes), FrameError::Bulk { .. }));
}

#[test]
fn counts_of_extents_that_cannot_be_are_refused_by_the_header_alone() {
    for count in [0, MAX_EXTENTS as u16 + 1, u16::MAX] {
        let header = FrameHeader {
            kind: FrameKind::Pages,
            length: MAX_PAGES_BYTES,
            payload_crc: 0,
            extents: count,
            sequence: 0,
        };
        assert!(matches!(refused(&header.encode()), FrameError::Extents { .. }), "{count}");
    }
    let header = FrameHeader { kind: FrameKind::Pages, length: 31, payload_crc: 0, extents: 2, sequence: 0 };
    assert!(matches!(refused(&header.encode()), FrameError::Length { min: 32, .. }));
}

#[test]
fn a_frame_cut_off_anywhere_is_an_error_and_never_a_frame() {
    let run = Message::new(about(), Body::Run(Empty {})).to_bytes();
    for whole in [
        pages(&[(1, 1, 0, 1, 5), (1, 2, 0, 3, 9)], GRANULE as usize),
        small(FrameKind::Control, 0, &run),
        small(FrameKind::RoundEnd, 0, &[1, 0, 0, 0, 0, 0, 0, 0]),
        small(FrameKind::Ack, 0, &[0; 32]),
    ] {
        let ends = (1..whole.len().min(110)).chain([whole.len() - 1]);
        for end in ends {
            let (mut raw, mut channel) = Site::new(FAMILIES[1]).raw_channel(DATA);
            raw.write_all(&whole[..end]).unwrap();
            raw.hang_up();
            let error = channel.reader.read_frame().and_then(|_| channel.reader.discard_bulk()).unwrap_err();
            assert!(
                matches!(error, StreamError::PeerClosed { between_frames: false, .. }),
                "cut off after {end} bytes: {error}"
            );
        }
    }
}

#[test]
fn whoever_claims_much_and_sends_little_ends_as_cut_off() {
    for family in FAMILIES {
        let (mut raw, mut channel) = Site::new(family).raw_channel(hello(ChannelKind::Control));
        let header = FrameHeader {
            kind: FrameKind::Control,
            length: MAX_CONTROL_BYTES,
            payload_crc: 0,
            extents: 0,
            sequence: 0,
        };
        raw.write_all(&header.encode()).unwrap();
        raw.write_all(&[0; 100]).unwrap();
        raw.hang_up();
        let error = channel.reader.read_frame().unwrap_err();
        assert!(matches!(error, StreamError::PeerClosed { between_frames: false, .. }), "{family:?}: {error}");
    }
}

fn extent() -> impl Strategy<Value = Extent> {
    let kind = prop_oneof![Just(ExtentKind::Data), Just(ExtentKind::Zero)];
    (any::<u16>(), kind, 0..u64::MAX / GRANULE - u64::from(u32::MAX), 1..=u32::MAX)
        .prop_map(|(block, kind, first, count)| Extent { block, kind, first, count })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_make_a_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), bulk in any::<u64>()) {
        if let Some(hello) = bytes.first_chunk::<HELLO_BYTES>() {
            let _ = RawHello::decode(hello);
        }
        if let Some(header) = bytes.first_chunk::<FRAME_HEADER_BYTES>() {
            let _ = FrameHeader::decode(header);
            let _ = Ack::decode(header);
        }
        if let Some(end) = bytes.first_chunk::<8>() {
            let _ = RoundEnd::decode(end);
        }
        let _ = decode_table(&bytes, bulk, &mut Vec::new());
        let _ = Message::from_bytes(&bytes);
        let _ = String::from_utf8_lossy(&bytes).parse::<Endpoint>();
    }

    #[test]
    fn extents_come_back_as_they_were(extents in proptest::collection::vec(extent(), 1..20)) {
        let bytes: Vec<_> = extents.iter().map(|e| (e.block, e.kind as u8, 0, e.count, e.first)).collect();
        let bulk: u64 = extents.iter().map(Extent::bulk_bytes).sum();
        let mut decoded = Vec::new();
        let result = decode_table(&table(&bytes), bulk, &mut decoded);
        if bulk <= wherry_stream::MAX_BULK_BYTES {
            prop_assert_eq!(result, Ok(()));
            prop_assert_eq!(decoded, extents);
        } else {
            let refused = matches!(result, Err(FrameError::Bulk { .. }));
            prop_assert!(refused, "{:?}", result);
        }
    }

    #[test]
    fn small_frames_come_back_as_they_were(round in any::<u32>(), ack: (u64, u64, Option<u32>, u32)) {
        let end = RoundEnd { round };
        prop_assert_eq!(RoundEnd::decode(&end.encode()), Ok(end));
        let ack = Ack { frames: ack.0, bytes: ack.1, round: ack.2, checksum: ack.3 };
        prop_assert_eq!(Ack::decode(&ack.encode()), Ok(ack));
    }

    #[test]
    fn endpoints_that_parse_are_written_as_they_were(text in "(tcp|unix):[a-z0-9./:\\[\\]-]{0,20}") {
        if let Ok(endpoint) = text.parse::<Endpoint>() {
            prop_assert_eq!(endpoint.to_string().parse::<Endpoint>(), Ok(endpoint));
        }
    }

    #[test]
    fn a_channel_survives_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..300), honest in 0_usize..3) {
        let (mut raw, mut channel) = Site::new(Family::Unix).raw_channel(DATA);
        for sequence in 0..honest {
            raw.write_all(&small(FrameKind::RoundEnd, sequence as u64, &[0; 8])).unwrap();
        }
        raw.write_all(&bytes).unwrap();
        raw.hang_up();
        let mut frames = 0;
        while channel.reader.read_frame().and_then(|_| channel.reader.discard_bulk()).is_ok() {
            frames += 1;
        }
        prop_assert_eq!(frames, honest);
    }
}
