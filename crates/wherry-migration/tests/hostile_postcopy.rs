//! Peers that lie while memory follows: whoever is lied to names the lie, keeps what it has, and goes on with a link that
//! is honest. [`Impostor`] is a destination made by hand, [`Liar`] a source.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message as _;
use support::{FakeMachine, Load, Wire, World, await_that, block, random_vm};
use wherry_memory::GRANULE;
use wherry_migration::machine::Machine;
use wherry_migration::progress::Phase;
use wherry_migration::{Event, EventKind, Journey, JourneyError, Mode};
use wherry_state::{SavedState, StateFile, UnitId};
use wherry_stream::message::{
    About, Accept, Begin, Body, ChannelTotal, Empty, Follow, Message, Offer, Poise, Ready, Running,
};
use wherry_stream::{
    Channel, ChannelKind, Extent, ExtentKind, Frame, Greeting, Hello, HelloError, HelloRefusal, IoRange, Listener,
    StreamError,
};

const MIB: u64 = 1 << 20;
/// Pages of the guest's RAM.
const PAGES: u64 = 256;
const LIMIT: Duration = Duration::from_secs(10);

fn guest() -> Arc<FakeMachine> {
    let machine = FakeMachine::new(random_vm(), &[block(0, 0, MIB)], Arc::default());
    machine.fill(0, 0..PAGES, 3);
    machine
}

fn pages(block: u16, first: u64, count: u32) -> Extent {
    Extent { block, kind: ExtentKind::Data, first, count }
}

/// What a page of a machine holds.
fn page(machine: &FakeMachine, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; GRANULE as usize];
    machine.ram().blocks()[0].read_at(page * GRANULE, &mut bytes).unwrap();
    bytes
}

/// Names bytes to a channel; they live as long as the slice.
fn range(bytes: &[u8]) -> IoRange {
    #[expect(unsafe_code, reason = "names memory to the kernel, as the engine does")]
    // SAFETY: the callers keep the slice until the call that reads from or writes into it has returned.
    unsafe {
        IoRange::new(bytes.as_ptr().cast_mut(), bytes.len())
    }
}

/// Waits until a journey is paused and says why.
fn await_complaint(journey: &Journey, says: &str) {
    let last = std::cell::RefCell::new(None);
    let said = || {
        let job = journey.job();
        let found = job.phase == Phase::Paused && job.error.as_ref().is_some_and(|text| text.contains(says));
        *last.borrow_mut() = job.error;
        found
    };
    support::wait_or(LIMIT, said, || panic!("it does not say {says:?}, but {:?}", last.borrow()));
}

/// How often a journey was paused.
fn pauses(events: &std::sync::mpsc::Receiver<Event>) -> usize {
    events.try_iter().filter(|e| e.kind == EventKind::Phase && e.job.phase == Phase::Paused).count()
}

/// Whether faults can be served here.
fn permitted() -> bool {
    let permitted = wherry_fault::Userfault::open().map(|_| ());
    if let Err(error) = &permitted {
        println!("SKIPPED: {error}");
    }
    permitted.is_ok()
}

/// A destination made by hand, from where the VM "runs" there.
struct Impostor<'a> {
    listener: &'a Listener,
    about: About,
    control: Channel,
    data: Channel,
    urgent: Channel,
}

impl<'a> Impostor<'a> {
    fn take(listener: &Listener, kind: ChannelKind) -> Channel {
        let connection = listener.accept(Instant::now() + LIMIT).unwrap();
        let greeting = Greeting::read(connection, Instant::now() + LIMIT).unwrap();
        assert_eq!(greeting.hello().kind, kind);
        let mut channel = greeting.accept().unwrap();
        channel.set_idle_limit(LIMIT);
        channel
    }

    fn read(channel: &mut Channel) -> (About, Body) {
        channel.reader.read_message().unwrap()
    }

