//! Two ends talk over a link, as programs would.
#![expect(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use wherry_netlab::{LEFT, Network, RIGHT, Shape, connections};

const LIMIT: Duration = Duration::from_secs(20);

fn can(test: &str) -> bool {
    let missing = wherry_netlab::missing();
    if let Some(what) = &missing {
        println!("SKIPPED {test}: {what}");
    }
    missing.is_none()
}

/// A connection from left to right, and its two ends.
fn connect(network: &Network) -> (TcpStream, TcpStream) {
    let listener = network.right().within(|| TcpListener::bind((RIGHT, 0)).unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let near = network.left().within(|| TcpStream::connect_timeout(&address, LIMIT).unwrap()).unwrap();
    let (far, _) = listener.accept().unwrap();
    for end in [&near, &far] {
        end.set_read_timeout(Some(LIMIT)).unwrap();
        end.set_nodelay(true).unwrap();
    }
    (near, far)
}

/// A byte there and one back.
fn round_trip(near: &mut TcpStream, far: &mut TcpStream) -> Duration {
    let begun = Instant::now();
    near.write_all(b"?").unwrap();
    far.read_exact(&mut [0]).unwrap();
    far.write_all(b"!").unwrap();
    near.read_exact(&mut [0]).unwrap();
    begun.elapsed()
}

#[test]
fn a_round_trip_takes_at_least_twice_the_delay() {
    if !can("a_round_trip_takes_at_least_twice_the_delay") {
        return;
    }
    let delay = Duration::from_millis(7);
    let network = Network::shaped(Shape::new(delay, 1 << 30)).unwrap();
    let (mut near, mut far) = connect(&network);
    for _ in 0..5 {
        let took = round_trip(&mut near, &mut far);
        assert!(took >= 2 * delay, "{took:?}");
    }
    let [there, back] = network.traffic().unwrap();
    assert!(there.packets >= 5 && back.packets >= 5, "{there:?} {back:?}");
}

#[test]
fn a_rate_is_held_and_everything_arrives_in_order() {
    if !can("a_rate_is_held_and_everything_arrives_in_order") {
        return;
    }
    let shape = Shape::new(Duration::from_millis(1), 10_000_000);
    let network = Network::shaped(shape).unwrap();
    let (mut near, mut far) = connect(&network);
    let sent: Vec<u8> = (0..4_000_000u32).map(|n| (n ^ (n >> 8)) as u8).collect();
    let mut arrived = vec![0; sent.len()];
    let begun = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| near.write_all(&sent).unwrap());
        far.read_exact(&mut arrived).unwrap();
    });
    let took = begun.elapsed();
    assert!(arrived == sent, "what arrived is not what was sent");
    assert!(took >= Duration::from_millis(400), "4 MB over 10 MB/s took {took:?}");
    assert!(network.traffic().unwrap()[0].bytes >= 4_000_000);
}

#[test]
fn a_link_that_is_down_carries_nothing_and_goes_on_when_it_is_up() {
    if !can("a_link_that_is_down_carries_nothing_and_goes_on_when_it_is_up") {
        return;
    }
    for network in [Network::new().unwrap(), Network::shaped(Shape::new(Duration::ZERO, 1 << 30)).unwrap()] {
        let (mut near, mut far) = connect(&network);
        round_trip(&mut near, &mut far);
        network.down().unwrap();
        near.write_all(b"?").unwrap();
        far.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let heard = far.read(&mut [0]);
        assert!(heard.is_err(), "over a link that is down came {heard:?}");
        far.set_read_timeout(Some(LIMIT)).unwrap();
        network.up().unwrap();
        far.read_exact(&mut [0]).unwrap();
        round_trip(&mut near, &mut far);
    }
}

#[test]
fn a_program_that_is_held_inside_has_its_network_and_the_files_outside() {
    if !can("a_program_that_is_held_inside_has_its_network_and_the_files_outside") {
        return;
    }
    let network = Network::new().unwrap();
    let mut command = Command::new("ip");
    command.args(["-o", "-4", "address"]).stdin(Stdio::null());
    let output = network.left().hold(&mut command).unwrap().output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains(LEFT) && !said.contains(RIGHT), "{said}");

    let mut sleeper = Command::new("sleep");
    let mut child = network.right().hold(sleeper.arg("1000")).unwrap().spawn().unwrap();
    assert_eq!(connections(child.id()).unwrap().len(), 0);
    child.kill().unwrap();
    child.wait().unwrap();
}
