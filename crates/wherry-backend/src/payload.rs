//! Payloads of messages: what a front end says, checked, and what it is told.

use crate::memory::{Described, MOST_IN_TABLE};
use crate::wire::Message;

/// Features, if they were offered.
pub(crate) fn known(features: u64, offered: u64) -> Result<u64, String> {
    match features & !offered {
        0 => Ok(features),
        others => Err(format!("features {others:#x}, which were not offered")),
    }
}

pub(crate) fn pair(first: u32, second: u32) -> Vec<u8> {
    [first.to_ne_bytes(), second.to_ne_bytes()].concat()
}

pub(crate) fn words(region: Described, user: u64) -> Vec<u8> {
    [region.guest, region.size, user, region.offset].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Regions of a table: how many, and each with four numbers.
pub(crate) fn table(payload: &[u8]) -> Result<Vec<Described>, String> {
    let wrong = || format!("a table of {} bytes", payload.len());
    let (head, regions) = payload.split_first_chunk::<8>().ok_or_else(wrong)?;
    let [a, b, c, d, ..] = *head;
    let count = u32::from_ne_bytes([a, b, c, d]) as usize;
    let (numbers, rest) = regions.as_chunks::<8>();
    let numbers: Vec<_> = numbers.iter().map(|word| u64::from_ne_bytes(*word)).collect();
    let (regions, more) = numbers.as_chunks::<4>();
    // Front ends may send room for more regions than there are.
    if count > MOST_IN_TABLE || regions.len() < count || !more.is_empty() || !rest.is_empty() {
        return Err(wrong());
    }
    Ok(regions[..count].iter().map(|region| Described::of(*region)).collect())
}

/// A region of its own, behind a word without meaning.
pub(crate) fn slot(message: &Message) -> Result<(Described, u64), String> {
    let [padding, guest, size, user, offset] = message.words()?;
    Ok((Described::of([guest, size, user, offset]), padding))
}

/// Offset and content of a configuration.
pub(crate) fn configuration(message: &Message) -> Result<(u32, &[u8]), String> {
    let wrong = || format!("a configuration of {} bytes", message.payload.len());
    let (head, content) = message.payload.split_first_chunk::<12>().ok_or_else(wrong)?;
    let word = |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    match word(4) as usize == content.len() {
        true => Ok((word(0), content)),
        false => Err(wrong()),
    }
}

/// Bytes, offset, rings, entries of memory for requests under way.
pub(crate) fn in_flight(message: &Message) -> Result<(u64, u64, u16, u16), String> {
    let wrong = || format!("a description of {} bytes", message.payload.len());
    let bytes = message.payload.get(..20).ok_or_else(wrong)?;
    let long = |at: usize| bytes[at..at + 8].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    let short = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
    Ok((long(0), long(8), short(16), short(18)))
}
