//! One userfaultfd: opening, registering ranges, resolving faults, reading events.
//!
//! Every call hands back what the kernel answered, as an [`Outcome`]; what it means for a page is decided in `place`.
#![expect(unsafe_code, reason = "makes the userfaultfd ioctls, which take addresses of this process")]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl};
use rustix::mm::UserfaultfdFlags;

use crate::UffdError;
use crate::uapi;

/// How many events one read takes at most.
const BATCH: usize = 64;

/// What a range is registered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// Faults on pages that are not in the file.
    pub missing: bool,
    /// Faults on pages that are in the file and not in the map.
    pub minor: bool,
}

impl Mode {
    /// Both kinds of faults: what our own guest maps have.
    pub const MISSING_MINOR: Self = Self { missing: true, minor: true };
    /// What a process has that another one resolves faults for.
    pub const MISSING: Self = Self { missing: true, minor: false };
}

/// What the kernel answered to a call that resolves faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The whole range is done.
    Done,
    /// EAGAIN with this many bytes done, counted from the start. The next page says why when it is tried alone.
    Partial(u64),
    /// EAGAIN with nothing done: an event is pending that must be read first.
    Again,
    /// EEXIST: the first page is there already. Nothing was woken.
    Exists,
    /// EFAULT: CONTINUE found a hole at the first page; COPY cannot read its source.
    Fault,
    /// ENOENT: the range is not inside one registered map.
    NotRegistered,
    /// ESRCH: the process whose descriptor this is has gone.
    Gone,
    /// ENOMEM or ENOSPC: no memory for the page.
    NoMemory,
}

/// One fault event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The address that was touched; exact where the process asked for that, else the start of its page.
    pub address: u64,
    /// It was a write.
    pub write: bool,
    /// The page is in the file, but not in the map.
    pub minor: bool,
    /// The page is write-protected by userfaultfd. Never ours.
    pub wp: bool,
    /// Who touched it, if the kernel says so. It may be a worker of the kernel.
    pub thread: Option<u32>,
}

/// What the kernel can do for a range that has been registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeCalls(u64);

impl RangeCalls {
    /// ZEROPAGE works (it does not for hugetlb).
    pub fn zeropage(self) -> bool {
        self.has(uapi::NR_ZEROPAGE)
    }

    /// POISON works.
    pub fn poison(self) -> bool {
        self.has(uapi::NR_POISON)
    }

    fn has(self, number: u8) -> bool {
        self.0 & (1 << number) != 0
    }
}

