//! Ownership records: what a host must not forget while a VM changes hands.
//!
//! One file per VM and role, `<vm>.source` and `<vm>.destination`, in a directory on tmpfs (by default `/run/wherry`), so
//! that the one record written in the blackout never waits for a disk. What that means: the records live through the death of
//! any process of the host, but not through a reboot. After a reboot everything that could have run here is dead, and
//! a host that boots VMs *by itself* must know it: give it [durable intents](Records::with_durable_intents).
//!
//! - [`Records`] is the directory. [`Records::claim`] takes the role of one VM on this host, and refuses while another
//!   process has it (`flock` on `<vm>.<role>.lock`): so whoever holds a claim knows that the writer of the record it finds
//!   is dead or done.
//! - [`Claim`] writes and removes the record of that role. A record is there as a whole or not at all: it is written
//!   into `<vm>.<role>.spare`, synced, and exchanged with the record. The spare exists from the first record on, with its page
//!   allocated, so that a full file system is met *before* the point of no return.
//! - A record that cannot be read is an error, never "there is none".
//!
//! `format` has the bytes.

mod format;

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{CWD, FlockOperation, OFlags, RenameFlags, flock, renameat_with};
use rustix::io::Errno;

pub use format::{BadRecord, Entry, RECORD_BYTES, RECORD_VERSION, Stored, decode, encode};

use crate::Side;
use crate::ownership::{DestinationStage, SourceStage, VmId};

/// Why a record could not be read, written or claimed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file system.
    #[error("{doing} {}: {source}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The directory is not safe to keep records in.
    #[error("{} cannot hold ownership records: {why}; choose another directory with WHERRY_RECORDS", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        why: &'static str,
    },
    /// Another process has the role of this VM.
    #[error("{} is held by process {pid}: this VM is already part of a migration as a {} on this host", path.display(), side.as_str())]
    Held {
        /// The lock.
        path: PathBuf,
        /// The role.
        side: Side,
        /// Who has it; 0 if it cannot be told.
        pid: u32,
    },
    /// A file is there and is no record.
    #[error(
        "the ownership record {} cannot be read: {why}. It is not known who owns the VM; find out, and remove the file only then",
        path.display()
    )]
    Bad {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: BadRecord,
    },
    /// The record was written, the directory could not be synced, and it could not be taken back: it may be there.
    #[error("the ownership record {} may or may not have been written: {source}", path.display())]
    Uncertain {
        /// The file.
        path: PathBuf,
        /// Why the directory could not be synced.
        source: io::Error,
    },
    /// A record forbids to boot the VM.
    #[error(
        "VM {vm} must not be started here: {what} ({}, other side {peer}). Decide with `resolve`, or start it where it is",
        path.display()
    )]
    MustNotBoot {
        /// The VM.
        vm: VmId,
        /// The record.
        path: PathBuf,
        /// What it says.
        what: &'static str,
        /// The other side, as recorded.
        peer: String,
    },
}

fn io_error<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> RecordError + use<'a> {
    move |source| RecordError::Io { doing, path: path.to_owned(), source }
}

/// One record of a directory.
#[derive(Debug)]
pub struct Listed {
    /// The VM.
    pub vm: VmId,
    /// The role.
    pub side: Side,
    /// What it says, or why it cannot be read.
    pub entry: Result<Entry, RecordError>,
}

/// A directory of records.
#[derive(Clone, Debug)]
pub struct Records {
    dir: PathBuf,
    durable: Option<PathBuf>,
    boot_id: String,
}

impl Records {
    /// Uses a directory, and makes it if it is not there. It must belong to this user and not be writable for others.
    pub fn open(dir: &Path) -> Result<Self, RecordError> {
        prepare(dir)?;
        let path = Path::new("/proc/sys/kernel/random/boot_id");
        let boot_id = std::fs::read_to_string(path).map_err(io_error("reading", path))?.trim().to_owned();
        Ok(Self { dir: dir.to_owned(), durable: None, boot_id })
    }

