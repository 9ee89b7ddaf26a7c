//! VMs with a balloon. The probe guest has no driver for it: what a driver does is tested with the device.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use serde_json::Value;
use support::{Place, assert_alive, kvm, stderr};

fn size(place: &Place, api: &str) -> Value {
    let output = place.control(api, &["balloon", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_vm_with_a_balloon_moves_by_every_mode_and_is_still_asked_for_the_same() {
    if !kvm("a_vm_with_a_balloon_moves_by_every_mode_and_is_still_asked_for_the_same") {
        return;
    }
    let place = Place::new();
    let mut here = place.run_with("0", &["--balloon"], &[]);
    let output = place.control("0", &["balloon", "--size", "48M"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    for (leg, mode) in ["precopy", "hybrid", "postcopy"].into_iter().enumerate() {
        let (from, to) = (leg.to_string(), (leg + 1).to_string());
        let (there, address) = place.receive(&to, &[]);
        let output = place.control(&from, &["migrate", "--to", &address, "--mode", mode]);
        assert_eq!(output.status.code(), Some(0), "{mode}: {}", stderr(&output));
        assert_eq!(here.end().code(), Some(0), "{}", here.log());
        here = there;
        assert_alive(&place, &to);
        let balloon = size(&place, &to);
        assert_eq!((&balloon["size"], &balloon["memory"]), (&Value::from(48 << 20), &Value::from(64 << 20)), "{mode}");
    }
    let output = place.control("3", &["balloon", "--size", "65M"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("67108864 bytes of RAM"), "{}", stderr(&output));
    place.finish("3", &mut here);
}

#[test]
fn a_vm_without_a_balloon_says_so() {
    if !kvm("a_vm_without_a_balloon_says_so") {
        return;
    }
    let place = Place::new();
    let _here = place.run("0");
    let output = place.control("0", &["balloon", "--size", "32M"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("no balloon"), "{}", stderr(&output));
    assert_alive(&place, "0");
}
