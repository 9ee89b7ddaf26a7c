//! What stands in the payloads of messages: structures of the specification and of `linux/vfio.h`, to and from bytes. Decoders take
//! any bytes and say what is wrong with them.

mod features;

pub use features::{Feature, LoggingReport, LoggingStart, feature};

/// A payload that is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub String);

fn malformed<T>(what: impl Into<String>) -> Result<T, Malformed> {
    Err(Malformed(what.into()))
}

/// Takes numbers off the front of a payload.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        match self.0.split_at_checked(count) {
            Some((taken, rest)) => {
                self.0 = rest;
                Ok(taken)
            }
            None => malformed(format!("{} bytes, where {count} more are due", self.0.len())),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_ne_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_ne_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_ne_bytes(self.array()?))
    }

    pub(crate) fn end(&self) -> Result<(), Malformed> {
        match self.0.len() {
            0 => Ok(()),
            more => malformed(format!("{more} bytes too many")),
        }
    }
}

/// Puts numbers behind one another.
#[derive(Default)]
pub(crate) struct Out(pub(crate) Vec<u8>);

impl Out {
    pub(crate) fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    pub(crate) fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    pub(crate) fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
}

/// `VFIO_USER_DMA_MAP`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaMap {
    /// The device may read it.
    pub readable: bool,
    /// The device may write it.
    pub writable: bool,
    /// Where it starts in the file of the descriptor.
    pub offset: u64,
    /// Address as the device sees it (IOVA).
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

impl DmaMap {
    /// Bytes of it.
    pub const SIZE: usize = 32;

    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let flags = u32::from(self.readable) | u32::from(self.writable) << 1;
        Out::default().u32(Self::SIZE as u32).u32(flags).u64(self.offset).u64(self.address).u64(self.size).0
    }

    /// From bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut fields = Fields(bytes);
        let (argsz, flags) = (fields.u32()?, fields.u32()?);
        let (offset, address, size) = (fields.u64()?, fields.u64()?, fields.u64()?);
        fields.end()?;
        if (argsz as usize) < Self::SIZE || flags & !3 != 0 {
            return malformed(format!("argsz {argsz}, flags {flags:#x}"));
        }
        Ok(Self { readable: flags & 1 != 0, writable: flags & 2 != 0, offset, address, size })
    }
}

/// `VFIO_USER_DMA_UNMAP`; its reply is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaUnmap {
    /// Address as the device sees it (IOVA).
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

impl DmaUnmap {
    /// Bytes of it.
    pub const SIZE: usize = 24;

    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        Out::default().u32(Self::SIZE as u32).u32(0).u64(self.address).u64(self.size).0
    }

    /// From bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut fields = Fields(bytes);
        let (argsz, flags) = (fields.u32()?, fields.u32()?);
        let this = Self { address: fields.u64()?, size: fields.u64()? };
        fields.end()?;
        match (argsz as usize >= Self::SIZE, flags) {
            (true, 0) => Ok(this),
            _ => malformed(format!("argsz {argsz}, flags {flags:#x}")),
        }
    }
}

/// Four words with `argsz` first: device information, interrupt information and the head of descriptors for regions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Words {
    /// Most bytes of the reply's payload; in a reply what a whole one needs.
    pub argsz: u32,
    /// Second word.
    pub flags: u32,
    /// Third word: `num_regions`, or an index.
    pub third: u32,
    /// Fourth word: `num_irqs`, or a count.
    pub fourth: u32,
}

impl Words {
    /// Bytes of it.
    pub const SIZE: usize = 16;

    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        Out::default().u32(self.argsz).u32(self.flags).u32(self.third).u32(self.fourth).0
    }

    /// From bytes; there may be more of them.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut fields = Fields(bytes);
        Ok(Self { argsz: fields.u32()?, flags: fields.u32()?, third: fields.u32()?, fourth: fields.u32()? })
    }
}

/// Flags of a device (`VFIO_DEVICE_FLAGS_*`).
pub mod device_flags {
    /// It can be reset.
    pub const RESET: u32 = 1 << 0;
    /// It is a PCI device.
    pub const PCI: u32 = 1 << 1;
}

