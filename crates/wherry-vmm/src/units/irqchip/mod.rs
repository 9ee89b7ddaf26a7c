//! The unit `irqchip`: both PICs and the IOAPIC in KVM. Local APICs belong to their vCPUs.
//!
//! Setting the IOAPIC with pins that request delivers those interrupts to the local APICs at once, and a local APIC that
//! is restored afterwards forgets them; a level-triggered pin would wait for its end-of-interrupt for ever. But vCPUs
//! must be restored (and started) after everything else. So `restore` sets the IOAPIC without requests, and `start`,
//! which comes after all restores, sets it again with them.
#![expect(unsafe_code, reason = "KVM's union of interrupt controllers")]

pub mod saved;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_ioapic_state,
    kvm_ioapic_state__bindgen_ty_1, kvm_irqchip, kvm_irqchip__bindgen_ty_1, kvm_pic_state,
};
use kvm_ioctls::VmFd;
use wherry_state::{Saved, SavedState, Section, StateUnit, UnitError, UnitId};

use self::saved::{Ioapic, IrqchipState, Pic};
use super::{Once, bad, kvm};

pub(crate) struct IrqchipUnit {
    vm: Arc<VmFd>,
    /// The IOAPIC with its requests, between `restore` and `start`.
    requests: Mutex<Option<kvm_ioapic_state>>,
    once: Once,
}

impl IrqchipUnit {
    pub(crate) fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, requests: Mutex::new(None), once: Once::default() }
    }

    fn pic(&self, chip_id: u32) -> Result<kvm_pic_state, UnitError> {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        self.vm.get_irqchip(&mut chip).map_err(kvm("reading a PIC"))?;
        // SAFETY: KVM filled the member that belongs to this chip_id; any bytes are valid in it.
        Ok(unsafe { chip.chip.pic })
    }

    fn set_pic(&self, chip_id: u32, pic: kvm_pic_state) -> Result<(), UnitError> {
        let chip = kvm_irqchip { chip_id, pad: 0, chip: kvm_irqchip__bindgen_ty_1 { pic } };
        self.vm.set_irqchip(&chip).map_err(kvm("setting a PIC"))
    }

    fn ioapic(&self) -> Result<kvm_ioapic_state, UnitError> {
        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        self.vm.get_irqchip(&mut chip).map_err(kvm("reading the IOAPIC"))?;
        // SAFETY: KVM filled the member that belongs to this chip_id; any bytes are valid in it.
        Ok(unsafe { chip.chip.ioapic })
    }

    fn set_ioapic(&self, ioapic: kvm_ioapic_state) -> Result<(), UnitError> {
        let chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, pad: 0, chip: kvm_irqchip__bindgen_ty_1 { ioapic } };
        self.vm.set_irqchip(&chip).map_err(kvm("setting the IOAPIC"))
    }
}

impl From<&kvm_pic_state> for Pic {
    fn from(p: &kvm_pic_state) -> Self {
        Self {
            last_irr: p.last_irr.into(),
            irr: p.irr.into(),
            imr: p.imr.into(),
            isr: p.isr.into(),
            priority_add: p.priority_add.into(),
            irq_base: p.irq_base.into(),
            read_reg_select: p.read_reg_select.into(),
            poll: p.poll.into(),
            special_mask: p.special_mask.into(),
            init_state: p.init_state.into(),
            auto_eoi: p.auto_eoi.into(),
            rotate_on_auto_eoi: p.rotate_on_auto_eoi.into(),
            special_fully_nested_mode: p.special_fully_nested_mode.into(),
            init4: p.init4.into(),
            elcr: p.elcr.into(),
            elcr_mask: p.elcr_mask.into(),
        }
    }
}

