//! VMs with network devices: each process has a tap device of its own in one network namespace.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use support::{Place, Vm, assert_alive, kvm, stderr};
use wherry_netlab::{ETHERTYPE, Network, TapPeer};

/// A namespace with these tap devices, or nothing and why.
fn network(test: &str, taps: &[&str]) -> Option<(Network, Vec<TapPeer>)> {
    if !kvm(test) {
        return None;
    }
    if let Some(what) = wherry_netlab::missing() {
        println!("SKIPPED {test}: {what}");
        return None;
    }
    let network = Network::new().unwrap();
    let peers = taps.iter().map(|name| TapPeer::make(network.left(), name, ETHERTYPE).unwrap()).collect();
    Some((network, peers))
}

fn run(place: &Place, network: &Network, nets: &[&str]) -> Vm {
    let vm = place.start_in(
        network.left(),
        "0",
        &[&["run", "--memory", "64M", "--cmdline", "data=16M rate=4M"], nets].concat(),
    );
    place.wait_until_filled("0");
    vm
}

fn receive(place: &Place, network: &Network, api: &str, nets: &[&str]) -> (Vm, String) {
    let vm = place.start_in(network.left(), api, &[&["receive", "--listen", "tcp:127.0.0.1:0"], nets].concat());
    let status = place.wait_for_state(api, "listening");
    (vm, status["listen"].as_str().unwrap().to_owned())
}

#[test]
fn a_destination_without_the_right_taps_is_refused_by_name_and_the_vm_runs_on() {
    let test = "a_destination_without_the_right_taps_is_refused_by_name_and_the_vm_runs_on";
    let Some((network, _peers)) = network(test, &["tap0", "tap1", "tap2"]) else { return };
    let place = Place::new();
    let _here = run(&place, &network, &["--net", "tap0"]);
    let wrong: [(&[&str], &str); 4] = [
        (&[], "network device 0 (tap \"tap0\" at the source)"),
        (&["--net", "tap7"], "tap7: there is no network device"),
        (&["--net", "tap0"], "tap0: another process has it open"),
        (&["--net", "tap1", "--net", "tap2"], "a network device more"),
    ];
    for (n, (nets, word)) in wrong.into_iter().enumerate() {
        let api = format!("r{n}");
        let (_there, address) = receive(&place, &network, &api, nets);
        let output = place.control("0", &["migrate", "--to", &address]);
        assert_eq!(output.status.code(), Some(1), "{nets:?}");
        assert!(stderr(&output).contains(word), "{nets:?}: {}", stderr(&output));
    }
    assert_alive(&place, "0");
}

#[test]
fn a_vm_with_a_network_device_moves_by_every_mode_and_leaves_its_tap_to_others() {
    let test = "a_vm_with_a_network_device_moves_by_every_mode_and_leaves_its_tap_to_others";
    let Some((network, _peers)) = network(test, &["tap0", "tap1"]) else { return };
    let place = Place::new();
    let mut here = run(&place, &network, &["--net", "tap0,mac=02:00:5e:10:00:01"]);
    for (leg, mode) in ["precopy", "hybrid", "postcopy"].into_iter().enumerate() {
        let (from, to) = (leg.to_string(), (leg + 1).to_string());
        let tap = format!("tap{}", (leg + 1) % 2);
        let (there, address) = receive(&place, &network, &to, &["--net", &tap]);
        let output = place.control(&from, &["migrate", "--to", &address, "--mode", mode]);
        assert_eq!(output.status.code(), Some(0), "{mode}: {}", stderr(&output));
        assert_eq!(here.end().code(), Some(0), "{}", here.log());
        here = there;
        assert_alive(&place, &to);
    }
    place.finish("3", &mut here);
}

#[test]
fn a_tap_is_kept_over_live_updates_and_free_when_the_last_process_has_ended() {
    let test = "a_tap_is_kept_over_live_updates_and_free_when_the_last_process_has_ended";
    let Some((network, _peers)) = network(test, &["tap0"]) else { return };
    let place = Place::new();
    let first = run(&place, &network, &["--net", "tap0"]);
    for n in 0..2 {
        let output = place.control("0", &["update"]);
        assert_eq!(output.status.code(), Some(0), "update {n}: {}", stderr(&output));
        assert_alive(&place, "0");
        let api = format!("other{n}");
        let mut other = place.start_in(network.left(), &api, &["run", "--memory", "64M", "--net", "tap0"]);
        assert_eq!(other.end().code(), Some(1));
        assert!(other.log().contains("tap0: another process has it open"), "{}", other.log());
    }
    assert_ne!(place.wait_for_state("0", "running")["pid"], first.pid());
    let output = place.control("0", &["stop"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let _next = run(&place, &network, &["--net", "tap0"]);
    assert_alive(&place, "0");
}

#[test]
fn a_tap_that_cannot_be_used_is_named_at_the_start() {
    let test = "a_tap_that_cannot_be_used_is_named_at_the_start";
    let Some((network, _peers)) = network(test, &[]) else { return };
    let place = Place::new();
    for (tap, word) in [("tap9", "tap9: there is no network device"), ("lo", "is it a tap device")] {
        let mut vm = place.start_in(network.left(), tap, &["run", "--memory", "64M", "--net", tap]);
        assert_eq!(vm.end().code(), Some(1));
        assert!(vm.log().contains(word), "{}", vm.log());
    }
    for wrong in ["", "tap0,mac=1", "tap0,mac=01:00:00:00:00:01", "tap0,ro"] {
        let output = place.wherry(&["run", "--api", "x", "--net", wrong]);
        assert_eq!(output.status.code(), Some(2), "{wrong}: {}", stderr(&output));
    }
}
