//! `wherry demo`, as a person or a program would run it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::process::Stdio;

use support::{Place, kvm, stderr, wait_for};

/// Processes whose command line names this demo's parent.
fn children_of(pid: u32) -> Vec<u32> {
    let mut children = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(child) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let line = std::fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
        if line.contains(&format!("--die-with\0{pid}\0")) {
            children.push(child);
        }
    }
    children
}

/// Directories that the demo with this process id has made.
fn directories_of(pid: u32) -> Vec<std::path::PathBuf> {
    let places = [std::path::PathBuf::from("/dev/shm"), std::env::temp_dir()];
    let entries = places.iter().filter_map(|p| std::fs::read_dir(p).ok()).flatten().flatten();
    let prefix = format!("wherry-demo-{pid}-");
    entries.filter(|e| e.file_name().to_string_lossy().starts_with(&prefix)).map(|e| e.path()).collect()
}

#[test]
fn the_demo_moves_a_guest_and_proves_that_nothing_was_lost() {
    if !kvm("the_demo_moves_a_guest_and_proves_that_nothing_was_lost") {
        return;
    }
    let place = Place::new();
    let arguments = ["demo", "--json", "--memory", "128M", "--data", "64M", "--rate", "10M", "--legs", "4"];
    let demo = place.command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = demo.id();
    let output = demo.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let outcome: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(outcome["ok"], true, "{outcome:#}");
    assert_eq!(outcome["errors"], 0);
    assert_eq!(outcome["data_pages"], (64 << 20) / 4096);
    assert!(outcome["pages_verified"].as_u64().is_some_and(|n| n > 0), "{outcome:#}");
    let update = &outcome["update"];
    assert_ne!(update["from_pid"], update["to_pid"]);
    assert!(update["blackout_us"].as_u64().unwrap() > 0, "{update}");
    let legs = outcome["legs"].as_array().unwrap();
    let kinds: Vec<_> = legs.iter().map(|leg| leg["kind"].as_str().unwrap()).collect();
    match wherry_fault::Userfault::open() {
        Ok(_) => {
            assert_eq!(kinds, ["plain", "postcopy", "cut", "hashed"]);
            assert!(legs[1]["job"]["postcopy"]["duration_us"].as_u64().is_some_and(|us| us > 0), "{:#}", legs[1]);
        }
        Err(_) => assert_eq!(kinds, ["plain", "plain", "plain", "hashed"]),
    }
    for leg in legs {
        assert!(leg["blackout_us"].as_u64().is_some_and(|us| us > 0), "{leg:#}");
        assert!(leg["guest_gap_us"].as_u64().is_some_and(|us| us > 0), "{leg:#}");
    }
    assert_eq!(directories_of(pid), Vec::<std::path::PathBuf>::new(), "left behind");
}

#[test]
fn the_demo_has_an_accelerator_move_along_and_every_job_is_right() {
    if !kvm("the_demo_has_an_accelerator_move_along_and_every_job_is_right") {
        return;
    }
    let place = Place::new();
    let arguments = ["demo", "--json", "--accel", "--memory", "128M", "--data", "32M", "--rate", "10M", "--legs", "3"];
    let demo = place.command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = demo.id();
    let output = demo.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let outcome: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let jobs = &outcome["accelerator"];
    assert_eq!((&outcome["ok"], &jobs["errors"]), (&true.into(), &0.into()), "{outcome:#}");
    assert_eq!(jobs["workers"], serde_json::json!([2, 1, 4, 3]));
    let classes = jobs["by_class"].as_array().unwrap();
    assert!(classes.len() == 5 && classes.iter().all(|class| class[1].as_u64() > Some(0)), "{jobs:#}");
    assert_eq!(children_of(pid), Vec::<u32>::new());
    assert_eq!(directories_of(pid), Vec::<std::path::PathBuf>::new(), "left behind");
}

#[test]
fn an_interrupted_demo_leaves_no_process_behind() {
    if !kvm("an_interrupted_demo_leaves_no_process_behind") {
        return;
    }
    let place = Place::new();
    for signal in [rustix::process::Signal::INT, rustix::process::Signal::KILL] {
        let mut demo = place
            .command(&["demo", "--accel", "--memory", "128M", "--data", "64M", "--legs", "1000"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let pid = demo.id();
        wait_for("a process of the demo", || (!children_of(pid).is_empty()).then_some(()));
        rustix::process::kill_process(rustix::process::Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
        let status = demo.wait().unwrap();
        assert!(!status.success());
        wait_for("the processes of the demo to end", || children_of(pid).is_empty().then_some(()));
        if signal == rustix::process::Signal::INT {
            assert_eq!(directories_of(pid), Vec::<std::path::PathBuf>::new(), "left behind");
        }
        // Nobody can tidy up after SIGKILL but us.
        directories_of(pid).iter().for_each(|d| std::fs::remove_dir_all(d).unwrap());
    }
}
