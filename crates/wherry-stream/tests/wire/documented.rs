//! `docs/wire.md` says what the code does: constants, offsets, sizes and numbers.

use std::collections::BTreeMap;

use wherry_stream as wire;
use wherry_stream::{Ack, ChannelKind, FrameHeader, FrameKind, HelloRefusal, RawHello, Role, RoundEnd};

const PAGE: &str = include_str!("../../../../docs/wire.md");

/// Rows of the table whose first heading is `title`.
fn table(title: &str) -> Vec<Vec<String>> {
    let cells = |line: &str| -> Vec<String> {
        line.trim().trim_matches('|').split('|').map(|c| c.trim().trim_matches('`').to_owned()).collect()
    };
    let mut lines = PAGE.lines().skip_while(|line| !line.starts_with('|') || cells(line)[0] != title);
    assert!(lines.next().is_some(), "docs/wire.md has no table that begins with {title:?}");
    lines.skip(1).take_while(|line| line.starts_with('|')).map(cells).collect()
}

/// Compares a layout with real bytes. `fields`: name and its bytes. What the page calls reserved must be 0, and every
/// byte must belong to exactly one row.
fn layout(title: &str, bytes: &[u8], fields: &[(&str, Vec<u8>)]) {
    let mut fields: BTreeMap<_, _> = fields.iter().cloned().collect();
    let mut next = 0;
    for row in table(title) {
        let [name, offset, size] = [0, 1, 2].map(|i| row[i].clone());
        let (offset, size): (usize, usize) = (offset.parse().unwrap(), size.parse().unwrap());
        assert_eq!(offset, next, "{title}: {name} leaves a gap or overlaps");
        next += size;
        let expected = match name.as_str() {
            "reserved" | "flags" => vec![0; size],
            _ => fields.remove(name.as_str()).unwrap_or_else(|| panic!("{title}: the code has no {name}")),
        };
        assert_eq!(bytes[offset..next], expected, "{title}: {name}");
    }
    assert_eq!(next, bytes.len(), "{title}: size");
    assert!(fields.is_empty(), "{title}: not documented: {fields:?}");
}

#[test]
fn constants_are_as_documented() {
    let mut code: BTreeMap<&str, u64> = BTreeMap::from([
        ("VERSION_MIN", wire::VERSION_MIN.into()),
        ("VERSION_MAX", wire::VERSION_MAX.into()),
        ("HELLO_BYTES", wire::HELLO_BYTES as u64),
        ("FRAME_HEADER_BYTES", wire::FRAME_HEADER_BYTES as u64),
        ("EXTENT_BYTES", wire::EXTENT_BYTES as u64),
        ("GRANULE", wire::GRANULE),
        ("MAX_EXTENTS", wire::MAX_EXTENTS as u64),
        ("MAX_BULK_BYTES", wire::MAX_BULK_BYTES),
        ("MAX_PAGES_BYTES", wire::MAX_PAGES_BYTES.into()),
        ("MAX_CONTROL_BYTES", wire::MAX_CONTROL_BYTES.into()),
    ]);
    for row in table("constant") {
        let value = code.remove(row[0].as_str()).unwrap_or_else(|| panic!("the code has no {}", row[0]));
        assert_eq!(row[1], value.to_string(), "{}", row[0]);
    }
    assert!(code.is_empty(), "not documented: {code:?}");
    let versions: Vec<u16> = table("version").iter().map(|row| row[0].parse().unwrap()).collect();
    assert_eq!(versions, (1..=wire::VERSION_MAX).collect::<Vec<_>>(), "the history must have a line for each version");
}

