//! Postcopy between real processes, as its user steers it: looked at, paused, switched, cut off, recovered, ended.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::Value;
use support::{Place, Vm, assert_alive, kvm, stderr, wait_for};

/// A guest that does little with much memory, so that the rest of it follows for long.
fn idle_guest(place: &Place) -> Vm {
    place.run_guest("0", &["--memory", "128M", "--cmdline", "data=96M rate=64K"], &[])
}

/// Whether faults can be served here.
fn permitted(test: &str) -> bool {
    let permitted = wherry_fault::Userfault::open().map(|_| ());
    if let Err(error) = &permitted {
        println!("SKIPPED {test}: {error}");
    }
    kvm(test) && permitted.is_ok()
}

/// `wherry migrate` in the background.
fn migrate(place: &Place, to: &str, more: &[&str]) -> Child {
    let api = place.path("0");
    place
        .command(&["migrate", "--json", "--to", to, "--api", api.to_str().unwrap()])
        .args(more)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

const SLOWLY: [&str; 4] = ["--mode", "postcopy", "--bandwidth", "2M"];

fn job(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", stderr(output)))
}

fn wait_for_phase(place: &Place, api: &str, phase: &str) -> Value {
    wait_for(&format!("{api} to be in phase {phase}"), || place.status(api).filter(|s| s["job"]["phase"] == phase))
}

/// Lets TCP connections through until it is told not to.
struct Gate {
    address: String,
    open: Arc<AtomicBool>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
}

impl Gate {
    fn before(target: &str) -> Self {
        let target = target.strip_prefix("tcp:").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", listener.local_addr().unwrap());
        let (open, streams) = (Arc::new(AtomicBool::new(true)), Arc::new(Mutex::new(vec![])));
        let (is_open, all) = (open.clone(), streams.clone());
        // Ends with the test's process: nothing else waits for it.
        std::thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let Ok(far) = TcpStream::connect(&target) else { continue };
                if !is_open.load(Ordering::SeqCst) {
                    continue;
                }
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    all.lock().unwrap().push(from.try_clone().unwrap());
                    std::thread::spawn(move || pump(from, to));
                }
            }
        });
        Self { address, open, streams }
    }

    fn shut(&self) {
        self.open.store(false, Ordering::SeqCst);
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}

#[test]
fn a_vm_whose_memory_follows_is_shown_paused_and_resumed_where_it_runs() {
    if !permitted("a_vm_whose_memory_follows_is_shown_paused_and_resumed_where_it_runs") {
        return;
    }
    let place = Place::new();
    let _here = idle_guest(&place);
    let (_there, address) = place.receive("1", &[]);
    let migration = migrate(&place, &address, &SLOWLY);
    let status = wait_for_phase(&place, "1", "postcopy");
    assert_eq!(status["state"], "running", "{status:#}");
    assert_alive(&place, "1");
    assert_eq!(place.control("1", &["pause"]).status.code(), Some(0));
    place.wait_for_state("1", "paused");
    assert_eq!(place.control("1", &["resume"]).status.code(), Some(0));
    assert_alive(&place, "1");
    let elsewhere = place.control("1", &["migrate", "--to", "tcp:127.0.0.1:1"]);
    assert!(stderr(&elsewhere).contains("still coming from"), "{}", stderr(&elsewhere));
    let refused = place.control("0", &["stop"]);
    assert_eq!(refused.status.code(), Some(3));
    assert!(stderr(&refused).contains("--force"), "{}", stderr(&refused));
    // All of it was while memory followed.
    assert_eq!(place.status("1").unwrap()["job"]["phase"], "postcopy");
    let ended = place.control("1", &["stop"]);
    assert_eq!(ended.status.code(), Some(0), "{}", stderr(&ended));
    let output = migration.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(job(&output)["error"].as_str().unwrap().contains("its user has ended it"));
}

#[test]
fn a_running_migration_is_switched_by_command_and_refuses_if_it_cannot() {
    if !permitted("a_running_migration_is_switched_by_command_and_refuses_if_it_cannot") {
        return;
    }
    let place = Place::new();
    let mut here = idle_guest(&place);
    assert_eq!(place.control("0", &["switch"]).status.code(), Some(1), "there is nothing to switch");
    let (_there, address) = place.receive("1", &[]);
    // Its first round alone would last for 48 s. By default it is a hybrid.
    let migration = migrate(&place, &address, &["--bandwidth", "2M"]);
    wait_for_phase(&place, "0", "precopy");
    let api = place.path("0");
    let switch = place.command(&["switch", "--api", api.to_str().unwrap()]).stdout(Stdio::piped()).spawn().unwrap();
    wait_for_phase(&place, "1", "postcopy");
    assert_alive(&place, "1");
    assert_eq!(place.control("1", &["stop"]).status.code(), Some(0));
    assert_eq!(migration.wait_with_output().unwrap().status.code(), Some(0));
    assert_eq!(switch.wait_with_output().unwrap().status.code(), Some(0));
    assert_eq!(here.end().code(), Some(0));

    let _here = idle_guest(&place);
    let (_there, address) = place.receive("2", &[]);
    let migration = migrate(&place, &address, &["--bandwidth", "2M", "--mode", "precopy"]);
    wait_for_phase(&place, "0", "precopy");
    let refused = place.control("0", &["switch"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("--mode precopy"), "{}", stderr(&refused));
    assert_eq!(place.control("0", &["cancel"]).status.code(), Some(0));
    assert_eq!(migration.wait_with_output().unwrap().status.code(), Some(1));
}

#[test]
fn a_lost_link_is_reported_with_3_and_recovered_over_another_address() {
    if !permitted("a_lost_link_is_reported_with_3_and_recovered_over_another_address") {
        return;
    }
    let place = Place::new();
    let mut here = idle_guest(&place);
    let (_there, address) = place.receive("1", &[]);
    let gate = Gate::before(&address);
    let migration = migrate(&place, &gate.address, &SLOWLY);
    wait_for_phase(&place, "1", "postcopy");
    wait_for_phase(&place, "0", "postcopy");
    gate.shut();
    wait_for_phase(&place, "1", "paused");
    wait_for_phase(&place, "0", "paused");
    for api in ["0", "1"] {
        assert_eq!(place.control(api, &["status"]).status.code(), Some(3), "{api}");
    }
    assert_eq!(place.status("1").unwrap()["state"], "running", "the VM is kept, and runs on as far as it can");
    let output = migration.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("wherry recover"), "{}", stderr(&output));

    // The destination waits at a new place, and the source is told to go there.
    let at = format!("unix:{}", place.path("again").display());
    let moved = place.control("1", &["recover", "--listen", &at]);
    assert_eq!(moved.status.code(), Some(0), "{}", stderr(&moved));
    let recovered = wait_for("the link to be taken up", || {
        let output = place.control("0", &["recover", "--json", "--to", &at]);
        (output.status.code() == Some(0)).then_some(output)
    });
    assert_eq!(job(&recovered)["phase"], "done");
    assert_eq!(here.end().code(), Some(0), "{}", here.log());
    wait_for_phase(&place, "1", "done");
    assert_alive(&place, "1");
}

