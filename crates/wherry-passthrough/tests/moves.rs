//! Stopping, saving, loading and running: one function and several.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::time::{Duration, Instant};

use support::{FakeOwner, Meeting, Rig};
use wherry_memory::DirtySource;
use wherry_passthrough::{Crew, Function, Gathering, State};
use wherry_state::{Piece, Saved, SavedState, Section, StateStream, StateUnit};

/// What can be read of its stream now.
fn pieces(function: &Function) -> Vec<Piece> {
    std::iter::from_fn(|| Some(function.read().unwrap()).filter(|piece| !piece.bytes.is_empty())).collect()
}

/// The state of a function at rest: its stream, and its section.
fn state(function: &Function) -> (Vec<Piece>, Section) {
    (pieces(function), section(function))
}

/// Gives a function the state of another one.
fn restore(function: &Function, (pieces, section): &(Vec<Piece>, Section)) {
    pieces.iter().for_each(|piece| function.write(piece.clone()).unwrap());
    function.restore(section).unwrap();
}

fn section(unit: &dyn StateUnit) -> Section {
    match unit.save().unwrap() {
        Saved::Section(section) => section,
        Saved::Nothing => panic!("no state"),
    }
}

#[test]
fn a_function_goes_on_elsewhere_with_what_was_pending() {
    let here = Rig::new(FakeOwner::new("vfio-user:a"));
    here.function.start().unwrap();
    here.open_msix();
    here.set_entry(1, true);
    here.owner.raise(1);
    here.function.begin_stop().unwrap();
    here.function.finish_stop(here.deadline()).unwrap();
    assert_eq!(here.owner.script().state, Some(State::StopCopy));
    assert_eq!(here.delivered(0), None, "nothing is attached");
    // The last word of a device that came to rest.
    here.owner.raise(0);
    let state = state(&here.function);

    let there = Rig::new(FakeOwner::new("vfio-user:b"));
    restore(&there.function, &state);
    let gathering = Gathering::new(there.crew.clone());
    let all = Section { bytes: vec![8, 1], ..self::section(&gathering) };
    gathering.restore(&all).unwrap();
    assert_eq!(there.owner.script().loaded, vec![7; 3_000_000]);
    assert_eq!(there.owner.script().state, Some(State::Stop));
    let asked = there.owner.take_asked();
    assert!(asked.contains(&"write config at 0x4: [6, 0]".into()), "{asked:?}");
    assert!(asked.contains(&"signal Msix from 0: 4".into()), "{asked:?}");
    assert_eq!(there.delivered(0), None, "local APICs are not restored yet");
    there.function.start().unwrap();
    assert_eq!(there.owner.script().state, Some(State::Running));
    assert_eq!((there.delivered(0), there.delivered(2)), (Some(1), Some(0)));
    there.set_entry(1, false);
    assert_eq!(there.delivered(1), Some(1), "it was masked and pending");
    assert!(there.function.restore(&state.1).unwrap_err().to_string().contains("runs already"));
    assert!(there.function.write(state.0[0].clone()).is_err());
}

#[test]
fn a_stop_that_is_undone_leaves_it_running_with_its_interrupts() {
    let rig = Rig::new(FakeOwner::new("vfio-user:a"));
    rig.function.start().unwrap();
    rig.open_msix();
    rig.function.finish_stop(rig.deadline()).unwrap();
    rig.owner.raise(0);
    rig.function.start().unwrap();
    assert_eq!(rig.owner.script().state, Some(State::Running));
    assert_eq!(rig.delivered(0), Some(1));
    // And once more, all the way.
    rig.function.finish_stop(rig.deadline()).unwrap();
    assert!(rig.function.save().is_err(), "its stream was not read");
    assert_eq!(state(&rig.function).0.iter().map(|piece| piece.bytes.len()).sum::<usize>(), 3_000_000);
}

