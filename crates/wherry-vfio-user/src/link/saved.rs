//! A link at rest, and what the next process has to know of it.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::{Inbox, Link, MOST_ABANDONED, Partial, Request};
use crate::error::VfioUserError;
use crate::message::{HEADER, Header, MOST_PAYLOAD};

/// What the next process of a link has to know of it. Descriptors that came with a message that is not whole go beside it; those of
/// a client are not carried: no command to it has any, and the reply to a request that was given up is thrown away.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct SavedLink {
    /// Number of the next request.
    #[prost(uint32, tag = "1")]
    next: u32,
    /// Numbers of requests that were given up, whose replies may still come.
    #[prost(uint32, repeated, tag = "2")]
    abandoned: Vec<u32>,
    /// What has come of the header of the next message.
    #[prost(bytes = "vec", tag = "3")]
    header: Vec<u8>,
    /// Bytes of its body that have come.
    #[prost(uint64, tag = "4")]
    bodied: u64,
    /// They; none if the message is too long to be taken.
    #[prost(bytes = "vec", tag = "5")]
    body: Vec<u8>,
    /// It came with too many descriptors.
    #[prost(bool, tag = "6")]
    too_many: bool,
}

impl Link {
    /// Over the connection of another process, at rest until [`go_on`](Self::go_on).
    pub(crate) fn inherited(stream: UnixStream, peer: &str, limit: Duration, strict: bool) -> std::io::Result<Self> {
        let this = Self::new(stream, peer, limit, strict)?;
        this.inbox().rests = true;
        Ok(this)
    }

    /// Waits until nothing is on its way but what the peer has not sent whole, and begins nothing more.
    pub(crate) fn rest(&self, deadline: Instant) -> Result<SavedLink, VfioUserError> {
        let begun = Instant::now();
        let mut inbox = self.inbox();
        inbox.rests = true;
        loop {
            if inbox.over.is_some() {
                inbox.rests = false;
                return Err(self.closed("coming to rest"));
            }
            if inbox.is_quiet() {
                return Ok(inbox.save());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                inbox.rests = false;
                self.changed.notify_all();
                let what = "come to rest between two messages".into();
                return Err(VfioUserError::Deadline { peer: self.peer.clone(), what, limit: begun.elapsed() });
            }
            self.call();
            inbox = self.changed.wait_timeout(inbox, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// [`rest`](Self::rest) on the thread that takes the commands, whose next one it does not take: `None` if there are some, or
    /// somebody waits for a reply. Descriptors that came with a message that is not whole are given beside it.
    pub(crate) fn rest_here(&self) -> std::io::Result<Option<(SavedLink, Vec<OwnedFd>)>> {
        let mut inbox = self.inbox();
        if inbox.over.is_some() || !inbox.is_quiet() {
            return Ok(None);
        }
        let descriptors = inbox.partial.descriptors.iter().map(OwnedFd::try_clone).collect::<Result<_, _>>()?;
        inbox.rests = true;
        Ok(Some((inbox.save(), descriptors)))
    }

    /// Takes what the process before has left. At rest.
    pub(crate) fn take(&self, saved: &SavedLink, descriptors: Vec<OwnedFd>) -> Result<(), String> {
        self.inbox().load(saved, descriptors)
    }

    /// Goes on after [`rest`](Self::rest).
    pub(crate) fn go_on(&self) {
        self.inbox().rests = false;
        self.changed.notify_all();
    }
}

impl Inbox {
    /// Nothing is on its way, and no command waits.
    fn is_quiet(&self) -> bool {
        let asked = self.requests.values().any(|request| matches!(request, Request::Asked));
        !(self.reading || asked || self.serving) && self.commands.is_empty()
    }

    fn save(&self) -> SavedLink {
        let given_up =
            |(id, request): (&u16, &Request)| matches!(request, Request::Abandoned).then_some(u32::from(*id));
        let Partial { header, headed, body, bodied, too_many, .. } = &self.partial;
        SavedLink {
            next: self.next.into(),
            abandoned: self.requests.iter().filter_map(given_up).collect(),
            header: header[..*headed].to_vec(),
            bodied: *bodied as u64,
            body: body[..(*bodied).min(body.len())].to_vec(),
            too_many: *too_many,
        }
    }

    fn load(&mut self, saved: &SavedLink, descriptors: Vec<OwnedFd>) -> Result<(), String> {
        let SavedLink { next, abandoned, header, bodied, body, too_many } = saved;
        let number = |id: &u32| u16::try_from(*id).map_err(|_| format!("message {id}"));
        if abandoned.len() > MOST_ABANDONED + 1 {
            return Err(format!("{} requests that were given up", abandoned.len()));
        }
        let requests =
            abandoned.iter().map(|id| Ok((number(id)?, Request::Abandoned))).collect::<Result<_, String>>()?;
        let mut partial = Partial { headed: header.len(), too_many: *too_many, descriptors, ..Partial::default() };
        partial.header.get_mut(..header.len()).ok_or("a header that is too long")?.copy_from_slice(header);
        if header.len() == HEADER {
            // As `read` leaves it.
            let length = (Header::decode(&partial.header).size as usize).saturating_sub(HEADER);
            let taken = length <= MOST_PAYLOAD;
            if *bodied > length as u64 || body.len() as u64 != if taken { *bodied } else { 0 } {
                return Err(format!("{bodied} bytes of a body of {length}, and {} of them are there", body.len()));
            }
            partial.bodied = *bodied as usize;
            partial.body.clone_from(body);
        } else if *bodied > 0 || !body.is_empty() {
            return Err("a body before its header".into());
        }
        partial.since = (!header.is_empty()).then(Instant::now);
        let next = number(next)?;
        let abandoned = abandoned.len();
        (self.requests, self.abandoned, self.partial, self.next) = (requests, abandoned, partial, next);
        Ok(())
    }
}
