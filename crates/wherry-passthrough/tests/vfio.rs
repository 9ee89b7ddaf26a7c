//! Functions of this host, with a kernel that is played.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "support/kernel.rs"]
mod kernel;
mod support;

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use kernel::{FakeKernel, Mapped};
use support::{BAR0, FakeOwner, PIN, RAM, Rig, wait_for};
use wherry_handover::Registry;
use wherry_passthrough::vfio::{HostAddress, Vfio};
use wherry_passthrough::{Attention, Crew, Function, Owner, State, VFIO};
use wherry_state::{Saved, Section, StateUnit};

const EDU: &str = "0000:00:04.0";

fn address() -> HostAddress {
    EDU.parse().unwrap()
}

/// A host with a function that can be used.
fn host() -> Arc<FakeKernel> {
    let kernel = FakeKernel::new();
    kernel.add(EDU, Some("vfio-pci"), Some(7));
    kernel
}

fn rig(kernel: &Arc<FakeKernel>) -> Rig<Vfio> {
    let registry = Registry::new();
    let owner = kernel.host(registry.clone()).open(address()).unwrap();
    Rig::with(owner, 0, Crew::new(), registry)
}

/// The process that is to take over from a rig's.
fn heir(kernel: &Arc<FakeKernel>, rig: &Rig<Vfio>) -> Rig<Vfio> {
    let registry = Registry::of_successor();
    let entries = rig.registry.list();
    let copy = |entry: &wherry_handover::Entry| (entry.id.clone(), entry.as_fd().try_clone_to_owned().unwrap());
    registry.arrived(entries.iter().map(copy)).unwrap();
    let owner = kernel.host(registry.clone()).inherit(address(), &Function::shelf(&registry, VFIO, 0)).unwrap();
    let heir = Rig::with(owner, 0, Crew::new(), registry);
    assert_eq!(heir.registry.unclaimed(), []);
    heir
}

fn leave(rig: &Rig<Vfio>) -> Result<Section, wherry_state::UnitError> {
    rig.registry.set_leaving(true);
    rig.function.drain(rig.deadline())?;
    rig.function.finish_stop(rig.deadline())?;
    let Saved::Section(section) = rig.function.save()? else { panic!("nothing to save") };
    Ok(section)
}

fn stay(rig: &Rig<Vfio>) {
    rig.function.start().unwrap();
    rig.function.undrain().unwrap();
    rig.registry.set_leaving(false);
}

fn place(rig: &Rig<Vfio>) -> u64 {
    rig.ram.blocks()[0].engine_map() as u64
}

/// What must have been asked in a live update, and nothing else: no reset, no interrupt set.
fn only(asked: Vec<String>, allowed: &[&str]) {
    let other: Vec<_> = asked.iter().filter(|asked| !allowed.contains(&asked.as_str())).collect();
    assert!(other.is_empty(), "{other:?} of {asked:?}");
}

#[test]
fn a_function_is_opened_by_its_group_shown_to_the_guest_and_given_its_memory() {
    let kernel = host();
    let rig = rig(&kernel);
    let asked = kernel.take_asked();
    let begin = ["version", "status", "set container", "set IOMMU", "open 0000:00:04.0"];
    assert_eq!(asked[..5], begin, "{asked:?}");
    assert_eq!(asked[5..], ["irqs 3 0x24 0+1 by 1", "irqs 4 0x24 0+1 by 1", "map"]);
    assert_eq!(kernel.lock().maps[&0], Mapped { size: RAM, place: Some(place(&rig)) });
    assert_eq!(rig.read(0), 0x11e8_1234);
    assert_eq!(rig.guest.files.lock().unwrap().len(), 1, "the hypervisor knows its group");
    rig.switch_on(false);
    assert_eq!(*rig.guest.shown.lock().unwrap(), [(BAR0, 0x1000)], "its BAR is mapped into the guest");
    // What is not mapped is read and written all the same.
    let file = kernel.lock().opened[0].try_clone().unwrap();
    file.write_at(&[0x5a; 4], 0x1010).unwrap();
    let mut bytes = [0; 4];
    assert!(rig.bus.read(BAR0 + 0x10, &mut bytes));
    assert_eq!(bytes, [0x5a; 4]);
    assert!(rig.bus.write(BAR0 + 0x20, &[1, 2, 3, 4]));
    file.read_at(&mut bytes, 0x1020).unwrap();
    assert_eq!(bytes, [1, 2, 3, 4]);
    file.read_at(&mut bytes[..2], 0x2004).unwrap();
    assert_eq!(bytes[..2], [6, 0], "memory and bus mastering are switched on in the device");
    assert!(rig.owner.facts().pins && rig.owner.facts().resettable);
    let Rig { function, owner, guest, .. } = rig;
    function.release();
    drop((function, owner));
    assert!(kernel.lock().maps.is_empty() && guest.files.lock().unwrap().is_empty());
}

