use vm_memory::{Bytes, GuestAddress};
use wherry_state::{Saved, StateUnit};

use super::*;
use crate::support::*;

const VERSION_1: u64 = 1 << 32;
const ALL: u64 = VERSION_1 | MUST_TELL_HOST | STATS_VQ | DEFLATE_ON_OOM | FREE_PAGE_HINT | PAGE_REPORTING;
const DATA: u64 = 0x4_0000;
/// The first page that is no ring and no buffer, and how many there are.
const FIRST: u64 = 0x100;
const PAGES: u64 = 1024;

struct Lab {
    balloon: Arc<Balloon>,
    driver: Driver,
}

impl Lab {
    fn new(features: u64) -> Self {
        let mut lab = Self::on(ram(), None, None);
        lab.set_up(features);
        lab
    }

    fn on(ram: Arc<Ram>, faults: Option<Arc<FaultService>>, pinned: Option<String>) -> Self {
        let balloon = Arc::new(Balloon::new(ram.clone(), faults, pinned, 0).unwrap());
        let driver = Driver::new(balloon.clone(), ram);
        driver.switch_on(true);
        Self { balloon, driver }
    }

    fn set_up(&mut self, features: u64) {
        // Something in every page that may be given back.
        for page in FIRST..PAGES {
            self.driver.memory().write_obj(page | 1 << 40, GuestAddress(page * GRANULE)).unwrap();
        }
        self.driver.set_up_rings(features, 5);
        self.driver.write(0x10, &1u16.to_le_bytes());
    }

    /// Which pages are holes.
    fn holes(&self) -> Vec<Range<u64>> {
        let block = &self.driver.ram.blocks()[0];
        let mut holes = PageSet::new(block.pages());
        holes.insert_range(FIRST..PAGES);
        for run in block.data_runs(0..PAGES * GRANULE) {
            let run = run.unwrap();
            holes.remove_range(run.start / GRANULE..run.end / GRANULE);
        }
        holes.runs(0..PAGES).collect()
    }

    /// Names pages by their numbers, and waits until that is done.
    fn name(&mut self, ring: u16, pages: impl IntoIterator<Item = u64>) {
        let numbers: Vec<u8> = pages.into_iter().flat_map(|page| (page as u32).to_le_bytes()).collect();
        self.driver.memory().write_slice(&numbers, GuestAddress(DATA)).unwrap();
        self.driver.descriptor_of(ring, 0, DATA, numbers.len() as u32, 0, 0);
        self.driver.offer_on(ring, 0);
        assert_eq!(self.driver.used_on(ring), (0, 0));
    }

    /// Gives the device free memory, and waits until it is done with it.
    fn offer(&mut self, ring: u16, address: u64, len: u64) {
        self.driver.descriptor_of(ring, 0, address, len as u32, WRITE, 0);
        self.driver.offer_on(ring, 0);
        assert_eq!(self.driver.used_on(ring), (0, 0));
    }

    fn field(&self, n: u64) -> u32 {
        u32::from_le_bytes(self.driver.read(0x2000 + 4 * n))
    }

    fn left_out(&self, range: Range<u64>) -> Vec<u64> {
        let block = &self.driver.ram.blocks()[0];
        let mut set = PageSet::full(block.pages());
        let gone = self.balloon.free_pages().leave_out(block, range.clone(), &mut set);
        let left: Vec<_> = (0..block.pages()).filter(|page| !set.contains(*page)).collect();
        assert_eq!(gone, left.len() as u64);
        left
    }

    fn rest(&self) -> Section {
        self.driver.function.drain(soon()).unwrap();
        self.driver.function.begin_stop().unwrap();
        self.driver.function.finish_stop(soon()).unwrap();
        let Saved::Section(section) = self.driver.function.save().unwrap() else { panic!("it has state") };
        section
    }
}

