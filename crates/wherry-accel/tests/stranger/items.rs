//! What the client does with the device. Whoever brings a [`Bus`] runs all of it; the device has engines of every class (two that
//! copy, first), and keys 1 (AES-256-GCM) and 2 (ChaCha20-Poly1305) and 3 (HMAC), all of 32 zero bytes.

use super::raw::{Bus, RESULT, Raw, Record, STATUS, Work, map, node};

pub const ENOENT: u64 = 2;
pub const EFAULT: u64 = 14;
pub const EEXIST: u64 = 17;
pub const EINVAL: u64 = 22;
const EBADMSG: u16 = 74;

const GAP: (u16, u16) = (0xffff, 0xffff);

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * at / 7 + at) as u8).collect()
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn work(opcode: u8, source: u64, destination: u64, size: usize) -> Work {
    Work { opcode, source, destination, size: size as u32, ..Work::default() }
}

/// A context with one slot: the first engine of a class.
fn on<B: Bus>(c: &mut Raw<B>, class: u16) -> u32 {
    let context = c.create(0, 0).unwrap();
    let at = c.put(&map(0, &[(class, 0)]));
    c.set_param(context, 12, 3, at).unwrap();
    context
}

pub fn the_device_says_what_it_is<B: Bus>(c: &mut Raw<B>) {
    assert_eq!(c.register(0x00, 4).to_le_bytes()[..4], *b"WACC");
    assert_eq!(c.register(0x04, 4) >> 16, 1, "the major number that this client knows");
    assert_eq!((c.register(0x0c, 4), c.register(0x10, 4), c.register(STATUS, 4)), (1024, 64, 0));
    let engines = c.engines();
    assert!((0..5).all(|class| engines.contains(&(class, 0))), "{engines:?}");
    let before = c.register(0x18, 8);
    c.bus.pass();
    assert!(c.register(0x18, 8) >= before, "time goes on");
    // Slice, pre-emption deadline and heartbeat of the first engine.
    assert_eq!([0, 4, 8].map(|word| c.register(0x800 + word, 4)), [1000, 640_000, 2_500_000]);
    for (at, width) in [(0x00, 8), (0x18, 4), (0x01, 4), (0x30, 4), (0xc00, 4), (0x400 + 16 * engines.len() as u64, 4)]
    {
        assert_eq!(c.bus.read(at, width), None, "no register of {width} bytes at {at:#x}");
    }
}

