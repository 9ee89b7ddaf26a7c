//! A device of `wherry-virtio` behind a vhost-user back end.
//!
//! The back end starts and stops rings one by one; the device is given all that are to be served at once, and brought to rest
//! in between. At rest it keeps nothing of a ring: what it took and did not give back is taken again.

use std::fmt::Display;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use wherry_backend as backend;
use wherry_interrupt::{Intx, Vector};
use wherry_memory::GuestMemory;
use wherry_state::Section;
use wherry_virtio::blk::{Blk, Image, ImageError};
use wherry_virtio::net::{Net, Tap};
use wherry_virtio::saved::SavedTransport;
use wherry_virtio::{Activation, Device, Driver, InFlight, Interrupts, Position, RingGiven, RingSetup};

/// Bytes of a configuration that a front end may ask for.
const CONFIG: usize = 256;
/// Features of a network device that need its ring of commands, which front ends keep for themselves.
const COMMANDS: u64 =
    1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;

/// How long a lock is waited for, and how long between two tries.
const LOCK_LIMIT: Duration = Duration::from_secs(1);
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// What a device is, and what it is connected to.
enum Its {
    Disk(Blk, Arc<Image>),
    Network(Net, Arc<Tap>),
}

/// What the process has to know that goes on with the device.
#[derive(Clone, PartialEq, Message)]
struct SavedServed {
    /// Size of the disk, as the guest knows it.
    #[prost(uint64, tag = "1")]
    sectors: u64,
    /// The packet that waits for buffers of the driver.
    #[prost(bytes = "vec", tag = "2")]
    packet: Vec<u8>,
}

/// The device.
pub struct Served {
    its: Its,
    features: u64,
    rings: u16,
    changed: EventFd,
}

impl Served {
    /// A disk. The image belongs to whoever serves rings.
    pub fn blk(image: Arc<Image>) -> io::Result<Self> {
        let device = Blk::new(image.clone(), 0)?;
        let features = device.features();
        let changed = EventFd::new(EFD_NONBLOCK)?;
        Ok(Self { its: Its::Disk(device, image), features, rings: 1, changed })
    }

    /// A network device.
    pub fn net(tap: Arc<Tap>, mac: [u8; 6]) -> io::Result<Self> {
        let device = Net::new(tap.clone(), mac, 0)?;
        let features = device.features() & !COMMANDS;
        let changed = EventFd::new(EFD_NONBLOCK)?;
        Ok(Self { its: Its::Network(device, tap), features, rings: 2, changed })
    }

    fn device(&self) -> &dyn Device {
        match &self.its {
            Its::Disk(device, _) => device,
            Its::Network(device, _) => device,
        }
    }

    /// It has given back what it has taken: has it let go of its rings. Where to go on with each.
    ///
    /// A buffer for packets that waits in the device was not given back: it is there for whoever serves the ring next, and so is the
    /// packet that it waits with.
    fn let_go(&self) -> Result<Vec<(u16, u16)>, String> {
        let device = self.device();
        let next = device.serving().positions().into_iter().map(|(index, position)| (index, position.used)).collect();
        match &self.its {
            Its::Disk(device, _) => device.reset(),
            Its::Network(device, _) => {
                let packet = device.waiting();
                device.reset();
                device.set_waiting(packet).map_err(|e| e.to_string())?;
            }
        }
        Ok(next)
    }

    /// Looks whether a disk has grown; its front end is told then.
    pub fn look_again(&self) {
        let Its::Disk(_, image) = &self.its else { return };
        match image.grow() {
            Ok(true) => {
                tracing::info!(image = %image.path().display(), sectors = image.sectors(), "the disk has grown");
                let _ = self.changed.write(1);
            }
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "the disk keeps its size"),
        }
    }
}

impl backend::Device for Served {
    fn name(&self) -> &str {
        self.device().kind().name
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn rings(&self) -> (u16, u16) {
        (self.rings, self.device().ring_sizes().first().copied().unwrap_or(0))
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; CONFIG];
        self.device().read_config(0, &mut config);
        config
    }

    fn changed(&self) -> Option<&EventFd> {
        Some(&self.changed)
    }

    fn write_config(&self, offset: u32, content: &[u8]) -> Result<(), String> {
        self.device().write_config(offset.into(), content);
        Ok(())
    }

    fn serve(
        &self,
        memory: GuestMemory,
        features: u64,
        rings: Vec<backend::RingGiven>,
        driver: Arc<backend::Driver>,
    ) -> Result<(), String> {
        if let Its::Disk(_, image) = &self.its {
            lock(image).map_err(|e| e.to_string())?;
        }
        let given = |ring: backend::RingGiven| RingGiven {
            index: ring.index,
            setup: RingSetup {
                size: ring.size,
                descriptors: ring.descriptors,
                available: ring.available,
                used: ring.used,
                position: Position { available: ring.next, used: 0 },
            },
            kick: ring.kick,
            resumes: true,
            in_flight: ring.in_flight.map(|noted| Arc::new(Noted(noted)) as Arc<dyn InFlight>),
        };
        let rings = rings.into_iter().map(given).collect();
        let interrupts = Interrupts::new(Arc::new(Front(driver)));
        self.device().activate(Activation { memory, features, rings, interrupts }).map_err(|e| e.to_string())?;
        self.device().start();
        Ok(())
    }

    fn rest(&self, deadline: Instant) -> Result<Vec<(u16, u16)>, String> {
        self.device().serving().drain(deadline).map_err(|e| e.to_string())?;
        self.let_go()
    }

