//! `run` and the commands on one process: exit statuses, states, sockets.

mod support;

use rustix::process::Signal;
use support::{Place, kvm, ram, stderr, wait_for};

#[test]
fn a_vm_runs_pauses_resumes_and_stops() {
    if !kvm("a_vm_runs_pauses_resumes_and_stops") {
        return;
    }
    let place = Place::new();
    let mut vm = place.run("vm");
    let status = place.status("vm").unwrap();
    assert_eq!(status["vm"]["name"], "t");
    assert_eq!(status["vm"]["memory"], 64 << 20);
    assert_eq!(status["pid"], vm.pid());
    assert!(status["job"].is_null());
    for (command, state) in [("pause", "paused"), ("pause", "paused"), ("resume", "running"), ("resume", "running")] {
        let output = place.control("vm", &[command]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert_eq!(place.status("vm").unwrap()["state"], state);
    }
    let output = place.control("vm", &["stop"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(vm.end().code(), Some(0));
    assert!(!vm.api().exists(), "the socket goes with the process");
}

#[test]
fn a_guest_that_is_paused_stands_still() {
    if !kvm("a_guest_that_is_paused_stands_still") {
        return;
    }
    let place = Place::new();
    let _vm = place.run("vm");
    let ram = ram(&place.status("vm").unwrap());
    let heartbeat = || support::heartbeat(&ram);
    let alive = || {
        let before = heartbeat();
        wait_for("the guest's heart to beat", || (heartbeat() > before).then_some(()));
    };
    alive();
    assert_eq!(place.control("vm", &["pause"]).status.code(), Some(0));
    let stopped = heartbeat();
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(heartbeat(), stopped);
    assert_eq!(place.control("vm", &["resume"]).status.code(), Some(0));
    alive();
}

#[test]
fn signals_stop_the_vm_in_an_orderly_way() {
    if !kvm("signals_stop_the_vm_in_an_orderly_way") {
        return;
    }
    let place = Place::new();
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let mut vm = place.run("vm");
        vm.signal(signal);
        assert_eq!(vm.end().code(), Some(0), "{}", vm.log());
        assert!(!vm.api().exists());
    }
}

#[test]
fn a_guest_that_finishes_ends_its_process_with_0() {
    if !kvm("a_guest_that_finishes_ends_its_process_with_0") {
        return;
    }
    let place = Place::new();
    let arguments = ["run", "--memory", "64M", "--cmdline", "data=4M run=50"];
    let mut vm = place.start("vm", &arguments);
    assert_eq!(vm.end().code(), Some(0), "{}", vm.log());
    assert!(vm.log().contains("powered off"), "{}", vm.log());
}

#[test]
fn a_socket_in_use_is_refused_and_a_left_over_one_replaced() {
    if !kvm("a_socket_in_use_is_refused_and_a_left_over_one_replaced") {
        return;
    }
    let place = Place::new();
    let mut vm = place.run("vm");
    let mut second = place.start("vm", &["run", "--memory", "64M"]);
    assert_eq!(second.end().code(), Some(1));
    assert!(second.log().contains("in use by a living process"), "{}", second.log());
    assert_eq!(place.status("vm").unwrap()["state"], "running", "the first is not disturbed");
    vm.kill();
    assert!(vm.api().exists(), "a killed process leaves its socket");
    let output = place.control("vm", &["status"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("its process is gone"), "{}", stderr(&output));
    let _third = place.run("vm");
}

#[test]
fn sockets_of_the_guests_ports_go_with_the_process_and_those_of_a_killed_one_are_replaced() {
    if !kvm("sockets_of_the_guests_ports_go_with_the_process_and_those_of_a_killed_one_are_replaced") {
        return;
    }
    let place = Place::new();
    let ports = ["serial", "console"].map(|name| place.path(name));
    let (serial, console) = (format!("socket:{}", ports[0].display()), format!("unix:{}", ports[1].display()));
    let more = ["--serial", &serial, "--console", &console];
    for end in ["stop", "kill", "signal"] {
        let mut vm = place.run_with("vm", &more, &[]);
        assert!(ports.iter().all(|path| path.exists()));
        match end {
            "kill" => vm.kill(),
            "stop" => assert_eq!(place.control("vm", &["stop"]).status.code(), Some(0)),
            _ => vm.signal(Signal::TERM),
        }
        if end != "kill" {
            assert_eq!(vm.end().code(), Some(0), "{}", vm.log());
        }
        let left: Vec<_> = ports.iter().filter(|path| path.exists()).collect();
        assert_eq!(left.len(), if end == "kill" { 2 } else { 0 }, "after {end}: {left:?}");
    }
}

#[test]
fn missing_and_foreign_sockets_are_told_apart() {
    let place = Place::new();
    let output = place.control("nowhere", &["status"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("there is no API socket"), "{}", stderr(&output));

    let listener = std::os::unix::net::UnixListener::bind(place.path("foreign")).unwrap();
    let thread = std::thread::spawn(move || {
        use std::io::{Read, Write};
        let (mut stream, _) = listener.accept().unwrap();
        // A socket closed with unread input resets the connection, and the client would lose the answer.
        let _ = stream.read(&mut [0; 4096]);
        let _ = stream.write_all(b"220 mail.example.org ESMTP\r\n");
    });
    let output = place.control("foreign", &["pause"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("no Wherry"), "{}", stderr(&output));
    thread.join().unwrap();
}

#[test]
fn bad_arguments_end_with_2() {
    let place = Place::new();
    let refused = |arguments: &[&str], word: &str| {
        let output = place.wherry(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(word), "{arguments:?}: {}", stderr(&output));
    };
    refused(&["run"], "--api");
    refused(&["run", "--api", "x", "--memory", "lots"], "lots");
    refused(&["run", "--api", "x", "--memory", "4K"], "RAM");
    refused(&["run", "--api", "x", "--cpus", "0"], "vCPUs");
    refused(&["run", "--api", "x", "--cpu", "pentium"], "pentium");
    refused(&["run", "--api", "x", "--serial", "tty"], "stdio");
    refused(&["run", "--api", "x", "--cmdline", "date=1M"], "date");
    refused(&["run", "--api", "x", "--id", "12"], "hexadecimal");
    refused(&["receive", "--api", "x", "--listen", "here"], "tcp:HOST:PORT");
    refused(&["migrate", "--api", "x", "--to", "tcp:h:1", "--mode", "teleport"], "hybrid");
    refused(&["migrate", "--api", "x", "--to", "tcp:h:1", "--channels", "0"], "channels");
    refused(&["resolve", "--api", "x", "--as", "both"], "source or destination");
    refused(&["status", "--api", "x", "--log", "a=b=c"], "--log");
    refused(&["teleport"], "teleport");
}

#[test]
fn a_missing_kernel_is_named_and_leaves_no_socket() {
    if !kvm("a_missing_kernel_is_named_and_leaves_no_socket") {
        return;
    }
    let place = Place::new();
    let kernel = place.path("no-such-kernel");
    let mut vm = place.start("vm", &["run", "--kernel", kernel.to_str().unwrap()]);
    assert_eq!(vm.end().code(), Some(1));
    assert!(vm.log().contains("no-such-kernel"), "{}", vm.log());
    assert!(!vm.api().exists());
}
