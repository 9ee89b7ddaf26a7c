//! A VM whose back end at the destination turns on it: it tries to cut guest RAM short, and punches out what has arrived while
//! memory follows. What no program that behaves does, and what mends itself, is tested beside the front end.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::fs::{FallocateFlags, fallocate, ftruncate};
use rustix::io::Errno;
use serde_json::Value;
use support::disk::Memory;
use support::{Place, kvm, listens, wait_for};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;
use wherry_backend::{Device, Driver, RingGiven, Server};
use wherry_memory::GuestMemory;
use wherry_virtio::Device as _;
use wherry_virtio::blk::{Blk, Image};

const IMAGE: u64 = 32 << 20;
const PAGE: u64 = 4096;
/// How much of the guest's data is punched out, again and again.
const PUNCHED: u64 = 256 * PAGE;

/// A disk that does nothing for its guest.
struct Traitor {
    /// What it pretends to be.
    disk: Blk,
    /// Guest addresses that it punches.
    target: Range<u64>,
    /// What came of the attempts to make RAM smaller and larger.
    resized: Mutex<Vec<Result<(), Errno>>>,
    quit: Arc<AtomicBool>,
    puncher: Mutex<Option<JoinHandle<()>>>,
    rings: Mutex<Vec<(u16, u16)>>,
}

impl Traitor {
    fn new(image: &Path, target: Range<u64>) -> Self {
        let disk = Blk::new(Arc::new(Image::open(image, false).unwrap()), 0).unwrap();
        let (resized, puncher, rings) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self { disk, target, resized, quit: Arc::default(), puncher, rings }
    }

    fn stop(&self) {
        self.quit.store(true, Ordering::SeqCst);
        if let Some(puncher) = self.puncher.lock().unwrap().take() {
            puncher.join().unwrap();
        }
    }
}

impl Device for Traitor {
    fn name(&self) -> &str {
        "traitor"
    }

    fn features(&self) -> u64 {
        self.disk.features()
    }

    fn rings(&self) -> (u16, u16) {
        (1, 256)
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 256];
        self.disk.read_config(0, &mut config);
        config
    }

    fn changed(&self) -> Option<&EventFd> {
        None
    }

    fn write_config(&self, _offset: u32, _content: &[u8]) -> Result<(), String> {
        Ok(())
    }

    fn serve(&self, memory: GuestMemory, _: u64, rings: Vec<RingGiven>, _: Arc<Driver>) -> Result<(), String> {
        *self.rings.lock().unwrap() = rings.iter().map(|ring| (ring.index, ring.next)).collect();
        self.quit.store(false, Ordering::SeqCst);
        let (quit, target) = (self.quit.clone(), self.target.clone());
        for region in memory.iter() {
            let file = region.file_offset().unwrap().file();
            let len = file.metadata().unwrap().len();
            let mut resized = self.resized.lock().unwrap();
            resized.extend([ftruncate(file, 0), ftruncate(file, len - PAGE), ftruncate(file, len + PAGE)]);
        }
        let region = memory.iter().find(|region| region.start_addr().0 == 0).unwrap();
        let file = region.file_offset().unwrap().file().try_clone().unwrap();
        let puncher = std::thread::spawn(move || {
            while !quit.load(Ordering::SeqCst) {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&file, flags, target.start, target.end - target.start).unwrap();
            }
        });
        *self.puncher.lock().unwrap() = Some(puncher);
        Ok(())
    }

    fn rest(&self, _: Instant) -> Result<Vec<(u16, u16)>, String> {
        self.stop();
        Ok(self.rings.lock().unwrap().clone())
    }

    fn pause(&self, deadline: Instant) -> Result<Vec<(u16, u16)>, String> {
        self.rest(deadline)
    }

    fn go_on(&self) {}

    fn release(&self) {}

    fn announce(&self, _: [u8; 6]) -> Result<(), String> {
        Ok(())
    }

    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    fn restore(&self, _: &[u8]) -> Result<(), String> {
        Ok(())
    }

    fn keep(&self) -> Vec<u8> {
        Vec::new()
    }

    fn take(&self, _: &[u8]) -> Result<(), String> {
        Ok(())
    }
}

