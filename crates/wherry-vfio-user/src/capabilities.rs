//! What the two sides agree on in `VFIO_USER_VERSION`: JSON, which may be absent, as may each of its parts.
//!
//! Our extensions are the object `wherry`, which other peers ignore: `{"p2p": true, "estimates": true, "userfaultfd": true}`.

use serde::{Deserialize, Serialize};

use crate::message::{DEFAULT_TRANSFER, MOST_DESCRIPTORS};
use crate::payload::{Fields, Malformed, Out};

/// Major version; another one is another protocol.
pub const MAJOR: u16 = 0;
/// Minor version.
pub const MINOR: u16 = 1;

/// Parameters of a twin socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TwinSocket {
    /// It can be used; in a reply, it is.
    #[serde(default)]
    pub supported: bool,
    /// Which of the reply's descriptors it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd_index: Option<u32>,
}

/// What vfio-user does not have by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extensions {
    /// The migration states `RUNNING_P2P` and `PRE_COPY_P2P`.
    #[serde(default)]
    pub p2p: bool,
    /// The feature `VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`.
    #[serde(default)]
    pub estimates: bool,
    /// The command `USERFAULTFD`: memory is used while it is not all there.
    #[serde(default)]
    pub userfaultfd: bool,
}

impl Extensions {
    /// What both know.
    pub fn and(self, other: Self) -> Self {
        Self {
            p2p: self.p2p && other.p2p,
            estimates: self.estimates && other.estimates,
            userfaultfd: self.userfaultfd && other.userfaultfd,
        }
    }
}

/// Capabilities as they were sent; what is absent has a default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Descriptors that the sender takes in one message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_msg_fds: Option<u64>,
    /// Bytes of data that the sender takes in one message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_data_xfer_size: Option<u64>,
    /// DMA maps at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_dma_maps: Option<u64>,
    /// Page sizes of DMA maps, or'ed together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pgsizes: Option<u64>,
    /// A socket of its own for what the server asks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub twin_socket: Option<TwinSocket>,
    /// Several writes in one message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_multiple: Option<bool>,
    /// Ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wherry: Option<Extensions>,
}

impl Capabilities {
    /// Descriptors in one message to the sender of these.
    pub fn descriptors(&self) -> usize {
        self.max_msg_fds.unwrap_or(1).clamp(1, MOST_DESCRIPTORS as u64) as usize
    }

    /// Bytes of data in one message to the sender of these. What we could not take ourselves is not sent, either.
    pub fn transfer(&self) -> usize {
        self.max_data_xfer_size.unwrap_or(DEFAULT_TRANSFER as u64).clamp(1, DEFAULT_TRANSFER as u64) as usize
    }

    /// DMA maps that the sender of these keeps.
    pub fn maps(&self) -> usize {
        self.max_dma_maps.unwrap_or(65535).min(65535) as usize
    }

    /// Whether a twin socket is possible, or in use.
    pub fn twin(&self) -> bool {
        self.twin_socket.is_some_and(|twin| twin.supported)
    }

    /// Extensions; none if they were not sent.
    pub fn extensions(&self) -> Extensions {
        self.wherry.unwrap_or_default()
    }
}

/// The payload of `VFIO_USER_VERSION`, and of its reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// Major version.
    pub major: u16,
    /// Minor version.
    pub minor: u16,
    /// What the sender can do.
    pub capabilities: Capabilities,
}

#[derive(Serialize, Deserialize)]
struct Data {
    #[serde(default)]
    capabilities: Capabilities,
}

impl Version {
    /// As bytes, with the zero at the end.
    pub fn encode(&self) -> Vec<u8> {
        let data = Data { capabilities: self.capabilities.clone() };
        // Numbers and names only: this cannot fail.
        let json = serde_json::to_vec(&data).unwrap_or_default();
        Out::default().u16(self.major).u16(self.minor).bytes(&json).bytes(&[0]).0
    }

    /// From bytes. The zero at the end may be missing, and so may all of the JSON.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut fields = Fields(bytes);
        let (major, minor) = (fields.u16()?, fields.u16()?);
        let json = fields.0.split(|&byte| byte == 0).next().unwrap_or_default();
        if json.is_empty() {
            return Ok(Self { major, minor, capabilities: Capabilities::default() });
        }
        match serde_json::from_slice::<Data>(json) {
            Ok(data) => Ok(Self { major, minor, capabilities: data.capabilities }),
            Err(error) => Err(Malformed(format!("capabilities: {error}"))),
        }
    }
}
