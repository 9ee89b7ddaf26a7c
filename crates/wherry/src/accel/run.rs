//! A device in this process and the steps of a job file run on it, as a client would: by the ABI, through memory.
//!
//! Every buffer is a region of its own with nothing behind it, so that a step that goes beyond its buffer faults. Steps are
//! submitted in order without waiting, unless one needs the result of an earlier one for its size.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use wherry_accel::FenceState;
use wherry_accel::abi::{self, Completion, Descriptor, Fence, extension, flag, opcode, param};
use wherry_accel::catalogue::{EngineId, Host};
use wherry_accel::clock::RealClock;
use wherry_accel::device::{Caller, Config, Device, FIRST_SPACE, Notify, Param};
use wherry_accel::drive::Workers;
use wherry_accel::error::{Errno, Refused};
use wherry_accel::keys::FleetKey;
use wherry_accel::memory::{AddressSpace, Arena, PAGE};
use wherry_accel::state::AccelUnit;
use wherry_state::{Saved, StateUnit};

use super::descriptor::{Names, Place, descriptor, parameters};
use super::job::{self, Job, SlotText, Step};
use super::{ContextOutcome, EngineOutcome, Outcome, StepOutcome, figures};
use crate::args::AccelRun;

/// Where the client's own structures lie, then its buffers.
const BASE: u64 = 0x1_0000;

/// Between two looks at a fence whose interrupt has not come.
const LOOK: Duration = Duration::from_millis(10);

/// Between two lines of `--watch`.
const WATCH: Duration = Duration::from_millis(500);

/// How long a device may take to stop for a move.
const STOP: Duration = Duration::from_secs(5);

/// Rung by the device when something has completed.
#[derive(Debug, Default)]
struct Bell {
    rings: Mutex<u64>,
    rung: Condvar,
}

impl Notify for Bell {
    fn raise(&self, _vector: u16) {
        *self.rings.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.rung.notify_all();
    }
}

impl Bell {
    /// How often it was rung.
    fn rings(&self) -> u64 {
        *self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it has been rung more often than `before`, or [`LOOK`].
    fn wait(&self, before: u64) {
        let rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.rung.wait_timeout_while(rings, LOOK, |rings| *rings == before));
    }
}

/// A job that can be run: its device and memory are there, and all that can be checked before has been.
pub struct Prepared {
    job: Job,
    device: Arc<Device>,
    memory: Arc<Arena>,
    bell: Arc<Bell>,
    fleet: [u8; 32],
    places: BTreeMap<String, Place>,
    handles: BTreeMap<String, u32>,
    contexts: BTreeMap<String, u32>,
    /// Next free place of the client's own structures.
    next: u64,
}

/// A step that was submitted, or that was refused.
struct Submitted {
    record: u64,
    begin: u64,
    fence: Result<Fence, Refused>,
}

fn new_device(job: &Job, workers: Option<u16>, memory: &Arc<Arena>, bell: &Arc<Bell>) -> Result<Arc<Device>> {
    let config = Config {
        catalogue: job.catalogue()?,
        host: Host::uniform(super::workers(workers)),
        clock: Arc::new(RealClock::default()),
        notify: bell.clone(),
        seed: std::process::id().into(),
    };
    let device = Device::new(config).context("making the device")?;
    device.set_space(FIRST_SPACE, memory.clone());
    Ok(Arc::new(device))
}

impl Names for Prepared {
    fn buffer(&self, name: &str) -> Result<Place> {
        let names = || job::choice(self.places.keys());
        self.places.get(name).copied().with_context(|| format!("there is no buffer {name:?}{}", names()))
    }

    fn key(&self, name: &str) -> Result<u32> {
        self.handles.get(name).copied().with_context(|| format!("there is no key {name:?}"))
    }
}

