//! Interrupts by every action and kind of data.

use std::os::fd::AsFd;
use std::os::fd::OwnedFd;

use super::raw::{EINVAL, signals};
use super::{BOOL, EVENTFD, MASK, NONE, Served, TRIGGER, UNMASK, event};

#[test]
fn interrupts_are_set_by_every_action_and_kind_of_data() {
    let served = Served::new();
    let client = served.client();
    let events: Vec<OwnedFd> = (0..4).map(|_| event()).collect();
    let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
    let told = || events.iter().map(signals).collect::<Vec<_>>();
    client.irqs(EVENTFD | TRIGGER, 2, 0, 4, &[], &fds).unwrap();
    client.irqs(NONE | TRIGGER, 2, 1, 2, &[], &[]).unwrap();
    assert_eq!(told(), [0, 1, 1, 0]);
    client.irqs(BOOL | TRIGGER, 2, 0, 4, &[1, 0, 0, 1], &[]).unwrap();
    assert_eq!(told(), [1, 0, 0, 1]);
    // What is triggered while it is masked comes when it is not.
    client.irqs(BOOL | MASK, 2, 1, 3, &[1, 0, 1], &[]).unwrap();
    client.irqs(NONE | TRIGGER, 2, 0, 4, &[], &[]).unwrap();
    assert_eq!(told(), [1, 0, 1, 0]);
    client.irqs(NONE | UNMASK, 2, 0, 4, &[], &[]).unwrap();
    assert_eq!(told(), [0, 1, 0, 1]);
    // A sub-range is turned off, and one of it on again.
    client.irqs(EVENTFD | TRIGGER, 2, 1, 2, &[], &[]).unwrap();
    client.irqs(NONE | TRIGGER, 2, 0, 4, &[], &[]).unwrap();
    assert_eq!(told(), [1, 0, 0, 1]);
    client.irqs(EVENTFD | TRIGGER, 2, 2, 1, &[], &fds[2..3]).unwrap();
    served.bus.trigger(2, 2);
    assert_eq!(told(), [0, 0, 1, 0]);
    client.irqs(NONE | TRIGGER, 2, 0, 0, &[], &[]).unwrap();
    for vector in 0..4 {
        served.bus.trigger(2, vector);
    }
    assert_eq!(told(), [0; 4]);
}

#[test]
fn a_pin_masks_itself_and_comes_again_while_it_is_up() {
    let served = Served::new();
    let client = served.client();
    let (trigger, unmasked, masked) = (event(), event(), event());
    client.irqs(EVENTFD | TRIGGER, 0, 0, 1, &[], &[trigger.as_fd()]).unwrap();
    client.irqs(EVENTFD | UNMASK, 0, 0, 1, &[], &[unmasked.as_fd()]).unwrap();
    client.irqs(EVENTFD | MASK, 0, 0, 1, &[], &[masked.as_fd()]).unwrap();
    served.bus.set_level(0, true);
    served.bus.set_level(0, true);
    assert_eq!((signals(&trigger), signals(&masked)), (1, 1));
    client.irqs(NONE | UNMASK, 0, 0, 1, &[], &[]).unwrap();
    assert_eq!((signals(&trigger), signals(&unmasked)), (1, 1), "it is up still");
    served.bus.set_level(0, false);
    client.irqs(NONE | UNMASK, 0, 0, 1, &[], &[]).unwrap();
    assert_eq!(signals(&trigger), 0);
}

#[test]
fn interrupts_that_make_no_sense_are_refused() {
    let served = Served::new();
    let client = served.client();
    let event = event();
    let fd = [event.as_fd()];
    assert_eq!(client.irqs(EVENTFD | TRIGGER, 2, 4, 1, &[], &fd), Err(EINVAL), "beyond the last");
    assert_eq!(client.irqs(EVENTFD | TRIGGER, 2, 1, u32::MAX, &[], &fd), Err(EINVAL), "a range that wraps");
    assert_eq!(client.irqs(EVENTFD | TRIGGER, 2, 0, 2, &[], &fd), Err(EINVAL), "too few descriptors");
    assert_eq!(client.irqs(EVENTFD | TRIGGER, 9, 0, 1, &[], &fd), Err(EINVAL), "no such interrupt");
    assert_eq!(client.irqs(EVENTFD | TRIGGER, 1, 0, 1, &[], &fd), Err(EINVAL), "one without vectors");
    assert_eq!(client.irqs(NONE | TRIGGER, 2, 0, 1, &[], &fd), Err(EINVAL), "a descriptor for nothing");
    assert_eq!(client.irqs(BOOL | TRIGGER, 2, 0, 2, &[1], &[]), Err(EINVAL), "too few bytes");
    assert_eq!(client.irqs(NONE | TRIGGER, 2, 1, 0, &[], &[]), Err(EINVAL), "an empty range");
    for flags in [TRIGGER, NONE, NONE | BOOL | TRIGGER, NONE | MASK | UNMASK, NONE | TRIGGER | 64] {
        assert_eq!(client.irqs(flags, 2, 0, 1, &[], &[]), Err(EINVAL), "flags {flags:#x}");
    }
}
