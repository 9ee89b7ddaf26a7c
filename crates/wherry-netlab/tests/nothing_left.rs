//! A network leaves nothing behind. One test, alone in its process, because it counts what the whole process has.
#![expect(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::time::{Duration, Instant};

use wherry_netlab::{Network, Shape};

fn namespaces() -> Vec<String> {
    let prefix = format!("wherry-lab-{}-", std::process::id());
    let entries = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().into_string().ok()).filter(|n| n.starts_with(&prefix)).collect()
}

fn counted() -> (usize, usize) {
    let count = |what: &str| std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
    (count("fd"), count("task"))
}

#[test]
fn a_network_that_is_dropped_leaves_no_namespace_no_thread_and_no_descriptor_also_by_a_panic() {
    if let Some(what) = wherry_netlab::missing() {
        println!("SKIPPED: {what}");
        return;
    }
    let before = counted();
    let networks = (Network::new().unwrap(), Network::shaped(Shape::new(Duration::ZERO, 1 << 20)).unwrap());
    assert_eq!(namespaces().len(), 4);
    assert!(counted().1 >= before.1 + 2);
    drop(networks);
    assert_eq!(namespaces(), [""; 0]);
    let panicked = std::panic::catch_unwind(|| {
        let _network = Network::shaped(Shape::new(Duration::ZERO, 1 << 20)).unwrap();
        assert_eq!(namespaces().len(), 2);
        panic!("on purpose");
    });
    assert!(panicked.is_err());
    assert_eq!(namespaces(), [""; 0]);
    // A thread that was joined may stay in the table for a moment.
    let deadline = Instant::now() + Duration::from_secs(10);
    while counted() != before {
        assert!(Instant::now() < deadline, "waited for descriptors and threads to be {before:?}: {:?}", counted());
        std::thread::yield_now();
    }
}
