//! Tests of loading, with images made here.

use std::io::Write;

use proptest::prelude::*;
use tempfile::NamedTempFile;
use vm_memory::{ByteValued, GuestMemoryBackend};
use wherry_memory::{BlockId, BlockSpec, PageSize, Ram};

use super::*;

const MIB: u64 = 1 << 20;

fn ram(size: u64) -> Ram {
    Ram::create(&[BlockSpec { id: BlockId(0), guest_base: 0, size, page_size: PageSize::Base }]).unwrap()
}

fn bytes(memory: &GuestMemory, address: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    memory.read_slice(&mut out, GuestAddress(address)).unwrap();
    out
}

fn number(memory: &GuestMemory, address: u64, len: usize) -> u64 {
    let mut out = [0; 8];
    out[..len].copy_from_slice(&bytes(memory, address, len));
    u64::from_le_bytes(out)
}

/// An ELF with one segment of code at `paddr` and, if asked for, a PVH note with this descriptor.
fn elf(class: u8, paddr: u64, memsz: u64, note: Option<&[u8]>) -> Vec<u8> {
    let wide = class == 2;
    let (header, phdr) = if wide { (64, 56) } else { (52, 32) };
    let word = |out: &mut Vec<u8>, v: u64| {
        out.extend_from_slice(&v.to_le_bytes()[..if wide { 8 } else { 4 }]);
    };
    let code = [0xf4; 16];
    let mut notes = Vec::new();
    if let Some(desc) = note {
        for v in [4, desc.len() as u32, 18] {
            notes.extend_from_slice(&u32::to_le_bytes(v));
        }
        notes.extend_from_slice(b"Xen\0");
        notes.extend_from_slice(desc);
    }
    let data = header + 2 * phdr;
    let mut out = vec![0x7f, b'E', b'L', b'F', class, 1, 1];
    out.resize(16, 0);
    out.extend_from_slice(&[2, 0, if wide { 62 } else { 3 }, 0, 1, 0, 0, 0]);
    word(&mut out, paddr);
    word(&mut out, header);
    word(&mut out, 0);
    out.extend_from_slice(&[0; 4]);
    for v in [header as u16, phdr as u16, 2, 0, 0, 0] {
        out.extend_from_slice(&v.to_le_bytes());
    }
    for (kind, offset, len, memsz) in
        [(1u32, data, code.len() as u64, memsz), (4, data + 16, notes.len() as u64, notes.len() as u64)]
    {
        out.extend_from_slice(&kind.to_le_bytes());
        if wide {
            out.extend_from_slice(&5u32.to_le_bytes());
        }
        for v in [offset, paddr, paddr, len, memsz] {
            word(&mut out, v);
        }
        if !wide {
            out.extend_from_slice(&5u32.to_le_bytes());
        }
        word(&mut out, 4);
    }
    out.extend_from_slice(&code);
    out.extend_from_slice(&notes);
    out
}

/// A bzImage as far as a loader can see.
fn bzimage(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut image = vec![0; 5 * 512];
    image[0x1f1] = 4;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    image[0x211] = 1;
    image[0x214..0x218].copy_from_slice(&(MIB as u32).to_le_bytes());
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    image[0x234] = 1;
    image[0x236] = 1;
    image[0x238..0x23c].copy_from_slice(&64u32.to_le_bytes());
    image[0x258..0x260].copy_from_slice(&(2 * MIB).to_le_bytes());
    image[0x260..0x264].copy_from_slice(&(MIB as u32).to_le_bytes());
    image.extend_from_slice(b"compressed kernel");
    change(&mut image);
    image
}

fn boot(ram: &Ram, image: &[u8], initrd: Option<&Path>, cmdline: &str) -> Result<Entry, BootError> {
    load(ram.memory(), &KernelSource::Bytes { name: "test", image }, initrd, cmdline, Some(0xe_0000))
}

fn disk(len: usize) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&vec![0x5a; len]).unwrap();
    file
}

