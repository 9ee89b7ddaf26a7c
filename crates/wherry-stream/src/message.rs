//! What the frames of the control channel say.
//!
//! Every message is a [`Message`]: whom it is about ([`About`]) and one [`Body`]. The encoding is protobuf. A body of a
//! kind that this version does not know is an error, not skipped.
//!
//! ```text
//!   source                                        destination
//!     | Begin (machine, channels, mode, verify)  -> |   builds the machine
//!     | <- Accept, or Refuse with every reason      |
//!     | === data channels are opened, rounds ====== |
//!     | Ping / Pong at any time, either way         |
//!     | Poise (the switchover comes)             -> |
//!     | <- Poised                                   |
//!     | Continue (it did not: another round), Ping-> |   Pong, and back to the rounds; or:
//!     | last pages on data channels, or Follow;     |
//!     | UnitState on data channels, also in rounds; |
//!     | Hashes,                                     |
//!     | StatePiece, Offer                        -> |   checks, loads
//!     | <- Ready, or Abort with the reason          |
//!     | records; Run                             -> |   takes locks, starts
//!     | <- Running, or NotRun with the reason       |
//!     | (postcopy: pages follow; <- Complete, Ended)|
//!     | Confirm                                  -> |
//!     | Query (on any new connection, in doubt)  -> |
//!     | <- Running / NotRun / StillReady / Unknown  |
//!     | Abort (either way, before Run is recorded)  |
//! ```

use prost::Message as _;

/// Whom a message is about.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct About {
    /// Identity of the VM, 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub vm: Vec<u8>,
    /// Epoch the VM will have with its new owner.
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    /// The attempt, 16 random bytes.
    #[prost(bytes = "vec", tag = "3")]
    pub attempt: Vec<u8>,
    /// Incarnation of the destination, 16 random bytes; empty until the destination has named it.
    #[prost(bytes = "vec", tag = "4")]
    pub incarnation: Vec<u8>,
}

/// The handshake's first message.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Begin {
    /// `precopy`, `postcopy` or `hybrid`.
    #[prost(string, tag = "1")]
    pub mode: String,
    /// Data channels that the source will open.
    #[prost(uint32, tag = "2")]
    pub channels: u32,
    /// Whether memory and state are hashed at both ends.
    #[prost(bool, tag = "3")]
    pub verify: bool,
    /// Names of optional features the source offers.
    #[prost(string, repeated, tag = "4")]
    pub features: Vec<String>,
    /// The machine, encoded by the engine; the stream does not look inside.
    #[prost(bytes = "vec", tag = "5")]
    pub machine: Vec<u8>,
}

/// The destination has built the machine.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Accept {
    /// Those of the offered features it takes.
    #[prost(string, repeated, tag = "1")]
    pub features: Vec<String>,
    /// How long it expects to load and start, in microseconds, from earlier journeys; 0 if it has no idea.
    #[prost(uint64, tag = "2")]
    pub load_us: u64,
}

/// The destination cannot run the machine.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Refuse {
    /// Every reason.
    #[prost(string, repeated, tag = "1")]
    pub reasons: Vec<String>,
}

/// Switchover is about to come.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Poise {
    /// The last pages come over data channel 0 alone, and whoever waits for the offer reads them.
    #[prost(bool, tag = "1")]
    pub narrow: bool,
    /// Number of the last round.
    #[prost(uint32, tag = "2")]
    pub round: u32,
    /// Pages that are not there yet follow when the VM runs at the destination.
    #[prost(bool, tag = "3")]
    pub follow: bool,
    /// The source frees those pages as it sends them: a link that is lost then cannot be taken up.
    #[prost(bool, tag = "4")]
    pub release: bool,
}

/// Pages of a block that the destination does not have, or has as they were: they follow. Said between the stop and the
/// offer, and only if [`Poise::follow`] was; what is in no such message is as the destination has it.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Follow {
    /// The block.
    #[prost(uint32, tag = "1")]
    pub block: u32,
    /// Runs of granules: how many to skip, how many follow, how many to skip, and so on, from the start of the block or
    /// from the end of the last message about it.
    #[prost(uint64, repeated, tag = "2")]
    pub runs: Vec<u64>,
}