    fn run(listener: &'a Listener) -> Self {
        let mut control = Self::take(listener, ChannelKind::Control);
        let (mut about, body) = Self::read(&mut control);
        assert!(matches!(body, Body::Begin(_)), "{body:?}");
        about.incarnation = vec![9; 16];
        let accept = Body::Accept(Accept { features: vec!["postcopy".into()], load_us: 1 });
        control.writer.write_message(&Message::new(about.clone(), accept)).unwrap();
        let data = Self::take(listener, ChannelKind::Data);
        let urgent = Self::take(listener, ChannelKind::Urgent);
        let mut this = Self { listener, about, control, data, urgent };
        loop {
            match Self::read(&mut this.control).1 {
                Body::Poise(_) => this.say(Body::Poised(Empty {})),
                Body::Ping(_) => this.say(Body::Pong(Empty {})),
                Body::Follow(_) => {}
                Body::Offer(_) => this.say(Body::Ready(Ready { load_us: 1, busy_us: 1, ..Ready::default() })),
                Body::Run(_) => break,
                other => panic!("{other:?}"),
            }
        }
        this.say(Body::Running(Running { start_us: 1, ..Running::default() }));
        this
    }

    fn say(&mut self, body: Body) {
        self.control.writer.write_message(&Message::new(self.about.clone(), body)).unwrap();
    }

    fn take_control(&mut self) {
        self.control = Self::take(self.listener, ChannelKind::Control);
        let body = Self::read(&mut self.control).1;
        assert!(matches!(body, Body::Resume(_)), "{body:?}");
    }

    /// Answers a source that is back: it lacks everything.
    fn resume(&mut self) {
        self.take_control();
        self.say(Body::Follow(Follow { block: 0, runs: vec![0, PAGES] }));
        self.say(Body::Resumed(Empty {}));
        self.data = Self::take(self.listener, ChannelKind::Data);
        self.urgent = Self::take(self.listener, ChannelKind::Urgent);
    }

    /// Asks for every page, compares it with the source's, and ends the journey as an honest destination does.
    fn end_well(&mut self, machine: &FakeMachine) {
        self.urgent.writer.write_request(&[pages(0, 0, PAGES as u32)]).unwrap();
        let mut seen = 0;
        while seen < PAGES {
            let Frame::Pages { extents, .. } = self.urgent.reader.read_frame().unwrap() else { panic!("no pages") };
            for extent in extents {
                assert_eq!((extent.kind, extent.first), (ExtentKind::Data, seen));
                for _ in 0..extent.count {
                    let bytes = vec![0; GRANULE as usize];
                    self.urgent.reader.read_bulk(&[range(&bytes)]).unwrap();
                    assert!(bytes == page(machine, seen), "page {seen} is not what it was");
                    seen += 1;
                }
            }
        }
        self.say(Body::Complete(Box::default()));
        loop {
            match Self::read(&mut self.control).1 {
                Body::Ping(_) => self.say(Body::Pong(Empty {})),
                Body::Confirm(_) => break,
                other => panic!("{other:?}"),
            }
        }
    }
}

/// A source meets a destination made by hand, and gives its VM away in the end: how often it was paused.
fn deceive(pages: u64, destination: impl FnOnce(Impostor<'_>, &FakeMachine, &Journey) + Send) -> usize {
    let mut world = World::new(Wire::Unix);
    world.source_options.mode = Mode::Postcopy;
    world.source_options.channels = Some(1);
    let events = world.source_journey.subscribe();
    let machine = FakeMachine::new(random_vm(), &[block(0, 0, pages * GRANULE)], Arc::default());
    machine.fill(0, 0..PAGES, 3);
    machine.power_on(Load::NONE);
    let sent = std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let (to, options) = (world.listener.local_endpoint(), world.source_options.clone());
            wherry_migration::source::send(machine.clone(), to, options, &world.source_journey)
        });
        destination(Impostor::run(&world.listener), &machine, &world.source_journey);
        sending.join().unwrap()
    });
    let job = sent.unwrap();
    assert_eq!((job.phase, job.error), (Phase::Done, None));
    assert!(!machine.is_running());
    pauses(&events)
}

#[test]
fn an_honest_destination_made_by_hand_gets_all_pages_and_is_confirmed() {
    let pauses = deceive(PAGES, |mut impostor, machine, _| impostor.end_well(machine));
    assert_eq!(pauses, 0);
}

