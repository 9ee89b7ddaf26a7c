//! The client's half of the API: one request, or one stream of events, over the UNIX socket of a Wherry process.
//!
//! Every request has a deadline. An error tells whether the socket is missing, its process is dead, what answers is no
//! Wherry, or the Wherry there says no.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use wherry_vmm::api::BASE;
use wherry_vmm::api::types::{ErrorBody, ErrorCode};

/// No answer is larger, in bytes.
const MAX_ANSWER: usize = 16 << 20;

/// A request was not answered, or answered with no.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no socket.
    #[error("there is no API socket {}; is the VM running, and is this its --api?", .0.display())]
    Missing(PathBuf),
    /// There is a socket, and nobody behind it.
    #[error("nobody answers at the API socket {}: its process is gone. `wherry run` or `receive` with the same --api replaces it", .0.display())]
    Dead(PathBuf),
    /// Somebody answers who is no Wherry.
    #[error("what answers at {} is no Wherry: {what}", path.display())]
    Foreign {
        /// The socket.
        path: PathBuf,
        /// What it said.
        what: String,
    },
    /// The connection broke before the answer was complete.
    #[error("the connection to {} broke before the answer: {what}. The process may have ended", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// How.
        what: String,
    },
    /// No answer in time.
    #[error("no answer from {} within {} s; it may still happen: see `wherry status`", path.display(), limit.as_secs())]
    Deadline {
        /// The socket.
        path: PathBuf,
        /// The deadline.
        limit: Duration,
    },
    /// The socket cannot be used.
    #[error("connecting to the API socket {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The Wherry there says no.
    #[error("{message}")]
    Refused {
        /// Which kind of no.
        code: ErrorCode,
        /// Its reason.
        message: String,
    },
}

impl ClientError {
    /// Whether the process behind the socket is not there (any more).
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Missing(_) | Self::Dead(_) | Self::Broken { .. })
    }
}

/// Talks to one Wherry process.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// For the process whose API socket is `path`.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Asks for something.
    pub async fn get<T: DeserializeOwned>(&self, path: &str, limit: Duration) -> Result<T, ClientError> {
        self.call("GET", path, Bytes::new(), limit).await
    }

    /// Has something done that needs no body.
    pub async fn put<T: DeserializeOwned>(&self, path: &str, limit: Duration) -> Result<T, ClientError> {
        self.call("PUT", path, Bytes::new(), limit).await
    }

    /// Has something done as the body says.
    pub async fn put_json<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body)
            .map_err(|e| ClientError::Broken { path: self.path.clone(), what: e.to_string() })?;
        self.call("PUT", path, body.into(), limit).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: Bytes,
        limit: Duration,
    ) -> Result<T, ClientError> {
        let answer = async {
            let response = self.send(method, path, body).await?;
            let status = response.status();
            let bytes = http_body_util::Limited::new(response.into_body(), MAX_ANSWER)
                .collect()
                .await
                .map_err(|e| ClientError::Broken { path: self.path.clone(), what: e.to_string() })?
                .to_bytes();
            self.read(status, &bytes)
        };
        tokio::time::timeout(limit, answer)
            .await
            .unwrap_or_else(|_| Err(ClientError::Deadline { path: self.path.clone(), limit }))
    }

    fn read<T: DeserializeOwned>(&self, status: StatusCode, bytes: &[u8]) -> Result<T, ClientError> {
        let foreign =
            |e: serde_json::Error| ClientError::Foreign { path: self.path.clone(), what: format!("{status}, {e}") };
        if status.is_success() {
            return serde_json::from_slice(bytes).map_err(foreign);
        }
        let body: ErrorBody = serde_json::from_slice(bytes).map_err(foreign)?;
        Err(ClientError::Refused { code: body.error.code, message: body.error.message })
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, ClientError> {
        let stream = UnixStream::connect(&self.path).await.map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => ClientError::Missing(self.path.clone()),
            io::ErrorKind::ConnectionRefused => ClientError::Dead(self.path.clone()),
            _ => ClientError::Connect { path: self.path.clone(), source: e },
        })?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(|e| self.broken(&e))?;
        tokio::spawn(connection);
        Ok(sender)
    }

    async fn send(&self, method: &str, path: &str, body: Bytes) -> Result<Response<Incoming>, ClientError> {
        let mut sender = self.connect().await?;
        let request = Request::builder()
            .method(method)
            .uri(format!("{BASE}{path}"))
            .header("Host", "localhost")
            .header("Content-Type", "application/json")
            .body(Full::new(body))
            .map_err(|e| ClientError::Broken { path: self.path.clone(), what: e.to_string() })?;
        sender.send_request(request).await.map_err(|e| self.broken(&e))
    }

    fn broken(&self, error: &hyper::Error) -> ClientError {
        if error.is_parse() {
            ClientError::Foreign { path: self.path.clone(), what: error.to_string() }
        } else {
            ClientError::Broken { path: self.path.clone(), what: error.to_string() }
        }
    }

    /// Opens the stream of events.
    pub async fn events(&self, limit: Duration) -> Result<Events, ClientError> {
        let response = tokio::time::timeout(limit, self.send("GET", "/events", Bytes::new()))
            .await
            .unwrap_or_else(|_| Err(ClientError::Deadline { path: self.path.clone(), limit }))?;
        if !response.status().is_success() {
            return Err(ClientError::Foreign {
                path: self.path.clone(),
                what: format!("{} for its events", response.status()),
            });
        }
        Ok(Events { body: response.into_body(), text: Vec::new() })
    }
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// `phase`, `round` or `job`.
    pub name: String,
    /// JSON.
    pub data: String,
}

