//! A job file: what `docs/accel-job.md` describes, as types. Read and checked here, nothing is run.
//!
//! Unknown names are refused with the line they stand on, so that a misspelt option is never skipped.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;
use serde::de::IgnoredAny;
use toml::Spanned;
use wherry_accel::abi::{class, opcode};
use wherry_accel::catalogue::{Catalogue, EngineId};

/// Engines of a device whose job file says nothing: two that copy, two that compress, one of the others.
pub const USUAL: [u16; 5] = [2, 2, 1, 1, 1];

/// Most bytes of the device's memory.
const MOST_MEMORY: u64 = 4 << 30;

/// Operations by name.
pub const OPERATIONS: [(&str, u8); 29] = [
    ("nop", opcode::NOP),
    ("store", opcode::STORE),
    ("add", opcode::ADD),
    ("timestamp", opcode::TIMESTAMP),
    ("move", opcode::MOVE),
    ("fill", opcode::FILL),
    ("compare", opcode::COMPARE),
    ("zero-scan", opcode::ZERO_SCAN),
    ("crc", opcode::CRC),
    ("copy-crc", opcode::COPY_CRC),
    ("delta-make", opcode::DELTA_MAKE),
    ("delta-apply", opcode::DELTA_APPLY),
    ("dual-cast", opcode::DUAL_CAST),
    ("lz4-compress", opcode::LZ4_COMPRESS),
    ("lz4-decompress", opcode::LZ4_DECOMPRESS),
    ("zstd-compress", opcode::ZSTD_COMPRESS),
    ("zstd-decompress", opcode::ZSTD_DECOMPRESS),
    ("deflate", opcode::DEFLATE),
    ("inflate", opcode::INFLATE),
    ("aes-seal", opcode::AES_SEAL),
    ("aes-open", opcode::AES_OPEN),
    ("chacha-seal", opcode::CHACHA_SEAL),
    ("chacha-open", opcode::CHACHA_OPEN),
    ("sha256", opcode::SHA256),
    ("blake3", opcode::BLAKE3),
    ("hmac-sha256", opcode::HMAC),
    ("run", opcode::RUN),
    ("erasure-encode", opcode::RS_ENCODE),
    ("erasure-recover", opcode::RS_RECOVER),
];

/// The whole file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    #[serde(default)]
    pub device: DeviceTable,
    #[serde(default)]
    pub buffers: BTreeMap<String, Buffer>,
    #[serde(default)]
    pub keys: BTreeMap<String, Key>,
    #[serde(default)]
    pub contexts: BTreeMap<String, ContextTable>,
    #[serde(default, rename = "step")]
    pub steps: Vec<Step>,
    #[serde(skip)]
    lines: Lines,
}

/// Where the parts of a file stand, so that what is wrong with one is found there.
#[derive(Debug, Default)]
struct Lines(BTreeMap<(&'static str, String), usize>);

/// The same file, for the places of its parts alone.
#[derive(Deserialize)]
struct Places {
    #[serde(default)]
    buffers: BTreeMap<Spanned<String>, IgnoredAny>,
    #[serde(default)]
    keys: BTreeMap<Spanned<String>, IgnoredAny>,
    #[serde(default)]
    contexts: BTreeMap<Spanned<String>, IgnoredAny>,
    #[serde(default, rename = "step")]
    steps: Vec<NamedPlace>,
}

#[derive(Deserialize)]
struct NamedPlace {
    name: Spanned<String>,
}

impl Lines {
    fn of(text: &str) -> Self {
        // A file that cannot be read has been refused before.
        let Ok(places) = toml::from_str::<Places>(text) else { return Self::default() };
        let parts = [("buffer", places.buffers), ("key", places.keys), ("context", places.contexts)];
        let parts = parts.into_iter().flat_map(|(kind, names)| names.into_keys().map(move |name| (kind, name)));
        let steps = places.steps.into_iter().map(|place| ("step", place.name));
        let line = |at: usize| 1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count();
        let mut lines = BTreeMap::new();
        for (kind, name) in parts.chain(steps) {
            let at = line(name.span().start);
            // Of two steps with one name the second is the one at fault.
            lines.insert((kind, name.into_inner()), at);
        }
        Self(lines)
    }
}

/// The device to make.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceTable {
    /// Engines by class.
    #[serde(default)]
    pub engines: BTreeMap<String, u16>,
    pub workers: Option<u16>,
}

/// Bytes that steps name.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Buffer {
    pub size: Option<String>,
    pub text: Option<String>,
    pub hex: Option<String>,
    pub file: Option<PathBuf>,
    /// Where its bytes go when all steps have ended.
    pub save: Option<PathBuf>,
    /// How much of it: all, or as many bytes as the result of that step says.
    pub save_size_of: Option<String>,
}