/// Hashes of memory at the stop, for consecutive chunks of a block.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Hashes {
    /// The block.
    #[prost(uint32, tag = "1")]
    pub block: u32,
    /// The first chunk.
    #[prost(uint64, tag = "2")]
    pub first: u64,
    /// 32 bytes for each chunk; all zero for a chunk whose bytes are all zero.
    #[prost(bytes = "vec", tag = "3")]
    pub digests: Vec<u8>,
}

/// Asks for the hashes of the pages of one chunk, to find the page that differs.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AskPages {
    /// The block.
    #[prost(uint32, tag = "1")]
    pub block: u32,
    /// The chunk.
    #[prost(uint64, tag = "2")]
    pub chunk: u64,
}

/// Hashes of the pages of one chunk.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PageHashes {
    /// The block.
    #[prost(uint32, tag = "1")]
    pub block: u32,
    /// The chunk.
    #[prost(uint64, tag = "2")]
    pub chunk: u64,
    /// 32 bytes for each page.
    #[prost(bytes = "vec", tag = "3")]
    pub digests: Vec<u8>,
}

/// What one data channel has carried so far, as its sender counted.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ChannelTotal {
    /// Frames.
    #[prost(uint64, tag = "1")]
    pub frames: u64,
    /// Bytes of all of them.
    #[prost(uint64, tag = "2")]
    pub bytes: u64,
    /// Running checksum.
    #[prost(uint32, tag = "3")]
    pub checksum: u32,
    /// Sequence number of the last frame.
    #[prost(uint64, tag = "4")]
    pub last: u64,
}

/// A piece of the state that is too large for the offer.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct StatePiece {
    /// The bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub bytes: Vec<u8>,
}

/// A piece of the stream of a state unit. It goes over a data channel: in a round of precopy, while the machine runs, or with the
/// last pages. Within a round all pieces of a stream go over one channel.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct UnitState {
    /// Name of the unit.
    #[prost(string, tag = "1")]
    pub unit: String,
    /// Which one of that name.
    #[prost(uint32, tag = "2")]
    pub instance: u32,
    /// Where it is in the stream, in bytes; 0 begins the stream anew.
    #[prost(uint64, tag = "3")]
    pub offset: u64,
    /// The bytes.
    #[prost(bytes = "vec", tag = "4")]
    pub bytes: Vec<u8>,
}

/// What a unit with a stream took of the blackout at the destination, beside others.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct UnitTime {
    /// Name of the unit.
    #[prost(string, tag = "1")]
    pub unit: String,
    /// Which one of that name.
    #[prost(uint32, tag = "2")]
    pub instance: u32,
    /// Microseconds of the step that the message tells of.
    #[prost(uint64, tag = "3")]
    pub us: u64,
}

/// The whole VM is with the destination now, if it finds so.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Offer {
    /// The state, or its end if pieces went before.
    #[prost(bytes = "vec", tag = "1")]
    pub state: Vec<u8>,
    /// Digest over the sections.
    #[prost(bytes = "vec", tag = "2")]
    pub digest: Vec<u8>,
    /// For each data channel, what it must have carried.
    #[prost(message, repeated, tag = "3")]
    pub channels: Vec<ChannelTotal>,
    /// Microseconds from the stop to this message, for the destination's report.
    #[prost(uint64, tag = "4")]
    pub stopped_us: u64,
    /// Rounds made.
    #[prost(uint32, tag = "5")]
    pub rounds: u32,
    /// Pages follow.
    #[prost(bool, tag = "6")]
    pub follow: bool,
}

/// The destination has everything and can run.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Ready {
    /// Loading the state took that long, in microseconds.
    #[prost(uint64, tag = "1")]
    pub load_us: u64,
    /// Of the time between offer and answer, microseconds spent working (loading, comparing).
    #[prost(uint64, tag = "2")]
    pub busy_us: u64,
    /// Loading, of each unit with a stream.
    #[prost(message, repeated, tag = "3")]
    pub units: Vec<UnitTime>,
}

/// The VM runs at the destination.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Running {
    /// Locks and start took that long, in microseconds.
    #[prost(uint64, tag = "1")]
    pub start_us: u64,
    /// Starting, of each unit with a stream.
    #[prost(message, repeated, tag = "2")]
    pub units: Vec<UnitTime>,
}

/// A reason in words.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Reason {
    /// The reason.
    #[prost(string, tag = "1")]
    pub text: String,
}

