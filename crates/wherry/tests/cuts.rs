//! The link between two hosts fails while a VM's memory follows it: again and again, in every way, at any moment.
//!
//! A probe guest moves by postcopy between two network namespaces, back and forth over a slow link, and the link is cut
//! under it: connections end (all or one, by a FIN or by a reset), the link goes down shortly or for longer than anyone
//! waits, and all of that while it is being taken up again. After each move both processes have what a move without a cut
//! leaves, and at the end the guest has checked every byte of its data.
//!
//! `WHERRY_CUTS` says how often (a sample unless told; `cargo xtask cuts` makes 100), `WHERRY_CUTS_SEED` repeats a run.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use support::{LIMIT, Place, Vm, heartbeat, kvm, ram, snapshot, wait_for};
use wherry_netlab::{Connection, LEFT, Namespace, Network, RIGHT, Shape, connections};

/// Cuts in the sample.
const SAMPLE: u32 = 14;
/// One cut in so many takes the link away for longer than either end waits (10 s).
const ONE_LONG_IN: u32 = 25;
/// Long enough for both ends to give the link up.
const LONG: Duration = Duration::from_millis(11_500);

/// xorshift64*
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }

    /// The moment is the subject of this test; nothing is waited for.
    fn pause(&mut self, most: Duration) {
        std::thread::sleep(Duration::from_micros(self.below(most.as_micros() as u64)));
    }
}

/// What is done to the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Cut {
    /// Both directions of every connection end (FIN).
    AllShut,
    /// Every connection is reset.
    AllReset,
    /// One connection ends: control, data or urgent.
    OneShut,
    /// One connection is reset.
    OneReset,
    /// The link goes down and comes up again; TCP survives.
    ShortDown,
    /// The link is down for longer than either end waits.
    LongDown,
    /// Every connection ends, several times, while the link is being taken up again.
    Again,
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Descriptors and threads of a process: how many of each kind.
type Possessions = BTreeMap<String, usize>;

fn possessions(vm: &Vm) -> Possessions {
    let mut all = Possessions::new();
    let entries = |what: &str| std::fs::read_dir(format!("/proc/{}/{what}", vm.pid())).into_iter().flatten().flatten();
    for entry in entries("fd") {
        // A socket is as good as another, and so is a log.
        let target = std::fs::read_link(entry.path()).map(|t| t.to_string_lossy().into_owned()).unwrap_or_default();
        let kind = target.split_once(":[").map_or(target.as_str(), |(kind, _)| kind);
        let kind = if kind.ends_with(".log") { "log" } else { kind };
        *all.entry(format!("descriptor {kind}")).or_default() += 1;
    }
    for entry in entries("task") {
        let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        *all.entry(format!("thread {}", name.trim())).or_default() += 1;
    }
    all
}

