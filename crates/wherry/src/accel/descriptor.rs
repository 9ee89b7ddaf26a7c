//! A step of a job file as a descriptor: which field goes to which word, and which fields an operation has at all.

use anyhow::{Context as _, Result, ensure};
use wherry_accel::abi::{Descriptor, opcode};

use super::job::{Step, Word};

/// Where a buffer lies.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub at: u64,
    pub bytes: u64,
}

/// What a step may refer to, looked up by name.
pub trait Names {
    fn buffer(&self, name: &str) -> Result<Place>;
    fn key(&self, name: &str) -> Result<u32>;
}

/// The fields that an operation may have.
fn fields(code: u8) -> &'static [&'static str] {
    match code {
        opcode::NOP => &[],
        opcode::STORE | opcode::ADD => &["destination", "value"],
        opcode::TIMESTAMP => &["destination"],
        opcode::FILL => &["destination", "size", "value"],
        opcode::ZERO_SCAN | opcode::CRC => &["source", "size"],
        opcode::DELTA_MAKE | opcode::DUAL_CAST => &["source", "destination", "second", "size"],
        opcode::ZSTD_COMPRESS | opcode::DEFLATE => &["source", "destination", "size", "level"],
        opcode::AES_SEAL..=opcode::CHACHA_OPEN => &["source", "destination", "size", "key", "nonce", "associated"],
        opcode::HMAC => &["source", "destination", "size", "key"],
        opcode::RUN => &["source", "destination", "size", "arguments", "fuel"],
        opcode::RS_ENCODE => &["source", "destination", "size", "originals", "recoveries"],
        opcode::RS_RECOVER => &["source", "destination", "second", "size", "originals", "recoveries"],
        _ => &["source", "destination", "size"],
    }
}

/// Instructions that a program may take, unless the step says.
const FUEL: u32 = 1_000_000;

/// The descriptor. `size` is the size where it comes from another step, `parameters` the address that [`parameters`] will
/// be written to.
pub fn descriptor(step: &Step, names: &dyn Names, size: Option<u64>, parameters: u64) -> Result<Descriptor> {
    let code = step.opcode()?;
    check_fields(step, code)?;
    let place = |field: &'static str, name: &Option<String>| {
        let name = name.as_deref().with_context(|| format!("operation {} needs a `{field}`", step.operation))?;
        names.buffer(name)
    };
    let has = |field| fields(code).contains(&field);
    let optional = |field| field == "destination" && code == opcode::RUN;
    let get = |field: &'static str, name: &Option<String>| match name {
        None if !has(field) || optional(field) => Ok(Place { at: 0, bytes: 0 }),
        _ => place(field, name),
    };
    let (source, destination) = (get("source", &step.source)?, get("destination", &step.destination)?);
    let second = get("second", &step.second)?;
    let word = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
    let mut d = Descriptor::new(code, source.at, destination.at, 0);
    if has("size") {
        let shards = match code {
            opcode::RS_ENCODE => u64::from(step.originals.unwrap_or(1)).max(1),
            opcode::RS_RECOVER => {
                (u64::from(step.originals.unwrap_or(1)) + u64::from(step.recoveries.unwrap_or(0))).max(1)
            }
            _ => 1,
        };
        let (whole, name) =
            if has("source") { (source.bytes, &step.source) } else { (destination.bytes, &step.destination) };
        let bytes = match (&step.size, size) {
            (_, Some(bytes)) => bytes,
            (Some(text), None) => crate::args::size(text).map_err(|error| anyhow::anyhow!("size: {error}"))?,
            (None, None) => whole / shards,
        };
        let name = name.as_deref().unwrap_or_default();
        ensure!(bytes.saturating_mul(shards) <= whole, "{bytes} bytes are more than buffer {name:?} has ({whole})");
        d.size = u32::try_from(bytes).ok().context("one operation takes less than 4 GiB")?;
    }
    match code {
        opcode::STORE | opcode::ADD => d.first = step.value.unwrap_or(0) as u64 & u64::from(u32::MAX),
        opcode::FILL => d.first = step.value.unwrap_or(0) as u64,
        opcode::DELTA_MAKE => (d.first, d.second) = (second.at, destination.bytes),
        opcode::DELTA_APPLY => d.first = destination.bytes,
        opcode::DUAL_CAST => d.first = second.at,
        opcode::LZ4_COMPRESS..=opcode::INFLATE => {
            d.word = word(destination.bytes.min(wherry_accel::abi::MAX_ONE_SHOT.into()));
            d.first = step.level.unwrap_or(0);
        }
        opcode::AES_SEAL..=opcode::CHACHA_OPEN => {
            d.word = names.key(step.key.as_deref().context("it needs a `key`")?)?;
            d.first = parameters;
        }
        opcode::HMAC => d.word = names.key(step.key.as_deref().context("it needs a `key`")?)?,
        opcode::RUN => {
            let given = step.arguments.as_deref().unwrap_or_default();
            ensure!(given.len() <= 2, "a program has two arguments (r1, r2), not {}", given.len());
            let value = |word: &Word| match word {
                Word::Number(number) => Ok(*number as u64),
                Word::Buffer(name) => names.buffer(name).map(|place| place.at),
            };
            let argument = |index: usize| given.get(index).map_or(Ok(0), value);
            d = d.with(step.fuel.unwrap_or(FUEL), argument(0)?, argument(1)?);
        }
        opcode::RS_ENCODE | opcode::RS_RECOVER => {
            let originals = step.originals.context("it needs `originals`, the number of shards")?;
            let recoveries = step.recoveries.context("it needs `recoveries`, the number of shards")?;
            (d.word, d.first) = (u32::from(originals) | u32::from(recoveries) << 16, second.at);
        }
        _ => {}
    }
    Ok(d)
}

fn check_fields(step: &Step, code: u8) -> Result<()> {
    let given = [
        ("source", step.source.is_some()),
        ("destination", step.destination.is_some()),
        ("second", step.second.is_some()),
        ("size", step.size.is_some() || step.size_of.is_some()),
        ("level", step.level.is_some()),
        ("value", step.value.is_some()),
        ("key", step.key.is_some()),
        ("nonce", step.nonce.is_some()),
        ("associated", step.associated.is_some()),
        ("arguments", step.arguments.is_some()),
        ("fuel", step.fuel.is_some()),
        ("originals", step.originals.is_some()),
        ("recoveries", step.recoveries.is_some()),
    ];
    for (field, given) in given {
        ensure!(
            !given || fields(code).contains(&field),
            "operation {} has no `{field}`; it has {}",
            step.operation,
            if fields(code).is_empty() { "no fields".into() } else { fields(code).join(", ") }
        );
    }
    Ok(())
}

/// The parameters of an authenticated cipher, as the device reads them from memory: nonce, length of what is associated,
/// and that. Nothing for other operations.
pub fn parameters(step: &Step) -> Result<Vec<u8>> {
    if !matches!(step.opcode()?, opcode::AES_SEAL..=opcode::CHACHA_OPEN) {
        return Ok(Vec::new());
    }
    let mut bytes = super::job::hex(step.nonce.as_deref().context("it needs a `nonce` of 24 hexadecimal digits")?)?;
    ensure!(bytes.len() == 12, "a nonce has 12 bytes (24 hexadecimal digits), not {}", bytes.len());
    let associated = step.associated.as_deref().unwrap_or_default().as_bytes();
    let length = u32::try_from(associated.len()).ok().context("`associated` is too long")?;
    bytes.extend(length.to_le_bytes());
    bytes.extend(associated);
    Ok(bytes)
}
