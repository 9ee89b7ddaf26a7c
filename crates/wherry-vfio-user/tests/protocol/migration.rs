//! Features, states and the data of a migration.

use super::raw::{EINVAL, ENOTTY, Raw, longs, words};
use super::{CONFIG, ERROR, PRE_COPY, RESUMING, RUNNING, STOP, STOP_COPY, Served};

#[test]
fn features_are_probed_and_methods_that_are_not_there_refused() {
    let served = Served::new();
    let client = served.client();
    let (get, set, probe) = (1 << 16, 1 << 17, 1 << 18);
    for flags in [1 | get, 2 | get, 2 | set, 2 | get | set, 6 | set, 7 | set, 8 | get] {
        let reply = client.feature(probe | flags, &[], 0).unwrap();
        assert_eq!(reply.payload, words(&[8, probe | flags]));
    }
    for flags in [1 | set, 6 | get, 8 | set, 9 | get, 3 | get, 5 | get, 0xffff | get] {
        assert_eq!(client.feature(probe | flags, &[], 0).unwrap_err(), ENOTTY, "{flags:#x}");
    }
    // Both at once, none, and flags that do not exist.
    for flags in [2 | get | set, 2, 2 | get | 1 << 20] {
        assert_eq!(client.feature(flags, &[0; 8], 8).unwrap_err(), EINVAL, "{flags:#x}");
    }
    let reply = client.feature(1 | get, &[], 8).unwrap();
    assert_eq!((reply.word(0), reply.long(8)), (16, 0b101), "STOP_COPY, PRE_COPY, no P2P");
    let short = client.feature(1 | get, &[], 0).unwrap();
    assert_eq!((short.word(0), short.payload.len()), (16, 8));
}

#[test]
fn a_reset_from_every_state_gives_running_and_information_works_in_each() {
    let served = Served::new();
    let client = served.client();
    for way in [&[RUNNING][..], &[STOP], &[STOP_COPY], &[PRE_COPY], &[PRE_COPY, STOP_COPY], &[RESUMING]] {
        for state in way {
            client.go(*state).unwrap();
            assert_eq!(client.state(), *state);
            assert_eq!(client.ask(4, &words(&[16, 0, 0, 0])).unwrap().payload, words(&[16, 3, 9, 5]));
        }
        client.write(CONFIG, 4, &[6, 0]).err();
        client.ask(13, &[]).unwrap();
        assert_eq!(client.state(), RUNNING);
        assert_eq!(client.read(CONFIG, 4, 1).unwrap(), [0]);
    }
    client.go(STOP_COPY).unwrap();
    assert_eq!(client.go(PRE_COPY), Err(EINVAL));
    assert_eq!(client.go(ERROR), Err(EINVAL));
    assert_eq!(client.go(5), Err(EINVAL));
    assert_eq!(client.go(77), Err(EINVAL));
    assert_eq!(client.state(), STOP_COPY);
    client.go(RUNNING).unwrap();
}

#[test]
fn a_device_goes_on_elsewhere_with_its_state() {
    let (here, there) = (Served::new(), Served::new());
    let (source, destination) = (here.client(), there.client());
    source.write(0, 8, &longs(&[0xfeed])).unwrap();
    source.write(CONFIG, 0x10, &[0, 0, 0, 0xe0]).unwrap();
    source.go(PRE_COPY).unwrap();
    assert!(source.all_data().is_empty());
    source.go(STOP_COPY).unwrap();
    assert_eq!(source.write(0, 8, &longs(&[1])), Err(EINVAL), "what is being read stays as it is");
    let data = source.all_data();
    assert!(source.read_data(100).unwrap().is_empty());
    destination.go(RESUMING).unwrap();
    data.chunks(33).for_each(|piece| destination.write_data(piece).unwrap());
    destination.go(RUNNING).unwrap();
    assert_eq!(destination.read(0, 8, 8).unwrap(), longs(&[0xfeed]));
    assert_eq!(destination.read(CONFIG, 0x10, 4).unwrap(), [0, 0, 0, 0xe0]);
    // Only where it belongs.
    assert_eq!(destination.read_data(10), Err(EINVAL));
    assert_eq!(destination.write_data(&data), Err(EINVAL));
}

#[test]
fn a_state_that_is_random_cut_doubled_or_wrong_is_refused() {
    let served = Served::new();
    let client = served.client();
    client.go(STOP_COPY).unwrap();
    let good = client.all_data();
    let mut first = good.clone();
    first[0] ^= 0x80;
    let random: Vec<u8> = (0..good.len()).map(|at| (at * 97 + 13) as u8).collect();
    for bad in [random, good[..good.len() - 1].to_vec(), [good.clone(), good.clone()].concat(), first, Vec::new()] {
        client.go(RESUMING).unwrap();
        let written = client.write_data(&bad);
        assert!(written.is_err() | client.go(RUNNING).is_err(), "{} bytes", bad.len());
        assert_ne!(client.state(), RUNNING);
        client.ask(13, &[]).unwrap();
    }
    // Its size is not that of its data.
    client.go(RESUMING).unwrap();
    assert_eq!(client.ask(18, &words(&[16, 9, 0, 0])).unwrap_err(), EINVAL);
}

#[test]
fn our_extensions_are_there_for_those_who_ask() {
    let served = Served::new();
    let json = r#"{"capabilities":{"wherry":{"p2p":true,"estimates":true,"unheard_of":true}}}"#;
    let (client, reply) = Raw::connect(&served.path, json);
    let text = String::from_utf8(reply.payload[4..].to_vec()).unwrap();
    assert!(text.contains(r#""wherry":{"p2p":true,"estimates":true,"userfaultfd":false}"#), "{text}");
    assert_eq!(client.feature(1 << 16 | 1, &[], 8).unwrap().long(8), 0b111);
    client.go(5).unwrap();
    assert_eq!(client.state(), 5);
    let estimate = client.feature(1 << 16 | 9, &[], 8).unwrap().long(8);
    drop(client);
    // A client without them finds the way out.
    let client = served.client();
    client.go(STOP_COPY).unwrap();
    assert_eq!(client.all_data().len() as u64, estimate);
}
