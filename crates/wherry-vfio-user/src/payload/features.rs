//! Features of a device: its migration, and the log of what it writes.

use super::{Fields, Malformed, Out, malformed};

/// Features of a device, and what is done with one.
pub mod feature {
    /// What it can do of a migration (flags).
    pub const MIGRATION: u16 = 1;
    /// The state of its migration.
    pub const DEVICE_STATE: u16 = 2;
    /// Log what it writes.
    pub const LOGGING_START: u16 = 6;
    /// Log no longer.
    pub const LOGGING_STOP: u16 = 7;
    /// What was written.
    pub const LOGGING_REPORT: u16 = 8;
    /// Bytes of state that are to come (`VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`): our extension `estimates`.
    pub const DATA_SIZE: u16 = 9;

    /// Read it.
    pub const GET: u32 = 1 << 16;
    /// Set it.
    pub const SET: u32 = 1 << 17;
    /// Ask whether it is there.
    pub const PROBE: u32 = 1 << 18;

    /// Of [`MIGRATION`]: the state can be read when the device has stopped.
    pub const STOP_COPY: u64 = 1 << 0;
    /// Of [`MIGRATION`]: quiet to other devices. Our extension `p2p`.
    pub const P2P: u64 = 1 << 1;
    /// Of [`MIGRATION`]: some state can be read while the device runs.
    pub const PRE_COPY: u64 = 1 << 2;
}

/// `VFIO_USER_DEVICE_FEATURE`, without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Most bytes of the reply's payload; in a reply, what a whole one needs.
    pub argsz: u32,
    /// Its number (16 bits) and what is done with it.
    pub flags: u32,
}

impl Feature {
    /// Bytes of it.
    pub const SIZE: usize = 8;

    /// As bytes.
    pub fn encode(&self, data: &[u8]) -> Vec<u8> {
        Out::default().u32(self.argsz).u32(self.flags).bytes(data).0
    }

    /// From bytes: it, and its data.
    pub fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let mut fields = Fields(bytes);
        let this = Self { argsz: fields.u32()?, flags: fields.u32()? };
        Ok((this, fields.0))
    }
}

/// What is logged: `struct vfio_device_feature_dma_logging_control`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggingStart {
    /// Bytes of a page: a wish, and in the reply what it is.
    pub page_size: u64,
    /// Address and length of each range; without any, everything.
    pub ranges: Vec<(u64, u64)>,
}

impl LoggingStart {
    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let out = Out::default().u64(self.page_size).u32(self.ranges.len() as u32).u32(0);
        self.ranges.iter().fold(out, |out, (address, length)| out.u64(*address).u64(*length)).0
    }

    /// From bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut fields = Fields(bytes);
        let (page_size, count, _reserved) = (fields.u64()?, fields.u32()? as usize, fields.u32()?);
        if fields.0.len() != count.saturating_mul(16) {
            return malformed(format!("{count} ranges in {} bytes", fields.0.len()));
        }
        let mut ranges = Vec::with_capacity(count);
        while !fields.0.is_empty() {
            ranges.push((fields.u64()?, fields.u64()?));
        }
        Ok(Self { page_size, ranges })
    }
}

/// Which part of the log: `struct vfio_device_feature_dma_logging_report`. The bitmap follows it in the reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoggingReport {
    /// First address.
    pub address: u64,
    /// Bytes.
    pub length: u64,
    /// Bytes that a bit stands for: bit n is page n of the range. (The formula in the specification cannot be meant.)
    pub page_size: u64,
}

impl LoggingReport {
    /// Bytes of it.
    pub const SIZE: usize = 24;

    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        Out::default().u64(self.address).u64(self.length).u64(self.page_size).0
    }

    /// From bytes: it, and what follows.
    pub fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let mut fields = Fields(bytes);
        let this = Self { address: fields.u64()?, length: fields.u64()?, page_size: fields.u64()? };
        Ok((this, fields.0))
    }

    /// Words of its bitmap, if it makes sense.
    pub fn words(&self) -> Result<usize, Malformed> {
        let sensible = self.page_size.is_power_of_two()
            && self.length > 0
            && self.address.is_multiple_of(self.page_size)
            && self.address.checked_add(self.length - 1).is_some();
        match sensible {
            true => Ok(self.length.div_ceil(self.page_size).div_ceil(64) as usize),
            false => malformed(format!("a log of {self:x?}")),
        }
    }
}
