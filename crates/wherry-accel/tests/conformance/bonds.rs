//! Bonds and submit-fences.

use wherry_accel::FenceState;
use wherry_accel::abi::{Fence, param};
use wherry_accel::error::Errno;

use crate::client::*;

pub fn invalid_bonds_are_refused(c: &mut Client) {
    let copies = engines_of(0);
    let set = |c: &mut Client, slots: &[u32], nodes: &[Vec<u8>]| {
        let context = c.create();
        let chain = c.chain(nodes);
        let at = c.put(&map_bytes(slots, chain));
        let result = c.set(context, param::ENGINES, 8 + 4 * slots.len() as u32, at);
        c.destroy(context);
        result
    };
    let virtual_slot = balance(0, &copies[..3]);
    let fine = bond(0, copies[0], &copies[1..3]);
    assert_eq!(set(c, &[GAP], &[virtual_slot.clone(), fine.clone()]), Ok(()));
    assert_eq!(set(c, &[GAP], &[virtual_slot.clone(), bond(0, engine(3, 0), &copies[..1])]), Ok(()), "any master");
    assert_eq!(set(c, &[copies[0]], &[bond(0, copies[1], &copies[..1])]), Ok(()), "a plain slot has no choice");
    for (what, nodes, errno) in [
        ("beyond the map", vec![virtual_slot.clone(), bond(1, copies[0], &copies[1..2])], Errno::Invalid),
        ("a gap", vec![bond(0, copies[0], &copies[1..2])], Errno::Invalid),
        ("no such master", vec![virtual_slot.clone(), bond(0, engine(9, 0), &copies[1..2])], Errno::NoEntry),
        ("no such engine", vec![virtual_slot.clone(), bond(0, copies[0], &[engine(0, 50)])], Errno::NoEntry),
        ("no sibling", vec![virtual_slot.clone(), bond(0, copies[0], &copies[3..4])], Errno::Invalid),
        ("no engine", vec![virtual_slot.clone(), bond(0, copies[0], &[])], Errno::Invalid),
        ("twice", vec![virtual_slot.clone(), bond(0, copies[0], &[copies[1], copies[1]])], Errno::Invalid),
    ] {
        assert_eq!(set(c, &[GAP], &nodes), Err(errno), "{what}");
    }
    let other = [engine(1, 0)];
    assert_eq!(set(c, &[copies[0]], &[bond(0, copies[1], &other)]), Err(Errno::Invalid), "not that of the slot");
    for byte in (12..32).chain(40..80) {
        let mut node = fine.clone();
        node[byte] = 1;
        assert_eq!(set(c, &[GAP], &[virtual_slot.clone(), node]), Err(Errno::Invalid), "byte {byte}");
    }
    let context = c.create();
    for beyond in 1..fine.len() as u64 {
        let at = END - fine.len() as u64 + beyond;
        c.memory_write_until_end(at, &fine);
        let chain = c.put(&virtual_slot);
        c.memory_put_u64(chain, at);
        let map = c.put(&map_bytes(&[GAP], chain));
        assert_eq!(c.set(context, param::ENGINES, 12, map), Err(Errno::Fault), "{beyond} bytes beyond");
    }
}

/// Slot 0: balanced, bonded so that beside a master on engine i runs engine i + 1. Slots 1..: the engines.
fn bonded(c: &mut Client, class: u16) -> u32 {
    let siblings = engines_of(class);
    let mut nodes = vec![balance(0, &siblings)];
    for (index, master) in siblings.iter().enumerate() {
        nodes.push(bond(0, *master, &[siblings[(index + 1) % siblings.len()]]));
    }
    let context = c.create();
    let chain = c.chain(&nodes);
    let slots: Vec<u32> = std::iter::once(GAP).chain(siblings).collect();
    c.map(context, &slots, chain);
    context
}

pub fn a_bonded_request_never_runs_before_its_master(c: &mut Client) {
    for class in wide_classes() {
        for priority in [-1023, 0, 1023] {
            let (plain, pair) = (c.balanced(class), bonded(c, class));
            // Only the bonded one has the priority: it must not be drawn before the others by it.
            c.priority(pair, priority);
            let (a, go) = c.spin(plain, 1);
            let (times, done) = ([c.alloc(8), c.alloc(8)], c.alloc(8));
            let master = c.batch(&[stamp(times[0]), spin(done)]).after(a);
            let b = c.submit(plain, 2, master).unwrap();
            let beside = c.batch(&[stamp(times[1])]).beside(b);
            let b2 = c.submit(pair, 0, beside).unwrap();
            c.run_for(10 * MS);
            assert_eq!((c.state(b2), c.load_u64(times[1])), (FenceState::Pending, 0), "B' waits for B, B for A");
            c.store(go, 1);
            c.finish(b2);
            assert_eq!(c.state(b), FenceState::Pending, "beside its master, not after it");
            c.store(done, 1);
            c.finish(b);
            let (first, second) = (c.load_u64(times[0]), c.load_u64(times[1]));
            assert!(first > 0 && first <= second, "{first} {second}");
        }
    }
}

pub fn a_bonded_pair_that_waits_for_each_other_runs(c: &mut Client) {
    for class in wide_classes() {
        let context = bonded(c, class);
        let (ping, pong) = (c.alloc(8), c.alloc(8));
        let master = c.batch(&[store(ping, 1), poll(pong, 1), store(ping, 2), poll(pong, 2)]);
        let master = c.submit(context, 1, master).unwrap();
        let pair = c.batch(&[poll(ping, 1), store(pong, 1), poll(ping, 2), store(pong, 2)]).beside(master);
        let pair = c.submit(context, 0, pair).unwrap();
        c.finish(master);
        c.finish(pair);
    }
}