fn runs(runs: &[(u64, u64)]) -> Vec<Range<u64>> {
    runs.iter().map(|(start, end)| *start..*end).collect()
}

#[test]
fn what_is_put_into_the_balloon_and_what_is_reported_is_given_back() {
    let mut lab = Lab::new(ALL);
    assert!(lab.holes().is_empty());
    lab.name(INFLATE, [300, 301, 302, 500, 499, 900, 300]);
    assert_eq!(lab.holes(), runs(&[(300, 303), (499, 501), (900, 901)]));
    // Whole pages of what is reported.
    lab.offer(REPORTS, 600 * GRANULE + 1, 3 * GRANULE);
    assert_eq!(lab.holes(), runs(&[(300, 303), (499, 501), (601, 603), (900, 901)]));
    lab.name(DEFLATE, [300, 301]);
    lab.driver.memory().write_obj(7u8, GuestAddress(300 * GRANULE)).unwrap();
    assert_eq!(lab.holes(), runs(&[(301, 303), (499, 501), (601, 603), (900, 901)]));
}

#[test]
fn the_driver_is_asked_for_a_size_and_says_what_it_has_done() {
    let lab = Lab::new(ALL);
    lab.balloon.set_wanted(2 << 20).unwrap();
    until("the news of a wanted size", || lab.driver.interrupts(1).is_some());
    assert_eq!(lab.field(0), 512);
    lab.driver.write(0x2004, &500u32.to_le_bytes());
    // Which are not for the driver to write.
    lab.driver.write(0x2000, &1u32.to_le_bytes());
    lab.driver.write(0x2008, &1u32.to_le_bytes());
    let status = lab.balloon.status();
    assert_eq!((status.wanted, status.actual, lab.field(1), lab.field(2)), (2 << 20, 500 * GRANULE, 500, 0));
    for bytes in [4 << 20, 5000, u64::MAX] {
        assert!(matches!(lab.balloon.set_wanted(bytes), Err(BalloonError::Size { .. })), "{bytes}");
    }
}

#[test]
fn while_a_journey_reads_memory_nothing_is_given_back_and_what_is_in_the_balloon_is_afterwards() {
    let mut lab = Lab::new(ALL);
    let free = lab.balloon.free_pages();
    free.hold();
    lab.name(INFLATE, 300..310);
    lab.offer(REPORTS, 600 * GRANULE, 3 * GRANULE);
    lab.name(DEFLATE, [304]);
    assert!(lab.holes().is_empty());
    free.release();
    until("what waits to be given back", || lab.holes() == runs(&[(300, 304), (305, 310)]));
    // One that does not tell before it uses a page may use it by then.
    let mut lab = Lab::new(ALL & !MUST_TELL_HOST);
    let free = lab.balloon.free_pages();
    free.hold();
    lab.name(INFLATE, 300..310);
    free.release();
    lab.name(INFLATE, 400..402);
    assert_eq!(lab.holes(), runs(&[(400, 402)]));
}

#[test]
fn memory_that_others_may_have_pinned_is_never_given_back_and_the_balloon_says_why() {
    let mut lab = Lab::on(ram(), None, Some("the process behind /run/disk.sock maps it".into()));
    lab.set_up(ALL);
    let error = lab.balloon.set_wanted(1 << 20).unwrap_err();
    assert!(error.to_string().contains("/run/disk.sock"), "{error}");
    lab.balloon.set_wanted(0).unwrap();
    lab.name(INFLATE, 300..310);
    lab.offer(REPORTS, 600 * GRANULE, 3 * GRANULE);
    assert!(lab.holes().is_empty());
    assert_eq!(SavedBalloon::from_section(&lab.rest()).unwrap().waiting, []);
}