#[test]
fn requests_for_what_there_is_not_are_named_and_the_next_link_gets_everything() {
    for (size, wrong, says) in [
        (PAGES, pages(9, 0, 1), "it asks for pages of RAM block 9, which there is not"),
        (PAGES, pages(0, PAGES - 1, 2), "it asks for pages 255 to 257 of RAM block 0, which has 256"),
        (PAGES, pages(0, 1 << 50, 1), "of RAM block 0, which has 256"),
        (2048, pages(0, 0, 2048), "it asks for 2048 pages at once; 1024 are possible"),
    ] {
        deceive(size, |mut impostor, machine, journey| {
            impostor.urgent.writer.write_request(&[pages(0, 5, 1), wrong]).unwrap();
            await_complaint(journey, says);
            impostor.resume();
            impostor.end_well(machine);
        });
    }
}

#[test]
fn a_frame_that_is_no_request_on_the_urgent_channel_is_named() {
    deceive(PAGES, |mut impostor, machine, journey| {
        impostor.urgent.writer.write_round_end(7).unwrap();
        await_complaint(journey, "RoundEnd frame on the urgent channel");
        impostor.resume();
        impostor.end_well(machine);
    });
}

#[test]
fn a_destination_that_reads_no_answers_does_not_hold_the_source_for_longer_than_its_patience() {
    deceive(PAGES, |mut impostor, machine, journey| {
        // Far more than all buffers hold, and none of it is read. Its control channel answers.
        impostor.urgent.writer.write_request(&[pages(0, 0, PAGES as u32); 64]).unwrap();
        while journey.job().phase != Phase::Paused {
            match impostor.control.reader.read_message() {
                Ok((_, Body::Ping(_))) => impostor.say(Body::Pong(Empty {})),
                Ok((_, other)) => panic!("{other:?}"),
                // It has given the link up.
                Err(_) => break,
            }
        }
        await_complaint(journey, "sending pages");
        impostor.resume();
        impostor.end_well(machine);
    });
}

#[test]
fn a_wrong_answer_to_resume_is_named_and_asked_for_again() {
    let follow = |block, runs: &[u64]| Body::Follow(Follow { block, runs: runs.to_vec() });
    for (answer, says) in [
        (follow(0, &[1]), "odd number of runs"),
        (follow(0, &[0, PAGES + 1]), "257 pages after 0 skipped"),
        (follow(0, &[u64::MAX, 2]), "2 pages after"),
        (follow(0, &[3, 0]), "0 pages after 3 skipped"),
        (follow(70_000, &[0, 1]), "RAM block 70000"),
        (Body::Poised(Empty {}), "Poised in answer to Resume"),
    ] {
        deceive(PAGES, |mut impostor, machine, journey| {
            // The link is lost.
            impostor.control.closer().close();
            impostor.take_control();
            impostor.say(answer);
            await_complaint(journey, says);
            impostor.resume();
            impostor.end_well(machine);
        });
    }
}

/// A source made by hand, from where the VM runs at the destination and lacks everything.
struct Liar<'a> {
    world: &'a World,
    machine: Arc<FakeMachine>,
    about: About,
    control: Channel,
    data: Channel,
    urgent: Channel,
}

impl<'a> Liar<'a> {
    fn open(world: &World, kind: ChannelKind, attempt: &[u8]) -> Result<Channel, StreamError> {
        let deadline = Instant::now() + LIMIT;
        let connection = world.listener.local_endpoint().connect(deadline).unwrap();
        let mut channel = Hello { kind, index: 0, attempt: attempt.try_into().unwrap() }.open(connection, deadline)?;
        channel.set_idle_limit(LIMIT);
        Ok(channel)
    }