/// Nothing but the kind of the message.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Empty {}

/// Latencies, in microseconds.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Latency {
    /// Half of them took no longer.
    #[prost(uint64, tag = "1")]
    pub p50_us: u64,
    /// 99 of 100 took no longer.
    #[prost(uint64, tag = "2")]
    pub p99_us: u64,
    /// The longest.
    #[prost(uint64, tag = "3")]
    pub max_us: u64,
}

/// Page faults of somebody.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Faults {
    /// How many.
    #[prost(uint64, tag = "1")]
    pub faults: u64,
    /// How long those took whose page had not come.
    #[prost(message, optional, tag = "2")]
    pub latency: Option<Latency>,
    /// Which vCPU; or how many workers of the kernel.
    #[prost(uint32, tag = "3")]
    pub number: u32,
    /// Which other process.
    #[prost(string, tag = "4")]
    pub name: String,
    /// Why that is served no longer.
    #[prost(string, optional, tag = "5")]
    pub quarantined: Option<String>,
}

/// Every page that was to follow is there; and how it was to wait for them. Fields 5 and up are zero in what a destination
/// says that did not see it to its end, or that does not know them.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Complete {
    /// Page faults of the guest that were read.
    #[prost(uint64, tag = "1")]
    pub faults: u64,
    /// From reading a fault to its page being visible, in microseconds: half of them took no longer.
    #[prost(uint64, tag = "2")]
    pub p50_us: u64,
    /// 99 of 100 took no longer.
    #[prost(uint64, tag = "3")]
    pub p99_us: u64,
    /// The longest.
    #[prost(uint64, tag = "4")]
    pub max_us: u64,
    /// From the start of the guest to this message.
    #[prost(uint64, tag = "5")]
    pub duration_us: u64,
    /// Faults on pages that had come before.
    #[prost(uint64, tag = "6")]
    pub local: u64,
    /// Requests.
    #[prost(uint64, tag = "7")]
    pub requests: u64,
    /// Pages in them.
    #[prost(uint64, tag = "8")]
    pub pages_asked: u64,
    /// Pages asked for as neighbours.
    #[prost(uint64, tag = "9")]
    pub prefetched: u64,
    /// Of these, how many were touched.
    #[prost(uint64, tag = "10")]
    pub prefetch_hits: u64,
    /// From reading a fault to handing over the request.
    #[prost(message, optional, tag = "11")]
    pub queue: Option<Latency>,
    /// From there until the bytes are there.
    #[prost(message, optional, tag = "12")]
    pub wire: Option<Latency>,
    /// From there until who waits is woken.
    #[prost(message, optional, tag = "13")]
    pub placement: Option<Latency>,
    /// Each vCPU.
    #[prost(message, repeated, tag = "14")]
    pub vcpus: Vec<Faults>,
    /// Workers of the kernel.
    #[prost(message, optional, tag = "15")]
    pub kernel_workers: Option<Faults>,
    /// Other threads.
    #[prost(message, optional, tag = "16")]
    pub other_threads: Option<Faults>,
    /// Other processes.
    #[prost(message, repeated, tag = "17")]
    pub sources: Vec<Faults>,
    /// The longest that a vCPU itself waited.
    #[prost(uint64, tag = "18")]
    pub largest_stall_us: u64,
}

/// One message of the control channel.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Message {
    /// Whom it is about.
    #[prost(message, optional, tag = "1")]
    pub about: Option<About>,
    /// What it says.
    #[prost(
        oneof = "Body",
        tags = "2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30"
    )]
    pub body: Option<Body>,
}