impl Prepared {
    /// Makes the device, its memory, keys and contexts.
    pub fn new(job: Job, workers: Option<u16>) -> Result<Self> {
        let mut own = PAGE;
        for step in &job.steps {
            own += 256 + step.associated.as_ref().map_or(0, String::len) as u64;
        }
        for context in job.contexts.values() {
            let bonds = context.bonds.iter().map(|bond| bond.engines.len() as u64 * 4 + 192).sum::<u64>();
            own += 4096 + bonds + context.slots.as_ref().map_or(0, |slots| slots.len() as u64 * 512);
        }
        let own = own.next_multiple_of(PAGE);
        let mut arena = Arena::new(&[(BASE, own)]).context("making the device's memory")?;
        let mut places = BTreeMap::new();
        let mut at = BASE + own + PAGE;
        let mut content = Vec::new();
        for (name, buffer) in &job.buffers {
            let (bytes, size) = buffer.content().with_context(|| job.at("buffer", name))?;
            let whole = size.next_multiple_of(PAGE);
            arena.map(at, whole, true).with_context(|| job.at("buffer", name))?;
            places.insert(name.clone(), Place { at, bytes: size });
            content.push((at, bytes));
            at += whole + PAGE;
        }
        for (at, bytes) in content {
            arena.write(at, &bytes)?;
        }
        let (memory, bell) = (Arc::new(arena), Arc::new(Bell::default()));
        let workers = workers.or(job.device.workers);
        let device = new_device(&job, workers, &memory, &bell)?;
        let mut fleet = [0; 32];
        rustix::rand::getrandom(&mut fleet, rustix::rand::GetRandomFlags::empty()).context("making a fleet key")?;
        let mut prepared = Self {
            job,
            device,
            memory,
            bell,
            fleet,
            places,
            handles: BTreeMap::new(),
            contexts: BTreeMap::new(),
            next: BASE,
        };
        prepared.import_keys()?;
        prepared.make_contexts()?;
        prepared.check_steps()?;
        Ok(prepared)
    }

    fn import_keys(&mut self) -> Result<()> {
        let fleet = FleetKey::new(self.fleet);
        for (index, (name, key)) in self.job.keys.iter().enumerate() {
            let handle = u32::try_from(index)? + 1;
            import(&self.device, &fleet, handle, key).with_context(|| self.job.at("key", name))?;
            self.handles.insert(name.clone(), handle);
        }
        Ok(())
    }

    /// Writes a structure of the client's own to memory.
    fn put(&mut self, bytes: &[u8]) -> Result<u64> {
        let at = self.next;
        self.memory.write(at, bytes)?;
        self.next += (bytes.len() as u64).next_multiple_of(64).max(64);
        Ok(at)
    }

    fn make_contexts(&mut self) -> Result<()> {
        if self.job.contexts.is_empty() {
            self.job.contexts.insert("default".into(), job::ContextTable::default());
        }
        let names: Vec<String> = self.job.contexts.keys().cloned().collect();
        for name in names {
            let id = self.make_context(&name).with_context(|| self.job.at("context", &name))?;
            self.contexts.insert(name, id);
        }
        Ok(())
    }

    fn make_context(&mut self, name: &str) -> Result<u32> {
        let id = self.device.create_context(Caller::PRIVILEGED, 0, 0)?;
        let device = self.device.clone();
        let set = |param: u64, size: u32, value: u64| {
            device.set_param(Caller::PRIVILEGED, &Param { context: id, size, param, value })
        };
        let table = &self.job.contexts[name];
        if let Some(priority) = table.priority {
            set(param::PRIORITY, 0, i64::from(priority) as u64)?;
        }
        let Some(slots) = &table.slots else {
            ensure!(table.bonds.is_empty(), "it has bonds, and no slots");
            return Ok(id);
        };
        let slots: Vec<SlotText> = slots.iter().map(|text| job::slot(text)).collect::<Result<_>>()?;
        let mut nodes = Vec::new();
        let mut map = vec![0; 8];
        for (index, slot) in slots.iter().enumerate() {
            map.extend(match slot {
                SlotText::Engine(engine) => engine_bytes(engine),
                SlotText::Gap | SlotText::Balance(_) => [0xff; 4],
            });
            if let SlotText::Balance(siblings) = slot {
                nodes.push(balance(u16::try_from(index)?, siblings)?);
            }
        }
        for bond in &table.bonds {
            let engines: Vec<EngineId> = bond.engines.iter().map(|text| job::engine(text)).collect::<Result<_>>()?;
            nodes.push(bond_node(bond.slot, &job::engine(&bond.master)?, &engines)?);
        }
        let mut chain = 0u64;
        for mut node in nodes.into_iter().rev() {
            node[0..8].copy_from_slice(&chain.to_le_bytes());
            chain = self.put(&node)?;
        }
        map[0..8].copy_from_slice(&chain.to_le_bytes());
        let at = self.put(&map)?;
        set(param::ENGINES, u32::try_from(map.len())?, at).context("setting its map")?;
        Ok(id)
    }

