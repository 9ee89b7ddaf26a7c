//! What a back end knows, as it goes to another process of the same host: schema [`SCHEMA`](crate::kept::SCHEMA).

use crate::Device;
use crate::features::protocol;

/// All of it.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct SavedBackEnd {
    /// What the device said.
    #[prost(bytes = "vec", tag = "1")]
    pub device: Vec<u8>,
    /// What front ends were told of it.
    #[prost(message, optional, tag = "2")]
    pub offer: Option<SavedOffer>,
    /// Its configuration.
    #[prost(bytes = "vec", tag = "3")]
    pub config: Vec<u8>,
    /// It has said that this is another one, and the front end was not told.
    #[prost(bool, tag = "4")]
    pub changed: bool,
    /// There, if a front end is.
    #[prost(message, optional, tag = "5")]
    pub front_end: Option<SavedFrontEnd>,
}

/// What a back end has to offer.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct SavedOffer {
    #[prost(string, tag = "1")]
    pub device: String,
    /// Features of the device, and of the protocol.
    #[prost(uint64, tag = "2")]
    pub features: u64,
    #[prost(uint64, tag = "3")]
    pub protocol: u64,
    /// Rings, and the most entries of each.
    #[prost(uint32, tag = "4")]
    pub rings: u32,
    #[prost(uint32, tag = "5")]
    pub entries: u32,
}

impl SavedOffer {
    pub(crate) fn of(device: &dyn Device) -> Self {
        let (rings, entries) = device.rings();
        Self {
            device: device.name().into(),
            features: device.features(),
            protocol: protocol::ALL,
            rings: rings.into(),
            entries: entries.into(),
        }
    }

    /// What is lacking here of that which front ends were told. More may be here: they do not know of it.
    pub(crate) fn lacks(&self, told: &Self) -> Option<String> {
        let missing = |what: &str, here: u64, there: u64| {
            (there & !here != 0)
                .then(|| format!("{what} {:#x} are lacking here, which its front end may use", there & !here))
        };
        if self.device != told.device {
            return Some(format!("it is a {:.80}, and here is a {}", told.device, self.device));
        }
        missing("features", self.features, told.features)
            .or_else(|| missing("features of the protocol", self.protocol, told.protocol))
            .or_else(|| {
                let (here, there) = ((self.rings, self.entries), (told.rings, told.entries));
                (here != there).then(|| {
                    format!(
                        "it has {} rings with up to {} entries, and here are {} with {}",
                        there.0, there.1, here.0, here.1
                    )
                })
            })
    }
}

/// A front end. Its descriptors are `connection`, `partial` (of a message that is not whole), `memory` by region, `kick`, `call`
/// and `error` by ring, `log`, `in-flight`, `state` and `channel`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct SavedFrontEnd {
    /// What was agreed on: features, and those of the protocol.
    #[prost(uint64, tag = "1")]
    pub features: u64,
    #[prost(uint64, tag = "2")]
    pub protocol: u64,
    #[prost(message, repeated, tag = "3")]
    pub regions: Vec<SavedRegion>,
    /// Where what is written is noted, while the features say so.
    #[prost(message, optional, tag = "4")]
    pub log: Option<SavedPart>,
    /// All rings of the device.
    #[prost(message, repeated, tag = "5")]
    pub rings: Vec<SavedRing>,
    #[prost(message, optional, tag = "6")]
    pub in_flight: Option<SavedInFlight>,
    /// A state of the device was announced, and is not read yet.
    #[prost(bool, tag = "7")]
    pub state: bool,
    /// It hears requests of the back end's own.
    #[prost(bool, tag = "8")]
    pub channel: bool,
    /// What has come of a message that is not whole, and how many descriptors came with it.
    #[prost(bytes = "vec", tag = "9")]
    pub partial: Vec<u8>,
    #[prost(uint32, tag = "10")]
    pub descriptors: u32,
    /// Rings are served.
    #[prost(bool, tag = "11")]
    pub serves: bool,
}

