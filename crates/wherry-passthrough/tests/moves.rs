//! Stopping, saving, loading and running: one function and several.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::time::{Duration, Instant};

use support::{FakeOwner, Meeting, Rig};
use wherry_passthrough::{Crew, Gathering, State};
use wherry_state::{Saved, Section, StateUnit};

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
    let section = section(&*here.function);

    let there = Rig::new(FakeOwner::new("vfio-user:b"));
    there.function.restore(&section).unwrap();
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
    assert!(there.function.restore(&section).unwrap_err().to_string().contains("runs already"));
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
    rig.owner.script().given = 0;
    rig.function.finish_stop(rig.deadline()).unwrap();
    section(&*rig.function);
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
    rigs.iter().for_each(|rig| assert!(!section(&*rig.function).bytes.is_empty()));
    rigs.iter().for_each(|rig| rig.function.start().unwrap());
    assert!(rigs.iter().all(|rig| rig.owner.script().state == Some(State::Running)));
}

#[test]
fn a_state_without_end_is_given_up_by_name_and_the_device_runs_on() {
    let rig = Rig::new(FakeOwner::new("vfio-user:endless"));
    rig.function.start().unwrap();
    rig.owner.script().endless = true;
    let error = rig.function.finish_stop(Instant::now() + Duration::from_millis(50)).unwrap_err().to_string();
    assert!(error.contains("vfio-user:endless"), "{error}");
    assert!(rig.function.save().is_err());
    rig.function.start().unwrap();
    assert_eq!(rig.owner.script().state, Some(State::Running));
}

#[test]
fn a_state_that_a_device_does_not_take_is_told_before_the_machine_is_ready() {
    let here = Rig::new(FakeOwner::new("vfio-user:a"));
    here.function.start().unwrap();
    here.function.finish_stop(here.deadline()).unwrap();
    let section = section(&*here.function);
    let crew = Crew::new();
    let bad = FakeOwner::new("vfio-user:bad");
    bad.script.lock().unwrap().refuses_load = true;
    let rigs = [Rig::in_crew(FakeOwner::new("vfio-user:good"), 0, crew.clone()), Rig::in_crew(bad, 1, crew.clone())];
    for rig in &rigs {
        let section = Section { instance: rig.function.id().instance, ..section.clone() };
        rig.function.restore(&section).unwrap();
    }
    let gathering = Gathering::new(crew);
    let all = self::section(&gathering);
    let error = gathering.restore(&all).unwrap_err().to_string();
    assert!(error.contains("vfio-user:bad") && !error.contains("good"), "{error}");
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
    let good = section(&*here.function);
    let refused = |change: &dyn Fn(&mut Vec<u8>), owner: FakeOwner| {
        let mut section = good.clone();
        change(&mut section.bytes);
        Rig::new(owner).function.restore(&section).unwrap_err().to_string()
    };
    let other = FakeOwner::new("vfio-user:other");
    other.script.lock().unwrap().config[2] = 0x77;
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
    let section = section(&*here.function);
    let slow = FakeOwner::new("vfio-user:slow");
    slow.script.lock().unwrap().load_time = Duration::from_millis(300);
    let there = Rig::new(slow);
    there.function.restore(&section).unwrap();
    let gathering = Gathering::within(there.crew.clone(), Duration::from_millis(10));
    let error = gathering.restore(&self::section(&gathering)).unwrap_err().to_string();
    assert!(error.contains("vfio-user:slow did not take its state"), "{error}");
}
