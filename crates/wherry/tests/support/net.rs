//! The probe guest's network load, as seen from outside: its report, and the other end of its network.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use wherry_guest::net::{LONGEST, Way, check, number, write};
use wherry_guest::snapshot::NetSnapshot;
use wherry_netlab::{Network, TapPeer};

use super::disk::Memory;
use super::wait_for;

/// What the other end is.
const ADDRESS: [u8; 6] = [2, 0, 0, 0, 0, 0xee];
/// How often it looks whether it is to end.
const TICK: Duration = Duration::from_millis(20);

/// Sends every frame of a guest back, and checks that each comes once, in order, as it was sent.
pub struct Echo {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl Echo {
    /// Begins when somebody has the tap device open: what is sent into it before is lost, and what comes out of it waits.
    pub fn start(network: &Network, peer: TapPeer, seed: u64) -> Self {
        wait_for("the tap device to pass frames", || peer.is_ready(network.left()).unwrap().then_some(()));
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let (mut into, mut next) = ([0; 2048], 0);
            while !stopped.load(Ordering::Relaxed) {
                let Some(bytes) = peer.receive(&mut into, TICK).unwrap() else { continue };
                let frame = &into[..bytes];
                assert_eq!(number(frame), Some(next), "the frames of the guest, in order");
                check(frame, seed, next, Way::Out).unwrap_or_else(|wrong| panic!("frame {next}: {wrong:x?}"));
                let mut back = [0; LONGEST];
                let bytes = write(&mut back, ADDRESS, seed, next, Way::Back);
                peer.send(&back[..bytes]).unwrap();
                next += 1;
            }
            next
        });
        Self { stop, thread: Some(thread) }
    }

    /// Ends it; how many frames there were.
    pub fn finish(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().expect("every frame was as it should be")
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Whoever drops it has failed already.
            let _ = thread.join();
        }
    }
}

/// What the guest says of its network; nothing was wrong so far.
pub fn frames(memory: &Memory) -> NetSnapshot {
    let snapshot = memory.snapshot();
    assert!(snapshot.failure.is_none(), "{:?}", snapshot.failure);
    let net = snapshot.net.unwrap();
    assert_eq!(net.errors, 0, "{net:?}");
    net
}

/// Waits until so many more have come back.
pub fn wait_for_frames(memory: &Memory, more: u64, what: &str) -> NetSnapshot {
    let before = frames(memory);
    wait_for(&format!("{more} frames {what}"), || {
        let now = frames(memory);
        (now.received >= before.received + more).then_some(now)
    })
}