#[test]
fn before_all_memory_has_come_nothing_is_given_back() {
    let ram = ram();
    let faults = FaultService::new(ram.clone()).unwrap();
    if let Err(error) = faults.register_guest_maps() {
        println!("SKIPPED: {error}");
        return;
    }
    // Only what the rings and the test touch is filled in: through the other map, before anybody looks.
    let block = ram.blocks()[0].clone();
    let base = block.engine_range(0, PAGES * GRANULE).unwrap();
    // SAFETY: inside the engine map.
    #[expect(unsafe_code, reason = "fills guest memory as a journey does")]
    unsafe {
        base.write_bytes(0x55, (PAGES * GRANULE) as usize);
    }
    let memory = Memory::new(ram, Some(faults.clone()), None);
    memory.inflate(0, 300..310, true);
    memory.give_back(600 * GRANULE, GRANULE);
    memory.catch_up();
    let len =
        |block: &Block| block.data_runs(0..PAGES * GRANULE).map(|r| r.unwrap()).map(|r| r.end - r.start).sum::<u64>();
    assert_eq!(len(&block), PAGES * GRANULE);
    faults.unregister_untouched().unwrap();
    memory.inflate(0, 400..401, true);
    assert_eq!(len(&block), (PAGES - 11) * GRANULE);
}