#[test]
fn several_functions_stop_side_by_side() {
    let (crew, meeting) = (Crew::new(), Meeting::of(3));
    let rigs: Vec<_> = (0..3)
        .map(|n| {
            let mut owner = FakeOwner::new(&format!("vfio-user:{n}"));
            owner.meeting = Some(meeting.clone());
            Rig::in_crew(owner, n, crew.clone())
        })
        .collect();
    rigs.iter().for_each(|rig| rig.function.start().unwrap());
    for rig in &rigs {
        rig.function.finish_stop(rig.deadline()).unwrap();
    }
    rigs.iter().for_each(|rig| assert!(!state(&rig.function).1.bytes.is_empty()));
    rigs.iter().for_each(|rig| rig.function.start().unwrap());
    assert!(rigs.iter().all(|rig| rig.owner.script().state == Some(State::Running)));
}

#[test]
fn a_state_without_end_is_given_up_by_name_and_the_device_runs_on() {
    let rig = Rig::new(FakeOwner::new("vfio-user:endless"));
    rig.function.start().unwrap();
    rig.owner.script().endless = true;
    rig.function.finish_stop(Instant::now() + Duration::from_millis(50)).unwrap();
    let error = std::iter::repeat_with(|| rig.function.read()).find_map(Result::err).unwrap().to_string();
    assert!(error.contains("vfio-user:endless has given"), "{error}");
    assert!(rig.function.save().is_err());
    rig.function.start().unwrap();
    assert_eq!(rig.owner.script().state, Some(State::Running));
}

#[test]
fn a_state_that_a_device_does_not_take_is_told_before_the_machine_is_ready() {
    let here = Rig::new(FakeOwner::new("vfio-user:a"));
    here.function.start().unwrap();
    here.function.finish_stop(here.deadline()).unwrap();
    let (pieces, section) = state(&here.function);
    let crew = Crew::new();
    let bad = FakeOwner::new("vfio-user:bad");
    bad.script.lock().unwrap().refuses_load = true;
    let rigs = [Rig::in_crew(FakeOwner::new("vfio-user:good"), 0, crew.clone()), Rig::in_crew(bad, 1, crew.clone())];
    for rig in &rigs {
        let section = Section { instance: StateUnit::id(&*rig.function).instance, ..section.clone() };
        restore(&rig.function, &(pieces.clone(), section));
    }
    let gathering = Gathering::new(crew);
    let all = self::section(&gathering);
    let error = gathering.restore(&all).unwrap_err().to_string();
    assert!(error.contains("vfio-user:bad") && !error.contains("good"), "{error}");
}

#[test]
fn a_device_that_dies_at_rest_is_named_when_its_machine_has_run_again() {
    let rig = Rig::new(early_owner("vfio-user:dead", 1000));
    rig.function.start().unwrap();
    rig.function.finish_stop(rig.deadline()).unwrap();
    rig.owner.script().gone = true;
    rig.function.start().unwrap();
    let error = rig.function.read().unwrap_err().to_string();
    assert!(error.contains("vfio-user:dead has gone"), "{error}");
    assert!(rig.function.finish_stop(rig.deadline()).is_err());
}

#[test]
fn a_device_that_dies_at_the_stop_is_named_and_so_is_one_without_migration() {
    let rig = Rig::new(FakeOwner::new("vfio-user:dead"));
    rig.function.start().unwrap();
    rig.owner.script().gone = true;
    let error = rig.function.finish_stop(rig.deadline()).unwrap_err().to_string();
    assert!(error.contains("vfio-user:dead"), "{error}");
    rig.function.start().unwrap();
    assert!(rig.function.blocker().unwrap().contains("vfio-user:dead"));

    let mut owner = FakeOwner::new("vfio-user:stays");
    owner.facts.migration = None;
    let rig = Rig::new(owner);
    rig.function.start().unwrap();
    assert!(rig.function.drain(rig.deadline()).unwrap_err().to_string().contains("vfio-user:stays"));
}

