//! Golden files: for every unit and schema, the bytes of one section as the version that introduced the schema wrote
//! them, in `golden/UNIT-SCHEMA.bin`. They are never changed; a new schema adds a file.
//!
//! Every test reads one file and compares what comes out with what was put in. `WHERRY_NEW_GOLDEN=1 cargo test -p
//! wherry-vmm golden` writes those that are missing; it never overwrites one.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::path::{Path, PathBuf};

use wherry_interrupt::saved::SavedVector;
use wherry_passthrough::saved::{SavedGathering, SavedKept, SavedPassthrough, SavedTold};
use wherry_pci::saved::SavedMsix;
use wherry_state::{SavedState, Section};
use wherry_virtio::saved::{
    self, SavedBalloon, SavedBlk, SavedConsole, SavedNet, SavedPages, SavedRng, SavedVhostUser,
};
use wherry_virtio::vhost;

use crate::pci::{SavedFunction, SavedPciHost};
use crate::units::clock::saved::ClockState;
use crate::units::irqchip::saved::{Ioapic, IrqchipState, Pic};
use crate::units::pit::saved::{PitChannel, PitState};
use crate::units::vcpu::saved::{
    DebugRegisters, Events, Registers, Segment, SpecialRegisters, Table, Tsc, VcpuState, Xcr,
};

/// State of units in another form: of devices that are kept over a live update.
const KEPT: [&str; 2] = ["vfio-user-kept-2.bin", "vhost-user-kept-2.bin"];

/// Units with a golden file, and their newest schema.
const UNITS: &[(&str, u32)] = &[
    ("vcpu", VcpuState::SCHEMA),
    ("irqchip", IrqchipState::SCHEMA),
    ("pit", PitState::SCHEMA),
    ("clock", ClockState::SCHEMA),
    ("serial", crate::serial::SavedSerial::SCHEMA),
    ("rtc", crate::rtc::SavedRtc::SCHEMA),
    ("pci-host", SavedPciHost::SCHEMA),
    ("acpi", crate::power::SavedAcpi::SCHEMA),
    ("pci-hotplug", crate::hotplug::SavedHotplug::SCHEMA),
    ("virtio-blk", SavedBlk::SCHEMA),
    ("virtio-net", SavedNet::SCHEMA),
    ("virtio-console", SavedConsole::SCHEMA),
    ("virtio-balloon", SavedBalloon::SCHEMA),
    ("virtio-rng", SavedRng::SCHEMA),
    ("vhost-user", SavedVhostUser::SCHEMA),
    ("vfio-user", SavedPassthrough::SCHEMA),
    ("passthrough", SavedGathering::SCHEMA),
];

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

/// Reads the golden file of a unit and schema, and compares it with the state it was made from, as this version
/// decodes it.
pub(crate) fn check<T: SavedState + PartialEq + Debug>(unit: &str, schema: u32, expected: &T) {
    let path = directory().join(format!("{unit}-{schema}.bin"));
    if std::env::var_os("WHERRY_NEW_GOLDEN").is_some() && !path.exists() {
        std::fs::create_dir_all(directory()).unwrap();
        std::fs::write(&path, expected.encode_to_vec()).unwrap();
    }
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let section = Section { unit: unit.into(), instance: 0, schema, bytes };
    assert_eq!(&T::from_section(&section).unwrap(), expected, "{}", path.display());
}