    /// Makes every descriptor once, to see that it can be made.
    fn check_steps(&self) -> Result<()> {
        for step in &self.job.steps {
            let check = || {
                descriptor(step, self, step.size_of.as_ref().map(|_| 0), 0)?;
                parameters(step)?;
                let expected = step.expect.hex.as_deref().map(job::hex).transpose()?;
                let both = expected.is_some() && step.expect.text.is_some();
                ensure!(!both, "expect.hex and expect.text are two ways to say the same; give one");
                let looks = expected.is_some() || step.expect.text.is_some();
                ensure!(!looks || step.destination.is_some(), "it expects bytes, and has no destination");
                Ok(())
            };
            check().with_context(|| self.job.at("step", &step.name))?;
        }
        Ok(())
    }

    fn record(&self, at: u64) -> Result<Completion> {
        let mut bytes = [0; abi::COMPLETION_BYTES];
        self.memory.read(at, &mut bytes)?;
        Ok(Completion::decode(&bytes))
    }

    /// Runs all steps and looks at what came of them.
    pub fn run(mut self, options: &AccelRun) -> Result<Outcome> {
        let begin = Instant::now();
        let deadline = begin + Duration::from_secs(options.timeout);
        let mut workers = Workers::start(self.device.clone()).context("starting the workers")?;
        let mut submitted: BTreeMap<String, Submitted> = BTreeMap::new();
        let mut moved_bytes = None;
        let steps = std::mem::take(&mut self.job.steps);
        for step in &steps {
            let one = self.submit(step, &submitted, deadline, options)?;
            submitted.insert(step.name.clone(), one);
        }
        if let Some(count) = options.move_to {
            moved_bytes = Some(self.travel(&mut workers, count)?);
        }
        for step in &steps {
            if let Ok(fence) = submitted[&step.name].fence {
                self.wait(&step.name, fence, deadline, options)?;
            }
        }
        let took = begin.elapsed();
        let mut outcomes = Vec::new();
        for step in &steps {
            outcomes.push(self.outcome(step, &submitted[&step.name])?);
        }
        self.save(&outcomes)?;
        let (contexts, engines) = self.figures();
        drop(workers);
        Ok(Outcome {
            good: outcomes.iter().all(|outcome| outcome.good),
            took_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
            workers: self.device.workers(),
            moved_bytes,
            steps: outcomes,
            contexts,
            engines,
        })
    }

    fn submit(
        &mut self,
        step: &Step,
        earlier: &BTreeMap<String, Submitted>,
        deadline: Instant,
        options: &AccelRun,
    ) -> Result<Submitted> {
        let what = || format!("step {:?}", step.name);
        let not_run = |name: &str, refused: &Refused| {
            Refused::new(refused.errno, format!("not run, since step {name:?} was refused"))
        };
        let mut refused = None;
        let mut size = None;
        if let Some(name) = &step.size_of {
            match &earlier[name].fence {
                Ok(fence) => {
                    self.wait(name, *fence, deadline, options)?;
                    size = Some(self.record(earlier[name].record)?.result);
                }
                Err(why) => refused = Some(not_run(name, why)),
            }
        }
        let at = self.put(&parameters(step)?)?;
        let record = self.put(&[0; abi::COMPLETION_BYTES])?;
        let begin = self.device.now();
        let fail = |why| Ok(Submitted { record, begin, fence: Err(why) });
        if let Some(why) = refused {
            return fail(why);
        }
        let mut d = descriptor(step, self, size, at).with_context(what)?.completing_at(record);
        d = d.flagged(flag::INTERRUPT);
        let list = self.put(&d.encode())?;
        let mut submission = Descriptor::new(opcode::BATCH, list, 0, 1);
        for (name, beside) in [(&step.after, false), (&step.beside, true)] {
            let Some(name) = name else { continue };
            match &earlier[name].fence {
                Ok(fence) if beside => submission = submission.beside(*fence),
                Ok(fence) => submission = submission.after(*fence),
                Err(why) => return fail(not_run(name, why)),
            }
        }
        let context = self.contexts[self.job.context_of(step)];
        loop {
            let rings = self.bell.rings();
            match self.device.submit(context, step.slot, &submission) {
                Err(full) if full.errno == Errno::Again && Instant::now() < deadline => self.bell.wait(rings),
                fence => return Ok(Submitted { record, begin, fence }),
            }
        }
    }