    /// Keeps a second copy of every *intent* in a directory on a disk, so that it is found after a reboot. Intents are
    /// written while the guest still runs, so the disk may be slow.
    pub fn with_durable_intents(mut self, dir: &Path) -> Result<Self, RecordError> {
        prepare(dir)?;
        self.durable = Some(dir.to_owned());
        Ok(self)
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.dir
    }

    /// Takes the role of a VM on this host.
    pub fn claim(&self, vm: VmId, side: Side) -> Result<Claim, RecordError> {
        let path = self.dir.join(format!("{vm}.{}.lock", side.as_str()));
        let lock = take_lock(&path, side)?;
        let records = self.clone();
        // From here on dropping the claim removes the lock.
        let mut claim = Claim { records, vm, side, path: self.path(vm, side), lock_path: path, lock, found: None };
        claim.found = self.read(vm, side)?;
        Ok(claim)
    }

    /// What is recorded of a role, without a claim. What a living process writes meanwhile is not seen half done.
    pub fn read(&self, vm: VmId, side: Side) -> Result<Option<Entry>, RecordError> {
        let volatile = read_file(&self.path(vm, side), vm, side)?;
        match (volatile, &self.durable) {
            (None, Some(durable)) => read_file(&file_of(durable, vm, side), vm, side),
            (volatile, _) => Ok(volatile),
        }
    }

    /// Whether an entry was written before the host was last booted.
    pub fn is_from_another_boot(&self, entry: &Entry) -> bool {
        entry.boot_id != self.boot_id
    }

    /// Whether this host may boot a VM by itself. Not while it was about to leave, has left, or was about to come here.
    pub fn may_boot(&self, vm: VmId) -> Result<(), RecordError> {
        for side in [Side::Source, Side::Destination] {
            let Some(entry) = self.read(vm, side)? else { continue };
            let decided = match &entry.stored {
                Stored::Source(record) => match record.stage {
                    SourceStage::Intent | SourceStage::Run | SourceStage::Kept | SourceStage::Gone => false,
                },
                Stored::Destination(record) => match record.stage {
                    DestinationStage::Intent | DestinationStage::Ran => false,
                    DestinationStage::NeverRuns => true,
                },
            };
            if !decided {
                let path = self.path(vm, side);
                return Err(RecordError::MustNotBoot { vm, path, what: entry.stored.text(), peer: entry.peer });
            }
        }
        Ok(())
    }

    /// All records, readable or not.
    pub fn list(&self) -> Result<Vec<Listed>, RecordError> {
        let mut found = std::collections::BTreeSet::new();
        for dir in std::iter::once(&self.dir).chain(&self.durable) {
            for file in std::fs::read_dir(dir).map_err(io_error("listing", dir))? {
                let name = file.map_err(io_error("listing", dir))?.file_name();
                found.extend(name.to_str().and_then(parse_name));
            }
        }
        let entry = |(vm, side)| match self.read(vm, side) {
            Ok(entry) => entry.map(|entry| Listed { vm, side, entry: Ok(entry) }),
            Err(error) => Some(Listed { vm, side, entry: Err(error) }),
        };
        Ok(found.into_iter().filter_map(entry).collect())
    }

