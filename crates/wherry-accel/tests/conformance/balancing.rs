//! Virtual engines.

use wherry_accel::FenceState;
use wherry_accel::abi::{Descriptor, Fence, param};
use wherry_accel::error::Errno;

use crate::client::*;

/// Sets a map with one extension node lying at `at`.
fn set_at(c: &mut Client, slots: &[u32], chain: u64) -> Result<(), Errno> {
    let context = c.create();
    let at = c.put(&map_bytes(slots, chain));
    let result = c.set(context, param::ENGINES, 8 + 4 * slots.len() as u32, at);
    if result.is_err() {
        assert_eq!(c.get(context, param::ENGINES, 0, 0), Ok((0, 0)), "nothing of a refused map is left");
    }
    c.destroy(context);
    result
}

pub fn invalid_balancers_are_refused(c: &mut Client) {
    let copies = engines_of(0);
    let set = |c: &mut Client, slots: &[u32], nodes: &[Vec<u8>]| {
        let chain = c.chain(nodes);
        set_at(c, slots, chain)
    };
    assert_eq!(set_at(c, &[GAP], 1), Err(Errno::Fault));
    assert_eq!(set_at(c, &[GAP], u64::MAX), Err(Errno::Fault));
    let sixteen: Vec<_> = (0..16).map(|slot| balance(slot, &copies)).collect();
    assert_eq!(set(c, &[GAP; 16], &sixteen), Ok(()));
    assert_eq!(set(c, &[GAP], &[balance(1, &copies)]), Err(Errno::Invalid), "beyond the map");
    assert_eq!(set(c, &[copies[0]], &[balance(0, &copies)]), Err(Errno::Exists));
    assert_eq!(set(c, &[GAP], &[balance(0, &copies), balance(0, &copies)]), Err(Errno::Exists));
    assert_eq!(set(c, &[GAP], &[balance(0, &[])]), Err(Errno::Invalid), "no siblings");
    assert_eq!(set(c, &[GAP], &[balance(0, &[copies[0], engine(0, 77)])]), Err(Errno::NoEntry));
    assert_eq!(set(c, &[GAP], &[balance(0, &[copies[0], GAP])]), Err(Errno::NoEntry));
    assert_eq!(set(c, &[GAP], &[balance(0, &[copies[0], copies[1], copies[0]])]), Err(Errno::Invalid), "twice");
    assert_eq!(set(c, &[GAP], &[balance(0, &[copies[0], engine(1, 0)])]), Err(Errno::Invalid), "two classes");
    // Each bit that must be zero: flags of the node, its reserved words, flags and zero of the extension.
    for byte in (12..32).chain(36..48) {
        let mut node = balance(0, &copies);
        node[byte] = 0x40;
        assert_eq!(set(c, &[GAP], &[node]), Err(Errno::Invalid), "byte {byte}");
    }
    let mut unknown = balance(0, &copies);
    unknown[8] = 3;
    assert_eq!(set(c, &[GAP], &[unknown]), Err(Errno::Invalid));
    // A node linked to itself finds its slot taken; a loop of nodes that repeat is ended by its length.
    let own = c.put(&balance(0, &copies));
    c.memory_put_u64(own, own);
    assert_eq!(set_at(c, &[GAP], own), Err(Errno::Exists));
    let long = c.chain(&vec![bond(0, copies[0], &[copies[1]]); 511]);
    let chain = c.put(&balance(0, &copies));
    c.memory_put_u64(chain, long);
    assert_eq!(set_at(c, &[GAP], chain), Ok(()), "512 nodes");
    let one_more = c.put(&balance(1, &copies));
    c.memory_put_u64(one_more, chain);
    assert_eq!(set_at(c, &[GAP, GAP], one_more), Err(Errno::TooBig), "513 nodes");
    let looped = c.put(&bond(0, copies[0], &[copies[1]]));
    c.memory_put_u64(looped, looped);
    let chain = c.put(&balance(0, &copies));
    c.memory_put_u64(chain, looped);
    assert_eq!(set_at(c, &[GAP], chain), Err(Errno::TooBig), "a loop");
    // Over the end of memory by every number of bytes, and exactly at it.
    let node = balance(0, &copies);
    for beyond in 1..node.len() as u64 {
        let at = END - node.len() as u64 + beyond;
        c.memory_write_until_end(at, &node);
        assert_eq!(set_at(c, &[GAP], at), Err(Errno::Fault), "{beyond} bytes beyond");
    }
    let at = END - node.len() as u64;
    c.memory_write_until_end(at, &node);
    assert_eq!(set_at(c, &[GAP], at), Ok(()));
    // One sibling makes a plain engine.
    let context = c.create();
    let chain = c.chain(&[balance(0, &copies[1..2])]);
    c.map(context, &[GAP], chain);
    let buffer = c.put(&[0; 16]);
    c.get(context, param::ENGINES, 12, buffer).unwrap();
    assert_eq!(c.load(buffer + 8), copies[1]);
}

