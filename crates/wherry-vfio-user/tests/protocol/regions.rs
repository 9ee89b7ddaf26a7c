//! Regions and configuration space, and bounds.

use super::raw::{EINVAL, longs, words};
use super::{CONFIG, Served, get_region};

#[test]
fn every_region_and_interrupt_is_described() {
    let served = Served::new();
    let client = served.client();
    let info = client.ask(4, &words(&[16, 0, 0, 0])).unwrap();
    assert_eq!(info.payload, words(&[16, 3, 9, 5]));
    assert_eq!(client.ask(4, &words(&[15, 0, 0, 0])).unwrap_err(), EINVAL);
    for index in 0..9 {
        let reply = get_region(&client, index, 32);
        let size = match index {
            0 => 4096,
            1 => 8192,
            CONFIG => 256,
            _ => 0,
        };
        assert_eq!((reply.word(8), reply.long(16)), (index, size));
    }
    for (index, count) in [(0, 1), (1, 0), (2, 4), (3, 0), (4, 0)] {
        let reply = client.ask(7, &words(&[16, 0, index, 0])).unwrap();
        let flags = [7, 0, 3, 0, 0][index as usize];
        assert_eq!(reply.payload, words(&[16, flags, index, count]));
    }
    assert_eq!(client.ask(5, &[words(&[32, 0, 9, 0]), longs(&[0, 0])].concat()).unwrap_err(), EINVAL);
    assert_eq!(client.ask(7, &words(&[16, 0, 5, 0])).unwrap_err(), EINVAL);
}

#[test]
fn a_region_that_can_be_mapped_in_part_says_so_when_there_is_room_for_it() {
    let served = Served::new();
    let client = served.client();
    let short = get_region(&client, 1, 32);
    assert_eq!((short.word(0), short.payload.len(), short.word(12), short.fds.len()), (64, 32, 0, 0));
    let reply = get_region(&client, 1, 64);
    // Readable, writable, can be mapped, has capabilities.
    assert_eq!((reply.word(0), reply.word(4), reply.word(12), reply.payload.len()), (64, 15, 32, 64));
    // Sparse mmap, version 1, the last; one area.
    assert_eq!((reply.word(32), reply.word(36), reply.word(40)), (1 | 1 << 16, 0, 1));
    assert_eq!((reply.long(48), reply.long(56)), (4096, 4096));
    let file = std::fs::File::from(reply.fds.into_iter().next().unwrap());
    std::os::unix::fs::FileExt::write_all_at(&file, b"mapped", 4096).unwrap();
    assert_eq!(client.read(1, 4096, 6).unwrap(), b"mapped");
    let empty = client.ask(6, &words(&[16, 0, 1, 0])).unwrap();
    assert_eq!(empty.payload, words(&[16, 0, 1, 0]));
}

#[test]
fn configuration_space_is_that_of_a_pci_function() {
    let served = Served::new();
    let client = served.client();
    let config = client.read(CONFIG, 0, 256).unwrap();
    assert!(config[..4] != [0; 4] && config[..4] != [0xff; 4]);
    assert_ne!(config[9..12], [0; 3], "its class");
    let pins = client.ask(7, &words(&[16, 0, 0, 0])).unwrap().word(12);
    assert_eq!(u32::from(config[0x3d]), pins, "its pin agrees with the number of INTx");
    assert_eq!(config[6] & 0x10, 0x10);
    let mut at = config[0x34];
    let mut seen = Vec::new();
    while at != 0 {
        assert!(at >= 0x40 && at.is_multiple_of(4) && !seen.contains(&at), "a capability at {at:#x} after {seen:x?}");
        seen.push(at);
        if config[at as usize] == 0x11 {
            let word = |by: u8| u32::from_le_bytes(config[(at + by) as usize..][..4].try_into().unwrap());
            let vectors = (word(0) >> 16 & 0x7ff) + 1;
            assert_eq!(vectors, client.ask(7, &words(&[16, 0, 2, 0])).unwrap().word(12));
            for (place, bytes) in [(word(4), 16 * vectors), (word(8), vectors.div_ceil(64) * 8)] {
                let bar = get_region(&client, place & 7, 32).long(16);
                assert!(u64::from((place & !7) + bytes) <= bar, "{place:#x} and {bytes} bytes in {bar:#x}");
            }
        }
        at = config[at as usize + 1];
    }
    for bar in 0..6 {
        client.write(CONFIG, 0x10 + 4 * bar, &[0xff; 4]).unwrap();
        let mask = client.read(CONFIG, 0x10 + 4 * bar, 4).unwrap();
        let mask = u32::from_le_bytes(mask.try_into().unwrap());
        let size = get_region(&client, bar as u32, 32).long(16);
        assert_eq!(u64::from((mask & !0xf).wrapping_neg()), size, "BAR {bar}");
    }
}

#[test]
fn every_access_stays_inside_its_region() {
    let served = Served::new();
    let client = served.client();
    let huge = u64::MAX - 3;
    for (region, offset, count) in
        [(0, 4096, 1), (0, 4095, 2), (0, huge, 8), (1, 0, 8193), (2, 0, 1), (8, 0, 1), (9, 0, 1), (u32::MAX, 0, 1)]
    {
        assert_eq!(client.read(region, offset, count), Err(EINVAL), "{region} {offset:#x} {count}");
        assert_eq!(client.write(region, offset, &vec![0; count as usize]), Err(EINVAL));
    }
    // A count that nobody checks would be memory: 4 GiB.
    assert_eq!(client.ask(9, &[longs(&[0]), words(&[0, u32::MAX])].concat()).unwrap_err(), EINVAL);
    assert_eq!(client.read(0, 4095, 1).unwrap().len(), 1);
    assert_eq!(client.read(1, 0, 8192).unwrap().len(), 8192);
    // Data that is not as long as it says.
    assert_eq!(client.ask(10, &[longs(&[0]), words(&[0, 8, 1])].concat()).unwrap_err(), EINVAL);
    assert_eq!(client.ask(10, &[longs(&[0]), words(&[0, 4, 1, 1])].concat()).unwrap_err(), EINVAL);
}

#[test]
fn several_writes_in_one_message_are_done_in_order_or_not_at_all() {
    let served = Served::new();
    let client = served.client();
    let one = |offset: u64, region: u32, count: u32, data: u64| {
        [longs(&[offset]), words(&[region, count]), longs(&[data])].concat()
    };
    let writes = [longs(&[2]), one(0, 0, 8, 5), one(0, 0, 8, 6)].concat();
    assert_eq!(client.ask(15, &writes).unwrap().payload, longs(&[2]));
    assert_eq!(client.read(0, 0, 8).unwrap(), longs(&[6]));
    for wrong in [one(8192, 0, 8, 7), one(0, 0, 9, 7), one(0, 99, 8, 7)] {
        assert_eq!(client.ask(15, &[longs(&[2]), one(0, 0, 8, 7), wrong].concat()).unwrap_err(), EINVAL);
        assert_eq!(client.read(0, 0, 8).unwrap(), longs(&[6]));
    }
    assert_eq!(client.ask(15, &[longs(&[u64::MAX]), one(0, 0, 8, 7)].concat()).unwrap_err(), EINVAL);
}
