//! The ownership protocol, model-checked: the very `step` functions that the engine uses, in a world that loses, repeats
//! and delays every word, kills both processes at any point, and fails every write.
//!
//! `world.rs` is that world, `mutation.rs` are mistakes that the checker must find, `graph.rs` asks what an invariant
//! cannot: whether something can still be reached.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod graph;
mod mutation;
mod world;

use std::time::{Duration, Instant};

use stateright::{Checker, HasDiscoveries, Model as _, Property};
use wherry_migration::ownership::{Carriage, DestinationState, SourceState};

use mutation::Mutation;
use world::{Copy, Model, World};

const TWO: &str = "never two running";
const OLD: &str = "never an older copy after a newer one";
const LAST: &str = "never the last copy thrown away";
const INVARIANTS: [&str; 3] = [TWO, OLD, LAST];

fn properties(model: &Model) -> Vec<Property<Model>> {
    let mut properties = vec![
        Property::<Model>::always(TWO, |_, world| world.running() <= 1),
        Property::<Model>::always(OLD, |_, world| !world.rolled_back),
        Property::<Model>::always(LAST, |_, world| !world.wasted),
    ];
    if model.calm {
        properties.push(Property::<Model>::eventually("the VM moves", |_, world| moved(world)));
    }
    if model.witnesses {
        // What must be possible, or the invariants hold for the wrong reason.
        let mut sometimes = |name, condition| properties.push(Property::<Model>::sometimes(name, condition));
        sometimes("the VM moves", |_, w| moved(w));
        sometimes("taken back after the run was recorded, because the destination could not", |_, w| {
            w.source.copy == Copy::Runs && destination(w) == Some(DestinationState::Declined)
        });
        sometimes("in doubt", |_, w| source(w) == Some(SourceState::InDoubt));
        sometimes("resolved as the source's, and runs there", |_, w| w.source.resolved && w.source.copy == Copy::Runs);
        sometimes("the source dies after its run was recorded, restarts, and the destination runs", |m, w| {
            m.carriage == Carriage::PagesFollow
                || (source(w) == Some(SourceState::DiedCommitted)
                    && w.destinations[0].copy == Copy::Runs
                    && !w.destinations[0].resolved)
        });
        sometimes("the source dies before a run, and the ready destination is resolved", |m, w| {
            m.carriage == Carriage::PagesFollow
                || (source(w) == Some(SourceState::DiedIntended)
                    && w.destinations[0].copy == Copy::Runs
                    && w.destinations[0].resolved)
        });
        sometimes("the host boots the VM after both copies died and it was resolved", |_, w| w.booted);
    }
    properties
}

fn source(world: &World) -> Option<SourceState> {
    world.source.owner.as_ref().map(|owner| owner.state())
}

fn destination(world: &World) -> Option<DestinationState> {
    world.destinations[0].owner.as_ref().map(|owner| owner.state())
}

fn moved(world: &World) -> bool {
    world.source.copy == Copy::None && world.destinations.iter().any(|d| d.copy == Copy::Runs)
}

/// Long enough for a slow machine. A check that does not get through all states has checked nothing, and fails.
const PATIENCE: Duration = Duration::from_secs(300);

/// Visits every state of the model; the properties must hold in all of them.
fn check(model: Model) {
    let begun = Instant::now();
    let checker =
        model.checker().threads(2).timeout(PATIENCE).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    println!("{} states, depth {}, {:?}", checker.unique_state_count(), checker.max_depth(), begun.elapsed());
    assert!(begun.elapsed() < PATIENCE, "not all states could be visited");
    checker.assert_properties();
}

/// Visits states until an invariant is broken. Which one?
fn broken(model: Model) -> Option<&'static str> {
    let model = Model { witnesses: false, ..model };
    let checker =
        model.checker().threads(2).timeout(PATIENCE).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    INVARIANTS.into_iter().find(|name| checker.discovery(name).is_some())
}

fn every_copy_can_be_brought_to_run(model: Model) {
    let begun = Instant::now();
    let found = graph::explore(&model);
    println!("{} states, {} must not be stuck, {:?}", found.states, found.must, begun.elapsed());
    assert!(found.must > 0);
    for (actions, world) in &found.stuck {
        actions.iter().for_each(|action| println!("- {action:?}"));
        println!("{world:?}");
    }
    assert!(found.stuck.is_empty(), "a complete copy is left, and no way leads to a VM that runs");
}

#[test]
fn precopy_with_crashes_and_failed_writes_never_has_two_running_and_never_loses_the_last_copy() {
    check(Model { witnesses: true, ..Model::new(Carriage::Whole) });
}

#[test]
fn postcopy_with_crashes_and_failed_writes_never_has_two_running_and_never_loses_the_last_copy() {
    check(Model { witnesses: true, ..Model::new(Carriage::PagesFollow) });
}

#[test]
fn an_attempt_after_a_failed_one_is_not_confused_by_what_is_left_of_it() {
    check(Model { destinations: 2, crashes: 1, failures: 0, strangers: false, ..Model::new(Carriage::Whole) });
}

#[test]
fn without_an_operator_nothing_decides_what_is_in_doubt() {
    check(Model { operator: false, ..Model::new(Carriage::Whole) });
}

#[test]
fn a_complete_copy_can_always_be_brought_to_run() {
    every_copy_can_be_brought_to_run(Model::new(Carriage::Whole));
}

#[test]
fn a_complete_copy_can_always_be_brought_to_run_in_postcopy_too() {
    every_copy_can_be_brought_to_run(Model::new(Carriage::PagesFollow));
}

#[test]
fn when_nothing_goes_wrong_the_vm_moves() {
    for carriage in [Carriage::Whole, Carriage::PagesFollow] {
        check(Model { calm: true, operator: false, crashes: 0, failures: 0, ..Model::new(carriage) });
    }
}

#[test]
fn a_reboot_is_survived_by_durable_intents() {
    check(Model { reboots: true, ..Model::new(Carriage::Whole) });
}

#[test]
fn a_reboot_without_durable_intents_lets_a_host_that_boots_vms_by_itself_start_a_second_one() {
    let model = Model { reboots: true, durable_intents: false, ..Model::new(Carriage::Whole) };
    assert_eq!(broken(model), Some(TWO));
}

#[test]
fn an_operator_who_lies_breaks_it() {
    assert_eq!(broken(Model { operator_lies: true, ..Model::new(Carriage::Whole) }), Some(TWO));
}

#[test]
fn every_known_mistake_is_found() {
    let found: Vec<_> = Mutation::ALL
        .iter()
        .map(|&mutation| {
            let whole = broken(Model { mutation, ..Model::new(Carriage::Whole) });
            println!("{mutation:?}: {whole:?}");
            (mutation, whole)
        })
        .collect();
    let missed: Vec<_> = found.iter().filter(|(_, broken)| broken.is_none()).map(|(mutation, _)| mutation).collect();
    assert!(missed.is_empty(), "the checker did not notice {missed:?}");
}
