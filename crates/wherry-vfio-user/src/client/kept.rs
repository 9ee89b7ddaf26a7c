//! A connection that outlives the process: another one goes on with it, and the server does not notice.
//!
//! ```text
//!   old process                                   new process
//!   descriptors(), note()   -- over some socket -->  Client::inherit   (at rest)
//!   rest()                  -- its bytes ---------->  take
//!                                                     go_on
//! ```
//!
//! Until the new one goes on, the old one can: what [`Client::rest`] gave is then forgotten.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use prost::Message;
use rustix::io::Errno;

use super::{Client, DmaHandler, Mapped, Maps, Options};
use crate::capabilities::{Extensions, MAJOR, MINOR, Version};
use crate::error::VfioUserError;
use crate::link::{Link, SavedLink};

/// What the two sides agreed on.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Note {
    /// What the server takes: the data of its `VFIO_USER_VERSION`.
    #[prost(bytes = "vec", tag = "1")]
    version: Vec<u8>,
    /// Extensions that are in use.
    #[prost(bool, tag = "2")]
    p2p: bool,
    #[prost(bool, tag = "3")]
    estimates: bool,
    #[prost(bool, tag = "4")]
    userfaultfd: bool,
}

/// What a client at rest knows.
#[derive(Clone, PartialEq, Message)]
struct SavedClient {
    #[prost(message, optional, tag = "1")]
    link: Option<SavedLink>,
    /// There, if there is a twin socket.
    #[prost(message, optional, tag = "2")]
    twin: Option<SavedLink>,
    #[prost(message, repeated, tag = "3")]
    maps: Vec<SavedMap>,
    /// The interrupt of PCI that has eventfds now.
    #[prost(uint32, optional, tag = "4")]
    active_irq: Option<u32>,
}

/// A DMA map.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct SavedMap {
    #[prost(uint64, tag = "1")]
    address: u64,
    #[prost(uint64, tag = "2")]
    size: u64,
    #[prost(bool, tag = "3")]
    readable: bool,
    #[prost(bool, tag = "4")]
    writable: bool,
}

impl Client {
    /// The sockets that another process needs to go on with the connection: the connection, and its twin if it has one.
    pub fn descriptors(&self) -> (Arc<dyn AsFd + Send + Sync>, Option<Arc<dyn AsFd + Send + Sync>>) {
        (self.link.clone(), self.twin.clone().map(|twin| twin as Arc<dyn AsFd + Send + Sync>))
    }

    /// What another process has to know to [inherit](Self::inherit) the connection. It does not change.
    pub fn note(&self) -> Vec<u8> {
        let version = Version { major: MAJOR, minor: MINOR, capabilities: self.server.clone() };
        let Extensions { p2p, estimates, userfaultfd } = self.extensions;
        Note { version: version.encode(), p2p, estimates, userfaultfd }.encode_to_vec()
    }

    /// Over the connection of another process, which still uses it: at rest until [`go_on`](Self::go_on). If it is dropped before, the
    /// connection stays as it is.
    pub fn inherit(
        (connection, twin): (OwnedFd, Option<OwnedFd>),
        note: &[u8],
        peer: &str,
        options: Options,
        memory: Arc<dyn DmaHandler>,
    ) -> Result<Self, VfioUserError> {
        let wrong = |reason: String| VfioUserError::Inherited { peer: peer.into(), reason };
        let failed = |error: std::io::Error| VfioUserError::Connect {
            peer: peer.into(),
            source: error.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error),
        };
        let Note { version, p2p, estimates, userfaultfd } = Note::decode(note).map_err(|e| wrong(e.to_string()))?;
        let server = Version::decode(&version).map_err(|error| wrong(error.to_string()))?.capabilities;
        if server.twin() != twin.is_some() {
            return Err(wrong(format!("a twin socket was agreed on: {}, came: {}", server.twin(), twin.is_some())));
        }
        let link =
            |socket: OwnedFd| Link::inherited(socket.into(), peer, options.limit, true).map(Arc::new).map_err(failed);
        let mut this = Self {
            link: link(connection)?,
            twin: twin.map(link).transpose()?,
            options,
            server,
            extensions: Extensions { p2p, estimates, userfaultfd },
            maps: Maps::default(),
            active_irq: std::sync::Mutex::new(None),
            threads: Vec::new(),
        };
        this.attend(&memory).map_err(failed)?;
        Ok(this)
    }

    /// Comes to rest: requests that are under way are answered, in both directions, and no new one is begun; those of other threads
    /// wait until the client goes on. What the process has to know that goes on with the connection.
    pub fn rest(&self, deadline: Instant) -> Result<Vec<u8>, VfioUserError> {
        let rested = || {
            let link = Some(self.link.rest(deadline)?);
            let twin = self.twin.as_ref().map(|twin| twin.rest(deadline)).transpose()?;
            let map = |(address, map): (&u64, &Mapped)| {
                let Mapped { size, readable, writable } = *map;
                SavedMap { address: *address, size, readable, writable }
            };
            let maps = self.maps().iter().map(map).collect();
            let active_irq = *self.active_irq.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            Ok(SavedClient { link, twin, maps, active_irq }.encode_to_vec())
        };
        rested().inspect_err(|_| self.go_on())
    }

    /// Takes what the process before knew, as its [`rest`](Self::rest) gave it.
    pub fn take(&self, saved: &[u8]) -> Result<(), VfioUserError> {
        let wrong = |reason: String| VfioUserError::Inherited { peer: self.link.peer().into(), reason };
        let saved = SavedClient::decode(saved).map_err(|error| wrong(error.to_string()))?;
        let link = saved.link.ok_or_else(|| wrong("nothing of its connection".into()))?;
        self.link.take(&link, Vec::new()).map_err(wrong)?;
        match (&self.twin, &saved.twin) {
            (Some(twin), Some(saved)) => twin.take(saved, Vec::new()).map_err(wrong)?,
            (None, None) => {}
            _ => return Err(wrong("only one process has a twin socket".into())),
        }
        let map = |SavedMap { address, size, readable, writable }| (address, Mapped { size, readable, writable });
        *self.maps() = saved.maps.into_iter().map(map).collect();
        *self.active_irq.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = saved.active_irq;
        Ok(())
    }

    /// Goes on after it came to rest, here or in the process before.
    pub fn go_on(&self) {
        self.link.go_on();
        if let Some(twin) = &self.twin {
            twin.go_on();
        }
    }
}
