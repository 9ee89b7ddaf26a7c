//! A driver: sets a device up through its registers, and works with its rings.
#![allow(dead_code, clippy::unwrap_used, reason = "each test uses its part; a test that cannot go on fails")]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use wherry_interrupt::fake::FakeRouter;
use wherry_interrupt::{Events, Input};
use wherry_memory::{BlockId, BlockSpec, GuestMemory, PageSize, Ram};
use wherry_pci::bus::Bus;
use wherry_pci::{Doorbell, Doorbells, PciFunction};
use wherry_virtio::{Device, PciParts, TransportError, VirtioPci};

/// Where its BAR is.
pub const BAR: u64 = 0xc000_0000;
/// Where its ring lies.
pub const DESCRIPTORS: u64 = 0x1_0000;
pub const AVAILABLE: u64 = 0x1_2000;
pub const USED: u64 = 0x1_3000;
/// Entries of it.
pub const SIZE: u16 = 16;
/// Bytes from the rings of one number to those of the next.
pub const RING_STEP: u64 = 0x4000;
pub const LIMIT: Duration = Duration::from_secs(20);
pub const PIN: Input = Input(17);

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// No doorbells: writes reach the registers.
struct NoDoorbells;

impl Doorbells for NoDoorbells {
    fn attach(&self, _: Doorbell, _: &dyn AsRawFd) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn detach(&self, _: Doorbell, _: &dyn AsRawFd) -> io::Result<()> {
        Ok(())
    }
}

pub struct Driver {
    pub function: Arc<VirtioPci>,
    pub router: Arc<FakeRouter>,
    pub bus: Arc<Bus>,
    pub ram: Arc<Ram>,
    /// Next entry of the available ring.
    pub available: u16,
    /// Next entry of the used ring to look at.
    pub seen: u16,
    /// Both, of the rings behind the first.
    pub others: [(u16, u16); 4],
}

pub fn ram() -> Arc<Ram> {
    let spec = BlockSpec { id: BlockId(0), guest_base: 0, size: 4 << 20, page_size: PageSize::Base };
    Arc::new(Ram::create(&[spec]).unwrap())
}

pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited {LIMIT:?} for {what}");
        std::thread::yield_now();
    }
}

impl Driver {
    pub fn new(device: Arc<dyn Device>, ram: Arc<Ram>) -> Self {
        let router = Arc::new(FakeRouter::default());
        let bus = Arc::new(Bus::new());
        let parts = PciParts {
            memory_bus: bus.clone(),
            doorbells: Arc::new(NoDoorbells),
            router: router.clone(),
            pin_input: PIN,
            memory: ram.memory().clone(),
            events: Events::own(),
            registry: wherry_handover::Registry::new(),
        };
        let function = VirtioPci::new::<TransportError>(device, 0, &parts, |config| Ok(config.set_bar(0, BAR)?));
        Self { function: function.unwrap(), router, bus, ram, available: 0, seen: 0, others: [(0, 0); 4] }
    }

    pub fn memory(&self) -> &GuestMemory {
        self.ram.memory()
    }

