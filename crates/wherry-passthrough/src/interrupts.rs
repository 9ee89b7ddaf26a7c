//! Interrupts: from the device's eventfd to the hypervisor, or to where they wait.
//!
//! A vector has two eventfds (see [`wherry_interrupt::Vector`]): the device is told which one to signal whenever the guest
//! masks or unmasks it, and what went to the old one meanwhile is collected after the device has answered. The pin is
//! level-triggered: the device masks itself when it has signalled, and is unmasked when the guest has ended the interrupt: the
//! hypervisor writes to an eventfd then, which the owner reads, or a thread of ours that asks it (vfio-user has no other way).

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use wherry_interrupt::{Event, ForeignIntx, InterruptError, Signal, Vector, Vectors};
use wherry_pci::{ConfigSpace, Msi, Msix};

use crate::owner::{Irq, Owner, OwnerError};
use crate::saved::SavedTold;

/// What the owner was told.
#[derive(Default)]
struct Told {
    irq: Option<Irq>,
    signals: Vec<Signal>,
    /// The owner takes no eventfd that unmasks the pin.
    asks: bool,
    /// Unmasks the pin then, but at rest.
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

fn event_of(vector: &Vector, signal: Signal) -> BorrowedFd<'_> {
    match signal {
        Signal::Interrupt => vector.interrupt_event().as_fd(),
        Signal::KvmInterrupt => vector.kvm_interrupt_event().as_fd(),
    }
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
        vectors
            .into_iter()
            .flat_map(|vectors| (0..count.min(vectors.len())).filter_map(|index| vectors.get(index)))
            .collect()
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
            owner.signal(irq, 0, &[pin.event().as_fd()])?;
            told.asks = !owner.unmask_by(pin.unmask_event().as_fd())?;
            self.unmask(owner, told);
            return Ok(());
        }
        let vectors = self.vectors(irq, count);
        told.signals = vectors.iter().map(|vector| vector.signal()).collect();
        let events: Vec<_> = vectors.iter().zip(&told.signals).map(|(vector, to)| event_of(vector, *to)).collect();
        owner.signal(irq, 0, &events)
    }

    /// Has the pin unmasked from now on, if that takes a thread.
    fn unmask(&self, owner: &Arc<dyn Owner>, told: &mut Told) {
        let Some(pin) = self.pin.as_ref().filter(|_| told.irq == Some(Irq::Intx) && told.asks) else { return };
        if told.unmasker.is_none() {
            told.unmasker = Unmasker::start(owner.clone(), pin.clone())
                .inspect_err(|error| tracing::error!(device = owner.name(), %error, "unmasking its pin"))
                .ok();
        }
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

    /// Nobody asks the owner to unmask a pin, until [`resume`](Self::resume).
    pub(crate) fn leave_masked(&self) {
        self.told().unmasker = None;
    }

    /// What the owner was told.
    pub(crate) fn save(&self) -> SavedTold {
        let told = self.told();
        SavedTold {
            irq: told.irq.map_or(0, |irq| irq as u32 + 1),
            delivered: told.signals.iter().map(|signal| *signal == Signal::KvmInterrupt).collect(),
            asks: told.asks,
        }
    }

    /// Takes what the owner was told by the process before. After the vectors.
    pub(crate) fn restore(&self, saved: &SavedTold) -> Result<(), String> {
        let irq = match saved.irq {
            0 => None,
            1 => Some(Irq::Intx),
            2 => Some(Irq::Msi),
            3 => Some(Irq::Msix),
            other => return Err(format!("interrupts of kind {other}")),
        };
        let there = irq.map_or(0, |irq| self.vectors(irq, usize::MAX).len());
        if saved.delivered.len() > there {
            return Err(format!("{} vectors, and there are {there}", saved.delivered.len()));
        }
        let mut told = self.told();
        let signal = |delivered: &bool| if *delivered { Signal::KvmInterrupt } else { Signal::Interrupt };
        told.signals = saved.delivered.iter().map(signal).collect();
        (told.irq, told.asks) = (irq, saved.asks);
        match (irq, &self.pin) {
            // At rest, so that nothing is attached yet.
            (Some(Irq::Intx), Some(pin)) => pin.enable(true).map_err(|error| error.to_string()),
            (Some(Irq::Intx), None) => Err("a pin".into()),
            _ => Ok(()),
        }
    }

    /// Takes the vectors from the hypervisor while the guest runs, which is about to be stopped; or gives them back.
    pub(crate) fn relay(&self, relayed: bool) -> Result<(), InterruptError> {
        let vectors = [self.msix.as_ref().map(Msix::vectors), self.msi.as_ref().map(Msi::vectors)];
        let turn = |vectors: &Vectors| if relayed { vectors.relay() } else { vectors.end_relay() };
        vectors.into_iter().flatten().map(turn).fold(Ok(()), Result::and)
    }

    /// Detaches all eventfds: what is signalled from now on waits. The device is at rest, or its owner is.
    pub(crate) fn rest(&self) -> Result<(), InterruptError> {
        let msix = self.msix.as_ref().map_or(Ok(()), |msix| msix.vectors().rest());
        let msi = self.msi.as_ref().map_or(Ok(()), |msi| msi.vectors().rest());
        msix.and(msi).and(self.pin.as_ref().map_or(Ok(()), |pin| pin.rest()))
    }

    /// Attaches them again, and delivers what waits. Local APICs and the I/O APIC have been restored.
    pub(crate) fn resume(&self, owner: &Arc<dyn Owner>) -> Result<(), InterruptError> {
        self.unmask(owner, &mut self.told());
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
    quit: Arc<Event>,
    thread: Option<JoinHandle<()>>,
}

impl Unmasker {
    fn start(owner: Arc<dyn Owner>, pin: Arc<ForeignIntx>) -> std::io::Result<Self> {
        let quit = Arc::new(Event::new()?);
        let quitting = quit.clone();
        let run = move || loop {
            let mut events = [PollFd::new(pin.unmask_event(), PollFlags::IN), PollFd::new(&*quitting, PollFlags::IN)];
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
