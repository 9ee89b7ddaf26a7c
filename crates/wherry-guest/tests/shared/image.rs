//! The embedded kernel, as a loader sees it.

use wherry_guest::PROBE_ELF;
use wherry_guest::report::{REPORT_GPA, REPORT_SIZE};

fn u16_at(at: usize) -> u64 {
    u16::from_le_bytes(PROBE_ELF[at..][..2].try_into().unwrap()).into()
}

fn u32_at(at: usize) -> u64 {
    u32::from_le_bytes(PROBE_ELF[at..][..4].try_into().unwrap()).into()
}

fn u64_at(at: usize) -> u64 {
    u64::from_le_bytes(PROBE_ELF[at..][..8].try_into().unwrap())
}

/// (type, file offset, physical address, file size, memory size) of each program header.
fn segments() -> Vec<(u64, usize, u64, u64, u64)> {
    let (table, size, count) = (u64_at(32) as usize, u16_at(54) as usize, u16_at(56) as usize);
    (0..count)
        .map(|i| table + i * size)
        .map(|at| (u32_at(at), u64_at(at + 8) as usize, u64_at(at + 24), u64_at(at + 32), u64_at(at + 40)))
        .collect()
}

const PT_LOAD: u64 = 1;
const PT_NOTE: u64 = 4;

#[test]
fn the_image_is_a_static_x86_64_elf_without_an_interpreter() {
    assert_eq!(&PROBE_ELF[..6], b"\x7fELF\x02\x01");
    const ET_EXEC: u64 = 2;
    const EM_X86_64: u64 = 62;
    assert_eq!((u16_at(16), u16_at(18)), (ET_EXEC, EM_X86_64));
    assert!(segments().iter().all(|segment| [PT_LOAD, PT_NOTE].contains(&segment.0)), "{:x?}", segments());
}

#[test]
fn its_segments_lie_in_order_between_1_and_8_mib_and_keep_the_report_pages() {
    let loads: Vec<_> = segments().into_iter().filter(|segment| segment.0 == PT_LOAD).collect();
    let mut end = REPORT_GPA;
    for &(_, _, start, file, memory) in &loads {
        assert!(start >= end && file <= memory, "{loads:x?}");
        end = start + memory;
    }
    assert!(end <= 8 << 20, "{end:#x}");
    let (_, _, start, file, memory) = loads[0];
    assert_eq!((start, file), (REPORT_GPA, 0));
    assert!(memory >= REPORT_SIZE);
}

#[test]
fn it_has_a_pvh_entry_note_that_points_into_its_code() {
    let segments = segments();
    let &(_, offset, ..) = segments.iter().find(|segment| segment.0 == PT_NOTE).unwrap();
    assert_eq!((u32_at(offset), u32_at(offset + 4), u32_at(offset + 8)), (4, 8, 18));
    assert_eq!(&PROBE_ELF[offset + 12..offset + 16], b"Xen\0");
    let entry = u64_at(offset + 16);
    let &(_, _, start, file, _) = &segments[1];
    assert!((start..start + file).contains(&entry), "{entry:#x}");
}

#[test]
fn no_path_of_the_machine_it_was_built_on_is_in_it() {
    let root = env!("CARGO_MANIFEST_DIR").as_bytes();
    assert!(!PROBE_ELF.windows(root.len()).any(|window| window == root));
}
