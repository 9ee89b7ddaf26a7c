//! What the driver of a function can do beside: its migration (version 2), and the log of what it writes (`VFIO_DEVICE_FEATURE`).
//!
//! No emulated device has either under vfio-pci, so that this was tried with a kernel that is played. It is the protocol that
//! vfio-user devices speak, with their payloads.
#![expect(unsafe_code, reason = "gives the kernel addresses of tables, and gets descriptors as numbers")]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wherry_memory::GRANULE;
use wherry_vfio_user::State;
use wherry_vfio_user::payload::{Feature, feature};

use super::address::HostAddress;
use super::error::VfioError;
use super::kernel::{Calls, request};
use crate::owner::MigrationFacts;

/// Features of one function.
pub(super) struct Features {
    calls: Calls,
    file: Arc<OwnedFd>,
    address: HostAddress,
    logs: bool,
    /// By which its state is read or written, while it is.
    data: Mutex<Option<File>>,
}

impl Features {
    /// Asks what it has.
    pub(super) fn ask(calls: Calls, file: Arc<OwnedFd>, address: HostAddress) -> Self {
        let mut this = Self::known(calls, file, address, false);
        let has = |number, flags| this.feature(number, feature::PROBE | flags, &mut []).is_ok();
        this.logs = has(feature::LOGGING_START, feature::SET)
            && has(feature::LOGGING_STOP, feature::SET)
            && has(feature::LOGGING_REPORT, feature::GET);
        this
    }

    /// Of a function of which that is known.
    pub(super) fn known(calls: Calls, file: Arc<OwnedFd>, address: HostAddress, logs: bool) -> Self {
        Self { calls, file, address, logs, data: Mutex::default() }
    }

    /// It can tell what it writes.
    pub(super) fn logs(&self) -> bool {
        self.logs
    }

    fn data(&self) -> MutexGuard<'_, Option<File>> {
        self.data.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(&self, what: &'static str) -> impl FnOnce(io::Error) -> VfioError {
        VfioError::call(self.address, what)
    }

    /// A feature, with its structure, which has no addresses in it.
    fn feature(&self, number: u16, flags: u32, data: &mut [u8]) -> io::Result<()> {
        // SAFETY: there are none.
        unsafe { self.addressed(number, flags, data) }
    }

    /// A feature, with its structure.
    ///
    /// # Safety
    ///
    /// Addresses in it are of memory that the feature may use so.
    unsafe fn addressed(&self, number: u16, flags: u32, data: &mut [u8]) -> io::Result<()> {
        let header = Feature { argsz: (Feature::SIZE + data.len()) as u32, flags: u32::from(number) | flags };
        let mut bytes = header.encode(data);
        // SAFETY: the caller's.
        unsafe { self.calls.addressed(self.file.as_fd(), request::DEVICE_FEATURE, &mut bytes) }?;
        data.copy_from_slice(&bytes[Feature::SIZE..]);
        Ok(())
    }

    /// What it can do of a migration.
    pub(super) fn migration(&self) -> Option<MigrationFacts> {
        let mut flags = [0; 8];
        self.feature(feature::MIGRATION, feature::GET, &mut flags).ok()?;
        let flags = u64::from_ne_bytes(flags);
        let facts = MigrationFacts { pre_copy: flags & feature::PRE_COPY != 0, p2p: flags & feature::P2P != 0 };
        (flags & feature::STOP_COPY != 0).then_some(facts)
    }

    /// `struct vfio_device_feature_mig_state`: a state, and a descriptor.
    fn device_state(&self, flags: u32, state: u32) -> io::Result<(u32, i32)> {
        let mut data = [state.to_ne_bytes(), (-1i32).to_ne_bytes()].concat();
        self.feature(feature::DEVICE_STATE, flags, &mut data)?;
        let word = |at: usize| [data[at], data[at + 1], data[at + 2], data[at + 3]];
        Ok((u32::from_ne_bytes(word(0)), i32::from_ne_bytes(word(4))))
    }