pub fn contexts_are_made_set_read_cloned_and_destroyed<B: Bus>(c: &mut Raw<B>) {
    let context = c.create(0, 0).unwrap();
    assert!((1..=1024).contains(&(context & 0xffff)));
    assert_eq!(c.get_param(context, 0, 3, 0), Ok((0, 0)), "the default map");
    // A gap made virtual over both engines that copy, a gap that stays one, and a bond.
    let copies = [(0, 0), (0, 1)];
    let bond = [&[0u8, 0, 1, 0][..], &0u16.to_le_bytes(), &1u16.to_le_bytes(), &[0; 40]].concat();
    let bond = c.put(&node(0, 1, &bond, &copies[..1]));
    let balance = [&0u16.to_le_bytes()[..], &2u16.to_le_bytes(), &[0; 12]].concat();
    let chain = c.put(&node(bond, 0, &balance, &copies));
    let at = c.put(&map(chain, &[GAP, GAP, (1, 0)]));
    c.set_param(context, 20, 3, at).unwrap();
    assert_eq!(c.get_param(context, 0, 3, 0).unwrap().0, 20);
    // Read back, siblings and bond with it: the chain says what is asked for and how much room there is.
    let bond = [&[0u8; 4][..], &0u16.to_le_bytes(), &4u16.to_le_bytes(), &[0; 40]].concat();
    let bond = c.put(&node(0, 1, &bond, &[GAP; 4]));
    let room = [&0u16.to_le_bytes()[..], &8u16.to_le_bytes(), &[0; 12]].concat();
    let balance = c.put(&node(bond, 0, &room, &[GAP; 8]));
    let back = c.put(&map(balance, &[GAP; 5]));
    assert_eq!(c.get_param(context, 28, 3, back), Ok((20, back)));
    assert_eq!([8, 12, 16].map(|word| c.word(back + word)), [0xfffe_0000, 0xffff_ffff, 0x0000_0001]);
    assert_eq!((c.get(balance + 34, 2), c.get(balance + 48, 8)), (vec![2, 0], vec![0, 0, 0, 0, 0, 0, 1, 0]));
    assert_eq!((c.get(bond + 32, 4), c.get(bond + 38, 2)), (vec![0, 0, 1, 0], vec![1, 0]), "master and number");
    assert_eq!(c.get(bond + 80, 4), [0, 0, 0, 0], "copy0");
    // What is wrong is refused by number.
    assert_eq!(c.set_param(context, 19, 3, at), Err(EINVAL));
    assert_eq!(c.set_param(context, 20, 3, 0x10), Err(EFAULT));
    let none = c.put(&map(0, &[(9, 0)]));
    assert_eq!(c.set_param(context, 12, 3, none), Err(ENOENT));
    let balance = [&0u16.to_le_bytes()[..], &2u16.to_le_bytes(), &[0; 12]].concat();
    let taken = c.put(&node(0, 0, &balance, &copies));
    let taken = c.put(&map(taken, &[(0, 0)]));
    assert_eq!(c.set_param(context, 12, 3, taken), Err(EEXIST));
    // A clone with engines and priority.
    c.set_param(context, 0, 1, (-7i64) as u64).unwrap();
    let fields = [&context.to_le_bytes()[..], &0b101u32.to_le_bytes(), &[0; 8]].concat();
    let clone = c.put(&node(0, 1, &fields, &[]));
    let clone = c.create(0, clone).unwrap();
    assert_eq!(c.get_param(clone, 0, 3, 0).unwrap().0, 20);
    assert_eq!(c.get_param(clone, 0, 1, 0), Ok((0, (-7i64) as u64)));
    c.destroy(clone).unwrap();
    assert_eq!((c.destroy(clone), c.register(RESULT, 4)), (Err(ENOENT), ENOENT));
    assert_eq!(c.command(99, &[]), Err(EINVAL));
    c.destroy(context).unwrap();
}

pub fn operations_of_every_class_run<B: Bus>(c: &mut Raw<B>) {
    let context = c.create(0, 0).unwrap();
    let cell = c.put(&[0; 64]);
    assert_eq!(c.done(context, 0, Work::default()), (0, 0));
    assert_eq!(c.done(context, 0, Work { first: 5, ..work(0x04, 0, cell, 0) }).1, 0, "what was there before");
    assert_eq!(c.done(context, 0, Work { first: 3, ..work(0x05, 0, cell, 0) }).1, 5);
    // Eight bytes, with flag 3.
    c.done(context, 0, Work { flags: 8, first: 1 << 40, ..work(0x05, 0, cell, 0) });
    assert_eq!(c.long(cell), 8 | 1 << 40);
    assert_eq!(c.done(context, 0, Work { first: 0, ..work(0x06, cell, 0, 0) }).1, 8, "it is no longer 0");
    assert_eq!(c.done(context, 0, Work { word: 2, first: 7, second: 0xff, ..work(0x07, cell, 0, 0) }).1, 8);
    let (_, time) = c.done(context, 0, work(0x08, 0, cell + 8, 0));
    assert_eq!(c.long(cell + 8), time);

    copying(c);
    packing(c);
    sealing(c);
    let context = on(c, 3);
    // r0 = r1 + r2, in the instructions of RFC 9669: mov, add, exit.
    let text: Vec<u8> =
        [0x0000_0000_0000_10bfu64, 0x0000_0000_0000_200f, 0x95].iter().flat_map(|w| w.to_le_bytes()).collect();
    let at = c.put(&text);
    let add = Work { word: 3, first: 40, second: 2, ..work(0x80, at, 0, text.len()) };
    assert_eq!(c.done(context, 0, add), (3, 42), "instructions, and r0");
    assert_eq!(c.fails(context, 0, Work { word: 2, ..add }), 62, "ETIME");

    let context = on(c, 4);
    // One original shard and two for recovery: all of them are the same.
    let shards = [pattern(128), vec![0; 256]].concat();
    let at = c.put(&shards);
    let code = Work { word: 1 | 2 << 16, ..work(0xa0, at, at + 128, 128) };
    assert_eq!(c.done(context, 0, code), (128, 2));
    assert_eq!(c.get(at + 128, 256), [&shards[..128], &shards[..128]].concat());
    c.bus.poke(at, &[0; 128]);
    let there = c.put(&[0b100]);
    let recover = Work { opcode: 0xa1, destination: at, first: there, ..code };
    assert_eq!(c.done(context, 0, recover).1, 1, "one came back");
    assert_eq!(c.get(at, 128), shards[..128]);
    let none = c.put(&[0]);
    assert_eq!(c.fails(context, 0, Work { first: none, ..recover }), EBADMSG);
}

