//! What a request executes: descriptors, one after the other, with everything that moves when it moves half-way.

use crate::abi::{COMPLETION_BYTES, Completion, DESCRIPTOR_BYTES, Descriptor, MAX_BATCH, flag, status};
use crate::engines::{self, Env, Progress, Step};
use crate::error::{Errno, Refused, refuse, require};
use crate::memory::{AddressSpace, Fault, offset};

/// Where the next descriptor comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// The submission was the descriptor.
    Inline(Descriptor),
    /// A list in the client's memory.
    List { at: u64, left: u32 },
}

/// One batch, and how far it has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Execution {
    /// Class of the engines it may run on.
    pub class: u16,
    /// What follows the current descriptor.
    pub next: Next,
    /// The descriptor under way.
    pub current: Option<(Descriptor, Progress)>,
}

/// How a run of some steps has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// There is more to do.
    More,
    /// It waits for memory to change.
    Waiting,
    /// The batch is complete.
    Done,
    /// A descriptor failed, and the batch with it.
    Failed(Refused),
}

/// Raises interrupts. Implemented by the device, over eventfds or as it likes.
pub trait Notify: Send + Sync {
    /// The vector is to be raised.
    fn raise(&self, vector: u16);
}

/// Nobody listens: a client that polls.
#[derive(Debug)]
pub struct NoInterrupts;

impl Notify for NoInterrupts {
    fn raise(&self, _vector: u16) {}
}

impl Execution {
    pub(crate) fn inline(class: u16, descriptor: Descriptor) -> Self {
        Self { class, next: Next::Inline(descriptor), current: None }
    }

    pub(crate) fn list(class: u16, at: u64, count: u32) -> Result<Self, Refused> {
        require(count <= MAX_BATCH, || format!("a batch has at most {MAX_BATCH} descriptors, not {count}"))?;
        offset(at, u64::from(count) * DESCRIPTOR_BYTES as u64)?;
        Ok(Self { class, next: Next::List { at, left: count }, current: None })
    }

    /// Whether the engine may be given away now.
    pub(crate) fn preemptible(&self) -> bool {
        self.current.as_ref().is_none_or(|(d, _)| d.flags & flag::NO_PREEMPT == 0)
    }

    /// What it weighs in saved state, beyond what every request does.
    pub(crate) fn weight(&self) -> usize {
        match &self.current {
            Some((_, Progress::Program(machine))) => machine.weight(),
            _ => 0,
        }
    }

    /// Runs until `budget` nanoseconds of virtual time are used (or the worker's quantum of real time, if it has one), or until
    /// it ends or waits. Also tells what it cost.
    pub(crate) fn run(&mut self, context: u32, env: &mut Env<'_>, notify: &dyn Notify, budget: u64) -> (End, u64) {
        let mut spent = 0;
        let until = (env.scratch.quantum > 0).then(|| (env.now)().saturating_add(env.scratch.quantum));
        while until.map_or(spent < budget, |until| (env.now)() < until) {
            let (d, mut progress) = match self.current.take() {
                Some(current) => current,
                None => match self.fetch(context, env.space) {
                    Ok(Some(d)) => (d, Progress::Start),
                    Ok(None) => return (End::Done, spent),
                    Err((d, refused)) => {
                        let end = match d {
                            Some(d) => fail(&d, refused, env, notify),
                            None => refused,
                        };
                        return (End::Failed(end), spent);
                    }
                },
            };
            let (result, cost) = engines::step(&d, &mut progress, env);
            spent += cost;
            let (bytes, result) = match result {
                Ok(Step::More) => {
                    self.current = Some((d, progress));
                    continue;
                }
                Ok(Step::Waiting) => {
                    self.current = Some((d, progress));
                    return (End::Waiting, spent);
                }
                Ok(Step::Done { bytes, result }) => (bytes, result),
                Ok(Step::Jump { at, count }) => {
                    self.next = Next::List { at, left: count };
                    (0, 0)
                }
                Ok(Step::End) => {
                    self.next = Next::List { at: 0, left: 0 };
                    (0, 0)
                }
                Err(refused) => return (End::Failed(fail(&d, refused, env, notify)), spent),
            };
            if d.flags & (flag::COMPLETION | flag::INTERRUPT) == 0 {
                continue;
            }
            let record = Completion { status: status::DONE, bytes, result, ..blank(&d, env) };
            if let Err(fault) = end(&d, &record, env.space, notify) {
                return (End::Failed(fault.into()), spent);
            }
        }
        (End::More, spent)
    }

    /// The next descriptor, if there is one. A refusal comes with the descriptor it is about, where it could be read.
    fn fetch(
        &mut self,
        context: u32,
        space: &dyn AddressSpace,
    ) -> Result<Option<Descriptor>, (Option<Descriptor>, Refused)> {
        let (d, submitted) = match self.next {
            Next::Inline(d) => {
                self.next = Next::List { at: 0, left: 0 };
                (d, true)
            }
            Next::List { left: 0, .. } => return Ok(None),
            Next::List { at, left } => {
                let mut bytes = [0; DESCRIPTOR_BYTES];
                space.read(at, &mut bytes).map_err(|fault| (None, fault.into()))?;
                self.next = Next::List { at: at.wrapping_add(DESCRIPTOR_BYTES as u64), left: left - 1 };
                (Descriptor::decode(&bytes).map_err(|refused| (None, refused))?, false)
            }
        };
        let checked = d.check(self.class, submitted).and_then(|()| match d.context {
            own if own == context || own == 0 => Ok(()),
            other => refuse(Errno::Invalid, format!("a descriptor of context {other} runs in context {context}")),
        });
        checked.map(|()| Some(d)).map_err(|refused| (Some(d), refused))
    }
}

fn blank(d: &Descriptor, env: &Env<'_>) -> Completion {
    Completion { opcode: d.opcode, tag: d.tag, time: (env.now)(), ..Completion::default() }
}

fn fail(d: &Descriptor, refused: Refused, env: &Env<'_>, notify: &dyn Notify) -> Refused {
    let record = Completion { status: status::FAILED, error: refused.errno.number(), ..blank(d, env) };
    // A record that cannot be written leaves the first failure as it was.
    let _ = end(d, &record, env.space, notify);
    refused
}

/// Writes the completion record if one is wanted, and raises the vector.
pub(crate) fn end(
    d: &Descriptor,
    record: &Completion,
    space: &dyn AddressSpace,
    notify: &dyn Notify,
) -> Result<(), Fault> {
    let written = if d.flags & flag::COMPLETION != 0 { complete(space, d.completion, record) } else { Ok(()) };
    if d.flags & flag::INTERRUPT != 0 {
        notify.raise(d.vector);
    }
    written
}

/// Writes a completion record, its status byte last.
fn complete(space: &dyn AddressSpace, at: u64, record: &Completion) -> Result<(), Fault> {
    space.check(at, COMPLETION_BYTES as u64, crate::memory::Access::Write)?;
    space.write(offset(at, 1)?, &record.encode()[1..])?;
    space.publish(at, record.status)
}
