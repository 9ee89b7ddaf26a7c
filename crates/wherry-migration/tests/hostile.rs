//! A source that speaks the protocol and lies: the destination names the lie and runs nothing.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message as _;
use support::{FakeMachine, Wire, World, block, random_vm};
use wherry_migration::JourneyError;
use wherry_migration::machine::Machine;
use wherry_state::{SavedState, StateFile, UnitId};
use wherry_stream::message::{About, Begin, Body, ChannelTotal, Empty, Message, Offer, Poise, UnitState};
use wherry_stream::{Channel, ChannelKind, Extent, ExtentKind, Hello, IoRange};

const MIB: u64 = 1 << 20;

/// A source made by hand.
struct Liar {
    control: Channel,
    data: Channel,
    about: About,
    machine: Arc<FakeMachine>,
}

impl Liar {
    fn say(&mut self, body: Body) {
        self.control.writer.write_message(&Message::new(self.about.clone(), body)).unwrap();
    }

    fn hear(&mut self) -> Body {
        let (about, body) = self.control.reader.read_message().unwrap();
        self.about.incarnation = about.incarnation;
        body
    }

    /// Comes as far as the rounds.
    fn connect(world: &World, change: impl FnOnce(&mut Begin)) -> Result<Self, Body> {
        let machine = FakeMachine::new(random_vm(), &[block(0, 0, MIB)], Arc::default());
        let attempt = random_vm();
        let open = |kind, index| {
            let deadline = Instant::now() + Duration::from_secs(5);
            let connection = world.listener.local_endpoint().connect(deadline).unwrap();
            Hello { kind, index, attempt }.open(connection, deadline)
        };
        let mut control = open(ChannelKind::Control, 0).unwrap();
        let description = machine.description();
        let mut about = About { vm: description.vm.clone(), epoch: 1, attempt: attempt.to_vec(), incarnation: vec![] };
        let mut begin = Begin {
            mode: "precopy".into(),
            channels: 1,
            verify: false,
            features: vec![],
            machine: description.encode_to_vec(),
        };
        change(&mut begin);
        control.writer.write_message(&Message::new(about.clone(), Body::Begin(begin))).unwrap();
        let (answered, body) = control.reader.read_message().unwrap();
        if !matches!(body, Body::Accept(_)) {
            return Err(body);
        }
        about.incarnation = answered.incarnation;
        Ok(Self { control, data: open(ChannelKind::Data, 0).unwrap(), about, machine })
    }

    fn state(&self) -> StateFile {
        let cpu = support::CpuState { writes: 1, seed: 2, bulk: vec![] };
        StateFile { sections: vec![cpu.to_section(&UnitId::new("vcpu", 0))] }
    }

    /// Goes on to the offer, which `change` may falsify. What the destination answers.
    fn offer(mut self, change: impl FnOnce(&mut Offer)) -> Body {
        self.say(Body::Poise(Poise { narrow: false, round: 1, ..Poise::default() }));
        assert_eq!(self.hear(), Body::Poised(Empty {}));
        self.data.writer.write_round_end(1).unwrap();
        self.data.reader.read_frame().unwrap();
        let (state, stats) = (self.state(), self.data.writer.stats());
        let mut offer = Offer {
            follow: false,
            state: state.encode_to_vec(),
            digest: state.digest().to_vec(),
            channels: vec![ChannelTotal {
                frames: stats.frames,
                bytes: stats.bytes,
                checksum: stats.checksum,
                last: stats.last_sequence.unwrap(),
            }],
            stopped_us: 0,
            rounds: 1,
        };
        change(&mut offer);
        self.say(Body::Offer(offer));
        let answer = self.hear();
        if matches!(answer, Body::Ready(_)) {
            self.say(Body::Abort(Default::default()));
        }
        drop(self.machine);
        answer
    }
}

/// Has a liar meet a destination: what the destination's user is told.
fn meet(lie: impl FnOnce(&World) + Send) -> (World, String) {
    let world = World::new(Wire::Unix);
    let error = std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            wherry_migration::destination::receive(
                &world.listener,
                &world.builder,
                world.destination_options.clone(),
                &world.destination_journey,
            )
        });
        lie(&world);
        match receiver.join().unwrap() {
            Ok(_) => panic!("the destination runs what a liar sent"),
            Err(error @ JourneyError::InDoubt(_)) => panic!("{error}"),
            Err(error) => error.to_string(),
        }
    });
    if let Some(built) = &*world.builder.built.lock().unwrap() {
        assert!(!built.is_running());
    }
    (world, error)
}

fn pages(first: u64, count: u32, block: u16) -> Extent {
    Extent { block, kind: ExtentKind::Data, first, count }
}

#[test]
fn an_honest_offer_made_by_hand_is_ready() {
    meet(|world| {
        let answer = Liar::connect(world, |_| {}).ok().unwrap().offer(|_| {});
        assert!(matches!(answer, Body::Ready(_)), "{answer:?}");
    });
}

