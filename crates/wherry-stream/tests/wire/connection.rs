//! Bytes in both directions, and every way a transfer can end.

use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use wherry_stream::{FileRange, StreamError};

use crate::common::{FAMILIES, Site, deadline, pattern, ranges, spawn, spawn_until_blocked};

const LONG: Duration = Duration::from_secs(3600);

#[test]
fn more_ranges_than_one_call_takes_arrive_in_order() {
    for family in FAMILIES {
        let (opener, acceptor) = Site::new(family).connections();
        let mut sent = pattern(3000 * 777);
        let expected = sent.clone();
        let writer = spawn(move || {
            // Every other piece twice removed, so that no two ranges touch and none are merged.
            let (_, mut writer) = opener.split();
            let pieces = ranges(&mut sent, 777);
            let order: Vec<_> = pieces.iter().step_by(2).chain(pieces.iter().skip(1).step_by(2)).copied().collect();
            writer.writev_all(&order, false, "sending").unwrap();
            drop(sent);
        });
        let mut received = vec![0; expected.len()];
        let (mut reader, _) = acceptor.split();
        let pieces = ranges(&mut received, 777);
        let order: Vec<_> = pieces.iter().step_by(2).chain(pieces.iter().skip(1).step_by(2)).copied().collect();
        reader.readv_exact(&order, "receiving").unwrap();
        writer.join().unwrap();
        assert!(received == expected, "{family:?}");
    }
}

#[test]
fn a_piece_of_a_file_arrives_as_it_is() {
    for family in FAMILIES {
        let (opener, acceptor) = Site::new(family).connections();
        let bytes = pattern(3 << 20);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file.rewind().unwrap();
        let writer = spawn(move || {
            let (_, mut writer) = opener.split();
            let range = FileRange { file: file.as_fd(), offset: 4096, len: (3 << 20) - 4096 };
            writer.send_file(range, "sending").unwrap();
            let beyond = FileRange { file: file.as_fd(), offset: (3 << 20) - 1, len: 2 };
            writer.send_file(beyond, "sending").unwrap_err().to_string()
        });
        let mut received = vec![0; (3 << 20) - 4096];
        let (mut reader, _) = acceptor.split();
        reader.read_exact(&mut received, "receiving").unwrap();
        assert!(received == bytes[4096..], "{family:?}");
        let error = writer.join().unwrap();
        assert!(error.contains("the file ends"), "{error}");
    }
}

#[test]
fn a_silent_peer_is_an_error_that_names_the_channel_and_the_time() {
    for family in FAMILIES {
        let (_opener, mut acceptor) = Site::new(family).connections();
        acceptor.set_name("data channel 3 with somebody");
        acceptor.set_idle_limit(Duration::from_millis(60));
        let (mut reader, _writer) = acceptor.split();
        let error = reader.read_exact(&mut [0; 8], "waiting for a frame").unwrap_err();
        let StreamError::Silent { waited, .. } = error else { panic!("{family:?}: {error}") };
        assert!(waited >= Duration::from_millis(60), "{waited:?}");
        let text = error.to_string();
        assert!(text.contains("data channel 3 with somebody: peer silent for 0."), "{text}");
        assert!(text.contains("waiting for a frame"), "{text}");
        assert!(error.is_link_lost() && !error.is_cancelled());
    }
}

#[test]
fn a_peer_that_stops_in_the_middle_is_silent_too() {
    for family in FAMILIES {
        let (mut raw, mut acceptor) = Site::new(family).raw();
        acceptor.set_idle_limit(Duration::from_millis(60));
        raw.write_all(b"half").unwrap();
        let (mut reader, _writer) = acceptor.split();
        let error = reader.read_exact(&mut [0; 8], "receiving").unwrap_err();
        assert!(matches!(error, StreamError::Silent { .. }), "{family:?}: {error}");
    }
}

#[test]
fn a_peer_that_does_not_read_is_silent_for_the_writer() {
    for family in FAMILIES {
        let (_raw, mut acceptor) = Site::new(family).raw();
        acceptor.set_idle_limit(Duration::from_millis(60));
        let (_reader, mut writer) = acceptor.split();
        let bytes = vec![1; 64 << 20];
        let error = writer.write_all(&bytes, false, "sending pages").unwrap_err();
        assert!(matches!(error, StreamError::Silent { .. }), "{family:?}: {error}");
        assert!(writer.unsent().unwrap() > 0, "nothing was waiting in the kernel");
    }
}

