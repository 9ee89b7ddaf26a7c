//! The state of the device itself, which goes in a stream: what it gives in PRE_COPY while it runs, and the rest at rest.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use wherry_state::{Expected, Piece, StateError, StateStream, StateUnit, StreamTimes, UnitError, UnitId};
use wherry_vfio_user::State;

use crate::OwnerError;
use crate::function::Function;
use crate::unit::LOAD_LIMIT;
use crate::worker::{PIECE, Step};

/// Where a stream stands.
#[derive(Default)]
pub(crate) struct Place {
    /// The device is in PRE_COPY.
    early: bool,
    /// Bytes given, or taken.
    pub(crate) offset: u64,
    /// All of it was given.
    pub(crate) whole: bool,
    /// The device has begun to take it.
    pub(crate) loading: bool,
    /// Bytes of the state that it came here with, and how long the device took for them.
    arrived: Option<(u64, Duration)>,
}

impl Function {
    pub(crate) fn place(&self) -> MutexGuard<'_, Place> {
        lock(&self.stream)
    }

    /// It has taken that much state in that time.
    pub(crate) fn arrived(&self, bytes: u64, took: Duration) {
        self.place().arrived = Some((bytes, took));
    }

    /// Some of its state is being given while it runs.
    pub(crate) fn is_early(&self) -> bool {
        self.place().early
    }

    /// It runs: there is nothing on its way.
    pub(crate) fn forget_stream(&self) {
        let mut place = self.place();
        *place = Place { arrived: place.arrived, ..Place::default() };
    }

    fn failed(&self, what: &str, error: &OwnerError) -> UnitError {
        self.report(what, error);
        UnitError::failed(error.to_string())
    }

    /// What the device gives while it runs.
    fn read_early(&self, place: &mut Place) -> Result<Vec<u8>, UnitError> {
        let owner = self.owner();
        if self.is_lost() {
            return Err(UnitError::failed(self.blocker().unwrap_or_default()));
        }
        if !owner.facts().migration.is_some_and(|facts| facts.pre_copy) {
            return Ok(Vec::new());
        }
        if !place.early {
            owner.set_state(State::PreCopy).map_err(|error| self.failed("beginning to read its state", &error))?;
            *place = Place { early: true, arrived: place.arrived, ..Place::default() };
            *lock(&self.member.times) = StreamTimes::default();
        }
        owner.read_state(PIECE).map_err(|error| self.failed("reading its state", &error))
    }

    /// Begins to take a state: another one, if the last one was given up.
    pub(crate) fn begin_to_load(&self, place: &mut Place) -> Result<(), UnitError> {
        let anew = std::mem::replace(&mut place.loading, true);
        if anew {
            self.member.pieces.close();
            // What became of it does not matter.
            let _ = self.member.wait(Instant::now() + LOAD_LIMIT);
        }
        self.member.pieces.reset();
        place.offset = 0;
        self.member.hand(Step::Load { anew });
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl StateStream for Function {
    fn id(&self) -> UnitId {
        StateUnit::id(self)
    }

    fn name(&self) -> String {
        self.owner().name().into()
    }

    fn read(&self) -> Result<Piece, UnitError> {
        let stopped = self.member.is_stopped();
        let whole = self.place().whole;
        let bytes = match stopped {
            false => self.read_early(&mut self.place())?,
            true if whole => Vec::new(),
            true => self.member.pieces.take().map_err(|broken| UnitError::failed(broken.reason()))?.unwrap_or_default(),
        };
        let mut place = self.place();
        let offset = place.offset;
        place.offset += bytes.len() as u64;
        place.whole = stopped && bytes.is_empty();
        let mut times = lock(&self.member.times);
        times.bytes = place.offset;
        if !stopped {
            times.early = place.offset;
        }
        Ok(Piece { offset, bytes })
    }

    fn expected(&self) -> Expected {
        let estimate = if self.is_lost() { None } else { self.owner().estimate().ok().flatten() };
        let place = self.place();
        let arrived = place.arrived.filter(|_| !place.early).map(|(bytes, _)| bytes);
        let rate = place.arrived.filter(|(bytes, took)| *bytes >= 1 << 16 && !took.is_zero());
        Expected { bytes: estimate.or(arrived), rate: rate.map(|(bytes, took)| bytes as f64 / took.as_secs_f64()) }
    }

    fn end(&self) {
        let early = self.place().early;
        if !early || self.member.is_stopped() || self.is_lost() {
            return;
        }
        if let Err(error) = self.owner().set_state(State::Running) {
            self.report("ending what was begun to move it", &error);
        }
        self.forget_stream();
    }

    fn write(&self, piece: Piece) -> Result<(), UnitError> {
        let mut place = self.place();
        if !self.once.is_new() {
            return Err(UnitError::failed("more of its state came when it had all been given"));
        }
        if piece.offset == 0 {
            self.begin_to_load(&mut place)?;
        } else if piece.offset != place.offset || !place.loading {
            let reason = format!("state from byte {} on, and {} are there", piece.offset, place.offset);
            return Err(StateError::Decode { unit: StateUnit::id(self), reason }.into());
        }
        place.offset += piece.bytes.len() as u64;
        drop(place);
        self.member.pieces.put(piece.bytes).map_err(|broken| UnitError::failed(broken.reason()))
    }

    fn flush(&self) -> Result<(), UnitError> {
        if !self.place().loading {
            return Ok(());
        }
        self.member.pieces.flush().map_err(|broken| UnitError::failed(broken.reason()))
    }

    fn times(&self) -> StreamTimes {
        *lock(&self.member.times)
    }
}
