//! A link that the demo can cut: a relay in front of a destination.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;

/// Passes TCP connections on to a target until it is cut. Dropping it ends it.
pub struct Relay {
    address: String,
    link: Arc<Link>,
    acceptor: AbortHandle,
}

#[derive(Default)]
struct Link {
    cut: AtomicBool,
    /// One for each connection.
    carriers: Mutex<Vec<AbortHandle>>,
}

impl Relay {
    /// A relay on loopback before `target`, `tcp:HOST:PORT`.
    pub async fn before(target: &str) -> Result<Self> {
        let target = target.strip_prefix("tcp:").context("only TCP is relayed")?.to_owned();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("listening for a relay")?;
        let address = format!("tcp:{}", listener.local_addr().context("asking for the relay's address")?);
        let link = Arc::new(Link::default());
        let shared = link.clone();
        let acceptor = tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                // Without a word, as a network does that is down.
                if !shared.cut.load(Ordering::SeqCst) {
                    let carrier = tokio::spawn(carry(near, target.clone())).abort_handle();
                    shared.carriers().push(carrier);
                }
            }
        });
        Ok(Self { address, link, acceptor: acceptor.abort_handle() })
    }

    /// Where it listens.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Ends all connections, and lets no new ones through.
    pub fn cut(&self) {
        self.link.cut.store(true, Ordering::SeqCst);
        self.link.carriers().drain(..).for_each(|carrier| carrier.abort());
    }

    /// Lets new ones through again.
    pub fn mend(&self) {
        self.link.cut.store(false, Ordering::SeqCst);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.acceptor.abort();
        self.cut();
    }
}

impl Link {
    fn carriers(&self) -> std::sync::MutexGuard<'_, Vec<AbortHandle>> {
        self.carriers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn carry(mut near: TcpStream, target: String) {
    let Ok(mut far) = TcpStream::connect(target).await else { return };
    for stream in [&near, &far] {
        // A delay is all that it costs.
        let _ = stream.set_nodelay(true);
    }
    const BUFFER: usize = 256 << 10;
    // Either end may be gone at any time: that is what it is for.
    let _ = tokio::io::copy_bidirectional_with_sizes(&mut near, &mut far, BUFFER, BUFFER).await;
}
