//! Engine maps.

use wherry_accel::FenceState;
use wherry_accel::abi::{Descriptor, flag, opcode, param};
use wherry_accel::error::Errno;

use crate::client::*;

pub fn invalid_engines_are_refused_by_size_class_and_address(c: &mut Client) {
    let context = c.create();
    let at = c.put(&map_bytes(&[0; 65], 0));
    let set = |c: &mut Client, size: u32, at: u64| c.set(context, param::ENGINES, size, at);
    for (size, result) in [
        (0, Ok(())),
        (1, Err(Errno::Invalid)),
        (7, Err(Errno::Invalid)),
        (9, Err(Errno::Invalid)),
        (8 + 4 * 65, Err(Errno::Invalid)),
        (8 + 4 * 64, Ok(())),
        (8, Ok(())),
    ] {
        assert_eq!(set(c, size, at), result, "{size} bytes");
    }
    // A class that does not exist, also from memory that cannot be written (it is all zeros: class 0; so from the middle).
    for bad in [engine(5, 0), engine(0xffff, 0), engine(0xffff, 0xfffe), engine(0, 99), engine(0, 0xfffe)] {
        let at = c.put(&map_bytes(&[engine(0, 0), bad], 0));
        assert_eq!(set(c, 16, at), Err(Errno::NoEntry), "{bad:#x}");
    }
    assert_eq!(set(c, 16, READ_ONLY), Ok(()), "reading is enough");
    // Over the end of memory by every number of bytes, and exactly at it.
    let bytes = map_bytes(&[engine(0, 0), engine(0, 1)], 0);
    for beyond in 1..bytes.len() as u64 {
        let at = END - bytes.len() as u64 + beyond;
        c.memory_write_until_end(at, &bytes);
        assert_eq!(set(c, 16, at), Err(Errno::Fault), "{beyond} bytes beyond");
    }
    c.memory_write_until_end(END - 16, &bytes);
    assert_eq!(set(c, 16, END - 16), Ok(()));
    assert_eq!(set(c, 16, 0), Err(Errno::Fault));
    assert_eq!(set(c, 16, u64::MAX - 3), Err(Errno::Fault));
    // Used: frozen, in every way.
    let fence = c.nop(context, 1);
    c.finish(fence);
    assert_eq!(set(c, 16, END - 16), Err(Errno::Invalid));
    assert_eq!(set(c, 0, 0), Err(Errno::Invalid));
    assert_eq!(c.set(99, param::ENGINES, 0, 0), Err(Errno::NoEntry));
}

pub fn a_map_without_slots_takes_no_work(c: &mut Client) {
    let context = c.create();
    c.map(context, &[], 0);
    for slot in 0..64 {
        assert_eq!(c.submit(context, slot, Descriptor::default()), Err(Errno::Invalid), "slot {slot}");
    }
    // An extension that names a slot finds none.
    let other = c.create();
    let chain = c.chain(&[balance(0, &engines_of(0))]);
    let at = c.put(&map_bytes(&[], chain));
    assert_eq!(c.set(other, param::ENGINES, 8, at), Err(Errno::Invalid));
}

pub fn only_the_one_live_slot_of_64_takes_work_and_on_its_class(c: &mut Client) {
    for (live, class) in [(0u32, 0u16), (1, 1), (31, 2), (62, 3), (63, 4)] {
        let context = c.create();
        let mut slots = [GAP; 64];
        slots[live as usize] = engine(class, 0);
        c.map(context, &slots, 0);
        for slot in (0..64).filter(|slot| *slot != live) {
            assert_eq!(c.submit(context, slot, Descriptor::default()), Err(Errno::Invalid), "slot {slot}");
        }
        let (fence, word) = c.spin(context, live);
        c.run_for(MS);
        assert_eq!(c.busy(fence), (class_bit(class), 0));
        let busy = c.measure(10 * MS);
        assert!(busy[first_of(class)] > 0.99, "{busy:?}");
        c.store(word, 1);
        c.finish(fence);
        // Work of another class does not run there.
        let foreign = if class == 0 { opcode::SHA256 } else { opcode::MOVE };
        assert_eq!(c.submit(context, live, Descriptor::new(foreign, 0, 0, 0)), Err(Errno::Invalid));
    }
}

