//! State units: every component of a machine that has state, and the tagged, versioned form its state travels in.
//!
//! - [`StateUnit`] is what a component implements: bring yourself to rest, save, restore, run again.
//! - [`Units`] holds all units of a machine and runs those steps over them in the order of their dependencies.
//! - [`Section`] is the saved state of one unit: unit name, instance, schema version and bytes. [`StateFile`] is a
//!   list of them with a checksum. The bytes are protobuf, derived from a type that exists only for saving
//!   ([`SavedState`]), so that a newer reader takes older bytes.
//! - [`StateStream`] is what a unit has beside that if its state is large: some of it goes while the machine still runs.
//! - [`Once`] is how a unit refuses state that comes a second time, or too late.
//!
//! Contract: a section that nobody claims, a unit that is given none although it saves one, and a section that is
//! given twice are errors: a machine that would start with half of its state refuses to start.
//!
//! Nothing here knows KVM, the wire, or who asks.

mod once;
mod section;
mod stream;
mod unit;
mod units;

pub use once::Once;
pub use section::{Digest, MAX_SECTION_BYTES, SavedState, Section, StateError, StateFile};
pub use stream::{Expected, Piece, StateStream, StreamTimes};
pub use unit::{Saved, StateUnit, UnitError, UnitId};
pub use units::{Units, UnitsError};
