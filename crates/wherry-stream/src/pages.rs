//! Extent tables: which granules a pages frame is about.

use crate::FrameError;
use crate::frame::{u16_at, u32_at, u64_at};

/// Unit of memory on the wire, in bytes.
pub const GRANULE: u64 = 4096;
/// Size of an extent in a table.
pub const EXTENT_BYTES: usize = 16;
/// Extents in a pages frame, at most.
pub const MAX_EXTENTS: usize = 1024;
/// Content in a pages frame, at most, in bytes.
pub const MAX_BULK_BYTES: u64 = 8 << 20;

/// What an extent's granules hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ExtentKind {
    /// Content, which follows in the frame.
    Data = 1,
    /// Zeros, which do not.
    Zero = 2,
}

/// Consecutive granules of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Number of the RAM block.
    pub block: u16,
    /// Content or zeros.
    pub kind: ExtentKind,
    /// First granule, counted from the start of the block.
    pub first: u64,
    /// How many; not 0.
    pub count: u32,
}

impl Extent {
    /// Bytes of memory it is about.
    pub fn bytes(&self) -> u64 {
        u64::from(self.count) * GRANULE
    }

    /// Bytes of content in the frame.
    pub fn bulk_bytes(&self) -> u64 {
        match self.kind {
            ExtentKind::Data => self.bytes(),
            ExtentKind::Zero => 0,
        }
    }

    /// Byte range in the block. It cannot overflow in an extent that was decoded or sent.
    pub fn range(&self) -> std::ops::Range<u64> {
        let start = self.first.saturating_mul(GRANULE);
        start..start.saturating_add(self.bytes())
    }

    fn encode(&self) -> [u8; EXTENT_BYTES] {
        let mut bytes = [0; EXTENT_BYTES];
        bytes[0..2].copy_from_slice(&self.block.to_le_bytes());
        bytes[2] = self.kind as u8;
        bytes[4..8].copy_from_slice(&self.count.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.first.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; EXTENT_BYTES]) -> Result<Self, String> {
        let kind = match bytes[2] {
            1 => ExtentKind::Data,
            2 => ExtentKind::Zero,
            other => return Err(format!("kind {other}, expected 1 (data) or 2 (zero)")),
        };
        if bytes[3] != 0 {
            return Err(format!("flags {:#x}, which this protocol version leaves 0", bytes[3]));
        }
        let extent = Self { block: u16_at(bytes, 0), kind, first: u64_at(bytes, 8), count: u32_at(bytes, 4) };
        extent.check().map(|()| extent)
    }

    fn check(&self) -> Result<(), String> {
        if self.count == 0 {
            return Err("it has no granules".into());
        }
        let end = self.first.checked_add(self.count.into()).and_then(|end| end.checked_mul(GRANULE));
        if end.is_none() {
            return Err(format!("{} granules from {} end beyond 2^64 bytes", self.count, self.first));
        }
        Ok(())
    }
}

/// Checks extents that this side is about to send and appends them as a table. Returns the bytes of content.
pub(crate) fn encode_table(extents: &[Extent], table: &mut Vec<u8>) -> Result<u64, FrameError> {
    if extents.is_empty() || extents.len() > MAX_EXTENTS {
        return Err(FrameError::Extents { found: extents.len() });
    }
    for (index, extent) in extents.iter().enumerate() {
        extent.check().map_err(|reason| FrameError::Extent { index, reason })?;
        table.extend_from_slice(&extent.encode());
    }
    Ok(extents.iter().map(Extent::bulk_bytes).sum())
}

/// Decodes a table into `extents`, which is emptied first, and checks it against the bytes of content that follow it.
/// Extents may lie beyond their block or overlap: whoever knows the blocks must check that.
pub fn decode_table(table: &[u8], bulk: u64, extents: &mut Vec<Extent>) -> Result<(), FrameError> {
    decode_extents(table, extents)?;
    // At most 1024 * 2^32 * 2^12 bytes, so the sum fits.
    let said: u64 = extents.iter().map(Extent::bulk_bytes).sum();
    if said != bulk || bulk > MAX_BULK_BYTES {
        return Err(FrameError::Bulk { table: said / GRANULE, bytes: bulk });
    }
    Ok(())
}

/// Decodes a table that no content follows: what a request asks for. Its extents may ask for more than there is.
pub fn decode_extents(table: &[u8], extents: &mut Vec<Extent>) -> Result<(), FrameError> {
    extents.clear();
    let (entries, rest) = table.as_chunks::<EXTENT_BYTES>();
    if entries.is_empty() || entries.len() > MAX_EXTENTS || !rest.is_empty() {
        return Err(FrameError::Extents { found: entries.len() });
    }
    for (index, entry) in entries.iter().enumerate() {
        extents.push(Extent::decode(entry).map_err(|reason| FrameError::Extent { index, reason })?);
    }
    Ok(())
}
