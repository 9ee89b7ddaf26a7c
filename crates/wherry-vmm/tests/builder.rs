//! What a destination refuses, by name, before a byte of memory moves.

#![allow(clippy::unwrap_used, reason = "a failure is a panic here")]

mod common;

use common::config;
use prost::Message;
use std::time::{Duration, Instant};
use wherry_migration::machine::{BlockDescription, Machine, MachineDescription, UnitDescription};
use wherry_vmm::builder::{LocalConfig, VmBuilder};
use wherry_vmm::config::{CpuModel, Kernel, MachineConfig, SerialTarget};
use wherry_vmm::description::{FeatureMsr, VmDescription};
use wherry_vmm::vm::{DeviceConfig, ExitReason, Vm, VmError};

fn description() -> MachineDescription {
    Vm::boot(config("data=1M", 64 << 20, 2)).unwrap().description()
}

fn refusal(change: impl FnOnce(&mut MachineDescription)) -> String {
    let mut description = description();
    change(&mut description);
    let builder =
        VmBuilder::new(LocalConfig { devices: DeviceConfig { serial: SerialTarget::Null, pci: Default::default() } });
    match builder.build_vm(&description, Default::default()) {
        Ok(_) => panic!("it was built"),
        Err(refusal) => {
            assert!(builder.take_built().is_none());
            refusal.to_string()
        }
    }
}

fn vmm(description: &mut MachineDescription, change: impl FnOnce(&mut VmDescription)) {
    let mut vmm = VmDescription::decode(description.vmm.as_slice()).unwrap();
    change(&mut vmm);
    description.vmm = vmm.encode_to_vec();
}

#[test]
fn a_cpu_feature_that_this_host_lacks_is_named() {
    // The bit of IA64 in leaf 1, which no x86-64 CPU has.
    let text = refusal(|d| {
        vmm(d, |v| v.cpuid.iter_mut().filter(|e| e.function == 1).for_each(|e| e.edx |= 1 << 30));
    });
    assert_eq!(text, "CPU feature ia64");
}

