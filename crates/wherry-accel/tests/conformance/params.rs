//! Parameters, creation and clones.

use wherry_accel::FenceState;
use wherry_accel::abi::{Fence, clone_flag, context_flag, param};
use wherry_accel::device::Caller;
use wherry_accel::error::Errno;

use crate::client::*;

fn create(c: &mut Client, flags: u32, nodes: &[Vec<u8>]) -> Result<u32, Errno> {
    let chain = c.chain(nodes);
    c.try_create(Caller::PRIVILEGED, flags, chain).map_err(|refused| refused.errno)
}

pub fn invalid_clones_are_refused(c: &mut Client) {
    let source = c.create();
    assert!(create(c, 0, &[clone(source, 0x1f & !clone_flag::TIMELINE)]).is_ok());
    assert_eq!(create(c, 2, &[]), Err(Errno::Invalid), "an unknown flag of the creation");
    for bit in 5..32 {
        assert_eq!(create(c, 0, &[clone(source, 1 << bit)]), Err(Errno::Invalid), "flag {bit}");
    }
    for byte in (12..32).chain(40..48) {
        let mut node = clone(source, 0);
        node[byte] = 1;
        assert_eq!(create(c, 0, &[node]), Err(Errno::Invalid), "byte {byte}");
    }
    assert_eq!(create(c, 0, &[clone(source + 7, 0)]), Err(Errno::NoEntry));
    assert_eq!(create(c, 0, &[clone(0, 0)]), Err(Errno::NoEntry));
    assert_eq!(create(c, 0, &[clone(source, clone_flag::TIMELINE)]), Err(Errno::Invalid), "it has no single timeline");
    let mut unknown = clone(source, 0);
    unknown[8] = 2;
    assert_eq!(create(c, 0, &[unknown]), Err(Errno::Invalid));
    for bad in [1, u64::MAX] {
        assert_eq!(c.try_create(Caller::PLAIN, 0, bad).unwrap_err().errno, Errno::Fault);
    }
    let looped = c.put(&clone(source, 0));
    c.memory_put_u64(looped, looped);
    assert_eq!(c.try_create(Caller::PLAIN, 0, looped).unwrap_err().errno, Errno::TooBig);
    let mut named = set_param(param::PRIORITY, 0, 1);
    named[32] = source as u8;
    assert_eq!(create(c, 0, &[named]), Err(Errno::Invalid), "a parameter of another context");
    let before = c.device.contexts().len();
    assert_eq!(create(c, 0, &[set_param(param::PRIORITY, 0, 5), clone(source, 1 << 9)]), Err(Errno::Invalid));
    assert_eq!(c.device.contexts().len(), before, "nothing is left of a refused one");
    c.destroy(source);
    assert_eq!(create(c, 0, &[clone(source, 0)]), Err(Errno::NoEntry), "a closed source");
}

