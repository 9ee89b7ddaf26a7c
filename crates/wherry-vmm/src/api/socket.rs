//! The API socket as a file: made for one process, refused while another lives behind it, removed at the end.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

/// The API socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody answers there.
    #[error(
        "the API socket {0} is in use by a living process; choose another --api, or end that one with `wherry stop \
         --api {0}`"
    )]
    InUse(PathBuf),
    /// There is something that is no socket.
    #[error("{0} exists and is no socket; choose another --api")]
    NotASocket(PathBuf),
    /// The kernel refused.
    #[error("{what} the API socket {path}: {source}")]
    Os {
        /// What was being done.
        what: &'static str,
        /// The socket.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// A listening API socket. Dropping it removes the file, if it is still this one.
#[derive(Debug)]
pub struct ApiSocket {
    path: PathBuf,
    listener: UnixListener,
    identity: (u64, u64),
}

impl ApiSocket {
    /// Listens at `path`, readable and writable for the owner only. A socket that nobody listens on is replaced.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let os = |what| {
            let path = path.to_owned();
            move |source: io::Error| SocketError::Os { what, path, source }
        };
        // Two processes that find the same left-over socket must not remove each other's new one: the directory is
        // locked from the look to the bind.
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let directory = File::open(parent).map_err(os("opening the directory of"))?;
        rustix::fs::flock(&directory, FlockOperation::LockExclusive)
            .map_err(|e| os("locking the directory of")(e.into()))?;
        match std::fs::symlink_metadata(path) {
            Ok(meta) if !meta.file_type().is_socket() => return Err(SocketError::NotASocket(path.to_owned())),
            Ok(_) => match UnixStream::connect(path) {
                Ok(_) => return Err(SocketError::InUse(path.to_owned())),
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                    tracing::warn!(path = %path.display(), "replacing the socket of a process that is gone");
                    std::fs::remove_file(path).map_err(os("removing the left-over of"))?;
                }
                // A full backlog means that somebody is there.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(SocketError::InUse(path.to_owned())),
                Err(e) => return Err(os("looking who listens on")(e)),
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(os("looking at")(e)),
        }
        let listener = UnixListener::bind(path).map_err(os("making"))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(os("protecting"))?;
        let meta = std::fs::symlink_metadata(path).map_err(os("looking at"))?;
        Ok(Self { path: path.to_owned(), listener, identity: (meta.dev(), meta.ino()) })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A listener for the server; the file stays this value's.
    pub fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }
}

impl Drop for ApiSocket {
    fn drop(&mut self) {
        if let Ok(meta) = std::fs::symlink_metadata(&self.path)
            && (meta.dev(), meta.ino()) == self.identity
        {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_in_use_is_refused_a_left_over_one_is_replaced_and_it_goes_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let first = ApiSocket::bind(&path).unwrap();
        assert!(matches!(ApiSocket::bind(&path), Err(SocketError::InUse(p)) if p == path));
        drop(first);
        assert!(!path.exists());

        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a plain listener leaves its file");
        let second = ApiSocket::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        assert!(matches!(ApiSocket::bind(&path), Err(SocketError::NotASocket(_))));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "data");
    }

    #[test]
    fn the_file_of_a_successor_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let first = ApiSocket::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _second = ApiSocket::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
    }
}
