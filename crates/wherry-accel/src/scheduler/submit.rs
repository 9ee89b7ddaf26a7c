//! A submission becomes a request.

use crate::abi::{CLIENT_TIMELINE, Descriptor, Fence, MAX_QUEUE, flag, opcode};
use crate::error::{Errno, Refused, refuse, require};
use crate::map::{EngineSet, Slot};
use crate::work::Execution;

use super::{Core, Lane, Phase, REQUEST_WEIGHT, Request, Wait, Work, rank};

/// A descriptor as submitted, and the batches of a parallel one: (address, descriptors), read from the client's memory.
#[derive(Clone, Debug)]
pub(crate) struct Submission {
    pub descriptor: Descriptor,
    pub batches: Vec<(u64, u32)>,
}

impl Core {
    /// Takes a submission to a slot. Nothing is changed when it is refused.
    pub(crate) fn submit(&mut self, context: u32, slot: u32, submission: &Submission) -> Result<Fence, Refused> {
        if self.lost {
            return refuse(Errno::Io, "the device is lost");
        }
        let d = &submission.descriptor;
        let c = self.open(context)?;
        if c.banned {
            return refuse(Errno::Cancelled, format!("context {context} is banned"));
        }
        require(d.context == context || d.context == 0, || {
            format!("a descriptor of context {} is submitted to context {context}", d.context)
        })?;
        let Some(entry) = c.map.slot(slot).filter(|entry| **entry != Slot::Gap).cloned() else {
            return refuse(Errno::Invalid, format!("slot {slot} of context {context} is a gap, or beyond the map"));
        };
        if c.slots[slot as usize].timeline.queue.len() >= MAX_QUEUE {
            return refuse(
                Errno::Again,
                format!("slot {slot} of context {context} holds {MAX_QUEUE} requests already"),
            );
        }
        let (space, single, priority) = (c.space, c.single, c.priority);
        let lanes = self.lanes(&entry, submission)?;
        let wait = self.wait_of(d)?;
        // Refused when there is no room for the request itself; what its programs weigh is seen when they are loaded.
        if self.weight() + REQUEST_WEIGHT * lanes.len() > super::STATE_BUDGET {
            return refuse(
                Errno::Again,
                "the device holds as many requests as it can; try again when some are complete",
            );
        }

        let id = self.next_request;
        self.next_request += 1;
        self.requests_weight += REQUEST_WEIGHT * lanes.len();
        let c = self.open(context)?;
        c.used = true;
        let timeline = &mut c.slots[slot as usize].timeline;
        timeline.submitted += 1;
        timeline.queue.push_back(id);
        let fence = Fence { context, slot, seq: timeline.submitted };
        let after = single.and_then(|single| self.singles.insert(single, Some(fence)).flatten());
        let request = Request {
            fence,
            space,
            priority,
            rank: if entry.is_virtual() { rank::FRESH_VIRTUAL } else { rank::REST },
            order: self.next_order,
            wait,
            after,
            lanes,
            chooses: entry.is_virtual(),
            phase: Phase::Queued,
            submission: *d,
            doomed: None,
            pings: None,
            result: None,
        };
        self.next_order += 1;
        self.requests.insert(id, request);
        self.consider(id);
        Ok(fence)
    }

    fn lanes(&self, slot: &Slot, submission: &Submission) -> Result<Vec<Lane>, Refused> {
        let d = &submission.descriptor;
        let engines = slot.lanes();
        let class = self.engines[usize::from(engines[0][0])].id.class;
        d.check(class, true)?;
        if matches!(d.opcode, opcode::BATCH | opcode::PARALLEL) {
            let unfenced = d.flags & (flag::IN_FENCE | flag::SUBMIT_FENCE) == 0 && (d.first, d.second) != (0, 0);
            let masked = d.opcode == opcode::PARALLEL && d.destination != 0;
            require(d.word == 0 && !unfenced && !masked, || "a submission has words set that it does not use".into())?;
        }
        let executions = match (d.opcode, slot) {
            (opcode::PARALLEL, Slot::Parallel { width, .. }) => {
                let given = submission.batches.len();
                require(given == usize::from(*width), || format!("the slot takes {width} batches, not {given}"))?;
                let each = submission.batches.iter().map(|(at, count)| Execution::list(class, *at, *count));
                each.collect::<Result<Vec<_>, _>>()?
            }
            (_, Slot::Parallel { width, .. }) => {
                return refuse(
                    Errno::Invalid,
                    format!("the slot takes {width} batches at once, by operation parallel"),
                );
            }
            (opcode::PARALLEL, _) => return refuse(Errno::Invalid, "the slot takes one batch, not several"),
            (opcode::BATCH, _) => {
                vec![Execution::list(class, d.source, d.size)?]
            }
            _ => vec![Execution::inline(class, *d)],
        };
        // The execution mask counts in siblings of the slot; only batches have room for it.
        let mask = if d.opcode == opcode::BATCH { d.destination } else { 0 };
        let lanes = engines.iter().zip(executions).map(|(siblings, execution)| {
            let chosen = |(index, _): &(usize, &u8)| mask == 0 || mask >> index & 1 == 1;
            let allowed: EngineSet = siblings.iter().enumerate().filter(chosen).fold(0, |set, (_, e)| set | 1 << e);
            require(allowed != 0, || format!("the execution mask {mask:#x} leaves none of the slot's engines"))?;
            let work = Work::Here(Box::new(execution));
            Ok(Lane { siblings: siblings.to_vec(), allowed, work, engine: None })
        });
        lanes.collect()
    }

    fn wait_of(&self, d: &Descriptor) -> Result<Wait, Refused> {
        let (input, start) = (d.flags & flag::IN_FENCE != 0, d.flags & flag::SUBMIT_FENCE != 0);
        if !matches!(d.opcode, opcode::BATCH | opcode::PARALLEL) {
            return Ok(Wait::Nothing);
        }
        require(!(input && start), || "an in-fence and a submit-fence together".into())?;
        if !input && !start {
            return Ok(Wait::Nothing);
        }
        let fence = d.fence();
        let client = fence.slot == CLIENT_TIMELINE;
        require(!(client && start), || "a submit-fence needs a request, and the client's timeline has none".into())?;
        self.fence(fence)?;
        Ok(if start { Wait::Started(fence) } else { Wait::Signalled(fence) })
    }
}
