//! The functions of this host that one machine uses.
#![expect(unsafe_code, reason = "the kernel gives descriptors as numbers")]

use std::collections::BTreeMap;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use wherry_handover::{Registry, Shelf};

use super::address::HostAddress;
use super::device::{Held, Vfio};
use super::error::VfioError;
use super::iommufd::Iommufd;
use super::kernel::{Calls, Kernel, Linux, request};
use super::saved::SavedHold;
use super::space::{Space, Way};
use super::sysfs::{Places, open};
use super::type1::{Group, Type1};

/// The functions of this host that one machine uses. All of them share one space of memory, which lasts as long as one of them does.
pub struct VfioHost {
    calls: Calls,
    places: Places,
    registry: Arc<Registry>,
    /// Held while a function comes.
    shared: Mutex<Shared>,
}

#[derive(Default)]
struct Shared {
    space: Weak<Space>,
    groups: BTreeMap<u32, Weak<Group>>,
}

impl std::fmt::Debug for VfioHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VfioHost").field("places", &self.places).finish_non_exhaustive()
    }
}

impl VfioHost {
    /// Of this host.
    pub fn new(registry: Arc<Registry>) -> Self {
        Self::with(Arc::new(Linux), Places::default(), registry)
    }

    /// Of a kernel that is played, say.
    pub fn with(kernel: Arc<dyn Kernel>, places: Places, registry: Arc<Registry>) -> Self {
        Self { calls: Calls(kernel), places, registry, shared: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a function that is bound to VFIO: by iommufd if the host has it, else by its group. The kernel resets it, if it can be.
    pub fn open(&self, address: HostAddress) -> Result<Vfio, VfioError> {
        let group = self.places.group(address)?;
        let mut shared = self.lock();
        let space = shared.space.upgrade();
        let node = match space.as_deref().map(|space| &space.way) {
            Some(Way::Type1(_)) => None,
            _ => self.places.device_node(address),
        };
        let held = match node {
            Some(node) => {
                let file = Arc::new(open(&node, address)?);
                let make = || Iommufd::open(&self.calls, &self.places, &self.registry, address);
                let space = self.space(space, || make().map(Way::Iommufd))?;
                let table = match &space.way {
                    Way::Iommufd(iommufd) => iommufd.attach(file.as_fd(), address)?,
                    Way::Type1(_) => return Err(mixed(address)),
                };
                Held { file, group: None, table, space }
            }
            None => {
                let make = || Type1::open(&self.calls, &self.places, &self.registry, address);
                let space = self.space(space, || make().map(Way::Type1))?;
                let Way::Type1(type1) = &space.way else { return Err(mixed(address)) };
                let there = shared.groups.get(&group).and_then(Weak::upgrade);
                let group = match there {
                    Some(group) => group,
                    None => {
                        let made = Arc::new(type1.attach(&self.places, &self.registry, group, address)?);
                        shared.groups.insert(group, Arc::downgrade(&made));
                        made
                    }
                };
                let file = self.function(&group, address)?;
                Held { file: Arc::new(file), group: Some(group), table: None, space }
            }
        };
        shared.space = Arc::downgrade(&held.space);
        drop(shared);
        Vfio::open(self.calls.clone(), address, held)
    }

    /// Takes a function that the process before this one has kept there, and still uses.
    pub fn inherit(&self, address: HostAddress, shelf: &Shelf) -> Result<Vfio, VfioError> {
        let failed = |reason: String| VfioError::Lacks { device: address, reason };
        Vfio::inherit(self.calls.clone(), address, shelf, |saved, file| {
            let mut shared = self.lock();
            let (calls, registry) = (&self.calls, &*self.registry);
            let space = match (shared.space.upgrade(), saved.iommufd) {
                (Some(space), _) => space,
                (None, Some(number)) => {
                    let way = Iommufd::inherit(calls, registry, number).map(Way::Iommufd);
                    Arc::new(Space::inherited(way.map_err(|error| failed(error.to_string()))?))
                }
                (None, None) => {
                    let way = Type1::inherit(calls, registry).map(Way::Type1);
                    Arc::new(Space::inherited(way.map_err(|error| failed(error.to_string()))?))
                }
            };
            shared.space = Arc::downgrade(&space);
            let SavedHold { group, table, .. } = *saved;
            let group = match group.map(|number| (number, shared.groups.get(&number).and_then(Weak::upgrade))) {
                None => None,
                Some((_, Some(group))) => Some(group),
                Some((number, None)) => {
                    let group = Type1::inherit_group(registry, number);
                    let group = Arc::new(group.map_err(|error| failed(error.to_string()))?);
                    shared.groups.insert(number, Arc::downgrade(&group));
                    Some(group)
                }
            };
            Ok(Held { file, group, table, space })
        })
    }

    fn space(
        &self,
        there: Option<Arc<Space>>,
        make: impl FnOnce() -> Result<Way, VfioError>,
    ) -> Result<Arc<Space>, VfioError> {
        match there {
            Some(space) => Ok(space),
            None => make().map(Space::new).map(Arc::new),
        }
    }

    fn function(&self, group: &Group, address: HostAddress) -> Result<OwnedFd, VfioError> {
        let mut name = address.to_string().into_bytes();
        name.push(0);
        let opened = self.calls.bytes(group.file.as_fd(), request::GROUP_GET_DEVICE_FD, &mut name);
        let number = opened.map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => VfioError::InUse { address, what: "the function".into() },
            _ => VfioError::call(address, "opening it")(error),
        })?;
        // SAFETY: the kernel has just made it for us.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    }
}

fn mixed(device: HostAddress) -> VfioError {
    VfioError::Lacks {
        device,
        reason: "the other functions of the machine are used without iommufd, or with it".into(),
    }
}
