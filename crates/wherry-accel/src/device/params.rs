//! Parameters of contexts: set, and read back.
//!
//! Size negotiation: a structured parameter read with size 0 answers the size it needs; a buffer too small is `EINVAL`; a
//! larger one is filled to the size needed, and `size` returns that.

use crate::abi::{MAX_PRIORITY, param};
use crate::context::Context;
use crate::error::{Errno, Refused, refuse, require};
use crate::map::{self, EngineMap, engine_id};
use crate::memory::{AddressSpace, offset, read_u32, read_u64};

use super::{Caller, Device};

/// The argument of a call that sets or reads a parameter (24 bytes).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Param {
    /// The context. At byte 0.
    pub context: u32,
    /// Bytes at `value`, or 0. At byte 4.
    pub size: u32,
    /// Which parameter: [`param`]. At byte 8.
    pub param: u64,
    /// The value, or the address of a structure. At byte 16.
    pub value: u64,
}

impl Param {
    /// Bytes of it.
    pub const BYTES: u64 = 24;

    pub(crate) fn read(space: &dyn AddressSpace, at: u64) -> Result<Self, Refused> {
        Ok(Self {
            context: read_u32(space, at)?,
            size: read_u32(space, offset(at, 4)?)?,
            param: read_u64(space, offset(at, 8)?)?,
            value: read_u64(space, offset(at, 16)?)?,
        })
    }

    pub(crate) fn write(&self, space: &dyn AddressSpace, at: u64) -> Result<(), Refused> {
        let mut bytes = [0; Self::BYTES as usize];
        bytes[0..4].copy_from_slice(&self.context.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.size.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.param.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.value.to_le_bytes());
        Ok(space.write(at, &bytes)?)
    }
}

/// Bytes of the share structure: class or index u16, instance u16, flags u32, percent u32, reserved u32.
const SHARE_BYTES: u32 = 16;
/// Its flag: the first word is an index into the map.
const SHARE_BY_INDEX: u32 = 1;

/// A parameter that has been read and checked.
pub(super) enum Parsed {
    Priority(i32),
    Persistence(bool),
    Engines(Option<EngineMap>),
    Space(u32),
    Share(u8, u32),
}

/// What parsing has to know of a context.
struct View {
    space: u32,
    mapped: bool,
    used: bool,
    slots: usize,
}

impl Device {
    /// Sets a parameter of a context.
    pub fn set_param(&self, caller: Caller, param: &Param) -> Result<(), Refused> {
        // A copy to read the client's memory for; what it is parsed for is looked at again with the lock.
        let draft = self.lock().open(param.context)?.clone();
        let parsed = self.parse_param(caller, param, &draft)?;
        let mut core = self.lock();
        let mut context = core.open(param.context)?.clone();
        if matches!(parsed, Parsed::Engines(_)) {
            frozen(&context)?;
        }
        let before = context.weight();
        let engines = matches!(parsed, Parsed::Engines(_));
        apply(&core.catalogue, parsed, &mut context);
        core.afford(context.weight().saturating_sub(before))?;
        if engines {
            core.spread(&mut context);
        }
        core.contexts.insert(param.context, context);
        Ok(())
    }

    /// Reads a parameter of a context: `size` and `value` are changed as the parameter says.
    pub fn get_param(&self, param: &mut Param) -> Result<(), Refused> {
        let context = self.lock().open(param.context)?.clone();
        let scalar = match param.param {
            param::PRIORITY => i64::from(context.priority) as u64,
            param::PERSISTENCE => context.persistent.into(),
            param::SPACE => context.space.into(),
            param::BANNED => context.banned.into(),
            param::FLAGS => context.flags.into(),
            param::HANGS => {
                let now = self.now();
                let recent = |at: &&u64| now.saturating_sub(**at) <= crate::scheduler::HANG_WINDOW;
                context.hangs.iter().filter(recent).count() as u64
            }
            param::ENGINES => return self.get_engines(&context, param),
            param::SHARE => return self.get_share(&context, param),
            other => return refuse(Errno::Invalid, format!("there is no parameter {other}")),
        };
        (param.size, param.value) = (0, scalar);
        Ok(())
    }

    fn get_engines(&self, context: &Context, param: &mut Param) -> Result<(), Refused> {
        if !context.mapped {
            param.size = 0;
            return Ok(());
        }
        let needed = map::bytes_needed(&context.map);
        if param.size != 0 {
            require(param.size >= needed, || format!("the map needs {needed} bytes, not {}", param.size))?;
            let space = self.space(context.space)?;
            let catalogue = self.lock().catalogue.clone();
            map::fill(&catalogue, &context.map, &*space, param.value)?;
        }
        param.size = needed;
        Ok(())
    }

    fn get_share(&self, context: &Context, param: &mut Param) -> Result<(), Refused> {
        if param.size != 0 {
            require(param.size >= SHARE_BYTES, || format!("a share needs {SHARE_BYTES} bytes, not {}", param.size))?;
            let space = self.space(context.space)?;
            let (index, _) = self.share_index(&*space, param.value, &view(context))?;
            let percent = context.shares.get(&index).copied().unwrap_or(100);
            space.write(offset(param.value, 8)?, &percent.to_le_bytes())?;
        }
        param.size = SHARE_BYTES;
        Ok(())
    }

