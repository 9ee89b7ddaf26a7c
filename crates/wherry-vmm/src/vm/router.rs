//! Interrupt routes, irqfds and ioeventfds of a KVM machine: what `wherry-interrupt` and `wherry-pci` ask of a hypervisor.
//!
//! KVM replaces its routing table as a whole, so the table is kept here. Routes of inputs to which nothing is attached are
//! only noted; the next attachment brings the table up to date. So the routes of all devices of a machine that is restored
//! go to KVM in one batch.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;
use wherry_interrupt::{Input, Message, Router};
use wherry_pci::{Doorbell, Doorbells};

use super::ioctl;

/// Inputs of the I/O APIC.
const PINS: u32 = 24;
/// KVM's limit on inputs, `KVM_MAX_IRQ_ROUTES`.
const MOST: u32 = 4096;

#[derive(Default)]
struct Table {
    reserved: BTreeSet<u32>,
    messages: BTreeMap<u32, Message>,
    /// How many eventfds are attached to each input.
    attached: BTreeMap<u32, u32>,
    /// KVM does not know the table as it is here.
    stale: bool,
}

/// Routes of one machine.
pub(crate) struct KvmRouter {
    vm: Arc<VmFd>,
    /// Held during calls of KVM, so that it never gets an older table after a newer one.
    table: Mutex<Table>,
}

impl KvmRouter {
    /// The machine has its interrupt controllers, and no routes but those they came with.
    pub(crate) fn new(vm: Arc<VmFd>) -> Arc<Self> {
        Arc::new(Self { vm, table: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, table: &mut Table) -> io::Result<()> {
        if !table.stale {
            return Ok(());
        }
        let mut entries = controllers();
        entries.extend(table.messages.iter().map(|(gsi, message)| msi(*gsi, *message)));
        let routing =
            KvmIrqRouting::from_entries(&entries).map_err(|_| io::Error::other("too many interrupt routes"))?;
        self.vm.set_gsi_routing(&routing)?;
        table.stale = false;
        Ok(())
    }
}

/// The routes that KVM gives a machine with its interrupt controllers: each input to the I/O APIC, the first 16 to the two
/// PICs as well.
fn controllers() -> Vec<kvm_irq_routing_entry> {
    let entry = |gsi: u32, irqchip: u32, pin: u32| {
        let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
        entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
        entry
    };
    let pic = |gsi: u32| if gsi < 8 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
    let pics = (0..16).map(|gsi| entry(gsi, pic(gsi), gsi % 8));
    (0..PINS).map(|gsi| entry(gsi, KVM_IRQCHIP_IOAPIC, gsi)).chain(pics).collect()
}

fn msi(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    entry
}

impl Router for KvmRouter {
    fn reserve(&self) -> io::Result<Input> {
        let mut table = self.lock();
        let free = (PINS..MOST).find(|gsi| !table.reserved.contains(gsi));
        let gsi = free.ok_or_else(|| io::Error::other("all interrupt inputs are taken"))?;
        table.reserved.insert(gsi);
        Ok(Input(gsi))
    }

    fn release(&self, inputs: &[Input]) {
        let mut table = self.lock();
        for Input(gsi) in inputs {
            table.reserved.remove(gsi);
            // It leads nowhere with nothing attached; KVM may keep it until the next update.
            table.stale |= table.messages.remove(gsi).is_some();
        }
    }

    fn route(&self, routes: &[(Input, Option<Message>)]) -> io::Result<()> {
        let mut table = self.lock();
        let mut now = false;
        for (Input(gsi), message) in routes {
            let before = match message {
                Some(message) => table.messages.insert(*gsi, *message),
                None => table.messages.remove(gsi),
            };
            if before != *message {
                table.stale = true;
                now |= table.attached.contains_key(gsi);
            }
        }
        if now { self.update(&mut table) } else { Ok(()) }
    }

    fn attach(&self, input: Input, event: &EventFd, resample: Option<&EventFd>) -> io::Result<()> {
        let mut table = self.lock();
        self.update(&mut table)?;
        match resample {
            Some(resample) => self.vm.register_irqfd_with_resample(event, resample, input.0)?,
            None => self.vm.register_irqfd(event, input.0)?,
        }
        *table.attached.entry(input.0).or_default() += 1;
        Ok(())
    }

    fn inject(&self, message: Message) -> io::Result<()> {
        let Message { address, data } = message;
        let (address_lo, address_hi) = (address as u32, (address >> 32) as u32);
        // 0: the guest blocks it, by its own local APIC.
        self.vm.signal_msi(kvm_msi { address_lo, address_hi, data, ..Default::default() })?;
        Ok(())
    }

    fn detach(&self, input: Input, event: &EventFd) -> io::Result<()> {
        let mut table = self.lock();
        self.vm.unregister_irqfd(event, input.0)?;
        if let Some(count) = table.attached.get_mut(&input.0) {
            *count -= 1;
            if *count == 0 {
                table.attached.remove(&input.0);
            }
        }
        Ok(())
    }
}

impl Doorbells for KvmRouter {
    fn attach(&self, bell: Doorbell, event: &dyn AsRawFd) -> io::Result<()> {
        Ok(ioctl::ioeventfd(&self.vm, bell, event, true)?)
    }

    fn detach(&self, bell: Doorbell, event: &dyn AsRawFd) -> io::Result<()> {
        Ok(ioctl::ioeventfd(&self.vm, bell, event, false)?)
    }
}
