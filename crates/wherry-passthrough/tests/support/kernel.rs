//! A kernel that is played: VFIO by containers and by iommufd, with one kind of function, which fails when it is told to.
#![expect(unsafe_code, reason = "it is asked by ioctls")]

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use libc::c_void;
use wherry_passthrough::vfio::{Kernel, Places, VfioHost};

const VFIO: u32 = 0x3b00 + 100;
const IOMMUFD: u32 = 0x3b00 + 0x80;

/// What is mapped: bytes, and where the process has it that owns it, if it is mapped by address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    pub size: u64,
    pub place: Option<u64>,
}

#[derive(Default)]
pub struct Played {
    /// Requests, in order.
    pub asked: Vec<String>,
    /// Memory that functions reach.
    pub maps: BTreeMap<u64, Mapped>,
    /// The request that fails, counted from 0, and with what.
    pub fails: Option<(usize, i32)>,
    /// The errno of a request by its name.
    pub refuses: BTreeMap<&'static str, i32>,
    /// The group is not viable.
    pub torn: bool,
    pub without_file_maps: bool,
    pub tracks: bool,
    /// Its driver has no features.
    pub plain: bool,
    /// It cannot be reset by itself, and these are on its bus: device and function of each.
    pub on_bus: Option<Vec<u8>>,
    /// The state of the function's migration, and what it was given.
    pub state: u32,
    pub loaded: Option<std::fs::File>,
    pub log: Vec<u64>,
    /// Functions that were opened, to look at their registers.
    pub opened: Vec<std::fs::File>,
}

/// The kernel, and the folders in which it shows its devices.
pub struct FakeKernel {
    pub played: Mutex<Played>,
    pub root: tempfile::TempDir,
}

/// The words of a structure.
///
/// # Safety
///
/// It has so many.
unsafe fn words<'a>(argument: *mut c_void, count: usize) -> &'a mut [u32] {
    // SAFETY: the caller's.
    unsafe { std::slice::from_raw_parts_mut(argument.cast(), count) }
}

/// A long number in a structure.
///
/// # Safety
///
/// The structure goes that far.
unsafe fn long(argument: *mut c_void, at: usize) -> u64 {
    // SAFETY: the caller's.
    unsafe { argument.cast::<u8>().add(at).cast::<u64>().read_unaligned() }
}

