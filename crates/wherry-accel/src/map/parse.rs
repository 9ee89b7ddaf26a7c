//! An engine map from the client's memory.

use crate::abi::{GAP, MAX_SLOTS, extension};
use crate::catalogue::Catalogue;
use crate::chain;
use crate::error::{Errno, Refused, refuse, require};
use crate::memory::{AddressSpace, offset, read_u16, read_u32, read_u64};

use super::{Bond, EngineMap, Slot, engine_id, set_of};

const GAP_WORD: u32 = GAP as u32 | (GAP as u32) << 16;

/// Reads the map parameter of `size` bytes (not 0) at `at`: slots first, then the chain of extensions.
pub(crate) fn parse(catalogue: &Catalogue, space: &dyn AddressSpace, at: u64, size: u32) -> Result<EngineMap, Refused> {
    require(size >= 8 && size.is_multiple_of(4), || {
        format!("an engine map of {size} bytes is shorter than 8, or its slots are not whole")
    })?;
    let count = (size as usize - 8) / 4;
    require(count <= MAX_SLOTS, || format!("an engine map has at most {MAX_SLOTS} slots, not {count}"))?;
    let mut parser = Parser { catalogue, space, map: EngineMap::default() };
    for index in 0..count {
        let word = read_u32(space, offset(at, 8 + 4 * index as u64)?)?;
        let slot = if word == GAP_WORD { Slot::Gap } else { Slot::Physical(parser.engine(word)?) };
        parser.map.slots.push(slot);
    }
    let first = read_u64(space, at)?;
    chain::walk(space, first, |name, node| match name {
        extension::LOAD_BALANCE => parser.load_balance(node),
        extension::BOND => parser.bond(node),
        extension::PARALLEL => parser.parallel(node),
        other => chain::unknown(other, node, "an engine map"),
    })?;
    Ok(parser.map)
}

struct Parser<'a> {
    catalogue: &'a Catalogue,
    space: &'a dyn AddressSpace,
    map: EngineMap,
}

impl Parser<'_> {
    fn engine(&self, word: u32) -> Result<u8, Refused> {
        let id = engine_id(word);
        match self.catalogue.find(id) {
            Some(index) => Ok(index as u8),
            None => {
                refuse(Errno::NoEntry, format!("there is no engine of class {} instance {}", id.class, id.instance))
            }
        }
    }

    fn engines(&self, at: u64, count: usize) -> Result<Vec<u8>, Refused> {
        (0..count).map(|i| self.engine(read_u32(self.space, offset(at, 4 * i as u64)?)?)).collect()
    }

    /// The slot that an extension is about to fill.
    fn vacant(&self, index: u16) -> Result<usize, Refused> {
        let index = usize::from(index);
        match self.map.slots.get(index) {
            Some(Slot::Gap) => Ok(index),
            Some(_) => refuse(Errno::Exists, format!("slot {index} is no gap")),
            None => refuse(Errno::Invalid, format!("slot {index} is beyond the map of {}", self.map.slots.len())),
        }
    }

    fn zero(&self, node: u64, from: u64, words: u64, flags: bool) -> Result<(), Refused> {
        for word in 0..words {
            let value = read_u64(self.space, offset(node, from + 8 * word)?)?;
            let what = if flags && word == 0 { "flags" } else { "a word that must be zero" };
            require(value == 0, || format!("the extension at {node:#x} has {what} set to {value:#x}"))?;
        }
        Ok(())
    }

    fn one_class(&self, engines: &[u8]) -> Result<(), Refused> {
        let class = |e: u8| self.catalogue.engines()[usize::from(e)].class;
        require(engines.windows(2).all(|pair| class(pair[0]) == class(pair[1])), || {
            "engines of one slot are of different classes".into()
        })?;
        require(set_of(engines).count_ones() as usize == engines.len(), || "an engine is named twice in a slot".into())
    }

    fn load_balance(&mut self, node: u64) -> Result<(), Refused> {
        let index = self.vacant(read_u16(self.space, offset(node, 32)?)?)?;
        let count = usize::from(read_u16(self.space, offset(node, 34)?)?);
        let flags = read_u32(self.space, offset(node, 36)?)?;
        require(flags == 0, || format!("load-balance knows no flags {flags:#x}"))?;
        self.zero(node, 40, 1, false)?;
        require(count > 0, || "load-balance needs at least one sibling".into())?;
        // More siblings than engines: the array is read, so that the first error in it counts, up to the first repetition.
        let siblings = self.engines(offset(node, 48)?, count.min(self.catalogue.engines().len() + 1))?;
        self.one_class(&siblings)?;
        self.map.slots[index] = match siblings[..] {
            [engine] => Slot::Physical(engine),
            _ => Slot::Balanced { siblings, bonds: Vec::new() },
        };
        Ok(())
    }

    fn bond(&mut self, node: u64) -> Result<(), Refused> {
        let index = usize::from(read_u16(self.space, offset(node, 36)?)?);
        let count = usize::from(read_u16(self.space, offset(node, 38)?)?);
        require(index < self.map.slots.len(), || format!("slot {index} of a bond is beyond the map"))?;
        require(self.map.slots[index] != Slot::Gap, || format!("slot {index} of a bond is a gap"))?;
        self.zero(node, 40, 5, true)?;
        let master = self.engine(read_u32(self.space, offset(node, 32)?)?)?;
        require(count > 0, || "a bond names no engine".into())?;
        let engines = self.engines(offset(node, 80)?, count.min(self.catalogue.engines().len() + 1))?;
        self.one_class(&engines)?;
        let of_slot = |siblings: &[u8]| engines.iter().all(|engine| siblings.contains(engine));
        match &mut self.map.slots[index] {
            Slot::Balanced { siblings, bonds } => {
                require(of_slot(siblings), || format!("a bond names an engine that is no sibling of slot {index}"))?;
                bonds.push(Bond { master, engines });
                Ok(())
            }
            // A slot with one engine has nothing to choose: the bond is checked, and changes nothing.
            Slot::Physical(engine) => {
                require(of_slot(&[*engine]), || format!("a bond names an engine that is not that of slot {index}"))
            }
            _ => refuse(Errno::Invalid, format!("slot {index} is parallel and takes no bond")),
        }
    }

    fn parallel(&mut self, node: u64) -> Result<(), Refused> {
        let index = self.vacant(read_u16(self.space, offset(node, 32)?)?)?;
        let width = read_u16(self.space, offset(node, 34)?)?;
        let siblings = read_u16(self.space, offset(node, 36)?)?;
        let mbz = read_u16(self.space, offset(node, 38)?)?;
        require(mbz == 0, || format!("parallel has its word at 38 set to {mbz:#x}"))?;
        self.zero(node, 40, 4, true)?;
        require(width >= 2, || format!("parallel needs a width of at least 2, not {width}"))?;
        require(siblings >= 1, || "parallel needs at least one sibling".into())?;
        let count = usize::from(width) * usize::from(siblings);
        let engines = self.engines(offset(node, 72)?, count.min(self.catalogue.engines().len() + 1))?;
        self.one_class(&engines)?;
        self.map.slots[index] = Slot::Parallel { width, engines };
        Ok(())
    }
}
