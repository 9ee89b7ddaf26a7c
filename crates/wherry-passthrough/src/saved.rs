//! What of a function is state.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vm_memory::FileOffset;
use wherry_interrupt::saved::SavedVector;
use wherry_pci::saved::SavedMsix;
use wherry_state::SavedState;
use wherry_vfio_user::payload::Area;

use crate::owner::{Bell, Facts, MigrationFacts, RegionFacts};

/// A function: our part of it, and what its owner gave.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedPassthrough {
    /// Our configuration space, without zeros at its end.
    #[prost(bytes = "vec", tag = "1")]
    pub config: Vec<u8>,
    /// MSI-X.
    #[prost(message, optional, tag = "2")]
    pub msix: Option<SavedMsix>,
    /// Vectors of MSI.
    #[prost(message, repeated, tag = "3")]
    pub msi: Vec<SavedVector>,
    /// The state that the owner gave. Schema 1 only: since then it goes in a stream.
    #[prost(bytes = "vec", tag = "4")]
    pub device: Vec<u8>,
    /// Bytes of that stream.
    #[prost(uint64, tag = "5")]
    pub streamed: u64,
    /// In a live update, instead of a state: how the next process goes on with the device. A program that does not know of this has
    /// no use for the connection either, and refuses it before the machine stops.
    #[prost(message, optional, tag = "6")]
    pub kept: Option<SavedKept>,
}

/// How another process goes on with a device that runs.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedKept {
    /// What the owner was told of interrupts.
    #[prost(message, optional, tag = "1")]
    pub told: Option<SavedTold>,
    /// What [`Owner::rest`](crate::Owner::rest) gave.
    #[prost(bytes = "vec", tag = "2")]
    pub owner: Vec<u8>,
}

/// What the owner was told of interrupts.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedTold {
    /// 0: none, 1: the pin, 2: MSI, 3: MSI-X.
    #[prost(uint32, tag = "1")]
    pub irq: u32,
    /// Whether each vector signals the eventfd that the hypervisor delivers.
    #[prost(bool, repeated, tag = "2")]
    pub delivered: Vec<bool>,
    /// It is asked each time to unmask its pin.
    #[prost(bool, tag = "3")]
    pub asks: bool,
}

/// What a function is, for another process that goes on with it; descriptors go beside it.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct SavedOwner {
    /// What the two sides of the connection agreed on.
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) connection: Vec<u8>,
    #[prost(message, repeated, tag = "2")]
    bars: Vec<SavedRegion>,
    #[prost(bytes = "vec", tag = "3")]
    config: Vec<u8>,
    #[prost(bool, tag = "4")]
    intx: bool,
    #[prost(uint32, tag = "5")]
    msi: u32,
    #[prost(uint32, tag = "6")]
    msix: u32,
    #[prost(bool, tag = "7")]
    resettable: bool,
    #[prost(message, optional, tag = "8")]
    migration: Option<SavedMigration>,
    #[prost(bool, tag = "9")]
    logging: bool,
    #[prost(bool, tag = "10")]
    faults: bool,
}

/// A region, and its file beside it if it has one.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct SavedRegion {
    #[prost(uint64, tag = "1")]
    size: u64,
    /// Where the region begins in the file, if there is one.
    #[prost(uint64, optional, tag = "2")]
    file: Option<u64>,
    /// Offset and bytes of each part that the file shows.
    #[prost(uint64, repeated, tag = "3")]
    areas: Vec<u64>,
    #[prost(message, repeated, tag = "4")]
    bells: Vec<SavedBell>,
}

/// A part that only rings, and its eventfd beside it.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct SavedBell {
    #[prost(uint64, tag = "1")]
    offset: u64,
    #[prost(uint32, tag = "2")]
    len: u32,
    #[prost(uint64, optional, tag = "3")]
    data: Option<u64>,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
struct SavedMigration {
    #[prost(bool, tag = "1")]
    pre_copy: bool,
    #[prost(bool, tag = "2")]
    p2p: bool,
}

impl SavedOwner {
    pub(crate) fn of(facts: &Facts, connection: Vec<u8>) -> Self {
        let Facts { bars, config, intx, msi, msix, resettable, migration, logging, faults, pins: _ } = facts.clone();
        let bell = |Bell { offset, len, data, .. }| SavedBell { offset, len, data };
        let region = |RegionFacts { size, file, areas, bells }| SavedRegion {
            size,
            file: file.map(|file| file.start()),
            areas: areas.into_iter().flat_map(|area| [area.offset, area.size]).collect(),
            bells: bells.into_iter().map(bell).collect(),
        };
        let migration = migration.map(|MigrationFacts { pre_copy, p2p }| SavedMigration { pre_copy, p2p });
        let bars = bars.into_iter().map(region).collect();
        Self { connection, bars, config, intx, msi, msix, resettable, migration, logging, faults }
    }

    /// What the function is: with the file of a BAR, and the eventfd of a bell, of which all are counted.
    pub(crate) fn facts<E>(
        &self,
        file: impl Fn(usize) -> Result<OwnedFd, E>,
        event: impl Fn(usize) -> Result<OwnedFd, E>,
    ) -> Result<Facts, E> {
        let mut facts = Facts {
            config: self.config.clone(),
            intx: self.intx,
            msi: self.msi,
            msix: self.msix,
            resettable: self.resettable,
            logging: self.logging,
            faults: self.faults,
            ..Facts::default()
        };
        let facts_of = |&SavedMigration { pre_copy, p2p }| MigrationFacts { pre_copy, p2p };
        facts.migration = self.migration.as_ref().map(facts_of);
        let mut events = (0..).map(event);
        for (index, (bar, saved)) in facts.bars.iter_mut().zip(&self.bars).enumerate() {
            bar.size = saved.size;
            let area = |area: &[u64]| Area { offset: area[0], size: area[1] };
            bar.areas = saved.areas.chunks_exact(2).map(area).collect();
            if let Some(start) = saved.file {
                bar.file = Some(FileOffset::new(File::from(file(index)?), start));
            }
            for (&SavedBell { offset, len, data }, event) in saved.bells.iter().zip(&mut events) {
                bar.bells.push(Bell { offset, len, data, event: Arc::new(event?) });
            }
        }
        Ok(facts)
    }
}

impl SavedState for SavedPassthrough {
    const SCHEMA: u32 = 2;
}

/// Where the loading of all functions is waited for.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedGathering {
    /// Functions of the machine.
    #[prost(uint32, tag = "1")]
    pub functions: u32,
}

impl SavedState for SavedGathering {
    const SCHEMA: u32 = 1;
}
