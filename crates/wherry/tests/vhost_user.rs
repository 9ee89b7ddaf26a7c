//! VMs whose disk is served by another process, one at each end of a move: by `qemu-storage-daemon`, which nobody here wrote,
//! and by `wherry device blk`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, Output, Stdio};

use serde_json::Value;
use support::disk::Memory;
use support::vhost::{Daemon, Program, able};
use support::{Place, Vm, assert_alive, stderr, wait_for};
use wherry_guest::disk::BLOCK_BYTES;
use wherry_guest::report::Phase;

const IMAGE: u64 = 32 << 20;

fn image(place: &Place) -> PathBuf {
    let path = place.path("disk");
    File::create(&path).unwrap().set_len(IMAGE).unwrap();
    path
}

fn run(place: &Place, device: &str, disk: &str) -> Vm {
    let cmdline = format!("data=16M rate=4M {disk}");
    place.run_guest("0", &["--memory", "64M", "--cmdline", &cmdline, "--device", device], &[])
}

fn migrate(place: &Place, api: &str, to: &str, mode: &str) -> Output {
    place.control(api, &["migrate", "--to", to, "--json", "--mode", mode])
}

/// How often a guest is moved: `WHERRY_VHOST_MOVES`, 5 unless told.
fn moves() -> usize {
    std::env::var("WHERRY_VHOST_MOVES").ok().and_then(|moves| moves.parse().ok()).unwrap_or(5)
}

/// Moves a guest with a busy disk by all modes in turn, and compares every byte at the end.
fn moves_with(program: Program, disk: &str) {
    let place = Place::new();
    let image = image(&place);
    let mut daemon = Daemon::serve(&place, "d0", &image, program);
    let mut here = run(&place, &daemon.device(), disk);
    let mut memory = Memory::of(&place, "0");
    memory.wait_for_requests("before the first move");
    let modes = ["precopy", "postcopy", "hybrid", "postcopy", "precopy"].into_iter().cycle();
    for (leg, mode) in modes.take(moves()).enumerate() {
        let (from, to) = (leg.to_string(), (leg + 1).to_string());
        let next = Daemon::serve(&place, &format!("d{to}"), &image, program);
        let (there, address) = place.receive(&to, &["--device", &next.device()]);
        let output = migrate(&place, &from, &address, mode);
        assert_eq!(output.status.code(), Some(0), "{mode}: {}", stderr(&output));
        let job: Value = serde_json::from_slice(&output.stdout).unwrap();
        println!("{mode}: I/O stall {} us, blackout {}", job["io_stall_us"], job["blackout"]);
        if mode == "postcopy" {
            let sources = job["postcopy"]["sources"].as_array().unwrap();
            println!("faults of the back end: {sources:?}");
            assert!(sources.iter().all(|source| source["quarantined"].is_null()), "{sources:?}");
        }
        assert_eq!(here.end().code(), Some(0), "{}", here.log());
        (memory, here, daemon) = (Memory::of(&place, &to), there, next);
        let after = memory.wait_for_requests(&format!("after a move by {mode}"));
        assert!(after.flushes > 0, "{after:?}");
        wait_for("requests to be under way", || (memory.disk().in_flight > 0).then_some(()));
    }
    memory.finish();
    assert_eq!(here.end().code(), Some(0), "{}", here.log());
    assert_eq!(memory.snapshot().phase(), Phase::Finished);
    let compared = memory.compare(&File::open(image).unwrap(), 1);
    assert!(compared > IMAGE / BLOCK_BYTES / 8, "only {compared} blocks were ever written");
    drop(daemon);
}

#[test]
fn a_disk_of_another_process_moves_by_every_mode_and_not_a_byte_or_interrupt_is_lost() {
    if able("a_disk_of_another_process_moves_by_every_mode_and_not_a_byte_or_interrupt_is_lost", Program::Qemu) {
        moves_with(Program::Qemu, "disk=32M disk_depth=64 disk_wait=interrupt");
    }
}

#[test]
fn a_disk_of_another_process_whose_driver_polls_moves_by_every_mode_and_not_a_byte_is_lost() {
    if able("a_disk_of_another_process_whose_driver_polls_moves_by_every_mode_and_not_a_byte_is_lost", Program::Qemu) {
        moves_with(Program::Qemu, "disk=32M disk_depth=64 disk_wait=poll");
    }
}

