//! Descriptors that outlive the process: who keeps them, and who has come for them.
//!
//! A descriptor is entered where it is made, with [`Registry::obtain`]: that takes the one that the predecessor has left, or else
//! makes one. The entry is gone when the last user of the descriptor is, so nobody has to take it out. What has come and was not
//! claimed is [left over](Registry::unclaimed): a process that starts all the same would leave somebody's device without an owner.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

/// Longest name, in bytes.
const MOST_NAME: usize = 200;
/// Longest note, in bytes.
const MOST_NOTE: u64 = 1 << 20;

/// Which descriptor.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeptId {
    /// What it is for, such as `ram` or `virtio-net/tap`.
    pub name: String,
    /// Which one of that name.
    pub index: u32,
}

impl KeptId {
    /// With this name and index.
    pub fn new(name: impl Into<String>, index: u32) -> Self {
        Self { name: name.into(), index }
    }
}

impl fmt::Display for KeptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", self.name, self.index)
    }
}

/// A descriptor cannot be entered, or what came is not right.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Two of the same name and index.
    #[error("two descriptors are called {0}")]
    Twice(KeptId),
    /// A name that cannot be one.
    #[error("a descriptor has a name of {0} bytes; 1 to {MOST_NAME} are possible")]
    Name(usize),
    /// It has not come.
    #[error("there is no descriptor {0}")]
    Missing(KeptId),
}

impl From<RegistryError> for io::Error {
    fn from(error: RegistryError) -> Self {
        Self::other(error)
    }
}

/// A descriptor that would go over now.
pub struct Entry {
    /// Which.
    pub id: KeptId,
    /// Tells it from one that has the same name later.
    pub serial: u64,
    descriptor: Arc<dyn AsFd + Send + Sync>,
}

impl AsFd for Entry {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} #{}", self.id, self.serial)
    }
}

struct Kept {
    serial: u64,
    descriptor: Weak<dyn AsFd + Send + Sync>,
}

#[derive(Default)]
struct Inner {
    kept: BTreeMap<KeptId, Kept>,
    next: u64,
    arrived: BTreeMap<KeptId, OwnedFd>,
}

/// All descriptors of a process that outlive it.
#[derive(Default)]
pub struct Registry {
    /// Nothing else is locked while it is held.
    inner: Mutex<Inner>,
    succeeds: AtomicBool,
    leaving: AtomicBool,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.lock();
        f.debug_struct("Registry")
            .field("kept", &inner.kept.keys().map(ToString::to_string).collect::<Vec<_>>())
            .field("arrived", &inner.arrived.keys().map(ToString::to_string).collect::<Vec<_>>())
            .finish()
    }
}

fn check(id: &KeptId) -> Result<(), RegistryError> {
    match id.name.len() {
        1..=MOST_NAME => Ok(()),
        bytes => Err(RegistryError::Name(bytes)),
    }
}

impl Registry {
    /// Of a process that has no predecessor.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Of a process that takes over. Until it has [settled](Self::settle), nothing is made that should have come.
    pub fn of_successor() -> Arc<Self> {
        Arc::new(Self { succeeds: true.into(), ..Self::default() })
    }

    /// Whether this process is about to take over from another one, whose descriptors are still in use there.
    pub fn succeeds(&self) -> bool {
        self.succeeds.load(Ordering::Acquire)
    }

    /// It has taken over.
    pub fn settle(&self) {
        self.succeeds.store(false, Ordering::Release);
    }

    /// Says that all is about to go over, or not any more. Whoever uses a descriptor then leaves the other end of it as it is when he
    /// comes to rest.
    pub fn set_leaving(&self, leaving: bool) {
        self.leaving.store(leaving, Ordering::Release);
    }

    /// Whether all is about to go over.
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in what has come from the predecessor. What has come before under the same name is replaced, unless it came with
    /// the same call.
    pub fn arrived(&self, descriptors: impl IntoIterator<Item = (KeptId, OwnedFd)>) -> Result<(), RegistryError> {
        let mut new = BTreeMap::new();
        for (id, descriptor) in descriptors {
            check(&id)?;
            if new.insert(id.clone(), descriptor).is_some() {
                return Err(RegistryError::Twice(id));
            }
        }
        self.lock().arrived.extend(new);
        Ok(())
    }

    /// Forgets what has come and was not claimed: the predecessor has let go of it meanwhile.
    pub fn withdraw(&self, id: &KeptId) {
        self.lock().arrived.remove(id);
    }

