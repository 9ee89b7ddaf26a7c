//! Contexts come to be: plain, with parameters from a chain of extensions, or as clones.

use crate::abi::{MAX_CONTEXTS, clone_flag, context_flag, extension};
use crate::chain;
use crate::context::Context;
use crate::error::{Errno, Refused, refuse, require};
use crate::map::{EngineMap, Slot};
use crate::memory::{AddressSpace, offset, read_u32, read_u64};

use super::{Caller, Device, Param};

impl Device {
    /// Makes a context. `extensions` is the address of a chain in the caller's space, or 0. Nothing is left of it when any
    /// part is refused.
    pub fn create_context(&self, caller: Caller, flags: u32, extensions: u64) -> Result<u32, Refused> {
        let unknown = flags & !context_flag::ALL;
        require(unknown == 0, || format!("a context has no flags {unknown:#x}"))?;
        let space = self.space(caller.space)?;
        let mut draft = self.draft(caller, flags)?;
        chain::walk(&*space, extensions, |name, node| match name {
            extension::SET_PARAM => self.create_param(caller, &*space, node, &mut draft),
            extension::CLONE => self.clone_from(&*space, node, &mut draft),
            other => chain::unknown(other, node, "creating a context"),
        })?;
        let mut core = self.lock();
        if core.lost {
            return refuse(Errno::Io, "the device is lost");
        }
        core.afford(draft.weight())?;
        core.admit(draft)
    }

    /// A context that nobody sees yet.
    fn draft(&self, caller: Caller, flags: u32) -> Result<Context, Refused> {
        let core = self.lock();
        let mut context = Context {
            id: 0,
            flags,
            priority: 0,
            persistent: true,
            space: caller.space,
            map: EngineMap::default(),
            mapped: false,
            used: false,
            slots: Vec::new(),
            // Its own, unless a clone shares one: it gets its number when it is admitted.
            single: None,
            shares: Default::default(),
            hangs: Default::default(),
            banned: false,
            closed: false,
            client: 0,
        };
        context.set_map(EngineMap::default_map(&core.catalogue), false);
        Ok(context)
    }

    fn create_param(
        &self,
        caller: Caller,
        space: &dyn AddressSpace,
        node: u64,
        draft: &mut Context,
    ) -> Result<(), Refused> {
        let param = Param::read(space, offset(node, extension::BASE)?)?;
        require(param.context == 0, || format!("a parameter of a creation names context {}", param.context))?;
        let param = self.parse_param(caller, &param, draft)?;
        self.apply_param(param, draft)
    }

    fn clone_from(&self, space: &dyn AddressSpace, node: u64, draft: &mut Context) -> Result<(), Refused> {
        let id = read_u32(space, offset(node, 32)?)?;
        let flags = read_u32(space, offset(node, 36)?)?;
        let reserved = read_u64(space, offset(node, 40)?)?;
        let unknown = flags & !clone_flag::ALL;
        require(unknown == 0, || format!("a clone has no flags {unknown:#x}"))?;
        require(reserved == 0, || format!("a clone has its reserved word set to {reserved:#x}"))?;
        let mut core = self.lock();
        let source = core.open(id)?;
        let has = |flag: u32| flags & flag != 0;
        if has(clone_flag::TIMELINE) && source.single.is_none() {
            return refuse(Errno::Invalid, format!("context {id} has no single timeline to share"));
        }
        if has(clone_flag::FLAGS) {
            // A context that has a timeline of its own for each slot does not begin to share one by its flags alone.
            (draft.flags, draft.persistent) = (source.flags, source.persistent);
        }
        if has(clone_flag::ENGINES) {
            draft.set_map(source.map.clone(), source.mapped);
            draft.shares.clone_from(&source.shares);
        }
        if has(clone_flag::PRIORITY) {
            draft.priority = source.priority;
        }
        if has(clone_flag::TIMELINE) {
            draft.single = source.single;
            draft.flags |= context_flag::SINGLE_TIMELINE;
        }
        if has(clone_flag::SPACE) {
            draft.space = source.space;
        }
        Ok(())
    }
}

impl crate::scheduler::Core {
    /// Gives a context its number and lets everybody see it.
    fn admit(&mut self, mut context: Context) -> Result<u32, Refused> {
        let taken = |index: usize| self.contexts.keys().any(|id| (*id & 0xffff) as usize == index + 1);
        let Some(index) = (0..MAX_CONTEXTS).find(|index| !taken(*index)) else {
            return refuse(Errno::NoSpace, format!("there are {MAX_CONTEXTS} contexts already"));
        };
        if self.generations.len() <= index {
            self.generations.resize(index + 1, 0);
        }
        // The place in the lower half, which is that of its portal, and how often the place was used in the upper one.
        context.id = u32::from(self.generations[index]) << 16 | (index as u32 + 1);
        self.generations[index] = self.generations[index].wrapping_add(1);
        if context.flags & context_flag::SINGLE_TIMELINE != 0 && context.single.is_none() {
            context.single = Some(self.next_single);
            self.singles.insert(self.next_single, None);
            self.next_single += 1;
        }
        self.spread(&mut context);
        let id = context.id;
        self.contexts.insert(id, context);
        Ok(id)
    }

    /// New virtual slots begin at random siblings, so that many of them do not begin at the same one.
    pub(crate) fn spread(&mut self, context: &mut Context) {
        for (slot, state) in context.map.slots.iter().zip(&mut context.slots) {
            if let Slot::Balanced { siblings, .. } = slot {
                // xorshift64
                self.spread ^= self.spread << 13;
                self.spread ^= self.spread >> 7;
                self.spread ^= self.spread << 17;
                state.timeline.affinity = Some(siblings[(self.spread % siblings.len() as u64) as usize]);
            }
        }
    }
}
