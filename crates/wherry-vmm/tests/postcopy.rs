//! Postcopy of a KVM machine: who faulted, as the engine tells it and as the guest feels it.
#![allow(clippy::unwrap_used, reason = "a failure is a panic here")]

mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Probe, STEP, config, heartbeat, until};
use wherry_migration::machine::{Builder, Machine, MachineDescription, Refusal, Wants};
use wherry_migration::progress::Phase;
use wherry_migration::{DestinationOptions, Journey, Mode, SourceOptions};
use wherry_stream::{Endpoint, Listener};
use wherry_vmm::builder::{LocalConfig, VmBuilder};
use wherry_vmm::config::SerialTarget;
use wherry_vmm::vm::{DeviceConfig, Vm};

/// A touch of a page that is there and mapped takes less.
const FELT_NS: u64 = 8192;

#[test]
fn the_faults_of_a_machine_are_told_by_vcpu_and_its_guest_feels_them() {
    if let Err(error) = wherry_fault::Userfault::open() {
        println!("SKIPPED: {error}");
        return;
    }
    let vm = Vm::boot(config("data=256M rate=max verify=10%", 512 << 20, 2)).unwrap();
    vm.resume().unwrap();
    until("a heartbeat", STEP, || heartbeat(vm.ram(), 0) > 1000 && heartbeat(vm.ram(), 1) > 1000);
    until("both vCPUs work", STEP, || Probe::of(vm.ram()).touches().count > 1000);
    let before = Probe::of(vm.ram()).touches();

    let (sockets, records) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
    let endpoint = Endpoint::Unix(sockets.path().join("listen"));
    let listener = Listener::bind(&endpoint).unwrap();
    let journey = Journey::new();
    let (there, arrived, sent) = std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let options = DestinationOptions {
                records: records.path().join("there"),
                wait_for_source: Some(Duration::from_secs(20)),
                ..DestinationOptions::default()
            };
            let devices = DeviceConfig { serial: SerialTarget::Null, pci: Default::default() };
            let built = Arc::new(Mutex::new(None));
            let builder = Keeping { builder: VmBuilder::new(LocalConfig { devices }), built: built.clone() };
            let (_, job) = wherry_migration::destination::receive(&listener, &builder, options, &journey).unwrap();
            (built.lock().unwrap().take().unwrap(), job)
        });
        let options = SourceOptions {
            mode: Mode::Postcopy,
            // Or all of it may be there before the guest has had a processor.
            bandwidth: Some(64 << 20),
            records: records.path().join("here"),
            ..SourceOptions::default()
        };
        let sent = wherry_migration::source::send(vm.clone(), &endpoint, options, &Journey::new()).unwrap();
        let (there, arrived) = receiver.join().unwrap();
        (there, arrived, sent)
    });
    assert_eq!((sent.phase, arrived.phase), (Phase::Done, Phase::Done));
    let figures = arrived.postcopy.unwrap();
    assert_eq!(figures.vcpus.iter().map(|vcpu| vcpu.index).collect::<Vec<_>>(), [0, 1]);
    let by_vcpu: u64 = figures.vcpus.iter().map(|vcpu| vcpu.faults.faults).sum();
    // Most come from workers of the kernel. Whether any comes from a vCPU is up to the moment: it must not be interruptible
    // then. That they are told apart is tested with threads of our own.
    let others = figures.kernel_workers.faults.faults + figures.other_threads.faults;
    assert_eq!(figures.faults, by_vcpu + others, "{figures:?}");
    assert_eq!(figures.kernel_workers.workers > 0, figures.kernel_workers.faults.faults > 0);
    let longest = figures.vcpus.iter().map(|vcpu| vcpu.faults.max_us).max();
    assert_eq!(longest, Some(figures.largest_stall_us));
    assert!(figures.faults > figures.local && figures.fault_max_us >= figures.largest_stall_us, "{figures:?}");
    assert_eq!(sent.postcopy.unwrap().vcpus, figures.vcpus);

    let beat = heartbeat(there.ram(), 0);
    until("it runs on", STEP, || heartbeat(there.ram(), 0) > beat + 1000);
    let probe = Probe::of(there.ram());
    probe.assert_healthy();
    let after = probe.touches();
    assert!(after.count > before.count);
    assert!(after.slow(FELT_NS) > before.slow(FELT_NS), "the guest felt nothing: {before:?}, {after:?}");
}

/// Keeps the machine that is built as what it is.
struct Keeping {
    builder: VmBuilder,
    built: Arc<Mutex<Option<Arc<Vm>>>>,
}

impl Builder for Keeping {
    fn build(&self, description: &MachineDescription, wants: Wants) -> Result<Arc<dyn Machine>, Refusal> {
        let vm = self.builder.build_vm(description, wants)?;
        *self.built.lock().unwrap() = Some(vm.clone());
        Ok(vm)
    }

    fn runs(&self, _: &Arc<dyn Machine>) {}
}
