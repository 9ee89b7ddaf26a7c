//! A VM that was given away while one of the two ends died: who says so, and how it is decided.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::process::{Child, Output, Stdio};

use support::{Place, Vm, assert_alive, kvm, stderr, wait_for};

const ID: &str = "00112233445566778899aabbccddeeff";

/// A migration of which one end is held at a point.
struct Held {
    place: Place,
    here: Vm,
    there: Vm,
    migrate: Child,
    point: &'static str,
}

impl Held {
    fn at(point: &'static str) -> Self {
        let place = Place::new();
        let points = place.path("points");
        std::fs::create_dir(&points).unwrap();
        let environment = [("WHERRY_TEST_PAUSE_AT", point), ("WHERRY_TEST_PAUSE_DIR", points.to_str().unwrap())];
        let (at_source, at_destination): (&[_], &[_]) =
            if point.starts_with("source") { (&environment, &[]) } else { (&[], &environment) };
        let here = place.run_with("0", &["--id", ID], at_source);
        let (there, address) = place.receive_with("1", &[], at_destination);
        let api = place.path("0");
        let migrate = place
            .command(&["migrate", "--to", &address, "--api", api.to_str().unwrap()])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let held = Self { place, here, there, migrate, point };
        wait_for(point, || held.place.path(&format!("points/{point}")).exists().then_some(()));
        held
    }

    fn let_go(&self) {
        std::fs::write(self.place.path(&format!("points/{}.go", self.point)), "").unwrap();
    }
}

fn finish(migrate: Child) -> Output {
    migrate.wait_with_output().unwrap()
}

#[test]
fn a_source_in_doubt_says_so_refuses_to_stop_and_takes_the_vm_back_when_told() {
    if !kvm("a_source_in_doubt_says_so_refuses_to_stop_and_takes_the_vm_back_when_told") {
        return;
    }
    let mut held = Held::at("source-recorded");
    held.there.kill();
    held.let_go();
    let output = finish(held.migrate);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("in doubt"), "{}", stderr(&output));
    let place = &held.place;
    place.wait_for_state("0", "in-doubt");
    assert_eq!(place.control("0", &["status"]).status.code(), Some(3));
    let stop = place.control("0", &["stop"]);
    assert_eq!(stop.status.code(), Some(3), "{}", stderr(&stop));
    assert!(stderr(&stop).contains("resolve"), "{}", stderr(&stop));
    let cancel = place.control("0", &["cancel"]);
    assert_eq!(cancel.status.code(), Some(1));
    let resolve = place.control("0", &["resolve", "--as", "source"]);
    assert_eq!(resolve.status.code(), Some(0), "{}", stderr(&resolve));
    assert_alive(place, "0");
    assert_eq!(place.control("0", &["stop"]).status.code(), Some(0));
    assert_eq!(held.here.end().code(), Some(0));
}

#[test]
fn a_source_in_doubt_ends_when_it_is_told_that_the_destination_has_the_vm() {
    if !kvm("a_source_in_doubt_ends_when_it_is_told_that_the_destination_has_the_vm") {
        return;
    }
    let mut held = Held::at("source-recorded");
    held.there.kill();
    held.let_go();
    held.place.wait_for_state("0", "in-doubt");
    let resolve = held.place.control("0", &["resolve", "--as", "destination"]);
    assert_eq!(resolve.status.code(), Some(0), "{}", stderr(&resolve));
    assert_eq!(held.here.end().code(), Some(0), "{}", held.here.log());
    finish(held.migrate);
}

#[test]
fn a_destination_in_doubt_runs_the_vm_when_told_that_the_source_is_dead() {
    if !kvm("a_destination_in_doubt_runs_the_vm_when_told_that_the_source_is_dead") {
        return;
    }
    let mut held = Held::at("source-recorded");
    held.here.kill();
    let output = finish(held.migrate);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    let place = &held.place;
    place.wait_for_state("1", "in-doubt");
    let stop = place.control("1", &["stop"]);
    assert_eq!(stop.status.code(), Some(3), "{}", stderr(&stop));
    let resolve = place.control("1", &["resolve", "--as", "destination"]);
    assert_eq!(resolve.status.code(), Some(0), "{}", stderr(&resolve));
    assert_alive(place, "1");
}

#[test]
fn a_vm_that_may_run_elsewhere_is_not_started_again_after_its_process_died() {
    if !kvm("a_vm_that_may_run_elsewhere_is_not_started_again_after_its_process_died") {
        return;
    }
    let mut held = Held::at("source-recorded");
    held.here.kill();
    finish(held.migrate);
    let mut again = held.place.start("2", &["run", "--memory", "64M", "--id", ID]);
    assert_eq!(again.end().code(), Some(1));
    assert!(again.log().contains("must not be started here"), "{}", again.log());
    assert!(again.log().contains(ID), "{}", again.log());
    let _other = held.place.run("3");

    held.there.kill();
    let resolve = held.place.wherry(&["resolve", "--id", ID, "--as", "source"]);
    assert_eq!(resolve.status.code(), Some(0), "{}", stderr(&resolve));
    // The receiver has died on this very host, with its own record.
    let _again = held.place.run_with("4", &["--id", ID], &[]);
    let nothing = held.place.wherry(&["resolve", "--id", ID, "--as", "source"]);
    assert_eq!(nothing.status.code(), Some(1));
    assert!(stderr(&nothing).contains("no record"), "{}", stderr(&nothing));
}

#[test]
fn a_vm_that_is_stopped_leaves_no_record_that_forbids_its_next_start() {
    if !kvm("a_vm_that_is_stopped_leaves_no_record_that_forbids_its_next_start") {
        return;
    }
    let place = Place::new();
    let mut first = place.run_with("0", &["--id", ID], &[]);
    for (from, to) in [("0", "1"), ("1", "2")] {
        let (there, address) = place.receive(to, &[]);
        let output = place.control(from, &["migrate", "--to", &address]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert_eq!(first.end().code(), Some(0));
        first = there;
    }
    let mut elsewhere = place.start("3", &["run", "--memory", "64M", "--id", ID]);
    assert_eq!(elsewhere.end().code(), Some(1), "it runs in another process");
    assert_eq!(place.control("2", &["stop"]).status.code(), Some(0));
    let _again = place.run_with("4", &["--id", ID], &[]);
}

#[test]
fn a_source_whose_answer_was_lost_learns_that_the_vm_runs_there() {
    if !kvm("a_source_whose_answer_was_lost_learns_that_the_vm_runs_there") {
        return;
    }
    let mut held = Held::at("destination-started");
    // The guest runs there; the source does not know. It is held up, not dead: no doubt is left behind.
    held.let_go();
    let output = finish(held.migrate);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(held.here.end().code(), Some(0));
    assert_alive(&held.place, "1");
}