fn failure(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// MSI with one vector, a pin, a memory BAR.
fn config() -> [u8; 256] {
    let mut bytes = [0; 256];
    bytes[0..4].copy_from_slice(&[0x34, 0x12, 0xe8, 0x11]);
    (bytes[6], bytes[0x34], bytes[0x3d]) = (0x10, 0x40, 1);
    bytes[0x40..0x44].copy_from_slice(&[5, 0, 0x80, 0]);
    bytes
}

impl FakeKernel {
    pub fn new() -> Arc<Self> {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("dev/vfio")).unwrap();
        std::fs::write(root.path().join("dev/vfio/vfio"), "").unwrap();
        let this = Self { played: Mutex::default(), root };
        this.played.lock().unwrap().state = 2;
        Arc::new(this)
    }

    pub fn lock(&self) -> MutexGuard<'_, Played> {
        self.played.lock().unwrap()
    }

    pub fn take_asked(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().asked)
    }

    fn sys(&self, address: &str) -> PathBuf {
        self.root.path().join("sys/bus/pci/devices").join(address)
    }

    /// A function of this host, with a driver, in a group.
    pub fn add(&self, address: &str, driver: Option<&str>, group: Option<u32>) {
        let (function, root) = (self.sys(address), self.root.path());
        std::fs::create_dir_all(&function).unwrap();
        if let Some(driver) = driver {
            symlink(Path::new("../../../drivers").join(driver), function.join("driver")).unwrap();
        }
        if let Some(group) = group {
            let members = root.join("sys/kernel/iommu_groups").join(group.to_string()).join("devices");
            std::fs::create_dir_all(&members).unwrap();
            symlink(&function, members.join(address)).unwrap();
            symlink(members.parent().unwrap(), function.join("iommu_group")).unwrap();
            std::fs::write(root.join("dev/vfio").join(group.to_string()), "").unwrap();
        }
    }

    /// The host has iommufd, and a device node for that function.
    pub fn add_node(&self, address: &str, name: &str) {
        std::fs::create_dir_all(self.sys(address).join("vfio-dev").join(name)).unwrap();
        std::fs::create_dir_all(self.root.path().join("dev/vfio/devices")).unwrap();
        let node = self.root.path().join("dev/vfio/devices").join(name);
        std::fs::write(&node, "").unwrap();
        self.fill(&std::fs::File::options().read(true).write(true).open(node).unwrap());
        std::fs::write(self.root.path().join("dev/iommu"), "").unwrap();
    }

    /// What a machine in this process uses it by.
    pub fn host(self: &Arc<Self>, registry: Arc<wherry_handover::Registry>) -> VfioHost {
        let places = Places { sys: self.root.path().join("sys"), dev: self.root.path().join("dev") };
        VfioHost::with(self.clone(), places, registry)
    }

    fn fill(&self, file: &std::fs::File) {
        use std::os::unix::fs::FileExt;
        file.set_len(0x3000).unwrap();
        file.write_at(&config(), 0x2000).unwrap();
        self.lock().opened.push(file.try_clone().unwrap());
    }

    /// # Safety
    ///
    /// That of [`Kernel::ioctl`].
    unsafe fn answer(&self, file: BorrowedFd<'_>, request: u32, argument: *mut c_void) -> io::Result<i32> {
        let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        let last = path.file_name().unwrap().to_string_lossy().into_owned();
        let device = last.starts_with("memfd:device") || path.parent().is_some_and(|dir| dir.ends_with("devices"));
        // SAFETY: requests have these structures.
        unsafe {
            match (request.wrapping_sub(VFIO), device) {
                _ if last == "iommu" => self.iommufd(request, argument),
                (0, _) => self.note("version", 0),
                (1, _) => self.note("", 1),
                (2, _) => self.note("set IOMMU", 0),
                (3, _) => {
                    words(argument, 2)[1] = u32::from(!self.lock().torn);
                    self.note("status", 0)
                }
                (4, _) => self.note("set container", 0),
                (6, _) => {
                    let name = CStr::from_ptr(argument.cast()).to_str().unwrap().to_owned();
                    self.note(&format!("open {name}"), 0)?;
                    let memfd = rustix::fs::memfd_create("device", rustix::fs::MemfdFlags::CLOEXEC)?;
                    let memfd = std::fs::File::from(memfd);
                    self.fill(&memfd);
                    Ok(memfd.into_raw_fd())
                }
                (7, true) => {
                    let flags = 2 | u32::from(self.lock().on_bus.is_none());
                    words(argument, 4)[1..].copy_from_slice(&[flags, 9, 5]);
                    self.note("", 0)
                }
                (8, true) => {
                    let (size, flags, offset) = match words(argument, 3)[2] {
                        0 => (0x1000, 7, 0x1000),
                        7 => (0x100, 3, 0x2000),
                        _ => (0, 0, 0),
                    };
                    (words(argument, 8)[0], words(argument, 8)[1]) = (32, flags);
                    words(argument, 8)[3..].copy_from_slice(&[0, size, 0, offset, 0]);
                    self.note("", 0)
                }
                (9, true) => {
                    let words = words(argument, 4);
                    words[3] = u32::from(words[2] != 2);
                    self.note("", 0)
                }
                (10, true) => {
                    let set = words(argument, 5);
                    let fds = if set[1] & 4 != 0 { set[4] } else { 0 };
                    self.note(&format!("irqs {} {:#x} {}+{} by {fds}", set[2], set[1], set[3], set[4]), 0)
                }
                (11, true) => self.note("reset", 0),
                (12, true) => {
                    // Group, and segment, bus, device and function in the bytes of a word.
                    let on_bus = self.lock().on_bus.clone().ok_or_else(|| failure(libc::ENODEV))?;
                    words(argument, 3)[2] = on_bus.len() as u32;
                    let devices = &mut words(argument, 3 + 2 * on_bus.len())[3..];
                    for (device, devfn) in devices.chunks_exact_mut(2).zip(&on_bus) {
                        device.copy_from_slice(&[7, u32::from(*devfn) << 24]);
                    }
                    self.note("", 0)
                }
                (13, true) => self.note(&format!("reset the bus, with {} groups", words(argument, 3)[2]), 0),
                (13, false) => self.map(words(argument, 2)[1], argument),
                (14, false) => self.unmap(words(argument, 2)[1], argument),
                (17, true) => self.feature(argument),
                (18, true) => {
                    words(argument, 4)[3] = 40;
                    self.note("bind", 0)
                }
                (19, true) => self.note(&format!("attach {}", words(argument, 3)[2]), 0),
                other => panic!("request {other:?} of {}", path.display()),
            }
        }
    }

    fn note(&self, what: &str, answer: i32) -> io::Result<i32> {
        let mut played = self.lock();
        if !what.is_empty() {
            played.asked.push(what.into());
        }
        if let Some(number) = played.refuses.get(what) {
            return Err(failure(*number));
        }
        Ok(answer)
    }

    /// `vfio_iommu_type1_dma_map`: size, flags, place, address, bytes.
    ///
    /// # Safety
    ///
    /// That of [`Kernel::ioctl`].
    unsafe fn map(&self, flags: u32, argument: *mut c_void) -> io::Result<i32> {
        // SAFETY: the request has this structure.
        let (place, address, size) = unsafe { (long(argument, 8), long(argument, 16), long(argument, 24)) };
        self.note(if flags == 4 { "place" } else { "map" }, 0)?;
        let mut played = self.lock();
        match (flags, played.maps.get_mut(&address)) {
            (3, None) => drop(played.maps.insert(address, Mapped { size, place: Some(place) })),
            (3, Some(_)) => return Err(failure(libc::EEXIST)),
            (4, Some(mapped)) if mapped.size == size && mapped.place.is_none() => mapped.place = Some(place),
            (4, Some(_)) => return Err(failure(libc::EINVAL)),
            (4, None) => return Err(failure(libc::ENOENT)),
            other => panic!("{other:?}"),
        }
        Ok(0)
    }

    /// # Safety
    ///
    /// That of [`Kernel::ioctl`].
    unsafe fn unmap(&self, flags: u32, argument: *mut c_void) -> io::Result<i32> {
        // SAFETY: the request has this structure.
        let (address, size) = unsafe { (long(argument, 8), long(argument, 16)) };
        self.note(if flags == 4 { "leave" } else { "unmap" }, 0)?;
        let mut played = self.lock();
        let mapped = played.maps.get_mut(&address).filter(|mapped| mapped.size == size);
        let mapped = mapped.ok_or_else(|| failure(libc::EINVAL))?;
        match flags {
            0 => drop(played.maps.remove(&address)),
            4 => drop(mapped.place.take().ok_or_else(|| failure(libc::EINVAL))?),
            other => panic!("{other}"),
        }
        Ok(0)
    }

    /// # Safety
    ///
    /// That of [`Kernel::ioctl`].
    unsafe fn iommufd(&self, request: u32, argument: *mut c_void) -> io::Result<i32> {
        // SAFETY: requests have these structures.
        unsafe {
            match request - IOMMUFD {
                1 => {
                    words(argument, 3)[2] = 5;
                    self.note("space", 0)
                }
                // By address: size, flags, space, reserved, place, bytes, address.
                5 => {
                    let (place, size, address) = (long(argument, 16), long(argument, 24), long(argument, 32));
                    self.note("map by address", 0)?;
                    self.lock().maps.insert(address, Mapped { size, place: Some(place) });
                    Ok(0)
                }
                6 => {
                    let address = long(argument, 8);
                    self.note("unmap", 0)?;
                    self.lock().maps.remove(&address).map(|_| 0).ok_or_else(|| failure(libc::ENOENT))
                }
                10 => {
                    let words = words(argument, 10);
                    words[8] = u32::from(self.lock().tracks);
                    words[9] = 0;
                    self.note("", 0)
                }
                9 => {
                    words(argument, 5)[4] = 6;
                    self.note("table", 0)
                }
                11 => self.note(&format!("track {}", words(argument, 2)[1]), 0),
                12 => {
                    let bitmap = long(argument, 40) as *mut u64;
                    self.note("written", 0)?;
                    let log = std::mem::take(&mut self.lock().log);
                    log.iter().enumerate().for_each(|(n, word)| bitmap.add(n).write(*word));
                    Ok(0)
                }
                // By file: size, flags, space, file, start, bytes, address.
                15 if self.lock().without_file_maps => Err(failure(libc::ENOTTY)),
                15 => {
                    let (size, address) = (long(argument, 24), long(argument, 32));
                    self.note("map by file", 0)?;
                    self.lock().maps.insert(address, Mapped { size, place: None });
                    Ok(0)
                }
                18 => self.note("change process", 0),
                other => panic!("request {other} of iommufd"),
            }
        }
    }

    /// `vfio_device_feature`: size, flags and number, data.
    ///
    /// # Safety
    ///
    /// That of [`Kernel::ioctl`].
    unsafe fn feature(&self, argument: *mut c_void) -> io::Result<i32> {
        // SAFETY: features have these structures.
        unsafe {
            let flags = words(argument, 2)[1];
            let data = argument.cast::<u8>().add(8).cast::<c_void>();
            match (flags & 0xffff, flags >> 16) {
                _ if self.lock().plain => Err(failure(libc::ENOTTY)),
                (_, probe) if probe & 4 != 0 => self.note("", 0),
                (1, 1) => {
                    words(data, 2).copy_from_slice(&[5, 0]);
                    self.note("", 0)
                }
                (2, 1) => {
                    words(data, 2)[0] = self.lock().state;
                    self.note("", 0)
                }
                (2, 2) => {
                    let state = words(data, 1)[0];
                    self.note(&format!("state {state}"), 0)?;
                    self.lock().state = state;
                    let file = std::fs::File::from(rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC)?);
                    words(data, 2)[1] = match state {
                        3 => {
                            rustix::io::pwrite(&file, b"its state", 0)?;
                            file.into_raw_fd() as u32
                        }
                        4 => {
                            self.lock().loaded = Some(file.try_clone()?);
                            file.into_raw_fd() as u32
                        }
                        _ => u32::MAX,
                    };
                    Ok(0)
                }
                (6, 2) => {
                    let (page, count, table) = (long(data, 0), long(data, 8), long(data, 16) as *const u64);
                    let first = (table.read(), table.add(1).read());
                    self.note(&format!("log {page} {count} {first:x?}"), 0)
                }
                (7, 2) => self.note("log no longer", 0),
                (8, 1) => {
                    let bitmap = long(data, 24) as *mut u64;
                    let log = std::mem::take(&mut self.lock().log);
                    log.iter().enumerate().for_each(|(n, word)| bitmap.add(n).write(*word));
                    self.note("logged", 0)
                }
                (9, 1) => {
                    words(data, 2).copy_from_slice(&[9, 0]);
                    self.note("", 0)
                }
                other => panic!("feature {other:?}"),
            }
        }
    }
}

impl Kernel for FakeKernel {
    unsafe fn ioctl(&self, file: BorrowedFd<'_>, request: u32, argument: *mut c_void) -> io::Result<i32> {
        let mut played = self.lock();
        match played.fails {
            Some((0, number)) => {
                played.fails = None;
                return Err(failure(number));
            }
            Some((left, number)) => played.fails = Some((left - 1, number)),
            None => {}
        }
        drop(played);
        // SAFETY: the caller's.
        unsafe { self.answer(file, request, argument) }
    }
}
