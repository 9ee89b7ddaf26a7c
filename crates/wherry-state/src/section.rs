//! Saved state as bytes: sections, their tags and their checksum.

use prost::Message;

use crate::UnitId;

/// No unit's state may be larger, in bytes. Bulk data of a device does not belong into a section.
pub const MAX_SECTION_BYTES: usize = 16 << 20;

/// The saved state of one unit.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Section {
    /// Name of the unit, such as `vcpu`.
    #[prost(string, tag = "1")]
    pub unit: String,
    /// Which of several units of that name, from 0.
    #[prost(uint32, tag = "2")]
    pub instance: u32,
    /// Version of the schema of `bytes`; grows by one with each change that an older reader must not ignore.
    #[prost(uint32, tag = "3")]
    pub schema: u32,
    /// The state, encoded by the unit.
    #[prost(bytes = "vec", tag = "4")]
    pub bytes: Vec<u8>,
}

/// A type that exists to be saved: numbered fields, apart from the types the unit runs with.
///
/// `SCHEMA` is the version written. A reader takes every schema from 1 to its own: fields that an older writer did not
/// know are absent and read as their default, which must mean what the older writer meant.
pub trait SavedState: Message + Default {
    /// Version of the schema that this program writes, from 1.
    const SCHEMA: u32;

    /// Encodes the state as a section of the given unit.
    fn to_section(&self, id: &UnitId) -> Section {
        Section { unit: id.name.clone(), instance: id.instance, schema: Self::SCHEMA, bytes: self.encode_to_vec() }
    }

    /// Decodes the state from a section, refusing schemas newer than this program's.
    fn from_section(section: &Section) -> Result<Self, StateError> {
        if section.schema == 0 || section.schema > Self::SCHEMA {
            return Err(StateError::Schema { unit: section.id(), found: section.schema, known: Self::SCHEMA });
        }
        Self::decode(section.bytes.as_slice())
            .map_err(|e| StateError::Decode { unit: section.id(), reason: e.to_string() })
    }
}

impl Section {
    /// Which unit it belongs to.
    pub fn id(&self) -> UnitId {
        UnitId { name: self.unit.clone(), instance: self.instance }
    }
}

/// 256-bit BLAKE3 digest.
pub type Digest = [u8; 32];

/// All sections of a machine in the order they were saved, as a file or a message.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct StateFile {
    /// The sections.
    #[prost(message, repeated, tag = "1")]
    pub sections: Vec<Section>,
}

impl StateFile {
    /// Digest over the tags and bytes of all sections, in order. Two state files are equal if and only if it is.
    pub fn digest(&self) -> Digest {
        let mut hasher = blake3::Hasher::new();
        for s in &self.sections {
            hasher.update(&(s.unit.len() as u64).to_le_bytes()).update(s.unit.as_bytes());
            hasher.update(&s.instance.to_le_bytes()).update(&s.schema.to_le_bytes());
            hasher.update(&(s.bytes.len() as u64).to_le_bytes()).update(&s.bytes);
        }
        *hasher.finalize().as_bytes()
    }

    /// Checks sizes and tags: no empty names, no section over [`MAX_SECTION_BYTES`], no unit twice.
    pub fn check(&self) -> Result<(), StateError> {
        let mut seen = std::collections::BTreeSet::new();
        for section in &self.sections {
            if section.unit.is_empty() || section.unit.len() > 64 {
                return Err(StateError::BadName(section.unit.chars().take(80).collect()));
            }
            if section.bytes.len() > MAX_SECTION_BYTES {
                return Err(StateError::TooLarge { unit: section.id(), bytes: section.bytes.len() });
            }
            if !seen.insert(section.id()) {
                return Err(StateError::Twice(section.id()));
            }
        }
        Ok(())
    }
}

/// Saved state cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The writer was newer in a way this program cannot read.
    #[error("state of unit {unit} has schema {found}; this program reads 1 to {known}: use a newer Wherry here")]
    Schema {
        /// The unit.
        unit: UnitId,
        /// Schema of the section.
        found: u32,
        /// Newest schema this program reads.
        known: u32,
    },
    /// The bytes are not what the schema says.
    #[error("state of unit {unit} cannot be decoded: {reason}")]
    Decode {
        /// The unit.
        unit: UnitId,
        /// What the decoder says.
        reason: String,
    },
    /// A section names no possible unit.
    #[error("saved state has a section with the impossible unit name {0:?}")]
    BadName(String),
    /// A section is too large.
    #[error("state of unit {unit} has {bytes} bytes, more than the limit of {MAX_SECTION_BYTES}")]
    TooLarge {
        /// The unit.
        unit: UnitId,
        /// Its size.
        bytes: usize,
    },
    /// A unit's state is there twice.
    #[error("state of unit {0} is there twice")]
    Twice(UnitId),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, PartialEq, prost::Message)]
    struct Old {
        #[prost(uint32, tag = "1")]
        kept: u32,
    }
    impl SavedState for Old {
        const SCHEMA: u32 = 1;
    }
    #[derive(Clone, PartialEq, prost::Message)]
    struct New {
        #[prost(uint32, tag = "1")]
        kept: u32,
        #[prost(uint32, optional, tag = "2")]
        added: Option<u32>,
    }
    impl SavedState for New {
        const SCHEMA: u32 = 2;
    }

    fn id() -> UnitId {
        UnitId::new("u", 1)
    }

    #[test]
    fn a_newer_reader_takes_older_bytes_and_an_older_one_refuses_newer_by_name() {
        let old = Old { kept: 5 }.to_section(&id());
        assert_eq!(New::from_section(&old).unwrap(), New { kept: 5, added: None });
        let new = New { kept: 5, added: Some(1) }.to_section(&id());
        let error = Old::from_section(&new).unwrap_err().to_string();
        assert!(error.contains("u[1]") && error.contains("schema 2"), "{error}");
    }

    #[test]
    fn garbage_is_an_error_that_names_the_unit() {
        let section = Section { unit: "u".into(), instance: 1, schema: 1, bytes: vec![0xff; 9] };
        assert!(matches!(Old::from_section(&section), Err(StateError::Decode { unit, .. }) if unit == id()));
    }

    #[test]
    fn the_digest_changes_with_every_part() {
        let base = Section { unit: "ab".into(), instance: 0, schema: 1, bytes: vec![1, 2] };
        let file = |s: &Section| StateFile { sections: vec![s.clone()] }.digest();
        let variants = [
            Section { unit: "a".into(), bytes: vec![b'b', 1, 2], ..base.clone() },
            Section { instance: 1, ..base.clone() },
            Section { schema: 2, ..base.clone() },
            Section { bytes: vec![1, 3], ..base.clone() },
        ];
        for variant in &variants {
            assert_ne!(file(&base), file(variant), "{variant:?}");
        }
    }

    #[test]
    fn a_file_with_a_unit_twice_is_refused() {
        let section = Old { kept: 1 }.to_section(&id());
        let file = StateFile { sections: vec![section.clone(), section] };
        assert!(matches!(file.check(), Err(StateError::Twice(unit)) if unit == id()));
    }
}