    /// Comes as far as the switch; nothing is said of what follows yet.
    fn poise(world: &'a World, follow: bool) -> Self {
        let machine = guest();
        let attempt = random_vm();
        let mut control = Self::open(world, ChannelKind::Control, &attempt).unwrap();
        let description = machine.description();
        let mut about = About { vm: description.vm.clone(), epoch: 1, attempt: attempt.to_vec(), incarnation: vec![] };
        let begin = Begin {
            mode: "postcopy".into(),
            channels: 1,
            verify: false,
            features: vec!["postcopy".into()],
            machine: description.encode_to_vec(),
        };
        control.writer.write_message(&Message::new(about.clone(), Body::Begin(begin))).unwrap();
        let (answered, body) = control.reader.read_message().unwrap();
        assert!(matches!(&body, Body::Accept(accept) if accept.features == ["postcopy"]), "{body:?}");
        about.incarnation = answered.incarnation;
        let data = Self::open(world, ChannelKind::Data, &attempt).unwrap();
        let urgent = Self::open(world, ChannelKind::Urgent, &attempt).unwrap();
        let mut this = Self { world, machine, about, control, data, urgent };
        this.say(Body::Poise(Poise { follow, ..Poise::default() }));
        assert_eq!(this.hear(), Body::Poised(Empty {}));
        this
    }

    fn give(world: &'a World) -> Self {
        let mut this = Self::poise(world, true);
        this.say(Body::Follow(Follow { block: 0, runs: vec![0, PAGES] }));
        this.offer(true);
        assert!(matches!(this.hear(), Body::Ready(_)));
        this.say(Body::Run(Empty {}));
        assert!(matches!(this.hear(), Body::Running(_)));
        this
    }

    fn offer(&mut self, follow: bool) {
        let cpu = support::CpuState { writes: 0, seed: 2, bulk: vec![] };
        let state = StateFile { sections: vec![cpu.to_section(&UnitId::new("vcpu", 0))] };
        let digest = state.digest().to_vec();
        let channels = vec![ChannelTotal { frames: 0, bytes: 0, checksum: 0, last: 0 }];
        let offer = Offer { follow, state: state.encode_to_vec(), digest, channels, stopped_us: 0, rounds: 0 };
        self.say(Body::Offer(offer));
    }

    fn say(&mut self, body: Body) {
        self.control.writer.write_message(&Message::new(self.about.clone(), body)).unwrap();
    }

    fn hear(&mut self) -> Body {
        loop {
            match self.control.reader.read_message().unwrap().1 {
                Body::Ping(_) => self.say(Body::Pong(Empty {})),
                body => return body,
            }
        }
    }

    /// Sends pages of the machine's RAM from `from` on, under the name of an extent.
    fn send(channel: &mut Channel, machine: &FakeMachine, extent: Extent, from: u64) {
        let bytes: Vec<u8> = (0..u64::from(extent.count)).flat_map(|n| page(machine, from + n)).collect();
        channel.writer.write_pages(&[extent], &[range(&bytes)]).unwrap();
    }

    /// Comes back after its link is lost: what the destination lacks, as runs.
    fn resume(&mut self) -> Vec<u64> {
        self.data.closer().close();
        self.urgent.closer().close();
        self.control = Self::open(self.world, ChannelKind::Control, &self.about.attempt).unwrap();
        self.say(Body::Resume(Empty {}));
        let mut lacking = vec![];
        loop {
            match self.hear() {
                // Who has lost its link may not have heard it.
                Body::Running(_) => {}
                Body::Follow(follow) => lacking.extend(follow.runs),
                Body::Resumed(_) => break,
                other => panic!("{other:?}"),
            }
        }
        self.data = Self::open(self.world, ChannelKind::Data, &self.about.attempt).unwrap();
        self.urgent = Self::open(self.world, ChannelKind::Urgent, &self.about.attempt).unwrap();
        lacking
    }

    /// Sends everything over the data channel and hears that it is there.
    fn end_well(&mut self) {
        Self::send(&mut self.data, &self.machine, pages(0, 0, PAGES as u32), 0);
        assert!(matches!(self.hear(), Body::Complete(_)));
        self.say(Body::Confirm(Empty {}));
    }
}

/// A destination meets a source made by hand, and runs its VM in the end: the source's machine and the destination's, and
/// how often that was paused.
fn lie(source: impl FnOnce(&mut Liar<'_>, &Journey) + Send) -> (Arc<FakeMachine>, Arc<FakeMachine>, usize) {
    let world = World::new(Wire::Unix);
    let events = world.destination_journey.subscribe();
    let (original, received) = std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let options = world.destination_options.clone();
            wherry_migration::destination::receive(&world.listener, &world.builder, options, &world.destination_journey)
        });
        let mut liar = Liar::give(&world);
        source(&mut liar, &world.destination_journey);
        (liar.machine.clone(), receiving.join().unwrap())
    });
    let (_, job) = received.unwrap();
    assert_eq!((job.phase, job.error), (Phase::Done, None));
    let built = world.built();
    assert!(built.is_running());
    (original, built, pauses(&events))
}

