use vm_memory::Bytes;
use wherry_memory::{BlockId, BlockSpec, PageSize, Ram};

use super::*;

/// The tables of a machine, found as a guest finds them.
struct Tables {
    all: Vec<(String, Vec<u8>)>,
}

fn windows() -> PciWindows {
    PciWindows { io: 0x1000..0x1_0000, memory32: layout::MMIO32, memory64: layout::mmio64(1 << 30) }
}

fn ram() -> Ram {
    Ram::create(&[BlockSpec { id: BlockId(0), guest_base: 0, size: 4 << 20, page_size: PageSize::Base }]).unwrap()
}

fn config(windows: &PciWindows, cpus: u32) -> AcpiConfig<'_> {
    AcpiConfig { cpus, windows, slots: 0xffff_fff0, devices: vec![], tables: vec![] }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |a, b| a.wrapping_add(*b))
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    let mut out = [0; 8];
    out[..len].copy_from_slice(&bytes[at..at + len]);
    u64::from_le_bytes(out)
}

impl Tables {
    fn of(cpus: u32) -> Self {
        let (ram, windows) = (ram(), windows());
        let rsdp = write_tables(ram.memory(), &config(&windows, cpus)).unwrap();
        let read = |at: u64, len: usize| {
            let mut out = vec![0; len];
            ram.memory().read_slice(&mut out, GuestAddress(at)).unwrap();
            out
        };
        let table = |at: u64| {
            assert!(layout::ACPI_TABLES.contains(&at));
            let table = read(at, number(&read(at + 4, 4), 0, 4) as usize);
            (String::from_utf8(table[..4].to_vec()).unwrap(), table)
        };
        let pointer = read(rsdp, 36);
        assert_eq!((&pointer[..8], sum(&pointer[..20]), sum(&pointer)), (&b"RSD PTR "[..], 0, 0));
        let xsdt = table(number(&pointer, 24, 8));
        let mut all: Vec<_> = xsdt.1[36..].chunks(8).map(|c| table(number(c, 0, 8))).collect();
        let fadt = all.iter().find(|t| t.0 == "FACP").unwrap().1.clone();
        all.push(table(number(&fadt, 40, 4)));
        assert_eq!(number(&fadt, 140, 8), number(&fadt, 40, 4), "both pointers to the DSDT");
        let facs = number(&fadt, 36, 4);
        assert_eq!((read(facs, 4), facs % 64), (b"FACS".to_vec(), 0));
        all.push(xsdt);
        Self { all }
    }

    fn get(&self, signature: &str) -> &[u8] {
        &self.all.iter().find(|t| t.0 == signature).unwrap().1
    }
}

#[test]
fn a_guest_finds_all_tables_from_the_rsdp_and_every_checksum_is_right() {
    let tables = Tables::of(2);
    let mut names: Vec<_> = tables.all.iter().map(|t| t.0.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["APIC", "DSDT", "FACP", "MCFG", "XSDT"]);
    for (name, table) in &tables.all {
        assert_eq!(sum(table), 0, "{name}");
    }
}

#[test]
fn the_madt_has_one_local_apic_for_each_vcpu_and_the_override_of_the_sci() {
    let tables = Tables::of(3);
    let mut entries = vec![];
    let mut rest = &tables.get("APIC")[44..];
    while let [kind, len, ..] = *rest {
        let (entry, tail) = rest.split_at(len.into());
        entries.push((kind, entry[2..].to_vec()));
        rest = tail;
    }
    let of = |kind| entries.iter().filter(|e| e.0 == kind).map(|e| e.1.clone()).collect::<Vec<_>>();
    assert_eq!(of(0), [[0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [2, 2, 1, 0, 0, 0]]);
    assert_eq!(of(1), [[0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]]);
    assert_eq!(of(2), [[0, 9, 9, 0, 0, 0, 13, 0]]);
}

#[test]
fn the_fadt_leads_to_the_registers_that_exist() {
    let tables = Tables::of(1);
    let fadt = tables.get("FACP");
    assert_eq!(number(fadt, 46, 2), 9, "SCI");
    assert_eq!((number(fadt, 56, 4), number(fadt, 64, 4), number(fadt, 76, 4)), (0x600, 0x604, 0x608));
    assert_eq!((number(fadt, 116 + 4, 8), fadt[128]), (0xcf9, 6), "reset register and value");
    let flags = number(fadt, 112, 4);
    assert_eq!(flags & (1 << 20 | 1 << 10 | 1 << 4), 1 << 10, "not hardware-reduced, reset, fixed power button");
    assert_eq!((number(fadt, 80, 4), fadt[92]), (0x610, 2), "general-purpose events");
    // The 64-bit forms agree with the 32-bit ones.
    for (old, new) in [(56, 148), (64, 172), (76, 208), (80, 220)] {
        assert_eq!(number(fadt, old, 4), number(fadt, new + 4, 8));
    }
}

#[test]
fn the_dsdt_names_the_devices_of_the_machine() {
    let tables = Tables::of(1);
    let dsdt = tables.get("DSDT");
    for name in ["_S5_", "PCI0", "_CRS", "_PRT", "_OSC", "COM1", "RTC_", "MBRD", "_GPE", "S04_", "S1F_"] {
        assert!(dsdt.windows(4).any(|w| w == name.as_bytes()), "{name}");
    }
    assert!(!dsdt.windows(4).any(|w| w == b"S03_"), "a slot whose device stays");
}

#[test]
fn tables_that_do_not_fit_are_refused() {
    struct Large;
    impl Aml for Large {
        fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
            sink.vec(&[0; 0x2_0000]);
        }
    }
    let (ram, windows) = (ram(), windows());
    let config = AcpiConfig { tables: vec![Box::new(Large)], ..config(&windows, 1) };
    assert!(matches!(write_tables(ram.memory(), &config), Err(AcpiError::TooLarge { room: 0x2_0000, .. })));
    write_tables(ram.memory(), &self::config(&windows, 254)).unwrap();
}

/// Disassembles the DSDT where `iasl` is installed.
#[test]
fn the_dsdt_is_good_aml() {
    use std::process::Command;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dsdt.aml");
    std::fs::write(&file, Tables::of(2).get("DSDT")).unwrap();
    let output = match Command::new("iasl").arg("-d").arg(&file).output() {
        Ok(output) => output,
        Err(error) => {
            println!("SKIPPED: iasl (package acpica-tools) cannot be started: {error}");
            return;
        }
    };
    let text = std::fs::read_to_string(dir.path().join("dsdt.dsl")).unwrap_or_default();
    assert!(output.status.success() && text.contains("Device (PCI0)"), "{output:?}");
    assert!(text.contains("Name (\\_S5, Package (0x04)"), "{text}");
    for part in ["Method (_E01", "Device (S04)", "Name (_ADR, 0x001F0000)", "Notify (S1F, Arg1)", "HPEJ = 0x80000000"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let problems: Vec<_> = text.lines().filter(|l| l.contains("Error") || l.contains("Invalid")).collect();
    assert!(problems.is_empty(), "{problems:?}");
}
