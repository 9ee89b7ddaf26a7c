//! Hangs, bans, and the end of contexts.

use wherry_accel::FenceState;
use wherry_accel::abi::{Descriptor, opcode, param, status};
use wherry_accel::error::Errno;

use crate::client::*;

pub fn hung_jobs_end_with_eio_and_later_work_goes_on(c: &mut Client) {
    for class in wide_classes() {
        let contexts: Vec<_> = (0..2).map(|_| c.balanced(class)).collect();
        // Two jobs that never give way, on two engines, and others that need these engines.
        let hung: Vec<_> = contexts.iter().enumerate().map(|(i, context)| c.hog(*context, i as u32 + 1).0).collect();
        c.run_for(MS);
        let innocent: Vec<_> = contexts.iter().enumerate().map(|(i, context)| c.nop(*context, i as u32 + 1)).collect();
        let others: Vec<_> = (1..=2)
            .map(|slot| {
                let other = c.balanced(class);
                c.nop(other, slot)
            })
            .collect();
        for fence in hung {
            assert_eq!(c.wait(fence, 700 * MS), FenceState::Failed(Errno::Io), "lost at the pre-emption deadline");
        }
        for fence in innocent.into_iter().chain(others) {
            c.finish(fence);
        }
        for context in contexts {
            assert_eq!(c.get(context, param::HANGS, 0, 0), Ok((0, 1)));
            let fence = c.nop(context, 0);
            c.finish(fence);
        }
    }
}

pub fn a_hung_job_alone_is_found_by_heartbeats(c: &mut Client) {
    let context = c.create();
    let (fence, _) = c.hog(context, 0);
    c.run_for(7 * SECOND);
    assert_eq!(c.state(fence), FenceState::Pending, "three heartbeats have to pass");
    c.run_for(2 * SECOND);
    assert_eq!(c.state(fence), FenceState::Failed(Errno::Io));
    assert_eq!(c.device.engines()[0].resets, 1);
}

pub fn a_long_job_that_can_be_preempted_is_no_hang(c: &mut Client) {
    let context = c.create();
    let (fence, word) = c.spin(context, 0);
    c.run_for(30 * SECOND);
    assert_eq!(c.state(fence), FenceState::Pending);
    c.store(word, 1);
    c.finish(fence);
    assert_eq!(c.get(context, param::HANGS, 0, 0), Ok((0, 0)));
}

pub fn three_hangs_ban_a_context_and_no_other(c: &mut Client) {
    let (bad, good) = (c.create(), c.create());
    // Two, and time for the first to be forgotten; then two more.
    for (round, pause) in [(0, SECOND), (1, 121 * SECOND), (2, SECOND), (3, SECOND)] {
        let (fence, _) = c.hog(bad, 0);
        c.run_for(MS);
        let innocent = c.nop(good, 0);
        assert_eq!(c.wait(fence, SECOND), FenceState::Failed(Errno::Io), "round {round}");
        c.finish(innocent);
        assert_eq!(c.get(bad, param::BANNED, 0, 0), Ok((0, 0)), "round {round}");
        c.run_for(pause);
    }
    let (fence, _) = c.hog(bad, 0);
    let behind = c.nop(bad, 0);
    let elsewhere = c.spin(bad, 1).0;
    c.run_for(MS);
    let innocent = c.nop(good, 0);
    assert_eq!(c.wait(fence, SECOND), FenceState::Failed(Errno::Io));
    assert_eq!(c.wait(behind, SECOND), FenceState::Failed(Errno::Cancelled));
    assert_eq!(c.wait(elsewhere, SECOND), FenceState::Failed(Errno::Cancelled));
    c.finish(innocent);
    assert_eq!(c.get(bad, param::BANNED, 0, 0), Ok((0, 1)));
    assert_eq!(c.submit(bad, 0, Descriptor::default()), Err(Errno::Cancelled));
    let fence = c.nop(good, 0);
    c.finish(fence);
}