pub fn siblings_in_any_order_each_run_on_their_own_engine(c: &mut Client) {
    for class in wide_classes() {
        let mut siblings = engines_of(class);
        for turn in 0..siblings.len() {
            siblings.rotate_left(1);
            if turn % 2 == 1 {
                siblings.reverse();
            }
            let context = c.create();
            let chain = c.chain(&[balance(0, &siblings)]);
            let slots: Vec<u32> = std::iter::once(GAP).chain(siblings.iter().copied()).collect();
            c.map(context, &slots, chain);
            for (index, sibling) in siblings.iter().enumerate() {
                let (fence, word) = c.spin(context, index as u32 + 1);
                let busy = c.measure(20 * MS);
                let expected = first_of(class) + (sibling >> 16) as usize;
                assert!(busy[expected] > 0.85, "{busy:?}");
                assert!(busy.iter().sum::<f64>() < 1.1, "nothing else runs: {busy:?}");
                c.store(word, 1);
                c.finish(fence);
            }
            c.destroy(context);
        }
    }
}

pub fn every_virtual_slot_of_many_runs(c: &mut Client) {
    for class in wide_classes() {
        let context = c.create();
        let siblings = engines_of(class);
        let nodes: Vec<_> = (0..32).map(|slot| balance(slot, &siblings)).collect();
        let chain = c.chain(&nodes);
        c.map(context, &[GAP; 32], chain);
        let fences: Vec<_> = (0..32).map(|slot| c.nop(context, slot)).collect();
        for fence in fences {
            c.finish(fence);
        }
    }
}

pub fn running_and_queued_work_both_report_their_class(c: &mut Client) {
    for class in wide_classes() {
        let bit = class_bit(class);
        let context = c.balanced(class);
        let (running, word) = c.spin(context, 0);
        c.run_for(MS);
        // Behind a fence: not running on anything, and waiting for the same class.
        let blocked = c.batch(&[]).after(client_fence(context, 1));
        let blocked = c.submit(context, 0, blocked).unwrap();
        assert_eq!(c.busy(running), (bit, 0));
        assert_eq!(c.busy(blocked), (0, bit));
        c.store(word, 1);
        c.finish(running);
        assert_eq!(c.busy(running), (0, 0));
        assert_eq!(c.busy(blocked), (0, bit));
        c.advance(context, 1);
        c.finish(blocked);
        assert_eq!(c.busy(blocked), (0, 0));
    }
}

fn all_busy(c: &mut Client, class: u16) {
    let busy = c.measure(50 * MS);
    for instance in 0..usize::from(COUNTS[usize::from(class)]) {
        assert!(busy[first_of(class) + instance] > 0.85, "{busy:?}");
    }
}

/// As many contexts as siblings, each with a spinner on its virtual slot; what was submitted.
fn full(c: &mut Client, class: u16, after: Option<(u32, u64)>) -> Vec<(Fence, u64)> {
    (0..COUNTS[usize::from(class)])
        .map(|_| {
            let context = c.balanced(class);
            let (mut batch, word) = c.spinner();
            if let Some((context, seq)) = after {
                batch = batch.after(client_fence(context, seq));
            }
            (c.submit(context, 0, batch).unwrap(), word)
        })
        .collect()
}

fn end(c: &mut Client, spinners: Vec<(Fence, u64)>) {
    for (fence, word) in spinners {
        c.store(word, 1);
        c.finish(fence);
    }
}

pub fn as_many_spinners_as_siblings_keep_all_of_them_busy(c: &mut Client) {
    for class in wide_classes() {
        let spinners = full(c, class, None);
        all_busy(c, class);
        end(c, spinners);
    }
}

pub fn a_pulse_beside_the_spinners_still_leaves_all_engines_busy(c: &mut Client) {
    for class in wide_classes() {
        let spinners = full(c, class, None);
        for pulse in 0..4u32 {
            let context = c.balanced(class);
            let fence = c.nop(context, pulse % 3);
            c.finish(fence);
        }
        all_busy(c, class);
        end(c, spinners);
    }
}

