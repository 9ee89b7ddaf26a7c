//! The device as registers: what a client reads and writes at offsets. `docs/accel-abi.md` has the map.
//!
//! A register is accessed whole: four bytes or eight, as wide as it is, at its own offset. A portal also takes a descriptor in
//! pieces of eight bytes, in order. What is no register is refused by name; a front end decides what its bus makes of that.

use crate::abi::{self, command, register as reg, slot_register as slot_reg};
use crate::abi::{CLIENT_TIMELINE, Completion, DESCRIPTOR_BYTES, Descriptor, Fence, MAX_CONTEXTS, MAX_SLOTS, status};
use crate::catalogue::EngineId;
use crate::context::{Ring, SlotState};
use crate::error::{Errno, Refused, refuse, require};
use crate::memory::{AddressSpace, offset, read_u32, read_u64};
use crate::scheduler::{Core, Effect, FenceState, Tunables};
use crate::state::saved::SavedRegisters;

use super::{Caller, Device, Param};

/// What an offset means.
enum Place {
    /// A register of the device.
    Device(u64),
    /// An engine, and the offset in its entry.
    Engine(usize, u64),
    /// Tunables of an engine, and the offset in its entry.
    Tunable(usize, u64),
    /// A bell.
    Bell(u32),
    /// Place of a context, its slot, and the offset in its doorbell registers.
    Doorbell(u32, u32, u64),
    /// Place of a context, its slot, and the offset in its portal.
    Portal(u32, u32, u64),
}

/// Bytes of the bells.
const BELLS_BYTES: u64 = reg::BELL_BYTES * abi::BELLS as u64;

/// The bell at an offset of the registers, if there is one.
pub(crate) fn bell(at: u64) -> Option<u32> {
    match place(at) {
        Ok(Place::Bell(bell)) => Some(bell),
        _ => None,
    }
}

fn place(at: u64) -> Result<Place, Refused> {
    let entry = |base: u64| (((at - base) / 16) as usize, (at - base) % 16);
    let end = reg::CONTEXTS_BASE + reg::CONTEXT_BYTES * MAX_CONTEXTS as u64;
    Ok(match at {
        0..reg::ENGINE_TABLE => Place::Device(at),
        reg::ENGINE_TABLE..reg::TUNABLES => {
            let (engine, within) = entry(reg::ENGINE_TABLE);
            Place::Engine(engine, within)
        }
        reg::TUNABLES..reg::TUNABLES_END => {
            let (engine, within) = entry(reg::TUNABLES);
            Place::Tunable(engine, within)
        }
        reg::BELLS.. if at < reg::BELLS + BELLS_BYTES && (at - reg::BELLS).is_multiple_of(reg::BELL_BYTES) => {
            Place::Bell(((at - reg::BELLS) / reg::BELL_BYTES) as u32)
        }
        reg::CONTEXTS_BASE.. if at < end => {
            let within = (at - reg::CONTEXTS_BASE) % reg::CONTEXT_BYTES;
            let context = ((at - reg::CONTEXTS_BASE) / reg::CONTEXT_BYTES) as u32 + 1;
            let slot = (within % reg::PORTALS / slot_reg::BYTES) as u32;
            match within < reg::PORTALS {
                true => Place::Doorbell(context, slot, within % slot_reg::BYTES),
                false => Place::Portal(context, slot, within % slot_reg::BYTES),
            }
        }
        _ => return refuse(Errno::Invalid, format!("there is no register at {at:#x}")),
    })
}

fn none<T>(at: u64, bytes: usize, how: &str) -> Result<T, Refused> {
    refuse(Errno::Invalid, format!("there is no register of {bytes} bytes at {at:#x} to {how}"))
}

impl Core {
    fn at_place(&mut self, place: u32) -> Result<u32, Refused> {
        let found = self.contexts.values().find(|c| c.id & 0xffff == place && !c.closed).map(|c| c.id);
        found.ok_or_else(|| Refused::new(Errno::NoEntry, format!("there is no context in place {place}")))
    }

    pub(super) fn slot_state(&mut self, context: u32, slot: u32) -> Result<&mut SlotState, Refused> {
        match self.open(context)?.slots.get_mut(slot as usize) {
            Some(state) => Ok(state),
            None => refuse(Errno::Invalid, format!("slot {slot} is beyond the map of context {context}")),
        }
    }
}

