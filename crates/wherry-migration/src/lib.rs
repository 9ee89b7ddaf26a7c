//! The journey of a running VM from one process to another.
//!
//! - [`machine`]: what a VMM gives to the engine; the engine knows no KVM.
//! - [`progress`]: what the engine tells while it works and at the end, in libvirt's job vocabulary.

pub mod machine;
pub mod progress;
