//! Parallel slots.

use wherry_accel::FenceState;
use wherry_accel::abi::{Descriptor, param};
use wherry_accel::error::Errno;

use crate::client::*;

/// A context whose slot 0 is parallel over a grid of engines of a class.
fn gang_context(c: &mut Client, class: u16, width: u16, siblings: u16) -> u32 {
    let engines: Vec<u32> = engines_of(class)[..usize::from(width * siblings)].to_vec();
    let context = c.create();
    let chain = c.chain(&[parallel(0, width, siblings, &engines)]);
    let slots: Vec<u32> = std::iter::once(GAP).chain(engines_of(class)).collect();
    c.map(context, &slots, chain);
    context
}

pub fn invalid_parallel_slots_are_refused(c: &mut Client) {
    let copies = engines_of(0);
    let set = |c: &mut Client, slots: &[u32], node: Vec<u8>| {
        let context = c.create();
        let chain = c.chain(&[node]);
        let at = c.put(&map_bytes(slots, chain));
        let result = c.set(context, param::ENGINES, 8 + 4 * slots.len() as u32, at);
        c.destroy(context);
        result
    };
    let fine = parallel(0, 2, 2, &copies);
    assert_eq!(set(c, &[GAP], fine.clone()), Ok(()));
    assert_eq!(set(c, &[GAP], parallel(0, 4, 1, &copies)), Ok(()));
    for (what, slots, node, errno) in [
        ("occupied", [copies[0]], fine.clone(), Errno::Exists),
        ("beyond the map", [GAP], parallel(1, 2, 2, &copies), Errno::Invalid),
        ("width 0", [GAP], parallel(0, 0, 2, &copies), Errno::Invalid),
        ("width 1", [GAP], parallel(0, 1, 2, &copies), Errno::Invalid),
        ("no siblings", [GAP], parallel(0, 2, 0, &copies), Errno::Invalid),
        ("two classes", [GAP], parallel(0, 2, 1, &[copies[0], engine(1, 0)]), Errno::Invalid),
        ("twice", [GAP], parallel(0, 2, 1, &[copies[0], copies[0]]), Errno::Invalid),
        ("unknown", [GAP], parallel(0, 2, 1, &[copies[0], engine(0, 9)]), Errno::NoEntry),
        ("more than there are", [GAP], parallel(0, 0xffff, 0xffff, &copies), Errno::Invalid),
    ] {
        assert_eq!(set(c, &slots, node), Err(errno), "{what}");
    }
    for byte in (12..32).chain(38..72) {
        let mut node = fine.clone();
        node[byte] = 2;
        assert_eq!(set(c, &[GAP], node), Err(Errno::Invalid), "byte {byte}");
    }
    // Exactly as many batches as lanes, by its own operation.
    let context = gang_context(c, 0, 2, 1);
    let empty = c.batch(&[]);
    for count in [0, 1, 3, 65] {
        let gang = c.gang(&vec![empty; count]);
        assert_eq!(c.submit(context, 0, gang), Err(Errno::Invalid), "{count} batches");
    }
    assert_eq!(c.submit(context, 0, empty), Err(Errno::Invalid), "a single batch on a parallel slot");
    let gang = c.gang(&[empty, empty]);
    assert_eq!(c.submit(context, 1, gang), Err(Errno::Invalid), "two batches on a plain slot");
    let nowhere = Descriptor { source: END, ..gang };
    assert_eq!(c.submit(context, 0, nowhere), Err(Errno::Fault));
    let fence = c.submit(context, 0, gang).unwrap();
    c.finish(fence);
}

/// A batch for each lane that adds to a counter.
fn counting(c: &mut Client, counter: u64, width: u16) -> Descriptor {
    let batches: Vec<_> = (0..width).map(|_| c.batch(&[add(counter, 1)])).collect();
    c.gang(&batches)
}

pub fn a_parallel_slot_runs_all_its_batches(c: &mut Client) {
    for (class, width, siblings) in [(0, 2, 1), (0, 2, 2), (0, 3, 1), (0, 4, 1), (1, 2, 1), (3, 3, 1)] {
        let context = gang_context(c, class, width, siblings);
        let counter = c.alloc(8);
        let gang = counting(c, counter, width);
        for round in 1..=4 {
            let fence = c.submit(context, 0, gang).unwrap();
            c.finish(fence);
            assert_eq!(c.load(counter), u32::from(width) * round);
        }
        // They run at once: each waits for all the others.
        let meet = c.alloc(8);
        let batch = c.batch(&[add(meet, 1), poll(meet, width.into())]);
        let gang = c.gang(&vec![batch; width.into()]);
        let fence = c.submit(context, 0, gang).unwrap();
        c.finish(fence);
    }
}

