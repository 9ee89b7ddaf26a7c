//! A server that outlives the process: another one goes on with its client, who does not notice.
//!
//! How its thread comes to rest and what another one takes is [`wherry_handover::Rest`].
//!
//! At rest the device touches nothing outside, all commands that have come whole are answered, nothing that we asked is without its
//! reply, and nobody reads the socket. What has come of a command is state, and so is the number of each request that was given up.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use wherry_handover::{Claim, Copies, Rest, Rested};

use super::bus::{Bus, Way};
use super::device::Device;
use super::saved::{SavedClient, SavedDescription, SavedServer};
use super::{Host, State};
use crate::capabilities::{Capabilities, Extensions, MAJOR, MINOR, Version};
use crate::link::Link;

/// Version of what a server writes of itself, and the newest that it reads.
pub const SCHEMA: u32 = 1;

/// Between two tries to come to rest, when somebody still waits for a client.
const PAUSE: Duration = Duration::from_millis(1);

/// How a device goes over to another process, in which one like it has been made. Interrupts, maps and logs are the server's to carry,
/// files of regions and doorbells are whoever's who makes the device.
pub trait Kept {
    /// Comes to rest: from here on it touches neither memory nor doorbells, and takes what a client writes. What the next process
    /// has to know of it. It runs on after an error, which says why it does not rest.
    fn rest(&mut self, bus: &Bus) -> Result<Vec<u8>, String>;

    /// Takes what the process before gave. At rest, as it was made; nothing is signalled.
    fn take(&mut self, bus: &Bus, state: &[u8]) -> Result<(), String>;

    /// Runs, here or here again.
    fn go_on(&mut self, bus: &Bus);
}

/// What clients are told of a device.
#[derive(Clone, Debug)]
pub struct Offer(SavedDescription);

impl Offer {
    /// As bytes, for [`check`](Self::check) in another process.
    pub fn encode(&self) -> Vec<u8> {
        self.0.encode_to_vec()
    }

    /// Whether clients that were told that of a device can go on with this one.
    pub fn check(&self, told: &[u8]) -> Result<(), String> {
        let told =
            SavedDescription::decode(told).map_err(|error| format!("what clients know of the device: {error}"))?;
        self.fits(&told)
    }

    fn fits(&self, told: &SavedDescription) -> Result<(), String> {
        match self.0.difference(told) {
            Some(what) => Err(format!("the device has other {what} here, which its client knows already")),
            None => Ok(()),
        }
    }
}

/// A client of the process before.
pub(super) struct Resumed {
    pub(super) link: Arc<Link>,
    pub(super) client: Capabilities,
    pub(super) extensions: Extensions,
}

/// What is served, as it is to be carried.
#[derive(Clone, Copy)]
pub(super) struct Served<'a> {
    pub(super) link: &'a Link,
    pub(super) client: &'a Capabilities,
    pub(super) extensions: Extensions,
}

impl Host {
    /// What its clients are told of its device.
    pub fn offer(&self) -> Offer {
        Offer(SavedDescription::of(&self.description))
    }

    /// What has it come to rest, so that another process can go on.
    pub fn rest(&self) -> Rest {
        self.rest.clone()
    }

    /// Why it cannot go over to another process now.
    fn why_not(&self) -> Option<String> {
        match self.state {
            _ if self.faulting => {
                Some("memory of its client is not all there, and the client serves its faults".into())
            }
            State::Running => None,
            State::Error => Some("its migration has failed: its client has to reset it".into()),
            state => Some(format!("its client is in the middle of a migration of it, which is in {state:?}")),
        }
    }

    /// Says whether it can go over; called when that may have changed.
    pub(super) fn note_obstacle(&self) {
        self.rest.note_obstacle(self.why_not());
    }

    /// Comes to rest between two clients, until it is to go on. In a new process: the client of the one before, if it had one.
    pub(super) fn rest_alone(&mut self, device: &mut dyn Device) -> Option<Resumed> {
        let rest = self.rest.clone();
        let rested = self.rested(device, None);
        let rested = rested.transpose().unwrap_or_else(|| Err("it was not at rest".into()));
        let mut resumed = None;
        rest.settle(rested, |state, claim| {
            resumed = self.take(device, &state, claim)?;
            Ok(())
        });
        self.run_on(device);
        resumed
    }

    /// Comes to rest between two messages of a client, until it is to go on. Not yet, if a command has come meanwhile, or somebody
    /// still waits for the client.
    pub(super) fn rest_with(&mut self, device: &mut dyn Device, served: Served<'_>) {
        let rest = self.rest.clone();
        let rested = match self.rested(device, Some(served)).transpose() {
            Some(rested) => rested,
            None => {
                self.run_on(device);
                self.bus.go_on();
                std::thread::sleep(PAUSE);
                return;
            }
        };
        rest.settle(rested, |_, _| Err("it has a client already".into()));
        self.run_on(device);
        served.link.go_on();
        self.bus.go_on();
    }

    fn run_on(&mut self, device: &mut dyn Device) {
        if let (true, Some(kept)) = (std::mem::take(&mut self.device_rests), device.kept()) {
            kept.go_on(&self.bus);
        }
    }

