//! Where the registers lie in BAR 0, and the capabilities that say so (section 4.1.4).

use std::ops::Range;

use wherry_pci::{BarKind, ConfigError, ConfigSpace, MsixPlace};

use super::common;

/// Size of BAR 0.
pub(super) const BAR_SIZE: u64 = 0x8000;
pub(super) const COMMON: Range<u64> = 0..common::LEN;
pub(super) const ISR: Range<u64> = 0x1000..0x1001;
pub(super) const DEVICE: Range<u64> = 0x2000..0x3000;
/// Four bytes for each ring.
pub(super) const NOTIFY: Range<u64> = 0x3000..0x4000;
pub(super) const NOTIFY_STEP: u64 = 4;
pub(super) const MSIX: MsixPlace = MsixPlace { bar: 0, table: 0x4000, pending_bar: 0, pending: 0x6000 };
/// Most rings of a device: each has an address to be rung at, and a vector.
pub(super) const MOST_RINGS: usize = 256;

const VENDOR_CAPABILITY: u8 = 9;
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_PCI: u8 = 5;

/// Adds BAR and capabilities. Returns the offset of the one by which registers are reached through configuration space.
pub(super) fn add(config: &mut ConfigSpace) -> Result<u16, ConfigError> {
    config.add_bar(0, BarKind::Memory32, BAR_SIZE)?;
    let mut place = |kind: u8, range: Range<u64>, extra: &[u8], writable: &[u8]| {
        let mut body = vec![16 + extra.len() as u8, kind, 0, 0, 0, 0];
        body.extend_from_slice(&(range.start as u32).to_le_bytes());
        body.extend_from_slice(&((range.end - range.start) as u32).to_le_bytes());
        body.extend_from_slice(extra);
        let mut mask = vec![0; body.len()];
        mask[..writable.len()].copy_from_slice(writable);
        config.add_capability(VENDOR_CAPABILITY, &body, &mask)
    };
    place(TYPE_COMMON, COMMON, &[], &[])?;
    place(TYPE_NOTIFY, NOTIFY, &(NOTIFY_STEP as u32).to_le_bytes(), &[])?;
    place(TYPE_ISR, ISR, &[], &[])?;
    place(TYPE_DEVICE, DEVICE, &[], &[])?;
    // BAR, offset and length; the data behind them is not kept but passed on.
    let writable = [0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    place(TYPE_PCI, 0..0, &[0; 4], &writable)
}