/// A userfaultfd, of this process or of another one.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
    features: u64,
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Userfault {
    /// Makes one for this process, able to see faults that are taken inside the kernel (KVM, system calls).
    ///
    /// `/dev/userfaultfd` is tried first because its permissions can be given to one user. No events other than page
    /// faults are asked for: with REMOVE events a `madvise` blocks until they are read, and placing returns EAGAIN.
    pub fn open() -> Result<Self, UffdError> {
        // A descriptor takes UFFDIO_API once, and refuses features it does not know: ask with one, use another.
        let available = Self::api(&Self::raw()?, 0)?;
        let named = [
            (uapi::FEATURE_MISSING_SHMEM, "MISSING_SHMEM"),
            (uapi::FEATURE_MINOR_SHMEM, "MINOR_SHMEM"),
            (uapi::FEATURE_EXACT_ADDRESS, "EXACT_ADDRESS"),
        ];
        let lacking: Vec<_> = named.iter().filter(|(bit, _)| available & bit == 0).map(|(_, name)| *name).collect();
        if !lacking.is_empty() {
            return Err(UffdError::Features(lacking));
        }
        let optional = uapi::FEATURE_MISSING_HUGETLBFS
            | uapi::FEATURE_MINOR_HUGETLBFS
            | uapi::FEATURE_THREAD_ID
            | uapi::FEATURE_POISON;
        let features = named.iter().map(|(bit, _)| bit).sum::<u64>() | (optional & available);
        let fd = Self::raw()?;
        Self::api(&fd, features)?;
        Ok(Self { fd, features })
    }

    /// Takes one that another process made and handed over. Its features are what that process asked for and cannot be
    /// known; it only is made not to block.
    pub fn adopt(fd: OwnedFd) -> Result<Self, UffdError> {
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(|e| UffdError::Read(e.into()))?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(|e| UffdError::Read(e.into()))?;
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC).map_err(|e| UffdError::Read(e.into()))?;
        Ok(Self { fd, features: 0 })
    }

    fn raw() -> Result<OwnedFd, UffdError> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        let device = match Self::from_device(flags) {
            Ok(fd) => return Ok(fd),
            Err(error) => error,
        };
        // SAFETY: making a userfaultfd has no effect on memory; every call on it in this file says why it is sound.
        match unsafe { rustix::mm::userfaultfd(flags) } {
            Ok(fd) => Ok(fd),
            Err(Errno::NOSYS) => Err(UffdError::Absent(Errno::NOSYS.into())),
            Err(call) => Err(UffdError::NotPermitted { device, call: call.into() }),
        }
    }

    fn from_device(flags: UserfaultfdFlags) -> io::Result<OwnedFd> {
        let device =
            OpenOptions::new().read(true).custom_flags(OFlags::CLOEXEC.bits() as i32).open("/dev/userfaultfd")?;
        // SAFETY: this ioctl takes plain flags as its argument and returns a new descriptor.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), uapi::DEVICE_NEW as libc::Ioctl, flags.bits()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it for us, and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn api(fd: &OwnedFd, features: u64) -> Result<u64, UffdError> {
        let mut api = uapi::Api { api: uapi::API, features, ioctls: 0 };
        // SAFETY: the structure is the one the call is defined for.
        unsafe { call::<{ uapi::UFFDIO_API }, _>(fd, &mut api) }.map_err(|e| UffdError::Call {
            call: "UFFDIO_API",
            start: 0,
            len: 0,
            source: e.into(),
        })?;
        Ok(api.features)
    }

    /// The `UFFD_FEATURE_*` bits that are on; zero for an adopted one.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Whether missing and minor faults of hugetlb maps can be seen.
    pub(crate) fn has_hugetlb(&self) -> bool {
        let both = uapi::FEATURE_MISSING_HUGETLBFS | uapi::FEATURE_MINOR_HUGETLBFS;
        self.features & both == both
    }

    /// Watches a range of this process's address space, which must be one shared map of a memfd.
    ///
    /// An error says so if a call that faults there will need is not offered; the range is not registered then.
    pub fn register(&self, base: u64, len: u64, mode: Mode) -> Result<RangeCalls, UffdError> {
        let bits =
            if mode.missing { uapi::REGISTER_MISSING } else { 0 } | if mode.minor { uapi::REGISTER_MINOR } else { 0 };
        let mut register = uapi::Register { range: uapi::Range { start: base, len }, mode: bits, ioctls: 0 };
        // SAFETY: registering changes no content; from here on faults in the range wait until they are resolved.
        unsafe { call::<{ uapi::UFFDIO_REGISTER }, _>(&self.fd, &mut register) }.map_err(|e| UffdError::Call {
            call: "UFFDIO_REGISTER",
            start: base,
            len,
            source: e.into(),
        })?;
        let calls = RangeCalls(register.ioctls);
        let mut lacking = Vec::new();
        for (needed, number, name) in [
            (true, uapi::NR_WAKE, "UFFDIO_WAKE"),
            (mode.missing, uapi::NR_COPY, "UFFDIO_COPY"),
            (mode.minor, uapi::NR_CONTINUE, "UFFDIO_CONTINUE"),
        ] {
            if needed && !calls.has(number) {
                lacking.push(name);
            }
        }
        if !lacking.is_empty() {
            self.unregister(base, len)?;
            return Err(UffdError::Calls { base, len, lacking });
        }
        Ok(calls)
    }

    /// Watches a range no longer, and wakes all who wait in it.
    pub fn unregister(&self, base: u64, len: u64) -> Result<(), UffdError> {
        let mut range = uapi::Range { start: base, len };
        // SAFETY: changes no content.
        unsafe { call::<{ uapi::UFFDIO_UNREGISTER }, _>(&self.fd, &mut range) }.map_err(|e| UffdError::Call {
            call: "UFFDIO_UNREGISTER",
            start: base,
            len,
            source: e.into(),
        })
    }

    /// Maps pages that are in the file (`UFFDIO_CONTINUE`).
    pub fn continue_range(&self, start: u64, len: u64, wake: bool) -> Result<Outcome, UffdError> {
        let mut fill = fill(start, len, wake);
        // SAFETY: maps pages of the file that the registered map is of; others see only what the file holds.
        let result = unsafe { call::<{ uapi::UFFDIO_CONTINUE }, _>(&self.fd, &mut fill) };
        outcome("UFFDIO_CONTINUE", start, len, result, fill.done)
    }

    /// Fills missing pages from `source`, each in one step for whoever looks (`UFFDIO_COPY`).
    pub fn copy(&self, start: u64, source: &[u8], wake: bool) -> Result<Outcome, UffdError> {
        let len = source.len() as u64;
        let mut copy = uapi::Copy { dst: start, src: source.as_ptr() as u64, len, mode: mode(wake), copied: 0 };
        // SAFETY: the kernel reads the slice for the length of the call, and fills only pages that are not there.
        let result = unsafe { call::<{ uapi::UFFDIO_COPY }, _>(&self.fd, &mut copy) };
        outcome("UFFDIO_COPY", start, len, result, copy.copied)
    }

    /// Fills missing pages with zeros (`UFFDIO_ZEROPAGE`). Not for hugetlb.
    pub fn zeropage(&self, start: u64, len: u64, wake: bool) -> Result<Outcome, UffdError> {
        let mut fill = fill(start, len, wake);
        // SAFETY: fills only pages that are not there.
        let result = unsafe { call::<{ uapi::UFFDIO_ZEROPAGE }, _>(&self.fd, &mut fill) };
        outcome("UFFDIO_ZEROPAGE", start, len, result, fill.done)
    }

    /// Makes missing pages deadly: who touches them gets SIGBUS, or EFAULT from a system call (`UFFDIO_POISON`).
    pub fn poison(&self, start: u64, len: u64) -> Result<Outcome, UffdError> {
        let mut fill = fill(start, len, true);
        // SAFETY: marks only pages that are not there.
        let result = unsafe { call::<{ uapi::UFFDIO_POISON }, _>(&self.fd, &mut fill) };
        outcome("UFFDIO_POISON", start, len, result, fill.done)
    }

    /// Wakes those who wait in a range; they touch again what they touched. Succeeds for a dead process too.
    pub fn wake(&self, start: u64, len: u64) -> Result<(), UffdError> {
        let mut range = uapi::Range { start, len };
        // SAFETY: touches no memory.
        unsafe { call::<{ uapi::UFFDIO_WAKE }, _>(&self.fd, &mut range) }.map_err(|e| UffdError::Call {
            call: "UFFDIO_WAKE",
            start,
            len,
            source: e.into(),
        })
    }

    /// Adds events that are waiting to `faults`, up to one batch. `true`: there may be more.
    ///
    /// Never blocks, not even if another process has made the descriptor blocking or has taken the events away.
    pub fn read_events(&self, faults: &mut Vec<Fault>) -> Result<bool, UffdError> {
        let mut batch = [uapi::Message::default(); BATCH];
        let vector = libc::iovec { iov_base: batch.as_mut_ptr().cast(), iov_len: size_of_val(&batch) };
        // SAFETY: one vector over the whole array, which takes any bytes; offset -1 stands for the file's position.
        let mut got = unsafe { libc::preadv2(self.fd.as_raw_fd(), &vector, 1, -1, libc::RWF_NOWAIT) };
        if got < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP) {
            // Kernels before 6.10 know no NOWAIT here; then O_NONBLOCK has to do.
            // SAFETY: as above.
            got = unsafe { libc::readv(self.fd.as_raw_fd(), &vector, 1) };
        }
        if got < 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR) => Ok(false),
                _ => Err(UffdError::Read(error)),
            };
        }
        let count = (got as usize / size_of::<uapi::Message>()).min(BATCH);
        for message in &batch[..count] {
            if message.event != uapi::EVENT_PAGEFAULT {
                return Err(UffdError::Event(message.event));
            }
            faults.push(Fault {
                address: message.address,
                write: message.flags & uapi::FAULT_WRITE != 0,
                minor: message.flags & uapi::FAULT_MINOR != 0,
                wp: message.flags & uapi::FAULT_WP != 0,
                thread: (message.thread != 0).then_some(message.thread),
            });
        }
        Ok(count == BATCH)
    }

    /// The descriptor, to hand it to the process that resolves our faults.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

