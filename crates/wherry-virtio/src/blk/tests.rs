use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use imago::FormatCreateBuilder;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;
use wherry_memory::{DirtySource, PageSet, VmmWrites};
use wherry_state::{Saved, StateUnit};

use super::engine::{Done, Engine, Job, Threads, Uring};
use super::*;
use crate::support::*;

const VERSION_1: u64 = 1 << 32;
const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
const HEADER: u64 = 0x4_0000;
const STATUS: u64 = 0x4_1000;
const DATA: u64 = 0x5_0000;
const OK: u8 = 0;
const FAILED: u8 = 1;
const UNSUPPORTED: u8 = 2;

struct Disk {
    file: tempfile::NamedTempFile,
    image: Arc<Image>,
}

/// An image of 1 MiB in which every sector holds its number.
fn disk(read_only: bool) -> Disk {
    let file = tempfile::NamedTempFile::new().unwrap();
    for sector in 0..2048u64 {
        file.as_file().write_all_at(&sector.to_le_bytes().repeat(64), sector * SECTOR).unwrap();
    }
    let image = Arc::new(Image::open(file.path(), read_only).unwrap());
    Disk { file, image }
}

fn engines(image: &Arc<Image>) -> Vec<Box<dyn Engine>> {
    let mut engines: Vec<Box<dyn Engine>> = vec![Box::new(Threads::new(image.clone(), 0).unwrap())];
    match Uring::new(image.clone()) {
        Ok(uring) => engines.push(Box::new(uring)),
        Err(error) => println!("SKIPPED io_uring: {error}"),
    }
    engines
}

fn driver_of(disk: &Disk, engine: Box<dyn Engine>) -> Driver {
    let mut driver = Driver::new(Arc::new(Blk::with_engine(disk.image.clone(), 0, engine).unwrap()), ram());
    driver.switch_on(true);
    driver.set_up(VERSION_1 | FLUSH);
    driver
}

/// Makes request `n` of a batch available: header, one data buffer, status.
fn offer(driver: &mut Driver, n: u16, kind: u32, sector: u64, data: u64, len: u32) {
    let (header, status) = (HEADER + 16 * u64::from(n), STATUS + u64::from(n));
    driver.memory().write_obj(kind, GuestAddress(header)).unwrap();
    driver.memory().write_obj(0u32, GuestAddress(header + 4)).unwrap();
    driver.memory().write_obj(sector, GuestAddress(header + 8)).unwrap();
    driver.memory().write_obj(0xffu8, GuestAddress(status)).unwrap();
    let head = 3 * n;
    let reads = kind == 0 || kind == 8;
    if len > 0 {
        driver.descriptor(head, header, 16, NEXT, head + 1);
        driver.descriptor(head + 1, data, len, NEXT | if reads { WRITE } else { 0 }, head + 2);
    } else {
        driver.descriptor(head, header, 16, NEXT, head + 2);
    }
    driver.descriptor(head + 2, status, 1, WRITE, 0);
    driver.offer(head);
}

fn status(driver: &Driver, n: u16) -> u8 {
    driver.memory().read_obj(GuestAddress(STATUS + u64::from(n))).unwrap()
}

/// Makes one request and waits for it; its status.
fn request(driver: &mut Driver, kind: u32, sector: u64, len: u32) -> u8 {
    offer(driver, 0, kind, sector, DATA, len);
    let (head, told) = driver.used();
    assert_eq!(head, 0);
    let answer = status(driver, 0);
    let written = if matches!(kind, 0 | 8) && answer == OK { len.min(if kind == 8 { 20 } else { len }) } else { 0 };
    assert_eq!(told, written + 1, "kind {kind}");
    answer
}

fn sector_of(disk: &Disk, sector: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    disk.file.as_file().read_exact_at(&mut bytes, sector * SECTOR).unwrap();
    bytes
}

#[test]
fn what_is_written_is_in_the_image_and_is_read_back() {
    let disk = disk(false);
    for engine in engines(&disk.image) {
        let mut driver = driver_of(&disk, engine);
        assert_eq!(request(&mut driver, 0, 7, 4096), OK);
        let mut bytes = [0; 4096];
        driver.memory().read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
        for (n, sector) in (7u64..).zip(bytes.chunks(512)) {
            assert_eq!(sector, n.to_le_bytes().repeat(64));
        }
        driver.memory().write_slice(&[0x5a; 1024], GuestAddress(DATA)).unwrap();
        assert_eq!(request(&mut driver, 1, 2046, 1024), OK);
        assert_eq!(request(&mut driver, 4, 0, 0), OK);
        assert_eq!((sector_of(&disk, 2046), sector_of(&disk, 2047)), ([0x5a; 512], [0x5a; 512]));
    }
}