#[test]
fn a_deadline_ends_a_transfer_whose_bytes_still_trickle() {
    for family in FAMILIES {
        let (mut raw, mut acceptor) = Site::new(family).raw();
        acceptor.set_idle_limit(LONG);
        acceptor.set_deadline(Some(Instant::now() + Duration::from_millis(80)));
        let trickle = spawn(move || while raw.write_all(b".").is_ok() {});
        let (mut reader, writer) = acceptor.split();
        let mut buffer = vec![0; 1 << 20];
        let error = loop {
            match reader.read_exact(&mut buffer, "receiving") {
                Ok(()) => {}
                Err(error) => break error,
            }
        };
        assert!(matches!(error, StreamError::Deadline { .. } | StreamError::Silent { .. }), "{family:?}: {error}");
        drop((reader, writer));
        trickle.join().unwrap();
    }
}

#[test]
fn a_deadline_that_has_passed_moves_no_byte() {
    let (mut raw, mut acceptor) = Site::new(FAMILIES[0]).raw();
    raw.write_all(b"there").unwrap();
    acceptor.set_deadline(Some(Instant::now()));
    let (mut reader, mut writer) = acceptor.split();
    assert!(matches!(reader.read_exact(&mut [0; 5], "receiving"), Err(StreamError::Deadline { .. })));
    assert!(matches!(writer.write_all(&[0; 5], false, "sending"), Err(StreamError::Deadline { .. })));
    reader.set_deadline(None);
    let mut buffer = [0; 5];
    reader.read_exact(&mut buffer, "receiving").unwrap();
    assert_eq!(&buffer, b"there");
}

#[test]
fn closing_ends_a_blocked_read() {
    for family in FAMILIES {
        let (_opener, mut acceptor) = Site::new(family).connections();
        acceptor.set_idle_limit(LONG);
        let closer = acceptor.closer();
        let reading = spawn_until_blocked(move || {
            let (mut reader, _writer) = acceptor.split();
            reader.read_exact(&mut [0; 8], "receiving")
        });
        closer.clone().close();
        let error = reading.join().unwrap().unwrap_err();
        assert!(error.is_cancelled(), "{family:?}: {error}");
        closer.close();
    }
}

#[test]
fn closing_ends_a_blocked_write_of_memory_and_of_a_file() {
    for family in FAMILIES {
        for by_file in [false, true] {
            let (_opener, mut acceptor) = Site::new(family).connections();
            acceptor.set_idle_limit(LONG);
            let closer = acceptor.closer();
            let writing = spawn_until_blocked(move || {
                let (_reader, mut writer) = acceptor.split();
                if by_file {
                    let file = tempfile::tempfile().unwrap();
                    file.set_len(64 << 20).unwrap();
                    writer.send_file(FileRange { file: file.as_fd(), offset: 0, len: 64 << 20 }, "sending")
                } else {
                    writer.write_all(&vec![1; 64 << 20], false, "sending")
                }
            });
            closer.close();
            let error = writing.join().unwrap().unwrap_err();
            assert!(error.is_cancelled(), "{family:?}, file {by_file}: {error}");
        }
    }
}

#[test]
fn closing_ends_a_read_that_spins() {
    for family in FAMILIES {
        let (_opener, mut acceptor) = Site::new(family).connections();
        acceptor.set_idle_limit(LONG);
        let closer = acceptor.closer();
        let (started, starts) = std::sync::mpsc::channel();
        let reading = spawn(move || {
            let (mut reader, _writer) = acceptor.split();
            started.send(()).unwrap();
            reader.read_spinning(&mut [0; 8], LONG, "receiving")
        });
        starts.recv().unwrap();
        closer.close();
        let error = reading.join().unwrap().unwrap_err();
        assert!(error.is_cancelled(), "{family:?}: {error}");
    }
}

#[test]
fn a_read_that_spins_gets_the_bytes_and_sleeps_when_its_budget_is_spent() {
    for family in FAMILIES {
        let (mut raw, mut acceptor) = Site::new(family).raw();
        acceptor.set_idle_limit(Duration::from_millis(60));
        let (mut reader, _writer) = acceptor.split();
        raw.write_all(b"quick").unwrap();
        let mut buffer = [0; 5];
        reader.read_spinning(&mut buffer, LONG, "receiving").unwrap();
        assert_eq!(&buffer, b"quick");
        let error = reader.read_spinning(&mut buffer, Duration::from_millis(1), "receiving").unwrap_err();
        assert!(matches!(error, StreamError::Silent { .. }), "{family:?}: {error}");
        let error = reader.read_spinning(&mut buffer, LONG, "receiving").unwrap_err();
        assert!(matches!(error, StreamError::Silent { .. }), "spinning knows no idle limit, {family:?}: {error}");
    }
}