#[test]
fn state_of_another_function_or_of_nothing_is_refused() {
    let here = Rig::new(FakeOwner::new("vfio-user:a"));
    here.function.finish_stop(here.deadline()).unwrap();
    let (pieces, good) = state(&here.function);
    let refused = |change: &dyn Fn(&mut Vec<u8>), owner: FakeOwner| {
        let mut section = good.clone();
        change(&mut section.bytes);
        let rig = Rig::new(owner);
        pieces.iter().for_each(|piece| rig.function.write(piece.clone()).unwrap());
        rig.function.restore(&section).unwrap_err().to_string()
    };
    let mut other = FakeOwner::new("vfio-user:other");
    other.facts.config[2] = 0x77;
    assert!(refused(&|_| (), other).contains("0x2"), "another device ID");
    let mut no_msix = FakeOwner::new("vfio-user:less");
    no_msix.facts.msix = 0;
    assert!(!refused(&|_| (), no_msix).is_empty());
    assert!(!refused(&|bytes| bytes.truncate(7), FakeOwner::new("vfio-user:cut")).is_empty());
}

#[test]
fn a_device_that_does_not_run_again_is_lost_and_the_machine_starts_without_it() {
    let rig = Rig::new(FakeOwner::new("vfio-user:lazy"));
    rig.function.start().unwrap();
    rig.function.finish_stop(rig.deadline()).unwrap();
    rig.owner.script().refuses_run = true;
    rig.function.start().unwrap();
    assert!(rig.function.blocker().unwrap().contains("vfio-user:lazy"));
    rig.owner.take_asked();
    rig.switch_on(false);
    let mut data = [0; 4];
    rig.bus.read(support::BAR0, &mut data);
    assert_eq!((data, rig.owner.take_asked().len()), ([0xff; 4], 0), "it is not asked any more");
}

#[test]
fn a_device_that_is_slow_to_take_its_state_is_named_before_the_machine_is_ready() {
    let here = Rig::new(FakeOwner::new("vfio-user:a"));
    here.function.finish_stop(here.deadline()).unwrap();
    let state = state(&here.function);
    let slow = FakeOwner::new("vfio-user:slow");
    slow.script.lock().unwrap().load_time = Duration::from_millis(300);
    let there = Rig::new(slow);
    restore(&there.function, &state);
    let gathering = Gathering::within(there.crew.clone(), Duration::from_millis(10));
    let error = gathering.restore(&self::section(&gathering)).unwrap_err().to_string();
    assert!(error.contains("vfio-user:slow did not take its state"), "{error}");
}

fn early_owner(name: &str, early: usize) -> FakeOwner {
    let mut owner = FakeOwner::new(name);
    owner.facts.migration = Some(wherry_passthrough::MigrationFacts { pre_copy: true, p2p: false });
    owner.script.lock().unwrap().early = early;
    owner
}

#[test]
fn what_a_device_gives_while_it_runs_goes_before_the_stop() {
    let here = Rig::new(early_owner("vfio-user:a", 2_000_000));
    here.function.start().unwrap();
    here.owner.script().estimate = Some(1_000_000);
    assert_eq!(here.function.expected().bytes, Some(1_000_000));
    let there = Rig::new(FakeOwner::new("vfio-user:b"));
    let early = pieces(&here.function);
    assert_eq!(here.owner.script().state, Some(State::PreCopy));
    early.iter().for_each(|piece| there.function.write(piece.clone()).unwrap());
    there.function.flush().unwrap();
    assert_eq!(there.owner.script().loaded.len(), 2_000_000);
    // It may have more later.
    here.owner.script().early = 2_500_000;
    pieces(&here.function).iter().for_each(|piece| there.function.write(piece.clone()).unwrap());
    here.function.finish_stop(here.deadline()).unwrap();
    restore(&there.function, &state(&here.function));
    let gathering = Gathering::new(there.crew.clone());
    gathering.restore(&section(&gathering)).unwrap();
    assert_eq!(there.owner.script().loaded, vec![7; 3_000_000]);
    let (given, taken) = (here.function.times(), there.function.times());
    assert_eq!((given.early, given.bytes, taken.bytes), (2_500_000, 3_000_000, 3_000_000));
    there.function.start().unwrap();
    assert_eq!(there.function.expected().bytes, Some(3_000_000), "as it came");
}

