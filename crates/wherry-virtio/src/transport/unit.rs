//! The state unit of a virtio device: transport and device together.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Instant;

use wherry_interrupt::InterruptError;
use wherry_state::{Saved, Section, StateError, StateUnit, UnitError, UnitId};

use super::VirtioPci;
use super::common::DRIVER_OK;
use crate::saved::SavedTransport;

fn failed(error: InterruptError) -> UnitError {
    UnitError::failed(error)
}

impl VirtioPci {
    fn bad(&self, reason: impl Into<String>) -> UnitError {
        StateError::Decode { unit: self.id(), reason: reason.into() }.into()
    }

    fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }
}

impl StateUnit for VirtioPci {
    fn id(&self) -> UnitId {
        UnitId::new(self.device.kind().name, self.instance)
    }

    fn depends_on(&self) -> &[&str] {
        &["irqchip", "pci-host"]
    }

    fn schema(&self) -> u32 {
        self.device.schema()
    }

    fn drain(&self, deadline: Instant) -> Result<(), UnitError> {
        self.device.serving().drain(deadline)?;
        if self.registry.is_leaving() { self.shared.msix.vectors().relay().map_err(failed) } else { Ok(()) }
    }

    fn undrain(&self) -> Result<(), UnitError> {
        self.device.start();
        self.shared.msix.vectors().end_relay().map_err(failed)
    }

    fn begin_stop(&self) -> Result<(), UnitError> {
        self.device.serving().quiesce();
        Ok(())
    }

    /// The vCPUs are at rest, and the device raises no interrupt any more: now eventfds can be detached, which has to be
    /// done before local APICs are saved.
    fn finish_stop(&self, deadline: Instant) -> Result<(), UnitError> {
        let stopped = self.device.serving().stop(deadline);
        let vectors = self.shared.msix.vectors().rest().map_err(failed);
        let pin = self.shared.intx.rest().map_err(failed);
        stopped.and(vectors).and(pin)
    }

    fn save(&self) -> Result<Saved, UnitError> {
        let registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut config = registers.config.save();
        config.truncate(config.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
        let shared = &self.shared;
        let mut saved = SavedTransport {
            config,
            msix: Some(shared.msix.save()),
            status: shared.status.load(Ordering::Acquire).into(),
            isr: shared.isr.load(Ordering::Acquire).into(),
            generation: shared.generation.load(Ordering::Acquire).into(),
            config_vector: shared.config_vector.load(Ordering::Acquire).into(),
            ..Default::default()
        };
        let positions = if self.is_active() { self.device.serving().positions() } else { Vec::new() };
        let vector = |ring: u16| shared.ring_vectors[usize::from(ring)].load(Ordering::Acquire);
        registers.common.save(&mut saved, vector, &positions);
        Ok(Saved::Section(self.device.save(saved)))
    }

    fn restore(&self, section: &Section) -> Result<(), UnitError> {
        self.once.restoring()?;
        let saved = self.device.restore(section)?;
        let Some(msix) = &saved.msix else { return Err(self.bad("MSI-X is missing")) };
        let byte =
            |what: &str, value: u32| u8::try_from(value).map_err(|_| self.bad(format!("{what} {value:#x} is no byte")));
        let vector = |value: u32| match u16::try_from(value) {
            Ok(value) if value == super::NO_VECTOR || self.shared.msix.vector(value).is_some() => Ok(value),
            _ => Err(self.bad(format!("there is no vector {value:#x}"))),
        };
        let (status, isr) = (byte("status", saved.status)?, byte("interrupt status", saved.isr)?);
        let generation = byte("configuration number", saved.generation)?;
        let config_vector = vector(saved.config_vector)?;
        let vectors = saved.rings.iter().map(|ring| vector(ring.vector)).collect::<Result<Vec<_>, _>>()?;

        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        registers.common.restore(&saved).map_err(|reason| self.bad(reason))?;
        let mut config = saved.config.clone();
        if config.len() > 4096 {
            return Err(self.bad(format!("configuration space of {} bytes", config.len())));
        }
        config.resize(4096, 0);
        registers.config.restore(&config).map_err(|e| self.bad(e.to_string()))?;
        self.shared.msix.restore(msix, &registers.config).map_err(|e| self.bad(e.to_string()))?;
        self.shared.intx.rest().map_err(failed)?;
        self.follow(&mut registers);
        drop(registers);

        let shared = &self.shared;
        shared.status.store(status, Ordering::Release);
        shared.isr.store(isr, Ordering::Release);
        shared.generation.store(generation, Ordering::Release);
        shared.config_vector.store(config_vector, Ordering::Release);
        for (slot, vector) in shared.ring_vectors.iter().zip(vectors) {
            slot.store(vector, Ordering::Release);
        }
        shared.intx.set_level(isr != 0).map_err(failed)
    }

    /// Local APICs and the I/O APIC have been restored: vectors first, then the device, which may use them at once.
    fn start(&self) -> Result<(), UnitError> {
        let restored = self.once.started();
        self.shared.msix.vectors().resume().map_err(failed)?;
        self.shared.intx.resume().map_err(failed)?;
        let status = self.shared.status.load(Ordering::Acquire);
        let live = status & (DRIVER_OK | super::FAILED | super::NEEDS_RESET) == DRIVER_OK;
        if restored && status & DRIVER_OK != 0 && !self.active.swap(true, Ordering::AcqRel) && live {
            self.activate();
        }
        self.device.start();
        Ok(())
    }
}
