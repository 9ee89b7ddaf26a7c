//! UNIX sockets as files: made for one process, left alone while another lives behind them, removed at the end. And what goes over
//! them besides bytes: [`descriptors`].
//!
//! A process that is killed leaves the file of its socket behind, and `bind` fails on it for ever. [`SocketFile::bind`]
//! replaces such a file, and nothing else: not a socket that somebody listens on, not a file of another kind. Everything
//! that listens on a path in this workspace does it here.
//!
//! Contract: two processes that bind the same path at once agree on one of them. Dropping a [`SocketFile`] removes the file
//! only if it is still the one that was made: a successor's stays. A process that ends without dropping what it has calls
//! [`remove_all`].

pub mod descriptors;

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

/// How long the directory may be locked by somebody else: others hold it while they bind.
const LOCK_LIMIT: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// A socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody listens there.
    #[error("another process listens on the socket {0}")]
    InUse(PathBuf),
    /// There is something that is no socket.
    #[error("{0} exists and is no socket")]
    NotASocket(PathBuf),
    /// The kernel refused.
    #[error("{what} the socket {path}: {source}")]
    Os {
        /// What was being done.
        what: &'static str,
        /// The socket.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl From<SocketError> for io::Error {
    fn from(error: SocketError) -> Self {
        let kind = match &error {
            SocketError::InUse(_) => io::ErrorKind::AddrInUse,
            SocketError::NotASocket(_) => io::ErrorKind::AlreadyExists,
            SocketError::Os { source, .. } => source.kind(),
        };
        io::Error::new(kind, error)
    }
}

/// Device and inode of a file.
type Identity = (u64, u64);

/// A file that somebody has to remove.
struct Entry {
    /// Of the [`SocketFile`] that it belongs to.
    number: u64,
    path: PathBuf,
    identity: Identity,
}

impl Entry {
    fn new(path: &Path, identity: Identity) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { number: NEXT.fetch_add(1, Ordering::Relaxed), path: path.to_owned(), identity }
    }
}

/// The files that this process has made, or owns since it has taken over, and has not removed.
static FILES: Mutex<Vec<Entry>> = Mutex::new(Vec::new());
/// The files of the process that this one is about to take over from.
static ADOPTED: Mutex<Vec<Entry>> = Mutex::new(Vec::new());

fn files() -> MutexGuard<'static, Vec<Entry>> {
    FILES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes the files of all sockets of this process: for those who end it without dropping what listens.
pub fn remove_all() {
    for Entry { path, identity, .. } in files().drain(..) {
        remove(&path, identity);
    }
}

/// The files that were [adopted](SocketFile::adopt) are this process's from now on.
pub fn own_adopted() {
    let mut adopted = ADOPTED.lock().unwrap_or_else(PoisonError::into_inner);
    files().append(&mut adopted);
}

/// Has the files of all sockets of this process stay: they are its successor's.
pub fn forget_all() {
    files().clear();
}

fn remove(path: &Path, identity: Identity) {
    if std::fs::symlink_metadata(path).is_ok_and(|meta| (meta.dev(), meta.ino()) == identity) {
        // If it is gone already, somebody else tidied up.
        let _ = std::fs::remove_file(path);
    }
}

/// The file of a listening socket. Dropping it removes the file, if it is still this one.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    number: u64,
}

impl SocketFile {
    /// Listens at `path`. A socket that nobody listens on any more is replaced.
    pub fn bind(path: &Path) -> Result<(UnixListener, Self), SocketError> {
        let os = |what| move |source| SocketError::Os { what, path: path.to_owned(), source };
        // Two processes that find the same left-over socket must not remove each other's new one: the directory is
        // locked from the look to the bind.
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let directory = File::open(parent).map_err(os("opening the directory of"))?;
        lock(&directory).map_err(os("locking the directory of"))?;
        clear(path)?;
        let listener = UnixListener::bind(path).map_err(os("making"))?;
        let meta = std::fs::symlink_metadata(path).map_err(os("looking at"))?;
        let entry = Entry::new(path, (meta.dev(), meta.ino()));
        let file = Self { path: path.to_owned(), number: entry.number };
        files().push(entry);
        Ok((listener, file))
    }