/// Waits until a process has nothing that it had not at an earlier time, or `unless`.
fn wait_for_no_more_than(most: &Possessions, vm: &Vm, who: &str, unless: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let mut more = possessions(vm);
        more.retain(|what, n| *n > most.get(what).copied().unwrap_or_default());
        if more.is_empty() || unless() {
            return;
        }
        assert!(Instant::now() < deadline, "the {who} still has {more:#?} and had {most:#?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// One process and where it lives.
struct End {
    api: String,
    vm: Vm,
    /// It is in the left namespace.
    left: bool,
}

struct Cutter<'a> {
    place: &'a Place,
    network: &'a Network,
    random: Random,
    made: BTreeMap<Cut, u32>,
    left_to_do: u32,
    until_long: u32,
}

impl Cutter<'_> {
    fn namespace(&self, left: bool) -> &Namespace {
        if left { self.network.left() } else { self.network.right() }
    }

    fn receive(&self, number: usize, left: bool) -> (End, String) {
        let api = number.to_string();
        let listen = format!("tcp:{}:0", if left { LEFT } else { RIGHT });
        let arguments = ["receive", "--listen", &listen, "--linger"];
        let vm = self.place.start_in(self.namespace(left), &api, &arguments);
        let address = self.place.wait_for_state(&api, "listening")["listen"].as_str().unwrap().to_owned();
        (End { api, vm, left }, address)
    }

    /// Moves the VM, and cuts its link while its memory follows if that is wanted.
    fn travel(&mut self, here: &mut End, number: usize, cut: bool) -> (End, Value) {
        let (there, address) = self.receive(number, !here.left);
        let channels = (1 + self.random.below(3)).to_string();
        let api = self.place.path(&here.api);
        let mut migrate = self.place.command(&["migrate", "--json", "--mode", "postcopy", "--to", &address]);
        migrate.args(["--channels", &channels, "--api"]).arg(api).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut migrate = migrate.spawn().unwrap();
        wait_for("the VM to run there", || {
            (self.phase(here)? == "postcopy" || migrate.try_wait().unwrap().is_some()).then_some(())
        });
        let most = (possessions(&here.vm), possessions(&there.vm));
        while cut && self.left_to_do > 0 && self.phase(here).is_some_and(|phase| phase != "done") {
            let kind = self.choose();
            let wanted = if kind == Cut::Again { 2 + self.random.below(4) as u32 } else { 1 };
            let made = (0..wanted).filter(|_| self.cut(kind, here, &there)).count() as u32;
            *self.made.entry(kind).or_default() += made;
            self.left_to_do = self.left_to_do.saturating_sub(made);
            if self.random.below(3) > 0 {
                wait_for("the link to be taken up", || (self.phase(here)? != "paused").then_some(()));
                let unless = || self.phase(here).is_some_and(|phase| phase != "postcopy");
                wait_for_no_more_than(&most.0, &here.vm, "source", unless);
                wait_for_no_more_than(&most.1, &there.vm, "destination", unless);
            }
            self.random.pause(Duration::from_millis(400));
        }
        let begun = Instant::now();
        while migrate.try_wait().unwrap().is_none() {
            assert!(begun.elapsed() < LIMIT, "the migration did not end: {:#?}", self.place.status(&here.api));
            std::thread::sleep(Duration::from_millis(5));
        }
        let output = migrate.wait_with_output().unwrap();
        // The command leaves a journey that is paused for longer than it waits to the two ends, which go on trying.
        let given_up = output.status.code() == Some(3);
        assert!(given_up || output.status.success(), "{}\n{}", support::stderr(&output), here.vm.log());
        if !given_up {
            return (there, serde_json::from_slice(&output.stdout).unwrap());
        }
        wait_for("the memory to follow without the command", || (self.phase(here)? == "done").then_some(()));
        (there, self.place.ask(&here.api, "/migration").unwrap())
    }

    /// Of the source's journey.
    fn phase(&self, here: &End) -> Option<String> {
        Some(self.place.ask(&here.api, "/migration")?["phase"].as_str()?.to_owned())
    }

    fn choose(&mut self) -> Cut {
        self.until_long = self.until_long.saturating_sub(1);
        if self.until_long == 0 {
            self.until_long = ONE_LONG_IN;
            return Cut::LongDown;
        }
        [Cut::AllShut, Cut::AllReset, Cut::OneShut, Cut::OneReset, Cut::ShortDown, Cut::Again]
            [self.random.below(6) as usize]
    }

    /// Cuts the link, if there is anything to cut.
    fn cut(&mut self, kind: Cut, here: &End, there: &End) -> bool {
        // Whoever's connections are cut, the other end is told by the network.
        let end = if self.random.below(2) == 0 { here } else { there };
        let all = connections(end.vm.pid()).unwrap();
        if all.is_empty() && !matches!(kind, Cut::ShortDown | Cut::LongDown) {
            return false;
        }
        match kind {
            Cut::AllShut => all.iter().for_each(|connection| connection.shut().unwrap()),
            Cut::Again => {
                all.iter().for_each(|connection| connection.shut().unwrap());
                self.random.pause(Duration::from_millis(25));
            }
            Cut::AllReset => self.reset(end, None),
            Cut::OneShut | Cut::OneReset => {
                let one = &all[self.random.below(all.len() as u64) as usize];
                if kind == Cut::OneShut { one.shut().unwrap() } else { self.reset(end, Some(one)) }
            }
            Cut::ShortDown | Cut::LongDown => {
                self.network.down().unwrap();
                match kind {
                    Cut::LongDown => std::thread::sleep(LONG),
                    _ => self.random.pause(Duration::from_millis(1500)),
                }
                self.network.up().unwrap();
            }
        }
        true
    }

    /// Has the kernel reset the connections of an end, or one of them.
    fn reset(&self, end: &End, one: Option<&Connection>) {
        let mut command = Command::new("ss");
        command.args(["--kill", "--tcp", "--no-header", "state", "established"]);
        if let Some(connection) = one {
            // Both ports: those at the listening end are all the same.
            command.args(["src", &format!(":{}", connection.port), "dst", &format!(":{}", connection.peer_port)]);
        }
        let output = self.namespace(end.left).hold(&mut command).unwrap().output().unwrap();
        assert!(output.status.success(), "{}", support::stderr(&output));
    }
}