impl Device {
    /// Reads a register.
    pub fn read_register(&self, at: u64, bytes: &mut [u8]) -> Result<(), Refused> {
        let value = match (place(at)?, bytes.len()) {
            (Place::Device(register), width) => self.device_register(register, width)?,
            (Place::Engine(engine, within), width) => {
                let Some(info) = self.engines().get(engine).copied() else { return none(at, width, "read") };
                match (within, width) {
                    (0, 4) => u64::from(info.id.class) | u64::from(info.id.instance) << 16,
                    (4, 4) => info.resets & 0xffff_ffff,
                    (8, 8) => info.busy,
                    _ => return none(at, width, "read"),
                }
            }
            (Place::Tunable(engine, within), 4) => {
                let Some(info) = self.engines().get(engine).copied() else { return none(at, 4, "read") };
                let t = info.tunables;
                match within {
                    0 => t.slice / 1000,
                    4 => t.preempt_timeout / 1000,
                    8 => t.heartbeat / 1000,
                    _ => return none(at, 4, "read"),
                }
            }
            (Place::Doorbell(context, slot, within), width) => {
                let mut core = self.locked();
                let context = core.at_place(context)?;
                let client = core.open(context)?.client;
                let state = core.slot_state(context, slot)?;
                match (within, width) {
                    (slot_reg::BASE, 8) => state.ring.base,
                    (slot_reg::ENTRIES, 4) => state.ring.entries.into(),
                    (slot_reg::TAIL, 4) => state.ring.tail.into(),
                    (slot_reg::HEAD, 4) => state.ring.head.into(),
                    (slot_reg::STATUS, 4) => state.ring.status.into(),
                    (slot_reg::HEAD_ADDRESS, 8) => state.ring.head_address,
                    (slot_reg::SUBMITTED, 8) => state.timeline.submitted,
                    (slot_reg::COMPLETED, 8) => state.timeline.completed,
                    (slot_reg::CLIENT, 8) => client,
                    (slot_reg::TAIL_ADDRESS, 8) => state.ring.tail_address,
                    _ => return none(at, width, "read"),
                }
            }
            (_, width) => return none(at, width, "read"),
        };
        let width = bytes.len();
        bytes.copy_from_slice(&value.to_le_bytes()[..width]);
        Ok(())
    }

    fn device_register(&self, register: u64, width: usize) -> Result<u64, Refused> {
        let engines = self.locked().engines.len() as u64;
        Ok(match (register, width) {
            (reg::MAGIC, 4) => abi::MAGIC.into(),
            (reg::VERSION, 4) => abi::VERSION.into(),
            (reg::ENGINES, 4) => engines,
            (reg::CONTEXTS, 4) => MAX_CONTEXTS as u64,
            (reg::SLOTS, 4) => MAX_SLOTS as u64,
            (reg::STATUS, 4) => self.is_lost().into(),
            (reg::TIME, 8) => self.now(),
            (reg::RESULT, 4) => self.registers().result.into(),
            (reg::CREATED, 4) => self.registers().created.into(),
            _ => return none(register, width, "read"),
        })
    }

    /// Writes a register.
    pub fn write_register(&self, caller: Caller, at: u64, bytes: &[u8]) -> Result<(), Refused> {
        let value = match bytes {
            [a, b, c, d] => u64::from(u32::from_le_bytes([*a, *b, *c, *d])),
            [a, b, c, d, e, f, g, h] => u64::from_le_bytes([*a, *b, *c, *d, *e, *f, *g, *h]),
            _ => 0,
        };
        match (place(at)?, bytes.len()) {
            (Place::Device(reg::COMMAND), 8) => {
                let result = self.command(caller, value);
                let mut registers = self.registers();
                registers.result = result.as_ref().err().map_or(0, |refused| refused.errno.number().into());
                if let Ok(Some(created)) = result {
                    registers.created = created;
                }
                self.set_registers(registers);
                result.map(|_| ())
            }
            (Place::Bell(bell), 4) => {
                self.ring(bell);
                Ok(())
            }
            (Place::Tunable(engine, within), 4) => self.write_tunable(caller, at, engine, within, value),
            (Place::Doorbell(context, slot, within), width) => {
                let context = self.locked().at_place(context)?;
                self.doorbell(context, slot, within, width, value)
            }
            (Place::Portal(context, slot, within), width) => {
                let context = self.locked().at_place(context)?;
                self.portal(context, slot, within, bytes).or_else(|refused| match width {
                    8 | 64 => Err(refused),
                    _ => none(at, width, "write"),
                })
            }
            (_, width) => none(at, width, "write"),
        }
    }

    fn write_tunable(&self, caller: Caller, at: u64, engine: usize, within: u64, value: u64) -> Result<(), Refused> {
        if !caller.privileged {
            return refuse(Errno::Perm, "setting an engine needs privilege");
        }
        let engines = self.engines();
        let Some(info) = engines.get(engine) else { return none(at, 4, "write") };
        let (id, mut tunables): (EngineId, Tunables) = (info.id, info.tunables);
        match within {
            0 => tunables.slice = value * 1000,
            4 => tunables.preempt_timeout = value * 1000,
            8 => tunables.heartbeat = value * 1000,
            _ => return none(at, 4, "write"),
        }
        self.tune(id, tunables)
    }