/// What a message says.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum Body {
    /// Source: here is a machine.
    #[prost(message, tag = "2")]
    Begin(Begin),
    /// Destination: it is built.
    #[prost(message, tag = "3")]
    Accept(Accept),
    /// Destination: it cannot be.
    #[prost(message, tag = "4")]
    Refuse(Refuse),
    /// Either: answer with [`Pong`](Self::Pong) at once.
    #[prost(message, tag = "5")]
    Ping(Empty),
    /// Either: the answer.
    #[prost(message, tag = "6")]
    Pong(Empty),
    /// Source: switchover is about to come.
    #[prost(message, tag = "7")]
    Poise(Poise),
    /// Destination: let it come.
    #[prost(message, tag = "8")]
    Poised(Empty),
    /// Source: it does not come; another round does.
    #[prost(message, tag = "9")]
    Continue(Empty),
    /// Source: hashes of memory.
    #[prost(message, tag = "10")]
    Hashes(Hashes),
    /// Destination: which page of a chunk differs?
    #[prost(message, tag = "11")]
    AskPages(AskPages),
    /// Source: hashes of pages.
    #[prost(message, tag = "12")]
    PageHashes(PageHashes),
    /// Source: a part of the state.
    #[prost(message, tag = "13")]
    StatePiece(StatePiece),
    /// Source: everything is sent.
    #[prost(message, tag = "14")]
    Offer(Offer),
    /// Destination: everything is there and loaded.
    #[prost(message, tag = "15")]
    Ready(Ready),
    /// Source: it is yours.
    #[prost(message, tag = "16")]
    Run(Empty),
    /// Destination: it runs.
    #[prost(message, tag = "17")]
    Running(Running),
    /// Destination: it does not run, and never will here.
    #[prost(message, tag = "18")]
    NotRun(Reason),
    /// Source: what became of it?
    #[prost(message, tag = "19")]
    Query(Empty),
    /// Destination: I was ready and have not been told to run.
    #[prost(message, tag = "20")]
    StillReady(Empty),
    /// Destination: I know nothing of it.
    #[prost(message, tag = "21")]
    Unknown(Reason),
    /// Either: it ends here; the source keeps the VM.
    #[prost(message, tag = "22")]
    Abort(Reason),
    /// Source: I have heard that it runs.
    #[prost(message, tag = "23")]
    Confirm(Empty),
    /// Destination: it is aborted here too, and nothing of it is left.
    #[prost(message, tag = "24")]
    Aborted(Empty),
    /// Source: pages that follow.
    #[prost(message, tag = "25")]
    Follow(Follow),
    /// Destination: every page that was to follow is there.
    #[prost(message, boxed, tag = "26")]
    Complete(Box<Complete>),
    /// Source, on a new connection after a lost one: what do you lack? Answered with [`Follow`](Self::Follow) messages.
    #[prost(message, tag = "27")]
    Resume(Empty),
    /// Destination: that was all; open the channels.
    #[prost(message, tag = "28")]
    Resumed(Empty),
    /// Destination: the VM has ended there; nothing more of it is needed.
    #[prost(message, tag = "29")]
    Ended(Reason),
    /// Source, on a data channel: a piece of a unit's stream.
    #[prost(message, tag = "30")]
    UnitState(UnitState),
}

impl Body {
    /// Name of its kind, for messages to people.
    pub fn kind(&self) -> &'static str {
        match self {
            Body::Begin(_) => "Begin",
            Body::Accept(_) => "Accept",
            Body::Refuse(_) => "Refuse",
            Body::Ping(_) => "Ping",
            Body::Pong(_) => "Pong",
            Body::Poise(_) => "Poise",
            Body::Poised(_) => "Poised",
            Body::Continue(_) => "Continue",
            Body::Hashes(_) => "Hashes",
            Body::AskPages(_) => "AskPages",
            Body::PageHashes(_) => "PageHashes",
            Body::StatePiece(_) => "StatePiece",
            Body::Offer(_) => "Offer",
            Body::Ready(_) => "Ready",
            Body::Run(_) => "Run",
            Body::Running(_) => "Running",
            Body::NotRun(_) => "NotRun",
            Body::Query(_) => "Query",
            Body::StillReady(_) => "StillReady",
            Body::Unknown(_) => "Unknown",
            Body::Abort(_) => "Abort",
            Body::Confirm(_) => "Confirm",
            Body::Aborted(_) => "Aborted",
            Body::Follow(_) => "Follow",
            Body::Complete(_) => "Complete",
            Body::Resume(_) => "Resume",
            Body::Resumed(_) => "Resumed",
            Body::Ended(_) => "Ended",
            Body::UnitState(_) => "UnitState",
        }
    }
}

/// The bytes of a control frame are no message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// They cannot be decoded.
    #[error("a control message cannot be decoded: {0}")]
    Decode(String),
    /// The kind is not known to this version.
    #[error("a control message of a kind that this version does not know (or of none)")]
    UnknownKind,
    /// It does not say whom it is about.
    #[error("a {0} message does not say which VM and attempt it is about")]
    AboutNothing(&'static str),
}