/// A key.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    pub kind: String,
    pub hex: String,
}

/// A context.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContextTable {
    pub priority: Option<i32>,
    /// Its map; without one it has every engine of the device.
    pub slots: Option<Vec<String>>,
    #[serde(default)]
    pub bonds: Vec<BondTable>,
}

/// A bond of a virtual slot.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BondTable {
    pub slot: u16,
    pub master: String,
    pub engines: Vec<String>,
}

/// A number, or a buffer that stands for its address.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Word {
    Number(i64),
    Buffer(String),
}

/// One operation. Which fields it has depends on the operation.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    pub name: String,
    pub operation: String,
    pub context: Option<String>,
    #[serde(default)]
    pub slot: u32,
    pub after: Option<String>,
    pub beside: Option<String>,
    pub source: Option<String>,
    pub destination: Option<String>,
    /// The second destination of a dual-cast, or what a delta compares with.
    pub second: Option<String>,
    pub size: Option<String>,
    pub size_of: Option<String>,
    pub level: Option<u64>,
    pub value: Option<i64>,
    pub key: Option<String>,
    pub nonce: Option<String>,
    pub associated: Option<String>,
    pub arguments: Option<Vec<Word>>,
    pub fuel: Option<u32>,
    pub originals: Option<u16>,
    pub recoveries: Option<u16>,
    #[serde(default)]
    pub expect: Expect,
}

/// What must come of a step.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expect {
    pub result: Option<u64>,
    /// First bytes of the destination.
    pub hex: Option<String>,
    pub text: Option<String>,
    /// The step must fail with this.
    pub error: Option<String>,
}

/// A slot of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SlotText {
    Gap,
    Engine(EngineId),
    Balance(Vec<EngineId>),
}