/// A stream of server-sent events.
#[derive(Debug)]
pub struct Events {
    body: Incoming,
    text: Vec<u8>,
}

impl Events {
    /// The next event; `None` when the stream has ended, for whatever reason.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            while let Some(end) = self.text.windows(2).position(|w| w == b"\n\n") {
                let block: Vec<u8> = self.text.drain(..end + 2).collect();
                if let Some(event) = parse(&String::from_utf8_lossy(&block)) {
                    return Some(event);
                }
            }
            if self.text.len() > MAX_ANSWER {
                return None;
            }
            let frame = self.body.frame().await?.ok()?;
            if let Ok(data) = frame.into_data() {
                self.text.extend_from_slice(&data);
            }
        }
    }
}

/// Takes one block of an event stream apart; comments and unknown fields are nothing.
fn parse(block: &str) -> Option<Event> {
    let field = |name: &str| {
        let values = block.lines().filter_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
        let values: Vec<_> = values.map(|v| v.strip_prefix(' ').unwrap_or(v)).collect();
        (!values.is_empty()).then(|| values.join("\n"))
    };
    Some(Event { name: field("event")?, data: field("data")? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    /// A socket that answers one connection with `answer`.
    fn answering(answer: &'static [u8]) -> (tempfile::TempDir, Client, std::thread::JoinHandle<()>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(answer);
        });
        (dir, Client::new(&path), thread)
    }

    #[test]
    fn a_missing_socket_a_dead_one_and_a_foreign_one_are_told_apart() {
        let limit = Duration::from_secs(10);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let get = |client: Client| block_on(async move { client.get::<serde_json::Value>("/vm", limit).await });
        assert!(matches!(get(Client::new(&path)), Err(ClientError::Missing(_))));
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(matches!(get(Client::new(&path)), Err(ClientError::Dead(_))));

        let (_dir, client, thread) = answering(b"220 mail.example.org ESMTP\r\n");
        assert!(matches!(get(client), Err(ClientError::Foreign { .. })));
        thread.join().unwrap();
        let (_dir, client, thread) = answering(b"HTTP/1.1 404 Not Found\r\nContent-Length: 6\r\n\r\nsorry\n");
        assert!(matches!(get(client), Err(ClientError::Foreign { .. })));
        thread.join().unwrap();
        let (_dir, client, thread) = answering(b"");
        assert!(matches!(get(client), Err(ClientError::Broken { .. })));
        thread.join().unwrap();
    }

    #[test]
    fn a_process_that_accepts_and_says_nothing_meets_the_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let client = Client::new(&path);
        let limit = Duration::from_millis(50);
        let error = block_on(async { client.get::<serde_json::Value>("/vm", limit).await }).unwrap_err();
        assert!(matches!(error, ClientError::Deadline { .. }), "{error}");
    }

    #[test]
    fn events_are_taken_apart_wherever_the_stream_is_cut() {
        assert_eq!(parse(": keep alive\n\n"), None);
        let event = parse("event: phase\ndata: {\"a\":1}\n\n").unwrap();
        assert_eq!((event.name.as_str(), event.data.as_str()), ("phase", "{\"a\":1}"));
        assert_eq!(parse("data:x\ndata: y\nevent:e\n\n").unwrap().data, "x\ny");
    }
}