/// Flags of a region (`VFIO_REGION_INFO_FLAG_*`).
pub mod region_flags {
    /// Can be read.
    pub const READ: u32 = 1 << 0;
    /// Can be written.
    pub const WRITE: u32 = 1 << 1;
    /// Can be mapped.
    pub const MMAP: u32 = 1 << 2;
    /// Has capabilities.
    pub const CAPS: u32 = 1 << 3;
}

/// Numbers of a PCI device's regions (`VFIO_PCI_*_REGION_INDEX`); BARs are 0 to 5.
pub mod pci_region {
    /// The expansion ROM.
    pub const ROM: u32 = 6;
    /// Configuration space.
    pub const CONFIG: u32 = 7;
    /// VGA.
    pub const VGA: u32 = 8;
    /// How many there are.
    pub const COUNT: u32 = 9;
}

/// Numbers of a PCI device's interrupts (`VFIO_PCI_*_IRQ_INDEX`).
pub mod pci_irq {
    /// INTx.
    pub const INTX: u32 = 0;
    /// MSI.
    pub const MSI: u32 = 1;
    /// MSI-X.
    pub const MSIX: u32 = 2;
    /// Errors (AER).
    pub const ERR: u32 = 3;
    /// Requests of the device, for example to be released.
    pub const REQ: u32 = 4;
    /// How many there are.
    pub const COUNT: u32 = 5;
}

/// Flags of an interrupt (`VFIO_IRQ_INFO_*`).
pub mod irq_flags {
    /// It is signalled by eventfd.
    pub const EVENTFD: u32 = 1 << 0;
    /// It can be masked.
    pub const MASKABLE: u32 = 1 << 1;
    /// It masks itself when it is triggered.
    pub const AUTOMASKED: u32 = 1 << 2;
    /// The number of vectors does not change while they are in use.
    pub const NORESIZE: u32 = 1 << 3;
}

/// A part of a region that can be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// From the start of the region.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// A region of a device, `struct vfio_region_info`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegionInfo {
    /// What a whole reply needs.
    pub argsz: u32,
    /// See [`region_flags`].
    pub flags: u32,
    /// Its number.
    pub index: u32,
    /// Bytes; 0 if the device does not have it. (Unimplemented BARs of libvfio-user read as 1, not 0: this field tells.)
    pub size: u64,
    /// Where it starts in the file of its descriptor.
    pub offset: u64,
    /// The parts that can be mapped; without any, and with [`region_flags::MMAP`], all of it.
    pub sparse: Vec<Area>,
}

impl RegionInfo {
    /// Bytes without capabilities.
    pub const SIZE: usize = 32;
    /// `VFIO_REGION_INFO_CAP_SPARSE_MMAP`.
    const SPARSE_MMAP: u16 = 1;

    /// As bytes, with its capabilities; `argsz` is computed.
    pub fn encode(&self) -> Vec<u8> {
        let caps = if self.sparse.is_empty() { 0 } else { 16 + 16 * self.sparse.len() };
        let (flags, at) = match caps {
            0 => (self.flags, 0),
            _ => (self.flags | region_flags::CAPS, Self::SIZE as u32),
        };
        let out = Out::default().u32((Self::SIZE + caps) as u32).u32(flags).u32(self.index).u32(at);
        let mut out = out.u64(self.size).u64(self.offset);
        if caps > 0 {
            out = out.u16(Self::SPARSE_MMAP).u16(1).u32(0).u32(self.sparse.len() as u32).u32(0);
            for area in &self.sparse {
                out = out.u64(area.offset).u64(area.size);
            }
        }
        out.0
    }

