//! VMs of every shape run on while their memory follows them, and find every byte of it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use support::{Place, Vm, assert_alive, heartbeat, kvm, ram, snapshot, stderr, wait_for};
use wherry_netlab::{Network, RIGHT, Shape};

/// A probe guest that works.
fn run(place: &Place, api: &str, arguments: &[&str]) -> Vm {
    let mut all = vec!["run", "--name", "t"];
    all.extend(arguments);
    let vm = place.start(api, &all);
    place.wait_until_filled(api);
    vm
}

/// Moves the VM of one process to another that waits: the report.
fn follow(place: &Place, from: &str, address: &str, more: &[&str]) -> Value {
    let mut arguments = vec!["migrate", "--json", "--to", address];
    arguments.extend(more);
    let output = place.control(from, &arguments);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let job: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&job["phase"], &job["memory_remaining"]), (&"done".into(), &0.into()), "{job:#}");
    job
}

/// Moves it once by postcopy, and has the guest check everything.
fn move_and_check(place: &Place, mut here: Vm) -> Value {
    let (mut there, address) = place.receive("1", &[]);
    let job = follow(place, "0", &address, &["--mode", "postcopy"]);
    assert!(job["postcopy"]["faults"].as_u64().is_some_and(|n| n > 0), "{job:#}");
    assert_eq!(here.end().code(), Some(0), "{}", here.log());
    assert_alive(place, "1");
    place.finish("1", &mut there);
    job
}

#[test]
fn all_vcpus_fault_at_once_and_each_is_served() {
    let test = "all_vcpus_fault_at_once_and_each_is_served";
    if !kvm(test) {
        return;
    }
    if let Some(what) = wherry_netlab::missing() {
        println!("SKIPPED {test}: {what}");
        return;
    }
    let place = Place::new();
    // So slow that none of them can go on for long without asking.
    let network = Network::shaped(Shape::new(Duration::from_micros(200), 16_000_000)).unwrap();
    let arguments = ["run", "--memory", "128M", "--cpus", "4", "--cmdline", "data=96M rate=max", "--name", "t"];
    let mut here = place.start_in(network.left(), "0", &arguments);
    place.wait_until_filled("0");
    let listen = format!("tcp:{RIGHT}:0");
    let mut there = place.start_in(network.right(), "1", &["receive", "--listen", &listen]);
    let address = place.wait_for_state("1", "listening")["listen"].as_str().unwrap().to_owned();
    let api = place.path("0");
    let mut migrate = place.command(&["migrate", "--json", "--mode", "postcopy", "--to", &address, "--api"]);
    let migrate = migrate.arg(api).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let following = || place.ask("0", "/migration").is_some_and(|job| job["phase"] == "postcopy");
    wait_for("the VM to run there", || following().then_some(()));

    // Its API may not answer for the VM yet; its memory can be looked at.
    let ram = support::ram_of(there.pid());
    let work = || Some(snapshot(&ram)?.cpus.iter().map(|c| c.pages_dirtied).collect::<Vec<_>>());
    let before = wait_for("the guest's report to be there", || work().filter(|all| all.len() == 4));
    wait_for("every vCPU to work on", || {
        assert!(following(), "the memory was there before every vCPU had worked on");
        work()?.iter().zip(&before).all(|(now, before)| now > before).then_some(())
    });

    let output = migrate.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let job: Value = serde_json::from_slice(&output.stdout).unwrap();
    // Pages that come by themselves do not fault any more: how many do is up to what the guest touches first.
    assert!(job["postcopy"]["faults"].as_u64().is_some_and(|n| n >= 20), "{job:#}");
    assert_eq!(here.end().code(), Some(0), "{}", here.log());
    place.finish("1", &mut there);
}

#[test]
fn ram_in_huge_pages_follows_whole() {
    let test = "ram_in_huge_pages_follows_whole";
    if !kvm(test) {
        return;
    }
    // 64 MiB, here and there.
    let Some(_pages) = HugePages::reserve(64) else {
        println!("SKIPPED {test}: the host gives no 64 huge pages of 2 MiB");
        return;
    };
    let place = Place::new();
    let here = run(&place, "0", &["--memory", "64M", "--hugepages", "--cpus", "2", "--cmdline", "data=24M rate=50M"]);
    move_and_check(&place, here);
}

/// So many more huge pages of 2 MiB, until it is dropped.
struct HugePages(u64);

impl HugePages {
    const ALL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

    fn read(path: &str) -> Option<u64> {
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    }

