//! A whole connection, from its hello to its end, as a hostile peer may send it: it ends in an error, never in a panic,
//! and what was read counts as what was sent. Each input is tried as it is, and with the magic numbers, checksums and
//! sequence numbers of hello and frames put right where frames can be told apart.
#![no_main]

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use wherry_stream::{
    Connection, EXTENT_BYTES, FRAME_HEADER_BYTES, FRAME_MAGIC, Frame, FrameHeader, FrameKind, Greeting, HELLO_BYTES,
    HELLO_MAGIC, StreamError,
};

/// All of it must fit into a socket's buffer, because one thread writes and then reads.
const MAX_INPUT: usize = 64 << 10;

fn receive(bytes: &[u8]) {
    let (mut peer, ours) = UnixStream::pair().expect("a pair of sockets");
    peer.write_all(bytes).expect("room for a small input");
    peer.shutdown(Shutdown::Write).expect("a connected socket");
    let connection = Connection::from_unix(ours, "fuzzer").expect("a connected socket");
    let deadline = Instant::now() + Duration::from_secs(5);
    let Ok(mut channel) = Greeting::read(connection, deadline).and_then(Greeting::accept) else {
        return;
    };
    let ending = loop {
        match channel.reader.read_frame() {
            Ok(Frame::Pages { bulk, .. }) => {
                assert_eq!(channel.reader.bulk_left(), bulk);
                if let Err(error) = channel.reader.discard_bulk() {
                    break error;
                }
            }
            Ok(_) => assert_eq!(channel.reader.bulk_left(), 0),
            Err(error) => break error,
        }
    };
    assert!(
        matches!(ending, StreamError::Frame { .. } | StreamError::PeerClosed { .. }),
        "all bytes are there and the end too, so nothing can be waited for: {ending}"
    );
    let stats = channel.reader.stats();
    assert!(stats.bytes <= (bytes.len() - HELLO_BYTES) as u64);
    assert!(stats.bytes >= stats.frames * FRAME_HEADER_BYTES as u64);
    assert_eq!(stats.last_sequence, stats.frames.checked_sub(1));
}

/// Puts right what a random change breaks first.
fn mend(bytes: &mut [u8]) {
    let Some((hello, mut rest)) = bytes.split_first_chunk_mut::<HELLO_BYTES>() else {
        return;
    };
    hello[..8].copy_from_slice(&HELLO_MAGIC);
    let crc = crc32c::crc32c(&hello[..60]);
    hello[60..].copy_from_slice(&crc.to_le_bytes());
    for sequence in 0_u64.. {
        let Some((header, payload)) = rest.split_first_chunk_mut::<FRAME_HEADER_BYTES>() else {
            return;
        };
        header[..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
        header[16..24].copy_from_slice(&sequence.to_le_bytes());
        let crc = crc32c::crc32c(&header[..28]);
        header[28..].copy_from_slice(&crc.to_le_bytes());
        let Ok(said) = FrameHeader::decode(header) else {
            return;
        };
        let length = said.length as usize;
        if payload.len() < length {
            return;
        }
        let covered = match said.kind {
            FrameKind::Pages => usize::from(said.extents) * EXTENT_BYTES,
            _ => length,
        };
        let payload_crc = crc32c::crc32c(&payload[..covered]);
        *header = FrameHeader { payload_crc, ..said }.encode();
        rest = &mut payload[length..];
    }
}

fuzz_target!(|bytes: &[u8]| {
    if bytes.len() > MAX_INPUT {
        return;
    }
    receive(bytes);
    let mut mended = bytes.to_vec();
    mend(&mut mended);
    if mended != bytes {
        receive(&mended);
    }
});