    fn doorbell(&self, context: u32, slot: u32, within: u64, width: usize, value: u64) -> Result<(), Refused> {
        let mut core = self.locked();
        let ring = &mut core.slot_state(context, slot)?.ring;
        let empty = || match ring.head == ring.tail {
            true => Ok(()),
            false => refuse(Errno::Busy, format!("the ring of context {context} slot {slot} is not empty")),
        };
        match (within, width) {
            (slot_reg::BASE, 8) => {
                empty()?;
                ring.base = value;
            }
            (slot_reg::ENTRIES, 4) => {
                empty()?;
                let new = Ring { entries: value as u32, head: 0, tail: 0, ..*ring };
                require(new.fits(), || format!("a ring has a power of two of entries up to {}", Ring::MAX))?;
                *ring = new;
            }
            (slot_reg::HEAD_ADDRESS, 8) => ring.head_address = value,
            (slot_reg::TAIL_ADDRESS, 8) => {
                let new = Ring { tail_address: value, ..*ring };
                require(new.fits(), || format!("the word of a tail lies on a multiple of four, not at {value:#x}"))?;
                *ring = new;
            }
            (slot_reg::TAIL, 4) => {
                let new = Ring { tail: value as u32, ..*ring };
                require(new.fits(), || {
                    format!("tail {value} is further from head {} than the ring is long", ring.head)
                })?;
                *ring = new;
                drop(core);
                self.pump(context, slot);
            }
            (slot_reg::CLIENT, 8) => {
                drop(core);
                self.advance_client(context, value)?;
            }
            _ => {
                return refuse(
                    Errno::Invalid,
                    format!("there is no doorbell register of {width} bytes at {within:#x}"),
                );
            }
        }
        Ok(())
    }

    /// Takes a descriptor: at once, or in pieces of eight bytes, the first of which begins anew.
    fn portal(&self, context: u32, slot: u32, within: u64, bytes: &[u8]) -> Result<(), Refused> {
        let whole = {
            let mut core = self.locked();
            let held = &mut core.slot_state(context, slot)?.portal;
            if within == 0 {
                held.clear();
            }
            require(matches!(bytes.len(), 8 | 64) && within as usize == held.len(), || {
                format!("a portal takes a descriptor in order: {} bytes are there, and {within} come next", held.len())
            })?;
            held.extend(bytes);
            let Ok(whole) = <[u8; DESCRIPTOR_BYTES]>::try_from(&held[..]) else {
                let fits = held.len() < DESCRIPTOR_BYTES;
                if !fits {
                    held.clear();
                }
                return require(fits, || "a portal takes 64 bytes".into());
            };
            held.clear();
            whole
        };
        let result = Descriptor::decode(&whole).and_then(|d| self.submit(context, slot, &d));
        let errno = result.as_ref().err().map_or(0, |refused| refused.errno.number().into());
        self.locked().slot_state(context, slot)?.ring.status = errno;
        result.map(|_| ())
    }

    /// Takes descriptors from a ring until it is empty, or no more are taken.
    pub(crate) fn pump(&self, context: u32, slot: u32) {
        let Ok(begin) = self.begin_pump(context, slot) else { return };
        let Some(space) = begin else { return };
        while self.pump_one(context, slot, &*space) {}
        let head = self.locked().slot_state(context, slot).map(|state| (state.ring.head_address, state.ring.head));
        if let Ok((at, head)) = head
            && at != 0
        {
            // A client whose own address for it is wrong reads the register.
            let _ = space.write(at, &head.to_le_bytes());
        }
        if let Ok(state) = self.locked().slot_state(context, slot) {
            state.pumping = false;
        }
        self.wake();
        // A tail that was written while this looked for the last time.
        let more = {
            let core = self.locked();
            let rings = core.contexts.get(&context).and_then(|c| c.slots.get(slot as usize)).map(|state| state.ring);
            rings.is_some_and(|ring| ring.head != ring.tail)
                && !core.stopped
                && !core.stalled.contains(&(context, slot))
        };
        if more {
            self.pump(context, slot);
        }
    }

    /// Goes on with the rings from which nothing could be taken, or with all of them.
    pub(crate) fn pump_rings(&self, all: bool) {
        let rings: Vec<(u32, u32)> = {
            let mut core = self.locked();
            match all {
                false => std::mem::take(&mut core.stalled).into_iter().collect(),
                true => {
                    core.stalled.clear();
                    let slots = |c: &crate::context::Context| {
                        let (id, filled) = (c.id, |s: &SlotState| s.ring.head != s.ring.tail);
                        let of = c.slots.iter().enumerate().filter(|(_, s)| filled(s));
                        of.map(|(slot, _)| (id, slot as u32)).collect::<Vec<_>>()
                    };
                    core.contexts.values().flat_map(slots).collect()
                }
            }
        };
        for (context, slot) in rings {
            self.pump(context, slot);
        }
    }