#[test]
fn what_lies_outside_the_image_or_is_no_whole_sector_fails_alone() {
    let disk = disk(false);
    for engine in engines(&disk.image) {
        let mut driver = driver_of(&disk, engine);
        for (kind, sector, len) in [(0, 2048, 512), (0, 2047, 1024), (1, u64::MAX, 512), (0, 0, 511), (1, 1 << 54, 512)]
        {
            assert_eq!(request(&mut driver, kind, sector, len), FAILED, "{kind} {sector} {len}");
        }
        assert_eq!(request(&mut driver, 99, 0, 512), UNSUPPORTED);
        assert_eq!(request(&mut driver, 0, 0, 512), OK);
        assert_eq!(driver.status(), 15);
    }
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros_and_their_neighbours_do_not() {
    for zero_flags in [0, 1u32] {
        let disk = disk(false);
        for engine in engines(&disk.image) {
            let mut driver = driver_of(&disk, engine);
            let range = |driver: &Driver, sector: u64, count: u32, flags: u32| {
                driver.memory().write_obj(sector, GuestAddress(DATA)).unwrap();
                driver.memory().write_obj(count, GuestAddress(DATA + 8)).unwrap();
                driver.memory().write_obj(flags, GuestAddress(DATA + 12)).unwrap();
            };
            range(&driver, 16, 8, zero_flags);
            assert_eq!(request(&mut driver, 13, 0, 16), OK);
            range(&driver, 32, 8, 0);
            assert_eq!(request(&mut driver, 11, 0, 16), OK);
            for sector in [16, 23, 32, 39] {
                assert_eq!(sector_of(&disk, sector), [0; 512], "{sector}");
            }
            for sector in [15u64, 24, 31, 40] {
                assert_eq!(sector_of(&disk, sector)[..8], sector.to_le_bytes());
            }
            range(&driver, 2047, 2, 0);
            assert_eq!(request(&mut driver, 11, 0, 16), FAILED);
            range(&driver, 0, 1, 2);
            assert_eq!(request(&mut driver, 13, 0, 16), UNSUPPORTED);
            assert_eq!(request(&mut driver, 11, 0, 15), FAILED);
        }
    }
}

#[test]
fn an_image_that_is_only_read_offers_no_writes_and_refuses_them() {
    let disk = disk(true);
    let engine = engines(&disk.image).remove(0);
    let mut driver = driver_of(&disk, engine);
    driver.write(0, &0u32.to_le_bytes());
    let offered = u32::from_le_bytes(driver.read(4));
    assert_eq!(offered >> 5 & 1, 1, "read-only");
    assert_eq!(offered >> 13 & 3, 0, "neither discard nor zeroes");
    assert_eq!(request(&mut driver, 1, 0, 512), FAILED);
    assert_eq!(request(&mut driver, 0, 0, 512), OK);
    assert_eq!(sector_of(&disk, 0), [0; 512]);
}

#[test]
fn the_driver_is_told_size_and_limits_and_the_name_of_the_disk() {
    let disk = disk(false);
    let engine = engines(&disk.image).remove(0);
    let mut driver = driver_of(&disk, engine);
    assert_eq!(u64::from_le_bytes(driver.read(0x2000)), 2048);
    assert_eq!(u32::from_le_bytes(driver.read(0x200c)), 254);
    assert_eq!(request(&mut driver, 8, 0, 20), OK);
    let mut id = [0; 20];
    driver.memory().read_slice(&mut id, GuestAddress(DATA)).unwrap();
    assert_eq!(&id, b"wherry-0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn requests_without_header_or_status_break_the_device_and_not_the_vmm() {
    for (len, flags) in [(15, 0), (16, 0), (16, WRITE)] {
        let disk = disk(false);
        let engine = engines(&disk.image).remove(0);
        let mut driver = driver_of(&disk, engine);
        driver.descriptor(0, HEADER, len, flags, 0);
        driver.offer(0);
        until("the device to need a reset", || driver.status() & 0x40 != 0);
        driver.set_up(VERSION_1);
        assert_eq!(request(&mut driver, 0, 0, 512), OK);
    }
}

#[test]
fn a_read_is_seen_by_the_dirty_source_of_the_vmm() {
    let disk = disk(false);
    for engine in engines(&disk.image) {
        let mut driver = driver_of(&disk, engine);
        let source = VmmWrites::new(driver.ram.clone());
        offer(&mut driver, 0, 0, 0, DATA, 8192);
        driver.used();
        let block = driver.ram.blocks()[0].clone();
        let mut set = PageSet::new(block.pages());
        source.collect(&block, &mut set).unwrap();
        let pages: Vec<u64> = set.runs(0..block.pages()).flatten().collect();
        for page in [DATA, DATA + 4096, STATUS, USED].map(|gpa| gpa / 4096) {
            assert!(pages.contains(&page), "page {page:#x} of {pages:x?}");
        }
    }
}

/// An engine that begins nothing until it is let go.
struct Held {
    jobs: Vec<Job>,
    inner: Box<dyn Engine>,
    open: Arc<AtomicBool>,
    /// Taken back on request, or as if it had begun.
    cancels: bool,
    done: Vec<Done>,
    event: EventFd,
    taken: Arc<AtomicUsize>,
}

impl Held {
    fn new(image: &Arc<Image>, cancels: bool) -> (Box<Self>, Arc<AtomicBool>, Arc<AtomicUsize>) {
        let taken = Arc::<AtomicUsize>::default();
        let open = Arc::new(AtomicBool::new(false));
        let inner = Box::new(Threads::new(image.clone(), 0).unwrap());
        let event = EventFd::new(0).unwrap();
        // Always readable: it is looked at all the time.
        event.write(1).unwrap();
        let (jobs, done) = (Vec::new(), Vec::new());
        let held = Self { jobs, inner, open: open.clone(), cancels, done, event, taken: taken.clone() };
        (Box::new(held), open, taken)
    }
}

impl Engine for Held {
    fn begin(&mut self, job: Job) {
        self.jobs.push(job);
        self.taken.fetch_add(1, Ordering::AcqRel);
    }
    fn push(&mut self) {}
    fn done(&mut self) -> Vec<Done> {
        if self.open.load(Ordering::Acquire) {
            self.jobs.drain(..).for_each(|job| self.inner.begin(job));
            self.done.extend(self.inner.done());
        }
        std::mem::take(&mut self.done)
    }
    fn event(&self) -> std::os::fd::RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&self.event)
    }
    fn cancel(&mut self) {
        if self.cancels {
            // Not in the order in which they were taken.
            let tags: Vec<_> = self.jobs.drain(..).rev().map(|job| job.tag).collect();
            self.done.extend(tags.into_iter().map(|tag| (tag, Err(io::Error::from_raw_os_error(libc::ECANCELED)))));
        }
    }
}