#[test]
fn a_pvh_elf_of_either_class_starts_at_its_note_with_start_info_memory_map_and_module() {
    for (class, desc) in [(1, vec![0x10, 0, 0x20, 0]), (2, vec![0x10, 0, 0x20, 0, 0, 0, 0, 0])] {
        let ram = ram(64 * MIB);
        let (memory, initrd) = (ram.memory(), disk(5000));
        let image = elf(class, 2 * MIB, MIB, Some(&desc));
        let entry = boot(&ram, &image, Some(initrd.path()), "console=ttyS0").unwrap();
        assert_eq!(entry, Entry::Pvh { rip: 0x20_0010, start_info: 0x6000 });
        assert_eq!(bytes(memory, 2 * MIB, 17), [&[0xf4; 16][..], &[0]].concat());
        assert_eq!(number(memory, 0x6000, 4), 0x336e_c578);
        assert_eq!(number(memory, 0x6000 + 12, 4), 1, "one module");
        let cmdline = number(memory, 0x6000 + 24, 8);
        assert_eq!(bytes(memory, cmdline, 14), b"console=ttyS0\0");
        assert_eq!(number(memory, 0x6000 + 32, 8), 0xe_0000, "RSDP");
        let module = number(memory, 0x6000 + 16, 8);
        let (at, size) = (number(memory, module, 8), number(memory, module + 8, 8));
        assert_eq!((at % 4096, size), (0, 5000));
        assert!(at + size <= 64 * MIB && at >= 3 * MIB);
        assert_eq!(bytes(memory, at, 5000), [0x5a; 5000]);
        let (map, entries) = (number(memory, 0x6000 + 40, 8), number(memory, 0x6000 + 48, 4));
        assert_eq!(entries, 4);
        let last_ram = map + 2 * 24;
        assert_eq!((number(memory, last_ram, 8), number(memory, last_ram + 8, 8)), (MIB, 63 * MIB));
    }
}

#[test]
fn an_elf_without_a_pvh_note_is_refused_with_advice() {
    let error = boot(&ram(16 * MIB), &elf(2, 2 * MIB, MIB, None), None, "").unwrap_err();
    assert!(matches!(error, BootError::NoPvhEntry(_)) && error.to_string().contains("CONFIG_PVH"), "{error}");
}

#[test]
fn kernels_that_do_not_fit_are_refused_with_the_range_they_need() {
    let note = 0u32.to_le_bytes();
    for (start, len) in [(2 * MIB, 15 * MIB), (32 * MIB, 16), (0x500, 16), (MIB - 8, 16), (u64::MAX - 4, 16)] {
        match boot(&ram(16 * MIB), &elf(2, start, len, Some(&note)), None, "") {
            Err(BootError::KernelDoesNotFit { start: s, .. }) => assert_eq!(s, start),
            other => panic!("{start:#x}: {other:?}"),
        }
    }
    let large = bzimage(|i| i[0x260..0x264].copy_from_slice(&(15 * MIB as u32).to_le_bytes()));
    assert!(matches!(boot(&ram(16 * MIB), &large, None, ""), Err(BootError::KernelDoesNotFit { .. })));
}

#[test]
fn a_bzimage_starts_in_long_mode_with_its_zero_page_and_the_first_4_gib_mapped() {
    let ram = ram(64 * MIB);
    let (memory, initrd) = (ram.memory(), disk(4097));
    let entry = boot(&ram, &bzimage(|_| ()), Some(initrd.path()), "quiet").unwrap();
    assert_eq!(entry, Entry::Linux64 { rip: 2 * MIB + 0x200, zero_page: 0x7000, page_tables: 0x9000 });
    assert_eq!(bytes(memory, 2 * MIB, 17), b"compressed kernel");
    let zero = |offset: u64, len| number(memory, 0x7000 + offset, len);
    assert_eq!(zero(0x202, 4).to_le_bytes()[..4], *b"HdrS");
    assert_eq!(bytes(memory, zero(0x228, 4), 6), b"quiet\0");
    assert_eq!(zero(0x70, 8), 0xe_0000, "RSDP");
    assert_eq!(zero(0x1e8, 1), 4, "entries of the memory map");
    let (at, size) = (zero(0x218, 4), zero(0x21c, 4));
    assert_eq!((at, size), (64 * MIB - 8192, 4097));
    assert_eq!(bytes(memory, at, 4097), [0x5a; 4097]);

    let walk = |address: u64| {
        let pdpt = number(memory, 0x9000, 8) & !0xfff;
        let directory = number(memory, pdpt + (address >> 30) * 8, 8) & !0xfff;
        number(memory, directory + (address >> 21 & 511) * 8, 8)
    };
    for address in [0, 2 * MIB, 3 << 30, 0xffe0_0000] {
        assert_eq!(walk(address), address | 0x83);
    }
}

#[test]
fn bzimages_that_cannot_be_booted_say_why() {
    type Damage = fn(&mut Vec<u8>);
    let cases: [(&str, Damage); 5] = [
        ("protocol 2.11", |i| i[0x206] = 0x0b),
        ("zImage", |i| i[0x211] = 0),
        ("32-bit", |i| i[0x236] = 0),
        ("cut off", |i| i.truncate(5 * 512)),
        ("header is cut off", |i| i.truncate(0x240)),
    ];
    for (what, change) in cases {
        match boot(&ram(16 * MIB), &bzimage(change), None, "") {
            Err(BootError::BadBzImage { reason, .. }) => assert!(reason.contains(what), "{reason}"),
            other => panic!("{what}: {other:?}"),
        }
    }
}

