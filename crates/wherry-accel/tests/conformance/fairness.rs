//! Slices, waiting, priorities.

use wherry_accel::abi::param;
use wherry_accel::catalogue::EngineId;
use wherry_accel::error::Errno;
use wherry_accel::{FenceState, Tunables};

use crate::client::*;

/// How long work of a slot occupied engines, in nanoseconds.
fn runtime(c: &mut Client, context: u32, slot: usize) -> u64 {
    let contexts = c.device.contexts();
    contexts.iter().find(|info| info.id == context).unwrap().slots[slot].runtime
}

pub fn one_spinner_more_than_engines_shares_them_fairly(c: &mut Client) {
    for class in wide_classes() {
        let count = u64::from(COUNTS[usize::from(class)]);
        let spinners: Vec<_> = (0..=count)
            .map(|_| {
                let context = c.balanced(class);
                (context, c.spin(context, 0))
            })
            .collect();
        c.run_for(2 * SECOND);
        let times: Vec<u64> = spinners.iter().map(|(context, _)| runtime(c, *context, 0)).collect();
        // In slices of a millisecond.
        let share = 2000.0 * count as f64 / (count + 1) as f64;
        let spread = (times.iter().max().unwrap() - times.iter().min().unwrap()) as f64 / MS as f64;
        assert!(spread < 4.0 * share.sqrt(), "{times:?}");
        let sum: u64 = times.iter().sum();
        assert!(sum as f64 > 0.99 * (2 * SECOND * count) as f64, "no engine was idle: {times:?}");
        for (context, (fence, word)) in spinners {
            c.store(word, 1);
            c.finish(fence);
            c.destroy(context);
        }
    }
}

pub fn work_behind_a_spinner_is_sliced_in(c: &mut Client) {
    for class in wide_classes() {
        let count = COUNTS[usize::from(class)];
        let spinners: Vec<_> = (0..count)
            .map(|_| {
                let context = c.balanced(class);
                c.spin(context, 0)
            })
            .collect();
        c.run_for(5 * MS);
        let context = c.balanced(class);
        let fence = c.nop(context, 0);
        assert_eq!(c.wait(fence, 5 * MS), FenceState::Signalled, "within a few slices");
        for (fence, word) in spinners {
            assert_eq!(c.state(fence), FenceState::Pending);
            c.store(word, 1);
            c.finish(fence);
        }
    }
}

pub fn others_finish_beside_a_job_that_cannot_be_preempted(c: &mut Client) {
    for class in wide_classes() {
        let context = c.balanced(class);
        let (hog, word) = c.hog(context, 1);
        c.run_for(MS);
        for _ in 0..6 {
            let other = c.balanced(class);
            let (batch, go) = c.spinner();
            c.store(go, 1);
            let fence = c.submit(other, 0, batch).unwrap();
            assert_eq!(c.wait(fence, 50 * MS), FenceState::Signalled, "within 50 ms");
        }
        c.run_for(100 * MS);
        assert_eq!(c.state(hog), FenceState::Pending, "nobody had to be lost for it");
        c.store(word, 1);
        c.finish(hog);
    }
}

pub fn waiting_for_memory_gives_the_engine_away(c: &mut Client) {
    for class in wide_classes() {
        let count = COUNTS[usize::from(class)];
        let word = c.alloc(8);
        let waiters: Vec<_> = (0..count)
            .map(|_| {
                let context = c.balanced(class);
                let batch = c.batch(&[poll(word, 1)]);
                c.submit(context, 0, batch).unwrap()
            })
            .collect();
        c.run_for(MS);
        // All engines wait; who releases them comes after them, on the same engines.
        let context = c.balanced(class);
        let fence = c.submit(context, 0, store(word, 1)).unwrap();
        assert_eq!(c.wait(fence, MS), FenceState::Signalled, "at once, not after slices");
        for fence in waiters {
            c.finish(fence);
        }
    }
}

pub fn more_waiters_than_engines_do_not_keep_out_who_they_wait_for(c: &mut Client) {
    for class in wide_classes() {
        let count = u32::from(COUNTS[usize::from(class)]);
        // Each spins until the one after it has stored its word: only turns make that end.
        let words: Vec<u64> = (0..=3 * count).map(|_| c.alloc(8)).collect();
        let fences: Vec<_> = words
            .windows(2)
            .map(|pair| {
                let context = c.balanced(class);
                let batch = c.batch(&[spin(pair[1]), store(pair[0], 1)]);
                c.submit(context, 0, batch).unwrap()
            })
            .collect();
        c.run_for(5 * MS);
        let context = c.balanced(class);
        let last = c.submit(context, 0, store(words[words.len() - 1], 1)).unwrap();
        c.finish(last);
        for fence in fences {
            c.finish(fence);
        }
        assert_eq!(c.load(words[0]), 1);
    }
}