/// An honest back end, which ends with the value.
struct Honest(Child);

impl Honest {
    fn serve(place: &Place, image: &Path) -> (Self, PathBuf) {
        let socket = place.path("honest");
        let mut command = place.command(&["device", "blk", "--socket"]);
        let process = command.arg(&socket).arg("--image").arg(image).stdout(Stdio::null()).spawn().unwrap();
        wait_for("the socket of a back end", || listens(&socket).then_some(()));
        (Self(process), socket)
    }
}

impl Drop for Honest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A page of the guest's data that it found wrong lies in what was punched.
fn found_in(memory: &Memory, target: &Range<u64>) -> bool {
    memory.snapshot().cpus.iter().flat_map(|cpu| &cpu.mismatches).any(|found| target.contains(&found.gpa))
}

#[test]
fn a_back_end_that_punches_ram_which_has_arrived_is_named_and_the_vmm_lives() {
    if !kvm("a_back_end_that_punches_ram_which_has_arrived_is_named_and_the_vmm_lives") {
        return;
    }
    let place = Place::new();
    let image = place.path("disk");
    File::create(&image).unwrap().set_len(IMAGE).unwrap();
    let (_honest, socket) = Honest::serve(&place, &image);
    let cmdline = "data=48M rate=1M disk=32M disk_depth=32 disk_wait=interrupt";
    let device = format!("vhost-user-blk={}", socket.display());
    let _here = place.run_guest("0", &["--memory", "96M", "--cmdline", cmdline, "--device", &device], &[]);
    let memory = Memory::of(&place, "0");
    memory.wait_for_requests("before the move");
    let start = memory.snapshot().extents.iter().find(|extent| extent.1 * PAGE >= PUNCHED).unwrap().0;
    let target = start..start + PUNCHED;

    let traitor = Arc::new(Traitor::new(&image, target.clone()));
    let server = Arc::new(Server::bind(&place.path("traitor")).unwrap());
    let serving = {
        let (server, traitor) = (server.clone(), traitor.clone());
        std::thread::spawn(move || server.run(&*traitor))
    };
    let device = format!("vhost-user-blk={}", place.path("traitor").display());
    let (there, address) = place.receive("1", &["--device", &device]);
    let api = place.path("0");
    let mut migrate: Command =
        place.command(&["migrate", "--json", "--bandwidth", "20M", "--mode", "postcopy", "--to", &address, "--api"]);
    let output = migrate.arg(api).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", support::stderr(&output));

    // Memory cannot be made smaller under those who have mapped it.
    let resized = traitor.resized.lock().unwrap().clone();
    assert!(resized.len() >= 3 && resized.iter().all(|result| *result == Err(Errno::PERM)), "{resized:?}");
    // What was punched is found when the guest comes to it, and who has it mapped is named.
    let job: Value = serde_json::from_slice(&output.stdout).unwrap();
    let sources = job["postcopy"]["sources"].as_array().unwrap();
    let accused = sources.iter().find(|s| s["name"].as_str().is_some_and(|name| name.contains("traitor")));
    let why = accused.and_then(|source| source["quarantined"].as_str()).unwrap_or_default();
    assert!(why.contains("was punched"), "{sources:?}");
    wait_for("the log to name it", || {
        let log = there.log();
        let named = log.lines().any(|line| line.contains("quarantined") && line.contains("traitor"));
        (named && log.contains("was punched after it had been received")).then_some(())
    });
    // The guest lost what was punched, and nothing else; its VMM answers, and can be ended.
    place.wait_for_state("1", "running");
    let after = Memory::of(&place, "1");
    wait_for("the guest to find what it lost", || found_in(&after, &target).then_some(()));
    assert_eq!(place.control("1", &["stop"]).status.code(), Some(0));
    let mut there = there;
    assert_eq!(there.end().code(), Some(0), "{}", there.log());
    traitor.stop();
    server.stop();
    serving.join().unwrap().unwrap();
}
