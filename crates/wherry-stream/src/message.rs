//! What the frames of the control channel say. Numbered fields (protobuf encoding): a reader skips fields it does not
//! know, so a field that an older reader must not ignore needs a feature in the handshake or a new version.

/// A message: exactly one of these.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Message {
    /// Which.
    #[prost(oneof = "Body", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12")]
    pub body: Option<Body>,
}

/// The messages.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Body {
    /// Source: what it wants to move and how.
    #[prost(message, tag = "1")]
    Handshake(Handshake),
    /// Destination: whether it can.
    #[prost(message, tag = "2")]
    HandshakeReply(HandshakeReply),
    /// Source: all channels are open, pages follow.
    #[prost(message, tag = "3")]
    Start(Start),
    /// Source: everything has been sent and this is the state.
    #[prost(message, tag = "4")]
    Offer(Offer),
    /// Destination: everything has arrived and is loaded.
    #[prost(message, tag = "5")]
    Ready(Ready),
    /// Source: the VM is yours. Sent after it was recorded.
    #[prost(message, tag = "6")]
    Run(Run),
    /// Destination: the VM runs here.
    #[prost(message, tag = "7")]
    Running(Running),
    /// Destination: it does not run here and never will in this attempt.
    #[prost(message, tag = "8")]
    NotRun(NotRun),
    /// Destination: it knows nothing of this attempt; decides nothing.
    #[prost(message, tag = "9")]
    Unknown(Unknown),
    /// Either: the journey ends here. Only before `Run`.
    #[prost(message, tag = "10")]
    Cancel(Cancel),
    /// Either: figures for the other side's progress report.
    #[prost(message, tag = "11")]
    Progress(Progress),
    /// Source: hashes of all RAM at the stop, for `--verify`.
    #[prost(message, tag = "12")]
    VerifyHashes(VerifyHashes),
}

impl From<Body> for Message {
    fn from(body: Body) -> Self {
        Self { body: Some(body) }
    }
}

/// See [`Body::Handshake`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct Handshake {
    /// Features the source can use, by name.
    #[prost(string, repeated, tag = "1")]
    pub features: Vec<String>,
    /// The machine's description, opaque to the wire.
    #[prost(bytes = "vec", tag = "2")]
    pub description: Vec<u8>,
    /// Data channels the source wants to open.
    #[prost(uint32, tag = "3")]
    pub data_channels: u32,
    /// Blackout the user allows, in microseconds.
    #[prost(uint64, tag = "4")]
    pub downtime_limit_us: u64,
    /// Epoch of the VM's ownership at the source.
    #[prost(uint64, tag = "5")]
    pub epoch: u64,
    /// Whether RAM and state are to be compared by hashes before the start.
    #[prost(bool, tag = "6")]
    pub verify: bool,
}

/// See [`Body::HandshakeReply`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct HandshakeReply {
    /// Of the offered features, those that will be used.
    #[prost(string, repeated, tag = "1")]
    pub features: Vec<String>,
    /// Every reason why the destination cannot run the machine; empty if it can.
    #[prost(string, repeated, tag = "2")]
    pub refusals: Vec<String>,
    /// Data channels it will accept, at most what was wanted.
    #[prost(uint32, tag = "3")]
    pub data_channels: u32,
    /// Identity of this run of the destination, 16 random bytes.
    #[prost(bytes = "vec", tag = "4")]
    pub incarnation: Vec<u8>,
    /// Name and version of the program, for messages.
    #[prost(string, tag = "5")]
    pub program: String,
}

/// See [`Body::Start`].
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Start {}

/// What was sent on one channel.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct ChannelDigest {
    /// Frames.
    #[prost(uint64, tag = "1")]
    pub frames: u64,
    /// Bytes.
    #[prost(uint64, tag = "2")]
    pub bytes: u64,
    /// Sequence number of the last frame, absent if there was none.
    #[prost(uint64, optional, tag = "3")]
    pub last_sequence: Option<u64>,
    /// Running checksum.
    #[prost(fixed32, tag = "4")]
    pub checksum: u32,
}

impl From<crate::ChannelStats> for ChannelDigest {
    fn from(stats: crate::ChannelStats) -> Self {
        Self { frames: stats.frames, bytes: stats.bytes, last_sequence: stats.last_sequence, checksum: stats.checksum }
    }
}

/// See [`Body::Offer`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct Offer {
    /// The attempt.
    #[prost(bytes = "vec", tag = "1")]
    pub attempt: Vec<u8>,
    /// Epoch of the ownership that is offered.
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    /// The saved state.
    #[prost(bytes = "vec", tag = "3")]
    pub state: Vec<u8>,
    /// Digest of the saved state.
    #[prost(bytes = "vec", tag = "4")]
    pub digest: Vec<u8>,
    /// Per data channel, in the order of their index, what was sent.
    #[prost(message, repeated, tag = "5")]
    pub channels: Vec<ChannelDigest>,
}

/// See [`Body::Ready`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct Ready {
    /// How long loading took, in microseconds.
    #[prost(uint64, tag = "1")]
    pub load_us: u64,
}

/// See [`Body::Run`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct Run {
    /// The attempt.
    #[prost(bytes = "vec", tag = "1")]
    pub attempt: Vec<u8>,
    /// The new epoch.
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    /// The incarnation that was ready.
    #[prost(bytes = "vec", tag = "3")]
    pub incarnation: Vec<u8>,
}

/// See [`Body::Running`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct Running {
    /// How long the start took, in microseconds.
    #[prost(uint64, tag = "1")]
    pub start_us: u64,
    /// The new epoch.
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
}

/// See [`Body::NotRun`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct NotRun {
    /// Why.
    #[prost(string, tag = "1")]
    pub reason: String,
    /// The incarnation that promises it.
    #[prost(bytes = "vec", tag = "2")]
    pub incarnation: Vec<u8>,
}

/// See [`Body::Unknown`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct Unknown {
    /// The incarnation that answers.
    #[prost(bytes = "vec", tag = "1")]
    pub incarnation: Vec<u8>,
}

/// See [`Body::Cancel`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct Cancel {
    /// Why.
    #[prost(string, tag = "1")]
    pub reason: String,
}

/// See [`Body::Progress`].
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Progress {
    /// Round, from 1.
    #[prost(uint32, tag = "1")]
    pub round: u32,
    /// Bytes of memory still to be sent.
    #[prost(uint64, tag = "2")]
    pub remaining: u64,
    /// Bytes of memory to be sent in all.
    #[prost(uint64, tag = "3")]
    pub total: u64,
}

/// See [`Body::VerifyHashes`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct VerifyHashes {
    /// Per RAM block, in the order of the description.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub blocks: Vec<Vec<u8>>,
}