fn copying<B: Bus>(c: &mut Raw<B>) {
    let context = on(c, 0);
    let data = pattern(5000);
    let (from, to, other) = (c.put(&data), c.room(5000), c.room(5000));
    assert_eq!(c.done(context, 0, work(0x20, from, to, 5000)).0, 5000);
    assert_eq!(c.get(to, 5000), data);
    assert_eq!(c.done(context, 0, work(0x22, from, to, 5000)).1, 5000, "no difference");
    c.bus.poke(to + 4321, &[!data[4321]]);
    assert_eq!(c.done(context, 0, work(0x22, from, to, 5000)).1, 4321);
    c.done(context, 0, Work { first: 0x0807_0605_0403_0201, ..work(0x21, 0, to, 13) });
    assert_eq!(c.get(to, 14), [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, data[13]]);
    c.bus.poke(to, &[0; 100]);
    assert_eq!(c.done(context, 0, work(0x23, to, 0, 100)).1, 100);
    assert_eq!(c.done(context, 0, work(0x23, to, 0, 200)).1, 100);
    // CRC-32C of "123456789", also in two pieces (RFC 3720, B.4; the register is inverted inside).
    let digits = c.put(b"123456789");
    assert_eq!(c.done(context, 0, work(0x24, digits, 0, 9)).1, 0xe306_9283);
    let (_, half) = c.done(context, 0, work(0x24, digits, 0, 4));
    let rest = Work { word: half as u32, ..work(0x25, digits + 4, to, 5) };
    assert_eq!(c.done(context, 0, rest).1, 0xe306_9283);
    assert_eq!(c.get(to, 5), b"56789");
    c.done(context, 0, Work { first: other, ..work(0x28, from, to, 5000) });
    assert_eq!((c.get(to, 5000), c.get(other, 5000)), (data.clone(), data));
    // Two words of eight bytes differ: two entries of ten.
    let old = c.put(&pattern(4096));
    let mut newer = pattern(4096);
    (newer[16], newer[4095]) = (!newer[16], !newer[4095]);
    let (new, delta) = (c.put(&newer), c.room(64));
    assert_eq!(c.done(context, 0, Work { first: new, second: 64, ..work(0x26, old, delta, 4096) }).1, 20);
    assert_eq!(c.get(delta, 10), [&[2, 0][..], &newer[16..24]].concat());
    assert_eq!(c.get(delta + 10, 10), [&[0xff, 1][..], &newer[4088..]].concat());
    assert_eq!(c.done(context, 0, Work { first: 4096, ..work(0x27, delta, old, 20) }).1, 2);
    assert_eq!(c.get(old, 4096), newer);
}