impl Job {
    /// Reads a file. Paths in it are relative to where it lies.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading the job file {}", path.display()))?;
        let mut job = Self::parse(&text).with_context(|| format!("in the job file {}", path.display()))?;
        let home = path.parent().unwrap_or(Path::new(""));
        for buffer in job.buffers.values_mut() {
            for file in [&mut buffer.file, &mut buffer.save].into_iter().flatten() {
                *file = home.join(&file);
            }
        }
        Ok(job)
    }

    /// From text: names that do not exist and steps out of order are refused here, before anything runs.
    pub fn parse(text: &str) -> Result<Self> {
        let mut job: Job = toml::from_str(text).map_err(|error| anyhow::anyhow!("{}", error.to_string().trim_end()))?;
        job.lines = Lines::of(text);
        ensure!(!job.steps.is_empty(), "there is nothing to do: it has no [[step]]");
        let mut before: Vec<&str> = Vec::new();
        for step in &job.steps {
            job.check(step, &before).with_context(|| job.at("step", &step.name))?;
            before.push(&step.name);
        }
        for (name, buffer) in &job.buffers {
            if let Some(step) = &buffer.save_size_of {
                let at = || job.at("buffer", name);
                ensure!(before.contains(&step.as_str()), "{}: save_size_of names no step {step:?}", at());
                ensure!(buffer.save.is_some(), "{}: save_size_of without save", at());
            }
        }
        Ok(job)
    }

    fn check(&self, step: &Step, before: &[&str]) -> Result<()> {
        ensure!(!before.contains(&step.name.as_str()), "there is another step with that name");
        step.opcode()?;
        for earlier in [&step.after, &step.beside, &step.size_of].into_iter().flatten() {
            ensure!(before.contains(&earlier.as_str()), "it names {earlier:?}, and no step before it has that name");
        }
        ensure!(step.after.is_none() || step.beside.is_none(), "it cannot be both `after` and `beside` another step");
        ensure!(step.size.is_none() || step.size_of.is_none(), "give `size` or `size_of`, not both");
        for buffer in [&step.source, &step.destination, &step.second].into_iter().flatten() {
            ensure!(self.buffers.contains_key(buffer), "there is no buffer {buffer:?}{}", choice(self.buffers.keys()));
        }
        if let Some(key) = &step.key {
            ensure!(self.keys.contains_key(key), "there is no key {key:?}{}", choice(self.keys.keys()));
        }
        match &step.context {
            Some(name) => ensure!(
                self.contexts.contains_key(name),
                "there is no context {name:?}{}",
                choice(self.contexts.keys())
            ),
            None => ensure!(self.contexts.len() <= 1, "which context?{}", choice(self.contexts.keys())),
        }
        if let Some(error) = &step.expect.error {
            let known = wherry_accel::error::Errno::ALL.iter().any(|errno| errno.name() == error);
            ensure!(known, "there is no error {error:?}; errors have names such as EBADMSG");
        }
        Ok(())
    }

    /// A part of the file, by name and line.
    pub fn at(&self, kind: &'static str, name: &str) -> String {
        match self.lines.0.get(&(kind, name.to_owned())) {
            Some(line) => format!("{kind} {name:?} (line {line})"),
            None => format!("{kind} {name:?}"),
        }
    }

    /// The engines that clients see: those of the file, or the usual ones.
    pub fn catalogue(&self) -> Result<Catalogue> {
        let mut counts = USUAL;
        if !self.device.engines.is_empty() {
            counts = [0; 5];
        }
        for (name, count) in &self.device.engines {
            let class = class::NAMES.iter().position(|class| class == name);
            let class = class.with_context(|| format!("there is no class {name:?}{}", choice(class::NAMES)))?;
            counts[class] = *count;
        }
        Catalogue::with_counts(counts).context("the engines of the device")
    }

    /// The context a step runs in.
    pub fn context_of<'a>(&'a self, step: &'a Step) -> &'a str {
        step.context.as_deref().or(self.contexts.keys().next().map(String::as_str)).unwrap_or("default")
    }
}

impl Step {
    /// The operation as the ABI has it.
    pub fn opcode(&self) -> Result<u8> {
        let found = OPERATIONS.iter().find(|(name, _)| *name == self.operation);
        let names = OPERATIONS.map(|(name, _)| name);
        Ok(found.with_context(|| format!("there is no operation {:?}{}", self.operation, choice(names)))?.1)
    }
}

/// "; there are a, b", or that there is none.
pub fn choice<T: AsRef<str>>(names: impl IntoIterator<Item = T>) -> String {
    let names: Vec<String> = names.into_iter().map(|name| name.as_ref().to_owned()).collect();
    if names.is_empty() { "; there is none at all".into() } else { format!("; there are {}", names.join(", ")) }
}

/// A slot, as `wherry accel` also prints it.
pub fn slot(text: &str) -> Result<SlotText> {
    if text == "gap" {
        return Ok(SlotText::Gap);
    }
    let Some(rest) = text.strip_prefix("balance(") else {
        return Ok(SlotText::Engine(engine(text)?));
    };
    let Some(inner) = rest.strip_suffix(')') else {
        bail!("slot {text:?} has no closing bracket");
    };
    let siblings: Result<Vec<_>> = inner.split_whitespace().map(engine).collect();
    let siblings = siblings.with_context(|| format!("slot {text:?}"))?;
    ensure!(!siblings.is_empty(), "slot {text:?} has no siblings");
    Ok(SlotText::Balance(siblings))
}

/// An engine's name.
pub fn engine(text: &str) -> Result<EngineId> {
    text.parse().map_err(|error: String| anyhow::anyhow!(error))
}

