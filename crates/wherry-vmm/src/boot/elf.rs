//! ELF images with a PVH entry.
//!
//! Segments go where their physical address says. `linux-loader` reads 64-bit ELF files only, and PVH kernels may be
//! 32-bit ones, so the file is read through `object`, which knows both.

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use object::Endianness;
use object::elf::{EM_386, EM_X86_64, FileHeader32, FileHeader64, NoteType, PT_LOAD, PT_NOTE};
use object::read::elf::{FileHeader, ProgramHeader};
use vm_memory::ByteValued;

use super::{Boot, BootError, Entry, PVH_CMDLINE_MAX, low};

/// Type of the note that holds the 32-bit physical entry (`xen/include/public/elfnote.h`).
const XEN_ELFNOTE_PHYS32_ENTRY: NoteType = NoteType(18);

/// Where the image lies and starts.
struct Loaded {
    entry: Option<u32>,
    end: u64,
}

pub(super) fn load(boot: &Boot<'_>, image: &[u8]) -> Result<Entry, BootError> {
    // The byte at 4 is the file's class.
    let loaded = match image.get(4) {
        Some(1) => load_segments::<FileHeader32<Endianness>>(boot, image),
        _ => load_segments::<FileHeader64<Endianness>>(boot, image),
    }?;
    let rip = loaded.entry.ok_or_else(|| BootError::NoPvhEntry(boot.name.clone()))?;
    boot.write_cmdline(PVH_CMDLINE_MAX)?;
    // Modules must be where a 32-bit start can reach them.
    let initrd = boot.write_initrd(loaded.end, 1 << 32)?;

    let map: Vec<_> = boot
        .map
        .iter()
        .map(|e| hvm_memmap_table_entry { addr: e.start, size: e.size, type_: e.kind as u32, reserved: 0 })
        .collect();
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        cmdline_paddr: low::CMDLINE,
        rsdp_paddr: boot.rsdp.unwrap_or(0),
        memmap_paddr: low::MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    if let Some((paddr, size)) = initrd {
        info.nr_modules = 1;
        info.modlist_paddr = low::MODULES;
        let module = hvm_modlist_entry { paddr, size, ..Default::default() };
        boot.write("the PVH module list", low::MODULES, module.as_slice())?;
    }
    for (i, entry) in map.iter().enumerate() {
        let at = low::MEMORY_MAP + (i * size_of::<hvm_memmap_table_entry>()) as u64;
        boot.write("the PVH memory map", at, entry.as_slice())?;
    }
    boot.write("the PVH start information", low::START_INFO, info.as_slice())?;
    boot.write("the descriptor table", low::GDT, super::entry::gdt(false).map(u64::to_le_bytes).as_flattened())?;
    Ok(Entry::Pvh { rip, start_info: low::START_INFO as u32 })
}

fn load_segments<H: FileHeader<Endian = Endianness>>(boot: &Boot<'_>, image: &[u8]) -> Result<Loaded, BootError> {
    let bad = |reason: String| BootError::BadElf { name: boot.name.clone(), reason };
    let damaged = |e: object::Error| bad(e.to_string());
    let header = H::parse(image).map_err(damaged)?;
    let endian = header.endian().map_err(damaged)?;
    let machine = header.e_machine(endian);
    if endian != Endianness::Little || ![EM_386, EM_X86_64].contains(&machine) {
        return Err(bad(format!("it is for another machine (ELF machine {machine})")));
    }
    let mut loaded = Loaded { entry: None, end: 0 };
    for segment in header.program_headers(endian, image).map_err(damaged)? {
        match segment.p_type(endian) {
            PT_LOAD => {
                let (start, len): (u64, u64) = (segment.p_paddr(endian).into(), segment.p_memsz(endian).into());
                if len == 0 {
                    continue;
                }
                let data = segment.data(endian, image).map_err(|()| bad("a segment reaches beyond the file".into()))?;
                if data.len() as u64 > len {
                    return Err(bad(format!("a segment at {start:#x} is larger in the file than in memory")));
                }
                let end = boot.check_kernel(start, len)?;
                boot.write("the kernel", start, data)?;
                loaded.end = loaded.end.max(end);
            }
            PT_NOTE => {
                let Some(mut notes) = segment.notes(endian, image).map_err(damaged)? else { continue };
                while let Some(note) = notes.next().map_err(damaged)? {
                    if note.name() == b"Xen" && note.n_type(endian) == XEN_ELFNOTE_PHYS32_ENTRY {
                        let desc = note.desc();
                        let Some(low) = desc.first_chunk() else {
                            return Err(bad("its PVH note has no room for an address".into()));
                        };
                        if desc[4..].iter().any(|b| *b != 0) {
                            return Err(bad("its PVH entry is not below 4 GiB".into()));
                        }
                        loaded.entry = Some(u32::from_le_bytes(*low));
                    }
                }
            }
            _ => {}
        }
    }
    if loaded.end == 0 {
        return Err(bad("it has nothing to load".into()));
    }
    Ok(loaded)
}