#[test]
fn interrupts_are_set_by_eventfd_one_kind_at_a_time() {
    let kernel = host();
    let rig = rig(&kernel);
    rig.switch_on(true);
    assert_eq!(
        kernel.take_asked()[8..],
        ["irqs 0 0x24 0+1 by 1", "irqs 0 0x14 0+1 by 1"],
        "the pin, and what unmasks it"
    );
    // MSI: address, data, on.
    rig.write(0x44, &0xfee0_0000u64.to_le_bytes());
    rig.write(0x4c, &0x41u16.to_le_bytes());
    rig.write(0x42, &1u16.to_le_bytes());
    assert_eq!(kernel.take_asked(), ["irqs 0 0x21 0+0 by 0", "irqs 1 0x24 0+1 by 1"]);
    rig.write(0x42, &0u16.to_le_bytes());
    assert_eq!(kernel.take_asked()[0], "irqs 1 0x21 0+0 by 0");
    assert_eq!(rig.router.delivered(PIN), Some(0));
}

#[test]
fn why_a_function_cannot_be_used_is_told_with_what_can_be_done() {
    let open = |prepare: &dyn Fn(&FakeKernel)| {
        let kernel = FakeKernel::new();
        prepare(&kernel);
        kernel.host(Registry::new()).open(address()).unwrap_err().to_string()
    };
    let says = |text: String, parts: &[&str]| {
        for part in parts {
            assert!(text.contains(part), "no {part:?} in {text}");
        }
    };
    says(open(&|_| ()), &["0000:00:04.0", "no such PCI function"]);
    says(open(&|kernel| kernel.add(EDU, Some("e1000e"), Some(7))), &["its driver is e1000e", "driver_override"]);
    says(open(&|kernel| kernel.add(EDU, None, Some(7))), &["it has no driver", "drivers_probe"]);
    says(open(&|kernel| kernel.add(EDU, Some("vfio-pci"), None)), &["no IOMMU group", "intel_iommu=on"]);
    let torn = |kernel: &FakeKernel| {
        kernel.add(EDU, Some("vfio-pci"), Some(7));
        kernel.add("0000:00:05.0", Some("nvme"), None);
        let members = kernel.root.path().join("sys/kernel/iommu_groups/7/devices");
        let function = kernel.root.path().join("sys/bus/pci/devices/0000:00:05.0");
        std::os::unix::fs::symlink(function, members.join("0000:00:05.0")).unwrap();
        kernel.lock().torn = true;
    };
    says(open(&torn), &["group 7 is not viable", "0000:00:05.0 (nvme)"]);
    let refusing = |what: &'static str, number: i32| {
        open(&move |kernel: &FakeKernel| {
            kernel.add(EDU, Some("vfio-pci"), Some(7));
            kernel.lock().refuses.insert(what, number);
        })
    };
    says(refusing("set IOMMU", libc::EPERM), &["no interrupt remapping", "allow_unsafe_interrupts"]);
    says(refusing("open 0000:00:04.0", libc::EBUSY), &["in use by another process"]);
    let kernel = host();
    kernel.lock().refuses.insert("map", libc::ENOMEM);
    let owner = kernel.host(Registry::new()).open(address()).unwrap();
    let ram = support::Rig::new(FakeOwner::new("vfio-user:a")).ram;
    let pinned = owner.map_dma(0, RAM, &ram.blocks()[0], 0).unwrap_err().to_string();
    says(pinned, &["pinning 1048576 bytes", "RLIMIT_MEMLOCK"]);
}

#[test]
fn one_that_cannot_be_reset_by_itself_is_reset_by_its_bus_if_nothing_else_is_on_that() {
    let open = |on_bus: &[u8], iommufd: bool| {
        let kernel = host();
        if iommufd {
            kernel.add_node(EDU, "vfio0");
        }
        kernel.lock().on_bus = Some(on_bus.to_vec());
        let owner = kernel.host(Registry::new()).open(address()).unwrap();
        kernel.take_asked();
        (owner, kernel)
    };
    for (iommufd, groups) in [(false, 1), (true, 0)] {
        let (owner, kernel) = open(&[address().devfn()], iommufd);
        assert!(owner.facts().resettable);
        owner.reset().unwrap();
        assert_eq!(kernel.take_asked(), [format!("reset the bus, with {groups} groups")]);
    }
    for others in [&[address().devfn(), address().devfn() + 1][..], &[address().devfn() + 1]] {
        assert!(!open(others, false).0.facts().resettable, "somebody else would be reset, too");
    }
}