pub fn a_cloned_map_equals_its_source_and_a_later_set_wins(c: &mut Client) {
    let copies = engines_of(0);
    let source = c.create();
    let chain = c.chain(&[balance(1, &copies), bond(1, copies[0], &copies[2..3]), parallel(2, 2, 2, &copies)]);
    c.map(source, &[copies[3], GAP, GAP, GAP], chain);
    let used = c.nop(source, 1);
    c.finish(used);
    let copy = create(c, 0, &[clone(source, clone_flag::ENGINES)]).unwrap();
    let read = |c: &mut Client, context: u32| {
        let mut nodes = [balance(1, &[]), bond(1, 0, &[]), parallel(2, 2, 2, &[])];
        nodes[0][34] = 4;
        nodes[1][38] = 1;
        nodes.iter_mut().for_each(|node| node.extend([0xaa; 16]));
        let chain = c.chain(&nodes);
        let buffer = c.put(&map_bytes(&[0; 4], chain));
        let size = c.get(context, param::ENGINES, 24, buffer).unwrap().0;
        let mut bytes = vec![0; 16 + 3 * 128];
        // The buffer from its slots on, and the nodes without their links.
        wherry_accel::memory::AddressSpace::read(&*c.memory, buffer + 8, &mut bytes[..16]).unwrap();
        let mut at = chain;
        for (node, length) in [56, 88, 80].into_iter().enumerate() {
            let from = 16 + 128 * node;
            wherry_accel::memory::AddressSpace::read(&*c.memory, at + 8, &mut bytes[from..from + length]).unwrap();
            at = c.load_u64(at);
        }
        (size, bytes)
    };
    assert_eq!(read(c, source), read(c, copy));
    // Not used yet: the copy can still be set.
    let at = c.put(&map_bytes(&[copies[1]], 0));
    assert_eq!(c.set(copy, param::ENGINES, 12, at), Ok(()));
    // In one chain: what comes later wins.
    let mapped = [set_param(param::ENGINES, 12, at), clone(source, clone_flag::ENGINES)];
    let (first, second) =
        (create(c, 0, &mapped).unwrap(), create(c, 0, &[mapped[1].clone(), mapped[0].clone()]).unwrap());
    assert_eq!(c.get(first, param::ENGINES, 0, 0), Ok((24, 0)));
    assert_eq!(c.get(second, param::ENGINES, 0, 0), Ok((12, 0)));
    let plain = c.create();
    let plain = create(c, 0, &[set_param(param::ENGINES, 12, at), clone(plain, clone_flag::ENGINES)]).unwrap();
    assert_eq!(c.get(plain, param::ENGINES, 0, 0), Ok((0, 0)), "also a default map is cloned");
}

pub fn cloned_flags_and_persistence_are_those_of_the_source(c: &mut Client) {
    let source = create(c, context_flag::SINGLE_TIMELINE, &[set_param(param::PERSISTENCE, 0, 0)]).unwrap();
    let copy = create(c, 0, &[clone(source, clone_flag::FLAGS)]).unwrap();
    let without = create(c, 0, &[clone(source, 0)]).unwrap();
    for (context, flags, persistent) in [(source, 1, 0), (copy, 1, 0), (without, 0, 1)] {
        assert_eq!(c.get(context, param::FLAGS, 0, 0), Ok((0, flags)));
        assert_eq!(c.get(context, param::PERSISTENCE, 0, 0), Ok((0, persistent)));
    }
    // Its single timeline is its own: it orders its slots, and not those of its source.
    let (running, word) = c.spin(copy, 0);
    let behind = c.nop(copy, 1);
    let other = c.nop(source, 2);
    c.finish(other);
    assert_eq!(c.state(behind), FenceState::Pending);
    c.store(word, 1);
    c.finish(running);
    c.finish(behind);
}

pub fn a_cloned_priority_is_that_of_the_source(c: &mut Client) {
    let source = c.create();
    c.priority(source, -77);
    let copy = create(c, 0, &[clone(source, clone_flag::PRIORITY)]).unwrap();
    assert_eq!(c.get(copy, param::PRIORITY, 0, 0), Ok((0, -77i64 as u64)));
    let other = create(c, 0, &[clone(source, clone_flag::PRIORITY), set_param(param::PRIORITY, 0, 5)]).unwrap();
    assert_eq!(c.get(other, param::PRIORITY, 0, 0), Ok((0, 5)));
    let other = create(c, 0, &[set_param(param::PRIORITY, 0, 5), clone(source, clone_flag::PRIORITY)]).unwrap();
    assert_eq!(c.get(other, param::PRIORITY, 0, 0), Ok((0, -77i64 as u64)));
    c.priority(source, 3);
    assert_eq!(c.get(copy, param::PRIORITY, 0, 0), Ok((0, -77i64 as u64)), "a copy, not a link");
}

pub fn a_cloned_address_space_is_shared(c: &mut Client) {
    let source = create(c, 0, &[set_param(param::SPACE, 0, 1)]).unwrap();
    let copy = create(c, 0, &[clone(source, clone_flag::SPACE)]).unwrap();
    let other = create(c, 0, &[clone(source, 0)]).unwrap();
    assert_eq!(c.get(copy, param::SPACE, 0, 0), Ok((0, 1)));
    assert_eq!(c.get(other, param::SPACE, 0, 0), Ok((0, 0)));
    let word = c.alloc(8);
    for context in [source, copy] {
        let fence = c.submit(context, 0, add(word, 1)).unwrap();
        c.finish(fence);
    }
    assert_eq!(c.load(word), 2);
    assert_eq!(c.set(copy, param::SPACE, 0, 0), Err(Errno::Invalid), "in use");
    assert_eq!(c.set(other, param::SPACE, 0, 9), Err(Errno::NoEntry));
}