    /// Removes records that are decided (`Gone`, `NeverRuns`) and older than `age`: nobody will ask for them any more.
    /// Records of a role that is claimed stay. Returns how many were removed.
    pub fn sweep(&self, age: Duration) -> Result<usize, RecordError> {
        let before = now().saturating_sub(age.as_secs());
        let mut removed = 0;
        for Listed { vm, side, entry } in self.list()? {
            let Ok(entry) = entry else { continue };
            let decided = match entry.stored {
                Stored::Source(record) => record.stage == SourceStage::Gone && !record.unsettled,
                Stored::Destination(record) => record.stage == DestinationStage::NeverRuns,
            };
            if decided
                && entry.written <= before
                && let Ok(mut claim) = self.claim(vm, side)
                && claim.found.as_ref() == Some(&entry)
            {
                claim.clear()?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    fn path(&self, vm: VmId, side: Side) -> PathBuf {
        file_of(&self.dir, vm, side)
    }
}

fn file_of(dir: &Path, vm: VmId, side: Side) -> PathBuf {
    dir.join(format!("{vm}.{}", side.as_str()))
}

fn parse_name(name: &str) -> Option<(VmId, Side)> {
    let (vm, side) = name.split_once('.')?;
    let side = [Side::Source, Side::Destination].into_iter().find(|s| s.as_str() == side)?;
    if vm.len() != 32 || !vm.is_ascii() {
        return None;
    }
    let mut id = [0; 16];
    for (byte, digits) in id.iter_mut().zip(vm.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some((VmId(id), side))
}

fn prepare(dir: &Path) -> Result<(), RecordError> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io_error("making the directory", dir))?;
    let meta = std::fs::symlink_metadata(dir).map_err(io_error("looking at", dir))?;
    let refuse = |why| Err(RecordError::Directory { path: dir.to_owned(), why });
    if !meta.is_dir() {
        return refuse("it is no directory");
    }
    if meta.uid() != rustix::process::geteuid().as_raw() {
        return refuse("it belongs to another user");
    }
    if meta.mode() & 0o022 != 0 {
        return refuse("others may write to it");
    }
    Ok(())
}

fn read_file(path: &Path, vm: VmId, side: Side) -> Result<Option<Entry>, RecordError> {
    let bad = |why| RecordError::Bad { path: path.to_owned(), why };
    let mut tries = 0;
    loop {
        let Some(bytes) = read_bytes(path)? else { return Ok(None) };
        match decode(&bytes) {
            Ok(entry) if entry.stored.side() != side || entry.stored.attempt().vm != vm => {
                return Err(bad(BadRecord::Misfiled));
            }
            Ok(entry) => return Ok(Some(entry)),
            // What we opened may have become the spare meanwhile, and be written over. Then there is a newer one.
            Err(_) if tries < 10 => tries += 1,
            Err(why) => return Err(bad(why)),
        }
    }
}

fn read_bytes(path: &Path) -> Result<Option<Vec<u8>>, RecordError> {
    let file = OpenOptions::new().read(true).custom_flags(OFlags::NOFOLLOW.bits() as i32).open(path);
    let file = match file {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io_error("opening the ownership record", path)(e)),
    };
    let mut bytes = Vec::with_capacity(RECORD_BYTES + 1);
    // One byte more than there may be, so that a longer file is noticed and a huge one not read.
    let most = RECORD_BYTES as u64 + 1;
    file.take(most).read_to_end(&mut bytes).map_err(io_error("reading the ownership record", path))?;
    Ok(Some(bytes))
}

fn take_lock(path: &Path, side: Side) -> Result<File, RecordError> {
    loop {
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(path)
            .map_err(io_error("opening the lock", path))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut pid = String::new();
                let _ = lock.read_to_string(&mut pid);
                return Err(RecordError::Held { path: path.to_owned(), side, pid: pid.trim().parse().unwrap_or(0) });
            }
            Err(e) => return Err(io_error("locking", path)(e.into())),
        }
        // The holder before us removes the file when it lets go: then we hold a lock that nobody else will see.
        let ours = lock.metadata().map_err(io_error("looking at", path))?;
        match std::fs::symlink_metadata(path) {
            Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => {}
            Ok(_) => continue,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(io_error("looking at", path)(e)),
        }
        // Only for the message of whoever is refused.
        let _ = lock.set_len(0).and_then(|()| lock.write_all(std::process::id().to_string().as_bytes()));
        return Ok(lock);
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The role of one VM on this host, held until dropped. Dropping it leaves the record as it is.
#[derive(Debug)]
pub struct Claim {
    records: Records,
    vm: VmId,
    side: Side,
    path: PathBuf,
    lock_path: PathBuf,
    #[expect(dead_code, reason = "closing it releases the lock")]
    lock: File,
    found: Option<Entry>,
}

impl Claim {
    /// The VM.
    pub fn vm(&self) -> VmId {
        self.vm
    }

    /// The role.
    pub fn side(&self) -> Side {
        self.side
    }

    /// The record as it is now: found when the role was claimed, or written since.
    pub fn found(&self) -> Option<&Entry> {
        self.found.as_ref()
    }