#[test]
fn requests_that_could_not_begin_are_carried_and_done_once_at_the_destination() {
    let disk = disk(false);
    let (engine, _open, taken) = Held::new(&disk.image, true);
    let mut source = driver_of(&disk, engine);
    for n in 0..4u16 {
        source.memory().write_slice(&[0xa0 + n as u8; 512], GuestAddress(DATA + u64::from(n) * 512)).unwrap();
        offer(&mut source, n, 1, 100, DATA + u64::from(n) * 512, 512);
    }
    until("the requests to be taken", || taken.load(Ordering::Acquire) == 4);
    source.function.begin_stop().unwrap();
    source.function.finish_stop(Instant::now() + Duration::from_millis(200)).unwrap();
    let Saved::Section(section) = source.function.save().unwrap() else { panic!("it has state") };
    assert_eq!(SavedBlk::from_section(&section).unwrap().in_flight, [0, 3, 6, 9], "oldest first");
    assert_eq!((source.used_index(), sector_of(&disk, 100)[..8].to_vec()), (0, 100u64.to_le_bytes().to_vec()));

    let image = Arc::new(Image::open(disk.file.path(), false).unwrap());
    let there = Blk::with_engine(image.clone(), 0, Box::new(Threads::new(image, 0).unwrap())).unwrap();
    let mut destination = Driver::new(Arc::new(there), source.ram.clone());
    destination.function.restore(&section).unwrap();
    destination.function.start().unwrap();
    let mut heads: Vec<_> = (0..4).map(|_| destination.used().0).collect();
    heads.sort_unstable();
    assert_eq!(heads, [0, 3, 6, 9]);
    assert_eq!((0..4).map(|n| status(&destination, n)).collect::<Vec<_>>(), [OK; 4]);
    (destination.available, destination.seen) = (4, 4);
    assert_eq!(request(&mut destination, 0, 0, 512), OK);
    assert_eq!(destination.used_index(), 5, "none was done twice");
}

