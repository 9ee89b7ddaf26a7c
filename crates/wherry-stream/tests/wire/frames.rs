//! Frames between two honest ends.

use std::io::Write;
use std::os::fd::AsFd;
use std::time::Duration;

use wherry_stream::message::{About, Body, Offer, Reason};
use wherry_stream::{
    Ack, ChannelKind, ChannelStats, Extent, ExtentKind, FRAME_HEADER_BYTES, FileRange, Frame, FrameError, GRANULE,
    MAX_BULK_BYTES, MAX_EXTENTS, RoundEnd, StreamError, message,
};

use crate::common::{DATA, FAMILIES, Site, hello, pattern, ranges, spawn};

const G: usize = GRANULE as usize;

fn data(block: u16, first: u64, count: u32) -> Extent {
    Extent { block, kind: ExtentKind::Data, first, count }
}

fn zero(block: u16, first: u64, count: u32) -> Extent {
    Extent { block, kind: ExtentKind::Zero, first, count }
}

pub fn about() -> About {
    About { vm: vec![1; 16], epoch: 2, attempt: vec![3; 16], incarnation: vec![] }
}

#[test]
fn pages_arrive_where_the_extents_say_and_both_ends_count_alike() {
    for family in FAMILIES {
        let (opener, acceptor) = Site::new(family).channels(DATA);
        let extents = vec![data(0, 5, 2), zero(1, 1 << 40, u32::MAX), data(u16::MAX, 0, 1), data(0, 100, 3)];
        let content = pattern(6 * G);
        let (sent_extents, mut sent) = (extents.clone(), content.clone());
        let writer = spawn(move || {
            let mut writer = opener.writer;
            writer.write_pages(&sent_extents, &ranges(&mut sent, G)).unwrap();
            writer.write_pages(&[zero(3, 9, 1)], &[]).unwrap();
            writer.write_keep_alive().unwrap();
            writer.write_round_end(1).unwrap();
            (writer.stats(), writer.meter().bytes(), sent)
        });
        let mut reader = acceptor.reader;
        assert_eq!(reader.read_frame().unwrap(), Frame::Pages { extents, bulk: 6 * GRANULE });
        assert_eq!(reader.stats(), ChannelStats::default(), "counted before its content was taken");
        let mut received = vec![0; 6 * G];
        let pieces = ranges(&mut received, 2 * G);
        reader.read_bulk(&pieces[..1]).unwrap();
        assert_eq!(reader.bulk_left(), 4 * GRANULE);
        reader.read_bulk(&pieces[1..]).unwrap();
        assert!(received == content, "{family:?}");
        assert_eq!(reader.read_frame().unwrap(), Frame::Pages { extents: vec![zero(3, 9, 1)], bulk: 0 });
        assert_eq!(reader.read_frame().unwrap(), Frame::RoundEnd(RoundEnd { round: 1 }));
        let (sent, metered, _) = writer.join().unwrap();
        assert_eq!(reader.stats(), sent);
        assert_eq!((sent.frames, sent.last_sequence), (4, Some(3)));
        assert_eq!((sent.bytes, metered), (reader.meter().bytes(), reader.meter().bytes()));
        assert_eq!(sent.bytes as usize, 4 * FRAME_HEADER_BYTES + 5 * 16 + 6 * G + 8);
    }
}

#[test]
fn content_taken_from_a_file_is_the_same_frame() {
    for family in FAMILIES {
        let site = Site::new(family);
        let content = pattern(8 * G);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&content).unwrap();
        let extents = [data(0, 1, 2), zero(0, 3, 1), data(0, 6, 1)];
        let mut stats = Vec::new();
        for by_file in [false, true] {
            let (opener, acceptor) = site.channels(DATA);
            let mut writer = opener.writer;
            let mut expected = [&content[G..3 * G], &content[6 * G..7 * G]].concat();
            if by_file {
                let piece = |at: usize, n: usize| FileRange {
                    file: file.as_fd(),
                    offset: (at * G) as u64,
                    len: (n * G) as u64,
                };
                writer.write_pages_from_file(&extents, &[piece(1, 2), piece(6, 1)]).unwrap();
            } else {
                writer.write_pages(&extents, &ranges(&mut expected, 3 * G)).unwrap();
            }
            let mut reader = acceptor.reader;
            reader.read_frame().unwrap();
            let mut received = vec![0; 3 * G];
            reader.read_bulk(&ranges(&mut received, G)).unwrap();
            assert!(received == expected, "{family:?}, file {by_file}");
            assert_eq!(reader.stats(), writer.stats());
            stats.push(writer.stats());
        }
        assert_eq!(stats[0], stats[1]);
    }
}