    /// Whether the record was written before the host was last booted.
    pub fn is_from_another_boot(&self) -> bool {
        self.found.as_ref().is_some_and(|entry| self.records.is_from_another_boot(entry))
    }

    /// Writes the record. When this returns `Ok` it is there; on any error but [`RecordError::Uncertain`] it is not, and
    /// the older one, if any, still is.
    pub fn save(&mut self, stored: Stored, peer: &str) -> Result<(), RecordError> {
        assert!(stored.side() == self.side && stored.attempt().vm == self.vm, "a claim writes only its own record");
        let entry = Entry {
            stored,
            peer: peer.to_owned(),
            boot_id: self.records.boot_id.clone(),
            pid: std::process::id(),
            program: concat!("wherry ", env!("CARGO_PKG_VERSION")).to_owned(),
            written: now(),
        };
        let bytes = encode(&entry);
        if self.is_intent(&stored)
            && let Some(durable) = &self.records.durable
        {
            replace(&file_of(durable, self.vm, self.side), &bytes)?;
        }
        replace(&self.path, &bytes)?;
        self.found = Some(entry);
        Ok(())
    }

    /// Removes the record.
    pub fn clear(&mut self) -> Result<(), RecordError> {
        // The durable copy last: while the other is there it is not looked at.
        let durable = self.records.durable.as_ref().map(|dir| file_of(dir, self.vm, self.side));
        for path in std::iter::once(&self.path).chain(&durable) {
            remove(path)?;
            remove(&spare_of(path))?;
        }
        self.found = None;
        Ok(())
    }

    fn is_intent(&self, stored: &Stored) -> bool {
        match stored {
            Stored::Source(record) => record.stage == SourceStage::Intent,
            Stored::Destination(record) => record.stage == DestinationStage::Intent,
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let durable = self.records.durable.as_ref().map(|dir| file_of(dir, self.vm, self.side));
        for path in std::iter::once(&self.path).chain(&durable) {
            let _ = std::fs::remove_file(spare_of(path));
        }
        // While it is still locked: whoever has opened it meanwhile sees that it is gone, and opens a new one.
        let _ = std::fs::remove_file(&self.lock_path);
    }
}

fn spare_of(path: &Path) -> PathBuf {
    path.with_added_extension("spare")
}

fn remove(path: &Path) -> Result<(), RecordError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error("removing", path)(e)),
        _ => Ok(()),
    }
}

/// Puts `bytes` at `path`, whole or not at all, and leaves a spare file of the same size beside it.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), RecordError> {
    let spare = spare_of(path);
    write_spare(&spare, bytes)?;
    let exchanged = match renameat_with(CWD, &spare, CWD, path, RenameFlags::EXCHANGE) {
        Ok(()) => true,
        // Nothing there yet, or a file system that cannot exchange.
        Err(Errno::NOENT | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            let existed = path.exists();
            std::fs::rename(&spare, path).map_err(io_error("renaming to", path))?;
            // Room for the next record. The first one is an intent: without that room nothing begins.
            if let Err(error) = write_spare(&spare, bytes)
                && !existed
            {
                remove(path)?;
                return Err(error);
            }
            false
        }
        Err(e) => return Err(io_error("renaming to", path)(e.into())),
    };
    let dir = path.parent().unwrap_or(Path::new("/"));
    if let Err(source) = File::open(dir).and_then(|dir| dir.sync_all()) {
        let undone = exchanged && renameat_with(CWD, &spare, CWD, path, RenameFlags::EXCHANGE).is_ok();
        let path = path.to_owned();
        return Err(match undone {
            true => RecordError::Io { doing: "syncing the directory of", path, source },
            false => RecordError::Uncertain { path, source },
        });
    }
    Ok(())
}

fn write_spare(spare: &Path, bytes: &[u8]) -> Result<(), RecordError> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits() as i32)
        .open(spare)
        .map_err(io_error("making", spare))?;
    file.write_all_at(bytes, 0).map_err(io_error("writing", spare))?;
    file.set_len(bytes.len() as u64).map_err(io_error("setting the size of", spare))?;
    file.sync_all().map_err(io_error("syncing", spare))
}