pub fn spinners_that_are_ready_late_still_spread_over_all_engines(c: &mut Client) {
    for class in wide_classes() {
        let gate = c.create();
        let spinners = full(c, class, Some((gate, 1)));
        let busy = c.measure(5 * MS);
        assert!(busy.iter().all(|busy| *busy == 0.0), "{busy:?}");
        c.advance(gate, 1);
        all_busy(c, class);
        end(c, spinners);
    }
}

pub fn a_virtual_engine_passes_over_an_occupied_sibling(c: &mut Client) {
    for class in wide_classes() {
        let context = c.balanced(class);
        let count = u32::from(COUNTS[usize::from(class)]);
        for free in 1..=count {
            let spinners: Vec<_> = (1..=count).filter(|slot| *slot != free).map(|slot| c.spin(context, slot)).collect();
            c.run_for(MS);
            let before = c.busy_times();
            let (fence, word) = c.spin(context, 0);
            c.run_for(MS / 2);
            let after = c.busy_times();
            assert!(after[first_of(class) + free as usize - 1] > before[first_of(class) + free as usize - 1]);
            c.store(word, 1);
            c.finish(fence);
            end(c, spinners);
        }
    }
}

pub fn an_execution_mask_limits_the_choice(c: &mut Client) {
    let context = c.balanced(0);
    for chosen in 0..u64::from(COUNTS[0]) {
        let (batch, word) = c.spinner();
        let fence = c.submit(context, 0, Descriptor { destination: 1 << chosen, ..batch }).unwrap();
        let busy = c.measure(5 * MS);
        assert!(busy[chosen as usize] > 0.85 && busy.iter().sum::<f64>() < 1.1, "{busy:?}");
        c.store(word, 1);
        c.finish(fence);
    }
    // A masked request waits for its engine though others are idle.
    let (spinner, word) = c.spin(context, 3);
    c.run_for(MS / 2);
    let hog = c.hog(context, 3);
    let (batch, own) = c.spinner();
    let masked = c.submit(context, 0, Descriptor { destination: 0b0100, ..batch }).unwrap();
    c.store(word, 1);
    c.finish(spinner);
    c.run_for(MS);
    assert!(c.load(hog.1) == 0 && c.state(masked) == FenceState::Pending);
    end(c, vec![hog, (masked, own)]);
}

pub fn empty_requests_complete_on_every_virtual_engine(c: &mut Client) {
    for class in wide_classes() {
        let context = c.balanced(class);
        for round in 0..8 {
            let fences: Vec<_> = (0..3).map(|slot| c.nop(context, slot)).collect();
            for (slot, fence) in fences.into_iter().enumerate() {
                assert_eq!((fence.slot, fence.seq), (slot as u32, round + 1));
                c.finish(fence);
            }
        }
    }
}

pub fn a_chain_of_requests_over_virtual_engines_keeps_its_order(c: &mut Client) {
    let order = c.alloc(8);
    let mut seen = Vec::new();
    let mut last: Option<Fence> = None;
    for number in 0..12u16 {
        let class = [0, 1, 2, 3][usize::from(number) % 4];
        let context = c.balanced(class);
        let at = c.alloc(32);
        let mut d = c.batch(&[add(order, 1).completing_at(at)]);
        if let Some(last) = last {
            d = d.after(last);
        }
        last = Some(c.submit(context, 0, d).unwrap());
        seen.push(at);
    }
    c.finish(last.unwrap());
    for (number, at) in seen.into_iter().enumerate() {
        assert_eq!(c.record(at).result, number as u64);
    }
}

pub fn random_bursts_on_128_virtual_engines_all_complete(c: &mut Client) {
    for class in wide_classes() {
        let siblings = engines_of(class);
        let counter = c.alloc(8);
        let contexts: Vec<_> = (0..2)
            .map(|_| {
                let context = c.create();
                let nodes: Vec<_> = (0..64).map(|slot| balance(slot, &siblings)).collect();
                let chain = c.chain(&nodes);
                c.map(context, &[GAP; 64], chain);
                context
            })
            .collect();
        let mut random = 0x9e37_79b9_7f4a_7c15u64 ^ u64::from(class);
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        let mut fences = Vec::new();
        for _ in 0..60 {
            let (context, slot) = (contexts[next() as usize % 2], (next() % 64) as u32);
            for _ in 0..next() % 4 {
                fences.push(c.submit(context, slot, add(counter, 1)).unwrap());
            }
            if next() % 8 == 0 {
                c.run_for(next() % MS);
            }
        }
        let wanted = fences.len() as u32;
        for fence in fences {
            c.finish(fence);
        }
        assert_eq!(c.load(counter), wanted);
        for context in contexts {
            c.destroy(context);
        }
    }
}
