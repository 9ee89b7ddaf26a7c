//! Interrupts: from the device's eventfd to the hypervisor, or to where they wait.
//!
//! A vector has two eventfds (see [`wherry_interrupt::Vector`]): the device is told which one to signal whenever the guest
//! masks or unmasks it, and what went to the old one meanwhile is collected after the device has answered. The pin is
//! level-triggered: the device masks itself when it has signalled, and is unmasked when the guest has ended the interrupt: the
//! hypervisor writes to an eventfd then, which the owner reads, or a thread of ours that asks it (vfio-user has no other way).
#![expect(unsafe_code, reason = "borrows the descriptors of eventfds, which do not lend them")]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use wherry_interrupt::{ForeignIntx, InterruptError, Signal, Vector};
use wherry_pci::{ConfigSpace, Msi, Msix};

use crate::owner::{Irq, Owner, OwnerError};

/// What the owner was told.
#[derive(Default)]
struct Told {
    irq: Option<Irq>,
    signals: Vec<Signal>,
    /// Unmasks the pin, where the owner takes no eventfd for that.
    unmasker: Option<Unmasker>,
}

/// The interrupts of a function: one kind at a time.
pub(crate) struct Interrupts {
    pub(crate) msix: Option<Msix>,
    pub(crate) msi: Option<Msi>,
    pub(crate) pin: Option<Arc<ForeignIntx>>,
    /// Held while the owner is asked.
    told: Mutex<Told>,
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as the eventfd is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

fn event_of(vector: &Vector, signal: Signal) -> BorrowedFd<'_> {
    borrow(match signal {
        Signal::Interrupt => vector.interrupt_event(),
        Signal::KvmInterrupt => vector.kvm_interrupt_event(),
    })
}