    pub(super) fn state(&self) -> Result<State, VfioError> {
        let (state, _) = self.device_state(feature::GET, 0).map_err(self.call("asking for its state"))?;
        State::from_number(state).ok_or_else(|| VfioError::Lacks {
            device: self.address,
            reason: format!("its migration is in state {state}, which is none"),
        })
    }

    pub(super) fn set_state(&self, state: State) -> Result<(), VfioError> {
        let mut data = self.data();
        let set = self.device_state(feature::SET, state as u32);
        let (_, number) = set.map_err(self.call("changing the state of its migration"))?;
        if number >= 0 {
            // SAFETY: the kernel has just made it for us.
            *data = Some(File::from(unsafe { OwnedFd::from_raw_fd(number) }));
        } else if !state.is_saving() && state != State::Resuming {
            *data = None;
        }
        Ok(())
    }

    pub(super) fn read_state(&self, most: usize) -> Result<Vec<u8>, VfioError> {
        let mut data = self.data();
        let what = "reading its state";
        let file = data.as_mut().ok_or_else(|| self.call(what)(io::Error::other("it is in no state to be read")))?;
        let mut piece = vec![0; most];
        loop {
            match file.read(&mut piece) {
                Ok(len) => {
                    piece.truncate(len);
                    return Ok(piece);
                }
                // There is no more for now (PRE_COPY).
                Err(error) if error.raw_os_error() == Some(libc::ENOMSG) => return Ok(Vec::new()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.call(what)(error)),
            }
        }
    }

    pub(super) fn write_state(&self, piece: &[u8]) -> Result<(), VfioError> {
        let mut data = self.data();
        let what = "writing its state";
        let file = data.as_mut().ok_or_else(|| self.call(what)(io::Error::other("it is in no state to be written")))?;
        file.write_all(piece).map_err(self.call(what))
    }

    pub(super) fn estimate(&self) -> Result<Option<u64>, VfioError> {
        let mut bytes = [0; 8];
        let told = self.feature(feature::DATA_SIZE, feature::GET, &mut bytes);
        Ok(told.ok().map(|()| u64::from_ne_bytes(bytes)))
    }

    pub(super) fn start_log(&self, ranges: &[(u64, u64)]) -> Result<u64, VfioError> {
        let table: Vec<u64> = ranges.iter().flat_map(|(address, bytes)| [*address, *bytes]).collect();
        // struct vfio_device_feature_dma_logging_control: bytes of a page, ranges, where they are.
        let head = [GRANULE.to_ne_bytes(), (ranges.len() as u64).to_ne_bytes(), (table.as_ptr() as u64).to_ne_bytes()];
        // SAFETY: the kernel reads as many ranges as there are.
        let set = unsafe { self.addressed(feature::LOGGING_START, feature::SET, &mut head.concat()) };
        set.map_err(self.call("having it note what it writes"))?;
        Ok(GRANULE)
    }

    pub(super) fn stop_log(&self) -> Result<(), VfioError> {
        let set = self.feature(feature::LOGGING_STOP, feature::SET, &mut []);
        set.map_err(self.call("having it note no longer what it writes"))
    }

    pub(super) fn read_log(&self, address: u64, bytes: u64, page: u64) -> Result<Vec<u64>, VfioError> {
        let mut words = vec![0u64; (bytes / page).div_ceil(64) as usize];
        let place = words.as_mut_ptr() as u64;
        // struct vfio_device_feature_dma_logging_report.
        let mut report = [address, bytes, page, place].map(u64::to_ne_bytes).concat();
        // SAFETY: the bitmap has a bit for each page of the range.
        let got = unsafe { self.addressed(feature::LOGGING_REPORT, feature::GET, &mut report) };
        got.map_err(self.call("asking what it wrote"))?;
        Ok(words)
    }
}
