//! The block device (section 5.2).
//!
//! - [`Blk`] is the device; `requests` is what its thread does with requests, `engine` how they reach the image.
//! - [`Image`] is a file that is opened, sized and locked; `qcow2` is for those that are not raw.
//!
//! What the driver is told is done has been done: without `VIRTIO_BLK_F_FLUSH` also on the medium. A drain ends with all
//! data on the medium, so that another host sees it, and no loss of this one takes it back.

#[expect(unsafe_code, reason = "system calls on guest memory")]
mod engine;
mod image;
mod qcow2;
mod requests;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use wherry_state::{SavedState, Section, UnitError, UnitId};

use self::engine::Engine;
pub use self::image::{Image, ImageError, ImageFormat};
use self::requests::Requests;
use crate::device::{Activation, Device, Kind, Serving, read_config};
use crate::ring::RING_FEATURES;
use crate::saved::{SavedBlk, SavedTransport};
use crate::worker::Worker;

const KIND: Kind = Kind { id: 2, name: "virtio-blk", class: [1, 0x80, 0] };
/// Bytes of a sector, whatever the medium has.
pub const SECTOR: u64 = 512;
/// Entries of the ring.
const RING: u16 = 256;
/// Most buffers of a request, beside header and status.
const SEGMENTS: u32 = RING as u32 - 2;
/// Most sectors that one discard or write of zeroes covers, and most of them in a request.
const RANGE_SECTORS: u32 = 1 << 22;
const RANGES: u32 = 1;

/// The device.
pub struct Blk {
    worker: Worker,
    image: Arc<Image>,
    instance: u32,
    /// Heads that were taken and had no effect: saved, or to be taken up.
    carried: Arc<Mutex<Vec<u16>>>,
    config: [u8; 60],
}

impl Blk {
    /// A device with this image; `instance` as that of its transport.
    pub fn new(image: Arc<Image>, instance: u32) -> io::Result<Self> {
        let engine = engine::best(&image, instance)?;
        Self::with_engine(image, instance, engine)
    }

    fn with_engine(image: Arc<Image>, instance: u32, engine: Box<dyn Engine>) -> io::Result<Self> {
        let carried = Arc::<Mutex<Vec<u16>>>::default();
        let requests = Requests::new(engine, image.clone(), format!("wherry-{instance}"), carried.clone());
        let worker = Worker::spawn(format!("virtio-blk-{instance}"), requests)?;
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x0c, &SEGMENTS.to_le_bytes());
        put(0x14, &(SECTOR as u32).to_le_bytes());
        put(0x24, &RANGE_SECTORS.to_le_bytes());
        put(0x28, &RANGES.to_le_bytes());
        // Alignment of a discard: a page of the file.
        put(0x2c, &8u32.to_le_bytes());
        put(0x30, &RANGE_SECTORS.to_le_bytes());
        put(0x34, &RANGES.to_le_bytes());
        // Writing zeroes may free the space.
        put(0x38, &[1]);
        Ok(Self { worker, image, instance, carried, config })
    }

    /// Comes to rest, like [`Serving::drain`], for whoever goes on with the same open image on this host: what was written may be on
    /// its way to the medium.
    pub fn finish(&self, deadline: Instant) -> Result<(), UnitError> {
        self.worker.finish(deadline)
    }

    /// The image.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }
}

impl Device for Blk {
    fn kind(&self) -> Kind {
        KIND
    }

    fn features(&self) -> u64 {
        let always = RING_FEATURES | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;
        always
            | match self.image.is_read_only() {
                true => 1 << VIRTIO_BLK_F_RO,
                false => 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES,
            }
    }

    fn ring_sizes(&self) -> &[u16] {
        &[RING]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = self.config;
        // An image may grow.
        config[..8].copy_from_slice(&self.image.sectors().to_le_bytes());
        read_config(&config, offset, data);
    }

    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    fn activate(&self, activation: Activation) -> Result<(), UnitError> {
        self.worker.activate(activation);
        Ok(())
    }

    fn reset(&self) {
        self.worker.reset();
    }

    fn serving(&self) -> &dyn Serving {
        &self.worker
    }

    fn start(&self) {
        self.worker.start();
    }

    /// Interrupts go through the transport, which looks each time.
    fn vector_changed(&self, _ring: u16) {}

    fn schema(&self) -> u32 {
        SavedBlk::SCHEMA
    }

    fn save(&self, transport: SavedTransport) -> Section {
        let carried = self.carried.lock().unwrap_or_else(PoisonError::into_inner);
        let in_flight = carried.iter().map(|head| u32::from(*head)).collect();
        let saved = SavedBlk { transport: Some(transport), sectors: self.image.sectors(), in_flight };
        saved.to_section(&UnitId::new(KIND.name, self.instance))
    }

    fn restore(&self, section: &Section) -> Result<SavedTransport, UnitError> {
        let saved = SavedBlk::from_section(section)?;
        if saved.sectors != self.image.sectors() {
            return Err(UnitError::failed(format!(
                "the guest has a disk of {} sectors; the image here, {}, has {}",
                saved.sectors,
                self.image.path().display(),
                self.image.sectors()
            )));
        }
        let heads = saved.in_flight.iter().map(|head| u16::try_from(*head).ok().filter(|head| *head < RING));
        let heads = heads.collect::<Option<Vec<_>>>().filter(|heads| heads.len() <= usize::from(RING));
        let heads = heads.ok_or_else(|| UnitError::failed("requests under way that its ring cannot have"))?;
        *self.carried.lock().unwrap_or_else(PoisonError::into_inner) = heads;
        saved.transport.ok_or_else(|| UnitError::failed("there is no state of its transport"))
    }
}