    /// Takes what has come under this name. Once: it belongs to the caller.
    pub fn claim(&self, id: &KeptId) -> Option<OwnedFd> {
        self.lock().arrived.remove(id)
    }

    /// Takes what has come under this name, as something that can only have come.
    pub fn inherit(&self, id: &KeptId) -> Result<OwnedFd, RegistryError> {
        self.claim(id).ok_or_else(|| RegistryError::Missing(id.clone()))
    }

    /// What has come and nobody has claimed. A process that is about to take over refuses to if there is anything.
    pub fn unclaimed(&self) -> Vec<KeptId> {
        self.lock().arrived.keys().cloned().collect()
    }

    /// Has a descriptor go over for as long as it is used.
    pub fn keep(&self, id: KeptId, descriptor: Arc<dyn AsFd + Send + Sync>) -> Result<(), RegistryError> {
        check(&id)?;
        let mut inner = self.lock();
        if inner.kept.get(&id).is_some_and(|kept| kept.descriptor.strong_count() > 0) {
            return Err(RegistryError::Twice(id));
        }
        inner.next += 1;
        let kept = Kept { serial: inner.next, descriptor: Arc::downgrade(&descriptor) };
        inner.kept.insert(id, kept);
        Ok(())
    }

    /// [`keep`](Self::keep), for what is given to it.
    pub fn add<T: AsFd + Send + Sync + 'static>(&self, id: KeptId, descriptor: T) -> Result<Arc<T>, RegistryError> {
        let descriptor = Arc::new(descriptor);
        self.keep(id, descriptor.clone())?;
        Ok(descriptor)
    }

    /// The descriptor that has come under this name, or else a new one; either goes over from now on. A process that is about to take
    /// over makes none: what has not come cannot be replaced by another one like it.
    pub fn obtain<T, E>(
        &self,
        id: KeptId,
        use_it: impl FnOnce(OwnedFd) -> Result<T, E>,
        make: impl FnOnce() -> Result<T, E>,
    ) -> Result<Arc<T>, E>
    where
        T: AsFd + Send + Sync + 'static,
        E: From<RegistryError>,
    {
        let made = match self.claim(&id) {
            Some(descriptor) => use_it(descriptor),
            None if self.succeeds() => return Err(RegistryError::Missing(id).into()),
            None => make(),
        };
        Ok(self.add(id, made?)?)
    }

    /// Has bytes go over for as long as what this returns lives: what cannot change, and what a successor has to know to use
    /// descriptors that go over beside it.
    pub fn add_note(&self, id: KeptId, note: &[u8]) -> io::Result<Arc<OwnedFd>> {
        let file = memfd_create(id.name.as_str(), MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let mut file = File::from(file);
        file.write_all(note)?;
        fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        Ok(self.add(id, OwnedFd::from(file))?)
    }

    /// Takes bytes that have come under this name, as something that can only have come.
    pub fn inherit_note(&self, id: &KeptId) -> io::Result<Vec<u8>> {
        let file = File::from(self.inherit(id)?);
        let bytes = file.metadata()?.len();
        if bytes > MOST_NOTE {
            return Err(io::Error::other(format!("{id} has {bytes} bytes, and a note has at most {MOST_NOTE}")));
        }
        let mut note = vec![0; bytes as usize];
        file.read_exact_at(&mut note, 0)?;
        Ok(note)
    }

    /// What would go over now, by name. The descriptors stay open as long as the list is held.
    pub fn list(&self) -> Vec<Entry> {
        let mut inner = self.lock();
        inner.kept.retain(|_, kept| kept.descriptor.strong_count() > 0);
        let entry = |(id, kept): (&KeptId, &Kept)| {
            Some(Entry { id: id.clone(), serial: kept.serial, descriptor: kept.descriptor.upgrade()? })
        };
        inner.kept.iter().filter_map(entry).collect()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn event() -> OwnedFd {
        eventfd(0, EventfdFlags::CLOEXEC).unwrap()
    }

    fn names(registry: &Registry) -> Vec<String> {
        registry.list().iter().map(|entry| entry.id.to_string()).collect()
    }

    fn obtain(registry: &Registry, index: u32) -> (Arc<OwnedFd>, bool) {
        let mut made = false;
        let make = || {
            made = true;
            Ok(event())
        };
        let got = registry.obtain::<_, io::Error>(KeptId::new("kick", index), Ok, make).unwrap();
        (got, made)
    }

    #[test]
    fn an_entry_goes_when_its_last_user_does_and_its_name_can_be_used_again() {
        let registry = Registry::new();
        let (first, made) = obtain(&registry, 1);
        assert!(made);
        let (_second, _) = obtain(&registry, 0);
        assert_eq!(names(&registry), ["kick[0]", "kick[1]"]);
        let again = registry.obtain::<_, RegistryError>(KeptId::new("kick", 1), Ok, || Ok(event()));
        assert!(matches!(again, Err(RegistryError::Twice(id)) if id.index == 1));
        let serial = registry.list()[1].serial;
        drop(first);
        assert_eq!(names(&registry), ["kick[0]"]);
        let (_first, _) = obtain(&registry, 1);
        assert_ne!(registry.list()[1].serial, serial);
    }

    #[test]
    fn what_has_come_is_used_before_anything_is_made_and_what_nobody_wants_is_left_over() {
        let registry = Registry::new();
        registry.arrived([(KeptId::new("kick", 0), event()), (KeptId::new("tap", 0), event())]).unwrap();
        let (_kick, made) = obtain(&registry, 0);
        assert!(!made);
        assert_eq!(registry.unclaimed(), [KeptId::new("tap", 0)]);
        assert!(registry.claim(&KeptId::new("tap", 0)).is_some());
        assert!(registry.claim(&KeptId::new("tap", 0)).is_none(), "it is somebody's");
        let missing = registry.inherit(&KeptId::new("tap", 0)).unwrap_err();
        assert_eq!(missing.to_string(), "there is no descriptor tap[0]");
        assert!(registry.unclaimed().is_empty());
    }

    #[test]
    fn what_came_twice_or_without_a_name_is_refused_and_nothing_of_it_is_taken_in() {
        let registry = Registry::new();
        let twice = registry.arrived([(KeptId::new("a", 0), event()), (KeptId::new("a", 0), event())]);
        assert!(matches!(twice, Err(RegistryError::Twice(_))));
        for name in [String::new(), "x".repeat(MOST_NAME + 1)] {
            assert!(matches!(registry.arrived([(KeptId::new(name.clone(), 0), event())]), Err(RegistryError::Name(_))));
            assert!(registry.keep(KeptId::new(name, 0), Arc::new(event())).is_err());
        }
        assert!(registry.unclaimed().is_empty());
    }

    #[test]
    fn a_successor_makes_nothing_before_it_has_settled() {
        let registry = Registry::of_successor();
        registry.arrived([(KeptId::new("kick", 0), event())]).unwrap();
        let (_kick, made) = obtain(&registry, 0);
        assert!(!made);
        let missing = registry.obtain::<_, RegistryError>(KeptId::new("kick", 1), Ok, || Ok(event())).unwrap_err();
        assert!(matches!(missing, RegistryError::Missing(id) if id.index == 1));
        registry.settle();
        assert!(obtain(&registry, 1).1);
    }

    #[test]
    fn a_note_comes_as_it_was_written_and_nobody_changes_it() {
        let (old, new) = (Registry::new(), Registry::of_successor());
        let id = KeptId::new("facts", 0);
        let note = old.add_note(id.clone(), b"two regions").unwrap();
        assert!(rustix::io::pwrite(&note, b"x", 0).is_err());
        new.arrived([(id.clone(), note.try_clone().unwrap())]).unwrap();
        assert_eq!(new.inherit_note(&id).unwrap(), b"two regions");
        assert!(new.inherit_note(&id).unwrap_err().to_string().contains("no descriptor facts[0]"));
        drop(note);
        assert!(old.list().is_empty());
        let long = memfd_create("facts", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&long, MOST_NOTE + 1).unwrap();
        new.arrived([(id.clone(), long)]).unwrap();
        assert!(new.inherit_note(&id).unwrap_err().to_string().contains("bytes"));
    }

    #[test]
    fn what_came_later_replaces_what_came_first_and_what_was_let_go_is_forgotten() {
        let registry = Registry::new();
        let id = KeptId::new("call", 3);
        let (first, second) = (event(), event());
        rustix::io::write(&second, &7u64.to_ne_bytes()).unwrap();
        registry.arrived([(id.clone(), first)]).unwrap();
        registry.arrived([(id.clone(), second)]).unwrap();
        let mut count = [0; 8];
        rustix::io::read(registry.claim(&id).unwrap(), &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 7);
        registry.arrived([(id.clone(), event())]).unwrap();
        registry.withdraw(&id);
        assert!(registry.unclaimed().is_empty());
    }
}
