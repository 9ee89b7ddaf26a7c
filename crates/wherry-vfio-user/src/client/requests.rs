//! One function for each request: maps, regions, interrupts, reset.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

use super::{Client, Mapped};
use crate::error::VfioUserError;
use crate::message::Command;
use crate::payload::{DmaMap, DmaUnmap, Fields, IoFd, IrqSet, RegionAccess, RegionInfo, Words, WriteMulti, pci_irq};
use crate::states::State;

/// A region, and the file to map if it can be mapped.
#[derive(Debug)]
pub struct RegionReply {
    /// What it is.
    pub info: RegionInfo,
    /// What can be mapped, at `info.offset`.
    pub file: Option<OwnedFd>,
}

/// Parts of a region that tell of accesses by a descriptor.
#[derive(Debug)]
pub struct IoFds {
    /// Where they are, and how; they lie in the region, and their descriptors are there.
    pub parts: Vec<IoFd>,
    /// Descriptors, by `fd_index`.
    pub descriptors: Vec<OwnedFd>,
}

impl Client {
    /// What the device is: `third` is the number of its regions, `fourth` that of its interrupts.
    pub fn info(&self) -> Result<Words, VfioUserError> {
        let asked = Words { argsz: Words::SIZE as u32, flags: 0, third: 0, fourth: 0 };
        let (reply, _) = self.ask(Command::GetInfo, &asked.encode(), &[])?;
        Words::decode(&reply).map_err(|error| self.wrong(Command::GetInfo, error))
    }

    /// A region. If its capabilities need more room, it is asked for once more.
    pub fn region_info(&self, index: u32) -> Result<RegionReply, VfioUserError> {
        let command = Command::GetRegionInfo;
        let mut argsz = RegionInfo::SIZE as u32;
        for _ in 0..2 {
            let mut asked = RegionInfo { index, ..RegionInfo::default() }.encode();
            asked[..4].copy_from_slice(&argsz.to_ne_bytes());
            let (reply, descriptors) = self.ask(command, &asked, &[])?;
            let info = RegionInfo::decode(&reply).map_err(|error| self.wrong(command, error))?;
            if info.index != index {
                return Err(self.wrong(command, format!("region {}, asked about {index}", info.index)));
            }
            if info.argsz <= argsz {
                return Ok(RegionReply { info, file: descriptors.into_iter().next() });
            }
            argsz = info.argsz.min(self.transfer() as u32);
        }
        Err(self.wrong(command, "its capabilities need more room each time"))
    }

    /// Parts of a region that tell of accesses by a descriptor.
    pub fn region_io_fds(&self, index: u32) -> Result<IoFds, VfioUserError> {
        let command = Command::GetRegionIoFds;
        let size = self.region_info(index)?.info.size;
        let mut argsz = Words::SIZE as u32;
        for _ in 0..2 {
            let asked = Words { argsz, flags: 0, third: index, fourth: 0 };
            let (reply, descriptors) = self.ask(command, &asked.encode(), &[])?;
            let head = Words::decode(&reply).map_err(|error| self.wrong(command, error))?;
            if head.argsz <= argsz {
                let parts = IoFd::decode_all(&reply).map_err(|error| self.wrong(command, error))?;
                let inside = |part: &IoFd| part.offset.checked_add(part.size).is_some_and(|end| end <= size);
                let there = |part: &IoFd| (part.fd_index as usize) < descriptors.len();
                if let Some(part) = parts.iter().find(|part| !inside(part) || !there(part)) {
                    let count = descriptors.len();
                    return Err(self.wrong(command, format!("{part:x?}: {size:#x} bytes, {count} descriptors")));
                }
                return Ok(IoFds { parts, descriptors });
            }
            argsz = head.argsz.min(self.transfer() as u32);
        }
        Err(self.wrong(command, "its entries need more room each time"))
    }

    /// An interrupt: its flags, and in `fourth` its vectors.
    pub fn irq_info(&self, index: u32) -> Result<Words, VfioUserError> {
        let asked = Words { argsz: Words::SIZE as u32, flags: 0, third: index, fourth: 0 };
        let (reply, _) = self.ask(Command::GetIrqInfo, &asked.encode(), &[])?;
        match Words::decode(&reply) {
            Ok(info) if info.third == index => Ok(info),
            Ok(info) => Err(self.wrong(Command::GetIrqInfo, format!("interrupt {}, asked about {index}", info.third))),
            Err(error) => Err(self.wrong(Command::GetIrqInfo, error)),
        }
    }

