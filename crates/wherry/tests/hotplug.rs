//! Devices that come and go while a VM runs: `wherry device testdma`, and the probe guest, which verifies what they write.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::net::UnixListener;

use serde_json::Value;
use support::disk::Memory;
use support::testdma::{Process, load};
use support::{Place, Vm, assert_alive, kvm, stderr, wait_for};
use wherry_guest::report::Phase;

/// Buffers that show that a device works.
const BUFFERS: u64 = 500;
/// The load of a guest that answers.
const LISTENS: &str = "data=1M rate=0 testdma=ring testdma_plug=on";
/// The load of one that does not.
const DEAF: &str = "data=1M rate=0";

fn run(place: &Place, load: &str, more: &[&str]) -> Vm {
    place.run_guest("0", &[&["--memory", "64M", "--cmdline", load], more].concat(), &[])
}

fn option(process: &Process) -> String {
    format!("vfio-user={}", process.socket.display())
}

/// Plugs a device; what it is called.
fn plug(place: &Place, api: &str, process: &Process) -> String {
    let output = place.control(api, &["device-add", &option(process), "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let device: Value = serde_json::from_slice(&output.stdout).unwrap();
    device["name"].as_str().unwrap().to_owned()
}

fn unplug(place: &Place, api: &str, name: &str) {
    let output = place.control(api, &["device-remove", name]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

/// A command that is refused; what it says.
fn refused(place: &Place, api: &str, arguments: &[&str]) -> String {
    let output = place.control(api, arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", stderr(&output));
    stderr(&output)
}

/// Names of the devices and how they stand.
fn devices(place: &Place, api: &str) -> Vec<(String, String)> {
    let list = wait_for("an answer", || place.ask(api, "/devices"));
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    list.as_array().unwrap().iter().map(|device| (text(&device["name"]), text(&device["state"]))).collect()
}

fn present(names: &[&str]) -> Vec<(String, String)> {
    names.iter().map(|name| (name.to_string(), "present".to_string())).collect()
}

fn wait_for_more(memory: &Memory, what: &str) {
    let before = load(memory).received;
    wait_for(&format!("{BUFFERS} buffers {what}"), || {
        let now = load(memory);
        (now.plugged && now.received >= before + BUFFERS).then_some(())
    });
}

#[test]
fn a_device_is_plugged_driven_moved_unplugged_and_plugged_again() {
    if !kvm("a_device_is_plugged_driven_moved_unplugged_and_plugged_again") {
        return;
    }
    for kind in ["msix", "intx"] {
        let place = Place::new();
        let mut here = run(&place, &format!("{LISTENS} testdma_interrupt={kind}"), &["--rng"]);
        let mut memory = Memory::of(&place, "0");
        let mut process = Process::start(&place, "d0", &["--rate", "20M"]);
        assert_eq!(plug(&place, "0", &process), "vfio-user0");
        assert_eq!(devices(&place, "0"), present(&["rng0", "vfio-user0"]));
        wait_for_more(&memory, "after the first plug");
        for (leg, mode) in ["hybrid", "postcopy"].iter().enumerate() {
            let (from, to) = (leg.to_string(), (leg + 1).to_string());
            let next = Process::start(&place, &format!("d{to}"), &["--rate", "20M"]);
            let (there, address) = place.receive(&to, &["--device", &option(&next)]);
            let output = place.control(&from, &["migrate", "--to", &address, "--mode", mode]);
            assert_eq!(output.status.code(), Some(0), "{mode}: {}\n{}", stderr(&output), there.log());
            assert_eq!(here.end().code(), Some(0), "{}", here.log());
            (memory, here, process) = (Memory::of(&place, &to), there, next);
            wait_for_more(&memory, &format!("after a move by {mode}"));
        }
        assert_eq!(devices(&place, "2"), present(&["rng0", "vfio-user0"]), "slots and names are kept");
        unplug(&place, "2", "vfio-user0");
        assert!(!load(&memory).plugged);
        assert_eq!(devices(&place, "2"), present(&["rng0"]));
        // The same process, which finds its device as new.
        assert_eq!(plug(&place, "2", &process), "vfio-user0");
        wait_for_more(&memory, "after the second plug");
        memory.finish();
        assert_eq!(here.end().code(), Some(0), "{}", here.log());
        assert_eq!(memory.snapshot().phase(), Phase::Finished, "{:?}", memory.snapshot().failure);
        let last = load(&memory);
        assert_eq!(last.verified, last.received, "{last:?}");
        assert_eq!(process.summary()["faults"], 0);
    }
}

#[test]
fn a_device_of_the_start_can_go_one_comes_while_the_vm_is_paused_and_no_vm_moves_while_one_is_to_go() {
    if !kvm("a_device_of_the_start_can_go_one_comes_while_the_vm_is_paused_and_no_vm_moves_while_one_is_to_go") {
        return;
    }
    let place = Place::new();
    let (first, second) = (Process::start(&place, "a", &[]), Process::start(&place, "b", &[]));
    let guest = format!("{LISTENS} testdma_eject=1500");
    let vm = run(&place, &guest, &["--device", &option(&first)]);
    let memory = Memory::of(&place, "0");
    wait_for_more(&memory, "of the device it was started with");
    std::thread::scope(|scope| {
        let going = scope.spawn(|| unplug(&place, "0", "vfio-user0"));
        wait_for("the guest to be asked", || {
            (devices(&place, "0") == [("vfio-user0".to_string(), "unplugging".to_string())]).then_some(())
        });
        let said = refused(&place, "0", &["migrate", "--to", "tcp:127.0.0.1:1"]);
        assert!(said.contains("vfio-user0 is being unplugged"), "{said}");
        let said = refused(&place, "0", &["device-remove", "vfio-user0"]);
        assert!(said.contains("is being unplugged already"), "{said}");
        going.join().unwrap();
    });
    assert_eq!(place.control("0", &["pause"]).status.code(), Some(0));
    assert_eq!(plug(&place, "0", &second), "vfio-user0");
    assert_eq!(place.control("0", &["resume"]).status.code(), Some(0));
    wait_for_more(&memory, "of the device that came while the VM was paused");
    drop(vm);
}

/// What a process holds: kinds of descriptors, threads and maps, and how many there are of each.
fn holdings(vm: &Vm) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    let mut count = |what: String| *counts.entry(what).or_default() += 1;
    let of = |what: &str| std::fs::read_dir(format!("/proc/{}/{what}", vm.pid())).unwrap().flatten();
    for entry in of("fd") {
        let Ok(link) = std::fs::read_link(entry.path()) else { continue };
        let kind = link.to_string_lossy().split([':', '[']).next().unwrap().to_owned();
        count(format!("descriptor {kind}"));
    }
    for entry in of("task") {
        let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        // These come and go with requests.
        if !name.starts_with("api-worker") {
            count(format!("thread {}", name.trim()));
        }
    }
    for line in std::fs::read_to_string(format!("/proc/{}/maps", vm.pid())).unwrap().lines() {
        if line.contains("/memfd:") {
            count("map of a memfd".into());
        }
    }
    counts
}

#[test]
fn nothing_is_left_of_a_device_that_has_gone() {
    if !kvm("nothing_is_left_of_a_device_that_has_gone") {
        return;
    }
    let place = Place::new();
    let vm = run(&place, LISTENS, &[]);
    let memory = Memory::of(&place, "0");
    let process = Process::start(&place, "d", &[]);
    let mut before = None;
    for round in 0..4 {
        let name = plug(&place, "0", &process);
        assert_eq!(name, "vfio-user0", "its name is free again");
        wait_for_more(&memory, &format!("in round {round}"));
        let with = holdings(&vm);
        unplug(&place, "0", &name);
        let mut now = holdings(&vm);
        let before = before.get_or_insert_with(|| now.clone());
        // Connections of the commands end in their own time, also those counted before.
        wait_for(&format!("what is left of a device to go: {now:?} to be no more than {before:?}"), || {
            now = holdings(&vm);
            now.iter().all(|(what, count)| before.get(what).is_some_and(|had| count <= had)).then_some(())
        });
        before.clone_from(&now);
        assert!(with.get("thread vfio-user") > now.get("thread vfio-user"), "{with:?}");
    }
    let list = place.status("0").unwrap();
    assert_eq!(list["devices"], serde_json::json!([]));
}

#[test]
fn a_guest_that_does_not_let_go_keeps_its_device_until_it_does() {
    if !kvm("a_guest_that_does_not_let_go_keeps_its_device_until_it_does") {
        return;
    }
    for (guest, hint, goes) in [
        (DEAF.to_owned(), "it does not listen", false),
        (format!("{LISTENS} testdma_eject=2500"), "though it was told", true),
    ] {
        let place = Place::new();
        let _vm = run(&place, &guest, &[]);
        let process = Process::start(&place, "d", &[]);
        let name = plug(&place, "0", &process);
        let memory = Memory::of(&place, "0");
        if goes {
            wait_for_more(&memory, "before the device is to go");
        }
        let said = refused(&place, "0", &["device-remove", &name, "--timeout", "1"]);
        assert!(said.contains("has not let go of vfio-user0 within 1000 ms") && said.contains(hint), "{said}");
        if goes {
            wait_for("the device to go when the guest lets it go", || devices(&place, "0").is_empty().then_some(()));
            assert!(!load(&memory).plugged);
        } else {
            assert_eq!(devices(&place, "0"), present(&["vfio-user0"]));
            let paused = place.control("0", &["pause"]);
            assert_eq!(paused.status.code(), Some(0), "{}", stderr(&paused));
            let said = refused(&place, "0", &["device-remove", &name, "--timeout", "1"]);
            assert!(said.contains("while the VM is paused"), "{said}");
        }
    }
}

#[test]
fn what_cannot_be_plugged_or_unplugged_is_named_and_changes_nothing() {
    if !kvm("what_cannot_be_plugged_or_unplugged_is_named_and_changes_nothing") {
        return;
    }
    let place = Place::new();
    let (disk, mute, liar) = (place.path("disk"), place.path("mute"), place.path("liar"));
    std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let _mute = UnixListener::bind(&mute).unwrap();
    let lies = UnixListener::bind(&liar).unwrap();
    let liar_thread = std::thread::spawn(move || {
        // It answers before it is asked, and not what it is asked for.
        let mut stream = lies.accept().unwrap().0;
        let _ = stream.write_all(&[0xff; 64]);
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    let vm = run(&place, LISTENS, &["--disk", disk.to_str().unwrap()]);
    let process = Process::start(&place, "d", &[]);
    let crashes = Process::start(&place, "crashes", &["--fault", "crash=dma-map"]);
    plug(&place, "0", &process);
    let memory = Memory::of(&place, "0");
    wait_for_more(&memory, "of the device that works");
    let before = holdings(&vm);
    for (socket, hint) in [
        (place.path("none"), "No such file"),
        (disk.clone(), "Connection refused"),
        (mute, "no answer to Version within"),
        (liar, "liar"),
        (crashes.socket.clone(), "crashes.sock"),
        (process.socket.clone(), "vfio-user0 is connected to"),
    ] {
        let device = format!("vfio-user={}", socket.display());
        let said = refused(&place, "0", &["device-add", &device]);
        assert!(said.contains(&device) && said.contains(hint), "{said}");
    }
    liar_thread.join().unwrap();
    for (name, hint) in [("vfio-user7", "there are vfio-user0"), ("disk0", "disk0 cannot be unplugged")] {
        let said = refused(&place, "0", &["device-remove", name]);
        assert!(said.contains(hint), "{said}");
    }
    for wrong in ["vhost-user-blk=/s", "vfio-user=", "floppy=/s"] {
        assert_eq!(place.control("0", &["device-add", wrong]).status.code(), Some(2), "{wrong}");
    }
    assert_eq!(devices(&place, "0"), present(&["disk0", "vfio-user0"]));
    wait_for("what was begun to be undone", || (holdings(&vm) == before).then_some(()));
    wait_for_more(&memory, "after all that");
}

#[test]
fn a_full_bus_takes_no_device_and_two_plugs_at_once_do_not_mix() {
    if !kvm("a_full_bus_takes_no_device_and_two_plugs_at_once_do_not_mix") {
        return;
    }
    let place = Place::new();
    let image = place.path("image");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let disk = format!("{},ro", image.display());
    let disks = ["--disk", disk.as_str()].repeat(29);
    let _vm = run(&place, DEAF, &disks);
    let processes = ["a", "b", "c"].map(|name| Process::start(&place, name, &[]));
    // Two slots are free. Whoever comes while the other is being plugged is told so, and tries again.
    std::thread::scope(|scope| {
        for process in &processes[..2] {
            let place = &place;
            scope.spawn(move || {
                wait_for("a turn", || {
                    let output = place.control("0", &["device-add", &option(process)]);
                    let said = stderr(&output);
                    assert!(output.status.success() || said.contains("another request is plugging"), "{said}");
                    output.status.success().then_some(())
                });
            });
        }
    });
    let there = devices(&place, "0");
    assert_eq!(there[29..], present(&["vfio-user0", "vfio-user1"]));
    let said = refused(&place, "0", &["device-add", &option(&processes[2])]);
    assert!(said.contains("no free device number"), "{said}");
    assert_alive(&place, "0");
}

#[test]
fn a_device_whose_process_dies_is_still_let_go_and_its_place_is_free() {
    if !kvm("a_device_whose_process_dies_is_still_let_go_and_its_place_is_free") {
        return;
    }
    let place = Place::new();
    let _vm = run(&place, LISTENS, &[]);
    let memory = Memory::of(&place, "0");
    let process = Process::start(&place, "d", &[]);
    let name = plug(&place, "0", &process);
    wait_for_more(&memory, "before its process dies");
    drop(process);
    unplug(&place, "0", &name);
    assert_eq!(devices(&place, "0"), []);
    let next = Process::start(&place, "e", &[]);
    assert_eq!(plug(&place, "0", &next), name);
    wait_for_more(&memory, "of the next device");
}

#[test]
fn nothing_comes_or_goes_while_a_vm_moves_and_what_its_guest_lets_go_then_is_taken_away_there() {
    if !kvm("nothing_comes_or_goes_while_a_vm_moves_and_what_its_guest_lets_go_then_is_taken_away_there") {
        return;
    }
    let place = Place::new();
    let mut here = run(&place, &format!("{LISTENS} testdma_eject=4000"), &[]);
    let memory = Memory::of(&place, "0");
    // It writes more than the link takes: the move ends when the guest has let it go.
    let more = ["--rate", "50M"];
    let (first, second) = (Process::start(&place, "d0", &more), Process::start(&place, "d1", &more));
    let third = Process::start(&place, "d2", &[]);
    let name = plug(&place, "0", &first);
    wait_for_more(&memory, "before the move");
    let said = refused(&place, "0", &["device-remove", &name, "--timeout", "1"]);
    assert!(said.contains("though it was told"), "{said}");
    let (there, address) = place.receive("1", &["--device", &option(&second)]);
    let limits = ["--mode", "precopy", "--bandwidth", "8M", "--downtime-limit", "20"];
    std::thread::scope(|scope| {
        let moving = scope.spawn(|| place.control("0", &[&["migrate", "--to", &address], &limits[..]].concat()));
        wait_for("the move to begin", || {
            let phase = place.ask("0", "/migration")?["phase"].clone();
            (phase == "precopy").then_some(())
        });
        for arguments in [["device-add", &option(&third)], ["device-remove", &name]] {
            let said = refused(&place, "0", &arguments);
            assert!(said.contains("it is migrating"), "{said}");
        }
        wait_for("the guest to let it go during the move", || {
            (devices(&place, "0") == [(name.clone(), "ejected".to_string())]).then_some(())
        });
        let output = moving.join().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}\n{}", stderr(&output), there.log());
    });
    assert_eq!(here.end().code(), Some(0), "{}", here.log());
    wait_for("it to be taken away at the destination", || devices(&place, "1").is_empty().then_some(()));
    let memory = Memory::of(&place, "1");
    assert!(!load(&memory).plugged);
    assert_eq!(plug(&place, "1", &third), name);
    wait_for_more(&memory, "at the destination");
}

#[test]
fn a_device_that_comes_beside_one_that_works_leaves_it_alone_and_moves_with_it() {
    if !kvm("a_device_that_comes_beside_one_that_works_leaves_it_alone_and_moves_with_it") {
        return;
    }
    let place = Place::new();
    let start = |side: &str| [0, 1].map(|n| Process::start(&place, &format!("{side}{n}"), &["--state-size", "1M"]));
    let more = |memory: &Memory, what: &str| {
        let before = load(memory).received;
        wait_for(&format!("{BUFFERS} buffers {what}"), || (load(memory).received >= before + BUFFERS).then_some(()));
    };
    let mut serving = start("a");
    let mut vm = run(&place, "data=1M rate=0 testdma=ring", &["--device", &option(&serving[0])]);
    let memory = Memory::of(&place, "0");
    more(&memory, "before another device comes");
    assert_eq!(plug(&place, "0", &serving[1]), "vfio-user1");
    more(&memory, "after that");
    for (leg, mode) in ["precopy", "postcopy"].iter().enumerate() {
        let (from, to) = (leg.to_string(), (leg + 1).to_string());
        let next = start(&format!("b{to}"));
        let options = next.each_ref().map(option);
        let (there, address) = place.receive(&to, &["--device", &options[0], "--device", &options[1]]);
        let output = place.control(&from, &["migrate", "--to", &address, "--mode", mode]);
        assert_eq!(output.status.code(), Some(0), "{mode}: {}\n{}", stderr(&output), there.log());
        assert_eq!(vm.end().code(), Some(0), "{}", vm.log());
        (vm, serving) = (there, next);
        more(&Memory::of(&place, &to), &format!("after a move by {mode}"));
        wait_for("the destination to be done", || (place.status(&to)?["job"]["phase"] == "done").then_some(()));
        assert_eq!(devices(&place, &to), present(&["vfio-user0", "vfio-user1"]));
    }
    drop(vm);
    assert_eq!(serving.map(|process| process.summary()["loads"].clone()), [2, 2]);
}