#[test]
fn the_largest_frame_of_scattered_granules_arrives() {
    for family in FAMILIES {
        let (opener, acceptor) = Site::new(family).channels(DATA);
        let (pages, zeros) = (MAX_EXTENTS as u64 - 1, 1);
        let mut extents: Vec<_> = (0..pages).map(|i| data(1, i * 2, 1)).collect();
        extents[7].count += (MAX_BULK_BYTES / GRANULE - pages) as u32;
        extents.extend((0..zeros).map(|i| zero(2, i, 1)));
        let content = pattern(MAX_BULK_BYTES as usize);
        let (sent_extents, mut sent) = (extents.clone(), content.clone());
        let writer = spawn(move || {
            let mut writer = opener.writer;
            let pieces = ranges(&mut sent, G);
            // Swapped neighbours do not touch, so more ranges remain than one call takes.
            let swapped: Vec<_> = pieces.chunks(2).flat_map(|pair| pair.iter().rev()).copied().collect();
            writer.write_pages(&sent_extents, &swapped).unwrap();
            sent
        });
        let mut reader = acceptor.reader;
        assert_eq!(reader.read_frame().unwrap(), Frame::Pages { extents, bulk: MAX_BULK_BYTES });
        let mut received = vec![0; MAX_BULK_BYTES as usize];
        let pieces = ranges(&mut received, G);
        let swapped: Vec<_> = pieces.chunks(2).flat_map(|pair| pair.iter().rev()).copied().collect();
        reader.read_bulk(&swapped).unwrap();
        writer.join().unwrap();
        assert!(received == content, "{family:?}");
    }
}

#[test]
fn messages_and_acknowledgements_arrive_in_both_directions() {
    for family in FAMILIES {
        let (mut source, mut destination) = Site::new(family).channels(hello(ChannelKind::Control));
        let offer = Body::Offer(Offer { state: pattern(3 << 20), rounds: 3, ..Offer::default() });
        let sent = message::Message::new(about(), offer.clone());
        let writer = spawn(move || {
            source.writer.write_message(&sent).unwrap();
            source
        });
        assert_eq!(destination.reader.read_message().unwrap(), (about(), offer));
        let mut source = writer.join().unwrap();
        for ack in [
            Ack { frames: 7, bytes: u64::MAX, round: None, checksum: 0xdead_beef },
            Ack { frames: 8, bytes: 9, round: Some(u32::MAX), checksum: 1 },
            Ack { round: Some(0), ..Ack::default() },
        ] {
            destination.writer.write_ack(ack).unwrap();
            assert_eq!(source.reader.read_frame().unwrap(), Frame::Ack(ack));
        }
        assert_eq!(source.reader.stats(), destination.writer.stats());
        assert_eq!(source.writer.stats(), destination.reader.stats());
    }
}

#[test]
fn a_frame_that_is_no_message_is_an_error_where_a_message_was_to_come() {
    let (mut source, mut destination) = Site::new(FAMILIES[0]).channels(hello(ChannelKind::Control));
    source.writer.write_round_end(4).unwrap();
    let error = destination.reader.read_message().unwrap_err().to_string();
    assert!(error.contains("control channel") && error.contains("unexpected RoundEnd"), "{error}");
}

#[test]
fn content_nobody_wants_can_be_discarded_and_still_counts() {
    let (mut source, mut destination) = Site::new(FAMILIES[0]).channels(DATA);
    let mut content = pattern(33 * G);
    source.writer.write_pages(&[data(0, 0, 33)], &ranges(&mut content, 33 * G)).unwrap();
    source.writer.write_round_end(1).unwrap();
    destination.reader.read_frame().unwrap();
    destination.reader.discard_bulk().unwrap();
    assert_eq!(destination.reader.read_frame().unwrap(), Frame::RoundEnd(RoundEnd { round: 1 }));
    assert_eq!(destination.reader.stats(), source.writer.stats());
}

