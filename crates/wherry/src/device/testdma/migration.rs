//! How the device is migrated: brought to rest, saved, loaded.
//!
//! In a P2P state it does no DMA any more, but takes writes to its registers, as it does in `STOP`. The engine is at rest when it
//! was told so under its lock: no access is under way then, and all that were made are in the log.
//!
//! To another process of the same host it goes as it runs ([`Kept`]): its thread is parked. Its scratch page and its doorbell are the
//! same there, and its interrupts are the server's to carry.

use prost::Message;
use rustix::io::Errno;
use wherry_guest::testdma::MSIX_BYTES;
use wherry_state::{SavedState, Section, UnitId};
use wherry_vfio_user::server::{Kept, Moment};
use wherry_vfio_user::{Bus, Migration, State};

use super::engine::{Figures, Progress, Setup};
use super::faults::Event;
use super::function::{CONFIG_BYTES, Testdma};
use super::saved::{SavedPending, SavedTestdma, UNIT};
use super::stream::{Loading, Saving};

/// A state on its way.
#[derive(Default)]
pub struct Journey {
    saving: Option<Saving>,
    /// What is saved, when it has stopped.
    state: Option<SavedTestdma>,
    loading: Option<Loading>,
    /// Bytes that were read.
    read: u64,
}

impl Testdma {
    fn state(&mut self, bus: &Bus) -> Result<SavedTestdma, Errno> {
        let mut config = vec![0; CONFIG_BYTES as usize];
        self.read_config(0, &mut config);
        let scratch = self.scratch()?;
        let engine = self.core().engine();
        let state = SavedTestdma::of(&engine.setup, &engine.progress, &engine.figures);
        let pending = bus.pending().into_iter().map(|(index, vector)| SavedPending { index, vector }).collect();
        drop(engine);
        Ok(SavedTestdma { config, scratch, table: self.table.clone(), pending, ..state })
    }

    /// The engine's part of a state, if it can be this device's.
    fn check(&self, state: &SavedTestdma) -> Result<(Setup, Progress, Figures), String> {
        let (setup, progress, figures) = state.engine()?;
        if !self.has(setup.interrupt) || setup.vectors > self.shape.vectors {
            return Err(format!("it uses {:?} with {} vectors, which is not here", setup.interrupt, setup.vectors));
        }
        if state.table.len() as u64 != MSIX_BYTES {
            return Err(format!("an MSI-X table of {} bytes", state.table.len()));
        }
        Ok((setup, progress, figures))
    }

    fn take_moved(&mut self, state: &SavedTestdma, bus: &Bus) -> Result<(), String> {
        let (setup, progress, mut figures) = self.check(state)?;
        self.restore_config(&state.config)?;
        self.set_scratch(&state.scratch).map_err(|error| format!("its scratch page: {error}"))?;
        self.table.clone_from(&state.table);
        figures.loads += 1;
        self.core().engine().load(setup, progress, figures, bus);
        self.follow_config(bus);
        for pending in &state.pending {
            bus.set_pending(pending.index, pending.vector);
        }
        Ok(())
    }

    /// What a step from one state to another means for it.
    fn go(&mut self, bus: &Bus, from: State, to: State) -> Result<(), Errno> {
        if from == State::Resuming {
            std::thread::sleep(self.shape.load_time);
            let loading = self.journey.loading.take().unwrap_or_default();
            let taken = loading.finish().and_then(|state| self.take_moved(&state, bus));
            taken.map_err(|error| {
                tracing::warn!("a state is refused: {error}");
                Errno::INVAL
            })?;
        }
        self.core().engine().set_running(matches!(to, State::Running | State::PreCopy));
        self.core().wake();
        match to {
            State::PreCopy | State::PreCopyP2p if !from.is_saving() => {
                self.journey = Journey { saving: Some(Saving::new(self.shape.ballast)), ..Journey::default() };
            }
            State::PreCopy | State::PreCopyP2p => {}
            State::StopCopy => {
                std::thread::sleep(self.shape.save_time);
                self.journey.state = Some(self.state(bus)?);
                let ballast = self.shape.ballast;
                self.journey.saving.get_or_insert_with(|| Saving::new(ballast));
            }
            State::Resuming => {
                self.journey = Journey { loading: Some(Loading::default()), ..Journey::default() };
            }
            _ => self.journey = Journey::default(),
        }
        Ok(())
    }
}

