//! TLS 1.3 on a connection, both ends with a certificate of the same authority.
//!
//! [`Tls`] holds the keys. A connection or listener that requires it ([`Connection::require_tls`],
//! [`Listener::require_tls`](crate::Listener::require_tls)) makes the handshake before its hello, so that a stranger
//! learns nothing, not even what channel was wanted. TCP and UNIX alike. Resumption and early data are off: each channel
//! proves itself.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{UnbufferedServerConnection, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::tls_session::{RECORD_HEADER, Session, Side};
use crate::{Connection, Role, StreamError};

/// Where the keys are, all in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// This host's certificate, and intermediate ones after it.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authorities whose certificates are accepted from the peer.
    pub authorities: PathBuf,
    /// The name that the listening peer's certificate must have; without it, the host that was connected to.
    pub peer_name: Option<String>,
}

/// The keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or has not what it should have.
    #[error("cannot read the TLS {what} from {}: {reason}", .path.display())]
    File {
        /// What it should have.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The files do not fit together.
    #[error("the TLS certificate, key and authorities cannot be used: {0}")]
    Unusable(String),
    /// No name to compare with the peer's certificate.
    #[error("{0:?} is no name that a TLS certificate can have; give the peer's name (--tls-peer-name)")]
    Name(String),
    /// The handshake failed.
    #[error("TLS handshake failed: {0}")]
    Handshake(String),
}

/// Keys and authorities, ready for use at either end.
#[derive(Clone, Debug)]
pub struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    peer_name: Option<String>,
}

fn file_error(what: &'static str, path: &Path) -> impl FnOnce(rustls::pki_types::pem::Error) -> TlsError {
    let path = path.to_owned();
    move |e| TlsError::File { what, path, reason: e.to_string() }
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all: Vec<_> =
        CertificateDer::pem_file_iter(path).and_then(Iterator::collect).map_err(file_error(what, path))?;
    if all.is_empty() {
        let reason = "the file has no certificate in PEM".into();
        return Err(TlsError::File { what, path: path.to_owned(), reason });
    }
    Ok(all)
}

impl Tls {
    /// Reads the files.
    pub fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        let chain = certificates("certificate", &files.certificate)?;
        let authorities = certificates("authorities", &files.authorities)?;
        let key = PrivateKeyDer::from_pem_file(&files.key).map_err(file_error("private key", &files.key))?;
        let unusable = |e: &dyn std::fmt::Display| TlsError::Unusable(e.to_string());

        let mut roots = RootCertStore::empty();
        for authority in authorities {
            roots.add(authority).map_err(|e| unusable(&e))?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = [&rustls::version::TLS13];
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&versions)
            .map_err(|e| unusable(&e))?
            .with_root_certificates(roots.clone())
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(|e| unusable(&e))?;
        client.resumption = rustls::client::Resumption::disabled();
        let verifier =
            WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build().map_err(|e| unusable(&e))?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions)
            .map_err(|e| unusable(&e))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|e| unusable(&e))?;
        server.send_tls13_tickets = 0;
        Ok(Self { client: Arc::new(client), server: Arc::new(server), peer_name: files.peer_name.clone() })
    }

    /// This end of a session. `host` is what was connected to.
    fn side(&self, role: Role, host: Option<&str>) -> Result<Side, TlsError> {
        let failed = |e: rustls::Error| TlsError::Handshake(e.to_string());
        match role {
            Role::Acceptor => UnbufferedServerConnection::new(self.server.clone()).map(Side::Server).map_err(failed),
            Role::Opener => {
                let name = self.peer_name.as_deref().or(host).unwrap_or_default();
                let name = ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Name(name.to_owned()))?;
                UnbufferedClientConnection::new(self.client.clone(), name).map(Side::Client).map_err(failed)
            }
        }
    }
}

/// Whether these are the first bytes of a TLS record: a type, and the version that all of them say.
pub(crate) fn looks_like_tls(bytes: &[u8]) -> bool {
    matches!(bytes, [0x14..=0x17, 0x03, ..])
}

/// The fatal alert `unexpected_message` as it is sent before there are keys.
const UNEXPECTED_MESSAGE: [u8; 7] = [0x15, 0x03, 0x03, 0, 2, 2, 10];

impl Connection {
    /// Requires TLS: the hello, and all that follows it, is only exchanged with a peer that has proved itself. Nothing is
    /// sent yet; the handshake is made by [`Hello::open`](crate::Hello::open) or
    /// [`Greeting::read`](crate::Greeting::read).
    pub fn require_tls(&mut self, tls: &Tls) {
        self.tls = Some(tls.clone());
    }

    /// Makes the handshake if TLS is required and it has not been made.
    pub(crate) fn secure(&mut self, role: Role, deadline: Instant) -> Result<(), StreamError> {
        let Some(tls) = self.tls.take() else { return Ok(()) };
        self.set_deadline(Some(deadline));
        let wrong = |connection: &Self, source| StreamError::Tls { channel: connection.name().to_owned(), source };
        let side = tls.side(role, self.host.as_deref()).map_err(|e| wrong(self, e))?;
        let mut session = Session::new(side);
        let mut received: Vec<u8> = Vec::new();
        loop {
            let (to_send, step) = session.handshake(&mut received);
            if !to_send.is_empty() {
                // After a failure these bytes tell the peer why; whether they arrive does not change the error.
                let sent = self.writer.write_all(&to_send, false, "making the TLS handshake");
                if step.is_ok() {
                    sent?;
                }
            }
            match step {
                Ok(true) => break,
                Ok(false) => self.read_record(&mut received)?,
                Err(e) => return Err(wrong(self, TlsError::Handshake(e.to_string()))),
            }
        }
        if !received.is_empty() {
            return Err(wrong(self, TlsError::Handshake("the peer spoke before its turn".into())));
        }
        self.set_session(session);
        Ok(())
    }

    /// Receives one record and no byte more.
    fn read_record(&mut self, into: &mut Vec<u8>) -> Result<(), StreamError> {
        let doing = "making the TLS handshake";
        let at = into.len();
        into.resize(at + RECORD_HEADER, 0);
        self.reader.read_exact(&mut into[at..], doing)?;
        if !looks_like_tls(&into[at..]) {
            // The peer understands it as little as we understand the peer, but it knows that it is TLS.
            let _ = self.writer.write_all(&UNEXPECTED_MESSAGE, false, doing);
            let reason = "the peer does not speak TLS; is it configured at both ends?".into();
            return Err(StreamError::Tls { channel: self.name().to_owned(), source: TlsError::Handshake(reason) });
        }
        let length = usize::from(u16::from_be_bytes([into[at + 3], into[at + 4]]));
        into.resize(at + RECORD_HEADER + length, 0);
        self.reader.read_exact(&mut into[at + RECORD_HEADER..], doing)
    }
}
