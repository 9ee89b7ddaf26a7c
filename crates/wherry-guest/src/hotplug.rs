//! The ports by which devices come and go: those that ACPI's methods use in a guest with an interpreter for them. This one has none.
//!
//! This file is compiled into the guest and into the VMM, which compares the two.

/// Slots with a new device, a bit for each; writing a 1 clears it.
pub const UP: u16 = 0x614;
/// Slots that are to be let go; writing a 1 clears it.
pub const DOWN: u16 = 0x618;
/// Writing a 1 ejects the device in that slot.
pub const EJECT: u16 = 0x61c;
