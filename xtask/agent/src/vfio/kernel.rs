//! VFIO asked directly, without Wherry: so a lab whose devices cannot be passed through is told apart from a Wherry that cannot.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vfio_bindings::bindings::vfio as sys;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref, ioctl_with_val};
use wherry_guest::edu::REGISTERS_BYTES;

use super::edu::{Mapped, PAGE, round_trip};
use super::pci::Function;

/// For an interrupt; the device's DMA takes 100 ms.
const LIMIT: Duration = Duration::from_secs(30);
/// Where the memory for DMA is, as the device sees it.
const IOVA: u64 = 0x10_0000;

/// A request of VFIO, by its number in linux/vfio.h.
fn request(number: u32) -> u64 {
    u64::from(u32::from(sys::VFIO_TYPE) << 8 | (sys::VFIO_BASE + number))
}

fn done(result: i32, what: &str) -> Result<i32> {
    ensure!(result >= 0, "{what}: {}", std::io::Error::last_os_error());
    Ok(result)
}

fn open(path: &str) -> Result<File> {
    File::options().read(true).write(true).open(path).with_context(|| format!("cannot open {path}"))
}

/// A function that was taken by its group; it is given back when this goes.
#[derive(Debug)]
pub struct Taken {
    device: File,
    // Both stay open as long as the device.
    _group: File,
    container: File,
    regions: Vec<sys::vfio_region_info>,
    /// Vectors of each kind of interrupt.
    pub vectors: Vec<u32>,
    /// It can be reset.
    pub resets: bool,
}

#[expect(unsafe_code, reason = "ioctls of VFIO")]
impl Taken {
    /// Takes a function that is bound to vfio-pci.
    pub fn new(function: &Function) -> Result<Self> {
        let group_number = function.group()?;
        let container = open("/dev/vfio/vfio")?;
        let group = open(&format!("/dev/vfio/{group_number}"))?;
        let mut status = sys::vfio_group_status { argsz: size_of::<sys::vfio_group_status>() as u32, flags: 0 };
        // SAFETY: the structures of all requests here are those of linux/vfio.h, and say their size.
        let result = unsafe { ioctl_with_mut_ref(&group, request(3), &mut status) };
        done(result, "VFIO_GROUP_GET_STATUS")?;
        ensure!(status.flags & sys::VFIO_GROUP_FLAGS_VIABLE != 0, "group {group_number} is not viable");
        let number = container.as_raw_fd();
        // SAFETY: as above.
        done(unsafe { ioctl_with_ref(&group, request(4), &number) }, "VFIO_GROUP_SET_CONTAINER")?;
        // SAFETY: it takes a number.
        let result = unsafe { ioctl_with_val(&container, request(2), sys::VFIO_TYPE1v2_IOMMU.into()) };
        done(result, "VFIO_SET_IOMMU: type1v2")?;
        let name = std::ffi::CString::new(function.to_string())?;
        // SAFETY: it takes a string.
        let result = unsafe { ioctl_with_ptr(&group, request(6), name.as_ptr().cast_mut()) };
        let device = done(result, "VFIO_GROUP_GET_DEVICE_FD")?;
        // SAFETY: the kernel has just given it to us.
        let device = unsafe { File::from_raw_fd(device) };
        let mut info = sys::vfio_device_info { argsz: size_of::<sys::vfio_device_info>() as u32, ..Default::default() };
        // SAFETY: as above.
        done(unsafe { ioctl_with_mut_ref(&device, request(7), &mut info) }, "VFIO_DEVICE_GET_INFO")?;
        let region = |index| {
            let argsz = size_of::<sys::vfio_region_info>() as u32;
            let mut region = sys::vfio_region_info { argsz, index, ..Default::default() };
            // SAFETY: as above. What does not exist (the region of VGA) is refused, and has no bytes.
            unsafe { ioctl_with_mut_ref(&device, request(8), &mut region) };
            region
        };
        let vectors = |index| {
            let argsz = size_of::<sys::vfio_irq_info>() as u32;
            let mut irq = sys::vfio_irq_info { argsz, index, ..Default::default() };
            // SAFETY: as above.
            unsafe { ioctl_with_mut_ref(&device, request(9), &mut irq) };
            irq.count
        };
        let regions = (0..info.num_regions).map(region).collect();
        let vectors = (0..info.num_irqs).map(vectors).collect();
        let resets = info.flags & sys::VFIO_DEVICE_FLAGS_RESET != 0;
        Ok(Self { device, _group: group, container, regions, vectors, resets })
    }