fn assert_all_there(original: &FakeMachine, built: &FakeMachine) {
    for n in 0..PAGES {
        assert!(page(original, n) == page(built, n), "page {n} is not what it was");
    }
}

#[test]
fn pages_that_come_twice_or_unasked_leave_the_first_in_place() {
    if !permitted() {
        return;
    }
    let (original, built, pauses) = lie(|liar, _| {
        let machine = liar.machine.clone();
        // Nobody has asked for any; the later ones carry the content of others.
        Liar::send(&mut liar.urgent, &machine, pages(0, 0, 100), 0);
        await_that("the first pages to be there", || page(&liar.world.built(), 99) == page(&machine, 99));
        Liar::send(&mut liar.urgent, &machine, pages(0, 0, 100), 100);
        Liar::send(&mut liar.data, &machine, pages(0, 50, 50), 0);
        let zero = Extent { block: 0, kind: ExtentKind::Zero, first: 0, count: 100 };
        liar.data.writer.write_pages(&[zero], &[]).unwrap();
        liar.end_well();
    });
    assert_all_there(&original, &built);
    assert_eq!(pauses, 0);
}

#[test]
fn pages_outside_of_ram_are_named_what_came_before_is_kept_and_the_next_link_brings_the_rest() {
    if !permitted() {
        return;
    }
    for urgent in [true, false] {
        for (wrong, says) in [
            (pages(9, 0, 1), "pages for RAM block 9, which there is not"),
            (pages(0, PAGES - 1, 2), "not inside RAM block 0"),
        ] {
            let mut lacking = vec![];
            let (original, built, _) = lie(|liar, journey| {
                let machine = liar.machine.clone();
                let channel = if urgent { &mut liar.urgent } else { &mut liar.data };
                Liar::send(channel, &machine, pages(0, 0, 64), 0);
                Liar::send(channel, &machine, wrong, 0);
                await_complaint(journey, says);
                lacking = liar.resume();
                liar.end_well();
            });
            assert_eq!(lacking, [64, PAGES - 64], "urgent {urgent}, {wrong:?}");
            assert_all_there(&original, &built);
        }
    }
}