pub fn a_higher_priority_goes_first_and_virtual_goes_before_native(c: &mut Client) {
    let siblings = engines_of(2);
    let order = c.alloc(8);
    let gates: Vec<_> = (0..siblings.len())
        .map(|slot| {
            let gate = c.create();
            c.priority(gate, 1023);
            let word = c.alloc(8);
            let batch = c.batch(&[spin(word)]);
            (c.submit(gate, (first_of(2) + slot) as u32, batch).unwrap(), word)
        })
        .collect();
    c.run_for(MS);
    let mut seen = Vec::new();
    // Submitted from the last to the first.
    for (priority, virtual_slot) in [(-5, false), (0, false), (0, true), (7, false), (1023, false)] {
        let context = c.balanced(2);
        c.priority(context, priority);
        let at = c.alloc(32);
        let slot = if virtual_slot { 0 } else { 1 };
        seen.push((c.submit(context, slot, add(order, 1).completing_at(at)).unwrap(), at));
    }
    // The second engine stays taken, so that all of them need the first.
    c.store(gates[0].1, 1);
    c.finish(seen[0].0);
    let order: Vec<u64> = seen.iter().map(|(_, at)| c.record(*at).result).collect();
    assert_eq!(order, [4, 3, 2, 1, 0]);
    c.store(gates[1].1, 1);
    c.finish(gates[1].0);
    // A higher one takes an engine at once, not at the end of a slice; the lower one goes on afterwards.
    let low = c.balanced(2);
    let (running, word) = c.spin(low, 1);
    c.run_for(MS / 10);
    let high = c.balanced(2);
    c.priority(high, 1);
    let (first, go) = c.spin(high, 1);
    c.run_for(10 * MS);
    assert_eq!(c.busy(first), (class_bit(2), 0));
    assert_eq!(c.busy(running), (0, class_bit(2)));
    c.store(go, 1);
    c.finish(first);
    c.store(word, 1);
    c.finish(running);
    // A plain client cannot raise itself above others.
    assert!(c.set_plain(low, param::PRIORITY, 0, 1).is_err());
}

pub fn a_share_shortens_the_slices_of_a_slot(c: &mut Client) {
    let contexts: Vec<_> = (0..2).map(|_| c.create()).collect();
    for context in &contexts {
        c.map(*context, &[engine(4, 0)], 0);
    }
    let share = c.put(&[0, 0, 0, 0, 1, 0, 0, 0, 50, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(c.set(contexts[1], param::SHARE, 16, share), Ok(()));
    let spinners: Vec<_> = contexts.iter().map(|context| c.spin(*context, 0)).collect();
    c.run_for(SECOND);
    let times: Vec<u64> = contexts.iter().map(|context| runtime(c, *context, 0)).collect();
    let ratio = times[0] as f64 / times[1] as f64;
    assert!((1.8..2.2).contains(&ratio), "{times:?}");
    for (fence, word) in spinners {
        c.store(word, 1);
        c.finish(fence);
    }
}

pub fn what_is_tuned_for_an_engine_holds_for_that_engine_alone(c: &mut Client) {
    let tuned = Tunables { slice: 0, preempt_timeout: 20 * MS, heartbeat: 10 * MS };
    c.tune(EngineId { class: 3, instance: 1 }, tuned);
    let spinners: Vec<_> = [1, 2]
        .map(|instance| {
            (0..2)
                .map(|_| {
                    let context = c.create();
                    c.map(context, &[engine(3, instance)], 0);
                    (context, c.spin(context, 0))
                })
                .collect::<Vec<_>>()
        })
        .into_iter()
        .flatten()
        .collect();
    c.run_for(100 * MS);
    let times: Vec<u64> = spinners.iter().map(|(context, _)| runtime(c, *context, 0)).collect();
    assert_eq!((times[0] > 0, times[1]), (true, 0), "without slices the first keeps the engine");
    assert!(times[2].abs_diff(times[3]) < 2 * MS, "{times:?}");
    for (_, (fence, word)) in spinners {
        c.store(word, 1);
        c.finish(fence);
    }
    // Heartbeats ten milliseconds apart, and twenty to give way.
    let context = c.create();
    let (quick, _) = c.hog(context, first_of(3) as u32 + 1);
    let (slow, word) = c.hog(context, first_of(3) as u32 + 2);
    assert_eq!(c.wait(quick, 60 * MS), FenceState::Failed(Errno::Io));
    c.run_for(SECOND);
    c.store(word, 1);
    c.finish(slow);
}