pub fn a_cloned_timeline_orders_both_contexts(c: &mut Client) {
    let source = create(c, context_flag::SINGLE_TIMELINE, &[]).unwrap();
    let copy = create(c, 0, &[clone(source, clone_flag::TIMELINE)]).unwrap();
    let (first, word) = c.spin(source, 0);
    let second = c.nop(copy, 1);
    let third = c.nop(source, 2);
    c.run_for(10 * MS);
    assert_eq!([c.state(first), c.state(second), c.state(third)], [FenceState::Pending; 3]);
    c.store(word, 1);
    c.finish(third);
    assert_eq!([c.state(first), c.state(second)], [FenceState::Signalled; 2]);
    // The source may go; the timeline stays with the other.
    c.destroy(source);
    let (first, word) = c.spin(copy, 0);
    let second = c.nop(copy, 3);
    c.run_for(MS);
    assert_eq!(c.state(second), FenceState::Pending);
    c.store(word, 1);
    c.finish(first);
    c.finish(second);
}

pub fn virtual_slots_are_copied_and_not_shared(c: &mut Client) {
    let source = c.balanced(1);
    let (running, word) = c.spin(source, 0);
    let copy = create(c, 0, &[clone(source, clone_flag::ENGINES)]).unwrap();
    // A timeline of its own, with points of its own.
    let fence = c.nop(copy, 0);
    assert_eq!(fence, Fence { context: copy, slot: 0, seq: 1 });
    c.finish(fence);
    assert_eq!(c.state(running), FenceState::Pending);
    c.store(word, 1);
    c.finish(running);
}

pub fn scalars_have_their_size_range_and_privilege(c: &mut Client) {
    let context = c.create();
    for param in [param::PRIORITY, param::PERSISTENCE, param::SPACE] {
        assert_eq!(c.set(context, param, 8, 0), Err(Errno::Invalid), "parameter {param}");
        assert_eq!(c.set(context, param, 0, 0), Ok(()), "parameter {param}");
    }
    for (priority, result) in [
        (-1024, Err(Errno::Invalid)),
        (-1023, Ok(())),
        (1023, Ok(())),
        (1024, Err(Errno::Invalid)),
        (i64::MAX, Err(Errno::Invalid)),
        (i64::MIN, Err(Errno::Invalid)),
    ] {
        assert_eq!(c.set(context, param::PRIORITY, 0, priority as u64), result, "{priority}");
    }
    for (priority, result) in
        [(1, Err(Errno::Perm)), (1023, Err(Errno::Perm)), (1024, Err(Errno::Invalid)), (0, Ok(()))]
    {
        assert_eq!(c.set_plain(context, param::PRIORITY, 0, priority), result, "{priority} without privilege");
    }
    assert_eq!(c.set_plain(context, param::PRIORITY, 0, -1i64 as u64), Ok(()));
    assert_eq!(c.get(context, param::PRIORITY, 0, 0), Ok((0, u64::MAX)));
    assert_eq!(c.set(context, param::PERSISTENCE, 0, 2), Err(Errno::Invalid));
    let chain = c.chain(&[set_param(param::PRIORITY, 0, 5)]);
    assert_eq!(c.try_create(Caller::PLAIN, 0, chain).unwrap_err().errno, Errno::Perm);
    for read_only in [param::BANNED, param::FLAGS, param::HANGS] {
        assert_eq!(c.set(context, read_only, 0, 0), Err(Errno::Invalid));
        assert_eq!(c.get(context, read_only, 0, 0), Ok((0, 0)));
    }
}

