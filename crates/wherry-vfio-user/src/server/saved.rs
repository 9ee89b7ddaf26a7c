//! What a server knows, as it goes to another process of the same host: schema [`SCHEMA`](super::kept::SCHEMA).

use super::device::{Description, Region};
use crate::link::SavedLink;
use crate::payload::IoFd;

/// All of it.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SavedServer {
    /// What the device said.
    #[prost(bytes = "vec", tag = "1")]
    pub device: Vec<u8>,
    /// What clients were told of it.
    #[prost(message, optional, tag = "2")]
    pub description: Option<SavedDescription>,
    /// Vectors of which there is something to be said.
    #[prost(message, repeated, tag = "3")]
    pub irqs: Vec<SavedVector>,
    /// There, if a client is.
    #[prost(message, optional, tag = "4")]
    pub client: Option<SavedClient>,
}

/// What a device is.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct SavedDescription {
    #[prost(bool, tag = "1")]
    pub resettable: bool,
    #[prost(message, repeated, tag = "2")]
    pub regions: Vec<SavedRegion>,
    /// Flags and vectors of each, in turn.
    #[prost(uint32, repeated, tag = "3")]
    pub irqs: Vec<u32>,
    #[prost(bool, tag = "4")]
    pub migration: bool,
    #[prost(bool, tag = "5")]
    pub pre_copy: bool,
    #[prost(bool, tag = "6")]
    pub p2p: bool,
    #[prost(bool, tag = "7")]
    pub logging: bool,
}

/// A region.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct SavedRegion {
    #[prost(uint32, tag = "1")]
    pub flags: u32,
    #[prost(uint64, tag = "2")]
    pub size: u64,
    /// Where it starts in its file, if it can be mapped.
    #[prost(uint64, optional, tag = "3")]
    pub shared: Option<u64>,
    /// Start and length of each part that can be mapped, in turn.
    #[prost(uint64, repeated, tag = "4")]
    pub areas: Vec<u64>,
    /// What tells of accesses by a descriptor, as in the reply to `GET_REGION_IO_FDS`.
    #[prost(bytes = "vec", tag = "5")]
    pub io_fds: Vec<u8>,
}

impl SavedDescription {
    pub(super) fn of(description: &Description) -> Self {
        let region = |(index, region): (u32, &Region)| SavedRegion {
            flags: region.flags,
            size: region.size,
            shared: region.shared.as_ref().map(|shared| shared.offset),
            areas: region.shared.iter().flat_map(|s| &s.areas).flat_map(|area| [area.offset, area.size]).collect(),
            io_fds: IoFd::encode_all(index, &region.io_fds),
        };
        let Description { resettable, migration, pre_copy, p2p, logging, .. } = *description;
        Self {
            resettable,
            regions: (0..).zip(&description.regions).map(region).collect(),
            irqs: description.irqs.iter().flat_map(|irq| [irq.flags, irq.count]).collect(),
            migration,
            pre_copy,
            p2p,
            logging,
        }
    }

    /// What of it is another one.
    pub(super) fn difference(&self, other: &Self) -> Option<&'static str> {
        let rest = |of: &Self| (of.resettable, of.migration, of.pre_copy, of.p2p, of.logging);
        if self.regions != other.regions {
            Some("regions")
        } else if self.irqs != other.irqs {
            Some("interrupts")
        } else {
            (rest(self) != rest(other)).then_some("abilities")
        }
    }
}

/// A vector. Its descriptors are `irqI/trigger`, `irqI/on-mask`, `irqI/on-unmask`, by vector.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(super) struct SavedVector {
    #[prost(uint32, tag = "1")]
    pub index: u32,
    #[prost(uint32, tag = "2")]
    pub vector: u32,
    #[prost(bool, tag = "3")]
    pub trigger: bool,
    #[prost(bool, tag = "4")]
    pub on_mask: bool,
    #[prost(bool, tag = "5")]
    pub on_unmask: bool,
    #[prost(bool, tag = "6")]
    pub masked: bool,
    #[prost(bool, tag = "7")]
    pub pending: bool,
    #[prost(bool, tag = "8")]
    pub level: bool,
    #[prost(bool, tag = "9")]
    pub orphaned: bool,
}

