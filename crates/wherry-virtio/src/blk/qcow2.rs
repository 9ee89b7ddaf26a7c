//! Images in qcow2 format, by the `imago` crate: jobs of threads that wait for each.
//!
//! The tables of such an image are kept in memory and written now and then, so they belong to one owner at a time. They are
//! read when the first job comes, which is after the image was locked; and when the device is drained they are written and
//! forgotten, before the image is unlocked for the owner to come. A guest that runs on here reads them again.
#![expect(unsafe_code, reason = "describes guest memory to the crate that moves bytes")]

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use imago::file::File as Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};
use vm_memory::VolatileSlice;

use super::engine::{Job, Op};

type Access = FormatAccess<Storage>;

/// An image in this format.
pub(super) struct Qcow2 {
    file: File,
    path: PathBuf,
    read_only: bool,
    /// Its tables, while they are in use. Whoever frees clusters has them alone.
    tables: RwLock<Option<Access>>,
}

impl std::fmt::Debug for Qcow2 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qcow2").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Qcow2 {
    /// Looks at an image without keeping or changing anything: somebody else may own it. Its size in bytes as the guest sees
    /// it.
    pub(super) fn look(file: &File, path: &Path, read_only: bool) -> io::Result<(Self, u64)> {
        let this = Self { file: file.try_clone()?, path: path.into(), read_only, tables: RwLock::default() };
        let size = this.open(false)?.size();
        Ok((this, size))
    }

    /// Images that it refers to are not opened: their names come from the image, which a guest may have written.
    fn open(&self, write: bool) -> io::Result<Access> {
        let storage = Storage::try_from(self.file.try_clone()?)?;
        let builder = imago::qcow2::Qcow2::<Storage>::builder(storage).write(write);
        Ok(FormatAccess::new(builder.open(DenyImplicitOpenGate::default())?))
    }

    /// Does something with the tables, beside others.
    fn with<T>(&self, work: impl Fn(&Access) -> io::Result<T>) -> io::Result<T> {
        loop {
            if let Some(access) = &*self.tables.read().unwrap_or_else(PoisonError::into_inner) {
                return work(access);
            }
            self.alone(|_| Ok(()))?;
        }
    }

    /// Does something with the tables while nobody else does.
    fn alone<T>(&self, work: impl FnOnce(&mut Access) -> io::Result<T>) -> io::Result<T> {
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        let access = match &mut *tables {
            Some(access) => access,
            none => none.insert(self.open(!self.read_only)?),
        };
        work(access)
    }

    /// Does a job, and waits for it.
    pub(super) fn execute(&self, job: &Job) -> io::Result<u32> {
        let Job { op, offset, len, .. } = *job;
        let moved = job.buffers.iter().map(|buffer| buffer.iov_len).sum::<usize>() as u32;
        // SAFETY: the buffers lie in guest memory, which whoever made the job keeps until it is done.
        let slices =
            job.buffers.iter().map(|buffer| unsafe { VolatileSlice::new(buffer.iov_base.cast(), buffer.iov_len) });
        let slices: Vec<_> = slices.collect();
        match op {
            Op::Read => self.with(|access| {
                let (into, _guard) = IoVectorMut::from_volatile_slice(&slices);
                access.readv(into, offset).map(|()| moved)
            }),
            Op::Write { stable } => self.with(|access| {
                let (from, _guard) = IoVector::from_volatile_slice(&slices);
                access.writev(from, offset)?;
                if stable { settle(access).map(|()| moved) } else { Ok(moved) }
            }),
            Op::Flush => self.with(settle).map(|()| 0),
            Op::Zero { free: false } => self.with(|access| access.write_zeroes(offset, len)).map(|()| 0),
            Op::Zero { free: true } => self.alone(|access| access.discard_to_zero(offset, len)).map(|()| 0),
            Op::Discard => match self.alone(|access| access.discard_to_any(offset, len)) {
                // A hint.
                Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(0),
                result => result.map(|()| 0),
            },
        }
    }

    /// Everything reaches the medium, and the tables are forgotten: they may be somebody else's next.
    pub(super) fn put_down(&self) -> io::Result<()> {
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(access) = tables.as_ref().filter(|_| !self.read_only) {
            settle(access)?;
        }
        *tables = None;
        Ok(())
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        if let Err(error) = self.put_down() {
            tracing::error!(%error, "disk image {}: writing its tables at the end", self.path.display());
        }
    }
}

/// All that was written reaches the medium.
fn settle(access: &Access) -> io::Result<()> {
    access.flush()?;
    access.sync()
}
