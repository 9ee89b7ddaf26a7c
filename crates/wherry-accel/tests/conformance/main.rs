//! The conformance list of contexts with engine maps: every item as it is, and again with moves between its calls.
//!
//! - [`client`]: a client, and moving the device under it. [`transport`]: its calls, of the library or over a socket.
//! - [`maps`], [`balancing`], [`fairness`], [`faults`], [`bonds`], [`parallel`], [`params`]: the list.
//!
//! Each item runs on virtual time, so it takes the same course every time. `moved` runs it with a move before a seeded
//! sample of its calls, to hosts with one worker, fewer, more, and in another order, and once with a move before every
//! call. `socket` runs it before the device as a PCI function over vfio-user, and `socket_moved` with a sample of moves there, by
//! the states of that protocol. `cargo xtask conformance` moves it before each single call in turn, every time in a run of its own
//! (`WHERRY_ACCEL_MOVES=each`: to one kind of host, by turns; `all`: to each kind). `WHERRY_ACCEL_SEED` chooses another sample.
//!
//! Which test proves which item of the list:
//!
//! | item | tests |
//! |---|---|
//! | *invalid-engines* | `invalid_engines_are_refused_by_size_class_and_address` |
//! | *none* | `a_map_without_slots_takes_no_work` |
//! | *execute-one* | `only_the_one_live_slot_of_64_takes_work_and_on_its_class` |
//! | *execute-one-for-all* | `one_engine_may_stand_in_all_64_slots` |
//! | *execute-all-for-one* | `every_engine_runs_in_a_map_of_its_own` |
//! | *independent* | `slots_of_one_engine_are_timelines_of_their_own` |
//! | *idempotent* | `a_map_reads_back_as_it_was_set` |
//! | submission to what is not there | `a_slot_beyond_the_map_a_closed_context_and_a_lost_device_take_no_work` |
//! | *invalid-balancer*, *invalid-bonds* | `invalid_balancers_are_refused`, `invalid_bonds_are_refused` |
//! | *individual* | `siblings_in_any_order_each_run_on_their_own_engine` |
//! | *indices* | `every_virtual_slot_of_many_runs` |
//! | *busy* | `running_and_queued_work_both_report_their_class` |
//! | *full*, *pulse*, *late* | `as_many_spinners_as_siblings_keep_all_of_them_busy`, `a_pulse_beside_the_spinners_still_leaves_all_engines_busy`, `spinners_that_are_ready_late_still_spread_over_all_engines` |
//! | choice by mask, affinity | `a_virtual_engine_passes_over_an_occupied_sibling`, `an_execution_mask_limits_the_choice` |
//! | *fairslice*, *sliced*, *hog* | `one_spinner_more_than_engines_shares_them_fairly`, `work_behind_a_spinner_is_sliced_in`, `others_finish_beside_a_job_that_cannot_be_preempted` |
//! | *semaphore*, *waits* | `waiting_for_memory_gives_the_engine_away`, `more_waiters_than_engines_do_not_keep_out_who_they_wait_for` |
//! | *smoke*, *nop*, *sequential* | `random_bursts_on_128_virtual_engines_all_complete`, `empty_requests_complete_on_every_virtual_engine`, `a_chain_of_requests_over_virtual_engines_keeps_its_order` |
//! | *hang*, heartbeats, bans | `hung_jobs_end_with_eio_and_later_work_goes_on`, `a_hung_job_alone_is_found_by_heartbeats`, `a_long_job_that_can_be_preempted_is_no_hang`, `three_hangs_ban_a_context_and_no_other`, `a_program_out_of_fuel_counts_as_a_hang` |
//! | *persistence* | `work_of_a_destroyed_context_ends_unless_it_is_persistent` |
//! | bonds: *chain*, *semaphore* | `a_bonded_request_never_runs_before_its_master`, `a_bonded_pair_that_waits_for_each_other_runs` |
//! | bonds: *pair*, *dual*, *sync*, *cork* | `a_pair_runs_on_two_engines`, `two_pairs_run_beside_each_other`, `a_pair_that_must_run_together_does_not_deadlock`, `a_corked_master_keeps_all_siblings_idle_and_then_only_the_bonded_one_runs` |
//! | *false-hang*, *true-hang* | `a_pair_that_waits_for_a_blocked_master_is_not_declared_hung`, `a_master_that_hangs_does_not_take_its_pair_with_it` |
//! | parallel: plain, out-fence | `invalid_parallel_slots_are_refused`, `a_parallel_slot_runs_all_its_batches`, `the_fence_of_a_parallel_request_is_one` |
//! | parallel: in-fence, submit-fence | `a_parallel_request_waits_for_its_in_fence`, `a_parallel_request_starts_with_its_submit_fence` |
//! | parallel: many contexts, *ordering*, *balancer* | `many_contexts_run_parallel_requests`, `a_spinner_on_one_engine_holds_all_lanes_back`, `a_grid_of_siblings_runs_as_many_at_once_as_it_has_columns` |
//! | clone: *invalid*, *engines*, *flags*, *scheduler*, *address space* | `invalid_clones_are_refused`, `a_cloned_map_equals_its_source_and_a_later_set_wins`, `cloned_flags_and_persistence_are_those_of_the_source`, `a_cloned_priority_is_that_of_the_source`, `a_cloned_address_space_is_shared`, `a_cloned_timeline_orders_both_contexts`, `virtual_slots_are_copied_and_not_shared` |
//! | parameters, size rules | `scalars_have_their_size_range_and_privilege`, `sizes_are_negotiated`, `shares_are_named_by_slot_or_by_engine`, `unknown_contexts_and_parameters_are_refused_both_ways` |
//! | priorities, tunables | `a_higher_priority_goes_first_and_virtual_goes_before_native`, `a_share_shortens_the_slices_of_a_slot`, `what_is_tuned_for_an_engine_holds_for_that_engine_alone` |

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod balancing;
mod bonds;
mod client;
mod fairness;
mod faults;
mod maps;
mod parallel;
mod params;
mod transport;

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use client::{Client, HOSTS, Plan, Way};