/// Bytes from hexadecimal digits; blanks and line ends do not count.
pub fn hex(text: &str) -> Result<Vec<u8>> {
    let digits: Vec<char> = text.chars().filter(|c| !c.is_whitespace()).collect();
    ensure!(digits.len().is_multiple_of(2), "{} hexadecimal digits make no whole bytes", digits.len());
    let digit = |c: char| c.to_digit(16).with_context(|| format!("{c:?} is no hexadecimal digit"));
    digits.chunks(2).map(|pair| Ok((digit(pair[0])? << 4 | digit(pair[1])?) as u8)).collect()
}

impl Buffer {
    /// Its first bytes and its size.
    pub fn content(&self) -> Result<(Vec<u8>, u64)> {
        let given = [self.text.is_some(), self.hex.is_some(), self.file.is_some()];
        ensure!(given.iter().filter(|given| **given).count() <= 1, "it has more than one of `text`, `hex`, `file`");
        let bytes = match (&self.text, &self.hex, &self.file) {
            (Some(text), ..) => text.clone().into_bytes(),
            (_, Some(digits), _) => hex(digits).context("hex")?,
            (.., Some(file)) => {
                let length = std::fs::metadata(file).map(|meta| meta.len());
                let length = length.with_context(|| format!("looking at {}", file.display()))?;
                ensure!(length <= MOST_MEMORY, "{} is larger than 4 GiB", file.display());
                std::fs::read(file).with_context(|| format!("reading {}", file.display()))?
            }
            _ => Vec::new(),
        };
        let size = match &self.size {
            Some(text) => crate::args::size(text).map_err(|error| anyhow::anyhow!("size: {error}"))?,
            None => bytes.len() as u64,
        };
        ensure!(size > 0, "it is empty; give it a `size`");
        ensure!(size <= MOST_MEMORY, "it is larger than 4 GiB");
        ensure!(bytes.len() as u64 <= size, "it has {} bytes of content and room for {size}", bytes.len());
        Ok((bytes, size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_read_as_they_are_printed() {
        let id = |text: &str| text.parse().unwrap();
        assert_eq!(slot("gap").unwrap(), SlotText::Gap);
        assert_eq!(slot("copy1").unwrap(), SlotText::Engine(id("copy1")));
        assert_eq!(slot("balance(copy1 copy0)").unwrap(), SlotText::Balance(vec![id("copy1"), id("copy0")]));
        for bad in ["", "balance()", "balance(copy0", "parallel(copy0)", "gpu0", "balance(copy0, copy1)"] {
            assert!(slot(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_job_file_is_named_with_its_place() {
        let step = "[[step]]\nname = \"a\"\noperation = \"nop\"\n";
        for (text, words) in [
            (String::new(), "no [[step]]"),
            (format!("{step}colour = 1\n"), "line 4"),
            (format!("{step}{step}"), "step \"a\" (line 5): there is another step"),
            (format!("\n\n{step}source = \"b\"\n"), "step \"a\" (line 4): there is no buffer \"b\""),
            (format!("{step}after = \"z\"\n"), "no step before it"),
            (format!("{step}context = \"c\"\n"), "no context \"c\""),
            (format!("{step}key = \"k\"\n"), "no key \"k\""),
            (format!("{step}expect.error = \"EWHAT\"\n"), "EWHAT"),
            (step.replace("nop", "fly"), "no operation \"fly\""),
            (format!("[contexts.a]\n[contexts.b]\n{step}"), "which context?; there are a, b"),
            (
                format!("[buffers.b]\nsave_size_of = \"q\"\n{step}"),
                "buffer \"b\" (line 1): save_size_of names no step \"q\"",
            ),
            (format!("[device]\nworkers = -1\n{step}"), "line 2"),
        ] {
            let error = format!("{:#}", Job::parse(&text).unwrap_err());
            assert!(error.contains(words), "{text}: {error}");
        }
        let job = Job::parse(&format!("[device.engines]\ngpu = 1\n{step}")).unwrap();
        assert!(format!("{:#}", job.catalogue().unwrap_err()).contains("no class \"gpu\""));
    }

    #[test]
    fn hexadecimal_digits_may_be_spaced_and_must_be_whole() {
        assert_eq!(hex("00 fF\n10").unwrap(), [0, 255, 16]);
        assert!(hex("0").is_err() && hex("0g").is_err());
    }
}
