//! What an old process may send to the new one, as a hostile one would: first as bytes on the channel, then as parcels, some with
//! descriptors, to the new process's half of a live update. It ends in an error that is told, never in a panic, and nothing is built.
#![no_main]

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use wherry_handover::{Channel, MOST_DESCRIPTORS, Registry};
use wherry_migration::Journey;
use wherry_migration::machine::{Machine, MachineDescription, Refusal};
use wherry_migration::update::{Successor, UpdateOptions, take_over};

/// All of it must fit into a socket's buffer, because one thread writes and then reads.
const MAX_INPUT: usize = 32 << 10;

struct Refuses;

impl Successor for Refuses {
    fn build(&self, _: &MachineDescription, _: &Arc<Registry>, _: &[u8]) -> Result<Arc<dyn Machine>, Refusal> {
        Err(Refusal(vec!["as told".into()]))
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

fuzz_target!(|bytes: &[u8]| {
    if bytes.len() > MAX_INPUT {
        return;
    }
    let (mut peer, ours) = UnixStream::pair().expect("a pair of sockets");
    peer.write_all(bytes).expect("room for a small input");
    peer.shutdown(Shutdown::Write).expect("a connected socket");
    let mut channel = Channel::new(ours).expect("a connected socket");
    while channel.receive(soon(), Duration::ZERO).is_ok() {}

    // Each parcel: tag, descriptors, bytes of the body.
    let (old, new) = Channel::pair().expect("a pair of sockets");
    let mut rest = bytes;
    while let [tag, descriptors, length, more @ ..] = rest {
        let (body, after) = more.split_at(usize::from(*length).min(more.len()));
        let fds = vec![old.as_fd(); usize::from(*descriptors % 4).min(MOST_DESCRIPTORS)];
        old.send((*tag % 14).into(), body, &fds, soon()).expect("room for a small input");
        rest = after;
    }
    let stream = UnixStream::from(std::os::fd::OwnedFd::from(old));
    stream.shutdown(Shutdown::Write).expect("a connected socket");
    let taken = take_over(new, &Refuses, UpdateOptions::default(), &Journey::new());
    assert!(taken.is_err(), "nothing was built");
});
