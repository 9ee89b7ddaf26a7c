//! Page states under load, and what they answer. All interleavings of few steps are explored in `states_model`.

#![allow(clippy::unwrap_used, reason = "a failure is a panic here")]

use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};

use wherry_fault::{PageState, PageStates, Want};

#[test]
fn a_page_goes_its_way_once_and_never_back_from_received() {
    let states = PageStates::new(8, 1);
    assert_eq!(states.want(3), Want::Request);
    assert_eq!((states.want(3), states.prefetch(3)), (Want::Wait, false));
    assert_eq!(states.outstanding(), [3]);
    assert!(states.claim(3) && !states.claim(3));
    assert_eq!(states.state(3), PageState::Filling);
    assert!(states.publish(3), "somebody waits");
    assert!(!states.publish(3), "published twice");
    assert!(!states.claim(3) && !states.prefetch(3) && !states.unclaim(3));
    assert_eq!(states.want(3), Want::Received);
    assert!(!states.is_waited(3), "a flag was left on a received page");
    assert_eq!((states.received_count(), states.is_complete()), (1, false));
    assert!(!states.publish(5), "published without a claim");
    assert_eq!(states.state(5), PageState::Missing);
}

#[test]
fn runs_say_what_was_won_what_is_missing_and_what_is_there() {
    let states = PageStates::new(200, 1);
    assert!(states.claim(10) && states.claim(20));
    assert!(states.prefetch(30));
    assert_eq!(states.missing_runs(5..40), [5..10, 11..20, 21..30, 31..40]);
    assert_eq!(states.claim_range(5..40), [5..10, 11..20, 21..40]);
    states.publish(10);
    assert!(states.mark_received(9..12, true).is_empty(), "pages that are being filled belong to their channel");
    assert_eq!(states.received_set().runs(0..200).flatten().collect::<Vec<_>>(), [10]);
    assert_eq!(states.want(100), Want::Request);
    assert_eq!(states.mark_received(64..190, false), [100]);
    assert_eq!(states.received_count(), 127);
    assert_eq!(states.missing_runs(0..u64::MAX), [0..5, 40..64, 190..200]);
}

#[test]
fn a_unit_is_complete_when_all_its_granules_are_and_its_last_publisher_is_told() {
    let states = PageStates::new(1024, 512);
    assert_eq!(states.unit_of(700), 512..1024);
    assert_eq!(states.want(700), Want::Request);
    assert_eq!(states.claim_range(512..1023).len(), 1);
    for page in 512..1023 {
        assert!(!states.publish(page), "told too early");
    }
    assert_eq!(states.want(600), Want::Wait, "a received granule of a unit that is not whole");
    assert!(!states.unit_complete(600));
    assert!(states.claim(1023) && states.publish(1023));
    assert!(states.unit_complete(600) && !states.unit_complete(0));
    assert_eq!((states.want(600), states.is_waited(600)), (Want::Received, false));
}

#[test]
fn a_recovery_asks_again_for_what_was_requested_and_keeps_who_waits() {
    for unit in [1, 4] {
        let states = PageStates::new(16, unit);
        assert_eq!(states.want(5), Want::Request);
        assert!(states.prefetch(9) && states.claim(13));
        let waited = states.rewind_requests();
        assert!(waited.contains(&5) && waited.iter().all(|page| states.unit_of(5).contains(page)), "{waited:?}");
        assert_eq!((states.state(5), states.state(9), states.state(13)), {
            (PageState::Missing, PageState::Missing, PageState::Filling)
        });
        assert!(states.is_waited(5));
        assert_eq!(states.want(5), Want::Request);
        let mut woken = false;
        for page in states.unit_of(5) {
            assert!(states.claim(page));
            woken |= states.publish(page);
        }
        assert!(woken, "unit of {unit}");
    }
}

/// Faults, channels that send everything twice, channels that die, all at once; then the books are checked.
#[test]
fn nothing_is_filled_twice_and_no_wake_is_lost_under_load() {
    const PAGES: u64 = 1 << 14;
    for unit in [1u64, 8] {
        let states = PageStates::new(PAGES, unit);
        let counters = || (0..PAGES).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
        let (filled, waiting, woken, requests) = (counters(), counters(), counters(), counters());
        let start = Barrier::new(6);
        std::thread::scope(|scope| {
            for seed in 0..2u64 {
                let (states, start, waiting, requests) = (&states, &start, &waiting, &requests);
                scope.spawn(move || {
                    start.wait();
                    for i in 0..PAGES {
                        let page = (i * 7919 + seed * 31) % PAGES;
                        match states.want(page) {
                            Want::Received => assert!(states.unit_complete(page)),
                            want => {
                                waiting[(page / unit) as usize].fetch_add(1, Ordering::SeqCst);
                                requests[page as usize].fetch_add(u64::from(want == Want::Request), Ordering::SeqCst);
                            }
                        }
                    }
                });
            }
            for channel in 0..4u64 {
                let (states, start, filled, woken, requests) = (&states, &start, &filled, &woken, &requests);
                scope.spawn(move || {
                    start.wait();
                    for i in 0..PAGES {
                        let page = if channel % 2 == 0 { i } else { PAGES - 1 - i };
                        if !states.claim(page) {
                            continue;
                        }
                        if (page + channel) % 5 == 0 {
                            // This channel dies with the page.
                            if states.unclaim(page) {
                                requests[page as usize].fetch_add(1, Ordering::SeqCst);
                            }
                            continue;
                        }
                        filled[page as usize].fetch_add(1, Ordering::SeqCst);
                        if states.publish(page) {
                            woken[(page / unit) as usize].fetch_add(1, Ordering::SeqCst);
                        }
                    }
                });
            }
        });
        // What only dying channels had is sent once more.
        for page in states.claim_range(0..PAGES).into_iter().flatten() {
            filled[page as usize].fetch_add(1, Ordering::SeqCst);
            if states.publish(page) {
                woken[(page / unit) as usize].fetch_add(1, Ordering::SeqCst);
            }
        }
        assert!(states.is_complete());
        for (page, filled) in filled.iter().enumerate() {
            assert_eq!(filled.load(Ordering::SeqCst), 1, "page {page} in units of {unit}");
        }
        for unit in 0..(PAGES / unit) as usize {
            let (waits, wakes) = (waiting[unit].load(Ordering::SeqCst), woken[unit].load(Ordering::SeqCst));
            assert_eq!(wakes, u64::from(waits > 0), "unit {unit}: {waits} waits");
        }
    }
}

#[test]
fn a_neighbour_is_remembered_until_it_is_touched_and_forgotten_when_it_has_to_be_asked_for_again() {
    for unit in [1, 4] {
        let states = PageStates::new(16, unit);
        assert!(!states.take_neighbour(3));
        assert!((3..8).all(|page| states.prefetch(page)));
        assert!(states.claim(3));
        assert!(states.take_neighbour(3) && !states.take_neighbour(3));
        assert!(states.claim(4));
        states.publish(4);
        assert_eq!(states.state(4), PageState::Received);
        assert!(states.take_neighbour(4) && !states.take_neighbour(4));
        assert_eq!(states.state(4), PageState::Received, "asking changed the state");
        assert!(states.claim(5) && !states.unclaim(5));
        assert!(!states.take_neighbour(5), "unit of {unit}: its channel died, and nobody asks for it any more");
        states.rewind_requests();
        assert!(!states.take_neighbour(6), "unit of {unit}: the link was lost, and nobody asks for it any more");
    }
}