/// A client. Its descriptors are `connection`, `twin`, `partial` (of a command that is not whole) and `dma`, by map.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SavedClient {
    /// What it can do: the data of its `VFIO_USER_VERSION`.
    #[prost(bytes = "vec", tag = "1")]
    pub theirs: Vec<u8>,
    /// What it was told that we can do.
    #[prost(bytes = "vec", tag = "2")]
    pub ours: Vec<u8>,
    /// Extensions that are in use.
    #[prost(bool, tag = "3")]
    pub p2p: bool,
    #[prost(bool, tag = "4")]
    pub estimates: bool,
    #[prost(bool, tag = "5")]
    pub userfaultfd: bool,
    #[prost(message, optional, tag = "6")]
    pub link: Option<SavedLink>,
    /// Descriptors that came with a command that is not whole.
    #[prost(uint32, tag = "7")]
    pub partial: u32,
    /// There, if there is a twin socket.
    #[prost(message, optional, tag = "8")]
    pub twin: Option<SavedLink>,
    #[prost(message, repeated, tag = "9")]
    pub maps: Vec<SavedMap>,
    /// There, if a log is on.
    #[prost(message, optional, tag = "10")]
    pub log: Option<SavedLog>,
}

/// A DMA map.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(super) struct SavedMap {
    #[prost(uint64, tag = "1")]
    pub address: u64,
    #[prost(uint64, tag = "2")]
    pub size: u64,
    #[prost(bool, tag = "3")]
    pub readable: bool,
    #[prost(bool, tag = "4")]
    pub writable: bool,
    /// Where it starts in its file, if it came with one.
    #[prost(uint64, optional, tag = "5")]
    pub offset: Option<u64>,
}

/// What was written since it was last told.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct SavedLog {
    #[prost(uint64, tag = "1")]
    pub page: u64,
    /// First and last address of each range, in turn.
    #[prost(uint64, repeated, tag = "2")]
    pub ranges: Vec<u64>,
    /// Number of the first page divided by 64, and bits of 64 pages, in turn.
    #[prost(uint64, repeated, tag = "3")]
    pub written: Vec<u64>,
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use prost::Message;

    use super::*;
    use crate::server::kept::SCHEMA;

    /// Something else in every field that a process can read.
    fn example() -> SavedServer {
        let region =
            SavedRegion { flags: 3, size: 4096, shared: Some(64), areas: vec![0, 4096], io_fds: vec![1, 2, 3] };
        let map = SavedMap { address: 1 << 40, size: 8192, readable: true, writable: true, offset: Some(4096) };
        SavedServer {
            device: b"device".to_vec(),
            description: Some(SavedDescription {
                resettable: true,
                regions: vec![region, SavedRegion::default()],
                irqs: vec![7, 1, 9, 4],
                migration: true,
                pre_copy: true,
                p2p: true,
                logging: true,
            }),
            irqs: vec![SavedVector {
                index: 2,
                vector: 3,
                trigger: true,
                on_mask: true,
                on_unmask: true,
                masked: true,
                pending: true,
                level: true,
                orphaned: true,
            }],
            client: Some(SavedClient {
                theirs: b"theirs".to_vec(),
                ours: b"ours".to_vec(),
                p2p: true,
                estimates: true,
                userfaultfd: true,
                link: Some(SavedLink::default()),
                partial: 1,
                twin: Some(SavedLink::default()),
                maps: vec![map, SavedMap { offset: None, ..map }],
                log: Some(SavedLog { page: 4096, ranges: vec![0, 8191], written: vec![0, 3] }),
            }),
        }
    }

    #[test]
    fn states_of_every_schema_are_read_and_the_newest_is_written_as_ever() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("golden/server-{SCHEMA}.bin"));
        if std::env::var_os("WHERRY_NEW_GOLDEN").is_some() && !path.exists() {
            std::fs::write(&path, example().encode_to_vec()).unwrap();
        }
        let golden = std::fs::read(&path).unwrap();
        assert_eq!(example().encode_to_vec(), golden, "the bytes of schema {SCHEMA} have changed");
        assert_eq!(SavedServer::decode(&golden[..]).unwrap(), example());
    }
}