#[test]
fn a_stream_that_is_begun_anew_resets_who_had_begun_to_take_it() {
    let here = Rig::new(early_owner("vfio-user:a", 2_000_000));
    here.function.start().unwrap();
    let there = Rig::new(FakeOwner::new("vfio-user:b"));
    pieces(&here.function).iter().for_each(|piece| there.function.write(piece.clone()).unwrap());
    // A stop after which the machine ran on.
    here.function.finish_stop(here.deadline()).unwrap();
    here.function.start().unwrap();
    assert_eq!(here.owner.script().state, Some(State::Running));
    let again = pieces(&here.function);
    assert_eq!((again[0].offset, here.owner.script().state), (0, Some(State::PreCopy)));
    again.iter().for_each(|piece| there.function.write(piece.clone()).unwrap());
    here.function.finish_stop(here.deadline()).unwrap();
    restore(&there.function, &state(&here.function));
    let gathering = Gathering::new(there.crew.clone());
    gathering.restore(&section(&gathering)).unwrap();
    assert_eq!(there.owner.script().loaded, vec![7; 3_000_000]);
    assert!(there.owner.take_asked().contains(&"reset".into()));
}

#[test]
fn a_move_that_is_given_up_before_the_stop_leaves_the_device_running() {
    let rig = Rig::new(early_owner("vfio-user:a", 2_000_000));
    rig.function.start().unwrap();
    rig.function.end();
    assert!(!rig.owner.take_asked().contains(&"Running".into()), "nothing was begun");
    pieces(&rig.function);
    rig.function.end();
    assert_eq!(rig.owner.script().state, Some(State::Running));
    // The next move gives nothing early, and says so.
    rig.function.finish_stop(rig.deadline()).unwrap();
    state(&rig.function);
    assert_eq!((rig.function.times().early, rig.function.times().bytes), (0, 3_000_000));
}

#[test]
fn a_stream_with_a_hole_or_without_its_end_or_for_a_dead_device_is_refused() {
    let here = Rig::new(FakeOwner::new("vfio-user:a"));
    here.function.finish_stop(here.deadline()).unwrap();
    let (pieces, section) = state(&here.function);
    let there = Rig::new(FakeOwner::new("vfio-user:b"));
    let error = there.function.write(pieces[1].clone()).unwrap_err().to_string();
    assert!(error.contains("from byte 1048576 on, and 0 are there"), "{error}");
    there.function.write(pieces[0].clone()).unwrap();
    assert!(there.function.write(pieces[2].clone()).is_err());
    let error = there.function.restore(&section).unwrap_err().to_string();
    assert!(error.contains("1048576 bytes of the device's state came, and 3000000 were given"), "{error}");

    let dead = Rig::new(FakeOwner::new("vfio-user:dead"));
    dead.owner.script().gone = true;
    let taken = dead.function.write(pieces[0].clone()).and_then(|()| dead.function.flush());
    let error = taken.unwrap_err().to_string();
    assert!(error.contains("vfio-user:dead"), "{error}");
}

#[test]
fn a_device_that_is_not_at_rest_when_it_says_so_is_named() {
    let rig = Rig::new(FakeOwner::new("vfio-user:late"));
    rig.function.start().unwrap();
    rig.function.log().start().unwrap();
    rig.owner.script().log = vec![0b101];
    rig.function.finish_stop(rig.deadline()).unwrap();
    let stream = pieces(&rig.function);
    let error = rig.function.save().unwrap_err().to_string();
    assert!(!stream.is_empty() && error.contains("vfio-user:late wrote to 2 pages after"), "{error}");
    rig.function.start().unwrap();
    assert_eq!(rig.owner.script().state, Some(State::Running));

    let rig = Rig::new(FakeOwner::new("vfio-user:stuck"));
    rig.function.start().unwrap();
    rig.owner.script().config[0x6a] = 0x20;
    let error = rig.function.finish_stop(rig.deadline()).unwrap_err().to_string();
    assert!(error.contains("vfio-user:stuck has transactions pending"), "{error}");
    rig.function.start().unwrap();
    rig.owner.script().config[0x6a] = 0;
    rig.function.finish_stop(rig.deadline()).unwrap();
}