pub fn sizes_are_negotiated(c: &mut Client) {
    let context = c.create();
    c.map(context, &[engine(0, 0), engine(1, 0)], 0);
    let buffer = c.put(&[0; 32]);
    assert_eq!(c.get(context, param::ENGINES, 0, 0), Ok((16, 0)), "size 0 asks");
    for short in 1..16 {
        assert_eq!(c.get(context, param::ENGINES, short, buffer), Err(Errno::Invalid), "{short} bytes");
    }
    assert_eq!(c.get(context, param::ENGINES, 16, buffer), Ok((16, buffer)));
    assert_eq!(c.get(context, param::ENGINES, 999, buffer), Ok((16, buffer)));
    for bad in [0, END, END - 15, READ_ONLY, u64::MAX] {
        assert_eq!(c.get(context, param::ENGINES, 16, bad), Err(Errno::Fault), "{bad:#x}");
    }
    assert_eq!(c.get(context, param::SHARE, 0, 0), Ok((16, 0)));
    assert_eq!(c.get(context, param::SHARE, 15, buffer), Err(Errno::Invalid));
    assert_eq!(c.get(context, param::PRIORITY, 77, 3), Ok((0, 0)), "a scalar is no structure");
}

pub fn shares_are_named_by_slot_or_by_engine(c: &mut Client) {
    let share = |who: u32, flags: u32, percent: u32, reserved: u32| {
        [who, flags, percent, reserved].iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>()
    };
    let (mapped, plain) = (c.create(), c.create());
    c.map(mapped, &[engine(1, 0), engine(1, 1)], 0);
    for (context, bytes, result) in [
        (mapped, share(1, 1, 50, 0), Ok(())),
        (mapped, share(2, 1, 50, 0), Err(Errno::Invalid)),
        (mapped, share(engine(1, 1), 0, 50, 0), Err(Errno::Invalid)),
        (plain, share(engine(1, 1), 0, 25, 0), Ok(())),
        (plain, share(1, 1, 50, 0), Err(Errno::Invalid)),
        (plain, share(engine(7, 1), 0, 50, 0), Err(Errno::NoEntry)),
        (plain, share(engine(1, 1), 0, 0, 0), Err(Errno::Invalid)),
        (plain, share(engine(1, 1), 0, 101, 0), Err(Errno::Invalid)),
        (plain, share(engine(1, 1), 2, 50, 0), Err(Errno::Invalid)),
        (plain, share(engine(1, 1), 0, 50, 1), Err(Errno::Invalid)),
    ] {
        let at = c.put(&bytes);
        assert_eq!(c.set(context, param::SHARE, 16, at), result, "{bytes:?}");
    }
    for (context, bytes, percent) in
        [(mapped, share(1, 1, 0, 0), 50), (mapped, share(0, 1, 0, 0), 100), (plain, share(engine(1, 1), 0, 0, 0), 25)]
    {
        let at = c.put(&bytes);
        assert_eq!(c.get(context, param::SHARE, 16, at), Ok((16, at)));
        assert_eq!(c.load(at + 8), percent);
    }
    for size in [0, 8, 20] {
        assert_eq!(c.set(mapped, param::SHARE, size, 0), Err(Errno::Invalid));
    }
    assert_eq!(c.set(mapped, param::SHARE, 16, END), Err(Errno::Fault));
}

pub fn unknown_contexts_and_parameters_are_refused_both_ways(c: &mut Client) {
    let context = c.create();
    for unknown in [0, context + 1, context | 1 << 16, u32::MAX] {
        assert_eq!(c.set(unknown, param::PRIORITY, 0, 0), Err(Errno::NoEntry));
        assert_eq!(c.get(unknown, param::PRIORITY, 0, 0), Err(Errno::NoEntry));
    }
    for unknown in [0, 9, 1 << 32, u64::MAX] {
        assert_eq!(c.set(context, unknown, 0, 0), Err(Errno::Invalid));
        assert_eq!(c.get(context, unknown, 0, 0), Err(Errno::Invalid));
    }
    c.destroy(context);
    assert_eq!(c.set(context, param::PRIORITY, 0, 0), Err(Errno::NoEntry));
    // Its place is used again, and its number is not.
    let next = c.create();
    assert_eq!(next & 0xffff, context & 0xffff);
    assert_ne!(next, context);
}