    /// The file of a socket that the predecessor of this process has made. It is this one's to remove when it has
    /// [taken over](own_adopted); until then it stays, whatever is dropped.
    pub fn adopt(path: &Path) -> Result<Self, SocketError> {
        let meta = std::fs::symlink_metadata(path);
        let identity = match meta {
            Ok(meta) if meta.file_type().is_socket() => (meta.dev(), meta.ino()),
            // Somebody has removed it, or put another thing there: nothing is ours to remove.
            Ok(_) => (0, 0),
            Err(error) if error.kind() == io::ErrorKind::NotFound => (0, 0),
            Err(source) => return Err(SocketError::Os { what: "looking at", path: path.to_owned(), source }),
        };
        let entry = Entry::new(path, identity);
        let file = Self { path: path.to_owned(), number: entry.number };
        ADOPTED.lock().unwrap_or_else(PoisonError::into_inner).push(entry);
        Ok(file)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the file, so that nobody new comes, if it is still the one that was made. Done at the end at the latest.
    pub fn remove(&self) {
        let mut files = files();
        // Once: what is there later with the same inode is another one.
        if let Some(at) = files.iter().position(|entry| entry.number == self.number) {
            let Entry { path, identity, .. } = files.swap_remove(at);
            remove(&path, identity);
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Locks a directory until it is closed. Its lock may belong to somebody who has nothing to do with sockets, for as long as
/// he likes.
fn lock(directory: &File) -> io::Result<()> {
    let deadline = Instant::now() + LOCK_LIMIT;
    loop {
        match rustix::fs::flock(directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(LOCK_PAUSE),
            Err(Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

/// Removes a socket that nobody listens on.
fn clear(path: &Path) -> Result<(), SocketError> {
    let os = |what| move |source| SocketError::Os { what, path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => return Err(SocketError::NotASocket(path.to_owned())),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(os("looking at")(error)),
    }
    // A datagram socket cannot be connected to a stream listener (EPROTOTYPE), which says whether one is there without making
    // a connection that it would have to deal with, and also when its queue is full.
    match UnixDatagram::unbound().and_then(|probe| probe.connect(path)) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::warn!(path = %path.display(), "replacing the socket of a process that is gone");
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(os("removing the left-over of")(error)),
                _ => Ok(()),
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.raw_os_error() != Some(libc::EPROTOTYPE) => Err(os("looking who listens on")(error)),
        _ => Err(SocketError::InUse(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn a_socket_in_use_is_refused_a_left_over_one_is_replaced_and_it_goes_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (listener, file) = SocketFile::bind(&path).unwrap();
        assert!(matches!(SocketFile::bind(&path), Err(SocketError::InUse(p)) if p == path));
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err(), "to look who is there makes no connection");
        drop(file);
        assert!(!path.exists());

        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a plain listener leaves its file");
        let (_listener, file) = SocketFile::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        file.remove();
        assert!(!path.exists());
    }

    #[test]
    fn one_whose_queue_is_full_is_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let _waits = UnixStream::connect(&path).unwrap();
        assert!(matches!(SocketFile::bind(&path), Err(SocketError::InUse(_))));
        // One for datagrams is somebody's, too.
        let other = dir.path().join("d");
        let _datagrams = UnixDatagram::bind(&other).unwrap();
        assert!(matches!(SocketFile::bind(&other), Err(SocketError::InUse(_))));
    }

    #[test]
    fn what_is_no_socket_is_left_alone_and_a_lack_of_a_directory_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        assert!(matches!(SocketFile::bind(&path), Err(SocketError::NotASocket(_))));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "data");
        let error = SocketFile::bind(&dir.path().join("none/s")).unwrap_err();
        assert!(error.to_string().contains("opening the directory"), "{error}");
    }

    #[test]
    fn the_file_of_a_successor_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (_old, first) = SocketFile::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let (_new, _second) = SocketFile::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
    }

    #[test]
    fn a_file_that_is_adopted_stays_until_its_process_is_the_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (_listener, old) = SocketFile::bind(&path).unwrap();
        drop(SocketFile::adopt(&path).unwrap());
        assert!(path.exists(), "a process that did not take over has removed it");
        let new = SocketFile::adopt(&path).unwrap();
        own_adopted();
        drop(new);
        assert!(!path.exists());
        drop(old);
        // What is no socket, or is gone, is nobody's.
        std::fs::write(&path, "data").unwrap();
        let other = SocketFile::adopt(&path).unwrap();
        own_adopted();
        drop(other);
        assert!(path.exists());
    }

    #[test]
    fn of_many_that_find_the_same_left_over_one_gets_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        for _ in 0..50 {
            drop(UnixListener::bind(&path).unwrap());
            let barrier = Barrier::new(4);
            let results: Vec<_> = std::thread::scope(|scope| {
                let binders: Vec<_> = (0..4)
                    .map(|_| {
                        scope.spawn(|| {
                            barrier.wait();
                            SocketFile::bind(&path)
                        })
                    })
                    .collect();
                binders.into_iter().map(|binder| binder.join().unwrap()).collect()
            });
            assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1, "{results:?}");
            assert!(UnixStream::connect(&path).is_ok(), "the one that got it can be reached");
        }
    }
}