    /// Bytes of its regions: BARs 0 to 5, ROM, configuration space, VGA.
    pub fn sizes(&self) -> Vec<u64> {
        self.regions.iter().map(|region| region.size).collect()
    }

    /// Has vector 0 of a kind of interrupts write to an eventfd, or none of them to anything.
    fn listen(&self, kind: u32, event: Option<&OwnedFd>) -> Result<()> {
        let (data, count) =
            if event.is_some() { (sys::VFIO_IRQ_SET_DATA_EVENTFD, 1) } else { (sys::VFIO_IRQ_SET_DATA_NONE, 0) };
        let file = event.map_or(0, |event| event.as_raw_fd() as u32);
        let set: [u32; 6] = [20 + 4 * count, data | sys::VFIO_IRQ_SET_ACTION_TRIGGER, kind, 0, count, file];
        // SAFETY: `struct vfio_irq_set` with one descriptor behind it, or none.
        done(unsafe { ioctl_with_ref(&self.device, request(10), &set) }, "VFIO_DEVICE_SET_IRQS")?;
        Ok(())
    }

    /// Lets the pin interrupt again: one that has is masked until then.
    fn unmask_pin(&self) -> Result<()> {
        let flags = sys::VFIO_IRQ_SET_DATA_NONE | sys::VFIO_IRQ_SET_ACTION_UNMASK;
        let set: [u32; 5] = [20, flags, sys::VFIO_PCI_INTX_IRQ_INDEX, 0, 1];
        // SAFETY: `struct vfio_irq_set`.
        done(unsafe { ioctl_with_ref(&self.device, request(10), &set) }, "VFIO_DEVICE_SET_IRQS: unmask the pin")?;
        Ok(())
    }

    /// With the educational device: sends a page there and back by DMA, each way with an interrupt of this kind.
    pub fn round_trip(&self, kind: u32) -> Result<()> {
        let config = &self.regions[sys::VFIO_PCI_CONFIG_REGION_INDEX as usize];
        let command = [0x06, 0x00];
        rustix::io::pwrite(&self.device, &command, config.offset + 4).context("enabling memory and bus master")?;
        let event = eventfd(0, EventfdFlags::CLOEXEC)?;
        self.listen(kind, Some(&event))?;
        let bar = self.regions[0];
        ensure!(bar.size == REGISTERS_BYTES, "BAR 0 has {} bytes", bar.size);
        let registers = Mapped::of(&self.device, bar.offset, PAGE).context("mapping BAR 0")?;
        let memory = Mapped::new(2 * PAGE)?;
        let map = sys::vfio_iommu_type1_dma_map {
            argsz: size_of::<sys::vfio_iommu_type1_dma_map>() as u32,
            flags: sys::VFIO_DMA_MAP_FLAG_READ | sys::VFIO_DMA_MAP_FLAG_WRITE,
            vaddr: memory.address(),
            iova: IOVA,
            size: 2 * PAGE as u64,
        };
        // SAFETY: as above, of memory that stays until it is unmapped below, or the container is closed, which is when this fails.
        done(unsafe { ioctl_with_ref(&self.container, request(13), &map) }, "VFIO_IOMMU_MAP_DMA")?;
        let wait = || {
            let limit = Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
            let came = poll(&mut [PollFd::new(&event.as_fd(), PollFlags::IN)], Some(&limit))?;
            ensure!(came == 1, "waited {LIMIT:?} for an interrupt of kind {kind}");
            rustix::io::read(&event, &mut [0; 8])?;
            Ok(())
        };
        let again = || if kind == sys::VFIO_PCI_INTX_IRQ_INDEX { self.unmask_pin() } else { Ok(()) };
        round_trip(&registers, &memory, [IOVA, IOVA + PAGE as u64], kind.into(), wait, again)?;
        let unmap = sys::vfio_iommu_type1_dma_unmap {
            argsz: size_of::<sys::vfio_iommu_type1_dma_unmap>() as u32,
            iova: IOVA,
            size: 2 * PAGE as u64,
            ..Default::default()
        };
        // SAFETY: as above.
        done(unsafe { ioctl_with_ref(&self.container, request(14), &unmap) }, "VFIO_IOMMU_UNMAP_DMA")?;
        // The next kind can be used only when this one is not.
        self.listen(kind, None)
    }
}

/// VFIO is of the version that is known here.
pub fn version() -> Result<()> {
    let container = open("/dev/vfio/vfio")?;
    #[expect(unsafe_code, reason = "an ioctl")]
    // SAFETY: it has no argument.
    let version = unsafe { ioctl(&container, request(0)) };
    ensure!(version == 0, "VFIO has version {version}");
    Ok(())
}