#[test]
fn two_functions_share_memory_and_a_group() {
    let kernel = host();
    kernel.add("0000:00:04.1", Some("vfio-pci"), None);
    let group = kernel.root.path().join("sys/kernel/iommu_groups/7");
    std::os::unix::fs::symlink(group, kernel.root.path().join("sys/bus/pci/devices/0000:00:04.1/iommu_group")).unwrap();
    let registry = Registry::new();
    let host = kernel.host(registry.clone());
    let first = host.open(address()).unwrap();
    kernel.take_asked();
    let second = host.open("0000:00:04.1".parse().unwrap()).unwrap();
    assert_eq!(kernel.take_asked()[0], "open 0000:00:04.1", "neither group nor container again");
    let ram = Rig::new(FakeOwner::new("vfio-user:a")).ram;
    let block = &ram.blocks()[0];
    first.map_dma(0, RAM, block, 0).unwrap();
    second.map_dma(0, RAM, block, 0).unwrap();
    assert_eq!(kernel.take_asked(), ["map"]);
    assert!(second.map_dma(0, RAM / 2, block, 0).is_err(), "something else is there");
    first.unmap_dma(0, RAM).unwrap();
    drop(first);
    assert!(kernel.take_asked().is_empty());
    second.unmap_dma(0, RAM).unwrap();
    assert_eq!(kernel.take_asked(), ["unmap"]);
    assert!(second.unmap_dma(0, RAM).is_err());
}

#[test]
fn a_live_update_moves_the_mappings_and_tells_the_device_nothing() {
    for iommufd in [false, true] {
        let kernel = host();
        if iommufd {
            kernel.add_node(EDU, "vfio0");
        }
        let mut old = rig(&kernel);
        old.switch_on(true);
        assert_eq!(old.function.cannot_keep(), None);
        for _ in 0..3 {
            kernel.take_asked();
            let new = heir(&kernel, &old);
            assert_eq!(kernel.take_asked(), [""; 0], "nothing is asked before the machine stops");
            let section = leave(&old).unwrap();
            if !iommufd {
                assert_eq!(kernel.lock().maps[&0].place, None, "the old process's addresses are gone before it is");
            }
            new.function.restore(&section).unwrap();
            new.registry.settle();
            new.function.start().unwrap();
            only(kernel.take_asked(), &["leave", "place", "change process"]);
            if !iommufd {
                assert_eq!(kernel.lock().maps[&0].place, Some(place(&new)));
            }
            // As a process that has been replaced, which runs no destructors.
            std::mem::forget(std::mem::replace(&mut old, new));
        }
        assert_eq!(kernel.lock().maps.len(), 1);
    }
}

#[test]
fn whatever_fails_the_old_process_has_its_mappings_back() {
    // Each request in turn: until one is later than all there are.
    let mut failed = 0;
    for step in 0.. {
        let kernel = host();
        let old = rig(&kernel);
        old.switch_on(true);
        kernel.take_asked();
        let new = heir(&kernel, &old);
        kernel.lock().fails = Some((step, libc::ENOMEM));
        let went = leave(&old).and_then(|section| new.function.restore(&section));
        let hit = kernel.lock().fails.take().is_none();
        // Whether the new one has got anywhere or not: it does not run the machine.
        stay(&old);
        assert_eq!(kernel.lock().maps[&0].place, Some(place(&old)), "step {step}");
        only(kernel.take_asked(), &["leave", "place"]);
        std::mem::forget(new);
        let again = heir(&kernel, &old);
        let section = leave(&old).unwrap();
        again.function.restore(&section).unwrap();
        assert_eq!(kernel.lock().maps[&0].place, Some(place(&again)), "it can be tried again");
        std::mem::forget(again);
        if !hit {
            assert!(went.is_ok());
            break;
        }
        assert!(went.is_err(), "step {step}");
        failed += 1;
    }
    assert_eq!(failed, 2, "taking the addresses back, and giving new ones");
}

#[test]
fn what_cannot_be_kept_is_named_before_anything_happens() {
    let kernel = host();
    let old = rig(&kernel);
    kernel.lock().refuses.insert("", libc::ENOTTY);
    let why = old.function.cannot_keep().unwrap();
    assert!(why.contains("vfio:0000:00:04.0") && why.contains("VFIO_UPDATE_VADDR"), "{why}");
    let kernel = host();
    kernel.add_node(EDU, "vfio0");
    kernel.lock().without_file_maps = true;
    let old = rig(&kernel);
    assert!(kernel.take_asked().contains(&"map by address".into()));
    let why = old.function.cannot_keep().unwrap();
    assert!(why.contains("IOMMU_IOAS_MAP_FILE"), "{why}");
    let kernel = host();
    kernel.add_node(EDU, "vfio0");
    let old = rig(&kernel);
    assert!(kernel.take_asked().contains(&"map by file".into()));
    kernel.lock().refuses.insert("change process", libc::ENOTTY);
    assert!(old.function.cannot_keep().unwrap().contains("CHANGE_PROCESS"));
}

