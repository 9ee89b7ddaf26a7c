//! Two hosts, and a journey from one to the other.

use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use wherry_migration::machine::Machine;
use wherry_migration::progress::Job;
use wherry_migration::{DestinationOptions, Journey, JourneyError, Mode, SourceOptions, Timeouts};
use wherry_stream::{Endpoint, Listener};

use super::{FakeBuilder, FakeMachine, wait_or};

/// Waits that would otherwise last minutes.
pub fn short() -> Timeouts {
    Timeouts {
        connect: Duration::from_secs(5),
        build: Duration::from_secs(5),
        silent: Duration::from_secs(2),
        drain: Duration::from_secs(2),
        stop: Duration::from_secs(2),
        load: Duration::from_secs(3),
        running: Duration::from_secs(2),
    }
}

/// How the two ends are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    Unix,
    Tcp,
}

pub type Sent = Result<Job, JourneyError>;
pub type Received = Result<(Arc<dyn Machine>, Job), JourneyError>;

/// Two hosts.
pub struct World {
    pub source_records: TempDir,
    pub destination_records: TempDir,
    sockets: TempDir,
    pub listener: Listener,
    pub source_journey: Journey,
    pub destination_journey: Journey,
    pub builder: FakeBuilder,
    pub source_options: SourceOptions,
    pub destination_options: DestinationOptions,
}

fn on_tmpfs() -> TempDir {
    tempfile::Builder::new().prefix("wherry-test-").tempdir_in("/dev/shm").unwrap()
}

impl World {
    pub fn new(wire: Wire) -> Self {
        let (source_records, destination_records) = (on_tmpfs(), on_tmpfs());
        let sockets = tempfile::tempdir().unwrap();
        let endpoint = match wire {
            Wire::Unix => Endpoint::Unix(sockets.path().join("listen")),
            Wire::Tcp => Endpoint::Tcp { host: "127.0.0.1".into(), port: 0 },
        };
        Self {
            listener: Listener::bind(&endpoint).unwrap(),
            source_journey: Journey::new(),
            destination_journey: Journey::new(),
            builder: FakeBuilder::new(),
            source_options: SourceOptions {
                // Tests of other modes say so.
                mode: Mode::Precopy,
                records: source_records.path().into(),
                timeouts: short(),
                doubt: Some(Duration::from_secs(5)),
                recover: Some(Duration::from_secs(8)),
                deadline: Duration::from_secs(30),
                ..SourceOptions::default()
            },
            destination_options: DestinationOptions {
                records: destination_records.path().into(),
                timeouts: short(),
                wait_for_source: Some(Duration::from_secs(10)),
                doubt: Some(Duration::from_secs(5)),
                recover: Some(Duration::from_secs(8)),
                ..DestinationOptions::default()
            },
            source_records,
            destination_records,
            sockets,
        }
    }

    /// Runs both ends to their end; `to` is where the source connects, if not directly.
    pub fn journey(&self, machine: &Arc<FakeMachine>, to: Option<&Endpoint>) -> (Sent, Received) {
        std::thread::scope(|scope| {
            let receiver = std::thread::Builder::new()
                .name("fake-receive".into())
                .spawn_scoped(scope, || {
                    wherry_migration::destination::receive(
                        &self.listener,
                        &self.builder,
                        self.destination_options.clone(),
                        &self.destination_journey,
                    )
                })
                .unwrap();
            let to = to.unwrap_or(self.listener.local_endpoint());
            let sent =
                wherry_migration::source::send(machine.clone(), to, self.source_options.clone(), &self.source_journey);
            if sent.is_err() {
                // A destination that the source never reached would wait on.
                let in_doubt = matches!(sent, Err(JourneyError::InDoubt(_)));
                if !in_doubt {
                    wait_or(
                        Duration::from_secs(4),
                        || receiver.is_finished(),
                        || {
                            self.destination_journey.cancel();
                        },
                    );
                }
            }
            (sent, receiver.join().unwrap())
        })
    }

    pub fn built(&self) -> Arc<FakeMachine> {
        self.builder.built.lock().unwrap().clone().expect("the destination never built a machine")
    }
}