#[test]
fn carried_requests_are_taken_up_again_where_they_were_when_the_stop_is_undone() {
    let disk = disk(false);
    let (engine, open, taken) = Held::new(&disk.image, true);
    let mut driver = driver_of(&disk, engine);
    offer(&mut driver, 0, 0, 5, DATA, 512);
    until("the request to be taken", || taken.load(Ordering::Acquire) == 1);
    driver.function.finish_stop(Instant::now() + Duration::from_millis(100)).unwrap();
    open.store(true, Ordering::Release);
    driver.function.start().unwrap();
    assert_eq!(driver.used(), (0, 513));
    assert_eq!(driver.memory().read_obj::<u64>(GuestAddress(DATA)).unwrap(), 5);
}

#[test]
fn a_request_that_may_still_have_its_effect_fails_the_stop_and_ends_when_that_is_undone() {
    let disk = disk(false);
    let (engine, open, taken) = Held::new(&disk.image, false);
    let mut driver = driver_of(&disk, engine);
    offer(&mut driver, 0, 1, 5, DATA, 512);
    until("the request to be taken", || taken.load(Ordering::Acquire) == 1);
    let drained = driver.function.drain(Instant::now() + Duration::from_millis(50)).unwrap_err().to_string();
    assert!(drained.contains("1 requests"), "{drained}");
    let stopped = driver.function.finish_stop(Instant::now() + Duration::from_millis(50)).unwrap_err();
    assert!(matches!(stopped, UnitError::Deadline(_)), "{stopped}");
    driver.function.start().unwrap();
    open.store(true, Ordering::Release);
    assert_eq!(driver.used(), (0, 1));
    driver.function.drain(soon()).unwrap();
}

#[test]
fn a_reset_waits_for_what_is_under_way() {
    let disk = disk(false);
    let (engine, open, taken) = Held::new(&disk.image, false);
    let mut driver = driver_of(&disk, engine);
    offer(&mut driver, 0, 1, 5, DATA, 512);
    until("the request to be taken", || taken.load(Ordering::Acquire) == 1);
    let bus = driver.bus.clone();
    let resetting = std::thread::spawn(move || bus.write(BAR + 0x14, &[0]));
    open.store(true, Ordering::Release);
    resetting.join().unwrap();
    assert_eq!((driver.status(), status(&driver, 0)), (0, OK));
    driver.set_up(VERSION_1);
    assert_eq!(request(&mut driver, 0, 1, 512), OK);
}

#[test]
fn an_image_belongs_to_one_writer_or_to_many_readers() {
    let disk = disk(false);
    let open = |read_only| Image::open(disk.file.path(), read_only).unwrap();
    disk.image.lock().unwrap();
    disk.image.lock().unwrap();
    let refused = open(false).lock().unwrap_err().to_string();
    assert!(refused.contains("locked") && refused.contains(disk.file.path().to_str().unwrap()), "{refused}");
    assert!(open(true).lock().is_err());
    disk.image.unlock().unwrap();
    let (one, other) = (open(true), open(true));
    one.lock().unwrap();
    other.lock().unwrap();
    assert!(disk.image.lock().is_err());
    drop((one, other));
    disk.image.lock().unwrap();
}

#[test]
fn images_that_cannot_be_disks_are_refused_by_name() {
    let empty = tempfile::NamedTempFile::new().unwrap();
    let refused = |path: &std::path::Path| Image::open(path, false).unwrap_err().to_string();
    assert!(refused(empty.path()).contains("less than one sector"));
    assert!(refused("/dev/null".as_ref()).contains("neither a file nor a block device"));
    let missing = refused("/nonexistent/disk.img".as_ref());
    assert!(missing.contains("/nonexistent/disk.img") && missing.contains("opening"), "{missing}");
}

#[test]
fn state_of_a_larger_disk_or_of_impossible_requests_is_refused_by_name() {
    let disk = disk(false);
    let engine = engines(&disk.image).remove(0);
    let device = Blk::with_engine(disk.image.clone(), 0, engine).unwrap();
    let section = |saved: SavedBlk| saved.to_section(&UnitId::new("virtio-blk", 0));
    let larger = SavedBlk { sectors: 4096, ..Default::default() };
    let error = device.restore(&section(larger)).unwrap_err().to_string();
    assert!(error.contains("4096 sectors") && error.contains("has 2048"), "{error}");
    for in_flight in [vec![256], vec![0; 257]] {
        let saved = SavedBlk { sectors: 2048, in_flight, ..Default::default() };
        assert!(device.restore(&section(saved)).unwrap_err().to_string().contains("requests under way"));
    }
}

