//! An image file: opened, sized, and locked by whoever owns the VM.
#![expect(unsafe_code, reason = "locks of open file descriptions, which rustix does not have")]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::SECTOR;
use super::qcow2::Qcow2;

/// What an image looks like. It is never guessed: a guest that writes a raw image could make it look like another one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ImageFormat {
    /// The bytes of the disk, one after the other.
    #[default]
    Raw,
    /// qcow2, without other images that it refers to.
    Qcow2,
}

/// An image.
#[derive(Debug)]
pub struct Image {
    file: File,
    /// What is between its bytes and those of the disk, if they are not the same.
    qcow2: Option<Qcow2>,
    path: PathBuf,
    read_only: bool,
    sectors: AtomicU64,
}

/// An image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be opened or sized.
    #[error("disk image {}: {what}: {source}", path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// It is no file or block device, or has not one sector.
    #[error("disk image {}: {reason}", path.display())]
    Unfit {
        /// The image.
        path: PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// Somebody else has it.
    #[error("disk image {}: another process has it locked; it may belong to a VM that runs", .0.display())]
    Locked(PathBuf),
}

impl Image {
    /// Opens a raw image. It is not locked yet: at the destination of a migration the source still owns it.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, ImageError> {
        Self::open_as(path, read_only, ImageFormat::Raw)
    }

    /// Opens an image of a format. Nothing of it is changed, and nothing kept that may change until it is locked.
    pub fn open_as(path: &Path, read_only: bool, format: ImageFormat) -> Result<Self, ImageError> {
        let error = |source| ImageError::Io { path: path.into(), what: "opening it", source };
        let file = File::options().read(true).write(!read_only).open(path).map_err(error)?;
        Self::of(file, path, read_only, format)
    }

    /// An image that the predecessor of this process has opened like that. Its locks are those of this process, too.
    pub fn adopt(fd: OwnedFd, path: &Path, read_only: bool, format: ImageFormat) -> Result<Self, ImageError> {
        Self::of(File::from(fd), path, read_only, format)
    }

    fn of(mut file: File, path: &Path, read_only: bool, format: ImageFormat) -> Result<Self, ImageError> {
        let error = |what| move |source| ImageError::Io { path: path.into(), what, source };
        let kind = file.metadata().map_err(error("looking at it"))?.file_type();
        if !kind.is_file() && !std::os::unix::fs::FileTypeExt::is_block_device(&kind) {
            return Err(ImageError::Unfit { path: path.into(), reason: "it is neither a file nor a block device" });
        }
        // A block device tells its size this way only.
        let bytes = file.seek(SeekFrom::End(0)).map_err(error("finding its size"))?;
        let (qcow2, bytes) = match format {
            ImageFormat::Raw => (None, bytes),
            ImageFormat::Qcow2 => {
                let look = Qcow2::look(&file, path, read_only);
                let (qcow2, bytes) = look.map_err(error("reading it as qcow2 without other images"))?;
                (Some(qcow2), bytes)
            }
        };
        let sectors = bytes / SECTOR;
        if sectors == 0 {
            return Err(ImageError::Unfit { path: path.into(), reason: "it has less than one sector of 512 bytes" });
        }
        Ok(Self { file, qcow2, path: path.into(), read_only, sectors: sectors.into() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it can only be read.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Its size in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Acquire)
    }

    /// Looks whether the file has become larger, and is of that size from now on. True if it has. One that has become smaller
    /// is an error, and keeps its size: a guest has data there.
    pub fn grow(&self) -> Result<bool, ImageError> {
        if self.qcow2.is_some() {
            return Ok(false);
        }
        let error = |source| ImageError::Io { path: self.path.clone(), what: "finding its size again", source };
        let sectors = (&self.file).seek(SeekFrom::End(0)).map_err(error)? / SECTOR;
        if sectors < self.sectors() {
            return Err(ImageError::Unfit { path: self.path.clone(), reason: "it has become smaller" });
        }
        Ok(self.sectors.swap(sectors, Ordering::AcqRel) < sectors)
    }

    /// Is of this size, as it was in the process before, even if the file has become larger. An error if it is smaller, and for an
    /// image that is not raw and has another size.
    pub fn keep_size(&self, sectors: u64) -> Result<(), ImageError> {
        let now = self.sectors();
        if sectors > now || sectors != now && self.qcow2.is_some() || sectors == 0 {
            let path = self.path.clone();
            return Err(ImageError::Unfit { path, reason: "it has not the size that its guest knows" });
        }
        self.sectors.store(sectors, Ordering::Release);
        Ok(())
    }

    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// What is between its bytes and those of the disk.
    pub(super) fn qcow2(&self) -> Option<&Qcow2> {
        self.qcow2.as_ref()
    }

    /// Everything that was written reaches the medium, and nothing is kept here that another owner may change.
    pub(super) fn sync(&self) -> io::Result<()> {
        if let Some(qcow2) = &self.qcow2 {
            return qcow2.put_down();
        }
        if self.read_only { Ok(()) } else { self.file.sync_data() }
    }

    /// Locks it: for itself, or together with others that only read it. Locking it again changes nothing.
    pub fn lock(&self) -> Result<(), ImageError> {
        let kind = if self.read_only { libc::F_RDLCK } else { libc::F_WRLCK };
        self.set_lock(kind).map_err(|source| match source.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => ImageError::Locked(self.path.clone()),
            _ => ImageError::Io { path: self.path.clone(), what: "locking it", source },
        })
    }

    /// Unlocks it.
    pub fn unlock(&self) -> Result<(), ImageError> {
        let error = |source| ImageError::Io { path: self.path.clone(), what: "unlocking it", source };
        self.set_lock(libc::F_UNLCK).map_err(error)
    }

    fn set_lock(&self, kind: i32) -> io::Result<()> {
        let lock = libc::flock {
            l_type: kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        // SAFETY: an open descriptor, and a structure that the call reads.
        match unsafe { libc::fcntl(self.fd(), libc::F_OFD_SETLK, &raw const lock) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsFd for Image {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