#[test]
fn state_of_schema_1_is_taken_from_its_section() {
    let here = Rig::new(FakeOwner::new("vfio-user:a"));
    here.function.finish_stop(here.deadline()).unwrap();
    let (_, section) = state(&here.function);
    let mut saved = wherry_passthrough::saved::SavedPassthrough::from_section(&section).unwrap();
    (saved.device, saved.streamed) = (vec![7; 3_000_000], 0);
    let old = Section { schema: 1, ..saved.to_section(&StateUnit::id(&*here.function)) };
    let there = Rig::new(FakeOwner::new("vfio-user:b"));
    there.function.restore(&old).unwrap();
    let gathering = Gathering::new(there.crew.clone());
    gathering.restore(&self::section(&gathering)).unwrap();
    assert_eq!(there.owner.script().loaded, vec![7; 3_000_000]);
}

#[test]
fn devices_that_talk_to_each_other_are_quiet_before_one_stops_and_until_all_can_run() {
    let crew = Crew::new();
    let rig = |n, p2p, pre_copy| {
        let mut owner = early_owner(&format!("vfio-user:{n}"), 1000);
        owner.facts.migration = Some(wherry_passthrough::MigrationFacts { pre_copy, p2p });
        Rig::in_crew(owner, n, crew.clone())
    };
    let rigs = [rig(0, true, true), rig(1, true, false), rig(2, false, false)];
    rigs.iter().for_each(|rig| rig.function.start().unwrap());
    pieces(&rigs[0].function);
    let states = |rig: &Rig| {
        let asked = rig.owner.take_asked();
        asked.into_iter().filter(|what| ["PreCopy", "Running", "Stop"].iter().any(|s| what.starts_with(s))).collect()
    };
    rigs.iter().for_each(|rig| rig.function.finish_stop(rig.deadline()).unwrap());
    let stops: Vec<Vec<String>> = rigs.iter().map(states).collect();
    assert_eq!(stops, [vec!["PreCopy", "PreCopyP2p", "StopCopy"], vec!["RunningP2p", "StopCopy"], vec!["StopCopy"]]);
    rigs.iter().for_each(|rig| rig.function.start().unwrap());
    let starts: Vec<Vec<String>> = rigs.iter().map(states).collect();
    assert_eq!(starts, [vec!["RunningP2p", "Running"], vec!["RunningP2p", "Running"], vec!["Running"]]);
}

#[test]
fn a_device_that_comes_while_others_run_leaves_them_alone_and_stops_with_them() {
    let crew = Crew::new();
    let rig = |n: u32| {
        let mut owner = FakeOwner::new(&format!("vfio-user:{n}"));
        owner.facts.migration = Some(wherry_passthrough::MigrationFacts { pre_copy: false, p2p: true });
        Rig::in_crew(owner, n, crew.clone())
    };
    let first = rig(0);
    first.function.start().unwrap();
    first.owner.take_asked();
    let second = rig(1);
    second.function.start().unwrap();
    assert!(first.owner.take_asked().is_empty());
    for rig in [&first, &second] {
        rig.function.finish_stop(rig.deadline()).unwrap();
        assert_eq!(rig.owner.script().state, Some(State::StopCopy));
        assert!(!state(&rig.function).1.bytes.is_empty());
    }
    for rig in [&first, &second] {
        rig.function.start().unwrap();
        assert_eq!(rig.owner.script().state, Some(State::Running));
    }
}