#[test]
fn a_vm_survives_every_cut_of_its_link_while_its_memory_follows() {
    let test = "a_vm_survives_every_cut_of_its_link_while_its_memory_follows";
    if !kvm(test) {
        return;
    }
    if let Some(what) = wherry_netlab::missing() {
        println!("SKIPPED {test}: {what}");
        return;
    }
    let cuts = number("WHERRY_CUTS").map_or(SAMPLE, |n| n as u32);
    let seed = number("WHERRY_CUTS_SEED").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        now.as_nanos() as u64 % 1_000_000
    });
    println!("{cuts} cuts, WHERRY_CUTS_SEED={seed}");

    let begun = Instant::now();
    let place = Place::new();
    // 160 Mbit/s: the memory of this guest is on its way for some seconds.
    let network = Network::shaped(Shape::new(Duration::from_micros(500), 20_000_000)).unwrap();
    let mut cutter = Cutter {
        place: &place,
        network: &network,
        random: Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
        made: BTreeMap::new(),
        left_to_do: cuts,
        until_long: cuts.min(ONE_LONG_IN).div_ceil(2),
    };
    let arguments =
        ["run", "--memory", "256M", "--cpus", "2", "--cmdline", "data=64M rate=20M", "--name", "cut", "--linger"];
    let vm = place.start_in(network.left(), "0", &arguments);
    place.wait_until_filled("0");
    let mut here = End { api: "0".into(), vm, left: true };

    let (mut left_behind, mut arrived) = (Possessions::new(), Possessions::new());
    let (mut number, mut felt) = (0, 0);
    while number < 2 || cutter.left_to_do > 0 {
        let before = cutter.left_to_do;
        // The first two moves are not cut: what they leave is what a move leaves at each end, whether the VM had come
        // by a move itself or not.
        let (there, job) = cutter.travel(&mut here, number + 1, number >= 2);
        assert_eq!((&job["phase"], &job["memory_remaining"]), (&"done".into(), &0.into()), "{job:#}");
        let ram = ram(&place.wait_for_state(&there.api, "running"));
        let beat = heartbeat(&ram);
        wait_for("the guest's heart to beat", || (heartbeat(&ram) > beat).then_some(()));
        snapshot(&ram).unwrap();
        let took = job["postcopy"]["duration_us"].as_u64().unwrap() / 1000;
        let lost = |end: &End, who: &str| end.vm.log().matches(&format!("lost the {who} while memory follows")).count();
        let (at_source, at_destination) = (lost(&here, "destination"), lost(&there, "source"));
        felt += at_source.min(at_destination);
        println!(
            "move {}: {} cuts, felt {at_source} times at the source and {at_destination} at the destination, \
             {took} ms after the last",
            number + 1,
            before - cutter.left_to_do,
        );

        if number < 2 {
            // Whatever a journey's end takes down has been taken down when nothing changes any more.
            left_behind = at_rest(&here.vm);
            arrived = at_rest(&there.vm);
        } else {
            wait_for_no_more_than(&left_behind, &here.vm, "source", || false);
            wait_for_no_more_than(&arrived, &there.vm, "destination", || false);
        }
        place.control(&here.api, &["stop"]);
        assert_eq!(here.vm.end().code(), Some(0), "{}", here.vm.log());
        here = there;
        number += 1;
    }
    place.finish(&here.api, &mut here.vm);
    println!("{} s, {number} moves, cuts: {:?}, felt at both ends: {felt}", begun.elapsed().as_secs(), cutter.made);
    // TCP survives some, and some come before the link has been taken up again.
    assert!(felt >= cuts as usize / 3, "only {felt} of {cuts} cuts were felt at both ends");
}

/// What a process has when it has had the same for half a second.
fn at_rest(vm: &Vm) -> Possessions {
    let mut last = (possessions(vm), Instant::now());
    wait_for("descriptors and threads to stay the same", || {
        let now = possessions(vm);
        if now != last.0 {
            last = (now.clone(), Instant::now());
        }
        (last.1.elapsed() > Duration::from_millis(500)).then_some(now)
    })
}