fn packing<B: Bus>(c: &mut Raw<B>) {
    let context = on(c, 1);
    let data: Vec<u8> = b"the same words, ".iter().cycle().take(3000).copied().collect();
    let (from, to, back) = (c.put(&data), c.room(4096), c.room(3000));
    for (pack, unpack) in [(0x40, 0x41), (0x42, 0x43), (0x44, 0x45)] {
        let (read, written) = c.done(context, 0, Work { word: 4096, ..work(pack, from, to, 3000) });
        assert!(read == 3000 && written < 300, "{read} {written}");
        let unpack = Work { word: 3000, ..work(unpack, to, back, written as usize) };
        assert_eq!(c.done(context, 0, unpack), (written, 3000));
        assert_eq!(c.get(back, 3000), data);
        c.bus.poke(back, &[0; 3000]);
        assert_eq!(c.fails(context, 0, Work { word: 2999, ..unpack }), 28, "ENOSPC");
    }
    // Written by hand: an LZ4 block of five literals, a deflate block that is stored.
    for (opcode, packed) in [(0x41, &b"\x50hello"[..]), (0x45, b"\x01\x05\x00\xfa\xffhello")] {
        let at = c.put(packed);
        assert_eq!(c.done(context, 0, Work { word: 16, ..work(opcode, at, back, packed.len()) }).1, 5);
        assert_eq!(c.get(back, 5), b"hello");
        let cut = Work { word: 16, ..work(opcode, at, back, packed.len() - 1) };
        assert_eq!(c.fails(context, 0, cut), EBADMSG);
    }
    let level = Work { word: 4096, first: 20, ..work(0x42, from, to, 3000) };
    assert_eq!(u64::from(c.fails(context, 0, level)), EINVAL);
}

