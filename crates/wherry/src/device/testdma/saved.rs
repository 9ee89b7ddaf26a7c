//! The device's state as it is saved. Numbers are those of docs/testdma.md; a golden file has an example of each schema.

use wherry_guest::testdma::{Form, Interrupt, MAX_ENTRIES, MAX_VECTORS};
use wherry_state::SavedState;

use super::engine::{Figures, Half, Progress, Setup};
use super::options::Pattern;

/// Name of the unit.
pub const UNIT: &str = "testdma";

/// All of it, but for the ballast.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedTestdma {
    /// Configuration space.
    #[prost(bytes = "vec", tag = "1")]
    pub config: Vec<u8>,
    /// Register `CONTROL`.
    #[prost(uint32, tag = "2")]
    pub form: u32,
    /// Register `INTERRUPT`.
    #[prost(uint32, tag = "3")]
    pub interrupt: u32,
    /// Register `VECTORS`.
    #[prost(uint32, tag = "4")]
    pub vectors: u32,
    /// Register `AREA`.
    #[prost(uint64, tag = "5")]
    pub area: u64,
    /// Register `ENTRIES`.
    #[prost(uint32, tag = "6")]
    pub entries: u32,
    /// Register `SEED`.
    #[prost(fixed64, tag = "7")]
    pub seed: u64,
    /// Register `CAUSE`.
    #[prost(bool, tag = "8")]
    pub cause: bool,
    /// Buffers that are complete.
    #[prost(uint64, tag = "9")]
    pub completed: u64,
    /// Those of them for which the driver's wish for an interrupt was read.
    #[prost(uint64, tag = "10")]
    pub judged: u64,
    /// The buffer that is being written.
    #[prost(message, optional, tag = "11")]
    pub half: Option<SavedHalf>,
    /// The last letter.
    #[prost(uint64, tag = "12")]
    pub sequence: u64,
    /// It is not acknowledged.
    #[prost(bool, tag = "13")]
    pub outstanding: bool,
    /// Register `BUFFERS`.
    #[prost(uint64, tag = "14")]
    pub buffers: u64,
    /// Register `BYTES`.
    #[prost(uint64, tag = "15")]
    pub bytes: u64,
    /// Register `SIGNALS`.
    #[prost(uint64, tag = "16")]
    pub signals: u64,
    /// Register `LOST`.
    #[prost(uint64, tag = "17")]
    pub lost: u64,
    /// Register `LONGEST_NS`.
    #[prost(uint64, tag = "18")]
    pub longest_ns: u64,
    /// Register `FAULTS`.
    #[prost(uint64, tag = "19")]
    pub faults: u64,
    /// Register `LOADS`.
    #[prost(uint64, tag = "20")]
    pub loads: u64,
    /// The scratch page.
    #[prost(bytes = "vec", tag = "21")]
    pub scratch: Vec<u8>,
    /// The BAR of the MSI-X table.
    #[prost(bytes = "vec", tag = "22")]
    pub table: Vec<u8>,
    /// Interrupts that wait for whoever enables or unmasks them.
    #[prost(message, repeated, tag = "23")]
    pub pending: Vec<SavedPending>,
}

/// A buffer that is being written.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct SavedHalf {
    /// Where it lies.
    #[prost(uint64, tag = "1")]
    pub address: u64,
    /// Its length.
    #[prost(uint32, tag = "2")]
    pub length: u32,
    /// Pieces that are written.
    #[prost(uint32, tag = "3")]
    pub done: u32,
    /// Their order: 0 whole, 1 reverse, 2 lines.
    #[prost(uint32, tag = "4")]
    pub pattern: u32,
}

/// An interrupt that waits.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct SavedPending {
    /// INTx 0, MSI 1, MSI-X 2.
    #[prost(uint32, tag = "1")]
    pub index: u32,
    /// Its vector.
    #[prost(uint32, tag = "2")]
    pub vector: u32,
}

impl SavedState for SavedTestdma {
    const SCHEMA: u32 = 1;
}

impl SavedTestdma {
    /// What of the engine is saved; the rest is left empty.
    pub fn of(setup: &Setup, progress: &Progress, figures: &Figures) -> Self {
        let half = progress.half.map(|half| SavedHalf {
            address: half.address,
            length: half.length,
            done: half.done,
            pattern: half.pattern as u32,
        });
        Self {
            form: setup.form as u32,
            interrupt: setup.interrupt as u32,
            vectors: setup.vectors,
            area: setup.area,
            entries: setup.entries,
            seed: setup.seed,
            cause: progress.cause,
            completed: progress.completed,
            judged: progress.judged,
            half,
            sequence: progress.sequence,
            outstanding: progress.outstanding,
            buffers: figures.buffers,
            bytes: figures.bytes,
            signals: figures.signals,
            lost: figures.lost,
            longest_ns: figures.longest_ns,
            faults: figures.faults,
            loads: figures.loads,
            ..Self::default()
        }
    }