impl Message {
    /// A message.
    pub fn new(about: About, body: Body) -> Self {
        Self { about: Some(about), body: Some(body) }
    }

    /// Its bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.encode_to_vec()
    }

    /// Takes bytes apart. The lengths of VM, attempt and incarnation are checked.
    pub fn from_bytes(bytes: &[u8]) -> Result<(About, Body), MessageError> {
        let message = Self::decode(bytes).map_err(|e| MessageError::Decode(e.to_string()))?;
        let body = message.body.ok_or(MessageError::UnknownKind)?;
        let sized = |about: &About| {
            about.vm.len() == 16 && about.attempt.len() == 16 && matches!(about.incarnation.len(), 0 | 16)
        };
        match message.about.filter(sized) {
            Some(about) => Ok((about, body)),
            None => Err(MessageError::AboutNothing(body.kind())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about() -> About {
        About { vm: vec![1; 16], epoch: 3, attempt: vec![2; 16], incarnation: vec![] }
    }

    #[test]
    fn a_message_comes_back_as_it_was() {
        let body = Body::Offer(Offer { state: vec![7; 9], digest: vec![1; 32], rounds: 4, ..Offer::default() });
        let bytes = Message::new(about(), body.clone()).to_bytes();
        assert_eq!(Message::from_bytes(&bytes), Ok((about(), body)));
    }

    #[test]
    fn an_unknown_kind_and_a_message_about_nothing_are_errors() {
        let unknown = Message { about: Some(about()), body: None }.to_bytes();
        assert_eq!(Message::from_bytes(&unknown), Err(MessageError::UnknownKind));
        let mut short = about();
        short.vm.pop();
        let bytes = Message::new(short, Body::Run(Empty {})).to_bytes();
        assert_eq!(Message::from_bytes(&bytes), Err(MessageError::AboutNothing("Run")));
        assert!(matches!(Message::from_bytes(&[0xff; 7]), Err(MessageError::Decode(_))));
    }

    #[test]
    fn the_page_lists_every_message_with_its_number() {
        let bodies = [
            Body::Begin(Begin::default()),
            Body::Accept(Accept::default()),
            Body::Refuse(Refuse::default()),
            Body::Ping(Empty {}),
            Body::Pong(Empty {}),
            Body::Poise(Poise::default()),
            Body::Poised(Empty {}),
            Body::Continue(Empty {}),
            Body::Hashes(Hashes::default()),
            Body::AskPages(AskPages::default()),
            Body::PageHashes(PageHashes::default()),
            Body::StatePiece(StatePiece::default()),
            Body::Offer(Offer::default()),
            Body::Ready(Ready::default()),
            Body::Run(Empty {}),
            Body::Running(Running::default()),
            Body::NotRun(Reason::default()),
            Body::Query(Empty {}),
            Body::StillReady(Empty {}),
            Body::Unknown(Reason::default()),
            Body::Abort(Reason::default()),
            Body::Confirm(Empty {}),
            Body::Aborted(Empty {}),
            Body::Follow(Follow::default()),
            Body::Complete(Box::default()),
            Body::Resume(Empty {}),
            Body::Resumed(Empty {}),
            Body::Ended(Reason::default()),
            Body::UnitState(UnitState::default()),
        ];
        let page = include_str!("../../../docs/wire.md");
        let rows = page.lines().skip_while(|l| !l.starts_with("| message |")).skip(2);
        let listed: Vec<(String, u64)> = rows
            .take_while(|l| l.starts_with('|'))
            .map(|row| {
                let cells: Vec<_> = row.split('|').map(str::trim).collect();
                (cells[1].to_owned(), cells[2].parse().unwrap())
            })
            .collect();
        let known: Vec<(String, u64)> = bodies
            .into_iter()
            .map(|body| {
                let kind = body.kind().to_owned();
                let bytes = Message { about: None, body: Some(body) }.to_bytes();
                // The key of a field: its number and, in the last three bits, 2 for a message.
                let key = prost::encoding::decode_varint(&mut bytes.as_slice()).unwrap();
                (kind, key >> 3)
            })
            .collect();
        assert_eq!(listed, known);
    }
}