    fn wait(&self, name: &str, fence: Fence, deadline: Instant, options: &AccelRun) -> Result<()> {
        let mut shown = Instant::now();
        loop {
            // Before the look: what is rung after it is not slept over.
            let rings = self.bell.rings();
            if self.device.fence(fence)? != FenceState::Pending {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let (_, engines) = self.figures();
                let busy: Vec<String> =
                    self.device.engines().iter().filter(|e| e.occupied).map(|e| e.id.to_string()).collect();
                bail!(
                    "step {name:?} has not ended within {} s (--timeout); busy: {} of {} engines: {}",
                    options.timeout,
                    busy.len(),
                    engines.len(),
                    busy.join(", ")
                );
            }
            self.bell.wait(rings);
            if options.watch && shown.elapsed() >= WATCH {
                shown = Instant::now();
                let (contexts, engines) = self.figures();
                eprintln!("{}", figures(&contexts, &engines, self.device.now() / 1000));
            }
        }
    }

    /// Stops the device wherever its work is, and has another one go on from its state.
    fn travel(&mut self, workers: &mut Workers, count: u16) -> Result<usize> {
        let fleet = || Some(FleetKey::new(self.fleet));
        let unit = AccelUnit::new(self.device.clone(), fleet(), 0);
        unit.begin_stop().context("stopping the device")?;
        unit.finish_stop(Instant::now() + STOP).context("stopping the device")?;
        let Saved::Section(section) = unit.save().context("saving the device")? else {
            bail!("saving the device: it has no section");
        };
        let there = new_device(&self.job, Some(count), &self.memory, &self.bell)?;
        let unit = AccelUnit::new(there.clone(), fleet(), 0);
        unit.restore(&section).context("restoring the device")?;
        // The old ones end here, before the new ones touch the same memory.
        *workers = Workers::start(there.clone()).context("starting the workers")?;
        unit.start().context("starting the device")?;
        self.device = there;
        Ok(section.bytes.len())
    }

    fn outcome(&self, step: &Step, submitted: &Submitted) -> Result<StepOutcome> {
        let record = self.record(submitted.record)?;
        let mut error = match &submitted.fence {
            Err(refused) => Some((refused.errno, refused.what.clone())),
            Ok(fence) => match self.device.fence(*fence)? {
                FenceState::Failed(errno) => Some((errno, meaning(errno).into())),
                _ => None,
            },
        };
        let mut differs = match (&step.expect.error, &error) {
            (None, _) => None,
            (Some(name), Some((errno, _))) if errno.name() == name => None,
            (Some(name), Some((errno, _))) => Some(format!("it failed with {errno} rather than {name}")),
            (Some(name), None) => Some(format!("it ended well; {name} was expected")),
        };
        if let Some(expected) = step.expect.result
            && error.is_none()
            && record.result != expected
        {
            differs = Some(format!("result {} rather than {expected}", record.result));
        }
        let bytes = match (&step.expect.hex, &step.expect.text) {
            (Some(digits), _) => Some(job::hex(digits)?),
            (None, Some(text)) => Some(text.clone().into_bytes()),
            (None, None) => None,
        };
        if let (Some(expected), None, Some(name)) = (bytes, &error, &step.destination) {
            let place = self.buffer(name)?;
            let mut there = vec![0; usize::try_from(place.bytes.min(expected.len() as u64))?];
            self.memory.read(place.at, &mut there)?;
            if there != expected {
                let at = there.iter().zip(&expected).position(|(a, b)| a != b).unwrap_or(there.len());
                differs = Some(format!("buffer {name:?} differs from byte {at} on"));
            }
        }
        let good = differs.is_none() && (error.is_none() || step.expect.error.is_some());
        let error = error.take().map(|(errno, what)| format!("{errno}: {what}"));
        Ok(StepOutcome {
            name: step.name.clone(),
            operation: step.operation.clone(),
            context: self.job.context_of(step).to_owned(),
            slot: step.slot,
            bytes: record.bytes,
            result: record.result,
            took_us: record.time.saturating_sub(submitted.begin) / 1000,
            good,
            error,
            differs,
        })
    }