    pub(super) fn parse_param(&self, caller: Caller, p: &Param, context: &Context) -> Result<Parsed, Refused> {
        let context = view(context);
        let scalar = || require(p.size == 0, || format!("parameter {} is no structure of {} bytes", p.param, p.size));
        match p.param {
            param::PRIORITY => {
                scalar()?;
                let priority = p.value as i64;
                require((-MAX_PRIORITY..=MAX_PRIORITY).contains(&priority), || {
                    format!("priorities are -{MAX_PRIORITY} to {MAX_PRIORITY}, not {priority}")
                })?;
                if priority > 0 && !caller.privileged {
                    return refuse(Errno::Perm, format!("priority {priority} is above 0 and needs privilege"));
                }
                Ok(Parsed::Priority(priority as i32))
            }
            param::PERSISTENCE => {
                scalar()?;
                require(p.value <= 1, || format!("persistence is 0 or 1, not {}", p.value))?;
                Ok(Parsed::Persistence(p.value == 1))
            }
            param::SPACE => {
                scalar()?;
                require(!context.used, || "the address space of a context in use does not change".into())?;
                let number = u32::try_from(p.value).ok().filter(|number| self.space(*number).is_ok());
                match number {
                    Some(number) => Ok(Parsed::Space(number)),
                    None => refuse(Errno::NoEntry, format!("there is no address space {}", p.value)),
                }
            }
            param::ENGINES => {
                require(!context.used, || "the map of a context in use does not change".into())?;
                if p.size == 0 {
                    return Ok(Parsed::Engines(None));
                }
                let catalogue = self.lock().catalogue.clone();
                let space = self.space(context.space)?;
                Ok(Parsed::Engines(Some(map::parse(&catalogue, &*space, p.value, p.size)?)))
            }
            param::SHARE => {
                require(p.size == SHARE_BYTES, || format!("a share has {SHARE_BYTES} bytes, not {}", p.size))?;
                let (index, percent) = self.share_index(&*self.space(context.space)?, p.value, &context)?;
                require((1..=100).contains(&percent), || format!("a share is 1 to 100 percent, not {percent}"))?;
                Ok(Parsed::Share(index, percent))
            }
            param::BANNED | param::FLAGS | param::HANGS => {
                refuse(Errno::Invalid, format!("parameter {} is read only", p.param))
            }
            other => refuse(Errno::Invalid, format!("there is no parameter {other}")),
        }
    }

    /// Which slot or engine a share structure is about, and its percent. By index on a context with a map, by (class,
    /// instance) on one without.
    fn share_index(&self, space: &dyn AddressSpace, at: u64, context: &View) -> Result<(u8, u32), Refused> {
        let who = read_u32(space, at)?;
        let flags = read_u32(space, offset(at, 4)?)?;
        let percent = read_u32(space, offset(at, 8)?)?;
        let reserved = read_u32(space, offset(at, 12)?)?;
        require(flags & !SHARE_BY_INDEX == 0 && reserved == 0, || "a share has unknown flags or reserved bits".into())?;
        let by_index = flags & SHARE_BY_INDEX != 0;
        require(by_index == context.mapped, || {
            let how = if context.mapped { "an index into its map" } else { "class and instance" };
            format!("the engine of a share is named by {how} on this context")
        })?;
        if by_index {
            require((who as usize) < context.slots, || format!("slot {who} is beyond the map of {}", context.slots))?;
            return Ok((who as u8, percent));
        }
        let id = engine_id(who);
        match self.lock().catalogue.find(id) {
            Some(index) => Ok((index as u8, percent)),
            None => {
                refuse(Errno::NoEntry, format!("there is no engine of class {} instance {}", id.class, id.instance))
            }
        }
    }

    pub(super) fn apply_param(&self, parsed: Parsed, context: &mut Context) -> Result<(), Refused> {
        let catalogue = self.lock().catalogue.clone();
        apply(&catalogue, parsed, context);
        Ok(())
    }
}

fn view(context: &Context) -> View {
    View { space: context.space, mapped: context.mapped, used: context.used, slots: context.map.slots.len() }
}

fn frozen(context: &Context) -> Result<(), Refused> {
    require(!context.used, || format!("the map of context {} is in use and does not change", context.id))
}

fn apply(catalogue: &crate::catalogue::Catalogue, parsed: Parsed, context: &mut Context) {
    match parsed {
        Parsed::Priority(priority) => context.priority = priority,
        Parsed::Persistence(persistent) => context.persistent = persistent,
        Parsed::Space(space) => context.space = space,
        Parsed::Engines(Some(map)) => context.set_map(map, true),
        Parsed::Engines(None) => context.set_map(EngineMap::default_map(catalogue), false),
        Parsed::Share(index, percent) => {
            context.shares.insert(index, percent);
        }
    }
}
