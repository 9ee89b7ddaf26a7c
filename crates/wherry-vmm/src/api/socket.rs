//! The API socket as a file: made for one process, for its owner only.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use wherry_socket::{SocketError, SocketFile};

/// The API socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ApiSocketError {
    /// Somebody answers there.
    #[error(
        "the API socket {0} is in use by a living process; choose another --api, or end that one with `wherry stop \
         --api {0}`"
    )]
    InUse(PathBuf),
    /// Anything else.
    #[error("API socket: {0}; choose another --api")]
    Socket(#[source] SocketError),
}

impl From<SocketError> for ApiSocketError {
    fn from(error: SocketError) -> Self {
        match error {
            SocketError::InUse(path) => Self::InUse(path),
            other => Self::Socket(other),
        }
    }
}

/// A listening API socket. Dropping it removes the file, if it is still this one.
#[derive(Debug)]
pub struct ApiSocket {
    file: SocketFile,
    listener: UnixListener,
}

impl ApiSocket {
    /// Listens at `path`, readable and writable for the owner only. A socket that nobody listens on is replaced.
    pub fn bind(path: &Path) -> Result<Self, ApiSocketError> {
        let (listener, file) = SocketFile::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(|source| SocketError::Os {
            what: "protecting",
            path: path.to_owned(),
            source,
        })?;
        Ok(Self { file, listener })
    }

    /// The socket of the process that this one has taken over from.
    pub fn adopt(path: &Path, listener: UnixListener) -> Result<Self, ApiSocketError> {
        Ok(Self { file: SocketFile::adopt(path)?, listener })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// A listener for the server; the file stays this value's.
    pub fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_for_its_owner_only_and_one_in_use_says_how_to_end_its_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let first = ApiSocket::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let error = ApiSocket::bind(&path).unwrap_err();
        assert!(matches!(&error, ApiSocketError::InUse(p) if *p == path), "{error}");
        assert!(error.to_string().contains("wherry stop --api"), "{error}");
        drop(first);
        assert!(!path.exists());
    }
}