/// A region of memory: guest address, bytes, address there, where it begins in its file.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(crate) struct SavedRegion {
    #[prost(uint64, tag = "1")]
    pub guest: u64,
    #[prost(uint64, tag = "2")]
    pub size: u64,
    #[prost(uint64, tag = "3")]
    pub user: u64,
    #[prost(uint64, tag = "4")]
    pub offset: u64,
}

/// A part of a file.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(crate) struct SavedPart {
    #[prost(uint64, tag = "1")]
    pub bytes: u64,
    #[prost(uint64, tag = "2")]
    pub offset: u64,
}

/// Memory for requests under way.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(crate) struct SavedInFlight {
    #[prost(message, required, tag = "1")]
    pub part: SavedPart,
    #[prost(uint32, tag = "2")]
    pub rings: u32,
    #[prost(uint32, tag = "3")]
    pub entries: u32,
}

/// A ring, as the front end has set it up.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct SavedRing {
    #[prost(uint32, tag = "1")]
    pub size: u32,
    /// Where it is served on.
    #[prost(uint32, tag = "2")]
    pub next: u32,
    /// Descriptors, used, available: addresses there; none if they were not told.
    #[prost(uint64, repeated, tag = "3")]
    pub addresses: Vec<u64>,
    /// Which eventfds it has.
    #[prost(bool, tag = "4")]
    pub kick: bool,
    #[prost(bool, tag = "5")]
    pub call: bool,
    #[prost(bool, tag = "6")]
    pub error: bool,
    /// It has been rung.
    #[prost(bool, tag = "7")]
    pub rung: bool,
    #[prost(bool, tag = "8")]
    pub enabled: bool,
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use prost::Message;

    use super::*;
    use crate::kept::SCHEMA;

    fn offer() -> SavedOffer {
        SavedOffer { device: "virtio-blk".into(), features: 3, protocol: 5, rings: 1, entries: 256 }
    }

    /// Something else in every field that a process can read.
    fn example() -> SavedBackEnd {
        let part = SavedPart { bytes: 4096, offset: 8192 };
        let ring = SavedRing {
            size: 128,
            next: 65_535,
            addresses: vec![1, 2, 3],
            kick: true,
            call: true,
            error: true,
            rung: true,
            enabled: true,
        };
        SavedBackEnd {
            device: b"device".to_vec(),
            offer: Some(offer()),
            config: b"configuration".to_vec(),
            changed: true,
            front_end: Some(SavedFrontEnd {
                features: 1 << 32,
                protocol: 9,
                regions: vec![SavedRegion { guest: 1 << 40, size: 4096, user: 1 << 41, offset: 64 }],
                log: Some(part),
                rings: vec![ring, SavedRing::default()],
                in_flight: Some(SavedInFlight { part, rings: 1, entries: 128 }),
                state: true,
                channel: true,
                partial: b"part".to_vec(),
                descriptors: 2,
                serves: true,
            }),
        }
    }

    #[test]
    fn states_of_every_schema_are_read_and_the_newest_is_written_as_ever() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("golden/back-end-{SCHEMA}.bin"));
        if std::env::var_os("WHERRY_NEW_GOLDEN").is_some() && !path.exists() {
            std::fs::write(&path, example().encode_to_vec()).unwrap();
        }
        let golden = std::fs::read(&path).unwrap();
        assert_eq!(example().encode_to_vec(), golden, "the bytes of schema {SCHEMA} have changed");
        assert_eq!(SavedBackEnd::decode(&golden[..]).unwrap(), example());
    }

    #[test]
    fn what_a_front_end_was_told_of_is_there_and_more_may_be() {
        let more = SavedOffer { features: 7, protocol: 13, ..offer() };
        assert_eq!(more.lacks(&offer()), None);
        let lacks = |other: SavedOffer, words: &str| {
            let said = other.lacks(&offer()).unwrap();
            assert!(said.contains(words), "{said}");
        };
        lacks(SavedOffer { features: 1, ..offer() }, "features 0x2 are lacking");
        lacks(SavedOffer { protocol: 1, ..offer() }, "features of the protocol 0x4");
        lacks(SavedOffer { rings: 2, ..offer() }, "1 rings with up to 256 entries, and here are 2");
        lacks(SavedOffer { device: "virtio-net".into(), ..offer() }, "it is a virtio-blk");
    }
}
