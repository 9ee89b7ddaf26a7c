//! A back end that takes part in postcopy: its faults are served beside those of the guest.
//!
//! The order is that of the document, and what back ends insist on: advise, listen, the table and their addresses, our fault
//! source, our acknowledgement; only then may a back end touch memory. At the end, when all memory is there, `END`.

use std::fs;
use std::os::unix::fs::MetadataExt;

use wherry_fault::{FaultService, Mapping, SourceId, Userfault, Way};
use wherry_memory::{Block, Ram};

use super::front::{Front, ours};
use super::wire::VhostError;

/// Shows a back end memory that is not all there.
pub(super) fn share(front: &mut Front, ram: &Ram, faults: &FaultService) -> Result<SourceId, VhostError> {
    front.give_up_slots()?;
    let front = &*front;
    let failed = |e: wherry_fault::FaultError| front.connection().lacks(e.to_string());
    for block in ram.blocks() {
        // It would see pages that are half received, and old ones of precopy.
        faults.set_way(block.spec().id, Way::Copy).map_err(failed)?;
    }
    let userfault = Userfault::adopt(front.advise()?).map_err(|e| front.connection().lacks(e.to_string()))?;
    front.listen()?;
    let said = front.set_missing_memory(ram)?;
    let mut mappings = Vec::with_capacity(said.len());
    for (block, said) in ram.blocks().iter().zip(said) {
        let base = match said == ours(block.spec().guest_base) {
            // Some answer with what they were sent.
            true => find(front, block)?,
            false => said,
        };
        let spec = block.spec();
        mappings.push(Mapping { base, len: spec.size, block: spec.id, offset: 0 });
    }
    let name = format!("vhost-user {}", front.path().display());
    let source = faults.add_source(&name, userfault, mappings).map_err(failed)?;
    match front.acknowledge() {
        Ok(()) => Ok(source),
        Err(error) => {
            let _ = faults.remove_source(source);
            Err(error)
        }
    }
}

/// Where the process of a back end has mapped a block, as the kernel has it.
fn find(front: &Front, block: &Block) -> Result<u64, VhostError> {
    let cannot = |why: String| {
        let id = block.spec().id;
        front.connection().lacks(format!("it does not say where it has mapped RAM block {id}, and {why}: no postcopy"))
    };
    let pid = front.connection().peer()?.as_raw_nonzero();
    let file = fs::File::from(block.fd().try_clone_to_owned().map_err(|e| cannot(e.to_string()))?);
    let inode = file.metadata().map_err(|e| cannot(e.to_string()))?.ino();
    let path = format!("/proc/{pid}/maps");
    let maps = fs::read_to_string(&path).map_err(|e| cannot(format!("reading {path}: {e}")))?;
    match &bases(&maps, inode)[..] {
        [base] => Ok(*base),
        found => Err(cannot(format!("{path} has {} places for it", found.len()))),
    }
}

/// The addresses at which the beginning of a memfd is mapped, of the text of `/proc/PID/maps`.
fn bases(maps: &str, inode: u64) -> Vec<u64> {
    let of = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let range = words.next()?;
        let (_permissions, offset) = (words.next()?, words.next()?);
        let (_device, of) = (words.next()?, words.next()?);
        let is_it = of.parse() == Ok(inode) && words.next()?.starts_with("/memfd:wherry-ram");
        let base = u64::from_str_radix(range.split('-').next()?, 16).ok()?;
        (is_it && u64::from_str_radix(offset, 16) == Ok(0)).then_some(base)
    };
    maps.lines().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_of_a_memfd_is_found_by_its_inode_and_its_beginning() {
        let maps = "\
55d0c0000000-55d0c0021000 rw-p 00000000 00:00 0                          [heap]
7f4d18102000-7f4d58102000 ---s 00000000 00:01 1031                       /memfd:wherry-ram (deleted)
7f4d58102000-7f4d59102000 rw-s 40000000 00:01 1031                       /memfd:wherry-ram (deleted)
7f4d60000000-7f4d60400000 rw-s 00000000 00:01 1032                       /memfd:wherry-ram (deleted)
7f4d70000000-7f4d70400000 rw-s 00000000 00:01 1033                       /memfd:other (deleted)
";
        assert_eq!(bases(maps, 1031), [0x7f4d_1810_2000]);
        assert_eq!(bases(maps, 1032), [0x7f4d_6000_0000]);
        assert!(bases(maps, 1033).is_empty(), "another file with the same number");
        assert!(bases("", 1).is_empty());
    }
}
