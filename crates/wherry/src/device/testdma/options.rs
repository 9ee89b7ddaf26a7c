//! What the device is told when it is started.

use std::time::Duration;

use wherry_guest::testdma::Interrupt;

/// In which order the bytes of a buffer are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Pattern {
    /// Page by page
    #[default]
    Whole,
    /// Page by page, from the end
    Reverse,
    /// Cache line by cache line, in a mixed order
    Lines,
}

/// How much it does.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Bytes per second into buffers; `None`: as fast as possible.
    pub rate: Option<u64>,
    /// Buffers that are filled at once.
    pub burst: u32,
    /// Order of the bytes.
    pub pattern: Pattern,
    /// Between an acknowledgement and the next letter.
    pub interval: Duration,
}

/// What it is.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Its interrupts.
    pub interrupts: Vec<Interrupt>,
    /// Vectors of MSI and MSI-X.
    pub vectors: u32,
    /// It can be migrated.
    pub migration: bool,
    /// It logs what it writes.
    pub logging: bool,
    /// Its ballast can be read while it runs.
    pub pre_copy: bool,
    /// Bytes of ballast in its state.
    pub ballast: u64,
    /// How long it takes to save and to load.
    pub save_time: Duration,
    /// See above.
    pub load_time: Duration,
}
