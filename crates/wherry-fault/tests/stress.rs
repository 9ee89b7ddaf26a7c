//! Many threads fault on the same and on different pages while channels fill; every byte is verified.

#![allow(clippy::unwrap_used, reason = "a failure is a panic here")]

mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use support::{BLOCK, DEADLINE, PAGE, Sharer, Touch, permitted};
use wherry_fault::{FaultService, Mode, Requester, SourceId, Wanted, Way};
use wherry_memory::{Block, BlockSpec, PageSize, Ram};

/// Forwards requests to the urgent channel, and counts them for each page.
struct Urgent {
    pages: Mutex<Sender<u64>>,
    counts: Vec<AtomicU64>,
}

impl Requester for Urgent {
    fn request(&self, pages: &[Wanted]) {
        for page in pages {
            self.counts[page.page as usize].fetch_add(1, Ordering::Relaxed);
            // The channel ends when everything is there.
            let _ = self.pages.lock().unwrap().send(page.page);
        }
    }
}

/// What the source has in a page; every seventh is zero.
fn content(page: u64) -> u8 {
    if page % 7 == 3 { 0 } else { (page % 251) as u8 + 1 }
}

fn fill(service: &FaultService, block: &Block, pages: std::ops::Range<u64>) {
    let fill = service.fill(BLOCK).unwrap();
    for run in service.states(BLOCK).unwrap().claim_range(pages) {
        let mut start = run.start;
        while start < run.end {
            let zero = content(start) == 0;
            let end = (start..run.end).find(|page| (content(*page) == 0) != zero).unwrap_or(run.end);
            if zero {
                service.received_zero(BLOCK, start..end).unwrap();
            } else if fill.way() == Way::InPlace {
                for page in start..end {
                    write(block, page);
                }
                service.received(BLOCK, start..end).unwrap();
            } else {
                let staged: Vec<u8> =
                    (start..end).flat_map(|page| std::iter::repeat_n(content(page), PAGE as usize)).collect();
                service.received_copy(BLOCK, start..end, &staged).unwrap();
            }
            start = end;
        }
    }
}

#[expect(unsafe_code, reason = "writes through the engine map as a channel does")]
fn write(block: &Block, page: u64) {
    let at = block.engine_range(page * PAGE, PAGE).unwrap();
    // SAFETY: one page inside the engine map, claimed by the caller.
    unsafe { at.write_bytes(content(page), PAGE as usize) };
}

#[expect(unsafe_code, reason = "reads and writes as a guest does")]
fn check_and_mark(base: u64, page: u64, mark: bool) {
    let at = (base + page * PAGE) as *mut u8;
    // SAFETY: inside a map of the block.
    unsafe {
        let read = [100, 2000, 4095].map(|offset| at.add(offset).read_volatile());
        assert_eq!(read, [content(page); 3], "page {page}");
        if mark {
            at.write_volatile(0xee);
        }
    }
}

/// Guests fault at random and in order, bulk channels send everything, each page twice, an urgent one what was asked
/// for, the background mapper maps, and the way may change meanwhile.
fn storm(pages: u64, way: Way, sharers: usize, change: bool) {
    if permitted().is_none() {
        return;
    }
    let spec = BlockSpec { id: BLOCK, guest_base: 0, size: pages * PAGE, page_size: PageSize::Base };
    let ram = Arc::new(Ram::create(&[spec]).unwrap());
    let block = ram.blocks()[0].clone();
    // Stale bytes of precopy.
    for page in (0..pages).step_by(3) {
        write(&block, page + 1 - page % 2);
    }
    let service = FaultService::new(ram).unwrap();
    service.register_guest_maps().unwrap();
    service.set_way(BLOCK, way).unwrap();
    let (sender, urgent) = channel();
    let counts = (0..pages).map(|_| AtomicU64::new(0)).collect();
    let requester = Arc::new(Urgent { pages: Mutex::new(sender), counts });
    service.start(requester.clone()).unwrap();
    service.start_mapper().unwrap();
    let sharers: Vec<_> = (0..sharers).map(|_| Sharer::new(&block, Some(Mode::MISSING))).collect();
    let ids: Vec<_> =
        sharers.iter().map(|s| service.add_source("sharer", s.handed_over(), s.table()).unwrap()).collect();
    let done = AtomicBool::new(false);
    let mut bases = vec![(block.guest_map() as u64, true); 4];
    bases.extend(sharers.iter().map(|sharer| (sharer.base, false)));
    std::thread::scope(|scope| {
        let (service, block, done) = (&service, &block, &done);
        let guests: Vec<_> = bases
            .iter()
            .enumerate()
            .map(|(n, (base, mark))| {
                scope.spawn(move || {
                    let mut seed = n as u64 / 2 + 1;
                    for i in 0..pages {
                        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        // Pairs of guests go the same way, so that they meet on the same pages.
                        let page = if n < 2 { i } else { (seed >> 33) % pages };
                        check_and_mark(*base, page, *mark && n == 0);
                    }
                })
            })
            .collect();
        let bulk = |reverse: bool| {
            move || {
                for chunk in 0..pages / 32 {
                    let chunk = if reverse { pages / 32 - 1 - chunk } else { chunk };
                    fill(service, block, chunk * 32..chunk * 32 + 32);
                    std::thread::yield_now();
                }
            }
        };
        scope.spawn(bulk(false));
        scope.spawn(bulk(true));
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                if let Ok(page) = urgent.recv_timeout(Duration::from_millis(1)) {
                    fill(service, block, page..page + 1);
                }
            }
        });
        if change {
            scope.spawn(move || {
                for way in [Way::Copy, Way::InPlace].into_iter().cycle().take(20) {
                    service.set_way(BLOCK, way).unwrap();
                }
            });
        }
        let started = Instant::now();
        while !guests.iter().all(|guest| guest.is_finished()) {
            assert!(started.elapsed() < DEADLINE, "guests still wait for {} pages", service.waiting());
            std::thread::yield_now();
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(service.is_complete());
    assert!(service.take_troubles().is_empty());
    for (page, count) in requester.counts.iter().enumerate() {
        assert!(count.load(Ordering::Relaxed) <= 1, "page {page} was requested more than once");
    }
    for page in 0..pages {
        let (first, last) = Touch::read(block.guest_map() as u64 + page * PAGE, "a page at the end".into()).bytes();
        assert_eq!((first, last), (0xee, content(page)), "page {page}: a write of the guest was lost");
    }
    let statistics = service.statistics();
    for id in ids.iter().chain([&SourceId::GUEST]) {
        let source = statistics.source(*id).unwrap();
        assert_eq!((source.bad_addresses, source.quarantined.as_ref()), (0, None));
    }
    assert_eq!(service.waiting(), 0);
}

#[test]
fn guests_that_fault_while_channels_fill_in_place_see_every_byte() {
    storm(4096, Way::InPlace, 0, false);
}

#[test]
fn guests_and_sharers_that_fault_while_channels_copy_see_every_byte() {
    storm(4096, Way::Copy, 3, false);
}

#[test]
fn guests_see_every_byte_although_the_way_changes_under_them() {
    storm(4096, Way::InPlace, 0, true);
}