    /// Shows memory to the device: with a file and an offset in it, or without, to be reached by messages. What overlaps is not sent:
    /// libvfio-user takes an identical map twice, and loses a descriptor.
    pub fn dma_map(
        &self,
        address: u64,
        size: u64,
        file: Option<(BorrowedFd<'_>, u64)>,
        readable: bool,
        writable: bool,
    ) -> Result<(), VfioUserError> {
        self.map(address, size, file, readable, writable).map(|_| ())
    }

    /// Serves the faults of the memory that is mapped from now on (our extension `userfaultfd`): the device's userfaultfd.
    /// Nothing is mapped yet.
    pub fn begin_faults(&self) -> Result<OwnedFd, VfioUserError> {
        if !self.extensions.userfaultfd {
            return Err(self.lacks("it does not take part in postcopy (no extension `userfaultfd`)"));
        }
        let (_, descriptors) = self.ask(Command::Userfaultfd, &1u32.to_ne_bytes(), &[])?;
        let fd = descriptors.into_iter().next();
        fd.ok_or_else(|| self.wrong(Command::Userfaultfd, "no descriptor in the reply"))
    }

    /// As [`dma_map`](Self::dma_map), readable and writable, for memory that is not all there. The address at which the device has
    /// mapped it, in its own process: its faults are at addresses from there on.
    pub fn dma_map_missing(&self, address: u64, size: u64, file: (BorrowedFd<'_>, u64)) -> Result<u64, VfioUserError> {
        let reply = self.map(address, size, Some(file), true, true)?;
        Fields(&reply).u64().map_err(|error| self.wrong(Command::DmaMap, error))
    }

    /// All memory is there.
    pub fn end_faults(&self) -> Result<(), VfioUserError> {
        self.ask(Command::Userfaultfd, &0u32.to_ne_bytes(), &[]).map(|_| ())
    }

    fn map(
        &self,
        address: u64,
        size: u64,
        file: Option<(BorrowedFd<'_>, u64)>,
        readable: bool,
        writable: bool,
    ) -> Result<Vec<u8>, VfioUserError> {
        let end = address.checked_add(size).filter(|_| size > 0);
        let end = end.ok_or_else(|| self.lacks(format!("no map of {size:#x} bytes at {address:#x}")))?;
        let mut maps = self.maps();
        if let Some((at, other)) = maps.range(..end).next_back()
            && at + other.size > address
        {
            return Err(self.lacks(format!("{address:#x} is mapped, from {at:#x} on")));
        }
        if maps.len() >= self.server.maps() {
            return Err(self.lacks(format!("it has {} maps already", maps.len())));
        }
        // Before the reply: the device may use it from then on.
        maps.insert(address, Mapped { size, readable, writable });
        drop(maps);
        let offset = file.map_or(0, |(_, offset)| offset);
        let map = DmaMap { readable, writable, offset, address, size };
        let fds: Vec<BorrowedFd<'_>> = file.iter().map(|(fd, _)| *fd).collect();
        let result = self.ask(Command::DmaMap, &map.encode(), &fds);
        if let Err(VfioUserError::Refused { .. }) = &result {
            self.maps().remove(&address);
        }
        result.map(|(reply, _)| reply)
    }

    /// Takes memory away again, exactly as it was mapped. When this returns the device does not access it any longer.
    pub fn dma_unmap(&self, address: u64, size: u64) -> Result<(), VfioUserError> {
        if self.maps().get(&address).is_none_or(|map| map.size != size) {
            return Err(self.lacks(format!("{size:#x} bytes at {address:#x} are not a map")));
        }
        let unmap = DmaUnmap { address, size };
        let (reply, _) = self.ask(Command::DmaUnmap, &unmap.encode(), &[])?;
        self.maps().remove(&address);
        match DmaUnmap::decode(&reply) {
            Ok(said) if said != unmap => Err(self.wrong(Command::DmaUnmap, format!("it unmapped {said:x?}"))),
            _ => Ok(()),
        }
    }

    /// Reads from a region, in several messages if need be.
    pub fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), VfioUserError> {
        let mut at = offset;
        for piece in data.chunks_mut(self.transfer()) {
            let access = RegionAccess { offset: at, region, count: piece.len() as u32 };
            let (reply, _) = self.ask(Command::RegionRead, &access.encode(&[]), &[])?;
            match RegionAccess::decode(&reply) {
                Ok((said, bytes)) if said == access && bytes.len() == piece.len() => piece.copy_from_slice(bytes),
                Ok((said, bytes)) => {
                    let reason = format!("{said:x?} and {} bytes, where {access:x?} was asked for", bytes.len());
                    return Err(self.wrong(Command::RegionRead, reason));
                }
                Err(error) => return Err(self.wrong(Command::RegionRead, error)),
            }
            at = at.wrapping_add(piece.len() as u64);
        }
        Ok(())
    }

    /// Writes to a region, in several messages if need be.
    pub fn write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), VfioUserError> {
        let mut at = offset;
        for piece in data.chunks(self.transfer()) {
            let access = RegionAccess { offset: at, region, count: piece.len() as u32 };
            let (reply, _) = self.ask(Command::RegionWrite, &access.encode(piece), &[])?;
            match RegionAccess::decode(&reply) {
                Ok((said, _)) if said == access => {}
                Ok((said, _)) => return Err(self.wrong(Command::RegionWrite, format!("it wrote {said:x?}"))),
                Err(error) => return Err(self.wrong(Command::RegionWrite, error)),
            }
            at = at.wrapping_add(piece.len() as u64);
        }
        Ok(())
    }

    /// Writes of up to 8 bytes each (region, offset, data), in one message if the server takes it. All are done, or it is an error.
    pub fn write_multi(&self, writes: &[(u32, u64, &[u8])]) -> Result<(), VfioUserError> {
        if let Some((.., data)) = writes.iter().find(|(.., data)| data.len() > 8) {
            return Err(self.lacks(format!("{} bytes in one of several writes", data.len())));
        }
        if self.server.write_multiple != Some(true) {
            return writes.iter().try_for_each(|(region, offset, data)| self.write(*region, *offset, data));
        }
        for some in writes.chunks((self.transfer() / WriteMulti::ENTRY).max(1)) {
            let entries: Vec<_> = some
                .iter()
                .map(|(region, offset, data)| {
                    let mut bytes = [0; 8];
                    bytes[..data.len()].copy_from_slice(data);
                    (RegionAccess { offset: *offset, region: *region, count: data.len() as u32 }, bytes)
                })
                .collect();
            let (reply, _) = self.ask(Command::RegionWriteMulti, &WriteMulti::encode(&entries), &[])?;
            let done = Fields(&reply).u64().map_err(|error| self.wrong(Command::RegionWriteMulti, error))?;
            if done != some.len() as u64 {
                return Err(self.wrong(Command::RegionWriteMulti, format!("{done} of {} writes done", some.len())));
            }
        }
        Ok(())
    }

    /// Has vectors signal eventfds, from `start` on. Of INTx, MSI and MSI-X only one is in use at a time: libvfio-user has one table for
    /// all of them.
    pub fn set_triggers(&self, index: u32, start: u32, events: &[BorrowedFd<'_>]) -> Result<(), VfioUserError> {
        if index <= pci_irq::MSIX {
            let mut active = self.active_irq.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if let Some(other) = active.filter(|other| *other != index) {
                return Err(self.lacks(format!("interrupt {other} is in use; disable it before {index}")));
            }
            *active = Some(index);
        }
        self.set_events(IrqSet::TRIGGER, index, start, events)
    }

    /// Has the device signal eventfds when it triggers, masks or unmasks ([`IrqSet::TRIGGER`] and so on).
    pub fn set_events(
        &self,
        action: u32,
        index: u32,
        start: u32,
        events: &[BorrowedFd<'_>],
    ) -> Result<(), VfioUserError> {
        let mut start = start;
        for some in events.chunks(self.server.descriptors()) {
            let set = IrqSet { flags: IrqSet::EVENTFD | action, index, start, count: some.len() as u32 };
            self.ask(Command::SetIrqs, &set.encode(&[]), some)?;
            start += some.len() as u32;
        }
        Ok(())
    }

    /// Has vectors signal nobody. A range that does not start at 0 is turned to an eventfd that nobody reads: libvfio-user would miss
    /// vectors of it.
    pub fn clear_triggers(&self, index: u32, start: u32, count: u32) -> Result<(), VfioUserError> {
        if start == 0 {
            let set = IrqSet { flags: IrqSet::EVENTFD | IrqSet::TRIGGER, index, start, count };
            return self.ask(Command::SetIrqs, &set.encode(&[]), &[]).map(|_| ());
        }
        let nobody = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let nobody = nobody.map_err(|error| self.lacks(format!("no eventfd for its vectors: {error}")))?;
        let events = vec![nobody.as_fd(); count as usize];
        self.set_events(IrqSet::TRIGGER, index, start, &events)
    }

    /// Disables all vectors of an interrupt.
    pub fn disable_irq(&self, index: u32) -> Result<(), VfioUserError> {
        self.act_on_irq(IrqSet::TRIGGER, index, 0, 0)?;
        let mut active = self.active_irq.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if *active == Some(index) {
            *active = None;
        }
        Ok(())
    }

    /// Triggers, masks or unmasks vectors ([`IrqSet::TRIGGER`] and so on).
    pub fn act_on_irq(&self, action: u32, index: u32, start: u32, count: u32) -> Result<(), VfioUserError> {
        let set = IrqSet { flags: IrqSet::NONE | action, index, start, count };
        self.ask(Command::SetIrqs, &set.encode(&[]), &[]).map(|_| ())
    }

    /// Triggers, masks or unmasks those vectors from `start` on whose byte is not 0.
    pub fn act_on_some(&self, action: u32, index: u32, start: u32, which: &[bool]) -> Result<(), VfioUserError> {
        let set = IrqSet { flags: IrqSet::BOOL | action, index, start, count: which.len() as u32 };
        let data: Vec<u8> = which.iter().map(|on| u8::from(*on)).collect();
        self.ask(Command::SetIrqs, &set.encode(&data), &[]).map(|_| ())
    }

    /// Resets the device; it runs then. (Newer versions of libvfio-user leave its migration where it was: it is brought to
    /// `RUNNING`.)
    pub fn reset(&self) -> Result<(), VfioUserError> {
        self.ask(Command::Reset, &[], &[])?;
        match self.state() {
            Ok(State::Running) | Err(VfioUserError::Refused { .. }) => Ok(()),
            Ok(_) => self.set_state(State::Running),
            Err(error) => Err(error),
        }
    }
}
