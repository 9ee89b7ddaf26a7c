//! The committed seeds of the fuzz targets that read the wire are still accepted, so that a fuzz run of a minute starts
//! from what real encoders write. If this fails after a wanted change: `cargo run -p wherry-stream --example seeds`.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

use wherry_stream::message::Message;
use wherry_stream::{
    Connection, Endpoint, Extent, ExtentKind, FrameHeader, Greeting, RawHello, StreamError, decode_table,
};

use crate::common::deadline;

fn good(target: &str) -> Vec<(String, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let entries = std::fs::read_dir(&directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    let seeds: Vec<_> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("good-"))
        .map(|path| (path.display().to_string(), std::fs::read(&path).unwrap()))
        .collect();
    assert!(!seeds.is_empty(), "{} has no seed that a decoder accepts", directory.display());
    seeds
}

#[test]
fn seeds_that_are_good_are_accepted() {
    for (name, bytes) in good("hello") {
        RawHello::decode(bytes.first_chunk().unwrap()).and_then(|hello| hello.hello()).expect(&name);
    }
    for (name, bytes) in good("frame_header") {
        FrameHeader::decode(bytes.first_chunk().unwrap()).expect(&name);
    }
    for (name, bytes) in good("control_message") {
        Message::from_bytes(&bytes).expect(&name);
    }
    for (name, bytes) in good("endpoint") {
        String::from_utf8(bytes).unwrap().parse::<Endpoint>().expect(&name);
    }
    for (name, bytes) in good("pages") {
        let mut extents: Vec<Extent> = Vec::new();
        // The content is not in the seed; what it must be is in the error, or in the table once it is right.
        let bulk = (0..8).map(|granules| granules * wherry_stream::GRANULE);
        let fits = bulk.filter(|bulk| decode_table(&bytes, *bulk, &mut extents).is_ok()).count();
        assert_eq!(fits, 1, "{name}");
        assert!(bytes[2] == ExtentKind::Data as u8, "{name}");
    }
}

#[test]
fn every_message_of_the_wire_has_a_seed() {
    let document = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/wire.md")).unwrap();
    let table = document.split_once("| message | number | from | fields |\n").unwrap().1;
    let rows = table.lines().skip(1).take_while(|line| line.starts_with('|'));
    let documented: BTreeSet<_> = rows.map(|row| row.split('|').nth(1).unwrap().trim().to_owned()).collect();
    let seeds = good("control_message");
    let seeded: BTreeSet<_> =
        seeds.iter().map(|(_, bytes)| Message::from_bytes(bytes).unwrap().1.kind().to_owned()).collect();
    assert_eq!(seeded, documented);
}

#[test]
fn seeds_of_whole_channels_are_read_to_their_end() {
    for (name, bytes) in good("channel") {
        let (mut peer, ours) = std::os::unix::net::UnixStream::pair().unwrap();
        peer.write_all(&bytes).unwrap();
        peer.shutdown(std::net::Shutdown::Write).unwrap();
        let connection = Connection::from_unix(ours, &name).unwrap();
        let mut reader = Greeting::read(connection, deadline()).unwrap().accept().unwrap().reader;
        let mut frames = 0;
        let ending = loop {
            match reader.read_frame().and_then(|_| reader.discard_bulk()) {
                Ok(()) => frames += 1,
                Err(ending) => break ending,
            }
        };
        assert!(matches!(ending, StreamError::PeerClosed { between_frames: true, .. }), "{ending}");
        assert!(frames >= 4, "{name}: {frames} frames");
    }
}