#[test]
fn every_schema_of_every_unit_has_its_golden_file_and_no_file_is_left_over() {
    let wanted = UNITS.iter().flat_map(|(unit, schema)| (1..=*schema).map(move |s| format!("{unit}-{s}.bin")));
    let wanted: BTreeSet<String> = wanted.chain(KEPT.map(String::from)).collect();
    let found: BTreeSet<String> =
        std::fs::read_dir(directory()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(found, wanted);
}

#[test]
fn no_saved_type_is_without_an_entry() {
    fn count(dir: &Path) -> usize {
        let of = |path: PathBuf| match path.is_dir() {
            true => count(&path),
            false => {
                let text = std::fs::read_to_string(&path).unwrap();
                text.lines().filter(|line| line.starts_with("impl SavedState for ")).count()
            }
        };
        std::fs::read_dir(dir).unwrap().map(|entry| of(entry.unwrap().path())).sum()
    }
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let all = ["wherry-vmm/src", "wherry-virtio/src", "wherry-passthrough/src"];
    let implemented: usize = all.iter().map(|dir| count(&crates.join(dir))).sum();
    assert_eq!(implemented, UNITS.len(), "types that implement SavedState, and entries of UNITS");
}

#[test]
fn the_document_lists_every_unit_with_its_schema_and_no_other() {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/state.md")).unwrap();
    let (_, units) = text.split_once("## Units").unwrap();
    let (units, _) = units.split_once("## Order").unwrap();
    let rows: BTreeSet<(String, String)> = units
        .lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .filter_map(|row| {
            let (unit, rest) = row.split_once("` | ")?;
            Some((unit.to_string(), rest.split_once(" |")?.0.to_string()))
        })
        .collect();
    let ours = UNITS.iter().map(|(unit, schema)| (unit.to_string(), schema.to_string())).collect();
    assert_eq!(rows, ours);
}

/// Different numbers in all fields, so that no two of them can be mixed up.
fn vcpu_1() -> VcpuState {
    let segments = (1..=8).map(|i| Segment {
        base: 0x1000_0000_0000 + i,
        limit: 0xf000_0000 + i as u32,
        selector: 8 * i as u32,
        access: 0xa09b + 0x1_0000 * (i as u32 & 1),
    });
    VcpuState {
        registers: Some(Registers {
            rax: 1,
            rbx: 2,
            rcx: 3,
            rdx: 4,
            rsi: 5,
            rdi: 6,
            rsp: 7,
            rbp: 8,
            r8: 9,
            r9: 10,
            r10: 11,
            r11: 12,
            r12: 13,
            r13: 14,
            r14: 15,
            r15: u64::MAX,
            rip: 0xffff_ffff_8100_0000,
            rflags: 0x246,
        }),
        special: Some(SpecialRegisters {
            segments: segments.collect(),
            gdt: Some(Table { base: 0xffff_8000_0000_1000, limit: 0x7f }),
            idt: Some(Table { base: 0xffff_8000_0000_2000, limit: 0xfff }),
            cr0: 0x8005_0033,
            cr2: 0xdead_b000,
            cr3: 0x1234_5000,
            cr4: 0x3506f0,
            cr8: 2,
            efer: 0xd01,
            apic_base: 0xfee0_0900,
            pdptrs: vec![0x1001, 0x2001, 0x3001, 0x4001],
        }),
        xcrs: vec![Xcr { number: 0, value: 0xe7 }],
        xsave: (0..=255).cycle().take(2700).collect(),
        msr_numbers: vec![0x174, 0x4b56_4d01, 0xc000_0102],
        msr_values: vec![0x10, 0x1_2345_6001, u64::MAX - 1],
        lapic: (0..1024).map(|i| (i / 16) as u8).collect(),
        events: Some(Events {
            flags: 0x2d,
            exception_injected: true,
            exception_number: 14,
            exception_has_error_code: true,
            exception_error_code: 0x11,
            exception_pending: true,
            exception_has_payload: true,
            exception_payload: 0x7000,
            interrupt_injected: true,
            interrupt_number: 0xec,
            interrupt_soft: true,
            interrupt_shadow: 2,
            nmi_injected: true,
            nmi_pending: 1,
            nmi_masked: true,
            sipi_vector: 0x9a,
            smm: true,
            smi_pending: true,
            smm_inside_nmi: true,
            smi_latched_init: true,
            triple_fault_pending: true,
        }),
        mp_state: 3,
        debug: Some(DebugRegisters { addresses: vec![21, 22, 23, 24], dr6: 0xffff_0ff1, dr7: 0x403 }),
        tsc: Some(Tsc { value: 0x1234_5678_9abc, offset: Some(u64::MAX - 77), deadline: 0x1234_5678_9fff }),
        nested: Some(vec![1, 2, 3]),
    }
}

#[test]
fn vcpu() {
    check("vcpu", 1, &vcpu_1());
}

#[test]
fn irqchip() {
    let pic = |n: u32| Pic {
        last_irr: n,
        irr: n + 1,
        imr: n + 2,
        isr: n + 3,
        priority_add: n + 4,
        irq_base: n + 5,
        read_reg_select: n + 6,
        poll: n + 7,
        special_mask: n + 8,
        init_state: n + 9,
        auto_eoi: n + 10,
        rotate_on_auto_eoi: n + 11,
        special_fully_nested_mode: n + 12,
        init4: n + 13,
        elcr: n + 14,
        elcr_mask: n + 15,
    };
    let ioapic = Ioapic {
        base_address: 0xfec0_0000,
        select: 0x11,
        id: 2,
        irr: 0x80_0010,
        redirections: (0..24).map(|i| i << 56 | 0x1_0000 | i).collect(),
    };
    let state = IrqchipState { pic_master: Some(pic(1)), pic_slave: Some(pic(101)), ioapic: Some(ioapic) };
    check("irqchip", 1, &state);
}

#[test]
fn pit() {
    let channel = |n: u32| PitChannel {
        count: 65536 - n,
        latched_count: n + 1,
        count_latched: n + 2,
        status_latched: n + 3,
        status: n + 4,
        read_state: n + 5,
        write_state: n + 6,
        write_latch: n + 7,
        rw_mode: n + 8,
        mode: n + 9,
        bcd: n + 10,
        gate: n + 11,
        loaded_ns_ago: -5 + i64::from(n) * 1_000_000_000_000,
    };
    check("pit", 1, &PitState { channels: vec![channel(0), channel(20), channel(40)], flags: 2 });
}

#[test]
fn clock() {
    let state = ClockState {
        kvmclock_ns: 12_345_678_901,
        realtime_ns: 1_790_000_000_123_456_789,
        host_tsc: 0x89ab_cdef_0123,
        boot_id: "0f3d4c7e-1111-2222-3333-444455556666".into(),
        paused_by_user: true,
    };
    check("clock", 1, &state);
}

#[test]
fn serial() {
    let state = crate::serial::SavedSerial {
        divisor: 0x0102,
        interrupt_enable: 3,
        interrupt_identification: 4,
        line_control: 5,
        line_status: 6,
        modem_control: 7,
        modem_status: 8,
        scratch: 9,
        received: b"typed".to_vec(),
        ..Default::default()
    };
    check("serial", 1, &state);
    let (waiting_input, waiting_output) = (b"pasted".to_vec(), b"printed".to_vec());
    check("serial", 2, &crate::serial::SavedSerial { waiting_input, waiting_output, ..state });
}

#[test]
fn rtc() {
    let cmos = (0..128).map(|i| i ^ 0x55).collect();
    check("rtc", 1, &crate::rtc::SavedRtc { index: 0x32, cmos, offset: -3600, stopped: Some(-1) });
}

#[test]
fn pci_host() {
    let function =
        |devfn: u32| SavedFunction { devfn, config: (0..64).map(|i| (i + devfn) as u8).collect(), length: 4096 };
    let state = SavedPciHost { config_address: 0x8000_f8fc, functions: vec![function(0), function(0x18)] };
    check("pci-host", 1, &state);
}

#[test]
fn acpi() {
    let state = crate::power::SavedAcpi {
        pm1_status: 0x100,
        pm1_enable: 0x101,
        pm1_control: 1,
        timer: 0xffff_ffff_ffff,
        reset_control: 2,
        realtime_ns: 1_790_000_000_123_456_789,
    };
    check("acpi", 1, &state);
}

#[test]
fn virtio_blk() {
    let state = SavedBlk { transport: Some(saved::example()), sectors: 1 << 40, in_flight: vec![0, 255, 3] };
    check("virtio-blk", 1, &state);
}

#[test]
fn virtio_net() {
    let state = SavedNet {
        transport: Some(saved::example()),
        mac: vec![2, 3, 4, 5, 6, 7],
        offloads: 0x382,
        announcing: true,
        packet: (0..=255).collect(),
        buffers: vec![0, 255, 3],
    };
    check("virtio-net", 1, &state);
}

#[test]
fn virtio_console() {
    let (input, output) = (b"typed".to_vec(), b"said".to_vec());
    check("virtio-console", 1, &SavedConsole { transport: Some(saved::example()), input, output, begun: 77 });
}

#[test]
fn virtio_balloon() {
    let pages = |block: u32| SavedPages { block, first: 1 << 33, count: 512 };
    let state = SavedBalloon {
        transport: Some(saved::example()),
        wanted: 0xffff_fffe,
        actual: 77,
        command: 0x8000_0001,
        last_command: 0x8000_0002,
        statistics: Some(127),
        waiting: vec![pages(0), pages(1)],
    };
    check("virtio-balloon", 1, &state);
}

#[test]
fn virtio_rng() {
    check("virtio-rng", 1, &SavedRng { transport: Some(saved::example()) });
}

#[test]
fn vhost_user() {
    let (transport, config) = (Some(saved::example()), (1..=60).collect());
    let mut state = SavedVhostUser { transport, id: 2, config, back_end: Vec::new(), kept: None };
    check("vhost-user", 1, &state);
    state.back_end = (100..200).collect();
    check("vhost-user", 2, &state);
    (state.back_end, state.kept) = (Vec::new(), Some(vhost::saved::example()));
    check("vhost-user-kept", 2, &state);
}

#[test]
fn vfio_user() {
    let vector = |n: u32| SavedVector { address: 0xfee0_0000, data: 0x30 + n, open: n == 0, pending: n == 1 };
    let state = SavedPassthrough {
        config: (0..=255).collect(),
        msix: Some(SavedMsix { table: (0..32).collect(), vectors: vec![vector(0), vector(1)] }),
        msi: vec![vector(2)],
        device: (50..150).collect(),
        streamed: 0,
        kept: None,
    };
    check("vfio-user", 1, &state);
    let state = SavedPassthrough { device: vec![], streamed: 3 << 20, ..state };
    check("vfio-user", 2, &state);
    let told = SavedTold { irq: 3, delivered: vec![true, false], asks: true };
    let kept = SavedKept { told: Some(told), owner: (20..40).collect() };
    check("vfio-user-kept", 2, &SavedPassthrough { streamed: 0, kept: Some(kept), ..state });
}

#[test]
fn passthrough() {
    check("passthrough", 1, &SavedGathering { functions: 3 });
}
