use super::*;

fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
    let indexed = matches!(function, 4 | 7 | 0xb | 0xd);
    CpuidEntry { function, index, indexed, eax, ebx, ecx, edx }
}

/// A made-up CPU that has every feature.
fn everything() -> Vec<CpuidEntry> {
    let vendor = [0x16, 0x756e_6547, 0x6c65_746e, 0x4965_6e69];
    let mut table = vec![leaf(0, 0, vendor), leaf(0x8000_0000, 0, [0x8000_0021, 0, 0, 0])];
    for word in WORDS {
        if find(&table, word.function, word.index).is_none() {
            table.push(leaf(word.function, word.index, [0; 4]));
        }
        let entry = table.iter_mut().find(|e| e.function == word.function && e.index == word.index).unwrap();
        *entry.register(word.register) |= word.features;
    }
    for entry in &mut table {
        match (entry.function, entry.index) {
            (0xd, 0) => (entry.eax, entry.ebx, entry.ecx) = (0x602e7, 11008, 11008),
            (0x8000_0008, _) => entry.eax = 46,
            _ => {}
        }
    }
    // AVX, opmask, ZMM_Hi256, Hi16_ZMM, PKRU, AMX: size and offset in the standard format.
    for (index, size, offset) in
        [(2, 256, 576), (5, 64, 1088), (6, 512, 1152), (7, 1024, 1664), (9, 8, 2688), (17, 64, 2752), (18, 8192, 2816)]
    {
        table.push(leaf(0xd, index, [size, offset, 0, 0]));
    }
    table
}

#[test]
fn a_level_shows_its_instructions_and_hides_later_ones() {
    let level = |model| {
        let mut table = everything();
        assert_eq!(levels::apply(&mut table, model), Vec::<String>::new());
        table
    };
    let (v2, v3, v4) = (level(CpuModel::X86_64V2), level(CpuModel::X86_64V3), level(CpuModel::X86_64V4));
    let has = |table: &[CpuidEntry], name: &str| {
        let word = WORDS.iter().find(|w| w.bit(name).is_some()).unwrap();
        value(table, word.function, word.index, word.register) >> word.bit(name).unwrap() & 1 != 0
    };
    assert!(has(&v2, "sse4_2") && !has(&v2, "avx") && !has(&v2, "aes"));
    assert!(has(&v3, "avx2") && !has(&v3, "avx512f") && !has(&v3, "vmx"));
    assert!(has(&v4, "avx512vl") && !has(&v4, "amx_tile") && has(&v4, "md_clear"));
    assert_eq!([&v2, &v3, &v4].map(|t| xsave_bytes(t)), [576, 832, 2688]);
    assert_eq!([&v2, &v3, &v4].map(|t| value(t, 0xd, 0, Register::Eax)), [3, 7, 0xe7]);
    assert!(v4.iter().all(|e| e.function != 0xd || e.index < 8), "no leaves for components it does not have");
}

#[test]
fn a_level_that_the_host_does_not_reach_is_refused_by_name() {
    let mut table = everything();
    table.iter_mut().filter(|e| e.function == 7 && e.index == 0).for_each(|e| e.ebx &= !(1 << 16 | 1 << 5));
    assert_eq!(levels::apply(&mut table.clone(), CpuModel::X86_64V4), ["avx2", "avx512f"]);
    assert_eq!(levels::apply(&mut table, CpuModel::X86_64V2), Vec::<String>::new());
}

#[test]
fn what_a_destination_lacks_is_named_bit_by_bit() {
    let table = everything();
    assert_eq!(lacking_in(&table, &table), Vec::<String>::new());
    let mut here = table.clone();
    for entry in &mut here {
        match (entry.function, entry.index) {
            (7, 0) => entry.ebx &= !(1 << 16),
            (1, _) => entry.edx &= !(1 << 25),
            (0x8000_0008, _) => entry.eax = 39,
            (0xd, 0) => entry.ecx = 2688,
            (0x8000_0021, _) => entry.eax &= !(1 << 31),
            _ => {}
        }
    }
    assert_eq!(
        lacking_in(&table, &here),
        [
            "CPU feature sse",
            "CPU feature avx512f",
            "CPU feature cpuid.80000021.0.eax.bit31",
            "46 physical address bits (this host has 39)",
            "an XSAVE area of 11008 bytes (this host's has 2688)",
        ]
    );
    here.iter_mut().filter(|e| e.function == 0).for_each(|e| e.ebx = 0x6874_7541);
    assert!(lacking_in(&table, &here)[0].starts_with("a CPU by GenuineIntel"));
}

#[test]
fn a_feature_whose_msr_no_vcpu_takes_is_not_shown() {
    let mut table = everything();
    table.iter_mut().filter(|e| e.function == 7 && e.index == 0).for_each(|e| e.edx |= 3 << 29);
    let all: Vec<u32> = shown_feature_msrs(&table).collect();
    assert_eq!(all, [0x10a, 0xcf, 0x345]);
    hide_without_msr(&mut table, |index| index == 0xcf);
    assert_eq!(shown_feature_msrs(&table).collect::<Vec<_>>(), [0xcf]);
}

#[test]
fn more_than_the_guest_uses_is_no_reason_to_refuse() {
    let mut table = everything();
    levels::apply(&mut table, CpuModel::X86_64V2);
    assert_eq!(lacking_in(&table, &everything()), Vec::<String>::new());
}

#[test]
fn every_vcpu_finds_its_own_place_in_one_socket() {
    let mut table = everything();
    table.push(leaf(4, 0, [0x121, 0, 0, 0]));
    table.push(leaf(4, 3, [0x163, 0, 0, 0]));
    let cpuid = for_vcpu(&table, 2, 3).unwrap();
    let get = |function, index| cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap();
    assert_eq!(get(1, 0).ebx >> 16, 2 << 8 | 4);
    assert_ne!(get(1, 0).edx & 1 << 28, 0);
    assert_eq!((get(0xb, 0).eax, get(0xb, 0).ebx, get(0xb, 0).ecx, get(0xb, 0).edx), (0, 1, 0x100, 2));
    assert_eq!((get(0xb, 1).eax, get(0xb, 1).ebx, get(0xb, 1).ecx, get(0xb, 1).edx), (2, 3, 0x201, 2));
    assert_eq!(get(0xb, 2).ecx, 2);
    assert_eq!(get(4, 0).eax >> 14 & 0xfff, 0, "a first-level cache belongs to one core");
    assert_eq!(get(4, 3).eax >> 14 & 0xfff, 3, "the last level is shared by all");
    assert!(!cpuid.as_slice().iter().any(|e| e.function == 0x1f), "beyond the highest leaf");
}
