//! State beside the sections: too much of it to wait for at rest, or more than memory should hold at once.
//!
//! A stream is a sequence of bytes in pieces. Some of it can be given while the machine still runs, the rest at rest; its unit's
//! section, which is loaded last, says how long it was. A machine that ran on after all begins its streams anew.

use std::time::Duration;

use crate::{UnitError, UnitId};

/// A part of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Where it is in the stream; 0 begins a stream.
    pub offset: u64,
    /// Its bytes; none if there is nothing more: while the machine runs, for now.
    pub bytes: Vec<u8>,
}

/// What may be expected of the rest of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Expected {
    /// Bytes that are still to come if the machine stops now, if anything is known of that.
    pub bytes: Option<u64>,
    /// Bytes a second that were loaded of it when it came here, if it did.
    pub rate: Option<f64>,
}

/// What its unit took of the last switch, beside other streams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamTimes {
    /// Until it was at rest.
    pub stop: Duration,
    /// Giving what was left then.
    pub save: Duration,
    /// From being told to finish to being loaded.
    pub load: Duration,
    /// Until it ran.
    pub start: Duration,
    /// Bytes that were given while the machine ran.
    pub early: u64,
    /// All bytes of the stream.
    pub bytes: u64,
}

/// A unit whose state goes in a stream. Methods may be called from any thread, those of one end by one thread at a time.
pub trait StateStream: Send + Sync {
    /// The unit; constant.
    fn id(&self) -> UnitId;

    /// What it is called in messages.
    fn name(&self) -> String;

    /// The next piece, of at most 1 MiB. While the machine runs: of what can be given so early, and the first call begins it.
    /// Once its unit is at rest: of the rest.
    fn read(&self) -> Result<Piece, UnitError>;

    /// What is to be expected of the rest.
    fn expected(&self) -> Expected;

    /// There will be no stop: gives up what was begun while the machine runs.
    fn end(&self);

    /// Takes the next piece, and may wait until there is room for it. A piece with offset 0 begins anew.
    fn write(&self, piece: Piece) -> Result<(), UnitError>;

    /// Waits until everything that was written has been taken.
    fn flush(&self) -> Result<(), UnitError>;

    /// What the last switch took.
    fn times(&self) -> StreamTimes;
}