#[test]
fn statistics_are_asked_for_when_somebody_wants_them() {
    let mut lab = Lab::new(ALL);
    let give = |lab: &mut Lab, free: u64| {
        let mut bytes = Vec::new();
        for (tag, value) in [(4u16, free), (5, 4 << 20), (999, 1)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        lab.driver.memory().write_slice(&bytes, GuestAddress(DATA)).unwrap();
        lab.driver.descriptor_of(STATISTICS, 3, DATA, bytes.len() as u32, 0, 0);
        lab.driver.offer_on(STATISTICS, 3);
    };
    give(&mut lab, 1000);
    until("statistics", || lock(&lab.balloon.shared.statistics).free == Some(1000));
    assert_eq!(lab.driver.used_index_on(STATISTICS), 0, "the buffer was given back although nobody wants more");
    assert_eq!(
        lab.balloon.status().statistics,
        Statistics { free: Some(1000), total: Some(4 << 20), ..Default::default() }
    );
    assert_eq!(lab.driver.used_on(STATISTICS), (3, 0));
    give(&mut lab, 2000);
    until("new statistics", || lock(&lab.balloon.shared.statistics).free == Some(2000));
    // The buffer moves with the guest.
    let section = lab.rest();
    let mut there = Lab::on(lab.driver.ram.clone(), None, None);
    there.driver.function.restore(&section).unwrap();
    there.driver.follow(&lab.driver);
    there.driver.function.start().unwrap();
    there.balloon.status();
    assert_eq!(there.driver.used_on(STATISTICS), (3, 0));
}

#[test]
fn free_pages_count_when_they_answer_the_command_that_asks_now() {
    let mut lab = Lab::new(ALL);
    let say = |lab: &mut Lab, id: u32| {
        lab.driver.memory().write_obj(id, GuestAddress(DATA)).unwrap();
        lab.driver.descriptor_of(HINTS, 0, DATA, 4, 0, 0);
        lab.driver.offer_on(HINTS, 0);
        assert_eq!(lab.driver.used_on(HINTS), (0, 0));
    };
    let free = lab.balloon.free_pages();
    // Nobody has asked.
    lab.offer(HINTS, 300 * GRANULE, GRANULE);
    assert!(lab.left_out(0..PAGES).is_empty());
    free.ask();
    until("the command", || lab.driver.interrupts(1).is_some());
    let first = lab.field(2);
    assert!(first >= FIRST_COMMAND);
    lab.offer(HINTS, 301 * GRANULE, GRANULE);
    say(&mut lab, first + 1);
    lab.offer(HINTS, 302 * GRANULE, GRANULE);
    say(&mut lab, first);
    lab.offer(HINTS, 400 * GRANULE - 5, 3 * GRANULE);
    lab.offer(HINTS, PAGES * GRANULE - GRANULE, GRANULE);
    assert_eq!(lab.left_out(0..PAGES), [400, 401, PAGES - 1]);
    assert_eq!(lab.left_out(384..448), [400, 401]);
    assert!(lab.left_out(0..384).is_empty());
    say(&mut lab, STOP);
    lab.offer(HINTS, 500 * GRANULE, GRANULE);
    assert!(lab.left_out(448..512).is_empty());
    free.enough();
    assert_eq!(lab.field(2), DONE);
    assert!(lab.left_out(0..PAGES).is_empty());
    // Nothing of that is given back, and the next command is another one, for which old answers do not count.
    assert!(lab.holes().is_empty());
    free.ask();
    assert!(lab.field(2) > first);
    say(&mut lab, first);
    lab.offer(HINTS, 500 * GRANULE, GRANULE);
    assert!(lab.left_out(0..PAGES).is_empty());
}

#[test]
fn it_moves_with_what_waits_and_a_guest_that_was_asked_hears_that_it_is_over() {
    let mut lab = Lab::new(ALL);
    lab.balloon.set_wanted(1 << 20).unwrap();
    lab.driver.write(0x2004, &77u32.to_le_bytes());
    let free = lab.balloon.free_pages();
    free.hold();
    free.ask();
    lab.name(INFLATE, 300..310);
    let command = lab.field(2);
    let section = lab.rest();
    let there = Lab::on(lab.driver.ram.clone(), None, None);
    there.driver.function.restore(&section).unwrap();
    assert!(there.holes().is_empty());
    there.driver.function.start().unwrap();
    until("what waits to be given back there", || there.holes() == runs(&[(300, 310)]));
    until("the news that it is over", || there.driver.interrupts(1).is_some());
    assert_eq!([there.field(0), there.field(1), there.field(2)], [256, 77, DONE]);
    there.balloon.free_pages().ask();
    assert!(there.field(2) > command, "the guest cannot tell a new command from the old one");
}

#[test]
fn a_driver_that_names_nonsense_harms_nobody() {
    let mut lab = Lab::new(ALL);
    lab.name(INFLATE, [u64::from(u32::MAX), PAGES, 1 << 31, 0xffff_fffe]);
    lab.name(DEFLATE, [u64::from(u32::MAX), PAGES]);
    assert!(lab.holes().is_empty());
    // A list that would keep the thread busy for a long time.
    lab.driver.descriptor_of(INFLATE, 0, 0, 1 << 20, 0, 0);
    lab.driver.offer_on(INFLATE, 0);
    until("the need of a reset", || lab.driver.status() & 0x40 != 0);
    lab.driver.set_up_rings(ALL, 5);
    lab.name(INFLATE, [300]);
    assert_eq!(lab.holes(), runs(&[(300, 301)]));
}

#[test]
fn impossible_state_is_refused() {
    let lab = Lab::new(ALL);
    let good = SavedBalloon::from_section(&lab.rest()).unwrap();
    let refused = |saved: SavedBalloon, word: &str| {
        let balloon = Balloon::new(ram(), None, None, 0).unwrap();
        let error = balloon.restore(&saved.to_section(&UnitId::new(KIND.name, 0))).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    };
    let pages = |block, first, count| vec![SavedPages { block, first, count }];
    refused(SavedBalloon { waiting: pages(0, 0, PAGES + 1), ..good.clone() }, "RAM block 0");
    refused(SavedBalloon { waiting: pages(0, u64::MAX, 2), ..good.clone() }, "RAM block 0");
    refused(SavedBalloon { waiting: pages(5, 0, 1), ..good.clone() }, "RAM block 5");
    refused(SavedBalloon { statistics: Some(128), ..good.clone() }, "buffer 128");
    refused(SavedBalloon { statistics: Some(1 << 16), ..good.clone() }, "buffer 65536");
    refused(SavedBalloon { transport: None, ..good }, "transport");
}