#[test]
fn a_source_that_lives_and_sends_no_page_is_a_lost_link() {
    if !permitted() {
        return;
    }
    let (original, built, pauses) = lie(|liar, journey| {
        await_that("the VM to run without its memory", || journey.job().phase == Phase::Postcopy);
        // It speaks as long as anybody listens.
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        let ping = Message::new(liar.about.clone(), Body::Ping(Empty {}));
        while journey.job().phase == Phase::Postcopy {
            assert!(std::time::Instant::now() < deadline, "waited 20 s for the destination to lose its patience");
            if liar.control.writer.write_message(&ping).is_ok() {
                let _ = liar.control.reader.read_message();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        await_complaint(journey, "send any of the pages that follow");
        liar.resume();
        liar.end_well();
    });
    assert_all_there(&original, &built);
    assert_eq!(pauses, 1);
}

#[test]
fn a_stranger_cannot_take_up_the_link_of_a_vm_that_lacks_pages() {
    if !permitted() {
        return;
    }
    let (original, built, _) = lie(|liar, journey| {
        liar.control.closer().close();
        await_that("the destination to miss its source", || journey.job().phase == Phase::Paused);
        let refused = Liar::open(liar.world, ChannelKind::Control, &random_vm()).err().unwrap();
        assert!(
            matches!(
                refused,
                StreamError::Hello { source: HelloError::Refused { refusal: HelloRefusal::Busy, .. }, .. }
            ),
            "{refused}"
        );
        let refused = Liar::open(liar.world, ChannelKind::Data, &liar.about.attempt).err().unwrap();
        assert!(
            matches!(
                refused,
                StreamError::Hello { source: HelloError::Refused { refusal: HelloRefusal::Busy, .. }, .. }
            ),
            "{refused}"
        );
        // One that knows the attempt, and means another VM.
        let mut stranger = Liar::open(liar.world, ChannelKind::Control, &liar.about.attempt).unwrap();
        let about = About { vm: random_vm().to_vec(), ..liar.about.clone() };
        stranger.writer.write_message(&Message::new(about, Body::Resume(Empty {}))).unwrap();
        stranger.set_idle_limit(LIMIT);
        let heard: Vec<_> = std::iter::from_fn(|| stranger.reader.read_message().ok()).map(|(_, body)| body).collect();
        assert!(heard.iter().all(|body| matches!(body, Body::Running(_))), "a stranger was told {heard:?}");
        assert_eq!(journey.job().phase, Phase::Paused);
        liar.resume();
        liar.end_well();
    });
    assert_all_there(&original, &built);
}

#[test]
fn a_source_that_reads_no_requests_holds_nobody_up_as_long_as_it_sends() {
    if !permitted() {
        return;
    }
    let (original, built, pauses) = lie(|liar, _| {
        let built = liar.world.built();
        built.set_load(Load { rate: 1000, pages: PAGES, zero_one_in: 0 });
        let states = built.faults().unwrap().states(wherry_memory::BlockId(0)).unwrap();
        await_that("the guest to wait for a page", || !states.outstanding().is_empty());
        built.set_load(Load::NONE);
        liar.end_well();
    });
    // The write that waited was done, once its page was there.
    await_that("the guest to go on", || built.cpu.writes() > 0);
    let different = (0..PAGES).filter(|n| page(&original, *n) != page(&built, *n)).count() as u64;
    assert!(different <= built.cpu.writes(), "{different} pages differ after {} writes", built.cpu.writes());
    assert_eq!(pauses, 0);
}

/// A source says something wrong of what follows, before the switch: what the destination's user is told.
fn announce(wrong: impl FnOnce(&mut Liar<'_>) + Send, follow: bool) -> String {
    let world = World::new(Wire::Unix);
    let received = std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let options = world.destination_options.clone();
            wherry_migration::destination::receive(&world.listener, &world.builder, options, &world.destination_journey)
        });
        let mut liar = Liar::poise(&world, follow);
        wrong(&mut liar);
        let answer = liar.control.reader.read_message();
        assert!(matches!(answer, Ok((_, Body::Abort(_))) | Err(_)), "{answer:?}");
        receiving.join().unwrap()
    });
    assert!(!world.built().is_running());
    match received {
        Err(error @ JourneyError::NotHere(_)) => error.to_string(),
        other => panic!("{:?}", other.map(|(_, job)| job)),
    }
}

#[test]
fn a_wrong_word_about_what_follows_ends_the_journey_before_the_switch_by_name() {
    if !permitted() {
        return;
    }
    let follow = |block, runs: &[u64]| Body::Follow(Follow { block, runs: runs.to_vec() });
    for (words, says) in [
        (vec![follow(0, &[0, 1, 2])], "odd number of runs"),
        (vec![follow(0, &[0, PAGES + 1])], "257 pages after 0 skipped"),
        (vec![follow(0, &[0, 200]), follow(0, &[0, 57])], "57 pages after 0 skipped from 200 on"),
        (vec![follow(0, &[u64::MAX, u64::MAX])], "skipped"),
        (vec![follow(0, &[5, 0])], "0 pages after 5 skipped"),
        (vec![follow(3, &[0, 1])], "RAM block 3 that follow: there is no such block"),
        (vec![follow(1 << 16, &[0, 1])], "there is no such block"),
    ] {
        let error = announce(|liar| words.iter().for_each(|word| liar.say(word.clone())), true);
        assert!(error.contains(says), "{says} is missing in {error}");
    }
    let error = announce(|liar| liar.offer(false), true);
    assert!(error.contains("an offer of another kind than was announced"), "{error}");
    let error = announce(|liar| liar.say(follow(0, &[0, 1])), false);
    assert!(error.contains("Follow where an offer was due"), "{error}");
}