#[test]
fn a_back_end_that_is_killed_is_named_and_the_vm_lives() {
    let test = "a_back_end_that_is_killed_is_named_and_the_vm_lives";
    if !able(test, Program::Qemu) {
        return;
    }
    let place = Place::new();
    let image = image(&place);
    let mut daemon = Daemon::serve(&place, "d0", &image, Program::Qemu);
    let here = run(&place, &daemon.device(), "disk=32M disk_depth=64 disk_wait=interrupt");
    let memory = Memory::of(&place, "0");
    memory.wait_for_requests("before its end");
    daemon.kill();
    wait_for("the back end to be missed", || {
        let log = here.log();
        (log.contains("back end is lost") && log.contains(daemon.socket.to_str().unwrap())).then_some(())
    });
    let beat = |memory: &Memory| memory.snapshot().cpus.first().unwrap().heartbeat;
    let before = beat(&memory);
    wait_for("the guest to work on", || (beat(&memory) > before + 2).then_some(()));
    place.wait_for_state("0", "running");
}

/// `wherry migrate` in the background, held to a rate at which it takes a while.
fn migrate_slowly(place: &Place, to: &str, mode: &str) -> Child {
    let api = place.path("0");
    let arguments = ["migrate", "--json", "--bandwidth", "20M", "--mode", mode, "--to", to, "--api"];
    let mut command = place.command(&arguments);
    command.arg(api).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Kills a back end in the middle of a move of a VM with 48 MiB of data: the VM arrives, lives, and all of its data is right.
fn killed_during(program: Program, mode: &str, phase: &str, killed: usize) {
    let place = Place::new();
    let image = image(&place);
    let mut daemons = ["d0", "d1"].map(|name| Daemon::serve(&place, name, &image, program));
    let cmdline = "data=48M rate=1M disk=32M disk_depth=32 disk_wait=interrupt";
    let arguments = ["--memory", "96M", "--cmdline", cmdline, "--device", &daemons[0].device()];
    let here = place.run_guest("0", &arguments, &[]);
    Memory::of(&place, "0").wait_for_requests("before the move");
    let (there, address) = place.receive("1", &["--device", &daemons[1].device()]);
    let migration = migrate_slowly(&place, &address, mode);
    let process = ["0", "1"][killed];
    wait_for(&format!("phase {phase}"), || place.status(process).filter(|s| s["job"]["phase"] == phase));
    if killed == 1 {
        // Whether it faults depends on what the guest has touched before.
        wait_for("the back end to take part", || {
            let status = place.status("1")?;
            let sources = status["job"]["postcopy"]["sources"].as_array()?.clone();
            sources
                .iter()
                .any(|source| source["name"].as_str().is_some_and(|n| n.starts_with("vhost-user")))
                .then_some(())
        });
    }
    daemons[killed].kill();
    let output = migration.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let log = if killed == 0 { here.log() } else { there.log() };
    assert!(log.contains("back end is lost") && log.contains(daemons[killed].socket.to_str().unwrap()), "{log}");
    place.wait_for_state("1", "running");
    let memory = Memory::of(&place, "1");
    let checked = |memory: &Memory| {
        let snapshot = memory.snapshot();
        assert!(snapshot.failure.is_none(), "{:?}", snapshot.failure);
        snapshot.cpus.first().unwrap().heartbeat
    };
    let before = checked(&memory);
    wait_for("the guest to work on, and find its data right", || (checked(&memory) > before + 100).then_some(()));
}

#[test]
fn a_back_end_that_is_killed_during_precopy_does_not_keep_the_vm_from_moving() {
    if able("a_back_end_that_is_killed_during_precopy_does_not_keep_the_vm_from_moving", Program::Qemu) {
        killed_during(Program::Qemu, "precopy", "precopy", 0);
    }
}

#[test]
fn a_back_end_that_is_killed_while_memory_follows_does_not_keep_the_rest_from_coming() {
    if able("a_back_end_that_is_killed_while_memory_follows_does_not_keep_the_rest_from_coming", Program::Qemu) {
        killed_during(Program::Qemu, "postcopy", "postcopy", 1);
    }
}

#[test]
fn a_destination_without_the_right_back_end_is_refused_by_name_and_the_vm_runs_on() {
    let test = "a_destination_without_the_right_back_end_is_refused_by_name_and_the_vm_runs_on";
    if !able(test, Program::Qemu) {
        return;
    }
    let place = Place::new();
    let image = image(&place);
    let daemon = Daemon::serve(&place, "d0", &image, Program::Qemu);
    let _here = run(&place, &daemon.device(), "disk=32M disk_depth=64");
    let memory = Memory::of(&place, "0");
    let small = place.path("small");
    File::create(&small).unwrap().set_len(1 << 20).unwrap();
    let small = Daemon::serve(&place, "small.sock", &small, Program::Qemu);
    let mute = UnixListener::bind(place.path("mute")).unwrap();
    let (nobody, mute_device) =
        ("vhost-user-blk=/nonexistent", format!("vhost-user-blk={}", place.path("mute").display()));
    let wrong: [(&[&str], &[&str]); 4] = [
        (&[], &["vhost-user device 0", "give `receive` a --device"]),
        (&["--device", &small.device()], &["65536 sectors, not 2048"]),
        (&["--device", nobody], &["connecting", "/nonexistent"]),
        (&["--device", &mute_device], &["no answer to GetFeatures", "mute"]),
    ];
    for (n, (devices, words)) in wrong.into_iter().enumerate() {
        let api = format!("r{n}");
        let (_there, address) = place.receive(&api, devices);
        let output = migrate(&place, "0", &address, "hybrid");
        assert_eq!(output.status.code(), Some(1), "{devices:?}");
        assert!(words.iter().all(|word| stderr(&output).contains(word)), "{devices:?}: {}", stderr(&output));
    }
    drop(mute);
    memory.wait_for_requests("after refused moves");
}

/// One message: header and payload.
fn message(stream: &mut impl Read) -> Option<Vec<u8>> {
    let mut message = vec![0; 12];
    stream.read_exact(&mut message).ok()?;
    let bytes = u32::from_ne_bytes(message[8..].try_into().unwrap());
    message.resize(12 + bytes as usize, 0);
    stream.read_exact(&mut message[12..]).ok()?;
    Some(message)
}

/// Between a front end and a daemon: hides the features PAGEFAULT and BACKEND_REQ, with which a descriptor comes, and passes everything else on until memory is shown.
fn without_page_faults(place: &Place, daemon: &Daemon) -> (String, std::thread::JoinHandle<()>) {
    let path = place.path("filtered");
    let listener = UnixListener::bind(&path).unwrap();
    let socket = daemon.socket.clone();
    let thread = std::thread::spawn(move || {
        let mut front = listener.accept().unwrap().0;
        let mut back = std::os::unix::net::UnixStream::connect(socket).unwrap();
        // No descriptor goes this way before memory is shown, and it never is.
        while let Some(message) = message(&mut front) {
            back.write_all(&message).unwrap();
            let request = message[0];
            // Set features, set owner and set protocol features have no answer.
            if [2, 3, 16].contains(&request) {
                continue;
            }
            let mut answer = self::message(&mut back).unwrap();
            if request == 15 {
                answer[12] &= !(1 << 5);
                answer[13] &= !1;
            }
            front.write_all(&answer).unwrap();
        }
    });
    (format!("vhost-user-blk={}", path.display()), thread)
}

#[test]
fn a_back_end_that_takes_no_part_in_postcopy_is_named() {
    let test = "a_back_end_that_takes_no_part_in_postcopy_is_named";
    if !able(test, Program::Qemu) {
        return;
    }
    let place = Place::new();
    let image = image(&place);
    let daemon = Daemon::serve(&place, "d0", &image, Program::Qemu);
    let _here = run(&place, &daemon.device(), "disk=32M disk_depth=64");
    let memory = Memory::of(&place, "0");
    let other = Daemon::serve(&place, "d1", &image, Program::Qemu);
    let (device, filter) = without_page_faults(&place, &other);
    let (there, address) = place.receive("1", &["--device", &device]);
    let output = migrate(&place, "0", &address, "postcopy");
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let said = stderr(&output);
    assert!(said.contains("PAGEFAULT") && said.contains("filtered"), "{said}");
    memory.wait_for_requests("after the refused move");
    drop(there);
    filter.join().unwrap();
}

#[test]
fn a_balloon_beside_a_disk_of_another_process_gives_no_memory_back_and_names_that_process() {
    let test = "a_balloon_beside_a_disk_of_another_process_gives_no_memory_back_and_names_that_process";
    if !able(test, Program::Qemu) {
        return;
    }
    let place = Place::new();
    let daemon = Daemon::serve(&place, "s", &image(&place), Program::Qemu);
    let arguments = ["--memory", "64M", "--cmdline", "data=16M rate=4M", "--device", &daemon.device(), "--balloon"];
    let _here = place.run_guest("0", &arguments, &[]);
    let output = place.control("0", &["balloon", "--size", "32M"]);
    assert_eq!(output.status.code(), Some(1));
    let socket = daemon.socket.display().to_string();
    assert!(stderr(&output).contains(&socket) && stderr(&output).contains("pinned"), "{}", stderr(&output));
    assert_alive(&place, "0");
}

#[test]
fn a_disk_of_our_own_back_end_moves_by_every_mode_and_not_a_byte_or_interrupt_is_lost() {
    if able("a_disk_of_our_own_back_end_moves_by_every_mode_and_not_a_byte_or_interrupt_is_lost", Program::Wherry) {
        moves_with(Program::Wherry, "disk=32M disk_depth=64 disk_wait=interrupt");
        moves_with(Program::Wherry, "disk=32M disk_depth=64 disk_wait=poll");
    }
}

#[test]
fn our_own_back_end_may_be_killed_while_memory_follows() {
    if able("our_own_back_end_may_be_killed_while_memory_follows", Program::Wherry) {
        killed_during(Program::Wherry, "postcopy", "postcopy", 1);
    }
}

/// How often a back end is killed: `WHERRY_VHOST_KILLS`, 4 unless told.
fn kills() -> usize {
    std::env::var("WHERRY_VHOST_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(4)
}

#[test]
fn the_next_back_end_goes_on_with_what_a_killed_one_has_left_and_the_guest_does_not_notice() {
    let test = "the_next_back_end_goes_on_with_what_a_killed_one_has_left_and_the_guest_does_not_notice";
    if !able(test, Program::Wherry) {
        return;
    }
    for disk in ["disk=32M disk_depth=64 disk_wait=interrupt", "disk=32M disk_depth=64 disk_wait=poll"] {
        let place = Place::new();
        let image = image(&place);
        let mut daemon = Daemon::serve(&place, "d0", &image, Program::Wherry);
        let mut here = run(&place, &daemon.device(), disk);
        let memory = Memory::of(&place, "0");
        memory.wait_for_requests("before the first end");
        for kill in 0..kills() {
            daemon.kill();
            std::fs::remove_file(&daemon.socket).unwrap();
            daemon = Daemon::serve(&place, "d0", &image, Program::Wherry);
            memory.wait_for_requests(&format!("after end {kill} of its back end"));
        }
        // A move in the middle of it, with other back ends at both ends.
        let next = Daemon::serve(&place, "d1", &image, Program::Wherry);
        let (mut there, address) = place.receive("1", &["--device", &next.device()]);
        let output = migrate(&place, "0", &address, "hybrid");
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert_eq!(here.end().code(), Some(0), "{}", here.log());
        assert!(!here.log().contains("needs a reset"), "{}", here.log());
        let memory = Memory::of(&place, "1");
        memory.wait_for_requests("after a move");
        memory.finish();
        assert_eq!(there.end().code(), Some(0), "{}", there.log());
        assert_eq!(memory.snapshot().phase(), Phase::Finished);
        assert!(memory.compare(&File::open(image).unwrap(), 1) > IMAGE / BLOCK_BYTES / 8);
    }
}

#[test]
fn a_vm_whose_back_end_has_gone_stays_where_it_is_until_the_next_one_comes() {
    let test = "a_vm_whose_back_end_has_gone_stays_where_it_is_until_the_next_one_comes";
    if !able(test, Program::Wherry) {
        return;
    }
    let place = Place::new();
    let image = image(&place);
    let mut daemon = Daemon::serve(&place, "d0", &image, Program::Wherry);
    let here = run(&place, &daemon.device(), "disk=32M disk_depth=64 disk_wait=interrupt");
    let memory = Memory::of(&place, "0");
    memory.wait_for_requests("before the end");
    daemon.kill();
    wait_for("the back end to be missed", || here.log().contains("wait for the next one").then_some(()));
    let next = Daemon::serve(&place, "d1", &image, Program::Wherry);
    let (_there, address) = place.receive("1", &["--device", &next.device()]);
    let output = migrate(&place, "0", &address, "precopy");
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let said = stderr(&output);
    assert!(said.contains("has gone, with requests under way") && said.contains("d0"), "{said}");
    // One with another disk cannot go on; it is refused by name, and the device needs a reset.
    place.wait_for_state("0", "running");
    std::fs::remove_file(&daemon.socket).unwrap();
    let small = place.path("small");
    File::create(&small).unwrap().set_len(1 << 20).unwrap();
    let _small = Daemon::serve(&place, "d0", &small, Program::Wherry);
    wait_for("the wrong disk to be named", || here.log().contains("its disk has another size").then_some(()));
}

#[test]
fn a_disk_with_tables_is_not_served_by_a_process_that_may_be_replaced() {
    let place = Place::new();
    let output = place.wherry(&["device", "blk", "--socket", "s", "--image", "disk,format=qcow2"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("only raw images"), "{}", stderr(&output));
}
