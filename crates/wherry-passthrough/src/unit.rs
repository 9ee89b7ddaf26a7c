//! The state units: one for each function, and one where the loading of all of them is waited for.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use wherry_state::{Saved, SavedState, Section, StateError, StateUnit, UnitError, UnitId};

use crate::function::Function;
use crate::saved::{SavedGathering, SavedKept, SavedPassthrough};
use crate::worker::{Crew, Late, Step};

/// How long a device may take to load its state, and to run.
pub(crate) const LOAD_LIMIT: Duration = Duration::from_secs(30);
const RUN_LIMIT: Duration = Duration::from_secs(5);

impl Function {
    fn bad(&self, reason: impl Into<String>) -> UnitError {
        StateError::Decode { unit: self.id(), reason: reason.into() }.into()
    }

    fn late(&self, what: &str, late: Late) -> UnitError {
        match late {
            Late::Deadline => UnitError::Deadline(format!("{} did not {what}", self.owner().name())),
            Late::Failed(reason) => UnitError::failed(reason),
        }
    }
}

impl StateUnit for Function {
    fn id(&self) -> UnitId {
        UnitId::new(self.owner().kind(), self.instance)
    }

    fn depends_on(&self) -> &[&str] {
        &["irqchip", "pci-host"]
    }

    fn schema(&self) -> u32 {
        SavedPassthrough::SCHEMA
    }

    fn drain(&self, _deadline: Instant) -> Result<(), UnitError> {
        match self.blocker() {
            Some(reason) => Err(UnitError::failed(reason)),
            None if self.registry.is_leaving() => {
                // Not in the blackout: a thread ends here.
                self.listen(false).map_err(UnitError::failed)?;
                self.interrupts.relay(true).map_err(UnitError::failed)
            }
            None => Ok(()),
        }
    }

    fn undrain(&self) -> Result<(), UnitError> {
        let attached = self.interrupts.relay(false).map_err(UnitError::failed);
        attached.and(self.listen(true).map_err(UnitError::failed))
    }

    /// vCPUs may still use it.
    fn begin_stop(&self) -> Result<(), UnitError> {
        Ok(())
    }

    /// vCPUs are at rest. When the device is, too, eventfds can be detached, before local APICs are saved.
    fn finish_stop(&self, deadline: Instant) -> Result<(), UnitError> {
        if self.registry.is_leaving() {
            // It runs on: the next process of the machine shows it the same memory, and its interrupts wait.
            self.interrupts.leave_masked();
            let left = self.owner().rest(deadline).map_err(|error| {
                self.report("leaving it to another process", &error);
                UnitError::failed(error)
            })?;
            *self.left.lock().unwrap_or_else(PoisonError::into_inner) = Some(left);
            return self.interrupts.rest().map_err(UnitError::failed);
        }
        self.crew.hand(&self.member, Step::Rest(deadline), deadline);
        let stopped = self.member.wait(deadline).map_err(|late| self.late("stop", late));
        stopped.and(self.interrupts.rest().map_err(UnitError::failed))
    }

