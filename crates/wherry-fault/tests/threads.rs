//! What a service leaves behind. One test, alone in its process, because it counts the threads and descriptors of the
//! whole process.

#![allow(clippy::unwrap_used, reason = "a failure is a panic here")]

mod support;

use std::sync::Arc;

use support::{BLOCK, Lab, PAGE, Sharer, permitted, until};
use wherry_fault::{Mode, Way};
use wherry_memory::{BlockSpec, PageSize, Ram};

fn threads() -> Vec<String> {
    let names = std::fs::read_dir("/proc/self/task").unwrap();
    let mut names: Vec<_> = names
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .map(|name| name.trim_end().to_string())
        .filter(|name| name.starts_with("wherry"))
        .collect();
    names.sort();
    names
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn a_service_that_ends_leaves_no_thread_and_no_descriptor() {
    if permitted().is_none() {
        return;
    }
    let spec = BlockSpec { id: BLOCK, guest_base: 0, size: 64 * PAGE, page_size: PageSize::Base };
    for complete in [true, false] {
        let ram = Arc::new(Ram::create(&[spec]).unwrap());
        let sharer = Sharer::new(&ram.blocks()[0], Some(Mode::MISSING));
        let before = descriptors();
        let lab = Lab::over(ram.clone());
        lab.service.set_way(BLOCK, Way::Copy).unwrap();
        let handed_over = sharer.handed_over();
        let with_source = descriptors();
        let id = lab.service.add_source("disk", handed_over, sharer.table()).unwrap();
        lab.service.start_mapper().unwrap();
        until("the mapper ends with its pass", || threads() == ["wherry-fault"]);
        let touch = lab.touch(3);
        lab.wanted();
        if complete {
            lab.receive_copy(0..64, 1);
            assert_eq!(touch.bytes(), (1, 1));
            lab.service.remove_source(id).unwrap();
            assert_eq!(descriptors(), with_source - 1, "the descriptor of a removed source is open");
            lab.service.unregister_guest_maps().unwrap();
        }
        drop(lab);
        assert!(threads().is_empty(), "left: {:?}", threads());
        if !complete {
            assert_eq!(touch.bytes(), (0, 0), "who waited is let go, and finds nothing");
        }
        until("the descriptors are closed", || descriptors() == before);
    }
}
