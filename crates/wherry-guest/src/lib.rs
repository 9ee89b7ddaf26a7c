//! The guest library and the probe guest, seen from the host.
//!
//! The guest itself is freestanding code under `guest/`, compiled by this crate's build script and embedded here as
//! [`PROBE_ELF`]: an ELF with a PVH entry, for any VMM that can start one. The modules are shared with it: they are
//! compiled into both, so that host and guest agree on every byte.
//!
//! - [`accel`]: the accelerator, as its driver sees it
//! - [`report`]: the pages in guest RAM through which the guest speaks, and where they are
//! - [`params`]: what may stand on its command line
//! - [`data`]: what its data pages hold
//! - [`disk`]: what it writes to a disk
//! - [`edu`]: QEMU's educational device, as its driver sees it
//! - [`hotplug`]: the ports by which devices come and go
//! - [`net`]: the frames it sends
//! - [`ram`]: which RAM it uses
//! - [`testdma`]: the test device for DMA, as its driver sees it
//! - [`snapshot`]: the report pages decoded, for programs that do not map them

pub mod accel;
pub mod data;
pub mod disk;
pub mod edu;
pub mod hotplug;
pub mod net;
pub mod params;
pub mod ram;
pub mod report;
pub mod snapshot;
pub mod testdma;

/// The probe kernel: a static x86-64 ELF with a PVH entry note, linked at 1 MiB.
pub static PROBE_ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/probe.elf"));