    /// From bytes. Capabilities are read if they are all there (`argsz`); areas lie in the region.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut fields = Fields(bytes);
        let (argsz, flags, index, mut at) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()? as usize);
        let (size, offset) = (fields.u64()?, fields.u64()?);
        let mut this = Self { argsz, flags, index, size, offset, sparse: Vec::new() };
        if flags & region_flags::CAPS == 0 || argsz as usize > bytes.len() {
            return Ok(this);
        }
        // Each one lies behind the one before: a list that goes in a circle ends here.
        let mut least = Self::SIZE;
        while at != 0 {
            if at < least || at >= bytes.len() {
                return malformed(format!("a capability at {at} of {} bytes", bytes.len()));
            }
            let mut fields = Fields(&bytes[at..]);
            let (id, _version, next) = (fields.u16()?, fields.u16()?, fields.u32()? as usize);
            if id == Self::SPARSE_MMAP {
                let (count, _reserved) = (fields.u32()?, fields.u32()?);
                for _ in 0..count {
                    let area = Area { offset: fields.u64()?, size: fields.u64()? };
                    if area.offset.checked_add(area.size).is_none_or(|end| end > size) {
                        return malformed(format!("{area:x?} in a region of {size:#x} bytes"));
                    }
                    this.sparse.push(area);
                }
            }
            least = at + 8;
            at = next;
        }
        Ok(this)
    }
}

/// How a part of a region tells of accesses by a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoFd {
    /// From the start of the region.
    pub offset: u64,
    /// Bytes; 0 for an access of any length.
    pub size: u64,
    /// Which of the message's descriptors.
    pub fd_index: u32,
    /// One of the constants here.
    pub kind: u32,
    /// `KVM_IOEVENTFD_FLAG_*`, or `KVM_IOREGION_*`.
    pub flags: u32,
    /// What is compared (ioeventfd), or passed on (ioregionfd).
    pub data: u64,
}

impl IoFd {
    /// `VFIO_USER_IO_FD_TYPE_IOEVENTFD`.
    pub const IOEVENTFD: u32 = 0;
    /// `VFIO_USER_IO_FD_TYPE_IOREGIONFD`.
    pub const IOREGIONFD: u32 = 1;
    /// Bytes of one, as we send them; libvfio-user's are longer.
    const SIZE: usize = 40;
    /// `KVM_IOEVENTFD_FLAG_DATAMATCH`.
    pub const DATAMATCH: u32 = 1 << 0;

    /// The whole reply: its head and these.
    pub fn encode_all(index: u32, all: &[Self]) -> Vec<u8> {
        let argsz = Words::SIZE + Self::SIZE * all.len();
        let mut out = Out::default().u32(argsz as u32).u32(0).u32(index).u32(all.len() as u32);
        for it in all {
            out = out.u64(it.offset).u64(it.size).u32(it.fd_index).u32(it.kind).u32(it.flags).u32(0).u64(it.data);
        }
        out.0
    }

    /// From a whole reply: how far they are apart follows from `argsz` and their count.
    pub fn decode_all(bytes: &[u8]) -> Result<Vec<Self>, Malformed> {
        let head = Words::decode(bytes)?;
        let (argsz, count) = (head.argsz as usize, head.fourth as usize);
        if count == 0 {
            return Ok(Vec::new());
        }
        if argsz > bytes.len() {
            return malformed(format!("{} bytes, where {argsz} are announced", bytes.len()));
        }
        let stride = argsz.saturating_sub(Words::SIZE) / count;
        if stride < Self::SIZE {
            return malformed(format!("{count} entries in {argsz} bytes"));
        }
        let entries = bytes[Words::SIZE..].chunks_exact(stride).take(count);
        entries
            .map(|entry| {
                let mut fields = Fields(entry);
                let (offset, size, fd_index, kind) = (fields.u64()?, fields.u64()?, fields.u32()?, fields.u32()?);
                let (flags, _padding, data) = (fields.u32()?, fields.u32()?, fields.u64()?);
                Ok(Self { offset, size, fd_index, kind, flags, data })
            })
            .collect()
    }
}

/// `VFIO_USER_DEVICE_SET_IRQS`, without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqSet {
    /// Data and action, see the constants here.
    pub flags: u32,
    /// Which interrupt.
    pub index: u32,
    /// First vector.
    pub start: u32,
    /// How many.
    pub count: u32,
}

impl IrqSet {
    /// Bytes of it.
    pub const SIZE: usize = 20;
    /// No data.
    pub const NONE: u32 = 1 << 0;
    /// A byte for each vector.
    pub const BOOL: u32 = 1 << 1;
    /// A descriptor for each vector, or none at all.
    pub const EVENTFD: u32 = 1 << 2;
    /// Mask.
    pub const MASK: u32 = 1 << 3;
    /// Unmask.
    pub const UNMASK: u32 = 1 << 4;
    /// Trigger.
    pub const TRIGGER: u32 = 1 << 5;