    /// The engine's part, checked: a state may come from anywhere.
    pub fn engine(&self) -> Result<(Setup, Progress, Figures), String> {
        let form = Form::from_u32(self.form).ok_or_else(|| format!("form {}", self.form))?;
        let interrupt =
            Interrupt::from_u32(self.interrupt).ok_or_else(|| format!("kind of interrupts {}", self.interrupt))?;
        if !(1..=MAX_VECTORS).contains(&self.vectors) || self.entries > MAX_ENTRIES {
            return Err(format!("{} vectors, {} entries", self.vectors, self.entries));
        }
        if form == Form::Ring && !valid_entries(self.entries) {
            return Err(format!("a ring of {} entries", self.entries));
        }
        let half = self.half.map(SavedHalf::check).transpose()?;
        if self.judged > self.completed || half.is_some() && form != Form::Ring {
            return Err(format!("{} of {} buffers judged, {half:?}", self.judged, self.completed));
        }
        let (vectors, area, entries, seed) = (self.vectors, self.area, self.entries, self.seed);
        Ok((
            Setup { form, interrupt, vectors, area, entries, seed },
            Progress {
                completed: self.completed,
                judged: self.judged,
                half,
                sequence: self.sequence,
                outstanding: self.outstanding,
                cause: self.cause,
            },
            Figures {
                buffers: self.buffers,
                bytes: self.bytes,
                signals: self.signals,
                lost: self.lost,
                longest_ns: self.longest_ns,
                faults: self.faults,
                loads: self.loads,
            },
        ))
    }
}

impl SavedHalf {
    fn check(self) -> Result<Half, String> {
        let pattern = [Pattern::Whole, Pattern::Reverse, Pattern::Lines].get(self.pattern as usize).copied();
        let half = pattern.map(|pattern| Half { address: self.address, length: self.length, done: self.done, pattern });
        half.filter(Half::is_possible).ok_or_else(|| format!("a buffer {self:?}"))
    }
}

/// Whether a ring can have so many entries.
pub fn valid_entries(entries: u32) -> bool {
    entries.is_power_of_two() && (2..=MAX_ENTRIES).contains(&entries)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use prost::Message;
    use wherry_state::Section;

    use super::*;

    /// Different numbers in all fields, and still a state that a device can take.
    pub fn example() -> SavedTestdma {
        SavedTestdma {
            config: (0..=255).cycle().take(4096).collect(),
            form: 1,
            interrupt: 3,
            vectors: 4,
            area: 0x1234_5000,
            entries: 256,
            seed: 0xfeed_0123_4567_89ab,
            cause: true,
            completed: 1 << 40,
            judged: (1 << 40) - 1,
            half: Some(SavedHalf { address: 0x2345_6000, length: 12_288, done: 17, pattern: 2 }),
            sequence: 99,
            outstanding: true,
            buffers: 100,
            bytes: 101,
            signals: 102,
            lost: 103,
            longest_ns: 104,
            faults: 105,
            loads: 106,
            scratch: (0..=255).rev().cycle().take(4096).collect(),
            table: vec![7; 4096],
            pending: vec![SavedPending { index: 2, vector: 3 }, SavedPending { index: 2, vector: 1 }],
        }
    }

    #[test]
    fn states_of_every_schema_are_read_and_the_newest_is_written_as_ever() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/testdma-1.bin");
        let id = wherry_state::UnitId { name: UNIT.into(), instance: 0 };
        let section = example().to_section(&id);
        if std::env::var_os("WHERRY_NEW_GOLDEN").is_some() && !path.exists() {
            std::fs::write(&path, section.encode_to_vec()).unwrap();
        }
        let golden = std::fs::read(&path).unwrap();
        assert_eq!(section.encode_to_vec(), golden, "the bytes of schema 1 have changed");
        let read = SavedTestdma::from_section(&Section::decode(&golden[..]).unwrap()).unwrap();
        assert_eq!(read, example());
        let (setup, progress, figures) = read.engine().unwrap();
        let again = SavedTestdma::of(&setup, &progress, &figures);
        let rest = SavedTestdma {
            config: Vec::new(),
            scratch: Vec::new(),
            table: Vec::new(),
            pending: Vec::new(),
            ..example()
        };
        assert_eq!(again, rest);
    }

    #[test]
    fn a_state_that_cannot_be_is_refused_with_what_is_wrong() {
        type Change = fn(&mut SavedTestdma);
        let wrong: [(&str, Change); 8] = [
            ("form 7", |s| s.form = 7),
            ("interrupts 4", |s| s.interrupt = 4),
            ("0 vectors", |s| s.vectors = 0),
            ("2048 entries", |s| s.entries = 2048),
            ("a ring of 3", |s| s.entries = 3),
            ("judged", |s| s.judged = s.completed + 1),
            ("judged", |s| s.form = 2),
            ("a buffer", |s| s.half.as_mut().unwrap().done = 1 << 20),
        ];
        for (hint, change) in wrong {
            let mut state = example();
            change(&mut state);
            let error = state.engine().unwrap_err();
            assert!(error.contains(hint), "{hint}: {error}");
        }
    }
}