    /// Writes buffers to files.
    fn save(&self, outcomes: &[StepOutcome]) -> Result<()> {
        for (name, buffer) in &self.job.buffers {
            let Some(path) = &buffer.save else { continue };
            let place = self.buffer(name)?;
            let result = |step: &String| outcomes.iter().find(|outcome| outcome.name == *step).map(|o| o.result);
            let size = buffer.save_size_of.as_ref().and_then(result).unwrap_or(place.bytes).min(place.bytes);
            let mut bytes = vec![0; usize::try_from(size)?];
            self.memory.read(place.at, &mut bytes)?;
            std::fs::write(path, bytes).with_context(|| format!("writing buffer {name:?} to {}", path.display()))?;
        }
        Ok(())
    }

    fn figures(&self) -> (Vec<ContextOutcome>, Vec<EngineOutcome>) {
        let name = |id: u32| {
            let found = self.contexts.iter().find(|(_, context)| **context == id);
            found.map_or_else(|| id.to_string(), |(name, _)| name.clone())
        };
        let contexts = self.device.contexts().iter().map(|info| ContextOutcome::of(info, name(info.id))).collect();
        (contexts, self.device.engines().iter().map(EngineOutcome::of).collect())
    }
}

/// Gives the device a key.
fn import(device: &Device, fleet: &FleetKey, handle: u32, key: &job::Key) -> Result<()> {
    let kind = crate::args::key_kind(&key.kind).map_err(anyhow::Error::msg)?;
    let bytes = job::hex(&key.hex)?;
    let length = bytes.len();
    let bytes = <[u8; 32]>::try_from(bytes).ok().with_context(|| format!("it has {length} bytes; keys have 32"))?;
    let wrapped = fleet.wrap(handle, kind, &bytes)?;
    Ok(device.keys().import(fleet, handle, kind, &wrapped)?)
}

/// What an error of the ABI means for work that was taken.
fn meaning(errno: Errno) -> &'static str {
    match errno {
        Errno::Perm => "it needs privilege",
        Errno::NoEntry => "there is no such key",
        Errno::Io => "the work was lost: it hung, or its context or the device is gone",
        Errno::TooBig => "it is too long for one operation",
        Errno::Again | Errno::Busy => "the device is full or busy",
        Errno::Fault => "it reads or writes where no buffer is",
        Errno::Exists => "taken already",
        Errno::Invalid => "a field is not allowed, or the engine is of another class than the operation",
        Errno::NoSpace => "the output does not fit its destination",
        Errno::Time => "the program has used up its fuel",
        Errno::BadMessage => "the data is corrupt, or does not authenticate",
        Errno::Cancelled => "the context is banned",
    }
}

fn engine_bytes(engine: &EngineId) -> [u8; 4] {
    let ([a, b], [c, d]) = (engine.class.to_le_bytes(), engine.instance.to_le_bytes());
    [a, b, c, d]
}

fn node(name: u32, bytes: usize, engines: &[EngineId]) -> Vec<u8> {
    let mut node = vec![0; bytes];
    node[8..12].copy_from_slice(&name.to_le_bytes());
    engines.iter().for_each(|engine| node.extend(engine_bytes(engine)));
    node
}

/// The extension that makes a slot virtual.
fn balance(index: u16, siblings: &[EngineId]) -> Result<Vec<u8>> {
    let mut node = node(extension::LOAD_BALANCE, 48, siblings);
    node[32..34].copy_from_slice(&index.to_le_bytes());
    node[34..36].copy_from_slice(&u16::try_from(siblings.len())?.to_le_bytes());
    Ok(node)
}

/// The extension that bonds a virtual slot to a master.
fn bond_node(slot: u16, master: &EngineId, engines: &[EngineId]) -> Result<Vec<u8>> {
    let mut node = node(extension::BOND, 80, engines);
    node[32..36].copy_from_slice(&engine_bytes(master));
    node[36..38].copy_from_slice(&slot.to_le_bytes());
    node[38..40].copy_from_slice(&u16::try_from(engines.len())?.to_le_bytes());
    Ok(node)
}
