//! An engine map as the client reads it back.
//!
//! Slots come as they were set, virtual ones with instance 0xfffe. What stands behind those is asked for by a chain: the
//! `extensions` word of the buffer leads to nodes of the same layout as for setting, which are filled.

use crate::abi::extension;
use crate::catalogue::Catalogue;
use crate::chain;
use crate::error::{Errno, Refused, refuse, require};
use crate::memory::{AddressSpace, offset, read_u16, read_u64};

use super::{EngineMap, Slot};

/// Bytes that a map needs.
pub(crate) fn bytes_needed(map: &EngineMap) -> u32 {
    8 + 4 * map.slots.len() as u32
}

/// Writes the map to the buffer at `at`, and fills the nodes that hang on it.
pub(crate) fn fill(catalogue: &Catalogue, map: &EngineMap, space: &dyn AddressSpace, at: u64) -> Result<(), Refused> {
    let first = read_u64(space, at)?;
    let mut bytes = Vec::with_capacity(4 * map.slots.len());
    for slot in &map.slots {
        let (class, instance) = slot.read_as(catalogue);
        bytes.extend(class.to_le_bytes());
        bytes.extend(instance.to_le_bytes());
    }
    space.write(offset(at, 8)?, &bytes)?;
    let reader = Reader { catalogue, map, space };
    chain::walk(space, first, |name, node| match name {
        extension::LOAD_BALANCE => reader.load_balance(node),
        extension::BOND => reader.bond(node),
        extension::PARALLEL => reader.parallel(node),
        other => chain::unknown(other, node, "reading an engine map"),
    })
}

struct Reader<'a> {
    catalogue: &'a Catalogue,
    map: &'a EngineMap,
    space: &'a dyn AddressSpace,
}

impl Reader<'_> {
    fn slot(&self, index: u16) -> Result<&Slot, Refused> {
        match self.map.slot(index.into()) {
            Some(slot) => Ok(slot),
            None => refuse(Errno::Invalid, format!("slot {index} is beyond the map of {}", self.map.slots.len())),
        }
    }

    /// Writes engines if there is room for them; with room for none only their number is told.
    fn engines(&self, at: u64, room: usize, engines: &[u8]) -> Result<(), Refused> {
        require(room == 0 || room >= engines.len(), || {
            format!("{} engines need more room than {room}", engines.len())
        })?;
        if room == 0 {
            return Ok(());
        }
        let bytes: Vec<u8> = engines.iter().flat_map(|engine| self.word(*engine)).collect();
        Ok(self.space.write(at, &bytes)?)
    }

    fn word(&self, engine: u8) -> [u8; 4] {
        let id = self.catalogue.engines()[usize::from(engine)];
        (u32::from(id.class) | u32::from(id.instance) << 16).to_le_bytes()
    }

    fn load_balance(&self, node: u64) -> Result<(), Refused> {
        let index = read_u16(self.space, offset(node, 32)?)?;
        let room = read_u16(self.space, offset(node, 34)?)?;
        let Slot::Balanced { siblings, .. } = self.slot(index)? else {
            return refuse(Errno::NoEntry, format!("slot {index} balances nothing"));
        };
        self.engines(offset(node, 48)?, room.into(), siblings)?;
        Ok(self.space.write(offset(node, 34)?, &(siblings.len() as u16).to_le_bytes())?)
    }

    fn bond(&self, node: u64) -> Result<(), Refused> {
        let index = read_u16(self.space, offset(node, 36)?)?;
        let room = read_u16(self.space, offset(node, 38)?)?;
        let ordinal = read_u64(self.space, offset(node, 40)?)?;
        let bonds = match self.slot(index)? {
            Slot::Balanced { bonds, .. } => &bonds[..],
            _ => &[],
        };
        let Some(bond) = usize::try_from(ordinal).ok().and_then(|n| bonds.get(n)) else {
            return refuse(Errno::NoEntry, format!("slot {index} has {} bonds, and no number {ordinal}", bonds.len()));
        };
        self.engines(offset(node, 80)?, room.into(), &bond.engines)?;
        self.space.write(offset(node, 32)?, &self.word(bond.master))?;
        Ok(self.space.write(offset(node, 38)?, &(bond.engines.len() as u16).to_le_bytes())?)
    }

    fn parallel(&self, node: u64) -> Result<(), Refused> {
        let index = read_u16(self.space, offset(node, 32)?)?;
        let room = usize::from(read_u16(self.space, offset(node, 34)?)?)
            * usize::from(read_u16(self.space, offset(node, 36)?)?);
        let Slot::Parallel { width, engines } = self.slot(index)? else {
            return refuse(Errno::NoEntry, format!("slot {index} is not parallel"));
        };
        self.engines(offset(node, 72)?, room, engines)?;
        let siblings = engines.len() as u16 / width;
        let sizes = u32::from(*width) | u32::from(siblings) << 16;
        Ok(self.space.write(offset(node, 34)?, &sizes.to_le_bytes())?)
    }
}