#[test]
fn a_state_whose_digest_is_another_is_not_loaded() {
    let (world, error) = meet(|world| {
        let answer = Liar::connect(world, |_| {}).ok().unwrap().offer(|offer| offer.digest[0] ^= 1);
        assert!(matches!(&answer, Body::Abort(r) if r.text.contains("digest")), "{answer:?}");
    });
    assert!(error.contains("state did not arrive as sent"), "{error}");
    assert_eq!(world.builder.script.count("restore"), 0);
}

#[test]
fn totals_that_differ_from_what_arrived_are_not_ready() {
    let lies: [fn(&mut ChannelTotal); 4] = [|t| t.frames += 1, |t| t.bytes += 1, |t| t.checksum ^= 1, |t| t.last += 1];
    for lie in lies {
        let (world, error) = meet(|world| {
            let answer = Liar::connect(world, |_| {}).ok().unwrap().offer(|offer| lie(&mut offer.channels[0]));
            assert!(matches!(&answer, Body::Abort(_)), "{answer:?}");
        });
        assert!(error.contains("data channel 0"), "{error}");
        assert_eq!(world.builder.script.count("restore"), 0);
    }
    let (_, error) = meet(|world| {
        Liar::connect(world, |_| {}).ok().unwrap().offer(|offer| offer.channels.clear());
    });
    assert!(error.contains("totals of 0 channels"), "{error}");
}

#[test]
fn state_that_is_garbage_missing_or_of_an_unknown_unit_is_not_loaded() {
    type Lie = fn(&mut Offer);
    let lies: [(Lie, &str); 3] = [
        (|o| o.state = vec![0xff; 40], "state did not arrive"),
        (
            |o| {
                let empty = StateFile { sections: vec![] };
                (o.state, o.digest) = (empty.encode_to_vec(), empty.digest().to_vec());
            },
            "no state for unit vcpu[0]",
        ),
        (
            |o| {
                let mut file = StateFile::decode(o.state.as_slice()).unwrap();
                file.sections[0].unit = "ghost".into();
                (o.state, o.digest) = (file.encode_to_vec(), file.digest().to_vec());
            },
            "vcpu[0]",
        ),
    ];
    for (lie, says) in lies {
        let (_, error) = meet(|world| {
            Liar::connect(world, |_| {}).ok().unwrap().offer(lie);
        });
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn pages_outside_of_ram_are_named_and_nothing_is_written() {
    for (extent, says) in [(pages(255, 2, 0), "not inside RAM block 0"), (pages(0, 1, 9), "RAM block 9")] {
        let (world, error) = meet(|world| {
            let mut liar = Liar::connect(world, |_| {}).ok().unwrap();
            let from = liar.machine.ram().blocks()[0].engine_range(0, 2 * 4096).unwrap();
            #[expect(unsafe_code, reason = "names memory to the kernel, as the engine does")]
            // SAFETY: inside the engine map of a machine that outlives the call.
            let range = unsafe { IoRange::new(from, extent.bytes() as usize) };
            liar.data.writer.write_pages(&[extent], &[range]).unwrap();
            // It ends the connection; whether it still says why depends on who is faster.
            let _ = liar.control.reader.read_message();
        });
        assert!(error.contains(says), "{error}");
        assert_eq!(world.built().allocated_pages(), 0);
    }
}

#[test]
fn state_of_a_unit_without_a_stream_or_out_of_order_is_named() {
    let piece = |unit: &str, instance, offset| {
        Body::UnitState(UnitState { unit: unit.into(), instance, offset, bytes: vec![1; 100] })
    };
    for (bodies, hint) in [
        (vec![piece("vcpu", 0, 0)], "unit \"vcpu\"[0], which has no stream here"),
        (vec![piece("fake-stream", 9, 0)], "unit \"fake-stream\"[9], which has no stream here"),
        (vec![piece("fake-stream", 1, 7)], "unit fake-stream[1] (fake:1): a piece at 7, and 0 are there"),
        (vec![piece("fake-stream", 1, 0), piece("fake-stream", 1, 99)], "a piece at 99, and 100 are there"),
        (vec![Body::Run(Empty {})], "Control frame on a data channel"),
    ] {
        let (_, error) = meet(|world| {
            let mut liar = Liar::connect(world, |_| {}).ok().unwrap();
            for body in bodies {
                liar.data.writer.write_message(&Message::new(liar.about.clone(), body)).unwrap();
            }
            // It hangs up.
            while liar.control.reader.read_message().is_ok() {}
        });
        assert!(error.contains(hint), "{hint}: {error}");
    }
}

#[test]
fn a_begin_that_asks_for_the_impossible_is_refused_with_every_reason() {
    meet(|world| {
        let refused = Liar::connect(world, |begin| {
            begin.mode = "teleport".into();
            begin.channels = 5000;
        });
        match refused.err().unwrap() {
            Body::Refuse(refuse) => {
                let all = refuse.reasons.join("; ");
                assert!(all.contains("teleport") && all.contains("5000 data channels"), "{all}");
            }
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn a_message_out_of_place_ends_the_journey_by_name() {
    let (_, error) = meet(|world| {
        let mut liar = Liar::connect(world, |_| {}).ok().unwrap();
        liar.say(Body::Run(Empty {}));
        let _ = liar.control.reader.read_message();
    });
    assert!(error.contains("Run during precopy"), "{error}");
}