    /// What is to be carried; `None` if the connection is not at rest yet.
    fn rested(&mut self, device: &mut dyn Device, served: Option<Served<'_>>) -> Result<Option<Rested>, String> {
        if let Some(why) = self.why_not() {
            return Err(why);
        }
        let Some(kept) = device.kept() else { return Err("this kind of device is not carried".into()) };
        let state = kept.rest(&self.bus)?;
        self.device_rests = true;
        let copying = |error: io::Error| format!("copying a descriptor: {error}");
        let mut copies = Copies::default();
        let client = match served {
            None => None,
            Some(served) => match self.save_client(served, &mut copies).map_err(copying)? {
                Some(client) => Some(client),
                None => return Ok(None),
            },
        };
        let irqs = self.bus.irqs().save(&mut copies).map_err(copying)?;
        let description = Some(SavedDescription::of(&self.description));
        let saved = SavedServer { device: state, description, irqs, client };
        Ok(Some(Rested { state: saved.encode_to_vec(), descriptors: copies.into_inner() }))
    }

    fn save_client(&self, served: Served<'_>, copies: &mut Copies) -> io::Result<Option<SavedClient>> {
        let way = self.bus.way();
        // Who has a twin socket is asked there, and says nothing on it but replies.
        let twin = way.as_ref().map(|way| &*way.link).filter(|link| !std::ptr::eq(*link, served.link));
        let twin = match twin.map(|twin| Ok::<_, io::Error>((twin, twin.rest_here()?))).transpose()? {
            None => None,
            Some((_, None)) => return Ok(None),
            Some((twin, Some((saved, _)))) => {
                copies.add("twin", 0, twin)?;
                Some((twin, saved))
            }
        };
        let Some((link, partial)) = served.link.rest_here()? else {
            if let Some((twin, _)) = twin {
                twin.go_on();
            }
            return Ok(None);
        };
        copies.add("connection", 0, served.link)?;
        for (index, fd) in (0..).zip(&partial) {
            copies.add("partial", index, fd)?;
        }
        let version = |capabilities: &Capabilities| {
            Version { major: MAJOR, minor: MINOR, capabilities: capabilities.clone() }.encode()
        };
        let Extensions { p2p, estimates, userfaultfd } = served.extensions;
        Ok(Some(SavedClient {
            theirs: version(served.client),
            ours: version(&self.capabilities),
            p2p,
            estimates,
            userfaultfd,
            link: Some(link),
            partial: partial.len() as u32,
            twin: twin.map(|(_, saved)| saved),
            maps: self.bus.save_maps(copies)?,
            log: self.bus.log().as_ref().map(|log| log.save()),
        }))
    }

    /// Takes what the process before knew.
    fn take(&mut self, device: &mut dyn Device, state: &[u8], mut claim: Claim) -> Result<Option<Resumed>, String> {
        let saved = SavedServer::decode(state).map_err(|error| format!("the state of a server: {error}"))?;
        self.offer().fits(&saved.description.unwrap_or_default())?;
        let resumed = saved.client.map(|client| self.take_client(client, &mut claim)).transpose()?;
        self.bus.irqs().load(&saved.irqs, &mut claim)?;
        let kept = device.kept().ok_or("this kind of device is not carried")?;
        kept.take(&self.bus, &saved.device)?;
        Ok(resumed)
    }

    fn take_client(&mut self, saved: SavedClient, claim: &mut Claim) -> Result<Resumed, String> {
        let mut need =
            |name: &str, index| claim(name, index).ok_or_else(|| format!("{name}[{index}] of its client is missing"));
        let capabilities = |bytes: &[u8]| Version::decode(bytes).map(|v| v.capabilities).map_err(|e| e.to_string());
        let client = capabilities(&saved.theirs)?;
        if capabilities(&saved.ours)? != self.capabilities {
            return Err("its client was told of other limits and capabilities than there are here".into());
        }
        let peer = "a client";
        let link = |fd: OwnedFd| {
            let link = Link::inherited(UnixStream::from(fd), peer, self.limit, false);
            link.map(Arc::new).map_err(|error| format!("setting up the socket of its client: {error}"))
        };
        let own = link(need("connection", 0)?)?;
        let partial = (0..saved.partial).map(|index| need("partial", index)).collect::<Result<_, _>>()?;
        own.take(&saved.link.ok_or("nothing of its client's connection")?, partial)?;
        let way = match &saved.twin {
            Some(saved) => {
                let twin = link(need("twin", 0)?)?;
                twin.take(saved, Vec::new())?;
                twin
            }
            None => own.clone(),
        };
        self.bus.load_maps(&saved.maps, &mut need)?;
        *self.bus.log() = saved.log.as_ref().map(super::dma::Log::load).transpose()?;
        let transfer = client.transfer().min(way.piece());
        self.bus.connect(Some(Way { link: way, transfer, limit: self.limit }));
        let (p2p, estimates, userfaultfd) = (saved.p2p, saved.estimates, saved.userfaultfd);
        Ok(Resumed { link: own, client, extensions: Extensions { p2p, estimates, userfaultfd } })
    }
}
