//! `receive`, `migrate`, `cancel` between real processes.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use rustix::process::Signal;
use serde_json::Value;
use support::{Place, Vm, assert_alive, kvm, stderr, wait_for};

fn migrate(place: &Place, api: &str, to: &str, more: &[&str]) -> std::process::Output {
    let mut arguments = vec!["migrate", "--to", to];
    arguments.extend(more);
    place.control(api, &arguments)
}

#[test]
fn a_vm_moves_and_comes_back_and_each_process_it_leaves_ends_with_0() {
    if !kvm("a_vm_moves_and_comes_back_and_each_process_it_leaves_ends_with_0") {
        return;
    }
    let place = Place::new();
    let mut here = place.run("0");
    let id = place.status("0").unwrap()["vm"]["id"].clone();
    for leg in 1..=2 {
        let (from, to) = ((leg - 1).to_string(), leg.to_string());
        let (there, address) = place.receive(&to, &[]);
        let output = migrate(&place, &from, &address, &["--json", "--verify"]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let job: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(job["phase"], "done");
        assert_eq!(job["role"], "source");
        assert!(job["rounds"].as_array().is_some_and(|r| !r.is_empty()), "{job:#}");
        assert!(job["blackout"]["total_us"].as_u64().is_some_and(|us| us > 0), "{job:#}");
        assert!(job["memory_normal_bytes"].as_u64().is_some_and(|n| n >= 16 << 20), "{job:#}");
        assert_eq!(here.end().code(), Some(0), "{}", here.log());
        assert!(!here.api().exists());
        assert_alive(&place, &to);
        let status = place.status(&to).unwrap();
        assert_eq!(status["vm"]["id"], id);
        assert_eq!((&status["job"]["phase"], &status["job"]["role"]), (&"done".into(), &"destination".into()));
        here = there;
    }
    let output = place.control("2", &["stop"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(here.end().code(), Some(0));
}

#[test]
fn a_vm_runs_on_while_its_memory_follows() {
    if !kvm("a_vm_runs_on_while_its_memory_follows") {
        return;
    }
    let place = Place::new();
    let mut here = place.run_with("0", &["--cpus", "2"], &[]);
    for (leg, mode) in ["postcopy", "hybrid", "postcopy"].into_iter().enumerate() {
        let (from, to) = (leg.to_string(), (leg + 1).to_string());
        let (there, address) = place.receive(&to, &[]);
        let output = migrate(&place, &from, &address, &["--json", "--mode", mode]);
        assert_eq!(output.status.code(), Some(0), "{mode}: {}", stderr(&output));
        let job: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&job["phase"], &job["mode"]), (&"done".into(), &mode.into()));
        assert_eq!(job["rounds"].as_array().is_some_and(|r| r.is_empty()), mode == "postcopy", "{job:#}");
        assert_eq!(job["memory_remaining"], 0);
        if mode == "postcopy" {
            // What the destination has measured, both ends know.
            let there = &place.status(&to).unwrap()["job"]["postcopy"];
            assert_eq!(job["postcopy"]["vcpus"].as_array().map(Vec::len), Some(2), "{job:#}");
            assert_eq!(job["postcopy"]["vcpus"], there["vcpus"]);
            assert!(there["faults"].as_u64().is_some_and(|n| n > 0), "{there:#}");
            let text = place.control(&to, &["status"]);
            let text = String::from_utf8_lossy(&text.stdout).into_owned();
            assert!(text.contains("vCPU 1") && text.contains("until asked for"), "{text}");
        }
        assert_eq!(here.end().code(), Some(0), "{}", here.log());
        assert_alive(&place, &to);
        here = there;
    }
}

#[test]
fn it_moves_over_a_unix_socket_too_and_the_report_is_for_people() {
    if !kvm("it_moves_over_a_unix_socket_too_and_the_report_is_for_people") {
        return;
    }
    let place = Place::new();
    let _here = place.run("0");
    let address = format!("unix:{}", place.path("data").display());
    let _there = place.start("1", &["receive", "--listen", &address]);
    place.wait_for_state("1", "listening");
    let output = migrate(&place, "0", &address, &["--channels", "2"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = String::from_utf8_lossy(&output.stdout).into_owned();
    for word in ["The VM has moved to unix:", "round", "zero pages", "2 data channels", "blackout"] {
        assert!(report.contains(word), "{word} is missing in {report}");
    }
    assert!(stderr(&output).contains("phase precopy"), "{}", stderr(&output));
    assert_alive(&place, "1");
}

#[test]
fn a_paused_vm_moves_paused() {
    if !kvm("a_paused_vm_moves_paused") {
        return;
    }
    let place = Place::new();
    let _here = place.run("0");
    assert_eq!(place.control("0", &["pause"]).status.code(), Some(0));
    let (_there, address) = place.receive("1", &[]);
    let output = migrate(&place, "0", &address, &[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    place.wait_for_state("1", "paused");
    assert_eq!(place.control("1", &["resume"]).status.code(), Some(0));
    assert_alive(&place, "1");
}

#[test]
fn a_missing_destination_leaves_the_vm_running_and_is_named() {
    if !kvm("a_missing_destination_leaves_the_vm_running_and_is_named") {
        return;
    }
    let place = Place::new();
    let _here = place.run("0");
    let nobody = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        format!("tcp:127.0.0.1:{}", listener.local_addr().unwrap().port())
    };
    let output = migrate(&place, "0", &nobody, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains(&nobody), "{}", stderr(&output));
    assert_alive(&place, "0");
    let status = place.status("0").unwrap();
    assert_eq!(status["job"]["phase"], "failed");
    assert!(status["reason"].as_str().is_some_and(|r| r.contains("migration")), "{status:#}");
}

#[test]
fn a_port_in_use_is_refused_by_name() {
    if !kvm("a_port_in_use_is_refused_by_name") {
        return;
    }
    let place = Place::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap());
    let mut receiver = place.start("0", &["receive", "--listen", &address]);
    assert_eq!(receiver.end().code(), Some(1));
    assert!(receiver.log().contains(&address), "{}", receiver.log());
    assert!(!receiver.api().exists());
}

/// A migration that is held in its first round at the source.
struct Held {
    place: Place,
    here: Vm,
    there: Vm,
    address: String,
}

impl Held {
    fn new() -> Self {
        Self::with(&[])
    }

    fn with(receiver: &[&str]) -> Self {
        let place = Place::new();
        let points = place.path("points");
        std::fs::create_dir(&points).unwrap();
        let environment =
            [("WHERRY_TEST_PAUSE_AT", "source-round"), ("WHERRY_TEST_PAUSE_DIR", points.to_str().unwrap())];
        let here = place.run_with("0", &[], &environment);
        let (there, address) = place.receive("1", receiver);
        Self { place, here, there, address }
    }

    /// Starts `migrate` and waits until the first round is held.
    fn migrate(&self) -> std::process::Child {
        let api = self.place.path("0");
        let child = self
            .place
            .command(&["migrate", "--to", &self.address, "--api", api.to_str().unwrap()])
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        wait_for("the first round", || self.place.path("points/source-round").exists().then_some(()));
        child
    }

    fn let_go(&self) {
        std::fs::write(self.place.path("points/source-round.go"), "").unwrap();
    }
}

#[test]
fn a_second_migration_a_pause_and_a_foreign_cancel_are_told_no_while_one_is_under_way() {
    if !kvm("a_second_migration_a_pause_and_a_foreign_cancel_are_told_no_while_one_is_under_way") {
        return;
    }
    let held = Held::new();
    let first = held.migrate();
    let second = migrate(&held.place, "0", "tcp:127.0.0.1:1", &[]);
    assert_eq!(second.status.code(), Some(1));
    assert!(stderr(&second).contains("is migrating to"), "{}", stderr(&second));
    let pause = held.place.control("0", &["pause"]);
    assert_eq!(pause.status.code(), Some(1));
    assert!(stderr(&pause).contains("is migrating to"), "{}", stderr(&pause));
    let resolve = held.place.control("0", &["resolve", "--as", "source"]);
    assert_eq!(resolve.status.code(), Some(1));
    assert!(stderr(&resolve).contains("nothing is in doubt"), "{}", stderr(&resolve));
    assert_eq!(held.place.status("0").unwrap()["state"], "migrating");
    assert_eq!(held.place.status("1").unwrap()["state"], "receiving");
    held.let_go();
    let first = first.wait_with_output().unwrap();
    assert_eq!(first.status.code(), Some(0), "{}", stderr(&first));
    assert_alive(&held.place, "1");
}

#[test]
fn a_cancelled_migration_leaves_the_vm_here_and_the_receiver_ready_for_the_next() {
    if !kvm("a_cancelled_migration_leaves_the_vm_here_and_the_receiver_ready_for_the_next") {
        return;
    }
    let mut held = Held::new();
    let first = held.migrate();
    let cancel = {
        let api = held.place.path("0");
        held.place.command(&["cancel", "--api", api.to_str().unwrap()]).spawn().unwrap()
    };
    held.let_go();
    let cancel = cancel.wait_with_output().unwrap();
    let first = first.wait_with_output().unwrap();
    assert_eq!((cancel.status.code(), first.status.code()), (Some(0), Some(1)), "{}", stderr(&first));
    assert!(stderr(&first).contains("cancelled"), "{}", stderr(&first));
    assert_alive(&held.place, "0");
    held.place.wait_for_state("1", "listening");

    let output = migrate(&held.place, "0", &held.address, &[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(held.here.end().code(), Some(0));
    assert_alive(&held.place, "1");
}

#[test]
fn ctrl_c_cancels_the_migration_that_migrate_waits_for() {
    if !kvm("ctrl_c_cancels_the_migration_that_migrate_waits_for") {
        return;
    }
    let held = Held::new();
    let first = held.migrate();
    let pid = rustix::process::Pid::from_raw(first.id() as i32).unwrap();
    rustix::process::kill_process(pid, Signal::INT).unwrap();
    held.let_go();
    let first = first.wait_with_output().unwrap();
    assert_eq!(first.status.code(), Some(1), "{}", stderr(&first));
    assert_alive(&held.place, "0");
}

#[test]
fn a_destination_that_dies_on_the_way_leaves_the_vm_here() {
    if !kvm("a_destination_that_dies_on_the_way_leaves_the_vm_here") {
        return;
    }
    let mut held = Held::new();
    let first = held.migrate();
    held.there.kill();
    held.let_go();
    let first = first.wait_with_output().unwrap();
    assert_eq!(first.status.code(), Some(1), "{}", stderr(&first));
    assert_alive(&held.place, "0");
}

#[test]
fn a_source_that_dies_on_the_way_is_told_as_such_and_the_receiver_listens_on() {
    if !kvm("a_source_that_dies_on_the_way_is_told_as_such_and_the_receiver_listens_on") {
        return;
    }
    let mut held = Held::new();
    let first = held.migrate();
    held.here.kill();
    let first = first.wait_with_output().unwrap();
    assert_eq!(first.status.code(), Some(3), "{}", stderr(&first));
    assert!(stderr(&first).contains("has gone in phase"), "{}", stderr(&first));
    held.place.wait_for_state("1", "listening");
    let other = held.place.run("2");
    let output = migrate(&held.place, "2", &held.address, &[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_alive(&held.place, "1");
    drop(other);
}

#[test]
fn a_receiver_for_one_vm_only_ends_with_1_when_it_does_not_arrive() {
    if !kvm("a_receiver_for_one_vm_only_ends_with_1_when_it_does_not_arrive") {
        return;
    }
    let mut held = Held::with(&["--once"]);
    let first = held.migrate();
    held.here.kill();
    assert_eq!(held.there.end().code(), Some(1), "{}", held.there.log());
    assert!(held.there.log().contains("did not arrive"), "{}", held.there.log());
    assert!(!held.there.api().exists());
    first.wait_with_output().unwrap();
}

#[test]
fn somebody_who_is_no_wherry_does_not_end_the_wait_of_a_receiver() {
    if !kvm("somebody_who_is_no_wherry_does_not_end_the_wait_of_a_receiver") {
        return;
    }
    use std::io::{Read, Write};
    let place = Place::new();
    let (_there, address) = place.receive("0", &["--once"]);
    let mut stream = std::net::TcpStream::connect(address.strip_prefix("tcp:").unwrap()).unwrap();
    stream.set_read_timeout(Some(support::LIMIT)).unwrap();
    let _ = stream.write_all(&[b'x'; 4096]);
    // It closes the connection, with or without a word.
    let _ = stream.read_to_end(&mut Vec::new());
    assert_eq!(place.status("0").unwrap()["state"], "listening");
    let _here = place.run("1");
    let output = migrate(&place, "1", &address, &[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_alive(&place, "0");
}

#[test]
fn a_lingering_source_tells_where_its_vm_went_until_it_is_stopped() {
    if !kvm("a_lingering_source_tells_where_its_vm_went_until_it_is_stopped") {
        return;
    }
    let place = Place::new();
    let mut here = place.start("0", &["run", "--memory", "64M", "--cmdline", "data=4M", "--linger"]);
    place.wait_for_state("0", "running");
    let (_there, address) = place.receive("1", &[]);
    let output = migrate(&place, "0", &address, &[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let status = place.wait_for_state("0", "moved");
    assert_eq!(status["job"]["peer"], address.as_str());
    let again = migrate(&place, "0", &address, &[]);
    assert_eq!(again.status.code(), Some(1));
    assert!(stderr(&again).contains("moved"), "{}", stderr(&again));
    assert_eq!(place.control("0", &["stop"]).status.code(), Some(0));
    assert_eq!(here.end().code(), Some(0));
}

#[test]
fn a_receiver_is_stopped_while_it_listens() {
    if !kvm("a_receiver_is_stopped_while_it_listens") {
        return;
    }
    let place = Place::new();
    let (mut there, _) = place.receive("0", &[]);
    let output = place.control("0", &["stop"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(there.end().code(), Some(0), "{}", there.log());
}

#[test]
fn ten_vms_migrate_at_once() {
    if !kvm("ten_vms_migrate_at_once") {
        return;
    }
    let place = Place::new();
    let arguments = ["run", "--memory", "32M", "--cmdline", "data=8M rate=1M"];
    let mut ends = Vec::new();
    for i in 0..10 {
        let (from, to) = (format!("from{i}"), format!("to{i}"));
        let here = place.start(&from, &arguments);
        let (there, address) = place.receive(&to, &[]);
        place.wait_for_state(&from, "running");
        ends.push((from, to, address, here, there));
    }
    let moving: Vec<_> = ends
        .iter()
        .map(|(from, _, address, ..)| {
            let api = place.path(from);
            let mut command = place.command(&["migrate", "--to", address, "--api", api.to_str().unwrap()]);
            command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for child in moving {
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    }
    for (_, to, ..) in &ends {
        assert_alive(&place, to);
    }
}

#[test]
fn a_guest_of_256_gib_that_uses_little_moves_little() {
    if !kvm("a_guest_of_256_gib_that_uses_little_moves_little") {
        return;
    }
    let place = Place::new();
    let _here = place.start("0", &["run", "--memory", "256G", "--cmdline", "data=64M rate=1M"]);
    place.wait_for_state("0", "running");
    let (_there, address) = place.receive("1", &[]);
    let output = migrate(&place, "0", &address, &["--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let job: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(job["data_processed"].as_u64().is_some_and(|n| n < 512 << 20), "{job:#}");
    assert_eq!(place.status("1").unwrap()["vm"]["memory"], 256u64 << 30);
    assert_alive(&place, "1");
}
