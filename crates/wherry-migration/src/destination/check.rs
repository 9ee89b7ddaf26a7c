//! Whether what arrived is what was sent: channel totals, the state's digest, and with `--verify` all memory.

use std::collections::BTreeMap;

use wherry_memory::{BlockId, Ram};
use wherry_stream::ChannelStats;
use wherry_stream::message::{AskPages, Body, ChannelTotal, Hashes as HashesMessage};

use super::{Destination, no_setup};
use crate::error::Cause;
use crate::verify::{self, ChunkDigest};

/// The source's hashes of memory as they come in: for each block, its chunks from the first on.
#[derive(Default)]
pub(super) struct Hashes(BTreeMap<u32, Vec<u8>>);

impl Hashes {
    /// Takes a message; the hashes of a block come in order and are no more than it has chunks.
    pub(super) fn take(&mut self, ram: &Ram, message: &HashesMessage) -> Result<(), Cause> {
        let wrong = |what: &str| Cause::Protocol {
            peer: "source",
            what: format!("hashes of RAM block {}: {what}", message.block),
        };
        let block = u16::try_from(message.block).ok().and_then(|id| ram.block(BlockId(id)));
        let block = block.ok_or_else(|| wrong("there is no such block"))?;
        let have = self.0.entry(message.block).or_default();
        if message.first != (have.len() / 32) as u64 || !message.digests.len().is_multiple_of(32) {
            return Err(wrong("out of order"));
        }
        if have.len() + message.digests.len() > verify::chunks(block) * 32 {
            return Err(wrong("more than it has chunks"));
        }
        have.extend_from_slice(&message.digests);
        Ok(())
    }

    /// The first chunk in which our memory differs: block and chunk.
    pub(super) fn first_difference(&self, ram: &Ram, ours: &[Vec<ChunkDigest>]) -> Option<(BlockId, u64)> {
        for (block, ours) in ram.blocks().iter().zip(ours) {
            let id = block.spec().id;
            let theirs = self.0.get(&id.0.into()).map_or(&[][..], Vec::as_slice);
            let different =
                ours.iter().enumerate().find(|(n, hash)| theirs.get(n * 32..n * 32 + 32) != Some(&hash[..]));
            if let Some((chunk, _)) = different {
                return Some((id, chunk as u64));
            }
        }
        None
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

/// Compares what a channel carried.
pub(super) fn compare_totals(n: usize, sent: &ChannelTotal, arrived: &ChannelStats) -> Result<(), Cause> {
    let here = (arrived.frames, arrived.bytes, arrived.checksum, arrived.last_sequence.unwrap_or(0));
    if here == (sent.frames, sent.bytes, sent.checksum, sent.last) {
        return Ok(());
    }
    let detail = format!(
        "data channel {n}: sent {} frames, {} bytes, checksum {:#010x}, last {}; arrived {}, {}, {:#010x}, {}",
        sent.frames, sent.bytes, sent.checksum, sent.last, here.0, here.1, here.2, here.3
    );
    Err(Cause::Corrupt { what: "memory", detail })
}

impl Destination<'_> {
    /// Hashes all memory and compares; finds the page that differs with the source's help.
    pub(super) fn compare_memory(&mut self) -> Result<(), Cause> {
        let machine = self.host.machine.clone().ok_or_else(no_setup)?;
        let ours = verify::hash_ram(machine.ram(), crate::source::threads())?;
        let receiving = self.receiving.as_mut().ok_or_else(no_setup)?;
        let Some((block, chunk)) = receiving.hashes.first_difference(machine.ram(), &ours) else { return Ok(()) };
        let page = self.find_page(block, chunk)?;
        let detail = match page {
            Some(page) => format!("the first difference is in RAM block {block}, page {page:#x} (4 KiB each)"),
            None => format!("the first difference is in RAM block {block}, chunk {chunk} of 2 MiB"),
        };
        Err(Cause::Corrupt { what: "memory", detail })
    }

    fn find_page(&mut self, block: BlockId, chunk: u64) -> Result<Option<u64>, Cause> {
        let machine = self.host.machine.clone().ok_or_else(no_setup)?;
        let limit = self.options.timeouts.silent;
        let control = self.host.control()?;
        control.send(Body::AskPages(AskPages { block: block.0.into(), chunk }))?;
        let theirs = match control.next("hash the pages that differ", limit, std::time::Duration::ZERO)? {
            Body::PageHashes(hashes) if hashes.chunk == chunk && hashes.block == u32::from(block.0) => hashes.digests,
            other => return Err(control.protocol(format!("{} in answer to AskPages", other.kind()))),
        };
        let Some(block) = machine.ram().block(block) else { return Ok(None) };
        let ours = verify::hash_pages(block, chunk)?;
        let different = ours.iter().enumerate().find(|(n, hash)| theirs.get(n * 32..n * 32 + 32) != Some(&hash[..]));
        Ok(different.map(|(n, _)| chunk * verify::CHUNK_PAGES + n as u64))
    }
}
