//! Live update between two halves that share memory as two processes would: whatever either does, one of them runs the machine.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod support;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use support::{FakeHeir, FakeMachine, Load, await_that, block, random_vm};
use wherry_handover::{Channel, KeptId, MOST_DESCRIPTORS};
use wherry_migration::machine::Machine;
use wherry_migration::progress::{Job, Phase};
use wherry_migration::testpoint::Point;
use wherry_migration::update::message::{Body, Empty, Failed, Hello, Running};
use wherry_migration::update::{
    HandOver, UpdateError, UpdateOptions, hand_over, hand_over_by_exec, take_over, take_over_executed,
};
use wherry_migration::{Cause, Journey};

const MIB: u64 = 1 << 20;

fn guest() -> Arc<FakeMachine> {
    let machine = FakeMachine::new(random_vm(), &[block(0, 0, 8 * MIB), block(7, 64 * MIB, MIB)], Arc::default());
    machine.fill(0, 0..500, 3);
    machine.power_on(Load { rate: 2000, pages: 2000, zero_one_in: 7 });
    machine
}

fn event(count: u32) -> Arc<OwnedFd> {
    Arc::new(eventfd(count, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap())
}

fn short() -> UpdateOptions {
    let limit = Duration::from_secs(2);
    UpdateOptions { hello: limit, build: limit, drain: limit, stop: limit, load: Duration::from_secs(1) }
}

type Old = Result<Job, UpdateError>;
type New = Result<Option<Arc<dyn Machine>>, UpdateError>;

/// Both halves, and what holds them up on the way.
#[derive(Default)]
struct World {
    old: Journey,
    new: Journey,
    heir: FakeHeir,
    /// How often users were held off, and let in again.
    holds: [AtomicU32; 2],
}

impl World {
    fn hand_over(&self, machine: &Arc<FakeMachine>, channel: Channel) -> Old {
        let hold = |hold: bool| {
            self.holds[usize::from(!hold)].fetch_add(1, Ordering::SeqCst);
        };
        let what = HandOver { machine: machine.clone(), entries: vec![], host: b"host".to_vec(), channel, hold: &hold };
        hand_over(what, short(), &self.old)
    }

    fn update(&self, machine: &Arc<FakeMachine>) -> (Old, New) {
        let (ours, theirs) = Channel::pair().unwrap();
        std::thread::scope(|scope| {
            let new = scope.spawn(|| take_over(theirs, &self.heir, short(), &self.new));
            let old = self.hand_over(machine, ours);
            (old, new.join().unwrap())
        })
    }

    /// The old half by exec, with a new one that proves as told.
    fn exec(
        &self,
        machine: &Arc<FakeMachine>,
        new: impl FnOnce(Channel) + Send,
        exec: &dyn Fn(Channel) -> std::io::Error,
    ) -> UpdateError {
        let (ours, theirs) = Channel::pair().unwrap();
        let hold = |hold: bool| {
            self.holds[usize::from(!hold)].fetch_add(1, Ordering::SeqCst);
        };
        std::thread::scope(|scope| {
            scope.spawn(move || new(theirs));
            let (machine, host) = (machine.clone(), b"host".to_vec());
            let what = HandOver { machine, entries: vec![], host, channel: ours, hold: &hold };
            hand_over_by_exec(what, exec, short(), &self.old)
        })
    }

    /// The old half with a new one that says what it is told to.
    fn with_new(&self, machine: &Arc<FakeMachine>, new: impl FnOnce(Channel) + Send) -> Old {
        let (ours, theirs) = Channel::pair().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || new(theirs));
            self.hand_over(machine, ours)
        })
    }
}

fn assert_stayed(world: &World, machine: &FakeMachine, old: &Old, what: &str) {
    assert!(old.is_err(), "{what}: {old:?}");
    assert!(machine.is_running(), "{what}: it does not run any more: {old:?}");
    if let Some(built) = &*world.heir.built.lock().unwrap() {
        assert!(!built.is_running(), "{what}: it runs twice");
    }
    let before = machine.cpu.writes();
    await_that("the guest to write on", || machine.cpu.writes() > before);
    let (holds, lets) = (world.holds[0].load(Ordering::SeqCst), world.holds[1].load(Ordering::SeqCst));
    assert!(lets >= holds, "{what}: users are held off for ever");
    assert!(!machine.registry.is_leaving(), "{what}");
}