pub fn the_fence_of_a_parallel_request_is_one(c: &mut Client) {
    let context = gang_context(c, 0, 3, 1);
    let words: Vec<u64> = (0..3).map(|_| c.alloc(8)).collect();
    let batches: Vec<_> = words.iter().map(|word| c.batch(&[spin(*word)])).collect();
    let record = c.alloc(32);
    let gang = c.gang(&batches).completing_at(record);
    let fence = c.submit(context, 0, gang).unwrap();
    // Whoever waits for it waits for all lanes.
    let after = c.batch(&[]).after(fence);
    let after = c.submit(context, 4, after).unwrap();
    for word in words {
        c.run_for(5 * MS);
        assert_eq!([c.state(fence), c.state(after)], [FenceState::Pending; 2]);
        assert_eq!(c.record(record).status, 0);
        c.store(word, 1);
    }
    c.finish(fence);
    assert_eq!(c.record(record).status, 1);
    c.finish(after);
}

pub fn a_parallel_request_waits_for_its_in_fence(c: &mut Client) {
    let context = gang_context(c, 0, 2, 2);
    let counter = c.alloc(8);
    let gate = client_fence(context, 1);
    let gang = counting(c, counter, 2).after(gate);
    // The fence is kept, and used again.
    let fences: Vec<_> = (0..3).map(|_| c.submit(context, 0, gang).unwrap()).collect();
    c.run_for(10 * MS);
    assert_eq!(c.load(counter), 0);
    c.advance(context, 1);
    for fence in fences {
        c.finish(fence);
    }
    assert_eq!(c.load(counter), 6);
    let again = c.submit(context, 0, gang).unwrap();
    c.finish(again);
    assert_eq!(c.load(counter), 8);
}

pub fn a_parallel_request_starts_with_its_submit_fence(c: &mut Client) {
    let context = gang_context(c, 0, 2, 1);
    let counter = c.alloc(8);
    let (batch, word) = c.spinner();
    let gate = client_fence(context, 1);
    // The master runs beside both lanes, on the third engine.
    let master = c.submit(context, 3, batch.after(gate)).unwrap();
    let gang = counting(c, counter, 2).beside(master);
    let fence = c.submit(context, 0, gang).unwrap();
    c.run_for(10 * MS);
    assert_eq!(c.load(counter), 0);
    c.advance(context, 1);
    c.finish(fence);
    assert_eq!((c.load(counter), c.state(master)), (2, FenceState::Pending));
    // The fence is kept: its request has started long ago.
    let again = c.submit(context, 0, gang).unwrap();
    c.finish(again);
    assert_eq!(c.load(counter), 4);
    c.store(word, 1);
    c.finish(master);
}

pub fn many_contexts_run_parallel_requests(c: &mut Client) {
    const CONTEXTS: usize = 16;
    const LOOPS: usize = 512 / CONTEXTS;
    let width = 2;
    let counter = c.alloc(8);
    let gang = counting(c, counter, width);
    let mut fences = Vec::new();
    for _ in 0..CONTEXTS {
        let context = gang_context(c, 0, width, 2);
        fences.extend((0..LOOPS).map(|_| c.submit(context, 0, gang).unwrap()));
    }
    for fence in fences {
        c.finish(fence);
    }
    assert_eq!(c.load(counter), u32::from(width) * 512);
}

pub fn a_spinner_on_one_engine_holds_all_lanes_back(c: &mut Client) {
    let single = c.balanced(0);
    c.priority(single, 10);
    let context = gang_context(c, 0, 4, 1);
    let counter = c.alloc(8);
    for engine in 1..=4 {
        let (spinner, word) = c.spin(single, engine);
        c.run_for(MS);
        let before = c.load(counter);
        let gang = counting(c, counter, 4);
        let fence = c.submit(context, 0, gang).unwrap();
        c.run_for(20 * MS);
        assert_eq!((c.state(fence), c.load(counter)), (FenceState::Pending, before), "no lane runs alone");
        c.store(word, 1);
        c.finish(spinner);
        c.finish(fence);
        assert_eq!(c.load(counter), before + 4);
    }
    // Among equals it gets all its engines in time, though single requests always want them.
    c.priority(single, 0);
    let noise: Vec<_> = (1..=4)
        .flat_map(|slot| {
            let other = c.balanced(0);
            [c.spin(single, slot), c.spin(other, slot)]
        })
        .collect();
    c.run_for(3 * MS);
    let gang = counting(c, counter, 4);
    let fence = c.submit(context, 0, gang).unwrap();
    assert_eq!(c.wait(fence, 20 * MS), FenceState::Signalled);
    for (fence, word) in noise {
        c.store(word, 1);
        c.finish(fence);
    }
}

pub fn a_grid_of_siblings_runs_as_many_at_once_as_it_has_columns(c: &mut Client) {
    let contexts: Vec<_> = (0..2).map(|_| gang_context(c, 0, 2, 2)).collect();
    let words: Vec<u64> = (0..2).map(|_| c.alloc(8)).collect();
    let fences: Vec<_> = contexts
        .iter()
        .zip(&words)
        .map(|(context, word)| {
            let batch = c.batch(&[spin(*word)]);
            let gang = c.gang(&[batch, batch]);
            c.submit(*context, 0, gang).unwrap()
        })
        .collect();
    let busy = c.measure(20 * MS);
    assert!(busy[..4].iter().all(|busy| *busy > 0.85), "{busy:?}");
    for (fence, word) in fences.into_iter().zip(words) {
        c.store(word, 1);
        c.finish(fence);
    }
}
