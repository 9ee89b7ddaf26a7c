//! Frames of the network load.

use wherry_guest::net::{LONGEST, Way, check, length, number, write};

const SEED: u64 = 7;
const FROM: [u8; 6] = [2, 0, 0, 0, 0, 1];

#[test]
fn a_frame_is_known_by_its_number_and_every_byte_of_it_that_changes_is_found() {
    let mut frame = [0; LONGEST];
    for n in [0, 1, 2, 1 << 40] {
        let bytes = write(&mut frame, FROM, SEED, n, Way::Out);
        let frame = &mut frame[..bytes];
        assert_eq!((number(frame), check(frame, SEED, n, Way::Out)), (Some(n), Ok(())));
        for at in 22..bytes {
            frame[at] ^= 1;
            let wrong = check(frame, SEED, n, Way::Out).unwrap_err();
            assert_eq!(wrong.word, (at as u64 - 22) / 8);
            frame[at] ^= 1;
        }
        for other in [check(frame, SEED, n, Way::Back), check(frame, SEED + 1, n, Way::Out)] {
            assert!(other.is_err(), "{n}");
        }
        assert!(check(&frame[..bytes - 1], SEED, n, Way::Out).is_err_and(|wrong| wrong.word == u64::MAX));
        frame[13] ^= 1;
        assert_eq!(number(frame), None);
    }
    assert_eq!(number(&frame[..21]), None);
}

#[test]
fn frames_are_of_all_lengths_between_the_least_that_ethernet_carries_and_the_most() {
    let lengths: std::collections::BTreeSet<_> = (0..10_000).map(length).collect();
    assert_eq!((lengths.first(), lengths.last(), lengths.len()), (Some(&62), Some(&1510), 182));
}