pub fn work_of_a_destroyed_context_ends_unless_it_is_persistent(c: &mut Client) {
    for (persistent, hog) in [(true, false), (false, false), (false, true)] {
        let context = c.create();
        c.set(context, param::PERSISTENCE, 0, persistent.into()).unwrap();
        let (batch, word) = c.spinner_with(if hog { wherry_accel::abi::flag::NO_PREEMPT } else { 0 });
        let running = c.submit(context, 0, batch).unwrap();
        let behind = c.nop(context, 0);
        let record = c.alloc(32);
        let blocked = c.batch(&[]).after(client_fence(context, 1)).completing_at(record);
        let blocked = c.submit(context, 1, blocked).unwrap();
        c.run_for(MS);
        c.destroy(context);
        if persistent {
            c.run_for(500 * MS);
            assert_eq!(c.state(running), FenceState::Pending);
            c.store(word, 1);
            c.finish(running);
            c.finish(behind);
            // Nobody can signal the client's own timeline any more: it does not hold work back for ever.
            c.finish(blocked);
        } else {
            for fence in [running, behind, blocked] {
                assert_eq!(c.wait(fence, 500 * MS), FenceState::Failed(Errno::Io), "within 500 ms");
            }
            assert_eq!((c.record(record).status, c.record(record).error), (status::FAILED, Errno::Io.number()));
        }
    }
}

pub fn a_failed_descriptor_ends_its_batch_and_not_the_next_one(c: &mut Client) {
    let context = c.create();
    let (word, record) = (c.alloc(8), c.alloc(32));
    for (bad, errno) in [
        (Descriptor::new(opcode::MOVE, END, word, 8), Errno::Fault),
        (Descriptor::new(opcode::MOVE, word, READ_ONLY, 8), Errno::Fault),
        (Descriptor::new(0x7f, 0, 0, 0), Errno::Invalid),
        (Descriptor::new(opcode::MOVE, word, word, 8).flagged(1 << 20), Errno::Invalid),
        (Descriptor::new(opcode::BATCH, word, 0, 1), Errno::Invalid),
        (Descriptor { context: 0xffff_0001, ..Descriptor::default() }, Errno::Invalid),
    ] {
        let batch = c.batch(&[add(word, 1), bad.completing_at(record), add(word, 100)]);
        let fence = c.submit(context, 0, batch).unwrap();
        let next = c.submit(context, 0, add(word, 1)).unwrap();
        assert_eq!(c.wait(fence, SECOND), FenceState::Failed(errno), "{bad:?}");
        c.finish(next);
        assert_eq!((c.record(record).status, c.record(record).error), (status::FAILED, errno.number()));
    }
    assert_eq!(c.load(word), 12);
    let list = Descriptor::new(opcode::BATCH, END - 64, 0, 2);
    let fence = c.submit(context, 0, list).unwrap();
    assert_eq!(c.wait(fence, SECOND), FenceState::Failed(Errno::Fault), "the second descriptor is not there");
    let ended = c.batch(&[Descriptor::new(opcode::END, 0, 0, 0), add(word, 100)]);
    let fence = c.submit(context, 0, ended).unwrap();
    c.finish(fence);
    assert_eq!(c.load(word), 12);
    let tail = c.batch(&[add(word, 1)]);
    let jump = c.batch(&[Descriptor::new(opcode::JUMP, tail.source, 0, 1), add(word, 100)]);
    let fence = c.submit(context, 0, jump).unwrap();
    c.finish(fence);
    assert_eq!(c.load(word), 13);
}

pub fn a_program_out_of_fuel_counts_as_a_hang(c: &mut Client) {
    // `goto -1`: for ever, or as long as there is fuel.
    let text = c.put(&[0x05, 0, 0xff, 0xff, 0, 0, 0, 0]);
    let context = c.create();
    let slot = first_of(3) as u32;
    for hangs in 1..=3 {
        let run = Descriptor::new(opcode::RUN, text, 0, 8).with(100_000, 0, 0);
        let fence = c.submit(context, slot, run).unwrap();
        assert_eq!(c.wait(fence, SECOND), FenceState::Failed(Errno::Time));
        assert_eq!(c.get(context, param::HANGS, 0, 0), Ok((0, hangs)));
    }
    assert_eq!(c.submit(context, slot, Descriptor::default()), Err(Errno::Cancelled));
}
