//! `kill -9` of either end, and silence, at every point of a migration between real processes: afterwards the VM runs in
//! exactly one place, by itself or by `resolve`, unless it died with the process in which it ran.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::process::{Child, Output, Stdio};

use support::{Place, Vm, assert_alive, kvm, stderr, wait_for};
use wherry_migration::testpoint::Point;

/// A migration from process `0` to process `1`, one of which is held at a point.
struct Held {
    place: Place,
    here: Vm,
    there: Vm,
    migrate: Child,
    point: Point,
}

impl Held {
    fn at(point: Point) -> Self {
        let place = Place::new();
        let points = place.path("points");
        std::fs::create_dir(&points).unwrap();
        let environment = [("WHERRY_TEST_PAUSE_AT", point.name()), ("WHERRY_TEST_PAUSE_DIR", points.to_str().unwrap())];
        let (at_source, at_destination): (&[_], &[_]) =
            if is_source(point) { (&environment, &[]) } else { (&[], &environment) };
        let here = place.run_with("0", &[], at_source);
        let (there, address) = place.receive_with("1", &[], at_destination);
        let migrate = start_migration(&place, &address);
        let held = Self { place, here, there, migrate, point };
        wait_for(point.name(), || held.place.path(&format!("points/{point}")).exists().then_some(()));
        held
    }

    fn let_go(&self) {
        std::fs::write(self.place.path(&format!("points/{}.go", self.point)), "").unwrap();
    }
}

fn start_migration(place: &Place, address: &str) -> Child {
    let api = place.path("0");
    let mut command = place.command(&["migrate", "--to", address, "--api", api.to_str().unwrap()]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn is_source(point: Point) -> bool {
    point.name().starts_with("source")
}

fn points(source: bool) -> impl Iterator<Item = Point> {
    let side = if source { "source-" } else { "destination-" };
    Point::ALL.iter().copied().filter(move |point| point.name().starts_with(side))
}

/// How a migration may end for the source after the destination was killed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// Failed, and the VM runs on at the source.
    Stays,
    /// In doubt; the VM has not run there.
    Doubt,
    /// In doubt, although it ran there; or known to have moved, and died there.
    MovedAndDied,
    /// Whether the word that decides was on its way when the destination died is a matter of luck.
    StaysOrDoubt,
}

fn end_without_destination(point: Point) -> End {
    match point {
        Point::DestinationReady => End::StaysOrDoubt,
        Point::SourceRecorded | Point::DestinationTold => End::Doubt,
        Point::SourceRun | Point::SourceRunning | Point::DestinationStarted | Point::DestinationRunning => {
            End::MovedAndDied
        }
        _ => End::Stays,
    }
}

fn kill_destination(point: Point) {
    let mut held = Held::at(point);
    held.there.kill();
    held.let_go();
    let place = &held.place;
    let expected = end_without_destination(point);
    // A source in doubt goes on asking; `migrate` does not wait for it.
    let output: Output = held.migrate.wait_with_output().unwrap();
    let said = stderr(&output);
    match output.status.code() {
        Some(1) => assert!(matches!(expected, End::Stays | End::StaysOrDoubt), "{point}: it stays: {said}"),
        Some(3) => assert_ne!(expected, End::Stays, "{point}: in doubt: {said}"),
        Some(0) => assert_eq!(expected, End::MovedAndDied, "{point}: it moved: {said}"),
        code => panic!("{point}: exit status {code:?}: {said}"),
    }
    if output.status.code() == Some(0) {
        assert_eq!(held.here.end().code(), Some(0), "{point}: {}", held.here.log());
        return;
    }
    if output.status.code() == Some(3) {
        assert!(said.contains("in doubt"), "{point}: {said}");
        place.wait_for_state("0", "in-doubt");
        if expected == End::MovedAndDied {
            return;
        }
        let resolve = place.control("0", &["resolve", "--as", "source"]);
        assert_eq!(resolve.status.code(), Some(0), "{point}: {}", stderr(&resolve));
    }
    assert_alive(place, "0");
    // Nothing of the failed attempt is in the way of the next one.
    let (_next, address) = place.receive("2", &[]);
    let output = start_migration(place, &address).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{point}: migrating again: {}", stderr(&output));
    assert_alive(place, "2");
}

/// What a destination may do after the source was killed.
fn ends_without_source(point: Point) -> &'static [&'static str] {
    use Point::*;
    match point {
        // It has everything: it keeps it. (Had the order to run been on its way, it runs.)
        DestinationOffered | DestinationLoaded => &["in-doubt"],
        SourceReady | SourceRecorded => &["in-doubt"],
        DestinationReady | SourceRun => &["in-doubt", "running"],
        DestinationTold | DestinationStarted | DestinationRunning | SourceRunning => &["running"],
        // Whether the offer was on its way is a matter of luck.
        SourceOffered => &["in-doubt", "listening"],
        _ => &["listening"],
    }
}