/// Submits spinners: a master on a slot of `context`, and its pair on the bonded slot of the same.
fn pair(c: &mut Client, context: u32, slot: u32) -> [(Fence, u64); 2] {
    let master = c.spin(context, slot);
    let (batch, word) = c.spinner();
    [master, (c.submit(context, 0, batch.beside(master.0)).unwrap(), word)]
}

fn end(c: &mut Client, spinners: impl IntoIterator<Item = (Fence, u64)>) {
    for (fence, word) in spinners {
        c.store(word, 1);
        c.finish(fence);
    }
}

pub fn a_pair_runs_on_two_engines(c: &mut Client) {
    for class in wide_classes() {
        let count = usize::from(COUNTS[usize::from(class)]);
        for master in 0..count {
            let context = bonded(c, class);
            let both = pair(c, context, master as u32 + 1);
            let busy = c.measure(10 * MS);
            for engine in 0..count {
                let expected = engine == master || engine == (master + 1) % count;
                assert_eq!(busy[first_of(class) + engine] > 0.85, expected, "master {master}: {busy:?}");
            }
            end(c, both);
        }
    }
    // Without a bond: any other engine, never that of the master, whatever was preferred before.
    let context = c.balanced(0);
    for master in 1..=4 {
        let both = pair(c, context, master);
        let busy = c.measure(10 * MS);
        assert_eq!(busy.iter().filter(|busy| **busy > 0.85).count(), 2, "{busy:?}");
        end(c, both);
    }
}

pub fn two_pairs_run_beside_each_other(c: &mut Client) {
    let contexts = [bonded(c, 0), bonded(c, 0)];
    let pairs = [pair(c, contexts[0], 1), pair(c, contexts[1], 3)];
    let busy = c.measure(20 * MS);
    assert!(busy[..4].iter().all(|busy| *busy > 0.85), "{busy:?}");
    end(c, pairs.into_iter().flatten());
}

pub fn a_pair_that_must_run_together_does_not_deadlock(c: &mut Client) {
    for class in wide_classes() {
        // More pairs than engines, each of which needs both halves on an engine at once, and spinners in between.
        let mut all = Vec::new();
        let spinner = c.balanced(class);
        let (noise, go) = c.spin(spinner, 0);
        for number in 0..4u32 {
            let context = bonded(c, class);
            let (a, b) = (c.alloc(8), c.alloc(8));
            let slot = 1 + number % u32::from(COUNTS[usize::from(class)]);
            let master = c.batch(&[store(a, 1), spin(b)]);
            let master = c.submit(context, slot, master).unwrap();
            let other = c.batch(&[spin(a), store(b, 1)]).beside(master);
            all.extend([master, c.submit(context, 0, other).unwrap()]);
        }
        for fence in all {
            c.finish(fence);
        }
        c.store(go, 1);
        c.finish(noise);
    }
}

pub fn a_corked_master_keeps_all_siblings_idle_and_then_only_the_bonded_one_runs(c: &mut Client) {
    for class in wide_classes() {
        let context = bonded(c, class);
        let done = c.alloc(8);
        let cork = c.batch(&[store(done, 1)]).after(client_fence(context, 1));
        let master = c.submit(context, 1, cork).unwrap();
        let (batch, word) = c.spinner();
        let other = c.submit(context, 0, batch.beside(master)).unwrap();
        let busy = c.measure(10 * MS);
        assert!(busy.iter().all(|busy| *busy == 0.0), "{busy:?}");
        c.advance(context, 1);
        c.finish(master);
        let busy = c.measure(10 * MS);
        let bonded_engine = first_of(class) + 1;
        for (engine, busy) in busy.iter().enumerate() {
            assert_eq!(*busy > 0.85, engine == bonded_engine, "engine {engine}: {busy}");
        }
        end(c, [(other, word)]);
    }
}

pub fn a_pair_that_waits_for_a_blocked_master_is_not_declared_hung(c: &mut Client) {
    let context = bonded(c, 0);
    let (ready, go) = (c.alloc(8), c.alloc(8));
    let master = c.batch(&[spin(ready), store(go, 1)]);
    let master = c.submit(context, 1, master).unwrap();
    let other = c.batch(&[spin(go)]).beside(master);
    let other = c.submit(context, 0, other).unwrap();
    c.run_for(MS);
    // Something more important takes the master's engine for a long time.
    let high = c.balanced(0);
    c.priority(high, 1000);
    let (blocker, word) = c.spin(high, 1);
    c.run_for(20 * SECOND);
    assert_eq!([c.state(master), c.state(other)], [FenceState::Pending; 2]);
    c.store(word, 1);
    c.finish(blocker);
    c.store(ready, 1);
    c.finish(master);
    c.finish(other);
    assert_eq!(c.get(context, param::HANGS, 0, 0), Ok((0, 0)));
}

pub fn a_master_that_hangs_does_not_take_its_pair_with_it(c: &mut Client) {
    let (context, other) = (bonded(c, 0), bonded(c, 0));
    let (hung, _) = c.hog(context, 1);
    let go = c.alloc(8);
    let beside = c.batch(&[poll(go, 1)]).beside(hung);
    let beside = c.submit(other, 0, beside).unwrap();
    c.run_for(MS);
    let innocent = c.balanced(0);
    let innocent = c.nop(innocent, 1);
    assert_eq!(c.wait(hung, SECOND), FenceState::Failed(Errno::Io));
    c.finish(innocent);
    c.run_for(20 * SECOND);
    assert_eq!(c.state(beside), FenceState::Pending);
    c.store(go, 1);
    c.finish(beside);
    assert_eq!(c.get(other, param::HANGS, 0, 0), Ok((0, 0)));
}
