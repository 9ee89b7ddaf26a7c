//! Measures what a machine's own steps cost in a blackout, in microseconds: stop, save, restore, start, and the steps
//! of the dirty log. RAM is not copied: the state goes into a machine with empty RAM, which is dropped before it runs.
//!
//!     cargo run --release -p wherry-vmm --example blackout -- [vCPUs] [memory in MiB] [rounds]

use std::time::{Duration, Instant};

use wherry_memory::PageSet;
use wherry_migration::machine::Machine;
use wherry_vmm::builder::{LocalConfig, VmBuilder};
use wherry_vmm::config::{CpuModel, Kernel, MachineConfig, SerialTarget};
use wherry_vmm::vm::{DeviceConfig, Vm};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1).map(|a| a.parse::<u64>());
    let mut next = |default: u64| args.next().unwrap_or(Ok(default));
    let (cpus, memory, rounds) = (next(1)? as u32, next(256)?, next(30)?);
    let vm = Vm::boot(MachineConfig {
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
    })?;
    vm.resume()?;
    std::thread::sleep(Duration::from_millis(500));
    let builder = VmBuilder::new(LocalConfig { devices: DeviceConfig { serial: SerialTarget::Null } });
    let (mut times, mut units) = (Times::default(), Times::default());
    let log = &vm.dirty_sources()[0];
    let now = Instant::now();
    log.start()?;
    times.note("log start", now);
    let mut set = PageSet::new(vm.ram().blocks().iter().map(|b| b.pages()).max().unwrap_or(0));
    for _ in 0..rounds {
        let now = Instant::now();
        let there = builder.build_vm(&vm.description())?;
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
        let now = Instant::now();
        there.units().restore(&state)?;
        times.note("restore", now);
        let now = Instant::now();
        vm.units().start()?;
        times.note("start", now);
        std::thread::sleep(Duration::from_millis(20));
    }
    let now = Instant::now();
    log.stop()?;
    times.note("log stop", now);
    times.print();
    println!("save, unit by unit:");
    units.print();
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