    pub fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        assert!(self.bus.read(BAR + offset, &mut data));
        data
    }

    pub fn write(&self, offset: u64, data: &[u8]) {
        assert!(self.bus.write(BAR + offset, data));
    }

    pub fn status(&self) -> u8 {
        self.read::<1>(0x14)[0]
    }

    /// Memory decoding and bus mastering on, MSI-X on with a vector for each of ring and configuration, or off.
    pub fn switch_on(&self, msix: bool) {
        self.function.write_config(4, &6u16.to_le_bytes());
        if msix {
            for vector in 0..2u64 {
                self.write(0x4000 + vector * 16, &0xfee0_0000u64.to_le_bytes());
                self.write(0x4008 + vector * 16, &(0x40 + vector as u32).to_le_bytes());
                self.write(0x400c + vector * 16, &[0; 4]);
            }
            let at = self.capability(0x11);
            self.function.write_config(at + 2, &0x8000u16.to_le_bytes());
        }
    }

    /// Offset of the first capability with this ID.
    pub fn capability(&self, id: u8) -> u16 {
        let byte = |at: u16| {
            let mut byte = [0];
            self.function.read_config(at, &mut byte);
            byte[0]
        };
        let mut at = byte(0x34);
        while byte(at.into()) != id {
            at = byte(u16::from(at) + 1);
            assert_ne!(at, 0, "no capability {id:#x}");
        }
        at.into()
    }

    /// Takes these features and sets the first ring up: the whole way of section 3.1.1.
    pub fn set_up(&mut self, features: u64) {
        self.set_up_rings(features, 1);
    }

    /// The same with so many rings. All have vector 0, and the configuration has vector 1.
    pub fn set_up_rings(&mut self, features: u64, rings: u16) {
        self.write(0x14, &[0]);
        until("the reset", || self.status() == 0);
        self.write(0x14, &[1]);
        self.write(0x14, &[3]);
        for half in 0..2u32 {
            self.write(0x08, &half.to_le_bytes());
            self.write(0x0c, &((features >> (32 * half)) as u32).to_le_bytes());
        }
        self.write(0x14, &[11]);
        assert_eq!(self.status(), 11, "the features were not accepted");
        self.write(0x10, &1u16.to_le_bytes());
        for ring in 0..rings {
            let step = RING_STEP * u64::from(ring);
            self.write(0x16, &ring.to_le_bytes());
            self.write(0x18, &SIZE.to_le_bytes());
            self.write(0x1a, &0u16.to_le_bytes());
            self.write(0x20, &(DESCRIPTORS + step).to_le_bytes());
            self.write(0x28, &(AVAILABLE + step).to_le_bytes());
            self.write(0x30, &(USED + step).to_le_bytes());
            self.memory().write_slice(&[0; 0x1000], GuestAddress(AVAILABLE + step)).unwrap();
            self.memory().write_slice(&[0; 0x1000], GuestAddress(USED + step)).unwrap();
            self.write(0x1c, &1u16.to_le_bytes());
        }
        self.write(0x14, &[15]);
        (self.available, self.seen, self.others) = (0, 0, [(0, 0); 4]);
    }

    /// Goes on where another driver of the same memory stands.
    pub fn follow(&mut self, other: &Self) {
        (self.available, self.seen, self.others) = (other.available, other.seen, other.others);
    }

    pub fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_at(DESCRIPTORS + 16 * u64::from(index), address, len, flags, next);
    }

    pub fn descriptor_at(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let memory = self.memory();
        memory.write_obj(address, GuestAddress(at)).unwrap();
        memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    pub fn descriptor_of(&self, ring: u16, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = DESCRIPTORS + RING_STEP * u64::from(ring) + 16 * u64::from(index);
        self.descriptor_at(at, address, len, flags, next);
    }

    /// Makes a chain available, and rings.
    pub fn offer(&mut self, head: u16) {
        self.offer_on(0, head);
    }

    /// The counters of a ring: available and seen.
    fn counters(&mut self, ring: u16) -> (&mut u16, &mut u16) {
        match usize::from(ring).checked_sub(1) {
            None => (&mut self.available, &mut self.seen),
            Some(n) => (&mut self.others[n].0, &mut self.others[n].1),
        }
    }

    pub fn offer_on(&mut self, ring: u16, head: u16) {
        let at = AVAILABLE + RING_STEP * u64::from(ring);
        let (available, _) = self.counters(ring);
        let slot = u64::from(*available % SIZE);
        *available = available.wrapping_add(1);
        let now = *available;
        self.memory().write_obj(head, GuestAddress(at + 4 + 2 * slot)).unwrap();
        self.memory().write_obj(now, GuestAddress(at + 2)).unwrap();
        self.write(0x3000 + 4 * u64::from(ring), &ring.to_le_bytes());
    }

    pub fn ring(&self) {
        self.write(0x3000, &0u16.to_le_bytes());
    }

    /// Waits for the next entry of the used ring: head and length.
    pub fn used(&mut self) -> (u32, u32) {
        self.used_on(0)
    }

    pub fn used_on(&mut self, ring: u16) -> (u32, u32) {
        let before = *self.counters(ring).1;
        until("a used buffer", || self.used_index_on(ring) != before);
        let at = USED + RING_STEP * u64::from(ring) + 4 + 8 * u64::from(before % SIZE);
        *self.counters(ring).1 = before.wrapping_add(1);
        let memory = self.memory();
        (memory.read_obj(GuestAddress(at)).unwrap(), memory.read_obj(GuestAddress(at + 4)).unwrap())
    }

    pub fn used_index(&self) -> u16 {
        self.used_index_on(0)
    }

    pub fn used_index_on(&self, ring: u16) -> u16 {
        self.memory().read_obj(GuestAddress(USED + RING_STEP * u64::from(ring) + 2)).unwrap()
    }

    /// What MSI-X has delivered since it was last asked.
    pub fn interrupts(&self, vector: u32) -> Option<u64> {
        self.router.delivered(Input(24 + vector))
    }
}

pub fn soon() -> Instant {
    Instant::now() + LIMIT
}