fn sealing<B: Bus>(c: &mut Raw<B>) {
    let context = on(c, 2);
    let (empty, text, to) = (c.room(0), c.put(&[0; 16]), c.room(64));
    // The Galois/Counter Mode of Operation (McGrew and Viega), test cases 13 and 14: all zero.
    let parameters = c.put(&[0; 16]);
    let seal = |source, size| Work { word: 1, first: parameters, ..work(0x60, source, to, size) };
    assert_eq!(c.done(context, 0, seal(empty, 0)), (0, 16));
    assert_eq!(c.get(to, 16), hex("530f8afbc74536b9a963b4f1c4cb738b"));
    assert_eq!(c.done(context, 0, seal(text, 16)), (16, 32));
    let sealed = hex("cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919");
    assert_eq!(c.get(to, 32), sealed);
    let open = Work { word: 1, first: parameters, ..work(0x61, to, to + 32, 32) };
    assert_eq!(c.done(context, 0, open), (32, 16));
    c.bus.poke(to, &[sealed[0] ^ 1]);
    assert_eq!(c.fails(context, 0, open), EBADMSG);
    // Associated data is part of it.
    let bound = c.put(&[&[0; 12][..], &3u32.to_le_bytes(), b"abc"].concat());
    let (seal, open) = (
        Work { word: 2, first: bound, ..work(0x62, text, to, 16) },
        Work { word: 2, first: bound, ..work(0x63, to, to + 32, 32) },
    );
    c.done(context, 0, seal);
    c.done(context, 0, open);
    assert_eq!(c.fails(context, 0, Work { first: parameters, ..open }), EBADMSG);
    assert_eq!(u64::from(c.fails(context, 0, Work { word: 7, ..seal })), ENOENT, "no such key");
    assert_eq!(u64::from(c.fails(context, 0, Work { word: 1, ..seal })), EINVAL, "a key of another kind");
    // FIPS 180-4 for "abc", the BLAKE3 paper for nothing, and HMAC with a key of 32 zero bytes for nothing.
    let abc = c.put(b"abc");
    for (opcode, word, source, size, digest) in [
        (0x64, 0, abc, 3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (0x65, 0, empty, 0, "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"),
        (0x66, 3, empty, 0, "b613679a0814d9ec772f95d778c35fc5ff1697c493715653c6c712144292c5ad"),
    ] {
        assert_eq!(c.done(context, 0, Work { word, ..work(opcode, source, to, size) }), (size as u64, 32));
        assert_eq!(c.get(to, 32), hex(digest), "operation {opcode:#x}");
    }
}

pub fn submissions_go_by_portal_by_ring_and_in_batches_with_fences<B: Bus>(c: &mut Raw<B>) {
    let context = c.create(0, 0).unwrap();
    let (cell, record) = (c.put(&[0; 64]), c.put(&[0; 64]));
    // A batch of two adds that waits for point 1 of the client's own timeline, by the portal of slot 1 in pieces of eight.
    let add = |tag, at| Work { flags: 1, first: 1, ..work(0x05, 0, cell, 0) }.bytes(tag, 0, at);
    let list = c.put(&[add(11, record), add(12, record + 32)].concat());
    let batch = Work { flags: 1 << 8, first: u64::from(context) | 0xffff << 32, second: 1, ..work(0x02, list, 0, 2) };
    let portal = Raw::<B>::portal(context, 1);
    for (at, piece) in batch.bytes(0, context, 0).chunks(8).enumerate() {
        c.bus.write(portal + 8 * at as u64, piece);
    }
    let registers = Raw::<B>::doorbells(context, 1);
    assert_eq!((c.register(registers + 0x14, 4), c.register(registers + 0x20, 8)), (0, 1), "taken, as point 1");
    (0..20).for_each(|_| c.bus.pass());
    assert_eq!((c.fence(context, 1, 1), c.busy(context, 1, 1)), (Ok((0, 0)), Ok((0, 1))), "it waits for class 0");
    assert_eq!(c.word(cell), 0);
    c.set(registers + 0x30, 8, 1);
    let (first, second) = (c.record(record), c.record(record + 32));
    assert_eq!([first.tag, first.result as u32, second.tag, second.result as u32], [11, 0, 12, 1]);
    c.until("the fence", |c| c.fence(context, 1, 1) == Ok((1, 0)));
    assert_eq!(c.register(registers + 0x28, 8), 1, "points signalled");
    assert_eq!(c.fence(context, 1, 2), Err(ENOENT), "not submitted");
    // Whole, in one write of 64 bytes; and into a slot that is beyond the map.
    c.bus.write(portal, &add(13, record));
    c.until("the third", |c| c.word(cell) == 3);
    let beyond = Raw::<B>::portal(context, 63);
    c.bus.write(beyond, &add(14, record));
    // A ring that goes round twice, its head written to memory as well.
    let (head, plus_one) = (c.put(&[0; 64]), Work { first: 1, ..work(0x05, 0, cell, 0) });
    for _ in 0..20 {
        c.done(context, 2, plus_one);
        c.set(Raw::<B>::doorbells(context, 2) + 0x18, 8, head);
    }
    assert_eq!((c.word(cell), c.register(Raw::<B>::doorbells(context, 2) + 0x10, 4)), (23, 20));
    c.until("the head in memory", |c| c.word(head) == 20);
    // The first that fails ends its batch, with its record; what is submitted later goes on.
    c.bus.poke(record, &[0; 64]);
    let bad = Work { flags: 1, ..work(0x20, 0x10, cell, 8) }.bytes(15, 0, record);
    let list = c.put(&[bad, add(16, record + 32)].concat());
    let portal = Raw::<B>::portal(context, 0);
    c.bus.write(portal, &Work { opcode: 0x02, source: list, size: 2, ..Work::default() }.bytes(0, context, 0));
    let Record { status, error, tag, .. } = c.record(record);
    assert_eq!((status, u64::from(error), tag), (2, EFAULT, 15));
    c.until("the fence", |c| c.fence(context, 0, 1) == Ok((2, EFAULT as u32)));
    assert_eq!(c.get(record + 32, 1), [0], "never run");
    c.done(context, 0, Work::default());
    c.destroy(context).unwrap();
}

/// Each operation: what it needs, and which of its six words it uses.
pub fn words_that_an_operation_does_not_use_must_be_zero<B: Bus>(c: &mut Raw<B>) {
    let room = c.put(&[0; 4096]);
    let program = c.put(&0x95u64.to_le_bytes());
    let bits = c.put(&[0xff]);
    let base = |opcode, source: bool, destination: bool, size, word, first, second| Work {
        opcode,
        source: if source { room } else { 0 },
        destination: if destination { room + 2048 } else { 0 },
        size,
        word,
        first,
        second,
        ..Work::default()
    };
    // The words in order: source, destination, size, word, first, second; which of them it does not use.
    let all: [(u16, Work, &[usize]); 26] = [
        (0, base(0x00, false, false, 0, 0, 0, 0), &[0, 1, 2, 3, 4, 5]),
        (0, base(0x01, false, false, 0, 0, 0, 0), &[0, 1, 2, 3, 4, 5]),
        (0, base(0x04, false, true, 0, 0, 1, 0), &[0, 2, 3, 5]),
        (0, base(0x05, false, true, 0, 0, 1, 0), &[0, 2, 3, 5]),
        (0, base(0x06, true, false, 0, 0, 1, 0), &[1, 2, 3, 5]),
        (0, base(0x07, true, false, 0, 0, 0, 0), &[1, 2]),
        (0, base(0x08, false, true, 0, 0, 0, 0), &[0, 2, 3, 4, 5]),
        (0, base(0x09, true, false, 0, 0, 0, 0), &[1, 3, 4, 5]),
        (0, base(0x20, true, true, 64, 0, 0, 0), &[3, 4, 5]),
        (0, base(0x21, false, true, 64, 0, 0, 0), &[0, 3, 5]),
        (0, base(0x22, true, true, 64, 0, 0, 0), &[3, 4, 5]),
        (0, base(0x23, true, false, 64, 0, 0, 0), &[1, 3, 4, 5]),
        (0, base(0x24, true, false, 64, 0, 0, 0), &[1, 4, 5]),
        (0, base(0x25, true, true, 64, 0, 0, 0), &[4, 5]),
        (0, base(0x26, true, true, 64, 0, room, 64), &[3]),
        (0, base(0x27, true, true, 0, 0, 64, 0), &[3, 5]),
        (0, base(0x28, true, true, 64, 0, room + 1024, 0), &[3, 5]),
        (1, base(0x40, true, true, 64, 256, 0, 0), &[4, 5]),
        (1, base(0x42, true, true, 64, 256, 0, 0), &[5]),
        (1, base(0x44, true, true, 64, 256, 0, 0), &[5]),
        (2, base(0x60, true, true, 64, 1, room, 0), &[5]),
        (2, base(0x64, true, true, 64, 0, 0, 0), &[3, 4, 5]),
        (2, base(0x65, true, true, 64, 0, 0, 0), &[3, 4, 5]),
        (2, base(0x66, true, true, 64, 3, 0, 0), &[4, 5]),
        (4, base(0xa0, true, true, 64, 1 | 1 << 16, 0, 0), &[4, 5]),
        (4, base(0xa1, true, true, 64, 1 | 1 << 16, bits, 0), &[5]),
    ];
    let contexts: Vec<u32> = (0..5).map(|class| on(c, class)).collect();
    let run = Work { word: 10, ..work(0x80, program, 0, 8) };
    c.done(contexts[3], 0, run);
    for (class, fine, unused) in all {
        let context = contexts[usize::from(class)];
        c.done(context, 0, fine);
        for word in unused {
            let mut odd = fine;
            match word {
                0 => odd.source = 8,
                1 => odd.destination = 8,
                2 => odd.size = 8,
                3 => odd.word = 8,
                4 => odd.first = 8,
                _ => odd.second = 8,
            }
            let record = c.run(context, 0, odd);
            assert_eq!((record.status, u64::from(record.error)), (2, EINVAL), "{:#x}, word {word}", fine.opcode);
        }
    }
}
