//! Features of a device: its migration, the data of that, and the log of what it writes.
//!
//! libvfio-user answers `EINVAL` to everything but these while it is in `STOP_COPY`.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::Client;
use crate::error::VfioUserError;
use crate::message::Command;
use crate::payload::{Feature, Fields, LoggingReport, LoggingStart, Out, feature};
use crate::states::State;

const COMMAND: Command = Command::Feature;
/// Bytes around the bitmap of a log.
const AROUND: usize = Feature::SIZE + LoggingReport::SIZE;

impl Client {
    /// Whether a device has a feature, for those methods ([`feature::GET`], [`feature::SET`]).
    pub fn probe(&self, index: u16, methods: u32) -> Result<bool, VfioUserError> {
        let asked = Feature { argsz: Feature::SIZE as u32, flags: u32::from(index) | methods | feature::PROBE };
        match self.ask(COMMAND, &asked.encode(&[]), &[]) {
            Ok(_) => Ok(true),
            Err(error) => match error.refused_with() {
                Some(Errno::NOTTY | Errno::INVAL | Errno::NOTSUP | Errno::NOSYS) => Ok(false),
                _ => Err(error),
            },
        }
    }

    /// What it can do of a migration ([`feature::STOP_COPY`] and so on).
    pub fn migration(&self) -> Result<u64, VfioUserError> {
        let data = self.feature(feature::MIGRATION, feature::GET, &[], 8)?;
        Fields(&data).u64().map_err(|error| self.wrong(COMMAND, error))
    }

    /// The state it is in.
    pub fn state(&self) -> Result<State, VfioUserError> {
        let data = self.feature(feature::DEVICE_STATE, feature::GET, &[], 8)?;
        let number = Fields(&data).u32().map_err(|error| self.wrong(COMMAND, error))?;
        State::from_number(number).ok_or_else(|| self.wrong(COMMAND, format!("it is in state {number}")))
    }

    /// Has it go to a state; it is there when this returns.
    pub fn set_state(&self, state: State) -> Result<(), VfioUserError> {
        if state.is_p2p() && !self.extensions.p2p {
            return Err(self.lacks(format!("{state:?} was not agreed on")));
        }
        let data = Out::default().u32(state as u32).u32(u32::MAX).0;
        self.feature(feature::DEVICE_STATE, feature::SET, &data, data.len()).map(|_| ())
    }

    /// Bytes of state that are to come if it stopped now; `None` if that was not agreed on.
    pub fn estimate(&self) -> Result<Option<u64>, VfioUserError> {
        if !self.extensions.estimates {
            return Ok(None);
        }
        let data = self.feature(feature::DATA_SIZE, feature::GET, &[], 8)?;
        Fields(&data).u64().map(Some).map_err(|error| self.wrong(COMMAND, error))
    }

    /// Has it log what it writes, in these ranges (address, length), or everywhere without any. The page size that it chose.
    pub fn start_logging(&self, page_size: u64, ranges: &[(u64, u64)]) -> Result<u64, VfioUserError> {
        let start = LoggingStart { page_size, ranges: ranges.to_vec() };
        let data = start.encode();
        let reply = self.feature(feature::LOGGING_START, feature::SET, &data, data.len())?;
        let chosen = Fields(&reply).u64().map_err(|error| self.wrong(COMMAND, error))?;
        match chosen.is_power_of_two() {
            true => Ok(chosen),
            false => Err(self.wrong(COMMAND, format!("it logs pages of {chosen} bytes"))),
        }
    }

    /// Has it log no longer.
    pub fn stop_logging(&self) -> Result<(), VfioUserError> {
        self.feature(feature::LOGGING_STOP, feature::SET, &[], 0).map(|_| ())
    }

    /// What was written since it was last asked: bit n is page n of the range. In several messages if need be.
    pub fn read_log(&self, address: u64, length: u64, page_size: u64) -> Result<Vec<u64>, VfioUserError> {
        let whole = LoggingReport { address, length, page_size };
        let words = whole.words().map_err(|error| self.lacks(error.to_string()))?;
        let mut bitmap = Vec::with_capacity(words.min(1 << 20));
        // As many words as one reply has room for.
        let most = (self.transfer().saturating_sub(AROUND) / 8).max(1) as u64;
        let step = most.saturating_mul(64).saturating_mul(page_size);
        let mut done = 0;
        while done < length {
            let part = LoggingReport { address: address + done, length: step.min(length - done), page_size };
            let words = part.words().map_err(|error| self.lacks(error.to_string()))?;
            let room = LoggingReport::SIZE + 8 * words;
            let data = self.feature(feature::LOGGING_REPORT, feature::GET, &part.encode(), room)?;
            let (said, bits) = LoggingReport::decode(&data).map_err(|error| self.wrong(COMMAND, error))?;
            if said != part || bits.len() != 8 * words {
                return Err(self.wrong(COMMAND, format!("{} bytes of {said:x?}, asked for {part:x?}", bits.len())));
            }
            let mut fields = Fields(bits);
            while let Ok(word) = fields.u64() {
                bitmap.push(word);
            }
            done += part.length;
        }
        Ok(bitmap)
    }

    /// The next bytes of its state, in a saving state; fewer than asked for, if there are no more for now.
    pub fn read_data(&self, most: usize) -> Result<Vec<u8>, VfioUserError> {
        let most = most.min(self.transfer());
        let asked = Out::default().u32((Feature::SIZE + most) as u32).u32(most as u32).0;
        let (mut reply, _) = self.ask(Command::MigDataRead, &asked, &[])?;
        // The reply of libvfio-user is always as long as was asked for; its second word tells how much of it is data.
        let (head, data) = Feature::decode(&reply).map_err(|error| self.wrong(Command::MigDataRead, error))?;
        let size = head.flags as usize;
        if size > most || size > data.len() {
            let reason = format!("{size} bytes of state in {}, where {most} were asked for", data.len());
            return Err(self.wrong(Command::MigDataRead, reason));
        }
        reply.drain(..Feature::SIZE);
        reply.truncate(size);
        Ok(reply)
    }

    /// Gives it bytes of a state, in `RESUMING`; in several messages if need be.
    pub fn write_data(&self, data: &[u8]) -> Result<(), VfioUserError> {
        for piece in data.chunks(self.transfer()) {
            let head = Feature { argsz: (Feature::SIZE + piece.len()) as u32, flags: piece.len() as u32 };
            self.ask(Command::MigDataWrite, &head.encode(piece), &[])?;
        }
        Ok(())
    }

    /// Gets or sets a feature: the data of the reply, for which there is so much room.
    fn feature(&self, index: u16, method: u32, data: &[u8], room: usize) -> Result<Vec<u8>, VfioUserError> {
        const NO_FDS: &[BorrowedFd<'_>] = &[];
        let flags = u32::from(index) | method;
        let asked = Feature { argsz: (Feature::SIZE + room.max(data.len())) as u32, flags };
        let (reply, _) = self.ask(COMMAND, &asked.encode(data), NO_FDS)?;
        match Feature::decode(&reply) {
            Ok((said, data)) if said.flags == flags => Ok(data.to_vec()),
            Ok((said, _)) => Err(self.wrong(COMMAND, format!("flags {:#x}, asked with {flags:#x}", said.flags))),
            Err(error) => Err(self.wrong(COMMAND, error)),
        }
    }
}