#[test]
fn layouts_are_as_documented() {
    let hello = RawHello {
        role: Role::Acceptor,
        version_min: 0x0102,
        version_max: 0x0304,
        kind: 0x0506,
        index: 0x0708,
        attempt: [0x5a; 16],
        status: 0x090a,
    };
    let bytes = hello.encode();
    layout(
        "hello",
        &bytes,
        &[
            ("magic", wire::HELLO_MAGIC.to_vec()),
            ("version_min", vec![2, 1]),
            ("version_max", vec![4, 3]),
            ("role", vec![2]),
            ("status", vec![0x0a, 9]),
            ("kind", vec![6, 5]),
            ("index", vec![8, 7]),
            ("attempt", vec![0x5a; 16]),
            ("crc", crc32c::crc32c(&bytes[..60]).to_le_bytes().to_vec()),
        ],
    );
    let magic: Vec<String> = bytes[..8].iter().map(|b| format!("{b:02x}")).collect();
    assert!(table("hello")[0][3].contains(&magic.join(" ")));

    let header = FrameHeader {
        kind: FrameKind::Pages,
        length: 0x0011_2233,
        payload_crc: 0x4455_6677,
        extents: 0x0203,
        sequence: 0x1122_3344_5566_7788,
    };
    let bytes = header.encode();
    layout(
        "frame",
        &bytes,
        &[
            ("magic", b"WyFr".to_vec()),
            ("kind", vec![2, 0]),
            ("length", vec![0x33, 0x22, 0x11, 0]),
            ("payload_crc", vec![0x77, 0x66, 0x55, 0x44]),
            ("sequence", vec![0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]),
            ("extents", vec![3, 2]),
            ("crc", crc32c::crc32c(&bytes[..28]).to_le_bytes().to_vec()),
        ],
    );

    let bytes = RoundEnd { round: 0x0102_0304 }.encode();
    layout("round end", &bytes, &[("round", vec![4, 3, 2, 1])]);

    let bytes = Ack { frames: 5, bytes: 6, round: Some(7), checksum: 8 }.encode();
    let wide = |n: u8| vec![n, 0, 0, 0, 0, 0, 0, 0];
    let fields = [
        ("frames", wide(5)),
        ("bytes", wide(6)),
        ("round", vec![7, 0, 0, 0]),
        ("barrier", vec![1, 0, 0, 0]),
        ("checksum", vec![8, 0, 0, 0]),
    ];
    layout("ack", &bytes, &fields);

    // The encoder of extents is not public; the decoder is.
    let rows = table("extent");
    let mut bytes = [0; wire::EXTENT_BYTES];
    for (name, value) in [("block", &[2, 1][..]), ("kind", &[2]), ("count", &[6, 5, 4, 3]), ("first", &[9])] {
        let row = rows.iter().find(|row| row[0] == name).unwrap();
        let offset: usize = row[1].parse().unwrap();
        bytes[offset..offset + value.len()].copy_from_slice(value);
    }
    let mut extents = Vec::new();
    wire::decode_table(&bytes, 0, &mut extents).unwrap();
    let expected = wire::Extent { block: 0x0102, kind: wire::ExtentKind::Zero, first: 9, count: 0x0304_0506 };
    assert_eq!(extents, [expected]);
}

#[test]
fn kinds_and_refusals_are_as_documented() {
    let documented = |title: &str| -> Vec<(String, u16)> {
        table(title).into_iter().map(|row| (row[0].clone(), row[1].parse().unwrap())).collect()
    };
    let channels = [ChannelKind::Control, ChannelKind::Data, ChannelKind::Urgent];
    assert_eq!(documented("channel"), channels.map(|kind| (format!("{kind:?}"), kind as u16)));
    use HelloRefusal::{Attempt, Busy, Kind, Unexpected, Version};
    let refusals = [Version, Kind, Attempt, Unexpected, Busy];
    assert_eq!(documented("refusal"), refusals.map(|refusal| (format!("{refusal:?}"), refusal as u16)));
    assert_eq!(documented("frame kind"), FrameKind::ALL.map(|kind| (format!("{kind:?}"), kind as u16)));
    for (row, kind) in table("frame kind").iter().zip(FrameKind::ALL) {
        let (min, max) = kind.payload_limits();
        assert_eq!((row[2].as_str(), row[3].as_str()), (&*min.to_string(), &*max.to_string()), "{kind:?}");
    }
}