#[test]
fn a_vm_whose_link_is_lost_is_stopped_although_it_waits_for_pages() {
    if !permitted("a_vm_whose_link_is_lost_is_stopped_although_it_waits_for_pages") {
        return;
    }
    let place = Place::new();
    // It touches new pages all the time, so soon all its vCPUs wait.
    let arguments = ["--memory", "128M", "--cmdline", "data=96M rate=100M", "--cpus", "2"];
    let mut here = place.run_guest("0", &arguments, &[]);
    let (mut there, address) = place.receive("1", &[]);
    let gate = Gate::before(&address);
    let migration = migrate(&place, &gate.address, &SLOWLY);
    wait_for_phase(&place, "1", "postcopy");
    wait_for_phase(&place, "0", "postcopy");
    gate.shut();
    wait_for_phase(&place, "1", "paused");
    let stopped = place.control("1", &["stop"]);
    assert_eq!(stopped.status.code(), Some(0), "{}", stderr(&stopped));
    assert_eq!(there.end().code(), Some(0), "{}", there.log());
    wait_for_phase(&place, "0", "paused");
    let forced = place.control("0", &["stop", "--force"]);
    assert_eq!(forced.status.code(), Some(0), "{}", stderr(&forced));
    assert_eq!(here.end().code(), Some(3), "{}", here.log());
    assert_eq!(migration.wait_with_output().unwrap().status.code(), Some(3));
}

#[test]
fn a_source_that_dies_on_this_host_is_known_to_be_dead_and_the_vm_is_reported_lost() {
    if !permitted("a_source_that_dies_on_this_host_is_known_to_be_dead_and_the_vm_is_reported_lost") {
        return;
    }
    let place = Place::new();
    let mut here = idle_guest(&place);
    let at = format!("unix:{}", place.path("listen").display());
    let mut there = place.start("1", &["receive", "--listen", &at]);
    place.wait_for_state("1", "listening");
    let migration = migrate(&place, &at, &SLOWLY);
    wait_for_phase(&place, "1", "postcopy");
    here.kill();
    assert_eq!(there.end().code(), Some(1), "{}", there.log());
    assert!(there.log().contains("the source's process has died"), "{}", there.log());
    let output = migration.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    // In whichever phase it was last heard of.
    assert!(stderr(&output).contains("has gone in phase"), "{}", stderr(&output));
}

#[test]
fn a_destination_that_dies_is_known_to_be_dead_when_its_host_answers_again() {
    if !permitted("a_destination_that_dies_is_known_to_be_dead_when_its_host_answers_again") {
        return;
    }
    let place = Place::new();
    let mut here = idle_guest(&place);
    let (mut there, address) = place.receive("1", &[]);
    let migration = migrate(&place, &address, &SLOWLY);
    wait_for_phase(&place, "1", "postcopy");
    wait_for_phase(&place, "0", "postcopy");
    there.kill();
    wait_for_phase(&place, "0", "paused");
    let _again = place.start("2", &["receive", "--listen", &address]);
    let output = migration.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let error = job(&output)["error"].as_str().unwrap().to_owned();
    assert!(error.contains("the VM is lost") && error.contains("the destination process died"), "{error}");
    assert_eq!(here.end().code(), Some(1), "{}", here.log());
    // Whoever answered waits on for a VM of his own.
    place.wait_for_state("2", "listening");
}

#[test]
fn memory_is_freed_as_it_is_sent_if_that_is_asked_for() {
    if !permitted("memory_is_freed_as_it_is_sent_if_that_is_asked_for") {
        return;
    }
    let place = Place::new();
    let _here = place.run_guest("0", &["--memory", "128M", "--cmdline", "data=96M rate=20M"], &[]);
    let (_there, address) = place.receive("1", &[]);
    let ram = support::ram(&place.status("0").unwrap());
    let before = blocks(&ram);
    let migration = migrate(&place, &address, &["--mode", "postcopy", "--release", "--bandwidth", "20M"]);
    wait_for("memory to be freed while the rest follows", || {
        let status = place.status("0")?;
        (status["job"]["phase"] == "postcopy" && blocks(&ram) < before / 2).then_some(())
    });
    let output = migration.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_alive(&place, "1");
}

/// What a memfd takes, in blocks of 512 bytes.
fn blocks(file: &std::fs::File) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap())
}