#[test]
fn wrong_use_is_an_error_and_sends_nothing() {
    let (mut source, mut destination) = Site::new(FAMILIES[0]).channels(DATA);
    let mut content = pattern(MAX_BULK_BYTES as usize + G);
    let whole = ranges(&mut content, MAX_BULK_BYTES as usize + G);
    let one = ranges(&mut content[..G], G);
    let writer = &mut source.writer;
    assert!(matches!(writer.write_pages(&[data(0, 0, 2)], &one), Err(StreamError::Misuse { .. })));
    assert!(matches!(writer.write_pages(&[zero(0, 0, 1)], &one), Err(StreamError::Misuse { .. })));
    assert!(matches!(
        writer.write_pages(&[data(0, 0, (MAX_BULK_BYTES / GRANULE) as u32 + 1)], &whole),
        Err(StreamError::Misuse { .. })
    ));
    for extents in
        [vec![], vec![zero(0, 0, 1); MAX_EXTENTS + 1], vec![zero(0, 0, 0)], vec![zero(0, u64::MAX / GRANULE, 2)]]
    {
        assert!(matches!(writer.write_pages(&extents, &[]), Err(StreamError::Frame { .. })), "{}", extents.len());
    }
    let huge = Body::Abort(Reason { text: "x".repeat(65 << 20) });
    assert!(matches!(writer.write_message(&message::Message::new(about(), huge)), Err(StreamError::Misuse { .. })));
    assert_eq!(writer.stats(), ChannelStats::default());

    writer.write_pages(&[data(0, 0, 1)], &one).unwrap();
    let reader = &mut destination.reader;
    reader.read_frame().unwrap();
    assert!(matches!(reader.read_frame(), Err(StreamError::Misuse { .. })), "content was left in the stream");
    assert!(matches!(reader.read_bulk(&whole), Err(StreamError::Misuse { .. })), "more than the frame has");
    reader.discard_bulk().unwrap();
}

#[test]
fn a_sign_of_life_keeps_a_reader_from_giving_up_and_is_no_frame_to_it() {
    let (source, mut destination) = Site::new(FAMILIES[0]).channels(DATA);
    destination.reader.set_idle_limit(Duration::from_secs(60));
    let mut writer = source.writer;
    for _ in 0..1000 {
        writer.write_keep_alive().unwrap();
    }
    writer.write_round_end(9).unwrap();
    assert_eq!(destination.reader.read_frame().unwrap(), Frame::RoundEnd(RoundEnd { round: 9 }));
    assert_eq!(destination.reader.stats().frames, 1001);
}

#[test]
fn a_closed_channel_between_frames_is_told_from_one_cut_off() {
    for family in FAMILIES {
        let (source, mut destination) = Site::new(family).channels(DATA);
        let closer = source.closer();
        let mut writer = source.writer;
        writer.write_round_end(1).unwrap();
        closer.close();
        assert!(writer.write_round_end(2).unwrap_err().is_cancelled());
        destination.reader.read_frame().unwrap();
        let error = destination.reader.read_frame().unwrap_err();
        assert!(matches!(error, StreamError::PeerClosed { between_frames: true, .. }), "{family:?}: {error}");
        assert!(
            error.to_string().contains("data channel 2") && error.to_string().contains("between frames"),
            "{error}"
        );
    }
}

#[test]
fn an_error_of_a_frame_says_on_which_channel_it_came() {
    let (mut raw, mut channel) = Site::new(FAMILIES[1]).raw_channel(DATA);
    raw.write_all(&[0x55; 64]).unwrap();
    let error = channel.reader.read_frame().unwrap_err();
    assert!(matches!(&error, StreamError::Frame { source: FrameError::Magic { found: 0x5555_5555 }, .. }), "{error}");
    assert!(error.to_string().contains("data channel 2 with"), "{error}");
    assert!(!error.is_link_lost());
}
