//! A unit's stream: some of it can go while the fake guest runs, the rest at rest.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use wherry_state::{Expected, Piece, StateStream, StreamTimes, UnitError, UnitId};

use super::Cpu;

/// Bytes of a piece.
const PIECE: u64 = 30_000;

#[derive(Default)]
struct Giving {
    /// It was begun so often; each time its bytes are others.
    session: u64,
    /// How often the guest had been started when it was begun.
    open: Option<usize>,
    offset: u64,
    early: u64,
}

pub struct FakeStream {
    cpu: Arc<Cpu>,
    name: &'static str,
    instance: u32,
    /// Bytes that can go early, and bytes that cannot.
    pub plan: Mutex<(u64, u64)>,
    giving: Mutex<Giving>,
    pub taken: Mutex<Vec<u8>>,
}

/// Bytes of a stream: others in each piece, and in each session.
fn bytes(session: u64, range: Range<u64>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity((range.end - range.start) as usize);
    let mut at = range.start;
    while at < range.end {
        let end = range.end.min((at / PIECE + 1) * PIECE);
        bytes.resize(bytes.len() + (end - at) as usize, (at / PIECE * 7) as u8 ^ session as u8);
        at = end;
    }
    bytes
}

impl FakeStream {
    pub fn new(cpu: Arc<Cpu>, instance: u32) -> Arc<Self> {
        let name = "fake-stream";
        Arc::new(Self {
            cpu,
            name,
            instance,
            plan: Mutex::default(),
            giving: Mutex::default(),
            taken: Mutex::default(),
        })
    }

    /// What was given last, all of it.
    pub fn given(&self) -> Vec<u8> {
        let (session, offset) = {
            let giving = self.giving.lock().unwrap();
            (giving.session, giving.offset)
        };
        bytes(session, 0..offset)
    }

    /// How much was given.
    pub fn offset(&self) -> u64 {
        self.giving.lock().unwrap().offset
    }

    pub fn sessions(&self) -> u64 {
        self.giving.lock().unwrap().session
    }
}

impl StateStream for FakeStream {
    fn id(&self) -> UnitId {
        UnitId::new(self.name, self.instance)
    }

    fn name(&self) -> String {
        format!("fake:{}", self.instance)
    }

    fn read(&self) -> Result<Piece, UnitError> {
        self.cpu.script.step("stream-read")?;
        let ((early, rest), mut giving) = (*self.plan.lock().unwrap(), self.giving.lock().unwrap());
        let runs = self.cpu.is_running();
        let starts = self.cpu.script.count("start");
        if giving.open != Some(starts) {
            *giving = Giving { session: giving.session + 1, open: Some(starts), ..Giving::default() };
        }
        let end = if runs { early } else { early + rest };
        let offset = giving.offset;
        giving.offset = end.min(offset + PIECE);
        if runs {
            giving.early = giving.offset;
        }
        Ok(Piece { offset, bytes: bytes(giving.session, offset..giving.offset) })
    }

    fn expected(&self) -> Expected {
        Expected { bytes: Some(self.plan.lock().unwrap().1), rate: None }
    }

    fn end(&self) {
        self.cpu.script.log.lock().unwrap().push("stream-end".into());
        self.giving.lock().unwrap().open = None;
    }

    fn write(&self, piece: Piece) -> Result<(), UnitError> {
        self.cpu.script.step("stream-write")?;
        let mut taken = self.taken.lock().unwrap();
        if piece.offset == 0 {
            taken.clear();
        }
        if piece.offset != taken.len() as u64 {
            return Err(UnitError::failed(format!("a piece at {}, and {} are there", piece.offset, taken.len())));
        }
        taken.extend(piece.bytes);
        Ok(())
    }

    fn flush(&self) -> Result<(), UnitError> {
        self.cpu.script.step("stream-flush")
    }

    fn times(&self) -> StreamTimes {
        let giving = self.giving.lock().unwrap();
        let us = Duration::from_micros;
        let (early, bytes) = (giving.early, giving.offset);
        StreamTimes { stop: us(1), save: us(2), load: us(3), start: us(4), early, bytes }
    }
}