pub fn one_engine_may_stand_in_all_64_slots(c: &mut Client) {
    let context = c.create();
    c.map(context, &[engine(1, 1); 64], 0);
    let counter = c.alloc(8);
    let fences: Vec<_> = (0..64).map(|slot| c.submit(context, slot, add(counter, 1)).unwrap()).collect();
    for fence in fences {
        c.finish(fence);
    }
    assert_eq!(c.load(counter), 64);
    let busy = c.busy_times();
    assert!(busy.iter().enumerate().all(|(index, busy)| (*busy > 0) == (index == first_of(1) + 1)), "{busy:?}");
}

pub fn every_engine_runs_in_a_map_of_its_own(c: &mut Client) {
    for (index, word) in all_engines().into_iter().enumerate() {
        let context = c.create();
        c.map(context, &[word], 0);
        let before = c.busy_times();
        let (fence, go) = c.spin(context, 0);
        c.run_for(MS);
        c.store(go, 1);
        c.finish(fence);
        let after = c.busy_times();
        for other in 0..ENGINES {
            assert_eq!(after[other] > before[other], other == index, "engine {other} for engine {index}");
        }
        assert_eq!(c.submit(context, 1, Descriptor::default()), Err(Errno::Invalid));
    }
}

pub fn slots_of_one_engine_are_timelines_of_their_own(c: &mut Client) {
    let context = c.create();
    c.map(context, &[engine(3, 0); 64], 0);
    let order = c.alloc(8);
    let mut fences = Vec::new();
    for slot in (0..64u32).rev() {
        let seen = c.alloc(32);
        let d = c.batch(&[add(order, 1).completing_at(seen)]).after(client_fence(context, u64::from(slot) + 1));
        fences.push((c.submit(context, slot, d).unwrap(), seen));
    }
    fences.reverse();
    c.run_for(5 * MS);
    assert_eq!(c.load(order), 0, "nothing runs before its fence");
    for (slot, (fence, seen)) in fences.iter().enumerate() {
        c.advance(context, slot as u64 + 1);
        c.finish(*fence);
        assert_eq!(c.record(*seen).result, slot as u64, "slot {slot} was next");
        if let Some((next, _)) = fences.get(slot + 1) {
            assert_eq!(c.state(*next), FenceState::Pending);
        }
    }
}