    /// As bytes.
    pub fn encode(&self, data: &[u8]) -> Vec<u8> {
        let out = Out::default().u32((Self::SIZE + data.len()) as u32).u32(self.flags).u32(self.index);
        out.u32(self.start).u32(self.count).bytes(data).0
    }

    /// From bytes: it, and its data. Exactly one kind of data and one action.
    pub fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let mut fields = Fields(bytes);
        let (argsz, flags, index) = (fields.u32()? as usize, fields.u32()?, fields.u32()?);
        let this = Self { flags, index, start: fields.u32()?, count: fields.u32()? };
        let (data, action) = (flags & 7, flags & 0x38);
        if argsz < Self::SIZE || !data.is_power_of_two() || !action.is_power_of_two() || flags & !0x3f != 0 {
            return malformed(format!("argsz {argsz}, flags {flags:#x}"));
        }
        let due = if data == Self::BOOL { this.count as usize } else { 0 };
        match fields.0.len() == due {
            true => Ok((this, fields.0)),
            false => malformed(format!("{} bytes of data, where {due} are due", fields.0.len())),
        }
    }
}

/// An access to a region, without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionAccess {
    /// From the start of the region.
    pub offset: u64,
    /// Its number.
    pub region: u32,
    /// Bytes.
    pub count: u32,
}

impl RegionAccess {
    /// Bytes of it.
    pub const SIZE: usize = 16;

    /// As bytes.
    pub fn encode(&self, data: &[u8]) -> Vec<u8> {
        Out::default().u64(self.offset).u32(self.region).u32(self.count).bytes(data).0
    }

    /// From bytes: it, and what follows.
    pub fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let mut fields = Fields(bytes);
        let this = Self { offset: fields.u64()?, region: fields.u32()?, count: fields.u32()? };
        Ok((this, fields.0))
    }
}

/// An access to the client's memory, without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaAccess {
    /// Address as the device sees it (IOVA).
    pub address: u64,
    /// Bytes.
    pub count: u64,
}

impl DmaAccess {
    /// Bytes of it.
    pub const SIZE: usize = 16;

    /// As bytes.
    pub fn encode(&self, data: &[u8]) -> Vec<u8> {
        Out::default().u64(self.address).u64(self.count).bytes(data).0
    }

    /// From bytes: it, and what follows.
    pub fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let mut fields = Fields(bytes);
        let this = Self { address: fields.u64()?, count: fields.u64()? };
        Ok((this, fields.0))
    }
}

/// Writes of up to 8 bytes each (`VFIO_USER_REGION_WRITE_MULTI`).
pub struct WriteMulti;

impl WriteMulti {
    /// Bytes of one.
    pub const ENTRY: usize = 24;

    /// As bytes; data beyond 8 bytes is not there.
    pub fn encode(writes: &[(RegionAccess, [u8; 8])]) -> Vec<u8> {
        let out = Out::default().u64(writes.len() as u64);
        writes.iter().fold(out, |out, (access, data)| out.bytes(&access.encode(data))).0
    }

    /// From bytes.
    pub fn decode(bytes: &[u8]) -> Result<Vec<(RegionAccess, [u8; 8])>, Malformed> {
        let mut fields = Fields(bytes);
        let count = fields.u64()?;
        if u64::try_from(fields.0.len() / Self::ENTRY) != Ok(count) || !fields.0.len().is_multiple_of(Self::ENTRY) {
            return malformed(format!("{count} writes in {} bytes", fields.0.len()));
        }
        let mut writes = Vec::with_capacity(fields.0.len() / Self::ENTRY);
        while !fields.0.is_empty() {
            let access = RegionAccess { offset: fields.u64()?, region: fields.u32()?, count: fields.u32()? };
            if access.count > 8 {
                return malformed(format!("a write of {} bytes among several", access.count));
            }
            writes.push((access, fields.array()?));
        }
        Ok(writes)
    }
}