#[test]
fn a_command_line_too_long_for_the_kernel_is_refused() {
    let ram = ram(16 * MIB);
    boot(&ram, &bzimage(|_| ()), None, &"x".repeat(64)).unwrap();
    let error = boot(&ram, &bzimage(|_| ()), None, &"x".repeat(65)).unwrap_err();
    assert!(matches!(error, BootError::CmdlineTooLong { len: 65, max: 64 }), "{error}");
    let image = elf(2, 2 * MIB, MIB, Some(&[0; 4]));
    boot(&ram, &image, None, &"x".repeat(2047)).unwrap();
    assert!(matches!(boot(&ram, &image, None, &"x".repeat(2048)), Err(BootError::CmdlineTooLong { .. })));
    assert!(matches!(boot(&ram, &image, None, "a\0b"), Err(BootError::CmdlineNul(1))));
}

#[test]
fn an_initial_ram_disk_that_does_not_fit_is_refused() {
    let ram = ram(8 * MIB);
    let (fits, large) = (disk(5 * MIB as usize), disk(5 * MIB as usize + 1));
    boot(&ram, &bzimage(|_| ()), Some(fits.path()), "").unwrap();
    let error = boot(&ram, &bzimage(|_| ()), Some(large.path()), "").unwrap_err();
    assert!(matches!(error, BootError::InitrdDoesNotFit { from: 0x30_0000, limit: 0x80_0000, .. }), "{error}");
    // The kernel's own limit counts too.
    let limited = bzimage(|i| i[0x22c..0x230].copy_from_slice(&(4 * MIB as u32 - 1).to_le_bytes()));
    let error = boot(&ram, &limited, Some(fits.path()), "").unwrap_err();
    assert!(matches!(error, BootError::InitrdDoesNotFit { limit: 0x40_0000, .. }), "{error}");
}

#[test]
fn missing_empty_and_foreign_files_are_refused_by_name() {
    let ram = ram(16 * MIB);
    let missing = KernelSource::Path(Path::new("/nonexistent/kernel"));
    let error = load(ram.memory(), &missing, None, "", None).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/kernel") && error.contains("the kernel"), "{error}");
    let missing = Path::new("/nonexistent/initrd");
    let error = boot(&ram, &bzimage(|_| ()), Some(missing), "").unwrap_err().to_string();
    assert!(error.contains("/nonexistent/initrd"), "{error}");
    let empty = disk(0);
    assert!(boot(&ram, &bzimage(|_| ()), Some(empty.path()), "").unwrap_err().to_string().contains("empty"));
    for (image, hint) in [(&b""[..], "empty"), (&[0x1f, 0x8b, 8], "gzip"), (b"#!/bin/sh", "bzImage")] {
        let error = boot(&ram, image, None, "").unwrap_err();
        assert!(matches!(error, BootError::NotAKernel { .. }) && error.to_string().contains(hint), "{error}");
    }
}

#[test]
fn pvh_starts_with_paging_off_and_linux_with_paging_on() {
    let (regs, sregs) = entry_state(&Entry::Pvh { rip: 0x1234, start_info: 0x6000 });
    let mut out = kvm_bindings::kvm_sregs::default();
    sregs.apply(&mut out);
    assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x1234, 0x6000, 2));
    assert_eq!((out.cr0 & 1, out.cr0 >> 31, out.cr4, out.efer), (1, 0, 0, 0));
    assert_eq!((out.cs.db, out.cs.l, out.cs.limit, out.ss.base), (1, 0, 0xffff_ffff, 0));

    let (regs, sregs) = entry_state(&Entry::Linux64 { rip: 0x100_0200, zero_page: 0x7000, page_tables: 0x9000 });
    sregs.apply(&mut out);
    assert_eq!((regs.rip, regs.rsi), (0x100_0200, 0x7000));
    assert_eq!((out.cr0 >> 31, out.cr3, out.cr4, out.efer), (1, 0x9000, 0x20, 0x500));
    assert_eq!((out.cs.selector, out.cs.l, out.ds.selector), (0x10, 1, 0x18));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn damaged_images_never_write_outside_ram_or_panic(
        seed in 0u8..3,
        damage in proptest::collection::vec((0usize..0x300, any::<u8>()), 1..12),
        cut in 0usize..3000,
    ) {
        let mut image = match seed {
            0 => bzimage(|_| ()),
            class => elf(class, 2 * MIB, MIB, Some(&[0; 4])),
        };
        for (at, value) in damage {
            if let Some(byte) = image.get_mut(at) {
                *byte = value;
            }
        }
        image.truncate(image.len().max(cut) - cut.min(image.len()) / 8);
        let _ = boot(&ram(4 * MIB), &image, None, "x");
    }
}

#[test]
fn the_zero_page_structure_has_the_size_of_a_page() {
    assert_eq!(linux_loader::loader::bootparam::boot_params::default().as_slice().len(), 4096);
    assert_eq!(ram(MIB).memory().num_regions(), 1);
}
