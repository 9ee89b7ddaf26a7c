//! What the two processes say to each other. Unknown fields are ignored, so either side may be the newer one; a change that the other
//! side has to understand raises [`PROTOCOL`].

use prost::Message;
use wherry_handover::Parcel;

use crate::error::Cause;

/// Version of what is said here. 2: a state may be sent as a proof.
pub const PROTOCOL: u32 = 2;
/// The oldest version that is still understood.
pub const OLDEST: u32 = 1;
/// The oldest version in which a program can prove that it loads a state, and be executed then.
pub const EXEC: u32 = 2;

/// New process: who it is.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Hello {
    /// Newest version of the protocol that it speaks.
    #[prost(uint32, tag = "1")]
    pub newest: u32,
    /// Oldest one.
    #[prost(uint32, tag = "2")]
    pub oldest: u32,
    /// Its name and version, for messages.
    #[prost(string, tag = "3")]
    pub program: String,
}

/// Old process: what goes over. The descriptors of RAM and of the word that decides who runs come with `Kept`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Describe {
    /// Version of the protocol that is spoken from here on.
    #[prost(uint32, tag = "1")]
    pub protocol: u32,
    /// The machine: [`MachineDescription`](crate::machine::MachineDescription).
    #[prost(bytes = "vec", tag = "2")]
    pub machine: Vec<u8>,
    /// What the program says beside the machine.
    #[prost(bytes = "vec", tag = "3")]
    pub host: Vec<u8>,
    /// Epoch of the VM, which an update does not change.
    #[prost(uint64, tag = "4")]
    pub epoch: u64,
}

/// Name of a descriptor.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Name {
    /// What it is for.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Which one of that name.
    #[prost(uint32, tag = "2")]
    pub index: u32,
}

/// Old process: descriptors that go over, which come with it in this order; or names of those that have come and do not go over any
/// more.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Names {
    /// Their names.
    #[prost(message, repeated, tag = "1")]
    pub names: Vec<Name>,
}

/// Nothing to say beyond the tag.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Empty {}

/// New process: it cannot run the machine.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Refused {
    /// Every reason, by name.
    #[prost(string, repeated, tag = "1")]
    pub reasons: Vec<String>,
}

/// When the machine stopped, and what was done until then and since: for a program that has only this to tell it.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Stopped {
    /// `CLOCK_MONOTONIC` when it was told to stop, in nanoseconds.
    #[prost(uint64, tag = "1")]
    pub at_ns: u64,
    /// What starting and building for the proof took, in microseconds.
    #[prost(uint64, tag = "2")]
    pub setup_us: u64,
    /// What devices were waited for before the stop.
    #[prost(uint64, tag = "3")]
    pub stall_us: u64,
    /// What the stop took.
    #[prost(uint64, tag = "4")]
    pub stop_us: u64,
    /// What saving took.
    #[prost(uint64, tag = "5")]
    pub save_us: u64,
}

/// Old process: the state.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct State {
    /// [`StateFile`](wherry_state::StateFile).
    #[prost(bytes = "vec", tag = "1")]
    pub state: Vec<u8>,
    /// Its digest.
    #[prost(bytes = "vec", tag = "2")]
    pub digest: Vec<u8>,
    /// It is to be loaded, and nothing more: `Proven` is said then. Since version 2.
    #[prost(bool, tag = "3")]
    pub proof: bool,
    /// There if nobody else will say how long the machine stands still. Since version 2.
    #[prost(message, optional, tag = "4")]
    pub stopped: Option<Stopped>,
}

/// New process: the VM runs.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Running {
    /// What loading the state took, in microseconds.
    #[prost(uint64, tag = "1")]
    pub load_us: u64,
    /// What starting took.
    #[prost(uint64, tag = "2")]
    pub start_us: u64,
}

/// New process: it does not take over, and ends.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Failed {
    /// Why.
    #[prost(string, tag = "1")]
    pub reason: String,
}

macro_rules! bodies {
    ($($name:ident($content:ty) = $tag:literal,)+) => {
        /// What one parcel says.
        #[derive(Clone, PartialEq, Debug)]
        #[expect(missing_docs, reason = "each is documented where its content is")]
        pub enum Body { $($name($content),)+ }

        impl Body {
            /// The tag of its parcel.
            pub fn tag(&self) -> u16 {
                match self { $(Self::$name(_) => $tag,)+ }
            }

            /// Its name, for messages.
            pub fn kind(&self) -> &'static str {
                match self { $(Self::$name(_) => stringify!($name),)+ }
            }

            /// As it goes in a parcel.
            pub fn encode(&self) -> Vec<u8> {
                match self { $(Self::$name(content) => content.encode_to_vec(),)+ }
            }

            /// From a parcel of that tag.
            pub fn decode(tag: u16, bytes: &[u8]) -> Result<Self, String> {
                match tag {
                    $($tag => <$content>::decode(bytes)
                        .map(Self::$name)
                        .map_err(|error| format!("{} that cannot be read: {error}", stringify!($name))),)+
                    other => Err(format!("a parcel with the unknown tag {other}")),
                }
            }
        }
    };
}

bodies! {
    Hello(Hello) = 1,
    Describe(Describe) = 2,
    Kept(Names) = 3,
    Build(Empty) = 4,
    Built(Empty) = 5,
    Refused(Refused) = 6,
    Poise(Empty) = 7,
    Gone(Names) = 8,
    State(State) = 9,
    Running(Running) = 10,
    Failed(Failed) = 11,
    Proven(Empty) = 12,
    StateNote(Empty) = 13,
}

/// Reads a parcel of the other process; only `Kept` may have descriptors, and `StateNote`, whose content is in a file that comes with it.
pub(crate) fn read(parcel: &Parcel, peer: &'static str) -> Result<Body, Cause> {
    let body = Body::decode(parcel.tag, &parcel.body).map_err(|what| Cause::Protocol { peer, what })?;
    let named = match &body {
        Body::Kept(Names { names }) => names.len(),
        Body::StateNote(Empty {}) => 1,
        _ => 0,
    };
    if parcel.descriptors.len() != named {
        let what = format!("{} with {} descriptors, not {named}", body.kind(), parcel.descriptors.len());
        return Err(Cause::Protocol { peer, what });
    }
    Ok(body)
}