impl From<&Pic> for kvm_pic_state {
    fn from(p: &Pic) -> Self {
        Self {
            last_irr: p.last_irr as u8,
            irr: p.irr as u8,
            imr: p.imr as u8,
            isr: p.isr as u8,
            priority_add: p.priority_add as u8,
            irq_base: p.irq_base as u8,
            read_reg_select: p.read_reg_select as u8,
            poll: p.poll as u8,
            special_mask: p.special_mask as u8,
            init_state: p.init_state as u8,
            auto_eoi: p.auto_eoi as u8,
            rotate_on_auto_eoi: p.rotate_on_auto_eoi as u8,
            special_fully_nested_mode: p.special_fully_nested_mode as u8,
            init4: p.init4 as u8,
            elcr: p.elcr as u8,
            elcr_mask: p.elcr_mask as u8,
        }
    }
}

impl From<&kvm_ioapic_state> for Ioapic {
    fn from(i: &kvm_ioapic_state) -> Self {
        // SAFETY: the union is the 64 bits of a redirection entry, whole or by fields.
        let redirections = i.redirtbl.iter().map(|entry| unsafe { entry.bits }).collect();
        Self { base_address: i.base_address, select: i.ioregsel, id: i.id, irr: i.irr, redirections }
    }
}

/// KVM's IOAPIC from the saved one; `None` if there are not 24 entries.
fn ioapic(i: &Ioapic) -> Option<kvm_ioapic_state> {
    let entries: Vec<_> = i.redirections.iter().map(|bits| kvm_ioapic_state__bindgen_ty_1 { bits: *bits }).collect();
    Some(kvm_ioapic_state {
        base_address: i.base_address,
        ioregsel: i.select,
        id: i.id,
        irr: i.irr,
        pad: 0,
        redirtbl: entries.try_into().ok()?,
    })
}

impl StateUnit for IrqchipUnit {
    fn id(&self) -> UnitId {
        UnitId::new("irqchip", 0)
    }

    fn depends_on(&self) -> &[&str] {
        &["clock"]
    }

    fn schema(&self) -> u32 {
        IrqchipState::SCHEMA
    }

    fn drain(&self, _: Instant) -> Result<(), UnitError> {
        Ok(())
    }

    fn undrain(&self) -> Result<(), UnitError> {
        Ok(())
    }

    fn begin_stop(&self) -> Result<(), UnitError> {
        Ok(())
    }

    fn finish_stop(&self, _: Instant) -> Result<(), UnitError> {
        Ok(())
    }

    fn save(&self) -> Result<Saved, UnitError> {
        let state = IrqchipState {
            pic_master: Some(Pic::from(&self.pic(KVM_IRQCHIP_PIC_MASTER)?)),
            pic_slave: Some(Pic::from(&self.pic(KVM_IRQCHIP_PIC_SLAVE)?)),
            ioapic: Some(Ioapic::from(&self.ioapic()?)),
        };
        Ok(Saved::Section(state.to_section(&self.id())))
    }

    fn restore(&self, section: &Section) -> Result<(), UnitError> {
        let state = IrqchipState::from_section(section)?;
        let (Some(master), Some(slave)) = (&state.pic_master, &state.pic_slave) else {
            return Err(bad(section, "a PIC is missing"));
        };
        let full = state.ioapic.as_ref().and_then(ioapic);
        let full = full.ok_or_else(|| bad(section, "the IOAPIC is missing or has not 24 entries"))?;
        self.once.restoring()?;
        self.set_pic(KVM_IRQCHIP_PIC_MASTER, master.into())?;
        self.set_pic(KVM_IRQCHIP_PIC_SLAVE, slave.into())?;
        self.set_ioapic(kvm_ioapic_state { irr: 0, ..full })?;
        if full.irr != 0 {
            *self.requests.lock().unwrap_or_else(PoisonError::into_inner) = Some(full);
        }
        Ok(())
    }

    fn start(&self) -> Result<(), UnitError> {
        self.once.started();
        match self.requests.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(full) => self.set_ioapic(full),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ioapic_comes_back_with_every_entry() {
        let redirections: Vec<u64> = (0..24).map(|i| 0x0100_0000_0001_0020 + i).collect();
        let saved = Ioapic { base_address: 0xfec0_0000, select: 3, id: 1, irr: 1 << 23, redirections };
        assert_eq!(Ioapic::from(&ioapic(&saved).unwrap()), saved);
        assert!(ioapic(&Ioapic { redirections: vec![0; 23], ..saved }).is_none());
    }
}