impl Migration for Testdma {
    fn arc(&mut self, bus: &Bus, from: State, to: State) -> Result<(), Errno> {
        if self.core().engine().faults.refuses(to) {
            tracing::warn!("goes from {from:?} to {to:?} are refused, as it was told");
            return Err(Errno::IO);
        }
        self.mischief.at(Event::State(to), Moment::Before)?;
        self.go(bus, from, to)?;
        // It is there: an answer is what may be missing.
        let _ = self.mischief.at(Event::State(to), Moment::After);
        Ok(())
    }

    fn save(&mut self, _: &Bus, into: &mut [u8]) -> Result<usize, Errno> {
        let faults = self.core().engine().faults.clone();
        faults.slow_state().into_iter().for_each(std::thread::sleep);
        let journey = &mut self.journey;
        let saving = journey.saving.as_mut().ok_or(Errno::INVAL)?;
        if faults.endless_state() && saving.is_near_end() {
            *saving = Saving::endless();
        }
        let mut count = saving.read(journey.state.as_ref(), into);
        if let Some(wrong) = faults.wrong_state()
            && let Some(at) = wrong.checked_sub(journey.read).filter(|at| *at < count as u64)
        {
            into[at as usize] ^= 0xff;
        }
        journey.read += count as u64;
        if faults.short_state() {
            // The frame that says that it is whole.
            let left = saving.left(0);
            if journey.state.is_some() && left == 0 {
                count = count.saturating_sub(8);
            }
        }
        Ok(count)
    }

    fn load(&mut self, _: &Bus, data: &[u8]) -> Result<(), Errno> {
        let slow = self.core().engine().faults.slow_state();
        slow.into_iter().for_each(std::thread::sleep);
        let loading = self.journey.loading.as_mut().ok_or(Errno::INVAL)?;
        loading.write(data).map_err(|error| {
            tracing::warn!("a state is refused: {error}");
            Errno::INVAL
        })
    }

    fn estimate(&mut self, bus: &Bus) -> u64 {
        let state = match &self.journey.state {
            Some(state) => Ok(state.clone()),
            None => self.state(bus),
        };
        let id = UnitId { name: UNIT.into(), instance: 0 };
        let bytes = state.map_or(0, |state| state.to_section(&id).encoded_len());
        match &self.journey.saving {
            Some(saving) => saving.left(bytes),
            None => Saving::new(self.shape.ballast).left(bytes),
        }
    }
}

impl Kept for Testdma {
    fn rest(&mut self, bus: &Bus) -> Result<Vec<u8>, String> {
        if !self.core().park() {
            self.core().unpark();
            return Err("an access of its client's memory does not end".into());
        }
        let state = self.state(bus).map_err(|error| format!("reading its state: {error}"))?;
        let state = SavedTestdma { scratch: Vec::new(), pending: Vec::new(), ..state };
        Ok(state.to_section(&UnitId { name: UNIT.into(), instance: 0 }).encode_to_vec())
    }

    fn take(&mut self, _: &Bus, state: &[u8]) -> Result<(), String> {
        let section = Section::decode(state).map_err(|error| error.to_string())?;
        let state = SavedTestdma::from_section(&section).map_err(|error| error.to_string())?;
        let (setup, progress, figures) = self.check(&state)?;
        self.restore_config(&state.config)?;
        self.table.clone_from(&state.table);
        let (master, pin) = self.uses();
        self.core().engine().adopt(setup, progress, figures, master, pin);
        Ok(())
    }

    fn go_on(&mut self, _: &Bus) {
        self.core().unpark();
    }
}
