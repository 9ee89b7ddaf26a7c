//! Linux bzImages by the 64-bit boot protocol.

use std::io::Cursor;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, GuestAddress};

use super::{Boot, BootError, Entry, low};

/// Oldest protocol we boot, 2.12 (Linux 3.8): the first that says whether there is a 64-bit entry.
const MIN_VERSION: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry lies here, from where the kernel was loaded.
const ENTRY_64: u64 = 0x200;
/// "Undefined" boot loader.
const LOADER_UNKNOWN: u8 = 0xff;
/// `vga=normal`.
const VIDEO_NORMAL: u16 = 0xffff;
/// What the page tables map, and so where a kernel can be.
const MAPPED: u64 = 4 << 30;

/// Offsets of header fields in the file, from boot.rst.
mod field {
    pub const SETUP_SECTS: usize = 0x1f1;
    pub const VERSION: usize = 0x206;
    pub const LOADFLAGS: usize = 0x211;
    pub const CODE32_START: usize = 0x214;
    pub const RELOCATABLE: usize = 0x234;
    pub const XLOADFLAGS: usize = 0x236;
    pub const PREF_ADDRESS: usize = 0x258;
    pub const INIT_SIZE: usize = 0x260;
}

fn take<const N: usize>(image: &[u8], at: usize) -> Option<[u8; N]> {
    image.get(at..)?.first_chunk().copied()
}

/// Where to load, and how much RAM the kernel uses from there until it has found its own memory.
fn plan(image: &[u8]) -> Result<(u64, u64), String> {
    let header = || {
        Some((
            take(image, field::SETUP_SECTS).map(u8::from_le_bytes)?,
            take(image, field::VERSION).map(u16::from_le_bytes)?,
            take(image, field::LOADFLAGS).map(u8::from_le_bytes)?,
            take(image, field::XLOADFLAGS).map(u16::from_le_bytes)?,
            take(image, field::INIT_SIZE).map(u32::from_le_bytes)?,
        ))
    };
    let (sectors, version, loadflags, xloadflags, init_size) = header().ok_or("its header is cut off")?;
    if version < MIN_VERSION {
        let [minor, major] = version.to_le_bytes();
        return Err(format!("it has boot protocol {major}.{minor:02}; 2.12 (Linux 3.8) or newer is needed"));
    }
    if loadflags & LOADED_HIGH == 0 {
        return Err("it is a zImage, which loads below 1 MiB".into());
    }
    if xloadflags & XLF_KERNEL_64 == 0 {
        return Err("it has no 64-bit entry, so it is a 32-bit kernel".into());
    }
    let setup = (usize::from(if sectors == 0 { 4 } else { sectors }) + 1) * 512;
    let code = image.len().checked_sub(setup).filter(|size| *size > 0).ok_or("it is cut off")?;
    let relocatable = take(image, field::RELOCATABLE).map(u8::from_le_bytes).unwrap_or(0) != 0;
    let load = if relocatable {
        take(image, field::PREF_ADDRESS).map(u64::from_le_bytes)
    } else {
        take(image, field::CODE32_START).map(|a| u32::from_le_bytes(a).into())
    };
    Ok((load.ok_or("its header is cut off")?, u64::from(init_size).max(code as u64)))
}

pub(super) fn load(boot: &Boot<'_>, image: &[u8]) -> Result<Entry, BootError> {
    let bad = |reason: String| BootError::BadBzImage { name: boot.name.clone(), reason };
    let (address, needs) = plan(image).map_err(bad)?;
    let end = boot.check_kernel(address, needs)?;
    if end > MAPPED {
        return Err(bad(format!("it wants to be loaded at {address:#x}, above 4 GiB")));
    }
    let loaded = BzImage::load(boot.memory, Some(GuestAddress(address)), &mut Cursor::new(image), None)
        .map_err(|e| bad(e.to_string()))?;
    let mut params = boot_params { hdr: loaded.setup_header.unwrap_or_default(), ..Default::default() };
    let header = &mut params.hdr;
    boot.write_cmdline(header.cmdline_size as usize)?;
    header.cmd_line_ptr = low::CMDLINE as u32;
    header.type_of_loader = LOADER_UNKNOWN;
    header.vid_mode = VIDEO_NORMAL;
    if let Some((address, size)) = boot.write_initrd(end, u64::from(header.initrd_addr_max) + 1)? {
        // Both fit: the disk lies below initrd_addr_max.
        header.ramdisk_image = address as u32;
        header.ramdisk_size = size as u32;
    }
    params.acpi_rsdp_addr = boot.rsdp.unwrap_or(0);
    // The map of a machine has a handful of entries, the table room for 128.
    params.e820_entries = boot.map.len() as u8;
    for (slot, entry) in params.e820_table.iter_mut().zip(&boot.map) {
        *slot = boot_e820_entry { addr: entry.start, size: entry.size, r#type: entry.kind as u32 };
    }
    boot.write("the zero page", low::ZERO_PAGE, params.as_slice())?;
    boot.write("the descriptor table", low::GDT, super::entry::gdt(true).map(u64::to_le_bytes).as_flattened())?;
    write_page_tables(boot)?;
    Ok(Entry::Linux64 { rip: address + ENTRY_64, zero_page: low::ZERO_PAGE, page_tables: low::PAGE_TABLES })
}

/// Maps the first 4 GiB one to one with 2 MiB pages.
fn write_page_tables(boot: &Boot<'_>) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let (pml4, pdpt, directories) = (low::PAGE_TABLES, low::PAGE_TABLES + 0x1000, low::PAGE_TABLES + 0x2000);
    let table = |at: u64, entries: &[u64]| {
        let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_le_bytes()).collect();
        boot.write("the page tables", at, &bytes)
    };
    table(pml4, &[pdpt | PRESENT_WRITABLE])?;
    table(pdpt, &[0, 1, 2, 3].map(|i| (directories + i * 0x1000) | PRESENT_WRITABLE))?;
    let pages: Vec<u64> = (0..MAPPED >> 21).map(|i| i << 21 | LARGE | PRESENT_WRITABLE).collect();
    table(directories, &pages)
}