    fn pause(&self, deadline: Instant) -> Result<Vec<(u16, u16)>, String> {
        let finished = match &self.its {
            Its::Disk(device, _) => device.finish(deadline),
            // It has nothing that takes time.
            Its::Network(device, _) => device.serving().drain(deadline),
        };
        finished.map_err(|e| e.to_string())?;
        self.let_go()
    }

    fn go_on(&self) {
        self.device().start();
    }

    fn release(&self) {
        match &self.its {
            Its::Disk(_, image) => {
                if let Err(error) = image.unlock() {
                    tracing::warn!(%error, "a disk image stays locked");
                }
            }
            // It is the packet of a guest that has gone.
            Its::Network(device, _) => drop(device.set_waiting(Vec::new())),
        }
    }

    fn announce(&self, address: [u8; 6]) -> Result<(), String> {
        match &self.its {
            Its::Network(_, tap) => {
                wherry_virtio::net::announce(tap, address);
                Ok(())
            }
            Its::Disk(..) => Err("a disk announces nothing".into()),
        }
    }

    fn save(&self) -> Vec<u8> {
        self.device().save(SavedTransport::default()).encode_to_vec()
    }

    fn restore(&self, state: &[u8]) -> Result<(), String> {
        let section = Section::decode(state).map_err(|e| e.to_string())?;
        if section.unit != self.name() {
            return Err(format!("the state of a {:.80}; this is a {}", section.unit, self.name()));
        }
        self.device().restore(&section).map(drop).map_err(|e| e.to_string())
    }

    fn keep(&self) -> Vec<u8> {
        let saved = match &self.its {
            Its::Disk(_, image) => SavedServed { sectors: image.sectors(), ..SavedServed::default() },
            Its::Network(device, _) => SavedServed { packet: device.waiting(), ..SavedServed::default() },
        };
        saved.encode_to_vec()
    }

    fn take(&self, kept: &[u8]) -> Result<(), String> {
        let saved = SavedServed::decode(kept).map_err(|e| format!("the state of a {}: {e}", self.name()))?;
        match &self.its {
            Its::Disk(_, image) => image.keep_size(saved.sectors).map_err(|e| e.to_string()),
            Its::Network(device, _) => device.set_waiting(saved.packet).map_err(|e| e.to_string()),
        }
    }
}

/// Locks an image. One that served it and was killed may keep it for a moment: until the kernel has ended its I/O.
fn lock(image: &Image) -> Result<(), ImageError> {
    let deadline = Instant::now() + LOCK_LIMIT;
    loop {
        match image.lock() {
            Err(ImageError::Locked(_)) if Instant::now() < deadline => std::thread::sleep(LOCK_PAUSE),
            result => return result,
        }
    }
}

/// The driver, behind a front end.
struct Front(Arc<backend::Driver>);

impl Driver for Front {
    fn ring(&self, index: u16) {
        self.0.ring(index);
    }

    /// No device of this kind changes its configuration of itself; a disk that grows is told of by whoever has it grow.
    fn configuration(&self) {}

    fn needs_reset(&self, what: &str, why: &dyn Display) {
        self.0.failed(what, why);
    }

    fn ring_vector(&self, _index: u16) -> Option<Arc<Vector>> {
        None
    }

    fn pin(&self) -> Option<&Intx> {
        None
    }
}

/// What is under way, in memory of the front end.
struct Noted(Arc<backend::InFlight>);

impl InFlight for Noted {
    fn left(&self, used: u16) -> Vec<u16> {
        self.0.left(used)
    }

    fn taken(&self, head: u16) {
        self.0.taken(head);
    }

    fn giving(&self, head: u16) {
        self.0.giving(head);
    }

    fn given(&self, heads: &[u16], used: u16) {
        self.0.given(heads, used);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn what_another_process_took_is_read_and_written_as_ever() {
        let example = SavedServed { sectors: 1 << 40, packet: b"packet".to_vec() };
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/served-1.bin");
        if std::env::var_os("WHERRY_NEW_GOLDEN").is_some() && !path.exists() {
            std::fs::write(&path, example.encode_to_vec()).unwrap();
        }
        let golden = std::fs::read(&path).unwrap();
        assert_eq!(example.encode_to_vec(), golden, "the bytes of schema 1 of a back end have changed");
        assert_eq!(SavedServed::decode(&golden[..]).unwrap(), example);
    }

    #[test]
    fn a_disk_is_as_large_as_its_guest_knows_and_no_larger_than_its_image() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let served = || {
            let image = Image::open(file.path(), false).unwrap();
            Served::blk(Arc::new(image)).unwrap()
        };
        let size = |served: &Served| {
            let mut sectors = [0; 8];
            sectors.copy_from_slice(&backend::Device::config(served)[..8]);
            u64::from_le_bytes(sectors)
        };
        file.as_file().set_len(1 << 20).unwrap();
        let kept = backend::Device::keep(&served());
        file.as_file().set_len(1 << 21).unwrap();
        let next = served();
        assert_eq!(size(&next), 4096);
        backend::Device::take(&next, &kept).unwrap();
        assert_eq!(size(&next), 2048);
        next.look_again();
        assert_eq!(size(&next), 4096);
        file.as_file().set_len(1 << 19).unwrap();
        let error = backend::Device::take(&served(), &kept).unwrap_err();
        assert!(error.contains("the size that its guest knows"), "{error}");
        assert!(backend::Device::take(&served(), b"nonsense").is_err());
        assert!(backend::Device::take(&served(), &[]).is_err(), "a disk without a size");
    }
}
