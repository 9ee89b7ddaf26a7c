//! `wherry device accel` as a process: a client finds the device, has it work, and signals end it with nothing left behind.

use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::process::{Pid, Signal, kill_process};
use wherry_vfio_user::client::NoMemory;
use wherry_vfio_user::payload::pci_region;
use wherry_vfio_user::{Client, Options};

/// Anything takes less.
const LIMIT: Duration = Duration::from_secs(30);

fn until(what: &str, mut there: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !there() {
        assert!(Instant::now() < deadline, "waited {LIMIT:?} for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_process_serves_the_engines_it_was_told_to_and_ends_when_it_is_asked() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("accel");
    let mut process = Command::new(env!("CARGO_BIN_EXE_wherry"))
        .args(["device", "accel", "--engines", "copy=2,code=1", "--workers", "3", "--socket"])
        .arg(&socket)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    until("the socket", || socket.exists());
    let client = Client::connect(&socket, Options::default(), Arc::new(NoMemory)).unwrap();
    let read = |at: u64| {
        let mut word = [0; 4];
        client.read(0, at, &mut word).unwrap();
        u32::from_le_bytes(word)
    };
    assert_eq!((read(0x00).to_le_bytes(), read(0x08)), (*b"WACC", 3));
    assert_eq!([0x400, 0x410, 0x420].map(read), [0, 1 << 16, 4], "copy0, copy1, code0");
    // A context, and a word stored by its first slot: all of it in bytes, as docs/accel-abi.md has them.
    let memory = memfd_create("client", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memory, 8192).unwrap();
    client.dma_map(0x1000, 8192, Some((memory.as_fd(), 0)), true, true).unwrap();
    client.write(pci_region::CONFIG, 4, &[6, 0]).unwrap();
    rustix::io::pwrite(&memory, &[1], 0).unwrap();
    client.write(0, 0x20, &0x1000u64.to_le_bytes()).unwrap();
    assert_eq!(read(0x28), 0, "the context is made");
    let mut store = [0; 64];
    store[11] = 0x04;
    store[32..40].copy_from_slice(&0x2000u64.to_le_bytes());
    store[48..52].copy_from_slice(&0xfeed_f00du32.to_le_bytes());
    let place = u64::from(read(0x2c) & 0xffff);
    client.write(0, 0x1_0000 + (place - 1) * 0x2000 + 0x1000, &store).unwrap();
    until("the word", || {
        let mut word = [0; 4];
        rustix::io::pread(&memory, &mut word, 4096).unwrap();
        u32::from_le_bytes(word) == 0xfeed_f00d
    });
    kill_process(Pid::from_child(&process), Signal::TERM).unwrap();
    let mut ended = None;
    until("the process to end", || {
        ended = process.try_wait().unwrap();
        ended.is_some()
    });
    assert_eq!(ended.and_then(|status| status.code()), Some(0));
    assert!(!socket.exists(), "its socket is left behind");
}