#[test]
fn a_peer_that_closes_is_told_from_one_that_closes_in_the_middle() {
    for family in FAMILIES {
        let site = Site::new(family);
        let (raw, acceptor) = site.raw();
        raw.hang_up();
        let (mut reader, _writer) = acceptor.split();
        assert!(!reader.read_exact_or_end(&mut [0; 8], "waiting for a frame").unwrap());

        let (mut raw, acceptor) = site.raw();
        raw.write_all(b"half").unwrap();
        raw.hang_up();
        let (mut reader, _writer) = acceptor.split();
        let error = reader.read_exact_or_end(&mut [0; 8], "waiting for a frame").unwrap_err();
        assert!(matches!(error, StreamError::PeerClosed { between_frames: false, .. }), "{family:?}: {error}");
    }
}

#[test]
fn writing_to_a_peer_that_is_gone_says_that_it_closed() {
    for family in FAMILIES {
        let (raw, acceptor) = Site::new(family).raw();
        drop(raw);
        let (_reader, mut writer) = acceptor.split();
        let until = deadline();
        let error = loop {
            match writer.write_all(&[0; 4096], false, "sending pages") {
                Ok(()) => assert!(Instant::now() < until, "waited for a write to a closed peer to fail"),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, StreamError::PeerClosed { .. }), "{family:?}: {error}");
        assert!(error.to_string().contains("while sending pages"), "{error}");
    }
}

#[test]
fn what_the_peer_has_not_taken_counts_as_unsent_until_it_does() {
    for family in FAMILIES {
        let (mut raw, acceptor) = Site::new(family).raw();
        let (_reader, mut writer) = acceptor.split();
        assert_eq!(writer.unsent().unwrap(), 0);
        // More than the receiver's window, so that TCP cannot hand all of it over.
        let sending = spawn(move || {
            writer.write_all(&vec![5; 16 << 20], false, "sending").unwrap();
            writer
        });
        let mut all = vec![0; 16 << 20];
        raw.read_exact(&mut all).unwrap();
        let writer = sending.join().unwrap();
        let until = deadline();
        while writer.unsent().unwrap() > 0 {
            assert!(Instant::now() < until, "waited for the kernel to have sent all");
            std::thread::yield_now();
        }
        writer.set_unsent_limit(1 << 17).unwrap();
    }
}

#[test]
fn buffers_can_be_sized() {
    for family in FAMILIES {
        let (opener, _acceptor) = Site::new(family).connections();
        opener.set_buffers(Some(1 << 16), Some(1 << 16)).unwrap();
        opener.set_buffers(None, None).unwrap();
    }
}

#[test]
fn the_way_to_the_peer_is_known_over_tcp_and_a_window_bounds_what_is_on_it() {
    for family in FAMILIES {
        let (opener, acceptor) = Site::new(family).connections();
        let (closer, (mut reader, _)) = (opener.closer(), acceptor.split());
        let Some(before) = closer.path() else {
            assert!(!format!("{family:?}").contains("Tcp"), "TCP tells nothing of its way");
            continue;
        };
        closer.set_window(64 << 10).unwrap();
        let bytes = 4 << 20;
        let writer = spawn_until_blocked(move || {
            let (_, mut writer) = opener.split();
            writer.writev_all(&ranges(&mut pattern(bytes), bytes), false, "sending").unwrap();
            writer
        });
        let (under_way, unsent) = (closer.path().unwrap(), closer.unsent().unwrap());
        assert!(unsent < 1 << 20, "{unsent} bytes are on the way");
        let mut received = vec![0; bytes];
        reader.readv_exact(&ranges(&mut received, bytes), "receiving").unwrap();
        assert!(received == pattern(bytes));
        let _writer = writer.join().unwrap();
        let after = closer.path().unwrap();
        assert!(before.acknowledged <= under_way.acknowledged && under_way.acknowledged < after.acknowledged);
        assert!(after.acknowledged - before.acknowledged <= bytes as u64 + 1);
        assert!(after.min_round_trip > Duration::ZERO && after.min_round_trip < Duration::from_secs(10));
    }
}