    fn reserve(count: u64) -> Option<Self> {
        let all = Self::read(Self::ALL)?;
        std::fs::write(Self::ALL, (all + count).to_string()).ok()?;
        let reserved = Self(count);
        // The kernel gives as many as it finds.
        (Self::read(Self::FREE)? >= count).then_some(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(all) = Self::read(Self::ALL) {
            let _ = std::fs::write(Self::ALL, all.saturating_sub(self.0).to_string());
        }
    }
}

#[test]
fn ram_below_and_above_4_gib_follows_and_its_holes_stay_holes() {
    if !kvm("ram_below_and_above_4_gib_follows_and_its_holes_stay_holes") {
        return;
    }
    let place = Place::new();
    // RAM is two blocks, mostly holes: half of the data ends at 3 GiB, the other half begins at 4 GiB.
    let cmdline = "data=64M from=3040M rate=20M";
    let here = run(&place, "0", &["--memory", "16G", "--cpus", "2", "--cmdline", cmdline]);
    let status = place.status("0").unwrap();
    assert_eq!(status["vm"]["blocks"].as_array().unwrap().len(), 2, "{status:#}");
    let report = snapshot(&ram(&status)).unwrap();
    assert_eq!(report.extents, [(3040 << 20, 32 << 8), (4 << 30, 32 << 8)]);
    let job = move_and_check(&place, here);
    assert!(job["data_processed"].as_u64().is_some_and(|n| n < 128 << 20), "{job:#}");
}

#[test]
fn a_guest_that_never_converges_arrives_by_hybrid() {
    if !kvm("a_guest_that_never_converges_arrives_by_hybrid") {
        return;
    }
    let place = Place::new();
    let mut here = run(
        &place,
        "0",
        &["--memory", "1200M", "--cpus", "2", "--cmdline", "data=1G rate=max write=line verify=0% precheck=off"],
    );
    let (mut there, address) = place.receive("1", &[]);
    let job = follow(&place, "0", &address, &["--mode", "hybrid", "--bandwidth", "100M"]);
    assert!(job["rounds"].as_array().is_some_and(|rounds| !rounds.is_empty()), "{job:#}");
    assert!(job["postcopy"]["duration_us"].as_u64().is_some_and(|us| us > 0), "nothing followed: {job:#}");
    assert_eq!(job["auto_converge_throttle"], 0);
    assert_eq!(here.end().code(), Some(0), "{}", here.log());
    assert_alive(&place, "1");
    place.finish("1", &mut there);
}

#[test]
fn a_vm_that_has_just_arrived_is_followed_on_at_once_and_back() {
    if !kvm("a_vm_that_has_just_arrived_is_followed_on_at_once_and_back") {
        return;
    }
    let place = Place::new();
    let mut here = run(&place, "0", &["--memory", "96M", "--cpus", "2", "--cmdline", "data=48M rate=max"]);
    for leg in 1..=4 {
        let (from, to) = ((leg - 1).to_string(), leg.to_string());
        let (there, address) = place.receive(&to, &[]);
        follow(&place, &from, &address, &["--mode", "postcopy"]);
        // No more than to be asked.
        place.wait_for_state(&to, "running");
        drop(std::mem::replace(&mut here, there));
    }
    place.finish("4", &mut here);
}

#[test]
fn a_vm_that_is_paused_before_or_after_its_memory_follows_stands_still_and_goes_on() {
    if !kvm("a_vm_that_is_paused_before_or_after_its_memory_follows_stands_still_and_goes_on") {
        return;
    }
    let place = Place::new();
    let does = |api: &str, what: &str| {
        let output = place.control(api, &[what]);
        assert_eq!(output.status.code(), Some(0), "{what}: {}", stderr(&output));
    };
    let mut here = run(&place, "0", &["--memory", "96M", "--cpus", "2", "--cmdline", "data=48M rate=50M"]);

    // Paused when it leaves, paused when it arrives.
    does("0", "pause");
    let (mut there, address) = place.receive("1", &[]);
    follow(&place, "0", &address, &["--mode", "postcopy"]);
    assert_eq!(here.end().code(), Some(0), "{}", here.log());
    let arrived = ram(&place.wait_for_state("1", "paused"));
    let beat = heartbeat(&arrived);
    does("1", "pause");
    assert_eq!(heartbeat(&arrived), beat, "a paused guest went on");

    // Resumed just before it leaves, paused as soon as it has arrived.
    does("1", "resume");
    let (mut last, address) = place.receive("2", &[]);
    follow(&place, "1", &address, &["--mode", "postcopy"]);
    assert_eq!(there.end().code(), Some(0), "{}", there.log());
    place.wait_for_state("2", "running");
    does("2", "pause");
    let arrived = ram(&place.wait_for_state("2", "paused"));
    let beat = heartbeat(&arrived);
    place.status("2");
    assert_eq!(heartbeat(&arrived), beat, "a paused guest went on");
    does("2", "resume");
    assert_alive(&place, "2");
    place.finish("2", &mut last);
}