pub fn a_map_reads_back_as_it_was_set(c: &mut Client) {
    let context = c.create();
    assert_eq!(c.get(context, param::ENGINES, 0, 0), Ok((0, 0)), "the default map has size 0");
    let copies = engines_of(0);
    let chain = c.chain(&[
        balance(1, &[copies[2], copies[0], copies[3]]),
        bond(1, engine(3, 1), &[copies[3]]),
        bond(1, engine(3, 0), &[copies[0], copies[2]]),
        parallel(3, 2, 2, &copies),
    ]);
    let slots = [engine(1, 1), GAP, GAP, GAP, engine(4, 0), engine(1, 1)];
    c.map(context, &slots, chain);
    assert_eq!(c.get(context, param::ENGINES, 0, 0), Ok((32, 0)));
    // A chain to be filled, with room.
    let room = |mut node: Vec<u8>, engines: usize| {
        node.extend(vec![0xee; 4 * engines]);
        node
    };
    let mut first = bond(1, 0, &[]);
    first[38] = 8;
    let mut second = first.clone();
    second[40] = 1;
    let mut siblings = balance(1, &[]);
    siblings[34] = 8;
    let back = c.chain(&[room(siblings, 8), room(first, 8), room(second, 8), room(parallel(3, 4, 2, &[]), 8)]);
    let buffer = c.put(&[0xee; 64]);
    c.memory_put_u64(buffer, back);
    assert_eq!(c.get(context, param::ENGINES, 64, buffer), Ok((32, buffer)));
    let got: Vec<u32> = (0..6).map(|slot| c.load(buffer + 8 + 4 * slot)).collect();
    assert_eq!(got, [engine(1, 1), engine(0, 0xfffe), GAP, engine(0, 0xfffe), engine(4, 0), engine(1, 1)]);
    assert_eq!(c.load(buffer + 32), 0xeeee_eeee, "the rest of a larger buffer is left alone");
    let node = |c: &Client, number: u64| {
        let mut at = back;
        for _ in 0..number {
            at = c.load_u64(at);
        }
        at
    };
    let engines = |c: &Client, at: u64, count: u64| (0..count).map(|i| c.load(at + 4 * i)).collect::<Vec<_>>();
    let at = node(c, 0);
    assert_eq!(c.load(at + 32), 1 | 3 << 16, "three siblings");
    assert_eq!(engines(c, at + 48, 4), [copies[2], copies[0], copies[3], 0xeeee_eeee]);
    let at = node(c, 1);
    assert_eq!((c.load(at + 32), c.load(at + 36)), (engine(3, 1), 1 | 1 << 16));
    assert_eq!(engines(c, at + 80, 1), [copies[3]]);
    let at = node(c, 2);
    assert_eq!((c.load(at + 32), c.load(at + 36)), (engine(3, 0), 1 | 2 << 16));
    assert_eq!(engines(c, at + 80, 2), [copies[0], copies[2]]);
    let at = node(c, 3);
    assert_eq!((c.load(at + 32), c.load(at + 36)), (3 | 2 << 16, 2));
    assert_eq!(engines(c, at + 72, 4), copies);
    // Room that is too small, and questions about what is not there.
    let mut small = balance(1, &[]);
    small[34] = 2;
    let mut third = bond(1, 0, &[]);
    third[40] = 2;
    for (bad, errno) in [
        (small, Errno::Invalid),
        (third, Errno::NoEntry),
        (balance(0, &[]), Errno::NoEntry),
        (balance(9, &[]), Errno::Invalid),
        (parallel(1, 0, 0, &[]), Errno::NoEntry),
    ] {
        let chain = c.chain(&[bad]);
        c.memory_put_u64(buffer, chain);
        assert_eq!(c.get(context, param::ENGINES, 64, buffer), Err(errno));
    }
    // Back to the default map.
    assert_eq!(c.set(context, param::ENGINES, 0, 0), Ok(()));
    assert_eq!(c.get(context, param::ENGINES, 64, 0), Ok((0, 0)));
}

pub fn a_slot_beyond_the_map_a_closed_context_and_a_lost_device_take_no_work(c: &mut Client) {
    let context = c.create();
    assert_eq!(c.submit(context, ENGINES as u32, Descriptor::default()), Err(Errno::Invalid));
    assert_eq!(c.submit(context, u32::MAX, Descriptor::default()), Err(Errno::Invalid));
    let fence = c.nop(context, 0);
    let both = c.batch(&[]).after(fence).flagged(flag::SUBMIT_FENCE);
    assert_eq!(c.submit(context, 0, both), Err(Errno::Invalid), "both kinds of fence");
    c.finish(fence);
    let future = c.batch(&[]).after(wherry_accel::abi::Fence { seq: 9, ..fence });
    assert_eq!(c.submit(context, 0, future), Err(Errno::NoEntry), "a point that was not submitted");
    let masked = Descriptor { destination: 2, ..c.batch(&[]) };
    assert_eq!(c.submit(context, 0, masked), Err(Errno::Invalid), "a mask that leaves nothing");
    let word = Descriptor { word: 1, ..c.batch(&[]) };
    assert_eq!(c.submit(context, 0, word), Err(Errno::Invalid), "a word it does not use");
    c.destroy(context);
    assert_eq!(c.submit(context, 0, Descriptor::default()), Err(Errno::NoEntry));
    assert_eq!(c.state(fence), FenceState::Signalled, "its fences are remembered");
    let last = c.create();
    let (pending, _) = c.spin(last, 0);
    c.run_for(MS);
    c.device.lose();
    assert_eq!(c.submit(last, 0, Descriptor::default()), Err(Errno::Io));
    assert_eq!(c.wait(pending, SECOND), FenceState::Failed(Errno::Io));
}