/// Moves of a sample, each in a run of its own.
const SAMPLE: u64 = 4;

/// Calls between two moves of a run over a socket that has many, and moves of its sample.
const OFTEN: u64 = 11;
const SOCKET_SAMPLE: u64 = 1;

fn once(item: fn(&mut Client), way: Way, plan: Plan) -> Client {
    let mut client = Client::new(way, plan);
    item(&mut client);
    client
}

/// Runs an item with moves.
fn moved(name: &str, item: fn(&mut Client), way: Way) {
    let calls = once(item, way, Plan::Never).calls;
    let at = |call: u64, host: u64| {
        let there = HOSTS[host as usize % HOSTS.len()];
        println!("{name}: a move before call {call} of {calls}, to {there:?}");
        let client = once(item, way, Plan::Before(BTreeMap::from([(call, there)])));
        assert_eq!(client.moves, 1, "{name}: call {call} of {calls} was never made");
    };
    let hosts = match std::env::var("WHERRY_ACCEL_MOVES").as_deref() {
        Ok("all") => HOSTS.len() as u64,
        Ok("each") => 1,
        _ => 0,
    };
    for call in 0..calls {
        (0..hosts).for_each(|host| at(call, call + host));
    }
    if hosts == 0 {
        let seed: u64 = std::env::var("WHERRY_ACCEL_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0);
        let sample = if way == Way::Library { SAMPLE } else { SOCKET_SAMPLE };
        for number in 0..sample {
            let mut hasher = DefaultHasher::new();
            (name, seed, number, way == Way::Socket).hash(&mut hasher);
            at(hasher.finish() % calls, number);
        }
    }
    let often = if way == Way::Library { 1 } else { OFTEN };
    println!("{name}: a move before every {often}. call");
    assert!(once(item, way, Plan::Every(often)).moves > 0);
}

macro_rules! conformance {
    ($($module:ident: $($item:ident)*;)*) => {
        mod plain {
            $($(#[test]
            fn $item() {
                super::once(super::$module::$item, super::Way::Library, super::Plan::Never);
            })*)*
        }
        mod socket {
            $($(#[test]
            fn $item() {
                super::once(super::$module::$item, super::Way::Socket, super::Plan::Never);
            })*)*
        }
        mod socket_moved {
            $($(#[test]
            fn $item() {
                super::moved(stringify!($item), super::$module::$item, super::Way::Socket);
            })*)*
        }
        mod moved {
            $($(#[test]
            fn $item() {
                super::moved(stringify!($item), super::$module::$item, super::Way::Library);
            })*)*
        }
    };
}

conformance! {
    maps:
        invalid_engines_are_refused_by_size_class_and_address
        a_map_without_slots_takes_no_work
        only_the_one_live_slot_of_64_takes_work_and_on_its_class
        one_engine_may_stand_in_all_64_slots
        every_engine_runs_in_a_map_of_its_own
        slots_of_one_engine_are_timelines_of_their_own
        a_map_reads_back_as_it_was_set
        a_slot_beyond_the_map_a_closed_context_and_a_lost_device_take_no_work;
    balancing:
        invalid_balancers_are_refused
        siblings_in_any_order_each_run_on_their_own_engine
        every_virtual_slot_of_many_runs
        running_and_queued_work_both_report_their_class
        as_many_spinners_as_siblings_keep_all_of_them_busy
        a_pulse_beside_the_spinners_still_leaves_all_engines_busy
        spinners_that_are_ready_late_still_spread_over_all_engines
        a_virtual_engine_passes_over_an_occupied_sibling
        an_execution_mask_limits_the_choice
        empty_requests_complete_on_every_virtual_engine
        a_chain_of_requests_over_virtual_engines_keeps_its_order
        random_bursts_on_128_virtual_engines_all_complete;
    fairness:
        one_spinner_more_than_engines_shares_them_fairly
        work_behind_a_spinner_is_sliced_in
        others_finish_beside_a_job_that_cannot_be_preempted
        waiting_for_memory_gives_the_engine_away
        more_waiters_than_engines_do_not_keep_out_who_they_wait_for
        a_higher_priority_goes_first_and_virtual_goes_before_native
        a_share_shortens_the_slices_of_a_slot
        what_is_tuned_for_an_engine_holds_for_that_engine_alone;
    faults:
        hung_jobs_end_with_eio_and_later_work_goes_on
        a_hung_job_alone_is_found_by_heartbeats
        a_long_job_that_can_be_preempted_is_no_hang
        three_hangs_ban_a_context_and_no_other
        work_of_a_destroyed_context_ends_unless_it_is_persistent
        a_failed_descriptor_ends_its_batch_and_not_the_next_one
        a_program_out_of_fuel_counts_as_a_hang;
    bonds:
        invalid_bonds_are_refused
        a_bonded_request_never_runs_before_its_master
        a_bonded_pair_that_waits_for_each_other_runs
        a_pair_runs_on_two_engines
        two_pairs_run_beside_each_other
        a_pair_that_must_run_together_does_not_deadlock
        a_corked_master_keeps_all_siblings_idle_and_then_only_the_bonded_one_runs
        a_pair_that_waits_for_a_blocked_master_is_not_declared_hung
        a_master_that_hangs_does_not_take_its_pair_with_it;
    parallel:
        invalid_parallel_slots_are_refused
        a_parallel_slot_runs_all_its_batches
        the_fence_of_a_parallel_request_is_one
        a_parallel_request_waits_for_its_in_fence
        a_parallel_request_starts_with_its_submit_fence
        many_contexts_run_parallel_requests
        a_spinner_on_one_engine_holds_all_lanes_back
        a_grid_of_siblings_runs_as_many_at_once_as_it_has_columns;
    params:
        invalid_clones_are_refused
        a_cloned_map_equals_its_source_and_a_later_set_wins
        cloned_flags_and_persistence_are_those_of_the_source
        a_cloned_priority_is_that_of_the_source
        a_cloned_address_space_is_shared
        a_cloned_timeline_orders_both_contexts
        virtual_slots_are_copied_and_not_shared
        scalars_have_their_size_range_and_privilege
        sizes_are_negotiated
        shares_are_named_by_slot_or_by_engine
        unknown_contexts_and_parameters_are_refused_both_ways;
}

#[test]
fn every_kind_of_host_is_moved_to_with_work_under_way() {
    // What the moves are worth: one worker runs two spinners' engines by turns, and a move finds them half-way.
    for there in HOSTS {
        let mut client = Client::new(Way::Library, Plan::Before(BTreeMap::from([(4, there)])));
        let context = client.create();
        let (a, word_a) = client.spin(context, 0);
        let (b, word_b) = client.spin(context, 1);
        client.run_for(client::MS);
        assert_eq!(client.moves, 0);
        client.run_for(client::MS);
        assert_eq!(client.moves, 1);
        let occupied = client.device.engines().iter().filter(|engine| engine.occupied).count();
        assert_eq!(occupied, 2, "{there:?}");
        client.store(word_a, 1);
        client.store(word_b, 1);
        client.finish(a);
        client.finish(b);
    }
}