    fn save(&self) -> Result<Saved, UnitError> {
        let left = self.left.lock().unwrap_or_else(PoisonError::into_inner).take();
        let kept = left.map(|owner| SavedKept { told: Some(self.interrupts.save()), owner });
        let streamed = if kept.is_some() {
            0
        } else {
            let place = self.place();
            place.whole.then_some(place.offset).ok_or_else(|| UnitError::failed("its state has not all been read"))?
        };
        // What it writes now is in no log that anybody reads again.
        let late = if kept.is_some() { 0 } else { self.log().late().map_err(UnitError::failed)? };
        match late {
            0 => {}
            pages => {
                let name = self.owner().name();
                return Err(UnitError::failed(format!("{name} wrote to {pages} pages after it had come to rest")));
            }
        }
        let mut config = self.registers().config.save();
        config.truncate(config.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
        let saved = SavedPassthrough {
            config,
            msix: self.interrupts.msix.as_ref().map(|msix| msix.save()),
            msi: self.interrupts.msi.as_ref().map(|msi| msi.vectors().save()).unwrap_or_default(),
            device: Vec::new(),
            streamed,
            kept,
        };
        Ok(Saved::Section(saved.to_section(&self.id())))
    }

    /// Loading goes on when this returns, beside that of other functions: see [`Gathering`].
    fn restore(&self, section: &Section) -> Result<(), UnitError> {
        self.once.restoring()?;
        let SavedPassthrough { mut config, msix, msi, device, streamed, kept } =
            SavedPassthrough::from_section(section)?;
        if config.len() > 4096 {
            return Err(self.bad(format!("configuration space of {} bytes", config.len())));
        }
        config.resize(4096, 0);
        let mut guard = self.registers();
        let registers = &mut *guard;
        registers.config.restore(&config).map_err(|e| self.bad(e.to_string()))?;
        match (&self.interrupts.msix, &msix) {
            (Some(ours), Some(saved)) => {
                ours.restore(saved, &registers.config).map_err(|e| self.bad(e.to_string()))?;
            }
            (None, None) => {}
            _ => return Err(self.bad("only one side has MSI-X")),
        }
        let vectors = self.interrupts.msi.as_ref().map(|msi| msi.vectors());
        if msi.len() != vectors.map_or(0, |vectors| vectors.len()) {
            return Err(self.bad(format!("{} vectors of MSI", msi.len())));
        }
        if let Some(vectors) = vectors {
            vectors.restore(&msi).map_err(UnitError::failed)?;
        }
        self.interrupts.rest().map_err(UnitError::failed)?;
        registers.bars.follow(&registers.config);
        drop(guard);
        if let Some(SavedKept { told, owner }) = kept {
            if !self.owner().is_inherited() {
                return Err(self.bad("a connection that this process does not have"));
            }
            let told = told.ok_or_else(|| self.bad("nothing of what its owner was told"))?;
            self.interrupts.restore(&told).map_err(|reason| self.bad(reason))?;
            return self.owner().take(&owner).map_err(|error| self.bad(error.to_string()));
        }
        let mut place = self.place();
        if !place.loading {
            self.begin_to_load(&mut place)?;
        }
        // Schema 1 has it in the section.
        place.offset += device.len() as u64;
        let (there, said) = (place.offset, streamed + device.len() as u64);
        drop(place);
        if there != said {
            return Err(self.bad(format!("{there} bytes of the device's state came, and {said} were given")));
        }
        let put = if device.is_empty() { Ok(()) } else { self.member.pieces.put(device) };
        put.map_err(|broken| UnitError::failed(broken.reason()))?;
        self.member.pieces.finish();
        Ok(())
    }

    /// Local APICs and the I/O APIC have been restored: vectors first, then the device, which may use them at once.
    ///
    /// A device that does not run again is lost to its guest, and named; the machine starts without it, since nobody else can run
    /// that machine any more.
    fn start(&self) -> Result<(), UnitError> {
        self.once.started();
        self.forget_stream();
        self.left.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.interrupts.resume(self.owner()).map_err(UnitError::failed)?;
        self.owner().go_on();
        self.listen(true).map_err(UnitError::failed)?;
        let deadline = Instant::now() + RUN_LIMIT;
        self.crew.hand(&self.member, Step::Run, deadline);
        if let Err(late) = self.member.wait(deadline) {
            let failed = matches!(late, Late::Failed(_));
            let error = self.late("run again", late);
            tracing::error!(device = self.owner().name(), %error, "the machine goes on without it");
            if failed {
                self.lose(error.to_string());
            }
        }
        Ok(())
    }
}

/// Where the loading of all functions is waited for: they load side by side, and what fails has to be told before the machine
/// is ready.
pub struct Gathering {
    crew: Arc<Crew>,
    limit: Duration,
}

impl Gathering {
    /// Of these functions.
    pub fn new(crew: Arc<Crew>) -> Self {
        Self::within(crew, LOAD_LIMIT)
    }

    /// Of these functions, which may take so long to load.
    pub fn within(crew: Arc<Crew>, limit: Duration) -> Self {
        Self { crew, limit }
    }
}

impl StateUnit for Gathering {
    fn id(&self) -> UnitId {
        UnitId::new("passthrough", 0)
    }

    fn depends_on(&self) -> &[&str] {
        &[crate::VFIO_USER, crate::VFIO]
    }

    fn schema(&self) -> u32 {
        SavedGathering::SCHEMA
    }

    fn drain(&self, _deadline: Instant) -> Result<(), UnitError> {
        Ok(())
    }

    fn undrain(&self) -> Result<(), UnitError> {
        Ok(())
    }

    fn begin_stop(&self) -> Result<(), UnitError> {
        Ok(())
    }

    fn finish_stop(&self, _deadline: Instant) -> Result<(), UnitError> {
        Ok(())
    }

    fn save(&self) -> Result<Saved, UnitError> {
        let saved = SavedGathering { functions: self.crew.members().len() as u32 };
        Ok(Saved::Section(saved.to_section(&self.id())))
    }

    fn restore(&self, section: &Section) -> Result<(), UnitError> {
        let saved = SavedGathering::from_section(section)?;
        let members = self.crew.members();
        if saved.functions as usize != members.len() {
            let reason = format!("{} functions of other processes, and there are {}", saved.functions, members.len());
            return Err(StateError::Decode { unit: self.id(), reason }.into());
        }
        let deadline = Instant::now() + self.limit;
        let failures: Vec<_> = members
            .iter()
            .filter_map(|member| match member.wait(deadline) {
                Ok(_) => None,
                Err(Late::Failed(reason)) => Some(reason),
                Err(Late::Deadline) => {
                    Some(format!("{} did not take its state within {:?}", member.name(), self.limit))
                }
            })
            .collect();
        if failures.is_empty() { Ok(()) } else { Err(UnitError::failed(failures.join("; "))) }
    }

    fn start(&self) -> Result<(), UnitError> {
        Ok(())
    }
}
