//! The wire between two ends of a journey: endpoints, connections, channels and frames. It knows no VM.
//!
//! From the bottom to the top:
//!
//! - [`Endpoint`], [`Listener`]: where the peer is, `tcp:HOST:PORT` or `unix:PATH`.
//! - [`Connection`]: a stream socket whose every read and write has an idle limit or a deadline, and which a [`Closer`]
//!   ends from another thread. It moves guest memory ([`IoRange`]) with vectored calls.
//! - [`Tls`]: what a connection or listener may require, so that both ends prove themselves first.
//! - [`Hello`]: the first bytes in both directions of a connection. They declare protocol version, kind and index of the
//!   channel and the attempt it belongs to, and turn the connection into a [`Channel`].
//! - [`FrameWriter`], [`FrameReader`]: typed, bounded, checksummed, numbered frames on a channel, and the running
//!   [`ChannelStats`] that both ends compare before a VM changes its owner.
//! - [`message`]: what the frames of the control channel say.
//!
//! Everything that arrives is hostile until it is checked: no length is believed before it is bounded, and no decoder
//! panics on any bytes. The layouts are specified in `docs/wire.md`.

mod channel;
mod connection;
mod endpoint;
mod error;
mod frame;
mod hello;
mod io_range;
mod listener;
pub mod message;
mod pages;
mod socket;
mod tls;
mod tls_session;

pub use channel::{Channel, ChannelStats, DATA_UNSENT_LIMIT, Frame, FrameReader, FrameWriter, Meter};
pub use connection::{Closer, Connection, ReadHalf, WriteHalf};
pub use endpoint::{Endpoint, EndpointError};
pub use error::StreamError;
pub use frame::{
    Ack, FRAME_HEADER_BYTES, FRAME_MAGIC, FrameError, FrameHeader, FrameKind, MAX_CONTROL_BYTES, MAX_PAGES_BYTES,
    RoundEnd,
};
pub use hello::{
    ChannelKind, Greeting, HELLO_BYTES, HELLO_MAGIC, Hello, HelloError, HelloRefusal, RawHello, Role, VERSION_MAX,
    VERSION_MIN,
};
pub use io_range::{FileRange, IoRange};
pub use listener::Listener;
pub use pages::{EXTENT_BYTES, Extent, ExtentKind, GRANULE, MAX_BULK_BYTES, MAX_EXTENTS, decode_extents, decode_table};
pub use socket::Path;
pub use tls::{Tls, TlsError, TlsFiles};