/// An empty qcow2 image of 1 MiB.
fn qcow2(make: impl FnOnce(Qcow2Maker) -> Qcow2Maker) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    let storage = imago::file::File::try_from(file.reopen().unwrap()).unwrap();
    make(imago::qcow2::Qcow2::create_builder(storage).size(1 << 20)).create().unwrap();
    file
}

type Qcow2Maker = imago::qcow2::Qcow2CreateBuilder<imago::file::File>;

/// A guest with a qcow2 image.
fn qcow2_driver(file: &tempfile::NamedTempFile) -> Driver {
    let image = Arc::new(Image::open_as(file.path(), false, ImageFormat::Qcow2).unwrap());
    let mut driver = Driver::new(Arc::new(Blk::new(image, 0).unwrap()), ram());
    driver.switch_on(true);
    driver.set_up(VERSION_1 | FLUSH);
    driver
}

/// The byte of which a sector consists.
fn byte_of(driver: &mut Driver, sector: u64) -> u8 {
    driver.memory().write_slice(&[0xee; 512], GuestAddress(DATA)).unwrap();
    assert_eq!(request(driver, 0, sector, 512), OK);
    let mut bytes = [0; 512];
    driver.memory().read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
    assert_eq!(bytes, [bytes[0]; 512], "sector {sector}");
    bytes[0]
}

fn fill(driver: &mut Driver, sector: u64, byte: u8) {
    driver.memory().write_slice(&[byte; 512], GuestAddress(DATA)).unwrap();
    assert_eq!(request(driver, 1, sector, 512), OK);
}

#[test]
fn a_qcow2_image_is_written_freed_and_read_again_by_the_next_who_opens_it() {
    let file = qcow2(|maker| maker);
    let mut driver = qcow2_driver(&file);
    assert_eq!(u64::from_le_bytes(driver.read(0x2000)), 2048);
    assert_eq!(byte_of(&mut driver, 2047), 0);
    for sector in [0, 127, 128, 2047] {
        fill(&mut driver, sector, sector as u8 | 1);
    }
    assert_eq!(request(&mut driver, 0, 2048, 512), FAILED);
    for (kind, sector) in [(11u32, 0u64), (13, 128)] {
        // A range: sector, count, flags.
        driver.memory().write_obj(sector, GuestAddress(DATA)).unwrap();
        driver.memory().write_obj(128u32, GuestAddress(DATA + 8)).unwrap();
        driver.memory().write_obj(0u32, GuestAddress(DATA + 12)).unwrap();
        assert_eq!(request(&mut driver, kind, 0, 16), OK, "{kind}");
    }
    assert_eq!(request(&mut driver, 4, 0, 0), OK);
    assert_eq!((byte_of(&mut driver, 128), byte_of(&mut driver, 2047)), (0, 255));
    fill(&mut driver, 5, 5);
    // The end writes what nobody has asked to be written yet.
    drop(driver);
    let mut driver = qcow2_driver(&file);
    assert_eq!([5, 128, 2047].map(|sector| byte_of(&mut driver, sector)), [5, 0, 255]);
}

#[test]
fn a_drained_qcow2_image_is_whole_for_another_owner_and_read_anew_when_it_comes_back() {
    let file = qcow2(|maker| maker);
    let mut here = qcow2_driver(&file);
    fill(&mut here, 100, 1);
    // Opened while it belongs to somebody else, as at a destination.
    let mut there = qcow2_driver(&file);
    fill(&mut here, 1000, 2);
    here.function.drain(soon()).unwrap();
    assert_eq!([100, 1000, 1500].map(|sector| byte_of(&mut there, sector)), [1, 2, 0]);
    fill(&mut there, 1500, 3);
    there.function.drain(soon()).unwrap();
    here.function.start().unwrap();
    assert_eq!([100, 1000, 1500].map(|sector| byte_of(&mut here, sector)), [1, 2, 3]);
}

#[test]
fn what_is_no_qcow2_image_or_needs_another_file_is_refused_by_name() {
    let refused = |file: &tempfile::NamedTempFile| {
        let error = Image::open_as(file.path(), false, ImageFormat::Qcow2).unwrap_err().to_string();
        assert!(error.contains(file.path().to_str().unwrap()) && error.contains("qcow2"), "{error}");
    };
    refused(&disk(false).file);
    refused(&qcow2(|maker| maker.backing("/etc/passwd".into(), "raw".into())));
    // Cut off, and with tables that lie nowhere.
    let file = qcow2(|maker| maker);
    file.as_file().set_len(50).unwrap();
    refused(&file);
    let file = qcow2(|maker| maker);
    file.as_file().write_all_at(&[0xff; 8], 40).unwrap();
    refused(&file);
}