#[test]
fn iommufd_is_used_where_it_is_and_the_iommu_tells_what_was_written() {
    let kernel = host();
    kernel.add_node(EDU, "vfio0");
    kernel.lock().tracks = true;
    kernel.lock().plain = true;
    let rig = rig(&kernel);
    let asked = kernel.take_asked();
    assert_eq!(asked[..4], ["space", "bind", "table", "attach 6"], "{asked:?}");
    assert_eq!(kernel.lock().maps[&0], Mapped { size: RAM, place: None });
    assert!(rig.owner.facts().logging && rig.owner.facts().migration.is_none());
    assert!(rig.function.blocker().unwrap().contains("vfio:0000:00:04.0 cannot give its state"));
    rig.owner.start_log(&[(0, RAM)]).unwrap();
    kernel.lock().log = vec![0b101];
    assert_eq!(rig.owner.read_log(0, RAM, 4096).unwrap()[0], 0b101);
    rig.owner.stop_log().unwrap();
    assert_eq!(kernel.take_asked(), ["track 1", "written", "track 0"]);
}

#[test]
fn the_driver_of_a_function_gives_and_takes_its_state_and_logs_what_it_writes() {
    let kernel = host();
    let owner = kernel.host(Registry::new()).open(address()).unwrap();
    let migration = owner.facts().migration.unwrap();
    assert!(migration.pre_copy && !migration.p2p && owner.facts().logging);
    assert_eq!((owner.state().unwrap(), owner.estimate().unwrap()), (State::Running, Some(9)));
    assert!(owner.read_state(10).is_err(), "it is not in a state to be read");
    owner.set_state(State::StopCopy).unwrap();
    assert_eq!(owner.read_state(4).unwrap(), b"its ");
    assert_eq!(owner.read_state(100).unwrap(), b"state");
    assert_eq!(owner.read_state(100).unwrap(), b"");
    owner.set_state(State::Running).unwrap();
    assert!(owner.write_state(b"x").is_err());
    owner.set_state(State::Resuming).unwrap();
    owner.write_state(b"another").unwrap();
    let (mut loaded, mut text) = (kernel.lock().loaded.take().unwrap(), String::new());
    std::io::Seek::rewind(&mut loaded).unwrap();
    loaded.read_to_string(&mut text).unwrap();
    assert_eq!(text, "another");
    kernel.lock().state = 77;
    assert!(owner.state().unwrap_err().to_string().contains("state 77"));
    kernel.take_asked();
    assert_eq!(owner.start_log(&[(0, RAM)]).unwrap(), 4096);
    kernel.lock().log = vec![6];
    let log = owner.read_log(0, RAM, 4096).unwrap();
    assert_eq!((log.len(), log[0]), ((RAM / 4096 / 64) as usize, 6));
    owner.stop_log().unwrap();
    assert_eq!(kernel.take_asked(), ["log 4096 1 (0, 100000)", "logged", "log no longer"]);
}

#[test]
fn one_that_has_failed_is_reset_and_gone_and_one_that_is_wanted_back_is_asked_for() {
    let event = || Arc::new(wherry_interrupt::Event::new().unwrap());
    let (error, request) = (event(), event());
    let mut owner = FakeOwner::new("vfio-user:a");
    owner.attention = Attention { error: Some(error.clone()), request: Some(request.clone()) };
    let rig = Rig::new(owner);
    request.write(1).unwrap();
    assert!(rig.guest.wanted.lock().unwrap().is_empty(), "nobody listens before the machine is started");
    rig.function.start().unwrap();
    let asked = |times| move |wanted: &Vec<String>| wanted.len() == times;
    wait_for("the guest to be asked", || asked(1)(&rig.guest.wanted.lock().unwrap()));
    assert_eq!(*rig.guest.wanted.lock().unwrap(), ["vfio-user[0]"]);
    // Another process is about to listen.
    rig.registry.set_leaving(true);
    rig.function.drain(rig.deadline()).unwrap();
    rig.function.finish_stop(rig.deadline()).unwrap();
    request.write(1).unwrap();
    rig.owner.take_asked();
    rig.function.start().unwrap();
    rig.registry.set_leaving(false);
    wait_for("the guest to be asked again", || asked(2)(&rig.guest.wanted.lock().unwrap()));
    error.write(1).unwrap();
    wait_for("it to be reset", || rig.owner.script().asked.contains(&"reset".into()));
    wait_for("it to be gone", || rig.function.cannot_keep().is_some());
    let mut bytes = [0; 4];
    rig.switch_on(false);
    rig.bus.read(BAR0, &mut bytes);
    assert_eq!(bytes, [0xff; 4]);
}