#[test]
fn the_machine_goes_over_with_its_memory_its_descriptors_and_what_is_said_beside_it() {
    let machine = guest();
    // More than go in one parcel.
    let kept: Vec<_> = (0..MOST_DESCRIPTORS as u32 + 30).map(|n| (KeptId::new("event", n), event(n + 1))).collect();
    for (id, event) in &kept {
        machine.registry.keep(id.clone(), event.clone()).unwrap();
    }
    let mut world = World::default();
    world.heir.claims = kept.iter().map(|(id, _)| id.clone()).collect();
    let (old, new) = world.update(&machine);
    let job = old.unwrap();
    assert_eq!((job.phase, job.error), (Phase::Done, None));
    assert!(job.blackout.unwrap().total_us > 0 && job.downtime_us > 0);
    drop(new.unwrap());
    let built = world.heir.built.lock().unwrap().clone().unwrap();
    assert!(built.is_running() && !machine.is_running());
    assert_eq!(*world.heir.host.lock().unwrap(), b"host");
    for (n, fd) in world.heir.claimed.lock().unwrap().iter().enumerate() {
        let mut count = [0; 8];
        rustix::io::read(fd, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), n as u64 + 1, "each under its own name");
    }
    built.set_load(Load { rate: 5000, pages: 100, zero_one_in: 0 });
    let before = built.cpu.writes();
    await_that("the guest to go on", || built.cpu.writes() > before + 10);
    assert_eq!((world.holds[0].load(Ordering::SeqCst), world.holds[1].load(Ordering::SeqCst)), (1, 0));
    assert!(!built.registry.succeeds(), "what it needs from now on it makes itself");
}

#[test]
fn what_changes_while_the_new_process_builds_goes_over_as_it_is_at_the_stop() {
    let machine = guest();
    let (stays, goes) = (event(1), Mutex::new(Some(event(2))));
    machine.registry.keep(KeptId::new("stays", 0), stays.clone()).unwrap();
    machine.registry.keep(KeptId::new("goes", 0), goes.lock().unwrap().clone().unwrap()).unwrap();
    let mut world = World::default();
    world.heir.claims = vec![KeptId::new("stays", 0), KeptId::new("goes", 0)];
    let (registry, late) = (machine.registry.clone(), Mutex::new(None));
    let late = Arc::new(late);
    let keeper = late.clone();
    world.old.set_test_hook(move |point| {
        if point == Point::OldDrained {
            goes.lock().unwrap().take();
            let new = event(9);
            registry.keep(KeptId::new("late", 0), new.clone()).unwrap();
            *keeper.lock().unwrap() = Some(new);
        }
    });
    // Nobody claims what came late: that is told before the machine is taken.
    let (old, new) = world.update(&machine);
    assert_stayed(&world, &machine, &old, "late");
    let error = old.unwrap_err().to_string();
    assert!(error.contains("late[0]"), "{error}");
    assert!(matches!(new, Err(UpdateError::Refused(_))));
}

#[test]
fn a_failure_of_a_unit_at_any_step_leaves_the_machine_where_it_was() {
    for step in ["drain", "begin-stop", "finish-stop", "save"] {
        let (machine, world) = (guest(), World::default());
        machine.script.fail(step);
        let (old, new) = world.update(&machine);
        assert_stayed(&world, &machine, &old, step);
        assert!(old.unwrap_err().to_string().contains(&format!("{step} fails as told")), "{step}");
        assert!(new.is_err());
    }
    let (machine, world) = (guest(), World::default());
    world.heir.script.fail("restore");
    let (old, new) = world.update(&machine);
    assert_stayed(&world, &machine, &old, "restore");
    let error = old.unwrap_err().to_string();
    assert!(error.contains("gave up") && error.contains("restore fails as told"), "{error}");
    assert!(matches!(new, Err(UpdateError::NotHere(_))));
}

#[test]
fn a_new_process_that_cannot_start_what_it_has_taken_says_that_it_is_lost_and_nobody_else_runs_it() {
    let (machine, world) = (guest(), World::default());
    world.heir.script.fail("start");
    let (old, new) = world.update(&machine);
    assert!(matches!(new, Err(UpdateError::Lost(_))));
    let job = old.unwrap();
    assert!(job.error.unwrap().contains("start"), "the old process knows that it went wrong");
    assert!(!machine.is_running());
}