#[test]
fn everything_that_is_lacking_is_named_at_once() {
    let text = refusal(|d| {
        vmm(d, |v| {
            v.cpuid.iter_mut().filter(|e| e.function == 1).for_each(|e| e.edx |= 1 << 30);
            v.cpuid.iter_mut().filter(|e| e.function == 0).for_each(|e| e.ebx = u32::from_le_bytes(*b"Fake"));
            v.feature_msrs.push(FeatureMsr { index: 0xcf, value: 1 << 60 });
            v.tsc_khz *= 2;
        });
        d.vm.pop();
    });
    for part in ["a CPU by Fake", "ia64", "IA32_CORE_CAPABILITIES", "kHz", "identity of 16 bytes (it has 15)"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn a_guest_from_another_host_comes_only_where_its_tsc_can_be_moved() {
    let mut there = description();
    vmm(&mut there, |v| v.boot_id = "another host".into());
    let builder =
        VmBuilder::new(LocalConfig { devices: DeviceConfig { serial: SerialTarget::Null, pci: Default::default() } });
    match builder.build_vm(&there, Default::default()) {
        // KVM here moves it: the machine is built, and says that it is here now.
        Ok(vm) => assert_ne!(VmDescription::decode(vm.description().vmm.as_slice()).unwrap().boot_id, "another host"),
        Err(refusal) => assert!(refusal.to_string().contains("a guest TSC that can be moved"), "{refusal}"),
    }
}

#[test]
fn an_xsave_area_that_is_too_large_is_refused() {
    let text = refusal(|d| {
        vmm(d, |v| v.cpuid.iter_mut().filter(|e| (e.function, e.index) == (0xd, 0)).for_each(|e| e.ecx = 1 << 20));
    });
    assert!(text.contains("an XSAVE area of 1048576 bytes"), "{text}");
}

#[test]
fn ram_that_has_another_shape_is_refused() {
    for (change, reason) in [
        (BlockDescription { id: 0, guest_base: 4096, size: 64 << 20, page_size: 4096 }, "another memory layout"),
        (BlockDescription { id: 9, guest_base: 0, size: 64 << 20, page_size: 4096 }, "another memory layout"),
        (BlockDescription { id: 0, guest_base: 0, size: 64 << 20, page_size: 8192 }, "pages of 8192 bytes"),
        (BlockDescription { id: 0, guest_base: 0, size: u64::MAX, page_size: 4096 }, "more than"),
        (BlockDescription { id: 0, guest_base: 0, size: 4097, page_size: 4096 }, "positive multiple"),
        (BlockDescription { id: 0, guest_base: 0, size: 0, page_size: 4096 }, "positive multiple"),
    ] {
        let text = refusal(|d| d.blocks = vec![change.clone()]);
        assert!(text.contains(reason), "{change:?}: {text}");
    }
    let text = refusal(|d| d.blocks.clear());
    assert!(text.contains("pages of 0 bytes"), "{text}");
}

#[test]
fn huge_pages_that_are_not_there_are_refused_before_the_guest_touches_one() {
    let size = 64 << 30;
    let text = refusal(|d| {
        let page_size = 2 << 20;
        d.blocks = vec![
            BlockDescription { id: 0, guest_base: 0, size: 3 << 30, page_size },
            BlockDescription { id: 1, guest_base: 4 << 30, size: size - (3 << 30), page_size },
        ];
    });
    assert!(text.contains("32768 free huge pages of 2 MiB (this host has "), "{text}");
}

#[test]
fn state_that_a_newer_program_saves_is_refused_by_unit() {
    let text =
        refusal(|d| d.units.iter_mut().filter(|u| u.name == "vcpu" && u.instance == 1).for_each(|u| u.schema = 7));
    assert!(text.contains("state of unit vcpu[1] in schema 7") && text.contains("newer Wherry"), "{text}");
    let text = refusal(|d| d.units.push(UnitDescription { name: "flux".into(), instance: 0, schema: 1 }));
    assert_eq!(text, "a unit flux[0]");
    let text = refusal(|d| d.units.retain(|u| u.name != "pit"));
    assert_eq!(text, "a machine without unit pit[0]");
}

#[test]
fn a_description_that_cannot_be_read_is_refused() {
    assert!(refusal(|d| d.vmm = vec![0xff; 20]).contains("can be read"));
    assert!(refusal(|d| d.vmm.clear()).contains("version 0"));
    assert!(refusal(|d| vmm(d, |v| v.version = 99)).contains("version 99"));
}

#[test]
fn each_cpu_level_that_this_host_has_runs_the_probe_and_the_others_are_refused_by_name() {
    for cpu in [CpuModel::X86_64V2, CpuModel::X86_64V3, CpuModel::X86_64V4] {
        match Vm::boot(MachineConfig { cpu, ..config("data=1M run=50", 64 << 20, 2) }) {
            Ok(vm) => {
                vm.resume().unwrap();
                let exit = vm.wait_exit(Some(Instant::now() + Duration::from_secs(30)));
                assert_eq!(exit, Some(ExitReason::PowerOff), "{cpu}");
            }
            Err(VmError::CpuModel { model, lacking }) => {
                assert_eq!(model, cpu.name());
                assert!(!lacking.is_empty());
            }
            Err(other) => panic!("{cpu}: {other}"),
        }
    }
}

#[test]
fn a_kernel_that_cannot_be_booted_is_an_error_that_says_why() {
    let kernel = |path: &str| Vm::boot(MachineConfig { kernel: Kernel::Path(path.into()), ..config("", 64 << 20, 1) });
    assert!(kernel("/nonexistent/vmlinux").unwrap_err().to_string().contains("/nonexistent/vmlinux"));
    assert!(kernel("/proc/version").unwrap_err().to_string().contains("neither a Linux bzImage nor an ELF"));
    assert!(Vm::boot(config("", 64 << 20, 0)).unwrap_err().to_string().contains("0 vCPUs"));
}
