//! VMs with a console: each process has its own end of it.

mod support;

use std::os::unix::net::UnixStream;

use support::{Place, Vm, assert_alive, kvm, stderr};

/// A place, and what names a socket in it.
fn target(place: &Place, name: &str) -> String {
    format!("unix:{}", place.path(name).display())
}

fn run(place: &Place, console: &str) -> Vm {
    place.run_with("0", &["--console", console], &[])
}

#[test]
fn a_destination_without_the_right_console_is_refused_by_name_and_the_vm_runs_on() {
    if !kvm("a_destination_without_the_right_console_is_refused_by_name_and_the_vm_runs_on") {
        return;
    }
    let place = Place::new();
    let here = target(&place, "console");
    let _here = run(&place, &here);
    let wrong: [(&[&str], &str); 3] = [
        (&[], "a --console for it"),
        (&["--console", &here], "another process listens on the socket"),
        (&["--console", "file:/nonexistent/log"], "/nonexistent/log"),
    ];
    for (n, (console, word)) in wrong.into_iter().enumerate() {
        let api = format!("r{n}");
        let (_there, address) = place.receive(&api, console);
        let output = place.control("0", &["migrate", "--to", &address]);
        assert_eq!(output.status.code(), Some(1), "{console:?}");
        assert!(stderr(&output).contains(word), "{console:?}: {}", stderr(&output));
    }
    assert_alive(&place, "0");
    UnixStream::connect(place.path("console")).unwrap();
}

#[test]
fn a_vm_without_a_console_is_not_given_one_by_a_move() {
    if !kvm("a_vm_without_a_console_is_not_given_one_by_a_move") {
        return;
    }
    let place = Place::new();
    let _here = place.run("0");
    let (_there, address) = place.receive("1", &["--console", &target(&place, "c")]);
    let output = place.control("0", &["migrate", "--to", &address]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("a VM with a console"), "{}", stderr(&output));
    assert_alive(&place, "0");
}

#[test]
fn a_vm_with_a_console_moves_by_every_mode_and_takes_its_socket_away() {
    if !kvm("a_vm_with_a_console_moves_by_every_mode_and_takes_its_socket_away") {
        return;
    }
    let place = Place::new();
    let mut here = run(&place, &target(&place, "c0"));
    for (leg, mode) in ["precopy", "hybrid", "postcopy"].into_iter().enumerate() {
        let (from, to) = (leg.to_string(), (leg + 1).to_string());
        let (there, address) = place.receive(&to, &["--console", &target(&place, &format!("c{to}"))]);
        let output = place.control(&from, &["migrate", "--to", &address, "--mode", mode]);
        assert_eq!(output.status.code(), Some(0), "{mode}: {}", stderr(&output));
        assert_eq!(here.end().code(), Some(0), "{}", here.log());
        here = there;
        assert_alive(&place, &to);
        assert!(!place.path(&format!("c{from}")).exists(), "the socket is still at the source");
        UnixStream::connect(place.path(&format!("c{to}"))).unwrap();
    }
    place.finish("3", &mut here);
    assert!(!place.path("c3").exists(), "the socket is left over");
}