#[test]
fn what_cannot_be_kept_or_built_or_claimed_is_refused_by_name() {
    let (machine, world) = (guest(), World::default());
    machine.blockers.lock().unwrap().push("the tape drive".into());
    let (old, _) = world.update(&machine);
    assert_stayed(&world, &machine, &old, "blocked");
    assert!(matches!(old, Err(UpdateError::RunsHere(Cause::CannotKeep(reasons))) if reasons == ["the tape drive"]));

    let machine = guest();
    let mut world = World::default();
    world.heir.refuse = vec!["no such CPU".into(), "no such disk".into()];
    let (old, new) = world.update(&machine);
    assert_stayed(&world, &machine, &old, "refused");
    assert!(matches!(old, Err(UpdateError::Refused(reasons)) if reasons == ["no such CPU", "no such disk"]));
    assert!(matches!(new, Err(UpdateError::Refused(_))));

    let (machine, world) = (guest(), World::default());
    let _kept = event(0);
    machine.registry.keep(KeptId::new("tape", 3), _kept.clone()).unwrap();
    let (old, _) = world.update(&machine);
    assert_stayed(&world, &machine, &old, "unclaimed");
    assert!(old.unwrap_err().to_string().contains("tape[3]"));
}

#[test]
fn an_update_that_is_cancelled_leaves_the_machine_where_it_was() {
    for point in [Point::OldConnected, Point::OldBuilt, Point::OldDrained] {
        let (machine, world) = (guest(), World::default());
        let journey = world.old.clone();
        world.old.set_test_hook(move |at| {
            if at == point {
                assert!(journey.cancel());
            }
        });
        let (old, _) = world.update(&machine);
        assert_stayed(&world, &machine, &old, &point.to_string());
        assert!(matches!(old, Err(UpdateError::Cancelled)), "{point}: {old:?}");
        assert_eq!(world.old.job().phase, Phase::Cancelled);
    }
    // Too late: the guest stands still already.
    let (machine, world) = (guest(), World::default());
    let journey = world.old.clone();
    world.old.set_test_hook(move |at| {
        if at == Point::OldStopped {
            assert!(!journey.cancel());
        }
    });
    let (old, new) = world.update(&machine);
    assert!(old.is_ok() && new.is_ok());
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

fn say(channel: &Channel, body: Body) {
    // An error: the other half has given up.
    let _ = channel.send(body.tag(), &body.encode(), &[], soon());
}

/// Reads until a message of that tag has come.
fn hear(channel: &mut Channel, tag: u16) {
    while channel.receive(soon(), Duration::ZERO).unwrap().tag != tag {}
}

fn hello() -> Body {
    Body::Hello(Hello { newest: 2, oldest: 1, program: "a script\u{1b}[0m".into() })
}

/// Comes as far as the state, which it reads and does nothing with.
fn until_state(channel: &mut Channel) {
    say(channel, hello());
    hear(channel, 4);
    say(channel, Body::Built(Empty {}));
    hear(channel, 9);
}

#[test]
fn a_new_process_that_breaks_the_protocol_or_is_silent_is_told_apart_and_the_machine_runs_on() {
    type Script = fn(Channel);
    let scripts: [(&str, &str, Script); 11] = [
        ("silent", "silent for 2s while it was to say who it is", |channel| {
            std::thread::sleep(Duration::from_millis(2300));
            drop(channel);
        }),
        ("gone", "closed", drop),
        ("garbage", "unknown tag", |channel| channel.send(99, b"?", &[], soon()).unwrap()),
        ("wrong first word", "Built out of turn", |channel| say(&channel, Body::Built(Empty {}))),
        ("another protocol", "speaks versions 7 to 9", |channel| {
            say(&channel, Body::Hello(Hello { newest: 9, oldest: 7, program: "future".into() }));
        }),
        ("descriptors", "with 1 descriptors, not 0", |channel| {
            let body = hello();
            channel.send(body.tag(), &body.encode(), &[event(0).as_fd()], soon()).unwrap();
        }),
        ("broken message", "cannot be read", |channel| channel.send(1, &[0xff; 3], &[], soon()).unwrap()),
        ("runs unasked", "Running out of turn", |mut channel| {
            say(&channel, hello());
            hear(&mut channel, 4);
            say(&channel, Body::Running(Running { load_us: 1, start_us: 1 }));
        }),
        ("says that it runs, and does not", "Running out of turn", |mut channel| {
            until_state(&mut channel);
            say(&channel, Body::Running(Running { load_us: 1, start_us: 1 }));
        }),
        ("hangs with the state", "silent for 1s while it was to load", |mut channel| {
            until_state(&mut channel);
            std::thread::sleep(Duration::from_millis(1500));
        }),
        ("gives up", "gave up: no reason", |mut channel| {
            until_state(&mut channel);
            say(&channel, Body::Failed(Failed { reason: "no reason".into() }));
        }),
    ];
    for (name, hint, script) in scripts {
        let (machine, world) = (guest(), World::default());
        let old = world.with_new(&machine, script);
        assert_stayed(&world, &machine, &old, name);
        let error = old.unwrap_err().to_string();
        assert!(error.contains(hint), "{name}: {error}");
        assert!(!error.contains('\u{1b}'), "{name}: {error:?}");
        assert_eq!(world.old.job().phase, Phase::Failed, "{name}");
        // And the machine can be updated all the same.
        let (old, new) = World { old: Journey::new(), ..world }.update(&machine);
        assert!(old.is_ok() && new.is_ok(), "{name}: {old:?}");
    }
}

#[test]
fn a_new_process_that_is_too_slow_to_load_finds_that_the_offer_was_taken_back() {
    let (machine, world) = (guest(), World::default());
    world.new.set_test_hook(|at| {
        if at == Point::NewLoaded {
            std::thread::sleep(short().load + Duration::from_millis(300));
        }
    });
    let (old, new) = world.update(&machine);
    assert_stayed(&world, &machine, &old, "slow");
    assert!(old.unwrap_err().to_string().contains("silent for 1s while it was to load"));
    assert!(new.err().unwrap().to_string().contains("was taken back"));
}

#[test]
fn a_new_process_that_spoils_the_word_is_told_of_and_the_old_one_dares_not_run_the_machine() {
    let (machine, world) = (guest(), World::default());
    let old = world.with_new(&machine, |mut channel| {
        say(&channel, hello());
        let mut word = None;
        loop {
            let parcel = channel.receive(soon(), Duration::ZERO).unwrap();
            match parcel.tag {
                // The word is the first of all descriptors.
                3 => word = word.or_else(|| parcel.descriptors.into_iter().next()),
                4 => say(&channel, Body::Built(Empty {})),
                9 => break,
                _ => {}
            }
        }
        std::fs::File::from(word.unwrap()).write_all_at(&[0xff; 8], 0).unwrap();
        // Until the old one has seen it.
        let _ = channel.receive(soon(), Duration::ZERO);
    });
    assert!(matches!(&old, Err(UpdateError::Lost(why)) if why.contains("overwritten")), "{old:?}");
    assert!(!machine.is_running());
}

#[test]
fn an_old_process_that_breaks_the_protocol_or_ends_is_told_apart_and_nothing_runs_in_the_new_one() {
    type Script = fn(Channel);
    let scripts: [(&str, &str, Script); 5] = [
        ("gone", "closed", drop),
        ("garbage", "unknown tag", |channel| channel.send(99, b"?", &[], soon()).unwrap()),
        ("out of turn", "Poise out of turn", |channel| say(&channel, Body::Poise(Empty {}))),
        ("no word", "no descriptor run-word", |mut channel| {
            hear(&mut channel, 1);
            say(
                &channel,
                Body::Describe(wherry_migration::update::message::Describe { protocol: 1, ..Default::default() }),
            );
            say(&channel, Body::Build(Empty {}));
        }),
        ("another protocol", "version 4", |mut channel| {
            hear(&mut channel, 1);
            say(
                &channel,
                Body::Describe(wherry_migration::update::message::Describe { protocol: 4, ..Default::default() }),
            );
        }),
    ];
    for (name, hint, script) in scripts {
        let world = World::default();
        let (ours, theirs) = Channel::pair().unwrap();
        let new = std::thread::scope(|scope| {
            scope.spawn(move || script(ours));
            take_over(theirs, &world.heir, short(), &world.new)
        });
        let error = new.err().unwrap().to_string();
        assert!(error.contains(hint), "{name}: {error}");
        assert!(world.heir.built.lock().unwrap().is_none(), "{name}");
    }
}

#[test]
fn a_program_that_is_executed_finds_all_of_it_in_the_queue_and_one_that_only_proves_never_runs() {
    let machine = guest();
    let kept: Vec<_> = (0..MOST_DESCRIPTORS as u32 + 30).map(|n| (KeptId::new("event", n), event(n + 1))).collect();
    for (id, event) in &kept {
        machine.registry.keep(id.clone(), event.clone()).unwrap();
    }
    let claims: Vec<_> = kept.iter().map(|(id, _)| id.clone()).collect();
    let (mut world, mut executed) = (World::default(), World::default());
    world.heir.claims = claims.clone();
    executed.heir.claims = claims;
    let proof = |channel| assert!(take_over(channel, &world.heir, short(), &world.new).unwrap().is_none());
    let exec = |queue| {
        assert!(!machine.is_running() && !world.heir.built.lock().unwrap().as_ref().unwrap().is_running());
        drop(take_over_executed(queue, &executed.heir, short(), &executed.new).unwrap());
        let built = executed.heir.built.lock().unwrap().clone().unwrap();
        assert!(built.is_running() && !built.registry.succeeds());
        built.set_load(Load { rate: 5000, pages: 100, zero_one_in: 0 });
        let before = built.cpu.writes();
        await_that("the guest to go on", || built.cpu.writes() > before + 10);
        // This process goes on after it, as no process does: the machine is to run once.
        built.units().stop(Duration::from_secs(1)).unwrap();
        std::io::Error::other("it was executed")
    };
    let error = world.exec(&machine, proof, &exec);
    assert_stayed(&world, &machine, &Err(error), "executed");
    assert_eq!(*executed.heir.host.lock().unwrap(), b"host");
    for (n, fd) in executed.heir.claimed.lock().unwrap().iter().enumerate() {
        let mut count = [0; 8];
        rustix::io::read(fd, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), n as u64 + 1, "each under its own name");
    }
    let job = executed.new.job();
    let blackout = job.blackout.unwrap();
    assert_eq!((job.phase, job.role.as_str(), job.downtime_us), (Phase::Done, "destination", blackout.total_us));
    assert!(blackout.total_us >= blackout.stop_us + blackout.state_us + blackout.load_us + blackout.start_us);
}

