//! Measures what a machine's own steps cost in a blackout, in microseconds: stop, save, restore, start, from there to the
//! guest's first heartbeat, and the steps of the dirty log. RAM is copied between the steps, outside what is measured.
//!
//!     cargo run --release -p wherry-vmm --example blackout -- [vCPUs] [memory in MiB] [rounds]

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use wherry_guest::report;
use wherry_memory::{PageSet, Ram};
use wherry_migration::machine::Machine;
use wherry_vmm::builder::{LocalConfig, VmBuilder};
use wherry_vmm::config::{CpuModel, Kernel, MachineConfig, SerialTarget};
use wherry_vmm::vm::{DeviceConfig, Vm};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1).map(|a| a.parse::<u64>());
    let mut next = |default: u64| args.next().unwrap_or(Ok(default));
    let (cpus, memory, rounds) = (next(1)? as u32, next(256)?, next(30)?);
    let mut vm = Vm::boot(MachineConfig {
        name: "blackout".into(),
        vm: [1; 16],
        memory: memory << 20,
        hugepages: false,
        cpus,
        cpu: CpuModel::Host,
        kernel: Kernel::Probe,
        initrd: None,
        cmdline: "data=64M rate=50M".into(),
        serial: SerialTarget::Null,
        pci: Default::default(),
    })?;
    vm.resume()?;
    std::thread::sleep(Duration::from_millis(500));
    let builder =
        VmBuilder::new(LocalConfig { devices: DeviceConfig { serial: SerialTarget::Null, pci: Default::default() } });
    let (mut times, mut units) = (Times::default(), Times::default());
    let mut set = PageSet::new(vm.ram().blocks().iter().map(|b| b.pages()).max().unwrap_or(0));
    for _ in 0..rounds {
        let log = &vm.dirty_sources()[0];
        let now = Instant::now();
        log.start()?;
        times.note("log start", now);
        std::thread::sleep(Duration::from_millis(20));
        let now = Instant::now();
        let there = builder.build_vm(&vm.description(), Default::default())?;
        times.note("build", now);
        for block in vm.ram().blocks() {
            set.clear();
            let now = Instant::now();
            log.collect(block, &mut set)?;
            times.note("log collect", now);
            let now = Instant::now();
            log.rearm(block, 0..block.pages(), &set)?;
            times.note("log rearm", now);
        }
        let now = Instant::now();
        vm.units().stop(Duration::from_secs(5))?;
        times.note("stop", now);
        let now = Instant::now();
        let state = vm.units().save()?;
        times.note("save", now);
        for unit in vm.units().iter().filter(|u| u.id().instance == 0) {
            let now = Instant::now();
            unit.save()?;
            units.note(&unit.id().name, now);
        }
        copy_ram(vm.ram(), there.ram())?;
        let now = Instant::now();
        there.units().restore(&state)?;
        times.note("restore", now);
        let beat = heartbeat(there.ram())?;
        let now = Instant::now();
        there.units().start()?;
        times.note("start", now);
        while heartbeat(there.ram())? == beat {
            std::hint::spin_loop();
        }
        times.note("first beat", now);
        let now = Instant::now();
        log.stop()?;
        times.note("log stop", now);
        let now = Instant::now();
        drop(vm);
        times.note("drop", now);
        vm = there;
        std::thread::sleep(Duration::from_millis(20));
    }
    times.print();
    println!("save, unit by unit:");
    units.print();
    Ok(())
}

fn heartbeat(ram: &Ram) -> Result<u64, Box<dyn std::error::Error>> {
    Ok(ram.memory().load(GuestAddress(report::heartbeat_gpa(0)), Ordering::Relaxed)?)
}

fn copy_ram(from: &Ram, to: &Ram) -> Result<(), Box<dyn std::error::Error>> {
    let mut buffer = vec![0; 1 << 20];
    for block in from.blocks() {
        for run in block.data_runs(0..u64::MAX) {
            let run = run?;
            for at in (run.start..run.end).step_by(1 << 20) {
                let piece = &mut buffer[..(run.end - at).min(1 << 20) as usize];
                block.read_at(at, piece)?;
                to.memory().write_slice(piece, GuestAddress(block.spec().guest_base + at))?;
            }
        }
    }
    Ok(())
}

/// Times of several steps.
#[derive(Default)]
struct Times(Vec<(String, Vec<u128>)>);

impl Times {
    fn note(&mut self, what: &str, since: Instant) {
        let us = since.elapsed().as_micros();
        match self.0.iter_mut().find(|(name, _)| name == what) {
            Some((_, list)) => list.push(us),
            None => self.0.push((what.into(), vec![us])),
        }
    }

    fn print(&mut self) {
        for (what, list) in &mut self.0 {
            list.sort_unstable();
            println!("{what:12} median {:6} us  worst {:6} us", list[list.len() / 2], list[list.len() - 1]);
        }
    }
}
