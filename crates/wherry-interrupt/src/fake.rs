//! A router that only remembers what it was told, for tests.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::{Input, Message, Router};

/// What it was told.
#[derive(Default)]
pub struct Told {
    next: u32,
    /// Inputs that are reserved.
    pub reserved: Vec<Input>,
    /// Where they lead.
    pub routes: BTreeMap<Input, Message>,
    /// What is attached to them, with the resample eventfds.
    pub attached: BTreeMap<Input, Vec<(EventFd, Option<EventFd>)>>,
    /// How often routes were set.
    pub batches: u32,
    /// What was raised without an eventfd.
    pub injected: Vec<Message>,
}

/// A router for tests. Inputs that are reserved count up from 24.
#[derive(Default)]
pub struct FakeRouter(Mutex<Told>);

impl FakeRouter {
    /// What it was told.
    pub fn told(&self) -> MutexGuard<'_, Told> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often what is attached to an input was signalled since it was last asked, or `None` if nothing is.
    pub fn delivered(&self, input: Input) -> Option<u64> {
        let told = self.told();
        let events = told.attached.get(&input).filter(|events| !events.is_empty())?;
        Some(events.iter().map(|(event, _)| event.read().unwrap_or(0)).sum())
    }

    /// Ends an interrupt of a pin, as a guest does.
    pub fn end_of_interrupt(&self, input: Input) {
        for (_, resample) in self.told().attached.get(&input).into_iter().flatten() {
            if let Some(resample) = resample {
                let _ = resample.write(1);
            }
        }
    }
}

impl Router for FakeRouter {
    fn reserve(&self) -> io::Result<Input> {
        let mut told = self.told();
        let input = Input(24 + told.next);
        told.next += 1;
        told.reserved.push(input);
        Ok(input)
    }

    fn release(&self, inputs: &[Input]) {
        let mut told = self.told();
        assert!(inputs.iter().all(|i| told.attached.get(i).is_none_or(Vec::is_empty)), "released with an eventfd");
        told.reserved.retain(|reserved| !inputs.contains(reserved));
        told.routes.retain(|input, _| !inputs.contains(input));
    }

    fn route(&self, routes: &[(Input, Option<Message>)]) -> io::Result<()> {
        let mut told = self.told();
        told.batches += 1;
        for (input, message) in routes {
            match message {
                Some(message) => told.routes.insert(*input, *message),
                None => told.routes.remove(input),
            };
        }
        Ok(())
    }

    fn attach(&self, input: Input, event: &EventFd, resample: Option<&EventFd>) -> io::Result<()> {
        let event = event.try_clone()?;
        let resample = resample.map(EventFd::try_clone).transpose()?;
        self.told().attached.entry(input).or_default().push((event, resample));
        Ok(())
    }

    fn inject(&self, message: Message) -> io::Result<()> {
        self.told().injected.push(message);
        Ok(())
    }

    fn detach(&self, input: Input, _event: &EventFd) -> io::Result<()> {
        match self.told().attached.get_mut(&input).and_then(Vec::pop) {
            Some(_) => Ok(()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }
}