fn mode(wake: bool) -> u64 {
    if wake { 0 } else { uapi::DONTWAKE }
}

fn fill(start: u64, len: u64, wake: bool) -> uapi::Fill {
    uapi::Fill { range: uapi::Range { start, len }, mode: mode(wake), done: 0 }
}

/// Makes one call; the structure is updated also when the call fails.
///
/// # Safety
/// `OPCODE` must be defined for `T`, and its effect on memory sound.
unsafe fn call<const OPCODE: Opcode, T>(fd: &OwnedFd, value: &mut T) -> Result<(), Errno> {
    // SAFETY: the caller answers for the opcode; the value lives through the call.
    unsafe { ioctl(fd, Updater::<OPCODE, T>::new(value)) }
}

fn outcome(
    call: &'static str,
    start: u64,
    len: u64,
    result: Result<(), Errno>,
    done: i64,
) -> Result<Outcome, UffdError> {
    match result {
        Ok(()) => Ok(Outcome::Done),
        Err(Errno::AGAIN) if done > 0 => Ok(Outcome::Partial(done as u64)),
        Err(Errno::AGAIN) => Ok(Outcome::Again),
        Err(Errno::EXIST) => Ok(Outcome::Exists),
        Err(Errno::FAULT) => Ok(Outcome::Fault),
        Err(Errno::NOENT) => Ok(Outcome::NotRegistered),
        Err(Errno::SRCH) => Ok(Outcome::Gone),
        Err(Errno::NOMEM | Errno::NOSPC) => Ok(Outcome::NoMemory),
        Err(error) => Err(UffdError::Call { call, start, len, source: error.into() }),
    }
}
