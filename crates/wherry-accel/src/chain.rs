//! Extension chains: lists of nodes in the client's memory, walked by strict rules.
//!
//! For each node, in this order: depth, flags, reserved, name, the handler of that name, next. The order decides which
//! error a node with several faults gives. At most [`MAX_CHAIN`] nodes, which is also what ends loops.

use crate::abi::MAX_CHAIN;
use crate::error::{Errno, Refused, refuse, require};
use crate::memory::{AddressSpace, offset, read_u32, read_u64};

/// Walks the chain that begins at `first` (0: there is none), and calls `handle` with the name and address of each node.
/// A handler answers an unknown name with [`unknown`].
pub(crate) fn walk(
    space: &dyn AddressSpace,
    first: u64,
    mut handle: impl FnMut(u32, u64) -> Result<(), Refused>,
) -> Result<(), Refused> {
    let mut node = first;
    let mut depth = 0;
    while node != 0 {
        if depth == MAX_CHAIN {
            return refuse(Errno::TooBig, format!("a chain of extensions has more than {MAX_CHAIN} nodes, or a loop"));
        }
        depth += 1;
        let flags = read_u32(space, offset(node, 12)?)?;
        require(flags == 0, || format!("the extension at {node:#x} has flags {flags:#x}; none are known"))?;
        for word in 0..4 {
            let reserved = read_u32(space, offset(node, 16 + 4 * word)?)?;
            require(reserved == 0, || format!("the extension at {node:#x} has reserved word {word} set"))?;
        }
        handle(read_u32(space, offset(node, 8)?)?, node)?;
        node = read_u64(space, node)?;
    }
    Ok(())
}

/// The refusal of a name that the call does not know.
pub(crate) fn unknown<T>(name: u32, at: u64, call: &str) -> Result<T, Refused> {
    refuse(Errno::Invalid, format!("{call} knows no extension {name} (at {at:#x})"))
}