#[test]
fn a_program_that_proves_nothing_is_never_executed_and_one_that_cannot_be_leaves_the_machine_running() {
    type Script = fn(Channel);
    let scripts: [(&str, &str, Script); 4] = [
        ("an older one", "speaks versions 1 to 1 of the update protocol, and this needs 2 to 2", |channel| {
            say(&channel, Body::Hello(Hello { newest: 1, oldest: 1, program: "old".into() }));
        }),
        ("gone with the state", "closed", |mut channel| until_state(&mut channel)),
        ("hangs with the state", "silent for 1s while it was to prove", |mut channel| {
            until_state(&mut channel);
            std::thread::sleep(Duration::from_millis(1500));
        }),
        ("runs instead", "Running out of turn", |mut channel| {
            until_state(&mut channel);
            say(&channel, Body::Running(Running { load_us: 1, start_us: 1 }));
        }),
    ];
    for (name, hint, script) in scripts {
        let (machine, world) = (guest(), World::default());
        let error = world.exec(&machine, script, &|_| panic!("{name}: it was executed"));
        let said = error.to_string();
        assert_stayed(&world, &machine, &Err(error), name);
        assert!(said.contains(hint), "{name}: {said}");
    }
    let (machine, world) = (guest(), World::default());
    let proof = |channel| assert!(take_over(channel, &world.heir, short(), &world.new).unwrap().is_none());
    let error = world.exec(&machine, proof, &|_| std::io::Error::other("no such program"));
    let said = error.to_string();
    assert_stayed(&world, &machine, &Err(error), "not executed");
    assert!(said.contains("executing the new program: no such program"), "{said}");
}