impl Interrupts {
    pub(crate) fn new(msix: Option<Msix>, msi: Option<Msi>, pin: Option<ForeignIntx>) -> Self {
        Self { msix, msi, pin: pin.map(Arc::new), told: Mutex::default() }
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the guest has switched on, and how many vectors of it.
    fn wanted(&self, config: &ConfigSpace) -> Option<(Irq, usize)> {
        if let Some(msix) = self.msix.as_ref().filter(|msix| msix.enabled()) {
            return Some((Irq::Msix, msix.vectors().len()));
        }
        if let Some(msi) = self.msi.as_ref().filter(|msi| msi.enabled(config)) {
            return Some((Irq::Msi, msi.used(config).into()));
        }
        (self.pin.is_some() && config.intx_enabled()).then_some((Irq::Intx, 0))
    }

    fn vectors(&self, irq: Irq, count: usize) -> Vec<&Arc<Vector>> {
        let vectors = match irq {
            Irq::Msix => self.msix.as_ref().map(Msix::vectors),
            Irq::Msi => self.msi.as_ref().map(Msi::vectors),
            Irq::Intx => None,
        };
        vectors.into_iter().flat_map(|vectors| (0..count).filter_map(|index| vectors.get(index))).collect()
    }

    /// Follows what was written to configuration space, or restored.
    pub(crate) fn follow(&self, owner: &Arc<dyn Owner>, config: &ConfigSpace) -> Result<(), OwnerError> {
        if let Some(msix) = &self.msix {
            msix.follow(config);
        }
        if let Some(msi) = &self.msi {
            msi.follow(config);
        }
        let wanted = self.wanted(config);
        let mut told = self.told();
        let (irq, count) = wanted.map_or((None, 0), |(irq, count)| (Some(irq), count));
        if (told.irq, told.signals.len()) != (irq, count) {
            self.switch_off(owner, &mut told)?;
            if let Some(irq) = irq {
                self.switch_on(owner, irq, count, &mut told)?;
            }
        }
        self.turn(&**owner, &mut told)
    }

    /// Follows what was written to the table of MSI-X.
    pub(crate) fn follow_table(&self, owner: &dyn Owner) -> Result<(), OwnerError> {
        self.turn(owner, &mut self.told())
    }

    fn switch_off(&self, owner: &Arc<dyn Owner>, told: &mut Told) -> Result<(), OwnerError> {
        let Some(irq) = told.irq.take() else { return Ok(()) };
        let count = std::mem::take(&mut told.signals).len();
        told.unmasker = None;
        if let (Irq::Intx, Some(pin)) = (irq, &self.pin) {
            report(owner, pin.enable(false));
        }
        let silenced = owner.silence(irq);
        self.vectors(irq, count).into_iter().for_each(|vector| vector.collect());
        silenced
    }

    fn switch_on(&self, owner: &Arc<dyn Owner>, irq: Irq, count: usize, told: &mut Told) -> Result<(), OwnerError> {
        told.irq = Some(irq);
        if let (Irq::Intx, Some(pin)) = (irq, &self.pin) {
            report(owner, pin.enable(true));
            owner.signal(irq, 0, &[borrow(pin.event())])?;
            if !owner.unmask_by(borrow(pin.unmask_event()))? {
                told.unmasker = Unmasker::start(owner.clone(), pin.clone())
                    .inspect_err(|error| tracing::error!(device = owner.name(), %error, "unmasking its pin"))
                    .ok();
            }
            return Ok(());
        }
        let vectors = self.vectors(irq, count);
        told.signals = vectors.iter().map(|vector| vector.signal()).collect();
        let events: Vec<_> = vectors.iter().zip(&told.signals).map(|(vector, to)| event_of(vector, *to)).collect();
        owner.signal(irq, 0, &events)
    }

    /// Tells the owner of vectors that signal elsewhere now, in runs.
    fn turn(&self, owner: &dyn Owner, told: &mut Told) -> Result<(), OwnerError> {
        let Some(irq) = told.irq else { return Ok(()) };
        let vectors = self.vectors(irq, told.signals.len());
        let mut at = 0;
        while at < vectors.len() {
            let turned = |index: usize| vectors[index].signal() != told.signals[index];
            let len = (at..vectors.len()).take_while(|index| turned(*index)).count();
            if len > 0 {
                let run = at..at + len;
                let signals: Vec<_> = vectors[run.clone()].iter().map(|vector| vector.signal()).collect();
                let events: Vec<_> =
                    vectors[run.clone()].iter().zip(&signals).map(|(vector, to)| event_of(vector, *to)).collect();
                owner.signal(irq, at as u32, &events)?;
                // What went to the eventfds from before.
                vectors[run.clone()].iter().for_each(|vector| vector.collect());
                told.signals[run].copy_from_slice(&signals);
            }
            at += len.max(1);
        }
        Ok(())
    }

    /// The device signals nobody from now on: it is about to be reset.
    pub(crate) fn silence(&self, owner: &Arc<dyn Owner>) -> Result<(), OwnerError> {
        self.switch_off(owner, &mut self.told())
    }

    /// Whether the pin is in use.
    pub(crate) fn uses_pin(&self) -> bool {
        self.told().irq == Some(Irq::Intx)
    }

    /// Detaches all eventfds: what is signalled from now on waits. The device is at rest.
    pub(crate) fn rest(&self) -> Result<(), InterruptError> {
        let msix = self.msix.as_ref().map_or(Ok(()), |msix| msix.vectors().rest());
        let msi = self.msi.as_ref().map_or(Ok(()), |msi| msi.vectors().rest());
        msix.and(msi).and(self.pin.as_ref().map_or(Ok(()), |pin| pin.rest()))
    }

    /// Attaches them again, and delivers what waits. Local APICs and the I/O APIC have been restored.
    pub(crate) fn resume(&self) -> Result<(), InterruptError> {
        let msix = self.msix.as_ref().map_or(Ok(()), |msix| msix.vectors().resume());
        let msi = self.msi.as_ref().map_or(Ok(()), |msi| msi.vectors().resume());
        msix.and(msi).and(self.pin.as_ref().map_or(Ok(()), |pin| pin.resume()))
    }
}

fn report(owner: &Arc<dyn Owner>, result: Result<(), InterruptError>) {
    if let Err(error) = result {
        tracing::error!(device = owner.name(), %error, "its interrupt pin");
    }
}

/// The thread `pin-unmask`: unmasks a pin whose owner has to be asked each time.
struct Unmasker {
    quit: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Unmasker {
    fn start(owner: Arc<dyn Owner>, pin: Arc<ForeignIntx>) -> std::io::Result<Self> {
        let quit = EventFd::new(EFD_NONBLOCK)?;
        let quitting = quit.try_clone()?;
        let run = move || loop {
            let mut events = [
                PollFd::from_borrowed_fd(borrow(pin.unmask_event()), PollFlags::IN),
                PollFd::from_borrowed_fd(borrow(&quitting), PollFlags::IN),
            ];
            match poll(&mut events, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return tracing::error!(device = owner.name(), %error, "waiting to unmask its pin"),
            }
            if quitting.read().is_ok() {
                return;
            }
            if pin.unmask_event().read().is_ok()
                && let Err(error) = owner.unmask()
            {
                tracing::warn!(%error, "unmasking a pin");
            }
        };
        let thread = std::thread::Builder::new().name("pin-unmask".into()).spawn(run)?;
        Ok(Self { quit, thread: Some(thread) })
    }
}

impl Drop for Unmasker {
    fn drop(&mut self) {
        let _ = self.quit.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