    fn begin_pump(&self, context: u32, slot: u32) -> Result<Option<std::sync::Arc<dyn AddressSpace>>, Refused> {
        let mut core = self.locked();
        let (stopped, space) = (core.stopped, core.open(context)?.space);
        let state = core.slot_state(context, slot)?;
        if state.pumping || stopped || state.ring.head == state.ring.tail {
            return Ok(None);
        }
        state.pumping = true;
        drop(core);
        let space = self.space(space);
        if space.is_err() {
            self.locked().slot_state(context, slot)?.pumping = false;
        }
        space.map(Some)
    }

    /// Takes one descriptor; false when there is no more to take now.
    fn pump_one(&self, context: u32, slot: u32, space: &dyn AddressSpace) -> bool {
        let ring = {
            let mut core = self.locked();
            let stopped = core.stopped;
            match core.slot_state(context, slot) {
                Ok(state) if state.ring.head != state.ring.tail && !stopped => state.ring,
                _ => return false,
            }
        };
        let index = u64::from(ring.head & (ring.entries - 1));
        let mut bytes = [0; DESCRIPTOR_BYTES];
        let read = offset(ring.base, index * DESCRIPTOR_BYTES as u64).and_then(|at| space.read(at, &mut bytes));
        let decoded = read.map_err(Refused::from).and_then(|()| Descriptor::decode(&bytes));
        // The head passes a descriptor before its end can be seen: a client that has seen it uses the place again.
        let pass = |core: &mut Core, status: u16| match core.slot_state(context, slot) {
            Ok(state) => {
                state.ring.head = state.ring.head.wrapping_add(1);
                state.ring.status = status.into();
                true
            }
            Err(_) => false,
        };
        let take = |d: Descriptor| {
            self.submit_with(context, slot, &d, |core| {
                pass(core, 0);
            })
        };
        let Err(refused) = decoded.clone().and_then(take) else { return true };
        let mut core = self.locked();
        if refused.errno == Errno::Again {
            core.stalled.insert((context, slot));
            return false;
        }
        let error = refused.errno.number();
        let number = core.open(context).map(|c| c.space).unwrap_or_default();
        if !pass(&mut core, error) {
            return false;
        }
        if let Ok(d) = decoded {
            let record =
                Completion { status: status::FAILED, opcode: d.opcode, error, tag: d.tag, ..Completion::default() };
            core.effects.push_back(Effect { space: number, submission: d, record, request: None });
        }
        drop(core);
        self.flush();
        true
    }

    /// Does a command from the client's memory; answers the context it created.
    fn command(&self, caller: Caller, at: u64) -> Result<Option<u32>, Refused> {
        let space = self.space(caller.space)?;
        let space = &*space;
        let flags = read_u32(space, offset(at, 4)?)?;
        require(flags == 0, || format!("a command knows no flags {flags:#x}"))?;
        let argument = offset(at, 8)?;
        let fence = || {
            Ok::<_, Refused>(Fence {
                context: read_u32(space, argument)?,
                slot: read_u32(space, offset(argument, 4)?)?,
                seq: read_u64(space, offset(argument, 8)?)?,
            })
        };
        let answer = |low: u32, high: u32| {
            let both = u64::from(low) | u64::from(high) << 32;
            Ok::<_, Refused>(space.write(offset(argument, 16)?, &both.to_le_bytes())?)
        };
        match read_u32(space, at)? {
            command::CREATE => {
                let (flags, extensions) = (read_u32(space, argument)?, read_u64(space, offset(argument, 8)?)?);
                return self.create_context(caller, flags, extensions).map(Some);
            }
            command::DESTROY => self.destroy_context(read_u32(space, argument)?)?,
            command::SET_PARAM => self.set_param(caller, &Param::read(space, argument)?)?,
            command::GET_PARAM => {
                let mut param = Param::read(space, argument)?;
                self.get_param(&mut param)?;
                param.write(space, argument)?;
            }
            command::FENCE => match self.fence(fence()?)? {
                FenceState::Pending => answer(0, 0)?,
                FenceState::Signalled => answer(1, 0)?,
                FenceState::Failed(errno) => answer(2, errno.number().into())?,
            },
            command::BUSY => {
                let fence = fence()?;
                require(fence.slot != CLIENT_TIMELINE, || "the client's timeline runs on no engine".into())?;
                let (running, queued) = self.busy(fence)?;
                answer(running, queued)?;
            }
            other => return refuse(Errno::Invalid, format!("there is no command {other}")),
        }
        Ok(None)
    }

    pub(crate) fn registers(&self) -> SavedRegisters {
        self.registers.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    pub(crate) fn set_registers(&self, registers: SavedRegisters) {
        *self.registers.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = registers;
    }
}