fn kill_source(point: Point) {
    let mut held = Held::at(point);
    held.here.kill();
    held.let_go();
    held.migrate.wait_with_output().unwrap();
    let place = &held.place;
    let expected = ends_without_source(point);
    let state = wait_for("the destination to come to a decision", || {
        let state = place.status("1")?["state"].as_str()?.to_owned();
        ["in-doubt", "running", "listening"].contains(&state.as_str()).then_some(state).filter(|s| {
            // It listens until it has noticed; and a source that has just connected is not noticed at once.
            expected.contains(&s.as_str()) || s != "listening"
        })
    });
    assert!(expected.contains(&state.as_str()), "{point}: the destination is {state}, not {expected:?}");
    match state.as_str() {
        "in-doubt" => {
            let resolve = place.control("1", &["resolve", "--as", "destination"]);
            assert_eq!(resolve.status.code(), Some(0), "{point}: {}", stderr(&resolve));
            assert_alive(place, "1");
        }
        "running" => assert_alive(place, "1"),
        _ => {
            // Ready for another VM.
            let _other = place.run("2");
            let address = place.wait_for_state("1", "listening")["listen"].as_str().unwrap().to_owned();
            let output = place.control("2", &["migrate", "--to", &address]);
            assert_eq!(output.status.code(), Some(0), "{point}: the next VM: {}", stderr(&output));
            assert_alive(place, "1");
        }
    }
}

#[test]
fn a_destination_killed_at_any_point_of_the_source_leaves_the_vm_there_or_in_doubt() {
    if kvm("a_destination_killed_at_any_point_of_the_source_leaves_the_vm_there_or_in_doubt") {
        points(true).for_each(kill_destination);
    }
}

#[test]
fn a_destination_killed_at_any_of_its_points_leaves_the_vm_at_the_source_or_in_doubt() {
    if kvm("a_destination_killed_at_any_of_its_points_leaves_the_vm_at_the_source_or_in_doubt") {
        points(false).for_each(kill_destination);
    }
}

#[test]
fn a_source_killed_at_any_of_its_points_leaves_the_destination_listening_running_or_in_doubt() {
    if kvm("a_source_killed_at_any_of_its_points_leaves_the_destination_listening_running_or_in_doubt") {
        points(true).for_each(kill_source);
    }
}

#[test]
fn a_source_killed_at_any_point_of_the_destination_leaves_it_listening_running_or_in_doubt() {
    if kvm("a_source_killed_at_any_point_of_the_destination_leaves_it_listening_running_or_in_doubt") {
        points(false).for_each(kill_source);
    }
}

#[test]
fn a_destination_that_falls_silent_during_precopy_is_given_up() {
    if !kvm("a_destination_that_falls_silent_during_precopy_is_given_up") {
        return;
    }
    let held = Held::at(Point::DestinationReceiving);
    let output = held.migrate.wait_with_output();
    // It is held only in its own thread: nothing but time tells the source.
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("silent"), "{}", stderr(&output));
    assert_alive(&held.place, "0");
}

#[test]
fn a_source_in_doubt_learns_by_itself_what_a_slow_destination_did() {
    if !kvm("a_source_in_doubt_learns_by_itself_what_a_slow_destination_did") {
        return;
    }
    let mut held = Held::at(Point::DestinationTold);
    held.place.wait_for_state("0", "in-doubt");
    held.let_go();
    assert_alive(&held.place, "1");
    assert_eq!(held.here.end().code(), Some(0), "{}", held.here.log());
    // `migrate` had said that it is in doubt, or has waited for the end.
    let output = held.migrate.wait_with_output().unwrap();
    assert!(matches!(output.status.code(), Some(0 | 3)), "{}", stderr(&output));
}
