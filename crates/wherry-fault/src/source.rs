//! A fault source: a userfaultfd, what its addresses mean, and what is counted of it.

use std::fmt;
use std::ops::Range;
use std::sync::{Mutex, RwLock};

use wherry_memory::{BlockId, GRANULE, Ram};

use crate::statistics::Counters;
use crate::{FaultError, Userfault};

/// Number of a fault source, never used twice by one service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceId(pub u32);

impl SourceId {
    /// The guest maps of this process: vCPUs, in-process devices, system calls on guest memory.
    pub const GUEST: Self = Self(0);
}

impl fmt::Display for SourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Part of a block as the process of a source has it mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Address there, a multiple of 4 KiB.
    pub base: u64,
    /// Bytes, a multiple of 4 KiB.
    pub len: u64,
    /// The block.
    pub block: BlockId,
    /// Where in the block it starts, a multiple of 4 KiB.
    pub offset: u64,
}

/// One fault source.
pub(crate) struct Source {
    pub id: SourceId,
    pub name: String,
    /// In ascending order of address, none overlapping another.
    mappings: Vec<Mapping>,
    /// Taken away when the source is removed or quarantined; held for reading through each call on it, so that it is
    /// closed when the removal returns. No call blocks.
    pub uffd: RwLock<Option<Userfault>>,
    pub counters: Counters,
    /// The unit it faulted on last although it was received, and how often in a row.
    pub repeated: Mutex<((BlockId, u64), u32)>,
}

impl Source {
    pub fn new(id: SourceId, name: &str, uffd: Userfault, mappings: Vec<Mapping>) -> Self {
        Self {
            id,
            name: name.into(),
            mappings,
            uffd: RwLock::new(Some(uffd)),
            counters: Counters::default(),
            repeated: Mutex::new(((BlockId(0), 0), 0)),
        }
    }

    /// It is this process.
    pub fn is_guest(&self) -> bool {
        self.id == SourceId::GUEST
    }

    /// The page that an address of the source means.
    pub fn translate(&self, address: u64) -> Option<(BlockId, u64)> {
        let after = self.mappings.partition_point(|m| m.base <= address);
        let mapping = &self.mappings[after.checked_sub(1)?];
        let inside = address - mapping.base;
        (inside < mapping.len).then(|| (mapping.block, (mapping.offset + inside) / GRANULE))
    }

    /// The addresses (start and length) at which the source has pages of a block.
    pub fn addresses(&self, block: BlockId, pages: Range<u64>) -> impl Iterator<Item = (u64, u64)> {
        let (start, end) = (pages.start * GRANULE, pages.end * GRANULE);
        self.mappings.iter().filter(move |m| m.block == block).filter_map(move |m| {
            let (from, to) = (start.max(m.offset), end.min(m.offset + m.len));
            (from < to).then(|| (m.base + (from - m.offset), to - from))
        })
    }

    pub fn maps(&self, block: BlockId) -> bool {
        self.mappings.iter().any(|m| m.block == block)
    }

    pub fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }
}

/// Checks a table that came from another process, and sorts it.
pub(crate) fn check_mappings(ram: &Ram, name: &str, mut table: Vec<Mapping>) -> Result<Vec<Mapping>, FaultError> {
    for (index, mapping) in table.iter().enumerate() {
        let refuse = |reason: String| Err(FaultError::Mapping { name: name.into(), index, reason });
        let Mapping { base, len, block, offset } = *mapping;
        let Some(found) = ram.block(block) else { return refuse(format!("there is no RAM block {block}")) };
        if len == 0 || (base | len | offset) % GRANULE != 0 {
            return refuse(format!("{base:#x}..+{len:#x} at offset {offset:#x} is not in whole pages"));
        }
        if base.checked_add(len).is_none() {
            return refuse(format!("{base:#x}..+{len:#x} wraps around the address space"));
        }
        if offset.checked_add(len).is_none_or(|end| end > found.spec().size) {
            let size = found.spec().size;
            return refuse(format!("offset {offset:#x}..+{len:#x} is not inside RAM block {block} of {size:#x} bytes"));
        }
        if table[..index].iter().any(|m| m.base < base + len && base < m.base + m.len) {
            return refuse(format!("{base:#x}..+{len:#x} overlaps another mapping"));
        }
    }
    table.sort_by_key(|m| m.base);
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use wherry_memory::{BlockSpec, PageSize};

    fn table() -> Vec<Mapping> {
        let block = BlockId(1);
        vec![
            Mapping { base: 0x9000, len: 0x2000, block, offset: 0x1000 },
            Mapping { base: 0x4000, len: 0x1000, block, offset: 0x3000 },
        ]
    }

    fn ram() -> Ram {
        Ram::create(&[BlockSpec { id: BlockId(1), guest_base: 0, size: 0x4000, page_size: PageSize::Base }]).unwrap()
    }

    #[test]
    fn addresses_mean_the_page_of_the_mapping_that_holds_them_and_nothing_outside() {
        let Ok(uffd) = Userfault::open() else {
            println!("SKIPPED: userfaultfd is not permitted here");
            return;
        };
        let table = check_mappings(&ram(), "x", table()).unwrap();
        let source = Source::new(SourceId(1), "x", uffd, table);
        let page = |address| source.translate(address).map(|(_, page)| page);
        assert_eq!(
            [0x3fff, 0x4000, 0x4fff, 0x5000, 0x9000, 0xa001, 0xafff, 0xb000, u64::MAX].map(page),
            [None, Some(3), Some(3), None, Some(1), Some(2), Some(2), None, None]
        );
        let addresses: Vec<_> = source.addresses(BlockId(1), 2..4).collect();
        assert_eq!(addresses, [(0x4000, 0x1000), (0xa000, 0x1000)]);
    }

    #[test]
    fn tables_that_reach_outside_or_overlap_are_refused_by_name() {
        let block = BlockId(1);
        for (bad, why) in [
            (Mapping { base: 0, len: 0x1000, block: BlockId(7), offset: 0 }, "no RAM block 7"),
            (Mapping { base: 0, len: 0, block, offset: 0 }, "whole pages"),
            (Mapping { base: 1, len: 0x1000, block, offset: 0 }, "whole pages"),
            (Mapping { base: 0, len: 0x1000, block, offset: 0x4000 }, "not inside"),
            (Mapping { base: 0, len: 0x1000, block, offset: u64::MAX - 0xfff }, "not inside"),
            (Mapping { base: u64::MAX - 0xfff, len: 0x2000, block, offset: 0 }, "wraps"),
            (Mapping { base: 0xa000, len: 0x1000, block, offset: 0 }, "overlaps"),
        ] {
            let mut table = table();
            table.push(bad);
            let error = check_mappings(&ram(), "disk", table).unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("disk"), "{error}");
        }
    }
}
